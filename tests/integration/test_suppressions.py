"""The do-not-call list: nobody on it is called, whatever way a lead takes into the queue."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from pipeline.cli import cli
from pipeline.domain.campaign import Campaign
from pipeline.domain.lead import Claim, Lead, Outcome, Retry, settle
from pipeline.ledger import LeadFilter, Ledger, Suppressed
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead, story_of
from tests.waiting import patience

OTHER = "68ecc86fd9fbecbe94310000"
DAY, LEASE = timedelta(days=1), timedelta(minutes=2)
RETRY = Retry(base=timedelta(0), cap=timedelta(0), max_attempts=100)


def phone(number: int) -> str:
    return make_lead(number).phone


def take_in(ledger: Ledger, *leads: Lead, campaign: str = CAMPAIGN, now: datetime = NOW) -> Any:
    known = ledger.campaigns.ensure(campaign, now=now)
    return ledger.leads.take_in(known, leads, batch_id=uuid.uuid4(), max_age=DAY, now=now)


def claim(ledger: Ledger, campaign: str = CAMPAIGN, now: datetime = NOW) -> list[Claim]:
    return ledger.leads.claim(campaign, 100, lease=LEASE, now=now)


def record(ledger: Ledger, claims: Sequence[Claim], outcome: Outcome, now: datetime = NOW) -> None:
    campaign: Campaign = ledger.campaigns.ensure(CAMPAIGN, now=now)
    settled = [settle(make_answer(one, outcome), RETRY, now=now, jitter=random.Random(1)) for one in claims]
    ledger.leads.record(campaign, settled, probe_after=DAY, now=now)


def suppress(ledger: Ledger, *numbers: int, campaign: str | None = None, **how: Any) -> Suppressed:
    values: dict[str, Any] = {"reason": "asked not to be called", "source": "a test", "now": NOW} | how
    return ledger.suppressions.add([phone(number) for number in numbers], campaign=campaign, **values)


def states(ledger: Ledger, campaign: str = CAMPAIGN) -> dict[str, tuple[str, str | None]]:
    found = ledger.reports.leads(LeadFilter(campaign=campaign))
    return {one["phone"]: (one["state"], one["reason"]) for one in found}


WHY = ("suppressed", "suppressed: asked not to be called")


def test_a_lead_whose_number_is_listed_is_taken_in_as_suppressed_and_never_claimed(ledger: Ledger) -> None:
    suppress(ledger, 1)

    taken = take_in(ledger, make_lead(1), make_lead(2))

    assert (taken.leads, taken.accepted, taken.suppressed) == (2, 2, 1)
    assert states(ledger) == {phone(1): WHY, phone(2): ("queued", None)}
    assert [one.phone for one in claim(ledger)] == [phone(2)]
    assert ledger.reports.status(now=NOW)["accepted"] == 2


def test_an_entry_for_one_campaign_leaves_the_others_alone(ledger: Ledger) -> None:
    suppress(ledger, 1, campaign=OTHER)

    take_in(ledger, make_lead(1))
    take_in(ledger, make_lead(1), campaign=OTHER)

    assert states(ledger) == {phone(1): ("queued", None)}
    assert states(ledger, OTHER) == {phone(1): WHY}


def test_adding_takes_queued_leads_out_and_no_others(ledger: Ledger) -> None:
    take_in(ledger, make_lead(1), make_lead(1, key="again"), make_lead(3))
    take_in(ledger, make_lead(1), campaign=OTHER)
    take_in(ledger, make_lead(2))
    record(ledger, [one for one in claim(ledger) if one.phone == phone(2)], Outcome.ACCEPTED)
    with ledger.database.write() as connection:  # the others were claimed as well: back with them
        connection.execute(
            sa.text("UPDATE leads SET state = 'queued', claim_expires_at = NULL WHERE state = 'sending'")
        )

    before = states(ledger)
    assert suppress(ledger, 1, 2, dry_run=True) == Suppressed(2, 3)
    assert states(ledger) == before
    assert suppress(ledger, 1, 2) == Suppressed(2, 3)

    assert states(ledger) == {phone(1): WHY, phone(2): ("submitted", None), phone(3): ("queued", None)}
    assert states(ledger, OTHER) == {phone(1): WHY}
    assert suppress(ledger, 1, 2, reason="another") == Suppressed(0, 0)
    assert {one["reason"] for one in ledger.suppressions.listed(limit=9)} == {"asked not to be called"}


@pytest.mark.parametrize("outcome", [Outcome.THROTTLED, Outcome.BUSY, Outcome.NOT_SENT])
def test_a_lead_that_was_out_is_not_sent_again_when_it_comes_back(ledger: Ledger, outcome: Outcome) -> None:
    take_in(ledger, make_lead(1), make_lead(2))
    out = claim(ledger)
    assert suppress(ledger, 1) == Suppressed(1, 0)

    record(ledger, out, outcome)

    assert [one.phone for one in claim(ledger)] == [phone(2)]
    assert states(ledger)[phone(1)] == WHY
    story = story_of(ledger, LeadFilter(phone=phone(1)))
    assert [one["outcome"] for one in story["attempts_made"]] == [outcome.value]


def test_a_probe_takes_no_suppressed_lead(ledger: Ledger) -> None:
    take_in(ledger, make_lead(1))
    out = claim(ledger)
    suppress(ledger, 1)
    record(ledger, out, Outcome.REFUSED_KEY)

    assert ledger.leads.claim(CAMPAIGN, 1, lease=LEASE, now=NOW, probe=True) == []
    assert states(ledger)[phone(1)] == WHY


def test_a_removal_sends_nothing_until_a_retry_does(ledger: Ledger) -> None:
    suppress(ledger, 1)
    suppress(ledger, 1, campaign=OTHER)
    take_in(ledger, make_lead(1))
    mine = LeadFilter(campaign=CAMPAIGN)

    assert ledger.interventions.retry(mine, max_age=DAY, now=NOW, dry_run=True) == 0
    assert ledger.interventions.retry(mine, max_age=DAY, now=NOW) == 0
    assert states(ledger) == {phone(1): WHY}
    assert ledger.suppressions.remove([phone(1)], campaign=None, dry_run=True) == 1
    assert ledger.suppressions.remove([phone(1)], campaign=None) == 1
    assert [one["campaign_id"] for one in ledger.suppressions.listed(limit=9)] == [OTHER]
    assert (states(ledger), claim(ledger)) == ({phone(1): WHY}, [])
    assert ledger.interventions.retry(mine, max_age=DAY, now=NOW) == 1
    assert [one.phone for one in claim(ledger)] == [phone(1)]


def test_no_verdict_of_an_operator_sends_to_a_suppressed_number(ledger: Ledger) -> None:
    take_in(ledger, make_lead(1), make_lead(2))
    record(ledger, claim(ledger), Outcome.UNCERTAIN)
    suppress(ledger, 1)
    mine = LeadFilter(campaign=CAMPAIGN)

    assert ledger.interventions.resolve(mine, "resend", max_age=DAY, now=NOW) == 1
    assert states(ledger)[phone(1)][0] == "uncertain"
    ledger.leads.settle_old_uncertain(
        default_policy="resend", default_after=timedelta(0), default_max_attempts=9, now=NOW
    )
    assert [one.phone for one in claim(ledger)] == [phone(2)]
    assert states(ledger)[phone(1)] == WHY


def test_nothing_is_claimed_of_a_number_after_its_addition_returned(ledger: Ledger) -> None:
    """Batches, answers, retries and claims meet the additions at random moments, each on a connection of its own."""
    rng = random.Random(77)
    numbers = rng.sample(range(400), 400)
    ended, sending, listed, posts = threading.Event(), threading.Event(), set(), []
    listed_at: dict[str, int] = {}
    clock = iter(range(10**9))

    def feed() -> None:
        for start in range(0, 400, 20):
            take_in(ledger, *(make_lead(number) for number in numbers[start : start + 20]), now=datetime.now(UTC))

    def send() -> None:
        while not ended.is_set():
            now = datetime.now(UTC)
            before = next(clock)  # drawn before the claim's statement begins
            out = ledger.leads.claim(CAMPAIGN, 20, lease=LEASE, now=now)
            posts.extend((before, one.phone) for one in out)
            if out:
                sending.set()
            record(ledger, out, Outcome.THROTTLED, now=now)

    def add() -> None:
        assert sending.wait(patience())
        for start in range(0, 300, 10):
            some = numbers[start : start + 10]
            suppress(ledger, *some)
            listed_at.update((phone(number), next(clock)) for number in some)
            listed.update(some)

    def retry() -> None:
        while not ended.is_set():
            ledger.interventions.retry(LeadFilter(campaign=CAMPAIGN), max_age=DAY, now=datetime.now(UTC))

    with ThreadPoolExecutor(5) as pool:
        loops = [pool.submit(send), pool.submit(send), pool.submit(retry)]
        try:
            for one in (pool.submit(feed), pool.submit(add)):
                one.result(patience())
        finally:
            ended.set()
        for one in loops:
            one.result(patience())

    ledger.leads.claim(CAMPAIGN, 1000, lease=LEASE, now=datetime.now(UTC) + timedelta(seconds=5))  # what came back last
    assert [number for at, number in posts if at > listed_at.get(number, 10**9)] == []
    after = {number: state for number, (state, _) in _all_states(ledger).items()}
    assert {after[phone(number)] for number in listed} == {"suppressed"}


def _all_states(ledger: Ledger) -> dict[str, tuple[str, str | None]]:
    return {
        one["phone"]: (one["state"], one["reason"])
        for one in ledger.reports.leads(LeadFilter(campaign=CAMPAIGN), limit=1000)
    }


def test_a_long_list_is_not_read_for_a_claim(postgres_ledger: Ledger) -> None:
    """A claim looks at one key a lead, also with a plan that was made while the list was empty."""
    ledger = postgres_ledger
    take_in(ledger, *(make_lead(number) for number in range(50)))
    for _ in range(10):  # prepared by now
        assert claim(ledger, OTHER) == []
    suppress(ledger, *range(1000, 6000))

    plans: list[Any] = []

    def explained(*given: Any) -> tuple[str, Any]:
        return "EXPLAIN (ANALYZE, FORMAT JSON) " + given[2], given[3]

    statement, token = ledger.leads._claim, uuid.uuid4()
    with ledger.database.write() as connection:
        sa.event.listen(connection, "before_cursor_execute", explained, retval=True)
        values = {"campaign": CAMPAIGN, "most": 20, "token": token, "until": NOW + LEASE, "now": NOW}
        plans += connection.execute(statement, values).cursor.fetchall()
    (plan,) = plans[0][0]
    read = [node for node in _nodes(plan["Plan"]) if node.get("Relation Name") == "suppressions"]
    assert [(node["Node Type"], node["Actual Loops"]) for node in read] in (
        [("Index Scan", 20)], [("Bitmap Heap Scan", 20)], [("Index Only Scan", 20)],
    )  # fmt: skip


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for one in plan.get("Plans", ()):
        yield from _nodes(one)


# the command


@pytest.fixture
def run(sqlite_ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `pipeline suppress …` on a ledger."""
    monkeypatch.setenv("DATABASE_URL", sqlite_ledger.database.url.render_as_string(hide_password=False))

    def run(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(cli, ["suppress", *arguments], input=stdin)

    return run


FILES = {
    "plain.txt": "\ufeff99997 89877\n\n+919999789878\nno number\n",
    "headed.csv": 'Name,Mobile No,Since\nAsha,9999789877,"2024"\nRavi,099997 89878,\nNobody\n',
    "semicolons.txt": "9999789877\r\n9999789878\r\n12\0\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_any_usual_form_is_read_and_its_bad_lines_are_told(run: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], newline="")

    done = run("add", str(tmp_path / name), "--json", "--reason", "DND")

    assert done.exit_code == 1
    assert orjson.loads(done.stdout) == {"numbers": 2, "added": 2, "leads": 0, "refused": 1, "dry_run": False}
    assert f"{name}, line " in done.stderr
    listed = [orjson.loads(line) for line in run("list", "--json").stdout.splitlines()]
    assert {(one["phone"], one["reason"], one["source"]) for one in listed} == {
        ("+919999789877", "DND", name),
        ("+919999789878", "DND", name),
    }


def test_numbers_of_the_command_line_and_of_stdin(run: Any, sqlite_ledger: Ledger) -> None:
    take_in(sqlite_ledger, make_lead(1))

    assert (
        run("add", "98000 00001", "--dry-run").stdout
        == "1 of 1 numbers would be added; 1 queued leads would be suppressed\n"
    )
    assert run("add", "98000 00001").stdout == "1 of 1 numbers added; 1 queued leads suppressed\n"
    assert run("add", "-", stdin="9800000002\n").exit_code == 0
    assert len(run("list").stdout.splitlines()) == 2
    assert run("list", "--phone", "9800000002").stdout.split()[2:5] == ["+919800000002", "all", "campaigns"]
    assert run("remove", "9800000001", "9800000003").stdout == "1 of 2 entries removed\n"
    deeds = [(one["action"], one["changed"]) for one in sqlite_ledger.audit.entries()]
    assert deeds == [("suppress remove", 1), ("suppress add", 1), ("suppress add", 1)]  # a dry run is none
    assert len(run("list").stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["add", "nowhere.csv"], "nowhere.csv is no phone number, and no file that can be read"),
        (["add", "12345"], "12345: the phone number has too few digits"),
        (["add", "9999789877", "--campaign", "no campaign!"], "campaign id"),
        (["add", "9999789877", "--reason", ""], "is empty"),
    ],
)
def test_what_is_refused_changes_nothing(run: Any, sqlite_ledger: Ledger, arguments: list[str], says: str) -> None:
    done = run(*arguments)

    assert done.exit_code != 0
    assert says in (done.stderr + str(done.exception))
    assert sqlite_ledger.suppressions.listed(limit=9) == []
