"""Lanes of the event loop: control at once, data in slices of 0.3 ms, records last.

Under load, one poll of the kernel reports data on hundreds of connections. gevent would resume all
of their readers before it polls again: tens of milliseconds, during which an INTERRUPT waits in the
kernel, and then again for each mailbox that it passes. With lanes, control runs before everything
else that is ready, and data runs for a fraction of a millisecond between two polls. The latency of
an interrupt then does not grow with the load. `README.md` in this folder shows one interrupt on its
way through the loop.

What the lanes rely on, of libev: an iteration polls once, then runs the callbacks of all pending
events, those of a higher priority first. After each callback it starts again from the top, so an
event that a callback feeds with a high priority runs before all that is pending below it. The
priorities, and what runs at each:

     2  control, and the sockets of clients, which bring it
     1  after the poll: reports of the streams that control has closed
     0  gevent's own events, and the sockets of providers, whose readers join the data lane
    -1  after the acks: freeing closed sockets
    -2  one slice of data
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

from actors.loop.limit import Limit
from actors.loop.pauses import BEAT_SECONDS, Pauses
from actors.loop.readable import PlainReadable, Readable

SLICE_SECONDS = 0.0003
"""How long data runs between two polls. A poll takes some 20 µs: shorter slices would spend more of
the time on polling, and longer ones add to what an interrupt waits for."""

MAX_DEFERRED = 1000
"""With more deferred tasks than this, `is_behind` is true: some 40 ms of work."""

_POLL_SECONDS = 0.001
"""A timer of libuv that is started now fires after the next poll, if it is longer than zero."""

_READ = 1
"""The event of gevent's `loop.io` for "readable"."""

_Task = tuple[Callable[..., object], tuple[Any, ...]]


