"""The fast engine: libcurl, all POSTs of a process on one thread, at a small part of the CPU time.

Two of libcurl's habits would break a promise, and are off:

- It sends a request *again*, silently, when a kept-alive connection dies before the answer's first byte. For a lead
  that is a second call to a person. To do it libcurl must rewind the body; it is given a body that cannot be rewound,
  so it ends with an error instead (`test_a_request_is_never_sent_again_on_a_new_connection`).
- It takes proxies and `.netrc` from its surroundings. A key goes only where it is sent.

Whether a byte of the request left is libcurl's own count, `CURLINFO_REQUEST_SIZE`.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import certifi
import pycurl
from pycurl import ACTIVESOCKET  # an older pycurl, which lacks it, fails here and not at a POST

from pipeline.futwork.wire import BODY_BYTES, IDLE_SECONDS, TOO_OLD, Post, Reply, Stopwatch, taken

_READ, _WRITE = select.POLLIN, select.POLLOUT  # of epoll they are the same
_WATCHED = {pycurl.POLL_IN: _READ, pycurl.POLL_OUT: _WRITE, pycurl.POLL_INOUT: _READ | _WRITE}
_BLANK = (b"\r\n", b"\n")
_STOP = 0  # what a write callback takes of a body past its bound, which ends the transfer

_FAILURES = {
    pycurl.E_COULDNT_RESOLVE_HOST: "the host name could not be resolved",
    pycurl.E_COULDNT_CONNECT: "the connection was refused or could not be made",
    pycurl.E_OPERATION_TIMEDOUT: "no answer within the time allowed",
    pycurl.E_SSL_CONNECT_ERROR: "TLS failed",
    pycurl.E_PEER_FAILED_VERIFICATION: "the server's certificate could not be verified",
    pycurl.E_GOT_NOTHING: "the connection was closed without an answer",
    pycurl.E_SEND_ERROR: "the connection broke while sending",
    pycurl.E_RECV_ERROR: "the connection was reset",
    pycurl.E_SEND_FAIL_REWIND: "the connection was closed without an answer",
    pycurl.E_PARTIAL_FILE: "the answer was cut short",
}


class CurlEngine:
    """Sends POSTs over libcurl's multi interface, on a thread of its own that waits in `select`."""

    def __init__(
        self, *, concurrency: int, connect_seconds: float, answer_seconds: float, ca_file: Path | None = None
    ) -> None:
        self.in_flight = 0
        self._concurrency = concurrency
        longest = timedelta(seconds=connect_seconds + answer_seconds)
        self._make_transfer = partial(_Transfer, connect_seconds, longest, str(ca_file or certifi.where()))
        self._posts: collections.deque[Post] = collections.deque()
        self._open: dict[int, Post] = {}
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._closing = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._thread = threading.Thread(target=self._run, name="futwork-wire", daemon=True)
        self._thread.start()

    def start(self, posts: Sequence[Post]) -> None:
        """Begin POSTs and return at once."""
        self.in_flight += len(posts)
        self._posts.extend(posts)
        self._wake()

    def receive(self, *, wait: float) -> list[Reply]:
        """The replies that are there, after waiting up to *wait* seconds for the first of them."""
        replies = taken(self._replies, self.in_flight, wait=wait)
        self.in_flight -= len(replies)
        return replies

    def close(self) -> None:
        """Finish what was started, end the thread, close the connections."""
        if self._closing:
            return
        self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a pipe that is full wakes just as well
            os.write(self._wake_writer, b"!")

    # the wire's own thread

    def _run(self) -> None:
        while not self._closing or self._posts:
            try:
                self._serve()
            except Exception as error:  # noqa: BLE001 - such as no descriptor left; nobody may wait for a reply for ever
                self._answer_all(f"unexpected {type(error).__name__}")

    def _serve(self) -> None:
        """Carry POSTs until the engine closes."""
        with contextlib.closing(_Wire(self._wake_reader)) as wire:
            resting: list[_Transfer] = []
            while not self._closing or self._posts or wire.active:
                for transfer, code in wire.turn(self._next_begins(wire)):
                    if transfer.met_a_dead_connection(code):
                        reply = transfer.begin(transfer.post, fresh_connection=True)
                    else:
                        reply = transfer.end(code)
                    self._go_on(wire, transfer, reply, resting)
                while (begins := self._next_begins(wire)) is not None and begins <= time.monotonic():
                    post = self._posts.popleft()
                    self._open[id(post)] = post
                    transfer = resting.pop() if resting else self._make_transfer()
                    self._go_on(wire, transfer, transfer.begin(post), resting)
            for transfer in resting:
                transfer.handle.close()

    def _next_begins(self, wire: _Wire) -> float | None:
        """The moment of the next POST; none where none waits, or there is no room for it."""
        return self._posts[0].at if self._posts and wire.active < self._concurrency else None

    def _go_on(self, wire: _Wire, transfer: _Transfer, reply: Reply | None, resting: list[_Transfer]) -> None:
        """Hand a reply over and let its transfer rest; without one, the transfer goes to the wire."""
        if reply is None:
            wire.add(transfer)
            return
        del self._open[id(reply.post)]
        self._replies.put(reply)
        resting.append(transfer)

    def _answer_all(self, why: str) -> None:
        """Answer every POST after a fault of the wire: what was begun may have left, what was not has not."""
        now = datetime.now(UTC)
        begun = list(self._open.values())
        self._open.clear()
        for post in begun:
            self._replies.put(Reply(post, now, timedelta(), touched=True, failure=why))
        while self._posts:
            self._replies.put(Reply(self._posts.popleft(), now, timedelta(), touched=False, failure=why))


