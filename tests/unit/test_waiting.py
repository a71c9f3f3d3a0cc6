"""The deadlines of the tests grow with what the machine does."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace

import pytest

from tests import waiting
from tests.waiting import patience, until


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cores on which nothing runs."""
    monkeypatch.setattr(waiting, "measured_slowness", lambda: 0.9)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_on_an_idle_machine_a_deadline_is_what_was_given() -> None:
    assert patience(20) == 20


def test_on_a_machine_that_was_slow_at_the_start_a_deadline_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "measured_slowness", lambda: 3.0)
    assert patience(20) == 60


def test_work_that_comes_during_the_session_makes_a_deadline_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (15.0, 2.0, 1.0))
    assert patience(20) == 150


def test_a_wait_returns_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = itertools.chain([0, None, ""], itertools.repeat("it"))
    assert until(lambda: next(answers)) == "it"


def test_a_wait_for_what_never_comes_fails_and_says_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=10)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    with pytest.raises(AssertionError, match="in 60 seconds\nonly this"):
        until(lambda: False, what=lambda: "only this")
