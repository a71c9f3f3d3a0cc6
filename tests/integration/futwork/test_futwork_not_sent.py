"""What goes out to Futwork, and when it is certain that nothing did."""

import contextlib
import socket
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.domain.lead import Outcome
from tests.conftest import CAMPAIGN, make_claim
from tests.integration.futwork.conftest import KEY, LEAD_ID, answering, not_sent, post
from tests.raw_server import raw_server
from tests.waiting import patience

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


def test_a_refused_connection_is_not_sent(make_futwork):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    [answer] = post(make_futwork(f"http://127.0.0.1:{port}/api"))
    assert not_sent(answer)
    assert answer.excerpt == "the connection was refused or could not be made"


def test_a_host_name_without_an_address_is_not_sent(make_futwork):
    [answer] = post(make_futwork("http://nonexistent.invalid/api"))
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
        seconds = patience(0.4)
        futwork = make_futwork(
            server.url, connect_timeout_seconds=seconds, read_timeout_seconds=seconds, futwork_ca_file=certificate
        )
        answers = [post(futwork)[0] for _ in endings]
    assert [answer.outcome for answer in answers] == [Outcome.ACCEPTED] * 2 + [Outcome.UNCERTAIN] * 3
    assert server.connections == 1 + 2  # one kept alive until it was reset; one that hung; one that dripped


def test_a_tls_handshake_that_hangs_is_not_sent(make_futwork):
    with raw_server(lambda peer: peer.hang()) as server:
        [answer] = post(make_futwork(server.url.replace("http:", "https:"), connect_timeout_seconds=0.3))
    assert not_sent(answer)
    assert "within the time allowed" in answer.excerpt


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
        futwork = make_futwork(url, read_timeout_seconds=1, futwork_ca_file=certificate)
        claim = make_claim(expires_at=datetime.now(UTC) + timedelta(seconds=1.4))
        [answer] = post(futwork, claim)
    assert not_sent(answer)
    assert answer.excerpt == "the claim was too old to be sent safely"
    assert not any(b"recipientPhoneNumber" in piece for piece in received)  # without it nobody knows whom to call


@pytest.mark.parametrize("broken", [{"phone": "not a number"}, {"data": "no JSON"}])
def test_a_claim_that_cannot_be_written_is_answered_all_the_same(make_futwork, broken):
    with raw_server(answering(("200 OK", b"{}"))) as server:
        futwork = make_futwork(server.url, reference_key="our_ref")
        answers = post(futwork, make_claim(1, **broken), make_claim(2))
        assert [answer.outcome for answer in answers] == [Outcome.NOT_SENT, Outcome.ACCEPTED]
        assert answers[0].excerpt in ("unexpected InvalidPhone", "unexpected JSONDecodeError")
        assert server.connections == 1
