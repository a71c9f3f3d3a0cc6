"""A post-call event becomes a call: the guide's sample, every known status, drift of types."""

import json
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipeline.domain.call import (
    Call,
    CallOutcome,
    Event,
    Utterance,
    describe,
    merge,
    read_event,
    reference,
)
from tests.unit.call.events import NOW, SAMPLE, TRANSCRIPT, make_call, make_event, read, refusal


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
        assert event.payload == {"callSid": "c1", "a": ["x�y", "नम", "😀"], "n": None, "i": "123456789012345678901"}

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


def test_ids_fall_back_to_the_context_and_unknown_keys_of_the_payload_stay() -> None:
    merged = merge([make_event(contextDetails={"agentId": "a", "recipientData": {"k": 1}}, brandNew={"x": 1})])
    call = describe(merged)
    assert (call.agent_id, call.recipient_data, merged["brandNew"]) == ("a", {"k": 1}, {"x": 1})
