"""What the module that speaks to Futwork makes of answers and failures; no wire here."""

import ssl
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import orjson
import pytest
import requests
import urllib3
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.domain.lead import Outcome
from pipeline.futwork import (
    EXCERPT_CHARACTERS,
    Futwork,
    excerpt_of,
    find_lead_id,
    judge,
    parse_retry_after,
)
from pipeline.futwork.with_requests import explain_failure
from pipeline.sandbox.answers import SHAPES, malformed_body, refusal_body, success_body
from tests.conftest import make_claim

NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)
quick = settings(max_examples=150, deadline=None)
ID = "68ecc93cd9fbecbe9431a2a1"


# Status → outcome


@pytest.mark.parametrize(
    ("outcome", "statuses"),
    [
        (Outcome.ACCEPTED, [200, 201, 202, 204, 206, 299]),
        (Outcome.THROTTLED, [429]),
        (Outcome.BUSY, [421, 425, 503, 509, 529]),
        (Outcome.FAILED, [500, 501, 505, 507, 511, 521, 522, 523, 530, 597]),
        (Outcome.UNCERTAIN, [408, 502, 504, 520, 524, 598, 599]),
        (Outcome.REFUSED_KEY, [401, 403]),
        (Outcome.REFUSED_CAMPAIGN, [404, 300, 301, 302, 303, 304, 307, 308, 399]),
        (Outcome.REJECTED, [400, 402, 405, 406, 409, 410, 411, 413, 414, 415, 418, 422, 423, 424, 426, 431, 451, 499]),
        (Outcome.UNCERTAIN, [100, 101, 199, 600, 777, 999]),
    ],
)
def test_a_status_becomes_the_outcome_of_its_row(outcome, statuses):
    assert dict.fromkeys(statuses, outcome) == {status: judge(status, b"")[0] for status in statuses}


def test_every_status_lands_in_one_outcome():
    outcomes = Counter(judge(status, b'{"message":"whatever"}')[0] for status in range(200, 600))
    assert outcomes == {
        Outcome.ACCEPTED: 100,
        Outcome.REFUSED_CAMPAIGN: 101,  # 3xx and 404
        Outcome.REFUSED_KEY: 2,
        Outcome.THROTTLED: 1,
        Outcome.BUSY: 5,  # 421, 425, 503, 509, 529
        Outcome.UNCERTAIN: 7,
        Outcome.REJECTED: 100 - 7,  # without 401, 403, 404, 408, 421, 425, 429
        Outcome.FAILED: 100 - 9,  # without 502, 503, 504, 509, 520, 524, 529, 598, 599
    }


@quick
@given(st.integers(0, 999), st.binary(max_size=200))
def test_no_body_changes_what_an_error_status_means(status, body):
    """But that of a 409, which may carry the id of the lead that is there already."""
    if not 200 <= status < 300 and status != 409:
        assert judge(status, body) == judge(status, b"")


@quick
@given(st.binary(max_size=300))
def test_any_body_of_a_200_is_judged(body):
    assert judge(200, body)[0] in (Outcome.ACCEPTED, Outcome.REJECTED)


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b'"ok"', b"1", b"<html>ok</html>", b"\xff\xfe{", b"{", b"{}"])
def test_a_200_that_says_nothing_is_accepted_without_an_id(body):
    assert judge(200, body) == (Outcome.ACCEPTED, None)


