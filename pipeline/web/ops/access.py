"""Who may see the pages: passwords, sessions, sign-in attempts, and how many pages are made at a time.

A session is a signed cookie, so every process on every host that knows `OPS_SECRET` can read it and none has to store
it. It ends after its time, when the user signs out, and when the user's entry in `OPS_USERS` changes or is removed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from itsdangerous import BadSignature, URLSafeTimedSerializer
from werkzeug.security import check_password_hash, generate_password_hash

from pipeline.coordination.connection import RedisUnavailable
from pipeline.coordination.marks import Marks
from pipeline.observability.logs import logger
from pipeline.settings import OpsUser, Settings

log = logger(__name__)

COOKIE = "pipeline_ops"
FORM_COOKIE = "pipeline_ops_form"
FORM_SECONDS = 3600  # how long a sign-in page may stand open

_WINDOW = timedelta(minutes=10)
_TRIES_OF_ADDRESS = 10  # wrong passwords in the window
_TRIES_OF_NAME = 50  # higher: someone who knows a name must not lock its owner out with a few requests
_MOST_LOCAL = 10_000
_AT_ONCE = 2  # pages that a process makes at a time; the webhook has the other threads
_WAITING = 4  # pages that wait for a slot
_PATIENCE_SECONDS = 2.0
_NOTE_SECONDS = 60
PREFIX = "futwork:ops"
"""Of the marks of these pages in Redis."""

_NOBODY = "scrypt.32768.8.1.c2h2NgTnqtqZ8hYu." + "0" * 128
"""The hash for unknown names, so that checking them takes as long as for known ones."""


class Locked(Exception):
    """There were too many wrong passwords in the last minutes."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who has signed in."""

    name: str
    may_change: bool
    csrf: str
    session: str

    def knows(self, token: str) -> bool:
        """Whether a form shows the token of this session."""
        return hmac.compare_digest(self.csrf.encode(), token.encode("utf-8", "surrogateescape"))


