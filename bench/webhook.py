"""Webhook requests a second with a durable answer, and their 99th percentile.

Four servers stand side by side, each with one process and 16 threads: ours; a bare Flask view that answers 200 and
keeps nothing; a Flask view that calls `delay()` for each request; and the bare view on our server. The second and the
third run under gunicorn's threads, as Flask's documentation deploys them. All are loaded in turns, over as many
connections as they have threads. After each turn of ours every answered event is counted in the broker.
"""

from __future__ import annotations

import base64
import json

from bench.backends import Backends, await_, run_json
from bench.figures import Figure, compare, interleave
from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import Supervisor

_CONNECTIONS = 16


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    seconds = 2 if quick else 5
    tails: dict[str, list[float]] = {"ours": [], "bare": [], "delay": [], "bare, ours": []}
    settings = services.settings(database_url=f"sqlite:///{services.folder / 'unused.db'}")
    with services.processes(services.environment(settings)) as stack:
        servers = {
            "ours": (_serve(stack, "ours", "pipeline.web.wsgi:app"), "/webhooks/futwork"),
            "bare": (_serve_as_usual(stack, "bare", "bench.peers.flask_views:bare"), "/webhook"),
            "delay": (_serve_as_usual(stack, "delay", "bench.peers.flask_views:delaying"), "/webhook"),
            "bare, ours": (_serve(stack, "bare-ours", "bench.peers.flask_views:bare"), "/webhook"),
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
            if name == "ours" and (kept := events_in_broker(services)) != done["requests"]:
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
                "a bare view on our server": lambda: load("bare, ours"),
            },
        )
    services.clean_valkey()
    ours, bare, delay, bare_on_ours = numbers.values()
    note = f"1 process x 16 threads, {_CONNECTIONS} connections, events of 1-3 kB"
    return [
        compare("webhook", ours, bare, unit="requests/s", goal=0.65, note=f"against a bare Flask view; {note}"),
        compare(
            "webhook_delay", ours, delay, unit="requests/s", goal=2.5, note=f"against one delay() a request; {note}"
        ),
        compare(
            "webhook_view", ours, bare_on_ours, unit="requests/s", goal=None,
            note=f"against a bare Flask view on our server; {note}",
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


def _serve(stack: Supervisor, name: str, app: str) -> int:
    port = free_port()
    stack.start(name, ["-m", "pipeline.web", app, "--host", "127.0.0.1", "--port", str(port), "--processes", "1"])
    await_(lambda: listens(port), f"the server of {app}")
    return port


def _serve_as_usual(stack: Supervisor, name: str, app: str) -> int:
    port = free_port()
    size = ["--workers", "1", "--threads", "16", "--keep-alive", "30", "--log-level", "warning"]
    config = ["--config", "python:bench.peers", "--no-control-socket"]
    stack.start(name, ["-m", "gunicorn", app, "--bind", f"127.0.0.1:{port}", *size, *config])
    await_(lambda: listens(port), f"gunicorn {app}")
    return port


def listens(port: int) -> bool:
    """Whether a server of this machine listens on the port."""
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def events_in_broker(services: Backends) -> int:
    """How many events wait in the broker."""
    total = 0
    for raw in services.valkey.lrange("events", 0, -1):
        args, _, _ = json.loads(base64.b64decode(json.loads(raw)["body"]))
        total += len(args[0]["events"])
    return total
