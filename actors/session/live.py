"""A request while it is live, an INTERRUPT while it owes its ack, and the frames that end both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pykka
from msgspec import UNSET, Struct, UnsetType, field

from actors.actor import Timer
from actors.quota import Slot
from actors.request import Outlet as RequestOutlet
from actors.request import RequestActor
from actors.session.history import Ending as TurnEnding
from actors.session.history import Turn
from gateway.wire.protocol import (
    AckStatus,
    ErrorCode,
    Interrupt,
    InterruptAck,
    InterruptOutcome,
    InterruptReason,
    InterruptResult,
    Outcome,
    Response,
    ServerPayload,
    Usage,
    error,
)
from llm.chat.completions import ToolCall
from llm.chat.generation import GenerationResult
from llm.errors import LimitPassedError
from llm.stage import Ending

_NO_RESULT = GenerationResult(Ending.CLOSED)
_WORDS = {
    InterruptOutcome.STOPPED: "stopped",
    InterruptOutcome.ALREADY_DONE: "already finished",
    InterruptOutcome.UNKNOWN: "unknown request",
    InterruptOutcome.TIMED_OUT: "told to stop, but its stream is still open",
}


class Outlet(RequestOutlet, Protocol):
    """One request's way to the client (`gateway.server.outbox.Outlet`)."""

    delivered_text_chars: int

    @property
    def delivered_text(self) -> str: ...
    @property
    def done(self) -> bool: ...
    def finish(self, payload: bytes, on_written: Callable[[float], None]) -> None: ...
    def discard(self) -> bool: ...


class LiveRequest(Struct, eq=False):
    """A request from its acceptance until its terminal frame was handed to the kernel.

    Args:
        request_id: the client's.
        outlet: its way to the client.
        actor: the actor that runs it.
        turn: its place in the history.
        calls: the function calls that the client was given.
        slot: among all live requests; it is given back as soon as this one is told to stop.
        voice_stream_seq: what its terminal frame says of speech.
    """

    request_id: str
    outlet: Outlet
    actor: pykka.ActorRef[RequestActor]
    turn: Turn
    calls: list[ToolCall]
    slot: Slot
    voice_stream_seq: int | UnsetType = UNSET
    started: bool = False
    interrupted_by: InterruptReason | None = None
    reaped: str | None = None
    """What the reaper found."""
    result: GenerationResult | None = None
    timed_out: bool = False
    timer: Timer | None = None
    heard_chars: int | None = None
    """How much of the answer the user got, as the client says."""

    @property
    def is_stopping(self) -> bool:
        """True when it was told to stop, by whomever."""
        return self.interrupted_by is not None or self.reaped is not None

    @property
    def is_settled(self) -> bool:
        """True when an interrupt need not wait for it any more."""
        return self.result is not None or self.timed_out

    @property
    def is_queued(self) -> bool:
        """True when it is still to be started."""
        return not (self.started or self.is_stopping)

    @property
    def can_start(self) -> bool:
        """True when it waits, and nothing that it builds on is still to come."""
        if not self.is_queued:
            return False
        before = self.turn.continues
        return before is None or (before.ending is not None and before.resolved)

    def heard(self, chars: int | None) -> None:
        """The client says how many code points the user got."""
        if chars is not None:
            before = chars if self.heard_chars is None else self.heard_chars
            self.heard_chars = min(chars, before)

    def as_heard(self, outcome: Outcome) -> tuple[str, TurnEnding]:
        """What the user got of the answer, and how it ended to them."""
        text = self.outlet.delivered_text
        if self.heard_chars is not None and self.heard_chars < len(text):
            return text[: self.heard_chars], TurnEnding.INTERRUPTED
        match outcome:
            case Outcome.COMPLETED:
                return text, TurnEnding.COMPLETED
            case Outcome.INTERRUPTED:
                return text, TurnEnding.INTERRUPTED
            case Outcome.FAILED | Outcome.REAPED:
                return text, TurnEnding.BROKEN

    def terminal(self) -> ServerPayload:
        """The one frame that ends it."""
        result = self.result or _NO_RESULT
        if self.interrupted_by is not None:
            return interrupted(self.request_id, self.interrupted_by, self.voice_stream_seq, result)
        if self.reaped is None and result.ending is Ending.COMPLETED:
            return completed(self.request_id, self.voice_stream_seq, result)
        late = self.reaped is not None or isinstance(result.error, LimitPassedError)
        return error(
            ErrorCode.REQUEST_TIMEOUT if late else ErrorCode.INTERNAL_ERROR,
            self.reaped or str(result.error or "the generation was stopped"),
            request_id=self.request_id,
            outcome=Outcome.FAILED if self.reaped is None else Outcome.REAPED,
            finish_reason=result.finish_reason,
            usage=_usage(result),
        )

    def stop_result(self, read_at: float) -> InterruptResult:
        """What an INTERRUPT that was read at this `time.monotonic()` did to it."""
        delivered = self.outlet.delivered_text_chars
        if self.result is None:
            return InterruptResult(self.request_id, InterruptOutcome.TIMED_OUT, delivered, None)
        closed_at = self.result.closed_at
        closed_ms = None
        if closed_at is not None:
            closed_ms = round(max(0.0, closed_at - read_at) * 1000, 3)
        return InterruptResult(
            self.request_id,
            InterruptOutcome.STOPPED,
            delivered,
            closed_ms,
            UNSET if self.result.stops_on_close is None else self.result.stops_on_close.value,
        )


