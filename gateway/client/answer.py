"""What comes back for one request."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from msgspec import UNSET

from .envelope import Frame
from .errors import AnswerEnded
from .frames import Error, FunctionCall, Outcome, Response, Usage

T = TypeVar("T")


class _Waiting(Protocol):
    def wait(self, look: Callable[[], T | None], what: str, timeout: float | None = None) -> T:
        """Read frames until `look` finds something."""


@dataclass(frozen=True, slots=True)
class Collected:
    """An answer that has ended."""

    request_id: str
    text: str
    outcome: Outcome
    finish_reason: str | None
    """The provider's; None where it gave none."""
    usage: Usage | None
    function_calls: list[FunctionCall]
    error: Error | None
    """Why it failed."""
    interrupt_reason: str | None
    """Why it was interrupted."""


@dataclass(eq=False)
class Answer:
    """The frames of one request: those with its own `request_id`, and no others.

    Iterating gives its pieces of text as they come, up to its end. Each piece is a wait of its own,
    with the session's timeout.
    """

    request_id: str
    _session: _Waiting = field(repr=False)
    asked_at: float = 0.0
    """`time.monotonic()` when its request was sent."""
    frames: list[Frame] = field(default_factory=list, repr=False)
    """All that were read so far."""
    pieces: list[Frame] = field(default_factory=list, repr=False)
    """Those before its end: text and function calls."""
    texts: list[Frame] = field(default_factory=list, repr=False)
    """Those with text in them."""
    ends: list[Frame] = field(default_factory=list, repr=False)
    """Its terminal frames; a gateway sends exactly one."""
    end: Response | Error | None = field(default=None, repr=False)
    """The payload of its first terminal frame; None while it is live."""
    function_calls: list[FunctionCall] = field(default_factory=list, repr=False)
    """Those that were read so far."""
    _texts: list[str] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """The text that was read so far."""
        return "".join(self._texts)

    @property
    def ended(self) -> bool:
        """Whether its terminal frame was read."""
        return self.end is not None

    def wait_text(self, chars: int = 1, *, timeout: float | None = None) -> str:
        """Wait until there is text.

        Args:
            chars: how many code points at least.
            timeout: seconds; None is the session's own.

        Returns:
            All of its text so far.

        Raises:
            AnswerEnded: it ended with less.
            WaitTimeout, ConnectionEnded: as every wait.
        """

        def look() -> str | None:
            text = self.text
            if len(text) < chars and self.ended:
                raise AnswerEnded(
                    f"{self.request_id} ended with {len(text)} characters of text, waiting for "
                    f"{chars}: {self.end}"
                )
            return text if len(text) >= chars else None

        return self._session.wait(look, f"{chars} characters of {self.request_id}", timeout)

    def __iter__(self) -> Iterator[str]:
        for seen in itertools.count():

            def look(seen: int = seen) -> list[Frame] | None:
                more = self.texts[seen : seen + 1]
                return more if more or self.ended else None

            piece = self._session.wait(look, f"more text of {self.request_id}")
            if not piece:
                return
            yield piece[0].text

    def collect(self, *, timeout: float | None = None) -> Collected:
        """Wait for its end.

        Args:
            timeout: seconds for all of it; None is the session's own.

        Raises:
            WaitTimeout, ConnectionEnded: as every wait.
        """
        self._session.wait(lambda: self.end and True, f"the end of {self.request_id}", timeout)
        last = self.end
        assert last is not None
        return Collected(
            request_id=self.request_id,
            text=self.text,
            outcome=Outcome.FAILED if last.outcome is UNSET else last.outcome,
            finish_reason=None if last.finish_reason is UNSET else last.finish_reason,
            usage=None if last.usage is UNSET else last.usage,
            function_calls=self.function_calls.copy(),
            error=last if isinstance(last, Error) else None,
            interrupt_reason=last.interrupt_reason or None if isinstance(last, Response) else None,
        )

    def add(self, frame: Frame) -> None:
        """Take in a frame of this request."""
        self.frames.append(frame)
        match frame.payload:
            case Response(text_stream_seq=-1) | Error() as payload:
                self.ends.append(frame)
                self.end = self.end or payload
            case Response() as payload:
                self.pieces.append(frame)
                if payload.function_call is not UNSET:
                    self.function_calls.append(payload.function_call)
                if frame.text:
                    self.texts.append(frame)
                    self._texts.append(frame.text)
