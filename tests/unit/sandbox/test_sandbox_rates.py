"""The sandbox's rate limit and its busiest second, with the time given."""

import pytest

from pipeline.sandbox.rates import BusiestSecond, Rate, SlidingWindow, parse_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [("50/s", Rate(50, 1)), (" 600 / m ", Rate(600, 60)), ("20000/h", Rate(20000, 3600))],
)
def test_a_rate_is_read(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "50", "0/s", "-1/s", "1.5/s", "5/d", "5/s/s"])
def test_what_is_not_a_rate_is_refused(text):
    with pytest.raises(ValueError, match="is not a rate"):
        parse_rate(text)


def test_a_window_admits_its_limit_and_says_when_the_next_fits():
    window = SlidingWindow(Rate(2, 1))
    for now in (10.0, 10.25):
        assert window.wait_seconds(now) == 0
        window.admit(now)

    assert window.wait_seconds(10.5) == 0.5
    assert window.wait_seconds(11.0) == 0


def test_asking_costs_nothing():
    window = SlidingWindow(Rate(1, 1))
    window.admit(10.0)
    assert [window.wait_seconds(10.5) for _ in range(3)] == [0.5, 0.5, 0.5]


def test_the_busiest_second_is_found_across_the_borders_of_clock_seconds():
    busiest = BusiestSecond()
    for now in (0.0, 0.75, 1.25, 1.5, 3.0):
        busiest.note(now)
    assert busiest.most == 3


def test_occurrences_exactly_a_second_apart_are_in_different_seconds():
    busiest = BusiestSecond()
    for now in (0.0, 1.0, 2.0):
        busiest.note(now)
    assert busiest.most == 1
