"""One client: what it registered, its history, its live requests; and the only one who decides what
an INTERRUPT hits."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, assert_never

import msgspec
import pykka
from msgspec import UNSET, Struct, UnsetType

from actors.actor import GreenletActor, Timer, tell
from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.messages import (
    Authenticated,
    AuthenticationFailed,
    BadFrameReceived,
    CallWritten,
    ConnectionLost,
    EndSession,
    FrameReceived,
    Leave,
    PauseIsOver,
    ReapRequest,
    RegisterAgain,
    RequestReported,
    SessionEnded,
    SessionMessage,
    SessionStarted,
    Start,
    Stop,
    StopOverdue,
    SupervisorMessage,
    TerminalSent,
    TerminalWritten,
    TimeIsDue,
    VoiceReceived,
)
from actors.quota import Quota, Slot
from actors.request import RequestActor, StreamSource
from actors.session.history import Ending as TurnEnding
from actors.session.history import History, Turn
from actors.session.lifetime import Due, Lifetime
from actors.session.live import LiveRequest, Outlet, PendingInterrupt, completed, interrupted
from actors.session.profile import Profile, UpdateError
from actors.session.request_ids import RequestIds
from actors.session.voice import VoiceError, VoiceRequests
from gateway.wire.protocol import (
    AccountAuth,
    ApiKeyAuth,
    ClientFrame,
    ErrorCode,
    FrameError,
    FunctionResult,
    HealthCheck,
    HealthCheckAck,
    HealthStatus,
    Heartbeat,
    HeartbeatReply,
    Interrupt,
    InterruptAck,
    InterruptOutcome,
    InterruptReason,
    InterruptResult,
    OnNewRequest,
    Outcome,
    Register,
    RegisterAck,
    Request,
    ResponseEncoder,
    ServerPayload,
    SessionData,
    SessionInfo,
    SessionQuery,
    SessionWarn,
    Shutdown,
    encode,
    error,
)
from llm.chat.completions import Prompt, ToolCall
from llm.chat.generation import GenerationResult
from llm.stage import Ending
from metrics.instruments import Metrics, exemplar
from metrics.logs import get_logger

_CLOSE_NORMAL = 1000
_CLOSE_EXPIRED = 1008
_CLOSE_INTERNAL_ERROR = 1011
_CLOSE_SERVICE_RESTART = 1012
_CLOSE_TRY_AGAIN_LATER = 1013
_CLOSE_BY_REFUSAL = {
    ErrorCode.AUTH_FAILED: 1008,
    ErrorCode.SERVER_BUSY: _CLOSE_TRY_AGAIN_LATER,
}
"""When credentials were not accepted; with any other code it is our fault."""

_LEAVING = "the gateway is shutting down, or the session is ending"

_log = get_logger("ACTOR")  # for what runs in the data lane
_deferred_log = DeferredLog(_log)
_S = TypeVar("_S", bound=Struct)


class Outbox(Protocol):
    """Everything that goes to the client (`gateway.server.outbox.Outbox`)."""

    def outlet(self, encoder: ResponseEncoder) -> Outlet: ...
    def send_control(
        self, payload: bytes, on_written: Callable[[float], None] | None = None
    ) -> None: ...
    def close(self, code: int, reason: str) -> None: ...


class Authenticator(Protocol):
    """Says who may register (`gateway.access.authenticator.Authenticator`)."""

    def check(self, auth: ApiKeyAuth | AccountAuth, session: pykka.ActorRef[Any]) -> None:
        """Tell the session `Authenticated` or `AuthenticationFailed`, later and once."""


@dataclass(frozen=True)
class SessionSettings:
    """How sessions behave.

    Args:
        on_new_request: what a REQUEST does while another is live, where REGISTER does not say.
        max_parallel: live requests of one session, where they may run side by side.
        max_requests: live requests of all sessions together; 0 is no limit. Some 400 answers at
            once, of 30 tokens a second each, keep a core busy (`tests/bench/README.md`); but many
            wait for their first token, which costs nothing, or come at a slower pace. Each has a
            connection to a provider, hence a file descriptor.
        ack_timeout: seconds that an INTERRUPT_ACK may wait for streams to close.
        session_timeout: seconds without a REQUEST or HEARTBEAT_REPLY until it ends; 0 is never.
        heartbeat_interval: seconds between two HEARTBEATs; 0 sends none.
        history_messages: how many messages of the conversation the model is reminded of.
        history_chars: how many Unicode code points they may have together.
        max_voice_bytes: size of one VOICE request.
    """

    on_new_request: OnNewRequest = OnNewRequest.INTERRUPT
    max_parallel: int = 8
    max_requests: int = 1_000
    ack_timeout: float = 1.0
    session_timeout: float = 3600.0
    heartbeat_interval: float = 30.0
    history_messages: int = 200
    history_chars: int = 200_000
    max_voice_bytes: int = 10 * 1024 * 1024


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
        slot: Slot,
        requests: Quota,
        takes_requests: bool = True,
        authenticator: Authenticator | None = None,
    ) -> None:
        super().__init__()
        self._outbox = outbox
        self._peer = peer
        self._source = source
        self._tell_supervisor = tell_supervisor
        self._health = health
        self._settings = settings
        self._metrics = metrics
        self._slot = slot
        self._requests = requests
        self._lanes = lanes()
        self._authenticator = authenticator
        self._registering: Register | None = None
        """What waits for its credentials to be checked."""
        self._client: str | None = None
        """Whose credentials they were; None where nobody looks at them."""
        self._session_id: str | None = None
        self._created_ms = 0
        self._lifetime = Lifetime(0, 0, 0)
        self._timer: Timer | None = None
        self._pause: Timer | None = None
        self._profile = Profile()
        self._on_new_request = settings.on_new_request
        self._history = History(settings.history_messages, settings.history_chars)
        self._live: dict[str, LiveRequest] = {}
        self._interrupts: list[PendingInterrupt] = []
        self._request_ids = RequestIds()
        self._voices = VoiceRequests(settings.max_voice_bytes)
        self._farewell: Callable[[], None] | None = None
        """What is done when the last request has ended; set when the session is ending."""
        self._ended_by = ""
        """Why it ends, for the log."""
        self._takes_requests = takes_requests
        self._may_leave = False
        """Whether it is to end as soon as nothing is live."""
        self._is_over = False
        """True when the farewell was said: what still comes is nobody's."""

    def describe(self, now: float) -> dict[str, Any]:
        return {
            "session_id": self._session_id,
            "peer": self._peer,
            "client": self._client,
            "registering": self._registering is not None,
            "live": list(self._live),
            "voice": self._voices.open_id,
            "interrupts_to_answer": len(self._interrupts),
            "remaining_seconds": self._lifetime.remaining_seconds(now),
            "takes_requests": self._takes_requests,
        }

    def opened(self) -> None:
        self._tell_supervisor(SessionStarted(self.actor_ref))

    def handle(self, message: SessionMessage) -> None:
        if self._is_over:
            return
        match message:
            case FrameReceived(frame, read_at):
                self._on_frame(frame, read_at)
            case Authenticated(client):
                self._on_authenticated(client)
            case AuthenticationFailed(code, detail):
                self._on_authentication_failed(code, detail)
            case RequestReported(request_id, result):
                self._on_report(request_id, result)
            case BadFrameReceived(frame_error):
                self._refuse_frame(frame_error)
            case VoiceReceived(voice):
                self._on_voice(voice)
            case TerminalWritten(request_id):
                self._on_terminal_written(request_id)
            case CallWritten(request_id):
                self._note_calls(self._live.get(request_id))
            case TimeIsDue():
                self._on_time()
            case StopOverdue(request_id):
                self._on_stop_overdue(request_id)
            case ReapRequest(request_id, detail):
                self._on_reap(request_id, detail)
            case ConnectionLost(why):
                self._ended_by = why
                self._end(InterruptReason.CONNECTION_LOST, lambda: None)
            case Leave(pause_seconds):
                self._takes_requests = False
                # A new supervisor says it once more, with a pause of its own.
                self._pause = self._pause or Timer(pause_seconds, self.actor_ref, PauseIsOver())
            case PauseIsOver():
                self._may_leave = True
                self._settle()
            case EndSession(reason):
                self._end_for_restart(reason)
            case RegisterAgain():
                self._tell_supervisor(SessionStarted(self.actor_ref))
            case _:
                assert_never(message)

    def closed(self, error: BaseException | None) -> None:
        for timer in (self._timer, self._pause):
            if timer is not None:
                timer.cancel()
        for live in self._live.values():
            if live.timer is not None:
                live.timer.cancel()
            live.outlet.discard()
            live.slot.release()
            tell(live.actor, Stop())
            tell(live.actor, TerminalSent())
            self._count(Outcome.FAILED)
        if error is not None:
            self._outbox.close(_CLOSE_INTERNAL_ERROR, "internal error")
        self._slot.release()
        if self._session_id is not None:
            self._metrics.sessions_active.dec()
            self._metrics.sessions.labels("failed" if error else "ended").inc()
        self._tell_supervisor(SessionEnded(self.actor_urn))
        _deferred_log.info(
            "Session ended",
            session_id=self._session_id,
            peer=self._peer,
            reason=repr(error) if error is not None else self._ended_by,
        )

    # Frames.

    def _on_frame(self, frame: ClientFrame, read_at: float) -> None:
        payload = frame.payload
        match payload:
            case HealthCheck(check_fields):
                self._send(HealthCheckAck(_only(self._health(), check_fields)))
            case Register():
                self._register(payload)
            case _ if self._registering is not None:
                self._refuse(ErrorCode.SESSION_INVALID, "wait for REGISTER_ACK")
            case _ if self._session_id is None:
                self._refuse(ErrorCode.SESSION_INVALID, "the first message must be REGISTER")
            case _ if frame.session_id != self._session_id:
                self._refuse(ErrorCode.SESSION_INVALID, "session_id is not the one of REGISTER_ACK")
            case Interrupt():
                self._interrupt(payload, read_at)
            case Request():
                self._lifetime.renew(time.monotonic())
                self._request(payload)
            case FunctionResult():
                self._function_result(payload)
            case SessionQuery(query_fields):
                self._send(SessionInfo(_only(self._data(), query_fields)))
            case HeartbeatReply():
                self._lifetime.renew(time.monotonic())
            case Shutdown():
                reason = InterruptReason.CLIENT_SHUTDOWN
                self._end(reason, lambda: self._say_goodbye(reason.value, _CLOSE_NORMAL))
            case _:
                assert_never(payload)

    def _register(self, register: Register) -> None:
        if self._session_id is not None or self._registering is not None:
            self._refuse(ErrorCode.MALFORMED_PAYLOAD, "this connection has sent REGISTER already")
            return
        if self._authenticator is None:
            self._open(register, None)
            return
        self._registering = register
        self._authenticator.check(register.auth, self.actor_ref)

    def _on_authenticated(self, client: str) -> None:
        register, self._registering = self._registering, None
        assert register is not None
        self._open(register, client)

    def _on_authentication_failed(self, code: ErrorCode, detail: str) -> None:
        register, self._registering = self._registering, None
        assert register is not None
        match code:
            case ErrorCode.AUTH_FAILED:
                self._metrics.refused.labels("auth").inc()
            case ErrorCode.SERVER_BUSY:
                self._metrics.refused.labels("auth_busy").inc()
        # Neither what was wrong, nor for which account: it may be a password in the wrong field.
        kind = _kind(register.auth)
        _deferred_log.warning("Refused registration", peer=self._peer, code=code.value, auth=kind)
        self._send(error(code, detail))
        close_code = _CLOSE_BY_REFUSAL.get(code, _CLOSE_INTERNAL_ERROR)
        self._ended_by = "registration refused"
        self._end(InterruptReason.OTHER, lambda: self._outbox.close(close_code, self._ended_by))

    def _open(self, register: Register, client: str | None) -> None:
        """Let the client in, whose credentials are right, or are not looked at."""
        if not self._takes_requests:
            self._refuse_busy("shutdown", _LEAVING)
            self._end_for_restart(InterruptReason.SERVER_SHUTDOWN)
            return
        if not self._slot.take():
            self._send_away("as many sessions as may be are open")
            return
        self._client = client
        self._session_id = f"sess_{secrets.token_hex(8)}"
        self._created_ms = _now_ms()
        settings = self._settings
        self._lifetime = Lifetime(
            settings.session_timeout, settings.heartbeat_interval, time.monotonic()
        )
        self._set_timer()
        self._profile = Profile.registered(register)
        self._on_new_request = register.on_new_request or settings.on_new_request
        self._metrics.sessions_active.inc()
        fields = {"session_id": self._session_id, "peer": self._peer}
        if client is not None:
            fields |= {"client": client, "auth": _kind(register.auth)}
        _deferred_log.info("Session registered", **fields)
        self._send(RegisterAck(self._session_id, math.ceil(settings.session_timeout)))

    def _send_away(self, detail: str) -> None:
        """There is no room for this session; for one of its HEALTH_CHECKs there was."""
        self._refuse_busy("max_sessions", detail)
        self._ended_by = detail
        self._takes_requests = False
        self._farewell = lambda: self._outbox.close(_CLOSE_TRY_AGAIN_LATER, detail)
        self._settle()

    def _data(self) -> SessionData:
        profile = self._profile
        return SessionData(
            profile.platform,
            profile.require_tts,
            profile.enable_srs,
            list(profile.functions),
            self._created_ms,
            self._lifetime.remaining_seconds(time.monotonic()),
        )

    # Requests.

    def _request(self, request: Request) -> None:
        request_id = request.request_id
        if request.data_type == "VOICE":
            self._voice_request(request_id, request)
        elif self._is_used(request_id):
            self._refuse_used(request_id)
        elif self._is_leaving(request_id):
            self._refuse_busy("shutdown", _LEAVING, request_id)
        else:
            self._text_request(request_id, request)

    def _text_request(self, request_id: str, request: Request) -> None:
        text = request.content.text
        reason = self._request_ids.take_early(request_id, time.monotonic())
        try:
            profile = self._profile.updated(request.updates)
        except UpdateError as failure:
            if reason is None:
                self._refuse_request(ErrorCode.MALFORMED_PAYLOAD, str(failure), request_id)
                return
            profile = self._profile  # an interrupted request ends as such, whatever was in it
        if reason is not None:
            self._profile = profile
            self._answer_early(request_id, text, reason)
        elif not text:
            self._profile = profile
            self._request_ids.end(request_id, 0)
            self._count(Outcome.COMPLETED)
            self._send(completed(request_id, self._voice_stream_seq))
        elif self._apply_concurrency_policy(request_id):
            self._profile = profile
            self._accept(request_id, text)
            self._settle()

    def _is_leaving(self, request_id: str) -> bool:
        """Whether this request comes too late. One that was interrupted before it came does not:
        no ERROR may tell of it."""
        if self._takes_requests:
            return False
        return self._request_ids.early_reason(request_id, time.monotonic()) is None

    def _is_used(self, request_id: str) -> bool:
        return (
            request_id == self._voices.open_id
            or request_id in self._live
            or self._request_ids.has_ended(request_id)
        )

    def _refuse_used(self, request_id: str) -> None:
        # Without the id as a field: it would end the live request for the client.
        detail = f"request_id {request_id!r} was used in this session"
        self._refuse(ErrorCode.MALFORMED_PAYLOAD, detail)

    @property
    def _voice_stream_seq(self) -> int | UnsetType:
        # There is no speech; a client that wants it waits for the end of it all the same.
        return -1 if self._profile.require_tts else UNSET

    def _apply_concurrency_policy(self, request_id: str, beside: Turn | None = None) -> bool:
        """Apply the policy for a new request while others are live; False when it is refused, by
        that or for want of room.

        Args:
            request_id: the new one.
            beside: a turn that it goes on from, and so does not compete with.
        """
        others = [live for live in self._live.values() if live.turn is not beside]
        # A client that interrupts and asks again does not wait for the ack in between.
        running = sum(not live.is_stopping for live in others)
        match self._on_new_request:
            case OnNewRequest.INTERRUPT:
                for live in others:
                    self._stop_request(live, InterruptReason.USER_NEW_INPUT)
                    live.slot.release()  # also of one whose end is on its way already
            case OnNewRequest.PARALLEL if running >= self._settings.max_parallel:
                detail = f"{running} requests are live, as many as may be"
                self._refuse_busy("request", detail, request_id)
                return False
            case OnNewRequest.REJECT if running:
                self._refuse_busy("request", "another request is live", request_id)
                return False
        for live in self._live.values():
            if live.turn is beside:
                live.slot.release()  # this one begins when that one has ended
        # Where one of its own made way, there is room now: so whoever is refused here has not
        # interrupted anything.
        if self._requests.is_full:
            detail = "as many requests as may be are live, of all clients together"
            self._refuse_busy("max_requests", detail, request_id)
            return False
        return True

    def _accept(self, request_id: str, text: str | None, continues: Turn | None = None) -> None:
        assert self._session_id is not None
        outlet = self._outbox.outlet(ResponseEncoder(self._session_id, request_id))
        calls: list[ToolCall] = []
        actor = RequestActor.start(
            session_id=self._session_id,
            request_id=request_id,
            session=self.actor_ref,
            tell_supervisor=self._tell_supervisor,
            source=self._source,
            outlet=outlet,
            calls=calls,
            metrics=self._metrics,
        )
        turn = self._history.begin(request_id, text, continues)
        slot = self._requests.slot()
        self._live[request_id] = LiveRequest(
            request_id, outlet, actor, turn, calls, slot, self._voice_stream_seq
        )
        slot.take()  # there is room: nobody else had a turn since that was looked at

    def _start_next(self) -> None:
        for live in self._live.values():
            if live.can_start:
                live.started = True
                tell(live.actor, Start(self._prompt(live)))
            if self._on_new_request is not OnNewRequest.PARALLEL:
                break  # whoever comes later waits for the end of the one before

    def _prompt(self, live: LiveRequest) -> Prompt:
        system = self._profile.system_message()
        messages = self._history.messages(live.turn)
        return Prompt(
            (*messages,) if system is None else (system, *messages), self._profile.tools()
        )

    # Functions of the client.

    def _note_calls(self, live: LiveRequest | None) -> None:
        if live is not None:
            for call in live.calls[len(live.turn.calls) :]:
                self._history.add_call(live.turn, call)

    def _function_result(self, result: FunctionResult) -> None:
        request_id = result.request_id
        found = self._history.find_call(result.call_id)
        if found is None:
            if request_id is not None and self._is_used(request_id):
                self._refuse_used(request_id)
            else:
                detail = f"call_id {result.call_id[:64]!r} is of no call that is remembered"
                self._refuse_request(ErrorCode.MALFORMED_PAYLOAD, detail, request_id)
            return
        turn, call = found
        value = result.result
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        self._history.hold(turn)  # however long the result is, the model is told of it once
        self._history.set_result(call, text)
        if request_id is not None:
            self._go_on(request_id, turn)
        self._start_next()
        self._history.release(turn)

    def _go_on(self, request_id: str, turn: Turn) -> None:
        """Let the model go on from the results of a turn, as soon as all are there."""
        waiting = next(
            (
                live
                for live in self._live.values()
                if live.turn.continues is turn and live.is_queued
            ),
            None,
        )
        if waiting is not None and waiting.request_id == request_id:
            pass  # said once more, with the result of another call
        elif self._is_used(request_id):
            self._refuse_used(request_id)
        elif self._is_leaving(request_id):
            self._refuse_busy("shutdown", _LEAVING, request_id)
        elif waiting is not None:
            detail = f"this answer goes on as {waiting.request_id!r} already"
            self._refuse_request(ErrorCode.MALFORMED_PAYLOAD, detail, request_id)
        elif (reason := self._request_ids.take_early(request_id, time.monotonic())) is not None:
            self._answer_early(request_id, None, reason)
        elif self._apply_concurrency_policy(request_id, beside=turn):
            self._lifetime.renew(time.monotonic())
            self._accept(request_id, None, continues=turn)
            self._settle()

    # Voice.

    def _voice_request(self, request_id: str, request: Request) -> None:
        """One frame of a VOICE request, whether its first or another."""
        if request_id == self._voices.open_id:
            self._take_voice(request)
        elif self._voices.ignores(request):
            pass
        elif self._is_used(request_id):
            self._refuse_used(request_id)
            self._drop_voice(request_id)  # nor are its other frames wanted
        elif self._is_leaving(request_id):
            self._metrics.refused.labels("shutdown").inc()
            self._fail_voice(request_id, VoiceError(ErrorCode.SERVER_BUSY, _LEAVING))
        else:
            self._begin_voice(request_id, request)
        self._voices.came(request)

    def _begin_voice(self, request_id: str, request: Request) -> None:
        if self._voices.open_id is not None:
            detail = f"the voice of {request_id!r} began before the last frame of this one"
            failure = VoiceError(ErrorCode.STREAM_SEQ_ERROR, detail)
            self._fail_voice(self._voices.open_id, failure)
        reason = self._request_ids.take_early(request_id, time.monotonic())
        try:
            self._profile = self._profile.updated(request.updates)
        except UpdateError as failure:
            if reason is None:
                error = VoiceError(ErrorCode.MALFORMED_PAYLOAD, str(failure))
                self._fail_voice(request_id, error)
                return
        if reason is not None:
            self._drop_voice(request_id)
            self._count(Outcome.INTERRUPTED)
            self._send(interrupted(request_id, reason, self._voice_stream_seq))
            return
        self._voices.begin(request)
        self._take_voice(request)

    def _take_voice(self, request: Request) -> None:
        try:
            is_complete = self._voices.add_frame(request)
        except VoiceError as failure:
            self._fail_voice(request.request_id, failure)
            return
        if is_complete:
            detail = "no speech recognition is configured"
            self._fail_voice(request.request_id, VoiceError(ErrorCode.INTERNAL_ERROR, detail))

    def _on_voice(self, data: bytes) -> None:
        if self._voices.open_id is not None:
            try:
                self._voices.add_binary(data)
            except VoiceError as failure:
                self._fail_voice(self._voices.open_id, failure)
        elif self._session_id is None:
            self._refuse(ErrorCode.SESSION_INVALID, "the first message must be REGISTER")
        elif not self._voices.ignores_binary:
            self._refuse(ErrorCode.MALFORMED_PAYLOAD, "a binary frame outside of a request")

    def _fail_voice(self, request_id: str, failure: VoiceError) -> None:
        self._drop_voice(request_id)
        self._refuse_request(failure.code, failure.detail, request_id)
        self._settle()

    def _drop_voice(self, request_id: str) -> None:
        """Take nothing more of a VOICE request, and say nothing to what still comes of it."""
        self._voices.drop(request_id)
        if request_id not in self._live:
            self._request_ids.use_up(request_id)

    # Interrupts.

    def _interrupt(self, interrupt: Interrupt, read_at: float) -> None:
        target = interrupt.target
        pending = PendingInterrupt(interrupt, read_at)
        for request_id in [target] if target is not None else list(self._live):
            live = self._live.get(request_id)
            if live is not None:
                live.heard(interrupt.delivered_text_chars)
            if live is not None and self._stop_request(live, interrupt.known_reason):
                pending.targets[request_id] = live
            elif target is not None and target != self._voices.open_id:
                pending.targets[request_id] = self._missed(request_id, interrupt, read_at)
        if target is None and not self._live and interrupt.delivered_text_chars is not None:
            # Nothing runs, but speech outlasts text: what was not heard was of the last answer.
            self._history.trim(None, interrupt.delivered_text_chars)
        voice_id = self._voices.open_id
        if voice_id is not None and target in (None, voice_id):
            self._interrupt_voice(voice_id, pending)
        pending.active_requests = list(self._live)
        self._interrupts.append(pending)
        if pending.ready:
            self._settle()

    def _interrupt_voice(self, request_id: str, pending: PendingInterrupt) -> None:
        reason = pending.frame.known_reason
        pending.targets[request_id] = InterruptResult(request_id, InterruptOutcome.STOPPED, 0, None)
        pending.terminals.append(interrupted(request_id, reason, self._voice_stream_seq))
        self._count(Outcome.INTERRUPTED)
        self._drop_voice(request_id)

    def _stop_request(self, live: LiveRequest, reason: InterruptReason) -> bool:
        """Stop a request; False when its terminal frame is on its way already."""
        if not self._shut_down(live, Stop(reason=reason)):
            return False
        live.interrupted_by = live.interrupted_by or reason
        return True

    def _shut_down(self, live: LiveRequest, stop: Stop) -> bool:
        # First the outlet: from here on, nothing of this request is written.
        if not live.outlet.discard():
            return False
        live.slot.release()
        if not live.is_stopping and live.result is None:
            tell(live.actor, stop)
            self._lanes.run_after_acks(self._limit_stop, live)  # most have stopped by then
        return True

    def _limit_stop(self, live: LiveRequest) -> None:
        if live.result is None:
            live.timer = Timer(
                self._settings.ack_timeout, self.actor_ref, StopOverdue(live.request_id)
            )

    def _missed(self, request_id: str, interrupt: Interrupt, read_at: float) -> InterruptResult:
        """An INTERRUPT found nothing to stop: what it was for has ended, or is still to come."""
        live = self._live.get(request_id)
        memory = self._request_ids
        delivered = live.outlet.delivered_text_chars if live else memory.delivered(request_id)
        if delivered is None:
            memory.interrupt_early(request_id, interrupt.known_reason, read_at)
            return InterruptResult(request_id, InterruptOutcome.UNKNOWN, 0, None)
        if interrupt.delivered_text_chars is not None:
            self._history.trim(request_id, interrupt.delivered_text_chars)
        return InterruptResult(request_id, InterruptOutcome.ALREADY_DONE, delivered, None)

    def _answer_early(self, request_id: str, text: str | None, reason: InterruptReason) -> None:
        self._request_ids.end(request_id, 0)
        if text:
            turn = self._history.begin(request_id, text)
            self._history.end(turn, "", TurnEnding.INTERRUPTED)
        self._count(Outcome.INTERRUPTED)
        self._send(interrupted(request_id, reason, self._voice_stream_seq))

    def _on_stop_overdue(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None and live.result is None:
            live.timed_out = True
            self._metrics.streams_open_after_ack.inc()
            _deferred_log.error(
                "Stream still open after interrupt",
                session_id=self._session_id,
                request_id=request_id,
                seconds=self._settings.ack_timeout,
            )
            self._settle()

    def _on_reap(self, request_id: str, detail: str) -> None:
        live = self._live.get(request_id)
        if live is not None and not live.is_stopping and self._shut_down(live, Stop(reaped=True)):
            live.reaped = detail
            self._metrics.requests_reaped.inc()
            self._settle()

    # Ends.

    def _on_report(self, request_id: str, result: GenerationResult) -> None:
        live = self._live.get(request_id)
        if live is None or live.result is not None:
            return  # its interrupt was answered without waiting any longer
        live.result = result
        if live.timer is not None:
            live.timer.cancel()
        if live.is_stopping:
            self._settle()
        else:
            live.outlet.finish(self._encode(live.terminal()), self._terminal_written(request_id))

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
        for pending in self._interrupts.copy():
            if pending.ready:
                self._interrupts.remove(pending)
                self._acknowledge(pending)
        for live in [live for live in self._live.values() if live.is_stopping]:
            if live.is_settled and not self._is_awaited(live):
                self._send(live.terminal())
                self._forget(live, Outcome.INTERRUPTED if live.interrupted_by else Outcome.REAPED)
            elif self._on_new_request is not OnNewRequest.PARALLEL:
                break  # nothing of the next one before the end of this one
        if self._live:
            self._start_next()
        elif self._farewell is not None:
            self._is_over = True
            self._farewell()
            self.stop()
        elif self._may_leave and self._voices.open_id is None:
            self._end_for_restart(InterruptReason.SERVER_SHUTDOWN)

    def _is_awaited(self, live: LiveRequest) -> bool:
        return any(pending.waits_for(live) for pending in self._interrupts)

    def _acknowledge(self, pending: PendingInterrupt) -> None:
        ack = pending.ack()
        observe = self._metrics.acknowledged_seconds.observe
        first = next(iter(pending.targets), None)
        self._outbox.send_control(
            self._encode(ack),
            lambda at: self._lanes.run_deferred(observe, at - pending.read_at, exemplar(first)),
        )
        for terminal in pending.terminals:
            self._send(terminal)
        # Logging and counting take longer than stopping did, and others may be waiting for that.
        self._lanes.run_deferred(self._record, pending, ack)

    def _record(self, pending: PendingInterrupt, ack: InterruptAck) -> None:
        reason = pending.frame.known_reason.value
        _log.info(
            "Interrupt request details",
            session_id=self._session_id,
            interrupt_request_id=pending.frame.target,
            active_requests=pending.active_requests,
            found=any(isinstance(target, LiveRequest) for target in pending.targets.values()),
        )
        _log.info("Interrupt acknowledged", session_id=self._session_id, status=ack.status.value)
        for result in ack.results:
            self._metrics.interrupts.labels(reason, result.outcome.value.lower()).inc()
            if result.stream_closed_ms is not None:
                self._metrics.stream_closed_seconds.observe(
                    result.stream_closed_ms / 1000, exemplar(result.request_id)
                )

    def _forget(self, live: LiveRequest, outcome: Outcome) -> None:
        del self._live[live.request_id]
        live.slot.release()
        self._request_ids.end(live.request_id, live.outlet.delivered_text_chars)
        self._note_calls(live)
        self._history.end(live.turn, *live.as_heard(outcome))
        self._lanes.run_deferred(self._release, live, outcome)

    def _release(self, live: LiveRequest, outcome: Outcome) -> None:
        tell(live.actor, TerminalSent())
        self._metrics.text_chars.inc(live.outlet.delivered_text_chars)
        self._count(outcome)
        if live.interrupted_by is not None:
            _log.info(
                "Request interrupted",
                session_id=self._session_id,
                request_id=live.request_id,
                reason=live.interrupted_by.value,
            )

    def _count(self, outcome: Outcome) -> None:
        """A request has ended: what its terminal frame says is what is counted."""
        self._metrics.requests.labels(outcome.value.lower()).inc()

    # The session's own time.

    def _set_timer(self) -> None:
        # One for a session, and no greenlet: ten thousand idle ones must cost next to nothing.
        wait = self._lifetime.next_at - time.monotonic()
        if math.isfinite(wait):
            self._timer = Timer(max(0.0, wait), self.actor_ref, TimeIsDue())

    def _on_time(self) -> None:
        if self._farewell is not None:
            return
        now = time.monotonic()
        remaining = self._lifetime.remaining_seconds(now)
        for due in self._lifetime.due(now):
            match due:
                case Due.HEARTBEAT:
                    self._send(Heartbeat(remaining))
                case Due.WARNING:
                    message = f"the session ends in {remaining} s, unless the client says something"
                    self._send(SessionWarn(remaining, message))
                case Due.END:
                    self._end(
                        InterruptReason.SESSION_TIMEOUT,
                        lambda: self._say_goodbye("session timeout", _CLOSE_EXPIRED),
                    )
                    return
        self._set_timer()

    def _end(self, reason: InterruptReason, farewell: Callable[[], None]) -> None:
        """Stop everything that is live; when it has ended, do the farewell and stop."""
        self._farewell = farewell
        self._ended_by = self._ended_by or reason.value
        self._takes_requests = False
        request_id = self._voices.open_id
        if request_id is not None:
            self._drop_voice(request_id)
            self._count(Outcome.INTERRUPTED)
            self._send(interrupted(request_id, reason, self._voice_stream_seq))
        for live in list(self._live.values()):
            if not self._stop_request(live, reason):
                # Its terminal frame is with the kernel, or was begun on a lost connection.
                is_complete = live.result is not None and live.result.ending is Ending.COMPLETED
                self._forget(live, Outcome.COMPLETED if is_complete else Outcome.FAILED)
        self._settle()

    def _end_for_restart(self, reason: InterruptReason) -> None:
        self._end(reason, lambda: self._say_goodbye(reason.value, _CLOSE_SERVICE_RESTART))

    def _say_goodbye(self, reason: str, code: int) -> None:
        self._send(Shutdown(reason))
        self._outbox.close(code, reason)

    # Sending.

    def _refuse_frame(self, frame_error: FrameError) -> None:
        request_id = frame_error.request_id
        code, detail = frame_error.code, frame_error.detail
        if request_id is None:
            self._refuse(code, detail)
        elif frame_error.of_voice and self._voices.is_dropped(request_id):
            pass
        elif request_id == self._voices.open_id:
            self._fail_voice(request_id, VoiceError(code, detail))
        elif self._is_used(request_id):
            self._refuse(code, detail)
        elif (reason := self._request_ids.take_early(request_id, time.monotonic())) is not None:
            if frame_error.of_voice:
                self._drop_voice(request_id)
            self._request_ids.end(request_id, 0)
            self._count(Outcome.INTERRUPTED)
            self._send(interrupted(request_id, reason, self._voice_stream_seq))
        elif frame_error.of_voice:
            self._fail_voice(request_id, VoiceError(code, detail))
        else:
            self._refuse(code, detail, request_id)

    def _refuse_request(self, code: ErrorCode, detail: str, request_id: str | None) -> None:
        """Refuse a frame that would have begun a request, for good."""
        if request_id is not None:
            self._request_ids.end(request_id, 0)
        self._refuse(code, detail, request_id)

    def _refuse_busy(self, reason: str, detail: str, request_id: str | None = None) -> None:
        self._metrics.refused.labels(reason).inc()
        self._refuse(ErrorCode.SERVER_BUSY, detail, request_id)

    def _refuse(self, code: ErrorCode, detail: str, request_id: str | None = None) -> None:
        fields = {"session_id": self._session_id, "peer": self._peer, "request_id": request_id}
        _deferred_log.info("Refused message", code=code.value, detail=detail, **fields)
        if request_id is None:
            self._send(error(code, detail))
        else:
            self._request_ids.refuse(request_id)
            outcome = Outcome.FAILED  # to the client, this is the end of that request
            self._count(outcome)
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
        return encode(payload, self._session_id, _now_ms())


class SessionHandle:
    """What the server holds of a session: puts messages in its mailbox, and never waits."""

    def __init__(self, ref: pykka.ActorRef[Any], slot: Slot) -> None:
        self._ref = ref
        self._slot = slot

    @property
    def is_registered(self) -> bool:
        """Whether its client was let in."""
        return self._slot.is_taken

    def frame(self, frame: ClientFrame, read_at: float) -> None:
        """The client sent a frame, read at this `time.monotonic()`."""
        tell(self._ref, FrameReceived(frame, read_at))

    def bad_frame(self, error: FrameError) -> None:
        """The client sent something that was not understood."""
        tell(self._ref, BadFrameReceived(error))

    def voice(self, voice: bytes) -> None:
        """The client sent a binary frame."""
        tell(self._ref, VoiceReceived(voice))

    def connection_lost(self, reason: str) -> None:
        """Nothing can be read or written any more."""
        tell(self._ref, ConnectionLost(reason))


def _only(data: _S, fields: Collection[str] | None) -> _S:
    """Leave out what was not asked for; nothing asked for is everything."""
    if not fields:
        return data
    asked = {name: getattr(data, name) for name in data.__struct_fields__ if name in fields}
    return type(data)(**asked)


def _kind(auth: ApiKeyAuth | AccountAuth) -> str:
    """What kind of credentials they are, as the wire calls it."""
    return str(auth.__struct_config__.tag)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
