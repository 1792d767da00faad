"""The calls of functions that the demo provider can play; `llm/demo/scenarios.py` has their rows.

No I/O and no clock. A streamed answer is `calling` with one of the generators of deltas below; a
whole one has a function of its own. Where the request has tools, its own are called, with
arguments that fit (`example`).

Sources: OpenAI API reference, "Chat" > "Create chat completion" (`tools`, and the deprecated
`functions`) and "The chat completion chunk object"; JSON Schema for the arguments.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm.demo.steps import (
    Completion,
    Pause,
    Step,
    Tool,
    chunk,
    encode,
    ending,
    stream_text,
    whole_completion,
    whole_text,
)
from llm.demo.stories import tokens

_SCHEMA_DEPTH = 8  # a JSON Schema may refer to itself


# ---------------------------------------------------------------------------------------- arguments

_EXAMPLE_STRINGS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00",
    "email": "ines@example.com",
    "uri": "https://example.com/",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
    "city": "Lisbon",
    "location": "Lisbon",
    "place": "Lisbon",
    "country": "Portugal",
    "name": "Ines",
    "query": "the light that paused",
}
"""By `format`, and by property name."""


def example(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that fit a function's `parameters`, a JSON Schema, where that is simple enough.

    Only what is required is filled in; patterns and lengths are not looked at.
    """
    value = _example(schema, "", schema, _SCHEMA_DEPTH)
    return value if isinstance(value, dict) else {}


