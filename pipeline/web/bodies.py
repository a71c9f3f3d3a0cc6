"""The body of a request, bounded whether or not it says its length."""

from __future__ import annotations

import zlib
from typing import BinaryIO

from flask import request
from werkzeug.exceptions import (
    BadRequest,
    ClientDisconnected,
    RequestEntityTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
)

_PIECE_BYTES = 64 * 1024
_PATIENCE_BYTES = 64 * 1024 * 1024


def read_body(most_bytes: int) -> bytes:
    """The body as it came; raises `RequestEntityTooLarge` if it has more than *most_bytes*.

    Raises `RequestTimeout` if the client stopped sending, or sends too slowly for the server (`pipeline.web.serving`).

    Most clients send all before they read anything, and a server that closes on them makes them see a broken pipe
    in the place of the 413. So what is too much is read to its end, within reason, and dropped.
    """
    length = request.environ.get("CONTENT_LENGTH", "")
    says_length = length.isdecimal() and len(length) < 12 and "HTTP_TRANSFER_ENCODING" not in request.environ
    try:
        if says_length and int(length) <= most_bytes:
            return _read_exactly(int(length))
        # One more than allowed: of a body without a length, Werkzeug hands out that much and is silent about the rest.
        request.max_content_length = most_bytes + 1
        body = request.get_data(cache=False)
        if len(body) > most_bytes:
            raise RequestEntityTooLarge
    except RequestEntityTooLarge:
        _drop_rest()
        raise
    except ClientDisconnected:
        raise RequestTimeout("the body did not arrive whole in time") from None
    return body


def unpack(body: bytes, most_bytes: int) -> bytes:
    """The body without the request's `Content-Encoding` (gzip, deflate, or several), never more than *most_bytes*.

    A body that is JSON as it stands is returned unchanged: some relays unpack it and leave the header. Raises
    `UnsupportedMediaType` for another encoding, `RequestEntityTooLarge` for what unpacks to more, and `BadRequest` for
    what is cut off or is not in that encoding.
    """
    if not (encoding := request.environ.get("HTTP_CONTENT_ENCODING")) or body.lstrip()[:1] in (b"{", b"["):
        return body
    for name in reversed([part.strip().lower() for part in encoding.split(",")]):
        if name in ("", "identity"):
            continue
        if name not in ("gzip", "x-gzip", "deflate"):
            raise UnsupportedMediaType("send the body unpacked, or with Content-Encoding gzip or deflate")
        # Some senders write a deflate stream without the head that HTTP wants; its first byte shows which it is.
        has_head = name != "deflate" or (body[:1] and body[0] & 15 == zlib.DEFLATED)
        unpacking = zlib.decompressobj(32 + zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS)
        try:
            body = unpacking.decompress(body, most_bytes + 1)
        except zlib.error:
            raise BadRequest(f"the body is not in its Content-Encoding, {name}") from None
        if len(body) > most_bytes:
            raise RequestEntityTooLarge
        if not unpacking.eof:
            raise BadRequest(f"the body is cut off within its Content-Encoding, {name}")
    return body


def _read_exactly(length: int) -> bytes:
    """A body whose length is known: as Werkzeug reads it, without its layers, which cost 20 µs a request."""
    stream: BinaryIO = request.environ["wsgi.input"]
    body = b""
    while len(body) < length:
        try:
            piece = stream.read(length - len(body))
        except (OSError, ValueError):  # the client is gone, or the server gave it up
            raise ClientDisconnected from None
        if not piece:
            raise ClientDisconnected
        body = body + piece if body else piece
    return body


def _drop_rest() -> None:
    # Without a length, only a server that ends the stream by itself lets a reader stop in time.
    ends = bool(request.environ.get("wsgi.input_terminated"))
    left = _PATIENCE_BYTES if ends else min(request.content_length or 0, _PATIENCE_BYTES)
    stream: BinaryIO = request.environ["wsgi.input"]
    while left > 0:
        try:
            piece = stream.read(min(left, _PIECE_BYTES))
        except OSError:
            return  # gone, or too slow: it will not read the answer either
        if not piece:
            return
        left -= len(piece)
