"""Dispatch from end to end: a real ledger, a real Valkey, and a Futwork that answers as it is told."""

import itertools
import threading
import time
import uuid
from collections import Counter, deque
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import sqlalchemy as sa

from pipeline.coordination.connection import connect
from pipeline.coordination.dispatch_leases import DispatchLeases
from pipeline.coordination.limiter import Limiter, Limits
from pipeline.dispatch import Dispatcher
from pipeline.domain.campaign import CampaignState, Hold, HoldKind
from pipeline.domain.lead import lead_id
from pipeline.futwork import Futwork, with_curl, with_requests
from pipeline.futwork.wire import taken
from pipeline.ledger import LeadFilter, Ledger
from pipeline.ledger.tables import campaigns, leads
from pipeline.sandbox.options import Options
from pipeline.sandbox.server import run_in_thread
from pipeline.settings import Rate
from tests.conftest import CAMPAIGN, make_lead
from tests.raw_server import raw_server

OTHER = "68ecc86fd9fbecbe9431a190"
CONCURRENCY = 8


def now():
    return datetime.now(UTC)


def seconds(value):
    return timedelta(seconds=value)


class Bench:
    """A ledger and a Valkey, dispatchers over them, and a look at what became of the leads."""

    def __init__(self, ledger, valkey, make_settings):
        self.ledger, self.valkey, self._make_settings = ledger, valkey, make_settings
        self.leases = DispatchLeases(valkey)
        self.limiter = Limiter(valkey)
        self.asked = []
        self._closing = []

    def dispatcher(self, url, *, ledger=None, limiter=None, leases=None, stopping=lambda: False, **overrides):
        """A dispatcher with a Futwork of its own; its backoff is far longer than any test."""
        settings = self._make_settings(
            **{
                "futwork_base_url": url,
                "dispatch_concurrency": CONCURRENCY,
                "connect_timeout_seconds": 2.0,
                "read_timeout_seconds": 5.0,
                "backoff_base_seconds": 300.0,
                "backoff_cap_seconds": 3000.0,
                "slice_seconds": 10.0,
            }
            | overrides
        )
        futwork = Futwork(settings)
        self._closing.append(futwork.close)
        dispatcher = Dispatcher(
            ledger or self.ledger,
            futwork,
            limiter or self.limiter,
            leases or self.leases,
            settings,
            request_dispatcher=self.asked.append,
            stopping=stopping,
        )
        dispatcher._jitter.seed(4)  # no backoff by chance near nothing
        return dispatcher

    def ledger_of_its_own(self):
        ledger = Ledger(self.ledger.database.url.render_as_string(hide_password=False))
        self._closing.append(ledger.close)
        return ledger

    def take_in(self, count=1, *, campaign=CAMPAIGN, first=0, max_age=86400, **policies):
        at = now()
        found = self.ledger.campaigns.ensure(campaign, now=at)
        if policies:
            found = self.ledger.campaigns.change(campaign, policies, now=at)
        rows = [make_lead(number) for number in range(first, first + count)]
        self.ledger.leads.take_in(found, rows, batch_id=uuid.uuid4(), max_age=seconds(max_age), now=at)

    def story(self, number=0, campaign=CAMPAIGN):
        return self.ledger.reports.story(lead_id(campaign, make_lead(number).key))

    def leads(self, campaign=CAMPAIGN):
        return self.ledger.reports.leads(LeadFilter(campaign=campaign), limit=100_000)

    def states(self, campaign=CAMPAIGN):
        return dict(Counter(lead["state"] for lead in self.leads(campaign)))

    def campaign(self, campaign=CAMPAIGN):
        return next(one for one in self.ledger.reports.campaigns() if one["id"] == campaign)

    def make_due(self, campaign=CAMPAIGN):
        """Let every backoff of the campaign be over."""
        with self.ledger.database.write() as connection:
            connection.execute(
                sa.update(leads).where(leads.c.campaign_id == campaign).values(due_at=now() - seconds(1))
            )

    def make_probe_due(self, campaign=CAMPAIGN):
        with self.ledger.database.write() as connection:
            connection.execute(
                sa.update(campaigns).where(campaigns.c.id == campaign).values(probe_at=now() - seconds(1))
            )

    def close(self):
        for close in self._closing:
            close()


