"""What became of POSTs whose answer did not say whether Futwork took the lead, by their HTTP status.

A company chooses `ON_SERVER_ERROR` by these figures: a status whose POSTs turn out to have been taken must not be
tried again.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from pipeline.ledger.tables import attempts, calls, leads

_IS_UNCLEAR = sa.text("attempts.outcome IN ('busy', 'failed', 'uncertain')")  # as in the index
_LATEST = 10_000  # POSTs that are counted: the figures are of what Futwork does now


def unclear_answers(connection: sa.Connection, *, campaign: str | None = None) -> list[dict[str, Any]]:
    """For each status (null: no answer) the POSTs that had it, and how many of them were taken.

    `taken` are those after which a call came although the lead was not sent again; for those that were
    `sent_again` it is unknown. Only the latest 10,000 are counted.
    """
    given = sa.select(attempts.c.id, attempts.c.lead_id, attempts.c.http_status).where(_IS_UNCLEAR)
    if campaign is not None:
        given = given.join(leads, leads.c.id == attempts.c.lead_id).where(leads.c.campaign_id == campaign)
    tried = given.order_by(attempts.c.id.desc()).limit(_LATEST).subquery("tried")
    later = attempts.alias("later")
    again = sa.exists().where(later.c.lead_id == tried.c.lead_id, later.c.id > tried.c.id)
    called = sa.exists().where(calls.c.lead_id == tried.c.lead_id)
    each = sa.select(tried.c.http_status, again.label("again"), called.label("called")).subquery("each")
    found = connection.execute(
        sa.select(
            each.c.http_status,
            sa.func.count().label("posts"),
            sa.func.sum(sa.case((~each.c.again & each.c.called, 1), else_=0)).label("taken"),
            sa.func.sum(sa.case((each.c.again, 1), else_=0)).label("sent_again"),
        )
        .group_by(each.c.http_status)
        .order_by(each.c.http_status)
    )
    return [
        {"http_status": row.http_status, "posts": row.posts, "taken": int(row.taken), "sent_again": int(row.sent_again)}
        for row in found
    ]
