"""One request's way to its client, as its stages and its session use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from actors.words import ErrorCode, InterruptReason, Outcome
from llm.chat.completions import ToolCall, Usage


class Delivered(Struct, frozen=True):
    """What the client got of one answer: what was handed to the kernel in whole.

    Args:
        text: in order.
        calls: function calls that the client was given, in order.
        voice_ms: milliseconds of speech.
    """

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    voice_ms: int = 0

    @property
    def text_chars(self) -> int:
        """Length of the text in Unicode code points."""
        return len(self.text)


class RequestEnd(Struct, frozen=True):
    """How a request ended, as its client is told. There is exactly one for each.

    Args:
        request_id: the client's.
        outcome: how it ended.
        reason: why, where it was interrupted.
        code: what kind of failure, where it failed, was refused or reaped.
        detail: that failure in words for the client.
        finish_reason: the provider's, such as ``stop``.
        usage: tokens; None where no provider had the request.
        wants_speech: whether the client asked to hear the answer, and waits for the end of speech.
    """

    request_id: str
    outcome: Outcome
    reason: InterruptReason | None = None
    code: ErrorCode | None = None
    detail: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    wants_speech: bool = False


class Outlet(Protocol):
    """Takes one answer piece by piece, and keeps what of it was delivered.

    A stage puts pieces in; its session finishes it, or discards what has not left.
    """

    @property
    def delivered(self) -> Delivered:
        """What the client got up to now."""

    @property
    def is_done(self) -> bool:
        """True when the end was handed to the kernel, or cannot be held back any more."""

    def put(self, text: str) -> None:
        """Take a piece of text. May block the stage that calls, and no other."""

    def put_call(self, call: ToolCall, on_sent: Callable[[], None]) -> None:
        """Take a function call, behind all text. May block, too.

        Args:
            call: what the client is to call.
            on_sent: called when the kernel has all of it.
        """

    def finish(self, end: RequestEnd, on_sent: Callable[[], None]) -> None:
        """Take the end of the answer, behind all data.

        Args:
            end: how the request ended.
            on_sent: called when the kernel has all of it; never once the outlet was discarded.
        """

    def discard(self) -> bool:
        """Send nothing from here on, and drop what is queued.

        A frame that was begun is still finished; it counts as delivered already.

        Returns:
            False, and nothing is done, when the end cannot be held back any more.
        """

    def progress_at(self) -> float:
        """`time.monotonic()` of the client's last progress while it is waited for, else 0."""
