"""Raw answers to the POST of a lead: a grammar that makes them, and the two engines that read them."""

from __future__ import annotations

import gzip
import importlib.util
import random
import uuid
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from pipeline.domain.lead import Claim, Outcome
from pipeline.futwork import Futwork
from pipeline.settings import Settings
from tests.corpus.vendor_answers import NO, YES
from tests.raw_server import Peer, RawServer


def vendor_answer(data: bytes) -> None:
    """A raw answer to a POST. Both engines take it, and they never say the opposite of each other."""
    outcomes = {}
    for name, futwork in _engines().items():
        _Vendor.raw = data
        futwork.send([_claim()], account="default")
        [answer] = futwork.receive(wait=60)
        assert not answer.excerpt.startswith("unexpected"), answer.excerpt
        outcomes[name] = answer.outcome
    known = set(outcomes.values()) - {Outcome.UNCERTAIN}  # what one of them cannot read is uncertain
    assert len(known) <= 1, outcomes
    assert Outcome.NOT_SENT not in known, outcomes


class _Vendor:
    raw = b""

    @staticmethod
    def handle(peer: Peer) -> None:
        if peer.request():
            peer.send(_Vendor.raw)


@cache
def _engines() -> dict[str, Futwork]:
    server = RawServer(_Vendor.handle, None)
    names = ["requests", "curl"] if importlib.util.find_spec("pycurl") else ["requests"]
    options: dict[str, Any] = {
        "futwork_base_url": server.url, "futwork_api_key": "key", "dispatch_concurrency": 1, "read_timeout_seconds": 2,
    }  # fmt: skip
    return {name: Futwork(Settings(futwork_http_engine=name, **options)) for name in names}


def _claim() -> Claim:
    ends = datetime.now(UTC) + timedelta(minutes=5)
    return Claim(uuid.uuid4(), "c1", uuid.uuid4(), ends, "+919999789877", "{}", attempts=0, lead_expires_at=ends)


def raw_answer(rng: random.Random) -> bytes:
    """An answer as HTTP's grammar has it, with each rule of it broken now and then."""

    def one(*choices: bytes) -> bytes:
        return rng.choice(choices)

    def rarely(other: bytes, usual: bytes) -> bytes:
        return other if rng.random() < 0.08 else usual

    end = rarely(b"\n", b"\r\n")
    body = one(b"", b"{}", YES, NO, b"<html></html>", b"\xef\xbb\xbf" + NO, YES[:9], b"x" * 70_000)
    packed, fields = body, []
    if rng.random() < 0.2:
        packed = rarely(gzip.compress(body)[:-9], gzip.compress(body))
        fields.append(b"Content-Encoding: " + rarely(b"br", b"gzip"))
    if rng.random() < 0.4:
        size = rng.randint(1, 40)
        parts = [packed[at : at + size] for at in range(0, len(packed), size)]
        extension, trailer = rarely(b";a=b", b""), rarely(b"X-Sum: 7" + end, b"")
        packed = b"".join(b"%x" % len(part) + extension + end + part + rarely(b"", end) for part in parts)
        packed += rarely(b"", b"0" + end + trailer + end)
        fields.append(b"Transfer-Encoding: chunked")
    elif rng.random() < 0.9:
        length = len(packed) + int(rarely(b"5", b"0")) - int(rarely(b"2", b"0"))
        fields += [b"Content-Length: %d" % length] * int(rarely(b"2", b"1"))
    fields += [b"Retry-After: " + one(b"7", b"soon", b"Fri, 08 May 2026 12:00:10 GMT")] * rng.randint(0, 1)
    fields.append(rarely(one(b"X-A: b" + end + b" c", b"no colon", b": b", b"X-B : c", b"X-A: \xff\0"), b"X-A: b"))
    rng.shuffle(fields)
    interim = b"HTTP/1.1 " + one(b"100 Continue", b"103 Early Hints") + end + end
    status = rarely(one(b"20", b"2000", b"", b"abc", b"777"), b"%d" % rng.randint(200, 599))
    line = rarely(b"HTTP/2", b"HTTP/1.1") + b" " + status + rarely(b"", b" Whatever") + end
    answer = rarely(interim, b"") + line + b"".join(field + end for field in fields) + end + packed
    return rarely(answer[: rng.randint(0, len(answer))], answer)