@contextmanager
def opened(ledger, valkey, make_settings):
    bench = Bench(ledger, valkey, make_settings)
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture
def bench(sqlite_ledger, valkey, make_settings):
    """The bench on SQLite, for what does not depend on the database."""
    with opened(sqlite_ledger, valkey, make_settings) as bench:
        yield bench


@pytest.fixture
def each_bench(ledger, valkey, make_settings):
    """The bench on both databases."""
    with opened(ledger, valkey, make_settings) as bench:
        yield bench


def always(*reply):
    def handle(peer):
        while peer.request():
            peer.answer(*reply)

    return handle


def hang_up(peer):
    peer.request()


# The outcome table, row by row

IN_40 = "in forty seconds"
BACKOFF = (10, 600)
NOW = (0, 5)


@pytest.mark.parametrize(
    ("status", "body", "header", "state", "outcome", "attempts", "due", "hold"),
    [
        (200, b'{"data":{"_id":"68ecc93cd9fbecbe9431a2a1"}}', "", "submitted", "accepted", 1, NOW, None),
        (202, b"", "", "submitted", "accepted", 1, NOW, None),
        (200, b'{"success":false,"message":"no"}', "", "rejected", "rejected", 1, NOW, None),
        (200, b'{"error":"no"}', "", "rejected", "rejected", 1, NOW, None),
        (429, b"slow", "Retry-After: 1000", "queued", "throttled", 0, (995, 1000), None),
        (429, b"slow", f"Retry-After: {IN_40}", "queued", "throttled", 0, (35, 400), None),
        (429, b"slow", "", "queued", "throttled", 0, (10, 300), None),
        (503, b"busy", "Retry-After: 1000", "queued", "busy", 1, (995, 1000), None),
        (503, b"busy", "", "queued", "busy", 1, BACKOFF, None),
        (500, b"oops", "", "queued", "failed", 1, BACKOFF, None),
        (501, b"oops", "", "queued", "failed", 1, BACKOFF, None),
        (502, b"gate", "", "uncertain", "uncertain", 1, NOW, None),
        (504, b"gate", "", "uncertain", "uncertain", 1, NOW, None),
        (408, b"late", "", "uncertain", "uncertain", 1, NOW, None),
        (401, b"key", "", "queued", "refused_key", 0, (10, 300), "refused_key"),
        (403, b"key", "", "queued", "refused_key", 0, (10, 300), "refused_key"),
        (404, b"gone", "", "queued", "refused_campaign", 0, (10, 300), "refused_campaign"),
        (302, b"moved", "Location: /elsewhere", "queued", "refused_campaign", 0, (10, 300), "refused_campaign"),
        (400, b"bad", "", "rejected", "rejected", 1, NOW, None),
        (409, b"dup", "", "rejected", "rejected", 1, NOW, None),
        (413, b"big", "", "rejected", "rejected", 1, NOW, None),
        (422, b"bad", "", "rejected", "rejected", 1, NOW, None),
        (418, b"tea", "", "rejected", "rejected", 1, NOW, None),
    ],
)
def test_each_answer_makes_of_its_lead_what_the_table_says(
    each_bench, status, body, header, state, outcome, attempts, due, hold
):
    bench = each_bench
    bench.take_in()
    date = format_datetime(now() + seconds(40), usegmt=True)
    with raw_server(always(f"{status} X", body, *filter(None, [header.replace(IN_40, date)]))) as server:
        started = now()
        done = bench.dispatcher(server.url).run(CAMPAIGN)
    story = bench.story()
    assert (story["state"], story["attempts"]) == (state, attempts)
    assert [(one["outcome"], one["http_status"]) for one in story["attempts_made"]] == [(outcome, status)]
    assert seconds(due[0]) <= story["due_at"] - started + seconds(1) and story["due_at"] - now() <= seconds(due[1])
    if state == "submitted":
        assert story["reason"] is None
        assert story["submitted_at"] is not None
        assert story["futwork_lead_id"] == ("68ecc93cd9fbecbe9431a2a1" if body else None)
    else:
        assert story["reason"] == f"{outcome}: HTTP {status} {body.decode()}"
        assert story["attempts_made"][0]["excerpt"] == f"HTTP {status} {body.decode()}"
        assert (story["submitted_at"], story["futwork_lead_id"]) == (None, None)
    assert dict(done.outcomes) == {outcome: 1}
    assert done.ended == ("held" if hold else "limit" if outcome == "throttled" else "idle")
    assert bench.campaign()["hold_kind"] == hold
    assert not done.more


