"""One generation against the scripted provider: real sockets, and a provider in its own process.

The traps of the libraries below, one by one: exactly one POST, immediate delivery, limits,
fairness, and a close that works in whatever phase the reader is.
"""

from __future__ import annotations

import gc
import gzip
import re
import select
import socket
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import gevent
import gevent.event
import gevent.monkey
import pytest
import trustme
from urllib3.connection import HTTPConnection
from urllib3.util.ssltransport import SSLTransport

from actors.loop.lanes import Lanes, lanes
from llm.chat.client import ProviderClient
from llm.chat.completions import Delta, Message, Prompt, ToolCall, Usage
from llm.chat.generation import Generation, GenerationResult, LlmClient
from llm.errors import (
    BadStatusError,
    ConnectFailedError,
    IncompleteAnswerError,
    LimitPassedError,
    MalformedCallError,
    MalformedStreamError,
    NotAStreamError,
    ProviderReportedError,
    StreamError,
)
from llm.http.answer import Answer
from llm.http.lines import MAX_EVENT_LINES
from llm.provider import Provider
from llm.stage import Ending
from tests.harness import scripts
from tests.harness.client import wait_until
from tests.harness.provider_process import ProviderProcess
from tests.harness.scripts import Script, chunk, done, finish_event, send, text_event, wait
from tests.proxy import Proxy, trust_both

PATIENCE_SECONDS = 5.0
"""Bounds a failure, and nothing else."""
KEY = "sk-very-secret-0123456789"
Port = Literal["http", "tls"]


class RecordingSink:
    """Keeps what comes; `block_on_put()` makes it a slow client."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.calls: list[ToolCall] = []
        self.all: list[str | ToolCall] = []
        """Texts and calls in the order in which they came."""
        self.times_opened = 0
        self.posts = 0
        self.retries: list[tuple[str, StreamError, float]] = []
        self.fallbacks: list[tuple[str, StreamError | None]] = []
        self.blocked = gevent.event.Event()
        self.on_put: Callable[[Delta], None] = lambda delta: None
        self.on_call: Callable[[ToolCall], None] = lambda call: None
        self._news = gevent.event.Event()
        self._gate = gevent.event.Event()
        self._gate.set()

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    def posted(self) -> None:
        self.posts += 1
        self._news.set()

    def retrying(self, provider: str, error: StreamError, pause_seconds: float) -> None:
        self.retries.append((provider, error, pause_seconds))
        self._news.set()

    def falling_back(self, provider: str, error: StreamError | None) -> None:
        self.fallbacks.append((provider, error))

    def opened(self) -> None:
        self.times_opened += 1
        self._news.set()

    def put(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.text:
            self.all.append(delta.text)
        self._news.set()
        self.on_put(delta)
        if not self._gate.is_set():
            self.blocked.set()
            self._gate.wait()

    def call(self, call: ToolCall) -> None:
        self.calls.append(call)
        self.all.append(call)
        self._news.set()
        self.on_call(call)

    def block_on_put(self) -> None:
        self._gate.clear()

    def unblock(self) -> None:
        self._gate.set()

    def wait_text(self, text: str) -> None:
        """Until the text so far is, or begins with, this one."""
        self.wait_for(lambda: self.text.startswith(text), f"text {text!r}, got {self.text!r}")

    def wait_puts(self, count: int) -> None:
        self.wait_for(lambda: len(self.deltas) >= count, f"{count} puts")

    def wait_opened(self) -> None:
        self.wait_for(lambda: self.times_opened > 0, "the stream to open")

    def wait_for(self, fits: Callable[[], bool], what: str) -> None:
        with gevent.Timeout(PATIENCE_SECONDS, AssertionError(f"still waiting for {what}")):
            while not fits():
                self._news.wait()
                self._news.clear()


class Run:
    """One generation, with its sink and its report."""

    def __init__(self, client: LlmClient, script: str, prompt: Prompt | None = None) -> None:
        self.script = script
        self.sink = RecordingSink()
        self.results: list[GenerationResult] = []
        self.was_closed: list[bool] = []
        self._ended = gevent.event.Event()
        self.generation: Generation = client.generation(
            prompt or Prompt((Message("user", script),)), self.sink, self._on_end
        )

    def _on_end(self, result: GenerationResult) -> None:
        self.results.append(result)
        self.was_closed.append(self.generation._is_closed)
        self._ended.set()

    def start(self) -> Run:
        self.generation.start()
        return self

    def wait_end(self) -> GenerationResult:
        assert self._ended.wait(PATIENCE_SECONDS), f"no end; text so far {self.sink.text!r}"
        [result] = self.results
        assert self.was_closed == [True]
        return result

    def wait_completed(self) -> GenerationResult:
        result = self.wait_end()
        assert (result.ending, result.error) == (Ending.COMPLETED, None)
        assert result.closed_at is not None
        return result

    def wait_failed(self, error: type[StreamError], text: str) -> GenerationResult:
        """Until it failed with this error, whose text matches this pattern and holds no key."""
        result = self.wait_end()
        assert result.ending is Ending.FAILED
        assert type(result.error) is error, repr(result.error)
        assert re.search(text, str(result.error)), str(result.error)
        assert KEY not in str(result.error)
        assert result.closed_at is not None
        return result


class MakeClient(Protocol):
    def __call__(self, **fields: Any) -> LlmClient: ...


@pytest.fixture
def make_client(provider: ProviderProcess) -> Iterator[MakeClient]:
    """Makes clients from fields of `Provider`; the base URL is the scripted provider's."""
    clients: list[LlmClient] = []

    def make(**fields: Any) -> LlmClient:
        settings: dict[str, Any] = {
            "base_url": provider.base_url,
            "model": "test",
            "api_key": KEY,
            "ca_file": provider.ca_file,
            "retries": 0,
        }
        client = LlmClient(Provider(**settings | fields), loop=lanes())
        clients.append(client)
        return client

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(make_client: MakeClient) -> LlmClient:
    return make_client()


def url_of(provider: ProviderProcess, port: Port) -> str:
    return provider.tls_base_url if port == "tls" else provider.base_url


def posts(provider: ProviderProcess, script: str) -> int:
    """How many POSTs for a script the provider saw, up to now."""
    provider.counts()
    return len(provider.posts(script))


def conn_of(provider: ProviderProcess, run: Run) -> int:
    return provider.wait_post(script=run.script).conn


