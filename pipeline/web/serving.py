"""A gunicorn worker whose threads no slow client can hold, however many of them there are.

Gunicorn's threads read a request from its socket without a bound: as many clients as there are threads, each with one
byte of a request and no more, stop a server. Here a connection gets a thread once the head of its request has arrived
whole; until then it costs an entry in the poller. A body is read against one deadline for all of it, a client that does
not take its answer against another, and who was refused before its body was read is not waited for.

A proxy in front that buffers requests does the same, and is where TLS belongs; this holds without one.
"""

from __future__ import annotations

import contextlib
import errno
import select
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from gunicorn.workers.gthread import TConn, ThreadWorker

HEAD_SECONDS = 10.0  # for the whole head, from the connection's start or the end of the request before
BODY_SECONDS = 30.0  # for the whole body; the largest that is taken, 16 MiB, needs half a megabyte a second
ANSWER_SECONDS = 30.0  # until the client has taken the answer
_LINGER_SECONDS = 2.0  # for the rest of a request that was refused, so that the client reads the answer before a reset
_DRAIN_SECONDS = 0.1  # for what is left of a body that nobody read, before the connection is given up instead
_HEAD_BYTES = 32 * 1024
_LOOK_SECONDS = 0.5  # between two looks for connections whose time is over
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class SlowClient(OSError):
    """The client did not send its request, or take its answer, in the time that one may take."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNRESET, "the client was too slow")  # gunicorn ends such a connection quietly


class PatientWorker(ThreadWorker):
    """Gunicorn's threaded worker with those bounds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lingering: deque[tuple[float, socket.socket]] = deque()
        self._look_again_at = 0.0
        self._stop_at: float | None = None

    def accept(self, listener: Any) -> None:
        """Take a connection; where too many wait for their request, the one that has waited longest goes."""
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                raise
            return
        self.nr_conns += 1
        self.enqueue_req(_Connection(self, client, address, listener.getsockname()))
        if len(self.pending_conns) > self.worker_connections * 3 // 4:
            self._drop(self.pending_conns[0])

    def enqueue_req(self, conn: Any) -> None:
        """Give the connection a thread if its request's head is there, and wait for it otherwise."""
        if self.cfg.is_ssl or (conn.parser is not None and conn.parser.unreader.buf.getvalue()):
            super().enqueue_req(conn)
            return
        try:
            head = conn.sock.peek(_HEAD_BYTES)
            ended = not head
        except BlockingIOError:
            head, ended = b"", False
        except OSError:
            head, ended = b"", True
        if ended or b"\r\n\r\n" in head:
            conn.head_until = None
            conn.data_ready = True
            _wake_at(conn.sock, 1)
            super().enqueue_req(conn)
        elif len(head) >= _HEAD_BYTES:
            with contextlib.suppress(OSError):
                conn.sock.send(_TOO_LARGE)
            self.nr_conns -= 1
            conn.close(graceful=True)
        else:
            conn.head_until = conn.head_until or time.monotonic() + HEAD_SECONDS
            conn.timeout = conn.head_until
            _wake_at(conn.sock, len(head) + 1)
            self.pending_conns.append(conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn: Any) -> Any:
        """Read the request, against a deadline, and answer it."""
        if not self.cfg.is_ssl:
            conn.sock.settimeout(BODY_SECONDS)
        return super().handle(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request, the answer's head in one with the beginning of its body."""
        if self.cfg.is_ssl:
            return super().handle_request(req, conn)
        with conn.sock.holding_the_head():
            return super().handle_request(req, conn)

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        return keepalive and bool(conn.parser.finish_body(deadline=time.monotonic() + _DRAIN_SECONDS))

    def murder_pending(self) -> None:
        """End what waited for too long: connections without a request, and answered ones that do not close."""
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + _LOOK_SECONDS
        if not self.alive:  # who has not asked by then will ask another process
            self._stop_at = self._stop_at or now + _LINGER_SECONDS
        stopping = self._stop_at is not None and now >= self._stop_at
        for conn in [conn for conn in self.pending_conns if stopping or conn.timeout <= now]:
            self._drop(conn)
        while self._lingering and self._lingering[0][0] <= now:
            self._end(self._lingering[0][1])

    def linger(self, sock: socket.socket) -> None:
        """Close a connection once the client has closed its side, or soon; the poller waits, not a thread."""
        try:
            sock.setblocking(False)  # one that speaks TLS may block
            sock.shutdown(socket.SHUT_WR)
            _wake_at(sock, 1)
            self.poller.register(sock, selectors.EVENT_READ, self._swallow)
        except (OSError, ValueError, KeyError):
            sock.close()
            return
        self._lingering.append((time.monotonic() + _LINGER_SECONDS, sock))
        if len(self._lingering) > self.worker_connections:
            self._end(self._lingering[0][1])

    def _swallow(self, sock: Any) -> None:
        try:
            gone = not sock.recv(64 * 1024)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self._end(sock)

    def _end(self, sock: socket.socket) -> None:
        self._lingering = deque(one for one in self._lingering if one[1] is not sock)
        with contextlib.suppress(OSError, KeyError, ValueError):
            self.poller.unregister(sock)
        sock.close()

    def _drop(self, conn: Any) -> None:
        self.pending_conns.remove(conn)
        with contextlib.suppress(OSError, KeyError, ValueError):
            self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()


class _Connection(TConn):
    def __init__(self, worker: PatientWorker, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(worker.cfg, sock, client, server)
        self._worker = worker
        self.head_until: float | None = None
        if not worker.cfg.is_ssl:
            self.sock = _Socket(sock)

    def close(self, graceful: bool = False) -> None:
        """Close; gunicorn's own graceful way would hold the worker's main thread for as long as the client likes."""
        if graceful and self._worker.alive:
            self._worker.linger(self.sock.bare() if isinstance(self.sock, _Socket) else self.sock)
        else:
            super().close(graceful)


class _Socket:
    """A socket that never blocks in the kernel, and waits for the client only where it has to.

    Each call that may block lets the threads that wait for the interpreter go first; a Python socket with a timeout
    makes four of them to read what is there already. Here that is one.

    What is read has to come until a moment, however the bytes trickle in; what is sent has a bound of its own.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._until = float("inf")
        self._held: bytes | None = None  # the answer's head; None where nothing is to be held (any more)

    def bare(self) -> socket.socket:
        """The socket itself, which does not block."""
        return self._sock

    def peek(self, size: int) -> bytes:
        """What has come and is not read yet; raises `BlockingIOError` if that is nothing."""
        return self._sock.recv(size, socket.MSG_PEEK)

    def recv(self, size: int) -> bytes:
        """What comes next; raises `SlowClient` once the time is over."""
        while True:
            if time.monotonic() >= self._until:
                raise SlowClient
            try:
                return self._sock.recv(size)
            except BlockingIOError:
                self._wait(select.POLLIN, self._until)

    def sendall(self, data: bytes) -> None:
        """Send it all; raises `SlowClient` if the client does not take it in time."""
        if self._held is None:
            self._send(data)
        elif self._held:
            held, self._held = self._held, None
            self._send(held + data)
        else:
            self._held = data

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Send a part of a file, as `socket.sendfile` does."""
        self._send_held()
        self._sock.settimeout(ANSWER_SECONDS)
        try:
            return self._sock.sendfile(file, offset, count)
        finally:
            self._sock.setblocking(False)

    @contextlib.contextmanager
    def holding_the_head(self) -> Iterator[None]:
        """Hold the first part that is sent, the head, until the second comes or the block ends."""
        self._held = b""
        try:
            yield
        finally:
            self._send_held()

    def gettimeout(self) -> float | None:
        """The seconds that are left for reading; gunicorn asks before it shortens them."""
        return None if self._until == float("inf") else max(0.0, self._until - time.monotonic())

    def settimeout(self, seconds: float | None) -> None:
        """Let reading end in so many seconds."""
        self._until = float("inf") if seconds is None else time.monotonic() + seconds

    def setblocking(self, blocking: bool) -> None:
        """Nothing: it never blocks in the kernel, and its methods wait as they are told."""

    def _send_held(self) -> None:
        held, self._held = self._held, None
        if held:
            self._send(held)

    def _send(self, data: bytes) -> None:
        left, until = memoryview(data), 0.0
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                until = until or time.monotonic() + ANSWER_SECONDS
                self._wait(select.POLLOUT, until)

    def _wait(self, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(None if left == float("inf") else left * 1000):
            raise SlowClient

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _wake_at(sock: socket.socket, size: int) -> None:
    """Let the poller speak up once so many bytes wait: those that were seen already are no news."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
