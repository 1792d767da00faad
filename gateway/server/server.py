"""Sockets: accept, the WebSocket handshake, plain HTTP GETs on the same port, the read loop.

websockets' Sans-I/O layer on a gevent server: one greenlet per connection reads, turns frames into
typed messages for the session, and is the only one who closes the socket. Everything that goes out
goes through the connection's outbox.
"""

from __future__ import annotations

import email.utils
import http
import ipaddress
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import gevent
import gevent.event
import gevent.socket
import msgspec
from websockets.datastructures import Headers, MultipleValuesError
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN, State
from websockets.server import ServerProtocol

from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.loop.slices import in_slices
from gateway.server import pages
from gateway.server.listening import Listening
from gateway.server.outbox import Outbox, OutboxSettings
from gateway.wire.protocol import (
    MAX_FRAME_BYTES,
    PATH,
    ClientFrame,
    FrameError,
    FunctionResult,
    Interrupt,
    decode,
)
from gateway.wire.protocol import Request as RequestPayload
from metrics.instruments import Metrics
from metrics.logs import get_logger

_READ_BYTES = 16 * 1024
_HANDSHAKE_SECONDS = 10.0
_CLOSE_TRY_AGAIN_LATER = 1013
_CLOSE_SECONDS = 5.0
"""How long a client may take to answer a close frame."""

_MAX_LOGGED_CHARS = 64
"""Of a `session_id`, which is whatever the client says."""

_BACKLOG = 1024
_SPARE_CONNECTIONS = 128
"""Beyond the sessions that may be: for health checks, and those who are told that it is full."""

_UNREGISTERED_SECONDS = 1.0
_UNREGISTERED_AT_ONCE = 16
"""Without file descriptors so many make way at a time who have not registered for so long: whoever
means to does so at once."""

_NOTSENT_BYTES = 16 * 1024
"""What the kernel may hold unsent for a client: more would be stale, and out of our reach."""

_TURN_FRAMES = 32
"""After so many frames from one client everybody else gets a turn. And when the log is as many
messages of its behind, it is not read until they are in there: else whoever sends faster than
that is written fills the memory, and answers, which wait in the same lane, come to nobody."""

_log = get_logger("WS")  # for what runs in the data lane, and for what comes before any frame
_deferred_log = DeferredLog(_log)


class Session(Protocol):
    """What the server tells a session. None of it blocks."""

    def frame(self, frame: ClientFrame, read_at: float) -> None:
        """A frame, read at this `time.monotonic()`."""

    def bad_frame(self, error: FrameError) -> None:
        """A frame that was not understood."""

    def voice(self, voice: bytes) -> None:
        """A binary frame."""

    @property
    def is_registered(self) -> bool:
        """Whether its client was let in."""

    def connection_lost(self, reason: str) -> None:
        """Nothing can be read or written any more. May be told more than once."""


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, and how to treat connections.

    Args:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        allowed_origins: origins of web pages that may connect besides our own, such as
            ``https://chat.example.com``; their hosts are also accepted as `Host`.
        max_sessions: sessions that may be registered; 0 is no limit. A quiet one takes 26 KiB and a
            file descriptor, so that many take some 300 MB. Connections may be some more.
        ping_interval: seconds of silence until a WebSocket ping is sent; 0 sends none.
        ping_timeout: seconds without any sign of life after it until the connection is dropped.
        outbox: bounds of what goes out.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_origins: tuple[str, ...] = ()
    max_sessions: int = 10_000
    ping_interval: float = 20.0
    ping_timeout: float = 20.0
    outbox: OutboxSettings = field(default_factory=OutboxSettings)

    @property
    def max_connections(self) -> int:
        """How many may be open, of any kind; 0 is no limit."""
        return self.max_sessions + _SPARE_CONNECTIONS if self.max_sessions else 0


