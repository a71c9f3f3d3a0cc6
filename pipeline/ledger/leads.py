"""Leads in the ledger: taken in once, claimed by one dispatcher at a time, recorded behind a fence.

Every change of state is a guarded UPDATE that names the states it may leave, so that two processes that meet at one
lead both end well: the second finds no row and changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from typing import Any

import orjson
import sqlalchemy as sa

from pipeline.domain.campaign import REJECTION_RUN, TROUBLE, Campaign, CampaignState, Hold, HoldKind, Runs, hold_after
from pipeline.domain.lead import TRANSITIONS, Claim, Lead, LeadState, Outcome, Settlement, lead_id
from pipeline.ledger import campaigns as campaign_sql
from pipeline.ledger.database import CLOCKS_APART, Columns, Database, UtcDateTime, plain_id
from pipeline.ledger.evidence import Evidence, Unread
from pipeline.ledger.suppressions import why_suppressed
from pipeline.ledger.tables import attempts, batches, campaigns, leads
from pipeline.observability.logs import logger

log = logger(__name__)

_INTAKE: Columns = {
    "id": sa.Uuid(),
    "key": sa.Text(),
    "phone": sa.Text(),
    "data": sa.Text(),
    "traceparent": sa.Text(),
}
_TRIED: Columns = {
    "claim": sa.Uuid(),
    "started_at": UtcDateTime(),
    "duration_ms": sa.Integer(),
    "outcome": sa.Text(),
    "http_status": sa.Integer(),
    "excerpt": sa.Text(),
}
_RECORDED: Columns = {
    "id": sa.Uuid(),
    "state": sa.Text(),
    "attempts": sa.Integer(),
    "due_at": UtcDateTime(),
    "submitted_at": UtcDateTime(),
    "futwork_lead_id": sa.Text(),
    "reason": sa.Text(),
    **_TRIED,
}

_OUT_TOGETHER = timedelta(seconds=30)  # as long as a POST may be out: READ_TIMEOUT_SECONDS by default

_RECORDED_TOGETHER = 100_000  # attempts: more than a ledger takes in that time
_REFUSED_FROM = 400  # a status from here on proves that Futwork did not take the lead

_WAITS_FOR_EVIDENCE = "waits for evidence: an event in quarantine, or a call without a lead, may be about it"

_PORTION = 1000  # leads changed in one transaction of the upkeep: others wait milliseconds for it, not minutes


def may_become(state: LeadState) -> list[str]:
    """The states that may be left for *state*."""
    return [before.value for before, after in TRANSITIONS.items() if state in after]


@dataclass(frozen=True, slots=True)
class Intake:
    """What became of a batch: its valid leads, how many of them were new, and of those how many must not be called."""

    leads: int
    accepted: int
    suppressed: int
    ids: tuple[uuid.UUID, ...] = field(default=(), compare=False)
    """The valid leads, new or known."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a record changed: leads settled, answers that came after their claim was taken over, and a hold."""

    settled: int
    late: int
    held: Hold | None
    released: bool
    late_ids: tuple[uuid.UUID, ...] = field(default=(), compare=False)


