"""What a session registered, how updates change it, and what the model is told of it."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import msgspec
import pytest

from actors.session.profile import (
    MAX_FUNCTIONS,
    MAX_FUNCTIONS_BYTES,
    FunctionDefinition,
    FunctionOp,
    FunctionParameter,
    Platform,
    Profile,
    SceneContext,
    SessionUpdate,
    SystemPrompt,
    UpdateError,
)
from actors.words import ErrorCode
from gateway.wire.attachment import profile_of
from gateway.wire.frames import MAX_TEXT_BYTES, ApiKeyAuth, Register
from llm.chat.completions import Message, Prompt, Tool, encode_body


def registered(**fields: Any) -> Profile:
    return profile_of(Register(ApiKeyAuth("key"), **fields))


def functions(*names: str, description: str | None = None) -> list[Any]:
    return [FunctionDefinition(name, description) for name in names]


def names(profile: Profile) -> list[str]:
    return [function.name for function in profile.functions]


def update_of(op: FunctionOp | None, *named: Any) -> SessionUpdate:
    return SessionUpdate(function_calling_op=op, function_calling=list(named))


# Registration ------------------------------------------------------------------------------------


def test_what_was_not_registered_is_off_but_speech_recognition() -> None:
    profile = registered()
    assert profile == Profile()
    assert (profile.require_tts, profile.enable_srs, profile.platform) == (False, True, None)
    assert profile.functions == ()
    assert profile.system_message() is None
    assert profile.tools() == ()


def test_everything_that_was_registered_is_kept() -> None:
    prompt, scene = SystemPrompt("a guide"), SceneContext("a museum")
    profile = registered(
        platform=Platform.TV,
        require_tts=True,
        enable_srs=False,
        function_calling=functions("a", "b"),
        system_prompt=prompt,
        scene_context=scene,
    )
    assert (profile.platform, profile.require_tts, profile.enable_srs) == (Platform.TV, True, False)
    assert (profile.system_prompt, profile.scene) == (prompt, scene)
    assert names(profile) == ["a", "b"]


def test_older_clients_say_client_type_for_platform() -> None:
    assert registered(client_type=Platform.APP).platform is Platform.APP
    assert registered(client_type=Platform.APP, platform=Platform.TV).platform is Platform.TV


# Updates -----------------------------------------------------------------------------------------

FULL = registered(
    platform=Platform.TV,
    require_tts=True,
    enable_srs=True,
    function_calling=functions("a", "b", "c"),
    system_prompt=SystemPrompt("a guide", "be brief"),
    scene_context=SceneContext("a museum", ["vase"]),
)


def test_an_update_of_nothing_changes_nothing() -> None:
    assert FULL.updated([]) == FULL
    assert FULL.updated([SessionUpdate()]) == FULL


@pytest.mark.parametrize(
    ("update", "changed"),
    [
        (SessionUpdate(require_tts=False), {"require_tts": False}),
        (SessionUpdate(enable_srs=False), {"enable_srs": False}),
        (
            SessionUpdate(system_prompt=SystemPrompt("a cook")),
            {"system_prompt": SystemPrompt("a cook")},
        ),
        (SessionUpdate(system_prompt=SystemPrompt()), {"system_prompt": SystemPrompt()}),
        (
            SessionUpdate(scene_context=SceneContext(None, ["pan"])),
            {"scene": SceneContext(None, ["pan"])},
        ),
        (
            update_of(FunctionOp.REPLACE, *functions("z")),
            {"functions": registered(function_calling=functions("z")).functions},
        ),
    ],
)
def test_an_update_changes_what_it_names_and_nothing_else(
    update: SessionUpdate, changed: dict[str, Any]
) -> None:
    after = FULL.updated([update])
    fields = ("platform", "require_tts", "enable_srs", "system_prompt", "scene", "functions")
    for name in fields:
        assert getattr(after, name) == changed.get(name, getattr(FULL, name)), name
    assert names(FULL) == ["a", "b", "c"]  # it was not changed itself
    assert FULL.require_tts is True


@pytest.mark.parametrize(
    ("op", "named", "left"),
    [
        (FunctionOp.REPLACE, functions("b", "z"), ["b", "z"]),
        (None, functions("z"), ["z"]),
        (FunctionOp.REPLACE, [], []),
        (FunctionOp.ADD, functions("z", "y"), ["a", "b", "c", "z", "y"]),
        (FunctionOp.ADD, [], ["a", "b", "c"]),
        (FunctionOp.UPDATE, functions("c", "a"), ["a", "b", "c"]),
        (FunctionOp.UPDATE, [], ["a", "b", "c"]),
        (FunctionOp.DELETE, ["b"], ["a", "c"]),
        (FunctionOp.DELETE, [*functions("a"), "c"], ["b"]),
        (FunctionOp.DELETE, [], ["a", "b", "c"]),
    ],
)
def test_functions_are_replaced_added_updated_and_deleted_by_name(
    op: FunctionOp | None, named: list[Any], left: list[str]
) -> None:
    assert names(FULL.updated([update_of(op, *named)])) == left


def test_an_updated_function_has_its_new_definition_and_the_others_their_old_one() -> None:
    after = FULL.updated([update_of(FunctionOp.UPDATE, *functions("b", description="new"))])
    assert [one.definition.description for one in after.functions] == [None, "new", None]


@pytest.mark.parametrize(
    ("op", "named", "culprit"),
    [
        (FunctionOp.ADD, functions("z", "b"), "b"),
        (FunctionOp.UPDATE, functions("a", "z"), "z"),
        (FunctionOp.DELETE, ["a", "z"], "z"),
        (FunctionOp.DELETE, functions("z"), "z"),
    ],
)
def test_one_function_that_does_not_fit_fails_the_update_and_is_named(
    op: FunctionOp, named: list[Any], culprit: str
) -> None:
    with pytest.raises(UpdateError, match=rf"function '{culprit}': `name`"):
        FULL.updated([update_of(op, *named)])


def test_updates_are_made_in_their_order() -> None:
    after = FULL.updated(
        [
            SessionUpdate(
                require_tts=False,
                enable_srs=False,
                function_calling_op=FunctionOp.ADD,
                function_calling=functions("z"),
            ),
            SessionUpdate(
                require_tts=True,
                function_calling_op=FunctionOp.DELETE,
                function_calling=["z", "a"],
            ),
        ]
    )
    assert (after.require_tts, after.enable_srs) == (True, False)
    assert names(after) == ["b", "c"]
    with pytest.raises(UpdateError):
        FULL.updated([update_of(FunctionOp.DELETE, "a"), update_of(FunctionOp.DELETE, "a")])


def test_a_session_has_as_many_functions_as_providers_take_and_no_more() -> None:
    assert MAX_FUNCTIONS == 128
    many = registered(function_calling=functions(*(f"f{number}" for number in range(127))))
    full = many.updated([update_of(FunctionOp.ADD, *functions("one"))])
    assert len(full.functions) == 128
    with pytest.raises(UpdateError, match="129 functions; the limit is 128"):
        full.updated([update_of(FunctionOp.ADD, *functions("another"))])


# Their size --------------------------------------------------------------------------------------

LIMIT_BYTES = 1000


def of_size(name: str, size: int) -> FunctionDefinition:
    """A function whose JSON has so many bytes."""
    empty = FunctionDefinition(name, "")
    return FunctionDefinition(name, "x" * (size - len(msgspec.json.encode(empty))))


def size_of(profile: Profile) -> int:
    return sum(function.size_bytes for function in profile.functions)


@pytest.fixture
def nearly_full() -> Profile:
    """The functions of a session that are as large as they may be together."""
    profile = registered(function_calling=[of_size("a", 500), of_size("b", 500)])
    assert size_of(profile) == LIMIT_BYTES
    return profile


@pytest.mark.parametrize(
    "update",
    [
        update_of(FunctionOp.ADD, FunctionDefinition("c")),
        update_of(FunctionOp.UPDATE, of_size("b", 501)),
        update_of(FunctionOp.REPLACE, of_size("c", 1001)),
        update_of(None, *(of_size(f"f{n}", 100) for n in range(11))),
        # Short in the frame, long as it is written by us.
        update_of(FunctionOp.REPLACE, FunctionDefinition("c", None, {"p": [1e15] * 100})),
    ],
)
def test_functions_that_are_too_large_together_are_refused_and_change_nothing(
    nearly_full: Profile, update: SessionUpdate
) -> None:
    before = (nearly_full, size_of(nearly_full))
    size = size_of(nearly_full.updated([update], 0))  # without a limit
    assert size > LIMIT_BYTES
    with pytest.raises(UpdateError) as refused:
        nearly_full.updated([SessionUpdate(require_tts=True), update], LIMIT_BYTES)
    assert refused.value.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert refused.value.detail == f"{size} bytes of functions; the limit is {LIMIT_BYTES}"
    assert (nearly_full, size_of(nearly_full)) == before
    assert size_of(nearly_full.updated([update], size)) == size


@pytest.mark.parametrize(
    "update",
    [
        SessionUpdate(require_tts=True),
        update_of(FunctionOp.UPDATE, of_size("b", 500)),
        update_of(FunctionOp.REPLACE, of_size("c", 1000)),
        update_of(FunctionOp.DELETE, "a"),
        update_of(FunctionOp.DELETE, *functions("a", "b", description="x" * 2000)),
    ],
)
def test_functions_that_are_just_small_enough_are_kept(
    nearly_full: Profile, update: SessionUpdate
) -> None:
    assert size_of(nearly_full.updated([update], LIMIT_BYTES)) <= LIMIT_BYTES


def test_by_default_they_may_fill_one_text_frame() -> None:
    assert MAX_FUNCTIONS_BYTES == MAX_TEXT_BYTES
    full = registered(function_calling=[of_size("a", MAX_FUNCTIONS_BYTES)])
    with pytest.raises(UpdateError, match=f"the limit is {MAX_FUNCTIONS_BYTES}"):
        full.updated([update_of(FunctionOp.ADD, FunctionDefinition("b"))])
    with pytest.raises(UpdateError) as refused:
        registered(function_calling=[of_size("a", MAX_FUNCTIONS_BYTES + 1)])
    assert refused.value.code is ErrorCode.PAYLOAD_TOO_LARGE


@pytest.mark.parametrize(
    "inside",
    [
        b'{"properties":{"p":{"enum":[' + b",".join([b"{}"] * 60_000) + b"]}}}",
        b'{"type":"object","properties":{"p":{"enum":[' + b",".join([b"[[]]"] * 40_000) + b"]}}}",
        b'{"type":"object","properties":{'
        + b",".join(b'"%d":{}' % n for n in range(15_000))
        + b"}}",
    ],
)
def test_functions_take_as_much_memory_as_their_json(inside: bytes) -> None:
    definition = b'[{"name":"f","parameters":' + inside + b"}]"
    kept = []
    gc.collect()
    tracemalloc.start()
    for _ in range(5):
        decoded = msgspec.json.decode(definition, type=list[FunctionDefinition])
        kept.append(registered(function_calling=decoded))
        del decoded
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 5 * (2 * len(definition) + 10_000)


def test_a_function_is_asked_for_and_offered_as_it_was_given() -> None:
    given = FunctionDefinition("f", "what it does", {"type": "object", "properties": {"é": True}})
    (function,) = registered(function_calling=[given]).functions
    assert msgspec.json.encode(function.definition) == msgspec.json.encode(given)
    assert function.tool.parameters is function.definition.parameters  # in memory only once
    body = encode_body("m", Prompt((), (function.tool, function.tool)))
    schema = '{"type":"object","properties":{"é":true}}'
    tool = (
        '{"type":"function","function":{"name":"f","description":"what it does","parameters":'
        f"{schema}}}}}"
    )
    assert f'"tools":[{tool},{tool}]'.encode() in body


# What the model is told --------------------------------------------------------------------------


def test_the_system_message_is_role_then_requirements_then_scene() -> None:
    message = FULL.system_message()
    assert message == Message("system", "a guide\n\nbe brief\n\na museum\n\nKeywords: vase")


@pytest.mark.parametrize(
    ("prompt", "scene", "text"),
    [
        (SystemPrompt("role"), None, "role"),
        (SystemPrompt(None, "how"), None, "how"),
        (SystemPrompt("", ""), SceneContext("", []), None),
        (None, SceneContext("where"), "where"),
        (None, SceneContext(None, ["one", "two"]), "Keywords: one, two"),
        (SystemPrompt("role"), SceneContext("where"), "role\n\nwhere"),
    ],
)
def test_what_is_absent_or_empty_leaves_no_trace_in_the_system_message(
    prompt: SystemPrompt | None, scene: SceneContext | None, text: str | None
) -> None:
    message = registered(system_prompt=prompt, scene_context=scene).system_message()
    assert message == (None if text is None else Message("system", text))


def tool(parameters: Any, description: str | None = None) -> Tool:
    (made,) = registered(
        function_calling=[FunctionDefinition("f", description, parameters)]
    ).tools()
    assert made.name == "f"
    return made


def schema_of(parameters: Any) -> Any:
    return msgspec.json.decode(tool(parameters).parameters)


def test_a_json_schema_is_offered_as_it_was_given() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    made = tool(schema, "the weather")
    assert (made.name, made.description) == ("f", "the weather")
    assert schema_of(schema) == schema


@pytest.mark.parametrize("parameters", [None, {}, []])
def test_a_function_without_parameters_has_the_schema_of_an_empty_object(parameters: Any) -> None:
    assert tool(parameters).description == ""
    assert schema_of(parameters) == {"type": "object", "properties": {}}


def test_a_schema_that_leaves_out_its_type_gets_it() -> None:
    properties = {"city": {"type": "string"}}
    assert schema_of({"properties": properties}) == {"type": "object", "properties": properties}


def test_a_list_of_parameters_becomes_a_schema() -> None:
    made = schema_of(
        [
            FunctionParameter("city", "string", "where"),
            FunctionParameter("days", "integer", required=False),
            FunctionParameter("units", "boolean", ""),
            FunctionParameter("more", "array", required=False),
        ]
    )
    assert made == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where"},
            "days": {"type": "integer"},
            "units": {"type": "boolean"},
            "more": {"type": "array", "items": {}},
        },
        "required": ["city", "units"],
    }


def test_a_list_of_optional_parameters_requires_none() -> None:
    # JSON Schema of draft 4 has no empty `required`.
    assert "required" not in schema_of([FunctionParameter("days", "integer", required=False)])
