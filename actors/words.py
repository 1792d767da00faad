"""The words of the domain: why something was stopped, refused or failed, and how it ended.

A session and its doors share them (`actors/session/port.py`). A door gives them the form of its
protocol; the values are those of wire protocol 1.0, and the log and the metrics use them too.
"""

from __future__ import annotations

import enum


class ErrorCode(enum.StrEnum):
    """Why something was refused, or why a request failed."""

    AUTH_FAILED = "AUTH_FAILED"
    SESSION_INVALID = "SESSION_INVALID"
    STREAM_SEQ_ERROR = "STREAM_SEQ_ERROR"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    SERVER_BUSY = "SERVER_BUSY"
    MALFORMED_PAYLOAD = "MALFORMED_PAYLOAD"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"


class InterruptReason(enum.StrEnum):
    """Why a request was interrupted: what clients say, and the gateway's own reasons."""

    USER_NEW_INPUT = "USER_NEW_INPUT"
    USER_STOP = "USER_STOP"
    USER_VOICE_INPUT = "USER_VOICE_INPUT"
    CLIENT_ERROR = "CLIENT_ERROR"
    OTHER = "OTHER"
    CLIENT_SHUTDOWN = "CLIENT_SHUTDOWN"
    CONNECTION_LOST = "CONNECTION_LOST"
    SERVER_SHUTDOWN = "SERVER_SHUTDOWN"
    SESSION_TIMEOUT = "SESSION_TIMEOUT"


class Outcome(enum.StrEnum):
    """How a request ended."""

    COMPLETED = "COMPLETED"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"
    REAPED = "REAPED"


class InterruptOutcome(enum.StrEnum):
    """What an interrupt did to one target."""

    STOPPED = "STOPPED"
    ALREADY_DONE = "ALREADY_DONE"
    UNKNOWN = "UNKNOWN"
    TIMED_OUT = "TIMED_OUT"


class AckStatus(enum.StrEnum):
    """Whether every target of an interrupt was stopped, some, or none."""

    SUCCESS = "SUCCESS"
    PARTIAL = "PARTIAL"
    FAILED = "FAILED"


class OnNewRequest(enum.StrEnum):
    """What a new request does while another is live."""

    INTERRUPT = "interrupt"
    PARALLEL = "parallel"
    REJECT = "reject"
