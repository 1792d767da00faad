"""The answers of one session: starts requests, ends them, and records them in the history."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pykka

from actors.actor import tell
from actors.loop.lanes import lanes
from actors.messages import Start, SupervisorMessage, TerminalSent
from actors.quota import Quota
from actors.request import RequestActor
from actors.row import MakeStages
from actors.session.books import Books
from actors.session.history import History, Turn
from actors.session.live import LiveRequest, LiveRequests
from actors.session.port import Client
from actors.session.profile import Profile
from actors.session.request_ids import RequestIds
from llm.chat.completions import Prompt, ToolCall
from metrics.instruments import Metrics


class Answers:
    """Runs the accepted requests of one session, in order.

    Args:
        session_id: the session's id, for the request-actors.
        session: the session-actor, which gets the reports.
        client: the session's client.
        requests: the live requests of the session.
        request_ids: the ids of requests that are not live.
        history: the turns of the session.
        quota: the server-wide quota of live requests.
        make_stages: makes the stages of a request.
        tell_supervisor: puts a message in the supervisor's mailbox.
        is_parallel: True if requests run side by side, False if they run one after another.
        books: counts and logs.
        metrics: for the request-actors.
    """

    def __init__(
        self,
        *,
        session_id: str,
        session: pykka.ActorRef[Any],
        client: Client,
        requests: LiveRequests,
        request_ids: RequestIds,
        history: History,
        quota: Quota,
        make_stages: MakeStages,
        tell_supervisor: Callable[[SupervisorMessage], None],
        is_parallel: bool,
        books: Books,
        metrics: Metrics,
    ) -> None:
        self._session_id = session_id
        self._session = session
        self._client = client
        self._requests = requests
        self._request_ids = request_ids
        self._history = history
        self._quota = quota
        self._make_stages = make_stages
        self._tell_supervisor = tell_supervisor
        self._is_parallel = is_parallel
        self._books = books
        self._metrics = metrics
        self._lanes = lanes()

    def accept(
        self, request_id: str, text: str | None, continues: Turn | None, profile: Profile
    ) -> None:
        """Make a request live. The caller has checked that the quota is not full.

        Args:
            request_id: the id that the client gave the request.
            text: what the user said; None if the request continues a turn.
            continues: the turn that it continues, after its function results; else None.
            profile: the session's profile, with the updates of this request.
        """
        outlet = self._client.port.open_outlet(request_id)
        actor = RequestActor.start(
            session_id=self._session_id,
            request_id=request_id,
            session=self._session,
            tell_supervisor=self._tell_supervisor,
            make_stages=self._make_stages,
            outlet=outlet,
            metrics=self._metrics,
        )
        turn = self._history.begin(request_id, text, continues)
        slot = self._quota.slot()
        wants_speech = profile.require_tts
        self._requests.add(LiveRequest(request_id, outlet, actor, turn, slot, wants_speech))
        slot.take()  # cannot fail: no other greenlet has run since the quota was checked

    def start_next(self, profile: Profile) -> None:
        """Start every request that may start now. Its prompt is made from the current profile."""
        for live in self._requests:
            if live.can_start:
                live.is_started = True
                tell(live.actor, Start(self._prompt(live, profile)))
            if not self._is_parallel:
                break  # the next request waits until this one has ended

    def _prompt(self, live: LiveRequest, profile: Profile) -> Prompt:
        system = profile.system_message()
        messages = self._history.messages(live.turn)
        return Prompt((*messages,) if system is None else (system, *messages), profile.tools())

    def call_delivered(self, request_id: str, call: ToolCall) -> None:
        """Record a function call that was delivered to the client."""
        live = self._requests.get(request_id)
        if live is not None:
            self._history.add_call(live.turn, call)

    def end_settled(self, awaits: Callable[[LiveRequest], bool]) -> None:
        """Send the terminal frame of every stopped request that may end now.

        Args:
            awaits: returns True if an acknowledgement must be sent before the request ends.
        """
        for live in self._requests:
            if not live.is_stopping:
                continue
            if live.is_settled and not awaits(live):
                self._client.port.request_ended(live.end())
                self.forget(live)
            elif not self._is_parallel:
                break  # frames of the next request come after the end of this one

    def forget(self, live: LiveRequest) -> None:
        """Take a request out of the live ones: its end was sent, or its client is gone."""
        self._requests.remove(live)
        delivered = live.delivered
        self._request_ids.end(live.request_id, delivered.text_chars)
        # Some calls were delivered so recently that their CallDelivered is still in the mailbox. It
        # will find no live request, so add them here.
        for call in delivered.calls[len(live.turn.calls) :]:
            self._history.add_call(live.turn, call)
        self._history.end(live.turn, *live.as_heard(live.outcome))
        self._lanes.run_deferred(self._close, live, delivered.text_chars)

    def _close(self, live: LiveRequest, chars: int) -> None:
        tell(live.actor, TerminalSent())
        self._books.text_delivered(chars)
        self._books.request_ended(live.outcome)
        if live.interrupted_by is not None:
            self._books.request_interrupted(live.request_id, live.interrupted_by)
