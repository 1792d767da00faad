"""A fallback provider, and the breaker before it, through the whole gateway.

Both providers are one process: the fallback is asked over TLS, for another model and with another
key. A request has one script for both, so who says what goes by the order of the POSTs
(`Stand.ask_in_turn`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest

from actors.words import OnNewRequest
from gateway.app import Gateway
from llm.chat.breaker import Breaker, BreakerState
from llm.chat.generation import GenerationSettings
from llm.provider import Provider, StopsOnClose
from tests.harness import scripts
from tests.harness.provider_process import ProviderProcess
from tests.harness.scripts import Script, chunk, send, text_event
from tests.stand import ANSWER, KEY, Stand, refusal, stands

FIRST, SECOND = "first-model", "second-model"
SECOND_KEY = "sk-other-secret-9876543210"
OTHER = "It was a dark and stormy night."
"""What the fallback says."""

SHORT_SECONDS = 0.3
"""A limit that shall pass, but not before the script for the next POST is there."""

FAILURES = 3
OPEN_SECONDS = 30.0


def second_refusal(status: int, message: str = "no") -> Script:
    """Of the fallback, which knows no key but its own."""
    return refusal(status, message, secrets=[SECOND_KEY])


class Now:
    """The breaker's clock: stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Pair:
    """A stand whose gateway has two providers."""

    def __init__(self, stand: Stand, breaker: Breaker, now: Now) -> None:
        self.stand = stand
        self._breaker = breaker
        self.now = now

    def state(self) -> BreakerState:
        return self._breaker.state

    def asked(self, request_id: str) -> list[str]:
        """Who was POSTed a request, in order, by model."""
        return [post.body["model"] for post in self.stand.posts(request_id)]

    def falls_back(self, *of_first: Script) -> str:
        """A request that the first fails, with one of these for each POST, and that the second
        answers; returns its id."""
        request_id = self.stand.ask_in_turn(*of_first, scripts.answer([OTHER]))
        self.stand.wait_completed(request_id)
        assert self.stand.text_of(request_id) == OTHER
        assert self.asked(request_id) == [FIRST] * len(of_first) + [SECOND]
        return request_id

    def answers(self, model: str) -> None:
        """A request is answered by this one, and no other one is asked."""
        request_id = self.stand.ask(scripts.answer([ANSWER]))
        self.stand.wait_completed(request_id)
        assert self.stand.text_of(request_id) == ANSWER
        assert self.asked(request_id) == [model]

    def open_breaker(self) -> None:
        for _ in range(FAILURES):
            assert self.state() is BreakerState.CLOSED
            self.falls_back(refusal(503))
        assert self.state() is BreakerState.OPEN

    def wait_open_seconds(self) -> None:
        self.open_breaker()
        self.now.seconds += OPEN_SECONDS

    def blame_second(self, request_id: str) -> None:
        """The log is to name the second for the failure of a request."""
        fallback = self.stand.gateway.settings.fallback
        assert fallback is not None
        self.stand.failed_at[request_id] = urlsplit(fallback.base_url).netloc


class MakePair(Protocol):
    def __call__(self, **fields: Any) -> Pair: ...


@pytest.fixture
def make_pair(
    make_gateway: Callable[..., Gateway],
    provider: ProviderProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[MakePair]:
    """Makes pairs; keyword arguments are those of `make_gateway`, but that `second` holds fields of
    the fallback and `total_timeout` is of both. Neither retries unless told to."""
    breakers: list[Breaker] = []
    now = Now()

    def make_breaker(max_failures: int, open_seconds: float, **more: Any) -> Breaker:
        breakers.append(Breaker(max_failures, open_seconds, now, **more))
        return breakers[-1]

    monkeypatch.setattr("llm.chat.generation.Breaker", make_breaker)
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 0.01)

    with stands(make_gateway, provider) as make_stand:

        def make(
            *, second: Mapping[str, Any] | None = None, total_timeout: float = 0.0, **fields: Any
        ) -> Pair:
            fallback = {
                "base_url": provider.tls_base_url,
                "model": SECOND,
                "api_key": SECOND_KEY,
                "ca_file": provider.ca_file,
                "retries": 0,
                "stops_on_close": StopsOnClose.NO,
                **(second or {}),
            }
            first = {"model": FIRST, "retries": 0, "stops_on_close": StopsOnClose.YES, **fields}
            stand = make_stand(
                fallback=Provider(**fallback),
                generation=GenerationSettings(
                    total_timeout=total_timeout,
                    breaker_failures=FAILURES,
                    breaker_seconds=OPEN_SECONDS,
                ),
                **first,
            )
            stand.secrets.append(SECOND_KEY)
            return Pair(stand, breakers[-1], now)

        yield make


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair()