@pytest.mark.parametrize("draw", [0, 0.25, 0.5, 0.75])
def test_a_200_that_is_not_json_is_accepted_without_an_id(draw):
    assert judge(200, malformed_body(ID, draw)) == (Outcome.ACCEPTED, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_known_shape_of_an_acceptance_gives_its_id(shape):
    expected = None if shape in ("none", "empty") else ID
    assert judge(201, success_body(shape, ID, 0)) == (Outcome.ACCEPTED, expected)


@pytest.mark.parametrize(
    "payload",
    [
        *(orjson.loads(refusal_body(draw)) for draw in (0, 0.34, 0.67)),
        {"success": False},
        {"success": False, "leadId": ID},
        {"success": "false", "message": "no"},
        {"success": False, "data": {"message": "no"}},
        {"error": "no"},
        {"error": {"code": 7}},
        {"errors": ["no"]},
        {"error": "no", "message": "no", "statusCode": 400},
        {"error": "no", "data": None},
        {"error": "no", "requestId": "r-1", "timestamp": "2026-05-08T20:25:23.674Z"},
        {"status": "error", "message": "no"},
        {"status": "FAILED"},
        {"success": 0, "message": "no"},
        {"success": "0"},
        {"success": "No"},
        {"success": "failed"},
        {"Success": False},
        {"is_success": False},
        {"ok": False, "description": "no"},
        {"ok": 0, "leadId": ID},
        {"status": False, "message": "no"},
        {"statusCode": 400, "message": "Invalid phone number"},
        {"status": 400, "message": "Campaign inactive"},
        {"status": "422", "message": "no"},
        {"status": "404 Not Found"},
        {"code": 401, "message": "Invalid API key"},
        {"status_code": 500.0},
        {"code": 400, "id": "request-1"},
        {"data": {"success": False, "message": "duplicate"}},
        {"success": True, "data": {"success": False, "message": "duplicate"}},
        {"success": True, "data": {"accepted": 0, "rejected": 1}},
        {"data": {"statusCode": 422}},
        {"result": {"ok": "false"}},
        {"result": {"error": "no"}},
        {"result": "error", "message": "no"},
    ],
)
def test_a_200_that_says_no_is_a_rejection(payload):
    assert judge(200, orjson.dumps(payload)) == (Outcome.REJECTED, None)


@pytest.mark.parametrize(
    ("payload", "id_"),
    [
        ({"success": True}, None),
        ({"success": True, "error": "a warning"}, None),
        ({"success": None, "error": None, "data": {"id": ID}}, ID),
        ({"error": "", "errors": [], "message": "Lead created"}, None),
        ({"error": False, "leadId": ID}, ID),
        ({"message": "Lead created"}, None),
        ({"error": "scheduled for later", "leadId": ID}, ID),
        ({"status": "failed", "leadId": ID}, ID),  # a lead's status, not the answer's
        ({"status": "success", "data": {}}, None),
        ({"success": 1}, None),
        ({"success": "true", "error": "a warning"}, None),
        ({"success": ""}, None),
        ({"success": "later"}, None),
        ({"error": "false", "message": "Lead created"}, None),
        ({"error": 0, "code": 0}, None),
        ({"status": 0}, None),
        ({"code": 200, "status": 201, "message": "Lead created"}, None),
        ({"code": 10000, "message": "taken"}, None),  # a number of the vendor's own
        ({"code": "LEAD_CREATED"}, None),
        ({"accepted": 1, "rejected": 0}, None),
        ({"statusCode": 409, "leadId": ID}, ID),
        ({"data": {"success": False, "leadId": ID}}, ID),
        ({"data": {"status": "failed", "_id": ID}}, ID),
        ({"success": True, "data": {"id": ID, "accepted": False}}, ID),
        ({"lead": {"status": "failed"}}, None),
        ({"created": False, "message": "it is there already"}, None),
        ([{"success": False}], None),
    ],
)
def test_a_200_with_a_lead_or_without_an_error_is_an_acceptance(payload, id_):
    assert judge(200, orjson.dumps(payload)) == (Outcome.ACCEPTED, id_)


@pytest.mark.parametrize(
    ("payload", "id_"),
    [
        ({"message": "duplicate", "leadId": ID}, ID),
        ({"success": False, "data": {"lead_id": "L-7"}}, "L-7"),
        ({"error": "exists", "lead": {"id": "7"}}, "7"),
        ({"error": "exists", "id": ID}, ID),
    ],
)
def test_a_409_with_the_id_of_a_lead_is_an_acceptance(payload, id_):
    assert judge(409, orjson.dumps(payload)) == (Outcome.ACCEPTED, id_)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"id":"request-1"}', b'{"message":"duplicate"}', b'{"leadId":null}', b"[]"]
)
def test_a_409_without_one_is_a_rejection(body):
    assert judge(409, body) == (Outcome.REJECTED, None)


