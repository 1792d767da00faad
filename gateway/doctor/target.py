"""The daemon to test: its addresses, and the credentials for it."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from gateway.client import PATH, AccountAuth, ApiKeyAuth

DEFAULT_URL = f"ws://127.0.0.1:8000{PATH}"
DEFAULT_OPS_URL = "http://127.0.0.1:9464/metrics"

KEY_VARIABLE = "BARGEIN_DOCTOR_API_KEY"
ACCOUNT_VARIABLE = "BARGEIN_DOCTOR_ACCOUNT"
PASSWORD_VARIABLE = "BARGEIN_DOCTOR_PASSWORD"

_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


class UsageError(Exception):
    """A value on the command line or in the environment cannot be used."""


@dataclass(frozen=True)
class Address:
    """One port of a server."""

    host: str
    port: int
    is_tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Target:
    """The daemon to test.

    Args:
        url: of the WebSocket, in full.
        ops_url: of the metrics; None where it is unknown.
        is_ops_given: True if `ops_url` was given; False if it is the default, or unknown.
        auth: the credentials for REGISTER; never shown.
        tls: for both URLs, where they use TLS.
        prog: how people call this program, for advice.
    """

    url: SplitResult
    ops_url: SplitResult | None
    is_ops_given: bool
    auth: ApiKeyAuth | AccountAuth
    tls: ssl.SSLContext
    prog: str = "bargein"

    @property
    def shown(self) -> str:
        """The URL for people: without a query, which may hold a secret."""
        return f"{self.url.scheme}://{self.url.netloc}{self.url.path}"

    @property
    def usual(self) -> str:
        """The URL with bargein's usual path."""
        return f"{self.url.scheme}://{self.url.netloc}{PATH}"

    @property
    def address(self) -> Address:
        """Where it listens."""
        return address_of(self.url)

    @property
    def health_path(self) -> str:
        """The path of its health: with the prefix that the WebSocket's path has, if any."""
        return f"{self.url.path.removesuffix(PATH)}/health" if self.is_usual else "/health"

    @property
    def is_usual(self) -> bool:
        """Whether the path ends as the WebSocket's does."""
        return self.url.path.endswith(PATH)

    @property
    def is_default_port(self) -> bool:
        """Whether it is where a daemon listens by default."""
        return self.address.port == urlsplit(DEFAULT_URL).port

    @property
    def secrets(self) -> list[str]:
        """What must not be shown."""
        match self.auth:
            case ApiKeyAuth(api_key=key):
                found = [key]
            case AccountAuth(account=account, password=password):
                found = [password, account]
        return [secret for secret in found if secret]


def target_of(
    args: argparse.Namespace, environ: Mapping[str, str], prog: str = "bargein"
) -> Target:
    """The daemon to test, from the command line and the environment.

    Args:
        args: `url`, `ops_url` and `ca_file`.
        environ: holds the credentials.
        prog: how people call this program.

    Raises:
        UsageError: a value cannot be used.
    """
    url = websocket_url(args.url)
    is_here = url.hostname in ("localhost", "127.0.0.1", "::1")
    ops = args.ops_url or (DEFAULT_OPS_URL if is_here else None)
    try:
        tls = ssl.create_default_context(cafile=args.ca_file)
    except OSError as error:  # the parent of ssl.SSLError
        words = error.strerror or str(error)
        raise UsageError(f"cannot use --ca-file {args.ca_file}: {words}") from None
    metrics = ops_url(ops) if ops else None
    return Target(url, metrics, bool(args.ops_url), auth_of(environ), tls, prog)


def websocket_url(text: str) -> SplitResult:
    """The WebSocket's URL from what people give: http(s) too, and without scheme or path.

    Raises:
        UsageError: it is not a URL.
    """
    url = _split_url("--url", text, "ws", _SCHEMES)
    path = PATH if url.path in ("", "/") else url.path
    return url._replace(scheme=_SCHEMES[url.scheme], path=path, fragment="")


def ops_url(text: str) -> SplitResult:
    """The metrics' URL from what people give.

    Raises:
        UsageError: it is not a URL.
    """
    url = _split_url("--ops-url", text, "http", ("http", "https"))
    return url._replace(path="/metrics" if url.path in ("", "/") else url.path, fragment="")


def _split_url(flag: str, text: str, scheme: str, schemes: Iterable[str]) -> SplitResult:
    text = text.strip()
    try:
        url = urlsplit(text if "://" in text else f"{scheme}://{text}")
        has_credentials = "@" in url.netloc
        is_url = url.scheme in schemes and bool(url.hostname) and url.port != 0
        is_url = is_url and all("!" <= char <= "~" for char in url.geturl())
    except ValueError:
        is_url = has_credentials = False
    if has_credentials:
        raise UsageError(f"{flag} contains credentials: give them in the environment")
    if not is_url:
        raise UsageError(f"{flag} {text!r} is not a URL like {scheme}://host:port/path")
    return url


def address_of(url: SplitResult) -> Address:
    """The port that a URL names, or its scheme's own."""
    is_tls = url.scheme in ("wss", "https")
    return Address(url.hostname or "", url.port or (443 if is_tls else 80), is_tls)


def auth_of(environ: Mapping[str, str]) -> ApiKeyAuth | AccountAuth:
    """The credentials in the environment; an empty key where it has none.

    Raises:
        UsageError: an account without a password, or the other way round.
    """
    names = (KEY_VARIABLE, ACCOUNT_VARIABLE, PASSWORD_VARIABLE)
    key, account, password = (environ.get(name, "").strip() for name in names)
    if key or not (account or password):
        return ApiKeyAuth(key)
    if not (account and password):
        missing = PASSWORD_VARIABLE if account else ACCOUNT_VARIABLE
        raise UsageError(f"{missing} is missing: an account needs its password")
    return AccountAuth(account, password)
