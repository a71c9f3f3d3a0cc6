"""A post-call event becomes a call: parsing, merging, enrichment.

1. `read_event` turns a request body into an `Event`, or says in one line why it can't.
2. `merge` folds all events of one call into one payload; the order in which they came does not matter.
3. `describe` reads that payload into a `Call`: what happened, who spoke, what comes next.

Pure throughout: no I/O, no clock. Whatever JSON Futwork sends, the only exception is `UnreadableEvent`.
"""

from pipeline.domain.call.describe import Call, describe
from pipeline.domain.call.disposition import normalise_disposition
from pipeline.domain.call.event import Event, UnreadableEvent, names_in, read_event, reference
from pipeline.domain.call.merge import merge
from pipeline.domain.call.outcome import decide_outcome
from pipeline.domain.call.status import CALL_STATUSES, CallOutcome, CallStatus, normalise_status, standing
from pipeline.domain.call.transcript import Utterance, read_transcript

__all__ = [
    "CALL_STATUSES",
    "Call",
    "CallOutcome",
    "CallStatus",
    "Event",
    "UnreadableEvent",
    "Utterance",
    "decide_outcome",
    "describe",
    "merge",
    "names_in",
    "normalise_disposition",
    "normalise_status",
    "read_event",
    "read_transcript",
    "reference",
    "standing",
]
