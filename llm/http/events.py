"""The server-sent events of one answer, read by requests-sse.

requests-sse must never see the end of a body: it would sleep, and then POST the whole completion
again. So it gets a response whose lines come from `llm/http/lines.py`, and they end by raising
`BodyEnded`, which requests-sse does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from requests_sse import EventSource, InvalidContentTypeError, InvalidStatusCodeError

from llm.http.answer import Answer
from llm.http.lines import Lines


class _Response:
    """What requests-sse needs of a `requests.Response`. A real one takes longer to make, and longer
    to test for truth, which requests-sse does at each event."""

    history = ()
    url = ""  # a real one would be parsed at each event, for its origin

    def __init__(self, answer: Answer, lines: Lines) -> None:
        self.status_code = answer.status
        self.headers = answer.headers
        self.iter_lines = lines.__iter__


class _Session:
    """What requests-sse needs of a `requests.Session`: to send a request. Here it was sent."""

    def __init__(self, response: _Response) -> None:
        self._response = response

    def request(self, **_: object) -> _Response:
        return self._response


class Events:
    """The data of each event of one answer, in order; events without data are skipped.

    Args:
        url: where the answer came from.
        answer: with its body unread.
        before_read: called before each read, which may wait for the provider: the time to flush
            what has been gathered. May block.
        on_bytes: called after each read that gave bytes.

    Raises:
        NotEventsError: the status is not 200, or the content type is not text/event-stream.
    """

    def __init__(
        self,
        url: str,
        answer: Answer,
        before_read: Callable[[], None],
        on_bytes: Callable[[], None],
    ) -> None:
        self.lines = Lines(answer, before_read, on_bytes)
        session: Any = _Session(_Response(answer, self.lines))
        self._source = EventSource(url, method="POST", session=session, max_connect_retry=0)
        try:
            self._source.connect()
        except (InvalidStatusCodeError, InvalidContentTypeError) as error:
            raise NotEventsError(str(error)) from None

    def __iter__(self) -> Iterator[str]:
        """Yield the data of each event; ends only by raising.

        Raises:
            BodyEnded: after the last event, or when the transport broke.
            MalformedStreamError: an event exceeds a limit of `llm/http/lines.py`, or the
                compression is broken.
            UnicodeDecodeError: a line is not UTF-8.
        """
        for event in self._source:
            if event.data:
                yield event.data


class NotEventsError(Exception):
    """The answer is not an event stream."""
