"""The connections of the operator's port: how long each may take, and how many there may be.

The port has no credentials, so strangers on the same machine can connect. Whatever they send or do
not send, they must not keep scrapers out, or hold open files:

phase           begins with                                ends after, at most
AWAITS_REQUEST  the connection, or the first byte of       `FIRST_REQUEST_SECONDS`, `HEAD_SECONDS`
                another request
IDLE            the end of an answer                       `KEEP_ALIVE_SECONDS`
ANSWERS         the end of a request's head                `ANSWER_SECONDS`

Beyond `MAX_CONNECTIONS` each new connection closes another one: of those in the first of these
phases that any is in, the oldest. So a scraper, which sends its request at once, gets its answer.
"""

from __future__ import annotations

import contextlib
import enum
import socket
from typing import Any

import gevent.pool
import gevent.pywsgi

from actors.loop.lanes import lanes
from gateway.server.listening import Listening

MAX_CONNECTIONS = 64
"""Enough for a few scrapers and health checks."""

_CLOSING_CONNECTIONS = 16
"""Room for those that are being closed to make way. When it is full, new connections wait in the
kernel's queue."""

FIRST_REQUEST_SECONDS = 5.0
"""Drop a connection that has not sent the head of a request within this time."""

HEAD_SECONDS = 5.0
"""The same for further requests, from their first byte on."""

ANSWER_SECONDS = 30.0
"""Drop a connection whose answer is not written within this time. A page takes some milliseconds,
but a busy loop may put it off, and the client may not read."""

KEEP_ALIVE_SECONDS = 120.0
"""Drop a scraper's connection that is idle for this long. Prometheus scrapes once a minute by
default and keeps its connection open in between."""

_MAX_HEAD_BYTES = 16 * 1024
"""The longest head of a request, without its first line."""


class Phase(enum.IntEnum):
    """What a connection does, in the order in which connections are closed to make room."""

    AWAITS_REQUEST = 0
    IDLE = 1
    ANSWERS = 2


class OpsListener(Listening, gevent.pywsgi.WSGIServer):
    """Listens, and bounds the number of connections."""

    def __init__(self, address: tuple[str, int], application: Any, error_log: Any) -> None:
        self.connections: dict[OpsConnection, None] = {}
        """The connections that are not being dropped, oldest first."""
        super().__init__(
            address,
            application,
            log=None,
            error_log=error_log,
            handler_class=OpsConnection,
            spawn=gevent.pool.Pool(MAX_CONNECTIONS + _CLOSING_CONNECTIONS),
        )

    @property
    def is_half_full(self) -> bool:
        """Whether more than half of the connections are taken."""
        return len(self.connections) > MAX_CONNECTIONS // 2

    def enter(self, connection: OpsConnection) -> None:
        """Count a new connection, and close another one if there are too many."""
        if len(self.connections) >= MAX_CONNECTIONS:
            min(self.connections, key=lambda one: one.phase).drop()
        self.connections[connection] = None

    def leave(self, connection: OpsConnection) -> None:
        """Count a connection no more. Harmless if it is not counted."""
        self.connections.pop(connection, None)


class OpsConnection(gevent.pywsgi.WSGIHandler):
    """One connection."""

    server: OpsListener
    phase = Phase.AWAITS_REQUEST
    _is_dropped = False
    _timer: Any = None

    def drop(self) -> None:
        """Close the connection; its greenlet ends soon. Never blocks."""
        self._is_dropped = True
        self.server.leave(self)
        # Not `close`: the greenlet may be waiting for the socket, and so finds its end.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    # What gevent calls, in the connection's greenlet.

    def handle(self) -> None:
        self.server.enter(self)
        self._begin(Phase.AWAITS_REQUEST, FIRST_REQUEST_SECONDS)
        try:
            with contextlib.suppress(OSError):  # the client has gone, or was dropped
                # Headers and body are two writes: Nagle's algorithm would hold back the second
                # for 40 ms.
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                super().handle()
        finally:
            self._stop_timer()
            self.server.leave(self)

    def handle_one_request(self) -> Any:
        if not self.rfile.peek(1):
            return None  # the client has closed the connection
        if self.phase is Phase.IDLE:
            self._begin(Phase.AWAITS_REQUEST, HEAD_SECONDS)
        result = super().handle_one_request()
        self._begin(Phase.IDLE, KEEP_ALIVE_SECONDS)
        return result

    def MessageClass(self, rfile: Any, *args: Any) -> Any:  # noqa: N802
        lines: Any = _BoundedLines(rfile)
        return super().MessageClass(lines, *args)

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        environ["bargein.hosts"] = self._values("Host")
        environ["bargein.origins"] = self._values("Origin")
        if self.content_length or "HTTP_TRANSFER_ENCODING" in environ:
            # No request here needs a body. Left alone, gevent would read all of it.
            self.wsgi_input = environ["wsgi.input"] = gevent.pywsgi.Input(self.rfile, 0)
            self.close_connection = True
        return environ

    def handle_one_response(self) -> None:
        self._begin(Phase.ANSWERS, ANSWER_SECONDS)
        super().handle_one_response()

    def _handle_client_error(self, ex: Exception) -> Any:
        if self._is_dropped:
            raise BrokenPipeError  # what was read is only the start of a head
        if not isinstance(ex, ValueError):
            ex = ValueError(str(ex) or type(ex).__name__)  # anything else prints a traceback
        return super()._handle_client_error(ex)  # type: ignore[misc]

    # The time limits.

    def _begin(self, phase: Phase, seconds: float) -> None:
        self.phase = phase
        self._stop_timer()
        self._timer = lanes().limit(seconds, self.drop)
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer = None

    def _values(self, name: str) -> list[str]:
        return [value.strip(" \t") for value in self.headers.get_all(name, [])]


class _BoundedLines:
    """Reads the lines of a head, up to a number of bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = _MAX_HEAD_BYTES

    def readline(self, limit: int) -> bytes:
        """Read a line.

        Raises:
            ValueError: the head is too long.
        """
        line: bytes = self._file.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise ValueError(f"a head of more than {_MAX_HEAD_BYTES} bytes")
        return line
