"""The messages to a session, from its door and from itself: frozen, matched exhaustively.

A door needs only these and `actors/session/port.py`, which is the other direction. Times are
`time.monotonic()` seconds.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from actors.messages import (
    CallDelivered,
    EndSession,
    Leave,
    ReapRequest,
    RequestReported,
)
from actors.session.profile import SessionUpdate
from actors.words import ErrorCode, InterruptReason

# From a door: what the client said.


class RequestAsked(Struct, frozen=True):
    """The user asks something. With an empty text, the request only updates the session."""

    request_id: str
    text: str
    updates: tuple[SessionUpdate, ...] = ()


class VoiceBegun(Struct, frozen=True):
    """The user begins to speak. The voice of this request follows."""

    request_id: str
    updates: tuple[SessionUpdate, ...] = ()


class VoiceEnded(Struct, frozen=True):
    """The voice of a request is complete."""

    request_id: str


class VoiceBroken(Struct, frozen=True):
    """The voice of a request broke off or is invalid, after `VoiceBegun`."""

    request_id: str
    code: ErrorCode
    detail: str


class FunctionReturned(Struct, frozen=True):
    """A function of the client returned. With a `request_id`, the model continues the answer as a
    new request of that id."""

    call_id: str
    result: str
    """The text that the model gets."""
    request_id: str | None = None


class InterruptAsked(Struct, frozen=True):
    """Stop one request or all of them.

    Args:
        target: the id of the request; None: every live request.
        reason: why.
        heard_chars: how many Unicode code points of the answer the user got, according to the
            client; None if the client does not say.
        read_at: when the interrupt was read.
        tag: chosen by the door; the acknowledgement carries it back.
    """

    target: str | None
    reason: InterruptReason
    heard_chars: int | None
    read_at: float
    tag: object = None


class NotUnderstood(Struct, frozen=True):
    """The door refuses a message of the client.

    Args:
        code: the kind of fault.
        detail: what exactly is wrong, for the client.
        request_id: the id of the request that the message would have begun; None if it would begin
            none, or the id is not valid.
        is_voice: whether voice of that request may follow.
    """

    code: ErrorCode
    detail: str
    request_id: str | None = None
    is_voice: bool = False


class SessionQueried(Struct, frozen=True):
    """The client asks for the session's data. The answer carries `tag` back."""

    tag: object = None


class DoorAsked(Struct, frozen=True):
    """The client asks something that the door answers. It goes through the session, so that answers
    keep the order of the questions. `tag` comes back when it is time to answer."""

    tag: object = None


class SignOfLife(Struct, frozen=True):
    """The client has shown that it is still there."""


class ClientLeaves(Struct, frozen=True):
    """The client ends the session."""


class ConnectionLost(Struct, frozen=True):
    """The connection to the client is closed or broken."""

    reason: str


# From itself.


class TerminalWritten(Struct, frozen=True):
    """The terminal frame of a request was handed to the kernel."""

    request_id: str


class TimeIsDue(Struct, frozen=True):
    """The session's timer has expired."""


class StopOverdue(Struct, frozen=True):
    """A request was told to stop, and has not reported within the time that an ack may wait."""

    request_id: str


class PauseIsOver(Struct, frozen=True):
    """The pause before a goodbye is over."""


SessionMessage: TypeAlias = (
    RequestAsked
    | VoiceBegun
    | VoiceEnded
    | VoiceBroken
    | FunctionReturned
    | InterruptAsked
    | NotUnderstood
    | SessionQueried
    | DoorAsked
    | SignOfLife
    | ClientLeaves
    | ConnectionLost
    | RequestReported
    | CallDelivered
    | TerminalWritten
    | TimeIsDue
    | StopOverdue
    | ReapRequest
    | Leave
    | PauseIsOver
    | EndSession
)
