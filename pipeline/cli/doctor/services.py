"""What the doctor asks of what the processes share: broker, rate limiter, ledger, clocks, running processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from pipeline.broker import Broker, BrokerUnavailable, celery_app
from pipeline.cli.doctor.finding import Finding, Verdict
from pipeline.cli.session import sqlite_file
from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.inspection import Condition, inspecting
from pipeline.ledger import Ledger, SchemaMismatch, ledger_is_at_fault
from pipeline.settings import Settings, SettingsError
from pipeline.status.attention import Attention, of_ledger, of_processes
from pipeline.status.snapshot import Snapshot
from pipeline.status.text import count, first_line, span, unclear

_WARN_SECONDS, _FAIL_SECONDS = 1.0, 5.0  # between two clocks; claims and leases allow for some seconds
_FAULTS = ("totals_differ", "held_refused_key", "held_no_key")


def broker(settings: Settings, seen: Snapshot) -> Iterator[Finding]:
    """Whether it answers, stores what it accepts, and never evicts."""
    if seen.broker.value is None:
        yield Finding("broker", "fail", f"{seen.broker.why}: check BROKER_URL and that it runs")
        return
    waiting = "messages waiting: " + ", ".join(f"{name} {n:,}" for name, n in seen.broker.value.items())
    if not settings.broker_url.startswith(("redis", "sentinel")):
        try:
            server = Broker(celery_app(settings, works=False)).server()
        except BrokerUnavailable:
            server = ""
        yield Finding("broker", "ok", f"{server or 'the broker'} answers; {waiting}")
        alarms = "`rabbitmq-diagnostics check_local_alarms` on its host shows whether one blocks publishers"
        text = f"queues and messages are durable by declaration; its memory and disk alarms are not seen here: {alarms}"
        yield Finding("persistence", "ok", text)
        return
    yield Finding("broker", "ok", f"answers; {waiting}")
    if settings.broker_url.startswith("redis"):
        yield from _redis(settings.broker_url)


def _redis(url: str) -> Iterator[Finding]:
    try:
        with inspecting(url, "the broker") as server:
            found = server.condition()
    except RedisUnavailable as error:
        yield Finding("persistence", "warn", f"the broker does not report how it is set up ({first_line(error)})")
        return
    if not found.append_only:
        text = "the append-only file is off: a restart of the broker loses what is queued; set `appendonly yes`"
        yield Finding("persistence", "warn", text)
    elif not found.can_write:
        yield Finding("persistence", "fail", "the broker cannot write its append-only file: is its disk full?")
    else:
        yield Finding("persistence", "ok", "append-only file is on: queued leads survive the broker's restart")
    if found.eviction == "noeviction":
        yield Finding("eviction", "ok", "never evicts")
    else:
        text = f"maxmemory-policy is {found.eviction}: leads may be dropped; set noeviction"
        yield Finding("eviction", "fail", text)
    yield _memory(found)


def _memory(found: Condition) -> Finding:
    used, most = found.used_bytes, found.most_bytes
    if not most or used < 0.8 * most:
        bound = f" of {most // 1024**2:,}" if most else ""
        return Finding("memory", "ok", f"the broker uses {used // 1024**2:,} MiB{bound}")
    verdict: Verdict = "fail" if used >= 0.95 * most else "warn"
    text = f"the broker uses {used:,} of {most:,} bytes: when full it refuses leads; raise maxmemory or add workers"
    return Finding("memory", verdict, text)


def limit(settings: Settings) -> Iterator[Finding]:
    """Whether the Redis of the rate limiter answers, and keeps what it is given."""
    try:
        url = settings.limiter_url
        with inspecting(url, "the rate limiter") as server:
            found = server.condition()
    except SettingsError as error:
        yield Finding("limit", "fail", str(error))
    except RedisUnavailable as error:
        yield Finding("limit", "fail", f"{first_line(error)}: nothing is sent without it; check REDIS_URL")
    else:
        if url != settings.broker_url and found.eviction != "noeviction":
            text = "its Redis may evict the limit and send too fast for a moment; set maxmemory-policy noeviction"
            yield Finding("limit", "warn", text)
        else:
            yield Finding("limit", "ok", "rate limiter: Redis reachable")


def ledger(settings: Settings, clock: Callable[[], datetime]) -> Iterator[Finding]:
    """Whether it answers, has every table and index, syncs what it writes, and has the right time."""
    file = sqlite_file(settings.database_url)
    if file is not None and not file.exists():  # a check must not create it
        yield Finding("ledger", "fail", f"there is no ledger at {file} yet: run `pipeline migrate`")
        yield from _clocks(settings, None, clock)
        return
    found = Ledger(settings.database_url)
    try:
        version = found.health.version()
        hint = "; for one host, PostgreSQL for more" if found.database.is_sqlite else ""
        yield Finding("ledger", "ok", f"{found.describe()} answers ({version}{hint})")
        yield from _tables(found, settings)
        yield from _clocks(settings, found, clock)
    except Exception as error:
        if not ledger_is_at_fault(error):
            raise
        text = f"{found.describe()} cannot be used ({first_line(error)}): check DATABASE_URL"
        yield Finding("ledger", "fail", text)
    finally:
        found.close()


def _tables(found: Ledger, settings: Settings) -> Iterator[Finding]:
    current, head = found.revisions()
    try:
        found.check_schema()
    except SchemaMismatch as error:
        yield Finding("migrations", "fail", str(error))
        return
    if current == head:
        yield Finding("migrations", "ok", f"the tables are those of this release ({head})")
    else:
        text = f"the tables ({current}) are newer than this release ({head}), which works on them; update this host"
        yield Finding("migrations", "warn", text)
    missing = found.health.missing() if current == head else []
    if missing:
        text = f"the database lacks {', '.join(missing)}: somebody dropped them, or a restore was incomplete"
        yield Finding("indexes", "fail", f"{text}; restore, or create them as the migrations do")
    else:
        yield Finding("indexes", "ok", "every table, column, index and trigger is there")
    risks = found.health.risks()
    yield Finding("durability", "warn" if risks else "ok", "; ".join(risks) or "what is written is synced to disk")
    yield from _contents(found)
    yield _server_errors(found, settings)


def _contents(found: Ledger) -> Iterator[Finding]:
    """What needs attention in the ledger; a refused or missing key is a fault of the installation itself."""
    items = [one for one in of_ledger(found.reports.overview(now=found.now())) if one.level != "info"]
    for one in items:
        check = {"quarantine": "quarantine", "totals_differ": "totals", "uncertain": "uncertain"}.get(one.code)
        text = f"{one.sentence} See `{one.command}`."
        yield Finding(check or "campaigns", "fail" if one.code in _FAULTS else "warn", text)
    if not any(one.can_resume for one in items):
        yield Finding("campaigns", "ok", "none is held")


def _server_errors(found: Ledger, settings: Settings) -> Finding:
    """What an answer that proves nothing meant up to now, beside what the settings make of it."""
    seen = found.reports.unclear_answers()
    taken = sum(one["taken"] for one in seen if (one["http_status"] or 0) >= 500)
    text = "; ".join(map(unclear, seen)) or "every answer was clear up to now"
    if taken and settings.on_server_error == "retry":
        text = f"ON_SERVER_ERROR=retry, but Futwork had taken leads: {text}; set it to uncertain"
        return Finding("answers", "warn", text)
    return Finding("answers", "ok", f"ON_SERVER_ERROR={settings.on_server_error}; {text}")


def _clocks(settings: Settings, found: Ledger | None, clock: Callable[[], datetime]) -> Iterator[Finding]:
    """This host's clock against those of Redis and the database; the error is half of the time that an answer takes."""
    off: dict[str, float] = {}
    if found is not None and not found.database.is_sqlite:
        off["the database's"] = _offset(found.health.clock, clock)
    try:
        with inspecting(settings.limiter_url, "the rate limiter") as server:
            off["Redis'"] = _offset(server.clock, clock)
    except (RedisUnavailable, SettingsError):
        if not off:
            return  # the limit's finding says why
    worst = max((abs(seconds) for seconds in off.values()), default=0.0)
    told = ", ".join(f"{name} is {seconds:+.1f} s off" for name, seconds in off.items())
    if worst >= _WARN_SECONDS:
        verdict: Verdict = "fail" if worst >= _FAIL_SECONDS else "warn"
        text = f"by this host's clock {told}: claims and limits need one time; let NTP set every host"
        yield Finding("clock", verdict, text)
    else:
        yield Finding("clock", "ok", f"by this host's clock {told}")


