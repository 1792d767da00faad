"""One TCP connection, from accept to close: websockets' Sans-I/O layer on a gevent socket.

Its greenlet reads, hands whole messages to the attachment, and is the only one that closes the
socket. Everything that goes out goes through the outbox.
"""

from __future__ import annotations

import http
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import gevent.socket
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import OPEN, State
from websockets.server import ServerProtocol

from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from gateway.server import handshake
from gateway.server.outbox import Outbox, OutboxSettings
from gateway.wire.frames import MAX_FRAME_BYTES, PATH
from metrics.instruments import Metrics
from metrics.logs import get_logger

_READ_BYTES = 16 * 1024
_HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 5.0
"""How long a client may take to answer a close frame."""

_NOTSENT_BYTES = 16 * 1024
"""What the kernel may hold unsent for a client: more would be stale, and out of our reach."""

FRAMES_BETWEEN_PAUSES = 32
"""After so many frames from one client all other connections are served. And when the log is as
many messages of this client behind, the client is not read until they are written: else a client
that sends faster than that fills the memory, and answers, which wait in the same lane, come to no
client."""

_log = get_logger("WS")  # for what comes before any frame
_deferred_log = DeferredLog(_log)


class Attachment(Protocol):
    """What a connection tells the client's attachment. None of it blocks."""

    def text(self, message: bytes, read_at: float) -> None:
        """A text message, read at this `time.monotonic()`."""

    def binary(self, message: bytes) -> None:
        """A binary message."""

    @property
    def is_registered(self) -> bool:
        """Whether its client was let in."""

    def connection_lost(self, reason: str) -> None:
        """Nothing can be read or written any more. May be told more than once."""


@dataclass(frozen=True)
class ConnectionSettings:
    """How connections are treated.

    Args:
        ping_interval: seconds of silence until a WebSocket ping is sent; 0 sends none.
        ping_timeout: seconds without any sign of life after it until the connection is dropped.
        outbox: bounds of what goes out.
    """

    ping_interval: float
    ping_timeout: float
    outbox: OutboxSettings


@dataclass(frozen=True)
class ConnectionServices:
    """What every connection needs of its server.

    Args:
        settings: how connections are treated.
        attach: makes the attachment of a connection, given its outbox and peer address.
        refusal: why a request is refused by its Host or Origin; None where it is not.
        health: the fields of `/health`.
        unready: why no new clients are welcome, for `/readyz`; None when they are.
        metrics: counts refusals and slow clients.
    """

    settings: ConnectionSettings
    attach: Callable[[Outbox, str], Attachment]
    refusal: Callable[[Request], str | None]
    health: Callable[[], dict[str, object]]
    unready: Callable[[], str | None]
    metrics: Metrics


