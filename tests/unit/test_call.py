"""A post-call event becomes a call: the guide's sample, every known status, drift of types, and transcripts."""

import json
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipeline.domain.call import (
    CALL_STATUSES,
    Call,
    CallOutcome,
    Event,
    UnreadableEvent,
    Utterance,
    decide_outcome,
    describe,
    merge,
    normalise_disposition,
    normalise_status,
    read_event,
    read_transcript,
    reference,
)
from pipeline.domain.call.callback import read_callback

NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)

TRANSCRIPT = (
    "assistant: Hello bani bani is testing the call \nThank you very much\nuser: hello\n"
    "assistant: Hello! How can I assist you today?\nuser: thank you thank you\n"
    "assistant: You're very welcome! If you need any further assistance, feel free to ask. Have a great day!\n"
)

# The sample of Futwork's Lead Integration Guide.
SAMPLE: dict[str, Any] = {
    "callSid": "3f19eab8-c425-495f-a343-268c44d5631a",
    "leadId": "68ecc93cd9fbecbe9431a2a1",
    "campaignId": "68ecc86fd9fbecbe9431a18e",
    "agentId": "68ecc7a3d9fbecbe9431a0a7",
    "status": "call-disconnected",
    "telephonyData": {
        "direction": "outbound",
        "duration": "0.0",
        "toNumber": "+918076405599",
        "fromNumber": "+918035735856",
        "recordingUrl": "",
        "hostedTelephony": True,
        "providerCallId": "7f209cdb-be57-4314-b6ba-3c00eb4bb650",
        "provider": "exotel",
        "hangupBy": None,
        "hangupReason": None,
        "hangupProviderCode": None,
    },
    "contextDetails": {
        "recipientPhoneNumber": "+918076405599",
        "recipientData": {"customer_name": "abcd xyz", "place": "ABC"},
        "leadId": "68ecc93cd9fbecbe9431a2a1",
        "agentId": "68ecc7a3d9fbecbe9431a0a7",
        "campaignId": "68ecc86fd9fbecbe9431a18e",
    },
    "transcript": TRANSCRIPT,
    "disposition": "",
    "extractedData": None,
}


def read(payload: Any, *, minute: int = 0, region: str = "IN") -> Event:
    body = json.dumps(payload, ensure_ascii=False).encode()
    return read_event(body, received_at=NOW + timedelta(minutes=minute), default_region=region)


def make_event(*, minute: int = 0, **fields: Any) -> Event:
    return read({"callSid": "call-1", **fields}, minute=minute)


def make_call(**fields: Any) -> Call:
    return describe(merge([make_event(**fields)]))


def refusal(body: bytes) -> UnreadableEvent:
    with pytest.raises(UnreadableEvent) as caught:
        read_event(body, received_at=NOW)
    return caught.value


class TestTheGuidesSample:
    def test_is_read_as_an_event(self) -> None:
        event = read(SAMPLE)
        assert event == Event(
            digest=event.digest,
            call_sid="3f19eab8-c425-495f-a343-268c44d5631a",
            status="call-disconnected",
            is_final=True,
            futwork_lead_id="68ecc93cd9fbecbe9431a2a1",
            campaign_id="68ecc86fd9fbecbe9431a18e",
            phone="+918076405599",
            received_at=NOW,
            payload=SAMPLE,
        )
        assert len(event.digest) == 64

    def test_is_described_as_a_call(self) -> None:
        assert describe(merge([read(SAMPLE)])) == Call(
            call_sid="3f19eab8-c425-495f-a343-268c44d5631a",
            futwork_lead_id="68ecc93cd9fbecbe9431a2a1",
            campaign_id="68ecc86fd9fbecbe9431a18e",
            agent_id="68ecc7a3d9fbecbe9431a0a7",
            status="call-disconnected",
            is_final=True,
            outcome=CallOutcome.CONNECTED,
            disposition_raw=None,
            disposition=None,
            duration_seconds=0.0,
            direction="outbound",
            from_number="+918035735856",
            to_number="+918076405599",
            recipient_phone="+918076405599",
            recording_url=None,
            provider="exotel",
            provider_call_id="7f209cdb-be57-4314-b6ba-3c00eb4bb650",
            hangup_by=None,
            hangup_reason=None,
            transcript=TRANSCRIPT,
            turns=(
                Utterance("agent", "Hello bani bani is testing the call\nThank you very much"),
                Utterance("lead", "hello"),
                Utterance("agent", "Hello! How can I assist you today?"),
                Utterance("lead", "thank you thank you"),
                Utterance(
                    "agent",
                    "You're very welcome! If you need any further assistance, feel free to ask. Have a great day!",
                ),
            ),
            word_count=40,
            lead_word_count=5,
            lead_talk_share=0.125,
            summary=None,
            callback_at=None,
            callback_raw=None,
            extracted=None,
            recipient_data={"customer_name": "abcd xyz", "place": "ABC"},
        )


