"""The events of a call become one state, one outcome and one disposition."""

from typing import Any

import pytest

from pipeline.domain.call import (
    CALL_STATUSES,
    CallOutcome,
    Utterance,
    decide_outcome,
    merge,
    normalise_disposition,
    normalise_status,
)
from tests.unit.call.events import SILENT, SPOKE, make_call, make_event


class TestStatus:
    @pytest.mark.parametrize(
        ("raw", "status", "is_final"),
        [
            ("initiated", "initiated", False),
            ("ringing", "ringing", False),
            ("in-progress", "in-progress", False),
            ("In Progress", "in-progress", False),
            ("call-disconnected", "call-disconnected", True),
            ("callDisconnected", "call-disconnected", True),
            ("completed", "completed", True),
            ("no-answer", "no-answer", True),
            ("no_answer", "no-answer", True),
            ("NO ANSWER", "no-answer", True),
            ("busy", "busy", True),
            ("failed", "failed", True),
            ("call-failed", "failed", True),
            ("queued", "queued", False),
            ("scheduled", "scheduled", False),
            ("rescheduled", "rescheduled", False),
            ("canceled", "cancelled", True),
            ("cancelled", "cancelled", True),
            ("stopped", "stopped", True),
            ("error", "error", True),
            ("balance-low", "balance-low", True),
            ("Wrapping_Up", "wrapping-up", False),
            ("", "unknown", False),
            (None, "unknown", False),
            (7, "7", False),
            ({}, "unknown", False),
        ],
    )
    def test_every_spelling_has_one_name_and_is_final_or_not(self, raw: Any, status: str, is_final: bool) -> None:
        event = make_event(status=raw)
        assert (event.status, event.is_final) == (status, is_final)
        assert (make_call(status=raw).status, make_call(status=raw).is_final) == (status, is_final)

    def test_every_final_status_ranks_above_every_other(self) -> None:
        finals = [status.rank for status in CALL_STATUSES.values() if status.is_final]
        others = [status.rank for status in CALL_STATUSES.values() if not status.is_final]
        assert min(finals) > max(others)

    def test_the_names_in_the_table_are_normalised_ones(self) -> None:
        assert list(CALL_STATUSES) == [normalise_status(name.upper()) for name in CALL_STATUSES]


class TestMerging:
    def test_a_late_ringing_does_not_overrule_completed(self) -> None:
        merged = merge([make_event(status="completed"), make_event(status="ringing", minute=5)])
        assert merged["status"] == "completed"

    def test_a_status_that_we_do_not_know_overrules_none_that_we_do(self) -> None:
        merged = merge([make_event(status="ringing"), make_event(status="wrapping-up", minute=5, note="kept")])
        assert merged == {"callSid": "call-1", "status": "ringing", "note": "kept"}

    def test_completed_overrules_call_disconnected_even_if_it_came_first(self) -> None:
        completed = make_event(status="completed", disposition="Interested")
        dropped = make_event(status="call-disconnected", disposition="Unclear", minute=1)
        assert merge([completed, dropped])["disposition"] == "Interested"
        assert merge([dropped, completed])["status"] == "completed"

    def test_among_equal_ranks_the_later_receipt_wins(self) -> None:
        early = make_event(status="completed", disposition="Interested")
        late = make_event(status="no-answer", disposition="Callback", minute=1)
        assert merge([late, early]) == {"callSid": "call-1", "status": "no-answer", "disposition": "Callback"}

    @pytest.mark.parametrize("blank", [None, "", "  ", "-", " - ", "nan", "NaN", [], {}, [None], {"a": ""}])
    def test_a_blank_never_erases_a_value(self, blank: Any) -> None:
        for held in ("said", 0, False, [1], {"key": "said"}):
            merged = merge([make_event(status="ringing", field=held), make_event(status="completed", field=blank)])
            kept = {**held, **blank} if isinstance(held, dict) and isinstance(blank, dict) else held
            assert merged["field"] == kept

    @pytest.mark.parametrize("value", [0, 0.0, False, "0", "no"])
    def test_zero_and_false_are_values(self, value: Any) -> None:
        merged = merge([make_event(status="ringing", field="old"), make_event(status="completed", field=value)])
        assert merged["field"] == value

    def test_objects_merge_by_key_and_unknown_keys_stay(self) -> None:
        dropped = make_event(status="call-disconnected", telephonyData={"duration": "12", "x": 1}, newKey=[1])
        completed = make_event(status="completed", telephonyData={"duration": 13, "recordingUrl": "https://r/1"})
        assert merge([completed, dropped]) == {
            "callSid": "call-1",
            "status": "completed",
            "telephonyData": {"duration": 13, "x": 1, "recordingUrl": "https://r/1"},
            "newKey": [1],
        }

    def test_a_repeat_counts_from_its_first_receipt(self) -> None:
        first = make_event(status="completed", disposition="Callback")
        second = make_event(status="completed", disposition="Interested", minute=1)
        repeat = make_event(status="completed", disposition="Callback", minute=2)
        assert merge([first, second, repeat])["disposition"] == "Interested"
        assert merge([repeat, second, first])["disposition"] == "Interested"

    def test_the_events_are_left_as_they_were(self) -> None:
        early = make_event(status="ringing", telephonyData={"a": 1})
        merge([early, make_event(status="completed", telephonyData={"b": 2})])
        assert early.payload == {"callSid": "call-1", "status": "ringing", "telephonyData": {"a": 1}}

    def test_events_of_several_calls_are_refused(self) -> None:
        with pytest.raises(ValueError, match="several calls"):
            merge([make_event(), make_event(callSid="call-2")])

    def test_no_events_make_an_empty_payload(self) -> None:
        assert merge([]) == {}


