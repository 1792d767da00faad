"""When a session sends a heartbeat, warns its client, and ends. Pure: the time is an argument."""

from __future__ import annotations

import enum
import math

_WARN_SECONDS = 300.0
"""How long before the end the warning comes; half of the session's timeout if that is shorter."""


class Due(enum.Enum):
    """What the session has to do."""

    HEARTBEAT = "heartbeat"
    WARNING = "warning"
    END = "end"


class Lifetime:
    """The remaining time of one session. Each sign of life from the client renews it.

    Args:
        timeout: seconds without a sign of life until the session ends; 0: never.
        heartbeat_interval: seconds between two heartbeats; 0: no heartbeats.
        now: `time.monotonic()`.
    """

    def __init__(self, timeout: float, heartbeat_interval: float, now: float) -> None:
        self._timeout = timeout or math.inf
        self._interval = heartbeat_interval or math.inf
        self._warn_before = min(_WARN_SECONDS, self._timeout / 2)
        self._next_heartbeat = now + self._interval
        self._ends_at = now + self._timeout
        self._is_warned = False

    def renew(self, now: float) -> None:
        """The client gave a sign of life: its time starts again."""
        self._ends_at = now + self._timeout
        self._is_warned = False

    def remaining_seconds(self, now: float) -> int:
        """Whole seconds until the session ends; 0 if it never does."""
        left = self._ends_at - now
        return max(0, math.ceil(left)) if math.isfinite(left) else 0

    @property
    def next_at(self) -> float:
        """`time.monotonic()` when `due` must be called next; infinite for never."""
        warn_at = math.inf if self._is_warned else self._ends_at - self._warn_before
        return min(self._next_heartbeat, warn_at, self._ends_at)

    def due(self, now: float) -> list[Due]:
        """Return what is due now. Each thing is returned once."""
        if now >= self._ends_at:
            return [Due.END]
        due = []
        if now >= self._next_heartbeat:
            # Counted from now, so that a late timer does not send several heartbeats at once.
            self._next_heartbeat = now + self._interval
            due.append(Due.HEARTBEAT)
        if not self._is_warned and now >= self._ends_at - self._warn_before:
            self._is_warned = True
            due.append(Due.WARNING)
        return due
