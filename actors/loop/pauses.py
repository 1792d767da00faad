"""Pauses of the process itself: times in which the event loop did not run.

A process that is stopped (SIGSTOP, a frozen container, a stalled machine), or that is busy with one
thing for a second, can neither hear its peers nor answer them. When it runs again, the timers that
expired meanwhile fire at once. A time limit for a peer must not count that time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

BEAT_SECONDS = 0.25
"""How often the loop calls `beat`."""

MIN_PAUSE_SECONDS = 1.0
"""A beat this late was a pause. No callback of the gateway takes that long. After a shorter one, it
is enough that every limit looks at the sockets once more before it counts (`limit.py`)."""

_MAX_PAUSES = 64
"""How many pauses are remembered. Older ones count as time that the process ran."""


class Pauses:
    """Notes the pauses of one event loop, which calls `beat` every `BEAT_SECONDS`.

    Every question calls it, too. So the answer is right even before the first beat that follows a
    pause.

    Args:
        clock: gives the time in seconds; `time.monotonic`, or a test's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beat_at = clock()
        self._pauses: deque[tuple[float, float]] = deque(maxlen=_MAX_PAUSES)
        """When each began and ended. A pause begins with the last beat before it: it counts for up
        to `BEAT_SECONDS` more than it took."""
        self._total_seconds = 0.0

    def beat(self) -> None:
        """Note that the loop runs."""
        now = self._clock()
        if now - self._beat_at >= MIN_PAUSE_SECONDS:
            self._pauses.append((self._beat_at, now))
            self._total_seconds += now - self._beat_at
        self._beat_at = now

    def seconds_between(self, since: float, until: float) -> float:
        """How many seconds of this time were pauses.

        Args:
            since: `time.monotonic()`.
            until: `time.monotonic()`.
        """
        self.beat()
        # Most questions are about a time after the last pause.
        if not self._pauses or self._pauses[-1][1] <= since:
            return 0.0
        return sum(max(0.0, min(end, until) - max(begin, since)) for begin, end in self._pauses)

    @property
    def total_seconds(self) -> float:
        """How many seconds all pauses so far have taken."""
        self.beat()
        return self._total_seconds
