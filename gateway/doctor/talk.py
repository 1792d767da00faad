"""The doctor's session: one of the client library, whose errors become step failures in words."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator

from msgspec import UNSET

from gateway.client import (
    PATH,
    Answer,
    Connection,
    ConnectionEnded,
    Error,
    Frame,
    FrameRefused,
    HandshakeFailed,
    InterruptAck,
    Interruption,
    InterruptReason,
    InvalidFrame,
    Platform,
    RegisterAck,
    Response,
    Session,
    WaitTimeout,
)
from gateway.doctor.faults import OTHER_PROGRAM, SEE_LOG, StepFailed
from gateway.doctor.pages import Page, dial, page_of
from gateway.doctor.target import Target
from gateway.doctor.wording import quoted

_MAX_MESSAGE_BYTES = 4 * 1024 * 1024


class Talk:
    """A WebSocket to the target, with a record of the frames received.

    Args:
        target: the daemon to connect to.
        until: `time.monotonic()` when every wait ends.
        seconds: limit of the connection's own waits: for the handshake, and for each write.

    Raises:
        StepFailed: the WebSocket cannot be opened.
    """

    def __init__(self, target: Target, until: float, seconds: float) -> None:
        self._target = target
        self._until = until
        self._known_refusals = 0
        began = time.monotonic()
        seconds = max(min(seconds, until - began), 0.001)
        sock = dial(target, target.address, began + seconds)
        try:
            connection = Connection(
                target.url.geturl(), sock, max_message_bytes=_MAX_MESSAGE_BYTES, timeout=seconds
            )
        except HandshakeFailed as error:
            raise self._no_websocket(error, time.monotonic() - began) from None
        # An id that no other client uses: the daemon's log is searched for it.
        prefix = f"doctor_{secrets.token_hex(4)}"
        self.session = Session(connection, timeout=seconds, id_prefix=prefix)

    # Sending. Where the connection has ended, the next wait says so.

    def register(self, seconds: float) -> RegisterAck | None:
        """Send REGISTER, and wait for its answer; None when that takes too long.

        Raises:
            FrameRefused: the gateway refused it.
            StepFailed: the connection ended, or a frame does not match the protocol.
        """
        with self._told():
            try:
                return self.session.register(
                    timeout=self._left(seconds),
                    auth=self._target.auth,
                    platform=Platform.WEB,
                    require_tts=False,
                    # So that a new request interrupts the old one, whatever the daemon's policy is.
                    on_new_request="interrupt",
                )
            except WaitTimeout:
                if self.loss is not None:  # a SHUTDOWN came in its place
                    raise StepFailed(self.loss, SEE_LOG) from None
                return None
            except FrameRefused:
                self._known_refusals = len(self.session.refusals)
                raise

    def ask(self, text: str) -> Answer:
        """Send a REQUEST."""
        with contextlib.suppress(OSError):
            return self.session.ask(text)
        return next(reversed(self.session.answers.values()))

    def interrupt(
        self, target: Answer | None, reason: InterruptReason = InterruptReason.USER_STOP
    ) -> Interruption:
        """Send an INTERRUPT of an answer, or of everything."""
        with contextlib.suppress(OSError):
            return self.session.send_interrupt(target, reason=reason)
        return self.session.interruptions[-1]

    @contextlib.contextmanager
    def one_packet(self) -> Iterator[None]:
        """Send all frames of this block in one write."""
        with contextlib.suppress(OSError), self.session.one_packet():
            yield

    # Receiving.

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """Read frames until `done()` is true; False when that takes too long.

        Raises:
            StepFailed: the connection ended, the gateway refused a frame, or a frame does not
                match the protocol.
        """

        def check() -> bool | None:
            if done():
                return True
            self._check_refusals()
            return None

        with self._told():
            try:
                return self.session.wait(check, "a step of the doctor", self._left(seconds))
            except WaitTimeout:
                return False

    def listen(self, seconds: float) -> None:
        """Read everything that comes in this time."""
        self.wait(lambda: False, seconds)

    @property
    def answers(self) -> list[Answer]:
        """In the order in which they were asked for."""
        return list(self.session.answers.values())

    @property
    def unexpected(self) -> str | None:
        """In words, the first frame that answers nothing that was sent; None without one."""
        for frame in self.session.unexpected:
            return _described(frame)
        return None

    @property
    def loss(self) -> str | None:
        """Why no more frames can be exchanged; None while they can."""
        connection = self.session.connection
        if self.session.goodbye is not None:
            return f"the daemon ended the session: {quoted(str(self.session.goodbye.reason))}"
        if connection.is_open:
            return None
        if connection.close_code is not None:
            words = f"code {connection.close_code} {quoted(connection.close_reason)}"
            return f"the connection ended: {words.strip()}"
        fault = connection.wire_error
        if fault is not None and not isinstance(fault, EOFError):
            return f"the connection ended: invalid WebSocket frame: {quoted(str(fault))}"
        return "the connection ended: no close code"

    def close(self) -> None:
        """Send SHUTDOWN and a close frame, then close the socket."""
        with contextlib.suppress(OSError):
            if self.session.session_id is not None and self.loss is None:
                self.session.send("SHUTDOWN", reason="doctor")
            self.session.connection.send_close()
        self.session.drop()

    # Inside.

    def _left(self, seconds: float) -> float:
        return min(seconds, self._until - time.monotonic())

    def _check_refusals(self) -> None:
        """A refusal comes first: it is why the connection ends, if it does."""
        for error in self.session.refusals[self._known_refusals :]:
            self._known_refusals += 1
            raise StepFailed(
                f"the server refused a frame: {refusal(error)}",
                "Do the daemon and this doctor have the same version? "
                f"({self._target.prog} --version)",
            )
        if self.loss is not None:
            raise StepFailed(self.loss, SEE_LOG)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn the library's errors into failures of a step."""
        try:
            yield
        except InvalidFrame as error:
            raise StepFailed(
                f"a frame does not match the protocol ({quoted(str(error))}): {quoted(error.data)}",
                "Is the server bargein, and the same version as this doctor? gateway/PROTOCOL.md "
                "describes every frame.",
            ) from None
        except (ConnectionEnded, OSError):  # ended while it was read, or written
            raise StepFailed(self.loss or "the connection ended", SEE_LOG) from None

    def _no_websocket(self, error: HandshakeFailed, seconds: float) -> StepFailed:
        try:
            page = page_of(error.received, timed_out=error.timed_out, seconds=seconds)
        except StepFailed as failure:
            return failure
        if page.status == 101:
            return StepFailed(f"no WebSocket there: {quoted(str(error))}", OTHER_PROGRAM)
        return StepFailed(f"no WebSocket there, but {page.said}", _advice(page, self._target))


