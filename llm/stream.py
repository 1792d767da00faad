"""One generation over requests-sse: a reader greenlet that POSTs once and hands on what comes.

Only the reader touches the socket. To stop a generation, in whatever phase it is (resolving,
connecting, in the TLS handshake, waiting for headers or an event, in the middle of a chunk, under
a flood, waiting for a slow client), its greenlet is killed, which raises inside whatever it is
blocked in; on its way out the reader closes the connection. That is why `close()` may be called by
anybody at any time, never blocks, and cannot close a connection that serves somebody else by now.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import gevent
import requests
from requests_sse import EventSource, InvalidContentTypeError, InvalidStatusCodeError
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NewConnectionError,
    ProtocolError,
    ReadTimeoutError,
)

from llm.calls import CallAssembler
from llm.chat import (
    DONE,
    Delta,
    ErrorChunkError,
    MalformedChunkError,
    ToolCall,
    Usage,
    error_message,
    parse_chunk,
)
from llm.connections import Connections, Stopped
from llm.errors import (
    BadStatusError,
    ConnectFailedError,
    IncompleteAnswerError,
    LimitPassedError,
    MalformedCallError,
    MalformedStreamError,
    NotAStreamError,
    ProviderReportedError,
    StreamError,
)
from llm.lanes import lanes
from llm.lines import BodyEnded, Lines
from metrics.logs import get_logger

_T = TypeVar("_T")

_log = get_logger("LLM")

_ERROR_BODY_BYTES = 64 * 1024
_ERROR_BODY_SECONDS = 5.0
_ERROR_MESSAGE_CHARS = 500
"""An error body is read for its message, within these bounds, before its connection is closed."""

_DRAIN_BYTES = 4096
_DRAIN_SECONDS = 0.02
"""After `[DONE]` the last chunk is as good as there; only when it was read may the next request
have the connection. A server that leaves the stream open costs this much and its connection."""

_CUT = frozenset({"length", "content_filter"})
"""Finish reasons of an answer that ended before the model was done."""


@dataclass(frozen=True)
class Provider:
    """Where generations come from.

    Args:
        base_url: OpenAI-style base, such as ``https://api.example.com/v1``.
        model: name of the model that is asked for.
        api_key: sent as a bearer token; None sends none.
        connect_timeout: seconds until the connection stands; 0 is no limit.
        first_token_timeout: seconds from the start to the first token of any kind; 0 is no limit.
        idle_timeout: seconds from one event to the next after that; 0 is no limit.
        ca_file: PEM file of trusted certificate authorities; None takes the usual ones.
        pool_size: idle connections that are kept: as many as generations run at once.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    connect_timeout: float = 5.0
    first_token_timeout: float = 60.0
    idle_timeout: float = 60.0
    ca_file: str | None = None
    pool_size: int = 1000


class Sink(Protocol):
    """What a reader writes to. All are called in the reader's greenlet."""

    def opened(self) -> None:
        """The provider answered with an event stream."""

    def put(self, delta: Delta) -> None:
        """Take what came in one read, of calls only how much. May block: then this stream waits,
        and no other."""

    def call(self, call: ToolCall) -> None:
        """A call that is complete. May block."""


class Ending(enum.Enum):
    """How a generation ended."""

    COMPLETED = "completed"
    CLOSED = "closed"
    FAILED = "failed"


@dataclass(frozen=True)
class Result:
    """The one report of a generation, there when its reader is dead.

    Args:
        ending: how it ended.
        error: why, where it failed.
        finish_reason: the provider's, such as ``stop`` or ``length``.
        usage: the provider's count of tokens, where it sent one.
        reasoning_chars: reasoning text that was not relayed, in Unicode code points.
        closed_at: `time.monotonic()` of the moment the connection was closed or given back; None
            when the reader was killed before it did anything.
    """

    ending: Ending
    error: StreamError | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning_chars: int = 0
    closed_at: float | None = None


