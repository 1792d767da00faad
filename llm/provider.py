"""What is known of a provider: where it is, how it is asked, how long it may take."""

from __future__ import annotations

import enum
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit, urlunsplit

import urllib3.util

_COMPLETIONS = "/chat/completions"

_VERSION = re.compile(r"v\d+\w*")
"""A part of a path that says which version of an API follows, as in `/v1` or `/v1beta/openai`."""

_OUR_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "cache-control",
        "connection",
        "content-length",
        "content-type",
        "transfer-encoding",
    }
)
"""What the stream itself stands on."""

_OUR_FIELDS = frozenset(
    {"messages", "model", "n", "stream", "stream_options", "tools", "functions"}
)

_SECRET_CHARS = 8

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_HEADER_VALUE = re.compile(r"[ -~\t]*")


class StopsOnClose(enum.Enum):
    """Whether a provider stops to generate, and to bill, when its connection is closed."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Provider:
    """Where generations come from.

    Args:
        base_url: any form that `completions_url` takes.
        model: name of the model that is asked for.
        api_key: None sends none.
        key_header: header that the key goes into as it is; None sends it as a bearer token.
        headers: more headers for every request.
        extra_body: more fields for the body of every request.
        include_usage: whether to ask for the usage at the end of a stream.
        stops_on_close: what it does when its connection is closed.
        connect_timeout: seconds until the connection stands, names resolved, proxy and TLS
            included; 0 is no limit.
        first_token_timeout: seconds from a POST to the first token of any kind; 0 is no limit.
        idle_timeout: seconds from one event to the next after that; 0 is no limit.
        retries: how often it is asked again before it has failed.
        retry_after_cap: most seconds that its Retry-After makes us wait; 0 is no limit.
        proxy: URL of the HTTP proxy on the way to it, credentials included.
        ca_file: PEM file of trusted certificate authorities; None takes the usual ones.
        pool_size: idle connections that are kept: as many as generations run at once.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    key_header: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    include_usage: bool = True
    stops_on_close: StopsOnClose = StopsOnClose.UNKNOWN
    connect_timeout: float = 5.0
    first_token_timeout: float = 60.0
    idle_timeout: float = 60.0
    retries: int = 2
    retry_after_cap: float = 10.0
    proxy: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    pool_size: int = 1000

    @property
    def name(self) -> str:
        """What it is called in a log: its host and port, as its URL has them."""
        return urlsplit(self.base_url.strip()).netloc

    @property
    def secrets(self) -> tuple[str, ...]:
        """What nobody may read, the longest first: one may be part of another."""
        # With their scheme ("Bearer …") and without. Short ones are switches and numbers, and parts
        # of any text.
        values = [part for value in self.headers.values() for part in (value, *value.split())]
        # Some take their key in the query; Azure's `api-version` is there, too.
        query = parse_qsl(urlsplit(self.base_url.strip()).query)
        found = [value for name, value in query if name != "api-version"]
        values += [part for value in found for part in (value, quote(value, safe=""))]
        parts = [self.api_key, *(value for value in values if len(value) >= _SECRET_CHARS)]
        if self.proxy:
            parts += _credentials(self.proxy)
        return tuple(sorted({part for part in parts if part}, key=len, reverse=True))


def _credentials(url: str) -> list[str]:
    """The password in a URL, as it stands there, as it is meant, and as a proxy is told it."""
    parsed = urlsplit(url)
    if not parsed.password:
        return []
    pair = f"{unquote(parsed.username or '')}:{unquote(parsed.password)}"
    return [parsed.password, unquote(parsed.password), b64encode(pair.encode()).decode()]


def completions_url(base_url: str) -> str:
    """The URL to POST to, of whatever people have at hand.

    A path that ends in `/chat/completions` is taken as it stands. Otherwise that is added, with
    `/v1` before it where the path names no version, and is not one of Azure's deployments. A query
    is kept (Azure's `api-version`).

    Raises:
        ValueError: it is no URL of an HTTP server, in words that say why.
    """
    url = base_url.strip()
    try:
        parsed = urlsplit(url)
        host, port = parsed.hostname, parsed.port
        urllib3.util.parse_url(url)
    except ValueError as error:
        raise ValueError(f"is not the URL of a server: {error}") from None
    if parsed.scheme not in ("http", "https"):
        raise ValueError("is no URL: it must begin with http:// or https://")
    if parsed.username is not None:
        raise ValueError("holds credentials: the key comes from the environment only")
    if not host or port == 0 or any(char.isspace() for char in url):
        raise ValueError("is not the URL of a server")
    path = parsed.path.rstrip("/")
    if not path.endswith(_COMPLETIONS):
        parts = path.split("/")
        if not any(_VERSION.fullmatch(part) or part == "deployments" for part in parts):
            path += "/v1"
        path += _COMPLETIONS
    return urlunsplit(SplitResult(parsed.scheme, parsed.netloc, path, parsed.query, ""))


def check_headers(headers: Mapping[str, str]) -> None:
    """Look whether headers can be sent along.

    Raises:
        ValueError: one cannot, in words that name it. A value is never shown.
    """
    for name in headers:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a header")
        if name.lower() in _OUR_HEADERS:
            raise ValueError(f"{name} cannot be set: the gateway needs its own")
    check_header_values(headers)


def check_header_values(headers: Mapping[str, str]) -> None:
    """Look whether the values of headers can be sent.

    Raises:
        ValueError: one cannot, in words that name the header. A value is never shown.
    """
    for name, value in headers.items():
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"the value of {name} holds characters that no header has")


def check_extra_body(fields: Mapping[str, Any]) -> None:
    """Look whether fields can be added to a request's body.

    Raises:
        ValueError: one cannot, in words that name it.
    """
    for name in fields:
        if name in _OUR_FIELDS:
            raise ValueError(f"{name!r} cannot be set: the gateway sets it")


def check_proxy(url: str) -> None:
    """Look whether this is the URL of an HTTP proxy.

    Raises:
        ValueError: it is not. The URL is not shown, since it may hold a password.
    """
    try:
        parsed = urlsplit(url)
        usable = parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("is not the URL of an HTTP proxy, as http://host:port")
