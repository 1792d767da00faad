"""The table of all steps. A new step is a function, and a row here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import gevent

from gateway.doctor import reaching, stopping, streaming
from gateway.doctor.counts import counts_of
from gateway.doctor.faults import StepFailed, StepSkipped
from gateway.doctor.visit import Visit
from gateway.doctor.wording import count

_BOOKS_SECONDS = 2.0
"""How long the metrics may lag: a busy daemon counts a moment after it answers."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Step:
    """One line of the report."""

    name: str
    """For machines."""
    title: str
    """For people."""
    run: Callable[[Visit], str]
    """Returns what was seen; raises `StepFailed` or `StepSkipped`."""
    needs: str | None
    """The step that must have succeeded before this one is tried."""


def metrics(visit: Visit) -> str:
    """Check that the metrics have counted what the steps did."""
    before = visit.before
    if isinstance(before, StepFailed | StepSkipped):
        raise before
    assert before is not None and visit.opened is not None
    done = counts_of(visit.opened.session)
    until = min(time.monotonic() + _BOOKS_SECONDS, visit.until)
    while shortfall := visit.counts().shortfall(before, done):
        if time.monotonic() >= until:
            break
        gevent.sleep(_POLL_SECONDS)
    target = visit.target
    if shortfall and not target.is_ops_given and not target.is_default_port:
        raise StepSkipped(
            "the metrics at the default address did not rise: are they another daemon's?",
            "Give the address of this daemon's metrics as --ops-url.",
            is_allowed=True,
        )
    if shortfall:
        raise StepFailed(
            "; ".join(shortfall),
            "Was the daemon restarted meanwhile, or are they another daemon's (--ops-url)?",
        )
    return (
        f"at least {count(done.requests, 'request')} and {count(done.interrupts, 'interrupt')} "
        "more, as expected"
    )


STEPS = (
    Step("connect", "Something listens there", reaching.connect, None),
    Step("health", "/health is well", reaching.health, "connect"),
    Step("websocket", "The WebSocket opens", reaching.open_websocket, "connect"),
    Step("register", "REGISTER works", reaching.register, "websocket"),
    Step("stream", "An answer streams", streaming.stream, "register"),
    Step("interrupt", "INTERRUPT in mid-stream", stopping.interrupt, "stream"),
    Step("old_stops", "The old answer stops", stopping.old_stops, "stream"),
    Step("new_starts", "The new answer starts", stopping.new_starts, "stream"),
    Step(
        "before_first_token", "INTERRUPT before any token", stopping.before_first_token, "register"
    ),
    Step("nothing_running", "INTERRUPT of nothing", stopping.nothing_running, "register"),
    Step("everything", "INTERRUPT of everything", stopping.everything, "register"),
    Step("metrics", "The metrics moved", metrics, "register"),
)
"""In the order in which they are tried."""
