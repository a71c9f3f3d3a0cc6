"""A POST arrives: it is checked, limited, decided on, perhaps accepted, and written to the journal.

The order of the checks: API key (401), rate limits (429), campaign (404), Content-Type (415), JSON (400), fields and
LeadSchema (422). Then comes the decision that the seed has for it, and only a POST that gets that far counts as an
attempt, so that throttling does not change what the seed means.
"""

import math
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Literal, NamedTuple

import orjson

from pipeline.sandbox.answers import error_body, malformed_body, refusal_body, success_body
from pipeline.sandbox.calls import Lead
from pipeline.sandbox.decisions import Decision, decide
from pipeline.sandbox.journal import Journal
from pipeline.sandbox.options import Options
from pipeline.sandbox.rates import BusiestSecond, SlidingWindow, parse_rate

_FAULT_MESSAGES = {
    "500": "Internal server error",
    "502": "Bad gateway",
    "503": "Service unavailable",
    "504": "Gateway timeout",
    "408": "Request timeout",
}


class Reply(NamedTuple):
    """What the client gets to see, after *delay* seconds: an answer, a reset connection, or silence."""

    ending: Literal["answer", "reset", "silence"]
    status: int = 200
    body: bytes = b""
    retry_after: str | None = None
    delay: float = 0.0


class CampaignTally:
    """The counters of one campaign."""

    __slots__ = ("accepted", "busiest", "duplicates", "received")

    def __init__(self) -> None:
        self.received = self.accepted = self.duplicates = 0
        self.busiest = BusiestSecond()

    def as_json(self) -> dict[str, int]:
        """The counters under the names that `GET /_stats` has for them."""
        return {
            "received": self.received,
            "accepted": self.accepted,
            "duplicates": self.duplicates,
            "max_received_in_a_second": self.busiest.most,
        }


