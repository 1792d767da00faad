"""A real gateway, and a demo provider behind it, as processes of their own.

    with run_gateway(model="story") as gateway, gateway.connect() as client:
        ...

The caller's process stays as it is: it imports nothing of the gateway, and patches nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from typing import Any, Literal

import msgspec
from bargein.gateway.client import WaitTimeout

from .chat import ChatClient
from .daemon import LISTENING
from .log_mark import complete_log, lines_before, mark_log
from .process import ROOT, Process, ProcessFailed, environment, last_lines

_LAUNCHER = """
import _thread, os, runpy, sys

def end_with_caller(read=os.read, end=os._exit):
    while read(0, 1024):
        pass
    end(1)

_thread.start_new_thread(end_with_caller, ())
runpy.run_path(os.path.join(sys.argv.pop(1), "run.py"), run_name="__main__")
"""
"""Runs our run.py by its place, so that neither the caller's folder nor its PYTHONPATH can put
another one before it; run.py does the same for its packages. Standard input ends with the caller,
however it ends; the thread that waits for that does nothing else, so gevent need not know of it."""

_PROVIDER_LISTENING = re.compile(r"listening on (?P<url>http://127\.0\.0\.1:(?P<port>\d+)/v1)\n")
_HTTP_SECONDS = 10.0
_POLL_SECONDS = 0.005


class StartFailed(Exception):
    """A process ended, or did not become ready in time; the message shows the end of its log."""


class ProviderRequest(msgspec.Struct, frozen=True):
    """One completion that the demo provider was asked for."""

    number: int
    """In the order of arrival, from 1."""
    received_at: int
    """Milliseconds since the epoch."""
    has_key: bool
    """Whether it came with a key. The provider does not keep the key."""
    model: str | None
    """The scenario that the gateway asked for."""
    ended: Literal["finished", "client_closed", "cut"] | None
    """How its answer ended: all was sent, the gateway closed the stream, or the provider closed it
    as its scenario says; None while it is live."""
    ended_at: int | None
    """Milliseconds since the epoch."""
    sent_bytes: int
    """Bytes of the answer that the provider's kernel has taken."""


class RunningProvider:
    """A running demo provider."""

    def __init__(self, process: Process, found: re.Match[str]) -> None:
        self._process = process
        self.base_url = found["url"]
        """For an OpenAI client."""
        self._port = int(found["port"])

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._process.log

    def requests(self) -> list[ProviderRequest]:
        """The completions that it was asked for, in order."""
        return self._requests(_HTTP_SECONDS)

    def wait_ended(self, number: int | None = None, *, timeout: float = 5.0) -> ProviderRequest:
        """Wait until a completion has ended. The provider sees that a moment after the ack.

        Args:
            number: of the completion; None is the latest.
            timeout: seconds for all of it.

        Raises:
            WaitTimeout: the time is up; the message shows them all.
        """
        until = time.monotonic() + timeout
        requests: list[ProviderRequest] = []
        with contextlib.suppress(TimeoutError):  # the provider does not answer in time
            while True:
                requests = self._requests(max(until - time.monotonic(), _POLL_SECONDS))
                of_it = [one for one in requests if number in (None, one.number)]
                if of_it and of_it[-1].ended is not None:
                    return of_it[-1]
                if time.monotonic() > until:
                    break
                time.sleep(_POLL_SECONDS)  # the provider sends no event
        which = "the latest completion" if number is None else f"completion {number}"
        raise WaitTimeout(f"{timeout} s are over, until {which} has ended: {requests}")

    def forget_requests(self) -> None:
        """Start over: from now on, `requests()` has later ones only."""
        _http(self._port, "DELETE", "/v1/demo/requests")

    def _requests(self, timeout: float) -> list[ProviderRequest]:
        body = _http(self._port, "GET", "/v1/demo/requests", timeout)
        return msgspec.json.decode(body, type=list[ProviderRequest])


