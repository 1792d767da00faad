"""Interrupts of one session: stops their targets, and acknowledges them when these have stopped."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, field

from actors.outlet import RequestEnd
from actors.session.books import Books
from actors.session.history import History
from actors.session.live import LiveRequest, LiveRequests
from actors.session.messages import InterruptAsked
from actors.session.port import Client, InterruptDone, InterruptResult
from actors.session.request_ids import RequestIds
from actors.session.voice import OpenVoice
from actors.words import InterruptOutcome


class _PendingInterrupt(Struct, eq=False):
    """An interrupt that is not acknowledged yet."""

    asked: InterruptAsked
    targets: dict[str, LiveRequest | InterruptResult] = field(default_factory=dict)
    """By request id: the live request while it is being stopped, or the result if it is known."""
    ends: list[RequestEnd] = field(default_factory=list)
    """Ends of voice requests, which have no request-actor. They are sent after the
    acknowledgement."""
    live_ids: list[str] = field(default_factory=list)
    """The live requests when the interrupt came, for the log."""

    @property
    def is_ready(self) -> bool:
        """True when it can be acknowledged."""
        return all(
            isinstance(target, InterruptResult) or target.is_settled
            for target in self.targets.values()
        )

    def done(self) -> InterruptDone:
        """Return what the interrupt did."""
        read_at = self.asked.read_at
        return InterruptDone(
            tuple(
                target if isinstance(target, InterruptResult) else target.interrupt_result(read_at)
                for target in self.targets.values()
            ),
            self.asked.tag,
        )


class Interrupts:
    """The interrupts of one session.

    Args:
        client: gets the acknowledgements.
        requests: the live requests of the session.
        request_ids: the ids of requests that are not live.
        history: the conversation, in which an interrupt may shorten an answer.
        voice: the request whose voice is still arriving.
        books: counts and logs.
    """

    def __init__(
        self,
        *,
        client: Client,
        requests: LiveRequests,
        request_ids: RequestIds,
        history: History,
        voice: OpenVoice,
        books: Books,
    ) -> None:
        self._client = client
        self._requests = requests
        self._request_ids = request_ids
        self._history = history
        self._voice = voice
        self._books = books
        self._pending: list[_PendingInterrupt] = []

    def __len__(self) -> int:
        """How many interrupts are not acknowledged yet."""
        return len(self._pending)

    def ask(self, asked: InterruptAsked) -> bool:
        """Stop the targets of an interrupt. Returns True if it can be acknowledged at once."""
        target = asked.target
        pending = _PendingInterrupt(asked)
        for request_id in [target] if target is not None else self._requests.ids:
            live = self._requests.get(request_id)
            if live is not None:
                live.hear(asked.heard_chars)
            if live is not None and self._requests.interrupt(live, asked.reason):
                pending.targets[request_id] = live
            elif target is not None and target != self._voice.request_id:
                pending.targets[request_id] = self._missed(request_id, asked)
        if target is None and not self._requests and asked.heard_chars is not None:
            # No request is live, but the client may still have been playing the last answer.
            self._history.trim(None, asked.heard_chars)
        voice_id = self._voice.request_id
        if voice_id is not None and target in (None, voice_id):
            pending.targets[voice_id] = InterruptResult(voice_id, InterruptOutcome.STOPPED)
            pending.ends.append(self._voice.interrupt(asked.reason))
        pending.live_ids = self._requests.ids
        self._pending.append(pending)
        return pending.is_ready

    def acknowledge_ready(self) -> None:
        """Acknowledge every interrupt whose targets have stopped or timed out."""
        for pending in self._pending.copy():
            if pending.is_ready:
                self._pending.remove(pending)
                self._acknowledge(pending)

    def awaits(self, live: LiveRequest) -> bool:
        """True when an acknowledgement must be sent before the end of this request."""
        return any(one.targets.get(live.request_id) is live for one in self._pending)

    def _acknowledge(self, pending: _PendingInterrupt) -> None:
        done = pending.done()
        port = self._client.port
        port.interrupt_done(done, self._ack_observer(pending))
        for end in pending.ends:
            port.request_ended(end)
        found = any(isinstance(target, LiveRequest) for target in pending.targets.values())
        self._books.interrupt_done(pending.asked, pending.live_ids, done, found=found)

    def _ack_observer(self, pending: _PendingInterrupt) -> Callable[[float], None]:
        first = next(iter(pending.targets), None)
        return lambda at: self._books.ack_sent(at - pending.asked.read_at, first)

    def _missed(self, request_id: str, asked: InterruptAsked) -> InterruptResult:
        """The result for a target that was not stopped: it has ended, or has not arrived yet."""
        live = self._requests.get(request_id)
        ids = self._request_ids
        chars = live.delivered.text_chars if live else ids.delivered(request_id)
        if chars is None:
            ids.interrupt_early(request_id, asked.reason, asked.read_at)
            return InterruptResult(request_id, InterruptOutcome.UNKNOWN)
        if asked.heard_chars is not None:
            self._history.trim(request_id, asked.heard_chars)
        return InterruptResult(request_id, InterruptOutcome.ALREADY_DONE, chars)
