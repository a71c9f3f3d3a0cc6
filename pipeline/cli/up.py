"""`pipeline up`: the stack of a deployment in one terminal, for development."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

from pipeline.cli.session import VAR, Refused, note, private_broker
from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import Supervisor, answers, is_free
from pipeline.ledger import Ledger
from pipeline.settings import Settings, SettingsError, load_settings

_HUSH = ("pipeline.sweep", "pipeline.tidy", "celery.worker.strategy", "] succeeded in ")
"""Of every task, and every two seconds: the files have it. What the tasks find is logged by itself."""

_FLOWER_PORT = 5555
_SANDBOX_KEY = "sandbox-key"


def run_up(*, with_sandbox: bool, port: int, faults: str, flower: bool, workers: int) -> None:
    """Start everything, say where it is, and wait for Ctrl-C, which is its orderly end, or for a part to fail."""
    settings = load_settings()
    if not with_sandbox and not settings.api_keys():
        raise SettingsError("FUTWORK_API_KEY is not set: set it, or use --sandbox, which calls nobody")
    if not is_free(port):
        raise Refused(f"port {port} is in use: choose another with --port")
    if flower and not is_free(_FLOWER_PORT):
        raise Refused(f"port {_FLOWER_PORT} is in use, and Flower would listen there")
    if with_sandbox and settings.broker_url:
        note("note: BROKER_URL is set: the leads that wait there go to the sandbox now, and nobody is called")
    try:
        with contextlib.ExitStack() as exits:
            url = settings.broker_url or exits.enter_context(private_broker(alone=True))
            _run(exits, settings, url, with_sandbox, port, faults, flower, workers)
    except KeyboardInterrupt:
        note("everything has ended")


def _run(
    exits: contextlib.ExitStack,
    settings: Settings,
    broker_url: str,
    with_sandbox: bool,
    port: int,
    faults: str,
    flower: bool,
    workers: int,
) -> None:
    token, intake = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
    environment = {
        "BROKER_URL": broker_url,
        # The sandbox gets a token of its own, because its command line is there for all to read.
        "WEBHOOK_TOKEN": ",".join([*settings.webhook_tokens(), token]),
    }
    if not settings.intake_scopes():
        environment["INTAKE_TOKENS"] = intake
    if settings.log_format == "auto":
        environment["LOG_FORMAT"] = "console"  # the parts write to files, and a person reads them here
    sandbox_port = free_port()
    if with_sandbox:
        environment |= _sandbox_environment(settings, sandbox_port)
    ledger = Ledger(settings.database_url)
    try:
        ledger.migrate()
    finally:
        ledger.close()
    stack = exits.enter_context(Supervisor(VAR / "logs", environment, cwd=Path.cwd(), echo=sys.stderr, hush=_HUSH))
    exits.callback(note, "ending every process")
    if with_sandbox:
        webhook = f"http://127.0.0.1:{port}/webhooks/futwork"
        arguments = ["-m", "pipeline.sandbox", "--port", str(sandbox_port), "--faults", faults]
        stack.start("sandbox", [*arguments, "--webhook", webhook, "--webhook-token", token], outlives=True)
    stack.start_pipeline(web=f"127.0.0.1:{port}", workers=workers)
    if flower:
        stack.celery("flower", "flower", "--address=127.0.0.1", f"--port={_FLOWER_PORT}")
    stack.await_ready(lambda: answers(f"http://127.0.0.1:{port}/readyz"), "the web server")
    shown = "the one of WEBHOOK_TOKEN" if settings.webhook_tokens() else token
    note(f"webhook   http://127.0.0.1:{port}/webhooks/futwork   token {shown}")
    shown = "one of INTAKE_TOKENS" if settings.intake_scopes() else intake
    note(f"intake    http://127.0.0.1:{port}/v1/campaigns/ID/leads   bearer {shown}")
    command = "pipeline" if shutil.which("pipeline") else os.path.relpath(sys.argv[0])  # not there without its venv
    where = "; the sandbox knows every ID" if with_sandbox else ""
    note(f"hand leads in with `{command} enqueue leads.csv --campaign ID`{where}; Ctrl-C ends everything")
    while True:
        stack.check()
        time.sleep(0.5)


def _sandbox_environment(settings: Settings, port: int) -> dict[str, str]:
    """What makes every account's submissions go to the sandbox, with its key in the place of the real ones."""
    environment = {
        "FUTWORK_BASE_URL": f"http://127.0.0.1:{port}/api",
        "FUTWORK_API_KEY": _SANDBOX_KEY,
    }
    others = [name for name in settings.api_keys() if name != "default"]
    if others:
        environment["FUTWORK_API_KEYS"] = ",".join(f"{name}={_SANDBOX_KEY}" for name in others)
    return environment
