"""A logger that writes its lines in the data lane, in the order of events."""

from __future__ import annotations

import functools
from typing import Any

from actors.loop.lanes import lanes
from metrics.logs import is_logged


class DeferredLog:
    """Queues each line in the data lane: to write one takes longer than an interrupt does.

    Deferred tasks run in order, so lines are written in the order of their events. A deferred task
    itself can use the logger directly. A level that is not logged queues nothing.

    Args:
        log: a structlog logger.
    """

    def __init__(self, log: Any) -> None:
        self._log = log

    def info(self, event: str, **fields: Any) -> None:
        """Queue an event."""
        if is_logged("info"):
            lanes().run_deferred(functools.partial(self._log.info, event, **fields))

    def warning(self, event: str, **fields: Any) -> None:
        """Queue an event."""
        if is_logged("warning"):
            lanes().run_deferred(functools.partial(self._log.warning, event, **fields))

    def error(self, event: str, **fields: Any) -> None:
        """Queue an event. Pass its exception as `exc_info`: when the line is written, there is no
        current exception any more."""
        if is_logged("error"):
            lanes().run_deferred(functools.partial(self._log.error, event, **fields))
