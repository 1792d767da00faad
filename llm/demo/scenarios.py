"""The table of everything that the demo provider can play; a model name selects a row.

A new scenario is one more generator (`story_scenarios.py`, `tool_scenarios.py` or
`fault_scenarios.py`), one more row here, and its row in `llm/README.md`.
"""

import difflib
import re
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus

from llm.demo import fault_scenarios as fault
from llm.demo import story_scenarios as story
from llm.demo import tool_scenarios as tool
from llm.demo.answers import TOKENS_BEFORE_FAULT
from llm.demo.steps import Close, Play, Reset
from llm.demo.stories import CHINESE_STORY, ENGLISH_STORY

DEFAULT = "story"


@dataclass(frozen=True, slots=True)
class Parameter:
    """The number that may follow a scenario's name after a colon."""

    name: str
    minimum: float
    maximum: float
    is_whole: bool = False

    def parse(self, text: str) -> float:
        """The number in `text`: decimal digits with at most one point.

        Raises:
            ValueError: it is not such a number, or out of bounds; the text says what is valid.
        """
        digits = r"[0-9]{1,15}" if self.is_whole else r"[0-9]{1,15}(\.[0-9]{1,15})?"
        if re.fullmatch(digits, text):
            value = float(text)
            if self.minimum <= value <= self.maximum:
                return value
        raise ValueError(f"{text!r} is not {self.bounds}")

    @property
    def bounds(self) -> str:
        """The valid values, in words."""
        kind = "a whole number" if self.is_whole else "a number"
        return f"{kind} from {self.minimum:,g} to {self.maximum:,.0f}"


