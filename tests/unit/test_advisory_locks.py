"""PostgreSQL's advisory locks share one space of numbers: two uses of one number would wait for each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pipeline

PACKAGE = Path(pipeline.__file__).parent
SOURCES = sorted((PACKAGE / "ledger").rglob("*.py"))
NUMBERS = range(727_000, 728_000)
"""What the project's locks are numbered from; those of calls are hashes, far above."""


def test_no_two_uses_of_an_advisory_lock_have_the_same_number() -> None:
    found: dict[str, int] = {}
    for path in SOURCES:
        text = path.read_text()
        constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        mine = [value for value in constants if isinstance(value, int) and value in NUMBERS]
        hashed = len(re.findall(r"pg_\w*advisory\w*lock\(hashtext", text))
        takes = len(re.findall(r"pg_\w*advisory\w*(?<!un)lock\(", text)) - hashed
        assert len(mine) == takes, f"{path.name}: each lock has a number from {NUMBERS}, which is written once"
        found |= {f"{path.name} {n}": number for n, number in enumerate(mine)}
    assert len(found) >= 2
    assert len(set(found.values())) == len(found), found
