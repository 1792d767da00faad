"""A client for tests of the wire itself: its frames are dictionaries, as they were sent.

It keeps every frame it got, in order, with the time it was read, so that tests can say what came
before what. It reads only when it is told to, so it also plays a client that does not read.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bargein.gateway.client import PATH, Connection, HandshakeRefused, envelope

__all__ = ["Client", "HandshakeRefused", "Received", "wait_until"]

_ids = itertools.count(1)


def wait_until(predicate: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
    """Wait for something that neither a frame nor an event announces: check it every millisecond.

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


class Client(Connection):
    """One connection.

    Args:
        port: of the gateway, on 127.0.0.1.
        register: whether to register at once.
        headers: more headers for the handshake, or other values (`Host`, `Origin`).
        receive_buffer: SO_RCVBUF in bytes: a small one makes a client that does not read soon full.
        timeout: seconds that any wait may take, however many frames come: it only bounds failure.
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
        self.texts_begun = 0
        """Frames that `try_to_send_text` has sent, or begun to."""
        self._next = 0
        """Of the frames, the first that was not taken yet."""
        self._unsent = b""
        sock = socket.socket()
        try:
            sock.settimeout(timeout)
            if receive_buffer is not None:  # the kernel heeds it only before it connects
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.connect(("127.0.0.1", port))
        except BaseException:
            sock.close()
            raise
        super().__init__(f"ws://127.0.0.1:{port}{PATH}", sock, headers=headers, timeout=timeout)
        if register:
            try:
                self.register()
            except BaseException:
                self.drop()
                raise

    # Sending.

    def send(self, msg_type: str, payload: Any, **fields: Any) -> None:
        """Send a frame; `fields` replace those of its envelope."""
        # Not by msgspec, which has no NaN and no integers of over 64 bits.
        frame = envelope(msg_type, payload, self.session_id) | fields
        self.send_text(json.dumps(frame).encode())

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

    # Receiving.

    def next(self) -> Received:
        """The next frame that was not taken yet.

        Raises:
            AssertionError: the time is up, or the connection ended before.
        """
        return self._next_until(time.monotonic() + self.timeout)

    def wait_for(self, wanted: Callable[[Received], bool]) -> Received:
        """Take frames until one is wanted, and return that one.

        Raises:
            AssertionError: the time for all of them is up, or the connection ended before. So do
                all methods that wait.
        """
        until = time.monotonic() + self.timeout
        while not wanted(frame := self._next_until(until)):
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
        until = time.monotonic() + self.timeout
        while self._read_until(until):
            pass
        return self.close_code

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

    def read_some(self) -> bool:
        """Read once, and answer pings; False at the end of the connection.

        Raises:
            AssertionError: nothing came.
        """
        return self._read_until(time.monotonic() + self.timeout)

    def read_within(self, seconds: float) -> bool:
        """`read_some`, with a timeout of its own.

        Raises:
            TimeoutError: nothing came.
        """
        for message in self.receive(seconds):
            if message.is_text:
                frame = json.loads(message.data)
                self.frames.append(
                    Received(frame["msg_type"], frame["session_id"], frame["payload"], message.at)
                )
        return not self.has_ended

    # Ending.

    def close(self) -> None:
        """Close the connection in order, and wait for its end."""
        try:
            self.send_close()
            self.wait_closed()
        finally:
            self.drop()

    # Inside.

    def _next_until(self, until: float) -> Received:
        while self._next == len(self.frames):
            if not self._read_until(until):
                raise AssertionError(f"connection ended; got {self.frames[-10:]}")
        self._next += 1
        return self.frames[self._next - 1]

    def _read_until(self, until: float) -> bool:
        try:
            return self.read_within(until - time.monotonic())
        except TimeoutError:
            raise AssertionError(
                f"{self.timeout} s are over; got {len(self.frames)} frames, "
                f"the last of them {self.frames[-10:]}"
            ) from None
