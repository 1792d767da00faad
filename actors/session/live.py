"""The live requests of a session: their state, their end, and how they are stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pykka
from msgspec import Struct

from actors.actor import tell
from actors.loop.lanes import lanes
from actors.loop.limit import Limit
from actors.messages import Stop, TerminalSent
from actors.outlet import Delivered, Outlet, RequestEnd
from actors.quota import Slot
from actors.request import RequestActor
from actors.row import Report
from actors.session.books import Books
from actors.session.history import Ending as TurnEnding
from actors.session.history import Turn
from actors.session.messages import StopOverdue
from actors.session.port import InterruptResult
from actors.words import ErrorCode, InterruptOutcome, InterruptReason, Outcome
from llm.chat.completions import Usage
from llm.errors import LimitPassedError
from llm.stage import Ending


class LiveRequest(Struct, eq=False):
    """A request, from its acceptance until its terminal frame was handed to the kernel.

    Args:
        request_id: the id that the client gave the request.
        outlet: where the answer goes.
        actor: the request-actor.
        turn: its turn in the history.
        slot: its slot in the quota of live requests; released when the request is told to stop.
        wants_speech: whether the client waits for the end of speech.
    """

    request_id: str
    outlet: Outlet
    actor: pykka.ActorRef[RequestActor]
    turn: Turn
    slot: Slot
    wants_speech: bool = False
    is_started: bool = False
    interrupted_by: InterruptReason | None = None
    reap_detail: str | None = None
    """Why the reaper ended it; None if it did not."""
    report: Report | None = None
    is_timed_out: bool = False
    """Whether a stage still ran when the time limit for stopping expired."""
    stop_limit: Limit | None = None
    heard_chars: int | None = None
    """How many Unicode code points of the answer the user got, according to the client."""

    @property
    def is_stopping(self) -> bool:
        """True once it was told to stop."""
        return self.interrupted_by is not None or self.reap_detail is not None

    @property
    def is_settled(self) -> bool:
        """True when an interrupt no longer has to wait for it."""
        return self.report is not None or self.is_timed_out

    @property
    def is_queued(self) -> bool:
        """True while it waits to be started."""
        return not (self.is_started or self.is_stopping)

    @property
    def can_start(self) -> bool:
        """True when it is queued, and the turn that it continues has ended with all its results."""
        if not self.is_queued:
            return False
        before = self.turn.continues
        return before is None or (before.ending is not None and before.is_resolved)

    @property
    def delivered(self) -> Delivered:
        """What the client got of it."""
        if self.report is not None and self.report.is_final:
            return self.report.delivered
        return self.outlet.delivered

    def hear(self, chars: int | None) -> None:
        """Note how many code points the user got, according to the client. The smallest number
        counts."""
        if chars is not None:
            before = chars if self.heard_chars is None else self.heard_chars
            self.heard_chars = min(chars, before)

    def as_heard(self, outcome: Outcome) -> tuple[str, TurnEnding]:
        """What the user got of the answer, and how it ended for the user."""
        text = self.delivered.text
        if self.heard_chars is not None and self.heard_chars < len(text):
            return text[: self.heard_chars], TurnEnding.INTERRUPTED
        match outcome:
            case Outcome.COMPLETED:
                return text, TurnEnding.COMPLETED
            case Outcome.INTERRUPTED:
                return text, TurnEnding.INTERRUPTED
            case Outcome.FAILED | Outcome.REAPED:
                return text, TurnEnding.BROKEN

    @property
    def outcome(self) -> Outcome:
        """How it ends. An interrupt takes precedence over a reap, and both over the report."""
        if self.interrupted_by is not None:
            return Outcome.INTERRUPTED
        if self.reap_detail is not None:
            return Outcome.REAPED
        is_complete = self.report is not None and self.report.ending is Ending.COMPLETED
        return Outcome.COMPLETED if is_complete else Outcome.FAILED

    def end(self) -> RequestEnd:
        """The end that the client is told."""
        generation = None if self.report is None else self.report.generation
        finish_reason = None if generation is None else generation.finish_reason
        usage: Usage | None = None
        if generation is not None:
            usage = generation.usage
            if usage is None and generation.usage_estimate is not None:
                usage = generation.usage_estimate.guess()
        code, detail = None, ""
        if self.outcome in (Outcome.FAILED, Outcome.REAPED):
            error = None if self.report is None else self.report.error
            is_late = self.reap_detail is not None or isinstance(error, LimitPassedError)
            code = ErrorCode.REQUEST_TIMEOUT if is_late else ErrorCode.INTERNAL_ERROR
            detail = self.reap_detail or str(error or "the generation was stopped")
        return RequestEnd(
            self.request_id,
            self.outcome,
            self.interrupted_by,
            code,
            detail,
            finish_reason,
            usage,
            self.wants_speech,
        )

    def interrupt_result(self, read_at: float) -> InterruptResult:
        """What an interrupt did to it.

        Args:
            read_at: `time.monotonic()` when the interrupt was read.
        """
        chars = self.delivered.text_chars
        if self.report is None:
            return InterruptResult(self.request_id, InterruptOutcome.TIMED_OUT, chars)
        closed_at = self.report.closed_at
        closed_ms = None
        if closed_at is not None:
            closed_ms = round(max(0.0, closed_at - read_at) * 1000, 3)
        return InterruptResult(
            self.request_id,
            InterruptOutcome.STOPPED,
            chars,
            closed_ms,
            self.report.stops_on_close,
        )


class LiveRequests:
    """The live requests of one session, in the order in which they were accepted.

    Args:
        session: the session-actor, which gets `StopOverdue`.
        ack_timeout: time limit in seconds for stopping a request.
        books: counts and logs.
    """

    def __init__(self, session: pykka.ActorRef[Any], ack_timeout: float, books: Books) -> None:
        self._session = session
        self._ack_timeout = ack_timeout
        self._books = books
        self._lanes = lanes()
        self._by_id: dict[str, LiveRequest] = {}

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._by_id.values()))

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def ids(self) -> list[str]:
        """The ids of the live requests, in order."""
        return list(self._by_id)

    def get(self, request_id: str) -> LiveRequest | None:
        """The live request of this id; None if there is none."""
        return self._by_id.get(request_id)

    def add(self, live: LiveRequest) -> None:
        """Add an accepted request."""
        self._by_id[live.request_id] = live

    def remove(self, live: LiveRequest) -> None:
        """Remove a request of which nothing is left to send."""
        del self._by_id[live.request_id]
        live.slot.release()

    def interrupt(self, live: LiveRequest, reason: InterruptReason) -> bool:
        """Stop a request. Returns False, without effect, if its end can no longer be held back."""
        if not self._stop(live, Stop(reason=reason)):
            return False
        live.interrupted_by = live.interrupted_by or reason
        return True

    def reap(self, live: LiveRequest, detail: str) -> bool:
        """Stop a stale request. Returns False, without effect, if it is stopping already or its end
        can no longer be held back."""
        if live.is_stopping or not self._stop(live, Stop(is_reaped=True)):
            return False
        live.reap_detail = detail
        self._books.request_reaped()
        return True

    def stop_overdue(self, request_id: str) -> bool:
        """The time limit for stopping a request expired. Returns False if it has reported, or is no
        longer live."""
        live = self._by_id.get(request_id)
        if live is None or live.report is not None:
            return False
        live.is_timed_out = True
        self._books.stop_overdue(request_id, self._ack_timeout)
        return True

    def reported(self, request_id: str, report: Report) -> LiveRequest | None:
        """Record the report of a request-actor. Returns its request; None if that is no longer live
        or has a report already."""
        live = self._by_id.get(request_id)
        if live is None or live.report is not None:
            return None  # the stop has timed out before
        live.report = report
        if live.stop_limit is not None:
            live.stop_limit.stop()
        return live

    def abandon(self, count: Callable[[Outcome], None]) -> None:
        """The session is over or has failed: stop all requests, and send nothing to the client.

        Args:
            count: called with the outcome of each request.
        """
        for live in self:
            if live.stop_limit is not None:
                live.stop_limit.stop()
            live.outlet.discard()
            live.slot.release()
            tell(live.actor, Stop())
            tell(live.actor, TerminalSent())
            count(Outcome.FAILED)

    def _stop(self, live: LiveRequest, stop: Stop) -> bool:
        # The outlet comes first: from here on, nothing of this request is written.
        if not live.outlet.discard():
            return False
        live.slot.release()
        if not live.is_stopping and live.report is None:
            tell(live.actor, stop)
            self._lanes.run_after_acks(self._limit_stop, live)  # most need none
        return True

    def _limit_stop(self, live: LiveRequest) -> None:
        if live.report is None:
            overdue = StopOverdue(live.request_id)
            limit = self._lanes.control_limit(self._ack_timeout, tell, self._session, overdue)
            live.stop_limit = limit
            limit.start()
