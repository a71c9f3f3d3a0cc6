"""Experiments side by side, each in a process of its own: its faults and what it switches off stay in it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from tests.chaos import experiments  # noqa: F401 - registers them, also in a process of the pool
from tests.chaos.runner import EXPERIMENTS, Result, perform


@dataclass(frozen=True, slots=True)
class Job:
    """One experiment to run, and how."""

    name: str
    seed: int
    rounds: int | None
    short: bool
    keep: bool
    without: tuple[str, ...] = ()


def as_they_come(jobs: Sequence[Job], at_once: int) -> Iterator[Result]:
    """The results, whichever is there first."""
    with _pool(at_once) as pool:
        for done in as_completed([pool.submit(_perform, job) for job in jobs]):
            yield done.result()


def in_order(jobs: Sequence[Job], at_once: int) -> Iterator[Result]:
    """The results in the order of the jobs."""
    with _pool(at_once) as pool:
        yield from pool.map(_perform, jobs)


def _pool(at_once: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)


def _perform(job: Job) -> Result:
    return perform(
        EXPERIMENTS[job.name], seed=job.seed, rounds=job.rounds, short=job.short, keep=job.keep, without=job.without
    )
