"""One examination: its limits, and what its steps share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from urllib.parse import SplitResult

from gateway.client import Answer, Interruption
from gateway.doctor.counts import Counts, read_counts
from gateway.doctor.faults import StepFailed, StepSkipped
from gateway.doctor.pages import Page, get
from gateway.doctor.talk import Talk
from gateway.doctor.target import Target, address_of


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds.

    Args:
        wait: for each wait.
        quiet: how long to check that no frame of an interrupted answer comes.
        whole: for the whole examination; None is eight waits.
    """

    wait: float = 15.0
    quiet: float = 2.0
    whole: float | None = None

    @property
    def total(self) -> float:
        """For the whole examination."""
        return 8 * self.wait if self.whole is None else self.whole


class Visit:
    """One examination.

    Public attributes:
        until: `time.monotonic()` when the examination ends at the latest.
        opened: the connection, once it is open; it may have been lost since.
        loss: why it was lost, in an earlier step.
        before: the metrics before the first request, or why they are not known.
        streams: whether an answer has streamed.
        story: the answer of the step "stream".
        old, stop, new: the answer that was interrupted in mid-stream, its INTERRUPT, and the
            answer that followed.
    """

    def __init__(self, target: Target, limits: Limits) -> None:
        self.target = target
        self.limits = limits
        self.until = time.monotonic() + limits.total
        self.opened: Talk | None = None
        self.loss: str | None = None
        self.before: Counts | StepFailed | StepSkipped | None = None
        self.streams = False
        self.story: Answer | None = None
        self.old: Answer | None = None
        self.stop: Interruption | None = None
        self.new: Answer | None = None

    @property
    def talk(self) -> Talk:
        """The open connection.

        Raises:
            StepSkipped: it was lost.
        """
        assert self.opened is not None
        if self.loss is not None:
            raise StepSkipped(f"the connection was lost before this step: {self.loss}")
        return self.opened

    def soon(self) -> float:
        """When one wait ends at the latest."""
        return min(time.monotonic() + self.limits.wait, self.until)

    def get(self, url: SplitResult, path: str) -> Page:
        """One GET; raises as `pages.get`."""
        return get(self.target, url, path, self.soon())

    def counts(self) -> Counts:
        """The metrics as they are now.

        Raises:
            StepFailed: they cannot be read, and --ops-url was given.
            StepSkipped: their address is unknown, or they cannot be read at the default one.
        """
        url, is_given = self.target.ops_url, self.target.is_ops_given
        if url is None:
            raise StepSkipped(
                f"the address of the metrics of {self.target.address} is not known",
                "Give it as --ops-url.",
                is_allowed=True,
            )
        try:
            page = self.get(url, url._replace(scheme="", netloc="").geturl())
        except StepFailed as failure:
            if is_given:
                raise
            raise StepSkipped(
                f"no metrics: {failure.seen}", "Give their address as --ops-url.", is_allowed=True
            ) from None
        counts = read_counts(page.body.decode(errors="replace")) if page.status == 200 else None
        if counts is None:
            seen = f"no bargein metrics at {address_of(url)}, but {page.said}"
            advice = "--ops-url must be http://HOST:PORT/metrics, with the daemon's --ops-port."
            if is_given:
                raise StepFailed(seen, advice)
            raise StepSkipped(seen, advice, is_allowed=True)
        return counts
