"""The embedded demo provider: a real HTTP server that plays scenarios, good answers and faults.

The gateway reaches it over loopback, with the same code as any other provider. From the outside in:

    server.py      `DemoProvider`: start, stop, routes
    request.py     the body of a chat completion request
    scenarios.py   the table of scenarios; a model name selects one
    player.py      acts out the steps of a scenario on the client's socket
    posts.py       the record of what the provider received

Sources: OpenAI API reference, "Chat" > "Create chat completion" and "Models" > "List models".
"""

import dataclasses
import logging
import socket
import time
import uuid
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

import gevent
from gevent.pool import Pool
from gevent.pywsgi import Input, WSGIHandler, WSGIServer

from llm.demo.answers import error_object, json_answer
from llm.demo.player import Player
from llm.demo.posts import Ended, PostLog, ReceivedPost
from llm.demo.request import RefusedError, parse_chat
from llm.demo.scenarios import (
    ALIASES,
    SCENARIOS,
    NoScenarioError,
    choose,
    describe_scenarios,
)
from llm.demo.steps import ChatRequest, Completion, Head, Step

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["TOKENS_PER_SECOND", "DemoProvider", "describe_scenarios"]

log = logging.getLogger(__name__)

TOKENS_PER_SECOND = 30.0  # a story takes half a minute: time to interrupt it by hand
MAX_BODY_BYTES = 16 * 1024 * 1024  # room for a long history, without filling the memory

_KEPT_MODEL_CHARS = 200  # above any real name; a request may contain one of megabytes

_CHAT, _MODELS, _REQUESTS = "/v1/chat/completions", "/v1/models", "/v1/demo/requests"
_METHODS = {_CHAT: ("POST",), _MODELS: ("GET",), _REQUESTS: ("GET", "DELETE")}
_HANDLER = "bargein.handler"  # the key of our handler in the WSGI environ


class _Handler(WSGIHandler):
    """gevent's handler reads the request; the application writes the response to the socket."""

    def get_environ(self) -> "WSGIEnvironment":
        environ = super().get_environ()
        environ[_HANDLER] = self
        return environ

    def run_application(self) -> None:
        assert self.application is not None and self.environ is not None
        self.application(self.environ, self.start_response)


