"""All parts of the pipeline as real processes under one supervisor, for `pipeline demo` and `pipeline up`.

Each process leads a session of its own, so that Ctrl-C reaches only the supervisor, which then ends them in an order
that loses nothing: the pipeline's own parts, then what they speak to. Should the supervisor itself be killed, the
kernel ends its children (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

ROOT = Path(__file__).parent.parent.parent
"""Where `worker.py` and `web.py` are; the processes start here."""

LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of this machine: no proxy of the environment has a part in that."""

_WARNINGS = "ignore:You're running the worker with superuser privileges"  # in a container one often does
_END_SECONDS = 20.0  # longer than a slice with its slowest POST in development settings
_PR_SET_PDEATHSIG = 1


class ProcessFailed(Exception):
    """A part of the stack ended by itself or did not start; the message names its log."""


@dataclass(slots=True)
class Part:
    """One supervised process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    outlives: bool = False
    """Whether the others speak to it to their end."""


class Supervisor:
    """Starts processes, watches them, ends them; use it as a context manager.

    They start in *cwd*, where they read a `.env` file, and find `worker.py` and `web.py` wherever that is. What they
    log goes to files in *folder*, and to *echo*, without the lines that hold one of the words of *hush*.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        cwd: Path = ROOT,
        echo: IO[str] | None = None,
        hush: Sequence[str] = (),
    ) -> None:
        self._folder = folder.resolve()
        self._cwd = cwd.resolve()
        # Ours first: a `worker.py` of the caller's must not be taken for ours.
        paths = [str(ROOT), str(self._cwd), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        ours["PYTHONWARNINGS"] = os.environ.get("PYTHONWARNINGS") or _WARNINGS
        self.environment = os.environ | ours | dict(environment)
        self._echo = echo
        self._hush = tuple(hush)
        self.parts: list[Part] = []
        self._followers: list[threading.Thread] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(
        self, name: str, arguments: Sequence[str], *, program: str = sys.executable, outlives: bool = False
    ) -> Part:
        """Start `python ARGUMENTS`, or another *program*, as part *name*; one that *outlives* the others ends last."""
        log = self._folder / f"{name}.log"
        with log.open("ab") as out:
            begins_at = out.tell()
            process = subprocess.Popen(
                [program, *arguments],
                cwd=self._cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, and no other thread holds a lock then
            )
        part = Part(name, process, log, outlives)
        self.parts.append(part)
        if self._echo is not None:
            follower = threading.Thread(
                target=_follow, args=(part, begins_at, self._echo, self._hush), daemon=True, name=f"log-{name}"
            )
            self._followers.append(follower)
            follower.start()
        return part

    def celery(self, name: str, *arguments: str) -> Part:
        """Start `celery -A worker ARGUMENTS` as part *name*."""
        return self.start(name, ["-m", "celery", "--quiet", "-A", "worker", *arguments])

    def start_pipeline(self, *, web: str, workers: int = 2) -> None:
        """Start the pipeline's own processes: a worker for each group of queues, beat, and the web server at *web*."""
        quiet = ("--loglevel", "info", "--without-gossip", "--without-mingle")
        self.celery("dispatch", "worker", "-Q", "dispatch", "-c", str(workers), "-n", "dispatch@%h", *quiet)
        self.celery("records", "worker", "-Q", "intake,events,upkeep", "-c", str(workers), "-n", "records@%h", *quiet)
        self.celery("beat", "beat", "--loglevel", "warning", "--pidfile", "")
        config = ["--config", str(ROOT / "gunicorn.conf.py")] if (ROOT / "gunicorn.conf.py").exists() else []
        self.start("web", ["-m", "gunicorn", "web:app", *config, "--bind", web, "--workers", "1", "--threads", "16"])

    def await_ready(self, ready: Callable[[], bool], what: str, *, seconds: float = 60.0) -> None:
        """Wait until *ready*, failing at once if a part has ended."""
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailed(f"{what} was not ready in {seconds:g} s; the logs are in {self._folder}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise `ProcessFailed` if a part has ended by itself."""
        for part in self.parts:
            code = part.process.poll()
            if code is not None:
                said = part.log.read_text("utf-8", "replace").strip().splitlines()[-1:] or ["(its log is empty)"]
                how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
                raise ProcessFailed(f"{part.name} {how}: {said[0][:300]} (see {part.log})")

    def end(self) -> None:
        """End every part, first the pipeline's, then what they speak to; kill what does not end in time."""
        try:
            for outlives in (False, True):
                _end([part for part in self.parts if part.outlives is outlives])
        finally:
            for part in self.parts:  # nothing may be left, even if a signal broke off the above
                if part.process.poll() is None:
                    _kill(part)
        for follower in self._followers:
            follower.join(2)
        self.parts.clear()
        self._followers.clear()


def _end(parts: Sequence[Part]) -> None:
    for part in reversed(parts):
        with contextlib.suppress(ProcessLookupError):
            part.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    for part in reversed(parts):
        try:
            part.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(part)


def _kill(part: Part) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(part.process.pid, signal.SIGKILL)
    part.process.wait()


def is_free(port: int) -> bool:
    """Whether nobody listens on this port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed connection is no one
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(url: str) -> bool:
    """Whether an HTTP GET of *url* is answered with 200."""
    try:
        with LOOPBACK.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(part: Part, begins_at: int, echo: IO[str], hush: Sequence[str]) -> None:
    """Copy a part's log to the terminal, whole lines with its name in front, until it has ended and all is copied."""
    pending = ""
    with part.log.open(encoding="utf-8", errors="replace") as log, contextlib.suppress(OSError, ValueError):
        log.seek(begins_at)
        while True:
            ended = part.process.poll() is not None
            pending += log.read()
            *lines, pending = pending.split("\n")
            shown = [line.rstrip() for line in lines if line.strip() and not any(word in line for word in hush)]
            if shown:
                echo.write("".join(f"{part.name:<10} {line}\n" for line in shown))
                echo.flush()
            if ended:
                return
            time.sleep(0.1)
