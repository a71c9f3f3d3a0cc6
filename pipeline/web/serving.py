"""Flask behind Granian, so that a slow client costs a connection and never a thread.

Granian reads the head of a request, against a deadline of its own, and calls this module through RSGI, its asynchronous
interface. The body is awaited on the event loop, against one deadline for all of it. Then one of the threads runs the
app. The whole answer goes back to Granian, which sends it as slowly as the client takes it.

A body of more than `HELD_BYTES`, or of unknown size, is not held in memory before the app has checked the token. Such a
request gets a thread at once, and the thread waits for the body, against the same deadline. At most half of the threads
do so at a time.
"""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipeline.observability.logs import logger
from pipeline.observability.redaction import redactor

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication
    from granian.rsgi import HTTPProtocol, Scope  # type: ignore[attr-defined]  # it exports the first without saying so

log = logger(__name__)

BODY_SECONDS = 30.0  # for a whole body; the largest that is taken, 16 MiB, needs half a megabyte a second
HELD_BYTES = 64 * 1024
_PARENT_SECONDS = 1.0  # between two checks whether the parent process lives

_redact = redactor(())

Answer = tuple[int, list[tuple[str, str]], bytes]


class Serving:
    """An RSGI application that runs a WSGI app on *threads* threads; `access_log` writes a line for each request."""

    def __init__(self, app: WSGIApplication, *, threads: int, access_log: bool = False) -> None:
        self._app = app
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="web")
        self._access_log = access_log
        self._awaiting = asyncio.Semaphore(max(1, threads // 2))
        self._parent: asyncio.Task[None] | None = None

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Granian calls this once in each process, before the first request."""
        if (parent := multiprocessing.parent_process()) is not None:
            self._parent = loop.create_task(_end_with_parent(parent.pid or 0))

    async def __rsgi__(self, scope: Scope, protocol: HTTPProtocol) -> None:
        """Answer one request."""
        began = time.perf_counter()
        environ = _environ(scope)
        if _is_small(environ):
            environ["wsgi.input"] = await _held_body(protocol, environ)
            status, headers, body = await self._on_a_thread(environ)
        else:
            async with self._awaiting:
                environ["wsgi.input"] = io.BufferedReader(_AwaitedBody(protocol, asyncio.get_running_loop()))
                status, headers, body = await self._on_a_thread(environ)
        protocol.response_bytes(status, headers, body)
        if self._access_log:
            log.info(
                "request answered", method=scope.method, path=_redact(scope.path), status=status,
                client=environ["REMOTE_ADDR"], ms=round((time.perf_counter() - began) * 1000, 1),
            )  # fmt: skip

    def _on_a_thread(self, environ: dict[str, Any]) -> asyncio.Future[Answer]:
        return asyncio.get_running_loop().run_in_executor(self._pool, self._run, environ)

    def _run(self, environ: dict[str, Any]) -> Answer:
        status, headers = 500, []

        def start(line: str, given: list[tuple[str, str]], *_: object) -> Callable[[bytes], object]:
            nonlocal status, headers
            status, headers = int(line[:3]), given
            return _refuse_to_write

        parts: Iterable[bytes] = self._app(environ, start)
        try:
            return status, headers, b"".join(parts)
        finally:
            if hasattr(parts, "close"):
                parts.close()


def _refuse_to_write(_data: bytes) -> object:
    raise NotImplementedError("return the body instead")


_ENVIRON = {
    "SCRIPT_NAME": "",
    "wsgi.version": (1, 0),
    "wsgi.errors": sys.stderr,
    "wsgi.multithread": True,
    "wsgi.multiprocess": True,
    "wsgi.run_once": False,
    "wsgi.input_terminated": True,  # a body without a length ends by itself
}


def _environ(scope: Scope) -> dict[str, Any]:
    host, _, port = scope.server.rpartition(":")
    environ: dict[str, Any] = _ENVIRON | {
        "REQUEST_METHOD": scope.method,
        "PATH_INFO": scope.path.encode("utf-8", "surrogateescape").decode("latin-1"),
        "QUERY_STRING": scope.query_string,
        "SERVER_PROTOCOL": f"HTTP/{scope.http_version}",
        "SERVER_NAME": host,
        "SERVER_PORT": port,
        "REMOTE_ADDR": scope.client.rpartition(":")[0].strip("[]"),
        "wsgi.url_scheme": scope.scheme,
    }
    for name, value in scope.headers.items():
        if "_" in name:
            continue  # or `X_Forwarded_For` would pass for `X-Forwarded-For`, which a proxy sets
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = f"HTTP_{key}"
        environ[key] = f"{environ[key]}{'; ' if key == 'HTTP_COOKIE' else ','}{value}" if key in environ else value
    if scope.authority and "HTTP_HOST" not in environ:
        environ["HTTP_HOST"] = scope.authority
    return environ


def _is_small(environ: dict[str, Any]) -> bool:
    length = environ.get("CONTENT_LENGTH", "0")
    return "HTTP_TRANSFER_ENCODING" not in environ and length.isdecimal() and int(length) <= HELD_BYTES


async def _held_body(protocol: HTTPProtocol, environ: dict[str, Any]) -> io.BufferedIOBase:
    if environ.get("CONTENT_LENGTH", "0") == "0":
        return io.BytesIO()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return io.BytesIO(await protocol())
    except (TimeoutError, RuntimeError):  # too slow, or gone; the app still decides between a 401 and a 408
        return io.BufferedReader(_MissingBody())


class _MissingBody(io.RawIOBase):
    """A body that did not come."""

    def readable(self) -> bool:
        """Whether it may be read."""
        return True

    def readinto(self, _buffer: Any) -> int:
        """Nothing."""
        raise TimeoutError("the body did not arrive whole in time")


class _AwaitedBody(io.RawIOBase):
    """A body that a thread reads while it comes in."""

    def __init__(self, protocol: HTTPProtocol, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._pieces = aiter(protocol)
        self._loop = loop
        self._until = time.monotonic() + BODY_SECONDS
        self._rest = b""

    def readable(self) -> bool:
        """Whether it may be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what comes next; 0 at the end."""
        if not self._rest:
            self._rest = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                piece: bytes = await anext(self._pieces)
                return piece
        except StopAsyncIteration:
            return b""
        except RuntimeError:
            raise ConnectionResetError("the client is gone") from None


async def _end_with_parent(parent: int) -> None:
    """End this process when its parent was killed, or it would serve beside the parent's successor."""
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing signals a parent's death
        await asyncio.sleep(_PARENT_SECONDS)
    log.warning("the server's main process is gone; its child ends")
    os.kill(os.getpid(), signal.SIGTERM)
