"""The switches of the chaos suite still reach what they switch off."""

from __future__ import annotations

import multiprocessing

import pytest

from pipeline.ledger import Ledger
from tests.chaos import experiments  # noqa: F401 - registers them
from tests.chaos.mechanisms import MECHANISMS, switch_off
from tests.chaos.runner import EXPERIMENTS
from tests.waiting import patience


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_can_be_switched_off(name: str) -> None:
    """In a process of its own, for it cannot be switched on again."""
    child = multiprocessing.get_context("fork").Process(target=_do_without, args=(name,))
    child.start()
    child.join(patience())
    assert child.exitcode == 0


def _do_without(name: str) -> None:
    switch_off([name])
    Ledger("sqlite://").close()  # some reach into statements, which it builds


def test_every_mechanism_has_an_experiment() -> None:
    assert {one.experiment for one in MECHANISMS.values()} - EXPERIMENTS.keys() == set()
