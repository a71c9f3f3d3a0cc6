"""One answer for one request, no secret in a log, and many requests at once."""

import logging
import socket
import threading
import time
from collections import Counter

import pytest

from pipeline.domain.lead import Outcome
from pipeline.futwork import Futwork
from pipeline.sandbox.options import Options
from pipeline.sandbox.server import run_in_thread
from tests.conftest import make_claim
from tests.integration.futwork.conftest import KEY, answering, not_sent, nothing, partly, post
from tests.raw_server import raw_server
from tests.waiting import patience

# One answer for one request


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_passed_over(make_futwork, engine, interim):
    """Except by `requests`: Python's own HTTP client passes over 100 alone and takes the others for the answer."""
    requests = []

    def handle(peer):
        while request := peer.request():
            requests.append(request)
            peer.send(f"HTTP/1.1 {interim}\r\nLink: </x>\r\n\r\n".encode() * 3)
            if len(requests) == 1:
                peer.answer("422 Unprocessable", b'{"message":"first"}')
            else:
                peer.answer("200 OK", b'{"leadId":"second"}')

    with raw_server(handle) as server:
        futwork = make_futwork(server.url)
        [first], [second] = post(futwork), post(futwork)
    if engine == "requests" and not interim.startswith("100"):
        why = f"an interim answer ({interim[:3]}), which this engine cannot pass over"
        assert [(answer.outcome, answer.excerpt) for answer in (first, second)] == [(Outcome.UNCERTAIN, why)] * 2
        return
    assert (first.outcome, first.excerpt) == (Outcome.REJECTED, 'HTTP 422 {"message":"first"}')
    assert (second.outcome, second.futwork_lead_id) == (Outcome.ACCEPTED, "second")


@pytest.mark.parametrize("together", [True, False])
def test_bytes_after_an_answer_are_never_the_next_leads_answer(make_futwork, together):
    surplus = threading.Event()
    surplus_answer = b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{"leadId":"nobody"}'

    def handle(peer):
        while peer.request():
            answer = b"HTTP/1.1 422 Unprocessable\r\nContent-Length: 2\r\n\r\n{}"
            peer.send(answer + (surplus_answer if together else b""))
            if not together:
                peer.stopping.wait(0.02)
                peer.send(surplus_answer)
            surplus.set()

    with raw_server(handle) as server:
        futwork = make_futwork(server.url)
        for _ in range(5):
            [answer] = post(futwork)
            assert (answer.outcome, answer.futwork_lead_id) == (Outcome.REJECTED, None)
            assert surplus.wait(patience())
            surplus.clear()


def test_a_connection_that_the_server_closed_meanwhile_makes_no_lead_uncertain(make_futwork):
    def handle(peer):
        peer.request()
        peer.answer("200 OK", b"{}")  # says nothing of closing
        peer.sock.shutdown(socket.SHUT_WR)
        peer.request()

    with raw_server(handle) as server:
        futwork = make_futwork(server.url)
        outcomes = []
        for number in range(1, 6):
            outcomes.append(post(futwork)[0].outcome)
            threads = server._threads
            threads[number - 1].join(0.05)  # the close has arrived by then: it is on this very machine
        assert outcomes == [Outcome.ACCEPTED] * 5
        assert server.connections == 5


def test_a_connection_that_idled_for_long_is_not_used_again(make_futwork, engine, monkeypatch):
    idle_seconds = {"requests": 0.15, "curl": 1}[engine]  # libcurl counts whole seconds
    monkeypatch.setattr(f"pipeline.futwork.with_{engine}.IDLE_SECONDS", idle_seconds)
    with raw_server(answering(("200 OK", b"{}"))) as server:
        futwork = make_futwork(server.url)
        post(futwork)
        post(futwork)
        assert server.connections == 1
        threading.Event().wait(idle_seconds * 2.1)  # time itself is the subject
        post(futwork)
        assert server.connections == 2


