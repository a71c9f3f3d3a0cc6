"""A transcript becomes utterances with speakers.

Futwork's transcripts are lines such as `assistant: Hello` and `user: hello`. Labels come in either case, in Hindi, or
as the agent's name. An utterance can span lines (the guide's sample has one), and some transcripts have no labels.
"""

import html
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from pipeline.domain.call.values import is_blank

AGENT = "agent"
LEAD = "lead"
UNKNOWN_SPEAKER = "unknown"


@dataclass(frozen=True, slots=True)
class Utterance:
    """What was said under one label."""

    speaker: str
    """`agent`, `lead`, `unknown` where nothing names the speaker, or a label that fits neither side."""
    text: str
    """Without the label; its lines stay lines."""


def read_transcript(text: str) -> tuple[Utterance, ...]:
    """Split a transcript into utterances; nothing but labels and white space is lost.

    A label is known (`assistant`, `user`, `ग्राहक`, …), or it is a name that alternates with the other side: the one who
    answers `user` is the agent. Other words before a colon (`Note: …`, `10:30`) stay in their utterance. Text before
    the first label, or without any label, is by `unknown`.
    """
    lines = [stripped for line in _plain(text).splitlines() if (stripped := line.strip())]
    labelled = [_split(line) for line in lines]
    speakers = _speakers([label for label, _ in labelled if label])
    utterances: list[tuple[str, list[str]]] = []
    for line, (label, rest) in zip(lines, labelled, strict=True):
        if label is not None and label in speakers:
            utterances.append((speakers[label], [rest]))
        elif utterances:
            utterances[-1][1].append(line)
        else:
            utterances.append((UNKNOWN_SPEAKER, [line]))
    joined = ((speaker, "\n".join(filter(None, parts))) for speaker, parts in utterances)
    return tuple(Utterance(speaker, said) for speaker, said in joined if said)


