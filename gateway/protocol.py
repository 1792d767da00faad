"""Wire protocol 1.0: frames to typed structs and back. Pure: no I/O, no clock.

A frame is a JSON object, the envelope, whose `payload` has the shape that `msg_type` names. Bytes
become structs here, once; nobody behind this module asks what is in a dictionary. Unknown fields
are ignored.
"""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

VERSION = "1.0"

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
    """

    def __init__(self, code: ErrorCode, detail: str, request_id: str | None = None) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.request_id = request_id


# Client to server.

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


class Register(Struct, frozen=True):
    """The first message of a session."""

    msg_type: ClassVar = "REGISTER"
    auth: ApiKeyAuth | AccountAuth
    require_tts: bool = False


class RequestContent(Struct, frozen=True):
    """The `content` of a REQUEST, of either data type."""

    text: str | None = None
    voice_mode: Literal["BASE64", "BINARY"] | None = None


class Request(Struct, frozen=True):
    """A user's turn."""

    msg_type: ClassVar = "REQUEST"
    request_id: RequestId
    data_type: Literal["TEXT", "VOICE"]
    content: RequestContent


class Interrupt(Struct, frozen=True):
    """Stop one request, or (no id) every live one of the session."""

    msg_type: ClassVar = "INTERRUPT"
    interrupt_request_id: _TargetId | UnsetType | None = UNSET
    reason: str | None = None

    @property
    def target(self) -> str | None:
        """The id that is meant; None means every live request."""
        return self.interrupt_request_id or None

    @property
    def known_reason(self) -> InterruptReason:
        """The reason; `OTHER` for one that the protocol does not know."""
        return _CLIENT_REASONS.get(self.reason or "", InterruptReason.OTHER)


class HealthCheck(Struct, frozen=True):
    """Allowed before REGISTER too."""

    msg_type: ClassVar = "HEALTH_CHECK"


class HeartbeatReply(Struct, frozen=True):
    """Never answered: clients answer every HEARTBEAT, so this would go on for ever."""

    msg_type: ClassVar = "HEARTBEAT_REPLY"


class Shutdown(Struct, frozen=True):
    """Either side ends the session."""

    msg_type: ClassVar = "SHUTDOWN"
    reason: str | None = None


ClientPayload: TypeAlias = Register | Request | Interrupt | HealthCheck | HeartbeatReply | Shutdown


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


class _OnlyId(Struct):
    request_id: RequestId


class _BadRequest(Struct):
    msg_type: Literal["REQUEST"]
    payload: _OnlyId


_envelope_decoder = msgspec.json.Decoder(_Envelope)
_payload_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    payload.msg_type: msgspec.json.Decoder(payload)
    for payload in (Register, Request, Interrupt, HealthCheck, HeartbeatReply, Shutdown)
}
_voice_decoder = msgspec.json.Decoder(_VoiceRequest)
_id_decoder = msgspec.json.Decoder(_OnlyId)


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
        raise _malformed(error, "frame", _id_in_bad_frame(data)) from None
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
        raise FrameError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"a text frame of {len(data)} bytes; without voice the limit is {MAX_TEXT_BYTES}",
            _request_id(envelope),
        )
    try:
        payload = decoder.decode(envelope.payload)
    except msgspec.DecodeError as error:
        raise _malformed(error, "payload", _request_id(envelope)) from None
    if (
        isinstance(payload, Request)
        and payload.data_type == "TEXT"
        and payload.content.text is None
    ):
        raise FrameError(
            ErrorCode.MALFORMED_PAYLOAD,
            "a TEXT request without `payload.content.text`",
            payload.request_id,
        )
    return ClientFrame(envelope.session_id, payload)


def _malformed(error: Exception, where: str, request_id: str | None = None) -> FrameError:
    text = str(error)  # may quote what it was sent, at any length
    if len(text) > _MAX_DETAIL_CHARS:
        half = _MAX_DETAIL_CHARS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return FrameError(ErrorCode.MALFORMED_PAYLOAD, f"{where}: {text}", request_id)


def _reads(decoder: msgspec.json.Decoder[Any], raw: msgspec.Raw) -> bool:
    try:
        decoder.decode(raw)
    except msgspec.DecodeError:
        return False
    return True


def _id_in_bad_frame(data: bytes) -> str | None:
    # The standard library reads what msgspec does not: half a surrogate pair, which a browser sends
    # when it cut a text inside of an emoji.
    try:
        return msgspec.convert(json.loads(data), _BadRequest).payload.request_id
    except (ValueError, RecursionError):
        return None


def _request_id(envelope: _Envelope) -> str | None:
    """The id in a REQUEST that is refused: its client waits for an answer to that id."""
    if envelope.msg_type != Request.msg_type:
        return None
    try:
        request_id: str = _id_decoder.decode(envelope.payload).request_id
    except msgspec.DecodeError:
        return None
    return request_id


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


class Usage(Struct, frozen=True):
    """Tokens, as the provider counted them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Response(Struct, frozen=True, omit_defaults=True):
    """A piece of the answer, or (`text_stream_seq` -1) its end.

    `voice_stream_seq` is absent without speech, never null: clients wait for -1 where it is there.
    """

    msg_type: ClassVar = "RESPONSE"
    request_id: str
    text_stream_seq: int
    content: ResponseContent = msgspec.field(default_factory=ResponseContent)
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
    there was no stream.
    """

    request_id: str
    outcome: InterruptOutcome
    delivered_text_chars: int
    stream_closed_ms: float | None


class InterruptAck(Struct, frozen=True):
    """The answer to an INTERRUPT; `interrupt_request_id` is echoed exactly as it was sent."""

    msg_type: ClassVar = "INTERRUPT_ACK"
    interrupted_request_ids: list[str]
    status: AckStatus
    message: str
    results: list[InterruptResult]
    interrupt_request_id: str | UnsetType | None = UNSET


class HealthStatus(Struct, frozen=True):
    """`conn_count` is the number of open connections; `cpu_usage` percent of one core."""

    status: str
    conn_count: int
    cpu_usage: float


class HealthCheckAck(Struct, frozen=True):
    """The answer to a HEALTH_CHECK."""

    msg_type: ClassVar = "HEALTH_CHECK_ACK"
    health_status: HealthStatus


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


ServerPayload: TypeAlias = RegisterAck | Response | InterruptAck | HealthCheckAck | Shutdown | Error


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


class TextEncoder:
    """Encodes the text frames of one request: `encode()` of a RESPONSE, but what stays the same
    is encoded once, since this runs for every token."""

    def __init__(self, session_id: str, request_id: str) -> None:
        self._head = (
            b'{"version":"%b","msg_type":"RESPONSE","session_id":%b,"payload":{"request_id":%b,'
            b'"text_stream_seq":'
            % (VERSION.encode(), _encoder.encode(session_id), _encoder.encode(request_id))
        )

    def encode(self, seq: int, text: str, timestamp_ms: int) -> bytes:
        """One frame with `text_stream_seq` seq."""
        return b'%b%d,"content":{"text":%b}},"timestamp":%d}' % (
            self._head,
            seq,
            _encoder.encode(text),
            timestamp_ms,
        )
