"""The one seam to Futwork over real sockets: whatever the other side does, each claim ends in the right outcome."""

import contextlib
import logging
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from pipeline.domain.lead import Outcome
from pipeline.futwork import EXCERPT_CHARACTERS, Futwork
from pipeline.sandbox.options import Options
from pipeline.sandbox.server import run_in_thread
from tests.conftest import CAMPAIGN, make_claim
from tests.raw_server import raw_server

KEY = "a-key-that-must-not-show"
LEAD_ID = "68ecc93cd9fbecbe9431a2a1"


@pytest.fixture(params=["requests", "curl"])
def engine(request):
    """Each engine in turn: all that is promised here holds for both."""
    if request.param == "curl":
        pytest.importorskip("pycurl")
    return request.param


@pytest.fixture
def make_futwork(make_settings, engine):
    made = []

    def make(url, **overrides):
        values = {
            "futwork_base_url": url,
            "futwork_api_key": KEY,
            "futwork_http_engine": engine,
            "dispatch_concurrency": 1,
            "connect_timeout_seconds": 1.0,
            "read_timeout_seconds": 1.0,
        }
        made.append(Futwork(make_settings(**(values | overrides))))
        return made[-1]

    yield make
    for futwork in made:
        futwork.close()


def post(futwork, *claims, account="default", seconds=8):
    """The answers of claims, in the order of the claims."""
    claims = claims or (make_claim(),)
    futwork.send(claims, account=account)
    answers, deadline = [], time.monotonic() + seconds
    while len(answers) < len(claims):
        assert time.monotonic() < deadline, f"only {len(answers)} answers came"
        answers += futwork.receive(wait=0.2)
    order = [claim.token for claim in claims]
    return sorted(answers, key=lambda answer: order.index(answer.claim.token))


def answering(*replies):
    """A handler that gives each connection's requests these replies in turn, the last one ever after."""

    def handle(peer):
        turn = 0
        while peer.request():
            peer.answer(*replies[min(turn, len(replies) - 1)])
            turn += 1

    return handle


# What goes out


def test_the_request_is_that_of_the_guide(make_futwork):
    seen = []

    def handle(peer):
        seen.append(peer.request())
        peer.answer("201 Created", b'{"leadId":"%b"}' % LEAD_ID.encode())

    with raw_server(handle) as server:
        claim = make_claim(phone="+919999789877", data='{"customer_name":"abcd xyz","place":"ABC"}')
        [answer] = post(make_futwork(server.url), claim)

    head, _, body = seen[0].partition(b"\r\n\r\n")
    line, *headers = head.decode().split("\r\n")
    assert line == f"POST /api/campaigns/{CAMPAIGN}/leads HTTP/1.1"
    assert dict(header.split(": ", 1) for header in headers) == {
        "Host": f"127.0.0.1:{server.port}",
        "Accept-Encoding": "identity",
        "x-api-key": KEY,
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "futwork-lead-pipeline",
        "Content-Length": str(len(body)),
    }
    assert body == b'{"recipientPhoneNumber":"9999789877","recipientData":{"customer_name":"abcd xyz","place":"ABC"}}'
    assert (answer.outcome, answer.http_status, answer.futwork_lead_id) == (Outcome.ACCEPTED, 201, LEAD_ID)
    assert answer.excerpt == ""
    assert timedelta() < answer.duration < timedelta(seconds=5)


def test_each_account_has_its_own_key_and_no_cookie_crosses_over(make_futwork):
    seen = []

    def handle(peer):
        while request := peer.request():
            seen.append(request)
            peer.answer("200 OK", b"{}", "Set-Cookie: session=north")

    with raw_server(handle) as server:
        futwork = make_futwork(server.url, futwork_api_keys="north=k-north,south=k-south")
        for account in ("north", "south"):
            post(futwork, account=account)
    assert [b"x-api-key: k-north" in request for request in seen] == [True, False]
    assert [b"x-api-key: k-south" in request for request in seen] == [False, True]
    assert not any(b"ookie" in request for request in seen)


def test_proxies_and_credentials_of_the_environment_are_ignored(make_futwork, monkeypatch, tmp_path):
    with raw_server(answering(("200 OK", b"{}"))) as proxy, raw_server(answering(("200 OK", b"{}"))) as server:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{proxy.port}")
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        [answer] = post(make_futwork(server.url))
        assert (answer.outcome, proxy.connections, server.connections) == (Outcome.ACCEPTED, 0, 1)


def test_connections_are_kept_alive(make_futwork):
    with raw_server(answering(("200 OK", b"{}"))) as server:
        futwork = make_futwork(server.url)
        answers = [post(futwork, make_claim(number))[0] for number in range(20)]
        assert Counter(answer.outcome for answer in answers) == {Outcome.ACCEPTED: 20}
        assert server.connections == 1


# Not sent: no byte of the request left


def not_sent(answer):
    return (answer.outcome, answer.http_status) == (Outcome.NOT_SENT, None)


