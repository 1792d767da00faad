"""What the daemon asks of its operating system, and what it tells systemd and its terminal."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import time
from typing import Any

import gevent

from actors.loop.deferred_log import DeferredLog
from gateway.settings.settings import Settings
from metrics.line_writer import LineWriter
from metrics.logs import get_logger, lost_lines_note

_NOTIFY_SECONDS = 1.0

_OTHER_FILES = 256
"""Open files beside those of clients and live requests: the operator's port, logs, the interpreter,
and idle connections to providers."""

_LAST_LINES_SECONDS = 0.25
"""How long the end of the process may wait for the readers of its lines."""

_log = get_logger("SYS")
_deferred_log = DeferredLog(_log)


class Console:
    """Standard output and standard error. Whoever reads them may stop: nothing here blocks.

    Attributes:
        log: the stream of the log, standard error.
    """

    def __init__(self) -> None:
        self.log = LineWriter(2, lost_lines_note)
        self._output = LineWriter(1)

    @property
    def lost(self) -> int:
        """How many lines could not be written."""
        return self.log.lost + self._output.lost

    def say(self, line: str) -> None:
        """Print a line on standard output."""
        self._output.write(f"{line}\n")

    def complain(self, line: str) -> None:
        """Print a line on standard error."""
        self.log.write(f"{line}\n")

    def end(self) -> None:
        """Give the last lines a moment to be written. Blocks the process for that moment."""
        until = time.monotonic() + _LAST_LINES_SECONDS
        self._output.wait_written(_LAST_LINES_SECONDS)
        self.log.wait_written(until - time.monotonic())


def log_loop_errors() -> None:
    """Log what gevent, and Python itself, would print on standard error: errors that nobody could
    catch. A print could block, and is no line of the log's form."""

    def log_error(context: object, kind: Any, error: Any, trace: Any) -> None:
        _deferred_log.error(
            "Unhandled error", context=repr(context)[:200], exc_info=(kind, error, trace)
        )

    def log_unraisable(unraisable: Any) -> None:
        log_error(
            unraisable.object, unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback
        )

    hub: Any = gevent.get_hub()
    hub.print_exception = log_error
    sys.unraisablehook = log_unraisable


def raise_open_file_limit(settings: Settings) -> None:
    """Raise the soft limit on open files to what the settings may need, up to the hard limit.

    Each connection is an open file, and the usual soft limit of a shell is only 1024.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return

    def count(limit: int) -> float:
        return math.inf if limit == resource.RLIM_INFINITY else limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections, requests = settings.server.max_connections, settings.session.max_requests
    is_bounded = connections > 0 and requests > 0
    # A request has one connection; the demo provider holds its other end as well.
    per_request = 2 if settings.provider is None else 1
    wanted = connections + requests * per_request + _OTHER_FILES if is_bounded else count(hard)
    allowed = min(wanted, count(hard))
    if allowed < wanted:
        _log.warning("Open file limit too low for all clients", limit=hard, wanted=wanted)
    if allowed > count(soft):
        try:
            new = hard if allowed == count(hard) else int(allowed)
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
        except (OSError, ValueError) as error:  # macOS has another limit, which it does not report
            _log.warning("Open file limit not raised", limit=soft, wanted=wanted, error=str(error))


def notify_systemd(state: str) -> None:
    """Tell systemd the daemon's state, if systemd runs it (sd_notify(3)).

    Args:
        state: such as `READY=1`.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path or not hasattr(socket, "AF_UNIX"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_NOTIFY_SECONDS)  # the queue may be full and systemd stuck
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.send(state.encode())
