"""The policies of a campaign as people set them: their words, and how a value is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pipeline.settings import OnServerError, OnUncertain, Rate, Settings

DEFAULT = "default"
"""The value that sets a policy back to what the settings say."""

_TEN_YEARS_SECONDS = 10 * 365 * 24 * 3600  # the bound of the settings, too


class InvalidPolicy(ValueError):
    """A policy cannot be set to this value; the message says why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy of a campaign."""

    label: str
    help: str
    read: Callable[[str], Any]


def _choice(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"is not one of {', '.join(values)}")
        return text

    return read


def _number(kind: Callable[[str], float], most: int) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            raise ValueError(f"is not a number, nor `{DEFAULT}`") from None
        if not 0 < number <= most:  # false for NaN as well
            raise ValueError(f"is not above 0 and at most {most:,}")
        return number

    return read


POLICIES = {
    "rate": Policy("Rate", "Submissions allowed, such as 20/s or 600/m.", Rate.parse),
    "account": Policy("Account", "The Futwork account whose key it uses (FUTWORK_API_KEYS).", str),
    "on_uncertain": Policy(
        "Uncertain leads", f"What ends uncertainty: {', '.join(get_args(OnUncertain))}.",
        _choice(*get_args(OnUncertain)),
    ),
    "uncertain_after_seconds": Policy(
        "Uncertain after (seconds)", "How long to wait for evidence, in seconds.", _number(float, _TEN_YEARS_SECONDS),
    ),
    "on_server_error": Policy(
        "After a server error",
        "What a lead becomes after a 500: uncertain, because it may have been taken, or retry.",
        _choice(*get_args(OnServerError)),
    ),
    "max_attempts": Policy("Attempts", "The most POSTs for one lead.", _number(int, 1_000_000)),
    "lead_max_age_seconds": Policy(
        "Age (seconds)", "The oldest that a lead may be when it is sent, in seconds.", _number(int, _TEN_YEARS_SECONDS),
    ),
}  # fmt: skip
"""Every policy by its name, in the order in which they are shown."""


def read_policies(given: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """The values that `Campaigns.change` takes: None for `default`. Raises `InvalidPolicy`."""
    found: dict[str, Any] = {}
    for name, text in given.items():
        if text == DEFAULT and name != "account":
            found[name] = None
            continue
        try:
            found[name] = POLICIES[name].read(text)
        except ValueError as error:
            raise InvalidPolicy(name, f"{text}: {error}") from None
    if "account" in found and found["account"] not in settings.api_keys():
        raise InvalidPolicy("account", f"no key is configured for {found['account']!r} (FUTWORK_API_KEYS)")
    return found
