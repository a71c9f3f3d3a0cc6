"""The readers of what strangers send, on broken and on endless input: they refuse or read, and soon."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import SEEDS, TARGETS
from tests.fuzz.__main__ import mutated

MEGABYTE = 1024 * 1024

ENDLESS = {
    "brackets": b"[" * MEGABYTE,
    "objects": b'{"a":' * (MEGABYTE // 5),
    "digits": b"9" * MEGABYTE,
    "separators": b"9 -" * (MEGABYTE // 3),
    "quotes": b'"' * MEGABYTE,
    "backslashes": b'{"callSid": "' + b"\\" * MEGABYTE,
    "blanks": b" " * MEGABYTE + b"x",
    "lines": b"\n" * MEGABYTE + b"x",
    "labels": b"user: a\n" * (MEGABYTE // 8),
    "colons": b"a:" * (MEGABYTE // 2),
    "one label": b"a" * MEGABYTE + b":",
    "spaces before a colon": b"user" + b" " * MEGABYTE + b":",
    "a transcript": b'{"callSid": "a", "status": "completed", "transcript": "'
    + b"user: a\\n" * (MEGABYTE // 9)
    + b'"}',
    "a wide header": b"phone," + b"a," * (MEGABYTE // 2) + b"\n9999789877",
    "an open quote": b'phone,name\n9999789877,"' + b"a\n" * (MEGABYTE // 2),
    "many names": b'{"phone": "9999789877", "data": {' + b'"a": 1,' * (MEGABYTE // 7) + b'"b": 1}}',
}


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25, derandomize=True, database=None, deadline=None)
@given(data=st.binary(max_size=300), seed=st.integers(0, 2**32))
def test_no_input_breaks_a_reader(name: str, data: bytes, seed: int) -> None:
    TARGETS[name](data)
    rng = random.Random(seed)
    TARGETS[name](mutated(rng, rng.choice(SEEDS[name]), most=5_000))


@pytest.mark.parametrize("name", TARGETS)
def test_a_megabyte_of_anything_is_read_or_refused(name: str) -> None:
    for data in ENDLESS.values():
        TARGETS[name](data)
