"""Encodes typed structs as the bytes of text frames. Pure: no clock, no I/O."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct

from actors.outlet import RequestEnd
from actors.words import ErrorCode, Outcome
from gateway.wire.frames import VERSION, Error, FunctionCall, Response, ServerPayload, Usage
from llm.chat.completions import ToolCall

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
"""For each code: its message, and whether trying again may help."""


class _ServerFrame(Struct, frozen=True):
    version: str
    msg_type: str
    session_id: str | None
    payload: ServerPayload
    timestamp: int


_encoder = msgspec.json.Encoder()


def error(code: ErrorCode, detail: str, **fields: Any) -> Error:
    """Make an ERROR payload with the message and the `retryable` of its code."""
    message, retryable = _ERRORS[code]
    return Error(code, message, detail, retryable, **fields)


def encode(payload: ServerPayload, session_id: str | None, timestamp_ms: int) -> bytes:
    """Encode one text frame for a client.

    Args:
        payload: the payload of the frame.
        session_id: the id of the session; None before there is one.
        timestamp_ms: milliseconds since the epoch.
    """
    return _encoder.encode(
        _ServerFrame(VERSION, payload.msg_type, session_id, payload, timestamp_ms)
    )


class AnswerEncoder:
    """Encodes the frames of one request's answer, in order.

    The result is that of `encode()` of a RESPONSE. But this runs for every token, so the part that
    stays the same is encoded only once. Frames with text and frames with function calls share one
    sequence, `text_stream_seq` 0, 1, 2, …

    Args:
        session_id: the id of the session.
        request_id: the id that the client gave the request.
    """

    def __init__(self, session_id: str, request_id: str) -> None:
        self._session_id = session_id
        self._next_seq = 0
        self._head = (
            b'{"version":"%b","msg_type":"RESPONSE","session_id":%b,"payload":{"request_id":%b,'
            b'"text_stream_seq":'
            % (VERSION.encode(), _encoder.encode(session_id), _encoder.encode(request_id))
        )

    def encode_text(self, text: str, timestamp_ms: int) -> bytes:
        """Encode the next frame, with a piece of text."""
        seq = self._next_seq
        self._next_seq = seq + 1
        return b'%b%d,"content":{"text":%b}},"timestamp":%d}' % (
            self._head,
            seq,
            _encoder.encode(text),
            timestamp_ms,
        )

    def encode_call(self, call: ToolCall, timestamp_ms: int) -> bytes:
        """Encode the next frame, with a function call."""
        seq = self._next_seq
        self._next_seq = seq + 1
        parameters = msgspec.json.decode(call.arguments, type=dict[str, Any])
        return b'%b%d,"content":{},"function_call":%b},"timestamp":%d}' % (
            self._head,
            seq,
            _encoder.encode(FunctionCall(call.name, parameters, call.id)),
            timestamp_ms,
        )

    def encode_end(self, end: RequestEnd, timestamp_ms: int) -> bytes:
        """Encode the last frame."""
        return encode(terminal(end), self._session_id, timestamp_ms)


def terminal(end: RequestEnd) -> ServerPayload:
    """Make the terminal frame of a request: RESPONSE with `text_stream_seq` -1, or ERROR."""
    tokens = end.usage
    usage = None
    if tokens is not None:
        usage = Usage(
            tokens.prompt_tokens,
            tokens.completion_tokens,
            tokens.total_tokens,
            tokens.estimated or UNSET,
        )
    if end.code is not None:
        return error(
            end.code,
            end.detail,
            request_id=end.request_id,
            outcome=end.outcome,
            finish_reason=end.finish_reason,
            usage=usage,
        )
    is_interrupted = end.outcome is Outcome.INTERRUPTED
    return Response(
        end.request_id,
        -1,
        # Absent without speech, never null: a client that sees the field waits for -1.
        voice_stream_seq=-1 if end.wants_speech else UNSET,
        interrupted=True if is_interrupted else UNSET,
        interrupt_reason=end.reason.value if end.reason is not None else UNSET,
        outcome=end.outcome,
        finish_reason=end.finish_reason,
        usage=usage,
    )
