"""The drain: what is live may finish, nothing new begins, the clients go one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeAlias

import gevent
import gevent.event
import gevent.pool
import pytest
from structlog.testing import capture_logs

from actors.actor import GreenletActor, tell
from actors.messages import (
    Census,
    Drain,
    EndSession,
    GenerationEnded,
    Leave,
    RequestClosed,
    SessionEnded,
    SessionStarted,
    ShutDown,
)
from actors.session.messages import ConnectionLost, PauseIsOver
from actors.session.request_ids import EARLY_INTERRUPT_SECONDS
from actors.session.session import SessionActor
from gateway.app import Gateway
from gateway.settings.settings import Settings
from gateway.wire.frames import (
    ApiKeyAuth,
    FunctionResult,
    Register,
    Request,
    RequestContent,
    Shutdown,
)
from tests.fakes import LIMIT
from tests.fakes import Clock as SessionClock
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.test_run import health, provider_arguments
from tests.test_session import FakeOutbox, VoiceReceived, call, stuck
from tests.test_session import Given as GivenSession
from tests.test_supervisor import NONSENSE, Entry, Mailbox
from tests.test_supervisor import Given as GivenSupervisor

MakeGateway: TypeAlias = Callable[..., Gateway]

FAR = 1000.0  # seconds; nothing waits for them
RESTART = (1012, "SERVER_SHUTDOWN")

pytestmark = pytest.mark.usefixtures("no_actor_left")


# A session that is told to leave -----------------------------------------------------------------


@pytest.fixture
def given() -> GivenSession:
    """A registered session that was told to leave; the test ends its pause."""
    given = GivenSession()
    given.register()
    given.tell(Leave(FAR))
    return given


def goodbye(given: GivenSession) -> list[str]:
    """Wait until it is gone; returns what it wrote up to then, after the REGISTER_ACK."""
    assert given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.closed == RESTART
    assert given.outbox.frames[-1]["payload"] == {"reason": "SERVER_SHUTDOWN"}
    given.assert_nothing_counted_as_live()
    return given.outbox.history()[1:]


def busy(given: GivenSession) -> dict[str, Any]:
    """The payload of the ERROR that comes next."""
    frame = given.outbox.next()
    assert frame["msg_type"] == "ERROR"
    payload: dict[str, Any] = frame["payload"]
    assert payload["error_code"] == "SERVER_BUSY"
    assert payload["retryable"] is True
    return payload


def voice_frame(request_id: str, seq: int) -> Request:
    content = RequestContent(voice_mode="BINARY")
    return Request(request_id, "VOICE", content, stream_flag=True, stream_seq=seq)


def answer_with_calls(given: GivenSession, *call_ids: str) -> None:
    """A request whose answer is calls of functions."""
    call(given, "req_1", *call_ids).complete()
    given.outbox.wait_terminal("req_1")


def test_an_idle_session_says_goodbye_when_its_pause_is_over_and_not_before(
    given: GivenSession,
) -> None:
    given.settle()
    assert given.outbox.history() == ["REGISTER_ACK"]
    assert given.outbox.closed is None
    given.tell(PauseIsOver())
    assert goodbye(given) == ["SHUTDOWN"]


def test_the_pause_ends_by_itself() -> None:
    given = GivenSession()
    given.register()
    given.tell(Leave(0.001))
    assert goodbye(given) == ["SHUTDOWN"]


def test_who_is_told_to_leave_again_waits_no_second_time(
    given: GivenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    given.settle()
    timers: list[object] = []
    monkeypatch.setattr("actors.session.session.Timer", lambda *what: timers.append(what))
    given.tell(Leave(FAR))
    given.settle()
    assert timers == []


def test_what_is_live_may_finish_before_the_goodbye() -> None:
    given = GivenSession()
    given.register()
    given.request("req_1")
    stream = given.source.next()
    stream.say("Once")
    given.tell(Leave(FAR), PauseIsOver())
    given.settle()
    stream.say(" upon a time")
    stream.complete()
    assert goodbye(given) == ["text req_1", "text req_1", "end COMPLETED req_1", "SHUTDOWN"]


def test_who_has_finished_waits_for_the_end_of_the_pause_all_the_same() -> None:
    given = GivenSession()
    given.register()
    given.request("req_1")
    given.tell(Leave(FAR))
    given.source.next().complete()
    given.outbox.wait_terminal("req_1")
    given.settle()
    assert given.outbox.closed is None
    given.tell(PauseIsOver())
    assert goodbye(given) == ["end COMPLETED req_1", "SHUTDOWN"]


def test_a_new_request_is_refused(given: GivenSession) -> None:
    given.request("req_1")
    refused = busy(given)
    assert refused["request_id"] == "req_1"
    assert refused["outcome"] == "FAILED"
    assert given.sample("refused_total", reason="shutdown") == 1
    given.request("req_1", text="")  # an update of the session, under an id that may come again
    assert busy(given)["request_id"] == "req_1"
    given.settle()
    assert given.source.streams == []
    given.tell(PauseIsOver())
    goodbye(given)


def test_a_new_request_in_voice_is_refused_with_all_of_its_frames(given: GivenSession) -> None:
    given.tell(given.frame(voice_frame("v", 0)))
    assert busy(given)["request_id"] == "v"
    given.tell(VoiceReceived(b"voice"), given.frame(voice_frame("v", -1)))
    given.settle()
    assert given.outbox.history()[1:] == ["end SERVER_BUSY v"]
    assert given.sample("refused_total", reason="shutdown") == 1


def test_a_functions_result_that_asks_for_more_is_refused() -> None:
    given = GivenSession()
    given.register()
    answer_with_calls(given, "a")
    given.tell(Leave(FAR))
    given.tell(given.frame(FunctionResult("a", 1)))  # taken, and not answered
    given.tell(given.frame(FunctionResult("a", 1, "req_2")))
    assert busy(given)["request_id"] == "req_2"
    given.settle()
    assert given.outbox.history()[-2:] == ["end COMPLETED req_1", "end SERVER_BUSY req_2"]
    assert len(given.source.streams) == 1


def test_results_of_a_request_that_was_accepted_before_are_taken() -> None:
    given = GivenSession()
    given.register()
    answer_with_calls(given, "a", "b")
    given.tell(given.frame(FunctionResult("a", 1, "req_2")), Leave(FAR), PauseIsOver())
    given.settle()
    assert given.outbox.closed is None
    given.tell(given.frame(FunctionResult("b", 2, "req_2")))
    given.source.next().complete()
    assert goodbye(given)[-2:] == ["end COMPLETED req_2", "SHUTDOWN"]


@pytest.mark.parametrize("since", ["leave", "start"])
def test_who_registers_now_is_refused_and_sent_away(since: str) -> None:
    given = GivenSession(is_draining=since == "start")
    if since == "leave":
        given.door.drain(FAR)
    given.tell(given.frame(Register(ApiKeyAuth("key"))))
    assert "request_id" not in busy(given)
    assert given.door.unregistered == 0
    assert given.outbox.history() == ["ERROR", "SHUTDOWN"]
    assert given.outbox.closed == RESTART


def test_who_never_registers_is_sent_away_too() -> None:
    given = GivenSession()
    given.door.drain(0)
    assert given.door.unregistered == 0
    assert given.outbox.history() == ["SHUTDOWN"]
    assert given.outbox.closed == RESTART


def test_those_who_never_register_are_sent_away_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = GivenSession()
    delays: list[float] = []
    monkeypatch.setattr("gateway.wire.door.random.uniform", lambda _least, most: most)
    monkeypatch.setattr(
        "gateway.wire.door.gevent.spawn_later", lambda delay, _leave: delays.append(delay)
    )
    given.door.drain(3.0)
    late = given.door.attach(FakeOutbox(), "127.0.0.1:10")
    assert delays == [3.0, 3.0]
    assert given.door.unregistered == 2
    late.leave()
    late.leave()
    assert given.door.unregistered == 1


def test_an_interrupt_gets_its_ack_and_its_terminal_frame_and_then_the_goodbye() -> None:
    given = stuck()
    given.request("req_1")
    stream = given.source.next()
    stream.say("Once")
    given.tell(Leave(FAR), PauseIsOver())
    given.interrupt("req_1")
    assert stream.close_asked.wait(LIMIT)
    given.settle()
    assert given.outbox.closed is None
    stream.end_closed()
    assert goodbye(given) == [
        "text req_1",
        "ack SUCCESS req_1",
        "end INTERRUPTED req_1",
        "SHUTDOWN",
    ]
    terminal = given.outbox.frames[-2]["payload"]
    assert terminal["interrupt_reason"] == "USER_STOP"


def test_voice_whose_frames_are_coming_may_come_to_its_end() -> None:
    given = GivenSession()
    given.register()
    given.tell(given.frame(voice_frame("v", 0)), Leave(FAR), PauseIsOver())
    given.tell(VoiceReceived(b"voice"))
    given.settle()
    assert given.outbox.history() == ["REGISTER_ACK"]
    given.tell(given.frame(voice_frame("v", -1)))
    assert goodbye(given) == ["end FAILED v", "SHUTDOWN"]  # nobody recognizes speech
    assert given.sample("requests_total", outcome="failed") == 1


def test_voice_whose_frames_are_coming_can_be_interrupted() -> None:
    given = GivenSession()
    given.register()
    given.tell(given.frame(voice_frame("v", 0)), Leave(FAR), PauseIsOver())
    given.interrupt("v")
    assert goodbye(given) == ["ack SUCCESS v", "end INTERRUPTED v", "SHUTDOWN"]


def test_voice_that_is_not_at_its_end_when_the_limit_passes_is_interrupted() -> None:
    given = GivenSession()
    given.register()
    given.tell(given.frame(voice_frame("v", 0)), Leave(FAR), PauseIsOver())
    given.tell(EndSession())
    assert goodbye(given) == ["end INTERRUPTED v", "SHUTDOWN"]
    assert given.outbox.frames[-2]["payload"]["interrupt_reason"] == "SERVER_SHUTDOWN"


@pytest.mark.parametrize("kind", ["text", "voice", "result"])
def test_a_request_that_was_interrupted_before_it_came_gets_no_error(kind: str) -> None:
    given = GivenSession()
    given.register()
    answer_with_calls(given, "a")
    given.interrupt("req_2")
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "UNKNOWN"
    given.tell(Leave(FAR))
    match kind:
        case "text":
            given.request("req_2")
        case "voice":
            given.tell(given.frame(voice_frame("req_2", 0)))
        case "result":
            given.tell(given.frame(FunctionResult("a", 1, "req_2")))
    terminal = given.outbox.wait_terminal("req_2")
    assert terminal["interrupted"] is True
    assert terminal["interrupt_reason"] == "USER_STOP"
    assert given.sample("refused_total", reason="shutdown") == 0
    given.tell(PauseIsOver())
    assert goodbye(given)[-2:] == ["end INTERRUPTED req_2", "SHUTDOWN"]


def test_an_interrupt_that_came_long_before_its_request_is_forgotten(clock: SessionClock) -> None:
    given = GivenSession(session_timeout=0, heartbeat_interval=0)
    given.register()
    given.interrupt("req_1")
    given.outbox.wait_ack()
    given.tell(Leave(FAR))
    given.settle()
    clock.now = time.monotonic() + EARLY_INTERRUPT_SECONDS + 1
    given.request("req_1")
    assert busy(given)["request_id"] == "req_1"


@pytest.mark.parametrize("message", [PauseIsOver(), EndSession()])
def test_goodbye_is_said_once(given: GivenSession, message: object) -> None:
    with contextlib.suppress(AssertionError):  # the second may come too late even for its mailbox
        given.tell(PauseIsOver(), message, message)
    assert goodbye(given) == ["SHUTDOWN"]


def test_a_client_may_go_by_itself_meanwhile(given: GivenSession) -> None:
    given.tell(given.frame(Shutdown()))
    assert given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.closed == (1000, "CLIENT_SHUTDOWN")


def test_a_connection_may_be_lost_meanwhile(given: GivenSession) -> None:
    given.tell(ConnectionLost("gone"))
    assert given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.closed is None


# The supervisor ----------------------------------------------------------------------------------


def drain(given: GivenSupervisor, spread_seconds: float = 0.0) -> gevent.event.Event:
    """Tell it to drain; the event is set when nobody is left."""
    done = gevent.event.Event()
    given.tell(Drain(spread_seconds, done.set))
    return done


def test_every_session_is_told_to_leave_after_a_pause_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses = itertools.count(1.0)
    asked: list[tuple[float, float]] = []

    def uniform(least: float, most: float) -> float:
        asked.append((least, most))
        return next(pauses)

    monkeypatch.setattr("actors.supervisor.random.uniform", uniform)
    given = GivenSupervisor()
    others = [Mailbox() for _ in range(2)]
    given.tell(*(SessionStarted(other.ref) for other in others))
    drain(given, spread_seconds=7.0)
    assert [one.next() for one in (given.session, *others)] == [Leave(1.0), Leave(2.0), Leave(3.0)]
    assert asked == [(0, 7.0)] * 3


def test_goodbyes_are_spread_over_all_of_the_time_and_no_more() -> None:
    random.seed(20260131)
    given = GivenSupervisor()
    sessions = [given.session, *(Mailbox() for _ in range(199))]
    given.tell(*(SessionStarted(session.ref) for session in sessions[1:]))
    drain(given, spread_seconds=10.0)
    pauses = [session.next().pause_seconds for session in sessions]
    assert 0 <= min(pauses) < 0.5
    assert 9.5 < max(pauses) <= 10
    assert 4 < sum(pauses) / len(pauses) < 6


def test_it_is_drained_when_the_last_session_is_gone() -> None:
    given = GivenSupervisor()
    other = Mailbox()
    given.tell(SessionStarted(other.ref))
    drained = drain(given)
    for session in (given.session, other):
        given.census()
        assert not drained.is_set()
        given.tell(SessionEnded(session.ref.actor_urn))
    assert drained.wait(LIMIT)


def test_it_is_drained_at_once_where_nobody_is() -> None:
    given = GivenSupervisor()
    given.tell(SessionEnded(given.session.ref.actor_urn))
    assert drain(given).wait(LIMIT)


def test_a_stream_that_outlived_its_session_does_not_hold_up_the_drain_but_the_shutdown() -> None:
    given = GivenSupervisor()
    entry = Entry(given, "req_1", accepted_at=0)
    drained = drain(given)
    given.tell(RequestClosed(entry.request.ref.actor_urn))
    given.tell(SessionEnded(given.session.ref.actor_urn))
    assert drained.wait(LIMIT)
    ended = gevent.event.Event()
    given.tell(ShutDown(0, ended.set))
    given.census()
    assert not ended.is_set()
    given.tell(GenerationEnded(entry.request.ref.actor_urn))
    assert ended.wait(LIMIT)


def test_a_session_that_comes_meanwhile_is_told_to_leave_too() -> None:
    given = GivenSupervisor()
    drained = drain(given)
    late = Mailbox()
    given.tell(SessionStarted(late.ref))
    assert late.next() == Leave(0)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    given.census()
    assert not drained.is_set()
    given.tell(SessionEnded(late.ref.actor_urn))
    assert drained.wait(LIMIT)


def test_who_is_left_is_ended_after_a_pause_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = itertools.count(1.0)
    asked: list[tuple[float, float]] = []
    timers: list[tuple[Any, ...]] = []

    def uniform(least: float, most: float) -> float:
        asked.append((least, most))
        return next(pauses)

    monkeypatch.setattr("actors.supervisor.random.uniform", uniform)
    monkeypatch.setattr("actors.supervisor.Timer", lambda *what: timers.append(what))
    given = GivenSupervisor()
    given.tell(ShutDown(7.0, lambda: None))
    late = Mailbox()
    given.tell(SessionStarted(late.ref))
    given.census()
    end = EndSession()
    assert timers == [(1.0, given.session.ref, end), (2.0, late.ref, end)]
    assert asked == [(0, 7.0)] * 2


def test_the_pause_before_the_end_ends_by_itself() -> None:
    given = GivenSupervisor()
    given.tell(ShutDown(0.001, lambda: None))
    assert given.session.next() == EndSession()


def test_a_session_that_comes_after_the_limit_is_ended() -> None:
    given = GivenSupervisor()
    drain(given)
    given.tell(ShutDown(0, lambda: None))
    late = Mailbox()
    given.tell(SessionStarted(late.ref))
    assert late.next() == EndSession()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_supervisor_that_fails_meanwhile_is_succeeded_by_one_that_goes_on(when: str) -> None:
    given = GivenSupervisor()
    failing = given.supervision.ref
    if when == "before":  # the order is lost with the mailbox of the one who fails
        tell(failing, NONSENSE)
        drained = drain(given)
    else:
        drained = drain(given)
        given.census()
        assert given.session.next() == Leave(0)
        tell(failing, NONSENSE)
    assert failing.actor_stopped.wait(LIMIT)
    assert given.session.next() == Leave(0)
    late = Mailbox()
    given.tell(SessionStarted(late.ref))
    assert late.next() == Leave(0)
    given.tell(SessionEnded(late.ref.actor_urn))
    given.census()
    assert not drained.is_set()
    given.tell(SessionEnded(given.session.ref.actor_urn))
    assert drained.wait(LIMIT)


# The gateway -------------------------------------------------------------------------------------


class Told:
    """A supervision that keeps what it is told, and says that all are gone, or does not."""

    def __init__(self, census: Census | None, *, are_gone: bool = True) -> None:
        self.messages: list[Drain | ShutDown] = []
        self._census = census
        self._are_gone = are_gone

    def census(self) -> Census | None:
        return self._census

    def tell(self, message: object) -> None:
        assert isinstance(message, Drain | ShutDown)
        self.messages.append(message)
        if self._are_gone:
            message.done()


@pytest.mark.parametrize(
    ("sessions", "limit", "spread"),
    [(0, 30, 0), (10, 30, 0.1), (1000, 30, 10), (1_000_000, 30, 12.5), (1_000_000, 0.5, 0.125)],
)
def test_the_spread_grows_with_the_clients_and_stays_well_within_the_limit(
    sessions: int, limit: float, spread: float
) -> None:
    gateway = Gateway(Settings(drain_timeout=limit))
    gateway.supervision = told = Told(Census(sessions, 0, 0))  # type: ignore[assignment]
    gateway.door = door = Door()  # type: ignore[assignment]
    gateway.drain()
    assert door.spreads == [spread]
    assert [one.spread_seconds for one in told.messages] == [spread]
    assert gateway.metrics.registry.get_sample_value("bargein_drain_timeouts_total") == 0


class Clock:
    """A clock that stands still but for what is waited for, in vain, and the waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.waits: list[float] = []
        monkeypatch.setattr("gateway.app.time", self)
        monkeypatch.setattr("gateway.app.gevent.event.Event", lambda: self)

    def monotonic(self) -> float:
        return self.now

    def set(self) -> None:
        raise AssertionError("nobody is gone")

    def wait(self, seconds: float) -> bool:
        self.waits.append(round(seconds, 6))
        self.now += seconds
        return False


