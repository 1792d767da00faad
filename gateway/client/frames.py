"""The frames of protocol 1.0 as a client sees them: what a gateway sends, as typed structs.

This is the client's own reading, so that a client imports nothing of the gateway. A test compares
each struct with the gateway's, field by field. A client is lenient: it ignores unknown fields, and
does not check the limits that the gateway puts on what it sends.

A field that may be absent is `UNSET` where it is. In a frame that a client sends, payloads are
keyword arguments; only the two kinds of credentials have a struct, which hides them in a `repr`.
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from msgspec import UNSET, Struct, UnsetType, field

VERSION = "1.0"
"""Of the protocol, in every envelope."""

PATH = "/ws/agent/stream"
"""Of the WebSocket."""


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


class InterruptReason(enum.StrEnum):
    """Why a request was interrupted: the reasons that clients give, and the gateway's own."""

    USER_NEW_INPUT = "USER_NEW_INPUT"
    USER_STOP = "USER_STOP"
    USER_VOICE_INPUT = "USER_VOICE_INPUT"
    CLIENT_ERROR = "CLIENT_ERROR"
    OTHER = "OTHER"
    CLIENT_SHUTDOWN = "CLIENT_SHUTDOWN"
    CONNECTION_LOST = "CONNECTION_LOST"
    SERVER_SHUTDOWN = "SERVER_SHUTDOWN"
    SESSION_TIMEOUT = "SESSION_TIMEOUT"


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
    """Whether an INTERRUPT stopped all of its targets, some, or none."""

    SUCCESS = "SUCCESS"
    PARTIAL = "PARTIAL"
    FAILED = "FAILED"


class Platform(enum.StrEnum):
    """What kind of client it is."""

    WEB = "WEB"
    APP = "APP"
    MINI_PROGRAM = "MINI_PROGRAM"
    TV = "TV"


# Credentials, in REGISTER.


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


# Payloads from the gateway.


class RegisterAck(Struct, frozen=True):
    """The answer to a REGISTER that was accepted."""

    msg_type: ClassVar = "REGISTER_ACK"
    session_id: str
    session_timeout_seconds: int
    status: str = "SUCCESS"
    message: str = "registered"


class ResponseContent(Struct, frozen=True):
    """The `content` of a RESPONSE; empty on the terminal frame."""

    text: str | UnsetType = UNSET
    voice: bytes | UnsetType = UNSET
    """16 kHz 16-bit mono PCM, base64 on the wire."""


class FunctionCall(Struct, frozen=True):
    """The model asks the client to call a function."""

    name: str
    parameters: dict[str, Any]
    call_id: str


class Usage(Struct, frozen=True):
    """Tokens as the provider counted them, or `estimated` where it gave no count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: bool | UnsetType = UNSET


class Response(Struct, frozen=True):
    """A piece of an answer (`text_stream_seq` counts from 0), or its end (-1)."""

    msg_type: ClassVar = "RESPONSE"
    request_id: str
    text_stream_seq: int
    content: ResponseContent = field(default_factory=ResponseContent)
    function_call: FunctionCall | UnsetType = UNSET
    voice_stream_seq: int | UnsetType = UNSET
    interrupted: bool | UnsetType = UNSET
    interrupt_reason: str | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    finish_reason: str | UnsetType | None = UNSET
    usage: Usage | UnsetType | None = UNSET


class InterruptResult(Struct, frozen=True):
    """What an INTERRUPT did to one target.

    `delivered_text_chars` counts Unicode code points. `stream_closed_ms` runs from reading the
    INTERRUPT frame to the closed stream; it is None where there was no stream. `stops_on_close`
    says whether the provider stops generating then, where it had the request.
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


class HealthStatus(Struct, frozen=True):
    """`conn_count` is the number of open connections; `cpu_usage` is in percent of one core."""

    status: str | UnsetType = UNSET
    conn_count: int | UnsetType = UNSET
    cpu_usage: float | UnsetType = UNSET


class HealthCheckAck(Struct, frozen=True):
    """The answer to a HEALTH_CHECK."""

    msg_type: ClassVar = "HEALTH_CHECK_ACK"
    health_status: HealthStatus


class FunctionParameter(Struct, frozen=True):
    """One parameter of a function, where the definition lists them in place of a JSON Schema."""

    name: str
    type: Literal["string", "number", "integer", "boolean", "array", "object"]
    description: str | None = None
    required: bool = True


class FunctionDefinition(Struct, frozen=True, omit_defaults=True):
    """A function that the client can call for the model.

    `parameters` is a JSON Schema of type object, or a list of parameters.
    """

    name: str
    description: str | None = None
    parameters: dict[str, Any] | list[FunctionParameter] | None = None


class SessionData(Struct, frozen=True):
    """The fields of a session that were queried; `create_time` in milliseconds since the epoch."""

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
    """The session expires soon, unless it is renewed."""

    msg_type: ClassVar = "SESSION_WARN"
    remaining_seconds: int
    message: str
    warn_type: str = "EXPIRE_SOON"


class Shutdown(Struct, frozen=True):
    """The gateway ends the session."""

    msg_type: ClassVar = "SHUTDOWN"
    reason: str | None = None


class Error(Struct, frozen=True):
    """A frame was refused; or, with a `request_id`, a request failed, and this is its end."""

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
