"""What a server error means for a campaign's leads, and the index that counts what it meant."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column and the index; on PostgreSQL the index is built while others write."""
    op.add_column("campaigns", sa.Column("on_server_error", sa.String(10), comment="null: ON_SERVER_ERROR"))
    where = sa.text("outcome IN ('busy', 'failed', 'uncertain')")
    if op.get_bind().dialect.name == "postgresql":
        with op.get_context().autocommit_block():
            op.create_index(
                "ix_attempts_unclear", "attempts", ["id"], postgresql_concurrently=True, postgresql_where=where
            )
    else:
        op.create_index("ix_attempts_unclear", "attempts", ["id"], sqlite_where=where)
