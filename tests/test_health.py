"""What both ports answer to health checks."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import NoReturn

import pytest

from gateway.server.health import PLAIN_TEXT, HealthAnswer, health_answer


def must_not_be_called() -> NoReturn:
    raise AssertionError("this path does not need it")


def test_health_is_the_fields_as_json() -> None:
    answer = health_answer("/health", lambda: {"status": "ok", "sessions": 2}, must_not_be_called)
    assert answer is not None
    assert answer[:2] == (HTTPStatus.OK, "application/json")
    assert json.loads(answer.body) == {"status": "ok", "sessions": 2}


def test_a_process_that_answers_is_alive_whether_ready_or_not() -> None:
    answer = health_answer("/livez", must_not_be_called, must_not_be_called)
    assert answer == HealthAnswer(HTTPStatus.OK, PLAIN_TEXT, b"ok\n")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (None, HealthAnswer(HTTPStatus.OK, PLAIN_TEXT, b"ok\n")),
        (
            "draining",
            HealthAnswer(HTTPStatus.SERVICE_UNAVAILABLE, PLAIN_TEXT, b"not ready: draining\n"),
        ),
    ],
)
def test_ready_or_why_not(reason: str | None, expected: HealthAnswer) -> None:
    assert health_answer("/readyz", must_not_be_called, lambda: reason) == expected


@pytest.mark.parametrize("path", ["/", "/health/", "/healthz", "/livez/x", "/metrics", ""])
def test_any_other_path_gets_no_answer(path: str) -> None:
    assert health_answer(path, must_not_be_called, must_not_be_called) is None
