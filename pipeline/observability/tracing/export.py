"""What of a trace leaves this process: spans of work that somebody asked for, without anything personal in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import SpanKind, Status, get_current_span
from opentelemetry.util.types import Attributes


class PartsOfWork(Sampler):
    """The sampler of the environment, which is not asked about statements outside of any request or task."""

    def __init__(self) -> None:
        self._chosen = TracerProvider(shutdown_on_exit=False).sampler

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        *more: Any,
        **named: Any,
    ) -> SamplingResult:
        """Leave out a client's span that begins a trace, such as a statement of a scrape."""
        if kind is SpanKind.CLIENT and not get_current_span(parent_context).get_span_context().is_valid:
            return SamplingResult(Decision.DROP)
        return self._chosen.should_sample(parent_context, trace_id, name, kind, attributes, *more, **named)

    def get_description(self) -> str:
        """How the sampler calls itself."""
        return f"parts of work, {self._chosen.get_description()}"


class Discreet(SpanExporter):
    """Hands spans on with the attributes that are listed, and without what exceptions and addresses may quote."""

    def __init__(self, inner: SpanExporter, *, kept: frozenset[str]) -> None:
        self._inner = inner
        self._kept = kept

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send the spans."""
        return self._inner.export([self._clean(span) for span in spans])

    def shutdown(self) -> None:
        """Send nothing any more."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits."""
        return self._inner.force_flush(timeout_millis)

    def _clean(self, span: ReadableSpan) -> ReadableSpan:
        attributes = {name: value for name, value in (span.attributes or {}).items() if name in self._kept}
        name = span.name
        if span.kind is SpanKind.SERVER:  # of a request that fits no route, the name would hold its path
            method = attributes.get("http.request.method") or attributes.get("http.method") or "request"
            name = f"{method} {attributes.get('http.route', '')}".strip()
        return ReadableSpan(
            name=name,
            context=span.context,
            parent=span.parent,
            resource=span.resource,
            attributes=attributes,
            events=(),
            links=span.links,
            kind=span.kind,
            instrumentation_scope=span.instrumentation_scope,
            status=Status(span.status.status_code),
            start_time=span.start_time,
            end_time=span.end_time,
        )