class _Wire:
    """libcurl's multi handle, driven by a selector.

    Connections that idle are watched as well: one that its server closed, or on which bytes come that nobody asked for,
    is broken at once. libcurl would look only when it uses it again, and take such bytes for the next lead's answer.
    """

    def __init__(self, wake_reader: int) -> None:
        self.active = 0
        self._wake_reader = wake_reader
        self._due: float | None = None
        # descriptor → inode, since libcurl may close one and its number be another file's then
        self._idle: dict[int, int] = {}
        self._in_use: set[int] = set()
        self._poller = _Poller()
        self._poller.watch(wake_reader, _READ)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._set_socket)

    def add(self, transfer: _Transfer) -> None:
        """Begin a transfer."""
        self._multi.add_handle(transfer.handle)
        self.active += 1

    def turn(self, until: float | None) -> list[tuple[_Transfer, int]]:
        """Wait until something can go on, let it, and return the transfers that ended, each with libcurl's code.

        It waits no longer than *until*, a moment on the steady clock.
        """
        for descriptor, events in self._poller.wait(self._wait(until)):
            if descriptor in self._in_use:
                readable = pycurl.CSELECT_IN if events & ~_WRITE else 0  # a broken connection shows when it is read
                writable = pycurl.CSELECT_OUT if events & ~_READ else 0
                self._multi.socket_action(descriptor, readable | writable)
            elif descriptor in self._idle:
                self._break_connection(descriptor)
            elif descriptor == self._wake_reader:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, 4096)
            else:
                self._poller.forget(descriptor)  # libcurl has no use for it any more
        if self._due is not None and time.monotonic() >= self._due:
            self._due = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        ended: list[tuple[_Transfer, int]] = []
        more = 1
        while more:
            more, good, bad = self._multi.info_read()
            ended += [(handle.transfer, 0) for handle in good]
            ended += [(handle.transfer, code) for handle, code, _ in bad]
        for transfer, code in ended:
            self._settle(transfer, code)
        return ended

    def close(self) -> None:
        """Close every connection."""
        self._multi.close()
        self._poller.close()

    def _wait(self, until: float | None) -> float | None:
        moments = [moment for moment in (until, self._due) if moment is not None]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _settle(self, transfer: _Transfer, code: int) -> None:
        """Take a transfer that ended off the wire, and watch its connection while it idles."""
        transfer.note_what_left(code)
        descriptor = transfer.handle.getinfo(ACTIVESOCKET)  # which it knows only while it is on the wire
        self._multi.remove_handle(transfer.handle)
        self.active -= 1
        if descriptor >= 0 and descriptor not in self._in_use:  # libcurl may have given it to the next transfer already
            with contextlib.suppress(OSError):  # it was closed
                self._idle[descriptor] = os.fstat(descriptor).st_ino
                self._poller.watch(descriptor, _READ)

    def _break_connection(self, descriptor: int) -> None:
        """Empty and shut a connection, so that libcurl finds it dead; the descriptor stays libcurl's to close."""
        inode = self._idle.pop(descriptor)
        self._poller.forget(descriptor)
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino != inode:
                return
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.setblocking(False)
                connection.shutdown(socket.SHUT_RDWR)
                while connection.recv(65536):
                    pass

    def _set_timer(self, milliseconds: int) -> None:
        self._due = None if milliseconds < 0 else time.monotonic() + milliseconds / 1000

    def _set_socket(self, what: int, descriptor: int, _multi: Any, _data: Any) -> None:
        self._idle.pop(descriptor, None)
        if what == pycurl.POLL_REMOVE:  # it idles from now on, or is closed, which ends the watch by itself
            self._in_use.discard(descriptor)
            return
        self._in_use.add(descriptor)
        if what != pycurl.POLL_NONE:
            self._poller.watch(descriptor, _WATCHED[what])