class TestReadingAnEvent:
    def test_spacing_and_key_order_do_not_change_the_digest_but_content_does(self) -> None:
        reordered = json.dumps(dict(reversed(SAMPLE.items())), indent=3).encode()
        assert read(SAMPLE).digest == read_event(reordered, received_at=NOW + timedelta(days=1)).digest
        assert read(SAMPLE).digest != read(SAMPLE | {"disposition": "Interested"}).digest

    def test_an_id_at_the_top_level_counts_before_one_in_the_context_unless_it_is_blank(self) -> None:
        context = {"leadId": "lead-c", "campaignId": "campaign-c"}
        event = make_event(leadId="lead-t", campaignId=" - ", contextDetails=context)
        assert (event.futwork_lead_id, event.campaign_id) == ("lead-t", "campaign-c")

    def test_a_lead_id_among_the_recipient_data_is_not_taken_for_futworks(self) -> None:
        assert make_event(contextDetails={"recipientData": {"leadId": "ours"}}).futwork_lead_id is None

    @pytest.mark.parametrize(
        ("context", "telephony", "phone"),
        [
            ({"recipientPhoneNumber": "9999789877"}, {"toNumber": "+918076405599"}, "+919999789877"),
            ({"recipientPhoneNumber": 9999789877}, None, "+919999789877"),
            ({"recipientPhoneNumber": "09999789877"}, [], "+919999789877"),
            ({"recipientPhoneNumber": "XXXXX89877"}, {"toNumber": "8076405599"}, "+918076405599"),
            ({}, {"toNumber": "+918076405599", "fromNumber": "+918035735856"}, "+918076405599"),
            ({}, {"direction": "Outgoing", "toNumber": "+918076405599"}, "+918076405599"),
            ({}, {"direction": "Inbound", "toNumber": "+918035735856", "fromNumber": "8076405599"}, "+918076405599"),
            ("text", {"direction": 7, "toNumber": True}, None),
            (None, None, None),
        ],
    )
    def test_the_leads_phone_is_found_however_it_is_given(
        self, context: Any, telephony: Any, phone: str | None
    ) -> None:
        assert make_event(contextDetails=context, telephonyData=telephony).phone == phone

    def test_the_region_decides_what_a_number_without_a_country_code_means(self) -> None:
        event = read({"callSid": "1", "contextDetails": {"recipientPhoneNumber": "4155552671"}}, region="US")
        assert event.phone == "+14155552671"

    @pytest.mark.parametrize(
        ("value", "found"),
        [
            ("lead-7", "lead-7"),
            (7, "7"),
            (7.0, "7"),
            (" ", None),
            ("-", None),
            (None, None),
            ({"a": 1}, None),
            (True, None),
        ],
    )
    def test_our_reference_comes_back_as_text(self, value: Any, found: str | None) -> None:
        event = make_event(contextDetails={"recipientData": {"lead_ref": value}})
        assert reference(event, "lead_ref") == found
        assert reference(event, "another_key") is None

    def test_what_a_database_refuses_is_left_out_of_the_payload(self) -> None:
        texts = rb'["x\ud800y", "\u0928\u0000\u092e", "\ud83d\ude00"]'
        body = rb'{"callSid": "c\u00001", "a\u0000": %s, "n": NaN, "i": 123456789012345678901}' % texts
        event = read_event(body, received_at=NOW)
        assert event.call_sid == "c1"
        assert event.payload == {"callSid": "c1", "a": ["x�y", "नम", "😀"], "n": None, "i": 123456789012345678901.0}

    def test_other_encodings_of_json_are_read(self) -> None:
        text = '{"callSid": "c1", "transcript": "नमस्ते"}'
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            assert read_event(text.encode(encoding), received_at=NOW).payload["transcript"] == "नमस्ते"

    @pytest.mark.parametrize(
        ("body", "kind", "reason"),
        [
            (b"", "not_json", "the body is not JSON: it is empty"),
            (b" \n", "not_json", "the body is not JSON: it is empty"),
            (b"callSid=1&status=completed", "not_json", None),
            (b'{"callSid": "\xff"}', "not_json", None),
            (b'{"callSid": "1"', "not_json", None),
            (b'[{"callSid": "1"}]', "not_an_object", "the body is not a JSON object but an array"),
            (b"null", "not_an_object", "the body is not a JSON object but null"),
            (b"NaN", "not_an_object", "the body is not a JSON object but null"),
            (b"12", "not_an_object", "the body is not a JSON object but a number"),
            (b"{}", "no_call_sid", "the event has no callSid, so it belongs to no call"),
            (b'{"callSid": " "}', "no_call_sid", "the event has no callSid, so it belongs to no call"),
            (b'{"callSid": ["1"]}', "no_call_sid", "the event has no callSid, so it belongs to no call"),
            (b'{"callSid": true}', "no_call_sid", "the event has no callSid, so it belongs to no call"),
            (
                b'{"callSid": "%s"}' % (b"x" * 129),
                "call_sid_too_long",
                "the callSid has 129 characters, more than 128",
            ),
            (
                b'{"callSid": "1", "a": %s1%s}' % (b"[" * 64, b"]" * 64),
                "too_deep",
                "the JSON is nested more than 64 levels deep",
            ),
            (b"[" * 100_000, "too_deep", "the JSON is nested too deeply to be read"),
            (
                b'{"callstatus": "connected", "attempts": 2, "isTerminal": true, "outcome": {"x": 1}, "urid": "u1"}',
                "older_product",
                (
                    "an event of Futwork's older tele-calling product (it has callstatus, attempts, isTerminal, "
                    "outcome, urid), not of the AI Platform"
                ),
            ),
        ],
    )
    def test_what_cannot_be_read_is_refused_with_a_kind_and_one_line(
        self, body: bytes, kind: str, reason: str | None
    ) -> None:
        caught = refusal(body)
        assert caught.kind == kind
        assert "\n" not in str(caught)
        assert str(caught) == caught.reason
        assert reason is None or caught.reason == reason

    def test_the_older_product_is_not_seen_in_an_event_of_this_platform(self) -> None:
        assert make_event(attempts=2, outcome={}, urid="u1").payload["attempts"] == 2

    def test_a_nesting_that_is_just_allowed_is_read(self) -> None:
        body = b'{"callSid": "1", "a": %s1%s}' % (b"[" * 63, b"]" * 63)
        assert read_event(body, received_at=NOW).call_sid == "1"

    def test_a_refusal_survives_pickling(self) -> None:
        copy = pickle.loads(pickle.dumps(refusal(b"{}")))
        assert (copy.kind, copy.reason) == ("no_call_sid", "the event has no callSid, so it belongs to no call")

    def test_a_naive_time_of_receipt_is_a_mistake_of_the_caller(self) -> None:
        with pytest.raises(ValueError, match="aware"):
            read_event(b'{"callSid": "1"}', received_at=NOW.replace(tzinfo=None))


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


