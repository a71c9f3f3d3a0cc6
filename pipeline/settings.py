"""Every environment variable of the pipeline, typed, with its unit in its name.

`load_settings()` reads the environment and a `.env` file in the working directory; `load_producer_settings()` reads
only what `enqueue` needs. Each variable may also be written with the prefix `FUTWORK_PIPELINE_`, for a program or a
host where the plain name means something else. The prefixed one wins, wherever it stands. A wrong value raises
`SettingsError`, whose message is one line that names the variable and says what it may hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

import pydantic_settings
from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, SecretStr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from pipeline.addresses import read_address

OnUncertain = Literal["hold", "resend", "drop"]
OnServerError = Literal["uncertain", "retry"]

PREFIX = "FUTWORK_PIPELINE_"

_Settings = TypeVar("_Settings", bound="ProducerSettings")
_VARIABLE = re.compile(r"\b[A-Z][A-Z_]+\b")
_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*/\s*(s|sec|second|m|min|minute|h|hour)", re.IGNORECASE)
_SECONDS_PER = {"s": 1, "m": 60, "h": 3600}
_ACCOUNT_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
_OPS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_OPS_HASH = re.compile(r"scrypt\.\d{1,7}\.\d{1,3}\.\d{1,3}\.[A-Za-z0-9]{8,64}\.[0-9a-f]{64,256}")
_OPS_SECRET_LENGTH = 32  # characters; 24 random bytes in hexadecimal have 48
_CAMPAIGN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # as `pipeline.domain.campaign` checks it
_DATABASE_URL = re.compile(r"(sqlite(\+\w+)?:///(?!:memory:).+|(postgres|postgresql)(\+\w+)?://.+)")
_SHORTEST_SECRET = 6  # characters; a shorter one would mask half of what is logged
_TEN_YEARS_SECONDS = 10 * 365 * 24 * 3600  # longer is a slip of the keyboard, and past what a date can hold


class SettingsError(Exception):
    """A setting is missing or wrong; the message is one line for the person who starts the process.

    It names each variable as it is written in the environment or in `.env`: with the prefix or without.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_VARIABLE.sub(lambda name: _as_written(name[0]), message))


@dataclass(frozen=True, slots=True)
class Rate:
    """How many submissions a period allows, written `20/s`, `600/m` or `5000/h`."""

    count: float
    seconds: int

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """Read a rate such as `20/s`; raise `ValueError` with the accepted forms otherwise."""
        if isinstance(text, cls):
            return text
        match = _RATE.fullmatch(str(text).strip())
        if match is None or float(match[1]) <= 0:
            raise ValueError("must be a positive rate such as 20/s, 600/m or 5000/h")
        return cls(float(match[1]), _SECONDS_PER[match[2][0].lower()])

    @property
    def per_second(self) -> float:
        """The rate in submissions a second."""
        return self.count / self.seconds

    def __str__(self) -> str:
        unit = next(name for name, seconds in _SECONDS_PER.items() if seconds == self.seconds)
        return f"{self.count:.6f}".rstrip("0").rstrip(".") + f"/{unit}"


@dataclass(frozen=True, slots=True)
class OpsUser:
    """Somebody who may sign in to the status pages."""

    name: str
    password_hash: str = field(repr=False)
    """As `pipeline ops-user` prints it: `scrypt.N.r.p.salt.hash`."""
    role: Literal["viewer", "operator"]


def _known_region(value: str) -> str:
    import phonenumbers

    if value.upper() not in phonenumbers.SUPPORTED_REGIONS:
        raise ValueError("must be a two-letter region that has phone numbers, such as IN")
    return value.upper()


def _http_url(value: str) -> str:
    if not re.match(r"https?://[^/\s]+", value):
        raise ValueError("must be an http:// or https:// URL")
    return value.rstrip("/")


def _http_url_or_none(value: str) -> str:
    return _http_url(value) if value else value


def _broker_address(value: str) -> str:
    if value:
        read_address(value)
    return value


def _redis_address(value: str) -> str:
    if value and not read_address(value).is_redis:
        raise ValueError("must be the URL of a Redis or Valkey (redis://)")
    return value


