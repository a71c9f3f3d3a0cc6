"""What stops a campaign, how it is probed, and that it harms no lead."""

import itertools
import threading
from collections import Counter

import pytest
import sqlalchemy as sa

from pipeline.coordination.limiter import Limits
from pipeline.domain.campaign import CampaignState, Hold, HoldKind
from pipeline.ledger.tables import campaigns
from pipeline.sandbox.options import Options
from pipeline.sandbox.server import run_in_thread
from pipeline.settings import Rate
from tests.conftest import CAMPAIGN
from tests.integration.dispatch.conftest import (
    CONCURRENCY,
    OTHER,
    always,
    hang_up,
    now,
    seconds,
    when_accepted,
)
from tests.raw_server import raw_server


@pytest.mark.parametrize(
    ("spoil", "mend", "kind", "status"),
    [
        ({"api_keys": ["new-key"]}, {"api_keys": ["sandbox-key"]}, "refused_key", 401),
        ({"gone_campaigns": [CAMPAIGN]}, {"gone_campaigns": []}, "refused_campaign", 404),
    ],
)
def test_what_is_wrong_with_the_key_or_the_campaign_harms_no_lead(each_bench, spoil, mend, kind, status):
    bench = each_bench
    bench.take_in(150)
    bench.take_in(5, campaign=OTHER, first=1000)
    bench.take_in(5, campaign="another-account", first=2000, account="north")
    with run_in_thread(Options(latency_ms=10, api_keys={"sandbox-key", "north-key"})) as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, futwork_api_keys="north=north-key")
        spoiler = when_accepted(sandbox, 40, lambda: sandbox.change(**spoil))
        done = dispatcher.run(CAMPAIGN)
        spoiler.join()
        refused = Counter(entry["status"] for entry in sandbox.journal())[status]
        accepted = sandbox.stats()["accepted"]

        assert (done.ended, done.more) == ("held", False)
        assert 1 <= refused <= CONCURRENCY
        assert bench.states() == {"submitted": accepted, "queued": 150 - accepted}
        assert {lead["attempts"] for lead in bench.leads() if lead["state"] == "queued"} == {0}
        assert bench.campaign()["hold_kind"] == kind
        assert f"HTTP {status}" in bench.campaign()["reason"]
        both = "held" if kind == "refused_key" else "active"
        assert [bench.campaign(name)["state"] for name in (OTHER, "another-account")] == [both, "active"]

        # Held: no lead goes out until a probe is due, and then one.
        posts = sandbox.stats()["received"]
        again = dispatcher.run(CAMPAIGN)
        assert (again.ended, again.more, again.posts) == ("held", False, 0)
        bench.make_due()
        bench.make_probe_due()
        probe = dispatcher.run(CAMPAIGN)
        assert (probe.ended, probe.more, probe.posts) == ("held", False, 1)
        assert sandbox.stats()["received"] == posts + 1
        assert bench.states() == {"submitted": accepted, "queued": 150 - accepted}

        # Mended: the next probe releases all that was held with it, and the rest follows.
        sandbox.change(**mend)
        bench.make_due()
        bench.make_probe_due()
        probe = dispatcher.run(CAMPAIGN)
        assert (probe.ended, probe.more, probe.outcomes) == ("released", True, {"accepted": 1})
        assert [bench.campaign(name)["state"] for name in (CAMPAIGN, OTHER)] == ["active", "active"]
        rest = dispatcher.run(CAMPAIGN)
        assert (rest.ended, rest.more) == ("idle", False)
        assert bench.states() == {"submitted": 150}
        assert sandbox.stats()["duplicates"] == 0


@pytest.mark.parametrize("status", [422, 400])
def test_a_run_of_rejected_leads_holds_the_campaign(each_bench, status):
    bench = each_bench
    bench.take_in(100)
    with raw_server(always(f"{status} No", b'{"message":"unknown key place"}')) as server:
        done = bench.dispatcher(server.url).run(CAMPAIGN)
    assert done.ended == "held"
    assert 20 <= done.outcomes["rejected"] <= 20 + CONCURRENCY
    assert bench.states() == {"queued": 100}  # the schema may be at fault, and not one of them
    assert bench.campaign()["hold_kind"] == "rejections"
    assert "unknown key place" in bench.campaign()["reason"]


