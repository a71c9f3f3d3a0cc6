"""What happens to a POST, drawn from the seed.

A decision depends on the seed, the campaign, the phone number and how often that number was posted to that campaign
before, and on nothing else: not on the order of arrival, not on the clock. So a concurrent run can be repeated.
"""

import struct
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from pipeline.sandbox.options import ANSWER_FAULTS

_DRAW_BITS = 53  # what a float can hold; more would round up to 1.0


class Decision(NamedTuple):
    """The fate of one POST, and the draws (numbers in [0, 1)) that settle its details."""

    fault: str | None
    variant: float
    latency: float
    shape: float
    created: bool
    lead_id: str
    call_seed: bytes

    @property
    def accepts(self) -> bool:
        """Whether the lead is taken and called, whatever the client gets to see."""
        if self.fault in {"500", "502", "504"}:
            return self.variant < 0.5
        return self.fault in {None, "reset_after", "stall", "malformed"}


def decide(seed: int, campaign_id: str, phone: str, attempt: int, faults: Mapping[str, float]) -> Decision:
    """Decide the fate of the *attempt*-th POST (from 1) of a phone number to a campaign."""
    digest = blake2b(f"{seed}\n{campaign_id}\n{phone}\n{attempt}".encode()).digest()
    fault, variant, latency, shape, status = struct.unpack_from("<5Q", digest, 12)
    return Decision(
        fault=_pick(_draw(fault), faults) if faults else None,
        variant=_draw(variant),
        latency=_draw(latency),
        shape=_draw(shape),
        created=bool(status & 1),
        lead_id=digest[:12].hex(),
        call_seed=digest[52:],
    )


def _draw(word: int) -> float:
    return (word >> (64 - _DRAW_BITS)) / (1 << _DRAW_BITS)


def _pick(draw: float, faults: Mapping[str, float]) -> str | None:
    for name in ANSWER_FAULTS:
        draw -= faults.get(name, 0.0)
        if draw < 0:
            return name
    return None
