"""What became of a call: one rule over status, disposition, duration and transcript."""

import re
from collections.abc import Iterable

from pipeline.domain.call.disposition import NOT_REACHED, REACHED
from pipeline.domain.call.status import CALL_STATUSES, CallOutcome, standing
from pipeline.domain.call.transcript import AGENT, LEAD, Utterance

# Each class excludes its opening sign too, which keeps the search linear in what a stranger may send.
_STAGE_DIRECTION = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|<[^<>]*>")
_WORD = re.compile(r"[^\W_]")


def decide_outcome(
    status: str, *, disposition: str | None, duration_seconds: float | None, utterances: Iterable[Utterance]
) -> CallOutcome:
    """Return what the facts about a call prove together; the first line that applies decides.

    | evidence                                   | outcome      | because                                            |
    |--------------------------------------------|--------------|----------------------------------------------------|
    | disposition `voicemail`                    | no_answer    | the lead of the transcript was a machine           |
    | the lead said a word                       | connected    | it proves most; status and duration may be stale   |
    | a status from before the end               | unknown      | the call is not over                               |
    | a status that names a failure              | that failure | the telephony knows why it did not connect         |
    | a disposition that says nobody was reached | what it says | `completed` only means that the attempt is over    |
    | a disposition that takes two               | connected    | somebody answered, even if no transcript came      |
    | a status that we don't know                | unknown      | it may mean anything                               |
    | a transcript in which the lead is silent   | unknown      | the line was open, but did anybody listen?         |
    | duration above zero                        | connected    | the line was open                                  |
    | duration zero, `completed`                 | no_answer    | the attempt is over and the line was never open    |
    | anything else                              | unknown      | zero at `call-disconnected` may only be early      |

    *status* and *disposition* are normalised ones.
    """
    said = list(utterances)
    meaning = standing(status)
    if disposition == "voicemail":
        return CallOutcome.NO_ANSWER
    if any(one.speaker == LEAD and _holds_a_word(one.text) for one in said):
        return CallOutcome.CONNECTED
    if status in CALL_STATUSES and not meaning.is_final:
        return CallOutcome.UNKNOWN
    if meaning.outcome is not None:
        return meaning.outcome
    if disposition in NOT_REACHED:
        return NOT_REACHED[disposition]
    if disposition in REACHED:
        return CallOutcome.CONNECTED
    if not meaning.is_final:
        return CallOutcome.UNKNOWN
    return _by_duration(status, duration_seconds, lead_is_silent=any(one.speaker in {AGENT, LEAD} for one in said))


def _by_duration(status: str, duration_seconds: float | None, *, lead_is_silent: bool) -> CallOutcome:
    if lead_is_silent or duration_seconds is None:
        return CallOutcome.UNKNOWN
    if duration_seconds > 0:
        return CallOutcome.CONNECTED
    return CallOutcome.NO_ANSWER if status == "completed" else CallOutcome.UNKNOWN


def _holds_a_word(text: str) -> bool:
    """Return whether something was said; `...` and `[silence]` are how transcripts write that nothing was."""
    return _WORD.search(_STAGE_DIRECTION.sub("", text)) is not None
