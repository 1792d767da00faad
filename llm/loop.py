"""What generations need of the event loop, so that this room imports no scheduler.

In the gateway it is the lanes of the loop: control runs at once, data in short slices. A loop
belongs to one thread, as do all generations that use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import gevent


class Readable(Protocol):
    """Where one reader greenlet at a time waits for a socket."""

    def wait(self) -> None:
        """Suspend the calling greenlet until there is something to read and the loop resumes it.

        Must go through the loop each time, even when something is there already: a provider that
        sends without a pause must not starve everything else.
        """

    def close(self) -> None:
        """Stop watching. Called before the socket is closed."""


class Limit(Protocol):
    """A time limit for a provider. Pauses of the process itself do not count, and what the provider
    has sent is read before the limit counts as passed."""

    since: float
    """`time.monotonic()` of the last progress; infinite while the provider has nothing to do."""

    def start(self) -> None:
        """Start the limit, now."""

    def stop(self) -> None:
        """Stop it for good. May be called more than once."""


class Loop(Protocol):
    """Schedules control before data. Tasks run in the hub, so they must not block."""

    def run_next(self, function: Callable[..., object], *args: Any) -> None:
        """Run before everything else that is ready."""

    def run_after_poll(self, function: Callable[..., object], *args: Any) -> None:
        """Run after the next poll and the control that it brings, before any data."""

    def run_after_acks(self, function: Callable[..., object], *args: Any) -> None:
        """Run after what `run_after_poll` has queued and the control that it triggers, before any
        data."""

    def run_deferred(self, function: Callable[..., object], *args: Any) -> None:
        """Run when no client waits for anything else, in order: for lines of the log."""

    def wait_turn(self) -> None:
        """Suspend the calling greenlet, so that pending control runs before its work."""

    def throw(self, greenlet: gevent.Greenlet[..., Any], error: BaseException) -> None:
        """Raise an error in a greenlet, now. Called in the hub."""

    def readable(self, fileno: int) -> Readable:
        """Make what one reader waits in for the socket of this number."""

    def limit(self, seconds: float, expired: Callable[..., object], *args: Any) -> Limit:
        """Make a time limit; 0 seconds are none. `expired` is called once, in the hub."""
