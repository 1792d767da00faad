"""How late the event loop is: what everything else in the process waits for, too."""

from __future__ import annotations

import time
from collections.abc import Callable

import gevent
from prometheus_client import Histogram

INTERVAL_SECONDS = 0.1
"""Between two looks: no stall of 100 ms can hide, and ten wake-ups a second cost little."""

_MAX_TICKS = 100
"""Of one stall. After more (a machine that was suspended), time begins anew."""


class LoopLag:
    """Has itself woken at set times, and notes how late that was.

    Args:
        lag_seconds: gets the delays.
        clock: `time.monotonic`, or a test's.
    """

    def __init__(self, lag_seconds: Histogram, clock: Callable[[], float] = time.monotonic) -> None:
        self._lag_seconds = lag_seconds
        self._clock = clock
        self._due_at = clock() + INTERVAL_SECONDS
        self._greenlet: gevent.Greenlet[[], None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._due_at = self._clock() + INTERVAL_SECONDS
        self._greenlet = gevent.spawn(self._look_for_ever)

    def stop(self) -> None:
        """Look no more."""
        if self._greenlet is not None:
            self._greenlet.kill()

    def tick(self) -> float:
        """Note how late it is; returns in how many seconds the next tick is due.

        A stall counts once for each time that it swallowed: otherwise a second of silence would
        weigh no more than a tick that came on time.
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

    def _look_for_ever(self) -> None:
        wait = INTERVAL_SECONDS
        while True:
            gevent.sleep(wait)
            wait = self.tick()
