"""Sweep: find what the other stages left behind, so that nothing waits for ever.

`sweep` runs every few seconds and wakes dispatchers; `tidy` runs less often and settles what only time decides. Both
are safe to run twice at once, so two beats do no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from pipeline.coordination.counters import Counters
from pipeline.domain.call import names_in
from pipeline.ledger import Ledger, Unread
from pipeline.observability.logs import logger
from pipeline.observability.metrics import LOST_CLAIMS, TIDIED
from pipeline.settings import Settings

log = logger(__name__)

_VERIFY_AFTER = timedelta(hours=1)  # counting a million leads takes a good second
_EVENT_PATIENCE = timedelta(seconds=30)  # how long a stored event may wait for the worker that stored it


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found."""

    woken: int
    lost_claims: int


@dataclass(frozen=True, slots=True)
class Tidied:
    """What tidying settled."""

    expired: int
    resent: int
    dropped: int
    merged: int
    linked: int
    spooled: int


class Sweep:
    """Finds due work, lost claims, old leads, events that were not merged, and orphans."""

    def __init__(
        self,
        ledger: Ledger,
        settings: Settings,
        *,
        wake: Callable[[str], None],
        merge_left_over: Callable[[datetime | None, datetime], int],
        drain_spool: Callable[[], int],
        events_wait: Callable[[], bool],
        counters: Counters | None = None,
    ) -> None:
        """*events_wait* says whether events wait in the broker for a worker, or may wait because it cannot be asked."""
        self._ledger = ledger
        self._settings = settings
        self._wake = wake
        self._merge_left_over = merge_left_over
        self._drain_spool = drain_spool
        self._events_wait = events_wait
        self._counters = counters or Counters()

    def sweep(self) -> Swept:
        """Settle claims whose time is over, and wake a dispatcher for every campaign with due work or a due probe."""
        now = self._ledger.now()
        lost = self._ledger.leads.settle_lost_claims(now=now)
        self._counters.count(LOST_CLAIMS, by=lost)
        due = self._ledger.leads.campaigns_with_due(now=now)
        for campaign_id in due:
            self._wake(campaign_id)
        return Swept(len(due), lost)

    def tidy(self) -> Tidied:
        """Settle what time decides, merge and link the events that were left over, and drain the spool.

        Evidence comes first: an event that has arrived must count before a policy sends its lead again. So nothing is
        decided about uncertain leads while events are in the spool or in the broker, or wait in the ledger for a merge.
        Nothing limits how long: if no worker takes events, evidence piles up unread, and a lead that waits is safer
        than a second call.
        """
        now = self._ledger.now()
        self._catch_up_with_the_clock(now)
        expired = self._ledger.leads.expire(now=now)
        spooled = self._drain_spool()
        on_their_way = bool(spooled) or self._events_wait()
        # With nothing on its way little waits in the ledger, and all of it is merged, so that all of it counts.
        merged = self._merge_left_over(now - _EVENT_PATIENCE if on_their_way else None, now)
        linked = self._ledger.calls.link_orphans(now=now)
        undecided = on_their_way or self._ledger.calls.is_waiting()
        settled = {"resend": 0, "drop": 0} if undecided else self._settle_old_uncertain(now)
        done = Tidied(
            expired=expired,
            resent=settled["resend"],
            dropped=settled["drop"],
            merged=merged,
            linked=linked,
            spooled=spooled,
        )
        for what, many in asdict(done).items():
            self._counters.count(TIDIED, what, by=many)
        if any(asdict(done).values()):
            log.info("tidied", **asdict(done))
        self._keep_rollups(now)
        return done

    def _catch_up_with_the_clock(self, now: datetime) -> None:
        """Correct what would wait until a clock that was set back has caught up."""
        longest = timedelta(seconds=self._settings.probe_cap_seconds)
        leads = self._ledger.leads.take_back_the_future(now=now)
        probes = self._ledger.campaigns.take_back_the_future(longest=longest, now=now)
        if leads or probes:
            log.warning("the clock went back: what waited for it is due again", leads=leads, probes=probes)

    def _keep_rollups(self, now: datetime) -> None:
        """Compact the rollups, and now and then verify them against the leads: a difference is a bug, and is logged."""
        self._ledger.rollups.compact(now=now)
        last = self._ledger.rollups.verified_at()
        if last is not None and now - last < _VERIFY_AFTER:
            return
        found = self._ledger.rollups.verify(now=now)
        if found.differences:
            log.error("rollups were wrong and have been corrected", differences=found.differences)
        if found.accepted != found.leads:
            log.error("accepted leads do not match the states", accepted=found.accepted, leads=found.leads)

    def _settle_old_uncertain(self, now: datetime) -> dict[str, int]:
        return self._ledger.leads.settle_old_uncertain(
            default_policy=self._settings.on_uncertain,
            default_after=timedelta(seconds=self._settings.uncertain_after_seconds),
            default_max_attempts=self._settings.max_attempts,
            unread=self._unread(),
            now=now,
        )

    def _unread(self) -> list[Unread]:
        """What lies in quarantine and may be an event of any lead, with as much of it as can be read."""
        bodies, rest = self._ledger.evidence.quarantined()
        unread = [
            Unread(campaign, phone, received_at)
            for body, received_at in bodies
            for campaign, phone in names_in(body, default_region=self._settings.default_region)
        ]
        return [*unread, Unread(None, None, rest)] if rest is not None else unread
