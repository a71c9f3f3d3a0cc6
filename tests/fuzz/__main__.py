"""`make fuzz`: broken variants of good inputs for a while, printed with their seed if one breaks a reader."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from tests.fuzz import GRAMMARS, SEEDS, TARGETS

_TOKENS = [
    b'"',
    b"\\",
    b"\0",
    b"\xff",
    b"\n",
    b",",
    b"{",
    b"[",
    b"]",
    b"}",
    b":",
    b"null",
    b"1e999",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"+91",
    b"9" * 40,
]
_SLOW_SECONDS = 2.0


def mutated(rng: random.Random, seed: bytes, *, most: int = 1_000_000) -> bytes:
    """A variant of *seed*: pieces cut, repeated, swapped, and signs put in that readers trip over."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 8)):
        at, to = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        match rng.randrange(5):
            case 0:
                del data[at:to]
            case 1:
                data[at:at] = data[at:to] * rng.choice((1, 2, 50, 2000))
            case 2:
                data[at:at] = rng.choice(_TOKENS) * rng.choice((1, 1, 1, 30, 3000))
            case 3 if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case _:
                data[at:to] = rng.randbytes(rng.randint(0, 8))
        del data[most:]
    return bytes(data)


def main(seconds: float, seed: int) -> int:
    """Fuzz every reader in turn for its part of the time; return how many broke."""
    broken = 0
    for name, target in TARGETS.items():
        rng, ends, tried = random.Random(seed), time.monotonic() + seconds / len(TARGETS), 0
        slowest = 0.0
        while time.monotonic() < ends:
            grammar = GRAMMARS.get(name)
            data = grammar(rng) if grammar and rng.random() < 0.7 else mutated(rng, rng.choice(SEEDS[name]))
            tried += 1
            began = time.process_time()
            try:
                target(data)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
                broken += 1
                kept = Path(f"fuzz-{name}-{broken}.bin")
                kept.write_bytes(data)
                print(f"{name}: {type(error).__name__}: {str(error)[:200]} (kept as {kept})")  # noqa: T201
                break
            took = time.process_time() - began
            slowest = max(slowest, took)
            if took > _SLOW_SECONDS:
                broken += 1
                Path(f"fuzz-{name}-slow.bin").write_bytes(data)
                print(f"{name}: {took:.1f} s for {len(data):,} bytes")  # noqa: T201
                break
        print(f"{name}: {tried:,} inputs, the slowest took {slowest * 1000:.0f} ms (seed {seed})")  # noqa: T201
    return broken


if __name__ == "__main__":
    sys.exit(
        1
        if main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
        else 0
    )
