"""The sandbox takes leads over HTTP, with faults and limits on demand."""

import contextlib
import http.client
import json
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime

import pytest

from pipeline.sandbox.options import checked
from pipeline.sandbox.server import run_in_thread
from tests.integration.sandbox.conftest import CAMPAIGN, HEADERS, LEADS, Client
from tests.waiting import patience, until

# Taking leads.


def test_a_good_lead_is_accepted_and_journaled(sandbox, client):
    before, started = len(sandbox.journal()), time.time()
    client.control(answer_shape="data.leadId")

    answer = client.post("9999789800", {"customer_name": "abcd xyz", "place": "ABC"})

    assert answer.status in {200, 201}
    entry = sandbox.journal()[-1]
    assert answer.content == {"success": True, "data": {"leadId": entry["lead_id"]}}
    assert started <= entry.pop("time") <= time.time()
    assert entry == {
        "seq": before + 1,
        "campaign_id": CAMPAIGN,
        "phone": "9999789800",
        "data": {"customer_name": "abcd xyz", "place": "ABC"},
        "status": answer.status,
        "outcome": "accepted",
        "accepted": True,
        "lead_id": entry["lead_id"],
        "attempt": 1,
    }


@pytest.mark.parametrize(
    ("status", "request_", "message"),
    [
        (401, {"headers": {"Content-Type": "application/json"}}, "x-api-key header is missing"),
        (401, {"headers": HEADERS | {"x-api-key": "sandbox-keys"}}, "Invalid API key"),
        (415, {"headers": HEADERS | {"Content-Type": "text/plain"}}, "Content-Type must be application/json"),
        (400, {"body": '{"recipientPhoneNumber": '}, "Request body is not valid JSON"),
        (400, {"body": "[]"}, "Request body must be a JSON object"),
        (413, {"body": " " * (1 << 20) + "{}"}, "Request body is too large"),
        (422, {"body": '{"recipientData": {}}'}, "recipientPhoneNumber must be a string of 10 digits"),
        (422, {"body": '{"recipientPhoneNumber": "9999789877"}'}, "recipientData must be an object"),
        (422, {"body": '{"recipientPhoneNumber": "9999789877", "recipientData": []}'},
         "recipientData must be an object"),
        *(
            (422, {"body": json.dumps({"recipientPhoneNumber": phone, "recipientData": {}})},
             "recipientPhoneNumber must be a string of 10 digits")
            for phone in (9999789877, "+919999789877", "999978987", "99997898770", "99997 8987", "९९९९७८९८७७", None)
        ),
    ],
)  # fmt: skip
def test_a_bad_post_is_refused_and_journaled(sandbox, client, status, request_, message):
    accepted = sandbox.stats()["accepted"]
    lead = '{"recipientPhoneNumber": "9999789877", "recipientData": {}}'

    answer = client.request("POST", LEADS, request_.get("body", lead).encode(), request_.get("headers", HEADERS))

    assert (answer.status, answer.content) == (status, {"success": False, "message": message})
    entry = sandbox.journal()[-1]
    assert (entry["status"], entry["outcome"], entry["accepted"], entry["lead_id"]) == (status, "rejected", False, None)
    assert sandbox.stats()["accepted"] == accepted


def test_only_known_campaigns_take_leads(client):
    client.control(campaigns=["c1", "c2"])
    statuses = [client.post(path=f"/api/campaigns/{name}/leads").status for name in ("c0", "c1", "c2")]
    assert [status == 404 for status in statuses] == [True, False, False]
    client.control(campaigns=None, gone_campaigns=["c2"])
    assert client.post(path="/api/campaigns/c1/leads").status in {200, 201}
    assert client.post(path="/api/campaigns/c2/leads").status == 404


def test_a_lead_schema_refuses_keys_that_it_does_not_list(client):
    client.control(lead_schema=["customer_name", "place"])
    assert client.post(data={"place": "Pune"}).status in {200, 201}
    answer = client.post(data={"place": "Pune", "ref": 1, "age": 30})
    assert (answer.status, answer.content["message"]) == (
        422,
        "recipientData has keys that the LeadSchema does not list: age, ref",
    )


def test_a_key_can_be_revoked_and_another_given(client):
    client.control(api_keys=["other"])
    assert client.post().status == 401
    assert client.post(headers=HEADERS | {"x-api-key": "other"}).status in {200, 201}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404), ("GET", "/api/campaigns", 404), ("POST", "/api/campaigns//leads", 404),
        ("POST", f"{LEADS}/1", 404), ("GET", LEADS, 405), ("PUT", LEADS, 405), ("DELETE", "/_stats", 405),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_not_found_and_not_journaled(sandbox, client, method, path, status):
    before = len(sandbox.journal())
    assert client.request(method, path).status == status
    assert len(sandbox.journal()) == before


def test_an_answer_takes_at_least_half_of_the_mean_latency(client):
    client.control(latency_ms=60)
    start = time.monotonic()
    client.post()
    assert time.monotonic() - start >= 0.03


