"""A transcript's turns, and the time of a promised callback."""

from datetime import UTC, datetime, timedelta

import pytest

from pipeline.domain.call import (
    CallOutcome,
    Utterance,
    read_transcript,
)
from pipeline.domain.call.callback import read_callback
from tests.unit.call.events import make_call


def india(*parts: int) -> datetime:
    """Return the UTC moment of a time on India's clock."""
    return datetime(*parts, tzinfo=UTC) - timedelta(hours=5, minutes=30)  # type: ignore[arg-type, misc]


class TestCallback:
    @pytest.mark.parametrize(
        ("text", "moment"),
        [
            ("2026-05-08T20:25:23.674Z", datetime(2026, 5, 8, 20, 25, 23, 674000, tzinfo=UTC)),
            ("2026-05-08T20:25:00+05:30", india(2026, 5, 8, 20, 25)),
            ("2026-05-08 20:25", india(2026, 5, 8, 20, 25)),
            ("2026-05-08 8:25 PM", india(2026, 5, 8, 20, 25)),
            ("2026/05/08 20:25", india(2026, 5, 8, 20, 25)),
            ("08/05/2026 8:25 pm", india(2026, 5, 8, 20, 25)),
            ("08-05-2026, 20:25:10", india(2026, 5, 8, 20, 25, 10)),
            ("8.5.2026 8 p.m.", india(2026, 5, 8, 20, 0)),
            ("8 May 2026, 8:25 PM", india(2026, 5, 8, 20, 25)),
            ("8th May 2026 at 20:25 IST", india(2026, 5, 8, 20, 25)),
            ("May 8, 2026 12:05 AM", india(2026, 5, 8, 0, 5)),
            ("Friday, May 8, 2026 12:05 PM", india(2026, 5, 8, 12, 5)),
            ("8:25 PM on 8 May 2026", india(2026, 5, 8, 20, 25)),
            ("8 May 2026 20:25 UTC", datetime(2026, 5, 8, 20, 25, tzinfo=UTC)),
            ("8 May 2026 20:25 +0530", india(2026, 5, 8, 20, 25)),
            ("1778271923", datetime(2026, 5, 8, 20, 25, 23, tzinfo=UTC)),
            ("1778271923674", datetime(2026, 5, 8, 20, 25, 23, 674000, tzinfo=UTC)),
            ("tomorrow evening", None),
            ("5 PM", None),
            ("20:25", None),
            ("2026-05-08", None),
            ("8 May 2026", None),
            ("8 May 2026 9", None),
            ("31/02/2026 10:00", None),
            ("08/13/2026 10:00", None),
            ("8 May 2026 25:00", None),
            ("8 May 2026 13:00 PM", None),
            ("8 May 2026 10:00 +99:00", None),
            ("0001-01-01T00:00:00+14:00", None),
            ("9999789877", None),
            ("call me on 8 May 2026 at 8:25 PM or so, but not when it rains, please", None),
        ],
    )
    def test_a_moment_is_read_and_anything_else_is_none(self, text: str, moment: datetime | None) -> None:
        assert read_callback(text) == moment
        call = make_call(extractedData={"callback_date_time": text})
        assert (call.callback_at, call.callback_raw) == (moment, text)

    def test_another_region_reads_the_time_on_its_own_clock(self) -> None:
        assert read_callback("2026-05-08 20:25", region="AE") == datetime(2026, 5, 8, 16, 25, tzinfo=UTC)

    def test_a_region_with_several_clocks_names_no_moment_without_a_zone(self) -> None:
        assert read_callback("05/08/2026 20:25", region="US") is None
        assert read_callback("05/08/2026 20:25 UTC", region="US") == datetime(2026, 5, 8, 20, 25, tzinfo=UTC)

    def test_date_and_time_in_fields_of_their_own_are_put_together(self) -> None:
        call = make_call(extractedData={"callback_date": "08/05/2026", "callback_time": "8:25 PM"})
        assert (call.callback_raw, call.callback_at) == ("08/05/2026 8:25 PM", india(2026, 5, 8, 20, 25))

    def test_a_blank_in_the_extraction_is_no_callback(self) -> None:
        call = make_call(extractedData={"callback_date_time": "-", "callback_at": None, "x": 1})
        assert (call.callback_raw, call.callback_at) == (None, None)


