"""Connections and HTTP. Every wait has a limit; every failure is a `StepFailed` in plain words."""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import socket
import ssl
import time
from dataclasses import dataclass
from urllib.parse import SplitResult

import gevent

from gateway.client import open_socket, receive_bytes
from gateway.doctor.faults import OTHER_PROGRAM, StepFailed
from gateway.doctor.target import Address, Target, address_of
from gateway.doctor.wording import quoted, span

_MAX_PAGE_BYTES = 8 * 1024 * 1024
_BODY_SECONDS = 2.0
"""How long to wait for the rest of a page once its headers have come: some servers never close."""


def dial(target: Target, address: Address, until: float) -> socket.socket:
    """Connect to one of the target's ports.

    Args:
        target: whose certificates to trust.
        address: which of its ports.
        until: `time.monotonic()` when to give up.

    Raises:
        StepFailed: the connection failed; says why.
    """
    seconds = max(until - time.monotonic(), 0.001)
    tls = target.tls if address.is_tls else None
    try:
        # A socket's own timeout does not cover resolving the name.
        with gevent.Timeout(seconds, TimeoutError):
            return open_socket(address.host, address.port, tls=tls, timeout=seconds)
    except (OSError, UnicodeError) as error:
        raise _no_connection(target, address, error, seconds) from None


def _no_connection(
    target: Target, address: Address, error: Exception, seconds: float
) -> StepFailed:
    match error:
        case TimeoutError():
            return StepFailed(
                f"no connection to {address} within {span(seconds)}",
                "Is the address right, and is there a firewall in between?",
            )
        case ssl.SSLCertVerificationError():
            return StepFailed(
                f"the certificate of {address} is not trusted: {quoted(error.verify_message)}",
                "Give the authority that signed it as --ca-file, or use the host name of the "
                "certificate in --url.",
            )
        case ssl.SSLError():
            return StepFailed(
                f"{address} does not speak TLS: {quoted(error.reason or str(error))}",
                "For a server without TLS, --url starts with ws://.",
            )
        case socket.gaierror():
            return StepFailed(
                f"the name {address.host} has no address: {quoted(error.strerror or str(error))}",
                "Is the host in --url spelled right, and does the name server answer?",
            )
        case ConnectionRefusedError():
            return StepFailed(
                f"nothing listens on {address}",
                f"Is the daemon running ({target.prog} serve), and are its --host and --port those "
                "of --url?",
            )
        case _:
            words = getattr(error, "strerror", None) or str(error)
            return StepFailed(
                f"no connection to {address}: {quoted(words)}", "Is the host in --url right?"
            )


@dataclass(frozen=True)
class Page:
    """An HTTP response."""

    status: int
    body: bytes

    @property
    def said(self) -> str:
        """Its status and the start of its body."""
        words = quoted(self.body)
        return f"HTTP {self.status}" + (f": {words}" if words else "")


def get(target: Target, url: SplitResult, path: str, until: float) -> Page:
    """One GET on a connection of its own.

    Raises:
        StepFailed: the connection failed, or the answer is not HTTP.
    """
    head = f"GET {path} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n"
    with dial(target, address_of(url), until) as sock:
        with contextlib.suppress(OSError):  # the response, if there is one, says more
            sock.sendall(head.encode())
        return _read_page(sock, until)


def _read_page(sock: socket.socket, until: float) -> Page:
    began, raw, timed_out = time.monotonic(), bytearray(), False
    try:
        while not _is_whole(raw) and (data := receive_bytes(sock, until - time.monotonic())):
            raw += data
            if b"\r\n\r\n" in raw:
                until = min(until, time.monotonic() + _BODY_SECONDS)
    except TimeoutError:
        timed_out = True
    return page_of(bytes(raw), timed_out=timed_out, seconds=time.monotonic() - began)


def page_of(raw: bytes, *, timed_out: bool, seconds: float) -> Page:
    """Parse the HTTP response that a server has sent.

    Args:
        raw: its bytes.
        timed_out: whether the server might have sent more.
        seconds: how long the doctor waited for it.

    Raises:
        StepFailed: it is not a response.
    """
    if timed_out and b"\r\n\r\n" not in raw:
        what = f"only {quoted(raw)!r}" if raw else "nothing"
        raise StepFailed(
            f"it accepted the connection, and sent {what} for {span(seconds)}",
            "Either the daemon hangs (SIGUSR1 makes it log what it does), or another program "
            "that is not a web server uses this port.",
        )
    if not raw:
        raise StepFailed(
            "it accepted the connection, and closed it without sending anything",
            "Another program uses this port, or a proxy in front does not reach its daemon.",
        )
    response = http.client.HTTPResponse(_Bytes(raw))  # type: ignore[arg-type]
    try:
        response.begin()
        body = b"" if response.status == 101 else response.read()
    except http.client.IncompleteRead as error:
        body = error.partial
    except (http.client.HTTPException, ValueError):
        raise StepFailed(f"it does not speak HTTP: {quoted(raw)!r}", OTHER_PROGRAM) from None
    return Page(response.status, body)


class _Bytes:
    """As much of a socket as `HTTPResponse` needs."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _is_whole(raw: bytearray) -> bool:
    """Whether a page is complete, or can never become one."""
    is_http = raw.startswith(b"HTTP/"[: len(raw)])
    if b"\n" in raw:
        is_http = re.match(rb"HTTP/1\.[01] \d{3}\b", raw) is not None
    if not is_http or len(raw) > _MAX_PAGE_BYTES:
        return True
    head, gap, body = raw.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length:[ \t]*(\d{1,9})[ \t]*\r?$", head)
    return bool(gap) and length is not None and len(body) >= int(length[1])
