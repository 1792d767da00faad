"""One TCP connection, from accept to close: websockets' Sans-I/O layer on a gevent socket.

The connection's greenlet reads, passes complete messages to the attachment, and closes the socket;
no other greenlet does. Everything that is sent goes through the outbox.
"""

from __future__ import annotations

import http
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import gevent
import gevent.socket
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import OPEN, State
from websockets.server import ServerProtocol

from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from gateway.server import handshake
from gateway.server.frame_slices import FrameSlices, HeadSplitter
from gateway.server.outbox import Outbox, OutboxSettings
from gateway.server.pace import Pace
from gateway.wire.frames import MAX_FRAME_BYTES, MAX_TEXT_BYTES, PATH
from metrics.instruments import Metrics
from metrics.logs import get_logger

_READ_BYTES = 16 * 1024
_HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 5.0
"""How long a client may take to answer a close frame."""

_NOTSENT_BYTES = 16 * 1024
"""How much unsent data the kernel may hold for a client. An interrupt cannot drop what the kernel
holds, so this is small."""

MESSAGES_IN_A_BATCH = 32
"""A client is read again only when the lines about its last two batches of messages are logged.
Otherwise one that sends faster than its lines are written would fill the memory."""

FRAMES_PER_SECOND = 1000
"""How many frames a second of a registered client are read, control frames and empty ones too. A
client that streams voice sends 50."""

UNREGISTERED_FRAMES_PER_SECOND = 2000
"""The same for all clients together that have not registered. Each needs one or two."""

FREE_FRAMES = 4
"""How many frames of a new connection do not count: a client that registers must not wait because
others do not."""

MAX_FRAGMENTS = 1024
"""In how many frames a message may come: each takes time, however small it is."""

REGISTER_SECONDS = 30.0
"""How long a client may neither register nor ask for the gateway's health."""

MESSAGE_SECONDS = 30.0
"""How long a client may take to send one message. The largest, of 1 MiB, passes at 35 kB/s."""

_PING_JITTER = 0.2
"""Up to this part of it, the ping interval is shorter, at random: clients that came together are
not pinged together."""

_log = get_logger("WS")  # for the handshake, before any frame
_deferred_log = DeferredLog(_log)


class Attachment(Protocol):
    """What a connection tells the attachment of its client. No method blocks."""

    def text(self, message: bytes, read_at: float) -> None:
        """A text message, read at this `time.monotonic()`."""

    def binary(self, message: bytes) -> None:
        """A binary message."""

    @property
    def is_registered(self) -> bool:
        """Whether the client has a session."""

    @property
    def idle_since(self) -> float | None:
        """`time.monotonic()` since when a client that has not registered has asked for nothing;
        None while its registration is checked, and once it is registered."""

    def connection_lost(self, reason: str) -> None:
        """The connection is closed or broken. May be called more than once."""


@dataclass(frozen=True)
class ConnectionSettings:
    """Settings of all connections.

    Args:
        ping_interval: seconds of silence until a WebSocket ping is sent; 0: no pings.
        ping_timeout: seconds after a ping without any data until the connection is dropped.
        outbox: bounds of the outbox.
    """

    ping_interval: float
    ping_timeout: float
    outbox: OutboxSettings


@dataclass(frozen=True)
class ConnectionServices:
    """What the server provides to every connection.

    Args:
        settings: settings of all connections.
        attach: makes the attachment of a connection, given its outbox and peer address.
        refusal: returns why a request is refused because of its Host or Origin; None if it is not.
        health: returns the fields of `/health`.
        unready: returns why new clients should go elsewhere, for `/readyz`; None if they are
            welcome.
        metrics: counts refusals and slow clients.
        pace: bounds the frames of all clients that have not registered.
    """

    settings: ConnectionSettings
    attach: Callable[[Outbox, str], Attachment]
    refusal: Callable[[Request], str | None]
    health: Callable[[], dict[str, object]]
    unready: Callable[[], str | None]
    metrics: Metrics
    pace: Pace


