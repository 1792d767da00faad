"""The steps that interrupt."""

from __future__ import annotations

import time

from gateway.client import (
    AckStatus,
    Answer,
    Error,
    InterruptAck,
    Interruption,
    InterruptOutcome,
    InterruptReason,
    Response,
)
from gateway.doctor.faults import SEE_LOG, StepFailed, StepSkipped
from gateway.doctor.streaming import STORY, check_order, is_complete, wait_first_text
from gateway.doctor.visit import Visit
from gateway.doctor.wording import count, quoted, span

_NEW_INPUT = (
    "Something else now: tell me all that you know about lighthouses, in English, at great length."
)

_TRIES = 3
"""Attempts to interrupt an answer before it is complete: the machine may have been busy."""

_SLOW_ACK_SECONDS = 2.0
"""The gateway waits at most 1 s for a stream to close; the rest is for the network."""

_SETTLE_SECONDS = 2.0
"""How long to wait until an answer that is no longer needed has ended."""

_OVERLAP_CHARS = 24
"""A text of this length from the old answer does not appear in the new one by chance."""

_NOTHING_INTERRUPTED = "no answer was interrupted in mid-stream"


def interrupt(visit: Visit) -> str:
    """Interrupt the story by a new request, as a user who has something else to say."""
    talk, old = visit.talk, visit.story
    assert old is not None
    tries = 0
    while True:
        if old.ends:  # it was too short, or too quick: interrupt the next one at its first text
            _settle(visit)
            old = talk.ask(STORY)
            wait_first_text(visit, old)
        visit.old = old
        with talk.one_packet():
            visit.stop = talk.interrupt(old, InterruptReason.USER_NEW_INPUT)
            visit.new = talk.ask(_NEW_INPUT)
        tries += 1
        try:
            return _check_acknowledged(visit, visit.stop, old)
        except StepSkipped:
            if tries == _TRIES or not is_complete(old):
                raise


def old_stops(visit: Visit) -> str:
    """Check that the interrupted answer ended."""
    old, stop = visit.old, visit.stop
    if old is None or stop is None:
        raise StepSkipped(_NOTHING_INTERRUPTED)
    if is_complete(old):
        raise StepSkipped("the old answer was complete before it was interrupted")
    return _check_silent(visit, old, stop)


def new_starts(visit: Visit) -> str:
    """Check that the answer to the new request starts, and is a new one."""
    old, new = visit.old, visit.new
    if old is None or new is None:
        raise StepSkipped(_NOTHING_INTERRUPTED)
    first = wait_first_text(visit, new)
    check_order(new)
    if old.ends and new.pieces[0].order < old.ends[0].order:
        raise StepFailed("the new answer began before the old one's last frame", SEE_LOG)
    start = new.text[:_OVERLAP_CHARS]
    # At their very beginning the two may be alike: some test providers always say the same.
    if len(start) == _OVERLAP_CHARS and old.text.find(start) > 0:
        raise StepFailed(
            f"the new answer begins with text of the old one: {quoted(start)!r}",
            "Text that was queued for the old answer is sent as the new one. " + SEE_LOG,
        )
    return f"first token after {span(first - new.asked_at)}"


def before_first_token(visit: Visit) -> str:
    """Interrupt a request at the moment it is sent."""
    talk = visit.talk
    _settle(visit)
    with talk.one_packet():
        answer = talk.ask(STORY)
        stop = talk.interrupt(answer)
    seen = _check_acknowledged(visit, stop, answer)
    _check_silent(visit, answer, stop)
    text = count(len(answer.texts), "piece") if answer.texts else "nothing"
    return f"{seen}; {text} of the answer came"


def nothing_running(visit: Visit) -> str:
    """Interrupt where there is nothing to interrupt."""
    talk = visit.talk
    _settle(visit)
    if not all(answer.ends for answer in talk.answers):
        raise StepSkipped("an answer that was interrupted is still running")
    targets = [*talk.answers[-1:], None]
    with talk.one_packet():
        stops = [talk.interrupt(target) for target in targets]
    times = []
    for stop in stops:
        ack, took = _wait_ack(visit, stop)
        times.append(took)
        if ack.status is not AckStatus.FAILED or ack.interrupted_request_ids:
            which = quoted(", ".join(ack.interrupted_request_ids)) or "no request"
            raise StepFailed(
                f"INTERRUPT_ACK says {ack.status} for {which}, while nothing was running",
                "Clients believe that something was stopped. " + SEE_LOG,
            )
    return f"INTERRUPT_ACK after {' and '.join(times)}: FAILED, as expected"


def everything(visit: Visit) -> str:
    """Interrupt all requests at once; by the policy of this session, the older has just ended."""
    talk = visit.talk
    _settle(visit)
    if visit.streams:
        older = talk.ask(STORY)
        wait_first_text(visit, older)
        newer = talk.ask(_NEW_INPUT)
        wait_first_text(visit, newer)
        stop = talk.interrupt(None)
    else:
        with talk.one_packet():
            older, newer = talk.ask(STORY), talk.ask(_NEW_INPUT)
            stop = talk.interrupt(None)
    seen = _check_acknowledged(visit, stop, newer)
    _check_silent(visit, newer, stop, older)
    return f"{seen}; both answers ended, nothing more came"