class Door:
    """A door without clients that have not registered."""

    unregistered = 0

    def __init__(self) -> None:
        self.spreads: list[float] = []

    def refuse_sessions(self) -> None:
        pass

    def drain(self, spread_seconds: float) -> None:
        self.spreads.append(spread_seconds)


class Deaf:
    """A server whose clients neither read nor go."""

    connections = 1

    def __init__(self, clock: Clock) -> None:
        self.wait_until_empty = clock.wait

    def stop_listening(self) -> None:
        pass


@pytest.mark.parametrize(
    ("limit", "drain", "end", "spread"),
    [
        (30, 25, 4.5, 2.25),
        (4, 2, 1.5, 0.75),
        (2, 1, 0.7, 0.35),
        (0, None, 1.5, 0),  # nothing is drained, and all are told at once
    ],
)
def test_all_of_it_is_over_within_the_limit_whatever_clients_do(
    monkeypatch: pytest.MonkeyPatch,
    limit: float,
    drain: float | None,
    end: float,
    spread: float,
) -> None:
    """Some of the limit is left for those who are, and some of that for the process's own end."""
    clock = Clock(monkeypatch)
    gateway = Gateway(Settings(drain_timeout=limit))
    gateway.supervision = told = Told(  # type: ignore[assignment]
        Census(1_000_000, 1, 1), are_gone=False
    )
    gateway.server = Deaf(clock)  # type: ignore[assignment]
    gateway.door = Door()  # type: ignore[assignment]
    gateway._is_up = True
    gateway.drain()
    gateway.stop()
    assert clock.waits == [*([] if drain is None else [drain]), end, 0]
    assert clock.now - 1000 < (limit or 2)
    shut_down = told.messages[-1]
    assert isinstance(shut_down, ShutDown)
    assert shut_down.spread_seconds == pytest.approx(spread)


