"""What actors tell one another: frozen, one union per actor, matched exhaustively.

What a door tells a session is in `actors/session/messages.py`.

Mailboxes carry control only; tokens go through the outlet. Times are `time.monotonic()` seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pykka
from msgspec import Struct

from actors.row import Report
from llm.chat.completions import Prompt, ToolCall
from llm.stage import StageResult

# To a session.


class RequestReported(Struct, frozen=True):
    """A request-actor's one report: every stage has ended, and its connection is closed."""

    request_id: str
    report: Report


class CallDelivered(Struct, frozen=True):
    """A function call of the model was handed to the kernel."""

    request_id: str
    call: ToolCall


class ReapRequest(Struct, frozen=True):
    """The supervisor found a request without progress, or too old."""

    request_id: str
    detail: str


class Leave(Struct, frozen=True):
    """The gateway drains: take no more requests, and say goodbye when none is live, but not before
    a pause, so that not all clients come back at once."""

    pause_seconds: float


class EndSession(Struct, frozen=True):
    """The gateway shuts down: stop what is live, and say goodbye."""


# To a request.


class Start(Struct, frozen=True):
    """Begin: nothing that must end first is left. `prompt` is what the model is asked."""

    prompt: Prompt


class StreamOpened(Struct, frozen=True):
    """The provider answered with an event stream."""


class FirstToken(Struct, frozen=True):
    """The first token of any kind came."""


class Stop(Struct, frozen=True):
    """Close every stage. From the reaper for the second time: kill those that have not ended."""

    is_reaped: bool = False
    reason: str = ""
    """Why, for the log."""


class TerminalSent(Struct, frozen=True):
    """The client has its terminal frame, or is gone: nothing is owed to it any more."""


class StagesEnded(Struct, frozen=True):
    """Every stage has ended."""

    results: tuple[StageResult, ...]


class AskProgress(Struct, frozen=True):
    """The supervisor asks for the time of the last progress; `now` comes back with it."""

    now: float


class RegisterAgain(Struct, frozen=True):
    """A new supervisor asks the requests that are alive to register with it."""


RequestMessage: TypeAlias = (
    Start
    | StreamOpened
    | FirstToken
    | Stop
    | TerminalSent
    | StagesEnded
    | AskProgress
    | RegisterAgain
)

# To the supervisor.


class SessionStarted(Struct, frozen=True):
    """A session was registered."""

    session: pykka.ActorRef[Any]


class SessionEnded(Struct, frozen=True):
    """A session is over, and so is everything that it owed its client."""

    session_urn: str


class RequestAccepted(Struct, frozen=True):
    """A request is live from now on."""

    request: pykka.ActorRef[Any]
    session: pykka.ActorRef[Any]
    session_id: str
    request_id: str
    accepted_at: float


class RequestClosed(Struct, frozen=True):
    """The client has its terminal frame, or is gone: the request is live no more."""

    request_urn: str


class GenerationEnded(Struct, frozen=True):
    """Every stage of a request has ended, and its connections are closed."""

    request_urn: str


class ProgressTold(Struct, frozen=True):
    """The answer to `AskProgress`."""

    request_urn: str
    progress_at: float
    now: float


class Reap(Struct, frozen=True):
    """Find stale requests."""

    now: float


class TakeCensus(Struct, frozen=True):
    """Answered with a `Census`."""


class Census(Struct, frozen=True):
    """What is alive.

    `streams` counts requests with a stage that has not ended yet, live or not.
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

    spread_seconds: float
    done: Callable[[], None]


SupervisorMessage: TypeAlias = (
    SessionStarted
    | SessionEnded
    | RequestAccepted
    | RequestClosed
    | GenerationEnded
    | ProgressTold
    | Reap
    | TakeCensus
    | Drain
    | ShutDown
)
