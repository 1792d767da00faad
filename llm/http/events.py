"""The server-sent events of one answer, read by requests-sse.

requests-sse is never let to see the end of a body: it would sleep and then POST the whole
completion again. So it is handed an answer whose lines are ours (`llm/http/lines.py`), and
which end with an exception of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from requests_sse import EventSource, InvalidContentTypeError, InvalidStatusCodeError

from llm.http.answer import Answer
from llm.http.lines import Lines


class _Response:
    """What requests-sse asks of a `requests.Response`: making one takes longer, and so does asking
    whether it is true, which it does at each event."""

    history = ()
    url = ""  # else it would be taken apart, for the origin of each event

    def __init__(self, answer: Answer, lines: Lines) -> None:
        self.status_code = answer.status
        self.headers = answer.headers
        self.iter_lines = lines.__iter__


class _Session:
    """What requests-sse asks of a `requests.Session`: to connect. Here, that was done."""

    def __init__(self, response: _Response) -> None:
        self._response = response

    def request(self, **_: object) -> _Response:
        return self._response


class Events:
    """The data of the events of one answer, in order, without those that have none.

    Args:
        url: where it came from.
        answer: its body unread.
        before_read: called before each read, which may wait: what was gathered so far goes out
            now. May block.
        on_bytes: called after each read that gave bytes.

    Raises:
        NotEventsError: its status is not 200, or its content type is not that of events.
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
        """Give out the data; never returns.

        Raises:
            BodyEnded: after the last event, or when the transport broke.
            MalformedStreamError: an event over the bounds of `llm/http/lines.py`, or bad
                compression.
            UnicodeDecodeError: a line is not UTF-8.
        """
        for event in self._source:
            if event.data:
                yield event.data


class NotEventsError(Exception):
    """The answer is no stream of events."""