SPOKE = [Utterance("agent", "hello"), Utterance("lead", "yes")]
SILENT = [Utterance("agent", "hello"), Utterance("agent", "are you there?")]


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
        decided = decide_outcome(status, disposition=disposition, duration_seconds=duration, turns=turns)
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


class TestTypeDrift:
    @pytest.mark.parametrize(
        ("value", "seconds"),
        [
            ("0.0", 0.0),
            (0, 0.0),
            (109, 109.0),
            ("109", 109.0),
            ("109.5", 109.5),
            (" 109 sec ", 109.0),
            ("12s", 12.0),
            ("01:49", 109.0),
            ("1:02:03", 3723.0),
            (-3, None),
            ("-3", None),
            ("nan", None),
            ("inf", None),
            ("1e3", None),
            ("-", None),
            ("", None),
            (None, None),
            (True, None),
            ([109], None),
            ({"seconds": 109}, None),
            (1_778_000_000, None),
            ("9" * 400, None),
            (10**30, None),
        ],
    )
    def test_a_duration_is_seconds_or_none(self, value: Any, seconds: float | None) -> None:
        assert make_call(telephonyData={"duration": value}).duration_seconds == seconds

    def test_duration_and_recording_are_found_where_the_call_report_has_them(self) -> None:
        call = make_call(duration=31, recordingUrl="https://recordings.futwork.com/1.mp3")
        assert (call.duration_seconds, call.recording_url) == (31.0, "https://recordings.futwork.com/1.mp3")

    @pytest.mark.parametrize("url", ["javascript:alert(1)", "recordings/1.mp3", "-", 7, None])
    def test_a_recording_that_is_no_link_is_none(self, url: Any) -> None:
        assert make_call(telephonyData={"recordingUrl": url}).recording_url is None

    @pytest.mark.parametrize(
        ("value", "direction"),
        [
            ("outbound", "outbound"),
            ("OUTGOING", "outbound"),
            ("outbound-api", "outbound"),
            ("Inbound", "inbound"),
            ("web", "web"),
            (None, None),
        ],
    )
    def test_a_direction_has_one_name(self, value: Any, direction: str | None) -> None:
        assert make_call(telephonyData={"direction": value}).direction == direction

    @pytest.mark.parametrize("value", [None, True, 7, 7.5, "text", [], [{}], {}, {"a": None}])
    def test_any_value_in_any_field_still_makes_a_call(self, value: Any) -> None:
        fields = {name: value for name in SAMPLE if name != "callSid"}
        call = make_call(**fields)
        assert call.call_sid == "call-1"
        assert call.outcome is CallOutcome.UNKNOWN

    @pytest.mark.parametrize("value", [{"call_summary": "Wants a demo"}, '{"call_summary": "Wants a demo"}'])
    def test_an_extraction_may_be_an_object_or_json_in_a_string(self, value: Any) -> None:
        call = make_call(extractedData=value)
        assert (call.extracted, call.summary) == ({"call_summary": "Wants a demo"}, "Wants a demo")

    @pytest.mark.parametrize("value", [None, {}, "", "-", [], "{broken", '["x"]', {"summary": None}])
    def test_an_extraction_that_says_nothing_is_none(self, value: Any) -> None:
        assert make_call(extractedData=value).extracted is None

    def test_json_in_a_string_is_kept_to_what_can_be_stored(self) -> None:
        assert make_call(extractedData=r'{"a": "x\u0000y"}').extracted == {"a": "xy"}
        assert make_call(extractedData='{"a":' * 1000 + "1" + "}" * 1000).extracted is None

    def test_field_names_of_the_extraction_may_be_in_camel_case(self) -> None:
        extracted = {"callSummary": "Busy today", "callBackDateTime": "2026-05-09T10:00:00Z"}
        call = make_call(extractedData=extracted)
        assert (call.summary, call.callback_at) == ("Busy today", datetime(2026, 5, 9, 10, tzinfo=UTC))

    def test_a_transcript_may_be_a_list_of_messages(self) -> None:
        call = make_call(transcript=[{"role": "assistant", "content": "Hello"}, {"speaker": "User", "text": "Yes"}, 7])
        assert call.turns == (Utterance("agent", "Hello"), Utterance("lead", "Yes"))
        assert call.outcome is CallOutcome.CONNECTED

    @pytest.mark.parametrize("value", ["", " \n", "-", "nan", None, [], {}, 7])
    def test_a_blank_transcript_is_none(self, value: Any) -> None:
        call = make_call(transcript=value)
        assert (call.transcript, call.turns, call.word_count, call.lead_talk_share) == (None, (), 0, None)


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


def test_ids_fall_back_to_the_context_and_unknown_keys_of_the_payload_stay() -> None:
    merged = merge([make_event(contextDetails={"agentId": "a", "recipientData": {"k": 1}}, brandNew={"x": 1})])
    call = describe(merged)
    assert (call.agent_id, call.recipient_data, merged["brandNew"]) == ("a", {"k": 1}, {"x": 1})
