"""What scenarios are made of: steps, what was asked for, and the parts of an answer to it.

No I/O and no clock. In the order in which one is made of the other:

    Step         what can be done to a client: a head, bytes, silence, a reset
    ChatRequest  what was asked; Completion, the answer in the making
    chunk …      the objects of OpenAI's API, as steps
    stream_text  answers, and their parts, as a well-behaved provider gives them

What no step can say is one more kind of `Step`, acted out in `llm/demo/server.py`, which
holds the socket.

Sources: OpenAI API reference, "Chat" > "Create chat completion" and "The chat completion chunk
object", and the guide "Error codes"; WHATWG HTML §9.2 "Server-sent events"
(https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from llm.demo.stories import tokens

TOKENS_BEFORE_FAULT = 12  # enough to be seen and heard, little enough not to be waited for


# --------------------------------------------------------------------------------------- the steps


SSE_HEADERS: Mapping[str, str] = MappingProxyType(
    # A charset would do no harm, and no good: "event streams are always UTF-8" (§9.2.5).
    {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
)


@dataclass(frozen=True, slots=True)
class Head:
    """Write status line and headers now. Without this step, the first `Send` brings this default.

    With a `Content-Length` the body is as long as that says; without, it is chunked, or, where one
    side speaks HTTP/1.0, it ends with the connection.
    """

    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=lambda: SSE_HEADERS)
    version: str = "HTTP/1.1"


@dataclass(frozen=True, slots=True)
class Send:
    """Write `data`, a part of the body: one chunk, where the body is chunked. b"" does nothing.

    There is a turn of the event loop between any two of them, so that no scenario can starve the
    process.
    """

    data: bytes
    halt: "Stall | None" = None
    """Silence in the middle of it, its framing included."""


@dataclass(frozen=True, slots=True)
class Raw:
    """Write `data` as it is, whatever HTTP has to say about it."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Let `seconds` pass since the previous pause was over: for an even pace."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Do nothing for `seconds`, counted from now; None: until the client goes."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Close:
    """End the connection here and now, in order (FIN) but without the end of the body."""


@dataclass(frozen=True, slots=True)
class Reset:
    """End the connection here and now, by a reset (RST)."""


Step = Head | Send | Raw | Pause | Stall | Close | Reset
"""The client's going ends every one of them at once; after the last one, the body ends in order."""


# ------------------------------------------------------------------------------ what was asked for


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """JSON Schema of type object."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """The part of a request body that a scenario acts on."""

    model: str
    user_text: str
    """Text of the last message of role `user`, "" where there is none."""
    prompt_tokens: int
    stream: bool = True
    include_usage: bool = False
    max_tokens: int | None = None
    """Bound on the tokens of the answer, at least 1; None: no bound."""
    has_stream_options: bool = False
    tools: Sequence[Tool] = ()
    """Of `tools`, then of the legacy `functions`."""
    tool_result: str | None = None
    """Text of the last message, where that is what a tool has answered."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer in the making: what a scenario has to work with."""

    request: ChatRequest
    completion_id: str
    created: int
    """Seconds since the epoch, the same on every chunk."""
    seconds_per_token: float
    parameter: float | None = None
    """What followed the colon, or the scenario's default; None where there is neither."""
    attempt: int = 1
    """Which POST for this very model name it is, where the scenario counts them; from 1."""

    @property
    def count(self) -> int:
        """The parameter of a scenario that always has one, as a whole number."""
        assert self.parameter is not None
        return int(self.parameter)


Play = Callable[[Completion], Iterator[Step]]


# ------------------------------------------------------------------------------------- the objects


