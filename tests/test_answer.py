"""The body of an answer, read past urllib3: it ends as urllib3's would."""

from __future__ import annotations

import http.client
import io
from typing import Any

import pytest
from urllib3 import HTTPResponse
from urllib3.exceptions import ProtocolError

from llm.http.answer import Answer


class Wire:
    """A socket from which a whole answer can be read."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._content)


class Pool:
    """Where connections are given back to; notes whether their answer was done with by then."""

    def __init__(self) -> None:
        self.given_back: list[bool] = []
        self.plain: http.client.HTTPResponse | None = None

    def _put_conn(self, _connection: object) -> None:
        assert self.plain is not None
        self.given_back.append(self.plain.isclosed())


class Connection:
    def close(self) -> None:
        pass


def answer_of(head: str, body: bytes) -> tuple[Answer, Pool]:
    wire: Any = Wire(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body)
    plain = http.client.HTTPResponse(wire)
    plain.begin()
    pool: Any = Pool()
    connection: Any = Connection()
    pool.plain = plain
    response = HTTPResponse(
        plain, dict(plain.headers), plain.status, preload_content=False, decode_content=False
    )
    response._pool, response._connection = pool, connection
    return Answer(response, plain), pool


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("Content-Length: 5", b"hello"),
        ("Transfer-Encoding: chunked", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
    ],
)
def test_the_connection_is_given_back_when_the_body_has_ended_and_the_answer_is_done_with(
    head: str, body: bytes
) -> None:
    answer, pool = answer_of(head, body)
    read = b""
    while data := answer.read1(100):
        read += data
        assert pool.given_back == []
    assert (read, pool.given_back) == (b"hello", [True])
    assert answer.read1(100) == b""
    assert pool.given_back == [True]


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("Content-Length: 9", b"hello"),
        ("Transfer-Encoding: chunked", b"5\r\nhello\r\n"),
        ("Transfer-Encoding: chunked", b"9\r\nhello"),
        ("Transfer-Encoding: chunked", b"5\r\nhello\r\nsoup\r\n"),
    ],
)
def test_a_body_that_breaks_off_is_an_error_and_its_connection_is_not_given_back(
    head: str, body: bytes
) -> None:
    answer, pool = answer_of(head, body)
    assert answer.read1(100) == b"hello"
    with pytest.raises(ProtocolError):
        answer.read1(100)
    assert pool.given_back == []
