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
import http.cookiejar
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import gevent
import requests
import requests.adapters
from requests_sse import EventSource, InvalidContentTypeError, InvalidStatusCodeError
from urllib3.connection import HTTPConnection
from urllib3.exceptions import NewConnectionError, SSLError

from llm.chat import (
    DONE,
    Delta,
    ErrorChunkError,
    MalformedChunkError,
    Usage,
    error_message,
    parse_chunk,
)
from llm.errors import (
    BadStatusError,
    ConnectFailedError,
    IncompleteAnswerError,
    LimitPassedError,
    MalformedStreamError,
    NotAStreamError,
    ProviderReportedError,
    StreamError,
)
from llm.lines import BodyEnded, Lines
from metrics.logs import get_logger

_log = get_logger("LLM")

_ERROR_BODY_BYTES = 64 * 1024
_ERROR_BODY_SECONDS = 5.0
_ERROR_MESSAGE_CHARS = 500
"""An error body is read for its message, within these bounds, before its connection is closed."""

_DRAIN_BYTES = 4096
_DRAIN_SECONDS = 0.02
"""After `[DONE]` the last chunk is as good as there; only when it was read may the next request
have the connection. A server that leaves the stream open costs this much and its connection."""


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
    """What a reader writes to. Both are called in the reader's greenlet."""

    def opened(self) -> None:
        """The provider answered with an event stream."""

    def put(self, delta: Delta) -> None:
        """Take what came in one read. May block: then this provider's stream waits, and no other."""


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
        self._url = provider.base_url.rstrip("/") + "/chat/completions"
        session = self._session = requests.Session()
        # Proxies and netrc would be read from the environment at each request, and netrc would
        # replace the key.
        session.trust_env = False
        session.verify = provider.ca_file or True
        # A provider's cookies would tie the users of one gateway together.
        session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        adapter = _Adapter(pool_maxsize=provider.pool_size, pool_block=False, max_retries=0)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
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
        self._session.close()

    def event_source(self, body: bytes, adopt: Callable[..., requests.Response]) -> EventSource:
        """An event source for one POST, whose response goes through `adopt` first."""
        # Annotated as a number, but handed on to requests, which takes the pair: a limit for
        # connecting, and none for reading, which the watchdog bounds.
        timeout: Any = (self.provider.connect_timeout or None, None)
        return EventSource(
            self._url,
            method="POST",
            session=self._session,
            max_connect_retry=0,
            timeout=timeout,
            data=body,
            headers=self._headers,
            # A redirect would carry the key elsewhere.
            allow_redirects=False,
            hooks={"response": adopt},
        )

    def without_key(self, text: str) -> str:
        """The text with the key blotted out: providers quote it in their errors."""
        key = self.provider.api_key
        return text.replace(key, "***") if key else text


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
        self._on_end = on_end
        self._closing = False
        self._result: Result | None = None
        self._closed_at: float | None = None
        self._reader = gevent.Greenlet(self._run)
        self._reader.rawlink(self._ended)

        self.progress_at = time.monotonic()
        """`time.monotonic()` of the last byte from the provider (of the making, before any)."""

        self._lines: Lines | None = None
        self._texts: list[str] = []
        self._reasoning_chars = self._reasoning_put = 0
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
            self._reader.kill(block=False)

    @property
    def ended(self) -> bool:
        """True when the reader is dead, and with it the stream closed."""
        return self._reader.dead

    def kill_again(self) -> None:
        """The last resort for a reader that outlived its `close()` by far."""
        self._reader.kill(block=False)

    def _ended(self, _reader: object) -> None:
        self._on_end(self._result or Result(Ending.CLOSED, closed_at=self._closed_at))

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
            ending, error = Ending.FAILED, failure
        except Exception:
            _log.exception("Reader failed")
            ending, error = Ending.FAILED, StreamError("the gateway failed to read the answer")
        finally:
            watchdog.stop()
            self._closed_at = time.monotonic()
        self._result = Result(
            ending,
            error,
            self._finish_reason,
            self._usage,
            self._reasoning_chars,
            self._closed_at,
        )

    def _relay(self) -> None:
        """POST, hand on what comes, return at the end of the answer, connection closed by then.

        Raises:
            StreamError: what went wrong, in words for the client.
        """
        source = self._client.event_source(self._body, self._adopt_response())
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
        except requests.RequestException as error:
            raise _connection_error(error, self._client.provider) from error
        finally:
            source.close()
            if self._lines is not None:
                self._lines.close()

    def _adopt_response(self) -> Callable[..., requests.Response]:
        # A closure, since requests-sse deep-copies its arguments: a function passes as it is.
        def adopt(response: requests.Response, **_: object) -> requests.Response:
            if 300 <= response.status_code < 400:
                response.close()
                raise BadStatusError(response.status_code, "redirects are not followed")
            lines = self._lines = Lines(response.raw, self._hand_on, self._touch)

            def iter_lines(*_args: object, **_kwargs: object) -> Iterator[bytes]:
                return iter(lines)

            response.iter_lines = iter_lines  # type: ignore[method-assign]
            return response

        return adopt

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
                    return
                self._take(parse_chunk(data))
        except MalformedChunkError as error:
            self._hand_on()
            if self._lines and self._lines.ended:  # cut in the middle of its last event
                raise self._incomplete(None) from None
            raise MalformedStreamError(f"malformed stream: {error}") from None
        except UnicodeDecodeError as error:
            self._hand_on()
            raise MalformedStreamError(f"malformed stream: {error.reason}") from None
        except ErrorChunkError as error:
            self._hand_on()
            message = self._client.without_key(str(error))[:_ERROR_MESSAGE_CHARS]
            raise ProviderReportedError(f"the provider reported: {message}") from None
        except BodyEnded as end:
            self._hand_on()
            if self._finish_reason is None:
                raise self._incomplete(end.cause) from None

    def _take(self, delta: Delta) -> None:
        if delta.text:
            self._texts.append(delta.text)
        self._reasoning_chars += delta.reasoning_chars
        self._finish_reason = delta.finish_reason or self._finish_reason
        self._usage = delta.usage or self._usage
        self._watchdog.event(is_token=delta.is_token)

    def _hand_on(self) -> None:
        """Give the sink everything that came with the last read."""
        if not self._texts and self._reasoning_put == self._reasoning_chars:
            return
        delta = Delta("".join(self._texts), self._reasoning_chars - self._reasoning_put)
        self._texts.clear()
        self._reasoning_put = self._reasoning_chars
        with self._watchdog.paused():  # a slow client is not the provider's silence
            self._sink.put(delta)

    def _give_connection_back(self) -> None:
        lines = self._lines
        assert lines is not None
        self._watchdog.stop()  # the answer is complete: nothing is late any more
        with _time_limit(_DRAIN_SECONDS):
            lines.drain(_DRAIN_BYTES)

    # Errors, in words.

    def _incomplete(self, cause: Exception | None) -> StreamError:
        stray = error_message(self._lines.stray) if self._lines else None
        if stray:
            message = self._client.without_key(stray)[:_ERROR_MESSAGE_CHARS]
            return ProviderReportedError(f"the provider reported: {message}")
        how = f" ({_root_cause(cause)})" if cause else ""
        return IncompleteAnswerError(
            f"incomplete answer: the provider's stream ended before it said it was done{how}"
        )

    def _bad_status(self, response: requests.Response | None) -> BadStatusError:
        assert response is not None
        body = self._read_error_body(response)
        message = error_message(body)
        if message is None:
            message = body.decode("utf-8", "replace").strip()
        message = self._client.without_key(message)[:_ERROR_MESSAGE_CHARS]
        return BadStatusError(response.status_code, message)

    def _not_a_stream(self, error: InvalidContentTypeError) -> NotAStreamError:
        if error.response is not None:
            error.response.close()
        return NotAStreamError(
            "the provider's answer is not a stream: its content type is "
            f"{error.content_type or 'missing'}, not text/event-stream"
        )

    def _read_error_body(self, response: requests.Response) -> bytes:
        parts: list[bytes] = []
        left = _ERROR_BODY_BYTES
        self._watchdog.stop()
        raw = response.raw
        try:
            with _time_limit(_ERROR_BODY_SECONDS):
                while left > 0 and (data := raw.read1(left)):
                    parts.append(data)
                    left -= len(data)
        except Exception as error:  # noqa: BLE001 - the status is the error; this is its footnote
            parts.append(f" (its message could not be read: {type(error).__name__})".encode())
        finally:
            response.close()
        return b"".join(parts)


