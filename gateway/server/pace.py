"""How many frames a second are read from a client, or from many together."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_SECONDS = 1.0
"""The longest pause. Where many share a pace, each new one would make the pause longer, and those
that wait would take memory without a bound. What is owed beyond this is forgiven."""


class Pace:
    """A token bucket: a rate that may be exceeded for a moment, and then is made up for.

    Args:
        per_second: how many a second, in the long run.
        burst: how many may come at once.
        clock: returns seconds.
    """

    def __init__(
        self, per_second: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left = burst
        self._at = clock()

    def take(self, count: int) -> float:
        """Count so many, and return for how many seconds none should follow, at most `MAX_SECONDS`;
        0: they may."""
        now = self._clock()
        earned = min(self._burst, self._left + (now - self._at) * self._per_second)
        self._left = max(earned - count, -MAX_SECONDS * self._per_second)
        self._at = now
        return max(0.0, -self._left / self._per_second)
