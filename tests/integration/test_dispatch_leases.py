"""Dispatch leases on a real Valkey: how many dispatchers a campaign has, and who waits for one."""

import threading
from datetime import timedelta

import pytest
import redis

from pipeline.coordination.dispatch_leases import ASKED_SECONDS, DispatchLeases

LEASE = timedelta(seconds=10)
WAITING = "{futwork:turns}:waiting"


@pytest.fixture
def leases(valkey):
    return DispatchLeases(valkey)


def key(campaign="c1"):
    return f"{{futwork:turns}}:held:{campaign}"


def let_pass(valkey, key, seconds):
    """Make what is in a set of times *seconds* older."""
    for member in valkey.zrange(key, 0, -1):
        valkey.zincrby(key, -seconds, member)


# Taking


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_leases_are_taken_than_allowed(leases, most):
    taken = [leases.take("c1", most=most, duration=LEASE) for _ in range(most + 2)]
    assert [lease is not None for lease in taken] == [True] * most + [False] * 2
    assert len({lease.token for lease in taken if lease}) == most


def test_leases_that_are_taken_at_once_keep_to_the_bound(valkey_url, valkey):
    taken, barrier = [], threading.Barrier(16)

    def take():
        client = redis.Redis.from_url(valkey_url)
        leases = DispatchLeases(client)
        barrier.wait()
        taken.append(leases.take("c1", most=4, duration=LEASE))
        client.close()

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in taken) == 4


def test_campaigns_have_leases_of_their_own(leases):
    assert [leases.take(campaign, most=1, duration=LEASE) is not None for campaign in ("c1", "c2", "c1")] == [
        True,
        True,
        False,
    ]


def test_a_lease_that_was_given_up_is_free_for_the_next(leases):
    first = leases.take("c1", most=1, duration=LEASE)
    leases.give_up(first)
    second = leases.take("c1", most=1, duration=LEASE)
    assert second is not None
    leases.give_up(first)  # once more, by mistake
    assert leases.take("c1", most=1, duration=LEASE) is None


def test_the_lease_of_a_killed_dispatcher_frees_when_its_lease_ends(leases, valkey):
    assert leases.take("c1", most=1, duration=LEASE) is not None
    let_pass(valkey, key(), 9)
    assert leases.take("c1", most=1, duration=LEASE) is None
    let_pass(valkey, key(), 1)
    assert leases.take("c1", most=1, duration=LEASE) is not None


def test_a_renewed_lease_stays(leases, valkey):
    lease = leases.take("c1", most=1, duration=LEASE)
    for _ in range(20):
        let_pass(valkey, key(), 9)
        leases.renew(lease, duration=LEASE)
    assert leases.take("c1", most=1, duration=LEASE) is None
    assert valkey.ttl(key()) > LEASE.total_seconds()


def test_a_lease_that_ran_out_is_renewed_whoever_works_by_now(leases, valkey):
    late = leases.take("c1", most=1, duration=LEASE)
    let_pass(valkey, key(), 11)
    successor = leases.take("c1", most=1, duration=LEASE)
    leases.renew(late, duration=LEASE)
    leases.give_up(successor)
    assert leases.take("c1", most=1, duration=LEASE) is None
    leases.give_up(late)
    assert leases.take("c1", most=1, duration=LEASE) is not None


def test_nothing_that_was_left_behind_stays_for_ever(leases, valkey):
    lease = leases.take("c1", most=1, duration=LEASE)
    assert 60 < valkey.ttl(key()) <= 70
    valkey.delete(key())
    leases.renew(lease, duration=LEASE)
    assert 60 < valkey.ttl(key()) <= 70


# Asking


def test_one_message_asks_however_often_a_lease_is_wanted(leases):
    assert [leases.request("c1") for _ in range(5)] == [True, False, False, False, False]
    assert leases.request("c2")


def test_nobody_asks_while_enough_dispatchers_work(leases):
    leases.take("c1", most=4, duration=LEASE)
    assert not leases.request("c1")
    assert leases.request("c1", most=2)  # for help
    leases.take("c1", most=4, duration=LEASE)
    assert not leases.request("c1", most=2)


def test_asking_is_over_when_the_lease_is_taken(leases):
    assert leases.request("c1")
    lease = leases.take("c1", most=1, duration=LEASE)
    leases.give_up(lease)
    assert leases.request("c1")


def test_asking_is_over_also_when_no_lease_was_free(leases):
    lease = leases.take("c1", most=1, duration=LEASE)
    assert leases.request("c1", most=2)
    assert leases.take("c1", most=1, duration=LEASE) is None
    leases.give_up(lease)
    assert leases.request("c1")


def test_a_lease_whose_message_could_not_be_sent_is_asked_for_again(leases):
    assert leases.request("c1")
    leases.withdraw("c1")
    assert leases.request("c1")


def test_a_lease_whose_message_was_lost_is_asked_for_again(leases, valkey):
    assert leases.request("c1")
    let_pass(valkey, WAITING, ASKED_SECONDS - 1)
    assert not leases.request("c1")
    let_pass(valkey, WAITING, 1)
    assert leases.request("c1")
    assert not leases.request("c1")


def test_dispatchers_that_died_do_not_keep_others_from_asking(leases, valkey):
    leases.take("c1", most=1, duration=LEASE)
    let_pass(valkey, key(), 10)
    assert leases.request("c1")


# Waiting


def test_a_dispatcher_sees_how_many_other_campaigns_wait(leases):
    assert leases.others_waiting("c1") == 0
    for campaign in ("c1", "c2", "c3"):
        leases.request(campaign)
    assert leases.others_waiting("c1") == 2
    assert leases.others_waiting("c9") == 3
    leases.take("c2", most=1, duration=LEASE)
    assert leases.others_waiting("c1") == 1


def test_who_was_not_taken_up_in_time_waits_no_more(leases, valkey):
    leases.request("c2")
    let_pass(valkey, WAITING, ASKED_SECONDS - 1)
    assert leases.others_waiting("c1") == 1
    let_pass(valkey, WAITING, 1)
    assert leases.others_waiting("c1") == 0


def test_a_valkey_that_was_emptied_goes_on(leases, valkey):
    lease = leases.take("c1", most=1, duration=LEASE)
    valkey.flushall()
    valkey.script_flush()
    leases.renew(lease, duration=LEASE)
    assert leases.take("c1", most=1, duration=LEASE) is None
    assert leases.request("c2")
    assert leases.others_waiting("c1") == 1


# A clock that is set back


def test_leases_from_before_redis_clock_was_set_back_block_nobody(leases, valkey):
    for wanted in (lambda: leases.request("c1"), lambda: leases.take("c1", most=1, duration=LEASE)):
        leases.take("c1", most=1, duration=LEASE)
        let_pass(valkey, key(), -3600)
        assert wanted()
    assert valkey.zcard(key()) == 1
    assert leases.take("c1", most=1, duration=LEASE) is None


def test_what_was_asked_for_before_redis_clock_was_set_back_is_asked_for_again(leases, valkey):
    assert leases.request("c1")
    let_pass(valkey, WAITING, -3600)
    assert leases.request("c1")
    assert not leases.request("c1")


def test_a_campaign_that_waits_since_a_time_to_come_does_not_count(leases, valkey):
    leases.request("c2")
    let_pass(valkey, WAITING, -3600)
    leases.request("c3")
    assert leases.others_waiting("c1") == 1