def test_who_lingers_after_a_short_drain_is_not_waited_for_up_to_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    gateway = Gateway(Settings(drain_timeout=FAR))
    gateway.supervision = Told(Census(0, 0, 0), are_gone=False)  # type: ignore[assignment]
    gateway.server = Deaf(clock)  # type: ignore[assignment]
    gateway.door = Door()  # type: ignore[assignment]
    gateway._is_up = True
    gateway._ends_at = clock.now + FAR
    gateway.stop()
    assert clock.now - 1000 == pytest.approx(4.5)


class Draining:
    """A gateway of this process that drains in a greenlet of its own."""

    def __init__(self, gateway: Gateway, limit: float = FAR) -> None:
        self.gateway = gateway
        gateway.settings = dataclasses.replace(gateway.settings, drain_timeout=limit)
        self._drain = gevent.spawn(gateway.drain)
        wait_until(lambda: not any(map(self._takes_requests, sessions())), "all know of it")

    @staticmethod
    def _takes_requests(session: SessionActor) -> bool:
        return bool(session.describe(0)["takes_requests"])

    @property
    def is_over(self) -> bool:
        return bool(self._drain.ready())

    def wait(self) -> None:
        self._drain.get(timeout=LIMIT)


def sessions() -> list[SessionActor]:
    return [actor for actor in GreenletActor.alive if isinstance(actor, SessionActor)]


