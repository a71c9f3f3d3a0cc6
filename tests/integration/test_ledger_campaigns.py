"""Campaigns in the ledger: runs that lead to holds, probes that end them, and policies; on both databases."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from pipeline.domain.campaign import Campaign, CampaignState, Hold, HoldKind
from pipeline.domain.lead import Claim, Outcome, Retry, settle
from pipeline.ledger import Ledger
from pipeline.ledger import campaigns as ledger_campaigns
from pipeline.ledger.leads import Recorded
from pipeline.ledger.tables import campaigns, leads
from pipeline.settings import Rate, Settings
from tests.conftest import NOW, make_answer, make_lead
from tests.waiting import patience

FIRST, SECOND, STRANGER = "campaign-a", "campaign-b", "campaign-c"
FIRST_PROBE = timedelta(seconds=30)
MINUTE = timedelta(minutes=1)
OUTAGE = Hold(HoldKind.OUTAGE, "down")
REFUSED_KEY = Hold(HoldKind.REFUSED_KEY, "401")
RETRY = Retry(base=timedelta(0), cap=timedelta(0), max_attempts=1_000)


def fill(ledger: Ledger, campaign: str, count: int = 100, **policies: Any) -> None:
    """A campaign with leads to send."""
    known = ledger.campaigns.change(campaign, policies, now=NOW)
    given = [make_lead(number) for number in range(count)]
    ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=timedelta(days=30), now=NOW)


def claim(ledger: Ledger, campaign: str, limit: int, *, probe: bool = False) -> list[Claim]:
    """Claim leads, also of a campaign that was just held."""
    return ledger.leads.claim(campaign, limit, lease=MINUTE, now=NOW, probe=probe)


def answer(
    ledger: Ledger, campaign: str, claims: Sequence[Claim], outcomes: Sequence[Outcome], *, probe: bool = False
) -> Recorded:
    """Record these outcomes of claims, in one record."""
    settlements = [
        settle(make_answer(one, outcome), RETRY, now=NOW, jitter=random.Random(7))
        for one, outcome in zip(claims, outcomes, strict=True)
    ]
    return ledger.leads.record(Campaign(campaign), settlements, probe_after=FIRST_PROBE, now=NOW, probe=probe)


def send(ledger: Ledger, campaign: str, *outcomes: Outcome, probe: bool = False) -> Recorded:
    """Claim as many leads and record what came of them."""
    return answer(ledger, campaign, claim(ledger, campaign, len(outcomes), probe=probe), outcomes, probe=probe)


def row(ledger: Ledger, campaign: str = FIRST) -> Any:
    """The campaign's row."""
    with ledger.database.read() as connection:
        return connection.execute(sa.select(campaigns).where(campaigns.c.id == campaign)).one()


def state(ledger: Ledger, campaign: str = FIRST) -> tuple[str, str | None]:
    """The campaign's state and the kind of its hold."""
    found = row(ledger, campaign)
    return found.state, found.hold_kind


def runs(ledger: Ledger, campaign: str = FIRST) -> tuple[int, int]:
    """Troubled and rejected outcomes in a row."""
    found = row(ledger, campaign)
    return found.troubled_run, found.rejected_run


def counts(ledger: Ledger) -> dict[str, int]:
    """How many leads are in which state."""
    with ledger.database.read() as connection:
        return {found.state: found.n for found in connection.execute(
            sa.select(leads.c.state, sa.func.count().label("n")).group_by(leads.c.state)
        )}  # fmt: skip


def charged(ledger: Ledger) -> list[int]:
    """How many attempts each lead was charged, in order."""
    with ledger.database.read() as connection:
        return sorted(connection.scalars(sa.select(leads.c.attempts)))


def hold(ledger: Ledger, why: Hold = OUTAGE, campaign: str = FIRST) -> None:
    """Hold a campaign, its first probe in half a minute."""
    ledger.campaigns.hold(campaign, why, probe_at=NOW + FIRST_PROBE, now=NOW)


def second_connection(ledger: Ledger) -> Ledger:
    """A ledger with connections of its own."""
    return Ledger(ledger.database.url.render_as_string(hide_password=False))


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """Run the jobs at the same time, each in a thread of its own, and return what they return."""
    ready = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        ready.wait(timeout=patience())
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [one.result(timeout=patience()) for one in [pool.submit(run, job) for job in jobs]]


# runs