# Futwork's id


@pytest.mark.parametrize("home", [None, "data", "lead", "result"])
@pytest.mark.parametrize("name", ["leadId", "lead_id", "id", "_id"])
def test_the_id_is_found_under_every_name_in_every_place(home, name):
    found = {name: ID}
    assert find_lead_id(found if home is None else {home: found}) == ID


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"id": "request-1", "data": {"leadId": ID}}, ID),
        ({"_id": "doc", "lead": {"lead_id": ID}}, ID),
        ({"leadId": ID, "lead_id": "other"}, ID),
        ({"leadId": "", "data": {"id": ID}}, ID),
        ({"leadId": None, "id": 4711}, "4711"),
        ({"id": True}, None),
        ({"id": 1.5}, None),
        ({"id": {"$oid": ID}}, None),
        ({"id": [ID]}, None),
        ({"leadId": "x" * 64}, "x" * 64),
        ({"leadId": "x" * 65}, None),
        ({"leadId": "with\0nul"}, None),
        ({"leadId": "two words"}, None),
        ({"leadId": "line\n"}, None),
        ({"data": [{"leadId": ID}]}, None),
        ({"data": None, "lead": "x", "result": 3}, None),
        ({}, None),
        ([{"leadId": ID}], None),
        (None, None),
        ("leadId", None),
    ],
)
def test_an_id_is_taken_only_where_it_is_one(payload, expected):
    assert find_lead_id(payload) == expected


# Retry-After


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("1.5", 1.5),
        ("99999999999999999999", 1e9),
        ("9" * 5000, 1e9),
        ("Fri, 08 May 2026 12:01:30 GMT", 90),
        ("Fri, 08 May 2026 12:01:30 -0000", 90),
        ("Fri, 08 May 2026 17:31:30 +0530", 90),
        ("Friday, 08-May-26 12:01:30 GMT", 90),
        ("Fri May  8 12:01:30 2026", 90),
        ("Fri, 08 May 2026 11:59:00 GMT", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("2026-05-08T12:01:30Z", 90),
        ("2026-05-08T17:31:30+05:30", 90),
        ("2026-05-08 12:01:30", 90),
        ("2026-05-08T11:00:00Z", 0),
        (str(int(NOW.timestamp()) + 90), 90),
        (str(int(NOW.timestamp() * 1000) + 90_000), 90),
        (str(int(NOW.timestamp()) - 90), 0),
    ],
)
def test_retry_after_is_read_as_seconds_and_as_a_date(value, seconds):
    assert parse_retry_after(value, now=NOW) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "value",
    [None, "", " ", "soon", "-5", "1e3", "5, 5", "٣", "Fri, 99 May 2026 12:00:00 GMT", ",", "08 May", "NaN", "inf"],
)
def test_a_retry_after_that_cannot_be_read_says_nothing(value):
    assert parse_retry_after(value, now=NOW) is None


@quick
@given(st.text(max_size=60))
def test_no_retry_after_is_an_error(text):
    wait = parse_retry_after(text, now=NOW)
    assert wait is None or wait >= timedelta()


# Excerpts


def test_an_excerpt_masks_the_secret():
    body = b'{"error":"Invalid API key: sandbox-key-0815"}'
    assert excerpt_of(body, secret="sandbox-key-0815") == '{"error":"Invalid API key: …"}'


@quick
@given(st.binary(max_size=2000))
def test_an_excerpt_is_one_bounded_line_that_a_database_can_hold(body):
    text = excerpt_of(body)
    assert len(text) <= EXCERPT_CHARACTERS
    assert text.splitlines() in ([], [text])
    assert "\0" not in text


def test_an_excerpt_of_a_huge_body_takes_no_time():
    for body in (b"1" * 1_000_000, b"1 " * 500_000, b"1-" * 500_000 + b"x", b"\n\r\t " * 250_000, b"\xff" * 1_000_000):
        assert len(excerpt_of(body)) <= EXCERPT_CHARACTERS


def test_a_number_at_the_edge_of_the_excerpt_is_masked_as_well():
    body = b"x" * (EXCERPT_CHARACTERS - 6) + b" 9999789877"
    assert excerpt_of(body) == "x" * (EXCERPT_CHARACTERS - 6) + " •••••"


