"""`run.py doctor`: well on a healthy daemon, and right about the ill ones.

A real daemon where one can be made ill; else `Fake`, a gateway in miniature that answers everything
at once, and whose children have one illness each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import gevent
import gevent.server
import pytest
import trustme
from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.server import ServerProtocol

from gateway.client import AccountAuth, ApiKeyAuth, connection
from gateway.doctor import command, pages, steps, stopping
from gateway.doctor import target as targets
from gateway.doctor.counts import Counts, read_counts
from gateway.doctor.examination import examine
from gateway.doctor.report import Report, Result, Status, TextRenderer, print_json
from gateway.doctor.steps import STEPS
from gateway.doctor.target import UsageError, auth_of, ops_url, target_of, websocket_url
from gateway.doctor.visit import Limits
from tests.harness.client import wait_until
from tests.harness.daemon import Daemon, run_to_the_end

LIMIT = 15.0  # seconds; bounds a failure, and no success waits for it
KEY = "sk-0123456789abcdef-never-shown"

ALL = [step.name for step in STEPS]
WITHOUT_METRICS = [name for name in ALL if name != "metrics"]
IN_MID_STREAM = ["interrupt", "old_stops", "new_starts"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(autouse=True)
def nothing_in_the_usual_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever runs the tests may have a daemon of their own, with metrics of its own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # taken, and nobody listens
        usual = f"http://127.0.0.1:{sock.getsockname()[1]}/metrics"
        monkeypatch.setattr(targets, "DEFAULT_OPS_URL", usual)
        yield


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def examined(
    url: str | int,
    *words: str,
    wait: float = LIMIT,
    quiet: float = 0.05,
    whole: float | None = None,
    env: dict[str, str] | None = None,
) -> Report:
    """The report on what is at a URL, or at a port of this machine."""
    url = f"ws://127.0.0.1:{url}" if isinstance(url, int) else url
    target = target_of(arguments("--url", url, *words), env or {})
    return examine(target, Limits(wait, quiet, whole))


def named(report: Report, status: Status) -> list[str]:
    return [one.step.name for one in report.results if one.status is status]


def of(report: Report, name: str) -> Result:
    assert [one.step.name for one in report.results] == ALL
    return next(one for one in report.results if one.step.name == name)


def only_failed(report: Report, name: str) -> Result:
    """That step, which failed, and no other did."""
    assert named(report, Status.FAILED) == [name], report.as_json()
    assert not report.holds
    result = of(report, name)
    assert result.seen
    assert result.advice
    return result


@contextlib.contextmanager
def listening(
    serve: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """A port whose connections are served like this, each in a greenlet."""

    def handle(sock: socket.socket, _address: object) -> None:
        with contextlib.suppress(OSError):  # the doctor has gone
            serve(sock)

    more: dict[str, Any] = {} if tls is None else {"ssl_context": tls}
    server = gevent.server.StreamServer(("127.0.0.1", 0), handle, **more)
    server.start()
    port = server.server_port
    assert port is not None
    try:
        yield port
    finally:
        server.stop(timeout=0.1)


# A gateway in miniature --------------------------------------------------------------------------


class Fake:
    """A well-behaved gateway that says 25 pieces of an answer at once, and then no more of it.

    The connection that it serves is `self.socket`; one at a time is enough.
    """

    pieces = 25
    health: ClassVar[dict[str, Any]] = {
        "status": "ok",
        "version": "0.1.0",
        "uptime_seconds": 90.0,
        "sessions": 1,
        "requests": 0,
    }

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.counts = {"requests": 0, "interrupts": 0, "acknowledged": 0, "stream_closed": 0}
        self.asked: list[str] = []
        self.heard: list[str] = []
        self.registrations: list[dict[str, Any]] = []
        self.live: list[str] = []
        self.said: dict[str, int] = {}
        self._listening = listening(self._serve, tls)

    def __enter__(self) -> Self:
        self.port = self._listening.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.__exit__(None, None, None)

    # Bytes.

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        protocol = ServerProtocol()
        while data := sock.recv(65536):
            protocol.receive_data(data)
            for event in protocol.events_received():
                if isinstance(event, Request):
                    answer = self.answer_http(event.path) or protocol.accept(event)
                    protocol.send_response(answer)
                elif isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                    self._wire = sock, protocol
                    frame = json.loads(bytes(event.data))
                    self.take(frame["msg_type"], frame["payload"])
            self._flush(sock, protocol)

    def _flush(self, sock: socket.socket, protocol: ServerProtocol) -> None:
        for data in protocol.data_to_send():
            if data:
                sock.sendall(data)
            else:
                sock.shutdown(socket.SHUT_WR)

    def close(self, code: int = 1000, reason: str = "") -> None:
        self._wire[1].send_close(code, reason)

    # HTTP.

    def answer_http(self, path: str) -> Response | None:
        self.asked.append(path)
        if path.endswith("/health"):
            return self.page(json.dumps(self.health))
        if path == "/metrics":
            return self.page(self.metrics())
        return None

    def page(self, text: str) -> Response:
        headers = Headers({"Content-Length": str(len(text)), "Connection": "close"})
        return Response(200, "OK", headers, text.encode())

    def metrics(self) -> str:
        counts = self.counts
        seconds = "bargein_interrupt_seconds_count"
        return (
            "# TYPE bargein_requests_total counter\n"
            f'bargein_requests_total{{outcome="completed"}} 7\n'
            f'bargein_requests_total{{outcome="interrupted"}} {counts["requests"]}\n'
            "# TYPE bargein_interrupts_total counter\n"
            f'bargein_interrupts_total{{reason="USER_STOP"}} {counts["interrupts"]}\n'
            f'{seconds}{{stage="acknowledged"}} {counts["acknowledged"]}\n'
            f'{seconds}{{stage="stream_closed"}} {counts["stream_closed"]}\n'
        )

    # Frames.

    def take(self, msg_type: str, payload: dict[str, Any]) -> None:
        self.heard.append(msg_type)
        match msg_type:
            case "REGISTER":
                self.registrations.append(payload)
                self.on_register(payload)
            case "REQUEST":
                self.on_request(payload["request_id"])
            case "INTERRUPT":
                self.on_interrupt(payload)

    def say(self, msg_type: str, **payload: Any) -> None:
        frame = {"version": "1.0", "session_id": "sess_1", "timestamp": 0}
        sock, protocol = self._wire
        protocol.send_text(json.dumps(frame | {"msg_type": msg_type, "payload": payload}).encode())
        self._flush(sock, protocol)

    def say_error(self, code: str, detail: str, **more: Any) -> None:
        self.say(
            "ERROR", error_code=code, error_msg="", error_detail=detail, retryable=False, **more
        )

    def on_register(self, _payload: dict[str, Any]) -> None:
        self.say(
            "REGISTER_ACK",
            status="SUCCESS",
            message="",
            session_id="sess_1",
            session_timeout_seconds=0,
        )

    def on_request(self, request_id: str) -> None:
        for old in self.live.copy():
            self.end(old)
        self.live.append(request_id)
        self.answer(request_id)

    def answer(self, request_id: str) -> None:
        for _ in range(self.pieces):
            self.piece(request_id)

    def piece(self, request_id: str, text: str | None = None) -> None:
        seq = self.said.get(request_id, 0)
        self.said[request_id] = seq + 1
        text = f"{request_id}/{seq} " if text is None else text
        self.say("RESPONSE", request_id=request_id, text_stream_seq=seq, content={"text": text})

    def on_interrupt(self, payload: dict[str, Any]) -> None:
        target = payload.get("interrupt_request_id")
        targets = self.live.copy() if target is None else [target]
        stopped = [one for one in targets if one in self.live]
        self.ack(payload, targets, stopped)
        for one in stopped:
            self.end(one)

    def ack(self, payload: dict[str, Any], targets: list[str], stopped: list[str]) -> None:
        self.counts["interrupts"] += len(targets)
        self.counts["stream_closed"] += len(stopped)
        self.counts["acknowledged"] += 1
        results = [
            {
                "request_id": one,
                "outcome": "STOPPED" if one in stopped else "ALREADY_DONE",
                "delivered_text_chars": 1,
                "stream_closed_ms": 0.5 if one in stopped else None,
            }
            for one in targets
        ]
        self.say(
            "INTERRUPT_ACK",
            interrupted_request_ids=stopped,
            status="SUCCESS" if stopped else "FAILED",
            message="",
            results=results,
            **self.echo(payload),
        )

    def echo(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {key: payload[key] for key in payload.keys() & {"interrupt_request_id"}}

    def end(self, request_id: str, **more: Any) -> None:
        self.live.remove(request_id)
        self.counts["requests"] += 1
        last = {"interrupted": True, "interrupt_reason": "USER_STOP", "outcome": "INTERRUPTED"}
        self.say(
            "RESPONSE",
            **{"request_id": request_id, "text_stream_seq": -1, "content": {}, **last, **more},
        )


# A healthy daemon --------------------------------------------------------------------------------


def test_all_is_well_with_a_healthy_daemon() -> None:
    """As people run it: both are processes, with the real 2 s of silence."""
    ops = free_port()
    with Daemon("--ops-port", str(ops)) as daemon:
        words = ["--url", f"ws://127.0.0.1:{daemon.port}", "--ops-url", f"127.0.0.1:{ops}"]
        done = run_to_the_end("doctor", *words, "--json", timeout=60)
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["url"] == f"ws://127.0.0.1:{daemon.port}/ws/agent/stream"
    assert [step["step"] for step in report["steps"]] == ALL
    for step in report["steps"]:
        assert step["status"] == "ok"
        assert step["ok"] is True
        assert step["seen"]
        assert step["advice"] is None
    by_name = {step["step"]: step for step in report["steps"]}
    assert by_name["old_stops"]["ms"] > 1500
    assert "INTERRUPT_ACK after" in by_name["interrupt"]["seen"]
    assert "5 requests" in by_name["metrics"]["seen"]
    assert report["seconds"] < 40


def test_a_daemon_without_metrics_is_well_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "Limits", partial(Limits, quiet=0.05))
    with Daemon("--ops-port", "0") as daemon:
        assert command.main(arguments("--url", f"http://localhost:{daemon.port}/"), {}) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == f"bargein doctor: ws://localhost:{daemon.port}/ws/agent/stream"
    assert [line[0] for line in lines[1:-3]] == ["✓"] * len(WITHOUT_METRICS)
    assert lines[-3].startswith("– The metrics moved")
    assert lines[-2] == "    → Give their address as --ops-url."
    assert lines[-1].startswith("All is well; the metrics were not checked.")
    assert "\x1b" not in shown


@pytest.mark.parametrize("policy", ["parallel", "reject"])
def test_the_policy_for_new_requests_does_not_matter(policy: str) -> None:
    with Daemon("--ops-port", "0", "--on-new-request", policy) as daemon:
        report = examined(daemon.port)
    assert named(report, Status.OK) == WITHOUT_METRICS, report.as_json()
    assert report.holds


@pytest.mark.parametrize("model", ["slow:0.1", "fast", "flood", "story-zh"])
def test_all_is_well_with_providers_of_any_pace(model: str) -> None:
    with Daemon("--ops-port", "0", "--llm-model", model) as daemon:
        report = examined(daemon.port)
    assert named(report, Status.OK) == WITHOUT_METRICS, report.as_json()


def test_the_gateway_in_miniature_is_well() -> None:
    """Else its children would prove nothing."""
    with Fake() as fake:
        report = examined(fake.port, "--ops-url", f"http://127.0.0.1:{fake.port}")
    assert named(report, Status.OK) == ALL, report.as_json()
    assert report.holds


# Ill providers -----------------------------------------------------------------------------------


def test_a_provider_that_is_down_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    provider = ["--llm-url", url, "--llm-model", "m", "--llm-retries", "0"]
    with Daemon("--ops-port", "0", *provider) as daemon:
        report = examined(daemon.port)
    failed = only_failed(report, "stream")
    assert "no connection to the provider: Connection refused" in failed.seen
    assert "--llm-url" in failed.advice
    assert set(IN_MID_STREAM) <= set(named(report, Status.SKIPPED))


def test_a_provider_that_never_begins_is_named_and_interrupts_are_tried_all_the_same() -> None:
    with Daemon("--ops-port", "0", "--llm-model", "stall-first-event") as daemon:
        report = examined(daemon.port, wait=1.0)
    failed = only_failed(report, "stream")
    assert failed.seen.startswith("no first token within 1")
    assert "--llm-first-token-timeout" in failed.advice
    assert named(report, Status.SKIPPED) == [*IN_MID_STREAM, "metrics"]
    assert {"before_first_token", "nothing_running", "everything"} <= set(named(report, Status.OK))


def test_a_provider_that_stalls_in_mid_stream_is_named() -> None:
    with Daemon("--ops-port", "0", "--llm-model", "stall-mid-stream") as daemon:
        report = examined(daemon.port, wait=1.0)
    failed = only_failed(report, "stream")
    assert failed.seen.startswith("12 pieces came, then nothing for 1")
    assert "--llm-idle-timeout" in failed.advice
    assert named(report, Status.SKIPPED) == [*IN_MID_STREAM, "metrics"]


@pytest.mark.parametrize(
    ("model", "seen", "advice"),
    [
        ("http-401", "Incorrect API key", "OPENAI_API_KEY"),
        ("http-404", "The model does not exist", "--llm-model"),
        ("http-429", "Rate limit", "limits"),
        ("http-503", "overloaded", "The provider is failing"),
        ("cut", "incomplete answer", "the daemon's log"),
        ("empty", "complete, and empty", "model"),
    ],
)
def test_what_a_provider_says_is_said(model: str, seen: str, advice: str) -> None:
    with Daemon("--ops-port", "0", "--llm-model", model, "--llm-retries", "0") as daemon:
        failed = only_failed(examined(daemon.port), "stream")
    assert seen in failed.seen
    assert advice in failed.advice


def test_a_limit_of_the_daemon_that_passed_is_said() -> None:
    limit = ["--llm-model", "stall-headers", "--llm-first-token-timeout", "0.2"]
    with Daemon("--ops-port", "0", *limit, "--llm-retries", "0") as daemon:
        failed = only_failed(examined(daemon.port), "stream")
    assert "exceeded the first token timeout of 0.2 s" in failed.seen
    assert "--llm-first-token-timeout" in failed.advice


# Wrong URLs --------------------------------------------------------------------------------------


def test_a_wrong_path_is_named_and_the_right_one_too() -> None:
    with Daemon("--ops-port", "0") as daemon:
        report = examined(f"ws://127.0.0.1:{daemon.port}/socket")
    failed = only_failed(report, "websocket")
    assert "HTTP 404" in failed.seen
    assert f"--url ws://127.0.0.1:{daemon.port}/ws/agent/stream" in failed.advice
    assert named(report, Status.OK) == ["connect", "health"]


def test_the_port_of_the_metrics_is_told_from_another_program_s() -> None:
    port = free_port()
    with Daemon("--ops-port", str(port)):
        failed = only_failed(examined(port), "websocket")
    assert "--ops-port" in failed.advice


def test_a_wrong_port_is_named() -> None:
    port = free_port()
    report = examined(port)
    failed = only_failed(report, "connect")
    assert failed.seen == f"nothing listens on 127.0.0.1:{port}"
    assert "bargein serve" in failed.advice
    assert named(report, Status.SKIPPED) == ALL[1:]


def test_advice_calls_the_program_as_people_do() -> None:
    port = free_port()
    url = f"ws://127.0.0.1:{port}"
    target = target_of(arguments("--url", url), {}, prog="python run.py")
    failed = only_failed(examine(target, Limits(LIMIT)), "connect")
    assert "(python run.py serve)" in failed.advice


def test_a_wrong_name_is_named() -> None:
    failed = only_failed(examined("ws://no-such-host.invalid"), "connect")
    assert "no-such-host.invalid" in failed.seen
    assert "--url" in failed.advice


def test_a_prefix_before_the_path_is_one_before_health_too() -> None:
    with Fake() as fake:
        report = examined(f"ws://127.0.0.1:{fake.port}/chat/ws/agent/stream?ticket=t")
    assert fake.asked == ["/chat/health", "/chat/ws/agent/stream?ticket=t"]
    assert report.holds
    assert "ticket" not in report.as_json()


# What is no gateway ------------------------------------------------------------------------------


def answers(data: bytes) -> Callable[[socket.socket], None]:
    def serve(sock: socket.socket) -> None:
        if data.startswith(b"HTTP"):
            sock.recv(65536)
        sock.sendall(data)
        while sock.recv(65536):  # it goes on to listen
            pass

    return serve


WEB_PAGE = b"HTTP/1.0 200 OK\r\nContent-Length: 14\r\n\r\n<h1>Hello</h1>"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ne\r\n<h1>Hello</h1>\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "health", "websocket"),
    [
        (WEB_PAGE, "not bargein's: <h1>Hello</h1>", "HTTP 200: <h1>Hello</h1>"),
        (CHUNKED, "not bargein's: <h1>Hello</h1>", "HTTP 200: <h1>Hello</h1>"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope", "HTTP 404", "HTTP 404: nope"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "HTTP 502", "HTTP 502"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not speak HTTP: 'SSH-2.0-OpenSSH_9.6'", "SSH-2.0-OpenSSH"),
        (b"\x00\xff\x1b[2J", "not speak HTTP: '\ufffd\ufffd\ufffd[2J'", "does not speak HTTP"),
        (b"HTTP/1.1 what\r\n\r\n", "not speak HTTP: 'HTTP/1.1 what'", "does not speak HTTP"),
    ],
    ids=["page", "chunked", "404", "502", "ssh", "garbage", "status"],
)
def test_what_answers_in_place_of_a_gateway_is_shown_at_once(
    data: bytes, health: str, websocket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_BODY_SECONDS", 0.1)
    monkeypatch.setattr(connection, "REFUSAL_BODY_SECONDS", 0.1)
    with listening(answers(data)) as port:
        began = time.monotonic()
        report = examined(port)
        took = time.monotonic() - began
    assert took < 5
    assert named(report, Status.FAILED) == ["health", "websocket"]
    assert health in of(report, "health").seen
    assert websocket in of(report, "websocket").seen
    assert of(report, "websocket").advice
    assert named(report, Status.SKIPPED) == ALL[3:]


def test_a_port_that_closes_at_once_is_named() -> None:
    with listening(lambda sock: None) as port:
        report = examined(port)
    assert named(report, Status.FAILED) == ["health", "websocket"]
    assert "without sending anything" in of(report, "websocket").seen


def test_a_port_that_never_answers_is_named_and_not_waited_for() -> None:
    with listening(lambda sock: print(sock.recv(65536), sock.recv(1))) as port:
        began = time.monotonic()
        report = examined(port, wait=0.3)
        took = time.monotonic() - began
    assert named(report, Status.FAILED) == ["health", "websocket"]
    for name in ("health", "websocket"):
        assert "sent nothing for " in of(report, name).seen
    assert took < 5


def drip(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        sock.sendall(b"X: y\r\n")
        gevent.sleep(0.01)


def test_a_port_that_answers_for_ever_is_not_waited_for() -> None:
    with listening(drip) as port:
        began = time.monotonic()
        report = examined(port, wait=0.3)
        took = time.monotonic() - began
    assert named(report, Status.FAILED) == ["health", "websocket"]
    assert "only 'HTTP/1.1 200 OK" in of(report, "health").seen
    assert took < 5


# Ill gateways ------------------------------------------------------------------------------------


class AcksWithoutStopping(Fake):
    def on_interrupt(self, payload: dict[str, Any]) -> None:
        target = payload.get("interrupt_request_id")
        targets = self.live.copy() if target is None else [target]
        self.ack(payload, targets, [one for one in targets if one in self.live])
        for one in targets:
            for _ in range(5):
                self.piece(one)

    def on_request(self, request_id: str) -> None:
        self.live.append(request_id)
        self.answer(request_id)


class NeverAcks(Fake):
    def ack(self, payload: dict[str, Any], targets: list[str], stopped: list[str]) -> None:
        pass


class AcksTwice(Fake):
    def ack(self, payload: dict[str, Any], targets: list[str], stopped: list[str]) -> None:
        super().ack(payload, targets, stopped)
        super().ack(payload, targets, stopped)


class NeverEnds(Fake):
    """The old answers fall silent, but clients are not told that they are over."""

    def end(self, request_id: str, **more: Any) -> None:
        self.live.remove(request_id)


class EndsBeforeAck(Fake):
    def ack(self, payload: dict[str, Any], targets: list[str], stopped: list[str]) -> None:
        for one in stopped:
            self.end(one)
        super().ack(payload, targets, stopped)
        stopped.clear()


class EndsTwice(Fake):
    def end(self, request_id: str, **more: Any) -> None:
        super().end(request_id)
        self.live.append(request_id)
        super().end(request_id)


class EndsAsComplete(Fake):
    def end(self, request_id: str, **more: Any) -> None:
        super().end(request_id, interrupted=False, outcome="REAPED")


class LeavesGaps(Fake):
    def piece(self, request_id: str, text: str | None = None) -> None:
        if self.said.get(request_id, 0) == 3:
            self.said[request_id] = 4
        super().piece(request_id, text)


class CountsOn(Fake):
    """The new answer goes on where the old one was."""

    def answer(self, request_id: str) -> None:
        if len(self.said) == 1:
            self.said[request_id] = self.pieces
        super().answer(request_id)


class SaysOldInNew(Fake):
    """What was queued of the old answer goes out as the new one."""

    def answer(self, request_id: str) -> None:
        skipped = 10 * len(self.said)
        for number in range(self.pieces):
            self.piece(request_id, f"word {skipped + number} and so on, ")


class BeginsBeforeTheEnd(Fake):
    """The old answer's last frame comes when the new one is under way."""

    def on_interrupt(self, payload: dict[str, Any]) -> None:
        target = payload.get("interrupt_request_id")
        targets = self.live.copy() if target is None else [target]
        self.ack(payload, targets, [one for one in targets if one in self.live])

    def on_request(self, request_id: str) -> None:
        older = self.live.copy()
        self.live.append(request_id)
        self.answer(request_id)
        for one in older:
            self.end(one)


