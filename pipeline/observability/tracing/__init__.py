"""Traces: a lead's way from the request that handed it in to its call, for whoever collects OpenTelemetry.

Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` is set: then every function here returns at once, and nothing of OpenTelemetry
is imported. The other variables that its library reads (`OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`, …) mean what they
always mean, from the environment or from `.env`.

Flask and SQLAlchemy are watched by OpenTelemetry's own instrumentations. Tasks and POSTs have spans of ours: the one
for Celery leaves the span of a task that is sent by its name open for ever, and neither libcurl nor requests' adapter,
which carry the POSTs, has one.

The trace of a lead is that of its request, or of the message that brought it; the ledger keeps it with the lead. What
happens to the lead later is a span in that trace with a link to the task in which it happened, because one such task
works for many leads. No span that leaves this process holds personal data: see `_KEPT`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.settings import Settings

_NAME = "futwork-lead-pipeline"
_QUIET = frozenset({"pipeline.sweep", "pipeline.tidy"})  # every few seconds, and nearly always without finding anything
_ROOTS = frozenset({"pipeline.dispatch"})  # a slice works for many leads, and asks for the next: one endless trace
_UNWATCHED = "/healthz,/readyz,/metrics"
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_EXPORT_SECONDS = "3"  # so long a process that ends may wait for a collector that is away

_KEPT = frozenset({
    "http.method", "http.request.method", "http.status_code", "http.response.status_code", "http.route",
    "server.address", "db.system", "db.system.name", "db.statement", "db.query.text", "error.type",
    "messaging.system", "messaging.operation.type", "messaging.destination.name", "messaging.message.id",
    "lead", "campaign", "leads", "outcome", "state", "attempt", "call", "about",
})  # fmt: skip
"""The attributes that may leave this process. Paths and queries may hold a token or a phone number; statements hold
names of parameters and never their values."""

_tracer: Any = None
_provider: Any = None


def begin(settings: Settings, *, part: str) -> None:
    """Begin to trace this process, if the settings ask for it; safe to repeat, and meant for after a fork.

    *part* says what the process is, such as `web`. Raises `SettingsError` if the extra `otel` is not installed.
    """
    global _tracer, _provider  # noqa: PLW0603 - there is one of each in a process
    if not settings.otel_exporter_otlp_endpoint or _tracer is not None:
        return
    from pipeline.settings import SettingsError, lend_to_libraries  # not before: `enqueue` needs no settings of traces

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from pipeline.observability.tracing.export import Discreet, PartsOfWork
    except ImportError:
        raise SettingsError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed: install the extra `otel`"
        ) from None
    lend_to_libraries("OTEL_")
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = settings.otel_exporter_otlp_endpoint
    os.environ.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", _EXPORT_SECONDS)
    os.environ.setdefault("OTEL_SERVICE_NAME", _NAME)
    _provider = TracerProvider(resource=Resource.create({"pipeline.part": part}), sampler=PartsOfWork())
    _provider.add_span_processor(BatchSpanProcessor(Discreet(OTLPSpanExporter(), kept=_KEPT)))
    SQLAlchemyInstrumentor().instrument(tracer_provider=_provider)
    _tracer = _provider.get_tracer(_NAME)


def watch(app: Any) -> None:
    """Give every request of this Flask app a span, except those that ask for health and metrics."""
    if _tracer is not None:
        from opentelemetry.instrumentation.flask import FlaskInstrumentor

        instrumentor: Any = FlaskInstrumentor()
        instrumentor.instrument_app(app, tracer_provider=_provider, excluded_urls=_UNWATCHED)


def end() -> None:
    """Send what is not sent yet; nothing is traced after that."""
    global _tracer, _provider  # noqa: PLW0603 - as above
    if _provider is not None:
        _provider.shutdown()
        _tracer = _provider = None


def is_on() -> bool:
    """Whether this process traces."""
    return _tracer is not None


def traceparent() -> str | None:
    """The current span as W3C's `traceparent`, if it is one that is recorded; also in a program that traces by itself.

    A span that the sampler left out has no successors that anybody could see, so it is not told.
    """
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    if not found.is_valid or not found.trace_flags.sampled:
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


@contextmanager
def publishing(task: str, about: str) -> Iterator[dict[str, str]]:
    """The headers that carry the current trace with a message; the publish is a span of it."""
    parent = None if task in _ROOTS else traceparent()
    if parent is None:
        yield {}
    elif _tracer is None:
        yield {"traceparent": parent}
    else:
        from opentelemetry.trace import SpanKind

        attributes = {"messaging.operation.type": "send", "messaging.destination.name": task, "about": about}
        with _tracer.start_as_current_span(f"send {task}", kind=SpanKind.PRODUCER, attributes=attributes):
            yield {"traceparent": traceparent() or parent}


@contextmanager
def running(task: str, *, id_: str, about: str, parent: object) -> Iterator[None]:
    """A span while a task runs, in the trace that came with its message."""
    if _tracer is None:
        yield
    elif task in _QUIET:
        from opentelemetry.instrumentation.utils import suppress_instrumentation

        with suppress_instrumentation():
            yield
    else:
        from opentelemetry.trace import SpanKind

        attributes = {
            "messaging.operation.type": "process", "messaging.destination.name": task, "messaging.message.id": id_,
            "about": about,
        }  # fmt: skip
        with _tracer.start_as_current_span(
            f"run {task}", context=_context(parent), kind=SpanKind.CONSUMER, attributes=attributes
        ):
            yield


def note(
    name: str,
    parent: str | None,
    attributes: Mapping[str, str | int | None],
    *,
    began: datetime | None = None,
    took: timedelta = timedelta(),
    failed: bool = False,
    calls_out: bool = False,
) -> None:
    """Write down what has happened to a lead as a span of the lead's trace, linked to the span of the task.

    Without *parent*, or with one that cannot be read, it is a span of the task's trace.
    """
    if _tracer is None:
        return
    from opentelemetry.trace import Link, SpanKind, Status, StatusCode, get_current_span

    context, task = _context(parent), get_current_span().get_span_context()
    start = None if began is None else int(began.timestamp() * 1_000_000_000)
    span = _tracer.start_span(
        name,
        context=context,
        kind=SpanKind.CLIENT if calls_out else SpanKind.INTERNAL,
        attributes={key: value for key, value in attributes.items() if value is not None},
        links=[Link(task)] if context is not None and task.is_valid else [],
        start_time=start,
    )
    if failed:
        span.set_status(Status(StatusCode.ERROR))
    span.end(None if start is None else start + int(took.total_seconds() * 1_000_000_000))


def traces_of(groups: Sequence[tuple[str | None, int]]) -> list[list[object]] | None:
    """The field `traces` of a batch of leads: for each run of leads from one request its trace and their number.

    None where the message's own trace says it all.
    """
    return [[trace, count] for trace, count in groups] if len(groups) > 1 and any(one for one, _ in groups) else None


def traces_in(message: Mapping[str, Any], count: int) -> list[str | None]:
    """The trace of each of the *count* leads of a batch: its request's if the batch tells, else the current one.

    A field that is not as `traces_of` writes it counts for nothing: no lead is refused for it.
    """
    if _tracer is None:
        return [None] * count
    found: list[str | None] = []
    runs = message.get("traces")
    for run in runs if isinstance(runs, list) else ():
        trace, times = run if isinstance(run, list) and len(run) == 2 else (None, None)
        if not isinstance(times, int) or not 0 < times <= count - len(found):
            break
        found += [trace if isinstance(trace, str) and _TRACEPARENT.fullmatch(trace) else None] * times
    return found if len(found) == count else [traceparent()] * count


def _context(parent: object) -> Any:
    """The context of a `traceparent`; None where that is none, for the current context."""
    if not isinstance(parent, str) or not _TRACEPARENT.fullmatch(parent):
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent})
