"""One generation: its states, its reader, its one terminal report."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Any, Protocol, assert_never

import msgspec
import pykka

from actors.actor import GreenletActor, tell
from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.messages import (
    CallWritten,
    FirstToken,
    GenerationEnded,
    ReaderEnded,
    RegisterAgain,
    RequestAccepted,
    RequestClosed,
    RequestMessage,
    RequestReported,
    Start,
    Stop,
    StreamOpened,
    SupervisorMessage,
    TerminalSent,
)
from gateway.wire.protocol import FunctionCall
from llm.chat.completions import Delta, Prompt, ToolCall
from llm.chat.generation import GenerationResult, Sink
from llm.errors import StreamError
from llm.stage import Ending
from metrics.instruments import Metrics
from metrics.logs import get_logger

_MAX_TOKENS = 1_000_000_000
"""Of one generation, as its provider says. What is more, or less than none, is no count, and the
counter would raise."""

_log = get_logger("LLM")  # for what comes behind something of the data lane
_deferred_log = DeferredLog(_log)


class RequestState(enum.StrEnum):
    """Where a generation is. The last four are terminal: nothing leads out of them."""

    CONNECTING = "connecting"
    WAITING = "waiting"  # for the first token
    STREAMING = "streaming"
    COMPLETED = "completed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    REAPED = "reaped"


_ENDS = frozenset(
    {
        RequestState.COMPLETED,
        RequestState.INTERRUPTED,
        RequestState.FAILED,
        RequestState.REAPED,
    }
)
_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.CONNECTING: _ENDS | {RequestState.WAITING},
    RequestState.WAITING: _ENDS | {RequestState.STREAMING},
    RequestState.STREAMING: _ENDS,
    RequestState.COMPLETED: frozenset(),
    RequestState.INTERRUPTED: frozenset(),
    RequestState.FAILED: frozenset(),
    RequestState.REAPED: frozenset(),
}


class Outlet(Protocol):
    """Where the answer goes."""

    def put(self, text: str) -> None:
        """Take a piece of the answer. May block the reader, and nobody else."""

    def put_call(self, call: FunctionCall, on_written: Callable[[float], None]) -> None:
        """Take a function call. May block, too."""

    def progress_at(self) -> float:
        """`time.monotonic()` of the client's last progress while its reader waits, else 0."""


class Stream(Protocol):
    """A generation, as `llm.chat.generation` makes them."""

    @property
    def progress_at(self) -> float: ...
    def start(self) -> None: ...
    def close(self) -> None: ...
    def kill_again(self) -> None: ...


class StreamSource(Protocol):
    """Makes generations; `llm.chat.generation.LlmClient` is the one in use."""

    def generation(
        self, prompt: Prompt, sink: Sink, on_end: Callable[[GenerationResult], None]
    ) -> Stream: ...


