"""What the demo provider can play: pure generators, from one request to the steps that answer it.

No I/O and no clock. In the order in which one is made of the other:

    llm/demo/steps.py           what they are made of: steps, the request, the parts of an answer
    play                   one generator per scenario: the steps of its answer
    llm/demo/tool_scenarios.py  those that call functions
    SCENARIOS              the one table; a scenario is chosen by model name, `NAME` or
                           `NAME:PARAMETER`

A further scenario is one more generator, one more row in the table, and its row in `README.md`.

Sources: WHATWG HTML §9.2 "Server-sent events"
(https://html.spec.whatwg.org/multipage/server-sent-events.html); RFC 9112 for what is done to HTTP;
and those of `llm/demo/steps.py`.
"""

import difflib
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus

from llm.demo.steps import (
    SSE_HEADERS,
    TOKENS_BEFORE_FAULT,
    Close,
    Completion,
    Head,
    Pause,
    Play,
    Raw,
    Reset,
    Send,
    Stall,
    Step,
    chunk_event,
    encode,
    ending,
    error_object,
    event,
    finish,
    json_answer,
    opening,
    plain_answer,
    stream_text,
    telling,
    whole_completion,
    whole_text,
    within,
)
from llm.demo.stories import (
    CHINESE_STORY,
    ENGLISH_STORY,
    answer,
    short_answer,
    stop_answer,
    story_for,
    tokens,
)
from llm.demo.tool_scenarios import (
    bad_call,
    call_in_pieces,
    call_with_empty_names,
    calling,
    legacy_call,
    parallel_calls,
    plain_call,
    text_and_call,
    whole_calls,
    whole_legacy_call,
    whole_parallel_calls,
)

DEFAULT = "story"

_COMMENT_SECONDS = 0.5  # between two comments: under any idle limit, which is what they are to test
_RETRY_AFTER_SECONDS = 1
_FLOOD_EVENTS_PER_WRITE = 64  # some 16 KiB: a flood, and yet nobody waits long for their turn
_LONG_LINE_PIECE_BYTES = 64 * 1024


# ------------------------------------------------------------------------------------ good answers


def story(completion: Completion) -> Iterator[Step]:
    """The well-behaved provider: role, one event per token, finish reason, usage, `[DONE]`."""
    return stream_text(completion, answer(completion.request.user_text))


def whole_story(completion: Completion) -> Iterator[Step]:
    """For `stream: false`: a short text, since it comes at once."""
    return whole_text(completion, short_answer(completion.request.user_text))


def _any_story(completion: Completion) -> Iterator[Step]:
    return (story if completion.request.stream else whole_story)(completion)


def _first_tokens(completion: Completion, number: int) -> Iterator[Step]:
    """A story up to where something is going to happen to it."""
    said, _ = within(completion.request, tokens(answer(completion.request.user_text)))
    yield from opening(completion)
    yield from telling(completion, said[:number])


def _at_pace(completion: Completion) -> Iterator[Step]:
    if completion.parameter is not None:
        completion = replace(completion, seconds_per_token=1 / completion.parameter)
    return story(completion)


def _in_language(text: str, completion: Completion) -> Iterator[Step]:
    said = stop_answer(completion.request.user_text) or text
    if completion.parameter is not None:
        completion = replace(completion, seconds_per_token=1 / completion.parameter)
    return stream_text(completion, said)


def _long_story(completion: Completion) -> Iterator[Step]:
    user_text = completion.request.user_text
    again = tokens(f"\n\n{story_for(user_text)}") * (completion.count - 1)
    if stop_answer(user_text):
        again = []
    said, finish_reason = within(completion.request, tokens(answer(user_text)) + again)
    yield from opening(completion)
    yield from telling(completion, said)
    yield from ending(completion, finish_reason, len(said))


def _echo(completion: Completion) -> Iterator[Step]:
    return stream_text(completion, completion.request.user_text)


def _whole_echo(completion: Completion) -> Iterator[Step]:
    return whole_text(completion, completion.request.user_text)


def _fast(completion: Completion) -> Iterator[Step]:
    return story(replace(completion, seconds_per_token=0))


