"""Calls: their results, their events in time, and payloads of the integration guide's shape."""

import json
from collections import Counter
from datetime import UTC, datetime

import pytest

from pipeline.sandbox.calls import Lead, payload, plan
from pipeline.sandbox.decisions import decide
from pipeline.sandbox.options import checked

NOW = datetime(2026, 5, 8, 12, 0, tzinfo=UTC)
GUIDE = {
    "": ["callSid", "leadId", "campaignId", "agentId", "status", "telephonyData", "contextDetails", "transcript",
         "disposition", "extractedData"],
    "telephonyData": ["direction", "duration", "toNumber", "fromNumber", "recordingUrl", "hostedTelephony",
                      "providerCallId", "provider", "hangupBy", "hangupReason", "hangupProviderCode"],
    "contextDetails": ["recipientPhoneNumber", "recipientData", "leadId", "agentId", "campaignId"],
}  # fmt: skip
BEFORE_THE_END = {"initiated", "ringing", "in-progress"}
ENDS = {
    "connected": {"call-disconnected", "completed"},
    "no answer": {"no-answer", "no_answer", "completed"},
    "busy": {"busy", "completed"},
    "failed": {"failed", "call-failed"},
}


def make_lead(number=0, **overrides):
    phone = str(9_000_000_000 + number)
    decision = decide(1, "c1", phone, 1, {})
    values = {"lead_id": decision.lead_id, "campaign_id": "c1", "phone": phone, "seed": decision.call_seed}
    return Lead(**(values | {"data": {"customer_name": "Asha Rao", "place": "Pune"}} | overrides))


def planned(count=400, **settings):
    """The plans of many calls; each is a list of (seconds, event)."""
    options = checked(settings)
    return [plan(make_lead(number), options, NOW) for number in range(count)]


def events_of(plans):
    return [event for events in plans for _, event in events]


def test_every_lead_brings_a_call_that_ends_as_its_result_says():
    for events in planned():
        call = events[0][1].call
        assert set(call.statuses[:-2]) <= BEFORE_THE_END
        assert call.statuses[-1] in ENDS[call.result]


def test_results_come_in_their_shares():
    results = Counter(events[0][1].call.result for events in planned(2000, no_answer=0.3, busy=0.2, failed=0.1))
    assert results["no answer"] == pytest.approx(600, abs=90)
    assert results["busy"] == pytest.approx(400, abs=80)
    assert results["failed"] == pytest.approx(200, abs=60)
    assert results["connected"] == pytest.approx(800, abs=100)


def test_a_share_of_one_leaves_no_other_result():
    assert {e.call.result for e in events_of(planned(no_answer=1, busy=0, failed=0))} == {"no answer"}


def test_every_status_of_the_field_is_seen():
    assert {e.call.statuses[e.stage] for e in events_of(planned(2000))} == BEFORE_THE_END.union(*ENDS.values())


def test_a_life_cycle_can_be_whole_or_its_last_event_alone():
    whole = planned(no_answer=0, busy=0, failed=0, lifecycle="full")
    assert {tuple(e.call.statuses[:3]) for e in events_of(whole)} == {("initiated", "ringing", "in-progress")}
    assert {len(events) for events in whole} == {4, 5}
    assert {len(events) for events in planned(lifecycle="final")} == {1}
    assert {len(events) for events in planned(2000)} == {1, 2, 3, 4, 5}


def test_events_are_due_in_the_order_of_the_call_within_its_time():
    for events in planned(call_seconds=2):
        assert [event.stage for _, event in events] == list(range(len(events)))
        seconds = [due for due, _ in events]
        assert seconds == sorted(seconds)
        assert 1 <= seconds[-1] <= 3


def test_the_same_lead_brings_the_same_events_and_bytes():
    settings = {"faults": "dup=0.5,late=0.2,reorder=0.5,malformed_webhook=0.3"}
    first, second = planned(50, **settings), planned(50, **settings)
    assert [[due for due, _ in events] for events in first] == [[due for due, _ in events] for events in second]
    assert [event.body() for event in events_of(first)] == [event.body() for event in events_of(second)]


def test_a_payload_has_exactly_the_keys_of_the_guide_when_nothing_drifts():
    for event in events_of(planned(drift=False)):
        content = payload(event.call, event.stage)
        assert list(content) == GUIDE[""]
        assert list(content["telephonyData"]) == GUIDE["telephonyData"]
        assert list(content["contextDetails"]) == GUIDE["contextDetails"]


def test_a_payload_says_who_was_called():
    lead = make_lead()
    [(_, event)] = plan(lead, checked({"drift": False, "lifecycle": "final"}), NOW)
    content = json.loads(event.body())
    assert content["leadId"] == content["contextDetails"]["leadId"] == lead.lead_id
    assert content["campaignId"] == content["contextDetails"]["campaignId"] == "c1"
    assert content["contextDetails"]["recipientData"] == {"customer_name": "Asha Rao", "place": "Pune"}
    assert content["telephonyData"]["toNumber"] == content["contextDetails"]["recipientPhoneNumber"] == "+919000000000"


