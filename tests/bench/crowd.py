"""Many clients in one process that never blocks: WebSockets on non-blocking sockets, and one poll.

`noise_load` and `idle_load` make their clients of it. A thread for each client would not hold its
own pace, and a client library would need most of the core. Frames have a mask of zeros, which
changes nothing in the payload. Received frames are whole (FIN), as those of the gateway are.
"""

import contextlib
import selectors
import signal
import socket
import struct
from collections.abc import Iterator

import msgspec

from gateway.client import PATH, encode_frame

CONT, TEXT, CLOSE, PING, PONG = 0, 1, 8, 9, 10

UPGRADE = (
    b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13\r\n\r\n" % PATH.encode()
)

READ_BYTES = 256 * 1024
POLL_SECONDS = 0.05

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends an RST, and leaves no TIME_WAIT


def frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """A frame from a client."""
    first = bytes([(0x80 if fin else 0) | opcode])
    length = len(payload)
    if length < 126:
        head = first + bytes([0x80 | length])
    elif length < 65536:
        head = first + b"\xfe" + struct.pack("!H", length)
    else:
        head = first + b"\xff" + struct.pack("!Q", length)
    return head + b"\0\0\0\0" + payload


def message(msg_type: str, payload: object, session_id: str | None = None) -> bytes:
    """A text frame with a frame of the protocol."""
    return frame(TEXT, encode_frame(msg_type, payload, session_id))


REGISTRATION = {"auth": {"type": "API_KEY", "api_key": "bench"}, "platform": "WEB"}


class Counts(msgspec.Struct):
    """What a crowd has done."""

    connections: int = 0
    registered: int = 0
    lost: int = 0
    """Connections that the server has ended, or refused."""
    sent_bytes: int = 0
    received_bytes: int = 0


class Peer:
    """One connection. Subclasses say what it does.

    Public attributes:
        crowd: to which it belongs.
        is_over: whether its socket is closed.
    """

    def __init__(self, crowd: "Crowd") -> None:
        self.crowd = crowd
        self.is_over = False
        self._is_connected = False
        self._unsent = memoryview(b"")
        self.sock = socket.socket()
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.connect_ex(("127.0.0.1", crowd.port))
        self._interest = selectors.EVENT_READ | selectors.EVENT_WRITE
        crowd.selector.register(self.sock, self._interest, self)
        crowd.counts.connections += 1

    # What subclasses say.

    def opened(self) -> None:
        """TCP is connected."""

    def received(self, data: bytes) -> None:
        """These bytes have come."""

    def more(self) -> bytes:
        """All was sent: what to send next; nothing to send is b""."""
        return b""

    def lost(self) -> None:
        """The server has ended the connection, or refused it."""

    # What they use.

    def send(self, data: bytes) -> None:
        """Send this behind what was not sent yet."""
        self._unsent = memoryview(bytes(self._unsent) + data if self._unsent else data)
        self._flush()

    def end(self) -> None:
        """Close the connection with an RST."""
        if not self.is_over:
            self.is_over = True
            self.crowd.selector.unregister(self.sock)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.sock.close()

    # What the crowd calls.

    def ready(self, events: int) -> None:
        """Its socket can be read or written."""
        try:
            if events & selectors.EVENT_WRITE:
                if not self._is_connected:
                    if self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        raise ConnectionError
                    self._is_connected = True
                    self.opened()
                else:
                    self._flush()
            if events & selectors.EVENT_READ and not self.is_over:
                data = self.sock.recv(READ_BYTES)
                if not data:
                    raise ConnectionError
                self.crowd.counts.received_bytes += len(data)
                self.received(data)
        except BlockingIOError:
            pass
        except OSError:
            self._fail()

    def _fail(self) -> None:
        if not self.is_over:
            self.end()
            self.crowd.counts.lost += 1
            self.lost()

    def _flush(self) -> None:
        if self.is_over or not self._is_connected:
            return
        # Once: then it is the others' turn.
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                sent = self.sock.send(self._unsent)
                self._unsent = self._unsent[sent:]
                self.crowd.counts.sent_bytes += sent
        if not self._unsent:
            self._unsent = memoryview(self.more())
        self._want_write(bool(self._unsent))

    def _want_write(self, wanted: bool) -> None:
        interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        if interest != self._interest:
            self._interest = interest
            self.crowd.selector.modify(self.sock, interest, self)


class WebSocketPeer(Peer):
    """A peer that does the handshake, and registers if it is told to.

    Public attributes:
        session_id: from REGISTER_ACK.
    """

    is_registering = True

    def __init__(self, crowd: "Crowd") -> None:
        super().__init__(crowd)
        self.session_id: str | None = None
        self._is_upgraded = False
        self._has_begun = False
        self._rest = b""

    def begin(self) -> None:
        """It is registered, or, if it does not register, the handshake is done."""

    def took(self, opcode: int, payload: bytes) -> None:
        """A frame has come, after `begin`."""

    def opened(self) -> None:
        self.send(UPGRADE)

    def received(self, data: bytes) -> None:
        self._rest = self._rest + data if self._rest else data
        if not self._is_upgraded:
            head, blank_line, rest = self._rest.partition(b"\r\n\r\n")
            if not blank_line:
                return
            if not head.startswith(b"HTTP/1.1 101 "):
                raise ConnectionError
            self._is_upgraded = True
            self._rest = rest
            if self.is_registering:
                self.send(message("REGISTER", REGISTRATION))
            else:
                self._begin()
        for opcode, payload in self._frames():
            if opcode == PING:
                self.send(frame(PONG, payload))
            elif opcode == CLOSE:
                raise ConnectionError
            elif self._has_begun:
                self.took(opcode, payload)
            elif b'"REGISTER_ACK"' in payload:
                self.session_id = msgspec.json.decode(payload)["session_id"]
                self.crowd.counts.registered += 1
                self._begin()

    def _begin(self) -> None:
        self._has_begun = True
        self.begin()

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        """The whole frames that have come, and keep the rest."""
        data, start = self._rest, 0
        try:
            while len(data) - start >= 2:
                head = start + 2
                length = data[start + 1]
                if length == 126:
                    head += 2
                    length = int.from_bytes(data[start + 2 : head], "big")
                elif length == 127:
                    head += 8
                    length = int.from_bytes(data[start + 2 : head], "big")
                end = head + length
                if end > len(data):
                    return
                first, start = data[start], end
                yield first & 15, data[head:end]
        finally:
            self._rest = data[start:]


class Crowd:
    """All connections of a process to one port.

    Args:
        port: on 127.0.0.1.

    Public attributes:
        is_stopping: set by SIGTERM.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.counts = Counts()
        self.is_stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def poll(self, seconds: float = POLL_SECONDS) -> None:
        """Wait so long at most, and serve each connection that is ready, once."""
        for key, events in self.selector.select(seconds):
            peer: Peer = key.data
            if not peer.is_over:
                peer.ready(events)

    def _stop(self, *_: object) -> None:
        self.is_stopping = True


def say(words: str) -> None:
    """Tell the parent process."""
    print(words, flush=True)
