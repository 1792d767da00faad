"""A logger that writes its lines later, in the order of events."""

from __future__ import annotations

import functools
from typing import Any

from actors.loop.lanes import lanes


class DeferredLog:
    """A logger whose lines are written in the data lane: in the order of events, since that is one
    queue, and when nobody waits for anything else. What runs in the lane logs by itself.

    Args:
        log: of structlog.
    """

    def __init__(self, log: Any) -> None:
        self._log = log

    def info(self, event: str, **fields: Any) -> None:
        """Log an event, later."""
        lanes().run_deferred(functools.partial(self._log.info, event, **fields))

    def warning(self, event: str, **fields: Any) -> None:
        """Log an event, later."""
        lanes().run_deferred(functools.partial(self._log.warning, event, **fields))

    def error(self, event: str, **fields: Any) -> None:
        """Log an event, later; what it was raised with is the field `exc_info`."""
        lanes().run_deferred(functools.partial(self._log.error, event, **fields))
