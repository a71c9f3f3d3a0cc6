"""A ledger, a Valkey, dispatchers over them, and a Futwork that answers as it is told."""

import threading
import uuid
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from pipeline.coordination.dispatch_leases import DispatchLeases
from pipeline.coordination.limiter import Limiter
from pipeline.dispatch import Dispatcher
from pipeline.domain.lead import lead_id
from pipeline.futwork import Futwork
from pipeline.ledger import LeadFilter, Ledger
from pipeline.ledger.tables import campaigns, leads
from tests.conftest import CAMPAIGN, make_lead
from tests.waiting import patience

OTHER = "68ecc86fd9fbecbe9431a190"


CONCURRENCY = 8


def now():
    return datetime.now(UTC)


def seconds(value):
    return timedelta(seconds=value)


class Bench:
    """A ledger and a Valkey, dispatchers over them, and a look at what became of the leads."""

    def __init__(self, ledger, valkey, make_settings):
        self.ledger, self.valkey, self._make_settings = ledger, valkey, make_settings
        self.leases = DispatchLeases(valkey)
        self.limiter = Limiter(valkey)
        self.asked = []
        self._closing = []

    def dispatcher(self, url, *, ledger=None, limiter=None, leases=None, stopping=lambda: False, **overrides):
        """A dispatcher with a Futwork of its own; its backoff is far longer than any test."""
        settings = self._make_settings(
            **{
                "futwork_base_url": url,
                "dispatch_concurrency": CONCURRENCY,
                "connect_timeout_seconds": patience(1.0),
                "read_timeout_seconds": 30.0,
                "backoff_base_seconds": 300.0,
                "backoff_cap_seconds": 3000.0,
                "slice_seconds": 30.0,
            }
            | overrides
        )
        futwork = Futwork(settings)
        self._closing.append(futwork.close)
        dispatcher = Dispatcher(
            ledger or self.ledger,
            futwork,
            limiter or self.limiter,
            leases or self.leases,
            settings,
            request_dispatcher=self.asked.append,
            stopping=stopping,
        )
        dispatcher._jitter.seed(4)  # no backoff by chance near nothing
        return dispatcher

    def ledger_of_its_own(self):
        ledger = Ledger(self.ledger.database.url.render_as_string(hide_password=False))
        self._closing.append(ledger.close)
        return ledger

    def take_in(self, count=1, *, campaign=CAMPAIGN, first=0, max_age=86400, **policies):
        at = now()
        found = self.ledger.campaigns.ensure(campaign, now=at)
        if policies:
            found = self.ledger.campaigns.change(campaign, policies, now=at)
        rows = [make_lead(number) for number in range(first, first + count)]
        self.ledger.leads.take_in(found, rows, batch_id=uuid.uuid4(), max_age=seconds(max_age), now=at)

    def story(self, number=0, campaign=CAMPAIGN):
        return self.ledger.reports.story(lead_id(campaign, make_lead(number).key))

    def leads(self, campaign=CAMPAIGN):
        return self.ledger.reports.leads(LeadFilter(campaign=campaign), limit=100_000)

    def states(self, campaign=CAMPAIGN):
        return dict(Counter(lead["state"] for lead in self.leads(campaign)))

    def campaign(self, campaign=CAMPAIGN):
        return next(one for one in self.ledger.reports.campaigns() if one["id"] == campaign)

    def make_due(self, campaign=CAMPAIGN):
        """Let every backoff of the campaign be over."""
        with self.ledger.database.write() as connection:
            connection.execute(
                sa.update(leads).where(leads.c.campaign_id == campaign).values(due_at=now() - seconds(1))
            )

    def make_probe_due(self, campaign=CAMPAIGN):
        with self.ledger.database.write() as connection:
            connection.execute(
                sa.update(campaigns).where(campaigns.c.id == campaign).values(probe_at=now() - seconds(1))
            )

    def close(self):
        for close in self._closing:
            close()


@contextmanager
def opened(ledger, valkey, make_settings):
    bench = Bench(ledger, valkey, make_settings)
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture
def bench(sqlite_ledger, valkey, make_settings):
    """The bench on SQLite, for what does not depend on the database."""
    with opened(sqlite_ledger, valkey, make_settings) as bench:
        yield bench


@pytest.fixture
def each_bench(ledger, valkey, make_settings):
    """The bench on both databases."""
    with opened(ledger, valkey, make_settings) as bench:
        yield bench


def always(*reply):
    def handle(peer):
        while peer.request():
            peer.answer(*reply)

    return handle


def hang_up(peer):
    peer.request()


# Holds


def when_accepted(sandbox, count, act):
    """A thread that acts as soon as so many leads were accepted."""

    def watch():
        sandbox.wait(lambda stats: stats["accepted"] >= count)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread
