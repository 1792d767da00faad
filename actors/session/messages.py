"""What a door tells a session, and what the session tells itself: frozen, matched exhaustively.

Together with `actors/session/port.py`, the other direction, this is all that a door needs to know.
Times are `time.monotonic()` seconds.
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
    """The user asks something; an empty text only changes the session."""

    request_id: str
    text: str
    updates: tuple[SessionUpdate, ...] = ()


class VoiceBegun(Struct, frozen=True):
    """The user begins to speak: the voice of this request follows."""

    request_id: str
    updates: tuple[SessionUpdate, ...] = ()


class VoiceEnded(Struct, frozen=True):
    """The voice of a request has come in whole."""

    request_id: str


class VoiceBroken(Struct, frozen=True):
    """The voice of a request that has begun cannot be used."""

    request_id: str
    code: ErrorCode
    detail: str


class FunctionReturned(Struct, frozen=True):
    """A function of the client returned; with a `request_id` the model is to continue, under it."""

    call_id: str
    result: str
    """As the model is to read it."""
    request_id: str | None = None


class InterruptAsked(Struct, frozen=True):
    """Stop one request, or (no target) all of them.

    Args:
        target: the request's id; None for every live one.
        reason: why.
        heard_chars: how many Unicode code points of the answer the user got, as the client says;
            None where it does not say.
        read_at: when it was read.
        tag: the door's, which comes back with the acknowledgement.
    """

    target: str | None
    reason: InterruptReason
    heard_chars: int | None
    read_at: float
    tag: object = None


class NotUnderstood(Struct, frozen=True):
    """The client said something that the door refuses.

    Args:
        code: what kind of fault it is.
        detail: what exactly is wrong, for the client.
        request_id: of the request that it would have begun, where it has a proper one.
        is_voice: whether voice of that request may follow.
    """

    code: ErrorCode
    detail: str
    request_id: str | None = None
    is_voice: bool = False


class SessionQueried(Struct, frozen=True):
    """The client asks what the session knows of itself. `tag` comes back with the answer."""

    tag: object = None


class DoorAsked(Struct, frozen=True):
    """The client asks the door, not the session. It comes this way so that the answers stay in the
    order of the questions; `tag` comes back when it is time to answer."""

    tag: object = None


class SignOfLife(Struct, frozen=True):
    """The client is there."""


class ClientLeaves(Struct, frozen=True):
    """The client ends the session."""


class ConnectionLost(Struct, frozen=True):
    """Nothing can be read from the client or written to it any more."""

    reason: str


# From itself.


class TerminalWritten(Struct, frozen=True):
    """The terminal frame of a request was handed to the kernel."""

    request_id: str


class TimeIsDue(Struct, frozen=True):
    """The session's timer rang."""


class StopOverdue(Struct, frozen=True):
    """A request that was told to stop has not reported within the time that an ack may wait."""

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