def test_only_a_call_that_connected_has_words_and_a_duration():
    for event in events_of(planned(drift=False)):
        content = payload(event.call, event.stage)
        spoke = event.call.result == "connected" and content["status"] not in BEFORE_THE_END
        assert bool(content["transcript"]) is spoke
        assert (float(content["telephonyData"]["duration"]) > 0) is spoke
        last = event.stage == len(event.call.statuses) - 1
        assert (content["extractedData"] is not None) is (spoke and last)
        assert bool(content["telephonyData"]["recordingUrl"]) is (spoke and last)


def test_conversations_vary_and_have_the_name_in_them():
    events = events_of(planned(failed=0, busy=0, no_answer=0))
    said = [transcript for event in events if (transcript := payload(event.call, event.stage).get("transcript"))]
    assert all("Asha Rao" in transcript for transcript in said)
    assert len(set(said)) > 100
    labels = {transcript.partition(":")[0] for transcript in said}
    assert {"assistant", "Assistant", "ASSISTANT", "सहायक"} < labels
    assert any("नमस्ते" in transcript for transcript in said)
    assert any(":" not in line for transcript in said for line in transcript.splitlines()), "no turn spans lines"


def test_dispositions_vary_in_case_and_kind():
    dispositions = {payload(e.call, e.stage).get("disposition") for e in events_of(planned(2000))}
    assert {
        "Interested",
        "interested",
        "Not Interested",
        "Callback",
        "Busy",
        "No Answer",
        "Wrong Number",
    } < dispositions


def test_a_callback_is_promised_for_the_day_after_the_call():
    times = {
        payload(e.call, e.stage)["extractedData"]["callback_date_time"]
        for e in events_of(planned(drift=False, lifecycle="final", no_answer=0, busy=0, failed=0))
    }
    assert times == {
        None, "2026-05-09T15:00:00+05:30", "2026-05-09 15:00", "2026-05-09T09:30:00.000Z", "tomorrow after lunch",
    }  # fmt: skip


def test_drift_changes_types_and_keys_but_never_hides_whose_call_it_was():
    kinds, forms, missing, unknown = set(), set(), set(), set()
    for event in events_of(planned(2000)):
        content, lead = payload(event.call, event.stage), event.call.lead
        assert lead.lead_id in {content.get("leadId"), content["contextDetails"].get("leadId")}
        assert content["telephonyData"]["toNumber"] == f"+91{lead.phone}"
        kinds.add(type(content["telephonyData"]["duration"]))
        forms.add(content["contextDetails"]["recipientPhoneNumber"].removesuffix(lead.phone))
        missing |= set(GUIDE[""]) - set(content)
        unknown |= set(content) - set(GUIDE[""])
    assert kinds == {str, int, float}
    assert forms == {"", "0", "+91"}
    assert missing == {"leadId", "agentId", "transcript", "extractedData"}
    assert unknown == {"attemptNumber", "workspaceId"}


def test_a_duplicate_is_the_same_bytes_again():
    for events in planned(faults={"dup": 1}):
        bodies = Counter(event.body() for _, event in events)
        assert set(bodies.values()) == {2}
        assert Counter(event.kind for _, event in events) == {"event": len(bodies), "duplicate": len(bodies)}


def test_reordered_calls_bring_their_events_in_another_order():
    for events in planned(faults={"reorder": 1}):
        stages = [event.stage for _, event in events]
        assert sorted(stages) == list(range(len(stages)))
        assert stages != sorted(stages) or len(stages) == 1


def test_late_events_come_that_much_later():
    on_time, late = planned(), planned(faults={"late": 1}, late_seconds=60)
    assert [due + 60 for events in on_time for due, _ in events] == [due for events in late for due, _ in events]


def test_a_malformed_copy_comes_beside_the_good_event():
    for events in planned(100, faults={"malformed_webhook": 1}):
        good = {event.stage for _, event in events if event.kind == "event"}
        broken = [event for _, event in events if event.kind == "malformed"]
        assert good == {event.stage for event in broken} == set(range(len(broken)))
        for event in broken:
            with pytest.raises(ValueError, match=r"(?s)."):
                json.loads(event.body())


def test_lost_events_are_settled_before_they_start():
    assert {event.outcome for event in events_of(planned(faults={"lost": 1}))} == {"lost"}


@pytest.mark.parametrize("data", [{}, {"customer_name": None}, {"customer_name": "{agent} 100%"}, {"name": "रवि"}])
def test_any_recipient_data_can_be_called(data):
    for events in (plan(make_lead(n, data=data), checked({"faults": "wild"}), NOW) for n in range(50)):
        for _, event in events:
            assert isinstance(event.body(), bytes)
