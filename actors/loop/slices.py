"""Work that nobody waits for, done in slices, so that an interrupt need not wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import gevent

_T = TypeVar("_T")

_SLICE_SECONDS = 0.0003
"""As long as the loop hands on data between two looks for control (`actors/loop/lanes.py`)."""

_PAUSE_SECONDS = 0.001
"""A real one: `sleep(0)` comes back before the loop has looked at its sockets."""


def in_slices(items: Iterable[_T]) -> Iterator[_T]:
    """Go through the items, and let everybody else have a turn now and then.

    The time counts that making an item takes, and what the caller does with it. Not for the hub,
    which cannot wait.
    """
    until = time.monotonic() + _SLICE_SECONDS
    for item in items:
        yield item
        if time.monotonic() > until:
            gevent.sleep(_PAUSE_SECONDS)
            until = time.monotonic() + _SLICE_SECONDS
