"""What a scenario is given, and what it is made of.

A scenario is a generator. It gets a `Completion` (the request, and the parameters of the answer)
and yields `Step`s, which `llm/demo/player.py` acts out on the client's socket. No I/O and no clock
here. What no step can express needs one more kind of `Step`.

Source: WHATWG HTML §9.2 "Server-sent events"
(https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

SSE_HEADERS: Mapping[str, str] = MappingProxyType(
    # Without a charset, which has no effect: "event streams are always UTF-8" (§9.2.5).
    {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
)


# --------------------------------------------------------------------------------------- the steps


@dataclass(frozen=True, slots=True)
class Head:
    """Write the status line and headers now. Without this step, the first `Send` writes a default.

    With a `Content-Length`, the body has that length. Without, it is chunked; if one side speaks
    HTTP/1.0, the end of the connection ends it.
    """

    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=lambda: SSE_HEADERS)
    version: str = "HTTP/1.1"


@dataclass(frozen=True, slots=True)
class Send:
    """Write `data` as a part of the body; in a chunked body, as one chunk. b"" writes nothing.

    Between two of them, the event loop runs once: no scenario can starve the process.
    """

    data: bytes
    stall: "Stall | None" = None
    """Silence in the middle of the write, after half of its bytes (chunk framing included)."""


@dataclass(frozen=True, slots=True)
class Raw:
    """Write `data` unframed, even where that breaks HTTP."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait until `seconds` after the end of the previous pause: gives an even pace."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Do nothing for `seconds`, from now; None: until the client disconnects."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection now, in order (FIN), without ending the body."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset the connection now (RST)."""


Step = Head | Send | Raw | Pause | Stall | Close | Reset
"""A client that disconnects ends any of them at once. After the last step, the body is ended."""


# --------------------------------------------------------------------------------------- the input


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any]
    """JSON Schema of type object."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """The parts of a request body that scenarios use."""

    model: str
    user_text: str
    """Text of the last message of role `user`, "" where there is none."""
    prompt_tokens: int
    stream: bool = True
    include_usage: bool = False
    max_tokens: int | None = None
    """The most tokens of the answer, at least 1; None: no limit."""
    has_stream_options: bool = False
    tools: Sequence[Tool] = ()
    """The functions of `tools`, then those of the legacy `functions`."""
    tool_result: str | None = None
    """Text of the last message, where it is the result of a call."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: the input of a scenario."""

    request: ChatRequest
    completion_id: str
    created: int
    """Seconds since the epoch, the same on every chunk."""
    seconds_per_token: float
    parameter: float | None = None
    """The parameter in the model name, or the scenario's default; None where there is neither."""
    attempt: int = 1
    """The number of this POST for this model name, from 1, where the scenario counts them."""

    @property
    def count(self) -> int:
        """The parameter as a whole number, for a scenario that always has one."""
        assert self.parameter is not None
        return int(self.parameter)


Play = Callable[[Completion], Iterator[Step]]
"""A scenario."""
