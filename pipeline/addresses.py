"""Addresses of Redis and RabbitMQ: read once, so that TLS means the same to everything that connects.

`rediss://` and `amqps://` verify the server's certificate and its name, unless the address says otherwise in so many
words. Every spelling in use is understood: redis-py's and kombu's `ssl_…`, RabbitMQ's `verify`,
`cacertfile`, and libpq's `sslmode`, `sslrootcert`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

_KINDS = {
    "redis": "redis", "rediss": "redis", "unix": "redis", "sentinel": "redis",
    "amqp": "amqp", "amqps": "amqp", "pyamqp": "amqp",
}  # fmt: skip
_TLS = ("rediss", "amqps")
_VERIFIES = {
    "required": True, "cert_required": True, "verify_peer": True, "verify-full": True, "true": True, "1": True,
    "none": False, "cert_none": False, "verify_none": False, "false": False, "0": False,
}  # fmt: skip
_NAMES = {
    "ssl_cert_reqs": "verify", "cert_reqs": "verify", "verify": "verify", "sslmode": "verify",
    "ssl_check_hostname": "check_name", "check_hostname": "check_name",
    "ssl_ca_certs": "ca_file", "ca_certs": "ca_file", "cacertfile": "ca_file", "sslrootcert": "ca_file",
    "ssl_certfile": "certificate", "certfile": "certificate", "sslcert": "certificate",
    "ssl_keyfile": "key", "keyfile": "key", "sslkey": "key",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tls:
    """How a server's certificate is checked, and what we show it."""

    verify: bool = True
    check_name: bool = True
    """Whether the certificate must be for the host of the address; only where it is verified at all."""
    ca_file: str | None = None
    """The issuers that are trusted; without one, those of the system."""
    certificate: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """The address of a Redis, Valkey or RabbitMQ."""

    url: str = field(repr=False)
    """Without the parameters that say how TLS is done, and without any other."""
    host: str
    is_redis: bool
    tls: Tls | None

    def for_redis(self) -> dict[str, Any]:
        """How redis-py is told to do TLS; the same names work as Celery's `broker_use_ssl` for a Redis."""
        if self.tls is None:
            return {}
        return {
            "ssl_cert_reqs": "required" if self.tls.verify else "none",
            "ssl_check_hostname": self.tls.verify and self.tls.check_name,
            "ssl_ca_certs": self.tls.ca_file,
            "ssl_certfile": self.tls.certificate,
            "ssl_keyfile": self.tls.key,
        }

    def for_celery(self) -> dict[str, Any] | None:
        """Celery's `broker_use_ssl`, or None without TLS."""
        if self.tls is None:
            return None
        if self.is_redis:
            return self.for_redis()
        import ssl

        options = {
            "cert_reqs": ssl.CERT_REQUIRED if self.tls.verify else ssl.CERT_NONE,
            "ca_certs": self.tls.ca_file,
            "certfile": self.tls.certificate,
            "keyfile": self.tls.key,
        }
        if self.tls.verify and self.tls.check_name:
            options["server_hostname"] = self.host  # py-amqp checks the name where it is given one
        return options


def read_address(url: str) -> Address:
    """Read the address of a Redis, Valkey or RabbitMQ; raise `ValueError` that says what is wrong with it."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _KINDS:
        raise ValueError("must be the URL of a Redis, Valkey or RabbitMQ (redis://, amqp://)")
    if scheme == "sentinel":  # several hosts, separated by semicolons: kombu reads them
        return Address(url, "", is_redis=True, tls=None)
    if scheme == "unix":
        return Address(url, "", is_redis=True, tls=None)
    parts = urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("the port must be a number up to 65535; an IPv6 address needs brackets: [::1]:6379") from None
    is_redis = _KINDS[scheme] == "redis"
    if is_redis and not re.fullmatch(r"/?\d*", parts.path):
        raise ValueError(f"the last part must be a database number, such as /0, not {parts.path!r}")
    said = _read_parameters(parts.query)
    if said and scheme not in _TLS:
        raise ValueError(f"a parameter says how TLS is done, but {scheme}:// has none; write {_with_tls(scheme)}://")
    tls = _read_tls(said) if scheme in _TLS else None
    login = ""
    if parts.username is not None or parts.password is not None:
        login = quote(unquote(parts.username or ""), safe="")
        login += f":{quote(unquote(parts.password), safe='')}" if parts.password is not None else ""
        login += "@"
    place = f"[{host}]" if ":" in host else host
    plain = f"{scheme}://{login}{place}{f':{port}' if port is not None else ''}{parts.path}"
    return Address(plain, host, is_redis=is_redis, tls=tls)


def _read_parameters(query: str) -> dict[str, str]:
    said: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _NAMES:
            known = "ssl_cert_reqs, ssl_check_hostname, ssl_ca_certs, ssl_certfile, ssl_keyfile"
            raise ValueError(f"the parameter {name} is not supported; these are: {known}")
        if said.setdefault(_NAMES[name], value) != value:
            raise ValueError(f"the parameter {name} contradicts another one")
    return said


def _read_tls(said: Mapping[str, str]) -> Tls:
    for name in ("ca_file", "certificate", "key"):
        if name in said and not Path(said[name]).is_file():
            raise ValueError(f"there is no file {said[name]}")
    return Tls(
        verify=_truth("verify", said.get("verify", "required")),
        check_name=_truth("check_name", said.get("check_name", "true")),
        ca_file=said.get("ca_file"),
        certificate=said.get("certificate"),
        key=said.get("key"),
    )


def _truth(name: str, value: str) -> bool:
    found = _VERIFIES.get(value.lower())
    if found is None:
        allowed = "required or none" if name == "verify" else "true or false"
        raise ValueError(f"a certificate is verified or not: write {allowed} instead of {value!r}")
    return found


def _with_tls(scheme: str) -> str:
    return "rediss" if scheme == "redis" else "amqps"
