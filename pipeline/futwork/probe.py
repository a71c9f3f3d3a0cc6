"""What can be learned about the way to Futwork and the key without submitting a lead."""

from __future__ import annotations

import socket
import ssl
import threading
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import requests

from pipeline.futwork.verdict import excerpt_of
from pipeline.settings import Settings

_NO_CAMPAIGN = "0" * 24
_SECONDS = 5.0


class Unreachable(Exception):
    """Futwork's host cannot be reached from here; the message says how far it went."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What an empty lead was answered."""

    verdict: Literal["refused", "not refused", "unknown"]
    text: str


def reach(settings: Settings) -> None:
    """Connect to Futwork's host, with TLS if its address says so, and send nothing; raise `Unreachable` otherwise."""
    where = urlsplit(settings.futwork_base_url)
    found: list[str] = ["its name could not be looked up in time"]
    # A name lookup has no time limit of its own.
    thread = threading.Thread(target=_connect, args=(settings, found), daemon=True)
    thread.start()
    thread.join(2 * _SECONDS)
    if found[-1]:
        raise Unreachable(f"{where.hostname} cannot be reached: {found[-1]}")


def _connect(settings: Settings, found: list[str]) -> None:
    where = urlsplit(settings.futwork_base_url)
    secure = where.scheme == "https"
    try:
        with socket.create_connection((where.hostname or "", where.port or (443 if secure else 80)), _SECONDS) as plain:
            if secure:
                context = ssl.create_default_context(cafile=_certificates(settings))
                with context.wrap_socket(plain, server_hostname=where.hostname):
                    pass
    except ssl.SSLCertVerificationError as error:
        found.append(f"its certificate is not trusted ({error.verify_message})")
    except OSError as error:
        found.append(error.strerror or str(error) or type(error).__name__)
    else:
        found.append("")


def try_key(settings: Settings, account: str) -> Tried:
    """Send an empty object for a campaign that cannot exist, with the account's key, and read the answer.

    It can create no call: neither number nor data, both of which Futwork's guide requires, for an id that is no
    campaign's. What it proves is little: 401 and 403 say that the key is refused. Any other answer says that the
    request was not turned away for its key, and not whether Futwork looks at the key before the rest.
    """
    url = f"{settings.futwork_base_url}/campaigns/{_NO_CAMPAIGN}/leads"
    with requests.Session() as session:
        session.trust_env = False  # no proxy and no .netrc, as when leads are sent
        try:
            answer = session.post(
                url,
                json={},
                headers={"x-api-key": settings.api_keys()[account], "User-Agent": "futwork-lead-pipeline"},
                timeout=(_SECONDS, 2 * _SECONDS),
                allow_redirects=False,
                verify=_certificates(settings) or True,
            )
        except requests.RequestException as error:
            return Tried("unknown", f"no answer ({type(error).__name__})")
    told = f"HTTP {answer.status_code} {excerpt_of(answer.content, secret=settings.api_keys()[account])}".strip()[:200]
    if answer.status_code in (401, 403):
        return Tried("refused", told)
    if answer.status_code in (400, 404, 409, 422):
        return Tried("not refused", told)
    return Tried("unknown", told)


def _certificates(settings: Settings) -> str | None:
    return str(settings.futwork_ca_file) if settings.futwork_ca_file else None
