"""A second door, to show that a session knows no protocol: lines of text over a socket.

→ ask ID TEXT             ← text ID TEXT        ← end ID OUTCOME REASON
→ stop [ID]               ← call ID CALL NAME ARGUMENTS
→ result CALL TEXT [ID]   ← stopped STATUS [ID OUTCOME CHARS]…
→ bye                     ← refused CODE        ← goodbye TEXT
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import gevent
import gevent.event
import gevent.socket

from actors.outlet import Delivered, Outlet, RequestEnd
from actors.session.messages import (
    ClientLeaves,
    ConnectionLost,
    FunctionReturned,
    InterruptAsked,
    RequestAsked,
    SessionMessage,
)
from actors.session.port import Goodbye, InterruptDone, SessionFacts
from actors.session.profile import Function, FunctionDefinition, Profile
from actors.session.session import Registration, Sessions
from actors.words import ErrorCode, InterruptReason
from llm.chat.completions import ToolCall


class LineDoor:
    """One client, from its first line to its goodbye. It is the port of its session."""

    def __init__(self, sock: gevent.socket.socket, sessions: Sessions) -> None:
        self._sock = sock
        self._lines: deque[tuple[str, LineOutlet | None, Callable[[], None]]] = deque()
        self._has_lines = gevent.event.Event()
        functions = (Function.of(FunctionDefinition("look")),)
        registration = Registration("socketpair", Profile(functions=functions))
        session = sessions.open(self, registration)
        assert session is not None
        self.session = session
        self._greenlets = [gevent.spawn(self._read), gevent.spawn(self._write)]

    def close(self) -> None:
        gevent.killall(self._greenlets)
        self._sock.close()

    # What the client says.

    def _read(self) -> None:
        with self._sock.makefile("r", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                self.session.tell(self._word(line.rstrip("\n").split(" ")))
        self.session.tell(ConnectionLost("closed by the client"))

    @staticmethod
    def _word(line: list[str]) -> SessionMessage:
        match line:
            case ["ask", request_id, *text]:
                return RequestAsked(request_id, " ".join(text))
            case ["stop", *target]:
                reason, now = InterruptReason.USER_STOP, time.monotonic()
                return InterruptAsked(next(iter(target), None), reason, None, now)
            case ["result", call_id, result, *request_id]:
                return FunctionReturned(call_id, result, next(iter(request_id), None))
            case _:
                return ClientLeaves()

    # What the session says.

    def say(
        self,
        *words: object,
        outlet: LineOutlet | None = None,
        on_sent: Callable[[], None] = lambda: None,
    ) -> None:
        """Queue a line."""
        self._lines.append((" ".join(map(str, words)) + "\n", outlet, on_sent))
        self._has_lines.set()

    def drop(self, outlet: LineOutlet) -> None:
        """Drop what is queued of an answer."""
        self._lines = deque(line for line in self._lines if line[1] is not outlet)

    def _write(self) -> None:
        while True:
            self._has_lines.wait()
            while self._lines:
                line, _, on_sent = self._lines.popleft()
                self._sock.sendall(line.encode())
                on_sent()
            self._has_lines.clear()

    def open_outlet(self, request_id: str) -> Outlet:
        return LineOutlet(self, request_id)

    def session_opened(self, session_id: str, timeout_seconds: float) -> None:
        self.say("welcome", session_id)

    def request_ended(self, end: RequestEnd) -> None:
        self.say("end", end.request_id, end.outcome, end.reason or end.code or "-")

    def interrupt_done(self, done: InterruptDone, on_sent: Callable[[float], None]) -> None:
        results = [(one.request_id, one.outcome, one.delivered_text_chars) for one in done.results]
        words = [word for result in results for word in result]
        self.say("stopped", done.status, *words, on_sent=lambda: on_sent(time.monotonic()))

    def refused(self, code: ErrorCode, detail: str) -> None:
        self.say("refused", code)

    def session_described(self, facts: SessionFacts, tag: object) -> None:
        self.say("session", facts.remaining_seconds)

    def door_answers(self, tag: object) -> None:
        self.say("well")

    def sign_of_life_wanted(self, remaining_seconds: int) -> None:
        self.say("alive?")

    def time_nearly_up(self, remaining_seconds: int) -> None:
        self.say("hurry", remaining_seconds)

    def voice_unwanted(self, request_id: str) -> None:
        pass

    def goodbye(self, goodbye: Goodbye) -> None:
        self.say("goodbye", goodbye.text, "return" if goodbye.should_return else "stay")

    def session_failed(self) -> None:
        self.say("failed")


class LineOutlet:
    """One answer, a line for each piece."""

    def __init__(self, door: LineDoor, request_id: str) -> None:
        self._door = door
        self._request_id = request_id
        self._is_discarded = False
        self.delivered = Delivered()
        self.is_done = False

    def put(self, text: str) -> None:
        def sent() -> None:
            self.delivered = Delivered(self.delivered.text + text, self.delivered.calls)

        self._say("text", self._request_id, text, on_sent=sent)

    def put_call(self, call: ToolCall, on_sent: Callable[[], None]) -> None:
        def sent() -> None:
            self.delivered = Delivered(self.delivered.text, (*self.delivered.calls, call))
            on_sent()

        self._say("call", self._request_id, call.id, call.name, call.arguments, on_sent=sent)

    def finish(self, end: RequestEnd, on_sent: Callable[[], None]) -> None:
        def sent() -> None:
            self.is_done = True
            on_sent()

        self._say("end", end.request_id, end.outcome, end.reason or end.code or "-", on_sent=sent)

    def discard(self) -> bool:
        if not self.is_done:
            self._is_discarded = True
            self._door.drop(self)
        return not self.is_done

    def progress_at(self) -> float:
        return 0.0

    def _say(self, *words: object, on_sent: Callable[[], None]) -> None:
        if not self._is_discarded:
            self._door.say(*words, outlet=self, on_sent=on_sent)