def _database_address(value: str) -> str:
    if value and not _DATABASE_URL.fullmatch(value):
        raise ValueError("must be sqlite:///path or postgresql://user@host/name: processes share the ledger")
    return value


def _lower(value: object) -> object:
    return value.strip().lower() if isinstance(value, str) else value


Seconds = Annotated[float, Field(gt=0, le=_TEN_YEARS_SECONDS)]
Allowed = Annotated[Rate, BeforeValidator(Rate.parse), NoDecode]
# URLs may hold a password, so no repr of the settings shows them.
BrokerUrl = Annotated[str, Field(repr=False), AfterValidator(_broker_address)]
RedisUrl = Annotated[str, Field(repr=False), AfterValidator(_redis_address)]
DatabaseUrl = Annotated[str, Field(repr=False), AfterValidator(_database_address)]


class ProducerSettings(BaseSettings):
    """The settings that `enqueue` needs: a host application's other variables cannot break it."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        str_strip_whitespace=True,
    )

    broker_url: BrokerUrl = ""
    rabbitmq_queue_type: Annotated[Literal["classic", "quorum"], BeforeValidator(_lower)] = "classic"
    default_region: Annotated[str, AfterValidator(_known_region)] = "IN"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not used
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Look for the prefixed name before the plain one, and for each in the environment before `.env`."""
        file = getattr(dotenv_settings, "env_file", None)
        return (
            init_settings,
            EnvSettingsSource(settings_cls, env_prefix=PREFIX),
            DotEnvSettingsSource(settings_cls, env_file=file, env_prefix=PREFIX),
            env_settings,
            dotenv_settings,
        )


