"""Turns what a session says into frames of wire protocol 1.0."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from msgspec import UNSET, Struct, UnsetType
from websockets.frames import CloseCode

from actors.outlet import Outlet, RequestEnd
from actors.session.port import (
    CLIENT_LEFT,
    CONNECTION_LOST,
    SERVER_RESTART,
    SESSION_EXPIRED,
    Goodbye,
    InterruptDone,
    SessionFacts,
)
from actors.session.profile import FunctionDefinition
from actors.words import ErrorCode, InterruptOutcome
from gateway.wire.encode import AnswerEncoder, encode, error, terminal
from gateway.wire.frames import (
    HealthCheckAck,
    HealthStatus,
    Heartbeat,
    InterruptAck,
    InterruptResult,
    RegisterAck,
    ServerPayload,
    SessionData,
    SessionInfo,
    SessionWarn,
    Shutdown,
)

_S = TypeVar("_S", bound=Struct)

_OUTCOME_WORDS = {
    InterruptOutcome.STOPPED: "stopped",
    InterruptOutcome.ALREADY_DONE: "already finished",
    InterruptOutcome.UNKNOWN: "unknown request",
    InterruptOutcome.TIMED_OUT: "told to stop, but its stream is still open",
}
"""The words for each outcome in the `message` of an INTERRUPT_ACK."""

CLOSE_CODES: dict[Goodbye, CloseCode | None] = {
    CLIENT_LEFT: CloseCode.NORMAL_CLOSURE,
    SESSION_EXPIRED: CloseCode.POLICY_VIOLATION,
    SERVER_RESTART: CloseCode.SERVICE_RESTART,
    CONNECTION_LOST: None,  # there is no connection to close
}
"""The close code of each goodbye. A client whose connection was lost gets none."""


class Outbox(Protocol):
    """Takes the frames for the client (`gateway.server.outbox.Outbox`)."""

    def outlet(self, encoder: AnswerEncoder) -> Outlet: ...
    def send_control(
        self, payload: bytes, on_written: Callable[[float], None] | None = None
    ) -> None: ...
    def close(self, code: int, reason: str) -> None: ...


class WirePort:
    """The port of one connection (`actors.session.port.Port`).

    Args:
        outbox: the outbox of the connection.
        health: returns the answer to HEALTH_CHECK.
    """

    def __init__(self, outbox: Outbox, health: Callable[[], HealthStatus]) -> None:
        self._outbox = outbox
        self._health = health
        self._session_id: str | None = None
        self.on_voice_unwanted: Callable[[str], None] = lambda _request_id: None
        """Called with the id of a request when the session ignores the rest of its voice."""

    def send(
        self, payload: ServerPayload, on_written: Callable[[float], None] | None = None
    ) -> None:
        """Send a frame ahead of all queued answers.

        Args:
            payload: the payload of the frame.
            on_written: called with `time.monotonic()` once the kernel has the whole frame.
        """
        now_ms = time.time_ns() // 1_000_000
        self._outbox.send_control(encode(payload, self._session_id, now_ms), on_written)

    def close(self, code: CloseCode, reason: str) -> None:
        """Close the connection after the frames that were sent before."""
        self._outbox.close(code, reason)

    # What a session says.

    def open_outlet(self, request_id: str) -> Outlet:
        assert self._session_id is not None
        return self._outbox.outlet(AnswerEncoder(self._session_id, request_id))

    def session_opened(self, session_id: str, timeout_seconds: float) -> None:
        self._session_id = session_id
        self.send(RegisterAck(session_id, math.ceil(timeout_seconds)))

    def request_ended(self, end: RequestEnd) -> None:
        self.send(terminal(end))

    def interrupt_done(self, done: InterruptDone, on_sent: Callable[[float], None]) -> None:
        tag = done.tag
        self.send(
            InterruptAck(
                done.stopped,
                done.status,
                _ack_message(done),
                [
                    InterruptResult(
                        one.request_id,
                        one.outcome,
                        one.delivered_text_chars,
                        one.stream_closed_ms,
                        UNSET if one.stops_on_close is None else one.stops_on_close.value,
                    )
                    for one in done.results
                ],
                # Exactly as it was sent.
                tag if isinstance(tag, str | UnsetType) else None,
            ),
            on_sent,
        )

    def refused(self, code: ErrorCode, detail: str) -> None:
        self.send(error(code, detail))

    def session_described(self, facts: SessionFacts, tag: object) -> None:
        profile = facts.profile
        data = SessionData(
            profile.platform,
            profile.require_tts,
            profile.enable_srs,
            # They encode as the definitions that they were.
            cast("list[FunctionDefinition]", [one.definition for one in profile.functions]),
            facts.created_ms,
            facts.remaining_seconds,
        )
        self.send(SessionInfo(_only(data, tag)))

    def door_answers(self, tag: object) -> None:
        self.send(HealthCheckAck(_only(self._health(), tag)))

    def sign_of_life_wanted(self, remaining_seconds: int) -> None:
        self.send(Heartbeat(remaining_seconds))

    def time_nearly_up(self, remaining_seconds: int) -> None:
        message = f"the session ends in {remaining_seconds} s without a HEARTBEAT_REPLY or REQUEST"
        self.send(SessionWarn(remaining_seconds, message))

    def voice_unwanted(self, request_id: str) -> None:
        self.on_voice_unwanted(request_id)

    def goodbye(self, goodbye: Goodbye) -> None:
        code = CLOSE_CODES[goodbye]
        if code is not None:
            self.send(Shutdown(goodbye.text))
            self.close(code, goodbye.text)

    def session_failed(self) -> None:
        self.close(CloseCode.INTERNAL_ERROR, "internal error")


def _only(data: _S, fields: object) -> _S:
    """Keep the fields that are asked for by name; without a list, or with an empty one, all."""
    if not isinstance(fields, list) or not fields:
        return data
    asked = {name: getattr(data, name) for name in data.__struct_fields__ if name in fields}
    return type(data)(**asked)


def _ack_message(done: InterruptDone) -> str:
    words = [f"{one.request_id}: {_OUTCOME_WORDS[one.outcome]}" for one in done.results]
    return "; ".join(words) or "no request in progress"