def transcript_text(value: Any) -> str | None:
    """Return a transcript as text; None if it is blank.

    It may also be a list of messages with a role each, an object that holds such a list, or either as JSON in a text.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(orjson.JSONDecodeError):
            value = orjson.loads(value)
    if isinstance(value, dict):
        value = next((value[name] for name in _LISTS if isinstance(value.get(name), list)), value)
    if isinstance(value, list):
        value = "\n".join(map(_message, value))
    return value if isinstance(value, str) and not is_blank(value) else None


_KNOWN = {
    unicodedata.normalize("NFC", label): speaker
    for speaker, labels in {
        AGENT: (
            *("agent", "ai", "ai agent", "ai assistant", "assistant", "bot", "executive", "representative"),
            *("voice agent", "voice bot", "voicebot", "असिस्टेंट", "एआई", "एजेंट", "एजेन्ट", "प्रतिनिधि", "बॉट", "सहायक"),
        ),
        LEAD: (
            *("callee", "client", "customer", "human", "lead", "prospect", "receiver", "recipient", "user"),
            *("उपभोक्ता", "उपयोगकर्ता", "कस्टमर", "ग्राहक", "प्रयोक्ता", "यूजर", "यूज़र", "लीड"),
        ),
    }.items()
    for label in labels
}

# Words before a colon that begin a line of speech or of notes. They are no speaker.
_NO_SPEAKER = frozenset(
    {
        *("address", "amount", "answer", "date", "email", "example", "id", "info", "link", "name", "no", "note"),
        *("notes", "number", "ok", "okay", "option", "otp", "phone", "pin", "price", "ps", "question", "reason"),
        *("reminder", "so", "step", "summary", "sure", "time", "total", "url", "warning", "yes"),
        *("ध्यान दें", "नाम", "नोट", "पता", "समय"),
    }
)

_LISTS = ("messages", "transcript", "turns", "utterances", "conversation", "segments")
_SPEAKERS = ("role", "speaker", "sender", "from", "participant", "name")
_SAID = ("content", "text", "message", "utterance", "transcript", "value")

_BREAK = re.compile(r"<(?:br\s*/?|/p|/div|/li)>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z][^<>]{0,80}>", re.IGNORECASE)
_OPENING = re.compile(  # a bullet, then a time: neither was spoken
    r"^\s*(?:[-•·>]\s+)?(?:[\[(]?[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?:[.,][0-9]+)?[\])]?\s*(?:[-–|]\s*)?(?=\D))?"
)
_LONGEST_LABEL = 40  # characters
_MOST_WORDS_IN_A_NAME = 3
_LABEL = re.compile(rf"([^:：]{{1,{_LONGEST_LABEL}}})[:：](?!//)\s*(.*)")
_NUMBERED = re.compile(r"[ _#-]*[0-9]{1,2}$")


def _split(line: str) -> tuple[str | None, str]:
    """Return what may be a label, in lower case, and the text after it; no label and the line if there is none.

    A bullet or a time before the label goes with it.
    """
    match = _LABEL.match(_OPENING.sub("", line, count=1))
    if match is None:
        return None, line
    label, rest = match[1].strip("[]()*_# ").casefold(), match[2].lstrip("*_ ")
    if not label.isascii():
        label = unicodedata.normalize("NFC", label)
    return (label, rest) if _known(label) or _may_be_a_name(label, rest) else (None, line)


def _known(label: str) -> str | None:
    return _KNOWN.get(label) or _KNOWN.get(_NUMBERED.sub("", label))


def _may_be_a_name(label: str, rest: str) -> bool:
    if label[-1:].isdecimal() and rest[:1].isdecimal():  # "at 10:30"
        return False
    bare = _NUMBERED.sub("", label)
    return (
        all(char.isalpha() or char in " .'’-_" or unicodedata.category(char)[0] == "M" for char in bare)
        and 0 < len(bare.split()) <= _MOST_WORDS_IN_A_NAME
        and bare not in _NO_SPEAKER
    )


def _speakers(labels: list[str]) -> dict[str, str]:
    """Return the speaker of each label; words before a colon that are no label are left out.

    *labels* are the candidates, in order.
    """
    known = {label: side for label in labels if (side := _known(label))}
    sides = set(known.values())
    unknown = set(labels) - set(known)
    if len(sides) == 2 or not unknown:
        return known
    if not sides:
        return _dialogue(labels)
    counts, before, openings = Counter(labels), _before(labels), {*known, None}
    names = {name for name in unknown if counts[name] > 1 and before[name].keys() - {name} <= openings}
    if sides == {AGENT}:
        # A lead who spoke is evidence that the call connected, so a word said once before a colon is not enough.
        return known | dict.fromkeys(names, LEAD)
    # Somebody spoke with the lead: the name that began, and of the repeated names the one that answered most often.
    names |= unknown & {labels[0]}
    repeated = [name for name in counts if name in unknown and counts[name] > 1]
    if repeated:
        names.add(max(repeated, key=lambda name: sum(before[name][other] for other in before[name].keys() & openings)))
    elif len(unknown) == 1:
        names |= unknown
    return known | dict.fromkeys(names, AGENT)


def _dialogue(labels: list[str]) -> dict[str, str]:
    """Return two names that alternate, A B A, as themselves, because nothing says which of them is ours."""
    first, before = labels[0], _before(labels)
    answering = [name for name in before if name != first and before[name].keys() <= {first, name}]
    return {name: name for name in (first, *answering)} if answering and before[first].total() > 1 else {}


def _before(labels: list[str]) -> dict[str, Counter[str | None]]:
    """Return for each label how often it follows which other label; None is the beginning.

    `Offer: …` inside an utterance of Priya's follows `Priya`; a speaker follows the other side.
    """
    result: dict[str, Counter[str | None]] = {}
    for previous, label in zip([None, *labels], labels, strict=False):
        result.setdefault(label, Counter())[previous] += 1
    return result


def _message(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        return ""
    role = next((value[name] for name in _SPEAKERS if value.get(name)), None)
    said = next((value[name] for name in _SAID if value.get(name)), None)
    if isinstance(said, list):  # parts, as some models answer
        said = "\n".join(map(_message, said))
    if not isinstance(said, str):
        return ""
    return f"{role}: {said}" if isinstance(role, str) else said


def _plain(text: str) -> str:
    """Return a transcript with line ends where a relay wrote `\\n` or `<br>` in their place."""
    if "\n" not in text and "\\n" in text:
        text = text.replace("\\r\\n", "\n").replace("\\n", "\n")
    if _BREAK.search(text):
        text = html.unescape(_TAG.sub("", _BREAK.sub("\n", text)))
    return text
