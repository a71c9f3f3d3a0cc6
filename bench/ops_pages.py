"""How long the status pages take on a million leads: the 95th percentile of each, from a browser's point of view.

A million leads in four campaigns, with an attempt each, calls for most of them, a day of minutes in the tallies, on
PostgreSQL, and on SQLite too. The pages come from the server as it is deployed, one request at a time over one
connection; the worst page counts.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import time
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime

import sqlalchemy as sa

from bench.backends import CAMPAIGN, Backends, await_
from bench.figures import Figure, absolute, console
from pipeline.devstack.embedded_valkey import free_port
from pipeline.ledger import Ledger
from pipeline.web.ops.access import hash_password

LEADS = 1_000_000
PASSWORD = "bench-password"
_ASKED = 40  # times a page and a round
_CAMPAIGNS = (CAMPAIGN, *(f"{CAMPAIGN[:-1]}{letter}" for letter in "bcd"))

_STATE = """CASE WHEN n % 100 < 70 THEN 'called' WHEN n % 100 < 85 THEN 'submitted' WHEN n % 100 < 97 THEN 'queued'
    WHEN n % 100 < 98 THEN 'uncertain' WHEN n % 100 < 99 THEN 'rejected' ELSE 'exhausted' END"""

_POSTGRES = (
    """INSERT INTO batches (id, campaign_id, received_at, leads, accepted)
    SELECT gen_random_uuid(), (ARRAY[NAMES])[1 + n % 4], now(), 500, 500 FROM generate_series(1, :number / 500) AS n""",
    """INSERT INTO leads (id, campaign_id, key, phone, data, state, attempts, due_at, expires_at, claim,
                       futwork_lead_id,
                       batch_id, accepted_at, submitted_at, called_at, changed_at)
    SELECT gen_random_uuid(), (ARRAY[NAMES])[1 + n % 4], n::text, '+9170' || lpad(n::text, 8, '0'),
           '{"customer_name": "Asha Rao"}', STATE, 1, t, t + interval '20 days', gen_random_uuid(), md5(n::text),
           gen_random_uuid(), t, t + interval '9 seconds', t + interval '80 seconds', t
    FROM generate_series(1, :number) AS n, LATERAL (SELECT now() - n * interval '0.3 seconds' AS t) AS moment""",
    """INSERT INTO calls (call_sid, lead_id, campaign_id, phone, status, is_final, outcome, disposition,
                       duration_seconds,
                       details, first_event_at, last_event_at)
    SELECT 'call-' || key, id, campaign_id, phone, 'completed', true,
           CASE WHEN key::int % 3 = 0 THEN 'no_answer' ELSE 'connected' END, 'reason_' || (key::int % 20), 31.0,
           '{"turns": []}', submitted_at, called_at FROM leads WHERE state = 'called'""",
    """INSERT INTO call_events (digest, call_sid, state, received_at, body)
    SELECT md5(call_sid), call_sid, 'merged', last_event_at, '{"status": "completed"}' FROM calls""",
)
_SQLITE = (
    """INSERT INTO batches (id, campaign_id, received_at, leads, accepted)
    WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :number / 500)
    SELECT lower(hex(randomblob(16))), NAME, BEFORE(0), 500, 500 FROM numbers""",
    """INSERT INTO leads (id, campaign_id, key, phone, data, state, attempts, due_at, expires_at, claim,
                       futwork_lead_id,
                       batch_id, accepted_at, submitted_at, called_at, changed_at)
    WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :number)
    SELECT lower(hex(randomblob(16))), NAME, n, '+9170' || substr('00000000' || n, -8), '{"customer_name": "Asha Rao"}',
           STATE, 1, BEFORE(n * 0.3), BEFORE(n * 0.3 - 1728000), lower(hex(randomblob(16))), lower(hex(randomblob(12))),
           lower(hex(randomblob(16))), BEFORE(n * 0.3), BEFORE(n * 0.3 - 9), BEFORE(n * 0.3 - 80), BEFORE(n * 0.3)
    FROM numbers""",
    """INSERT INTO calls (call_sid, lead_id, campaign_id, phone, status, is_final, outcome, disposition,
                       duration_seconds,
                       details, first_event_at, last_event_at)
    SELECT 'call-' || key, id, campaign_id, phone, 'completed', 1,
           CASE WHEN key % 3 = 0 THEN 'no_answer' ELSE 'connected' END, 'reason_' || (key % 20), 31.0,
           '{"turns": []}', submitted_at, called_at FROM leads WHERE state = 'called'""",
    """INSERT INTO call_events (digest, call_sid, state, received_at, body)
    SELECT call_sid, call_sid, 'merged', last_event_at, '{"status": "completed"}' FROM calls""",
)
_ATTEMPTS = """INSERT INTO attempts (lead_id, claim, started_at, duration_ms, outcome, http_status, excerpt)
    SELECT id, claim, submitted_at, 80, CASE WHEN state = 'rejected' THEN 'rejected' ELSE 'accepted' END, 200, ''
    FROM leads"""


def measure(services: Backends, *, rounds: int, quick: bool) -> list[Figure]:
    """The figures of this module."""
    leads = LEADS // 10 if quick else LEADS
    figures = []
    with contextlib.ExitStack() as stack:
        databases = {}
        if services.has_postgres:
            databases["postgres"] = stack.enter_context(services.database())
        databases["sqlite"] = f"sqlite:///{services.folder / 'pages.db'}"
        for name, url in databases.items():
            console.print(f"  writing {leads:,} leads on {name}")
            write(url, leads)
            with pages_server(services, url) as client:
                slowest: list[float] = []
                for number in range(rounds):
                    taken = {path: client.p95(path) for path in client.paths()}
                    taken |= {f"find {kind}": client.p95_of_find(text) for kind, text in client.texts().items()}
                    taken["count a filter"] = client.p95_of_count()
                    worst = max(taken, key=taken.__getitem__)
                    slowest.append(taken[worst])
                    told = ", ".join(f"{path.partition('?')[0][-24:]} {ms:.0f}" for path, ms in taken.items())
                    console.print(f"  round {number + 1}/{rounds}  p95 in ms: {told}; slowest {worst}", highlight=False)
            figures.append(
                absolute(
                    f"ops_pages_{name}", slowest, unit="ms", goal=300, better="lower",
                    note=f"95th percentile of the slowest status page over {_ASKED} requests, {leads:,} leads, {name}",
                )
            )  # fmt: skip
    return figures


class Client:
    """Somebody signed in, over one connection."""

    def __init__(self, port: int, ledger: Ledger) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._headers = {"Content-Type": "application/x-www-form-urlencoded"}
        form = re.search(r'name="form" value="([^"]+)"', self._ask("GET", "/ops/sign-in"))[1]
        self._ask("POST", "/ops/sign-in", {"form": form, "name": "asha", "password": PASSWORD})
        self._csrf = re.search(r'name="csrf" value="(\w+)"', self._ask("GET", "/ops/audit"))[1]
        with ledger.database.read() as connection:
            row = connection.execute(sa.text("SELECT id, phone FROM leads WHERE key = '700000'")).one_or_none()
            row = row or connection.execute(sa.text("SELECT id, phone FROM leads WHERE key = '70'")).one()
        self._lead, self._phone = str(row.id), row.phone
        if len(self._lead) == 32:  # as SQLite stores it
            import uuid

            self._lead = str(uuid.UUID(self._lead))

    def paths(self) -> list[str]:
        """A page of each kind; the lists with the filters that find much, and little."""
        return [
            "/ops/", f"/ops/campaigns/{CAMPAIGN}", "/ops/leads", f"/ops/leads?campaign={CAMPAIGN}&state=called",
            "/ops/leads?state=uncertain", "/ops/leads?state=expired", f"/ops/leads/{self._lead}",
            f"/ops/leads/{self._lead}/raw", "/ops/quarantine", "/ops/audit",
        ]  # fmt: skip

    def texts(self) -> dict[str, str]:
        """What is looked for."""
        return {"phone": self._phone, "id": self._lead, "key": "424242", "nothing": "9999900000"}

    def get(self, path: str) -> None:
        """Ask for a page."""
        self._ask("GET", path)

    def p95(self, path: str) -> float:
        """Milliseconds."""
        return self._p95("GET", path, None)

    def p95_of_find(self, text: str) -> float:
        """Milliseconds of a search."""
        return self._p95("POST", "/ops/leads", {"text": text})

    def p95_of_count(self) -> float:
        """Milliseconds of the page that counts a filter before a change."""
        return self._p95("POST", "/ops/leads/count", {"campaign": CAMPAIGN, "state": "rejected", "action": "retry"})

    def _p95(self, method: str, path: str, fields: dict[str, str] | None) -> float:
        taken = []
        self._ask(method, path, fields)
        for _ in range(_ASKED):
            began = time.perf_counter()
            self._ask(method, path, fields)
            taken.append((time.perf_counter() - began) * 1000)
        return sorted(taken)[len(taken) * 95 // 100]

    def _ask(self, method: str, path: str, fields: dict[str, str] | None = None) -> str:
        body = None if fields is None else urllib.parse.urlencode({"csrf": getattr(self, "_csrf", ""), **fields})
        self._connection.request(method, path, body, self._headers)
        answer = self._connection.getresponse()
        text = answer.read().decode()
        if answer.status not in (200, 303):
            raise RuntimeError(f"{path}: {answer.status} {text[:300]}")
        for name, value in answer.getheaders():
            if name.lower() == "set-cookie":
                pair = value.partition(";")[0]
                self._headers["Cookie"] = f"{self._headers.get('Cookie', '')}; {pair}".lstrip("; ")
        return text


@contextlib.contextmanager
def pages_server(services: Backends, url: str) -> Iterator[Client]:
    """A server that serves the pages over this ledger, and somebody signed in to it."""
    settings = services.settings(
        database_url=url, ops_users=f"asha:{hash_password(PASSWORD)}:operator", ops_secret="s" * 40
    )
    with services.processes(services.environment(settings)) as stack, contextlib.closing(Ledger(url)) as ledger:
        port = free_port()
        stack.start("web", ["-m", "pipeline.web", "--host", "127.0.0.1", "--port", str(port), "--processes", "1"])
        await_(lambda: _listens(port), "the web server")
        yield Client(port, ledger)


def write(url: str, number: int) -> None:
    """A ledger with so many leads, their attempts and calls."""
    with contextlib.closing(Ledger(url)) as ledger:
        ledger.migrate()
        now = datetime.now(UTC)
        for campaign in _CAMPAIGNS:
            ledger.campaigns.ensure(campaign, now=now)
        sqlite = ledger.database.is_sqlite
        with ledger.database.write() as connection:
            if not sqlite:
                connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            for statement in _statements(sqlite=sqlite):
                connection.execute(sa.text(statement), {"number": number})
        ledger.rollups.compact(now=now)
        with ledger.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("ANALYZE" if sqlite else "VACUUM ANALYZE"))


def _statements(*, sqlite: bool) -> list[str]:
    if not sqlite:
        names = ", ".join(f"'{one}'" for one in _CAMPAIGNS)
        return [one.replace("NAMES", names).replace("STATE,", f"{_STATE},") for one in (*_POSTGRES, _ATTEMPTS)]
    name = f"CASE n % 4 {' '.join(f'WHEN {place} THEN {one!r}' for place, one in enumerate(_CAMPAIGNS))} END"
    moment = r"strftime('%Y-%m-%dT%H:%M:%f', 'now', (-(\1)) || ' seconds') || '000Z'"
    return [
        re.sub(r"BEFORE\(([^)]*)\)", moment, one.replace("NAME,", f"{name},").replace("STATE,", f"{_STATE},"))
        for one in (*_SQLITE, _ATTEMPTS)
    ]


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
