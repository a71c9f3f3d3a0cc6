"""The sandbox as a whole: its listener, the times when it refuses connections, its start and its stop."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import orjson

from pipeline.sandbox import control
from pipeline.sandbox.journal import Journal
from pipeline.sandbox.options import Options, OptionsError
from pipeline.sandbox.protocol import Connection, Document, Request
from pipeline.sandbox.reception import Reception, Reply
from pipeline.sandbox.webhooks import Webhooks

_BACKLOG = 1024
_REBIND_ATTEMPTS = 200
_REBIND_SECONDS = 0.01

Answer = TypeVar("Answer")


class Sandbox:
    """A simulated Futwork, listening; made by `listening`."""

    def __init__(self, options: Options, host: str, port: int, journal: Path | None) -> None:
        self.connections: set[Connection] = set()
        self.refusals = 0
        self.host, self.port = host, port
        self.journal = Journal(journal)
        self.webhooks = Webhooks(options)
        self.reception = Reception(options, self.journal, self.webhooks.call)
        self._options = options
        self._changed = asyncio.Event()
        self._refuse_now = 0.0
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The base URL that a client of Futwork is given."""
        return f"http://{self.host}:{self.port}/api"

    @property
    def options(self) -> Options:
        """The settings in force."""
        return self._options

    def change(self, changes: Mapping[str, Any]) -> None:
        """Change settings from now on; `refuse_now` (seconds) closes the listener once. Raises OptionsError."""
        changes = dict(changes)
        refuse_now = changes.pop("refuse_now", None)
        if refuse_now is not None and not (isinstance(refuse_now, int | float) and 0 < refuse_now <= 86_400):
            raise OptionsError(f"refuse_now: {refuse_now!r} is not a number of seconds between 0 and 86400")
        options = self._options.changed(changes)
        self._options = self.reception.options = self.webhooks.options = options
        self._refuse_now = refuse_now or self._refuse_now
        self._changed.set()

    def submit(self, campaign_id: str, request: Request) -> Reply:
        """Take the POST of a lead."""
        return self.reception.receive(
            campaign_id,
            request.api_key,
            request.content_type,
            request.body,
            clock=time.monotonic(),
            epoch=time.time(),
        )

    def control(self, request: Request) -> Document | None:
        """Answer a request to a `/_…` endpoint, None when there is no such endpoint."""
        return control.answer(self, request)

    async def open(self) -> None:
        """Listen, on the port that was used before if there was one."""
        if self._socket is None:
            self._socket = _bound(self.host, self.port)
            self.port = self._socket.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), sock=self._socket, backlog=_BACKLOG)

    async def refuse(self, seconds: float) -> None:
        """Refuse connections for *seconds*.

        The port stays bound by a socket that does not listen: the system then answers every attempt to connect
        with a refusal, and no other process can take the port. Connections that are idle are closed.
        """
        self.refusals += 1
        await self._stop_listening()
        self._socket = await _bound_again(self.host, self.port)
        for connection in list(self.connections):
            connection.close_if_idle()
        await asyncio.sleep(seconds)
        await self.open()

    async def refuse_at_times(self) -> None:
        """Refuse connections whenever the settings say so, for ever."""
        while True:
            self._changed.clear()
            options, now = self._options, self._refuse_now
            if now:
                self._refuse_now = 0.0
                await self.refuse(now)
                continue
            seconds = options.refusal_seconds
            listen_seconds = max(0.0, options.refuse_every_seconds - seconds) if seconds else None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), listen_seconds)
                continue
            await self.refuse(seconds)

    async def close(self) -> None:
        """Stop listening, drop every connection, stop posting."""
        await self._stop_listening()
        for connection in list(self.connections):
            connection.abort()
        await self.webhooks.close()
        await asyncio.sleep(0)  # lets the transports say goodbye to their connections
        self.journal.close()

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        elif self._socket is not None:
            self._socket.close()
        self._socket = None


