"""Addresses of Redis and RabbitMQ: what is read, what TLS means in each spelling, and what is refused in one line."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from pipeline.addresses import Tls, read_address
from pipeline.settings import SettingsError, load_settings


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "ca.pem").touch()
    return str(tmp_path / "ca.pem")


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:6379/0",
        "redis://localhost",
        "redis://:p%40ss@[::1]:6379/3",
        "rediss://user:secret@valkey.example:6380/1",
        "amqp://guest:guest@127.0.0.1:5672//",
        "amqps://u:p@rabbit.example/vhost%2Fx",
        "unix:///run/valkey.sock?db=1",
        "sentinel://one:26379;sentinel://two:26379/0",
    ],
)
def test_an_address_is_kept_as_it_is_written(url: str) -> None:
    assert read_address(url).url == url


@pytest.mark.parametrize(
    ("parameters", "tls"),
    [
        ("", Tls()),
        ("?ssl_cert_reqs=required", Tls()),
        ("?ssl_cert_reqs=CERT_REQUIRED", Tls()),
        ("?verify=verify_peer", Tls()),
        ("?sslmode=verify-full", Tls()),
        ("?ssl_cert_reqs=none", Tls(verify=False)),
        ("?ssl_cert_reqs=CERT_NONE", Tls(verify=False)),
        ("?verify=verify_none", Tls(verify=False)),
        ("?ssl_check_hostname=false", Tls(check_name=False)),
        ("?ssl_ca_certs={file}", Tls(ca_file="{file}")),
        ("?cacertfile={file}&ssl_cert_reqs=CERT_REQUIRED", Tls(ca_file="{file}")),
        ("?sslrootcert={file}&sslcert={file}&sslkey={file}", Tls(True, True, "{file}", "{file}", "{file}")),
    ],
)
@pytest.mark.parametrize("scheme", ["rediss", "amqps"])
def test_every_spelling_of_tls_means_the_same_to_both(scheme: str, parameters: str, tls: Tls, file: str) -> None:
    address = read_address(f"{scheme}://host{parameters.replace('{file}', file)}")
    names = [file if value == "{file}" else value for value in (tls.ca_file, tls.certificate, tls.key)]
    assert address.tls == Tls(tls.verify, tls.check_name, *names)
    assert address.url == f"{scheme}://host"


def test_what_verifies_for_redis_py_verifies_for_celery() -> None:
    redis, amqp = read_address("rediss://host"), read_address("amqps://host?verify=verify_none")
    assert redis.for_redis()["ssl_cert_reqs"] == redis.for_celery()["ssl_cert_reqs"] == "required"
    assert redis.for_redis()["ssl_check_hostname"] is True
    assert amqp.for_celery()["cert_reqs"] == ssl.CERT_NONE
    assert "server_hostname" not in amqp.for_celery()
    assert read_address("amqps://host").for_celery()["server_hostname"] == "host"
    assert read_address("redis://host").for_celery() is None


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://localhost", "must be the URL of a Redis, Valkey or RabbitMQ"),
        ("localhost:6379", "must be the URL of a Redis, Valkey or RabbitMQ"),
        ("redis://127.0.0.1:6379/x", "must be a database number, such as /0, not '/x'"),
        ("redis://127.0.0.1:6379/0?socket_timeout=3", "the parameter socket_timeout is not supported"),
        ("redis://127.0.0.1:99999/0", "the port must be a number up to 65535"),
        ("redis://127.0.0.1:port/0", "the port must be a number up to 65535"),
        ("redis://127.0.0.1/0?ssl_cert_reqs=none", "redis:// has none; write rediss://"),
        ("amqp://127.0.0.1?verify=verify_peer", "amqp:// has none; write amqps://"),
        ("rediss://127.0.0.1/0?ssl_cert_reqs=optional", "write required or none instead of 'optional'"),
        ("rediss://127.0.0.1/0?ssl_ca_certs=/nowhere.pem", "there is no file /nowhere.pem"),
        ("rediss://127.0.0.1/0?ssl_cert_reqs=none&verify=verify_peer", "contradicts"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_in_one_line_that_names_the_variable(url: str, says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(broker_url=url)
    assert str(refused.value).startswith("BROKER_URL: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_address_of_the_limiter_must_be_a_redis() -> None:
    with pytest.raises(SettingsError, match="REDIS_URL: must be the URL of a Redis or Valkey"):
        load_settings(redis_url="amqp://127.0.0.1")