class Connection:
    """One TCP connection.

    Args:
        sock: just accepted.
        peer: its address, for the log.
        services: what its server offers.
    """

    def __init__(self, sock: gevent.socket.socket, peer: str, services: ConnectionServices) -> None:
        self._sock = sock
        self._peer = peer
        self._services = services
        self._protocol = ServerProtocol(max_size=MAX_FRAME_BYTES)
        self._attachment: Attachment | None = None
        self._message: list[bytes] = []
        self._message_opcode = Opcode.TEXT
        self._heard_at = self.opened_at = time.monotonic()
        self._pinged_at: float | None = None
        self._closing_since: float | None = None
        self._is_paused = False
        self._messages = self._unlogged_batches = 0
        self._lanes = lanes()
        _tune(sock)
        sock.settimeout(0)  # every wait is explicit, so that writes never block
        # What clients say goes before what providers say: it may be an INTERRUPT.
        self._readable = self._lanes.readable_control(sock.fileno())
        self._outbox = Outbox(
            sock, self._protocol, services.settings.outbox, services.metrics, self._died
        )

    def run(self) -> None:
        """Serve the connection until it ends, in its own greenlet."""
        reason = "closed by the client"
        try:
            while (data := self._read()) and not self._is_over():
                self._protocol.receive_data(data)
                self._after_receiving()
            self._protocol.receive_eof()
            self._outbox.send_wire(self._protocol.data_to_send())
        except OSError as error:
            reason = f"connection lost: {error.strerror or error}"
        finally:
            self._outbox.die(reason)
            self._died(reason)  # once more, for an attachment that was made on a dead connection
            self._readable.close()
            self._sock.close()

    @property
    def has_client(self) -> bool:
        """True when its handshake was done."""
        return self._attachment is not None

    @property
    def is_registered(self) -> bool:
        """True when its client was let in."""
        return self._attachment is not None and self._attachment.is_registered

    @property
    def waiting_bytes(self) -> int:
        """What waits in its outbox."""
        return self._outbox.waiting_bytes

    def refuse(self, reason: str) -> None:
        """There is no room for it: close with a word where one can be said, and end it."""
        self._services.metrics.refused.labels("max_connections").inc()
        _deferred_log.warning("Refused connection", peer=self._peer, reason=reason)
        if self._protocol.state is OPEN:
            self._outbox.close(CloseCode.TRY_AGAIN_LATER, reason)
        self.drop(reason)

    def drop(self, reason: str) -> None:
        """End it at once."""
        self._outbox.die(reason)

    def check(self, now: float) -> None:
        """Called every few seconds: finds connections that are dead, or too slow to shake hands."""
        settings = self._services.settings
        if self._protocol.state is State.CONNECTING:
            if now - self.opened_at > _HANDSHAKE_SECONDS:
                self.drop("no handshake in time")
        elif self._protocol.state is not OPEN:
            self._closing_since = self._closing_since or now
            if now - self._closing_since > CLOSE_SECONDS:
                self.drop("close frame unanswered")
        elif self._is_paused:  # its silence is ours: we do not read it
            self._heard_at, self._pinged_at = now, None
        elif self._pinged_at is not None and self._heard_at >= self._pinged_at:
            self._pinged_at = None
        elif self._pinged_at is not None:
            if now - self._pinged_at > settings.ping_timeout:
                self.drop(f"no answer to a ping within {settings.ping_timeout:g} s")
        elif 0 < settings.ping_interval < now - self._heard_at:
            self._pinged_at = now
            self._outbox.ping()

    def _read(self) -> bytes:
        while True:
            self._readable.wait()
            try:
                data: bytes = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                continue
            self._heard_at = time.monotonic()
            return data

    def _is_over(self) -> bool:
        return self._protocol.state is State.CLOSED

    def _after_receiving(self) -> None:
        # Pongs and close frames first, lest they get into the bytes of a frame of the outbox's.
        if answers := self._protocol.data_to_send():
            self._outbox.send_wire(answers)
        frames = 0
        for event in self._protocol.events_received():
            if isinstance(event, Request):
                self._answer_http(event)
                self._outbox.send_wire(self._protocol.data_to_send())
            elif isinstance(event, Frame):
                self._take(event)
                frames += 1
                if frames % FRAMES_BETWEEN_PAUSES == 0:
                    self._pause_reading()
        if frames > 1 or self._is_log_behind or not self._outbox.has_room_for_control:
            self._pause_reading()  # after a single one, its session runs before the next is read
        if self._protocol.state is not OPEN:
            # No frame may follow a close frame. The end of TCP may be long in coming.
            self._died("closed by the client")

    def _pause_reading(self) -> None:
        # A client that never pauses must not starve the others, nor outrun its session.
        self._lanes.wait_for_control()
        self._is_paused = True
        if self._is_log_behind:
            self._lanes.wait_turn()
        self._outbox.wait_for_room_for_control()
        self._is_paused = False

    @property
    def _is_log_behind(self) -> bool:
        return self._unlogged_batches > 1

    def _count_message(self) -> None:
        self._messages += 1
        if self._messages % FRAMES_BETWEEN_PAUSES == 0:
            self._unlogged_batches += 1
            self._lanes.run_deferred(self._caught_up)

    def _caught_up(self) -> None:
        self._unlogged_batches -= 1

    def _take(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._message_opcode = frame.opcode
            self._message = [bytes(frame.data)]
        elif frame.opcode is Opcode.CONT:
            if frame.data:  # empty ones count for nothing in the limit on a message
                self._message.append(bytes(frame.data))
        else:
            return  # pings, pongs and closes are answered by the protocol itself
        if frame.fin and self._attachment is not None:
            message, self._message = b"".join(self._message), []
            self._deliver(self._attachment, message)
            self._count_message()

    def _deliver(self, attachment: Attachment, message: bytes) -> None:
        if self._message_opcode is Opcode.BINARY:
            attachment.binary(message)
        else:
            attachment.text(message, self._heard_at)

    def _answer_http(self, request: Request) -> None:
        protocol, services = self._protocol, self._services
        refusal = services.refusal(request)
        if refusal is not None:
            services.metrics.refused.labels("origin").inc()
            _log.warning("Refused connection", peer=self._peer, reason=refusal)
            protocol.send_response(handshake.respond(http.HTTPStatus.FORBIDDEN, refusal + "\n"))
        elif request.path.partition("?")[0] == PATH:
            protocol.send_response(protocol.accept(request))
            if protocol.state is OPEN:
                self._outbox.send_wire(protocol.data_to_send())
                self._attachment = services.attach(self._outbox, self._peer)
        else:
            protocol.send_response(handshake.answer(request, services.health, services.unready))

    def _died(self, reason: str) -> None:
        if self._attachment is not None:
            self._attachment.connection_lost(reason)


def _tune(sock: gevent.socket.socket) -> None:
    """Send each frame at once, and keep what the kernel holds small."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    notsent_lowat = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if notsent_lowat is not None:
        sock.setsockopt(socket.IPPROTO_TCP, notsent_lowat, _NOTSENT_BYTES)
