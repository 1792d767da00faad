"""A listener that survives a lack of file descriptors: new connections wait, and none is lost."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.server

from metrics.logs import get_logger

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of accept(2) that mean that the process or the machine cannot hold one more connection.
The connection stays in the kernel's queue."""

_RETRY_SECONDS = 0.25
_LOG_SECONDS = 10.0
"""At least this long between two log lines about it."""

_log = get_logger("SYS")


class Listening(gevent.server.StreamServer):
    """A gevent server that pauses and retries when it cannot accept, and logs one line about it.

    gevent's own server prints a traceback each time.
    """

    max_accept = 8
    """How many connections are accepted before the others on the loop get their turn."""

    make_room: Callable[[], None] | None = None
    """Called before each pause, to close connections that are dispensable."""

    max_open = 0
    """How many connections may be open, so that files are left for live requests; 0: no limit. More
    wait in the kernel's queue, as they do when there are no files at all."""

    open_now = 0
    """How many connections are open."""

    _logged_at = float("-inf")

    def do_read(self) -> Any:
        """Accept a connection. Called by gevent, which tries again later if this returns None."""
        if self.is_full:
            self._pause("the open files that are left are reserved for live requests")
            return None
        try:
            accepted = super().do_read()
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._pause(error.strerror)
            return None
        if accepted is not None:
            self.open_now += 1
        return accepted

    def do_close(self, *args: Any) -> None:
        """Close a connection that has ended. Called by gevent."""
        self.open_now -= 1
        super().do_close(*args)

    @property
    def is_full(self) -> bool:
        """Whether further connections have to wait, so that files are left for live requests."""
        return 0 < self.max_open <= self.open_now

    def _pause(self, reason: str | None) -> None:
        # While it listens, the waiting connection would wake it again and again.
        self.stop_accepting()
        gevent.spawn_later(_RETRY_SECONDS, self._resume)
        if self.make_room is not None:
            self.make_room()
        now = time.monotonic()
        if now - self._logged_at > _LOG_SECONDS:
            self._logged_at = now
            _log.error("Cannot accept connections", port=self.server_port, error=reason)

    def _resume(self) -> None:
        if self.started:
            self.start_accepting()
