"""A rate that may be exceeded for a moment."""

from __future__ import annotations

import pytest

from gateway.server.pace import MAX_SECONDS, Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_burst_is_free_and_the_rest_is_made_up_for(clock: Clock) -> None:
    pace = Pace(10, 5, clock)
    assert [pace.take(1) for _ in range(7)] == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2])
    clock.now += 0.2
    assert pace.take(0) == 0
    assert pace.take(3) == pytest.approx(0.3)


def test_a_long_pause_earns_one_burst_and_no_more(clock: Clock) -> None:
    pace = Pace(10, 5, clock)
    clock.now += 3600
    assert pace.take(5) == 0
    assert pace.take(1) == pytest.approx(0.1)


@pytest.mark.parametrize(("count", "seconds"), [(5, 0), (6, 0.1), (14, 0.9), (500, MAX_SECONDS)])
def test_many_at_once_take_as_long_as_one_by_one(clock: Clock, count: int, seconds: float) -> None:
    assert Pace(10, 5, clock).take(count) == pytest.approx(seconds)


def test_what_is_owed_is_bounded(clock: Clock) -> None:
    pace = Pace(10, 5, clock)
    for _ in range(100):
        assert pace.take(10) <= MAX_SECONDS
    clock.now += MAX_SECONDS
    assert pace.take(0) == 0
