"""The retry rules: which failures are retried, and after how long. No I/O.

A failure is retried if the provider did no work for it: no connection could be made, or the
provider refused and may accept later (429, 5xx). A POST that was sent and got no answer is never
retried: the provider may be generating, and billing. (What was lost in a kept connection is sent
again, but is no retry: `generation.py`.)
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
"""The pause doubles with each retry, up to the maximum. Short, since a person is waiting."""

_REQUESTS_FAULT = frozenset({400, 413, 422})
"""Statuses that reject this one request; the provider itself is healthy."""

_retry = Retry()


def may_retry(error: StreamError) -> bool:
    """Whether to ask the same provider again: it may help, and nothing is billed twice."""
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
    """Whether the request is at fault: a healthy provider rejected it."""
    return isinstance(error, BadStatusError) and error.status in _REQUESTS_FAULT


def is_about_usage(error: StreamError) -> bool:
    """Whether a provider seems to reject `stream_options`. Not certain: some providers quote the
    request in every refusal."""
    if not isinstance(error, BadStatusError) or error.status not in (400, 422):
        return False
    return "stream_options" in error.body or "include_usage" in error.body


def pause_seconds(number: int, error: StreamError, retry_after_cap: float) -> float:
    """How long to wait before the next retry, in seconds.

    Args:
        number: how many retries there were before; from 0.
        error: the last failure.
        retry_after_cap: longest Retry-After that is obeyed, in seconds; 0 is no limit.
    """
    if isinstance(error, BadStatusError) and error.retry_after is not None:
        return min(error.retry_after, retry_after_cap or math.inf)
    # Half of it is random, so that requests that failed together do not retry together.
    return min(_FIRST_SECONDS * 2.0**number, _MAX_SECONDS) * random.uniform(0.5, 1.0)


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """How long a refusal asks to wait, in seconds; None where it names no valid time.

    Args:
        headers: of the answer: OpenAI's `retry-after-ms`, else `Retry-After` (RFC 9110, section
            10.2.3).
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
