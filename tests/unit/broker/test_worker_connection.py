"""A worker takes messages through our transport, whatever the address says and wherever kombu goes on to."""

from __future__ import annotations

from collections.abc import Callable

import kombu
import pytest

from pipeline.broker import celery_app
from pipeline.broker.redis_transport import SentinelTransport, Transport, WorkerConnection
from pipeline.settings import Settings

ADDRESSES = [
    ("redis://:secret@127.0.0.1:1/3", Transport),
    ("rediss://127.0.0.1:1/0?ssl_cert_reqs=required", Transport),
    ("sentinel://127.0.0.1:1;sentinel://127.0.0.2:1", SentinelTransport),
]


@pytest.mark.parametrize(("address", "ours"), ADDRESSES)
def test_a_worker_speaks_to_a_redis_through_our_transport(address: str, ours: type) -> None:
    connection = WorkerConnection(address)
    assert connection.get_transport_cls() is connection.clone().get_transport_cls() is ours


@pytest.mark.parametrize(("address", "_ours"), ADDRESSES)
def test_its_address_stays_what_logs_and_flower_can_read(address: str, _ours: type) -> None:
    assert WorkerConnection(address).as_uri() == kombu.Connection(address).as_uri()
    assert WorkerConnection(address).ssl == kombu.Connection(address).ssl


@pytest.mark.parametrize(("address", "ours"), ADDRESSES)
def test_it_keeps_our_transport_when_kombu_goes_on_to_another_address(address: str, ours: type) -> None:
    """Celery's setting `broker_transport` does not: kombu takes the transport from the scheme of the next address."""
    connection = WorkerConnection(address)
    connection.switch(address.rsplit(";", maxsplit=1)[-1])
    assert connection.get_transport_cls() is ours
    by_setting = kombu.Connection(address, transport=f"{ours.__module__}:{ours.__name__}")
    assert by_setting.get_transport_cls() is ours
    by_setting.switch(address.rsplit(";", maxsplit=1)[-1])
    assert by_setting.get_transport_cls() is not ours, "kombu keeps it now: `broker_transport` may do"


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "amqp://127.0.0.1:1//"])
def test_a_worker_has_it_and_a_producer_has_kombus_own(make_settings: Callable[..., Settings], url: str) -> None:
    settings = make_settings(broker_url=url)
    kombus = kombu.Connection(url).get_transport_cls()
    worker, producer = (celery_app(settings, works=works).connection_for_read() for works in (True, False))
    assert worker.get_transport_cls() is (Transport if url.startswith("redis") else kombus)
    assert producer.get_transport_cls() is kombus
