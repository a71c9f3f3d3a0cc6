"""TLS to Redis and RabbitMQ: every part of the pipeline accepts and refuses the same certificates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import kombu
import pytest

from pipeline.broker import Broker, BrokerUnavailable, celery_app
from pipeline.coordination.connection import RedisUnavailable, connect
from pipeline.coordination.heartbeats import Heartbeats, HeartbeatSender
from pipeline.coordination.inspection import inspecting
from pipeline.coordination.limiter import Limiter
from pipeline.settings import Settings
from tests.tls import Certificates, Kind, tls_front

KINDS: list[tuple[Kind, str, bool]] = [
    ("good", "?ssl_ca_certs={ca}", True),
    ("good", "?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={ca}", True),
    ("good", "", False),  # its issuer is not one of the system's
    ("wrong name", "?ssl_ca_certs={ca}", False),
    ("wrong name", "?ssl_ca_certs={ca}&ssl_check_hostname=false", True),
    ("expired", "?ssl_ca_certs={ca}", False),
    ("foreign", "?ssl_ca_certs={ca}", False),
    ("foreign", "?ssl_cert_reqs=none", True),
    ("foreign", "?ssl_cert_reqs=CERT_NONE", True),
]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(Path(tmp_path_factory.mktemp("certificates")))


def publishes(settings: Settings) -> bool:
    try:
        Broker(celery_app(settings, works=False)).publish("pipeline.dispatch", "c1", about="(c1)")
    except BrokerUnavailable:
        return False
    return True


def works(settings: Settings) -> bool:
    """Whether a worker's own connection is accepted."""
    with celery_app(settings, works=True).connection_for_read() as connection:
        try:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, timeout=5)
        except kombu.exceptions.OperationalError:
            return False
        return True


def limits(url: str) -> bool:
    try:
        Limiter(connect(url)).standing("default")[0]
    except RedisUnavailable:
        return False
    return True


def is_inspected(url: str) -> bool:
    try:
        with inspecting(url, "the rate limit") as found:
            found.clock()
    except RedisUnavailable:
        return False
    return True


def is_heard(url: str, valkey: object) -> bool:
    HeartbeatSender(url, "web", "a-host").send()
    return any(one.name == "a-host" for one in Heartbeats(valkey).alive())  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "parameters", "accepted"), KINDS)
def test_every_client_of_a_redis_accepts_the_same_certificates(
    valkey: object, valkey_url: str, make_settings: Callable[..., Settings], certificates: Certificates,
    kind: Kind, parameters: str, accepted: bool,
) -> None:  # fmt: skip
    """Leads were accepted over a connection that nobody had checked, and the limiter refused the same certificate."""
    with tls_front(urlsplit(valkey_url).port or 6379, certificates.server(kind)) as port:
        url = f"rediss://127.0.0.1:{port}/0{parameters.format(ca=certificates.ca_file)}"
        settings = make_settings(broker_url=url)
        told = [publishes(settings), works(settings), limits(url), is_inspected(url), is_heard(url, valkey)]
    assert told == [accepted] * 5


@pytest.mark.parametrize(("kind", "parameters", "accepted"), KINDS)
def test_both_clients_of_a_rabbitmq_accept_the_same_certificates(
    valkey_url: str, rabbitmq_url: str, make_settings: Callable[..., Settings], certificates: Certificates,
    kind: Kind, parameters: str, accepted: bool,
) -> None:  # fmt: skip
    parts = urlsplit(rabbitmq_url)
    with tls_front(parts.port or 5672, certificates.server(kind)) as port:
        login = f"{parts.username}:{parts.password}"
        url = f"amqps://{login}@127.0.0.1:{port}{parts.path}{parameters.format(ca=certificates.ca_file)}"
        settings = make_settings(broker_url=url, redis_url=valkey_url)
        assert [works(settings), publishes(settings)] == [accepted] * 2
