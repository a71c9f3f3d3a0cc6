"""Dispositions are free text per campaign; these are the names under which they can be counted."""

from pipeline.domain.call.status import CallOutcome
from pipeline.domain.call.values import slug

REACHED = frozenset(
    {
        "already_purchased",
        "callback",
        "do_not_call",
        "hung_up",
        "interested",
        "language_barrier",
        "not_eligible",
        "not_interested",
        "qualified",
        "wrong_number",
    }
)
"""Dispositions that only somebody who answered can have caused, be it by hanging up."""

NOT_REACHED = {
    "busy": CallOutcome.BUSY,
    "failed": CallOutcome.FAILED,
    "invalid_number": CallOutcome.FAILED,
    "no_answer": CallOutcome.NO_ANSWER,
    "not_reachable": CallOutcome.NO_ANSWER,
    "switched_off": CallOutcome.NO_ANSWER,
    "voicemail": CallOutcome.NO_ANSWER,
}
"""Dispositions that say why nobody was spoken to, with the outcome that they mean."""

_SYNONYMS = {
    "already_purchased": ("already_bought", "already_taken", "purchased"),
    "busy": ("busy_tone", "call_busy", "customer_busy", "lead_busy", "line_busy", "number_busy", "user_busy", "व्यस्त"),
    "callback": (
        "asked_to_call_back",
        "asked_to_call_later",
        "call_again",
        "call_back",
        "call_back_later",
        "call_back_requested",
        "call_later",
        "callback_later",
        "callback_requested",
        "callback_scheduled",
        "follow_up",
        "followup",
        "request_callback",
        "requested_callback",
        "schedule_callback",
        "बाद_में_कॉल_करें",
    ),
    "do_not_call": ("dnc", "dnd", "do_not_contact", "do_not_disturb", "dont_call", "dont_call_again", "opt_out"),
    "failed": ("call_failed", "error", "technical_issue"),
    "hung_up": ("call_cut", "customer_hung_up", "cut_the_call", "hang_up", "hangup", "user_hangup", "user_hung_up"),
    "interested": ("customer_interested", "hot_lead", "is_interested", "lead_interested", "yes_interested", "रुचि_है"),
    "invalid_number": ("does_not_exist", "incorrect_number", "invalid", "number_does_not_exist", "number_not_in_use"),
    "language_barrier": ("language_issue", "language_mismatch", "language_problem"),
    "no_answer": (
        "call_not_answered",
        "call_not_picked",
        "did_not_pick",
        "did_not_pick_up",
        "didnt_pick",
        "dnp",
        "no_response",
        "noanswer",
        "not_answered",
        "not_answering",
        "not_picked",
        "not_picked_up",
        "not_picking",
        "ring_no_response",
        "ringing_no_response",
        "rnr",
        "unanswered",
        "कोई_जवाब_नहीं",
    ),
    "not_eligible": ("ineligible", "not_qualified", "unqualified"),
    "not_interested": (
        "customer_not_interested",
        "lead_not_interested",
        "ni",
        "no_interest",
        "uninterested",
        "रुचि_नहीं",
    ),
    "not_reachable": ("number_not_reachable", "out_of_coverage", "out_of_network", "unreachable"),
    "switched_off": (
        "number_switched_off",
        "phone_off",
        "phone_switched_off",
        "switch_off",
        "switchoff",
        "switched_of",
    ),
    "voicemail": ("answering_machine", "machine", "machine_answered", "voice_mail", "voicemail_detected"),
    "wrong_number": ("wrong_contact", "wrong_no", "wrong_person", "wrongnumber", "गलत_नंबर", "ग़लत_नंबर"),
}
"""What campaigns have been seen or must be expected to write. Hindi ones as `slug` leaves them."""

_NAMES = {slug(synonym, "_"): name for name, synonyms in _SYNONYMS.items() for synonym in synonyms}


def normalise_disposition(raw: str | None) -> str | None:
    """Return a disposition in snake case under its usual name, or None if it has no letter or digit.

    `Not Interested` becomes `not_interested`, `RNR` becomes `no_answer`. One that we don't know keeps its own words, in
    whatever script they are.
    """
    name = slug(raw or "", "_")
    return _NAMES.get(name, name) or None
