"""How the trace of a lead travels: in a batch of several requests, and not where nobody traces."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.observability import tracing

A = "00-" + "a" * 32 + "-" + "1" * 16 + "-01"
B = "00-" + "b" * 32 + "-" + "2" * 16 + "-01"


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_tracer", object())


@pytest.mark.parametrize(
    ("groups", "field"),
    [
        ([(A, 3)], None),
        ([(None, 2), (None, 1)], None),
        ([(A, 2), (B, 1)], [[A, 2], [B, 1]]),
        ([(A, 2), (None, 1)], [[A, 2], [None, 1]]),
    ],
)
def test_a_batch_tells_traces_only_where_its_requests_differ(groups: Any, field: Any) -> None:
    assert tracing.traces_of(groups) == field


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("field", "traces"),
    [
        ([[A, 2], [B, 1]], [A, A, B]),
        ([[A, 2], [None, 1]], [A, A, None]),
        ([["nonsense", 3]], [None, None, None]),
        ([[A, 2]], [None, None, None]),  # too few: whose is the third?
        ([[A, 4]], [None, None, None]),
        ([[A, -1], [A, 4]], [None, None, None]),
        ([[A]], [None, None, None]),
        ([A, A, A], [None, None, None]),
        ([[["a"], 3]], [None, None, None]),
        ([[A, True], [B, 2]], [A, B, B]),
        ("aaa", [None, None, None]),
        (7, [None, None, None]),
        (None, [None, None, None]),
    ],
)
def test_the_traces_of_a_batch_are_read_or_count_for_nothing(field: Any, traces: Any) -> None:
    assert tracing.traces_in({"traces": field}, 3) == traces


def test_where_nobody_traces_nothing_is_stored_sent_or_started() -> None:
    assert tracing.traces_in({"traces": [[A, 1], [B, 1]]}, 2) == [None, None]
    with tracing.publishing("pipeline.intake", "(1 leads)") as headers:
        assert headers == {}
    with tracing.running("pipeline.intake", id_="1", about="", parent=A):
        tracing.note("POST lead", A, {"lead": "l"})
    assert not tracing.is_on()
    assert tracing.traceparent() is None


def test_a_program_that_traces_by_itself_hands_its_trace_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("somebody-elses")
    with tracer.start_as_current_span("a request of theirs") as span:
        context = span.get_span_context()
        with tracing.publishing("pipeline.intake", "(1 leads)") as headers:
            of_theirs = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            assert headers == {"traceparent": of_theirs}
        with tracing.publishing("pipeline.dispatch", "(c)") as headers:
            assert headers == {}
