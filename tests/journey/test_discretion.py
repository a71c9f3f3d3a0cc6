"""One rough journey of real processes at their most talkative: nothing that they print gives anybody away."""

from __future__ import annotations

import contextlib
import http.client
import json
import pickle
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from pipeline.broker import lead_batch
from pipeline.devstack.embedded_valkey import free_port
from pipeline.ledger import Ledger
from tests.conftest import CAMPAIGN
from tests.journey.conftest import push_raw, task_headers
from tests.journey.fleet import Fleet, Process
from tests.waiting import patience, until

KEY, WRONG_KEY = "key-0f-the-real-account", "key-that-was-revoked-long-ago"
HOOK, TOKEN, LIMITED = "hook-t0ken-in-a-path", "intake-t0ken-for-all", "intake-t0ken-for-one"
PASSWORD = "p4ssword-of-a-database"
SECRETS = (KEY, WRONG_KEY, HOOK, TOKEN, LIMITED, PASSWORD)
WORDS = ("quokka", "zanzibar", "marmalade", "Tiruchirappalli")  # of transcripts, names and data
OTHER = "68ecc86fd9fbecbe94310000"
REFUSED_BY_THE_TABLE = 9_800_707_007


ONE_AFTER_THE_OTHER = """
import json, sys
from pipeline.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["pipeline", *command]
    try:
        main()
    except SystemExit as ended:
        print(command, "ended with", ended.code, flush=True)
"""


def phone(number: int) -> str:
    return str(9_800_700_000 + number)


def lead(number: int, **more: Any) -> dict[str, Any]:
    return {"phone": phone(number), "data": {"customer_name": f"{WORDS[3]} {number}", "note": WORDS[0]}} | more


def event(number: int, **more: Any) -> dict[str, Any]:
    spaced = f"+91 {phone(number)[:5]} {phone(number)[5:]}"
    says = f"agent: is this {phone(number)}?\nuser: {WORDS[0]} {WORDS[1]}, call {spaced}"
    told = {
        "callSid": f"call-{number}",
        "campaignId": CAMPAIGN,
        "status": "completed",
        "transcript": says,
        "contextDetails": {"recipientPhoneNumber": f"+91{phone(number)}", "recipientData": {"name": WORDS[3]}},
        "telephonyData": {"toNumber": f"0{phone(number)}", "duration": "31.5"},
        "extractedData": {"call_summary": WORDS[2]},
    }
    return told | more


def given_away(text: str) -> list[str]:
    """Every number in any spelling, every secret and every word that the text holds, with what stands around it."""
    numbers = r"(?:9[ -]?8[ -]?0[ -]?0[ -]?7[ -]?0[ -]?[0-9](?:[ -]?[0-9]){3})"
    wanted = re.compile("|".join([numbers, *map(re.escape, (*SECRETS, *WORDS))]), re.IGNORECASE)
    return [text[max(0, one.start() - 200) : one.end() + 40] for one in wanted.finditer(text)]


@pytest.fixture
def fleet(make_fleet: Callable[..., Fleet], postgres_ledger: Ledger) -> Iterator[Fleet]:
    """On PostgreSQL, which quotes the rows that it refuses; the ledger refuses one number, and any call of one name."""
    url = postgres_ledger.database.url.render_as_string(hide_password=False)
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text(f"ALTER TABLE leads ADD CHECK (phone <> '+91{REFUSED_BY_THE_TABLE}')"))
        connection.execute(sa.text("ALTER TABLE calls ADD CHECK (disposition <> 'refused')"))
    yield make_fleet(database_url=url)
    with postgres_ledger.database.write() as connection:
        connection.execute(sa.text("ALTER TABLE leads DROP CONSTRAINT leads_phone_check"))
        connection.execute(sa.text("ALTER TABLE calls DROP CONSTRAINT calls_disposition_check"))


class Web:
    """The web server, spoken to as clients do."""

    def __init__(self, fleet: Fleet, **settings: object) -> None:
        self.port = free_port()
        arguments = ["-m", "pipeline.web", "--access-log", "--host", "127.0.0.1", "--port", str(self.port)]
        self.process: Process = fleet.start(arguments, name="web", **settings)
        until(lambda: self.ask("GET", "/healthz") == 200, what=lambda: self.process.log)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> int:
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        names = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        with (
            contextlib.suppress(OSError),
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience())) as connection,
        ):
            connection.request(method, path, sent, names)
            return connection.getresponse().status
        return 0