def _slow(completion: Completion) -> Iterator[Step]:
    return story(replace(completion, seconds_per_token=completion.parameter or 0))


_THOUGHTS = tokens(
    "The user would like a story. I know two, one for each language that I speak. Which language is"
    " it? I have to look at the last message. Good, now I know. Not too long an opening, then."
)


def _reasoning(completion: Completion) -> Iterator[Step]:
    """Reasoning as DeepSeek and vLLM stream it: deltas of `reasoning_content`, then the text."""
    text = answer(completion.request.user_text)
    said, finish_reason = within(completion.request, tokens(text))
    yield from opening(completion)
    yield from telling(completion, _THOUGHTS, "reasoning_content")
    yield from telling(completion, said)
    yield from ending(completion, finish_reason, len(_THOUGHTS) + len(said))


def _whole_reasoning(completion: Completion) -> Iterator[Step]:
    text = short_answer(completion.request.user_text)
    said, finish_reason = within(completion.request, tokens(text))
    message = {"content": "".join(said), "reasoning_content": "".join(_THOUGHTS)}
    return whole_completion(completion, message, finish_reason, len(_THOUGHTS) + len(said))


def _no_usage(completion: Completion) -> Iterator[Step]:
    request = replace(completion.request, include_usage=False)
    return story(replace(completion, request=request))


def _usage_refused(completion: Completion) -> Iterator[Step]:
    if not completion.request.has_stream_options:
        return _any_story(completion)
    body = error_object(
        "Unrecognized request argument supplied: stream_options",
        "invalid_request_error",
        param="stream_options",
        code="unknown_parameter",
    )
    return json_answer(HTTPStatus.BAD_REQUEST, body)


def _empty(completion: Completion) -> Iterator[Step]:
    return stream_text(completion, "")


def _whole_empty(completion: Completion) -> Iterator[Step]:
    return whole_text(completion, "")


def _content_filter(completion: Completion) -> Iterator[Step]:
    yield from _first_tokens(completion, completion.count)
    yield from ending(completion, "content_filter", completion.count)


# ----------------------------------------------------------------------------------------- silence


def _stall_headers(completion: Completion) -> Iterator[Step]:
    yield Stall(completion.parameter)
    yield from _any_story(completion)


def _stall_first_event(completion: Completion) -> Iterator[Step]:
    yield Head()
    yield Stall(completion.parameter)
    yield from story(completion)


def _stall_mid_stream(completion: Completion) -> Iterator[Step]:
    text = answer(completion.request.user_text)
    return stream_text(completion, text, [Stall(completion.parameter)])


def _stall_in_chunk(completion: Completion) -> Iterator[Step]:
    said, _ = within(completion.request, tokens(answer(completion.request.user_text)))
    sends_before = min(TOKENS_BEFORE_FAULT, len(said)) + 1  # the role comes first
    for step in story(completion):
        if isinstance(step, Send):
            if sends_before == 0:
                step = replace(step, halt=Stall(completion.parameter))
            sends_before -= 1
        yield step


def _comments(completion: Completion) -> Iterator[Step]:
    """A colon begins a comment, which keeps connections alive and is no event (§9.2.6)."""
    left = math.inf if completion.parameter is None else completion.parameter
    while left > 0:
        yield Send(b": still waiting\n\n")
        yield Pause(min(left, _COMMENT_SECONDS))
        left -= _COMMENT_SECONDS
    yield from story(completion)


def _done_but_open(completion: Completion) -> Iterator[Step]:
    yield from stream_text(completion, short_answer(completion.request.user_text))
    yield Stall(completion.parameter)


def _whole_halved(fault: Step | None, completion: Completion) -> Iterator[Step]:
    """For `stream: false`: half of the body, then the fault, or silence where that is None."""
    for step in whole_story(completion):
        if isinstance(step, Send):
            half = len(step.data) // 2
            yield Send(step.data[:half])
            yield fault or Stall(completion.parameter)
            yield Send(step.data[half:])
        else:
            yield step


# ----------------------------------------------------------------------------------------- endings


