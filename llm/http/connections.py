"""Connections to a provider: each read goes through the event loop, and a close is felt at once.

A socket that always has data never yields by itself, so one flooding provider would starve
everybody: with events, but also with endless trailers or `100 Continue`, which `http.client` reads
in loops of its own. Here no byte is read before the loop has had its turn (`actors/loop/lanes.py`).
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
from urllib3.exceptions import ConnectTimeoutError
from urllib3.util.ssltransport import SSLTransport

from actors.loop.lanes import Readable, lanes
from llm.http.answer import Answer


class Connections:
    """The connections to one provider, for one kind of request.

    Straight on urllib3: `requests.Session` would look for proxies and for a netrc in place of our
    key at each request, read the body of a redirect, and keep cookies that tie the users of one
    gateway together.

    Args:
        url: where to POST.
        proxy: URL of the HTTP proxy on the way, with its credentials; None goes straight.
        ca_file: PEM file of trusted certificate authorities; None takes certifi's.
        connect_timeout: seconds until a connection stands; 0 is no limit.
        pool_size: how many idle ones are kept. Never waits for one: a waiter could not be stopped.

    Raises:
        ValueError: a URL is none.
        OSError: the certificates cannot be read.
    """

    def __init__(
        self,
        url: str,
        proxy: str | None,
        ca_file: str | None,
        connect_timeout: float,
        pool_size: int,
    ) -> None:
        # No limit for reading, which the watchdog bounds.
        self._timeout = urllib3.Timeout(connect=connect_timeout or None, read=None)
        # Linger 0: a close is a reset. A provider that does not read (its request body still
        # waits in our buffer) would not notice anything else.
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        options: dict[str, Any] = {
            "maxsize": pool_size,
            "block": False,
            "socket_options": [
                *HTTPConnection.default_socket_options,
                (socket.SOL_SOCKET, socket.SO_LINGER, linger),
            ],
        }
        if proxy is not None or url.startswith("https:"):
            options["ssl_context"] = _trusting(ca_file or certifi.where())
        # Looked up once: a manager does so at each request, for a tenth of all that one takes.
        pool = _make_pools(proxy, options).connection_from_url(url)
        assert isinstance(pool, _Retiring)
        self._pool = pool
        is_forwarded = proxy is not None and url.startswith("http:")
        # RFC 9112, section 3.2.2: a proxy that forwards is told the whole URL.
        self._target = url if is_forwarded else urllib3.util.parse_url(url).request_uri

    def post(self, body: bytes, headers: Mapping[str, str], on_sent: Callable[[], None]) -> Answer:
        """POST once, and return when the headers of the answer are there.

        Args:
            body: JSON.
            headers: all of them but its length.
            on_sent: called when all of it was handed to the kernel.

        Raises:
            urllib3.exceptions.HTTPError: it did not get that far.
        """

        def told_when_sent() -> Iterator[bytes]:
            yield body
            on_sent()

        response = self._pool.urlopen(
            "POST",
            self._target,
            body=told_when_sent(),
            headers={**headers, "Content-Length": str(len(body))},
            redirect=False,
            assert_same_host=False,
            retries=False,
            timeout=self._timeout,
            preload_content=False,
            decode_content=False,
        )
        connection: Any = response.connection
        return Answer(response, connection.plain)

    def retire(self) -> None:
        """Close the idle connections, and keep none from now on. Requests can still be made."""
        self._pool.retire()

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()


def _trusting(ca_file: str) -> ssl.SSLContext:
    """What trusts these authorities. All connections share it until the file is another one.

    Reading the authorities takes longer than connecting, and holds the loop up.
    """
    found = Path(ca_file).stat()
    return _read_authorities(ca_file, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=8)
def _read_authorities(ca_file: str, _mtime_ns: int, _size: int) -> ssl.SSLContext:
    context = urllib3.util.create_urllib3_context()
    context.load_verify_locations(ca_file)
    return context


def _make_pools(proxy: str | None, options: dict[str, Any]) -> urllib3.PoolManager:
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
    pools.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return pools


class Stopped(gevent.GreenletExit):
    """Thrown into a reader that is to stop; learns when its connection was ended."""

    closed_at: float | None = None
    """`time.monotonic()`; None where the reader was not waiting for a connection's bytes."""