def test_rejected_leads_between_accepted_ones_hold_nothing(bench):
    bench.take_in(60)
    turn, lock = [0], threading.Lock()

    def handle(peer):
        while peer.request():
            with lock:
                turn[0] += 1
                rejects = turn[0] % 10
            peer.answer("422 No" if rejects else "200 OK", b"{}")

    with raw_server(handle) as server:
        done = bench.dispatcher(server.url, dispatch_concurrency=1).run(CAMPAIGN)
    assert (done.ended, bench.campaign()["state"]) == ("idle", "active")
    assert bench.states() == {"rejected": 54, "submitted": 6}


@pytest.mark.parametrize(
    ("handle", "state"),
    [
        (always("502 Bad Gateway", b""), "uncertain"),
        (hang_up, "uncertain"),
        (always("500 Oops", b""), "uncertain"),
        (always("503 Busy", b""), "queued"),
        (None, "queued"),
    ],
)
def test_an_outage_holds_the_campaign_and_harms_few_leads(each_bench, handle, state):
    bench = each_bench
    bench.take_in(100)
    with raw_server(handle or hang_up) as server:
        if handle is None:
            server.close()
        done = bench.dispatcher(server.url).run(CAMPAIGN)
    assert done.ended == "held"
    assert bench.campaign()["hold_kind"] == "outage"
    charged = [lead for lead in bench.leads() if lead["attempts"]]
    assert 5 <= len(charged) <= 5 + CONCURRENCY
    assert {lead["state"] for lead in charged} == {state}
    assert {lead["state"] for lead in bench.leads() if not lead["attempts"]} == {"queued"}


def test_answers_that_never_come_are_no_outage_while_what_is_sent_later_is_accepted(each_bench):
    """Seen where one POST in twelve stalled: these end last, so in a row; the campaign was held with nothing left."""
    bench = each_bench
    bench.take_in(40)
    stalled = itertools.count()

    def handle(peer):
        while peer.request():
            if next(stalled) < 6:
                peer.hang()
            else:
                peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        done = bench.dispatcher(server.url, read_timeout_seconds=1.5).run(CAMPAIGN)
    assert (done.ended, bench.campaign()["state"]) == ("idle", "active")
    assert bench.states() == {"submitted": 34, "uncertain": 6}


def test_without_a_key_the_account_is_held_and_nothing_is_sent(each_bench):
    bench = each_bench
    bench.take_in(10)
    bench.take_in(1, campaign=OTHER, first=1000)
    bench.take_in(1, campaign="c-north", first=2000, account="north")
    with run_in_thread() as sandbox:
        keyless = bench.dispatcher(sandbox.url, futwork_api_key="")
        for _ in range(3):
            done = keyless.run(CAMPAIGN)
            assert (done.ended, done.more, done.posts) == ("held", False, 0)
        assert keyless.run("c-north").ended == "held"
        assert sandbox.stats()["received"] == 0
        held = {name: bench.campaign(name) for name in (CAMPAIGN, OTHER, "c-north")}
        assert {one["hold_kind"] for one in held.values()} == {"no_key"}
        assert "set FUTWORK_API_KEY and restart" in held[CAMPAIGN]["reason"]
        assert "set FUTWORK_API_KEYS (north=…) and restart" in held["c-north"]["reason"]
        assert bench.states() == {"queued": 10}

        bench.make_probe_due()
        keyed = bench.dispatcher(sandbox.url)
        assert keyed.run(CAMPAIGN).ended == "released"
        assert keyed.run(CAMPAIGN).ended == "idle"
        assert bench.states() == {"submitted": 10}
        assert [bench.campaign(name)["state"] for name in (OTHER, "c-north")] == ["active", "held"]


