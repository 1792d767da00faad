"""Runs all steps, and makes a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from gateway.doctor.faults import StepFailed, StepSkipped
from gateway.doctor.report import Report, Result, Status
from gateway.doctor.steps import STEPS, Step
from gateway.doctor.target import Target
from gateway.doctor.visit import Limits, Visit
from gateway.doctor.wording import hiding, span


def examine(
    target: Target, limits: Limits, on_result: Callable[[Result], None] = lambda result: None
) -> Report:
    """Run all steps.

    Args:
        target: the daemon to test.
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
        if visit.opened is not None:
            visit.opened.close()
    return Report(target.shown, tuple(results.values()), time.monotonic() - began)


def _try_step(step: Step, visit: Visit, results: Mapping[str, Result]) -> Result:
    began = time.monotonic()
    status, is_required, advice = Status.SKIPPED, True, ""
    visit.loss = None if visit.opened is None else visit.opened.loss
    try:
        if step.needs is not None and (needed := results[step.needs]).status is not Status.OK:
            raise StepSkipped(f"it needs “{needed.step.title}”")
        if began >= visit.until:
            raise StepSkipped(
                f"no time was left: the steps before took over {span(visit.limits.total)}"
            )
        seen = step.run(visit)
        status = Status.OK
    except StepFailed as failure:
        status, seen, advice = Status.FAILED, failure.seen, failure.advice
    except StepSkipped as skip:
        seen, advice, is_required = skip.why, skip.advice, not skip.is_allowed
    for secret in visit.target.secrets:
        seen, advice = seen.replace(secret, "…"), advice.replace(secret, "…")
    return Result(step, status, seen, advice, (time.monotonic() - began) * 1000, is_required)