def test_no_output_of_any_process_holds_a_number_a_secret_or_a_word(fleet: Fleet, tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "futwork_api_key": KEY, "futwork_api_keys": f"north={WRONG_KEY}", "webhook_token": HOOK, "log_level": "debug",
        "intake_tokens": f"{TOKEN},{LIMITED}:{OTHER}", "read_timeout_seconds": 2, "backoff_cap_seconds": 1,
        "probe_first_seconds": 1, "default_region": "IN",
    }  # fmt: skip
    sandbox = fleet.sandbox("--seed", "7", "--faults", "wild", "--api-key", KEY)
    settings["futwork_base_url"] = sandbox.url
    fleet.ledger.campaigns.ensure(OTHER, now=_now())
    fleet.ledger.campaigns.change(OTHER, {"account": "north"}, now=_now())
    worker = fleet.worker("--loglevel", "debug", **settings)
    fleet.celery("beat", "--loglevel", "debug", "--pidfile", "", **settings)
    web = Web(fleet, **settings)
    port = free_port()
    wrong = fleet.start(  # a database whose server is away, and whose password is in its URL
        ["-m", "pipeline.web", "--host", "127.0.0.1", "--port", str(port)],
        name="web-without", **settings | {"database_url": f"postgresql://me:{PASSWORD}@127.0.0.1:9/none"},
    )  # fmt: skip

    # Leads, good and bad, by every way in.
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    leads = f"/v1/campaigns/{CAMPAIGN}/leads"
    rows = [lead(number) for number in range(60)]
    assert (
        web.ask(
            "POST",
            leads,
            [*rows, lead(61, phone=f"{phone(61)}99"), lead(62, key="k" * 300), lead(63, x=phone(63))],
            **bearer,
        )
        == 202
    )
    assert (
        web.ask(
            "POST",
            f"/v1/campaigns/{OTHER}/leads",
            [lead(number) for number in range(100, 110)],
            Authorization=f"Bearer {LIMITED}",
        )
        == 202
    )
    assert web.ask("POST", leads, lead(64), Authorization=f"Bearer {LIMITED}") == 403
    assert web.ask("POST", leads, f'{{"phone": "{phone(65)}", '.encode(), **bearer) == 422
    assert web.ask("POST", leads, b"[" * 90_000, **bearer) == 422
    assert web.ask("GET", f"/v1/leads/{phone(66)}", **bearer) == 404
    fleet.broker.publish(
        "pipeline.intake",
        lead_batch(CAMPAIGN, [lead(70), lead(0, phone=str(REFUSED_BY_THE_TABLE))], batch_id=_id()),
        about="(2)",
    )
    foreign = Celery(broker=fleet.broker_url)
    foreign.send_task(
        "pipeline.intake",
        args=[{"campaign_id": CAMPAIGN, "leads": [lead(71), lead(72, phone=f"1{phone(72)}")]}],
        queue="intake",
    )
    foreign.send_task("pipeline.intake", args=[lead(73), lead(74)], kwargs={phone(75): WORDS[0]}, queue="intake")
    foreign.send_task("pipeline.unknown", args=[lead(76)], queue="intake")
    foreign.send_task(
        "pipeline.events",
        args=[{"events": [{"body": json.dumps(event(77)), "received_at": phone(77)}]}],
        queue="events",
    )
    foreign.close()
    push_raw(fleet, json.dumps(lead(78)), headers=task_headers())
    push_raw(
        fleet,
        pickle.dumps([[lead(79)], {}, {}]),
        headers=task_headers(),
        content_type="application/x-python-serialize",
        content_encoding="binary",
    )
    push_raw(fleet, f"{phone(80)} {WORDS[0]}")

    # Events, with the token in every place and with wrong ones, readable and not.
    assert web.ask("POST", f"/webhooks/futwork/{HOOK}", event(200)) == 200
    assert web.ask("POST", f"//webhooks//futwork/{HOOK}", event(201)) in (200, 308, 404)
    assert web.ask("POST", f"/webhooks/futwork/{HOOK}/?token={HOOK}", event(202)) in (200, 308)
    assert web.ask("POST", "/webhooks/futwork", event(203, disposition="refused"), x_api_key=HOOK) == 200
    assert web.ask("POST", "/webhooks/futwork", event(204, callSid=""), x_webhook_secret=HOOK) == 200
    assert web.ask("POST", f"/webhooks/futwork/{HOOK}", f"[{phone(205)}".encode()) == 400
    assert web.ask("POST", "/webhooks/futwork", event(206), x_api_key=WRONG_KEY) == 401
    assert web.ask("DELETE", f"/webhooks/futwork/{HOOK}") == 405
    assert web.ask("GET", f"/webhooks/futwork/{HOOK}", x_api_key=HOOK) == 405
    until(lambda: _asked(port, f"/v1/leads/{_id()}", bearer), what=lambda: wrong.log)

    def settled() -> bool:
        status = fleet.status()
        states = {name for name, count in status["leads"].items() if count}
        waits = sum(fleet.broker.depths().values())
        return status["accepted"] >= 71 and not waits and status["events"]["quarantined"] >= 8 and "held" in {
            one["state"] for one in status["campaigns"]
        } and bool(states & {"called", "submitted", "uncertain"}) and status["leads"]["sending"] == 0  # fmt: skip

    until(settled, what=lambda: json.dumps(fleet.status(), default=str) + worker.log[-4000:])

    # What commands say beside the data that they were asked for, and what the objects say of themselves.
    (tmp_path / "leads.csv").write_text(f"phone,name\n12{phone(90)},{WORDS[3]}\n{phone(91)},x\n")
    commands = [
        ["doctor"], ["status"], ["status", "--json"], ["campaign", "list"], ["migrate"], ["events", "list"],
        ["enqueue", "leads.csv", "--campaign", CAMPAIGN], ["retry", "--state", "rejected"], ["events", "replay"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(commands)],
        cwd=tmp_path,
        env=fleet.environment(**settings),
        text=True,
        capture_output=True,
    )
    said = done.stdout + done.stderr
    for command in commands:
        assert f"{command} ended with " in said
    assert given_away(said) == []
    assert "Traceback" not in said
    logs = "\n".join(one.log for one in fleet._processes if "sandbox" not in one.log_file.name)
    assert len(logs) > 20_000, "they were asked to be talkative"
    assert "batch taken in" in logs
    assert given_away(logs) == []


def _asked(port: int, path: str, headers: dict[str, str]) -> bool:
    with (
        contextlib.suppress(OSError),
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=patience())) as connection,
    ):
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status == 503
    return False


def _now() -> Any:
    return datetime.now(UTC)


def _id() -> Any:
    return uuid.uuid4()