def test_the_same_lead_twice_is_a_duplicate(sandbox, client):
    before = sandbox.stats()
    for data in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}):
        client.post("9123456789", data)
    after = sandbox.stats()
    assert after["accepted"] - before["accepted"] == 3
    assert after["duplicates"] - before["duplicates"] == 1


# HTTP.


def test_pipelined_requests_are_answered_in_order_even_when_they_take_time(client):
    client.control(latency_ms=5, answer_shape="leadId")
    phones = [str(9_300_000_000 + number) for number in range(150)]
    with socket.create_connection(("127.0.0.1", client.port), timeout=patience()) as wire:
        for phone in phones:
            body = json.dumps({"recipientPhoneNumber": phone, "recipientData": {}})
            wire.sendall(
                f"POST {LEADS} HTTP/1.1\r\nHost: x\r\nx-api-key: sandbox-key\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
        wire.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: wire.recv(65536), b""))
    expected = {entry["phone"]: entry["lead_id"] for entry in client.lines("/_journal")}
    got = [json.loads(part.partition(b"HTTP/1.1")[0])["leadId"] for part in answers.split(b"\r\n\r\n")[1:-1]]
    assert got == [expected[phone] for phone in phones]
    assert answers.split(b"\r\n\r\n")[-2].endswith(b"Connection: close\r\nContent-Length: 39")


def test_a_connection_is_kept_for_many_requests(sandbox, client):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=patience())) as connection:
        ports = set()
        for number in range(3):
            lead = json.dumps({"recipientPhoneNumber": f"912345678{number}", "recipientData": {}})
            connection.request("POST", LEADS, lead, HEADERS)
            connection.getresponse().read()
            ports.add(connection.sock.getsockname())
    assert len(ports) == 1


def test_a_request_in_pieces_is_put_together(client):
    body = b'{"recipientPhoneNumber": "9123456780", "recipientData": {}}'
    head = (
        f"POST {LEADS} HTTP/1.1\r\nHost: x\r\nx-api-key: sandbox-key\r\nContent-Type: application/json\r\n"
        f"Expect: 100-continue\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", client.port), timeout=patience()) as wire:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(head), 11):
            wire.sendall(head[at : at + 11])
        assert wire.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        for at in range(0, len(body), 7):
            wire.sendall(body[at : at + 7])
        assert b"".join(iter(lambda: wire.recv(65536), b"")).startswith(b"HTTP/1.1 20")


def test_what_is_not_http_is_answered_400(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=patience()) as wire:
        wire.sendall(b"hello\r\n\r\n")
        assert b"".join(iter(lambda: wire.recv(65536), b"")).startswith(b"HTTP/1.1 400 Bad Request")


# Faults.


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408])
def test_an_error_is_answered_and_journaled(sandbox, client, status):
    client.control(faults={str(status): 1})
    answers = [client.post(str(9_400_000_000 + number)) for number in range(30)]
    entries = sandbox.journal()[-30:]
    assert {answer.status for answer in answers} == {status}
    assert {(entry["status"], entry["outcome"]) for entry in entries} == {(status, "failed")}
    accepted = {entry["accepted"] for entry in entries}
    assert accepted == ({True, False} if status in {500, 502, 504} else {False})


@pytest.mark.parametrize(("fault", "accepted"), [("reset_before", False), ("reset_after", True)])
def test_a_reset_is_a_reset(sandbox, client, fault, accepted):
    client.control(faults={fault: 1}, latency_ms=1)
    assert client.post().error is ConnectionResetError
    entry = sandbox.journal()[-1]
    assert (entry["status"], entry["outcome"], entry["accepted"]) == (None, fault, accepted)


@pytest.mark.parametrize(
    ("stall_seconds", "timeout_seconds", "error", "status"), [(0, 0.3, TimeoutError, None), (0.05, 60, None, 200)]
)
def test_a_stalled_answer_comes_late_or_never(sandbox, client, stall_seconds, timeout_seconds, error, status):
    client.control(faults={"stall": 1}, stall_seconds=stall_seconds)
    client.timeout_seconds = timeout_seconds
    answer = client.post()
    assert (answer.error, answer.status) == (error, status)
    entry = sandbox.journal()[-1]
    assert (entry["status"], entry["outcome"], entry["accepted"]) == (None, "stalled", True)


def test_a_malformed_answer_is_a_200_that_is_not_json(sandbox, client):
    client.control(faults={"malformed": 1})
    answer = client.post()
    assert answer.status == 200
    with pytest.raises(ValueError, match=r"(?s)."):
        json.loads(answer.body)
    assert (sandbox.journal()[-1]["outcome"], sandbox.journal()[-1]["accepted"]) == ("malformed", True)


def test_a_200_can_say_no(sandbox, client):
    client.control(faults={"success_false": 1})
    answer = client.post()
    assert answer.status == 200
    assert answer.content.get("success") is False or set(answer.content) == {"error"}
    assert (sandbox.journal()[-1]["outcome"], sandbox.journal()[-1]["accepted"]) == ("rejected", False)


