"""The settings of a session: what its client registered, updates, and the model's view. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from actors.words import ErrorCode
from llm.chat.completions import Message, Tool

MAX_FUNCTIONS = 128
"""The most functions of one session: providers accept no more."""

MAX_FUNCTIONS_BYTES = 256 * 1024
"""The default for how many bytes the definitions of one session may have together: as many as one
text frame."""

FunctionName: TypeAlias = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
"""The names that providers accept."""


class Platform(enum.StrEnum):
    """The kind of client."""

    WEB = "WEB"
    APP = "APP"
    MINI_PROGRAM = "MINI_PROGRAM"
    TV = "TV"


class FunctionOp(enum.StrEnum):
    """What an update does with the functions that it lists."""

    REPLACE = "REPLACE"
    ADD = "ADD"
    UPDATE = "UPDATE"
    DELETE = "DELETE"


class SystemPrompt(Struct, frozen=True):
    """The role of the model, and how it should answer."""

    role_description: str | None = None
    response_requirements: str | None = None


class SceneContext(Struct, frozen=True):
    """The user's surroundings."""

    scene_description: str | None = None
    keywords: list[str] | None = None


class FunctionParameter(Struct, frozen=True):
    """One parameter of a function that lists its parameters instead of giving a JSON Schema."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    type: Literal["string", "number", "integer", "boolean", "array", "object"]
    description: str | None = None
    required: bool = True


class FunctionDefinition(Struct, frozen=True, omit_defaults=True):
    """A function that the model may ask the client to call.

    `parameters` is a JSON Schema of type object, or a list of parameters.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | list[FunctionParameter] | None = None


class SessionUpdate(Struct, frozen=True):
    """Changes to the settings of a session. A field that is absent or null changes nothing.

    `function_calling` lists definitions; for DELETE, it may list names.
    """

    require_tts: bool | None = None
    enable_srs: bool | None = None
    system_prompt: SystemPrompt | None = None
    scene_context: SceneContext | None = None
    function_calling_op: FunctionOp | None = None
    function_calling: list[FunctionDefinition | FunctionName] | None = None


class EncodedDefinition(Struct, frozen=True, omit_defaults=True):
    """A `FunctionDefinition` whose parameters are JSON. Its own JSON is the same."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw | None = None


class Function(Struct, frozen=True):
    """A function of a session. Its parameters are kept as JSON (`Tool` says why).

    Args:
        definition: as the client sent it.
        tool: what the model is offered.
    """

    definition: EncodedDefinition
    tool: Tool

    @classmethod
    def of(cls, definition: FunctionDefinition) -> Function:
        """Encode a definition."""
        name, description, given = definition.name, definition.description, definition.parameters
        encoded = None if given is None else _encoded(given)
        is_whole = isinstance(given, dict) and given.keys() >= {"type", "properties"}
        # A schema that is offered as it was given is in memory only once.
        schema = encoded if is_whole and encoded is not None else _encoded(_schema(given))
        return cls(
            EncodedDefinition(name, description, encoded), Tool(name, description or "", schema)
        )

    @property
    def name(self) -> str:
        """Its name, unique in a session."""
        return self.definition.name

    @property
    def size_bytes(self) -> int:
        """Length of its definition as JSON, without spaces."""
        return len(_encoder.encode(self.definition))


class UpdateError(Exception):
    """An update is not possible.

    Args:
        detail: why, for the client.
        code: the error code for the client.
    """

    def __init__(self, detail: str, code: ErrorCode = ErrorCode.MALFORMED_PAYLOAD) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code


@dataclass(frozen=True)
class Profile:
    """The settings of a session. Immutable: an update returns a new profile, or fails."""

    platform: Platform | None = None
    require_tts: bool = False
    enable_srs: bool = True
    system_prompt: SystemPrompt = field(default_factory=SystemPrompt)
    scene: SceneContext = field(default_factory=SceneContext)
    functions: tuple[Function, ...] = ()

    def updated(
        self, updates: Iterable[SessionUpdate], max_functions_bytes: int = MAX_FUNCTIONS_BYTES
    ) -> Profile:
        """Return the profile with all of these updates, applied in order.

        Args:
            updates: the updates.
            max_functions_bytes: how many bytes the definitions of all functions may have together,
                as JSON without spaces; 0: no limit.

        Raises:
            UpdateError: one of the updates is not possible.
        """
        profile = self
        for update in updates:
            profile = profile._after(update, max_functions_bytes)
        return profile

    def _after(self, update: SessionUpdate, max_functions_bytes: int) -> Profile:
        changes: dict[str, Any] = {
            "require_tts": update.require_tts,
            "enable_srs": update.enable_srs,
            "system_prompt": update.system_prompt,
            "scene": update.scene_context,
        }
        if update.function_calling is not None:
            op = update.function_calling_op or FunctionOp.REPLACE
            named = update.function_calling
            changes["functions"] = self._functions_after(op, named, max_functions_bytes)
        return replace(self, **{name: new for name, new in changes.items() if new is not None})

    def _functions_after(
        self, op: FunctionOp, named: list[FunctionDefinition | FunctionName], max_bytes: int
    ) -> tuple[Function, ...]:
        known = {function.name: function for function in self.functions}
        given = {one if isinstance(one, str) else one.name: one for one in named}
        for name in given:
            if op is FunctionOp.ADD and name in known:
                raise UpdateError(f"function {name!r}: `name` exists; use UPDATE to change it")
            if op in (FunctionOp.UPDATE, FunctionOp.DELETE) and name not in known:
                raise UpdateError(f"function {name!r}: `name` does not exist in this session")
        definitions = {
            name: Function.of(one)
            for name, one in given.items()
            if op is not FunctionOp.DELETE and not isinstance(one, str)
        }
        match op:
            case FunctionOp.REPLACE:
                known = definitions
            case FunctionOp.ADD | FunctionOp.UPDATE:
                known |= definitions
            case FunctionOp.DELETE:
                known = {name: one for name, one in known.items() if name not in given}
        if len(known) > MAX_FUNCTIONS:
            raise UpdateError(f"{len(known)} functions; the limit is {MAX_FUNCTIONS}")
        size = sum(function.size_bytes for function in known.values())
        if 0 < max_bytes < size:
            detail = f"{size} bytes of functions; the limit is {max_bytes}"
            raise UpdateError(detail, ErrorCode.PAYLOAD_TOO_LARGE)
        return tuple(known.values())

    def system_message(self) -> Message | None:
        """The system message at the start of each prompt; None if it would be empty."""
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
        """The functions, in the form that the model is offered them."""
        return tuple(function.tool for function in self.functions)


_encoder = msgspec.json.Encoder()


def _encoded(value: object) -> msgspec.Raw:
    # A copy: the encoder's result may hold on to half as much memory again.
    return msgspec.Raw(bytes(memoryview(_encoder.encode(value))))


def _schema(parameters: dict[str, Any] | list[FunctionParameter] | None) -> dict[str, Any]:
    if isinstance(parameters, dict):
        return {"type": "object", "properties": {}} | parameters
    properties: dict[str, Any] = {}
    for one in parameters or ():
        properties[one.name] = {"type": one.type}
        if one.type == "array":
            properties[one.name]["items"] = {}  # providers require `items` for an array
        if one.description:
            properties[one.name]["description"] = one.description
    required = [one.name for one in parameters or () if one.required]
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | {"required": required} if required else schema
