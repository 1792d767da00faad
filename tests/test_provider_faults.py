"""Every fault of a provider and what the client gets for it, row by row, through the whole gateway.

`Stand.check` runs after every test and checks what holds for all faults: one line in the log, and
the key nowhere.
"""

from __future__ import annotations

import json
import re
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent.server
import pytest
import trustme

from actors.session.history import BROKEN_MARK
from actors.words import OnNewRequest
from gateway.app import Gateway
from llm.chat.generation import GenerationSettings
from llm.provider import StopsOnClose
from tests.harness import scripts
from tests.harness.client import wait_until
from tests.harness.provider_process import ProviderProcess
from tests.harness.scripts import Script, chunk, done, finish_event, send, text_event
from tests.proxy import Proxy, pipe, trust_both
from tests.stand import ANSWER, KEY, MakeStand, Stand, refusal, stands

SHORT_SECONDS = 0.15
"""A limit that shall pass."""

PAUSE_SECONDS = 0.01
"""Of a first retry, where the pause is not the point."""

STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def make_stand(
    make_gateway: Callable[..., Gateway], provider: ProviderProcess
) -> Iterator[MakeStand]:
    with stands(make_gateway, provider) as make:
        yield make


@pytest.fixture
def stand(make_stand: MakeStand) -> Stand:
    """A gateway with default settings."""
    return make_stand()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", PAUSE_SECONDS)


@pytest.fixture
def closed_port() -> Iterator[socket.socket]:
    """A port that refuses connections until `listen` is called."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken


def url_of(sock: socket.socket) -> str:
    return f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


def begun(*events: bytes) -> Script:
    """An answer that has begun, with these events after its text."""
    return [*scripts.opening(), *scripts.tokens([ANSWER]), *scripts.chunks(events)]


# Answers that fail --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A fault, and what it gives.

    Args:
        steps: what the provider does.
        detail: pattern of all of the error's detail.
        text: what the client gets before.
        code: the error's.
        settings: of the provider.
        usage: whether there may be a bill: not where the provider refused.
        is_whole: whether the answer's body ends in order, so that its connection may be kept.
    """

    steps: Script
    detail: str
    text: str = ""
    code: str = "INTERNAL_ERROR"
    settings: Mapping[str, Any] = field(default_factory=dict)
    usage: bool = True
    is_whole: bool = False


INCOMPLETE = "incomplete answer: the provider's stream ended without a finish reason"
CHUNK_HEAD = scripts.sse_head()
NOT_A_STREAM = (
    "the provider's answer is not a stream: its content type is {}, not text/event-stream"
)
PAGE = b"<!doctype html><title>Sign in to the network</title>"


def status_row(status: int) -> Row:
    said = "You asked \N{LEFT DOUBLE QUOTATION MARK}wrongly\N{RIGHT DOUBLE QUOTATION MARK}"
    return Row(
        refusal(status, said),
        f"the provider answered {status}: {said} \\*\\*\\*",
        usage=False,
    )


def plain(*pieces: bytes, **head: Any) -> Script:
    """A head, then these pieces, each in a write, then an orderly close."""
    return [send(scripts.sse_head(**head)), *map(send, pieces), scripts.close()]