@pytest.mark.parametrize("outcome", [Outcome.NOT_SENT, Outcome.BUSY, Outcome.FAILED, Outcome.UNCERTAIN])
def test_five_troubled_outcomes_in_a_row_hold_the_campaign(ledger: Ledger, outcome: Outcome) -> None:
    fill(ledger, FIRST)
    done = [send(ledger, FIRST, outcome).held for _ in range(4)]
    assert done == [None] * 4
    assert (state(ledger), runs(ledger)) == (("active", None), (4, 0))
    held = send(ledger, FIRST, outcome).held
    assert held is not None
    assert held.kind is HoldKind.OUTAGE
    found = row(ledger)
    assert (found.state, found.hold_kind, found.hold_reason) == ("held", "outage", held.reason)
    assert (found.stopped_at, found.probe_at, found.probes) == (NOW, NOW + FIRST_PROBE, 0)


def test_what_began_before_another_post_was_accepted_tells_of_no_outage(ledger: Ledger) -> None:
    fill(ledger, FIRST)

    def waited_in_vain(count: int, *, began: datetime) -> Recorded:
        answers = [make_answer(one, Outcome.UNCERTAIN, started_at=began) for one in claim(ledger, FIRST, count)]
        done = [settle(one, RETRY, now=NOW, jitter=random.Random(7)) for one in answers]
        return ledger.leads.record(Campaign(FIRST), done, probe_after=FIRST_PROBE, now=NOW, worked_at=NOW)

    assert waited_in_vain(9, began=NOW - MINUTE).held is None
    assert runs(ledger) == (0, 0)
    assert waited_in_vain(5, began=NOW + MINUTE).held is not None


