"""Wire protocol 1.0: frames to typed structs and back. Pure: no I/O, no clock.

A frame is a JSON object, the envelope, whose `payload` has the shape that `msg_type` names. Bytes
become structs here, once; nobody behind this module asks what is in a dictionary. Unknown fields
are ignored.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

VERSION = "1.0"

PATH = "/ws/agent/stream"
"""Where the WebSocket is."""

MAX_TEXT_BYTES = 256 * 1024
"""A text frame that carries no voice."""

MAX_VOICE_TEXT_BYTES = 1024 * 1024
"""A text frame that carries voice in base64."""

MAX_FRAME_BYTES = 1536 * 1024
"""Any frame: beyond this the connection is closed with 1009."""

_MAX_DETAIL_CHARS = 200


class ErrorCode(enum.StrEnum):
    """Why a frame or a request was refused, or a request failed."""

    AUTH_FAILED = "AUTH_FAILED"
    SESSION_INVALID = "SESSION_INVALID"
    STREAM_SEQ_ERROR = "STREAM_SEQ_ERROR"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    SERVER_BUSY = "SERVER_BUSY"
    MALFORMED_PAYLOAD = "MALFORMED_PAYLOAD"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"


_ERRORS: dict[ErrorCode, tuple[str, bool]] = {
    ErrorCode.AUTH_FAILED: ("registration refused", True),
    ErrorCode.SESSION_INVALID: ("no such session", False),
    ErrorCode.STREAM_SEQ_ERROR: ("voice frames out of order", True),
    ErrorCode.PAYLOAD_TOO_LARGE: ("frame too large", False),
    ErrorCode.SERVER_BUSY: ("server busy", True),
    ErrorCode.MALFORMED_PAYLOAD: ("frame not understood", False),
    ErrorCode.INTERNAL_ERROR: ("internal error", True),
    ErrorCode.REQUEST_TIMEOUT: ("request timed out", True),
}
"""Of each code its message and whether trying again may help."""


class InterruptReason(enum.StrEnum):
    """Why a request was interrupted: what clients say, and the gateway's own reasons."""

    USER_NEW_INPUT = "USER_NEW_INPUT"
    USER_STOP = "USER_STOP"
    USER_VOICE_INPUT = "USER_VOICE_INPUT"
    CLIENT_ERROR = "CLIENT_ERROR"
    OTHER = "OTHER"
    CLIENT_SHUTDOWN = "CLIENT_SHUTDOWN"
    CONNECTION_LOST = "CONNECTION_LOST"
    SERVER_SHUTDOWN = "SERVER_SHUTDOWN"
    SESSION_TIMEOUT = "SESSION_TIMEOUT"


_CLIENT_REASONS = {
    reason.value: reason
    for reason in (
        InterruptReason.USER_NEW_INPUT,
        InterruptReason.USER_STOP,
        InterruptReason.USER_VOICE_INPUT,
        InterruptReason.CLIENT_ERROR,
    )
}


class Outcome(enum.StrEnum):
    """How a request ended, on its terminal frame."""

    COMPLETED = "COMPLETED"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"
    REAPED = "REAPED"


class InterruptOutcome(enum.StrEnum):
    """What an INTERRUPT did to one target."""

    STOPPED = "STOPPED"
    ALREADY_DONE = "ALREADY_DONE"
    UNKNOWN = "UNKNOWN"
    TIMED_OUT = "TIMED_OUT"


class AckStatus(enum.StrEnum):
    """Whether every target of an INTERRUPT was stopped, some, or none."""

    SUCCESS = "SUCCESS"
    PARTIAL = "PARTIAL"
    FAILED = "FAILED"