@pytest.mark.parametrize(
    ("handle", "why"),
    [
        (hang_up, "the connection was closed without an answer"),
        (lambda peer: peer.hang(), "no answer within the time allowed"),
    ],
)
def test_a_request_without_an_answer_leaves_its_lead_uncertain(each_bench, handle, why):
    each_bench.take_in()
    with raw_server(handle) as server:
        each_bench.dispatcher(server.url, read_timeout_seconds=0.3).run(CAMPAIGN)
    story = each_bench.story()
    assert (story["state"], story["attempts"], story["reason"]) == ("uncertain", 1, f"uncertain: {why}")
    assert [one["http_status"] for one in story["attempts_made"]] == [None]


def test_a_request_that_did_not_leave_is_tried_again_later(each_bench):
    each_bench.take_in()
    with raw_server(hang_up) as server:
        url = server.url
    each_bench.dispatcher(url).run(CAMPAIGN)
    story = each_bench.story()
    assert (story["state"], story["attempts"]) == ("queued", 1)
    assert story["reason"] == "not_sent: the connection was refused or could not be made"
    assert seconds(10) < story["due_at"] - now() < seconds(600)


@pytest.mark.parametrize("policy", [{}, {"max_attempts": 3}])
def test_a_lead_is_tried_no_more_often_than_allowed(each_bench, policy):
    bench = each_bench
    bench.take_in(**policy)
    with raw_server(always("500 Oops", b"{}")) as server:
        dispatcher = bench.dispatcher(server.url, max_attempts=8 if policy else 3)
        states = []
        for _ in range(5):
            dispatcher.run(CAMPAIGN)
            states.append(bench.story()["state"])
            bench.make_due()
    assert states == ["queued", "queued", "exhausted", "exhausted", "exhausted"]
    assert len(bench.story()["attempts_made"]) == 3


def test_throttling_never_exhausts_a_lead(bench):
    bench.take_in()
    with raw_server(always("429 Slow", b"{}")) as server:
        dispatcher = bench.dispatcher(server.url, max_attempts=2)
        for _ in range(4):
            assert dispatcher.run(CAMPAIGN).outcomes == {"throttled": 1}
            bench.make_due()
            bench.valkey.flushall()  # the pause is over
    assert (bench.story()["state"], bench.story()["attempts"]) == ("queued", 0)


def test_a_lead_that_would_be_due_after_its_time_is_expired(each_bench):
    each_bench.take_in(max_age=60)
    with raw_server(always("503 Busy", b"{}", "Retry-After: 100")) as server:
        each_bench.dispatcher(server.url).run(CAMPAIGN)
    assert (each_bench.story()["state"], each_bench.story()["attempts"]) == ("expired", 1)


def test_a_lead_that_is_too_old_is_not_sent(bench):
    bench.take_in(max_age=-1)
    with raw_server(always("200 OK", b"{}")) as server:
        done = bench.dispatcher(server.url).run(CAMPAIGN)
        assert server.connections == 0
    assert (done.ended, done.more, done.posts) == ("idle", False, 0)


# Holds