@pytest.fixture
def refused_port() -> Iterator[int]:
    """A port that refuses: taken, but nobody listens."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


# Whole answers ----------------------------------------------------------------------------------


def framed(events: Sequence[bytes], framing: str) -> list[bytes]:
    """The head, then each event as it looks on the wire, then what ends the body."""
    match framing:
        case "chunked":
            return [scripts.sse_head(), *map(chunk, events), scripts.last_chunk()]
        case "content-length":
            length = sum(map(len, events))
            return [scripts.sse_head(content_length=length), *events]
        case "http/1.0":
            return [scripts.sse_head(http10=True), *events]
        case "gzip":
            pieces = map(chunk, scripts.gzip_pieces(events))
            return [scripts.sse_head(gzip=True), *pieces, scripts.last_chunk()]
        case "gzip-content-length":
            zipped = scripts.gzip_pieces(events)
            length = sum(map(len, zipped))
            return [scripts.sse_head(gzip=True, content_length=length), *zipped]
    raise AssertionError(framing)


FRAMINGS = ["chunked", "content-length", "http/1.0", "gzip", "gzip-content-length"]


@pytest.mark.parametrize("port", ["http", "tls"])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_event_arrives_without_waiting_for_the_next_one(
    make_client: MakeClient, provider: ProviderProcess, framing: str, port: Port
) -> None:
    texts = ["Hello", ", ", "world", "! 你好"]
    key = provider.unique("key")
    head, *events = framed([*map(text_event, texts), finish_event(), done()], framing)
    steps: Script = [send(head)]
    for number, event in enumerate(events):
        steps += [wait(f"{key}-{number}"), send(event)]
    run = Run(make_client(base_url=url_of(provider, port)), provider.fresh(steps)).start()
    run.sink.wait_opened()
    for number in range(len(texts)):
        provider.release(f"{key}-{number}")
        run.sink.wait_text("".join(texts[: number + 1]))
    for number in range(len(texts), len(events)):
        provider.release(f"{key}-{number}")
    run.wait_completed()
    assert run.sink.text == "Hello, world! 你好"
    assert run.sink.times_opened == 1


def test_an_answer_is_reported_with_its_finish_reason_usage_and_reasoning(
    client: LlmClient, provider: ProviderProcess
) -> None:
    thoughts = [
        send(chunk(scripts.delta_event({"content": None, "reasoning_content": text})))
        for text in ["hm", "你好"]
    ]
    script = [
        *scripts.opening(),
        *thoughts,
        *scripts.tokens(["4", "2"]),
        *scripts.ending("length"),
    ]
    run = Run(client, provider.fresh(script)).start()
    result = run.wait_completed()
    assert result.finish_reason == "length"
    assert result.usage == Usage(9, 12, 21)
    assert sum(delta.reasoning_chars for delta in run.sink.deltas) == 4
    assert run.sink.text == "42"


def test_the_request_is_what_an_openai_server_expects(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh(scripts.answer(["x"]))).start()
    run.wait_completed()
    post = provider.wait_post(script=run.script)
    assert post.path == "/v1/chat/completions"
    assert post.headers["authorization"] == f"Bearer {KEY}"
    assert post.headers["content-type"] == "application/json"
    assert post.headers["accept"] == "text/event-stream"
    assert post.headers["accept-encoding"] == "identity"
    assert "transfer-encoding" not in post.headers
    assert post.body == {
        "model": "test",
        "messages": [{"role": "user", "content": run.script}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_without_a_key_no_authorization_is_sent(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    run = Run(make_client(api_key=None), provider.fresh(scripts.answer(["x"]))).start()
    run.wait_completed()
    assert "authorization" not in provider.wait_post(script=run.script).headers


@pytest.mark.parametrize("slashes", ["", "/", "//"])
def test_a_base_url_may_end_with_a_slash(
    make_client: MakeClient, provider: ProviderProcess, slashes: str
) -> None:
    client = make_client(base_url=provider.base_url + slashes)
    run = Run(client, provider.fresh(scripts.answer(["x"]))).start()
    run.wait_completed()
    assert provider.wait_post(script=run.script).path == "/v1/chat/completions"


def test_a_provider_does_not_show_its_key() -> None:
    assert KEY not in repr(Provider("http://x", "m", api_key=KEY))


def test_many_events_in_one_chunk_become_one_put(
    client: LlmClient, provider: ProviderProcess
) -> None:
    burst = b"".join(text_event(f"{number} ") for number in range(20))
    script = [*scripts.opening(), send(chunk(burst)), *scripts.ending()]
    run = Run(client, provider.fresh(script)).start()
    run.wait_completed()
    assert [delta.text for delta in run.sink.deltas] == [
        "".join(f"{number} " for number in range(20))
    ]


def test_text_that_comes_in_one_read_with_done_is_not_lost(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh(scripts.raw([text_event("all") + finish_event() + done()])))
    run.start().wait_completed()
    assert run.sink.text == "all"


ENDS_WITHOUT_DONE = {
    "proper end": [send(chunk(text_event("c") + finish_event())), send(scripts.last_chunk())],
    "no blank line": [
        send(chunk(text_event("c") + finish_event().rstrip(b"\n"))),
        send(scripts.last_chunk()),
    ],
    "truncated": [send(chunk(text_event("c") + finish_event())), scripts.close()],
    "reset": [
        send(chunk(text_event("c") + finish_event())),
        wait("reset-after-finish"),
        scripts.reset(),
    ],
    "retry field": [
        send(chunk(b"retry: 1\n\n" + text_event("c") + finish_event())),
        send(scripts.last_chunk()),
    ],
}


@pytest.mark.parametrize("end", ENDS_WITHOUT_DONE)
def test_an_end_after_a_finish_reason_completes_the_answer_without_done(
    client: LlmClient, provider: ProviderProcess, end: str
) -> None:
    run = Run(
        client,
        provider.fresh([*scripts.opening(), *scripts.tokens(["a", "b"]), *ENDS_WITHOUT_DONE[end]]),
    )
    run.start()
    run.sink.wait_text("abc")
    provider.release("reset-after-finish")
    assert run.wait_completed().finish_reason == "stop"
    assert run.sink.text == "abc"
    assert posts(provider, run.script) == 1


def test_an_end_inside_the_event_after_the_finish_reason_completes_the_answer(
    client: LlmClient, provider: ProviderProcess
) -> None:
    events = [text_event("a"), finish_event(), b'data: {"choices": [], "usa']
    run = Run(client, provider.fresh([*map(send, framed(events, "http/1.0")), scripts.close()]))
    run.start()
    assert run.wait_completed().finish_reason == "stop"


def test_done_completes_the_answer_and_closes_a_connection_that_stays_open(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh(scripts.done_but_open(["a", "b"]))).start()
    result = run.wait_completed()
    conn = provider.wait_post(script=run.script).conn
    closed = provider.wait_closed(conn)
    assert closed.by in ("client_eof", "client_reset")
    assert closed.mid_script
    assert result.closed_at is not None

    again = Run(client, provider.fresh(scripts.answer(["c"]))).start()
    again.wait_completed()
    assert provider.wait_post(script=again.script).conn != conn


def test_a_flood_after_done_does_not_hold_the_end_up(
    client: LlmClient, provider: ProviderProcess
) -> None:
    flood = scripts.repeat([send(chunk(b": " + b"x" * 8000 + b"\n"))])
    script = [*scripts.opening(), *scripts.tokens(["a"]), *scripts.ending()[:-1], flood]
    run = Run(client, provider.fresh(script)).start()
    run.wait_completed()
    provider.wait_closed(conn_of(provider, run))


# Function calls ---------------------------------------------------------------------------------

ARGUMENTS = '{"city": "København", "days": [1, 2]}'
WEATHER = ToolCall("call_1", "get_weather", ARGUMENTS)
TIME = ToolCall("call_2", "get_time", '{"zone": "CET"}')
WEATHER_EVENTS = scripts.call_events(WEATHER.name, WEATHER.arguments)
TIME_EVENTS = scripts.call_events(TIME.name, TIME.arguments, index=1, call_id=TIME.id)
OWN_ID = re.compile(r"call_[0-9a-f]{24}\Z")

CALLS: Mapping[str, tuple[Sequence[bytes], Sequence[ToolCall]]] = {
    "in pieces": (WEATHER_EVENTS, [WEATHER]),
    "one character at a time": (
        scripts.call_events(WEATHER.name, ARGUMENTS, piece_chars=1),
        [WEATHER],
    ),
    "at once": (
        [
            scripts.call_event(
                {
                    "index": 0,
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ARGUMENTS},
                }
            )
        ],
        [WEATHER],
    ),
    "empty names later": (
        scripts.call_events(WEATHER.name, ARGUMENTS, later="empty"),
        [WEATHER],
    ),
    "null names later": (scripts.call_events(WEATHER.name, ARGUMENTS, later="null"), [WEATHER]),
    "no arguments": (scripts.call_events("f", ""), [ToolCall("call_1", "f", "{}")]),
    "arguments as an object": (
        [scripts.call_event({"index": 0, "id": "a", "function": {"name": "f", "arguments": {}}})],
        [ToolCall("a", "f", "{}")],
    ),
    "one after the other": ([*WEATHER_EVENTS, *TIME_EVENTS], [WEATHER, TIME]),
    "the second first": ([*TIME_EVENTS, *WEATHER_EVENTS], [TIME, WEATHER]),
    "interleaved": (scripts.interleaved(WEATHER_EVENTS, TIME_EVENTS), [WEATHER, TIME]),
    "without index": (
        [
            *scripts.call_events(WEATHER.name, ARGUMENTS, index=None),
            *scripts.call_events(TIME.name, TIME.arguments, index=None, call_id=TIME.id),
        ],
        [WEATHER, TIME],
    ),
}
"""The events of an answer's calls, and the calls."""


@pytest.mark.parametrize("variant", CALLS)
def test_function_calls_are_given_whole_and_in_order_after_the_text(
    client: LlmClient, provider: ProviderProcess, variant: str
) -> None:
    events, calls = CALLS[variant]
    run = Run(client, provider.fresh(scripts.call_answer(events, ["Let me ", "look."]))).start()
    result = run.wait_completed()
    assert (result.finish_reason, result.usage) == ("tool_calls", Usage(9, 12, 21))
    assert run.sink.text == "Let me look."
    assert run.sink.all[-len(calls) :] == run.sink.calls == calls


@pytest.mark.parametrize("variant", ["legacy", "no id"])
def test_a_call_without_an_id_is_given_one(
    client: LlmClient, provider: ProviderProcess, variant: str
) -> None:
    if variant == "legacy":
        events = scripts.legacy_call_events(WEATHER.name, ARGUMENTS)
    else:
        events = scripts.call_events(WEATHER.name, ARGUMENTS, call_id=None)
    run = Run(client, provider.fresh(scripts.call_answer(events, reason="function_call"))).start()
    assert run.wait_completed().finish_reason == "function_call"
    [call] = run.sink.calls
    assert OWN_ID.match(call.id)
    assert (call.name, call.arguments) == (WEATHER.name, ARGUMENTS)


def test_an_answer_with_calls_leaves_its_connection_to_the_next_request(
    client: LlmClient, provider: ProviderProcess
) -> None:
    runs = []
    for _ in range(2):
        runs.append(Run(client, provider.fresh(scripts.call_answer(WEATHER_EVENTS))).start())
        runs[-1].wait_completed()
    assert conn_of(provider, runs[0]) == conn_of(provider, runs[1])
    assert posts(provider, runs[0].script) == 1


def test_text_and_calls_and_the_finish_in_one_read_keep_their_order(
    client: LlmClient, provider: ProviderProcess
) -> None:
    finish = scripts.delta_event({"content": "Now."}, "tool_calls")
    events = [text_event("So. "), *WEATHER_EVENTS, finish, text_event("Later."), done()]
    run = Run(client, provider.fresh(scripts.raw([b"".join(events)]))).start()
    run.wait_completed()
    assert run.sink.all == ["So. Now.", WEATHER, "Later."]


def test_calls_are_given_at_the_finish_reason_and_not_before(
    client: LlmClient, provider: ProviderProcess
) -> None:
    key = provider.unique("key")
    script = [
        *scripts.opening(),
        *scripts.chunks([*WEATHER_EVENTS, text_event("a")]),
        wait(key),
        send(chunk(finish_event("tool_calls"))),
        scripts.hang(),
    ]
    run = Run(client, provider.fresh(script)).start()
    run.sink.wait_text("a")
    assert run.sink.calls == []
    provider.release(key)
    run.sink.wait_for(lambda: run.sink.calls == [WEATHER], "the call")
    assert run.results == []
    run.generation.close()
    assert run.wait_end().ending is Ending.CLOSED
    assert run.sink.calls == [WEATHER]


def test_without_a_finish_reason_calls_are_given_at_done(
    client: LlmClient, provider: ProviderProcess
) -> None:
    script = scripts.raw([text_event("a"), *WEATHER_EVENTS, *TIME_EVENTS, done()])
    run = Run(client, provider.fresh(script)).start()
    assert run.wait_completed().finish_reason is None
    assert run.sink.all == ["a", WEATHER, TIME]


@pytest.mark.parametrize("end", [scripts.last_chunk(), b""], ids=["proper end", "truncated"])
def test_with_a_finish_reason_calls_need_no_done(
    client: LlmClient, provider: ProviderProcess, end: bytes
) -> None:
    script = [*scripts.opening(), *scripts.chunks([*WEATHER_EVENTS, finish_event("tool_calls")])]
    run = Run(client, provider.fresh([*script, send(end), scripts.close()])).start()
    run.wait_completed()
    assert run.sink.calls == [WEATHER]


def test_calls_are_given_once_however_often_the_finish_comes(
    client: LlmClient, provider: ProviderProcess
) -> None:
    again = scripts.call_event({"index": 0, "id": "", "function": {"name": "", "arguments": ""}})
    finish = finish_event("tool_calls")
    events = [*WEATHER_EVENTS, finish, again, finish, finish_event("stop"), done()]
    run = Run(client, provider.fresh(scripts.raw(events))).start()
    run.wait_completed()
    assert run.sink.calls == [WEATHER]


@pytest.mark.parametrize("calls", [[], [WEATHER]], ids=["without calls", "with a call"])
def test_a_call_that_goes_on_after_the_finish_is_malformed(
    client: LlmClient, provider: ProviderProcess, calls: list[ToolCall]
) -> None:
    before = WEATHER_EVENTS if calls else []
    events = [*before, finish_event(), text_event("a"), *TIME_EVENTS, done()]
    run = Run(client, provider.fresh(scripts.raw(events))).start()
    run.wait_failed(
        MalformedCallError,
        "^malformed function call of 'get_time': more of it came after the finish reason$",
    )
    assert run.sink.all == [*calls, "a"]


