"""What can go wrong between a client and a gateway.

Errors of the network (`OSError` with its children, `ssl.SSLError` and `socket.gaierror` among them)
are passed on as they are.
"""

from __future__ import annotations

from .frames import Error


class HandshakeFailed(Exception):
    """The server did not answer the handshake as a WebSocket server does.

    Args:
        message: what is wrong.
        received: the bytes that came in place of a valid answer.
        timed_out: whether the time was up before the answer was whole.
    """

    def __init__(self, message: str, received: bytes, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.received = received
        self.timed_out = timed_out


class HandshakeRefused(HandshakeFailed):
    """The server answered the handshake with another HTTP status than 101.

    Args:
        status: HTTP status code.
        body: the text of the answer.
        received: the bytes of the answer.
    """

    def __init__(self, status: int, body: str, received: bytes) -> None:
        super().__init__(f"HTTP {status}: {body}", received)
        self.status = status
        self.body = body


class ConnectionEnded(ConnectionError):
    """The connection ended before the awaited frame came, or before a frame could be sent.

    Args:
        message: what was awaited, and the last frames.
        code: the gateway's close code; None where it closed without one.
    """

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        self.code = code


class InvalidFrame(Exception):
    """A message from the server is not a frame of protocol 1.0.

    Args:
        message: what is wrong with it.
        data: the message.
    """

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class FrameRefused(Exception):
    """The gateway refused a frame: it sent an ERROR without a `request_id`.

    Args:
        error: that ERROR.
    """

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.error_code}: {error.error_detail}")
        self.error = error


class WaitTimeout(TimeoutError):
    """What was awaited did not come in time; the message shows the last frames."""


class AnswerEnded(Exception):
    """An answer ended with less text than was awaited."""
