"""Web servers for our app, side by side: what slow clients can do to them, and what a stop and a kill cost.

Each server has our app, one process and 16 threads (two processes for the kill). For each kind of slow client, 64 of
them connect. Then twenty good events are posted, each on a connection of its own, and must be answered within five
seconds. Then 16 connections post without a pause while the server is told to stop, and while one of its processes is
killed. Every event that was answered 200 must be in the broker; requests without an answer are counted. At last each is
loaded in turns, for requests a second and CPU time a request.

Servers that are not installed are skipped: `pip install waitress` brings the last of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
from rich.table import Table

from bench.backends import Backends, await_, run_json
from bench.figures import Figure, compare, console, interleave
from bench.webhook import events_in_broker, listens
from pipeline.devstack.embedded_valkey import free_port

_THREADS = 16
_SLOW = 64
_GOOD = 20
_PATIENCE_SECONDS = 5.0
_HEAD = b"POST /webhooks/futwork HTTP/1.1\r\nHost: x\r\n"
_TOKEN = b"x-api-key: bench-token\r\n"
_EVENT = b'{"callSid": "bench", "status": "ringing"}'
_EVENT_REQUEST = _HEAD + _TOKEN + b"Content-Length: %d\r\n\r\n" % len(_EVENT) + _EVENT

_GRANIAN = (
    "granian --interface wsgi --host 127.0.0.1 --port {port} --workers {processes} --blocking-threads 16 --http 1"
)
_GUNICORN = "gunicorn --bind 127.0.0.1:{port} --workers {processes} --threads 16 --keep-alive 30 --no-control-socket"
_APP = "--log-level error pipeline.web.wsgi:app"
SERVERS = {  # each with the module that it needs; the first is ours
    "ours": ("pipeline.web --host 127.0.0.1 --port {port} --processes {processes} --threads 16", "granian"),
    "Granian, WSGI": (f"{_GRANIAN} --respawn-failed-workers --respawn-interval 0.1 {_APP}", "granian"),
    "gunicorn, gthread": (f"{_GUNICORN} {_APP}", "gunicorn"),
    "waitress": ("waitress --listen 127.0.0.1:{port} --threads 16 pipeline.web.wsgi:app", "waitress"),
}

SLOW_CLIENTS = {  # what each sends at once, and what it sends each second after that
    "says nothing": (b"", b""),
    "stops in the head": (_HEAD + b"X-Slow: ", b""),
    "trickles the head": (_HEAD + b"X-Slow: ", b"a"),
    "stops in a body, no token": (_HEAD + b"Content-Length: 100000\r\n\r\n{", b""),
    "stops in a body": (_HEAD + _TOKEN + b"Content-Length: 1000\r\n\r\n{", b""),
    "trickles a body": (_HEAD + _TOKEN + b"Content-Length: 1000\r\n\r\n{", b" "),
    "stops in a large body": (_HEAD + _TOKEN + b"Content-Length: 200000\r\n\r\n{", b""),
    "reads no answer": (b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400, b""),
}


@dataclass
class _Load:
    """What came of requests that were sent without a pause."""

    answered: int = 0
    unanswered: int = 0
    longest_gap: float = 0.0
    _last: float = field(default_factory=time.perf_counter)

    def count(self) -> None:
        """Count an answer."""
        now = time.perf_counter()
        self.answered += 1
        self.longest_gap, self._last = max(self.longest_gap, now - self._last), now


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module; prints a table of the rest."""
    names = [name for name, (_, module) in SERVERS.items() if importlib.util.find_spec(module)]
    table = Table("", *names)
    slow = {name: _slow_clients(services, name) for name in names}
    for kind in SLOW_CLIENTS:
        table.add_row(kind, *(slow[name][kind] for name in names))
    table.add_row("SIGTERM under load", *(_stopped(services, name) for name in names))
    table.add_row("a process killed", *(_killed(services, name) for name in names))
    console.print(table)
    return _prices(services, names, rounds=rounds, seconds=2 if quick else 5)


# Slow clients


def _slow_clients(services: Backends, name: str) -> dict[str, str]:
    with _server(services, name) as (port, _):
        return asyncio.run(_try_slow_clients(port))


async def _try_slow_clients(port: int) -> dict[str, str]:
    found = {}
    for kind, (first, later) in SLOW_CLIENTS.items():
        clients = [asyncio.create_task(_be_slow(port, first, later)) for _ in range(_SLOW)]
        await asyncio.sleep(1.5)
        took = await _good(port)
        answered = [seconds for seconds in took if seconds is not None]
        found[kind] = f"{max(answered) * 1000:.0f} ms" if len(answered) == _GOOD else "STOPS it"
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return found


