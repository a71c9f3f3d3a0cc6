"""The producer's side: rows become valid leads or row errors, and valid leads become batches in the broker.

Works on iterators of any length in constant memory. A row is accepted when the batch that holds it is in the broker,
and not before; a refused row never stops the others.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import orjson

from pipeline.broker import MESSAGE_BYTES, Broker, BrokerUnavailable, celery_app, lead_batch
from pipeline.domain.campaign import check_campaign_id
from pipeline.domain.lead import NAMESPACE, InvalidLead, Lead, lead_id
from pipeline.futwork.fields import read_lead
from pipeline.observability.logs import logger
from pipeline.settings import Settings, load_settings

log = logger(__name__)

LEADS_A_BATCH = 500


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that cannot become a lead, by its place in the input (from 0), with the reason for a person."""

    index: int
    reason: str


@dataclass(slots=True)
class EnqueueReport:
    """What became of the rows of one `enqueue`."""

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

    `report` holds the rows that were accepted before, and those that were refused. Sending everything again is safe:
    ids are derived from campaign and key, so a lead that was accepted already is not called twice.
    """

    def __init__(self, message: str, *, report: EnqueueReport, not_accepted: Sequence[int]) -> None:
        super().__init__(message)
        self.report = report
        self.not_accepted = tuple(not_accepted)
        """The places of the valid rows that were read but are not in the broker."""
        self.not_accepted_from = min(not_accepted) if not_accepted else None


class Publisher(Protocol):
    """What a producer needs of the broker."""

    def publish(self, task: str, payload: object, *, about: str) -> None:
        """Put a task into its queue, or raise `BrokerUnavailable`."""


class Producer:
    """Accepts rows one by one and publishes them in batches; use it as a context manager, or call `flush` at the end.

    `add` returns the lead's id, or the refusal. Rows count as accepted once `flush` has put them into the broker; `add`
    calls it when a batch is full, and the end of the block for the rest. Not safe for several threads.
    """

    def __init__(
        self,
        campaign_id: str,
        *,
        settings: Settings | None = None,
        publisher: Publisher | None = None,
        batch_size: int = LEADS_A_BATCH,
    ) -> None:
        self._campaign_id = check_campaign_id(campaign_id)
        settings = settings or load_settings()
        self._region = settings.default_region
        self._publisher = publisher or _broker_of_process(settings)
        self._batch_size = batch_size
        self._waiting: list[tuple[int, uuid.UUID, str]] = []  # place, id and JSON of rows not in the broker yet
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
        # As text at once: the caller may use its objects again, and a date or a UUID in them travels as text anyway.
        # Decoded, because orjson's bytes keep the kilobytes that they were written into.
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
        # The batch's id follows from its content, so a publish that is repeated after a doubt is the same batch.
        batch_id = uuid.uuid5(NAMESPACE, "".join(text for _, _, text in self._waiting))
        message = lead_batch(self._campaign_id, rows, batch_id=batch_id)
        self._publisher.publish("pipeline.intake", message, about=f"({self._campaign_id}, {len(rows)} leads)")
        log.info(
            "leads accepted", campaign=self._campaign_id, batch=batch_id, leads=[id_ for _, id_, _ in self._waiting]
        )
        self.accepted += len(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0

    @property
    def waiting(self) -> list[int]:
        """The places of valid rows that are not in the broker yet."""
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
    settings: Settings | None = None,
    publisher: Publisher | None = None,
) -> EnqueueReport:
    """Hand leads to the pipeline and return their ids, how many were accepted, and each refused row with its reason.

    *leads* are mappings `{"phone": …, "data": {…}, "key": …}` (Futwork's `recipientPhoneNumber` and `recipientData`
    work too) or `Lead`s, in any number. When this returns, every accepted lead is in the broker. Sending the same leads
    again is harmless: the key, by default the phone number, is called once a campaign.

    Raises `InvalidCampaignId`, `SettingsError`, and within five seconds of the broker's silence `EnqueueFailed`, which
    says what was accepted before and which rows were not.
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


def read_rows(rows: Iterable[object], *, region: str) -> Iterator[Lead | RefusedRow]:
    """Each row as a valid lead or a refusal, in order; what a dry run needs."""
    for index, row in enumerate(rows):
        try:
            yield read_lead(row, region=region)
        except InvalidLead as error:
            yield RefusedRow(index, str(error))


_brokers: dict[tuple[int, str], Broker] = {}


def _broker_of_process(settings: Settings) -> Broker:
    """One broker, with its connections, for all calls of this process; a child of a fork gets its own."""
    key = (os.getpid(), settings.broker_url)
    broker = _brokers.get(key)
    if broker is None:
        broker = _brokers.setdefault(key, Broker(celery_app(settings, works=False)))
    return broker
