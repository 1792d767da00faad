"""A conversation with a gateway: register, ask, interrupt, and read what comes back.

    session = Session(Connection(url, open_socket(host, port)))
    session.register(auth={"type": "API_KEY", "api_key": key}, platform="WEB")
    answer = session.ask("Tell me a story")
    answer.wait_text()
    ack = session.interrupt(answer)

It reads only inside of a wait, and every wait has an end. It keeps every frame, in order, with the
time it was read. One thread uses it at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from msgspec import UnsetType

from .answer import Answer
from .connection import Connection
from .envelope import Frame, decode_frame, encode_frame
from .errors import ConnectionEnded, FrameRefused, InvalidFrame, WaitTimeout
from .frames import (
    Error,
    ErrorCode,
    FunctionCall,
    HealthCheckAck,
    Heartbeat,
    InterruptAck,
    RegisterAck,
    Response,
    SessionInfo,
    Shutdown,
)

SHOWN_FRAMES = 10
"""The last frames, in a failure's message."""

_REFUSALS = {
    "REGISTER": {
        ErrorCode.AUTH_FAILED,
        ErrorCode.MALFORMED_PAYLOAD,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.SERVER_BUSY,
    },
    "INTERRUPT": {
        ErrorCode.MALFORMED_PAYLOAD,
        ErrorCode.PAYLOAD_TOO_LARGE,
        ErrorCode.SESSION_INVALID,
    },
}
"""The codes with which a gateway refuses these frames."""

_MAX_CHARS = 2**53 - 1
"""Larger counts are lowered to this: no answer is that long."""

_ids = itertools.count(1)

T = TypeVar("T")
P = TypeVar("P", bound=msgspec.Struct)


@dataclass(eq=False)
class Interruption:
    """An INTERRUPT that was sent, and its answer."""

    request_id: str | None
    """Its target; None is every live request."""
    sent_at: float
    """`time.monotonic()`."""
    ack: InterruptAck | None = None
    ack_frame: Frame | None = None
    """The frame of the ack: when it came, and in which order."""
    place: int = 0
    """Its place among the messages that the connection has sent, from 1."""
    is_repeated: bool = False
    """Whether it was sent once more, after an ERROR."""
    refusals_before: int = 0
    """At most so many ERRORs are for messages before it, or before the second; a later one refuses
    it, if its code can."""


