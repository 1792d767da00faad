"""What is remembered of ids, and for how long: time is told by hand."""

from __future__ import annotations

import pytest

from actors.session.request_ids import (
    EARLY_INTERRUPT_SECONDS,
    MAX_EARLY_INTERRUPTS,
    MAX_REMEMBERED_IDS,
    RequestIds,
)
from actors.words import InterruptReason

START = 1000.0  # of a clock that does not begin at zero
STOP, NEW_INPUT = InterruptReason.USER_STOP, InterruptReason.USER_NEW_INPUT


def test_a_new_memory_knows_nothing() -> None:
    memory = RequestIds()
    assert not memory.has_ended("r")
    assert memory.delivered("r") is None
    assert memory.take_early("r", START) is None


@pytest.mark.parametrize("delivered", [0, 7])
def test_an_id_that_has_ended_is_used_up_and_what_was_delivered_is_known(delivered: int) -> None:
    memory = RequestIds()
    memory.end("r", delivered)
    assert memory.has_ended("r")
    assert memory.delivered("r") == delivered


def test_an_id_that_was_refused_may_come_again_and_nothing_was_delivered() -> None:
    memory = RequestIds()
    memory.refuse("r")
    assert not memory.has_ended("r")
    assert memory.delivered("r") == 0


def test_an_id_that_was_refused_and_came_again_has_what_was_delivered_then() -> None:
    memory = RequestIds()
    memory.refuse("r")
    memory.end("r", 7)
    assert memory.delivered("r") == 7


def test_an_id_may_be_used_up_without_an_end_and_one_that_ended_stays_as_it_was() -> None:
    memory = RequestIds()
    memory.end("ended", 7)
    for request_id in ("ended", "r"):
        memory.use_up(request_id)
        assert memory.has_ended(request_id)
    assert (memory.delivered("ended"), memory.delivered("r")) == (7, 0)


def test_ids_that_are_used_up_count_among_the_last_thousand() -> None:
    memory = RequestIds()
    for number in range(MAX_REMEMBERED_IDS + 1):
        memory.use_up(f"r_{number}")
    assert [memory.has_ended(f"r_{number}") for number in range(2)] == [False, True]


def test_the_last_thousand_that_ended_are_remembered_and_as_many_refused_ones() -> None:
    memory = RequestIds()
    for number in range(MAX_REMEMBERED_IDS):
        memory.end(f"ended_{number}", number)
        memory.refuse(f"refused_{number}")
    memory.end("ended_0", 5)  # once more: it takes no second place
    assert memory.delivered("ended_0") == 5
    assert memory.delivered("refused_0") == 0
    memory.end("ended", 0)
    memory.refuse("refused")
    assert memory.delivered("ended_0") is memory.delivered("refused_0") is None
    assert memory.delivered("ended_1") == 1
    assert memory.delivered("refused_1") == 0


def test_an_early_interrupt_holds_for_one_request() -> None:
    memory = RequestIds()
    memory.interrupt_early("r", STOP, START)
    assert memory.delivered("r") is None  # it has not come
    assert memory._early_reason("r", START) is STOP
    assert memory._early_reason("other", START) is None
    assert memory.take_early("r", START) is STOP
    assert memory.take_early("r", START) is None


def test_an_early_interrupt_waits_for_so_long_and_no_longer() -> None:
    memory = RequestIds()
    memory.interrupt_early("r", STOP, START)
    assert memory._early_reason("r", START + EARLY_INTERRUPT_SECONDS) is STOP
    late = START + EARLY_INTERRUPT_SECONDS + 0.001
    assert memory._early_reason("r", late) is memory.take_early("r", late) is None
    assert memory._early_reason("r", START) is None  # what came too late has taken it along


def test_an_early_interrupt_that_is_said_again_counts_from_then() -> None:
    memory = RequestIds()
    memory.interrupt_early("r", STOP, START)
    memory.interrupt_early("r", NEW_INPUT, START + EARLY_INTERRUPT_SECONDS)
    assert memory.take_early("r", START + 2 * EARLY_INTERRUPT_SECONDS) is NEW_INPUT


def test_the_youngest_early_interrupts_wait_and_one_that_is_said_again_is_young() -> None:
    memory = RequestIds()
    for number in range(MAX_EARLY_INTERRUPTS):
        memory.interrupt_early(f"r_{number}", STOP, START)
    memory.interrupt_early("r_0", STOP, START)
    memory.interrupt_early("one more", STOP, START)
    waiting = [memory._early_reason(f"r_{number}", START) for number in range(3)]
    assert waiting == [STOP, None, STOP]
    assert memory._early_reason("one more", START) is STOP
