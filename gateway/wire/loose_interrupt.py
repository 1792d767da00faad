"""Reads an INTERRUPT out of a frame that is not valid otherwise.

A stop that the server refuses is a stop that fails. So if a frame names its kind and its target,
nothing else that is wrong with it matters: wrong or missing fields, NaN, invalid UTF-8, nesting too
deep for a decoder, JSON that breaks off. Pure: no I/O, no clock.

Only three things can happen to such a frame:

- It is JSON. Then msgspec finds the fields, and builds nothing of what surrounds them.
- It is not JSON, or is nested too deeply. Then `_scan` goes through its tokens, up to a limit.
- It names another kind of frame, or none. Then it is no INTERRUPT, and the caller refuses it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from gateway.wire.frames import MAX_TEXT_BYTES, Interrupt

_MAX_TOKENS = 5_000
"""How far `_scan` goes, and not beyond `MAX_TEXT_BYTES`: to scan more would hold up others for
longer than 5 ms."""

_MAX_CHARS = 2**53
"""Larger counts are lowered to this: no answer is that long."""

_MISSING = Raw(b"")

_TOKEN = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"?'  # a string, which the end of the frame may cut off
    rb"|[\[{]+|[\]}]+|[:,]"
    rb'|[^\s"\[\]{}:,]+',  # a number, a word, or what should not be there
    re.DOTALL,
)
_NUMBER = re.compile(rb"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?\Z")
_ID = re.compile(r"[ -~]{0,64}\Z")


class TargetError(ValueError):
    """The frame is an INTERRUPT, but says unreadably which request to stop; the text is for the
    client."""


class _Envelope(Struct):
    msg_type: Raw = _MISSING
    payload: Raw = _MISSING


class _Payload(Struct):
    interrupt_request_id: Raw = _MISSING
    reason: Raw = _MISSING
    delivered_text_chars: Raw = _MISSING


_envelope_decoder = msgspec.json.Decoder(_Envelope)
_payload_decoder = msgspec.json.Decoder(_Payload)


def find_interrupt(data: bytes) -> Interrupt | None:
    """Read an INTERRUPT out of a frame that could not be decoded.

    `reason` is kept if it is a string, and ignored otherwise. `delivered_text_chars` is rounded
    down, and raised to 0 if it is negative; what is no number is ignored.

    Args:
        data: the payload of the frame, of any size.

    Returns:
        The INTERRUPT; None if the frame is of another kind.

    Raises:
        TargetError: it is an INTERRUPT, but its target is neither a request id, a number, nor
            absent.
    """
    if b"interrupt" not in data.lower() and b"\\u00" not in data:
        return None
    fields = _decoded(data)
    if fields is None or not _is_target(bytes(fields.interrupt_request_id)):
        fields = _scanned(data) or fields
    if fields is None:
        return None
    return Interrupt(
        _target(bytes(fields.interrupt_request_id)),
        _text(bytes(fields.reason)),
        _chars(bytes(fields.delivered_text_chars)),
    )


def _decoded(data: bytes) -> _Payload | None:
    """The fields of an INTERRUPT that is valid JSON; None if it is neither."""
    try:
        envelope = _envelope_decoder.decode(data)
        if not _is_interrupt(bytes(envelope.msg_type)):
            return None
        payload = bytes(envelope.payload).strip()
        if payload in (b"", b"null"):
            return _Payload()
        if not payload.startswith(b"{"):
            return _Payload(interrupt_request_id=Raw(b"{}"))  # no target that can be read
        return _payload_decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return None


def _scanned(data: bytes) -> _Payload | None:
    """The fields of an INTERRUPT that no decoder accepts; None if it is not one.

    Of a field that is there more than once, the last value counts that can be read.
    """
    found: dict[tuple[bytes, ...], bytes] = {}
    for path, value in _scan(data):
        if path not in found or _READABLE.get(path, bool)(value):
            found[path] = value
    if not _is_interrupt(found.get((b"msg_type",), b"")):
        return None
    payload = found.get((b"payload",))
    if payload not in (None, b"{}", b"null"):
        raise TargetError("`payload` must be an object")
    fields = _Payload(
        *(Raw(found.get((b"payload", name.encode()), b"")) for name in _Payload.__struct_fields__)
    )
    if payload is None and not bytes(fields.interrupt_request_id):
        # It may have been lost with the end of the frame.
        raise TargetError("the frame breaks off before `payload.interrupt_request_id`")
    return fields


def _scan(data: bytes) -> Iterator[tuple[tuple[bytes, ...], bytes]]:
    """Yield the path and the value of each field, down to the fields of a field: strings, numbers
    and words as they are written, and `{}` for an object or `[]` for a list when it ends."""
    path: list[bytes] = []
    key: bytes | None = None  # a string that was read, until a colon follows
    name = b""
    for number, match in enumerate(_TOKEN.finditer(data, 0, MAX_TEXT_BYTES)):
        if number >= _MAX_TOKENS:
            return
        token = match[0]
        first = token[:1]
        if first in b"[{":
            path.extend([name] + [b""] * (len(token) - 1))
            key, name = None, b""
        elif first in b"]}":
            for bracket in token:
                if path:
                    name = path.pop()
                    if 1 <= len(path) <= 2:
                        yield (*path[1:], name), b"{}" if bracket == ord("}") else b"[]"
            key, name = None, b""
        elif token == b":":
            name = (key or b"").strip(b'"')
            key = None
        elif token == b",":
            key, name = None, b""
        elif name:
            if 1 <= len(path) <= 2:
                yield (*path[1:], name), token
            key, name = None, b""
        else:
            key = token


def _is_target(raw: bytes) -> bool:
    try:
        _target(raw)
    except TargetError:
        return False
    return True


def _is_interrupt(raw: bytes) -> bool:
    return (_text(raw) or "").strip().upper() == "INTERRUPT"


def _target(raw: bytes) -> str | UnsetType | None:
    if raw in (b"", b"null"):
        return None if raw else UNSET
    if _NUMBER.match(raw):
        request_id = raw.decode()
    else:
        text = _text(raw)
        if text is None:
            raise TargetError("`interrupt_request_id` must be a string")
        request_id = text
    if not _ID.match(request_id):
        raise TargetError("`interrupt_request_id` must have at most 64 printable ASCII characters")
    return request_id


_READABLE: dict[tuple[bytes, ...], Callable[[bytes], bool]] = {
    (b"msg_type",): lambda raw: _text(raw) is not None,
    (b"payload", b"interrupt_request_id"): _is_target,
    (b"payload",): lambda raw: raw == b"{}",
}


def _text(raw: bytes) -> str | None:
    """The value of a JSON string, invalid UTF-8 replaced; None if it is not a string."""
    if not raw.startswith(b'"'):
        return None
    try:
        text = json.loads(raw.decode(errors="replace"), strict=False)
    except ValueError:
        return None
    return text if isinstance(text, str) else None


def _chars(raw: bytes) -> int | None:
    number = raw.strip(b'" ')
    if not _NUMBER.match(number):
        return None
    return math.floor(max(0.0, min(float(number), _MAX_CHARS)))
