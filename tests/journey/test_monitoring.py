"""A running pipeline under a real Prometheus: every metric of rules and dashboard is there, and alerts speak up.

All alerts are tried by `make alerts`; here are two, so that a rule that stops working is noticed at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.broker import QUEUES
from pipeline.ledger import Ledger
from pipeline.observability.metrics import EVENTS, METRICS
from tests.alerts.experiments import EXPERIMENTS, run
from tests.alerts.rig import Rig
from tests.unit.test_monitoring import RULES, named_in, queries
from tests.waiting import until

SHORT = ("limit", "key")


@pytest.fixture
def rig(tmp_path: Path, postgres_url: str, postgres_ledger: Ledger) -> Iterator[Rig]:  # the ledger: emptied
    del postgres_ledger
    rig = Rig(tmp_path, postgres_url)
    yield rig
    rig.end()


def test_every_metric_is_there_and_two_faults_are_told_of_and_end(rig: Rig) -> None:
    rig.enqueue("calm", 20)
    until(lambda: counts_agree(rig, accepted=20), what=lambda: what_differs(rig))
    seen = [run(rig, one, seconds=100) for name in SHORT for one in EXPERIMENTS if one.name == name]
    until(lambda: counts_agree(rig, accepted=22), what=lambda: what_differs(rig))

    assert [one.fired_after.keys() for one in seen] == [{"PipelineLimiterAway"}, {"PipelineCampaignHeld"}]
    assert [one.silent_after.keys() for one in seen] == [{"PipelineLimiterAway"}, {"PipelineCampaignHeld"}]

    text = rig.scrape()
    told = {name for name, *_ in samples(text)}
    without_values = re.sub(r" \S+$", "", text, flags=re.MULTILINE)  # whose digits are any
    assert re.findall(r"98\d{8}", without_values) == []
    assert told - {name for one in METRICS for name in one.series} == set()
    assert {one.series[-1] for one in METRICS} - SILENT - told == set()
    asked = set().union(*map(named_in, queries()), *(named_in(rule["expr"]) for rule in RULES))
    assert asked - SILENT - told == set()

    assert rig.prometheus.unhealthy() == []
    for query in queries():
        if not query.startswith("label_values("):
            rig.prometheus.query(query.replace("$__rate_interval", "10s").replace("$campaign", ".*"))


SILENT = {"pipeline_campaign_stopped"}  # no campaign stands still any more


def counts_agree(rig: Rig, *, accepted: int) -> bool:
    """Whether the metrics, counted by several processes, say what the simulated Futwork saw and who runs."""
    counted, stats = samples(rig.scrape()), rig.sandbox.stats()
    came = sum(counted.get(("pipeline_events_total", result), 0) for result in EVENT_RESULTS)
    expected = {
        ("pipeline_submissions_total", "accepted"): accepted,
        ("pipeline_submissions_total", "refused_key"): stats["statuses"].get("401", 0),
        ("pipeline_submission_duration_seconds_count", "accepted"): accepted,
        ("pipeline_intake_leads_total", "accepted"): accepted,
        ("pipeline_leads_accepted_total",): accepted,
        ("pipeline_leads", "calm", "called"): 20,
        ("pipeline_leads_unaccounted",): 0,
        ("pipeline_webhook_answers_total", "200"): came,
        ("pipeline_processes", "worker"): 2,
        ("pipeline_processes", "beat"): 1,
        ("pipeline_processes", "web"): 1,
        **{("pipeline_queue_workers", queue): 1 for queue in QUEUES},
    }
    return expected == {key: counted.get(key) for key in expected} and stats["accepted"] == accepted


def what_differs(rig: Rig) -> str:
    return f"{rig.sandbox.stats()}\n{rig.scrape()}\n{rig.fleet.logs()[-4000:]}"


EVENT_RESULTS = EVENTS.values["result"]


def samples(text: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