class Leads:
    """The statements on leads. Each method is one transaction and commits before it returns."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._insert = self._build_insert()
        self._claim = self._build_claim(CampaignState.ACTIVE)
        self._claim_probe = self._build_claim(CampaignState.ACTIVE, CampaignState.HELD)
        self._settle = self._build_settle()
        self._note_attempts = self._build_note_attempts()
        self._record = self._build_record()

    # taking in

    def take_in(
        self,
        campaign: Campaign,
        rows: Sequence[Lead],
        *,
        batch_id: uuid.UUID,
        max_age: timedelta,
        now: datetime,
        traces: Sequence[str | None] = (),
    ) -> Intake:
        """Insert the leads that the ledger does not know yet; safe to repeat, also in part.

        The lead's id is its campaign and key, so a lead that is known already is left as it is, and of two with one key
        in a batch the first counts. One whose number is on the do-not-call list is taken in as suppressed. *traces* are
        the rows' traces, if they have any.
        """
        # In the order of their ids: an insert waits for another's uncommitted row; two must not wait for each other.
        pairs = reversed(list(zip_longest(rows, traces)))
        by_id = {lead_id(campaign.id, lead.key): (lead, trace) for lead, trace in pairs}
        unique = sorted(by_id.items(), key=lambda item: item[0].int)
        encoded = self._db.encode(
            [
                {
                    "id": plain_id(id_),
                    "key": lead.key,
                    "phone": lead.phone,
                    "data": orjson.dumps(lead.data).decode(),
                    "traceparent": trace,
                }
                for id_, (lead, trace) in unique
            ]
        )
        with self._db.write() as connection:
            inserted = connection.execute(
                self._insert,
                {"batch": encoded, "campaign": campaign.id, "batch_id": batch_id, "now": now, "expires": now + max_age},
            ).all()
            upsert = self._db.insert(batches).values(
                id=batch_id, campaign_id=campaign.id, received_at=now, leads=len(rows), accepted=len(inserted)
            )
            connection.execute(
                upsert.on_conflict_do_update(
                    index_elements=[batches.c.id], set_={"accepted": batches.c.accepted + upsert.excluded.accepted}
                )
            )
        suppressed = sum(row.state == LeadState.SUPPRESSED for row in inserted)
        return Intake(len(rows), len(inserted), suppressed, tuple(by_id))

    def _build_insert(self) -> Any:
        campaign = sa.bindparam("campaign", type_=sa.String())
        given = self._db.rows("batch", _INTAKE)
        batch = sa.select(given, why_suppressed(given.c.phone, campaign).label("why")).subquery("looked_up")
        now, expires = sa.bindparam("now", type_=UtcDateTime()), sa.bindparam("expires", type_=UtcDateTime())
        values: dict[sa.Column[Any], Any] = {
            leads.c.id: batch.c.id,
            leads.c.key: batch.c.key,
            leads.c.phone: batch.c.phone,
            leads.c.data: batch.c.data,
            leads.c.campaign_id: campaign,
            leads.c.state: sa.case(
                (batch.c.why.is_(None), _literal(LeadState.QUEUED)), else_=_literal(LeadState.SUPPRESSED)
            ),
            leads.c.reason: batch.c.why,
            leads.c.traceparent: batch.c.traceparent,
            leads.c.due_at: now,
            leads.c.expires_at: expires,
            leads.c.batch_id: sa.bindparam("batch_id", type_=sa.Uuid()),
            leads.c.accepted_at: now,
            leads.c.changed_at: now,
        }
        chosen = sa.select(*values.values()).select_from(batch).where(sa.true())
        insert = self._db.insert(leads).from_select(list(values), chosen).on_conflict_do_nothing()
        return insert.returning(leads.c.id, leads.c.state)

    def traces(self, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, str]:
        """The traces of those of the leads that have one."""
        query = sa.select(leads.c.id, leads.c.traceparent).where(leads.c.id.in_(ids), leads.c.traceparent.is_not(None))
        with self._db.read() as connection:
            return {row.id: row.traceparent for row in connection.execute(query)}

    # sending

    def campaigns_with_due(self, *, now: datetime) -> list[str]:
        """Active campaigns with a lead that may go out now, and held ones whose probe is due and that have a lead."""
        waiting = sa.exists().where(
            leads.c.campaign_id == campaigns.c.id,
            _is(LeadState.QUEUED),
            leads.c.due_at <= now,
            leads.c.expires_at > now,
        )
        may_try = (campaigns.c.state == CampaignState.ACTIVE) | (
            (campaigns.c.state == CampaignState.HELD) & (campaigns.c.probe_at <= now)
        )
        with self._db.read() as connection:
            return list(connection.scalars(sa.select(campaigns.c.id).where(may_try, waiting).order_by(campaigns.c.id)))

    def has_due(self, campaign_id: str, *, now: datetime) -> bool:
        """Whether a lead of this campaign could be claimed now."""
        query = sa.select(leads.c.id).where(
            leads.c.campaign_id == campaign_id,
            _is(LeadState.QUEUED),
            leads.c.due_at <= now,
            leads.c.expires_at > now,
        )
        with self._db.read() as connection:
            return connection.scalar(query.limit(1)) is not None

    def claim(
        self, campaign_id: str, limit: int, *, lease: timedelta, now: datetime, probe: bool = False
    ) -> list[Claim]:
        """Lease up to *limit* due leads of a campaign to this worker, longest due first.

        Commits before it returns, so that no lock is held during the POST. Rows locked by other workers are skipped. A
        campaign that is not active gives none, unless this is its *probe*; a paused one gives none at all. A claim that
        is not recorded within *lease* is settled by `sweep` as uncertain. A lead whose number is on the do-not-call
        list becomes suppressed instead, so the claim may be smaller than what is due.
        """
        token, expires_at = uuid.uuid4(), now + lease
        ours = datetime.now(UTC) + lease  # what the sender looks at; begun before the statement, so never too late
        with self._db.write_one() as connection:
            claimed = connection.execute(
                self._claim_probe if probe else self._claim,
                {"campaign": campaign_id, "most": limit, "token": token, "until": expires_at, "now": now},
            )
            taken = claimed.all()
        found = sorted((row for row in taken if row.state == LeadState.SENDING), key=lambda row: row.due_at)
        if len(found) < len(taken):
            log.info("leads suppressed", leads=[row.id for row in taken if row.state != LeadState.SENDING])
        return [
            Claim(
                row.id,
                campaign_id,
                token,
                ours,
                row.phone,
                row.data,
                row.attempts,
                row.expires_at,
                row.traceparent,
            )
            for row in found
        ]

    def record(
        self,
        campaign: Campaign,
        settlements: Sequence[Settlement],
        *,
        probe_after: timedelta,
        now: datetime,
        probe: bool = False,
        worked_at: datetime | None = None,
    ) -> Recorded:
        """Write the outcomes of a batch, its attempts, and the hold that they call for, in one transaction.

        A settlement counts only while its lead still shows the claim's token; a lead that an event or a successor moved
        on keeps its state. An acceptance that comes late is evidence all the same: the lead is not sent again. Safe to
        repeat: an attempt is known by its lead and claim. Only the runs of a repeated call are counted again.

        *worked_at* is when the youngest POST began that the caller knows to be accepted. One that began before and had
        no good end tells of no outage: among many at once, those that wait for an answer in vain are the last to end.
        """
        if not settlements:
            return Recorded(0, 0, None, released=False)
        # Nearly all batches are of this kind: on PostgreSQL each is one statement, with no round trips around it.
        plain = not probe and all(one.answer.outcome is Outcome.ACCEPTED for one in settlements)
        # Nor does what follows for late ones need to be one with it: each statement is true by itself.
        with self._db.write_one() if plain else self._db.write() as connection:
            done = self._settle_and_note(connection, campaign, settlements, now=now, end_runs=plain)
            late = [one for one in settlements if one.answer.claim.lead_id not in done]
            for one in late:
                if one.answer.outcome is Outcome.ACCEPTED:
                    self._keep_evidence(connection, one, now)
            held, released = None, False
            if not plain:
                held, released = self._judge(
                    connection,
                    campaign,
                    settlements,
                    probe_after=probe_after,
                    now=now,
                    probe=probe,
                    worked_at=worked_at,
                )
        return Recorded(len(done), len(late), held, released, tuple(one.answer.claim.lead_id for one in late))

    def _settle_and_note(
        self,
        connection: sa.Connection,
        campaign: Campaign,
        settlements: Sequence[Settlement],
        *,
        now: datetime,
        end_runs: bool,
    ) -> set[uuid.UUID]:
        """Settle the leads that still show their claim, and note all attempts; the ids of the settled."""
        given = self._db.encode([_recorded(one, now) for one in settlements])
        if not self._db.is_sqlite:
            values = {"recorded": given, "now": now, "campaign": campaign.id, "end_runs": end_runs}
            return set(connection.scalars(self._record, values).all())
        done = set(connection.scalars(self._settle, {"recorded": given, "now": now}).all())
        connection.execute(self._note_attempts, {"recorded": given})
        if end_runs:
            campaign_sql.end_runs(connection, campaign.id)
        return done

    @staticmethod
    def _build_claim(*allowed: CampaignState) -> Any:
        # Literals, not parameters: a plan that is prepared once can then use the partial index.
        is_queued = _is(LeadState.QUEUED)
        campaign = sa.bindparam("campaign", type_=sa.String())
        now = sa.bindparam("now", type_=UtcDateTime())
        due = (
            sa.select(leads.c.id, why_suppressed(leads.c.phone, campaign).label("why"))
            .where(leads.c.campaign_id == campaign, is_queued, leads.c.due_at <= now, leads.c.expires_at > now)
            .where(sa.exists().where(campaigns.c.id == campaign, campaigns.c.state.in_(allowed)))
            .order_by(leads.c.due_at)
            .limit(sa.bindparam("most", type_=sa.Integer()))
            .with_for_update(skip_locked=True, key_share=True)
        )
        chosen = due.cte("due").prefix_with("MATERIALIZED", dialect="postgresql")
        may_go = chosen.c.why.is_(None)
        return (
            sa.update(leads)
            .where(leads.c.id == chosen.c.id, is_queued)
            .values(
                state=sa.case((may_go, _literal(LeadState.SENDING)), else_=_literal(LeadState.SUPPRESSED)),
                claim=sa.case((may_go, sa.bindparam("token", type_=sa.Uuid())), else_=leads.c.claim),
                claim_expires_at=sa.case((may_go, sa.bindparam("until", type_=UtcDateTime()))),
                changed_at=now,
                reason=chosen.c.why,
            )
            .returning(
                *(leads.c.id, leads.c.state, leads.c.phone, leads.c.data),
                *(leads.c.attempts, leads.c.expires_at, leads.c.due_at, leads.c.traceparent),
            )
        )

    def _build_settle(self) -> Any:
        return _settling(self._db.rows("recorded", _RECORDED)).returning(leads.c.id)

    def _build_note_attempts(self) -> Any:
        given = self._db.rows("recorded", _RECORDED)
        chosen = sa.select(given.c.id, *(given.c[name] for name in _TRIED)).where(sa.true())
        return self._db.insert(attempts).from_select(["lead_id", *_TRIED], chosen).on_conflict_do_nothing()

    def _build_record(self) -> Any:
        """Settling and noting as one statement, for PostgreSQL.

        It locks the leads by id first: an event batch that touches the same leads locks them in the same order. A lead
        that another transaction changed before the lock was had is looked at again as it is now, so the fence holds.
        """
        given = sa.select(self._db.rows("recorded", _RECORDED)).cte("given").prefix_with("MATERIALIZED")
        locked = (
            sa.select(given)
            .join(leads, leads.c.id == given.c.id)
            .order_by(given.c.id)
            # No key changes: whoever only refers to these rows, such as a call that is written, need not wait.
            .with_for_update(key_share=True, of=leads)
        )
        mine = locked.cte("locked").prefix_with("MATERIALIZED")  # a join with it later would be of each with each
        tried = sa.select(given.c.id, *(given.c[name] for name in _TRIED))
        noted = self._db.insert(attempts).from_select(["lead_id", *_TRIED], tried).on_conflict_do_nothing()
        ended = campaign_sql.ending_runs(
            sa.bindparam("campaign", type_=sa.String()), sa.bindparam("end_runs", type_=sa.Boolean())
        )
        return _settling(mine).returning(leads.c.id).add_cte(noted.cte("noted"), ended.cte("ended"))

    @staticmethod
    def _keep_evidence(connection: sa.Connection, one: Settlement, now: datetime) -> None:
        """Another worker or an operator moved the lead on first; the acceptance still proves that Futwork has it.

        A successor that is sending the lead at this moment loses its claim: whatever its answer, it is not sent again.
        """
        found = one.answer.futwork_lead_id
        connection.execute(
            sa.update(leads)
            .where(leads.c.id == one.answer.claim.lead_id, leads.c.state.in_(may_become(LeadState.SUBMITTED)))
            .values(
                state=LeadState.SUBMITTED,
                claim_expires_at=None,
                submitted_at=now,
                changed_at=now,
                reason="accepted by a late answer",
            )
        )
        connection.execute(
            sa.update(leads)
            .where(leads.c.id == one.answer.claim.lead_id, leads.c.futwork_lead_id.is_(None))
            .values(futwork_lead_id=found)
        )

    @staticmethod
    def _judge(
        connection: sa.Connection,
        campaign: Campaign,
        settlements: Sequence[Settlement],
        *,
        probe_after: timedelta,
        now: datetime,
        probe: bool,
        worked_at: datetime | None,
    ) -> tuple[Hold | None, bool]:
        """Count the runs and apply the hold or the release that they call for, inside the record's transaction."""
        outcomes = [one.answer.outcome for one in settlements]
        # Locked first, and whole: what follows may hold or release the account.
        row = campaign_sql.lock(connection, campaign.id, with_account=probe or Outcome.REFUSED_KEY in outcomes)
        runs, hold = Runs(row.troubled_run, row.rejected_run), None
        for one in settlements:
            if one.answer.outcome in TROUBLE and worked_at is not None and one.answer.started_at < worked_at:
                continue
            runs = runs.after(one.answer.outcome)
            found = hold_after(one.answer.outcome, runs, excerpt=one.answer.excerpt)
            if found is not None and (hold is None or found.spans_account or not hold.spans_account):
                hold = found  # the latest, but a refused key concerns more than this campaign
        campaign_sql.set_runs(connection, campaign.id, runs)
        if probe and Outcome.ACCEPTED in outcomes:
            return None, campaign_sql.release(connection, campaign.id)
        if hold is None:
            return None, False
        campaign_sql.hold(connection, campaign.id, hold, probe_at=now + probe_after, now=now)
        if hold.kind is HoldKind.REJECTIONS:
            refused = [one.answer for one in settlements if one.answer.outcome is Outcome.REJECTED]
            mine = [one.claim.lead_id for one in refused if (one.http_status or 0) >= _REFUSED_FROM]
            before = row.rejected_run if row.rejected_run < REJECTION_RUN else None  # then they were taken back before
            Leads._take_back_rejected(connection, campaign.id, mine, before=before, now=now)
        return (hold if row.state == CampaignState.ACTIVE else None), False

    @staticmethod
    def _take_back_rejected(
        connection: sa.Connection, campaign_id: str, mine: Sequence[uuid.UUID], *, before: int | None, now: datetime
    ) -> None:
        """Queue again what was rejected in the run that held the campaign: the schema may be at fault, not the leads.

        These are the leads of this record, those of the *before* rejections in front of it, and what was refused at the
        same time as the first of them: an acceptance that was still out then may have been recorded in between. A
        second rejection of a lead is its own, so that leads that are bad indeed come to an end. Only a status of 400 or
        more proves that Futwork did not take the lead; a 2xx whose body says no does not, and is never sent again.
        """
        # Another dispatcher's attempts may be younger than ours and its record older, so ours are named.
        rejected = (
            sa.select(attempts.c.id, attempts.c.lead_id, attempts.c.started_at)
            .join(leads, leads.c.id == attempts.c.lead_id)
            .where(
                attempts.c.outcome == Outcome.REJECTED,
                attempts.c.http_status >= _REFUSED_FROM,
                leads.c.campaign_id == campaign_id,
            )
            .order_by(attempts.c.id.desc())  # back from the latest
        )
        ids = list(mine)
        if before is not None:
            run = connection.execute(rejected.limit(before + len(mine))).all()
            ids += [row.lead_id for row in run]
            if run:
                since = min(row.started_at for row in run) - _OUT_TOGETHER
                # Times have no index; what was out together was also recorded together, or nearly so.
                nearby = min(row.id for row in run) - _RECORDED_TOGETHER
                together = rejected.where(attempts.c.started_at >= since, attempts.c.id >= nearby).limit(_PORTION)
                ids += [row.lead_id for row in connection.execute(together)]
        earlier = attempts.alias("earlier")
        times = (
            sa.select(sa.func.count())
            .where(earlier.c.lead_id == leads.c.id, earlier.c.outcome == Outcome.REJECTED)
            .scalar_subquery()
        )
        chosen = sa.select(leads.c.id).where(leads.c.id.in_(ids), leads.c.state == LeadState.REJECTED, times == 1)
        locked = connection.scalars(chosen.order_by(leads.c.id).with_for_update(skip_locked=True, key_share=True)).all()
        connection.execute(
            sa.update(leads)
            .where(leads.c.id.in_(locked))
            .values(
                state=LeadState.QUEUED,
                due_at=now,
                changed_at=now,
                reason=sa.func.coalesce(leads.c.reason, "")
                + "; tried again, for a run of rejections held the campaign",
            )
        )

    # upkeep

    def settle_lost_claims(self, *, now: datetime, limit: int = 1000) -> int:
        """Turn claims whose time is over into uncertain leads: a worker died with the request possibly out.

        The token stays on the lead, so that the worker's own answer, should it come after all, still settles it. Hence
        a claim that seems to have been made in the future, before the clock went back, is not waited for either.
        """
        lost = (
            sa.select(leads.c.id)
            .where(
                _is(LeadState.SENDING),
                (leads.c.claim_expires_at <= now)
                | ((leads.c.claim_expires_at > now + CLOCKS_APART) & (leads.c.changed_at > now + CLOCKS_APART)),
            )
            .order_by(leads.c.claim_expires_at)  # of the index; whoever skips locked rows waits for nobody
            .limit(limit)
            .with_for_update(skip_locked=True, key_share=True)
        )
        with self._db.write() as connection:
            ids = connection.scalars(lost).all()
            if not ids:
                return 0
            connection.execute(
                sa.update(leads)
                .where(leads.c.id.in_(ids))
                .values(
                    state=LeadState.UNCERTAIN,
                    claim_expires_at=None,
                    attempts=leads.c.attempts + 1,
                    changed_at=now,
                    reason="its dispatcher stopped before the outcome was recorded; the request may have been out",
                )
            )
        log.warning("claims were lost: their leads are uncertain now", leads=ids)
        return len(ids)

    def take_back_the_future(self, *, now: datetime) -> int:
        """Let leads that wait since a time that has not come yet wait from now on: the clock went back since.

        Each that is queued waits as long as it was told to, and each that is uncertain for its policy. Without this
        they would wait until the clock has caught up.
        """
        future = now + CLOCKS_APART
        odd = (_is(LeadState.QUEUED), leads.c.due_at > future, leads.c.changed_at > future)
        with self._db.read() as connection:
            found = sa.select(campaigns.c.id).where(sa.exists().where(leads.c.campaign_id == campaigns.c.id, *odd))
            stuck = connection.scalars(found.order_by(campaigns.c.id)).all()
        moved = 0
        for campaign_id in stuck:
            portion = sa.select(leads.c.id, leads.c.due_at, leads.c.changed_at)
            portion = portion.where(leads.c.campaign_id == campaign_id, *odd).order_by(leads.c.id).limit(_PORTION)
            while True:
                with self._db.write() as connection:
                    rows = connection.execute(portion.with_for_update(skip_locked=True, key_share=True)).all()
                    for wait in {row.due_at - row.changed_at for row in rows}:
                        ids = [row.id for row in rows if row.due_at - row.changed_at == wait]
                        connection.execute(
                            sa.update(leads).where(leads.c.id.in_(ids)).values(due_at=now + wait, changed_at=now)
                        )
                moved += len(rows)
                if len(rows) < _PORTION:
                    break
        return moved + self._take_back_uncertain(future, now)

    def _take_back_uncertain(self, future: datetime, now: datetime) -> int:
        odd = (_is(LeadState.UNCERTAIN), leads.c.changed_at > future)
        portion = sa.select(leads.c.id).where(*odd).order_by(leads.c.id).limit(_PORTION)
        moved, found = 0, _PORTION
        while found == _PORTION:
            with self._db.write() as connection:
                ids = connection.scalars(portion.with_for_update(skip_locked=True, key_share=True)).all()
                connection.execute(sa.update(leads).where(leads.c.id.in_(ids)).values(changed_at=now))
            found = len(ids)
            moved += found
        return moved

    def expire(self, *, now: datetime) -> int:
        """Take out queued leads that grew too old to be sent."""
        old = (_is(LeadState.QUEUED), leads.c.expires_at <= now)
        reason = "older than the campaign allows"
        return self._change(old, leads.c.expires_at, state=LeadState.EXPIRED, changed_at=now, reason=reason)

    def settle_old_uncertain(
        self,
        *,
        default_policy: str,
        default_after: timedelta,
        default_max_attempts: int,
        unread: Sequence[Unread] = (),
        now: datetime,
    ) -> dict[str, int]:
        """Apply each campaign's `on_uncertain` to leads that stayed uncertain without evidence for long enough.

        `resend` sends a lead while it has attempts left; one that has none is exhausted, and counts as dropped. A lead
        waits, and its reason says so, while a call without a lead or one of *unread* may be about it.
        """
        evidence = Evidence(self._db)
        may_exist, given = evidence.may_exist(), evidence.parameter(unread)
        policy = sa.func.coalesce(campaigns.c.on_uncertain, default_policy)
        with self._db.read() as connection:
            found = connection.execute(
                sa.select(campaigns, policy.label("policy")).where(
                    policy != "hold",
                    sa.exists().where(leads.c.campaign_id == campaigns.c.id, _is(LeadState.UNCERTAIN)),
                )
            ).all()
        changed, since = {"resend": 0, "drop": 0}, leads.c.changed_at
        for row in found:
            seconds = row.uncertain_after_seconds
            after = default_after if seconds is None else timedelta(seconds=seconds)
            overdue = (
                leads.c.campaign_id == row.id,
                _is(LeadState.UNCERTAIN),
                leads.c.changed_at <= now - after,
            )
            self._say_what_they_wait_for((*overdue, may_exist), given)
            old = (*overdue, sa.not_(may_exist))
            why = {"changed_at": now, "reason": f"uncertain for longer than {after}; on_uncertain={row.policy}"}
            if row.policy == "drop":
                changed["drop"] += self._change(old, since, given, state=LeadState.CANCELLED, **why)
                continue
            spent = leads.c.attempts >= (row.max_attempts or default_max_attempts)
            changed["drop"] += self._change((*old, spent), since, given, state=LeadState.EXHAUSTED, **why)
            changed["resend"] += self._change(old, since, given, state=LeadState.QUEUED, due_at=now, **why)
        return changed

    def _say_what_they_wait_for(self, where: Sequence[Any], given: Mapping[str, object]) -> None:
        """Give the leads that match the reason why no policy decides about them."""
        other = sa.or_(leads.c.reason.is_(None), leads.c.reason != _WAITS_FOR_EVIDENCE)
        with self._db.write() as connection:
            mine = sa.select(leads.c.id).where(*where, other).order_by(leads.c.id).limit(_PORTION)
            ids = connection.scalars(mine.with_for_update(key_share=True), given).all()
            if ids:
                connection.execute(sa.update(leads).where(leads.c.id.in_(ids)).values(reason=_WAITS_FOR_EVIDENCE))

    def _change(
        self, where: Sequence[Any], oldest: sa.Column[Any], given: Mapping[str, object] | None = None, **values: object
    ) -> int:
        """Change the leads that match, by the time in the column *oldest*; one transaction a portion.

        A portion is chosen in the order of its index, so that a million leads are not sorted for each, and then locked
        in the order of ids, as a record and a merge do.
        """
        portion = sa.select(leads.c.id).where(*where).order_by(oldest).limit(_PORTION)
        changed = 0
        while True:
            with self._db.write() as connection:
                found = connection.scalars(portion, given).all()
                mine = sa.select(leads.c.id).where(leads.c.id.in_(found), *where).order_by(leads.c.id)
                ids = connection.scalars(mine.with_for_update(key_share=True), given).all()
                connection.execute(sa.update(leads).where(leads.c.id.in_(ids)).values(**values))
            if ids:
                log.info("leads settled by time", state=values["state"], reason=values["reason"], leads=ids)
            changed += len(ids)
            if len(found) < _PORTION:
                return changed


