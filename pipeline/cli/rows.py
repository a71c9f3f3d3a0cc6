"""Files of leads: CSV and JSON lines, read row by row in constant memory, whatever they hold.

A row that cannot be read is reported with its line, and does not affect the next row. Only a file that cannot be read
at all is an error.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Self

import orjson

from pipeline.cli.session import Refused

PHONE_COLUMNS = (
    "phone",
    "recipientphonenumber",
    "phonenumber",
    "mobile",
    "mobilenumber",
    "mobileno",
    "contact",
    "msisdn",
)
_DATA_FIELDS = ("data", "recipientData")
_SNIFF_BYTES = 64 * 1024
_LONGEST_ROW = 1024 * 1024  # characters; a longer row is an unclosed quote, or no row at all
_SHOWN = 2000  # characters of a row that cannot be read, in the file of refused rows
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_BOM = "\ufeff"
REFUSED_HEADER = ["line", "reason"]  # how a file of refused rows begins (`pipeline.cli.enqueue`)
_KNOWN_FORMATS = (
    (b"PK\x03\x04", "is an Excel workbook or a ZIP archive: save its sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "is an old Excel workbook: save its sheet as CSV (UTF-8)"),
    (b"\x1f\x8b", "is compressed: use `zcat FILE | pipeline enqueue - …`"),
    (b"%PDF", "is a PDF: give CSV or JSON lines"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: the line that it began on, and either the lead to be read or what is wrong with it."""

    line: int
    lead: object = None
    fault: str = ""
    source: Sequence[str] = ()
    """The row's fields as they stood in the file."""


class CountingReader(io.RawIOBase):
    """A binary file that counts the bytes read."""

    def __init__(self, file: BinaryIO, head: bytes) -> None:
        self._file = file
        self._head = head
        self.position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # a narrower buffer is all that io passes
        """Fill *buffer* from the part that was read before, then from the file."""
        if self._head:
            chunk, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        else:
            chunk = self._file.read(len(buffer))
        buffer[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)


@dataclass(frozen=True, slots=True)
class LeadFile:
    """An open file of leads, with what is known of it before the first row."""

    rows: Iterator[Row]
    columns: Sequence[str]
    """The header of a CSV; of JSON lines, one column that holds the line."""
    position: Callable[[], int]
    notes: Sequence[str]


def open_rows(
    file: BinaryIO,
    name: str,
    *,
    form: str | None,
    encoding: str | None,
    phone_column: str | None,
    key_column: str | None,
) -> LeadFile:
    """Detect the format and read the header; raises `Refused` if it is no file of leads.

    The iterator of its rows raises it too, if the file cannot be read further on.
    """
    head = file.read(_SNIFF_BYTES)
    if not head.strip(codecs.BOM_UTF8 + codecs.BOM_UTF16 + b" \t\r\n\0"):
        raise Refused(f"{name} is empty: there is nothing to enqueue")
    for magic, what in _KNOWN_FORMATS:
        if head.startswith(magic):
            raise Refused(f"{name} {what}")
    encoding = encoding or next((codec for bom, codec in _BOMS if head.startswith(bom)), "utf-8")
    sample = _decode(head, encoding, name).removeprefix(_BOM)
    if "\0" in sample:
        raise Refused(f"{name} is no text: give CSV or JSON lines (for UTF-16 without a mark, --encoding utf-16-le)")
    counter = CountingReader(file, head)
    # Bytes that the encoding does not know become lone surrogates, so that they spoil their row and not the file.
    text = io.TextIOWrapper(
        io.BufferedReader(counter, 256 * 1024), encoding=encoding, errors="surrogateescape", newline=""
    )
    lines = _Lines(text, encoding)
    form = form or _guess_form(name, sample)
    if form == "jsonl":
        rows = _guarded(_json_lines(lines, phone_column, key_column), name, encoding)
        return LeadFile(rows, ["row"], lambda: counter.position, ())
    return _open_csv(lines, sample, name, counter, encoding, phone_column, key_column)


class _BadLine(Exception):
    """A line cannot be part of a row; the message is the reason."""


