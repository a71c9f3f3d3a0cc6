"""One deployment of the pipeline for one experiment: real processes on a broker, a ledger and a sandbox of its own.

The rig is also the supervisor that a deployment has: what an experiment killed whole, it starts again. That, and
nothing else, is done from outside while the pipeline finds its way back.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psutil

from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import Part, Supervisor, answers
from pipeline.ledger import Ledger
from pipeline.settings import Settings
from tests.chaos import mechanisms
from tests.chaos.brokers import PrivateRabbit, PrivateValkey, RabbitVhost
from tests.chaos.disk import small_disk
from tests.chaos.ledgers import OwnDatabase, PrivatePostgres, SqliteFile

KEY = "sandbox-key"
WEBHOOK_TOKEN = "chaos-webhook"
INTAKE_TOKEN = "chaos-intake"
CAMPAIGN = "68ecc86fd9fbecbe9431a18e"
WORKERS = ("dispatch", "records", "beat", "web")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rig is made of; experiments differ in this and in what they do to it."""

    ledger: Literal["postgres", "private-postgres", "sqlite"] = "postgres"
    broker: Literal["valkey", "rabbitmq", "private-rabbitmq"] = "valkey"
    appendfsync: str = "everysec"
    rate: str = "100/s"
    settings: Mapping[str, str] = field(default_factory=dict)
    sandbox: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the sandbox's settings, as `POST /_control` takes them."""
    disk_bytes: int | None = None
    """The size of the disk under the spool; None is the machine's."""


