"""The answers of one session: which request runs, how its end is told, what remains of it."""

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
        session_id: the session's.
        session: the session's actor, which gets the reports.
        client: the session's client.
        requests: the live ones.
        request_ids: of those that are not live.
        history: the turns.
        quota: of live requests, of all sessions together.
        make_stages: makes the stages of a request.
        tell_supervisor: puts a message in the supervisor's mailbox.
        is_parallel: whether requests run side by side; else one after another.
        books: counts and logs.
        metrics: for request-actors.
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
        """Make a request live. There is room for it.

        Args:
            request_id: the client's.
            text: what the user said; None where it continues.
            continues: the turn whose function results it continues from.
            profile: of the session, as the request found it.
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
        """Start the requests whose turn it is. The model is asked as the profile says now."""
        for live in self._requests:
            if live.can_start:
                live.is_started = True
                tell(live.actor, Start(self._prompt(live, profile)))
            if not self._is_parallel:
                break  # later ones wait for the end of the one before

    def _prompt(self, live: LiveRequest, profile: Profile) -> Prompt:
        system = profile.system_message()
        messages = self._history.messages(live.turn)
        return Prompt((*messages,) if system is None else (system, *messages), profile.tools())

    def call_delivered(self, request_id: str, call: ToolCall) -> None:
        """The client was given a function call."""
        live = self._requests.get(request_id)
        if live is not None:
            self._history.add_call(live.turn, call)

    def end_settled(self, awaits: Callable[[LiveRequest], bool]) -> None:
        """End every stopped request that nothing waits for.

        Args:
            awaits: whether an acknowledgement has to come before the end of a request.
        """
        for live in self._requests:
            if not live.is_stopping:
                continue
            if live.is_settled and not awaits(live):
                self._client.port.request_ended(live.end())
                self.forget(live)
            elif not self._is_parallel:
                break  # nothing of the next one before the end of this one

    def forget(self, live: LiveRequest) -> None:
        """A request is live no more: its end was sent, or there is no client to send it to."""
        self._requests.remove(live)
        delivered = live.delivered
        self._request_ids.end(live.request_id, delivered.text_chars)
        # Calls that were delivered a moment ago: their messages find no live request any more.
        for call in delivered.calls[len(live.turn.calls) :]:
            self._history.add_call(live.turn, call)
        self._history.end(live.turn, *live.as_heard(live.outcome))
        self._lanes.run_deferred(self._let_go, live, delivered.text_chars)

    def _let_go(self, live: LiveRequest, chars: int) -> None:
        tell(live.actor, TerminalSent())
        self._books.text_delivered(chars)
        self._books.request_ended(live.outcome)
        if live.interrupted_by is not None:
            self._books.request_interrupted(live.request_id, live.interrupted_by)
