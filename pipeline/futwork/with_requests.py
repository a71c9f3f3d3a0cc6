"""The engine that always works: `requests`, with a thread for each POST that is out.

It uses public interfaces only. So what they do not tell counts as the worse case: a POST is unsent only if the library
asked for no byte of its body, because without the body nobody knows whom to call. Whatever fails later is uncertain.

The library limits each wait for the network, but not their sum. So the engine has a clock of its own: a POST that does
not end in time is answered as far as it got, and a new thread replaces the one that still waits.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import math
import queue
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3 import exceptions as urllib3_errors

from pipeline.futwork.wire import BODY_BYTES, IDLE_SECONDS, TOO_OLD, Post, Reply, Stopwatch, taken

_GRACE_SECONDS = 0.1  # a thread whose library noticed the end of the time reports it within this time
_NO_BODY = frozenset({204, 205})
_FAILURES: dict[type[BaseException], str] = {  # the first that fits is reported
    urllib3_errors.NameResolutionError: "the host name could not be resolved",
    urllib3_errors.NewConnectionError: "the connection was refused or could not be made",
    urllib3_errors.ConnectTimeoutError: "no connection within the time allowed",
    ssl.SSLCertVerificationError: "the server's certificate could not be verified",
    ssl.SSLError: "TLS failed",
    TimeoutError: "no answer within the time allowed",
    urllib3_errors.ReadTimeoutError: "no answer within the time allowed",
    http.client.RemoteDisconnected: "the connection was closed without an answer",
    ConnectionResetError: "the connection was reset",
    BrokenPipeError: "the connection broke while sending",
    http.client.IncompleteRead: "the answer was cut short",
    http.client.HTTPException: "the answer was not HTTP",
    urllib3_errors.ProtocolError: "the answer was cut short",
}


class _Failure(Exception):
    """The POST ends here; the message says why, in the words of a reply."""


class RequestsEngine:
    """Sends POSTs over adapters of `requests` from *concurrency* threads."""

    def __init__(
        self, *, concurrency: int, connect_seconds: float, answer_seconds: float, ca_file: Path | None = None
    ) -> None:
        self.in_flight = 0
        self._concurrency = concurrency
        self._times = (connect_seconds, answer_seconds)
        self._verify: bool | str = str(ca_file) if ca_file else True
        self._out: list[_Exchange] = []
        self._waiting: queue.SimpleQueue[_Exchange | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        # Each adapter holds one connection, and when it was used. The adapter alone, without a session: no proxy, no
        # .netrc and no cookie joins a request, and no redirect is followed.
        self._adapters: queue.LifoQueue[tuple[HTTPAdapter, float]] = queue.LifoQueue()
        self._threads: list[threading.Thread] = []
        # Started now: a thread that can't be started when claims are here already would leave them without an answer.
        self._start_threads()

    def start(self, posts: Sequence[Post]) -> None:
        """Begin POSTs and return at once."""
        for post in posts:
            exchange = _Exchange(post, *self._times)
            self.in_flight += 1
            self._out.append(exchange)
            self._waiting.put(exchange)

    def receive(self, *, wait: float) -> list[Reply]:
        """The replies that are there, after waiting up to *wait* seconds for the first of them."""
        replies = taken(self._replies, self.in_flight, wait=min(wait, self._end_overdue()))
        self.in_flight -= len(replies)
        return replies

    def close(self) -> None:
        """Finish what was started, end the threads, close the connections."""
        while self._out:
            time.sleep(min(0.01, self._end_overdue()))
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        while not self._adapters.empty():
            self._adapters.get()[0].close()

    def _start_threads(self) -> None:
        while len(self._threads) < self._concurrency:
            thread = threading.Thread(target=self._serve, name="futwork-post", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _end_overdue(self) -> float:
        """Answer the POSTs whose time is over and replace their threads; return the seconds until the next one is."""
        now = time.monotonic()
        for exchange in self._out:
            if exchange.ends_by <= now and (reply := exchange.end("no answer within the time allowed")):
                self._threads.remove(exchange.thread)
                self._replies.put(reply)
        with contextlib.suppress(RuntimeError):  # no thread can be started now; the next call tries again
            self._start_threads()
        self._out = [exchange for exchange in self._out if not exchange.over]
        return max(0.0, min((exchange.ends_by for exchange in self._out), default=now) - now)

    def _serve(self) -> None:
        while (exchange := self._waiting.get()) is not None:
            time.sleep(max(0.0, exchange.post.at - time.monotonic()))
            exchange.begin()
            try:
                self._carry(exchange)
                failure = ""
            except _Failure as error:
                failure = str(error)
            except (requests.RequestException, urllib3_errors.HTTPError, OSError) as error:
                failure = explain_failure(error)
            except Exception as error:  # noqa: BLE001 - a bug here must not lose the claim: it is reported as what it is
                failure = f"unexpected {type(error).__name__}"
            if (reply := exchange.end(failure)) is None:
                return  # it took too long, and another thread has this one's place
            self._replies.put(reply)

    def _carry(self, exchange: _Exchange) -> None:
        """Send a POST and read its answer."""
        exchange.check_age()
        try:
            adapter, used_at = self._adapters.get_nowait()
        except queue.Empty:
            adapter, used_at = HTTPAdapter(pool_connections=1, pool_maxsize=1, max_retries=0), math.inf
        if time.monotonic() - used_at >= IDLE_SECONDS:
            adapter.close()  # its server may be closing the connection at this very moment
        try:
            request = requests.Request("POST", exchange.post.url, headers=dict(exchange.post.headers()), data=exchange)
            sending = adapter.send(request.prepare(), timeout=self._times, stream=True, verify=self._verify)
            with sending as response:
                exchange.read_answer(response)
        finally:
            self._adapters.put((adapter, time.monotonic()))


class _Exchange:
    """One POST: the body, as the library reads it to send it, and how far the POST got."""

    def __init__(self, post: Post, connect_seconds: float, answer_seconds: float) -> None:
        self.post = post
        self.over = False
        self.ends_by = math.inf
        """When the engine answers it, on the steady clock."""
        self._connect_time = timedelta(seconds=connect_seconds)
        self._longest = timedelta(seconds=connect_seconds + answer_seconds)
        self._body = io.BytesIO(post.body)
        self._touched = False
        self._status: int | None = None
        self._answer = bytearray()
        self._encoding = ""
        self._retry_after: str | None = None
        self._lock = threading.Lock()  # a POST that was answered as unsent must send nothing afterwards

    def begin(self) -> None:
        """The current thread carries it from now on."""
        self.thread = threading.current_thread()
        self._time = Stopwatch(self._longest)
        self.ends_by = time.monotonic() + self._longest.total_seconds() + _GRACE_SECONDS

    def check_age(self) -> None:
        """Refuse to go on if the claim may end while the POST is out."""
        if self._time.may_outlast(self.post.claim):
            raise _Failure(TOO_OLD)

    def __len__(self) -> int:
        return len(self.post.body)

    def __iter__(self) -> Iterator[bytes]:
        return self._body  # how `requests` recognises a body to be read

    def read(self, size: int) -> bytes:
        """The next part of the body. Nothing of it is given if it would leave too late."""
        with self._lock:
            if self.over:
                raise _Failure("the POST was given up")
            if not self._touched:
                if self._time.elapsed > self._connect_time:
                    raise _Failure("no connection within the time allowed")
                self.check_age()
                self._touched = True
        return self._body.read(size)

    def read_answer(self, response: requests.Response) -> None:
        """Read the answer, up to the bound of its body; leaving the response early closes its connection."""
        head = response.raw.headers
        if response.status_code < 200:
            raise _Failure(f"an interim answer ({response.status_code}), which this engine cannot pass over")
        self._retry_after = next(iter(head.getlist("Retry-After")[-1:]), None)
        self._encoding = head.get("Content-Encoding", "")
        self._status = response.status_code
        while len(self._answer) < BODY_BYTES:
            piece = response.raw.read1(BODY_BYTES, decode_content=False)  # one wait for the network at most
            self._answer += piece
            if not piece:
                break
        bounded = "Content-Length" in head or "Transfer-Encoding" in head or self._status in _NO_BODY
        if not bounded and not self._answer.rstrip().endswith((b"}", b"]")):
            # Of a head that breaks off, or is malformed, the library drops the rest without a word.
            raise _Failure("the answer was cut short")

    def end(self, failure: str) -> Reply | None:
        """How it ended, for the first that asks."""
        with self._lock:
            if self.over:
                return None
            self.over = True
        is_verdict = self._status is not None and not (failure and 200 <= self._status < 300)  # its rest may say no
        return Reply(
            self.post,
            self._time.started_at,
            self._time.elapsed,
            self._touched,
            status=self._status if is_verdict else None,
            body=bytes(self._answer),
            encoding=self._encoding,
            retry_after=self._retry_after,
            failure=failure,
        )


def explain_failure(error: BaseException) -> str:
    """A failure on the wire in a few words, without addresses or headers."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    fitting = (text for kind, text in _FAILURES.items() if any(isinstance(one, kind) for one in chain))
    return next(fitting, type(error).__name__)
