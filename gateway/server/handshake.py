"""What a request on the public port is answered with: the WebSocket's handshake, or a plain GET.

A page in the user's browser may send requests anywhere. So its origin must be ours, and the host a
name that is ours, since a foreign name may have been pointed at our address.
"""

from __future__ import annotations

import email.utils
import http
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from websockets.datastructures import Headers, MultipleValuesError
from websockets.http11 import Request, Response

from gateway.server import pages
from gateway.server.health import PLAIN_TEXT, health_answer
from gateway.wire.frames import PATH


class Gate:
    """Which requests are served.

    Args:
        host: the address that is listened on.
        allowed_origins: origins of web pages that may connect besides our own.
    """

    def __init__(self, host: str, allowed_origins: tuple[str, ...]) -> None:
        self._hosts = {"localhost", host.lower()} | {
            name for origin in allowed_origins if (name := urlsplit(origin).hostname)
        }
        self._origins = {origin.lower().rstrip("/") for origin in allowed_origins}

    def refusal(self, request: Request) -> str | None:
        """Why a request is refused by its Host or Origin, or None."""
        try:
            host_header = request.headers["Host"]
            origin = request.headers.get("Origin")
        except (KeyError, MultipleValuesError):
            return "a request needs one Host, and at most one Origin"
        try:
            host = urlsplit(f"//{host_header}").hostname or ""
        except ValueError:
            host = ""
        if host not in self._hosts and not _is_address(host):
            return f"host {host_header[:100]!r} is not served here (see --allow-origin)"
        if origin is None or origin.lower() in self._origins:
            return None
        if origin.lower().partition("://")[2] == host_header.lower():
            return None
        return f"pages of origin {origin[:100]!r} may not connect (see --allow-origin)"


def answer(
    request: Request, health: Callable[[], dict[str, object]], unready: Callable[[], str | None]
) -> Response:
    """Answer a request that is not for the WebSocket.

    Args:
        request: whose Host and Origin are ours.
        health: the fields of `/health`.
        unready: why no new clients are welcome, for `/readyz`; None when they are.
    """
    path = request.path.partition("?")[0]
    if request.method != "GET":
        refused = respond(http.HTTPStatus.METHOD_NOT_ALLOWED, "only GET is served here\n")
        refused.headers["Allow"] = "GET"
        return refused
    if (page := pages.answer(path, request.headers)) is not None:
        return page
    answered = health_answer(path, health, unready)
    if answered is not None:
        return respond(answered.status, answered.body.decode(), answered.content_type)
    text = f"nothing at {path[:100]!r}; the WebSocket is at {PATH}\n"
    return respond(http.HTTPStatus.NOT_FOUND, text)


def respond(status: http.HTTPStatus, body: str, content_type: str = PLAIN_TEXT) -> Response:
    """A response, after which the connection closes."""
    data = body.encode()
    headers = Headers(
        {
            "Date": email.utils.formatdate(usegmt=True),
            "Connection": "close",
            "Content-Length": str(len(data)),
            "Content-Type": content_type,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }
    )
    return Response(status.value, status.phrase, headers, data)


def _is_address(host: str) -> bool:
    # No name was resolved to get here, so no foreign name can have been pointed at us.
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
