"""The transitions of the circuit breaker, with a clock that the tests set."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from llm.chat.breaker import Breaker, BreakerState, Trial

MAX_FAILURES = 3
OPEN_SECONDS = 30.0
CLOSED, OPEN, HALF_OPEN = BreakerState


class Now:
    """A clock that stands still until it is set, and does not begin at 0."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def breaker(now: Now) -> Breaker:
    return Breaker(MAX_FAILURES, OPEN_SECONDS, now)


def permit(breaker: Breaker) -> Trial:
    trial = breaker.trial()
    assert trial is not None, f"no permission: {breaker.state}"
    return trial


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        permit(breaker).failed()


def open_it(breaker: Breaker) -> None:
    fail(breaker, MAX_FAILURES)
    assert breaker.state is OPEN


def probe(breaker: Breaker, now: Now) -> Trial:
    """Open it, let its time pass, and return the permission of the probe."""
    open_it(breaker)
    now.seconds += OPEN_SECONDS
    trial = permit(breaker)
    assert breaker.state is HALF_OPEN
    return trial


def test_a_new_breaker_permits_every_generation(breaker: Breaker) -> None:
    assert breaker.state is CLOSED
    for _ in range(3 * MAX_FAILURES):
        permit(breaker)
    assert breaker.state is CLOSED


def test_it_opens_at_the_last_of_so_many_failures_in_a_row_and_not_before(breaker: Breaker) -> None:
    fail(breaker, MAX_FAILURES - 1)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN
    assert breaker.trial() is None


def test_one_failure_may_be_enough(now: Now) -> None:
    breaker = Breaker(1, OPEN_SECONDS, now)
    fail(breaker)
    assert breaker.trial() is None


def test_a_success_in_between_begins_the_count_again(breaker: Breaker) -> None:
    for _ in range(3):
        fail(breaker, MAX_FAILURES - 1)
        permit(breaker).succeeded()
    assert breaker.state is CLOSED
    fail(breaker, MAX_FAILURES - 1)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


def test_one_that_was_stopped_before_it_was_answered_neither_counts_nor_forgives(
    breaker: Breaker,
) -> None:
    fail(breaker, MAX_FAILURES - 1)
    permit(breaker).abandoned()
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN


def test_failures_of_those_that_were_let_in_together_count_too(breaker: Breaker) -> None:
    together = [permit(breaker) for _ in range(MAX_FAILURES)]
    for trial in together:
        trial.failed()
    assert breaker.state is OPEN


def test_it_stays_open_until_its_time_is_up_to_the_moment(breaker: Breaker, now: Now) -> None:
    open_it(breaker)
    now.seconds += OPEN_SECONDS - 0.001
    assert breaker.trial() is None
    assert breaker.state is OPEN
    now.seconds += 0.001
    assert breaker.trial() is not None


def test_when_its_time_is_up_exactly_one_tries(breaker: Breaker, now: Now) -> None:
    probe(breaker, now)
    assert [breaker.trial() for _ in range(5)] == [None] * 5
    now.seconds += 100 * OPEN_SECONDS  # however long that one takes
    assert breaker.trial() is None
    assert breaker.state is HALF_OPEN


def test_the_success_of_the_one_that_tries_closes_it(breaker: Breaker, now: Now) -> None:
    probe(breaker, now).succeeded()
    assert breaker.state is CLOSED
    fail(breaker, MAX_FAILURES - 1)  # the old failures are forgotten
    assert breaker.state is CLOSED


def test_the_failure_of_the_one_that_tries_opens_it_for_as_long_again(
    breaker: Breaker, now: Now
) -> None:
    trial = probe(breaker, now)
    now.seconds += 7  # counted from the failure, not from the try
    trial.failed()
    assert breaker.state is OPEN
    now.seconds += OPEN_SECONDS - 0.001
    assert breaker.trial() is None
    now.seconds += 0.001
    permit(breaker).succeeded()
    assert breaker.state is CLOSED


def test_when_the_one_that_tries_is_stopped_the_next_one_tries_at_once(
    breaker: Breaker, now: Now
) -> None:
    probe(breaker, now).abandoned()
    second = permit(breaker)
    assert breaker.state is HALF_OPEN
    assert breaker.trial() is None
    second.abandoned()
    permit(breaker).succeeded()
    assert breaker.state is CLOSED


@pytest.mark.parametrize("told", [Trial.failed, Trial.abandoned])
def test_those_from_before_it_opened_do_not_keep_it_open_longer(
    breaker: Breaker, now: Now, told: Callable[[Trial], None]
) -> None:
    late = [permit(breaker), permit(breaker)]
    open_it(breaker)
    now.seconds += OPEN_SECONDS - 1
    told(late[0])
    now.seconds += 1
    permit(breaker)
    told(late[1])
    assert breaker.state is HALF_OPEN  # nor do they speak for the one that tries


def test_one_from_before_it_opened_that_is_answered_closes_it(breaker: Breaker) -> None:
    late = permit(breaker)
    open_it(breaker)
    late.succeeded()
    assert breaker.state is CLOSED
    permit(breaker)


FIRST_TOLD: dict[str, tuple[Callable[[Trial], None], BreakerState]] = {
    "succeeded": (Trial.succeeded, CLOSED),
    "failed": (Trial.failed, OPEN),
    "abandoned": (Trial.abandoned, OPEN),
}


@pytest.mark.parametrize("first", FIRST_TOLD)
@pytest.mark.parametrize("second", FIRST_TOLD)
def test_only_the_first_word_of_one_that_tries_is_heard(
    breaker: Breaker, now: Now, first: str, second: str
) -> None:
    trial = probe(breaker, now)
    tell_first, state = FIRST_TOLD[first]
    tell_second, _ = FIRST_TOLD[second]
    tell_first(trial)
    assert breaker.state is state
    tell_second(trial)
    assert breaker.state is state


def test_a_generation_that_tells_of_its_failure_twice_counts_once(breaker: Breaker) -> None:
    trial = permit(breaker)
    for _ in range(MAX_FAILURES):
        trial.failed()
    assert breaker.state is CLOSED


def test_with_no_limit_of_failures_it_never_opens(now: Now) -> None:
    breaker = Breaker(0, OPEN_SECONDS, now)
    fail(breaker, 100)
    assert breaker.state is CLOSED


def test_with_no_time_to_stay_open_the_next_one_tries(now: Now) -> None:
    breaker = Breaker(1, 0.0, now)
    fail(breaker)
    trial = permit(breaker)
    assert breaker.trial() is None
    trial.failed()
    permit(breaker).succeeded()
    assert breaker.state is CLOSED


def test_its_clock_is_monotonic(monkeypatch: pytest.MonkeyPatch) -> None:
    breaker = Breaker(1, OPEN_SECONDS)
    before = time.monotonic()
    fail(breaker)
    assert before <= breaker._opened_at <= time.monotonic()
