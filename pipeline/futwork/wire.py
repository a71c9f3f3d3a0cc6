"""What goes to the wire and what comes back from it, whichever engine carries it.

An engine promises three things: every POST that it is given comes back as exactly one `Reply`; a reply says whether any
byte of its request may have left this machine; and no POST takes longer than its connect and answer times together.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from pipeline.domain.lead import Claim

BODY_BYTES = 64 * 1024  # a verdict fits many times; a longer body is not read
IDLE_SECONDS = 4.0  # then a connection is not used again: servers close idle ones, Node's after 5 seconds
TOO_OLD = "the claim was too old to be sent safely"
"""Why nothing was sent: this process was stopped for so long that the claim might end while the POST is out."""


@dataclass(frozen=True, slots=True)
class Post:
    """One POST to be made."""

    claim: Claim
    url: str
    key: str
    body: bytes
    at: float = 0.0
    """When it may begin, on the steady clock; the POSTs of a process begin in the order in which they were given."""

    def headers(self) -> list[tuple[str, str]]:
        """The request's headers, without those that follow from the URL and the body."""
        return [
            ("x-api-key", self.key),
            ("Content-Type", "application/json"),
            ("Accept", "application/json"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "futwork-lead-pipeline"),
        ]

    def __repr__(self) -> str:
        return f"Post({self.claim.lead_id})"  # the key must show nowhere


class Stopwatch:
    """The time of one POST, which takes *longest* at most."""

    __slots__ = ("_began", "_longest", "started_at")

    def __init__(self, longest: timedelta) -> None:
        self.started_at = datetime.now(UTC)
        self._began = time.monotonic()
        self._longest = longest

    @property
    def elapsed(self) -> timedelta:
        """The time since the POST began."""
        return timedelta(seconds=time.monotonic() - self._began)

    def may_outlast(self, claim: Claim) -> bool:
        """Whether the claim may end before the POST does, by the clock that claims go by."""
        return datetime.now(UTC) + self._longest - self.elapsed >= claim.expires_at


@dataclass(frozen=True, slots=True)
class Reply:
    """How a POST ended: with a status, or with a failure."""

    post: Post
    started_at: datetime
    duration: timedelta
    touched: bool
    """Whether a byte of the request may have left."""
    status: int | None = None
    body: bytes = b""
    """As it came, up to its bound."""
    encoding: str = ""
    """Its `Content-Encoding`."""
    retry_after: str | None = None
    failure: str = ""
    """Why there is no status, in a few words, without addresses or headers."""


class Engine(Protocol):
    """Carries POSTs. `start` and `receive` are called by one thread."""

    in_flight: int

    def start(self, posts: Sequence[Post]) -> None:
        """Begin POSTs and return at once."""

    def receive(self, *, wait: float) -> list[Reply]:
        """The replies that are there, after waiting up to *wait* seconds for the first of them."""

    def close(self) -> None:
        """Finish what was started and end every thread; the replies can still be received."""


def taken(replies: queue.SimpleQueue[Reply], in_flight: int, *, wait: float) -> list[Reply]:
    """The replies in the queue, after waiting up to *wait* seconds for the first; at once where none can come."""
    found: list[Reply] = []
    try:
        if in_flight:
            found.append(replies.get(timeout=wait) if wait > 0 else replies.get_nowait())
        while len(found) < in_flight:
            found.append(replies.get_nowait())
    except queue.Empty:
        pass
    return found
