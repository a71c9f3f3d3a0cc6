"""What tasks say about the messages that they work on, and what they never say."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery import signals
from kombu.exceptions import OperationalError

from pipeline.ledger import LedgerUnavailable, SchemaMismatch, ledger_is_at_fault
from pipeline.settings import Settings, SettingsError
from pipeline.wiring import close_services
from pipeline.worker.app import build_app
from pipeline.worker.dead_letters import arguments_as_bytes, printable
from pipeline.worker.guard import StageFailed, guarded, plain
from pipeline.worker.request import DiscreetRequest, describe_arguments
from tests.conftest import CAMPAIGN


@pytest.fixture
def restored_logs() -> Iterator[None]:
    """Logging as it was before the test, which configures it anew."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.getLogger("celery.worker.strategy").filters.clear()
    logging.getLogger("celery.app.trace").filters.clear()


@pytest.mark.parametrize(
    ("task", "args", "about"),
    [
        ("pipeline.intake", [{"campaign_id": CAMPAIGN, "leads": [1, 2]}], f"({CAMPAIGN}, 2 leads)"),
        ("pipeline.intake", [{"campaign_id": "+91 98000 00001", "leads": []}], "(0 leads)"),
        ("pipeline.intake", [{"leads": {"phone": "9800000001"}}], "(…)"),
        ("pipeline.intake", ["9800000001"], "(…)"),
        ("pipeline.intake", [], "()"),
        ("pipeline.events", [{"events": [1, 2, 3]}], "(3 events)"),
        ("pipeline.dispatch", [CAMPAIGN], f"({CAMPAIGN})"),
        ("pipeline.dispatch", [{"phone": "9800000001"}], "(…)"),
        ("pipeline.sweep", [], "()"),
    ],
)
def test_arguments_are_described_without_personal_data(task: str, args: list[Any], about: str) -> None:
    assert describe_arguments(task, args) == about


def test_a_stage_that_fails_tells_where_and_not_what_a_database_quotes(
    make_settings: Callable[..., Settings],
) -> None:
    def sweep(_mine: object) -> None:
        raise ValueError("a row was refused\nDETAIL: Failing row contains (+919800000001)")

    request = SimpleNamespace(id="1")
    task = SimpleNamespace(
        app=SimpleNamespace(pipeline_settings=make_settings()), name="pipeline.sweep", request=request
    )
    with pytest.raises(StageFailed) as caught:
        plain(sweep)(task)
    assert str(caught.value).startswith("ValueError: a row was refused (test_tasks.py:")
    assert "9800000001" not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("delivery", "retries", "again"),
    [({}, 0, False), ({"redelivered": False}, 0, False), ({"redelivered": True}, 0, True), ({}, 1, True)],
)
def test_a_stage_learns_that_a_process_died_over_its_message(
    make_settings: Callable[..., Settings], delivery: dict[str, bool], retries: int, again: bool
) -> None:
    told: list[object] = []
    request = SimpleNamespace(id="an-id", delivery_info=delivery, retries=retries)
    settings = make_settings(broker_url="redis://127.0.0.1:9/0")
    task = SimpleNamespace(app=SimpleNamespace(pipeline_settings=settings), request=request, name="pipeline.events")
    try:
        guarded(lambda _parts, message, *, again: told.append((message, again)))(task, {})
    finally:
        close_services()
    assert told == [({}, again)]


@pytest.mark.parametrize("depth", [10, 500, 900, 960])
def test_whatever_could_be_decoded_can_be_kept(depth: int) -> None:
    """Also from deep in the stack, where the encoder has less room than the decoder had (a worker's has 40 frames)."""
    text = "[" * depth + "]" * depth
    decoded = json.loads(text) if depth < 800 else _on_an_empty_stack(lambda: json.loads(text))

    def deep_in_the_stack(frames: int) -> bytes:
        return deep_in_the_stack(frames - 1) if frames else arguments_as_bytes([decoded], {})

    assert json_length(deep_in_the_stack(100)) == len(text)


def json_length(body: bytes) -> int:
    return len(body) - len(b"[[], {}]")


def _on_an_empty_stack(call: Callable[[], Any]) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("value", ["\ud800", 10**400, float("nan"), "\0"])
def test_values_that_only_json_takes_are_kept(value: object) -> None:
    assert json.loads(arguments_as_bytes([value], {"a": value}).decode())[0] == [pytest.approx(value, nan_ok=True)]


def test_reasons_are_text_that_every_database_takes() -> None:
    assert printable("a\0b\ud800c\nd नमस्ते") == "a?b?c?d नमस्ते"
    assert len(printable("x" * 5000)) == 1000