FAULTS: Mapping[str, Row] = {
    **{str(status): status_row(status) for status in (400, 401, 403, 404, 405, 409, 413, 422)},
    "status with text": Row(
        scripts.http_error(401, f" key {KEY} is bad\n"),
        r"the provider answered 401: key \*\*\* is bad",
        usage=False,
    ),
    "status with an error that is a text": Row(
        scripts.http_error(404, {"error": f"no model for {KEY}"}),
        r"the provider answered 404: no model for \*\*\*",
        usage=False,
    ),
    "status with a detail": Row(
        scripts.http_error(422, {"detail": [{"loc": ["body", "model"], "msg": KEY}]}),
        r'the provider answered 422: \[\{"loc":\["body","model"\],"msg":"\*\*\*"\}\]',
        usage=False,
    ),
    "status without a body": Row(
        [send(scripts.head(403, {"Content-Length": "0", "X-Echo": KEY}))],
        "the provider answered 403",
        usage=False,
    ),
    "status with a long body": Row(
        scripts.http_error(400, KEY * 2000),
        r"the provider answered 400: (\*\*\*){166}\*\*",
        usage=False,
    ),
    "status whose reason holds the key": Row(
        [send(f"HTTP/1.1 401 {KEY}\r\nContent-Length: 2\r\n\r\nno".encode())],
        "the provider answered 401: no",
        usage=False,
    ),
    **{
        f"redirect {status}": Row(
            scripts.http_error(status, f"see {KEY}", {"Location": f"/v1/elsewhere?key={KEY}"}),
            f"the provider answered {status}: redirects are not followed",
            usage=False,
        )
        for status in (301, 302, 303, 307, 308)
    },
    "no headers": Row(
        scripts.no_headers(),
        "the provider exceeded the first token timeout of 0.15 s",
        code="REQUEST_TIMEOUT",
        settings={"first_token_timeout": SHORT_SECONDS},
    ),
    "half a head": Row(
        [send(CHUNK_HEAD[:40]), scripts.hang()],
        "the provider exceeded the first token timeout of 0.15 s",
        code="REQUEST_TIMEOUT",
        settings={"first_token_timeout": SHORT_SECONDS},
    ),
    "no token after headers": Row(
        scripts.headers_only(),
        "the provider exceeded the first token timeout of 0.15 s",
        code="REQUEST_TIMEOUT",
        settings={"first_token_timeout": SHORT_SECONDS},
    ),
    "nothing but comments and a role": Row(
        [
            *scripts.opening(),
            scripts.repeat([send(chunk(b": wait\n\n")), scripts.sleep(0.02)]),
        ],
        "the provider exceeded the first token timeout of 0.15 s",
        code="REQUEST_TIMEOUT",
        settings={"first_token_timeout": SHORT_SECONDS},
    ),
    "silence between events": Row(
        scripts.idle_mid_stream([ANSWER]),
        "the provider exceeded the idle timeout of 0.15 s",
        text=ANSWER,
        code="REQUEST_TIMEOUT",
        settings={"idle_timeout": SHORT_SECONDS},
    ),
    "silence inside a chunk": Row(
        scripts.stalled_inside_chunk([ANSWER]),
        "the provider exceeded the idle timeout of 0.15 s",
        text=ANSWER,
        code="REQUEST_TIMEOUT",
        settings={"idle_timeout": SHORT_SECONDS},
    ),
    "end with neither": Row(scripts.truncated([ANSWER]), INCOMPLETE, text=ANSWER),
    "proper end with neither": Row(
        [*begun(), send(scripts.last_chunk())], INCOMPLETE, text=ANSWER, is_whole=True
    ),
    "end before any event": Row(
        [send(CHUNK_HEAD), send(scripts.last_chunk())],
        INCOMPLETE,
        is_whole=True,
    ),
    "end with a length that was not reached": Row(
        plain(text_event(ANSWER), content_length=100_000), INCOMPLETE, text=ANSWER
    ),
    "end of HTTP/1.0": Row(plain(text_event(ANSWER), http10=True), INCOMPLETE, text=ANSWER),
    "end inside an event": Row(
        [*begun(), send(chunk(b'data: {"choices": [{"del')), scripts.close()],
        rf"{INCOMPLETE}( \(.+\))?",
        text=ANSWER,
    ),
    "end of compression": Row(
        [
            send(scripts.sse_head(gzip=True)),
            *map(send, map(chunk, scripts.gzip_pieces([text_event(ANSWER)]))),
            scripts.close(),
        ],
        INCOMPLETE,
        text=ANSWER,
    ),
    "close after the POST": Row(
        [scripts.close()], "the provider closed the connection without an answer: .+"
    ),
    "reset after the POST": Row(
        [scripts.reset()], "the provider closed the connection without an answer: .+"
    ),
    "an answer that is not HTTP": Row(
        [send(f"{KEY} says hello\r\n\r\n".encode()), scripts.close()],
        "the provider's answer is not HTTP",
    ),
    "a chunk that is none": Row(
        [*begun(), send(f"{KEY}\r\n".encode()), scripts.close()],
        INCOMPLETE,
        text=ANSWER,
    ),
    "error in the stream": Row(
        [*begun(scripts.error_event(f"overloaded {KEY}")), send(scripts.last_chunk())],
        r"the provider reported: overloaded \*\*\*",
        text=ANSWER,
    ),
    "error in the stream, before any text": Row(
        scripts.error_in_stream(f"overloaded {KEY}"), r"the provider reported: overloaded \*\*\*"
    ),
    "error in the stream, as a text": Row(
        begun(scripts.event({"error": f"bad {KEY}"}), done()),
        r"the provider reported: bad \*\*\*",
        text=ANSWER,
    ),
    "error in the stream, and silence": Row(
        [*begun(scripts.error_event("overloaded")), scripts.hang()],
        "the provider reported: overloaded",
        text=ANSWER,
    ),
    "error in the stream, without an event": Row(
        [
            *begun(json.dumps({"error": {"message": f"bad {KEY}"}}).encode() + b"\n"),
            send(scripts.last_chunk()),
        ],
        r"the provider reported: bad \*\*\*",
        text=ANSWER,
        is_whole=True,
    ),
    "an event called error": Row(
        begun(b"event: error\n" + scripts.error_event(f"overloaded {KEY}"), done()),
        r"the provider reported: overloaded \*\*\*",
        text=ANSWER,
    ),
    "not JSON": Row(
        begun(b"data: " + KEY.encode() + b"\n\n", done()), "malformed stream: .+", text=ANSWER
    ),
    "half of JSON": Row(
        begun(b'data: {"choices": [{"delta"\n\n', done()), "malformed stream: .+", text=ANSWER
    ),
    "JSON that is no chunk": Row(
        begun(scripts.event({"key": KEY}), done()), "malformed stream: .+", text=ANSWER
    ),
    "JSON that is no object": Row(
        begun(scripts.event(KEY), done()), "malformed stream: .+", text=ANSWER
    ),
    "content of another type": Row(
        begun(scripts.delta_event({"content": [KEY]}), done()), "malformed stream: .+", text=ANSWER
    ),
    "invalid UTF-8": Row(
        begun(b'data: {"choices": [{"delta": {"content": "\xff\xfe"}}]}\n\n', done()),
        "malformed stream: .+",
        text=ANSWER,
    ),
    "UTF-8 that was cut by an event": Row(
        begun(text_event("你").replace("你".encode(), "你".encode()[:2]), done()),
        "malformed stream: .+",
        text=ANSWER,
    ),
    "a line over 4 MiB": Row(
        scripts.one_long_line(4 * 1024 * 1024 + 1), "malformed stream: an event of over 4 MiB"
    ),
    "bad compression": Row(
        [
            send(scripts.sse_head(gzip=True)),
            send(chunk(text_event(ANSWER))),
            send(scripts.last_chunk()),
        ],
        "malformed stream: bad compression",
    ),
    "a web page": Row(scripts.not_sse(), re.escape(NOT_A_STREAM.format("text/html")), usage=False),
    "a whole completion": Row(
        scripts.http_error(200, {"choices": [{"message": {"content": ANSWER + KEY}}]}),
        re.escape(NOT_A_STREAM.format("application/json")),
        usage=False,
        is_whole=True,
    ),
    "an error with status 200": Row(
        scripts.http_error(200, {"error": {"message": f"model is loading {KEY}"}}),
        re.escape(NOT_A_STREAM.format("application/json") + " (model is loading ***)"),
        usage=False,
        is_whole=True,
    ),
    "a content type with the key": Row(
        [send(scripts.sse_head(content_length=2, content_type=f"text/x; k={KEY}"), b"no")],
        re.escape(NOT_A_STREAM.format("text/x; k=***")),
        usage=False,
    ),
    "no content type": Row(
        [send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno")],
        re.escape(NOT_A_STREAM.format("missing")),
        usage=False,
    ),
    "no content": Row(
        [send(scripts.head(204, {"X-Echo": KEY}))], "the provider answered 204", usage=False
    ),
    "arguments that are not JSON": Row(
        scripts.call_answer(scripts.call_events("f", f"{{{KEY}"), [ANSWER]),
        "malformed function call of 'f': its arguments are not valid JSON: .+",
        text=ANSWER,
    ),
    "arguments that are no object": Row(
        scripts.call_answer(scripts.call_events("f", '["a", 1]'), [ANSWER]),
        "malformed function call of 'f': its arguments are not a JSON object",
        text=ANSWER,
    ),
    "arguments that are null": Row(
        scripts.call_answer(scripts.call_events("f", "null")),
        "malformed function call of 'f': its arguments are not a JSON object",
    ),
    "arguments in the legacy form that are no object": Row(
        scripts.call_answer(scripts.legacy_call_events("f", '"x"'), reason="function_call"),
        "malformed function call of 'f': its arguments are not a JSON object",
    ),
    "one good call, and one that is none": Row(
        scripts.call_answer(
            [
                *scripts.call_events("good", "{}"),
                *scripts.call_events("bad", "[]", index=1, call_id="b"),
            ]
        ),
        "malformed function call of 'bad': its arguments are not a JSON object",
    ),
    "a call without a name": Row(
        scripts.call_answer(scripts.call_events("", "{}")),
        "malformed function call: it has no name",
    ),
    "a call whose name is the key": Row(
        scripts.call_answer(scripts.call_events(f"{KEY} {KEY}", "{}")),
        r"malformed function call of '\*\*\* \*\*\*': this is not a valid function name",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_one_error_that_names_it_and_one_post(
    make_stand: MakeStand, fault: str
) -> None:
    row = FAULTS[fault]
    stand = make_stand(**row.settings)
    request_id = stand.ask(row.steps)
    payload = stand.wait_failed(request_id, row.code)
    assert re.fullmatch(row.detail, payload["error_detail"]), payload["error_detail"]
    assert stand.text_of(request_id) == row.text
    assert [frame for frame in stand.client.frames if "function_call" in frame.payload] == []
    [post] = stand.posts(request_id)
    if not (row.is_whole or payload["error_detail"].startswith("the provider answered")):
        stand.provider.wait_closed(post.conn)
    assert (payload["usage"] is not None) == row.usage
    assert stand.lines("Retrying generation") == []
    assert stand.sample("llm_posts_total") == 1
    # And the next one is answered.
    assert stand.complete(scripts.answer([ANSWER]))["finish_reason"] == "stop"


def test_the_text_before_a_fault_stays_in_the_history_and_is_marked(stand: Stand) -> None:
    first = stand.ask(scripts.truncated([ANSWER]))
    stand.wait_failed(first)
    second = stand.ask(scripts.answer(["Yes."]))
    stand.wait_completed(second)
    [post] = stand.posts(second)
    assert post.body["messages"] == [
        {"role": "user", "content": stand.scripts[first]},
        {"role": "assistant", "content": ANSWER + BROKEN_MARK},
        {"role": "user", "content": stand.scripts[second]},
    ]


def test_a_reset_in_the_middle_of_an_answer_is_an_incomplete_answer(stand: Stand) -> None:
    key = stand.provider.unique("key")  # a reset overtakes what was not read yet
    request_id = stand.ask([*begun(), scripts.wait(key), scripts.reset()])
    stand.client.wait_text(request_id)
    stand.provider.release(key)
    detail = stand.wait_failed(request_id)["error_detail"]
    assert re.fullmatch(rf"{INCOMPLETE} \(.*reset.*\)", detail), detail
    assert len(stand.posts(request_id)) == 1


def test_an_error_body_that_hangs_gives_its_status_in_time(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.attempt._ERROR_BODY_SECONDS", 0.05)
    head = scripts.head(401, {"Content-Length": "1000"})
    detail = stand.fail([send(head, f"bad {KEY}".encode()), scripts.hang()])
    assert detail == "the provider answered 401: bad ***"


def test_the_wait_for_the_first_token_is_not_the_wait_between_events(
    make_stand: MakeStand,
) -> None:
    stand = make_stand(idle_timeout=SHORT_SECONDS)
    pause = scripts.sleep(2 * SHORT_SECONDS)
    stand.complete([*scripts.opening(), pause, *scripts.tokens([ANSWER]), *scripts.ending()])
    stand = make_stand(first_token_timeout=SHORT_SECONDS)
    key = stand.provider.unique("key")
    request_id = stand.ask([*begun(), scripts.wait(key), pause, *scripts.ending()])
    stand.client.wait_text(request_id)
    stand.provider.release(key)
    stand.wait_completed(request_id)


# The connection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1])
def test_a_connection_that_does_not_come_about_passes_the_connect_limit(
    make_stand: MakeStand, provider: ProviderProcess, retries: int
) -> None:
    if provider.ports["full"] is None:
        pytest.skip("the full port needs Linux")
    stand = make_stand(
        base_url=provider.full_base_url, connect_timeout=SHORT_SECONDS, retries=retries
    )
    began_at = time.monotonic()
    request_id = stand.ask(scripts.answer([ANSWER]))
    payload = stand.wait_failed(request_id, "REQUEST_TIMEOUT")
    assert time.monotonic() - began_at >= (1 + retries) * SHORT_SECONDS
    assert payload["error_detail"] == "the provider exceeded the connect timeout of 0.15 s"
    assert payload["usage"] is None
    assert len(stand.lines("Retrying generation")) == retries


def test_a_tls_handshake_that_hangs_passes_the_connect_limit(
    make_stand: MakeStand, provider: ProviderProcess
) -> None:
    stand = make_stand(base_url=provider.mute_base_url, connect_timeout=SHORT_SECONDS, retries=1)
    since = time.monotonic()
    payload = stand.wait_failed(stand.ask(scripts.answer([ANSWER])), "REQUEST_TIMEOUT")
    assert payload["error_detail"] == "the provider exceeded the connect timeout of 0.15 s"
    for number in (1, 2):
        provider.wait_closed(provider.wait_connected(number, "mute", since).conn)
    assert len(stand.lines("Retrying generation")) == 1


def test_a_certificate_that_nobody_vouches_for_is_no_connection(
    make_stand: MakeStand, provider: ProviderProcess
) -> None:
    stand = make_stand(base_url=provider.tls_base_url, ca_file=None, retries=0)
    detail = stand.fail(scripts.answer([ANSWER]))
    assert re.match("no connection to the provider: .*certificate verify failed", detail)
    assert stand.sample("llm_posts_total") == 0


def test_a_connection_that_is_refused_is_tried_so_many_times_and_no_more(
    make_stand: MakeStand, closed_port: socket.socket
) -> None:
    stand = make_stand(base_url=url_of(closed_port), retries=3)
    payload = stand.wait_failed(stand.ask(scripts.answer([ANSWER])))
    assert payload["error_detail"] == "no connection to the provider: Connection refused"
    assert payload["usage"] is None
    assert stand.sample("llm_posts_total") == 0
    assert stand.sample("llm_retries_total", kind="ConnectFailed") == 3
    assert len(stand.lines("Retrying generation")) == 3


def test_a_provider_that_comes_back_while_it_is_asked_again_answers(
    make_stand: MakeStand,
    provider: ProviderProcess,
    closed_port: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(client: socket.socket, _address: object) -> None:
        with client, socket.create_connection(("127.0.0.1", provider.ports["http"] or 0)) as there:
            pipe(client, there)

    server = gevent.server.StreamServer(closed_port, forward)

    def come_back(*_bounds: float) -> float:
        closed_port.listen()
        server.start()
        return 1.0

    monkeypatch.setattr("llm.chat.retries.random", SimpleNamespace(uniform=come_back))
    stand = make_stand(base_url=url_of(closed_port))
    try:
        request_id = stand.ask(scripts.answer([ANSWER]))
        stand.wait_completed(request_id)
        assert stand.text_of(request_id) == ANSWER
        assert len(stand.posts(request_id)) == 1
        stand.wait_line("Retrying generation")
    finally:
        server.stop(timeout=0)


# Retries ------------------------------------------------------------------------------------------

LATER = [429, 500, 502, 503, 504]


@pytest.mark.parametrize("status", LATER)
@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_refusal_that_means_later_is_asked_again_so_many_times_and_no_more(
    make_stand: MakeStand, status: int, retries: int
) -> None:
    stand = make_stand(retries=retries)
    request_id = stand.ask(refusal(status, "later"))
    payload = stand.wait_failed(request_id)
    assert payload["error_detail"] == f"the provider answered {status}: later ***"
    assert payload["usage"] is None
    posts = stand.posts(request_id)
    assert len(posts) == 1 + retries
    assert all(post.body == posts[0].body for post in posts)
    assert stand.sample("llm_retries_total", kind="BadStatus") == retries
    lines = stand.lines("Retrying generation")
    assert len(lines) == retries
    for line in lines:
        assert line["level"] == "info"
        assert line["request_id"] == request_id
        assert line["session_id"] == stand.client.session_id
        assert line["provider"] == stand.gateway.provider.name
        assert line["error"] == payload["error_detail"]
        assert 0 < line["pause_seconds"] <= 2 * PAUSE_SECONDS


@pytest.mark.parametrize("status", LATER)
def test_what_is_asked_again_and_answered_is_like_any_answer(stand: Stand, status: int) -> None:
    request_id = stand.ask_in_turn(refusal(status), refusal(503), scripts.answer([ANSWER]))
    end = stand.wait_completed(request_id)
    assert end["usage"] == scripts.USAGE
    assert stand.text_of(request_id) == ANSWER
    assert len(stand.posts(request_id)) == 3
    assert len(stand.lines("Retrying generation")) == 2


def test_how_often_is_counted_anew_for_each_request(stand: Stand) -> None:
    for _ in range(3):
        stand.wait_completed(
            stand.ask_in_turn(refusal(503), refusal(503), scripts.answer([ANSWER]))
        )


def test_a_first_answer_that_fails_for_good_ends_the_asking(stand: Stand) -> None:
    request_id = stand.ask_in_turn(refusal(503), refusal(401, "bad key"))
    assert stand.wait_failed(request_id)["error_detail"] == "the provider answered 401: bad key ***"
    assert len(stand.posts(request_id)) == 2


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "0"}, {"retry-after-ms": "30"}, {"Retry-After": "7", "retry-after-ms": "1"}],
)
def test_the_time_that_a_provider_asks_for_is_waited_for(
    stand: Stand, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 60.0)  # not this one
    request_id = stand.ask_in_turn(refusal(429, "slow", headers), scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    first, second = stand.posts(request_id)
    asked = float(headers.get("retry-after-ms", 0)) / 1000
    assert second.time - first.time >= asked
    assert stand.lines("Retrying generation")[0]["pause_seconds"] == asked


@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, {"retry-after-ms": "3600000"}])
def test_the_time_that_a_provider_asks_for_is_kept_to_up_to_the_cap(
    make_stand: MakeStand, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 60.0)
    stand = make_stand(retry_after_cap=0.1)
    request_id = stand.ask_in_turn(refusal(503, "slow", headers), scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    first, second = stand.posts(request_id)
    assert second.time - first.time >= 0.1
    assert stand.lines("Retrying generation")[0]["pause_seconds"] == 0.1


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "9" * 5000])
def test_a_time_that_is_none_leaves_our_own_pause(stand: Stand, value: str) -> None:
    headers = {"Retry-After": value}
    request_id = stand.ask_in_turn(refusal(429, "slow", headers), scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    assert stand.lines("Retrying generation")[0]["pause_seconds"] <= PAUSE_SECONDS


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_that_means_no_is_not_asked_again_though_it_says_when(
    stand: Stand, status: int
) -> None:
    request_id = stand.ask(refusal(status, "no", {"Retry-After": "0"}))
    stand.wait_failed(request_id)
    assert len(stand.posts(request_id)) == 1


@pytest.mark.parametrize(
    "wait", [{"retry-after-ms": "300"}, {}], ids=["as long as it asks", "our own pause"]
)
def test_an_interrupt_cuts_the_wait_for_a_retry_short_and_no_post_follows(
    stand: Stand, monkeypatch: pytest.MonkeyPatch, wait: dict[str, str]
) -> None:
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 0.4)
    request_id = stand.ask(refusal(429, "later", wait))
    pause_seconds = stand.wait_line("Retrying generation")["pause_seconds"]
    assert pause_seconds >= 0.2
    began_at = time.monotonic()
    result = stand.interrupt(request_id, is_refused=True)
    assert time.monotonic() - began_at < pause_seconds / 2
    assert result["stream_closed_ms"] is not None
    assert result["stream_closed_ms"] < pause_seconds * 1000 / 2
    assert "stops_on_close" not in result  # it refused, so that there is nothing to stop
    assert stand.wait_interrupted(request_id)["usage"] is None
    # This answer takes longer than the retry would have been waited for.
    stand.complete([scripts.sleep(0.6), *scripts.answer([ANSWER])])
    assert len(stand.posts(request_id)) == 1


