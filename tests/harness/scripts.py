"""Scripts for the test provider: pure functions, from bytes on the wire up to whole answers.

Three layers, each made of the one below: **wire** functions return the bytes of a head, an SSE
event or a chunk; **step** functions return one step; **script** functions return the list of steps
that answers one POST, or a part of it.

    provider.script("hello", [*opening(), *tokens(["a", "b"]), wait("go"), *ending()])
"""

from __future__ import annotations

import itertools
import json
import zlib
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal, TypeAlias

Step: TypeAlias = dict[str, Any]  # JSON; provider.py says which steps there are
Script: TypeAlias = list[Step]

USAGE = {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}

# Wire: bytes ------------------------------------------------------------------------------------


def head(status: int, headers: Mapping[str, str], http10: bool = False) -> bytes:
    """A status line and headers."""
    version = "HTTP/1.0" if http10 else "HTTP/1.1"
    lines = [f"{version} {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def sse_head(
    *,
    chunked: bool = True,
    gzip: bool = False,
    http10: bool = False,
    content_length: int | None = None,
    status: int = 200,
    content_type: str = "text/event-stream; charset=utf-8",
    extra: Mapping[str, str] | None = None,
) -> bytes:
    """The head of a streamed answer; HTTP/1.0 and a Content-Length each switch chunking off."""
    headers = {"Content-Type": content_type, "Cache-Control": "no-cache"}
    if gzip:
        headers["Content-Encoding"] = "gzip"
    if content_length is not None:
        headers["Content-Length"] = str(content_length)
    elif chunked and not http10:
        headers["Transfer-Encoding"] = "chunked"
    return head(status, headers | dict(extra or {}), http10)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; an empty one would end it, so it may not be empty."""
    assert data
    return b"%x\r\n%s\r\n" % (len(data), data)


def last_chunk() -> bytes:
    return b"0\r\n\r\n"


def event(value: object) -> bytes:
    """Any JSON value as one SSE event."""
    return b"data: %s\n\n" % json.dumps(value, ensure_ascii=False).encode()


def completion_chunk(choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
    """A ``chat.completion.chunk`` event."""
    return event(
        {
            "id": "chatcmpl-script",
            "object": "chat.completion.chunk",
            "created": 1740000000,
            "model": "script",
            "choices": choices,
            **more,
        }
    )


def delta_event(delta: Mapping[str, Any], finish_reason: str | None = None) -> bytes:
    """Any delta of choice 0: tool calls, reasoning, null content."""
    return completion_chunk([{"index": 0, "delta": delta, "finish_reason": finish_reason}])


def role_event() -> bytes:
    """The first delta as OpenAI sends it: the role and an empty content."""
    return delta_event({"role": "assistant", "content": ""})


def text_event(text: str) -> bytes:
    return delta_event({"content": text})


def call_event(*pieces: Mapping[str, Any]) -> bytes:
    """A delta with pieces of function calls."""
    return delta_event({"tool_calls": pieces})


def call_events(
    name: str,
    arguments: str,
    *,
    index: int | None = 0,
    call_id: str | None = "call_1",
    piece_chars: int = 8,
    later: Literal["absent", "empty", "null"] = "absent",
) -> list[bytes]:
    """One function call, piece by piece: first its name and id, then its arguments.

    Args:
        name: an empty one is sent as such.
        arguments: any text, JSON or not.
        index: None leaves it out.
        call_id: None leaves it out.
        piece_chars: length of a piece of the arguments.
        later: how the pieces after the first give the name and the id.
    """
    place = {} if index is None else {"index": index}
    first = place | ({} if call_id is None else {"id": call_id}) | {"type": "function"}
    events = [call_event(first | {"function": {"name": name, "arguments": ""}})]
    nothing = {"empty": "", "null": None}
    again = {} if later == "absent" else {"id": nothing[later]}
    name_again = {} if later == "absent" else {"name": nothing[later]}
    events += [
        call_event(place | again | {"function": name_again | {"arguments": piece}})
        for piece in _cut(arguments, piece_chars)
    ]
    return events


def legacy_call_events(name: str, arguments: str, piece_chars: int = 8) -> list[bytes]:
    """One function call in the older form `function_call`, which came before `tool_calls`."""
    first = {"role": "assistant", "content": None, "function_call": {"name": name, "arguments": ""}}
    pieces = _cut(arguments, piece_chars)
    return [
        delta_event(first),
        *(delta_event({"function_call": {"arguments": piece}}) for piece in pieces),
    ]


def interleaved(*calls: Sequence[bytes]) -> list[bytes]:
    """Events of calls that are streamed at the same time, one of each in turn."""
    rounds = itertools.zip_longest(*calls)
    return [event for one_of_each in rounds for event in one_of_each if event is not None]


def _cut(text: str, piece_chars: int) -> list[str]:
    return [text[start : start + piece_chars] for start in range(0, len(text), piece_chars)]


def finish_event(reason: str = "stop", usage: Mapping[str, Any] | None = None) -> bytes:
    """The end of choice 0; a usage follows in an event without choices, as OpenAI sends it."""
    finish = delta_event({}, reason)
    return finish if usage is None else finish + completion_chunk([], usage=usage)


def error_event(message: str) -> bytes:
    return event({"error": {"message": message, "type": "server_error", "code": None}})


def done() -> bytes:
    return b"data: [DONE]\n\n"


def gzip_pieces(pieces: Iterable[bytes]) -> list[bytes]:
    """One gzip stream, flushed after each piece, not ended."""
    gzip = zlib.compressobj(wbits=31)
    return [gzip.compress(piece) + gzip.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]


# Steps ------------------------------------------------------------------------------------------


def send(*pieces: bytes) -> Step:
    """All pieces in one write."""
    return {"send": b64encode(b"".join(pieces)).decode()}


def wait(key: str) -> Step:
    return {"wait": key}


def sleep(seconds: float) -> Step:
    return {"sleep": seconds}


def repeat(steps: Sequence[Step], times: int | None = None) -> Step:
    """None: until the client is gone."""
    return {"repeat": list(steps), "times": times}


def hang() -> Step:
    return {"hang": True}


def close() -> Step:
    return {"close": True}


def reset() -> Step:
    return {"reset": True}


def mark(label: str) -> Step:
    return {"mark": label}


# Parts of scripts -------------------------------------------------------------------------------


def opening() -> Script:
    """Head and role."""
    return [send(sse_head()), send(chunk(role_event()))]


def tokens(texts: Iterable[str], rate: float | None = None) -> Script:
    """One chunk per text, at ``rate`` texts per second (None: as fast as the client reads)."""
    sends = [send(chunk(text_event(text))) for text in texts]
    if rate is None:
        return sends
    return [step for one in sends for step in (sleep(1 / rate), one)]


def chunks(events: Iterable[bytes]) -> Script:
    """Each event one chunk and one write."""
    return [send(chunk(one)) for one in events]


def ending(reason: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> Script:
    """Finish, [DONE] and the last chunk: the connection can serve another request."""
    return [send(chunk(finish_event(reason, usage))), send(chunk(done())), send(last_chunk())]


# Whole scripts: good answers --------------------------------------------------------------------


def answer(texts: Iterable[str], rate: float | None = None) -> Script:
    """A complete answer, as OpenAI gives it."""
    return [*opening(), *tokens(texts, rate), *ending()]


def call_answer(
    events: Iterable[bytes], texts: Iterable[str] = (), reason: str = "tool_calls"
) -> Script:
    """A complete answer that ends with function calls: their events, after the texts."""
    return [*opening(), *tokens(texts), *chunks(events), *ending(reason)]


def finish_on_release(texts: Iterable[str], key: str) -> Script:
    """An answer whose end is held back until ``key`` is released."""
    return [*opening(), *tokens(texts), wait(key), *ending()]


def calls_before_release(events: Iterable[bytes], key: str, texts: Iterable[str] = ()) -> Script:
    """An answer with function calls whose [DONE] is held back until ``key`` is released."""
    finish, done_event, last = ending("tool_calls")
    return [*opening(), *tokens(texts), *chunks(events), finish, wait(key), done_event, last]


def plain_content_length(texts: Iterable[str]) -> Script:
    """A complete answer without chunking: Content-Length, event by event."""
    events = [role_event(), *map(text_event, texts), finish_event(usage=USAGE), done()]
    length = sum(map(len, events))
    return [send(sse_head(content_length=length)), *map(send, events)]


def done_but_open(texts: Iterable[str]) -> Script:
    """Up to [DONE], but never the last chunk, and the socket stays open."""
    return [*opening(), *tokens(texts), *ending()[:-1], hang()]


def raw(body_pieces: Iterable[bytes]) -> Script:
    """A chunked 200 with any body: each piece one chunk and one write; ends properly."""
    return [send(sse_head()), *(send(chunk(piece)) for piece in body_pieces), send(last_chunk())]


def default_story() -> Iterator[Step]:
    """ "tok0 tok1 ..." at 30 tokens a second, without end."""
    yield from opening()
    for number in itertools.count():
        yield from tokens([f"tok{number} "], rate=30)


# Whole scripts: silence and floods, until the client is gone ------------------------------------


def no_headers() -> Script:
    return [hang()]


def headers_only() -> Script:
    return [send(sse_head()), hang()]


def idle_mid_stream(texts: Iterable[str]) -> Script:
    return [*opening(), *tokens(texts), hang()]


def stalled_inside_chunk(texts: Iterable[str]) -> Script:
    """After the texts, half of a chunk."""
    whole = chunk(text_event("never arrives"))
    return [*opening(), *tokens(texts), send(whole[: len(whole) // 2]), hang()]


def gzip_idle(texts: Iterable[str]) -> Script:
    pieces = gzip_pieces([role_event(), *map(text_event, texts)])
    return [send(sse_head(gzip=True)), *(send(chunk(piece)) for piece in pieces), hang()]


def http10_idle(texts: Iterable[str]) -> Script:
    """HTTP/1.0: the body is neither chunked nor of a known length."""
    events = [role_event(), *map(text_event, texts)]
    return [send(sse_head(http10=True)), *map(send, events), hang()]


def flood(text: str = "flood ", events_per_write: int = 64) -> Script:
    """One chunk per event, as many as the client takes."""
    return [*opening(), repeat([send(chunk(text_event(text)) * events_per_write)])]


# Whole scripts: faults --------------------------------------------------------------------------


def http_error(
    status: int, body: Mapping[str, Any] | str, headers: Mapping[str, str] | None = None
) -> Script:
    """A proper answer with this status: JSON for a mapping, text for a string."""
    if isinstance(body, str):
        kind, data = "text/plain", body.encode()
    else:
        kind, data = "application/json", json.dumps(body).encode()
    own = {"Content-Type": kind, "Content-Length": str(len(data))}
    return [send(head(status, own | dict(headers or {})), data)]


def not_sse() -> Script:
    """A status 200 that is a web page."""
    page = b"<!doctype html><title>Sign in to the network</title>"
    return [send(sse_head(content_length=len(page), content_type="text/html"), page)]


def truncated(texts: Iterable[str]) -> Script:
    """An orderly close in the middle of the answer, without the last chunk."""
    return [*opening(), *tokens(texts), close()]


def cut_in_call(events: Sequence[bytes], texts: Iterable[str] = ()) -> Script:
    """An orderly close before the last of a call's events, without the last chunk."""
    return [*opening(), *tokens(texts), *chunks(events[:-1]), close()]


def reset_mid_stream(texts: Iterable[str]) -> Script:
    return [*opening(), *tokens(texts), reset()]


def error_in_stream(message: str, texts: Iterable[str] = ()) -> Script:
    """An error object in place of the rest of the answer; the body ends properly."""
    return [*opening(), *tokens(texts), send(chunk(error_event(message))), send(last_chunk())]


def one_long_line(n_bytes: int) -> Script:
    """A ``data:`` line of ``n_bytes`` (newline not counted), not JSON, then a proper ending."""
    pieces, rest = divmod(n_bytes - len(b"data: "), 65536)
    letters = [repeat([send(chunk(b"a" * 65536))], pieces)]
    letters += [send(chunk(b"a" * rest))] if rest else []
    return [*opening(), send(chunk(b"data: ")), *letters, send(chunk(b"\n\n")), *ending()]