def test_a_refused_connection_is_not_sent(make_futwork):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    [answer] = post(make_futwork(f"http://127.0.0.1:{port}/api"))
    assert not_sent(answer)
    assert answer.excerpt == "the connection was refused or could not be made"


def test_a_host_name_without_an_address_is_not_sent(make_futwork):
    [answer] = post(make_futwork("http://nonexistent.invalid/api"), seconds=40)
    assert not_sent(answer)
    assert answer.excerpt == "the host name could not be resolved"


def test_a_connection_that_is_not_made_in_time_is_not_sent(make_futwork):
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # fill the queue of connections, so that the system leaves the next one waiting
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        [answer] = post(make_futwork(url, connect_timeout_seconds=0.3))
    assert not_sent(answer)
    assert answer.excerpt == "no connection within the time allowed"


def test_a_tls_handshake_that_fails_sends_no_byte_of_the_request(make_futwork):
    received = []

    def handle(peer):
        received.append(peer.sock.recv(65536))
        peer.answer("400 Bad Request", b"plain HTTP here")
        received.append(peer.sock.recv(65536))

    with raw_server(handle) as server:
        [answer] = post(make_futwork(server.url.replace("http:", "https:")))
    assert not_sent(answer)
    assert answer.excerpt == "TLS failed"
    assert received[0][:1] == b"\x16"  # a TLS hello
    assert not any(b"POST" in piece or KEY.encode() in piece for piece in received)


@pytest.fixture
def self_signed(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
             "-keyout", key, "-out", certificate],
            check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("openssl is not there")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


def test_a_certificate_that_nobody_vouches_for_is_not_sent(make_futwork, self_signed, monkeypatch):
    context, _ = self_signed
    monkeypatch.setenv("CURL_CA_BUNDLE", "")  # it would switch verification off in some versions of requests
    received = []
    with raw_server(lambda peer: received.append(peer.request()), tls=context) as server:
        [answer] = post(make_futwork(server.url))
        assert server.connections == 1
    assert not_sent(answer)
    assert answer.excerpt == "the server's certificate could not be verified"
    assert received in ([], [b""])


def test_over_tls_the_outcomes_are_the_same(make_futwork, self_signed):
    context, certificate = self_signed
    endings = [
        lambda peer: peer.answer("200 OK", b'{"id":"7"}'),
        lambda peer: peer.answer("200 OK", b'{"id":"8"}'),
        lambda peer: peer.reset(),
        lambda peer: peer.hang(),
        lambda peer: peer.drip(b"HTTP/1.1 200 OK\r\n" + b"x-drip: 1\r\n" * 1000, 0.05),
    ]
    turns = iter(endings)

    def handle(peer):
        while peer.request():
            next(turns)(peer)

    with raw_server(handle, tls=context) as server:
        futwork = make_futwork(server.url, read_timeout_seconds=0.4, futwork_ca_file=certificate)
        answers = [post(futwork)[0] for _ in endings]
    assert [answer.outcome for answer in answers] == [Outcome.ACCEPTED] * 2 + [Outcome.UNCERTAIN] * 3
    assert server.connections == 1 + 2  # one kept alive until it was reset; one that hung; one that dripped


def test_a_tls_handshake_that_hangs_is_not_sent(make_futwork):
    with raw_server(lambda peer: peer.hang()) as server:
        started = time.monotonic()
        [answer] = post(make_futwork(server.url.replace("http:", "https:"), connect_timeout_seconds=0.3))
    assert not_sent(answer)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("engine", ["requests"], indirect=True)  # libcurl looks names up by itself, and bounds it
def test_connecting_that_takes_too_long_in_all_is_not_sent(make_futwork, monkeypatch):
    resolve = socket.getaddrinfo

    def resolve_slowly(*args, **kwargs):
        threading.Event().wait(0.4)  # the name lookup knows no timeout of its own
        return resolve(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_slowly)
    with raw_server(answering(("200 OK", b"{}"))) as server:
        [answer] = post(make_futwork(server.url, connect_timeout_seconds=0.3))
    assert not_sent(answer)
    assert answer.excerpt == "no connection within the time allowed"


def test_a_claim_near_its_end_is_not_sent(make_futwork):
    with raw_server(answering(("200 OK", b"{}"))) as server:
        futwork = make_futwork(server.url, read_timeout_seconds=5)
        soon = make_claim(1, expires_at=datetime.now(UTC) + timedelta(seconds=4.5))
        over = make_claim(2, expires_at=datetime.now(UTC) - timedelta(seconds=60))
        fresh = make_claim(3)
        answers = post(futwork, soon, over, fresh)
        assert [answer.outcome for answer in answers] == [Outcome.NOT_SENT, Outcome.NOT_SENT, Outcome.ACCEPTED]
        assert answers[0].excerpt == answers[1].excerpt == "the claim was too old to be sent safely"
        received = [peer.read for peer in server.peers]
    assert b"".join(received) == b""  # one request came, and its handler took it


