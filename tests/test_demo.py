"""The demo provider over loopback HTTP; its parts without I/O also directly."""

import dataclasses
import gc
import json
import math
import re
import socket
import time
import weakref
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import gevent
import pytest
import requests

from llm.demo import posts
from llm.demo import server as demo
from llm.demo.answers import DONE
from llm.demo.scenarios import SCENARIOS, Scenario
from llm.demo.server import DemoProvider
from llm.demo.steps import Completion, Pause, Send, Step
from llm.demo.stories import CHINESE_STORY, ENGLISH_STORY, answer, tokens

HAN = re.compile("[\u4e00-\u9fff]")
LIMIT = 5.0  # seconds; bounds a failure, and no success waits for it


@pytest.fixture
def provider() -> Iterator[DemoProvider]:
    """As fast as the client reads: for tests of the content, not of the pace."""
    with DemoProvider(tokens_per_second=math.inf) as running:
        yield running


@pytest.fixture
def slow() -> Iterator[DemoProvider]:
    """Sends the role, then nothing for ten minutes: a stream that ends sooner was ended."""
    with DemoProvider(tokens_per_second=1 / 600) as running:
        yield running


def chat(text: str = "Tell me a story", **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"model": "demo-story", "messages": [message], "stream": True} | fields


def post(
    provider: DemoProvider, body: dict[str, Any] | list[Any] | bytes, stream: bool = False
) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{provider.base_url}/chat/completions"
    return requests.post(url, data=data, stream=stream, timeout=LIMIT)


def events_of(response: requests.Response) -> list[str]:
    """The data of each event; anything in the body that is not one `data:` line fails the test."""
    parts = response.content.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def chunks_of(response: requests.Response) -> list[dict[str, Any]]:
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def port_of(provider: DemoProvider) -> int:
    port = urlsplit(provider.base_url).port
    assert port
    return port


def open_stream(provider: DemoProvider) -> socket.socket:
    """A raw client that has already got the first event, so that its stream is surely live."""
    client = socket.create_connection(("127.0.0.1", port_of(provider)), timeout=LIMIT)
    body = json.dumps(chat()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    received = b""
    while b'"assistant"' not in received:
        piece = client.recv(65536)
        assert piece
        received += piece
    return client


# ---- what is streamed


def test_a_stream_is_role_then_tokens_then_finish_reason_then_done(provider: DemoProvider) -> None:
    response = post(provider, chat(model="any-name"))
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    first, *middle, last = chunks_of(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(list(c["choices"][0]["delta"]) == ["content"] for c in middle)
    assert all(c["choices"][0]["finish_reason"] is None for c in [first, *middle])
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"


def test_every_chunk_of_a_stream_carries_the_same_id_time_and_model(
    provider: DemoProvider,
) -> None:
    before = int(time.time())
    chunks = chunks_of(post(provider, chat(model="some-model")))
    heads = {(c["id"], c["object"], c["created"], c["model"]) for c in chunks}
    ((completion_id, kind, created, model),) = heads
    assert completion_id.startswith("chatcmpl-")
    assert (kind, model) == ("chat.completion.chunk", "some-model")
    assert before <= created <= time.time()
    assert all("usage" not in c for c in chunks)


def test_two_streams_have_different_ids(provider: DemoProvider) -> None:
    ids = {chunks_of(post(provider, chat("stop")))[0]["id"] for _ in range(2)}
    assert len(ids) == 2


def test_usage_comes_last_with_no_choices_and_is_null_before(provider: DemoProvider) -> None:
    options = {"include_usage": True}
    *chunks, last = chunks_of(post(provider, chat("one two three", stream_options=options)))
    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == []
    said = sum(bool(c["choices"][0]["delta"].get("content")) for c in chunks)
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": said,
        "total_tokens": 3 + said,
    }


def test_an_english_request_gets_a_long_english_story(provider: DemoProvider) -> None:
    text = text_of(chunks_of(post(provider, chat("Tell me about the sea."))))
    opening, story = text.split("\n\n", 1)
    assert "Tell me about the sea" in opening
    assert story == ENGLISH_STORY
    assert len(story.split()) >= 600
    assert not HAN.search(text)


def test_a_chinese_request_gets_a_long_chinese_story(provider: DemoProvider) -> None:
    text = text_of(chunks_of(post(provider, chat("给我讲一个故事吧"))))
    opening, story = text.split("\n\n", 1)
    assert "给我讲一个故事吧" in opening
    assert story == CHINESE_STORY
    assert len(HAN.findall(story)) >= 900
    assert not re.search("[A-Za-z ]", story)


def test_the_last_user_message_chooses_the_language(provider: DemoProvider) -> None:
    messages = [
        {"role": "system", "content": "用中文回答"},
        {"role": "user", "content": "讲个故事"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "in English"}, {"type": "image"}]},
        {"role": "tool", "content": "晴"},
    ]
    text = text_of(chunks_of(post(provider, chat(messages=messages))))
    assert text.startswith("“in English”")
    assert text.endswith(ENGLISH_STORY)


