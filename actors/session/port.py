"""What a session says to its client, independent of any protocol.

A *door* implements `Port` for one protocol (`gateway/wire` has wire protocol 1.0). It also turns
what the client says into the messages of `actors/session/messages.py`. Frames, sequence numbers and
close codes exist only in the door: a new protocol needs a new door, and no change here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from actors.outlet import Outlet, RequestEnd
from actors.session.profile import Profile
from actors.words import AckStatus, ErrorCode, InterruptOutcome, InterruptReason
from llm.provider import StopsOnClose


class Goodbye(Struct, frozen=True):
    """Why a session ends, and whether its client should come back.

    Args:
        reason: the interrupt reason of requests that are still live.
        text: the reason in a few words, for the client and the log.
        should_return: whether the client should connect again.
    """

    reason: InterruptReason
    text: str
    should_return: bool = False


CLIENT_LEFT = Goodbye(InterruptReason.CLIENT_SHUTDOWN, "CLIENT_SHUTDOWN")
SESSION_EXPIRED = Goodbye(InterruptReason.SESSION_TIMEOUT, "session timeout")
SERVER_RESTART = Goodbye(InterruptReason.SERVER_SHUTDOWN, "SERVER_SHUTDOWN", should_return=True)
CONNECTION_LOST = Goodbye(InterruptReason.CONNECTION_LOST, "connection lost", should_return=True)


class InterruptResult(Struct, frozen=True):
    """What an interrupt did to one request.

    Args:
        request_id: the id that the client gave the request.
        outcome: what the interrupt did.
        delivered_text_chars: how many Unicode code points of the answer the client got.
        stream_closed_ms: milliseconds from reading the interrupt until the last connection to a
            provider was closed; None if there was none, or it is still open.
        stops_on_close: whether the provider stops generating when its connection is closed; None if
            no provider received the request.
    """

    request_id: str
    outcome: InterruptOutcome
    delivered_text_chars: int = 0
    stream_closed_ms: float | None = None
    stops_on_close: StopsOnClose | None = None


class InterruptDone(Struct, frozen=True):
    """The outcome of an interrupt.

    Args:
        results: one for each target; empty if no request was live.
        tag: the tag that the door gave the interrupt.
    """

    results: tuple[InterruptResult, ...]
    tag: object = None

    @property
    def stopped(self) -> list[str]:
        """The ids of the requests that the interrupt stopped."""
        return [one.request_id for one in self.results if one.outcome is InterruptOutcome.STOPPED]

    @property
    def status(self) -> AckStatus:
        """Whether the interrupt stopped all of its targets, some of them, or none."""
        stopped = len(self.stopped)
        if not stopped:
            return AckStatus.FAILED
        return AckStatus.SUCCESS if stopped == len(self.results) else AckStatus.PARTIAL


class SessionFacts(Struct, frozen=True):
    """The answer to a question about the session.

    Args:
        profile: what the client registered, with all updates since.
        created_ms: when the session was registered, in milliseconds since the epoch.
        remaining_seconds: whole seconds until the session ends without a sign of life; 0: never.
    """

    profile: Profile
    created_ms: int
    remaining_seconds: int


class Port(Protocol):
    """The client that is attached to a session. No method blocks.

    The session passes the `tag` of a message back with the answer, and does not read it.
    """

    def open_outlet(self, request_id: str) -> Outlet:
        """Make the outlet for the answer of a request."""

    def session_opened(self, session_id: str, timeout_seconds: float) -> None:
        """The session is registered. It ends after `timeout_seconds` without a sign of life; 0:
        never."""

    def request_ended(self, end: RequestEnd) -> None:
        """Tell the client that a request ended that was stopped or never started. (The end of any
        other request goes through its outlet.)"""

    def interrupt_done(self, done: InterruptDone, on_sent: Callable[[float], None]) -> None:
        """Acknowledge an interrupt.

        Args:
            done: what the interrupt did.
            on_sent: called with `time.monotonic()` once the kernel has the acknowledgement.
        """

    def refused(self, code: ErrorCode, detail: str) -> None:
        """Refuse a message of the client. This ends no request."""

    def session_described(self, facts: SessionFacts, tag: object) -> None:
        """Answer a question about the session."""

    def door_answers(self, tag: object) -> None:
        """It is time to answer the question to the door (`DoorAsked`) with this tag."""

    def sign_of_life_wanted(self, remaining_seconds: int) -> None:
        """Ask the client for a sign of life."""

    def time_nearly_up(self, remaining_seconds: int) -> None:
        """Warn the client that the session ends soon."""

    def voice_unwanted(self, request_id: str) -> None:
        """Ignore the rest of the voice of this request."""

    def goodbye(self, goodbye: Goodbye) -> None:
        """Tell the client that the session ends, and close the connection."""

    def session_failed(self) -> None:
        """The session failed: close the connection without a goodbye."""


class NoClient:
    """The port of a detached session. It drops everything."""

    def open_outlet(self, request_id: str) -> Outlet:
        """Must not be called: a detached session accepts no request."""
        raise RuntimeError(f"{request_id!r} was accepted without a client")

    def session_opened(self, session_id: str, timeout_seconds: float) -> None:
        pass

    def request_ended(self, end: RequestEnd) -> None:
        pass

    def interrupt_done(self, done: InterruptDone, on_sent: Callable[[float], None]) -> None:
        pass

    def refused(self, code: ErrorCode, detail: str) -> None:
        pass

    def session_described(self, facts: SessionFacts, tag: object) -> None:
        pass

    def door_answers(self, tag: object) -> None:
        pass

    def sign_of_life_wanted(self, remaining_seconds: int) -> None:
        pass

    def time_nearly_up(self, remaining_seconds: int) -> None:
        pass

    def voice_unwanted(self, request_id: str) -> None:
        pass

    def goodbye(self, goodbye: Goodbye) -> None:
        pass

    def session_failed(self) -> None:
        pass


class Client:
    """The client of a session, attached or detached.

    Args:
        port: the port through which it is attached.
    """

    def __init__(self, port: Port) -> None:
        self.port = port

    def detach(self) -> None:
        """The connection was lost: from now on, drop what the session says."""
        self.port = NoClient()
