"""Connections to a provider: each read waits in the event loop, and a close works at once.

gevent reads from a socket without a wait for as long as there is data. So one provider that sends
without a pause would starve all other greenlets: with events, but also with endless trailers or
`100 Continue`, which `http.client` reads in loops of its own. Here each read first waits in the
loop (`llm/loop.py`), even when data is there already.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import queue
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import certifi
import gevent
import urllib3
import urllib3.util
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, ProtocolError
from urllib3.util.ssltransport import SSLTransport

from llm.http.answer import Answer
from llm.limits import limited
from llm.loop import Loop

_KEPT_END_SECONDS = 2.0
"""A kept connection that ends later than this after a request was not closed for its idleness: the
provider had the request, and may bill it."""

IDLE_SECONDS = 3.0
"""How long an idle connection is kept. Many servers close one after 5 s (uvicorn, Node). A request
that is sent at that moment is lost."""

_NEW = -1
"""Passed through urllib3 as the time to wait for a kept connection: do not use one. (A pool that
does not block does not use that time.)"""

_NO_TIMEOUT = urllib3.Timeout(connect=None, read=None)
"""urllib3 limits nothing: `_Connection.connect` and the watchdog of an attempt do."""


class KeptConnectionEnded(ProtocolError):
    """A kept connection ended before a byte of the answer to a request that was sent on it."""


class Connections:
    """The connections to one provider, for one kind of request.

    Directly on urllib3. `requests.Session` would look at each request for proxies, and for a netrc
    whose password replaces the key; it would read the body of a redirect, and keep cookies, which
    would connect the users of one gateway with each other.

    Args:
        url: where to POST.
        proxy: URL of the HTTP proxy to use, with its credentials; None connects directly.
        ca_file: PEM file of trusted certificate authorities; None takes certifi's.
        connect_timeout: seconds until a connection is made; 0 is no limit.
        pool_size: how many idle connections are kept, each for `IDLE_SECONDS`. A request never
            waits for one to become idle: it makes its own.
        loop: schedules connecting and reading.

    Raises:
        ValueError: a URL is not valid.
        OSError: the certificates cannot be read.
    """

    def __init__(
        self,
        url: str,
        proxy: str | None,
        ca_file: str | None,
        connect_timeout: float,
        pool_size: int,
        loop: Loop,
    ) -> None:
        # Linger 0: a close is a reset. Nothing else reaches a provider that does not read, while
        # the body of the request is still in the kernel's send buffer.
        options: dict[str, Any] = {
            "maxsize": pool_size,
            "block": False,
            "socket_options": [
                *HTTPConnection.default_socket_options,
                (socket.SOL_SOCKET, socket.SO_LINGER, _linger(is_on=True)),
            ],
        }
        if proxy is not None or url.startswith("https:"):
            options["ssl_context"] = _trusting(ca_file or certifi.where())
        # Looked up once. The pool manager does it at each request: a tenth of a request's cost.
        pool = _make_pools(proxy, options, loop, connect_timeout).connection_from_url(url)
        assert isinstance(pool, _Pool)
        self._pool = pool
        is_forwarded = proxy is not None and url.startswith("http:")
        # RFC 9112, section 3.2.2: a forwarding proxy gets the whole URL.
        self._target = url if is_forwarded else urllib3.util.parse_url(url).request_uri

    def post(
        self,
        body: bytes,
        headers: Mapping[str, str],
        on_sent: Callable[[], None],
        *,
        on_new_connection: bool = False,
    ) -> Answer:
        """POST once, and return when the headers of the answer have arrived.

        Args:
            body: JSON.
            headers: all but the Content-Length.
            on_sent: called when the kernel has taken the whole request.
            on_new_connection: whether not to use a kept connection.

        Raises:
            KeptConnectionEnded: a kept connection ended before a byte of the answer.
            urllib3.exceptions.HTTPError: the connection failed otherwise before that.
        """

        def body_then_sent() -> Iterator[bytes]:
            yield body
            on_sent()

        response = self._pool.urlopen(
            "POST",
            self._target,
            body=body_then_sent(),
            headers={**headers, "Content-Length": str(len(body))},
            redirect=False,
            assert_same_host=False,
            retries=False,
            timeout=_NO_TIMEOUT,
            pool_timeout=_NEW if on_new_connection else None,
            preload_content=False,
            decode_content=False,
        )
        connection: Any = response.connection
        return Answer(response, connection.plain)

    def retire(self) -> None:
        """Close the idle connections, and keep none from now on. Requests are still possible."""
        self._pool.retire()

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()


def _linger(*, is_on: bool) -> bytes:
    """The value of SO_LINGER: if on, a close is a reset."""
    return struct.pack("hh" if sys.platform == "win32" else "ii", is_on, 0)


def _trusting(ca_file: str) -> ssl.SSLContext:
    """Return a TLS context that trusts these authorities, shared until the file changes.

    Reading them takes longer than connecting, and blocks the loop.
    """
    found = Path(ca_file).stat()
    return _read_authorities(ca_file, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8)
def _read_authorities(ca_file: str, _mtime_ns: int, _size: int) -> ssl.SSLContext:
    context = urllib3.util.create_urllib3_context()
    context.load_verify_locations(ca_file)
    return context


def _make_pools(
    proxy: str | None, options: dict[str, Any], loop: Loop, connect_timeout: float
) -> urllib3.PoolManager:
    pools: urllib3.PoolManager
    if proxy is None:
        pools = urllib3.PoolManager(1, **options)
    else:
        parsed = urllib3.util.parse_url(proxy)
        credentials = urllib3.util.make_headers(proxy_basic_auth=unquote(parsed.auth or ""))
        pools = urllib3.ProxyManager(
            parsed._replace(auth=None).url,
            1,
            proxy_headers=credentials if parsed.auth else None,
            proxy_ssl_context=options["ssl_context"],
            **options,
        )
    pool_classes: dict[str, Any] = {
        "http": functools.partial(_Pool, functools.partial(_Connection, loop, connect_timeout)),
        "https": functools.partial(
            _TlsPool, functools.partial(_TlsConnection, loop, connect_timeout)
        ),
    }
    pools.pool_classes_by_scheme = pool_classes
    return pools


class Stopped(gevent.GreenletExit):
    """Thrown into a reader to stop it; brings back when its connection was ended."""

    closed_at: float | None = None
    """`time.monotonic()`; None where the reader was not waiting for the bytes of a connection."""


class ConnectionReader(io.RawIOBase):
    """The bytes of a connection. Each read waits in the event loop first.

    Args:
        raw: what `socket.makefile` gave: the socket stays open for as long as this does.
        sock: the socket, TLS or not.
        loop: schedules the reads.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, loop: Loop) -> None:
        self._raw = raw
        self._sock = sock
        self._recv_into = sock.recv_into
        self._pending: Callable[[], int] | None = getattr(sock, "pending", None)
        self._ahead: Callable[[], int] | None = None
        if isinstance(sock, SSLTransport):
            # TLS within the TLS of a proxy: not a socket itself, it has one.
            self._sock = sock.socket
            self._pending = sock.sslobj.pending
            self._ahead = functools.partial(_read_ahead, sock)
        self._loop = loop
        self._readable = loop.readable(raw.fileno())
        self.is_answered = False
        """True once a byte of the answer has come."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        # The kernel does not report what TLS has decrypted already: at most the rest of a record.
        if self._pending is None or not self._pending():
            try:
                if self._ahead is not None and self._ahead():
                    self._loop.wait_turn()
                else:
                    self._readable.wait()
            except BaseException as error:  # stopped, or a limit has passed
                self.hang_up()
                if isinstance(error, Stopped):
                    # The connection is ended, and can be reported. The exception still has to pass
                    # many frames, which takes long: it waits in the data lane, behind control.
                    error.closed_at = time.monotonic()
                    self._loop.wait_turn()
                raise
        count = self._recv_into(buffer)
        if count:
            self.is_answered = True
        return count

    def hang_up(self) -> None:
        """End the connection, at once.

        The shutdown tells the peer. The reset that frees the socket takes as long again, so it
        follows after this end has been reported and acknowledged. A peer that has not begun to
        answer may not be reading: only a reset reaches it, so there it comes at once.
        """
        with contextlib.suppress(OSError):  # the peer has closed it already
            self._sock.shutdown(socket.SHUT_RDWR)
        if self.is_answered:
            self._loop.run_after_acks(self._free)
        else:
            self._free()

    def _free(self) -> None:
        # Runs in the hub, maybe after the reader has closed everything. Both of these know whether
        # they are closed; the number of the descriptor may be another socket's by then.
        self._release()
        self._sock.close()

    def close(self) -> None:
        self._release()
        super().close()

    def _release(self) -> None:
        if not self._raw.closed:
            self._readable.close()  # first: closing the socket makes its descriptor free for reuse
            self._raw.close()


def _read_ahead(sock: SSLTransport) -> int:
    """How many bytes have left the kernel and are not decrypted. Under a flood, there are always
    some, and the kernel may have nothing more to report."""
    outer: Any = sock.socket
    return sock.incoming.pending or outer.pending()


class _Response(http.client.HTTPResponse):
    def __init__(self, loop: Loop, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.reader = ConnectionReader(self.fp.detach(), sock, loop)
        self.fp = io.BufferedReader(self.reader)


class _Connection(HTTPConnection):
    plain: _Response | None = None
    """The response of `http.client` to the last request, which urllib3 does not expose."""
    kept_since: float | None = None
    """`time.monotonic()` when it was given back after an answer; None for a new connection."""

    def __init__(self, loop: Loop, connect_timeout: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loop = loop
        self._connect_timeout = connect_timeout
        self._sent_at = 0.0

    def connect(self) -> None:
        self.kept_since = None
        self._loop.wait_turn()
        time_is_up = "the time to connect is up"  # all of it: look-up, TCP, proxy, TLS
        with limited(self._loop, self._connect_timeout, ConnectTimeoutError(self, time_is_up)):
            super().connect()

    def request(self, *args: Any, **kwargs: Any) -> None:
        self.plain = None
        self._sent_at = time.monotonic()
        try:
            super().request(*args, **kwargs)
        except (BrokenPipeError, ConnectionResetError):
            raise  # urllib3 passes over these, and reads what the server may have said before
        except (OSError, http.client.HTTPException) as error:
            self._raise_if_kept(error)
            raise

    def getresponse(self) -> Any:
        try:
            return super().getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._raise_if_kept(error)
            raise

    def _raise_if_kept(self, error: Exception) -> None:
        is_answered = self.plain is not None and self.plain.reader.is_answered
        is_late = time.monotonic() - self._sent_at > _KEPT_END_SECONDS
        if self.kept_since is not None and not is_answered and not is_late:
            raise KeptConnectionEnded("kept connection ended", error) from error

    def close_idle(self) -> None:
        """Close it while no answer is due: the server sees an orderly end, not a reset."""
        sock: Any = self.sock
        if sock is not None:
            sock = sock.socket if isinstance(sock, SSLTransport) else sock
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _linger(is_on=False))
        self.close()

    def _respond(self, *args: Any, **kwargs: Any) -> _Response:
        self.plain = _Response(self._loop, *args, **kwargs)
        return self.plain

    response_class: Any = _respond


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    _is_retired = False
    _timer: Any = None
    """Runs while there are idle connections, for the oldest of them."""

    def __init__(self, make_connection: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ConnectionCls: Any = make_connection

    def retire(self) -> None:
        self._is_retired = True
        with contextlib.suppress(queue.Empty):
            while self.pool is not None:
                self._put_conn(self.pool.get(block=False))

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection: Any = super()._get_conn(timeout)
        if timeout == _NEW or _is_old(connection):  # the timer may be late
            connection.close_idle()  # it connects again when it is used
        return connection

    def _put_conn(self, conn: Any) -> None:
        if not self._is_retired:
            if conn is not None and not conn.is_closed:
                conn.kept_since = time.monotonic()
                self._set_timer(IDLE_SECONDS)
            super()._put_conn(conn)
        elif conn is not None:
            conn.close()

    def _set_timer(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = gevent.get_hub().loop.timer(seconds, ref=False)
            self._timer.start(self._close_old)

    def _close_old(self) -> None:
        self._timer.close()
        self._timer = None
        # Runs in the hub, so that no greenlet uses the queue meanwhile.
        kept = [] if self.pool is None else self.pool.queue
        since = []
        for place, connection in enumerate(list(kept)):
            if connection is None or connection.is_closed:
                continue
            if _is_old(connection):
                kept[place] = None
                connection.close_idle()
            else:
                since.append(connection.kept_since)
        if since:
            self._set_timer(max(0.0, min(since) + IDLE_SECONDS - time.monotonic()))


def _is_old(connection: _Connection) -> bool:
    since = connection.kept_since
    return since is not None and time.monotonic() - since >= IDLE_SECONDS


class _TlsPool(_Pool, HTTPSConnectionPool):
    pass
