"""What a connection to PostgreSQL sets for itself, what it leaves to the address, and when it is thrown away."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa

from pipeline.ledger import Ledger, LedgerUnavailable, MigrationBlocked
from pipeline.ledger.postgres import PARAMETERS, read_url
from pipeline.settings import SettingsError
from tests.conftest import CAMPAIGN, POSTGRES_URL, make_lead

LEASE = timedelta(minutes=2)
MakeDatabase = Callable[..., str]


@pytest.fixture
def make_database(postgres_url: str) -> Iterator[MakeDatabase]:
    """Databases of this test's own, each with its settings; dropped at the end."""
    server = sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    made: list[str] = []

    def make(*, options: str = "", settings: dict[str, str] | None = None) -> str:
        name = f"pipeline_test_{uuid.uuid4().hex[:12]}"
        with server.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name} {options}"))
            made.append(name)
            for setting, value in (settings or {}).items():
                connection.execute(sa.text(f"ALTER DATABASE {name} SET {setting} = {value}"))
        return sa.make_url(postgres_url).set(database=name).render_as_string(hide_password=False)

    yield make
    with server.connect() as connection:
        for name in made:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def open_ledger() -> Iterator[Callable[[str], Ledger]]:
    opened: list[Ledger] = []

    def open_one(url: str) -> Ledger:
        opened.append(Ledger(url))
        return opened[-1]

    yield open_one
    for ledger in opened:
        ledger.close()


def shown(ledger: Ledger, setting: str) -> str:
    with ledger.database.read() as connection:
        return str(connection.scalar(sa.text(f"SHOW {setting}")))


def take_in_and_claim(ledger: Ledger) -> int:
    """How many of three leads a dispatcher claims: it uses times, text and a transaction."""
    now = ledger.now()
    campaign = ledger.campaigns.ensure(CAMPAIGN, now=now)
    rows = [make_lead(one) for one in range(3)]
    ledger.leads.take_in(campaign, rows, batch_id=uuid.uuid4(), max_age=LEASE, now=now)
    return len(ledger.leads.claim(CAMPAIGN, 10, lease=LEASE, now=ledger.now()))


@pytest.mark.parametrize(
    ("setting", "value", "used"),
    [
        ("datestyle", "'SQL, DMY'", "ISO, MDY"),
        ("default_transaction_isolation", "'serializable'", "read committed"),
        ("default_transaction_isolation", "'repeatable read'", "read committed"),
        ("timezone", "'Asia/Kolkata'", "UTC"),
        ("client_encoding", "'LATIN1'", "UTF8"),
        ("lock_timeout", "'1ms'", "0"),
        ("statement_timeout", "'1ms'", "1min"),
    ],
)
def test_the_defaults_of_the_server_do_not_change_how_the_ledger_works(
    make_database: MakeDatabase, open_ledger: Callable[[str], Ledger], setting: str, value: str, used: str
) -> None:
    ledger = open_ledger(make_database(settings={setting: value}))
    ledger.migrate()
    assert used == shown(ledger, setting)
    assert take_in_and_claim(ledger) == 3


def test_the_options_of_the_address_are_merged_with_ours(
    make_database: MakeDatabase, open_ledger: Callable[[str], Ledger]
) -> None:
    """Two installations that share a database by schema had one ledger, because the option was dropped."""
    url = make_database()
    plain = open_ledger(url)
    with plain.database.write() as connection:
        connection.execute(sa.text("CREATE SCHEMA pipe"))
    apart = open_ledger(f"{url}?options=-csearch_path%3Dpipe%20-c%20statement_timeout%3D7s%20-c%20timezone%3DJapan")
    apart.migrate()
    assert [shown(apart, "statement_timeout"), shown(apart, "timezone")] == ["7s", "UTC"]
    with plain.database.read() as connection:
        assert "leads" in sa.inspect(connection).get_table_names(schema="pipe")
        assert sa.inspect(connection).get_table_names(schema="public") == []