class FrameError(Exception):
    """A frame was refused.

    Args:
        code: the error code for the client.
        detail: what exactly is wrong, for the client.
        request_id: the id in a REQUEST that was refused, where it is a proper one.
        of_voice: whether that is a VOICE request, of which more frames may come.
    """

    def __init__(
        self,
        code: ErrorCode,
        detail: str,
        request_id: str | None = None,
        *,
        of_voice: bool = False,
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.of_voice = of_voice


# Client to server.

MAX_FUNCTIONS = 128
"""Functions of one session: what providers take."""

MAX_NESTING = 100
"""Levels of a JSON value that goes on to the provider. What is nested deeper can be read, but maybe
not be written again."""

_FUNCTION_PATH = re.compile(
    r"`\$\.((?P<outer>update_session)\.)?function_calling\[(?P<index>\d+)\]"
)
"""Where msgspec says that a fault is in a function's definition."""


class Platform(enum.StrEnum):
    """What kind of client it is."""

    WEB = "WEB"
    APP = "APP"
    MINI_PROGRAM = "MINI_PROGRAM"
    TV = "TV"


class OnNewRequest(enum.StrEnum):
    """What a REQUEST does while another is live."""

    INTERRUPT = "interrupt"
    PARALLEL = "parallel"
    REJECT = "reject"


class FunctionOp(enum.StrEnum):
    """What an update does with the functions that it names."""

    REPLACE = "REPLACE"
    ADD = "ADD"
    UPDATE = "UPDATE"
    DELETE = "DELETE"


VoiceMode: TypeAlias = Literal["BASE64", "BINARY"]

FunctionName: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
"""As providers take them."""

RequestId: TypeAlias = Annotated[str, Meta(pattern=r"^[ -~]{1,64}\Z")]
"""1 to 64 printable ASCII characters."""

_TargetId: TypeAlias = Annotated[str, Meta(pattern=r"^[ -~]{0,64}\Z")]


class ApiKeyAuth(Struct, frozen=True, tag_field="type", tag="API_KEY"):
    """Registration by key."""

    api_key: str

    def __repr__(self) -> str:
        return "ApiKeyAuth(…)"


class AccountAuth(Struct, frozen=True, tag_field="type", tag="ACCOUNT"):
    """Registration by account and password."""

    account: str
    password: str

    def __repr__(self) -> str:
        return "AccountAuth(…)"


class SystemPrompt(Struct, frozen=True):
    """Who the model is to be, and how it is to answer."""

    role_description: str | None = None
    response_requirements: str | None = None


class SceneContext(Struct, frozen=True):
    """Where the user is, or what stands before them."""

    scene_description: str | None = None
    keywords: list[str] | None = None


class FunctionParameter(Struct, frozen=True):
    """One parameter, where a definition lists them instead of giving a JSON Schema."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    type: Literal["string", "number", "integer", "boolean", "array", "object"]
    description: str | None = None
    required: bool = True


class FunctionDefinition(Struct, frozen=True, omit_defaults=True):
    """A function that the client can call for the model.

    `parameters` is a JSON Schema of type object, or a list of parameters.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | list[FunctionParameter] | None = None


class SessionUpdate(Struct, frozen=True):
    """What a REQUEST may change of its session; what is absent or null stays as it is.

    `function_calling` names functions by definition; for DELETE their names alone are enough.
    """

    require_tts: bool | None = None
    enable_srs: bool | None = None
    system_prompt: SystemPrompt | None = None
    scene_context: SceneContext | None = None
    function_calling_op: FunctionOp | None = None
    function_calling: list[FunctionDefinition | FunctionName] | None = None


_NO_UPDATE = SessionUpdate()


class Register(Struct, frozen=True):
    """The first message of a session. Older clients say `client_type` for `platform`."""

    msg_type: ClassVar = "REGISTER"
    auth: ApiKeyAuth | AccountAuth
    platform: Platform | None = None
    client_type: Platform | None = None
    require_tts: bool = False
    enable_srs: bool = True
    function_calling: list[FunctionDefinition] | None = None
    system_prompt: SystemPrompt | None = None
    scene_context: SceneContext | None = None
    on_new_request: OnNewRequest | None = None


class RequestContent(Struct, frozen=True):
    """The `content` of a REQUEST, of either data type; `voice` is base64 on the wire."""

    text: str | None = None
    voice_mode: VoiceMode | None = None
    voice: bytes | None = None
    audio_format: str | None = None


class Request(Struct, frozen=True):
    """A user's turn, or a piece of it; and changes of the session, at either of two places."""

    msg_type: ClassVar = "REQUEST"
    request_id: RequestId
    data_type: Literal["TEXT", "VOICE"]
    content: RequestContent
    stream_flag: bool = False
    stream_seq: int = 0
    require_tts: bool | None = None
    enable_srs: bool | None = None
    system_prompt: SystemPrompt | None = None
    scene_context: SceneContext | None = None
    function_calling_op: FunctionOp | None = None
    function_calling: list[FunctionDefinition | FunctionName] | None = None
    update_session: SessionUpdate | None = None

    @property
    def updates(self) -> list[SessionUpdate]:
        """The changes in the order in which they are to be made."""
        of_ours = SessionUpdate(
            self.require_tts,
            self.enable_srs,
            self.system_prompt,
            self.scene_context,
            self.function_calling_op,
            self.function_calling,
        )
        return [one for one in (of_ours, self.update_session) if one not in (None, _NO_UPDATE)]


class FunctionResult(Struct, frozen=True):
    """What the client's function returned; with a `request_id` the model is to go on."""

    msg_type: ClassVar = "FUNCTION_RESULT"
    call_id: Annotated[str, Meta(min_length=1, max_length=256)]
    result: Any
    request_id: RequestId | None = None


class Interrupt(Struct, frozen=True):
    """Stop one request, or (no id) every live one of the session.

    `delivered_text_chars` says how many Unicode code points of the answer the user really got.
    """

    msg_type: ClassVar = "INTERRUPT"
    interrupt_request_id: _TargetId | UnsetType | None = UNSET
    reason: str | None = None
    delivered_text_chars: Annotated[int, Meta(ge=0)] | None = None

    @property
    def target(self) -> str | None:
        """The id that is meant; None means every live request."""
        return self.interrupt_request_id or None

    @property
    def known_reason(self) -> InterruptReason:
        """The reason; `OTHER` for one that the protocol does not know."""
        return _CLIENT_REASONS.get(self.reason or "", InterruptReason.OTHER)


class SessionQuery(Struct, frozen=True):
    """Ask for the session's data, or (no fields) for all of it."""

    msg_type: ClassVar = "SESSION_QUERY"
    query_fields: list[str] | None = None


class HealthCheck(Struct, frozen=True):
    """Allowed before REGISTER too. No fields ask for all."""

    msg_type: ClassVar = "HEALTH_CHECK"
    check_fields: list[str] | None = None


class HeartbeatReply(Struct, frozen=True):
    """Never answered: clients answer every HEARTBEAT, so this would go on for ever."""

    msg_type: ClassVar = "HEARTBEAT_REPLY"
    client_status: Any = None


class Shutdown(Struct, frozen=True):
    """Either side ends the session."""

    msg_type: ClassVar = "SHUTDOWN"
    reason: str | None = None


ClientPayload: TypeAlias = (
    Register
    | Request
    | Interrupt
    | FunctionResult
    | SessionQuery
    | HealthCheck
    | HeartbeatReply
    | Shutdown
)
CLIENT_PAYLOADS: tuple[type[Any], ...] = get_args(ClientPayload)


class ClientFrame(Struct, frozen=True):
    """A frame from the client, understood."""

    session_id: str | None
    payload: ClientPayload


class _Envelope(Struct):
    version: str
    msg_type: str
    session_id: str | None
    payload: msgspec.Raw
    timestamp: float


class _VoiceContent(Struct):
    voice: str
    voice_mode: Literal["BASE64"]


class _VoiceRequest(Struct):
    data_type: Literal["VOICE"]
    content: _VoiceContent


class _Begun(Struct):
    """What is left to know of a frame that is refused, and would have begun a request: its client
    waits for an answer."""

    request_id: RequestId
    data_type: Any = None


class _BadFrame(Struct):
    msg_type: Literal["REQUEST", "FUNCTION_RESULT"]
    payload: _Begun


_envelope_decoder = msgspec.json.Decoder(_Envelope)
_payload_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    payload.msg_type: msgspec.json.Decoder(payload) for payload in CLIENT_PAYLOADS
}
_voice_decoder = msgspec.json.Decoder(_VoiceRequest)
_begun_decoder = msgspec.json.Decoder(_Begun)


