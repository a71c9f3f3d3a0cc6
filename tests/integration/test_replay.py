"""The quarantine, replayed: what a fix makes readable is taken in once, and the rest stays."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.broker import Kind, decode_events, encode_events, lead_batch
from pipeline.broker.spool import Spool
from pipeline.domain.lead import lead_id
from pipeline.events import Events
from pipeline.intake import Intake
from pipeline.ledger import Ledger
from pipeline.replay import Replayed, replay_all
from pipeline.settings import Settings
from pipeline.worker.dead_letters import quarantine_or_spool
from tests.conftest import CAMPAIGN, NOW, make_lead
from tests.integration.test_events import make_event


def waiting(ledger: Ledger) -> list[str]:
    return sorted(one.kind for one in ledger.quarantine.waiting())


@pytest.fixture
def put(ledger: Ledger) -> Callable[[str, Any], None]:
    """Puts something into quarantine as the pipeline does."""

    def put(kind: str, body: Any) -> None:
        ledger.quarantine.put(kind, json.dumps(body).encode(), reason="it failed", now=NOW)

    return put


def test_messages_and_rows_that_can_be_read_now_are_taken_in_once(
    ledger: Ledger, make_settings: Callable[..., Settings], put: Callable[[str, Any], None]
) -> None:
    leads = [{"phone": f"98000000{number:02}", "data": {}} for number in range(3)]
    Intake(ledger, make_settings(default_region="US"), wake=lambda _: None).take_in(
        lead_batch(CAMPAIGN, [*leads, {"phone": "12", "data": {}}], batch_id=uuid.uuid4())
    )
    assert waiting(ledger) == ["lead"] * 4
    put(
        "batch",
        [
            [
                lead_batch(
                    CAMPAIGN, [{"phone": "9800000009", "data": {}}, {"phone": "3", "data": {}}], batch_id=uuid.uuid4()
                )
            ],
            {},
        ],
    )
    put("batch", [[encode_events([make_event(callSid="late")])], {}])
    put("batch", [["neither"], {}])
    put("batch", [[{"leads": []}], {"more": 1}])
    put("message", {"task": "nobody's"})

    done = replay_all(ledger, make_settings())

    assert done == Replayed(events=0, calls=0, quarantined=0, rows=5, rows_kept=2, messages=4, messages_kept=2)
    assert waiting(ledger) == ["batch", "batch", "lead", "lead", "message"]
    status = ledger.reports.status(now=NOW)
    assert (status["accepted"], status["leads"]["queued"], status["calls"]["total"]) == (4, 4, 1)
    again = replay_all(ledger, make_settings())
    assert (again.rows, again.rows_kept, again.messages, again.messages_kept) == (2, 2, 2, 2)
    assert ledger.reports.status(now=NOW)["accepted"] == 4


@pytest.mark.parametrize(("kind", "kept"), [("batch", Replayed(messages=1)), ("message", Replayed())])
def test_what_came_through_the_spool_is_in_quarantine_as_what_it_is(
    ledger: Ledger, make_settings: Callable[..., Settings], kind: Kind, kept: Replayed
) -> None:
    """A batch whose processes died while the ledger was away: a replay takes its leads in."""
    settings, away = make_settings(), make_settings(database_url="postgresql://nobody@127.0.0.1:1/x")
    lead = make_lead(1)
    rows = [{"phone": lead.phone, "data": lead.data, "key": lead.key}]
    body = json.dumps([[lead_batch(CAMPAIGN, rows, batch_id=uuid.uuid4())], {}]).encode()
    assert quarantine_or_spool(away, kind, body, reason="it ended: its worker died")
    spool = Spool(settings.spool_dir, max_bytes=10**8)
    assert spool.drain(lambda message: bool(Events(ledger, settings).take_in(decode_events(message)))) == 1
    (found,) = ledger.quarantine.waiting()
    assert (found.kind, found.reason, found.body) == (kind, "it ended: its worker died", body)
    assert replay_all(ledger, settings) == kept
    story = ledger.reports.story(lead_id(CAMPAIGN, lead.key))
    assert (story is not None, waiting(ledger)) == ((True, []) if kind == "batch" else (False, ["message"]))


def test_who_keeps_aside_learns_that_nothing_took_it(make_settings: Callable[..., Settings]) -> None:
    away = make_settings(database_url="postgresql://nobody@127.0.0.1:1/x", spool_max_bytes=1)
    assert not quarantine_or_spool(away, "message", b"a body", reason="malformed envelope")
