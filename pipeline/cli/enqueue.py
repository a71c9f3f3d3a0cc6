"""`pipeline enqueue`: a file of leads into the broker, with every refused row in a file beside it."""

from __future__ import annotations

import csv
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click

from pipeline.broker import BrokerUnavailable
from pipeline.cli.rows import REFUSED_HEADER, LeadFile, Row, open_rows
from pipeline.cli.session import Refused, as_json, note, print_json, settings_with_broker
from pipeline.domain.campaign import check_campaign_id
from pipeline.producer import Producer, RefusedRow
from pipeline.settings import load_settings

_REFRESH_ROWS = 500


@dataclass(slots=True)
class _Summary:
    """What became of a file."""

    campaign_id: str
    rows: int = 0
    accepted: int = 0
    refused: int = 0
    refused_file: str | None = None
    dry_run: bool = False
    stopped: str | None = None
    """Why the file was not read to its end."""
    not_accepted_from_line: int | None = None
    """The first line of those that are not accepted, if it was not."""

    @property
    def exit_code(self) -> int:
        """0 every row accepted, 1 some, 2 none."""
        if not self.refused and not self.stopped:
            return 0
        return 1 if self.accepted else 2


class _NoPublisher:
    """Takes batches and sends nothing: a dry run."""

    def publish(self, task: str, payload: object, *, about: str) -> None:
        """Do nothing."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--campaign", "campaign_id", required=True, help="Futwork's campaign id.")
@click.option("--phone-column", help="The column with the number; found by itself if named phone, mobile, ….")
@click.option("--key-column", help="The column with your idempotency key; without it, the number is the key.")
@click.option(
    "--format", "form", type=click.Choice(["csv", "jsonl"]), help="What the file is, if its name does not tell."
)
@click.option("--encoding", help="Its encoding, if it is neither UTF-8 nor marked by a BOM.")
@click.option(
    "--refused", "refused_path", type=click.Path(path_type=Path), help="Where refused rows go. [FILE.refused.csv]"
)
@click.option("--dry-run", is_flag=True, help="Check every row and send nothing.")
@as_json
def enqueue(
    file: Path,
    *,
    campaign_id: str,
    phone_column: str | None,
    key_column: str | None,
    form: str | None,
    encoding: str | None,
    refused_path: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Hand the leads of FILE (CSV or JSON lines, - for stdin) to the pipeline.

    The phone column becomes the number, the key column the idempotency key, every other column a field of
    recipientData. A row that cannot become a lead is refused with its reason and line, into FILE.refused.csv; the
    others go on. Handing the same file in twice is harmless.

    \b
    pipeline enqueue leads.csv --campaign 68ecc86fd9fbecbe9431a18e
    pipeline enqueue leads.csv --campaign 68ec… --phone-column Mobile --key-column crm_id
    zcat leads.jsonl.gz | pipeline enqueue - --campaign 68ec… --format jsonl
    pipeline enqueue leads.csv --campaign 68ec… --dry-run

    Exit: 0 every row accepted, 1 some of them, 2 none.
    """
    check_campaign_id(campaign_id)
    name = "stdin" if str(file) == "-" else str(file)
    refused_path = refused_path or Path("stdin.refused.csv" if name == "stdin" else f"{file}.refused.csv")
    with _opened(file) as source:
        _check_apart(refused_path, source)
        leads = open_rows(source, name, form=form, encoding=encoding, phone_column=phone_column, key_column=key_column)
        for text in leads.notes:
            note(f"note: {text}")
        size = None if name == "stdin" else os.fstat(source.fileno()).st_size
        summary = _Summary(campaign_id, dry_run=dry_run)
        if dry_run:
            producer = Producer(campaign_id, settings=load_settings(), publisher=_NoPublisher())
            _hand_in(leads, producer, size, refused_path, summary)
        else:
            with settings_with_broker() as settings:
                _hand_in(leads, Producer(campaign_id, settings=settings), size, refused_path, summary)
    if not summary.rows and not summary.stopped:
        raise Refused(f"{name} has a header but no rows: there is nothing to enqueue")
    _tell(summary, as_json=as_json)
    sys.exit(summary.exit_code)


