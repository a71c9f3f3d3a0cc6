"""The spool: events on local disk while the broker is away, and the way back out of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from pipeline.broker.messages import WebEvent, encode_events
from pipeline.broker.publisher import Broker, BrokerUnavailable
from pipeline.observability.logs import logger

log = logger(__name__)

_ABANDONED_DRAFT_SECONDS = 3600.0


class SpoolFull(Exception):
    """The spool has reached its bound, or its disk took nothing; the event could not be kept."""


class Spool:
    """Events on local disk while the broker is away: one file a group, complete and synced before it has its name.

    A file appears whole or not at all, so there is no torn end to repair. Names sort by time. A process locks a file
    while it drains it, so web processes and `sweep` may drain side by side. One that dies after the publish and before
    the removal sends the file's events twice, and the ledger keeps them once.

    The bound is on the disk, not on a process: each process counts the files now and then and its own in between, so
    several may exceed it by what they write in a moment.
    """

    def __init__(self, directory: Path, *, max_bytes: int, max_files: int = 50_000) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._lock = threading.Lock()
        self._files, self._bytes = 0, 0
        self._count_again_at = 0.0

    def write(self, events: Sequence[WebEvent]) -> None:
        """Keep events; they are on disk when this returns. Raises `SpoolFull` if that could not be done."""
        payload = orjson.dumps(encode_events(events))
        content = b"%08x\n" % zlib.crc32(payload) + payload
        draft = self._directory / f"{time.time_ns():020d}-{uuid.uuid4().hex}.draft"
        try:
            self._take_room(len(content))
            self._make_directory()
            try:
                with draft.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                draft.rename(draft.with_suffix(".events"))
            except OSError:
                draft.unlink(missing_ok=True)
                raise
            self._sync_directory()
        except OSError as error:
            raise SpoolFull(f"the spool {self._directory} could not be written: {error.strerror}") from error

    def size(self) -> tuple[int, int]:
        """How many files wait, and their bytes."""
        files = total = 0
        for entry in self._entries(".events"):
            with contextlib.suppress(FileNotFoundError):  # another process drained it just now
                total += entry.stat().st_size
                files += 1
        return files, total

    def damaged(self) -> int:
        """How many files did not match their checksum and need attention."""
        return sum(1 for _ in self._entries(".damaged"))

    def drain(self, publish: Callable[[dict[str, Any]], object], *, most: int = 1000) -> int:
        """Give the oldest files' messages to *publish* and remove each that it took; return how many.

        What *publish* raises ends the drain with the file in place. If it returns False, the file stays, and the drain
        goes on behind it. A file that does not match its checksum is renamed to `.damaged` and needs attention.
        """
        drained = 0
        for name in sorted(entry.name for entry in self._entries(".events"))[:most]:
            drained += self._drain_file(self._directory / name, publish)
        self._remove_abandoned_drafts()
        return drained

    def _drain_file(self, path: Path, publish: Callable[[dict[str, Any]], object]) -> bool:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return False  # another process drained it first
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not path.exists():
                return False  # drained or found damaged between our open and our lock
            content = file.read()
            checksum, _, payload = content.partition(b"\n")
            if not payload or b"%08x" % zlib.crc32(payload) != checksum:
                log.error("a spooled file is damaged and was renamed", file=path.name)
                path.rename(path.with_suffix(".damaged"))
                return False
            if publish(orjson.loads(payload)) is False:
                log.error("the broker answers but refused a spooled file, which stays", file=path.name)
                return False
            path.unlink()
        with self._lock:
            self._files -= 1
            self._bytes -= len(content)
        return True

    def _take_room(self, size: int) -> None:
        with self._lock:
            if time.monotonic() >= self._count_again_at:
                started = time.monotonic()
                self._files, self._bytes = self.size()
                counted = time.monotonic()
                # Counting tens of thousands of files takes long: spend at most a twentieth of the time on it.
                self._count_again_at = counted + max(0.5, 20 * (counted - started))
            if self._files >= self._max_files or self._bytes + size > self._max_bytes:
                raise SpoolFull(
                    f"the spool {self._directory} holds {self._files} files, {self._bytes} bytes: that is its bound"
                )
            self._files += 1
            self._bytes += size

    def _remove_abandoned_drafts(self) -> None:
        """Remove the drafts of processes that died: none of their events was accepted."""
        for entry in self._entries(".draft"):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_mtime < time.time() - _ABANDONED_DRAFT_SECONDS:
                    (self._directory / entry.name).unlink()

    def _entries(self, suffix: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._directory) as entries:
                yield from (entry for entry in entries if entry.name.endswith(suffix))
        except FileNotFoundError:
            return  # nothing was ever spooled

    def _make_directory(self) -> None:
        """Create the directory if it is not there, with every new name on the way to it synced as well."""
        missing = [path for path in (self._directory, *self._directory.parents) if not path.exists()]
        if missing:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in missing:
                _sync(path.parent)

    def _sync_directory(self) -> None:
        _sync(self._directory)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drain_spool(spool: Spool, broker: Broker) -> int:
    """Publish what waits in the spool; return how many files were drained, or raise `BrokerUnavailable`."""

    def publish(message: dict[str, Any]) -> bool:
        try:
            broker.publish("pipeline.events", message, about=f"({len(message.get('events', ()))} events, spooled)")
        except BrokerUnavailable:
            broker.ping()  # raises if the broker is away; else only this message is refused, and others go on
            return False
        return True

    return spool.drain(publish)