@pytest.fixture
def refused_url() -> Iterator[str]:
    """Of a port that refuses: taken, but nobody listens."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def after_head(*events: bytes) -> Script:
    """A head and a role, then these."""
    return [*scripts.opening(), *scripts.chunks(events)]


# When it is asked ---------------------------------------------------------------------------------


def test_a_first_provider_that_answers_is_the_only_one_that_is_asked(pair: Pair) -> None:
    pair.answers(FIRST)
    assert pair.stand.lines("Asking the fallback") == []
    assert pair.stand.sample("llm_fallbacks_total") == 0


BEFORE_A_TOKEN: Mapping[str, Script] = {
    **{
        str(status): refusal(status)
        for status in (400, 401, 403, 404, 413, 422, 429, 500, 502, 503, 504)
    },
    "redirect": scripts.http_error(302, "elsewhere", {"Location": "/v1/elsewhere"}),
    "no headers": scripts.no_headers(),
    "headers only": scripts.headers_only(),
    "a role only": [*scripts.opening(), scripts.hang()],
    "close after the POST": [scripts.close()],
    "reset after the POST": [scripts.reset()],
    "end after the head": [send(scripts.sse_head()), send(scripts.last_chunk())],
    "end after a role": [*scripts.opening(), scripts.close()],
    "error in the stream": scripts.error_in_stream("overloaded"),
    "not JSON": after_head(b"data: {\n\n"),
    "not UTF-8": after_head(b"data: \xff\n\n"),
    "a web page": scripts.not_sse(),
    "a line over 4 MiB": scripts.one_long_line(4 * 1024 * 1024 + 1),
}


@pytest.mark.parametrize("fault", BEFORE_A_TOKEN)
def test_whatever_the_first_fails_of_before_its_first_token_the_fallback_is_asked(
    make_pair: MakePair, fault: str
) -> None:
    pair = make_pair(first_token_timeout=SHORT_SECONDS)
    request_id = pair.falls_back(BEFORE_A_TOKEN[fault])
    frames = [frame.payload for frame in pair.stand.client.frames_of(request_id)]
    assert frames[-1]["usage"] == scripts.USAGE
    [line] = pair.stand.lines("Asking the fallback")
    assert line["level"] == "info"
    assert line["error"]
    assert line["provider"] == pair.stand.gateway.provider.name
    assert (line["session_id"], line["request_id"]) == (pair.stand.client.session_id, request_id)
    assert pair.stand.sample("llm_fallbacks_total") == 1
    assert pair.stand.sample("llm_posts_total") == 2
    # Whoever failed is closed, unless its answer was whole.
    post, _ = pair.stand.posts(request_id)
    if fault in ("no headers", "headers only", "a role only", "not JSON", "not UTF-8"):
        pair.stand.provider.wait_closed(post.conn)


def test_a_first_provider_that_is_not_there_is_stood_in_for(
    make_pair: MakePair, refused_url: str
) -> None:
    make_pair(base_url=refused_url).answers(SECOND)


def test_a_first_provider_that_cannot_be_connected_to_is_stood_in_for(
    make_pair: MakePair, provider: ProviderProcess
) -> None:
    since = time.monotonic()
    pair = make_pair(base_url=provider.mute_base_url, connect_timeout=SHORT_SECONDS)
    pair.answers(SECOND)
    provider.wait_closed(provider.wait_connected(1, "mute", since).conn)


AFTER_A_TOKEN: Mapping[str, Sequence[bytes]] = {
    "text": [text_event(ANSWER)],
    "one character": [text_event(".")],
    "reasoning": [scripts.delta_event({"reasoning_content": "Hm."})],
    "a piece of a call": scripts.call_events("f", "{}")[:1],
}


@pytest.mark.parametrize("token", AFTER_A_TOKEN)
@pytest.mark.parametrize(
    "end",
    [[scripts.close()], [send(chunk(scripts.error_event("503 later")))], [scripts.hang()]],
    ids=["close", "error", "silence"],
)
def test_after_the_first_token_of_any_kind_the_fallback_is_not_asked(
    make_pair: MakePair, token: str, end: Script
) -> None:
    pair = make_pair(idle_timeout=SHORT_SECONDS, retries=2)
    request_id = pair.stand.ask([*after_head(*AFTER_A_TOKEN[token]), *end])
    ended = pair.stand.client.wait_terminal(request_id)
    assert ended.msg_type == "ERROR"
    assert pair.asked(request_id) == [FIRST]
    assert pair.stand.sample("llm_fallbacks_total") == 0


def test_an_empty_answer_that_is_complete_is_an_answer(pair: Pair) -> None:
    request_id = pair.stand.ask(scripts.answer([]))
    pair.stand.wait_completed(request_id)
    assert pair.asked(request_id) == [FIRST]


def test_the_first_is_asked_again_before_the_fallback_and_then_the_fallback_is(
    make_pair: MakePair,
) -> None:
    pair = make_pair(retries=2, second={"retries": 1})
    pair.falls_back(refusal(503), refusal(429, "later", {"Retry-After": "0"}), refusal(500))
    answers = [*[refusal(503)] * 3, second_refusal(503), scripts.answer([OTHER])]
    request_id = pair.stand.ask_in_turn(*answers)
    pair.stand.wait_completed(request_id)
    assert pair.asked(request_id) == [FIRST] * 3 + [SECOND] * 2


def test_the_fallback_is_given_up_after_its_own_retries(make_pair: MakePair) -> None:
    pair = make_pair(retries=1, second={"retries": 2})
    request_id = pair.stand.ask(scripts.http_error(503, "no"))
    pair.blame_second(request_id)
    pair.stand.wait_failed(request_id)
    assert pair.asked(request_id) == [FIRST] * 2 + [SECOND] * 3
    assert pair.stand.sample("llm_fallbacks_total") == 1


def test_when_both_fail_the_client_is_told_of_the_fallback_and_the_log_names_it(
    pair: Pair,
) -> None:
    request_id = pair.stand.ask_in_turn(refusal(503, "ill"), second_refusal(401, "no such key"))
    pair.blame_second(request_id)
    detail = pair.stand.wait_failed(request_id)["error_detail"]
    assert detail == "the provider answered 401: no such key ***"
    assert pair.asked(request_id) == [FIRST, SECOND]


def test_when_the_fallback_is_not_there_either_it_is_no_connection(
    make_pair: MakePair, refused_url: str
) -> None:
    pair = make_pair(second={"base_url": refused_url})
    request_id = pair.stand.ask(refusal(503))
    pair.blame_second(request_id)
    payload = pair.stand.wait_failed(request_id)
    assert payload["error_detail"] == "no connection to the provider: Connection refused"
    assert payload["usage"] is None
    assert pair.asked(request_id) == [FIRST]


def test_the_fallback_has_limits_of_its_own(make_pair: MakePair) -> None:
    pair = make_pair(first_token_timeout=0.05, second={"first_token_timeout": 0.15})
    request_id = pair.stand.ask(scripts.no_headers())
    pair.blame_second(request_id)
    detail = pair.stand.wait_failed(request_id, "REQUEST_TIMEOUT")["error_detail"]
    assert detail == "the provider exceeded the first token timeout of 0.15 s"
    assert pair.asked(request_id) == [FIRST, SECOND]


# What they are told, and say ----------------------------------------------------------------------


def test_each_is_sent_its_own_key_headers_and_fields(make_pair: MakePair) -> None:
    pair = make_pair(
        headers={"X-Team": "first-team-secret"},
        extra_body={"temperature": 0.1},
        second={
            "headers": {"X-Title": "second-title-secret"},
            "extra_body": {"top_p": 0.5},
            "key_header": "api-key",
        },
    )
    pair.stand.secrets += ["first-team-secret", "second-title-secret"]
    first, second = pair.stand.posts(pair.falls_back(refusal(503)))
    assert first.headers["authorization"] == f"Bearer {KEY}"
    assert first.headers["x-team"] == "first-team-secret"
    assert "x-title" not in first.headers
    assert "api-key" not in first.headers
    assert second.headers["api-key"] == SECOND_KEY
    assert second.headers["x-title"] == "second-title-secret"
    assert "authorization" not in second.headers
    assert "x-team" not in second.headers
    assert (first.body["model"], first.body["temperature"]) == (FIRST, 0.1)
    assert (second.body["model"], second.body["top_p"]) == (SECOND, 0.5)
    assert "top_p" not in first.body
    assert "temperature" not in second.body
    assert first.body["messages"] == second.body["messages"]


def test_neither_gives_its_key_away(pair: Pair) -> None:
    pair.falls_back(refusal(401, "bad"))
    [line] = pair.stand.lines("Asking the fallback")
    assert line["error"] == "the provider answered 401: bad ***"
    request_id = pair.stand.ask_in_turn(refusal(401), second_refusal(401, "worse"))
    pair.blame_second(request_id)
    detail = pair.stand.wait_failed(request_id)["error_detail"]
    assert detail == "the provider answered 401: worse ***"


def test_what_one_refuses_of_usage_is_not_remembered_of_the_other(pair: Pair) -> None:
    refused = refusal(400, "no stream_options")
    asked = pair.stand.posts(pair.falls_back(refused, refusal(503)))
    assert ["stream_options" in post.body for post in asked] == [True, False, True]
    # Not yet: it may have repeated the request in a refusal of something else.
    pair.stand.wait_completed(pair.stand.ask_in_turn(refused, scripts.answer([ANSWER])))
    asked = pair.stand.posts(pair.falls_back(refusal(503)))
    assert ["stream_options" in post.body for post in asked] == [False, True]
    request_id = pair.stand.ask_in_turn(
        refusal(503), second_refusal(400, "no stream_options"), scripts.answer([OTHER])
    )
    pair.stand.wait_completed(request_id)
    asked = pair.stand.posts(request_id)
    assert ["stream_options" in post.body for post in asked] == [False, True, False]


HALF_ANSWERS: Mapping[str, Sequence[bytes]] = {
    "a finish reason": [scripts.finish_event("length")],
    "a usage": [scripts.completion_chunk([], usage={"prompt_tokens": 1, "total_tokens": 1})],
    "an empty call": [scripts.call_event({"index": 0, "type": "function", "function": {}})],
    "empty contents": [text_event("")] * 3,
}


@pytest.mark.parametrize("half", HALF_ANSWERS)
@pytest.mark.parametrize("usage", [scripts.USAGE, None], ids=["usage", "no usage"])
def test_nothing_of_the_firsts_half_answer_is_in_the_fallbacks(
    pair: Pair, half: str, usage: Mapping[str, int] | None
) -> None:
    of_first = [*after_head(*HALF_ANSWERS[half], scripts.error_event("overloaded"))]
    of_second = [*scripts.opening(), *scripts.tokens([OTHER]), *scripts.ending("stop", usage)]
    request_id = pair.stand.ask_in_turn(of_first, of_second)
    end = pair.stand.wait_completed(request_id)
    assert end["finish_reason"] == "stop"
    if usage is None:
        assert end["usage"]["estimated"] is True
    else:
        assert end["usage"] == usage
    payloads = [frame.payload for frame in pair.stand.client.frames_of(request_id)]
    assert [one["text_stream_seq"] for one in payloads] == [0, -1]
    assert pair.stand.text_of(request_id) == OTHER
    assert not any("function_call" in one for one in payloads)


def test_a_fallback_that_fails_does_not_report_what_the_first_said(pair: Pair) -> None:
    said = scripts.completion_chunk([], usage=scripts.USAGE)
    of_first = after_head(said, scripts.finish_event("length"), scripts.error_event("overloaded"))
    request_id = pair.stand.ask_in_turn(of_first, second_refusal(503))
    pair.blame_second(request_id)
    payload = pair.stand.wait_failed(request_id)
    assert payload["finish_reason"] is None
    assert payload["usage"] is None


def test_the_history_has_the_fallbacks_answer(pair: Pair) -> None:
    first = pair.falls_back(scripts.error_in_stream("overloaded"))
    second = pair.stand.ask(scripts.answer([ANSWER]))
    pair.stand.wait_completed(second)
    [post] = pair.stand.posts(second)
    assert post.body["messages"] == [
        {"role": "user", "content": pair.stand.scripts[first]},
        {"role": "assistant", "content": OTHER},
        {"role": "user", "content": pair.stand.scripts[second]},
    ]


def test_calls_of_the_fallback_are_given(pair: Pair) -> None:
    events = scripts.call_events("weather", '{"city": "Oslo"}')
    request_id = pair.stand.ask_in_turn(refusal(503), scripts.call_answer(events))
    pair.stand.wait_completed(request_id)
    call, _ = (frame.payload for frame in pair.stand.client.frames_of(request_id))
    assert call["function_call"]["parameters"] == {"city": "Oslo"}


# Interrupts ---------------------------------------------------------------------------------------


def wait_nothing_follows(pair: Pair, request_id: str, asked: Sequence[str]) -> None:
    """The next request is answered, which takes longer than any retry would have been waited
    for; and nobody was asked for the interrupted one any more."""
    end = pair.stand.wait_interrupted(request_id)
    assert end["finish_reason"] is None
    next_one = pair.stand.ask([scripts.sleep(0.2), *scripts.answer([ANSWER])])
    pair.stand.wait_completed(next_one)
    assert pair.asked(request_id) == list(asked)


RETRY_LATER = scripts.http_error(429, "later", {"retry-after-ms": "120"})
HANG_IN_ERROR: Script = [send(scripts.head(503, {"Content-Length": "100"}), b"no"), scripts.hang()]

PHASES: Mapping[str, tuple[Sequence[Script], Sequence[str], str | None]] = {
    "the first before headers": ([scripts.no_headers()], [FIRST], "yes"),
    "the first before a token": ([scripts.headers_only()], [FIRST], "yes"),
    "the first in its error": ([HANG_IN_ERROR], [FIRST], None),
    "the second before headers": ([refusal(503), scripts.no_headers()], [FIRST, SECOND], "no"),
    "the second before a token": ([refusal(503), scripts.headers_only()], [FIRST, SECOND], "no"),
    "the second in its error": ([refusal(503), HANG_IN_ERROR], [FIRST, SECOND], None),
    "the second, after the first hung": (
        [scripts.no_headers(), scripts.headers_only()],
        [FIRST, SECOND],
        "no",
    ),
}
"""What the providers do, who is asked, and what the ack says of the one that is closed."""


@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupt_closes_whoever_was_asked_and_asks_nobody_else(
    make_pair: MakePair, phase: str
) -> None:
    answers, asked, stops = PHASES[phase]
    hung = phase.endswith("hung")
    pair = make_pair(first_token_timeout=SHORT_SECONDS if hung else 60.0)
    request_id = pair.stand.ask_in_turn(*answers)
    post = pair.stand.wait_post(request_id, len(asked))
    result = pair.stand.interrupt(request_id)
    assert result.get("stops_on_close") == stops
    assert pair.stand.provider.wait_closed(post.conn).by != "provider"
    wait_nothing_follows(pair, request_id, asked)


@pytest.mark.parametrize("who", [FIRST, SECOND])
def test_an_interrupt_of_an_answer_closes_the_one_that_gives_it(pair: Pair, who: str) -> None:
    answers = [scripts.idle_mid_stream([ANSWER])]
    if who == SECOND:
        answers.insert(0, refusal(503))
    request_id = pair.stand.ask_in_turn(*answers)
    pair.stand.client.wait_text(request_id)
    result = pair.stand.interrupt(request_id)
    assert result["stops_on_close"] == ("yes" if who == FIRST else "no")
    assert result["delivered_text_chars"] == len(ANSWER)
    assert pair.stand.text_of(request_id) == ANSWER
    wait_nothing_follows(pair, request_id, [FIRST] if who == FIRST else [FIRST, SECOND])


@pytest.mark.parametrize("who", [FIRST, SECOND])
def test_an_interrupt_while_one_is_waited_for_asks_neither(make_pair: MakePair, who: str) -> None:
    pair = make_pair(retries=1 if who == FIRST else 0, second={"retries": 1})
    answers = [RETRY_LATER] if who == FIRST else [refusal(503), RETRY_LATER]
    request_id = pair.stand.ask_in_turn(*answers)
    pair.stand.wait_line("Retrying generation")
    result = pair.stand.interrupt(request_id, is_refused=True)
    assert "stops_on_close" not in result
    wait_nothing_follows(pair, request_id, [FIRST] if who == FIRST else [FIRST, SECOND])


def test_an_interrupt_while_the_fallback_is_connected_to_stops_that(
    make_pair: MakePair, provider: ProviderProcess
) -> None:
    since = time.monotonic()
    pair = make_pair(second={"base_url": provider.mute_base_url})
    request_id = pair.stand.ask(refusal(503))
    conn = provider.wait_connected(1, "mute", since).conn
    result = pair.stand.interrupt(request_id, is_refused=True)
    assert "stops_on_close" not in result
    provider.wait_closed(conn)
    wait_nothing_follows(pair, request_id, [FIRST])


def test_an_interrupt_while_the_fallback_does_not_accept_stops_that(
    make_pair: MakePair, provider: ProviderProcess
) -> None:
    if provider.ports["full"] is None:
        pytest.skip("the full port needs Linux")
    since = time.monotonic()
    pair = make_pair(second={"base_url": provider.full_base_url})
    request_id = pair.stand.ask(refusal(503))
    conn = provider.wait_connecting(1, since).conn
    pair.stand.interrupt(request_id, is_refused=True)
    assert provider.wait_closed(conn).by == "client_gave_up"
    wait_nothing_follows(pair, request_id, [FIRST])


def test_an_interrupt_while_the_first_is_connected_to_asks_nobody(
    make_pair: MakePair, provider: ProviderProcess
) -> None:
    since = time.monotonic()
    pair = make_pair(base_url=provider.mute_base_url, connect_timeout=SHORT_SECONDS)
    request_id = pair.stand.ask(scripts.answer([ANSWER]))
    conn = provider.wait_connected(1, "mute", since).conn
    assert "stops_on_close" not in pair.stand.interrupt(request_id)
    provider.wait_closed(conn)
    wait_nothing_follows(pair, request_id, [])


def test_a_new_request_stops_the_asking_for_the_one_before(pair: Pair) -> None:
    before = pair.stand.ask_in_turn(refusal(503), scripts.no_headers())
    post = pair.stand.wait_post(before, 2)
    pair.answers(FIRST)
    pair.stand.provider.wait_closed(post.conn)
    assert pair.asked(before) == [FIRST, SECOND]


def test_a_connection_that_is_lost_stops_the_asking(pair: Pair) -> None:
    request_id = pair.stand.ask_in_turn(refusal(503), scripts.no_headers())
    post = pair.stand.wait_post(request_id, 2)
    pair.stand.leave()
    pair.stand.provider.wait_closed(post.conn)
    assert pair.asked(request_id) == [FIRST, SECOND]
    del pair.stand.scripts[request_id]  # it has no end that anybody could see


# The limit of all of it ---------------------------------------------------------------------------


def test_the_total_limit_strikes_while_the_fallback_is_asked(make_pair: MakePair) -> None:
    pair = make_pair(total_timeout=0.3)
    request_id = pair.stand.ask_in_turn(refusal(503), scripts.no_headers())
    pair.blame_second(request_id)
    detail = pair.stand.wait_failed(request_id, "REQUEST_TIMEOUT")["error_detail"]
    assert detail == "the provider exceeded the total timeout of 0.3 s"
    assert pair.asked(request_id) == [FIRST, SECOND]


def test_when_the_total_limit_strikes_nobody_else_is_asked(make_pair: MakePair) -> None:
    pair = make_pair(total_timeout=0.2, retries=2)
    for steps in (scripts.no_headers(), scripts.headers_only()):
        request_id = pair.stand.ask(steps)
        pair.stand.wait_failed(request_id, "REQUEST_TIMEOUT")
        pair.stand.wait_completed(pair.stand.ask(scripts.answer([ANSWER])))
        assert pair.asked(request_id) == [FIRST]


# The breaker --------------------------------------------------------------------------------------


def test_after_so_many_failures_in_a_row_only_the_fallback_is_asked(pair: Pair) -> None:
    pair.open_breaker()
    for _ in range(3):
        pair.answers(SECOND)
    *_, line = pair.stand.lines("Asking the fallback")
    assert line["error"] == "the provider failed too often"
    assert line["provider"] == pair.stand.gateway.provider.name
    assert pair.stand.sample("llm_fallbacks_total") == FAILURES + 3
    pair.now.seconds += OPEN_SECONDS - 0.1
    pair.answers(SECOND)


def test_while_the_first_is_left_alone_the_fallbacks_failure_is_the_answers(pair: Pair) -> None:
    pair.open_breaker()
    request_id = pair.stand.ask(second_refusal(503, "busy"))
    pair.blame_second(request_id)
    pair.stand.wait_failed(request_id)
    assert pair.asked(request_id) == [SECOND]
    assert pair.state() is BreakerState.OPEN


COUNTED: Mapping[str, Script] = {
    "401": refusal(401),
    "404": refusal(404),
    "429": refusal(429),
    "500": refusal(500),
    "no headers": scripts.no_headers(),
    "close": [scripts.close()],
    "error in the stream": scripts.error_in_stream("overloaded"),
    "a web page": scripts.not_sse(),
}


@pytest.mark.parametrize("fault", COUNTED)
def test_what_is_the_providers_fault_opens_the_breaker(make_pair: MakePair, fault: str) -> None:
    pair = make_pair(first_token_timeout=SHORT_SECONDS)
    for _ in range(FAILURES):
        pair.falls_back(COUNTED[fault])
    pair.answers(SECOND)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_the_requests_fault_does_not_open_it(pair: Pair, status: int) -> None:
    for _ in range(FAILURES + 1):
        pair.falls_back(refusal(status))
    pair.answers(FIRST)


def test_a_first_provider_that_is_not_there_is_left_alone_then(
    make_pair: MakePair, refused_url: str
) -> None:
    pair = make_pair(base_url=refused_url, retries=1)
    for number in range(1, FAILURES + 1):
        pair.answers(SECOND)
        assert len(pair.stand.lines("Retrying generation")) == number
    assert pair.state() is BreakerState.OPEN
    pair.answers(SECOND)
    assert len(pair.stand.lines("Retrying generation")) == FAILURES


def test_a_generation_that_asks_again_counts_once(make_pair: MakePair) -> None:
    pair = make_pair(retries=2)
    for _ in range(FAILURES - 1):
        pair.falls_back(refusal(503), refusal(503), refusal(503))
    assert pair.state() is BreakerState.CLOSED
    pair.falls_back(refusal(503), refusal(503), refusal(503))
    assert pair.state() is BreakerState.OPEN


def test_an_answer_in_between_begins_the_count_again(pair: Pair) -> None:
    for _ in range(2):
        for _ in range(FAILURES - 1):
            pair.falls_back(refusal(503))
        pair.answers(FIRST)
    assert pair.state() is BreakerState.CLOSED


def test_an_answer_that_begins_and_fails_is_no_failure_to_answer(pair: Pair) -> None:
    for _ in range(FAILURES - 1):
        pair.falls_back(refusal(503))
    pair.stand.wait_failed(pair.stand.ask(scripts.truncated(["a"])))
    for _ in range(FAILURES - 1):
        pair.falls_back(refusal(503))
    pair.answers(FIRST)


def test_an_interrupted_one_is_no_failure(pair: Pair) -> None:
    for _ in range(FAILURES + 1):
        request_id = pair.stand.ask(scripts.no_headers())
        pair.stand.wait_post(request_id)
        pair.stand.interrupt(request_id)
        pair.stand.wait_interrupted(request_id)
    pair.answers(FIRST)


def test_when_its_time_is_up_exactly_one_tries_the_first_whose_answer_closes_it(
    make_pair: MakePair,
) -> None:
    pair = make_pair(on_new_request=OnNewRequest.PARALLEL)
    pair.wait_open_seconds()
    key = pair.stand.provider.unique("key")
    trying = pair.stand.ask([scripts.wait(key), *scripts.answer([ANSWER])])
    pair.stand.wait_post(trying)
    for _ in range(3):
        pair.answers(SECOND)
    assert pair.state() is BreakerState.HALF_OPEN
    pair.stand.provider.release(key)
    pair.stand.wait_completed(trying)
    assert pair.asked(trying) == [FIRST]
    for _ in range(FAILURES - 1):
        pair.falls_back(refusal(503))  # counted anew
    pair.answers(FIRST)


def test_the_first_token_of_the_one_that_tries_is_enough(make_pair: MakePair) -> None:
    pair = make_pair(on_new_request=OnNewRequest.PARALLEL)
    pair.wait_open_seconds()
    trying = pair.stand.ask(scripts.idle_mid_stream([OTHER]))
    pair.stand.client.wait_text(trying)
    assert pair.state() is BreakerState.CLOSED
    pair.answers(FIRST)
    pair.stand.interrupt(trying)
    assert pair.state() is BreakerState.CLOSED


def test_when_the_one_that_tries_fails_the_first_is_left_alone_for_as_long_again(
    pair: Pair,
) -> None:
    pair.wait_open_seconds()
    pair.falls_back(refusal(503))
    pair.answers(SECOND)
    pair.now.seconds += OPEN_SECONDS - 0.1
    pair.answers(SECOND)
    pair.now.seconds += 0.1
    pair.answers(FIRST)
    assert pair.state() is BreakerState.CLOSED


@pytest.mark.parametrize("status", [400, 422])
def test_a_request_that_the_first_does_not_like_shows_that_it_is_well(
    pair: Pair, status: int
) -> None:
    pair.wait_open_seconds()
    pair.falls_back(refusal(status))
    pair.answers(FIRST)


TRYING: Mapping[str, Script] = {
    "before headers": scripts.no_headers(),
    "before a token": scripts.headers_only(),
    "in its error": HANG_IN_ERROR,
}


@pytest.mark.parametrize("phase", TRYING)
def test_when_the_one_that_tries_is_interrupted_the_next_one_tries(pair: Pair, phase: str) -> None:
    pair.wait_open_seconds()
    for _ in range(2):
        trying = pair.stand.ask(TRYING[phase])
        assert pair.stand.wait_post(trying).body["model"] == FIRST
        pair.stand.interrupt(trying)
        pair.stand.wait_interrupted(trying)
        assert pair.asked(trying) == [FIRST]
    pair.answers(FIRST)
    assert pair.state() is BreakerState.CLOSED


def test_when_the_one_that_tries_is_interrupted_in_its_wait_for_a_retry_the_next_one_tries(
    make_pair: MakePair,
) -> None:
    pair = make_pair(retries=1)
    for _ in range(FAILURES):
        pair.falls_back(refusal(503), refusal(503))
    pair.now.seconds += OPEN_SECONDS
    seen = len(pair.stand.lines("Retrying generation"))
    trying = pair.stand.ask(refusal(429, "later", {"Retry-After": "9"}))
    pair.stand.wait_line("Retrying generation", seen + 1)
    pair.stand.interrupt(trying, is_refused=True)
    pair.stand.wait_interrupted(trying)
    pair.answers(FIRST)


def test_a_first_provider_that_used_up_all_the_time_there_is_has_failed(
    make_pair: MakePair,
) -> None:
    pair = make_pair(total_timeout=0.3)
    pair.wait_open_seconds()
    pair.stand.wait_failed(pair.stand.ask(scripts.no_headers()), "REQUEST_TIMEOUT")
    assert pair.state() is BreakerState.OPEN
    pair.answers(SECOND)


def test_without_a_fallback_nobody_is_left_alone(
    make_gateway: Callable[..., Gateway], provider: ProviderProcess
) -> None:
    settings = GenerationSettings(breaker_failures=1, breaker_seconds=60)
    with stands(make_gateway, provider) as make_stand:
        stand = make_stand(retries=0, generation=settings)
        for _ in range(3):
            request_id = stand.ask(refusal(503))
            stand.wait_failed(request_id)
            assert len(stand.posts(request_id)) == 1
        stand.complete(scripts.answer([ANSWER]))
        assert stand.lines("Asking the fallback") == []


def test_a_complete_answer_without_a_token_shows_that_the_first_is_well(pair: Pair) -> None:
    pair.wait_open_seconds()
    request_id = pair.stand.ask(scripts.answer([]))
    pair.stand.wait_completed(request_id)
    assert pair.asked(request_id) == [FIRST]
    assert pair.state() is BreakerState.CLOSED