def _no_done(completion: Completion) -> Iterator[Step]:
    text = short_answer(completion.request.user_text)
    said, finish_reason = within(completion.request, tokens(text))
    yield from opening(completion)
    yield from telling(completion, said)
    yield from finish(completion, finish_reason, len(said))


def _broken_off(step: Step | None, completion: Completion) -> Iterator[Step]:
    yield from _first_tokens(completion, completion.count)
    if step is not None:
        yield step


def _error_in_stream(completion: Completion) -> Iterator[Step]:
    yield from _first_tokens(completion, completion.count)
    message = "The server had an error while processing your request. Sorry about that!"
    yield Send(event(encode(error_object(message, "server_error"))))


def _no_answer(completion: Completion) -> Iterator[Step]:
    return iter([Close()]) if _still_fails(completion) else _any_story(completion)


# --------------------------------------------------------------------------------- errors of HTTP


def _still_fails(completion: Completion) -> bool:
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


def _refusal(code: int, completion: Completion) -> Iterator[Step]:
    if not _still_fails(completion):
        return _any_story(completion)
    message, kind, error_code = _REFUSALS[code]
    headers = {"Retry-After": str(_RETRY_AFTER_SECONDS)} if code == 429 else {}
    body = error_object(message, kind, code=error_code)
    return json_answer(HTTPStatus(code), body, headers)


def _bad_gateway(completion: Completion) -> Iterator[Step]:
    """What a proxy says when it is the one who answers: no JSON."""
    if not _still_fails(completion):
        return _any_story(completion)
    page = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n"
    return plain_answer(HTTPStatus.BAD_GATEWAY, page, "text/html")


def _not_sse(_completion: Completion) -> Iterator[Step]:
    page = b"<!doctype html><title>Sign in to the network</title>"
    return plain_answer(HTTPStatus.OK, page, "text/html; charset=utf-8")


# --------------------------------------------------------------------------------- odds of the wire


def _malformed_json(completion: Completion) -> Iterator[Step]:
    text = answer(completion.request.user_text)
    return stream_text(completion, text, [Send(event(b'{"choices":[{"index":0,"delta":{"conte'))])


def _bad_utf8(completion: Completion) -> Iterator[Step]:
    """0xFF is in no UTF-8 text."""
    broken = chunk_event(completion, {"content": "?!"}).replace(b"?!", b" \xff")
    return stream_text(completion, answer(completion.request.user_text), [Send(broken)])


def _split_utf8(completion: Completion) -> Iterator[Step]:
    """Chinese, and each event's first character of several bytes has a cut in it."""
    for step in _in_language(CHINESE_STORY, completion):
        if isinstance(step, Send):
            start = next((at for at, byte in enumerate(step.data) if byte >= 0xC0), None)
            if start is not None:
                yield Send(step.data[: start + 1])
                yield Send(step.data[start + 1 :])
                continue
        yield step


def _split_crlf(completion: Completion) -> Iterator[Step]:
    """A line may end with CR LF (§9.2.5), and here each LF comes apart from its CR."""
    for step in story(completion):
        if isinstance(step, Send):
            line = step.data.removesuffix(b"\n\n")
            for piece in (line + b"\r", b"\n\r", b"\n"):
                yield Send(piece)
        else:
            yield step


def _long_line(completion: Completion) -> Iterator[Step]:
    """An event that is valid, and one line of exactly so many bytes (its line feed not counted)."""
    around = chunk_event(completion, {"content": "*"})
    before, _, after = around.partition(b"*")
    letters = completion.count - len(around.removesuffix(b"\n\n")) + len(b"*")
    yield from opening(completion)
    yield Send(before)
    for start in range(0, letters, _LONG_LINE_PIECE_BYTES):
        yield Send(b"a" * min(_LONG_LINE_PIECE_BYTES, letters - start))
    yield Send(after)
    yield from ending(completion, "stop", 1)


def _flood(completion: Completion) -> Iterator[Step]:
    one = chunk_event(completion, {"content": "flood "})
    left = completion.parameter
    number = 0
    yield from opening(completion)
    while left is None or number < left:
        now = _FLOOD_EVENTS_PER_WRITE
        if left is not None:
            now = min(now, int(left) - number)
        number += now
        yield Send(one * now)
    yield from ending(completion, "stop", number)


