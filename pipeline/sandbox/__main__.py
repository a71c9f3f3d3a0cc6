"""The command line of the sandbox: `python -m pipeline.sandbox`."""

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from pipeline.sandbox.answers import MIXED, SHAPES
from pipeline.sandbox.options import FAULTS, PRESETS, Options, OptionsError, checked

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_EPILOG = "\b\nFaults (NAME=SHARE, comma-separated; presets: {presets}):\n{faults}".format(
    presets=", ".join(PRESETS),
    faults="\n".join(f"  {name:<18} {meaning}" for name, meaning in FAULTS.items()),
)


def _setting(flag: str, name: str, **more: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option for the setting *name*, with the default that the setting has."""
    default = Options.model_fields[name].default
    return click.option(flag, name, default=default, show_default=default is not None, **more)


@click.command(name="sandbox", epilog=_EPILOG, context_settings={"max_content_width": 110, "show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8700, help="Port to listen on; 0 takes a free one.")
@_setting("--seed", "seed", type=int, help="What is drawn; the same seed brings the same fates and calls.")
@click.option("--api-key", "api_keys", multiple=True, default=["sandbox-key"], help="Accepted API key; repeatable.")
@click.option("--campaign", "campaigns", multiple=True, help="Known campaign; repeatable. Without any, all are known.")
@click.option("--schema", metavar="KEY,KEY", help="LeadSchema: the keys that recipientData may have.")
@_setting("--rate", "rate", metavar="N/UNIT", help="Limit for each API key, such as 50/s or 600/m; beyond it 429.")
@_setting("--campaign-rate", "campaign_rate", metavar="N/UNIT", help="Limit for each campaign.")
@_setting("--retry-after", "retry_after", type=click.Choice(["seconds", "date", "none"]), help="Form of Retry-After.")
@_setting("--answer-shape", "answer_shape", metavar="SHAPE", help=f"{MIXED}, or one of {', '.join(SHAPES)}.")
@_setting("--latency", "latency_ms", type=float, help="Mean time before an answer, in milliseconds.")
@click.option("--faults", metavar="LIST", default="none", help="What goes wrong, and how often: see below.")
@_setting("--stall-seconds", "stall_seconds", type=float, help="When a stalled answer comes after all; 0: never.")
@_setting("--late-seconds", "late_seconds", type=float, help="How much later late webhooks come.")
@_setting("--refuse-every", "refuse_every_seconds", type=float, help="Seconds from one refusal to the next.")
@_setting("--refuse-for", "refuse_for_seconds", type=float, help="Seconds of each refusal; 0: by the share refused.")
@_setting("--webhook", "webhook", metavar="URL", help="Where events are posted; without it there are no calls.")
@_setting("--webhook-token", "webhook_token", help="Sent to the webhook as x-api-key.")
@_setting("--webhook-retries", "webhook_retries", type=int, help="Retries of an event that got no 2xx.")
@_setting("--webhook-backoff", "webhook_backoff_seconds", type=float, help="Seconds before the first retry.")
@_setting("--webhook-timeout", "webhook_timeout_seconds", type=float, help="Seconds to wait for the webhook.")
@_setting("--webhook-concurrency", "webhook_concurrency", type=int, help="Events that are posted at the same time.")
@_setting("--no-answer", "no_answer", type=float, help="Share of calls that nobody answers.")
@_setting("--busy", "busy", type=float, help="Share of calls that find the line busy.")
@_setting("--failed", "failed", type=float, help="Share of calls that fail.")
@_setting("--call-seconds", "call_seconds", type=float, help="Mean time from acceptance to a call's last event.")
@_setting("--lifecycle", "lifecycle", type=click.Choice(["mixed", "full", "final"]), help="Events of a call.")
@_setting("--drift/--no-drift", "drift", help="Whether payloads vary as in the wild.")
@click.option("--journal", type=click.Path(dir_okay=False, path_type=Path), help="File to append the journal to.")
def command(host: str, port: int, journal: Path | None, **given: Any) -> None:
    """Simulate the Futwork AI Platform.

    Takes POST /api/campaigns/{id}/leads, calls each accepted lead, and posts the call's events to the webhook. When it
    is ready it prints one JSON line with its url and port; it ends on SIGTERM and Ctrl-C.

    \b
    Endpoints beside those of Futwork:
      GET  /_stats           counters
      GET  /_journal         one JSON line for each POST that arrived
      GET  /_webhooks        one JSON line for each webhook event
      POST /_webhooks/flush  make every scheduled event due now
      GET  /_control         the settings
      POST /_control         change settings: {"faults": "wild", "api_keys": []}, {"refuse_now": 2}

    \b
    Examples:
      pipeline sandbox
      pipeline sandbox --port 0 --webhook http://127.0.0.1:8000/webhooks/futwork --webhook-token secret
      pipeline sandbox --rate 50/s --latency 80 --faults mild
      pipeline sandbox --faults wild,stall=0,dup=0.5 --seed 7 --journal journal.ndjson
      curl -X POST http://127.0.0.1:8700/_control -d '{"gone_campaigns": ["c1"]}'
    """
    try:
        options = _options(given)
    except OptionsError as error:
        raise click.UsageError(str(error)) from error
    try:
        from pipeline.sandbox import server
    except ImportError as error:
        raise click.ClickException(f"{error.name} is missing; pip install 'futwork-lead-pipeline[embedded]'") from error

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def end(*_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended already: a second signal changes nothing
                loop.call_soon_threadsafe(stop.set)

        for number in _END_SIGNALS:
            signal.signal(number, end)
        async with server.listening(options, host=host, port=port, journal=journal) as sandbox:
            click.echo(json.dumps({"ready": True, "url": sandbox.url, "port": sandbox.port}))
            sys.stdout.flush()
            await stop.wait()

    try:
        server.run(main)
        # The interpreter takes its handlers away as it ends; a second signal would then kill the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _options(given: dict[str, Any]) -> Options:
    values = {name: value for name, value in given.items() if value is not None}
    if not values.get("campaigns"):
        values.pop("campaigns", None)
    schema = values.pop("schema", None)
    if schema is not None:
        values["lead_schema"] = {key.strip() for key in schema.split(",") if key.strip()}
    return checked(values)


if __name__ == "__main__":
    command(prog_name="python -m pipeline.sandbox")
