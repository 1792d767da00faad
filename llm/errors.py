"""Everything that can go wrong with a generation, as one small tree of exceptions.

`llm/chat/attempt.py` maps the exceptions of urllib3, http.client and requests-sse to these, once,
and lets none of those out. The text of each error goes to the client (`error_detail`) and to the
log. It names the cause in words and never contains the key.
"""

from __future__ import annotations


class StreamError(Exception):
    """A generation failed; the text says why.

    The base of the others. Used itself only where the gateway's own code failed.
    """


class ConnectFailedError(StreamError):
    """No connection to the provider could be made: nothing was sent."""


class LimitPassedError(StreamError):
    """The provider was too slow.

    Args:
        limit: which timeout: ``connect``, ``first token``, ``idle`` or ``total``.
        seconds: its length.
    """

    def __init__(self, limit: str, seconds: float) -> None:
        super().__init__(f"the provider exceeded the {limit} timeout of {seconds:g} s")
        self.limit = limit


class BadStatusError(StreamError):
    """The provider answered with a status other than 200.

    Args:
        status: HTTP status code.
        message: the provider's own message, redacted; may be empty.
        retry_after: seconds that the provider asks to wait; None where it does not say.
        body: the whole error body, decoded; may be empty.
    """

    def __init__(
        self, status: int, message: str, retry_after: float | None = None, body: str = ""
    ) -> None:
        super().__init__(f"the provider answered {status}" + (f": {message}" if message else ""))
        self.status = status
        self.retry_after = retry_after
        self.body = body


class NotAStreamError(StreamError):
    """The answer is not an event stream: another content type, or not even HTTP."""


class MalformedStreamError(StreamError):
    """The stream breaks the event-stream format, or an event is not a chat completion chunk."""


class MalformedCallError(StreamError):
    """A function call of the model is unusable: no name, arguments not a JSON object, too large."""


class ProviderReportedError(StreamError):
    """The provider reported an error inside the stream."""


class KeptConnectionEndedError(StreamError):
    """A connection that was kept from an earlier answer ended before a byte of this one.

    Servers close idle connections, and this one did so as the request was on its way. The request
    is sent once more, on a new connection, so no client sees this error.
    """


class IncompleteAnswerError(StreamError):
    """The connection ended before the answer did."""
