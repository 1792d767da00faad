"""How many frames a second are read from a client, or from many together."""

from __future__ import annotations

import time
from collections.abc import Callable


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
        """Count so many, and return for how many seconds none should follow; 0: they may."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_second) - count
        self._at = now
        return max(0.0, -self._left / self._per_second)
