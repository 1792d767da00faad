"""Loops that pause: for long work of a greenlet that no client waits for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import gevent

from actors.loop.lanes import SLICE_SECONDS

_T = TypeVar("_T")

_PAUSE_SECONDS = 0.001
"""More than zero: `gevent.sleep(0)` returns before the loop has polled its sockets."""


def in_slices(items: Iterable[_T]) -> Iterator[_T]:
    """Yield the items, and sleep for a moment after each 0.3 ms, so that interrupts get through.

    The time counts that it takes to make an item, and what the caller does with it. Not for the
    hub, which cannot sleep.
    """
    until = time.monotonic() + SLICE_SECONDS
    for item in items:
        yield item
        if time.monotonic() > until:
            gevent.sleep(_PAUSE_SECONDS)
            until = time.monotonic() + SLICE_SECONDS
