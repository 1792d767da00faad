"""The public port: listens, keeps track of the connections, and makes room for new ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import gevent
import gevent.event
import gevent.socket

from actors.loop.lanes import lanes
from actors.loop.slices import in_slices
from gateway.server import pages
from gateway.server.connection import (
    CLOSE_SECONDS,
    UNREGISTERED_FRAMES_PER_SECOND,
    Attachment,
    Connection,
    ConnectionServices,
    ConnectionSettings,
)
from gateway.server.handshake import Gate
from gateway.server.listening import Listening
from gateway.server.outbox import Outbox, OutboxSettings
from gateway.server.pace import Pace
from metrics.instruments import Metrics

_BACKLOG = 1024
_SPARE_CONNECTIONS = 128
"""Connections beyond the session limit: for health checks, and to refuse a REGISTER properly."""

_UNREGISTERED_SECONDS = 1.0
_UNREGISTERED_AT_ONCE = 16
"""When no file descriptors are left, at most this many connections are closed at once, and only
those that are older than `_UNREGISTERED_SECONDS`: a normal client registers at once."""


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, and the settings of all connections.

    Args:
        host: address to listen on.
        port: TCP port; 0: any free port.
        allowed_origins: origins of other web pages that may connect, such as
            ``https://chat.example.com``; their hosts are also accepted as `Host`.
        max_sessions: how many sessions may be registered at once; 0: no limit. An idle session
            takes 26 KiB and a file descriptor, so 10,000 take about 300 MB.
        ping_interval: seconds of silence until a WebSocket ping is sent; 0: no pings.
        ping_timeout: seconds after a ping without any data until the connection is dropped.
        outbox: bounds of each outbox.
        max_open: how many connections may be open, so that open files are left for live requests;
            0: no limit. It follows from the limit on open files (`gateway/process.py`).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_origins: tuple[str, ...] = ()
    max_sessions: int = 10_000
    ping_interval: float = 20.0
    ping_timeout: float = 20.0
    outbox: OutboxSettings = field(default_factory=OutboxSettings)
    max_open: int = 0

    @property
    def max_connections(self) -> int:
        """How many connections may be open, registered or not; 0: no limit."""
        return self.max_sessions + _SPARE_CONNECTIONS if self.max_sessions else 0


class Server:
    """Listens, and serves each connection.

    Args:
        settings: where to listen, and the settings of all connections.
        attach: makes the attachment of a WebSocket connection, given its outbox and peer address.
        health: returns the fields of `/health`.
        metrics: counts refusals and slow clients.
        unready: returns why new clients should go elsewhere, for `/readyz`; None if they are
            welcome.
    """

    def __init__(
        self,
        settings: ServerSettings,
        attach: Callable[[Outbox, str], Attachment],
        health: Callable[[], dict[str, object]],
        metrics: Metrics,
        unready: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.settings = settings
        self._services = ConnectionServices(
            ConnectionSettings(settings.ping_interval, settings.ping_timeout, settings.outbox),
            attach,
            Gate(settings.host, settings.allowed_origins).refusal,
            health,
            unready,
            metrics,
            Pace(UNREGISTERED_FRAMES_PER_SECOND, UNREGISTERED_FRAMES_PER_SECOND),
        )
        self._connections: set[Connection] = set()
        self._unregistered: dict[Connection, None] = {}
        """Connections that have not registered, oldest first. Those that have registered since are
        removed when they are found."""
        self._empty = gevent.event.Event()
        self._empty.set()
        self._listener: Listening | None = None
        self._checker: gevent.Greenlet[[], None] | None = None

    @property
    def port(self) -> int:
        """The TCP port that the server listens on."""
        assert self._listener is not None
        port = self._listener.server_port
        assert port is not None
        return port

    @property
    def connections(self) -> int:
        """How many connections are open, registered or not."""
        return len(self._connections)

    @property
    def is_full(self) -> bool:
        """Whether new connections have to wait, so that open files are left for live requests."""
        return self._listener is not None and self._listener.is_full

    def waiting_bytes(self) -> int:
        """Count the bytes in all outboxes. Yields to other greenlets, so it must not run in the
        hub."""
        return sum(one.waiting_bytes for one in in_slices(list(self._connections)))

    def start(self) -> None:
        """Start to listen.

        Raises:
            OSError: the server cannot listen on the address.
        """
        pages.load()  # now, since to read files later would hold up everybody
        self._listener = Listening(
            (self.settings.host, self.settings.port), self._serve, backlog=_BACKLOG
        )
        self._listener.make_room = self._make_room_for_files
        self._listener.max_open = self.settings.max_open
        self._listener.start()
        self._checker = gevent.spawn(self._check_for_ever)

    def stop_listening(self) -> None:
        """Accept no more connections. Those with a completed handshake stay open."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            if not connection.has_client:
                connection.drop("server stops")

    def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._checker is not None:
            self._checker.kill()
        self.stop_listening()
        for connection in list(self._connections):
            connection.drop("server stopped")
        if self._listener is not None:
            self._listener.stop(timeout=CLOSE_SECONDS)

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until every connection has ended, at most this long."""
        self._empty.wait(seconds)

    def _serve(self, sock: gevent.socket.socket, address: tuple[str, int]) -> None:
        connection = Connection(sock, f"{address[0]}:{address[1]}", self._services)
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
        """When there are too many connections, close the one that has been unregistered for the
        longest. So a new client can always send a health check or REGISTER, even if the session
        limit is reached or other clients hold connections without registering."""
        if not 0 < self.settings.max_connections < len(self._connections):
            return
        self._refuse_oldest_unregistered("connection limit reached, and it had not registered")

    def _make_room_for_files(self) -> None:
        """When no file descriptors are left, close connections that have not registered. Otherwise
        clients that only hold connections could keep all others out."""
        too_new = time.monotonic() - _UNREGISTERED_SECONDS
        for _ in range(_UNREGISTERED_AT_ONCE):
            self._refuse_oldest_unregistered(
                "no open files left, and it had not registered", too_new
            )

    def _refuse_oldest_unregistered(self, reason: str, before: float = math.inf) -> None:
        while self._unregistered:
            oldest = next(iter(self._unregistered))
            if oldest.opened_at > before:
                return
            del self._unregistered[oldest]
            if not oldest.is_registered:
                oldest.refuse(reason)
                return

    def _check_for_ever(self) -> None:
        # One greenlet for all connections, so that 10,000 idle ones do not need 10,000 timers.
        limits = (self.settings.ping_interval, self.settings.ping_timeout, CLOSE_SECONDS)
        pause = min(limit for limit in limits if limit > 0) / 4
        while True:
            gevent.sleep(pause)
            lanes().wait_reads()  # what clients have sent comes first
            # In slices: to ping thousands in one go would hold up every interrupt.
            for connection in in_slices(list(self._connections)):
                connection.check(time.monotonic())
