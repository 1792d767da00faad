"""Is it working? What people do by hand against a live daemon, step by step.

A client like any other (`gateway/doctor/caller.py`): it knows the daemon by its sockets only.

    STEPS      the one table; a step returns what was seen, or raises `StepFailed` or `StepSkipped`
    examine    goes through the table, and makes a `Report`
    main       `run.py doctor`

A further step is one more function and its row in the table. Every wait is bounded (`Limits`), and
so is the whole.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import json
import math
import os
import re
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TextIO
from urllib.parse import SplitResult, urlsplit

import gevent
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from actors.words import AckStatus, ErrorCode, InterruptOutcome, InterruptReason
from gateway.doctor.caller import (
    ACCOUNT_VARIABLE,
    KEY_VARIABLE,
    OTHER_PROGRAM,
    PASSWORD_VARIABLE,
    SEE_LOG,
    Answer,
    Page,
    StepFailed,
    Stop,
    Talk,
    Target,
    UsageError,
    address_of,
    auth_of,
    count,
    dial,
    get,
    hiding,
    ops_url,
    quoted,
    span,
    websocket_url,
)
from gateway.wire.frames import PATH, Error, InterruptAck, Response

DEFAULT_URL = f"ws://127.0.0.1:8000{PATH}"
DEFAULT_OPS_URL = "http://127.0.0.1:9464/metrics"

_STORY = (
    "Tell me a very long story in English, in fifty chapters of at least ten sentences each. Begin "
    "every chapter with its number."
)
_NEW_INPUT = (
    "Something else now: tell me all that you know about lighthouses, in English, at great length."
)

_STREAM_FRAMES = 20
"""So many pieces of text are a stream: some providers fall silent only after a few."""

_STREAM_SECONDS = 3.0
"""Of a slow stream, whatever came in this time is enough."""

_TRIES = 3
"""To interrupt an answer before it is complete: the machine may just have been busy."""

_SLOW_ACK_SECONDS = 2.0
"""The gateway waits 1 s at most for a stream to close; the rest is for the way."""

_SETTLE_SECONDS = 2.0
"""How long to wait until an answer that is not needed any more has ended."""

_BOOKS_SECONDS = 2.0
"""Counting comes after what is counted: a moment on a busy machine."""

_OVERLAP_CHARS = 24
"""So much of the old answer is not said again by chance."""


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds.

    Args:
        wait: for any one thing.
        quiet: nothing of an interrupted answer may come for so long.
        whole: for everything together; None is eight waits.
    """

    wait: float = 15.0
    quiet: float = 2.0
    whole: float | None = None

    @property
    def total(self) -> float:
        """For everything together."""
        return 8 * self.wait if self.whole is None else self.whole


