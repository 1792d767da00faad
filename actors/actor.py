"""The Pykka actor type that runs on a greenlet, with one way to die.

Pykka calls `on_stop` or `on_failure`, or neither when `on_start` fails, and an escaped
BaseException stops every actor there is. Here whatever ends an actor goes through `closed`, once,
and nothing escapes.
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
    """What Pykka is told when an actor fails, in place of whatever was raised."""


class _Mailbox:
    """An actor's messages, in order. Its actor is woken through the control lane, so that a message
    is handled before any data that waits."""

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
    """An actor on a greenlet of its own, which must not be killed: actors end by `stop()`.

    Subclasses implement `handle`, and `opened` and `closed` where they need them. All three run in
    the actor's greenlet. (Beware of Pykka's own private names, such as `_stop`.)
    """

    alive: ClassVar[weakref.WeakSet[GreenletActor]] = weakref.WeakSet()
    """Those that have not ended."""

    def __init__(self) -> None:
        super().__init__()
        self._is_closed = False
        self.alive.add(self)

    def describe(self, now: float) -> dict[str, Any]:
        """Its state, for a log. Called from any greenlet.

        Args:
            now: `time.monotonic()`.
        """
        return {}

    def opened(self) -> None:
        """Called before the first message."""

    def handle(self, message: Any) -> Any:
        """Handle one message; what it returns is the answer to an `ask`."""
        raise NotImplementedError

    def closed(self, error: BaseException | None) -> None:
        """Called exactly once, after the last message, whatever ended the actor.

        Args:
            error: what escaped from `opened` or `handle`; None after `stop()`.
        """

    # Pykka's side.

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
            # Closed here, and not in `on_failure`, which does not run for a message that was asked.
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
        pass  # `on_receive` has closed it

    def _close(self, error: BaseException | None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self.alive.discard(self)
        if error is not None:
            name = type(self).__name__
            _log.error("Actor failed", actor=name, error=repr(error), exc_info=error, **self._ids())
            self.stop()  # Pykka lets an actor live on that failed while it was asked
        try:
            self.closed(error)
        except BaseException as second:
            _log.error("Actor failed to close", actor=type(self).__name__, error=repr(second))

    def _ids(self) -> dict[str, Any]:
        """Whose actor it was, as far as one that is broken can say."""
        with contextlib.suppress(Exception):
            told = self.describe(time.monotonic())
            return {name: told[name] for name in ("session_id", "request_id") if name in told}
        return {}


def queued_messages() -> int:
    """How many messages wait in all mailboxes. Lets others have a turn, so not for the hub."""
    inboxes: list[Any] = [actor.actor_inbox for actor in GreenletActor.alive]
    return sum(len(inbox) for inbox in in_slices(inboxes))


def tell(ref: pykka.ActorRef[Any], message: object) -> bool:
    """Put a message in an actor's mailbox; False when it has just ended, which is no error."""
    try:
        ref.tell(message)
    except pykka.ActorDeadError:
        return False
    return True


class Timer:
    """Puts a message in a mailbox later, without a greenlet. The hub runs it.

    Args:
        seconds: when, from now.
        ref: whose mailbox.
        message: what.
    """

    def __init__(self, seconds: float, ref: pykka.ActorRef[Any], message: object) -> None:
        self._timer = gevent.get_hub().loop.timer(seconds)
        self._timer.start(self._fire, ref, message)

    def cancel(self) -> None:
        """Send nothing any more."""
        self._timer.stop()
        self._timer.close()

    def _fire(self, ref: pykka.ActorRef[Any], message: object) -> None:
        self.cancel()
        tell(ref, message)