def _example(schema: object, name: str, root: Mapping[str, Any], depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth == 0:
        return None
    if "const" in schema:
        return schema["const"]
    for key in ("enum", "examples"):
        match schema.get(key):
            case [first, *_]:
                return first
    if "default" in schema:
        return schema["default"]
    for key in ("anyOf", "oneOf", "allOf"):
        match schema.get(key):
            case [first, *_]:
                return _example(first, name, root, depth - 1)
    match schema.get("$ref"):
        case str(reference):
            return _example(_referred(reference, root), name, root, depth - 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    match kind:
        case "string":
            by_format = _EXAMPLE_STRINGS.get(str(schema.get("format")))
            return by_format or _EXAMPLE_STRINGS.get(name, f"some {name or 'text'}")
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "array":
            return [_example(schema.get("items"), name, root, depth - 1)]
        case "object" | None:
            return _example_object(schema, root, depth)
    return None


def _example_object(
    schema: Mapping[str, Any], root: Mapping[str, Any], depth: int
) -> dict[str, Any]:
    match schema:
        case {"properties": Mapping() as properties, "required": [*required]}:
            return {
                name: _example(properties[name], name, root, depth - 1)
                for name in required
                if isinstance(name, str) and name in properties
            }
    return {}


def _referred(reference: str, root: Mapping[str, Any]) -> object:
    found: object = root
    for part in filter(None, reference.removeprefix("#").split("/")):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


# ---------------------------------------------------------------------------------------- the calls

_MADE_UP_TOOLS = tuple(
    Tool(name, {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
    for name in ("get_weather", "get_local_time")
)


@dataclass(frozen=True, slots=True)
class _Call:
    index: int
    call_id: str
    name: str
    arguments: str

    @property
    def whole(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}

    @property
    def first_piece(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": ""}
        return {"index": self.index} | self.whole | {"function": function}

    def piece(self, arguments: str, more: Mapping[str, object] | None = None) -> dict[str, Any]:
        return {"index": self.index, "function": dict(more or {}) | {"arguments": arguments}}


def _calls(completion: Completion, number: int) -> list[_Call]:
    """Calls of the request's tools in turn, or of made-up ones where it has none."""
    tools = itertools.cycle(completion.request.tools or _MADE_UP_TOOLS)
    stem = completion.completion_id.removeprefix("chatcmpl-")[-20:]
    return [
        _Call(index, f"call_{stem}_{index}", tool.name, encode(example(tool.parameters)).decode())
        for index, tool in enumerate(itertools.islice(tools, number))
    ]


def _pieces(text: str, piece_chars: int) -> list[str]:
    return [text[start : start + piece_chars] for start in range(0, len(text), piece_chars)]


def _result_text(result: str) -> str:
    return f"The tool says: “{result}”. That is what I was waiting for."


def calling(
    make: Callable[[Completion], Iterable[Mapping[str, object]]],
    completion: Completion,
    reason: str = "tool_calls",
) -> Iterator[Step]:
    """An answer of the deltas that `make` gives; of text, once the result of a call is there."""
    request = completion.request
    if request.tool_result is not None:
        yield from stream_text(completion, _result_text(request.tool_result))
        return
    said = 0
    first: dict[str, object] = {"role": "assistant", "content": None}
    for delta in make(completion):
        yield Pause(completion.seconds_per_token)
        yield chunk(completion, first | dict(delta))
        first = {}
        said += 1
    yield from ending(completion, reason, said)


Delta = dict[str, object]
"""The `delta` of one chunk."""


def _deltas(*pieces: Mapping[str, object]) -> Iterator[Delta]:
    return ({"tool_calls": [piece]} for piece in pieces)


def plain_call(completion: Completion) -> Iterator[Delta]:
    """One call: its name, then its arguments in one piece."""
    (call,) = _calls(completion, 1)
    return _deltas(call.first_piece, call.piece(call.arguments))


def call_in_pieces(completion: Completion) -> Iterator[Delta]:
    """The arguments in pieces of so many characters."""
    (call,) = _calls(completion, 1)
    pieces = _pieces(call.arguments, completion.count)
    return _deltas(call.first_piece, *map(call.piece, pieces))


def call_with_empty_names(completion: Completion) -> Iterator[Delta]:
    """As some servers do it: every later piece has an id and a name, and they are empty."""
    (call,) = _calls(completion, 1)
    pieces = _pieces(call.arguments, 8)
    return _deltas(
        call.first_piece,
        *({"id": "", "type": "function"} | call.piece(one, {"name": ""}) for one in pieces),
    )


def parallel_calls(completion: Completion) -> Iterator[Delta]:
    """All begin, and then their arguments come by turns: only `index` tells them apart."""
    calls = _calls(completion, completion.count)
    rounds = itertools.zip_longest(*(_pieces(call.arguments, 8) for call in calls))
    yield from _deltas(*(call.first_piece for call in calls))
    for pieces in rounds:
        for call, piece in zip(calls, pieces, strict=True):
            if piece is not None:
                yield from _deltas(call.piece(piece))


def legacy_call(completion: Completion) -> Iterator[Delta]:
    """As `function_call`, before there were `tool_calls`: neither an index nor an id."""
    (call,) = _calls(completion, 1)
    yield {"function_call": {"name": call.name, "arguments": ""}}
    for piece in _pieces(call.arguments, 8):
        yield {"function_call": {"arguments": piece}}


def bad_call(completion: Completion) -> Iterator[Delta]:
    """The arguments lack their last character, and so are no JSON."""
    (call,) = _calls(completion, 1)
    return _deltas(call.first_piece, call.piece(call.arguments[:-1]))


def text_and_call(completion: Completion) -> Iterator[Delta]:
    """Some text, then the call."""
    for token in tokens("Let me look that up for you."):
        yield {"content": token}
    yield from plain_call(completion)


def whole_calls(completion: Completion) -> Iterator[Step]:
    """One call, for `stream: false`."""
    request = completion.request
    if request.tool_result is not None:
        return whole_text(completion, _result_text(request.tool_result))
    calls = _calls(completion, 1)
    message = {"tool_calls": [call.whole for call in calls]}
    return whole_completion(completion, message, "tool_calls", len(calls))


def whole_parallel_calls(completion: Completion) -> Iterator[Step]:
    """So many calls, for `stream: false`."""
    request = completion.request
    if request.tool_result is not None:
        return whole_text(completion, _result_text(request.tool_result))
    calls = _calls(completion, completion.count)
    message = {"tool_calls": [call.whole for call in calls]}
    return whole_completion(completion, message, "tool_calls", len(calls))


def whole_legacy_call(completion: Completion) -> Iterator[Step]:
    """A `function_call`, for `stream: false`."""
    request = completion.request
    if request.tool_result is not None:
        return whole_text(completion, _result_text(request.tool_result))
    (call,) = _calls(completion, 1)
    message = {"function_call": call.whole["function"]}
    return whole_completion(completion, message, "function_call", 1)