class _RefusalError(Exception):
    """The POST is refused with a 4xx answer."""

    def __init__(self, status: int, message: str, *, outcome: str = "rejected", retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.outcome = outcome
        self.retry_after = retry_after


class Reception:
    """Takes POSTs of leads, remembers each, and hands accepted leads to *call*."""

    def __init__(self, options: Options, journal: Journal, call: Callable[[Lead], None]) -> None:
        self.tally = CampaignTally()
        self.busiest_accepting = BusiestSecond()
        self.statuses: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.campaigns: dict[str, CampaignTally] = {}
        self._journal = journal
        self._call = call
        # Hashes stand for campaign and phone (and data), to hold a million of them in little memory.
        self._attempts: dict[int, int] = {}
        self._accepted: set[int] = set()
        self._windows: dict[tuple[str, str], SlidingWindow] = {}
        self._options = options

    @property
    def options(self) -> Options:
        """The settings in force."""
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        if (options.rate, options.campaign_rate) != (self._options.rate, self._options.campaign_rate):
            self._windows.clear()
        self._options = options

    def receive(
        self, campaign_id: str, api_key: str, content_type: str, body: bytes | None, *, clock: float, epoch: float
    ) -> Reply:
        """Take one POST to its end; *body* is None when it was too large to be read.

        *clock* is monotonic and drives the limits, *epoch* is the wall clock for the journal.
        """
        self.tally.received += 1
        self.tally.busiest.note(clock)
        tally = self.campaigns.setdefault(campaign_id, CampaignTally())
        tally.received += 1
        tally.busiest.note(clock)

        content, unreadable = _read(body)
        attempt: int | None = None
        accepted: Lead | None = None
        try:
            self._check_access(campaign_id, api_key, clock, epoch)
            phone, data = _check_lead(content_type, content, unreadable, self._options.lead_schema)
        except _RefusalError as refusal:
            outcome = refusal.outcome
            reply = Reply("answer", refusal.status, error_body(str(refusal)), refusal.retry_after)
        else:
            key = hash((campaign_id, phone))
            attempt = self._attempts[key] = self._attempts.get(key, 0) + 1
            decision = decide(self._options.seed, campaign_id, phone, attempt, self._options.faults)
            outcome, reply = self._follow(decision, epoch)
            if decision.accepts:
                accepted = Lead(decision.lead_id, campaign_id, phone, data, decision.call_seed)

        status = reply.status if reply.ending == "answer" and outcome != "stalled" else None
        self._journal.append(
            {
                "seq": self.tally.received,
                "time": epoch,
                "campaign_id": campaign_id,
                "phone": content.get("recipientPhoneNumber"),
                "data": content.get("recipientData"),
                "status": status,
                "outcome": outcome,
                "accepted": accepted is not None,
                "lead_id": accepted and accepted.lead_id,
                "attempt": attempt,
            }
        )
        label = "none" if status is None else str(status)
        self.statuses[label] += 1
        self.outcomes[outcome] += 1
        if accepted is None:
            self.rejected[label] += 1
        else:
            self._accept(accepted, tally, clock)
        return reply

    def _check_access(self, campaign_id: str, api_key: str, clock: float, epoch: float) -> None:
        options = self._options
        if api_key not in options.api_keys:
            raise _RefusalError(401, "Invalid API key" if api_key else "x-api-key header is missing")
        windows = self._windows_of(api_key, campaign_id)
        wait = max((window.wait_seconds(clock) for window in windows), default=0.0)
        if wait > 0:
            retry_after = _retry_after(wait, epoch, options.retry_after)
            raise _RefusalError(429, "Too many requests", outcome="throttled", retry_after=retry_after)
        for window in windows:
            window.admit(clock)
        unknown = options.campaigns is not None and campaign_id not in options.campaigns
        if unknown or campaign_id in options.gone_campaigns:
            raise _RefusalError(404, "Campaign not found")

    def _windows_of(self, api_key: str, campaign_id: str) -> list[SlidingWindow]:
        windows = []
        for kind, name, rate in (
            ("key", api_key, self._options.rate),
            ("campaign", campaign_id, self._options.campaign_rate),
        ):
            if rate is not None:
                window = self._windows.get((kind, name))
                if window is None:
                    window = self._windows[kind, name] = SlidingWindow(parse_rate(rate))
                windows.append(window)
        return windows

    def _follow(self, decision: Decision, epoch: float) -> tuple[str, Reply]:
        """The outcome and the reply that a decision means."""
        options, fault = self._options, decision.fault
        delay = options.latency_ms / 1000 * (0.5 + decision.latency)
        success = success_body(options.answer_shape, decision.lead_id, decision.shape)
        match fault:
            case None:
                return "accepted", Reply("answer", 201 if decision.created else 200, success, delay=delay)
            case "reset_before":
                return fault, Reply("reset")
            case "reset_after":
                return fault, Reply("reset", delay=delay)
            case "stall":
                ending: Literal["answer", "silence"] = "answer" if options.stall_seconds else "silence"
                return "stalled", Reply(ending, 200, success, delay=options.stall_seconds)
            case "malformed":
                return fault, Reply("answer", 200, malformed_body(decision.lead_id, decision.variant), delay=delay)
            case "success_false":
                return "rejected", Reply("answer", 200, refusal_body(decision.variant), delay=delay)
        retry_after = None
        if fault == "503" and decision.variant < 0.5:
            retry_after = _retry_after(1.0 if decision.variant < 0.25 else 2.0, epoch, options.retry_after)
        return "failed", Reply("answer", int(fault), error_body(_FAULT_MESSAGES[fault]), retry_after, delay)

    def _accept(self, lead: Lead, tally: CampaignTally, clock: float) -> None:
        self.busiest_accepting.note(clock)
        key = hash((lead.campaign_id, lead.phone, orjson.dumps(lead.data, option=orjson.OPT_SORT_KEYS)))
        duplicate = key in self._accepted
        self._accepted.add(key)
        for counters in (self.tally, tally):
            counters.accepted += 1
            counters.duplicates += duplicate
        self._call(lead)


def _read(body: bytes | None) -> tuple[dict[str, Any], _RefusalError | None]:
    """The JSON object in *body*, or an empty one and the refusal that it deserves."""
    if body is None:
        return {}, _RefusalError(413, "Request body is too large")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}, _RefusalError(400, "Request body is not valid JSON")
    if not isinstance(content, dict):
        return {}, _RefusalError(400, "Request body must be a JSON object")
    return content, None


def _check_lead(
    content_type: str, content: dict[str, Any], unreadable: _RefusalError | None, schema: frozenset[str] | None
) -> tuple[str, dict[str, Any]]:
    """The phone number and the data of a lead that passes every check."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise _RefusalError(415, "Content-Type must be application/json")
    if unreadable is not None:
        raise unreadable
    phone, data = content.get("recipientPhoneNumber"), content.get("recipientData")
    if not (isinstance(phone, str) and len(phone) == 10 and phone.isascii() and phone.isdigit()):
        raise _RefusalError(422, "recipientPhoneNumber must be a string of 10 digits")
    if not isinstance(data, dict):
        raise _RefusalError(422, "recipientData must be an object")
    unknown = sorted(data.keys() - schema) if schema is not None else []
    if unknown:
        raise _RefusalError(422, f"recipientData has keys that the LeadSchema does not list: {', '.join(unknown)}")
    return phone, data


def _retry_after(wait: float, epoch: float, form: Literal["seconds", "date", "none"]) -> str | None:
    match form:
        case "seconds":
            return str(max(1, math.ceil(wait)))
        case "date":
            return formatdate(math.ceil(epoch + wait), usegmt=True)
        case "none":
            return None