class StepSkipped(Exception):
    """A step can tell nothing; the text says why.

    Args:
        why: in plain words.
        advice: what to do about it.
        is_allowed: whether all may hold without this step.
    """

    def __init__(self, why: str, advice: str = "", *, is_allowed: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.advice = advice
        self.is_allowed = is_allowed


# Metrics ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What the metrics count of what is done here."""

    requests: int = 0
    interrupts: int = 0
    acks: int = 0
    closed_streams: int = 0

    def shortfall(self, before: Counts, done: Counts) -> list[str]:
        """In words, which of these have moved by less than was done."""
        rows = (
            ("bargein_requests_total", self.requests - before.requests, done.requests),
            ("bargein_interrupts_total", self.interrupts - before.interrupts, done.interrupts),
            (
                'bargein_interrupt_seconds_count{stage="acknowledged"}',
                self.acks - before.acks,
                done.acks,
            ),
            (
                'bargein_interrupt_seconds_count{stage="stream_closed"}',
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
    """Of a page of metrics; None where it is none of bargein's."""
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


def counts_of(talk: Talk) -> Counts:
    """What was done, as far as its end was seen."""
    acks = [seen.payload for seen in talk.acks]
    results = [result for ack in acks for result in ack.results]
    return Counts(
        # Of those that end with an ERROR, some were never taken on.
        requests=sum(isinstance(answer.end, Response) for answer in talk.answers.values()),
        interrupts=len(results),
        acks=len(acks),
        closed_streams=sum(result.stream_closed_ms is not None for result in results),
    )


# The steps --------------------------------------------------------------------------------------


class Visit:
    """One examination: what the steps know of each other."""

    def __init__(self, target: Target, limits: Limits) -> None:
        self.target = target
        self.limits = limits
        self.until = time.monotonic() + limits.total
        self.spoken: Talk | None = None
        """The connection, be it lost or not."""
        self.loss: str | None = None
        """Why it was lost, in an earlier step."""
        self.before: Counts | StepFailed | StepSkipped | None = None
        """The metrics, before anything was done."""
        self.streams = False
        """Whether answers are known to come."""
        self.story: Answer | None = None
        self.old: Answer | None = None
        """Interrupted in mid-stream."""
        self.stop: Stop | None = None
        self.new: Answer | None = None

    @property
    def talk(self) -> Talk:
        """The connection, to go on with."""
        assert self.spoken is not None
        if self.loss is not None:
            raise StepSkipped(f"there is no connection any more: {self.loss}")
        return self.spoken

    def soon(self) -> float:
        """When one wait is over."""
        return min(time.monotonic() + self.limits.wait, self.until)

    def get(self, url: SplitResult, path: str) -> Page:
        return get(url, path, self.target.tls, self.soon())

    def counts(self) -> Counts:
        """The metrics as they are.

        Raises:
            StepFailed: they cannot be had.
            StepSkipped: nobody said where they are.
        """
        url, is_given = self.target.ops_url, self.target.is_ops_given
        if url is None:
            raise StepSkipped(
                f"where the metrics of {self.target.address} are is not known",
                "--ops-url says it.",
                is_allowed=True,
            )
        try:
            page = self.get(url, url._replace(scheme="", netloc="").geturl())
        except StepFailed as cross:
            if is_given:
                raise
            raise StepSkipped(
                f"no metrics: {cross.seen}", "--ops-url says where they are.", is_allowed=True
            ) from None
        counts = read_counts(page.body.decode(errors="replace")) if page.status == 200 else None
        if counts is None:
            seen = f"no metrics of bargein at {address_of(url)}, but {page.said}"
            advice = "--ops-url has to be http://HOST:PORT/metrics, by the daemon's --ops-port."
            raise (
                StepFailed(seen, advice) if is_given else StepSkipped(seen, advice, is_allowed=True)
            )
        return counts


def _connect(visit: Visit) -> str:
    address = visit.target.address
    dial(address, visit.target.tls, visit.soon()).close()
    return f"{address} takes connections"


class _Health(msgspec.Struct):
    status: str
    version: str
    uptime_seconds: float
    sessions: int | None = None
    requests: int | None = None


def _health(visit: Visit) -> str:
    path = visit.target.health_path
    page = visit.get(visit.target.url, path)
    if page.status != 200:
        advice = "A proxy in front has to pass this path on too. " + OTHER_PROGRAM
        raise StepFailed(f"GET {path} gets {page.said}", advice)
    try:
        health = msgspec.json.decode(page.body, type=_Health)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StepFailed(
            f"GET {path} gets an answer, but not bargein's: {quoted(page.body)}", OTHER_PROGRAM
        ) from None
    if health.status != "ok":
        raise StepFailed(
            f"the daemon says that it is {quoted(health.status)}",
            "Its supervisor does not answer: the log has why. Start the daemon again.",
        )
    return (
        f"bargein {quoted(health.version)}, up for {span(health.uptime_seconds)}, with "
        f"{count(health.sessions or 0, 'session')}, {count(health.requests or 0, 'request')}"
    )


def _websocket(visit: Visit) -> str:
    began = time.monotonic()
    visit.spoken = Talk(visit.target, visit.until, visit.limits.wait)
    return f"opened in {span(time.monotonic() - began)}"


def _register(visit: Visit) -> str:
    try:
        visit.before = visit.counts()
    except (StepFailed, StepSkipped) as failure:
        visit.before = failure
    talk = visit.talk
    began = time.monotonic()
    talk.register(visit.target.auth)
    try:
        came = talk.wait(lambda: talk.registered, visit.limits.wait)
    except StepFailed as cross:
        raise _registration_refused(cross, visit.target) from None
    if not came or talk.registered is None:
        raise StepFailed(
            f"no REGISTER_ACK within {span(time.monotonic() - began)}",
            "It is a WebSocket, but does it speak this protocol? " + OTHER_PROGRAM,
        )
    took = span(time.monotonic() - began)
    return f"session {quoted(talk.registered.session_id)} in {took}"


def _registration_refused(cross: StepFailed, target: Target) -> StepFailed:
    if ErrorCode.SERVER_BUSY in cross.seen:
        return StepFailed(cross.seen, "The daemon stops, or has no room: try again, see /readyz.")
    if ErrorCode.AUTH_FAILED in cross.seen and target.secrets:
        return StepFailed(
            cross.seen,
            f"It refuses the credentials. Is what {KEY_VARIABLE} (or …_ACCOUNT, …_PASSWORD) holds "
            "right, and is it in the daemon's file (--auth-file)?",
        )
    if ErrorCode.AUTH_FAILED in cross.seen:
        return StepFailed(
            cross.seen,
            f"It wants credentials. Set {KEY_VARIABLE}, or {ACCOUNT_VARIABLE} and "
            f"{PASSWORD_VARIABLE}.",
        )
    return cross


def _stream(visit: Visit) -> str:
    talk = visit.talk
    story = visit.story = talk.ask(_STORY)
    first = _first_text(visit, story)

    def is_enough() -> object:
        texts = story.texts
        slow = texts[-1].at - first >= _STREAM_SECONDS
        return story.ends or len(texts) >= _STREAM_FRAMES or slow

    while not is_enough():
        if not _next_piece(visit, story):
            silence = span(time.monotonic() - story.pieces[-1].at)
            raise StepFailed(
                f"{count(len(story.pieces), 'piece')} came, then nothing for {silence}",
                "The provider stalls in mid-answer: look at it. --llm-idle-timeout of the daemon "
                "says when to give up on it.",
            )
    _check_order(story)
    if isinstance(story.end, Error):
        raise _of_provider(story.end)
    if story.end is not None and not story.is_complete:
        raise StepFailed(f"it ended as {story.end.outcome}, and nobody had interrupted it", SEE_LOG)
    visit.streams = True
    number, took = len(story.texts), span(story.texts[-1].at - first)
    seen = f"first token after {span(first - story.asked_at)}, {count(number, 'piece')} in {took}"
    return seen + (", and then it was complete" if story.ends else "")


def _next_piece(visit: Visit, answer: Answer) -> bool:
    """Wait for one more, or the end; False when that takes too long."""
    so_far = len(answer.pieces)
    return visit.talk.wait(lambda: len(answer.pieces) > so_far or answer.ends, visit.limits.wait)


def _first_text(visit: Visit, answer: Answer) -> float:
    """Wait for it; returns when it came."""
    began = time.monotonic()
    if not visit.talk.wait(lambda: answer.texts or answer.ends, visit.limits.wait):
        raise StepFailed(
            f"no first token within {span(time.monotonic() - began)}",
            "The gateway works, its provider stalls: look at that one. --llm-first-token-timeout "
            "of the daemon says when to give up on it. (A slow model? Then a longer --timeout.)",
        )
    if answer.texts:
        return answer.texts[0].at
    if isinstance(answer.end, Error):
        raise _of_provider(answer.end)
    if answer.is_complete:
        raise StepFailed(
            "the answer was complete, and empty",
            "Look at the provider: is its model the right one?",
        )
    raise StepFailed(
        "the answer ended before its first token, and nobody had interrupted it", SEE_LOG
    )


def _check_order(answer: Answer) -> None:
    if (disorder := answer.disorder()) is not None:
        raise StepFailed(
            f"frames are out of order: {disorder}",
            "The gateway breaks its promise 4, or something on the way changes frames.",
        )


_PROVIDER_ADVICE = (
    (
        r"no connection to the provider",
        "The gateway works, its provider cannot be reached: is that one up, and is the address "
        "right that the daemon printed when it started (--llm-url)?",
    ),
    (
        r"answered 40[13]\b",
        "The provider refuses the daemon's key: look at its OPENAI_API_KEY (--llm-api-key-env).",
    ),
    (r"answered 404\b", "The provider has no such path or model: --llm-url, --llm-model."),
    (r"answered 429\b", "The provider has had enough of this key: its limits, or its bill."),
    (r"answered 5\d\d\b", "The provider is ill: look at it, or at its status page."),
)


def _of_provider(error: Error) -> StepFailed:
    seen = f"the answer failed: {error.error_code}: {quoted(error.error_detail)}"
    for pattern, advice in _PROVIDER_ADVICE:
        if re.search(pattern, error.error_detail):
            return StepFailed(seen, advice)
    match error.error_code:
        case ErrorCode.REQUEST_TIMEOUT:
            advice = (
                "The provider is too slow: look at it, and at --llm-first-token-timeout, "
                "--llm-idle-timeout and --llm-total-timeout of the daemon."
            )
        case ErrorCode.SERVER_BUSY:
            advice = "The daemon stops, or has no room: try again, see /readyz."
        case _:
            advice = "Look at the provider, and at the daemon's log for this request."
    return StepFailed(seen, advice)


def _interrupt(visit: Visit) -> str:
    talk, old = visit.talk, visit.story
    assert old is not None
    tries = 0
    while True:
        if old.ends:  # too short, or too quick: be quicker
            _settle(visit)
            old = talk.ask(_STORY)
            _first_text(visit, old)
        visit.old = old
        with talk.together():
            visit.stop = talk.interrupt(old, InterruptReason.USER_NEW_INPUT)
            visit.new = talk.ask(_NEW_INPUT)
        tries += 1
        try:
            return _acknowledged(visit, visit.stop, old)
        except StepSkipped:
            if tries == _TRIES or not old.is_complete:
                raise


def _acknowledged(visit: Visit, stop: Stop, target: Answer) -> str:
    """Wait for an INTERRUPT_ACK that says that a live answer was stopped."""
    ack, took = _ack(visit, stop)
    result = next((one for one in ack.results if one.request_id == target.request_id), None)
    outcome = None if result is None else result.outcome
    if outcome in (InterruptOutcome.ALREADY_DONE, None):
        visit.talk.wait(lambda: target.ends, visit.limits.wait)
        if target.is_complete:
            raise StepSkipped(
                f"the answer was complete after {count(len(target.texts), 'piece')}, before the "
                "INTERRUPT came",
                "This provider's answers are too short or too quick to interrupt: try another "
                "model.",
            )
        if isinstance(target.end, Error):
            raise StepSkipped(f"it had failed before: {quoted(target.end.error_detail)}")
    if outcome is InterruptOutcome.TIMED_OUT:
        raise StepFailed(
            f"INTERRUPT_ACK after {took}: the provider's stream could not be closed in time",
            "It goes on, and costs: see bargein_streams_open_after_ack_total, and the log for "
            "“Stream still open after interrupt”.",
        )
    is_named = target.request_id in ack.interrupted_request_ids
    if outcome is not InterruptOutcome.STOPPED or ack.status is not AckStatus.SUCCESS:
        raise StepFailed(
            f"INTERRUPT_ACK says {ack.status}, {outcome or 'nothing of the request'}, of an answer "
            "that was live",
            "Look at the daemon's log for “Interrupt request details”.",
        )
    if not is_named:
        raise StepFailed("interrupted_request_ids of INTERRUPT_ACK lacks what it stopped", SEE_LOG)
    assert result is not None
    closed = result.stream_closed_ms
    return f"INTERRUPT_ACK after {took}" + (
        "" if closed is None else f"; the provider's stream was closed in {span(closed / 1000)}"
    )


def _ack(visit: Visit, stop: Stop) -> tuple[InterruptAck, str]:
    """Wait for it; returns it, and after how long it came."""
    talk = visit.talk
    if not talk.wait(lambda: stop.ack, visit.limits.wait) or stop.ack is None:
        seen = f"no INTERRUPT_ACK within {span(time.monotonic() - stop.sent_at)}"
        if talk.strangers:
            seen += f", but {talk.strangers[0]}"
        raise StepFailed(seen, "Look at the daemon's log for “Interrupt request details”.")
    seconds = stop.ack.at - stop.sent_at
    if seconds > _SLOW_ACK_SECONDS:
        raise StepFailed(
            f"INTERRUPT_ACK took {span(seconds)}",
            "Users wait for it. A busy machine (bargein_loop_lag_seconds), or a slow way there?",
        )
    return stop.ack.payload, span(seconds)


def _old_stops(visit: Visit) -> str:
    old, stop = visit.old, visit.stop
    if old is None or stop is None:
        raise StepSkipped("nothing was interrupted in mid-stream")
    if old.is_complete:
        raise StepSkipped("the old answer was complete before it was interrupted")
    return _silenced(visit, old, stop)


def _silenced(visit: Visit, target: Answer, stop: Stop, *others: Answer) -> str:
    """That an interrupted answer ends, and nothing of it follows.

    Args:
        visit: where.
        target: it.
        stop: what interrupted it.
        others: answers that must have ended too, in whatever way.
    """
    talk, limits, answers = visit.talk, visit.limits, (target, *others)
    ack = stop.ack
    since = time.monotonic() if ack is None else ack.at
    told = "wait for the ack" if ack is None else "ack"
    so_far = [len(answer.pieces) for answer in answers]
    talk.listen(max(since + limits.quiet - time.monotonic(), 0))
    late = [
        piece
        for answer, number in zip(answers, so_far, strict=True)
        for piece in (answer.pieces[number:] if ack is None else answer.pieces)
        if ack is None or piece.order > ack.order
    ]
    if late:
        raise StepFailed(
            f"{count(len(late), 'frame')} of the old answer came after the {told}, the last "
            f"{span(late[-1].at - since)} after it",
            "The server says that it stopped, and does not: users hear two answers at once. Is it "
            "bargein that answers here, or a proxy that keeps frames back?",
        )
    if not talk.wait(lambda: all(answer.ends for answer in answers), limits.wait):
        which = "that of the answer before it" if target.ends else "the old answer's"
        raise StepFailed(
            f"the last frame (text_stream_seq -1) did not come: {which}",
            "Clients wait for it: bargein promises exactly one. " + SEE_LOG,
        )
    for answer in answers:
        _check_order(answer)
    end = target.end
    if not isinstance(end, Response) or end.interrupted is not True:
        outcome = None if end is None else end.outcome
        raise StepFailed(f"it ended as {outcome} where it was interrupted", SEE_LOG)
    if ack is not None and target.ends[0].order < ack.order:
        raise StepFailed("its last frame came before the INTERRUPT_ACK", SEE_LOG)
    _check_strangers(talk)
    return f"its last frame came, and nothing more for {span(limits.quiet)}"


def _check_strangers(talk: Talk) -> None:
    if talk.strangers:
        raise StepFailed(f"{talk.strangers[0]} came, which nobody had asked for", SEE_LOG)


def _new_starts(visit: Visit) -> str:
    old, new = visit.old, visit.new
    if old is None or new is None:
        raise StepSkipped("nothing was interrupted in mid-stream")
    first = _first_text(visit, new)
    _check_order(new)
    if old.ends and new.pieces[0].order < old.ends[0].order:
        raise StepFailed("the new answer began before the old one's last frame", SEE_LOG)
    start = new.text[:_OVERLAP_CHARS]
    # At the very beginning the two may well be alike: some test providers say always the same.
    if len(start) == _OVERLAP_CHARS and old.text.find(start) > 0:
        raise StepFailed(
            f"the new answer begins with what the old one had said: {quoted(start)!r}",
            "What was queued of the old answer goes out as the new one. " + SEE_LOG,
        )
    return f"first token after {span(first - new.asked_at)}"


def _before_first_token(visit: Visit) -> str:
    talk = visit.talk
    _settle(visit)
    with talk.together():
        answer = talk.ask(_STORY)
        stop = talk.interrupt(answer)
    seen = _acknowledged(visit, stop, answer)
    _silenced(visit, answer, stop)
    text = count(len(answer.texts), "piece") if answer.texts else "nothing"
    return f"{seen}; {text} of the answer came"


def _settle(visit: Visit) -> None:
    """End what is still live, so that the next step finds nothing else; as far as that goes."""
    talk = visit.talk
    live = [answer for answer in talk.answers.values() if not answer.ends]
    for answer in live:
        talk.interrupt(answer)
    talk.wait(lambda: all(answer.ends for answer in live), min(_SETTLE_SECONDS, visit.limits.wait))


def _nothing_running(visit: Visit) -> str:
    talk = visit.talk
    _settle(visit)
    if not all(answer.ends for answer in talk.answers.values()):
        raise StepSkipped("an answer that was interrupted is still running")
    ended = next(reversed(talk.answers.values()), None)
    with talk.together():
        stops = [talk.interrupt(target) for target in ([ended, None] if ended else [None])]
    times = []
    for stop in stops:
        ack, took = _ack(visit, stop)
        times.append(took)
        if ack.status is not AckStatus.FAILED or ack.interrupted_request_ids:
            raise StepFailed(
                f"INTERRUPT_ACK says {ack.status} for "
                f"{quoted(', '.join(ack.interrupted_request_ids)) or 'no request'}, where nothing "
                "ran",
                "Clients take it for a stop that was not. " + SEE_LOG,
            )
    return f"INTERRUPT_ACK after {' and '.join(times)}: FAILED, as it has to be"


def _everything(visit: Visit) -> str:
    talk = visit.talk
    _settle(visit)
    if visit.streams:
        older = talk.ask(_STORY)
        _first_text(visit, older)
        newer = talk.ask(_NEW_INPUT)
        _first_text(visit, newer)
        stop = talk.interrupt(None)
    else:
        with talk.together():
            older, newer = talk.ask(_STORY), talk.ask(_NEW_INPUT)
            stop = talk.interrupt(None)
    seen = _acknowledged(visit, stop, newer)
    _silenced(visit, newer, stop, older)
    return f"{seen}; both answers ended, nothing more came"


def _metrics(visit: Visit) -> str:
    before = visit.before
    if isinstance(before, StepFailed | StepSkipped):
        raise before
    assert before is not None and visit.spoken is not None
    done = counts_of(visit.spoken)
    until = min(time.monotonic() + _BOOKS_SECONDS, visit.until)
    while shortfall := visit.counts().shortfall(before, done):
        if time.monotonic() >= until:
            break
        gevent.sleep(0.05)
    is_usual = visit.target.address.port == urlsplit(DEFAULT_URL).port
    if shortfall and not visit.target.is_ops_given and not is_usual:
        raise StepSkipped(
            "the metrics in the usual place did not move as was due: they are another daemon's?",
            "--ops-url says where this one's are.",
            is_allowed=True,
        )
    if shortfall:
        raise StepFailed(
            "; ".join(shortfall),
            "Has the daemon started again meanwhile, or are they another daemon's (--ops-url)?",
        )
    return (
        f"at least {count(done.requests, 'request')} and {count(done.interrupts, 'interrupt')} "
        "more, as was done here"
    )


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
    """The step without which this one is not tried."""


STEPS = (
    Step("connect", "Something listens there", _connect, None),
    Step("health", "/health is well", _health, "connect"),
    Step("websocket", "The WebSocket opens", _websocket, "connect"),
    Step("register", "REGISTER works", _register, "websocket"),
    Step("stream", "An answer streams", _stream, "register"),
    Step("interrupt", "INTERRUPT in mid-stream", _interrupt, "stream"),
    Step("old_stops", "The old answer stops", _old_stops, "stream"),
    Step("new_starts", "The new answer starts", _new_starts, "stream"),
    Step("before_first_token", "INTERRUPT before any token", _before_first_token, "register"),
    Step("nothing_running", "INTERRUPT of nothing", _nothing_running, "register"),
    Step("everything", "INTERRUPT of everything", _everything, "register"),
    Step("metrics", "The metrics moved", _metrics, "register"),
)
"""In the order in which they are tried."""


# The report -------------------------------------------------------------------------------------


class Status(enum.StrEnum):
    """How a step went."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Result:
    """How a step went, what was seen, and what to do about it."""

    step: Step
    status: Status
    seen: str
    advice: str
    ms: float
    """How long it took."""
    is_required: bool = True
    """False where all may hold although it was skipped."""


@dataclass(frozen=True)
class Report:
    """What an examination found."""

    url: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether every step went well; the metrics may have been out of reach."""
        return all(one.status is Status.OK or not one.is_required for one in self.results)

    def as_json(self) -> str:
        """For machines, in one object."""
        steps = [
            {
                "step": one.step.name,
                "title": one.step.title,
                "status": one.status.value,
                "ok": None if one.status is Status.SKIPPED else one.status is Status.OK,
                "seen": one.seen,
                "advice": one.advice or None,
                "ms": round(one.ms, 1),
            }
            for one in self.results
        ]
        whole = {"ok": self.holds, "url": self.url, "seconds": round(self.seconds, 3)}
        return json.dumps(whole | {"steps": steps}, indent=2, ensure_ascii=False)


def examine(
    target: Target, limits: Limits, on_result: Callable[[Result], None] = lambda result: None
) -> Report:
    """Go through all steps.

    Args:
        target: what to examine.
        limits: how long to wait.
        on_result: called after each step.
    """
    began = time.monotonic()
    visit = Visit(target, limits)
    results: dict[str, Result] = {}
    try:
        with hiding(target.secrets):
            for step in STEPS:
                result = results[step.name] = _try_step(step, visit, results)
                on_result(result)
    finally:
        if visit.spoken is not None:
            visit.spoken.close()
    return Report(target.shown, tuple(results.values()), time.monotonic() - began)


def _try_step(step: Step, visit: Visit, results: Mapping[str, Result]) -> Result:
    began = time.monotonic()
    status, is_required, advice = Status.SKIPPED, True, ""
    visit.loss = None if visit.spoken is None else visit.spoken.loss
    try:
        if step.needs is not None and (needed := results[step.needs]).status is not Status.OK:
            raise StepSkipped(f"it needs “{needed.step.title}”")
        if began >= visit.until:
            raise StepSkipped(f"no time was left: all took over {span(visit.limits.total)}")
        seen = step.run(visit)
        status = Status.OK
    except StepFailed as cross:
        status, seen, advice = Status.FAILED, cross.seen, cross.advice
    except StepSkipped as moot:
        seen, advice, is_required = moot.why, moot.advice, not moot.is_allowed
    for secret in visit.target.secrets:
        seen, advice = seen.replace(secret, "…"), advice.replace(secret, "…")
    return Result(step, status, seen, advice, (time.monotonic() - began) * 1000, is_required)


class TextRenderer:
    """The report for people, line by line as it comes.

    Args:
        out: where to; colours only where that is a terminal, and only the signs that it can show.
        environ: `NO_COLOR` is obeyed.
    """

    _LOOKS: ClassVar = {
        Status.OK: ("✓", "32"),
        Status.FAILED: ("✗", "31"),
        Status.SKIPPED: ("–", "33"),
    }
    _PLAIN: ClassVar = {Status.OK: "ok  ", Status.FAILED: "FAIL", Status.SKIPPED: "skip"}
    _WIDTH = max(len(step.title) for step in STEPS)

    def __init__(self, out: TextIO, environ: Mapping[str, str]) -> None:
        self._out = out
        self._is_coloured = out.isatty() and not environ.get("NO_COLOR")
        self._encoding = out.encoding or "utf-8"

    def begin(self, target: Target) -> None:
        """The first line."""
        self._say(f"bargein doctor: {target.shown}")

    def show(self, result: Result) -> None:
        """One step."""
        sign, colour = self._LOOKS[result.status]
        if not self._can_show(sign):
            sign = self._PLAIN[result.status]
        if self._is_coloured:
            sign = f"\x1b[{colour}m{sign}\x1b[0m"
        why = "skipped: " if result.status is Status.SKIPPED else ""
        self._say(f"{sign} {result.step.title:<{self._WIDTH}}  {why}{result.seen}")
        if result.advice:
            self._say(f"    {'→' if self._can_show('→') else '->'} {result.advice}")

    def end(self, report: Report) -> None:
        """The last line."""
        failed = [one for one in report.results if one.status is Status.FAILED]
        skipped = [one for one in report.results if one.status is Status.SKIPPED]
        if failed:
            words = f"{len(failed)} of {len(report.results)} steps failed"
            words += f", {len(skipped)} could not be tried" if skipped else ""
            words += f". Begin with “{failed[0].step.title}”."
        elif not report.holds:
            words = f"Nothing failed, but {count(len(skipped), 'step')} could not be told."
        elif skipped:
            words = "All is well; the metrics were not looked at."
        else:
            words = "All is well."
        self._say(f"{words} ({report.seconds:.1f} s)")

    def _can_show(self, sign: str) -> bool:
        try:
            sign.encode(self._encoding)
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def _say(self, line: str) -> None:
        shown = line.encode(self._encoding, "replace").decode(self._encoding)
        with contextlib.suppress(OSError):  # whoever reads may have gone
            print(shown, file=self._out, flush=True)


# The command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the flags of `run.py doctor`."""
    parser.description = (
        "Examine a running daemon as one of its clients: ask, interrupt, and see whether that "
        "really stops. It costs the beginnings of a few answers of its provider."
    )
    parser.epilog = (
        f"Credentials come from the environment: {KEY_VARIABLE}, or {ACCOUNT_VARIABLE} and "
        f"{PASSWORD_VARIABLE}. Exit code: 0 when all holds, 1 when not, 2 for a bad command line."
    )
    add = parser.add_argument
    add("--url", default=DEFAULT_URL, help=f"its WebSocket, ws or wss (default: {DEFAULT_URL})")
    add(
        "--ops-url",
        metavar="URL",
        help=f"its metrics (default: {DEFAULT_OPS_URL}, where --url is on this machine too)",
    )
    add("--ca-file", metavar="FILE", help="certificate authorities to trust, for wss and https")
    add(
        "--timeout",
        type=_seconds,
        default=Limits().wait,
        metavar="SECONDS",
        help=f"for any one wait; eight of them for the whole (default: {Limits().wait:g})",
    )
    add("--json", action="store_true", help="one JSON object, for machines")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


_seconds.__name__ = "number of seconds"


def target_of(args: argparse.Namespace, environ: Mapping[str, str]) -> Target:
    """What to examine, of the command line and the environment.

    Raises:
        UsageError: they cannot be used.
    """
    url = websocket_url(args.url)
    is_here = url.hostname in ("localhost", "127.0.0.1", "::1")
    ops = args.ops_url or (DEFAULT_OPS_URL if is_here else None)
    try:
        tls = ssl.create_default_context(cafile=args.ca_file)
    except OSError as error:  # ssl's own are, too
        words = error.strerror or str(error)
        raise UsageError(f"--ca-file {args.ca_file} cannot be used: {words}") from None
    metrics = ops_url(ops) if ops else None
    return Target(url, metrics, bool(args.ops_url), auth_of(environ), tls)


def main(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """`run.py doctor`; returns the exit code.

    Args:
        args: as the parser of `add_arguments` gives them.
        environ: the environment.
    """
    try:
        target = target_of(args, environ)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limits = Limits(wait=args.timeout)
    renderer = TextRenderer(sys.stdout, environ)
    try:
        if args.json:
            report = examine(target, limits)
            print(report.as_json(), flush=True)
        else:
            renderer.begin(target)
            report = examine(target, limits, renderer.show)
            renderer.end(report)
    except KeyboardInterrupt:
        return 130
    return 0 if report.holds else 1
