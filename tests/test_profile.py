"""What a session registered, how updates change it, and what the model is told of it."""

from __future__ import annotations

from typing import Any

import pytest

from actors.session.profile import (
    MAX_FUNCTIONS,
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
from gateway.wire.attachment import profile_of
from gateway.wire.frames import ApiKeyAuth, Register
from llm.chat.completions import Message, Tool


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
        (update_of(FunctionOp.REPLACE, *functions("z")), {"functions": (*functions("z"),)}),
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
    assert [function.description for function in after.functions] == [None, "new", None]


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


def test_a_json_schema_is_offered_as_it_was_given() -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    assert tool(schema, "the weather") == Tool("f", "the weather", schema)


@pytest.mark.parametrize("parameters", [None, {}, []])
def test_a_function_without_parameters_has_the_schema_of_an_empty_object(parameters: Any) -> None:
    assert tool(parameters) == Tool("f", "", {"type": "object", "properties": {}})


def test_a_schema_that_leaves_out_its_type_gets_it() -> None:
    properties = {"city": {"type": "string"}}
    assert tool({"properties": properties}).parameters == {
        "type": "object",
        "properties": properties,
    }


def test_a_list_of_parameters_becomes_a_schema() -> None:
    made = tool(
        [
            FunctionParameter("city", "string", "where"),
            FunctionParameter("days", "integer", required=False),
            FunctionParameter("units", "boolean", ""),
            FunctionParameter("more", "array", required=False),
        ]
    )
    assert made.parameters == {
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
    made = tool([FunctionParameter("days", "integer", required=False)])
    assert "required" not in made.parameters
