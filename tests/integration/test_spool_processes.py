"""The spool among processes that die at any moment, on disks that are full, and with files that were cut."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from pipeline.broker import WebEvent, decode_events
from pipeline.broker.spool import Spool, SpoolFull
from tests.waiting import until

WRITERS, DRAINERS, KILLS = 3, 2, 14

_COMMON = """
import os, sys, time, uuid
from datetime import UTC, datetime
from pathlib import Path
from pipeline.broker import WebEvent
from pipeline.broker.spool import Spool
folder = Path(sys.argv[1])
spool = Spool(folder / "spool", max_bytes=10**8)
def note(name, line):
    with (folder / name).open("ab", buffering=0) as file:
        file.write(line.encode() + b"\\n")
"""
NURSERY = (
    _COMMON
    + """
def write(_):
    while True:
        name = f"{time.time_ns()}-{uuid.uuid4().hex}"
        spool.write([WebEvent(name.encode(), datetime.now(UTC))])
        note("acknowledged", name)
        time.sleep(0.001)

def publish(message):
    note("published", " ".join(event["body"] for event in message["events"]))

def drain(_):
    while True:
        if not spool.drain(publish, most=50):
            time.sleep(0.002)

def bury(pid):
    return os.waitstatus_to_exitcode(os.waitpid(int(pid), 0)[1])

for line in sys.stdin:
    what, argument = line.split()
    if what == "bury":
        print(bury(argument), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        spool = Spool(folder / "spool", max_bytes=10**8)
        {"write": write, "drain": drain}[what](argument)
"""
)


class Nursery:
    """Writers and drainers, forked from a process that has imported all they need: to start each anew takes longer."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", NURSERY, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._living: set[int] = set()

    def start(self, what: str) -> int:
        pid = self._ask(what, 0)
        self._living.add(pid)
        return pid

    def kill(self, pid: int) -> int:
        """Kill one, and say how it ended."""
        os.kill(pid, signal.SIGKILL)
        self._living.remove(pid)
        return self._ask("bury", pid)

    def close(self) -> None:
        for pid in list(self._living):
            self.kill(pid)
        self._process.communicate()

    def _ask(self, what: str, argument: int) -> int:
        self._process.stdin.write(f"{what} {argument}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    found = Nursery(tmp_path)
    yield found
    found.close()


def test_what_was_acknowledged_comes_out_whoever_is_killed(nursery: Nursery, tmp_path: Path) -> None:
    """A killed drainer may publish one file a second time, which the ledger keeps once; nothing else comes twice."""
    rng = random.Random(5)
    running = [(what, nursery.start(what)) for what in ["write"] * WRITERS + ["drain"] * DRAINERS]
    killed = Counter()
    for _ in range(KILLS):
        before = len(lines(tmp_path / "published"))
        until(lambda: len(lines(tmp_path / "published")) >= before + 20)  # noqa: B023 - it ends in this round
        time.sleep(0.005 * rng.random())
        place = rng.randrange(len(running))
        what, pid = running[place]
        assert nursery.kill(pid) == -9, "it had ended by itself"
        killed[what] += 1
        running[place] = (what, nursery.start(what))
    for what, pid in running:
        assert nursery.kill(pid) == -9, "it had ended by itself"
        killed[what] += 1

    rest: list[str] = []
    spool = Spool(tmp_path / "spool", max_bytes=10**8)
    spool.drain(lambda message: rest.extend(event.body.decode() for event in decode_events(message)), most=10**6)

    published = Counter(lines(tmp_path / "published") + rest)
    acknowledged = lines(tmp_path / "acknowledged")
    assert len(acknowledged) > KILLS * 20
    assert set(acknowledged) - set(published) == set()
    assert len(set(published) - set(acknowledged)) <= killed["write"]
    assert sum(published.values()) - len(published) <= killed["drain"]
    assert (spool.size(), list((tmp_path / "spool").glob("*.damaged"))) == ((0, 0), [])


def test_one_process_drains_in_the_order_of_the_writes(tmp_path: Path) -> None:
    spool, out = Spool(tmp_path / "spool", max_bytes=10**8), []
    given = [str(number).encode() for number in range(300)]
    for body in given:
        spool.write([WebEvent(body, datetime.now(UTC))])
    Spool(tmp_path / "spool", max_bytes=10**8).drain(lambda message: out.extend(decode_events(message)))
    assert [event.body for event in out] == given


def test_a_file_that_was_cut_or_changed_costs_itself_alone(tmp_path: Path) -> None:
    """Whatever of a file is left, none of it is taken for an event; the others come out, and it stays for a person."""
    rng, spool, out = random.Random(3), Spool(tmp_path / "spool", max_bytes=10**8), []
    for number in range(60):
        spool.write([WebEvent(b'{"n": %d}' % number, datetime.now(UTC))])
    files = sorted((tmp_path / "spool").glob("*.events"))
    spoiled = set(rng.sample(range(60), 20))
    for number in spoiled:
        content = bytearray(files[number].read_bytes())
        place = rng.randrange(len(content))
        if number % 2:
            del content[place:]
        else:
            content[place] ^= 1 << rng.randrange(8)
        files[number].write_bytes(bytes(content))

    drained = spool.drain(lambda message: out.extend(decode_events(message)))

    assert drained == len(out) == 40
    assert [orjson.loads(event.body)["n"] for event in out] == [n for n in range(60) if n not in spoiled]
    assert len(list((tmp_path / "spool").glob("*.damaged"))) == spool.damaged() == 20
    assert spool.size() == (0, 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_refuses_what_does_not_fit_and_keeps_what_is_there(small_disk: Path) -> None:
    spool, out = Spool(small_disk / "spool", max_bytes=10**8), []
    kept = 0
    with pytest.raises(SpoolFull, match="No space left on device"):
        while True:
            spool.write([WebEvent(b"x" * 10_000, datetime.now(UTC))])
            kept += 1
    assert kept > 10
    assert list((small_disk / "spool").glob("*.draft")) == []
    assert spool.size()[0] == kept
    assert spool.drain(lambda message: out.extend(decode_events(message))) == kept
    assert len(out) == kept
    spool.write([WebEvent(b"again", datetime.now(UTC))])
    assert spool.size()[0] == 1


def test_a_write_that_breaks_off_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    """A limit on a file's size stands for a disk that fails; a process of its own, because the limit is for good."""
    source = (
        _COMMON
        + """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from pipeline.broker.spool import SpoolFull
spool.write([WebEvent(b"a" * 10_000, datetime.now(UTC))])
try:
    spool.write([WebEvent(b"b" * 30_000, datetime.now(UTC))])
except SpoolFull as error:
    print(error)
"""
    )
    done = subprocess.run([sys.executable, "-c", source, str(tmp_path)], capture_output=True, text=True)

    assert "could not be written: File too large" in done.stdout, done.stderr
    assert sorted(path.suffix for path in (tmp_path / "spool").iterdir()) == [".events"]
