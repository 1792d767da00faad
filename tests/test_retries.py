"""The retry rules: which failures are retried, and after how long."""

from __future__ import annotations

import datetime
import email.utils
import random

import pytest
from urllib3 import HTTPHeaderDict

from llm import errors
from llm.chat import retries
from llm.chat.retries import is_requests_fault, may_retry, parse_retry_after, pause_seconds
from llm.errors import (
    BadStatusError,
    ConnectFailedError,
    IncompleteAnswerError,
    KeptConnectionEndedError,
    LimitPassedError,
    MalformedCallError,
    MalformedStreamError,
    NotAStreamError,
    ProviderReportedError,
    StreamError,
)

AGAIN = [429, 500, 501, 502, 503, 504, 520, 529]
NOT_AGAIN = [301, 302, 307, 400, 401, 402, 403, 404, 405, 408, 409, 413, 422, 451]
OTHERS: list[StreamError] = [
    IncompleteAnswerError("the provider closed the connection without an answer"),
    KeptConnectionEndedError("x"),
    MalformedCallError("x"),
    MalformedStreamError("x"),
    NotAStreamError("x"),
    ProviderReportedError("x"),
    StreamError("the gateway failed"),
]


def name(error: StreamError) -> str:
    return type(error).__name__


# Which ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", AGAIN)
def test_a_refusal_that_means_later_may_be_asked_again(status: int) -> None:
    assert may_retry(BadStatusError(status, "busy"))


@pytest.mark.parametrize("status", NOT_AGAIN)
def test_a_refusal_that_means_no_is_not_asked_again_whatever_it_says_of_waiting(
    status: int,
) -> None:
    assert not may_retry(BadStatusError(status, "no"))
    assert not may_retry(BadStatusError(status, "no", 1.0))


def test_a_connection_that_could_not_be_made_may_be_tried_again() -> None:
    assert may_retry(ConnectFailedError("no connection"))


@pytest.mark.parametrize("limit", ["connect", "first token", "idle", "total"])
def test_of_the_limits_only_that_to_connect_may_be_tried_again(limit: str) -> None:
    assert may_retry(LimitPassedError(limit, 1.0)) == (limit == "connect")


@pytest.mark.parametrize("error", OTHERS, ids=name)
def test_what_was_sent_and_went_wrong_is_not_asked_again(error: StreamError) -> None:
    assert not may_retry(error)


def test_these_are_all_the_errors_that_there_are() -> None:
    mentioned = {type(error) for error in OTHERS} | {
        BadStatusError,
        ConnectFailedError,
        LimitPassedError,
    }
    assert mentioned == {StreamError, *StreamError.__subclasses__()}
    assert all(kind.__module__ == errors.__name__ for kind in mentioned)


@pytest.mark.parametrize("status", [*AGAIN, *NOT_AGAIN])
def test_some_refusals_say_nothing_about_the_providers_health(status: int) -> None:
    assert is_requests_fault(BadStatusError(status, "no")) == (status in (400, 413, 422))


@pytest.mark.parametrize(
    "error", [*OTHERS, ConnectFailedError("x"), LimitPassedError("connect", 1.0)], ids=name
)
def test_no_other_error_is_the_requests_fault(error: StreamError) -> None:
    assert not is_requests_fault(error)


# How long ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "most"), [(0, 0.5), (1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 8.0), (60, 8.0)]
)
@pytest.mark.parametrize("error", [ConnectFailedError("x"), BadStatusError(503, "x")], ids=name)
def test_the_pause_doubles_up_to_a_most_and_half_of_it_is_chance(
    number: int, most: float, error: StreamError
) -> None:
    random.seed(1)
    pauses = [pause_seconds(number, error, 10.0) for _ in range(400)]
    assert most / 2 <= min(pauses) < 0.52 * most
    assert 0.98 * most < max(pauses) <= most
    assert len(set(pauses)) > 300


def test_a_provider_that_is_asked_again_for_ever_is_no_overflow() -> None:
    assert pause_seconds(1000, ConnectFailedError("x"), 10.0) <= 8.0


