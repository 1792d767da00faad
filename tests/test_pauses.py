"""Pauses of the process, and time limits that do not count them.

A pause is made by a sleep that is not gevent's: the loop stands still, as it does under SIGSTOP.
`test_sigstop.py` stops a whole daemon.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import gevent
import gevent.event
import gevent.hub
import gevent.monkey
import gevent.socket
import pytest

from actors.loop.lanes import Lanes, PlainLanes, lanes
from actors.loop.limit import Limit
from actors.loop.pauses import BEAT_SECONDS, MIN_PAUSE_SECONDS, Pauses

PATIENCE_SECONDS = 5.0
"""Bounds a failure, and nothing else."""

stand_still: Callable[[float], None] = gevent.monkey.get_original("time", "sleep")
"""Stop the loop for so many seconds."""

PAUSE_SECONDS = MIN_PAUSE_SECONDS + 0.1


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pauses(clock: Clock) -> Pauses:
    return Pauses(clock)


# What is a pause ---------------------------------------------------------------------------------


def test_time_with_a_beat_now_and_then_is_no_pause(clock: Clock, pauses: Pauses) -> None:
    for _ in range(100):
        clock.now += BEAT_SECONDS * 3
        pauses.beat()
    assert (pauses.total_seconds, pauses.seconds_between(0.0, clock.now)) == (0.0, 0.0)


@pytest.mark.parametrize("seconds", [MIN_PAUSE_SECONDS, 2.5, 10.0, 3600.0])
def test_a_late_beat_is_a_pause(clock: Clock, pauses: Pauses, seconds: float) -> None:
    began = clock.now
    clock.now += seconds
    pauses.beat()
    assert pauses.total_seconds == pauses.seconds_between(began, clock.now) == seconds


def test_a_pause_is_known_before_the_first_beat_after_it(clock: Clock, pauses: Pauses) -> None:
    began = clock.now
    clock.now += 10
    assert pauses.seconds_between(began, clock.now) == 10
    clock.now += 10
    assert pauses.total_seconds == 20


def test_only_what_comes_after_a_moment_counts_for_it(clock: Clock, pauses: Pauses) -> None:
    began = clock.now
    clock.now += 10
    pauses.beat()
    clock.now += 0.5
    after = clock.now
    pauses.beat()
    clock.now += 20
    pauses.beat()
    assert pauses.seconds_between(began - 100, clock.now) == 30
    assert pauses.seconds_between(began + 4, clock.now) == 26  # in the middle of the first
    assert pauses.seconds_between(after, clock.now) == 20
    assert pauses.seconds_between(clock.now, clock.now) == 0
    assert pauses.seconds_between(math.inf, clock.now) == 0
    assert pauses.seconds_between(began, began + 6) == 6
    assert pauses.seconds_between(began - 100, began - 10) == 0


def test_a_bounded_number_of_pauses_is_remembered_the_latest_ones(
    clock: Clock, pauses: Pauses
) -> None:
    began = clock.now
    for _ in range(100):
        clock.now += 2
        pauses.beat()
    assert pauses.total_seconds == 200
    assert pauses.seconds_between(clock.now - 20, clock.now) == 20
    assert 100 <= pauses.seconds_between(began, clock.now) < 200


def test_the_loop_beats_by_itself_and_a_stall_of_it_is_a_pause() -> None:
    before = time.monotonic()
    gevent.sleep(BEAT_SECONDS * 2)
    assert lanes().pauses.seconds_between(before, time.monotonic()) == 0
    stand_still(PAUSE_SECONDS)
    assert lanes().pauses.seconds_between(before, time.monotonic()) >= PAUSE_SECONDS


# A limit -----------------------------------------------------------------------------------------


class Watch:
    """A limit, and when it passed."""

    def __init__(self, seconds: float, of: Lanes | None = None) -> None:
        self.passed = gevent.event.Event()
        self.times: list[float] = []
        self.limit: Limit = (of or lanes()).limit(seconds, self._note, "argument")
        self.began = time.monotonic()
        self.limit.start()

    def _note(self, argument: str) -> None:
        assert argument == "argument"
        assert gevent.getcurrent() is gevent.get_hub()
        self.times.append(time.monotonic())
        self.passed.set()

    def wait(self) -> float:
        """Until it has passed; returns how many seconds after its start."""
        assert self.passed.wait(PATIENCE_SECONDS)
        [at] = self.times
        return at - self.began


@pytest.fixture(params=[Lanes, PlainLanes])
def of(request: pytest.FixtureRequest) -> Lanes:
    """The lanes of this loop, and those of a loop without priorities."""
    made: Lanes = lanes() if request.param is type(lanes()) else request.param()
    return made


def test_a_limit_passes_once_after_its_time(of: Lanes) -> None:
    watch = Watch(0.05, of)
    assert 0.05 <= watch.wait() < 1
    gevent.sleep(0.1)
    assert len(watch.times) == 1


def test_a_limit_of_zero_is_none_and_one_that_is_stopped_never_passes(of: Lanes) -> None:
    never, stopped = Watch(0, of), Watch(0.02, of)
    stopped.limit.stop()
    stopped.limit.stop()
    Watch(0.05, of).wait()
    assert never.times == stopped.times == []


def test_a_limit_that_is_stopped_while_it_looks_does_not_pass(of: Lanes) -> None:
    watch = Watch(0.02, of)
    fired = gevent.event.Event()
    look = watch.limit._look

    def stop_then_look(function: Callable[[], object]) -> None:
        look(function)
        watch.limit.stop()
        fired.set()

    watch.limit._look = stop_then_look
    assert fired.wait(PATIENCE_SECONDS)
    Watch(0.02, of).wait()
    assert watch.times == []


def test_progress_moves_a_limit(of: Lanes) -> None:
    watch = Watch(0.1, of)
    for _ in range(10):
        gevent.sleep(0.03)
        watch.limit.since = time.monotonic()
    assert watch.wait() >= 0.4


def test_a_limit_does_not_pass_while_the_peer_has_nothing_to_do(of: Lanes) -> None:
    watch = Watch(0.02, of)
    watch.limit.since = math.inf
    for _ in range(3):
        Watch(0.02, of).wait()
    assert watch.times == []
    watch.limit.since = time.monotonic()
    watch.wait()


@pytest.mark.parametrize("before", [0.0, 0.1, 0.25])
def test_a_pause_does_not_count_and_what_was_left_before_it_is_left_after_it(
    of: Lanes, before: float
) -> None:
    watch = Watch(0.3, of)
    if before:
        gevent.sleep(before)
    stand_still(PAUSE_SECONDS)
    seconds = watch.wait()
    assert PAUSE_SECONDS + 0.3 <= seconds <= PAUSE_SECONDS + 0.3 + BEAT_SECONDS + 0.6


def test_a_limit_that_passed_before_the_pause_has_passed(of: Lanes) -> None:
    watch = Watch(0.02, of)
    watch.wait()
    stand_still(PAUSE_SECONDS)
    assert len(watch.times) == 1


def test_silence_after_a_pause_ends_as_any_silence_does(of: Lanes) -> None:
    stand_still(PAUSE_SECONDS)
    assert Watch(0.05, of).wait() < 1


def test_what_only_control_can_meet_does_not_wait_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, data_passed = gevent.event.Event(), gevent.event.Event()
    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "_queue_after_reads", lambda *_: None)  # data is never reached
        lanes().limit(0.01, data_passed.set).start()
        lanes().control_limit(0.02, passed.set).start()
        assert passed.wait(PATIENCE_SECONDS)
    assert not data_passed.is_set()


# What has arrived is read first ------------------------------------------------------------------


def test_what_decides_about_peers_runs_behind_every_reader_that_has_something_to_read() -> None:
    """Many readers, each of which takes longer than a slice."""
    pairs = [gevent.socket.socketpair() for _ in range(20)]
    order: list[str] = []

    def read(sock: gevent.socket.socket) -> None:
        readable = lanes().readable(sock.fileno())
        readable.wait()
        readable.close()
        until = time.monotonic() + 0.001
        while time.monotonic() < until:
            pass
        order.append("read")

    readers = [gevent.spawn(read, mine) for mine, _ in pairs]
    gevent.sleep(0)
    decided = gevent.event.Event()

    def decide() -> None:
        order.append("decided")
        decided.set()

    lanes().run_after_reads(decide)
    for _, theirs in pairs:
        theirs.send(b"x")
    assert decided.wait(PATIENCE_SECONDS)
    gevent.joinall(readers, PATIENCE_SECONDS, raise_error=True)
    assert order == ["read"] * 20 + ["decided"]
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_a_greenlet_can_wait_for_that(of: Lanes) -> None:
    mine, theirs = gevent.socket.socketpair()
    got: list[bytes] = []

    def read() -> None:
        readable = of.readable(mine.fileno())
        readable.wait()
        readable.close()
        got.append(mine.recv(10))

    reader = gevent.spawn(read)
    gevent.sleep(0)
    theirs.send(b"x")
    of.wait_reads()
    assert got == [b"x"]
    reader.join()
    mine.close()
    theirs.close()


@pytest.mark.parametrize("seconds", [0.1, 0.5, PAUSE_SECONDS])
def test_what_waits_in_the_kernel_when_the_timer_fires_is_progress(
    of: Lanes, seconds: float
) -> None:
    """After stalls that are pauses, and after such that are too short for that."""
    mine, theirs = gevent.socket.socketpair()
    watch = Watch(0.05, of)

    def read() -> None:
        readable = of.readable(mine.fileno())
        while True:
            readable.wait()
            if not mine.recv(10):
                readable.close()
                return
            watch.limit.since = time.monotonic()

    reader = gevent.spawn(read)
    gevent.sleep(0)
    theirs.send(b"x")
    stand_still(seconds)
    assert watch.wait() >= seconds + 0.05
    theirs.close()
    reader.join()
    mine.close()
