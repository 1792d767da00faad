"""The log tells what happened in the order in which it happened, though it is written later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from gateway.wire.frames import HealthCheck
from tests.fakes import LIMIT
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.test_run import provider_arguments
from tests.test_session import Given


class Log:
    """A daemon, a client that is not registered yet, and the lines about it."""

    def __init__(self, daemon: Daemon, client: Client, provider: ProviderProcess) -> None:
        self.client = client
        self.provider = provider
        self._daemon = daemon

    def until(self, last: str) -> list[str]:
        """All lines of clients up to one with this event, in short words."""
        wait_until(lambda: f'"{last}"' in self._daemon.log, f"{last} is in the log", LIMIT)
        lines = [json.loads(line) for line in self._daemon.log.splitlines()]
        events = [_short(line) for line in lines if line["component"] != "SYS"]
        return events[: [event.split(":")[0] for event in events].index(last) + 1]

    def streaming(self) -> str:
        """A request whose answer has begun, and hangs."""
        script = self.provider.fresh(scripts.idle_mid_stream(["Once"]))
        request_id = self.client.request(script)
        self.client.wait_text(request_id)
        return request_id


def _short(line: dict[str, Any]) -> str:
    event: str = line["event"]
    match event:
        case "Received message":
            return f"{event}: {line['msg_type']}"
        case "Refused message":
            return f"{event}: {line['code']}"
    return event


@pytest.fixture
def log(provider: ProviderProcess) -> Iterator[Log]:
    arguments = (*provider_arguments(provider), "--log-format", "json", "--llm-retries", "0")
    with Daemon(*arguments) as daemon, Client(daemon.port, register=False) as client:
        yield Log(daemon, client, provider)


REGISTER = ["Received message: REGISTER", "Session registered"]


def test_a_registration(log: Log) -> None:
    log.client.register()
    assert log.until("Session registered") == REGISTER


def test_a_registration_that_is_refused(log: Log) -> None:
    log.client.register()
    log.client.send("REGISTER", {"auth": {"type": "API_KEY", "api_key": "x"}, "platform": "WEB"})
    log.client.wait_for(lambda frame: frame.msg_type == "ERROR")
    assert log.until("Refused message") == [
        *REGISTER,
        "Received message: REGISTER",
        "Refused message: MALFORMED_PAYLOAD",
    ]


def test_a_request_that_fails(log: Log) -> None:
    log.client.register()
    script = log.provider.fresh(scripts.http_error(401, "no"))
    log.client.wait_terminal(log.client.request(script))
    assert log.until("Generation failed") == [
        *REGISTER,
        "Received message: REQUEST",
        "Generation failed",
    ]


def test_an_interrupt(log: Log) -> None:
    log.client.register()
    request_id = log.streaming()
    log.client.interrupt(request_id)
    log.client.wait_terminal(request_id)
    assert log.until("LLM stream cancelled by user") == [
        *REGISTER,
        "Received message: REQUEST",
        "Received message: INTERRUPT",
        "Interrupt request details",
        "Interrupt acknowledged",
        "Request interrupted",
        "LLM stream cancelled by user",
    ]


def test_a_request_that_interrupts_another(log: Log) -> None:
    log.client.register()
    first = log.streaming()
    script = log.provider.fresh(scripts.answer(["Hello"]))
    log.client.request(script)
    log.client.wait_terminal(first)
    assert log.until("LLM stream cancelled by user") == [
        *REGISTER,
        "Received message: REQUEST",
        "Received message: REQUEST",
        "Request interrupted",
        "LLM stream cancelled by user",
    ]


def test_bad_frames_between_good_ones(log: Log) -> None:
    def refused(code: str) -> None:
        log.client.wait_for(lambda frame: frame.payload.get("error_code") == code)

    log.client.send_text(b"no JSON")
    refused("MALFORMED_PAYLOAD")
    log.client.send("SESSION_QUERY", {"query_fields": []})
    refused("SESSION_INVALID")
    log.client.register()
    log.client.send_text(b"[]")
    refused("MALFORMED_PAYLOAD")
    log.client.send_binary(b"no voice")
    refused("MALFORMED_PAYLOAD")
    log.client.send("SHUTDOWN", {"reason": "bye"}, session_id="sess_none")
    refused("SESSION_INVALID")
    log.client.close()
    assert log.until("Session ended") == [
        "Refused message: MALFORMED_PAYLOAD",
        "Received message: SESSION_QUERY",
        "Refused message: SESSION_INVALID",
        *REGISTER,
        "Refused message: MALFORMED_PAYLOAD",
        "Refused message: MALFORMED_PAYLOAD",
        "Received message: SHUTDOWN",
        "Refused message: SESSION_INVALID",
        "Session ended",
    ]


def test_frames_that_come_together(log: Log) -> None:
    """What came of a frame stands behind it, and before the frames that follow."""
    with log.client.one_packet():
        log.client.send("HEARTBEAT_REPLY", {"client_status": "OK"})
        log.client.send_text(b"no JSON")
        log.client.send("REGISTER", {"auth": {"type": "API_KEY", "api_key": "x"}, "platform": "TV"})
    log.client.wait_for(lambda frame: frame.msg_type == "REGISTER_ACK")
    assert log.until("Session registered") == [
        "Received message: HEARTBEAT_REPLY",
        "Refused message: SESSION_INVALID",
        "Refused message: MALFORMED_PAYLOAD",
        "Received message: REGISTER",
        "Session registered",
    ]


def test_a_client_that_says_goodbye_while_an_answer_comes(log: Log) -> None:
    log.client.register()
    log.streaming()
    log.client.send("SHUTDOWN", {"reason": "bye"})
    log.client.wait_closed()
    assert log.until("Session ended") == [
        *REGISTER,
        "Received message: REQUEST",
        "Received message: SHUTDOWN",
        "Request interrupted",
        "LLM stream cancelled by user",
        "Session ended",
    ]


# How it is done ----------------------------------------------------------------------------------


class Recorder:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append(f"info {event} {fields}")

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(f"warning {event} {fields}")

    def error(self, event: str, **fields: Any) -> None:
        self.lines.append(f"error {event} {fields}")


def test_a_late_log_writes_in_order_and_not_at_once() -> None:
    recorder = Recorder()
    late = DeferredLog(recorder)
    late.info("one", a=1)
    lanes().run_deferred(recorder.info, "two")
    late.warning("three")
    late.error("four", exc_info=None)
    assert recorder.lines == []
    lanes().wait_deferred()
    assert recorder.lines == [
        "info one {'a': 1}",
        "info two {}",
        "warning three {}",
        "error four {'exc_info': None}",
    ]


def test_what_was_received_is_queued_before_the_session_hears_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However soon that may have something to log."""
    lines: list[str] = []
    monkeypatch.setattr(
        "gateway.wire.attachment._log_received", lambda _frame: lines.append("received")
    )

    given = Given()
    monkeypatch.setattr(
        given.attachment, "_receive", lambda *_: lanes().run_deferred(lines.append, "caused")
    )
    given.tell(given.frame(HealthCheck()))
    lanes().wait_deferred()
    assert lines == ["received", "caused"]
