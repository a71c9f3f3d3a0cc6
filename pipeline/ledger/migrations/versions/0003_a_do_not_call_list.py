"""A do-not-call list."""

import sqlalchemy as sa
from alembic import op

from pipeline.ledger.database import UtcDateTime

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the list; the release before this one works on without it."""
    op.create_table(
        "suppressions",
        sa.Column("phone", sa.String(length=20), nullable=False, comment="E.164"),
        sa.Column("campaign_id", sa.String(length=64), nullable=False, comment="empty: every campaign"),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False, comment="who or which file put it here"),
        sa.Column("since", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("phone", "campaign_id", name=op.f("pk_suppressions")),
    )
