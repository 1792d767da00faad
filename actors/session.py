"""One client: its live requests, and the only one who decides what an INTERRUPT hits."""

from __future__ import annotations

import enum
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, assert_never

import pykka
from msgspec import UNSET, UnsetType

from actors.greenlet import GreenletActor, Timer, tell
from actors.messages import (
    BadFrameReceived,
    ConnectionLost,
    EndSession,
    FrameReceived,
    ReapRequest,
    RegisterAgain,
    Release,
    RequestReported,
    SessionEnded,
    SessionMessage,
    SessionStarted,
    Start,
    Stop,
    StopOverdue,
    SupervisorMessage,
    TerminalWritten,
)
from actors.request import RequestActor, StreamSource, TextOutlet
from gateway.protocol import (
    AckStatus,
    ClientFrame,
    ErrorCode,
    FrameError,
    HealthCheck,
    HealthCheckAck,
    HealthStatus,
    HeartbeatReply,
    Interrupt,
    InterruptAck,
    InterruptOutcome,
    InterruptReason,
    InterruptResult,
    Outcome,
    Register,
    RegisterAck,
    Request,
    Response,
    ServerPayload,
    Shutdown,
    TextEncoder,
    Usage,
    encode,
    error,
)
from llm.chat import Message, encode_body
from llm.errors import LimitPassedError
from llm.lanes import lanes
from llm.stream import Ending, Result
from metrics.instruments import Metrics
from metrics.logs import get_logger

MAX_REMEMBERED_IDS = 1000
"""Ids of ended requests that a session remembers, so that none is used twice."""

_CLOSE_NORMAL = 1000
_CLOSE_INTERNAL_ERROR = 1011
_CLOSE_SERVICE_RESTART = 1012

_log = get_logger("ACTOR")


class Outlet(TextOutlet, Protocol):
    """One request's way to the client (`gateway.outbox.Outlet`)."""

    delivered_text_chars: int

    @property
    def done(self) -> bool: ...
    def finish(self, payload: bytes, on_written: Callable[[float], None]) -> None: ...
    def shut(self) -> None: ...


class Outbox(Protocol):
    """Everything that goes to the client (`gateway.outbox.Outbox`)."""

    def outlet(self, encoder: TextEncoder) -> Outlet: ...
    def send_control(
        self, payload: bytes, on_written: Callable[[float], None] | None = None
    ) -> None: ...
    def together(self) -> AbstractContextManager[None]: ...
    def close(self, code: int, reason: str) -> None: ...


class OnNewRequest(enum.StrEnum):
    """What a REQUEST does while another is live."""

    INTERRUPT = "interrupt"
    PARALLEL = "parallel"
    REJECT = "reject"


@dataclass(frozen=True)
class SessionSettings:
    """How sessions behave.

    Args:
        model: name of the model that requests ask for.
        on_new_request: what a REQUEST does while another is live.
        max_parallel: live requests of one session, where they may run side by side.
        ack_timeout: seconds that an INTERRUPT_ACK may wait for streams to close.
        session_timeout: seconds, as told to the client on registration.
    """

    model: str
    on_new_request: OnNewRequest = OnNewRequest.INTERRUPT
    max_parallel: int = 8
    ack_timeout: float = 1.0
    session_timeout: int = 3600


@dataclass
class _Live:
    """A request from its acceptance until its terminal frame was handed to the kernel."""

    request_id: str
    outlet: Outlet
    actor: pykka.ActorRef[RequestActor]
    started: bool = False
    interrupted_by: InterruptReason | None = None
    reaped: str | None = None
    """What the reaper found."""
    result: Result | None = None
    timed_out: bool = False
    timer: Timer | None = None

    @property
    def stopping(self) -> bool:
        return self.interrupted_by is not None or self.reaped is not None

    @property
    def settled(self) -> bool:
        """True when an interrupt need not wait for it any more."""
        return self.result is not None or self.timed_out


@dataclass
class _PendingInterrupt:
    """An INTERRUPT that still owes its ack."""

    frame: Interrupt
    read_at: float
    targets: dict[str, _Live | InterruptResult] = field(default_factory=dict)
    active_requests: list[str] = field(default_factory=list)

    def waits_for(self, live: _Live) -> bool:
        return self.targets.get(live.request_id) is live

    @property
    def ready(self) -> bool:
        return all(
            isinstance(target, InterruptResult) or target.settled
            for target in self.targets.values()
        )


