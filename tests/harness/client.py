"""A small client of the wire protocol, blocking, on websockets' Sans-I/O layer.

It keeps every frame it got, in order, with the time it was read, so that tests can say what came
before what. It reads only when it is told to, so it also plays a client that does not read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from websockets.client import ClientProtocol
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from .protocol import PATH

_ids = itertools.count(1)


def wait_until(predicate: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
    """Wait for what no frame and no event tells, by looking every millisecond.

    Raises:
        AssertionError: the time is up.
    """
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, f"{timeout} s are over, waiting until {what}"
        time.sleep(0.001)


@dataclass(frozen=True)
class Received:
    """A frame from the gateway: its envelope's fields, and `time.monotonic()` when it was read."""

    msg_type: str
    session_id: str | None
    payload: dict[str, Any]
    at: float

    @property
    def is_terminal(self) -> bool:
        """True for the last frame of a request."""
        if self.msg_type == "ERROR":
            return "request_id" in self.payload
        return self.msg_type == "RESPONSE" and self.payload["text_stream_seq"] == -1

    @property
    def text(self) -> str:
        """The text it carries."""
        text: str = self.payload.get("content", {}).get("text", "")
        return text


class HandshakeRefused(Exception):
    """The gateway answered the handshake with another status than 101.

    Args:
        status: HTTP status code.
        body: what it said.
    """

    def __init__(self, status: int, body: str) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


