"""What the public port and the operator's port both answer to health checks. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

import msgspec

PLAIN_TEXT = "text/plain; charset=utf-8"


class HealthAnswer(NamedTuple):
    """One HTTP response, without what differs between the ports."""

    status: HTTPStatus
    content_type: str
    body: bytes


def health_answer(
    path: str,
    health: Callable[[], Mapping[str, object]],
    unready: Callable[[], str | None],
) -> HealthAnswer | None:
    """Answer a GET for `/health`, `/livez` or `/readyz`.

    Args:
        path: of the request, without its query.
        health: returns the fields of `/health`; called for that path only.
        unready: returns why new clients should go elsewhere, None while they are welcome; called
            for `/readyz` only.

    Returns:
        The answer; None for any other path.
    """
    match path:
        case "/health":
            body = msgspec.json.encode(health())
            return HealthAnswer(HTTPStatus.OK, "application/json", body)
        case "/livez":
            return HealthAnswer(HTTPStatus.OK, PLAIN_TEXT, b"ok\n")
        case "/readyz":
            reason = unready()
            if reason is None:
                return HealthAnswer(HTTPStatus.OK, PLAIN_TEXT, b"ok\n")
            body = f"not ready: {reason}\n".encode()
            return HealthAnswer(HTTPStatus.SERVICE_UNAVAILABLE, PLAIN_TEXT, body)
    return None