def refusal(error: Error) -> str:
    """An ERROR, in a line."""
    return f"{error.error_code}: {quoted(error.error_detail)}"


def disorder(answer: Answer) -> str | None:
    """What is wrong with the order of an answer's frames; None where nothing is."""
    for due, piece in enumerate(answer.pieces):
        assert isinstance(piece.payload, Response)
        if (seq := piece.payload.text_stream_seq) != due:
            return f"text_stream_seq {seq} came where {due} was due"
    if len(answer.ends) > 1:
        return f"it had {len(answer.ends)} last frames"
    if answer.ends and answer.pieces and answer.pieces[-1].order > answer.ends[0].order:
        return "text came after its last frame"
    return None


def _described(frame: Frame) -> str:
    match frame.payload:
        case InterruptAck(interrupt_request_id=echo):
            named = "no interrupt_request_id" if echo is UNSET else f"{quoted(str(echo))!r}"
            return f"an INTERRUPT_ACK with {named}"
        case Response(request_id=str(request_id)) | Error(request_id=str(request_id)):
            return f"a frame of the request {quoted(request_id)}"
        case _:
            return f"a {frame.msg_type}"


def _advice(page: Page, target: Target) -> str:
    """What to do about an HTTP response that came instead of a WebSocket."""
    match page.status:
        case 404 if b"/metrics" in page.body:
            return (
                "This is the port of bargein's metrics (--ops-port): give that of --port in --url."
            )
        case 404 if not target.is_usual:
            return f"The WebSocket of bargein is at {PATH}: --url {target.usual}"
        case 401 | 407:
            return (
                "A proxy in front requires a login of its own, which the doctor does not support."
            )
        case 403:
            return "The daemon, or a proxy in front, refuses this host name: see --allow-origin."
        case 301 | 302 | 303 | 307 | 308:
            return "The server redirects clients: give the new address as --url (wss:// for https)."
        case 502 | 503 | 504:
            return "A proxy in front does not reach the daemon: is the daemon running?"
        case _:
            return (
                "Another program uses this port, or a proxy in front does not pass WebSockets on "
                "(the headers Upgrade and Connection)."
            )
