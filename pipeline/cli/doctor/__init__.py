"""`pipeline doctor`: what is wrong with an installation, each finding with what to do.

`installation` checks this host: settings, versions, spool, disk. `services` checks what the processes share: broker,
rate limiter, ledger, clocks, running processes. `reach` checks the way to Futwork, and our webhook from the outside.
No check changes anything. A check that cannot run says so, and the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from pipeline.cli.doctor import installation, reach, services
from pipeline.cli.doctor.finding import Finding, Verdict
from pipeline.cli.session import now, settings_beside_up, watching
from pipeline.settings import SettingsError, load_settings

__all__ = ["Finding", "Verdict", "examine"]


def examine(
    *, webhook_url: str = "", check_key: bool = False, clock: Callable[[], datetime] = now
) -> Iterator[Finding]:
    """Check one thing after the other.

    *webhook_url* is checked in the place of `WEBHOOK_URL`; *check_key* allows one request to Futwork that cannot create
    a call; *clock* is this host's.
    """
    try:
        settings = load_settings()
    except SettingsError as error:
        yield Finding("settings", "fail", str(error))
        return
    yield Finding("settings", "ok", f"read; submissions go to {settings.futwork_base_url}")
    with_broker = settings_beside_up()
    if with_broker.broker_url != settings.broker_url:
        text = (
            "`pipeline up` or another command runs a private broker under ./var; the findings about address, key and"
            " tokens are of this command's settings, not of those that `pipeline up` gives its parts"
        )
        yield Finding("settings", "warn", text)
    yield installation.limits(settings)
    yield installation.versions()
    yield from installation.secrets(settings)
    yield reach.futwork(settings)
    if check_key:
        yield from reach.keys(settings)
    if not with_broker.broker_url:
        text = "BROKER_URL is not set, and no private broker runs under ./var: set it, or run `pipeline up`"
        yield Finding("broker", "fail", text)
        yield from services.ledger(settings, clock)
    else:
        with watching(with_broker) as watch:
            seen = watch.look()
        yield from services.broker(with_broker, seen)
        yield from services.limit(with_broker)
        yield from services.ledger(with_broker, clock)
        yield from services.processes(with_broker, seen)
    yield installation.spool(settings)
    yield installation.disk(settings)
    if webhook_url or settings.webhook_url:
        yield reach.webhook(settings, webhook_url or settings.webhook_url)
        if settings.operators():
            yield reach.status_pages(webhook_url or settings.webhook_url)