def _is(state: LeadState) -> sa.ColumnElement[bool]:
    """A condition with the state written out: a plan that leaves it open cannot keep to the partial indexes."""
    return leads.c.state == _literal(state)


def _literal(state: LeadState) -> sa.ColumnClause[str]:
    return sa.literal_column(f"'{state.value}'", sa.String())


def _settling(given: Any) -> sa.Update:
    """The update that settles the leads of *given* that still show their claim."""
    return (
        sa.update(leads)
        .where(
            leads.c.id == given.c.id,
            leads.c.claim == given.c.claim,
            leads.c.state.in_([LeadState.SENDING, LeadState.UNCERTAIN]),
        )
        .values(
            state=given.c.state,
            attempts=given.c.attempts,
            due_at=given.c.due_at,
            claim_expires_at=None,
            submitted_at=sa.func.coalesce(given.c.submitted_at, leads.c.submitted_at),
            futwork_lead_id=sa.func.coalesce(given.c.futwork_lead_id, leads.c.futwork_lead_id),
            reason=given.c.reason,
            changed_at=sa.bindparam("now", type_=UtcDateTime()),
        )
    )


def _recorded(one: Settlement, now: datetime) -> dict[str, object]:
    answer = one.answer
    claim = answer.claim
    accepted = one.state is LeadState.SUBMITTED
    return {
        "id": claim.lead_id.hex,  # as SQLite stores it and PostgreSQL reads it
        "claim": claim.token.hex,
        "state": one.state.value,
        "attempts": one.attempts,
        "due_at": one.due_at,
        "submitted_at": now if accepted else None,
        "futwork_lead_id": answer.futwork_lead_id,
        "reason": None if accepted else f"{answer.outcome.value}: {answer.excerpt}",
        "started_at": answer.started_at,
        "duration_ms": round(answer.duration.total_seconds() * 1000),
        "outcome": answer.outcome.value,
        "http_status": answer.http_status,
        "excerpt": answer.excerpt,
    }
