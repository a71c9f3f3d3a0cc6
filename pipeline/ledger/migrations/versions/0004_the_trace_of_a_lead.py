"""The trace of the request that handed a lead in, so that what happens to it later joins that trace."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column; no row is rewritten for it."""
    op.add_column(
        "leads",
        sa.Column(
            "traceparent", sa.String(55), comment="W3C trace context of the request that handed it in, if traced"
        ),
    )