def test_probes_send_one_lead_each_at_growing_intervals(each_bench):
    bench = each_bench
    bench.take_in(20)
    with raw_server(always("401 No", b"{}")) as server:
        dispatcher = bench.dispatcher(server.url, probe_first_seconds=30, probe_cap_seconds=100)
        dispatcher.run(CAMPAIGN)
        assert seconds(25) < bench.campaign()["probe_at"] - now() <= seconds(30)
        intervals = []
        for _ in range(4):
            assert dispatcher.run(CAMPAIGN).posts == 0  # not due
            bench.make_due()
            bench.make_probe_due()
            assert dispatcher.run(CAMPAIGN).posts == 1
            intervals.append(round((bench.campaign()["probe_at"] - now()).total_seconds(), -1))
    assert intervals == [30, 60, 100, 100]
    assert bench.states() == {"queued": 20}
    assert bench.campaign()["hold_kind"] == "refused_key"


def test_a_probe_keeps_to_the_limit(bench):
    bench.take_in(1)
    with raw_server(always("401 No", b"{}")) as server:
        dispatcher = bench.dispatcher(server.url)
        dispatcher.run(CAMPAIGN)
        bench.make_due()
        bench.make_probe_due()
        bench.limiter.stop("default", seconds(60))
        done = dispatcher.run(CAMPAIGN)
        assert (done.ended, done.posts) == ("limit", 0)
        bench.valkey.flushall()
        assert dispatcher.run(CAMPAIGN).posts == 1  # the probe was not used up


def test_a_probe_that_is_not_due_takes_no_slot(bench):
    bench.take_in(1)
    bench.ledger.campaigns.hold(CAMPAIGN, Hold(HoldKind.OUTAGE, "it was out"), probe_at=now() + seconds(60), now=now())
    with raw_server(always("200 OK", b"{}")) as server:
        done = bench.dispatcher(server.url, account_rate="1/h", campaign_rate="1/h").run(CAMPAIGN)
    assert (done.ended, done.posts) == ("held", 0)
    assert bench.limiter.reserve(Limits("default", Rate(1, 3600), CAMPAIGN, Rate(1, 3600)), 5).slots == 1


def test_a_paused_campaign_is_neither_sent_nor_probed(each_bench):
    bench = each_bench
    bench.take_in(3)
    bench.ledger.campaigns.pause(CAMPAIGN, reason="lunch", now=now())
    bench.make_probe_due()
    with raw_server(always("200 OK", b"{}")) as server:
        done = bench.dispatcher(server.url).run(CAMPAIGN)
        assert server.connections == 0
    assert (done.ended, done.more) == ("not active", False)
    assert bench.states() == {"queued": 3}


def test_an_unknown_campaign_has_nothing_to_send(bench):
    with raw_server(always("200 OK", b"{}")) as server:
        done = bench.dispatcher(server.url).run("nobody-knows-it")
        assert server.connections == 0
    assert (done.ended, done.more) == ("not active", False)


@pytest.mark.parametrize("how", ["paused", "held"])
def test_a_campaign_that_is_stopped_meanwhile_ends_its_slice_without_asking_for_more(each_bench, how):
    bench = each_bench
    bench.take_in(300)

    def stop():
        if how == "paused":
            bench.ledger.campaigns.pause(CAMPAIGN, reason="lunch", now=now())
        else:
            with bench.ledger.database.write() as connection:
                connection.execute(
                    sa.update(campaigns).values(
                        state=CampaignState.HELD,
                        hold_kind=HoldKind.OUTAGE,
                        hold_reason="another dispatcher saw it",
                        stopped_at=now(),
                        probe_at=now() + seconds(60),
                    )
                )

    with run_in_thread(Options(latency_ms=10)) as sandbox:
        stopper = when_accepted(sandbox, 30, stop)
        done = bench.dispatcher(sandbox.url).run(CAMPAIGN)
        stopper.join()
        accepted = sandbox.stats()["accepted"]
    assert (done.ended, done.more) == ("idle", False)
    assert 30 <= accepted < 300
    assert bench.states() == {"submitted": accepted, "queued": 300 - accepted}