def test_a_client_interrupts_meanwhile_and_gets_all_that_is_due(
    gateway: Gateway, client: Client, provider: ProviderProcess
) -> None:
    script = provider.fresh(scripts.idle_mid_stream(["Once"]))
    request_id = client.request(script)
    client.wait_text(request_id)
    draining = Draining(gateway)
    client.request(script, "late")
    assert client.wait_terminal("late").payload["error_code"] == "SERVER_BUSY"
    client.interrupt(request_id)
    assert client.wait_closed() == 1012
    ack, terminal, shutdown = client.frames[-3:]
    assert ack.msg_type == "INTERRUPT_ACK"
    assert ack.payload["status"] == "SUCCESS"
    assert terminal.payload["interrupt_reason"] == "USER_STOP"
    assert shutdown.msg_type == "SHUTDOWN"
    draining.wait()
    provider.wait_closed(provider.wait_post(script=script).conn)
    assert len(provider.posts(script)) == 1


def test_a_connection_that_never_registered_does_not_hold_it_up(gateway: Gateway) -> None:
    port = gateway.server.port
    with Client(port, register=False) as client, socket.create_connection(("127.0.0.1", port)):
        wait_until(lambda: gateway.server.connections == 2, "both are connected")
        draining = Draining(gateway)
        assert client.wait_closed() == 1012
        assert [frame.msg_type for frame in client.frames] == ["SHUTDOWN"]
        draining.wait()


