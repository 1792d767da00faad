"""The typed client: register, ask, interrupt, collect.

    with gateway.connect() as client:
        answer = client.ask("Tell me a story")
        answer.wait_text()
        ack = client.interrupt(answer)
        assert answer.collect().outcome == "INTERRUPTED"

It stands on the wire-level client of `client.py`, which stays within reach as `wire`. One thread
uses it at a time; it reads only inside of a wait, and every wait has an end.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from msgspec import UNSET
from websockets.exceptions import InvalidState

from .client import Client, Received
from .protocol import (
    SERVER_PAYLOADS,
    Error,
    FunctionCall,
    FunctionResult,
    Heartbeat,
    HeartbeatReply,
    Interrupt,
    InterruptAck,
    Outcome,
    Register,
    RegisterAck,
    Request,
    Response,
    ServerPayload,
    Usage,
)

SHOWN_FRAMES = 10
"""The last ones, in a failure."""

_PAYLOADS: dict[str, type[Any]] = {payload.msg_type: payload for payload in SERVER_PAYLOADS}
_ids = itertools.count(1)

T = TypeVar("T")
P = TypeVar("P", bound=msgspec.Struct)


class WaitTimeout(TimeoutError):
    """What was waited for did not come in time; the message shows the last frames."""


class ConnectionEnded(ConnectionError):
    """The connection ended before what was waited for came; the message shows the last frames.

    Args:
        message: what was waited for.
        code: the gateway's close code; None where it closed without one.
    """

    def __init__(self, message: str, code: int | None) -> None:
        super().__init__(message)
        self.code = code


class FrameRefused(Exception):
    """The gateway answered a frame with an ERROR that is about no request.

    Args:
        error: that ERROR.
    """

    def __init__(self, error: Error) -> None:
        super().__init__(f"{error.error_code}: {error.error_detail}")
        self.error = error


class AnswerEnded(Exception):
    """An answer ended without the text that was waited for."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame from the gateway."""

    payload: ServerPayload
    session_id: str | None
    at: float
    """`time.monotonic()` when it was read."""

    @property
    def msg_type(self) -> str:
        """Its name on the wire."""
        msg_type: str = self.payload.msg_type
        return msg_type


@dataclass(frozen=True, slots=True)
class Collected:
    """An answer that has ended."""

    request_id: str
    text: str
    outcome: Outcome
    finish_reason: str | None
    """The provider's; None where it gave none."""
    usage: Usage | None
    function_calls: list[FunctionCall]
    error: Error | None
    """Why it failed."""
    interrupt_reason: str | None
    """Why it was interrupted."""


@dataclass(eq=False)
class Answer:
    """What comes back for one request: it sees the frames of its own `request_id`, and no others.

    Iterating gives its pieces of text as they come, from the first to its end.
    """

    request_id: str
    _client: ChatClient = field(repr=False)
    frames: list[Frame] = field(default_factory=list, repr=False)
    """Those that were read so far."""
    _pieces: list[str] = field(default_factory=list, repr=False)
    _calls: list[FunctionCall] = field(default_factory=list, repr=False)
    _last: Response | Error | None = field(default=None, repr=False)

    @property
    def text(self) -> str:
        """The text that was read so far."""
        return "".join(self._pieces)

    @property
    def ended(self) -> bool:
        """Whether its last frame was read."""
        return self._last is not None

    def wait_text(self, chars: int = 1, *, timeout: float | None = None) -> str:
        """Wait until there is text.

        Args:
            chars: how many code points at least.
            timeout: seconds; None is the client's own.

        Returns:
            All of its text so far.

        Raises:
            AnswerEnded: it ended with less.
            WaitTimeout, ConnectionEnded: as every wait.
        """

        def look() -> str | None:
            text = self.text
            if len(text) < chars and self.ended:
                raise AnswerEnded(
                    f"{self.request_id} ended with {len(text)} characters of text, waiting for "
                    f"{chars}: {self._last}"
                )
            return text if len(text) >= chars else None

        return self._client.wait(look, f"{chars} characters of {self.request_id}", timeout)

    def __iter__(self) -> Iterator[str]:
        for seen in itertools.count():

            def look(seen: int = seen) -> list[str] | None:
                more = self._pieces[seen : seen + 1]
                return more if more or self.ended else None

            piece = self._client.wait(look, f"more text of {self.request_id}")
            if not piece:
                return
            yield piece[0]

    def collect(self, *, timeout: float | None = None) -> Collected:
        """Wait for its end.

        Args:
            timeout: seconds for all of it; None is the client's own.

        Raises:
            WaitTimeout, ConnectionEnded: as every wait.
        """
        self._client.wait(lambda: self._last and True, f"the end of {self.request_id}", timeout)
        last = self._last
        assert last is not None
        return Collected(
            request_id=self.request_id,
            text=self.text,
            outcome=Outcome.FAILED if last.outcome is UNSET else last.outcome,
            finish_reason=None if last.finish_reason is UNSET else last.finish_reason,
            usage=None if last.usage is UNSET else last.usage,
            function_calls=list(self._calls),
            error=last if isinstance(last, Error) else None,
            interrupt_reason=last.interrupt_reason or None if isinstance(last, Response) else None,
        )

    def _take(self, frame: Frame, payload: Response | Error) -> None:
        self.frames.append(frame)
        if isinstance(payload, Error) or payload.text_stream_seq == -1:
            self._last = payload
        elif payload.function_call is not UNSET:
            self._calls.append(payload.function_call)
        elif payload.content.text:
            self._pieces.append(payload.content.text)


