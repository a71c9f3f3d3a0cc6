"""The ledger's tables, with the rules that the database itself holds.

The migrations in `pipeline/migrations` build the same; a test compares the two.
"""

from __future__ import annotations

import sqlalchemy as sa

from pipeline.domain.campaign import CampaignState
from pipeline.domain.lead import LeadState, Outcome
from pipeline.ledger.database import UtcDateTime

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # only INTEGER counts up by itself on SQLite


def _one_of(column: str, values: type[LeadState | CampaignState | Outcome]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value.value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


_UNCLEAR = sa.text("outcome IN ('busy', 'failed', 'uncertain')")
"""Of attempts: those after which Futwork may have the lead, as far as the answer goes."""

campaigns = sa.Table(
    "campaigns",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("account", sa.String(40), nullable=False, server_default="default"),
    sa.Column("state", sa.String(10), nullable=False, server_default="active"),
    sa.Column("hold_kind", sa.String(20)),
    sa.Column("hold_reason", sa.Text),
    sa.Column("stopped_at", UtcDateTime, comment="when it was held or paused"),
    sa.Column("probe_at", UtcDateTime, comment="when a held campaign may try one lead"),
    sa.Column("probes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("troubled_run", sa.Integer, nullable=False, server_default="0"),
    sa.Column("rejected_run", sa.Integer, nullable=False, server_default="0"),
    sa.Column("rate", sa.String(20), comment="null: CAMPAIGN_RATE"),
    sa.Column("on_uncertain", sa.String(10), comment="null: ON_UNCERTAIN"),
    sa.Column("uncertain_after_seconds", sa.Float, comment="null: UNCERTAIN_AFTER_SECONDS"),
    sa.Column("on_server_error", sa.String(10), comment="null: ON_SERVER_ERROR"),
    sa.Column("max_attempts", sa.Integer, comment="null: MAX_ATTEMPTS"),
    sa.Column("lead_max_age_seconds", sa.Integer, comment="null: LEAD_MAX_AGE_SECONDS"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    _one_of("state", CampaignState),
    sa.CheckConstraint("(state = 'held') = (hold_kind IS NOT NULL)", name="held_has_a_kind"),
    sa.CheckConstraint("on_uncertain IN ('hold', 'resend', 'drop')", name="on_uncertain_known"),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("campaign_id", sa.ForeignKey("campaigns.id"), nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
    sa.Column("leads", sa.Integer, nullable=False, comment="valid leads in the batch"),
    sa.Column("accepted", sa.Integer, nullable=False, comment="of them, how many were new to the ledger"),
)
"""What intake took in: one row a batch, written with its leads, so that accepted can be counted without them."""

leads = sa.Table(
    "leads",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("campaign_id", sa.ForeignKey("campaigns.id"), nullable=False),
    sa.Column("key", sa.String(200), nullable=False),
    sa.Column("phone", sa.String(20), nullable=False, comment="E.164"),
    sa.Column("data", sa.Text, nullable=False, comment="recipientData as JSON text, as Futwork gets it"),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("reason", sa.Text, comment="why it is in this state, for a person"),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("due_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False),
    sa.Column("claim", sa.Uuid, comment="the last claim's token; the record must show the same"),
    sa.Column("claim_expires_at", UtcDateTime),
    sa.Column("futwork_lead_id", sa.String(64)),
    sa.Column("batch_id", sa.Uuid, nullable=False),
    sa.Column("accepted_at", UtcDateTime, nullable=False),
    sa.Column("submitted_at", UtcDateTime),
    sa.Column("called_at", UtcDateTime),
    sa.Column("changed_at", UtcDateTime, nullable=False),
    sa.Column("traceparent", sa.String(55), comment="W3C trace context of the request that handed it in, if traced"),
    _one_of("state", LeadState),
    sa.CheckConstraint("(state = 'sending') = (claim_expires_at IS NOT NULL)", name="sending_has_a_claim"),
    sa.CheckConstraint("state <> 'sending' OR claim IS NOT NULL", name="sending_has_a_token"),
    sa.CheckConstraint("state <> 'submitted' OR submitted_at IS NOT NULL", name="submitted_has_a_time"),
    sa.CheckConstraint("state <> 'called' OR called_at IS NOT NULL", name="called_has_a_time"),
    sa.Index(
        "ix_leads_due", "campaign_id", "due_at", postgresql_where=sa.text("state = 'queued'"),
        sqlite_where=sa.text("state = 'queued'"),
    ),
    sa.Index(
        "ix_leads_expiring", "expires_at", postgresql_where=sa.text("state = 'queued'"),
        sqlite_where=sa.text("state = 'queued'"),
    ),
    sa.Index(
        "ix_leads_claimed", "claim_expires_at", postgresql_where=sa.text("state = 'sending'"),
        sqlite_where=sa.text("state = 'sending'"),
    ),
    sa.Index(
        "ix_leads_uncertain", "campaign_id", "changed_at", postgresql_where=sa.text("state = 'uncertain'"),
        sqlite_where=sa.text("state = 'uncertain'"),
    ),
    sa.Index(
        "ix_leads_futwork_lead_id", "futwork_lead_id", postgresql_where=sa.text("futwork_lead_id IS NOT NULL"),
        sqlite_where=sa.text("futwork_lead_id IS NOT NULL"),
    ),
    sa.Index("ix_leads_phone", "phone", "campaign_id"),
    sa.Index("ix_leads_listed", "campaign_id", "state", "accepted_at", "id"),
    # Claimed and settled rows change often; room on each page keeps their new versions near the old ones.
    postgresql_with={"fillfactor": 80},
)  # fmt: skip

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("id", _BigId, primary_key=True, autoincrement=True),
    sa.Column("lead_id", sa.ForeignKey("leads.id"), nullable=False),
    sa.Column("claim", sa.Uuid, nullable=False),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("duration_ms", sa.Integer, nullable=False),
    sa.Column("outcome", sa.String(20), nullable=False),
    sa.Column("http_status", sa.Integer),
    sa.Column("excerpt", sa.Text, nullable=False),
    _one_of("outcome", Outcome),
    sa.UniqueConstraint("lead_id", "claim"),
    sa.Index("ix_attempts_unclear", "id", postgresql_where=_UNCLEAR, sqlite_where=_UNCLEAR),
)
"""One row a POST, also of one whose record came too late to change its lead."""

calls = sa.Table(
    "calls",
    metadata,
    sa.Column("call_sid", sa.String(200), primary_key=True),
    sa.Column("lead_id", sa.ForeignKey("leads.id"), index=True),
    sa.Column("linked_by", sa.String(20), comment="reference, futwork_lead_id, phone or operator"),
    sa.Column("campaign_id", sa.String(64)),
    sa.Column("futwork_lead_id", sa.String(64)),
    sa.Column("reference", sa.String(64)),
    sa.Column("phone", sa.String(20)),
    sa.Column("status", sa.String(40), nullable=False),
    sa.Column("is_final", sa.Boolean(create_constraint=False), nullable=False),
    sa.Column("outcome", sa.String(20), nullable=False),
    sa.Column("disposition", sa.String(100)),
    sa.Column("duration_seconds", sa.Float),
    sa.Column("callback_at", UtcDateTime),
    sa.Column("recording_url", sa.Text),
    sa.Column("details", sa.Text, nullable=False, comment="the enriched call as JSON: turns, word counts, summary"),
    sa.Column("first_event_at", UtcDateTime, nullable=False),
    sa.Column("last_event_at", UtcDateTime, nullable=False),
    sa.Index(
        "ix_calls_orphans", "last_event_at", postgresql_where=sa.text("lead_id IS NULL"),
        sqlite_where=sa.text("lead_id IS NULL"),
    ),
)  # fmt: skip

call_changes = sa.Table(
    "call_changes",
    metadata,
    sa.Column("call_sid", sa.String(200), primary_key=True),
    sa.Column("number", sa.BigInteger, index=True, comment="its place in the feed; null: not given yet"),
)
"""One row a call, marked by triggers at each change of it; `pipeline.ledger.feed` gives the numbers."""

feeds = sa.Table(
    "feeds",
    metadata,
    sa.Column("name", sa.String(20), primary_key=True),
    sa.Column("last", sa.BigInteger, nullable=False, comment="the highest number that was ever given"),
)

call_events = sa.Table(
    "call_events",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True, comment="SHA-256 of the body"),
    sa.Column("call_sid", sa.String(200), index=True),
    sa.Column("state", sa.String(12), nullable=False, comment="pending, merged or quarantined"),
    sa.Column("received_at", UtcDateTime, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.CheckConstraint("state IN ('pending', 'merged', 'quarantined')", name="state_known"),
    sa.Index(
        "ix_call_events_unmerged", "state", "received_at", postgresql_where=sa.text("state <> 'merged'"),
        sqlite_where=sa.text("state <> 'merged'"),
    ),
)  # fmt: skip
"""Every post-call event as it came, once; a call is what its events say (`pipeline.domain.call.merge`)."""

suppressions = sa.Table(
    "suppressions",
    metadata,
    sa.Column("phone", sa.String(20), primary_key=True, comment="E.164"),
    sa.Column("campaign_id", sa.String(64), primary_key=True, comment="empty: every campaign"),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False, comment="who or which file put it here"),
    sa.Column("since", UtcDateTime, nullable=False),
)
"""Numbers that must not be called; no foreign key, because a number may be listed before its campaign is."""

quarantine = sa.Table(
    "quarantine",
    metadata,
    sa.Column(
        "digest", sa.String(64), primary_key=True, comment="SHA-256 of kind and body, so that a repeat is one row"
    ),
    sa.Column("kind", sa.String(20), nullable=False, comment="event, lead, batch or message"),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
    sa.Column("released_at", UtcDateTime, comment="when a replay read it after all"),
    sa.Index(
        "ix_quarantine_waiting", "received_at", postgresql_where=sa.text("released_at IS NULL"),
        sqlite_where=sa.text("released_at IS NULL"),
    ),
)  # fmt: skip
"""What could not be read, whole, with the reason; `pipeline events replay` tries again after a fix."""

tallies = sa.Table(
    "tallies",
    metadata,
    sa.Column("minute", sa.Integer, primary_key=True, autoincrement=False, comment="since 1970; 0: since ever"),
    sa.Column("campaign_id", sa.String(64), primary_key=True, comment="empty: a call that names none"),
    sa.Column("name", sa.String(120), primary_key=True, comment="accepted, lead.STATE, call.OUTCOME, post.OUTCOME, …"),
    sa.Column("part", sa.BigInteger, primary_key=True, autoincrement=False, comment="0, or the transaction that adds"),
    sa.Column("n", sa.BigInteger, nullable=False),
)
"""Counts that triggers keep in the transactions that change what is counted; `pipeline.ledger.rollups` reads them."""

recounts = sa.Table(
    "recounts",
    metadata,
    sa.Column("at", UtcDateTime, primary_key=True),
    sa.Column("took_ms", sa.Integer, nullable=False),
    sa.Column("accepted", sa.BigInteger, nullable=False, comment="by the batches"),
    sa.Column("leads", sa.BigInteger, nullable=False, comment="by the leads, every one counted"),
    sa.Column("differences", sa.Text, nullable=False, comment="tallies that were wrong, and by how much, as JSON"),
)
"""One row each time the tallies were compared with what they count."""

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", _BigId, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("who", sa.String(80), nullable=False, comment="the name that signed in, or the system's user"),
    sa.Column("via", sa.String(10), nullable=False, comment="ops or cli"),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("campaign_id", sa.String(64)),
    sa.Column("lead_id", sa.Uuid),
    sa.Column("details", sa.Text, nullable=False, comment="as JSON: the filter, the policies, the reason"),
    sa.Column("changed", sa.Integer, comment="how many rows the action changed"),
    sa.Index("ix_audit_campaign_id", "campaign_id", "id"),
    sa.Index("ix_audit_lead_id", "lead_id", "id"),
)
"""What people did, each row written in the transaction of the change."""
