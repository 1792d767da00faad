"""One request: its states, its row of stages, its one terminal report."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import Any, assert_never

import pykka

from actors.actor import GreenletActor, tell
from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.messages import (
    AskProgress,
    CallDelivered,
    FirstToken,
    GenerationEnded,
    ProgressTold,
    RegisterAgain,
    RequestAccepted,
    RequestClosed,
    RequestMessage,
    RequestReported,
    StagesEnded,
    Start,
    Stop,
    StreamOpened,
    SupervisorMessage,
    TerminalSent,
)
from actors.outlet import Outlet
from actors.row import MakeStages, Report, Row, make_report
from llm.chat.completions import Delta, Prompt, ToolCall
from llm.errors import StreamError
from llm.stage import Ending, StageResult
from metrics.instruments import Metrics
from metrics.logs import get_logger

_MAX_TOKENS = 1_000_000_000
"""A count above this, or below 0, is a provider's mistake and is not added: a counter raises on a
negative number."""

_KILL_AGAIN_SECONDS = 60.0
"""Interval of the attempts to kill a stage whose actor has failed: the reaper's own interval."""

_log = get_logger("LLM")  # for code that already runs in the data lane
_deferred_log = DeferredLog(_log)


class RequestState(enum.StrEnum):
    """The state of a request. The last four are terminal: they have no transitions."""

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