class LlmClient:
    """The connections to one provider; `generation()` makes one generation that uses them."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._connections = Connections(
            provider.base_url.rstrip("/") + "/chat/completions",
            provider.ca_file,
            provider.connect_timeout,
            provider.pool_size,
        )
        self._headers = {
            "Content-Type": "application/json",
            # Compression on the way would hold events back until a block is full.
            "Accept-Encoding": "identity",
        }
        if provider.api_key:
            self._headers["Authorization"] = f"Bearer {provider.api_key}"

    def generation(self, body: bytes, sink: Sink, on_end: Callable[[Result], None]) -> Generation:
        """A generation that has not started yet.

        Args:
            body: JSON of the request (`llm.chat.encode_body`).
            sink: gets what comes.
            on_end: called once, in the hub, when the reader is dead; must not block.
        """
        return Generation(self, body, sink, on_end)

    def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

    def post(self, body: bytes, headers: Mapping[str, str]) -> requests.Response:
        """POST once, and return when the headers of the answer are there.

        Args:
            body: JSON of the request.
            headers: more headers than those that every request has.
        """
        return self._connections.post(body, {**self._headers, **headers})

    @property
    def url(self) -> str:
        """Where generations are asked for."""
        return self._connections.url

    def quote(self, text: str) -> str:
        """What a provider said, within a bound and with the key blotted out: some echo it."""
        key = self.provider.api_key
        return (text.replace(key, "***") if key else text).strip()[:_ERROR_MESSAGE_CHARS]


class Generation:
    """One POST and its stream; made by `LlmClient.generation`."""

    def __init__(
        self,
        client: LlmClient,
        body: bytes,
        sink: Sink,
        on_end: Callable[[Result], None],
    ) -> None:
        self._client = client
        self._body = body
        self._sink = sink
        self._on_end: Callable[[Result], None] | None = on_end
        self._closing = False
        self._result: Result | None = None
        self._closed_at: float | None = None
        self._lanes = lanes()
        self._reader = gevent.Greenlet(self._run)
        self._reader.rawlink(self._ended)

        self.progress_at = time.monotonic()
        """`time.monotonic()` of the last byte from the provider (of the making, before any)."""

        self._lines: Lines | None = None
        self._texts: list[str] = []
        self._reasoning_chars = self._reasoning_put = self._call_chars = 0
        self._calls = CallAssembler()
        self._finish_reason: str | None = None
        self._usage: Usage | None = None

    def start(self) -> None:
        """Start the reader, unless it was closed already."""
        if not self._closing:
            self.progress_at = time.monotonic()
            self._reader.start()

    def close(self) -> None:
        """Stop the reader and close its connection, at whatever point it is.

        Returns at once; `on_end` follows. Any greenlet may call it, any number of times: it kills
        once, since a second kill would cut the first one's cleaning up short.
        """
        if not self._closing:
            self._closing = True
            self._lanes.call(self._kill)

    def _kill(self) -> None:
        # In the hub. Like `Greenlet.kill`, but now, and its end is told now.
        stopped = Stopped()
        self._reader.throw(stopped)
        self._closed_at = self._closed_at or stopped.closed_at
        if self.ended:
            # Another client's INTERRUPT may have come meanwhile: its stream is closed first.
            self._lanes.call_after_look(self._ended, self._reader)

    @property
    def ended(self) -> bool:
        """True when the stream is closed. Its reader is dead then, or on its way out."""
        return self._reader.dead or self._closed_at is not None

    def kill_again(self) -> None:
        """The last resort for a reader that outlived its `close()` by far."""
        self._reader.kill(block=False)

    def _ended(self, _reader: object) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None  # no cycle is left for the collector
            on_end(self._result or self._make_result(Ending.CLOSED, None))

    def _make_result(self, ending: Ending, error: StreamError | None) -> Result:
        return Result(
            ending,
            error,
            self._finish_reason,
            self._usage,
            self._reasoning_chars,
            self._closed_at,
        )

    # In the reader's greenlet from here on.

    def _run(self) -> None:
        ending, error = Ending.CLOSED, None
        watchdog = self._watchdog = _Watchdog(self._client.provider)
        try:
            self._relay()
            ending = Ending.COMPLETED
        except gevent.GreenletExit:
            # Caught, for an uncaught one would hold on to the traceback, and so to the socket.
            pass
        except StreamError as failure:
            # Its words are all that is wanted of it, not the frames that it came through.
            failure.__traceback__ = failure.__cause__ = failure.__context__ = None
            ending, error = Ending.FAILED, failure
        except Exception:
            _log.exception("Reader failed")
            ending, error = Ending.FAILED, StreamError("the gateway failed to read the answer")
        finally:
            watchdog.stop()
            self._closed_at = self._closed_at or time.monotonic()
            self._lines = None  # it knows us, too: no cycle is left for the collector
        self._result = self._make_result(ending, error)

    def _relay(self) -> None:
        """POST, hand on what comes, return at the end of the answer, connection closed by then.

        Raises:
            StreamError: what went wrong, in words for the client.
        """
        # The generation itself stands in for the session: all that is asked of it is `request`.
        session: Any = self
        self._lanes.wait_turn()  # half a millisecond of work, if the connection is to be made
        source = EventSource(self._client.url, method="POST", session=session, max_connect_retry=0)
        try:
            source.connect()
            self._sink.opened()
            self._read_events(source)
            self._give_connection_back()
        except StreamError:
            raise
        except InvalidStatusCodeError as error:
            raise self._bad_status(error.response) from None
        except InvalidContentTypeError as error:
            raise self._not_a_stream(error) from None
        except HTTPError as error:
            raise _connection_error(error, self._client) from error
        finally:
            if self._lines is not None:
                self._lines.close()

    def request(self, *, headers: dict[str, str], **_: object) -> requests.Response:
        """What requests-sse calls to connect, in place of `requests.Session.request`."""
        response = self._client.post(self._body, headers)
        if 300 <= response.status_code < 400:
            response.close()
            raise BadStatusError(response.status_code, "redirects are not followed")
        lines = self._lines = Lines(response.raw, self._hand_on, self._touch)

        def iter_lines(*_args: object, **_kwargs: object) -> Iterator[bytes]:
            return iter(lines)

        response.iter_lines = iter_lines  # type: ignore[method-assign]
        return response

    def _touch(self) -> None:
        self.progress_at = time.monotonic()

    def _read_events(self, source: EventSource) -> None:
        try:
            for event in source:
                data = event.data
                if not data:
                    continue
                if data == DONE:
                    self._hand_on()
                    if self._finish_reason is None:
                        if bare := self._bare_error():
                            raise bare
                        self._give_calls()
                    return
                self._take(parse_chunk(data))
        except MalformedCallError as error:
            self._hand_on()
            raise MalformedCallError(self._client.quote(str(error))) from None
        except (MalformedChunkError, UnicodeDecodeError) as error:
            self._hand_on()
            if not (self._lines and self._lines.ended):
                why = error.reason if isinstance(error, UnicodeDecodeError) else error
                raise MalformedStreamError(f"malformed stream: {why}") from None
            if self._finish_reason is None:  # cut in the middle of its last event
                raise self._incomplete(None) from None
        except ErrorChunkError as error:
            self._hand_on()
            message = self._client.quote(str(error))
            raise ProviderReportedError(f"the provider reported: {message}") from None
        except BodyEnded as end:
            self._hand_on()
            if self._finish_reason is None:
                raise self._incomplete(end.cause) from None

    def _take(self, delta: Delta) -> None:
        if delta.text:
            self._texts.append(delta.text)
        self._reasoning_chars += delta.reasoning_chars
        if delta.calls:
            self._calls.add(delta.calls)
            self._call_chars += sum(piece.chars for piece in delta.calls)
        is_finish = bool(delta.finish_reason) and self._finish_reason is None
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._usage = delta.usage or self._usage
        self._watchdog.event(is_token=delta.is_token)
        if is_finish:
            self._give_calls()

    def _hand_on(self) -> None:
        """Give the sink everything that came with the last read."""
        reasoning_chars = self._reasoning_chars - self._reasoning_put
        if not (self._texts or reasoning_chars or self._call_chars):
            return
        delta = Delta("".join(self._texts), reasoning_chars, call_chars=self._call_chars)
        self._texts.clear()
        self._reasoning_put = self._reasoning_chars
        self._call_chars = 0
        self._give(self._sink.put, delta)

    def _give_calls(self) -> None:
        """The answer is finished: give the sink its calls, after its text."""
        calls = self._calls.finish(is_cut=self._finish_reason in _CUT)
        if calls:
            self._hand_on()
        for call in calls:
            if self._closing:  # since the reader last waited: the kill is on its way
                raise gevent.GreenletExit
            self._give(self._sink.call, call)

    def _give(self, give: Callable[[_T], None], what: _T) -> None:
        self._watchdog.paused = True  # a slow client is not the provider's silence
        give(what)
        self._watchdog.paused = False
        self._watchdog.since = time.monotonic()

    def _give_connection_back(self) -> None:
        lines = self._lines
        assert lines is not None
        self._watchdog.stop()  # the answer is complete: nothing is late any more
        with _time_limit(_DRAIN_SECONDS):
            lines.drain(_DRAIN_BYTES)

    # Errors, in words.

    def _incomplete(self, cause: Exception | None) -> StreamError:
        bare = self._bare_error()
        if bare:
            return bare
        how = f" ({self._client.quote(_root_cause(cause))})" if cause else ""
        return IncompleteAnswerError(
            f"incomplete answer: the provider's stream ended before it said it was done{how}"
        )

    def _bare_error(self) -> ProviderReportedError | None:
        """The error that a provider put into the stream without making an event of it."""
        message = error_message(self._lines.stray) if self._lines else None
        if message is None:
            return None
        return ProviderReportedError(f"the provider reported: {self._client.quote(message)}")

    def _bad_status(self, response: requests.Response | None) -> BadStatusError:
        assert response is not None
        body = self._read_error_body(response)
        message = error_message(body)
        if message is None:
            message = body.decode("utf-8", "replace")
        return BadStatusError(response.status_code, self._client.quote(message))

    def _not_a_stream(self, error: InvalidContentTypeError) -> NotAStreamError:
        if error.response is not None:
            error.response.close()
        return NotAStreamError(
            "the provider's answer is not a stream: its content type is "
            f"{self._client.quote(error.content_type or 'missing')}, not text/event-stream"
        )

    def _read_error_body(self, response: requests.Response) -> bytes:
        parts: list[bytes] = []
        left = _ERROR_BODY_BYTES
        self._watchdog.stop()
        raw = response.raw
        try:
            with _time_limit(_ERROR_BODY_SECONDS):
                while left > 0 and (data := raw.read1(left, decode_content=True)):
                    parts.append(data)
                    left -= len(data)
        except Exception as error:
            parts.append(f" (its message could not be read: {type(error).__name__})".encode())
        finally:
            response.close()
        return b"".join(parts)


class _Watchdog:
    """Raises `LimitPassedError` in the reader when the provider is too slow.

    One timer for a generation, set again only when it fires: an event costs one look at the clock.
    """

    def __init__(self, provider: Provider) -> None:
        self.since = time.monotonic()
        """`time.monotonic()` from which the limit runs."""
        self.paused = False
        """True while the wait is not for the provider."""
        self._idle_timeout = provider.idle_timeout
        self._name = "first token"
        self._seconds = provider.first_token_timeout
        self._reader = gevent.getcurrent()
        self._timer: Any = None
        self._set(self._seconds)

    def event(self, *, is_token: bool) -> None:
        """An event came."""
        if self._name == "idle":
            self.since = time.monotonic()
        elif is_token:
            self._name, self._seconds = "idle", self._idle_timeout
            self.since = time.monotonic()
            self._set(self._seconds)

    def stop(self) -> None:
        """Disarm it."""
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _set(self, seconds: float) -> None:
        self.stop()
        if self._seconds > 0:
            self._timer = gevent.get_hub().loop.timer(seconds)
            self._timer.start(self._fired)

    def _fired(self) -> None:
        left = self.since + self._seconds - time.monotonic()
        if self.paused:
            self._set(self._seconds)
        elif left > 0:
            self._set(left)
        else:
            self._reader.throw(LimitPassedError(self._name, self._seconds))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Leave the block when the time is up, without a word."""
    timeout = gevent.Timeout.start_new(seconds)
    try:
        yield
    except gevent.Timeout as fired:
        if fired is not timeout:
            raise
    finally:
        timeout.close()


def _connection_error(error: HTTPError, client: LlmClient) -> StreamError:
    cause = client.quote(_root_cause(error))
    match error:
        case NewConnectionError():  # to urllib3, one kind of ConnectTimeoutError
            return ConnectFailedError(f"no connection to the provider: {cause}")
        case ConnectTimeoutError() | ReadTimeoutError():  # the latter in the TLS handshake only
            return LimitPassedError("connect", client.provider.connect_timeout)
        case ProtocolError():
            return IncompleteAnswerError(f"the provider closed the connection unanswered: {cause}")
        case _:
            return ConnectFailedError(f"no connection to the provider: {cause}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, through urllib3's `reason` and wrapped arguments too."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "reason", None) or next(
            (arg for arg in reversed(current.args) if isinstance(arg, BaseException)), None
        )
        current = inner if isinstance(inner, BaseException) else current.__cause__


def _root_cause(error: BaseException) -> str:
    *_, root = _chain(error)
    return (root.strerror if isinstance(root, OSError) else None) or str(root)
