"""What a pipeline with nothing to do costs: CPU time of its workers and of beat, and the lines that they log.

Both workers and beat run as the Procfile has them, over an empty ledger on PostgreSQL and a private Valkey. After a
warm-up, which everything that happens once falls into, CPU time is read from `/proc` over a minute. What Valkey and
PostgreSQL spend meanwhile is said beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil

from bench.backends import Backends, await_
from bench.figures import Figure, absolute, console
from pipeline.coordination.connection import connect
from pipeline.coordination.heartbeats import Heartbeats
from pipeline.devstack.supervisor import Part

_WARM_UP_SECONDS = 20.0
_SECONDS = 60.0
_WORKER = ("--loglevel", "info", "--without-gossip", "--without-mingle")


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module; a round is one minute, and there are at most three."""
    services.clean_valkey()
    with services.ledger() as ledger:
        url = ledger.database.url.render_as_string(hide_password=False)
        settings = services.settings(database_url=url, log_level="info")
        with services.processes(services.environment(settings)) as stack:
            parts = [
                stack.celery("dispatch", "worker", "-Q", "dispatch", "-c", "2", "-n", "dispatch@%h", *_WORKER),
                stack.celery(
                    "records", "worker", "-Q", "intake,events,upkeep", "-c", "2", "-n", "records@%h", *_WORKER
                ),
                stack.celery("beat", "beat", "--loglevel", "info", "--pidfile", ""),
            ]
            heartbeats = Heartbeats(connect(services.broker_url))
            await_(lambda: len(heartbeats.alive()) == len(parts), "the heartbeats of the workers and of beat")
            time.sleep(_WARM_UP_SECONDS)
            taken = [_minute(services, parts) for _ in range(1 if quick else min(rounds, 3))]
    note = "% of a core, over a minute: two workers of two processes each, and beat; PostgreSQL"
    return [
        absolute("idle_cpu", [one["all"] for one in taken], unit="%", goal=2.0, better="lower", note=note),
        absolute(
            "idle_lines", [one["lines"] for one in taken], unit="lines/min", goal=0.0, better="lower",
            note="what the same processes log at the level info",
        ),
    ]  # fmt: skip


def _minute(services: Backends, parts: list[Part]) -> Mapping[str, float]:
    before, lines, valkey = {part.name: _cpu_seconds(part) for part in parts}, _lines(parts), _valkey_seconds(services)
    began = time.monotonic()
    time.sleep(_SECONDS)
    seconds = time.monotonic() - began
    share = {name: (_cpu_seconds(part) - before[name]) * 100 / seconds for name, part in _named(parts)}
    beside = {"valkey": (_valkey_seconds(services) - valkey) * 100 / seconds}
    logged = (_lines(parts) - lines) * 60 / seconds
    shown = ", ".join(f"{name} {each:.2f} %" for name, each in (share | beside).items())
    console.print(f"  {shown}; {logged:.0f} lines", highlight=False)
    return {"all": sum(share.values()), "lines": logged}


def _named(parts: list[Part]) -> list[tuple[str, Part]]:
    return [(part.name, part) for part in parts]


def _cpu_seconds(part: Part) -> float:
    parent = psutil.Process(part.process.pid)
    times = [one.cpu_times() for one in (parent, *parent.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _valkey_seconds(services: Backends) -> float:
    used = services.valkey.info("cpu")
    return float(used["used_cpu_sys"] + used["used_cpu_user"])


def _lines(parts: list[Part]) -> int:
    return sum(len(part.log.read_bytes().splitlines()) for part in parts)