def test_an_interrupt_while_a_connection_is_tried_again_stops_it(
    make_stand: MakeStand, closed_port: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 60.0)
    stand = make_stand(base_url=url_of(closed_port))
    request_id = stand.ask(scripts.answer([ANSWER]))
    stand.wait_line("Retrying generation")
    assert "stops_on_close" not in stand.interrupt(request_id)
    assert stand.wait_interrupted(request_id)["usage"] is None


def test_after_the_first_token_nothing_is_asked_again(stand: Stand) -> None:
    for steps in (
        scripts.truncated(["a"]),
        scripts.truncated([]),
        scripts.error_in_stream("503 later", ["a"]),
    ):
        request_id = stand.ask(steps)
        stand.wait_failed(request_id)
        assert len(stand.posts(request_id)) == 1


# Answers that do not fail -------------------------------------------------------------------------


def on_the_wire(events: Sequence[bytes]) -> Script:
    """These bytes, each in a chunk and a write, then a proper end."""
    return scripts.raw(events)


FULL = text_event("Once upon ") + text_event("a time.") + finish_event() + done()
CUT = FULL.index(b"Once")
CHINESE = text_event("你好，世界。😀") + finish_event() + done()


def bytewise(data: bytes) -> Script:
    """Each byte a chunk of its own, all in a few writes."""
    chunks = [chunk(data[place : place + 1]) for place in range(len(data))]
    return [send(scripts.sse_head()), send(*chunks), send(scripts.last_chunk())]


