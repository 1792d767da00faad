"""A stage: one piece of work for a request that can be started, and stopped at any point.

A request is a row of stages. Today the row has one, the generation of text (`llm/chat`);
recognition of speech would come before it and speech behind it. Whoever owns the row closes every
stage of it in one step, and waits for the reports.
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
    """It was told to close before it had completed."""
    FAILED = "failed"


class StageResult(Struct, frozen=True):
    """The one report of a stage: its work is over and its connection is closed.

    Args:
        ending: how it ended.
        error: why it failed; None where it did not.
        closed_at: `time.monotonic()` of the moment its connection was closed or given back; None
            where it never had one.
        stops_on_close: what its provider does when the connection closes; None where the provider
            did not have the request.
        name: which stage it is.
    """

    ending: Ending
    error: StreamError | None = None
    closed_at: float | None = None
    stops_on_close: StopsOnClose | None = None
    name: str = ""


class Stage(Protocol):
    """One stage of a request, not started when it is made.

    Whoever makes it passes `on_end`, which the stage calls exactly once with its `StageResult`:
    in the hub, so it must not block.
    """

    @property
    def name(self) -> str:
        """A word for logs, metrics and the state dump, such as ``generate``."""

    @property
    def progress_at(self) -> float:
        """`time.monotonic()` of the last byte from its provider, or of its start."""

    def start(self) -> None:
        """Begin, unless it was closed before."""

    def close(self) -> None:
        """Stop, at whatever point it is. Never blocks; any greenlet may call it, any number of
        times. `on_end` follows."""

    def kill_again(self) -> None:
        """The last resort for a stage that has not ended long after its `close()`."""
