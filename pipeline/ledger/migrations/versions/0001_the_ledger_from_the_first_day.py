"""The ledger from the first day."""

import sqlalchemy as sa
from alembic import op

from pipeline.ledger.database import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table."""
    op.create_table(
        "call_events",
        sa.Column("digest", sa.String(length=64), nullable=False, comment="SHA-256 of the body"),
        sa.Column("call_sid", sa.String(length=200), nullable=True),
        sa.Column("state", sa.String(length=12), nullable=False, comment="pending, merged or quarantined"),
        sa.Column("received_at", UtcDateTime, nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("state IN ('pending', 'merged', 'quarantined')", name=op.f("ck_call_events_state_known")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_call_events")),
    )
    with op.batch_alter_table("call_events", schema=None) as batch_op:
        batch_op.create_index(op.f("ix_call_events_call_sid"), ["call_sid"], unique=False)
        batch_op.create_index(
            "ix_call_events_unmerged",
            ["state", "received_at"],
            unique=False,
            postgresql_where=sa.text("state <> 'merged'"),
            sqlite_where=sa.text("state <> 'merged'"),
        )

    op.create_table(
        "campaigns",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("account", sa.String(length=40), server_default="default", nullable=False),
        sa.Column("state", sa.String(length=10), server_default="active", nullable=False),
        sa.Column("hold_kind", sa.String(length=20), nullable=True),
        sa.Column("hold_reason", sa.Text(), nullable=True),
        sa.Column("stopped_at", UtcDateTime, nullable=True, comment="when it was held or paused"),
        sa.Column("probe_at", UtcDateTime, nullable=True, comment="when a held campaign may try one lead"),
        sa.Column("probes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("troubled_run", sa.Integer(), server_default="0", nullable=False),
        sa.Column("rejected_run", sa.Integer(), server_default="0", nullable=False),
        sa.Column("rate", sa.String(length=20), nullable=True, comment="null: CAMPAIGN_RATE"),
        sa.Column("on_uncertain", sa.String(length=10), nullable=True, comment="null: ON_UNCERTAIN"),
        sa.Column("uncertain_after_seconds", sa.Float(), nullable=True, comment="null: UNCERTAIN_AFTER_SECONDS"),
        sa.Column("max_attempts", sa.Integer(), nullable=True, comment="null: MAX_ATTEMPTS"),
        sa.Column("lead_max_age_seconds", sa.Integer(), nullable=True, comment="null: LEAD_MAX_AGE_SECONDS"),
        sa.Column("created_at", UtcDateTime, nullable=False),
        sa.CheckConstraint("(state = 'held') = (hold_kind IS NOT NULL)", name=op.f("ck_campaigns_held_has_a_kind")),
        sa.CheckConstraint("on_uncertain IN ('hold', 'resend', 'drop')", name=op.f("ck_campaigns_on_uncertain_known")),
        sa.CheckConstraint("state IN ('active', 'paused', 'held')", name=op.f("ck_campaigns_state_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaigns")),
    )
    op.create_table(
        "quarantine",
        sa.Column(
            "digest",
            sa.String(length=64),
            nullable=False,
            comment="SHA-256 of kind and body, so that a repeat is one row",
        ),
        sa.Column("kind", sa.String(length=20), nullable=False, comment="event, lead, batch or message"),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("received_at", UtcDateTime, nullable=False),
        sa.Column("released_at", UtcDateTime, nullable=True, comment="when a replay read it after all"),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_quarantine")),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("campaign_id", sa.String(length=64), nullable=False),
        sa.Column("received_at", UtcDateTime, nullable=False),
        sa.Column("leads", sa.Integer(), nullable=False, comment="valid leads in the batch"),
        sa.Column("accepted", sa.Integer(), nullable=False, comment="of them, how many were new to the ledger"),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_batches_campaign_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_table(
        "leads",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("campaign_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("phone", sa.String(length=20), nullable=False, comment="E.164"),
        sa.Column("data", sa.Text(), nullable=False, comment="recipientData as JSON text, as Futwork gets it"),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True, comment="why it is in this state, for a person"),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("due_at", UtcDateTime, nullable=False),
        sa.Column("expires_at", UtcDateTime, nullable=False),
        sa.Column("claim", sa.Uuid(), nullable=True, comment="the last claim's token; the record must show the same"),
        sa.Column("claim_expires_at", UtcDateTime, nullable=True),
        sa.Column("futwork_lead_id", sa.String(length=64), nullable=True),
        sa.Column("batch_id", sa.Uuid(), nullable=False),
        sa.Column("accepted_at", UtcDateTime, nullable=False),
        sa.Column("submitted_at", UtcDateTime, nullable=True),
        sa.Column("called_at", UtcDateTime, nullable=True),
        sa.Column("changed_at", UtcDateTime, nullable=False),
        sa.CheckConstraint(
            "(state = 'sending') = (claim_expires_at IS NOT NULL)", name=op.f("ck_leads_sending_has_a_claim")
        ),
        sa.CheckConstraint("state <> 'called' OR called_at IS NOT NULL", name=op.f("ck_leads_called_has_a_time")),
        sa.CheckConstraint("state <> 'sending' OR claim IS NOT NULL", name=op.f("ck_leads_sending_has_a_token")),
        sa.CheckConstraint(
            "state <> 'submitted' OR submitted_at IS NOT NULL", name=op.f("ck_leads_submitted_has_a_time")
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'sending', 'submitted', 'called', 'uncertain', 'rejected', 'exhausted', 'expired', 'cancelled', 'suppressed')",
            name=op.f("ck_leads_state_known"),
        ),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_leads_campaign_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leads")),
        postgresql_with={"fillfactor": 80},
    )
    with op.batch_alter_table("leads", schema=None) as batch_op:
        batch_op.create_index(
            "ix_leads_claimed",
            ["claim_expires_at"],
            unique=False,
            postgresql_where=sa.text("state = 'sending'"),
            sqlite_where=sa.text("state = 'sending'"),
        )
        batch_op.create_index(
            "ix_leads_due",
            ["campaign_id", "due_at"],
            unique=False,
            postgresql_where=sa.text("state = 'queued'"),
            sqlite_where=sa.text("state = 'queued'"),
        )
        batch_op.create_index(
            "ix_leads_expiring",
            ["expires_at"],
            unique=False,
            postgresql_where=sa.text("state = 'queued'"),
            sqlite_where=sa.text("state = 'queued'"),
        )
        batch_op.create_index(
            "ix_leads_futwork_lead_id",
            ["futwork_lead_id"],
            unique=False,
            postgresql_where=sa.text("futwork_lead_id IS NOT NULL"),
            sqlite_where=sa.text("futwork_lead_id IS NOT NULL"),
        )
        batch_op.create_index("ix_leads_phone", ["phone", "campaign_id"], unique=False)
        batch_op.create_index(
            "ix_leads_uncertain",
            ["campaign_id", "changed_at"],
            unique=False,
            postgresql_where=sa.text("state = 'uncertain'"),
            sqlite_where=sa.text("state = 'uncertain'"),
        )

    op.create_table(
        "attempts",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("lead_id", sa.Uuid(), nullable=False),
        sa.Column("claim", sa.Uuid(), nullable=False),
        sa.Column("started_at", UtcDateTime, nullable=False),
        sa.Column("duration_ms", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.String(length=20), nullable=False),
        sa.Column("http_status", sa.Integer(), nullable=True),
        sa.Column("excerpt", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('accepted', 'rejected', 'not_sent', 'throttled', 'busy', 'failed', 'uncertain', 'refused_key', 'refused_campaign')",
            name=op.f("ck_attempts_outcome_known"),
        ),
        sa.ForeignKeyConstraint(["lead_id"], ["leads.id"], name=op.f("fk_attempts_lead_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("lead_id", "claim", name=op.f("uq_attempts_lead_id_claim")),
    )

    op.create_table(
        "calls",
        sa.Column("call_sid", sa.String(length=200), nullable=False),
        sa.Column("lead_id", sa.Uuid(), nullable=True),
        sa.Column(
            "linked_by", sa.String(length=20), nullable=True, comment="reference, futwork_lead_id, phone or operator"
        ),
        sa.Column("campaign_id", sa.String(length=64), nullable=True),
        sa.Column("futwork_lead_id", sa.String(length=64), nullable=True),
        sa.Column("reference", sa.String(length=64), nullable=True),
        sa.Column("phone", sa.String(length=20), nullable=True),
        sa.Column("status", sa.String(length=40), nullable=False),
        sa.Column("is_final", sa.Boolean(), nullable=False),
        sa.Column("outcome", sa.String(length=20), nullable=False),
        sa.Column("disposition", sa.String(length=100), nullable=True),
        sa.Column("duration_seconds", sa.Float(), nullable=True),
        sa.Column("callback_at", UtcDateTime, nullable=True),
        sa.Column("recording_url", sa.Text(), nullable=True),
        sa.Column(
            "details", sa.Text(), nullable=False, comment="the enriched call as JSON: turns, word counts, summary"
        ),
        sa.Column("first_event_at", UtcDateTime, nullable=False),
        sa.Column("last_event_at", UtcDateTime, nullable=False),
        sa.ForeignKeyConstraint(["lead_id"], ["leads.id"], name=op.f("fk_calls_lead_id")),
        sa.PrimaryKeyConstraint("call_sid", name=op.f("pk_calls")),
    )
    with op.batch_alter_table("calls", schema=None) as batch_op:
        batch_op.create_index(op.f("ix_calls_lead_id"), ["lead_id"], unique=False)
        batch_op.create_index(
            "ix_calls_orphans",
            ["last_event_at"],
            unique=False,
            postgresql_where=sa.text("lead_id IS NULL"),
            sqlite_where=sa.text("lead_id IS NULL"),
        )
