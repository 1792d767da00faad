"""The envelope of protocol 1.0: payloads to messages and back. Pure: no socket, no state."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from .errors import InvalidFrame
from .frames import SERVER_PAYLOADS, VERSION, Error, Response, ServerPayload


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame from the gateway."""

    payload: ServerPayload
    session_id: str | None
    at: float
    """`time.monotonic()` when it was read."""
    order: int = 0
    """Its place among the frames of the connection, from 0, without those of unknown kinds."""

    @property
    def msg_type(self) -> str:
        """Its name on the wire."""
        msg_type: str = self.payload.msg_type
        return msg_type

    @property
    def text(self) -> str:
        """The text in it; empty where it carries none."""
        return (self.payload.content.text or "") if isinstance(self.payload, Response) else ""

    @property
    def is_terminal(self) -> bool:
        """Whether it is the last frame of a request."""
        match self.payload:
            case Response(text_stream_seq=seq):
                return seq == -1
            case Error(request_id=request_id):
                return request_id is not msgspec.UNSET
            case _:
                return False


class _Envelope(msgspec.Struct):
    msg_type: str
    payload: msgspec.Raw
    session_id: str | None = None


_encode = msgspec.json.Encoder().encode
_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    payload.msg_type: msgspec.json.Decoder(payload) for payload in SERVER_PAYLOADS
}


def envelope(msg_type: str, payload: Any, session_id: str | None) -> dict[str, Any]:
    """A frame to the gateway, before it is encoded.

    Args:
        msg_type: of the frame.
        payload: a dictionary, or any other value that msgspec can write.
        session_id: of the session; None before REGISTER_ACK.
    """
    return {
        "version": VERSION,
        "msg_type": msg_type,
        "session_id": session_id,
        "payload": payload,
        "timestamp": time.time_ns() // 1_000_000,
    }


def encode_frame(msg_type: str, payload: Any, session_id: str | None) -> bytes:
    """One text message to the gateway. The arguments are those of `envelope`."""
    frame = envelope(msg_type, payload, session_id)
    try:
        return _encode(frame)
    except UnicodeEncodeError:
        # Half a surrogate pair: a browser sends one when it cuts a text inside an emoji. The
        # standard library escapes it, msgspec does not.
        return json.dumps(msgspec.to_builtins(frame)).encode()


def decode_frame(data: bytes, at: float, order: int) -> Frame | None:
    """One text message from the gateway.

    Args:
        data: the message.
        at: `time.monotonic()` when it was read.
        order: of the frame: see `Frame`.

    Returns:
        None for a `msg_type` that this version does not know: clients ignore it.

    Raises:
        InvalidFrame: it is not a frame of the protocol.
    """
    try:
        envelope = _decode_envelope(data)
        decoder = _decoders.get(envelope.msg_type)
        payload = decoder.decode(envelope.payload) if decoder else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidFrame(str(error), data) from None
    return payload and Frame(payload, envelope.session_id, at, order)