def test_a_claim_that_grew_old_while_connecting_is_not_sent(make_futwork, self_signed):
    context, certificate = self_signed
    received = []

    def handle(peer):
        peer.stopping.wait(0.6)  # before the handshake
        with context.wrap_socket(peer.sock, server_side=True) as wrapped:
            received.append(wrapped.recv(65536))

    with raw_server(handle) as server:
        url = server.url.replace("http:", "https:")
        futwork = make_futwork(url, connect_timeout_seconds=5, futwork_ca_file=certificate)
        claim = make_claim(expires_at=datetime.now(UTC) + timedelta(seconds=1.4))
        [answer] = post(futwork, claim)
    assert not_sent(answer)
    assert answer.excerpt == "the claim was too old to be sent safely"
    assert received in ([], [b""])


@pytest.mark.parametrize("broken", [{"phone": "not a number"}, {"data": "no JSON"}])
def test_a_claim_that_cannot_be_written_is_answered_all_the_same(make_futwork, broken):
    with raw_server(answering(("200 OK", b"{}"))) as server:
        futwork = make_futwork(server.url, reference_key="our_ref")
        answers = post(futwork, make_claim(1, **broken), make_claim(2))
        assert [answer.outcome for answer in answers] == [Outcome.NOT_SENT, Outcome.ACCEPTED]
        assert answers[0].excerpt in ("unexpected InvalidPhone", "unexpected JSONDecodeError")
        assert server.connections == 1


# Uncertain: it may have arrived


def partly(data, *, then):
    def handle(peer):
        peer.request()
        peer.send(data)
        then(peer)

    return handle


def nothing(peer):
    """Close the connection."""


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
        futwork = make_futwork(server.url, connect_timeout_seconds=0.3, read_timeout_seconds=0.6)
        started = time.monotonic()
        [answer] = post(futwork)
        took = time.monotonic() - started
    assert answer.outcome is outcome
    assert 0.55 < took < 1.5
    assert 0.55 < answer.duration.total_seconds() < 1.5


def test_a_request_that_is_not_taken_in_time_holds_no_thread(make_futwork):
    release = threading.Event()

    def handle(peer):
        release.wait(10)  # reads nothing; what the system buffers is smaller than the request

    with raw_server(handle) as server:
        server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        futwork = make_futwork(server.url, connect_timeout_seconds=5, read_timeout_seconds=0.6)
        started = time.monotonic()
        [answer] = post(futwork, make_claim(data='{"long":"' + "x" * 8_000_000 + '"}'))
        took = time.monotonic() - started
        release.set()
    assert answer.outcome is Outcome.UNCERTAIN
    assert answer.excerpt == "no answer within the time allowed"
    assert took < 2


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
        [answer] = post(make_futwork(server.url, read_timeout_seconds=5))
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


# One answer for one request


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_an_interim_answer_is_passed_over(make_futwork, interim):
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
            assert surplus.wait(5)
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
    def handle(peer):
        while peer.request():
            peer.stopping.wait(0.45)
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        futwork = make_futwork(server.url, read_timeout_seconds=0.9)
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
    seen += post(make_futwork("http://nonexistent.invalid/api"), seconds=40)
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
        futwork = make_futwork(sandbox.url, dispatch_concurrency=8, read_timeout_seconds=10)
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


def test_receiving_with_nothing_out_returns_at_once(make_futwork):
    futwork = make_futwork("http://127.0.0.1:9/api")
    started = time.monotonic()
    assert futwork.receive(wait=5) == []
    assert time.monotonic() - started < 1


def test_closing_finishes_what_is_out_and_ends_the_threads(make_settings, engine):
    def handle(peer):
        while peer.request():
            peer.stopping.wait(0.1)
            peer.answer("200 OK", b"{}")

    with raw_server(handle) as server:
        before = threading.active_count()
        settings = make_settings(
            futwork_base_url=server.url, futwork_api_key=KEY, futwork_http_engine=engine, dispatch_concurrency=4
        )
        futwork = Futwork(settings)
        futwork.send([make_claim(number) for number in range(8)], account="default")
        futwork.close()
        answers = futwork.receive(wait=0)
        assert Counter(answer.outcome for answer in answers) == {Outcome.ACCEPTED: 8}
        assert futwork.in_flight == 0
        assert not any(thread.name.startswith("futwork-") for thread in threading.enumerate())
        assert threading.active_count() <= before + server.connections
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
        futwork = make_futwork(sandbox.url, dispatch_concurrency=6, read_timeout_seconds=0.5 if fault == "stall" else 5)
        answers = post(futwork, *(make_claim(number) for number in range(6)))
        assert {answer.outcome for answer in answers} == outcomes
        taken = sum(entry["accepted"] for entry in sandbox.journal())
    if outcomes & {Outcome.FAILED, Outcome.BUSY, Outcome.REJECTED}:
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
