"""What an operator can do is the same by command and on the pages, in the same words."""

from __future__ import annotations

import html
import re

import click
import pytest
from click.testing import CliRunner
from flask import Flask

from pipeline.cli import cli
from pipeline.status.actions import ACTIONS, LEAD_ACTIONS
from pipeline.status.policies import POLICIES
from pipeline.web.ops.actions import ROUTES
from tests.conftest import CAMPAIGN
from tests.integration.ops.conftest import Filled, Sign

READING = {
    "status", "leads", "show", "top", "doctor", "campaign list", "events list", "events orphans", "suppress list",
}  # fmt: skip
INSTALLATION = {"demo", "up", "sandbox", "enqueue", "migrate", "ops-user"}
"""Commands that start parts, fill or prepare the ledger: they have no page."""
PREPARING = {"find_leads", "count_leads", "sign_in", "sign_out"}
"""Forms that change nothing in the ledger."""


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= commands(command, (*path, name))
        else:
            found[" ".join((*path, name))] = command
    return found


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def command_of(action: str) -> str:
    return ACTIONS[action].command.partition(" --")[0]


def test_each_command_that_changes_something_is_an_action_and_each_action_a_command() -> None:
    assert {command_of(name) for name in ACTIONS} == set(commands()) - READING - INSTALLATION


def test_each_form_that_changes_something_is_an_action_and_each_action_has_a_form(sign: Sign) -> None:
    app: Flask = sign("").client.application
    forms = {rule.endpoint for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    changing = {name.removeprefix("ops.") for name in forms if name.startswith("ops.")} - PREPARING

    assert set(ROUTES) == set(ACTIONS)
    assert changing == set(ROUTES.values())


@pytest.mark.parametrize("name", ACTIONS)
def test_a_commands_help_has_the_words_of_its_action(name: str) -> None:
    action = ACTIONS[name]
    shown = CliRunner().invoke(
        cli, [*command_of(name).split(), "--help"], terminal_width=10_000, max_content_width=10_000
    )

    assert shown.exit_code == 0
    assert action.summary in plain(shown.output)
    assert action.note in plain(shown.output)
    for state in action.states:
        assert state.value in shown.output


@pytest.mark.parametrize("name", ACTIONS)
def test_a_page_offers_the_action_in_the_same_words(name: str, sign: Sign, filled: Filled) -> None:
    """Where a filter chooses leads, the words are those of the confirmation."""
    action, person = ACTIONS[name], sign("asha")
    if name == "campaign resume":
        filled.ledger.campaigns.pause(CAMPAIGN, reason="a test", now=filled.ledger.now())
    if name == "suppress remove":
        person.post("/ops/do-not-call/add", phone="9800000000")
    if name in LEAD_ACTIONS:
        assert f">{action.label}…</button>" in person.get(f"/ops/leads?campaign={CAMPAIGN}").text
        page = person.post("/ops/leads/count", campaign=CAMPAIGN, action=name).text
        assert action.becomes in plain(page)
        assert f"Only {action.changes} are changed" in plain(page)
    else:
        path = {
            "campaign": f"/ops/campaigns/{CAMPAIGN}", "suppress": "/ops/do-not-call",
            "events": "/ops/orphans?call=stray-9999789877" if name == "events link" else "/ops/quarantine",
        }[name.partition(" ")[0]]  # fmt: skip
        page = person.get(path).text
        assert re.search(rf"<button[^>]*>{action.label}\b", page)

    assert action.summary in plain(page)
    assert action.note in plain(page)


def test_the_policies_are_the_same_by_command_and_on_the_page(sign: Sign, filled: Filled) -> None:
    page = sign("asha").get(f"/ops/campaigns/{CAMPAIGN}").text
    options = {parameter.name for parameter in commands()["campaign set"].params if parameter.name in POLICIES}

    assert options == set(POLICIES)
    assert {name for name in POLICIES if f'name="{name}"' in page} == set(POLICIES)
    assert all(plain(policy.help) in plain(page) for policy in POLICIES.values())
