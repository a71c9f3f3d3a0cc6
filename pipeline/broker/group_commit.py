"""Group commit: threads that arrive together share one publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pipeline.broker.messages import EVENTS_A_MESSAGE, MESSAGE_BYTES

Item = TypeVar("Item")


class _Group(Generic[Item]):
    """Items that are published together, and the gates of those who wait for that."""

    __slots__ = ("done", "error", "gates", "items", "since", "size")

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.since: list[float] = []
        self.size = 0
        self.gates: list[threading.Lock] = []
        self.done = False
        self.error: BaseException | None = None

    def gate(self) -> threading.Lock | None:
        """A lock that is released when the group is done, or None if it is; the caller holds the commit's lock.

        A lock a waiter, because an event shared by all makes them wait for its own lock once more when they wake.
        """
        if self.done:
            return None
        gate = threading.Lock()
        gate.acquire()
        self.gates.append(gate)
        return gate


class GroupCommit(Generic[Item]):
    """Lets threads that arrive together share one publish, without making any of them wait for company.

    The first caller publishes at once. Callers that come while that publish is under way form a group; its first member
    publishes for all of them as soon as the running publish ends. A group that is full is followed by another, and
    groups publish in the order in which they were opened. Every caller returns when its own item is durable, or raises
    what kept it from being.
    """

    def __init__(
        self,
        publish: Callable[[list[Item]], None],
        *,
        most: int = EVENTS_A_MESSAGE,
        most_size: int = MESSAGE_BYTES,
        size_of: Callable[[Item], int] = lambda _: 0,
    ) -> None:
        self._publish = publish
        self._most = most
        self._most_size = most_size
        self._size_of = size_of
        self._lock = threading.Lock()
        self._open: _Group[Item] | None = None  # the group that takes members still
        self._last: _Group[Item] | None = None  # the youngest group, which the next one follows

    def submit(self, item: Item) -> Sequence[float]:
        """Return once *item* is durable.

        The caller that published learns how long, in seconds, each of its group had waited, so that one of them can
        count for all; the others learn nothing.
        """
        size = self._size_of(item)
        turn: threading.Lock | None
        with self._lock:
            group = self._open
            if group is not None and (len(group.items) >= self._most or group.size + size > self._most_size):
                group = None
            if leads := group is None:
                turn = self._last.gate() if self._last is not None else None
                group = self._open = self._last = _Group()
            else:
                turn = group.gate()
            group.items.append(item)
            group.since.append(time.perf_counter())
            group.size += size
        if leads:
            self._lead(group, turn)
        elif turn is not None:
            turn.acquire()
        if group.error is not None:
            raise group.error
        if not leads:
            return ()
        now = time.perf_counter()
        return [now - since for since in group.since]

    def _lead(self, group: _Group[Item], turn: threading.Lock | None) -> None:
        try:
            if turn is not None:
                turn.acquire()
            with self._lock:
                if self._open is group:
                    self._open = None
            self._publish(group.items)
        except BaseException as error:  # noqa: BLE001 - it is raised in every member's own thread
            group.error = error
        finally:
            with self._lock:
                if self._open is group:
                    self._open = None
                group.done = True
            group.items = []  # the youngest group stays referenced, its events need not
            for gate in reversed(group.gates):  # the leader of the next group came last and goes first
                gate.release()
