"""The sandbox as a client sees it: over real sockets, with a real webhook behind it."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.sandbox.options import Options, checked
from pipeline.sandbox.server import run_in_thread

CAMPAIGN = "68ecc86fd9fbecbe9431a18e"
LEADS = f"/api/campaigns/{CAMPAIGN}/leads"
HEADERS = {"x-api-key": "sandbox-key", "Content-Type": "application/json"}


class Answer:
    """What a client saw: an answer, or the error that it got instead."""

    def __init__(self, status=None, headers=None, body=b"", error=None):
        self.status, self.headers, self.body, self.error = status, headers or {}, body, error

    @property
    def content(self):
        return json.loads(self.body)


class Client:
    """A plain HTTP client with a connection of its own for each request."""

    def __init__(self, port, timeout_seconds=5):
        self.port, self.timeout_seconds = port, timeout_seconds

    def request(self, method, path, body=None, headers=HEADERS):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, self.timeout_seconds)) as connection:
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return Answer(response.status, dict(response.headers), response.read())
            except OSError as error:
                return Answer(error=type(error))

    def post(self, phone="9999789877", data=None, path=LEADS, headers=HEADERS):
        lead = {"recipientPhoneNumber": phone, "recipientData": {"customer_name": "Asha"} if data is None else data}
        return self.request("POST", path, json.dumps(lead), headers)

    def control(self, **changes):
        return self.request("POST", "/_control", json.dumps(changes))

    def get(self, path):
        return self.request("GET", path).content

    def lines(self, path):
        return [json.loads(line) for line in self.request("GET", path).body.splitlines()]


class Hook:
    """A webhook that keeps what it got; `status` is what it answers next."""

    def __init__(self):
        self.bodies, self.headers, self.paths, self.statuses = [], [], [], []
        self.connections = 0
        self.lock = threading.Lock()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                with hook.lock:
                    hook.connections += 1

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with hook.lock:
                    hook.bodies.append(body)
                    hook.headers.append(dict(self.headers))
                    hook.paths.append(self.path)
                    status = hook.statuses.pop(0) if hook.statuses else 200
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # a full queue would cost a second for each connection that does not fit

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?from=futwork"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def hook():
    hook = Hook()
    yield hook
    hook.close()


@pytest.fixture(scope="module")
def shared():
    """One sandbox for all tests that change nothing but its settings; `sandbox` puts these back."""
    with run_in_thread() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared):
    shared.change(**Options().model_dump())
    return shared


@pytest.fixture
def client(sandbox):
    return Client(sandbox.port)


@contextlib.contextmanager
def calling(hook, **settings):
    """A sandbox of its own that calls quickly and posts to *hook*."""
    with run_in_thread(checked({"webhook": hook.url, "call_seconds": 0.05} | settings)) as sandbox:
        yield sandbox, Client(sandbox.port)


def settled(sandbox, calls):
    """Wait until *calls* calls were made and each of their events is settled; returns the counters."""
    return sandbox.wait(lambda counters: counters["calls"] == calls and counters["webhooks"]["pending"] == 0)


# Taking leads.


def test_a_good_lead_is_accepted_and_journaled(sandbox, client):
    before = len(sandbox.journal())
    client.control(answer_shape="data.leadId")

    answer = client.post("9999789800", {"customer_name": "abcd xyz", "place": "ABC"})

    assert answer.status in {200, 201}
    entry = sandbox.journal()[-1]
    assert answer.content == {"success": True, "data": {"leadId": entry["lead_id"]}}
    assert abs(entry.pop("time") - time.time()) < 5
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


def test_latency_is_its_mean_within_a_half(client):
    client.control(latency_ms=60)
    start = time.monotonic()
    client.post()
    assert 0.03 <= time.monotonic() - start < 1


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
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as wire:
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
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=5)) as connection:
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
    with socket.create_connection(("127.0.0.1", client.port), timeout=5) as wire:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(head), 11):
            wire.sendall(head[at : at + 11])
        assert wire.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        for at in range(0, len(body), 7):
            wire.sendall(body[at : at + 7])
        assert b"".join(iter(lambda: wire.recv(65536), b"")).startswith(b"HTTP/1.1 20")


def test_what_is_not_http_is_answered_400(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=5) as wire:
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
    assert accepted == ({True, False} if status in {502, 504} else {False})


@pytest.mark.parametrize(("fault", "accepted"), [("reset_before", False), ("reset_after", True)])
def test_a_reset_is_a_reset(sandbox, client, fault, accepted):
    client.control(faults={fault: 1}, latency_ms=1)
    assert client.post().error is ConnectionResetError
    entry = sandbox.journal()[-1]
    assert (entry["status"], entry["outcome"], entry["accepted"]) == (None, fault, accepted)


@pytest.mark.parametrize(("stall_seconds", "error", "status"), [(0, TimeoutError, None), (0.05, None, 200)])
def test_a_stalled_answer_comes_late_or_never(sandbox, client, stall_seconds, error, status):
    client.control(faults={"stall": 1}, stall_seconds=stall_seconds)
    client.timeout_seconds = 0.3
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
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port, timeout=5)) as kept:
        kept.request("GET", "/_stats")
        kept.getresponse().read()
        before = sandbox.stats()["refusals"]
        sandbox.change(refuse_now=0.5)
        sandbox.wait(lambda counters: counters["refusals"] == before + 1 and counters["connections"] == 0)
        assert client.post().error is ConnectionRefusedError
        assert kept.sock.recv(1) == b"", "an idle connection outlived the listener"
    deadline = time.monotonic() + 5
    while (answer := client.post()).error is ConnectionRefusedError and time.monotonic() < deadline:
        pass
    assert answer.status in {200, 201}


def test_a_share_of_refusals_is_a_share_of_time(sandbox, client):
    before = sandbox.stats()["refusals"]
    sandbox.change(faults={"refused": 0.5}, refuse_every_seconds=0.1)
    sandbox.wait(lambda counters: counters["refusals"] >= before + 3)
    sandbox.change(faults={})
    deadline = time.monotonic() + 5
    while (answer := client.post()).error and time.monotonic() < deadline:
        pass
    assert answer.status in {200, 201}


# Rate limits.


def test_beyond_the_rate_leads_are_throttled_and_not_accepted(sandbox, client):
    client.control(rate="5/m")
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
    client.post()
    assert client.post().headers["Retry-After"] == "60"
    client.control(retry_after="date")
    moment = parsedate_to_datetime(client.post().headers["Retry-After"])
    assert 55 < moment.timestamp() - time.time() <= 61
    client.control(retry_after="none")
    answer = client.post()
    assert (answer.status, answer.headers.get("Retry-After")) == (429, None)


def test_a_503_has_retry_after_half_of_the_time(client):
    client.control(faults={"503": 1})
    seen = Counter(client.post(str(9_600_000_000 + number)).headers.get("Retry-After") for number in range(40))
    assert set(seen) == {None, "1", "2"}
    assert 10 <= seen[None] <= 30


def test_each_key_and_each_campaign_has_a_limit_of_its_own(client):
    client.control(api_keys=["a", "b"], rate="2/m")
    keys = [client.post(headers=HEADERS | {"x-api-key": key}).status == 429 for key in "aaabbb"]
    client.control(rate=None, campaign_rate="1/m")
    both = [
        client.post(path=f"/api/campaigns/{name}/leads", headers=HEADERS | {"x-api-key": key}).status == 429
        for name, key in (("x", "a"), ("x", "b"), ("y", "a"))
    ]
    assert keys == [False, False, True, False, False, True]
    assert both == [False, True, False]


def test_no_second_has_more_acceptances_than_the_rate():
    with run_in_thread(checked({"rate": "20/s"})) as sandbox, ThreadPoolExecutor(4) as threads:
        client = Client(sandbox.port)
        deadline = time.monotonic() + 10
        statuses = Counter()
        while statuses[200] + statuses[201] < 40 and time.monotonic() < deadline:
            statuses.update(threads.map(lambda phone: client.post(phone).status, ["9123456780", "9123456781"]))
        counters = sandbox.stats()
    assert counters["max_accepted_in_a_second"] == 20
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


# Calls and webhooks.


def test_every_accepted_lead_is_called_and_its_last_event_delivered(hook):
    with calling(hook, faults="reset_before=0.1,reset_after=0.1,500=0.1,502=0.1,malformed=0.1", seed=3) as (
        box,
        client,
    ):
        for number in range(60):
            client.post(str(9_800_000_000 + number))
        accepted = {entry["lead_id"] for entry in box.journal() if entry["accepted"]}
        counters = settled(box, len(accepted))
        events = box.webhooks()
    assert 30 < len(accepted) == counters["accepted"] < 60
    assert counters["webhooks"]["delivered"] == counters["webhooks"]["events"] == len(hook.bodies) == len(events)
    assert {event["lead_id"] for event in events if event["last"] and event["delivered"]} == accepted
    received = Counter(json.loads(body)["callSid"] for body in hook.bodies)
    assert received == Counter(event["call_sid"] for event in events)
    assert len(received) == len(accepted)


def test_webhooks_go_to_the_whole_url_with_the_token_over_few_connections(hook):
    with calling(hook, webhook_token="hook-token", webhook_concurrency=2) as (sandbox, client):
        for number in range(20):
            client.post(str(9_810_000_000 + number))
        settled(sandbox, 20)
    assert set(hook.paths) == {"/hook?from=futwork"}
    assert {headers["x-api-key"] for headers in hook.headers} == {"hook-token"}
    assert {headers["Content-Type"] for headers in hook.headers} == {"application/json"}
    assert hook.connections <= 2


def test_without_a_webhook_nobody_is_called(sandbox, client):
    before = sandbox.stats()
    client.post()
    after = sandbox.stats()
    assert after["accepted"] == before["accepted"] + 1
    assert (after["calls"], after["webhooks"]["events"]) == (0, 0)


def test_an_event_is_retried_until_the_webhook_takes_it(hook):
    hook.statuses = [500, 503, 302]
    with calling(hook, lifecycle="final", webhook_backoff_seconds=0.01) as (sandbox, client):
        client.post()
        counters = settled(sandbox, 1)
        [event] = sandbox.webhooks()
    assert counters["webhooks"] == {
        "events": 1, "sent": 4, "delivered": 1, "refused": 0, "failed": 0, "lost": 0, "pending": 0,
    }  # fmt: skip
    assert (event["attempts"], event["response"], event["delivered"]) == (4, 200, True)
    assert len(hook.bodies) == 4
    assert len(set(hook.bodies)) == 1


def test_an_event_is_given_up_when_its_retries_are_used_up(hook):
    hook.statuses = [500] * 10
    with calling(hook, lifecycle="final", webhook_retries=2, webhook_backoff_seconds=0.01) as (sandbox, client):
        client.post()
        counters = settled(sandbox, 1)
        [event] = sandbox.webhooks()
    assert (counters["webhooks"]["sent"], counters["webhooks"]["failed"]) == (3, 1)
    assert (event["outcome"], event["delivered"], event["response"]) == ("failed", False, 500)


def test_an_event_for_a_webhook_that_is_away_is_retried_and_given_up(hook):
    url = hook.url
    with socket.create_server(("127.0.0.1", 0)) as taken:
        away = f"http://127.0.0.1:{taken.getsockname()[1]}/"
    settings = {"lifecycle": "final", "webhook_retries": 100, "webhook_backoff_seconds": 0.01, "webhook": away}
    with calling(hook, **settings) as (sandbox, client):
        client.post()
        sandbox.wait(lambda counters: counters["webhooks"]["sent"] >= 3)
        assert sandbox.stats()["webhooks"]["pending"] == 1
        assert [event["delivered"] for event in sandbox.webhooks()] == [None]
        sandbox.change(webhook=url)
        assert settled(sandbox, 1)["webhooks"]["delivered"] == 1


def test_duplicates_arrive_twice_and_lost_events_never(hook):
    with calling(hook, lifecycle="final", faults="dup=1") as (sandbox, client):
        client.post("9820000000")
        settled(sandbox, 1)
        sandbox.change(faults="lost=1")
        client.post("9820000001")
        counters = settled(sandbox, 2)
        events = sandbox.webhooks()
    assert len(hook.bodies) == 2
    assert hook.bodies[0] == hook.bodies[1]
    assert (counters["webhooks"]["delivered"], counters["webhooks"]["lost"]) == (2, 1)
    assert sorted(event["kind"] for event in events if event["phone"] == "9820000000") == ["duplicate", "event"]
    assert [event["attempts"] for event in events if event["phone"] == "9820000001"] == [0]


def test_a_malformed_copy_may_be_refused_and_is_not_retried(hook):
    with calling(hook, lifecycle="final", webhook_concurrency=1, webhooks_paused=True) as (sandbox, client):
        sandbox.change(faults="malformed_webhook=1")
        client.post()
        kinds = [event["kind"] for event in sandbox.webhooks()]
        hook.statuses = [400 if kind == "malformed" else 200 for kind in kinds]
        sandbox.flush_webhooks()
        sandbox.change(webhooks_paused=False)
        counters = settled(sandbox, 1)
    assert sorted(kinds) == ["event", "malformed"]
    assert (counters["webhooks"]["delivered"], counters["webhooks"]["refused"], len(hook.bodies)) == (1, 1, 2)


def test_reordered_events_arrive_in_another_order(hook):
    settings = {"faults": "reorder=1", "lifecycle": "full", "call_seconds": 0.2, "no_answer": 0, "busy": 0, "failed": 0}
    with calling(hook, **settings) as (sandbox, client):
        client.post()
        settled(sandbox, 1)
    arrived = [json.loads(body)["status"] for body in hook.bodies]
    start = ["initiated", "ringing", "in-progress"]
    ends = (["call-disconnected", "completed"], ["call-disconnected"], ["completed"])
    assert sorted(arrived) in [sorted(start + end) for end in ends]
    assert arrived not in [start + end for end in ends]


def test_paused_webhooks_wait_and_a_flush_makes_them_due(hook):
    with calling(hook, call_seconds=3600) as (sandbox, client):
        client.post()
        waiting = sandbox.stats()["webhooks"]["pending"]
        client.control(webhooks_paused=True)
        assert client.request("POST", "/_webhooks/flush").content == {"flushed": waiting}
        assert (sandbox.stats()["webhooks"]["sent"], hook.bodies) == (0, [])
        client.control(webhooks_paused=False)
        settled(sandbox, 1)
    assert len(hook.bodies) == waiting > 0


# Control and the command.


def test_settings_are_read_and_changed_together_or_not_at_all(sandbox, client):
    answer = client.control(latency_ms=1, faults="500=0.5", campaigns=["c9"])
    assert answer.status == 200
    assert answer.content == client.get("/_control")
    assert (answer.content["latency_ms"], answer.content["faults"]) == (1, {"500": 0.5})

    refused = client.control(latency_ms=2, rate="often")
    assert refused.status == 422
    assert refused.content["message"].startswith("rate: 'often' is not a rate")
    assert client.get("/_control")["latency_ms"] == 1
    assert client.control(refuse_now="soon").status == 422
    assert client.request("POST", "/_control", "{").status == 400


def test_counters_add_up():
    with run_in_thread(checked({"faults": "wild,refused=0,stall=0", "campaigns": ["c1", "c2"]})) as sandbox:
        client = Client(sandbox.port)
        for number in range(90):
            client.post(str(9_900_000_000 + number), path=f"/api/campaigns/c{number % 3}/leads")
        counters, journal = client.get("/_stats"), client.lines("/_journal")
    assert counters["received"] == len(journal) == 90
    assert [entry["seq"] for entry in journal] == list(range(1, 91))
    assert counters["accepted"] == sum(entry["accepted"] for entry in journal)
    assert counters["accepted"] + sum(counters["rejected"].values()) == sum(counters["statuses"].values()) == 90
    assert counters["outcomes"] == Counter(entry["outcome"] for entry in journal)
    assert counters["statuses"] == Counter(str(entry["status"] or "none") for entry in journal)
    assert counters["rejected"]["404"] == 30
    assert counters["campaigns"]["c0"]["accepted"] == 0
    assert {name: tally["received"] for name, tally in counters["campaigns"].items()} == {"c0": 30, "c1": 30, "c2": 30}
    assert counters["max_received_in_a_second"] <= 90


def test_a_long_journal_is_read_whole():
    with (
        run_in_thread() as sandbox,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=5)) as connection,
    ):
        for number in range(2000):
            lead = {"recipientPhoneNumber": str(9_000_000_000 + number), "recipientData": {"note": "x" * 2000}}
            connection.request("POST", LEADS, json.dumps(lead), HEADERS)
            connection.getresponse().read()
        connection.request("GET", "/_journal")
        lines = connection.getresponse().read().splitlines()
        assert [json.loads(line)["seq"] for line in lines] == list(range(1, 2001))


def test_the_command_says_when_it_is_ready_keeps_its_journal_and_ends_on_a_signal(tmp_path):
    file = tmp_path / "journal.ndjson"
    file.write_text('{"seq": "of an earlier run"}\n')
    command = [sys.executable, "-m", "pipeline.sandbox", "--port", "0", "--journal", str(file), "--api-key", "k"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = json.loads(process.stdout.readline())
            client = Client(ready["port"])
            assert ready == {"ready": True, "url": f"http://127.0.0.1:{client.port}/api", "port": client.port}
            assert client.post().status == 401
            assert client.post(headers=HEADERS | {"x-api-key": "k"}).status in {200, 201}
            assert [json.loads(line)["seq"] for line in file.read_text().splitlines()] == ["of an earlier run", 1, 2]
            assert [entry["seq"] for entry in client.lines("/_journal")] == [1, 2]
        finally:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--faults", "500=2"], "Error: faults: the share of 500 is 2.0; it must be between 0 and 1"),
        (["--rate", "5"], "Error: rate: '5' is not a rate; write a whole number and a unit, such as 50/s"),
        (["--busy", "many"], "Error: Invalid value for '--busy': 'many' is not a valid float."),
    ],
)
def test_wrong_use_of_the_command_is_refused_with_a_sentence(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.sandbox", *arguments], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.sandbox", "--port", str(port)], capture_output=True, text=True, timeout=30
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
