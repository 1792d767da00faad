"""The answers of a well-behaved provider, and their parts, as steps. No I/O and no clock.

Sources: OpenAI API reference, "Chat" > "Create chat completion" and "The chat completion chunk
object", and the guide "Error codes"; WHATWG HTML §9.2 "Server-sent events"
(https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from llm.demo.steps import ChatRequest, Completion, Head, Pause, Send, Step
from llm.demo.stories import tokens

TOKENS_BEFORE_FAULT = 12  # enough to be noticed, and soon over


# ------------------------------------------------------------------- the objects of OpenAI's API


def encode(value: object) -> bytes:
    r"""JSON in UTF-8; lone surrogates, which JSON can contain ("\ud800"), become "?"."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def event(data: bytes) -> bytes:
    """One server-sent event with `data` (without line breaks), ended by an empty line (§9.2.5)."""
    return b"data: %s\n\n" % data


DONE = Send(event(b"[DONE]"))


def chunk_event(
    completion: Completion,
    delta: Mapping[str, object] | None,
    finish_reason: str | None = None,
    usage: Mapping[str, int] | None = None,
) -> bytes:
    """One "chat completion chunk object" as an event; with delta None, its `choices` are empty.

    If usage was asked for, "all other chunks will also include a `usage` field, but with a null
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
    """A step that sends a chunk with a delta."""
    return Send(chunk_event(completion, delta, finish_reason))


def json_answer(
    status: HTTPStatus, body: object, headers: Mapping[str, str] | None = None
) -> Iterator[Step]:
    """A whole answer (not streamed): `body` as JSON."""
    return plain_answer(status, encode(body), "application/json", headers)


def plain_answer(
    status: HTTPStatus, body: bytes, content_type: str, headers: Mapping[str, str] | None = None
) -> Iterator[Step]:
    """A whole answer (not streamed) of any content type."""
    own = {"Content-Type": content_type, "Content-Length": str(len(body))}
    yield Head(status, own | dict(headers or {}))
    yield Send(body)


def error_object(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error answer (guide "Error codes")."""
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


# ------------------------------------------------------------------------------- streamed answers


def limited(request: ChatRequest, text_tokens: list[str]) -> tuple[list[str], str]:
    """The tokens up to the request's `max_tokens`, and the finish reason."""
    if request.max_tokens is None or len(text_tokens) <= request.max_tokens:
        return text_tokens, "stop"
    return text_tokens[: request.max_tokens], "length"


def start(completion: Completion) -> Iterator[Step]:
    """The first chunk: the role, before any text."""
    yield chunk(completion, {"role": "assistant", "content": ""})


def stream_tokens(
    completion: Completion, text_tokens: Iterable[str], field: str = "content"
) -> Iterator[Step]:
    """A chunk for each token, at the pace of the completion; `field` of the delta has the token."""
    for token in text_tokens:
        yield Pause(completion.seconds_per_token)
        yield chunk(completion, {field: token})


def finish(completion: Completion, finish_reason: str, completion_tokens: int) -> Iterator[Step]:
    """The finish reason, then the usage if it was asked for."""
    yield chunk(completion, {}, finish_reason)
    if completion.request.include_usage:
        usage = _usage(completion.request, completion_tokens)
        yield Send(chunk_event(completion, None, usage=usage))


def finish_with_done(
    completion: Completion, finish_reason: str, completion_tokens: int
) -> Iterator[Step]:
    """Like `finish`, then `[DONE]`."""
    yield from finish(completion, finish_reason, completion_tokens)
    yield DONE


def stream_text(completion: Completion, text: str, fault: Iterable[Step] = ()) -> Iterator[Step]:
    """`text` as a well-behaved provider streams it, with `fault` after `TOKENS_BEFORE_FAULT`."""
    text_tokens, finish_reason = limited(completion.request, tokens(text))
    yield from start(completion)
    yield from stream_tokens(completion, text_tokens[:TOKENS_BEFORE_FAULT])
    yield from fault
    yield from stream_tokens(completion, text_tokens[TOKENS_BEFORE_FAULT:])
    yield from finish_with_done(completion, finish_reason, len(text_tokens))


# ---------------------------------------------------------------------------------- whole answers


def whole_completion(
    completion: Completion,
    message: Mapping[str, object],
    finish_reason: str,
    completion_tokens: int,
) -> Iterator[Step]:
    """The "chat completion object", for `stream: false`.

    Args:
        message: fields of the assistant's message, other than its role.
        finish_reason: as in the API.
        completion_tokens: how many tokens the message counts as.
    """
    full = {"role": "assistant", "content": None, "refusal": None} | dict(message)
    choice = {"index": 0, "message": full, "logprobs": None, "finish_reason": finish_reason}
    body = _object(completion, "chat.completion")
    usage = _usage(completion.request, completion_tokens)
    return json_answer(HTTPStatus.OK, body | {"choices": [choice], "usage": usage})


def whole_text(completion: Completion, text: str) -> Iterator[Step]:
    """`text` for `stream: false`."""
    text_tokens, finish_reason = limited(completion.request, tokens(text))
    message = {"content": "".join(text_tokens)}
    return whole_completion(completion, message, finish_reason, len(text_tokens))
