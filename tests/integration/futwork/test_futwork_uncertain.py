"""A request that may have arrived is uncertain; an answer's status is a verdict."""

import socket
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from pipeline.domain.lead import Outcome
from pipeline.futwork import EXCERPT_CHARACTERS
from tests.conftest import make_claim
from tests.integration.futwork.conftest import KEY, answering, nothing, partly, post
from tests.raw_server import raw_server
from tests.waiting import patience


def reset_unread(peer):
    peer.sock.recv(1)
    peer.reset()


def reset_after_reading(peer):
    peer.request()
    peer.reset()


@pytest.mark.parametrize(
    "handle",
    [
        pytest.param(reset_unread, id="reset before reading"),
        pytest.param(reset_after_reading, id="reset after reading"),
        pytest.param(lambda peer: peer.request(), id="closed without an answer"),
        pytest.param(partly(b"HTTP/1.1 200", then=nothing), id="closed in the status line"),
        pytest.param(partly(b"HTTP/1.1 200 OK\r\nContent-Le", then=nothing), id="closed in a header"),
        pytest.param(partly(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{", then=nothing), id="body cut short"),
        pytest.param(
            partly(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{", then=nothing), id="chunk cut short"
        ),
        pytest.param(
            partly(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}", then=nothing), id="bad chunk size"
        ),
        pytest.param(
            partly(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", then=nothing),
            id="body that cannot be unpacked",
        ),
        pytest.param(
            partly(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", then=lambda peer: peer.reset()), id="body reset"
        ),
        pytest.param(partly(b"\x00\x01\x02 not HTTP at all\r\n\r\n", then=nothing), id="bad bytes"),
        pytest.param(partly(b"SSH-2.0-OpenSSH_9.6\r\n", then=nothing), id="another protocol"),
        pytest.param(partly(b"HTTP/1.1 abc OK\r\n\r\n", then=nothing), id="a status that is no number"),
        pytest.param(partly(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 9000 + b"\r\n", then=nothing), id="many headers"),
        pytest.param(partly(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 400_000 + b"\r\n\r\n", then=nothing), id="long header"),
        pytest.param(partly(b"HTTP/1.1 100 Continue\r\n\r\n", then=nothing), id="nothing after 100"),
        pytest.param(partly(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", then=nothing), id="other protocol offered"),
        pytest.param(answering(("502 Bad Gateway", b"{}")), id="502"),
        pytest.param(answering(("504 Gateway Timeout", b"{}")), id="504"),
        pytest.param(answering(("408 Request Timeout", b"{}")), id="408"),
    ],
)  # fmt: skip
def test_whatever_breaks_once_a_byte_left_is_uncertain(make_futwork, handle):
    with raw_server(handle) as server:
        [answer] = post(make_futwork(server.url))
    assert answer.outcome is Outcome.UNCERTAIN
    assert answer.excerpt
    assert KEY not in answer.excerpt
    assert "127.0.0.1" not in answer.excerpt


@pytest.mark.parametrize(
    ("handle", "outcome"),
    [
        pytest.param(lambda peer: peer.hang(), Outcome.UNCERTAIN, id="silence"),
        pytest.param(
            partly(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", then=lambda peer: peer.hang()),
            Outcome.UNCERTAIN,
            id="silence in the body",
        ),
        pytest.param(
            partly(b"HTTP/1.1 200 OK\r\n", then=lambda peer: peer.drip(b"x-drip: 1\r\n", 0.05)),
            Outcome.UNCERTAIN,
            id="headers that never end",
        ),
        pytest.param(
            partly(b"HTTP/1.1 200 OK\r\n\r\n", then=lambda peer: peer.drip(b" ", 0.05)),
            Outcome.UNCERTAIN,
            id="a body that never ends",
        ),
        pytest.param(
            partly(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
                then=lambda peer: peer.drip(b"1\r\n \r\n", 0.05),
            ),
            Outcome.UNCERTAIN,
            id="chunks that never end",
        ),
        pytest.param(
            partly(b"", then=lambda peer: peer.drip(b"HTTP/1.1 100 Continue\r\n\r\n", 0.002)),
            Outcome.UNCERTAIN,
            id="interim answers that never end",
        ),
        pytest.param(
            partly(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", then=lambda peer: peer.drip(b" ", 0.05)),
            Outcome.REFUSED_CAMPAIGN,
            id="a redirect's body that never ends",
        ),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_end_in_time_holds_no_thread(make_futwork, handle, outcome):
    with raw_server(handle) as server:
        futwork = make_futwork(server.url, connect_timeout_seconds=patience(0.3), read_timeout_seconds=0.6)
        [answer] = post(futwork)
    assert answer.outcome is outcome
    assert answer.duration >= timedelta(seconds=0.6)


def test_an_answer_that_never_ends_takes_the_place_of_no_other_post(make_futwork):
    """Three servers that drip for ever, one place: each is given up in time, and the next POST has the place."""
    turns = iter([True, True, True, False])

    def handle(peer):
        while peer.request():
            if next(turns):
                peer.drip(b"HTTP/1.1 200 OK\r\n" + b"x-drip: 1\r\n" * 90, 0.02)
            else:
                peer.answer("200 OK", b'{"id":"4"}')

    with raw_server(handle) as server:
        futwork = make_futwork(server.url, connect_timeout_seconds=patience(0.3), read_timeout_seconds=patience(0.3))
        answers = post(futwork, *(make_claim(number) for number in range(4)))
    assert [answer.outcome for answer in answers] == [Outcome.UNCERTAIN] * 3 + [Outcome.ACCEPTED]
    assert {answer.excerpt for answer in answers[:3]} == {"no answer within the time allowed"}


def test_a_request_that_is_not_taken_in_time_holds_no_thread(make_futwork):
    release = threading.Event()

    def handle(peer):
        release.wait(patience())  # reads nothing; what the system buffers is smaller than the request

    with raw_server(handle) as server:
        server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        seconds = patience(0.6)
        futwork = make_futwork(server.url, connect_timeout_seconds=seconds, read_timeout_seconds=seconds)
        [answer] = post(futwork, make_claim(data='{"long":"' + "x" * 8_000_000 + '"}'))
        release.set()
    assert answer.outcome is Outcome.UNCERTAIN
    assert answer.excerpt == "no answer within the time allowed"


# A status is a verdict, whatever becomes of the body


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("400 Bad Request", Outcome.REJECTED),
        ("401 Unauthorized", Outcome.REFUSED_KEY),
        ("404 Not Found", Outcome.REFUSED_CAMPAIGN),
        ("429 Too Many Requests", Outcome.THROTTLED),
        ("500 Internal Server Error", Outcome.FAILED),
        ("503 Service Unavailable", Outcome.BUSY),
    ],
)
def test_an_error_status_counts_although_its_body_is_cut_short(make_futwork, status, outcome):
    head = f"HTTP/1.1 {status}\r\nContent-Length: 900\r\nRetry-After: 7\r\n\r\n".encode()
    with raw_server(partly(head + b'{"message":"no', then=nothing)) as server:
        [answer] = post(make_futwork(server.url))
    assert (answer.outcome, answer.http_status) == (outcome, int(status[:3]))
    assert answer.retry_after == timedelta(seconds=7)


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "303 See Other", "307 T", "308 P", "300 M"])
def test_a_redirect_is_not_followed_and_the_key_goes_nowhere_else(make_futwork, status):
    with raw_server(answering(("200 OK", b"{}"))) as elsewhere:
        location = f"Location: http://127.0.0.1:{elsewhere.port}/api/other"
        with raw_server(answering((status, b"moved", location))) as server:
            [answer] = post(make_futwork(server.url))
            assert (answer.outcome, answer.http_status) == (Outcome.REFUSED_CAMPAIGN, int(status[:3]))
            assert (server.connections, elsewhere.connections) == (1, 0)


@pytest.mark.parametrize("location", ["http://[bad", "http://", "//", "\x7f", "http://a:b:c/"])
def test_a_redirect_to_nonsense_is_a_refused_campaign_too(make_futwork, location):
    with raw_server(answering(("302 Found", b"", f"Location: {location}"))) as server:
        [answer] = post(make_futwork(server.url))
    assert answer.outcome is Outcome.REFUSED_CAMPAIGN


@pytest.mark.parametrize("status", ["200 OK", "302 Found", "422 Unprocessable"])
def test_a_huge_body_is_not_read_to_its_end(make_futwork, status):
    sent = [0]

    def handle(peer):
        peer.request()
        peer.send(f"HTTP/1.1 {status}\r\nLocation: /\r\nContent-Length: 2000000000\r\n\r\n".encode())
        while sent[0] < 200_000_000:
            peer.send(b"x" * 100_000)
            sent[0] += 100_000

    with raw_server(handle) as server:
        [answer] = post(make_futwork(server.url))
        assert answer.http_status == int(status[:3])
    assert answer.duration < timedelta(seconds=3)
    assert sent[0] < 50_000_000  # what the sockets' buffers took
    assert len(answer.excerpt) <= EXCERPT_CHARACTERS + len("HTTP 200 ")


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("Retry-After: 7", 7, 7),
        ("Retry-After: 999999999999", 50, 50),
        ("Retry-After: soon", None, None),
        ("X-Other: 7", None, None),
        ("Retry-After: in forty seconds", 30, 40),
    ],
)
def test_a_429_says_how_long_to_wait_up_to_the_cap(make_futwork, header, low, high):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    header = header.replace("in forty seconds", date)
    with raw_server(answering(("429 Too Many Requests", b"{}", header))) as server:
        [answer] = post(make_futwork(server.url, retry_after_cap_seconds=50))
    assert answer.outcome is Outcome.THROTTLED
    if low is None:
        assert answer.retry_after is None
    else:
        assert timedelta(seconds=low) <= answer.retry_after <= timedelta(seconds=high)
