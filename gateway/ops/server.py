"""The operator's port: metrics for Prometheus, and health checks.

A page of metrics takes 2 ms to write. It is written in slices, one metric family at a time, so that
an interrupt never waits for a whole scrape.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.registry import Collector

from actors.loop.slices import in_slices
from gateway.ops.connections import OpsListener
from gateway.ops.gate import OpsGate
from gateway.server.health import PLAIN_TEXT, health_answer
from metrics.logs import get_logger

_STOP_SECONDS = 0.1
"""Time for a page in progress when the server stops: a page takes some milliseconds."""

_END_OF_OPENMETRICS = b"# EOF\n"

_log = get_logger("SYS")

_StartResponse = Callable[[str, list[tuple[str, str]]], object]

_Response = tuple[HTTPStatus, list[tuple[str, str]], bytes]
"""Status, headers, body."""


class OpsServer:
    """Serves `/metrics`, `/health`, `/livez` and `/readyz`, on a port that is not public.

    Args:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        registry: the metrics to show. A collector may block: it runs in the scrape's greenlet.
        health: returns the fields of `/health`.
        unready: returns why new clients should go elsewhere, or None.
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
        self._gate: OpsGate | None = None
        self._server = OpsListener((host, port), self._answer, logging.getLogger(__name__))

    @property
    def port(self) -> int:
        """The port it listens on."""
        port = self._server.server_port
        assert port is not None
        return port

    @property
    def url(self) -> str:
        """The URL of the metrics."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/metrics"

    def start(self) -> None:
        """Start listening.

        Raises:
            OSError: the address is not available.
        """
        self._server.start()
        self._gate = OpsGate(self._host, self._server.server_host or "")

    def stop(self) -> None:
        """Stop listening, and close what is still open."""
        self._server.stop(timeout=_STOP_SECONDS)

    def _answer(self, environ: dict[str, Any], start_response: _StartResponse) -> list[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        try:
            status, headers, body = self._respond(method, path, environ)
        except Exception as error:
            _log.error("Ops request failed", path=path, error=repr(error))
            status, headers, body = _text(
                HTTPStatus.INTERNAL_SERVER_ERROR, b"internal error: see the gateway's log\n"
            )
        headers += [("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
        if status != HTTPStatus.OK or path != "/metrics" or self._server.is_half_full:
            # Only scrapers keep their connections, while half of the places are free.
            headers.append(("Connection", "close"))
        start_response(f"{status.value} {status.phrase}", headers)
        return [b"" if method == "HEAD" else body]

    def _respond(self, method: str, path: str, environ: dict[str, Any]) -> _Response:
        assert self._gate is not None
        refusal = self._gate.refusal(environ["bargein.hosts"], environ["bargein.origins"])
        if refusal is not None:
            address, port = environ["REMOTE_ADDR"], environ["REMOTE_PORT"]
            _log.warning("Refused connection", peer=f"{address}:{port}", reason=refusal)
            return _text(HTTPStatus.FORBIDDEN, f"{refusal}\n".encode())
        if method not in ("GET", "HEAD"):
            status, headers, body = _text(
                HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD are supported\n"
            )
            return status, [*headers, ("Allow", "GET, HEAD")], body
        if path == "/metrics":
            return self._metrics(environ)
        answer = health_answer(path, self._health, self._unready)
        if answer is not None:
            return answer.status, [("Content-Type", answer.content_type)], answer.body
        paths = b"not found: this port serves /metrics, /health, /livez and /readyz\n"
        return _text(HTTPStatus.NOT_FOUND, paths)

    def _metrics(self, environ: dict[str, Any]) -> _Response:
        encode, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
        headers = [("Content-Type", content_type), ("Vary", "Accept, Accept-Encoding")]
        pages = in_slices(encode(_OneFamily(family)) for family in self._registry.collect())
        parts = _join(pages, is_openmetrics="openmetrics" in content_type)
        if gzip_accepted(environ.get("HTTP_ACCEPT_ENCODING", "")):
            headers.append(("Content-Encoding", "gzip"))
            parts = _gzip(parts)
        return HTTPStatus.OK, headers, b"".join(parts)


class _OneFamily(Collector):
    """A metric family as a registry of its own, so that it can be encoded alone."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _join(pages: Iterable[bytes], *, is_openmetrics: bool) -> Iterator[bytes]:
    """Make one page of the families' pages; OpenMetrics ends with one end mark."""
    for page in pages:
        yield page.removesuffix(_END_OF_OPENMETRICS) if is_openmetrics else page
    if is_openmetrics:
        yield _END_OF_OPENMETRICS


def _gzip(parts: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(level=1, wbits=31)  # 31: with gzip's header and trailer
    for part in parts:
        yield compressor.compress(part)
    yield compressor.flush()


def _text(status: HTTPStatus, body: bytes) -> _Response:
    return status, [("Content-Type", PLAIN_TEXT)], body