@pytest.mark.parametrize("number", [0, 1, 7])
@pytest.mark.parametrize(
    ("asked", "cap", "pause"),
    [
        (0.0, 10.0, 0.0),
        (0.25, 10.0, 0.25),
        (3.0, 10.0, 3.0),
        (10.0, 10.0, 10.0),
        (10.5, 10.0, 10.0),
        (1e9, 10.0, 10.0),
        (20.0, 30.0, 20.0),
        (5.0, 1.5, 1.5),
        (3600.0, 0.0, 3600.0),
    ],
)
def test_the_time_that_a_provider_asks_for_is_kept_to_up_to_the_cap(
    number: int, asked: float, cap: float, pause: float
) -> None:
    assert pause_seconds(number, BadStatusError(429, "later", asked), cap) == pause


def test_the_cap_is_for_what_the_provider_asks_and_not_for_our_own_pause() -> None:
    assert pause_seconds(4, BadStatusError(429, "later"), 0.001) >= 4.0


# Retry-After ------------------------------------------------------------------------------------


def parse(**fields: str) -> float | None:
    headers = HTTPHeaderDict()
    for field, value in fields.items():
        headers[field.replace("_", "-")] = value
    return parse_retry_after(headers)


def http_date(seconds: float) -> str:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return email.utils.format_datetime(at, usegmt=True)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0.0), ("1", 1.0), ("120", 120.0), (" 7 ", 7.0), ("007", 7.0), ("3600", 3600.0)],
)
def test_seconds_are_read(value: str, seconds: float) -> None:
    assert parse(Retry_After=value) == seconds


@pytest.mark.parametrize("name", ["Retry-After", "retry-after", "RETRY-AFTER"])
def test_a_headers_name_may_be_written_in_any_case(name: str) -> None:
    assert parse(**{name: "3"}) == 3.0


def test_a_date_is_read_as_the_time_until_then() -> None:
    seconds = parse(Retry_After=http_date(60))
    assert seconds is not None
    assert 55 < seconds <= 60


@pytest.mark.parametrize("seconds", [-1, -3600, -1e9])
def test_a_date_in_the_past_is_no_time_at_all(seconds: float) -> None:
    assert parse(Retry_After=http_date(seconds)) == 0.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0.0), ("250", 0.25), ("1500", 1.5), ("12.5", 0.0125), (" 20 ", 0.02)],
)
def test_milliseconds_are_read(value: str, seconds: float) -> None:
    assert parse(retry_after_ms=value) == pytest.approx(seconds)


def test_milliseconds_go_before_seconds() -> None:
    assert parse(Retry_After="30", retry_after_ms="1500") == 1.5


def test_a_refusal_that_does_not_say_has_no_time() -> None:
    assert parse() is None
    assert parse(X_RateLimit_Reset="3") is None


NONSENSE = [
    "",
    " ",
    "soon",
    "-1",
    "-0.5",
    "nan",
    "inf",
    "-inf",
    "Infinity",
    "1e400",
    "1,2",
    "3 s",
    "0x10",
    "１２三",
    "\x00",
    "Wed, 99 Foo 2026 99:99:99 GMT",
    "Wed, 21 Oct 99999999 07:28:00 GMT",
    "Wed, 21 Oct -1 07:28:00 GMT",
    "9" * 5000,
]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:24])
@pytest.mark.parametrize("field", ["Retry_After", "retry_after_ms"])
def test_nonsense_is_no_time_and_no_error(field: str, value: str) -> None:
    seconds = parse(**{field: value})
    assert seconds is None


@pytest.mark.parametrize("value", ["99999999", "9" * 300])
def test_a_huge_time_is_no_less_than_hours_and_no_error(value: str) -> None:
    seconds = parse(Retry_After=value)
    assert seconds is not None
    assert seconds >= 3600
    assert pause_seconds(0, BadStatusError(429, "later", seconds), 10.0) == 10.0


def test_the_bounds_of_the_pause_are_those_of_the_readme() -> None:
    # The tests through the gateway patch the first one.
    assert (retries._FIRST_SECONDS, retries._MAX_SECONDS) == (0.5, 8.0)


def test_milliseconds_that_are_nonsense_do_not_hide_good_seconds() -> None:
    assert parse(retry_after_ms="soon", Retry_After="3") == 3.0
