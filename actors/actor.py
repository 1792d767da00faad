"""The Pykka actor type that runs on a greenlet, with one way to die.

Pykka calls either `on_stop` or `on_failure`, neither of them when `on_start` fails, and stops every
actor in the process when a BaseException escapes from one. Here every ending of an actor calls
`closed`, exactly once, and no exception escapes.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from types import TracebackType
from typing import Any, ClassVar, final

import gevent
import gevent.hub
import pykka

from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.loop.slices import in_slices
from metrics.logs import get_logger

_log = DeferredLog(get_logger("ACTOR"))


class ActorFailedError(Exception):
    """An actor has failed. Raised to Pykka in place of the original error, which is its cause."""


class _Mailbox:
    """An actor's messages, in order. A new message wakes the actor through the control lane, so the
    actor handles it before any queued data is written."""

    def __init__(self) -> None:
        self._messages: deque[Any] = deque()
        self._actor: gevent.hub.Waiter[None] | None = None
        self._lanes = lanes()

    def put(self, message: Any, /) -> None:
        self._messages.append(message)
        if self._actor is not None:
            actor, self._actor = self._actor, None
            self._lanes.run_next(actor.switch, None)

    def get(self) -> Any:
        if not self._messages:
            self._actor = gevent.hub.Waiter()
            self._actor.get()
        return self._messages.popleft()

    def empty(self) -> bool:
        return not self._messages

    def __len__(self) -> int:
        return len(self._messages)


class GreenletActor(pykka.Actor):
    """An actor on a greenlet of its own. End it with `stop()`; never kill its greenlet.

    Subclasses implement `handle`, and override `opened` and `closed` if they need to. All three run
    in the actor's greenlet. Do not reuse Pykka's private names, such as `_stop`.
    """

    alive: ClassVar[weakref.WeakSet[GreenletActor]] = weakref.WeakSet()
    """Every actor that has not ended."""

    def __init__(self) -> None:
        super().__init__()
        self._is_closed = False
        self.alive.add(self)

    def describe(self, now: float) -> dict[str, Any]:
        """Return the actor's state, for the log. May be called from any greenlet.

        Args:
            now: `time.monotonic()`.
        """
        return {}

    def opened(self) -> None:
        """Called once, before the first message."""

    def handle(self, message: Any) -> Any:
        """Handle one message. The return value is the answer to an `ask`."""
        raise NotImplementedError

    def closed(self, error: BaseException | None) -> None:
        """Called exactly once, after the last message, however the actor ended.

        Args:
            error: the exception that escaped from `opened` or `handle`; None after `stop()`.
        """

    # What Pykka calls.

    @staticmethod
    def _create_actor_inbox() -> Any:
        return _Mailbox()

    @staticmethod
    def _create_future() -> pykka.Future[Any]:
        return pykka.ThreadingFuture()

    def _start_actor_loop(self) -> None:
        gevent.spawn(self._actor_loop)

    @final
    def on_start(self) -> None:
        try:
            self.opened()
        except BaseException as error:
            self._close(error)
            raise ActorFailedError from error

    @final
    def on_receive(self, message: Any) -> Any:
        if self._is_closed:
            return None
        try:
            return self.handle(message)
        except BaseException as error:
            # Pykka does not call `on_failure` when the message came from `ask`, so close here.
            self._close(error)
            raise ActorFailedError from error

    @final
    def on_stop(self) -> None:
        self._close(None)

    @final
    def on_failure(
        self,
        exception_type: type[BaseException] | None,
        exception_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass  # `on_receive` has closed the actor already

    def _close(self, error: BaseException | None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self.alive.discard(self)
        if error is not None:
            name = type(self).__name__
            _log.error("Actor failed", actor=name, error=repr(error), exc_info=error, **self._ids())
            self.stop()  # Pykka keeps an actor running that failed during an `ask`
        try:
            self.closed(error)
        except BaseException as second:
            _log.error("Actor failed to close", actor=type(self).__name__, error=repr(second))

    def _ids(self) -> dict[str, Any]:
        """The ids for the log; none if the failed actor cannot describe itself any more."""
        with contextlib.suppress(Exception):
            state = self.describe(time.monotonic())
            return {name: state[name] for name in ("session_id", "request_id") if name in state}
        return {}


def queued_messages() -> int:
    """Count the messages in all mailboxes. Yields to other greenlets, so it must not run in the
    hub."""
    inboxes: list[Any] = [actor.actor_inbox for actor in GreenletActor.alive]
    return sum(len(inbox) for inbox in in_slices(inboxes))


def tell(ref: pykka.ActorRef[Any], message: object) -> bool:
    """Put a message in an actor's mailbox. Returns False if the actor has ended already."""
    try:
        ref.tell(message)
    except pykka.ActorDeadError:
        return False
    return True


class Timer:
    """Puts a message in an actor's mailbox later. It costs a timer of the event loop, no greenlet.

    Args:
        seconds: the delay.
        ref: the actor that gets the message.
        message: the message.
    """

    def __init__(self, seconds: float, ref: pykka.ActorRef[Any], message: object) -> None:
        self._timer = gevent.get_hub().loop.timer(seconds)
        self._timer.start(self._fire, ref, message)

    def cancel(self) -> None:
        """Stop the timer: the message is not sent."""
        self._timer.stop()
        self._timer.close()

    def _fire(self, ref: pykka.ActorRef[Any], message: object) -> None:
        self.cancel()
        tell(ref, message)
