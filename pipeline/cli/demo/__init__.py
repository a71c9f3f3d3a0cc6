"""`pipeline demo`: the whole journey on real parts in some twenty seconds, and a report that proves what it says.

1. Start a private Valkey, an SQLite ledger in a temporary folder, the sandbox with a few faults on, two workers, beat
   and the web server: the processes of a real deployment.
2. Hand in a file of leads with `pipeline enqueue`, bad rows and all.
3. Watch until nothing is under way any more.
4. Compare three independent counts: what the producer was told, what the ledger holds, what the sandbox's journal saw.
"""

from __future__ import annotations

import csv
import json
import secrets
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.cli.demo.fake_leads import write_leads
from pipeline.cli.demo.screen import Screen
from pipeline.cli.rows import open_rows
from pipeline.devstack.embedded_valkey import embedded_broker, free_port
from pipeline.devstack.supervisor import LOOPBACK, ProcessFailed, Supervisor, answers
from pipeline.domain.lead import InvalidLead, LeadState, lead_id
from pipeline.futwork.fields import read_lead
from pipeline.ledger import LeadFilter, Ledger
from pipeline.settings import Settings

CAMPAIGN = "68ecc86fd9fbecbe9431a18e"  # the campaign of the vendor's own example
BUNDLED = Path(__file__).parent / "leads.csv"
BUNDLED_LEADS = 300
BUNDLED_SEED = 7

_KEY = "sandbox-key"
_UNDER_WAY = (LeadState.QUEUED, LeadState.SENDING)
_QUIET_SECONDS = 1.0
_REFUSALS_SECONDS = 15.0
_STILL_SECONDS = 45.0  # longer than a broker holds back what a killed worker had
_LONGEST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo's flags say."""

    leads: int = BUNDLED_LEADS
    rate: str = "40/s"
    faults: str = "mild"
    seed: int = BUNDLED_SEED
    folder: Path = Path()


@dataclass(slots=True)
class DemoReport:
    """What the demo found, from three sides that do not know of each other."""

    status: dict[str, Any]
    rows: int
    refused: list[dict[str, str]]
    promised: int
    """Different people whose rows `pipeline enqueue` said were accepted."""
    attempts: dict[str, int]
    sandbox: dict[str, Any]
    duplicates: int
    """Leads that the sandbox accepted more than once."""
    story: dict[str, Any] | None
    seconds: float
    problems: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        """People who were promised a call and whom the ledger does not hold."""
        return self.promised - int(self.status["accepted"])

    def judge(self) -> None:
        """Write down every way in which the report is not as promised."""
        total = sum(self.status["leads"].values())
        if total != self.status["accepted"]:
            self.problems.append(f"accepted {self.status['accepted']} is not the sum over states, {total}")
        if self.lost > 0:
            self.problems.append(f"{self.lost} leads were promised and are not in the ledger")
        if self.lost < 0:
            self.problems.append(f"the ledger holds {-self.lost} leads that nobody handed in")
        if self.duplicates:
            self.problems.append(f"{self.duplicates} people would have been called twice")
        under_way = sum(self.status["leads"][state] for state in _UNDER_WAY)
        if under_way:
            self.problems.append(f"{under_way} leads are still under way")

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


def run_demo(options: DemoOptions, screen: Screen) -> DemoReport:
    """Run the demo in *options.folder* and return its report; every process has ended when this returns or raises."""
    started = time.monotonic()
    folder = options.folder
    source = BUNDLED
    if options.leads != BUNDLED_LEADS or options.seed != BUNDLED_SEED:
        source = folder / "leads.csv"
        write_leads(source, options.leads, seed=options.seed)
    screen.say("starting Valkey, the sandbox, two workers, beat and the web server")
    with _running(options) as (stack, ledger, sandbox):
        screen.say(f"handing in {source.name}: {options.leads} rows for campaign {CAMPAIGN}")
        summary = _enqueue(stack, source, folder)
        promised = _people(source)
        with screen.live(options.rate):
            _watch(stack, ledger, sandbox, screen, promised)
        report = DemoReport(
            status=ledger.reports.status(now=datetime.now(UTC)),
            rows=summary["rows"],
            refused=_read_refused(summary["refused_file"]),
            promised=promised,
            attempts=ledger.reports.attempts_by_outcome(),
            sandbox=_stats(sandbox),
            duplicates=_accepted_twice(sandbox),
            story=_good_story(ledger),
            seconds=0.0,
        )
        screen.say("ending every process")
    report.seconds = time.monotonic() - started
    report.judge()
    return report