class SpeaksOfStrangers(Fake):
    def on_interrupt(self, payload: dict[str, Any]) -> None:
        super().on_interrupt(payload)
        self.piece("req_of_somebody_else")


class EchoesWrongly(Fake):
    def echo(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"interrupt_request_id": "req_0"}


class TimesOut(Fake):
    def say(self, msg_type: str, **payload: Any) -> None:
        for result in payload.get("results", []):
            result["outcome"] = "TIMED_OUT"
        super().say(msg_type, **payload)


class SaysPartial(Fake):
    def say(self, msg_type: str, **payload: Any) -> None:
        if payload.get("status") == "SUCCESS" and msg_type == "INTERRUPT_ACK":
            payload["status"] = "PARTIAL"
        super().say(msg_type, **payload)


class NamesNothing(Fake):
    def say(self, msg_type: str, **payload: Any) -> None:
        if msg_type == "INTERRUPT_ACK":
            payload["interrupted_request_ids"] = []
        super().say(msg_type, **payload)


class StopsNothingGladly(Fake):
    """What has ended is stopped once more."""

    def ack(self, payload: dict[str, Any], targets: list[str], stopped: list[str]) -> None:
        super().ack(payload, targets, targets)


class KeepsTheOldOne(Fake):
    """A new request does not end the one before, and an INTERRUPT of everything ends the last."""

    def on_request(self, request_id: str) -> None:
        self.live.append(request_id)
        self.answer(request_id)

    def on_interrupt(self, payload: dict[str, Any]) -> None:
        if payload.get("interrupt_request_id") is None and self.live:
            *kept, last = self.live
            self.ack(payload, [last], [last])
            self.end(last)
            self.live = kept
        else:
            super().on_interrupt(payload)


