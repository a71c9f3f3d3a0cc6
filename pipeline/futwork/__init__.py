"""The only package that speaks to Futwork: a claim goes out as one POST, and its answer comes back as an outcome.

Whether a lead may be sent again hangs on one fact: did any byte of the request leave this machine? Each engine answers
it (`wire`); what an answer means is decided in one place for all (`verdict`).

Source of what is known about the wire: the vendor's Lead Integration Guide, and `docs/futwork.md` for what it leaves
unsaid. The guide documents no response bodies, so every reading of one is lenient.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from pipeline.domain.lead import Answer, Claim, Outcome
from pipeline.futwork.fields import DATA, PHONE, national_digits
from pipeline.futwork.verdict import EXCERPT_CHARACTERS, excerpt_of, find_lead_id, judge, parse_retry_after, unpack
from pipeline.futwork.wire import Engine, Post, Reply
from pipeline.observability import tracing

if TYPE_CHECKING:
    from pipeline.settings import Settings

__all__ = ["EXCERPT_CHARACTERS", "Futwork", "excerpt_of", "find_lead_id", "judge", "parse_retry_after"]


class Futwork:
    """Futwork's lead endpoint. Give it claims with `send`, collect their answers with `receive`, in any order.

    One instance serves one thread that dispatches; inside, up to *concurrency* POSTs are out at once, each over a
    kept-alive connection. Every claim gets exactly one answer. Build it after the worker has forked.
    """

    def __init__(self, settings: Settings) -> None:
        self._base_url = settings.futwork_base_url
        self._host = urlsplit(settings.futwork_base_url).hostname
        self._keys = settings.api_keys()
        self._reference_key = settings.reference_key
        self._retry_after_cap = timedelta(seconds=settings.retry_after_cap_seconds)
        self.concurrency = settings.dispatch_concurrency
        self._engine = _engine(settings)
        self._closed = False
        self._unsendable: list[Answer] = []

    @property
    def in_flight(self) -> int:
        """How many claims were sent and not received yet."""
        return self._engine.in_flight + len(self._unsendable)

    def has_key(self, account: str) -> bool:
        """Whether an API key is configured for the account."""
        return account in self._keys

    def send(self, claims: Sequence[Claim], *, account: str, at: Sequence[float] = ()) -> None:
        """Start a POST for each claim, with *at* each at its moment on the steady clock, and return at once."""
        if self._closed:
            raise RuntimeError("this Futwork is closed")
        key, posts = self._keys[account], []
        for claim, moment in zip(claims, chain(at, repeat(0.0)), strict=False):
            try:
                body = self.body_of(claim)
            except ValueError as error:  # a fault of ours must not lose the claim: it is answered as what it is
                why = f"unexpected {type(error).__name__}"
                self._unsendable.append(Answer(claim, Outcome.NOT_SENT, datetime.now(UTC), timedelta(), excerpt=why))
            else:
                posts.append(Post(claim, f"{self._base_url}/campaigns/{claim.campaign_id}/leads", key, body, moment))
        self._engine.start(posts)

    def receive(self, *, wait: float) -> list[Answer]:
        """The answers that are there, after waiting up to *wait* seconds for the first of them."""
        answers, self._unsendable = self._unsendable, []
        answers += [self._answer(reply) for reply in self._engine.receive(wait=0 if answers else wait)]
        if tracing.is_on():
            for answer in answers:
                self._trace(answer)
        return answers

    def close(self) -> None:
        """Finish every POST that was given, end the threads, close the connections. Answers can still be received."""
        if not self._closed:
            self._closed = True
            self._engine.close()

    def body_of(self, claim: Claim) -> bytes:
        """The request's body: the ten national digits and the data, with our reference where one is configured."""
        if not self._reference_key:
            data: Any = orjson.Fragment(claim.data)
        else:
            data = orjson.loads(claim.data) | {self._reference_key: str(claim.lead_id)}
        return orjson.dumps({PHONE: national_digits(claim.phone), DATA: data})

    def _answer(self, reply: Reply) -> Answer:
        claim = reply.post.claim
        body = unpack(reply.body, reply.encoding) if reply.encoding else reply.body
        if reply.status is None or (body is None and 200 <= reply.status < 300):  # what cannot be read might say no
            outcome = Outcome.UNCERTAIN if reply.touched else Outcome.NOT_SENT
            why = reply.failure or "the answer could not be unpacked"
            return Answer(claim, outcome, reply.started_at, reply.duration, excerpt=why)
        body = body or b""
        outcome, futwork_lead_id = judge(reply.status, body)
        if outcome is Outcome.ACCEPTED:
            return Answer(claim, outcome, reply.started_at, reply.duration, reply.status, futwork_lead_id)
        retry_after = parse_retry_after(reply.retry_after, now=datetime.now(UTC))
        return Answer(
            claim,
            outcome,
            reply.started_at,
            reply.duration,
            http_status=reply.status,
            futwork_lead_id=futwork_lead_id,
            excerpt=f"HTTP {reply.status} {excerpt_of(body, secret=reply.post.key)}".strip(),
            retry_after=None if retry_after is None else min(retry_after, self._retry_after_cap),
        )

    def _trace(self, answer: Answer) -> None:
        claim = answer.claim
        about = {
            "http.request.method": "POST",
            "http.response.status_code": answer.http_status,
            "server.address": self._host,
            "lead": str(claim.lead_id),
            "campaign": claim.campaign_id,
            "outcome": answer.outcome.value,
            "attempt": claim.attempts + 1,
        }
        tracing.note(
            "POST lead",
            claim.traceparent,
            about,
            began=answer.started_at,
            took=answer.duration,
            failed=answer.outcome is not Outcome.ACCEPTED,
            calls_out=True,
        )


def _engine(settings: Settings) -> Engine:
    """The engine of the settings; `auto` takes libcurl where a pycurl is installed that is new enough."""
    options: dict[str, Any] = {
        "concurrency": settings.dispatch_concurrency,
        "connect_seconds": settings.connect_timeout_seconds,
        "answer_seconds": settings.read_timeout_seconds,
        "ca_file": settings.futwork_ca_file,
    }
    if settings.futwork_http_engine != "requests":
        try:
            from pipeline.futwork.with_curl import CurlEngine
        except ImportError:
            if settings.futwork_http_engine == "curl":
                from pipeline.settings import SettingsError

                raise SettingsError(
                    "FUTWORK_HTTP_ENGINE is curl, but pycurl 7.46 or newer is not installed: install the extra `curl`"
                ) from None
        else:
            return CurlEngine(**options)
    from pipeline.futwork.with_requests import RequestsEngine

    return RequestsEngine(**options)