class PendingInterrupt(Struct, eq=False):
    """An INTERRUPT that still owes its ack."""

    frame: Interrupt
    read_at: float
    targets: dict[str, LiveRequest | InterruptResult] = field(default_factory=dict)
    active_requests: list[str] = field(default_factory=list)
    terminals: list[ServerPayload] = field(default_factory=list)
    """Of what it ended that had no generation: they follow the ack."""

    def waits_for(self, live: LiveRequest) -> bool:
        """True when the request may not end before the ack."""
        return self.targets.get(live.request_id) is live

    @property
    def ready(self) -> bool:
        """True when the ack can be given."""
        return all(
            isinstance(target, InterruptResult) or target.is_settled
            for target in self.targets.values()
        )

    def ack(self) -> InterruptAck:
        """The answer."""
        results: list[InterruptResult] = []
        stopped: list[str] = []
        words: list[str] = []
        for target in self.targets.values():
            result = (
                target if isinstance(target, InterruptResult) else target.stop_result(self.read_at)
            )
            results.append(result)
            if result.outcome is InterruptOutcome.STOPPED:
                stopped.append(result.request_id)
            words.append(f"{result.request_id}: {_WORDS[result.outcome]}")
        if not stopped:
            status = AckStatus.FAILED
        elif len(stopped) == len(results):
            status = AckStatus.SUCCESS
        else:
            status = AckStatus.PARTIAL
        message = "; ".join(words) or "no request in progress"
        return InterruptAck(stopped, status, message, results, self.frame.interrupt_request_id)


def completed(
    request_id: str,
    voice_stream_seq: int | UnsetType,
    result: GenerationResult = _NO_RESULT,
) -> Response:
    """The terminal frame of a request that was answered, or needed no answer."""
    return Response(
        request_id,
        -1,
        voice_stream_seq=voice_stream_seq,
        outcome=Outcome.COMPLETED,
        finish_reason=result.finish_reason,
        usage=_usage(result),
    )


def interrupted(
    request_id: str,
    reason: InterruptReason,
    voice_stream_seq: int | UnsetType,
    result: GenerationResult = _NO_RESULT,
) -> Response:
    """The terminal frame of a request that was interrupted, before or after it began."""
    return Response(
        request_id,
        -1,
        voice_stream_seq=voice_stream_seq,
        interrupted=True,
        interrupt_reason=reason.value,
        outcome=Outcome.INTERRUPTED,
        finish_reason=result.finish_reason,
        usage=_usage(result),
    )


def _usage(result: GenerationResult) -> Usage | None:
    usage = result.usage
    if usage is None and result.usage_estimate is not None:
        usage = result.usage_estimate.guess()
    if usage is None:
        return None
    return Usage(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.total_tokens,
        usage.estimated or UNSET,
    )
