"""The engine that always works: `requests`, a thread for each POST that is out.

Exceptions of HTTP libraries do not say reliably whether a request left, so the connections here note it themselves, at
the moment of the first write. A POST has two times. Connecting (name lookup, every address, TLS) must be done within
the connect time, or nothing is sent; from the first byte on, the whole answer must be there within the answer time,
however it trickles in.
"""

from __future__ import annotations

import http.client
import io
import math
import queue
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from pipeline.futwork.wire import BODY_BYTES, IDLE_SECONDS, TOO_OLD, Post, Reply, taken

_PIECE_BYTES = 16 * 1024  # of a request; one TLS record, so that each write has one timeout


class _NotInTime(OSError):
    """The first byte is not sent any more; the message says why."""


class _Wire(threading.local):
    """This thread's POST: how far it got, and how long it may still take."""

    touched = False
    """Whether a byte of the request may have left."""
    connect_by = math.inf
    answer_by = math.inf
    answer_seconds = 0.0
    claim_ends = datetime.max.replace(tzinfo=UTC)

    def begin(self, connect_seconds: float, answer_seconds: float, claim_ends: datetime) -> None:
        """A POST begins: nothing has left."""
        self.touched = False
        self.connect_by = time.monotonic() + connect_seconds
        self.answer_seconds = answer_seconds
        self.claim_ends = claim_ends

    def before_write(self) -> float:
        """The seconds that this write may take. Raises before the first byte if it is too late for it to leave."""
        if not self.touched:
            if time.monotonic() > self.connect_by:
                raise _NotInTime("no connection within the time allowed")
            if datetime.now(UTC) + timedelta(seconds=self.answer_seconds) >= self.claim_ends:
                raise _NotInTime(TOO_OLD)
            self.answer_by = time.monotonic() + self.answer_seconds
            self.touched = True
        return self.seconds_left()

    def seconds_left(self) -> float:
        """The seconds until the whole answer must be there; raises when they are over."""
        left = self.answer_by - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer did not end in time")
        return left


_wire = _Wire()


class _TimedReader(io.RawIOBase):
    """The receiving side of a socket, which gives each read no more than what is left of the answer's time."""

    def __init__(self, sock: socket.socket) -> None:
        self.ended = False
        self._sock = sock
        self._inner = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_wire.seconds_left())
        count = self._inner.readinto(buffer)
        self.ended = count == 0
        return count

    def close(self) -> None:
        self._inner.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """An answer that is read against the clock, with a whole head and no interim answer (1xx) before it."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self._reader = _TimedReader(sock)
        self.fp = io.BufferedReader(self._reader)

    def begin(self) -> None:
        super().begin()
        while 100 < self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            # Left on the connection, the answer that follows would be taken for the next lead's.
            self.headers = None  # type: ignore[assignment]  # how http.client knows that it has to read on
            super().begin()
        if self._reader.ended:  # inside the head, where http.client takes the end for an empty line
            raise http.client.IncompleteRead(b"")
        self.will_close = self.will_close or self.status < 200


class _NotedHTTPConnection(HTTPConnection):
    """A connection that notes, before it writes, that bytes may leave."""

    response_class = _TimedResponse
    _used = -math.inf

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()  # what fails in here has sent nothing; nor does a TLS handshake carry any of the request
        view = memoryview(data)
        for start in range(0, len(view), _PIECE_BYTES):
            self.sock.settimeout(_wire.before_write())
            super().send(view[start : start + _PIECE_BYTES])

    def getresponse(self) -> Any:
        response = super().getresponse()
        self._used = time.monotonic()
        return response

    @property
    def is_connected(self) -> bool:
        """Whether the connection can be used again; one that idled may meet its server's closing it on the way."""
        return time.monotonic() - self._used < IDLE_SECONDS and super().is_connected


class _NotedHTTPSConnection(_NotedHTTPConnection, HTTPSConnection):
    """The same over TLS."""


class _NotedHTTPPool(HTTPConnectionPool):
    ConnectionCls = _NotedHTTPConnection


class _NotedHTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _NotedHTTPSConnection


