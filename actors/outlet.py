"""The outlet of a request: where its stages put the answer, and what was delivered of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from actors.words import ErrorCode, InterruptReason, Outcome
from llm.chat.completions import ToolCall, Usage


class Delivered(Struct, frozen=True):
    """What the client got of one answer: the frames that were handed to the kernel completely.

    Args:
        text: the text of those frames, in order.
        calls: the function calls in those frames, in order.
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
    """The end of a request, as reported to the client. Each request has exactly one.

    Args:
        request_id: the id that the client gave the request.
        outcome: how it ended.
        reason: why it was interrupted; None if it was not.
        code: the kind of failure, if it failed, was refused or was reaped; else None.
        detail: a description of the failure for the client.
        finish_reason: the provider's finish reason, such as ``stop``.
        usage: the tokens used; None if no provider received the request.
        wants_speech: whether the client asked for speech, and so waits for the end of it.
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
    """Takes one answer piece by piece, and keeps account of what was delivered.

    Stages put pieces in. The session finishes the answer, or discards what was not sent yet.
    """

    @property
    def delivered(self) -> Delivered:
        """What the client has got so far."""

    @property
    def is_done(self) -> bool:
        """True once the end was handed to the kernel, or can no longer be held back."""

    def put(self, text: str) -> None:
        """Send a piece of text. Blocks the calling stage, and only that, while the client is
        behind."""

    def put_call(self, call: ToolCall, on_sent: Callable[[], None]) -> None:
        """Send a function call, after all text. May block, like `put`.

        Args:
            call: the function call.
            on_sent: called once the kernel has the whole frame.
        """

    def finish(self, end: RequestEnd, on_sent: Callable[[], None]) -> None:
        """Send the end of the answer, after all data.

        Args:
            end: how the request ended.
            on_sent: called once the kernel has the whole frame; never after `discard()`.
        """

    def discard(self) -> bool:
        """Drop what is queued, and send nothing more.

        A frame of which the kernel has a part is still completed, and counts as delivered at once.

        Returns:
            False if `is_done`; then nothing has changed.
        """

    def progress_at(self) -> float:
        """`time.monotonic()` when the client last took data, while the outlet waits for it; else
        0."""
