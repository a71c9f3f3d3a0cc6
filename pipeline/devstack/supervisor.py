"""All processes of the pipeline under one supervisor, for `pipeline demo` and `pipeline up`.

Each process leads a session of its own, so that Ctrl-C reaches only the supervisor. It ends them in an order that loses
nothing: first the pipeline's own processes, then those that they use. If the supervisor itself is killed, the kernel
ends its children (Linux).
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
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from pipeline.settings import PREFIX

ROOT = Path(__file__).parent.parent.parent
"""The folder that holds the package `pipeline`: a checkout, or site-packages."""

LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of this machine, without a proxy that the environment may name."""

_WARNINGS = "ignore:You're running the worker with superuser privileges"  # usual in a container
_END_SECONDS = 20.0  # longer than a slice with its slowest POST in development settings
_PR_SET_PDEATHSIG = 1


class ProcessFailed(Exception):
    """A process ended by itself or did not start; the message names its log."""


@dataclass(slots=True)
class Part:
    """One supervised process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ends_last: bool = False
    """Whether the other processes use it until they end."""


class Supervisor:
    """Starts processes, watches them, ends them; use it as a context manager.

    They start in *cwd*, where they read a `.env` file. Their logs go to files in *folder*, and to *echo*, except lines
    that contain one of the words of *hush*.
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
        # ROOT first: a module of the caller's with a name of ours must not hide ours.
        paths = [str(ROOT), str(self._cwd), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        ours["PYTHONWARNINGS"] = os.environ.get("PYTHONWARNINGS") or _WARNINGS
        prefixed = {PREFIX + name: value for name, value in environment.items()}  # else others win
        self.environment = os.environ | ours | dict(environment) | prefixed
        self._echo = echo
        self._hush = tuple(hush)
        self.parts: list[Part] = []
        self._followers: list[threading.Thread] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(
        self, name: str, arguments: Sequence[str], *, program: str = sys.executable, ends_last: bool = False
    ) -> Part:
        """Start `python ARGUMENTS`, or another *program*, and log to NAME.log."""
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
        part = Part(name, process, log, ends_last)
        self.parts.append(part)
        if self._echo is not None:
            follower = threading.Thread(
                target=_follow, args=(part, begins_at, self._echo, self._hush), daemon=True, name=f"log-{name}"
            )
            self._followers.append(follower)
            follower.start()
        return part

    def celery(self, name: str, *arguments: str) -> Part:
        """Start `celery -A pipeline.worker ARGUMENTS`."""
        return self.start(name, ["-m", "celery", "--quiet", "-A", "pipeline.worker", *arguments])

    def start_pipeline(self, *, web: str, workers: int = 2) -> None:
        """Start the pipeline's own processes: a worker for each group of queues, beat, and the web server at *web*."""
        quiet = ("--loglevel", "info", "--without-gossip", "--without-mingle")
        self.celery("dispatch", "worker", "-Q", "dispatch", "-c", str(workers), "-n", "dispatch@%h", *quiet)
        self.celery("records", "worker", "-Q", "intake,events,upkeep", "-c", str(workers), "-n", "records@%h", *quiet)
        self.celery("beat", "beat", "--loglevel", "warning", "--pidfile", "")
        host, _, port = web.rpartition(":")
        self.start("web", ["-m", "pipeline.web", "--host", host, "--port", port, "--processes", "1"])

    def await_ready(self, ready: Callable[[], bool], what: str, *, seconds: float = 60.0) -> None:
        """Wait until *ready*; fail at once if a process has ended."""
        deadline = time.monotonic() + seconds
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailed(f"{what} was not ready in {seconds:g} s; the logs are in {self._folder}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise `ProcessFailed` if a process has ended by itself."""
        for part in self.parts:
            code = part.process.poll()
            if code is not None:
                said = part.log.read_text("utf-8", "replace").strip().splitlines()[-1:] or ["(its log is empty)"]
                how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
                raise ProcessFailed(f"{part.name} {how}: {said[0][:300]} (see {part.log})")

    def end(self) -> None:
        """End every process in order; kill those that do not end in time."""
        try:
            for ends_last in (False, True):
                _end([part for part in reversed(self.parts) if part.ends_last is ends_last])
        finally:
            for part in self.parts:  # nothing may be left, even if a signal interrupted the steps above
                _kill(part)
        for follower in self._followers:
            follower.join(2)
        self.parts.clear()
        self._followers.clear()


def _end(parts: Sequence[Part]) -> None:
    for part in parts:
        part.process.terminate()
    deadline = time.monotonic() + _END_SECONDS
    for part in parts:
        with contextlib.suppress(subprocess.TimeoutExpired):
            part.process.wait(max(0.1, deadline - time.monotonic()))
        _kill(part)


def _kill(part: Part) -> None:
    """Kill the process and its children, if it has not ended."""
    if part.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()


def is_free(port: int) -> bool:
    """Whether no process listens on this port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed connection is free
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
    except OSError:
        return False


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(part: Part, begins_at: int, echo: IO[str], hush: Sequence[str]) -> None:
    """Copy whole lines of a process's log to *echo*, with its name in front, until it has ended and all is copied."""
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
