"""What the figures run against: a private Valkey, databases of their own, the sandbox, workers and web servers.

Everything is started here and ended here. A service that is absent is skipped, and said to be skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa

from bench.figures import console
from pipeline.devstack.embedded_valkey import embedded_broker, free_port
from pipeline.devstack.supervisor import Part, Supervisor
from pipeline.ledger import Ledger
from pipeline.settings import Settings

SERVER = os.environ.get("BENCH_DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres")
CAMPAIGN = "68ecc86fd9fbecbe9431a18e"
API_KEY = "sandbox-key"
_READY_SECONDS = 60.0


class Absent(Exception):
    """A service that the figure needs is not there; the message says which."""


class Backends:
    """The backends of one run of the bench; each is started when a figure first needs it."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    @cached_property
    def broker_url(self) -> str:
        """The URL of a private Valkey that writes its append-only file, as in development."""
        return self._stack.enter_context(embedded_broker(self.folder / "valkey"))

    @cached_property
    def valkey(self) -> redis.Redis:
        """A client of the private Valkey."""
        return self._stack.enter_context(contextlib.closing(redis.Redis.from_url(self.broker_url)))

    def clean_valkey(self) -> None:
        """Empty the private Valkey, and wait until it does not rewrite its file."""
        self.valkey.flushall()
        await_(lambda: not self.valkey.info("persistence")["aof_rewrite_in_progress"], "Valkey's rewrite")

    @cached_property
    def has_postgres(self) -> bool:
        """Whether PostgreSQL answers; says so where it does not."""
        engine = sa.create_engine(SERVER)
        try:
            with engine.connect():
                return True
        except sa.exc.OperationalError:
            console.print("[yellow]PostgreSQL is not there: ledgers are SQLite, and figures that need it are skipped")
            return False
        finally:
            engine.dispose()

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of an empty PostgreSQL database, dropped afterwards."""
        if not self.has_postgres:
            raise Absent("PostgreSQL")
        name = f"pipeline_bench_{uuid.uuid4().hex[:12]}"
        server = sa.create_engine(SERVER, isolation_level="AUTOCOMMIT")
        with server.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        try:
            yield sa.make_url(SERVER).set(database=name).render_as_string(hide_password=False)
        finally:
            with server.connect() as connection:
                connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
            server.dispose()

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """An empty ledger: on PostgreSQL, or on SQLite where that is absent."""
        with contextlib.ExitStack() as stack:
            if self.has_postgres:
                url = stack.enter_context(self.database())
            else:
                url = f"sqlite:///{self.folder / f'{uuid.uuid4().hex}.db'}"
            ledger = stack.enter_context(contextlib.closing(Ledger(url)))
            ledger.migrate()
            yield ledger

    def settings(self, **overrides: Any) -> Settings:
        """Settings with no limit that matters, and nothing of this machine's environment."""
        return Settings(_env_file=None, **(self._values() | overrides))

    def environment(self, settings: Settings) -> dict[str, str]:
        """The environment of a process with these settings."""
        plain = {name: getattr(settings, name) for name in Settings.model_fields}
        return {
            name.upper(): str(value.get_secret_value() if hasattr(value, "get_secret_value") else value)
            for name, value in plain.items()
        }

    def _values(self) -> dict[str, Any]:
        return {
            "broker_url": self.broker_url,
            "futwork_api_key": API_KEY,
            "spool_dir": self.folder / "spool",
            "account_rate": "1000000/s",
            "campaign_rate": "1000000/s",
            "webhook_token": "bench-token",
            "log_level": "warning",
        }

    @contextlib.contextmanager
    def processes(self, environment: Mapping[str, str] | None = None) -> Iterator[Supervisor]:
        """A supervisor for processes, which ends them with its block."""
        with Supervisor(self.folder / f"logs-{uuid.uuid4().hex[:6]}", environment or {}) as stack:
            yield stack

    @contextlib.contextmanager
    def sandbox(self, *options: str) -> Iterator[Sandbox]:
        """A simulated Futwork."""
        with self.processes() as stack:
            port = free_port()
            part = stack.start("sandbox", ["-m", "pipeline.sandbox", "--port", str(port), *options])
            sandbox = Sandbox(f"http://127.0.0.1:{port}", part)
            stack.await_ready(sandbox.answers, "the sandbox")
            yield sandbox


class Sandbox:
    """A running sandbox, seen from the bench."""

    def __init__(self, url: str, part: Part) -> None:
        self.url = url
        self.base_url = f"{url}/api"
        self.pid = part.process.pid

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            self.stats()
        except OSError:
            return False
        return True

    def stats(self) -> dict[str, Any]:
        """Its counters."""
        return json.loads(self._get("/_stats"))

    def accepted(self) -> int:
        """How many leads it has accepted."""
        return int(self.stats()["accepted"])

    def journal(self) -> list[dict[str, Any]]:
        """Every POST that arrived."""
        return [json.loads(line) for line in self._get("/_journal").splitlines()]

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read()


def await_(ready: Callable[[], object], what: str, *, seconds: float = _READY_SECONDS, step: float = 0.02) -> None:
    """Wait until *ready*, or raise `TimeoutError`."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took more than {seconds:g} s")
        time.sleep(step)


def run_json(arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run `python ARGUMENTS` to its end and read the JSON line that it prints."""
    import subprocess

    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | dict(environment),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
