"""`pipeline up`: every process of a deployment in one terminal, for development."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

import click

from pipeline.cli.run import faults_option
from pipeline.cli.session import VAR, Refused, note, private_broker
from pipeline.devstack.embedded_valkey import free_port
from pipeline.devstack.supervisor import Supervisor, answers, is_free
from pipeline.ledger import Ledger
from pipeline.settings import Settings, SettingsError, load_settings
from pipeline.web.ops.access import hash_password

_HUSH = ("celery.worker.strategy", "] succeeded in ")
"""Lines of every task: they are in the log files. What tasks find is logged separately."""

_FLOWER_PORT = 5555
_SANDBOX_KEY = "sandbox-key"


@click.command()
@click.option("--sandbox", "with_sandbox", is_flag=True, help="Call nobody: run the simulator and send to it.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535), help="The web server's port.")
@faults_option
@click.option("--flower", is_flag=True, help="Run Flower as well, on port 5555.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes of each worker.")
def up(*, with_sandbox: bool, port: int, faults: str, flower: bool, workers: int) -> None:
    """Run every process in this terminal until Ctrl-C; without BROKER_URL with a private broker, all under ./var.

    Without OPS_USERS it makes an operator for the status pages, with a password that holds until the end.

    \b
    pipeline up --sandbox
    FUTWORK_API_KEY=… pipeline up
    """
    settings = load_settings()
    if not with_sandbox and not settings.api_keys():
        raise SettingsError("FUTWORK_API_KEY is not set: set it, or use --sandbox, which calls nobody")
    if not is_free(port):
        raise Refused(f"port {port} is in use: choose another with --port")
    if flower and not is_free(_FLOWER_PORT):
        raise Refused(f"port {_FLOWER_PORT} is in use, and Flower would listen there")
    if with_sandbox and settings.broker_url:
        note("note: BROKER_URL is set: leads that wait in that broker go to the sandbox now, and nobody is called")
    try:
        with contextlib.ExitStack() as exits:
            url = settings.broker_url or exits.enter_context(private_broker(alone=True))
            # The sandbox gets a token of its own, because every user of this machine can read its command line.
            token = secrets.token_urlsafe(16)
            environment, addresses = _environment(settings, f"http://127.0.0.1:{port}", token)
            environment["BROKER_URL"] = url
            sandbox_port = free_port()
            if with_sandbox:
                environment |= _sandbox_environment(settings, sandbox_port)
            with contextlib.closing(Ledger(settings.database_url)) as ledger:
                ledger.migrate()
            stack = exits.enter_context(
                Supervisor(VAR / "logs", environment, cwd=Path.cwd(), echo=sys.stderr, hush=_HUSH)
            )
            exits.callback(note, "ending every process")
            if with_sandbox:
                arguments = ["-m", "pipeline.sandbox", "--port", str(sandbox_port), "--faults", faults]
                arguments += ["--webhook", f"http://127.0.0.1:{port}/webhooks/futwork", "--webhook-token", token]
                stack.start("sandbox", arguments, ends_last=True)
            stack.start_pipeline(web=f"127.0.0.1:{port}", workers=workers)
            if flower:
                stack.celery("flower", "flower", "--address=127.0.0.1", f"--port={_FLOWER_PORT}")
            stack.await_ready(lambda: answers(f"http://127.0.0.1:{port}/readyz"), "the web server")
            for line in addresses:
                note(line)
            command = "pipeline" if shutil.which("pipeline") else os.path.relpath(sys.argv[0])  # outside its venv
            where = "; the sandbox knows every ID" if with_sandbox else ""
            note(f"hand leads in with `{command} enqueue leads.csv --campaign ID`{where}; Ctrl-C ends everything")
            while True:
                stack.check()
                time.sleep(0.5)
    except KeyboardInterrupt:
        note("everything has ended")


def _environment(settings: Settings, web: str, token: str) -> tuple[dict[str, str], list[str]]:
    """What the processes need beyond the settings, and the lines that say where the web server is and who may use it.

    Secrets that the user set are used and not shown; the others are made for this run, and shown once.
    """
    intake, password = secrets.token_urlsafe(16), secrets.token_urlsafe(9)
    environment = {"WEBHOOK_TOKEN": ",".join([*settings.webhook_tokens(), token])}
    pages, bearer = "sign in as one of OPS_USERS", "one of INTAKE_TOKENS"
    if not settings.operators():
        environment |= {
            "OPS_USERS": f"operator:{hash_password(password)}:operator",
            "OPS_SECRET": secrets.token_hex(24),
        }
        pages = f"user operator   password {password}"
    if not settings.intake_scopes():
        environment["INTAKE_TOKENS"] = bearer = intake
    if settings.log_format == "auto":
        environment["LOG_FORMAT"] = "console"  # the processes write to files, and a person reads them here
    hook = "the one of WEBHOOK_TOKEN" if settings.webhook_tokens() else token
    return environment, [
        f"pages     {web}/   {pages}",
        f"webhook   {web}/webhooks/futwork   token {hook}",
        f"intake    {web}/v1/campaigns/ID/leads   bearer {bearer}",
    ]


def _sandbox_environment(settings: Settings, port: int) -> dict[str, str]:
    """The address of the sandbox, and its key in the place of every account's real one."""
    environment = {"FUTWORK_BASE_URL": f"http://127.0.0.1:{port}/api", "FUTWORK_API_KEY": _SANDBOX_KEY}
    others = [name for name in settings.api_keys() if name != "default"]
    if others:
        environment["FUTWORK_API_KEYS"] = ",".join(f"{name}={_SANDBOX_KEY}" for name in others)
    return environment