def decode(data: bytes) -> ClientFrame:
    """Read one text frame from a client.

    Args:
        data: the frame's payload, at most `MAX_FRAME_BYTES`.

    Raises:
        FrameError: `PAYLOAD_TOO_LARGE` or `MALFORMED_PAYLOAD`, with what is wrong.
    """
    if len(data) > MAX_VOICE_TEXT_BYTES:
        raise FrameError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"a text frame of {len(data)} bytes; the limit is {MAX_VOICE_TEXT_BYTES}",
        )
    try:
        data.decode()  # msgspec looks only into what it uses
        envelope = _envelope_decoder.decode(data)
    except UnicodeDecodeError:
        raise FrameError(ErrorCode.MALFORMED_PAYLOAD, "frame: not UTF-8") from None
    except msgspec.ValidationError as error:
        raise _malformed(error, "frame") from None
    except (msgspec.DecodeError, RecursionError) as error:  # the latter: nested too deeply
        raise _malformed(error, "frame", _begun_by_bad_frame(data)) from None
    if envelope.version != VERSION:
        raise FrameError(
            ErrorCode.MALFORMED_PAYLOAD,
            f"version is {envelope.version[:16]!r}; this server speaks {VERSION!r}",
        )
    decoder = _payload_decoders.get(envelope.msg_type)
    if decoder is None:
        raise FrameError(
            ErrorCode.MALFORMED_PAYLOAD, f"unknown msg_type {envelope.msg_type[:64]!r}"
        )
    if len(data) > MAX_TEXT_BYTES and not _reads(_voice_decoder, envelope.payload):
        detail = f"a text frame of {len(data)} bytes; without voice the limit is {MAX_TEXT_BYTES}"
        raise _refusal(ErrorCode.PAYLOAD_TOO_LARGE, detail, _begun_by(envelope))
    try:
        payload = decoder.decode(envelope.payload)
    except msgspec.DecodeError as error:
        where = _function_named(str(error), envelope.payload) or "payload"
        raise _malformed(error, where, _begun_by(envelope)) from None
    if fault := _fault(payload):
        raise _refusal(ErrorCode.MALFORMED_PAYLOAD, fault, _begun_by(envelope))
    return ClientFrame(envelope.session_id, payload)


