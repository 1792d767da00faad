"""Listening when the process has no file descriptors left: connections wait, none is lost."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.server

from metrics.logs import get_logger

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""accept(2): there is no room for one more connection, of the process or of the machine. The one
that could not be accepted stays in the kernel's queue."""

_RETRY_SECONDS = 0.25
_LOG_SECONDS = 10.0
"""Between two lines of the log about it."""

_log = get_logger("SYS")


class Listening(gevent.server.StreamServer):
    """A gevent server that tries again when it cannot accept, and says so in the log.

    gevent's own prints a traceback each time.
    """

    make_room: Callable[[], None] | None = None
    """Called before each pause: connections may be closed that can be done without."""

    _logged_at = float("-inf")

    def do_read(self) -> Any:
        """Accept a connection; called by gevent, which takes None for "not now"."""
        try:
            return super().do_read()
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._rest(error)
            return None

    def _rest(self, error: OSError) -> None:
        # What waits would wake us at once, again and again.
        self.stop_accepting()
        gevent.spawn_later(_RETRY_SECONDS, self._resume)
        if self.make_room is not None:
            self.make_room()
        now = time.monotonic()
        if now - self._logged_at > _LOG_SECONDS:
            self._logged_at = now
            _log.error("Cannot accept connections", port=self.server_port, error=error.strerror)

    def _resume(self) -> None:
        if self.started:
            self.start_accepting()