def test_connections_are_refused_for_a_time_and_then_not(sandbox, client):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=patience())) as kept:
        kept.request("GET", "/_stats")
        kept.getresponse().read()
        before = sandbox.stats()["refusals"]
        sandbox.change(refuse_now=0.5)
        sandbox.wait(lambda counters: counters["refusals"] == before + 1 and counters["connections"] == 0)
        assert client.post().error is ConnectionRefusedError
        assert kept.sock.recv(1) == b"", "an idle connection outlived the listener"
    until(lambda: client.post().status in {200, 201})


def test_a_share_of_refusals_is_a_share_of_time(sandbox, client):
    before = sandbox.stats()["refusals"]
    sandbox.change(faults={"refused": 0.5}, refuse_every_seconds=0.1)
    sandbox.wait(lambda counters: counters["refusals"] >= before + 3)
    sandbox.change(faults={})
    until(lambda: client.post().status in {200, 201})


# Rate limits.


def test_beyond_the_rate_leads_are_throttled_and_not_accepted(sandbox, client):
    client.control(rate="5/h")
    before = sandbox.stats()
    answers = [client.post(str(9_500_000_000 + number)) for number in range(8)]
    after = sandbox.stats()
    assert [answer.status for answer in answers[5:]] == [429, 429, 429]
    assert all(answer.status in {200, 201} for answer in answers[:5])
    assert after["accepted"] - before["accepted"] == 5
    assert after["outcomes"]["throttled"] - before["outcomes"].get("throttled", 0) == 3
    assert {entry["outcome"] for entry in sandbox.journal()[-3:]} == {"throttled"}


def test_retry_after_has_the_form_that_was_asked_for(client):
    client.control(rate="1/m")
    started = time.time()
    client.post()
    seconds = int(client.post().headers["Retry-After"])
    assert 60 - (time.time() - started) <= seconds <= 60
    client.control(retry_after="date")
    moment = parsedate_to_datetime(client.post().headers["Retry-After"])
    assert started + 59 <= moment.timestamp() <= time.time() + 61
    client.control(retry_after="none")
    answer = client.post()
    assert (answer.status, answer.headers.get("Retry-After")) == (429, None)


def test_a_503_has_retry_after_half_of_the_time(client):
    client.control(faults={"503": 1})
    seen = Counter(client.post(str(9_600_000_000 + number)).headers.get("Retry-After") for number in range(40))
    assert set(seen) == {None, "1", "2"}
    assert 10 <= seen[None] <= 30


def test_each_key_and_each_campaign_has_a_limit_of_its_own(client):
    client.control(api_keys=["a", "b"], rate="2/h")
    keys = [client.post(headers=HEADERS | {"x-api-key": key}).status == 429 for key in "aaabbb"]
    client.control(rate=None, campaign_rate="1/h")
    both = [
        client.post(path=f"/api/campaigns/{name}/leads", headers=HEADERS | {"x-api-key": key}).status == 429
        for name, key in (("x", "a"), ("x", "b"), ("y", "a"))
    ]
    assert keys == [False, False, True, False, False, True]
    assert both == [False, True, False]


def test_no_second_has_more_acceptances_than_the_rate():
    with run_in_thread(checked({"rate": "20/s"})) as sandbox, ThreadPoolExecutor(4) as threads:
        client = Client(sandbox.port)
        statuses = Counter()

        def throttled_in_two_seconds():
            statuses.update(threads.map(lambda phone: client.post(phone).status, ["9123456780", "9123456781"]))
            return statuses[429] and statuses[200] + statuses[201] >= 40

        until(throttled_in_two_seconds)
        counters = sandbox.stats()
    assert counters["max_accepted_in_a_second"] <= 20
    assert counters["accepted"] == statuses[200] + statuses[201]
    assert counters["rejected"] == {"429": statuses[429]}
    assert set(statuses) <= {200, 201, 429}


# Repeatability.


def run_of(phones, threads):
    """What each phone number got from a new sandbox that was asked by several threads."""
    settings = {"seed": 42, "faults": "wild,refused=0,stall=0,reset_before=0.1"}
    with run_in_thread(checked(settings)) as sandbox, ThreadPoolExecutor(threads) as pool:
        client = Client(sandbox.port)
        seen = list(pool.map(lambda phone: [client.post(phone) for _ in range(2)], phones))
        journal = sandbox.journal()
    answers = {
        phone: [(answer.status, answer.body, answer.error) for answer in pair]
        for phone, pair in zip(phones, seen, strict=True)
    }
    entries = sorted(
        (e["phone"], e["attempt"], e["outcome"], e["accepted"], e["lead_id"], e["status"]) for e in journal
    )
    return answers, entries


def test_the_same_seed_brings_the_same_run_whatever_the_order():
    phones = [str(9_700_000_000 + number) for number in range(120)]
    first_answers, first_entries = run_of(phones, threads=1)
    second_answers, second_entries = run_of(phones[::-1], threads=4)
    assert first_answers == second_answers
    assert first_entries == second_entries
    assert len({outcome for _, _, outcome, *_ in first_entries}) >= 5