class Client:
    """One connection.

    Args:
        port: of the gateway, on 127.0.0.1.
        register: whether to register at once.
        headers: more headers for the handshake, or others (`Host`, `Origin`).
        receive_buffer: SO_RCVBUF in bytes: a small one makes a client that does not read soon full.
        timeout: seconds that any wait may take: it only bounds failure.
    """

    def __init__(
        self,
        port: int,
        *,
        register: bool = True,
        headers: dict[str, str] | None = None,
        receive_buffer: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.frames: list[Received] = []
        """Everything received so far."""
        self.session_id: str | None = None
        self.timeout = timeout
        self.pings = self.pongs = 0
        """Frames of these kinds that were received."""
        self._taken = 0
        self._unsent = b""
        self.texts_begun = 0
        """Frames that `try_to_send_text` has sent, or begun to."""
        self._corked = False
        self._sock = socket.socket()
        self._sock.settimeout(timeout)
        if receive_buffer is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self._sock.connect(("127.0.0.1", port))
            self._protocol = ClientProtocol(
                parse_uri(f"ws://127.0.0.1:{port}{PATH}"), max_size=None
            )
            request = self._protocol.connect()
            for name, value in (headers or {}).items():
                if name in request.headers:
                    del request.headers[name]
                request.headers[name] = value
            self._protocol.send_request(request)
            self._flush()
            while self._protocol.state is State.CONNECTING and self.read_some():
                pass
            if self._protocol.state is not State.OPEN:
                raise self._refusal()
            if register:
                self.register()
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.drop()

    # Sending.

    def send(self, msg_type: str, payload: Any, **envelope: Any) -> None:
        """Send a frame; `envelope` replaces its fields."""
        frame = {
            "version": "1.0",
            "msg_type": msg_type,
            "session_id": self.session_id,
            "payload": payload,
            "timestamp": time.time_ns() // 1_000_000,
            **envelope,
        }
        self.send_text(json.dumps(frame).encode())

    def send_text(self, data: bytes) -> None:
        """Send a text frame with these bytes."""
        self._protocol.send_text(data)
        self._flush()

    def send_binary(self, data: bytes) -> None:
        """Send a binary frame."""
        self._protocol.send_binary(data)
        self._flush()

    def send_fragments(self, pieces: Sequence[bytes]) -> None:
        """Send one text message in several frames."""
        self._protocol.send_text(pieces[0], fin=len(pieces) == 1)
        for number, piece in enumerate(pieces[1:], 2):
            self._protocol.send_continuation(piece, fin=number == len(pieces))
        self._flush()

    @contextlib.contextmanager
    def one_packet(self) -> Iterator[None]:
        """What is sent inside goes out in one write at the end."""
        self._corked = True
        yield
        self._corked = False
        data = b"".join(self._protocol.data_to_send())
        self._sock.sendall(data)

    def send_ping(self) -> None:
        """Send a WebSocket ping; `pongs` counts the answers."""
        self._protocol.send_ping(b"")
        self._flush()

    def send_raw(self, data: bytes) -> None:
        """Send bytes past the WebSocket layer."""
        self._sock.sendall(data)

    def send_close(self) -> None:
        """Send a close frame; does not wait for the answer."""
        self._protocol.send_close(CloseCode.NORMAL_CLOSURE)
        self._flush()

    def register(self, **fields: Any) -> Received:
        """REGISTER; returns the REGISTER_ACK."""
        auth = {"type": "API_KEY", "api_key": "test"}
        self.send("REGISTER", {"auth": auth, "platform": "WEB", "require_tts": False, **fields})
        ack = self.wait_for(lambda frame: frame.msg_type == "REGISTER_ACK")
        self.session_id = ack.payload["session_id"]
        return ack

    def request(self, text: str, request_id: str | None = None) -> str:
        """REQUEST (TEXT); returns its id."""
        request_id = request_id or f"req_{next(_ids)}"
        self.send(
            "REQUEST",
            {"request_id": request_id, "data_type": "TEXT", "content": {"text": text}},
        )
        return request_id

    def interrupt(self, request_id: str | None, reason: str = "USER_STOP") -> None:
        """INTERRUPT of one request, or (None) of all; does not wait."""
        self.send("INTERRUPT", {"interrupt_request_id": request_id, "reason": reason})

    # Receiving.

    def next(self) -> Received:
        """The next frame that was not taken yet.

        Raises:
            AssertionError: the time is up, or the connection ended before.
        """
        while self._taken == len(self.frames):
            if not self.read_some():
                raise AssertionError(f"connection ended; got {self.frames[-10:]}")
        self._taken += 1
        return self.frames[self._taken - 1]

    def wait_for(self, wanted: Callable[[Received], bool]) -> Received:
        """Take frames until one is wanted, and return that one."""
        while not wanted(frame := self.next()):
            pass
        return frame

    def wait_ack(self) -> Received:
        """Take frames up to the next INTERRUPT_ACK."""
        return self.wait_for(lambda frame: frame.msg_type == "INTERRUPT_ACK")

    def wait_terminal(self, request_id: str) -> Received:
        """Take frames up to the terminal frame of a request."""
        return self.wait_for(
            lambda frame: frame.is_terminal and frame.payload["request_id"] == request_id
        )

    def wait_text(self, request_id: str) -> Received:
        """Take frames up to the next one with text of a request."""
        return self.wait_for(
            lambda frame: bool(frame.text) and frame.payload["request_id"] == request_id
        )

    def wait_closed(self) -> int | None:
        """Read to the end of the connection; returns the close code of the gateway."""
        while self.read_some():
            pass
        return self.close_code

    @property
    def close_code(self) -> int | None:
        """The close code of the gateway; None where it has sent none."""
        received = self._protocol.close_rcvd
        return None if received is None else int(received.code)

    def frames_of(self, request_id: str) -> list[Received]:
        """The RESPONSE and ERROR frames of a request, of those received so far."""
        return [
            frame
            for frame in self.frames
            if frame.msg_type in ("RESPONSE", "ERROR")
            and frame.payload.get("request_id") == request_id
        ]

    def text_of(self, request_id: str) -> str:
        """The answer to a request, of what was received so far."""
        return "".join(frame.text for frame in self.frames_of(request_id))

    # Ending.

    def close(self) -> None:
        """Close the connection in order, and wait for its end."""
        self.send_close()
        self.wait_closed()
        self._sock.close()

    def drop(self) -> None:
        """Close the socket without a word."""
        self._sock.close()

    def reset(self) -> None:
        """Close the socket with an RST, as when the client's machine gave up."""
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._sock.close()

    # What went wrong on the wire.

    @property
    def wire_error(self) -> Exception | None:
        """Why the bytes of the gateway could not be read as WebSocket frames; None when they could.

        An end of the connection without a close frame counts too.
        """
        return self._protocol.parser_exc

    def try_to_send_text(self, data: bytes) -> bool:
        """Send a text frame as far as the kernel takes it at once.

        Returns:
            False when the rest of the frame before is not gone yet; then this one was not begun.
        """
        if not self.finish_sending():
            return False
        self._protocol.send_text(data)
        self.texts_begun += 1
        self._unsent = b"".join(self._protocol.data_to_send())
        self.finish_sending()
        return True

    def finish_sending(self) -> bool:
        """Send what `try_to_send_text` has left; True when all of it is gone."""
        self._sock.settimeout(0)
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except BlockingIOError:
            return False
        finally:
            self._sock.settimeout(self.timeout)
        return True

    # Bytes.

    def _flush(self) -> None:
        if self._corked:
            return
        for data in self._protocol.data_to_send():
            if data:
                self._sock.sendall(data)
            else:
                self._sock.shutdown(socket.SHUT_WR)

    def read_some(self) -> bool:
        """Read once, and answer pings; False at the end of the connection."""
        try:
            return self.read_within(self.timeout)
        except TimeoutError:
            raise AssertionError(
                f"nothing came for {self.timeout} s; got {self.frames[-10:]}"
            ) from None

    def read_within(self, seconds: float) -> bool:
        """`read_some`, with a wait of its own.

        Raises:
            TimeoutError: nothing came.
        """
        self._sock.settimeout(seconds)
        try:
            data = self._sock.recv(65536)
        except ConnectionError:
            data = b""
        finally:
            self._sock.settimeout(self.timeout)
        at = time.monotonic()
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        self._flush_quietly()
        for event in self._protocol.events_received():
            if not isinstance(event, Frame):
                continue
            self.pings += event.opcode is Opcode.PING
            self.pongs += event.opcode is Opcode.PONG
            if event.opcode is Opcode.TEXT:
                frame = json.loads(bytes(event.data))
                self.frames.append(
                    Received(frame["msg_type"], frame["session_id"], frame["payload"], at)
                )
        return bool(data)

    def _flush_quietly(self) -> None:
        try:
            self._flush()
        except OSError:
            self._protocol.data_to_send()  # the gateway was faster to close

    def _refusal(self) -> Exception:
        error = self._protocol.handshake_exc
        response = getattr(error, "response", None)
        if isinstance(response, Response):
            return HandshakeRefused(response.status_code, (response.body or b"").decode())
        return error or AssertionError("no answer to the handshake")
