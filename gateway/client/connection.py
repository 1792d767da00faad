"""A WebSocket over a blocking socket, on websockets' Sans-I/O layer.

It reads only when it is told to, so it can also play a client that does not read. One thread uses
it at a time. It works in a plain process and in one that gevent has patched.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.uri import parse_uri

from .errors import ConnectionEnded, HandshakeFailed, HandshakeRefused

READ_BYTES = 64 * 1024
"""Read at once."""

REFUSAL_BODY_SECONDS = 2.0
"""How long to wait for the rest of an HTTP answer whose head has come. A body without a length ends
with the connection, and some servers keep that open."""

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})\b")


def open_socket(
    host: str, port: int, *, tls: ssl.SSLContext | None = None, timeout: float = 10.0
) -> socket.socket:
    """Connect to a server.

    Args:
        host: name or address.
        port: its port.
        tls: for an encrypted connection; None is a plain one.
        timeout: seconds for connecting to each address that the name has, and for the TLS
            handshake. Resolving the name is outside of this limit.

    Raises:
        OSError: there is no connection (`TimeoutError`, `socket.gaierror` and `ssl.SSLError` are
            its children).
        UnicodeError: the name cannot be a host's.
    """
    sock = socket.create_connection((host, port), timeout)
    try:
        if tls is not None:
            sock = tls.wrap_socket(sock, server_hostname=host)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def receive_bytes(sock: socket.socket, timeout: float) -> bytes:
    """Read what comes next; b"" at the end of the connection, however it ended.

    Args:
        sock: a blocking socket; its own timeout is changed.
        timeout: seconds.

    Raises:
        TimeoutError: nothing came in that time, or it was not above 0.
    """
    if timeout <= 0:  # checked first, so that a server that never pauses meets it too
        raise TimeoutError
    try:
        sock.settimeout(timeout)
        return sock.recv(READ_BYTES)
    except TimeoutError:
        raise
    except OSError:
        return b""


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message from the server."""

    data: bytes
    is_text: bool
    at: float
    """`time.monotonic()` when its last byte was read."""


