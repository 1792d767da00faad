"""The embedded demo provider: a real HTTP server on loopback that streams stories as a model would.

It is reached through exactly the code that reaches a real provider. From the outside in:

    DemoProvider   sockets, pacing, the count of live streams; plays a Reply, knows no chat
    reply_to       one HTTP request → one Reply. Pure: no I/O, and time is an argument
    Scenario       one chat completion → its steps: bytes to send and pauses. A pure generator

A further scenario is one more generator in `SCENARIOS`, under the model name that asks for it. What
cannot be said with bytes and pauses (a reset, say) is one more kind of `Step`, acted out in
`DemoProvider._play`, which holds the client's socket.

Sources: OpenAI API reference, "Chat" > "Create chat completion", "The chat completion chunk
object", "Models" > "List models", and the guide "Error codes"; WHATWG HTML §9.2 "Server-sent
events" (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

import errno
import json
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self, assert_never

import gevent
from gevent.event import Event
from gevent.pool import Pool
from gevent.pywsgi import WSGIHandler, WSGIServer
from gevent.socket import wait_read

from llm.stories import answer, short_answer, tokens

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)

DEFAULT_MODEL = "demo-story"
MAX_BODY_BYTES = 16 * 1024 * 1024  # a long history with room to spare, not a way to fill memory
_SOCKET = "bargein.socket"  # where our handler leaves the client's socket in the WSGI environ


# ---------------------------------------------------------------------------------- the vocabulary


@dataclass(frozen=True, slots=True)
class Send:
    """Write `data` to the client now, as one chunk of the body."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Let `seconds` pass since the previous pause was over; ends early when the client goes."""

    seconds: float


Step = Send | Pause


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP response. A body of bytes goes out whole; steps are played, and are a live stream.

    The header goes out with the first `Send`: a pause before it is a server slow to answer.
    """

    status: HTTPStatus
    headers: Mapping[str, str]
    body: bytes | Iterable[Step]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """The part of a request body that the demo provider acts on."""

    model: str
    user_text: str
    """Text of the last message of role `user`, "" where there is none."""
    prompt_tokens: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    """Bound on the tokens of the answer, at least 1; None: no bound."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer in the making: what a scenario has to work with."""

    request: ChatRequest
    completion_id: str
    created: int
    """Seconds since the epoch, the same on every chunk."""
    seconds_per_token: float


Scenario = Callable[[Completion], Iterator[Step]]


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
        self.headers = headers or {}


# ------------------------------------------------------------------------------------- the answers


def sse(data: str) -> Send:
    """One server-sent event with `data` (no line break in it), ended by its empty line (§9.2.5)."""
    return Send(f"data: {data}\n\n".encode())


def chunk(
    completion: Completion,
    delta: Mapping[str, object] | None,
    finish_reason: str | None = None,
    usage: Mapping[str, int] | None = None,
) -> Send:
    """One "chat completion chunk object" as an event; without a delta, its `choices` are empty.

    Where usage was asked for, "all other chunks will also include a `usage` field, but with a null
    value" (parameter `stream_options.include_usage`).
    """
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    body = _head(completion, "chat.completion.chunk")
    body["choices"] = [] if delta is None else [choice]
    if completion.request.include_usage:
        body["usage"] = usage
    return sse(_json(body))


def story(completion: Completion) -> Iterator[Step]:
    """The well-behaved provider: role, one event per token, finish reason, usage, `[DONE]`."""
    request = completion.request
    said, finish_reason = _within(tokens(answer(request.user_text)), request.max_tokens)
    yield chunk(completion, {"role": "assistant", "content": ""})
    for token in said:
        yield Pause(completion.seconds_per_token)
        yield chunk(completion, {"content": token})
    yield chunk(completion, {}, finish_reason)
    if request.include_usage:
        yield chunk(completion, None, usage=_usage(request, len(said)))
    yield sse("[DONE]")


SCENARIOS: dict[str, Scenario] = {DEFAULT_MODEL: story}
"""By model name. Any other name gets the story too, so that a configured model need not change."""


def _whole(completion: Completion) -> dict[str, Any]:
    """The "chat completion object", for `stream: false`: a short text, since it comes at once."""
    request = completion.request
    said, finish_reason = _within(tokens(short_answer(request.user_text)), request.max_tokens)
    message = {"role": "assistant", "content": "".join(said), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
    body = _head(completion, "chat.completion")
    return body | {"choices": [choice], "usage": _usage(request, len(said))}


def _head(completion: Completion, kind: str) -> dict[str, Any]:
    return {
        "id": completion.completion_id,
        "object": kind,
        "created": completion.created,
        "model": completion.request.model,
    }


def _within(said: list[str], max_tokens: int | None) -> tuple[list[str], str]:
    if max_tokens is None or len(said) <= max_tokens:
        return said, "stop"
    return said[:max_tokens], "length"


def _usage(request: ChatRequest, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": request.prompt_tokens + completion_tokens,
    }


def _json(body: object) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


# ------------------------------------------------------------------------------------- the request


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of `POST /v1/chat/completions`.

    Raises: _RefusedError (400) where the API reference demands what is not there, naming the
        parameter. What the demo has no use for (temperature, tools, …) is not looked at.
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
    stream_options = _field(fields, "stream_options", dict, "an object") or {}
    max_tokens = _max_tokens(fields, "max_completion_tokens")
    if max_tokens is None:  # "deprecated in favor of max_completion_tokens", and still sent by most
        max_tokens = _max_tokens(fields, "max_tokens")
    return ChatRequest(
        model=_printable(model),
        user_text=next((text for role, text in reversed(texts) if role == "user"), ""),
        prompt_tokens=sum(len(tokens(text)) for _, text in texts),
        stream=bool(_field(fields, "stream", bool, "a boolean")),
        include_usage=bool(_field(stream_options, "include_usage", bool, "a boolean")),
        max_tokens=max_tokens,
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


# ------------------------------------------------------------------------------------ HTTP, purely

_ROUTES = {"/v1/chat/completions": "POST", "/v1/models": "GET"}


def reply_to(
    method: str,
    path: str,
    body: bytes,
    *,
    completion_id: str,
    created: int,
    seconds_per_token: float,
) -> Reply:
    """Answer one HTTP request; never raises for what a client sent.

    Args:
        path: without its query.
        body: at most `MAX_BODY_BYTES` are taken; more is 413.
        completion_id: `chatcmpl-…`, given to the completion where there is one.
        created: seconds since the epoch.
        seconds_per_token: pause before each token of a stream.
    """
    try:
        wanted = _ROUTES.get(path)
        if wanted is None:
            message = f"Invalid URL ({method} {path})"
            raise _RefusedError(HTTPStatus.NOT_FOUND, message, code="unknown_url")
        if method != wanted:
            raise _RefusedError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"Not allowed to {method} on {path}.",
                code="method_not_supported",
                headers={"Allow": wanted},
            )
        if len(body) > MAX_BODY_BYTES:
            message = f"The request body is larger than {MAX_BODY_BYTES} bytes."
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        if path == "/v1/models":
            return _json_reply(HTTPStatus.OK, _models())
        request = parse_chat(body)
        completion = Completion(request, completion_id, created, seconds_per_token)
        if not request.stream:
            return _json_reply(HTTPStatus.OK, _whole(completion))
        steps = SCENARIOS.get(request.model, story)(completion)
        # A charset would do no harm, and no good: "event streams are always UTF-8" (§9.2.5).
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        return Reply(HTTPStatus.OK, headers, steps)
    except _RefusedError as refused:
        error = _error(str(refused), "invalid_request_error", refused.param, refused.code)
        return _json_reply(refused.status, error, refused.headers)


def describe_scenarios() -> str:
    """What model names there are, for people: a line each."""
    return "models:\n" + "\n".join(f"  {name}" for name in SCENARIOS)


def _models() -> dict[str, Any]:
    """The list of "model objects" (reference, "List models"); `created` is a made-up constant."""
    listed = [
        {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "bargein"}
        for name in SCENARIOS
    ]
    return {"object": "list", "data": listed}


def _error(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _json_reply(
    status: HTTPStatus, body: object, headers: Mapping[str, str] | None = None
) -> Reply:
    kind = {"Content-Type": "application/json"}
    return Reply(status, kind | dict(headers or {}), _json(body).encode("utf-8", "replace"))


# --------------------------------------------------------------------------------- HTTP, for real


class _Handler(WSGIHandler):
    """gevent's handler, which also tells the application which socket it is serving."""

    def get_environ(self) -> "WSGIEnvironment":
        environ = super().get_environ()
        environ[_SOCKET] = self.socket
        return environ


class DemoProvider:
    """An OpenAI-compatible provider inside this process, on gevent; any API key is accepted.

    Serves `POST /v1/chat/completions` (streamed or whole) and `GET /v1/models`, each connection on
    a greenlet of its own, with keep-alive. A client that goes ends its stream at once, in the
    middle of a pause too. It cannot be told apart from one that only shuts its sending side down.

    Args:
        host: address to bind; loopback unless told otherwise, since nobody is asked for a key.
        port: 0 takes a free one, see `base_url`.
        tokens_per_second: pace of a stream, more than 0; `math.inf` is as fast as the client reads.

    Raises:
        ValueError: `tokens_per_second` is not above 0.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, tokens_per_second: float = 30.0
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
        """Streams being told right now: from the first step to the last, or to the client's end."""
        return self._live_streams

    def wait_idle(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no stream is live; False when that took longer than `timeout_seconds`."""
        return bool(self._idle.wait(timeout_seconds))

    # ---- one request

    def _application(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        body = self._read_body(environ)
        method = environ["REQUEST_METHOD"]
        try:
            reply = reply_to(
                method,
                environ["PATH_INFO"],
                body,
                completion_id=f"chatcmpl-{uuid.uuid4().hex}",
                created=int(time.time()),
                seconds_per_token=self._seconds_per_token,
            )
        except Exception:
            log.exception("demo provider failed on %s %s", method, environ["PATH_INFO"])
            error = _error("The demo provider has a defect.", "server_error", None, None)
            reply = _json_reply(HTTPStatus.INTERNAL_SERVER_ERROR, error)
        start_response(f"{reply.status.value} {reply.status.phrase}", list(reply.headers.items()))
        if not isinstance(reply.body, bytes):
            return self._play(reply.body, environ[_SOCKET])
        # "The server MUST NOT send content in the response to a HEAD" (RFC 9110 §9.3.2)
        return [] if method == "HEAD" else [reply.body]

    @staticmethod
    def _read_body(environ: "WSGIEnvironment") -> bytes:
        try:
            return bytes(environ["wsgi.input"].read(MAX_BODY_BYTES + 1))
        except OSError as error:
            # pywsgi's word for a body that ends early; left as it is, it would print a traceback
            raise _gone() from error

    def _play(self, steps: Iterable[Step], client: socket.socket) -> Iterator[bytes]:
        """Act out the steps; pywsgi writes what is yielded, and closes us when it cannot."""
        self._live_streams += 1
        self._idle.clear()
        due = time.monotonic()
        try:
            for step in steps:
                match step:
                    case Send(data):
                        yield data
                    case Pause(seconds):
                        # Measured from when the last pause was due, so that the pace holds; from
                        # now where a slow client took longer, so that no burst makes up for it.
                        now = time.monotonic()
                        due = max(due + seconds, now)
                        _pause(client, due - now)
                    case _:
                        assert_never(step)
        except OSError:
            raise
        except Exception as defect:
            log.exception("demo provider failed in a stream")
            raise _gone() from defect
        finally:
            self._live_streams -= 1
            if not self._live_streams:
                self._idle.set()


def _gone() -> ConnectionResetError:
    """What pywsgi takes for "the client has gone": it closes the connection without a word."""
    return ConnectionResetError(errno.ECONNRESET, "connection ended before its answer")


def _pause(client: socket.socket, seconds: float) -> None:
    """Let `seconds` (0: one turn of the loop) pass.

    Raises:
        ConnectionResetError: the client has closed its end; at once, not when the time is up.
    """
    try:
        wait_read(client.fileno(), timeout=seconds)
    except TimeoutError:
        return
    if not client.recv(1, socket.MSG_PEEK):
        raise _gone()
    gevent.sleep(seconds)  # it has pipelined its next request, and the end would hide behind that