class Lanes:
    """The lanes of one event loop; `lanes()` gives those of the calling thread.

    Tasks run in the hub, so they must not block. When one raises, the hub logs the error and the
    next one runs.
    """

    def __init__(self) -> None:
        self._loop: Any = gevent.get_hub().loop
        self._control: deque[_Task] = deque()
        self._after_poll: deque[_Task] = deque()
        self._after_acks: deque[_Task] = deque()
        self._data: deque[Readable | _Task] = deque()
        """Readers to resume, and greenlets that wait for their turn, in order of arrival."""
        self._deferred: deque[_Task] = deque()
        """Tasks that no client waits for."""
        self._waiting: set[Any] = set()
        """The greenlets that are suspended in a `Readable`."""
        self._is_control_due = self._is_slice_due = self._is_awake = False
        self._has_control_run = self._has_given_way = False
        self._make_watchers()
        self.pauses = Pauses()
        """The times in which this loop did not run."""
        self._beat: Any = self._loop.timer(BEAT_SECONDS, BEAT_SECONDS, ref=False)
        self._beat.start(self.pauses.beat)

    def _make_watchers(self) -> None:
        loop = self._loop
        first, last = loop.MAXPRI, loop.MINPRI
        # Async watchers that are never started: events are fed to them by hand, which needs neither
        # a system call nor a poll. With gevent's own `loop.run_callback` the callback would run in
        # the next iteration, after everything that the last poll has reported.
        self._control_now: Any = loop.async_(priority=first)
        self._acks_done: Any = loop.async_(priority=last + 1)
        self._slice_now: Any = loop.async_(priority=last)
        # Check watchers fire after each poll. They are started only while they have work.
        self._poll_done: Any = loop.check(priority=first - 1)
        self._slice_after_poll: Any = loop.check(priority=last)
        # An idle watcher: while it is started, polls do not block.
        self._awake: Any = loop.idle(priority=last)

    # The four verbs.

    def run_next(self, function: Callable[..., object], *args: Any) -> None:
        """Control: run before everything else that is ready."""
        self._control.append((function, args))
        if self._is_control_due:
            return  # one event is enough: `_run_control` empties the queue
        self._is_control_due = True
        self._control_now.feed(0, self._run_control)
        if not self._is_awake:
            self._stay_awake()

    def run_after_poll(self, function: Callable[..., object], *args: Any) -> None:
        """Run after the next poll and the control that it brings, before any data of that poll.

        For reports of closed streams. Interrupts come in groups (one user's several requests, two
        users who stop talking at once): the others' streams are closed before this one's report
        makes more work.
        """
        self._after_poll.append((function, args))
        self._poll_done.start(self._run_after_poll)
        if not self._is_awake:
            self._stay_awake()

    def run_after_acks(self, function: Callable[..., object], *args: Any) -> None:
        """Run after the next poll's close reports and the acks they trigger, before any data.

        For what no ack should wait for, and what must not wait for data: freeing a socket that is
        shut down already.
        """
        # Reports run after that poll, at priority 1. What they trigger is control, at priority 2.
        # So an event that is fed then, at -1, runs when all of it is done.
        self.run_after_poll(self._feed_after_acks, (function, args))

    def run_deferred(self, function: Callable[..., object], *args: Any) -> None:
        """Run in the data lane, behind the readers that are queued there: for work that no client
        waits for, such as logging and counting. Deferred tasks run in order."""
        self._deferred.append((function, args))
        self._run_slice_after_next_poll()

    @property
    def is_behind(self) -> bool:
        """Whether too much work was deferred: what causes more of it should wait."""
        return len(self._deferred) > MAX_DEFERRED

    # For time limits.

    def run_after_reads(self, function: Callable[..., object], *args: Any) -> None:
        """Poll once more, and run behind the readers that have something to read by then.

        For decisions about a peer: what it has sent comes first.
        """
        # The sockets of that poll are reported at the priorities 2 to 0, and their readers join the
        # data lane. What runs after the acks, at -1, comes behind them.
        self.run_after_acks(self._queue_after_reads, function, args)

    def limit(self, seconds: float, expired: Callable[..., object], *args: Any) -> Limit:
        """Make a time limit for a peer; `start()` starts it.

        Args:
            seconds: the limit; 0 is none.
            expired: called once, in the hub, when the limit has passed.
            args: its arguments.
        """
        return Limit(seconds, expired, *args, pauses=self.pauses, look=self.run_after_reads)

    def control_limit(self, seconds: float, expired: Callable[..., object], *args: Any) -> Limit:
        """Make a time limit that only control can meet: it does not wait for data to be read.

        Args:
            seconds: the limit; 0 is none.
            expired: called once, in the hub, when the limit has passed.
            args: its arguments.
        """
        return Limit(seconds, expired, *args, pauses=self.pauses, look=self.run_after_acks)

    # What greenlets wait for.

    def wait_turn(self) -> None:
        """Suspend the calling greenlet until the data lane reaches it: before work that takes long,
        so that pending control runs first."""
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        self._data.append((waiter.switch, (None,)))
        self._run_slice_after_next_poll()
        waiter.get()

    def wait_deferred(self) -> None:
        """Suspend the calling greenlet until everything has run that was asked for before."""
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        self.run_after_acks(self.run_deferred, waiter.switch, None)
        waiter.get()

    def wait_reads(self) -> None:
        """Suspend the calling greenlet until everything has been read that has arrived by the next
        poll, up to the size of one read for each socket."""
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        self.run_after_reads(waiter.switch, None)
        waiter.get()

    def wait_for_control(self) -> None:
        """Suspend the calling greenlet until the control that is queued now has run."""
        waiter: gevent.hub.Waiter[None] = gevent.hub.Waiter()
        self.run_next(waiter.switch, None)
        waiter.get()

    def readable(self, fileno: int) -> Readable:
        """Make what a reader of data waits in: the data lane resumes it.

        Args:
            fileno: of the socket.
        """
        return Readable(self._loop.io(fileno, _READ), self._queue_reader, self._waiting)

    def readable_control(self, fileno: int) -> Readable:
        """Make what a reader of control waits in: it is resumed before all else that is ready.

        Args:
            fileno: of the socket.
        """
        watcher = self._loop.io(fileno, _READ, priority=self._loop.MAXPRI)
        return Readable(watcher, Readable.resume, self._waiting)

    def throw(self, greenlet: gevent.Greenlet[..., Any], error: BaseException) -> None:
        """Raise an error in a greenlet, now. Runs in the hub.

        Does what the greenlet's own `throw` does, but where the greenlet is suspended in a
        `Readable`, it is resumed with the error as a value, and raises it itself. An exception that
        is thrown has to leave the loop's `switch` first, which takes 9 to 45 µs more: that would be
        most of what it takes to close a stream.
        """
        if greenlet in self._waiting:
            greenlet.switch(error)
        else:
            greenlet.throw(error)

    # In the hub, from here on.

    def _run_control(self) -> None:
        self._has_control_run = True
        control = self._control
        while control:
            function, args = control.popleft()
            try:  # as in `_run`, without its call: an interrupt takes a dozen of these steps
                function(*args)
            except BaseException:
                gevent.get_hub().handle_error(function, *sys.exc_info())
        # Only now: what control itself asks for next has run in this loop, without another event.
        self._is_control_due = False

    def _run_after_poll(self) -> None:
        # Only what is queued now: what a report adds is for after the next poll.
        for _ in range(len(self._after_poll)):
            _run(*self._after_poll.popleft())
        if not self._after_poll:
            self._poll_done.stop()

    def _feed_after_acks(self, task: _Task) -> None:
        self._after_acks.append(task)
        self._acks_done.feed(0, self._run_after_acks)

    def _run_after_acks(self) -> None:
        while self._after_acks:
            _run(*self._after_acks.popleft())

    def _queue_after_reads(self, function: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._data.append((function, args))
        self._run_slice_after_next_poll()

    def _queue_reader(self, readable: Readable) -> None:
        # A poll has just reported it. So a slice may run in this same iteration, at the end of it:
        # to wait for another poll would cost 20 µs for every batch of tokens.
        self._data.append(readable)
        if not self._is_slice_due:
            self._is_slice_due = True
            self._slice_now.feed(0, self._run_slice)

    def _run_slice_after_next_poll(self) -> None:
        # Data may ask for this in its own slice. Fed in the same iteration, as above, slice would
        # follow slice for as long as there is data, with no poll in between.
        self._is_slice_due = True
        self._slice_after_poll.start(self._run_slice)
        if not self._is_awake:
            self._stay_awake()

    def _run_slice(self) -> None:
        """One slice of data, or none. Only three things can happen:

        - Control has run since the last slice. Interrupts come in groups, so the next one may be in
          the kernel already: give way to one more poll, which costs less than a slice. But only
          once, or a client that never stops sending would hold up the answers of all others.
        - The first in the queue is a greenlet that waits for its turn. It waits because its work
          takes long (to make a request takes 0.5 ms), so this is a slice of its own, and control
          waits for one of them at most.
        - The first in the queue is a reader: resume readers until the time is up, or until one that
          waits for its turn is next.

        Deferred tasks come behind: one in any case, so that readers cannot starve them, and more
        while there is time.
        """
        has_control_run, self._has_control_run = self._has_control_run, False
        if has_control_run and not self._has_given_way:
            self._has_given_way = True
        else:
            self._has_given_way = False
            until = time.monotonic() + SLICE_SECONDS
            self._resume_readers(until)
            deferred = self._deferred
            while deferred:
                _run(*deferred.popleft())
                # What a task has asked of control comes before the next task: its log lines, too.
                if self._is_control_due or time.monotonic() > until:
                    break
        if self._data or self._deferred:
            self._run_slice_after_next_poll()
        else:
            self._is_slice_due = False
            self._slice_after_poll.stop()

    def _resume_readers(self, until: float) -> None:
        data = self._data
        while data:
            first = data.popleft()
            if isinstance(first, tuple):
                _run(*first)
                return
            first.resume()
            if time.monotonic() > until or (data and isinstance(data[0], tuple)):
                return

    def _stay_awake(self) -> None:
        self._is_awake = True
        self._awake.start(self._may_sleep)

    def _may_sleep(self) -> None:
        """Let polls block again, if nothing is queued.

        A poll must not block in two cases. First: something is queued here to be run after it.
        Second: control that ran just before the poll has queued a callback in gevent's own loop
        (`run_callback`, as `spawn` and `Event.set` do). That loop has run its callbacks of this
        iteration already, and would run this one only when the poll returns. The queues here show
        the first case, but not the second. So this is the callback of an idle watcher: with the
        lowest priority, it fires only when a poll brought nothing and no event is pending, and
        gevent runs its callbacks again before the next poll.
        """
        if not (self._control or self._after_poll or self._data or self._deferred):
            self._is_awake = False
            self._awake.stop()


class PlainLanes(Lanes):
    """The same verbs on a loop without priorities: libuv, which is gevent's on Windows.

    Everything is one of the loop's callbacks, in order of arrival. So a stream is still closed,
    reported and freed in this order, but what an interrupt waits for grows with the load.
    """

    def _make_watchers(self) -> None:
        pass

    def run_next(self, function: Callable[..., object], *args: Any) -> None:
        """Run as soon as the loop comes to it, with all control that is queued by then."""
        self._control.append((function, args))
        if not self._is_control_due:
            self._is_control_due = True
            self._loop.run_callback(self._run_control)

    def run_after_poll(self, function: Callable[..., object], *args: Any) -> None:
        """Run behind the callbacks that are queued now."""
        self._loop.run_callback(_run, function, args)

    def run_after_acks(self, function: Callable[..., object], *args: Any) -> None:
        """Run behind the reports that are queued now."""
        self.run_after_poll(self.run_after_poll, function, *args)

    run_deferred = run_after_poll

    def run_after_reads(self, function: Callable[..., object], *args: Any) -> None:
        """Run after the next poll and the readers that it resumes."""
        timer = self._loop.timer(_POLL_SECONDS)

        def fire() -> None:
            timer.close()
            function(*args)

        timer.start(fire)

    def wait_turn(self) -> None:
        """Let everything run that is ready now."""
        gevent.sleep(0)

    wait_deferred = wait_turn

    def readable(self, fileno: int) -> PlainReadable:
        """Make what a reader waits in: it is resumed when its socket is reported."""
        return PlainReadable(self._loop.io(fileno, _READ), Readable.resume, self._waiting)

    readable_control = readable


def _run(function: Callable[..., object], args: tuple[Any, ...]) -> None:
    try:
        function(*args)
    except BaseException:  # whatever it is: the next task belongs to another request
        gevent.get_hub().handle_error(function, *sys.exc_info())


_lanes_by_hub: weakref.WeakKeyDictionary[gevent.hub.Hub, Lanes] = weakref.WeakKeyDictionary()


def lanes() -> Lanes:
    """The lanes of the calling thread's loop."""
    hub = gevent.get_hub()
    found = _lanes_by_hub.get(hub)
    if found is None:
        # Recognised by its module: the loop of libuv has a MAXPRI, too, and ignores it.
        has_priorities = type(hub.loop).__module__.startswith("gevent.libev")
        found = _lanes_by_hub[hub] = Lanes() if has_priorities else PlainLanes()
    return found
