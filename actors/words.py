"""The enums of the domain: why something was refused, stopped or failed, and how it ended.

Sessions and doors share them (`actors/session/port.py`). The values are those of wire protocol 1.0,
and the log and the metrics use the same ones. Another door may translate them.
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
    """Why a request was interrupted: the reasons that clients give, and the gateway's own."""

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
    """Whether an interrupt stopped all of its targets, some of them, or none."""

    SUCCESS = "SUCCESS"
    PARTIAL = "PARTIAL"
    FAILED = "FAILED"


class OnNewRequest(enum.StrEnum):
    """What a new request does while another is live."""

    INTERRUPT = "interrupt"
    PARALLEL = "parallel"
    REJECT = "reject"
