"""The producer: rows become batches in the broker or refusals with a reason, a failure says what was not accepted."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import orjson
import pytest

import pipeline
from pipeline import EnqueueFailed, Lead, Producer, RefusedRow, enqueue
from pipeline.broker import MESSAGE_BYTES, BrokerUnavailable
from pipeline.domain.campaign import InvalidCampaignId
from pipeline.domain.lead import lead_id
from pipeline.producer import LEADS_A_BATCH
from pipeline.settings import Settings
from tests.conftest import CAMPAIGN, make_lead


class Recorder:
    """A broker that keeps what it is given, and is away from the publish on that `fails_at` names."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.published: list[tuple[str, dict[str, Any], str]] = []
        self.asked = 0

    def publish(self, task: str, payload: Any, *, about: str) -> None:
        self.asked += 1
        if self.fails_at is not None and self.asked >= self.fails_at:
            raise BrokerUnavailable("the broker took no message: it is away")
        self.published.append((task, orjson.loads(orjson.dumps(payload)), about))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, message, _ in self.published for row in message["leads"]]


def rows(count: int, start: int = 0) -> Iterator[dict[str, Any]]:
    for number in range(start, start + count):
        yield {"phone": f"98{number:08d}", "data": {"customer_name": f"Lead {number}"}}


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


def test_leads_leave_in_batches_in_order_with_ids_that_are_known_beforehand(settings: Settings) -> None:
    broker = Recorder()
    report = enqueue(CAMPAIGN, rows(LEADS_A_BATCH * 2 + 1), settings=settings, publisher=broker)
    assert [len(message["leads"]) for _, message, _ in broker.published] == [500, 500, 1]
    assert {task for task, _, _ in broker.published} == {"pipeline.intake"}
    assert [about for _, _, about in broker.published][-1] == f"({CAMPAIGN}, 1 leads)"
    assert [row["phone"] for row in broker.rows] == [f"+9198{number:08d}" for number in range(1001)]
    assert report.ids == [lead_id(CAMPAIGN, row["key"]) for row in broker.rows]
    assert (report.accepted, report.refused, report.campaign_id) == (1001, [], CAMPAIGN)


def test_a_message_is_what_the_wire_contract_says(settings: Settings) -> None:
    broker = Recorder()
    enqueue(
        CAMPAIGN, [{"phone": "9999789877", "data": {"name": "Asha"}, "key": 7}], settings=settings, publisher=broker
    )
    [(_, message, _)] = broker.published
    batch = uuid.UUID(message.pop("batch"))
    assert batch.version == 5
    assert message == {
        "v": 1,
        "campaign_id": CAMPAIGN,
        "leads": [{"phone": "+919999789877", "data": {"name": "Asha"}, "key": "7"}],
    }


def test_the_same_leads_make_the_same_batch_id_and_others_another(settings: Settings) -> None:
    broker = Recorder()
    for leads in (rows(3), rows(3), rows(4)):
        enqueue(CAMPAIGN, leads, settings=settings, publisher=broker)
    first, again, other = (message["batch"] for _, message, _ in broker.published)
    assert first == again != other


def test_a_refused_row_names_its_place_and_reason_and_stops_no_other(settings: Settings) -> None:
    broker = Recorder()
    given = [*rows(2), {"phone": "12", "data": {}}, "no row", {"data": {}}, *rows(1, start=7), {"phone": "9", "x": 1}]
    report = enqueue(CAMPAIGN, given, settings=settings, publisher=broker)
    assert report.accepted == 3
    assert [row.index for row in report.refused] == [2, 3, 4, 6]
    assert report.refused[1].reason == "a lead must be an object, not text"
    assert report.refused[2].reason == "phone: missing"
    assert len(broker.rows) == 3


@pytest.mark.parametrize(
    "row",
    [
        {"phone": "9999789877", "data": {"name": "\ud83d"}},
        {"phone": "9999789877", "data": {"\ud83d": 1}},
        {"phone": "9999789877", "data": {}, "key": "\ud83d"},
        {"phone": "9999789877", "data": {}, "key": "a\0b"},
        {"phone": "9999789877", "data": {"n": 10**30}},
        {"phone": "9999789877", "data": {"n": float("nan")}},
        {"phone": "9999789877", "data": {"n": object()}},
        {"phone": 10**400, "data": {}},
        {1: 2, "phone": "9999789877", "data": {}},
        None,
    ],
    ids=lambda row: ascii(row)[:40].replace("\\", ""),
)
def test_a_row_that_json_or_a_database_could_not_hold_is_refused_before_the_broker(
    row: object, settings: Settings
) -> None:
    broker = Recorder()
    report = enqueue(CAMPAIGN, [row, *rows(1)], settings=settings, publisher=broker)
    assert [refused.index for refused in report.refused] == [0]
    assert report.accepted == len(broker.rows) == 1