class Settings(ProducerSettings):
    """The settings of one process; each field is the environment variable of the same name in capitals."""

    # Futwork
    futwork_api_key: SecretStr = SecretStr("")
    futwork_api_keys: SecretStr = SecretStr("")
    futwork_base_url: Annotated[str, AfterValidator(_http_url)] = "https://platform.futwork.ai/api"
    futwork_http_engine: Annotated[Literal["auto", "requests", "curl"], BeforeValidator(_lower)] = "auto"
    futwork_ca_file: Path | None = None
    connect_timeout_seconds: Seconds = 5.0
    read_timeout_seconds: Seconds = 30.0

    # Where things live, beside the broker
    redis_url: RedisUrl = ""
    database_url: DatabaseUrl = "sqlite:///var/pipeline.db"
    spool_dir: Path = Path("var/spool")
    spool_max_bytes: PositiveInt = 256 * 1024 * 1024

    # Who may speak to the web process
    webhook_token: SecretStr = SecretStr("")
    intake_tokens: SecretStr = SecretStr("")
    webhook_url: Annotated[str, AfterValidator(_http_url_or_none)] = ""
    webhook_max_bytes: Annotated[int, Field(ge=1, le=8 * 1024 * 1024)] = 1024 * 1024  # a broker's messages have a bound
    intake_max_bytes: PositiveInt = 16 * 1024 * 1024

    # The status pages
    ops_users: SecretStr = SecretStr("")
    ops_secret: SecretStr = SecretStr("")
    ops_session_seconds: Annotated[int, Field(ge=60, le=30 * 24 * 3600)] = 12 * 3600
    ops_proxies: Annotated[int, Field(ge=0, le=10)] = 0

    # How fast
    account_rate: Allowed = Rate(20, 1)
    campaign_rate: Allowed = Rate(20, 1)
    dispatch_concurrency: Annotated[int, Field(ge=1, le=256)] = 128
    dispatchers_per_campaign: Annotated[int, Field(ge=1, le=256)] = 4
    slice_seconds: Seconds = 5.0
    sweep_seconds: Seconds = 2.0

    # How long and how often
    max_attempts: PositiveInt = 8
    lead_max_age_seconds: Annotated[int, Field(ge=1, le=_TEN_YEARS_SECONDS)] = 2 * 24 * 3600
    claim_seconds: Seconds = 120.0
    backoff_base_seconds: Seconds = 2.0
    backoff_cap_seconds: Seconds = 600.0
    retry_after_cap_seconds: Seconds = 3600.0
    on_uncertain: Annotated[OnUncertain, BeforeValidator(_lower)] = "hold"
    uncertain_after_seconds: Seconds = 3600.0
    on_server_error: Annotated[OnServerError, BeforeValidator(_lower)] = "uncertain"
    probe_first_seconds: Seconds = 30.0
    probe_cap_seconds: Seconds = 600.0

    # Events
    reference_key: Annotated[str, Field(max_length=64)] = ""

    # Metrics
    metrics_campaigns: Annotated[int, Field(ge=0, le=1000)] = 50

    # Logs
    log_format: Annotated[Literal["auto", "json", "console"], BeforeValidator(_lower)] = "auto"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"

    # Traces and faults, for those who collect them
    otel_exporter_otlp_endpoint: Annotated[str, AfterValidator(_http_url_or_none)] = ""
    sentry_dsn: SecretStr = SecretStr("")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        slowest = self.connect_timeout_seconds + self.read_timeout_seconds
        if self.claim_seconds < slowest + 5:
            raise ValueError(
                f"CLAIM_SECONDS ({self.claim_seconds:g}) must exceed CONNECT_TIMEOUT_SECONDS + READ_TIMEOUT_SECONDS"
                f" ({slowest:g}) by 5 or more, or a claim could end while its request is still out"
            )
        if self.reference_key == "leadId":
            raise ValueError("REFERENCE_KEY must not be leadId: Futwork's tools read that key as their own id")
        self.api_keys()
        self.webhook_tokens()
        self.intake_scopes()
        self.operators()
        return self

    def api_keys(self) -> dict[str, str]:
        """Every Futwork account's key by account name; `FUTWORK_API_KEY` is the account `default`."""
        keys: dict[str, str] = {}
        if key := self.futwork_api_key.get_secret_value().strip():
            keys["default"] = _header_safe("FUTWORK_API_KEY", key)
        for pair in _parts(self.futwork_api_keys):
            name, _, key = (part.strip() for part in pair.partition("="))
            if not key or not _ACCOUNT_NAME.fullmatch(name):
                raise ValueError(
                    "FUTWORK_API_KEYS must be name=key pairs separated by commas, such as north=k1,south=k2"
                )
            if keys.setdefault(name, _header_safe("FUTWORK_API_KEYS", key)) != key:
                raise ValueError(f"FUTWORK_API_KEYS gives the account {name} a second key (FUTWORK_API_KEY is default)")
        return keys

    def webhook_tokens(self) -> tuple[str, ...]:
        """The tokens that the webhook accepts; several, separated by commas, allow a change without a gap."""
        return tuple(_header_safe("WEBHOOK_TOKEN", part) for part in _parts(self.webhook_token))

    def intake_scopes(self) -> dict[str, str | None]:
        """Each intake token with the campaign that it is limited to, or None for all (`token` or `token:campaign`)."""
        scopes: dict[str, str | None] = {}
        for part in _parts(self.intake_tokens):
            token, limited, campaign = part.partition(":")
            # A slip must not widen what a token may do: no empty token, and no limit to a campaign that cannot be.
            if not token or token in scopes or (limited and not _CAMPAIGN_ID.fullmatch(campaign)):
                raise ValueError(
                    "INTAKE_TOKENS must be tokens separated by commas, each once, as token or token:campaign_id"
                )
            scopes[_header_safe("INTAKE_TOKENS", token)] = campaign or None
        return scopes

    def secrets(self) -> set[str]:
        """Every key, token and password of the settings that is long enough to be one, for masking it in logs."""
        found = {*self.api_keys().values(), *self.webhook_tokens(), *self.intake_scopes()}
        found.add(self.sentry_dsn.get_secret_value())
        found |= {self.ops_secret.get_secret_value(), *(user.password_hash for user in self.operators().values())}
        for url in (self.broker_url, self.redis_url, self.database_url):
            found.add(urlsplit(url).password or "")
        return {secret for secret in found if len(secret) >= _SHORTEST_SECRET}

    def operators(self) -> dict[str, OpsUser]:
        """Who may sign in to the status pages, by name; without any the pages are off."""
        users: dict[str, OpsUser] = {}
        for part in _parts(self.ops_users):
            name, _, rest = part.partition(":")
            password_hash, _, role = rest.partition(":")
            if (
                not _OPS_NAME.fullmatch(name)
                or not _OPS_HASH.fullmatch(password_hash)
                or role not in ("", "viewer", "operator")
                or name in users
            ):
                raise ValueError(
                    "OPS_USERS must be entries separated by commas, each name once, as `pipeline ops-user NAME` prints"
                    " them (name:hash, or name:hash:operator)"
                )
            users[name] = OpsUser(name, password_hash, "operator" if role == "operator" else "viewer")
        if users and len(self.ops_secret.get_secret_value()) < _OPS_SECRET_LENGTH:
            raise ValueError(
                f"OPS_SECRET must have {_OPS_SECRET_LENGTH} characters or more where OPS_USERS is set, the same for"
                " every web process on every host: `openssl rand -hex 24` makes one"
            )
        return users

    @property
    def limiter_url(self) -> str:
        """The Redis of the limiter and the dispatch leases: `REDIS_URL`, or the broker where that is a Redis."""
        if self.redis_url:
            return self.redis_url
        if self.broker_url.startswith(("redis://", "rediss://")):
            return self.broker_url
        raise SettingsError("REDIS_URL is not set, and BROKER_URL is no Redis: the shared rate limit needs one")

    @property
    def claim_lease(self) -> timedelta:
        """How long a claimed lead belongs to its dispatcher."""
        return timedelta(seconds=self.claim_seconds)

    @property
    def longest_post(self) -> timedelta:
        """The longest that one POST can take from its start to its verdict."""
        return timedelta(seconds=self.connect_timeout_seconds + self.read_timeout_seconds)


