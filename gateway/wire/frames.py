"""The frames of wire protocol 1.0 as typed structs, and their limits. Pure: no I/O, no clock.

A frame is a JSON object, the envelope. Its `msg_type` says which of these structs its `payload` is.
`decode.py` turns bytes into structs, and `encode.py` turns structs into bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from actors.session.profile import (
    FunctionDefinition,
    FunctionName,
    FunctionOp,
    Platform,
    SceneContext,
    SessionUpdate,
    SystemPrompt,
)
from actors.words import (
    AckStatus,
    ErrorCode,
    InterruptOutcome,
    InterruptReason,
    OnNewRequest,
    Outcome,
)

VERSION = "1.0"

PATH = "/ws/agent/stream"
"""The path of the WebSocket."""

MAX_TEXT_BYTES = 256 * 1024
"""The largest text frame without voice."""

MAX_VOICE_TEXT_BYTES = 1024 * 1024
"""The largest text frame with voice in base64."""

MAX_FRAME_BYTES = 1536 * 1024
"""The largest frame of any kind. A larger one closes the connection with 1009."""

MAX_NESTING = 100
"""The deepest nesting of a JSON value that is passed on to the provider. A value that is nested
deeper may decode and then fail to encode."""

_CLIENT_REASONS = {
    reason.value: reason
    for reason in (
        InterruptReason.USER_NEW_INPUT,
        InterruptReason.USER_STOP,
        InterruptReason.USER_VOICE_INPUT,
        InterruptReason.CLIENT_ERROR,
    )
}

# Client to server.

VoiceMode: TypeAlias = Literal["BASE64", "BINARY"]

RequestId: TypeAlias = Annotated[str, Meta(pattern=r"^[ -~]{1,64}\Z")]
"""1 to 64 printable ASCII characters."""

_TargetId: TypeAlias = Annotated[str, Meta(pattern=r"^[ -~]{0,64}\Z")]


class ApiKeyAuth(Struct, frozen=True, tag_field="type", tag="API_KEY"):
    """Credentials: an API key."""

    api_key: str

    def __repr__(self) -> str:
        return "ApiKeyAuth(…)"


class AccountAuth(Struct, frozen=True, tag_field="type", tag="ACCOUNT"):
    """Credentials: an account and its password."""

    account: str
    password: str

    def __repr__(self) -> str:
        return "AccountAuth(…)"


_NO_UPDATE = SessionUpdate()


class Register(Struct, frozen=True):
    """Opens a session. Older clients send `client_type` instead of `platform`."""

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
    """The `content` of a REQUEST, for text and for voice. `voice` is base64 on the wire."""

    text: str | None = None
    voice_mode: VoiceMode | None = None
    voice: bytes | None = None
    audio_format: str | None = None


class Request(Struct, frozen=True):
    """A turn of the user, or a part of its voice. May also update the session: in its own fields,
    in `update_session`, or in both."""

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
        """The updates, in the order in which they are applied."""
        own_fields = SessionUpdate(
            self.require_tts,
            self.enable_srs,
            self.system_prompt,
            self.scene_context,
            self.function_calling_op,
            self.function_calling,
        )
        return [one for one in (own_fields, self.update_session) if one not in (None, _NO_UPDATE)]


class FunctionResult(Struct, frozen=True):
    """The result of a function call. With a `request_id`, the model continues under that id."""

    msg_type: ClassVar = "FUNCTION_RESULT"
    call_id: Annotated[str, Meta(min_length=1, max_length=256)]
    result: Any
    request_id: RequestId | None = None


class Interrupt(Struct, frozen=True):
    """Stops one request of the session; without an id, every live request.

    `delivered_text_chars` is how many Unicode code points of the answer the user really got.
    """

    msg_type: ClassVar = "INTERRUPT"
    interrupt_request_id: _TargetId | UnsetType | None = UNSET
    reason: str | None = None
    delivered_text_chars: Annotated[int, Meta(ge=0)] | None = None

    @property
    def target(self) -> str | None:
        """The id of the request to stop; None: every live request."""
        return self.interrupt_request_id or None

    @property
    def known_reason(self) -> InterruptReason:
        """The reason; `OTHER` if the protocol does not define it."""
        return _CLIENT_REASONS.get(self.reason or "", InterruptReason.OTHER)


class SessionQuery(Struct, frozen=True):
    """Asks for fields of the session's data; without a list, for all of them."""

    msg_type: ClassVar = "SESSION_QUERY"
    query_fields: list[str] | None = None