class Connection:
    """An open WebSocket.

    Args:
        url: `ws://` or `wss://`, with the path.
        sock: a connection to that server; it belongs to this object from here on, and is closed
            if this raises.
        headers: more headers for the handshake, or other values (`Host`, `Origin`).
        max_message_bytes: a longer message ends the connection; None is no limit.
        timeout: seconds that the handshake, a read, or a write may take.

    Raises:
        HandshakeRefused: the server answered with another status than 101.
        HandshakeFailed: it gave no valid answer, or none in time.
        websockets.exceptions.InvalidURI: the URL is not valid.

    Public attributes:
        messages_sent: how many messages were sent; each `send_raw` counts as one.
        pings, pongs: frames of these kinds that were received.
        timeout: as above; it can be changed.
    """

    def __init__(
        self,
        url: str,
        sock: socket.socket,
        *,
        headers: Mapping[str, str] | None = None,
        max_message_bytes: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.timeout = timeout
        self.messages_sent = 0
        self.pings = self.pongs = 0
        self._sock = sock
        self._messages: list[Message] = []
        self._fragments: list[bytes] = []
        self._is_text = True
        """Of the message whose fragments these are."""
        self._is_corked = False
        self._has_ended = False
        self._write_failed = False
        """A frame may have been sent in part, so nothing can follow it."""
        try:
            self._protocol = ClientProtocol(parse_uri(url), max_size=max_message_bytes)
            self._shake_hands(headers or {})
        except BaseException:
            sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.drop()

    # Sending.

    def send_text(self, data: bytes, *, timeout: float | None = None) -> None:
        """Send a text message.

        Args:
            data: the message.
            timeout: seconds; None is the connection's own.

        Raises:
            ConnectionEnded: the connection has ended or is closing, or a write has failed. So do
                all methods that send.
            OSError: the write failed, or took too long.
        """
        self._send(lambda: self._protocol.send_text(data), timeout)
        self.messages_sent += 1

    def send_binary(self, data: bytes) -> None:
        """Send a binary message."""
        self._send(lambda: self._protocol.send_binary(data))
        self.messages_sent += 1

    def send_fragments(self, pieces: Sequence[bytes]) -> None:
        """Send one text message in several frames."""

        def send() -> None:
            self._protocol.send_text(pieces[0], fin=len(pieces) == 1)
            for number, piece in enumerate(pieces[1:], 2):
                self._protocol.send_continuation(piece, fin=number == len(pieces))

        self._send(send)
        self.messages_sent += 1

    def send_ping(self) -> None:
        """Send a ping; `pongs` counts the answers."""
        self._send(lambda: self._protocol.send_ping(b""))

    def send_close(self, *, timeout: float | None = None) -> None:
        """Send a close frame with 1000; does not wait for the answer.

        Args:
            timeout: seconds for the write; None is the connection's own.
        """
        self._send(lambda: self._protocol.send_close(CloseCode.NORMAL_CLOSURE), timeout)

    def send_raw(self, data: bytes) -> None:
        """Send bytes past the WebSocket layer."""
        self._check_writable()
        self._write([data])
        self.messages_sent += 1

    @contextlib.contextmanager
    def one_packet(self) -> Iterator[None]:
        """What is sent inside goes out in one write at the end."""
        self._is_corked = True
        try:
            yield
        finally:
            self._is_corked = False
        self._check_writable()
        self._write([b"".join(self._protocol.data_to_send())])

    # Receiving.

    def receive(self, timeout: float | None = None) -> list[Message]:
        """Read once, answer pings, and return the messages that are whole now; there may be none.

        Args:
            timeout: seconds for all of this; None is the connection's own.

        Raises:
            TimeoutError: nothing came in that time.
        """
        if not self._messages and not self._has_ended:
            timeout = self.timeout if timeout is None else timeout
            until = time.monotonic() + timeout
            self._feed(receive_bytes(self._sock, timeout), until)
        messages, self._messages = self._messages, []
        return messages

    @property
    def is_open(self) -> bool:
        """Whether messages can still be exchanged: no close frame was sent or read, no end."""
        return self._protocol.state is State.OPEN and not self._has_ended

    @property
    def has_unread(self) -> bool:
        """Whether `receive` returns messages without a read: they came with the handshake."""
        return bool(self._messages)

    @property
    def has_ended(self) -> bool:
        """Whether the end of the connection was read, or the socket is closed on this side."""
        return self._has_ended

    @property
    def close_code(self) -> int | None:
        """The server's close code; None where it has sent none."""
        received = self._protocol.close_rcvd
        return None if received is None else int(received.code)

    @property
    def close_reason(self) -> str:
        """The server's words with its close code."""
        received = self._protocol.close_rcvd
        return "" if received is None else received.reason

    @property
    def wire_error(self) -> Exception | None:
        """Why the server's bytes could not be read as WebSocket frames; None when they could.

        `EOFError` is an end of the connection without a close frame.
        """
        return self._protocol.parser_exc

    # Ending.

    def drop(self) -> None:
        """Close the socket at once, without a close frame."""
        self._has_ended = True
        self._sock.close()

    def reset(self) -> None:
        """Close the socket with an RST, as when the client's machine gave up."""
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        finally:
            self.drop()

    # Inside.

    def _shake_hands(self, headers: Mapping[str, str]) -> None:
        until = time.monotonic() + self.timeout
        protocol, received = self._protocol, bytearray()
        request = protocol.connect()
        for name, value in headers.items():
            if name in request.headers:
                del request.headers[name]
            request.headers[name] = value
        protocol.send_request(request)
        with contextlib.suppress(OSError):  # the answer says more, if there is one
            self._flush()
        while protocol.state is State.CONNECTING and protocol.handshake_exc is None:
            try:
                data = receive_bytes(self._sock, until - time.monotonic())
            except TimeoutError:
                raise self._handshake_error(bytes(received), timed_out=True) from None
            received += data
            self._feed(data, until)
            # A server of another protocol may wait for us now.
            if not data or not received.startswith(b"HTTP/"[: len(received)]):
                break
            if b"\r\n\r\n" in received:
                until = min(until, time.monotonic() + REFUSAL_BODY_SECONDS)
        if protocol.state is State.CONNECTING or protocol.handshake_exc is not None:
            raise self._handshake_error(bytes(received))

    def _handshake_error(self, received: bytes, *, timed_out: bool = False) -> HandshakeFailed:
        error, status = self._protocol.handshake_exc, _STATUS.match(received)
        _, gap, body = received.partition(b"\r\n\r\n")
        if status is not None and gap and status[1] != b"101":
            response: Any = getattr(error, "response", None)
            if isinstance(response, Response):
                body = bytes(response.body or b"")  # without its chunks' heads
            return HandshakeRefused(int(status[1]), body.decode(errors="replace"), received)
        why = "no answer to the handshake in time" if timed_out else str(error or "no HTTP answer")
        return HandshakeFailed(why, received, timed_out=timed_out)

    def _send(self, send: Callable[[], None], timeout: float | None = None) -> None:
        self._check_writable()
        try:
            send()
        except InvalidState as error:
            raise ConnectionEnded(f"nothing can be sent: {error}", self.close_code) from None
        self._flush(timeout)

    def _flush(self, timeout: float | None = None) -> None:
        if not self._is_corked:
            self._write(self._protocol.data_to_send(), timeout)

    def _write(self, pieces: Sequence[bytes], timeout: float | None = None) -> None:
        if self._write_failed:
            return
        until = time.monotonic() + (self.timeout if timeout is None else timeout)
        try:
            for data in pieces:
                if data:
                    self._sock.settimeout(max(until - time.monotonic(), 0.0))
                    self._sock.sendall(data)
                elif not isinstance(self._sock, ssl.SSLSocket):  # TLS has no half-closed connection
                    self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._write_failed = True
            raise

    def _check_writable(self) -> None:
        if self._has_ended or self._write_failed:
            why = "the connection has ended" if self._has_ended else "a write has failed"
            raise ConnectionEnded(f"nothing can be sent: {why}", self.close_code)

    def _feed(self, data: bytes, until: float) -> None:
        at = time.monotonic()
        if data:
            self._protocol.receive_data(data)
        else:
            self._has_ended = True
            self._protocol.receive_eof()
        try:
            self._flush(until - time.monotonic())
        except OSError:
            # The server was faster to close, or does not read: drop the answer.
            self._protocol.data_to_send()
        for event in self._protocol.events_received():
            if isinstance(event, Frame):
                self._take(event, at)

    def _take(self, frame: Frame, at: float) -> None:
        match frame.opcode:
            case Opcode.PING:
                self.pings += 1
            case Opcode.PONG:
                self.pongs += 1
            case Opcode.TEXT | Opcode.BINARY | Opcode.CONT:
                if frame.opcode is not Opcode.CONT:
                    self._is_text = frame.opcode is Opcode.TEXT
                self._fragments.append(bytes(frame.data))
                if frame.fin:
                    self._messages.append(Message(b"".join(self._fragments), self._is_text, at))
                    self._fragments = []
