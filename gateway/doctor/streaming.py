"""The step that streams an answer, and the checks of answers that other steps use."""

from __future__ import annotations

import re
import time

from gateway.client import Answer, Error, ErrorCode, Outcome, Response
from gateway.doctor.faults import SEE_LOG, StepFailed
from gateway.doctor.reaching import BUSY_ADVICE
from gateway.doctor.talk import disorder, refusal
from gateway.doctor.visit import Visit
from gateway.doctor.wording import count, span

STORY = (
    "Tell me a very long story in English, in fifty chapters of at least ten sentences each. Begin "
    "every chapter with its number."
)

_STREAM_FRAMES = 20
"""Pieces of text to read: some providers stall only after the first few."""

_STREAM_SECONDS = 3.0
"""How long to read a slow stream that brings fewer pieces than that."""


def stream(visit: Visit) -> str:
    """Ask for a long story, and read its beginning."""
    story = visit.story = visit.talk.ask(STORY)
    first = wait_first_text(visit, story)

    def is_enough() -> object:
        texts = story.texts
        is_slow = texts[-1].at - first >= _STREAM_SECONDS
        return story.ends or len(texts) >= _STREAM_FRAMES or is_slow

    while not is_enough():
        if not _wait_next_piece(visit, story):
            silence = span(time.monotonic() - story.pieces[-1].at)
            raise StepFailed(
                f"{count(len(story.pieces), 'piece')} came, then nothing for {silence}",
                "The provider stalls in the middle of an answer: check it. The daemon's "
                "--llm-idle-timeout limits how long it waits for a provider that stalls.",
            )
    check_order(story)
    if isinstance(story.end, Error):
        raise _provider_failed(story.end)
    if story.end is not None and not is_complete(story):
        raise StepFailed(f"it ended as {story.end.outcome}, without an INTERRUPT", SEE_LOG)
    visit.streams = True
    number, took = len(story.texts), span(story.texts[-1].at - first)
    seen = f"first token after {span(first - story.asked_at)}, {count(number, 'piece')} in {took}"
    return seen + (", and then it was complete" if story.ends else "")


def is_complete(answer: Answer) -> bool:
    """Whether an answer ended with COMPLETED."""
    return isinstance(answer.end, Response) and answer.end.outcome is Outcome.COMPLETED


def wait_first_text(visit: Visit, answer: Answer) -> float:
    """Wait for the first text of an answer; returns when it came, by `time.monotonic()`.

    Raises:
        StepFailed: it did not come in time, or the answer ended before.
    """
    began = time.monotonic()
    if not visit.talk.wait(lambda: answer.texts or answer.ends, visit.limits.wait):
        raise StepFailed(
            f"no first token within {span(time.monotonic() - began)}",
            "The gateway works, its provider stalls: check the provider. The daemon's "
            "--llm-first-token-timeout limits how long it waits. (For a slow model, give this "
            "doctor a longer --timeout.)",
        )
    if answer.texts:
        return answer.texts[0].at
    if isinstance(answer.end, Error):
        raise _provider_failed(answer.end)
    if is_complete(answer):
        raise StepFailed(
            "the answer was complete, and empty",
            "Check the provider: is its model the right one?",
        )
    raise StepFailed("the answer ended before its first token, without an INTERRUPT", SEE_LOG)


def check_order(answer: Answer) -> None:
    """Check the order of an answer's frames.

    Raises:
        StepFailed: they are out of order.
    """
    if (fault := disorder(answer)) is not None:
        raise StepFailed(
            f"frames are out of order: {fault}",
            "The gateway breaks its promise 4, or something on the way changes frames.",
        )


def _wait_next_piece(visit: Visit, answer: Answer) -> bool:
    """Wait for one more piece, or the end; False when that takes too long."""
    so_far = len(answer.pieces)
    return visit.talk.wait(lambda: len(answer.pieces) > so_far or answer.ends, visit.limits.wait)


_PROVIDER_ADVICE = (
    (
        r"no connection to the provider",
        "The gateway works, its provider cannot be reached: is the provider running, and is its "
        "address right (--llm-url; the daemon printed it when it started)?",
    ),
    (
        r"answered 40[13]\b",
        "The provider refuses the daemon's key: check its OPENAI_API_KEY (--llm-api-key-env).",
    ),
    (r"answered 404\b", "The provider has no such path or model: check --llm-url and --llm-model."),
    (
        r"answered 429\b",
        "The provider refuses more requests with this key: check its limits and your account.",
    ),
    (r"answered 5\d\d\b", "The provider is failing (5xx): check it, or its status page."),
)


def _provider_failed(error: Error) -> StepFailed:
    seen = f"the answer failed: {refusal(error)}"
    for pattern, advice in _PROVIDER_ADVICE:
        if re.search(pattern, error.error_detail):
            return StepFailed(seen, advice)
    match error.error_code:
        case ErrorCode.REQUEST_TIMEOUT:
            advice = (
                "The provider is too slow: check it, and the daemon's --llm-first-token-timeout, "
                "--llm-idle-timeout and --llm-total-timeout."
            )
        case ErrorCode.SERVER_BUSY:
            advice = BUSY_ADVICE
        case _:
            advice = "Check the provider, and the daemon's log for this request."
    return StepFailed(seen, advice)