def test_leads_and_mappings_are_rows_too_and_dates_travel_as_text(settings: Settings) -> None:
    broker = Recorder()
    moment = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)
    given = [
        make_lead(1),
        MappingProxyType(
            {"recipientPhoneNumber": "9800000002", "recipientData": {"due": moment, "id": uuid.UUID(int=7)}}
        ),
        Lead(phone="+919800000003", data={}, key="again"),
    ]
    report = enqueue(CAMPAIGN, given, settings=settings, publisher=broker)
    assert report.refused == []
    assert [row["key"] for row in broker.rows] == ["+919800000001", "+919800000002", "again"]
    assert broker.rows[1]["data"] == {
        "due": "2026-05-08T12:00:00+00:00",
        "id": "00000000-0000-0000-0000-000000000007",
    }


def test_a_row_given_twice_is_accepted_twice_with_one_id(settings: Settings) -> None:
    report = enqueue(CAMPAIGN, [*rows(1), *rows(1)], settings=settings, publisher=Recorder())
    assert report.accepted == 2
    assert len(set(report.ids)) == 1


@pytest.mark.parametrize("leads", [[], iter(()), [{"phone": "no"}]])
def test_nothing_to_send_publishes_nothing(leads: Any, settings: Settings) -> None:
    broker = Recorder()
    assert enqueue(CAMPAIGN, leads, settings=settings, publisher=broker).accepted == 0
    assert broker.asked == 0


@pytest.mark.parametrize("campaign_id", ["", "a/b", "../x", "x" * 65, None, 7, "a b"])
def test_a_wrong_campaign_id_is_refused_before_any_row_is_read(campaign_id: Any, settings: Settings) -> None:
    leads = rows(5)
    with pytest.raises(InvalidCampaignId, match="campaign id"):
        enqueue(campaign_id, leads, settings=settings, publisher=Recorder())
    assert len(list(leads)) == 5


def test_large_rows_leave_in_smaller_batches_that_any_broker_takes(settings: Settings) -> None:
    broker = Recorder()
    leads = [{"phone": f"98{number:08d}", "data": {"prompt": "x" * 32_000}} for number in range(400)]
    report = enqueue(CAMPAIGN, leads, settings=settings, publisher=broker)
    assert report.accepted == len(broker.rows) == 400
    assert len(broker.published) == 4
    assert max(len(orjson.dumps(message)) for _, message, _ in broker.published) < MESSAGE_BYTES + 40_000


def test_rows_stream_through_in_constant_memory(settings: Settings) -> None:
    class Sink:
        leads = 0

        def publish(self, _task: str, payload: Any, *, about: str) -> None:  # noqa: ARG002
            self.leads += len(payload["leads"])

    sink = Sink()
    producer = Producer(CAMPAIGN, settings=settings, publisher=sink)
    for row in rows(2000):
        producer.add(row)
    tracemalloc.start()
    try:
        with producer:
            for number in range(20_000):  # one person again and again: the reading of numbers is not what is measured
                producer.add({"phone": "9999789877", "data": {"n": number}, "key": number})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sink.leads == producer.accepted == 22_000
    assert peak < 1_000_000  # 30 bytes kept of each row would be over; a batch of 500 is under


def test_enqueue_pulls_rows_as_it_needs_them(settings: Settings) -> None:
    read = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal read
        for row in rows(5 * LEADS_A_BATCH):
            read += 1
            yield row

    with pytest.raises(EnqueueFailed):
        enqueue(CAMPAIGN, counted(), settings=settings, publisher=Recorder(fails_at=2))
    assert read == 2 * LEADS_A_BATCH


@pytest.mark.parametrize(
    ("total", "fails_at", "accepted", "missing"),
    [
        (1200, 1, 0, range(500)),
        (1200, 2, 500, range(500, 1000)),
        (1200, 3, 1000, range(1000, 1200)),
        (500, 1, 0, range(500)),
        (3, 1, 0, range(3)),
    ],
    ids=["first batch", "later batch", "flush at the end", "exactly one batch", "a few"],
)
def test_a_broker_that_goes_away_leaves_an_exact_account(
    total: int, fails_at: int, accepted: int, missing: range, settings: Settings
) -> None:
    broker = Recorder(fails_at=fails_at)
    with pytest.raises(EnqueueFailed) as caught:
        enqueue(CAMPAIGN, rows(total), settings=settings, publisher=broker)
    failure = caught.value
    assert failure.report.accepted == len(broker.rows) == accepted
    assert failure.report.ids == [lead_id(CAMPAIGN, f"+9198{number:08d}") for number in range(accepted)]
    assert failure.not_accepted == tuple(missing)
    assert failure.not_accepted_from == missing[0]
    assert str(failure) == (
        f"the broker took no message: it is away; {accepted} rows were accepted before, those from row {missing[0] + 1}"
        " on were not. Check BROKER_URL and send them again: rows that were accepted are not called twice."
    )
    assert isinstance(failure.__cause__, BrokerUnavailable)