MALFORMED_CALLS: Mapping[str, tuple[Sequence[bytes], str]] = {
    "no json": (
        scripts.call_events("f", "Copenhagen"),
        "of 'f': its arguments are not valid JSON: ",
    ),
    "half json": (scripts.call_events("f", '{"x":'), "of 'f': its arguments are not valid JSON: "),
    "no object": (scripts.call_events("f", "[1]"), "of 'f': its arguments are not a JSON object$"),
    "no name": (scripts.call_events("", "{}"), "it has no name$"),
    "the second": (
        [*WEATHER_EVENTS, *scripts.call_events("g", "?", index=1)],
        "of 'g': its arguments are not valid JSON: ",
    ),
    "too many": (
        [scripts.call_event({"index": i, "function": {"name": "f"}}) for i in range(129)],
        "of 'f': the answer has more than 128 calls$",
    ),
    "too much": (
        scripts.call_events("f", "x" * (1 << 20), piece_chars=1 << 17),
        "of 'f': the calls of the answer exceed 1 MiB$",
    ),
    "the key for a name": (scripts.call_events(KEY, "?"), r"of '\*\*\*': its arguments"),
}


@pytest.mark.parametrize("ends_with", ["finish", "done"])
@pytest.mark.parametrize("fault", MALFORMED_CALLS)
def test_a_malformed_call_fails_the_answer_and_none_is_given(
    client: LlmClient, provider: ProviderProcess, fault: str, ends_with: str
) -> None:
    events, words = MALFORMED_CALLS[fault]
    end = [finish_event("tool_calls")] if ends_with == "finish" else []
    body = b"".join([text_event("So. "), *events, text_event("a"), *end, done()])
    script = [*scripts.opening(), send(chunk(body)), scripts.hang()]
    run = Run(client, provider.fresh(script)).start()
    run.wait_failed(MalformedCallError, f"^malformed function call.*{words}")
    assert run.sink.calls == []
    assert run.sink.text == ("So. " if fault.startswith("too") else "So. a")
    provider.wait_closed(conn_of(provider, run))
    assert posts(provider, run.script) == 1


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_call_that_was_cut_off_before_its_arguments_is_not_given(
    client: LlmClient, provider: ProviderProcess, reason: str
) -> None:
    script = scripts.call_answer(scripts.call_events("f", ""), reason=reason)
    run = Run(client, provider.fresh(script)).start()
    run.wait_failed(MalformedCallError, "the answer was cut off before its arguments$")
    assert run.sink.calls == []


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (scripts.cut_in_call(WEATHER_EVENTS, ["a"]), IncompleteAnswerError),
        (scripts.cut_in_call([*WEATHER_EVENTS, finish_event()], ["a"]), IncompleteAnswerError),
        (scripts.raw([text_event("a"), *WEATHER_EVENTS]), IncompleteAnswerError),
        (scripts.raw([text_event("a"), *WEATHER_EVENTS, b"data: {\n\n"]), MalformedStreamError),
        (
            scripts.raw([text_event("a"), *WEATHER_EVENTS, scripts.error_event("no"), done()]),
            ProviderReportedError,
        ),
        (
            scripts.raw([text_event("a"), *WEATHER_EVENTS, b'{"error": "no"}\n', done()]),
            ProviderReportedError,
        ),
    ],
    ids=["cut in it", "cut after it", "end after it", "malformed", "error", "bare error"],
)
def test_an_answer_that_is_not_completed_gives_no_call(
    client: LlmClient, provider: ProviderProcess, script: Script, error: type[StreamError]
) -> None:
    run = Run(client, provider.fresh(script)).start()
    run.wait_failed(error, "")
    assert run.sink.all == ["a"]


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_close_before_the_finish_gives_no_call(
    client: LlmClient, provider: ProviderProcess, is_whole: bool
) -> None:
    events = WEATHER_EVENTS if is_whole else WEATHER_EVENTS[:-1]
    key = provider.unique("key")
    script = [*scripts.opening(), *scripts.chunks([*events, text_event("a")]), wait(key)]
    run = Run(client, provider.fresh([*script, *scripts.ending("tool_calls")])).start()
    run.sink.wait_text("a")
    run.generation.close()
    provider.release(key)
    assert run.wait_end().ending is Ending.CLOSED
    provider.wait_closed(conn_of(provider, run))
    assert run.sink.all == ["a"]


def test_a_close_while_a_call_is_taken_gives_no_further_one(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh(scripts.call_answer([*WEATHER_EVENTS, *TIME_EVENTS])))
    blocked = gevent.event.Event()

    def block(_: ToolCall) -> None:
        blocked.set()
        gevent.event.Event().wait()

    run.sink.on_call = block
    run.start()
    assert blocked.wait(PATIENCE_SECONDS)
    run.generation.close()
    assert run.wait_end().ending is Ending.CLOSED
    provider.wait_closed(conn_of(provider, run))
    assert run.sink.calls == [WEATHER]


@pytest.mark.parametrize("at", ["text", "call"])
def test_a_close_from_within_the_sink_gives_no_further_call(
    client: LlmClient, provider: ProviderProcess, at: str
) -> None:
    # All in one read: the reader does not wait once until the end.
    body = b"".join([text_event("a"), *WEATHER_EVENTS, *TIME_EVENTS, finish_event(), done()])
    run = Run(client, provider.fresh(scripts.raw([body])))
    if at == "text":
        run.sink.on_put = lambda _: run.generation.close()
    else:
        run.sink.on_call = lambda _: run.generation.close()
    run.start()
    result = run.wait_end()
    assert (result.ending, result.error) == (Ending.CLOSED, None)
    assert result.closed_at is not None
    assert run.sink.all == (["a"] if at == "text" else ["a", WEATHER])
    assert len(run.results) == 1


def test_pieces_of_a_call_are_told_by_their_length(
    client: LlmClient, provider: ProviderProcess
) -> None:
    key = provider.unique("key")
    script: Script = [*scripts.opening()]
    for number, event in enumerate(WEATHER_EVENTS):
        script += [wait(f"{key}-{number}"), send(chunk(event))]
    run = Run(client, provider.fresh([*script, *scripts.ending("tool_calls")])).start()
    for number in range(len(WEATHER_EVENTS)):
        provider.release(f"{key}-{number}")
        run.sink.wait_puts(number + 1)
    run.wait_completed()
    assert all(delta.is_token and not delta.text for delta in run.sink.deltas)
    first, *rest = [delta.call_chars for delta in run.sink.deltas]
    assert first == len("call_1get_weather")
    assert sum(rest) == len(ARGUMENTS)


def test_pieces_that_come_in_one_read_are_told_at_once(
    client: LlmClient, provider: ProviderProcess
) -> None:
    nothing = scripts.call_event({"index": 0, "function": {"arguments": ""}})
    script = scripts.raw([b"".join(WEATHER_EVENTS), nothing, finish_event(), done()])
    run = Run(client, provider.fresh(script)).start()
    run.wait_completed()
    chars = len("call_1get_weather" + ARGUMENTS)
    assert run.sink.deltas == [Delta(call_chars=chars)]


# Exactly one POST -------------------------------------------------------------------------------

RETRY = send(chunk(b"retry: 1\n\n"))  # what would make requests-sse POST again after 2 ms
ENDS_OF_ANY_KIND: Mapping[str, Script] = {
    "completed": scripts.answer(["a"]),
    "without done": [*scripts.opening(), RETRY, *scripts.ending()[:1], send(scripts.last_chunk())],
    "without anything": [*scripts.opening(), RETRY, send(scripts.last_chunk())],
    "empty body": [send(scripts.sse_head()), send(scripts.last_chunk())],
    "no body": [send(scripts.sse_head(content_length=0))],
    "truncated": [*scripts.opening(), RETRY, scripts.close()],
    "truncated content-length": [
        send(scripts.sse_head(content_length=9999), b"retry: 1\n\n", text_event("a")),
        scripts.close(),
    ],
    "truncated http/1.0": [
        send(scripts.sse_head(http10=True), b"retry: 1\n\n", text_event("a")),
        scripts.close(),
    ],
    "reset": [*scripts.opening(), RETRY, scripts.reset()],
    "reset unanswered": [scripts.reset()],
    "closed unanswered": [scripts.close()],
    "closed inside the head": [send(b"HTTP/1.1 200 OK\r\nContent-"), scripts.close()],
    "no http": [send(b"SSH-2.0-OpenSSH_9.2\r\n"), scripts.close()],
    "error": [*scripts.opening(), RETRY, send(chunk(scripts.error_event("no")))],
    "malformed": [*scripts.opening(), RETRY, send(chunk(b"data: {\n\n"))],
    "not utf-8": [*scripts.opening(), RETRY, send(chunk(b"data: \xff\n\n"))],
    "not sse": scripts.not_sse(),
    **{
        str(status): scripts.http_error(status, {"error": {"message": "no"}}, {"Retry-After": "0"})
        for status in (400, 401, 403, 404, 408, 422, 429, 500, 502, 503, 504)
    },
    **{
        str(status): scripts.http_error(status, "", {"Location": "/v1/elsewhere"})
        for status in (300, 301, 302, 303, 304, 307, 308)
    },
    "201": scripts.http_error(201, {}),
    "204": [send(scripts.head(204, {}))],
}


@pytest.mark.parametrize("end", ENDS_OF_ANY_KIND)
def test_there_is_one_post_whatever_the_end(
    client: LlmClient, provider: ProviderProcess, end: str
) -> None:
    run = Run(client, provider.fresh(ENDS_OF_ANY_KIND[end])).start()
    run.wait_end()
    assert posts(provider, run.script) == 1


# Faults, and their words ------------------------------------------------------------------------

