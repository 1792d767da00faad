"""The scenarios of the demo provider: the table itself, and each one as a client sees it."""

import itertools
import json
import math
import re
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import gevent
import pytest
import requests

from llm.demo import scenarios
from llm.demo.arguments import example
from llm.demo.player import Player
from llm.demo.posts import Ended, ReceivedPost
from llm.demo.scenarios import ALIASES, SCENARIOS, NoScenarioError, Scenario, choose
from llm.demo.server import DemoProvider
from llm.demo.steps import ChatRequest, Completion, Pause, Send, Step
from llm.demo.stories import CHINESE_STORY, ENGLISH_STORY, answer, short_answer, tokens

LIMIT = 5.0  # seconds; bounds a failure, and no success waits for it
STORY = answer("Tell me a story")
SHORT = short_answer("Tell me a story")
FIRST = "".join(tokens(STORY)[:12])

WANTED = (
    *("story", "story-en", "story-zh", "long-story", "echo", "fast", "slow", "reasoning"),
    *("tool-call", "tool-call-legacy", "tool-call-parallel", "tool-call-empty-names"),
    *("tool-call-pieces", "stall-headers", "stall-first-event", "stall-mid-stream"),
    *("stall-in-chunk", "no-done", "reset", "error-in-stream", "http-400", "http-401", "http-404"),
    *("http-429", "http-500", "http-503", "malformed-json", "split-utf8", "bad-utf8", "split-crlf"),
    *("comments", "long-line", "flood", "gzip", "http-1.0", "not-sse", "done-but-open"),
    *("usage-refused", "no-usage"),
)


@pytest.fixture
def provider() -> Iterator[DemoProvider]:
    """As fast as the client reads: for tests of the content, not of the pace."""
    with DemoProvider(tokens_per_second=math.inf) as running:
        yield running


@pytest.fixture
def slow() -> Iterator[DemoProvider]:
    """Ten minutes before each token: a stream that ends sooner was ended."""
    with DemoProvider(tokens_per_second=1 / 600) as running:
        yield running


