"""The end of a gateway's log, complete up to a moment.

A gateway writes most of its log when it has nothing more urgent to do, so the file may lack lines
of what has happened already. But it writes them in the order of events. So this makes an event of
its own, whose line can be told from all others: the lines before that one are complete.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from bargein.gateway.client import HandshakeFailed, encode_frame

from .chat import open_connection

MARK_SECONDS = 5.0
"""How long to wait for a gateway that is busy, hangs, or logs no such line (`log_level`)."""

_POLL_SECONDS = 0.005


def mark_log(port: int) -> str | None:
    """Make an event that a gateway logs.

    Args:
        port: of the gateway.

    Returns:
        What only the line of this event contains; None where the gateway did not answer. When this
        returns, the line is queued, and may not be written yet.
    """
    marker = f"log_mark_{secrets.token_hex(8)}"
    until = time.monotonic() + MARK_SECONDS
    try:
        with open_connection(port, timeout=MARK_SECONDS) as connection:
            # Answered without a registration, be it by an ERROR; and logged with its session id.
            connection.send_text(encode_frame("HEALTH_CHECK", {}, marker))
            while connection.is_open and not connection.receive(until - time.monotonic()):
                pass
    except (OSError, HandshakeFailed):
        return None
    return marker


def lines_before(log: str, marker: str | None) -> str:
    """The lines before the marker's; all of them where it has none."""
    found = -1 if marker is None else log.find(marker)
    return log if found < 0 else log[: log.rfind("\n", 0, found) + 1]


def complete_log(read: Callable[[], str], port: int) -> str:
    """A running gateway's log with everything that happened before this call.

    Args:
        read: reads the log.
        port: of the gateway.
    """
    marker = mark_log(port)
    until = time.monotonic() + MARK_SECONDS
    while marker is not None and marker not in (log := read()):
        if time.monotonic() > until:
            return log
        time.sleep(_POLL_SECONDS)  # a file does not tell when it grows
    return lines_before(read(), marker)
