"""Dispatchers side by side, and the limit that they share."""

import threading
import time
from collections import Counter

from pipeline.coordination.connection import connect
from pipeline.coordination.dispatch_leases import DispatchLeases
from pipeline.coordination.limiter import Limiter, Limits
from pipeline.sandbox.options import Options
from pipeline.sandbox.server import run_in_thread
from pipeline.settings import Rate
from tests.conftest import CAMPAIGN
from tests.integration.dispatch.conftest import CONCURRENCY, OTHER, always, seconds, when_accepted
from tests.raw_server import raw_server
from tests.waiting import patience, until

# Side by side


def test_dispatchers_side_by_side_send_each_lead_once_and_keep_to_the_limit(each_bench):
    bench = each_bench
    bench.take_in(250)
    rate = 150
    failures = []

    def work(dispatcher):
        try:
            while bench.states().get("submitted", 0) < 250:
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
    bench.take_in(60)
    release, seen = threading.Event(), []

    def handle(peer):
        while peer.request():
            seen.append(peer)
            if len(seen) == 1:
                release.wait(patience())
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        dispatcher = bench.dispatcher(
            server.url, account_rate="10/s", slice_seconds=patience(0.2), dispatchers_per_campaign=1
        )
        slices = []
        first = threading.Thread(target=lambda: slices.append(dispatcher.run(CAMPAIGN)))
        first.start()
        until(lambda: bench.asked)
        second = bench.dispatcher(server.url, dispatchers_per_campaign=1).run(CAMPAIGN)
        release.set()
        first.join()
    assert bench.asked[0] == CAMPAIGN
    assert slices[0].posts + second.posts == 60
    assert (slices[0].ended, slices[0].more, second.ended) == ("time", False, "idle")
    assert bench.states() == {"submitted": 60}


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
    assert took > 1.05


def test_a_campaign_without_due_leads_is_left_at_once(bench):
    bench.take_in(1)
    with run_in_thread() as sandbox:
        dispatcher = bench.dispatcher(sandbox.url)
        assert dispatcher.run(CAMPAIGN).posts == 1
        bench.valkey.config_resetstat()
        assert [dispatcher.run(CAMPAIGN).ended for _ in range(5)] == ["idle"] * 5
        assert bench.valkey.info("commandstats")["cmdstat_evalsha"]["calls"] <= 5 * 6  # it does not wait and ask again


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
        done = bench.dispatcher(sandbox.url, account_rate="1/h").run(CAMPAIGN)
    assert (done.ended, done.more, done.outcomes) == ("limit", False, {"accepted": 1})


def test_a_429_storm_costs_no_attempt_and_passes(bench):
    bench.take_in(60)
    with run_in_thread(Options(rate="25/s", latency_ms=2)) as sandbox:
        dispatcher = bench.dispatcher(sandbox.url, account_rate="400/s", backoff_base_seconds=0.05)

        def all_sent():
            dispatcher.run(CAMPAIGN)
            return bench.states() == {"submitted": 60}

        until(all_sent, what=bench.states)
        journal, stats = sandbox.journal(), sandbox.stats()
    first = next(entry["time"] for entry in journal if entry["status"] == 429)  # with `Retry-After: 1`
    # Only what was out already when the dispatcher read the first 429.
    assert len([entry for entry in journal if first < entry["time"] < first + 0.95]) <= 2 * CONCURRENCY
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
        started = time.monotonic()
        bench.dispatcher(server.url).run(CAMPAIGN)
        dispatcher = bench.dispatcher(good.url, futwork_api_keys="north=k")
        done = dispatcher.run(OTHER)
        assert (done.ended, done.more, done.posts) == ("limit", False, 0)
        assert dispatcher.run("c-north").outcomes == {"accepted": 1}
        assert good.connections == 1
    left = bench.limiter.standing("default")[0]
    assert seconds(999 - (time.monotonic() - started)) < left <= seconds(1000)


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
            done = bench.dispatcher(sandbox.url, account_rate="200/s").run(CAMPAIGN)
            denier.join()
        finally:
            bench.valkey.config_set("min-replicas-to-write", 0)
        accepted = sandbox.stats()["accepted"]
        assert (done.ended, done.more) == ("limit", False)
        assert bench.states() == {"submitted": accepted, "queued": 200 - accepted}
        assert bench.dispatcher(sandbox.url).run(CAMPAIGN).ended == "idle"
        assert sandbox.stats()["duplicates"] == 0
    assert bench.states() == {"submitted": 200}