FAULTS: Mapping[str, tuple[Script, type[StreamError], str]] = {
    "truncated": (
        scripts.truncated(["a"]),
        IncompleteAnswerError,
        "^incomplete answer: the provider's stream ended without a finish reason",
    ),
    "reset": (
        [*scripts.opening(), *scripts.tokens(["a"]), wait("reset"), scripts.reset()],
        IncompleteAnswerError,
        r"^incomplete answer: .*\(Connection reset by peer\)$",
    ),
    "proper end too early": (
        scripts.raw([text_event("a")]),
        IncompleteAnswerError,
        "^incomplete answer: the provider's stream ended without a finish reason$",
    ),
    "truncated inside an event": (
        [send(scripts.sse_head(http10=True), text_event("a"), b'data: {"cho'), scripts.close()],
        IncompleteAnswerError,
        "^incomplete answer",
    ),
    "truncated inside a character": (
        [send(scripts.sse_head(http10=True), text_event("a"), b'data: "\xe4\xbd'), scripts.close()],
        IncompleteAnswerError,
        "^incomplete answer",
    ),
    "content-length not reached": (
        [send(scripts.sse_head(content_length=9999), text_event("a")), scripts.close()],
        IncompleteAnswerError,
        "^incomplete answer",
    ),
    "no chunk size": (
        [send(scripts.sse_head(), chunk(text_event("a")), b"what?\r\n")],
        IncompleteAnswerError,
        "^incomplete answer",
    ),
    "error in the stream": (
        scripts.error_in_stream("model overloaded", ["a"]),
        ProviderReportedError,
        "^the provider reported: model overloaded$",
    ),
    "error event": (
        scripts.raw([text_event("a"), b'event: error\ndata: {"message": "overloaded"}\n\n']),
        ProviderReportedError,
        "^the provider reported: overloaded$",
    ),
    "error that quotes the key": (
        scripts.error_in_stream(f"bad key {KEY}!", ["a"]),
        ProviderReportedError,
        r"^the provider reported: bad key \*\*\*!$",
    ),
    "long error": (
        scripts.error_in_stream("x" * 10_000, ["a"]),
        ProviderReportedError,
        "^the provider reported: x{500}$",
    ),
    "bare error line": (
        scripts.raw([text_event("a"), b'{"error": {"message": "out of memory"}}\n']),
        ProviderReportedError,
        "^the provider reported: out of memory$",
    ),
    "bare error, then the end as if all were well": (
        scripts.raw([text_event("a"), b'{"error": {"message": "out of memory"}}\n', done()]),
        ProviderReportedError,
        "the provider reported: out of memory",
    ),
    "bare error, no line end": (
        scripts.raw([text_event("a"), b'{"error": "out of memory"}']),
        ProviderReportedError,
        "^the provider reported: out of memory$",
    ),
    "bare error over several lines": (
        scripts.raw([text_event("a"), b'{\n  "error": {\r\n    "message": "oom"\n  }\n}\n']),
        ProviderReportedError,
        "^the provider reported: oom$",
    ),
    "bare error that quotes the key": (
        scripts.raw([text_event("a"), b'{"error": "bad key %s"}' % KEY.encode()]),
        ProviderReportedError,
        r"^the provider reported: bad key \*\*\*$",
    ),
    "malformed json": (
        scripts.raw([text_event("a"), b'data: {"choices": [\n\n', text_event("b")]),
        MalformedStreamError,
        "^malformed stream: ",
    ),
    "json of another shape": (
        scripts.raw([text_event("a"), b'data: {"hello": 1}\n\n', text_event("b")]),
        MalformedStreamError,
        "^malformed stream: ",
    ),
    "json too deep": (
        scripts.raw([text_event("a"), b"data: " + b'{"error":[' * 5000 + b"\n\n", text_event("b")]),
        MalformedStreamError,
        "^malformed stream: ",
    ),
    "invalid utf-8": (
        scripts.raw([text_event("a"), b'data: "\xff\xfe"\n\n', text_event("b")]),
        MalformedStreamError,
        "^malformed stream: invalid start byte$",
    ),
    "broken gzip": (
        [
            send(scripts.sse_head(gzip=True)),
            send(chunk(scripts.gzip_pieces([text_event("a")])[0])),
            send(chunk(b"this is not a deflate block")),
            scripts.hang(),
        ],
        MalformedStreamError,
        "^malformed stream: bad compression$",
    ),
}


READ_TO_THE_END = {"proper end too early", *(fault for fault in FAULTS if "bare error" in fault)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_stream_says_what_is_wrong_and_keeps_the_text_before_it(
    client: LlmClient, provider: ProviderProcess, fault: str
) -> None:
    script, error, text = FAULTS[fault]
    run = Run(client, provider.fresh(script)).start()
    run.sink.wait_text("a")
    provider.release("reset")
    result = run.wait_failed(error, text)
    assert run.sink.text == "a"
    assert result.finish_reason is None
    if fault not in READ_TO_THE_END:
        provider.wait_closed(conn_of(provider, run))
    assert posts(provider, run.script) == 1


def test_text_in_one_read_with_the_fault_after_it_is_not_lost(
    client: LlmClient, provider: ProviderProcess
) -> None:
    for fault in (b"data: {\n\n", b"data: \xff\n\n", scripts.error_event("no")):
        run = Run(client, provider.fresh(scripts.raw([text_event("a") + fault]))).start()
        assert run.wait_end().ending is Ending.FAILED
        assert run.sink.text == "a"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": f"Incorrect API key: {KEY}."}}, r"Incorrect API key: \*\*\*\."),
        ({"error": "no"}, "no"),
        ({"detail": "no"}, "no"),
        ("plain words \n", "plain words"),
        (f"plain {KEY} words", r"plain \*\*\* words"),
        ("x" * 490 + KEY * 1000, r"x{490}(\*\*\*){3}\*"),
    ],
)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500, 503])
def test_a_status_is_reported_with_the_providers_message_without_the_key(
    client: LlmClient, provider: ProviderProcess, status: int, body: Any, message: str
) -> None:
    run = Run(client, provider.fresh(scripts.http_error(status, body))).start()
    result = run.wait_failed(BadStatusError, f"^the provider answered {status}: {message}$")
    assert isinstance(result.error, BadStatusError)
    assert result.error.status == status
    assert run.sink.times_opened == 0


def test_a_status_without_a_message_is_reported_as_such(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh(scripts.http_error(500, ""))).start()
    run.wait_failed(BadStatusError, "^the provider answered 500$")


def test_a_zipped_error_body_is_read(client: LlmClient, provider: ProviderProcess) -> None:
    body = gzip.compress(b'{"error": "no such model"}')
    head = {"Content-Encoding": "gzip", "Content-Length": str(len(body))}
    run = Run(client, provider.fresh([send(scripts.head(404, head), body)])).start()
    run.wait_failed(BadStatusError, "^the provider answered 404: no such model$")


def test_an_error_body_that_breaks_off_still_gives_the_status(
    client: LlmClient, provider: ProviderProcess
) -> None:
    head = scripts.head(500, {"Content-Length": "100"})
    run = Run(client, provider.fresh([send(head, b"it br"), scripts.close()])).start()
    run.wait_failed(BadStatusError, "^the provider answered 500: it br")


def test_an_endless_error_body_is_read_within_a_bound(
    client: LlmClient, provider: ProviderProcess
) -> None:
    flood = scripts.repeat([send(chunk(b"x" * 8000))])
    head = scripts.head(500, {"Transfer-Encoding": "chunked"})
    run = Run(client, provider.fresh([send(head), flood])).start()
    run.wait_failed(BadStatusError, "^the provider answered 500: x{500}$")
    provider.wait_closed(conn_of(provider, run))


def test_a_web_page_is_not_a_stream(client: LlmClient, provider: ProviderProcess) -> None:
    run = Run(client, provider.fresh([*scripts.not_sse(), scripts.hang()])).start()
    run.wait_failed(NotAStreamError, "^the provider's answer is not a stream: .*text/html")
    assert run.sink.times_opened == 0
    provider.wait_closed(conn_of(provider, run))


