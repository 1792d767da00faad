"""The scenarios that play a provider's faults and oddities. No I/O and no clock.

In this order: silence, early endings, HTTP errors, oddities of the wire.

Sources: WHATWG HTML §9.2 "Server-sent events"
(https://html.spec.whatwg.org/multipage/server-sent-events.html); RFC 9112 for what breaks HTTP;
OpenAI API guide "Error codes".
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from http import HTTPStatus

from llm.demo.answers import (
    TOKENS_BEFORE_FAULT,
    chunk_event,
    encode,
    error_object,
    event,
    finish,
    finish_with_done,
    json_answer,
    limited,
    plain_answer,
    start,
    stream_text,
    stream_tokens,
)
from llm.demo.steps import (
    SSE_HEADERS,
    Close,
    Completion,
    Head,
    Pause,
    Raw,
    Send,
    Stall,
    Step,
)
from llm.demo.stories import CHINESE_STORY, answer, short_answer, tokens
from llm.demo.story_scenarios import (
    any_story,
    first_tokens,
    story,
    story_in_language,
    whole_story,
)

RETRY_AFTER_SECONDS = 1
"""The Retry-After of a 429."""

_COMMENT_SECONDS = 0.5  # between two comments: below any idle timeout, which they must not extend
_FLOOD_EVENTS_PER_WRITE = 64  # some 16 KiB: a flood that still lets other greenlets run
_LONG_LINE_PIECE_BYTES = 64 * 1024


# ----------------------------------------------------------------------------------------- silence


def stall_headers(completion: Completion) -> Iterator[Step]:
    """Silence before the headers."""
    yield Stall(completion.parameter)
    yield from any_story(completion)


def stall_first_event(completion: Completion) -> Iterator[Step]:
    """Silence between the headers and the first event."""
    yield Head()
    yield Stall(completion.parameter)
    yield from story(completion)


def stall_mid_stream(completion: Completion) -> Iterator[Step]:
    """Silence between two events."""
    text = answer(completion.request.user_text)
    return stream_text(completion, text, [Stall(completion.parameter)])


def stall_in_chunk(completion: Completion) -> Iterator[Step]:
    """Silence in the middle of an HTTP chunk."""
    text = answer(completion.request.user_text)
    text_tokens, _ = limited(completion.request, tokens(text))
    sends_before = min(TOKENS_BEFORE_FAULT, len(text_tokens)) + 1  # the role comes first
    for step in story(completion):
        if isinstance(step, Send):
            if sends_before == 0:
                step = replace(step, stall=Stall(completion.parameter))
            sends_before -= 1
        yield step


def comments(completion: Completion) -> Iterator[Step]:
    """Only comments: they start with a colon, keep connections alive and are no events (§9.2.6)."""
    left = math.inf if completion.parameter is None else completion.parameter
    while left > 0:
        yield Send(b": still waiting\n\n")
        yield Pause(min(left, _COMMENT_SECONDS))
        left -= _COMMENT_SECONDS
    yield from story(completion)


def done_but_open(completion: Completion) -> Iterator[Step]:
    """The body stays open after `[DONE]`."""
    yield from stream_text(completion, short_answer(completion.request.user_text))
    yield Stall(completion.parameter)


def whole_halved(fault: Step | None, completion: Completion) -> Iterator[Step]:
    """For `stream: false`: half of the body, then `fault`, or silence where that is None."""
    for step in whole_story(completion):
        if isinstance(step, Send):
            half = len(step.data) // 2
            yield Send(step.data[:half])
            yield fault or Stall(completion.parameter)
            yield Send(step.data[half:])
        else:
            yield step


# ----------------------------------------------------------------------------------- early endings


def no_done(completion: Completion) -> Iterator[Step]:
    """A short answer without `[DONE]`."""
    text = short_answer(completion.request.user_text)
    text_tokens, finish_reason = limited(completion.request, tokens(text))
    yield from start(completion)
    yield from stream_tokens(completion, text_tokens)
    yield from finish(completion, finish_reason, len(text_tokens))


def broken_off(fault: Step | None, completion: Completion) -> Iterator[Step]:
    """This many tokens, then `fault`; where that is None, the body ends."""
    yield from first_tokens(completion, completion.count)
    if fault is not None:
        yield fault


def error_in_stream(completion: Completion) -> Iterator[Step]:
    """This many tokens, then an error object."""
    yield from first_tokens(completion, completion.count)
    message = "The server had an error while processing your request. Sorry about that!"
    yield Send(event(encode(error_object(message, "server_error"))))


def no_answer(completion: Completion) -> Iterator[Step]:
    """The connection closes before any byte of an answer."""
    return iter([Close()]) if _must_fail(completion) else any_story(completion)


# ------------------------------------------------------------------------------------- HTTP errors


def _must_fail(completion: Completion) -> bool:
    """Whether this POST is one of the first `parameter`; without a parameter, all of them are."""
    return completion.parameter is None or completion.attempt <= completion.parameter


_REFUSALS: dict[int, tuple[str, str, str | None]] = {
    400: ("This model's maximum context length is 8 tokens.", "invalid_request_error", None),
    401: ("Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    403: ("Your country or region is not supported.", "request_forbidden", None),
    404: ("The model does not exist.", "invalid_request_error", "model_not_found"),
    422: ("The request could not be processed.", "invalid_request_error", None),
    429: ("Rate limit reached for requests.", "requests", "rate_limit_exceeded"),
    500: ("The server had an error while processing your request.", "server_error", None),
    503: ("The engine is currently overloaded, please try again later.", "server_error", None),
}
"""Message, type and code by status."""


def refusal(status: int, completion: Completion) -> Iterator[Step]:
    """An error answer with this status."""
    if not _must_fail(completion):
        return any_story(completion)
    message, kind, code = _REFUSALS[status]
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 429 else {}
    return json_answer(HTTPStatus(status), error_object(message, kind, code=code), headers)


def bad_gateway(completion: Completion) -> Iterator[Step]:
    """A 502 as a proxy sends it: a web page, not JSON."""
    if not _must_fail(completion):
        return any_story(completion)
    page = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n"
    return plain_answer(HTTPStatus.BAD_GATEWAY, page, "text/html")


def usage_refused(completion: Completion) -> Iterator[Step]:
    """A 400 if the request has `stream_options`."""
    if not completion.request.has_stream_options:
        return any_story(completion)
    body = error_object(
        "Unrecognized request argument supplied: stream_options",
        "invalid_request_error",
        param="stream_options",
        code="unknown_parameter",
    )
    return json_answer(HTTPStatus.BAD_REQUEST, body)


def not_sse(_completion: Completion) -> Iterator[Step]:
    """A web page with status 200."""
    page = b"<!doctype html><title>Sign in to the network</title>"
    return plain_answer(HTTPStatus.OK, page, "text/html; charset=utf-8")


# ----------------------------------------------------------------------------- oddities of the wire


def malformed_json(completion: Completion) -> Iterator[Step]:
    """One event is not valid JSON."""
    text = answer(completion.request.user_text)
    return stream_text(completion, text, [Send(event(b'{"choices":[{"index":0,"delta":{"conte'))])


def bad_utf8(completion: Completion) -> Iterator[Step]:
    """One event contains 0xFF, which occurs in no UTF-8 text."""
    broken = chunk_event(completion, {"content": "?!"}).replace(b"?!", b" \xff")
    return stream_text(completion, answer(completion.request.user_text), [Send(broken)])


def split_utf8(completion: Completion) -> Iterator[Step]:
    """The story in Chinese; chunks split the first multi-byte character of each event."""
    for step in story_in_language(CHINESE_STORY, completion):
        if isinstance(step, Send):
            at = next((at for at, byte in enumerate(step.data) if byte >= 0xC0), None)
            if at is not None:
                yield Send(step.data[: at + 1])
                yield Send(step.data[at + 1 :])
                continue
        yield step


def split_crlf(completion: Completion) -> Iterator[Step]:
    """Lines end with CR LF (§9.2.5), and each CR LF is split over two chunks."""
    for step in story(completion):
        if isinstance(step, Send):
            line = step.data.removesuffix(b"\n\n")
            for piece in (line + b"\r", b"\n\r", b"\n"):
                yield Send(piece)
        else:
            yield step


def long_line(completion: Completion) -> Iterator[Step]:
    """One valid event whose line has exactly this many bytes, its line feed not counted."""
    around = chunk_event(completion, {"content": "*"})
    before, _, after = around.partition(b"*")
    letters = completion.count - len(around.removesuffix(b"\n\n")) + len(b"*")
    yield from start(completion)
    yield Send(before)
    for begin in range(0, letters, _LONG_LINE_PIECE_BYTES):
        yield Send(b"a" * min(_LONG_LINE_PIECE_BYTES, letters - begin))
    yield Send(after)
    yield from finish_with_done(completion, "stop", 1)


def flood(completion: Completion) -> Iterator[Step]:
    """This many events without pauses; without a parameter, endlessly."""
    one = chunk_event(completion, {"content": "flood "})
    total = completion.parameter
    number = 0
    yield from start(completion)
    while total is None or number < total:
        now = _FLOOD_EVENTS_PER_WRITE
        if total is not None:
            now = min(now, int(total) - number)
        number += now
        yield Send(one * now)
    yield from finish_with_done(completion, "stop", number)


def gzip(completion: Completion) -> Iterator[Step]:
    """The story, compressed and flushed after each event."""
    yield Head(headers=dict(SSE_HEADERS) | {"Content-Encoding": "gzip"})
    packer = zlib.compressobj(wbits=31)  # 16 + 15: with gzip's header
    for step in story(completion):
        if isinstance(step, Send):
            yield Send(packer.compress(step.data) + packer.flush(zlib.Z_SYNC_FLUSH))
        else:
            yield step
    yield Send(packer.flush())


def http_10(completion: Completion) -> Iterator[Step]:
    """The story over HTTP/1.0."""
    yield Head(version="HTTP/1.0")
    yield from story(completion)


def bad_chunk(completion: Completion) -> Iterator[Step]:
    """This many tokens, then a chunk without a size."""
    yield from first_tokens(completion, completion.count)
    yield Raw(b"this is no chunk size\r\n")
    yield Close()