def encode(value: object) -> bytes:
    r"""JSON in UTF-8; lone surrogates, which JSON can smuggle in ("\ud800"), become "?"."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def event(data: bytes) -> bytes:
    """One server-sent event with `data` (no line break in it), ended by its empty line (§9.2.5)."""
    return b"data: %s\n\n" % data


DONE = Send(event(b"[DONE]"))


def chunk_event(
    completion: Completion,
    delta: Mapping[str, object] | None,
    finish_reason: str | None = None,
    usage: Mapping[str, int] | None = None,
) -> bytes:
    """One "chat completion chunk object" as an event; without a delta, its `choices` are empty.

    Where usage was asked for, "all other chunks will also include a `usage` field, but with a null
    value" (parameter `stream_options.include_usage`).
    """
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body = _object(completion, "chat.completion.chunk")
    body["choices"] = [] if delta is None else [choice]
    if completion.request.include_usage:
        body["usage"] = usage
    return event(encode(body))


def chunk(
    completion: Completion, delta: Mapping[str, object], finish_reason: str | None = None
) -> Send:
    """A chunk with a delta, sent."""
    return Send(chunk_event(completion, delta, finish_reason))


def json_answer(
    status: HTTPStatus, body: object, headers: Mapping[str, str] | None = None
) -> Iterator[Step]:
    """A whole answer: `body` as JSON."""
    return plain_answer(status, encode(body), "application/json", headers)


def plain_answer(
    status: HTTPStatus, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
) -> Iterator[Step]:
    """A whole answer of any type."""
    own = {"Content-Type": content_type, "Content-Length": str(len(body))}
    yield Head(status, own | dict(headers or {}))
    yield Send(body)


def error_object(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error (guide "Error codes")."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _object(completion: Completion, kind: str) -> dict[str, Any]:
    return {
        "id": completion.completion_id,
        "object": kind,
        "created": completion.created,
        "model": completion.request.model,
    }


def _usage(request: ChatRequest, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": request.prompt_tokens + completion_tokens,
    }


# ------------------------------------------------------------------------------ parts of an answer


def within(request: ChatRequest, said: list[str]) -> tuple[list[str], str]:
    """So many of the tokens as the request allows, and the finish reason."""
    if request.max_tokens is None or len(said) <= request.max_tokens:
        return said, "stop"
    return said[: request.max_tokens], "length"


def opening(completion: Completion) -> Iterator[Step]:
    """The role, which comes before any text."""
    yield chunk(completion, {"role": "assistant", "content": ""})


def telling(completion: Completion, said: Iterable[str], member: str = "content") -> Iterator[Step]:
    """Each token at its time, as that member of a delta."""
    for token in said:
        yield Pause(completion.seconds_per_token)
        yield chunk(completion, {member: token})


def finish(completion: Completion, finish_reason: str, completion_tokens: int) -> Iterator[Step]:
    """The finish reason, and the usage where it was asked for."""
    yield chunk(completion, {}, finish_reason)
    if completion.request.include_usage:
        usage = _usage(completion.request, completion_tokens)
        yield Send(chunk_event(completion, None, usage=usage))


def ending(completion: Completion, finish_reason: str, completion_tokens: int) -> Iterator[Step]:
    """The finish as `finish` has it, then `[DONE]`."""
    yield from finish(completion, finish_reason, completion_tokens)
    yield DONE


def stream_text(completion: Completion, text: str, between: Iterable[Step] = ()) -> Iterator[Step]:
    """`text` as a well-behaved provider streams it, but for what comes after its first tokens."""
    said, finish_reason = within(completion.request, tokens(text))
    yield from opening(completion)
    yield from telling(completion, said[:TOKENS_BEFORE_FAULT])
    yield from between
    yield from telling(completion, said[TOKENS_BEFORE_FAULT:])
    yield from ending(completion, finish_reason, len(said))


def whole_completion(
    completion: Completion, message: Mapping[str, object], finish_reason: str, said: int
) -> Iterator[Step]:
    """The "chat completion object", for `stream: false`.

    Args:
        message: what is told of the assistant's message beside its role.
        said: how many tokens that is.
    """
    full = {"role": "assistant", "content": None, "refusal": None} | dict(message)
    choice = {"index": 0, "message": full, "logprobs": None, "finish_reason": finish_reason}
    body = _object(completion, "chat.completion")
    return json_answer(
        HTTPStatus.OK, body | {"choices": [choice], "usage": _usage(completion.request, said)}
    )


def whole_text(completion: Completion, text: str) -> Iterator[Step]:
    """`text` for `stream: false`."""
    said, finish_reason = within(completion.request, tokens(text))
    return whole_completion(completion, {"content": "".join(said)}, finish_reason, len(said))
