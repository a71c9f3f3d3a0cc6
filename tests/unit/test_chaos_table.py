"""The table that a run of the chaos suite writes into a document."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import table
from tests.chaos.books import Findings
from tests.chaos.runner import Result

FOUND = Findings(leads=1200, events=34, lost=0, duplicated=0, over_limit=0, uncertain=2)


def results() -> list[Result]:
    return [
        Result("one", 1, 3, 2, 10.4, 7, Path("x"), FOUND),
        Result("two", 2, 1, 1, 9.6, 7, Path("x"), FOUND),
        Result("three", 1, 0, 0, 0.1, 7, Path("x"), Findings(), skipped="it is not there"),
    ]


def test_what_stands_between_the_marks_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "document.md"
    file.write_text("before\n\n<!-- experiments, written by a run: -->\nold\n<!-- end of experiments -->\n\nafter\n")
    for _ in range(2):
        rows = table.markdown(results(), command="make it", seconds=63)
        table.write(rows, file, what=table.EXPERIMENTS)
    text = file.read_text()
    assert text.startswith("before\n\n<!-- experiments")
    assert text.endswith("<!-- end of experiments -->\n\nafter\n")
    assert "old" not in text
    assert text.count("| `one` | 1 | 3 | 2 | 1,200 | 34 | 0 | 0 | 0 | 2 | 10 |") == 1
    assert "| **total** | 3 | 4 | 3 | 2,400 | 68 | 0 | 0 | 0 | 4 | 63 |" in text
    assert "`three` was skipped: it is not there." in text
    assert "`make it`, 1.1 minutes:" in text


def test_a_file_without_marks_becomes_the_table(tmp_path: Path) -> None:
    table.write(["| a |"], tmp_path / "new.md", what=table.MECHANISMS)
    assert (tmp_path / "new.md").read_text() == "| a |\n"


def test_the_reliability_document_has_both_marks() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    for what in (table.EXPERIMENTS, table.MECHANISMS):
        assert text.count(f"<!-- {what}, written by a run: -->") == 1
        assert text.count(f"<!-- end of {what} -->") == 1
