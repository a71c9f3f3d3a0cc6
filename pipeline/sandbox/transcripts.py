"""What is said on a call, in English, Hindi and the mixture of both, with the name of the recipient in it."""

from random import Random
from typing import NamedTuple


class Conversation(NamedTuple):
    """What was said on a call, and what came of it."""

    transcript: str
    disposition: str
    summary: str
    callback: bool


class _Script(NamedTuple):
    result: str
    summary: str
    turns: tuple[str, ...]
    """In turn the assistant's and the recipient's words, the assistant's first; a turn may span lines."""


_SCRIPTS = (
    _Script(
        "interested",
        "{name} wants to see the plan and asked for the details on WhatsApp.",
        (
            "Hello, am I speaking with {name}? This is {agent} from {company}.",
            "Yes, speaking.",
            "Thank you. You asked about our home loan last week.\nDo you have two minutes?",
            "yes sure, what is the interest rate?",
            "It starts at 8.4 percent a year, and there is no processing fee this month.",
            "Okay that is good. Send me the details on WhatsApp",
            "I will send them right away. Have a great day, {name}!",
        ),
    ),
    _Script(
        "interested",
        "{name} is interested in a site visit at the weekend.",
        (
            "Good morning {name}! {agent} here, calling from {company} about the flats that you looked at.",
            "Ah yes, the two bedroom ones. Are they still available?",
            "Four are left. Shall I book a site visit for you on Saturday?",
            "Saturday works. My wife will come along",
            "Wonderful, Saturday at eleven then. \nYou will get the address by SMS.",
            "great, thank you",
        ),
    ),
    _Script(
        "not interested",
        "{name} is not interested and asked not to be called again.",
        (
            "Hello {name}, this is {agent} from {company}. Is this a good time?",
            "What is it about?",
            "It is about the health cover that you viewed on our site.",
            "No, I already have one. Not interested. Please don't call again.",
            "I understand. Sorry for the trouble, and have a nice day.",
        ),
    ),
    _Script(
        "callback",
        "{name} was in a meeting and asked for a call later.",
        (
            "Hi {name}, this is {agent} from {company}.",
            "I'm in a meeting, can you call later?",
            "Of course. When would suit you?",
            "tomorrow, some time after lunch",
            "Thank you, I will call you then.",
        ),
    ),
    _Script(
        "wrong number",
        "The person who answered does not know {name}.",
        (
            "Hello, may I speak with {name}?",
            "Who? There is nobody of that name here.",
            "I am sorry, I must have the wrong number. Goodbye.",
        ),
    ),
    _Script(
        "interested",
        "{name} ने डेमो क्लास के लिए हाँ कहा।",
        (
            "नमस्ते, क्या मेरी बात {name} जी से हो रही है? मैं {company} से {agent} बोल रही हूँ।",
            "हाँ जी, बोलिए।",
            "आपने हमारे कोर्स के बारे में पूछा था।\nक्या आप एक मुफ़्त डेमो क्लास लेना चाहेंगे?",
            "हाँ, फ़ीस कितनी है?",
            "महीने के बारह सौ रुपये। डेमो बिल्कुल मुफ़्त है।",
            "ठीक है, डेमो बुक कर दीजिए",
            "धन्यवाद {name} जी, आपका दिन शुभ हो!",
        ),
    ),
    _Script(
        "not interested",
        "{name} को अभी ज़रूरत नहीं है।",
        (
            "नमस्ते {name} जी, मैं {agent}, {company} से। क्या आपके पास दो मिनट हैं?",
            "किस बारे में?",
            "हमारे नए बीमा प्लान के बारे में।",
            "नहीं, अभी ज़रूरत नहीं है। धन्यवाद।",
            "कोई बात नहीं, आपका दिन शुभ हो।",
        ),
    ),
    _Script(
        "callback",
        "{name} ने शाम को फ़ोन करने को कहा।",
        (
            "नमस्ते, {name} जी बोल रहे हैं?",
            "हाँ, लेकिन अभी गाड़ी चला रहा हूँ",
            "माफ़ कीजिए। मैं कब फ़ोन करूँ?",
            "कल शाम को कीजिए",
            "ज़रूर, कल शाम को बात करते हैं।",
        ),
    ),
    _Script(
        "callback",
        "{name} asked for a call tomorrow (spoke Hinglish).",
        (
            "Hello {name} ji, main {agent} bol rahi hoon {company} se.",
            "haan boliye",
            "Aapne website par loan ke liye apply kiya tha, kya documents ready hain?",
            "abhi nahi, kal call karo na please",
            "Theek hai {name} ji, main kal call karungi. Thank you!",
        ),
    ),
    _Script(
        "interested",
        "The line dropped before {name} could decide.",
        (
            "Hello {name}, {agent} from {company} here.\nThank you for taking the call.",
            "hello? hello, awaaz nahi aa rahi",
            "Can you hear me now?",
        ),
    ),
)

_DISPOSITIONS = {
    "interested": ("Interested", "Interested", "interested", "INTERESTED", "Interested - Hot", "Interested "),
    "not interested": ("Not Interested", "Not Interested", "not interested", "NOT_INTERESTED", "Not interested"),
    "callback": ("Callback", "Call Back", "callback", "CALLBACK", "Callback Requested"),
    "wrong number": ("Wrong Number", "wrong number", "Wrong number"),
    "no answer": ("No Answer", "no answer", "NO_ANSWER", "No Answer", ""),
    "busy": ("Busy", "busy", "BUSY", "Busy", ""),
    "failed": ("Failed", "failed", "", ""),
}
_LABELS = (
    ("assistant", "user"),
    ("assistant", "user"),
    ("assistant", "user"),
    ("Assistant", "User"),
    ("ASSISTANT", "USER"),
    ("सहायक", "उपयोगकर्ता"),
    ("{agent}", "user"),
)
_AGENTS = ("Priya", "Ananya", "Kavya", "Riya")
_COMPANIES = ("Acme Finance", "Sunrise Homes", "BrightPath Learning", "CarePlus")


def converse(draw: Random, name: str) -> Conversation:
    """What was said with *name* on a call that connected."""
    script = draw.choice(_SCRIPTS)
    said_by = draw.choice(_LABELS)
    words = {"name": name, "agent": draw.choice(_AGENTS), "company": draw.choice(_COMPANIES)}
    labels = [label.format(**words) for label in said_by]
    lines = (f"{labels[at % 2]}: {turn.format(**words)}\n" for at, turn in enumerate(script.turns))
    return Conversation(
        transcript="".join(lines),
        disposition=disposition(draw, script.result),
        summary=script.summary.format(**words),
        callback=script.result == "callback",
    )


def disposition(draw: Random, result: str) -> str:
    """A spelling, as somebody might have configured it, of the disposition for *result*."""
    return draw.choice(_DISPOSITIONS[result])
