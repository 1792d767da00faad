"""What a session says to its client, in the session's own words.

A *door* implements `Port` for one protocol (`gateway/wire` has wire protocol 1.0), and turns what
the client says into those of `messages.py` beside this file. Frames, sequence numbers and close
codes exist in the door only: a new protocol is a new door, and no change here.
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
    """Why a session ends, and what its client should do then.

    Args:
        reason: why requests that are still live are stopped.
        text: the reason in a word or two, for the client and the log.
        should_return: whether the client is welcome to connect again.
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
        request_id: the client's.
        outcome: what it did.
        delivered_text_chars: Unicode code points of the answer that the client got.
        stream_closed_ms: from reading the interrupt until the last stage's connection was closed;
            None where there was none.
        stops_on_close: what the provider does then, where it had the request.
    """

    request_id: str
    outcome: InterruptOutcome
    delivered_text_chars: int = 0
    stream_closed_ms: float | None = None
    stops_on_close: StopsOnClose | None = None


class InterruptDone(Struct, frozen=True):
    """An interrupt has done what it could.

    Args:
        results: one for each target; none where nothing was live.
        tag: the door's, as it came with the interrupt.
    """

    results: tuple[InterruptResult, ...]
    tag: object = None

    @property
    def stopped(self) -> list[str]:
        """The ids of the requests that it stopped."""
        return [one.request_id for one in self.results if one.outcome is InterruptOutcome.STOPPED]

    @property
    def status(self) -> AckStatus:
        """Whether it stopped all of its targets, some, or none."""
        stopped = len(self.stopped)
        if not stopped:
            return AckStatus.FAILED
        return AckStatus.SUCCESS if stopped == len(self.results) else AckStatus.PARTIAL


class SessionFacts(Struct, frozen=True):
    """What a session tells of itself.

    Args:
        profile: what the client registered, and changed since.
        created_ms: when it was registered, in milliseconds since the epoch.
        remaining_seconds: whole seconds until it ends without a sign of life; 0 for never.
    """

    profile: Profile
    created_ms: int
    remaining_seconds: int


class Port(Protocol):
    """The client that is attached to a session. Nothing here blocks.

    The `tag` of a message from the door comes back with the answer to it, unread.
    """

    def open_outlet(self, request_id: str) -> Outlet:
        """Make the way of one answer to the client."""

    def session_opened(self, session_id: str, timeout_seconds: float) -> None:
        """The session stands. It ends after so long without a sign of life; 0 is never."""

    def request_ended(self, end: RequestEnd) -> None:
        """A request ended, and its outlet does not carry that: it was stopped, or never began."""

    def interrupt_done(self, done: InterruptDone, on_sent: Callable[[float], None]) -> None:
        """Acknowledge an interrupt.

        Args:
            done: what it did.
            on_sent: called with `time.monotonic()` when the kernel has the acknowledgement.
        """

    def refused(self, code: ErrorCode, detail: str) -> None:
        """Refuse something that the client said. No request ends with it."""

    def session_described(self, facts: SessionFacts, tag: object) -> None:
        """Answer a question about the session."""

    def door_answers(self, tag: object) -> None:
        """It is time to answer what the client asked the door."""

    def sign_of_life_wanted(self, remaining_seconds: int) -> None:
        """Ask the client for a sign of life."""

    def time_nearly_up(self, remaining_seconds: int) -> None:
        """Warn the client that the session ends soon."""

    def voice_unwanted(self, request_id: str) -> None:
        """Ignore what still comes of the voice of this request."""

    def goodbye(self, goodbye: Goodbye) -> None:
        """Say the last word, and close."""

    def session_failed(self) -> None:
        """Close without a word: the gateway failed."""


class NoClient:
    """The port of a detached session: what it says is lost."""

    def open_outlet(self, request_id: str) -> Outlet:
        """Never called: a detached session accepts no request."""
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
    """The client of a session: attached through a door, or away.

    Args:
        port: the door.
    """

    def __init__(self, port: Port) -> None:
        self.port = port

    def detach(self) -> None:
        """The connection was lost: what is said from now on is dropped."""
        self.port = NoClient()