def test_an_answer_without_a_content_type_is_not_a_stream(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh([send(scripts.head(200, {}), text_event("a"))])).start()
    run.wait_failed(NotAStreamError, "content type is missing")


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_a_redirect_is_refused_and_the_key_goes_nowhere_else(
    client: LlmClient, provider: ProviderProcess, status: int
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as elsewhere:
        location = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/v1/chat/completions"
        head = scripts.head(status, {"Location": location, "Content-Length": "1000"})
        run = Run(client, provider.fresh([send(head, b"the rest"), scripts.hang()])).start()
        run.wait_failed(
            BadStatusError, f"^the provider answered {status}: redirects are not followed$"
        )
        provider.wait_closed(conn_of(provider, run))
        assert posts(provider, run.script) == 1
        elsewhere.settimeout(0)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_a_refused_connection_is_no_connection(make_client: MakeClient, refused_port: int) -> None:
    run = Run(make_client(base_url=f"http://127.0.0.1:{refused_port}/v1"), "x").start()
    run.wait_failed(ConnectFailedError, "^no connection to the provider: .*(refused|111)")


class FakeResolver:
    """Stands in for gevent's, which would ask the network."""

    def __init__(self) -> None:
        self.asked = gevent.event.Event()
        self.answer: Exception | None = None

    def getaddrinfo(self, *_: object, **__: object) -> Any:
        self.asked.set()
        if self.answer is not None:
            raise self.answer
        gevent.event.Event().wait()


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> FakeResolver:
    fake = FakeResolver()
    monkeypatch.setattr(gevent.get_hub(), "resolver", fake)
    return fake


def test_an_unknown_host_is_no_connection(make_client: MakeClient, resolver: FakeResolver) -> None:
    resolver.answer = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    run = Run(make_client(base_url="http://nowhere.invalid/v1"), "x").start()
    run.wait_failed(
        ConnectFailedError, "^no connection to the provider: .*Name or service not known"
    )


def test_an_untrusted_certificate_is_no_connection(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    client = make_client(base_url=provider.tls_base_url, ca_file=None)
    run = Run(client, provider.unique("never-asked-for")).start()
    run.wait_failed(
        ConnectFailedError, "^no connection to the provider: .*certificate verify failed"
    )
    assert posts(provider, run.script) == 0


def test_a_server_that_does_not_speak_tls_is_no_connection(
    make_client: MakeClient,
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as plain:
        client = make_client(base_url=f"https://127.0.0.1:{plain.getsockname()[1]}/v1")
        run = Run(client, "x").start()
        accepted, _ = plain.accept()
        with closing(accepted):
            accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            run.wait_failed(ConnectFailedError, "^no connection to the provider: ")


@pytest.mark.parametrize("url", ["127.0.0.1/v1", "ftp://127.0.0.1/v1", "http:///v1"])
def test_a_base_url_that_is_none_is_refused_when_the_client_is_made_or_used(
    make_client: MakeClient, url: str
) -> None:
    try:
        run = Run(make_client(base_url=url), "x").start()
    except ValueError:  # of which requests' InvalidURL and MissingSchema are kinds
        return
    run.wait_failed(ConnectFailedError, "^no connection to the provider: ")


@pytest.mark.parametrize("end", [scripts.close(), scripts.reset()])
def test_a_connection_closed_unanswered_is_not_called_refused(
    client: LlmClient, provider: ProviderProcess, end: scripts.Step
) -> None:
    run = Run(client, provider.fresh([end])).start()
    run.wait_failed(
        IncompleteAnswerError, "^the provider closed the connection without an answer: "
    )


@pytest.mark.parametrize("content", [KEY, "x" * 60_000], ids=["key", "long"])
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("HTTP/1.1 200 OK\r\nContent-Type: {}\r\n\r\n", NotAStreamError),
        ("HTTP/1.1 500 Oh\r\nContent-Length: 99999\r\n\r\n{}", BadStatusError),
        ("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n{}", IncompleteAnswerError),
    ],
    ids=["content type", "error body", "stray"],
)
def test_what_a_provider_says_is_quoted_without_the_key_and_within_a_bound(
    client: LlmClient,
    provider: ProviderProcess,
    answer: str,
    content: str,
    error: type[StreamError],
) -> None:
    script = [send(answer.format(content).encode()), scripts.close()]
    result = Run(client, provider.fresh(script)).start().wait_failed(error, "^(the provider|inc)")
    assert len(str(result.error)) < 1000


def test_a_sink_that_fails_ends_the_generation_and_closes_the_connection(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh(scripts.idle_mid_stream(["a"])))

    def fail(_: Delta) -> None:
        raise RuntimeError("a bug")

    run.sink.on_put = fail
    run.start()
    run.wait_failed(StreamError, "^the gateway failed to read the answer$")
    provider.wait_closed(conn_of(provider, run))


# Bounds -----------------------------------------------------------------------------------------


@pytest.fixture
def peak_bytes() -> Iterator[Callable[[], int]]:
    """How much more memory Python has had in use at once than at the start."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    yield lambda: tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()


def zipped(total_bytes: int) -> bytes:
    piece = scripts.gzip_pieces([b"data: " + b"a" * total_bytes])[0]
    return chunk(piece)


OVERSIZED: Mapping[str, tuple[Script, str]] = {
    "one line": (scripts.one_long_line(10 << 20), "over 4 MiB"),
    "one line, not chunked": (
        [
            send(scripts.sse_head(http10=True), b"data: "),
            scripts.repeat([send(b"a" * 65536)]),
        ],
        "over 4 MiB",
    ),
    "one line, zipped": (
        [send(scripts.sse_head(gzip=True)), send(zipped(50 << 20)), scripts.hang()],
        "over 4 MiB",
    ),
    "many lines": (
        [
            *scripts.opening(),
            scripts.repeat([send(chunk(b"data: %s\n" % (b"a" * 16000) * 4))]),
        ],
        "over 4 MiB",
    ),
    "many small lines": (
        [*scripts.opening(), scripts.repeat([send(chunk(b"data:a\n" * 1000))])],
        f"over {MAX_EVENT_LINES} lines",
    ),
}


@pytest.mark.parametrize("kind", OVERSIZED)
def test_an_oversized_event_is_an_error_within_bounded_memory(
    client: LlmClient,
    provider: ProviderProcess,
    peak_bytes: Callable[[], int],
    kind: str,
) -> None:
    script, text = OVERSIZED[kind]
    run = Run(client, provider.fresh(script)).start()
    run.wait_failed(MalformedStreamError, f"^malformed stream: an event of {text}$")
    assert peak_bytes() < 20 << 20
    provider.wait_closed(conn_of(provider, run))


def test_an_event_of_three_mebibytes_arrives(client: LlmClient, provider: ProviderProcess) -> None:
    text = "0123456789abcdef" * (3 << 16)
    run = Run(client, provider.fresh(scripts.answer([text, "b"]))).start()
    run.wait_completed()
    assert run.sink.text == text + "b"


FLOOD_PUTS = 500
FLOOD_EVENT_BYTES = len(chunk(text_event("flood ")))
BYTES_BETWEEN_TURNS = 24 * 1024  # a turn is due after 8 KiB, and one read gives up to 16 KiB more

# Fairness ---------------------------------------------------------------------------------------


@pytest.fixture
def turns() -> Iterator[Callable[[], int]]:
    """Counts the turns of the loop that another greenlet gets."""
    count = 0

    def take_turns() -> None:
        nonlocal count
        while True:
            count += 1
            gevent.sleep(1e-6)  # a whole turn, as whoever waits for a socket needs it

    other = gevent.spawn(take_turns)
    yield lambda: count
    other.kill()


@pytest.fixture
def tls_in_tls(
    make_client: MakeClient, provider: ProviderProcess, tmp_path: Path
) -> Iterator[LlmClient]:
    """Asks over TLS, through a proxy that speaks TLS, too."""
    authority = trustme.CA()
    ca_file = trust_both(authority, provider.ca_file, tmp_path)
    with Proxy(authority=authority) as proxy:
        yield make_client(base_url=provider.tls_base_url, proxy=proxy.url(), ca_file=ca_file)


def test_a_flood_leaves_turns_to_everybody_else(
    client: LlmClient, provider: ProviderProcess, turns: Callable[[], int]
) -> None:
    turns_at_put: list[int] = []
    flood = Run(client, provider.fresh(scripts.flood()))
    flood.sink.block_on_put()
    flood.start()
    provider.wait_blocked(script=flood.script)  # from now on there is always data
    flood.sink.on_put = lambda _: turns_at_put.append(turns())
    flood.sink.unblock()
    flood.sink.wait_for(lambda: len(turns_at_put) >= FLOOD_PUTS, "puts")
    flood.generation.close()
    flood.wait_end()
    given_bytes = FLOOD_PUTS * FLOOD_EVENT_BYTES
    assert turns_at_put[FLOOD_PUTS - 1] - turns_at_put[0] >= given_bytes // BYTES_BETWEEN_TURNS


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            [
                *scripts.opening(),
                send(b"0\r\n"),
                scripts.repeat([send(b"X-More: trailers\r\n" * 500)]),
            ],
            id="trailers",
        ),
        pytest.param(
            [scripts.repeat([send(b"HTTP/1.1 100 Continue\r\n\r\n" * 500)])],
            id="100-continue",
        ),
    ],
)
def test_what_the_http_library_reads_in_loops_of_its_own_starves_nobody(
    client: LlmClient, provider: ProviderProcess, script: Script
) -> None:
    endless = Run(client, provider.fresh(script)).start()
    provider.wait_post(script=endless.script)
    other = Run(client, provider.fresh(scripts.answer(["still", " here"]))).start()
    other.wait_completed()
    endless.generation.close()
    assert endless.wait_end().ending is Ending.CLOSED
    provider.wait_closed(conn_of(provider, endless))


def test_tls_within_tls_which_holds_some_of_what_comes_next_leaves_turns_to_everybody_else(
    tls_in_tls: LlmClient,
    provider: ProviderProcess,
    turns: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns_at_read: list[int] = []
    recv_into = SSLTransport.recv_into

    def recv_into_counted(self: SSLTransport, *args: Any) -> Any:
        turns_at_read.append(turns())
        return recv_into(self, *args)

    monkeypatch.setattr(SSLTransport, "recv_into", recv_into_counted)
    trailers = scripts.repeat([send(b"X-More: trailers\r\n" * 500)])
    script = [*scripts.opening(), *scripts.tokens(["a"]), send(b"0\r\n"), trailers]
    endless = Run(tls_in_tls, provider.fresh(script))
    endless.sink.block_on_put()
    endless.start()
    provider.wait_blocked(script=endless.script)  # from now on there is always data
    turns_at_read.clear()
    endless.sink.unblock()
    wait_until(lambda: len(turns_at_read) >= 40, "reads")
    endless.generation.close()
    assert endless.wait_end().ending is Ending.CLOSED
    # Of a record that is there the rest may be read at once: of 16 KiB, by 8 KiB.
    assert turns_at_read[39] - turns_at_read[0] >= 40 // 3


@pytest.mark.parametrize("kilobytes", [1, 40, 100])
def test_tls_within_tls_gives_all_that_has_left_the_kernel_without_waiting_for_more(
    tls_in_tls: LlmClient, provider: ProviderProcess, kilobytes: int
) -> None:
    """Of an event of several records, the last may have been read ahead with the one before."""
    text = "x" * (kilobytes << 10)
    script = [*scripts.opening(), *scripts.tokens([text]), scripts.hang()]
    run = Run(tls_in_tls, provider.fresh(script)).start()
    run.sink.wait_text(text)
    run.generation.close()
    assert run.wait_end().ending is Ending.CLOSED


def test_floods_do_not_starve_another_generation(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    client = make_client()
    floods = [Run(client, provider.fresh(scripts.flood())).start() for _ in range(5)]
    for flood in floods:
        flood.sink.wait_text("flood ")
    texts = [f"{number} " for number in range(100)]
    run = Run(client, provider.fresh(scripts.answer(texts))).start()
    run.wait_completed()
    assert run.sink.text == "".join(texts)
    for flood in floods:
        flood.generation.close()
    for flood in floods:
        assert flood.wait_end().ending is Ending.CLOSED


def test_a_blocked_sink_holds_up_its_own_stream_and_no_other(
    client: LlmClient, provider: ProviderProcess
) -> None:
    slow = Run(client, provider.fresh(scripts.flood()))
    slow.sink.block_on_put()
    slow.start()
    provider.wait_blocked(script=slow.script)
    assert len(slow.sink.deltas) == 1
    other = Run(client, provider.fresh(scripts.answer(["a", "b"]))).start()
    other.wait_completed()
    assert other.sink.text == "ab"
    assert len(slow.sink.deltas) == 1
    slow.generation.close()
    slow.wait_end()


# close(), at whatever point the reader is -------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a phase of the test below may use."""

    provider: ProviderProcess
    make_client: MakeClient

    def run(self, script: Script, port: Port = "http", blocked: bool = False, **fields: Any) -> Run:
        client = self.make_client(base_url=url_of(self.provider, port), **fields)
        run = Run(client, self.provider.fresh(script))
        if blocked:
            run.sink.block_on_put()
        return run.start()

    def conn_of(self, run: Run) -> int:
        return self.provider.wait_post(script=run.script).conn


Reached = tuple[Run, int]  # the connection that must be seen to close


def connecting(stage: Stage) -> Reached:
    if stage.provider.ports["full"] is None:
        pytest.skip("the full port needs Linux")
    since = time.monotonic()
    run = Run(stage.make_client(base_url=stage.provider.full_base_url), "x").start()
    return run, stage.provider.wait_connecting(since=since).conn


def in_the_tls_handshake(stage: Stage) -> Reached:
    since = time.monotonic()
    run = Run(stage.make_client(base_url=stage.provider.mute_base_url), "x").start()
    return run, stage.provider.wait_connected(port="mute", since=since).conn


def awaiting_headers(stage: Stage) -> Reached:
    run = stage.run(scripts.no_headers())
    return run, stage.conn_of(run)


def awaiting_headers_over_tls(stage: Stage) -> Reached:
    run = stage.run(scripts.no_headers(), "tls")
    return run, stage.conn_of(run)


def inside_the_headers(stage: Stage) -> Reached:
    run = stage.run([send(scripts.sse_head()[:-4]), scripts.mark("half"), scripts.hang()])
    return run, stage.provider.wait_mark("half", script=run.script).conn


def headers_only(stage: Stage) -> Reached:
    run = stage.run(scripts.headers_only())
    run.sink.wait_opened()
    return run, stage.conn_of(run)


def after_text(script: Script, port: Port = "http") -> Callable[[Stage], Reached]:
    def reach(stage: Stage) -> Reached:
        run = stage.run(script, port)
        run.sink.wait_text("a")
        return run, stage.conn_of(run)

    return reach


def idle_content_length(texts: Sequence[str]) -> Script:
    return [
        send(scripts.sse_head(content_length=9999)),
        *(send(text_event(text)) for text in texts),
        scripts.hang(),
    ]


def while_the_sink_blocks(script: Script) -> Callable[[Stage], Reached]:
    def reach(stage: Stage) -> Reached:
        run = stage.run(script, blocked=True)
        assert run.sink.blocked.wait(PATIENCE_SECONDS)
        return run, stage.conn_of(run)

    return reach


def while_the_sink_blocks_and_the_provider_too(stage: Stage) -> Reached:
    run = stage.run(scripts.flood("a"), blocked=True)
    return run, stage.provider.wait_blocked(script=run.script).conn


PHASES: Mapping[str, Callable[[Stage], Reached]] = {
    "connecting": connecting,
    "in the TLS handshake": in_the_tls_handshake,
    "awaiting headers": awaiting_headers,
    "awaiting headers over TLS": awaiting_headers_over_tls,
    "inside the headers": inside_the_headers,
    "headers only": headers_only,
    "idle": after_text(scripts.idle_mid_stream(["a"])),
    "idle over TLS": after_text(scripts.idle_mid_stream(["a"]), "tls"),
    "inside a chunk": after_text(scripts.stalled_inside_chunk(["a"])),
    "inside a chunk over TLS": after_text(scripts.stalled_inside_chunk(["a"]), "tls"),
    "flood": after_text(scripts.flood("a")),
    "flood over TLS": after_text(scripts.flood("a"), "tls"),
    "comments only": after_text(
        [*scripts.opening(), *scripts.tokens(["a"]), scripts.repeat([send(chunk(b": \n\n" * 99))])]
    ),
    "gzip": after_text(scripts.gzip_idle(["a"])),
    "HTTP/1.0": after_text(scripts.http10_idle(["a"])),
    "HTTP/1.0 over TLS": after_text(scripts.http10_idle(["a"]), "tls"),
    "Content-Length": after_text(idle_content_length(["a"])),
    "the sink blocks": while_the_sink_blocks(scripts.idle_mid_stream(["a"])),
    "the sink blocks, the answer is complete": while_the_sink_blocks(
        [*scripts.raw([text_event("a") + finish_event()]), scripts.hang()]
    ),
    "the sink blocks on DONE": while_the_sink_blocks(
        [*scripts.raw([text_event("a") + finish_event() + done()])[:-1], scripts.hang()]
    ),
    "the sink and the provider block": while_the_sink_blocks_and_the_provider_too,
}


# urllib3 leaves a socket on which it was interrupted so early to the finalizer, which warns.
EVERY_PHASE = [
    pytest.param(
        phase,
        marks=pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
        if PHASES[phase] in (connecting, in_the_tls_handshake)
        else (),
    )
    for phase in PHASES
]


@pytest.fixture
def stage(provider: ProviderProcess, make_client: MakeClient) -> Stage:
    return Stage(provider, make_client)


def assert_closed(provider: ProviderProcess, run: Run, conn: int) -> None:
    """It reported once, all is closed, and nothing comes afterwards."""
    result = run.wait_end()
    assert (result.ending, result.error) == (Ending.CLOSED, None)
    assert result.closed_at is not None
    assert run.generation._is_closed
    closed = provider.wait_closed(conn)
    assert closed.by in ("client_eof", "client_reset", "client_gave_up")
    text = run.sink.text
    run.sink.unblock()
    assert posts(provider, run.script) <= 1
    assert len(run.results) == 1
    assert run.sink.text == text


@pytest.mark.parametrize("phase", EVERY_PHASE)
def test_close_works_in_every_phase(stage: Stage, phase: str) -> None:
    run, conn = PHASES[phase](stage)
    assert not run.generation._is_closed
    assert run.results == []
    run.generation.close()
    assert_closed(stage.provider, run, conn)


@pytest.mark.parametrize("phase", EVERY_PHASE)
def test_closing_twice_from_several_greenlets_is_closing_once(stage: Stage, phase: str) -> None:
    run, conn = PHASES[phase](stage)
    run.generation.close()
    closers = [gevent.spawn(run.generation.close) for _ in range(3)]
    gevent.joinall(closers, PATIENCE_SECONDS, raise_error=True)
    run.generation.close()
    assert_closed(stage.provider, run, conn)
    run.generation.close()
    assert len(run.results) == 1


def test_a_second_close_does_not_cut_the_cleaning_up_short(stage: Stage) -> None:
    run = Run(stage.make_client(), stage.provider.fresh(scripts.idle_mid_stream(["a"])))
    blocked, cleaning, clean = gevent.event.Event(), gevent.event.Event(), gevent.event.Event()
    cleaned = []

    def block(_: Delta) -> None:
        try:
            blocked.set()
            gevent.event.Event().wait()
        finally:
            cleaning.set()
            cleaned.append(clean.wait(PATIENCE_SECONDS))

    run.sink.on_put = block
    run.start()
    assert blocked.wait(PATIENCE_SECONDS)
    run.generation.close()
    assert cleaning.wait(PATIENCE_SECONDS)
    run.generation.close()
    stage.provider.counts()  # a turn of the loop, in which a second kill would strike
    clean.set()
    assert_closed(stage.provider, run, conn_of(stage.provider, run))
    assert cleaned == [True]


def test_close_during_the_look_up_of_the_host(
    make_client: MakeClient, resolver: FakeResolver
) -> None:
    run = Run(make_client(base_url="http://slow.invalid/v1"), "x").start()
    assert resolver.asked.wait(PATIENCE_SECONDS)
    run.generation.close()
    result = run.wait_end()
    assert result.ending is Ending.CLOSED
    assert result.closed_at is not None


@pytest.mark.parametrize("started", [False, True])
def test_close_before_the_reader_ran_reports_and_sends_nothing(
    client: LlmClient, provider: ProviderProcess, started: bool
) -> None:
    run = Run(client, provider.unique("never-asked-for"))
    if started:
        run.start()
    run.generation.close()
    run.generation.start()
    result = run.wait_end()
    assert result.ending is Ending.CLOSED
    if not started:
        assert result == GenerationResult(Ending.CLOSED)
    run.generation.start()
    assert posts(provider, run.script) == 0
    assert len(run.results) == 1


def test_close_after_the_end_changes_nothing(client: LlmClient, provider: ProviderProcess) -> None:
    run = Run(client, provider.fresh(scripts.answer(["a"]))).start()
    run.wait_completed()
    run.generation.close()
    again = Run(client, provider.fresh(scripts.answer(["b"]))).start()
    again.wait_completed()
    assert conn_of(provider, again) == conn_of(provider, run)
    assert len(run.results) == 1


def test_close_during_the_drain_closes_the_socket_that_was_left_open(
    client: LlmClient, provider: ProviderProcess
) -> None:
    script = [send(scripts.sse_head()), send(chunk(text_event("a") + finish_event() + done()))]
    run = Run(client, provider.fresh([*script, scripts.hang()]))
    # The kill takes effect where the reader blocks next, which is in the drain.
    run.sink.on_put = lambda _: run.generation.close()
    run.start()
    result = run.wait_end()
    assert result.ending in (Ending.CLOSED, Ending.COMPLETED)
    assert result.closed_at is not None
    assert run.sink.text == "a"
    provider.wait_closed(conn_of(provider, run))
    assert len(run.results) == 1


def test_close_by_the_sink_itself_stops_a_flood(
    client: LlmClient, provider: ProviderProcess
) -> None:
    run = Run(client, provider.fresh(scripts.flood()))
    run.sink.on_put = lambda _: run.generation.close()
    run.start()
    assert run.wait_end().ending is Ending.CLOSED
    assert len(run.sink.deltas) * FLOOD_EVENT_BYTES <= BYTES_BETWEEN_TURNS
    provider.wait_closed(conn_of(provider, run))


def test_close_while_the_body_of_an_error_hangs(
    client: LlmClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = gevent.event.Event()
    read1 = Answer.read1

    def spy(self: Answer, most_bytes: int) -> bytes:
        reading.set()
        return read1(self, most_bytes)

    monkeypatch.setattr(Answer, "read1", spy)
    head = scripts.head(401, {"Content-Length": "100"})
    run = Run(client, provider.fresh([send(head), scripts.hang()])).start()
    assert reading.wait(PATIENCE_SECONDS)
    run.generation.close()
    assert_closed(provider, run, provider.wait_post(script=run.script).conn)


def test_close_while_the_request_is_not_read_resets_the_connection(
    make_client: MakeClient,
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        client = make_client(base_url=f"http://127.0.0.1:{server.getsockname()[1]}/v1")
        prompt = Prompt((Message("user", " " * (32 << 20)),))
        run = Run(client, "x", prompt).start()
        accepted, _ = server.accept()
        with closing(accepted):
            accepted.settimeout(PATIENCE_SECONDS)
            accepted.recv(1)  # the reader is about to be, or is, blocked in its send
            run.generation.close()
            assert run.wait_end().ending is Ending.CLOSED
            # A close without the reset would first hand over all that waits in the buffers.
            with pytest.raises(ConnectionResetError):
                while accepted.recv(1 << 16):
                    pass


@pytest.fixture
def no_data_lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[gevent.event.Event]:
    """A data lane that is behind: when the event is cleared nobody has a turn until it is set."""
    turns = gevent.event.Event()
    turns.set()
    of_this_loop = type(lanes())
    run_deferred, put_off = of_this_loop.run_deferred, []

    def wait_turn(self: Lanes) -> None:
        assert turns.wait(PATIENCE_SECONDS)

    def put_off_call(self: Lanes, *call: Any) -> None:
        if turns.is_set():
            run_deferred(self, *call)
        else:
            put_off.append(call)

    with monkeypatch.context() as patch:
        patch.setattr(of_this_loop, "wait_turn", wait_turn)
        patch.setattr(of_this_loop, "run_deferred", put_off_call)
        yield turns
        turns.set()
    for call in put_off:
        lanes().run_deferred(*call)


@dataclass
class Peer:
    """A provider's end of a connection, in this process."""

    run: Run
    sock: socket.socket
    at_report: list[int] = field(default_factory=list)
    """What its kernel knew when the end of the generation was reported."""

    def __post_init__(self) -> None:
        self.sock.settimeout(PATIENCE_SECONDS)
        report = self.run.generation._on_end
        assert report is not None

        def look_and_report(result: GenerationResult) -> None:
            self.at_report.append(self.knows())
            report(result)

        self.run.generation._on_end = look_and_report

    def knows(self) -> int:
        """POLLRDHUP when the end of the stream has come, POLLERR when it was reset."""
        poll = gevent.monkey.get_original("select", "poll")()
        poll.register(self.sock.fileno(), select.POLLRDHUP)
        return sum(events for _, events in poll.poll(0))

    def answer(self, body: bytes = b"") -> None:
        while not self.sock.recv(1 << 16).endswith(b"}"):
            pass
        self.sock.sendall(scripts.sse_head() + chunk(text_event("a")) + body)
        self.run.sink.wait_text("a")

    def close_generation(self) -> None:
        self.run.generation.close()
        assert self.run.wait_end().ending is Ending.CLOSED


@pytest.fixture
def peer(make_client: MakeClient) -> Iterator[Peer]:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        client = make_client(base_url=f"http://127.0.0.1:{server.getsockname()[1]}/v1")
        run = Run(client, "x").start()
        accepted, _ = server.accept()
        with closing(accepted):
            yield Peer(run, accepted)


def test_a_provider_that_answers_has_the_end_before_it_is_reported(
    no_data_lane: gevent.event.Event, peer: Peer
) -> None:
    peer.answer()
    no_data_lane.clear()
    peer.close_generation()
    [known] = peer.at_report
    assert known & (select.POLLRDHUP | select.POLLERR) == select.POLLRDHUP
    wait_until(lambda: bool(peer.knows() & select.POLLERR), "the reset, before its reader has left")


def test_a_provider_that_has_not_answered_is_reset_before_it_is_reported(
    no_data_lane: gevent.event.Event, peer: Peer
) -> None:
    peer.run.sink.wait_for(lambda: peer.run.sink.posts == 1, "the POST")
    no_data_lane.clear()
    peer.close_generation()
    [known] = peer.at_report
    assert known & select.POLLERR


def test_close_leaves_the_other_generations_alone(
    client: LlmClient, provider: ProviderProcess
) -> None:
    key = provider.unique("key")
    runs = [
        Run(client, provider.fresh(scripts.finish_on_release(["a"], key))).start()
        for _ in range(10)
    ]
    for run in runs:
        run.sink.wait_text("a")
    for run in runs[::2]:
        run.generation.close()
    for run in runs[::2]:
        assert_closed(provider, run, provider.wait_post(script=run.script).conn)
    provider.release(key)
    for run in runs[1::2]:
        run.wait_completed()


def test_generations_that_are_closed_together_are_all_closed_before_the_first_report(
    client: LlmClient, provider: ProviderProcess
) -> None:
    runs = [Run(client, provider.fresh(scripts.idle_mid_stream(["a"]))).start() for _ in range(5)]
    for run in runs:
        run.sink.wait_text("a")
    first = runs[0].generation
    at_report: list[bool] = []
    report = first._on_end
    assert report is not None

    def look_and_report(result: GenerationResult) -> None:
        at_report.extend(run.generation._is_closed for run in runs)
        report(result)

    first._on_end = look_and_report
    for run in runs:
        run.generation.close()
    for run in runs:
        run.wait_end()
    assert at_report == [True] * len(runs)


# Limits -----------------------------------------------------------------------------------------

SHORT_SECONDS = 0.15


def test_a_connection_that_does_not_come_about_passes_the_connect_limit(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    if provider.ports["full"] is None:
        pytest.skip("the full port needs Linux")
    client = make_client(base_url=provider.full_base_url, connect_timeout=SHORT_SECONDS)
    result = (
        Run(client, "x").start().wait_failed(LimitPassedError, "the connect timeout of 0.15 s$")
    )
    assert isinstance(result.error, LimitPassedError)
    assert result.error.limit == "connect"


def test_a_tls_handshake_that_hangs_passes_the_connect_limit(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    since = time.monotonic()
    client = make_client(base_url=provider.mute_base_url, connect_timeout=SHORT_SECONDS)
    Run(client, "x").start().wait_failed(LimitPassedError, "the connect timeout of 0.15 s$")
    provider.wait_closed(provider.wait_connected(port="mute", since=since).conn)


def test_a_look_up_that_hangs_passes_a_limit(
    make_client: MakeClient, resolver: FakeResolver
) -> None:
    client = make_client(base_url="http://slow.invalid/v1", first_token_timeout=SHORT_SECONDS)
    Run(client, "x").start().wait_failed(LimitPassedError, "the first token timeout of 0.15 s$")


COMMENTS = scripts.repeat([send(chunk(b": still there\n\n")), scripts.sleep(0.01)])
NO_TOKEN: Mapping[str, Script] = {
    "no headers": scripts.no_headers(),
    "headers only": scripts.headers_only(),
    "role only": [*scripts.opening(), scripts.hang()],
    "comments only": [*scripts.opening(), COMMENTS],
    "a flood of comments": [*scripts.opening(), scripts.repeat([send(chunk(b": \n\n" * 999))])],
    "empty pieces of calls only": [
        *scripts.opening(),
        scripts.repeat(
            [
                send(chunk(scripts.delta_event({"function_call": {"name": None}}))),
                send(chunk(scripts.call_event({"index": 0, "function": {"arguments": ""}}))),
                scripts.sleep(0.01),
            ]
        ),
    ],
    "empty deltas only": [
        *scripts.opening(),
        scripts.repeat([send(chunk(text_event(""))), scripts.sleep(0.01)]),
    ],
    "inside the headers": [send(scripts.sse_head()[:-4]), scripts.hang()],
    "inside the first event": [*scripts.opening(), send(chunk(b"data: {")), scripts.hang()],
}


@pytest.mark.parametrize("silence", NO_TOKEN)
def test_no_token_in_time_passes_the_first_token_limit(
    make_client: MakeClient, provider: ProviderProcess, silence: str
) -> None:
    client = make_client(first_token_timeout=SHORT_SECONDS)
    run = Run(client, provider.fresh(NO_TOKEN[silence])).start()
    run.wait_failed(LimitPassedError, "^the provider exceeded the first token timeout of 0.15 s$")
    provider.wait_closed(conn_of(provider, run))
    assert posts(provider, run.script) == 1


IDLE: Mapping[str, Script] = {
    "silence": scripts.idle_mid_stream(["a"]),
    "comments": [*scripts.opening(), *scripts.tokens(["a"]), COMMENTS],
    "half an event": [
        *scripts.opening(),
        *scripts.tokens(["a"]),
        send(chunk(b"data:")),
        scripts.repeat([send(chunk(b" ")), scripts.sleep(0.01)]),
    ],
    "half a chunk": scripts.stalled_inside_chunk(["a"]),
    "gzip": scripts.gzip_idle(["a"]),
    "HTTP/1.0": scripts.http10_idle(["a"]),
    "finish without done": [*scripts.opening(), send(chunk(text_event("a"))), scripts.hang()],
}


@pytest.mark.parametrize("silence", IDLE)
def test_silence_between_events_passes_the_idle_limit(
    make_client: MakeClient, provider: ProviderProcess, silence: str
) -> None:
    client = make_client(idle_timeout=SHORT_SECONDS)
    run = Run(client, provider.fresh(IDLE[silence])).start()
    run.wait_failed(LimitPassedError, "^the provider exceeded the idle timeout of 0.15 s$")
    assert run.sink.text == "a"
    provider.wait_closed(conn_of(provider, run))
    assert posts(provider, run.script) == 1


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}]},
        {"function_call": {"name": "f", "arguments": ""}},
    ],
)
def test_a_token_of_any_kind_lifts_the_first_token_limit(
    make_client: MakeClient, provider: ProviderProcess, delta: dict[str, str]
) -> None:
    client = make_client(first_token_timeout=60.0, idle_timeout=SHORT_SECONDS)
    script = [*scripts.opening(), send(chunk(scripts.delta_event(delta))), scripts.hang()]
    Run(client, provider.fresh(script)).start().wait_failed(LimitPassedError, "the idle timeout of")


