"""The web page at `/` and its client library, as answers to plain GETs.

The files in `gateway/web/` are read once, at the start, and kept in memory. A requested
path is looked up among their names and never reaches the file system.

The library, `gateway/web/client/`, has two addresses. The page imports it from `/client/`, like its
own modules. Other pages import it from an address with the version of `package.json`, such as
`/client/0.3.0/`. The files of a version never change, so browsers may cache them.
"""

from __future__ import annotations

import email.utils
import functools
import hashlib
import http
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from websockets.datastructures import Headers
from websockets.http11 import Response

WEB = Path(__file__).parents[1] / "web"
CLIENT = WEB / "client"

_CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Files of other types in these folders are for developers and are not served."""

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
        # The browser refuses to parse a string as HTML, whatever text a model sends.
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
}

_REVALIDATE = "no-cache"
"""Browsers check the ETag each time, so a page never runs with modules of another version."""

_KEEP = "public, max-age=31536000, immutable"
"""For addresses that contain the version: browsers cache these files for a year."""


@dataclass(frozen=True)
class _File:
    data: bytes
    content_type: str
    etag: str
    cache_control: str = _REVALIDATE


def answer(path: str, request_headers: Headers) -> Response | None:
    """Answer a GET for one of the files.

    Args:
        path: requested path, without the query.
        request_headers: headers of the request. If `If-None-Match` has the file's ETag, the
            response is a 304.

    Returns:
        The response, after which the connection closes; None if there is no such file.
    """
    file = load().get(path)
    if file is None:
        return None
    is_known = any(file.etag in value for value in request_headers.get_all("If-None-Match"))
    status = http.HTTPStatus.NOT_MODIFIED if is_known else http.HTTPStatus.OK
    headers = Headers(
        {
            "Date": email.utils.formatdate(usegmt=True),
            "Connection": "close",
            "ETag": file.etag,
            "Cache-Control": file.cache_control,
            **_HEADERS,
        }
    )
    if is_known:
        return Response(status.value, status.phrase, headers)
    headers["Content-Length"] = str(len(file.data))
    headers["Content-Type"] = file.content_type
    return Response(status.value, status.phrase, headers, file.data)


@functools.cache
def load() -> Mapping[str, _File]:
    """Read the files, by the path of their address. Only the first call reads."""
    page, library = _read(WEB), _read(CLIENT)
    files = {f"/{name}": file for name, file in page.items()}
    files |= {f"/client/{name}": file for name, file in library.items()}
    if library:
        version = json.loads((CLIENT / "package.json").read_bytes())["version"]
        for name, file in library.items():
            files[f"/client/{version}/{name}"] = replace(file, cache_control=_KEEP)
    if "/index.html" in files:
        files["/"] = files["/index.html"]
    return MappingProxyType(files)


def _read(folder: Path) -> dict[str, _File]:
    """Read the files in a folder that are served, by name."""
    files = {}
    for path in sorted(folder.glob("*")):
        if content_type := _CONTENT_TYPES.get(path.suffix):
            data = path.read_bytes()
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            files[path.name] = _File(data, content_type, etag)
    return files
