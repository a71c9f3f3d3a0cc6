"""The documents say what the code says."""

from __future__ import annotations

import random
import re
import tomllib
import uuid
from datetime import timedelta
from pathlib import Path

import click
import pytest
from celery.app.defaults import DEFAULTS

from pipeline import __version__
from pipeline.cli import cli
from pipeline.domain import campaign as campaign_rules
from pipeline.domain.campaign import CampaignState, Hold, HoldKind
from pipeline.domain.lead import NAMESPACE, TRANSITIONS, LeadState, Outcome, Retry, lead_id, settle
from pipeline.futwork import judge
from pipeline.ledger.postgres import NEEDS, PARAMETERS, WISHES
from pipeline.observability.metrics import METRICS, as_markdown
from pipeline.settings import PREFIX, Settings
from pipeline.worker.app import build_app
from tests.conftest import NOW, make_answer, make_claim

ROOT = Path(__file__).parents[2]
DOCS = [*sorted(ROOT.glob("docs/*.md")), ROOT / "CHANGELOG.md"]
RETRY = Retry(base=timedelta(seconds=1), cap=timedelta(seconds=2), max_attempts=8)


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def table(document: str, first_heading: str) -> list[list[str]]:
    """The rows of the table whose first column is headed so, each as its cells without back-ticks around them."""
    lines = iter(document.splitlines())
    for line in lines:
        if line.startswith(f"| {first_heading} |"):
            break
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([a-z_]+)`", cell)


# state-machine.md


def test_the_table_of_lead_states_is_the_one_in_the_code():
    documented = {row[0].strip("`"): set(names_in(row[2])) for row in table(read("state-machine.md"), "state")}

    assert {state.value: {after.value for after in states} for state, states in TRANSITIONS.items()} == documented


def test_the_picture_of_lead_states_has_every_transition_once():
    picture = read("state-machine.md").split("```mermaid")[1].split("```")[0]
    drawn = re.findall(r"^ +([a-z]+) --> ([a-z]+) :", picture, re.MULTILINE)

    assert sorted((a.value, b.value) for a, states in TRANSITIONS.items() for b in states) == sorted(drawn)


def test_every_outcome_is_documented_as_it_is_judged_and_settled():
    rows = table(read("state-machine.md"), "outcome")

    assert [outcome.value for outcome in Outcome] == [row[0].strip("`") for row in rows]
    for name, _, statuses, state, costs in rows:
        outcome = Outcome(name.strip("`"))
        settled = settle(make_answer(make_claim(), outcome), RETRY, now=NOW, jitter=random.Random(1))
        assert settled.state.value == state.strip("`")
        assert {0: "no", 1: "yes"}[settled.attempts] == costs
        for status in filter(None, statuses.split(", ")):
            assert judge(int(status), b"")[0] is outcome, status


def test_the_states_of_a_campaign_and_its_holds_are_those_of_the_code():
    document = read("state-machine.md").split("## Campaigns")[1]

    assert [state.value for state in CampaignState] == [row[0].strip("`") for row in table(document, "state")]
    holds = {row[0].strip("`"): row[2] for row in table(document, "hold")}
    assert {kind.value: "yes" if Hold(kind, "").spans_account else "no" for kind in HoldKind} == holds


def test_the_runs_that_hold_a_campaign_are_those_of_the_code():
    document = read("state-machine.md")

    assert f"| `rejections` | {campaign_rules.REJECTION_RUN} leads in a row" in document
    assert f"| `outage` | {campaign_rules.OUTAGE_RUN} outcomes" in document


# wire-contract.md


def test_the_namespace_and_the_examples_of_ids_are_right():
    document = read("wire-contract.md")
    rows = table(document, "campaign")

    assert f"NAMESPACE = {NAMESPACE}" in document
    for campaign, key, id_ in rows:
        assert lead_id(campaign.strip("`"), re.match("`([^`]+)`", key)[1]) == uuid.UUID(id_.strip("`"))
    assert len(rows) == 2


# CHANGELOG.md


