"""Fakes of what an actor stands between, played by hand in a patched process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import gevent.queue

from actors.actor import GreenletActor
from llm.chat.completions import Delta, Message, Prompt, encode_body
from llm.chat.generation import GenerationResult, Sink
from llm.stage import Ending

PROMPT = Prompt((Message("user", "Hello"),))

LIMIT = 5.0  # seconds; bounds a failure, and no success waits for it


class FakeStream:
    """A generation whose reader is the test. Its end is told in the hub, as by the real one."""

    def __init__(self, source: FakeSource, prompt: Prompt, sink: Sink, on_end: Any) -> None:
        self.body = encode_body("test", prompt)
        self.sink = sink
        self.progress_at = time.monotonic()
        self.started = gevent.event.Event()
        self.close_asked = gevent.event.Event()
        self.killed_again = gevent.event.Event()
        self.ended = False
        self._source = source
        self._on_end: Callable[[GenerationResult], None] = on_end

    def start(self) -> None:
        if self._source.fail_start is not None:
            raise self._source.fail_start
        self.started.set()

    def close(self) -> None:
        self.close_asked.set()
        if not self._source.stuck:
            self.end_closed()

    def kill_again(self) -> None:
        self.killed_again.set()

    # The reader's part, played by the test.

    def say(self, *texts: str) -> None:
        """The provider answers, and says this."""
        self.sink.opened()
        for text in texts:
            self.sink.put(Delta(text))

    def end(self, result: GenerationResult) -> None:
        """The reader dies, if it has not yet."""
        if not self.ended:
            self.ended = True
            gevent.get_hub().loop.run_callback(self._on_end, result)

    def end_closed(self) -> None:
        """The reader is killed at last."""
        self.end(GenerationResult(Ending.CLOSED, closed_at=time.monotonic()))

    def complete(self) -> None:
        """The answer is whole."""
        self.end(
            GenerationResult(Ending.COMPLETED, finish_reason="stop", closed_at=time.monotonic())
        )


class FakeSource:
    """Makes fake streams.

    Args:
        stuck: their `close()` never ends them.
        fail_start: what their `start()` raises.
    """

    def __init__(self, *, stuck: bool = False, fail_start: BaseException | None = None) -> None:
        self.stuck = stuck
        self.fail_start = fail_start
        self.streams: list[FakeStream] = []
        self._made: gevent.queue.SimpleQueue[FakeStream] = gevent.queue.SimpleQueue()

    def generation(
        self, prompt: Prompt, sink: Sink, on_end: Callable[[GenerationResult], None]
    ) -> FakeStream:
        stream = FakeStream(self, prompt, sink, on_end)
        self.streams.append(stream)
        self._made.put(stream)
        return stream

    def next(self) -> FakeStream:
        """The next stream that was made, when it was started."""
        stream = self._made.get(timeout=LIMIT)
        assert stream.started.wait(LIMIT), "the stream was not started"
        return stream


class Collector(GreenletActor):
    """An actor that keeps what it is told."""

    def __init__(self, told: gevent.queue.SimpleQueue[Any]) -> None:
        super().__init__()
        self._told = told

    def handle(self, message: Any) -> Any:
        self._told.put(message)


class Clock:
    """A `time` whose monotonic clock stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    @staticmethod
    def time_ns() -> int:
        return time.time_ns()
