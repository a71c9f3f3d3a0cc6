"""Intake: batches of leads from the broker into the ledger, each lead once.

Everything here is safe to repeat: a batch that is delivered twice, or stored in part, ends the same.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.coordination.counters import Counters
from pipeline.domain.campaign import Campaign, InvalidCampaignId, check_campaign_id
from pipeline.domain.lead import InvalidLead
from pipeline.futwork.fields import read_lead
from pipeline.ledger import Ledger
from pipeline.observability import tracing
from pipeline.observability.logs import logger
from pipeline.observability.metrics import INTAKE_LEADS
from pipeline.settings import Settings

log = logger(__name__)


class UnreadableBatch(ValueError):
    """The message is not a batch of leads; the text says why."""


@dataclass(frozen=True, slots=True)
class TakenIn:
    """What became of one batch."""

    campaign_id: str
    leads: int
    accepted: int
    refused: int
    suppressed: int = 0


class Intake:
    """Takes batches in and requests a dispatcher for them."""

    def __init__(
        self, ledger: Ledger, settings: Settings, *, wake: Callable[[str], None], counters: Counters | None = None
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._wake = wake
        self._counters = counters or Counters()

    def take_in(self, message: Any) -> TakenIn:
        """Write a batch's valid leads to the ledger, quarantine its bad rows, then request a dispatcher.

        Raises `UnreadableBatch` if the message as a whole is no batch; the caller quarantines it.
        """
        campaign_id, batch_id, rows = _read(message)
        now = self._ledger.now()
        campaign = self._ledger.campaigns.ensure(campaign_id, now=now)
        leads, traces, refused = [], [], 0
        for row, trace in zip(rows, tracing.traces_in(message, len(rows)), strict=True):
            try:
                leads.append(read_lead(row, region=self._settings.default_region))
                traces.append(trace)
            except InvalidLead as error:
                refused += 1
                self._quarantine(campaign, row, str(error), now)
        result = self._ledger.leads.take_in(
            campaign, leads, batch_id=batch_id, max_age=self._max_age(campaign), now=now, traces=traces
        )
        here = tracing.traceparent()
        for trace, count in Counter(traces).items():
            if trace and trace != here:  # the trace of one of several requests in this message
                tracing.note("taken in", trace, {"campaign": campaign_id, "leads": count}, began=now, took=_since(now))
        log.info(
            "batch taken in",
            campaign=campaign_id,
            batch=str(batch_id),
            accepted=result.accepted,
            refused=refused,
            suppressed=result.suppressed,
            leads=result.ids,
        )
        for became, many in (
            ("accepted", result.accepted),
            ("known", result.leads - result.accepted),
            ("refused", refused),
        ):
            self._counters.count(INTAKE_LEADS, became, by=many)
        if result.leads:
            self._wake(campaign_id)
        return TakenIn(campaign_id, result.leads, result.accepted, refused, result.suppressed)

    def _quarantine(self, campaign: Campaign, row: object, reason: str, now: datetime) -> None:
        # Not orjson: it refuses lone surrogates, huge numbers and deep nesting, and such rows end up here.
        body = json.dumps({"campaign_id": campaign.id, "lead": row}, default=str).encode()
        self._ledger.quarantine.put("lead", body, reason=reason, now=now)

    def _max_age(self, campaign: Campaign) -> timedelta:
        return timedelta(seconds=campaign.lead_max_age_seconds or self._settings.lead_max_age_seconds)


def _since(moment: datetime) -> timedelta:
    return datetime.now(UTC) - moment


def _read(message: Any) -> tuple[str, uuid.UUID, list[object]]:
    if not isinstance(message, dict):
        raise UnreadableBatch("a batch must be an object with campaign_id and leads")
    try:
        campaign_id = check_campaign_id(message.get("campaign_id"))  # type: ignore[arg-type]  # it checks that too
    except InvalidCampaignId as error:
        raise UnreadableBatch(str(error)) from None
    rows = message.get("leads")
    if not isinstance(rows, list):
        raise UnreadableBatch("leads must be a list")
    given = message.get("batch")
    try:
        # A foreign producer may leave the id out. Then the content names the batch, so a repeat has the same id.
        batch_id = uuid.UUID(given) if given else uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(message, default=str))
    except (ValueError, TypeError, AttributeError):
        raise UnreadableBatch("batch must be a UUID") from None
    return campaign_id, batch_id, rows