class ChatClient:
    """A registered client of a gateway on this machine.

    Args:
        port: of the gateway, on 127.0.0.1.
        timeout: seconds that any wait may take when it is not told otherwise.
        register: fields of the REGISTER frame, over those of an ordinary one.

    Raises:
        FrameRefused: the gateway did not like them.
    """

    def __init__(self, port: int, *, timeout: float = 10.0, **register: Any) -> None:
        self.timeout = timeout
        self.frames: list[Frame] = []
        """All that were read so far, of every kind."""
        self._answers: dict[str, Answer] = {}
        self._interrupts: Counter[str | None] = Counter()
        self._looked: Counter[type[Any]] = Counter()
        self._is_open = True
        self.wire = Client(port, register=False, timeout=timeout)
        """The client below: any bytes and frames, as they are on the wire."""
        try:
            self.registered = self._register(register)
        except BaseException:
            self.drop()
            raise
        self.session_id = self.wire.session_id = self.registered.session_id

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

    # What a client says.

    def ask(self, text: str, *, request_id: str | None = None, **fields: Any) -> Answer:
        """Send a REQUEST; does not wait.

        Args:
            text: what the user says.
            request_id: None makes a new one.
            fields: more of the frame's fields, `system_prompt` for example.
        """
        answer = self._answer(request_id)
        self.send(
            Request.msg_type,
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
        delivered_text_chars: int | None = None,
        timeout: float | None = None,
    ) -> InterruptAck:
        """Send an INTERRUPT, and wait for its INTERRUPT_ACK.

        Args:
            target: an answer or a request's id; None is every live one.
            reason: as the protocol names them.
            delivered_text_chars: how many code points the user got, where that is known better.
            timeout: seconds; None is the client's own.

        Raises:
            FrameRefused: the gateway did not understand it.
            WaitTimeout, ConnectionEnded: as every wait.
        """
        request_id = target.request_id if isinstance(target, Answer) else target
        before = self._interrupts[request_id]
        self._interrupts[request_id] += 1
        since = len(self.frames)
        self.send(
            Interrupt.msg_type,
            interrupt_request_id=request_id,
            reason=reason,
            delivered_text_chars=delivered_text_chars,
        )

        def look() -> InterruptAck | None:
            try:
                self._raise_refusal(since)
            except FrameRefused:
                self._interrupts[request_id] = before  # it gets no ack
                raise
            # One that came too late for an earlier wait is not taken for this one's.
            acks = (
                frame.payload
                for frame in self.frames
                if isinstance(frame.payload, InterruptAck)
                and frame.payload.interrupt_request_id == request_id
            )
            return next(itertools.islice(acks, before, None), None)

        return self.wait(look, f"the INTERRUPT_ACK for {request_id or 'all requests'}", timeout)

    def send_function_result(
        self, call: FunctionCall | str, result: Any, *, answer: Answer | None = None
    ) -> Answer:
        """Send a FUNCTION_RESULT, upon which the model goes on; does not wait.

        Args:
            call: the function call, or its id.
            result: any JSON value.
            answer: where the model made several calls at once: what the first of these returned.

        Returns:
            The answer that goes on. It begins when every call has its result.
        """
        answer = answer or self._answer(None)
        self.send(
            FunctionResult.msg_type,
            call_id=call if isinstance(call, str) else call.call_id,
            result=result,
            request_id=answer.request_id,
        )
        return answer

    def send(self, msg_type: str, **payload: Any) -> None:
        """Send any frame; does not wait."""
        self.wire.send(msg_type, msgspec.to_builtins(payload))

    # What it hears.

    def wait_for(self, kind: type[P], *, timeout: float | None = None) -> P:
        """Wait for a frame, as `wait_for(SessionInfo)`.

        Args:
            kind: one of the payloads of `gateway.wire.protocol`.
            timeout: seconds; None is the client's own.

        Returns:
            The first of this kind that no earlier call has returned.

        Raises:
            WaitTimeout, ConnectionEnded: as every wait.
        """

        def look() -> P | None:
            for frame in self.frames[self._looked[kind] :]:
                self._looked[kind] += 1
                if isinstance(frame.payload, kind):
                    return frame.payload
            return None

        return self.wait(look, f"a {kind.__name__} frame", timeout)

    def wait(self, look: Callable[[], T | None], what: str, timeout: float | None = None) -> T:
        """Read frames until `look` finds something in them, and return that.

        Args:
            look: called before the first frame and after each read; None is nothing.
            what: what is waited for, for the failure's message.
            timeout: seconds; None is the client's own.

        Raises:
            WaitTimeout: the time is up.
            ConnectionEnded: the connection ended before.
        """
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while (found := look()) is None:
            if not self._is_open:
                code = self.wire.close_code
                how = f"the connection ended (close code {code})"
                raise ConnectionEnded(f"{how}, waiting for {what}; {self._shown()}", code)
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise WaitTimeout(f"{timeout} s are over, waiting for {what}; {self._shown()}")
        return found

    # Ending.

    def close(self) -> None:
        """Close the connection in order, and wait for its end; a second time, nothing.

        Raises:
            WaitTimeout: the gateway did not close its side.
        """
        try:
            if self._is_open:
                with contextlib.suppress(OSError, InvalidState):  # the gateway was faster
                    self.wire.send_close()
                self.wait(lambda: None if self._is_open else True, "the end of the connection")
        finally:
            self.drop()

    def drop(self) -> None:
        """Close the socket without a word."""
        self._is_open = False
        self.wire.drop()

    # Inside.

    def _register(self, fields: dict[str, Any]) -> RegisterAck:
        ordinary = {"auth": {"type": "API_KEY", "api_key": "test"}, "platform": "WEB"}
        self.send(Register.msg_type, **ordinary | fields)

        def look() -> RegisterAck | None:
            self._raise_refusal(0)
            acks = (frame.payload for frame in self.frames)
            return next((ack for ack in acks if isinstance(ack, RegisterAck)), None)

        return self.wait(look, "the REGISTER_ACK")

    def _raise_refusal(self, since: int) -> None:
        for frame in self.frames[since:]:
            if isinstance(frame.payload, Error) and frame.payload.request_id is UNSET:
                raise FrameRefused(frame.payload)

    def _answer(self, request_id: str | None) -> Answer:
        request_id = request_id or f"req_{next(_ids)}"
        answer = self._answers.get(request_id)
        if answer is None or answer.ended:  # an id that was refused may be used again
            answer = self._answers[request_id] = Answer(request_id, self)
        return answer

    def _read(self, seconds: float) -> bool:
        """Read once, and hand out what came; False when nothing did."""
        known = len(self.wire.frames)
        try:
            self._is_open = self.wire.read_within(seconds)
        except TimeoutError:
            return False
        for received in self.wire.frames[known:]:
            self._take(received)
        return True

    def _take(self, received: Received) -> None:
        payload = msgspec.convert(received.payload, _PAYLOADS[received.msg_type])
        frame = Frame(payload, received.session_id, received.at)
        self.frames.append(frame)
        match payload:
            case Response(request_id=str(request_id)) | Error(request_id=str(request_id)):
                if request_id in self._answers:  # else it was asked for on the wire
                    self._answers[request_id]._take(frame, payload)
            case Heartbeat():
                with contextlib.suppress(OSError, InvalidState):  # the gateway may be gone again
                    self.send(HeartbeatReply.msg_type)

    def _shown(self) -> str:
        shown = "".join(f"\n  {frame.payload}" for frame in self.frames[-SHOWN_FRAMES:])
        return f"the last of {len(self.frames)} frames:{shown or ' none'}"