class DemoProvider:
    """An OpenAI-compatible provider inside this process, on gevent; it accepts any API key.

    Serves `POST /v1/chat/completions` (streamed or whole), `GET /v1/models`, and for tests `GET`
    and `DELETE /v1/demo/requests`, which are `requests` and `forget_requests` here. Each connection
    has a greenlet of its own, with keep-alive. A client that disconnects ends its stream at once,
    also during a pause. So does one that only shuts down its sending side: the two look the same.

    Args:
        host: address to bind; loopback by default, since no key is checked.
        port: 0 takes a free one, see `base_url`.
        tokens_per_second: pace of a stream, above 0; `math.inf` is as fast as the client reads.

    Raises:
        ValueError: `tokens_per_second` is not above 0.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, tokens_per_second: float = TOKENS_PER_SECOND
    ) -> None:
        if not tokens_per_second > 0:  # written this way, it refuses NaN, too
            raise ValueError(f"tokens_per_second must be above 0, not {tokens_per_second}")
        self._address = (host, port)
        self._seconds_per_token = 1 / tokens_per_second
        self._server: WSGIServer | None = None
        self._connections = Pool()
        self._posts = PostLog()

    # ---- starting and stopping

    def start(self) -> None:
        """Bind, listen, and return; does nothing if already started.

        Raises:
            OSError: the address cannot be bound.
        """
        if self._server is not None:
            return
        # gevent's own listener would leak the socket when the address is taken.
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        listener = socket.create_server(self._address, family=family, backlog=1024)
        # Accepted sockets inherit it. Without it, a token can wait for the TCP ack of the last one.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = WSGIServer(
            listener,
            self._application,
            spawn=self._connections,
            log=None,
            error_log=log,
            handler_class=_Handler,
            # Otherwise pywsgi looks up the name of our own address in the DNS before it serves.
            environ={"SERVER_NAME": self._address[0]},
        )
        server.start()
        self._server = server
        log.info("demo provider listening on %s", self.base_url)

    def stop(self) -> None:
        """Stop listening and close every connection; live streams are cut off, not finished.

        Returns when their greenlets are dead, within 1 s; does nothing if not started.
        """
        server, self._server = self._server, None
        if server is not None:
            server.stop(timeout=0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self.stop()

    # ---- for clients and tests

    @property
    def base_url(self) -> str:
        """`http://HOST:PORT/v1`, as OpenAI clients expect it: without a slash at the end.

        Raises:
            RuntimeError: not started, so there is no port yet.
        """
        if self._server is None:
            raise RuntimeError("the demo provider is not started")
        host = self._address[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{self._server.server_port}/v1"

    def wait_idle(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no answer is under way; False where that takes longer."""
        return self._posts.wait_idle(timeout_seconds)

    @property
    def requests(self) -> list[ReceivedPost]:
        """The last 1,000 POSTs for a chat completion, oldest first: copies, as of now."""
        return self._posts.copies()

    def forget_requests(self) -> None:
        """Empty `requests`; restart the numbers and the counts of failures."""
        self._posts.clear()

    # ---- one request

    def _application(
        self, environ: "WSGIEnvironment", _start_response: "StartResponse"
    ) -> Iterable[bytes]:
        handler: WSGIHandler = environ.pop(_HANDLER)  # popped, so that no reference cycle remains
        post = None
        ended = Ended.CUT
        try:
            body = environ["wsgi.input"].read(MAX_BODY_BYTES + 1)
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            if (method, path) == ("POST", _CHAT):
                post = self._posts.begin(has_key="HTTP_AUTHORIZATION" in environ)
            ended = Player(handler, post).play(self._answer(method, path, body, post))
        except OSError:
            ended = Ended.CLIENT_CLOSED
            handler.close_connection = True
        except gevent.GreenletExit:
            # Caught, since gevent would answer with a 500 and wait for the rest of the body.
            handler.close_connection = True
            handler.wsgi_input = Input(handler.rfile, 0)
        except Exception:
            log.exception("demo provider failed while answering")
            handler.close_connection = True
        finally:
            if post is not None:
                self._posts.end(post, ended)
        return []

    def _answer(
        self, method: str, path: str, body: bytes, post: ReceivedPost | None
    ) -> Iterable[Step]:
        """The steps that answer one request."""
        try:
            steps = self._route(method, path, body, post)
        except RefusedError as refused:
            steps = refused.answer()
        except Exception:
            log.exception("demo provider failed on %s %s", method, path)
            error = error_object("The demo provider failed: this is a bug in it.", "server_error")
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
            raise RefusedError(HTTPStatus.NOT_FOUND, message, code="unknown_url")
        if method not in allowed:
            raise RefusedError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"Not allowed to {method} on {path}.",
                code="method_not_supported",
                headers={"Allow": ", ".join(allowed)},
            )
        if len(body) > MAX_BODY_BYTES:
            message = f"The request body is larger than {MAX_BODY_BYTES} bytes."
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        if path == _MODELS:
            return json_answer(HTTPStatus.OK, _models())
        if path == _REQUESTS:
            if method == "DELETE":
                self.forget_requests()
            return json_answer(HTTPStatus.OK, [dataclasses.asdict(post) for post in self.requests])
        assert post is not None
        return self._chat(parse_chat(body), post)

    def _chat(self, request: ChatRequest, post: ReceivedPost) -> Iterable[Step]:
        post.model = request.model[:_KEPT_MODEL_CHARS]
        try:
            scenario, parameter = choose(request.model)
        except NoScenarioError as error:
            status = HTTPStatus.NOT_FOUND if error.is_unknown else HTTPStatus.BAD_REQUEST
            code = "model_not_found" if error.is_unknown else "invalid_value"
            raise RefusedError(status, str(error), param="model", code=code) from None
        attempt = 1
        if scenario.counts_attempts and parameter is not None:
            attempt = self._posts.count_attempt(request.model)
        completion = Completion(
            request,
            completion_id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            seconds_per_token=self._seconds_per_token,
            parameter=parameter,
            attempt=attempt,
        )
        return (scenario.play if request.stream else scenario.whole)(completion)


def _models() -> dict[str, Any]:
    """The list of "model objects" (reference, "List models"); `created` is a made-up constant."""
    listed = [
        {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "bargein"}
        for name in (*SCENARIOS, *ALIASES)
    ]
    return {"object": "list", "data": listed}
