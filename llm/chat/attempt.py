"""One POST to one provider, and the stream that answers it.

An attempt runs in its generation's reader greenlet. It writes what arrives to the sink, and raises
one of `llm/errors.py` when something fails: here the exceptions of the libraries below are mapped,
and none of them leaves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Protocol, TypeVar

import gevent
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProtocolError

from llm.chat.calls import CallAssembler
from llm.chat.client import ProviderClient
from llm.chat.completions import (
    DONE,
    Delta,
    ErrorChunkError,
    MalformedChunkError,
    Prompt,
    ToolCall,
    Usage,
    UsageEstimate,
    error_message,
    parse_chunk,
)
from llm.chat.retries import parse_retry_after
from llm.errors import (
    BadStatusError,
    ConnectFailedError,
    IncompleteAnswerError,
    KeptConnectionEndedError,
    LimitPassedError,
    MalformedCallError,
    MalformedStreamError,
    NotAStreamError,
    ProviderReportedError,
    StreamError,
)
from llm.http.answer import Answer
from llm.http.connections import KeptConnectionEnded
from llm.http.events import Events, NotEventsError
from llm.http.lines import BodyEnded, Lines
from llm.limits import at_most
from llm.loop import Limit, Loop
from llm.provider import Provider

_T = TypeVar("_T")

_ERROR_BODY_BYTES = 64 * 1024
_ERROR_BODY_SECONDS = 5.0
"""Limits for reading an error body, for its message, before its connection is closed."""

_DRAIN_BYTES = 4096
_DRAIN_SECONDS = 0.02
"""Limits for reading the rest of a body after `[DONE]`. Its last chunk follows immediately, and the
connection can be used again only when that was read. A server that leaves the stream open costs
this much time, and its connection."""

_CUT = frozenset({"length", "content_filter"})
"""Finish reasons of an answer that was cut off before the model had finished."""


class Sink(Protocol):
    """What a reader writes to. All methods are called in the reader's greenlet."""

    def posted(self) -> None:
        """A request was sent to a provider."""

    def opened(self) -> None:
        """The provider answered with an event stream."""

    def put(self, delta: Delta) -> None:
        """Take the text that came in one read; of calls, only how many characters. May block:
        then this stream waits, and no other."""

    def call(self, call: ToolCall) -> None:
        """Take a complete function call. May block."""