def test_the_release_is_the_same_in_the_package_its_metadata_and_the_changelog():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = re.search(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert (about["version"], newest[1]) == (__version__, __version__)


# All of them

NOT_SETTINGS = {
    "HOST", "PORT", "WEB_CONCURRENCY", "WEB_THREADS", "WEB_ACCESS_LOG", "INTAKE_PROCESSES", "DISPATCH_PROCESSES",
    "FLOWER_BASIC_AUTH", "GUNICORN_CMD_ARGS", "FORWARDED_ALLOW_IPS",
    "FLOWER_ADDRESS", "OTEL_SERVICE_NAME", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG", "POSTGRES_PASSWORD",
    "GRAFANA_PASSWORD",
    "PROMETHEUS_MULTIPROC_DIR", "BENCH_DATABASE_URL",
}  # fmt: skip
GENERATED = {"bench/results.json"}
CONSTANTS = {"NAMESPACE", "TRANSITIONS", "TOKEN"}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_setting_that_a_document_names_exists(path: Path):
    named = {name for name in re.findall(r"`([A-Z][A-Z_]{3,})[`=]", path.read_text()) if "_" in name}
    named = {name.removeprefix(PREFIX) for name in named - {PREFIX}}

    assert set() == named - {field.upper() for field in Settings.model_fields} - NOT_SETTINGS - CONSTANTS


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md"], ids=lambda path: path.name)
def test_every_command_that_a_document_names_exists(path: Path):
    for line in re.findall(r"\bpipeline ((?:[a-z-]+)(?: [a-z]+)?)", " ".join(code_in(path.read_text()))):
        name, _, more = line.partition(" ")
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, line
        if more and isinstance(command, click.Group):
            assert more in command.commands, line


def code_in(text: str) -> list[str]:
    """What stands in back-ticks or in fenced blocks, where a command would stand."""
    fenced = re.findall(r"^```(?:console|sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    commands = [line.lstrip("$ ") for block in fenced for line in block.splitlines()]
    inline = re.findall(r"`(pipeline [^`]+)`", text)
    return [one for one in (*commands, *inline) if one.startswith("pipeline ")]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(path: Path):
    text = path.read_text()
    named = re.findall(r"`((?:pipeline|docs|tests|bench)/[\w./*-]+|[\w.-]+\.(?:md|yml|toml|txt))`", text)
    named += [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]

    gone = [name for name in set(named) - GENERATED if not (ROOT / name).exists() and not (path.parent / name).exists()]

    assert gone == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_metric_that_a_document_names_exists(path: Path):
    known = {name for one in METRICS for name in one.series}

    assert set(re.findall(r"\b(pipeline_[a-z_]+)\b", path.read_text())) - known == set()


def test_the_page_of_metrics_is_the_one_that_the_code_prints():
    assert as_markdown() == read("metrics.md")


def test_every_lead_state_is_explained_where_it_is_defined():
    source = (ROOT / "pipeline/domain/lead.py").read_text()

    for state in LeadState:
        assert re.search(rf'{state.name} = "{state.value}"\n    """', source)


# operations.md


def test_what_a_connection_to_postgresql_sets_is_documented():
    documented = {}
    for names, values, may_change in table(read("operations.md"), "setting"):
        pairs = zip(names.split(", "), values.split("`, `"), strict=True)
        documented |= {name.strip("`"): (value.strip("`"), may_change.startswith("yes")) for name, value in pairs}

    needs = NEEDS | {"client_encoding": PARAMETERS["client_encoding"]}
    wishes = PARAMETERS | WISHES
    ours = {name: (value, name not in needs) for name, value in (wishes | needs).items()}
    assert ours == documented


# decisions.md


def test_every_setting_of_celery_has_its_reason(make_settings):
    document = read("decisions.md")

    for url in ("redis://127.0.0.1:1/0", "amqp://127.0.0.1:1//"):
        app = build_app(make_settings(broker_url=url, redis_url="redis://127.0.0.1:1/0"))
        changed = {name for name, default in DEFAULTS.items() if app.conf.get(name) != default} - {"broker_url"}
        changed |= set(app.conf.broker_transport_options)
        assert {name for name in changed if f"`{name}`" not in document} == set()
