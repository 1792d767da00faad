"""The values of Host and Origin headers, read strictly. Pure: no I/O.

A URL parser is the wrong tool for them. It finds a host in `localhost#.evil.com`, in
`evil@127.0.0.1`, and in what has tabs inside. These headers hold nothing but a host and a port (RFC
9110, section 7.2; RFC 6454, section 6.2), so anything else is refused.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

# RFC 3986, section 3.2.2. What an IPv6 address is exactly, `ipaddress` knows.
_AUTHORITY = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]"
    r"|(?P<name>(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")

_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
"""The schemes that a page or a client of this gateway may have, and the ports that they imply."""

_MAX_PORT = 65535


class Authority(NamedTuple):
    """A host and its port.

    Attributes:
        host: a name in lower case, or an address in its usual form, without brackets.
        port: None if it is not given.
        is_address: whether the host is an IPv4 or IPv6 address, and not a name.
    """

    host: str
    port: int | None
    is_address: bool


class Origin(NamedTuple):
    """Where a web page came from.

    Attributes:
        scheme: in lower case.
        host: as in `Authority`.
        port: the one that is given or that the scheme implies; None if there is neither.
    """

    scheme: str
    host: str
    port: int | None


def read_authority(text: str) -> Authority | None:
    """Read `host` or `host:port`, such as the value of a Host header.

    Returns:
        None if the text is anything else: the port must be a number from 1 to 65535, an IPv6
        address must be in brackets, and an IPv4 address must have four decimal numbers.
    """
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return None
    port = None if found["port"] is None else int(found["port"])
    if port is not None and not 1 <= port <= _MAX_PORT:
        return None
    if found["ipv6"] is not None:
        try:
            return Authority(str(ipaddress.IPv6Address(found["ipv6"])), port, is_address=True)
        except ValueError:
            return None
    try:
        return Authority(str(ipaddress.IPv4Address(found["name"])), port, is_address=True)
    except ValueError:
        return Authority(found["name"].lower(), port, is_address=False)


def read_origin(text: str) -> Origin | None:
    """Read the value of an Origin header. Returns None if it is no origin, as for `null`."""
    scheme, separator, rest = text.partition("://")
    if not separator or _SCHEME.fullmatch(scheme) is None:
        return None
    authority = read_authority(rest)
    if authority is None:
        return None
    scheme = scheme.lower()
    port = _DEFAULT_PORTS.get(scheme) if authority.port is None else authority.port
    return Origin(scheme, authority.host, port)


def is_own_origin(origin: Origin, host: Authority) -> bool:
    """Whether a page of this origin came from the host that the request names.

    The schemes for the web and for WebSockets count: a proxy in front may add TLS, and some clients
    send the URL of their WebSocket as Origin.
    """
    if origin.scheme not in _DEFAULT_PORTS or origin.host != host.host:
        return False
    return origin.port == (_DEFAULT_PORTS[origin.scheme] if host.port is None else host.port)
