"""Compares the daemon's metrics with what the doctor did."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from gateway.client import InterruptAck, Response, Session


@dataclass(frozen=True)
class Counts:
    """Numbers of requests and interrupts: in the metrics, or of the doctor's own."""

    requests: int = 0
    interrupts: int = 0
    acks: int = 0
    closed_streams: int = 0

    def shortfall(self, before: Counts, done: Counts) -> list[str]:
        """In words, each metric that rose by less than what was done.

        Args:
            before: the metrics before the first step.
            done: what the doctor did since.
        """
        seconds = "bargein_interrupt_seconds_count"
        rows = (
            ("bargein_requests_total", self.requests - before.requests, done.requests),
            ("bargein_interrupts_total", self.interrupts - before.interrupts, done.interrupts),
            (f'{seconds}{{stage="acknowledged"}}', self.acks - before.acks, done.acks),
            (
                f'{seconds}{{stage="stream_closed"}}',
                self.closed_streams - before.closed_streams,
                done.closed_streams,
            ),
        )
        return [
            f"{name} rose by {rose}, expected at least {due}"
            for name, rose, due in rows
            if rose < due
        ]


def read_counts(page: str) -> Counts | None:
    """The counts on a page of metrics; None where the page is not bargein's."""
    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                name = sample.name.removeprefix("bargein_") + sample.labels.get("stage", "")
                sums[name] = sums.get(name, 0) + sample.value
    except (ValueError, KeyError, IndexError):
        return None
    if "bargein_requests_total" not in page:
        return None
    names = ("requests_total", "interrupts_total")
    stages = ("acknowledged", "stream_closed")
    read = [sums.get(name, 0) for name in names]
    read += [sums.get(f"interrupt_seconds_count{stage}", 0) for stage in stages]
    return Counts(*map(int, read))


def counts_of(session: Session) -> Counts:
    """What the doctor did in a session, as far as the frames it received show it."""
    payloads = [frame.payload for frame in session.frames]
    acks = [payload for payload in payloads if isinstance(payload, InterruptAck)]
    results = [result for ack in acks for result in ack.results]
    return Counts(
        # Some of those that end with an ERROR were never accepted.
        requests=sum(isinstance(answer.end, Response) for answer in session.answers.values()),
        interrupts=len(results),
        acks=len(acks),
        closed_streams=sum(result.stream_closed_ms is not None for result in results),
    )