class HealthCheck(Struct, frozen=True):
    """Asks for fields of the gateway's health; without a list, for all of them. Also allowed before
    REGISTER."""

    msg_type: ClassVar = "HEALTH_CHECK"
    check_fields: list[str] | None = None


class HeartbeatReply(Struct, frozen=True):
    """The answer to a HEARTBEAT. It is not answered: otherwise the two sides would never stop."""

    msg_type: ClassVar = "HEARTBEAT_REPLY"
    client_status: Any = None


class Shutdown(Struct, frozen=True):
    """Ends the session. Both sides send it."""

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
    """A decoded frame of the client."""

    session_id: str | None
    payload: ClientPayload


# Server to client.


class RegisterAck(Struct, frozen=True):
    """The answer to a REGISTER that was accepted."""

    msg_type: ClassVar = "REGISTER_ACK"
    session_id: str
    session_timeout_seconds: int
    status: str = "SUCCESS"
    message: str = "registered"


class ResponseContent(Struct, frozen=True, omit_defaults=True):
    """The `content` of a RESPONSE. Empty with a function call and on the last frame."""

    text: str | UnsetType = UNSET
    voice: bytes | UnsetType = UNSET
    """16 kHz 16-bit mono PCM, base64 on the wire."""


class FunctionCall(Struct, frozen=True):
    """A function call of the model, which the client is to make."""

    name: str
    parameters: dict[str, Any]
    call_id: str


class Usage(Struct, frozen=True):
    """Token counts of the provider; `estimated` if the provider sent none."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated: bool | UnsetType = UNSET


class Response(Struct, frozen=True, omit_defaults=True):
    """A piece of the answer; with `text_stream_seq` -1, the end of it.

    `voice_stream_seq` is absent without speech, never null: a client that sees it waits for -1.
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

    `delivered_text_chars` counts the Unicode code points that were handed to the kernel.
    `stream_closed_ms` is the time from reading the INTERRUPT until the provider's stream was
    closed; null if there was none, or it is still open. `stops_on_close` says whether the provider
    then stops generating; absent if no provider received the request.
    """

    request_id: str
    outcome: InterruptOutcome
    delivered_text_chars: int
    stream_closed_ms: float | None
    stops_on_close: Literal["yes", "no", "unknown"] | UnsetType = UNSET


class InterruptAck(Struct, frozen=True):
    """The answer to an INTERRUPT. It repeats `interrupt_request_id` exactly as it was sent."""

    msg_type: ClassVar = "INTERRUPT_ACK"
    interrupted_request_ids: list[str]
    status: AckStatus
    message: str
    results: list[InterruptResult]
    interrupt_request_id: str | UnsetType | None = UNSET


class HealthStatus(Struct, frozen=True, omit_defaults=True):
    """`conn_count` is the number of open connections; `cpu_usage` is in percent of one core."""

    status: str | UnsetType = UNSET
    conn_count: int | UnsetType = UNSET
    cpu_usage: float | UnsetType = UNSET


class HealthCheckAck(Struct, frozen=True):
    """The answer to a HEALTH_CHECK."""

    msg_type: ClassVar = "HEALTH_CHECK_ACK"
    health_status: HealthStatus


class SessionData(Struct, frozen=True, omit_defaults=True):
    """The session's data that was asked for. `create_time` is in milliseconds since the epoch."""

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
    """Asks the client for a HEARTBEAT_REPLY, which renews the session."""

    msg_type: ClassVar = "HEARTBEAT"
    remaining_seconds: int


class SessionWarn(Struct, frozen=True):
    """Warns that the session ends soon, unless the client renews it."""

    msg_type: ClassVar = "SESSION_WARN"
    remaining_seconds: int
    message: str
    warn_type: str = "EXPIRE_SOON"


class Error(Struct, frozen=True, omit_defaults=True):
    """Refuses a frame; with `request_id`, ends that request. Made by `encode.error()`."""

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
