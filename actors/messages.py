"""The messages that actors send each other: frozen, one union per actor, matched exhaustively.

The messages from a door to a session are in `actors/session/messages.py`.

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
    """The one report of a request-actor: every stage has ended, and its connection is closed."""

    request_id: str
    report: Report


class CallDelivered(Struct, frozen=True):
    """A function call was handed to the kernel, on its way to the client."""

    request_id: str
    call: ToolCall


class ReapRequest(Struct, frozen=True):
    """The supervisor found a request that makes no progress or is too old."""

    request_id: str
    detail: str


class Leave(Struct, frozen=True):
    """The gateway drains: accept no more requests, and say goodbye once none is live and
    `pause_seconds` have passed. The pause differs per session, so that clients do not all reconnect
    at the same moment."""

    pause_seconds: float


class EndSession(Struct, frozen=True):
    """The gateway shuts down: stop every live request, then say goodbye."""


# To a request.


class Start(Struct, frozen=True):
    """Start generating: every request that must end first has ended. `prompt` goes to the model."""

    prompt: Prompt


class StreamOpened(Struct, frozen=True):
    """The provider answered with an event stream."""


class FirstToken(Struct, frozen=True):
    """The first token arrived: of text, or of a function call."""


class Stop(Struct, frozen=True):
    """Close every stage. When the reaper sends it a second time: kill the stages that still run."""

    is_reaped: bool = False
    reason: str = ""
    """The reason, for the log."""


class TerminalSent(Struct, frozen=True):
    """The terminal frame was sent, or the client is gone: the session is done with the request."""


class StagesEnded(Struct, frozen=True):
    """Every stage has ended."""

    results: tuple[StageResult, ...]


class AskProgress(Struct, frozen=True):
    """The supervisor asks when the request last made progress. The answer carries `now` back."""

    now: float


class RegisterAgain(Struct, frozen=True):
    """A restarted supervisor asks every running request to register again."""


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
    """A session is over: its client has had everything that the session had to send."""

    session_urn: str


class RequestAccepted(Struct, frozen=True):
    """A request became live."""

    request: pykka.ActorRef[Any]
    session: pykka.ActorRef[Any]
    session_id: str
    request_id: str
    accepted_at: float


class RequestClosed(Struct, frozen=True):
    """The terminal frame was sent, or the client is gone: the request is no longer live."""

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
    """Look for stale requests. Times are compared with `now`."""

    now: float


class TakeCensus(Struct, frozen=True):
    """Answered with a `Census`."""


class Census(Struct, frozen=True):
    """How many sessions, live requests and streams there are.

    `streams` counts the requests with a stage that still runs, whether or not they are live.
    """

    sessions: int
    requests: int
    streams: int


class Drain(Struct, frozen=True):
    """Let every session leave once it has no live request. Calls `done` when no session is left.

    Each session waits for a random time of at most `spread_seconds` first.
    """

    spread_seconds: float
    done: Callable[[], None]


class ShutDown(Struct, frozen=True):
    """End every session. Calls `done` when no session and no running stage is left.

    Each session is told after a random time of at most `spread_seconds`.
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