def reasoning(name: str) -> bytes:
    return scripts.delta_event({name: "Hm, let me think."})


TOLERATED: Mapping[str, tuple[Script, str]] = {
    "finish, but no DONE": ([*begun(finish_event()), send(scripts.last_chunk())], ANSWER),
    "finish, but no DONE, and a close": ([*begun(finish_event()), scripts.close()], ANSWER),
    "finish, and the end inside the next event": (
        [*begun(finish_event()), send(chunk(b'data: {"choices": [], "usa')), scripts.close()],
        ANSWER,
    ),
    "DONE, and the socket stays open": (scripts.done_but_open([ANSWER]), ANSWER),
    "DONE without a finish": ([*begun(done()), send(scripts.last_chunk())], ANSWER),
    "DONE, and rubbish after it": (
        [*begun(finish_event(), done() + b"data: rubbish\n\n"), send(scripts.last_chunk())],
        ANSWER,
    ),
    "Content-Length": (scripts.plain_content_length([ANSWER]), ANSWER),
    "HTTP/1.0": (plain(FULL, http10=True), ANSWER),
    "compressed": (
        [
            send(scripts.sse_head(gzip=True)),
            *map(send, map(chunk, scripts.gzip_pieces([FULL]))),
            send(scripts.last_chunk()),
        ],
        ANSWER,
    ),
    "comments": (
        on_the_wire([b": hello\n\n", b":\n" + FULL[:CUT], FULL[CUT:], b": OPENROUTER\n\n"]),
        ANSWER,
    ),
    "event lines": (
        on_the_wire([b"event: message\nid: 7\nretry: 1\n" + FULL, b"event: ping\n\n"]),
        ANSWER,
    ),
    "events without data": (on_the_wire([b"event: ping\n\n", b"data:\n\n", FULL]), ANSWER),
    "multi-line data": (on_the_wire([FULL.replace(b'"choices": ', b'"choices":\ndata: ')]), ANSWER),
    "CR": (on_the_wire([FULL.replace(b"\n", b"\r")]), ANSWER),
    "CRLF": (on_the_wire([FULL.replace(b"\n", b"\r\n")]), ANSWER),
    "CRLF, split between the two": (bytewise(FULL.replace(b"\n", b"\r\n")), ANSWER),
    "a BOM": (on_the_wire([b"\xef\xbb\xbf" + FULL]), ANSWER),
    "a BOM in pieces": (bytewise(b"\xef\xbb\xbf" + FULL), ANSWER),
    "no space": (on_the_wire([FULL.replace(b"data: ", b"data:")]), ANSWER),
    "no blank line at the end": (on_the_wire([FULL.rstrip(b"\n")]), ANSWER),
    "split UTF-8": (bytewise(CHINESE), "你好，世界。😀"),
    "escaped UTF-8": (
        on_the_wire([CHINESE.replace("😀".encode(), rb"\ud83d\ude00")]),
        "你好，世界。😀",
    ),
    "usage without choices": (begun(finish_event("stop", scripts.USAGE), done()), ANSWER),
    "no choices and no usage": (
        [send(scripts.sse_head()), *scripts.chunks([scripts.completion_chunk([]), FULL])],
        ANSWER,
    ),
    "null usage": (
        on_the_wire([scripts.completion_chunk([], usage=None), FULL]),
        ANSWER,
    ),
    "usage that is none": (
        on_the_wire([text_event(ANSWER), finish_event("stop", {"prompt_tokens": "x"}), done()]),
        ANSWER,
    ),
    "reasoning": (
        on_the_wire([reasoning("reasoning_content"), reasoning("reasoning"), FULL]),
        ANSWER,
    ),
    "role only": (on_the_wire([scripts.delta_event({"role": "assistant"}), FULL]), ANSWER),
    "null content": (
        on_the_wire([scripts.delta_event({"role": "assistant", "content": None}), FULL]),
        ANSWER,
    ),
    "null delta": (
        on_the_wire([scripts.completion_chunk([{"index": 0, "delta": None}]), FULL]),
        ANSWER,
    ),
    "empty content": (on_the_wire([text_event(""), FULL]), ANSWER),
    "null error": (
        on_the_wire([scripts.completion_chunk([], error=None), FULL]),
        ANSWER,
    ),
    "nothing but reasoning": (
        on_the_wire([reasoning("reasoning_content"), finish_event(), done()]),
        "",
    ),
    "nothing at all": (scripts.answer([]), ""),
    "a line of 3 MiB": (
        on_the_wire([b": " + b"x" * 65536, *[b"x" * 65536] * 47, b"\n\n" + FULL]),
        ANSWER,
    ),
}


