"""The web app over Flask's test client: answers, tokens and bounds; the broker is away, or a recorder in its place."""

from __future__ import annotations

import gzip
import json
import uuid
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from pipeline import wiring
from pipeline.broker import BrokerUnavailable, decode_events
from pipeline.domain.lead import Lead, lead_id
from pipeline.ledger import Ledger
from pipeline.settings import Settings
from pipeline.web.app import create_app
from tests.conftest import CAMPAIGN

TOKEN = "webhook-token"
EVENT = b'{"callSid": "3f19eab8", "status": "ringing"}'
AWAY = "redis://127.0.0.1:9/0"
NO_DATABASE = "postgresql://nobody:secret@127.0.0.1:9/nothing"


class Recorder:
    """Stands where the broker does, and keeps what is published; away if told so."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Any]] = []
        self.away = False
        self.fault: Exception | None = None

    def publish(self, task: str, payload: object, **_: object) -> None:
        self.ping()
        self.messages.append((task, orjson.loads(orjson.dumps(payload))))

    def ping(self) -> None:
        if self.fault is not None:
            raise self.fault
        if self.away:
            raise BrokerUnavailable("the broker took no message: it is away")

    def depths(self) -> dict[str, int]:
        self.ping()
        return {"intake": len(self.messages)}

    def events(self) -> list[Any]:
        return [one for task, message in self.messages if task == "pipeline.events" for one in decode_events(message)]


@pytest.fixture
def broker() -> Recorder:
    return Recorder()


@pytest.fixture
def make_client(
    make_settings: Callable[..., Settings], broker: Recorder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., FlaskClient]]:
    """A client of the app with these settings; nothing of it reaches a broker, and no database is there."""

    def make(**overrides: Any) -> FlaskClient:
        values = {"broker_url": AWAY, "webhook_token": TOKEN, "database_url": NO_DATABASE} | overrides
        settings = make_settings(**values)
        mine = wiring.services(settings)
        mine.__dict__["broker"] = broker
        return create_app(settings).test_client()

    wiring.close_services()
    yield make
    wiring.close_services()


def spooled(tmp_path: Path) -> list[bytes]:
    """The bodies of the events in the spool, oldest first."""
    files = sorted((tmp_path / "spool").glob("*.events"))
    messages = [orjson.loads(file.read_bytes().partition(b"\n")[2]) for file in files]
    return [event.body for message in messages for event in decode_events(message)]


# The webhook


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/webhooks/futwork", {"x-api-key": TOKEN}),
        ("/webhooks/futwork", {"X-Webhook-Secret": TOKEN}),
        (f"/webhooks/futwork/{TOKEN}", {}),
        ("/webhooks/futwork/", {"x-api-key": TOKEN}),
    ],
)
def test_an_event_with_the_token_is_handed_over_and_answered_200(make_client, broker, path, headers):
    before = datetime.now(UTC)

    answer = make_client().post(path, data=EVENT, headers=headers)

    assert (answer.status_code, answer.json) == (200, {"event": "accepted"})
    (event,) = broker.events()
    assert (event.body, event.fault) == (EVENT, None)
    assert before <= event.received_at <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/webhooks/futwork", {}),
        ("/webhooks/futwork", {"x-api-key": ""}),
        ("/webhooks/futwork", {"x-api-key": "wrong"}),
        ("/webhooks/futwork", {"x-api-key": TOKEN[:-1]}),
        ("/webhooks/futwork", {"x-api-key": "тёкен".encode().decode("latin-1")}),
        ("/webhooks/futwork", {"authorization": f"Bearer {TOKEN}"}),
        ("/webhooks/futwork/wrong", {}),
        ("/webhooks/futwork/%00%ff", {}),
        (f"/webhooks/futwork?token={TOKEN}", {}),
    ],
)
def test_an_event_without_the_token_is_401_and_kept_nowhere(make_client, broker, tmp_path, path, headers):
    answer = make_client().post(path, data=EVENT, headers=headers)

    assert (answer.status_code, answer.json) == (401, {"error": "the webhook token is missing or wrong"})
    assert broker.messages == []
    assert spooled(tmp_path) == []


def test_without_a_configured_token_nothing_is_let_in(make_client, broker):
    client = make_client(webhook_token="")

    assert client.post("/webhooks/futwork", data=EVENT, headers={"x-api-key": ""}).status_code == 401
    assert broker.messages == []


def test_each_of_several_tokens_is_good(make_client, broker):
    client = make_client(webhook_token="old,new")

    found = [client.post(f"/webhooks/futwork/{token}", data=EVENT).status_code for token in ("old", "new", "old,new")]

    assert found == [200, 200, 401]
    assert len(broker.events()) == 2


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"", "the body is not JSON"),
        (b"callSid=1", "the body is not JSON"),
        (b'{"callSid": ', "the body is not JSON"),
        (b"\xff\xfe\x00", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b'[{"callSid": "1"}]', "the body is not a JSON object"),
        (b'"text"', "the body is not a JSON object"),
        (b"null", "the body is not a JSON object"),
    ],
)
def test_what_is_no_event_is_400_and_kept_whole_with_its_fault(make_client, broker, body, fault):
    answer = make_client().post(f"/webhooks/futwork/{TOKEN}", data=body)

    assert (answer.status_code, answer.json) == (400, {"error": fault})
    assert [(event.body, event.fault) for event in broker.events()] == [(body, fault)]


@pytest.mark.parametrize(
    "body",
    [
        b'{"duration": NaN}',
        b'{"name": "\\ud800"}',
        b'{"n": 123456789012345678901234567890}',
        b'{"transcript": "agent: Hello\nuser: Yes\tplease"}',
        b'\xef\xbb\xbf{"status": "ringing"}',
    ],
)
def test_an_object_that_only_some_readers_take_is_an_event(make_client, broker, body):
    assert make_client().post(f"/webhooks/futwork/{TOKEN}", data=body).status_code == 200
    assert [event.body for event in broker.events()] == [body]


def test_the_content_type_of_an_event_is_not_looked_at(make_client, broker):
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"):
        answer = make_client().post(f"/webhooks/futwork/{TOKEN}", data=EVENT, content_type=kind)
        assert answer.status_code == 200

    assert [event.body for event in broker.events()] == [EVENT] * 3


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)])
def test_an_event_may_have_as_many_bytes_as_the_setting_says(make_client, broker, size, status):
    body = b'{"a": "' + b"x" * (size - 9) + b'"}'
    assert len(body) == size

    answer = make_client(webhook_max_bytes=1000).post(f"/webhooks/futwork/{TOKEN}", data=body)

    assert answer.status_code == status
    assert len(broker.events()) == (status == 200)


def _raw_deflate(data: bytes) -> bytes:
    packing = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packing.compress(data) + packing.flush()


PACKED = [
    ("gzip", gzip.compress(EVENT, mtime=0)),
    ("x-gzip", gzip.compress(EVENT, mtime=0)),
    ("GZIP ", gzip.compress(EVENT, mtime=0)),
    ("deflate", zlib.compress(EVENT)),
    ("deflate", _raw_deflate(EVENT)),
    ("identity", EVENT),
    ("", EVENT),
    ("gzip, gzip", gzip.compress(gzip.compress(EVENT, mtime=0), mtime=0)),
    ("deflate, gzip", gzip.compress(zlib.compress(EVENT), mtime=0)),
    ("gzip", EVENT),  # a relay unpacked it and left the header
    ("br", EVENT),
]


@pytest.mark.parametrize(("encoding", "body"), PACKED)
def test_a_packed_event_is_handed_over_unpacked(make_client, broker, encoding, body):
    answer = make_client().post(
        f"/webhooks/futwork/{TOKEN}", data=body, headers={"Content-Encoding": encoding} if encoding else {}
    )

    assert answer.status_code == 200
    assert [(event.body, event.fault) for event in broker.events()] == [(EVENT, None)]


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzip.compress(EVENT, mtime=0)[:-9], 400),
        ("gzip", b"\x1f\x8b no gzip", 400),
        ("deflate", b"", 400),
        ("br", b"\x0b\x02\x80", 415),
        ("gzip, zstd", gzip.compress(EVENT, mtime=0), 415),
    ],
)
def test_an_event_that_cannot_be_unpacked_is_kept_packed_with_its_fault(make_client, broker, encoding, body, status):
    answer = make_client().post(f"/webhooks/futwork/{TOKEN}", data=body, headers={"Content-Encoding": encoding})

    assert answer.status_code == status
    assert [(event.body, event.fault) for event in broker.events()] == [(body, answer.json["error"])]


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)])
def test_a_packed_event_may_have_as_many_bytes_unpacked_as_one_that_is_not_packed(make_client, broker, size, status):
    body = gzip.compress(b'{"a": "' + b"x" * (size - 9) + b'"}')

    answer = make_client(webhook_max_bytes=1000).post(
        f"/webhooks/futwork/{TOKEN}", data=body, headers={"Content-Encoding": "gzip"}
    )

    assert answer.status_code == status
    assert len(broker.events()) == (status == 200)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
def test_only_post_is_allowed_on_the_webhook(make_client, method):
    answer = make_client().open(f"/webhooks/futwork/{TOKEN}", method=method)

    assert answer.status_code == 405
    assert "POST" in answer.headers["Allow"]
    assert method == "HEAD" or "POST /webhooks/futwork" in answer.json["paths"]


def test_with_the_broker_away_an_event_is_on_disk_when_it_is_answered_200(make_client, broker, tmp_path):
    broker.away = True

    answer = make_client().post(f"/webhooks/futwork/{TOKEN}", data=EVENT)

    assert answer.status_code == 200
    assert spooled(tmp_path) == [EVENT]


def test_with_broker_and_disk_away_an_event_is_503(make_client, broker, tmp_path):
    broker.away = True
    (tmp_path / "spool").write_text("a file where the folder should be")

    answer = make_client().post(f"/webhooks/futwork/{TOKEN}", data=EVENT)

    assert (answer.status_code, answer.json) == (503, {"error": "the event could not be kept; send it again"})


def test_a_fault_that_nobody_foresaw_does_not_cost_the_event(make_client, broker, tmp_path):
    broker.fault = RuntimeError("a fault in the broker's library")

    answer = make_client().post(f"/webhooks/futwork/{TOKEN}", data=EVENT)

    assert answer.status_code == 200
    assert spooled(tmp_path) == [EVENT]


# The intake

LEADS = f"/v1/campaigns/{CAMPAIGN}/leads"
GOOD = {"phone": "99997 89877", "data": {"customer_name": "Asha"}}
BAD = {"phone": "12", "data": {}}
BAD_REASON = "phone: the phone number has too few digits for region IN"
BEARER = {"Authorization": "Bearer t1"}
GOOD_ID = str(lead_id(CAMPAIGN, "+919999789877"))


@pytest.fixture
def client(make_client: Callable[..., FlaskClient]) -> FlaskClient:
    return make_client(intake_tokens=f"t1,t2:{CAMPAIGN},t3:other")


def test_one_lead_is_202_with_its_id_and_published_in_its_form(client, broker):
    answer = client.post(LEADS, json=GOOD, headers=BEARER)

    assert answer.status_code == 202
    assert answer.json == {
        "campaign_id": CAMPAIGN,
        "accepted": 1,
        "refused": 0,
        "results": [{"index": 0, "id": GOOD_ID}],
    }
    ((task, message),) = broker.messages
    assert (task, message["campaign_id"]) == ("pipeline.intake", CAMPAIGN)
    assert message["leads"] == [{"phone": "+919999789877", "data": {"customer_name": "Asha"}, "key": "+919999789877"}]
    assert uuid.UUID(message["batch"])


def test_an_array_has_a_result_for_each_row_in_order(client, broker):
    rows = [BAD, GOOD, "text", GOOD | {"key": "7"}, {"phone": "9999789877"}]

    answer = client.post(LEADS, json=rows, headers=BEARER)

    assert answer.status_code == 202
    assert (answer.json["accepted"], answer.json["refused"]) == (2, 3)
    assert answer.json["results"] == [
        {"index": 0, "error": BAD_REASON},
        {"index": 1, "id": GOOD_ID},
        {"index": 2, "error": "a lead must be an object, not text"},
        {"index": 3, "id": str(lead_id(CAMPAIGN, "7"))},
        {"index": 4, "error": "data: missing"},
    ]
    assert [len(message["leads"]) for _, message in broker.messages] == [2]


@pytest.mark.parametrize("kind", ["application/x-ndjson", "application/jsonl", "application/x-jsonlines"])
def test_ndjson_is_read_line_by_line_and_a_line_that_is_no_json_is_refused_alone(client, broker, kind):
    body = f"\ufeff{json.dumps(GOOD)}\r\n\n{{broken\n{json.dumps(BAD)}"

    answer = client.post(LEADS, data=body.encode(), content_type=f"{kind}; charset=utf-8", headers=BEARER)

    assert answer.status_code == 202
    first, second, third = answer.json["results"]
    assert first == {"index": 0, "id": GOOD_ID}
    assert second["error"].startswith("not JSON: ")
    assert third == {"index": 2, "error": BAD_REASON}


def test_many_rows_travel_in_batches_bounded_in_rows_and_in_bytes(client, broker):
    small = [GOOD | {"key": str(i)} for i in range(1200)]
    large = [GOOD | {"key": str(i), "data": {"x": "x" * 30_000}} for i in range(300)]

    assert client.post(LEADS, json=small, headers=BEARER).json["accepted"] == 1200
    assert [len(message["leads"]) for _, message in broker.messages] == [500, 500, 200]

    broker.messages.clear()
    assert client.post(LEADS, json=large, headers=BEARER).json["accepted"] == 300
    assert sum(len(message["leads"]) for _, message in broker.messages) == 300
    assert max(len(orjson.dumps(message)) for _, message in broker.messages) < 5 * 1024 * 1024


@pytest.mark.parametrize(
    ("body", "kind"), [(b"[" + b"7," * 50_000 + b"7]", "application/json"), (b"{}\n" * 50_001, "application/x-ndjson")]
)
def test_a_request_of_more_rows_than_can_be_answered_is_413(client, broker, body, kind):
    answer = client.post(LEADS, data=body, content_type=kind, headers=BEARER)

    assert (answer.status_code, answer.json) == (413, {"error": "a request may have 50,000 rows; send several"})
    assert broker.messages == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic t1"}, 401),
        ({"Authorization": "t1"}, 401),
        ({"Authorization": f"Bearer t2:{CAMPAIGN}"}, 401),
        ({"Authorization": "Bearer t3"}, 403),
        ({"Authorization": "Bearer t2"}, 202),
        ({"Authorization": "bearer  t1 "}, 202),
    ],
)
def test_a_token_is_asked_for_and_its_campaign_is_held_to(client, broker, headers, status):
    answer = client.post(LEADS, json=GOOD, headers=headers)

    assert answer.status_code == status
    assert len(broker.messages) == (status == 202)
    assert ("error" in answer.json) == (status != 202)
    assert answer.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)


@pytest.mark.parametrize(
    ("path", "body", "kind", "status"),
    [
        (LEADS, json.dumps(GOOD), "text/plain", 415),
        (LEADS, json.dumps(GOOD), "application/x-www-form-urlencoded", 415),
        (LEADS, json.dumps(GOOD), None, 415),
        (LEADS, "{", "application/json", 422),
        (LEADS, '{"phone": NaN, "data": {}}', "application/json", 422),
        (LEADS, "", "application/json", 422),
        (LEADS, "[]", "application/json", 422),
        (LEADS, "7", "application/json", 422),
        (LEADS, json.dumps(BAD), "application/json", 422),
        (LEADS, "\n\n", "application/x-ndjson", 422),
        ("/v1/campaigns/a%20b/leads", json.dumps(GOOD), "application/json", 422),
        (f"/v1/campaigns/{'x' * 65}/leads", json.dumps(GOOD), "application/json", 422),
        (LEADS, json.dumps(GOOD | {"data": {"x": "x" * 3000}}), "application/json", 413),
    ],
)
def test_a_request_of_which_nothing_can_be_taken_says_why(make_client, broker, path, body, kind, status):
    client = make_client(intake_tokens="t1", intake_max_bytes=2000)

    answer = client.post(path, data=body, content_type=kind, headers=BEARER)

    assert answer.status_code == status
    assert answer.json["error"]
    assert broker.messages == []


def test_a_refused_request_still_tells_each_rows_reason(client):
    answer = client.post(LEADS, json=[BAD, BAD], headers=BEARER)

    assert answer.status_code == 422
    assert answer.json["results"] == [{"index": 0, "error": BAD_REASON}, {"index": 1, "error": BAD_REASON}]


def test_with_the_broker_away_leads_are_503_and_when_to_ask_again(client, broker, tmp_path):
    broker.away = True

    answer = client.post(LEADS, json=GOOD, headers=BEARER)

    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "5"
    assert "results" not in answer.json
    assert spooled(tmp_path) == []


# Looking at a lead


def test_a_lead_is_told_to_its_campaigns_tokens_alone(make_client, tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(url)
    ledger.migrate()
    _take_in(ledger)
    client = make_client(database_url=url, intake_tokens=f"t1,t2:{CAMPAIGN},t3:other")

    found = {n: client.get(f"/v1/leads/{GOOD_ID}", headers={"Authorization": f"Bearer t{n}"}) for n in "1239"}

    assert {n: answer.status_code for n, answer in found.items()} == {"1": 200, "2": 200, "3": 404, "9": 401}
    story = found["2"].json
    assert (story["id"], story["state"], story["data"]) == (GOOD_ID, "queued", GOOD["data"])
    assert (story["attempts_made"], story["calls"], story["events"]) == ([], [], [])
    ledger.close()


def _take_in(ledger: Ledger) -> None:
    now = datetime.now(UTC)
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=now)
    lead = Lead.read(GOOD, region="IN")
    ledger.leads.take_in(campaign, [lead], batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=now)


@pytest.mark.parametrize("wanted", ["nonsense", "00000000-0000-0000-0000-000000000000"])
def test_a_lead_that_is_not_there_is_404(make_client, tmp_path, wanted):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(url)
    ledger.migrate()
    ledger.close()

    answer = make_client(database_url=url, intake_tokens="t1").get(f"/v1/leads/{wanted}", headers=BEARER)

    assert answer.status_code == 404
    assert answer.json["error"]


@pytest.fixture(params=["no server", "no tables", "no database", "no folder"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that cannot be used, in the ways that databases are so."""
    if request.param == "no server":
        return NO_DATABASE
    (tmp_path / "text.db").write_text("this is no database " * 100)
    names = {"no tables": "empty.db", "no database": "text.db", "no folder": "text.db/below.db"}
    return f"sqlite:///{tmp_path / names[request.param]}"