def _fault(payload: ClientPayload) -> str | None:
    """What the types alone do not say."""
    match payload:
        case Register():
            return _function_fault(payload.function_calling or [])
        case Request():
            if payload.data_type == "TEXT" and payload.content.text is None:
                return "a TEXT request without `payload.content.text`"
            if payload.data_type == "VOICE" and payload.content.voice_mode is None:
                return "a VOICE request without `payload.content.voice_mode`"
            faults = (_update_fault(update) for update in payload.updates)
            return next((fault for fault in faults if fault), None)
        case FunctionResult():
            is_deep = _is_too_deep(payload.result)
            return f"`result` is nested over {MAX_NESTING} levels deep" if is_deep else None
        case _:
            return None


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        inside = [list(one.values()) if isinstance(one, dict) else one for one in level]
        level = [inner for one in inside if isinstance(one, list) for inner in one]
        if not level:
            return False
    return True


def _update_fault(update: SessionUpdate) -> str | None:
    functions = update.function_calling
    if functions is None:
        return update.function_calling_op and "`function_calling_op` without `function_calling`"
    definitions = [one for one in functions if isinstance(one, FunctionDefinition)]
    if update.function_calling_op is not FunctionOp.DELETE and len(definitions) < len(functions):
        return "`function_calling`: a name alone is enough only for DELETE"
    return _function_fault(definitions)


def _function_fault(functions: Sequence[FunctionDefinition]) -> str | None:
    if len(functions) > MAX_FUNCTIONS:
        return f"`function_calling`: {len(functions)} functions; the limit is {MAX_FUNCTIONS}"
    seen: set[str] = set()
    for function in functions:
        if function.name in seen:
            return f"function {function.name!r}: `name` is there twice"
        seen.add(function.name)
        if fault := _parameters_fault(function.parameters):
            return f"function {function.name!r}: {fault}"
    return None


def _parameters_fault(parameters: dict[str, Any] | list[FunctionParameter] | None) -> str | None:
    if isinstance(parameters, list):
        names = [parameter.name for parameter in parameters]
        twice = next((name for name in names if names.count(name) > 1), None)
        return twice and f"`parameters`: {twice!r} is there twice"
    schema = parameters or {}
    if _is_too_deep(schema):
        return f"`parameters` is nested over {MAX_NESTING} levels deep"
    if schema.get("type", "object") != "object":
        return "`parameters.type` must be 'object'"
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return "`parameters.properties` must be an object"
    for name, value in properties.items():
        if not isinstance(value, dict | bool):
            return f"`parameters.properties.{name[:64]}` must be a JSON Schema"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "`parameters.required` must be a list of names"
    return None


