"""One client's session: a thin actor that owns the parts which do the work.

lifecycle     whether the session accepts requests, and how it ends
lifetime      when it sends a heartbeat, warns its client, and ends
conversation  which requests are admitted
answers       starts requests, ends them, records them in the history
live          the live requests, and how one is stopped
interrupts    the targets of each interrupt, and when it is acknowledged
history       what the user got, and what the model is sent of it
profile       what the client registered
request_ids   ids that are not live: ended, refused, interrupted early
voice         the request whose voice is still arriving
books         counting and logging
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import pykka

from actors.actor import GreenletActor, Timer, tell
from actors.loop.lanes import lanes
from actors.messages import (
    CallDelivered,
    EndSession,
    Leave,
    ReapRequest,
    RequestReported,
    SessionEnded,
    SessionStarted,
    SupervisorMessage,
)
from actors.quota import Quota, Slot
from actors.row import MakeStages, Report
from actors.session.answers import Answers
from actors.session.books import Books
from actors.session.conversation import Conversation, ConversationSettings
from actors.session.history import History
from actors.session.interrupts import Interrupts
from actors.session.lifecycle import Lifecycle
from actors.session.lifetime import Due, Lifetime
from actors.session.live import LiveRequests
from actors.session.messages import (
    ClientLeaves,
    ConnectionLost,
    DoorAsked,
    FunctionReturned,
    InterruptAsked,
    NotUnderstood,
    PauseIsOver,
    RequestAsked,
    SessionMessage,
    SessionQueried,
    SignOfLife,
    StopOverdue,
    TerminalWritten,
    TimeIsDue,
    VoiceBegun,
    VoiceBroken,
    VoiceEnded,
)
from actors.session.port import (
    CLIENT_LEFT,
    CONNECTION_LOST,
    SERVER_RESTART,
    SESSION_EXPIRED,
    Client,
    Goodbye,
    Port,
    SessionFacts,
)
from actors.session.profile import MAX_FUNCTIONS_BYTES, Profile
from actors.session.request_ids import RequestIds
from actors.session.voice import OpenVoice
from actors.words import OnNewRequest
from metrics.instruments import Metrics

_HEARTBEAT_JITTER = 0.1
"""Up to this part of it, the heartbeat interval of a session is shorter, at random."""


@dataclass(frozen=True)
class SessionSettings:
    """Settings of all sessions.

    Args:
        on_new_request: what a new request does while another is live, unless its client registered
            another policy.
        max_parallel: how many requests of one session may be live at once under
            `OnNewRequest.PARALLEL`.
        max_requests: how many requests of all sessions may be live at once; 0: no limit. About 400
            answers of 30 tokens a second keep one core busy (`tests/bench/README.md`), but many
            requests are slower or still wait for their first token, which costs nothing. Each holds
            a connection to a provider, hence a file descriptor.
        ack_timeout: how many seconds an acknowledgement may wait for streams to close.
        session_timeout: seconds without a sign of life until a session ends; 0: never.
        heartbeat_interval: seconds between two heartbeats; 0: no heartbeats.
        history_messages: how many messages of the conversation are kept for the model.
        history_chars: how many Unicode code points these messages may have together.
        max_voice_bytes: how many bytes of voice one request may have, decoded.
        max_functions_bytes: how many bytes the functions of a session may have together, as JSON
            without spaces; 0: no limit.
    """

    on_new_request: OnNewRequest = OnNewRequest.INTERRUPT
    max_parallel: int = 8
    max_requests: int = 1_000
    ack_timeout: float = 1.0
    session_timeout: float = 3600.0
    heartbeat_interval: float = 30.0
    history_messages: int = 200
    history_chars: int = 200_000
    max_voice_bytes: int = 10 * 1024 * 1024
    max_functions_bytes: int = MAX_FUNCTIONS_BYTES


@dataclass(frozen=True)
class Registration:
    """What a door knows of a client when it opens a session.

    Args:
        peer: the client's address.
        profile: what the client registered.
        on_new_request: the policy that the client chose; None: the server's own setting.
        client_name: the owner of the credentials; None if they were not checked.
        auth: the kind of credentials, as the protocol names it.
    """

    peer: str
    profile: Profile
    on_new_request: OnNewRequest | None = None
    client_name: str | None = None
    auth: str = ""


class SessionActor(GreenletActor):
    """The session of one client, from its registration to the end of its last request.

    Args:
        port: the client's port.
        session_id: the id of the session.
        registration: what the client registered.
        slot: the session's slot in the quota of sessions, already taken.
        make_stages: makes the stages of a request.
        tell_supervisor: puts a message in the supervisor's mailbox.
        settings: settings of all sessions.
        requests: the server-wide quota of live requests.
        metrics: where sessions are counted.
    """

    def __init__(
        self,
        *,
        port: Port,
        session_id: str,
        registration: Registration,
        slot: Slot,
        make_stages: MakeStages,
        tell_supervisor: Callable[[SupervisorMessage], None],
        settings: SessionSettings,
        requests: Quota,
        metrics: Metrics,
    ) -> None:
        super().__init__()
        self._session_id = session_id
        self._registration = registration
        self._slot = slot
        self._tell_supervisor = tell_supervisor
        self._settings = settings
        self._created_ms = time.time_ns() // 1_000_000
        self._client = Client(port)
        self._lifecycle = Lifecycle()
        # Sessions that were opened together must not all send their heartbeats together.
        interval = settings.heartbeat_interval * random.uniform(1 - _HEARTBEAT_JITTER, 1)
        self._lifetime = Lifetime(settings.session_timeout, interval, self._now())
        self._timer: Timer | None = None
        self._pause: Timer | None = None
        self._books = Books(session_id, registration.peer, metrics)
        self._history = History(settings.history_messages, settings.history_chars)
        self._request_ids = RequestIds()
        self._voice = OpenVoice(
            self._client,
            self._request_ids,
            self._books,
            wants_speech=lambda: self._conversation.profile.require_tts,
        )
        self._requests = LiveRequests(self.actor_ref, settings.ack_timeout, self._books)
        self._interrupts = Interrupts(
            client=self._client,
            requests=self._requests,
            request_ids=self._request_ids,
            history=self._history,
            voice=self._voice,
            books=self._books,
        )
        on_new_request = registration.on_new_request or settings.on_new_request
        self._answers = Answers(
            session_id=session_id,
            session=self.actor_ref,
            client=self._client,
            requests=self._requests,
            request_ids=self._request_ids,
            history=self._history,
            quota=requests,
            make_stages=make_stages,
            tell_supervisor=tell_supervisor,
            is_parallel=on_new_request is OnNewRequest.PARALLEL,
            books=self._books,
            metrics=metrics,
        )
        self._conversation = Conversation(
            client=self._client,
            profile=registration.profile,
            settings=ConversationSettings(
                on_new_request, settings.max_parallel, settings.max_functions_bytes
            ),
            answers=self._answers,
            requests=self._requests,
            request_ids=self._request_ids,
            history=self._history,
            voice=self._voice,
            lifecycle=self._lifecycle,
            quota=requests,
            books=self._books,
            renew=self._renew,
            clock=lambda: time.monotonic(),
        )

    def describe(self, now: float) -> dict[str, Any]:
        return {
            "session_id": self._session_id,
            "peer": self._registration.peer,
            "client": self._registration.client_name,
            "phase": self._lifecycle.phase.value,
            "live": self._requests.ids,
            "voice": self._voice.request_id,
            "interrupts_to_answer": len(self._interrupts),
            "remaining_seconds": self._lifetime.remaining_seconds(now),
            "takes_requests": self._lifecycle.takes_requests,
        }

    def opened(self) -> None:
        self._books.session_opened(self._registration.client_name, self._registration.auth)
        self._tell_supervisor(SessionStarted(self.actor_ref))
        self._set_timer()
        self._client.port.session_opened(self._session_id, self._settings.session_timeout)

    def handle(self, message: SessionMessage) -> None:
        if self._lifecycle.is_over:
            return
        match message:
            case InterruptAsked():
                if self._interrupts.ask(message):
                    self._settle()
            case RequestReported(request_id, report):
                self._on_report(request_id, report)
            case TerminalWritten(request_id):
                self._on_terminal_written(request_id)
            case RequestAsked():
                self._renew()
                self._conversation.ask(message)
                self._settle()
            case FunctionReturned():
                self._conversation.function_returned(message)
                self._settle()
            case CallDelivered(request_id, call):
                self._answers.call_delivered(request_id, call)
            case VoiceBegun():
                self._renew()
                self._conversation.begin_voice(message)
                self._settle()
            case VoiceEnded(request_id):
                self._renew()
                self._conversation.end_voice(request_id)
                self._settle()
            case VoiceBroken():
                self._conversation.break_voice(message)
                self._settle()
            case NotUnderstood():
                self._conversation.not_understood(message)
                self._settle()
            case SignOfLife():
                self._renew()
            case SessionQueried(tag):
                self._client.port.session_described(self._facts(), tag)
            case DoorAsked(tag):
                self._client.port.door_answers(tag)
            case ClientLeaves():
                self._end(CLIENT_LEFT)
            case ConnectionLost(why):
                self._on_connection_lost(why)
            case TimeIsDue():
                self._on_time()
            case StopOverdue(request_id):
                if self._requests.stop_overdue(request_id):
                    self._settle()
            case ReapRequest(request_id, detail):
                self._on_reap(request_id, detail)
            case Leave(pause_seconds):
                self._lifecycle.leave()
                # A restarted supervisor repeats Leave, with another pause: the first one counts.
                self._pause = self._pause or Timer(pause_seconds, self.actor_ref, PauseIsOver())
            case PauseIsOver():
                self._lifecycle.end_pause()
                self._settle()
            case EndSession():
                self._end(SERVER_RESTART)
            case _:
                assert_never(message)

    def closed(self, error: BaseException | None) -> None:
        for timer in (self._timer, self._pause):
            if timer is not None:
                timer.cancel()
        self._requests.abandon(self._books.request_ended)
        if error is not None:
            self._client.port.session_failed()
        self._slot.release()
        self._books.session_ended(error, self._lifecycle.ended_by)
        self._tell_supervisor(SessionEnded(self.actor_urn))

    # The end of requests.

    def _on_report(self, request_id: str, report: Report) -> None:
        live = self._requests.reported(request_id, report)
        if live is None:
            return
        if live.is_stopping:
            self._settle()
        else:
            live.outlet.finish(live.end(), lambda: self._tell_written(request_id))

    def _tell_written(self, request_id: str) -> None:
        # Through the mailbox, since this runs in the middle of a write.
        tell(self.actor_ref, TerminalWritten(request_id))

    def _on_terminal_written(self, request_id: str) -> None:
        live = self._requests.get(request_id)
        if live is not None and live.outlet.is_done:
            self._answers.forget(live)
            self._settle()

    def _on_reap(self, request_id: str, detail: str) -> None:
        live = self._requests.get(request_id)
        if live is not None and self._requests.reap(live, detail):
            self._settle()

    def _settle(self) -> None:
        """Do everything that has become possible, in the order in which clients must see it."""
        # Step 1. Acknowledgements of interrupts whose targets have stopped.
        self._interrupts.acknowledge_ready()
        # Step 2. Terminal frames of stopped requests, unless an acknowledgement must come first.
        self._answers.end_settled(self._interrupts.awaits)
        # Step 3. New answers; or, if no request is live, the goodbye.
        if self._requests:
            self._conversation.start_next()
        elif self._lifecycle.goodbye is not None:
            self._lifecycle.finish()
            self._client.port.goodbye(self._lifecycle.goodbye)
            self.stop()
        elif self._lifecycle.may_leave and self._voice.request_id is None:
            self._end(SERVER_RESTART)

    # Timeouts.

    @staticmethod
    def _now() -> float:
        """`time.monotonic()` without the pauses of this process: while it does not run, it cannot
        ask the client for a sign of life, nor hear one."""
        return time.monotonic() - lanes().pauses.total_seconds

    def _renew(self) -> None:
        self._lifetime.renew(self._now())

    def _set_timer(self) -> None:
        # One timer per session and no greenlet, so that 10,000 idle sessions cost next to nothing.
        wait = self._lifetime.next_at - self._now()
        if math.isfinite(wait):
            self._timer = Timer(max(0.0, wait), self.actor_ref, TimeIsDue())

    def _on_time(self) -> None:
        if self._lifecycle.is_ending:
            return
        now = self._now()
        remaining = self._lifetime.remaining_seconds(now)
        for due in self._lifetime.due(now):
            match due:
                case Due.HEARTBEAT:
                    self._client.port.sign_of_life_wanted(remaining)
                case Due.WARNING:
                    self._client.port.time_nearly_up(remaining)
                case Due.END:
                    self._end(SESSION_EXPIRED)
                    return
        self._set_timer()

    def _facts(self) -> SessionFacts:
        return SessionFacts(
            self._conversation.profile,
            self._created_ms,
            self._lifetime.remaining_seconds(self._now()),
        )

    # The end of the session.

    def _on_connection_lost(self, why: str) -> None:
        self._lifecycle.detach(why)
        self._client.detach()
        # A session does not outlive its connection: there is no grace time.
        self._end(CONNECTION_LOST)

    def _end(self, goodbye: Goodbye) -> None:
        """Stop every live request, and say goodbye once all of them have ended."""
        self._lifecycle.end(goodbye)
        self._conversation.interrupt_voice(goodbye.reason)
        for live in self._requests:
            if not self._requests.interrupt(live, goodbye.reason):
                # The kernel has its terminal frame, or a part of it on a lost connection.
                self._answers.forget(live)
        self._settle()


class Session:
    """A door's handle of a session. It puts messages in the session's mailbox, and never waits."""

    def __init__(self, ref: pykka.ActorRef[Any], session_id: str) -> None:
        self._ref = ref
        self.session_id = session_id

    @property
    def is_alive(self) -> bool:
        """False when the session has ended."""
        return self._ref.is_alive()

    def tell(self, message: SessionMessage) -> None:
        """Send the session a message. A session that has ended ignores it."""
        tell(self._ref, message)


class Sessions:
    """Makes sessions for doors.

    Args:
        quota: the quota of sessions.
        requests: the server-wide quota of live requests.
        make_stages: makes the stages of a request.
        tell_supervisor: puts a message in the supervisor's mailbox.
        settings: settings of all sessions.
        metrics: where sessions are counted.
    """

    def __init__(
        self,
        *,
        quota: Quota,
        requests: Quota,
        make_stages: MakeStages,
        tell_supervisor: Callable[[SupervisorMessage], None],
        settings: SessionSettings,
        metrics: Metrics,
    ) -> None:
        self.quota = quota
        self.requests = requests
        self.settings = settings
        self._make_stages = make_stages
        self._tell_supervisor = tell_supervisor
        self._metrics = metrics

    def open(self, port: Port, registration: Registration) -> Session | None:
        """Open a session for a client. Returns None if the session limit is reached.

        `session_opened` is the first call on the port.
        """
        slot = self.quota.slot()
        if not slot.take():
            return None
        session_id = f"sess_{secrets.token_hex(8)}"
        try:
            ref = SessionActor.start(
                port=port,
                session_id=session_id,
                registration=registration,
                slot=slot,
                make_stages=self._make_stages,
                tell_supervisor=self._tell_supervisor,
                settings=self.settings,
                requests=self.requests,
                metrics=self._metrics,
            )
        except BaseException:
            slot.release()  # there is no session that could
            raise
        return Session(ref, session_id)