class ConnectionReader(io.RawIOBase):
    """The bytes of a connection, none of them before the loop has had its turn."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw = raw  # while it is open, so is the socket
        self._sock = sock
        self._recv_into = sock.recv_into
        self._pending: Callable[[], int] | None = getattr(sock, "pending", None)
        self._ahead: Callable[[], int] | None = None
        if isinstance(sock, SSLTransport):
            # TLS within the TLS of a proxy only looks like a socket, and has one.
            self._sock = sock.socket
            self._pending = sock.sslobj.pending
            self._ahead = functools.partial(_read_ahead, sock)
        self._lanes = lanes()
        self._readable = Readable(raw.fileno())
        self._is_answered = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        # What TLS has decrypted already the kernel does not know of; it is one record at most.
        if self._pending is None or not self._pending():
            try:
                if self._ahead is not None and self._ahead():
                    self._lanes.wait_turn()
                else:
                    self._readable.wait()
            except BaseException as error:  # stopped, or too late
                self.hang_up()
                if isinstance(error, Stopped):
                    # Whoever wanted it need not wait until the exception has found its way out
                    # through all that stands on this connection.
                    error.closed_at = time.monotonic()
                    self._lanes.wait_turn()
                raise
        self._is_answered = True
        return self._recv_into(buffer)

    def hang_up(self) -> None:
        """End the connection, at once.

        The peer hears of the end by the shutdown, so the reset that frees the socket, which takes
        as long again, comes right behind the reports of this. One that has not begun to answer may
        not be reading: it would hear nothing but the reset.
        """
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._is_answered:
            self._lanes.run_after_acks(self._free)
        else:
            self._free()

    def _free(self) -> None:
        # In the hub, maybe when the reader has closed all of it: these know that, where a
        # descriptor by its number could be somebody else's by now.
        self._let_go()
        self._sock.close()

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        if not self._raw.closed:
            self._readable.close()  # before the descriptor is free for somebody else
            self._raw.close()


def _read_ahead(sock: SSLTransport) -> int:
    """How many bytes of further records have left the kernel: never none, under a flood."""
    outer: Any = sock.socket
    return sock.incoming.pending or outer.pending()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(ConnectionReader(self.fp.detach(), sock))


class _Remembering(HTTPConnection):
    """Knows what it has read the last answer with: urllib3 keeps it to itself."""

    plain: _Response | None = None

    def _respond(self, *args: Any, **kwargs: Any) -> _Response:
        self.plain = _Response(*args, **kwargs)
        return self.plain

    response_class: Any = _respond


class _Connection(_Remembering):
    def connect(self) -> None:
        lanes().wait_turn()
        with _connect_limit(self):
            super().connect()


class _TlsConnection(_Remembering, HTTPSConnection):
    def connect(self) -> None:
        lanes().wait_turn()
        with _connect_limit(self):
            super().connect()


def _connect_limit(connection: HTTPConnection) -> gevent.Timeout:
    """Bound all of it: urllib3 counts each address anew, and neither names nor a proxy's answer."""
    error = ConnectTimeoutError(connection, "the time to connect is up")
    return gevent.Timeout(connection.timeout, error)


class _Retiring(HTTPConnectionPool):
    _is_retired = False

    def retire(self) -> None:
        self._is_retired = True
        with contextlib.suppress(queue.Empty):
            while self.pool is not None:
                self._put_conn(self.pool.get(block=False))

    def _put_conn(self, conn: Any) -> None:
        if not self._is_retired:
            super()._put_conn(conn)
        elif conn is not None:
            conn.close()


class _Pool(_Retiring):
    ConnectionCls = _Connection


class _TlsPool(_Retiring, HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
