"""What the doctor checks on this host: settings that fit together, versions, secrets, the spool, the disk."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from pipeline.cli.doctor.finding import Finding
from pipeline.cli.session import sqlite_file
from pipeline.settings import Settings

TESTED = {"celery": ">=5.7,<5.8", "kombu": ">=5.7,<5.8", "redis": ">=6,<9", "sqlalchemy": ">=2.0.40,<3"}
"""The versions that the tests ran on; redelivery, shutdown and reconnecting were observed on these."""

_GRACE_SECONDS = 55  # that docker-compose.yml gives a worker to end, less a moment
_SOON_SECONDS = 600  # evidence of a call usually comes within minutes
_WARN_BYTES, _FAIL_BYTES = 1024**3, 64 * 1024**2


def limits(settings: Settings) -> Finding:
    """Rates and times that are valid one by one, but make no sense together."""
    odd = []
    if settings.campaign_rate.per_second > settings.account_rate.per_second:
        odd.append(
            f"CAMPAIGN_RATE ({settings.campaign_rate}) is above ACCOUNT_RATE ({settings.account_rate}), which holds for"
            " all campaigns together: no campaign reaches its rate"
        )
    longest = settings.longest_post.total_seconds()
    if longest > _GRACE_SECONDS:
        odd.append(
            f"CONNECT_TIMEOUT_SECONDS + READ_TIMEOUT_SECONDS ({longest:g}) exceed the 60 s that docker-compose.yml"
            " gives a worker to end: give it longer (stop_grace_period), or its last leads become uncertain"
        )
    if settings.on_uncertain == "resend" and settings.uncertain_after_seconds < _SOON_SECONDS:
        odd.append(
            f"ON_UNCERTAIN=resend after UNCERTAIN_AFTER_SECONDS={settings.uncertain_after_seconds:g} leaves no time for"
            " a call's event to arrive: people will be called twice; allow 600 or more"
        )
    if settings.backoff_base_seconds > settings.backoff_cap_seconds:
        odd.append("BACKOFF_BASE_SECONDS is above BACKOFF_CAP_SECONDS: every wait is as long as the cap")
    if settings.probe_first_seconds > settings.probe_cap_seconds:
        odd.append("PROBE_FIRST_SECONDS is above PROBE_CAP_SECONDS: every probe waits for the cap")
    if settings.lead_max_age_seconds < settings.backoff_cap_seconds:
        odd.append("LEAD_MAX_AGE_SECONDS is below BACKOFF_CAP_SECONDS: leads expire while they wait for a retry")
    if settings.sweep_seconds > 30:
        odd.append(f"SWEEP_SECONDS={settings.sweep_seconds:g}: retries and probes may be that late; 2 costs little")
    rates = f"{settings.account_rate} an account, {settings.campaign_rate} a campaign"
    return Finding("limits", "warn" if odd else "ok", "; ".join(odd) or f"rates and times fit together: {rates}")


def versions() -> Finding:
    """Whether the libraries are those that the tests ran on."""
    found = {name: metadata.version(name) for name in TESTED}
    odd = [
        f"{name} {found[name]} (tested: {tested})"
        for name, tested in TESTED.items()
        if not SpecifierSet(tested).contains(found[name], prereleases=True)
    ]
    if odd:
        return Finding("versions", "warn", f"untested: {', '.join(odd)}; install with `-c constraints.txt`")
    return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))


def secrets(settings: Settings) -> Iterator[Finding]:
    """Whether each secret is set; its value is never shown."""
    accounts = settings.api_keys()
    if accounts:
        yield Finding("key", "ok", f"an API key for each of: {', '.join(accounts)} (--check-key asks Futwork)")
    else:
        yield Finding("key", "fail", "no Futwork API key, so nothing is sent: set FUTWORK_API_KEY")
    if settings.webhook_tokens():
        yield Finding("webhook", "ok", "WEBHOOK_TOKEN is set")
    else:
        yield Finding("webhook", "fail", "WEBHOOK_TOKEN is not set: every webhook is answered 401 and its event lost")
    if settings.intake_scopes():
        yield Finding("intake", "ok", "INTAKE_TOKENS is set")
    else:
        yield Finding("intake", "warn", "INTAKE_TOKENS is not set: the HTTP intake answers 401 (the library works)")


def spool(settings: Settings) -> Finding:
    """Whether events can be stored in the spool, and whether some wait there."""
    folder = settings.spool_dir
    lost = "events cannot be kept while the broker is away"
    why = _cannot_write(folder)
    if why:
        return Finding(
            "spool", "fail", f"{folder} cannot be written ({why}): {lost}; correct SPOOL_DIR or its permissions"
        )
    waiting = sum(one.stat().st_size for one in folder.glob("*.events")) if folder.is_dir() else 0
    files = len(list(folder.glob("*.events"))) if folder.is_dir() else 0
    damaged = len(list(folder.glob("*.damaged"))) if folder.is_dir() else 0
    most = settings.spool_max_bytes
    if waiting >= most:
        return Finding(
            "spool", "fail", f"{folder} is full ({waiting:,} of {most:,} bytes): {lost}; repair the broker first"
        )
    if waiting >= 0.8 * most:
        return Finding("spool", "warn", f"{folder} is nearly full ({waiting:,} of {most:,} bytes); repair the broker")
    if damaged:
        return Finding("spool", "warn", f"{damaged} damaged files in {folder} need attention; see docs/operations.md")
    if files:
        return Finding("spool", "warn", f"{files} files wait in {folder}: do the broker and a web process or beat run?")
    return Finding("spool", "ok", f"{folder} can be written and is empty")


def _cannot_write(folder: Path) -> str:
    """Why no file can be written there, or nothing; a folder that does not exist yet is not created."""
    nearest = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    if nearest != folder:
        return "" if os.access(nearest, os.W_OK) else f"no folder can be created in {nearest}"
    draft = folder / f"{uuid.uuid4().hex}.doctor"
    try:
        draft.write_bytes(b"is there room?")  # permissions alone prove nothing to root, nor on a read-only file system
        draft.unlink()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def disk(settings: Settings) -> Finding:
    """Whether this host's disks have room for the spool, and for an SQLite ledger."""
    places = {"the spool": settings.spool_dir}
    if (file := sqlite_file(settings.database_url)) is not None:
        places["the ledger"] = file
    short, worst = [], 0
    for what, place in places.items():
        nearest = next(parent for parent in (place, *place.resolve().parents) if parent.exists())
        free = shutil.disk_usage(nearest).free
        wanted = settings.spool_max_bytes if what == "the spool" else _WARN_BYTES
        if free < wanted:
            worst = max(worst, 2 if free < _FAIL_BYTES else 1)
            short.append(f"{free // 1024**2:,} MiB are free for {what} in {nearest}, {wanted // 1024**2:,} are needed")
    if short:
        return Finding("disk", "fail" if worst == 2 else "warn", f"{'; '.join(short)}: free some space")
    return Finding("disk", "ok", f"there is room for {' and '.join(places)}")
