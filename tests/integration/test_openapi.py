"""The OpenAPI document and the running app hold each other: nothing else is answered, and nothing breaks."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi
from schemathesis.specs.openapi import definitions

from pipeline import wiring
from pipeline.broker import WebEvent
from pipeline.domain.lead import Outcome, Retry, lead_id, settle
from pipeline.events import Events
from pipeline.ledger import Ledger
from pipeline.settings import Settings
from pipeline.web.app import create_app
from pipeline.web.openapi import describe
from tests.conftest import CAMPAIGN, make_answer, make_lead

WEBHOOK, INTAKE = "webhook-token", "intake-token"
PATHS = sorted(
    (method, path) for path, item in describe()["paths"].items() for method in item if method != "parameters"
)

# Not among the checks: that every row which fits the schema is taken. No schema says which numbers are real ones.
CHECKS = [
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.response_headers_conformance,
    openapi.negative_data_rejection,
    openapi.unsupported_method,
    openapi.ignored_auth,
]


@pytest.fixture
def app(make_settings: Callable[..., Settings], sqlite_ledger: Ledger, valkey: Any, valkey_url: str) -> Iterator[Flask]:
    """The app over a real broker and a real ledger."""
    wiring.close_services()
    made = make_settings(
        broker_url=valkey_url,
        database_url=sqlite_ledger.database.url.render_as_string(hide_password=False),
        webhook_token=WEBHOOK,
        intake_tokens=f"{INTAKE},limited:{CAMPAIGN}",
        intake_max_bytes=150_000,
        webhook_max_bytes=600_000,
    )
    wiring.services(made)
    yield create_app(made)
    wiring.close_services()


def test_the_document_is_an_openapi_document() -> None:
    definitions.OPENAPI_31_VALIDATOR.validate(describe())


def test_every_route_is_in_the_document_and_no_other(app: Flask) -> None:
    """The ops pages are HTML for people, and not part of the interface."""
    routed = {
        (method.lower(), str(rule).replace("<", "{").replace(">", "}").replace("{id_}", "{lead_id}"))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if not rule.endpoint.startswith("ops")
    }
    assert routed == set(PATHS)


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_whatever_is_sent_is_answered_as_described(app: Flask, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_wsgi("/openapi.json", app)
    operation = schema[path][method.upper()]
    tokens = {"Authorization": f"Bearer {INTAKE}", "x-api-key": WEBHOOK} if operation.definition.raw["security"] else {}

    def prove(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=tokens, checks=CHECKS)

    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
    if method == "post":
        strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    settings(
        max_examples=int(os.environ.get("OPENAPI_EXAMPLES", "40" if method == "post" else "10")),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )(given(case=strategy)(prove))()


_LEADS, _JSON = f"/v1/campaigns/{CAMPAIGN}/leads", "application/json"
_GOOD, _BAD = {"phone": "9999789877", "data": {"name": "Asha"}}, {"phone": "12", "data": {}}


@pytest.mark.parametrize(
    ("path", "body", "type_", "token", "status"),
    [
        (_LEADS, _GOOD, _JSON, INTAKE, 202),
        (_LEADS, [_GOOD, _BAD], _JSON, INTAKE, 202),
        (_LEADS, '{"phone": "9999789877", "data": {}}\nno', "application/x-ndjson", INTAKE, 202),
        (_LEADS, [_BAD], _JSON, INTAKE, 422),
        (_LEADS, "[" * 100_000, _JSON, INTAKE, 422),
        (_LEADS, {"phone": "9999789877", "data": {"a": [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]}}, _JSON, INTAKE, 422),
        ("/v1/campaigns/no%20id/leads", _GOOD, _JSON, INTAKE, 422),
        (_LEADS, "a,b", "text/csv", INTAKE, 415),
        (_LEADS, " " * 200_000, _JSON, INTAKE, 413),
        (_LEADS, _GOOD, _JSON, "wrong", 401),
        ("/v1/campaigns/another/leads", _GOOD, _JSON, "limited", 403),
        ("/webhooks/futwork", {"callSid": "s"}, _JSON, "", 200),
        ("/webhooks/futwork", '{"a":' * 100_000, _JSON, "", 400),
        ("/webhooks/futwork", '[{"callSid": "s"}]', _JSON, "", 400),
        ("/webhooks/futwork", " " * 700_000, _JSON, "", 413),
        (f"/webhooks/futwork/{WEBHOOK}", {"callSid": "s"}, "text/plain", "", 200),
    ],
)
def test_each_answer_that_is_described_is_given(
    app: Flask, path: str, body: Any, type_: str, token: str, status: int
) -> None:
    template = re.sub("campaigns/[^/]+", "campaigns/{campaign_id}", path).replace(WEBHOOK, "{token}")
    headers = {"Authorization": f"Bearer {token}"} if token else {"x-api-key": WEBHOOK}
    text = body if isinstance(body, str) else json.dumps(body)

    answer = app.test_client().post(path, data=text, content_type=type_, headers=headers)

    assert answer.status_code == status
    described = describe()["paths"][template]["post"]["responses"][str(status)]["content"][_JSON]["schema"]
    rooted = described | {"components": describe()["components"]}
    jsonschema_rs.Draft202012Validator(rooted).validate(answer.json)


def test_the_whole_story_of_a_lead_is_as_described(app: Flask, sqlite_ledger: Ledger, make_settings: Any) -> None:
    now = datetime.now(UTC)
    ledger, lead = sqlite_ledger, make_lead(1)
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=now)
    ledger.leads.take_in(campaign, [lead], batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=now)
    claims = ledger.leads.claim(CAMPAIGN, 1, lease=timedelta(minutes=1), now=now)
    answers = [make_answer(one, Outcome.ACCEPTED, http_status=200) for one in claims]
    retry = Retry(base=timedelta(1), cap=timedelta(1), max_attempts=3)
    settled = [settle(one, retry, now=now, jitter=None) for one in answers]  # type: ignore[arg-type]
    ledger.leads.record(campaign, settled, probe_after=timedelta(1), now=now)
    body = (
        b'{"callSid": "s", "campaignId": "%s", "status": "completed", "transcript": "agent: hello\\nuser: yes",'
        b' "contextDetails": {"recipientPhoneNumber": "%s"}, "telephonyData": {"duration": "12.5"}, "extractedData":'
        b' {"callback_date_time": "2026-05-09T10:00:00Z", "deep": [{"a": null}]}}'
    ) % (CAMPAIGN.encode(), lead.phone.encode())
    Events(ledger, make_settings()).take_in([WebEvent(body, now)])
    schema = schemathesis.openapi.from_wsgi("/openapi.json", app)
    operation = schema["/v1/leads/{lead_id}"]["GET"]
    case = operation.Case(path_parameters={"lead_id": str(lead_id(CAMPAIGN, lead.key))})

    answer = case.call_and_validate(headers={"Authorization": "Bearer limited"}, checks=CHECKS)

    story = answer.json()
    assert (story["state"], story["calls"][0]["details"]["turns"][1]["text"]) == ("called", "yes")


def test_no_token_of_one_campaign_opens_another(app: Flask, sqlite_ledger: Ledger) -> None:
    now, client, other = datetime.now(UTC), app.test_client(), "68ecc86fd9fbecbe94310000"
    campaign = sqlite_ledger.campaigns.ensure(other, now=now)
    sqlite_ledger.leads.take_in(campaign, [make_lead(1)], batch_id=uuid.uuid4(), max_age=timedelta(1), now=now)
    limited, free = {"Authorization": "Bearer limited"}, {"Authorization": f"Bearer {INTAKE}"}
    story = f"/v1/leads/{lead_id(other, make_lead(1).key)}"

    assert client.get(story, headers=free).status_code == 200
    assert client.get(story, headers=limited).status_code == 404
    assert client.get(story, headers=limited).json == client.get(f"/v1/leads/{uuid.uuid4()}", headers=limited).json
    handed = {"json": {"phone": "9999789877", "data": {}}, "headers": limited}
    assert client.post(f"/v1/campaigns/{other}/leads", **handed).status_code == 403
    assert client.post(f"/v1/campaigns/{CAMPAIGN}/leads", **handed).status_code == 202
    assert client.get(story, headers={"x-api-key": INTAKE}).status_code == 401


def test_every_answer_forbids_what_a_browser_might_do_with_it(app: Flask) -> None:
    client = app.test_client()
    for path in ("/healthz", "/openapi.json", "/metrics", "/nowhere", "/v1/leads/x"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff", path
        assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'", path
        assert headers["Cache-Control"] == "no-store", path
