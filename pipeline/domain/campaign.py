"""What a campaign may do, and when the pipeline stops it; pure.

A campaign is `active`, `paused` (by an operator) or `held` (by the pipeline). Held is not failed: the leads stay
`queued`, and one of them probes Futwork at growing intervals until it is accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from pipeline.domain.lead import Outcome

if TYPE_CHECKING:
    from pipeline.settings import OnServerError, OnUncertain, Rate, Settings

_CAMPAIGN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

OUTAGE_RUN = 5  # troubled outcomes in a row without an acceptance; the design's figure
REJECTION_RUN = 20  # rejected leads in a row: a changed schema is likelier than twenty bad leads; the design's figure

TROUBLE = frozenset({Outcome.NOT_SENT, Outcome.BUSY, Outcome.FAILED, Outcome.UNCERTAIN})
"""Outcomes that do not happen while Futwork works."""


class InvalidCampaignId(ValueError):
    """A campaign id is 1 to 64 letters, digits, `-` or `_`; Futwork's own are 24 hexadecimal digits."""


class CampaignState(StrEnum):
    """Whether a campaign's leads may be sent."""

    ACTIVE = "active"
    """Leads go out as fast as the limits allow."""
    PAUSED = "paused"
    """An operator stopped it; only an operator starts it again. It is not probed."""
    HELD = "held"
    """The pipeline stopped it and says why; a probe that is accepted releases it."""


class HoldKind(StrEnum):
    """Why the pipeline stopped a campaign."""

    REFUSED_KEY = "refused_key"
    """Futwork answered 401 or 403: every campaign on the account's key is held."""
    REFUSED_CAMPAIGN = "refused_campaign"
    """Futwork answered 404 or a redirect: the campaign is gone, or the base URL is wrong."""
    REJECTIONS = "rejections"
    """A run of leads was rejected: the campaign's LeadSchema and the data no longer fit."""
    OUTAGE = "outage"
    """A run of submissions failed, was busy, could not be sent or got no answer."""
    NO_KEY = "no_key"
    """No API key is configured for the campaign's account."""


ADVICE = {
    HoldKind.REFUSED_KEY: (
        "Futwork refuses the API key",
        (
            "Correct FUTWORK_API_KEY or FUTWORK_API_KEYS and restart the dispatch workers. Every campaign on this"
            " account is held with it."
        ),
    ),
    HoldKind.NO_KEY: (
        "no API key is configured for its account",
        "Set the key and restart the dispatch workers, or give the campaign another account.",
    ),
    HoldKind.REFUSED_CAMPAIGN: (
        "Futwork does not know this campaign",
        (
            "Check that it exists in Futwork's console, and that FUTWORK_BASE_URL is right. If it is gone, cancel"
            " its leads, then resume it: nothing is sent, and it is no longer held."
        ),
    ),
    HoldKind.REJECTIONS: (
        "many leads in a row were rejected",
        (
            "Open a rejected lead to see why Futwork refused it; usually the campaign's LeadSchema and the data no"
            " longer fit. Correct that, resume, then retry the rejected leads."
        ),
    ),
    HoldKind.OUTAGE: (
        "Futwork was down, or could not be reached",
        "Usually nothing: the first probe that is accepted releases it. If Futwork works again, resume it now.",
    ),
}
"""What each kind of hold means, and what to do, for commands and pages; as in docs/operations.md."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A decision to hold: the kind for programs, the reason for a person."""

    kind: HoldKind
    reason: str

    @property
    def spans_account(self) -> bool:
        """Whether every campaign on the same key is stopped with this one."""
        return self.kind in (HoldKind.REFUSED_KEY, HoldKind.NO_KEY)


@dataclass(frozen=True, slots=True)
class Runs:
    """How many troubled and how many rejected outcomes came in a row, over all dispatchers of a campaign."""

    troubled: int = 0
    rejected: int = 0

    def after(self, outcome: Outcome) -> Runs:
        """The runs once *outcome* is counted; an acceptance ends both, a rejection proves that Futwork is up."""
        if outcome is Outcome.ACCEPTED:
            return Runs()
        if outcome is Outcome.REJECTED:
            return Runs(troubled=0, rejected=self.rejected + 1)
        if outcome in TROUBLE:
            return replace(self, troubled=self.troubled + 1)
        return self


def hold_after(outcome: Outcome, runs: Runs, *, excerpt: str) -> Hold | None:
    """The hold that an outcome requires, given the runs that it completes, or None to go on."""
    if outcome is Outcome.REFUSED_KEY:
        return Hold(HoldKind.REFUSED_KEY, f"Futwork refused the API key: {excerpt}")
    if outcome is Outcome.REFUSED_CAMPAIGN:
        return Hold(HoldKind.REFUSED_CAMPAIGN, f"Futwork does not take leads at this campaign's address: {excerpt}")
    if runs.rejected >= REJECTION_RUN:
        return Hold(HoldKind.REJECTIONS, f"{runs.rejected} leads in a row were rejected, the last with: {excerpt}")
    if runs.troubled >= OUTAGE_RUN:
        return Hold(HoldKind.OUTAGE, f"{runs.troubled} submissions in a row failed, the last: {excerpt}")
    return None


@dataclass(frozen=True, slots=True)
class Campaign:
    """A campaign as the dispatcher needs it; a policy that is None falls back to the settings."""

    id: str
    account: str = "default"
    state: CampaignState = CampaignState.ACTIVE
    hold_kind: HoldKind | None = None
    rate: Rate | None = None
    on_uncertain: OnUncertain | None = None
    uncertain_after_seconds: float | None = None
    on_server_error: OnServerError | None = None
    max_attempts: int | None = None
    lead_max_age_seconds: int | None = None


def check_campaign_id(text: str) -> str:
    """Return the campaign id as it goes into Futwork's URL, or raise `InvalidCampaignId`."""
    if not isinstance(text, str) or not _CAMPAIGN_ID.fullmatch(text):
        raise InvalidCampaignId(
            f"campaign id {str(text)[:80]!r} is wrong: it must be 1 to 64 letters, digits, - or _"
            " (Futwork's are 24 hexadecimal digits)"
        )
    return text


def probe_interval(probes: int, settings: Settings) -> timedelta:
    """How long a held campaign waits before its next probe, doubling from the first interval up to the cap."""
    doublings = min(probes, 30)  # 2**30 first intervals are far past any cap
    return timedelta(seconds=min(settings.probe_cap_seconds, settings.probe_first_seconds * 2**doublings))