class RunningGateway:
    """A running gateway.

    Args:
        process: of the gateway.
        provider: behind it.
        timeout: seconds that any wait of its clients may take.
        auth: the credentials of its clients.
    """

    def __init__(
        self,
        process: Process,
        found: re.Match[str],
        provider: RunningProvider | None,
        timeout: float,
        auth: Mapping[str, str] | None = None,
    ) -> None:
        self._process = process
        self._provider = provider
        self._client_timeout = timeout
        self._register = {} if auth is None else {"auth": dict(auth)}
        self._clients: list[ChatClient] = []
        """Those that may be open."""
        self.url = found["url"]
        """Where clients connect to."""
        self.port = int(found["port"])

    @property
    def provider(self) -> RunningProvider:
        """The demo provider behind it. RuntimeError for a gateway with `llm_url`."""
        if self._provider is None:
            raise RuntimeError("this gateway was started with llm_url, without a demo provider")
        return self._provider

    def connect(self, *, timeout: float | None = None, **register: Any) -> ChatClient:
        """Connect a new client and register it; it is closed with the gateway at the latest.

        Args:
            timeout: seconds that any of its waits may take; None is the gateway's `client_timeout`.
            register: fields of its REGISTER frame, `system_prompt` for example; `auth` in place of
                the gateway's.

        Raises:
            FrameRefused: the gateway refused the registration.
        """
        timeout = self._client_timeout if timeout is None else timeout
        client = ChatClient(self.port, timeout=timeout, **self._register | register)
        ended = [one for one in self._clients if one.connection.has_ended]
        for one in ended:  # where only its end was read, its socket is still open
            one.drop()
            self._clients.remove(one)
        self._clients.append(client)
        return client

    @property
    def log(self) -> str:
        """What it has logged so far, a line for each event; also after it has ended."""
        return self._process.log

    @property
    def log_size(self) -> int:
        """How long its log is now, in bytes."""
        return self._process.log_size

    def recent_log(self, since: int = 0) -> str:
        """The end of its log, with everything that happened before this call.

        Args:
            since: leave out what it had logged when `log_size` was this.
        """

        def read() -> str:
            return self._process.log_since(since)

        return last_lines(read() if self.exit_code is not None else complete_log(read, self.port))

    def health(self) -> dict[str, Any]:
        """The response to `GET /health`."""
        health: dict[str, Any] = json.loads(_http(self.port, "GET", "/health"))
        return health

    @property
    def exit_code(self) -> int | None:
        """0 after an end in order, -9 when it had to be killed; None while it runs."""
        return self._process.exit_code

    def terminate(self) -> None:
        """Ask it to stop, as an operator does: its clients get SHUTDOWN. Does not wait."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()

    def drop_clients(self) -> None:
        """Close the sockets of all its clients at once."""
        while self._clients:
            self._clients.pop().drop()


@contextlib.contextmanager
def run_gateway(
    *arguments: str,
    model: str = "story",
    llm_url: str | None = None,
    tokens_per_second: float = 300.0,
    port: int = 0,
    env: Mapping[str, str] | None = None,
    auth: Mapping[str, str] | None = None,
    log_level: str = "info",
    client_timeout: float = 10.0,
    process_timeout: float = 15.0,
) -> Iterator[RunningGateway]:
    """Start a gateway, behind it a demo provider, and stop both on leaving.

    Args:
        arguments: more of the gateway's command line: see `bargein serve --help`.
        model: that the gateway asks the provider for. The demo provider's models are scenarios: see
            `bargein demo-llm --help`.
        llm_url: of another provider, in place of the demo provider.
        tokens_per_second: speed of the demo provider, above 0; at 300 a story takes about 3 s.
        port: of the gateway, on 127.0.0.1; 0 takes a free port.
        env: more environment variables of the gateway. It gets ours too, except those that start
            with `OPENAI_`.
        auth: the credentials of its clients, where the gateway needs some (`--auth-file`):
            `{"type": "API_KEY", "api_key": …}`, or `{"type": "ACCOUNT", …}` with `account` and
            `password`.
        log_level: of the gateway: debug, info, warning or error.
        client_timeout: seconds that any wait of its clients may take.
        process_timeout: seconds that a process may take to start, or to end before it is killed.

    Raises:
        StartFailed: a process did not start; the message shows the end of its log.
    """
    with contextlib.ExitStack() as stack:
        provider = None
        if llm_url is None:
            demo = ["demo-llm", "--port", "0", "--tokens-per-second", str(tokens_per_second)]
            process, found = _start(stack, demo, None, _PROVIDER_LISTENING, process_timeout)
            provider = RunningProvider(process, found)
            llm_url = provider.base_url
        own = ["--llm-url", llm_url, "--llm-model", model, "--port", str(port)]
        form = ["--log-level", log_level, "--log-format", "text"]
        process, found = _start(
            stack, ["serve", *own, *form, *arguments], env, LISTENING, process_timeout
        )
        gateway = RunningGateway(process, found, provider, client_timeout, auth)
        stack.callback(gateway.drop_clients)  # else it would wait for them to say goodbye
        try:
            yield gateway
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # what pytest.fail() raises is no Exception
            marker = mark_log(gateway.port)
            gateway.drop_clients()
            process.stop()  # it writes its last lines
            shown = last_lines(lines_before(process.log, marker))
            error.add_note(f"The end of the gateway's log:\n{shown}")
            raise


def _start(
    stack: contextlib.ExitStack,
    arguments: list[str],
    env: Mapping[str, str] | None,
    ready: re.Pattern[str],
    timeout: float,
) -> tuple[Process, re.Match[str]]:
    """Run a command of ours until it prints that it is ready; the stack stops it."""
    process = Process(
        ["-P", "-c", _LAUNCHER, str(ROOT), *arguments],
        env=environment(env),
        tied=True,
        timeout=timeout,
    )
    stack.callback(process.stop)
    try:
        return process, process.wait_for_line(ready)
    except ProcessFailed as error:
        raise StartFailed(f"`bargein {' '.join(arguments)}` did not start: {error}") from None


def _http(port: int, method: str, path: str, timeout: float = _HTTP_SECONDS) -> bytes:
    """The body of a response from a server on this machine.

    Args:
        port: of the server.
        method: of the request.
        path: of the request.
        timeout: seconds for connecting, and for each read.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path}: {response.status} {body.decode()[:200]}")
        return body
