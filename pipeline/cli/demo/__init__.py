"""`pipeline demo`: the whole journey with real processes in about twenty seconds, and a report that proves its claim.

1. Start a private Valkey, an SQLite ledger in a temporary folder, the sandbox with a few faults on, two workers, beat
   and the web server: the processes of a real deployment.
2. Hand in a file of leads with `pipeline enqueue`, bad rows included.
3. Watch until no lead and no event is under way.
4. Compare three independent counts: what the producer accepted, what the ledger holds, what the sandbox's journal has.
"""

from __future__ import annotations

import contextlib
import csv
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from pipeline.cli.demo import screen as shown
from pipeline.cli.demo.fake_leads import write_leads
from pipeline.cli.run import faults_option
from pipeline.cli.session import console, note, print_json
from pipeline.devstack.embedded_valkey import embedded_broker, free_port
from pipeline.devstack.supervisor import LOOPBACK, ProcessFailed, Supervisor, answers
from pipeline.domain.lead import LeadState
from pipeline.domain.phone import to_e164
from pipeline.ledger import LeadFilter, Ledger
from pipeline.settings import Rate, Settings

CAMPAIGN = "68ecc86fd9fbecbe9431a18e"  # the campaign of the vendor's own example

_KEY = "sandbox-key"
_UNDER_WAY = (LeadState.QUEUED, LeadState.SENDING)
_QUIET_SECONDS = 1.0
_REFUSALS_SECONDS = 15.0
_STILL_SECONDS = 45.0  # longer than a broker holds back the messages of a killed worker


def _check_rate(_context: Any, _parameter: Any, value: str) -> str:
    try:
        return str(Rate.parse(value))
    except ValueError as error:
        raise click.BadParameter(f"{value}: {error}") from None