class RequestActor(GreenletActor):
    """Runs the stages of one request and reports their end to the session, exactly once.

    The report is sent when the last stage has ended, for whatever reason, and also when this actor
    fails. The actor ends when it has reported and has received `TerminalSent`.

    Args:
        session_id: the session's id, for the log.
        request_id: the id that the client gave the request.
        session: the session-actor, which gets the report.
        tell_supervisor: puts a message in the supervisor's mailbox.
        make_stages: makes the stages of the row.
        outlet: where the answer goes.
        metrics: where it is counted.
    """

    def __init__(
        self,
        *,
        session_id: str,
        request_id: str,
        session: pykka.ActorRef[Any],
        tell_supervisor: Callable[[SupervisorMessage], None],
        make_stages: MakeStages,
        outlet: Outlet,
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
        self._make_stages = make_stages
        self._row: Row | None = None
        self._state = self._active_state = RequestState.CONNECTING
        self._report: Report | None = None
        self._created_at = time.monotonic()
        self._started_at: float | None = None
        self._stop_message: Stop | None = None
        self._results: tuple[StageResult, ...] | None = None
        """Set when the last stage has ended."""
        self._is_client_served = self._is_recorded = False
        metrics.requests_active.labels(self._state).inc()

    def describe(self, now: float) -> dict[str, Any]:
        return {
            **self._log_fields,
            "state": self._state,
            "seconds": round(now - self._created_at, 1),
            "seconds_without_progress": round(now - self._progress_at(), 1),
            "told_to_stop": self._stop_message is not None,
            "reported": self._report is not None,
        }

    def opened(self) -> None:
        self._register()

    def handle(self, message: RequestMessage) -> None:
        match message:
            case Stop():
                self._stop_stages(message)
            case StagesEnded(results):
                self._end(results)
            case Start(prompt):
                self._start(prompt)
            case StreamOpened():
                self._advance(RequestState.WAITING)
            case FirstToken():
                self._first_token()
            case TerminalSent():
                self._terminal_sent()
            case AskProgress(now):
                self._tell_supervisor(ProgressTold(self.actor_urn, self._progress_at(), now))
            case RegisterAgain():
                self._register()
            case _:
                assert_never(message)

    def closed(self, error: BaseException | None) -> None:
        if error is not None and not self._is_client_served:
            # The actor has failed, so no TerminalSent can reach it.
            self._tell_supervisor(RequestClosed(self.actor_urn))
        if self._report is not None:
            self._record(_deferred_log)
        elif self._row is None or self._row.has_ended:
            self._report_failure()
        else:
            self._row.outlive_owner(_KILL_AGAIN_SECONDS)  # `_stages_ended` will report

    def _register(self) -> None:
        self._tell_supervisor(
            RequestAccepted(
                self.actor_ref,
                self._session,
                self._session_id,
                self._request_id,
                self._created_at,
            )
        )
        if self._report is not None:
            self._tell_supervisor(GenerationEnded(self.actor_urn))
        if self._is_client_served:
            self._tell_supervisor(RequestClosed(self.actor_urn))

    def _progress_at(self) -> float:
        begun_at = self._created_at if self._row is None else self._row.progress_at
        return max(begun_at, self._outlet.progress_at())

    def _start(self, prompt: Prompt) -> None:
        if self._stop_message is None and self._started_at is None:
            self._started_at = time.monotonic()
            sink = _Sink(
                self.actor_ref, self._session, self._log_fields, self._outlet, self._metrics
            )
            self._row = Row(self._make_stages, prompt, sink, self._stages_ended)
            self._row.start()

    def _first_token(self) -> None:
        self._advance(RequestState.STREAMING)
        if self._started_at is not None:
            waited = time.monotonic() - self._started_at
            self._metrics.time_to_first_chunk_seconds.observe(waited)

    def _stop_stages(self, stop: Stop) -> None:
        if self._stop_message is None:
            self._stop_message = stop
            if self._row is None:
                self._end(())
            else:
                self._row.close()
        elif stop.is_reaped and self._row is not None:
            self._row.kill_again()  # the stages did not end within an interval of the reaper

    def _end(self, results: tuple[StageResult, ...]) -> None:
        self._send_report(results)
        if self._is_client_served:
            self._leave()

    def _terminal_sent(self) -> None:
        self._is_client_served = True
        self._tell_supervisor(RequestClosed(self.actor_urn))
        if self._report is not None:
            self._leave()

    def _leave(self) -> None:
        self.stop()
        self._record()

    def _stages_ended(self, results: tuple[StageResult, ...]) -> None:
        # Runs in the hub. The session gets a report even if the actor has failed in the meantime,
        # or fails before it reads this message.
        self._results = results
        if self._is_closed or not tell(self.actor_ref, StagesEnded(results)):
            self._report_failure()

    def _report_failure(self) -> None:
        closed_at = None
        if self._results is not None:
            closed_at = make_report(self._results, self._outlet.delivered).closed_at
        error = StreamError("the gateway failed")
        self._send_report((StageResult(Ending.FAILED, error, closed_at=closed_at),))

    def _send_report(self, results: tuple[StageResult, ...]) -> None:
        if self._report is not None:
            return
        # A session discards the outlet before it says Stop, so after a Stop nothing more is sent.
        is_final = self._stop_message is not None
        report = make_report(results, self._outlet.delivered, is_final=is_final)
        self._report = report
        self._advance(self._final_state(report))
        # The client waits for its ack, so the report goes first; counting and logging come later.
        tell(self._session, RequestReported(self._request_id, report))
        lanes().run_deferred(self._tell_supervisor, GenerationEnded(self.actor_urn))
        if self._is_closed:
            self._record(_deferred_log)  # the actor has failed: no TerminalSent can reach it

    def _record(self, log: Any = _log) -> None:
        report = self._report
        if self._is_recorded or report is None:
            return
        self._is_recorded = True
        self._metrics.requests_active.labels(self._active_state).dec()
        self._count(report)
        if self._state is RequestState.INTERRUPTED and self._started_at is not None:
            reason = self._stop_message.reason if self._stop_message else ""
            log.info("LLM stream cancelled by user", reason=reason, **self._log_fields)
        elif self._state is RequestState.FAILED:
            generation = report.generation
            log.warning(
                "Generation failed",
                error=str(report.error),
                provider="" if generation is None else generation.provider,
                **self._log_fields,
            )

    def _final_state(self, report: Report) -> RequestState:
        match report.ending:
            case Ending.COMPLETED:
                return RequestState.COMPLETED
            case Ending.FAILED:
                return RequestState.FAILED
            case Ending.CLOSED:
                is_reaped = self._stop_message is not None and self._stop_message.is_reaped
                return RequestState.REAPED if is_reaped else RequestState.INTERRUPTED

    def _count(self, report: Report) -> None:
        metrics = self._metrics
        if self._started_at is not None:
            ended_at = report.closed_at or time.monotonic()
            metrics.generation_seconds.labels(self._state).observe(
                max(0.0, ended_at - self._started_at)
            )
        if report.error is not None:
            metrics.llm_errors.labels(_kind(report.error)).inc()
        usage = None if report.generation is None else report.generation.usage
        if usage is not None:
            self._count_tokens("prompt", usage.prompt_tokens)
            self._count_tokens("completion", usage.completion_tokens)

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


class _Sink:
    """Takes what the generation produces: text goes to the outlet, milestones go to mailboxes. Its
    methods run in the generation's reader."""

    def __init__(
        self,
        request: pykka.ActorRef[Any],
        session: pykka.ActorRef[Any],
        log_fields: dict[str, str],
        outlet: Outlet,
        metrics: Metrics,
    ) -> None:
        self._request = request
        self._session = session
        self._log_fields = log_fields
        self._outlet = outlet
        self._metrics = metrics
        self._is_first = True

    def posted(self) -> None:
        self._metrics.llm_posts.inc()

    def retrying(self, provider: str, error: StreamError, pause_seconds: float) -> None:
        self._metrics.llm_retries.labels(_kind(error)).inc()
        _deferred_log.info(
            "Retrying generation",
            error=str(error),
            provider=provider,
            pause_seconds=round(pause_seconds, 3),
            **self._log_fields,
        )

    def falling_back(self, provider: str, error: StreamError | None) -> None:
        self._metrics.llm_fallbacks.inc()
        why = "the provider failed too often" if error is None else str(error)
        _deferred_log.info("Asking the fallback", error=why, provider=provider, **self._log_fields)

    def opened(self) -> None:
        tell(self._request, StreamOpened())

    def put(self, delta: Delta) -> None:
        if self._is_first:
            self._is_first = False
            tell(self._request, FirstToken())
        if delta.text:
            self._outlet.put(delta.text)

    def call(self, call: ToolCall) -> None:
        def sent() -> None:
            # Not deferred: the session must know of the call before the client's result can arrive.
            tell(self._session, CallDelivered(self._log_fields["request_id"], call))

        self._outlet.put_call(call, sent)