@asynccontextmanager
async def listening(
    options: Options, *, host: str = "127.0.0.1", port: int = 0, journal: Path | None = None
) -> AsyncIterator[Sandbox]:
    """Run a sandbox in this event loop until the block ends; port 0 takes a free one."""
    sandbox = Sandbox(options, host, port, journal)
    try:
        await sandbox.open()
        refusing = asyncio.create_task(sandbox.refuse_at_times())
        try:
            yield sandbox
        finally:
            refusing.cancel()
            await asyncio.gather(refusing, return_exceptions=True)
    finally:
        await sandbox.close()


def run(main: Callable[[], Any]) -> None:
    """Run the coroutine function *main* on the fastest event loop that is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


class RunningSandbox:
    """A sandbox that runs in another thread; every method may be called while it refuses connections."""

    def __init__(self, sandbox: Sandbox, loop: asyncio.AbstractEventLoop) -> None:
        self.url = sandbox.url
        self.port = sandbox.port
        self._sandbox = sandbox
        self._loop = loop

    def change(self, **changes: Any) -> None:
        """Change settings, as `POST /_control` does."""
        self._ask(lambda: self._sandbox.change(changes))

    def stats(self) -> dict[str, Any]:
        """The counters, as `GET /_stats` has them."""
        return self._ask(lambda: control.stats(self._sandbox))

    def journal(self) -> list[dict[str, Any]]:
        """One entry for each POST that arrived, in order."""
        return self._ask(lambda: _lines(self._sandbox.journal.chunks()))

    def webhooks(self) -> list[dict[str, Any]]:
        """One entry for each webhook event."""
        return self._ask(lambda: _lines(self._sandbox.webhooks.lines()))

    def flush_webhooks(self) -> int:
        """Make every scheduled event due now; returns how many these are."""
        return self._ask(self._sandbox.webhooks.flush)

    def wait(self, condition: Callable[[dict[str, Any]], bool], timeout_seconds: float = 60.0) -> dict[str, Any]:
        """Wait until *condition* holds for the counters and return them; raises TimeoutError with the last ones."""
        deadline = time.monotonic() + timeout_seconds
        pause = threading.Event()
        while not condition(counters := self.stats()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the sandbox did not get there within {timeout_seconds} s: {counters}")
            pause.wait(0.01)
        return counters

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        async def answer() -> Answer:
            return question()

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(timeout=30)


@contextmanager
def run_in_thread(options: Options | None = None, *, journal: Path | None = None) -> Iterator[RunningSandbox]:
    """Run a sandbox in a thread of this process until the block ends."""
    ready = threading.Event()
    running: list[RunningSandbox] = []
    failures: list[BaseException] = []
    stops: list[Callable[[], object]] = []

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with listening(options or Options(), journal=journal) as sandbox:
            stops.append(lambda: loop.call_soon_threadsafe(stop.set))
            running.append(RunningSandbox(sandbox, loop))
            ready.set()
            await stop.wait()

    def target() -> None:
        try:
            run(main)
        except BaseException as error:  # noqa: BLE001 (it is raised again in the thread that waits)
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=target, name="sandbox", daemon=True)
    thread.start()
    ready.wait()
    try:
        if running:
            yield running[0]
    finally:
        for stop in stops:
            with suppress(RuntimeError):  # the loop has ended by itself, with a failure
                stop()
        thread.join()
    if failures:
        raise failures[0]


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    wire = socket.socket(family, socket.SOCK_STREAM)
    try:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wire.bind((host, port))
        wire.setblocking(False)
    except BaseException:
        wire.close()
        raise
    return wire


async def _bound_again(host: str, port: int) -> socket.socket:
    """Bind *port* anew; the event loop may need a moment to let go of it."""
    for _ in range(_REBIND_ATTEMPTS):
        with suppress(OSError):
            return _bound(host, port)
        await asyncio.sleep(_REBIND_SECONDS)
    return _bound(host, port)


def _lines(pieces: Iterator[bytes]) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in b"".join(pieces).splitlines()]