class _NotingAdapter(HTTPAdapter):
    """requests' adapter with our connections, and with the library's own retries off."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _NotedHTTPPool, "https": _NotedHTTPSPool}


class RequestsEngine:
    """Sends POSTs over `requests`' adapter from *concurrency* threads, each over a kept-alive connection."""

    def __init__(
        self, *, concurrency: int, connect_seconds: float, answer_seconds: float, ca_file: Path | None = None
    ) -> None:
        self.in_flight = 0
        self._times = (connect_seconds, answer_seconds)
        self._verify: bool | str = str(ca_file) if ca_file else True
        # The adapter alone, without requests' session: no proxy, no .netrc and no cookie joins a request, and no body
        # of a redirect is read.
        self._adapter = _NotingAdapter(pool_connections=2, pool_maxsize=concurrency, max_retries=0)
        self._posts: queue.SimpleQueue[Post | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        # Started now: a thread that can't be started when claims are here already would leave them without an answer.
        self._threads = [
            threading.Thread(target=self._serve, name=f"futwork-{number}", daemon=True) for number in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, posts: Sequence[Post]) -> None:
        """Begin POSTs and return at once."""
        for post in posts:
            self.in_flight += 1
            self._posts.put(post)

    def receive(self, *, wait: float) -> list[Reply]:
        """The replies that are there, after waiting up to *wait* seconds for the first of them."""
        replies = taken(self._replies, self.in_flight, wait=wait)
        self.in_flight -= len(replies)
        return replies

    def close(self) -> None:
        """Finish what was started, end the threads, close the connections."""
        for _ in self._threads:
            self._posts.put(None)
        for thread in self._threads:
            thread.join()
        self._adapter.close()

    def _serve(self) -> None:
        while (post := self._posts.get()) is not None:
            time.sleep(max(0.0, post.at - time.monotonic()))
            self._replies.put(self._post_whatever_comes(post))

    def _post_whatever_comes(self, post: Post) -> Reply:
        started_at, clock = datetime.now(UTC), time.monotonic()
        _wire.begin(*self._times, post.claim.expires_at)
        try:
            return self._post(post, started_at, clock)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            why = explain_failure(error)
        except Exception as error:  # noqa: BLE001 - a bug here must not lose the claim: it is reported as what it is
            why = f"unexpected {type(error).__name__}"
        return Reply(post, started_at, _since(clock), _wire.touched, failure=why)

    def _post(self, post: Post, started_at: datetime, clock: float) -> Reply:
        request = requests.Request("POST", post.url, headers=dict(post.headers()), data=post.body)
        sending = self._adapter.send(request.prepare(), timeout=self._times, stream=True, verify=self._verify)
        with sending as response:
            status, body = response.status_code, bytearray()
            try:
                _read(response, body)
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError):
                if 200 <= status < 300:
                    raise  # the rest might have said no
        return Reply(
            post,
            started_at,
            _since(clock),
            touched=True,
            status=status,
            body=bytes(body),
            retry_after=response.headers.get("Retry-After"),
        )


def explain_failure(error: BaseException) -> str:
    """A failure on the wire in a few words, without addresses or headers."""
    seen = error
    for _ in range(10):  # wrapped in as many layers at most
        parts = (getattr(seen, "reason", None), *seen.args)
        inner = next((part for part in parts if isinstance(part, BaseException)), None)
        if inner is None:
            break
        seen = inner
    if isinstance(seen, _NotInTime):
        return str(seen)
    named = (_FAILURES[kind.__name__] for kind in type(seen).__mro__ if kind.__name__ in _FAILURES)
    return next(named, type(seen).__name__)


_FAILURES = {
    "NameResolutionError": "the host name could not be resolved",
    "ConnectTimeoutError": "no connection within the time allowed",
    "NewConnectionError": "the connection was refused or could not be made",
    "ReadTimeoutError": "no answer within the time allowed",
    "TimeoutError": "no answer within the time allowed",
    "RemoteDisconnected": "the connection was closed without an answer",
    "ConnectionResetError": "the connection was reset",
    "BrokenPipeError": "the connection broke while sending",
    "SSLCertVerificationError": "the server's certificate could not be verified",
    "SSLError": "TLS failed",
    "IncompleteRead": "the answer was cut short",
    "InvalidChunkLength": "the answer could not be read",
    "HTTPException": "the answer was not HTTP",
    "DecodeError": "the answer could not be read",
    "ProtocolError": "the answer was cut short",
}


def _read(response: requests.Response, body: bytearray) -> None:
    """Read the answer's body, up to its bound; what was read before a failure is in *body*."""
    for chunk in response.iter_content(8192):
        body += chunk
        if len(body) >= BODY_BYTES:
            return  # leaving the response closes the connection with the rest


def _since(clock: float) -> timedelta:
    return timedelta(seconds=time.monotonic() - clock)
