"""The audit log: each deed has its line, in one transaction, whether it came by a page or by a command."""

from __future__ import annotations

import getpass
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.domain.campaign import Hold, HoldKind
from pipeline.ledger import Actor, EmptyFilter, LeadFilter, Ledger, open_ledger
from pipeline.ledger.tables import audit, leads
from pipeline.settings import Settings, load_settings
from pipeline.web.ops.access import check_password
from tests.conftest import CAMPAIGN, NOW, make_lead

ASHA = Actor("asha", "ops")
DAY = timedelta(days=1)


def take_in(ledger: Ledger, *numbers: int) -> None:
    known = ledger.campaigns.ensure(CAMPAIGN, now=NOW)
    given = [make_lead(number) for number in numbers]
    ledger.leads.take_in(known, given, batch_id=uuid.uuid4(), max_age=DAY, now=NOW)


def test_each_deed_has_its_line_and_what_changed_nothing_of_a_campaign_has_none(ledger: Ledger) -> None:
    take_in(ledger, 1, 2, 3)
    ledger.campaigns.hold(CAMPAIGN, Hold(HoldKind.OUTAGE, "HTTP 503"), probe_at=NOW, now=NOW)
    ledger.campaigns.resume(CAMPAIGN, now=NOW, by=ASHA)
    assert not ledger.campaigns.resume(CAMPAIGN, now=NOW, by=ASHA)
    ledger.campaigns.pause(CAMPAIGN, reason="wrong script", now=NOW, by=ASHA)
    assert not ledger.campaigns.pause(CAMPAIGN, reason="again", now=NOW, by=ASHA)
    ledger.campaigns.change(CAMPAIGN, {"max_attempts": 3}, now=NOW, by=ASHA)
    which = LeadFilter(campaign=CAMPAIGN, phone=make_lead(1).phone)
    assert ledger.interventions.cancel(which, now=NOW, dry_run=True, by=ASHA) == 1
    assert ledger.interventions.cancel(which, now=NOW, by=ASHA) == 1
    assert ledger.interventions.cancel(which, now=NOW) == 0  # of nobody: what the pipeline does by itself
    found = ledger.audit.entries(campaign=CAMPAIGN)
    assert [(one["action"], one["details"], one["changed"]) for one in found] == [
        ("cancel", {"campaign": CAMPAIGN, "phone": make_lead(1).phone}, 1),
        ("campaign set", {"max_attempts": 3}, None),
        ("campaign pause", {"reason": "wrong script"}, None),
        ("campaign resume", {"was": "outage", "reason": "HTTP 503"}, None),
    ]
    assert {(one["who"], one["via"], one["at"]) for one in found} == {("asha", "ops", NOW)}


def test_a_deed_that_fails_leaves_no_line_and_a_line_that_fails_leaves_no_deed(ledger: Ledger) -> None:
    take_in(ledger, 1)
    with pytest.raises(EmptyFilter):
        ledger.interventions.cancel(LeadFilter(), now=NOW, by=ASHA)
    assert ledger.audit.entries() == []
    with ledger.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE audit RENAME TO audit_gone"))
    try:
        with pytest.raises(sa.exc.DBAPIError):
            ledger.interventions.cancel(LeadFilter(campaign=CAMPAIGN), now=NOW, by=ASHA)
        with pytest.raises(sa.exc.DBAPIError):
            ledger.campaigns.pause(CAMPAIGN, reason="x", now=NOW, by=ASHA)
        with ledger.database.read() as connection:
            assert connection.scalar(sa.select(leads.c.state)) == "queued"
        assert ledger.reports.campaigns()[0]["state"] == "active"
    finally:
        with ledger.database.write() as connection:
            connection.execute(sa.text("ALTER TABLE audit_gone RENAME TO audit"))


def test_entries_come_newest_first_by_pages(ledger: Ledger) -> None:
    for number in range(5):
        ledger.audit.begin(ASHA, f"deed {number}", now=NOW)
    first = ledger.audit.entries(limit=2)
    rest = ledger.audit.entries(limit=9, before=first[-1]["number"])
    assert [one["action"] for one in (*first, *rest)] == [f"deed {number}" for number in (4, 3, 2, 1, 0)]


def test_a_command_is_noted_with_the_systems_user(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, make_settings: Callable[..., Settings]
) -> None:
    del make_settings
    take_in(ledger, 1, 2)
    monkeypatch.setenv("DATABASE_URL", ledger.database.url.render_as_string(hide_password=False))
    for line in (
        ["campaign", "set", CAMPAIGN, "--rate", "5/s"], ["campaign", "pause", CAMPAIGN],
        ["campaign", "resume", CAMPAIGN],
        ["cancel", "--campaign", CAMPAIGN, "--dry-run"], ["cancel", "--campaign", CAMPAIGN],
        ["retry", "--campaign", CAMPAIGN], ["resolve", "--campaign", CAMPAIGN, "--drop"], ["events", "replay"],
    ):  # fmt: skip
        assert CliRunner().invoke(cli, line).exit_code == 0, line
    found = [(one["action"], one["changed"]) for one in reversed(ledger.audit.entries())]
    assert found == [
        ("campaign set", None), ("campaign pause", None), ("campaign resume", None), ("cancel", 2), ("retry", 2),
        ("resolve: drop", 0), ("events replay", 0),
    ]  # fmt: skip
    with ledger.database.read() as connection:
        assert set(connection.scalars(sa.select(audit.c.who))) == {getpass.getuser()}


def test_the_entry_of_ops_user_signs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    made = run.invoke(cli, ["ops-user", "asha", "--role", "operator"], input="lighthouse-keeper\n")
    (tmp_path / ".env").write_text(made.stdout)
    first = load_settings().operators()
    assert [(user.name, user.role) for user in first.values()] == [("asha", "operator")]
    assert check_password(first["asha"].password_hash, "lighthouse-keeper")
    again = run.invoke(cli, ["ops-user", "kiran"], input="only-looks-here\n").stdout
    assert again.startswith("OPS_USERS=asha:") and "OPS_SECRET" not in again  # there is one
    monkeypatch.setenv("OPS_USERS", again.strip().removeprefix("OPS_USERS="))
    both = load_settings().operators()
    assert [(user.name, user.role) for user in both.values()] == [("asha", "operator"), ("kiran", "viewer")]
    assert both["asha"] == first["asha"]
    for name, password in (("kiran", "short"), ("a:b", "lighthouse-keeper"), ("", "lighthouse-keeper")):
        assert run.invoke(cli, ["ops-user", name], input=f"{password}\n").exit_code == 2


def test_a_bounded_ledger_gives_up_a_slow_statement(ledger: Ledger) -> None:
    """A page's query must not hold a thread of the webhook's process for ever."""
    url = ledger.database.url.render_as_string(hide_password=False)
    slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000000) SELECT count(*) FROM n"
    bounded = open_ledger(url, statement_seconds=0.2)
    try:
        with pytest.raises(sa.exc.OperationalError), bounded.database.read() as connection:
            connection.execute(sa.text(slow))
        assert bounded.reports.overview(now=NOW)["accepted"] == 0
    finally:
        bounded.close()
