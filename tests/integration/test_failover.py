"""A real primary and its standby change places under a ledger, both ways."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from pipeline.ledger import Ledger, LedgerUnavailable
from tests.chaos.brokers import ServiceMissing
from tests.chaos.ledgers import PostgresPair
from tests.conftest import CAMPAIGN, make_lead, missing
from tests.waiting import until

DAY = timedelta(days=1)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[PostgresPair]:
    try:
        made = PostgresPair(tmp_path)
    except ServiceMissing as why:
        missing("PostgreSQL's server programs", why)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_a_ledger_of_two_hosts_follows_its_primary_both_ways(pair: PostgresPair) -> None:
    ledger = Ledger(pair.url)
    ledger.migrate()

    def write(number: int) -> bool:
        """Take one more lead in, if the ledger takes writes; a batch may be repeated."""
        try:
            now = ledger.now()
            campaign = ledger.campaigns.ensure(CAMPAIGN, now=now)
            ledger.leads.take_in(campaign, [make_lead(number)], batch_id=uuid.UUID(int=number), max_age=DAY, now=now)
            ledger.ping()
        except LedgerUnavailable:
            return False
        return True

    for number in range(3):
        assert write(number)
    for number in (3, 4):
        with ledger.database.read(), ledger.database.read():  # two connections in the pool, both to the old primary
            pass
        pair.fail_over()
        until(partial(write, number))
    assert ledger.reports.status(now=ledger.now())["accepted"] == 5
    ledger.close()