# Failures


URL = "https://secret-host.example/api/campaigns/68ecc86fd9fbecbe9431a18e/leads?x=secret"


def raised(*errors):
    """The first error, raised because of the second, which was raised because of the third, and so on."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([requests.ConnectionError(URL), urllib3.exceptions.ProtocolError("cut", URL), ConnectionResetError(104, URL)],
         "the connection was reset"),
        ([requests.ConnectionError(URL), urllib3.exceptions.ProtocolError("aborted", URL), BrokenPipeError(32, URL)],
         "the connection broke while sending"),
        ([requests.ReadTimeout(URL), urllib3.exceptions.ReadTimeoutError(None, URL, "Read timed out.")],
         "no answer within the time allowed"),
        ([requests.exceptions.SSLError(URL), urllib3.exceptions.MaxRetryError(None, URL),
          ssl.SSLCertVerificationError(1, "self-signed certificate")],
         "the server's certificate could not be verified"),
        ([requests.ConnectionError(URL), urllib3.exceptions.NameResolutionError("secret-host", None, OSError(-2, URL))],
         "the host name could not be resolved"),
        ([requests.ConnectTimeout(URL), urllib3.exceptions.ConnectTimeoutError(URL), TimeoutError(URL)],
         "no connection within the time allowed"),
        ([requests.exceptions.InvalidHeader("Invalid header value: 'secret-key'")], "InvalidHeader"),
        ([requests.exceptions.InvalidURL(URL)], "InvalidURL"),
        ([OSError(24, "Too many open files", URL)], "OSError"),
        ([ValueError()], "ValueError"),
    ],
)  # fmt: skip
def test_a_failure_is_explained_without_addresses_or_keys(errors, expected):
    error = raised(*errors)
    assert explain_failure(error) == expected
    assert "secret" not in explain_failure(error)


def test_a_failure_that_was_caused_by_itself_is_explained():
    error, other = OSError(), ValueError()
    error.__cause__, other.__cause__ = other, error
    assert explain_failure(error) == "OSError"


# The request's body


@pytest.fixture
def make_futwork(make_settings):
    made = []

    def make(**overrides):
        made.append(Futwork(make_settings(dispatch_concurrency=1, **overrides)))
        return made[-1]

    yield make
    for futwork in made:
        futwork.close()


def test_the_body_is_that_of_the_guide(make_futwork):
    claim = make_claim(phone="+919999789877", data='{"customer_name":"abcd xyz","place":"ABC"}')
    assert make_futwork().body_of(claim) == (
        b'{"recipientPhoneNumber":"9999789877","recipientData":{"customer_name":"abcd xyz","place":"ABC"}}'
    )


def test_the_body_carries_the_data_byte_for_byte(make_futwork):
    data = '{"name":"आशा","amount":1.10,"big":123456789012345678901234567890,"nested":{"b":[1,null],"a":"\\u0041"}}'
    body = make_futwork().body_of(make_claim(phone="+919999789877", data=data))
    assert body == b'{"recipientPhoneNumber":"9999789877","recipientData":' + data.encode() + b"}"


def test_the_reference_joins_the_data_where_one_is_configured(make_futwork):
    claim = make_claim(phone="+919999789877", data='{"customer_name":"Asha"}')
    assert make_futwork(reference_key="our_ref").body_of(claim) == (
        b'{"recipientPhoneNumber":"9999789877","recipientData":{"customer_name":"Asha","our_ref":"%b"}}'
        % str(claim.lead_id).encode()
    )


def test_a_foreign_number_goes_without_its_country_code(make_futwork):
    body = make_futwork().body_of(make_claim(phone="+14155552671", data="{}"))
    assert body == b'{"recipientPhoneNumber":"4155552671","recipientData":{}}'


def test_only_configured_accounts_have_a_key(make_futwork):
    futwork = make_futwork(futwork_api_key="", futwork_api_keys="north=k1,south=k2")
    assert [futwork.has_key(name) for name in ("default", "north", "south", "east")] == [False, True, True, False]
