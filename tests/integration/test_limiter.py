"""The shared limit on a real Valkey: never more than it allows, hardly less, the same answer for whoever asks."""

import socket
import threading
import time
from datetime import timedelta

import pytest
import redis

from pipeline.coordination import connection as module
from pipeline.coordination.connection import RedisUnavailable, connect
from pipeline.coordination.limiter import AHEAD, Limiter, Limits, burst_of
from pipeline.settings import Rate
from tests.raw_server import raw_server

PREFIX = "futwork:limit"
WIDE = Rate(100_000, 1)


@pytest.fixture
def limiter(valkey):
    return Limiter(valkey)


def limits(rate="10/s", *, account_rate=WIDE, account="default", campaign="c1"):
    parsed = [Rate.parse(value) if isinstance(value, str) else value for value in (account_rate, rate)]
    return Limits(account, parsed[0], campaign, parsed[1])


def let_pass(valkey, seconds):
    """Make everything that the limit remembers *seconds* older, which is what the passing of time does."""
    for key in valkey.scan_iter(f"{{{PREFIX}}}:*"):
        left = valkey.pttl(key)
        if left > 0 and left <= seconds * 1000:
            valkey.delete(key)
        elif b":slow:" in key:
            valkey.hset(key, "at", float(valkey.hget(key, "at")) - seconds * 1e6)
        elif b":stop:" not in key:
            valkey.set(key, float(valkey.get(key)) - seconds * 1e6, keepttl=True)
        if valkey.exists(key) and left > 0:
            valkey.pexpire(key, round(left - seconds * 1000))


def drain(limiter, which):
    """Take all that may go now; return how many they were and how long to wait for the next."""
    taken = 0
    while (grant := limiter.reserve(which, 1000)).slots:
        taken += grant.slots
    return taken, grant.wait


def seconds(value):
    return timedelta(seconds=value)


# How much


@pytest.mark.parametrize(
    ("rate", "burst"),
    [("20/s", 1), ("40/s", 2), ("59/s", 2), ("1000/s", 50), ("100000/s", 5000), ("1/h", 1), ("0.5/h", 1), ("600/m", 1)],
)
def test_a_burst_is_a_twentieth_of_a_second_and_at_least_one(limiter, rate, burst):
    assert burst_of(Rate.parse(rate)) == burst
    assert limiter.reserve(limits(rate), 10_000).slots == burst


