"""Durable hand-off to the broker: what a producer or the webhook was told is accepted is in the broker, or on disk.

`messages` says what travels, `broker` publishes it with bounded waits, `group` lets many web threads share one publish,
`spool` keeps events on local disk while the broker is away, and `gate` chooses between the two.
"""

from pipeline.handoff.broker import QUEUES, ROUTES, VISIBILITY_SECONDS, Broker, BrokerUnavailable, celery_app
from pipeline.handoff.gate import EventGate
from pipeline.handoff.group import GroupCommit
from pipeline.handoff.messages import (
    EVENTS_A_MESSAGE,
    MESSAGE_BYTES,
    MESSAGE_VERSION,
    Kind,
    WebEvent,
    decode_events,
    encode_events,
    kind_of,
    lead_batch,
    refused,
)
from pipeline.handoff.spool import Spool, SpoolFull, drain_spool

__all__ = [
    "EVENTS_A_MESSAGE",
    "MESSAGE_BYTES",
    "MESSAGE_VERSION",
    "QUEUES",
    "ROUTES",
    "VISIBILITY_SECONDS",
    "Broker",
    "BrokerUnavailable",
    "EventGate",
    "GroupCommit",
    "Kind",
    "Spool",
    "SpoolFull",
    "WebEvent",
    "celery_app",
    "decode_events",
    "drain_spool",
    "encode_events",
    "kind_of",
    "lead_batch",
    "refused",
]
