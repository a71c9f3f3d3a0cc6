"""Logs as the operator reads them: a constant event name with the data as fields; JSON, or colour in a terminal.

No field holds a phone number, a key or a transcript; ids say which lead is meant. The pipeline does not write the lines
of libraries and the texts of exceptions, so they go through `redaction`.

Each line about leads names every one of them in its field `lead` or `leads`, so that one id finds a lead's whole way
through all processes. A line is about a batch and not about a lead, because a list of ids costs a hundredth of as many
lines.
"""

from __future__ import annotations

import logging
import sys
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from pipeline.observability.redaction import redactor

if TYPE_CHECKING:
    from pipeline.settings import Settings


def _add_trace(_logger: Any, _method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The trace that the line belongs to, where somebody traces."""
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import trace

        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            fields["trace_id"] = f"{span.trace_id:032x}"
    return fields


_BEFORE: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    _add_trace,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure_logs(settings: Settings) -> None:
    """Send our logs and those of the libraries to stderr in the configured form; safe to repeat."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    render: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer(serializer=_as_json)]
        if as_json
        else [_ids_as_text, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_BEFORE,
            processors=[
                structlog.processors.format_exc_info,  # not before: error reporting wants the exception
                _mask(settings),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    for noisy in ("urllib3", "alembic", "kombu", "amqp", "celery.bootsteps"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("celery.pool").setLevel(logging.INFO)  # its debug lines hold whole messages


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose calls take an event name and fields: `log.info("batch taken in", accepted=3)`.

    It ends in Python's own logging. In a program that uses our library and never calls `configure_logs`, that program
    decides what becomes of our lines.
    """
    found: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, *_BEFORE, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return found


@contextmanager
def logged_with(**fields: object) -> Iterator[None]:
    """Add fields to every line of this thread until the block ends, those of libraries included."""
    with structlog.contextvars.bound_contextvars(**fields):
        yield


def first_line(error: BaseException) -> str:
    """The first line of an error, which may be logged; databases quote a refused row in the lines after it."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__


def place(error: BaseException) -> str:
    """Where an error was raised: the innermost four calls, the innermost first."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _mask(settings: Settings) -> structlog.typing.Processor:
    """Take numbers and secrets out of what others wrote: the lines of libraries, and the texts of exceptions."""
    redact = redactor(settings.secrets())

    def mask(_logger: Any, _method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if fields.get("_from_structlog") is False:
            fields["event"] = redact(str(fields.get("event")))
        if isinstance(text := fields.get("exception"), str):
            fields["exception"] = redact(text)
        return fields

    return mask


def _as_json(fields: Mapping[str, Any], **_: Any) -> str:
    return orjson.dumps(fields, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _ids_as_text(_logger: Any, _method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Ids as people read them, where JSON does that by itself."""
    for name, value in fields.items():
        if isinstance(value, uuid.UUID):
            fields[name] = str(value)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], uuid.UUID):
            fields[name] = " ".join(map(str, value))
    return fields
