"""Clients that send slowly, or never end: none of them keeps a good one from its answer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.integration.test_web import TOKEN, Server, event, serve
from tests.waiting import patience

__all__ = ["serve"]

SLOW = 20  # clients of each kind; ten for each thread of the server
HEAD = f"POST /webhooks/futwork HTTP/1.1\r\nHost: x\r\nx-api-key: {TOKEN}\r\nContent-Length: %d\r\n\r\n"

KINDS = {
    "says nothing": b"",
    "stops within the head": b"POST /webhooks/futwork HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "has no token and no body": b"POST /webhooks/futwork HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
    "has a token and no body": (HEAD % 1000).encode(),
    "has a token and no large body": (HEAD % 200_000).encode(),
    "does not close": b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "reads no answer": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
}


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=patience())


def answer(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.fixture
def hurried(tmp_path: Path, serve: Callable[..., Server]) -> Server:
    """A server of two threads, with the deadlines of the deployed one cut to a second."""
    (tmp_path / "hurried.py").write_text(
        "from pipeline.web import serving\nserving.BODY_SECONDS = 1.0\nfrom pipeline.web.wsgi import app as app\n"
    )
    arguments = ["--threads", "2", "--head-seconds", "1"]
    return serve(*arguments, app="hurried:app", WEB_CONCURRENCY="1", PYTHONPATH=str(tmp_path))


def test_no_number_of_slow_clients_holds_the_threads(serve: Callable[..., Server]) -> None:
    server = serve("--threads", "2", WEB_CONCURRENCY="1")
    with contextlib.ExitStack() as stack:
        for sent in KINDS.values():
            for _ in range(SLOW):
                client = stack.enter_context(connect(server))
                client.sendall(sent)
            assert server.post_event().status == 200
        assert [server.post_event(number).status for number in range(20)] == [200] * 20


def test_a_request_has_bounds_in_time_and_in_size(hurried: Server) -> None:
    """Of one that does not arrive in time, the head ends by a closed connection, a body with a token by a 408."""
    server = hurried
    with connect(server) as silent, connect(server) as head, connect(server) as small, connect(server) as large:
        head.sendall(b"POST /webhooks/futwork HTTP/1.1\r\nHost")
        small.sendall((HEAD % 5000).encode() + b'{"callSid": "never ended"')
        large.sendall((HEAD % 500_000).encode() + b'{"callSid": "never ended"')
        for client in (silent, head):
            with contextlib.suppress(ConnectionResetError):
                assert answer(client) == b""
        for said in map(answer, (small, large)):
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b"the body did not arrive whole in time" in said
    assert server.spooled() == 0

    for name, (sent, status) in HEADS.items():
        with connect(server) as client:
            client.sendall(sent)
            assert answer(client).split()[1] == status, name

    whole = (HEAD % len(event(1))).encode() + event(1)
    with connect(server) as client:  # in pieces it is a request all the same
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (whole[start : start + 7] for start in range(0, len(whole), 7)):
            client.sendall(piece)
        assert client.recv(12) == b"HTTP/1.1 200"
    with connect(server) as client:  # and several at once are answered in turn
        client.sendall(whole * 3 + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer(client).count(b"HTTP/1.1 200 OK") == 4
    assert server.spooled() == 4
    assert "Traceback" not in server.log.read_text()


ANSWERS = """
from flask import Flask, send_file

app = Flask(__name__)
for name, answer in {
    "healthz": lambda: "well",
    "short": lambda: "short",
    "none": lambda: ("", 204),
    "long": lambda: b"x" * 20_000_000,
    "parts": lambda: (b"x" * 8192 for _ in range(1000)),
    "file": lambda: send_file(__file__.replace("answers.py", "large")),
}.items():
    app.get(f"/{name}", endpoint=name)(answer)
"""


@pytest.fixture
def answering(tmp_path: Path, serve: Callable[..., Server]) -> Server:
    """Our server with one thread before an app that gives all kinds of answers."""
    (tmp_path / "answers.py").write_text(ANSWERS)
    (tmp_path / "large").write_bytes(b"x" * 8_000_000)
    return serve("--threads", "1", app="answers:app", WEB_CONCURRENCY="1", PYTHONPATH=str(tmp_path))


def ask(client: socket.socket, name: str, *more: str) -> None:
    client.sendall("\r\n".join([f"GET /{name} HTTP/1.1", "Host: x", *more, "", ""]).encode())


def test_an_answer_goes_out_whole_however_it_is_taken(answering: Server) -> None:
    """A short one in one piece; a long one, in parts or from a file, also to a client that takes it in small bites."""
    with connect(answering) as client:
        for _ in range(2):
            ask(client, "short")
            assert client.recv(65536).endswith(b"\r\n\r\nshort")
        ask(client, "none", "Connection: close")
        assert answer(client).endswith(b"\r\n\r\n")
    for name in ("parts", "file"):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", answering.port))
            ask(client, name, "Connection: close")
            taken = b"".join(iter(partial(client.recv, 3000), b""))
        assert taken.count(b"x" * 8192 if name == "parts" else b"x") >= 1000, name
        assert taken.endswith(b"x" * 8_000_000), name


def test_a_client_that_takes_no_answer_holds_no_thread(answering: Server) -> None:
    with connect(answering) as idle, connect(answering) as client:
        ask(idle, "long")
        assert idle.recv(12) == b"HTTP/1.1 200"
        ask(client, "short")
        assert client.recv(65536).endswith(b"short")


_ASK = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
HEADS = {
    "a head without an end": (_ASK + b"X-Long: " + b"a" * 40_000, b"431"),
    "many fields": (_ASK + b"A: b\r\n" * 120 + b"\r\n", b"431"),
}
