"""The ledger cut off, restarted, locked."""

from __future__ import annotations

import contextlib
import sqlite3
import time

from tests.chaos.rig import Plan
from tests.chaos.runner import Round, experiment

# The ledger


@experiment("postgres-cut", proves="a message whose ledger is away goes back to its queue")
def cut_postgres_connections(this: Round) -> None:
    """Terminate the connections to PostgreSQL, in the middle of transactions too, again and again."""
    this.feed.leads(this.size(300, 60), seconds=5)
    this.feed.events(this.size(300, 60), seconds=5)
    ends = time.monotonic() + 5
    cut = 0
    while time.monotonic() < ends:
        this.rig.pause(0.05, 0.4)
        cut += this.rig.database.cut(busy_only=this.rig.rng.random() < 0.7)
        this.rig.note("connections to PostgreSQL cut")
    this.notes["cut"] = this.notes.get("cut", 0) + cut


@experiment(
    "postgres-restart", proves="the same while the database restarts, fast and after a crash",
    plan=Plan(ledger="private-postgres"),
)  # fmt: skip
def restart_postgres(this: Round) -> None:
    """Restart a private PostgreSQL under load: fast, immediate, and after SIGKILL."""
    this.feed.leads(this.size(400, 60), seconds=this.size(14, 6))
    this.feed.events(this.size(300, 40), seconds=this.size(14, 6))
    for how in ("fast", "immediate", "kill")[this.size(0, 2) :]:
        this.rig.pause(1.0, 2.0)
        this.rig.note(f"PostgreSQL: {how}", kills=how == "kill")
        if how == "kill":
            this.rig.database.kill()
        else:
            this.rig.database.down(how)
        this.rig.pause(0.5, 2.0)
        this.rig.database.up()


@experiment("sqlite-locked", proves="writers queue up for SQLite", plan=Plan(ledger="sqlite"))
def lock_sqlite(this: Round) -> None:
    """Hold SQLite's write lock from another process, once for longer than our writers wait."""
    this.feed.leads(this.size(250, 40), seconds=4)
    this.feed.events(this.size(200, 30), seconds=4)
    for seconds in (2.0, 18.0)[: this.size(2, 1)]:
        this.rig.pause(0.5, 1.0)
        with contextlib.closing(sqlite3.connect(this.rig.database.path, isolation_level=None, timeout=30)) as other:
            other.execute("BEGIN IMMEDIATE")
            this.rig.note(f"SQLite locked for {seconds:g} s")
            time.sleep(seconds)
            other.execute("ROLLBACK")


@experiment("sqlite-kills", proves="the ledger on SQLite survives its writers", plan=Plan(ledger="sqlite"))
def kill_over_sqlite(this: Round) -> None:
    """Kill workers and their children over an SQLite ledger."""
    this.feed.leads(this.size(250, 50), seconds=5)
    this.feed.events(this.size(250, 50), seconds=5)
    for name in ("records", "dispatch") * this.size(4, 1):
        this.rig.pause(0.2, 0.7)
        this.rig.kill_child(name)
    this.rig.kill_whole("records")
    this.rig.kill_whole("dispatch")
