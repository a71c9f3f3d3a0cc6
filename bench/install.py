"""Peers that are no part of this project's environment: installed from their registries when a figure needs them.

They go into a cache outside the repository (`$XDG_CACHE_HOME`, or `~/.cache`), a folder for each set of pins, and stay
there for the next run. What cannot be installed is `Absent`: its figures are skipped, and the bench says so.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bench.backends import Absent
from bench.figures import console

_PEERS = Path(__file__).parent / "peers"
_INSTALL_SECONDS = 240


@cache
def taskiq_python() -> Path:
    """The interpreter of a virtual environment with taskiq."""
    pins = _PEERS / "requirements-taskiq.txt"
    folder = _folder("taskiq", pins)
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        console.print("  installing taskiq")
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], "taskiq")
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(pins)], "taskiq")
        (folder / "whole").touch()
    return python


@cache
def bullmq_folder() -> Path:
    """A folder with BullMQ's scripts and what they import."""
    source = _PEERS / "bullmq"
    folder = _folder("bullmq", source / "package.json")
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            raise Absent(f"BullMQ ({tool})")
    if not (folder / "whole").exists():
        console.print("  installing BullMQ and undici")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "package.json", folder)
        _run(["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefix", str(folder)], "BullMQ")
        (folder / "whole").touch()
    for script in source.glob("*.mjs"):
        shutil.copy(script, folder)
    return folder


def _folder(name: str, pins: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    return home / "futwork-lead-pipeline-bench" / f"{name}-{digest}"


def _run(command: Sequence[str], peer: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Absent(f"{peer} (it could not be installed: {' '.join(last)})") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Absent(f"{peer} (it could not be installed: {error})") from None
