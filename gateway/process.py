"""What the daemon asks of its operating system and tells systemd."""

from __future__ import annotations

import contextlib
import math
import os
import socket

from gateway.settings.settings import Settings
from metrics.logs import get_logger

_NOTIFY_SECONDS = 1.0

_OTHER_FILES = 256
"""Open files beside those of clients and live requests: the operator's port, logs, the interpreter,
and idle connections to providers."""

_log = get_logger("SYS")


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
