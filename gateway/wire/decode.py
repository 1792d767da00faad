"""Decodes the bytes of a client into typed structs, once: the rest of the gateway handles structs
only. Unknown fields are ignored. Pure: no I/O, no clock."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from actors.session.profile import (
    MAX_FUNCTIONS,
    FunctionDefinition,
    FunctionOp,
    FunctionParameter,
    SessionUpdate,
)
from actors.words import ErrorCode
from gateway.wire.frames import (
    CLIENT_PAYLOADS,
    MAX_NESTING,
    MAX_TEXT_BYTES,
    MAX_VOICE_TEXT_BYTES,
    VERSION,
    ClientFrame,
    ClientPayload,
    FunctionResult,
    Register,
    Request,
    RequestId,
)
from gateway.wire.loose_interrupt import TargetError, find_interrupt

_MAX_DETAIL_CHARS = 200
"""The longest error text that quotes what the client sent."""

_MAX_BAD_FRAME_BYTES = 64 * 1024
"""A larger frame that is not valid JSON is refused without the id of its request: to read it takes
2 ms and more, in which everybody waits."""

_FUNCTION_PATH = re.compile(
    r"`\$\.((?P<outer>update_session)\.)?function_calling\[(?P<index>\d+)\]"
)
"""Finds the function definition that an error message of msgspec points to."""


class FrameError(Exception):
    """A frame was refused.

    Args:
        code: the error code for the client.
        detail: what exactly is wrong, for the client.
        request_id: the id of the request that the frame would have begun; None if it would begin
            none, or the id is not valid.
        is_voice: whether that is a VOICE request, of which more frames may follow.
    """

    def __init__(
        self,
        code: ErrorCode,
        detail: str,
        request_id: str | None = None,
        *,
        is_voice: bool = False,
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.is_voice = is_voice


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
    """The fields that are needed of a refused frame that would have begun a request: its client
    waits for an answer under that id."""

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
    """Decode one text frame of a client.

    An INTERRUPT is accepted whatever is wrong with it, if its target can be read.

    Args:
        data: the frame's payload, at most `MAX_FRAME_BYTES`.

    Raises:
        FrameError: `PAYLOAD_TOO_LARGE` or `MALFORMED_PAYLOAD`, with the fault in `detail`.
    """
    try:
        return _decode_strictly(data)
    except FrameError:
        try:
            interrupt = find_interrupt(data)
        except TargetError as error:
            raise FrameError(ErrorCode.MALFORMED_PAYLOAD, f"payload: {error}") from None
        if interrupt is None:
            raise
    return ClientFrame(None, interrupt)


def _decode_strictly(data: bytes) -> ClientFrame:
    if len(data) > MAX_VOICE_TEXT_BYTES:
        raise FrameError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"a text frame of {len(data)} bytes; the limit is {MAX_VOICE_TEXT_BYTES}",
        )
    try:
        data.decode()  # msgspec validates only the fields that it uses
        envelope = _envelope_decoder.decode(data)
    except UnicodeDecodeError:
        raise FrameError(ErrorCode.MALFORMED_PAYLOAD, "frame: not valid UTF-8") from None
    except msgspec.ValidationError as error:
        raise _malformed(error, "frame") from None
    except (msgspec.DecodeError, RecursionError) as error:  # the latter: nested too deeply
        raise _malformed(error, "frame", _begun_by_bad_frame(data)) from None
    if envelope.version != VERSION:
        raise FrameError(
            ErrorCode.MALFORMED_PAYLOAD,
            f"unsupported version {envelope.version[:16]!r}; this server supports {VERSION!r}",
        )
    decoder = _payload_decoders.get(envelope.msg_type)
    if decoder is None:
        raise FrameError(
            ErrorCode.MALFORMED_PAYLOAD, f"unknown msg_type {envelope.msg_type[:64]!r}"
        )
    if len(data) > MAX_TEXT_BYTES and not _can_decode(_voice_decoder, envelope.payload):
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
    """The first fault that the types do not express; None if there is none."""
    match payload:
        case Register():
            return _function_fault(payload.function_calling or [])
        case Request():
            if payload.data_type == "TEXT" and payload.content.text is None:
                return "a TEXT request must have `payload.content.text`"
            if payload.data_type == "VOICE" and payload.content.voice_mode is None:
                return "a VOICE request must have `payload.content.voice_mode`"
            faults = (_update_fault(update) for update in payload.updates)
            return next((fault for fault in faults if fault), None)
        case FunctionResult():
            is_deep = _is_too_deep(payload.result)
            return f"`result` is nested deeper than {MAX_NESTING} levels" if is_deep else None
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
        return update.function_calling_op and "`function_calling_op` needs `function_calling`"
    definitions = [one for one in functions if isinstance(one, FunctionDefinition)]
    if update.function_calling_op is not FunctionOp.DELETE and len(definitions) < len(functions):
        return "`function_calling`: only DELETE accepts a name without a definition"
    return _function_fault(definitions)


def _function_fault(functions: Sequence[FunctionDefinition]) -> str | None:
    if len(functions) > MAX_FUNCTIONS:
        return f"`function_calling`: {len(functions)} functions; the limit is {MAX_FUNCTIONS}"
    seen: set[str] = set()
    for function in functions:
        if function.name in seen:
            return f"function {function.name!r}: duplicate `name`"
        seen.add(function.name)
        if fault := _parameters_fault(function.parameters):
            return f"function {function.name!r}: {fault}"
    return None


def _parameters_fault(parameters: dict[str, Any] | list[FunctionParameter] | None) -> str | None:
    if isinstance(parameters, list):
        counts = Counter(parameter.name for parameter in parameters)
        twice = next((name for name, count in counts.items() if count > 1), None)
        return twice and f"`parameters`: duplicate name {twice!r}"
    schema = parameters or {}
    if _is_too_deep(schema):
        return f"`parameters` is nested deeper than {MAX_NESTING} levels"
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
    """Name the function that an error message of msgspec is about; None if it is about no function,
    or the function has no name."""
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
    text = str(error)  # may quote what the client sent, in any length
    if len(text) > _MAX_DETAIL_CHARS:
        half = _MAX_DETAIL_CHARS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return _refusal(ErrorCode.MALFORMED_PAYLOAD, f"{where}: {text}", begun)


def _refusal(code: ErrorCode, detail: str, begun: _Begun | None) -> FrameError:
    if begun is None:
        return FrameError(code, detail)
    return FrameError(code, detail, begun.request_id, is_voice=begun.data_type == "VOICE")


def _can_decode(decoder: msgspec.json.Decoder[Any], raw: msgspec.Raw) -> bool:
    try:
        decoder.decode(raw)
    except msgspec.DecodeError:
        return False
    return True


def _begun_by_bad_frame(data: bytes) -> _Begun | None:
    # The standard library accepts half a surrogate pair, which msgspec does not. A browser sends
    # one when a text was cut inside an emoji.
    if len(data) > _MAX_BAD_FRAME_BYTES:
        return None
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
