"""Every mailbox message: frozen, one union per actor, matched exhaustively.

Mailboxes carry control only; tokens go through the outlet. Times are `time.monotonic()` seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pykka

from gateway.protocol import ClientFrame, ErrorCode, FrameError, InterruptReason
from llm.chat import Prompt
from llm.stream import Result

# To a session.


@dataclass(frozen=True, slots=True)
class FrameReceived:
    """The client sent a frame."""

    frame: ClientFrame
    read_at: float


@dataclass(frozen=True, slots=True)
class BadFrameReceived:
    """The client sent something that was not understood."""

    error: FrameError


@dataclass(frozen=True, slots=True)
class VoiceReceived:
    """The client sent a binary frame."""

    voice: bytes


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Nothing can be read from the client or written to it any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class Authenticated:
    """The credentials of REGISTER are right. `client` is whose they are."""

    client: str


@dataclass(frozen=True, slots=True)
class AuthenticationFailed:
    """The credentials of REGISTER are wrong (`AUTH_FAILED`), or could not be checked."""

    code: ErrorCode
    detail: str


@dataclass(frozen=True, slots=True)
class RequestReported:
    """A request-actor's one report: its reader is dead and its stream closed."""

    request_id: str
    result: Result


@dataclass(frozen=True, slots=True)
class TerminalWritten:
    """The terminal frame of a request was handed to the kernel."""

    request_id: str


@dataclass(frozen=True, slots=True)
class CallWritten:
    """A function call of the model was handed to the kernel: there is one more in its list."""

    request_id: str


@dataclass(frozen=True, slots=True)
class TimeIsDue:
    """The session's time says that there is something to do."""


@dataclass(frozen=True, slots=True)
class StopOverdue:
    """A request that was told to stop has not reported within the time that an ack may wait."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ReapRequest:
    """The supervisor found a request without progress, or too old."""

    request_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class Leave:
    """The gateway is to shut down: take no more requests, and say goodbye when none is live, but
    not before a pause, so that not all clients come back at once."""

    pause_seconds: float


@dataclass(frozen=True, slots=True)
class PauseIsOver:
    """The pause before a goodbye."""


@dataclass(frozen=True, slots=True)
class EndSession:
    """The gateway shuts down."""

    reason: InterruptReason


@dataclass(frozen=True, slots=True)
class RegisterAgain:
    """A new supervisor asks those alive for their names."""


SessionMessage: TypeAlias = (
    FrameReceived
    | BadFrameReceived
    | VoiceReceived
    | ConnectionLost
    | Authenticated
    | AuthenticationFailed
    | RequestReported
    | TerminalWritten
    | CallWritten
    | TimeIsDue
    | StopOverdue
    | ReapRequest
    | Leave
    | PauseIsOver
    | EndSession
    | RegisterAgain
)

# To a request.


@dataclass(frozen=True, slots=True)
class Start:
    """Begin: nothing that must end first is left. `prompt` is what the model is asked."""

    prompt: Prompt


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The provider answered with an event stream."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of any kind came."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop and close the stream."""

    reaped: bool = False
    reason: str = ""
    """Why, for the log."""


@dataclass(frozen=True, slots=True)
class Release:
    """The client has its terminal frame, or is gone: nothing is owed any more."""


@dataclass(frozen=True, slots=True)
class ReaderEnded:
    """The reader is dead."""

    result: Result


RequestMessage: TypeAlias = (
    Start | StreamOpened | FirstToken | Stop | Release | ReaderEnded | RegisterAgain
)

# To the supervisor.


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """A connection has a session."""

    session: pykka.ActorRef[Any]


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session is over, and so is everything it owed its client."""

    session_urn: str


@dataclass(frozen=True, slots=True)
class RequestAccepted:
    """A request is live from now on.

    `progress_at` gives the time of its last progress, and `kill_again` is the last resort against
    a reader that outlives its stop.
    """

    request: pykka.ActorRef[Any]
    session: pykka.ActorRef[Any]
    session_id: str
    request_id: str
    accepted_at: float
    progress_at: Callable[[], float]
    kill_again: Callable[[], None]


@dataclass(frozen=True, slots=True)
class RequestOver:
    """The client has its terminal frame, or is gone: the request is live no more."""

    request_urn: str


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """A request-actor has ended, and its stream is closed."""

    request_urn: str


@dataclass(frozen=True, slots=True)
class Reap:
    """Look for stale requests."""

    now: float


@dataclass(frozen=True, slots=True)
class TakeCensus:
    """Answered with a `Census`."""


@dataclass(frozen=True, slots=True)
class Census:
    """What is alive.

    `streams` counts generations whose stream is not closed yet, of live requests or not.
    """

    sessions: int
    requests: int
    streams: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Let every session leave when it has nothing live; `done` is called when none is left.

    The first may leave at once, the last after `spread_seconds`.
    """

    spread_seconds: float
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class ShutDown:
    """End every session in order; `done` is called when none is left.

    The first may be told at once, the last after `spread_seconds`.
    """

    reason: InterruptReason
    spread_seconds: float
    done: Callable[[], None]


SupervisorMessage: TypeAlias = (
    SessionStarted
    | SessionEnded
    | RequestAccepted
    | RequestOver
    | GenerationEnded
    | Reap
    | TakeCensus
    | Drain
    | ShutDown
)
