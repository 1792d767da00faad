"""The one request of a session whose voice is still arriving."""

from __future__ import annotations

from collections.abc import Callable

from actors.outlet import RequestEnd
from actors.session.books import Books
from actors.session.port import Client
from actors.session.request_ids import RequestIds
from actors.words import InterruptReason, Outcome


class OpenVoice:
    """The request whose voice is arriving, if there is one. A session has at most one at a time.

    Args:
        client: is told that the rest of a voice is not wanted.
        request_ids: learns which ids are used up.
        books: counts.
        wants_speech: whether the client waits for the end of speech.
    """

    def __init__(
        self,
        client: Client,
        request_ids: RequestIds,
        books: Books,
        wants_speech: Callable[[], bool],
    ) -> None:
        self._client = client
        self._request_ids = request_ids
        self._books = books
        self._wants_speech = wants_speech
        self.request_id: str | None = None
        """The id of the request whose voice is coming."""

    def begin(self, request_id: str) -> None:
        """The voice of this request comes from now on."""
        self.request_id = request_id

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
        return RequestEnd(
            request_id, Outcome.INTERRUPTED, reason, wants_speech=self._wants_speech()
        )