class Server:
    """Listens, and makes a session of each WebSocket connection.

    Args:
        settings: where and how.
        open_session: makes the session of a connection, given its outbox and peer address.
        health: the fields of `/health`.
        metrics: counts refusals and slow clients.
        unready: why no new clients are welcome, for `/readyz`; None when they are.
    """

    def __init__(
        self,
        settings: ServerSettings,
        open_session: Callable[[Outbox, str], Session],
        health: Callable[[], dict[str, object]],
        metrics: Metrics,
        unready: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.open_session = open_session
        self.health = health
        self.metrics = metrics
        self.unready = unready
        self._connections: set[_Connection] = set()
        self._unregistered: dict[_Connection, None] = {}
        """Those that have not registered, the oldest first, and some that have meanwhile."""
        self._empty = gevent.event.Event()
        self._empty.set()
        self._listener: Listening | None = None
        self._checker: gevent.Greenlet[[], None] | None = None
        self._hosts = {"localhost", settings.host.lower()} | {
            host for origin in settings.allowed_origins if (host := urlsplit(origin).hostname)
        }
        self._origins = {origin.lower().rstrip("/") for origin in settings.allowed_origins}

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._listener is not None
        port = self._listener.server_port
        assert port is not None
        return port

    @property
    def connections(self) -> int:
        """How many connections are open, of any kind."""
        return len(self._connections)

    def waiting_bytes(self) -> int:
        """What waits in all outboxes, in bytes. Lets others have a turn, so not for the hub."""
        return sum(one.waiting_bytes for one in in_slices(list(self._connections)))

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be had.
        """
        self._listener = Listening(
            (self.settings.host, self.settings.port), self._serve, backlog=_BACKLOG
        )
        self._listener.make_room = self._make_room_for_files
        self._listener.start()
        self._checker = gevent.spawn(self._check_for_ever)

    def stop_listening(self) -> None:
        """Take no more connections; sessions that stand are left alone."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            if not connection.has_session:
                connection.drop("server stops")

    def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._checker is not None:
            self._checker.kill()
        self.stop_listening()
        for connection in list(self._connections):
            connection.drop("server stopped")
        if self._listener is not None:
            self._listener.stop(timeout=_CLOSE_SECONDS)

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until every connection has ended, but no longer than this."""
        self._empty.wait(seconds)

    def refusal(self, request: Request) -> str | None:
        """Why a request is refused by its Host or Origin, or None.

        A page in the user's browser may send requests anywhere. Its origin must be ours, and the
        host a name that is ours, since a foreign name may have been pointed at our address.
        """
        try:
            host_header = request.headers["Host"]
            origin = request.headers.get("Origin")
        except (KeyError, MultipleValuesError):
            return "a request needs one Host, and at most one Origin"
        try:
            host = urlsplit(f"//{host_header}").hostname or ""
        except ValueError:
            host = ""
        if host not in self._hosts and not _is_address(host):
            return f"host {host_header[:100]!r} is not served here (see --allow-origin)"
        if origin is None or origin.lower() in self._origins:
            return None
        if origin.lower().partition("://")[2] == host_header.lower():
            return None
        return f"pages of origin {origin[:100]!r} may not connect (see --allow-origin)"

    def _serve(self, sock: gevent.socket.socket, address: tuple[str, int]) -> None:
        connection = _Connection(self, sock, f"{address[0]}:{address[1]}")
        self._connections.add(connection)
        self._unregistered[connection] = None
        self._empty.clear()
        self._make_room()
        try:
            connection.run()
        finally:
            self._connections.discard(connection)
            self._unregistered.pop(connection, None)
            if not self._connections:
                self._empty.set()

    def _make_room(self) -> None:
        """Whoever has been here for the longest without registering goes, one for each that comes
        when there are too many. So neither those who only hold connections, nor a full house, keep
        a new one from its health check, or its REGISTER."""
        if not 0 < self.settings.max_connections < len(self._connections):
            return
        self._send_oldest_unregistered_away(
            "more connections than may be, and it had not registered"
        )

    def _make_room_for_files(self) -> None:
        """There are no file descriptors left, whatever the limit on connections is: neither may
        those who only hold some keep everybody else out."""
        too_new = time.monotonic() - _UNREGISTERED_SECONDS
        for _ in range(_UNREGISTERED_AT_ONCE):
            self._send_oldest_unregistered_away(
                "no open files left, and it had not registered", too_new
            )

    def _send_oldest_unregistered_away(self, reason: str, before: float = math.inf) -> None:
        while self._unregistered:
            oldest = next(iter(self._unregistered))
            if oldest.opened_at > before:
                return
            del self._unregistered[oldest]
            if not oldest.is_registered:
                oldest.refuse(reason)
                return

    def _check_for_ever(self) -> None:
        # One greenlet for all connections: ten thousand idle ones must not cost as many timers.
        limits = (self.settings.ping_interval, self.settings.ping_timeout, _CLOSE_SECONDS)
        pause = min(limit for limit in limits if limit > 0) / 4
        while True:
            gevent.sleep(pause)
            now = time.monotonic()
            for connection in list(self._connections):
                connection.check(now)


class _Connection:
    """One TCP connection, from accept to close."""

    def __init__(self, server: Server, sock: gevent.socket.socket, peer: str) -> None:
        self._server = server
        self._sock = sock
        self._peer = peer
        self._protocol = ServerProtocol(max_size=MAX_FRAME_BYTES)
        self._session: Session | None = None
        self._message: list[bytes] = []
        self._message_opcode = Opcode.TEXT
        self._heard_at = self.opened_at = time.monotonic()
        self._pinged_at: float | None = None
        self._closing_since: float | None = None
        self._is_paused = False
        self._messages = self._unlogged_turns = 0
        self._lanes = lanes()
        _tune(sock)
        sock.settimeout(0)  # every wait is explicit, so that writes never block
        # What clients say goes before what providers say: it may be an INTERRUPT.
        self._readable = self._lanes.readable_control(sock.fileno())
        self._outbox = Outbox(
            sock, self._protocol, server.settings.outbox, server.metrics, self._died
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
            self._died(reason)  # once more, for a session that was opened on a dead connection
            self._readable.close()
            self._sock.close()

    @property
    def has_session(self) -> bool:
        """True when its handshake was done."""
        return self._session is not None

    @property
    def is_registered(self) -> bool:
        """True when its session was let in."""
        return self._session is not None and self._session.is_registered

    def refuse(self, reason: str) -> None:
        """There is no room for it: end it at once, with a word where it can be said."""
        self._server.metrics.refused.labels("max_connections").inc()
        _deferred_log.warning("Refused connection", peer=self._peer, reason=reason)
        if self._protocol.state is OPEN:
            self._outbox.close(_CLOSE_TRY_AGAIN_LATER, reason)
        self.drop(reason)

    @property
    def waiting_bytes(self) -> int:
        """What waits in its outbox."""
        return self._outbox.waiting_bytes

    def drop(self, reason: str) -> None:
        """End it at once."""
        self._outbox.die(reason)

    def check(self, now: float) -> None:
        """Called every few seconds: finds connections that are dead, or too slow to shake hands."""
        settings = self._server.settings
        if self._protocol.state is State.CONNECTING:
            if now - self.opened_at > _HANDSHAKE_SECONDS:
                self.drop("no handshake in time")
        elif self._protocol.state is not OPEN:
            self._closing_since = self._closing_since or now
            if now - self._closing_since > _CLOSE_SECONDS:
                self.drop("close frame unanswered")
        elif self._is_paused:  # it may say what it likes: it is we who do not listen
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
                if frames % _TURN_FRAMES == 0:
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
        return self._unlogged_turns > 1

    def _count_message(self) -> None:
        self._messages += 1
        if self._messages % _TURN_FRAMES == 0:
            self._unlogged_turns += 1
            self._lanes.run_deferred(self._caught_up)

    def _caught_up(self) -> None:
        self._unlogged_turns -= 1

    def _take(self, frame: Frame) -> None:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._message_opcode = frame.opcode
            self._message = [bytes(frame.data)]
        elif frame.opcode is Opcode.CONT:
            if frame.data:  # empty ones count for nothing in the limit on a message
                self._message.append(bytes(frame.data))
        else:
            return  # pings, pongs and closes are answered by the protocol itself
        if frame.fin and self._session is not None:
            message, self._message = b"".join(self._message), []
            self._deliver(self._session, message)
            self._count_message()

    def _deliver(self, session: Session, message: bytes) -> None:
        read_at = self._heard_at
        if self._message_opcode is Opcode.BINARY:
            session.voice(message)
            return
        try:
            frame = decode(message)
        except FrameError as error:
            session.bad_frame(error)
        else:
            # Later, for it takes longer than an interrupt does; but queued before anything that the
            # session may have to log of it.
            self._lanes.run_deferred(_log_received, frame)
            session.frame(frame, read_at)

    def _answer_http(self, request: Request) -> None:
        protocol = self._protocol
        refusal = self._server.refusal(request)
        path = request.path.partition("?")[0]
        if refusal is not None:
            self._server.metrics.refused.labels("origin").inc()
            _log.warning("Refused connection", peer=self._peer, reason=refusal)
            protocol.send_response(_response(http.HTTPStatus.FORBIDDEN, refusal + "\n"))
        elif path == PATH:
            response = protocol.accept(request)
            protocol.send_response(response)
            if protocol.state is OPEN:
                self._outbox.send_wire(protocol.data_to_send())
                self._session = self._server.open_session(self._outbox, self._peer)
        elif request.method != "GET":
            refused = _response(http.HTTPStatus.METHOD_NOT_ALLOWED, "only GET is served here\n")
            refused.headers["Allow"] = "GET"
            protocol.send_response(refused)
        elif (page := pages.answer(path, request.headers)) is not None:
            protocol.send_response(page)
        elif path == "/health":
            body = msgspec.json.encode(self._server.health()).decode()
            protocol.send_response(_response(http.HTTPStatus.OK, body, "application/json"))
        elif path == "/livez":
            protocol.send_response(_response(http.HTTPStatus.OK, "ok\n"))
        elif path == "/readyz":
            why = self._server.unready()
            if why is None:
                protocol.send_response(_response(http.HTTPStatus.OK, "ok\n"))
            else:
                busy = http.HTTPStatus.SERVICE_UNAVAILABLE
                protocol.send_response(_response(busy, f"not ready: {why}\n"))
        else:
            text = f"nothing at {path[:100]!r}; the WebSocket is at {PATH}\n"
            protocol.send_response(_response(http.HTTPStatus.NOT_FOUND, text))

    def _died(self, reason: str) -> None:
        if self._session is not None:
            self._session.connection_lost(reason)


def _log_received(frame: ClientFrame) -> None:
    payload = frame.payload
    fields = {"session_id": frame.session_id and frame.session_id[:_MAX_LOGGED_CHARS]}
    if isinstance(payload, RequestPayload | FunctionResult):
        fields["request_id"] = payload.request_id
    elif isinstance(payload, Interrupt):
        fields["request_id"] = payload.target
    _log.info("Received message", msg_type=payload.msg_type, **fields)


def _tune(sock: gevent.socket.socket) -> None:
    """Send each frame at once, and keep what the kernel holds small."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    notsent_lowat = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if notsent_lowat is not None:
        sock.setsockopt(socket.IPPROTO_TCP, notsent_lowat, _NOTSENT_BYTES)


def _response(
    status: http.HTTPStatus, body: str, content_type: str = "text/plain; charset=utf-8"
) -> Response:
    data = body.encode()
    headers = Headers(
        {
            "Date": email.utils.formatdate(usegmt=True),
            "Connection": "close",
            "Content-Length": str(len(data)),
            "Content-Type": content_type,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
    )
    return Response(status.value, status.phrase, headers, data)


def _is_address(host: str) -> bool:
    # No name was resolved to get here, so no foreign name can have been pointed at us.
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