class Session:
    """A conversation over one connection.

    Args:
        connection: an open one; it belongs to the session from here on.
        timeout: seconds that any wait may take when it is not told otherwise.
        id_prefix: how the ids of its requests begin.

    Public attributes:
        frames: all frames that were read so far, of every kind that this version knows.
        answers: the answers by `request_id`, in the order in which they were asked for.
        interruptions: the INTERRUPTs that were sent, in order.
        refusals: the ERRORs that are about no request.
        unexpected: frames that answer nothing that this session has sent.
        goodbye: the gateway's SHUTDOWN, once it has come.
    """

    def __init__(
        self, connection: Connection, *, timeout: float = 10.0, id_prefix: str = "req"
    ) -> None:
        self.connection = connection
        self.timeout = timeout
        self.frames: list[Frame] = []
        self.answers: dict[str, Answer] = {}
        self.interruptions: list[Interruption] = []
        self.refusals: list[Error] = []
        self.unexpected: list[Frame] = []
        self.goodbye: Shutdown | None = None
        self._id_prefix = id_prefix
        self._registered: RegisterAck | None = None
        self._taken: Counter[type[Any]] = Counter()
        """Of each kind, up to which frame `wait_for` has looked."""
        # To know which ERROR refuses which message. Places count the messages that were sent.
        self._request_places: dict[str, int] = {}
        """Of the first message for each request."""
        self._register_place = 0
        self._query_places: dict[type[Any], deque[int]] = {
            SessionInfo: deque(),
            HealthCheckAck: deque(),
        }
        """Of the messages that wait for such an answer."""
        self._answered_place = 0
        """Of the last message whose answer has come. The gateway answers in order, so all ERRORs
        that refuse messages before it have come too."""
        self._spare_acks: list[str | UnsetType | None] = []
        """Targets of INTERRUPTs that were sent twice, perhaps without need: then there are two acks
        for one `Interruption`."""
        self._settled = 0
        """Later messages that had an ERROR, or cannot get one (HEARTBEAT_REPLY)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.drop()

    # Sending.

    def register(self, *, timeout: float | None = None, **fields: Any) -> RegisterAck:
        """Send REGISTER, and wait for its REGISTER_ACK.

        Args:
            timeout: seconds; None is the session's own.
            fields: of the frame: `auth`, `platform`, …

        Raises:
            FrameRefused: the gateway refused it. `interrupt` says how that is known.
            WaitTimeout, ConnectionEnded: as every wait.
        """
        before, known = self._registered, len(self.refusals)
        refusals_before = known + self._unanswered()
        self.send("REGISTER", **fields)
        self._register_place = self.connection.messages_sent

        def look() -> RegisterAck | None:
            if self._registered is not before:
                return self._registered
            self._check_refused("REGISTER", refusals_before)
            return None

        return self._wait_ack(look, "REGISTER", known, "the REGISTER_ACK", timeout)

    def ask(self, text: str, *, request_id: str | None = None, **fields: Any) -> Answer:
        """Send a REQUEST; does not wait.

        Args:
            text: what the user says.
            request_id: None makes a new one.
            fields: more of the frame's fields, `system_prompt` for example.
        """
        answer = self._answer(request_id)
        self.send(
            "REQUEST",
            request_id=answer.request_id,
            data_type="TEXT",
            content={"text": text},
            **fields,
        )
        return answer

    def interrupt(
        self,
        target: Answer | str | None = None,
        *,
        reason: str = "USER_STOP",
        delivered_text_chars: float | None = None,
        timeout: float | None = None,
    ) -> InterruptAck:
        """Send an INTERRUPT, and wait for its INTERRUPT_ACK.

        If an ERROR comes that may refuse it, it is sent once more, with its target only, so that no
        other field can be the reason to refuse it. If the first one was accepted, the second
        changes nothing, and its ack is ignored.

        An ERROR does not name the frame that it refuses. The gateway answers in order and sends at
        most one ERROR for a frame, so an ERROR is taken for the refusal of the second INTERRUPT if
        its code can refuse one, and if each earlier frame without an answer has had an ERROR. Other
        ERRORs cannot be told apart: this then waits for the ack, and raises FrameRefused with the
        last of them if no ack has come when the time is up or the connection ends. What `send_raw`
        sends counts as one frame; if it is several bad ones, their ERRORs can be taken for the
        refusal.

        Args:
            target: an answer or a request's id; None is every live one.
            reason: as the protocol names them.
            delivered_text_chars: how many code points the user got, where that is known better. It
                is rounded down, and a negative one is sent as 0. What is not a finite number is
                left out.
            timeout: seconds; None is the session's own.

        Raises:
            FrameRefused: the gateway refused it twice.
            WaitTimeout, ConnectionEnded: as every wait.
        """
        known = len(self.refusals)
        sent = self.send_interrupt(target, reason=reason, delivered_text_chars=delivered_text_chars)

        def look() -> InterruptAck | None:
            if sent.ack is None:
                self._check_refused("INTERRUPT", sent.refusals_before)
            return sent.ack

        what = f"the INTERRUPT_ACK for {sent.request_id or 'all requests'}"
        try:
            return self._wait_ack(look, "INTERRUPT", known, what, timeout)
        except FrameRefused:
            self.interruptions.remove(sent)  # it gets no ack
            raise

    def send_interrupt(
        self,
        target: Answer | str | None = None,
        *,
        reason: str = "USER_STOP",
        delivered_text_chars: float | None = None,
    ) -> Interruption:
        """Send an INTERRUPT; does not wait. The arguments are those of `interrupt`.

        After an ERROR that may refuse it, the wait that reads the ERROR sends it once more.
        """
        request_id = target.request_id if isinstance(target, Answer) else target
        place = self.connection.messages_sent + 1
        sent = Interruption(request_id, time.monotonic(), place=place)
        sent.refusals_before = len(self.refusals) + self._unanswered()
        self.interruptions.append(sent)
        payload: dict[str, Any] = {"interrupt_request_id": request_id, "reason": reason}
        if (chars := _whole(delivered_text_chars)) is not None:
            payload["delivered_text_chars"] = chars
        self.send("INTERRUPT", **payload)
        return sent

    def send_function_result(
        self, call: FunctionCall | str, result: Any, *, answer: Answer | None = None
    ) -> Answer:
        """Send a FUNCTION_RESULT, with which the model continues; does not wait.

        Args:
            call: the function call, or its id.
            result: any JSON value.
            answer: where the model made several calls at once: what the first of these returned.

        Returns:
            The answer that continues. It begins when every call has its result.
        """
        answer = answer or self._answer(None)
        self.send(
            "FUNCTION_RESULT",
            call_id=call if isinstance(call, str) else call.call_id,
            result=result,
            request_id=answer.request_id,
        )
        return answer

    def send(self, msg_type: str, **payload: Any) -> None:
        """Send any frame; does not wait.

        Raises:
            ConnectionEnded: the connection has ended, or is closing.
            OSError: the write failed, or took too long.
        """
        self._send(msg_type, payload, None)
        if msg_type == "SESSION_QUERY":
            self._query_places[SessionInfo].append(self.connection.messages_sent)
        elif msg_type == "HEALTH_CHECK":
            self._query_places[HealthCheckAck].append(self.connection.messages_sent)

    def one_packet(self) -> contextlib.AbstractContextManager[None]:
        """A block; what is sent inside goes out in one write at its end."""
        return self.connection.one_packet()

    # Receiving.

    @property
    def registered(self) -> RegisterAck:
        """The REGISTER_ACK. RuntimeError before it has come."""
        if self._registered is None:
            raise RuntimeError("this session is not registered")
        return self._registered

    @property
    def session_id(self) -> str | None:
        """The session's id; None before REGISTER_ACK."""
        return self._registered.session_id if self._registered else None

    def wait_for(self, kind: type[P], *, timeout: float | None = None) -> P:
        """Wait for a frame, as in `wait_for(SessionInfo)`.

        Args:
            kind: a payload's type.
            timeout: seconds; None is the session's own.

        Returns:
            The first of this kind that no earlier call has returned.

        Raises:
            WaitTimeout, ConnectionEnded: as every wait.
        """

        def look() -> P | None:
            for frame in self.frames[self._taken[kind] :]:
                self._taken[kind] += 1
                if isinstance(frame.payload, kind):
                    return frame.payload
            return None

        return self.wait(look, f"a {kind.__name__} frame", timeout)

    def wait(self, look: Callable[[], T | None], what: str, timeout: float | None = None) -> T:
        """Read frames until `look` finds something in them, and return that.

        Args:
            look: called before the first read and after each; None is nothing.
            what: what is awaited, for the failure's message.
            timeout: seconds; None is the session's own.

        Raises:
            WaitTimeout: the time is up.
            ConnectionEnded: the connection ended before.
            InvalidFrame: the gateway sent what is not a frame of the protocol.
        """
        timeout = self.timeout if timeout is None else timeout
        until = time.monotonic() + timeout
        while (found := look()) is None:
            if not self.connection.is_open and not self.connection.has_unread:
                code = self.connection.close_code
                how = f"the connection ended (close code {code})"
                raise ConnectionEnded(f"{how}, waiting for {what}; {self._shown()}", code)
            try:
                self._read(until - time.monotonic())
            except TimeoutError:
                raise WaitTimeout(
                    f"{timeout} s are over, waiting for {what}; {self._shown()}"
                ) from None
        return found

    # Ending.

    def close(self, *, timeout: float | None = None) -> None:
        """Close the connection in order, and wait for its end. A second call does nothing.

        Args:
            timeout: seconds; None is the session's own.

        Raises:
            WaitTimeout: the gateway did not close its side in time.
            InvalidFrame: the gateway sent what is not a frame of the protocol.

        The socket is closed in each of these cases too.
        """
        timeout = self.timeout if timeout is None else timeout
        until = time.monotonic() + timeout
        try:
            with contextlib.suppress(OSError):  # the gateway was faster
                if self.connection.is_open:
                    self.connection.send_close(timeout=timeout)
            while not self.connection.has_ended:
                self._read(until - time.monotonic())
        except TimeoutError:
            raise WaitTimeout(
                f"{timeout} s are over, waiting for the end of the connection; {self._shown()}"
            ) from None
        finally:
            self.drop()

    def drop(self) -> None:
        """Close the socket at once, without a close frame."""
        self.connection.drop()

    # Inside.

    def _answer(self, request_id: str | None) -> Answer:
        request_id = request_id or f"{self._id_prefix}_{next(_ids)}"
        answer = self.answers.get(request_id)
        if answer is None or answer.ended:  # an id that was refused may be used again
            answer = self.answers[request_id] = Answer(request_id, self, time.monotonic())
            self._request_places[request_id] = self.connection.messages_sent + 1
        return answer

    def _send(self, msg_type: str, payload: dict[str, Any], timeout: float | None) -> None:
        session_id = self._registered.session_id if self._registered else None
        data = encode_frame(msg_type, payload, session_id)
        self.connection.send_text(data, timeout=timeout)

    def _unanswered(self) -> int:
        """How many of the messages that were sent can still get an ERROR, at most."""
        later = self.connection.messages_sent - self._answered_place
        return max(later - self._settled, 0)

    def _note_answer(self, place: int) -> None:
        """The answer to the message at this place has come."""
        if place > self._answered_place:
            self._answered_place, self._settled = place, 0

    def _repeat_interrupts(self, until: float) -> None:
        """An ERROR has come that may refuse any INTERRUPT without an ack. Send each once more."""
        for sent in self.interruptions:
            if sent.ack is not None or sent.is_repeated:
                continue
            if sent.request_id is None and any(
                self._request_places[request_id] > sent.place and not answer.ended
                for request_id, answer in self.answers.items()
            ):
                continue  # "all requests" would now include one that was sent after the interrupt
            if len(self.refusals) > sent.refusals_before:  # the first is surely refused
                sent.place = self.connection.messages_sent + 1
            else:
                self._spare_acks.append(sent.request_id)
            sent.refusals_before = len(self.refusals) + self._unanswered()
            sent.is_repeated = True
            with contextlib.suppress(OSError):  # the gateway may be gone again
                payload = {"interrupt_request_id": sent.request_id}
                self._send("INTERRUPT", payload, until - time.monotonic())

    def _refusals(self, msg_type: str, since: int) -> list[Error]:
        """The ERRORs, from this one on, with a code that can refuse such a frame."""
        codes = _REFUSALS[msg_type]
        return [error for error in self.refusals[since:] if error.error_code in codes]

    def _check_refused(self, msg_type: str, since: int) -> None:
        """Raise FrameRefused with the first ERROR, from this one on, that can refuse the frame."""
        for error in self._refusals(msg_type, since):
            raise FrameRefused(error)

    def _wait_ack(
        self,
        look: Callable[[], T | None],
        msg_type: str,
        known: int,
        what: str,
        timeout: float | None,
    ) -> T:
        """Wait for the ack of a frame that was just sent, or its refusal.

        Args:
            look: finds the ack, or raises FrameRefused where it is sure that there will be none.
            msg_type: of the frame.
            known: how many ERRORs had come before it was sent.
            what: what is awaited, for the failure's message.
            timeout: seconds; None is the session's own.

        Raises:
            FrameRefused: see `interrupt`.
            WaitTimeout, ConnectionEnded: as every wait.
        """
        try:
            return self.wait(look, what, timeout)
        except (WaitTimeout, ConnectionEnded):
            if possible := self._refusals(msg_type, known):
                raise FrameRefused(possible[-1]) from None
            raise

    def _read(self, timeout: float) -> None:
        until = time.monotonic() + timeout
        invalid: InvalidFrame | None = None
        for message in self.connection.receive(timeout):
            if message.is_text:
                try:
                    frame = decode_frame(message.data, message.at, len(self.frames))
                except InvalidFrame as error:
                    invalid = invalid or error  # first take those that came with it
                    continue
                if frame is not None:
                    self.frames.append(frame)
                    self._take(frame, until)
        if invalid is not None:
            raise invalid

    def _take(self, frame: Frame, until: float) -> None:
        match frame.payload:
            case RegisterAck() as ack:
                self._registered = ack
                self._note_answer(self._register_place)
            case Response(request_id=str(request_id)) | Error(request_id=str(request_id)):
                if (answer := self.answers.get(request_id)) is not None:
                    answer.add(frame)
                    self._note_answer(self._request_places[request_id])
                else:
                    self.unexpected.append(frame)
            case Error() as error:
                self.refusals.append(error)
                if self._unanswered():
                    self._settled += 1
                if error.error_code in _REFUSALS["INTERRUPT"]:
                    self._repeat_interrupts(until)
            case InterruptAck() as ack:
                self._take_ack(ack, frame)
            case Heartbeat():
                with contextlib.suppress(OSError):  # the gateway may be gone again
                    self._send("HEARTBEAT_REPLY", {}, until - time.monotonic())
                    self._settled += 1
            case SessionInfo() | HealthCheckAck() as info:
                if places := self._query_places[type(info)]:
                    self._note_answer(places.popleft())
            case Shutdown() as goodbye:
                self.goodbye = goodbye

    def _take_ack(self, ack: InterruptAck, frame: Frame) -> None:
        for sent in self.interruptions:
            if sent.ack is None and sent.request_id == ack.interrupt_request_id:
                sent.ack, sent.ack_frame = ack, frame
                self._note_answer(sent.place)
                return
        if ack.interrupt_request_id in self._spare_acks:
            self._spare_acks.remove(ack.interrupt_request_id)
        else:
            self.unexpected.append(frame)

    def _shown(self) -> str:
        shown = "".join(f"\n  {frame.payload}" for frame in self.frames[-SHOWN_FRAMES:])
        return f"the last of {len(self.frames)} frames:{shown or ' none'}"


def _whole(chars: float | None) -> int | None:
    """A count as the protocol wants it; None where it is not a finite number."""
    try:
        return min(max(math.floor(chars), 0), _MAX_CHARS)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # None among them
        return None
