"""The operator's port: what Prometheus scrapes, and whether the gateway lives and is ready.

Everything here gives way to the gateway's own work: a page of metrics takes 2 ms to write, so it is
written in slices, a family of metrics at a time.
"""

from __future__ import annotations

import logging
import socket
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent.pool
import gevent.pywsgi
import msgspec
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector

from actors.loop.slices import in_slices
from gateway.server.listening import Listening
from metrics.logs import get_logger

_MAX_CONNECTIONS = 64
"""A scraper or two, and health checks. More are left to the kernel's queue."""

_UNASKED_SECONDS = 5.0
"""How long a connection may say nothing that has not asked for metrics yet."""

_SILENCE_SECONDS = 120.0
"""How long one may that has. Prometheus keeps its own open between two scrapes, which are a minute
apart by default; no others are kept, and these only while half of the places are free."""

_STOP_SECONDS = 0.1
"""A page takes some milliseconds; connections that are kept have nothing to wait for."""

_END_OF_OPENMETRICS = b"# EOF\n"
_TEXT = "text/plain; charset=utf-8"

_log = get_logger("SYS")

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


class OpsServer:
    """`/metrics`, `/health`, `/livez` and `/readyz`, on a port that is not for the public.

    Args:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        registry: whose metrics are shown. Collectors may wait: they run in the scrape's greenlet.
        health: the fields of `/health`.
        unready: why no new clients may come; None when they may.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        health: Callable[[], dict[str, object]],
        unready: Callable[[], str | None],
    ) -> None:
        self._host = host
        self._registry = registry
        self._health = health
        self._unready = unready
        self._places = gevent.pool.Pool(_MAX_CONNECTIONS)
        self._server = _Server(
            (host, port),
            self._answer,
            log=None,
            error_log=logging.getLogger(__name__),
            handler_class=_Handler,
            spawn=self._places,
        )

    @property
    def port(self) -> int:
        """The port it listens on."""
        port = self._server.server_port
        assert port is not None
        return port

    @property
    def url(self) -> str:
        """Where Prometheus finds the metrics."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/metrics"

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be had.
        """
        self._server.start()

    def stop(self) -> None:
        """Stop listening, and end what is being answered."""
        self._server.stop(timeout=_STOP_SECONDS)

    def _answer(self, environ: dict[str, Any], start_response: _StartResponse) -> list[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        try:
            if method not in ("GET", "HEAD"):
                status, headers, body = "405 Method Not Allowed", _text(), b"only GET is served\n"
                headers.append(("Allow", "GET, HEAD"))
            else:
                status, headers, body = self._get(path, environ)
        except Exception as error:
            _log.error("Ops request failed", path=path, error=repr(error))
            status, headers, body = "500 Internal Server Error", _text(), b"failed, see the log\n"
        headers += [("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
        if path != "/metrics" or self._places.free_count() < _MAX_CONNECTIONS // 2:
            headers.append(("Connection", "close"))
        start_response(status, headers)
        return [b"" if method == "HEAD" else body]

    def _get(self, path: str, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        match path:
            case "/metrics":
                return self._metrics(environ)
            case "/livez":
                return "200 OK", _text(), b"ok\n"
            case "/readyz":
                why = self._unready()
                if why is None:
                    return "200 OK", _text(), b"ok\n"
                return "503 Service Unavailable", _text(), f"not ready: {why}\n".encode()
            case "/health":
                body = msgspec.json.encode(self._health())
                return "200 OK", [("Content-Type", "application/json")], body
        return "404 Not Found", _text(), b"here are /metrics, /health, /livez and /readyz\n"

    def _metrics(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        encode, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
        headers = [("Content-Type", content_type), ("Vary", "Accept, Accept-Encoding")]
        pages = in_slices(encode(_Family(family)) for family in self._registry.collect())
        parts = _joined(pages, is_openmetrics="openmetrics" in content_type)
        if gzip_accepted(environ.get("HTTP_ACCEPT_ENCODING", "")):
            headers.append(("Content-Encoding", "gzip"))
            parts = _gzipped(parts)
        return "200 OK", headers, b"".join(parts)


class _Family(Collector):
    """One family of metrics, as a registry of its own."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


class _Server(Listening, gevent.pywsgi.WSGIServer):
    pass


class _Handler(gevent.pywsgi.WSGIHandler):
    """One connection. A peer that says nothing for long is dropped."""

    def handle(self) -> None:
        self.socket.settimeout(_UNASKED_SECONDS)
        # Head and body are two writes: the second would wait 40 ms for the peer's ACK of the first.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().handle()

    def handle_one_response(self) -> None:
        self.socket.settimeout(_SILENCE_SECONDS)  # it has asked, and is closed if not for metrics
        super().handle_one_response()

    def _handle_client_error(self, ex: Exception) -> Any:
        if not isinstance(ex, ValueError):
            ex = ValueError(str(ex) or type(ex).__name__)  # else it prints a traceback
        return super()._handle_client_error(ex)  # type: ignore[misc]


def _joined(pages: Iterable[bytes], *, is_openmetrics: bool) -> Iterator[bytes]:
    """One page of several: it has one end, where there is one."""
    for page in pages:
        yield page.removesuffix(_END_OF_OPENMETRICS) if is_openmetrics else page
    if is_openmetrics:
        yield _END_OF_OPENMETRICS


def _gzipped(parts: Iterable[bytes]) -> Iterator[bytes]:
    gzip = zlib.compressobj(level=1, wbits=31)  # 31: with gzip's own head and end
    for part in parts:
        yield gzip.compress(part)
    yield gzip.flush()


def _text() -> list[tuple[str, str]]:
    return [("Content-Type", _TEXT)]
