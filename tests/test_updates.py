"""Updates of a session that come in a REQUEST, and what the model is asked: the prompt and the
tools, as the provider reads them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from actors.session.profile import FunctionDefinition, SystemPrompt
from actors.words import OnNewRequest
from gateway.app import Gateway
from gateway.wire.frames import Request, RequestContent
from tests.fakes import FakeSource
from tests.harness import scripts
from tests.harness.client import Client, Received
from tests.harness.provider_process import ProviderProcess
from tests.test_session import Given

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "how it is outside", "parameters": CITY}
CLOCK = {"name": "clock", "description": "what time it is"}
FOREIGN = {"name": "foreign"}

_numbers = itertools.count(1)
PLACES = ["top_level", "update_session"]
"""Where a REQUEST may carry its updates."""


pytestmark = pytest.mark.usefixtures("no_actor_left")


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    """A client that has not registered yet."""
    with Client(gateway.server.port, register=False) as client:
        yield client


def ask(client: Client, text: str, place: str = "top_level", **updates: Any) -> str:
    """A TEXT request with updates at one of their places; its id."""
    request_id = f"update_{next(_numbers)}"
    payload: dict[str, Any] = {
        "request_id": request_id,
        "data_type": "TEXT",
        "content": {"text": text},
    }
    if place == "update_session":
        updates = {"update_session": updates}
    client.send("REQUEST", payload | updates)
    return request_id


def update(client: Client, place: str = "top_level", **updates: Any) -> Received:
    """An update alone; its terminal frame."""
    return client.wait_terminal(ask(client, "", place, **updates))


def session_data(client: Client) -> dict[str, Any]:
    client.send("SESSION_QUERY", {})
    info = client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
    data: dict[str, Any] = info.payload["session_data"]
    return {
        name: value
        for name, value in data.items()
        if name not in ("create_time", "remaining_seconds")
    }


def body_of(client: Client, provider: ProviderProcess, **updates: Any) -> dict[str, Any]:
    """What the provider is asked for a request that is answered."""
    script = provider.fresh(scripts.answer(["so be it"]))
    request_id = ask(client, script, **updates)
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    body: dict[str, Any] = provider.wait_post(script=script).body
    assert body["messages"][-1] == {"role": "user", "content": script}
    return body


def told(body: dict[str, Any]) -> str | None:
    """The system message of a body."""
    first = body["messages"][0]
    assert all(message["role"] != "system" for message in body["messages"][1:])
    return first["content"] if first["role"] == "system" else None


def offered(body: dict[str, Any]) -> dict[str, Any]:
    """The functions of a body by name, in order."""
    assert all(tool["type"] == "function" for tool in body.get("tools", []))
    return {tool["function"]["name"]: tool["function"] for tool in body.get("tools", [])}


# Updates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("field", "value"), [("require_tts", True), ("enable_srs", False)])
def test_a_switch_is_updated_alone_and_stays_so(
    client: Client, place: str, field: str, value: bool
) -> None:
    client.register()
    before = session_data(client)
    assert before[field] is not value
    update(client, place, **{field: value})
    assert session_data(client) == before | {field: value}
    update(client, place, **{field: None})  # null is absent
    assert session_data(client) == before | {field: value}
    update(client, place, **{field: not value})
    assert session_data(client) == before


@pytest.mark.parametrize("place", PLACES)
def test_a_prompt_and_a_scene_are_updated_each_by_itself(
    client: Client, provider: ProviderProcess, place: str
) -> None:
    client.register(
        system_prompt={"role_description": "a guide", "response_requirements": "be brief"},
        scene_context={"scene_description": "a museum", "keywords": ["vase", "coin"]},
    )
    scene = "a museum\n\nKeywords: vase, coin"
    assert told(body_of(client, provider)) == f"a guide\n\nbe brief\n\n{scene}"
    update(client, place, system_prompt={"role_description": "a cook"})
    assert told(body_of(client, provider)) == f"a cook\n\n{scene}"
    update(client, place, scene_context={"scene_description": "a kitchen"})
    assert told(body_of(client, provider)) == "a cook\n\na kitchen"
    update(client, place, system_prompt={}, scene_context={})
    assert told(body_of(client, provider)) is None


@pytest.mark.parametrize("place", PLACES)
def test_an_update_that_comes_with_a_text_is_there_for_its_own_answer(
    client: Client, provider: ProviderProcess, place: str
) -> None:
    client.register(function_calling=[WEATHER])
    body = body_of(
        client,
        provider,
        place=place,
        system_prompt={"role_description": "a cook"},
        function_calling_op="ADD",
        function_calling=[CLOCK],
    )
    assert told(body) == "a cook"
    assert list(offered(body)) == ["weather", "clock"]
    assert told(body_of(client, provider)) == "a cook"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("op", "given", "left"),
    [
        ("REPLACE", [CLOCK], ["clock"]),
        (None, [CLOCK], ["clock"]),
        ("REPLACE", [], []),
        ("ADD", [CLOCK], ["weather", "clock"]),
        ("UPDATE", [{"name": "weather", "description": "new"}], ["weather"]),
        ("DELETE", ["weather"], []),
        ("DELETE", [{"name": "weather"}], []),
    ],
)
def test_functions_are_updated_by_name(
    client: Client,
    provider: ProviderProcess,
    place: str,
    op: str | None,
    given: list[Any],
    left: list[str],
) -> None:
    client.register(function_calling=[WEATHER])
    operation = {} if op is None else {"function_calling_op": op}
    update(client, place, function_calling=given, **operation)
    assert [one["name"] for one in session_data(client)["function_calling"]] == left
    body = body_of(client, provider)
    assert list(offered(body)) == left
    assert ("tools" in body) == bool(left)
    if op == "UPDATE":
        assert offered(body)["weather"]["description"] == "new"


def test_both_places_may_be_used_and_the_inner_one_is_the_later(client: Client) -> None:
    client.register()
    ask(
        client,
        "",
        require_tts=True,
        function_calling_op="ADD",
        function_calling=[WEATHER],
        update_session={
            "enable_srs": False,
            "function_calling_op": "ADD",
            "function_calling": [CLOCK],
        },
    )
    data = session_data(client)
    assert (data["require_tts"], data["enable_srs"]) == (True, False)
    assert [one["name"] for one in data["function_calling"]] == ["weather", "clock"]
    ask(client, "", require_tts=True, update_session={"require_tts": False})
    assert session_data(client)["require_tts"] is False


# An update alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", OnNewRequest)
def test_an_update_alone_is_answered_by_one_terminal_frame_and_disturbs_nothing(
    client: Client, provider: ProviderProcess, policy: OnNewRequest
) -> None:
    client.register(on_new_request=policy.value)
    key = provider.unique("end")
    live = ask(client, provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(live)
    before = provider.counts().posts
    empty = ask(client, "", "update_session", system_prompt={"role_description": "a cook"})
    terminal = client.wait_terminal(empty)
    assert terminal.msg_type == "RESPONSE"
    assert terminal.payload == {
        "request_id": empty,
        "text_stream_seq": -1,
        "content": {},
        "outcome": "COMPLETED",
        "finish_reason": None,
        "usage": None,
    }
    provider.release(key)
    assert client.wait_terminal(live).payload["outcome"] == "COMPLETED"
    assert client.text_of(live) == "on and on"
    assert client.frames_of(empty) == [terminal]
    assert provider.counts().posts == before
    # It is no turn of the conversation either.
    body = body_of(client, provider)
    assert [message["role"] for message in body["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_an_update_alone_has_its_id_used(client: Client) -> None:
    client.register()
    client.request("", "req_1")
    client.wait_terminal("req_1")
    client.request("", "req_1")
    fault = client.next()
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "request_id" not in fault.payload


@pytest.mark.parametrize("place", PLACES)
def test_the_end_of_voice_is_told_from_the_request_on_that_asks_for_voice(
    client: Client, provider: ProviderProcess, place: str
) -> None:
    client.register()
    script = provider.fresh(scripts.answer(["yes"]))
    assert "voice_stream_seq" not in update(client, place).payload
    spoken = client.wait_terminal(ask(client, script, place, require_tts=True))
    assert spoken.payload["voice_stream_seq"] == -1
    assert update(client, place).payload["voice_stream_seq"] == -1
    mute = client.wait_terminal(ask(client, script, place, require_tts=False))
    assert "voice_stream_seq" not in mute.payload
    assert update(client, place, require_tts=True).payload["voice_stream_seq"] == -1


def test_what_runs_keeps_the_voice_that_it_began_with(
    client: Client, provider: ProviderProcess
) -> None:
    client.register(require_tts=True)
    key = provider.unique("end")
    live = ask(client, provider.fresh(scripts.finish_on_release(["on"], key)))
    client.wait_text(live)
    update(client, require_tts=False)
    provider.release(key)
    assert client.wait_terminal(live).payload["voice_stream_seq"] == -1


# Updates that are refused ------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "require_tts": True,
    "enable_srs": False,
    "system_prompt": {"role_description": "a cook"},
    "scene_context": {"scene_description": "a kitchen"},
}
BAD_UPDATES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "add_of_one_that_is_there": (
        {"function_calling_op": "ADD", "function_calling": [CLOCK, WEATHER]},
        ["'weather'", "name"],
    ),
    "update_of_none": (
        {"function_calling_op": "UPDATE", "function_calling": [WEATHER, FOREIGN]},
        ["'foreign'", "name"],
    ),
    "delete_of_none": (
        {"function_calling_op": "DELETE", "function_calling": ["weather", "foreign"]},
        ["'foreign'", "name"],
    ),
    "unknown_op": (
        {"function_calling_op": "APPEND", "function_calling": [CLOCK]},
        ["function_calling_op"],
    ),
    "op_alone": ({"function_calling_op": "DELETE"}, ["function_calling_op", "function_calling"]),
    "name_alone": (
        {"function_calling_op": "REPLACE", "function_calling": ["clock"]},
        ["name", "DELETE"],
    ),
    "wrong_type_of_a_switch": ({"enable_srs": "no"}, ["enable_srs"]),
    "wrong_type_of_the_prompt": ({"system_prompt": "a cook"}, ["system_prompt"]),
    "wrong_type_of_keywords": ({"scene_context": {"keywords": "pan"}}, ["keywords"]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", BAD_UPDATES)
@pytest.mark.parametrize("text", ["", "hello"])
def test_a_half_valid_update_changes_nothing_and_disturbs_nothing(
    client: Client, provider: ProviderProcess, place: str, name: str, text: str
) -> None:
    bad, named = BAD_UPDATES[name]
    client.register(
        function_calling=[WEATHER], system_prompt={"role_description": "a guide"}, platform="APP"
    )
    before = session_data(client)
    key = provider.unique("end")
    live = ask(client, provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(live)
    refused = ask(client, text, place, **(GOOD | bad))
    fault = client.wait_terminal(refused)
    assert fault.msg_type == "ERROR"
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert fault.payload["retryable"] is False
    assert all(word in fault.payload["error_detail"] for word in named)
    assert session_data(client) == before
    provider.release(key)
    assert client.wait_terminal(live).payload["outcome"] == "COMPLETED"
    assert client.text_of(live) == "on and on"
    assert client.frames_of(refused) == [fault]
    body = body_of(client, provider)
    assert told(body) == "a guide"
    assert list(offered(body)) == ["weather"]
    assert not [one for one in body["messages"] if one["content"] == "hello"]


def test_a_good_update_at_one_place_does_not_survive_a_bad_one_at_the_other(
    client: Client,
) -> None:
    client.register(function_calling=[WEATHER])
    before = session_data(client)
    bad: dict[str, Any] = {"function_calling_op": "DELETE", "function_calling": ["foreign"]}
    one = ask(client, "", **GOOD, update_session=bad)
    other = ask(client, "", **bad, update_session=GOOD)
    for request_id in (one, other):
        assert client.wait_terminal(request_id).payload["error_code"] == "MALFORMED_PAYLOAD"
    assert session_data(client) == before


def test_a_request_that_finds_no_place_updates_nothing() -> None:
    given = Given(on_new_request=OnNewRequest.REJECT)
    given.register()
    given.request("req_1")
    stream = given.source.next()
    busy = Request("req_2", "TEXT", RequestContent("Hi"), system_prompt=SystemPrompt("a cook"))
    given.tell(given.frame(busy))
    assert given.outbox.wait_terminal("req_2")["error_code"] == "SERVER_BUSY"
    stream.complete()
    given.outbox.wait_terminal("req_1")
    given.request("req_3")
    assert b"a cook" not in given.source.next().body


# The prompt --------------------------------------------------------------------------------------


def test_the_prompt_is_system_then_history_then_the_user(
    client: Client, provider: ProviderProcess
) -> None:
    client.register(
        system_prompt={"response_requirements": "be brief", "role_description": "a guide"},
        scene_context={"keywords": ["vase"], "scene_description": "a museum"},
    )
    first, second = (provider.fresh(scripts.answer([text])) for text in ("One.", "Two."))
    for script in (first, second):
        client.wait_terminal(ask(client, script))
    body = body_of(client, provider)
    assert body["model"] == "test"
    assert body["stream"] is True
    assert "tools" not in body
    assert body["messages"][:-1] == [
        {"role": "system", "content": "a guide\n\nbe brief\n\na museum\n\nKeywords: vase"},
        {"role": "user", "content": first},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": second},
        {"role": "assistant", "content": "Two."},
    ]


def test_without_any_of_it_the_prompt_is_the_user_s_text(
    client: Client, provider: ProviderProcess
) -> None:
    client.register()
    assert len(body_of(client, provider)["messages"]) == 1


def test_a_system_message_follows_its_updates_and_never_stands_twice() -> None:
    given = Given(FakeSource())
    given.register(system_prompt=SystemPrompt("one"))
    for number, role in enumerate(("one", "two", "three")):
        prompt = None if number == 0 else SystemPrompt(role)
        request = Request(role, "TEXT", RequestContent("Hi"), system_prompt=prompt)
        given.tell(given.frame(request))
        stream = given.source.next()
        assert stream.body.count(b'"system"') == 1
        assert b'{"role":"system","content":"%b"}' % role.encode() in stream.body
        stream.complete()
        given.outbox.wait_terminal(role)


# Functions, as the provider is offered them ------------------------------------------------------

LISTED = {
    "name": "forecast",
    "description": "what is to come",
    "parameters": [
        {"name": "city", "type": "string", "description": "where"},
        {"name": "days", "type": "integer", "required": False},
    ],
}


def test_both_forms_of_definitions_become_tools(client: Client, provider: ProviderProcess) -> None:
    client.register(function_calling=[WEATHER, LISTED, CLOCK])
    assert body_of(client, provider)["tools"] == [
        {"type": "function", "function": WEATHER},
        {
            "type": "function",
            "function": {
                "name": "forecast",
                "description": "what is to come",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "where"},
                        "days": {"type": "integer"},
                    },
                    "required": ["city"],
                },
            },
        },
        {
            "type": "function",
            "function": CLOCK | {"parameters": {"type": "object", "properties": {}}},
        },
    ]
    # And the session tells them as they were given.
    given = session_data(client)["function_calling"]
    assert given[0] == WEATHER
    assert given[2] == CLOCK
    assert [one["name"] for one in given[1]["parameters"]] == ["city", "days"]


BAD_FUNCTIONS: dict[str, tuple[Any, list[str]]] = {
    "schema_of_a_string": (
        {"name": "lamp", "parameters": {"type": "string"}},
        ["'lamp'", "parameters.type"],
    ),
    "properties_as_a_list": (
        {"name": "lamp", "parameters": {"properties": ["city"]}},
        ["'lamp'", "parameters.properties"],
    ),
    "property_without_a_schema": (
        {"name": "lamp", "parameters": {"properties": {"city": "string"}}},
        ["'lamp'", "parameters.properties.city"],
    ),
    "required_as_a_flag": (
        {"name": "lamp", "parameters": {"required": True}},
        ["'lamp'", "parameters.required"],
    ),
    "parameters_as_a_string": (
        {"name": "lamp", "parameters": "city"},
        ["'lamp'", "parameters"],
    ),
    "parameter_of_an_unknown_type": (
        {"name": "lamp", "parameters": [{"name": "city", "type": "str"}]},
        ["'lamp'", "type"],
    ),
    "parameter_without_a_name": (
        {"name": "lamp", "parameters": [{"type": "string"}]},
        ["'lamp'", "name"],
    ),
    "parameter_twice": (
        {"name": "lamp", "parameters": [{"name": "city", "type": "string"}] * 2},
        ["'lamp'", "parameters", "'city'"],
    ),
    "description_as_a_list": ({"name": "lamp", "description": ["x"]}, ["'lamp'", "description"]),
    "name_with_a_space": ({"name": "my lamp"}, ["'my lamp'", "name"]),
    "no_name": ({"description": "a lamp"}, ["function_calling[1]", "name"]),
    "twice": (CLOCK, ["'clock'", "name"]),
}


@pytest.mark.parametrize("name", BAD_FUNCTIONS)
def test_a_registration_with_an_invalid_function_names_it_and_its_field(
    client: Client, name: str
) -> None:
    bad, named = BAD_FUNCTIONS[name]
    auth = {"type": "API_KEY", "api_key": "test"}
    client.send("REGISTER", {"auth": auth, "function_calling": [CLOCK, bad]})
    fault = client.next()
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert all(word in fault.payload["error_detail"] for word in named), fault.payload
    client.register(function_calling=[CLOCK])  # corrected, on the same connection


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("op", ["REPLACE", "ADD", "UPDATE"])
@pytest.mark.parametrize("name", BAD_FUNCTIONS)
def test_an_update_with_an_invalid_function_names_it_and_its_field(
    client: Client, place: str, op: str, name: str
) -> None:
    bad, named = BAD_FUNCTIONS[name]
    client.register(function_calling=[WEATHER])
    before = session_data(client)
    fault = update(client, place, function_calling_op=op, function_calling=[CLOCK, bad], **GOOD)
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert all(word in fault.payload["error_detail"] for word in named), fault.payload
    assert session_data(client) == before


def test_a_session_takes_128_functions_and_not_one_more(client: Client) -> None:
    many = [{"name": f"f{number}"} for number in range(129)]
    auth = {"type": "API_KEY", "api_key": "test"}
    client.send("REGISTER", {"auth": auth, "function_calling": many})
    fault = client.next()
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "129" in fault.payload["error_detail"]
    client.register(function_calling=many[:128])
    fault = update(client, function_calling_op="ADD", function_calling=many[128:])
    assert "129" in fault.payload["error_detail"]
    update(client, function_calling_op="DELETE", function_calling=["f0"])
    added = update(client, function_calling_op="ADD", function_calling=many[128:])
    assert added.payload["outcome"] == "COMPLETED"
    assert len(session_data(client)["function_calling"]) == 128


def test_functions_that_were_taken_away_are_not_offered_any_more() -> None:
    given = Given(FakeSource())
    given.register(function_calling=[FunctionDefinition("lamp")])
    given.request("req_1")
    first = given.source.next()
    assert b'"lamp"' in first.body
    first.complete()
    given.outbox.wait_terminal("req_1")
    none_of_them = Request("req_2", "TEXT", RequestContent("Hi"), function_calling=[])
    given.tell(given.frame(none_of_them))
    assert b"tools" not in given.source.next().body


# Their size --------------------------------------------------------------------------------------

SMALL = 1000
"""The limit on the bytes of functions, in these tests."""


def large(name: str, size: int = SMALL) -> dict[str, Any]:
    return {"name": name, "parameters": {"type": "object", "description": "x" * size}}


@pytest.fixture
def limited(make_gateway: Callable[..., Gateway]) -> Iterator[Client]:
    """A client that has not registered yet, at a gateway where functions must be small."""
    gateway = make_gateway(max_functions_bytes=SMALL)
    with Client(gateway.server.port, register=False) as client:
        yield client


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("op", "functions"),
    [
        ("ADD", [large("clock")]),
        ("ADD", [large(f"f{number}", 150) for number in range(8)]),
        ("UPDATE", [large("weather")]),
        ("REPLACE", [CLOCK, large("weather")]),
        (None, [large("clock", 10 * SMALL)]),
    ],
)
def test_an_update_to_functions_that_are_too_large_names_the_limit_and_changes_nothing(
    limited: Client,
    provider: ProviderProcess,
    place: str,
    op: str | None,
    functions: list[dict[str, Any]],
) -> None:
    limited.register(function_calling=[WEATHER])
    before = session_data(limited)
    request_id = ask(
        limited,
        "Hello",
        place,
        function_calling_op=op,
        function_calling=functions,
        require_tts=True,
    )
    refused = limited.wait_terminal(request_id).payload
    assert (refused["error_code"], refused["retryable"]) == ("PAYLOAD_TOO_LARGE", False)
    assert refused["error_detail"].endswith(f" bytes of functions; the limit is {SMALL}")
    assert session_data(limited) == before
    assert list(offered(body_of(limited, provider))) == ["weather"]


@pytest.mark.parametrize(
    "functions",
    [[large("one")], [large("one", 500), large("two", 500)], [CLOCK, large("one", 100_000)]],
)
def test_a_registration_with_functions_that_are_too_large_may_be_corrected(
    limited: Client, functions: list[dict[str, Any]]
) -> None:
    auth = {"type": "API_KEY", "api_key": "test"}
    limited.send("REGISTER", {"auth": auth, "function_calling": functions})
    refused = limited.next().payload
    assert refused["error_code"] == "PAYLOAD_TOO_LARGE"
    assert refused["error_detail"].endswith(f" bytes of functions; the limit is {SMALL}")
    limited.register(function_calling=[CLOCK])
    assert session_data(limited)["function_calling"] == [CLOCK]
