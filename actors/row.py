"""The stages of one request as one unit: started and closed together, reported once.

Every stage calls its `on_end` exactly once, however it ends (`llm/stage.py`). So only three things
can happen to a row:

- Every stage completes. The row reports when the last one has completed.
- A stage fails. The work of the others is now useless, so the row closes them. It reports when the
  last one has ended.
- The owner closes the row. That closes every stage in one step. The row reports when the last one
  has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import gevent
from msgspec import Struct

from actors.outlet import Delivered
from llm.chat.completions import Prompt
from llm.chat.generation import GenerationResult, Sink
from llm.errors import StreamError
from llm.provider import StopsOnClose
from llm.stage import Ending, Stage, StageResult

MakeStages: TypeAlias = Callable[[Prompt, Sink, Callable[[StageResult], None]], Sequence[Stage]]
"""Makes the stages of a request, first to last, none of them started. Each calls the function that
it is given when it has ended. Making a stage acquires nothing: one that was not started holds no
connection, no file and no greenlet that runs."""

_WORST_FIRST = (StopsOnClose.NO, StopsOnClose.UNKNOWN, StopsOnClose.YES)


class Report(Struct, frozen=True):
    """The one report of a request, made by `make_report` when every stage has ended.

    Args:
        stages: their results, in the order in which they ended; none where none was started.
        delivered: what the client got up to then.
        is_final: whether nothing was sent since: the request was told to stop before.
        ending: failed if any stage failed, completed if all of them completed, else closed.
        error: the first failure of a stage; None if no stage failed.
        closed_at: `time.monotonic()` when the last connection was closed; None if there was none.
        stops_on_close: the worst value among the providers that got the request; None if none did.
        generation: the result of the generation; None if it was not started.
    """

    stages: tuple[StageResult, ...]
    delivered: Delivered
    is_final: bool
    ending: Ending
    error: StreamError | None
    closed_at: float | None
    stops_on_close: StopsOnClose | None
    generation: GenerationResult | None


def make_report(
    stages: Sequence[StageResult], delivered: Delivered, *, is_final: bool = False
) -> Report:
    """Sum up the results of a row; the arguments are fields of `Report`."""
    endings = {stage.ending for stage in stages}
    if Ending.FAILED in endings:
        ending = Ending.FAILED
    elif endings == {Ending.COMPLETED}:
        ending = Ending.COMPLETED
    else:
        ending = Ending.CLOSED
    stops_on_close = {stage.stops_on_close for stage in stages}
    return Report(
        stages=tuple(stages),
        delivered=delivered,
        is_final=is_final,
        ending=ending,
        error=next((stage.error for stage in stages if stage.error is not None), None),
        closed_at=max(
            [stage.closed_at for stage in stages if stage.closed_at is not None], default=None
        ),
        stops_on_close=next((value for value in _WORST_FIRST if value in stops_on_close), None),
        generation=next((stage for stage in stages if isinstance(stage, GenerationResult)), None),
    )


class Row:
    """The stages of one request, in order.

    Args:
        make_stages: makes the stages.
        prompt: what the model is asked.
        sink: takes what the generation produces.
        on_end: called once with the results when the last stage has ended. It runs in the hub, so
            it must not block.
    """

    def __init__(
        self,
        make_stages: MakeStages,
        prompt: Prompt,
        sink: Sink,
        on_end: Callable[[tuple[StageResult, ...]], None],
    ) -> None:
        self._on_end: Callable[[tuple[StageResult, ...]], None] | None = on_end
        self._results: list[StageResult] = []
        self._is_closing = False
        self._timer: Any = None
        self._stages = tuple(make_stages(prompt, sink, self._stage_ended))
        assert self._stages, "a row has at least one stage"

    @property
    def has_ended(self) -> bool:
        """True when the last stage has ended."""
        return len(self._results) == len(self._stages)

    @property
    def progress_at(self) -> float:
        """`time.monotonic()` when a stage last made progress."""
        return max(stage.progress_at for stage in self._stages)

    def start(self) -> None:
        """Start every stage, first to last."""
        for stage in self._stages:
            stage.start()

    def close(self) -> None:
        """Close every stage in one step. Never blocks; may be called more than once."""
        self._is_closing = True
        for stage in self._stages:
            stage.close()

    def kill_again(self) -> None:
        """Kill the stages that still run long after `close()`: the last resort."""
        if not self.has_ended:
            for stage in self._stages:
                stage.kill_again()

    def outlive_owner(self, seconds: float) -> None:
        """Close the row, whose owner has failed. While a stage still runs, kill it every so many
        seconds."""
        self.close()
        if not self.has_ended:
            self._timer = gevent.get_hub().loop.timer(seconds, seconds)
            self._timer.start(self.kill_again)

    def _stage_ended(self, result: StageResult) -> None:
        self._results.append(result)
        if self.has_ended:
            if self._timer is not None:
                self._timer.stop()
                self._timer.close()
            if self._on_end is not None:
                on_end, self._on_end = self._on_end, None  # breaks a reference cycle
                on_end(tuple(self._results))
        elif result.ending is Ending.FAILED and not self._is_closing:
            self.close()