def _function_named(message: str, payload: msgspec.Raw) -> str | None:
    """Which function of a list is the one that a message is about, by its name."""
    found = _FUNCTION_PATH.search(message)
    if found is None:
        return None
    try:
        inside = msgspec.json.decode(payload)
        for step in (found["outer"], "function_calling"):
            inside = inside[step] if step else inside
        name = inside[int(found["index"])]["name"]
    except (LookupError, TypeError, msgspec.DecodeError, RecursionError):
        return None
    return f"function {name[:64]!r}" if isinstance(name, str) else None


def _malformed(error: Exception, where: str, begun: _Begun | None = None) -> FrameError:
    text = str(error)  # may quote what it was sent, at any length
    if len(text) > _MAX_DETAIL_CHARS:
        half = _MAX_DETAIL_CHARS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return _refusal(ErrorCode.MALFORMED_PAYLOAD, f"{where}: {text}", begun)


def _refusal(code: ErrorCode, detail: str, begun: _Begun | None) -> FrameError:
    if begun is None:
        return FrameError(code, detail)
    return FrameError(code, detail, begun.request_id, of_voice=begun.data_type == "VOICE")


def _reads(decoder: msgspec.json.Decoder[Any], raw: msgspec.Raw) -> bool:
    try:
        decoder.decode(raw)
    except msgspec.DecodeError:
        return False
    return True


def _begun_by_bad_frame(data: bytes) -> _Begun | None:
    # The standard library reads what msgspec does not: half a surrogate pair, which a browser sends
    # when it cut a text inside of an emoji.
    try:
        return msgspec.convert(json.loads(data), _BadFrame).payload
    except (ValueError, RecursionError):
        return None


def _begun_by(envelope: _Envelope) -> _Begun | None:
    if envelope.msg_type not in (Request.msg_type, FunctionResult.msg_type):
        return None
    try:
        begun: _Begun = _begun_decoder.decode(envelope.payload)
    except msgspec.DecodeError:
        return None
    return begun


# Server to client.


class RegisterAck(Struct, frozen=True):
    """The session stands."""

    msg_type: ClassVar = "REGISTER_ACK"
    session_id: str
    session_timeout_seconds: int
    status: str = "SUCCESS"
    message: str = "registered"


class ResponseContent(Struct, frozen=True, omit_defaults=True):
    """The `content` of a RESPONSE; empty on the last frame."""

    text: str | UnsetType = UNSET
    voice: bytes | UnsetType = UNSET
    """16 kHz 16-bit mono PCM, base64 on the wire."""


class FunctionCall(Struct, frozen=True):
    """The model asks the client to call a function."""

    name: str
    parameters: dict[str, Any]
    call_id: str