@pytest.mark.parametrize("form", TOLERATED)
def test_what_the_standard_and_providers_allow_is_an_answer(stand: Stand, form: str) -> None:
    steps, text = TOLERATED[form]
    request_id = stand.ask(steps)
    end = stand.wait_completed(request_id)
    assert stand.text_of(request_id) == text
    assert end["finish_reason"] == (None if form == "DONE without a finish" else "stop")
    assert len(stand.posts(request_id)) == 1
    assert all(
        frame.payload["content"].keys() <= {"text"} for frame in stand.client.frames_of(request_id)
    )


def test_after_done_a_socket_that_stays_open_is_closed(stand: Stand) -> None:
    request_id = stand.ask(scripts.done_but_open([ANSWER]))
    assert stand.wait_completed(request_id)["usage"] == scripts.USAGE
    [post] = stand.posts(request_id)
    closed = stand.provider.wait_closed(post.conn)
    assert closed.by in ("client_eof", "client_reset")
    assert closed.mid_script


OSLO = '{"city": "Oslo", "days": [1, 2]}'
WEATHER = ("weather", {"city": "Oslo", "days": [1, 2]})
CALLS: Mapping[str, tuple[Sequence[bytes], Sequence[tuple[str, dict[str, Any]]]]] = {
    "in pieces": (scripts.call_events("weather", OSLO, piece_chars=1), [WEATHER]),
    "later names empty": (scripts.call_events("weather", OSLO, later="empty"), [WEATHER]),
    "later names null": (scripts.call_events("weather", OSLO, later="null"), [WEATHER]),
    "legacy": (scripts.legacy_call_events("weather", OSLO), [WEATHER]),
    "no arguments": (scripts.call_events("now", ""), [("now", {})]),
    "no id": (scripts.call_events("weather", OSLO, call_id=None), [WEATHER]),
    "several by index": (
        scripts.interleaved(
            scripts.call_events("weather", OSLO, call_id="a"),
            scripts.call_events("now", "{}", index=1, call_id="b"),
        ),
        [WEATHER, ("now", {})],
    ),
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_of_any_form_are_given_whole_one_frame_each(stand: Stand, form: str) -> None:
    events, calls = CALLS[form]
    request_id = stand.ask(scripts.call_answer(events, [ANSWER]))
    end = stand.wait_completed(request_id)
    frames = [frame.payload for frame in stand.client.frames_of(request_id)][:-1]
    given = [frame["function_call"] for frame in frames if "function_call" in frame]
    assert [(call["name"], call["parameters"]) for call in given] == list(calls)
    ids = [call["call_id"] for call in given]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    assert stand.text_of(request_id) == ANSWER
    assert (end["finish_reason"], end["usage"]) == ("tool_calls", scripts.USAGE)


# Usage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter"])
def test_the_usage_and_the_finish_reason_reach_the_terminal_frame(
    stand: Stand, reason: str
) -> None:
    end = stand.complete([*begun(), *scripts.ending(reason)])
    assert end["finish_reason"] == reason
    assert end["usage"] == scripts.USAGE  # as the provider said, so nothing is estimated
    wait_until(lambda: stand.sample("llm_tokens_total", kind="prompt") == 9, "it is counted")
    assert stand.sample("llm_tokens_total", kind="completion") == 12


def test_a_usage_is_taken_wherever_it_comes(stand: Stand) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    with_text = scripts.completion_chunk(
        [{"index": 0, "delta": {"content": ANSWER}, "finish_reason": "stop"}], usage=usage
    )
    assert stand.complete(on_the_wire([with_text, done()]))["usage"] == usage
    before = scripts.completion_chunk([], usage=usage)
    assert stand.complete(on_the_wire([before, FULL]))["usage"] == usage


def test_where_the_provider_does_not_say_the_usage_is_estimated(stand: Stand) -> None:
    usage = stand.complete([*begun(), *scripts.ending(usage=None)])["usage"]
    assert usage["estimated"] is True
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] >= len(ANSWER) // 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    stand.complete(scripts.answer([ANSWER]))
    # Only that one is counted: the one before would have been by now.
    wait_until(lambda: stand.sample("llm_tokens_total", kind="prompt") == 9, "it is counted")


