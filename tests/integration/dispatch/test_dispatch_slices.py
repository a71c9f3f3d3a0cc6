"""How a dispatcher's slice ends, and what comes in meanwhile."""

import threading
import time
from collections import deque

from pipeline.sandbox.options import Options
from pipeline.sandbox.server import run_in_thread
from tests.conftest import CAMPAIGN
from tests.integration.dispatch.conftest import CONCURRENCY, OTHER, when_accepted
from tests.raw_server import raw_server
from tests.waiting import patience, until

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
    assert took >= 0.2
    assert 1 <= done.posts < 200


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
                release.wait(patience())
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        dispatcher = bench.dispatcher(server.url, slice_seconds=60)
        slices = []
        running = threading.Thread(target=lambda: slices.append(dispatcher.run(CAMPAIGN)))
        running.start()
        assert first_is_out.wait(patience())
        bench.take_in(5, first=10)
        until(lambda: bench.states() == {"sending": 1, "submitted": 5})
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
    assert before < 300
    assert list(messages) == [CAMPAIGN]  # and goes on
