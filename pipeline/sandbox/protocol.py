"""HTTP/1.1 on one connection: keep-alive, pipelining in order, and the ways to leave a client without an answer."""

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import unquote

import httptools

from pipeline.sandbox.answers import error_body
from pipeline.sandbox.reception import Reply

_LARGEST_BODY_BYTES = 1 << 20
_LONGEST_QUEUE = 64  # requests that a client may pipeline before the sandbox stops reading from it

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, for 0 seconds


class Request(NamedTuple):
    """A request as it was read; *body* is None when it was larger than the sandbox takes."""

    method: str
    path: str
    api_key: str
    content_type: str
    body: bytes | None
    keep_alive: bool


class Document(NamedTuple):
    """An answer of the `/_…` endpoints: sent at once and piece by piece."""

    status: int
    content_type: str
    pieces: Iterator[bytes]


class Host(Protocol):
    """What a connection needs from the sandbox that it belongs to."""

    connections: set["Connection"]

    def submit(self, campaign_id: str, request: Request) -> Reply:
        """Take the POST of a lead."""

    def control(self, request: Request) -> Document | None:
        """Answer a request to a `/_…` endpoint, None when there is no such endpoint."""


class Connection(asyncio.Protocol):
    """One client's connection; it answers one request at a time, in the order of their arrival."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._answering = False
        self._reading = False
        self._timer: asyncio.TimerHandle | None = None
        self._pieces: Iterator[bytes] | None = None
        self._writable = True
        self._keep_alive = True
        self._forget_message()

    # From asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._host.connections.add(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._keep_alive = False
            self._write(400, error_body("Request is not HTTP/1.1"))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (asyncio's signature)
        self._host.connections.discard(self)
        self._waiting.clear()
        self._answering = True  # nothing that is read from now on gets an answer
        if self._timer is not None:
            self._timer.cancel()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        if self._pieces is not None and self._write_pieces():
            self._finish()
            self._answer_waiting()

    # From the parser.

    def on_message_begin(self) -> None:
        self._forget_message()
        self._reading = True

    def _forget_message(self) -> None:
        self._url = b""
        self._api_key = ""
        self._content_type = ""
        self._expects = False
        self._body: list[bytes] = []
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"x-api-key":
                self._api_key = value.decode("latin-1")
            case b"content-type":
                self._content_type = value.decode("latin-1")
            case b"expect":
                self._expects = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        if self._expects and not self._answering:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= _LARGEST_BODY_BYTES:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._reading = False
        self._waiting.append(
            Request(
                method=self._parser.get_method().decode("latin-1"),
                path=self._url.partition(b"?")[0].decode("latin-1"),
                api_key=self._api_key,
                content_type=self._content_type,
                body=b"".join(self._body) if self._body_bytes <= _LARGEST_BODY_BYTES else None,
                keep_alive=self._parser.should_keep_alive(),
            )
        )
        self._answer_waiting()
        if len(self._waiting) >= _LONGEST_QUEUE:
            self._transport.pause_reading()

    # From the sandbox.

    def close_if_idle(self) -> None:
        """Close the connection, unless a request is being read or answered."""
        if not self._answering and not self._reading:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection whatever it is doing."""
        self._transport.abort()

    def _answer_waiting(self) -> None:
        while self._waiting and not self._answering and not self._transport.is_closing():
            request = self._waiting.popleft()
            self._answering = True
            self._keep_alive = request.keep_alive
            self._answer(request)
        if len(self._waiting) < _LONGEST_QUEUE and not self._transport.is_closing():
            self._transport.resume_reading()

    def _answer(self, request: Request) -> None:
        parts = request.path.split("/")
        if len(parts) == 5 and parts[1] == "api" and parts[2] == "campaigns" and parts[3] and parts[4] == "leads":
            if request.method != "POST":
                self._send(405, error_body("Method not allowed"), extra=b"Allow: POST\r\n")
            else:
                self._follow(self._host.submit(unquote(parts[3]), request))
            return
        document = self._host.control(request)
        if document is None:
            self._send(404, error_body("Not found"))
        else:
            self._send_document(document)

    def _follow(self, reply: Reply) -> None:
        if reply.ending == "silence":
            return
        if reply.delay > 0:
            self._timer = asyncio.get_running_loop().call_later(reply.delay, self._follow_later, reply)
        elif reply.ending == "reset":
            self._reset()
        else:
            extra = b"" if reply.retry_after is None else f"Retry-After: {reply.retry_after}\r\n".encode()
            self._send(reply.status, reply.body, extra=extra)

    def _follow_later(self, reply: Reply) -> None:
        self._timer = None
        self._follow(reply._replace(delay=0.0))
        self._answer_waiting()

    def _reset(self) -> None:
        wire: Any = self._transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._transport.abort()

    def _send(self, status: int, body: bytes, *, extra: bytes = b"") -> None:
        self._write(status, body, extra=extra)
        self._finish()

    def _write(self, status: int, body: bytes, *, extra: bytes = b"") -> None:
        kind = b"Content-Type: application/json; charset=utf-8\r\n" if body else b""
        close = b"" if self._keep_alive else b"Connection: close\r\n"
        head = b"%b%b%b%bContent-Length: %d\r\n\r\n" % (_STATUS_LINES[status], kind, extra, close, len(body))
        self._transport.write(head + body)

    def _send_document(self, document: Document) -> None:
        close = b"" if self._keep_alive else b"Connection: close\r\n"
        kind = document.content_type.encode()
        self._transport.write(
            b"%bContent-Type: %b\r\n%bTransfer-Encoding: chunked\r\n\r\n"
            % (_STATUS_LINES[document.status], kind, close)
        )
        self._pieces = document.pieces
        if self._write_pieces():
            self._finish()

    def _write_pieces(self) -> bool:
        """Write as much as the client takes; returns whether that was all."""
        while self._writable and self._pieces is not None:
            piece = next(self._pieces, None)
            if piece is None:
                self._pieces = None
                self._transport.write(b"0\r\n\r\n")
            elif piece:
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return self._pieces is None

    def _finish(self) -> None:
        self._answering = False
        if not self._keep_alive:
            self._transport.close()
