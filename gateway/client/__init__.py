"""A client of protocol 1.0: the doctor's, the test harness's, and that of our own tests.

    frames        the payloads that a gateway sends, as typed structs
    errors        what can go wrong
    envelope      payloads to messages and back; pure
    connection    a WebSocket over a blocking socket
    answer        what comes back for one request
    session       register, ask, interrupt: a conversation over one connection

Each imports only from those above it. All run in other projects' processes too, so they import each
other relatively, and nothing else but the standard library, `websockets` and `msgspec`.
"""

from .answer import Answer, Collected
from .connection import Connection, Message, open_socket, receive_bytes
from .envelope import Frame, decode_frame, encode_frame, envelope
from .errors import (
    AnswerEnded,
    ConnectionEnded,
    FrameRefused,
    HandshakeFailed,
    HandshakeRefused,
    InvalidFrame,
    WaitTimeout,
)
from .frames import (
    PATH,
    SERVER_PAYLOADS,
    VERSION,
    AccountAuth,
    AckStatus,
    ApiKeyAuth,
    Error,
    ErrorCode,
    FunctionCall,
    FunctionDefinition,
    FunctionParameter,
    HealthCheckAck,
    HealthStatus,
    Heartbeat,
    InterruptAck,
    InterruptOutcome,
    InterruptReason,
    InterruptResult,
    Outcome,
    Platform,
    RegisterAck,
    Response,
    ResponseContent,
    ServerPayload,
    SessionData,
    SessionInfo,
    SessionWarn,
    Shutdown,
    Usage,
)
from .session import Interruption, Session

__all__ = [
    "PATH",
    "SERVER_PAYLOADS",
    "VERSION",
    "AccountAuth",
    "AckStatus",
    "Answer",
    "AnswerEnded",
    "ApiKeyAuth",
    "Collected",
    "Connection",
    "ConnectionEnded",
    "Error",
    "ErrorCode",
    "Frame",
    "FrameRefused",
    "FunctionCall",
    "FunctionDefinition",
    "FunctionParameter",
    "HandshakeFailed",
    "HandshakeRefused",
    "HealthCheckAck",
    "HealthStatus",
    "Heartbeat",
    "InterruptAck",
    "InterruptOutcome",
    "InterruptReason",
    "InterruptResult",
    "Interruption",
    "InvalidFrame",
    "Message",
    "Outcome",
    "Platform",
    "RegisterAck",
    "Response",
    "ResponseContent",
    "ServerPayload",
    "Session",
    "SessionData",
    "SessionInfo",
    "SessionWarn",
    "Shutdown",
    "Usage",
    "WaitTimeout",
    "decode_frame",
    "encode_frame",
    "envelope",
    "open_socket",
    "receive_bytes",
]