@pytest.mark.parametrize(
    "text",
    ["stop", "Stop!", "OK, please stop.", "That's enough", "Stop the story, I would like my lunch"],
)
def test_an_english_stop_gets_one_short_sentence(provider: DemoProvider, text: str) -> None:
    said = text_of(chunks_of(post(provider, chat(text))))
    assert 0 < len(said) < 100
    assert not HAN.search(said)


@pytest.mark.parametrize("text", ["停", "停止！", "请停一下", "别说了", "不要再讲了", "够了"])
def test_a_chinese_stop_gets_one_short_chinese_sentence(provider: DemoProvider, text: str) -> None:
    said = text_of(chunks_of(post(provider, chat(text))))
    assert 0 < len(said) < 50
    assert HAN.search(said)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Please don't stop",
        "What was it about the bus stop by the harbour?",
        "别停",
        "停车场在哪",
    ],
)
def test_a_text_that_only_looks_like_a_stop_gets_a_story(text: str) -> None:
    assert len(answer(text)) > 900


def test_a_pasted_page_does_not_lengthen_the_first_sentence() -> None:
    assert len(answer("why? " * 1000).split("\n\n")[0]) < 100


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_token_limit_cuts_the_answer_and_says_length(provider: DemoProvider, field: str) -> None:
    fields = {"max_tokens": 9} | {field: 7}
    chunks = chunks_of(post(provider, chat("Go on", **fields)))
    assert text_of(chunks) == "".join(tokens(answer("Go on"))[:7])
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_token_limit_that_is_not_reached_changes_nothing(provider: DemoProvider) -> None:
    fits = len(tokens(answer("stop")))
    chunks = chunks_of(post(provider, chat("stop", max_tokens=fits)))
    assert text_of(chunks) == answer("stop")
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("text", [ENGLISH_STORY, CHINESE_STORY, " a\n\n你好ok, 吗？ ", "   ", ""])
def test_tokens_joined_are_exactly_the_text(text: str) -> None:
    assert "".join(tokens(text)) == text


def test_english_tokens_are_words_with_their_space_and_chinese_ones_at_most_two_characters() -> (
    None
):
    assert tokens("Well, said Ines.") == ["Well,", " said", " Ines."]
    assert tokens("三爷走了，停") == ["三爷", "走了", "，", "停"]
    assert {len(HAN.findall(token)) for token in tokens(CHINESE_STORY)} == {0, 1, 2}


# ---- what is not streamed


def test_a_request_without_stream_gets_one_whole_completion(provider: DemoProvider) -> None:
    response = post(provider, chat("讲个故事", stream=False))
    assert response.headers["Content-Type"] == "application/json"
    body = response.json()
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert HAN.search(choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["completion_tokens"] == len(tokens(choice["message"]["content"]))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_models_are_listed(provider: DemoProvider) -> None:
    body = requests.get(f"{provider.base_url}/models", timeout=LIMIT).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [*SCENARIOS, "demo", "demo-story"]
    assert all(model["object"] == "model" for model in body["data"])


def test_a_scenario_is_chosen_by_model_name(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "just-done", Scenario("just-done", "", lambda _: iter([DONE])))
    assert events_of(post(provider, chat(model="just-done"))) == ["[DONE]"]


# ---- bad requests


def assert_refused(response: requests.Response, status: int, param: str | None = None) -> None:
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(provider: DemoProvider, body: bytes) -> None:
    assert_refused(post(provider, body), 400)


def test_a_request_without_a_model_is_refused(provider: DemoProvider) -> None:
    assert_refused(post(provider, chat(model=None)), 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "hello"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": "9"}, "max_completion_tokens"),
    ],
)
def test_a_bad_parameter_is_refused_by_name(
    provider: DemoProvider, fields: dict[str, Any], param: str
) -> None:
    assert_refused(post(provider, chat(**fields)), 400, param)


