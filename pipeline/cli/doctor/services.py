"""What the doctor asks of what the processes share: broker, limit, ledger, clocks, signs of life."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from pipeline.broker import QUEUES, Broker, BrokerUnavailable, celery_app
from pipeline.cli.doctor.finding import Finding, Verdict, one_line
from pipeline.cli.session import sqlite_file
from pipeline.coordination.connection import RedisUnavailable, connect
from pipeline.coordination.heartbeats import Heartbeat, Heartbeats
from pipeline.coordination.inspection import Condition, inspecting
from pipeline.domain.campaign import CampaignState, HoldKind
from pipeline.ledger import Ledger, SchemaMismatch, ledger_is_at_fault
from pipeline.settings import Settings, SettingsError

_WARN_SECONDS, _FAIL_SECONDS = 1.0, 5.0  # between two clocks; claims and leases allow for some seconds
_LATE_SECONDS = 60.0  # without a sweep that ended


def broker(settings: Settings) -> Iterator[Finding]:
    """Whether it answers, keeps what it takes, and never evicts."""
    try:
        found = Broker(celery_app(settings, works=False))
        found.ping()
        depths, server = found.depths(), found.server()
    except BrokerUnavailable as error:
        yield Finding("broker", "fail", f"{error}: check BROKER_URL and that it runs")
        return
    waiting = ", ".join(f"{name} {count:,}" for name, count in depths.items())
    if not settings.broker_url.startswith(("redis", "sentinel")):
        yield Finding("broker", "ok", f"{server or 'the broker'} answers; messages waiting: {waiting}")
        alarms = "`rabbitmq-diagnostics check_local_alarms` on its host says whether one blocks publishers"
        text = f"queues and messages are durable by declaration; its memory and disk alarms do not show here: {alarms}"
        yield Finding("persistence", "ok", text)
        return
    yield Finding("broker", "ok", f"answers; messages waiting: {waiting}")
    if settings.broker_url.startswith("redis"):
        yield from _redis(settings.broker_url)


def _redis(url: str) -> Iterator[Finding]:
    try:
        with inspecting(url, "the broker") as server:
            found = server.condition()
    except RedisUnavailable as error:
        yield Finding("persistence", "warn", f"the broker does not report how it is set up ({one_line(error)})")
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
    """Whether the Redis of the rate limit answers, and keeps what it is told."""
    try:
        url = settings.limiter_url
        with inspecting(url, "the rate limit") as server:
            found = server.condition()
    except SettingsError as error:
        yield Finding("limit", "fail", str(error))
    except RedisUnavailable as error:
        yield Finding("limit", "fail", f"{one_line(error)}: nothing is sent without it; check REDIS_URL")
    else:
        if url != settings.broker_url and found.eviction != "noeviction":
            text = "its Redis may evict the limit and send too fast for a moment; set maxmemory-policy noeviction"
            yield Finding("limit", "warn", text)
        else:
            yield Finding("limit", "ok", "rate limiter: Redis reachable")


def ledger(settings: Settings, clock: Callable[[], datetime]) -> Iterator[Finding]:
    """Whether it answers, has every table and index, writes with care, and agrees about the time."""
    file = sqlite_file(settings.database_url)
    if file is not None and not file.exists():  # to look must not create it
        yield Finding("ledger", "fail", f"there is no ledger at {file} yet: run `pipeline migrate`")
        yield from _clocks(settings, None, clock)
        return
    found = Ledger(settings.database_url)
    try:
        version = found.health.version()
        hint = "; for one host, PostgreSQL for more" if found.database.is_sqlite else ""
        yield Finding("ledger", "ok", f"{found.describe()} answers ({version}{hint})")
        yield from _tables(found)
        yield from _clocks(settings, found, clock)
    except Exception as error:
        if not ledger_is_at_fault(error):
            raise
        text = f"{found.describe()} cannot be used ({one_line(error)}): check DATABASE_URL"
        yield Finding("ledger", "fail", text)
    finally:
        found.close()


def _tables(found: Ledger) -> Iterator[Finding]:
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
        text = f"the database lacks {', '.join(missing)}: somebody dropped them, or a restore was not whole"
        yield Finding("indexes", "fail", f"{text}; restore, or create them as the migrations do")
    else:
        yield Finding("indexes", "ok", "every table, column, index and trigger is there")
    risks = found.health.risks()
    yield Finding("durability", "warn" if risks else "ok", "; ".join(risks) or "what is written is synced to disk")
    yield _holds(found)


def _holds(found: Ledger) -> Finding:
    """Whether campaigns are held; a key that is refused or missing is a fault of the installation itself."""
    kinds: dict[str, int] = {}
    for campaign in found.reports.campaigns():
        if campaign["state"] == CampaignState.HELD:
            kinds[campaign["hold_kind"]] = kinds.get(campaign["hold_kind"], 0) + 1
    if not kinds:
        return Finding("campaigns", "ok", "none is held")
    verdict: Verdict = "fail" if {HoldKind.REFUSED_KEY, HoldKind.NO_KEY} & kinds.keys() else "warn"
    told = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
    return Finding("campaigns", verdict, f"{told}: held, so nothing of theirs is sent; see `pipeline campaign list`")


def _clocks(settings: Settings, found: Ledger | None, clock: Callable[[], datetime]) -> Iterator[Finding]:
    """This host's clock against that of Redis and of the database; half of a question's time is the error."""
    off: dict[str, float] = {}
    if found is not None and not found.database.is_sqlite:
        off["the database's"] = _offset(found.health.clock, clock)
    try:
        with inspecting(settings.limiter_url, "the rate limit") as server:
            off["Redis'"] = _offset(server.clock, clock)
    except (RedisUnavailable, SettingsError):
        if not off:
            return  # the limit's finding says why
    worst = max((abs(seconds) for seconds in off.values()), default=0.0)
    told = ", ".join(f"{name} is {seconds:+.1f} s off" for name, seconds in off.items())
    if worst >= _WARN_SECONDS:
        verdict: Verdict = "fail" if worst >= _FAIL_SECONDS else "warn"
        text = f"by this host's clock {told}: claims and limits count on one time; let NTP set every host"
        yield Finding("clock", verdict, text)
    else:
        yield Finding("clock", "ok", f"by this host's clock {told}")


def _offset(remote: Callable[[], datetime], clock: Callable[[], datetime]) -> float:
    """By how many seconds a clock is ahead of ours, as far as that is certain."""
    before = clock()
    theirs = remote()
    after = clock()
    doubt = (after - before) / 2
    off = (theirs - (before + doubt)).total_seconds()
    certain = max(0.0, abs(off) - doubt.total_seconds())
    return certain if off > 0 else -certain


def signs_of_life(settings: Settings) -> Iterator[Finding]:
    """Whether somebody works on each queue, a beat beats, the sweeps come to their end, and a web process serves."""
    try:
        with connect(settings.limiter_url) as client:
            heartbeats = Heartbeats(client)
            alive, swept = heartbeats.alive(), heartbeats.last_run("sweep")
    except (RedisUnavailable, SettingsError):
        yield Finding("workers", "fail", "who lives is not known, because the limit's Redis does not tell")
        return
    yield from _workers([sign for sign in alive if sign.kind == "worker"])
    beats = [sign.name for sign in alive if sign.kind == "beat"]
    if not beats:
        text = "no beat: retries, probes and lost claims wait; start `celery -A worker beat`"
        yield Finding("beat", "fail", text)
    elif swept is None or swept > max(_LATE_SECONDS, 10 * settings.sweep_seconds):
        since = "none ended yet" if swept is None else f"the last ended {swept:,.0f} s ago"
        text = f"{', '.join(beats)} beats, but no sweep comes to its end ({since}): look at the worker for upkeep"
        yield Finding("beat", "warn", text)
    else:
        yield Finding("beat", "ok", f"{', '.join(beats)}; the last sweep ended {max(0.0, swept):,.0f} s ago")
    webs = [sign.name for sign in alive if sign.kind == "web"]
    if webs:
        yield Finding("web", "ok", ", ".join(webs))
    else:
        text = "no web process noted itself: Futwork's events reach nobody; start `gunicorn web:app`"
        yield Finding("web", "warn", text)


def _workers(workers: list[Heartbeat]) -> Iterator[Finding]:
    served = {queue for sign in workers for queue in sign.queues}
    for queue in QUEUES:
        if queue not in served:
            text = f"nobody works on the queue {queue}: start `celery -A worker worker -Q {queue}`"
            yield Finding("workers", "fail", text)
    if served.issuperset(QUEUES):
        names = ", ".join(sign.name for sign in workers)
        yield Finding("workers", "ok", f"{len(workers)} workers serve every queue: {names}")
