"""The web page at `/`, as answers to plain GETs: a fixed set of files, held in memory.

No path ever reaches the file system: what is asked for is looked up among the names that were found
in `gateway/web/` at the first request.
"""

from __future__ import annotations

import email.utils
import functools
import hashlib
import http
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from websockets.datastructures import Headers
from websockets.http11 import Response

WEB = Path(__file__).parents[1] / "web"

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""What else lies in that folder is for developers."""

_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self' ws: wss:",  # the settings may name another gateway
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No string becomes HTML, whatever a model says: the browser refuses, too.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "Content-Security-Policy": _SECURITY_POLICY,
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Always asked again, by its ETag: no page of one version meets a module of another.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    data: bytes
    content_type: str
    etag: str


def answer(path: str, request_headers: Headers) -> Response | None:
    """Answer a GET for one of the page's files.

    Args:
        path: as it was asked for, without the query.
        request_headers: of the request; an `If-None-Match` with the file's ETag gets 304.

    Returns:
        The response, after which the connection closes; None where there is no such file.
    """
    file = _files().get(path)
    if file is None:
        return None
    is_known = any(file.etag in value for value in request_headers.get_all("If-None-Match"))
    status = http.HTTPStatus.NOT_MODIFIED if is_known else http.HTTPStatus.OK
    headers = Headers(
        {
            "Date": email.utils.formatdate(usegmt=True),
            "Connection": "close",
            "ETag": file.etag,
            **_HEADERS,
        }
    )
    if is_known:
        return Response(status.value, status.phrase, headers)
    headers["Content-Length"] = str(len(file.data))
    headers["Content-Type"] = file.content_type
    return Response(status.value, status.phrase, headers, file.data)


@functools.cache
def _files() -> Mapping[str, _File]:
    files = {}
    for path in sorted(WEB.glob("*")):
        if content_type := _CONTENT_TYPES.get(path.suffix):
            data = path.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            files[f"/{path.name}"] = _File(data, content_type, etag)
    if "/index.html" in files:
        files["/"] = files["/index.html"]
    return MappingProxyType(files)
