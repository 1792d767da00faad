"""Lanes of the event loop: control goes at once, data goes in slices, books are kept last.

Under load one turn of the loop brings data from hundreds of connections, and by itself the loop
would hand all of it on before it looks again: tens of milliseconds, in which an INTERRUPT waits in
the kernel, and then takes several more steps from mailbox to mailbox. So control steps are the very
next thing that the loop does, and data is handed on for a fraction of a millisecond at a time,
with a look for control in between. What an interrupt waits for then no longer grows with the load.

Interrupts also come in company: of one user's several requests, or when two speakers fall silent
at once. So what follows a close (the report, the ack) comes after a look for others that are still
to be closed, and what nobody waits for (counting, logging) goes with the data.
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

_READ = 1
"""The event of gevent's `loop.io` for "readable"."""

_Call = tuple[Callable[..., object], tuple[Any, ...]]


class Lanes:
    """The lanes of one loop. libuv (Windows) has no priorities: there, all go as gevent has it.

    What they call runs in the hub and must not block; what it raises is logged by the hub.
    """

    def __init__(self) -> None:
        loop: Any = gevent.get_hub().loop
        self._loop = loop
        self._control: deque[_Call] = deque()
        self._after_look: deque[_Call] = deque()
        self._behind_reports: deque[_Call] = deque()
        self._waiting: set[Any] = set()
        """The greenlets that wait in a `Readable`."""
        self._data: deque[Readable | _Call] = deque()
        """A reader whose turn it is, or a call, which takes long."""
        self._control_is_due = self._slice_is_due = self._in_a_hurry = False
        self._control_ran = self._has_given_way = False
        """Whether control was run since the last look, and whether data waited for that once."""
        # By its name: a loop of libuv has `MAXPRI` as well.
        self.has_priorities = type(loop).__module__.startswith("gevent.libev")
        if not self.has_priorities:
            return
        first, last = loop.MAXPRI, loop.MINPRI
        # These are never started: an event is only ever fed to them, and libev takes it before, or
        # after, all of other priorities that are there.
        self._next: Any = loop.async_(priority=first)
        self._reported: Any = loop.async_(priority=last + 1)
        self._slice: Any = loop.async_(priority=last)
        # These are, while there is something for them: `check` is called after the next look.
        self._looked = loop.check(priority=first - 1)
        self._looked_for_data = loop.check(priority=last)
        # Active while anything is to be done, so that the look does not become a wait. Not only by
        # us: of what control asks of the loop in its last moment before the look, it would not
        # notice. So this ends in its own callback, which comes after a look that brought nothing.
        self._hurry = loop.idle(priority=last)

    def run_next(self, function: Callable[..., object], *args: Any) -> None:
        """Call it next."""
        self._control.append((function, args))
        if self._control_is_due:
            return
        self._control_is_due = True
        if self.has_priorities:
            self._next.feed(0, self._run_control)
            if not self._in_a_hurry:
                self._be_quick()
        else:
            self._loop.run_callback(self._run_control)

    def run_after_poll(self, function: Callable[..., object], *args: Any) -> None:
        """Call it when control that has come meanwhile was run, but before more than a slice of
        data."""
        if not self.has_priorities:
            self._loop.run_callback(_guarded, function, args)
            return
        self._after_look.append((function, args))
        self._looked.start(self._run_after_look)
        if not self._in_a_hurry:
            self._be_quick()

    def run_after_acks(self, function: Callable[..., object], *args: Any) -> None:
        """Call it right behind what is called after the next look (reports), and all control that
        comes of that (acks): no data goes in between."""
        if self.has_priorities:
            self.run_after_poll(self._put_behind_reports, (function, args))
        else:
            self.run_after_poll(self.run_after_poll, function, *args)

    def run_deferred(self, function: Callable[..., object], *args: Any) -> None:
        """Call it in the data lane: what nobody waits for."""
        if not self.has_priorities:
            self._loop.run_callback(_guarded, function, args)
            return
        self._data.append((_guarded, (function, args)))
        self._go_on_with_data()

    def take_turn(self, readable: Readable) -> None:
        """Let somebody read as soon as it is his turn. Runs in the hub."""
        self._data.append(readable)
        if not self._slice_is_due:
            self._slice_is_due = True
            self._slice.feed(0, self._hand_on)

    def wait_turn(self) -> None:
        """Wait for a turn in the data lane, before work that takes long."""
        if not self.has_priorities:
            gevent.sleep(0)
            return
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        self._data.append((waiter.switch, (None,)))
        self._go_on_with_data()
        waiter.get()

    def throw(self, greenlet: gevent.Greenlet[..., Any], error: BaseException) -> None:
        """Raise an error in a greenlet, now. Runs in the hub.

        Like its own `throw`; but where it waits for something to read, it is let go on, and raises
        it itself: an exception takes several times as long to come through the loop's `switch`.
        """
        if greenlet in self._waiting:
            greenlet.switch(error)
        else:
            greenlet.throw(error)

    def wait_for_control(self) -> None:
        """Wait until all control that is there was run."""
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        self.run_next(waiter.switch, None)
        waiter.get()

    def _go_on_with_data(self) -> None:
        self._slice_is_due = True
        self._looked_for_data.start(self._hand_on)
        if not self._in_a_hurry:
            self._be_quick()

    def _hand_on(self) -> None:
        control_ran, self._control_ran = self._control_ran, False
        if control_ran and not self._has_given_way:
            self._has_given_way = True  # a look first; but one client must not hold up all data
        else:
            self._has_given_way = False
            until = time.monotonic() + _SLICE_SECONDS
            while self._data:
                turn = self._data.popleft()
                if isinstance(turn, tuple):
                    function, args = turn
                    function(*args)
                    break  # what takes long has a slice for itself
                turn.go_on()
                if time.monotonic() > until or (self._data and isinstance(self._data[0], tuple)):
                    break
        if self._data:
            self._go_on_with_data()
        else:
            self._slice_is_due = False
            self._looked_for_data.stop()

    def _run_control(self) -> None:
        self._control_ran = True
        while self._control:
            function, args = self._control.popleft()
            try:
                function(*args)
            except BaseException:  # the next one is somebody else's
                gevent.get_hub().handle_error(function, *sys.exc_info())
        self._control_is_due = False

    def _run_after_look(self) -> None:
        for _ in range(len(self._after_look)):
            _guarded(*self._after_look.popleft())
        if not self._after_look:
            self._looked.stop()

    def _put_behind_reports(self, call: _Call) -> None:
        self._behind_reports.append(call)
        self._reported.feed(0, self._run_behind_reports)

    def _run_behind_reports(self) -> None:
        while self._behind_reports:
            _guarded(*self._behind_reports.popleft())

    def _be_quick(self) -> None:
        self._in_a_hurry = True
        self._hurry.start(self._rest)

    def _rest(self) -> None:
        if not (self._control or self._after_look or self._data):
            self._in_a_hurry = False
            self._hurry.stop()