def when_accepted(sandbox, count, act):
    """A thread that acts as soon as so many leads were accepted."""

    def watch():
        sandbox.wait(lambda stats: stats["accepted"] >= count)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


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
        (always("500 Oops", b""), "queued"),
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


# Side by side


def test_dispatchers_side_by_side_send_each_lead_once_and_keep_to_the_limit(each_bench):
    bench = each_bench
    bench.take_in(250)
    rate = 150
    failures = []

    def work(dispatcher):
        try:
            deadline = time.monotonic() + 20
            while bench.states().get("submitted", 0) < 250 and time.monotonic() < deadline:
                dispatcher.run(CAMPAIGN)
        except Exception as error:
            failures.append(error)
            raise

    with run_in_thread(Options(latency_ms=15)) as sandbox:
        dispatchers = [
            bench.dispatcher(sandbox.url, ledger=bench.ledger_of_its_own(), account_rate=f"{rate}/s", slice_seconds=0.5)
            for _ in range(4)
        ]
        threads = [threading.Thread(target=work, args=(one,)) for one in dispatchers]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - started
        journal, stats = sandbox.journal(), sandbox.stats()
    assert failures == []
    assert Counter(Counter(entry["phone"] for entry in journal).values()) == {1: 250}
    assert bench.states() == {"submitted": 250}
    assert bench.ledger.reports.attempts_by_outcome() == {"accepted": 250}
    burst = rate // 20
    assert took > (250 - burst) / rate
    # The limit is exact where slots are granted; on a busy machine, what is in flight may come closer together.
    assert stats["max_received_in_a_second"] <= rate + burst + 4 * CONCURRENCY


def test_a_wrong_key_costs_each_dispatcher_one_batch_at_most(each_bench):
    bench = each_bench
    bench.take_in(400)
    with run_in_thread(Options(latency_ms=20, api_keys={"another"})) as sandbox:
        dispatchers = [bench.dispatcher(sandbox.url, ledger=bench.ledger_of_its_own()) for _ in range(3)]
        slices = []
        threads = [threading.Thread(target=lambda one=one: slices.append(one.run(CAMPAIGN))) for one in dispatchers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= sandbox.stats()["received"] <= 3 * CONCURRENCY
    assert [one.more for one in slices] == [False] * 3
    assert bench.states() == {"queued": 400}
    assert {lead["attempts"] for lead in bench.leads()} == {0}
    assert bench.campaign()["hold_kind"] == "refused_key"


def test_no_more_dispatchers_than_allowed_work_on_a_campaign(bench):
    bench.take_in(5)
    with run_in_thread() as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, dispatchers_per_campaign=1)
        assert bench.leases.take(CAMPAIGN, most=1, duration=seconds(10)) is not None  # of one that was killed
        done = dispatcher.run(CAMPAIGN)
        assert (done.ended, done.more, done.posts) == ("no lease", False, 0)
        [key] = bench.valkey.keys("*held*")
        [holder] = bench.valkey.zrange(key, 0, -1)
        bench.valkey.zincrby(key, -10, holder)  # its lease is over
        assert dispatcher.run(CAMPAIGN).outcomes == {"accepted": 5}


def test_a_turn_is_given_up_after_the_slice(bench):
    bench.take_in(5)
    with run_in_thread() as sandbox:
        bench.dispatcher(sandbox.url, dispatchers_per_campaign=1).run(CAMPAIGN)
    assert bench.leases.take(CAMPAIGN, most=1, duration=seconds(10)) is not None


def test_help_is_asked_for_once_where_the_limit_allows_more_than_fits_in_flight(bench):
    bench.take_in(60)
    with run_in_thread(Options(latency_ms=5)) as sandbox:
        bench.dispatcher(sandbox.url).run(CAMPAIGN)
        assert bench.asked == [CAMPAIGN]
        bench.take_in(5, first=100)
        bench.dispatcher(sandbox.url).run(CAMPAIGN)
        assert bench.asked == [CAMPAIGN]