@contextmanager
def _running(options: DemoOptions) -> Iterator[tuple[Supervisor, Ledger, str]]:
    """The whole stack, ready to take leads: the stack, the ledger, and the sandbox's root URL."""
    folder = options.folder
    token, web_port, sandbox_port = secrets.token_urlsafe(16), free_port(), free_port()
    with embedded_broker(folder / "valkey") as broker_url:
        environment = demo_environment(folder, broker_url, f"http://127.0.0.1:{sandbox_port}/api", token, options.rate)
        ledger = Ledger(environment["DATABASE_URL"])
        ledger.migrate()
        with Supervisor(folder / "logs", environment, cwd=folder) as stack:
            try:
                webhook = f"http://127.0.0.1:{web_port}/webhooks/futwork"
                arguments = ["--port", str(sandbox_port), "--seed", str(options.seed), "--api-key", _KEY]
                arguments += ["--faults", options.faults, "--webhook", webhook, "--webhook-token", token]
                arguments += ["--latency", "60", "--call-seconds", "1", "--stall-seconds", "8", "--late-seconds", "2"]
                stack.start("sandbox", ["-m", "pipeline.sandbox", *arguments], outlives=True)
                stack.start_pipeline(web=f"127.0.0.1:{web_port}")
                sandbox = f"http://127.0.0.1:{sandbox_port}"
                stack.await_ready(lambda: answers(f"{sandbox}/_stats"), "the sandbox")
                stack.await_ready(lambda: answers(f"http://127.0.0.1:{web_port}/readyz"), "the web server")
                yield stack, ledger, sandbox
            finally:
                ledger.close()


def demo_environment(folder: Path, broker_url: str, base_url: str, token: str, rate: str) -> dict[str, str]:
    """The settings of the demo's processes, every one of them: those of production, with shorter waits.

    What the caller's environment says has no part in it, nor has a `.env` file: there is none in *folder*.
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


def _enqueue(stack: Supervisor, source: Path, folder: Path) -> dict[str, Any]:
    """Hand the file in as anyone would, with the command."""
    arguments = ["enqueue", str(source), "--campaign", CAMPAIGN, "--json", "--refused", str(folder / "refused.csv")]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        env=stack.environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise ProcessFailed(f"pipeline enqueue failed: {done.stderr.strip()}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def _watch(stack: Supervisor, ledger: Ledger, sandbox: str, screen: Screen, promised: int) -> None:
    """Show how it goes until all is quiet: nothing under way here, no webhook left to come, no event unmerged.

    Gives up when nothing has moved for long; the report then says what is missing.
    """
    began = moved = time.monotonic()
    last: object = None
    quiet_since: float | None = None
    while time.monotonic() - began < _LONGEST_SECONDS and time.monotonic() - moved < _STILL_SECONDS:
        stack.check()
        status = ledger.reports.status(now=datetime.now(UTC))
        stats = _stats(sandbox)
        screen.show(status, stats, ledger.reports.troubles(limit=5))
        now = (status["leads"], status["calls"], status["events"], stats["received"])
        if now != last:
            last, moved = now, time.monotonic()
        under_way = sum(status["leads"][state] for state in _UNDER_WAY)
        settled = status["accepted"] >= promised and not under_way and not stats["webhooks"]["pending"]
        settled = settled and status["calls"]["total"] >= stats["calls"]
        if not settled:
            quiet_since = None
        elif quiet_since is None:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= _QUIET_SECONDS:
            return
        time.sleep(0.25)


def _people(source: Path) -> int:
    """How many different people a file's acceptable rows name: what `enqueue` promised to call."""
    ids: set[uuid.UUID] = set()
    with source.open("rb") as file:
        leads = open_rows(file, source.name, form="csv", encoding=None, phone_column=None, key_column=None)
        for row in leads.rows:
            try:
                ids.add(lead_id(CAMPAIGN, read_lead(row.lead, region="IN").key))
            except InvalidLead:
                continue
    return len(ids)


def _accepted_twice(sandbox: str) -> int:
    """How many numbers the sandbox accepted more than once, from its journal."""
    times: dict[str, int] = {}
    for line in _get(f"{sandbox}/_journal").splitlines():
        entry = json.loads(line)
        if entry["accepted"]:
            times[entry["phone"]] = times.get(entry["phone"], 0) + 1
    return sum(count > 1 for count in times.values())


def _good_story(ledger: Ledger) -> dict[str, Any] | None:
    """A story worth telling: of a lead that had trouble on its way and then a conversation, if there is one."""
    called = ledger.reports.leads(LeadFilter(states=(LeadState.CALLED,)), limit=1000)
    best, best_worth = None, (False, False, 0)
    for one in sorted(called, key=lambda lead: -lead["attempts"])[:60]:
        story = ledger.reports.story(uuid.UUID(one["id"]))
        if story is None:
            continue
        turns = max((len(call["details"].get("turns", ())) for call in story["calls"]), default=0)
        talked = any(call["details"].get("lead_word_count", 0) > 5 for call in story["calls"])
        worth = (talked, talked and len(story["attempts_made"]) > 1, -abs(turns - 6))
        if best is None or worth > best_worth:
            best, best_worth = story, worth
    return best


def _read_refused(path: str | None) -> list[dict[str, str]]:
    if path is None:
        return []
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _stats(sandbox: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_get(f"{sandbox}/_stats"))
    return found


def _get(url: str) -> bytes:
    """What the sandbox answers, with patience: to refuse connections at times is one of its faults."""
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