class TestOutcome:
    @pytest.mark.parametrize(
        ("status", "disposition", "duration", "turns", "outcome"),
        [
            ("completed", None, 0.0, SPOKE, "connected"),
            ("call-disconnected", None, None, SPOKE, "connected"),
            ("in-progress", None, None, SPOKE, "connected"),
            ("no-answer", None, 0.0, SPOKE, "connected"),
            ("completed", "busy", 20.0, SPOKE, "connected"),
            ("completed", "voicemail", 20.0, SPOKE, "no_answer"),
            ("completed", "busy", 20.0, SILENT, "busy"),
            ("completed", "no_answer", 20.0, SILENT, "no_answer"),
            ("completed", "switched_off", 20.0, [], "no_answer"),
            ("completed", "invalid_number", 20.0, [], "failed"),
            ("completed", "interested", None, [], "connected"),
            ("completed", "wrong_number", 0.0, [], "connected"),
            ("completed", None, 109.0, [], "connected"),
            ("completed", "custom_words", 109.0, [Utterance("unknown", "hello")], "connected"),
            ("completed", None, 109.0, SILENT, "unknown"),
            ("completed", None, 0.0, SILENT, "unknown"),
            ("completed", None, 0.0, [], "no_answer"),
            ("completed", None, None, [], "unknown"),
            ("call-disconnected", None, 9.0, [], "connected"),
            ("call-disconnected", None, 0.0, [], "unknown"),
            ("call-disconnected", "busy", 0.0, [], "busy"),
            ("no-answer", None, 30.0, [], "no_answer"),
            ("no-answer", "interested", 30.0, SILENT, "no_answer"),
            ("busy", None, None, [], "busy"),
            ("failed", "no_answer", None, [], "failed"),
            ("error", None, None, [], "failed"),
            ("balance-low", None, None, [], "failed"),
            ("cancelled", None, None, [], "cancelled"),
            ("stopped", None, None, [], "cancelled"),
            ("queued", None, None, [], "unknown"),
            ("scheduled", None, None, [], "unknown"),
            ("rescheduled", None, None, [], "unknown"),
            ("initiated", None, None, [], "unknown"),
            ("ringing", "no_answer", None, [], "unknown"),
            ("in-progress", "interested", 5.0, SILENT, "unknown"),
            ("wrapping-up", None, 9.0, [], "unknown"),
            ("wrapping-up", "no_answer", None, [], "no_answer"),
            ("unknown", None, None, [], "unknown"),
        ],
    )
    def test_status_disposition_duration_and_transcript_decide_together(
        self, status: str, disposition: str | None, duration: float | None, turns: list[Utterance], outcome: str
    ) -> None:
        decided = decide_outcome(status, disposition=disposition, duration_seconds=duration, utterances=turns)
        assert decided == outcome

    @pytest.mark.parametrize("text", ["...", "[silence]", "(no response)", "<noise> -"])
    def test_a_lead_who_said_no_word_has_not_spoken(self, text: str) -> None:
        call = make_call(status="completed", disposition="No Answer", transcript=f"assistant: hello\nuser: {text}")
        assert call.outcome is CallOutcome.NO_ANSWER

    def test_a_disposition_in_the_extraction_counts_when_the_top_level_has_none(self) -> None:
        call = make_call(status="completed", disposition="-", extractedData={"disposition": "Line Busy"})
        assert (call.disposition_raw, call.disposition, call.outcome) == ("Line Busy", "busy", CallOutcome.BUSY)


class TestDisposition:
    @pytest.mark.parametrize(
        ("raw", "name"),
        [
            ("Interested", "interested"),
            ("INTERESTED", "interested"),
            ("Not Interested", "not_interested"),
            ("not-interested", "not_interested"),
            ("NotInterested", "not_interested"),
            ("Call Back", "callback"),
            ("Callback", "callback"),
            ("Call back later.", "callback"),
            ("Follow-up", "callback"),
            ("Wrong Number", "wrong_number"),
            ("wrong no.", "wrong_number"),
            ("Busy", "busy"),
            ("User Busy", "busy"),
            ("No Answer", "no_answer"),
            ("RNR", "no_answer"),
            ("Didn't pick", "no_answer"),
            ("Voice Mail", "voicemail"),
            ("Switched Off", "switched_off"),
            ("Not Reachable", "not_reachable"),
            ("DND", "do_not_call"),
            ("रुचि नहीं", "not_interested"),
            ("गलत नंबर", "wrong_number"),
            ("व्यस्त", "busy"),
            ("Wants a demo (Tuesday)", "wants_a_demo_tuesday"),
            ("डेमो चाहिए", "डेमो_चाहिए"),
            ("செய்யவும்", "செய்யவும்"),
            ("👍", None),
            ("", None),
            (None, None),
        ],
    )
    def test_free_text_gets_one_name(self, raw: str | None, name: str | None) -> None:
        assert normalise_disposition(raw) == name

    def test_the_raw_text_is_kept_beside_the_name(self) -> None:
        call = make_call(disposition=" Wrong Number ")
        assert (call.disposition_raw, call.disposition) == ("Wrong Number", "wrong_number")
