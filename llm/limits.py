"""Time limits for a block of code that waits for a provider."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import gevent

from llm.loop import Loop


class _TimeIsUp(BaseException):
    """Ends a block of `at_most`."""


@contextlib.contextmanager
def limited(loop: Loop, seconds: float, error: BaseException) -> Iterator[None]:
    """Raise the error in the block when its time is up.

    Args:
        loop: measures the time.
        seconds: the limit; 0 is none.
        error: what to raise.
    """
    limit = loop.limit(seconds, gevent.getcurrent().throw, error)
    limit.start()
    try:
        yield
    finally:
        limit.stop()


@contextlib.contextmanager
def at_most(loop: Loop, seconds: float) -> Iterator[None]:
    """Leave the block when its time is up, without an error.

    Args:
        loop: measures the time.
        seconds: the limit; 0 is none.
    """
    time_is_up = _TimeIsUp()
    limit = loop.limit(seconds, gevent.getcurrent().throw, time_is_up)
    limit.start()
    try:
        yield
    except _TimeIsUp as raised:
        if raised is not time_is_up:
            raise
        time_is_up.__traceback__ = None  # it refers to this frame: leave no cycle
    finally:
        limit.stop()