def chat(model: str, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Tell me a story"}
    return {"model": model, "messages": [message], "stream": True} | fields


def post(provider: DemoProvider, model: str, **fields: Any) -> requests.Response:
    url = f"{provider.base_url}/chat/completions"
    response = requests.post(url, json=chat(model, **fields), timeout=LIMIT)
    response.encoding = "utf-8"  # requests would guess
    return response


def connect(provider: DemoProvider, model: str, version: str = "1.1", **fields: Any) -> Any:
    """A raw client that has sent its request; the connection is for this one only."""
    port = urlsplit(provider.base_url).port
    client = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
    body = json.dumps(chat(model, **fields)).encode()
    head = (
        f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client


@dataclass
class Received:
    """What came of one answer."""

    data: bytes
    was_reset: bool

    @property
    def head(self) -> str:
        return self.data.partition(b"\r\n\r\n")[0].decode()

    @property
    def body(self) -> bytes:
        return self.data.partition(b"\r\n\r\n")[2]

    @property
    def chunks(self) -> list[bytes]:
        """Of the body; an empty one at the end says that the body ended in order."""
        left, found = self.body, []
        while left:
            size, _, left = left.partition(b"\r\n")
            length = int(size, 16)
            assert left[length : length + 2] == b"\r\n"
            found.append(left[:length])
            left = left[length + 2 :]
        return found

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()


def receive(provider: DemoProvider, model: str, version: str = "1.1", **fields: Any) -> Received:
    data = b""
    with connect(provider, model, version, **fields) as client:
        try:
            while piece := client.recv(65536):
                data += piece
        except ConnectionResetError:
            return Received(data, was_reset=True)
    return Received(data, was_reset=False)


def objects_in(text: str) -> list[dict[str, Any]]:
    """The JSON of each event but `[DONE]`."""
    data = re.findall(r"^data: (.*)$", text, re.M)
    return [json.loads(one) for one in data if one.strip() != "[DONE]"]


def deltas_in(text: str) -> list[dict[str, Any]]:
    return [one["choices"][0]["delta"] for one in objects_in(text) if one.get("choices")]


def content_in(text: str) -> str:
    return "".join(delta.get("content") or "" for delta in deltas_in(text))


def reason_in(text: str) -> str | None:
    reasons = [one["choices"][0]["finish_reason"] for one in objects_in(text) if one["choices"]]
    assert set(reasons[:-1]) <= {None}
    last: str | None = reasons[-1]
    return last


def wait_until(condition: Callable[[], object]) -> None:
    with gevent.Timeout(LIMIT):
        while not condition():
            gevent.sleep(0)


def last_post(provider: DemoProvider) -> ReceivedPost:
    assert provider.wait_idle(LIMIT)
    return provider.requests[-1]


def completion(**fields: Any) -> Completion:
    request = ChatRequest("m", "Tell me a story", prompt_tokens=4)
    return Completion(request, "chatcmpl-1", 1, seconds_per_token=0.5, **fields)


# ---- the table


def test_every_promised_scenario_exists() -> None:
    assert set(WANTED) <= set(SCENARIOS)


def test_the_readme_has_the_same_table() -> None:
    readme = Path(scenarios.__file__).parents[1].joinpath("README.md").read_text("utf-8")
    rows = [f"| `{row.syntax}` | {row.summary} |" for row in SCENARIOS.values()]
    assert re.findall(r"^\| `.*` \| .* \|$", readme[readme.index("| model |") :], re.M) == rows


def test_the_description_has_a_line_for_each_scenario_and_each_parameter() -> None:
    lines = scenarios.describe_scenarios().splitlines()
    for row in SCENARIOS.values():
        (line,) = [one for one in lines if one.split()[:1] == [row.syntax]]
        assert line.endswith(f" {row.summary}")
    used = {row.parameter for row in SCENARIOS.values() if row.parameter}
    assert used == set(scenarios.PARAMETERS)
    for parameter in scenarios.PARAMETERS:
        assert any(line.split()[:1] == [parameter.name] for line in lines)
    starts = {line.index(line.split(maxsplit=1)[1]) for line in lines if line.startswith("  ")}
    assert len(starts) == 1  # one column
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_gives_steps_and_nothing_else(name: str) -> None:
    scenario = SCENARIOS[name]
    for play in (scenario.play, scenario.whole):
        steps = list(itertools.islice(play(completion(parameter=scenario.default)), 300))
        assert steps
        assert all(isinstance(step, get_args(Step)) for step in steps)


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_default_is_a_value_that_could_have_been_given(name: str) -> None:
    scenario = SCENARIOS[name]
    if scenario.default is not None:
        assert scenario.parameter
        assert scenario.parameter.parse(f"{scenario.default:.0f}") == scenario.default
    assert bool(scenario.parameter) == bool(scenario.default_text)


@pytest.mark.parametrize(
    ("model", "name", "parameter"),
    [
        ("stall-headers", "stall-headers", None),
        ("stall-headers:8", "stall-headers", 8),
        ("stall-headers:0.25", "stall-headers", 0.25),
        ("slow", "slow", 1),
        ("reset:0", "reset", 0),
        ("demo", "story", None),
        ("demo-story", "story", None),
        ("demo:50", "story", 50),
        ("gpt-4o", "story", None),
        ("llama3.2:3b", "story", None),
        ("ft:gpt-4o:org::id", "story", None),
        ("stall-header", "story", None),  # without a parameter, it may be a real model
    ],
)
def test_a_model_name_chooses_scenario_and_parameter(
    model: str, name: str, parameter: float | None
) -> None:
    assert choose(model) == (SCENARIOS[name], parameter)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("stall-headers:abc", "stall-headers:SECONDS"),
        ("stall-headers:", "SECONDS"),
        ("stall-headers:-1", "'-1' is not a number from 0 to 86,400"),
        ("stall-headers:86401", "86,400"),
        ("stall-headers:nan", "number"),
        ("stall-headers:1e3", "number"),
        ("stall-headers:1_0", "number"),
        ("stall-headers:٣", "number"),
        ("story:0", "0.01"),
        ("reset:1.5", "whole number"),
        ("reset:" + "9" * 5000, "whole number"),
        ("gzip:1", "'gzip' takes no parameter"),
    ],
)
def test_an_invalid_parameter_is_refused_and_the_error_says_why(
    provider: DemoProvider, model: str, said: str
) -> None:
    response = post(provider, model)
    assert response.status_code == 400
    error = response.json()["error"]
    assert said in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "model")


@pytest.mark.parametrize("model", ["stall-header:8", "stall-headerz:x", "wait:8", "wait:0.5"])
def test_a_name_that_looks_like_a_scenario_with_a_parameter_is_404(
    provider: DemoProvider, model: str
) -> None:
    response = post(provider, model)
    assert response.status_code == 404
    error = response.json()["error"]
    assert f"'{model.partition(':')[0]}'" in error["message"]
    assert ("stall-headers:SECONDS" in error["message"]) == model.startswith("stall")
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_scenario_error_tells_a_bad_name_from_a_bad_parameter() -> None:
    with pytest.raises(NoScenarioError) as unknown:
        choose("echoo:1")
    with pytest.raises(NoScenarioError) as bad:
        choose("slow:x")
    assert (unknown.value.is_unknown, bad.value.is_unknown) == (True, False)


