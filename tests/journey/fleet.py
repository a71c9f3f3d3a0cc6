"""Real processes for the journeys: a private Valkey that can die and come back, workers, beats, Flower, the sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, TypeVar

import psutil
import redis

from pipeline.broker import Broker, celery_app
from pipeline.devstack.embedded_valkey import free_port, valkey_server
from pipeline.ledger import Ledger
from pipeline.settings import Settings
from tests.waiting import patience, until

ROOT = Path(__file__).parents[2]
Found = TypeVar("Found")


class Valkey:
    """A Valkey over a folder and a port that stay the same when it is killed and started again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        arguments = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder), "--save", ""]
        arguments += ["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"]
        with (self._folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen([valkey_server(), *arguments], stdout=log, stderr=log)
        until(self._answers)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=patience())

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), contextlib.closing(self.client()) as client:
            return bool(client.ping())
        return False


class Process:
    """One of our processes with its log; it and its children end with the test, whatever happens."""

    def __init__(self, arguments: list[str], *, environment: dict[str, str], folder: Path, name: str) -> None:
        self.log_file = folder / f"{name}.log"
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log
            )
        self.pid = self._process.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def says(self, text: str) -> None:
        """Wait until the log holds *text*."""
        until(lambda: text in self.log or not self.alive, what=lambda: f"{text!r} not in\n{self.log}")
        assert text in self.log, f"it ended with {self._process.returncode}\n{self.log}"

    def stop(self) -> int:
        """SIGTERM, and the code with which it ended."""
        self._process.terminate()
        return self._process.wait(patience())

    def kill(self) -> None:
        """SIGKILL to it and its children, so that nothing of it can do anything any more."""
        family = self.children()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()
        self._process.kill()
        self._process.wait()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, timeout=patience())

    def records(self) -> list[dict[str, Any]]:
        """The JSON lines of its log."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]


class Fleet:
    """Everything that one journey runs, over one folder, one broker and one ledger."""

    def __init__(self, folder: Path, *, broker_url: str, redis_url: str, database_url: str, **others: Any) -> None:
        self.folder = folder
        self.broker_url, self.redis_url, self.database_url = broker_url, redis_url, database_url
        self.settings = Settings(
            _env_file=None, broker_url=broker_url, redis_url=redis_url, database_url=database_url, **others
        )
        self._others = {name.upper(): str(value) for name, value in others.items()}
        self.ledger = Ledger(database_url)
        self.broker = Broker(celery_app(self.settings, works=False))
        self._processes: list[Process] = []

    def environment(self, **variables: object) -> dict[str, str]:
        """No variable of this machine but the path, so that no setting of it reaches the processes."""
        ours = {
            "BROKER_URL": self.broker_url,
            "REDIS_URL": self.redis_url,
            "DATABASE_URL": self.database_url,
            "SPOOL_DIR": str(self.folder / "spool"),
            "LOG_FORMAT": "json",
        }
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        given = {name.upper(): str(value) for name, value in variables.items()}
        return inherited | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | ours | self._others | given

    def start(self, arguments: list[str], *, name: str, **variables: object) -> Process:
        process = Process(arguments, environment=self.environment(**variables), folder=self.folder, name=name)
        self._processes.append(process)
        return process

    def celery(self, command: str, *arguments: str, app: str = "worker", **variables: object) -> Process:
        name = f"{command}{len(self._processes)}"
        return self.start(["-m", "celery", "-A", app, command, *arguments], name=name, **variables)

    def worker(
        self, *arguments: str, app: str = "worker", processes: int = 2, ready: bool = True, **variables: object
    ) -> Process:
        """A prefork worker; it is ready when this returns. It does not look for others, which takes a second."""
        own = [f"--concurrency={processes}", f"--hostname=w{len(self._processes)}@test"]
        own += ["--without-mingle", "--without-gossip"]
        worker = self.celery("worker", *own, *arguments, app=app, **variables)
        if ready:
            worker.says("ready.")
        return worker

    def sandbox(self, *arguments: str) -> Sandbox:
        name = f"sandbox{len(self._processes)}"
        process = self.start(["-m", "pipeline.sandbox", "--port", "0", *arguments], name=name)
        process.says('"ready"')
        return Sandbox(process.records()[0]["url"])

    def accepted(self) -> int:
        """How many leads the ledger holds."""
        return int(self.status()["accepted"])

    def states(self) -> dict[str, int]:
        """How many leads are in each state that has any."""
        return {state: count for state, count in self.status()["leads"].items() if count}

    def status(self) -> dict[str, Any]:
        from datetime import UTC, datetime

        return self.ledger.reports.status(now=datetime.now(UTC))

    def logs(self) -> str:
        """What all processes logged."""
        return "\n".join(process.log for process in self._processes)

    def end(self) -> None:
        for process in reversed(self._processes):
            process.kill()
        self.ledger.close()


class Sandbox:
    """The simulated Futwork, as the test looks at it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = url.removesuffix("/api")

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self._root}/_stats", timeout=patience()) as answer:
            return dict(json.load(answer))


def signal_process(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal, unless the process is gone already."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
