"""A whole daemon is stopped under load for longer than all its limits, and goes on: nothing is
ended that was alive."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness import scripts
from tests.harness.client import Client, Received
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.test_run import provider_arguments

LIMIT = 1.0
STOP_SECONDS = 3.0
RATE = 20
PATIENCE = 15.0

LAUNCHER = f"""
import dataclasses, sys
import run
from gateway.server import connection, server

connection._HANDSHAKE_SECONDS = connection.CLOSE_SECONDS = server.CLOSE_SECONDS = {LIMIT}
make = server.Server.__init__

def make_with_pings(self, settings, *rest):
    settings = dataclasses.replace(settings, ping_interval={LIMIT / 5}, ping_timeout={LIMIT})
    make(self, settings, *rest)

server.Server.__init__ = make_with_pings
sys.exit(run.main(sys.argv[1:]))
"""
"""What has no option gets a limit here."""

ARGUMENTS = (
    *("--llm-connect-timeout", str(LIMIT), "--llm-first-token-timeout", str(LIMIT)),
    *("--llm-idle-timeout", str(LIMIT), "--llm-total-timeout", str(STOP_SECONDS + 3)),
    *("--write-timeout", str(LIMIT)),
    *("--session-timeout", str(2 * LIMIT), "--heartbeat-interval", str(LIMIT / 2)),
    *("--stale-after", str(1.5 * LIMIT), "--reap-interval", str(LIMIT / 4)),
)
"""Every limit is shorter than the stop; the total limit has room for the rest of an answer."""


@pytest.fixture
def daemon(provider: ProviderProcess) -> Iterator[Daemon]:
    arguments = (*provider_arguments(provider), *ARGUMENTS)
    with Daemon(*arguments, launcher=LAUNCHER) as daemon:
        yield daemon


def test_nothing_is_ended_that_was_alive(daemon: Daemon, provider: ProviderProcess) -> None:
    """Clients with streams, one that only answers pings and heartbeats, one that reads slowly; and
    one provider that says nothing, which is ended as ever."""
    reading: list[Reading] = []
    try:
        for _ in range(10):
            script = provider.fresh(scripts.answer(_texts(STOP_SECONDS + 2), RATE))
            reading.append(Reading(daemon.port, script))
        idle = Reading(daemon.port)
        slow = Reading(daemon.port, provider.fresh(scripts.flood("x" * 200)), pause_seconds=0.01)
        silent = Reading(daemon.port, provider.fresh(scripts.idle_mid_stream(["a"])))
        reading += [idle, slow, silent]
        for one in reading:
            one.wait_text()
        daemon.signal(signal.SIGSTOP)
        time.sleep(STOP_SECONDS)  # this is the pause
        went_on_at = time.monotonic()
        daemon.signal(signal.SIGCONT)
        for one in reading[:10]:
            assert one.wait_terminal()["outcome"] == "COMPLETED"
        end = silent.wait_terminal()
        assert end["error_code"] == "REQUEST_TIMEOUT"
        assert silent.ended_at - went_on_at < LIMIT + 1
        for one in (idle, slow):
            one.wait_heartbeats(4)  # longer than every limit
            assert not any(frame.msg_type == "ERROR" for frame in one.client.frames)
    finally:
        daemon.signal(signal.SIGCONT)
        for one in reading:
            one.stop()
    for words in ("client too slow", "no answer to a ping", "Cleaned up old request"):
        assert words not in daemon.log


def _texts(seconds: float) -> list[str]:
    return [f"{number} " for number in range(int(seconds * RATE))]


class Reading:
    """A client whose frames are read, and whose heartbeats are answered, by a thread.

    Args:
        port: of the daemon.
        script: of its request; None makes none.
        pause_seconds: how long it waits before each read.
    """

    def __init__(self, port: int, script: str | None = None, pause_seconds: float = 0.0) -> None:
        self.client = Client(port, receive_buffer=4096 if pause_seconds else None)
        self.request_id = None if script is None else self.client.request(script)
        self.ended_at = 0.0
        self.heartbeats = 0
        self._pause_seconds = pause_seconds
        self._news = threading.Condition()
        self._is_over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_text(self) -> None:
        """Until it has text of its answer, if it has asked."""
        if self.request_id is not None:
            self._wait(lambda: any(frame.text for frame in self._frames()), "text")

    def wait_terminal(self) -> dict[str, Any]:
        """The payload of the end of its answer."""
        self._wait(lambda: any(frame.is_terminal for frame in self._frames()), "the end")
        [end] = [frame for frame in self._frames() if frame.is_terminal]
        self.ended_at = end.at
        return end.payload

    def wait_heartbeats(self, count: int) -> None:
        """Until so many more heartbeats have come, and were answered."""
        until = self.heartbeats + count
        self._wait(lambda: self.heartbeats >= until, f"{count} heartbeats")

    def stop(self) -> None:
        """Stop reading, and drop the connection."""
        self._is_over = True
        self._thread.join(LIMIT)
        self.client.drop()

    def _frames(self) -> list[Received]:
        return [
            frame
            for frame in list(self.client.frames)
            if frame.payload.get("request_id") == self.request_id
        ]

    def _wait(self, fits: Callable[[], bool], what: str) -> None:
        with self._news:
            found = self._news.wait_for(lambda: fits() or self._error is not None, PATIENCE)
        assert found, f"still waiting for {what}"
        if not fits():
            raise AssertionError(f"ended while waiting for {what}") from self._error

    def _read(self) -> None:
        seen = 0
        try:
            while not self._is_over:
                if self._pause_seconds:
                    time.sleep(self._pause_seconds)  # this is how slow it is
                with contextlib.suppress(TimeoutError):
                    if not self.client.read_within(0.1):
                        raise ConnectionError(f"closed with {self.client.close_code}")
                for frame in self.client.frames[seen:]:
                    if frame.msg_type == "HEARTBEAT":
                        self.client.send("HEARTBEAT_REPLY", {})
                        self.heartbeats += 1
                seen = len(self.client.frames)
                with self._news:
                    self._news.notify_all()
        except BaseException as error:
            with self._news:
                self._error = error
                self._news.notify_all()