class _Adapter(requests.adapters.HTTPAdapter):
    """Connections that vanish when they are closed, and send each write at once."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        # Linger 0: a close is a reset. A provider that does not read (its request body still
        # waits in our buffer) would not notice anything else.
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        kwargs["socket_options"] = [
            *HTTPConnection.default_socket_options,
            (socket.SOL_SOCKET, socket.SO_LINGER, linger),
        ]
        super().init_poolmanager(*args, **kwargs)


class _Watchdog:
    """Raises `LimitPassedError` in the reader when the provider is too slow.

    One timer for a generation, set again only when it fires: an event costs one look at the clock.
    """

    def __init__(self, provider: Provider) -> None:
        self._idle_timeout = provider.idle_timeout
        self._name = "first token"
        self._seconds = provider.first_token_timeout
        self._since = time.monotonic()
        self._paused = False
        self._reader = gevent.getcurrent()
        self._timer: Any = None
        self._set(self._seconds)

    def event(self, *, is_token: bool) -> None:
        """An event came."""
        if is_token and self._name != "idle":
            self._name, self._seconds = "idle", self._idle_timeout
            self._set(self._seconds)
        if self._name == "idle":
            self._since = time.monotonic()

    def paused(self) -> _Watchdog:
        """A context in which time does not count."""
        return self

    def __enter__(self) -> None:
        self._paused = True

    def __exit__(self, *_: object) -> None:
        self._paused = False
        if self._name == "idle":
            self._since = time.monotonic()

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
        left = self._since + self._seconds - time.monotonic()
        if self._paused:
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


def _connection_error(error: requests.RequestException, provider: Provider) -> StreamError:
    if isinstance(error, requests.ConnectTimeout):
        return LimitPassedError("connect", provider.connect_timeout)
    cause = _root_cause(error)
    if isinstance(error, requests.exceptions.SSLError) or _caused_by(
        error, NewConnectionError, SSLError
    ):
        return ConnectFailedError(f"no connection to the provider: {cause}")
    if isinstance(error, requests.ReadTimeout):  # only the TLS handshake has a read limit
        return LimitPassedError("connect", provider.connect_timeout)
    if isinstance(error, requests.ConnectionError):
        return IncompleteAnswerError(f"the provider closed the connection unanswered: {cause}")
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


def _caused_by(error: BaseException, *types: type[BaseException]) -> bool:
    return any(isinstance(cause, types) for cause in _chain(error))


def _root_cause(error: BaseException) -> str:
    *_, root = _chain(error)
    return (root.strerror if isinstance(root, OSError) else None) or str(root)