class Gatekeeper:
    """Signs people in and recognises their sessions."""

    def __init__(self, settings: Settings, *, marks: Callable[[], Marks]) -> None:
        self._users = settings.operators()
        self._seconds = settings.ops_session_seconds
        secret = settings.ops_secret.get_secret_value()
        self._sessions = _serializer(secret, "session")
        self._forms = _serializer(secret, "form")
        self._notes = _serializer(secret, "note")
        self._marks = marks
        self._local: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def visitor(self, cookie: str) -> Visitor | None:
        """The visitor of a cookie, or None if it is not ours, too old, ended, or its user has changed."""
        try:
            said: dict[str, str] = self._sessions.loads(cookie, max_age=self._seconds)
            user = self._users[said["user"]]
        except (BadSignature, KeyError, TypeError):
            return None
        if not hmac.compare_digest(said["entry"], _fingerprint(user)) or self._has_ended(said["id"]):
            return None
        return Visitor(user.name, user.role == "operator", said["csrf"], said["id"])

    def sign_in(self, name: str, password: str, *, address: str) -> str | None:
        """The cookie of a new session, or None if name or password are wrong; raises `Locked` after too many attempts.

        An attempt is counted before its password is checked, so that of many at once only the first are checked.
        """
        counters = {f"address:{address}": _TRIES_OF_ADDRESS, f"name:{_short(name)}": _TRIES_OF_NAME}
        tries = {counter: self._count(counter) for counter in counters}  # both are counted, even if one is over already
        if any(tries[counter] > most for counter, most in counters.items()):
            raise Locked
        user = self._users.get(name)
        right = check_password(user.password_hash if user else _NOBODY, password[:1024])
        if user is None or not right:
            return None
        for counter in counters:
            self._forget(counter)
        session = {"user": name, "entry": _fingerprint(user), "id": secrets.token_hex(12)}
        cookie = self._sessions.dumps(session | {"csrf": secrets.token_hex(24)})
        return cookie if isinstance(cookie, str) else cookie.decode()

    def end(self, visitor: Visitor) -> None:
        """End a session everywhere; while Redis is away only the cookie is deleted, and a copy of it ends later."""
        try:
            self._marks().set(f"ended:{visitor.session}", duration=timedelta(seconds=self._seconds))
        except RedisUnavailable:
            log.warning("a session could not be ended everywhere", user=visitor.name)

    def new_form(self) -> tuple[str, str]:
        """The token of a sign-in form, and the cookie that proves that its page was ours."""
        nonce = secrets.token_hex(16)
        return _text(self._forms.dumps(nonce)), nonce

    def knows_form(self, token: str, cookie: str) -> bool:
        """Whether form and cookie belong together and are not too old."""
        try:
            nonce = str(self._forms.loads(token, max_age=FORM_SECONDS))
        except BadSignature:
            return False
        return hmac.compare_digest(nonce.encode(), cookie.encode("utf-8", "surrogateescape"))

    def note(self, text: str) -> str:
        """A message for the next page as a part of its URL, signed so that nobody else can put text on our pages."""
        return _text(self._notes.dumps(text[:600]))

    def read_note(self, token: str) -> str | None:
        """The message, if it is ours and new."""
        try:
            return str(self._notes.loads(token, max_age=_NOTE_SECONDS)) if token else None
        except BadSignature:
            return None

    def _has_ended(self, session: str) -> bool:
        try:
            return self._marks().is_set(f"ended:{session}")
        except RedisUnavailable:
            return False

    def _count(self, counter: str) -> int:
        try:
            return self._marks().count(f"tries:{counter}", window=_WINDOW)
        except RedisUnavailable:
            log.warning("sign-in attempts are counted in this process alone: no Redis answers")
        with self._lock:
            if len(self._local) > _MOST_LOCAL:
                self._local.clear()
            began, tries = self._local.get(counter, (time.monotonic(), 0))
            if time.monotonic() - began > _WINDOW.total_seconds():
                began, tries = time.monotonic(), 0
            self._local[counter] = (began, tries + 1)
            return tries + 1

    def _forget(self, counter: str) -> None:
        try:
            self._marks().forget(f"tries:{counter}")
        except RedisUnavailable:
            log.debug("sign-in attempts were not forgotten", error="no Redis answers")
        with self._lock:
            self._local.pop(counter, None)


class Turnstile:
    """Slots for the few pages that are made at a time, and for the few that wait: the webhook shares the threads."""

    def __init__(self, *, at_once: int = _AT_ONCE, waiting: int = _WAITING) -> None:
        self._inside = threading.BoundedSemaphore(at_once)
        self._near = threading.BoundedSemaphore(at_once + waiting)

    def enter(self) -> bool:
        """Whether the request may make its page; if so, it must `leave` afterwards."""
        if not self._near.acquire(blocking=False):
            return False
        if not self._inside.acquire(timeout=_PATIENCE_SECONDS):
            self._near.release()
            return False
        return True

    def leave(self) -> None:
        """Free the slot."""
        self._inside.release()
        self._near.release()


def hash_password(password: str) -> str:
    """The hash as `OPS_USERS` holds it.

    It is Werkzeug's scrypt, with dots in the place of its colons and dollar signs: a colon parts our entries, and
    Compose takes a dollar sign in an `.env` file for a variable.
    """
    return generate_password_hash(password, "scrypt").replace(":", ".").replace("$", ".")


def check_password(hashed: str, password: str) -> bool:
    """Whether the password is the one of the hash."""
    method, n, r, p, salt, digest = hashed.split(".")
    return check_password_hash(f"{method}:{n}:{r}:{p}${salt}${digest}", password)


def _serializer(secret: str, purpose: str) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(
        secret, salt=f"pipeline-ops-{purpose}", signer_kwargs={"digest_method": hashlib.sha256}
    )


def _fingerprint(user: OpsUser) -> str:
    return hashlib.sha256(f"{user.name}:{user.password_hash}:{user.role}".encode()).hexdigest()[:24]


def _short(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _text(signed: Any) -> str:
    return signed if isinstance(signed, str) else signed.decode()