def test_the_usage_of_an_interrupted_answer_is_estimated(stand: Stand) -> None:
    request_id = stand.ask(scripts.idle_mid_stream([ANSWER]))
    stand.client.wait_text(request_id)
    stand.interrupt(request_id)
    usage = stand.wait_interrupted(request_id)["usage"]
    assert usage["estimated"] is True
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] >= len(ANSWER) // 4


def test_the_usage_of_an_interrupted_answer_is_the_providers_where_it_said(stand: Stand) -> None:
    said = scripts.completion_chunk([], usage=scripts.USAGE)
    request_id = stand.ask([*scripts.opening(), *scripts.chunks([said + text_event(ANSWER)])])
    stand.client.wait_text(request_id)
    stand.interrupt(request_id)
    assert stand.wait_interrupted(request_id)["usage"] == scripts.USAGE


def test_the_usage_is_asked_for_unless_it_is_switched_off(make_stand: MakeStand) -> None:
    stand = make_stand(model="one")
    request_id = stand.ask(scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    [post] = stand.posts(request_id)
    messages = [{"role": "user", "content": stand.scripts[request_id]}]
    assert post.body == {"model": "one", "messages": messages, **STREAMED}
    stand = make_stand(model="one", include_usage=False)
    request_id = stand.ask(scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    [post] = stand.posts(request_id)
    messages = [{"role": "user", "content": stand.scripts[request_id]}]
    assert post.body == {"model": "one", "messages": messages, "stream": True}


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "message",
    [
        "Unrecognized request argument supplied: stream_options",
        "stream_options.include_usage: extra fields not permitted",
        "unknown field `include_usage`",
    ],
)
def test_a_provider_that_does_not_know_of_usage_is_asked_without_it_from_then_on(
    make_stand: MakeStand, status: int, message: str
) -> None:
    stand = make_stand(retries=0)  # it is none of those
    first = stand.ask_in_turn(refusal(status, message), scripts.answer([ANSWER]))
    stand.wait_completed(first)
    asked, without = stand.posts(first)
    assert asked.body["stream_options"] == {"include_usage": True}
    assert "stream_options" not in without.body
    assert {**without.body, **STREAMED} == asked.body
    # Nor is the next one refused, of whatever session.
    second = stand.ask(scripts.answer([ANSWER]))
    stand.wait_completed(second)
    [post] = stand.posts(second)
    assert "stream_options" not in post.body
    assert stand.sample("llm_posts_total") == 3


def test_a_second_refusal_that_names_the_usage_is_final(stand: Stand) -> None:
    request_id = stand.ask(refusal(400, "no stream_options"))
    detail = stand.wait_failed(request_id)["error_detail"]
    assert detail == "the provider answered 400: no stream_options ***"
    assert ["stream_options" in post.body for post in stand.posts(request_id)] == [True, False]
    # The usage was not what it refused: later requests ask for it again.
    request_id = stand.ask(scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    assert "stream_options" in stand.posts(request_id)[0].body


@pytest.mark.parametrize(
    ("status", "message"),
    [(400, "no such model"), (422, "no"), (401, "stream_options"), (404, "include_usage")],
)
def test_another_refusal_does_not_end_the_asking_for_usage(
    stand: Stand, status: int, message: str
) -> None:
    request_id = stand.ask(refusal(status, message))
    stand.wait_failed(request_id)
    assert len(stand.posts(request_id)) == 1
    request_id = stand.ask(scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    assert "stream_options" in stand.posts(request_id)[0].body


def test_who_did_not_ask_for_usage_is_refused_for_good(make_stand: MakeStand) -> None:
    stand = make_stand(include_usage=False)
    request_id = stand.ask(refusal(400, "no stream_options"))
    stand.wait_failed(request_id)
    assert len(stand.posts(request_id)) == 1


def test_asking_without_usage_is_none_of_the_retries(make_stand: MakeStand) -> None:
    stand = make_stand(retries=1)
    request_id = stand.ask_in_turn(
        refusal(503), refusal(400, "no stream_options"), scripts.answer([ANSWER])
    )
    stand.wait_completed(request_id)
    assert len(stand.posts(request_id)) == 3
    assert len(stand.lines("Retrying generation")) == 1


def test_two_that_are_refused_for_the_usage_at_once_are_both_asked_again(
    make_stand: MakeStand,
) -> None:
    stand = make_stand(on_new_request=OnNewRequest.PARALLEL, retries=0)
    keys = [stand.provider.unique("key") for _ in range(2)]
    ids = []
    for key in keys:
        refused = [scripts.wait(key), *refusal(400, "no stream_options")]
        request_id = stand.ask(refused)
        stand.wait_post(request_id)
        stand.provider.script(stand.scripts[request_id], scripts.answer([ANSWER]))
        ids.append(request_id)
    for key in keys:
        stand.provider.release(key)
    ends = {stand.client.wait_for(lambda frame: frame.is_terminal).payload["outcome"] for _ in ids}
    assert ends == {"COMPLETED"}
    for request_id in ids:
        assert ["stream_options" in one.body for one in stand.posts(request_id)] == [True, False]


# What an interrupt costs --------------------------------------------------------------------------


@pytest.mark.parametrize("stops", StopsOnClose)
def test_an_ack_says_whether_the_provider_stops_when_it_is_closed(
    make_stand: MakeStand, stops: StopsOnClose
) -> None:
    stand = make_stand(stops_on_close=stops)
    for steps in (scripts.no_headers(), scripts.headers_only(), scripts.idle_mid_stream([ANSWER])):
        request_id = stand.ask(steps)
        post = stand.wait_post(request_id)
        if len(steps) > 2:
            stand.client.wait_text(request_id)
        assert stand.interrupt(request_id)["stops_on_close"] == stops.value
        stand.provider.wait_closed(post.conn)
        assert stand.wait_interrupted(request_id)["usage"]["estimated"] is True


def test_an_ack_does_not_say_so_of_a_provider_that_never_had_the_request(
    make_stand: MakeStand, provider: ProviderProcess
) -> None:
    stand = make_stand(base_url=provider.mute_base_url, stops_on_close=StopsOnClose.YES)
    since = time.monotonic()
    request_id = stand.ask(scripts.answer([ANSWER]))
    conn = provider.wait_connected(1, "mute", since).conn
    assert "stops_on_close" not in stand.interrupt(request_id)
    assert stand.wait_interrupted(request_id)["usage"] is None
    provider.wait_closed(conn)


def test_an_ack_does_not_say_so_of_a_request_that_was_over(make_stand: MakeStand) -> None:
    stand = make_stand(stops_on_close=StopsOnClose.YES)
    request_id = stand.ask(scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    stand.client.interrupt(request_id)
    [result] = stand.client.wait_ack().payload["results"]
    assert result["outcome"] == "ALREADY_DONE"
    assert "stops_on_close" not in result


# The limit of all of it ---------------------------------------------------------------------------


def slow_answer() -> Script:
    """Never silent, and never at its end."""
    return [*scripts.opening(), scripts.repeat(scripts.tokens(["la "], rate=100))]


TOO_LONG: Mapping[str, tuple[Script, int]] = {
    "before headers": (scripts.no_headers(), 1),
    "in the middle": (slow_answer(), 1),
    "waiting for a retry": (refusal(429, "later", {"Retry-After": "9"}), 1),
    "retrying": ([scripts.sleep(0.1), *refusal(503, "later")], 3),
}


@pytest.mark.parametrize("phase", TOO_LONG)
def test_what_takes_too_long_in_all_passes_the_total_limit(
    make_stand: MakeStand, phase: str
) -> None:
    steps, most_posts = TOO_LONG[phase]
    stand = make_stand(generation=GenerationSettings(total_timeout=0.25))
    request_id = stand.ask(steps)
    detail = stand.wait_failed(request_id, "REQUEST_TIMEOUT")["error_detail"]
    assert detail == "the provider exceeded the total timeout of 0.25 s"
    assert 1 <= len(stand.posts(request_id)) <= most_posts
    # And it does not strike later, in another one.
    key = stand.provider.unique("key")
    late = stand.ask([*begun(), scripts.wait(key), *scripts.ending()])
    stand.client.wait_text(late)
    stand.provider.release(key)
    stand.wait_completed(late)


def test_an_error_body_that_hangs_is_cut_by_the_total_limit(make_stand: MakeStand) -> None:
    stand = make_stand(generation=GenerationSettings(total_timeout=0.2))
    head = scripts.head(400, {"Content-Length": "1000"})
    began_at = time.monotonic()
    stand.wait_failed(stand.ask([send(head, b"bad"), scripts.hang()]), "REQUEST_TIMEOUT")
    assert time.monotonic() - began_at < 2


def test_the_total_limit_ends_with_the_answer(make_stand: MakeStand) -> None:
    stand = make_stand(generation=GenerationSettings(total_timeout=0.2))
    stand.complete(scripts.answer([ANSWER]))
    stand.complete([scripts.sleep(0.12), *scripts.answer([ANSWER])])
    stand.complete([scripts.sleep(0.12), *scripts.answer([ANSWER])])


# What a request carries ---------------------------------------------------------------------------


def post_of(stand: Stand) -> Any:
    """The one POST of an answer."""
    request_id = stand.ask(scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    [post] = stand.posts(request_id)
    return post


def test_the_key_goes_as_a_bearer_token(stand: Stand) -> None:
    assert post_of(stand).headers["authorization"] == f"Bearer {KEY}"


def test_the_key_goes_bare_into_the_header_that_is_named(make_stand: MakeStand) -> None:
    stand = make_stand(key_header="api-key")
    headers = post_of(stand).headers
    assert headers["api-key"] == KEY
    assert "authorization" not in headers
    assert stand.fail(refusal(401, "bad")) == "the provider answered 401: bad ***"


def test_more_headers_reach_the_provider_and_are_secret(make_stand: MakeStand) -> None:
    more = {"X-Title": "voice", "Helicone-Auth": "Bearer sk-helicone-secret"}
    stand = make_stand(headers=more)
    stand.secrets.append("sk-helicone-secret")
    headers = post_of(stand).headers
    assert headers["x-title"] == "voice"
    assert headers["helicone-auth"] == "Bearer sk-helicone-secret"
    assert headers["authorization"] == f"Bearer {KEY}"
    steps = refusal(403, "bad", secrets=[KEY, "Bearer sk-helicone-secret"])
    assert stand.fail(steps) == "the provider answered 403: bad *** ***"


def test_a_retry_carries_the_same_headers(make_stand: MakeStand) -> None:
    stand = make_stand(headers={"X-Title": "voice"})
    request_id = stand.ask_in_turn(refusal(503), scripts.answer([ANSWER]))
    stand.wait_completed(request_id)
    first, second = stand.posts(request_id)
    assert first.headers == second.headers
    assert first.headers["x-title"] == "voice"


def test_more_fields_reach_the_provider_and_replace_none_of_ours(make_stand: MakeStand) -> None:
    stand = make_stand(
        model="ours", extra_body={"temperature": 0.2, "stop": ["\n"], "user": "u", "model": "x"}
    )
    body = post_of(stand).body
    assert (body["temperature"], body["stop"], body["user"]) == (0.2, ["\n"], "u")
    assert (body["model"], body["stream"]) == ("ours", True)


# Through a proxy ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProxyKind:
    """With TLS or without."""

    authority: trustme.CA | None
    ca_file: str
    """Who is to be trusted, for the provider and for the proxy."""


@pytest.fixture(params=["http proxy", "https proxy"])
def kind(request: pytest.FixtureRequest, provider: ProviderProcess, tmp_path: Path) -> ProxyKind:
    if request.param == "http proxy":
        return ProxyKind(None, provider.ca_file)
    authority = trustme.CA()
    return ProxyKind(authority, trust_both(authority, provider.ca_file, tmp_path))


def test_an_http_provider_is_asked_through_the_proxy(
    make_stand: MakeStand, kind: ProxyKind
) -> None:
    with Proxy(authority=kind.authority) as proxy:
        stand = make_stand(proxy=proxy.url(), ca_file=kind.ca_file)
        assert post_of(stand).path == "/v1/chat/completions"
        [request] = proxy.requests
        assert request.method == "POST"
        assert request.target == f"{stand.provider.base_url}/chat/completions"
        assert "proxy-authorization" not in request.headers
        assert request.headers["authorization"] == f"Bearer {KEY}"


def test_an_https_provider_is_asked_through_a_tunnel_that_does_not_see_the_key(
    make_stand: MakeStand, provider: ProviderProcess, kind: ProxyKind
) -> None:
    with Proxy(authority=kind.authority) as proxy:
        stand = make_stand(proxy=proxy.url(), base_url=provider.tls_base_url, ca_file=kind.ca_file)
        assert post_of(stand).headers["authorization"] == f"Bearer {KEY}"
        [request] = proxy.requests
        assert (request.method, request.target) == ("CONNECT", f"127.0.0.1:{provider.ports['tls']}")
        assert "authorization" not in request.headers
        assert "proxy-authorization" not in request.headers


PASSWORD = "p@ss word-secret"


@pytest.mark.parametrize("tls", [False, True])
def test_a_proxys_credentials_go_to_the_proxy_and_no_further(
    make_stand: MakeStand, provider: ProviderProcess, tls: bool
) -> None:
    with Proxy(credentials=f"user:{PASSWORD}") as proxy:
        stand = make_stand(
            proxy=proxy.url("user:p%40ss%20word-secret"),
            base_url=provider.tls_base_url if tls else provider.base_url,
        )
        stand.secrets += [PASSWORD, "p%40ss%20word-secret"]
        post_of(stand)
        assert len(proxy.requests) == 1
        if tls:
            assert "proxy-authorization" not in post_of(stand).headers


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "502 Bad Gateway"])
@pytest.mark.parametrize("tls", [False, True])
def test_a_proxy_that_refuses_is_a_clear_error(
    make_stand: MakeStand, provider: ProviderProcess, tls: bool, status: str
) -> None:
    body = f"the proxy says no to {PASSWORD} {KEY}".encode()
    answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with Proxy(answer=answer) as proxy:
        stand = make_stand(
            proxy=proxy.url("user:p%40ss%20word-secret"),
            base_url=provider.tls_base_url if tls else provider.base_url,
            retries=1,
        )
        stand.secrets += [PASSWORD, "p%40ss%20word-secret"]
        request_id = stand.ask(scripts.answer([ANSWER]))
        detail = stand.wait_failed(request_id)["error_detail"]
        number = status[:3]
        if tls:
            assert re.match(f"no connection to the provider: .*{number}", detail), detail
        else:
            assert detail == f"the provider answered {number}: the proxy says no to *** ***"
        assert stand.posts(request_id) == []
        if tls:
            assert all(request.closed.wait(5) for request in proxy.requests)
        # A tunnel that is refused is no connection; 407 to a POST is no answer that means later.
        assert len(proxy.requests) == (1 if number == "407" and not tls else 2)


def test_a_proxy_that_is_not_there_is_no_connection(
    make_stand: MakeStand, closed_port: socket.socket
) -> None:
    port = closed_port.getsockname()[1]
    stand = make_stand(proxy=f"http://user:pass-word-secret@127.0.0.1:{port}", retries=1)
    stand.secrets.append("pass-word-secret")
    detail = stand.fail(scripts.answer([ANSWER]))
    assert re.match("no connection to the provider: ", detail)
    assert len(stand.lines("Retrying generation")) == 1


@pytest.mark.parametrize("tls", [False, True])
def test_an_interrupt_while_the_proxy_hangs_closes_the_connection_to_it(
    make_stand: MakeStand, provider: ProviderProcess, kind: ProxyKind, tls: bool
) -> None:
    with Proxy(answer=b"", authority=kind.authority) as proxy:
        stand = make_stand(
            proxy=proxy.url(),
            base_url=provider.tls_base_url if tls else provider.base_url,
            ca_file=kind.ca_file,
        )
        request_id = stand.ask(scripts.answer([ANSWER]))
        request = proxy.wait_request()
        assert not request.closed.is_set()
        result = stand.interrupt(request_id)
        assert request.closed.wait(1)
        # A tunnel that does not stand carries nothing; a POST may have gone on.
        assert ("stops_on_close" in result) == (not tls)
        stand.wait_interrupted(request_id)
        assert len(proxy.requests) == 1


def test_a_proxy_that_hangs_with_a_tunnel_passes_the_connect_limit(
    make_stand: MakeStand, provider: ProviderProcess
) -> None:
    with Proxy(answer=b"") as proxy:
        stand = make_stand(
            proxy=proxy.url(),
            base_url=provider.tls_base_url,
            connect_timeout=SHORT_SECONDS,
            retries=0,
        )
        detail = stand.fail(scripts.answer([ANSWER]), "REQUEST_TIMEOUT")
        assert detail == "the provider exceeded the connect timeout of 0.15 s"
        assert proxy.wait_request().closed.wait(1)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("texts", [[ANSWER], ["x" * 1000] * 200], ids=["a little", "a lot"])
def test_an_interrupt_through_a_proxy_closes_the_stream(
    make_stand: MakeStand, provider: ProviderProcess, kind: ProxyKind, tls: bool, texts: list[str]
) -> None:
    with Proxy(authority=kind.authority) as proxy:
        stand = make_stand(
            proxy=proxy.url(),
            base_url=provider.tls_base_url if tls else provider.base_url,
            ca_file=kind.ca_file,
        )
        request_id = stand.ask(scripts.idle_mid_stream(texts))
        missing = len("".join(texts))
        while missing:  # none of it is left where TLS keeps it
            missing -= len(stand.client.wait_text(request_id).text)
        post = stand.wait_post(request_id)
        stand.interrupt(request_id)
        assert proxy.wait_request().closed.wait(1)
        provider.wait_closed(post.conn)
        stand.wait_interrupted(request_id)


def test_a_proxy_that_echoes_its_credentials_gives_them_to_nobody(make_stand: MakeStand) -> None:
    credentials = b64encode(f"user:{PASSWORD}".encode()).decode()
    length = len(f"not known: Basic {credentials}")
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {length}\r\n\r\n".encode()
    with Proxy(answer=head + b"not known: {authorization}") as proxy:
        stand = make_stand(proxy=proxy.url("user:p%40ss%20word-secret"))
        stand.secrets += [PASSWORD, credentials]
        stand.fail(scripts.answer([ANSWER]))


def test_a_key_in_a_header_of_ours_is_secret_without_its_scheme_too(make_stand: MakeStand) -> None:
    stand = make_stand(api_key=None, headers={"Authorization": f"Bearer {KEY}"})
    assert stand.fail(refusal(401, "bad key")) == "the provider answered 401: bad key ***"


@pytest.mark.parametrize(("key_header", "name"), [(None, "authorization"), ("api-key", "Api-Key")])
def test_a_header_is_never_sent_twice_however_it_is_written(
    make_stand: MakeStand, key_header: str | None, name: str
) -> None:
    with Proxy() as proxy:
        stand = make_stand(proxy=proxy.url(), key_header=key_header, headers={name: "Basic x"})
        stand.complete(scripts.answer([ANSWER]))
        assert proxy.requests[0].head.lower().count(f"\r\n{name.lower()}:") == 1


def test_a_long_refusal_that_names_the_usage_only_at_its_end_is_understood(
    make_stand: MakeStand,
) -> None:
    stand = make_stand()
    body = {"error": {"message": "x" * 2000 + " stream_options is not known"}}
    refused = scripts.http_error(400, body)
    stand.wait_completed(stand.ask_in_turn(refused, scripts.answer([ANSWER])))


def test_of_a_web_page_that_refuses_only_the_status_is_told(make_stand: MakeStand) -> None:
    page = "<html><head><title>502 Bad Gateway</title></head></html>"
    refused = scripts.http_error(502, page, {"Content-Type": "text/html"})
    assert make_stand().fail(refused) == "the provider answered 502"
