"""The answers to health checks, the same on the public and the operator's port. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

import msgspec

PLAIN_TEXT = "text/plain; charset=utf-8"


class HealthAnswer(NamedTuple):
    """An HTTP response, without the parts that differ between the ports."""

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
        unready: returns why new clients should go elsewhere; None if they are welcome. Called for
            `/readyz` only.

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