def test_a_slow_answer_leaves_the_next_request_on_the_connection_its_whole_time(make_futwork):
    read_timeout_seconds = patience(0.9)

    def handle(peer):
        while peer.request():
            peer.stopping.wait(0.6 * read_timeout_seconds)
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        futwork = make_futwork(server.url, read_timeout_seconds=read_timeout_seconds)
        assert [post(futwork)[0].outcome for _ in range(3)] == [Outcome.ACCEPTED] * 3
        assert server.connections == 1


@pytest.mark.parametrize("engine", ["curl"], indirect=True)
def test_a_wire_that_fails_answers_every_claim_and_goes_on(make_futwork, monkeypatch):
    import pipeline.futwork.with_curl as engine_module

    turn, faults = engine_module._Wire.turn, iter([None, None, OSError("no descriptor left")])

    def turn_or_fail(wire, until):
        fault = next(faults, None)
        if fault is not None:
            raise fault
        return turn(wire, until)

    with raw_server(answering(("200 OK", b"{}"))) as server:
        monkeypatch.setattr(engine_module._Wire, "turn", turn_or_fail)
        futwork = make_futwork(server.url, dispatch_concurrency=2)
        answers = post(futwork, *(make_claim(number) for number in range(40)))
        [after] = post(futwork, make_claim(41))
    assert "unexpected OSError" in {answer.excerpt for answer in answers}
    assert {answer.outcome for answer in answers} <= {Outcome.UNCERTAIN, Outcome.NOT_SENT, Outcome.ACCEPTED}
    assert after.outcome is Outcome.ACCEPTED


@pytest.mark.parametrize("end", [lambda peer: peer.reset(), nothing], ids=["reset", "closed"])
def test_a_request_is_never_sent_again_on_a_new_connection(make_futwork, end):
    requests = []

    def handle(peer):
        requests.append(peer.request())
        peer.answer("200 OK", b"{}")
        requests.append(peer.request())  # on the connection that was kept alive, read whole, and never answered
        end(peer)

    with raw_server(handle) as server:
        futwork = make_futwork(server.url)
        answers = [post(futwork)[0] for _ in range(2)]
        assert server.connections == 1
    assert [answer.outcome for answer in answers] == [Outcome.ACCEPTED, Outcome.UNCERTAIN]
    assert len(requests) == 2


# Secrets


def test_the_key_shows_nowhere(make_futwork, caplog):
    caplog.set_level(logging.DEBUG)
    handlers = [
        answering(("401 Unauthorized", f'{{"error":"bad key {KEY}"}}'.encode())),
        answering(("200 OK", b"{}")),
        lambda peer: peer.reset(),
        partly(b"HTTP/1.1 200 OK\r\nbad header\r\n: :\r\n\r\n", then=nothing),
    ]
    seen = []
    for handle in handlers:
        with raw_server(handle) as server:
            futwork = make_futwork(server.url)
            seen += [*post(futwork), futwork]
    seen += post(make_futwork("http://nonexistent.invalid/api"))
    assert seen[0].excerpt == 'HTTP 401 {"error":"bad key …"}'
    assert KEY not in "\n".join([*map(repr, seen), *map(str, seen), caplog.text])
    assert not any(KEY in str(record.__dict__) for record in caplog.records)


def test_a_key_that_no_header_can_carry_does_not_show_either(make_futwork, caplog):
    with raw_server(answering(("200 OK", b"{}"))) as server:
        futwork = make_futwork(server.url)
        futwork._keys["default"] = f"{KEY}\r\nX-Injected: 1"
        [answer] = post(futwork)
    assert not_sent(answer)
    assert KEY not in repr(answer) + caplog.text


# Many at once


