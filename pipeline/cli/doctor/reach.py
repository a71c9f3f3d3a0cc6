"""What the doctor checks of the way out to Futwork, and of the way in to our webhook."""

from __future__ import annotations

import http.client
import secrets
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipeline.cli.doctor.finding import Finding
from pipeline.settings import Settings

_SECONDS = 5.0


def futwork(settings: Settings) -> Finding:
    """Whether a connection to Futwork's host can be opened; nothing is sent over it."""
    from pipeline.futwork.probe import Unreachable, reach

    try:
        reach(settings)
    except Unreachable as error:
        return Finding("futwork", "fail", f"{error}: nothing can be sent; check FUTWORK_BASE_URL and the firewall")
    return Finding(
        "futwork", "ok", f"{urlsplit(settings.futwork_base_url).hostname} accepts connections from this host"
    )


def keys(settings: Settings) -> Iterator[Finding]:
    """Whether Futwork refuses a request because of its key, and what its answer proves."""
    from pipeline.futwork.probe import try_key

    for account in settings.api_keys():
        tried = try_key(settings, account)
        if tried.verdict == "refused":
            text = f"Futwork refuses the key of the account {account} ({tried.text}): correct it"
            yield Finding("key check", "fail", text)
        elif tried.verdict == "not refused":
            text = (
                f"an empty lead for a campaign that cannot exist was not refused for the key of {account}"
                f" ({tried.text}); Futwork may check the key last, so this is a good sign and no proof"
            )
            yield Finding("key check", "ok", text)
        else:
            yield Finding("key check", "warn", f"the answer proves nothing about the key of {account}: {tried.text}")


def webhook(settings: Settings, url: str) -> Finding:
    """Whether the webhook's address leads to our web process, without leaving an event.

    First its `/healthz`, then a post with a token that is wrong, which only our webhook answers with our 401.
    """
    where = urlsplit(url)
    path = where.path.rstrip("/")
    if any(path.endswith(f"/{token}") for token in settings.webhook_tokens()):
        path = path.rpartition("/")[0]  # the probe must not contain the token
    shown = f"{where.scheme}://{where.netloc.rpartition('@')[2]}"
    root = path.removesuffix("/webhooks/futwork")
    try:
        status, body = _ask(url, "GET", f"{root}/healthz")
        if status != 200 or b'"ok"' not in body:
            text = f"{shown}{root}/healthz answers HTTP {status}, not as our web process: check the proxy and its paths"
            return Finding("webhook-url", "fail", text)
        status, body = _ask(url, "POST", path, token=f"doctor-{secrets.token_hex(8)}")
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = (
            getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
        )
        text = f"{shown} cannot be reached from here ({why}): check name, certificate, proxy and firewall"
        return Finding("webhook-url", "fail", text)
    if status == 401 and b"webhook token" in body:
        return Finding("webhook-url", "ok", f"{shown}{path} leads to our webhook, which refuses a wrong token")
    if 200 <= status < 300:
        text = f"{shown}{path} answers HTTP {status} to a wrong token: what answers there is not our webhook"
        return Finding("webhook-url", "fail", text)
    text = f"{shown}{path} answers HTTP {status} where our webhook says 401: check the path and the proxy's rules"
    return Finding("webhook-url", "fail", text)


def status_pages(url: str) -> Finding:
    """Whether the status pages ask for a password where the webhook's address leads; no name or password is sent."""
    where = urlsplit(url)
    shown = f"{where.scheme}://{where.netloc.rpartition('@')[2]}"
    path = f"{where.path.partition('/webhooks/')[0]}/ops/sign-in"
    try:
        status, body = _ask(url, "GET", path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Finding("ops-url", "warn", f"{shown}{path} cannot be reached from here ({type(error).__name__})")
    if status == 200 and b"password" in body.lower():
        return Finding("ops-url", "ok", f"{shown}{path} asks for a password")
    text = f"{shown}{path} answers HTTP {status}: if the status pages should be reachable there, correct the proxy"
    return Finding("ops-url", "warn", text)


def _ask(url: str, method: str, path: str, *, token: str = "") -> tuple[int, bytes]:
    """One request without redirects or proxies: its status and the beginning of its body."""
    where = urlsplit(url)
    connection: http.client.HTTPConnection
    if where.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(where.hostname or "", where.port, timeout=_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=_SECONDS)
    try:
        headers = {"Content-Type": "application/json"} | ({"x-api-key": token} if token else {})
        connection.request(method, path or "/", body=b"{}" if token else None, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(4096)
    finally:
        connection.close()
