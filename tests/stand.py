"""A gateway under test with one client, and what is looked at after each test of a fault.

Whatever a provider does: the client gets one terminal frame per request; a request that failed has
one line at warning or above in the log, which says what the client was told, and no other request
has any; and the key, and what was said, is nowhere to be read.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import structlog
from prometheus_client import generate_latest

from gateway.app import Gateway
from metrics.logs import configure
from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.provider_process import PostEvent, ProviderProcess
from tests.harness.scripts import Script

Wire: TypeAlias = dict[str, Any]

KEY = "sk-very-secret-0123456789"
"""The key of every provider, unless a test says otherwise."""

ANSWER = "Once upon a time."
"""An answer that is nowhere to be found but in frames."""

SERIOUS = ("warning", "error", "critical")


class Stand:
    """One client in front of a gateway of its own, and the log.

    A user's text is the name of the script that answers it.
    """

    def __init__(
        self, gateway: Gateway, client: Client, provider: ProviderProcess, log: io.StringIO
    ) -> None:
        self.gateway = gateway
        self.client = client
        self.provider = provider
        self.scripts: dict[str, str] = {}
        """Name of the script of each request, by its id."""
        self.failed_at: dict[str, str] = {}
        """Name of the provider that failed a request, where it is not the first one."""
        self.secrets = [KEY]
        self._log = log
        self._has_left = False

    # Asking.

    def ask(self, steps: Script | str) -> str:
        """REQUEST that is answered with these steps (or the script of this name); returns its id.

        Does not wait.
        """
        script = steps if isinstance(steps, str) else self.provider.fresh(steps, "question")
        request_id = self.client.request(script, self.provider.unique("req"))
        self.scripts[request_id] = script
        return request_id

    def ask_in_turn(self, *answers: Script) -> str:
        """REQUEST whose first POST is answered with the first of these, and so on; the last one
        answers all that follow. Returns its id when the last but one is being played."""
        script = self.provider.unique("question")
        keys = [self.provider.unique("turn") for _ in answers[1:]]

        def define(number: int) -> None:
            held = [scripts.wait(keys[number])] if number < len(keys) else []
            self.provider.script(script, [*held, *answers[number]])

        define(0)
        request_id = self.ask(script)
        for number, key in enumerate(keys, 1):
            self.provider.wait_post(number, script)
            define(number)
            self.provider.release(key)
        return request_id

    def complete(self, steps: Script | str) -> Wire:
        """REQUEST that is answered; returns the payload of its terminal frame."""
        return self.wait_completed(self.ask(steps))

    def wait_completed(self, request_id: str) -> Wire:
        end = self.client.wait_terminal(request_id)
        assert end.msg_type == "RESPONSE", end
        assert end.payload["outcome"] == "COMPLETED"
        return end.payload

    def fail(self, steps: Script | str, code: str = "INTERNAL_ERROR") -> str:
        """REQUEST that fails with this code; returns the error's detail."""
        return self.wait_failed(self.ask(steps), code)["error_detail"]  # type: ignore[no-any-return]

    def wait_failed(self, request_id: str, code: str = "INTERNAL_ERROR") -> Wire:
        """The payload of its terminal frame."""
        end = self.client.wait_terminal(request_id)
        assert end.msg_type == "ERROR", end
        assert end.payload["error_code"] == code
        assert end.payload["outcome"] == "FAILED"
        assert end.payload["retryable"] is True
        assert end.payload["error_detail"]
        return end.payload

    def interrupt(self, request_id: str, *, is_refused: bool = False) -> Wire:
        """INTERRUPT; returns what its ack says of the request, which was stopped.

        Args:
            request_id: of a request that is live.
            is_refused: its last POST was answered, and its connection may be kept. Otherwise the
                provider has seen that one closed on return.
        """
        self.client.interrupt(request_id)
        ack = self.client.wait_ack().payload
        assert ack["status"] == "SUCCESS"
        assert ack["interrupted_request_ids"] == [request_id]
        [result] = ack["results"]
        assert result["outcome"] == "STOPPED"
        for post in self.posts(request_id)[-1:]:
            if not is_refused:
                self.provider.wait_closed(post.conn)
        return result  # type: ignore[no-any-return]

    def wait_interrupted(self, request_id: str) -> Wire:
        """The payload of its terminal frame."""
        end = self.client.wait_terminal(request_id)
        assert end.msg_type == "RESPONSE", end
        assert end.payload["interrupted"] is True
        assert end.payload["outcome"] == "INTERRUPTED"
        return end.payload

    def leave(self) -> None:
        """Close the client's connection in order."""
        if not self._has_left:
            self._has_left = True
            self.client.close()

    def text_of(self, request_id: str) -> str:
        return self.client.text_of(request_id)

    # What the provider saw, and the log says.

    def posts(self, request_id: str) -> list[PostEvent]:
        """Every POST for a request, up to now."""
        self.provider.counts()
        return self.provider.posts(self.scripts[request_id])

    def wait_post(self, request_id: str, number: int = 1) -> PostEvent:
        return self.provider.wait_post(number, self.scripts[request_id])

    def lines(self, event: str | None = None) -> list[Wire]:
        """The log so far, or its lines about this event."""
        lines = [json.loads(line) for line in self._log.getvalue().splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    def wait_line(self, event: str, number: int = 1) -> Wire:
        wait_until(lambda: len(self.lines(event)) >= number, f"the log has {number} of {event!r}")
        return self.lines(event)[number - 1]

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.gateway.metrics.registry.get_sample_value(f"bargein_{name}", labels) or 0.0

    # What holds whatever the fault was.

    def check(self) -> None:
        """Ends the gateway, too."""
        health = self._get_health()
        metrics = generate_latest(self.gateway.metrics.registry).decode()
        self.leave()
        self.gateway.stop()  # what is counted and logged late is there then
        self._check_all_closed()
        self._check_terminals()
        frames = json.dumps([(frame.msg_type, frame.payload) for frame in self.client.frames])
        log = self._log.getvalue()
        for secret in self.secrets:
            for place, text in [
                ("the frames", frames),
                ("the log", log),
                ("/health", health),
                ("/metrics", metrics),
            ]:
                assert secret not in text, f"{secret!r} is in {place}: {text}"
        for request_id, script in self.scripts.items():
            assert script not in log, "what the user said is in the log"
            answer = self.text_of(request_id)
            assert len(answer) < 4 or answer not in log, "the answer is in the log"
        self._check_log()

    def _terminals(self) -> dict[str, list[Received]]:
        return {
            request_id: [frame for frame in self.client.frames_of(request_id) if frame.is_terminal]
            for request_id in self.scripts
        }

    def _check_all_closed(self) -> None:
        for request_id in self.scripts:
            for post in self.posts(request_id):
                self.provider.wait_closed(post.conn)

    def _check_terminals(self) -> None:
        for request_id, ends in self._terminals().items():
            frames = self.client.frames_of(request_id)
            assert ends == frames[-1:], f"the frames of {request_id}: {frames}"
            seqs = [frame.payload["text_stream_seq"] for frame in frames[:-1]]
            assert seqs == list(range(len(seqs)))

    def _check_log(self) -> None:
        expected = []
        for request_id, ends in self._terminals().items():
            for end in (end for end in ends if end.msg_type == "ERROR"):
                first = urlsplit(self.gateway.provider.base_url)
                name = f"{first.hostname}:{first.port}"
                expected.append(
                    {
                        "component": "LLM",
                        "level": "warning",
                        "event": "Generation failed",
                        "error": end.payload["error_detail"],
                        "provider": self.failed_at.get(request_id, name),
                        "session_id": self.client.session_id,
                        "request_id": request_id,
                    }
                )
        whose = (None, self.client.session_id)
        serious = [
            line
            for line in self.lines()
            if line["level"] in SERIOUS
            and line.get("session_id") in whose
            and line["event"] != "Provider left alone"
        ]
        for line in serious:
            del line["timestamp"]
        assert serious == expected, f"serious lines of the log:\n{serious}\nexpected:\n{expected}"

    def _get_health(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.server.port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.status == 200
            headers = str(response.headers)
            return headers + response.read().decode()


MakeStand: TypeAlias = Callable[..., Stand]


@contextlib.contextmanager
def stands(make_gateway: Callable[..., Gateway], provider: ProviderProcess) -> Iterator[MakeStand]:
    """Make stands from keyword arguments of `make_gateway`; each is checked on leaving."""
    made: list[Stand] = []

    with kept_log() as log:

        def make(**fields: Any) -> Stand:
            gateway = make_gateway(**{"api_key": KEY, "ca_file": provider.ca_file, **fields})
            stand = Stand(gateway, Client(gateway.server.port), provider, log)
            made.append(stand)
            return stand

        try:
            yield make
            for stand in made:
                stand.check()
        finally:
            for stand in made:
                stand.client.drop()


@contextlib.contextmanager
def kept_log() -> Iterator[io.StringIO]:
    """The process's log, from debug on, one JSON object a line."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    log = io.StringIO()
    configure("debug", "json", log)
    structlog.configure(cache_logger_on_first_use=False)  # else they would keep this stream
    try:
        yield log
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()


def refusal(
    status: int,
    message: str = "no",
    headers: dict[str, str] | None = None,
    *,
    secrets: Sequence[str] = (KEY,),
) -> Script:
    """An error answer that echoes what is secret wherever it can."""
    said = f"{message} {' '.join(secrets)}".strip()
    echoes = {"X-Echo": " ".join(secrets), "WWW-Authenticate": f'Bearer realm="{secrets[0]}"'}
    body = {"error": {"message": said, "type": secrets[0], "code": secrets[0]}}
    return scripts.http_error(status, body, echoes | (headers or {}))