class _Lines:
    """The lines of a text, numbered and of limited length; those of a row with an error can be returned to it."""

    def __init__(self, text: io.TextIOWrapper, encoding: str) -> None:
        self._text = text
        self._encoding = encoding
        self._returned: deque[str] = deque()
        self._row: list[str] = []
        self._size = 0
        self.number = 0
        """The line that was read last, from 1."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._returned.popleft() if self._returned else self._text.readline(_LONGEST_ROW)
        if not line:
            raise StopIteration
        if self.number == 0:
            line = line.removeprefix(_BOM)
        self.number += 1
        self._row.append(line)
        self._size += len(line)
        if self._size >= _LONGEST_ROW:
            if len(self._row) > 1:
                raise _BadLine(f'a quote (") that opens here is not closed within {_LONGEST_ROW:,} characters')
            self._skip_rest_of(line)
            raise _BadLine(f"longer than {_LONGEST_ROW:,} characters")
        if not line.isascii():
            self._check(line)
        return line

    def begin_row(self) -> int:
        """The number of the line that comes next, where a row begins."""
        self._row.clear()
        self._size = 0
        return self.number + 1

    def give_back(self) -> str:
        """Return the first line of the row with an error; reading continues at its second line."""
        first = self._row[0] if self._row else ""
        self._returned.extendleft(reversed(self._row[1:]))
        self.number -= max(0, len(self._row) - 1)
        return first

    def _skip_rest_of(self, line: str) -> None:
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(_LONGEST_ROW)

    def _check(self, line: str) -> None:
        try:
            line.encode()
        except UnicodeEncodeError:
            raise _BadLine(f"not {self._encoding} text; if others are so too, name the encoding") from None


def _open_csv(
    lines: _Lines,
    sample: str,
    name: str,
    counter: CountingReader,
    encoding: str,
    phone_column: str | None,
    key_column: str | None,
) -> LeadFile:
    csv.field_size_limit(2 * _LONGEST_ROW)  # the limit of a row applies first
    delimiter = _delimiter(sample)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(fields for fields in reader if any(field.strip() for field in fields))
        if len(header) == 2 and header[0].lower() == "sep=":  # Excel's own mark; its sign became the delimiter
            header = next(reader)
    except (csv.Error, StopIteration, _BadLine) as error:
        raise Refused(f"{name} is not CSV: its header cannot be read ({error or 'it ends there'})") from None
    header = [column.strip() for column in header]
    repeated = {column for column in header if header.count(column) > 1 and column}
    if repeated:
        raise Refused(f"{name} has two columns named {min(repeated)!r}: rename one")
    notes = []
    skipped = len(REFUSED_HEADER) if header[: len(REFUSED_HEADER)] == REFUSED_HEADER else 0
    if skipped:
        notes.append("this is a file of refused rows: its columns line and reason are left out")
    header = header[skipped:]
    phone = _find(header, phone_column, name, "--phone-column") or _guess_phone(header, name)
    key = _find(header, key_column, name, "--key-column")
    notes += _notes_on(header, key)
    rows = _guarded(_csv_rows(reader, lines, header, skipped, phone, key), name, encoding)
    return LeadFile(rows, header, lambda: counter.position, notes)


def _notes_on(header: list[str], key: str | None) -> Iterator[str]:
    if "leadId" in header and key != "leadId":
        yield (
            "the column leadId goes into recipientData, where some of Futwork's tools take it for their own id;"
            " rename it if that is not meant"
        )
    nameless = [str(place) for place, column in enumerate(header, start=1) if not column]
    if nameless:
        yield f"columns without a name are left out: the {', the '.join(nameless[:5])}. of {len(header)}"


def _csv_rows(
    reader: Iterator[list[str]], lines: _Lines, header: list[str], skipped: int, phone: str, key: str | None
) -> Iterator[Row]:
    phone_at, key_at, width = header.index(phone), header.index(key) if key else -1, len(header)
    data_at = [(column, at) for at, column in enumerate(header) if column and column not in (phone, key)]
    while True:
        line = lines.begin_row()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (csv.Error, _BadLine) as error:
            yield Row(line, fault=_csv_fault(error), source=[lines.give_back().strip()[:_SHOWN]])
            continue
        fields = fields[skipped:]
        while len(fields) > width and not fields[-1].strip():
            fields.pop()  # a delimiter at the end of a line adds no field
        if len(fields) != width:
            if any(field.strip() for field in fields):  # a blank line is no lead
                yield Row(line, fault=f"{len(fields)} fields, but the header names {width}", source=fields)
            continue
        if not any(field.strip() for field in fields):
            continue
        lead: dict[str, object] = {
            "phone": fields[phone_at].strip(),
            "data": {column: fields[at].strip() for column, at in data_at},
        }
        if key:
            lead["key"] = fields[key_at].strip()
            if not lead["key"]:
                yield Row(line, fault=f"{key}: empty, but it is the key column", source=fields)
                continue
        yield Row(line, lead=lead, source=fields)


def _csv_fault(error: Exception) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return 'not CSV: a quote (") that opens here is never closed'
    if "expected after" in text:
        return 'not CSV: text follows a closing quote ("); write a quote inside a field twice'
    return f"not CSV: {text}"


def _json_lines(lines: _Lines, phone_column: str | None, key_column: str | None) -> Iterator[Row]:
    while True:
        line = lines.begin_row()
        try:
            content = next(lines).strip()
        except StopIteration:
            return
        except _BadLine as error:
            yield Row(line, fault=str(error), source=[lines.give_back().strip()[:_SHOWN]])
            continue
        if not content:
            continue
        source = [content[:_SHOWN]]
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            hint = "; NaN and Infinity are no JSON" if "NaN" in content or "Infinity" in content else ""
            yield Row(line, fault=f"not JSON: {error}{hint}", source=source)
            continue
        if not isinstance(value, dict):
            yield Row(line, fault="not a JSON object", source=source)
            continue
        if key_column is not None and value.get(key_column) in (None, ""):
            yield Row(line, fault=f"{key_column}: missing, but it is the key", source=source)
            continue
        yield Row(line, lead=_shape(value, phone_column, key_column), source=source)


def _shape(value: dict[str, object], phone_column: str | None, key_column: str | None) -> dict[str, object]:
    """A JSON row as a lead: its data is the field `data`, with no other field left, or else all other fields."""
    phone = phone_column or phone_of(value) or "phone"
    key = key_column or "key"
    data = next((name for name in _DATA_FIELDS if name in value), None)
    rest = {name: field for name, field in value.items() if name not in (phone, key, data)}
    lead = {ours: value[theirs] for ours, theirs in (("phone", phone), ("key", key), ("data", data)) if theirs in value}
    if data is not None:
        return rest | lead
    return lead | {"data": rest} if rest else lead


def _guarded(rows: Iterator[Row], name: str, encoding: str) -> Iterator[Row]:
    """The rows; text that cannot be decoded becomes an error that says so."""
    try:
        yield from rows
    except UnicodeError as error:
        raise Refused(
            f"{name} is not {encoding} text from some place on"
            f" ({error.reason if isinstance(error, UnicodeDecodeError) else error})"
        ) from None


def _decode(head: bytes, encoding: str, name: str) -> str:
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except LookupError:  # unknown, or none of text, such as base64
        raise Refused(f"--encoding: {encoding} is not the name of a text encoding") from None
    except UnicodeError:
        raise Refused(f"{name} is not {encoding} text: name its encoding, such as --encoding cp1252") from None


def _guess_form(name: str, sample: str) -> str:
    if name.lower().endswith((".jsonl", ".ndjson", ".jsonlines")):
        return "jsonl"
    if name.lower().endswith((".csv", ".tsv")):
        return "csv"
    begin = sample.lstrip()[:1]
    if begin == "[":
        raise Refused(f"{name} is one JSON array: give one object a line, such as with `jq -c '.[]' FILE`")
    return "jsonl" if begin == "{" else "csv"


def _delimiter(sample: str) -> str:
    header = next((line for line in sample.splitlines() if line.strip()), "")
    if header.lower().startswith("sep=") and len(header) == 5:
        return header[4]
    return max(",;\t|", key=header.count)  # a tie, as in a file of one column, goes to the comma


def _find(header: list[str], column: str | None, name: str, option: str) -> str | None:
    if column is not None and (not column or column not in header):
        raise Refused(f"{name} has no column {column!r} ({option}); it has: {_listed(header)}")
    return column


def _guess_phone(header: list[str], name: str) -> str:
    found = phone_of(header)
    if found is None:
        raise Refused(f"{name} has no phone column; name one of its columns with --phone-column: {_listed(header)}")
    return found


def phone_of(names: Iterable[str]) -> str | None:
    """The column of the phone number, by its name: `phone` before `contact`; None if no name fits."""
    found = {_plain(name): name for name in names}
    return next((found[plain] for plain in PHONE_COLUMNS if plain in found), None)


def _listed(header: list[str]) -> str:
    shown = ", ".join(column[:40] for column in header[:12])
    return shown + (f" and {len(header) - 12} more" if len(header) > 12 else "")


def _plain(column: str) -> str:
    return "".join(char for char in column.lower() if char.isalnum())
