"""The spool: events on disk while the broker is away."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.broker import BrokerUnavailable
from pipeline.broker.spool import Spool, SpoolFull
from tests.unit.broker.conftest import bodies, files_of, make_event
from tests.waiting import patience, until


def test_a_spool_that_was_never_written_is_empty_and_creates_nothing(spool: Spool) -> None:
    assert spool.size() == (0, 0)
    assert spool.drain(pytest.fail) == 0
    assert not spool._directory.exists()


def test_events_come_out_in_the_order_in_which_they_went_in_and_leave_nothing(spool: Spool) -> None:
    for number in range(30):
        spool.write([make_event(2 * number), make_event(2 * number + 1, body=b"\xff")])
    files, size = spool.size()
    assert files == 30
    assert size == sum(path.stat().st_size for path in files_of(spool))
    taken: list[bytes] = []
    assert spool.drain(lambda message: taken.extend(bodies(message))) == 30
    assert taken == [body for number in range(30) for body in (make_event(2 * number).body, b"\xff")]
    assert spool.size() == (0, 0)
    assert files_of(spool) == []


def test_only_its_owner_may_read_the_spool(spool: Spool) -> None:
    spool.write([make_event()])
    assert spool._directory.stat().st_mode & 0o777 == 0o700


def test_a_drain_takes_at_most_what_it_is_told_oldest_first(spool: Spool) -> None:
    for number in range(5):
        spool.write([make_event(number)])
    taken: list[bytes] = []
    assert spool.drain(lambda message: taken.extend(bodies(message)), most=2) == 2
    assert taken == [make_event(0).body, make_event(1).body]
    assert spool.size()[0] == 3


def test_a_publish_that_fails_leaves_its_file_and_all_later_ones(spool: Spool) -> None:
    for number in range(3):
        spool.write([make_event(number)])
    taken: list[bytes] = []

    def publish(message: dict[str, Any]) -> None:
        if taken:
            raise BrokerUnavailable("away")
        taken.extend(bodies(message))

    with pytest.raises(BrokerUnavailable):
        spool.drain(publish)
    assert spool.size()[0] == 2
    spool.drain(lambda message: taken.extend(bodies(message)))
    assert taken == [make_event(number).body for number in range(3)]


def test_a_drainer_that_dies_after_the_publish_only_repeats_it(spool: Spool) -> None:
    spool.write([make_event()])
    taken: list[bytes] = []

    def publish_and_die(message: dict[str, Any]) -> None:
        taken.extend(bodies(message))
        raise SystemExit

    with pytest.raises(SystemExit):
        spool.drain(publish_and_die)
    assert spool.drain(lambda message: taken.extend(bodies(message))) == 1
    assert taken == [make_event().body] * 2


def test_a_damaged_file_is_set_aside_and_the_others_go_on(spool: Spool) -> None:
    for number in range(3):
        spool.write([make_event(number)])
    broken = files_of(spool)[1]
    content = bytearray(broken.read_bytes())
    content[-5] ^= 1
    broken.write_bytes(content)
    taken: list[bytes] = []
    assert spool.drain(lambda message: taken.extend(bodies(message))) == 2
    assert taken == [make_event(0).body, make_event(2).body]
    assert files_of(spool) == [broken.with_suffix(".damaged")]
    assert broken.with_suffix(".damaged").read_bytes() == content
    assert spool.size() == (0, 0)


@pytest.mark.parametrize("content", [b"", b"garbage", b"00000000\n", b"\n\n\n"])
def test_a_file_that_is_none_of_ours_is_set_aside(content: bytes, spool: Spool) -> None:
    spool.write([make_event()])
    stranger = spool._directory / "0-stranger.events"
    stranger.write_bytes(content)
    taken: list[Any] = []
    assert spool.drain(taken.append) == 1
    assert stranger.with_suffix(".damaged").read_bytes() == content


def test_a_file_has_its_name_only_when_it_is_complete(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append(next((file.suffix for file in files_of(spool)), "folder")))
    spool.write([make_event()])
    assert (set(synced[:-2]), synced[-2:]) == ({"folder"}, [".draft", ".events"])


def test_the_drafts_of_writers_that_died_are_no_events_and_are_removed_after_an_hour(spool: Spool) -> None:
    spool.write([make_event()])
    young, old = spool._directory / "1-young.draft", spool._directory / "1-old.draft"
    for draft in (young, old):
        draft.write_bytes(b"half")
    os.utime(old, (time.time() - 3700,) * 2)
    taken: list[Any] = []
    assert spool.drain(taken.append) == 1
    assert files_of(spool) == [young]


def test_drainers_side_by_side_drain_each_file_once(spool: Spool) -> None:
    for number in range(300):
        spool.write([make_event(number)])
    taken: list[bytes] = []
    start = threading.Barrier(6)

    def drain() -> int:
        own = Spool(spool._directory, max_bytes=1_000_000)
        start.wait(patience())
        return sum(own.drain(lambda message: taken.extend(bodies(message))) for _ in range(3))

    with ThreadPoolExecutor(6) as pool:
        drained = [future.result(patience()) for future in [pool.submit(drain) for _ in range(6)]]
    assert sum(drained) == 300
    assert sorted(taken) == sorted(make_event(number).body for number in range(300))
    assert spool.size() == (0, 0)


def test_a_file_that_another_drainer_holds_is_left_to_it(spool: Spool) -> None:
    spool.write([make_event()])
    inner: list[int] = []

    def publish(_message: Any) -> None:
        inner.append(Spool(spool._directory, max_bytes=1_000_000).drain(pytest.fail))

    assert spool.drain(publish) == 1
    assert inner == [0]


def test_a_full_spool_refuses_by_files_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=3)
    for number in range(3):
        spool.write([make_event(number)])
    with pytest.raises(SpoolFull, match="holds 3 files, "):
        spool.write([make_event(3)])
    assert spool.size()[0] == len(files_of(spool)) == 3


def test_a_full_spool_refuses_by_bytes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1000)
    spool.write([make_event(body=b"x" * 600)])
    with pytest.raises(SpoolFull, match="that is its bound"):
        spool.write([make_event(body=b"x" * 600)])
    spool.write([make_event(body=b"x" * 100)])
    assert spool.size()[0] == 2


def test_a_full_spool_takes_events_again_once_this_process_has_drained_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=1)
    spool.write([make_event(0)])
    with pytest.raises(SpoolFull):
        spool.write([make_event(1)])
    spool.drain(lambda _: None)
    spool.write([make_event(2)])
    assert spool.size()[0] == 1


def test_a_full_spool_takes_events_again_soon_after_another_process_has_drained_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=1)
    spool.write([make_event(0)])
    Spool(tmp_path / "spool", max_bytes=1_000_000).drain(lambda _: None)

    def takes() -> bool:
        try:
            spool.write([make_event(1)])
        except SpoolFull:
            return False
        return True

    until(takes)


def test_what_earlier_processes_left_counts_towards_the_bound(tmp_path: Path) -> None:
    Spool(tmp_path / "spool", max_bytes=1_000_000).write([make_event(0)])
    with pytest.raises(SpoolFull):
        Spool(tmp_path / "spool", max_bytes=1_000_000, max_files=1).write([make_event(1)])


def test_a_disk_that_takes_nothing_is_told_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=1_000_000)
    spool.write([make_event(0)])

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(SpoolFull, match="could not be written: No space left on device"):
        spool.write([make_event(1)])
    assert [path.suffix for path in files_of(spool)] == [".events"]


def test_a_spool_where_a_file_stands_is_told(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("not a folder")
    with pytest.raises(SpoolFull, match="could not be written: Not a directory"):
        Spool(tmp_path / "spool", max_bytes=1_000_000).write([make_event()])


def test_writing_does_not_slow_down_when_tens_of_thousands_of_files_wait(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1_000_000_000)
    for number in range(30_000):
        (tmp_path / f"{number:020d}-x.events").touch()
    scans = 0
    size = spool.size

    def counted() -> tuple[int, int]:
        nonlocal scans
        scans += 1
        return size()

    spool.size = counted  # type: ignore[method-assign]  # counts how often, and does the same
    started = time.monotonic()
    for number in range(300):
        spool.write([make_event(number)])
    assert scans <= 1 + (time.monotonic() - started) / 0.5
    assert size()[0] == 30_300