class _Lined:
    """A producer that knows the line of each row."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._waiting: list[int] = []  # the lines of valid rows that are not in the broker yet
        self._last = 0

    @property
    def accepted(self) -> int:
        """How many rows are in the broker."""
        return self._producer.accepted

    @property
    def first_not_accepted(self) -> int:
        """The first line from which on no row is in the broker."""
        return self._waiting[0] if self._waiting else self._last + 1

    def add(self, row: Row) -> str:
        """Take a row in; return the reason if it is refused, else nothing."""
        self._last = row.line
        if row.fault:
            return row.fault
        self._waiting.append(row.line)
        before = self.accepted
        result = self._producer.add(row.lead)
        if isinstance(result, RefusedRow):
            self._waiting.pop()
            return result.reason
        if self.accepted > before:
            self._waiting.clear()
        return ""

    def flush(self) -> None:
        """Put what waits into the broker."""
        self._producer.flush()
        self._waiting.clear()


def _hand_in(leads: LeadFile, producer: Producer, size: int | None, refused_path: Path, summary: _Summary) -> None:
    """Hand in every row; if something stops it, the summary says what, and from which line on no row was accepted."""
    lined = _Lined(producer)
    with _refused_rows(refused_path, leads.columns, summary) as refuse, _progress(size) as show:
        try:
            try:
                for row in leads.rows:
                    summary.rows += 1
                    reason = lined.add(row)
                    if reason:
                        refuse(row, reason)
                    if summary.rows % _REFRESH_ROWS == 0:
                        show(leads.position(), summary)
            except Refused as error:  # the file cannot be read further; what was read of it goes on
                summary.stopped = error.format_message()
            lined.flush()
            show(leads.position(), summary)
        except BrokerUnavailable as error:
            summary.stopped = f"{error}: check BROKER_URL"
        except OSError as error:
            summary.stopped = f"{error.filename or 'the file'}: {error.strerror or error}"
        except KeyboardInterrupt:
            summary.stopped = "stopped by a signal"
    summary.accepted = lined.accepted
    if summary.stopped is not None:
        summary.not_accepted_from_line = lined.first_not_accepted


def _tell(summary: _Summary, *, as_json: bool) -> None:
    if summary.stopped is not None:
        verb = "would have been" if summary.dry_run else "were"
        done = f"{summary.accepted:,} leads {verb} accepted" if summary.accepted else "nothing was accepted"
        note(
            f"pipeline: {summary.stopped}. {done[0].upper()}{done[1:]}; line {summary.not_accepted_from_line:,} and"
            " those after it were not. Then hand the whole file in again: nobody is called twice for it."
        )
    if as_json:
        print_json(asdict(summary))
        return
    if summary.stopped is None:
        verb = "would be accepted" if summary.dry_run else "accepted"
        click.echo(f"{summary.accepted:,} of {summary.rows:,} rows {verb} for campaign {summary.campaign_id}")
    if summary.refused:
        click.echo(f"{summary.refused:,} refused: see {summary.refused_file}")


@contextmanager
def _refused_rows(path: Path, columns: Sequence[str], summary: _Summary) -> Iterator[Callable[[Row, str], None]]:
    """A function that writes a refused row, with its line and reason, to a CSV file that can be corrected and used."""
    path.unlink(missing_ok=True)  # the rows that an earlier run refused may be corrected by now
    with ExitStack() as opened:
        writer: Any = None

        def write(row: Row, reason: str) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.writer(
                    opened.enter_context(path.open("w", encoding="utf-8", errors="replace", newline=""))
                )
                writer.writerow([*REFUSED_HEADER, *columns])
                summary.refused_file = str(path)
            summary.refused += 1
            writer.writerow([row.line, reason, *row.source])

        yield write


def _check_apart(refused_path: Path, source: BinaryIO) -> None:
    """Refuse a place for refused rows that cannot be written, before anything is sent, or that is the file itself."""
    folder = refused_path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or refused_path.is_dir():
        raise Refused(f"refused rows cannot be written to {refused_path}: name another place with --refused")
    with suppress(OSError):  # it does not exist yet, or stdin is no file
        if os.path.samestat(os.fstat(source.fileno()), refused_path.stat()):
            raise Refused(f"--refused {refused_path} is the file of leads itself")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    if path.is_dir():
        raise Refused(f"{path} is a folder: name a file")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise Refused(f"{path} does not exist") from None
    except PermissionError:
        raise Refused(f"{path} may not be read") from None
    with file:
        yield file


@contextmanager
def _progress(size: int | None) -> Iterator[Callable[[int, _Summary], None]]:
    """A progress bar on stderr, by bytes where the file's size is known; nothing where stderr is no terminal."""
    with click.progressbar(
        itertools.repeat(None),
        label="enqueue",
        length=size,
        item_show_func=lambda text: text,
        file=sys.stderr,
        hidden=not sys.stderr.isatty(),
    ) as bar:

        def show(position: int, summary: _Summary) -> None:
            bar.update(position - bar.pos, f"{summary.rows:,} rows, {summary.refused:,} refused")  # type: ignore[arg-type]

        yield show