def test_who_comes_meanwhile_is_refused_whatever_the_supervisor_says(
    gateway: Gateway, client: Client, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_id = client.request(provider.fresh(scripts.idle_mid_stream(["Once"])))
    client.wait_text(request_id)
    draining = Draining(gateway)
    with monkeypatch.context() as patch:
        patch.setattr(gateway.supervision, "tell", lambda _: None)  # it is too busy
        with Client(gateway.server.port, register=False) as late:
            late.send("REGISTER", {"auth": {"type": "API_KEY", "api_key": "x"}, "platform": "WEB"})
            assert late.wait_closed() == 1012
            assert late.frames[0].payload["error_code"] == "SERVER_BUSY"
        wait_until(lambda: gateway.server.connections == 1, "it is gone")
    client.interrupt(request_id)
    assert client.wait_closed() == 1012
    draining.wait()


def test_it_answers_other_questions_meanwhile(
    gateway: Gateway, client: Client, provider: ProviderProcess
) -> None:
    key = provider.unique("end")
    request_id = client.request(provider.fresh(scripts.finish_on_release(["Once"], key)))
    client.wait_text(request_id)
    assert get(gateway.server.port, "/readyz")[0] == 200
    draining = Draining(gateway)
    client.send("SESSION_QUERY", {"query_fields": []})
    client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
    client.send("HEALTH_CHECK", {"check_fields": []})
    client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
    assert health(gateway.server.port)["status"] == "ok"
    assert health(gateway.server.port)["requests"] == 1
    assert get(gateway.server.port, "/livez") == (200, "ok\n")
    assert get(gateway.server.port, "/readyz") == (503, "not ready: draining\n")
    assert not draining.is_over
    provider.release(key)
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    assert client.wait_closed() == 1012
    draining.wait()


def test_it_drains_though_the_supervisor_does_not_answer(
    gateway: Gateway, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.supervision, "census", lambda: None)
    draining = Draining(gateway)
    assert client.wait_closed() == 1012
    draining.wait()


def test_when_the_limit_passes_that_is_counted_and_logged(
    gateway: Gateway, client: Client, provider: ProviderProcess
) -> None:
    request_id = client.request(provider.fresh(scripts.idle_mid_stream(["Once"])))
    client.wait_text(request_id)
    gateway.settings = dataclasses.replace(gateway.settings, drain_timeout=0.05)
    with capture_logs() as logs:
        gateway.drain()
    events = {log["event"]: log for log in logs if log["component"] == "SYS"}
    assert (events["Draining"]["sessions"], events["Draining"]["requests"]) == (1, 1)
    assert events["Drain timed out"]["log_level"] == "warning"
    assert events["Drain timed out"]["seconds"] == 0.025
    assert gateway.metrics.registry.get_sample_value("bargein_drain_timeouts_total") == 1
    stopping = gevent.spawn(gateway.stop)
    terminal = client.wait_terminal(request_id)
    assert terminal.payload["interrupt_reason"] == "SERVER_SHUTDOWN"
    assert client.wait_closed() == 1012
    stopping.get(timeout=LIMIT)


def test_when_the_limit_does_not_pass_nothing_is_counted(gateway: Gateway, client: Client) -> None:
    draining = Draining(gateway)
    assert client.wait_closed() == 1012
    draining.wait()
    assert gateway.metrics.registry.get_sample_value("bargein_drain_timeouts_total") == 0


# The daemon --------------------------------------------------------------------------------------


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    answer = response.status, response.read().decode()
    connection.close()
    return answer


def test_under_load_half_finishes_and_the_rest_is_interrupted_within_the_limit(
    provider: ProviderProcess,
) -> None:
    limit = 4.0
    key = provider.unique("end")
    finishing = provider.fresh(scripts.finish_on_release(["Once", " upon"], key))
    hanging = provider.fresh(scripts.idle_mid_stream(["Once", " upon"]))
    arguments = (*provider_arguments(provider), "--drain-timeout", str(limit))
    with Daemon(*arguments) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(daemon.port)) for _ in range(20)]
        idle = stack.enter_context(Client(daemon.port))
        ids = [
            client.request(finishing if number % 2 else hanging)
            for number, client in enumerate(clients)
        ]
        for client, request_id in zip(clients, ids, strict=True):
            client.wait_text(request_id)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: "Draining" in daemon.log, "it drains")
        assert idle.wait_closed() == 1012
        assert [frame.msg_type for frame in idle.frames] == ["REGISTER_ACK", "SHUTDOWN"]
        assert get(daemon.port, "/livez")[0] == 200
        assert get(daemon.port, "/readyz")[0] == 503
        assert health(daemon.port)["requests"] == len(clients)
        with Client(daemon.port, register=False) as late:
            late.send("REGISTER", {"auth": {"type": "API_KEY", "api_key": "x"}, "platform": "WEB"})
            assert late.wait_closed() == 1012
            error, shutdown = late.frames
            assert error.payload["error_code"] == "SERVER_BUSY"
            assert shutdown.msg_type == "SHUTDOWN"
        busy = clients[0].request(hanging)
        assert clients[0].wait_terminal(busy).payload["error_code"] == "SERVER_BUSY"
        assert time.monotonic() - began < limit / 2, "this machine is too slow for this test"
        provider.release(key)
        for client, request_id in list(zip(clients, ids, strict=True))[1::2]:
            assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
            assert client.text_of(request_id) == "Once upon"
            assert client.wait_closed() == 1012
        for client, request_id in list(zip(clients, ids, strict=True))[::2]:
            terminal = client.wait_terminal(request_id)
            assert terminal.payload["outcome"] == "INTERRUPTED"
            assert terminal.payload["interrupt_reason"] == "SERVER_SHUTDOWN"
            assert terminal.at - began >= limit / 2
            assert client.wait_closed() == 1012
        for client in clients:
            assert client.frames[-1].msg_type == "SHUTDOWN"
            assert client.frames[-1].payload["reason"] == "SERVER_SHUTDOWN"
        assert daemon.wait() == 0
        assert time.monotonic() - began < limit
        assert "Drain timed out" in daemon.log
        assert "Traceback" not in daemon.log
    assert len(provider.posts(hanging)) == len(clients) // 2
    for post in provider.posts(hanging):
        provider.wait_closed(post.conn)


