"""Connections to a provider: each read goes through the event loop, and a close is felt at once.

A socket that always has data never yields by itself, so one flooding provider would starve
everybody: with events, but also with endless trailers or `100 Continue`, which `http.client` reads
in loops of its own. Here no byte is read before the loop has had its turn (`llm/lanes.py`).
"""

from __future__ import annotations

import http.client
import io
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import gevent
import requests.adapters
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from llm.lanes import lanes

_READ = 1
"""The event of gevent's `loop.io` for "readable"."""


class Connections(requests.adapters.HTTPAdapter):
    """A pool of connections.

    Args:
        pool_size: how many idle ones are kept. Never waits for one: a waiter could not be stopped.
    """

    def __init__(self, pool_size: int) -> None:
        super().__init__(
            pool_connections=1, pool_maxsize=pool_size, pool_block=False, max_retries=0
        )

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        # Linger 0: a close is a reset. A provider that does not read (its request body still
        # waits in our buffer) would not notice anything else.
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        kwargs["socket_options"] = [
            *HTTPConnection.default_socket_options,
            (socket.SOL_SOCKET, socket.SO_LINGER, linger),
        ]
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def close(self) -> None:
        """Close the idle connections."""
        # `PoolManager.clear` only forgets its pools, and leaves them to the collector.
        pools = self.poolmanager.pools
        for key in list(pools.keys()):
            pools[key].close()
        super().close()


class _Reader(io.RawIOBase):
    """The bytes of a connection, none of them before the loop has had its turn."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw = raw
        self._sock = sock
        self._pending: Callable[[], int] | None = getattr(sock, "pending", None)
        self._lanes = lanes()
        self._readable = gevent.get_hub().loop.io(raw.fileno(), _READ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        # What TLS has decrypted already the kernel does not know of; it is one record at most.
        if self._pending is None or not self._pending():
            try:
                self._lanes.wait_readable(self._readable)
            except BaseException:
                # Stopped, or too late. Whoever wanted that need not wait until the exception has
                # found its way out through all that stands on this connection.
                self._let_go()
                self._sock.close()
                raise
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        if not self._raw.closed:
            self._readable.close()  # before the descriptor is free for somebody else
            self._raw.close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Reader(self.fp.detach(), sock))


class _Connection(HTTPConnection):
    response_class = _Response


class _TlsConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection
