"""The embedded demo provider: a real HTTP server on loopback that plays whatever providers do.

It is reached through exactly the code that reaches a real provider. From the outside in:

    DemoProvider       life, routes, the books on what was asked for
    _Player            one HTTP response: acts the steps out on the client's socket
    llm/demo/scenarios.py   what can be played: the table, and pure generators of steps
    llm/demo/steps.py       what can be done to a client, and what was asked for

gevent.pywsgi reads the requests and keeps connections alive; what it would write is written here,
since it could not say half a chunk or HTTP/1.0.

Sources: OpenAI API reference, "Chat" > "Create chat completion", "Models" > "List models", and the
guide "Error codes"; RFC 9110 and 9112.
"""

import dataclasses
import email.utils
import enum
import errno
import json
import logging
import socket
import struct
import sys
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self, assert_never

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.pywsgi import Input, WSGIHandler, WSGIServer
from gevent.socket import wait_read

from llm.demo import scenarios
from llm.demo.scenarios import ALIASES, SCENARIOS, NoScenarioError, choose
from llm.demo.steps import (
    ChatRequest,
    Close,
    Completion,
    Head,
    Pause,
    Raw,
    Reset,
    Send,
    Stall,
    Step,
    Tool,
    error_object,
    json_answer,
)
from llm.demo.stories import tokens

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

TOKENS_PER_SECOND = 30.0  # a story takes half a minute: time enough to interrupt it by hand
MAX_BODY_BYTES = 16 * 1024 * 1024  # a long history with room to spare, not a way to fill memory
MAX_KEPT_REQUESTS = 1_000  # more than any test looks back on, and a few hundred KiB

_KEPT_MODEL_CHARS = 200  # over any real name; a request may hold one of megabytes

_CHAT, _MODELS, _REQUESTS = "/v1/chat/completions", "/v1/models", "/v1/demo/requests"
_METHODS = {_CHAT: ("POST",), _MODELS: ("GET",), _REQUESTS: ("GET", "DELETE")}
_HANDLER = "bargein.handler"  # where our handler leaves itself in the WSGI environ


class _RefusedError(Exception):
    """The request is answered with an OpenAI error object (guide "Error codes")."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def answer(self) -> Iterator[Step]:
        kind = "invalid_request_error"
        body = error_object(str(self), kind, param=self.param, code=self.code)
        return json_answer(self.status, body, self.headers)


# ------------------------------------------------------------------------------------- the request


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of `POST /v1/chat/completions`.

    Raises: _RefusedError (400) where the API reference demands what is not there, naming the
        parameter. What the demo has no use for (temperature, tool_choice, …) is not looked at.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _RefusedError(
            HTTPStatus.BAD_REQUEST, "We could not parse the JSON body of your request."
        )
    model = _field(fields, "model", str, "a string")
    if not model:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "you must provide a model parameter")
    messages = _field(fields, "messages", list, "an array of objects")
    if messages is None:
        raise _bad(
            "messages", "Missing required parameter: 'messages'.", "missing_required_parameter"
        )
    if not messages:
        raise _bad("messages", "Invalid 'messages': empty array.", "empty_array")
    texts = [_text_of(message, index) for index, message in enumerate(messages)]
    last_role, last_text = texts[-1]
    stream_options = _field(fields, "stream_options", dict, "an object")
    max_tokens = _max_tokens(fields, "max_completion_tokens")
    if max_tokens is None:  # "deprecated in favor of max_completion_tokens", and still sent by most
        max_tokens = _max_tokens(fields, "max_tokens")
    return ChatRequest(
        model=_printable(model),
        user_text=next((text for role, text in reversed(texts) if role == "user"), ""),
        prompt_tokens=sum(len(tokens(text)) for _, text in texts),
        stream=bool(_field(fields, "stream", bool, "a boolean")),
        include_usage=bool(_field(stream_options or {}, "include_usage", bool, "a boolean")),
        max_tokens=max_tokens,
        has_stream_options=stream_options is not None,
        tools=tuple(_tools(fields)),
        tool_result=last_text if last_role in ("tool", "function") else None,
    )


def _text_of(message: object, index: int) -> tuple[str, str]:
    """Role and text of one message; `content` is a string, an array of typed parts, or null."""
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _bad(where, f"Invalid '{where}': expected an object with a 'role'.", "invalid_type")
    match message.get("content"):
        case None:
            text = ""
        case str(text):
            pass
        case list(parts):
            found = (part.get("text") for part in parts if isinstance(part, dict))
            text = " ".join(part for part in found if isinstance(part, str))
        case _:
            where = f"{where}.content"
            raise _bad(where, f"Invalid type for '{where}': expected a string.", "invalid_type")
    return message["role"], _printable(text)


def _tools(fields: Mapping[str, Any]) -> Iterator[Tool]:
    """What may be called, of `tools` and of the legacy `functions`."""
    for index, tool in enumerate(_field(fields, "tools", list, "an array of objects") or ()):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise _bad(where, f"Invalid type for '{where}': expected an object.", "invalid_type")
        if tool.get("type") == "function":
            yield _tool(tool.get("function"), f"{where}.function")
    functions = _field(fields, "functions", list, "an array of objects") or ()
    for index, function in enumerate(functions):
        yield _tool(function, f"functions[{index}]")


def _tool(function: object, where: str) -> Tool:
    match function:
        case {"name": str(name), **rest}:
            parameters = rest.get("parameters")
            return Tool(name, parameters if isinstance(parameters, dict) else {})
    raise _bad(where, f"Invalid '{where}': expected an object with a 'name'.", "invalid_type")


def _printable(text: str) -> str:
    r"""`text` without lone surrogates: JSON can smuggle them in ("\ud800"), UTF-8 has none."""
    return text.encode("utf-8", "replace").decode()


def _field(fields: Mapping[str, Any], name: str, kind: type, wanted: str) -> Any:
    """The value under `name`, or None where it is null or missing; of another type, refused."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise _bad(name, f"Invalid type for '{name}': expected {wanted}.", "invalid_type")
    return value


def _max_tokens(fields: Mapping[str, Any], name: str) -> int | None:
    value = _field(fields, name, int, "an integer")
    if value is None:
        return None
    if isinstance(value, bool) or value < 1:
        raise _bad(name, f"Invalid '{name}': expected an integer >= 1.", "integer_below_min_value")
    return int(value)


def _bad(param: str, message: str, code: str) -> _RefusedError:
    return _RefusedError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def describe_scenarios() -> str:
    """What can be asked for, for people: a line for each scenario, and how parameters are put."""
    return scenarios.describe()


def _models() -> dict[str, Any]:
    """The list of "model objects" (reference, "List models"); `created` is a made-up constant."""
    listed = [
        {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "bargein"}
        for name in (*SCENARIOS, *ALIASES)
    ]
    return {"object": "list", "data": listed}


# --------------------------------------------------------------------------------------- the books


class Ended(enum.StrEnum):
    """How the answer to a POST ended."""

    FINISHED = "finished"
    CLIENT_CLOSED = "client_closed"
    CUT = "cut"
    """By the scenario, by `DemoProvider.stop`, or by a defect."""


@dataclass(slots=True)
class ReceivedPost:
    """A POST for a chat completion that the provider has got, its body read."""

    number: int
    """In the order of arrival, from 1."""
    received_at: int
    """Milliseconds since the epoch."""
    has_key: bool
    """True when there was an `Authorization` header; what it said is not kept."""
    model: str | None = None
    """As the request put it; None where it was refused before anybody got so far."""
    ended: Ended | None = None
    """None while the answer is under way."""
    ended_at: int | None = None
    """Milliseconds since the epoch."""
    sent_bytes: int = 0
    """Of the answer, head and framing included: so many has the kernel taken."""


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


# ------------------------------------------------------------------------------------ one response


