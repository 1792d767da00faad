"""The settings of one provider, and checks that its URL, headers and fields can be used."""

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
"""The part of a path that names an API version, as in `/v1` or `/v1beta/openai`."""

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
"""Headers that the gateway sets itself, since reading the stream depends on them."""

_OUR_FIELDS = frozenset(
    {"messages", "model", "n", "stream", "stream_options", "tools", "functions"}
)
"""Fields of the body that the gateway sets itself."""

_SECRET_CHARS = 8
"""A header value of at least this length is treated as a secret; shorter ones are switches and
numbers, which occur in any text."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_HEADER_VALUE = re.compile(r"[ -~\t]*")


class StopsOnClose(enum.Enum):
    """Whether a provider stops generating, and billing, when its connection is closed."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Provider:
    """The settings of one provider.

    Args:
        base_url: any form that `completions_url` accepts.
        model: name of the model to ask for.
        api_key: None sends no key.
        key_header: name of the header that carries the bare key; None sends it as a bearer token.
        headers: further headers of every request.
        extra_body: further fields in the body of every request.
        include_usage: whether to ask for the token counts at the end of a stream.
        stops_on_close: what it does when its connection is closed.
        connect_timeout: seconds until the connection is made, with name resolution, proxy and TLS;
            0 is no limit.
        first_token_timeout: seconds from a POST to the first token of any kind; 0 is no limit.
        idle_timeout: seconds between two events after that; 0 is no limit.
        retries: how often a failed request is retried.
        retry_after_cap: longest Retry-After that is obeyed, in seconds; 0 is no limit.
        proxy: URL of the HTTP proxy to go through, credentials included; None connects directly.
        ca_file: PEM file of trusted certificate authorities; None trusts certifi's.
        pool_size: how many idle connections are kept; ideally the most concurrent generations.
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
        """Its name in logs: host and port, as in its URL."""
        return urlsplit(self.base_url.strip()).netloc

    @property
    def secrets(self) -> tuple[str, ...]:
        """The texts to redact wherever they occur, longest first, since one may contain another."""
        # Each value as a whole and word by word: "Bearer KEY" must redact KEY as well.
        values = [part for value in self.headers.values() for part in (value, *value.split())]
        # Some providers take the key in the query, where Azure has its `api-version`.
        query = parse_qsl(urlsplit(self.base_url.strip()).query)
        found = [value for name, value in query if name != "api-version"]
        values += [part for value in found for part in (value, quote(value, safe=""))]
        parts = [self.api_key, *(value for value in values if len(value) >= _SECRET_CHARS)]
        if self.proxy:
            parts += _credentials(self.proxy)
        return tuple(sorted({part for part in parts if part}, key=len, reverse=True))


def _credentials(url: str) -> list[str]:
    """The password in a URL: as written, percent-decoded, and as a Basic credential."""
    parsed = urlsplit(url)
    if not parsed.password:
        return []
    pair = f"{unquote(parsed.username or '')}:{unquote(parsed.password)}"
    return [parsed.password, unquote(parsed.password), b64encode(pair.encode()).decode()]


def completions_url(base_url: str) -> str:
    """The URL to POST to, from any of the forms in which people know a provider's URL.

    A path that ends in `/chat/completions` is kept as it is. Otherwise `/chat/completions` is
    appended, after `/v1` where the path neither names a version nor an Azure deployment. A query
    is kept (Azure's `api-version`).

    Raises:
        ValueError: it is not the URL of an HTTP server; the text says why, and follows the name
            of the setting ("--llm-url is not …").
    """
    url = base_url.strip()
    try:
        parsed = urlsplit(url)
        host, port = parsed.hostname, parsed.port
        urllib3.util.parse_url(url)
    except ValueError as error:
        raise ValueError(f"is not the URL of a server: {error}") from None
    if parsed.scheme not in ("http", "https"):
        raise ValueError("is not a valid URL: it must start with http:// or https://")
    if parsed.username is not None:
        raise ValueError("contains credentials: the key is set separately")
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
    """Check that headers can be added to requests.

    Raises:
        ValueError: one cannot; the text names the header and never shows its value.
    """
    for name in headers:
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid header name")
        if name.lower() in _OUR_HEADERS:
            raise ValueError(f"{name} cannot be set: the gateway sets it")
    check_header_values(headers)


def check_header_values(headers: Mapping[str, str]) -> None:
    """Check that the values of headers can be sent.

    Raises:
        ValueError: one cannot; the text names the header and never shows its value.
    """
    for name, value in headers.items():
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"the value of {name} contains characters that a header cannot carry")


def check_extra_body(fields: Mapping[str, Any]) -> None:
    """Check that fields can be added to the body of requests.

    Raises:
        ValueError: one cannot; the text names it.
    """
    for name in fields:
        if name in _OUR_FIELDS:
            raise ValueError(f"{name!r} cannot be set: the gateway sets it")


def check_proxy(url: str) -> None:
    """Check that this is the URL of an HTTP proxy.

    Raises:
        ValueError: it is not. The text does not show the URL, since it may contain a password.
    """
    try:
        parsed = urlsplit(url)
        usable = parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("is not the URL of an HTTP proxy, such as http://host:port")