def test_only_what_is_about_the_data_is_the_messages_fault() -> None:
    import sqlalchemy as sa

    def wrapped(kind: type[sa.exc.DBAPIError]) -> sa.exc.DBAPIError:
        return kind("SELECT 1", {}, Exception("x"))

    for kind in (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.ProgrammingError, sa.exc.InternalError):
        assert ledger_is_at_fault(wrapped(kind))
    assert ledger_is_at_fault(wrapped(sa.exc.DatabaseError))
    assert ledger_is_at_fault(sa.exc.TimeoutError())
    assert ledger_is_at_fault(SchemaMismatch("run `pipeline migrate`"))
    assert not ledger_is_at_fault(wrapped(sa.exc.DataError))
    assert not ledger_is_at_fault(wrapped(sa.exc.IntegrityError))
    assert not ledger_is_at_fault(ValueError())
    assert all(ledger_is_at_fault(wrapped(kind)) for kind in LedgerUnavailable if issubclass(kind, sa.exc.DBAPIError))


def test_errors_of_the_database_do_not_quote_the_parameters_of_a_statement(tmp_path: Any) -> None:
    import sqlalchemy as sa

    from pipeline.ledger import Ledger

    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    with pytest.raises(sa.exc.OperationalError) as caught, ledger.database.read() as connection:
        connection.execute(sa.text("SELECT * FROM nowhere WHERE phone = :phone"), {"phone": "9800000001"})
    ledger.close()
    assert "9800000001" not in str(caught.value)


def test_an_app_without_a_redis_for_the_limit_is_not_built(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="REDIS_URL is not set"):
        build_app(make_settings(broker_url="amqp://127.0.0.1"))


def test_two_apps_of_one_process_have_their_own_tasks(make_settings: Callable[..., Settings]) -> None:
    """Celery would register the tasks of each app with every other one, in any order, and warn of the second name."""
    one, other = (
        build_app(make_settings(broker_url=f"redis://127.0.0.1:{port}/0", sweep_seconds=port)) for port in (1, 2)
    )
    for app, seconds in ((one, 1), (other, 2)):
        app.finalize()
        assert app.tasks["pipeline.sweep"].app.pipeline_settings.sweep_seconds == seconds


@pytest.mark.parametrize(
    ("task", "level", "log_level", "logged"),
    [
        ("pipeline.sweep", "INFO", "info", False),
        ("pipeline.tidy", "INFO", "info", False),
        ("pipeline.sweep", "INFO", "debug", True),
        ("pipeline.sweep", "ERROR", "info", True),
        ("pipeline.intake", "INFO", "info", True),
    ],
)
def test_a_periodic_task_that_came_and_succeeded_is_worth_no_line(
    make_settings: Callable[..., Settings], capfd: pytest.CaptureFixture[str], restored_logs: None,
    task: str, level: str, log_level: str, logged: bool,
) -> None:  # fmt: skip
    build_app(make_settings(broker_url="redis://127.0.0.1:9/0", log_level=log_level))
    signals.setup_logging.send(sender=None)
    context = {"id": "an-id", "name": task}
    line = "Task %(name)s[%(id)s] received"
    logging.getLogger("celery.worker.strategy").log(logging.getLevelName(level), line, context, extra={"data": context})
    assert (task in capfd.readouterr().err) is logged


def test_what_a_killed_child_had_is_left_to_the_broker_if_that_is_away_in_the_same_moment(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen where both were killed: nothing was wrong with the events, and they lay in quarantine."""
    nowhere = "redis://127.0.0.1:1/0"
    app = build_app(make_settings(broker_url=nowhere, redis_url=nowhere))
    task = app.tasks["pipeline.events"]

    def refuse(*_: Any, **__: Any) -> None:
        raise OperationalError("Connection refused")

    monkeypatch.setattr(task, "signature_from_request", refuse)
    sent = app.amqp.as_task_v2("an-id", task.name, args=[{}])
    done: list[Any] = []
    message = SimpleNamespace(
        headers=sent.headers, properties=sent.properties, body=sent.body, payload=sent.body,
        content_type="application/json", content_encoding="utf-8", delivery_info={"redelivered": False},
        ack_log_error=lambda *_, **__: done.append("acknowledged"),
        reject_log_error=lambda _log, _errors, requeue: done.append(f"rejected, {requeue=}"),
    )  # fmt: skip
    request = DiscreetRequest(
        message, app=app, task=task, headers=sent.headers, body=sent.body, decoded=True,
        on_ack=message.ack_log_error, on_reject=message.reject_log_error,
    )  # fmt: skip
    given_up: list[Any] = []

    def note(**about: Any) -> None:
        given_up.append(about["exception"])

    signals.task_failure.connect(note, sender=task)
    try:
        raise WorkerLostError("killed")
    except WorkerLostError:
        request.on_failure(ExceptionInfo())
    assert (done, given_up) == (["rejected, requeue=True"], [])


def test_a_child_of_a_worker_that_shuts_down_does_not_wait_half_a_minute_to_end(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with py-spy: the parent had its results and counted one too few, and a deployment's patience ran out."""
    import billiard.pool

    build_app(make_settings(broker_url="redis://127.0.0.1:9/0"))
    waited: list[float] = []
    monkeypatch.setattr(billiard.pool.time, "sleep", waited.append)
    child = billiard.pool.Worker.__new__(billiard.pool.Worker)
    child.on_ready_counter = SimpleNamespace(value=0)
    assert child._ensure_messages_consumed(completed=1) is False
    assert 1 < sum(waited) < 3
