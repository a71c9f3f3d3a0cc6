"""Turns on a real Valkey: how many dispatchers a campaign has, and who waits for one."""

import threading
from datetime import timedelta

import pytest
import redis

from pipeline.turns import ASKED_SECONDS, Turns

LEASE = timedelta(seconds=10)
WAITING = "{futwork:turns}:waiting"


@pytest.fixture
def turns(valkey):
    return Turns(valkey)


def leases(campaign="c1"):
    return f"{{futwork:turns}}:held:{campaign}"


def let_pass(valkey, key, seconds):
    """Make what is in a set of times *seconds* older."""
    for member in valkey.zrange(key, 0, -1):
        valkey.zincrby(key, -seconds, member)


# Taking


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_turns_are_taken_than_allowed(turns, most):
    taken = [turns.take("c1", most=most, lease=LEASE) for _ in range(most + 2)]
    assert [turn is not None for turn in taken] == [True] * most + [False] * 2
    assert len({turn.token for turn in taken if turn}) == most


def test_turns_that_are_taken_at_once_keep_to_the_bound(valkey_url, valkey):
    taken, barrier = [], threading.Barrier(16)

    def take():
        client = redis.Redis.from_url(valkey_url)
        turns = Turns(client)
        barrier.wait()
        taken.append(turns.take("c1", most=4, lease=LEASE))
        client.close()

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(turn is not None for turn in taken) == 4


def test_campaigns_have_turns_of_their_own(turns):
    assert [turns.take(campaign, most=1, lease=LEASE) is not None for campaign in ("c1", "c2", "c1")] == [
        True,
        True,
        False,
    ]


def test_a_turn_that_was_given_up_is_free_for_the_next(turns):
    first = turns.take("c1", most=1, lease=LEASE)
    turns.give_up(first)
    second = turns.take("c1", most=1, lease=LEASE)
    assert second is not None
    turns.give_up(first)  # once more, by mistake
    assert turns.take("c1", most=1, lease=LEASE) is None


def test_the_turn_of_a_killed_dispatcher_frees_when_its_lease_ends(turns, valkey):
    assert turns.take("c1", most=1, lease=LEASE) is not None
    let_pass(valkey, leases(), 9)
    assert turns.take("c1", most=1, lease=LEASE) is None
    let_pass(valkey, leases(), 1)
    assert turns.take("c1", most=1, lease=LEASE) is not None


def test_a_renewed_turn_stays(turns, valkey):
    turn = turns.take("c1", most=1, lease=LEASE)
    for _ in range(20):
        let_pass(valkey, leases(), 9)
        turns.renew(turn, lease=LEASE)
    assert turns.take("c1", most=1, lease=LEASE) is None
    assert valkey.ttl(leases()) > LEASE.total_seconds()


def test_a_turn_that_ran_out_is_renewed_whoever_works_by_now(turns, valkey):
    late = turns.take("c1", most=1, lease=LEASE)
    let_pass(valkey, leases(), 11)
    successor = turns.take("c1", most=1, lease=LEASE)
    turns.renew(late, lease=LEASE)
    turns.give_up(successor)
    assert turns.take("c1", most=1, lease=LEASE) is None
    turns.give_up(late)
    assert turns.take("c1", most=1, lease=LEASE) is not None


def test_nothing_that_was_left_behind_stays_for_ever(turns, valkey):
    turn = turns.take("c1", most=1, lease=LEASE)
    assert 60 < valkey.ttl(leases()) <= 70
    valkey.delete(leases())
    turns.renew(turn, lease=LEASE)
    assert 60 < valkey.ttl(leases()) <= 70


# Asking


def test_one_message_asks_however_often_a_turn_is_wanted(turns):
    assert [turns.ask("c1") for _ in range(5)] == [True, False, False, False, False]
    assert turns.ask("c2")


def test_nobody_asks_while_enough_dispatchers_work(turns):
    turns.take("c1", most=4, lease=LEASE)
    assert not turns.ask("c1")
    assert turns.ask("c1", most=2)  # for help
    turns.take("c1", most=4, lease=LEASE)
    assert not turns.ask("c1", most=2)


def test_asking_is_over_when_the_turn_is_taken(turns):
    assert turns.ask("c1")
    turn = turns.take("c1", most=1, lease=LEASE)
    turns.give_up(turn)
    assert turns.ask("c1")


def test_asking_is_over_also_when_no_turn_was_free(turns):
    turn = turns.take("c1", most=1, lease=LEASE)
    assert turns.ask("c1", most=2)
    assert turns.take("c1", most=1, lease=LEASE) is None
    turns.give_up(turn)
    assert turns.ask("c1")


def test_a_turn_whose_message_could_not_be_sent_is_asked_for_again(turns):
    assert turns.ask("c1")
    turns.unask("c1")
    assert turns.ask("c1")


def test_a_turn_whose_message_was_lost_is_asked_for_again(turns, valkey):
    assert turns.ask("c1")
    let_pass(valkey, WAITING, ASKED_SECONDS - 1)
    assert not turns.ask("c1")
    let_pass(valkey, WAITING, 1)
    assert turns.ask("c1")
    assert not turns.ask("c1")


def test_dispatchers_that_died_do_not_keep_others_from_asking(turns, valkey):
    turns.take("c1", most=1, lease=LEASE)
    let_pass(valkey, leases(), 10)
    assert turns.ask("c1")


# Waiting


def test_a_dispatcher_sees_how_many_other_campaigns_wait(turns):
    assert turns.others_waiting("c1") == 0
    for campaign in ("c1", "c2", "c3"):
        turns.ask(campaign)
    assert turns.others_waiting("c1") == 2
    assert turns.others_waiting("c9") == 3
    turns.take("c2", most=1, lease=LEASE)
    assert turns.others_waiting("c1") == 1


def test_who_was_not_taken_up_in_time_waits_no_more(turns, valkey):
    turns.ask("c2")
    let_pass(valkey, WAITING, ASKED_SECONDS - 1)
    assert turns.others_waiting("c1") == 1
    let_pass(valkey, WAITING, 1)
    assert turns.others_waiting("c1") == 0


def test_a_valkey_that_was_emptied_goes_on(turns, valkey):
    turn = turns.take("c1", most=1, lease=LEASE)
    valkey.flushall()
    valkey.script_flush()
    turns.renew(turn, lease=LEASE)
    assert turns.take("c1", most=1, lease=LEASE) is None
    assert turns.ask("c2")
    assert turns.others_waiting("c1") == 1


# A clock that is set back


def test_leases_from_before_redis_clock_was_set_back_block_nobody(turns, valkey):
    for wanted in (lambda: turns.ask("c1"), lambda: turns.take("c1", most=1, lease=LEASE)):
        turns.take("c1", most=1, lease=LEASE)
        let_pass(valkey, leases(), -3600)
        assert wanted()
    assert valkey.zcard(leases()) == 1
    assert turns.take("c1", most=1, lease=LEASE) is None


def test_what_was_asked_for_before_redis_clock_was_set_back_is_asked_for_again(turns, valkey):
    assert turns.ask("c1")
    let_pass(valkey, WAITING, -3600)
    assert turns.ask("c1")
    assert not turns.ask("c1")


def test_a_campaign_that_waits_since_a_time_to_come_does_not_count(turns, valkey):
    turns.ask("c2")
    let_pass(valkey, WAITING, -3600)
    turns.ask("c3")
    assert turns.others_waiting("c1") == 1
