"""OpenAI chat completions as data: from prompt to request body, from chunk to delta. No I/O.

The shapes are those of the OpenAI API reference, "Create chat completion" and "The chat completion
chunk object", read leniently: every compatible server omits or adds something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4

DONE = "[DONE]"
"""The data of the event that ends a stream (OpenAI API reference, `stream`)."""


class ToolCall(msgspec.Struct, frozen=True):
    """A call of one of the client's functions; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True):
    """One message of the conversation that is sent to the model.

    `tool_calls` belong to role `assistant`; `tool_call_id` to role `tool`: the call whose result
    this is.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call; `parameters` is a JSON Schema of type object.

    The schema stays encoded, and becomes part of each request's body as it is: decoded, a session's
    functions would take up to 16 times the memory, and be encoded anew for each request.
    """

    name: str
    description: str
    parameters: msgspec.Raw


class Prompt(msgspec.Struct, frozen=True):
    """What is sent to a model: the conversation, and the functions that it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


class CallPiece(msgspec.Struct, frozen=True):
    """A piece of a function call, as it is streamed. Missing and null fields are None or ""."""

    index: int | None
    """Index of the call that it belongs to, where the provider sends one."""
    id: str
    name: str
    arguments: str

    @property
    def chars(self) -> int:
        """Length of all its texts in Unicode code points; 0 for an empty piece."""
        return len(self.id) + len(self.name) + len(self.arguments)


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one generation."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    estimated: bool = False
    """False: counted by the provider. True: estimated from the length of prompt and answer."""


class UsageEstimate(msgspec.Struct, frozen=True):
    """The data to estimate token counts from, for a provider that sends none.

    Args:
        prompt: what was sent.
        events: how many events with a token came.
        text_chars: length of the answer in code points, reasoning and function calls included.
    """

    prompt: Prompt
    events: int
    text_chars: int

    def guess(self) -> Usage:
        """Estimate the counts. Takes time in proportion to the length of the conversation.

        One token is about four bytes of UTF-8, in English and in Chinese, and most providers send
        one event per token.
        """
        prompt = self.prompt
        sent = [message.content or "" for message in prompt.messages]
        sent += [call.name + call.arguments for one in prompt.messages for call in one.tool_calls]
        sent_bytes = sum(len(text.encode()) for text in sent)
        if prompt.tools:
            sent_bytes += len(_encoder.encode(prompt.tools))
        asked = _TOKENS_PER_MESSAGE * len(prompt.messages) + -(-sent_bytes // _BYTES_PER_TOKEN)
        answered = max(self.events, -(-self.text_chars // _BYTES_PER_TOKEN))
        return Usage(asked, answered, asked + answered, estimated=True)


class Delta(msgspec.Struct, frozen=True):
    """What one chunk adds to the answer."""

    text: str = ""
    reasoning_chars: int = 0
    """Length of reasoning text in Unicode code points; the text itself is not relayed."""
    finish_reason: str | None = None
    usage: Usage | None = None
    calls: tuple[CallPiece, ...] = ()
    """Pieces of function calls in a chunk; `llm/chat/calls.py` assembles them."""
    call_chars: int = 0
    """Length of such pieces in Unicode code points, for a sink; whole calls follow separately."""

    @property
    def is_token(self) -> bool:
        """Whether it carries part of the answer: text, reasoning, or a piece of a call."""
        return bool(
            self.text
            or self.reasoning_chars
            or self.call_chars
            or any(piece.chars for piece in self.calls)
        )


class MalformedChunkError(ValueError):
    """The data of an event is not a chat completion chunk."""


class ErrorChunkError(Exception):
    """An event is an error object; the text is the provider's message."""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _CallPiece(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _ChunkDelta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_CallPiece | None] | None = None
    function_call: _Function | None = None


class _Choice(msgspec.Struct):
    delta: _ChunkDelta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None


_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")

_chunk_decoder = msgspec.json.Decoder(_Chunk)
_any_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()


def encode_body(
    model: str,
    prompt: Prompt,
    *,
    include_usage: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """The JSON body of a streaming chat completion request.

    Args:
        model: name of the model.
        prompt: the conversation and the functions.
        include_usage: ask for the token counts at the end of the stream (API reference,
            `stream_options.include_usage`).
        extra: further fields; they override none of ours.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": [_wire_message(message) for message in prompt.messages],
        "stream": True,
    }
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    if prompt.tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in prompt.tools]
    return _encoder.encode(body if extra is None else {**extra, **body})


def _wire_message(message: Message) -> dict[str, Any]:
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        wire["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    return wire


def parse_chunk(data: str) -> Delta:
    """Parse the data of one event.

    Args:
        data: JSON text of a chat completion chunk, not the final ``[DONE]``.

    Raises:
        MalformedChunkError: it is not JSON, or does not have the shape of a chunk.
        ErrorChunkError: it is an error object.
    """
    try:
        chunk = _chunk_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        message = error_message(data)
        if message is not None:
            raise ErrorChunkError(message) from None
        raise MalformedChunkError(str(error)) from None
    if chunk.error:
        raise ErrorChunkError(error_message(data) or "no message")
    if chunk.choices is None and chunk.usage is None:
        message = error_message(data)
        if message is not None:
            raise ErrorChunkError(message)
        raise MalformedChunkError("Object has neither `choices` nor `usage`")
    # We ask for one choice; some servers send an empty list with the usage.
    if not chunk.choices:
        return Delta(usage=_usage(chunk.usage))
    choice = chunk.choices[0]
    delta = choice.delta
    if delta is None:
        return Delta(finish_reason=choice.finish_reason, usage=_usage(chunk.usage))
    reasoning = delta.reasoning_content or delta.reasoning
    return Delta(
        delta.content or "",
        len(reasoning) if reasoning else 0,
        choice.finish_reason,
        None if chunk.usage is None else _usage(chunk.usage),
        _call_pieces(delta) if delta.tool_calls or delta.function_call else (),
    )


def _call_pieces(delta: _ChunkDelta) -> tuple[CallPiece, ...]:
    pieces = [
        _call_piece(piece.index, piece.id, piece.function)
        for piece in delta.tool_calls or ()
        if piece is not None
    ]
    # The legacy form: one call per answer, without an id. Some servers send both forms of a call.
    if delta.function_call is not None and not pieces:
        pieces.append(_call_piece(0, None, delta.function_call))
    return tuple(pieces)


def _call_piece(index: int | None, call_id: str | None, function: _Function | None) -> CallPiece:
    name = arguments = None
    if function is not None:
        name, arguments = function.name, function.arguments
    if isinstance(arguments, dict):
        arguments = _encoder.encode(arguments).decode()
    return CallPiece(index, call_id or "", name or "", arguments or "")


def _usage(value: object) -> Usage | None:
    """The token counts, or None: unreadable counts must not fail an answer."""
    if not isinstance(value, dict):
        return None
    try:
        prompt, completion, total = (int(value.get(name) or 0) for name in _COUNTS)
    except (TypeError, ValueError):
        return None
    return Usage(prompt, completion, total)


def error_message(text: str | bytes) -> str | None:
    """The message in a provider's JSON error; None where there is none.

    Shapes seen: ``{"error": {"message": …}}``, ``{"error": "…"}``, ``{"message": …}``,
    ``{"detail": …}``.
    """
    try:
        body = _any_decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    inner = body.get("error") or body
    if isinstance(inner, dict):
        inner = inner.get("message") or inner.get("detail")
    if isinstance(inner, str):
        return inner
    return None if inner is None else _encoder.encode(inner).decode()
