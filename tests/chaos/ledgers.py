"""The databases that the experiments may hurt: one of our own on a PostgreSQL, a whole private PostgreSQL, SQLite."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import sqlalchemy as sa

from pipeline.devstack.embedded_valkey import free_port
from tests.chaos.brokers import ServiceMissing

POSTGRES_URL = os.environ.get("TEST_DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
_START_SECONDS = 30.0


class SqliteFile:
    """An SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.db"
        self.url = f"sqlite:///{self.path}"

    def start(self) -> None:
        """Nothing: the file appears with its first table."""

    def close(self) -> None:
        """Nothing: the folder goes with the rig."""


class _Postgres:
    """What both kinds of PostgreSQL can suffer."""

    def __init__(self, url: str, admin: str) -> None:
        self.url = url
        self._admin = sa.create_engine(admin, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def cut(self, *, busy_only: bool = False) -> int:
        """Terminate our connections where they stand; *busy_only* takes those inside a transaction."""
        where = "AND state <> 'idle'" if busy_only else ""
        statement = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            f" WHERE datname = :name AND application_name = 'futwork-lead-pipeline' {where}"
        )
        with self._admin.connect() as connection:
            return int(connection.scalar(sa.text(statement), {"name": sa.make_url(self.url).database}) or 0)


class OwnDatabase(_Postgres):
    """A database of our own on a PostgreSQL that others use too."""

    def __init__(self) -> None:
        self.name = f"chaos_{uuid.uuid4().hex[:12]}"
        url = sa.make_url(POSTGRES_URL).set(database=self.name).render_as_string(hide_password=False)
        super().__init__(url, POSTGRES_URL)

    def start(self) -> None:
        """Create it."""
        try:
            with self._admin.connect() as connection:
                connection.execute(sa.text(f"CREATE DATABASE {self.name}"))
        except sa.exc.OperationalError as error:
            raise ServiceMissing(f"PostgreSQL: {' '.join(str(error).split())[:200]}") from None

    def close(self) -> None:
        """Drop it."""
        with self._admin.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)"))
        self._admin.dispose()


class PrivatePostgres(_Postgres):
    """A PostgreSQL server of our own, which may be restarted and killed; not run as root."""

    def __init__(self, folder: Path) -> None:
        homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        home = shutil.which("initdb")
        if not homes and home is None:
            raise ServiceMissing("initdb is not installed, so no private PostgreSQL can be made")
        self._bin = homes[-1] if homes else Path(str(home)).parent
        self._log = folder / "postgres.log"
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-postgres-"))  # the server's user must be able to reach it
        self.port = free_port()
        url = f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/postgres"
        super().__init__(url, url)

    def start(self) -> None:
        """Make a cluster and start it."""
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
        self._run("initdb", "-D", str(self._folder), "-U", "postgres", "-A", "trust", "--no-sync")
        self.up()

    def up(self) -> None:
        """Start the server."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=60"
        log = str(self._folder / "server.log")
        self._run("pg_ctl", "-D", str(self._folder), "-w", "-t", "30", "-l", log, "-o", options, "start")

    def copy(self, primary: PrivatePostgres) -> None:
        """Become a standby of *primary*, from a copy of it."""
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
        source = ("-h", "127.0.0.1", "-p", str(primary.port), "-U", "postgres")
        self._run("pg_basebackup", "-D", str(self._folder), *source, "-R", "--no-sync", "-c", "fast")

    def promote(self) -> None:
        """Turn from a standby into a primary."""
        self._run("pg_ctl", "-D", str(self._folder), "-w", "promote")

    def follow(self, primary: PrivatePostgres) -> None:
        """Start as the standby of *primary* at the next start."""
        with (self._folder / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"primary_conninfo = 'host=127.0.0.1 port={primary.port} user=postgres'\n")
        (self._folder / "standby.signal").touch()
        if os.geteuid() == 0:
            shutil.chown(self._folder / "standby.signal", "postgres", "postgres")

    def down(self, mode: str) -> None:
        """Stop the server: `fast` breaks transactions off, `immediate` leaves recovery to the next start."""
        self._run("pg_ctl", "-D", str(self._folder), "-m", mode, "-w", "stop")

    def kill(self) -> None:
        """SIGKILL the postmaster, and wait until its children have noticed."""
        pid = int((self._folder / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, 9)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
        time.sleep(0.5)  # the other server processes see that their parent is gone
        (self._folder / "postmaster.pid").unlink(missing_ok=True)

    def close(self) -> None:
        """Stop it for good."""
        if (self._folder / "postmaster.pid").exists():
            self.down("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", "postgres", "--", *command]
        # pg_ctl's server inherits our pipes, so its output must go to a file, or reading it would never end.
        with self._log.open("ab") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd="/", timeout=90)
        if done.returncode:
            raise ServiceMissing(f"{program} ended with code {done.returncode}; see {self._log}")


class PostgresPair:
    """A primary and its standby, two private servers that change places."""

    def __init__(self, folder: Path) -> None:
        self.primary, self.standby = PrivatePostgres(folder), PrivatePostgres(folder)
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in (self.primary, self.standby))
        self.url = f"postgresql://postgres@{hosts}/postgres"

    def start(self) -> None:
        """Make the primary, copy it, and let the copy follow it."""
        self.primary.start()
        self.standby.copy(self.primary)
        self.standby.up()

    def fail_over(self) -> None:
        """Stop the primary, promote the standby, and let the old primary follow it.

        An orderly stop sends the standby everything that was committed, so nothing may be missing afterwards.
        """
        self.primary.down("fast")
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        self.standby.follow(self.primary)
        self.standby.up()

    def close(self) -> None:
        """Stop both for good."""
        self.standby.close()
        self.primary.close()
