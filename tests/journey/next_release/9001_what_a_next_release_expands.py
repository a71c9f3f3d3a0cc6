"""What a next release adds: a column, a table and indexes, none of which the release before it needs to know."""

import sqlalchemy as sa
from alembic import op

revision = "9001"
down_revision = "HEAD"


def upgrade() -> None:
    """Expand. The index on a large table is built while everybody writes, in no transaction."""
    op.add_column("leads", sa.Column("favourite_colour", sa.Text(), nullable=True))
    op.add_column("campaigns", sa.Column("weight", sa.Integer(), nullable=False, server_default="1"))
    op.create_table("palettes", sa.Column("name", sa.String(40), primary_key=True))
    if op.get_bind().dialect.name == "postgresql":
        with op.get_context().autocommit_block():
            op.create_index("ix_leads_colour", "leads", ["favourite_colour"], postgresql_concurrently=True)
    else:
        op.create_index("ix_leads_colour", "leads", ["favourite_colour"])
