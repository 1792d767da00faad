"""The scenarios that call functions.

No I/O and no clock. A streamed answer is `calling` with one of the generators of deltas below; the
answer to `stream: false` has a function of its own. The tools of the request are called, or
made-up ones where it has none, with arguments that fit their schema (`llm/demo/arguments.py`).

Sources: OpenAI API reference, "Chat" > "Create chat completion" (`tools`, and the deprecated
`functions`) and "The chat completion chunk object".
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm.demo.answers import (
    chunk,
    encode,
    finish_with_done,
    stream_text,
    whole_completion,
    whole_text,
)
from llm.demo.arguments import example
from llm.demo.steps import Completion, Pause, Step, Tool
from llm.demo.stories import tokens

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
    """Calls of the request's tools, one after another, or of made-up tools where it has none."""
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
    make_deltas: Callable[[Completion], Iterable[Mapping[str, object]]],
    completion: Completion,
    finish_reason: str = "tool_calls",
) -> Iterator[Step]:
    """The deltas that `make_deltas` yields; a text once the request has the result of a call."""
    request = completion.request
    if request.tool_result is not None:
        yield from stream_text(completion, _result_text(request.tool_result))
        return
    deltas = 0
    first: dict[str, object] = {"role": "assistant", "content": None}
    for delta in make_deltas(completion):
        yield Pause(completion.seconds_per_token)
        yield chunk(completion, first | dict(delta))
        first = {}
        deltas += 1
    yield from finish_with_done(completion, finish_reason, deltas)


Delta = dict[str, object]
"""The `delta` of one chunk."""


def _deltas(*pieces: Mapping[str, object]) -> Iterator[Delta]:
    return ({"tool_calls": [piece]} for piece in pieces)


def plain_call(completion: Completion) -> Iterator[Delta]:
    """One call: its name, then its arguments in one piece."""
    (call,) = _calls(completion, 1)
    return _deltas(call.first_piece, call.piece(call.arguments))


def call_in_pieces(completion: Completion) -> Iterator[Delta]:
    """A call with its arguments in pieces of this many characters."""
    (call,) = _calls(completion, 1)
    pieces = _pieces(call.arguments, completion.count)
    return _deltas(call.first_piece, *map(call.piece, pieces))


def call_with_empty_names(completion: Completion) -> Iterator[Delta]:
    """As some servers stream a call: every later piece has an empty id and an empty name."""
    (call,) = _calls(completion, 1)
    pieces = _pieces(call.arguments, 8)
    return _deltas(
        call.first_piece,
        *({"id": "", "type": "function"} | call.piece(one, {"name": ""}) for one in pieces),
    )


def parallel_calls(completion: Completion) -> Iterator[Delta]:
    """All calls start, then their arguments are interleaved: only `index` tells them apart."""
    calls = _calls(completion, completion.count)
    rounds = itertools.zip_longest(*(_pieces(call.arguments, 8) for call in calls))
    yield from _deltas(*(call.first_piece for call in calls))
    for pieces in rounds:
        for call, piece in zip(calls, pieces, strict=True):
            if piece is not None:
                yield from _deltas(call.piece(piece))


def legacy_call(completion: Completion) -> Iterator[Delta]:
    """A legacy `function_call`: neither an index nor an id."""
    (call,) = _calls(completion, 1)
    yield {"function_call": {"name": call.name, "arguments": ""}}
    for piece in _pieces(call.arguments, 8):
        yield {"function_call": {"arguments": piece}}


def bad_call(completion: Completion) -> Iterator[Delta]:
    """A call whose arguments lack their last character, so they are not valid JSON."""
    (call,) = _calls(completion, 1)
    return _deltas(call.first_piece, call.piece(call.arguments[:-1]))


def text_and_call(completion: Completion) -> Iterator[Delta]:
    """A text, then a call."""
    for token in tokens("Let me look that up for you."):
        yield {"content": token}
    yield from plain_call(completion)


def whole_calls(completion: Completion) -> Iterator[Step]:
    """One call, for `stream: false`."""
    return _whole_calls(completion, 1)


def whole_parallel_calls(completion: Completion) -> Iterator[Step]:
    """This many calls, for `stream: false`."""
    return _whole_calls(completion, completion.count)


def _whole_calls(completion: Completion, number: int) -> Iterator[Step]:
    message = {"tool_calls": [call.whole for call in _calls(completion, number)]}
    return _whole(completion, message, "tool_calls", number)


def whole_legacy_call(completion: Completion) -> Iterator[Step]:
    """A legacy `function_call`, for `stream: false`."""
    (call,) = _calls(completion, 1)
    return _whole(completion, {"function_call": call.whole["function"]}, "function_call", 1)


def _whole(
    completion: Completion, message: Mapping[str, object], finish_reason: str, calls: int
) -> Iterator[Step]:
    result = completion.request.tool_result
    if result is not None:
        return whole_text(completion, _result_text(result))
    return whole_completion(completion, message, finish_reason, calls)
