"""The sandbox's settings: what is read, what is refused, what changes."""

import pytest

from pipeline.sandbox.options import ANSWER_FAULTS, FAULTS, PRESETS, Options, OptionsError, checked, parse_faults


def test_faults_are_read_from_names_and_shares():
    assert parse_faults("500=0.02, reset_before=0.01,dup=1") == {"500": 0.02, "reset_before": 0.01, "dup": 1.0}


def test_a_preset_can_be_changed_by_what_follows_it():
    assert parse_faults("mild,dup=0.5") == PRESETS["mild"] | {"dup": 0.5}


def test_no_faults_are_read_from_none():
    assert parse_faults("none") == parse_faults("") == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    assert checked({"faults": preset}).faults == PRESETS[preset]


def test_every_kind_of_fault_is_named_once():
    assert set(ANSWER_FAULTS) < set(FAULTS)
    assert len(FAULTS) == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"faults": "wilder"}, "faults: 'wilder' is neither a preset (none, mild, wild) nor of the form name=share"),
        ({"faults": "500=often"}, "faults: the share of 500 is 'often'; it must be a number between 0 and 1"),
        ({"faults": {"500": 1.5}}, "faults: the share of 500 is 1.5; it must be between 0 and 1"),
        ({"faults": "500=0.6,503=0.6"}, "faults: the shares of the faults of an answer add up to more than 1"),
        (
            {"rate": "fast"},
            "rate: 'fast' is not a rate; write a whole number and a unit, such as 50/s, 600/m or 20000/h",
        ),
        (
            {"webhook": "https://x/y"},
            "webhook: 'https://x/y' is not an http:// URL (the sandbox speaks plain HTTP only)",
        ),
        ({"no_answer": 0.7, "busy": 0.5}, "no_answer, busy and failed add up to more than 1"),
        ({"spead": 1}, "spead: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_sentence(settings, message):
    with pytest.raises(OptionsError) as refusal:
        checked(settings)
    assert str(refusal.value) == message


def test_several_wrong_settings_are_all_named():
    with pytest.raises(OptionsError, match=r"^rate: .*; busy: "):
        checked({"rate": "0/s", "busy": 2})


def test_a_change_keeps_every_other_setting():
    options = checked({"seed": 7, "faults": "mild", "campaigns": ["a"]})

    changed = options.changed({"busy": 0.5, "no_answer": 0})

    assert changed == options.model_copy(update={"busy": 0.5, "no_answer": 0.0})
    assert options.busy == 0.05


def test_refusals_take_their_length_from_the_share_unless_told():
    assert Options().refusal_seconds == 0
    assert checked({"faults": "refused=0.25", "refuse_every_seconds": 8}).refusal_seconds == 2
    assert checked({"faults": "refused=0.25", "refuse_for_seconds": 0.5}).refusal_seconds == 0.5