def test_more_claims_than_threads_come_back_once_each(make_futwork):
    claims = [make_claim(number) for number in range(200)]
    with run_in_thread(Options(api_keys=frozenset({KEY}), latency_ms=3)) as sandbox:
        futwork = make_futwork(sandbox.url, dispatch_concurrency=8)
        answers = post(futwork, *claims)
        journal = sandbox.journal()
        connections = sandbox.stats()["connections"]
    assert [answer.claim for answer in answers] == claims
    assert Counter(answer.outcome for answer in answers) == {Outcome.ACCEPTED: 200}
    assert futwork.in_flight == 0
    assert futwork.receive(wait=0) == []
    assert Counter(entry["phone"] for entry in journal) == {claim.phone[3:]: 1 for claim in claims}
    ids = {entry["phone"]: entry["lead_id"] for entry in journal}
    told = {answer.claim.phone[3:]: answer.futwork_lead_id for answer in answers if answer.futwork_lead_id}
    assert told == {phone: ids[phone] for phone in told}
    assert len(told) > 100  # the sandbox's answers vary; most carry the id
    assert 1 <= connections <= 8


def test_receiving_with_nothing_out_does_not_wait(make_futwork):
    futwork = make_futwork("http://127.0.0.1:9/api")
    assert futwork.receive(wait=24 * 60 * 60) == []  # pytest's limit ends a test that waits


def test_closing_finishes_what_is_out_and_ends_the_threads(make_settings, engine):
    def handle(peer):
        while peer.request():
            peer.stopping.wait(0.1)
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        before = set(threading.enumerate())
        settings = make_settings(
            futwork_base_url=server.url, futwork_api_key=KEY, futwork_http_engine=engine, dispatch_concurrency=4
        )
        futwork = Futwork(settings)
        futwork.send([make_claim(number) for number in range(8)], account="default")
        futwork.close()
        answers = futwork.receive(wait=0)
        assert Counter(answer.outcome for answer in answers) == {Outcome.ACCEPTED: 8}
        assert futwork.in_flight == 0
        assert not any(thread.name.startswith("futwork-") for thread in set(threading.enumerate()) - before)
        with pytest.raises(RuntimeError, match="closed"):
            futwork.send([make_claim()], account="default")
        assert futwork.in_flight == 0
        futwork.close()


@pytest.mark.parametrize(
    ("fault", "outcomes"),
    [
        ("500", {Outcome.FAILED}),
        ("502", {Outcome.UNCERTAIN}),
        ("503", {Outcome.BUSY}),
        ("504", {Outcome.UNCERTAIN}),
        ("408", {Outcome.UNCERTAIN}),
        ("reset_before", {Outcome.UNCERTAIN}),
        ("reset_after", {Outcome.UNCERTAIN}),
        ("malformed", {Outcome.ACCEPTED}),
        ("success_false", {Outcome.REJECTED}),
        ("stall", {Outcome.UNCERTAIN}),
    ],
)
def test_each_fault_of_the_sandbox_has_its_outcome(make_futwork, fault, outcomes):
    with run_in_thread(Options(api_keys=frozenset({KEY}), faults={fault: 1.0}, stall_seconds=60)) as sandbox:
        patient = {} if fault != "stall" else {"connect_timeout_seconds": patience(0.3), "read_timeout_seconds": 0.5}
        futwork = make_futwork(sandbox.url, dispatch_concurrency=6, **patient)
        answers = post(futwork, *(make_claim(number) for number in range(6)))
        assert {answer.outcome for answer in answers} == outcomes
        taken = sum(entry["accepted"] for entry in sandbox.journal())
    if outcomes & {Outcome.BUSY, Outcome.REJECTED}:
        assert taken == 0  # these may be sent again, or are given up
    if outcomes == {Outcome.ACCEPTED}:
        assert taken == 6


def test_each_post_begins_at_its_moment(make_futwork):
    begun = []

    def handle(peer):
        while peer.request():
            begun.append(time.monotonic())
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        futwork = make_futwork(server.url, dispatch_concurrency=8)
        now = time.monotonic()
        moments = [now + 0.05 * number for number in (1, 3, 5)]
        futwork.send([make_claim(number) for number in range(3)], account="default", at=moments)
        answers = []
        while futwork.in_flight:
            answers += futwork.receive(wait=5)
    assert [answer.outcome for answer in answers] == [Outcome.ACCEPTED] * 3
    assert len(begun) == 3
    assert all(moment <= start for moment, start in zip(moments, sorted(begun), strict=True))
