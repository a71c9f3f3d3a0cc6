"""The broker: what a producer or the webhook was told is accepted is in it, or on disk.

`messages` says what travels, `publisher` publishes it with bounded waits, `group_commit` lets many web threads share
one publish, `spool` keeps events on local disk while the broker is away, `gate` chooses between the two, and
`redis_transport` is Celery's way to Redis and Valkey. The names below are those that producers need too; the others are
imported from their modules.
"""

from pipeline.broker.group_commit import GroupCommit
from pipeline.broker.messages import (
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
from pipeline.broker.publisher import QUEUES, ROUTES, VISIBILITY_SECONDS, Broker, BrokerUnavailable, celery_app

__all__ = [
    "EVENTS_A_MESSAGE",
    "MESSAGE_BYTES",
    "MESSAGE_VERSION",
    "QUEUES",
    "ROUTES",
    "VISIBILITY_SECONDS",
    "Broker",
    "BrokerUnavailable",
    "GroupCommit",
    "Kind",
    "WebEvent",
    "celery_app",
    "decode_events",
    "encode_events",
    "kind_of",
    "lead_batch",
    "refused",
]
