"""The producer's side: rows become valid leads or refusals, and valid leads become batches in the broker.

It reads an iterator of any length in constant memory. A row is accepted when the batch that holds it is in the broker,
and not before. A refused row never stops the others. What is slow to import is imported when it is used,
because every process of a backend imports this module.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import orjson

from pipeline.broker import MESSAGE_BYTES, Broker, BrokerUnavailable, celery_app, lead_batch
from pipeline.domain.campaign import check_campaign_id
from pipeline.domain.lead import NAMESPACE, InvalidLead, lead_id
from pipeline.futwork.fields import read_lead

if TYPE_CHECKING:
    from pipeline.settings import ProducerSettings

LEADS_A_BATCH = 500


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that cannot become a lead, by its place in the input (from 0), with the reason for a person."""

    index: int
    reason: str


@dataclass(slots=True)
class EnqueueReport:
    """The result of one `enqueue`."""

    campaign_id: str
    ids: list[uuid.UUID] = field(default_factory=list)
    """The ids of the accepted leads, in the order of their rows; a row given twice is accepted twice with one id."""
    refused: list[RefusedRow] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """How many rows are in the broker."""
        return len(self.ids)


class EnqueueFailed(Exception):
    """The broker took no more batches; the rows from `not_accepted_from` on are not accepted and must be sent again.

    `report` holds the rows that were accepted before, and those that were refused. It is safe to send everything again:
    ids are derived from campaign and key, so nobody is called twice.
    """

    def __init__(self, message: str, *, report: EnqueueReport, not_accepted: Sequence[int]) -> None:
        super().__init__(message)
        self.report = report
        self.not_accepted = tuple(not_accepted)
        """The indexes of the valid rows that were read but are not in the broker."""
        self.not_accepted_from = min(not_accepted) if not_accepted else None


class Publisher(Protocol):
    """The part of the broker that a producer uses."""

    def publish(self, task: str, payload: object, *, about: str) -> None:
        """Put a task into its queue, or raise `BrokerUnavailable`."""


class Producer:
    """Takes rows one by one and publishes them in batches; use it as a context manager, or call `flush` at the end.

    `add` returns the lead's id, or the refusal. A row is accepted once `flush` has put it into the broker. `add` calls
    `flush` when a batch is full, and the end of the block calls it for the rest. Not safe for several threads.
    """

    def __init__(
        self,
        campaign_id: str,
        *,
        settings: ProducerSettings | None = None,
        publisher: Publisher | None = None,
        batch_size: int = LEADS_A_BATCH,
    ) -> None:
        from pipeline.observability.logs import logger
        from pipeline.settings import load_producer_settings

        self._log = logger(__name__)
        self._campaign_id = check_campaign_id(campaign_id)
        settings = settings or load_producer_settings()
        self._region = settings.default_region
        self._publisher = publisher or _broker_of_process(os.getpid(), settings)
        self._batch_size = batch_size
        self._waiting: list[tuple[int, uuid.UUID, str]] = []  # index, id and JSON of rows not in the broker yet
        self._waiting_bytes = 0
        self._next = 0
        self.accepted = 0
        """How many rows are in the broker so far."""

    def add(self, row: object) -> uuid.UUID | RefusedRow:
        """Take one row (a mapping or a `Lead`): its id if it is valid, else the refusal."""
        index, self._next = self._next, self._next + 1
        try:
            lead = read_lead(row, region=self._region)
        except InvalidLead as error:
            return RefusedRow(index, str(error))
        id_ = lead_id(self._campaign_id, lead.key)
        # As text now: the caller may change its objects later, and a date or a UUID in them becomes text anyway.
        # Decoded, because bytes of orjson keep the kilobytes of buffer that they were written into.
        text = orjson.dumps({"phone": lead.phone, "data": lead.data, "key": lead.key})
        self._waiting.append((index, id_, text.decode()))
        self._waiting_bytes += len(text)
        if len(self._waiting) >= self._batch_size or self._waiting_bytes >= MESSAGE_BYTES:
            self.flush()
        return id_

    def flush(self) -> None:
        """Put the rows that wait into the broker, or raise `BrokerUnavailable` and keep them."""
        if not self._waiting:
            return
        rows = [orjson.Fragment(text) for _, _, text in self._waiting]
        # The content names the batch: if a publish is repeated because its fate is unknown, the id is the same.
        batch_id = uuid.uuid5(NAMESPACE, "".join(text for _, _, text in self._waiting))
        message = lead_batch(self._campaign_id, rows, batch_id=batch_id)
        self._publisher.publish("pipeline.intake", message, about=f"({self._campaign_id}, {len(rows)} leads)")
        self._log.info(
            "leads accepted", campaign=self._campaign_id, batch=batch_id, leads=[id_ for _, id_, _ in self._waiting]
        )
        self.accepted += len(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0

    @property
    def waiting(self) -> list[int]:
        """The indexes of the valid rows that are not in the broker yet."""
        return [index for index, _, _ in self._waiting]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()


def enqueue(
    campaign_id: str,
    leads: Iterable[object],
    *,
    settings: ProducerSettings | None = None,
    publisher: Publisher | None = None,
) -> EnqueueReport:
    """Hand leads to the pipeline and return their ids, how many were accepted, and each refused row with its reason.

    *leads* are mappings `{"phone": …, "data": {…}, "key": …}` (Futwork's `recipientPhoneNumber` and `recipientData`
    work too) or `Lead`s, in any number. When this returns, every accepted lead is in the broker. It is safe to send the
    same leads again: each key, by default the phone number, is called once in a campaign.

    Raises `InvalidCampaignId`, `SettingsError`, and `EnqueueFailed` within five seconds if the broker is silent; this
    says which rows were accepted before and which were not.
    """
    producer = Producer(campaign_id, settings=settings, publisher=publisher)
    report = EnqueueReport(campaign_id)
    try:
        for row in leads:
            result = producer.add(row)
            if isinstance(result, RefusedRow):
                report.refused.append(result)
            else:
                report.ids.append(result)
        producer.flush()
    except BrokerUnavailable as error:
        del report.ids[producer.accepted :]
        missing = producer.waiting
        raise EnqueueFailed(
            f"{error}; {report.accepted} rows were accepted before, those from row {missing[0] + 1} on were not."
            " Check BROKER_URL and send them again: rows that were accepted are not called twice.",
            report=report,
            not_accepted=missing,
        ) from error
    return report


@cache
def _broker_of_process(_pid: int, settings: ProducerSettings) -> Broker:
    """One broker, with its connections, for all calls of this process; a child of a fork gets its own."""
    return Broker(celery_app(settings, works=False))
