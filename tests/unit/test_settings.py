"""Settings: what each variable may hold, and what a person is told when it holds something else."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings import (
    PREFIX,
    ProducerSettings,
    Rate,
    Settings,
    SettingsError,
    lend_to_libraries,
    load_producer_settings,
    load_settings,
)

EXAMPLE = Path(__file__).parents[2] / ".env.example"

RIGHT: dict[str, tuple[str, Any]] = {
    "FUTWORK_BASE_URL": ("https://sandbox.example/api/", "https://sandbox.example/api"),
    "FUTWORK_HTTP_ENGINE": ("Requests", "requests"),
    "FUTWORK_CA_FILE": ("/srv/ca.pem", Path("/srv/ca.pem")),
    "CONNECT_TIMEOUT_SECONDS": ("2.5", 2.5),
    "READ_TIMEOUT_SECONDS": ("12", 12.0),
    "BROKER_URL": ("redis://:secret@10.0.0.1:6379/0", "redis://:secret@10.0.0.1:6379/0"),
    "RABBITMQ_QUEUE_TYPE": ("Quorum", "quorum"),
    "REDIS_URL": ("rediss://10.0.0.1:6379/1", "rediss://10.0.0.1:6379/1"),
    "DATABASE_URL": ("postgres://u:p@h/name", "postgres://u:p@h/name"),
    "SPOOL_DIR": ("/srv/spool", Path("/srv/spool")),
    "SPOOL_MAX_BYTES": ("1000000", 1_000_000),
    "WEBHOOK_MAX_BYTES": ("2000000", 2_000_000),
    "INTAKE_MAX_BYTES": ("2000000", 2_000_000),
    "OPS_SESSION_SECONDS": ("3600", 3600),
    "OPS_PROXIES": ("1", 1),
    "ACCOUNT_RATE": ("600/m", Rate(600, 60)),
    "CAMPAIGN_RATE": ("0.5/s", Rate(0.5, 1)),
    "DISPATCH_CONCURRENCY": ("64", 64),
    "DISPATCHERS_PER_CAMPAIGN": ("2", 2),
    "SLICE_SECONDS": ("3", 3.0),
    "SWEEP_SECONDS": ("1.5", 1.5),
    "MAX_ATTEMPTS": ("3", 3),
    "LEAD_MAX_AGE_SECONDS": ("3600", 3600),
    "CLAIM_SECONDS": ("300", 300.0),
    "BACKOFF_BASE_SECONDS": ("1", 1.0),
    "BACKOFF_CAP_SECONDS": ("60", 60.0),
    "RETRY_AFTER_CAP_SECONDS": ("60", 60.0),
    "ON_UNCERTAIN": ("Resend", "resend"),
    "ON_SERVER_ERROR": ("Retry", "retry"),
    "UNCERTAIN_AFTER_SECONDS": ("60", 60.0),
    "PROBE_FIRST_SECONDS": ("10", 10.0),
    "PROBE_CAP_SECONDS": ("100", 100.0),
    "DEFAULT_REGION": ("us", "US"),
    "REFERENCE_KEY": ("our_ref", "our_ref"),
    "METRICS_CAMPAIGNS": ("10", 10),
    "LOG_FORMAT": ("JSON", "json"),
    "LOG_LEVEL": ("WARNING", "warning"),
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("http://collector:4318/", "http://collector:4318"),
    "WEBHOOK_URL": ("https://leads.example.com/webhooks/futwork/", "https://leads.example.com/webhooks/futwork"),
}
SECRETS = (
    "FUTWORK_API_KEY",
    "FUTWORK_API_KEYS",
    "WEBHOOK_TOKEN",
    "INTAKE_TOKENS",
    "SENTRY_DSN",
    "OPS_USERS",
    "OPS_SECRET",
)


def test_the_tables_of_these_tests_name_every_variable() -> None:
    assert {*RIGHT, *SECRETS} == {name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("name", RIGHT)
def test_each_variable_is_read_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = RIGHT[name]
    assert getattr(load_settings(), name.lower()) != value
    monkeypatch.setenv(name, f" {text} ")
    assert getattr(load_settings(), name.lower()) == value


@pytest.mark.parametrize("name", RIGHT)
def test_each_variable_may_have_the_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = RIGHT[name]
    monkeypatch.setenv(PREFIX + name, f" {text} ")
    assert getattr(load_settings(), name.lower()) == value


@pytest.mark.parametrize(
    ("environment", "file", "expected"),
    [
        ({PREFIX + "MAX_ATTEMPTS": "1", "MAX_ATTEMPTS": "2"}, "", 1),
        ({PREFIX + "MAX_ATTEMPTS": "1"}, "FUTWORK_PIPELINE_MAX_ATTEMPTS=3\nMAX_ATTEMPTS=4\n", 1),
        ({"MAX_ATTEMPTS": "2"}, "FUTWORK_PIPELINE_MAX_ATTEMPTS=3\nMAX_ATTEMPTS=4\n", 3),
        ({"MAX_ATTEMPTS": "2"}, "MAX_ATTEMPTS=4\n", 2),
        ({PREFIX + "MAX_ATTEMPTS": "", "MAX_ATTEMPTS": "2"}, "FUTWORK_PIPELINE_MAX_ATTEMPTS=\n", 2),
        ({PREFIX + "MAX_ATTEMPTS": "1", "MAX_ATTEMPTS": "a host's own"}, "MAX_ATTEMPTS=its file's\n", 1),
    ],
)
def test_the_prefixed_name_wins_wherever_it_stands(
    environment: dict[str, str], file: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text(file)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load_settings().max_attempts == expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({PREFIX + "MAX_ATTEMPTS": "many"}, "FUTWORK_PIPELINE_MAX_ATTEMPTS: Input should be a valid integer"),
        ({PREFIX + "MAX_ATTEMPTS": "many", "MAX_ATTEMPTS": "5"}, "FUTWORK_PIPELINE_MAX_ATTEMPTS: "),
        ({"MAX_ATTEMPTS": "many"}, "MAX_ATTEMPTS: Input should be a valid integer"),
        ({PREFIX + "FUTWORK_API_KEY": "hunter2\u20b9"}, "FUTWORK_PIPELINE_FUTWORK_API_KEY must be printable ASCII"),
        (
            {PREFIX + "CLAIM_SECONDS": "9", "READ_TIMEOUT_SECONDS": "8"},
            "FUTWORK_PIPELINE_CLAIM_SECONDS (9) must exceed CONNECT_TIMEOUT_SECONDS + READ_TIMEOUT_SECONDS",
        ),
    ],
)
@pytest.mark.parametrize("where", ["environment", "file"])
def test_an_error_names_the_variable_as_it_is_written(
    written: dict[str, str], message: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in written.items() if where == "file"))
    for name, value in written.items() if where == "environment" else ():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(message)


def test_a_producer_reads_only_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*RIGHT, *SECRETS} - {field.upper() for field in ProducerSettings.model_fields}:
        monkeypatch.setenv(name, "what a host application means by it \u20b9")
    monkeypatch.setenv("BROKER_URL", "amqp://host")
    settings = load_producer_settings()
    assert (settings.broker_url, settings.default_region) == ("amqp://host", "IN")
    monkeypatch.setenv("DEFAULT_REGION", "what a host application means by it")
    with pytest.raises(SettingsError, match=r"^DEFAULT_REGION: must be a two-letter region"):
        load_producer_settings()


def test_libraries_find_their_variables_and_a_prefixed_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("OTEL_A=file\nOTEL_B=file\nFUTWORK_PIPELINE_OTEL_C=file\nOTHER_D=file\n")
    for name in "ABCE":
        monkeypatch.setenv(f"OTEL_{name}", "environment")
    for name in "AE":
        monkeypatch.delenv(f"OTEL_{name}")
    monkeypatch.setenv("FUTWORK_PIPELINE_OTEL_E", "environment")
    monkeypatch.delenv("OTHER_D", raising=False)
    lend_to_libraries("OTEL_")
    assert {name: os.environ.get(f"OTEL_{name}") for name in "ABCE"} == {
        "A": "file", "B": "environment", "C": "file", "E": "environment",
    }  # fmt: skip
    assert "OTHER_D" not in os.environ


def test_secrets_are_read_and_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUTWORK_API_KEY", " k0\n")
    monkeypatch.setenv("FUTWORK_API_KEYS", "north=k1, south = k2=with=equals ,")
    monkeypatch.setenv("WEBHOOK_TOKEN", "new, old")
    monkeypatch.setenv("INTAKE_TOKENS", "all,some:68ecc86fd9fbecbe9431a18e")
    settings = load_settings()
    assert settings.api_keys() == {"default": "k0", "north": "k1", "south": "k2=with=equals"}
    assert settings.webhook_tokens() == ("new", "old")
    assert settings.intake_scopes() == {"all": None, "some": "68ecc86fd9fbecbe9431a18e"}


def test_without_any_variable_the_defaults_hold_and_nobody_may_speak_to_the_web_process() -> None:
    settings = load_settings()
    assert settings.api_keys() == {}
    assert settings.webhook_tokens() == ()
    assert settings.intake_scopes() == {}
    assert settings.database_url == "sqlite:///var/pipeline.db"
    assert str(settings.account_rate) == "20/s"


def test_an_empty_value_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RIGHT, *SECRETS):
        monkeypatch.setenv(name, "")
    assert load_settings() == Settings(_env_file=None)


def test_a_dotenv_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MAX_ATTEMPTS=5\nDEFAULT_REGION=GB\nSOMEBODY_ELSES=1\n")
    monkeypatch.setenv("DEFAULT_REGION", "IN")
    settings = load_settings()
    assert (settings.max_attempts, settings.default_region) == (5, "IN")


@pytest.mark.parametrize("broken", [b"\xff\xfe\x00binary\x00", b"MAX_ATTEMPTS=\xe9\n"])
def test_a_dotenv_file_that_is_no_text_is_named(broken: bytes, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(broken)
    with pytest.raises(SettingsError, match=r"^\.env cannot be read: it must be UTF-8 text \(UnicodeDecodeError\)$"):
        load_settings()


WRONG = [
    ("FUTWORK_BASE_URL", "platform.futwork.ai", "FUTWORK_BASE_URL: must be an http:// or https:// URL"),
    ("CONNECT_TIMEOUT_SECONDS", "0", "CONNECT_TIMEOUT_SECONDS: Input should be greater than 0"),
    ("CONNECT_TIMEOUT_SECONDS", "5s", "CONNECT_TIMEOUT_SECONDS: Input should be a valid number"),
    ("BACKOFF_CAP_SECONDS", "inf", "BACKOFF_CAP_SECONDS: Input should be "),
    ("BACKOFF_CAP_SECONDS", "nan", "BACKOFF_CAP_SECONDS: Input should be "),
    ("UNCERTAIN_AFTER_SECONDS", "1e300", "UNCERTAIN_AFTER_SECONDS: Input should be less than or equal to 315360000"),
    ("LEAD_MAX_AGE_SECONDS", "9" * 30, "LEAD_MAX_AGE_SECONDS: Input should be "),
    ("BROKER_URL", "localhost:6379", "BROKER_URL: must be the URL of a Redis, Valkey or RabbitMQ (redis://, amqp://)"),
    ("BROKER_URL", "valkey://h:6379", "BROKER_URL: must be the URL of a Redis, Valkey or RabbitMQ (redis://, amqp://)"),
    ("REDIS_URL", "amqp://u:hunter2@h", "REDIS_URL: must be the URL of a Redis or Valkey (redis://)"),
    ("DATABASE_URL", "mysql://u:hunter2@h/db", "DATABASE_URL: must be sqlite:///path or postgresql://user@host/name"),
    (
        "DATABASE_URL",
        "sqlite://",
        "DATABASE_URL: must be sqlite:///path or postgresql://user@host/name: proc",
    ),
    ("DATABASE_URL", "sqlite:///:memory:", "DATABASE_URL: must be sqlite:///path or postgresql://user@host/name"),
    ("SPOOL_MAX_BYTES", "1GB", "SPOOL_MAX_BYTES: Input should be a valid integer"),
    ("WEBHOOK_MAX_BYTES", "1000000000", "WEBHOOK_MAX_BYTES: Input should be less than or equal to 8388608"),
    ("INTAKE_MAX_BYTES", "-1", "INTAKE_MAX_BYTES: Input should be greater than 0"),
    ("ACCOUNT_RATE", "20", "ACCOUNT_RATE: must be a positive rate such as 20/s, 600/m or 5000/h"),
    ("CAMPAIGN_RATE", "0/s", "CAMPAIGN_RATE: must be a positive rate such as 20/s, 600/m or 5000/h"),
    ("CAMPAIGN_RATE", "9" * 400 + "/s", "CAMPAIGN_RATE: must be a positive rate such as 20/s, 600/m or 5000/h"),
    ("DISPATCH_CONCURRENCY", "257", "DISPATCH_CONCURRENCY: Input should be less than or equal to 256"),
    ("ON_UNCERTAIN", "retry", "ON_UNCERTAIN: Input should be 'hold', 'resend' or 'drop'"),
    ("ON_SERVER_ERROR", "drop", "ON_SERVER_ERROR: Input should be 'uncertain' or 'retry'"),
    ("DEFAULT_REGION", "India", "DEFAULT_REGION: must be a two-letter region that has phone numbers, such as IN"),
    ("REFERENCE_KEY", "leadId", "REFERENCE_KEY must not be leadId: Futwork's tools read that key as their own id"),
    ("LOG_FORMAT", "xml", "LOG_FORMAT: Input should be 'auto', 'json' or 'console'"),
    ("LOG_LEVEL", "trace", "LOG_LEVEL: Input should be 'debug', 'info', 'warning' or 'error'"),
    ("FUTWORK_API_KEY", "hunter2-\u20b9", "FUTWORK_API_KEY must be printable ASCII: it travels in a header"),
    ("FUTWORK_API_KEY", "hunter2\r\nX-Evil: 1", "FUTWORK_API_KEY must be printable ASCII: it travels in a header"),
    ("FUTWORK_API_KEYS", "hunter2", "FUTWORK_API_KEYS must be name=key pairs separated by commas, such as north=k1"),
    ("FUTWORK_API_KEYS", "north=", "FUTWORK_API_KEYS must be name=key pairs separated by commas, such as north=k1"),
    ("FUTWORK_API_KEYS", "no rth=hunter2", "FUTWORK_API_KEYS must be name=key pairs separated by commas"),
    ("FUTWORK_API_KEYS", "a=hunter2,a=hunter3", "FUTWORK_API_KEYS gives the account a a second key"),
    ("WEBHOOK_TOKEN", "hunter2\u20b9", "WEBHOOK_TOKEN must be printable ASCII: it travels in a header"),
    ("INTAKE_TOKENS", "hunter2\u20b9", "INTAKE_TOKENS must be printable ASCII: it travels in a header"),
    ("INTAKE_TOKENS", ":68ecc86fd9fbecbe9431a18e", "INTAKE_TOKENS must be tokens separated by commas, each once"),
    ("INTAKE_TOKENS", "hunter2:", "INTAKE_TOKENS must be tokens separated by commas, each once"),
    ("INTAKE_TOKENS", "hunter2:a/b", "INTAKE_TOKENS must be tokens separated by commas, each once"),
    ("INTAKE_TOKENS", "hunter2:a,hunter2", "INTAKE_TOKENS must be tokens separated by commas, each once"),
]


@pytest.mark.parametrize(("name", "text", "message"), WRONG, ids=[f"{name}={text[:20]!r}" for name, text, _ in WRONG])
def test_a_wrong_value_stops_the_start_with_one_line_that_names_it_and_shows_no_secret(
    name: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    line = str(caught.value)
    assert line.startswith(message)
    assert "\n" not in line
    assert "hunter2" not in line
    assert caught.value.__suppress_context__  # a traceback would show what pydantic was given


def test_a_value_that_cannot_be_decoded_is_an_error_of_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithList(Settings):
        numbers: tuple[int, ...] = ()

    monkeypatch.setattr("pipeline.settings.Settings", WithList)
    monkeypatch.setenv("NUMBERS", "hunter2")
    with pytest.raises(SettingsError, match="numbers") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_every_wrong_value_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_ATTEMPTS", "many")
    monkeypatch.setenv("ACCOUNT_RATE", "fast")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert re.findall(r"[A-Z_]{6,}(?=:)", str(caught.value)) == ["ACCOUNT_RATE", "MAX_ATTEMPTS"]


def test_the_default_account_cannot_have_two_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUTWORK_API_KEY", "k0")
    monkeypatch.setenv("FUTWORK_API_KEYS", "default=k0")
    assert load_settings().api_keys() == {"default": "k0"}
    monkeypatch.setenv("FUTWORK_API_KEYS", "default=k1")
    with pytest.raises(SettingsError, match="FUTWORK_API_KEYS gives the account default a second key"):
        load_settings()


@pytest.mark.parametrize(("claim", "fits"), [("20", True), ("19.9", False)])
def test_a_claim_outlives_the_slowest_request_by_five_seconds(
    claim: str, *, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONNECT_TIMEOUT_SECONDS", "5")
    monkeypatch.setenv("READ_TIMEOUT_SECONDS", "10")
    monkeypatch.setenv("CLAIM_SECONDS", claim)
    if fits:
        settings = load_settings()
        assert settings.claim_lease.total_seconds() == 20
        assert settings.longest_post.total_seconds() == 15
    else:
        with pytest.raises(SettingsError, match=r"^CLAIM_SECONDS \(19\.9\) must exceed CONNECT_TIMEOUT_SECONDS \+"):
            load_settings()


@pytest.mark.parametrize(
    ("broker", "limiter", "expected"),
    [
        ("redis://a/0", "", "redis://a/0"),
        ("rediss://a/0", "", "rediss://a/0"),
        ("redis://a/0", "redis://b/1", "redis://b/1"),
        ("amqp://a", "unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_the_limit_lives_in_redis_url_or_in_a_broker_that_is_a_redis(broker: str, limiter: str, expected: str) -> None:
    assert load_settings(broker_url=broker, redis_url=limiter).limiter_url == expected


@pytest.mark.parametrize("broker", ["", "amqp://a", "sentinel://a:26379"])
def test_without_a_redis_for_the_limit_the_error_names_both_variables(broker: str) -> None:
    with pytest.raises(SettingsError, match="REDIS_URL is not set, and BROKER_URL is no Redis"):
        _ = load_settings(broker_url=broker).limiter_url


def test_no_representation_shows_a_secret_or_a_password() -> None:
    settings = load_settings(
        futwork_api_key="hunter2",
        futwork_api_keys="north=hunter2",
        webhook_token="hunter2",
        intake_tokens="hunter2:abc",
        broker_url="amqp://guest:hunter2@h//",
        redis_url="redis://:hunter2@h/0",
        database_url="postgresql://u:hunter2@h/db",
    )
    assert "hunter2" not in repr(settings) + str(settings) + f"{settings!r:s}"


@pytest.mark.parametrize(
    ("text", "per_second", "written"),
    [
        ("20/s", 20.0, "20/s"),
        ("600/m", 10.0, "600/m"),
        (" 5000 / Hour ", 5000 / 3600, "5000/h"),
        ("1234567/min", 1234567 / 60, "1234567/m"),
        ("0.25/sec", 0.25, "0.25/s"),
    ],
)
def test_a_rate_reads_back_what_it_writes(text: str, per_second: float, written: str) -> None:
    rate = Rate.parse(text)
    assert rate.per_second == pytest.approx(per_second)
    assert str(rate) == written
    assert Rate.parse(str(rate)) == rate


@pytest.mark.parametrize("text", ["", "20", "/s", "-1/s", "0/s", "0.0/m", "1/d", "1/ss", "1e3/s", "20/s;", "٢٠/x"])
def test_what_is_no_rate_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ValueError, match="must be a positive rate such as 20/s, 600/m or 5000/h"):
        Rate.parse(text)


def test_settings_cannot_be_changed() -> None:
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.max_attempts = 1


def test_the_example_file_names_every_setting_once_with_values_that_are_right() -> None:
    if not EXAMPLE.exists():
        pytest.skip(".env.example is not written yet")
    lines = EXAMPLE.read_text().splitlines()
    names = re.findall(r"^#? ?([A-Z][A-Z_]+)=", "\n".join(lines), re.MULTILINE)
    ours = {name.upper() for name in Settings.model_fields}  # beside them it sets up docker-compose.yml
    assert sorted(name for name in names if name in ours) == sorted(ours)
    assert Settings(_env_file=EXAMPLE) == Settings(_env_file=None)


HASH = f"scrypt.32768.8.1.Ab12Cd34Ef56Gh78.{'0f' * 64}"


def test_who_may_sign_in_is_read_with_the_role(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().operators() == {}
    monkeypatch.setenv("OPS_USERS", f"asha:{HASH}:operator, kiran:{HASH},ravi:{HASH}:viewer")
    monkeypatch.setenv("OPS_SECRET", "s" * 32)
    found = load_settings().operators()
    assert [(user.name, user.role) for user in found.values()] == [
        ("asha", "operator"),
        ("kiran", "viewer"),
        ("ravi", "viewer"),
    ]
    assert {user.password_hash for user in found.values()} == {HASH}
    assert HASH not in repr(load_settings()) and HASH not in repr(found)


@pytest.mark.parametrize(
    "users",
    [
        "asha",
        "asha:password",
        f"asha:{HASH}:admin",
        f"asha:{HASH}:",
        f":{HASH}",
        f"a sha:{HASH}",
        f"asha:{HASH},asha:{HASH}:operator",
        f"asha:{HASH.replace('scrypt', 'md5')}",
    ],
)
def test_a_wrong_entry_stops_the_start_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch, users: str) -> None:
    monkeypatch.setenv("OPS_SECRET", "s" * 32)
    monkeypatch.setenv("OPS_USERS", users)
    if users == f"asha:{HASH}:":
        assert load_settings().operators()["asha"].role == "viewer"  # nothing is the default, never more
        return
    with pytest.raises(SettingsError, match="pipeline ops-user NAME") as refused:
        load_settings()
    assert HASH not in str(refused.value)


@pytest.mark.parametrize("secret", ["", "s" * 31])
def test_users_need_a_secret_that_cannot_be_guessed(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("OPS_USERS", f"asha:{HASH}")
    monkeypatch.setenv("OPS_SECRET", secret)
    with pytest.raises(SettingsError, match="OPS_SECRET must have 32 characters"):
        load_settings()
