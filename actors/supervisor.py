"""The supervisor: knows all sessions and requests, reaps stale requests, drains and shuts down."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import gevent
import pykka

from actors.actor import ActorFailedError, GreenletActor, Timer, tell
from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.messages import (
    AskProgress,
    Census,
    Drain,
    EndSession,
    GenerationEnded,
    Leave,
    ProgressTold,
    Reap,
    ReapRequest,
    RegisterAgain,
    RequestAccepted,
    RequestClosed,
    SessionEnded,
    SessionStarted,
    ShutDown,
    Stop,
    SupervisorMessage,
    TakeCensus,
)
from actors.request import RequestActor
from actors.session.session import SessionActor
from metrics.logs import get_logger

MAX_RESTARTS = 5
RESTART_WINDOW_SECONDS = 60.0
"""More than `MAX_RESTARTS` failures within this time: restarting does not help, so give up."""

_CENSUS_SECONDS = 1.0

_log = DeferredLog(get_logger("SYS"))


@dataclass(frozen=True)
class SupervisorSettings:
    """When the reaper ends a request.

    Args:
        stale_after: reap a request after this many seconds without progress; 0: never.
        reap_interval: seconds between two checks; 0: the reaper does not run.
        request_max_age: reap a request at this age in seconds, even if it makes progress; 0: never.
    """

    stale_after: float = 300.0
    reap_interval: float = 60.0
    request_max_age: float = 0.0


@dataclass
class _Entry:
    request: RequestAccepted
    is_closed: bool = False
    """The terminal frame was sent, or the client is gone."""
    has_ended: bool = False
    """Every stage has ended."""
    is_reaped: bool = False
    """The session was told to reap it."""


class SupervisorActor(GreenletActor):
    """Knows every session and every request: they report their start and their end to it.

    Args:
        settings: when a request is reaped.
        on_fail: called when this actor fails, with the sessions that it knew.
    """

    def __init__(
        self,
        settings: SupervisorSettings,
        on_fail: Callable[[list[pykka.ActorRef[Any]]], None],
    ) -> None:
        super().__init__()
        self._settings = settings
        self._on_fail = on_fail
        self._sessions: dict[str, pykka.ActorRef[Any]] = {}
        self._requests: dict[str, _Entry] = {}
        self._drain: Drain | None = None
        self._shut_down: ShutDown | None = None

    def describe(self, now: float) -> dict[str, Any]:
        return {"sessions": len(self._sessions), "requests": len(self._requests)}

    def handle(self, message: SupervisorMessage) -> Census | None:
        match message:
            case SessionStarted(session):
                self._sessions[session.actor_urn] = session
                if self._shut_down is not None:
                    self._end_session(session, self._shut_down)
                elif self._drain is not None:
                    self._drain_session(session, self._drain)
            case SessionEnded(urn):
                self._on_session_ended(urn)
            case RequestAccepted():
                # If the session has failed in the meantime, it will send no RequestClosed.
                is_orphan = message.session.actor_urn not in self._sessions
                self._requests[message.request.actor_urn] = _Entry(message, is_closed=is_orphan)
            case RequestClosed(urn):
                self._update(urn, is_closed=True)
            case GenerationEnded(urn):
                self._update(urn, has_ended=True)
            case Reap(now):
                self._check_requests(now)
            case ProgressTold(urn, progress_at, now):
                self._check_progress(urn, progress_at, now)
            case TakeCensus():
                entries = self._requests.values()
                return Census(
                    len(self._sessions),
                    sum(not entry.is_closed for entry in entries),
                    sum(not entry.has_ended for entry in entries),
                )
            case Drain():
                self._drain = message
                for session in self._sessions.values():
                    self._drain_session(session, message)
                self._check_empty()
            case ShutDown():
                self._shut_down = message
                for session in self._sessions.values():
                    self._end_session(session, message)
                self._check_empty()
            case _:
                assert_never(message)
        return None

    def closed(self, error: BaseException | None) -> None:
        if error is not None:
            self._on_fail(list(self._sessions.values()))

    def _on_session_ended(self, urn: str) -> None:
        self._sessions.pop(urn, None)
        for request_urn, entry in list(self._requests.items()):
            if entry.request.session.actor_urn == urn:
                self._update(request_urn, is_closed=True)
        self._check_empty()

    def _update(self, urn: str, *, is_closed: bool = False, has_ended: bool = False) -> None:
        entry = self._requests.get(urn)
        if entry is None:
            return
        entry.is_closed = entry.is_closed or is_closed
        entry.has_ended = entry.has_ended or has_ended
        if entry.is_closed and entry.has_ended:
            del self._requests[urn]
            self._check_empty()

    @staticmethod
    def _drain_session(session: pykka.ActorRef[Any], drain: Drain) -> None:
        tell(session, Leave(random.uniform(0, drain.spread_seconds)))

    @staticmethod
    def _end_session(session: pykka.ActorRef[Any], shut_down: ShutDown) -> None:
        pause_seconds = random.uniform(0, shut_down.spread_seconds)
        if pause_seconds:
            Timer(pause_seconds, session, EndSession())
        else:
            tell(session, EndSession())

    def _check_empty(self) -> None:
        if self._sessions:
            return
        if self._drain is not None:
            self._drain.done()  # even if a stage of a closed request still runs
        if self._shut_down is not None and not self._requests:
            self._shut_down.done()

    # The reaper.

    def _check_requests(self, now: float) -> None:
        """Reap the requests that are too old, and ask the others when they last made progress."""
        for entry in list(self._requests.values()):
            age = _seconds_between(entry.request.accepted_at, now)
            if 0 < self._settings.request_max_age <= age:
                self._reap(entry, f"older than {self._settings.request_max_age:g} s")
            elif self._settings.stale_after > 0:
                tell(entry.request.request, AskProgress(now))

    def _check_progress(self, urn: str, progress_at: float, now: float) -> None:
        entry = self._requests.get(urn)
        idle = _seconds_between(progress_at, now)
        if entry is not None and idle >= self._settings.stale_after:
            self._reap(entry, f"no progress for {idle:.0f} s")

    def _reap(self, entry: _Entry, reason: str) -> None:
        request = entry.request
        _log.warning(
            "Cleaned up old request",
            session_id=request.session_id,
            request_id=request.request_id,
            reason=reason,
        )
        # A stale request is in one of three situations.
        # 1. The client has no terminal frame yet, and the session was not told: it reaps it now.
        if not entry.is_reaped and not entry.is_closed:
            entry.is_reaped = True
            if tell(request.session, ReapRequest(request.request_id, reason)):
                return
        # 2. The session is done with it, or has ended.
        # 3. The session was told an interval ago, and a stage still runs.
        # In 2 and 3 the request-actor closes its stages; on the second Stop it kills them.
        tell(request.request, Stop(is_reaped=True))


class Supervision:
    """Starts the supervisor, restarts it when it fails, and forwards messages to the current one.

    Args:
        settings: when a request is reaped.
        on_give_up: called when the supervisor fails more than `MAX_RESTARTS` times within
            `RESTART_WINDOW_SECONDS`.
        clock: `time.monotonic`, or a test's clock.
    """

    def __init__(
        self,
        settings: SupervisorSettings,
        on_give_up: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._on_give_up = on_give_up
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._reaper: gevent.Greenlet[[], None] | None = None
        self._leaving: list[Drain | ShutDown] = []
        self.ref = self._start_one()

    def start(self) -> None:
        """Start the reaper."""
        if self._settings.reap_interval > 0:
            self._reaper = gevent.spawn(self._reap_for_ever)

    def stop(self) -> None:
        """Stop the reaper and the supervisor."""
        if self._reaper is not None:
            self._reaper.kill()
        self.ref.stop()

    def tell(self, message: SupervisorMessage) -> None:
        """Put a message in the mailbox of the current supervisor."""
        if isinstance(message, Drain | ShutDown):
            self._leaving.append(message)  # a restarted supervisor must get it too
        tell(self.ref, message)

    def census(self) -> Census | None:
        """Count sessions, requests and streams; None if the supervisor does not answer."""
        try:
            census: Census = self.ref.ask(TakeCensus(), block=True, timeout=_CENSUS_SECONDS)
        except (pykka.ActorDeadError, pykka.Timeout, ActorFailedError):
            return None
        return census

    def _start_one(self) -> pykka.ActorRef[SupervisorActor]:
        return SupervisorActor.start(self._settings, self._restart)

    def _restart(self, known: list[pykka.ActorRef[Any]]) -> None:
        now = self._clock()
        if len(self._failures) == MAX_RESTARTS and (
            now - self._failures[0] < RESTART_WINDOW_SECONDS
        ):
            _log.error("Supervisor keeps failing")
            self._on_give_up()
            return
        self._failures.append(now)
        _log.error("Supervisor restarted")
        self.ref = self._start_one()
        # Announce every session that is alive, each once. The old mailbox may have held some
        # SessionStarted, so the known ones are not enough. Sessions come before requests, which
        # belong to them, and before a Drain, which is done when no session is known.
        sessions = {one.actor_urn: one for one in [*known, *_alive(SessionActor)]}
        for session in sessions.values():
            if session.is_alive():
                self.tell(SessionStarted(session))
        for request in _alive(RequestActor):
            tell(request, RegisterAgain())
        for message in self._leaving:
            tell(self.ref, message)

    def _reap_for_ever(self) -> None:
        while True:
            gevent.sleep(self._settings.reap_interval)
            lanes().wait_reads()  # what has arrived is progress, too
            self.tell(Reap(self._clock()))


def _seconds_between(since: float, now: float) -> float:
    """Without the pauses of this process: during those, nothing can make progress."""
    return now - since - lanes().pauses.seconds_between(since, now)


def _alive(kind: type[GreenletActor]) -> list[pykka.ActorRef[Any]]:
    return [actor.actor_ref for actor in GreenletActor.alive if isinstance(actor, kind)]
