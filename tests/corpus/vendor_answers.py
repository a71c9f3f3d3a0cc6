"""Raw answers to the POST of a lead, as servers, gateways and broken programs send them, each with its right outcome.

Every answer is given to both engines (`tests/integration/futwork/test_vendor_answers.py`). Where one of them can learn
less than the other, `differs` names it, with its outcome and the reason; such an outcome is always `uncertain`, which
sends nothing again.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, field

from pipeline.domain.lead import Outcome

ID = "68ecc93cd9fbecbe9431a2a1"
YES = b'{"success":true,"data":{"leadId":"%b"}}' % ID.encode()
NO = b'{"success":false,"message":"no"}'

ACCEPTED, REJECTED, BUSY, UNCERTAIN = Outcome.ACCEPTED, Outcome.REJECTED, Outcome.BUSY, Outcome.UNCERTAIN


@dataclass(frozen=True)
class RawAnswer:
    """One answer."""

    name: str
    raw: bytes
    outcome: Outcome
    lead_id: str | None = None
    retry_after: float | None = None
    """Seconds."""
    keeps: bool = False
    """Whether the server leaves the connection open, so that it may be used for the next lead."""
    differs: dict[str, tuple[Outcome, str]] = field(default_factory=dict)
    """Engine → its outcome, and why."""


def head(*lines: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    """A head."""
    return "".join(f"{line}\r\n" for line in (f"HTTP/{version} {status}", *lines, "")).encode("latin-1")


def whole(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    """An answer with its length."""
    return head(*lines, f"Content-Length: {len(body)}", status=status) + body


def chunked(body: bytes, *lines: str, trailers: bytes = b"", extension: bytes = b"", status: str = "200 OK") -> bytes:
    """An answer in two chunks."""
    chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in (body[:7], body[7:]) if part)
    return head(*lines, "Transfer-Encoding: chunked", status=status) + chunks + b"0\r\n" + trailers + b"\r\n"


_DEFLATE = zlib.compressobj(wbits=-15)
_RAW_DEFLATED = _DEFLATE.compress(YES) + _DEFLATE.flush()
_INTERIM = "http.client passes over 100 alone; it takes another interim answer for the answer"
_HEAD_CUT = "http.client drops the rest of a broken head, so without a length only JSON shows that the body is whole"

_STRICT = "libcurl refuses an answer that breaks this rule of HTTP"
_LINE_FEEDS = "http.client wants CRLF after a chunk"
_MANY = "http.client takes a hundred headers"
_LONG = "http.client takes any number for the length, libcurl passes over one that no file can have"

ANSWERS = [
    RawAnswer("plain", whole(YES), ACCEPTED, ID, keeps=True),
    # Framing
    RawAnswer("chunked", chunked(YES), ACCEPTED, ID, keeps=True),
    RawAnswer(
        "chunked, a trailer", chunked(YES, trailers=b"Server-Timing: total;dur=12\r\n"), ACCEPTED, ID, keeps=True
    ),
    RawAnswer(
        "chunked, trailers announced",
        chunked(YES, "Trailer: Server-Timing, X-Sum", trailers=b"Server-Timing: a\r\nX-Sum: 7\r\n"),
        ACCEPTED,
        ID,
        keeps=True,
    ),
    RawAnswer("a refusal with a trailer", chunked(NO, trailers=b"X-Sum: 7\r\n"), REJECTED, keeps=True),
    RawAnswer(
        "503 with a trailer that looks like a header",
        chunked(b"{}", "Retry-After: 7", trailers=b"Retry-After: 99\r\n", status="503 Busy"),
        BUSY,
        retry_after=7,
        keeps=True,
    ),
    RawAnswer("chunk extensions", chunked(YES, extension=b";name=value"), ACCEPTED, ID, keeps=True),
    RawAnswer("chunks without an end", chunked(YES)[:-5], UNCERTAIN),
    RawAnswer(
        "chunks that end within a trailer",
        chunked(YES, trailers=b"X-Sum: 7\r\n")[:-6],
        ACCEPTED,
        ID,
        differs={"curl": (UNCERTAIN, _STRICT)},
    ),
    RawAnswer(
        "chunk size that is no number", head("Transfer-Encoding: chunked") + b"xyz\r\n{}\r\n0\r\n\r\n", UNCERTAIN
    ),
    RawAnswer("until the connection closes", head("Connection: close") + YES, ACCEPTED, ID),
    RawAnswer(
        "HTML until the connection closes",
        head("Connection: close") + b"<html></html>",
        ACCEPTED,
        differs={"requests": (UNCERTAIN, _HEAD_CUT)},
    ),
    RawAnswer("HTTP/1.0", head(version="1.0") + YES, ACCEPTED, ID),
    RawAnswer(
        "HTTP/1.0 kept alive", whole(YES, "Connection: keep-alive").replace(b"1.1", b"1.0", 1), ACCEPTED, ID, keeps=True
    ),
    RawAnswer("no reason phrase", whole(YES, status="200"), ACCEPTED, ID, keeps=True),
    RawAnswer("no reason phrase but a blank", whole(YES, status="200 "), ACCEPTED, ID, keeps=True),
    RawAnswer("a reason phrase in Hindi", whole(YES).replace(b"OK", "ठीक".encode(), 1), ACCEPTED, ID, keeps=True),
    RawAnswer("line feeds alone", whole(YES).replace(b"\r\n", b"\n"), ACCEPTED, ID, keeps=True),
    RawAnswer(
        "chunked with line feeds alone",
        chunked(YES).replace(b"\r\n", b"\n"),
        ACCEPTED,
        ID,
        differs={"requests": (UNCERTAIN, _LINE_FEEDS)},
    ),
    RawAnswer("an empty body", whole(b""), ACCEPTED, keeps=True),
    RawAnswer("204", head(status="204 No Content"), ACCEPTED, keeps=True),
    RawAnswer(
        "201 without a body and without a length",
        head("Connection: close", status="201 Created"),
        ACCEPTED,
        differs={"requests": (UNCERTAIN, _HEAD_CUT)},
    ),
    RawAnswer("no byte at all", b"", UNCERTAIN),
    RawAnswer("an empty line", b"\r\n", UNCERTAIN),
    RawAnswer("the status line alone", b"HTTP/1.1 200 OK\r\n", UNCERTAIN),
    RawAnswer("a head that breaks off", head("X-A: b")[:-2], UNCERTAIN),
    RawAnswer("no HTTP", b"SSH-2.0-OpenSSH_9.6\r\n", UNCERTAIN),
    RawAnswer("HTTP/0.9", YES, UNCERTAIN),
    RawAnswer("a TLS alert", b"\x15\x03\x01\x00\x02\x02\x28", UNCERTAIN),
    RawAnswer("a status of two digits", whole(YES, status="20 OK"), UNCERTAIN),
    RawAnswer("a status of four digits", whole(YES, status="2000 OK"), UNCERTAIN),
    RawAnswer("a status from beyond", whole(YES, status="999 Denied"), UNCERTAIN),
    # Interim answers
    RawAnswer("100 before it", head(status="100 Continue") + whole(YES), ACCEPTED, ID, keeps=True),
    RawAnswer("100 three times before it", head(status="100 Continue") * 3 + whole(YES), ACCEPTED, ID, keeps=True),
    RawAnswer(
        "103 before it",
        head("Link: </a>", status="103 Early Hints") + whole(YES),
        ACCEPTED,
        ID,
        keeps=True,
        differs={"requests": (UNCERTAIN, _INTERIM)},
    ),
    RawAnswer(
        "102 before a refusal",
        head(status="102 Processing") + whole(NO),
        REJECTED,
        keeps=True,
        differs={"requests": (UNCERTAIN, _INTERIM)},
    ),
    RawAnswer("100 and nothing after it", head(status="100 Continue"), UNCERTAIN),
    RawAnswer("100 and half a head", head(status="100 Continue") + b"HTTP/1.1 200 OK\r\nX-A: b\r\n", UNCERTAIN),
    RawAnswer("101", head("Upgrade: websocket", status="101 Switching Protocols"), UNCERTAIN),
    # Headers
    RawAnswer("a folded header", whole(YES, "X-A: b\r\n  c\r\n\td"), ACCEPTED, ID, keeps=True),
    RawAnswer(
        "a folded Retry-After", whole(b"{}", "Retry-After:\r\n 7", status="503 Busy"), BUSY, retry_after=7, keeps=True
    ),
    RawAnswer("a header without a name", whole(YES, ": b"), ACCEPTED, ID),
    RawAnswer(
        "a header without a colon", whole(YES, "no colon here"), ACCEPTED, ID, differs={"curl": (UNCERTAIN, _STRICT)}
    ),
    RawAnswer("a header with a blank before its colon", whole(YES, "X-A : b"), ACCEPTED, ID),
    RawAnswer(
        "chunks announced after such a header",
        b"HTTP/1.1 200 OK\r\nX-A : b\r\n" + chunked(NO).partition(b"\r\n")[2],
        REJECTED,
        differs={"requests": (UNCERTAIN, _HEAD_CUT)},
    ),
    RawAnswer("ninety headers", whole(YES, *(f"X-{number}: y" for number in range(90))), ACCEPTED, ID, keeps=True),
    RawAnswer(
        "three hundred headers",
        whole(YES, *(f"X-{number}: y" for number in range(300))),
        ACCEPTED,
        ID,
        differs={"requests": (UNCERTAIN, _MANY)},
    ),
    RawAnswer("a header of 60 KB", whole(YES, "X-A: " + "y" * 60_000), ACCEPTED, ID, keeps=True),
    RawAnswer("a header of 400 KB", whole(YES, "X-A: " + "y" * 400_000), UNCERTAIN),
    RawAnswer("a header with bytes of Latin-1", whole(YES, "X-A: é\xff"), ACCEPTED, ID, keeps=True),
    RawAnswer("a header with a NUL", whole(YES, "X-A: a\0b"), ACCEPTED, ID, differs={"curl": (UNCERTAIN, _STRICT)}),
    RawAnswer("the length twice", whole(YES, f"Content-Length: {len(YES)}"), ACCEPTED, ID, keeps=True),
    RawAnswer("two lengths that differ", whole(YES, "Content-Length: 3"), UNCERTAIN),
    RawAnswer(
        "Retry-After twice",
        whole(b"{}", "Retry-After: 3", "Retry-After: 7", status="503 Busy"),
        BUSY,
        retry_after=7,
        keeps=True,
    ),
    # Lengths that lie
    RawAnswer("a length that is too long", head("Content-Length: 999") + YES, UNCERTAIN),
    RawAnswer("a length that is too short", head("Content-Length: 9") + YES, ACCEPTED),
    RawAnswer("a length of 0 before a body", head("Content-Length: 0") + YES, ACCEPTED),
    RawAnswer(
        "a length that is no number",
        head("Content-Length: many") + YES,
        ACCEPTED,
        ID,
        differs={"curl": (UNCERTAIN, _STRICT)},
    ),
    RawAnswer(
        "a length below zero", head("Content-Length: -5") + YES, ACCEPTED, ID, differs={"curl": (UNCERTAIN, _STRICT)}
    ),
    RawAnswer(
        "a length of sixty digits",
        head("Content-Length: " + "9" * 60) + YES,
        ACCEPTED,
        ID,
        differs={"requests": (UNCERTAIN, _LONG)},
    ),
    RawAnswer("a length beside chunks", chunked(YES, "Content-Length: 3"), ACCEPTED, ID),
    RawAnswer("a 400 that is cut short", head("Content-Length: 999", status="400 Bad Request") + b'{"me', REJECTED),
    RawAnswer("204 with a body", head("Content-Length: 2", status="204 No Content") + b"{}", ACCEPTED),
    # Encodings
    RawAnswer(
        "gzip that nobody asked for", whole(gzip.compress(YES), "Content-Encoding: gzip"), ACCEPTED, ID, keeps=True
    ),
    RawAnswer("gzip in chunks", chunked(gzip.compress(YES), "Content-Encoding: gzip"), ACCEPTED, ID, keeps=True),
    RawAnswer("a refusal in gzip", whole(gzip.compress(NO), "Content-Encoding: gzip"), REJECTED, keeps=True),
    RawAnswer("deflate", whole(zlib.compress(YES), "Content-Encoding: deflate"), ACCEPTED, ID, keeps=True),
    RawAnswer("deflate without its head", whole(_RAW_DEFLATED, "Content-Encoding: deflate"), ACCEPTED, ID, keeps=True),
    RawAnswer("gzip that is cut short", whole(gzip.compress(YES)[:-12], "Content-Encoding: gzip"), UNCERTAIN),
    RawAnswer("gzip of nothing", whole(b"", "Content-Encoding: gzip"), ACCEPTED, keeps=True),
    RawAnswer("gzip that is none", whole(YES, "Content-Encoding: gzip"), UNCERTAIN),
    RawAnswer("an encoding that nobody knows", whole(YES, "Content-Encoding: rot13"), ACCEPTED, ID),
    RawAnswer("an encoding named identity", whole(YES, "Content-Encoding: identity"), ACCEPTED, ID, keeps=True),
    RawAnswer("a charset as encoding", whole(NO, "Content-Encoding: utf-8"), REJECTED, keeps=True),
    RawAnswer(
        "two encodings",
        whole(gzip.compress(zlib.compress(NO)), "Content-Encoding: deflate, gzip"),
        REJECTED,
        keeps=True,
    ),
    RawAnswer("an encoding that cannot be unpacked", whole(b"\x8b\x00\x80{}\x03", "Content-Encoding: br"), UNCERTAIN),
    RawAnswer(
        "a packed body past the bound",
        whole(gzip.compress(b" " * 5_000_000), "Content-Encoding: gzip"),
        ACCEPTED,
        keeps=True,
    ),
    RawAnswer(
        "a 400 that cannot be unpacked", whole(b"no", "Content-Encoding: gzip", status="400 Bad"), REJECTED, keeps=True
    ),
    # Bodies
    RawAnswer("a byte order mark", whole(b"\xef\xbb\xbf" + YES), ACCEPTED, ID, keeps=True),
    RawAnswer("a refusal behind a byte order mark", whole(b"\xef\xbb\xbf" + NO), REJECTED, keeps=True),
    RawAnswer("UTF-16", whole(NO.decode().encode("utf-16")), REJECTED, keeps=True),
    RawAnswer("a raw line end in a text", whole(b'{"success":false,"message":"line\nline"}'), REJECTED, keeps=True),
    RawAnswer("NaN", whole(b'{"ok":false,"score":NaN}'), REJECTED, keeps=True),
    RawAnswer(
        "HTML",
        whole(b"<!doctype html><html><body>Welcome</body></html>", "Content-Type: text/html"),
        ACCEPTED,
        keeps=True,
    ),
    RawAnswer("half of a JSON", whole(YES[:20]), ACCEPTED, keeps=True),
    RawAnswer("bytes", whole(bytes(range(256))), ACCEPTED, keeps=True),
    RawAnswer("zeros", whole(b"\0" * 3000), ACCEPTED, keeps=True),
    RawAnswer("a bomb of brackets", whole(b"[" * 60_000), ACCEPTED, keeps=True),
    RawAnswer("a body past the bound", whole(b" " * 200_000 + YES), ACCEPTED),
]


def outcome_of(status: int) -> Outcome:
    """What each status means by itself, from the table in docs/state-machine.md."""
    single = {
        401: Outcome.REFUSED_KEY, 403: Outcome.REFUSED_KEY, 404: Outcome.REFUSED_CAMPAIGN, 429: Outcome.THROTTLED,
        408: UNCERTAIN, 502: UNCERTAIN, 504: UNCERTAIN, 520: UNCERTAIN, 524: UNCERTAIN, 598: UNCERTAIN, 599: UNCERTAIN,
        421: BUSY, 425: BUSY, 503: BUSY, 509: BUSY, 529: BUSY,
    }  # fmt: skip
    by_class = {2: ACCEPTED, 3: Outcome.REFUSED_CAMPAIGN, 4: REJECTED, 5: Outcome.FAILED}
    return single.get(status) or by_class[status // 100]