class InterruptsByItself(Fake):
    def answer(self, request_id: str) -> None:
        super().answer(request_id)
        self.end(request_id)


class ClosesInMidStream(Fake):
    def answer(self, request_id: str) -> None:
        self.piece(request_id)
        self.close(1011, "out of memory")


class ShutsDown(Fake):
    def answer(self, request_id: str) -> None:
        self.say("SHUTDOWN", reason="SERVER_SHUTDOWN")
        self.close(1012)


class SpeaksInTongues(Fake):
    def answer(self, request_id: str) -> None:
        self.say("RESPONSE", request_id=request_id, text_stream_seq="zero", content={})


class RefusesInterrupts(Fake):
    def on_interrupt(self, payload: dict[str, Any]) -> None:
        self.say_error("SESSION_INVALID", "no such session")


class SaysNothingToRegister(Fake):
    def on_register(self, _payload: dict[str, Any]) -> None:
        pass


class ShutsDownAtRegister(Fake):
    def on_register(self, _payload: dict[str, Any]) -> None:
        self.say("SHUTDOWN", reason="SERVER_SHUTDOWN")


class RefusesRegister(Fake):
    def on_register(self, _payload: dict[str, Any]) -> None:
        self.say_error("AUTH_FAILED", "who are you?")
        self.close(1008)


