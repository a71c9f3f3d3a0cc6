"""Webhook requests a second with a durable answer, and their 99th percentile.

Three servers stand side by side, each gunicorn with one process, 16 threads and the worker of our deployment: ours, a
bare Flask view that answers 200 and keeps nothing, and a Flask view that calls `delay()` for each request. They are
loaded in turns, over as many connections as they have threads. After each turn of ours every answered event is counted
in the broker.
"""

from __future__ import annotations

import base64
import json

from bench.backends import Backends, await_, run_json
from bench.figures import Figure, compare, interleave
from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import Supervisor

_CONNECTIONS = 16
_WORKER = ("--worker-class", "pipeline.web.serving.PatientWorker", "--workers", "1", "--threads", "16")
_GUNICORN = (*_WORKER, "--keep-alive", "30", "--log-level", "warning")


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    seconds = 2 if quick else 5
    tails: dict[str, list[float]] = {"ours": [], "bare": [], "delay": []}
    settings = services.settings(database_url=f"sqlite:///{services.folder / 'unused.db'}")
    with services.processes(services.environment(settings)) as stack:
        servers = {
            "ours": (_serve(stack, "ours", "web:app", "gunicorn.conf.py"), "/webhooks/futwork"),
            "bare": (_serve(stack, "bare", "bench.peers.flask_views:bare"), "/webhook"),
            "delay": (_serve(stack, "delay", "bench.peers.flask_views:delaying"), "/webhook"),
        }

        def load(name: str, *, for_seconds: float = seconds) -> float:
            services.clean_valkey()
            port, path = servers[name]
            url = f"http://127.0.0.1:{port}{path}"
            done = run_json(
                ["-m", "bench.load", url, "--seconds", str(for_seconds), "--connections", str(_CONNECTIONS)], {}
            )
            if done["wrong"]:
                raise RuntimeError(f"{name}: {done['wrong']} requests were not answered with 200")
            if name == "ours" and (kept := _events_in_broker(services)) != done["requests"]:
                raise RuntimeError(f"{kept:,} events in the broker for {done['requests']:,} answers")
            tails[name].append(done["p99_ms"])
            return done["per_second"]

        for name in servers:
            load(name, for_seconds=1)
            tails[name].clear()
        numbers = interleave(
            rounds,
            {
                "webhook, durable": lambda: load("ours"),
                "a bare Flask view": lambda: load("bare"),
                "a Flask view with delay()": lambda: load("delay"),
            },
        )
    services.clean_valkey()
    ours, bare, delay = numbers.values()
    note = f"gunicorn, 1 process x 16 threads, {_CONNECTIONS} connections, events of 1-3 kB"
    return [
        compare("webhook", ours, bare, unit="requests/s", goal=0.65, note=f"against a bare Flask view; {note}"),
        compare(
            "webhook_delay", ours, delay, unit="requests/s", goal=2.5, note=f"against one delay() a request; {note}"
        ),
        compare(
            "webhook_p99", tails["ours"], tails["bare"], unit="ms", goal=2.0, better="lower",
            note=f"99th percentile against a bare Flask view; {note}",
        ),
        compare(
            "webhook_p99_delay", tails["ours"], tails["delay"], unit="ms", goal=None, better="lower",
            note=f"99th percentile against one delay() a request; {note}",
        ),
    ]  # fmt: skip


def _serve(stack: Supervisor, name: str, app: str, config: str | None = None) -> int:
    port = free_port()
    arguments = ["-m", "gunicorn", app, "--bind", f"127.0.0.1:{port}", *_GUNICORN]
    stack.start(name, [*arguments, "--config", config or "python:bench.peers"])
    await_(lambda: listens(port), f"gunicorn {app}")
    return port


def listens(port: int) -> bool:
    """Whether a server of this machine listens on the port."""
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _events_in_broker(services: Backends) -> int:
    total = 0
    for raw in services.valkey.lrange("events", 0, -1):
        args, _, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
        total += len(args[0]["events"])
    return total