def _gzip(completion: Completion) -> Iterator[Step]:
    """Flushed after each event, so that none is held back."""
    yield Head(headers=dict(SSE_HEADERS) | {"Content-Encoding": "gzip"})
    packer = zlib.compressobj(wbits=31)  # 16 + 15: with the header of gzip
    for step in story(completion):
        if isinstance(step, Send):
            yield Send(packer.compress(step.data) + packer.flush(zlib.Z_SYNC_FLUSH))
        else:
            yield step
    yield Send(packer.flush())


def _http_10(completion: Completion) -> Iterator[Step]:
    yield Head(version="HTTP/1.0")
    yield from story(completion)


def _bad_chunk(completion: Completion) -> Iterator[Step]:
    yield from _first_tokens(completion, completion.count)
    yield Raw(b"this is no chunk size\r\n")
    yield Close()


# --------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Parameter:
    """What may follow a scenario's name, after a colon: a number."""

    name: str
    minimum: float
    maximum: float
    is_whole: bool = False

    def parse(self, text: str) -> float:
        """The number in `text`, decimal digits with at most one point.

        Raises:
            ValueError: it is none, or out of bounds; says what it should be.
        """
        digits = r"[0-9]{1,15}" if self.is_whole else r"[0-9]{1,15}(\.[0-9]{1,15})?"
        if re.fullmatch(digits, text):
            value = float(text)
            if self.minimum <= value <= self.maximum:
                return value
        raise ValueError(f"{text!r} is not {self.bounds}")

    @property
    def bounds(self) -> str:
        """What it has to be, in words."""
        kind = "a whole number" if self.is_whole else "a number"
        return f"{kind} from {self.minimum:,g} to {self.maximum:,.0f}"