def test_aliases_stand_for_scenarios_and_hide_none() -> None:
    assert set(ALIASES.values()) <= set(SCENARIOS)
    assert not set(ALIASES) & set(SCENARIOS)


# ---- good answers

WHOLE_STORIES = {
    "story:100000": STORY,
    "story-en": ENGLISH_STORY,
    "story-zh": CHINESE_STORY,
    "long-story:3": f"{STORY}\n\n{ENGLISH_STORY}\n\n{ENGLISH_STORY}",
    "echo": "Tell me a story",
    "fast": STORY,
    "slow:0": STORY,
    "empty": "",
    "reasoning": STORY,
    "stall-headers:0": STORY,
    "stall-first-event:0": STORY,
    "stall-mid-stream:0": STORY,
    "stall-in-chunk:0": STORY,
    "comments:0": STORY,
    "done-but-open:0": SHORT,
    "usage-refused": STORY,
    "no-usage": STORY,
    "split-utf8": CHINESE_STORY,
    "split-crlf": STORY,
    "flood:130": "flood " * 130,
    "gzip": STORY,
    "http-1.0": STORY,
}


@pytest.mark.parametrize("model", WHOLE_STORIES)
def test_a_scenario_without_a_fault_is_a_whole_answer(provider: DemoProvider, model: str) -> None:
    response = post(provider, model)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    text = response.content.decode()
    assert content_in(text) == WHOLE_STORIES[model]
    assert reason_in(text) == "stop"
    assert text.rstrip().endswith("data: [DONE]")
    assert last_post(provider).ended is Ended.FINISHED


@pytest.mark.parametrize("model", ["story-en", "story-zh", "long-story"])
def test_a_request_to_stop_is_heeded_in_every_story(provider: DemoProvider, model: str) -> None:
    messages = [{"role": "user", "content": "stop"}]
    assert content_in(post(provider, model, messages=messages).text) == answer("stop")


@pytest.mark.parametrize(
    "model", ["long-story", "echo", "stall-mid-stream:0", "stall-in-chunk:0", "no-done", "gzip"]
)
def test_a_token_limit_holds_in_scenarios_too(provider: DemoProvider, model: str) -> None:
    text = post(provider, model, max_tokens=2).text
    assert len(tokens(content_in(text))) == 2
    assert reason_in(text) == "length"


@pytest.mark.parametrize(
    ("model", "seconds"), [("story:50", 0.02), ("story-en:50", 0.02), ("slow:0.02", 0.02)]
)
def test_a_pace_can_be_asked_for(slow: DemoProvider, model: str, seconds: float) -> None:
    began = time.monotonic()
    text = content_in(post(slow, model, max_tokens=5).text)
    assert len(tokens(text)) == 5
    assert time.monotonic() - began >= 5 * seconds


def test_fast_takes_no_notice_of_the_servers_pace(slow: DemoProvider) -> None:
    assert content_in(post(slow, "fast").text) == STORY


def test_reasoning_comes_first_and_apart(provider: DemoProvider) -> None:
    deltas = deltas_in(post(provider, "reasoning").text)
    kinds = [next(iter(delta)) for delta in deltas if delta]
    kinds = [kind for kind, _ in itertools.groupby(kinds)]
    assert kinds == ["role", "reasoning_content", "content"]


@pytest.mark.parametrize(("model", "number"), [("story", 0), ("reasoning", 38), ("flood:70", None)])
def test_usage_counts_all_that_was_said(
    provider: DemoProvider, model: str, number: int | None
) -> None:
    text = post(provider, model, stream_options={"include_usage": True}).text
    said = 70 if number is None else len(tokens(STORY)) + number
    assert objects_in(text)[-1]["usage"]["completion_tokens"] == said


def test_usage_is_left_out_where_that_is_the_scenario(provider: DemoProvider) -> None:
    options = {"include_usage": True}
    assert '"usage"' in post(provider, "story", stream_options=options).text
    text = post(provider, "no-usage", stream_options=options).text
    assert content_in(text) == STORY
    assert '"usage"' not in text


