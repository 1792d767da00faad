"""When a session is to be given a sign of life, warned, and ended. Pure: it is told the time."""

from __future__ import annotations

import enum
import math

_WARN_SECONDS = 300.0
"""Before the end; half of a session's time where that is less."""


class Due(enum.Enum):
    """What is due."""

    HEARTBEAT = "heartbeat"
    WARNING = "warning"
    END = "end"


class Lifetime:
    """The time of one session: it slides with each sign of life from the client.

    Args:
        timeout: seconds without one until the session ends; 0 is never.
        heartbeat_interval: seconds between two heartbeats; 0 is none.
        now: `time.monotonic()`.
    """

    def __init__(self, timeout: float, heartbeat_interval: float, now: float) -> None:
        self._timeout = timeout or math.inf
        self._interval = heartbeat_interval or math.inf
        self._warn_before = min(_WARN_SECONDS, self._timeout / 2)
        self._next_heartbeat = now + self._interval
        self._ends_at = now + self._timeout
        self._warned = False

    def renew(self, now: float) -> None:
        """The client gave a sign of life."""
        self._ends_at = now + self._timeout
        self._warned = False

    def remaining_seconds(self, now: float) -> int:
        """Whole seconds until the end; 0 where there is none."""
        left = self._ends_at - now
        return max(0, math.ceil(left)) if math.isfinite(left) else 0

    @property
    def next_at(self) -> float:
        """When `due` is to be asked again; infinite for never."""
        warn_at = math.inf if self._warned else self._ends_at - self._warn_before
        return min(self._next_heartbeat, warn_at, self._ends_at)

    def due(self, now: float) -> list[Due]:
        """What is due by now, each thing once."""
        if now >= self._ends_at:
            return [Due.END]
        due = []
        if now >= self._next_heartbeat:
            # From now on, and not from when it was due: missed heartbeats are not made up for.
            self._next_heartbeat = now + self._interval
            due.append(Due.HEARTBEAT)
        if not self._warned and now >= self._ends_at - self._warn_before:
            self._warned = True
            due.append(Due.WARNING)
        return due
