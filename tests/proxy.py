"""A small HTTP proxy in this process: forwards, or tunnels, or says no, or says nothing."""

from __future__ import annotations

import re
import socket
import ssl
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import gevent
import gevent.event
import gevent.server
import trustme

from tests.harness.client import wait_until


@dataclass(frozen=True)
class ProxyRequest:
    """What a client asked the proxy for."""

    method: str
    target: str
    """In absolute form, or for CONNECT a host and port (RFC 9112, section 3.2)."""
    headers: Mapping[str, str]
    """Names in lower case."""
    head: str
    """All of it, as it came."""
    closed: gevent.event.Event
    """Set when the connection it came over is closed."""


class Proxy:
    """A proxy on a free port of 127.0.0.1, to be used in a `with` block. Needs a patched process.

    Args:
        credentials: `user:password` that it wants to see; None lets everybody in.
        answer: what it says to every request in place of passing it on; empty is silence. It can
            hold `{authorization}`, which echoes what the client sent.
        authority: vouches for it, and it speaks TLS; None is without.
    """

    def __init__(
        self,
        *,
        credentials: str | None = None,
        answer: bytes | None = None,
        authority: trustme.CA | None = None,
    ) -> None:
        self.requests: list[ProxyRequest] = []
        self._credentials = credentials
        self._answer = answer
        self._scheme = "http"
        options: dict[str, Any] = {}
        if authority is not None:
            self._scheme = "https"
            context = options["ssl_context"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("127.0.0.1").configure_cert(context)
        self._server = gevent.server.StreamServer(("127.0.0.1", 0), self._serve, **options)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.stop(timeout=0)

    def url(self, credentials: str | None = None) -> str:
        """Its URL, with credentials that are quoted as they stand."""
        return f"{self._scheme}://{credentials + '@' if credentials else ''}127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        port: int | None = self._server.server_port
        assert port is not None
        return port

    def wait_request(self, number: int = 1) -> ProxyRequest:
        """The request of this number, from 1."""
        wait_until(lambda: len(self.requests) >= number, f"the proxy got {number} requests")
        return self.requests[number - 1]

    def _serve(self, client: socket.socket, _address: object) -> None:
        closed = gevent.event.Event()
        with client:
            while (head_and_body := _read_request(client)) is not None:
                request = _parse(head_and_body[0], closed)
                self.requests.append(request)
                self._answer_to(request, *head_and_body, client)
        closed.set()

    def _answer_to(
        self, request: ProxyRequest, head: bytes, body: bytes, client: socket.socket
    ) -> None:
        authorization = request.headers.get("proxy-authorization", "")
        answer = self._answer
        if self._credentials is not None and answer is None:
            wanted = "Basic " + b64encode(self._credentials.encode()).decode()
            if authorization != wanted:
                answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
        if answer is not None:
            client.sendall(answer.replace(b"{authorization}", authorization.encode()))
        elif request.method == "CONNECT":
            host, _, port = request.target.rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection Established\r\n\r\n")
                pipe(client, server)
        else:
            url = urlsplit(request.target)
            assert url.hostname is not None
            path = url.path + (f"?{url.query}" if url.query else "")
            with socket.create_connection((url.hostname, url.port or 80)) as server:
                server.sendall(head.replace(request.target.encode(), path.encode(), 1) + body)
                pipe(client, server)


def trust_both(authority: trustme.CA, ca_file: str, folder: Path) -> str:
    """A file of certificates that has a proxy's authority beside those of a file."""
    both = folder / "both.pem"
    both.write_bytes(Path(ca_file).read_bytes() + authority.cert_pem.bytes())
    return str(both)


def pipe(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes on both ways until one side closes."""
    ways = [gevent.spawn(_copy, one, other), gevent.spawn(_copy, other, one)]
    try:
        gevent.joinall(ways, count=1)
    finally:
        gevent.killall(ways)


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass


def _read_request(client: socket.socket) -> tuple[bytes, bytes] | None:
    """Head (with its blank line) and body; None where no more comes."""
    data = b""
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            return head + end, body
        try:
            more = client.recv(65536)
        except OSError:
            more = b""
        if not more:
            return None
        data += more


def _parse(head: bytes, closed: gevent.event.Event) -> ProxyRequest:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    fields = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    return ProxyRequest(method, target, headers, head.decode("latin-1"), closed)
