"""Which requests the operator's port refuses, by their Host and Origin. Pure: no I/O.

The port has no credentials. Web pages in the operator's browser could ask it, from another origin
or through a host name that was pointed at this machine (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from gateway.server.authority import is_own_origin, read_authority, read_origin


class OpsGate:
    """Decides which requests are served.

    Args:
        host: the name or address that the port was told to listen on.
        bound: the address that it listens on. Only on a loopback address the Host is checked:
            beyond it, scrapers use names that the gateway cannot know.
    """

    def __init__(self, host: str, bound: str) -> None:
        address = ipaddress.ip_address(bound)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        self._is_loopback = (mapped or address).is_loopback
        self._names = {"localhost", host.lower()}

    def refusal(self, hosts: Sequence[str], origins: Sequence[str]) -> str | None:
        """Return why a request is refused; None if it is served.

        Args:
            hosts: the values of its Host headers. Old health checks (HTTP/1.0) send none.
            origins: the values of its Origin headers. Scrapers and health checks send none.
        """
        if len(hosts) > 1 or len(origins) > 1:
            return "a request must have at most one Host and one Origin header"
        host = read_authority(hosts[0]) if hosts else None
        is_served = host is not None and (host.is_address or host.host in self._names)
        if hosts and self._is_loopback and not is_served:
            return f"host {hosts[0][:100]!r} is not served here: use localhost or an address"
        if origins:
            origin = read_origin(origins[0])
            if origin is None or host is None or not is_own_origin(origin, host):
                return f"web pages of origin {origins[0][:100]!r} may not read this port"
        return None