def test_twenty_rejected_leads_in_a_row_hold_the_campaign(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    assert send(ledger, FIRST, *[Outcome.REJECTED] * 19).held is None
    assert (state(ledger), runs(ledger)) == (("active", None), (0, 19))
    held = send(ledger, FIRST, Outcome.REJECTED).held
    assert held == Hold(HoldKind.REJECTIONS, "20 leads in a row were rejected, the last with: it was rejected")
    assert state(ledger) == ("held", "rejections")


def test_the_leads_of_a_run_of_rejections_are_queued_again_once(ledger: Ledger) -> None:
    """Held is not failed: what a changed schema refuses is sent when it fits again; a bad lead ends all the same."""
    fill(ledger, FIRST, 30)
    answer_at(NOW - MINUTE, ledger, Outcome.REJECTED)  # for a reason of its own
    assert counts(ledger) == {"rejected": 1, "queued": 29}
    send(ledger, FIRST, Outcome.ACCEPTED)
    out = claim(ledger, FIRST, 3)
    send(ledger, FIRST, *[Outcome.REJECTED] * 20)
    assert counts(ledger) == {"rejected": 1, "submitted": 1, "sending": 3, "queued": 25}
    answer(ledger, FIRST, out, [Outcome.REJECTED] * 3)  # they were out when the campaign was held
    assert counts(ledger) == {"rejected": 1, "submitted": 1, "queued": 28}
    assert charged(ledger) == [0] * 5 + [1] * 25
    ledger.campaigns.resume(FIRST)
    send(ledger, FIRST, *[Outcome.REJECTED] * 28)
    assert counts(ledger) == {"rejected": 24, "submitted": 1, "queued": 5}


def test_what_was_rejected_by_a_success_is_not_queued_again(ledger: Ledger) -> None:
    """Nothing proves that Futwork did not take a lead whose answer was 200, whatever its body says."""
    fill(ledger, FIRST, 30)
    done = [
        settle(make_answer(one, Outcome.REJECTED, http_status=status), RETRY, now=NOW, jitter=random.Random(7))
        for one, status in zip(claim(ledger, FIRST, 20), [200, 422] * 10, strict=True)
    ]
    assert ledger.leads.record(Campaign(FIRST), done, probe_after=FIRST_PROBE, now=NOW).held is not None
    assert counts(ledger) == {"rejected": 10, "queued": 20}


def test_what_was_refused_before_the_last_acceptance_was_recorded_is_queued_again_too(ledger: Ledger) -> None:
    """The schema changes while POSTs are out: one that is refused may be answered before one that was accepted."""
    fill(ledger, FIRST, 30)
    answer_at(NOW - timedelta(seconds=2), ledger, Outcome.REJECTED, Outcome.ACCEPTED)
    send(ledger, FIRST, *[Outcome.REJECTED] * 20)
    assert counts(ledger) == {"submitted": 1, "queued": 29}


def answer_at(moment: datetime, ledger: Ledger, *outcomes: Outcome) -> None:
    """Record POSTs that began at *moment*."""
    settlements = [
        settle(make_answer(one, outcome, started_at=moment), RETRY, now=NOW, jitter=random.Random(7))
        for one, outcome in zip(claim(ledger, FIRST, len(outcomes)), outcomes, strict=True)
    ]
    ledger.leads.record(Campaign(FIRST), settlements, probe_after=FIRST_PROBE, now=NOW)


def test_a_run_over_several_dispatchers_is_queued_again_whoever_held_the_campaign(
    postgres_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has written its attempts when the record of another, with younger attempts, holds the campaign before it."""
    ledger, slow_one = postgres_ledger, second_connection(postgres_ledger)
    fill(ledger, FIRST, 30)
    slow, quick = claim(ledger, FIRST, 5), claim(ledger, FIRST, 20)
    written, go_on, lock = threading.Event(), threading.Event(), ledger_campaigns.lock

    def lock_when_told(connection: sa.Connection, *args: Any, **options: Any) -> Any:
        if connection.engine is slow_one.database.engine:
            written.set()
            assert go_on.wait(patience())
        return lock(connection, *args, **options)

    monkeypatch.setattr(ledger_campaigns, "lock", lock_when_told)
    with ThreadPoolExecutor(1) as pool:
        behind = pool.submit(answer, slow_one, FIRST, slow, [Outcome.REJECTED] * 5)
        assert written.wait(patience())
        answer(ledger, FIRST, quick, [Outcome.REJECTED] * 20)
        go_on.set()
        behind.result(patience())
    slow_one.close()
    assert state(ledger) == ("held", "rejections")
    assert counts(ledger) == {"queued": 30}


def test_an_acceptance_ends_both_runs(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    send(ledger, FIRST, *[Outcome.REJECTED] * 19, *[Outcome.FAILED] * 4)
    assert runs(ledger) == (4, 19)
    send(ledger, FIRST, Outcome.ACCEPTED)
    assert runs(ledger) == (0, 0)
    send(ledger, FIRST, Outcome.FAILED, Outcome.REJECTED, Outcome.ACCEPTED, Outcome.FAILED)
    assert (state(ledger), runs(ledger)) == (("active", None), (1, 0))


def test_outcomes_that_say_nothing_about_futwork_leave_the_runs(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    send(ledger, FIRST, *[Outcome.FAILED] * 4)
    send(ledger, FIRST, *[Outcome.THROTTLED] * 9)
    assert (state(ledger), runs(ledger)) == (("active", None), (4, 0))


def test_runs_are_counted_over_all_dispatchers(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    claims = claim(ledger, FIRST, 4)
    others = [second_connection(ledger) for _ in claims]
    at_once(*(partial(answer, one, FIRST, [mine], [Outcome.FAILED]) for one, mine in zip(others, claims, strict=True)))
    for one in others:
        one.close()
    assert runs(ledger) == (4, 0)


def test_a_campaigns_runs_are_its_own(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    fill(ledger, SECOND)
    send(ledger, FIRST, *[Outcome.FAILED] * 5)
    assert state(ledger, SECOND) == ("active", None)
    assert runs(ledger, SECOND) == (0, 0)


# holds


def test_a_refused_key_holds_every_active_campaign_on_its_account_and_no_other(ledger: Ledger) -> None:
    for name in (FIRST, SECOND):
        fill(ledger, name, 1, account="one")
    fill(ledger, STRANGER, 1, account="two")
    held = send(ledger, FIRST, Outcome.REFUSED_KEY).held
    assert held == Hold(HoldKind.REFUSED_KEY, "Futwork refused the API key: it was refused_key")
    assert [state(ledger, name) for name in (FIRST, SECOND)] == [("held", "refused_key")] * 2
    assert row(ledger, SECOND).hold_reason == held.reason
    assert row(ledger, SECOND).probe_at == NOW + FIRST_PROBE
    assert state(ledger, STRANGER) == ("active", None)


def test_a_refused_key_wins_over_an_outage_in_the_same_record(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    fill(ledger, SECOND)
    held = send(ledger, FIRST, Outcome.REFUSED_KEY, *[Outcome.FAILED] * 5).held
    assert held is not None
    assert held.kind is HoldKind.REFUSED_KEY
    assert [state(ledger, name) for name in (FIRST, SECOND)] == [("held", "refused_key")] * 2


def test_a_refused_campaign_holds_itself_alone(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    fill(ledger, SECOND)
    send(ledger, FIRST, Outcome.REFUSED_CAMPAIGN)
    assert (state(ledger), state(ledger, SECOND)) == (("held", "refused_campaign"), ("active", None))


def test_a_paused_campaign_is_never_held_over(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    fill(ledger, SECOND)
    claims = claim(ledger, FIRST, 6)
    ledger.campaigns.pause(FIRST, reason="lunch", now=NOW)
    assert answer(ledger, FIRST, claims[:5], [Outcome.FAILED] * 5).held is None
    assert answer(ledger, FIRST, claims[5:], [Outcome.REFUSED_KEY]).held is None
    hold(ledger, REFUSED_KEY)
    found = row(ledger)
    assert (found.state, found.hold_kind, found.hold_reason, found.probe_at) == ("paused", None, "lunch", None)
    assert state(ledger, SECOND) == ("held", "refused_key")  # the key is refused, whoever found out


def test_a_held_campaign_learns_the_latest_reason_and_keeps_its_probe(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    hold(ledger)
    later = NOW + MINUTE
    ledger.campaigns.hold(FIRST, Hold(HoldKind.REFUSED_CAMPAIGN, "404"), probe_at=later + MINUTE, now=later)
    found = row(ledger)
    assert (found.hold_kind, found.hold_reason) == ("refused_campaign", "404")
    assert (found.stopped_at, found.probe_at) == (NOW, NOW + FIRST_PROBE)


def test_a_hold_for_another_reason_is_not_overwritten_by_the_accounts(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    fill(ledger, SECOND)
    hold(ledger, OUTAGE, SECOND)
    hold(ledger, REFUSED_KEY, FIRST)
    assert (state(ledger), state(ledger, SECOND)) == (("held", "refused_key"), ("held", "outage"))


# releases


def test_an_accepted_probe_releases_its_campaign_with_fresh_runs(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    send(ledger, FIRST, *[Outcome.FAILED] * 5)
    done = send(ledger, FIRST, Outcome.ACCEPTED, probe=True)
    assert (done.released, done.held) == (True, None)
    found = row(ledger)
    assert (found.state, found.hold_kind, found.hold_reason, found.stopped_at) == ("active", None, None, None)
    assert (found.probe_at, found.probes, found.troubled_run, found.rejected_run) == (None, 0, 0, 0)


@pytest.mark.parametrize("outcome", [one for one in Outcome if one is not Outcome.ACCEPTED])
def test_a_probe_that_is_not_accepted_releases_nothing(ledger: Ledger, outcome: Outcome) -> None:
    fill(ledger, FIRST)
    hold(ledger)
    done = send(ledger, FIRST, outcome, probe=True)
    assert (done.released, done.held) == (False, None)
    assert row(ledger).state == "held"
    assert row(ledger).probe_at == NOW + FIRST_PROBE


def test_an_acceptance_that_is_no_probe_releases_nothing(ledger: Ledger) -> None:
    """It was sent before the hold; what it proves is older than what led to the hold."""
    fill(ledger, FIRST)
    claims = claim(ledger, FIRST, 2)
    hold(ledger)
    for outcomes in ([Outcome.ACCEPTED], [Outcome.ACCEPTED]):
        assert not answer(ledger, FIRST, [claims.pop()], outcomes).released
    assert state(ledger) == ("held", "outage")


def test_an_accepted_probe_of_a_key_releases_the_account_and_no_other(ledger: Ledger) -> None:
    for name, account in ((FIRST, "one"), (SECOND, "one"), (STRANGER, "two")):
        fill(ledger, name, 2, account=account)
        hold(ledger, REFUSED_KEY, name)
    fill(ledger, "campaign-d", 1, account="one")
    hold(ledger, OUTAGE, "campaign-d")
    assert send(ledger, FIRST, Outcome.ACCEPTED, probe=True).released
    assert [state(ledger, name) for name in (FIRST, SECOND)] == [("active", None)] * 2
    assert state(ledger, STRANGER) == ("held", "refused_key")
    assert state(ledger, "campaign-d") == ("held", "outage")


def test_an_accepted_probe_of_a_campaign_that_was_paused_meanwhile_leaves_it_paused(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    hold(ledger)
    claims = claim(ledger, FIRST, 1, probe=True)
    ledger.campaigns.pause(FIRST, reason="lunch", now=NOW)
    assert not answer(ledger, FIRST, claims, [Outcome.ACCEPTED], probe=True).released
    assert state(ledger) == ("paused", None)


# probes


def test_a_probe_is_taken_once_an_interval_and_the_intervals_grow(
    ledger: Ledger, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(probe_first_seconds=30, probe_cap_seconds=100)
    fill(ledger, FIRST)
    hold(ledger)
    assert not ledger.campaigns.take_probe(FIRST, settings, now=NOW + timedelta(seconds=29))
    moment, waits = NOW + FIRST_PROBE, []
    for _ in range(5):
        assert ledger.campaigns.take_probe(FIRST, settings, now=moment)
        assert not ledger.campaigns.take_probe(FIRST, settings, now=moment)
        due = row(ledger).probe_at
        assert not ledger.campaigns.take_probe(FIRST, settings, now=due - timedelta(microseconds=1))
        waits.append((due - moment).total_seconds())
        moment = due
    assert waits == [30, 60, 100, 100, 100]
    assert row(ledger).probes == 5


def test_of_many_dispatchers_one_takes_the_probe(ledger: Ledger, make_settings: Callable[..., Settings]) -> None:
    fill(ledger, FIRST)
    hold(ledger)
    others = [second_connection(ledger) for _ in range(6)]
    now = NOW + FIRST_PROBE
    taken = at_once(*(partial(one.campaigns.take_probe, FIRST, make_settings(), now=now) for one in others))
    for one in others:
        one.close()
    assert sorted(taken) == [False] * 5 + [True]
    assert row(ledger).probes == 1


def test_the_probe_of_a_key_stands_for_its_account(ledger: Ledger, make_settings: Callable[..., Settings]) -> None:
    for name, account in ((FIRST, "one"), (SECOND, "one"), (STRANGER, "two")):
        fill(ledger, name, 1, account=account)
        hold(ledger, REFUSED_KEY, name)
    now = NOW + FIRST_PROBE
    assert ledger.campaigns.take_probe(FIRST, make_settings(), now=now)
    assert not ledger.campaigns.take_probe(SECOND, make_settings(), now=now)
    assert ledger.campaigns.take_probe(STRANGER, make_settings(), now=now)


@pytest.mark.parametrize("how", ["active", "paused", "unknown"])
def test_only_a_held_campaign_is_probed(ledger: Ledger, make_settings: Callable[..., Settings], how: str) -> None:
    if how != "unknown":
        fill(ledger, FIRST)
    if how == "paused":
        hold(ledger)
        ledger.campaigns.pause(FIRST, reason="lunch", now=NOW)
    assert not ledger.campaigns.take_probe(FIRST, make_settings(), now=NOW + timedelta(days=1))


# two at once


def test_account_wide_holds_and_releases_at_once_do_not_block_each_other(
    postgres_ledger: Ledger, make_settings: Callable[..., Settings]
) -> None:
    """Each wants every campaign of the account; they have to take them in one order, whichever they start from."""
    names = [f"campaign-{number:03}" for number in range(60)]
    for name in names:
        postgres_ledger.campaigns.ensure(name, now=NOW)
    for name in (names[0], names[-1]):
        fill(postgres_ledger, name, 40)
    others = [second_connection(postgres_ledger) for _ in range(4)]

    def refuse(one: Ledger, name: str) -> None:
        for _ in range(8):
            claims = claim(one, name, 1, probe=True)
            answer(one, name, claims, [Outcome.REFUSED_KEY])
            claims = claim(one, name, 1, probe=True)
            answer(one, name, claims, [Outcome.FAILED])
            answer(one, name, claim(one, name, 1, probe=True), [Outcome.ACCEPTED], probe=True)

    def probe(one: Ledger, name: str) -> None:
        settings = make_settings()
        for number in range(20):
            one.campaigns.take_probe(name, settings, now=NOW + timedelta(days=number))
            one.campaigns.hold(name, REFUSED_KEY, probe_at=NOW, now=NOW)

    at_once(
        partial(refuse, others[0], names[0]),
        partial(refuse, others[1], names[-1]),
        partial(probe, others[2], names[0]),
        partial(probe, others[3], names[-1]),
    )
    for one in others:
        one.close()


def test_leads_are_taken_in_while_a_record_holds_the_campaigns_row(postgres_ledger: Ledger) -> None:
    """A new lead refers to its campaign, and must not wait for the transaction that counts its runs."""
    fill(postgres_ledger, FIRST, 1)
    other = second_connection(postgres_ledger)
    with postgres_ledger.database.write() as connection:
        ledger_campaigns.lock(connection, FIRST, with_account=True)
        ledger_campaigns.end_runs(connection, FIRST)
        (taken,) = at_once(
            lambda: other.leads.take_in(
                Campaign(FIRST), [make_lead(500)], batch_id=uuid.uuid4(), max_age=MINUTE, now=NOW
            )
        )
    other.close()
    assert taken.accepted == 1


# operators


def test_pause_and_resume_say_whether_they_changed_anything(ledger: Ledger) -> None:
    assert not ledger.campaigns.pause(FIRST, reason="lunch", now=NOW)
    assert not ledger.campaigns.resume(FIRST)
    fill(ledger, FIRST)
    assert not ledger.campaigns.resume(FIRST)
    assert ledger.campaigns.pause(FIRST, reason="lunch", now=NOW)
    assert not ledger.campaigns.pause(FIRST, reason="dinner", now=NOW)
    assert row(ledger).hold_reason == "lunch"
    assert ledger.campaigns.resume(FIRST)
    assert state(ledger) == ("active", None)


def test_a_pause_replaces_a_hold_and_a_resume_forgets_the_runs(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    send(ledger, FIRST, *[Outcome.FAILED] * 5)
    ledger.campaigns.pause(FIRST, reason="lunch", now=NOW)
    found = row(ledger)
    assert (found.state, found.hold_kind, found.hold_reason, found.probe_at) == ("paused", None, "lunch", None)
    ledger.campaigns.resume(FIRST)
    assert (state(ledger), runs(ledger)) == (("active", None), (0, 0))
    assert send(ledger, FIRST, *[Outcome.FAILED] * 4).held is None


def test_resuming_one_campaign_leaves_the_others_of_its_account_held(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    fill(ledger, SECOND)
    hold(ledger, REFUSED_KEY)
    assert ledger.campaigns.resume(FIRST)
    assert (state(ledger), state(ledger, SECOND)) == (("active", None), ("held", "refused_key"))


POLICIES: dict[str, Any] = {
    "account": "second",
    "rate": Rate.parse("7/m"),
    "on_uncertain": "drop",
    "uncertain_after_seconds": 90.5,
    "on_server_error": "retry",
    "max_attempts": 3,
    "lead_max_age_seconds": 600,
}


def test_a_campaign_begins_with_the_defaults(ledger: Ledger) -> None:
    assert ledger.campaigns.get(FIRST) is None
    assert ledger.campaigns.ensure(FIRST, now=NOW) == Campaign(FIRST)
    assert ledger.campaigns.ensure(FIRST, now=NOW + MINUTE) == Campaign(FIRST)
    assert row(ledger).created_at == NOW


def test_policies_are_set_and_kept(ledger: Ledger) -> None:
    assert ledger.campaigns.change(FIRST, POLICIES, now=NOW) == Campaign(FIRST, **POLICIES)
    assert ledger.campaigns.change(FIRST, {"max_attempts": 4}, now=NOW) == Campaign(
        FIRST, **(POLICIES | {"max_attempts": 4})
    )
    assert ledger.campaigns.change(FIRST, {}, now=NOW) == ledger.campaigns.get(FIRST)


@pytest.mark.parametrize("name", sorted(set(POLICIES)))
def test_none_sets_a_policy_back_to_the_default(ledger: Ledger, name: str) -> None:
    ledger.campaigns.change(FIRST, POLICIES, now=NOW)
    back = {key: value for key, value in POLICIES.items() if key != name}
    assert ledger.campaigns.change(FIRST, {name: None}, now=NOW) == Campaign(FIRST, **back)


def test_an_unknown_policy_is_refused_and_nothing_is_created(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="no such policy: colour, state"):
        ledger.campaigns.change(FIRST, {"state": "held", "colour": "red"}, now=NOW)
    assert ledger.campaigns.get(FIRST) is None


def test_policies_leave_a_hold_as_it_is(ledger: Ledger) -> None:
    fill(ledger, FIRST)
    hold(ledger)
    ledger.campaigns.change(FIRST, POLICIES, now=NOW)
    found = ledger.campaigns.get(FIRST)
    assert found is not None
    assert (found.state, found.hold_kind) == (CampaignState.HELD, HoldKind.OUTAGE)
