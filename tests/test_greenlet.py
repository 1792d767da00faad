"""Actors on greenlets: one way to die, whatever is thrown at them."""

import contextlib
import time
from typing import Any

import gevent
import gevent.event
import gevent.queue
import pykka
import pytest
from structlog.testing import capture_logs

from actors.actor import ActorFailedError, GreenletActor, Timer, tell
from actors.loop.lanes import lanes
from metrics.logs import get_logger

LIMIT = 5.0  # seconds; bounds a failure, and no success waits for it

ERRORS = [
    ValueError("broken"),
    gevent.Timeout(60),
    SystemExit(3),
    KeyboardInterrupt(),
    gevent.GreenletExit(),
]
any_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


class Probe(GreenletActor):
    """Raises every exception that it is sent; tells what happened to it in its diary."""

    def __init__(
        self,
        *,
        fail_opening: BaseException | None = None,
        fail_closing: BaseException | None = None,
    ) -> None:
        super().__init__()
        self.diary: gevent.queue.SimpleQueue[Any] = gevent.queue.SimpleQueue()
        self._fail_opening = fail_opening
        self._fail_closing = fail_closing

    def opened(self) -> None:
        self.diary.put("opened")
        if self._fail_opening is not None:
            raise self._fail_opening

    def handle(self, message: Any) -> Any:
        if isinstance(message, BaseException):
            raise message
        self.diary.put(message)
        return f"answer to {message}"

    def closed(self, error: BaseException | None) -> None:
        self.diary.put(("closed", error))
        if self._fail_closing is not None:
            raise self._fail_closing


class Running:
    """A started probe, with what it wrote down."""

    def __init__(self, **arguments: Any) -> None:
        self._probes: list[Probe] = []

        class Registered(Probe):
            def __init__(probe) -> None:  # noqa: N805 - `self` is ours
                super().__init__(**arguments)
                self._probes.append(probe)

        self.ref = Registered.start()
        self.probe = self._probes[0]

    def next(self) -> Any:
        """What it wrote next."""
        return self.probe.diary.get(timeout=LIMIT)

    def rest(self) -> list[Any]:
        """What it wrote after that and before now."""
        found = []
        with contextlib.suppress(gevent.queue.Empty):
            while True:
                found.append(self.probe.diary.get_nowait())
        return found

    @property
    def is_registered(self) -> bool:
        return pykka.ActorRegistry.get_by_urn(self.ref.actor_urn) is not None


pytestmark = pytest.mark.usefixtures("no_actor_left")


def test_an_actor_that_is_told_to_stop_handles_what_was_sent_before_and_closes_once() -> None:
    running = Running()
    tell(running.ref, "one")
    running.ref.stop(timeout=LIMIT)
    assert running.rest() == ["opened", "one", ("closed", None)]
    assert not running.is_registered


@any_error
def test_an_error_in_opened_closes_the_actor_with_that_error(error: BaseException) -> None:
    running = Running(fail_opening=error)
    assert tell(running.ref, "too late")  # it waits in the mailbox of one who will never open it
    assert running.next() == "opened"
    assert running.next() == ("closed", error)
    assert not tell(running.ref, "later still")
    assert not running.is_registered
    assert running.rest() == []


@any_error
def test_an_error_in_handle_closes_the_actor_with_that_error(error: BaseException) -> None:
    running = Running()
    tell(running.ref, error)
    tell(running.ref, "too late")
    assert [running.next(), running.next()] == ["opened", ("closed", error)]
    assert not tell(running.ref, "later still")
    assert not running.is_registered
    assert running.rest() == []


