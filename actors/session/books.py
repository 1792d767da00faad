"""What a session counts and logs. Log lines and slow counts are deferred, so that they do not delay
an interrupt of another client."""

from __future__ import annotations

from actors.loop.deferred_log import DeferredLog
from actors.loop.lanes import lanes
from actors.session.messages import InterruptAsked
from actors.session.port import InterruptDone
from actors.words import ErrorCode, InterruptReason, Outcome
from metrics.instruments import Metrics, exemplar
from metrics.logs import get_logger

_log = get_logger("ACTOR")  # for code that already runs in the data lane
_deferred_log = DeferredLog(_log)


class Books:
    """Counts and logs for one session.

    Args:
        session_id: the session's; None before there is one.
        peer: address of its client.
        metrics: where it is counted.
    """

    def __init__(self, session_id: str | None, peer: str, metrics: Metrics) -> None:
        self._session_id = session_id
        self._peer = peer
        self._metrics = metrics
        self._lanes = lanes()

    def session_opened(self, client_name: str | None, auth: str) -> None:
        """The session is registered.

        Args:
            client_name: the owner of the credentials; None if they were not checked.
            auth: the kind of the credentials.
        """
        self._metrics.sessions_active.inc()
        fields = {"session_id": self._session_id, "peer": self._peer}
        if client_name is not None:
            fields |= {"client": client_name, "auth": auth}
        _deferred_log.info("Session registered", **fields)

    def session_ended(self, error: BaseException | None, reason: str) -> None:
        """The session is over. `error` is the exception that it failed with, if it failed."""
        self._metrics.sessions_active.dec()
        self._metrics.sessions.labels("failed" if error else "ended").inc()

        def log() -> None:
            _deferred_log.info(
                "Session ended",
                session_id=self._session_id,
                peer=self._peer,
                reason=repr(error) if error is not None else reason,
            )

        self._lanes.run_after_acks(log)  # its requests have stopped by then: their lines go before

    def request_ended(self, outcome: Outcome) -> None:
        """A request has ended. Counts the outcome that its terminal frame gives."""
        self._metrics.requests.labels(outcome.value.lower()).inc()

    def text_delivered(self, chars: int) -> None:
        """A part of an answer was handed to the kernel. `chars` counts Unicode code points."""
        self._metrics.text_chars.inc(chars)

    def request_interrupted(self, request_id: str, reason: InterruptReason) -> None:
        """An interrupted request has ended. Must be called in the data lane."""
        _log.info(
            "Request interrupted",
            session_id=self._session_id,
            request_id=request_id,
            reason=reason.value,
        )

    def request_reaped(self) -> None:
        """The reaper ended a request."""
        self._metrics.requests_reaped.inc()

    def busy(self, reason: str) -> None:
        """A request was refused with `SERVER_BUSY`, for this reason."""
        self._metrics.refused.labels(reason).inc()

    def refused(self, code: ErrorCode, detail: str, request_id: str | None) -> None:
        """A message of the client was refused."""
        _deferred_log.info(
            "Refused message",
            code=code.value,
            detail=detail,
            session_id=self._session_id,
            peer=self._peer,
            request_id=request_id,
        )

    def stop_overdue(self, request_id: str, seconds: float) -> None:
        """A stage still runs this many seconds after it was told to close."""
        self._metrics.streams_open_after_ack.inc()
        _deferred_log.error(
            "Stream still open after interrupt",
            session_id=self._session_id,
            request_id=request_id,
            seconds=seconds,
        )

    def ack_sent(self, seconds: float, request_id: str | None) -> None:
        """An acknowledgement was handed to the kernel, this many seconds after its interrupt was
        read."""
        self._lanes.run_deferred(
            self._metrics.acknowledged_seconds.observe, seconds, exemplar(request_id)
        )

    def interrupt_done(
        self, interrupt: InterruptAsked, live: list[str], done: InterruptDone, *, found: bool
    ) -> None:
        """An interrupt was acknowledged.

        Args:
            interrupt: as it was asked.
            live: the requests that were live when it came.
            done: what it did.
            found: whether one of them was its target.
        """
        self._lanes.run_deferred(self._record_interrupt, interrupt, live, done, found)

    def _record_interrupt(
        self, interrupt: InterruptAsked, live: list[str], done: InterruptDone, found: bool
    ) -> None:
        _log.info(
            "Interrupt request details",
            session_id=self._session_id,
            interrupt_request_id=interrupt.target,
            active_requests=live,
            found=found,
        )
        _log.info("Interrupt acknowledged", session_id=self._session_id, status=done.status.value)
        reason = interrupt.reason.value
        for result in done.results:
            self._metrics.interrupts.labels(reason, result.outcome.value.lower()).inc()
            if result.stream_closed_ms is not None:
                self._metrics.stream_closed_seconds.observe(
                    result.stream_closed_ms / 1000, exemplar(result.request_id)
                )