class RequestActor(GreenletActor):
    """Runs one generation and reports its end to its session, exactly once.

    It lives until it has reported and its session has released it. Function calls that the client
    was given are put in the session's list `calls`.

    The report comes when the reader is dead, whoever wanted it to end, and even when this actor
    itself fails.
    """

    def __init__(
        self,
        *,
        session_id: str,
        request_id: str,
        session: pykka.ActorRef[Any],
        tell_supervisor: Callable[[SupervisorMessage], None],
        source: StreamSource,
        outlet: Outlet,
        calls: list[ToolCall],
        metrics: Metrics,
    ) -> None:
        super().__init__()
        self._session_id = session_id
        self._request_id = request_id
        self._session = session
        self._tell_supervisor = tell_supervisor
        self._log_fields = {"session_id": session_id, "request_id": request_id}
        self._metrics = metrics
        self._outlet = outlet
        self._calls = calls
        self._source = source
        self._stream: Stream | None = None
        self._state = self._active_state = RequestState.CONNECTING
        self._result = GenerationResult(Ending.CLOSED)
        self._created_at = time.monotonic()
        self._started_at: float | None = None
        self._told_to_stop: Stop | None = None
        self._reader_result: GenerationResult | None = None
        """There as soon as the reader is dead."""
        self._reported = self._released = self._is_recorded = False
        metrics.requests_active.labels(self._state).inc()

    def describe(self, now: float) -> dict[str, Any]:
        return {
            **self._log_fields,
            "state": self._state,
            "seconds": round(now - self._created_at, 1),
            "seconds_without_progress": round(now - self._progress_at(), 1),
            "told_to_stop": self._told_to_stop is not None,
            "reported": self._reported,
        }

    def opened(self) -> None:
        self._register()

    def handle(self, message: RequestMessage) -> None:
        match message:
            case Stop():
                self._stop_reading(message)
            case ReaderEnded(result):
                self._end(result)
            case Start(prompt):
                self._start(prompt)
            case StreamOpened():
                self._advance(RequestState.WAITING)
            case FirstToken():
                self._first_token()
            case TerminalSent():
                self._release()
            case RegisterAgain():
                self._register()
            case _:
                assert_never(message)

    def closed(self, error: BaseException | None) -> None:
        if error is not None and not self._released:
            self._tell_supervisor(RequestClosed(self.actor_urn))  # it will not hear of its release
        if self._reported:
            self._record(_deferred_log)
        elif self._stream is None or self._reader_result is not None:
            self._report_failure()
        else:
            self._stream.close()  # its end reports

    def _register(self) -> None:
        self._tell_supervisor(
            RequestAccepted(
                self.actor_ref,
                self._session,
                self._session_id,
                self._request_id,
                self._created_at,
                self._progress_at,
                self._kill_again,
            )
        )
        if self._reported:
            self._tell_supervisor(GenerationEnded(self.actor_urn))
        if self._released:
            self._tell_supervisor(RequestClosed(self.actor_urn))

    def _progress_at(self) -> float:
        begun_at = self._created_at if self._stream is None else self._stream.progress_at
        return max(begun_at, self._outlet.progress_at())

    def _kill_again(self) -> None:
        if self._stream is not None:
            self._stream.kill_again()

    def _start(self, prompt: Prompt) -> None:
        if self._told_to_stop is None and self._started_at is None:
            self._started_at = time.monotonic()
            relay = _Relay(
                self.actor_ref,
                self._session,
                self._log_fields,
                self._outlet,
                self._calls,
                self._metrics,
            )
            self._stream = self._source.generation(prompt, relay, self._reader_ended)
            self._stream.start()

    def _first_token(self) -> None:
        self._advance(RequestState.STREAMING)
        if self._started_at is not None:
            waited = time.monotonic() - self._started_at
            self._metrics.time_to_first_chunk_seconds.observe(waited)

    def _stop_reading(self, stop: Stop) -> None:
        if self._told_to_stop is not None:
            return
        self._told_to_stop = stop
        if self._stream is None:
            self._end(GenerationResult(Ending.CLOSED))
        else:
            self._stream.close()

    def _end(self, result: GenerationResult) -> None:
        self._report(result)
        if self._released:
            self._leave()

    def _release(self) -> None:
        self._released = True
        self._tell_supervisor(RequestClosed(self.actor_urn))
        if self._reported:
            self._leave()

    def _leave(self) -> None:
        self.stop()
        self._record()

    def _reader_ended(self, result: GenerationResult) -> None:
        # Runs in the hub. If the actor has failed meanwhile, or fails before it gets the message,
        # its request still gets its report.
        self._reader_result = result
        if self._is_closed or not tell(self.actor_ref, ReaderEnded(result)):
            self._report_failure()

    def _report_failure(self) -> None:
        closed_at = None if self._reader_result is None else self._reader_result.closed_at
        error = StreamError("the gateway failed")
        self._report(GenerationResult(Ending.FAILED, error, closed_at=closed_at))

    def _report(self, result: GenerationResult) -> None:
        if self._reported:
            return
        self._reported = True
        self._result = result
        self._advance(self._final_state(result))
        # Nothing but what others wait for: the books are kept when the client has its ack.
        tell(self._session, RequestReported(self._request_id, result))
        lanes().run_deferred(self._tell_supervisor, GenerationEnded(self.actor_urn))
        if self._is_closed:
            self._record(_deferred_log)  # it has failed, and will not hear of a release

    def _record(self, log: Any = _log) -> None:
        if self._is_recorded:
            return
        self._is_recorded = True
        self._metrics.requests_active.labels(self._active_state).dec()
        self._count(self._result)
        if self._state is RequestState.INTERRUPTED and self._started_at is not None:
            reason = self._told_to_stop.reason if self._told_to_stop else ""
            log.info("LLM stream cancelled by user", reason=reason, **self._log_fields)
        elif self._state is RequestState.FAILED:
            log.warning(
                "Generation failed",
                error=str(self._result.error),
                provider=self._result.provider,
                **self._log_fields,
            )

    def _final_state(self, result: GenerationResult) -> RequestState:
        match result.ending:
            case Ending.COMPLETED:
                return RequestState.COMPLETED
            case Ending.FAILED:
                return RequestState.FAILED
            case Ending.CLOSED:
                reaped = self._told_to_stop is not None and self._told_to_stop.reaped
                return RequestState.REAPED if reaped else RequestState.INTERRUPTED

    def _count(self, result: GenerationResult) -> None:
        metrics = self._metrics
        if self._started_at is not None:
            ended_at = result.closed_at or time.monotonic()
            metrics.generation_seconds.labels(self._state).observe(
                max(0.0, ended_at - self._started_at)
            )
        if result.error is not None:
            metrics.llm_errors.labels(_kind(result.error)).inc()
        if result.usage is not None:
            self._count_tokens("prompt", result.usage.prompt_tokens)
            self._count_tokens("completion", result.usage.completion_tokens)

    def _count_tokens(self, kind: str, tokens: int) -> None:
        if 0 <= tokens <= _MAX_TOKENS:
            self._metrics.llm_tokens.labels(kind).inc(tokens)

    def _advance(self, state: RequestState) -> None:
        if state not in _TRANSITIONS[self._state]:
            return
        self._state = state
        if state not in _ENDS:
            active = self._metrics.requests_active
            active.labels(self._active_state).dec()
            active.labels(state).inc()
            self._active_state = state