class Usage(Struct, frozen=True):
    """Tokens, as the provider counted them, or `estimated` where it did not say."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: bool | UnsetType = UNSET


class Response(Struct, frozen=True, omit_defaults=True):
    """A piece of the answer, or (`text_stream_seq` -1) its end.

    `voice_stream_seq` is absent without speech, never null: clients wait for -1 where it is there.
    """

    msg_type: ClassVar = "RESPONSE"
    request_id: str
    text_stream_seq: int
    content: ResponseContent = msgspec.field(default_factory=ResponseContent)
    function_call: FunctionCall | UnsetType = UNSET
    voice_stream_seq: int | UnsetType = UNSET
    interrupted: bool | UnsetType = UNSET
    interrupt_reason: str | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    finish_reason: str | UnsetType | None = UNSET
    usage: Usage | UnsetType | None = UNSET


class InterruptResult(Struct, frozen=True):
    """What an INTERRUPT did to one target.

    `delivered_text_chars` counts Unicode code points that were handed to the kernel;
    `stream_closed_ms` runs from reading the INTERRUPT frame to the closed stream, null where
    there was no stream. `stops_on_close` says what the provider does then, where it had the
    request.
    """

    request_id: str
    outcome: InterruptOutcome
    delivered_text_chars: int
    stream_closed_ms: float | None
    stops_on_close: Literal["yes", "no", "unknown"] | UnsetType = UNSET


class InterruptAck(Struct, frozen=True):
    """The answer to an INTERRUPT; `interrupt_request_id` is echoed exactly as it was sent."""

    msg_type: ClassVar = "INTERRUPT_ACK"
    interrupted_request_ids: list[str]
    status: AckStatus
    message: str
    results: list[InterruptResult]
    interrupt_request_id: str | UnsetType | None = UNSET


class HealthStatus(Struct, frozen=True, omit_defaults=True):
    """`conn_count` is the number of open connections; `cpu_usage` percent of one core."""

    status: str | UnsetType = UNSET
    conn_count: int | UnsetType = UNSET
    cpu_usage: float | UnsetType = UNSET


class HealthCheckAck(Struct, frozen=True):
    """The answer to a HEALTH_CHECK."""

    msg_type: ClassVar = "HEALTH_CHECK_ACK"
    health_status: HealthStatus


class SessionData(Struct, frozen=True, omit_defaults=True):
    """What was asked of a session; `create_time` in milliseconds since the epoch."""

    platform: Platform | UnsetType | None = UNSET
    require_tts: bool | UnsetType = UNSET
    enable_srs: bool | UnsetType = UNSET
    function_calling: list[FunctionDefinition] | UnsetType = UNSET
    create_time: int | UnsetType = UNSET
    remaining_seconds: int | UnsetType = UNSET


class SessionInfo(Struct, frozen=True):
    """The answer to a SESSION_QUERY."""

    msg_type: ClassVar = "SESSION_INFO"
    session_data: SessionData
    status: str = "SUCCESS"
    message: str = ""


class Heartbeat(Struct, frozen=True):
    """Asks for a HEARTBEAT_REPLY, which renews the session."""

    msg_type: ClassVar = "HEARTBEAT"
    remaining_seconds: int


class SessionWarn(Struct, frozen=True):
    """The session ends soon, unless it is renewed."""

    msg_type: ClassVar = "SESSION_WARN"
    remaining_seconds: int
    message: str
    warn_type: str = "EXPIRE_SOON"


class Error(Struct, frozen=True, omit_defaults=True):
    """A refused frame, or (with `request_id`) the end of a request. Made by `error()`."""

    msg_type: ClassVar = "ERROR"
    error_code: ErrorCode
    error_msg: str
    error_detail: str
    retryable: bool
    request_id: str | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    finish_reason: str | UnsetType | None = UNSET
    usage: Usage | UnsetType | None = UNSET


ServerPayload: TypeAlias = (
    RegisterAck
    | Response
    | InterruptAck
    | SessionInfo
    | Heartbeat
    | SessionWarn
    | HealthCheckAck
    | Shutdown
    | Error
)
SERVER_PAYLOADS: tuple[type[Any], ...] = get_args(ServerPayload)


class _ServerFrame(Struct, frozen=True):
    version: str
    msg_type: str
    session_id: str | None
    payload: ServerPayload
    timestamp: int


_encoder = msgspec.json.Encoder()


def error(code: ErrorCode, detail: str, **fields: Any) -> Error:
    """An ERROR frame with the message and `retryable` that belong to its code."""
    message, retryable = _ERRORS[code]
    return Error(code, message, detail, retryable, **fields)


def encode(payload: ServerPayload, session_id: str | None, timestamp_ms: int) -> bytes:
    """One text frame to a client.

    Args:
        payload: what to say.
        session_id: the session's, None before it is registered.
        timestamp_ms: milliseconds since the epoch.
    """
    return _encoder.encode(
        _ServerFrame(VERSION, payload.msg_type, session_id, payload, timestamp_ms)
    )


class ResponseEncoder:
    """Encodes the frames of one request's answer: `encode()` of a RESPONSE, but what stays the same
    is encoded once, since this runs for every token."""

    def __init__(self, session_id: str, request_id: str) -> None:
        self._head = (
            b'{"version":"%b","msg_type":"RESPONSE","session_id":%b,"payload":{"request_id":%b,'
            b'"text_stream_seq":'
            % (VERSION.encode(), _encoder.encode(session_id), _encoder.encode(request_id))
        )

    def encode_call(self, seq: int, call: FunctionCall, timestamp_ms: int) -> bytes:
        """One frame with `text_stream_seq` seq, and a call in place of text."""
        return b'%b%d,"content":{},"function_call":%b},"timestamp":%d}' % (
            self._head,
            seq,
            _encoder.encode(call),
            timestamp_ms,
        )

    def encode_text(self, seq: int, text: str, timestamp_ms: int) -> bytes:
        """One frame with `text_stream_seq` seq."""
        return b'%b%d,"content":{"text":%b}},"timestamp":%d}' % (
            self._head,
            seq,
            _encoder.encode(text),
            timestamp_ms,
        )
