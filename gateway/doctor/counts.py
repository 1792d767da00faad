"""What the daemon's metrics count, against what was done here."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from gateway.client import InterruptAck, Response, Session


@dataclass(frozen=True)
class Counts:
    """What the metrics count of what the doctor does."""

    requests: int = 0
    interrupts: int = 0
    acks: int = 0
    closed_streams: int = 0

    def shortfall(self, before: Counts, done: Counts) -> list[str]:
        """In words, which of these have moved by less than was done."""
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
            f"{name} moved by {moved} where {due} {'was' if due == 1 else 'were'} due"
            for name, moved, due in rows
            if moved < due
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
    """What was done in a session, as far as its end was seen."""
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
