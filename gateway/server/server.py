"""The public port: listens, keeps account of the connections, and makes room for new ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import gevent
import gevent.event
import gevent.socket

from actors.loop.slices import in_slices
from gateway.server.connection import (
    CLOSE_SECONDS,
    Attachment,
    Connection,
    ConnectionServices,
    ConnectionSettings,
)
from gateway.server.handshake import Gate
from gateway.server.listening import Listening
from gateway.server.outbox import Outbox, OutboxSettings
from metrics.instruments import Metrics

_BACKLOG = 1024
_SPARE_CONNECTIONS = 128
"""Beyond the session limit: for health checks, and for those who are told that it is reached."""

_UNREGISTERED_SECONDS = 1.0
_UNREGISTERED_AT_ONCE = 16
"""Without file descriptors so many make way at a time that have not registered for so long: a
client that means to register does so at once."""


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
    """Listens, and makes an attachment of each WebSocket connection.

    Args:
        settings: where and how.
        attach: makes the attachment of a connection, given its outbox and peer address.
        health: the fields of `/health`.
        metrics: counts refusals and slow clients.
        unready: why no new clients are welcome, for `/readyz`; None when they are.
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
        )
        self._connections: set[Connection] = set()
        self._unregistered: dict[Connection, None] = {}
        """Those that have not registered, the oldest first, and some that have meanwhile."""
        self._empty = gevent.event.Event()
        self._empty.set()
        self._listener: Listening | None = None
        self._checker: gevent.Greenlet[[], None] | None = None

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
        """What waits in all outboxes, in bytes. It lets other greenlets run, so not for the hub."""
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
        """Take no more connections; those with a client are left alone."""
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
        """Wait until every connection has ended, but no longer than this."""
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
        """When there are too many connections, the one that has been here longest without
        registering makes way. So neither clients that only hold connections, nor a full house, keep
        a new one from its health check, or its REGISTER."""
        if not 0 < self.settings.max_connections < len(self._connections):
            return
        self._refuse_oldest_unregistered("connection limit reached, and it had not registered")

    def _make_room_for_files(self) -> None:
        """There are no file descriptors left, whatever the limit on connections is: clients that
        only hold some must not keep all others out."""
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
        # One greenlet for all connections: ten thousand idle ones must not cost as many timers.
        limits = (self.settings.ping_interval, self.settings.ping_timeout, CLOSE_SECONDS)
        pause = min(limit for limit in limits if limit > 0) / 4
        while True:
            gevent.sleep(pause)
            now = time.monotonic()
            for connection in list(self._connections):
                connection.check(now)
