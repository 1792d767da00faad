"""What is asked for again, and when. Pure, but for the jitter.

Retried is what cost nobody anything: a connection that could not be made, and a refusal that says
"later". A POST that was sent and not answered is not: the provider may be generating, and billing.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Mapping

from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from llm.errors import BadStatusError, ConnectFailedError, LimitPassedError, StreamError

_FIRST_SECONDS = 0.5
_MAX_SECONDS = 8.0
"""The pause doubles from the first to the most; a person is waiting."""

_REQUESTS_FAULT = frozenset({400, 413, 422})
"""Statuses that say nothing about the provider's health: it does not like this request."""

_retry = Retry()


def may_retry(error: StreamError) -> bool:
    """Whether asking the same provider again may help, and costs nothing twice."""
    match error:
        case ConnectFailedError():
            return True
        case LimitPassedError():
            return error.limit == "connect"
        case BadStatusError():
            return error.status == 429 or error.status >= 500
        case _:
            return False


def is_requests_fault(error: StreamError) -> bool:
    """Whether the provider is well, and refused this request only."""
    return isinstance(error, BadStatusError) and error.status in _REQUESTS_FAULT


def is_about_usage(error: StreamError) -> bool:
    """Whether a provider says that it does not know of being asked for the usage. Some repeat the
    request in every refusal, so it may be about something else."""
    if not isinstance(error, BadStatusError) or error.status not in (400, 422):
        return False
    return "stream_options" in error.body or "include_usage" in error.body


def pause_seconds(number: int, error: StreamError, retry_after_cap: float) -> float:
    """How long to wait before asking again.

    Args:
        number: of retries before this one.
        error: what happened last.
        retry_after_cap: most seconds that a Retry-After is obeyed for; 0 is no limit.
    """
    if isinstance(error, BadStatusError) and error.retry_after is not None:
        return min(error.retry_after, retry_after_cap or math.inf)
    # Half of it at random: those who failed together shall not come back together.
    return min(_FIRST_SECONDS * 2.0**number, _MAX_SECONDS) * random.uniform(0.5, 1.0)


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a refusal asks to wait; None where it does not say, or not in numbers.

    Args:
        headers: `Retry-After` as RFC 9110, section 10.2.3 has it, or OpenAI's `retry-after-ms`.
    """
    milliseconds, value = headers.get("retry-after-ms"), headers.get("Retry-After")
    for text, read in ((milliseconds, _parse_milliseconds), (value, _retry.parse_retry_after)):
        if text is None:
            continue
        with contextlib.suppress(ValueError, OverflowError, InvalidHeader):
            seconds = float(read(text))
            if 0 <= seconds < math.inf:
                return seconds
    return None


def _parse_milliseconds(text: str) -> float:
    return float(text) / 1000