def load_settings(**overrides: object) -> Settings:
    """Read the settings of this process, or raise `SettingsError` with one line that says what to correct."""
    return _load(Settings, overrides)


def load_producer_settings(**overrides: object) -> ProducerSettings:
    """Read what `enqueue` needs, or raise `SettingsError` with one line that says what to correct."""
    return _load(ProducerSettings, overrides)


def lend_to_libraries(start: str) -> None:
    """Show libraries that read the environment themselves our variables whose names begin with *start*.

    They find what `.env` holds, and what is written with our prefix, which wins.
    """
    variables = [(name.upper(), value) for name, value in _variables() if value]
    for name, value in variables:
        if name.startswith(start):
            os.environ.setdefault(name, value)
    for name, value in variables:
        if name.startswith(PREFIX + start):
            os.environ[name.removeprefix(PREFIX)] = value


def _load(kind: type[_Settings], overrides: Mapping[str, object]) -> _Settings:
    try:
        return kind(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        raise SettingsError("; ".join(map(_explain, error.errors(include_url=False)))) from None
    except pydantic_settings.SettingsError as error:
        raise SettingsError(" ".join(str(error).split())) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f".env cannot be read: it must be UTF-8 text ({type(error).__name__})") from None


def _as_written(name: str) -> str:
    """The name of a variable with our prefix, if it is set under that name."""
    prefixed = PREFIX + name
    return prefixed if any(value and found.upper() == prefixed for found, value in _variables()) else name


def _variables() -> Iterator[tuple[str, str | None]]:
    """Every variable of `.env`, then every one of the environment."""
    with suppress(OSError, UnicodeDecodeError):  # whoever loads the settings is told of it
        yield from dotenv_values(".env").items()
    yield from list(os.environ.items())


def _parts(secret: SecretStr) -> list[str]:
    return [part.strip() for part in secret.get_secret_value().split(",") if part.strip()]


def _header_safe(name: str, secret: str) -> str:
    if not secret.isascii() or not secret.isprintable():
        raise ValueError(f"{name} must be printable ASCII: it travels in a header")
    return secret


def _explain(error: ErrorDetails) -> str:
    name = "_".join(map(str, error["loc"])).upper()
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