def test_a_stream_that_is_slow_but_never_silent_passes_no_limit(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    client = make_client(first_token_timeout=SHORT_SECONDS, idle_timeout=SHORT_SECONDS)
    texts = [f"{number} " for number in range(20)]  # 0.4 s in all
    run = Run(client, provider.fresh(scripts.answer(texts, rate=50))).start()
    run.wait_completed()
    assert run.sink.text == "".join(texts)


def test_a_slow_sink_is_not_the_providers_silence(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    limited = make_client(idle_timeout=SHORT_SECONDS)
    key = provider.unique("key")
    script = [*scripts.opening(), *scripts.tokens(["a"]), wait(key), *scripts.tokens(["b"])]
    run = Run(limited, provider.fresh([*script, scripts.hang()]))
    run.sink.block_on_put()
    run.start()
    assert run.sink.blocked.wait(PATIENCE_SECONDS)
    # Others that begin later pass the same limit, one after the other.
    for _ in range(2):
        other = Run(limited, provider.fresh(scripts.idle_mid_stream(["x"]))).start()
        other.wait_failed(LimitPassedError, "the idle timeout of")
    assert run.results == []
    provider.release(key)
    run.sink.unblock()
    run.sink.wait_text("ab")
    # And once it has taken everything, silence counts again.
    run.wait_failed(LimitPassedError, "the idle timeout of")


def test_a_sink_that_is_slow_with_a_call_is_not_the_providers_silence(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    limited = make_client(idle_timeout=SHORT_SECONDS)
    script = [*scripts.opening(), *scripts.chunks([*WEATHER_EVENTS, finish_event()])]
    run = Run(limited, provider.fresh([*script, scripts.hang()]))
    blocked, gate = gevent.event.Event(), gevent.event.Event()

    def block(_: ToolCall) -> None:
        blocked.set()
        gate.wait()

    run.sink.on_call = block
    run.start()
    assert blocked.wait(PATIENCE_SECONDS)
    # Others that begin later pass the same limit, one after the other.
    for _ in range(2):
        other = Run(limited, provider.fresh(scripts.idle_mid_stream(["x"]))).start()
        other.wait_failed(LimitPassedError, "the idle timeout of")
    assert run.results == []
    gate.set()
    # And once it has taken the call, silence counts again.
    run.wait_failed(LimitPassedError, "the idle timeout of")
    assert run.sink.calls == [WEATHER]


def test_the_idle_limit_starts_again_when_a_slow_sink_has_taken_everything(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    # In limits: the sink takes 1.5, the provider another 0.6. A clock that only stood still, or ran
    # on, would strike at 2.
    limit = 0.4
    key = provider.unique("key")
    pause = [wait(key), scripts.sleep(0.6 * limit)]
    script = [*scripts.opening(), *scripts.tokens(["a"]), *pause, *scripts.tokens(["b"])]
    run = Run(make_client(idle_timeout=limit), provider.fresh([*script, *scripts.ending()]))

    def be_slow(delta: Delta) -> None:
        if delta.text == "a":
            gevent.sleep(1.5 * limit)
            provider.release(key)

    run.sink.on_put = be_slow
    run.start().wait_completed()
    assert run.sink.text == "ab"


def test_an_error_body_that_hangs_passes_its_own_bound_and_gives_the_status(
    make_client: MakeClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.attempt._ERROR_BODY_SECONDS", SHORT_SECONDS)
    head = scripts.head(401, {"Content-Length": "100"})
    run = Run(make_client(), provider.fresh([send(head, b"bad key"), scripts.hang()])).start()
    run.wait_failed(BadStatusError, "^the provider answered 401: bad key")
    provider.wait_closed(conn_of(provider, run))


def test_no_limit_runs_on_when_the_generation_has_ended(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    limits = {"connect_timeout": 1.0, "first_token_timeout": 0.1, "idle_timeout": 0.1}
    runs = [
        Run(make_client(**limits), provider.fresh(script)).start()
        for script in (scripts.answer(["a"]), scripts.truncated(["a"]), scripts.not_sse())
    ]
    ends = [run.wait_end() for run in runs]
    late = Run(make_client(idle_timeout=0.2), provider.fresh(scripts.idle_mid_stream(["a"])))
    late.start().wait_failed(LimitPassedError, "the idle timeout of")
    assert [run.results for run in runs] == [[end] for end in ends]


def test_progress_is_any_byte_of_the_provider(client: LlmClient, provider: ProviderProcess) -> None:
    key = provider.unique("key")
    script = [*scripts.opening(), wait(key), send(chunk(b": still there\n\n")), scripts.hang()]
    run = Run(client, provider.fresh(script))
    made_at = run.generation.progress_at
    run.start()
    run.sink.wait_opened()
    opened_at = run.generation.progress_at
    assert opened_at > made_at
    provider.release(key)
    with gevent.Timeout(PATIENCE_SECONDS, AssertionError("no progress")):
        while run.generation.progress_at == opened_at:
            gevent.sleep(0.001)
    run.generation.close()
    run.wait_end()


# Connections ------------------------------------------------------------------------------------


def test_control_has_its_turn_before_a_request_connects_and_before_its_answer_is_taken_up(
    client: LlmClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def then_control(cls: type, name: str, when: str) -> None:
        original = getattr(cls, name)

        def step(self: object, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            order.append(when)
            lanes().run_next(order.append, "control")
            return result

        monkeypatch.setattr(cls, name, step)

    def noted(cls: type, name: str) -> None:
        original = getattr(cls, name)

        def step(self: object, *args: Any, **kwargs: Any) -> Any:
            order.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, step)

    then_control(HTTPConnection, "putrequest", "made")
    noted(HTTPConnection, "connect")
    then_control(ProviderClient, "post", "answered")
    noted(RecordingSink, "opened")
    Run(client, provider.fresh(scripts.answer(["a"]))).start().wait_completed()
    assert order == ["made", "control", "connect", "answered", "control", "opened"]


def test_control_has_its_turn_between_requests_that_start_together_on_kept_connections(
    client: LlmClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    post = ProviderClient.post

    def post_with_control(self: ProviderClient, *args: Any, **kwargs: Any) -> Answer:
        order.append("post")
        lanes().run_next(order.append, "control")
        return post(self, *args, **kwargs)

    def runs() -> list[Run]:
        key = provider.unique("key")
        made = [Run(client, provider.fresh(scripts.finish_on_release(["a"], key))) for _ in "123"]
        for run in made:
            run.start()
        for run in made:
            run.sink.wait_text("a")
        provider.release(key)
        for run in made:
            run.wait_completed()
        return made

    monkeypatch.setattr("llm.chat.attempt._DRAIN_SECONDS", PATIENCE_SECONDS)  # all are kept
    connections = {conn_of(provider, run) for run in runs()}
    monkeypatch.setattr(ProviderClient, "post", post_with_control)
    assert {conn_of(provider, run) for run in runs()} == connections
    assert order == ["post", "control"] * 3


@pytest.mark.parametrize("port", ["http", "tls"])
@pytest.mark.parametrize("framing", ["chunked", "content-length", "gzip"])
def test_a_complete_answer_leaves_its_connection_to_the_next_request(
    make_client: MakeClient, provider: ProviderProcess, framing: str, port: Port
) -> None:
    client = make_client(base_url=url_of(provider, port))
    pieces = framed([text_event("a"), finish_event(), done()], framing)
    runs = []
    for _ in range(3):
        runs.append(Run(client, provider.fresh(list(map(send, pieces)))).start())
        runs[-1].wait_completed()
    assert len({conn_of(provider, run) for run in runs}) == 1


def test_a_last_chunk_that_comes_a_little_later_is_waited_for(
    client: LlmClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.attempt._DRAIN_SECONDS", PATIENCE_SECONDS)
    key = provider.unique("key")
    *answer, last = scripts.answer(["a"])
    run = Run(client, provider.fresh([*answer, wait(key), last])).start()
    run.sink.wait_text("a")
    provider.release(key)
    run.wait_completed()
    again = Run(client, provider.fresh(scripts.answer(["b"]))).start()
    again.wait_completed()
    assert conn_of(provider, again) == conn_of(provider, run)


NOT_REUSABLE: Mapping[str, Script] = {
    "done but open": scripts.done_but_open(["a"]),
    "error": scripts.error_in_stream("no"),
    "malformed": scripts.raw([b"data: {\n\n"]),
    "status": [send(scripts.head(500, {"Content-Length": "3"}), b"no"), scripts.hang()],
    "not sse": scripts.not_sse(),
    "redirect": scripts.http_error(302, "elsewhere", {"Location": "/v1/elsewhere"}),
}


@pytest.mark.parametrize("end", NOT_REUSABLE)
def test_a_connection_that_may_hold_a_rest_is_not_used_again(
    client: LlmClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr("llm.chat.attempt._ERROR_BODY_SECONDS", 0.05)
    run = Run(client, provider.fresh(NOT_REUSABLE[end])).start()
    run.wait_end()
    provider.wait_closed(conn_of(provider, run))
    again = Run(client, provider.fresh(scripts.answer(["b"]))).start()
    again.wait_completed()
    assert again.sink.text == "b"
    assert conn_of(provider, again) != conn_of(provider, run)


def test_a_closed_generation_leaves_no_connection_to_the_next_request(
    client: LlmClient, provider: ProviderProcess
) -> None:
    key = provider.unique("key")
    run = Run(client, provider.fresh(scripts.finish_on_release(["a"], key))).start()
    run.sink.wait_text("a")
    run.generation.close()
    run.wait_end()
    again = Run(client, provider.fresh(scripts.answer(["b"]))).start()
    again.wait_completed()
    assert again.sink.text == "b"
    assert conn_of(provider, again) != conn_of(provider, run)


def test_a_kept_connection_that_the_provider_closed_is_not_used(
    client: LlmClient, provider: ProviderProcess
) -> None:
    key = provider.unique("key")
    script = [*scripts.answer(["a"]), wait(key), scripts.close()]
    run = Run(client, provider.fresh(script)).start()
    run.wait_completed()
    provider.release(key)
    provider.wait_closed(conn_of(provider, run))
    again = Run(client, provider.fresh(scripts.answer(["b"]))).start()
    again.wait_completed()
    assert posts(provider, again.script) == 1


def test_closing_the_client_closes_the_kept_connections(
    make_client: MakeClient, provider: ProviderProcess
) -> None:
    client = make_client()
    run = Run(client, provider.fresh(scripts.answer(["a"]))).start()
    run.wait_completed()
    client.close()
    assert provider.wait_closed(conn_of(provider, run)).by in ("client_eof", "client_reset")


@pytest.mark.parametrize("status", [200, 401])
def test_cookies_are_not_kept(client: LlmClient, provider: ProviderProcess, status: int) -> None:
    cookies = {"Set-Cookie": "session=one-users; Path=/; Max-Age=9999"}
    if status == 200:
        script = [send(scripts.sse_head(extra=cookies)), *scripts.answer(["a"])[1:]]
    else:
        script = scripts.http_error(status, "no", cookies)
    first = Run(client, provider.fresh(script)).start()
    first.wait_end()
    second = Run(client, provider.fresh(scripts.answer(["b"]))).start()
    second.wait_completed()
    assert "cookie" not in provider.wait_post(script=second.script).headers


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_proxies_of_the_environment_are_ignored(
    make_client: MakeClient,
    provider: ProviderProcess,
    monkeypatch: pytest.MonkeyPatch,
    refused_port: int,
    name: str,
) -> None:
    monkeypatch.setenv(name, f"http://127.0.0.1:{refused_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    Run(make_client(), provider.fresh(scripts.answer(["a"]))).start().wait_completed()


def test_a_netrc_does_not_replace_the_key(
    make_client: MakeClient,
    provider: ProviderProcess,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    run = Run(make_client(), provider.fresh(scripts.answer(["a"]))).start()
    run.wait_completed()
    assert provider.wait_post(script=run.script).headers["authorization"] == f"Bearer {KEY}"


def test_the_certificates_of_the_environment_are_not_trusted(
    make_client: MakeClient, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", provider.ca_file)
    client = make_client(base_url=provider.tls_base_url, ca_file=None)
    Run(client, "x").start().wait_failed(ConnectFailedError, "certificate verify failed")


# What is left behind ----------------------------------------------------------------------------


def a_closed_one(client: LlmClient, provider: ProviderProcess) -> Run:
    run = Run(client, provider.fresh(scripts.idle_mid_stream(["a"]))).start()
    run.sink.wait_text("a")
    run.generation.close()
    return run


def a_failed_one(client: LlmClient, provider: ProviderProcess) -> Run:
    return Run(client, provider.fresh(scripts.http_error(500, "no"))).start()


def a_truncated_one(client: LlmClient, provider: ProviderProcess) -> Run:
    return Run(client, provider.fresh(scripts.truncated(["a"]))).start()


def a_completed_one(client: LlmClient, provider: ProviderProcess) -> Run:
    return Run(client, provider.fresh(scripts.answer(["a"]))).start()


def one_that_is_not_json(client: LlmClient, provider: ProviderProcess) -> Run:
    return Run(client, provider.fresh(scripts.raw([text_event("a"), b"data: {\n\n"]))).start()


def one_whose_body_stays_open(client: LlmClient, provider: ProviderProcess) -> Run:
    return Run(client, provider.fresh(scripts.done_but_open(["a"]))).start()


def one_with_a_malformed_call(client: LlmClient, provider: ProviderProcess) -> Run:
    script = scripts.call_answer(scripts.call_events("f", "?"))
    return Run(client, provider.fresh(script)).start()


def one_with_a_call(client: LlmClient, provider: ProviderProcess) -> Run:
    return Run(client, provider.fresh(scripts.call_answer(WEATHER_EVENTS))).start()


@pytest.mark.parametrize(
    "make",
    [
        a_closed_one,
        a_failed_one,
        a_truncated_one,
        a_completed_one,
        one_that_is_not_json,
        one_whose_body_stays_open,
        one_with_a_malformed_call,
        one_with_a_call,
    ],
    ids=lambda f: f.__name__,
)
def test_a_generation_that_has_ended_leaves_nothing_for_the_collector(
    client: LlmClient,
    provider: ProviderProcess,
    make: Callable[[LlmClient, ProviderProcess], Run],
) -> None:
    gc.collect()
    gc.disable()
    try:
        run = make(client, provider)
        run.wait_end()
        assert run.generation._attempt is not None
        generation = weakref.ref(run.generation)
        attempt = weakref.ref(run.generation._attempt)
        del run
        lanes().wait_turn()  # its reader is on its way out
        gevent.sleep(1e-6)  # its links are told in a turn of their own
        assert (generation(), attempt()) == (None, None)
    finally:
        gc.enable()
