"""The supervisor: whom it reaps, whom it counts, how it ends, and how it is started again."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import gevent.event
import gevent.queue
import pykka
import pytest
from structlog.testing import capture_logs

from actors.actor import tell
from actors.loop.lanes import lanes
from actors.messages import (
    AskProgress,
    Census,
    EndSession,
    GenerationEnded,
    ProgressTold,
    Reap,
    ReapRequest,
    RequestAccepted,
    RequestClosed,
    SessionEnded,
    SessionStarted,
    ShutDown,
    Start,
    Stop,
    SupervisorMessage,
)
from actors.request import RequestActor
from actors.session.messages import ConnectionLost
from actors.supervisor import MAX_RESTARTS, Supervision, SupervisorSettings
from gateway.app import Gateway
from tests.fakes import LIMIT, PROMPT, Collector, FakeSource
from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.provider_process import ProviderProcess
from tests.test_session import Given as GivenSession
from tests.test_session import stuck

NONSENSE: Any = "no message of the protocol"


class Mailbox:
    """An actor that keeps what it is told."""

    def __init__(self, kind: type[Collector] = Collector, *more: object) -> None:
        self._told: gevent.queue.SimpleQueue[Any] = gevent.queue.SimpleQueue()
        self.ref = kind.start(self._told, *more)

    def next(self) -> Any:
        return self._told.get(timeout=LIMIT)

    def assert_empty(self) -> None:
        self.ref.ask("anything yet?", timeout=LIMIT)
        assert self.next() == "anything yet?"


class FakeRequest(Collector):
    """A request-actor that answers what its progress is, and keeps all else that it is told."""

    def __init__(self, told: gevent.queue.SimpleQueue[Any], given: Given, entry: Entry) -> None:
        super().__init__(told)
        self._given = given
        self._entry = entry

    def handle(self, message: Any) -> Any:
        if isinstance(message, AskProgress):
            progress = ProgressTold(self.actor_urn, self._entry.progress_at, message.now)
            self._given.tell(progress)
        else:
            super().handle(message)


class Entry:
    """A request of which the test is session, actor and stages."""

    def __init__(self, given: Given, name: str, accepted_at: float) -> None:
        self.session = given.session
        self.progress_at = accepted_at
        self.request = Mailbox(FakeRequest, given, self)
        given.tell(
            RequestAccepted(self.request.ref, given.session.ref, "sess_1", name, accepted_at)
        )


class Given:
    """A supervisor with one session, and a clock that stands still."""

    def __init__(self, **settings: float) -> None:
        self.gave_up = gevent.event.Event()
        self.now = 0.0
        self.supervision = Supervision(
            SupervisorSettings(**settings), self.gave_up.set, clock=lambda: self.now
        )
        self.session = Mailbox()
        self.tell(SessionStarted(self.session.ref))

    def tell(self, *messages: SupervisorMessage) -> None:
        for message in messages:
            self.supervision.tell(message)

    def census(self) -> Census:
        """Also waits until all that was told before is done."""
        lanes().wait_deferred()  # releases are put off
        lanes().wait_for_control()
        census = self.supervision.census()
        assert census is not None
        return census

    def reap(self, now: float) -> list[dict[str, Any]]:
        """Let it look; returns what it logged about requests."""
        with capture_logs() as logs:
            self.tell(Reap(now))
            self.census()  # it has asked for progress
            for ref in pykka.ActorRegistry.get_by_class(RequestActor):
                with contextlib.suppress(pykka.ActorDeadError):
                    ref.ask(Start(PROMPT), timeout=LIMIT)  # it has answered
            for fake in pykka.ActorRegistry.get_by_class(FakeRequest):
                fake.ask(AskProgress(-math.inf), timeout=LIMIT)  # it has answered
            self.census()
            lanes().wait_deferred()  # lines are written later
        return [dict(log) for log in logs if log["event"] == "Cleaned up old request"]

    def fail(self) -> None:
        """Make the supervisor fail, and wait until the next one is there, if there will be one."""
        failing = self.supervision.ref
        tell(failing, NONSENSE)
        assert failing.actor_stopped.wait(LIMIT)


pytestmark = pytest.mark.usefixtures("no_actor_left")


# The reaper --------------------------------------------------------------------------------------


def test_a_request_without_progress_for_the_whole_time_is_reaped_by_its_session() -> None:
    given = Given(stale_after=300)
    entry = Entry(given, "req_1", accepted_at=1000)
    logs = given.reap(now=1300)
    assert given.session.next() == ReapRequest("req_1", "no progress for 300 s")
    entry.request.assert_empty()
    (log,) = logs
    assert (log["log_level"], log["component"]) == ("warning", "SYS")
    assert (log["session_id"], log["request_id"]) == ("sess_1", "req_1")


def test_a_request_with_progress_within_the_time_is_left_alone() -> None:
    given = Given(stale_after=300)
    entry = Entry(given, "req_1", accepted_at=1000)
    assert given.reap(now=1299.9) == []
    entry.progress_at = 1299.0
    assert given.reap(now=1598.9) == []
    given.session.assert_empty()
    entry.request.assert_empty()


def test_only_the_stale_one_of_many_is_reaped() -> None:
    given = Given(stale_after=300)
    entries = [Entry(given, f"req_{number}", accepted_at=1000) for number in range(3)]
    entries[0].progress_at = entries[2].progress_at = 1200
    given.reap(now=1300)
    assert given.session.next().request_id == "req_1"
    given.session.assert_empty()


def test_age_alone_reaps_nothing_unless_it_is_limited() -> None:
    given = Given(stale_after=300)
    Entry(given, "req_1", accepted_at=0).progress_at = 1_000_000
    assert given.reap(now=1_000_000) == []


def test_a_request_past_the_age_limit_is_reaped_in_spite_of_its_progress() -> None:
    given = Given(stale_after=300, request_max_age=600)
    entry = Entry(given, "req_1", accepted_at=1000)
    entry.progress_at = 1599.5
    assert given.reap(now=1599.9) == []
    entry.progress_at = 1600.0
    assert len(given.reap(now=1600)) == 1
    assert given.session.next() == ReapRequest("req_1", "older than 600 s")


def test_limits_of_zero_are_off() -> None:
    given = Given(stale_after=0, request_max_age=0)
    Entry(given, "req_1", accepted_at=0)
    assert given.reap(now=1_000_000) == []
    given.session.assert_empty()


def test_a_session_that_does_not_get_its_request_to_stop_is_passed_over_the_next_time() -> None:
    given = Given(stale_after=300)
    entry = Entry(given, "req_1", accepted_at=0)
    given.reap(now=300)
    assert given.session.next().request_id == "req_1"
    given.reap(now=360)
    given.session.assert_empty()
    assert entry.request.next() == Stop(is_reaped=True)
    given.reap(now=420)
    assert entry.request.next() == Stop(is_reaped=True)


def test_a_request_whose_session_is_dead_is_stopped_the_first_time() -> None:
    given = Given(stale_after=300)
    entry = Entry(given, "req_1", accepted_at=0)
    given.session.ref.stop(timeout=LIMIT)
    given.reap(now=300)
    assert entry.request.next() == Stop(is_reaped=True)


def test_an_orphan_stream_is_killed_without_a_word_to_its_session() -> None:
    given = Given(stale_after=300)
    entry = Entry(given, "req_1", accepted_at=0)
    given.tell(RequestClosed(entry.request.ref.actor_urn))  # timed out: the stream is still open
    assert given.census() == Census(sessions=1, requests=0, streams=1)
    given.reap(now=300)
    given.session.assert_empty()
    assert entry.request.next() == Stop(is_reaped=True)
    given.tell(GenerationEnded(entry.request.ref.actor_urn))
    assert given.reap(now=360) == []
    assert given.census() == Census(sessions=1, requests=0, streams=0)


def test_a_request_that_waits_for_its_client_is_reaped_too_and_its_dead_reader_not_killed() -> None:
    given = Given(stale_after=300)
    entry = Entry(given, "req_1", accepted_at=0)
    given.tell(GenerationEnded(entry.request.ref.actor_urn))
    given.reap(now=300)
    assert given.session.next().request_id == "req_1"
    given.reap(now=360)
    assert entry.request.next() == Stop(is_reaped=True)  # in case its session is stuck


def test_what_is_over_and_ended_is_never_reaped() -> None:
    given = Given(stale_after=300)
    entry = Entry(given, "req_1", accepted_at=0)
    urn = entry.request.ref.actor_urn
    given.tell(GenerationEnded(urn), RequestClosed(urn))
    assert given.reap(now=1000) == []
    given.session.assert_empty()


def test_the_reaper_looks_by_itself_with_the_time_of_its_clock() -> None:
    given = Given(stale_after=300, reap_interval=0.001)
    Entry(given, "req_1", accepted_at=1000)
    given.now = 1300.0
    given.supervision.start()
    assert given.session.next() == ReapRequest("req_1", "no progress for 300 s")
    given.supervision.stop()
    assert given.supervision.census() is None


def test_the_reaper_stops_a_stalled_provider_with_all_of_its_limits_off(
    make_gateway: Callable[..., Gateway], provider: ProviderProcess
) -> None:
    gateway = make_gateway(
        first_token_timeout=0,
        idle_timeout=0,
        supervisor=SupervisorSettings(stale_after=0.3, reap_interval=0.1),
    )
    stalled = provider.fresh(scripts.stalled_inside_chunk(["once", " upon"]))
    silent = provider.fresh(scripts.no_headers())
    with Client(gateway.server.port) as client:
        for script in (stalled, silent):
            request_id = client.request(script)
            terminal = client.wait_terminal(request_id)
            assert terminal.msg_type == "ERROR"
            assert terminal.payload["error_code"] == "REQUEST_TIMEOUT"
            assert terminal.payload["outcome"] == "REAPED"
            assert "no progress" in terminal.payload["error_detail"]
            provider.wait_closed(provider.wait_post(script=script).conn)
        request_id = client.request(provider.fresh(scripts.answer(["still here"])))
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        assert client.text_of(request_id) == "still here"


def test_the_reaper_leaves_a_slow_but_steady_provider_alone(
    make_gateway: Callable[..., Gateway], provider: ProviderProcess
) -> None:
    gateway = make_gateway(supervisor=SupervisorSettings(stale_after=0.5, reap_interval=0.02))
    script = provider.fresh(scripts.answer(["tick "] * 14, rate=20))
    with Client(gateway.server.port) as client:
        request_id = client.request(script)
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"


# The census --------------------------------------------------------------------------------------


def test_the_census_counts_sessions_requests_and_streams() -> None:
    given = Given()
    assert given.census() == Census(1, 0, 0)
    first, second = (Entry(given, f"req_{number}", accepted_at=0) for number in range(2))
    assert given.census() == Census(1, 2, 2)
    given.tell(GenerationEnded(first.request.ref.actor_urn))
    assert given.census() == Census(1, 2, 1)
    given.tell(RequestClosed(first.request.ref.actor_urn))
    assert given.census() == Census(1, 1, 1)
    given.tell(RequestClosed(second.request.ref.actor_urn))
    assert given.census() == Census(1, 0, 1)
    given.tell(GenerationEnded(second.request.ref.actor_urn))
    assert given.census() == Census(1, 0, 0)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    assert given.census() == Census(0, 0, 0)


def test_the_end_of_a_session_is_the_end_of_its_requests_but_not_of_their_streams() -> None:
    given = Given()
    entry = Entry(given, "req_1", accepted_at=0)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    assert given.census() == Census(sessions=0, requests=0, streams=1)
    given.tell(GenerationEnded(entry.request.ref.actor_urn))
    assert given.census() == Census(0, 0, 0)


def test_a_request_that_registers_after_its_session_has_failed_is_not_counted_for_ever() -> None:
    given = Given(stale_after=300)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    entry = Entry(given, "req_1", accepted_at=0)
    assert given.census() == Census(sessions=0, requests=0, streams=1)
    given.tell(GenerationEnded(entry.request.ref.actor_urn))
    assert given.census() == Census(0, 0, 0)
    assert given.reap(now=1000) == []


def test_news_of_somebody_unknown_changes_nothing() -> None:
    given = Given()
    given.tell(SessionEnded("urn:1"), RequestClosed("urn:2"), GenerationEnded("urn:3"))
    assert given.census() == Census(1, 0, 0)


# The end -----------------------------------------------------------------------------------------


def test_shutting_down_ends_every_session_and_is_done_when_the_last_stream_is_closed() -> None:
    given = Given()
    other = Mailbox()
    given.tell(SessionStarted(other.ref))
    entry = Entry(given, "req_1", accepted_at=0)
    done: list[str] = []
    given.tell(ShutDown(0, lambda: done.append("done")))
    for session in (given.session, other):
        assert session.next() == EndSession()
    for message in (
        SessionEnded(other.ref.actor_urn),
        RequestClosed(entry.request.ref.actor_urn),
        SessionEnded(given.session.ref.actor_urn),
    ):
        given.tell(message)
        given.census()
        assert done == []
    given.tell(GenerationEnded(entry.request.ref.actor_urn))
    given.census()
    assert done == ["done"]


def test_shutting_down_where_nothing_is_alive_is_done_at_once() -> None:
    given = Given()
    given.tell(SessionEnded(given.session.ref.actor_urn))
    done = gevent.event.Event()
    given.tell(ShutDown(0, done.set))
    assert done.wait(LIMIT)


def test_a_session_that_comes_during_the_shutdown_is_ended_too() -> None:
    given = Given()
    done = gevent.event.Event()
    given.tell(ShutDown(0, done.set))
    late = Mailbox()
    given.tell(SessionStarted(late.ref))
    assert late.next() == EndSession()
    given.tell(SessionEnded(given.session.ref.actor_urn))
    given.census()
    assert not done.is_set()
    given.tell(SessionEnded(late.ref.actor_urn))
    assert done.wait(LIMIT)


# Failing, and starting again ---------------------------------------------------------------------


def test_after_a_failure_those_alive_register_again_and_the_census_is_right() -> None:
    given = Given(stale_after=300)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    sessions = [
        GivenSession(FakeSource(stuck=True), tell_supervisor=given.supervision.tell)
        for _ in range(3)
    ]
    for session in sessions:
        session.register()
        session.request("req_1")
        session.source.next().say("Hello")
    sessions[0].tell(ConnectionLost("gone"))
    sessions[0].source.streams[0].end_closed()
    assert sessions[0].ref.actor_stopped.wait(LIMIT)
    sessions[1].settle_requests()
    assert given.census() == Census(2, 2, 2)
    given.fail()
    for session in sessions[1:]:
        session.settle_requests()  # they have told the new supervisor
    assert given.census() == Census(2, 2, 2)
    assert not given.gave_up.is_set()
    # The new one reaps what the old one knew.
    logs = given.reap(now=time.monotonic() + 300)
    assert len(logs) == 2
    for session in sessions[1:]:
        session.source.streams[0].end_closed()
        assert session.outbox.wait_terminal("req_1")["outcome"] == "REAPED"
        session.settle()
    assert given.census() == Census(2, 0, 0)


def the_one_request() -> pykka.ActorRef[RequestActor]:
    """The only request-actor, when it has done all that it was told."""
    (request,) = pykka.ActorRegistry.get_by_class(RequestActor)
    request.ask(Start(PROMPT), timeout=LIMIT)  # changes nothing for one that was started
    return request


def test_after_a_failure_a_complete_answer_that_waits_for_its_client_is_still_a_request() -> None:
    given = Given(stale_after=300)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    session = GivenSession(tell_supervisor=given.supervision.tell)
    session.register()
    session.outbox.hold = True
    session.request("req_1")
    session.source.next().complete()
    assert session.outbox.finishing.wait(LIMIT)
    session.settle_requests()
    assert given.census() == Census(sessions=1, requests=1, streams=0)
    given.fail()
    session.settle_requests()
    assert given.census() == Census(sessions=1, requests=1, streams=0)
    # And the new one reaps it, by way of its session.
    request = the_one_request()
    assert len(given.reap(now=time.monotonic() + 300)) == 1
    assert session.outbox.wait_terminal("req_1")["outcome"] == "REAPED"
    assert request.actor_stopped.wait(LIMIT)
    assert given.census() == Census(sessions=1, requests=0, streams=0)
    assert not session.source.streams[0].killed_again.is_set()


@pytest.mark.parametrize("connected", [True, False])
def test_after_a_failure_the_reaper_still_reaches_an_orphan_stream(connected: bool) -> None:
    given = Given(stale_after=300)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    session = stuck(ack_timeout=0.02, tell_supervisor=given.supervision.tell)
    session.request("req_1")
    stream = session.source.next()
    if connected:
        session.interrupt("req_1")
        assert session.outbox.wait_ack()["results"][0]["outcome"] == "TIMED_OUT"
        session.settle()
    else:
        session.tell(ConnectionLost("gone"))
        assert session.ref.actor_stopped.wait(LIMIT)
    request = the_one_request()
    orphaned = Census(sessions=int(connected), requests=0, streams=1)
    assert given.census() == orphaned
    given.fail()
    assert the_one_request() == request
    assert given.census() == orphaned
    assert not stream.killed_again.is_set()
    assert len(given.reap(now=time.monotonic() + 300)) == 1
    assert stream.killed_again.is_set()
    stream.end_closed()
    assert request.actor_stopped.wait(LIMIT)
    assert given.census() == Census(sessions=int(connected), requests=0, streams=0)
    assert given.reap(now=time.monotonic() + 300) == []


def test_after_a_failure_the_reaper_goes_on() -> None:
    given = Given(stale_after=300, reap_interval=0.001)
    given.supervision.start()
    given.fail()
    given.tell(SessionStarted(given.session.ref))
    Entry(given, "req_1", accepted_at=1000)
    given.now = 1300.0
    assert given.session.next().request_id == "req_1"
    given.supervision.stop()


def test_a_supervisor_that_fails_more_than_five_times_a_minute_is_given_up() -> None:
    given = Given()
    for number in range(MAX_RESTARTS):
        given.now = float(number)
        given.fail()
        given.census()
        assert not given.gave_up.is_set()
    given.now = 59.9
    given.fail()
    assert given.gave_up.is_set()
    assert given.supervision.census() is None


def test_a_supervisor_that_fails_less_often_is_started_again_each_time() -> None:
    given = Given()
    for number in range(4 * MAX_RESTARTS):
        given.now = number * 12.0  # five a minute
        given.fail()
        given.census()
    assert not given.gave_up.is_set()
    # Those before count as long as a minute, however many there were.
    given.now += 1.0
    given.fail()
    assert given.gave_up.is_set()


def test_a_supervisor_that_is_stopped_is_not_started_again() -> None:
    given = Given()
    given.supervision.stop()
    assert given.supervision.census() is None
    given.tell(Reap(0.0))  # and telling it something is no error
    assert not given.gave_up.is_set()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_shutdown_survives_the_failure_of_the_supervisor(when: str) -> None:
    given = Given()
    done = gevent.event.Event()
    shut_down = ShutDown(0, done.set)
    failing = given.supervision.ref
    if when == "before":  # the order is lost with the mailbox of the one who fails
        tell(failing, NONSENSE)
        given.tell(shut_down)
    else:
        given.tell(shut_down)
        tell(failing, NONSENSE)
    assert failing.actor_stopped.wait(LIMIT)
    given.census()
    assert not done.is_set()
    assert given.session.next() == EndSession()
    given.session.ref.stop(timeout=LIMIT)
    given.tell(SessionEnded(given.session.ref.actor_urn))
    assert done.wait(LIMIT)


def test_a_census_that_fails_is_no_census_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given()

    def broken(*_: object) -> Census:
        raise RuntimeError("cannot count")

    monkeypatch.setattr("actors.supervisor.Census", broken)
    assert given.supervision.census() is None
    monkeypatch.undo()
    assert given.census().requests == 0  # by the one who took its place