@pytest.mark.parametrize("stream", [True, False])
def test_stream_options_are_refused_by_name(provider: DemoProvider, stream: bool) -> None:
    response = post(provider, "usage-refused", stream_options={}, stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "stream_options"
    assert "stream_options" in response.json()["error"]["message"]


def test_a_content_filter_is_a_finish_reason(provider: DemoProvider) -> None:
    text = post(provider, "content-filter:3").text
    assert content_in(text) == "".join(tokens(STORY)[:3])
    assert reason_in(text) == "content_filter"


@pytest.mark.parametrize(
    "model", ["story", "fast", "stall-headers:0", "stall-mid-stream:0", "gzip", "http-429:1"]
)
def test_a_whole_answer_without_stream_is_one_object(provider: DemoProvider, model: str) -> None:
    if model == "http-429:1":
        assert post(provider, model, stream=False).status_code == 429
    body = post(provider, model, stream=False).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == SHORT


@pytest.mark.parametrize(
    ("model", "content"), [("echo", "Tell me a story"), ("empty", ""), ("reasoning", SHORT)]
)
def test_a_whole_answer_says_what_its_scenario_says(
    provider: DemoProvider, model: str, content: str
) -> None:
    message = post(provider, model, stream=False).json()["choices"][0]["message"]
    assert message["content"] == content
    assert ("reasoning_content" in message) == (model == "reasoning")


# ---- function calls


def calls_in(text: str) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call, put together by index."""
    calls: dict[int, list[str]] = {}
    for delta in deltas_in(text):
        for piece in delta.get("tool_calls", ()):
            call = calls.setdefault(piece["index"], ["", "", ""])
            call[0] = call[0] or piece.get("id", "")
            call[1] = call[1] or piece["function"].get("name", "")
            call[2] += piece["function"]["arguments"]
    return [(call[0], call[1], call[2]) for call in calls.values()]


def tool(name: str, *required: str) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in ("city", "unit", "day")}
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("find_train", "city"), tool("book_seat")]


@pytest.mark.parametrize(
    "model",
    ["tool-call", "tool-call-empty-names", "tool-call-pieces", "tool-call-text"],
)
def test_the_first_of_the_requests_tools_is_called(provider: DemoProvider, model: str) -> None:
    text = post(provider, model, tools=TOOLS).text
    ((call_id, name, arguments),) = calls_in(text)
    assert call_id.startswith("call_")
    assert name == "find_train"
    assert json.loads(arguments) == {"city": "Lisbon"}
    assert reason_in(text) == "tool_calls"
    assert deltas_in(text)[0]["role"] == "assistant"
    assert bool(content_in(text)) == (model == "tool-call-text")


def test_without_tools_a_made_up_one_is_called(provider: DemoProvider) -> None:
    ((_, name, arguments),) = calls_in(post(provider, "tool-call").text)
    assert name == "get_weather"
    assert json.loads(arguments) == {"city": "Lisbon"}


@pytest.mark.parametrize("number", [2, 3])
def test_parallel_calls_are_interleaved(provider: DemoProvider, number: int) -> None:
    text = post(provider, f"tool-call-parallel:{number}", tools=TOOLS).text
    calls = calls_in(text)
    assert [name for _, name, _ in calls] == ["find_train", "book_seat", "find_train"][:number]
    assert len({call_id for call_id, _, _ in calls}) == number
    assert all(isinstance(json.loads(arguments), dict) for _, _, arguments in calls)
    indexes = [p["index"] for d in deltas_in(text) for p in d.get("tool_calls", ())]
    assert indexes != sorted(indexes) or number == 2
    assert indexes[:number] == list(range(number))


def test_two_parallel_calls_with_arguments_are_interleaved(provider: DemoProvider) -> None:
    text = post(provider, "tool-call-parallel").text
    indexes = [p["index"] for d in deltas_in(text) for p in d.get("tool_calls", ())]
    assert indexes[:6] == [0, 1, 0, 1, 0, 1]


def test_pieces_are_as_long_as_was_asked_for(provider: DemoProvider) -> None:
    for chars in (1, 5):
        text = post(provider, f"tool-call-pieces:{chars}").text
        pieces = [
            d["tool_calls"][0]["function"]["arguments"]
            for d in deltas_in(text)
            if "tool_calls" in d
        ]
        assert pieces[0] == ""
        assert {len(piece) for piece in pieces[1:-1]} == {chars}


def test_empty_names_are_empty_in_each_later_piece(provider: DemoProvider) -> None:
    deltas = deltas_in(post(provider, "tool-call-empty-names").text)
    first, *later = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    assert first["id"] and first["function"]["name"]
    assert later
    assert {(piece["id"], piece["function"]["name"]) for piece in later} == {("", "")}


def test_a_legacy_call_has_neither_index_nor_id(provider: DemoProvider) -> None:
    functions = [TOOLS[0]["function"]]
    text = post(provider, "tool-call-legacy", functions=functions).text
    pieces = [d["function_call"] for d in deltas_in(text) if "function_call" in d]
    assert pieces[0] == {"name": "find_train", "arguments": ""}
    assert len(pieces) > 2
    assert all(list(piece) == ["arguments"] for piece in pieces[1:])
    assert json.loads("".join(p["arguments"] for p in pieces)) == {"city": "Lisbon"}
    assert "tool_calls" not in text
    assert reason_in(text) == "function_call"


def test_arguments_can_be_invalid_json(provider: DemoProvider) -> None:
    ((_, _, arguments),) = calls_in(post(provider, "tool-call-bad-json").text)
    with pytest.raises(ValueError, match="delimiter"):
        json.loads(arguments)


@pytest.mark.parametrize("role", ["tool", "function"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", [name for name in SCENARIOS if name.startswith("tool-call")])
def test_a_result_is_answered_in_text_that_quotes_it(
    provider: DemoProvider, model: str, role: str, stream: bool
) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": role, "content": "rain at noon"},
    ]
    response = post(provider, model, messages=messages, tools=TOOLS, stream=stream)
    if stream:
        said, reason = content_in(response.text), reason_in(response.text)
    else:
        (choice,) = response.json()["choices"]
        said, reason = choice["message"]["content"], choice["finish_reason"]
    assert "“rain at noon”" in said
    assert reason == "stop"


def test_calls_come_whole_where_nothing_is_streamed(provider: DemoProvider) -> None:
    (choice,) = post(provider, "tool-call", tools=TOOLS, stream=False).json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "find_train")
    assert json.loads(call["function"]["arguments"]) == {"city": "Lisbon"}
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    (choice,) = post(provider, "tool-call-parallel:3", stream=False).json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 3
    (choice,) = post(provider, "tool-call-legacy", stream=False).json()["choices"]
    assert choice["message"]["function_call"]["name"] == "get_weather"
    assert choice["finish_reason"] == "function_call"


@pytest.mark.parametrize(
    ("schema", "arguments"),
    [
        ({}, {}),
        ({"type": "string"}, {}),
        ({"properties": {"a": {"type": "string"}}}, {}),
        ({"properties": {"a": {"type": "string"}}, "required": ["a", "b", 1]}, {"a": "some a"}),
    ],
)
def test_arguments_are_an_object_of_what_is_required(
    schema: dict[str, Any], arguments: dict[str, Any]
) -> None:
    assert example(schema) == arguments


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string", "format": "date"}, "2026-01-31"),
        ({"enum": ["c", "f"]}, "c"),
        ({"const": 7}, 7),
        ({"type": "string", "examples": ["x"]}, "x"),
        ({"type": "string", "default": "y"}, "y"),
        ({"type": "integer"}, 1),
        ({"type": "number", "minimum": 4}, 4),
        ({"type": "boolean"}, True),
        ({"type": ["null", "string"]}, "some it"),
        ({"type": "null"}, None),
        ({"type": "array", "items": {"type": "integer"}}, [1]),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 1),
        ({"$ref": "#/$defs/Day"}, "mon"),
        ({"$ref": "#/$defs/Nowhere"}, None),
        ({"type": "object"}, {}),
        ("no schema", None),
        ({"type": "unheard of"}, None),
    ],
)
def test_an_argument_fits_its_schema(schema: object, value: object) -> None:
    properties = {"it": schema}
    whole = {"properties": properties, "required": ["it"], "$defs": {"Day": {"enum": ["mon"]}}}
    assert example(whole) == {"it": value}


def test_a_schema_that_refers_to_itself_comes_to_an_end() -> None:
    schema = {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    assert str(example(schema)).count("'a'") < 10


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [*TOOLS, {"type": "function"}]}, "tools[2].function"),
        ({"functions": [{"name": 1}]}, "functions[0]"),
    ],
)
def test_invalid_tools_are_refused_by_name(
    provider: DemoProvider, fields: dict[str, Any], param: str
) -> None:
    response = post(provider, "tool-call", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_tools_of_other_kinds_are_passed_over(provider: DemoProvider) -> None:
    tools = [{"type": "custom", "custom": {"name": "x"}}, *TOOLS]
    ((_, name, _),) = calls_in(post(provider, "tool-call", tools=tools).text)
    assert name == "find_train"


def test_a_function_whose_name_utf8_cannot_say_breaks_nothing(provider: DemoProvider) -> None:
    functions = [{"name": "\ud800", "parameters": {"required": ["a"], "properties": {"a": 1}}}]
    ((_, name, _),) = calls_in(post(provider, "tool-call", functions=functions).text)
    assert name == "?"


# ---- silence

SILENT = {
    "stall-headers": b"",
    "stall-first-event": b"\r\n\r\n",
    "stall-mid-stream": json.dumps(tokens(STORY)[11]).encode() + b"}",
    "stall-in-chunk": b'"chat.completion.chunk"',
    "comments": b": still waiting\n\n",
    "done-but-open": b"data: [DONE]\n\n",
}


@pytest.mark.parametrize("model", SILENT)
def test_a_stall_lasts_its_time_and_then_the_answer_goes_on(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    def note(player: Player, seconds: float | None) -> None:
        if seconds:  # 0 is a mere turn of the loop
            assert player._post is not None
            sent_before.append(player._post.sent_bytes)
        wait(player, seconds)

    sent_before: list[int] = []
    wait = Player._wait
    monkeypatch.setattr(Player, "_wait", note)
    began = time.monotonic()
    whole = receive(provider, f"{model}:0.1")
    assert time.monotonic() - began >= 0.1  # early is a defect at any load, late a busy machine
    assert last_post(provider).ended is Ended.FINISHED
    assert whole.chunks[-1] == b""
    assert content_in(whole.text) == (SHORT if model == "done-but-open" else STORY)
    (number,) = sent_before
    before = whole.data[:number]
    said = before.count(b'"delta":{"content"')
    match model:
        case "stall-headers":
            assert before == b""
        case "stall-first-event":
            assert before == whole.head.encode() + b"\r\n\r\n"
        case "stall-mid-stream":
            assert said == 12
            assert before.endswith(b"}\n\n\r\n")
        case "stall-in-chunk":
            assert before.count(b'"object"') == 1 + 12 + 1
            assert not before.endswith(b"\n")
        case "comments":
            assert Received(before, was_reset=False).chunks == [b": still waiting\n\n"]
        case "done-but-open":
            assert before.endswith(b"data: [DONE]\n\n\r\n")


@pytest.mark.parametrize("model", ["stall-mid-stream:0.1", "stall-headers:0.1"])
def test_a_whole_answer_stalls_too(provider: DemoProvider, model: str) -> None:
    began = time.monotonic()
    response = post(provider, model, stream=False)
    assert time.monotonic() - began >= 0.1
    assert response.json()["choices"][0]["message"]["content"] == SHORT


def test_comments_go_on_and_are_all_that_comes() -> None:
    steps = SCENARIOS["comments"].play(completion(parameter=1.2))
    pauses = []
    for step in steps:
        if isinstance(step, Send):
            if not step.data.startswith(b":"):
                break
            assert step.data.endswith(b"\n\n")
        else:
            assert isinstance(step, Pause)
            pauses.append(step.seconds)
    assert sum(pauses) == pytest.approx(1.2)
    assert len(pauses) == 3
    for_ever = SCENARIOS["comments"].play(completion())
    assert all(
        isinstance(step, Pause) or step == Send(b": still waiting\n\n")
        for step in itertools.islice(for_ever, 5000)
    )


LASTING = {name for name, row in SCENARIOS.items() if not row.counts_attempts} - {
    *("fast", "slow", "empty", "tool-call", "usage-refused", "not-sse", "long-line"),
    *(name for name in SCENARIOS if name.startswith("tool-call")),
}


@pytest.mark.parametrize("name", sorted(LASTING))
def test_a_client_that_goes_ends_its_answer_at_once(slow: DemoProvider, name: str) -> None:
    client = connect(slow, name)
    wait_until(lambda: slow.requests)
    if name != "stall-headers":
        assert client.recv(100)
    (running,) = slow.requests
    assert (running.ended, running.ended_at) == (None, None)
    client.close()
    assert slow.wait_idle(LIMIT)
    (ended,) = slow.requests
    assert ended.ended is Ended.CLIENT_CLOSED
    assert ended.ended_at is not None and ended.ended_at >= ended.received_at
    assert slow._connections.join(LIMIT)


@pytest.mark.parametrize("name", SILENT)
def test_a_client_that_goes_within_a_silence_without_end_ends_it(
    provider: DemoProvider, name: str
) -> None:
    client = connect(provider, name)
    wait_until(lambda: provider.requests)
    received = b""
    while SILENT[name] not in received:
        received += client.recv(65536)
    client.close()
    assert provider.wait_idle(LIMIT)
    assert provider.requests[0].ended is Ended.CLIENT_CLOSED


@pytest.mark.parametrize("filler", [0, 20_000])
def test_a_silence_without_end_does_not_outlive_a_client_that_pipelines(
    provider: DemoProvider, filler: int
) -> None:
    client = connect(provider, "stall-first-event")
    assert client.recv(100)
    client.sendall(b"GET /v1/models HTTP/1.1\r\nX: " + b"x" * filler + b"\r\n\r\n")
    if not filler:  # what fits into a buffer is no reason to end the answer
        assert requests.get(f"{provider.base_url}/models", timeout=LIMIT).ok
        assert [post.ended for post in provider.requests] == [None]
    client.close()
    assert provider.wait_idle(LIMIT)
    assert provider.requests[0].ended is Ended.CLIENT_CLOSED
    assert provider._connections.join(LIMIT)


# ---- early endings


@pytest.mark.parametrize(
    ("model", "said"), [("no-finish", FIRST), ("no-finish:3", "".join(tokens(STORY)[:3]))]
)
def test_a_body_can_end_before_the_answer_does(
    provider: DemoProvider, model: str, said: str
) -> None:
    received = receive(provider, model)
    assert received.chunks[-1] == b""
    assert content_in(received.text) == said
    assert reason_in(received.text) is None
    assert "[DONE]" not in received.text
    assert last_post(provider).ended is Ended.FINISHED


def test_an_answer_can_end_without_done(provider: DemoProvider) -> None:
    received = receive(provider, "no-done")
    assert received.chunks[-1] == b""
    assert content_in(received.text) == SHORT
    assert reason_in(received.text) == "stop"
    assert "[DONE]" not in received.text


@pytest.mark.parametrize("model", ["cut", "cut:0", "cut:3", "reset", "reset:0", "reset:3"])
def test_a_connection_can_end_within_the_answer(provider: DemoProvider, model: str) -> None:
    received = receive(provider, model)
    name, _, number = model.partition(":")
    assert received.was_reset == (name == "reset")
    assert received.chunks[-1] != b""
    assert content_in(received.text) == "".join(tokens(STORY)[: int(number or 12)])
    assert last_post(provider).ended is Ended.CUT


@pytest.mark.parametrize("model", ["cut", "reset"])
def test_a_connection_can_end_within_a_whole_answer(provider: DemoProvider, model: str) -> None:
    received = receive(provider, model, stream=False)
    length = int(re.findall(r"Content-Length: (\d+)", received.head)[0])
    assert len(received.body) == length // 2
    assert received.was_reset == (model == "reset")


def test_an_error_can_come_within_the_stream(provider: DemoProvider) -> None:
    received = receive(provider, "error-in-stream:3")
    *story, error = objects_in(received.text)
    assert len(story) == 4
    assert error["error"]["type"] == "server_error"
    assert received.chunks[-1] == b""
    assert "[DONE]" not in received.text


def test_a_connection_can_close_without_an_answer(provider: DemoProvider) -> None:
    received = receive(provider, "no-answer:1")
    assert (received.data, received.was_reset) == (b"", False)
    assert last_post(provider).ended is Ended.CUT
    assert content_in(post(provider, "no-answer:1").text) == STORY


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_http_is_an_error_object(
    provider: DemoProvider, code: int, stream: bool
) -> None:
    for _ in range(3):
        response = post(provider, f"http-{code}", stream=stream)
        assert response.status_code == code
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert response.headers.get("Retry-After") == ("1" if code == 429 else None)


def test_a_bad_gateway_is_a_web_page(provider: DemoProvider) -> None:
    response = post(provider, "http-502")
    assert response.status_code == 502
    assert response.headers["Content-Type"] == "text/html"
    assert "Bad Gateway" in response.text


@pytest.mark.parametrize("code", [429, 502, 503])
def test_so_many_posts_fail_and_then_it_works(provider: DemoProvider, code: int) -> None:
    model = f"http-{code}:2"
    codes = [post(provider, model, max_tokens=1).status_code for _ in range(4)]
    assert codes == [code, code, 200, 200]
    # Each model name has a count of its own.
    assert post(provider, f"http-{code}:3").status_code == code
    provider.forget_requests()
    assert post(provider, model).status_code == code


def test_a_page_with_status_200_is_no_stream(provider: DemoProvider) -> None:
    response = post(provider, "not-sse")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/html")
    assert response.text.startswith("<!doctype html>")


# ---- oddities of the wire


def test_one_event_is_not_json_and_the_rest_is_all_there(provider: DemoProvider) -> None:
    chunks = receive(provider, "malformed-json").chunks
    broken = []
    good = ""
    for chunk in filter(None, chunks):
        try:
            good += content_in(chunk.decode())
        except ValueError:
            broken.append(chunk)
    assert len(broken) == 1
    assert chunks.index(broken[0]) == 1 + 12
    assert good == STORY


def test_one_event_is_not_utf8_and_the_rest_is_all_there(provider: DemoProvider) -> None:
    received = receive(provider, "bad-utf8")
    body = b"".join(received.chunks)
    with pytest.raises(UnicodeDecodeError):
        body.decode()
    assert body.count(b"\xff") == 1
    assert content_in(body.decode("utf-8", "replace")).replace(" \ufffd", "") == STORY


def test_characters_are_split_between_chunks(provider: DemoProvider) -> None:
    chunks = receive(provider, "split-utf8").chunks
    split = 0
    for chunk in chunks:
        try:
            chunk.decode()
        except UnicodeDecodeError:
            split += 1
    assert split == 2 * len(tokens(CHINESE_STORY)) - 2 * tokens(CHINESE_STORY).count("\n\n")
    assert content_in(b"".join(chunks).decode()) == CHINESE_STORY


def test_line_ends_are_split_between_cr_and_lf(provider: DemoProvider) -> None:
    chunks = receive(provider, "split-crlf").chunks
    assert all(b"\r\n" not in chunk for chunk in chunks)
    body = b"".join(chunks)
    assert body.count(b"\n") == body.count(b"\r") == body.count(b"\r\n") == 2 * body.count(b"data:")
    assert body.endswith(b"data: [DONE]\r\n\r\n")


@pytest.mark.parametrize("number", [100_000, 200_001])
def test_a_line_is_as_long_as_was_asked_for(provider: DemoProvider, number: int) -> None:
    lines = receive(provider, f"long-line:{number}").text.split("\n")
    assert sum(len(line) == number for line in lines) == 1
    text = content_in("\n".join(lines))
    assert set(text) == {"a"}
    assert lines[-3] == "data: [DONE]"


def test_a_long_line_is_8_mib_unless_told_otherwise() -> None:
    _, length = choose("long-line")
    steps = list(SCENARIOS["long-line"].play(completion(parameter=length)))
    data = b"".join(step.data for step in steps if isinstance(step, Send))
    assert max(map(len, data.split(b"\n"))) == 8 * 1024 * 1024
    assert max(len(step.data) for step in steps if isinstance(step, Send)) <= 64 * 1024


def test_a_flood_lasts_until_the_client_disconnects(provider: DemoProvider) -> None:
    client = connect(provider, "flood")
    received = 0
    while received < 30_000_000:
        received += len(client.recv(1_000_000))
    assert requests.get(f"{provider.base_url}/models", timeout=LIMIT).ok
    assert [post.ended for post in provider.requests] == [None]
    client.close()
    assert provider.wait_idle(LIMIT)
    assert provider.requests[0].ended is Ended.CLIENT_CLOSED
    assert provider.requests[0].sent_bytes >= received


def test_a_flood_is_made_of_small_writes() -> None:
    steps = itertools.islice(SCENARIOS["flood"].play(completion()), 100)
    assert max(len(step.data) for step in steps if isinstance(step, Send)) < 32_000


def test_other_greenlets_run_between_two_sends(
    provider: DemoProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two(_: Completion) -> Iterator[Step]:
        yield Send(b"a")
        gevent.spawn(turns.append, "other")
        yield Send(b"b")
        seen.extend(turns)

    turns: list[str] = []
    seen: list[str] = []
    monkeypatch.setitem(SCENARIOS, "two", Scenario("two", "", two))
    assert receive(provider, "two").chunks == [b"a", b"b", b""]
    assert seen == ["other"]


def test_compressed_events_are_each_flushed(provider: DemoProvider) -> None:
    received = receive(provider, "gzip")
    assert "Content-Encoding: gzip" in received.head
    unpacker = zlib.decompressobj(wbits=31)
    *chunks, trailer, last = received.chunks
    events = [unpacker.decompress(chunk) for chunk in chunks]
    assert all(re.fullmatch(rb"data: .*\n\n", event) for event in events)
    assert content_in(b"".join(events).decode()) == STORY
    assert unpacker.decompress(trailer) == b""
    assert unpacker.eof
    assert last == b""


def test_http_10_ends_by_closing(provider: DemoProvider) -> None:
    received = receive(provider, "http-1.0")
    assert received.head.startswith("HTTP/1.0 200 OK\r\n")
    assert "Transfer-Encoding" not in received.head
    assert "Content-Length" not in received.head
    assert received.body.startswith(b"data: {")
    assert received.body.endswith(b"data: [DONE]\n\n")


def test_a_chunk_can_lack_its_size(provider: DemoProvider) -> None:
    body = receive(provider, "bad-chunk:0").body
    size, _, rest = body.partition(b"\r\n")
    assert rest[int(size, 16) :] == b"\r\nthis is no chunk size\r\n"
    assert last_post(provider).ended is Ended.CUT
