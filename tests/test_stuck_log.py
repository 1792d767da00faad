"""Whoever reads the daemon's lines may stop, or never be there: that changes nothing for others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import LIMIT
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.process import ROOT, environment
from tests.harness.provider_process import ProviderProcess
from tests.test_prometheus import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pipes and signals of Linux")


class Stuck:
    """A daemon whose standard output or error goes where a test wants it.

    Args:
        arguments: of the command line.
        output: its standard output.
        log: its standard error.
        launcher: Python source in place of run.py.
    """

    def __init__(self, *arguments: str, output: Any, log: Any, launcher: str | None = None) -> None:
        self.port, self.ops_port = free_port(), free_port()
        ports = ["--port", str(self.port), "--ops-port", str(self.ops_port)]
        program = ["run.py"] if launcher is None else ["-c", launcher]
        self.process = subprocess.Popen(
            [sys.executable, *program, *ports, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=log,
        )

    def __enter__(self) -> Stuck:
        wait_until(self.is_live, "it serves", LIMIT)
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.ops_port}{path}"
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:
            return str(answer.read().decode())

    def is_live(self) -> bool:
        try:
            return bool(self.get("/livez"))
        except OSError:
            return False

    def lines_lost(self) -> int:
        for line in self.get("/metrics").splitlines():
            if line.startswith("bargein_log_lines_lost_total "):
                return int(float(line.split()[1]))
        raise AssertionError("no such metric")

    def assert_serves(self, provider: ProviderProcess, interrupts: int) -> None:
        """It stops answers, says that it lives, and ends in order."""
        self.interrupt(provider, interrupts)
        assert self.is_live()
        self.process.terminate()
        assert self.process.wait(LIMIT) == 0

    def interrupt(self, provider: ProviderProcess, times: int) -> None:
        story = provider.fresh(scripts.idle_mid_stream(["once"]))
        with Client(self.port) as client:
            for _ in range(times):
                client.wait_text(request_id := client.request(story))
                client.interrupt(request_id)
                assert client.wait_ack().payload["status"] == "SUCCESS"
            client.close()


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that takes nothing more: its ends, for reading and for writing."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b".")
    os.set_blocking(writer, True)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def to(provider: ProviderProcess) -> list[str]:
    return ["--llm-url", provider.base_url, "--llm-model", "test"]


@pytest.mark.parametrize("which", ["output", "log", "both"])
def test_nobody_reads_it(provider: ProviderProcess, which: str) -> None:
    with full_pipe() as (_reader, writer):
        streams: dict[str, Any] = {"output": subprocess.DEVNULL, "log": subprocess.DEVNULL}
        for name in streams:
            if which in (name, "both"):
                streams[name] = writer
        with Stuck(*to(provider), **streams) as daemon:
            daemon.assert_serves(provider, 20)


def test_the_disk_is_full(provider: ProviderProcess) -> None:
    with (
        Path("/dev/full").open("wb") as full,
        Stuck(*to(provider), output=full, log=full) as daemon,
    ):
        daemon.interrupt(provider, 3)
        wait_until(lambda: daemon.lines_lost() > 10, "lines are lost")
        daemon.assert_serves(provider, 3)


def test_a_terminal_is_stopped(provider: ProviderProcess) -> None:
    ours, terminal = os.openpty()
    try:
        # As after Ctrl-S: the terminal takes some kilobytes, and then nothing.
        with Stuck(*to(provider), output=terminal, log=terminal) as daemon:
            os.write(ours, b"\x13")
            daemon.assert_serves(provider, 60)
    finally:
        os.close(ours)
        os.close(terminal)


def test_the_reader_closes_it_meanwhile(provider: ProviderProcess) -> None:
    reader, writer = os.pipe()
    with Stuck(*to(provider), output=subprocess.DEVNULL, log=writer) as daemon:
        os.close(writer)
        with os.fdopen(reader, "rb") as log:
            assert b"Started" in log.readline()
        daemon.assert_serves(provider, 3)


def test_the_reader_comes_back_and_is_told_how_many_lines_are_missing(
    provider: ProviderProcess,
) -> None:
    with (
        full_pipe() as (reader, writer),
        Stuck(
            *to(provider),
            *("--log-format", "json"),
            output=subprocess.DEVNULL,
            log=writer,
            launcher=SMALL_BUFFER,
        ) as daemon,
    ):
        daemon.interrupt(provider, 20)
        wait_until(lambda: daemon.lines_lost() > 20, "lines are lost")
        os.set_blocking(reader, False)
        read = b""

        def has_note() -> bool:
            nonlocal read
            with contextlib.suppress(BlockingIOError):
                read += os.read(reader, 65536)
            return b'"Log lines lost"' in read and read.endswith(b"\n")

        wait_until(has_note, "the reader is told", LIMIT)
        lost = daemon.lines_lost()
        lines = [json.loads(line) for line in read.lstrip(b".").decode().splitlines()]
        notes = [line for line in lines if line["event"] == "Log lines lost"]
        assert [note.pop("timestamp")[:2] for note in notes] == ["20"] * len(notes)
        assert {note["level"] for note in notes} == {"warning"}
        assert sum(note["lost"] for note in notes) == lost
        daemon.process.terminate()
        assert daemon.process.wait(LIMIT) == 0
        with contextlib.suppress(BlockingIOError):
            while True:
                assert b"Log lines lost" not in os.read(reader, 65536)  # each is told once


SMALL_BUFFER = """
import sys
import run
from metrics import line_writer
line_writer.LineWriter.__init__.__defaults__ = (None, 4000)
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_it_starts_with_closed_standard_streams(provider: ProviderProcess, closed: str) -> None:
    command = f'exec "{sys.executable}" run.py "$@" {closed}'
    port = free_port()
    arguments = [*to(provider), "--port", str(port)]
    with subprocess.Popen(
        ["sh", "-c", command, "sh", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:

            def is_live() -> bool:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=LIMIT).close()
                except OSError:
                    return False
                return True

            wait_until(is_live, "it serves", LIMIT)
            # A socket that got the number of standard error would be sent log lines.
            with Client(port) as client:
                answer = provider.fresh(scripts.answer(["Hello"]))
                request_id = client.request(answer)
                assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
                assert client.text_of(request_id) == "Hello"
            process.terminate()
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()


# Signals


def test_a_hangup_during_the_start_is_a_reload_when_it_is_over(provider: ProviderProcess) -> None:
    reader, writer = os.pipe()
    daemon = Stuck(*to(provider), output=subprocess.DEVNULL, log=writer)
    os.close(writer)
    try:
        maps = Path(f"/proc/{daemon.process.pid}/maps")
        while b"gevent" not in maps.read_bytes():
            assert daemon.process.poll() is None
        while not daemon.is_live():
            daemon.process.send_signal(signal.SIGHUP)
            assert daemon.process.poll() is None
        daemon.process.send_signal(signal.SIGHUP)
        with os.fdopen(reader, "rb") as log:
            events = [json.loads(log.readline())["event"]]
            while events[-1] != "Reloaded":
                events.append(json.loads(log.readline())["event"])
        assert "Started" in events
        assert "Not reloaded" not in events
    finally:
        daemon.__exit__()


STUCK_LOOP = """
import sys
import run
from gevent import monkey
from gateway.app import Gateway
Gateway.drain = lambda self: monkey.get_original("time", "sleep")(3600)  # the whole loop
sys.exit(run.main(sys.argv[1:]))
"""
BUSY_LOOP = """
import sys
import run
from gateway.app import Gateway
def drain(self):
    while True:
        pass
Gateway.drain = drain
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("launcher", [STUCK_LOOP, BUSY_LOOP], ids=["blocked", "busy"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_even_where_its_loop_is_stuck(
    provider: ProviderProcess, launcher: str, second: signal.Signals
) -> None:
    reader, writer = os.pipe()
    with Stuck(*to(provider), output=writer, log=subprocess.DEVNULL, launcher=launcher) as daemon:
        os.close(writer)
        daemon.process.terminate()
        with os.fdopen(reader, "rb") as output:
            while not output.readline().startswith(b"stopping"):
                pass
            wait_until(lambda: not responds(daemon), "its loop is stuck", LIMIT)
            began = time.monotonic()
            daemon.process.send_signal(second)
            assert daemon.process.wait(LIMIT) == 128 + second
            assert time.monotonic() - began < LIMIT / 2


def responds(daemon: Stuck) -> bool:
    try:
        url = f"http://127.0.0.1:{daemon.ops_port}/livez"
        urllib.request.urlopen(url, timeout=0.2).close()
    except OSError:
        return False
    return True
