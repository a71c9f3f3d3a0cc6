"""Group commit: threads that arrive together share one publish."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pipeline.broker.messages import EVENTS_A_MESSAGE, MESSAGE_BYTES

Item = TypeVar("Item")


class _Group(Generic[Item]):
    """Items that are published together, and the gates of the threads that wait for that."""

    __slots__ = ("done", "error", "gates", "items", "since", "size")

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.since: list[float] = []
        self.size = 0
        self.gates: list[threading.Lock] = []
        self.done = False
        self.error: BaseException | None = None

    def gate(self) -> threading.Lock | None:
        """A lock that is released when the group is done, or None if it is done; the caller holds the commit's lock.

        Each waiter has a lock of its own: a shared event would make all of them wait for its lock again when they wake.
        """
        if self.done:
            return None
        gate = threading.Lock()
        gate.acquire()
        self.gates.append(gate)
        return gate


class GroupCommit(Generic[Item]):
    """Lets threads that arrive together share one publish, without making any of them wait for others.

    The first caller publishes at once. Callers that come during that publish form a group; its first member publishes
    for all of them as soon as the running publish ends. A group that is full is followed by another, and groups publish
    in the order in which they were opened. Every caller returns when its own item is durable, or raises the error of
    its group's publish.
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
        self._open: _Group[Item] | None = None  # the group that still takes members
        self._last: _Group[Item] | None = None  # the youngest group, which the next one follows

    def submit(self, item: Item) -> Sequence[float]:
        """Return once *item* is durable.

        Returns, to the caller that published, how many seconds each of its group had waited, so that one of them can
        count for all; to the others nothing.
        """
        size = self._size_of(item)
        gate: threading.Lock | None
        with self._lock:
            group = self._open
            if group is not None and (len(group.items) >= self._most or group.size + size > self._most_size):
                group = None
            if leads := group is None:
                gate = self._last.gate() if self._last is not None else None
                group = self._open = self._last = _Group()
            else:
                gate = group.gate()
            group.items.append(item)
            group.since.append(time.perf_counter())
            group.size += size
        if leads:
            self._lead(group, gate)
        elif gate is not None:
            gate.acquire()
        if group.error is not None:
            raise group.error
        if not leads:
            return ()
        now = time.perf_counter()
        return [now - since for since in group.since]

    def _lead(self, group: _Group[Item], previous: threading.Lock | None) -> None:
        try:
            if previous is not None:
                previous.acquire()
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
            group.items = []  # the youngest group stays referenced; its events need not
            for waiting in reversed(group.gates):  # the leader of the next group came last and goes first
                waiting.release()
