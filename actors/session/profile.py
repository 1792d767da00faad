"""What a client registered, how a REQUEST changes it, and what the model is told of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.wire.protocol import (
    MAX_FUNCTIONS,
    FunctionDefinition,
    FunctionName,
    FunctionOp,
    FunctionParameter,
    Platform,
    Register,
    SceneContext,
    SessionUpdate,
    SystemPrompt,
)
from llm.chat.completions import Message, Tool


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

    @classmethod
    def registered(cls, register: Register) -> Profile:
        """The one that a REGISTER asks for."""
        return cls(
            register.platform or register.client_type,
            register.require_tts,
            register.enable_srs,
            register.system_prompt or SystemPrompt(),
            register.scene_context or SceneContext(),
            tuple(register.function_calling or ()),
        )

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