class SessionActor(GreenletActor):
    """The session of one connection, from its handshake to the end of its last request."""

    def __init__(
        self,
        *,
        outbox: Outbox,
        peer: str,
        source: StreamSource,
        tell_supervisor: Callable[[SupervisorMessage], None],
        health: Callable[[], HealthStatus],
        settings: SessionSettings,
        metrics: Metrics,
    ) -> None:
        super().__init__()
        self._outbox = outbox
        self._peer = peer
        self._source = source
        self._tell_supervisor = tell_supervisor
        self._health = health
        self._settings = settings
        self._metrics = metrics
        self._session_id: str | None = None
        self._voice_stream_seq: int | UnsetType = UNSET
        self._live: dict[str, _Live] = {}
        self._interrupts: list[_PendingInterrupt] = []
        self._ended: OrderedDict[str, int] = OrderedDict()
        """Ids of ended requests, with what was delivered of each, in code points."""
        self._farewell: Callable[[], None] | None = None
        """What is done when the last request has ended; set when the session is ending."""

    def opened(self) -> None:
        self._tell_supervisor(SessionStarted(self.actor_ref))

    def handle(self, message: SessionMessage) -> None:
        match message:
            case FrameReceived(frame, read_at):
                self._on_frame(frame, read_at)
            case BadFrameReceived(frame_error):
                self._refuse_frame(frame_error)
            case RequestReported(request_id, result):
                self._on_report(request_id, result)
            case TerminalWritten(request_id):
                self._on_terminal_written(request_id)
            case StopOverdue(request_id):
                self._on_stop_overdue(request_id)
            case ReapRequest(request_id, detail):
                self._on_reap(request_id, detail)
            case ConnectionLost():
                self._end(InterruptReason.CONNECTION_LOST, lambda: None)
            case EndSession(reason):
                self._end(reason, lambda: self._say_goodbye(reason, _CLOSE_SERVICE_RESTART))
            case RegisterAgain():
                self._tell_supervisor(SessionStarted(self.actor_ref))
            case _:
                assert_never(message)

    def closed(self, error: BaseException | None) -> None:
        for live in self._live.values():
            live.outlet.shut()
            tell(live.actor, Stop())
            tell(live.actor, Release())
        if error is not None:
            self._outbox.close(_CLOSE_INTERNAL_ERROR, "internal error")
        if self._session_id is not None:
            self._metrics.sessions_active.dec()
            self._metrics.sessions.labels("failed" if error else "ended").inc()
        self._tell_supervisor(SessionEnded(self.actor_urn))
        _log.info("Session ended", session_id=self._session_id, peer=self._peer)

    # Frames.

    def _on_frame(self, frame: ClientFrame, read_at: float) -> None:
        payload = frame.payload
        match payload:
            case HealthCheck():
                self._send(HealthCheckAck(self._health()))
            case Register():
                self._register(payload)
            case _ if self._session_id is None:
                self._refuse(ErrorCode.SESSION_INVALID, "the first message must be REGISTER")
            case _ if frame.session_id != self._session_id:
                self._refuse(ErrorCode.SESSION_INVALID, "session_id is not the one of REGISTER_ACK")
            case Request():
                self._request(payload)
            case Interrupt():
                self._interrupt(payload, read_at)
            case HeartbeatReply():
                pass
            case Shutdown():
                self._end(
                    InterruptReason.CLIENT_SHUTDOWN,
                    lambda: self._say_goodbye(InterruptReason.CLIENT_SHUTDOWN, _CLOSE_NORMAL),
                )
            case _:
                assert_never(payload)

    def _register(self, register: Register) -> None:
        if self._session_id is not None:
            self._refuse(ErrorCode.MALFORMED_PAYLOAD, "this connection is registered already")
            return
        self._session_id = f"sess_{secrets.token_hex(8)}"
        if register.require_tts:
            # There is no speech; a client that wants it waits for the end of it all the same.
            self._voice_stream_seq = -1
        self._metrics.sessions_active.inc()
        _log.info("Session registered", session_id=self._session_id, peer=self._peer)
        self._send(RegisterAck(self._session_id, self._settings.session_timeout))

    def _request(self, request: Request) -> None:
        request_id = request.request_id
        if request_id in self._live or request_id in self._ended:
            # Without the id as a field: it would end the live request for the client.
            self._refuse(
                ErrorCode.MALFORMED_PAYLOAD, f"request_id {request_id!r} was used in this session"
            )
        elif self._farewell is not None:
            self._refuse(ErrorCode.SERVER_BUSY, "the session is ending", request_id)
        elif request.data_type == "VOICE":
            self._remember(request_id, 0)
            self._refuse(
                ErrorCode.INTERNAL_ERROR, "no speech recognition is configured", request_id
            )
        elif not request.content.text:
            self._remember(request_id, 0)
            self._send(self._completed(request_id, Result(Ending.COMPLETED)))
        elif self._make_way(request_id):
            self._accept(request_id, request.content.text)
            self._settle()

    def _make_way(self, request_id: str) -> bool:
        """Apply the policy for a new request while others are live; False when it is refused."""
        settings = self._settings
        # A client that interrupts and asks again does not wait for the ack in between.
        running = sum(not live.stopping for live in self._live.values())
        match settings.on_new_request:
            case OnNewRequest.INTERRUPT:
                for live in list(self._live.values()):
                    self._stop_request(live, InterruptReason.USER_NEW_INPUT)
                return True
            case OnNewRequest.PARALLEL:
                if running < settings.max_parallel:
                    return True
                detail = f"{running} requests are live, as many as may be"
            case OnNewRequest.REJECT:
                if not running:
                    return True
                detail = "another request is live"
        self._metrics.refused.labels("request").inc()
        self._refuse(ErrorCode.SERVER_BUSY, detail, request_id)
        return False

    def _accept(self, request_id: str, text: str) -> None:
        assert self._session_id is not None
        outlet = self._outbox.outlet(TextEncoder(self._session_id, request_id))
        actor = RequestActor.start(
            session_id=self._session_id,
            request_id=request_id,
            session=self.actor_ref,
            tell_supervisor=self._tell_supervisor,
            source=self._source,
            body=encode_body(self._settings.model, [Message("user", text)]),
            outlet=outlet,
            metrics=self._metrics,
        )
        self._live[request_id] = _Live(request_id, outlet, actor)

    # Interrupts.

    def _interrupt(self, interrupt: Interrupt, read_at: float) -> None:
        target = interrupt.target
        pending = _PendingInterrupt(interrupt, read_at)
        for request_id in [target] if target is not None else list(self._live):
            live = self._live.get(request_id)
            if live is not None and self._stop_request(live, interrupt.known_reason):
                pending.targets[request_id] = live
            elif target is not None:
                pending.targets[request_id] = self._missed(request_id)
        pending.active_requests = list(self._live)
        self._interrupts.append(pending)
        if pending.ready:
            self._settle()

    def _stop_request(self, live: _Live, reason: InterruptReason) -> bool:
        """Stop a request; False when its terminal frame is on its way already."""
        if live.outlet.done:
            return False
        self._shut_down(live, Stop())
        live.interrupted_by = live.interrupted_by or reason
        return True

    def _shut_down(self, live: _Live, stop: Stop) -> None:
        # First the outlet: from here on, nothing of this request is written.
        live.outlet.shut()
        if not live.stopping and live.result is None:
            tell(live.actor, stop)
            live.timer = Timer(
                self._settings.ack_timeout, self.actor_ref, StopOverdue(live.request_id)
            )

    def _missed(self, request_id: str) -> InterruptResult:
        live = self._live.get(request_id)
        delivered = live.outlet.delivered_text_chars if live else self._ended.get(request_id)
        outcome = InterruptOutcome.UNKNOWN if delivered is None else InterruptOutcome.ALREADY_DONE
        return InterruptResult(request_id, outcome, delivered or 0, None)

    def _on_stop_overdue(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None and live.result is None:
            live.timed_out = True
            self._metrics.streams_open_after_ack.inc()
            _log.error(
                "Stream still open after interrupt",
                session_id=self._session_id,
                request_id=request_id,
                seconds=self._settings.ack_timeout,
            )
            self._settle()

    def _on_reap(self, request_id: str, detail: str) -> None:
        live = self._live.get(request_id)
        if live is not None and not live.stopping and not live.outlet.done:
            self._shut_down(live, Stop(reaped=True))
            live.reaped = detail
            self._metrics.requests_reaped.inc()
            self._settle()

    # Ends.

    def _on_report(self, request_id: str, result: Result) -> None:
        live = self._live.get(request_id)
        if live is None or live.result is not None:
            return  # its interrupt was answered without waiting any longer
        live.result = result
        if live.timer is not None:
            live.timer.cancel()
        if live.stopping:
            self._settle()
        else:
            terminal = self._terminal(live, result)
            live.outlet.finish(self._encode(terminal), self._terminal_written(request_id))

    def _terminal_written(self, request_id: str) -> Callable[[float], None]:
        def written(_at: float) -> None:
            tell(self.actor_ref, TerminalWritten(request_id))

        return written

    def _on_terminal_written(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None and live.outlet.done:
            assert live.result is not None
            failed = live.result.ending is not Ending.COMPLETED
            self._forget(live, Outcome.FAILED if failed else Outcome.COMPLETED)
            self._settle()

    def _settle(self) -> None:
        """Answer every interrupt that has its answer, then end every request that nobody waits
        for, then begin what was waiting: acks before terminal frames before new answers."""
        with self._outbox.together():
            for pending in [pending for pending in self._interrupts if pending.ready]:
                self._interrupts.remove(pending)
                self._acknowledge(pending)
            for live in list(self._live.values()):
                if live.stopping and live.settled and not self._is_awaited(live):
                    self._send(self._terminal(live, live.result or Result(Ending.CLOSED)))
                    self._forget(
                        live, Outcome.INTERRUPTED if live.interrupted_by else Outcome.REAPED
                    )
        if self._live:
            self._start_next()
        elif self._farewell is not None:
            self._farewell()
            self.stop()

    def _is_awaited(self, live: _Live) -> bool:
        return any(pending.waits_for(live) for pending in self._interrupts)

    def _start_next(self) -> None:
        for live in self._live.values():
            if not live.started and not live.stopping:
                live.started = True
                tell(live.actor, Start())
            if self._settings.on_new_request is not OnNewRequest.PARALLEL:
                break  # whoever comes later waits for the end of the one before

    def _acknowledge(self, pending: _PendingInterrupt) -> None:
        results = [
            target if isinstance(target, InterruptResult) else self._stop_result(target, pending)
            for target in pending.targets.values()
        ]
        stopped = [r.request_id for r in results if r.outcome is InterruptOutcome.STOPPED]
        if not stopped:
            status = AckStatus.FAILED
        elif len(stopped) == len(results):
            status = AckStatus.SUCCESS
        else:
            status = AckStatus.PARTIAL
        ack = InterruptAck(
            stopped, status, _ack_message(results), results, pending.frame.interrupt_request_id
        )
        observe = self._metrics.acknowledged_seconds.observe
        self._outbox.send_control(
            self._encode(ack),
            lambda at: lanes().call_later(observe, at - pending.read_at),
        )
        # Logging and counting take longer than stopping did, and others may be waiting for that.
        lanes().call_later(self._keep_books, pending, ack)

    def _keep_books(self, pending: _PendingInterrupt, ack: InterruptAck) -> None:
        reason = pending.frame.known_reason.value
        _log.info(
            "Interrupt request details",
            session_id=self._session_id,
            interrupt_request_id=pending.frame.target,
            active_requests=pending.active_requests,
            found=any(isinstance(target, _Live) for target in pending.targets.values()),
        )
        _log.info("Interrupt acknowledged", session_id=self._session_id, status=ack.status.value)
        for result in ack.results:
            self._metrics.interrupts.labels(reason, result.outcome.value.lower()).inc()
            if result.stream_closed_ms is not None:
                self._metrics.stream_closed_seconds.observe(result.stream_closed_ms / 1000)

    def _stop_result(self, live: _Live, pending: _PendingInterrupt) -> InterruptResult:
        delivered = live.outlet.delivered_text_chars
        if live.result is None:
            outcome = InterruptOutcome.TIMED_OUT
            return InterruptResult(live.request_id, outcome, delivered, None)
        closed_at = live.result.closed_at
        closed_ms = None
        if closed_at is not None:
            closed_ms = round(max(0.0, closed_at - pending.read_at) * 1000, 3)
        return InterruptResult(live.request_id, InterruptOutcome.STOPPED, delivered, closed_ms)

    def _terminal(self, live: _Live, result: Result) -> ServerPayload:
        """The one terminal frame of a request."""
        usage = _usage(result)
        if live.interrupted_by is not None:
            return Response(
                live.request_id,
                -1,
                voice_stream_seq=self._voice_stream_seq,
                interrupted=True,
                interrupt_reason=live.interrupted_by.value,
                outcome=Outcome.INTERRUPTED,
                finish_reason=result.finish_reason,
                usage=usage,
            )
        if live.reaped is None and result.ending is Ending.COMPLETED:
            return self._completed(live.request_id, result)
        late = live.reaped is not None or isinstance(result.error, LimitPassedError)
        return error(
            ErrorCode.REQUEST_TIMEOUT if late else ErrorCode.INTERNAL_ERROR,
            live.reaped or str(result.error or "the generation was stopped"),
            request_id=live.request_id,
            outcome=Outcome.FAILED if live.reaped is None else Outcome.REAPED,
            finish_reason=result.finish_reason,
            usage=usage,
        )

    def _completed(self, request_id: str, result: Result) -> Response:
        return Response(
            request_id,
            -1,
            voice_stream_seq=self._voice_stream_seq,
            outcome=Outcome.COMPLETED,
            finish_reason=result.finish_reason,
            usage=_usage(result),
        )

    def _forget(self, live: _Live, outcome: Outcome) -> None:
        del self._live[live.request_id]
        self._remember(live.request_id, live.outlet.delivered_text_chars)
        lanes().call_later(self._release, live, outcome)

    def _release(self, live: _Live, outcome: Outcome) -> None:
        tell(live.actor, Release())
        self._metrics.text_chars.inc(live.outlet.delivered_text_chars)
        self._metrics.requests.labels(outcome.value.lower()).inc()
        if live.interrupted_by is not None:
            _log.info(
                "Request interrupted",
                session_id=self._session_id,
                request_id=live.request_id,
                reason=live.interrupted_by.value,
            )

    def _remember(self, request_id: str, delivered: int) -> None:
        self._ended[request_id] = delivered
        if len(self._ended) > MAX_REMEMBERED_IDS:
            self._ended.popitem(last=False)

    def _end(self, reason: InterruptReason, farewell: Callable[[], None]) -> None:
        """Stop everything that is live; when it has ended, do the farewell and stop."""
        self._farewell = farewell
        for live in list(self._live.values()):
            if not self._stop_request(live, reason):
                # Its terminal frame is with the kernel, or was begun on a lost connection.
                completed = live.result is not None and live.result.ending is Ending.COMPLETED
                self._forget(live, Outcome.COMPLETED if completed else Outcome.FAILED)
        self._settle()

    def _say_goodbye(self, reason: InterruptReason, code: int) -> None:
        self._send(Shutdown(reason.value))
        self._outbox.close(code, reason.value)

    # Sending.

    def _refuse_frame(self, frame_error: FrameError) -> None:
        request_id = frame_error.request_id
        if request_id in self._live or request_id in self._ended:
            request_id = None
        self._refuse(frame_error.code, frame_error.detail, request_id)

    def _refuse(self, code: ErrorCode, detail: str, request_id: str | None = None) -> None:
        if request_id is None:
            self._send(error(code, detail))
        else:
            outcome = Outcome.FAILED  # to the client, this is the end of that request
            self._send(
                error(
                    code,
                    detail,
                    request_id=request_id,
                    outcome=outcome,
                    finish_reason=None,
                    usage=None,
                )
            )

    def _send(self, payload: ServerPayload) -> None:
        self._outbox.send_control(self._encode(payload))

    def _encode(self, payload: ServerPayload) -> bytes:
        return encode(payload, self._session_id, time.time_ns() // 1_000_000)


class SessionHandle:
    """What the server holds of a session: puts messages in its mailbox, and never waits."""

    def __init__(self, ref: pykka.ActorRef[Any]) -> None:
        self._ref = ref

    def frame(self, frame: ClientFrame, read_at: float) -> None:
        """The client sent a frame, read at this `time.monotonic()`."""
        tell(self._ref, FrameReceived(frame, read_at))

    def bad_frame(self, error: FrameError) -> None:
        """The client sent something that was not understood."""
        tell(self._ref, BadFrameReceived(error))

    def connection_lost(self, reason: str) -> None:
        """Nothing can be read or written any more."""
        tell(self._ref, ConnectionLost(reason))


def _ack_message(results: list[InterruptResult]) -> str:
    if not results:
        return "no request in progress"
    words = {
        InterruptOutcome.STOPPED: "stopped",
        InterruptOutcome.ALREADY_DONE: "already finished",
        InterruptOutcome.UNKNOWN: "unknown request",
        InterruptOutcome.TIMED_OUT: "told to stop, but its stream is still open",
    }
    return "; ".join(f"{result.request_id}: {words[result.outcome]}" for result in results)


def _usage(result: Result) -> Usage | None:
    usage = result.usage
    if usage is None:
        return None
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