def test_with_the_ledger_unusable_only_what_reads_it_fails(make_client, broker, unusable):
    client = make_client(database_url=unusable, intake_tokens="t1")

    assert client.get("/healthz").status_code == 200
    assert client.post(f"/webhooks/futwork/{TOKEN}", data=EVENT).status_code == 200
    assert client.post(LEADS, json=GOOD, headers=BEARER).status_code == 202
    assert client.get(f"/v1/leads/{GOOD_ID}", headers=BEARER).status_code == 503
    assert client.get("/v1/calls", headers=BEARER).status_code == 503
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json["broker"], ready.json["status"]) == (503, "ok", "not ready")
    assert ready.json["ledger"] != "ok"
    assert "secret" not in ready.text
    assert _metrics(client)["pipeline_ledger_up", ()] == 0


def test_readyz_names_what_is_away(make_client, broker, tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(url)
    ledger.migrate()
    ledger.close()
    client = make_client(database_url=url)

    assert (client.get("/readyz").status_code, client.get("/readyz").json) == (
        200,
        {"status": "ok", "broker": "ok", "ledger": "ok"},
    )
    broker.away = True
    assert (client.get("/readyz").status_code, client.get("/readyz").json) == (
        503,
        {"status": "not ready", "broker": "away", "ledger": "ok"},
    )


# Metrics


def _metrics(client: FlaskClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_answers_and_rows_and_tell_the_ledgers_state(make_client, broker, tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    ledger = Ledger(url)
    ledger.migrate()
    _take_in(ledger)
    client = make_client(database_url=url, intake_tokens="t1")
    before = _metrics(client)

    for _ in range(3):
        client.post(f"/webhooks/futwork/{TOKEN}", data=EVENT)
    client.post("/webhooks/futwork", data=EVENT)
    client.post(LEADS, json=[GOOD, GOOD, BAD], headers=BEARER)
    after = _metrics(client)

    def grown(name: str, **labels: str) -> float:
        sample = (name, tuple(sorted(labels.items())))
        return after[sample] - before.get(sample, 0)

    assert grown("pipeline_webhook_answers_total", status="200") == 3
    assert grown("pipeline_webhook_answers_total", status="401") == 1
    assert grown("pipeline_webhook_handoff_seconds_count") == 3
    assert grown("pipeline_intake_rows_total", result="accepted") == 2
    assert grown("pipeline_intake_rows_total", result="refused") == 1
    assert after["pipeline_leads", (("campaign", CAMPAIGN), ("state", "queued"))] == 1
    assert after["pipeline_leads", (("campaign", CAMPAIGN), ("state", "called"))] == 0
    assert (after["pipeline_leads_accepted_total", ()], after["pipeline_ledger_up", ()]) == (1, 1)
    assert (after["pipeline_broker_up", ()], after["pipeline_spool_files", ()]) == (1, 0)
    ledger.close()


def test_metrics_say_that_the_broker_is_away_and_how_much_is_spooled(make_client, broker):
    client = make_client()
    broker.away = True
    client.post(f"/webhooks/futwork/{TOKEN}", data=EVENT)

    found = _metrics(client)

    assert (found["pipeline_broker_up", ()], found["pipeline_spool_files", ()]) == (0, 1)
    assert found["pipeline_spool_bytes", ()] > len(EVENT)


# Whatever is asked


@pytest.mark.parametrize("path", ["/webhooks", "/webhooks/other", "/v1/campaigns", "/v1/leads/", "/favicon.ico"])
def test_what_is_not_there_is_404_as_json(make_client, path):
    answer = make_client().get(path)

    assert (answer.status_code, answer.mimetype) == (404, "application/json")
    assert answer.json["error"]
    assert "POST /webhooks/futwork" in answer.json["paths"]


def test_the_root_says_what_exists_and_leads_a_browser_to_the_pages(make_client):
    plain = make_client().get("/", headers={"Accept": "text/html"})
    assert (plain.status_code, plain.json["service"]) == (200, "futwork-lead-pipeline")
    assert {"GET /healthz", "POST /webhooks/futwork", "POST /v1/campaigns/{campaign_id}/leads"} <= set(
        plain.json["paths"]
    )

    user = f"ana:scrypt.16384.8.1.abcdefgh.{'0' * 128}"
    with_pages = make_client(ops_users=user, ops_secret="s" * 40)
    led = with_pages.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert (led.status_code, led.headers["Location"]) == (302, "/ops")
    assert with_pages.get("/", headers={"Accept": "application/json"}).json["version"]


def test_a_fault_of_ours_is_500_as_json_without_its_text(make_client, broker):
    client = make_client(intake_tokens="t1")
    broker.fault = RuntimeError("with a secret")

    answer = client.post(LEADS, json=GOOD, headers=BEARER)

    assert (answer.status_code, answer.json) == (500, {"error": "internal error; see the log of the web process"})