PARAMETERS = (
    _RATE := Parameter("RATE", 0.01, 100_000),
    _SECONDS := Parameter("SECONDS", 0, 86_400),
    _TOKENS := Parameter("TOKENS", 0, 1_000_000, is_whole=True),
    _TIMES := Parameter("TIMES", 1, 1_000, is_whole=True),
    # Bounded, since the provider keeps a count for each number.
    _FAILURES := Parameter("FAILURES", 1, 100, is_whole=True),
    _CALLS := Parameter("CALLS", 1, 128, is_whole=True),
    _CHARS := Parameter("CHARS", 1, 1_000, is_whole=True),
    _EVENTS := Parameter("EVENTS", 1, 1_000_000_000, is_whole=True),
    # Below the minimum, the rest of the event would not fit into its line.
    _BYTES := Parameter("BYTES", 100_000, 1_000_000_000, is_whole=True),
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table."""

    name: str
    """The model name that selects it."""
    description: str
    """What it plays, in one line."""
    play: Play
    """The answer to `stream: true`."""
    whole: Play = story.whole_story
    """The answer to `stream: false`."""
    parameter: Parameter | None = None
    default: float | None = None
    """The parameter where none is given; None: `play` gets none."""
    default_text: str = field(default="", kw_only=True)
    """The default in words."""

    @property
    def syntax(self) -> str:
        """The model name with the parameter it may have: `name` or `name:PARAMETER`."""
        return f"{self.name}:{self.parameter.name}" if self.parameter else self.name

    @property
    def summary(self) -> str:
        """The description, and the default of its parameter."""
        if self.parameter is None:
            return self.description
        return f"{self.description} (default: {self.default_text})"

    @property
    def counts_attempts(self) -> bool:
        """Whether it plays something else after a number of POSTs."""
        return self.parameter is _FAILURES


def _paced(name: str, description: str, play: Play) -> Scenario:
    return Scenario(name, description, play, parameter=_RATE, default_text="the server's pace")


def _silent(name: str, description: str, play: Play, whole: Play = story.whole_story) -> Scenario:
    default_text = "until the client disconnects"
    return Scenario(name, description, play, whole, _SECONDS, default_text=default_text)


def _faulty(name: str, description: str, play: Play, whole: Play = story.whole_story) -> Scenario:
    default = TOKENS_BEFORE_FAULT
    return Scenario(name, description, play, whole, _TOKENS, default, default_text=f"{default}")


def _failing(name: str, description: str, play: Play) -> Scenario:
    return Scenario(name, description, play, play, _FAILURES, default_text="always")


def _refusing(status: int) -> Scenario:
    extra = f", Retry-After: {fault.RETRY_AFTER_SECONDS}" if status == 429 else ""
    description = f"this many POSTs get {HTTPStatus(status).phrase}{extra}"
    return _failing(f"http-{status}", description, partial(fault.refusal, status))


_ROWS = (
    _paced("story", "a story in the language of the last user message", story.story_at_pace),
    _paced("story-en", "the story in English", partial(story.story_in_language, ENGLISH_STORY)),
    _paced("story-zh", "the story in Chinese", partial(story.story_in_language, CHINESE_STORY)),
    Scenario(
        "long-story", "the story, repeated this many times", story.long_story,
        parameter=_TIMES, default=10, default_text="10",
    ),
    Scenario("echo", "the last user message", story.echo, story.whole_echo),
    Scenario("fast", "the story, as fast as the client reads", story.fast),
    Scenario(
        "slow", "the story with a pause of this length before each token", story.slow,
        parameter=_SECONDS, default=1, default_text="1",
    ),
    Scenario("empty", "an answer without text", story.empty, story.whole_empty),
    _faulty(
        "content-filter", "this many tokens, then finish_reason content_filter",
        story.content_filter,
    ),
    Scenario(
        "reasoning", "reasoning_content, then the story", story.reasoning, story.whole_reasoning
    ),
    Scenario(
        "tool-call", "a call of the request's first tool; a text once its result is sent",
        partial(tool.calling, tool.plain_call), tool.whole_calls,
    ),
    Scenario(
        "tool-call-legacy", "the same as a legacy function_call",
        partial(tool.calling, tool.legacy_call, finish_reason="function_call"),
        tool.whole_legacy_call,
    ),
    Scenario(
        "tool-call-parallel", "this many calls at once, their pieces interleaved",
        partial(tool.calling, tool.parallel_calls), tool.whole_parallel_calls, _CALLS, 2,
        default_text="2",
    ),
    Scenario(
        "tool-call-empty-names", "a call whose later pieces have an empty id and an empty name",
        partial(tool.calling, tool.call_with_empty_names), tool.whole_calls,
    ),
    Scenario(
        "tool-call-pieces", "a call with its arguments in pieces of this many characters",
        partial(tool.calling, tool.call_in_pieces), tool.whole_calls, _CHARS, 1,
        default_text="1",
    ),
    Scenario(
        "tool-call-text", "a sentence, then a call",
        partial(tool.calling, tool.text_and_call), tool.whole_calls,
    ),
    Scenario(
        "tool-call-bad-json", "a call whose arguments are not valid JSON",
        partial(tool.calling, tool.bad_call), tool.whole_calls,
    ),
    _silent(
        "stall-headers", "silence before the headers, then the story",
        fault.stall_headers, fault.stall_headers,
    ),
    _silent(
        "stall-first-event", "headers, silence, then the story", fault.stall_first_event
    ),
    _silent(
        "stall-mid-stream", "silence in the middle of the story",
        fault.stall_mid_stream, partial(fault.whole_halved, None),
    ),
    _silent(
        "stall-in-chunk", "silence in the middle of an HTTP chunk of the story",
        fault.stall_in_chunk,
    ),
    _silent("comments", "only comments, two per second, then the story", fault.comments),
    _silent(
        "done-but-open", "a short answer and [DONE]; the body stays open", fault.done_but_open
    ),
    Scenario("no-done", "a short answer without [DONE]", fault.no_done),
    _faulty(
        "no-finish", "this many tokens, then the end of the body",
        partial(fault.broken_off, None),
    ),
    _faulty(
        "cut", "this many tokens, then the connection closes",
        partial(fault.broken_off, Close()), partial(fault.whole_halved, Close()),
    ),
    _faulty(
        "reset", "this many tokens, then the connection is reset",
        partial(fault.broken_off, Reset()), partial(fault.whole_halved, Reset()),
    ),
    _faulty("error-in-stream", "this many tokens, then an error object", fault.error_in_stream),
    _failing(
        "no-answer", "this many POSTs get no byte, only a closed connection", fault.no_answer
    ),
    *(_refusing(status) for status in (400, 401, 403, 404, 422, 429, 500)),
    _failing("http-502", "this many POSTs get Bad Gateway, as a web page", fault.bad_gateway),
    _refusing(503),
    Scenario(
        "usage-refused", "Bad Request if the request has stream_options, else the story",
        fault.usage_refused, fault.usage_refused,
    ),
    Scenario("no-usage", "the story without usage, even if it was asked for", story.no_usage),
    Scenario("not-sse", "a web page with status 200", fault.not_sse, fault.not_sse),
    Scenario("malformed-json", "the story; one event is not valid JSON", fault.malformed_json),
    Scenario("bad-utf8", "the story; one event is not valid UTF-8", fault.bad_utf8),
    Scenario(
        "split-utf8", "the story in Chinese; chunks end in the middle of a character",
        fault.split_utf8,
    ),
    Scenario(
        "split-crlf", "the story with CR LF line ends; chunks end between CR and LF",
        fault.split_crlf,
    ),
    Scenario(
        "long-line", "one event in a line of this many bytes", fault.long_line,
        parameter=_BYTES, default=8 * 1024 * 1024, default_text="8 MiB",
    ),
    Scenario(
        "flood", "this many events, as fast as the client reads", fault.flood,
        parameter=_EVENTS, default_text="until the client disconnects",
    ),
    Scenario("gzip", "the story, compressed even if that was not asked for", fault.gzip),
    Scenario(
        "http-1.0", "the story over HTTP/1.0; closing the connection ends it", fault.http_10
    ),
    _faulty("bad-chunk", "this many tokens, then a chunk without a size", fault.bad_chunk),
)  # fmt: skip

SCENARIOS: dict[str, Scenario] = {row.name: row for row in _ROWS}
"""The scenarios by name. `choose` finds the one for a model name."""

ALIASES = {"demo": DEFAULT, "demo-story": DEFAULT}
"""Older names of scenarios, kept since they are in users' configurations."""


class NoScenarioError(ValueError):
    """A model name asks for an unknown scenario, or its parameter is invalid.

    `is_unknown` is True for the former, False for the latter.
    """

    def __init__(self, message: str, *, is_unknown: bool) -> None:
        super().__init__(message)
        self.is_unknown = is_unknown


def choose(model: str) -> tuple[Scenario, float | None]:
    """The scenario for a model name, and its parameter or the default of that.

    An unknown name gets the story, so that a model that is already configured need not change. The
    exception is a name that looks like a scenario with a parameter (`stall-header:8`): close to an
    existing name, or with only a number after the colon. That is most likely a mistake, and its
    author would wait in vain for the fault.

    Raises:
        NoScenarioError: in that case, and where the parameter is invalid; the text says why.
    """
    name, colon, text = model.partition(":")
    scenario = SCENARIOS.get(ALIASES.get(name, name))
    if scenario is None:
        near = difflib.get_close_matches(name, SCENARIOS, n=1, cutoff=0.85)
        if colon and (near or re.fullmatch(r"[0-9.]+", text)):
            hint = f" Did you mean '{SCENARIOS[near[0]].syntax}'?" if near else ""
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
            message = f"Invalid parameter of the scenario '{scenario.syntax}': {error}."
            raise NoScenarioError(message, is_unknown=False) from None
    return scenario, scenario.default


def describe_scenarios() -> str:
    """All scenarios and parameters, one per line, for people (`demo-llm --help`)."""
    width = max(len(row.syntax) for row in SCENARIOS.values())
    rows = (f"  {row.syntax:{width}}  {row.summary}" for row in SCENARIOS.values())
    bounds = (f"  {one.name:{width}}  {one.bounds}" for one in PARAMETERS)
    return "\n".join(
        [
            "The model name of the request selects the scenario; any other name gets the story:",
            *rows,
            "",
            "A parameter is optional and part of the name, such as stall-headers:8 or http-429:2:",
            *bounds,
            "RATE is in tokens per second. After this many FAILURES for one model name, the story",
            "follows; DELETE /v1/demo/requests resets the counts.",
        ]
    )
