"""Leads sent in a minute at a limit, against what the limit allows, over four processes and three campaigns.

The account's limit is the one that counts; each campaign's own is as high. The sandbox notes when each POST arrives:
the figure counts those of the minute that begins with the first, and the busiest second of any, which must not
hold more than the limit and its burst.
"""

from __future__ import annotations

import time
from collections import deque

import sqlalchemy as sa

from bench.backends import CAMPAIGN, Backends
from bench.figures import Figure, absolute, compare, console
from bench.submit import fill
from pipeline.coordination.limiter import burst_of
from pipeline.settings import Rate
from pipeline.wiring import Services

RATES = (20, 200, 1000)
_SECONDS = 60
_CAMPAIGNS = tuple(CAMPAIGN[:-1] + end for end in "abc")
_QUIET = ("--loglevel", "warning", "--without-gossip", "--without-mingle")


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:  # noqa: ARG001 - as every figure has it
    """The figures of this module; one round a rate, because each takes its time by the clock."""
    seconds = 8 if quick else _SECONDS
    figures = []
    for rate in RATES:
        allowed = rate * seconds + burst_of(Rate(rate, 1))
        sent, busiest = _run(services, rate, seconds)
        console.print(f"  {rate}/s: {sent:,} of {allowed:,} sent, {busiest:,} in the busiest second", highlight=False)
        note = f"{seconds} s at {rate}/s, 4 processes, 3 campaigns of one account, against limit + burst"
        figures.append(
            compare(f"rate_{rate}", [float(sent)], [float(allowed)], unit="leads", goal=0.98, note=f"sent; {note}")
        )
        most = rate + burst_of(Rate(rate, 1))
        figures.append(
            absolute(
                f"rate_{rate}_busiest", [busiest / most], unit="x", goal=1.0, better="lower",
                note=f"busiest sliding second at the sandbox ({busiest:,}) over limit + burst ({most:,}); {note}",
            )
        )  # fmt: skip
    return figures


def _run(services: Backends, rate: int, seconds: int) -> tuple[int, int]:
    """How many leads were sent in *seconds* from the first on, and in the busiest second."""
    services.clean_valkey()
    with services.ledger() as ledger, services.sandbox() as sandbox:
        settings = services.settings(
            database_url=ledger.database.url.render_as_string(hide_password=False),
            futwork_base_url=sandbox.base_url,
            account_rate=f"{rate}/s",
            campaign_rate=f"{rate}/s",
        )
        for place, campaign in enumerate(_CAMPAIGNS):
            fill(ledger, rate * (seconds + 4), start=place * 1_000_000, campaign_id=campaign)
        if not ledger.database.is_sqlite:
            with ledger.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(sa.text("VACUUM ANALYZE leads"))
        with services.processes(services.environment(settings)) as stack:
            stack.celery("dispatch", "worker", "-Q", "dispatch", "-c", "4", "-n", "dispatch@%h", *_QUIET)
            parts = Services(settings)
            deadline = time.monotonic() + seconds + 60
            first, accepted = 0.0, 0
            while not first or time.monotonic() < first + seconds + 1:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{accepted:,} leads after {seconds + 60} s at {rate}/s")
                for campaign in _CAMPAIGNS:
                    parts.wake(campaign)  # as the sweep does
                accepted = sandbox.accepted()
                first = first or (time.monotonic() if accepted else 0.0)
                time.sleep(0.5)
        times = sorted(one["time"] for one in sandbox.journal())
    sent = sum(moment < times[0] + seconds for moment in times)
    return sent, _busiest_second(times)


def _busiest_second(times: list[float]) -> int:
    window: deque[float] = deque()
    most = 0
    for moment in times:
        window.append(moment)
        while window[0] <= moment - 1:
            window.popleft()
        most = max(most, len(window))
    return most