def _offset(remote: Callable[[], datetime], clock: Callable[[], datetime]) -> float:
    """How many seconds a clock is ahead of ours, as far as that is certain."""
    before = clock()
    theirs = remote()
    after = clock()
    doubt = (after - before) / 2
    off = (theirs - (before + doubt)).total_seconds()
    certain = max(0.0, abs(off) - doubt.total_seconds())
    return certain if off > 0 else -certain


def processes(settings: Settings, seen: Snapshot) -> Iterator[Finding]:
    """Whether a worker serves each queue, beat runs, sweeps finish, and a web process runs."""
    shared = seen.shared.value
    if shared is None:
        text = "which processes run is unknown, because the rate limiter's Redis does not answer"
        yield Finding("workers", "fail", text)
        return
    found: dict[str | None, Attention] = {one.part: one for one in of_processes(shared, settings)}
    for part, kind in (("workers", "worker"), ("beat", "beat"), ("web", "web")):
        if (one := found.get(part)) is not None:
            yield Finding(part, "fail" if one.level == "stopped" else "warn", one.sentence)
            continue
        text = ", ".join(beat.name for beat in shared.of_kind(kind))
        if kind == "worker":
            text = f"{count(len(shared.of_kind(kind)), 'worker serves', 'workers serve')} every queue: {text}"
        if kind == "beat":
            text += f"; the last sweep finished {span(shared.last_runs['sweep'])} ago"
        yield Finding(part, "ok", text)
