"""One client of wire protocol 1.0, from the handshake to the end of its connection.

The handshake makes an *attachment*. Before there is a session, the attachment answers HEALTH_CHECK,
refuses frames that come too early, and has the credentials of REGISTER checked. REGISTER makes a
session. From then on the attachment turns frames into messages to the session, and `WirePort` turns
what the session says into frames.

    state         may become
    UNREGISTERED  CHECKING, REGISTERED, CLOSED
    CHECKING      REGISTERED, CLOSED
    REGISTERED    CLOSED
    CLOSED        -
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, assert_never

import msgspec
from websockets.frames import CloseCode

from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.outlet import RequestEnd
from actors.session.books import Books
from actors.session.messages import (
    ClientLeaves,
    ConnectionLost,
    DoorAsked,
    FunctionReturned,
    InterruptAsked,
    NotUnderstood,
    RequestAsked,
    SessionMessage,
    SessionQueried,
    SignOfLife,
)
from actors.session.port import SERVER_RESTART
from actors.session.profile import (
    MAX_FUNCTIONS_BYTES,
    Profile,
    SceneContext,
    SessionUpdate,
    SystemPrompt,
    UpdateError,
)
from actors.session.session import Registration, Session, Sessions
from actors.words import ErrorCode, Outcome
from gateway.wire.decode import FrameError, decode
from gateway.wire.frames import (
    AccountAuth,
    ApiKeyAuth,
    ClientFrame,
    FunctionResult,
    HealthCheck,
    HealthStatus,
    HeartbeatReply,
    Interrupt,
    Register,
    Request,
    SessionQuery,
    Shutdown,
)
from gateway.wire.loose_interrupt import TargetError, find_interrupt
from gateway.wire.port import Outbox, WirePort
from gateway.wire.voice import VoiceFrames
from metrics.instruments import Metrics
from metrics.logs import get_logger, is_logged

_MAX_LOGGED_CHARS = 64
"""How much of a `session_id` is logged: the client may send any text."""

_CLOSE_BY_REFUSAL = {
    ErrorCode.AUTH_FAILED: CloseCode.POLICY_VIOLATION,
    ErrorCode.SERVER_BUSY: CloseCode.TRY_AGAIN_LATER,
    ErrorCode.INTERNAL_ERROR: CloseCode.INTERNAL_ERROR,
}
"""The close code when credentials were not accepted, or could not be checked."""

_log = get_logger("WS")  # for code that already runs in the data lane
_deferred_log = DeferredLog(get_logger("ACTOR"))


class Applicant(Protocol):
    """A client that waits for its credentials to be checked."""

    @property
    def is_waiting(self) -> bool:
        """False once the client has left, so that no answer is needed."""

    def accept(self, client_name: str) -> None:
        """The credentials are valid, and belong to `client_name`."""

    def reject(self, code: ErrorCode, detail: str) -> None:
        """The credentials are not valid (`AUTH_FAILED`), or could not be checked."""


class Authenticator(Protocol):
    """Decides who may register (`gateway.access.authenticator.Authenticator`)."""

    def check(self, auth: ApiKeyAuth | AccountAuth, applicant: Applicant) -> None:
        """Accept or reject the applicant, now or later, exactly once, if it still waits then."""


class State(enum.Enum):
    """The state of an attachment."""

    UNREGISTERED = "unregistered"
    CHECKING = "checking"
    REGISTERED = "registered"
    CLOSED = "closed"


_TRANSITIONS: dict[State, frozenset[State]] = {
    State.UNREGISTERED: frozenset({State.CHECKING, State.REGISTERED, State.CLOSED}),
    State.CHECKING: frozenset({State.REGISTERED, State.CLOSED}),
    State.REGISTERED: frozenset({State.CLOSED}),
    State.CLOSED: frozenset(),
}


class Attachment:
    """One client, with its outbox. Its methods never block, and what they raise ends this client
    and no other. They run in the greenlet that calls: the connection's, or the authenticator's.

    Args:
        outbox: takes the frames for the client.
        peer: the client's address.
        sessions: makes the session.
        authenticator: checks credentials; None accepts every client.
        health: returns the answer to HEALTH_CHECK.
        metrics: counts refusals.
        is_draining: returns True once no new sessions may be made.
        on_settled: called with the attachment when it becomes registered or closed.
    """

    def __init__(
        self,
        outbox: Outbox,
        peer: str,
        *,
        sessions: Sessions,
        authenticator: Authenticator | None,
        health: Callable[[], HealthStatus],
        metrics: Metrics,
        is_draining: Callable[[], bool],
        on_settled: Callable[[Attachment], None] = lambda _attachment: None,
    ) -> None:
        self._port = WirePort(outbox, health)
        self._peer = peer
        self._sessions = sessions
        self._authenticator = authenticator
        self._books = Books(None, peer, metrics)
        self._is_draining = is_draining
        self._on_settled = on_settled
        self._state = State.UNREGISTERED
        self._registration: Registration | None = None
        """What is registered when its credentials turn out to be valid."""
        self._session: Session | None = None
        self._voices = VoiceFrames(sessions.settings.max_voice_bytes)
        self._port.on_voice_unwanted = self._voices.ignore
        self._lanes = lanes()
        self._asked_at = time.monotonic()
        """When an unregistered client last asked for something useful."""

    # What the connection calls.

    @property
    def is_registered(self) -> bool:
        """Whether its client was let in, and its session has not ended."""
        return self._session is not None and self._session.is_alive

    @property
    def idle_since(self) -> float | None:
        """`time.monotonic()` since when a client that has not registered has asked for nothing;
        None while its registration is checked, and once it is registered or gone."""
        return self._asked_at if self._state is State.UNREGISTERED else None

    def text(self, message: bytes, read_at: float) -> None:
        """The client sent a text frame, read at this `time.monotonic()`."""
        if self._state is State.CLOSED:
            return
        try:
            self._take(message, read_at)
        except Exception as error:
            self._fail(error)

    def binary(self, message: bytes) -> None:
        """The client sent a binary frame."""
        if self._state is State.CLOSED:
            return
        try:
            if self._session is None:
                self._refuse(ErrorCode.SESSION_INVALID, self._too_early_detail())
            elif (interrupt := _interrupt_in(message)) is not None:
                for word in self._words(ClientFrame(None, interrupt), time.monotonic()):
                    self._session.tell(word)
            else:
                for word in self._voices.take_binary(message):
                    self._session.tell(word)
        except Exception as error:
            self._fail(error)

    def connection_lost(self, reason: str) -> None:
        """Nothing can be read or written any more. May be told more than once."""
        if self._state is State.CLOSED:
            return
        if self._session is not None:
            self._session.tell(ConnectionLost(reason))
        self._advance(State.CLOSED)

    # Frames.

    def _take(self, message: bytes, read_at: float) -> None:
        try:
            frame = decode(message)
        except FrameError as fault:
            self._fault(fault)
        else:
            # Deferred, since writing the line takes longer than an interrupt; but queued first, so
            # that it comes before the lines that the frame causes.
            if is_logged("info"):
                self._lanes.run_deferred(_log_received, frame)
            self._receive(frame, read_at)

    def _receive(self, frame: ClientFrame, read_at: float) -> None:
        payload = frame.payload
        if self._session is not None:
            if isinstance(payload, Register):
                detail = "this connection has already sent REGISTER"
                self._session.tell(NotUnderstood(ErrorCode.MALFORMED_PAYLOAD, detail))
            elif isinstance(payload, HealthCheck):
                self._session.tell(DoorAsked(payload.check_fields))
            elif frame.session_id != self._session.session_id and not isinstance(
                payload, Interrupt
            ):  # whatever says stop, stops
                detail = "session_id does not match the one in REGISTER_ACK"
                self._session.tell(NotUnderstood(ErrorCode.SESSION_INVALID, detail))
            else:
                for word in self._words(frame, read_at):
                    self._session.tell(word)
        elif isinstance(payload, HealthCheck):
            self._asked_at = read_at
            self._port.door_answers(payload.check_fields)
        elif not isinstance(payload, Register):
            self._refuse(ErrorCode.SESSION_INVALID, self._too_early_detail())
        elif self._state is State.UNREGISTERED:
            self._on_register(payload)
        else:
            detail = "this connection has already sent REGISTER"
            self._refuse(ErrorCode.MALFORMED_PAYLOAD, detail)

    def _words(self, frame: ClientFrame, read_at: float) -> list[SessionMessage]:
        """Turn a frame into messages to the session."""
        payload = frame.payload
        match payload:
            case Interrupt():
                return [
                    InterruptAsked(
                        payload.target,
                        payload.known_reason,
                        payload.delivered_text_chars,
                        read_at,
                        payload.interrupt_request_id,
                    )
                ]
            case Request() if payload.data_type == "VOICE":
                return self._voices.take_frame(payload)
            case Request():
                text = payload.content.text or ""
                return [RequestAsked(payload.request_id, text, tuple(payload.updates))]
            case FunctionResult(call_id, result, request_id):
                text = result if isinstance(result, str) else msgspec.json.encode(result).decode()
                return [FunctionReturned(call_id, text, request_id)]
            case SessionQuery(query_fields):
                return [SessionQueried(query_fields)]
            case HeartbeatReply():
                return [SignOfLife()]
            case Shutdown():
                return [ClientLeaves()]
            case Register() | HealthCheck():
                return []  # `_receive` has handled them
            case _:
                assert_never(payload)

    def _fault(self, fault: FrameError) -> None:
        if self._session is None:
            self._refuse(fault.code, fault.detail, fault.request_id)
        elif fault.is_voice and fault.request_id is not None:
            for word in self._voices.take_fault(fault.request_id, fault.code, fault.detail):
                self._session.tell(word)
        else:
            self._session.tell(NotUnderstood(fault.code, fault.detail, fault.request_id))

    def _too_early_detail(self) -> str:
        if self._state is State.CHECKING:
            return "wait for REGISTER_ACK"
        return "the first message must be REGISTER"

    # Registration.

    def _on_register(self, register: Register) -> None:
        # Made before the check of the credentials, which may have to wait: it is smaller than the
        # frame, and a client that asks for too much may try again.
        try:
            profile = profile_of(register, self._sessions.settings.max_functions_bytes)
        except UpdateError as error:
            self._refuse(error.code, error.detail)
            return
        registration = Registration(
            self._peer, profile, register.on_new_request, auth=_kind(register.auth)
        )
        if self._authenticator is None:
            self._open_session(registration)
        else:
            self._registration = registration
            self._advance(State.CHECKING)
            self._authenticator.check(register.auth, self)

    @property
    def is_waiting(self) -> bool:
        """See `Applicant`."""
        return self._state is State.CHECKING

    def accept(self, client_name: str) -> None:
        """See `Applicant`."""
        registration = self._registration
        if registration is not None:  # else the client has left meanwhile
            self._registration = None
            try:
                self._open_session(replace(registration, client_name=client_name))
            except Exception as error:
                self._fail(error)

    def reject(self, code: ErrorCode, detail: str) -> None:
        """See `Applicant`."""
        registration = self._registration
        if registration is not None:
            self._registration = None
            try:
                self._refuse_registration(registration, code, detail)
            except Exception as error:
                self._fail(error)

    def _refuse_registration(
        self, registration: Registration, code: ErrorCode, detail: str
    ) -> None:
        match code:
            case ErrorCode.AUTH_FAILED:
                self._books.busy("auth")
            case ErrorCode.SERVER_BUSY:
                self._books.busy("auth_busy")
        # The log gets no account name: the client may have put the password in the wrong field.
        _deferred_log.warning(
            "Refused registration", peer=self._peer, code=code.value, auth=registration.auth
        )
        self._port.refused(code, detail)
        self._port.close(_CLOSE_BY_REFUSAL[code], "registration refused")
        self._advance(State.CLOSED)

    def _open_session(self, registration: Registration) -> None:
        if self._is_draining():
            self._books.busy("shutdown")
            self._refuse(ErrorCode.SERVER_BUSY, "the gateway is shutting down")
            self.leave()
            return
        self._session = self._sessions.open(self._port, registration)
        if self._session is not None:
            self._advance(State.REGISTERED)
            return
        detail = "session limit reached"
        self._books.busy("max_sessions")
        self._refuse(ErrorCode.SERVER_BUSY, detail)
        self._port.close(CloseCode.TRY_AGAIN_LATER, detail)
        self._advance(State.CLOSED)

    # The end.

    def leave(self) -> None:
        """The gateway shuts down: say goodbye to a client that has not registered."""
        if self._state in (State.UNREGISTERED, State.CHECKING):
            try:
                self._port.goodbye(SERVER_RESTART)
                self._advance(State.CLOSED)
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """The gateway failed on this client: close its connection, as for a session that fails."""
        _deferred_log.error("Client failed", peer=self._peer, error=repr(error), exc_info=error)
        self.connection_lost("the gateway failed")
        self._port.session_failed()

    def _advance(self, state: State) -> None:
        if state not in _TRANSITIONS[self._state]:
            return  # the client has left meanwhile
        self._state = state
        if state is State.CLOSED:
            self._registration = None
        if state is not State.CHECKING:
            self._on_settled(self)

    def _refuse(self, code: ErrorCode, detail: str, request_id: str | None = None) -> None:
        """Refuse a message of a client that has no session."""
        self._books.refused(code, detail, request_id)
        if request_id is None:
            self._port.refused(code, detail)
        else:
            self._books.request_ended(Outcome.FAILED)
            end = RequestEnd(request_id, Outcome.FAILED, code=code, detail=detail)
            self._port.request_ended(end)


def _interrupt_in(message: bytes) -> Interrupt | None:
    """An INTERRUPT that came as a binary frame, as some clients send all their JSON."""
    if not message.startswith(b"{"):
        return None
    try:
        return find_interrupt(message)
    except TargetError:
        return None


def profile_of(register: Register, max_functions_bytes: int = MAX_FUNCTIONS_BYTES) -> Profile:
    """The profile that a REGISTER asks for. Older clients send `client_type` for `platform`.

    Raises:
        UpdateError: its functions are too large.
    """
    profile = Profile(
        register.platform or register.client_type,
        register.require_tts,
        register.enable_srs,
        register.system_prompt or SystemPrompt(),
        register.scene_context or SceneContext(),
    )
    functions = SessionUpdate(function_calling=[*(register.function_calling or ())])
    return profile.updated([functions], max_functions_bytes)


def _log_received(frame: ClientFrame) -> None:
    payload = frame.payload
    fields = {"session_id": frame.session_id and frame.session_id[:_MAX_LOGGED_CHARS]}
    if isinstance(payload, Request | FunctionResult):
        fields["request_id"] = payload.request_id
    elif isinstance(payload, Interrupt):
        fields["request_id"] = payload.target
    _log.info("Received message", msg_type=payload.msg_type, **fields)


def _kind(auth: ApiKeyAuth | AccountAuth) -> str:
    """The kind of credentials, as the protocol names it."""
    return str(auth.__struct_config__.tag)