def test_refused_rows_are_not_among_those_that_the_broker_did_not_take(settings: Settings) -> None:
    given = [{"phone": "no"}, *rows(LEADS_A_BATCH - 1), {"phone": "no"}, *rows(2, start=1000)]
    with pytest.raises(EnqueueFailed) as caught:
        enqueue(CAMPAIGN, given, settings=settings, publisher=Recorder(fails_at=2))
    assert caught.value.report.accepted == LEADS_A_BATCH
    assert [row.index for row in caught.value.report.refused] == [0, 500]
    assert caught.value.not_accepted == (502,)


def test_sending_everything_again_after_a_failure_gives_the_same_ids(settings: Settings) -> None:
    with pytest.raises(EnqueueFailed) as caught:
        enqueue(CAMPAIGN, rows(1200), settings=settings, publisher=Recorder(fails_at=3))
    again = enqueue(CAMPAIGN, rows(1200), settings=settings, publisher=Recorder())
    assert again.ids[:1000] == caught.value.report.ids
    assert again.accepted == 1200


def test_a_producer_tells_each_row_its_id_or_refusal_at_once(settings: Settings) -> None:
    broker = Recorder()
    producer = Producer(CAMPAIGN, settings=settings, publisher=broker, batch_size=2)
    assert producer.add({"phone": "9800000001", "data": {}}) == lead_id(CAMPAIGN, "+919800000001")
    assert isinstance(producer.add({"phone": "no"}), RefusedRow)
    assert (producer.accepted, producer.waiting, broker.asked) == (0, [0], 0)
    producer.add({"phone": "9800000002", "data": {}})
    assert (producer.accepted, producer.waiting, broker.asked) == (2, [], 1)


def test_a_producer_keeps_its_rows_when_the_broker_is_away_and_sends_them_later(settings: Settings) -> None:
    broker = Recorder(fails_at=1)
    producer = Producer(CAMPAIGN, settings=settings, publisher=broker, batch_size=10)
    for row in rows(3):
        producer.add(row)
    with pytest.raises(BrokerUnavailable):
        producer.flush()
    assert (producer.accepted, producer.waiting) == (0, [0, 1, 2])
    broker.fails_at = None
    producer.flush()
    producer.flush()
    assert (producer.accepted, producer.waiting, len(broker.published)) == (3, [], 1)


def test_a_block_that_ends_well_flushes_and_one_that_fails_does_not(settings: Settings) -> None:
    broker = Recorder()
    with Producer(CAMPAIGN, settings=settings, publisher=broker) as producer:
        producer.add(next(rows(1)))
    assert len(broker.rows) == 1
    with pytest.raises(ZeroDivisionError), Producer(CAMPAIGN, settings=settings, publisher=broker) as producer:
        producer.add(next(rows(1)))
        _ = 1 / 0
    assert len(broker.rows) == 1


def in_a_fresh_process(program: str, **environment: str) -> str:
    """What a Python program prints that has nothing but these variables."""
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PATH": ""} | environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout


OF_THE_EXTRAS = {"alembic", "flask", "granian", "prometheus_client", "pygal", "requests", "sqlalchemy", "werkzeug"}


def test_enqueue_needs_no_package_of_an_extra_and_none_of_the_hosts_variables() -> None:
    program = (
        "import sys, pipeline\n"
        "pipeline.enqueue, pipeline.Producer, pipeline.Lead\n"
        "try: pipeline.enqueue('c', [{'phone': '9999789877', 'data': {}}])\n"
        "except pipeline.EnqueueFailed as error: print('failed')\n"
        f"print(sorted({OF_THE_EXTRAS} & set(sys.modules)))\n"
    )
    hosts = {"LOG_FORMAT": "%(message)s", "LOG_LEVEL": "loud", "DATABASE_URL": "mysql://host/app", "MAX_ATTEMPTS": "∞"}
    assert in_a_fresh_process(program, BROKER_URL="redis://127.0.0.1:9/0", **hosts) == "failed\n[]\n"


def test_importing_enqueue_imports_nothing_that_only_its_use_needs() -> None:
    later = {*OF_THE_EXTRAS, "celery", "kombu", "redis", "pydantic_settings", "structlog", "opentelemetry"}
    program = f"import sys\nfrom pipeline import enqueue, BrokerUnavailable\nprint(sorted({later} & set(sys.modules)))"
    assert in_a_fresh_process(program) == "[]\n"


def test_importing_the_package_imports_no_part_of_it() -> None:
    program = "import sys, pipeline; print([name for name in sys.modules if name.startswith('pipeline.')])"
    assert in_a_fresh_process(program) == "[]\n"


def test_the_public_names_are_there_and_nothing_else() -> None:
    assert {name: getattr(pipeline, name).__name__ for name in pipeline.__all__ if name[0].isalpha()} == {
        name: name for name in pipeline.__all__ if name[0].isalpha()
    }
    assert issubclass(pipeline.InvalidCampaignId, ValueError)
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'celery_app'"):
        _ = pipeline.celery_app
