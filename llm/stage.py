"""A stage: one piece of a request's work, which can be started, and stopped at any point.

A request is a row of stages. Today the row has one, which generates text (`llm/chat`); recognition
of speech would come before it, and speaking after it. The owner of the row closes all of its stages
in one step, and waits for one report from each.
"""

from __future__ import annotations

import enum
from typing import Protocol

from msgspec import Struct

from llm.errors import StreamError
from llm.provider import StopsOnClose


class Ending(enum.Enum):
    """How a stage ended."""

    COMPLETED = "completed"
    CLOSED = "closed"
    """It was closed before it had completed."""
    FAILED = "failed"


class StageResult(Struct, frozen=True):
    """The one report of a stage: its work is over, and its connection is closed or given back.

    Args:
        ending: how it ended.
        error: why it failed; None where it has not.
        closed_at: `time.monotonic()` of the moment when its connection was closed or given back;
            None where it was closed before it had started.
        stops_on_close: what its provider does when the connection closes; None where the provider
            never got the request.
        name: the stage's.
    """

    ending: Ending
    error: StreamError | None = None
    closed_at: float | None = None
    stops_on_close: StopsOnClose | None = None
    name: str = ""


class Stage(Protocol):
    """One stage of a request. It is made with a function `on_end`, and does not start by itself.

    The stage calls `on_end` exactly once, with its `StageResult`. It is called in the hub, so it
    must not block.
    """

    @property
    def name(self) -> str:
        """Which stage this is, such as ``generate``. Its result has the same name."""

    @property
    def progress_at(self) -> float:
        """`time.monotonic()` of the last byte from its provider; before any, of its start."""

    def start(self) -> None:
        """Start, unless `close()` was called before."""

    def close(self) -> None:
        """Stop, at whatever point it is; `on_end` follows.

        Never blocks. Any greenlet may call it, any number of times: only the first call counts.
        """

    def kill_again(self) -> None:
        """The last resort, for a stage that has not ended long after `close()`. Never blocks."""
