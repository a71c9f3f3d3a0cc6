"""A connection to PostgreSQL: how its address is read, what it sets, and when it is thrown away.

The pipeline needs some settings of its connection, whatever the server, the role or the database say (`NEEDS`); it sets
others unless the address says otherwise (`WISHES`). Everything else in the address stays.
"""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import ConnectionPoolEntry

from pipeline.settings import SettingsError

NEEDS = {"timezone": "UTC", "datestyle": "ISO, MDY", "default_transaction_isolation": "read committed"}
"""Settings of every connection, last in its `options` so that they win: times are read as ISO text, and statements look
again at rows that another transaction changed, which only READ COMMITTED does."""

WISHES = {"statement_timeout": "60000", "idle_in_transaction_session_timeout": "60000", "lock_timeout": "0"}
"""Settings in ms of every connection, first in its `options` so that the address can change them. No statement of ours
takes near a minute, and a process that hangs must not keep its locks for ever."""

PARAMETERS = {
    "connect_timeout": "5",  # seconds
    "application_name": "futwork-lead-pipeline",
    "keepalives_idle": "15",  # seconds; a server that is gone with its host is noticed within half a minute
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",  # ms
    "client_encoding": "utf8",
}
"""Parameters of libpq that the address may change, except `client_encoding`."""

_FRESH_SECONDS = 1.0  # a connection that was used so shortly before is not checked
_SEVERAL_HOSTS = re.compile(
    r"^(?P<head>[a-z0-9+]+://(?:[^/@?#]*@)?)(?P<hosts>[^/?#@]*,[^/?#@]*)(?P<rest>[/?#].*)?$", re.IGNORECASE
)
_DRIVER = "postgresql+psycopg"


class LedgerReadOnly(sa.exc.OperationalError):
    """The database takes no writes: a standby, or a primary that was demoted; the work must be tried again."""


def read_url(url: str) -> sa.URL:
    """The SQLAlchemy URL of what people write: `postgres://`, `postgresql://`, and several hosts as libpq has them.

    `?pooler=transaction` says that the address is a PgBouncer's in transaction mode. Raises `SettingsError`.
    """
    if found := _SEVERAL_HOSTS.fullmatch(url):  # SQLAlchemy wants one `host` a parameter
        rest = found["rest"] or "/"
        hosts = "&".join(f"host={host}" for host in found["hosts"].split(","))
        url = f"{found['head']}{rest}{'&' if '?' in rest else '?'}{hosts}"
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise SettingsError(f"DATABASE_URL: {error}") from None
    name = parsed.drivername
    if name in ("postgres", "postgresql"):
        parsed = parsed.set(drivername=_DRIVER)
    elif name.startswith("postgres") and name != _DRIVER:
        driver = name.partition("+")[2]
        raise SettingsError(
            f"DATABASE_URL: the driver {driver} is not supported; write postgresql:// instead of {name}://"
        )
    return parsed


def create_engine(url: sa.URL, statement_seconds: float | None) -> sa.Engine:
    """The engine of a PostgreSQL ledger; *statement_seconds* bounds each statement, whatever the address says.

    Raises `SettingsError` if the driver is not installed or the address has a parameter that libpq does not know.
    """
    try:
        import psycopg
    except ImportError:
        raise SettingsError("DATABASE_URL: PostgreSQL needs psycopg; install the extra `postgres`") from None
    said = {name: value if isinstance(value, str) else value[-1] for name, value in url.query.items() if name != "host"}
    pooled = said.pop("pooler", None) == "transaction"
    arguments: dict[str, Any] = PARAMETERS | said | {"client_encoding": PARAMETERS["client_encoding"]}
    statement_ms = None if statement_seconds is None else round(statement_seconds * 1000)
    if pooled:
        # The next statement may meet another server process: it knows no statement that was prepared before.
        arguments["prepare_threshold"] = None
    else:
        arguments["options"] = _options(said.get("options", ""), statement_ms)
    if not isinstance(url.query.get("host", ""), str):
        arguments.setdefault("target_session_attrs", "read-write")  # of several hosts, the one that takes writes
    _check(psycopg, {name: value for name, value in arguments.items() if name != "prepare_threshold"})
    engine = sa.create_engine(
        url.difference_update_query([name for name in url.query if name != "host"]),
        hide_parameters=True,  # errors reach logs, and parameters hold phone numbers
        isolation_level="READ COMMITTED",
        pool_timeout=10,
        pool_recycle=1800,
        connect_args=arguments,
    )
    if pooled and statement_ms is not None:
        bound = f"SET LOCAL statement_timeout = {statement_ms}"
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(bound))
    sa.event.listen(engine, "checkin", _remember_use)
    sa.event.listen(engine, "checkout", partial(_check_if_idle, engine))
    sa.event.listen(engine, "handle_error", _discard_dead_connections, retval=True)
    return engine


def check_writable(connection: sa.Connection) -> None:
    """Raise `LedgerReadOnly`, and discard the connection with all of its age, if it takes no writes."""
    if connection.scalar(sa.text("SHOW transaction_read_only")) == "on":
        connection.invalidate()
        connection.engine.dispose()  # each of the others may lead to the same server
        raise LedgerReadOnly(
            None, None, Exception("the database takes no writes: it is a standby, or set to read-only")
        )


def encoding(connection: sa.Connection) -> str:
    """The encoding of the database, such as `UTF8`."""
    return str(connection.scalar(sa.text("SHOW server_encoding")))


def _options(said: str, statement_ms: int | None) -> str:
    """The options of the server process: our wishes, then what the address says, then our needs; the last one wins."""
    needs = NEEDS if statement_ms is None else NEEDS | {"statement_timeout": str(statement_ms)}
    ours = [" ".join(f"-c {name}={_escaped(value)}" for name, value in some.items()) for some in (WISHES, needs)]
    return " ".join(filter(None, (ours[0], said, ours[1])))


def _escaped(value: str) -> str:
    return value.replace(" ", "\\ ")


def _check(psycopg: Any, arguments: dict[str, Any]) -> None:
    try:
        psycopg.conninfo.make_conninfo(**arguments)
    except psycopg.Error as error:
        raise SettingsError(f"DATABASE_URL: {' '.join(str(error).split())}") from None


def _remember_use(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info["used"] = time.monotonic()


def _check_if_idle(engine: sa.Engine, connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
    """Check that an idle connection still works, as `pool_pre_ping` does; one that was just used does."""
    used = record.info.get("used")
    if used is None or time.monotonic() - used < _FRESH_SECONDS:
        return
    try:
        engine.dialect.do_ping(connection)
    except engine.dialect.loaded_dbapi.Error as error:
        raise sa.exc.InvalidatePoolError from error  # the others were idle for as long


def _discard_dead_connections(context: sa.engine.ExceptionContext) -> BaseException | None:
    """Discard the connection, and the others of its age, when its server has ended it or takes no writes any more.

    After a failover the connections that were opened before lead to a standby. Without this they would stay in the pool
    for as long as `pool_recycle` allows.
    """
    state = getattr(context.original_exception, "sqlstate", None) or ""
    if state != "25006" and not state.startswith(("08", "57P")):
        return None
    context.is_disconnect = True
    if state == "25006":  # psycopg calls it an InternalError, as if trying again could not help
        return LedgerReadOnly(context.statement, None, context.original_exception, hide_parameters=True)
    return None
