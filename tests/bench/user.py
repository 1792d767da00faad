"""The user whose interrupts are measured beside noise, or beside idle sessions."""

import contextlib
import itertools
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from gateway.client import (
    PATH,
    Answer,
    AnswerEnded,
    Connection,
    ConnectionEnded,
    FrameRefused,
    HandshakeFailed,
    Session,
    WaitTimeout,
    open_socket,
)
from tests.bench.processes import Failed

WAIT_SECONDS = 10.0
"""An ack or a text that takes longer counts as this long, and ends the measurement."""

LOOK_SECONDS = 0.1
"""How often `on_look` is called."""


class Measured(msgspec.Struct):
    """What the user has seen. Times in milliseconds."""

    ack_ms: list[float]
    """Of each INTERRUPT, from writing it to reading its ack."""
    gap_ms: float
    """The longest time without text in the answer that went on all the time."""
    fault: str | None = None
    """Why the measurement ended early."""


class User:
    """A registered client with two kinds of requests: one answer that goes on all the time, and
    short ones that are interrupted.

    Args:
        port: of the gateway.
        api_key: with which it registers.

    Raises:
        Failed: it cannot register, or gets no answer.
    """

    def __init__(self, port: int, api_key: str) -> None:
        auth = {"type": "API_KEY", "api_key": api_key}
        try:
            sock = open_socket("127.0.0.1", port, timeout=WAIT_SECONDS)
            connection = Connection(f"ws://127.0.0.1:{port}{PATH}", sock, timeout=WAIT_SECONDS)
            self.session = Session(connection, timeout=WAIT_SECONDS)
            self.session.register(auth=auth, platform="WEB", on_new_request="parallel")
            self._long: Answer = self.session.ask("long")
            self._long.wait_text()
        except (OSError, HandshakeFailed, FrameRefused, AnswerEnded) as error:
            raise Failed(f"no session for the user: {error}") from error
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.session.drop()

    def measure(
        self, seconds: float, interval: float, on_look: Callable[[], object] = lambda: None
    ) -> Measured:
        """Ask and interrupt for so long.

        Args:
            seconds: how long.
            interval: seconds from one REQUEST to the next. Its INTERRUPT is sent when the interval
                is over, so its answer streams meanwhile.
            on_look: called now and then.
        """
        began = time.monotonic()
        seen = len(self._long.texts)
        measured = Measured([], 0.0)
        try:
            for number in range(1, max(2, round(seconds / interval)) + 1):
                self._number += 1
                short = self.session.ask(f"short {self._number}")
                self._read_until(began + number * interval, on_look)
                if self._long.ended:
                    raise Failed(f"the long answer has ended: {self._long.end}")
                sent_at = time.monotonic()
                try:
                    self.session.interrupt(short)
                finally:
                    measured.ack_ms.append((self._last_ack_at(sent_at) - sent_at) * 1000)
                short.collect()
        except (WaitTimeout, ConnectionEnded) as error:
            measured.fault = str(error).partition("\n")[0]
        times = [began, *(frame.at for frame in self._long.texts[seen:]), time.monotonic()]
        gaps = (after - before for before, after in itertools.pairwise(times))
        measured.gap_ms = max(gaps) * 1000
        return measured

    def _last_ack_at(self, sent_at: float) -> float:
        frame = self.session.interruptions[-1].ack_frame
        return frame.at if frame is not None else max(time.monotonic(), sent_at + WAIT_SECONDS)

    def _read_until(self, at: float, on_look: Callable[[], object]) -> None:
        """Read what comes, up to this time."""
        while (left := at - time.monotonic()) > 0:
            on_look()
            with contextlib.suppress(WaitTimeout):
                self.session.wait(lambda: None, "the next interrupt", min(left, LOOK_SECONDS))
