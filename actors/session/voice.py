"""The one request of a session whose voice is still arriving."""

from __future__ import annotations

from actors.outlet import RequestEnd
from actors.session.books import Books
from actors.session.port import Client
from actors.session.request_ids import RequestIds
from actors.words import InterruptReason, Outcome


class OpenVoice:
    """The request whose voice is arriving, if there is one. A session has at most one at a time.

    Args:
        client: is told when the rest of a voice should be ignored.
        request_ids: records which ids are used up.
        books: counts and logs.
    """

    def __init__(self, client: Client, request_ids: RequestIds, books: Books) -> None:
        self._client = client
        self._request_ids = request_ids
        self._books = books
        self.request_id: str | None = None
        """The id of the request whose voice is arriving; None if there is none."""
        self.wants_speech = False

    def begin(self, request_id: str, *, wants_speech: bool) -> None:
        """The voice of this request begins."""
        self.request_id = request_id
        self.wants_speech = wants_speech

    def drop(self, request_id: str) -> None:
        """Ignore the rest of a request's voice, and use up its id. It need not be the open one."""
        if request_id == self.request_id:
            self.request_id = None
        self._client.port.voice_unwanted(request_id)
        self._request_ids.use_up(request_id)

    def interrupt(self, reason: InterruptReason) -> RequestEnd:
        """Drop the open request. Returns its end, which the caller must send to the client."""
        request_id = self.request_id
        assert request_id is not None
        self.drop(request_id)
        self._books.request_ended(Outcome.INTERRUPTED)
        return RequestEnd(request_id, Outcome.INTERRUPTED, reason, wants_speech=self.wants_speech)