def test_an_unknown_path_is_404(provider: DemoProvider) -> None:
    assert_refused(requests.get(f"{provider.base_url}/nothing", timeout=LIMIT), 404)


def test_a_wrong_method_is_405_and_names_the_right_one(provider: DemoProvider) -> None:
    response = requests.get(f"{provider.base_url}/chat/completions", timeout=LIMIT)
    assert_refused(response, 405)
    assert response.headers["Allow"] == "POST"
    assert_refused(requests.post(f"{provider.base_url}/models", timeout=LIMIT), 405)


def test_a_head_gets_no_body_so_the_connection_stays_in_step(provider: DemoProvider) -> None:
    with socket.create_connection(("127.0.0.1", port_of(provider)), timeout=LIMIT) as client:
        client.sendall(b"HEAD /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 405 ")
    assert received.endswith(b"\r\n\r\n")


def test_a_body_over_the_limit_is_413(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MAX_BODY_BYTES", 100)
    assert_refused(post(provider, chat("x" * 100)), 413)


def test_text_that_utf8_cannot_say_breaks_nothing(provider: DemoProvider) -> None:
    body = chat("\ud800", model="\ud800")  # json.dumps escapes them, which is valid JSON
    assert text_of(chunks_of(post(provider, body))).endswith(ENGLISH_STORY)
    assert post(provider, body | {"stream": "\ud800"}).status_code == 400
    assert requests.get(f"{provider.base_url}/%ff", timeout=LIMIT).status_code == 404


# ---- time, and the end of streams


def test_tokens_come_at_their_pace_and_one_by_one() -> None:
    with (
        DemoProvider(tokens_per_second=200) as provider,
        post(provider, chat(max_tokens=40), stream=True) as response,
    ):
        began = time.monotonic()
        arrivals = [time.monotonic() for line in response.iter_lines(1) if b'"content"' in line]
    # 40 pauses of 5 ms. Early is a defect at any load; late may be a busy machine.
    assert arrivals[-1] - began >= 39 * 0.005
    assert len(set(arrivals)) == 41


def test_a_closed_connection_ends_the_stream_in_the_middle_of_a_pause(slow: DemoProvider) -> None:
    client = open_stream(slow)
    assert [post.ended for post in slow.requests] == [None]
    client.close()
    assert slow.wait_idle(LIMIT)
    assert slow._connections.join(LIMIT)  # the greenlet too


def test_a_reset_connection_ends_the_stream_quietly(
    slow: DemoProvider, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    client = open_stream(slow)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert slow._connections.join(LIMIT)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_client_that_reads_nothing_and_goes_ends_its_stream(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flood(_: Completion) -> Iterator[Step]:
        yield Send(b'"assistant"')
        while True:
            blocked.set()
            yield Send(b"x" * 1_000_000)
            blocked.clear()

    blocked = gevent.event.Event()
    monkeypatch.setitem(SCENARIOS, "story", Scenario("story", "", flood))
    client = open_stream(provider)
    assert blocked.wait(LIMIT)
    client.close()
    assert provider._connections.join(LIMIT)
    assert provider.wait_idle(0)


def test_a_client_that_goes_within_its_request_leaves_no_trace(
    provider: DemoProvider, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", port_of(provider)), timeout=LIMIT) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b""
    assert provider._connections.join(LIMIT)
    assert capfd.readouterr() == ("", "")


def test_a_pipelined_request_neither_ends_the_stream_nor_hurries_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pausing(_: Completion) -> Iterator[Step]:
        yield Send(b'"assistant"')
        yield Pause(0.05)
        paused.append(time.monotonic() - began)
        yield DONE

    paused: list[float] = []

    monkeypatch.setitem(SCENARIOS, "story", Scenario("story", "", pausing))
    began = time.monotonic()
    with DemoProvider() as provider, open_stream(provider) as client:
        client.sendall(b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.index(b"[DONE]") < received.index(b'"list"')
    assert paused[0] >= 0.05


def test_a_fast_stream_lets_other_greenlets_run(provider: DemoProvider) -> None:
    with post(provider, chat(), stream=True) as response:
        lines = response.iter_lines()
        next(lines)
        # The whole story fits in the socket's buffers: only a stream that yields is not over yet.
        assert [post.ended for post in provider.requests] == [None]
        assert sum(1 for _ in lines) > 900


def test_connections_are_kept_between_requests(provider: DemoProvider) -> None:
    with requests.Session() as session:
        for _ in range(2):
            url = f"{provider.base_url}/chat/completions"
            assert session.post(url, json=chat("stop"), timeout=LIMIT).ok
            assert len(provider._connections) == 1


def test_a_defect_in_a_scenario_is_logged_and_cuts_the_stream(
    provider: DemoProvider,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(_: Completion) -> Iterator[Step]:
        yield Send(b"{}")
        raise LookupError("a defect")

    monkeypatch.setitem(SCENARIOS, "broken", Scenario("broken", "", broken))
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        post(provider, chat(model="broken"))
    assert provider.wait_idle(LIMIT)
    assert "a defect" in caplog.text
    assert capfd.readouterr().err == ""


def test_a_defect_before_the_stream_is_a_500(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(demo, "parse_chat", lambda _: 1 / 0)
    response = post(provider, chat())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in caplog.text


# ---- HTTP


def exchange(provider: DemoProvider, request: bytes) -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port_of(provider)), timeout=LIMIT) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def raw_post(text: str = "stop", *, version: str = "1.1", head: str = "", **fields: Any) -> bytes:
    body = json.dumps(chat(text, **fields)).encode()
    lines = f"POST /v1/chat/completions HTTP/{version}\r\nContent-Length: {len(body)}\r\n{head}"
    return f"{lines}\r\n".encode() + body


def test_an_http_10_client_gets_a_body_that_ends_by_closing(provider: DemoProvider) -> None:
    received = exchange(provider, raw_post(version="1.0"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert b"Connection: close" in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_an_http_10_client_may_keep_its_connection_where_a_length_is_known(
    provider: DemoProvider,
) -> None:
    first = raw_post(version="1.0", head="Connection: keep-alive\r\n", stream=False)
    received = exchange(provider, first + raw_post(version="1.0", stream=False))
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.count(b"Connection: keep-alive") == 1


def test_a_connection_that_will_close_says_so(provider: DemoProvider) -> None:
    received = exchange(provider, raw_post(head="Connection: close\r\n"))
    assert b"\r\nConnection: close\r\n" in received
    assert b"\r\nDate: " in received
    assert received.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "request_", [b"nonsense\r\n\r\n", b"GET / HTTP/3.0\r\n\r\n", b"\xff\xfe a b c\r\n\r\n"]
)
def test_a_request_that_is_not_http_is_400(provider: DemoProvider, request_: bytes) -> None:
    assert exchange(provider, request_).startswith(b"HTTP/1.1 400 ")


def test_a_chunked_request_is_read_and_a_badly_chunked_one_is_not(provider: DemoProvider) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
    head += b"Connection: close\r\n\r\n"
    body = json.dumps(chat("stop")).encode()
    good = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert b"data: [DONE]" in exchange(provider, head + good)
    assert exchange(provider, head + b"zz\r\n") == b""
    assert len(provider.requests) == 1


def test_one_request_never_gets_two_answers(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "MAX_BODY_BYTES", 100)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    # What is wrong with this body is found out only after it was refused for its length.
    received = exchange(provider, head + b"96\r\n" + b"x" * 150 + b"\r\nzz\r\n")
    assert received.startswith(b"HTTP/1.1 413 ")
    assert received.count(b"HTTP/1.1") == 1


def test_an_answer_larger_than_any_buffer_arrives_whole(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 100_000
    monkeypatch.setitem(SCENARIOS, "big", Scenario("big", "", lambda _: iter([Send(data)])))
    assert post(provider, chat(model="big")).content == data


def test_nothing_sent_is_not_the_end_of_the_body(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Send(b"a"), Send(b""), Send(b"b")]
    monkeypatch.setitem(SCENARIOS, "gap", Scenario("gap", "", lambda _: iter(steps)))
    assert post(provider, chat(model="gap")).content == b"ab"


def test_a_connection_leaves_nothing_to_the_collector(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remember(handler: Any, *args: Any) -> None:
        handlers.append(weakref.ref(handler))
        init(handler, *args)

    handlers: list[weakref.ref[Any]] = []
    init = demo._Handler.__init__
    monkeypatch.setattr(demo._Handler, "__init__", remember)
    gc.disable()
    try:
        assert post(provider, chat("stop")).ok
        assert provider._connections.join(LIMIT)
        assert [handler() for handler in handlers] == [None]
    finally:
        gc.enable()


def test_a_client_is_told_to_go_on_where_it_asks(provider: DemoProvider) -> None:
    head = "Expect: 100-continue\r\nConnection: close\r\n"
    received = exchange(provider, raw_post(head=head))
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n")
    assert b"data: [DONE]" in received


# ---- the record of requests


def seen(provider: DemoProvider) -> list[dict[str, Any]]:
    response = requests.get(f"{provider.base_url}/demo/requests", timeout=LIMIT)
    listed = response.json()
    assert isinstance(listed, list)
    return listed


def test_each_post_is_on_the_list_and_other_requests_are_not(provider: DemoProvider) -> None:
    before = int(time.time() * 1000)
    for model in ("some-model", "fast"):
        assert post(provider, chat("stop", model=model)).ok
    assert requests.get(f"{provider.base_url}/models", timeout=LIMIT).ok
    assert requests.post(f"{provider.base_url}/models", timeout=LIMIT).status_code == 405
    first, second = seen(provider)
    assert set(first) == {
        *("number", "model", "received_at", "has_key", "ended", "ended_at", "sent_bytes"),
    }
    assert (first["number"], second["number"]) == (1, 2)
    assert (first["model"], second["model"]) == ("some-model", "fast")
    assert first["ended"] == second["ended"] == "finished"
    times = [first["received_at"], first["ended_at"], second["received_at"], second["ended_at"]]
    assert times == sorted(times)
    assert before <= times[0] and times[-1] <= time.time() * 1000
    assert [dataclasses.asdict(one) for one in provider.requests] == [first, second]


def test_a_key_is_noticed_and_never_kept(provider: DemoProvider) -> None:
    url = f"{provider.base_url}/chat/completions"
    headers = {"Authorization": "Bearer sk-very-secret"}
    requests.post(url, json=chat("stop"), headers=headers, timeout=LIMIT)
    post(provider, chat("stop"))
    assert [one["has_key"] for one in seen(provider)] == [True, False]
    assert "secret" not in requests.get(f"{provider.base_url}/demo/requests", timeout=LIMIT).text
    assert "secret" not in repr(provider.requests)


def test_bytes_are_counted_as_the_client_counts_them(provider: DemoProvider) -> None:
    received = exchange(provider, raw_post("Go on", head="Connection: close\r\n"))
    assert provider.wait_idle(LIMIT)
    assert provider.requests[0].sent_bytes == len(received)


def test_an_answer_under_way_has_no_end_yet_and_then_says_who_ended_it(
    slow: DemoProvider,
) -> None:
    client = open_stream(slow)
    (running,) = seen(slow)
    assert (running["ended"], running["ended_at"]) == (None, None)
    assert running["sent_bytes"] > 100
    client.close()
    assert slow.wait_idle(LIMIT)
    (ended,) = seen(slow)
    assert ended["ended"] == "client_closed"
    assert ended["sent_bytes"] == running["sent_bytes"]
    with open_stream(slow):
        slow.stop()
    assert [one.ended for one in slow.requests] == ["client_closed", "cut"]


def test_the_returned_requests_are_copies(slow: DemoProvider) -> None:
    with open_stream(slow):
        (running,) = slow.requests
    assert slow.wait_idle(LIMIT)
    assert running.ended is None


def test_a_refused_post_is_on_the_list_too(provider: DemoProvider) -> None:
    post(provider, b"{")
    post(provider, chat(model="gzip:9"))
    assert [(one["model"], one["ended"]) for one in seen(provider)] == [
        (None, "finished"),
        ("gzip:9", "finished"),
    ]


def test_the_list_is_bounded_and_so_is_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posts, "MAX_KEPT_POSTS", 3)
    with DemoProvider(tokens_per_second=math.inf) as provider:
        for _ in range(5):
            post(provider, chat("stop", model="m" * 10_000))
        assert [one["number"] for one in seen(provider)] == [3, 4, 5]
        assert {len(one["model"]) for one in seen(provider)} == {200}


def test_a_thousand_requests_are_kept() -> None:
    assert posts.MAX_KEPT_POSTS == 1_000


def test_deleting_the_list_begins_all_counts_again(provider: DemoProvider) -> None:
    url = f"{provider.base_url}/demo/requests"
    assert post(provider, chat("stop", model="http-503:1")).status_code == 503
    assert post(provider, chat("stop", model="http-503:1")).status_code == 200
    assert requests.delete(url, timeout=LIMIT).json() == []
    assert seen(provider) == []
    assert post(provider, chat("stop", model="http-503:1")).status_code == 503
    assert [one["number"] for one in seen(provider)] == [1]
    response = requests.post(url, timeout=LIMIT)
    assert_refused(response, 405)
    assert response.headers["Allow"] == "GET, DELETE"


def test_an_answer_that_was_forgotten_while_it_ran_ends_without_a_trace(
    slow: DemoProvider,
) -> None:
    with open_stream(slow):
        slow.forget_requests()
        assert not slow.wait_idle(0)
    assert slow.wait_idle(LIMIT)
    assert slow.requests == []


# ---- starting and stopping


def test_stopping_sends_nothing_to_a_client_that_waits_for_headers(provider: DemoProvider) -> None:
    with socket.create_connection(("127.0.0.1", port_of(provider)), timeout=LIMIT) as client:
        client.sendall(raw_post(model="stall-headers"))
        with gevent.Timeout(LIMIT):
            while not provider.requests:
                gevent.sleep(0)
        provider.stop()
        assert client.recv(100) == b""
    assert provider.requests[0].ended == "cut"


def test_stopping_does_not_wait_for_the_rest_of_a_request(provider: DemoProvider) -> None:
    with socket.create_connection(("127.0.0.1", port_of(provider)), timeout=LIMIT) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n"
        client.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")  # it is reading the body now
        began = time.monotonic()
        provider.stop()
        assert time.monotonic() - began < 0.5
        assert len(provider._connections) == 0
        assert client.recv(100) == b""


def test_stopping_cuts_live_streams_off_and_frees_the_port(slow: DemoProvider) -> None:
    with open_stream(slow) as client, requests.Session() as idle:
        url = f"{slow.base_url}/models"
        assert idle.get(url, timeout=LIMIT).ok
        began = time.monotonic()
        slow.stop()
        assert time.monotonic() - began < 1
        assert slow.wait_idle(0)
        assert len(slow._connections) == 0
        assert client.recv(65536) == b""  # no last chunk: cut off, not finished
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=LIMIT)


def test_starting_and_stopping_twice_is_harmless_and_it_can_start_again() -> None:
    provider = DemoProvider()
    provider.stop()
    for _ in range(2):
        provider.start()
        url = provider.base_url
        provider.start()
        assert provider.base_url == url
        assert requests.get(f"{url}/models", timeout=LIMIT).ok
        provider.stop()
        provider.stop()


def test_before_the_start_there_is_no_address() -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = DemoProvider().base_url


def test_a_taken_port_is_an_error_at_once(provider: DemoProvider) -> None:
    with pytest.raises(OSError, match="in use"):
        DemoProvider(port=port_of(provider)).start()


@pytest.mark.parametrize("pace", [0, -1, math.nan])
def test_an_invalid_pace_is_refused(pace: float) -> None:
    with pytest.raises(ValueError, match="tokens_per_second"):
        DemoProvider(tokens_per_second=pace)