def test_clients_that_do_not_read_hold_up_nothing(provider: ProviderProcess) -> None:
    limit = 3.0
    script = provider.fresh(scripts.flood("x" * 1000))
    arguments = (*provider_arguments(provider), "--drain-timeout", str(limit))
    with Daemon(*arguments) as daemon, contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(Client(daemon.port, receive_buffer=4096)) for _ in range(5)]
        for client in deaf:
            client.wait_text(client.request(script))
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        # It was over within the limit when it was measured, on a quiet machine. This tells it from
        # the 10 s that such clients are given at other times.
        assert time.monotonic() - began < limit + 2
        assert "Drain timed out" in daemon.log
        assert "Sessions did not end in time" not in daemon.log
    for post in provider.posts(script):
        provider.wait_closed(post.conn)


def test_who_is_left_at_the_limit_is_told_one_after_another(provider: ProviderProcess) -> None:
    """100 a second, on the average."""
    script = provider.fresh(scripts.idle_mid_stream(["Once"]))
    arguments = (*provider_arguments(provider), "--drain-timeout", "2")
    with Daemon(*arguments) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(daemon.port)) for _ in range(40)]
        for client in clients:
            client.wait_text(client.request(script))
        daemon.signal(signal.SIGTERM)
        pool = gevent.pool.Pool()
        assert pool.map(lambda client: client.wait_closed(), clients) == [1012] * 40
        assert daemon.wait() == 0
    goodbyes = sorted(client.frames[-1].at for client in clients)
    terminals = [client.frames[-2].payload["interrupt_reason"] for client in clients]
    assert terminals == ["SERVER_SHUTDOWN"] * 40
    assert {client.frames[-1].msg_type for client in clients} == {"SHUTDOWN"}
    assert goodbyes[-1] - goodbyes[0] > 0.2, "all at once, or nearly"


