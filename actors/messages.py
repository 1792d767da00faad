"""Every mailbox message: frozen, one union per actor, matched exhaustively.

Mailboxes carry control only; tokens go through the outlet. Times are `time.monotonic()` seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pykka
from msgspec import Struct

from gateway.wire.protocol import ClientFrame, ErrorCode, FrameError, InterruptReason
from llm.chat.completions import Prompt
from llm.chat.generation import GenerationResult

# To a session.


class FrameReceived(Struct, frozen=True):
    """The client sent a frame."""

    frame: ClientFrame
    read_at: float


class BadFrameReceived(Struct, frozen=True):
    """The client sent something that was not understood."""

    error: FrameError


class VoiceReceived(Struct, frozen=True):
    """The client sent a binary frame."""

    voice: bytes


class ConnectionLost(Struct, frozen=True):
    """Nothing can be read from the client or written to it any more."""

    reason: str


class Authenticated(Struct, frozen=True):
    """The credentials of REGISTER are right. `client` is whose they are."""

    client: str


class AuthenticationFailed(Struct, frozen=True):
    """The credentials of REGISTER are wrong (`AUTH_FAILED`), or could not be checked."""

    code: ErrorCode
    detail: str


class RequestReported(Struct, frozen=True):
    """A request-actor's one report: its reader is dead and its stream closed."""

    request_id: str
    result: GenerationResult


class TerminalWritten(Struct, frozen=True):
    """The terminal frame of a request was handed to the kernel."""

    request_id: str


class CallWritten(Struct, frozen=True):
    """A function call of the model was handed to the kernel: there is one more in its list."""

    request_id: str


class TimeIsDue(Struct, frozen=True):
    """The session's time says that there is something to do."""


class StopOverdue(Struct, frozen=True):
    """A request that was told to stop has not reported within the time that an ack may wait."""

    request_id: str


class ReapRequest(Struct, frozen=True):
    """The supervisor found a request without progress, or too old."""

    request_id: str
    detail: str


class Leave(Struct, frozen=True):
    """The gateway is to shut down: take no more requests, and say goodbye when none is live, but
    not before a pause, so that not all clients come back at once."""

    pause_seconds: float


class PauseIsOver(Struct, frozen=True):
    """The pause before a goodbye."""


class EndSession(Struct, frozen=True):
    """The gateway shuts down."""

    reason: InterruptReason


class RegisterAgain(Struct, frozen=True):
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


class Start(Struct, frozen=True):
    """Begin: nothing that must end first is left. `prompt` is what the model is asked."""

    prompt: Prompt


class StreamOpened(Struct, frozen=True):
    """The provider answered with an event stream."""


class FirstToken(Struct, frozen=True):
    """The first token of any kind came."""


class Stop(Struct, frozen=True):
    """Stop and close the stream."""

    reaped: bool = False
    reason: str = ""
    """Why, for the log."""


class TerminalSent(Struct, frozen=True):
    """The client has its terminal frame, or is gone: nothing is owed any more."""


class ReaderEnded(Struct, frozen=True):
    """The reader is dead."""

    result: GenerationResult


RequestMessage: TypeAlias = (
    Start | StreamOpened | FirstToken | Stop | TerminalSent | ReaderEnded | RegisterAgain
)

# To the supervisor.


class SessionStarted(Struct, frozen=True):
    """A connection has a session."""

    session: pykka.ActorRef[Any]


class SessionEnded(Struct, frozen=True):
    """A session is over, and so is everything it owed its client."""

    session_urn: str


class RequestAccepted(Struct, frozen=True):
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


class RequestClosed(Struct, frozen=True):
    """The client has its terminal frame, or is gone: the request is live no more."""

    request_urn: str


class GenerationEnded(Struct, frozen=True):
    """A request-actor has ended, and its stream is closed."""

    request_urn: str


class Reap(Struct, frozen=True):
    """Look for stale requests."""

    now: float


class TakeCensus(Struct, frozen=True):
    """Answered with a `Census`."""


class Census(Struct, frozen=True):
    """What is alive.

    `streams` counts generations whose stream is not closed yet, of live requests or not.
    """

    sessions: int
    requests: int
    streams: int


class Drain(Struct, frozen=True):
    """Let every session leave when it has nothing live; `done` is called when none is left.

    The first may leave at once, the last after `spread_seconds`.
    """

    spread_seconds: float
    done: Callable[[], None]


class ShutDown(Struct, frozen=True):
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
    | RequestClosed
    | GenerationEnded
    | Reap
    | TakeCensus
    | Drain
    | ShutDown
)
