"""A circuit breaker: a provider that fails again and again is left alone for a while.

Not one of the libraries for it: a generation lasts for minutes and may be killed at any point, and
those hold a lock while a call runs (pybreaker 1.4), or let everybody through at once when the time
is up and take a killed call for a good one (circuitbreaker 2.1).
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable


class BreakerState(enum.Enum):
    """Whether a provider is asked."""

    CLOSED = "closed"
    OPEN = "open"  # not asked
    HALF_OPEN = "half_open"  # one generation is trying it


class Trial:
    """One generation's leave to ask a provider. How that went is told once; more is not heard."""

    def __init__(self, breaker: Breaker, *, is_probe: bool) -> None:
        self._breaker: Breaker | None = breaker
        self._is_probe = is_probe

    def succeeded(self) -> None:
        """The provider answers."""
        if breaker := self._told():
            breaker._close()

    def failed(self) -> None:
        """It does not."""
        if breaker := self._told():
            breaker._count_failure(is_probe=self._is_probe)

    def abandoned(self) -> None:
        """Nobody knows: the generation was stopped before, or could not have been answered."""
        if (breaker := self._told()) and self._is_probe:
            breaker._probe_again()

    def _told(self) -> Breaker | None:
        breaker, self._breaker = self._breaker, None
        return breaker


class Breaker:
    """Counts failures in a row of one provider. Not for threads.

    Args:
        max_failures: so many in a row open it; 0 never does.
        open_seconds: for how long it stays open before one generation may try.
        now: the clock, in seconds.
        on_change: called with each new state.
    """

    def __init__(
        self,
        max_failures: int,
        open_seconds: float,
        now: Callable[[], float] = time.monotonic,
        on_change: Callable[[BreakerState], None] = lambda state: None,
    ) -> None:
        self._max_failures = max_failures
        self._open_seconds = open_seconds
        self._now = now
        self._on_change = on_change
        self._failures = 0
        self._opened_at = 0.0
        self.state = BreakerState.CLOSED

    def _enter(self, state: BreakerState) -> None:
        if state is not self.state:
            self.state = state
            self._on_change(state)

    def trial(self) -> Trial | None:
        """Leave to ask the provider now, or None while it is left alone."""
        if self.state is BreakerState.CLOSED:
            return Trial(self, is_probe=False)
        is_time = self._now() - self._opened_at >= self._open_seconds
        if self.state is BreakerState.OPEN and is_time:
            self._enter(BreakerState.HALF_OPEN)
            return Trial(self, is_probe=True)
        return None

    def _close(self) -> None:
        self._failures = 0
        self._enter(BreakerState.CLOSED)

    def _count_failure(self, *, is_probe: bool) -> None:
        self._failures += 1
        too_many = 0 < self._max_failures <= self._failures
        # While it is open or tried, those that were let in before have nothing to say.
        if is_probe or (too_many and self.state is BreakerState.CLOSED):
            self._opened_at = self._now()
            self._enter(BreakerState.OPEN)

    def _probe_again(self) -> None:
        self._enter(BreakerState.OPEN)  # and its time is up still: the next one tries
