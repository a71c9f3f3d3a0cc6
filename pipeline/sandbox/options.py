"""Every setting of the sandbox: its default, its check, its change at run time."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.sandbox.answers import MIXED, SHAPES
from pipeline.sandbox.rates import parse_rate

ANSWER_FAULTS = {
    "500": "500; every second lead is accepted all the same",
    "502": "502; every second lead is accepted all the same",
    "503": "503, every second one with Retry-After; the lead is not accepted",
    "504": "504; every second lead is accepted all the same",
    "408": "408; the lead is not accepted",
    "reset_before": "the connection is reset before the request is handled; the lead is not accepted",
    "reset_after": "the lead is accepted and called, then the connection is reset instead of an answer",
    "stall": "the lead is accepted and called; the answer comes after stall_seconds, or never when that is 0",
    "malformed": "the lead is accepted and called; the answer is 200 with a body that is not JSON",
    "success_false": "200 with a body that says no; the lead is not accepted",
}
"""Faults of the answer to a POST, at most one for each. Their order is part of what a seed means."""

WEBHOOK_FAULTS = {
    "dup": "share of events that are posted twice",
    "late": "share of events that come late_seconds later",
    "reorder": "share of calls whose events come in another order",
    "malformed_webhook": "share of events that are preceded or followed by a broken copy of themselves",
    "lost": "share of events that are never posted",
}
"""Faults on the way back, each drawn by itself."""

LISTENER_FAULTS = {"refused": "share of time in which the listening socket is closed, so that connecting is refused"}

FAULTS = ANSWER_FAULTS | WEBHOOK_FAULTS | LISTENER_FAULTS

PRESETS: dict[str, dict[str, float]] = {
    "none": {},
    "mild": {
        "500": 0.01, "502": 0.002, "503": 0.01, "reset_before": 0.002, "reset_after": 0.002, "malformed": 0.005,
        "dup": 0.05, "late": 0.02, "reorder": 0.05,
    },
    "wild": {
        "500": 0.03, "502": 0.02, "503": 0.03, "504": 0.01, "408": 0.005, "reset_before": 0.02, "reset_after": 0.02,
        "stall": 0.005, "malformed": 0.03, "success_false": 0.01, "dup": 0.2, "late": 0.1, "reorder": 0.3,
        "malformed_webhook": 0.03, "refused": 0.05,
    },
}  # fmt: skip

Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


class OptionsError(ValueError):
    """A setting has a value that it can't have; the message names each one."""


class Options(BaseModel):
    """The settings of a sandbox; all of them can be changed while it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    seed: int = 1

    api_keys: frozenset[str] = frozenset({"sandbox-key"})
    campaigns: frozenset[str] | None = None
    """Known campaigns; None knows every one, an empty set knows none."""
    gone_campaigns: frozenset[str] = frozenset()
    """Campaigns that answer 404 whatever `campaigns` says."""
    lead_schema: frozenset[str] | None = None
    """Keys that `recipientData` may have; None allows every key."""

    rate: str | None = None
    """Limit of accepted requests for each API key, such as 50/s."""
    campaign_rate: str | None = None
    retry_after: Literal["seconds", "date", "none"] = "seconds"

    answer_shape: str = MIXED
    latency_ms: Annotated[float, Field(ge=0, le=600_000)] = 0.0
    """Mean time before an answer; each takes between half and one and a half of it."""

    faults: dict[str, float] = Field(default_factory=dict)
    stall_seconds: Seconds = 60.0
    late_seconds: Seconds = 5.0
    refuse_every_seconds: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    refuse_for_seconds: Seconds = 0.0
    """Length of each refusal; 0 takes the share `refused` of `refuse_every_seconds`."""

    webhook: str | None = None
    webhook_token: str | None = None
    webhook_retries: Annotated[int, Field(ge=0, le=100)] = 5
    webhook_backoff_seconds: Seconds = 0.2
    """Wait before the first retry; it doubles with each, up to 30 s."""
    webhook_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 10.0
    webhook_concurrency: Annotated[int, Field(ge=1, le=1000)] = 32
    webhooks_paused: bool = False

    no_answer: Share = 0.2
    busy: Share = 0.05
    failed: Share = 0.02
    call_seconds: Seconds = 1.5
    lifecycle: Literal["mixed", "full", "final"] = "mixed"
    """Events of a call: all of them, its last one alone, or a mixture as seen in the wild."""
    drift: bool = True
    """Whether payloads vary in types, missing keys and unknown keys as seen in the wild."""

    @field_validator("rate", "campaign_rate")
    @classmethod
    def _rate_can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            parse_rate(value)
        return value

    @field_validator("answer_shape")
    @classmethod
    def _shape_is_known(cls, value: str) -> str:
        if value != MIXED and value not in SHAPES:
            raise ValueError(f"{value!r} is not a shape; choose {MIXED} or one of {', '.join(SHAPES)}")
        return value

    @field_validator("webhook")
    @classmethod
    def _webhook_is_plain_http(cls, value: str | None) -> str | None:
        if value is not None:
            url = urlsplit(value)
            if url.scheme != "http" or not url.hostname:
                raise ValueError(f"{value!r} is not an http:// URL (the sandbox speaks plain HTTP only)")
        return value

    @field_validator("faults", mode="before")
    @classmethod
    def _faults_from_text(cls, value: Any) -> Any:
        return parse_faults(value) if isinstance(value, str) else value

    @field_validator("faults")
    @classmethod
    def _faults_are_known_shares(cls, value: dict[str, float]) -> dict[str, float]:
        for name, share in value.items():
            if name not in FAULTS:
                raise ValueError(f"{name!r} is not a fault; choose from {', '.join(FAULTS)}")
            if not 0 <= share <= 1:
                raise ValueError(f"the share of {name} is {share}; it must be between 0 and 1")
        if sum(share for name, share in value.items() if name in ANSWER_FAULTS) > 1 + 1e-9:
            raise ValueError("the shares of the faults of an answer add up to more than 1")
        return value

    @model_validator(mode="after")
    def _results_add_up(self) -> "Options":
        if self.no_answer + self.busy + self.failed > 1 + 1e-9:
            raise ValueError("no_answer, busy and failed add up to more than 1")
        return self

    @property
    def refusal_seconds(self) -> float:
        """Length of each refusal of connections, in every `refuse_every_seconds`."""
        return self.refuse_for_seconds or self.faults.get("refused", 0.0) * self.refuse_every_seconds

    def changed(self, changes: Mapping[str, Any]) -> "Options":
        """These options with *changes*; raises OptionsError, naming each wrong one, and changes nothing then."""
        return checked({name: getattr(self, name) for name in type(self).model_fields} | dict(changes))


def checked(values: Mapping[str, Any]) -> Options:
    """Options from *values*; raises OptionsError with a sentence for each wrong one."""
    try:
        return Options.model_validate(dict(values))
    except ValidationError as error:
        raise OptionsError("; ".join(_sentence(detail) for detail in error.errors())) from error


def parse_faults(text: str) -> dict[str, float]:
    """Read faults from text: presets and `name=share`, comma-separated, later ones win (`wild,stall=0`)."""
    faults: dict[str, float] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, equals, share = word.partition("=")
        if not equals:
            if name not in PRESETS:
                raise ValueError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor of the form name=share")
            faults |= PRESETS[name]
            continue
        try:
            faults[name] = float(share)
        except ValueError:
            raise ValueError(f"the share of {name} is {share!r}; it must be a number between 0 and 1") from None
    return faults


def _sentence(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    what = str(detail["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
