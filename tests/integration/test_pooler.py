"""The ledger behind PgBouncer in transaction mode (`?pooler=transaction`): many clients, few connections."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipeline.devstack.embedded_valkey import free_port
from pipeline.domain.campaign import Campaign
from pipeline.domain.lead import Outcome, Retry, settle
from pipeline.ledger import Ledger, open_ledger
from tests.conftest import CAMPAIGN, NOW, make_answer, make_lead, missing
from tests.waiting import until

SERVER_CONNECTIONS = 2
RETRY = Retry(base=timedelta(seconds=10), cap=timedelta(minutes=10), max_attempts=8)


@pytest.fixture
def pooled_url(postgres_ledger: Ledger, tmp_path: Path) -> Iterator[str]:
    """The address of the empty test ledger behind a private PgBouncer."""
    program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        missing("PgBouncer", "no such program")
    direct, port = postgres_ledger.database.url, free_port()
    password = f" password={direct.password}" if direct.password else ""
    settings = tmp_path / "pgbouncer.ini"
    settings.write_text(
        "[databases]\n"
        f"* = host={direct.host} port={direct.port or 5432} user={direct.username}{password}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = transaction\ndefault_pool_size = {SERVER_CONNECTIONS}\nlogfile = /dev/null\n"
    )
    os.chmod(tmp_path, 0o755)  # noqa: PTH101 - PgBouncer refuses to be root
    settings.chmod(0o644)
    for folder in tmp_path.parents[:3]:
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    as_somebody = ["-u", "nobody"] if os.geteuid() == 0 else []
    with subprocess.Popen([program, "-q", *as_somebody, str(settings)]) as process:
        try:
            _await_port(port, process)
            yield direct.set(host="127.0.0.1", port=port, query={"pooler": "transaction"}).render_as_string(
                hide_password=False
            )
        finally:
            process.terminate()


def test_many_workers_share_few_connections_and_each_lead_is_sent_once(pooled_url: str) -> None:
    """Every statement runs more often than psycopg waits before it prepares one (five times)."""
    workers, batches, size = 6, 12, 20
    ledgers = [open_ledger(pooled_url) for _ in range(workers)]
    ledgers[0].campaigns.ensure(CAMPAIGN, now=NOW)

    def work(place: int) -> list[uuid.UUID]:
        ledger, sent = ledgers[place], []
        for batch in range(batches):
            rows = [make_lead((place * batches + batch) * size + number) for number in range(size)]
            ledger.leads.take_in(Campaign(CAMPAIGN), rows, batch_id=uuid.uuid4(), max_age=timedelta(days=1), now=NOW)
            claims = ledger.leads.claim(CAMPAIGN, size, lease=timedelta(minutes=2), now=NOW)
            sent += [one.lead_id for one in claims]
            done = [
                settle(make_answer(one, Outcome.ACCEPTED), RETRY, now=NOW, jitter=random.Random(1)) for one in claims
            ]
            ledger.leads.record(Campaign(CAMPAIGN), done, probe_after=timedelta(seconds=30), now=NOW)
        return sent

    try:
        with ThreadPoolExecutor(workers) as pool:
            sent = [lead for found in pool.map(work, range(workers)) for lead in found]
        while claims := ledgers[0].leads.claim(CAMPAIGN, 1000, lease=timedelta(minutes=2), now=NOW):
            sent += [one.lead_id for one in claims]
        assert len(sent) == len(set(sent)) == workers * batches * size
        ours = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = :us"
        with ledgers[0].database.read() as connection:
            backends = connection.scalar(sa.text(ours), {"us": "futwork-lead-pipeline"})
        assert backends <= SERVER_CONNECTIONS + 1  # the fixture's own may idle beside them
    finally:
        for ledger in ledgers:
            ledger.close()


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    def listens() -> bool:
        assert process.poll() is None, "PgBouncer ended by itself"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(listens)
