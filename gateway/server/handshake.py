"""HTTP requests on the public port: which are refused, and the answers to plain GETs.

Any web page in the user's browser can send requests to this port. So the Origin must be ours or
allowed. The Host must be ours too, since anyone can make a foreign host name resolve to our address
(DNS rebinding).
"""

from __future__ import annotations

import email.utils
import http
from collections.abc import Callable

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from gateway.server import pages
from gateway.server.authority import is_own_origin, read_authority, read_origin
from gateway.server.health import PLAIN_TEXT, health_answer
from gateway.wire.frames import PATH


class Gate:
    """Decides which requests are served, by their Host and Origin.

    Args:
        host: the address that the server listens on.
        allowed_origins: origins of other web pages that may connect.
    """

    def __init__(self, host: str, allowed_origins: tuple[str, ...]) -> None:
        origins = (read_origin(one.removesuffix("/")) for one in allowed_origins)
        self._origins = {one for one in origins if one is not None}
        self._names = {"localhost", host.lower(), *(one.host for one in self._origins)}

    def refusal(self, request: Request) -> str | None:
        """Return why a request is refused; None if it is served."""
        hosts = request.headers.get_all("Host")
        origins = request.headers.get_all("Origin")
        if len(hosts) != 1 or len(origins) > 1:
            return "a request must have one Host header, and at most one Origin header"
        host = read_authority(hosts[0])
        # With an address instead of a name, DNS rebinding is not possible.
        if host is None or not (host.is_address or host.host in self._names):
            return f"host {hosts[0][:100]!r} is not served here (see --allow-origin)"
        if not origins:
            return None
        origin = read_origin(origins[0])
        if origin is not None and (origin in self._origins or is_own_origin(origin, host)):
            return None
        return f"web pages of origin {origins[0][:100]!r} may not connect (see --allow-origin)"


def answer(
    request: Request, health: Callable[[], dict[str, object]], unready: Callable[[], str | None]
) -> Response:
    """Answer a request that is not for the WebSocket.

    Args:
        request: a request that the gate does not refuse.
        health: returns the fields of `/health`.
        unready: returns why new clients should go elsewhere, for `/readyz`; None if they are
            welcome.
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
    text = f"not found: {path[:100]!r} (the path of the WebSocket is {PATH})\n"
    return respond(http.HTTPStatus.NOT_FOUND, text)


def respond(status: http.HTTPStatus, body: str, content_type: str = PLAIN_TEXT) -> Response:
    """Make a response after which the connection closes."""
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