class IsBusy(Fake):
    def on_register(self, _payload: dict[str, Any]) -> None:
        self.say_error("SERVER_BUSY", "draining")


class IsDegraded(Fake):
    health: ClassVar[dict[str, Any]] = {**Fake.health, "status": "degraded", "sessions": None}


@pytest.mark.parametrize(
    ("illness", "step", "seen"),
    [
        (AcksWithoutStopping, "old_stops", "5 frames of the old answer came after the ack"),
        (AcksTwice, "old_stops", "an INTERRUPT_ACK with 'doctor_"),
        (EndsBeforeAck, "old_stops", "its last frame came before the INTERRUPT_ACK"),
        (EndsTwice, "old_stops", "it had 2 last frames"),
        (EndsAsComplete, "old_stops", "it ended as REAPED, not as an interrupted answer"),
        (LeavesGaps, "stream", "text_stream_seq 4 came where 3 was due"),
        (CountsOn, "new_starts", "text_stream_seq 25 came where 0 was due"),
        (
            SaysOldInNew,
            "new_starts",
            "begins with text of the old one: 'word 10 and so on, wor",
        ),
        (BeginsBeforeTheEnd, "new_starts", "began before the old one's last frame"),
        (SpeaksOfStrangers, "old_stops", "a frame of the request req_of_somebody_else"),
        (TimesOut, "interrupt", "the provider's stream could not be closed in time"),
        (SaysPartial, "interrupt", "INTERRUPT_ACK for a live answer says PARTIAL, STOPPED"),
        (NamesNothing, "interrupt", "INTERRUPT_ACK lacks the request in interrupted_request_ids"),
        (StopsNothingGladly, "nothing_running", "INTERRUPT_ACK says SUCCESS for doctor_"),
        (
            InterruptsByItself,
            "stream",
            "it ended as INTERRUPTED, without an INTERRUPT",
        ),
        (ClosesInMidStream, "stream", "the connection ended: code 1011 out of memory"),
        (ShutsDown, "stream", "the daemon ended the session: SERVER_SHUTDOWN"),
        (SpeaksInTongues, "stream", "a frame does not match the protocol (Expected `int`"),
        (RefusesInterrupts, "interrupt", "refused a frame: SESSION_INVALID: no such session"),
        (RefusesRegister, "register", "AUTH_FAILED: who are you?"),
        (ShutsDownAtRegister, "register", "the daemon ended the session: SERVER_SHUTDOWN"),
        (IsBusy, "register", "SERVER_BUSY: draining"),
        (IsDegraded, "health", "the daemon reports the status degraded"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_an_ill_gateway_fails_first_where_it_is_ill(
    illness: type[Fake], step: str, seen: str
) -> None:
    with illness() as fake:
        report = examined(fake.port, wait=1.0)
    assert named(report, Status.FAILED)[0] == step, report.as_json()
    assert not report.holds
    assert seen in of(report, step).seen
    assert of(report, step).advice


def test_a_connection_that_is_reset_while_the_doctor_writes_fails_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_args: object, **_fields: object) -> None:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("gateway.client.session.Session.register", broken)
    with Fake() as fake:
        report = examined(fake.port, wait=1.0)
    assert named(report, Status.FAILED)[0] == "register", report.as_json()
    assert "the connection ended" in of(report, "register").seen


@pytest.mark.parametrize(
    ("illness", "step", "seen"),
    [
        (NeverAcks, "interrupt", "no INTERRUPT_ACK within 5"),
        (EchoesWrongly, "interrupt", "but an INTERRUPT_ACK with 'req_0'"),
        (NeverEnds, "old_stops", "(text_stream_seq -1) of the old answer did not come"),
        (KeepsTheOldOne, "everything", "of the answer before it did not come"),
        (SaysNothingToRegister, "register", "no REGISTER_ACK within 5"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_gateway_that_leaves_something_out_is_not_waited_for(
    illness: type[Fake], step: str, seen: str
) -> None:
    with illness() as fake:
        began = time.monotonic()
        report = examined(fake.port, wait=0.5, whole=6.0)
        took = time.monotonic() - began
    assert named(report, Status.FAILED)[0] == step, report.as_json()
    assert seen in of(report, step).seen
    assert of(report, step).advice
    assert took < 10


def test_one_that_acks_without_stopping_fails_in_every_step_that_interrupts_text() -> None:
    with AcksWithoutStopping() as fake:
        report = examined(fake.port, wait=1.0)
    assert named(report, Status.FAILED) == ["old_stops", "before_first_token", "everything"]
    assert "users hear two answers" in of(report, "old_stops").advice
    # The two that it did begin with are as they should be.
    assert of(report, "interrupt").status is Status.OK
    assert of(report, "new_starts").status is Status.OK


def test_one_that_never_acks_but_stops_is_found_to_stop() -> None:
    with NeverAcks() as fake:
        report = examined(fake.port, wait=0.5)
    failed = named(report, Status.FAILED)
    assert failed == ["interrupt", "before_first_token", "nothing_running", "everything"]
    assert of(report, "old_stops").status is Status.OK


def test_an_ack_that_is_slow_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_SLOW_ACK_SECONDS", 0.0)
    with Fake() as fake:
        report = examined(fake.port)
    assert of(report, "interrupt").seen.startswith("INTERRUPT_ACK took ")


def test_what_needs_a_connection_that_was_lost_is_skipped() -> None:
    with ClosesInMidStream() as fake:
        report = examined(fake.port)
    assert named(report, Status.FAILED) == ["stream"]
    assert "the connection was lost" in of(report, "nothing_running").seen


class CompletesSoon(Fake):
    """Ten words, and that is all it has to say."""

    pieces = 10

    def answer(self, request_id: str) -> None:
        super().answer(request_id)
        self.end(request_id, interrupted=False, outcome="COMPLETED")


def test_answers_that_are_complete_too_soon_are_no_fault_but_prove_nothing() -> None:
    with CompletesSoon() as fake:
        report = examined(fake.port)
    assert named(report, Status.FAILED) == []
    assert not report.holds
    assert named(report, Status.OK) == [*WITHOUT_METRICS[:5], "new_starts", "nothing_running"]
    assert "10 pieces in" in of(report, "stream").seen
    assert "then it was complete" in of(report, "stream").seen
    assert "complete after 10 pieces, before the INTERRUPT came" in of(report, "interrupt").seen
    assert "another model" in of(report, "interrupt").advice
    assert "was complete" in of(report, "old_stops").seen


class CompletesTheFirst(Fake):
    """As a model that sometimes has little to say."""

    def answer(self, request_id: str) -> None:
        super().answer(request_id)
        if len(self.said) == 1:
            self.end(request_id, interrupted=False, outcome="COMPLETED")


def test_after_an_answer_that_was_complete_too_soon_it_asks_once_more() -> None:
    with CompletesTheFirst() as fake:
        report = examined(fake.port)
    assert named(report, Status.OK) == WITHOUT_METRICS, report.as_json()


class CompletesBeforeTheInterrupt(Fake):
    """As a quick model, when the machine is busy just then. It does so twice."""

    completed = 0

    def on_interrupt(self, payload: dict[str, Any]) -> None:
        if self.completed < 2 and payload["reason"] == "USER_NEW_INPUT":
            self.completed += 1
            self.end(payload["interrupt_request_id"], interrupted=False, outcome="COMPLETED")
        super().on_interrupt(payload)


def test_after_an_answer_that_was_complete_before_the_interrupt_it_asks_again() -> None:
    with CompletesBeforeTheInterrupt() as fake:
        report = examined(fake.port)
    assert fake.completed == 2
    assert named(report, Status.OK) == WITHOUT_METRICS, report.as_json()


class CompletesTooSoon(CompletesTheFirst, CompletesBeforeTheInterrupt):
    """As both of them: the most answers that the doctor asks for."""


@pytest.mark.parametrize(("fake_type", "asked"), ((Fake, 5), (CompletesTooSoon, 10)))
def test_it_asks_as_often_as_its_page_says(fake_type: type[Fake], asked: int) -> None:
    with fake_type() as fake:
        report = examined(fake.port)
    assert named(report, Status.OK) == WITHOUT_METRICS, report.as_json()
    assert fake.heard.count("REQUEST") == asked
    page = (Path(__file__).parents[1] / "gateway" / "README.md").read_text(encoding="utf-8")
    assert "asks the provider five times, and up to ten times" in " ".join(page.split())


class SaysAlwaysTheSame(Fake):
    def piece(self, request_id: str, text: str | None = None) -> None:
        super().piece(request_id, f"word {self.said.get(request_id, 0)} of many words, ")


def test_a_provider_that_says_always_the_same_is_no_fault() -> None:
    with SaysAlwaysTheSame() as fake:
        report = examined(fake.port)
    assert named(report, Status.OK) == WITHOUT_METRICS, report.as_json()


class SaysHeartbeat(Fake):
    def answer(self, request_id: str) -> None:
        self.say("HEARTBEAT", remaining_seconds=9)
        self.say("SOMETHING_NEW", what=1)
        super().answer(request_id)


def test_heartbeats_are_answered_and_frames_of_later_versions_ignored() -> None:
    with SaysHeartbeat() as fake:
        assert examined(fake.port).holds
        wait_until(lambda: fake.heard[-1] == "SHUTDOWN", "it says goodbye")
    assert fake.heard.count("HEARTBEAT_REPLY") == fake.heard.count("REQUEST")


# Never for ever ----------------------------------------------------------------------------------


class NeverPauses(Fake):
    """Reads nothing any more, and sends for ever."""

    def answer(self, request_id: str) -> None:
        for _ in itertools.count():
            self.piece(request_id)


def test_a_gateway_that_never_pauses_is_not_waited_for() -> None:
    with NeverPauses() as fake:
        began = time.monotonic()
        report = examined(fake.port, wait=0.5)
        took = time.monotonic() - began
    assert "interrupt" in named(report, Status.FAILED)
    assert took < LIMIT


def test_the_whole_has_a_limit_too() -> None:
    with SaysNothingToRegister() as fake:
        began = time.monotonic()
        report = examined(fake.port, wait=LIMIT, whole=0.5)
        took = time.monotonic() - began
    assert named(report, Status.FAILED) == ["register"]
    assert took < 5


def test_what_is_left_when_the_time_is_up_is_skipped() -> None:
    with listening(lambda sock: print(sock.recv(65536), sock.recv(1))) as port:
        report = examined(port, wait=0.5, whole=0.25)
    assert named(report, Status.FAILED) == ["health"]
    assert of(report, "websocket").seen == "no time was left: the steps before took over 250 ms"


def test_by_default_the_whole_is_eight_waits() -> None:
    assert Limits().total == 120
    assert Limits(wait=2).total == 16
    assert Limits(wait=2, whole=3).total == 3


# Metrics -----------------------------------------------------------------------------------------


class CountsNothing(Fake):
    def metrics(self) -> str:
        counts, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        page = super().metrics()
        self.counts = counts
        return page


class CountsTooFew(Fake):
    def metrics(self) -> str:
        return super().metrics().replace('stage="acknowledged"', 'stage="other"')


def ops_of(fake: Fake) -> list[str]:
    return ["--ops-url", f"http://127.0.0.1:{fake.port}/metrics"]


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_BOOKS_SECONDS", 0.1)


@pytest.mark.usefixtures("no_patience")
def test_metrics_that_do_not_move_are_named() -> None:
    with CountsNothing() as fake:
        failed = only_failed(examined(fake.port, *ops_of(fake)), "metrics")
    assert "bargein_requests_total rose by 0, expected at least 5" in failed.seen
    assert "bargein_interrupts_total rose by 0, expected at least 5" in failed.seen
    assert 'count{stage="acknowledged"} rose by 0, expected at least 6' in failed.seen
    assert 'count{stage="stream_closed"} rose by 0, expected at least 4' in failed.seen


@pytest.mark.usefixtures("no_patience")
def test_one_that_moves_too_little_is_named_alone() -> None:
    with CountsTooFew() as fake:
        failed = only_failed(examined(fake.port, *ops_of(fake)), "metrics")
    assert failed.seen.count("rose") == 1
    assert "acknowledged" in failed.seen


@pytest.mark.usefixtures("no_patience")
def test_metrics_of_another_daemon_in_the_usual_place_are_no_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with CountsNothing() as fake:
        usual = f"http://127.0.0.1:{fake.port}/metrics"
        monkeypatch.setattr(targets, "DEFAULT_OPS_URL", usual)
        report = examined(fake.port)
        assert of(report, "metrics").status is Status.SKIPPED
        assert "another daemon's" in of(report, "metrics").seen
        assert report.holds
        # But with both in their usual places, whose else?
        monkeypatch.setattr(targets, "DEFAULT_URL", f"ws://127.0.0.1:{fake.port}/ws/agent/stream")
        only_failed(examined(fake.port), "metrics")


def test_metrics_in_their_usual_place_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with Fake() as fake:
        usual = f"http://127.0.0.1:{fake.port}/metrics"
        monkeypatch.setattr(targets, "DEFAULT_OPS_URL", usual)
        assert named(examined(fake.port), Status.OK) == ALL


class CountsLate(Fake):
    """The books are kept a moment later."""

    pages = 0

    def metrics(self) -> str:
        self.pages += 1
        if self.pages < 3:
            counts, self.counts = self.counts, dict.fromkeys(self.counts, 0)
            page = super().metrics()
            self.counts = counts
            return page
        return super().metrics()


def test_metrics_that_move_a_moment_later_have_moved() -> None:
    with CountsLate() as fake:
        report = examined(fake.port, *ops_of(fake))
    assert of(report, "metrics").status is Status.OK
    assert fake.pages == 3


def test_metrics_that_were_asked_for_and_are_not_there_are_a_fault() -> None:
    port = free_port()
    with Fake() as fake:
        failed = only_failed(examined(fake.port, "--ops-url", f"127.0.0.1:{port}"), "metrics")
        assert failed.seen == f"nothing listens on 127.0.0.1:{port}"
        elsewhere = examined(fake.port, "--ops-url", f"127.0.0.1:{fake.port}/health")
    assert "no bargein metrics" in only_failed(elsewhere, "metrics").seen


def test_metrics_that_are_not_there_are_no_fault_where_nobody_asked_for_them() -> None:
    with Fake() as fake:
        report = examined(fake.port)
    assert of(report, "metrics").status is Status.SKIPPED
    assert of(report, "metrics").seen.startswith("no metrics: nothing listens")
    assert report.holds


def test_a_page_of_metrics_is_read_and_summed() -> None:
    with Fake() as fake:
        fake.counts.update(requests=3, interrupts=4, acknowledged=5, stream_closed=6)
        page = fake.metrics()
    assert read_counts(page) == Counts(requests=10, interrupts=4, acks=5, closed_streams=6)
    assert read_counts("<h1>Hello</h1>") is None
    assert read_counts("up 1\n") is None


def test_counts_may_move_by_more_than_was_done() -> None:
    done = Counts(1, 1, 1, 1)
    assert Counts(9, 9, 9, 9).shortfall(Counts(), done) == []
    assert Counts(1, 1, 1, 1).shortfall(Counts(), done) == []
    (line,) = Counts(1, 0, 1, 1).shortfall(Counts(), done)
    assert line == "bargein_interrupts_total rose by 0, expected at least 1"


# TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secured(authority: trustme.CA) -> Iterator[Fake]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with Fake(tls) as fake:
        yield fake


def test_it_speaks_tls(secured: Fake, authority: trustme.CA) -> None:
    with authority.cert_pem.tempfile() as ca_file:
        report = examined(
            f"wss://localhost:{secured.port}",
            *("--ca-file", ca_file, "--ops-url", f"https://localhost:{secured.port}"),
        )
    assert named(report, Status.OK) == ALL, report.as_json()
    assert report.url == f"wss://localhost:{secured.port}/ws/agent/stream"


def test_a_certificate_that_is_not_trusted_is_named(secured: Fake) -> None:
    failed = only_failed(examined(f"wss://localhost:{secured.port}"), "connect")
    assert "is not trusted" in failed.seen
    assert "--ca-file" in failed.advice


def test_a_certificate_for_another_name_is_named(secured: Fake, authority: trustme.CA) -> None:
    with authority.cert_pem.tempfile() as ca_file:
        report = examined(f"https://127.0.0.1:{secured.port}", "--ca-file", ca_file)
    assert "not valid for '127.0.0.1'" in only_failed(report, "connect").seen


def test_tls_where_there_is_none_is_named() -> None:
    with Fake() as fake:
        failed = only_failed(examined(f"wss://localhost:{fake.port}", wait=2), "connect")
    assert "TLS" in failed.seen
    assert "ws://" in failed.advice


# Credentials -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "auth"),
    [
        ({}, ApiKeyAuth("")),
        ({"BARGEIN_DOCTOR_API_KEY": f"{KEY}\n"}, ApiKeyAuth(KEY)),
        (
            {"BARGEIN_DOCTOR_ACCOUNT": "ann", "BARGEIN_DOCTOR_PASSWORD": "p"},
            AccountAuth("ann", "p"),
        ),
    ],
)
def test_credentials_come_from_the_environment(
    env: dict[str, str], auth: ApiKeyAuth | AccountAuth
) -> None:
    assert auth_of(env) == auth
    with Fake() as fake:
        examined(fake.port, env=env)
    (registration,) = fake.registrations
    told = registration["auth"]
    assert told.pop("type") == ("API_KEY" if isinstance(auth, ApiKeyAuth) else "ACCOUNT")
    assert list(told.values()) == [getattr(auth, name) for name in told]


@pytest.mark.parametrize("name", ["BARGEIN_DOCTOR_ACCOUNT", "BARGEIN_DOCTOR_PASSWORD"])
def test_an_account_needs_its_password(name: str) -> None:
    with pytest.raises(UsageError, match="is missing") as raised:
        auth_of({name: KEY})
    assert KEY not in str(raised.value)


class RepeatsSecrets(Fake):
    def on_register(self, payload: dict[str, Any]) -> None:
        self.say_error("AUTH_FAILED", f"wrong: {payload['auth']}\x1b[2J")


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize(
    "env",
    [
        {"BARGEIN_DOCTOR_API_KEY": KEY},
        {"BARGEIN_DOCTOR_ACCOUNT": "ann-of-accounts", "BARGEIN_DOCTOR_PASSWORD": KEY},
    ],
    ids=["key", "account"],
)
def test_a_credential_is_never_shown_even_if_the_server_does(
    words: list[str], env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with RepeatsSecrets() as fake:
        url = f"ws://127.0.0.1:{fake.port}"
        assert command.main(arguments("--url", url, *words), env) == 1
    shown = "".join(capsys.readouterr())
    assert "AUTH_FAILED: wrong: " in shown
    assert KEY not in shown
    assert "ann-of-accounts" not in shown
    assert "\x1b" not in shown
    assert "BARGEIN_DOCTOR_API_KEY" in shown


class CutsSecrets(Fake):
    """The key is where its words are cut, if it is not hidden before."""

    def on_register(self, payload: dict[str, Any]) -> None:
        self.say_error("AUTH_FAILED", "x" * 150 + payload["auth"]["api_key"] + "y" * 150)


def test_not_even_the_beginning_of_a_credential_is_shown() -> None:
    with CutsSecrets() as fake:
        report = examined(fake.port, env={"BARGEIN_DOCTOR_API_KEY": KEY})
    seen = only_failed(report, "register").seen
    assert "xxx…y" in seen
    assert KEY[:6] not in seen


def test_without_credentials_a_refusal_says_how_to_give_them() -> None:
    with RefusesRegister() as fake:
        failed = only_failed(examined(fake.port), "register")
    assert "Set BARGEIN_DOCTOR_API_KEY, or BARGEIN_DOCTOR_ACCOUNT and" in failed.advice


# The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("ws://host:1/ws/agent/stream", "ws://host:1/ws/agent/stream"),
        ("wss://host", "wss://host/ws/agent/stream"),
        ("http://host:1/", "ws://host:1/ws/agent/stream"),
        ("https://host", "wss://host/ws/agent/stream"),
        ("host:8000", "ws://host:8000/ws/agent/stream"),
        ("127.0.0.1", "ws://127.0.0.1/ws/agent/stream"),
        ("[::1]:8000", "ws://[::1]:8000/ws/agent/stream"),
        (" ws://host/a?b=c#d ", "ws://host/a?b=c"),
    ],
)
def test_urls_are_understood_in_the_forms_that_people_give(given: str, url: str) -> None:
    assert websocket_url(given).geturl() == url


@pytest.mark.parametrize(
    "given", ["", "ftp://host", "ws://", "ws://host:99999", "ws://host:0", "ws://[::1", "ws://h st"]
)
def test_what_is_no_url_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments("--url", given), {}) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: --url {given!r} is not a URL")
    assert err.count("\n") == 1


def test_a_url_with_a_password_is_refused_and_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.main(arguments("--url", f"ws://ann:{KEY}@host"), {}) == 2
    assert KEY not in "".join(capsys.readouterr())


def test_the_url_of_the_metrics_may_be_short_too() -> None:
    assert ops_url("host:9464").geturl() == "http://host:9464/metrics"
    assert ops_url("https://host/m").geturl() == "https://host/m"
    with pytest.raises(UsageError):
        ops_url("ws://host")


def test_metrics_of_another_machine_are_only_looked_at_where_they_are_said_to_be() -> None:
    here = target_of(arguments("--url", "ws://localhost:8000"), {})
    there = target_of(arguments("--url", "ws://example.com"), {})
    said = target_of(arguments("--url", "ws://example.com", "--ops-url", "example.com:9464"), {})
    assert here.ops_url == urlsplit(targets.DEFAULT_OPS_URL)
    assert not here.is_ops_given
    assert there.ops_url is None
    assert said.ops_url == urlsplit("http://example.com:9464/metrics")
    assert said.is_ops_given


def test_by_default_it_examines_the_daemon_on_this_machine() -> None:
    target = target_of(arguments(), {})
    assert target.shown == "ws://127.0.0.1:8000/ws/agent/stream"
    assert target.health_path == "/health"


@pytest.mark.parametrize("name", ["/nowhere", __file__])
def test_a_file_without_certificates_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments("--ca-file", name), {}) == 2
    assert f"--ca-file {name}" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_time(seconds: str) -> None:
    done = run_to_the_end("doctor", "--timeout", seconds)
    assert done.returncode == 2
    expected = f"error: argument --timeout: '{seconds}' is not a number of seconds above 0\n"
    assert done.stderr == expected


def test_an_unknown_flag_is_refused() -> None:
    done = run_to_the_end("doctor", "--urll", "x")
    assert done.returncode == 2
    assert "--urll" in done.stderr


def test_the_exit_code_says_whether_all_holds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--url", f"ws://127.0.0.1:{free_port()}"]
    assert command.main(arguments(*words), {}) == 1
    shown = capsys.readouterr().out
    assert "✗ Something listens there" in shown
    assert "1 of 12 steps failed, 11 could not be tried. Begin with “Something listens" in shown
    assert command.main(arguments(*words, "--json"), {}) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    first, *others = report["steps"]
    assert (first["step"], first["status"], first["ok"]) == ("connect", "failed", False)
    assert first["advice"]
    assert all((one["status"], one["ok"]) == ("skipped", None) for one in others)


def test_an_examination_can_be_broken_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_off(*_: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "examine", break_off)
    assert command.main(arguments(), {}) == 130


# The report --------------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", is_terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    @property
    def shown(self) -> str:
        self.seek(0)
        return self.read()


def result(status: Status, number: int = 0, *, is_required: bool = True) -> Result:
    return Result(STEPS[number], status, "seen “it”", "do that", 1.25, is_required)


def rendered(out: Terminal, *results: Result, env: dict[str, str] | None = None) -> list[str]:
    renderer = TextRenderer(out, env or {})
    for one in results:
        renderer.show(one)
    renderer.end(Report("ws://host/", results, 1.5))
    return out.shown.splitlines()


def test_there_are_colours_on_a_terminal_only() -> None:
    crossed = result(Status.FAILED)
    assert rendered(Terminal(), crossed)[0].startswith("\x1b[31m✗\x1b[0m Something")
    assert rendered(Terminal(is_terminal=False), crossed)[0].startswith("✗ Something")
    assert rendered(Terminal(), crossed, env={"NO_COLOR": "1"})[0].startswith("✗ Something")


def test_a_terminal_that_has_no_ticks_gets_words() -> None:
    out = Terminal("ascii", is_terminal=False)
    lines = rendered(
        out, *(result(status) for status in (Status.OK, Status.FAILED, Status.SKIPPED))
    )
    assert [line[:4] for line in lines[0:6:2]] == ["ok  ", "FAIL", "skip"]
    assert lines[1] == "    -> do that"
    assert "seen ?it?" in lines[0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_printed_whatever_characters_the_output_has(encoding: str) -> None:
    out = Terminal(encoding, is_terminal=False)
    steps = (Result(STEPS[0], Status.FAILED, "it says “失败”", "→ do that", 1.25),)
    print_json(Report("ws://host/", steps, 1.5), out)
    (step,) = json.loads(out.shown)["steps"]
    assert (step["seen"], step["advice"]) == ("it says “失败”", "→ do that")


@pytest.mark.parametrize(
    ("results", "holds", "words"),
    [
        ([result(Status.OK)], True, "All is well."),
        (
            [result(Status.OK), result(Status.SKIPPED, is_required=False)],
            True,
            "All is well; the metrics were not checked.",
        ),
        (
            [result(Status.OK), result(Status.SKIPPED)],
            False,
            "Nothing failed, but 1 step gave no result.",
        ),
        (
            [result(Status.OK), result(Status.FAILED, 1), result(Status.SKIPPED)],
            False,
            "1 of 3 steps failed, 1 could not be tried. Begin with “/health is well”.",
        ),
    ],
)
def test_the_last_line_says_it_all(results: list[Result], holds: bool, words: str) -> None:
    assert rendered(Terminal(), *results)[-1] == f"{words} (1.5 s)"
    assert Report("", tuple(results), 0).holds is holds


def test_nobody_who_reads_is_no_reason_to_fail() -> None:
    reader, writer = os.pipe()
    os.fdopen(reader).close()  # gevent's os.close may leave the reader open for a moment
    out = os.fdopen(writer, "w", encoding="utf-8")
    TextRenderer(out, {}).show(result(Status.OK))
    TextRenderer(out, {}).show(result(Status.OK))
    print_json(Report("ws://host/", (result(Status.OK),), 1.5), out)
    with contextlib.suppress(BrokenPipeError):  # of what its buffer may hold
        out.close()