class Readable:
    """Waits for what comes on a socket, for one reader at a time.

    What is watched stays so from one wait to the next: to begin and to end it each time costs as
    much as the wait. It ends when something has come, and nobody takes it.

    Args:
        fileno: of the socket.
        is_control: whether what comes goes before all data, or is data and waits for its turn.
    """

    def __init__(self, fileno: int, *, is_control: bool = False) -> None:
        self._lanes = lanes()
        loop: Any = gevent.get_hub().loop
        # (libuv, on Windows, knows no priorities.)
        priority = getattr(loop, "MAXPRI", None) if is_control else None
        self._watcher: Any = loop.io(fileno, _READ, priority=priority)
        self._is_control = is_control
        self._reader: Any = None  # the greenlet that waits
        self._is_watched = self._is_queued = False

    def wait(self) -> None:
        """Wait until there is something to read, and it is this reader's turn. Always through the
        loop, so that a peer that never pauses gets one read in a turn."""
        hub = gevent.get_hub()
        if not self._lanes.has_priorities:
            hub.wait(self._watcher)
            return
        if not self._is_watched:
            self._is_watched = True
            self._watcher.start(self._has_come)
        self._reader = reader = gevent.getcurrent()
        waiting = self._lanes._waiting
        waiting.add(reader)
        try:
            error = hub.switch()
        finally:
            self._reader = None
            waiting.discard(reader)
        if isinstance(error, BaseException):
            try:
                raise error
            finally:
                del error  # it leads to this frame: no cycle is left for the collector

    def close(self) -> None:
        """Watch no more; to be called before the socket is closed."""
        self._watcher.close()

    def _has_come(self) -> None:
        if self._reader is None or self._is_queued:
            self._is_watched = False
            self._watcher.stop()
        elif self._is_control:
            self._reader.switch(None)
        else:
            self._is_queued = True
            self._lanes.take_turn(self)

    def go_on(self) -> None:
        """It is its reader's turn, if he has not left meanwhile. Runs in the hub."""
        self._is_queued = False
        if self._reader is not None:
            self._reader.switch(None)


def _guarded(function: Callable[..., object], args: tuple[Any, ...]) -> None:
    try:
        function(*args)
    except BaseException:  # the next one is somebody else's
        gevent.get_hub().handle_error(function, *sys.exc_info())


_lanes_by_hub: weakref.WeakKeyDictionary[gevent.hub.Hub, Lanes] = weakref.WeakKeyDictionary()


def lanes() -> Lanes:
    """The lanes of this thread's loop."""
    hub = gevent.get_hub()
    found = _lanes_by_hub.get(hub)
    if found is None:
        found = _lanes_by_hub[hub] = Lanes()
    return found
