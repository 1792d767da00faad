"""A session's time, told by hand: what is due when, and how signs of life put it off."""

from __future__ import annotations

import math

import pytest

from actors.session.lifetime import Due, Lifetime

START = 1000.0  # of a clock that does not begin at zero


def run(life: Lifetime, until: float) -> list[tuple[float, Due]]:
    """Ask exactly when it wants to be asked, up to a time; what came, at seconds after START."""
    came: list[tuple[float, Due]] = []
    for _ in range(10_000):
        at = life.next_at
        if at > START + until:
            return came
        now_due = life.due(at)
        assert now_due, f"nothing is due at {at}, which it asked for"
        came += [(at - START, due) for due in now_due]
        if Due.END in now_due:
            return came
    raise AssertionError("it never comes to an end")


def of(kind: Due, came: list[tuple[float, Due]]) -> list[float]:
    return [at for at, due in came if due is kind]


def test_an_hour_has_a_heartbeat_every_thirty_seconds_one_warning_and_an_end() -> None:
    came = run(Lifetime(3600, 30, START), 10_000)
    assert of(Due.HEARTBEAT, came) == [30.0 * number for number in range(1, 120)]
    assert of(Due.WARNING, came) == [3300.0]
    assert of(Due.END, came) == [3600.0]
    assert came[-1] == (3600.0, Due.END)


@pytest.mark.parametrize(
    ("timeout", "warned_at"),
    [(3600, 3300), (700, 400), (601, 301), (600, 300), (599, 299.5), (60, 30), (1, 0.5)],
)
def test_the_warning_comes_300_seconds_before_the_end_or_at_half_of_a_short_time(
    timeout: float, warned_at: float
) -> None:
    came = run(Lifetime(timeout, 0, START), 10_000)
    assert came == [(warned_at, Due.WARNING), (timeout, Due.END)]


def test_what_is_due_at_the_same_time_comes_together() -> None:
    assert set(Lifetime(60, 30, START).due(START + 30)) == {Due.HEARTBEAT, Due.WARNING}


def test_nothing_is_due_before_its_time_and_nothing_twice() -> None:
    life = Lifetime(3600, 30, START)
    assert life.next_at == START + 30
    assert life.due(START) == []
    assert life.due(START + 29.999) == []
    assert life.due(START + 30) == [Due.HEARTBEAT]
    assert life.due(START + 30) == []
    assert life.next_at == START + 60
    life = Lifetime(3600, 0, START)
    assert life.next_at == START + 3300
    assert life.due(START + 3299.999) == []
    assert life.due(START + 3300) == [Due.WARNING]
    assert life.due(START + 3300) == []
    assert life.due(START + 3599.999) == []
    assert life.next_at == START + 3600
    assert life.due(START + 3600) == [Due.END]


def test_a_sign_of_life_puts_off_the_end_by_the_whole_time() -> None:
    life = Lifetime(3600, 0, START)
    life.renew(START + 3000)
    assert life.remaining_seconds(START + 3000) == 3600
    assert run(life, 10_000) == [(6300.0, Due.WARNING), (6600.0, Due.END)]


def test_a_session_that_is_renewed_for_ever_never_ends() -> None:
    life = Lifetime(60, 0, START)
    now = START
    for _ in range(1000):
        now += 29
        assert life.due(now) == []
        life.renew(now)


def test_the_warning_may_come_again_after_a_sign_of_life() -> None:
    life = Lifetime(3600, 0, START)
    assert life.due(START + 3300) == [Due.WARNING]
    life.renew(START + 3400)
    assert life.due(START + 3600) == []
    assert run(life, 10_000) == [(6700.0, Due.WARNING), (7000.0, Due.END)]


def test_a_sign_of_life_changes_no_heartbeat_and_a_heartbeat_is_none() -> None:
    life = Lifetime(3600, 30, START)
    life.renew(START + 29)
    assert life.due(START + 30) == [Due.HEARTBEAT]
    assert life.remaining_seconds(START + 30) == 3599


def test_a_sign_of_life_never_makes_the_next_thing_come_sooner() -> None:
    # The timer that runs is not set anew when a client gives a sign of life.
    for timeout in (1, 60, 599, 600, 601, 3600):
        life = Lifetime(timeout, 0, START)
        for part in range(1, 20):
            now = START + timeout * part / 20
            life.due(now)
            before = life.next_at
            renewed = Lifetime(timeout, 0, START)
            renewed.due(now)
            renewed.renew(now)
            assert renewed.next_at >= before


def test_heartbeats_that_were_missed_are_not_made_up_for() -> None:
    life = Lifetime(3600, 30, START)
    assert life.due(START + 200) == [Due.HEARTBEAT]
    assert life.due(START + 201) == []
    assert life.next_at == START + 230


def test_at_the_end_there_is_nothing_but_the_end() -> None:
    assert Lifetime(3600, 30, START).due(START + 3600) == [Due.END]
    assert Lifetime(3600, 30, START).due(START + 99_999) == [Due.END]


def test_remaining_seconds_are_whole_and_never_less_than_none() -> None:
    life = Lifetime(3600, 30, START)
    assert life.remaining_seconds(START) == 3600
    assert life.remaining_seconds(START + 0.001) == 3600
    assert life.remaining_seconds(START + 1) == 3599
    assert life.remaining_seconds(START + 3599.5) == 1
    assert life.remaining_seconds(START + 3600) == 0
    assert life.remaining_seconds(START + 4000) == 0
    assert isinstance(life.remaining_seconds(START + 0.5), int)


def test_without_a_timeout_it_never_ends_and_never_warns() -> None:
    life = Lifetime(0, 30, START)
    assert life.due(START + 1e9) == [Due.HEARTBEAT]
    assert life.remaining_seconds(START + 1e9) == 0
    life.renew(START + 1e9)
    assert life.remaining_seconds(START + 1e9) == 0
    assert math.isfinite(life.next_at)


def test_without_a_heartbeat_there_is_none() -> None:
    assert of(Due.HEARTBEAT, run(Lifetime(3600, 0, START), 10_000)) == []


def test_with_neither_there_is_nothing_to_wait_for() -> None:
    life = Lifetime(0, 0, START)
    assert life.next_at == math.inf
    assert life.due(START + 1e9) == []
