"""What a client registered, how a REQUEST changes it, and what the model is told of it. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from llm.chat.completions import Message, Tool

MAX_FUNCTIONS = 128
"""Functions of one session: what providers take."""

FunctionName: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
"""As providers take them."""


class Platform(enum.StrEnum):
    """What kind of client it is."""

    WEB = "WEB"
    APP = "APP"
    MINI_PROGRAM = "MINI_PROGRAM"
    TV = "TV"


class FunctionOp(enum.StrEnum):
    """What an update does with the functions that it names."""

    REPLACE = "REPLACE"
    ADD = "ADD"
    UPDATE = "UPDATE"
    DELETE = "DELETE"


class SystemPrompt(Struct, frozen=True):
    """Who the model is to be, and how it is to answer."""

    role_description: str | None = None
    response_requirements: str | None = None


class SceneContext(Struct, frozen=True):
    """Where the user is, or what stands before them."""

    scene_description: str | None = None
    keywords: list[str] | None = None


class FunctionParameter(Struct, frozen=True):
    """One parameter, where a definition lists them instead of giving a JSON Schema."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    type: Literal["string", "number", "integer", "boolean", "array", "object"]
    description: str | None = None
    required: bool = True


class FunctionDefinition(Struct, frozen=True, omit_defaults=True):
    """A function that the client can call for the model.

    `parameters` is a JSON Schema of type object, or a list of parameters.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | list[FunctionParameter] | None = None


class SessionUpdate(Struct, frozen=True):
    """What a REQUEST may change of its session; what is absent or null stays as it is.

    `function_calling` names functions by definition; for DELETE their names alone are enough.
    """

    require_tts: bool | None = None
    enable_srs: bool | None = None
    system_prompt: SystemPrompt | None = None
    scene_context: SceneContext | None = None
    function_calling_op: FunctionOp | None = None
    function_calling: list[FunctionDefinition | FunctionName] | None = None


class UpdateError(Exception):
    """An update cannot be made; the text says why, for the client."""


@dataclass(frozen=True)
class Profile:
    """A session's settings. Never changed: an update makes a new one, or fails."""

    platform: Platform | None = None
    require_tts: bool = False
    enable_srs: bool = True
    system_prompt: SystemPrompt = field(default_factory=SystemPrompt)
    scene: SceneContext = field(default_factory=SceneContext)
    functions: tuple[FunctionDefinition, ...] = ()

    def updated(self, updates: Iterable[SessionUpdate]) -> Profile:
        """The one after all of these updates.

        Raises:
            UpdateError: one of them cannot be made.
        """
        profile = self
        for update in updates:
            profile = profile._after(update)
        return profile

    def _after(self, update: SessionUpdate) -> Profile:
        changes: dict[str, Any] = {
            "require_tts": update.require_tts,
            "enable_srs": update.enable_srs,
            "system_prompt": update.system_prompt,
            "scene": update.scene_context,
        }
        if update.function_calling is not None:
            op = update.function_calling_op or FunctionOp.REPLACE
            changes["functions"] = self._functions_after(op, update.function_calling)
        return replace(self, **{name: new for name, new in changes.items() if new is not None})

    def _functions_after(
        self, op: FunctionOp, named: list[FunctionDefinition | FunctionName]
    ) -> tuple[FunctionDefinition, ...]:
        known = {function.name: function for function in self.functions}
        given = {one if isinstance(one, str) else one.name: one for one in named}
        definitions = {name: one for name, one in given.items() if not isinstance(one, str)}
        for name in given:
            if op is FunctionOp.ADD and name in known:
                raise UpdateError(f"function {name!r}: `name` is there already; UPDATE changes it")
            if op in (FunctionOp.UPDATE, FunctionOp.DELETE) and name not in known:
                raise UpdateError(f"function {name!r}: `name` is of no function of this session")
        match op:
            case FunctionOp.REPLACE:
                known = definitions
            case FunctionOp.ADD | FunctionOp.UPDATE:
                known |= definitions
            case FunctionOp.DELETE:
                known = {name: one for name, one in known.items() if name not in given}
        if len(known) > MAX_FUNCTIONS:
            raise UpdateError(f"{len(known)} functions; the limit is {MAX_FUNCTIONS}")
        return tuple(known.values())

    def system_message(self) -> Message | None:
        """What the model is told before all else; None where there is nothing to tell."""
        keywords = ", ".join(self.scene.keywords or ())
        parts = (
            self.system_prompt.role_description,
            self.system_prompt.response_requirements,
            self.scene.scene_description,
            keywords and f"Keywords: {keywords}",
        )
        text = "\n\n".join(part for part in parts if part)
        return Message("system", text) if text else None

    def tools(self) -> tuple[Tool, ...]:
        """The functions as the model is offered them."""
        return tuple(
            Tool(one.name, one.description or "", _schema(one.parameters)) for one in self.functions
        )


def _schema(parameters: dict[str, Any] | list[FunctionParameter] | None) -> dict[str, Any]:
    if isinstance(parameters, dict):
        return {"type": "object", "properties": {}} | parameters
    properties: dict[str, Any] = {}
    for one in parameters or ():
        properties[one.name] = {"type": one.type}
        if one.type == "array":
            properties[one.name]["items"] = {}  # providers want to be told of what
        if one.description:
            properties[one.name]["description"] = one.description
    required = [one.name for one in parameters or () if one.required]
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | {"required": required} if required else schema
