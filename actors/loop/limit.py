"""Time limits for peers: what a peer has sent is read first, and our own pauses do not count."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent

from actors.loop.pauses import Pauses


class Limit:
    """Calls a function when a peer has made no progress for some time. `Lanes.limit` makes it.

    A timer that fires proves only that time has passed: libev may call it before the sockets that
    the same poll reports, and after a pause of the process it fires at once. So it takes two steps:

    1. The timer fires. If there is time left, because `since` was moved on or the process was
       paused, the timer starts again for that time.
    2. Otherwise the loop polls once more, and what has arrived by then is read. If there is no time
       left even then, the limit has passed.

    Progress costs one assignment and no timer.

    Args:
        seconds: the limit; 0 is none.
        expired: called once, in the hub.
        args: its arguments.
        pauses: those of this loop.
        look: runs a function when what has arrived is read: `Lanes.run_after_reads`, say.
    """

    def __init__(
        self,
        seconds: float,
        expired: Callable[..., object],
        *args: Any,
        pauses: Pauses,
        look: Callable[[Callable[[], object]], object],
    ) -> None:
        self._seconds = seconds
        self._expired: tuple[Callable[..., object], tuple[Any, ...]] | None = (expired, args)
        self._pauses = pauses
        self._look = look
        self._timer: Any = None
        self.since = time.monotonic()
        """`time.monotonic()` of the last progress; infinite while the peer has nothing to do."""

    def start(self) -> None:
        """Start the limit, now."""
        self.since = time.monotonic()
        if self._seconds > 0:
            self._set_timer(self._seconds)

    def stop(self) -> None:
        """Stop it for good. May be called more than once."""
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None
        self._expired = None  # an error among the arguments may refer back to the owner

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
        self._timer = gevent.get_hub().loop.timer(seconds)
        self._timer.start(self._fired)

    def _fired(self) -> None:
        if not self._has_time_left():
            self._look(self._has_looked)

    def _has_looked(self) -> None:
        if self._expired is not None and not self._has_time_left():
            expired, args = self._expired
            self.stop()
            expired(*args)

    def _has_time_left(self) -> bool:
        """Start the timer again if there is time left."""
        now = time.monotonic()
        paused_seconds = self._pauses.seconds_between(self.since, now)
        left = self.since + self._seconds + paused_seconds - now
        if left > 0:
            self._set_timer(min(left, self._seconds))
        return left > 0