def _settle(visit: Visit) -> None:
    """Try to end what is still live, so that the next step starts with nothing live."""
    talk = visit.talk
    live = [answer for answer in talk.answers if not answer.ends]
    for answer in live:
        talk.interrupt(answer)
    talk.wait(lambda: all(answer.ends for answer in live), min(_SETTLE_SECONDS, visit.limits.wait))


def _wait_ack(visit: Visit, stop: Interruption) -> tuple[InterruptAck, str]:
    """Wait for an INTERRUPT_ACK; returns it, and after how long it came.

    Raises:
        StepFailed: it did not come, or came late.
    """
    talk = visit.talk
    talk.wait(lambda: stop.ack, visit.limits.wait)
    if stop.ack is None or stop.ack_frame is None:
        seen = f"no INTERRUPT_ACK within {span(time.monotonic() - stop.sent_at)}"
        if talk.unexpected is not None:
            seen += f", but {talk.unexpected}"
        raise StepFailed(seen, "See the daemon's log for “Interrupt request details”.")
    seconds = stop.ack_frame.at - stop.sent_at
    if seconds > _SLOW_ACK_SECONDS:
        raise StepFailed(
            f"INTERRUPT_ACK took {span(seconds)}",
            "Users wait for it. Is the machine busy (bargein_loop_lag_seconds), or the network "
            "slow?",
        )
    return stop.ack, span(seconds)


def _check_acknowledged(visit: Visit, stop: Interruption, target: Answer) -> str:
    """Wait for an INTERRUPT_ACK which says that a live answer was stopped.

    Raises:
        StepFailed: it does not come in time, or says something else.
        StepSkipped: the answer had ended before.
    """
    ack, took = _wait_ack(visit, stop)
    result = next((one for one in ack.results if one.request_id == target.request_id), None)
    outcome = None if result is None else result.outcome
    if outcome in (InterruptOutcome.ALREADY_DONE, None):
        visit.talk.wait(lambda: target.ends, visit.limits.wait)
        if is_complete(target):
            raise StepSkipped(
                f"the answer was complete after {count(len(target.texts), 'piece')}, before the "
                "INTERRUPT came",
                "This provider's answers are too short or too quick to interrupt: try another "
                "model.",
            )
        if isinstance(target.end, Error):
            raise StepSkipped(f"the answer had failed before: {quoted(target.end.error_detail)}")
    if outcome is InterruptOutcome.TIMED_OUT:
        raise StepFailed(
            f"INTERRUPT_ACK after {took}: the provider's stream could not be closed in time",
            "The provider continues, at your cost: see bargein_streams_open_after_ack_total, and "
            "the log for “Stream still open after interrupt”.",
        )
    has_stopped = outcome is InterruptOutcome.STOPPED and ack.status is AckStatus.SUCCESS
    if result is None or not has_stopped:
        raise StepFailed(
            f"INTERRUPT_ACK for a live answer says {ack.status}, {outcome or 'without its result'}",
            "See the daemon's log for “Interrupt request details”.",
        )
    if target.request_id not in ack.interrupted_request_ids:
        raise StepFailed("INTERRUPT_ACK lacks the request in interrupted_request_ids", SEE_LOG)
    closed = result.stream_closed_ms
    return f"INTERRUPT_ACK after {took}" + (
        "" if closed is None else f"; the provider's stream was closed in {span(closed / 1000)}"
    )


def _check_silent(visit: Visit, target: Answer, stop: Interruption, *others: Answer) -> str:
    """Check that an interrupted answer ends, and that nothing follows.

    Args:
        visit: the examination.
        target: the answer.
        stop: what interrupted it.
        others: answers that must have ended too, with any outcome.

    Raises:
        StepFailed: it did not end, or something followed.
    """
    talk, limits, answers, ack = visit.talk, visit.limits, (target, *others), stop.ack_frame
    since = time.monotonic() if ack is None else ack.at
    so_far = [len(answer.pieces) for answer in answers]
    talk.listen(max(since + limits.quiet - time.monotonic(), 0))
    late = [
        piece
        for answer, number in zip(answers, so_far, strict=True)
        for piece in (answer.pieces[number:] if ack is None else answer.pieces)
        if ack is None or piece.order > ack.order
    ]
    if late:
        moment = "wait for the ack" if ack is None else "ack"
        raise StepFailed(
            f"{count(len(late), 'frame')} of the old answer came after the {moment}, the last "
            f"{span(late[-1].at - since)} after it",
            "The server says that it stopped, and does not: users hear two answers at once. Is "
            "this server bargein, or a proxy that holds frames back?",
        )
    if not talk.wait(lambda: all(answer.ends for answer in answers), limits.wait):
        which = "the answer before it" if target.ends else "the old answer"
        raise StepFailed(
            f"the last frame (text_stream_seq -1) of {which} did not come",
            "Clients wait for it: bargein promises exactly one. " + SEE_LOG,
        )
    for answer in answers:
        check_order(answer)
    end = target.end
    if not isinstance(end, Response) or end.interrupted is not True:
        outcome = None if end is None else end.outcome
        raise StepFailed(f"it ended as {outcome}, not as an interrupted answer", SEE_LOG)
    if ack is not None and target.ends[0].order < ack.order:
        raise StepFailed("its last frame came before the INTERRUPT_ACK", SEE_LOG)
    if talk.unexpected is not None:
        raise StepFailed(
            f"{talk.unexpected} came unexpectedly: it answers no frame of the doctor's", SEE_LOG
        )
    return f"its last frame came, and nothing more for {span(limits.quiet)}"
