"""The webhook's 99th percentile while somebody looks at the status pages, against the same while nobody does.

One web process with 16 threads, over a ledger with a hundred thousand leads. In turns it is loaded with
webhooks alone, with the overview open in five browsers that refresh every ten seconds, and with pages asked for without
a pause by four at a time, which is more than a process makes.
"""

from __future__ import annotations

import contextlib
import threading
import time

from bench.backends import CAMPAIGN, Backends, run_json
from bench.figures import Figure, compare, interleave
from bench.ops_pages import Client, pages_server, write
from pipeline.ledger import Ledger

_LEADS = 100_000
_OPEN, _HAMMERING = 5, 4  # browsers; askers without a pause
_REFRESH_SECONDS = 10.0


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    seconds = 4 if quick else 12
    with contextlib.ExitStack() as stack:
        url = (
            stack.enter_context(services.database()) if services.has_postgres else f"sqlite:///{services.folder}/ops.db"
        )
        write(url, _LEADS // 10 if quick else _LEADS)
        client = stack.enter_context(pages_server(services, url))
        ledger = stack.enter_context(contextlib.closing(Ledger(url)))

        def load(askers: int, pause: float) -> float:
            services.clean_valkey()
            stop = threading.Event()
            threads = [threading.Thread(target=_look, args=(client, ledger, stop, pause, n)) for n in range(askers)]
            for thread in threads:
                thread.start()
            hook = f"http://127.0.0.1:{client.port}/webhooks/futwork"
            done = run_json(["-m", "bench.load", hook, "--seconds", str(seconds), "--connections", "16"], {})
            stop.set()
            for thread in threads:
                thread.join()
            if done["wrong"]:
                raise RuntimeError(f"{done['wrong']} webhooks were not answered with 200")
            return done["p99_ms"]

        load(0, 0)
        numbers = interleave(
            rounds,
            {
                "p99 in ms, pages open": lambda: load(_OPEN, _REFRESH_SECONDS),
                "p99 in ms, no pages": lambda: load(0, 0),
                "p99 in ms, pages hammered": lambda: load(_HAMMERING, 0),
            },
        )
    opened, alone, hammered = numbers.values()
    note = "1 process x 16 threads, 16 connections"
    return [
        compare(
            "ops_webhook_p99", opened, alone, unit="ms", goal=1.15, better="lower",
            note=f"webhook with the overview open in {_OPEN} browsers, against without; {note}",
        ),
        compare(
            "ops_webhook_p99_hammered", hammered, alone, unit="ms", goal=None, better="lower",
            note=f"webhook with pages asked for by {_HAMMERING} at a time without a pause; {note}",
        ),
    ]  # fmt: skip


def _look(client: Client, ledger: Ledger, stop: threading.Event, pause: float, number: int) -> None:
    mine = Client(client.port, ledger)
    if pause:
        stop.wait(pause * number / _OPEN)  # browsers do not refresh all at once
    while not stop.is_set():
        with contextlib.suppress(RuntimeError):  # busy: asked to come back
            mine.get("/ops/" if pause or time.monotonic_ns() % 2 else f"/ops/campaigns/{CAMPAIGN}")
        stop.wait(pause)