class _Poller:
    """Descriptors that are watched, with as few calls to the kernel as a POST needs: `selectors` costs more than it.

    A descriptor that was closed is forgotten by epoll itself, and where there is only poll, when it shows as invalid.
    """

    def __init__(self) -> None:
        self._poll: Any = select.epoll() if hasattr(select, "epoll") else select.poll()
        self._unit = 1.0 if hasattr(select, "epoll") else 1000.0

    def watch(self, descriptor: int, events: int) -> None:
        """Watch for these events from now on, whatever was watched before."""
        try:
            self._poll.modify(descriptor, events)
        except OSError:  # not watched, or watched when the number was another connection's
            self._poll.register(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Watch no more."""
        with contextlib.suppress(KeyError, OSError):
            self._poll.unregister(descriptor)

    def wait(self, seconds: float | None) -> list[tuple[int, int]]:
        """The descriptors that have something, and what."""
        found: list[tuple[int, int]] = self._poll.poll(None if seconds is None else seconds * self._unit)
        return found

    def close(self) -> None:
        """End every watch."""
        with contextlib.suppress(AttributeError):
            self._poll.close()


class _Transfer:
    """A libcurl handle that is used again and again, with the POST that it carries at the moment."""

    def __init__(self, connect_seconds: float, longest: timedelta, ca_file: str) -> None:
        self._longest = longest
        self._lines: list[bytes] = []
        self._fresh = False
        self._made_for: tuple[str, str] | None = None
        handle = self.handle = pycurl.Curl()
        handle.transfer = self
        handle.setopt(pycurl.POST, 1)
        handle.setopt(pycurl.NOSIGNAL, 1)
        handle.setopt(pycurl.PROXY, "")  # not even the environment's
        handle.setopt(pycurl.FOLLOWLOCATION, 0)
        handle.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        handle.setopt(pycurl.HTTP09_ALLOWED, 0)
        handle.setopt(pycurl.CAINFO, ca_file)
        handle.setopt(pycurl.MAXAGE_CONN, max(1, int(IDLE_SECONDS)))
        handle.setopt(pycurl.CONNECTTIMEOUT_MS, max(1, round(connect_seconds * 1000)))
        handle.setopt(pycurl.TIMEOUT_MS, max(1, round(longest.total_seconds() * 1000)))
        handle.setopt(pycurl.READFUNCTION, self._give)  # and no way to rewind: see above
        handle.setopt(pycurl.WRITEFUNCTION, self._take)
        handle.setopt(pycurl.HEADERFUNCTION, self._lines.append)  # libcurl itself bounds what it takes of a head

    def begin(self, post: Post, *, fresh_connection: bool = False) -> Reply | None:
        """Make ready for a POST; a reply instead, where it must not be sent at all."""
        if fresh_connection is not self._fresh:
            self.handle.setopt(pycurl.FRESH_CONNECT, fresh_connection)
            self._fresh = fresh_connection
        self.post, self._request, self._body = post, io.BytesIO(post.body), bytearray()
        self._lines.clear()
        self._too_old = self._touched = self._was_kept_alive = False
        self._time = Stopwatch(self._longest)
        if self._time.may_outlast(post.claim):
            return self._failed(TOO_OLD)
        if self._made_for != (post.url, post.key):  # the next lead is mostly of the same campaign
            if not post.key.isprintable():
                return self._failed("the API key cannot stand in a header")
            self.handle.setopt(pycurl.URL, post.url)
            # No "Expect: 100-continue": a server that does not know it would cost a second a POST.
            self.handle.setopt(pycurl.HTTPHEADER, [*(f"{name}: {value}" for name, value in post.headers()), "Expect:"])
            self._made_for = post.url, post.key
        self.handle.setopt(pycurl.POSTFIELDSIZE, len(post.body))
        return None

    def note_what_left(self, code: int) -> None:
        """Ask libcurl how much of the request left, while it still knows."""
        if code:
            self._touched = self.handle.getinfo(pycurl.REQUEST_SIZE) > 0
            self._was_kept_alive = self._request.tell() > 0 and not self.handle.getinfo(pycurl.NUM_CONNECTS)
        else:
            self._touched = True  # it was answered

    def met_a_dead_connection(self, code: int) -> bool:
        """Whether libcurl took a connection that was closed while it idled, and not a byte of the request left."""
        return code != 0 and not self._touched and not self._too_old and self._was_kept_alive

    def end(self, code: int) -> Reply:
        """What became of the POST."""
        status = int(self.handle.getinfo(pycurl.RESPONSE_CODE))
        too_long = code == pycurl.E_WRITE_ERROR and len(self._body) >= BODY_BYTES
        whole = code == 0 or too_long or not 200 <= status < 300  # the rest of a 2xx might have said no
        head = self._head()
        if whole and status >= 200 and head:
            return Reply(
                self.post,
                self._time.started_at,
                self._time.elapsed,
                touched=True,
                status=status,
                body=bytes(self._body),
                encoding=_field(head, b"content-encoding") or "",
                retry_after=_field(head, b"retry-after"),
            )
        if self._too_old and not self._touched:
            return self._failed(TOO_OLD)
        if code == pycurl.E_OPERATION_TIMEDOUT and not self._touched:
            return self._failed("no connection within the time allowed")
        return self._failed("the answer was cut short" if code == 0 else _FAILURES.get(code, "the answer was not HTTP"))

    def _failed(self, why: str) -> Reply:
        return Reply(self.post, self._time.started_at, self._time.elapsed, self._touched, failure=why)

    def _give(self, size: int) -> bytes | int:
        """The request's next part; nothing of it if the claim may end while the POST is out."""
        if not self._request.tell():
            self._too_old = self._time.may_outlast(self.post.claim)
            if self._too_old:
                return int(pycurl.READFUNC_ABORT)
        return self._request.read(size)

    def _take(self, data: bytes) -> int:
        self._body += data
        return len(data) if len(self._body) < BODY_BYTES else _STOP

    def _head(self) -> list[bytes]:
        """The lines of the answer's own head, none if it broke off; interim heads precede it, trailers follow it."""
        head: list[bytes] = []
        for line in self._lines:
            head.append(line)
            if line in _BLANK:
                if head[0][8:10] != b" 1":
                    return head if head[0][12:13].isspace() else []  # libcurl reads 2000 as 200
                head = []
        return []


def _field(head: list[bytes], name: bytes) -> str | None:
    """The last field of this name in a head, with the lines that it goes on over."""
    text = b"".join(head)
    if name not in text.lower():
        return None
    lines = text.replace(b"\r\n ", b" ").replace(b"\r\n\t", b" ").splitlines()
    found = [value for key, _, value in (line.partition(b":") for line in lines) if key.strip().lower() == name]
    return found[-1].decode("latin-1").strip() if found else None
