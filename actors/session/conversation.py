"""What a client asks, and whether it is admitted.

Text, function results, voice and messages that the door refused all go through one method,
`_admit`. It takes everything that would begin a request through the same numbered steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import Struct

from actors.outlet import RequestEnd
from actors.quota import Quota
from actors.session.answers import Answers
from actors.session.books import Books
from actors.session.history import Ending as TurnEnding
from actors.session.history import History, Turn
from actors.session.lifecycle import Lifecycle
from actors.session.live import LiveRequests
from actors.session.messages import (
    FunctionReturned,
    NotUnderstood,
    RequestAsked,
    VoiceBegun,
    VoiceBroken,
)
from actors.session.port import Client
from actors.session.profile import MAX_FUNCTIONS_BYTES, Profile, SessionUpdate, UpdateError
from actors.session.request_ids import RequestIds
from actors.session.voice import OpenVoice
from actors.words import ErrorCode, InterruptReason, OnNewRequest, Outcome

_LEAVING_DETAIL = "the gateway is shutting down, or the session is ending"
_QUOTED_ID_CHARS = 64


@dataclass(frozen=True)
class ConversationSettings:
    """How a conversation treats a new request while another is live, and what it may keep.

    Args:
        on_new_request: the policy.
        max_parallel: how many requests may be live at once under `OnNewRequest.PARALLEL`.
        max_functions_bytes: how many bytes the functions of the session may have; 0: no limit.
    """

    on_new_request: OnNewRequest
    max_parallel: int
    max_functions_bytes: int = MAX_FUNCTIONS_BYTES


class _Candidate(Struct, frozen=True):
    """A message that would begin a request."""

    request_id: str
    text: str | None = None
    updates: tuple[SessionUpdate, ...] = ()
    continues: Turn | None = None
    """The turn whose function results it continues from."""
    fault: NotUnderstood | None = None
    """Why the door refused it, if it did."""
    impossible: str | None = None
    """Why it cannot be done, if that is known already."""
    is_voice: bool = False


class Conversation:
    """What the client of one session asks.

    Args:
        client: the session's client.
        profile: what the client registered.
        settings: how to treat a new request while another is live.
        answers: runs the accepted requests.
        requests: the live requests of the session.
        request_ids: the ids of requests that are not live.
        history: the turns of the session.
        voice: the request whose voice is still arriving.
        lifecycle: says whether the session accepts requests.
        quota: the server-wide quota of live requests.
        books: counts and logs.
        renew: called when a function result counts as a sign of life.
        clock: `time.monotonic`, or a test's clock.
    """

    def __init__(
        self,
        *,
        client: Client,
        profile: Profile,
        settings: ConversationSettings,
        answers: Answers,
        requests: LiveRequests,
        request_ids: RequestIds,
        history: History,
        voice: OpenVoice,
        lifecycle: Lifecycle,
        quota: Quota,
        books: Books,
        renew: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self.profile = profile
        self._settings = settings
        self._answers = answers
        self._requests = requests
        self._request_ids = request_ids
        self._history = history
        self._voice = voice
        self._lifecycle = lifecycle
        self._quota = quota
        self._books = books
        self._renew = renew
        self._clock = clock

    # What the client says.

    def ask(self, asked: RequestAsked) -> None:
        """The user asks something."""
        self._admit(_Candidate(asked.request_id, asked.text, asked.updates))

    def not_understood(self, fault: NotUnderstood) -> None:
        """The door refused a message of the client."""
        if fault.request_id is None:
            self._refuse(fault.code, fault.detail)
        else:
            self._admit(_Candidate(fault.request_id, fault=fault, is_voice=fault.is_voice))

    def function_returned(self, returned: FunctionReturned) -> None:
        """A function of the client returned."""
        request_id = returned.request_id
        found = self._history.find_call(returned.call_id)
        if found is None:
            detail = f"unknown or forgotten call_id {returned.call_id[:_QUOTED_ID_CHARS]!r}"
            if request_id is None:
                self._refuse(ErrorCode.MALFORMED_PAYLOAD, detail)
            else:
                self._admit(_Candidate(request_id, impossible=detail))
            return
        turn, call = found
        self._history.hold(turn)  # the model gets the result once, even over the bounds
        self._history.set_result(call, returned.result)
        if request_id is not None and request_id != self._continuation_of(turn):
            self._admit(_Candidate(request_id, continues=turn))
        self.start_next()
        self._history.release(turn)

    def begin_voice(self, begun: VoiceBegun) -> None:
        """The user begins to speak."""
        self._admit(_Candidate(begun.request_id, updates=begun.updates, is_voice=True))

    def break_voice(self, broken: VoiceBroken) -> None:
        """The voice that was arriving broke off or is invalid."""
        if broken.request_id == self._voice.request_id:
            self._fail_voice(broken.request_id, broken.code, broken.detail)

    def end_voice(self, request_id: str) -> None:
        """The voice of a request is complete."""
        if request_id == self._voice.request_id:
            detail = "speech recognition is not configured"
            self._fail_voice(request_id, ErrorCode.INTERNAL_ERROR, detail)

    # Admission.

    def _admit(self, candidate: _Candidate) -> None:
        """Begin a request or refuse it. The first step that applies decides."""
        request_id = candidate.request_id
        # Step 1. The id is used already. The refusal does not carry the id: to the client, that
        # would end the request that has it.
        if self._is_used(request_id):
            if candidate.is_voice:
                self._client.port.voice_unwanted(request_id)
            if candidate.fault is None:
                self._refuse_used(request_id)
            elif request_id == self._voice.request_id:
                self._fail_voice(request_id, candidate.fault.code, candidate.fault.detail)
            else:
                self._refuse(candidate.fault.code, candidate.fault.detail)
            return
        # Step 2. The session is leaving. The client may send the request in another session.
        reason = self._request_ids.take_early(request_id, self._clock())
        is_refusable = reason is None and candidate.fault is None
        if is_refusable and not self._lifecycle.takes_requests:
            if candidate.is_voice:
                self._voice.drop(request_id)
            self._refuse_busy("shutdown", _LEAVING_DETAIL, request_id)
            return
        # Step 3. A session hears one voice at a time: the new one ends the one before.
        if candidate.is_voice and candidate.fault is None:
            self._end_open_voice(request_id)
        # Step 4. An interrupt came before it: it ends as interrupted, even if it is faulty.
        if reason is not None:
            self._end_early(candidate, reason)
            return
        # Step 5. The door refused it, or it asks for something that cannot be done: no part of it
        # is applied.
        if candidate.fault is not None:
            self._refuse_fault(candidate.fault, request_id)
            return
        try:
            profile = self._updated(candidate)
        except UpdateError as error:
            if candidate.is_voice:
                self._voice.drop(request_id)
            self._refuse_for_good(request_id, error.code, error.detail)
            return
        # Step 6. There is nothing to answer: voice has to arrive first, and a request without text
        # only updates the session.
        if candidate.is_voice:
            self.profile = profile
            self._voice.begin(request_id)
            return
        if candidate.continues is None and not candidate.text:
            self.profile = profile
            self._end_unasked(request_id, Outcome.COMPLETED)
            return
        # Step 7. Other requests of the session make way for it, or it is refused as busy.
        if not self._apply_concurrency_policy(request_id, candidate.continues):
            return
        # Step 8. Accepted.
        if candidate.continues is not None:
            self._renew()
        self.profile = profile
        self._answers.accept(request_id, candidate.text, candidate.continues, profile)

    def _is_used(self, request_id: str) -> bool:
        return (
            request_id == self._voice.request_id
            or request_id in self._requests
            or self._request_ids.has_ended(request_id)
        )

    def _updated(self, candidate: _Candidate) -> Profile:
        """The profile with the candidate's updates.

        Raises:
            UpdateError: the candidate asks for something that cannot be done.
        """
        if candidate.impossible is not None:
            raise UpdateError(candidate.impossible)
        if candidate.continues is not None:
            continuation = self._continuation_of(candidate.continues)
            if continuation is not None:
                raise UpdateError(f"request {continuation!r} already continues this answer")
        return self._with_updates(candidate)

    def _with_updates(self, candidate: _Candidate) -> Profile:
        return self.profile.updated(candidate.updates, self._settings.max_functions_bytes)

    def _continuation_of(self, turn: Turn) -> str | None:
        """The id of the queued request that continues a turn; None if there is none."""
        for live in self._requests:
            if live.turn.continues is turn and live.is_queued:
                return live.request_id
        return None

    def _end_early(self, candidate: _Candidate, reason: InterruptReason) -> None:
        request_id = candidate.request_id
        with contextlib.suppress(UpdateError):  # it ends as interrupted in any case
            self.profile = self._with_updates(candidate)
        if candidate.is_voice:
            self._voice.drop(request_id)
        elif candidate.text:
            turn = self._history.begin(request_id, candidate.text)
            self._history.end(turn, "", TurnEnding.INTERRUPTED)
        self._end_unasked(request_id, Outcome.INTERRUPTED, reason)

    def _end_unasked(
        self, request_id: str, outcome: Outcome, reason: InterruptReason | None = None
    ) -> None:
        """End a request that never had a request-actor."""
        self._request_ids.end(request_id, 0)
        self._books.request_ended(outcome)
        self._client.port.request_ended(
            RequestEnd(request_id, outcome, reason, wants_speech=self.profile.require_tts)
        )

    def _apply_concurrency_policy(self, request_id: str, beside: Turn | None) -> bool:
        """Make way for a new request. Returns False if it was refused.

        Args:
            request_id: the id of the new request.
            beside: the turn that it continues, whose request does not have to make way.
        """
        others = [live for live in self._requests if live.turn is not beside]
        # A client need not wait for the ack before it asks again, so stopping ones do not count.
        running = sum(not live.is_stopping for live in others)
        match self._settings.on_new_request:
            case OnNewRequest.INTERRUPT:
                for live in others:
                    self._requests.interrupt(live, InterruptReason.USER_NEW_INPUT)
                    live.slot.release()  # even if its end can no longer be held back
            case OnNewRequest.PARALLEL if running >= self._settings.max_parallel:
                detail = f"session limit of {running} live requests reached"
                self._refuse_busy("request", detail, request_id)
                return False
            case OnNewRequest.REJECT if running:
                self._refuse_busy("request", "another request is live", request_id)
                return False
        for live in self._requests:
            if live.turn is beside:
                live.slot.release()  # the new request starts when this one has ended
        # Every request that made way has released its slot. So if the quota is full now, none has,
        # and a refusal interrupts no request.
        if self._quota.is_full:
            detail = "server-wide limit on live requests reached"
            self._refuse_busy("max_requests", detail, request_id)
            return False
        return True

    def start_next(self) -> None:
        """Start every request that may start now."""
        self._answers.start_next(self.profile)

    # Voice.

    def interrupt_voice(self, reason: InterruptReason) -> None:
        """End the request whose voice is still arriving, if there is one."""
        if self._voice.request_id is not None:
            self._client.port.request_ended(self._voice.interrupt(reason))

    def _end_open_voice(self, next_id: str) -> None:
        if self._voice.request_id is not None:
            detail = f"the voice of {next_id!r} began before the voice of this request had ended"
            self._fail_voice(self._voice.request_id, ErrorCode.STREAM_SEQ_ERROR, detail)

    def _fail_voice(self, request_id: str, code: ErrorCode, detail: str) -> None:
        self._voice.drop(request_id)
        self._refuse_for_good(request_id, code, detail)

    # Refusals.

    def _refuse_fault(self, fault: NotUnderstood, request_id: str) -> None:
        if fault.is_voice:
            self._fail_voice(request_id, fault.code, fault.detail)
        else:
            self._refuse(fault.code, fault.detail, request_id)

    def _refuse_used(self, request_id: str) -> None:
        detail = f"request_id {request_id!r} was already used in this session"
        self._refuse(ErrorCode.MALFORMED_PAYLOAD, detail)

    def _refuse_for_good(self, request_id: str, code: ErrorCode, detail: str) -> None:
        """Refuse a request and use up its id."""
        self._request_ids.end(request_id, 0)
        self._refuse(code, detail, request_id)

    def _refuse_busy(self, reason: str, detail: str, request_id: str) -> None:
        """Refuse a request that the client may send again under the same id."""
        self._books.busy(reason)
        self._refuse(ErrorCode.SERVER_BUSY, detail, request_id)

    def _refuse(self, code: ErrorCode, detail: str, request_id: str | None = None) -> None:
        self._books.refused(code, detail, request_id)
        if request_id is None:
            self._client.port.refused(code, detail)
            return
        self._request_ids.refuse(request_id)
        self._books.request_ended(Outcome.FAILED)  # the refusal is its terminal frame
        self._client.port.request_ended(
            RequestEnd(request_id, Outcome.FAILED, code=code, detail=detail)
        )
