"""What reached the sandbox and what left it, as JSON lines in a file.

The lines live on disk, not in memory, so that a million of them cost nothing but disk. Each one is written with a
single unbuffered write: whoever reads the file sees every entry that has happened.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

_CHUNK_BYTES = 1 << 18


class Journal:
    """An append-only list of JSON lines in *path*, or in an anonymous temporary file."""

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            with tempfile.TemporaryFile(prefix="sandbox-journal-") as file:
                self._descriptor = os.dup(file.fileno())
        else:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._start = self._end = os.fstat(self._descriptor).st_size
        self.count = 0

    def append(self, entry: dict[str, Any]) -> None:
        """Write *entry* at the end; it can be read as soon as this returns."""
        self._end += os.write(self._descriptor, orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self.count += 1

    def chunks(self) -> Iterator[bytes]:
        """Yield, in pieces of any length, the lines of this run that exist now; older lines of *path* are left out."""
        position, end = self._start, self._end
        while position < end:
            piece = os.pread(self._descriptor, min(_CHUNK_BYTES, end - position), position)
            position += len(piece)
            yield piece

    def close(self) -> None:
        """Let go of the file; a temporary one is gone then."""
        os.close(self._descriptor)