async def _be_slow(port: int, first: bytes, later: bytes) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.transport.pause_reading()
    try:
        writer.write(first)
        while True:
            await asyncio.sleep(1)
            writer.write(later)
    finally:
        writer.transport.abort()


async def _good(port: int) -> list[float | None]:
    """The seconds that each of some good requests took; None for one without a 200 in time."""
    took: list[float | None] = []
    while len(took) < _GOOD and took[-2:] != [None, None]:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(_EVENT_REQUEST)
                answer = await reader.readuntil(b"\r\n\r\n")
                writer.close()
            took.append(time.perf_counter() - began if b" 200 " in answer[:16] else None)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            took.append(None)
    return took


# Stops and kills


def _stopped(services: Backends, name: str) -> str:
    services.clean_valkey()
    with _server(services, name) as (port, process):
        began = time.perf_counter()

        def ended() -> bool:
            return process.poll() is not None

        done = asyncio.run(_under_load(port, lambda: process.send_signal(signal.SIGTERM), until=ended))
        took = time.perf_counter() - began
    return f"{_said(services, done)}, ended in {took:.1f} s"


def _killed(services: Backends, name: str) -> str:
    services.clean_valkey()
    with _server(services, name, processes=2) as (port, process):
        children = psutil.Process(process.pid).children()
        if not children:
            return "one process"
        over = time.monotonic() + 8

        def kill() -> None:
            max(children, key=lambda child: sum(child.cpu_times()[:2])).kill()

        done = asyncio.run(_under_load(port, kill, until=lambda: time.monotonic() > over))
    return f"{_said(services, done)}, {done.longest_gap:.2f} s without"


def _said(services: Backends, done: _Load) -> str:
    if events_in_broker(services) < done.answered:
        return f"LOST {done.answered - events_in_broker(services)}"
    return f"{done.unanswered} unanswered"


async def _under_load(port: int, act: Callable[[], object], *, until: Callable[[], bool]) -> _Load:
    """Post without a pause from as many connections as there are threads, and *act* after a second."""
    found = _Load()
    tasks = [asyncio.create_task(_post(port, found)) for _ in range(_THREADS)]
    await asyncio.sleep(1)
    found.longest_gap = 0.0
    act()
    while not until():  # noqa: ASYNC110 - a process ends without an event of ours
        await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


async def _post(port: int, found: _Load) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        try:
            while not reader.at_eof():
                writer.write(_EVENT_REQUEST)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
                found.count()
                if b"connection: close" in head:
                    break
        except (OSError, asyncio.IncompleteReadError):
            found.unanswered += 1
        finally:
            writer.close()


# Prices


def _prices(services: Backends, names: list[str], *, rounds: int, seconds: float) -> list[Figure]:
    cpu: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(_server(services, name)) for name in names}

        def load(name: str) -> float:
            port, process = running[name]
            services.clean_valkey()
            before = _cpu_seconds(process.pid)
            url = f"http://127.0.0.1:{port}/webhooks/futwork"
            done = run_json(["-m", "bench.load", url, "--seconds", str(seconds), "--connections", str(_THREADS)], {})
            if done["wrong"]:
                raise RuntimeError(f"{name}: {done['wrong']} requests were not answered with 200")
            cpu[name].append((_cpu_seconds(process.pid) - before) / done["requests"] * 1e6)
            return done["per_second"]

        for name in names:
            load(name)
            cpu[name].clear()
        rates = interleave(rounds, {name: (lambda name=name: load(name)) for name in names})
    ours, *others = names
    figures = []
    for other in others:
        name, note = other.partition(",")[0].lower(), f"ours against {other}; 1 process x 16 threads, 16 connections"
        figures += [
            compare(f"web_server_{name}", rates[ours], rates[other], unit="requests/s", goal=None, note=note),
            compare(
                f"web_server_{name}_cpu", cpu[ours], cpu[other], unit="µs CPU", goal=None, better="lower", note=note
            ),
        ]
    return figures


def _cpu_seconds(pid: int) -> float:
    main = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in (main, *main.children(recursive=True)))


@contextlib.contextmanager
def _server(services: Backends, name: str, *, processes: int = 1) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    settings = services.settings(database_url=f"sqlite:///{services.folder / 'unused.db'}")
    folder = services.folder / f"counters-{port}"
    folder.mkdir()
    environment = os.environ | services.environment(settings) | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    arguments = SERVERS[name][0].format(port=port, processes=processes).split()
    with (services.folder / "servers.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", *arguments], env=environment, stdout=log, stderr=log)
    try:
        await_(lambda: listens(port), name)
        asyncio.run(_good(port))
        yield port, process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(25)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