def test_the_parameters_of_the_address_win(postgres_url: str, open_ledger: Callable[[str], Ledger]) -> None:
    ledger = open_ledger(f"{postgres_url}?connect_timeout=20&application_name=mine&client_encoding=LATIN1")
    assert [shown(ledger, "application_name"), shown(ledger, "client_encoding")] == ["mine", "UTF8"]
    assert PARAMETERS["application_name"] == shown(open_ledger(postgres_url), "application_name")


def test_several_hosts_are_tried_until_one_takes_writes(
    postgres_url: str, open_ledger: Callable[[str], Ledger]
) -> None:
    there = sa.make_url(postgres_url)
    hosts = f"127.0.0.1:1,{there.host}:{there.port or 5432}"
    password = f":{there.password}" if there.password else ""
    url = f"postgresql://{there.username}{password}@{hosts}/{there.database}"
    open_ledger(url).ping()
    open_ledger(f"{url}?target_session_attrs=read-write&application_name=mine").ping()
    with pytest.raises(LedgerUnavailable):
        open_ledger(f"{url}?target_session_attrs=standby").ping()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql+psycopg2://postgres@127.0.0.1/leads", "the driver psycopg2 is not supported; write postgresql://"),
        ("postgresql+asyncpg://postgres@127.0.0.1/leads", "the driver asyncpg is not supported; write postgresql://"),
        ("postgresql://postgres@127.0.0.1/leads?sslmod=require", 'invalid connection option "sslmod"'),
        ("postgresql://postgres@127.0.0.1:port/leads", "invalid literal"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_in_one_line(url: str, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Ledger(url)
    assert str(refused.value).startswith("DATABASE_URL: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("postgres://u@h/d", "postgresql+psycopg://u@h/d"),
        ("postgresql://u:p@a:1,b:2/d", "postgresql+psycopg://u:p@/d?host=a%3A1&host=b%3A2"),
        ("postgresql://u@a,b/d?sslmode=require", "postgresql+psycopg://u@/d?host=a&host=b&sslmode=require"),
        ("postgresql://u@[::1]:5432/d", "postgresql+psycopg://u@[::1]:5432/d"),
        ("sqlite:///leads.db", "sqlite:///leads.db"),
    ],
)
def test_an_address_is_read_as_people_write_it(written: str, read: str) -> None:
    assert read == read_url(written).render_as_string(hide_password=False)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_is_not_utf8_is_refused_before_the_first_migration(
    make_database: MakeDatabase, open_ledger: Callable[[str], Ledger], encoding: str
) -> None:
    options = f"ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    ledger = open_ledger(make_database(options=options))
    with pytest.raises(MigrationBlocked, match=f"the database has the encoding {encoding}, and the ledger needs UTF8"):
        ledger.migrate()
    with ledger.database.read() as connection:
        assert sa.inspect(connection).get_table_names() == []


def test_connections_that_were_opened_while_the_server_took_no_writes_are_discarded(
    make_database: MakeDatabase, open_ledger: Callable[[str], Ledger]
) -> None:
    """After a failover they stayed in the pool for half an hour, and nothing was written meanwhile."""
    url = make_database()
    ledger, admin = open_ledger(url), sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    name = sa.make_url(url).database
    ledger.migrate()
    ledger.close()
    with admin.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    with ledger.database.read() as one, ledger.database.read() as other:  # two connections, both read-only
        assert [each.scalar(sa.text("SHOW transaction_read_only")) for each in (one, other)] == ["on", "on"]
    with admin.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    admin.dispose()

    with pytest.raises(LedgerUnavailable):  # it meets one of them; the other goes with it
        take_in_and_claim(ledger)
    assert take_in_and_claim(ledger) == 3


def test_readiness_asks_whether_the_ledger_takes_writes(
    make_database: MakeDatabase, open_ledger: Callable[[str], Ledger]
) -> None:
    url = make_database()
    ledger, admin = open_ledger(url), sa.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    name = sa.make_url(url).database
    ledger.ping()
    with admin.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    ledger.close()
    with pytest.raises(LedgerUnavailable, match="takes no writes"):
        ledger.ping()
    with admin.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    admin.dispose()
    ledger.ping()