class Rig:
    """The running deployment; use it as a context manager, from the main thread."""

    def __init__(
        self, folder: Path, plan: Plan, *, seed: int, short: bool = False, without: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.seed = seed
        self.short = short
        self.rng = random.Random(seed)
        self.faults: list[str] = []
        self.kills = 0
        self._without = tuple(without)
        self._began = time.monotonic()
        self._closing = contextlib.ExitStack()
        self._parts: dict[str, Part] = {}
        self._environments: dict[str, dict[str, str]] = {}
        self._log_begins: dict[str, int] = {}
        self._log = (folder / "rig.log").open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as closing:
            self._start(closing)
            self._closing = closing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()
        self._log.close()

    # the parts

    def _start(self, closing: contextlib.ExitStack) -> None:
        self.valkey = PrivateValkey(self.folder / "valkey", appendfsync=self.plan.appendfsync)
        closing.callback(self.valkey.close)
        self.valkey.start()
        self.rabbit: RabbitVhost | PrivateRabbit | None = None
        if self.plan.broker == "rabbitmq":
            self.rabbit = RabbitVhost()
        elif self.plan.broker == "private-rabbitmq":
            self.rabbit = PrivateRabbit(self.folder)
        if self.rabbit is not None:
            closing.callback(self.rabbit.close)
            self.rabbit.start()
        self.database: OwnDatabase | PrivatePostgres | SqliteFile
        if self.plan.ledger == "postgres":
            self.database = OwnDatabase()
        elif self.plan.ledger == "private-postgres":
            self.database = PrivatePostgres(self.folder)
        else:
            self.database = SqliteFile(self.folder)
        closing.callback(self.database.close)
        self.database.start()
        self.ledger = Ledger(self.database.url)
        closing.callback(self.ledger.close)
        self.ledger.migrate()

        self.web_port, self.sandbox_port = free_port(), free_port()
        self.web = f"http://127.0.0.1:{self.web_port}"
        self.sandbox = f"http://127.0.0.1:{self.sandbox_port}"
        self.spool = self.folder / "spool"
        self.environment = self._environment()
        if self.plan.disk_bytes is not None:
            self.environment |= closing.enter_context(small_disk(self.spool, self.plan.disk_bytes))
        names = {name: name.upper() for name in Settings.model_fields}
        given = {name: self.environment[env] for name, env in names.items() if env in self.environment}
        self.settings = Settings(_env_file=None, **given)  # type: ignore[call-arg,arg-type]  # pydantic reads them
        (self.folder / "metrics").mkdir(exist_ok=True)
        self.stack = Supervisor(self.folder / "logs", self.environment)
        closing.callback(self.stack.end)
        arguments = ["--port", str(self.sandbox_port), "--seed", str(self.seed), "--api-key", KEY]
        arguments += ["--journal", str(self.folder / "journal.ndjson"), "--webhook-token", WEBHOOK_TOKEN]
        arguments += ["--webhook", f"{self.web}/webhooks/futwork", "--webhook-retries", "100"]
        self.stack.start("sandbox", ["-m", "pipeline.sandbox", *arguments])
        for name in WORKERS:
            self.start(name)
        self.stack.await_ready(lambda: answers(f"{self.sandbox}/_stats"), "the sandbox")
        self.calm(self.plan)
        self.stack.await_ready(lambda: answers(f"{self.web}/readyz"), "the web server")

    def _environment(self) -> dict[str, str]:
        return {
            "BROKER_URL": self.rabbit.url if self.rabbit is not None else self.valkey.url,
            "REDIS_URL": self.valkey.url,
            "DATABASE_URL": self.database.url,
            "SPOOL_DIR": str(self.spool),
            "FUTWORK_BASE_URL": f"{self.sandbox}/api",
            "FUTWORK_API_KEY": KEY,
            "FUTWORK_API_KEYS": "",
            "WEBHOOK_TOKEN": WEBHOOK_TOKEN,
            "INTAKE_TOKENS": INTAKE_TOKEN,
            "ACCOUNT_RATE": self.plan.rate,
            "CAMPAIGN_RATE": self.plan.rate,
            "CONNECT_TIMEOUT_SECONDS": "1",
            "READ_TIMEOUT_SECONDS": "2",
            "DISPATCH_CONCURRENCY": "32",
            "CLAIM_SECONDS": "8",
            "BACKOFF_BASE_SECONDS": "0.2",
            "BACKOFF_CAP_SECONDS": "1",
            "PROBE_FIRST_SECONDS": "1",
            "PROBE_CAP_SECONDS": "4",
            "SWEEP_SECONDS": "1",
            "SLICE_SECONDS": "2",
            "MAX_ATTEMPTS": "12",
            "LOG_FORMAT": "json",
            "PROMETHEUS_MULTIPROC_DIR": str(self.folder / "metrics"),
            mechanisms.VARIABLE: ",".join(self._without),
            **self.plan.settings,
        }

    def start(self, name: str, **environment: str) -> None:
        """Start one of the pipeline's processes (again), with more in its environment than the others have."""
        quiet = ("--loglevel", "info", "--without-gossip", "--without-mingle")
        celery = ["-m", "celery", "-A", "tests.chaos.quick_worker"]
        node = ("-c", "2", "-n", f"{name}@%h")
        if name.startswith("dispatch"):
            arguments = [*celery, "worker", "-Q", "dispatch", *node, *quiet]
        elif name.startswith("records"):
            arguments = [*celery, "worker", "-Q", "intake,events,upkeep", *node, *quiet]
        elif name.startswith("beat"):
            arguments = [*celery, "beat", "--loglevel", "warning", "--pidfile", ""]
        else:
            bind = ["--host", "127.0.0.1", "--port", str(self.web_port)]
            size = ["--processes", "1" if self.short else "2", "--threads", "8"]
            arguments = ["-m", "pipeline.web", "tests.chaos.quick_web:app", *bind, *size]
        log = self.folder / "logs" / f"{name}.log"
        self._log_begins[name] = log.stat().st_size if log.exists() else 0
        self._environments[name] = environment = self._environments.get(name, {}) | environment
        self.stack.environment.update(environment | {"CHAOS_CLOCK": str(self._clock(name))})
        try:
            self._parts[name] = self.stack.start(name, arguments)
        finally:
            for variable in environment:
                del self.stack.environment[variable]

    def become(self, name: str, **environment: str) -> None:
        """Restart a part, warm, with this in its environment, as when another release is rolled out."""
        self.note(f"{name} becomes {environment}")
        self._stop(self._parts[name], signal.SIGTERM, 30.0)
        self._environments[name] = {}
        self.start(name, **environment)

    def end(self, name: str) -> None:
        """End a part for good."""
        part = self._parts.pop(name)
        self._stop(part, signal.SIGTERM, 30.0)

    # faults

    def note(self, fault: str, *, kills: bool = False) -> None:
        """Write a fault down, with its time; one that *kills* a process with SIGKILL is counted among those too."""
        self.faults.append(fault)
        self.kills += kills
        self.log(fault)

    def log(self, line: str) -> None:
        """Write a line into the rig's own log."""
        self._log.write(f"{datetime.now(UTC).isoformat()} {line}\n")
        self._log.flush()

    def pause(self, least: float, most: float) -> None:
        """Let a random while pass: the moment of a fault is what the seed decides."""
        time.sleep(self.rng.uniform(least, most))

    def kill_child(self, name: str) -> bool:
        """SIGKILL one of a part's child processes; its parent starts another."""
        self._await_started(name)
        children = self._children(name)
        if not children:
            return False
        victim = self.rng.choice(children)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
            self.note(f"kill -9 of a child of {name}", kills=True)
            return True
        return False

    def kill_parent(self, name: str, *, down_seconds: float = 0.0) -> None:
        """SIGKILL a part's main process alone, so that its children are orphaned; then start the part again."""
        orphans = self._children(name)
        self.note(f"kill -9 of the main process of {name}", kills=True)
        self._end(name, lambda part: part.process.kill())
        time.sleep(down_seconds)
        if name == "web":  # its processes end once they have noticed
            psutil.wait_procs(orphans, timeout=35)
        self.start(name)

    def kill_whole(self, name: str, *, down_seconds: float = 0.0) -> None:
        """SIGKILL a part with all its children, as when its machine dies; then start it again."""
        self.note(f"kill -9 of all processes of {name}", kills=True)
        self._end(name, lambda part: os.killpg(part.process.pid, signal.SIGKILL))
        time.sleep(down_seconds)
        self.start(name)

    def freeze(self, name: str) -> None:
        """SIGSTOP a part with all its children: a machine that hangs."""
        self.note(f"{name} frozen")
        os.killpg(self._parts[name].process.pid, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let a frozen part go on."""
        os.killpg(self._parts[name].process.pid, signal.SIGCONT)

    def stop_warm(self, name: str, *, seconds: float = 30.0) -> float:
        """SIGTERM, as a deployment does; wait for the end, start it again, return how long the end took."""
        self.note(f"SIGTERM to {name}")
        took = self._stop(self._parts[name], signal.SIGTERM, seconds)
        self.start(name)
        return took

    def stop_quick(self, name: str, *, patience: float, seconds: float = 30.0) -> float:
        """SIGTERM, then SIGQUIT once patience is over; wait, start it again, return the time from SIGQUIT on."""
        self.note(f"SIGTERM to {name}, SIGQUIT {patience:.1f} s later")
        part = self._parts[name]
        part.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            part.process.wait(patience)
        took = self._stop(part, signal.SIGQUIT, seconds)
        self.start(name)
        return took

    def _stop(self, part: Part, how: signal.Signals, seconds: float) -> float:
        began = time.monotonic()
        part.process.send_signal(how)
        part.process.wait(seconds)
        self.stack.parts.remove(part)
        return time.monotonic() - began

    def set_clock(self, name: str, seconds: float) -> None:
        """Let the wall clock of a part's machine be off by so much from now on, also when it is started again."""
        self.note(f"the clock of {name} is off by {seconds:+.0f} s")
        draft = self._clock(name).with_suffix(".draft")
        draft.write_text(str(seconds))
        draft.rename(self._clock(name))

    def _clock(self, name: str) -> Path:
        return self.folder / f"clock-{name}"

    def logged(self, name: str, event: str) -> list[dict[str, Any]]:
        """The lines of this event in a part's log."""
        text = (self.folder / "logs" / f"{name}.log").read_text("utf-8", "replace")
        found = [line for line in text.splitlines() if line.startswith("{") and f'"{event}"' in line]
        return [one for line in found if (one := json.loads(line)).get("event") == event]

    def metrics(self) -> str:
        """What `/metrics` says."""
        with _patiently(f"{self.web}/metrics") as answer:
            return str(answer.read().decode())

    def revive(self) -> list[str]:
        """Start every part again that ended by itself, as a supervisor does, and return their names."""
        ended = [name for name, part in self._parts.items() if part.process.poll() is not None]
        for name in ended:
            self.log(f"{name} had ended by itself")
            self.stack.parts.remove(self._parts[name])
            self.start(name)
        return ended

    def kill_valkey(self, *, down_seconds: float, wipe: bool = False) -> None:
        """SIGKILL the private Valkey, wait, start it over the same port and disk (or an empty one)."""
        self.note(
            f"kill -9 of Valkey, away for {down_seconds:.1f} s{', its disk empty after' if wipe else ''}", kills=True
        )
        self.valkey.kill()
        if wipe:
            self.valkey.wipe()
        time.sleep(down_seconds)
        self.valkey.start()

    def _children(self, name: str) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._parts[name].process.pid).children(recursive=True)
        return []

    def _await_started(self, name: str) -> None:
        """Wait until a part has started: a Celery worker that loses a child before gives up, and says so."""
        started = b"Started worker" if name == "web" else b" ready."
        part, ends = self._parts[name], time.monotonic() + 60
        while part.process.poll() is None and time.monotonic() < ends:
            with (self.folder / "logs" / f"{name}.log").open("rb") as log:
                log.seek(self._log_begins[name])
                if started in log.read():
                    return
            time.sleep(0.05)

    def _end(self, name: str, how: Callable[[Part], object]) -> None:
        part = self._parts.pop(name)
        how(part)
        part.process.wait(30)
        self.stack.parts.remove(part)

    # what the sandbox says and does

    def control(self, **changes: Any) -> None:
        """Change the sandbox's settings."""
        if changes:
            _json(f"{self.sandbox}/_control", changes)

    def calm(self, plan: Plan) -> None:
        """Set the sandbox to what *plan* says, whatever an experiment before did to it.

        In the short form calls that are not what an experiment is about have their last event alone.
        """
        calm = {"latency_ms": 15, "stall_seconds": 6, "late_seconds": 2, "call_seconds": 0.5, "faults": "none"}
        open_ = {"rate": None, "api_keys": [KEY], "gone_campaigns": [], "webhooks_paused": False, "lead_schema": None}
        open_["lifecycle"] = "final" if self.short else "mixed"
        self.control(**{**calm, **open_, **plan.sandbox})

    def stats(self) -> dict[str, Any]:
        """The sandbox's counters."""
        found: dict[str, Any] = _json(f"{self.sandbox}/_stats")
        return found

    def flush_webhooks(self) -> None:
        """Make the sandbox repeat now what it would repeat later, so that its own backoff costs no time."""
        _json(f"{self.sandbox}/_webhooks/flush", {})

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The sandbox's journal or its record of webhooks."""
        with _patiently(f"{self.sandbox}/_{name}") as answer:
            return [json.loads(line) for line in answer]

    def waiting(self) -> dict[str, int]:
        """Messages of leads and events in the broker."""
        return self.rabbit.waiting() if self.rabbit is not None else self.valkey.waiting()

    def spooled(self) -> int:
        """Files in the spool."""
        return len(list(self.spool.glob("*.events"))) if self.spool.is_dir() else 0


def _json(url: str, payload: object = None) -> Any:
    with _patiently(url, payload) as answer:
        return json.load(answer)


def _patiently(url: str, payload: object = None) -> Any:
    """Ask the sandbox, also while it refuses connections because an experiment told it to."""
    data = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    deadline = time.monotonic() + 20
    while True:
        try:
            return urllib.request.urlopen(request, timeout=20)
        except urllib.error.HTTPError:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
