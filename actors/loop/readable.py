"""Waiting until a socket is readable, for one reader greenlet at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gevent
import gevent.hub


class Readable:
    """Suspends a reader until its socket is readable and its lane resumes it.

    The watcher stays started from one wait to the next: to start and stop it for each read costs
    two changes of what the kernel watches, about as much as the wait itself. The price is that
    libev, which reports a readable socket after every poll until it is read, can report one that
    no reader waits for. So when it does, only three things can be true:

    - the reader waits: schedule it, once;
    - the reader is scheduled, but its slice has not come yet: stop the watcher, or it would
      fire after each poll until then;
    - no reader waits, because it is busy with what it has read (its client is slow, say): stop
      the watcher, or the loop could never sleep.

    In the last two cases the next `wait()` starts it again, and finds the data still there.

    Args:
        watcher: of gevent's loop, for the socket. Its priority decides in which order sockets are
            reported that became readable in the same poll.
        schedule: called in the hub with this object when a waiting reader has something to read;
            it calls `resume()`, now or later.
        waiting: holds each greenlet while it is suspended here. `Lanes.throw` needs to know.
    """

    def __init__(
        self, watcher: Any, schedule: Callable[[Readable], object], waiting: set[Any]
    ) -> None:
        self._watcher = watcher
        self._schedule = schedule
        self._waiting = waiting
        self._reader: Any = None
        self._is_watched = self._is_scheduled = False

    def wait(self) -> None:
        """Suspend the calling greenlet until there is something to read.

        Always goes through the loop, even when data is there already: otherwise a peer that sends
        without a pause would be read without a pause, and nothing else would run.

        Raises:
            BaseException: what `Lanes.throw` was given for this greenlet.
        """
        if not self._is_watched:
            self._is_watched = True
            self._watcher.start(self._on_readable)
        self._reader = reader = gevent.getcurrent()
        waiting = self._waiting
        waiting.add(reader)
        try:
            error = gevent.get_hub().switch()
        finally:
            self._reader = None
            waiting.discard(reader)
        if isinstance(error, BaseException):
            try:
                raise error
            finally:
                # The error's traceback refers to this frame. Without the frame's reference back,
                # there is no cycle, and the socket need not wait for the collector.
                del error

    def resume(self) -> None:
        """Resume the waiting reader, if it is still waiting. Runs in the hub."""
        self._is_scheduled = False
        if self._reader is not None:
            self._reader.switch(None)

    def close(self) -> None:
        """Stop watching. Call it before the socket is closed: its number may be reused at once."""
        self._watcher.close()

    def _on_readable(self) -> None:
        if self._reader is None or self._is_scheduled:
            self._is_watched = False
            self._watcher.stop()
        else:
            self._is_scheduled = True
            self._schedule(self)


class PlainReadable(Readable):
    """The same on libuv, with gevent's own wait, which starts and stops the watcher each time.

    When the peer resets the connection, libuv stops the watcher by itself. One that is taken for
    started would then never wake its reader again.
    """

    def wait(self) -> None:
        """Suspend the calling greenlet until there is something to read."""
        gevent.get_hub().wait(self._watcher)