class _Handler(WSGIHandler):
    """gevent's handler up to the request; what answers it writes to the socket itself."""

    def get_environ(self) -> "WSGIEnvironment":
        environ = super().get_environ()
        environ[_HANDLER] = self
        return environ

    def run_application(self) -> None:
        assert self.application is not None and self.environ is not None
        self.application(self.environ, self.start_response)


class _Player:
    """One HTTP response: writes the steps to the client's socket, in its own greenlet.

    Its methods raise OSError when the client has gone.
    """

    def __init__(self, handler: WSGIHandler, post: ReceivedPost | None) -> None:
        self._handler = handler
        self._post = post
        self._socket = handler.socket
        self._has_head = False
        self._is_chunked = False
        self._is_turn_due = False
        self._has_read_on = False
        self._due = time.monotonic()

    def play(self, steps: Iterable[Step]) -> Ended:
        """Act out all steps, then end the body in order; the connection may serve another one."""
        for step in steps:
            match step:
                case Head():
                    self._write(self._head(step))
                case Send(data, halt):
                    self._send(data, halt)
                case Raw(data):
                    self._write(data)
                case Pause(seconds):
                    # Measured from when the last pause was due, so that the pace holds; from now
                    # where a slow client took longer, so that no burst makes up for it.
                    now = time.monotonic()
                    self._due = max(self._due + seconds, now)
                    self._wait(self._due - now)
                case Stall(seconds):
                    self._wait(seconds)
                case Close() | Reset():
                    if isinstance(step, Reset):
                        # on, and 0 s: close() sends RST at once
                        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
                        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self._handler.close_connection = True
                    return Ended.CUT
                case _:
                    assert_never(step)
        if not self._has_head:
            self._write(self._head(Head()))
        if self._is_chunked:
            self._write(b"0\r\n\r\n")
        return Ended.FINISHED

    def _send(self, data: bytes, halt: Stall | None) -> None:
        if not data:  # as a chunk it would be the last one
            return
        if self._is_turn_due:
            self._wait(0)
        self._is_turn_due = True
        head = b"" if self._has_head else self._head(Head())
        framed = b"%x\r\n%s\r\n" % (len(data), data) if self._is_chunked else data
        if halt is None:
            self._write(head + framed)
            return
        half = len(framed) // 2
        self._write(head + framed[:half])
        self._wait(halt.seconds)
        self._write(framed[half:])

    def _head(self, head: Head) -> bytes:
        """Status line and headers; from here on it is known how the body is framed."""
        self._has_head = True
        handler = self._handler
        has_length = "Content-Length" in head.headers
        is_http11 = head.version == handler.request_version == "HTTP/1.1"
        self._is_chunked = is_http11 and not has_length
        if not (self._is_chunked or has_length):
            handler.close_connection = True
        headers = {**head.headers, "Date": email.utils.formatdate(usegmt=True)}
        if self._is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        if handler.close_connection:
            headers["Connection"] = "close"
        elif not is_http11:
            headers["Connection"] = "keep-alive"  # it has asked for it
        lines = [f"{head.version} {head.status.value} {head.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            sent = self._socket.send(left)
            left = left[sent:]
            if self._post is not None:
                self._post.sent_bytes += sent
            self._handler.response_length += sent  # else gevent could write an answer of its own

    def _wait(self, seconds: float | None) -> None:
        """Let `seconds` pass: 0 is one turn of the loop, None is for ever.

        Raises:
            OSError: the client has closed its end; at once, not when the time is up.
        """
        self._is_turn_due = False
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                wait_read(self._socket.fileno(), timeout=seconds)
            except TimeoutError:
                return
            if not self._socket.recv(1, socket.MSG_PEEK):
                raise _gone()
            seconds = None if until is None else max(until - time.monotonic(), 0)
            if self._has_read_on:
                break
            # It has pipelined its next request, and its end would hide behind that: out of the way.
            self._handler.rfile.peek(1)
            self._has_read_on = True
        if seconds is None:  # more than the buffer holds, and nobody would ever see the end
            raise _gone()
        gevent.sleep(seconds)


def _gone() -> ConnectionResetError:
    """What a client that has gone comes to, whether a write finds it out or a wait."""
    return ConnectionResetError(errno.ECONNRESET, "connection ended before its answer")


# ------------------------------------------------------------------------------------- the provider


class DemoProvider:
    """An OpenAI-compatible provider inside this process, on gevent; any API key is accepted.

    Serves `POST /v1/chat/completions` (streamed or whole), `GET /v1/models`, and for tests `GET`
    and `DELETE /v1/demo/requests`: what it was asked for, as `requests` and `forget_requests`. Each
    connection has a greenlet of its own, with keep-alive. A client that goes ends its stream at
    once, in the middle of a pause too. It cannot be told apart from one that only shuts its sending
    side down.

    Args:
        host: address to bind; loopback unless told otherwise, since nobody is asked for a key.
        port: 0 takes a free one, see `base_url`.
        tokens_per_second: pace of a stream, more than 0; `math.inf` is as fast as the client reads.

    Raises:
        ValueError: `tokens_per_second` is not above 0.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, tokens_per_second: float = TOKENS_PER_SECOND
    ) -> None:
        if not tokens_per_second > 0:  # so written, it refuses NaN too
            raise ValueError(f"tokens_per_second must be above 0, not {tokens_per_second}")
        self._address = (host, port)
        self._seconds_per_token = 1 / tokens_per_second
        self._server: WSGIServer | None = None
        self._connections = Pool()
        self._live_streams = 0
        self._idle = Event()
        self._idle.set()
        self._posts: deque[ReceivedPost] = deque(maxlen=MAX_KEPT_REQUESTS)
        self._post_count = 0
        self._attempts: Counter[str] = Counter()  # by model name, of scenarios that count them

    # ---- life

    def start(self) -> None:
        """Bind, listen, and return; does nothing when already started.

        Raises:
            OSError: the address cannot be bound.
        """
        if self._server is not None:
            return
        # Ours, since gevent's own leaks the socket when the address is taken.
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        listener = socket.create_server(self._address, family=family, backlog=1024)
        # Accepted sockets inherit it. Without, a token can wait for the last one's acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = WSGIServer(
            listener,
            self._application,
            spawn=self._connections,
            log=None,
            error_log=log,
            handler_class=_Handler,
            # Else pywsgi asks the DNS for the name of our own address, here, before it serves.
            environ={"SERVER_NAME": self._address[0]},
        )
        server.start()
        self._server = server
        log.info("demo provider listening on %s", self.base_url)

    def stop(self) -> None:
        """Stop listening and end every connection, live streams included (cut off, not finished).

        Returns when their greenlets are dead, within 1 s; does nothing when not started.
        """
        server, self._server = self._server, None
        if server is not None:
            server.stop(timeout=0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.stop()

    # ---- what can be seen from outside

    @property
    def base_url(self) -> str:
        """`http://HOST:PORT/v1`, as OpenAI clients want it: without a slash at its end.

        Raises:
            RuntimeError: not started, so there is no port yet.
        """
        if self._server is None:
            raise RuntimeError("the demo provider is not started")
        host = self._address[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/v1"

    @property
    def live_streams(self) -> int:
        """Answers under way: from the first step to the last, or to the client's end."""
        return self._live_streams

    def wait_idle(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no stream is live; False when that took longer than `timeout_seconds`."""
        return bool(self._idle.wait(timeout_seconds))

    @property
    def requests(self) -> list[ReceivedPost]:
        """The last 1,000 POSTs for a chat completion, oldest first: copies, as of now."""
        return [dataclasses.replace(post) for post in self._posts]

    def forget_requests(self) -> None:
        """Empty `requests`, begin again with number 1, and with every count of failures."""
        self._posts.clear()
        self._post_count = 0
        self._attempts.clear()

    # ---- one request

    def _application(
        self, environ: "WSGIEnvironment", _start_response: "StartResponse"
    ) -> Iterable[bytes]:
        handler: WSGIHandler = environ.pop(_HANDLER)  # popped: no cycle is left for the collector
        post = None
        ended = Ended.CUT
        try:
            body = environ["wsgi.input"].read(MAX_BODY_BYTES + 1)
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            if (method, path) == ("POST", _CHAT):
                post = self._begin_post(has_key="HTTP_AUTHORIZATION" in environ)
            ended = _Player(handler, post).play(self._answer(method, path, body, post))
        except OSError:
            ended = Ended.CLIENT_CLOSED
            handler.close_connection = True
        except gevent.GreenletExit:
            # Caught, for gevent would answer it with a 500, and wait for the rest of the body.
            handler.close_connection = True
            handler.wsgi_input = Input(handler.rfile, 0)
        except Exception:
            log.exception("demo provider failed in an answer")
            handler.close_connection = True
        finally:
            if post is not None:
                self._end_post(post, ended)
        return []

    def _begin_post(self, *, has_key: bool) -> ReceivedPost:
        self._live_streams += 1
        self._idle.clear()
        self._post_count += 1
        post = ReceivedPost(self._post_count, _milliseconds(), has_key)
        self._posts.append(post)
        return post

    def _end_post(self, post: ReceivedPost, ended: Ended) -> None:
        post.ended, post.ended_at = ended, _milliseconds()
        self._live_streams -= 1
        if not self._live_streams:
            self._idle.set()

    def _answer(
        self, method: str, path: str, body: bytes, post: ReceivedPost | None
    ) -> Iterable[Step]:
        """The steps that answer one request."""
        try:
            steps = self._route(method, path, body, post)
        except _RefusedError as refused:
            steps = refused.answer()
        except Exception:
            log.exception("demo provider failed on %s %s", method, path)
            error = error_object("The demo provider has a defect.", "server_error")
            steps = json_answer(HTTPStatus.INTERNAL_SERVER_ERROR, error)
        if method == "HEAD":
            # "The server MUST NOT send content in the response to a HEAD" (RFC 9110 §9.3.2)
            return [step for step in steps if isinstance(step, Head)]
        return steps

    def _route(
        self, method: str, path: str, body: bytes, post: ReceivedPost | None
    ) -> Iterable[Step]:
        allowed = _METHODS.get(path)
        if allowed is None:
            message = f"Invalid URL ({method} {path})"
            raise _RefusedError(HTTPStatus.NOT_FOUND, message, code="unknown_url")
        if method not in allowed:
            raise _RefusedError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"Not allowed to {method} on {path}.",
                code="method_not_supported",
                headers={"Allow": ", ".join(allowed)},
            )
        if len(body) > MAX_BODY_BYTES:
            message = f"The request body is larger than {MAX_BODY_BYTES} bytes."
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        if path == _MODELS:
            return json_answer(HTTPStatus.OK, _models())
        if path == _REQUESTS:
            if method == "DELETE":
                self.forget_requests()
            return json_answer(HTTPStatus.OK, [dataclasses.asdict(one) for one in self._posts])
        assert post is not None
        return self._chat(parse_chat(body), post)

    def _chat(self, request: ChatRequest, post: ReceivedPost) -> Iterable[Step]:
        post.model = request.model[:_KEPT_MODEL_CHARS]
        try:
            scenario, parameter = choose(request.model)
        except NoScenarioError as error:
            status = HTTPStatus.NOT_FOUND if error.is_unknown else HTTPStatus.BAD_REQUEST
            code = "model_not_found" if error.is_unknown else "invalid_value"
            raise _RefusedError(status, str(error), param="model", code=code) from None
        attempt = 1
        if scenario.counts_attempts and parameter is not None:
            self._attempts[request.model] += 1
            attempt = self._attempts[request.model]
        completion = Completion(
            request,
            completion_id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            seconds_per_token=self._seconds_per_token,
            parameter=parameter,
            attempt=attempt,
        )
        return (scenario.play if request.stream else scenario.whole)(completion)
