"""The steps up to a registered session."""

from __future__ import annotations

import time

import msgspec

from gateway.client import Error, ErrorCode, FrameRefused
from gateway.doctor.faults import OTHER_PROGRAM, StepFailed, StepSkipped
from gateway.doctor.pages import dial
from gateway.doctor.talk import Talk, refusal
from gateway.doctor.target import ACCOUNT_VARIABLE, KEY_VARIABLE, PASSWORD_VARIABLE, Target
from gateway.doctor.visit import Visit
from gateway.doctor.wording import count, quoted, span

BUSY_ADVICE = "The daemon is stopping, or at its limits: try again, and see /readyz."


def connect(visit: Visit) -> str:
    """Connect to the port."""
    address = visit.target.address
    dial(visit.target, address, visit.soon()).close()
    return f"{address} takes connections"


class _Health(msgspec.Struct):
    status: str
    version: str
    uptime_seconds: float
    sessions: int | None = None
    requests: int | None = None


def health(visit: Visit) -> str:
    """Ask for `/health`."""
    path = visit.target.health_path
    page = visit.get(visit.target.url, path)
    if page.status != 200:
        advice = "A proxy in front has to pass this path on too. " + OTHER_PROGRAM
        raise StepFailed(f"GET {path} gets {page.said}", advice)
    try:
        found = msgspec.json.decode(page.body, type=_Health)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise StepFailed(
            f"GET {path} gets an answer that is not bargein's: {quoted(page.body)}", OTHER_PROGRAM
        ) from None
    if found.status != "ok":
        raise StepFailed(
            f"the daemon reports the status {quoted(found.status)}",
            "Its supervisor does not answer: see the log for the reason, and restart the daemon.",
        )
    return (
        f"bargein {quoted(found.version)}, up for {span(found.uptime_seconds)}, with "
        f"{count(found.sessions or 0, 'session')}, {count(found.requests or 0, 'request')}"
    )


def open_websocket(visit: Visit) -> str:
    """Open the WebSocket."""
    began = time.monotonic()
    visit.opened = Talk(visit.target, visit.until, visit.limits.wait)
    return f"opened in {span(time.monotonic() - began)}"


def register(visit: Visit) -> str:
    """Read the metrics, for the last step, and register."""
    try:
        visit.before = visit.counts()
    except (StepFailed, StepSkipped) as failure:
        visit.before = failure
    began = time.monotonic()
    try:
        ack = visit.talk.register(visit.limits.wait)
    except FrameRefused as refused:
        raise _refused(refused.error, visit.target) from None
    took = span(time.monotonic() - began)
    if ack is None:
        raise StepFailed(
            f"no REGISTER_ACK within {took}",
            "This is a WebSocket, but does it speak this protocol? " + OTHER_PROGRAM,
        )
    return f"session {quoted(ack.session_id)} in {took}"


def _refused(error: Error, target: Target) -> StepFailed:
    match error.error_code:
        case ErrorCode.SERVER_BUSY:
            advice = BUSY_ADVICE
        case ErrorCode.AUTH_FAILED if target.secrets:
            advice = (
                f"The daemon refuses the credentials. Is the value of {KEY_VARIABLE} (or …_ACCOUNT "
                "and …_PASSWORD) right, and is it in the daemon's file (--auth-file)?"
            )
        case ErrorCode.AUTH_FAILED:
            advice = (
                f"The daemon requires credentials. Set {KEY_VARIABLE}, or {ACCOUNT_VARIABLE} and "
                f"{PASSWORD_VARIABLE}."
            )
        case _:
            advice = (
                f"Do the daemon and this doctor have the same version? ({target.prog} --version)"
            )
    return StepFailed(f"the server refused a frame: {refusal(error)}", advice)