@pytest.mark.parametrize(
    ("rate", "ahead"), [("1000/s", 0), ("333/s", 0), ("37.5/s", 0), ("333/s", 0.05), ("37.5/s", 0.05)]
)
def test_in_any_span_no_more_is_granted_than_the_rate_and_a_burst(valkey_url, valkey, rate, ahead):
    which = limits(rate)
    per_second, burst = which.campaign_rate.per_second, burst_of(which.campaign_rate)
    grants = []

    def hammer(wanted):
        client = redis.Redis.from_url(valkey_url)
        limiter = Limiter(client)
        while len(grants) < per_second * 1.2:
            before = client.time()
            moments = limiter.reserve(which, wanted, ahead=seconds(ahead)).moments
            after = client.time()
            grants.extend((before, after, moment.total_seconds()) for moment in moments)
        client.close()

    threads = [threading.Thread(target=hammer, args=(wanted,)) for wanted in (1, 1, 2, 3, 5, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # Each grant was made between the server's times around it, so a span of grants lasted at most from the earliest
    # `before` to the latest `after` among them.
    origin = min(before for before, _, _ in grants)[0]
    lowest, latest = float("inf"), 0.0
    spans = sorted((a[0] - origin + a[1] / 1e6 + m, b[0] - origin + b[1] / 1e6 + m) for a, b, m in grants)
    for number, (before, after) in enumerate(spans):
        lowest, latest = min(lowest, number - per_second * before), max(latest, after)
        assert number + 1 - per_second * latest - lowest <= burst + 1e-3


def test_what_is_booked_ahead_comes_evenly_after_the_burst(limiter):
    which, started = limits("200/s"), time.monotonic()  # a fifth of its burst, then one every 5 ms
    grant = limiter.reserve(which, 1000, ahead=AHEAD)
    assert grant.slots == 12
    assert [moment.total_seconds() for moment in grant.moments] == [0.0] * 2 + [
        pytest.approx(0.005 * n, abs=1e-5) for n in range(1, 11)
    ]
    assert grant.wait == pytest.approx(seconds(0.055), abs=seconds(1e-5))
    again = limiter.reserve(which, 1000, ahead=AHEAD)
    assert again.slots <= (time.monotonic() - started) * 200  # none for who asks again within 5 ms


def test_nothing_is_booked_further_ahead_than_the_bound(limiter):
    assert limiter.reserve(limits("200/s"), 1000, ahead=seconds(60)).slots == 12


def test_a_slower_campaign_that_books_ahead_leaves_its_account_within_the_limit(limiter):
    account, started = {"account_rate": "200/s"}, time.monotonic()
    slow = limiter.reserve(limits("40/s", **account), 100, ahead=AHEAD)  # one, then one every 25 ms
    assert slow.slots == 3
    other = limiter.reserve(limits("200/s", campaign="c2", **account), 100, ahead=AHEAD)
    assert other.slots <= 9 + (time.monotonic() - started) * 200 + 1  # of the account's 12


def test_an_hour_of_single_grants_adds_up_exactly(limiter, valkey):
    which = limits("90000/s")  # a step of 11.1 microseconds, which no microsecond clock can hold
    granted = sum(limiter.reserve(which, 1).slots for _ in range(300))
    [key] = valkey.keys("*campaign*")
    [now, micro] = valkey.time()
    assert granted == 300
    taken = float(valkey.get(key)) / 1e6 + 1767225600 - now - micro / 1e6
    assert taken <= 300 / 90_000 + 1e-5


def test_the_cost_of_many_is_booked_at_once(limiter):
    which, started = limits("1000/s"), time.monotonic()  # a burst of 50
    grants = [limiter.reserve(which, 20).slots for _ in range(4)]
    took = time.monotonic() - started
    assert grants[:2] == [20, 20]
    assert 50 <= sum(grants) <= 50 + took * 1000 + 1


def test_asking_for_nothing_books_nothing(limiter, valkey):
    assert [limiter.reserve(limits(), wanted).slots for wanted in (0, -3)] == [0, 0]
    assert valkey.keys("*") == []


def test_very_fast_rates_are_granted_in_full(limiter, valkey):
    which = limits("100000/s")
    for _ in range(5):
        assert limiter.reserve(which, 5000).slots == 5000
        let_pass(valkey, 0.05)


# When again


@pytest.mark.parametrize(("rate", "step"), [("1/h", 3600), ("0.5/h", 7200), ("1/m", 60), ("2.5/m", 24), ("20/m", 3)])
def test_after_the_wait_there_is_one_slot_and_just_before_there_is_none(limiter, valkey, rate, step):
    which = limits(rate)
    began = time.monotonic()
    taken, wait = drain(limiter, which)
    passed = time.monotonic() - began
    assert taken == 1
    assert seconds(step - passed - 0.001) < wait <= seconds(step)
    margin = 0.4 * step
    let_pass(valkey, wait.total_seconds() - margin)
    early = limiter.reserve(which, 1)
    assert early.slots == 0
    assert seconds(0) < early.wait <= seconds(margin)
    let_pass(valkey, margin)
    assert limiter.reserve(which, 2).slots == 1


def test_the_wait_is_exact_on_the_clock(limiter):
    which = limits("20/s")
    drain(limiter, which)
    for _ in range(4):
        asked = time.monotonic()
        grant = limiter.reserve(which, 1)
        answered = time.monotonic()
        if grant.slots:
            continue  # this machine slept over the whole wait
        wait = grant.wait.total_seconds()
        threading.Event().wait(asked + wait - 0.005 - time.monotonic())
        early = limiter.reserve(which, 1)
        assert early.slots == 0 or time.monotonic() > asked + wait
        threading.Event().wait(max(0, answered + wait - time.monotonic()) + 0.0001)
        assert early.slots == 1 or limiter.reserve(which, 1).slots == 1


def test_an_idle_bucket_saves_no_more_than_a_burst(limiter, valkey):
    which = limits("1000/s")
    drain(limiter, which)
    let_pass(valkey, 1000)
    started = time.monotonic()
    taken = drain(limiter, which)[0]
    assert 50 <= taken <= 50 + (time.monotonic() - started) * 1000 + 1


def test_what_is_remembered_is_forgotten_when_it_says_nothing_more(limiter, valkey):
    limiter.reserve(limits("1/m", account_rate="20/s"), 1)
    left = {key.split(b":")[2]: valkey.pttl(key) for key in valkey.keys("*")}
    assert left.keys() == {b"account", b"campaign"}
    assert 50 < left[b"account"] <= 1051
    assert 60_000 < left[b"campaign"] <= 61_001


# Two buckets


def test_the_narrower_bucket_decides_and_neither_is_charged_for_more(limiter):
    north = limits("200/m", account_rate="1000/s")  # bursts of 1 and of 50
    assert limiter.reserve(north, 30).slots == 1
    others = limits("1000/s", account_rate="1000/s", campaign="c2")
    assert 49 <= limiter.reserve(others, 1000).slots <= 50


def test_a_campaign_that_may_not_go_charges_its_account_nothing(limiter):
    slow = limits("1/h", account_rate="40/m")
    assert limiter.reserve(slow, 1).slots == 1
    blocked = limiter.reserve(slow, 1)
    assert blocked.slots == 0
    assert blocked.wait > seconds(3500)  # the longer of the two waits
    other = limiter.reserve(limits("1000/s", account_rate="40/m", campaign="c2"), 1)
    assert other.slots == 0
    assert seconds(1.2) < other.wait <= seconds(1.5)  # only the first slot was charged


def test_campaigns_share_their_account_and_accounts_share_nothing(limiter):
    shared = [limits("1000/s", account_rate="1/m", campaign=f"c{number}") for number in range(3)]
    assert [limiter.reserve(which, 1).slots for which in shared] == [1, 0, 0]
    assert limiter.reserve(limits("1000/s", account_rate="1/m", account="other", campaign="c9"), 1).slots == 1


def test_a_rate_that_was_raised_holds_at_once(limiter):
    assert drain(limiter, limits("1/h"))[1] > seconds(3500)
    assert limiter.reserve(limits("10/s"), 1).wait <= seconds(0.1) + AHEAD  # as far as it might be booked


def test_a_server_clock_that_was_set_back_stops_nothing(limiter, valkey):
    which = limits("10/s")
    drain(limiter, which)
    let_pass(valkey, -7200)
    assert limiter.reserve(which, 1).wait <= seconds(0.1) + AHEAD


def test_no_clock_of_ours_takes_part(limiter, monkeypatch):
    which = limits("1/m")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert limiter.reserve(which, 1).slots == 1
    monkeypatch.setattr(time, "time", lambda: 9e9)
    grant = limiter.reserve(which, 1)
    assert (grant.slots, grant.stopped) == (0, False)
    assert seconds(58) < grant.wait <= seconds(60)


# Giving back


def test_what_is_given_back_can_be_taken_again(limiter):
    which = limits("60/m", account_rate="1200/s")  # bursts of 1 and 60
    assert limiter.reserve(which, 1).slots == 1
    limiter.give_back(which, 1)
    assert limiter.reserve(which, 1).slots == 1
    assert limiter.reserve(which, 1).slots == 0


def test_giving_back_never_makes_more_than_a_burst(limiter, valkey):
    which = limits("1000/s")
    taken = limiter.reserve(which, 50).slots
    let_pass(valkey, 0.05)
    for _ in range(3):
        limiter.give_back(which, taken)
    assert limiter.reserve(which, 1000).slots <= 50


@pytest.mark.parametrize("unused", [0, -1])
def test_giving_back_nothing_changes_nothing(limiter, valkey, unused):
    which = limits("1/m")
    limiter.reserve(which, 1)
    before = {key: valkey.get(key) for key in valkey.keys("*")}
    limiter.give_back(which, unused)
    assert {key: valkey.get(key) for key in valkey.keys("*")} == before


def test_giving_back_to_a_forgotten_bucket_makes_none(limiter, valkey):
    limiter.give_back(limits(), 5)
    assert valkey.keys("*") == []


# 429


def test_after_a_429_the_whole_account_stands_until_the_pause_ends(limiter, valkey):
    limiter.stop("default", seconds(30))
    for campaign in ("c1", "c2"):
        grant = limiter.reserve(limits(campaign=campaign), 5)
        assert (grant.slots, grant.stopped) == (0, True)
        assert seconds(29) < grant.wait <= seconds(30)
    assert seconds(29) < limiter.standing("default")[0] <= seconds(30)
    assert limiter.standing("other")[0] == seconds(0)
    assert limiter.reserve(limits(account="other", campaign="c9"), 1).slots == 1
    let_pass(valkey, 30)
    assert limiter.standing("default")[0] == seconds(0)
    assert limiter.reserve(limits(), 1).slots == 1


def test_the_longest_pause_holds(limiter):
    for pause in (5, 60, 1):
        limiter.stop("default", seconds(pause))
    assert seconds(59) < limiter.standing("default")[0] <= seconds(60)


def test_a_pause_ends_by_itself(limiter):
    limiter.stop("default", timedelta(milliseconds=30))
    assert limiter.reserve(limits(), 1).stopped
    threading.Event().wait(0.04)  # time itself is the subject
    assert limiter.reserve(limits(), 1).slots == 1


def pace(limiter, valkey):
    """Seconds between two submissions at one a minute, as the limit counts them now."""
    valkey.delete(*[key for key in valkey.keys("*") if b":slow:" not in key] or ["none"])
    return drain(limiter, limits("1/m"))[1].total_seconds()


def test_after_a_429_the_rate_falls_by_a_third_and_climbs_back(limiter, valkey):
    assert pace(limiter, valkey) == pytest.approx(60, rel=0.01)
    limiter.stop("default", seconds(0.001))
    assert pace(limiter, valkey) == pytest.approx(90, rel=0.01)
    let_pass(valkey, 50)  # a sixth of the recovery: from 4/6 to 5/6
    assert pace(limiter, valkey) == pytest.approx(72, rel=0.01)
    let_pass(valkey, 50)
    assert pace(limiter, valkey) == pytest.approx(60, rel=0.01)
    let_pass(valkey, 500)
    assert pace(limiter, valkey) == pytest.approx(60, rel=0.01)
    assert valkey.keys("*:slow:*") == []


def test_a_slower_rate_has_a_smaller_burst(limiter, valkey):
    limiter.stop("default", seconds(0.001))
    let_pass(valkey, 0.01)
    assert limiter.reserve(limits("1000/s"), 1000).slots == 33


def test_a_slow_down_opens_nothing(limiter, valkey):
    which, started = limits("1000/s"), time.monotonic()
    taken = limiter.reserve(which, 1000).slots
    limiter.stop("default", seconds(0.001))
    let_pass(valkey, 0.002)
    taken += limiter.reserve(which, 1000).slots
    assert 50 <= taken <= 50 + (time.monotonic() - started + 0.002) * 1000


def test_many_429s_at_once_slow_down_only_once(limiter, valkey):
    threads = [threading.Thread(target=limiter.stop, args=("default", seconds(0.2))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pace(limiter, valkey) == pytest.approx(90, rel=0.01)


def test_429s_that_come_during_the_pause_say_nothing_new(limiter, valkey):
    limiter.stop("default", seconds(100))
    let_pass(valkey, 30)
    limiter.stop("default", seconds(1))
    assert seconds(69) < limiter.standing("default")[0] <= seconds(70)
    assert pace(limiter, valkey) == pytest.approx(60 / (2 / 3 + 0.1), rel=0.01)


def test_the_rate_never_falls_below_a_twentieth(limiter, valkey):
    for _ in range(20):
        limiter.stop("default", seconds(0.001))
        let_pass(valkey, 1.1)
    assert pace(limiter, valkey) == pytest.approx(60 / 0.05, rel=0.1)
    let_pass(valkey, 299)
    assert pace(limiter, valkey) == pytest.approx(60, rel=0.01)


def test_a_slow_down_outlives_any_step(limiter, valkey):
    for _ in range(20):
        limiter.stop("default", seconds(0.001))
        let_pass(valkey, 1.1)
    which = limits("1/h")
    wait = drain(limiter, which)[1]
    assert wait > seconds(3600 * 15)
    assert min(valkey.pttl(key) for key in valkey.keys("*campaign*")) > 3600 * 15 * 1000


def test_a_slow_down_of_one_account_leaves_others_alone(limiter, valkey):
    limiter.stop("other", seconds(0.001))
    assert pace(limiter, valkey) == pytest.approx(60, rel=0.01)


# Failing closed


def test_without_redis_nothing_is_granted():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    limiter = Limiter(connect(f"redis://:secret@127.0.0.1:{port}/0"))
    for ask in (
        lambda: limiter.reserve(limits(), 1),
        lambda: limiter.give_back(limits(), 1),
        lambda: limiter.stop("default", seconds(1)),
        lambda: limiter.standing("default")[0],
    ):
        with pytest.raises(RedisUnavailable, match="cannot be reached") as raised:
            ask()
        assert "secret" not in str(raised.value)


def test_a_redis_that_hangs_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.3)
    with raw_server(lambda peer: peer.hang()) as server:
        client = connect(f"redis://127.0.0.1:{server.port}/0")
        started = time.monotonic()
        with pytest.raises(RedisUnavailable):
            Limiter(client).reserve(limits(), 1)
        assert time.monotonic() - started > 0.25
        assert server.connections == 1  # one wait, not several
        client.close()


def test_a_connection_that_redis_closed_meanwhile_is_made_again(valkey_url, valkey):
    client = connect(valkey_url)
    limiter = Limiter(client)
    assert limiter.reserve(limits("1000/s"), 1).slots == 1
    valkey.client_kill_filter(_type="normal", skipme=True)
    assert limiter.reserve(limits("1000/s"), 1).slots == 1
    client.close()


def test_a_redis_that_takes_no_writes_grants_nothing(valkey_url, valkey):
    client = connect(valkey_url)
    valkey.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(RedisUnavailable):
            Limiter(client).reserve(limits(), 1)
    finally:
        valkey.config_set("min-replicas-to-write", 0)
        client.close()


def test_a_redis_that_was_emptied_goes_on(limiter, valkey):
    which = limits("1/h")
    drain(limiter, which)
    valkey.flushall()
    valkey.script_flush()
    assert limiter.reserve(which, 1).slots == 1