class TestTranscript:
    @pytest.mark.parametrize(
        ("text", "turns"),
        [
            ("ASSISTANT: Hi\nUser : Yes", [("agent", "Hi"), ("lead", "Yes")]),
            ("Agent: Hi\r\nCustomer: Yes\rBot: Bye", [("agent", "Hi"), ("lead", "Yes"), ("agent", "Bye")]),
            ("[AI]: Hi\n(Lead): Yes", [("agent", "Hi"), ("lead", "Yes")]),
            ("Agent 1: Hi\nuser_2: Yes", [("agent", "Hi"), ("lead", "Yes")]),
            ("assistant:\nHi\nthere\n\nuser:\nassistant: Bye", [("agent", "Hi\nthere"), ("agent", "Bye")]),
            ("Good morning\nassistant: Hi", [("unknown", "Good morning"), ("agent", "Hi")]),
            ("no labels\nat all", [("unknown", "no labels\nat all")]),
            ("user: one\nuser: two", [("lead", "one"), ("lead", "two")]),
            ("सहायक: नमस्ते जी\nउपयोगकर्ता: हाँ बोलिए", [("agent", "नमस्ते जी"), ("lead", "हाँ बोलिए")]),
            ("एजेंट： नमस्ते\nग्राहक： हाँ", [("agent", "नमस्ते"), ("lead", "हाँ")]),
            ("असिस्टेंट: नमस्ते\nयूज़र: हाँ\nयूज़र: जी", [("agent", "नमस्ते"), ("lead", "हाँ"), ("lead", "जी")]),
        ],
    )
    def test_known_labels_name_the_speaker(self, text: str, turns: list[tuple[str, str]]) -> None:
        assert [(turn.speaker, turn.text) for turn in read_transcript(text)] == turns

    @pytest.mark.parametrize(
        ("text", "turns"),
        [
            ("Priya: Hi\nuser: Yes\nPriya: Bye", [("agent", "Hi"), ("lead", "Yes"), ("agent", "Bye")]),
            ("user: Hello?\nPriya Sharma: Hi\nuser: Yes", [("lead", "Hello?"), ("agent", "Hi"), ("lead", "Yes")]),
            (
                "Hello: is it me?\nuser: Hi\nPriya: Yes\nOffer: gold\nuser: Ok\nOffer: silver\nPriya: Bye",
                [
                    *(("agent", "is it me?"), ("lead", "Hi"), ("agent", "Yes\nOffer: gold")),
                    *(("lead", "Ok\nOffer: silver"), ("agent", "Bye")),
                ],
            ),
            ("प्रिया: नमस्ते\nग्राहक: हाँ", [("agent", "नमस्ते"), ("lead", "हाँ")]),
            ("caller: Hi\nuser: Yes", [("agent", "Hi"), ("lead", "Yes")]),
            (
                "assistant: Hi\ncaller: Yes\nassistant: Good\ncaller: Bye",
                [("agent", "Hi"), ("lead", "Yes"), ("agent", "Good"), ("lead", "Bye")],
            ),
            (
                "Priya: Hi\nuser: Yes\nRahul: I take over\nuser: Ok\nRahul: Bye",
                [("agent", "Hi"), ("lead", "Yes"), ("agent", "I take over"), ("lead", "Ok"), ("agent", "Bye")],
            ),
            ("Priya: Hi\nRahul: Yes\nPriya: Bye", [("priya", "Hi"), ("rahul", "Yes"), ("priya", "Bye")]),
        ],
    )
    def test_a_name_that_takes_turns_is_a_speaker(self, text: str, turns: list[tuple[str, str]]) -> None:
        assert [(turn.speaker, turn.text) for turn in read_transcript(text)] == turns

    @pytest.mark.parametrize(
        "line",
        [
            "Note: this call is recorded",
            "Offer: twenty percent off",
            "10:30 suits you?",
            "Come at 10:30 then",
            "https://example.com/plans",
            "We have three plans, as I said: gold",
            "What I wanted to tell you is this: hello",
            "ध्यान दें: कल",
            ": and",
        ],
    )
    @pytest.mark.parametrize("agent", ["assistant", "Priya"])
    def test_words_before_a_colon_stay_in_their_turn(self, agent: str, line: str) -> None:
        turns = read_transcript(f"{agent}: Hi\n{line}\nuser: Yes\n{agent}: Bye")
        assert turns == (Utterance("agent", f"Hi\n{line}"), Utterance("lead", "Yes"), Utterance("agent", "Bye"))

    @pytest.mark.parametrize("line", ["At 10:30 I think", "Note: before noon", "समय: सुबह"])
    def test_a_time_or_a_note_is_no_agent_even_where_no_agent_is_named(self, line: str) -> None:
        turns = read_transcript(f"user: Tomorrow\n{line}\nuser: Fine")
        assert turns == (Utterance("lead", f"Tomorrow\n{line}"), Utterance("lead", "Fine"))

    def test_words_that_repeat_but_do_not_take_turns_are_no_speaker(self) -> None:
        turns = read_transcript("Priya: Hi\nOffer: gold\nuser: Yes\nOffer: silver\nPriya: Bye")
        assert turns == (
            Utterance("agent", "Hi\nOffer: gold"),
            Utterance("lead", "Yes\nOffer: silver"),
            Utterance("agent", "Bye"),
        )

    def test_a_huge_transcript_takes_time_by_its_length_only(self) -> None:
        def label(number: int) -> str:
            return "".join(chr(ord("a") + int(digit)) for digit in str(number))

        body = "\n".join(f"{label(number)}: x" for number in range(60_000))
        assert len(read_transcript(f"user: hi\n{body}")) == 1
        assert len(read_transcript(f"assistant: hi\n{body}\n{body}")) == 1
        call = make_call(status="completed", transcript=f"assistant: hi\nuser: {'[' * 600_000}")
        assert call.outcome is CallOutcome.UNKNOWN

    def test_a_heading_does_not_make_a_lead_speak(self) -> None:
        call = make_call(status="completed", transcript="Campaign: Diwali\nassistant: Hi\nassistant: Are you there?")
        assert call.turns[0] == Utterance("unknown", "Campaign: Diwali")
        assert (call.lead_word_count, call.outcome) == (0, CallOutcome.UNKNOWN)

    def test_hindi_words_are_counted_by_white_space(self) -> None:
        call = make_call(transcript="सहायक: नमस्ते, क्या आप सुन रहे हैं?\nग्राहक: हाँ जी")
        assert (call.word_count, call.lead_word_count, call.lead_talk_share) == (8, 2, 0.25)

    def test_without_labels_the_leads_share_is_unknown(self) -> None:
        call = make_call(transcript="hello there")
        assert (call.word_count, call.lead_word_count, call.lead_talk_share) == (2, 0, None)
