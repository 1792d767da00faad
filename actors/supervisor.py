"""All live requests: the reaper, failures of actors, ordered shutdown."""

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
from actors.messages import (
    Census,
    Drain,
    EndSession,
    GenerationEnded,
    Leave,
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
from metrics.logs import get_logger

MAX_RESTARTS = 5
RESTART_WINDOW_SECONDS = 60.0
"""A supervisor that fails more often than this cannot be helped by starting it again."""

_CENSUS_SECONDS = 1.0

_log = DeferredLog(get_logger("SYS"))


@dataclass(frozen=True)
class SupervisorSettings:
    """What the reaper takes for stale.

    Args:
        stale_after: seconds without progress until a request is reaped; 0 is no limit.
        reap_interval: seconds between two looks.
        request_max_age: seconds until a request is reaped whatever it does; 0 is no limit.
    """

    stale_after: float = 300.0
    reap_interval: float = 60.0
    request_max_age: float = 0.0


@dataclass
class _Entry:
    request: RequestAccepted
    over: bool = False
    """The client has its terminal frame."""
    ended: bool = False
    """The stream is closed."""
    reaped: bool = False


class SupervisorActor(GreenletActor):
    """Knows every session and every request; they tell it of their beginnings and ends.

    Args:
        settings: what is stale.
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
                    self._end(session, self._shut_down)
                elif self._drain is not None:
                    self._let_go(session, self._drain)
            case SessionEnded(urn):
                self._on_session_ended(urn)
            case RequestAccepted():
                # Of a session that has failed meanwhile, nobody will say that it is over.
                known = message.session.actor_urn in self._sessions
                self._requests[message.request.actor_urn] = _Entry(message, over=not known)
            case RequestClosed(urn):
                self._update(urn, over=True)
            case GenerationEnded(urn):
                self._update(urn, ended=True)
            case Reap(now):
                self._reap(now)
            case TakeCensus():
                entries = self._requests.values()
                return Census(
                    len(self._sessions),
                    sum(not entry.over for entry in entries),
                    sum(not entry.ended for entry in entries),
                )
            case Drain():
                self._drain = message
                for session in self._sessions.values():
                    self._let_go(session, message)
                self._check_empty()
            case ShutDown():
                self._shut_down = message
                for session in self._sessions.values():
                    self._end(session, message)
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
                self._update(request_urn, over=True)
        self._check_empty()

    def _update(self, urn: str, *, over: bool = False, ended: bool = False) -> None:
        entry = self._requests.get(urn)
        if entry is None:
            return
        entry.over = entry.over or over
        entry.ended = entry.ended or ended
        if entry.over and entry.ended:
            del self._requests[urn]
            self._check_empty()

    @staticmethod
    def _let_go(session: pykka.ActorRef[Any], drain: Drain) -> None:
        tell(session, Leave(random.uniform(0, drain.spread_seconds)))

    @staticmethod
    def _end(session: pykka.ActorRef[Any], shut_down: ShutDown) -> None:
        pause_seconds = random.uniform(0, shut_down.spread_seconds)
        message = EndSession(shut_down.reason)
        if pause_seconds:
            Timer(pause_seconds, session, message)
        else:
            tell(session, message)

    def _check_empty(self) -> None:
        if self._sessions:
            return
        if self._drain is not None:
            self._drain.done()  # a stream that outlived its request keeps nobody waiting
        if self._shut_down is not None and not self._requests:
            self._shut_down.done()

    def _reap(self, now: float) -> None:
        for entry in list(self._requests.values()):
            complaint = self._complaint(entry.request, now)
            if complaint is None:
                continue
            request = entry.request
            _log.warning(
                "Cleaned up old request",
                session_id=request.session_id,
                request_id=request.request_id,
                reason=complaint,
            )
            if not entry.reaped and not entry.over:
                entry.reaped = True
                if tell(request.session, ReapRequest(request.request_id, complaint)):
                    continue
            # Its session is done with it, or did not get it to stop in a whole interval.
            tell(request.request, Stop(reaped=True))
            if not entry.ended:
                request.kill_again()

    def _complaint(self, request: RequestAccepted, now: float) -> str | None:
        settings = self._settings
        idle = now - request.progress_at()
        if 0 < settings.stale_after <= idle:
            return f"no progress for {idle:.0f} s"
        age = now - request.accepted_at
        if 0 < settings.request_max_age <= age:
            return f"older than {settings.request_max_age:g} s"
        return None


class Supervision:
    """Keeps one supervisor alive, and is where it is looked up.

    Args:
        settings: what the reaper takes for stale.
        on_give_up: called when it failed over `MAX_RESTARTS` times within a minute.
        clock: `time.monotonic`, or a test's.
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
        """Begin to look for stale requests."""
        if self._settings.reap_interval > 0:
            self._reaper = gevent.spawn(self._reap_for_ever)

    def stop(self) -> None:
        """Stop the supervisor."""
        if self._reaper is not None:
            self._reaper.kill()
        self.ref.stop()

    def tell(self, message: SupervisorMessage) -> None:
        """Put a message in the mailbox of whoever is the supervisor now."""
        if isinstance(message, Drain | ShutDown):
            self._leaving.append(message)  # whoever comes next must know
        tell(self.ref, message)

    def census(self) -> Census | None:
        """What is alive; None when the supervisor does not answer."""
        try:
            census: Census = self.ref.ask(TakeCensus(), block=True, timeout=_CENSUS_SECONDS)
        except (pykka.ActorDeadError, pykka.Timeout, ActorFailedError):
            return None
        return census

    def _start_one(self) -> pykka.ActorRef[SupervisorActor]:
        return SupervisorActor.start(self._settings, self._restart)

    def _restart(self, sessions: list[pykka.ActorRef[Any]]) -> None:
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
        for session in sessions:
            if session.is_alive():
                self.tell(SessionStarted(session))
        for name in ("SessionActor", "RequestActor"):  # by name: neither is ours to import
            for ref in pykka.ActorRegistry.get_by_class_name(name):
                tell(ref, RegisterAgain())
        for message in self._leaving:
            tell(self.ref, message)

    def _reap_for_ever(self) -> None:
        while True:
            gevent.sleep(self._settings.reap_interval)
            self.tell(Reap(self._clock()))