@pytest.mark.parametrize("is_broken", [False, True])
def test_an_actor_that_fails_is_logged_with_where_it_failed_and_whose_it_was(
    is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(_probe: Probe, _now: float) -> dict[str, Any]:
        if is_broken:
            raise RuntimeError
        return {"session_id": "sess_1", "request_id": "req_1", "state": "streaming"}

    monkeypatch.setattr(Probe, "describe", describe)
    error = ValueError("broken")
    lanes().wait_deferred()  # lines are written later, those of the tests before, too
    with capture_logs() as lines:
        running = Running()
        tell(running.ref, error)
        assert [running.next(), running.next()] == ["opened", ("closed", error)]
        lanes().wait_deferred()
    (line,) = lines
    assert line["event"] == "Actor failed"
    assert line["exc_info"] is error
    ids = {} if is_broken else {"session_id": "sess_1", "request_id": "req_1"}
    assert {name: line[name] for name in ("session_id", "request_id") if name in line} == ids


def test_its_failure_is_logged_behind_what_it_came_of() -> None:
    running = Running()
    assert running.next() == "opened"
    lanes().wait_deferred()
    with capture_logs() as lines:
        lanes().run_deferred(get_logger("WS").info, "Received message")
        tell(running.ref, ValueError("broken"))
        assert running.ref.actor_stopped.wait(LIMIT)
        lanes().wait_deferred()
    assert [line["event"] for line in lines] == ["Received message", "Actor failed"]


@any_error
def test_an_error_during_ask_reaches_the_asker_and_closes_the_actor(error: BaseException) -> None:
    running = Running()
    answer = running.ref.ask(error, block=False)
    tell(running.ref, "too late")
    with pytest.raises(ActorFailedError) as failure:
        answer.get(timeout=LIMIT)
    assert failure.value.__cause__ is error
    running.ref.actor_stopped.wait(LIMIT)
    assert running.rest() == ["opened", ("closed", error)]
    assert not tell(running.ref, "later still")
    assert not running.is_registered


@any_error
def test_an_error_in_closed_after_a_stop_escapes_to_nobody(error: BaseException) -> None:
    running, bystander = Running(fail_closing=error), Running()
    assert running.ref.stop(timeout=LIMIT)
    assert running.rest() == ["opened", ("closed", None)]
    assert not running.is_registered
    assert bystander.ref.ask("alive?", timeout=LIMIT) == "answer to alive?"


@any_error
def test_an_error_in_closed_after_a_failure_does_not_close_twice(error: BaseException) -> None:
    first = ValueError("first")
    running = Running(fail_closing=error)
    tell(running.ref, first)
    running.ref.actor_stopped.wait(LIMIT)
    assert running.rest() == ["opened", ("closed", first)]
    assert not running.is_registered


@any_error
def test_other_actors_live_on_when_one_fails(error: BaseException) -> None:
    bystander = Running()
    failing = [Running(fail_opening=error), Running(), Running(fail_closing=error)]
    for running in failing:
        tell(running.ref, error)
    with pytest.raises(ActorFailedError):
        Running().ref.ask(error, timeout=LIMIT)
    for running in failing:
        running.ref.actor_stopped.wait(LIMIT)
        assert not running.ref.is_alive()
    assert bystander.ref.ask("alive?", timeout=LIMIT) == "answer to alive?"
    assert bystander.ref.is_alive()


def test_a_question_that_waits_behind_a_failure_is_answered_by_an_error_and_not_by_silence() -> (
    None
):
    running = Running()
    tell(running.ref, ValueError("broken"))
    with pytest.raises(pykka.ActorDeadError):
        running.ref.ask("anybody?", timeout=LIMIT)


def test_an_actor_may_end_itself_from_a_handler_and_handles_what_was_there() -> None:
    class Quitter(Probe):
        def handle(self, message: Any) -> Any:
            if message == "quit":
                self.stop()
            return super().handle(message)

    ref = Quitter.start()
    tell(ref, "quit")
    tell(ref, "behind")
    answer = ref.ask("last", block=False)
    assert answer.get(timeout=LIMIT) == "answer to last"
    assert ref.actor_stopped.wait(LIMIT)


def test_a_message_to_someone_who_has_ended_is_no_error() -> None:
    running = Running()
    assert tell(running.ref, "one") is True
    running.ref.stop(timeout=LIMIT)
    assert tell(running.ref, "two") is False
    assert running.rest() == ["opened", "one", ("closed", None)]


def test_an_actor_takes_a_greenlet_and_no_thread() -> None:
    where: list[Any] = []

    class Where(GreenletActor):
        def handle(self, message: Any) -> Any:
            where.append(gevent.getcurrent())

    Where.start().ask("here", timeout=LIMIT)
    assert isinstance(where[0], gevent.Greenlet)
    assert where[0].parent is gevent.get_hub()


def test_a_timer_puts_its_message_in_the_mailbox_when_its_time_has_come() -> None:
    running = Running()
    began = time.monotonic()
    Timer(0.02, running.ref, "now")
    assert [running.next(), running.next()] == ["opened", "now"]
    assert time.monotonic() - began >= 0.015
    assert running.rest() == []


def test_a_timer_that_was_cancelled_sends_nothing() -> None:
    running = Running()
    cancelled = Timer(0.01, running.ref, "cancelled")
    Timer(0.02, running.ref, "kept")
    cancelled.cancel()
    assert [running.next(), running.next()] == ["opened", "kept"]


def test_a_timer_may_be_cancelled_twice_and_after_it_has_fired() -> None:
    running = Running()
    timer = Timer(0.001, running.ref, "now")
    assert [running.next(), running.next()] == ["opened", "now"]
    timer.cancel()
    timer.cancel()
    assert running.ref.ask("alive?", timeout=LIMIT) == "answer to alive?"


def test_a_timer_that_outlives_its_actor_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    ended, alive = Running(), Running()
    Timer(0.001, ended.ref, "too late")
    Timer(0.002, alive.ref, "now")
    ended.ref.stop(timeout=LIMIT)
    assert [alive.next(), alive.next()] == ["opened", "now"]
    assert ended.rest() == ["opened", ("closed", None)]
    assert "Traceback" not in capfd.readouterr().err  # where the hub would report it