def _kind(error: StreamError) -> str:
    return type(error).__name__.removesuffix("Error")


class _Relay:
    """The reader's side: text goes to the outlet, milestones to the mailbox."""

    def __init__(
        self,
        request: pykka.ActorRef[Any],
        session: pykka.ActorRef[Any],
        log_fields: dict[str, str],
        outlet: Outlet,
        calls: list[ToolCall],
        metrics: Metrics,
    ) -> None:
        self._request = request
        self._session = session
        self._log_fields = log_fields
        self._outlet = outlet
        self._calls = calls
        self._metrics = metrics
        self._first = True

    def posted(self) -> None:
        self._metrics.llm_posts.inc()

    def retrying(self, provider: str, error: StreamError, pause_seconds: float) -> None:
        self._metrics.llm_retries.labels(_kind(error)).inc()
        _log.info(
            "Retrying generation",
            error=str(error),
            provider=provider,
            pause_seconds=round(pause_seconds, 3),
            **self._log_fields,
        )

    def falling_back(self, provider: str, error: StreamError | None) -> None:
        self._metrics.llm_fallbacks.inc()
        why = "it failed too often" if error is None else str(error)
        _log.info("Asking the fallback", error=why, provider=provider, **self._log_fields)

    def opened(self) -> None:
        tell(self._request, StreamOpened())

    def put(self, delta: Delta) -> None:
        if self._first:
            self._first = False
            tell(self._request, FirstToken())
        if delta.text:
            self._outlet.put(delta.text)

    def call(self, call: ToolCall) -> None:
        def written(_at: float) -> None:
            # At once, so that the session knows of it before the client's result can come.
            self._calls.append(call)
            tell(self._session, CallWritten(self._log_fields["request_id"]))

        parameters = msgspec.json.decode(call.arguments, type=dict[str, Any])
        self._outlet.put_call(FunctionCall(call.name, parameters, call.id), written)
