"""The brokers that the experiments may hurt: a private Valkey, and a vhost of our own on a shared RabbitMQ."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import uuid
from pathlib import Path
from typing import Any

import kombu
import redis

from pipeline.devstack.embedded_valkey import free_port

RABBITMQ_URL = os.environ.get("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//")
APPEND_ONLY = "yes"
_START_SECONDS = 20.0
_RABBIT_START_SECONDS = 90.0  # Erlang takes its time on a busy machine


class ServiceMissing(Exception):
    """An experiment needs a service that this machine does not have; the message says which and why."""


class PrivateValkey:
    """A real Valkey over a folder and a port that stay the same when it is killed and started again."""

    def __init__(self, folder: Path, *, appendfsync: str = "everysec") -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._appendfsync = appendfsync
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it over what is on disk and wait until it answers."""
        from pipeline.devstack.embedded_valkey import valkey_server

        arguments = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--daemonize", "no"]
        arguments += ["--appendonly", APPEND_ONLY, "--appendfsync", self._appendfsync, "--save", ""]
        arguments += ["--maxmemory-policy", "noeviction"]
        with (self.folder.parent / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                [valkey_server(), *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(redis.RedisError), self.client() as client:
                client.ping()
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise ServiceMissing(f"the private Valkey did not start; see {self.folder.parent / 'valkey.log'}")
            time.sleep(0.02)

    def client(self) -> redis.Redis:
        """A client of its own; use it as a context manager."""
        return redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2)

    def kill(self) -> None:
        """SIGKILL, as the kernel does when memory runs out."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Empty the disk of a Valkey that was killed, as if the machine had been replaced."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def waiting(self) -> dict[str, int]:
        """How many messages of leads and events are queued or with a worker."""
        with self.client() as client:
            keys: Any = client.keys("*")
            counts = {"intake": 0, "events": 0}
            for name in counts:
                counts[name] = sum(client.llen(key) for key in keys if key == name.encode() or _is_step(key, name))
            held: Any = client.hvals("unacked")
            counts["unacked"] = sum(b'"pipeline.intake"' in body or b'"pipeline.events"' in body for body in held)
            return counts

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class _Rabbit:
    """What both kinds of RabbitMQ have: a vhost, its queues, its connections."""

    name: str
    url: str
    control: tuple[str, ...] = ("rabbitmqctl",)
    environment: dict[str, str] | None = None
    """Of the control program; None is this process's."""

    def drop_connections(self) -> int:
        """Close every connection of the vhost, without a goodbye that a client could plan for."""
        closed = self._run("close_all_connections", "-p", self.name, "chaos")
        return int(found[0]) if (found := re.findall(r"Closed (\d+) connections", closed)) else 0

    def waiting(self) -> dict[str, int]:
        """How many messages of leads and events are queued or with a worker."""
        counts = {"intake": 0, "events": 0, "unacked": 0}
        for line in self._run("list_queues", "-q", "-s", "-p", self.name, "name", "messages").splitlines():
            name, _, number = line.partition("\t")
            if name in counts and number.isdigit():
                counts[name] = int(number)
        return counts

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.control, *arguments], capture_output=True, text=True, timeout=60, env=self.environment
        )
        if done.returncode:
            raise ServiceMissing(f"rabbitmqctl {arguments[0]}: {' '.join(done.stderr.split())[:200]}")
        return done.stdout


class RabbitVhost(_Rabbit):
    """A vhost of our own on a RabbitMQ that others use too, so that closing connections hurts nobody else's."""

    def __init__(self) -> None:
        self.name = f"chaos-{uuid.uuid4().hex[:10]}"
        parsed = urllib.parse.urlsplit(RABBITMQ_URL)
        self.url = parsed._replace(path=f"/{self.name}").geturl()
        self._user = parsed.username or "guest"

    def start(self) -> None:
        """Create the vhost."""
        if shutil.which("rabbitmqctl") is None:
            raise ServiceMissing("rabbitmqctl is not installed, so no vhost of our own can be made")
        self._run("add_vhost", self.name)
        self._run("set_permissions", "-p", self.name, self._user, ".*", ".*", ".*")

    def close(self) -> None:
        """Remove the vhost with everything in it."""
        with contextlib.suppress(ServiceMissing):
            self._run("delete_vhost", self.name)


class PrivateRabbit(_Rabbit):
    """A RabbitMQ node of our own over a folder, which may be killed and started again."""

    name = "/"

    def __init__(self, folder: Path) -> None:
        home = Path("/usr/lib/rabbitmq/bin")  # Debian's scripts on PATH change to a user that our folder is not open to
        server = home / "rabbitmq-server" if home.exists() else shutil.which("rabbitmq-server")
        if server is None:
            raise ServiceMissing("rabbitmq-server is not installed, so no node of our own can be started")
        self._server = str(server)
        self._folder = folder / "rabbitmq"
        self._folder.mkdir()
        self._log = folder / "rabbitmq.log"
        self._port = free_port()
        self._distribution_port = free_port()
        self._node = f"chaos-{uuid.uuid4().hex[:10]}@localhost"
        self.control = (str(Path(server).parent / "rabbitmqctl"), "-n", self._node)
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}//"
        self._process: subprocess.Popen[bytes] | None = None
        self.environment = self._environment()
        (self._folder / "plugins").write_text("[].\n")

    def start(self) -> None:
        """Start the node over what is on disk and wait until it takes connections."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._server], env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + _RABBIT_START_SECONDS
        while True:
            with contextlib.suppress(OSError), kombu.Connection(self.url, connect_timeout=2) as connection:
                connection.connect()
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise ServiceMissing(f"the private RabbitMQ did not start; see {self._log}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL the node."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Stop the node in an orderly way, as an upgrade does."""
        if self._process is not None:
            self._run("stop")
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        """End it."""
        self.kill()

    def _environment(self) -> dict[str, str]:
        ours = {
            "NODENAME": self._node,
            "NODE_IP_ADDRESS": "127.0.0.1",
            "NODE_PORT": str(self._port),
            "DIST_PORT": str(self._distribution_port),
            "MNESIA_BASE": str(self._folder / "mnesia"),
            "LOG_BASE": str(self._folder / "log"),
            "PID_FILE": str(self._folder / "pid"),
            "ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "CONFIG_FILE": str(self._folder / "none"),
            "CONF_ENV_FILE": str(self._folder / "none.conf"),
            "SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +S 1:1",  # no spinning: others need the processors too
        }
        return os.environ | {f"RABBITMQ_{name}": value for name, value in ours.items()} | {"HOME": str(self._folder)}


def _is_step(key: bytes, name: str) -> bool:
    return key.startswith(name.encode() + b"\x06\x16")