class Connection:
    """One TCP connection.

    Args:
        sock: the accepted socket.
        peer: the client's address, for the log.
        services: what the server provides.
    """

    def __init__(self, sock: gevent.socket.socket, peer: str, services: ConnectionServices) -> None:
        self._sock = sock
        self._peer = peer
        self._services = services
        self._protocol = ServerProtocol(max_size=MAX_TEXT_BYTES)  # until it has registered
        self._attachment: Attachment | None = None
        self._head = HeadSplitter()
        self._slices = FrameSlices()
        self._message = bytearray()
        self._message_opcode = Opcode.TEXT
        self._fragments = 0
        """How many frames of an unfinished message have come."""
        self._message_since: float | None = None
        """`time.monotonic()` when an unfinished message began; None if there is none."""
        self._heard_at = self.opened_at = time.monotonic()
        self._pinged_at: float | None = None
        self._closing_since: float | None = None
        """When `check` has asked for the end of the connection, or has found that it is closing."""
        self._is_paused = False
        self._messages = self._unlogged_batches = self._frames = 0
        self._pace = Pace(FRAMES_PER_SECOND, FRAMES_PER_SECOND)
        ping_interval = services.settings.ping_interval
        self._ping_after = ping_interval * (1 - random.uniform(0, _PING_JITTER))
        self._lanes = lanes()
        _tune(sock)
        sock.settimeout(0)  # writes must never block; every wait is explicit
        # Until it has registered, a client has nothing to interrupt: what it sends is data.
        self._is_read_first = False
        self._readable = self._lanes.readable(sock.fileno())
        self._outbox = Outbox(
            sock, self._protocol, services.settings.outbox, services.metrics, self._died
        )

    def run(self) -> None:
        """Serve the connection until it ends. Runs in the connection's greenlet."""
        reason = "closed by the client"
        try:
            while (data := self._read()) and not self._is_over():
                self._receive(data)
            self._protocol.receive_eof()
            self._outbox.send_wire(self._protocol.data_to_send())
        except OSError as error:
            reason = f"connection lost: {error.strerror or error}"
        finally:
            self._outbox.die(reason)
            self._died(reason)  # again, for an attachment that was made after the connection died
            self._readable.close()
            self._sock.close()

    @property
    def has_client(self) -> bool:
        """True once the WebSocket handshake is done."""
        return self._attachment is not None

    @property
    def is_registered(self) -> bool:
        """True once the client has a session."""
        return self._attachment is not None and self._attachment.is_registered

    @property
    def waiting_bytes(self) -> int:
        """How many bytes wait in the outbox."""
        return self._outbox.waiting_bytes

    def refuse(self, reason: str) -> None:
        """Close the connection to make room: with a close frame if the handshake is done."""
        self._services.metrics.refused.labels("max_connections").inc()
        _deferred_log.warning("Refused connection", peer=self._peer, reason=reason)
        if self._protocol.state is OPEN:
            self._outbox.close(CloseCode.TRY_AGAIN_LATER, reason)
        self.drop(reason)

    def drop(self, reason: str) -> None:
        """Close the connection at once, without a close frame."""
        self._outbox.die(reason)

    def check(self, now: float) -> None:
        """Ping the client if it is silent; drop the connection if it is dead, or exceeds the time
        limit for the handshake or for the close frame. Called every few seconds.

        Args:
            now: `time.monotonic()`.
        """
        settings = self._services.settings
        attachment = self._attachment
        idle_since = None if attachment is None else attachment.idle_since
        if self._protocol.state is State.CONNECTING:
            if self._passed(self.opened_at, now) > _HANDSHAKE_SECONDS:
                self.drop("no handshake in time")
        elif self._protocol.state is not OPEN or self._closing_since is not None:
            self._closing_since = self._closing_since or now
            if self._passed(self._closing_since, now) > CLOSE_SECONDS:
                self.drop("close frame unanswered")
        elif (
            idle_since is not None
            and self._passed(idle_since, now) > REGISTER_SECONDS
            and not self._lanes.is_behind  # or it is we who have not read
        ):
            self._refuse(f"no REGISTER within {REGISTER_SECONDS:g} s", now)
        elif self._is_paused:  # it seems silent because we do not read it
            self._heard_at, self._pinged_at = now, None
            self._message_since = None if self._message_since is None else now
        elif self._is_message_late(now):
            self._refuse(f"a message was not complete within {MESSAGE_SECONDS:g} s", now)
        elif self._pinged_at is not None and self._heard_at >= self._pinged_at:
            self._pinged_at = None
        elif self._pinged_at is not None:
            if self._passed(self._pinged_at, now) > settings.ping_timeout:
                self.drop(f"no answer to a ping within {settings.ping_timeout:g} s")
        elif 0 < self._ping_after < now - self._heard_at:
            self._pinged_at = now
            self._outbox.ping()

    def _refuse(self, reason: str, now: float) -> None:
        self._closing_since = now
        _deferred_log.warning("Refused connection", peer=self._peer, reason=reason)
        self._outbox.close(CloseCode.POLICY_VIOLATION, reason)

    def _is_message_late(self, now: float) -> bool:
        since = self._message_since
        return since is not None and self._passed(since, now) > MESSAGE_SECONDS

    def _passed(self, since: float, now: float) -> float:
        """Seconds from then until now, without pauses of this process: the client could not be
        heard."""
        return now - since - self._lanes.pauses.seconds_between(since, now)

    def _read(self) -> bytes:
        if self.is_registered and not self._is_read_first:
            self._read_first()
        if not self.is_registered and self._lanes.is_behind:
            # Once, not until it has caught up: those that wait are deferred tasks themselves.
            self._pause(self._lanes.wait_deferred)
        while True:
            self._readable.wait()
            try:
                data: bytes = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                continue
            self._heard_at = time.monotonic()
            if self.is_registered and not self._is_read_first:
                self._read_first()  # its password was checked while this waited
            return data

    def _read_first(self) -> None:
        """From now on, read the client before the providers: it may say INTERRUPT."""
        self._is_read_first = True
        self._readable.close()
        self._readable = self._lanes.readable_control(self._sock.fileno())
        self._protocol.max_message_size = MAX_FRAME_BYTES

    def _is_over(self) -> bool:
        return self._protocol.state is State.CLOSED

    def _receive(self, data: bytes) -> None:
        """Give the protocol what was read: first the request alone, then a few frames at a time."""
        if not self._head.is_done:
            head, data = self._head.split(data)
            self._protocol.receive_data(head)
            self._after_receiving()
        if self._attachment is None:
            return  # the request was answered, and nothing may follow it
        is_first = True
        for piece in self._slices.cut(data):
            if not is_first:
                self._pause(self._lanes.wait_turn)
            is_first = False
            if self._is_over():
                return
            frames = self._frames
            self._protocol.receive_data(piece)
            self._after_receiving()
            if not (self._slices.is_inside or self._fragments):
                self._message_since = None
            elif self._message_since is None or (self._frames > frames and self._fragments < 2):
                self._message_since = time.monotonic()

    def _after_receiving(self) -> None:
        # Take pongs and close frames out of the protocol first: otherwise their bytes would end up
        # in the outbox's next frame.
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
        if frames > 1 or self._is_log_behind or not self._outbox.has_room_for_control:
            self._pause_reading()  # after one frame alone, its session runs before the next read
        if seconds := self._too_fast(frames):
            self._pause(lambda: gevent.sleep(seconds))
        if self._protocol.state is not OPEN:
            # No frame may follow a close frame, so do not wait for the end of TCP.
            self._died("closed by the client")

    def _pause_reading(self) -> None:
        # A client that never stops sending must neither starve others nor outrun its session.
        self._lanes.wait_for_control()
        if self._is_log_behind:
            self._pause(self._lanes.wait_deferred)
        self._pause(self._outbox.wait_for_room_for_control)

    def _pause(self, wait: Callable[[], object]) -> None:
        """Do not read until this wait is over; the client is not to blame for that silence."""
        self._is_paused = True
        try:
            wait()
        finally:
            self._is_paused = False

    def _too_fast(self, frames: int) -> float:
        """Count frames; returns for how many seconds the client must not be read."""
        self._frames += frames
        if self._frames <= FREE_FRAMES:
            return 0.0
        pace = self._pace if self.is_registered else self._services.pace
        return pace.take(frames)

    @property
    def _is_log_behind(self) -> bool:
        return self._unlogged_batches > 1

    def _count_message(self) -> None:
        self._messages += 1
        if self._messages % MESSAGES_IN_A_BATCH == 0:
            self._unlogged_batches += 1
            self._lanes.run_deferred(self._caught_up)

    def _caught_up(self) -> None:
        self._unlogged_batches -= 1

    def _take(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._message_opcode = frame.opcode
        elif frame.opcode is not Opcode.CONT:
            return  # the protocol answers pings and closes
        self._message += frame.data
        self._fragments += 1
        if self._fragments > MAX_FRAGMENTS:
            self._message.clear()
            reason = f"a message in more than {MAX_FRAGMENTS} frames"
            self._outbox.close(CloseCode.MESSAGE_TOO_BIG, reason)
        elif frame.fin:
            message, self._fragments = bytes(self._message), 0
            self._message = bytearray()
            if self._attachment is not None:
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
    """Make the kernel send each frame at once, and hold little unsent data."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    notsent_lowat = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if notsent_lowat is not None:
        sock.setsockopt(socket.IPPROTO_TCP, notsent_lowat, _NOTSENT_BYTES)
