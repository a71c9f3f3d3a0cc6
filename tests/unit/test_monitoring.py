"""The alert rules, the dashboard and the configuration: right by Prometheus' own tools, whole, and explained."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.observability.metrics import METRICS
from tests.conftest import missing
from tests.waiting import patience

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
NAMES = {name for measure in METRICS for name in measure.series}
RULES = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]  # fmt: skip


def promtool(*arguments: str, folder: Path = PROMETHEUS) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        missing("promtool", "install Debian's package `prometheus`")
    return subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=patience())


def named_in(query: str) -> set[str]:
    return set(re.findall(r"\bpipeline_[a-z_]+", query))


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", ())


def queries() -> list[str]:
    """Every query of every dashboard."""
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    asked = [target["expr"] for board in boards for panel in panels(board) for target in panel.get("targets", ())]
    return asked + [one["query"]["query"] for board in boards for one in board["templating"]["list"] if "query" in one]


# The alerts


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    done = promtool("check", "config", "prometheus.yml")

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


def test_each_alert_fires_when_it_should_and_at_no_other_time() -> None:
    done = promtool("test", "rules", "alerts_test.yml")

    assert done.returncode == 0, done.stdout + done.stderr
    tested = re.findall(r'alertname="(\w+)"', (PROMETHEUS / "alerts_test.yml").read_text())
    assert {rule["alert"] for rule in RULES} == set(tested)


def test_an_alert_whose_threshold_slipped_does_not_pass(tmp_path: Path) -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())
    tests["tests"] = [one for one in tests["tests"] if "PipelineNoBeat" in str(one)]
    (tmp_path / "alerts_test.yml").write_text(yaml.safe_dump(tests))
    text = (PROMETHEUS / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(text.replace('kind="beat"}) == 0', 'kind="beat"}) < 0'))

    done = promtool("test", "rules", "alerts_test.yml", folder=tmp_path)

    assert len(tests["tests"]) == 1
    assert done.returncode != 0
    assert "PipelineNoBeat" in done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_says_what_it_means_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
    assert summary
    assert not summary.endswith(".")
    assert description.endswith(".")
    document, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / document).read_text(), re.MULTILINE)
    assert anchor == rule["alert"].lower()
    assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_rules_ask_for_metrics_that_exist() -> None:
    asked = set().union(*(named_in(rule["expr"]) for rule in RULES))

    assert asked - NAMES == set()
    assert len(asked) > 20


def test_what_every_web_host_tells_alike_is_taken_once() -> None:
    """Two web hosts would otherwise double it, or raise each alert twice."""
    own = {name for one in METRICS if one.source in ("web", "spool", "process") for name in one.series}
    for rule in RULES:
        for name in named_in(rule["expr"]) - own:
            before = rule["expr"].split(name)[0]
            assert re.search(r"(max|min|sum) without \(instance\) \((\w+\()*$", before), (rule["alert"], name)


# The dashboard


def test_the_dashboards_ask_for_metrics_that_exist() -> None:
    asked = set().union(*map(named_in, queries()))

    assert asked - NAMES == set()
    assert asked


def test_every_metric_is_on_the_dashboard_or_has_an_alert() -> None:
    seen = set().union(*map(named_in, queries()), *(named_in(rule["expr"]) for rule in RULES))

    assert [one.exposed for one in METRICS if not seen & set(one.series)] == []


def test_prometheus_takes_every_query_of_the_dashboards(tmp_path: Path) -> None:
    """As recording rules, so that one run checks them all."""
    asked = [query for query in queries() if not query.startswith("label_values(")]
    rules = [{"record": f"query_{number}", "expr": _filled_in(query)} for number, query in enumerate(asked)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))

    done = promtool("check", "rules", "queries.yml", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(asked)} rules found" in done.stdout


def _filled_in(query: str) -> str:
    """With what Grafana would put in the place of its variables."""
    return query.replace("$__rate_interval", "1m").replace("$campaign", ".*").replace("$__range", "1h")


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboards_panels_have_a_place_a_title_an_explanation_and_a_unit(path: Path) -> None:
    board = json.loads(path.read_text())
    places: set[tuple[int, int]] = set()
    for panel in panels(board):
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, panel["title"]
        assert place["x"] + place["w"] <= 24
        places |= cells
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "pipeline-prometheus"}
    ids = [panel["id"] for panel in panels(board)]
    assert len(ids) == len(set(ids))


def test_grafana_is_provisioned_with_the_data_source_that_the_dashboards_use() -> None:
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    [source] = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((folder / "dashboards" / "pipeline.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]

    assert (source["type"], source["uid"], source["url"]) == (
        "prometheus",
        "pipeline-prometheus",
        "http://prometheus:9090",
    )
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in compose["volumes"])
    assert DASHBOARDS