PARAMETERS = (
    _RATE := Parameter("RATE", 0.01, 100_000),
    _SECONDS := Parameter("SECONDS", 0, 86_400),
    _TOKENS := Parameter("TOKENS", 0, 1_000_000, is_whole=True),
    _TIMES := Parameter("TIMES", 1, 1_000, is_whole=True),
    # The provider remembers how often it failed for each number.
    _FAILURES := Parameter("FAILURES", 1, 100, is_whole=True),
    _CALLS := Parameter("CALLS", 1, 128, is_whole=True),
    _CHARS := Parameter("CHARS", 1, 1_000, is_whole=True),
    _EVENTS := Parameter("EVENTS", 1, 1_000_000_000, is_whole=True),
    # Below, the rest of the event would not find room in its line.
    _BYTES := Parameter("BYTES", 100_000, 1_000_000_000, is_whole=True),
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table."""

    name: str
    """The model name that asks for it."""
    plays: str
    """What it plays, in one line."""
    play: Play
    """The answer to `stream: true`."""
    whole: Play = whole_story
    """The answer to `stream: false`."""
    parameter: Parameter | None = None
    default: float | None = None
    """Where no parameter is given; None says nothing to `play`."""
    without: str = field(default="", kw_only=True)
    """What happens without a parameter, in words."""

    @property
    def usage(self) -> str:
        """How it is asked for: `name`, or `name:PARAMETER`."""
        return f"{self.name}:{self.parameter.name}" if self.parameter else self.name

    @property
    def line(self) -> str:
        """What it plays, and what without a parameter."""
        if self.parameter is None:
            return self.plays
        return f"{self.plays} (default: {self.without})"

    @property
    def counts_attempts(self) -> bool:
        """True when it plays something else after so many POSTs."""
        return self.parameter is _FAILURES


def _paced(name: str, plays: str, play: Play) -> Scenario:
    return Scenario(name, plays, play, parameter=_RATE, without="the server's own pace")


def _silent(name: str, plays: str, play: Play, whole: Play = whole_story) -> Scenario:
    return Scenario(name, plays, play, whole, _SECONDS, without="until the client goes")


def _faulty(name: str, plays: str, play: Play, whole: Play = whole_story) -> Scenario:
    default = TOKENS_BEFORE_FAULT
    return Scenario(name, plays, play, whole, _TOKENS, default, without=f"{default}")


def _failing(name: str, plays: str, play: Play) -> Scenario:
    return Scenario(name, plays, play, play, _FAILURES, without="always")


def _refusing(code: int) -> Scenario:
    extra = f", Retry-After: {_RETRY_AFTER_SECONDS}" if code == 429 else ""
    phrase = HTTPStatus(code).phrase
    return _failing(f"http-{code}", f"so many POSTs get {phrase}{extra}", partial(_refusal, code))


_ROWS = (
    _paced("story", "a story, in the language of the last user message", _at_pace),
    _paced("story-en", "the story in English", partial(_in_language, ENGLISH_STORY)),
    _paced("story-zh", "the story in Chinese", partial(_in_language, CHINESE_STORY)),
    Scenario(
        "long-story", "the story, so many times over", _long_story,
        parameter=_TIMES, default=10, without="10",
    ),
    Scenario("echo", "the last user message, said back", _echo, _whole_echo),
    Scenario("fast", "the story as fast as the client reads", _fast),
    Scenario(
        "slow", "the story with so much time before each token", _slow,
        parameter=_SECONDS, default=1, without="1",
    ),
    Scenario("empty", "an answer without any text", _empty, _whole_empty),
    _faulty(
        "content-filter", "so many tokens, then finish_reason content_filter", _content_filter
    ),
    Scenario("reasoning", "reasoning_content, then the story", _reasoning, _whole_reasoning),
    Scenario(
        "tool-call", "a call of the first of your tools; a text, once its result is there",
        partial(calling, plain_call), whole_calls,
    ),
    Scenario(
        "tool-call-legacy", "the same as function_call, as before there were tools",
        partial(calling, legacy_call, reason="function_call"), whole_legacy_call,
    ),
    Scenario(
        "tool-call-parallel", "so many calls at once, their pieces by turns",
        partial(calling, parallel_calls), whole_parallel_calls, _CALLS, 2, without="2",
    ),
    Scenario(
        "tool-call-empty-names", "later pieces repeat id and name, both empty",
        partial(calling, call_with_empty_names), whole_calls,
    ),
    Scenario(
        "tool-call-pieces", "arguments in pieces of so many characters",
        partial(calling, call_in_pieces), whole_calls, _CHARS, 1, without="1",
    ),
    Scenario(
        "tool-call-text", "a sentence, then the call",
        partial(calling, text_and_call), whole_calls,
    ),
    Scenario(
        "tool-call-bad-json", "a call whose arguments are no JSON",
        partial(calling, bad_call), whole_calls,
    ),
    _silent(
        "stall-headers", "silence before the headers, then the story",
        _stall_headers, _stall_headers,
    ),
    _silent("stall-first-event", "headers, silence, then the story", _stall_first_event),
    _silent(
        "stall-mid-stream", "silence within the story",
        _stall_mid_stream, partial(_whole_halved, None),
    ),
    _silent("stall-in-chunk", "silence within a chunk of the story", _stall_in_chunk),
    _silent("comments", "comments only, two a second, then the story", _comments),
    _silent("done-but-open", "a short answer, [DONE], and the body stays open", _done_but_open),
    Scenario("no-done", "a short answer, ended without [DONE]", _no_done),
    _faulty("no-finish", "so many tokens, then the end of the body", partial(_broken_off, None)),
    _faulty(
        "cut", "so many tokens, then the connection closes",
        partial(_broken_off, Close()), partial(_whole_halved, Close()),
    ),
    _faulty(
        "reset", "so many tokens, then the connection is reset",
        partial(_broken_off, Reset()), partial(_whole_halved, Reset()),
    ),
    _faulty("error-in-stream", "so many tokens, then an error object", _error_in_stream),
    _failing("no-answer", "so many POSTs get no byte, only a closed connection", _no_answer),
    *(_refusing(code) for code in (400, 401, 403, 404, 422, 429, 500)),
    _failing("http-502", "so many POSTs get Bad Gateway, as a web page", _bad_gateway),
    _refusing(503),
    Scenario(
        "usage-refused", "Bad Request where there are stream_options",
        _usage_refused, _usage_refused,
    ),
    Scenario("no-usage", "the story, no usage though it was asked for", _no_usage),
    Scenario("not-sse", "status 200 and a web page", _not_sse, _not_sse),
    Scenario("malformed-json", "one event of the story is not JSON", _malformed_json),
    Scenario("bad-utf8", "one event of the story is not UTF-8", _bad_utf8),
    Scenario("split-utf8", "the story in Chinese, chunks end within a character", _split_utf8),
    Scenario("split-crlf", "the story with CR LF, chunks end between the two", _split_crlf),
    Scenario(
        "long-line", "an event in one line of so many bytes", _long_line,
        parameter=_BYTES, default=8 * 1024 * 1024, without="8 MiB",
    ),
    Scenario(
        "flood", "so many events as fast as the client reads", _flood,
        parameter=_EVENTS, without="until the client goes",
    ),
    Scenario("gzip", "the story compressed, asked for or not", _gzip),
    Scenario("http-1.0", "the story in HTTP/1.0, which ends by closing", _http_10),
    _faulty("bad-chunk", "so many tokens, then a chunk without a size", _bad_chunk),
)  # fmt: skip

SCENARIOS: dict[str, Scenario] = {row.name: row for row in _ROWS}
"""By name. `choose` finds one by what a request calls its model."""

ALIASES = {"demo": DEFAULT, "demo-story": DEFAULT}
"""Further names, which people have in their configurations."""


class NoScenarioError(ValueError):
    """A model name asks for a scenario that there is not, or with a parameter that cannot be.

    `is_unknown` is True where the name is at fault, False where the parameter is.
    """

    def __init__(self, message: str, *, is_unknown: bool) -> None:
        super().__init__(message)
        self.is_unknown = is_unknown


def choose(model: str) -> tuple[Scenario, float | None]:
    """The scenario that a model name asks for, and its parameter (or the default of that).

    A name that nobody has heard of gets the story, so that a configured model need not change. Not
    so when it looks like one of ours with a parameter (`stall-header:8`): close to a name that is
    there, or with nothing but a number after the colon. Then somebody waits for what never comes.

    Raises:
        NoScenarioError: in that case, or when the parameter cannot be; says why.
    """
    name, colon, text = model.partition(":")
    scenario = SCENARIOS.get(ALIASES.get(name, name))
    if scenario is None:
        near = difflib.get_close_matches(name, SCENARIOS, n=1, cutoff=0.85)
        if colon and (near or re.fullmatch(r"[0-9.]+", text)):
            hint = f" Did you mean '{SCENARIOS[near[0]].usage}'?" if near else ""
            raise NoScenarioError(
                f"There is no scenario '{name}'.{hint} GET /v1/models lists them.", is_unknown=True
            )
        scenario = SCENARIOS[DEFAULT]
    elif colon:
        if scenario.parameter is None:
            raise NoScenarioError(f"The scenario '{name}' takes no parameter.", is_unknown=False)
        try:
            return scenario, scenario.parameter.parse(text)
        except ValueError as error:
            message = f"Invalid parameter of the scenario '{scenario.usage}': {error}."
            raise NoScenarioError(message, is_unknown=False) from None
    return scenario, scenario.default


def describe() -> str:
    """All scenarios and parameters as a text for people, a line each."""
    width = max(len(row.usage) for row in SCENARIOS.values())
    rows = (f"  {row.usage:{width}}  {row.line}" for row in SCENARIOS.values())
    bounds = (f"  {one.name:{width}}  {one.bounds}" for one in PARAMETERS)
    return "\n".join(
        [
            "What is played goes by the model name of the request; any other name gets the story:",
            *rows,
            "",
            "A parameter is optional and part of the name, as in stall-headers:8 or http-429:2:",
            *bounds,
            "RATE is in tokens per second. After so many FAILURES of one model name there is a",
            "story; DELETE /v1/demo/requests begins the count again.",
        ]
    )
