"""A small disk, so that it can fill up without harm to anybody else."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

LIMIT = "CHAOS_DISK_BYTES"


@contextlib.contextmanager
def small_disk(where: Path, size_bytes: int) -> Iterator[dict[str, str]]:
    """A disk of *size_bytes* at *where*, and what its users must have in their environment.

    It is a file system in memory, gone after the block. Mounting it takes root's rights: without them, its users are
    told the limit and hold to it by themselves (`pretend`).
    """
    where.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode:
        yield {LIMIT: str(size_bytes)}
        return
    try:
        yield {}
    finally:
        subprocess.run(["umount", "--lazy", str(where)], capture_output=True, timeout=20)


def pretend(where: Path, size_bytes: int) -> None:
    """Let every sync of this process fail, as on a full disk, while *where* holds more than *size_bytes*."""
    sync = os.fsync

    def sync_if_there_is_room(descriptor: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            if sum(entry.stat().st_size for entry in os.scandir(where)) > size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = sync_if_there_is_room