def test_one_slow_answer_does_not_hold_up_the_campaign(bench):
    bench.take_in(20)
    release, seen = threading.Event(), []

    def handle(peer):
        while peer.request():
            seen.append(peer)
            if len(seen) == 1:
                release.wait(20)
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        dispatcher = bench.dispatcher(
            server.url, account_rate="10/s", slice_seconds=0.2, read_timeout_seconds=20, dispatchers_per_campaign=1
        )
        slices = []
        first = threading.Thread(target=lambda: slices.append(dispatcher.run(CAMPAIGN)))
        first.start()
        deadline = time.monotonic() + 10
        while not bench.asked:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        second = bench.dispatcher(server.url, dispatchers_per_campaign=1).run(CAMPAIGN)
        release.set()
        first.join()
    assert bench.asked[0] == CAMPAIGN
    assert slices[0].posts + second.posts == 20
    assert (slices[0].ended, slices[0].more, second.ended) == ("time", False, "idle")
    assert bench.states() == {"submitted": 20}


# The limit


def test_slots_without_a_lead_are_given_back(bench):
    bench.take_in(0)
    with raw_server(always("200 OK", b"{}")) as server:
        done = bench.dispatcher(server.url, account_rate="1/h", campaign_rate="1/h").run(CAMPAIGN)
    assert (done.ended, done.more) == ("idle", False)
    assert bench.limiter.reserve(Limits("default", Rate(1, 3600), CAMPAIGN, Rate(1, 3600)), 5).slots == 1


def test_a_campaigns_own_rate_holds_beside_the_accounts(bench):
    bench.take_in(12, rate="10/s")
    with run_in_thread() as sandbox:
        started = time.monotonic()
        bench.dispatcher(sandbox.url, account_rate="1000/s").run(CAMPAIGN)
        took = time.monotonic() - started
        assert sandbox.stats()["max_received_in_a_second"] <= 11
    assert bench.states() == {"submitted": 12}
    assert 1.05 < took < 2


def test_a_campaign_without_due_leads_takes_no_time(bench):
    bench.take_in(1)
    with run_in_thread() as sandbox:
        dispatcher = bench.dispatcher(sandbox.url)
        dispatcher.run(CAMPAIGN)  # builds connections
        bench.take_in(1, first=1)
        started = time.monotonic()
        assert [dispatcher.run(CAMPAIGN).posts for _ in range(5)] == [1, 0, 0, 0, 0]
        assert time.monotonic() - started < 1


def test_waiting_for_slots_asks_no_more_often_than_it_must(bench):
    bench.take_in(3)
    with run_in_thread() as sandbox:
        bench.valkey.config_resetstat()
        bench.dispatcher(sandbox.url, account_rate="3/s").run(CAMPAIGN)
        calls = bench.valkey.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert bench.states() == {"submitted": 3}
    assert calls <= 35


def test_a_limit_that_is_further_off_than_the_slice_leaves_the_process_to_others(bench):
    bench.take_in(2)
    with run_in_thread() as sandbox:
        started = time.monotonic()
        done = bench.dispatcher(sandbox.url, account_rate="1/h").run(CAMPAIGN)
        assert time.monotonic() - started < 2
    assert (done.ended, done.more, done.outcomes) == ("limit", False, {"accepted": 1})


def test_a_429_storm_costs_no_attempt_and_passes(bench):
    bench.take_in(60)
    with run_in_thread(Options(rate="25/s", latency_ms=2)) as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, account_rate="400/s", backoff_base_seconds=0.05)
        deadline = time.monotonic() + 15
        while bench.states().get("submitted", 0) < 60:
            assert time.monotonic() < deadline, bench.states()
            dispatcher.run(CAMPAIGN)
            threading.Event().wait(0.01)  # until what was throttled is due again
        journal, stats = sandbox.journal(), sandbox.stats()
    first = next(entry["time"] for entry in journal if entry["status"] == 429)  # with `Retry-After: 1`
    assert [entry for entry in journal if first + 0.3 < entry["time"] < first + 0.95] == []
    assert 1 <= Counter(entry["status"] for entry in journal)[429] <= 4 * CONCURRENCY  # one batch a storm
    assert stats["duplicates"] == 0
    assert {lead["attempts"] for lead in bench.leads()} == {1}
    assert bench.campaign()["state"] == "active"


