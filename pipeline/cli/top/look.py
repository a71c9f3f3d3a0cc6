"""What `pipeline top` looks at: the ledger's overview, signs of life, queues, limit and spool, at one moment."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.broker import BrokerUnavailable
from pipeline.cli.session import sqlite_file
from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.heartbeats import ALIVE_SECONDS, KINDS
from pipeline.ledger import LedgerUnavailable, SchemaMismatch, ledger_is_at_fault
from pipeline.settings import Settings, SettingsError
from pipeline.wiring import Services

_WITHIN = timedelta(seconds=5)  # a look that takes longer is given up
_REMEMBERED = timedelta(minutes=10)  # so long a part that fell silent is shown as gone


class Looker:
    """Looks again and again over the same connections. No part that is away keeps it from telling of the others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._parts = Services(settings)

    def look(self) -> dict[str, Any]:
        """How it all stands, as plain values; what could not be asked says why in `away`."""
        away: dict[str, str] = {}
        return {
            "at": datetime.now(UTC),
            "overview": self._overview(away),
            "parts": self._parts_alive(away),
            "queues": self._queues(away),
            "limits": self._limits(away),
            "spool": self._spool(),
            "away": away,
        }

    def close(self) -> None:
        """Close the connections to the ledger."""
        if "ledger" in self._parts.__dict__:
            self._parts.ledger.close()

    def _overview(self, away: dict[str, str]) -> dict[str, Any] | None:
        file = sqlite_file(self._settings.database_url)
        if file is not None and not file.exists():  # to look must not create it
            away["ledger"] = f"there is none at {file}"
            return None
        try:
            return self._parts.ledger.reports.overview(now=datetime.now(UTC), within=_WITHIN)
        except SchemaMismatch as error:
            away["ledger"] = str(error)
        except LedgerUnavailable as error:
            away["ledger"] = (str(getattr(error, "orig", None) or error).strip().splitlines() or ["no answer"])[0]
        except Exception as error:
            if not ledger_is_at_fault(error):
                raise
            away["ledger"] = type(error).__name__
        return None

    def _parts_alive(self, away: dict[str, str]) -> dict[str, Any]:
        """Of each kind how many live, and who fell silent lately; of the queues those that nobody works on."""
        try:
            signs = self._parts.heartbeats.alive(within=_REMEMBERED)
        except (RedisUnavailable, SettingsError) as error:
            away["limit"] = _first_line(error)
            return {}
        alive = [sign for sign in signs if sign.seconds_ago <= ALIVE_SECONDS]
        return {
            "alive": {kind: sum(sign.kind == kind for sign in alive) for kind in KINDS},
            "silent": [f"{sign.kind} {sign.name}" for sign in signs if sign.seconds_ago > ALIVE_SECONDS],
            "served": dict(Counter(queue for sign in alive for queue in sign.queues)),
        }

    def _queues(self, away: dict[str, str]) -> dict[str, int]:
        try:
            return self._parts.broker.depths()
        except (BrokerUnavailable, SettingsError) as error:
            away["broker"] = _first_line(error)
            return {}

    def _limits(self, away: dict[str, str]) -> dict[str, Any]:
        """Each account's limit, and for how long Futwork's 429 has stopped it."""
        found: dict[str, Any] = {}
        for account in self._settings.api_keys() or {"default": ""}:
            stopped = None
            if "limit" not in away:
                try:
                    stopped = self._parts.limiter.stopped_for(account).total_seconds()
                except RedisUnavailable as error:
                    away["limit"] = _first_line(error)
            found[account] = {"per_second": self._settings.account_rate.per_second, "stopped_seconds": stopped}
        return found

    def _spool(self) -> dict[str, int] | None:
        try:
            files, size = self._parts.spool.size()
        except OSError:
            return None
        return {"files": files, "bytes": size}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
