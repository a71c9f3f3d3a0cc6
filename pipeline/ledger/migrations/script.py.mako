"""${message}"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Expand: add what the new release needs, so that the previous one keeps working."""
    ${upgrades if upgrades else "pass"}