def test_a_429_stops_every_campaign_of_its_account(bench):
    bench.take_in(1)
    bench.take_in(1, campaign=OTHER, first=10)
    bench.take_in(1, campaign="c-north", first=20, account="north")
    with (
        raw_server(always("429 Slow", b"{}", "Retry-After: 1000")) as server,
        raw_server(always("200 OK", b"{}")) as good,
    ):
        bench.dispatcher(server.url).run(CAMPAIGN)
        dispatcher = bench.dispatcher(good.url, futwork_api_keys="north=k")
        done = dispatcher.run(OTHER)
        assert (done.ended, done.more, done.posts) == ("limit", False, 0)
        assert dispatcher.run("c-north").outcomes == {"accepted": 1}
        assert good.connections == 1
    assert seconds(990) < bench.limiter.stopped_for("default") <= seconds(1000)


def test_without_the_limit_nothing_is_sent(bench):
    bench.take_in(5)
    nowhere = connect("redis://127.0.0.1:1/0")
    with raw_server(always("200 OK", b"{}")) as server:
        for parts in ({"limiter": Limiter(nowhere)}, {"leases": DispatchLeases(nowhere)}):
            done = bench.dispatcher(server.url, **parts).run(CAMPAIGN)
            assert (done.ended, done.more, done.posts) == ("limit", False, 0)
        assert server.connections == 0
    assert bench.states() == {"queued": 5}


def test_a_limit_that_fails_meanwhile_ends_the_slice_with_everything_recorded(bench):
    bench.take_in(200)

    def deny():
        bench.valkey.config_set("min-replicas-to-write", 1)

    with run_in_thread(Options(latency_ms=20)) as sandbox:
        try:
            denier = when_accepted(sandbox, 30, deny)
            started = time.monotonic()
            done = bench.dispatcher(sandbox.url, account_rate="200/s").run(CAMPAIGN)
            took = time.monotonic() - started
            denier.join()
        finally:
            bench.valkey.config_set("min-replicas-to-write", 0)
        accepted = sandbox.stats()["accepted"]
        assert (done.ended, done.more) == ("limit", False)
        assert took < 3
        assert bench.states() == {"submitted": accepted, "queued": 200 - accepted}
        assert bench.dispatcher(sandbox.url).run(CAMPAIGN).ended == "idle"
        assert sandbox.stats()["duplicates"] == 0
    assert bench.states() == {"submitted": 200}


# The end of a slice


def test_a_slice_ends_on_time_with_everything_recorded(each_bench):
    bench = each_bench
    bench.take_in(200)
    with run_in_thread(Options(latency_ms=30)) as sandbox:
        started = time.monotonic()
        done = bench.dispatcher(sandbox.url, account_rate="100/s", slice_seconds=0.5).run(CAMPAIGN)
        took = time.monotonic() - started
        accepted = sandbox.stats()["accepted"]
    assert (done.ended, done.more) == ("time", True)
    assert took >= 0.5
    assert accepted < 200
    assert done.outcomes == {"accepted": accepted}
    assert bench.states() == {"submitted": accepted, "queued": 200 - accepted}


def test_a_slice_ends_early_when_another_campaign_waits(bench):
    bench.take_in(200)
    bench.leases.request(OTHER)
    with run_in_thread() as sandbox:
        started = time.monotonic()
        done = bench.dispatcher(sandbox.url, account_rate="100/s").run(CAMPAIGN)
        took = time.monotonic() - started
    assert (done.ended, done.more) == ("others wait", True)
    assert 0.2 <= took < 1
    assert done.posts >= 5