def test_with_nothing_live_it_does_not_wait_for_the_limit(provider: ProviderProcess) -> None:
    arguments = (*provider_arguments(provider), "--drain-timeout", str(FAR))
    with Daemon(*arguments) as daemon, Client(daemon.port) as client:
        request_id = client.request(provider.fresh(scripts.answer(["Once"])))
        client.wait_terminal(request_id)
        daemon.signal(signal.SIGTERM)
        assert client.wait_closed() == 1012
        assert daemon.wait() == 0
        assert "Drain timed out" not in daemon.log


def test_a_second_signal_during_the_drain_ends_it_at_once(provider: ProviderProcess) -> None:
    arguments = (*provider_arguments(provider), "--drain-timeout", str(FAR))
    with Daemon(*arguments) as daemon, Client(daemon.port) as client:
        request_id = client.request(provider.fresh(scripts.idle_mid_stream(["Once"])))
        client.wait_text(request_id)
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: "Draining" in daemon.log, "it drains")
        daemon.signal(signal.SIGTERM)
        began = time.monotonic()
        assert daemon.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 2.0
        assert client.wait_closed() is None


# systemd's notes ---------------------------------------------------------------------------------


@contextlib.contextmanager
def notes(kind: str) -> Iterator[tuple[socket.socket, str]]:
    """A socket for them, and what NOTIFY_SOCKET says of it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        name = f"bargein-test-{os.getpid()}" if kind == "abstract" else str(Path(folder) / "notify")
        sock.bind(f"\0{name}" if kind == "abstract" else name)
        sock.settimeout(LIMIT)
        yield sock, f"@{name}" if kind == "abstract" else name


ABSTRACT = pytest.param(
    "abstract", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux has them")
)


@pytest.mark.parametrize("kind", ["path", ABSTRACT])
def test_systemd_is_told_that_it_is_ready_and_that_it_stops(
    provider: ProviderProcess, kind: str
) -> None:
    arguments = (*provider_arguments(provider), "--drain-timeout", str(FAR))
    with (
        notes(kind) as (sock, name),
        Daemon(*arguments, env={"NOTIFY_SOCKET": name}) as daemon,
        Client(daemon.port) as client,
    ):
        assert sock.recv(100) == b"READY=1"
        request_id = client.request(provider.fresh(scripts.idle_mid_stream(["Once"])))
        client.wait_text(request_id)
        daemon.signal(signal.SIGTERM)
        assert sock.recv(100) == b"STOPPING=1"  # while it drains: the request hangs
        client.interrupt(request_id)
        assert client.wait_closed() == 1012
        assert daemon.wait() == 0


def test_nobody_needs_to_read_systemds_notes() -> None:
    with notes("path") as (_, name):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.connect(name)
            filler.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler.send(b"full")
        with Daemon(env={"NOTIFY_SOCKET": name}) as daemon:
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0


def test_a_notify_socket_that_is_not_there_is_no_fault(tmp_path: Path) -> None:
    with Daemon(env={"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as daemon:
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
