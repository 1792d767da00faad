"""What can go wrong with a generation: one small tree, mapped once, in `llm/chat/attempt.py`.

The text of each error is made for the client's `error_detail` and the log: it names the cause in
words and never holds the key.
"""

from __future__ import annotations


class StreamError(Exception):
    """A generation failed; the text says why. Never raised itself, only its children are."""


class ConnectFailedError(StreamError):
    """No connection to the provider could be made: nothing was sent."""


class LimitPassedError(StreamError):
    """The provider was too slow.

    Args:
        limit: name of the limit that passed: ``connect``, ``first token``, ``idle`` or ``total``.
        seconds: its length.
    """

    def __init__(self, limit: str, seconds: float) -> None:
        super().__init__(f"the provider passed the {limit} limit of {seconds:g} s")
        self.limit = limit
        self.seconds = seconds


class BadStatusError(StreamError):
    """The provider answered with another status than 200.

    Args:
        status: HTTP status code.
        message: what the provider said about it, possibly empty.
        retry_after: seconds that it asks to wait; None where it does not.
        body: all that it said.
    """

    def __init__(
        self, status: int, message: str, retry_after: float | None = None, body: str = ""
    ) -> None:
        super().__init__(f"the provider answered {status}" + (f": {message}" if message else ""))
        self.status = status
        self.retry_after = retry_after
        self.body = body


class NotAStreamError(StreamError):
    """Status 200, but the body is not an event stream."""


class MalformedStreamError(StreamError):
    """The stream breaks the event-stream format, or an event is not a chat completion chunk."""


class MalformedCallError(StreamError):
    """A function call of the model that cannot be handed on: no name, no JSON object, too much."""


class ProviderReportedError(StreamError):
    """The provider reported an error inside the stream."""


class IncompleteAnswerError(StreamError):
    """The connection ended before the answer did."""
