"""The control lane of the event loop: calls that go before all data that waits there.

Under load one turn of the loop brings data from hundreds of connections, and what greenlets ask of
it meanwhile (`loop.run_callback`) comes after all of that. An interrupt takes several such steps,
from mailbox to mailbox and to the reader. In this lane each step is the very next thing that the
loop does.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent


class Lane:
    """Runs calls in the hub, in order, before anything else that is pending."""

    def __init__(self) -> None:
        self._loop: Any = gevent.get_hub().loop
        self._due: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._is_due = False
        self._between_polls = True
        """True from the last moment before the loop looks for events until it has looked: while it
        runs what `run_callback` was given, of which it would not notice more after that."""
        self._priority = getattr(self._loop, "MAXPRI", None)
        if self._priority is None:  # libuv (Windows) has no priorities
            return
        # Never started: an event is only ever fed to it, and libev takes it before all of lower
        # priority.
        self._next: Any = self._loop.async_(priority=self._priority)
        self._before = self._loop.prepare(ref=False, priority=self._priority)
        self._after = self._loop.check(ref=False, priority=self._priority)
        self._before.start(self._set_between_polls, True)
        self._after.start(self._set_between_polls, False)

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call it next. It must not block, and must not raise."""
        self._due.append((function, args))
        if self._is_due:
            return
        self._is_due = True
        if self._between_polls:
            self._loop.run_callback(self._run)
        else:
            self._next.feed(0, self._run)

    def _set_between_polls(self, value: bool) -> None:
        self._between_polls = value

    def _run(self) -> None:
        try:
            while self._due:
                function, args = self._due.popleft()
                function(*args)
        finally:
            self._is_due = False


@functools.cache
def _lane_of(_hub_id: int) -> Lane:
    return Lane()


def control_lane() -> Lane:
    """The lane of this thread's loop."""
    return _lane_of(id(gevent.get_hub()))
