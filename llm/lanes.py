"""Two lanes of the event loop: control goes at once, data goes in slices.

Under load one turn of the loop brings data from hundreds of connections, and by itself the loop
would hand all of it on before it looks again: tens of milliseconds, in which an INTERRUPT waits in
the kernel, and then takes several more steps from mailbox to mailbox. So control steps are the very
next thing that the loop does, and data is handed on for a fraction of a millisecond at a time,
with a look for control in between. What an interrupt waits for then no longer grows with the load.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import gevent
import gevent.hub

_SLICE_SECONDS = 0.0003
"""Of data, between two looks for control. A look costs some 20 µs."""


class Lanes:
    """The lanes of one loop. libuv (Windows) has no priorities: there, both go as gevent has it."""

    def __init__(self) -> None:
        loop: Any = gevent.get_hub().loop
        self._loop = loop
        self._control: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._control_is_due = False
        self._data: deque[gevent.hub.Waiter[None]] = deque()
        self._between_polls = True
        """True from the last moment before the loop looks for events until it has looked: while it
        runs what `run_callback` was given, of which it would not notice more after that."""
        self.has_priorities = hasattr(loop, "MAXPRI")
        if not self.has_priorities:
            return
        first, last = loop.MAXPRI, loop.MINPRI
        # Never started: an event is only ever fed to it, and libev takes it before all of lower
        # priority.
        self._next: Any = loop.async_(priority=first)
        self._before_poll = loop.prepare(ref=False, priority=first)
        self._before_poll.start(self._set_between_polls, True)
        self._after_poll = loop.check(ref=False, priority=first)
        self._after_poll.start(self._set_between_polls, False)
        self._slice = loop.check(ref=False, priority=last)
        self._slice.start(self._hand_on)
        # Active while data is left over, so that the look does not become a wait.
        # (With a reference: left over data is a reason for the loop to go on.)
        self._hurry = loop.idle()

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call it next, in the hub. It must not block; what it raises is logged by the hub."""
        self._control.append((function, args))
        if self._control_is_due:
            return
        self._control_is_due = True
        if self._between_polls:
            self._loop.run_callback(self._run_control)
        else:
            self._next.feed(0, self._run_control)

    def wait_readable(self, watcher: Any) -> None:
        """Wait until there is something to read, and it is this reader's turn.

        Args:
            watcher: an `io` watcher of the socket, not started, and nobody else's.
        """
        if not self.has_priorities:
            gevent.get_hub().wait(watcher)
            return
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        watcher.start(self._readable, watcher, waiter)
        try:
            waiter.get()
        finally:
            watcher.stop()

    def wait_turn(self) -> None:
        """Wait for a turn in the data lane, before work that takes long."""
        if not self.has_priorities:
            return
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        self._data.append(waiter)
        self._hurry.start(_nothing)
        waiter.get()

    def _readable(self, watcher: Any, waiter: gevent.hub.Waiter[None]) -> None:
        watcher.stop()
        self._data.append(waiter)
        if self._between_polls:
            self._hurry.start(_nothing)

    def _hand_on(self) -> None:
        if not self._data:
            return
        until = time.monotonic() + _SLICE_SECONDS
        while self._data:
            self._data.popleft().switch(None)
            if time.monotonic() > until:
                break
        if self._data:
            self._hurry.start(_nothing)
        else:
            self._hurry.stop()

    def _set_between_polls(self, value: bool) -> None:
        self._between_polls = value

    def _run_control(self) -> None:
        while self._control:
            function, args = self._control.popleft()
            try:
                function(*args)
            except BaseException:  # the next one is somebody else's
                gevent.get_hub().handle_error(self, *sys.exc_info())
        self._control_is_due = False


def _nothing() -> None:
    pass


_lanes_by_hub: weakref.WeakKeyDictionary[gevent.hub.Hub, Lanes] = weakref.WeakKeyDictionary()


def lanes() -> Lanes:
    """The lanes of this thread's loop."""
    hub = gevent.get_hub()
    found = _lanes_by_hub.get(hub)
    if found is None:
        found = _lanes_by_hub[hub] = Lanes()
    return found
