"""Rules that keep doors shut: SQL by parameters alone, secrets that no repr shows, pins that are needed."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.settings import Settings

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "pipeline").rglob("*.py"))
TAKES_SQL = {"text", "literal_column", "exec_driver_sql", "execute_sql", "DDL"}
# Built from constants of the same module at import or by a migration, never from what anybody sends.
FIXED = {
    'f"PRAGMA {pragma}"',
    'f"SET LOCAL statement_timeout = {milliseconds}"',
    "bound",  # SET LOCAL statement_timeout, with a number of milliseconds of ours
    "f\"'{state.value}'\"",
}


def sql_that_is_put_together(source: str) -> Iterator[str]:
    """What reaches the database as SQL and is no constant text."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = node.args[0]
        constant = isinstance(given, ast.Constant) or (
            isinstance(given, ast.IfExp)
            and isinstance(given.body, ast.Constant)
            and isinstance(given.orelse, ast.Constant)
        )
        is_sql = name in TAKES_SQL or (name == "execute" and isinstance(given, ast.JoinedStr | ast.BinOp))
        if is_sql and not constant:
            yield ast.get_source_segment(source, given) or ""


def test_sql_is_never_put_together_from_text() -> None:
    """Migrations are constant too; they run nothing but what is written in them."""
    sources = [path for path in SOURCES if "migrations" not in path.parts]
    found = {one for path in sources for one in sql_that_is_put_together(path.read_text())}

    assert found == FIXED


@pytest.mark.parametrize(
    "line",
    [
        'connection.execute(sa.text(f"SELECT {x}"))',
        'connection.execute(sa.text("SELECT %s" % x))',
        'connection.execute(sa.text("SELECT " + x))',
        'sa.literal_column("a" + x)',
        'connection.exec_driver_sql("SELECT {}".format(x))',
        'cursor.execute(f"SELECT {x}")',
        "sa.text(statement)",
    ],
)
def test_the_rule_finds_sql_that_is_put_together(line: str) -> None:
    assert len(list(sql_that_is_put_together(line))) == 1


def test_tokens_are_compared_in_constant_time() -> None:
    """Each comparison of what a client presents goes through `hmac.compare_digest`, over all tokens, found or not."""
    for name in ("webhook", "intake"):
        source = (ROOT / f"pipeline/web/{name}.py").read_text()
        assert source.count("compare_digest(") == 1
        compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
        shown = [ast.get_source_segment(source, node) or "" for node in compared]
        assert [one for one in shown if re.search(r"\b(token|presented|theirs|ours)\b", one)] == []


def test_no_secret_of_the_settings_shows_in_what_they_print(make_settings: Callable[..., Settings]) -> None:
    secrets = ["key-aaaa", "key-bbbb", "hook-cccc", "intake-dddd", "pass-eeee", "pass-ffff", "pass-gggg"]
    settings = make_settings(
        futwork_api_key=secrets[0],
        futwork_api_keys=f"north={secrets[1]}",
        webhook_token=secrets[2],
        intake_tokens=secrets[3],
        broker_url=f"redis://:{secrets[4]}@127.0.0.1:1/0",
        redis_url=f"redis://:{secrets[5]}@127.0.0.1:1/0",
        database_url=f"postgresql://me:{secrets[6]}@127.0.0.1/x",
    )

    assert settings.secrets() == set(secrets)
    shown = f"{settings!r} {settings} {settings.model_dump()!r}"
    assert [secret for secret in secrets[:4] if secret in shown] == []
    assert [secret for secret in secrets if secret in f"{settings!r} {settings}"] == []


# What is installed


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def installed() -> dict[str, str]:
    return {canonicalize_name(one.name): one.version for one in metadata.distributions()}


def needed() -> set[str]:
    """Every package that the project with all its extras requires, directly or through others that are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(one) for one in project["dependencies"]]
    waiting += [Requirement(one) for extra in project["optional-dependencies"].values() for one in extra]
    requirements = {canonicalize_name(one.name): one.requires or [] for one in metadata.distributions()}
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras}:
            if (name, extra) in seen or (one.marker and not one.marker.evaluate({"extra": ""})):
                continue
            seen.add((name, extra))
            found.add(name)
            if name == "futwork-lead-pipeline":
                continue
            waiting += [
                Requirement(str(more).partition(";")[0])
                for more in map(Requirement, requirements.get(name, ()))
                if more.marker is None or more.marker.evaluate({"extra": extra})
            ]
    return found - {"futwork-lead-pipeline"}


def test_every_package_that_is_needed_is_pinned_and_no_other() -> None:
    """An extra that is not installed here, such as that of the documents, hides what it requires in turn."""
    wanted = needed()

    assert wanted - {"pip", "setuptools", "wheel"} <= set(pinned())
    assert (set(pinned()) - wanted) & set(installed()) == set()


def test_what_is_installed_is_what_is_pinned() -> None:
    found = installed()

    assert {name: found.get(name, version) for name, version in pinned().items()} == pinned()


def test_the_pins_name_no_place_to_fetch_them_from() -> None:
    text: Any = (ROOT / "constraints.txt").read_text()

    assert re.findall(r"^(?![A-Za-z0-9._-]+==[A-Za-z0-9.+!]+$).+$", text, re.MULTILINE) == []