class Attempt:
    """One POST and its stream.

    Args:
        client: the provider to ask.
        prompt: what to ask.
        sink: gets what arrives.
        on_first_token: called when the first token of any kind has arrived.
        include_usage: whether to ask for the usage, too.
        on_new_connection: whether not to use a kept connection.
    """

    def __init__(
        self,
        client: ProviderClient,
        prompt: Prompt,
        sink: Sink,
        on_first_token: Callable[[], None],
        *,
        include_usage: bool,
        on_new_connection: bool = False,
    ) -> None:
        self.client = client
        self._on_new_connection = on_new_connection
        self._include_usage = include_usage
        self._prompt = prompt
        self._sink = sink
        self._on_first_token: Callable[[], None] | None = on_first_token

        self.progress_at = time.monotonic()
        """`time.monotonic()` of the last byte from the provider; before any, of the start."""
        self.is_stopping = False
        """Set when the reader is about to be killed."""
        self.has_token = False
        self.finish_reason: str | None = None
        self.reasoning_chars = 0
        self._is_sent = self._is_refused = False

        self._watchdog = _Watchdog(client.provider, client.loop)
        self._answer: Answer | None = None
        self._lines: Lines | None = None
        self._texts: list[str] = []
        self._text_chars = self._token_events = 0
        self._reasoning_put = self._call_chars = 0
        self._calls = CallAssembler()
        self.usage: Usage | None = None
        """The tokens, as the provider counted them; None where it has not said."""

    @property
    def may_cost(self) -> bool:
        """True when the provider has got the request and has not refused it."""
        return self._is_sent and not self._is_refused

    @property
    def usage_estimate(self) -> UsageEstimate | None:
        """What to estimate the tokens from; None when the provider cannot have generated any."""
        if not self.may_cost:
            return None
        chars = self._text_chars + self.reasoning_chars
        return UsageEstimate(self._prompt, self._token_events, chars)

    def run(self) -> None:
        """POST, and write what arrives to the sink until the answer ends. Call `finish()` next.

        Raises:
            StreamError: why it failed, in words for the client. The connection is closed.
        """
        try:
            self._watchdog.start()
            answer = self._answer = self.client.post(
                self._prompt,
                self._sent,
                include_usage=self._include_usage,
                on_new_connection=self._on_new_connection,
            )
            if not self._is_sent:  # the provider answered before it had read the whole request
                self._sent()
            # Making the request and opening the answer is the longest work without a wait. So here,
            # and before connecting, the reader lets others run: there may be an interrupt.
            self.client.loop.wait_turn()
            if answer.status != 200:
                raise self._bad_status(answer)
            self._read_events(self._open(answer))
        except HTTPError as error:
            self.close()
            mapped = self._connection_error(error)
            for cause in _chain(error):
                # It is in a reference cycle with a frame of urllib3, which would keep the socket
                # open until the collector runs.
                cause.__traceback__ = cause.__context__ = None
            raise mapped from None
        except BaseException:
            self.close()
            raise
        self._watchdog.stop()  # the answer is complete: no limit applies any more

    def finish(self) -> None:
        """After a complete answer: give the connection back, if the rest of the body arrives in
        time, or close it."""
        assert self._lines is not None
        try:
            with at_most(self.client.loop, _DRAIN_SECONDS):
                self._lines.drain(_DRAIN_BYTES)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection, unless it has gone back to its pool."""
        self._watchdog.stop()
        self._lines = None  # it refers to this attempt: leave no cycle for the collector
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def _sent(self) -> None:
        self._is_sent = True
        self._sink.posted()

    def _open(self, answer: Answer) -> Events:
        try:
            events = Events(self.client.url, answer, self._flush, self._touch)
        except NotEventsError:
            raise self._not_a_stream(answer) from None
        self._lines = events.lines
        self._sink.opened()
        return events

    def _touch(self) -> None:
        self.progress_at = time.monotonic()

    def _read_events(self, events: Events) -> None:
        try:
            for data in events:
                if data.startswith(DONE) and data.rstrip() == DONE:
                    self._flush()
                    if self.finish_reason is None:
                        if bare := self._bare_error():
                            raise bare
                        self._write_calls()
                    return
                self._take(parse_chunk(data))
        except MalformedCallError as error:
            self._flush()
            raise MalformedCallError(self.client.quote(str(error))) from None
        except (MalformedChunkError, UnicodeDecodeError) as error:
            self._flush()
            if not (self._lines and self._lines.ended):
                # As text: the error itself is in a reference cycle with this frame.
                why = error.reason if isinstance(error, UnicodeDecodeError) else str(error)
                raise MalformedStreamError(f"malformed stream: {why}") from None
            if self.finish_reason is None:  # cut off in the middle of its last event
                raise self._incomplete(None) from None
        except ErrorChunkError as error:
            self._flush()
            message = self.client.quote(str(error))
            raise ProviderReportedError(f"the provider reported: {message}") from None
        except BodyEnded as end:
            self._flush()
            if self.finish_reason is None:
                raise self._incomplete(end.cause) from None

    def _take(self, delta: Delta) -> None:
        if delta.text:
            self._texts.append(delta.text)
            self._text_chars += len(delta.text)
        self.reasoning_chars += delta.reasoning_chars
        if delta.calls:
            self._calls.add(delta.calls)
            chars = sum(piece.chars for piece in delta.calls)
            self._call_chars += chars
            self._text_chars += chars
        is_finish = bool(delta.finish_reason) and self.finish_reason is None
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.usage = delta.usage or self.usage
        if is_token := delta.is_token:
            self._token_events += 1
            if self._on_first_token is not None:
                on_first_token, self._on_first_token = self._on_first_token, None
                self.has_token = True
                on_first_token()
        self._watchdog.event(is_token=is_token)
        if is_finish:
            self._write_calls()

    def _flush(self) -> None:
        """Write the text that was gathered since the last read, in one delta."""
        reasoning_chars = self.reasoning_chars - self._reasoning_put
        if not (self._texts or reasoning_chars or self._call_chars):
            return
        delta = Delta("".join(self._texts), reasoning_chars, call_chars=self._call_chars)
        self._texts.clear()
        self._reasoning_put = self.reasoning_chars
        self._call_chars = 0
        self._write(self._sink.put, delta)

    def _write_calls(self) -> None:
        """Write the calls of a finished answer, after its text."""
        calls = self._calls.finish(is_cut=self.finish_reason in _CUT)
        if calls:
            self._flush()
        for call in calls:
            if self.is_stopping:  # the kill is on its way: it comes when the reader waits next
                raise gevent.GreenletExit
            self._write(self._sink.call, call)

    def _write(self, write: Callable[[_T], None], what: _T) -> None:
        limit = self._watchdog.limit
        limit.since = math.inf  # waiting for a slow client is not the provider's fault
        write(what)
        limit.since = time.monotonic()

    # What fails, as one of `llm/errors.py`.

    def _incomplete(self, cause: Exception | None) -> StreamError:
        bare = self._bare_error()
        if bare:
            return bare
        root = None if cause is None else _root_cause(cause)
        how = f" ({self.client.quote(_describe(root))})" if isinstance(root, OSError) else ""
        return IncompleteAnswerError(
            f"incomplete answer: the provider's stream ended without a finish reason{how}"
        )

    def _bare_error(self) -> ProviderReportedError | None:
        """The error that a provider wrote into the stream without making an event of it."""
        message = error_message(self._lines.stray) if self._lines else None
        if message is None:
            return None
        return ProviderReportedError(f"the provider reported: {self.client.quote(message)}")

    def _not_a_stream(self, answer: Answer) -> NotAStreamError:
        self._is_refused = True
        content_type = self.client.quote(answer.headers.get("Content-Type") or "missing")
        is_json = content_type.startswith("application/json")
        message = error_message(self._read_error_body(answer)) if is_json else None
        return NotAStreamError(
            "the provider's answer is not a stream: its content type is "
            f"{content_type}, not text/event-stream"
            + (f" ({self.client.quote(message)})" if message else "")
        )

    def _bad_status(self, answer: Answer) -> BadStatusError:
        self._is_refused = True
        if 300 <= answer.status < 400:
            return BadStatusError(answer.status, "redirects are not followed")
        body = self._read_error_body(answer)
        text = body.decode("utf-8", "replace")
        message = error_message(body)
        if message is None:
            is_page = "html" in answer.headers.get("Content-Type", "")
            message = "" if is_page else text  # the source of a web page would not help a person
        return BadStatusError(
            answer.status,
            self.client.quote(message),
            parse_retry_after(answer.headers),
            text,
        )

    def _read_error_body(self, answer: Answer) -> bytes:
        parts: list[bytes] = []
        left = _ERROR_BODY_BYTES
        self._watchdog.stop()
        try:
            with at_most(self.client.loop, _ERROR_BODY_SECONDS):
                while left > 0 and (data := answer.read1(left)):
                    parts.append(data)
                    left -= len(data)
        except (HTTPError, OSError) as error:
            parts.append(f" (its message could not be read: {type(error).__name__})".encode())
        return b"".join(parts)

    def _connection_error(self, error: HTTPError) -> StreamError:
        root = _root_cause(error)
        cause = self.client.quote(_describe(root))
        match error:
            case NewConnectionError():  # before its base class in urllib3, ConnectTimeoutError
                return ConnectFailedError(f"no connection to the provider: {cause}")
            case ConnectTimeoutError():
                return LimitPassedError("connect", self.client.provider.connect_timeout)
            case KeptConnectionEnded():
                self._is_refused = True  # as far as one can know: the server was closing it
                return KeptConnectionEndedError(
                    f"the provider ended a kept connection without an answer: {cause}"
                )
            case ProtocolError() if isinstance(root, HTTPException | ValueError) and not (
                isinstance(root, ConnectionError)
            ):
                return NotAStreamError("the provider's answer is not HTTP")
            case ProtocolError():
                return IncompleteAnswerError(
                    f"the provider closed the connection without an answer: {cause}"
                )
            case _:
                return ConnectFailedError(f"no connection to the provider: {cause}")


class _Watchdog:
    """Raises `LimitPassedError` in the reader when the provider is too slow.

    An event costs one reading of the clock.
    """

    def __init__(self, provider: Provider, loop: Loop) -> None:
        self._provider = provider
        self._loop = loop
        self._has_token = False
        self.limit = self._make("first token", provider.first_token_timeout)
        """The limit that runs. `since` is set from outside, too: it costs less than a call."""

    def start(self) -> None:
        """Watch the greenlet that has made this, from now on."""
        self.limit.start()

    def event(self, *, is_token: bool) -> None:
        """Note that an event has arrived."""
        if self._has_token:
            self.limit.since = time.monotonic()
        elif is_token:
            self._has_token = True
            self.limit.stop()
            self.limit = self._make("idle", self._provider.idle_timeout)
            self.limit.start()

    def stop(self) -> None:
        """Stop watching."""
        self.limit.stop()

    def _make(self, name: str, seconds: float) -> Limit:
        reader = gevent.getcurrent()
        return self._loop.limit(seconds, lambda: reader.throw(LimitPassedError(name, seconds)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, which urllib3 also keeps in `reason` and in arguments."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "reason", None) or next(
            (arg for arg in reversed(current.args) if isinstance(arg, BaseException)), None
        )
        current = inner if isinstance(inner, BaseException) else current.__cause__


def _root_cause(error: BaseException) -> BaseException:
    *_, root = _chain(error)
    return root


def _describe(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
