"""Dispatch: pull due leads at the pace of the shared limit, send them, record the outcomes.

One dispatcher works on one campaign for a slice of a few seconds. In each round it

1. collects the answers that have arrived, and records them with their attempts in one transaction,
2. reserves as many slots as it has room for from the shared limit,
3. claims that many due leads in one statement, and commits,
4. sends them, and gives back the slots for which no lead was due.

POSTs of one round are on the wire while the next is claimed and the one before is recorded. HTTP never happens inside a
transaction. A process that dies leaves claims, which `sweep` turns into uncertain leads, so nothing is sent twice.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.counters import Counters
from pipeline.coordination.dispatch_leases import LEASE, DispatchLease, DispatchLeases
from pipeline.coordination.limiter import AHEAD, Grant, Limiter, Limits
from pipeline.domain.campaign import Campaign, CampaignState, Hold, HoldKind, probe_interval
from pipeline.domain.lead import Answer, Claim, LeadState, Outcome, Retry, Settlement, settle
from pipeline.futwork import Futwork
from pipeline.ledger import Ledger, LedgerUnavailable, Recorded
from pipeline.observability.logs import logger
from pipeline.observability.metrics import LIMITER_ASKS, LIMITER_SLOTS, LIMITER_WAIT, SUBMISSION_SECONDS, SUBMISSIONS
from pipeline.settings import Settings

log = logger(__name__)

_LONGEST_WAIT_SECONDS = 0.25  # between two checks of the clock, the stop signal and the campaigns that wait
_RESERVE_AGAIN = AHEAD / 2  # before the next slot: late enough to get several, early enough for each of them
_LINGER_SECONDS = 0.05  # how long acceptances wait to be recorded together, while the limit sets the pace
_RENEW_SECONDS = 2.0
_FAIR_SECONDS = 0.2  # how long a dispatcher continues although other campaigns wait
_HAND_OVER_SECONDS = 0.5  # how long the last answers of a slice may take before another dispatcher may start


class Stop(Protocol):
    """Says whether the worker is shutting down."""

    def __call__(self) -> bool: ...


@dataclass(slots=True)
class Slice:
    """What one dispatcher did in its slice."""

    campaign_id: str
    outcomes: dict[str, int] = field(default_factory=dict)
    ended: str = ""
    """Why the slice ended: idle, limit, time, others wait, held, released, not active, no lease, stopping."""
    more: bool = False
    """Whether due work may be left that should not wait for the sweep."""
    worked_at: datetime | None = None
    """When the latest accepted POST began."""

    @property
    def posts(self) -> int:
        """How many POSTs were answered or failed."""
        return sum(self.outcomes.values())


@dataclass(frozen=True, slots=True)
class _Round:
    """One round of reserve, claim, send."""

    claimed: int
    pause: timedelta = timedelta()
    """How long the limit asks to wait."""
    ran_dry: bool = False
    """Whether fewer leads were due than the limit allowed."""


class Dispatcher:
    """Dispatches one campaign at a time; holds one process's connections to Futwork, the ledger and the limit."""

    def __init__(
        self,
        ledger: Ledger,
        futwork: Futwork,
        limiter: Limiter,
        leases: DispatchLeases,
        settings: Settings,
        *,
        request_dispatcher: Callable[[str], None],
        stopping: Stop = lambda: False,
        counters: Counters | None = None,
    ) -> None:
        self._ledger = ledger
        self._futwork = futwork
        self._limiter = limiter
        self._leases = leases
        self._settings = settings
        self._request_dispatcher = request_dispatcher
        self._stopping = stopping
        self._counters = counters or Counters()
        self._waits_since: float | None = None  # since when there is room for more and no slot
        self._jitter = random.Random()  # noqa: S311 - spreads retries; nothing secret

    def run(self, campaign_id: str) -> Slice:
        """Work on a campaign for one slice; return at once if enough others do, or if nothing may be sent."""
        done = Slice(campaign_id)
        try:
            lease = self._leases.take(campaign_id, most=self._settings.dispatchers_per_campaign, duration=LEASE)
        except RedisUnavailable as error:
            log.warning("dispatch stopped: redis is away", campaign=campaign_id, error=str(error))
            done.ended = "limit"
            return done
        if lease is None:
            done.ended = "no lease"
            return done
        try:
            self._work(lease, done)
        except Exception:
            self._give_up(lease)
            self._discard_answers(done)
            raise
        finally:  # also when the process is told to end, perhaps while it counts what is out: then it waits for nothing
            self._give_up(lease)
        # Leads that came in between the last claim and the end of the lease were promised to this dispatcher.
        done.more = done.more or self._has_work(done)
        if done.posts:
            log.info("slice done", campaign=campaign_id, ended=done.ended, **done.outcomes)
        return done

    def _work(self, lease: DispatchLease, done: Slice) -> None:
        campaign = self._ledger.campaigns.get(lease.campaign_id)
        if campaign is None or campaign.state is CampaignState.PAUSED:
            done.ended = "not active"
        elif not self._futwork.has_key(campaign.account):
            self._hold_for_missing_key(campaign)
            done.ended = "held"
        elif campaign.state is CampaignState.HELD:
            self._probe(campaign, done)
        else:
            try:
                self._send(campaign, lease, done)
            except Exception:
                # No more is claimed; what is out may still be recorded, if the ledger comes back in time.
                self._finish(campaign, done)
                raise

    def _send(self, campaign: Campaign, lease: DispatchLease, done: Slice) -> None:
        """Keep the pipe full until the slice ends, then wait for what is out."""
        self._waits_since = None  # the slice before waited for another campaign
        limits = self._limits(campaign)
        started = time.monotonic()
        ends = started + self._settings.slice_seconds
        wait, paced, requested, renewed = 0.0, False, False, started
        while True:
            if time.monotonic() - renewed > _RENEW_SECONDS:
                renewed = time.monotonic()
                self._renew(lease)
            self._record(campaign, self._collect(wait, linger=paced), done)
            done.ended = done.ended or self._reason_to_end(campaign.id, started, ends)
            room = self._futwork.concurrency - self._futwork.in_flight
            if done.ended:
                break
            if not room:
                wait, paced = _LONGEST_WAIT_SECONDS, False
                continue
            try:
                sent = self._send_round(campaign, limits, room)
            except RedisUnavailable as error:
                log.warning("dispatch stopped: redis is away", campaign=campaign.id, error=str(error))
                done.ended = "limit"
                break
            if sent.claimed == room and not requested:
                requested = True  # the limit allows more than one dispatcher can keep in flight
                self._request_dispatcher(campaign.id)
            if not self._futwork.in_flight:
                if sent.ran_dry:
                    done.ended = "idle"
                    break
                if time.monotonic() + sent.pause.total_seconds() >= ends:
                    done.ended = "limit"  # nothing to do in this slice any more: leave the process to other campaigns
                    break
            wait = _LONGEST_WAIT_SECONDS if sent.ran_dry else min(sent.pause.total_seconds(), _LONGEST_WAIT_SECONDS)
            paced = bool(sent.pause) and not sent.ran_dry
        self._finish(campaign, done, lease=lease)

    def _finish(
        self, campaign: Campaign, done: Slice, *, lease: DispatchLease | None = None, probe: bool = False
    ) -> None:
        """Wait for everything that is out, and record it.

        One answer may take as long as the read timeout. The campaign does not wait for it: its *lease* is given up
        early, and another dispatcher is requested.
        """
        started = time.monotonic()
        while self._futwork.in_flight:
            self._record(campaign, self._collect(_LONGEST_WAIT_SECONDS), done, probe=probe)
            if lease is not None and time.monotonic() - started > _HAND_OVER_SECONDS:
                self._give_up(lease)
                lease = None
                if self._has_work(done):
                    self._request_dispatcher(campaign.id)

    def _discard_answers(self, done: Slice) -> None:
        """Take the answers that could not be recorded off the wire, so that they do not reach the next campaign.

        Their claims run out, and the leads become uncertain: the ledger was away for longer than a claim lasts.
        """
        lost: list[uuid.UUID] = []
        while self._futwork.in_flight:
            lost += [answer.claim.lead_id for answer in self._futwork.receive(wait=_LONGEST_WAIT_SECONDS)]
        if lost:
            log.error(
                "answers could not be recorded: their leads will be uncertain", campaign=done.campaign_id, leads=lost
            )

    def _collect(self, wait: float, *, linger: bool = False) -> list[Answer]:
        """The answers that arrived, waiting for the first of them; with nothing out, the wait is the limit's pace.

        With *linger* acceptances wait for others, so that one record writes many. Any other answer is recorded at once,
        because it may lead to a hold.
        """
        if not self._futwork.in_flight:
            time.sleep(wait)
        ends = time.monotonic() + min(wait, _LINGER_SECONDS)
        answers = self._futwork.receive(wait=wait)
        while linger and self._futwork.in_flight and all(one.outcome is Outcome.ACCEPTED for one in answers):
            left = ends - time.monotonic()
            if left <= 0:
                break
            answers += self._futwork.receive(wait=left)
        return answers

    def _send_round(self, campaign: Campaign, limits: Limits, room: int) -> _Round:
        """Reserve, claim, send."""
        grant = self._reserve(limits, room, ahead=AHEAD)
        granted_at = time.monotonic()
        pause = timedelta() if grant.slots == room else max(timedelta(), grant.wait - _RESERVE_AGAIN)
        if not grant.slots:
            return _Round(0, pause=pause)
        now = self._ledger.now()
        claims = self._ledger.leads.claim(campaign.id, grant.slots, lease=self._settings.claim_lease, now=now)
        self._send_claims(campaign, claims, at=[granted_at + moment.total_seconds() for moment in grant.moments])
        unused = grant.slots - len(claims)
        if unused:
            self._give_back(limits, unused)
        return _Round(len(claims), pause=pause, ran_dry=unused > 0)

    def _reserve(self, limits: Limits, wanted: int, *, ahead: timedelta = timedelta()) -> Grant:
        """Reserve slots, and count what the limiter answers."""
        grant = self._limiter.reserve(limits, wanted, ahead=ahead)
        if grant.slots:
            self._counters.count(LIMITER_SLOTS, limits.account, "granted", by=grant.slots)
            if self._waits_since is not None:
                self._counters.observe(LIMITER_WAIT, time.monotonic() - self._waits_since)
                self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = time.monotonic()
        self._counters.count(LIMITER_ASKS, "granted" if grant.slots else "stopped" if grant.stopped else "full")
        return grant

    def _send_claims(self, campaign: Campaign, claims: Sequence[Claim], *, at: Sequence[float] = ()) -> None:
        if claims:
            log.info("leads claimed", campaign=campaign.id, leads=[claim.lead_id for claim in claims])
        self._futwork.send(claims, account=campaign.account, at=at)

    def _reason_to_end(self, campaign_id: str, started: float, ends: float) -> str:
        now = time.monotonic()
        if self._stopping():
            return "stopping"
        if now >= ends:
            return "time"
        if now - started >= _FAIR_SECONDS and self._others_wait(campaign_id):
            return "others wait"
        return ""

    def _others_wait(self, campaign_id: str) -> bool:
        try:
            return self._leases.others_waiting(campaign_id) > 0
        except RedisUnavailable:
            return False  # then nothing can be reserved either, and the slice ends for that

    def _probe(self, campaign: Campaign, done: Slice) -> None:
        """Send one lead of a held campaign, if its probe is due; its acceptance releases the campaign."""
        limits = self._limits(campaign)
        try:
            if not self._reserve(limits, 1).slots:
                done.ended = "limit"
                return
        except RedisUnavailable:
            done.ended = "limit"
            return
        now = self._ledger.now()
        claims = []
        if self._ledger.campaigns.take_probe(campaign.id, self._settings, now=now):
            claims = self._ledger.leads.claim(campaign.id, 1, lease=self._settings.claim_lease, now=now, probe=True)
        if not claims:
            self._give_back(limits, 1)
            done.ended = "held"
            return
        self._send_claims(campaign, claims)
        self._finish(campaign, done, probe=True)
        done.ended = done.ended or "held"
        done.more = done.outcomes.get(Outcome.ACCEPTED, 0) > 0

    def _record(self, campaign: Campaign, answers: Sequence[Answer], done: Slice, *, probe: bool = False) -> None:
        if not answers:
            return
        now = self._ledger.now()
        retry = Retry(
            base=timedelta(seconds=self._settings.backoff_base_seconds),
            cap=timedelta(seconds=self._settings.backoff_cap_seconds),
            max_attempts=campaign.max_attempts or self._settings.max_attempts,
            after_server_error=(campaign.on_server_error or self._settings.on_server_error) == "retry",
        )
        took: dict[Outcome, list[float]] = {}
        for answer in answers:
            took.setdefault(answer.outcome, []).append(answer.duration.total_seconds())
        for outcome, seconds in took.items():
            done.outcomes[outcome] = done.outcomes.get(outcome, 0) + len(seconds)
            self._counters.count(SUBMISSIONS, outcome.value, by=len(seconds))
            self._counters.observe_all(SUBMISSION_SECONDS, seconds, outcome.value)
        if Outcome.THROTTLED in took:
            self._slow_down(campaign, answers, retry)
        began = [answer.started_at for answer in answers if answer.outcome is Outcome.ACCEPTED]
        done.worked_at = max([*began, done.worked_at] if done.worked_at else began, default=None)
        settlements = [settle(answer, retry, now=now, jitter=self._jitter, probe=probe) for answer in answers]
        recorded = self._record_patiently(campaign, settlements, now=now, probe=probe, worked_at=done.worked_at)
        if recorded.late:
            log.warning("answers came after their claims had ended", campaign=campaign.id, leads=recorded.late_ids)
        _log_answers(campaign, settlements)
        if recorded.released:
            done.ended = "released"
            log.info("campaign released", campaign=campaign.id, by="a probe that was accepted")
        if recorded.held is not None:
            done.ended = "held"
            log.error("campaign held", campaign=campaign.id, kind=recorded.held.kind.value, reason=recorded.held.reason)

    def _record_patiently(
        self,
        campaign: Campaign,
        settlements: Sequence[Settlement],
        *,
        now: datetime,
        probe: bool,
        worked_at: datetime | None,
    ) -> Recorded:
        """Record, trying again while the ledger is away or two records wait for each other.

        An answer that is not recorded leaves a lead of unknown fate, so this waits until after the claims are over: a
        record with the same token still settles a lead that became uncertain meanwhile.
        """
        patience = pauses(self._settings.claim_lease.total_seconds())
        while True:
            try:
                return self._ledger.leads.record(
                    campaign,
                    settlements,
                    probe_after=probe_interval(0, self._settings),
                    now=now,
                    probe=probe,
                    worked_at=worked_at,
                )
            except LedgerUnavailable as error:
                pause = next(patience, None)
                if pause is None:
                    raise
                log.warning(
                    "outcomes wait for the ledger",
                    campaign=campaign.id,
                    leads=[one.answer.claim.lead_id for one in settlements],
                    error=str(getattr(error, "orig", None) or error),  # without the statement and its parameters
                )
                time.sleep(pause)

    def _slow_down(self, campaign: Campaign, answers: Sequence[Answer], retry: Retry) -> None:
        """Stop the account's submissions for the longest pause that an answer asks for."""
        throttled = [answer for answer in answers if answer.outcome is Outcome.THROTTLED]
        pause = max(answer.retry_after or retry.delay(1, jitter=self._jitter) for answer in throttled)
        try:
            self._limiter.stop(campaign.account, pause)
        except RedisUnavailable:
            return  # without Redis nothing is sent
        log.warning("futwork throttles", account=campaign.account, pause_seconds=round(pause.total_seconds(), 1))

    def _hold_for_missing_key(self, campaign: Campaign) -> None:
        if campaign.hold_kind is HoldKind.NO_KEY:
            now = self._ledger.now()
            self._ledger.campaigns.take_probe(campaign.id, self._settings, now=now)  # checks again later, sends nothing
            return
        name = "FUTWORK_API_KEY" if campaign.account == "default" else f"FUTWORK_API_KEYS ({campaign.account}=…)"
        hold = Hold(HoldKind.NO_KEY, f"no API key is set for the account {campaign.account!r}: set {name} and restart")
        now = self._ledger.now()
        self._ledger.campaigns.hold(campaign.id, hold, probe_at=now + probe_interval(0, self._settings), now=now)
        log.error("campaign held", campaign=campaign.id, kind=hold.kind.value, reason=hold.reason)

    def _has_work(self, done: Slice) -> bool:
        if done.ended not in ("idle", "time", "others wait"):
            return False
        campaign = self._ledger.campaigns.get(done.campaign_id)
        if campaign is None or campaign.state is not CampaignState.ACTIVE:
            return False  # paused or held meanwhile: its leads are still due, and must not request dispatchers for ever
        return self._ledger.leads.has_due(campaign.id, now=self._ledger.now())

    def _limits(self, campaign: Campaign) -> Limits:
        return Limits(
            account=campaign.account,
            account_rate=self._settings.account_rate,
            campaign=campaign.id,
            campaign_rate=campaign.rate or self._settings.campaign_rate,
        )

    def _give_back(self, limits: Limits, unused: int) -> None:
        self._counters.count(LIMITER_SLOTS, limits.account, "returned", by=unused)
        try:
            self._limiter.give_back(limits, unused)
        except RedisUnavailable:
            log.debug("slots were not given back", slots=unused)  # the limit only stays a little lower than necessary

    def _renew(self, lease: DispatchLease) -> None:
        try:
            self._leases.renew(lease, duration=LEASE)
        except RedisUnavailable:
            log.debug("a lease was not renewed", campaign=lease.campaign_id)  # without Redis the limiter stops us

    def _give_up(self, lease: DispatchLease) -> None:
        try:
            self._leases.give_up(lease)
        except RedisUnavailable:
            log.debug("a lease was left to run out", campaign=lease.campaign_id)


def _log_answers(campaign: Campaign, settlements: Sequence[Settlement]) -> None:
    """One line for each kind of answer in a batch, with the leads that got it."""
    alike: dict[tuple[Outcome, LeadState], list[uuid.UUID]] = {}
    for one in settlements:
        alike.setdefault((one.answer.outcome, one.state), []).append(one.answer.claim.lead_id)
    for (outcome, state), leads in alike.items():
        log.info("posts answered", campaign=campaign.id, outcome=outcome.value, state=state.value, leads=leads)


def pauses(seconds: float) -> Iterator[float]:
    """The pauses between tries that together last about *seconds*, from a twentieth of a second up to two."""
    pause, left = 0.05, seconds
    while left > 0:
        yield pause
        left -= pause
        pause = min(2.0, pause * 2)