@click.command()
@click.option("--leads", default=300, show_default=True, type=click.IntRange(1, 100_000), help="Rows to hand in.")
@click.option("--rate", default="40/s", show_default=True, callback=_check_rate, help="The rate limit.")
@faults_option
@click.option("--seed", default=7, show_default=True, type=int, help="Another seed: other leads, faults and calls.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--keep", is_flag=True, help="Keep the folder with ledger and logs, and say where it is.")
def demo(*, leads: int, rate: str, faults: str, seed: int, as_json: bool, keep: bool) -> None:
    """Watch leads travel from a file to a simulated Futwork and back as calls (about 20 seconds).

    Everything runs in a temporary folder and has ended when the command returns, also on Ctrl-C. Exit 0 only if no
    lead was lost, nobody would have been called twice, and accepted is the sum over states.

    \b
    pipeline demo
    pipeline demo --leads 1000 --rate 200/s --faults wild --seed 42
    pipeline demo --json | jq .leads
    """
    folder = Path(tempfile.mkdtemp(prefix="pipeline-demo-"))
    worth_keeping = True
    try:
        screen = shown.Screen(quiet=as_json)
        report = run_demo(folder, leads=leads, rate=rate, faults=faults, seed=seed, screen=screen)
        worth_keeping = bool(report.problems)
    except KeyboardInterrupt:
        worth_keeping = False
        raise
    finally:
        if keep or worth_keeping:
            note(f"ledger and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if as_json:
        print_json(report.as_json())
    else:
        shown.print_report(report, console())
    sys.exit(1 if report.problems else 0)


@dataclass(slots=True)
class DemoReport:
    """What the demo found, from three independent sources."""

    status: dict[str, Any]
    rows: int
    refused: list[dict[str, str]]
    promised: int
    """Different people in the rows that `pipeline enqueue` accepted."""
    attempts: dict[str, int]
    sandbox: dict[str, Any]
    duplicates: int
    """Leads that the sandbox accepted more than once."""
    story: dict[str, Any] | None
    seconds: float

    @property
    def lost(self) -> int:
        """People whose row was accepted and whom the ledger does not hold."""
        return self.promised - int(self.status["accepted"])

    @property
    def problems(self) -> list[str]:
        """Each way in which the counts differ from what was promised."""
        accepted, total = self.status["accepted"], sum(self.status["leads"].values())
        under_way = sum(self.status["leads"][state] for state in _UNDER_WAY)
        found = {
            f"accepted {accepted} is not the sum over states, {total}": total != accepted,
            f"{self.lost} leads were promised and are not in the ledger": self.lost > 0,
            f"the ledger holds {-self.lost} leads that nobody handed in": self.lost < 0,
            f"{self.duplicates} people would have been called twice": self.duplicates > 0,
            f"{under_way} leads are still under way": under_way > 0,
        }
        return [problem for problem, is_there in found.items() if is_there]

    def as_json(self) -> dict[str, Any]:
        """The report in the shape of `pipeline status --json`, with `refused`, `duplicates` and `lost`."""
        return self.status | {
            "refused": len(self.refused),
            "duplicates": self.duplicates,
            "lost": self.lost,
            "attempts": self.attempts,
            "sandbox": {"received": self.sandbox["received"], "accepted": self.sandbox["accepted"]},
            "seconds": round(self.seconds, 1),
            "problems": self.problems,
        }


def run_demo(folder: Path, *, leads: int, rate: str, faults: str, seed: int, screen: shown.Screen) -> DemoReport:
    """Run the demo in *folder* and return its report; every process has ended when this returns or raises."""
    started = time.monotonic()
    source = folder / "leads.csv"
    write_leads(source, leads, seed=seed)
    screen.say("starting Valkey, the sandbox, two workers, beat and the web server")
    with _running(folder, rate, faults, seed) as (stack, ledger, sandbox):
        screen.say(f"handing in {source.name}: {leads} rows for campaign {CAMPAIGN}")
        summary = _enqueue(stack, source)
        refused = _read_csv(Path(summary["refused_file"])) if summary["refused_file"] else []
        promised = _people(source, {int(row["line"]) for row in refused})
        with screen.live(rate):
            _watch(stack, ledger, sandbox, screen, promised)
        report = DemoReport(
            status=ledger.reports.status(now=datetime.now(UTC)),
            rows=summary["rows"],
            refused=refused,
            promised=promised,
            attempts=ledger.reports.attempts_by_outcome(),
            sandbox=json.loads(_get(f"{sandbox}/_stats")),
            duplicates=_accepted_twice(sandbox),
            story=_good_story(ledger),
            seconds=0.0,
        )
        screen.say("ending every process")
    report.seconds = time.monotonic() - started
    return report


@contextlib.contextmanager
def _running(folder: Path, rate: str, faults: str, seed: int) -> Iterator[tuple[Supervisor, Ledger, str]]:
    """Every process, ready for leads: their supervisor, the ledger, and the root URL of the sandbox."""
    token, sandbox = secrets.token_urlsafe(16), f"http://127.0.0.1:{(sandbox_port := free_port())}"
    web = f"127.0.0.1:{free_port()}"
    with embedded_broker(folder / "valkey") as broker_url:
        environment = _environment(folder, broker_url, f"{sandbox}/api", token, rate)
        with (
            contextlib.closing(Ledger(environment["DATABASE_URL"])) as ledger,
            Supervisor(folder / "logs", environment, cwd=folder) as stack,
        ):
            ledger.migrate()
            arguments = ["--port", str(sandbox_port), "--seed", str(seed), "--api-key", _KEY]
            arguments += ["--faults", faults, "--webhook", f"http://{web}/webhooks/futwork"]
            arguments += ["--webhook-token", token, "--latency", "60", "--call-seconds", "1", "--stall-seconds", "8"]
            stack.start("sandbox", ["-m", "pipeline.sandbox", *arguments, "--late-seconds", "2"], ends_last=True)
            stack.start_pipeline(web=web)
            stack.await_ready(lambda: answers(f"{sandbox}/_stats"), "the sandbox")
            stack.await_ready(lambda: answers(f"http://{web}/readyz"), "the web server")
            yield stack, ledger, sandbox


def _environment(folder: Path, broker_url: str, base_url: str, token: str, rate: str) -> dict[str, str]:
    """Every setting of the demo's processes: those of production, with shorter waits.

    The caller's environment does not matter, nor does a `.env` file: there is none in *folder*.
    """
    ours = {
        "BROKER_URL": broker_url,
        "DATABASE_URL": f"sqlite:///{folder / 'ledger.db'}",
        "SPOOL_DIR": str(folder / "spool"),
        "FUTWORK_BASE_URL": base_url,
        "FUTWORK_API_KEY": _KEY,
        "WEBHOOK_TOKEN": token,
        "ACCOUNT_RATE": rate,
        "CAMPAIGN_RATE": rate,
        "READ_TIMEOUT_SECONDS": "3",
        "CONNECT_TIMEOUT_SECONDS": "2",
        "CLAIM_SECONDS": "15",
        "BACKOFF_BASE_SECONDS": "0.3",
        "BACKOFF_CAP_SECONDS": "2",
        "PROBE_FIRST_SECONDS": "1",
        "SWEEP_SECONDS": "1",
        "LOG_FORMAT": "json",
    }
    # An empty value counts as not set.
    return dict.fromkeys((name.upper() for name in Settings.model_fields), "") | {"GUNICORN_CMD_ARGS": ""} | ours


def _enqueue(stack: Supervisor, source: Path) -> dict[str, Any]:
    """Hand the file in with the command, as a user does, and return its summary."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "enqueue", str(source), "--campaign", CAMPAIGN, "--json"],
        env=stack.environment,
        cwd=source.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise ProcessFailed(f"pipeline enqueue failed: {done.stderr.strip()}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _watch(stack: Supervisor, ledger: Ledger, sandbox: str, screen: shown.Screen, promised: int) -> None:
    """Show the progress until no lead is under way, every call has come back and the sandbox has no event left to post.

    Gives up when nothing has moved for long; the report then says what is missing.
    """
    moved = settled_since = time.monotonic()
    last: object = None
    while time.monotonic() - moved < _STILL_SECONDS:
        stack.check()
        status, stats = ledger.reports.status(now=datetime.now(UTC)), json.loads(_get(f"{sandbox}/_stats"))
        screen.show(status, stats, ledger.reports.troubles(limit=5))
        now = (status["leads"], status["calls"], status["events"], stats["received"])
        if now != last:
            last, moved = now, time.monotonic()
        if (
            status["accepted"] < promised
            or any(status["leads"][state] for state in _UNDER_WAY)
            or stats["webhooks"]["pending"]
            or status["calls"]["total"] < stats["calls"]
        ):
            settled_since = time.monotonic()
        elif time.monotonic() - settled_since >= _QUIET_SECONDS:
            return
        time.sleep(0.25)


def _people(source: Path, refused: set[int]) -> int:
    """How many different numbers the file has, without its refused lines: the leads that `enqueue` promised to call."""
    rows = enumerate(_read_csv(source), start=2)  # line 1 is the header
    return len({to_e164(row["phone"], "IN") for line, row in rows if line not in refused})


def _accepted_twice(sandbox: str) -> int:
    """How many numbers the sandbox accepted more than once, from its journal."""
    entries = map(json.loads, _get(f"{sandbox}/_journal").splitlines())
    times = Counter(entry["phone"] for entry in entries if entry["accepted"])
    return sum(count > 1 for count in times.values())


def _good_story(ledger: Ledger) -> dict[str, Any] | None:
    """The story of a lead that had trouble on its way and then a conversation, if there is one."""
    called = ledger.reports.leads(LeadFilter(states=(LeadState.CALLED,)), limit=1000)
    most_attempts = sorted(called, key=lambda lead: -lead["attempts"])[:60]
    stories = filter(None, (ledger.reports.story(uuid.UUID(one["id"])) for one in most_attempts))

    def worth(story: dict[str, Any]) -> tuple[bool, bool, int]:
        turns = max((len(call["details"].get("turns", ())) for call in story["calls"]), default=0)
        talked = any(call["details"].get("lead_word_count", 0) > 5 for call in story["calls"])
        return talked, talked and len(story["attempts_made"]) > 1, -abs(turns - 6)

    return max(stories, key=worth, default=None)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _get(url: str) -> bytes:
    """What the sandbox answers; tried again for a while, because it refuses connections as one of its faults."""
    deadline = time.monotonic() + _REFUSALS_SECONDS
    while True:
        try:
            with LOOPBACK.open(url, timeout=10) as answer:
                body: bytes = answer.read()
                return body
        except OSError as error:
            if time.monotonic() > deadline:
                raise ProcessFailed(f"the sandbox does not answer: {error}") from None
        time.sleep(0.05)
