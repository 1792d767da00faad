"""A circuit breaker: a provider that keeps failing is not asked for a while.

Why not a library: a generation lasts for minutes and may be killed at any point. pybreaker 1.4
holds a lock while a call runs; circuitbreaker 2.1 lets all calls through at once when the time is
up, and counts a killed call as a success.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable


class BreakerState(enum.Enum):
    """Whether the provider is asked."""

    CLOSED = "closed"
    """Every generation asks it."""
    OPEN = "open"
    """No generation asks it."""
    HALF_OPEN = "half_open"
    """One generation is probing it; the others do not ask."""


class Trial:
    """Permission for one generation to use the provider; only the first reported outcome counts."""

    def __init__(self, breaker: Breaker, *, is_probe: bool) -> None:
        self._breaker: Breaker | None = breaker
        self._is_probe = is_probe

    def succeeded(self) -> None:
        """Report that the provider answers."""
        if breaker := self._take_breaker():
            breaker._close()

    def failed(self) -> None:
        """Report that the provider failed."""
        if breaker := self._take_breaker():
            breaker._count_failure(is_probe=self._is_probe)

    def abandoned(self) -> None:
        """Report that the outcome is unknown: the generation was stopped before."""
        if (breaker := self._take_breaker()) and self._is_probe:
            breaker._probe_again()

    def _take_breaker(self) -> Breaker | None:
        breaker, self._breaker = self._breaker, None
        return breaker


class Breaker:
    """Counts the consecutive failures of one provider. Not thread-safe.

    Args:
        max_failures: consecutive failures that open it; 0 never opens it.
        open_seconds: how long it stays open before one generation may probe.
        now: a monotonic clock, in seconds.
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
        """Permission to ask the provider now; None while it must not be asked."""
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
        # A late failure of a generation that began before it opened must not extend the time.
        if is_probe or (too_many and self.state is BreakerState.CLOSED):
            self._opened_at = self._now()
            self._enter(BreakerState.OPEN)

    def _probe_again(self) -> None:
        # `_opened_at` stays, so the time is still up and the next generation probes.
        self._enter(BreakerState.OPEN)
