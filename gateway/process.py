"""What the daemon asks of its operating system, and what it tells systemd and its terminal."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import time
from dataclasses import replace
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

_REQUESTS_SHARE = 4
"""The limit on live requests is not lowered below half, or below one of so many files where that is
less. Then not all sessions fit."""

_REQUESTS_SHARE_OF_NO_LIMIT = 2
"""The same where the number of sessions has no limit."""

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

    ours = threading.get_ident()

    def log_unraisable(unraisable: Any) -> None:
        if threading.get_ident() != ours:  # no loop of that thread would ever write the line
            sys.__unraisablehook__(unraisable)
            return
        log_error(
            unraisable.object, unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback
        )

    hub: Any = gevent.get_hub()
    hub.print_exception = log_error
    sys.unraisablehook = log_unraisable


def fit_to_open_files(settings: Settings) -> Settings:
    """Raise the soft limit on open files to what the settings may need, up to the hard limit. Where
    that is too low, lower the limit on live requests.

    Each connection is an open file, and the usual soft limit of a shell is only 1024.

    Returns:
        The settings, with limits on live requests and on connections that the files can hold. So
        clients never take the files that live requests need.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return settings

    def count(limit: int) -> float:
        return math.inf if limit == resource.RLIM_INFINITY else limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections, requests = settings.server.max_connections, settings.session.max_requests
    is_bounded = connections > 0 and requests > 0
    # A request has one connection. The demo provider holds its other end as well; and with a
    # fallback, an idle connection to the one provider may be open beside one to the other.
    per_request = 2 if settings.provider is None or settings.fallback is not None else 1
    wanted = connections + requests * per_request + _OTHER_FILES if is_bounded else count(hard)
    allowed = max(count(soft), min(wanted, count(hard)))
    fault = None
    if allowed > count(soft):
        try:
            new = hard if allowed == count(hard) else int(allowed)
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
        except (OSError, ValueError) as error:  # macOS has another limit, which it does not report
            allowed, fault = count(soft), str(error)
    max_open, max_requests = share_files(allowed, connections, requests, per_request)
    if is_bounded and allowed >= wanted:
        max_open = 0  # there are files for all; the server itself closes those that are too many
    fields = {
        "limit": allowed,
        "wanted": wanted,
        "connections": max_open,
        "max_requests": max_requests,
    }
    if fault is not None:
        _log.warning("Open file limit not raised", **fields, error=fault)
    elif allowed < wanted or max_requests < requests:
        _log.warning("Open file limit too low for all clients", **fields)
    return replace(
        settings,
        server=replace(settings.server, max_open=max_open),
        session=replace(settings.session, max_requests=max_requests),
    )


def share_files(files: float, connections: int, requests: int, per_request: int) -> tuple[int, int]:
    """Divide the open files between connections of clients and live requests.

    Args:
        files: how many files may be open.
        connections: how many clients may be connected; 0: no limit.
        requests: how many requests may be live; 0: no limit.
        per_request: how many files a live request may have open.

    Returns:
        How many connections may be open, and how many requests live; 0: no limit.
    """
    if math.isinf(files):
        return 0, requests
    shared = int(files - min(_OTHER_FILES, files // 2))
    # Step 1. Requests get what all connections leave over, but at least a share of their own.
    left = (shared - connections if connections else 0) // per_request
    share = shared // (_REQUESTS_SHARE if connections else _REQUESTS_SHARE_OF_NO_LIMIT)
    least = share // per_request
    if connections and requests:
        least = min(least, requests // 2)
    live = max(1, left, least)
    if requests:
        live = min(live, requests)
    # Step 2. Connections get the rest.
    return max(1, shared - live * per_request), live


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