def test_a_worker_that_stops_sends_no_more_and_records_what_is_out(bench):
    bench.take_in(300)
    stop = threading.Event()
    with run_in_thread(Options(latency_ms=20)) as sandbox:
        stopper = when_accepted(sandbox, 30, stop.set)
        done = bench.dispatcher(sandbox.url, stopping=stop.is_set).run(CAMPAIGN)
        stopper.join()
        accepted = sandbox.stats()["accepted"]
    assert (done.ended, done.more) == ("stopping", False)
    assert 30 <= accepted <= 30 + 5 * CONCURRENCY
    assert bench.states() == {"submitted": accepted, "queued": 300 - accepted}


def test_leads_that_come_in_during_the_slice_are_sent_in_it(bench):
    bench.take_in(1)
    with run_in_thread(Options(latency_ms=150)) as sandbox:
        feeder = when_accepted(sandbox, 1, lambda: bench.take_in(5, first=10))
        done = bench.dispatcher(sandbox.url).run(CAMPAIGN)
        feeder.join()
    assert (done.ended, done.outcomes) == ("idle", {"accepted": 6})


def test_leads_that_come_in_while_an_answer_is_awaited_do_not_wait_for_it(bench):
    bench.take_in(1)
    release, first_is_out = threading.Event(), threading.Event()

    def handle(peer):
        while peer.request():
            if not first_is_out.is_set():
                first_is_out.set()
                release.wait(20)
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        dispatcher = bench.dispatcher(server.url, read_timeout_seconds=20, slice_seconds=20)
        slices = []
        running = threading.Thread(target=lambda: slices.append(dispatcher.run(CAMPAIGN)))
        running.start()
        assert first_is_out.wait(10)
        bench.take_in(5, first=10)
        deadline = time.monotonic() + 4
        while bench.states() != {"sending": 1, "submitted": 5}:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        release.set()
        running.join()
    assert (slices[0].ended, slices[0].outcomes) == ("idle", {"accepted": 6})


def test_a_small_campaign_does_not_wait_for_a_large_one(bench):
    bench.take_in(300)
    bench.take_in(10, campaign=OTHER, first=1000)
    messages = deque()

    def wake(campaign):
        if bench.leases.request(campaign):
            messages.append(campaign)

    with run_in_thread() as sandbox:
        worker = bench.dispatcher(sandbox.url, account_rate="100/s", slice_seconds=5)  # one process, both campaigns
        wake(CAMPAIGN)
        wake(OTHER)
        while bench.states(OTHER) != {"submitted": 10}:
            campaign = messages.popleft()
            if worker.run(campaign).more:
                wake(campaign)
        journal = sandbox.journal()
    before = [entry["campaign_id"] for entry in journal].count(CAMPAIGN)
    assert before < 60  # two short slices at 100 a second; all of it would take three seconds
    assert list(messages) == [CAMPAIGN]  # and goes on


# Accidents


def test_a_ledger_that_is_away_for_a_moment_loses_no_outcome(postgres_ledger, postgres_url, valkey, make_settings):
    with opened(postgres_ledger, valkey, make_settings) as bench:
        bench.take_in(40)
        name = sa.make_url(postgres_url).database
        server = sa.create_engine(sa.make_url(postgres_url).set(database="postgres"), isolation_level="AUTOCOMMIT")

        def lock_out():
            with server.connect() as connection:
                connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
                connection.execute(
                    sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
                    {"name": name},
                )
                threading.Event().wait(0.6)  # time itself is the subject
                connection.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))

        with run_in_thread(Options(latency_ms=100)) as sandbox:
            accident = when_accepted(sandbox, CONCURRENCY, lock_out)
            dispatcher = bench.dispatcher(sandbox.url)
            with suppress(sa.exc.OperationalError):  # nothing more can be claimed just now
                dispatcher.run(CAMPAIGN)
            accident.join()
            server.dispose()
            accepted = sandbox.stats()["accepted"]
            assert bench.states() == dict(Counter({"submitted": accepted, "queued": 40 - accepted}) - Counter())
            dispatcher.run(CAMPAIGN)
            assert bench.states() == {"submitted": 40}
            assert sandbox.stats()["duplicates"] == 0


