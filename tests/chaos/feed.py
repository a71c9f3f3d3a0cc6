"""Clients that hand leads and events in, and write down which of their requests were answered as accepted.

They do what any client would do in trouble: they send a row again until it is accepted. So a lead may be handed in
several times; that it is called once is the pipeline's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline import EnqueueFailed, enqueue
from pipeline.broker import Broker, celery_app
from pipeline.domain.lead import Lead, lead_id
from tests.chaos.rig import CAMPAIGN, INTAKE_TOKEN, WEBHOOK_TOKEN, Rig

_PATIENCE_SECONDS = 90.0


@dataclass(slots=True)
class Accepted:
    """What the clients were promised."""

    leads: set[uuid.UUID] = field(default_factory=set)
    events: set[str] = field(default_factory=set)
    """Digests of the bodies that were answered 200."""
    offered: set[str] = field(default_factory=set)
    """Digests of the bodies that were posted at all."""
    refusals: int = 0
    """Requests that were not answered, or not as accepted, and sent again."""
    events_refused: int = 0
    """Of them, those of events."""
    given_up: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Feed:
    """Background clients of one rig. `join` waits until all rows are accepted."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.accepted = Accepted()
        self._threads: list[threading.Thread] = []
        self._number = 0
        self._publisher = Broker(celery_app(rig.settings, works=False))

    def leads(self, count: int, *, seconds: float, by: str = "both", campaign: str = CAMPAIGN) -> list[dict[str, Any]]:
        """Start handing in *count* new leads over *seconds*: by `enqueue`, over HTTP, or half each; return the rows."""
        rows = [self._row() for _ in range(count)]
        half = count // 2
        if by in ("both", "enqueue"):
            mine = rows[:half] if by == "both" else rows
            self._start(lambda rng: self._by_enqueue(rng, mine, seconds, campaign))
        if by in ("both", "http"):
            theirs = rows[half:] if by == "both" else rows
            for client in range(4):
                self._start(lambda rng, part=theirs[client::4]: self._by_http(rng, part, seconds, campaign))
        return rows

    def into_the_ledger(self, count: int, *, campaign: str = CAMPAIGN) -> None:
        """Put *count* new leads straight into the ledger, as if intake had just taken them in."""
        ledger, now = self._rig.ledger, datetime.now(UTC)
        known = ledger.campaigns.ensure(campaign, now=now)
        age = timedelta(seconds=self._rig.settings.lead_max_age_seconds)
        for start in range(0, count, 500):
            leads = [Lead.read(self._row(), region="IN") for _ in range(min(500, count - start))]
            ledger.leads.take_in(known, leads, batch_id=uuid.uuid4(), max_age=age, now=now)
            self._took([lead_id(campaign, lead.key) for lead in leads])

    def again(self, rows: list[dict[str, Any]], *, campaign: str = CAMPAIGN) -> None:
        """Hand rows in once more."""
        self._start(lambda rng: self._by_enqueue(rng, rows, 0, campaign))

    def events(
        self, count: int, *, seconds: float, clients: int = 4, make: Callable[[int], bytes] | None = None
    ) -> None:
        """Start posting *count* events that belong to no lead of ours over *seconds*."""
        first = self._number
        self._number += count
        make = make or self._orphan
        bodies = [make(first + number) for number in range(count)]
        for client in range(clients):
            self._start(lambda rng, part=bodies[client::clients]: self._post_events(rng, part, seconds))

    def join(self) -> None:
        """Wait until every client has handed in everything, or has given up."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    @property
    def busy(self) -> bool:
        """Whether a client is still at work."""
        return any(thread.is_alive() for thread in self._threads)

    def _start(self, work: Callable[[random.Random], None]) -> None:
        rng = random.Random(self._rig.rng.random())
        thread = threading.Thread(target=work, args=(rng,), daemon=True, name="feed")
        self._threads.append(thread)
        thread.start()

    def _row(self) -> dict[str, Any]:
        self._number += 1
        return {"phone": f"98{self._number:08d}", "data": {"customer_name": f"Lead {self._number}", "n": self._number}}

    def _orphan(self, number: int) -> bytes:
        """An event of a call that we never asked for; some calls have several."""
        status = ("initiated", "in-progress", "call-disconnected", "completed")[number % 4]
        event = {
            "callSid": f"stranger-{self._rig.seed}-{number // 4}",
            "campaignId": "elsewhere",
            "status": status,
            "contextDetails": {"recipientPhoneNumber": f"+9197{number // 4:08d}", "recipientData": {}},
            "telephonyData": {"duration": number % 60, "direction": "outbound"},
            "disposition": "" if status != "completed" else "Interested",
        }
        return json.dumps(event).encode()

    def large_event(self, number: int) -> bytes:
        """An event of a call that we never asked for, with much talk."""
        event = json.loads(self._orphan(number))
        return json.dumps(event | {"summary": "blah " * 800}).encode()

    def _by_enqueue(self, rng: random.Random, rows: list[dict[str, Any]], seconds: float, campaign: str) -> None:
        deadline = time.monotonic() + seconds + _PATIENCE_SECONDS
        pace = _Pace(rng, len(rows), seconds)
        while rows:
            if time.monotonic() > deadline:
                self.accepted.given_up.append(f"{len(rows)} rows by enqueue")
                return
            batch = rows[: rng.randint(1, 40)]
            try:
                report = enqueue(campaign, batch, settings=self._rig.settings, publisher=self._publisher)
            except EnqueueFailed as error:
                self._took(error.report.ids)
                self.accepted.refusals += 1
                rows = [batch[index] for index in error.not_accepted] + rows[len(batch) :]
                time.sleep(0.2)
                continue
            self._took(report.ids)
            rows = rows[len(batch) :]
            pace.wait(len(batch))

    def _by_http(self, rng: random.Random, rows: list[dict[str, Any]], seconds: float, campaign: str) -> None:
        deadline = time.monotonic() + seconds + _PATIENCE_SECONDS
        pace = _Pace(rng, len(rows), seconds)
        url = f"{self._rig.web}/v1/campaigns/{campaign}/leads"
        while rows:
            if time.monotonic() > deadline:
                self.accepted.given_up.append(f"{len(rows)} rows over HTTP")
                return
            batch = rows[: rng.randint(1, 10)]
            status, body = _post(url, json.dumps(batch).encode(), {"Authorization": f"Bearer {INTAKE_TOKEN}"})
            if status == 202:
                self._took([uuid.UUID(one["id"]) for one in json.loads(body)["results"]])
                rows = rows[len(batch) :]
                pace.wait(len(batch))
            else:
                self.accepted.refusals += 1
                time.sleep(0.1)

    def _post_events(self, rng: random.Random, bodies: list[bytes], seconds: float) -> None:
        deadline = time.monotonic() + seconds + _PATIENCE_SECONDS
        pace = _Pace(rng, len(bodies), seconds)
        url = f"{self._rig.web}/webhooks/futwork"
        for body in bodies:
            digest = hashlib.sha256(body).hexdigest()
            self.accepted.offered.add(digest)
            while _post(url, body, {"x-api-key": WEBHOOK_TOKEN})[0] != 200:
                with self.accepted.lock:
                    self.accepted.refusals += 1
                    self.accepted.events_refused += 1
                if time.monotonic() > deadline:
                    self.accepted.given_up.append("an event")
                    return
                time.sleep(0.1)
            with self.accepted.lock:
                self.accepted.events.add(digest)
            pace.wait(1)

    def _took(self, ids: list[uuid.UUID]) -> None:
        with self.accepted.lock:
            self.accepted.leads.update(ids)


class _Pace:
    """Spreads a client's requests over its time, unevenly."""

    def __init__(self, rng: random.Random, count: int, seconds: float) -> None:
        self._rng = rng
        self._each = seconds / max(1, count)

    def wait(self, done: int) -> None:
        time.sleep(self._each * done * self._rng.uniform(0, 2))


def _post(url: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """The answer's status and body; 0 if none came."""
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=15) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(OSError, http.client.HTTPException):  # its server may die while it answers
            return error.code, error.read()
        return error.code, b""
    except (OSError, http.client.HTTPException):
        return 0, b""
