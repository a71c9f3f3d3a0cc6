"""A Celery task an event: an ORM upsert of the call, and a commit.

Shape: the SQLAlchemy ORM quick start (declarative classes, a session a unit of work, `Session.merge` for "insert or
update"), in a Celery task as the user guide writes one; late acknowledgement, because an event must not be lost, and
the prefetch limit raised as "Optimizing" advises for short tasks. The raw body is kept, as ours is.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from functools import cache

from celery import Celery
from sqlalchemy import JSON, DateTime, Engine, String, Text, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

app = Celery("peer", broker=os.environ["BROKER_URL"])
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=64,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)


class Base(DeclarativeBase):
    """The peer's tables."""


class PeerCall(Base):
    """One row a call, with the last event as it came."""

    __tablename__ = "peer_calls"
    call_sid: Mapped[str] = mapped_column(String(200), primary_key=True)
    lead_id: Mapped[str | None] = mapped_column(String(64), index=True)
    campaign_id: Mapped[str | None] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(40))
    disposition: Mapped[str | None] = mapped_column(String(200))
    duration: Mapped[str | None] = mapped_column(String(40))
    recording_url: Mapped[str | None] = mapped_column(Text)
    transcript: Mapped[str | None] = mapped_column(Text)
    raw: Mapped[dict] = mapped_column(JSON)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


@cache
def engine() -> Engine:
    """This process's engine, built after the fork."""
    return create_engine(os.environ["DATABASE_URL"])


@app.task
def handle_event(event: dict) -> None:
    """Keep one event."""
    telephony = event.get("telephonyData") or {}
    with Session(engine()) as session:
        session.merge(
            PeerCall(
                call_sid=event["callSid"],
                lead_id=event.get("leadId"),
                campaign_id=event.get("campaignId"),
                status=event["status"],
                disposition=event.get("disposition"),
                duration=str(telephony.get("duration")),
                recording_url=telephony.get("recordingUrl"),
                transcript=event.get("transcript"),
                raw=event,
                updated_at=datetime.now(UTC),
            )
        )
        session.commit()


if __name__ == "__main__":
    Base.metadata.create_all(engine())
    print("{}")
