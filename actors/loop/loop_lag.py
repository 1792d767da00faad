"""How late the event loop is: everything in the process waits at least as long."""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent
from prometheus_client import Histogram

INTERVAL_SECONDS = 0.1
"""Between two ticks. Any stall of 100 ms is seen, and ten wake-ups a second cost little."""

_MAX_TICKS = 100
"""Counted for one stall, at most. After more (a suspended machine) the schedule starts again."""


class LoopLag:
    """Wakes up at fixed times, and records how late each wake-up was.

    Args:
        lag_seconds: gets the delays, in seconds.
        clock: gives the time in seconds; `time.monotonic`, or a test's.
    """

    def __init__(self, lag_seconds: Histogram, clock: Callable[[], float] = time.monotonic) -> None:
        self._lag_seconds = lag_seconds
        self._clock = clock
        self._due_at = clock() + INTERVAL_SECONDS
        self._greenlet: gevent.Greenlet[[], None] | None = None

    def start(self) -> None:
        """Start measuring, in a greenlet of its own."""
        self._due_at = self._clock() + INTERVAL_SECONDS
        self._greenlet = gevent.spawn(self._tick_forever)

    def stop(self) -> None:
        """Stop measuring."""
        if self._greenlet is not None:
            self._greenlet.kill()

    def tick(self) -> float:
        """Record how late this tick is, and return the seconds until the next one is due.

        A stall counts once for each tick that it delayed: otherwise a stall of a second would weigh
        no more than one tick in time.
        """
        now = self._clock()
        for _ in range(_MAX_TICKS):
            if self._due_at > now:
                break
            self._lag_seconds.observe(now - self._due_at)
            self._due_at += INTERVAL_SECONDS
        else:
            self._due_at = now + INTERVAL_SECONDS
        return self._due_at - now

    def _tick_forever(self) -> None:
        wait = INTERVAL_SECONDS
        while True:
            gevent.sleep(wait)
            wait = self.tick()