def test_a_fault_in_a_slice_records_what_is_out_and_leaves_nothing_to_the_next_campaign(bench):
    bench.take_in(50)
    bench.take_in(5, campaign=OTHER, first=1000)
    looks = []

    def stopping():
        looks.append(1)
        if len(looks) == 3:
            raise RuntimeError("a fault")
        return False

    with run_in_thread(Options(latency_ms=50)) as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, stopping=stopping)
        with pytest.raises(RuntimeError, match="a fault"):
            dispatcher.run(CAMPAIGN)
        accepted = sandbox.stats()["accepted"]
        assert accepted >= CONCURRENCY
        assert bench.states() == {"submitted": accepted, "queued": 50 - accepted}
        assert bench.leases.take(CAMPAIGN, most=1, duration=seconds(10)) is not None
        assert dispatcher.run(OTHER).outcomes == {"accepted": 5}
        assert bench.states(OTHER) == {"submitted": 5}


@pytest.mark.parametrize(("engine", "module"), [("curl", with_curl), ("requests", with_requests)])
def test_a_dispatcher_that_is_told_to_end_at_once_waits_for_nothing(bench, monkeypatch, engine, module):
    """A quick stop raises SystemExit anywhere, also after an answer was taken and before it is counted."""
    bench.take_in(20)
    signals = [SystemExit]

    def interrupted(*args, **options):
        replies = taken(*args, **options)
        if replies and signals:
            raise signals.pop()
        return replies

    monkeypatch.setattr(module, "taken", interrupted)
    with run_in_thread(Options(latency_ms=20)) as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, futwork_http_engine=engine)

        def run():
            with suppress(SystemExit):
                dispatcher.run(CAMPAIGN)

        running = threading.Thread(target=run, daemon=True)  # one that waits for ever must not hold up the suite
        running.start()
        running.join(10)
        assert not running.is_alive()
        assert not signals
        assert bench.states() == {"sending": CONCURRENCY, "queued": 20 - CONCURRENCY}
        assert bench.leases.take(CAMPAIGN, most=1, duration=seconds(10)) is not None


def test_what_an_answer_says_never_breaks_the_record(each_bench):
    bench = each_bench
    bench.take_in(6)
    bodies = deque(
        [
            b'{"leadId":"nul \\u0000 inside"}',
            b'{"leadId":"' + b"x" * 500 + b'"}',
            '{"leadId":"आशा"}'.encode(),
            b'{"success":false,"message":"\\u0000 \x00 \xff\xfe \xed\xa0\x80"}',
            b"\x00" * 2000,
            b'{"leadId":{"$oid":"1"},"id":[1]}',
        ]
    )
    with raw_server(lambda peer: [peer.answer("200 OK", bodies.popleft()) for _ in iter(peer.request, b"")]) as server:
        done = bench.dispatcher(server.url, dispatch_concurrency=1).run(CAMPAIGN)
    assert sum(done.outcomes.values()) == 6
    assert {lead["futwork_lead_id"] for lead in bench.leads()} == {None}
    assert set(bench.states()) <= {"submitted", "rejected"}


def test_no_phone_number_and_no_key_is_logged(bench, capsys, caplog):
    caplog.set_level("DEBUG")
    bench.take_in(30)

    def handle(peer):
        while request := peer.request():
            peer.answer("401 No", b'{"message":"refused: sandbox-key for ' + request.rpartition(b"\r\n\r\n")[2] + b'"}')

    with raw_server(handle) as server:
        bench.dispatcher(server.url).run(CAMPAIGN)
    output = "".join(capsys.readouterr()) + caplog.text
    assert "campaign held" in output
    assert "sandbox-key" not in output
    assert "98000000" not in output
    assert "sandbox-key" not in str(bench.campaign()) + str([bench.story(number) for number in range(30)])
