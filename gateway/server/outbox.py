"""One connection's outgoing frames: the only place that writes to its socket.

There is one `Outlet` for each request. Two lanes: control (acks, interrupted terminals, errors
about no live request, pongs) goes before all queued data; data keeps its order. A frame that was
begun is always finished, so no kill and no purge can leave half a frame.

Writes never block. Whoever puts a frame while nothing is queued writes it at once; what the
kernel does not take is left to a writer greenlet, which lives only while there is something left
over. Readers wait on their outlet, never inside a write.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import gevent
import gevent.event
import gevent.socket
from msgspec import Struct
from websockets.frames import CloseCode
from websockets.protocol import State
from websockets.server import ServerProtocol

from actors.outlet import Delivered, RequestEnd
from llm.chat.completions import ToolCall
from metrics.instruments import Metrics

MAX_FRAME_CHARS = 16 * 1024
"""Text of one frame, in code points. A begun frame is finished even when its request is
interrupted, so this also bounds what text may still follow."""

MAX_FRAMES_IN_A_WRITE = 16
"""Control frames that go to the kernel together, where some wait: in one call."""

MAX_CONTROL_FRAMES = 256
"""Control frames that may wait: beyond it the client is not read from, since it is the one who
asks for them and does not read the answers."""


@dataclass(frozen=True)
class OutboxSettings:
    """Bounds of one connection.

    Args:
        max_bytes: queued data beyond which its readers wait; 0 is no limit.
        write_timeout: seconds without the kernel taking a byte until the connection is dropped;
            0 is no limit.
    """

    max_bytes: int = 1024 * 1024
    write_timeout: float = 10.0


class FrameEncoder(Protocol):
    """Makes the frames of one answer, in order: each call makes the next one."""

    def encode_text(self, text: str, timestamp_ms: int) -> bytes: ...
    def encode_call(self, call: ToolCall, timestamp_ms: int) -> bytes: ...
    def encode_end(self, end: RequestEnd, timestamp_ms: int) -> bytes: ...


class _Frame(Struct, eq=False):
    payload: bytes
    """JSON of a text frame, or bytes for the wire where `raw`."""
    raw: bool = False
    outlet: Outlet | None = None
    text: str = ""
    """The part of an answer that it carries."""
    call: ToolCall | None = None
    """The function call that it carries."""
    is_terminal: bool = False
    on_written: Callable[[float], None] | None = None


class _PendingWrite(Struct, eq=False):
    """What is being written: one data frame or some control frames, and what is left of it."""

    frames: list[_Frame]
    rest: bytes | memoryview
    begun: bool = False
    """True when the kernel has some of it, so that the rest must follow."""

    @property
    def outlet(self) -> Outlet | None:
        return self.frames[0].outlet


class Outbox:
    """Everything that goes to one client.

    Args:
        sock: the connection, in non-blocking mode (`settimeout(0)`).
        protocol: its WebSocket state; the connection feeds it, and passes what it wants sent to
            `send_wire`.
        settings: its bounds.
        metrics: counts purged frames and slow clients.
        on_dead: called once, with the reason, when nothing can be written any more.
    """

    def __init__(
        self,
        sock: gevent.socket.socket,
        protocol: ServerProtocol,
        settings: OutboxSettings,
        metrics: Metrics,
        on_dead: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._protocol = protocol
        self._settings = settings
        self._metrics = metrics
        self._on_dead = on_dead
        self._control: deque[_Frame] = deque()
        self._data: deque[_Frame] = deque()
        self._data_bytes = 0
        self._pending: _PendingWrite | None = None
        self._writer: gevent.Greenlet[[], None] | None = None
        self._writing = False
        self._closing = False
        self._dead = False
        self._room = gevent.event.Event()
        self._room.set()
        self._control_room = gevent.event.Event()
        self._control_room.set()
        self.accepted_at = time.monotonic()
        """`time.monotonic()` of the last bytes that the kernel took."""

    def outlet(self, encoder: FrameEncoder) -> Outlet:
        """A new outlet, for one request."""
        return Outlet(self, encoder)

    @property
    def waiting_bytes(self) -> int:
        """Everything that waits for the client: data, control, and the rest of what was begun."""
        control = sum(len(frame.payload) for frame in self._control)
        return self._data_bytes + control + (len(self._pending.rest) if self._pending else 0)

    def send_control(
        self, payload: bytes, on_written: Callable[[float], None] | None = None
    ) -> None:
        """Put a text frame ahead of all queued data.

        Args:
            payload: its JSON.
            on_written: called with `time.monotonic()` when the kernel has taken all of it.
        """
        self._put_control(_Frame(payload, on_written=on_written))

    def send_wire(self, writes: list[bytes]) -> None:
        """Put what the protocol wants sent (pongs, a close frame, the end) ahead of all data."""
        for data in writes:
            self._put_control(_Frame(data, raw=True))

    def ping(self) -> None:
        """Ask the client for a sign of life."""
        if not self._closing and not self._dead:
            self._protocol.send_ping(b"")
            self.send_wire(self._protocol.data_to_send())

    def close(self, code: int, reason: str) -> None:
        """Close in order: queued data is dropped, control still goes out, then the close frame."""
        if self._closing or self._dead:
            return
        self._closing = True
        self._drop(lambda frame: frame.outlet is not None)
        if self._pending is None and not self._control:
            self._send_close(code, reason)
        else:
            # Behind what is there, but made only then: frames after a close frame are not allowed.
            self._put_control(_Frame(b"", on_written=lambda _at: self._send_close(code, reason)))

    @property
    def has_room_for_control(self) -> bool:
        """False while the client does not read the answers it asked for."""
        return self._control_room.is_set()

    def wait_for_room_for_control(self) -> None:
        """Block while the client does not read the answers it asked for."""
        self._control_room.wait()

    def die(self, reason: str) -> None:
        """Nothing can be written any more: forget everything, wake everybody, tell once."""
        if self._dead:
            return
        self._dead = True
        self._control.clear()
        self._data.clear()
        self._data_bytes = 0
        self._pending = None
        self._room.set()
        self._control_room.set()
        # Wakes greenlets that wait for the socket; the connection closes it.
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)
        self._on_dead(reason)

    # For outlets.

    def put_data(self, frame: _Frame) -> None:
        if self._closing or self._dead:
            return
        self._data.append(frame)
        self._data_bytes += len(frame.payload)
        if 0 < self._settings.max_bytes < self._data_bytes:
            self._room.clear()
        self._start_writing()

    def purge(self, outlet: Outlet) -> None:
        """Drop what is queued of an outlet, but for a frame that was begun."""
        if self._data and (purged := self._drop(lambda frame: frame.outlet is outlet)):
            self._metrics.frames_purged.inc(purged)

    def begun_frame(self, outlet: Outlet) -> _Frame | None:
        """The frame of this outlet that is half written, if there is one."""
        wire = self._pending
        return wire.frames[0] if wire is not None and wire.outlet is outlet else None

    def wait_for_room(self) -> None:
        self._room.wait()

    @property
    def has_room(self) -> bool:
        return self._room.is_set()

    # The writing itself.

    def _put_control(self, frame: _Frame) -> None:
        if self._dead:
            return
        self._control.append(frame)
        if len(self._control) > MAX_CONTROL_FRAMES:
            self._control_room.clear()
        self._start_writing()

    def _drop(self, belongs: Callable[[_Frame], bool]) -> int:
        kept = [frame for frame in self._data if not belongs(frame)]
        dropped = len(self._data) - len(kept)
        if dropped:
            self._data = deque(kept)
            self._data_bytes = sum(len(frame.payload) for frame in kept)
            self._make_room()
        return dropped

    def _make_room(self) -> None:
        if self._data_bytes <= self._settings.max_bytes // 2:
            self._room.set()

    def _start_writing(self) -> None:
        # What is put while a frame's end is being told is picked up by the loop that tells it.
        if self._writer is not None or self._writing:
            return
        if not self._write():
            self._writer = gevent.spawn(self._write_rest)

    def _write(self) -> bool:
        """Write what the kernel takes now; True when nothing is left."""
        self._writing = True
        try:
            while self._pending is not None or self._control or self._data:
                wire = self._pending or self._take_next()
                if wire is None:
                    continue
                try:
                    sent = self._sock.send(wire.rest)
                except BlockingIOError:
                    if not wire.begun:
                        self._put_back(wire)
                    return False
                except OSError as error:
                    self.die(f"connection lost: {error.strerror or error}")
                    break
                self.accepted_at = time.monotonic()
                wire.begun = True
                if sent < len(wire.rest):
                    wire.rest = memoryview(wire.rest)[sent:]
                else:
                    self._pending = None
                    for frame in wire.frames:
                        self._written(frame)
            return True
        finally:
            self._writing = False

    def _put_back(self, wire: _PendingWrite) -> None:
        # The kernel took nothing of it: others may still go before it, and it can be purged.
        self._pending = None
        if wire.outlet is None:
            self._control.extendleft(reversed(wire.frames))
        else:
            self._data.appendleft(wire.frames[0])
            self._data_bytes += len(wire.frames[0].payload)

    def _take_next(self) -> _PendingWrite | None:
        """Begin what comes next; None where nothing of that is to be written."""
        if self._control:
            self._take_control()
        else:
            frame = self._data.popleft()
            self._data_bytes -= len(frame.payload)
            if not self._room.is_set():
                self._make_room()
            if self._protocol.state is State.OPEN:  # else it is too late for any frame
                self._pending = _PendingWrite([frame], self._text_frame(frame))
        return self._pending

    def _take_control(self) -> None:
        frames: list[_Frame] = []
        parts: list[bytes] = []
        while self._control and len(frames) < MAX_FRAMES_IN_A_WRITE:
            frame = self._control[0]
            is_mark = not frame.payload  # in the queue, or (raw) the end of the stream
            if is_mark and frames:
                break  # what goes before it is written first
            self._control.popleft()
            if frame.raw and is_mark:
                self._shut_write()
            elif is_mark:
                self._written(frame)
            elif frame.raw:
                frames.append(frame)
                parts.append(frame.payload)
            elif self._protocol.state is State.OPEN:
                frames.append(frame)
                parts.append(self._text_frame(frame))
            if is_mark:
                break
        if not self._control_room.is_set() and len(self._control) <= MAX_CONTROL_FRAMES // 2:
            self._control_room.set()
        if frames:
            self._pending = _PendingWrite(frames, b"".join(parts))

    def _text_frame(self, frame: _Frame) -> bytes:
        self._protocol.send_text(frame.payload)
        return b"".join(self._protocol.data_to_send())

    def _written(self, frame: _Frame) -> None:
        if frame.outlet is not None:
            frame.outlet.frame_written(frame)
        if frame.on_written is not None:
            frame.on_written(self.accepted_at)

    def _write_rest(self) -> None:
        """The writer greenlet: ends when nothing is left over."""
        timeout = self._settings.write_timeout or None
        try:
            while not self._write():
                gevent.socket.wait_write(self._sock.fileno(), timeout)
        except TimeoutError:
            self._metrics.slow_clients.inc()
            self.die(f"client too slow: took nothing for {timeout:g} s")
        except OSError as error:  # the socket was closed under us
            self.die(f"connection lost: {error.strerror or error}")
        finally:
            self._writer = None

    def _send_close(self, code: int, reason: str) -> None:
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(CloseCode(code), reason)
            self.send_wire(self._protocol.data_to_send())

    def _shut_write(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.die(f"connection lost: {error.strerror or error}")


class Outlet:
    """One request's way to its client (`actors.outlet.Outlet`).

    Pieces of text that come in one iteration of the event loop become one frame, so that batches
    grow under load and nothing ever waits for more.
    """

    def __init__(self, outbox: Outbox, encoder: FrameEncoder) -> None:
        self._outbox = outbox
        self._encoder = encoder
        self._loop = gevent.get_hub().loop
        self._pieces: list[str] = []
        self._is_flush_due = False
        self._is_discarded = False
        self._is_blocked = False
        """True while a stage waits for the client."""
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []
        """What was handed to the kernel in whole frames."""
        self._is_finishing = self._is_terminal_written = False

    @property
    def delivered(self) -> Delivered:
        """What was handed to the kernel in whole frames."""
        if len(self._texts) > 1:
            self._texts[:] = ["".join(self._texts)]  # asked again, it takes no time
        return Delivered("".join(self._texts), tuple(self._calls))

    @property
    def is_done(self) -> bool:
        """True when the terminal frame was handed to the kernel, or cannot be held back now."""
        begun = self._outbox.begun_frame(self)
        return self._is_terminal_written or (begun is not None and begun.is_terminal)

    def put(self, text: str) -> None:
        """Send a piece of the answer. Blocks the caller while its client is behind."""
        if self._is_discarded:
            return
        self._pieces.append(text)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.run_callback(self._flush)
        if not self._outbox.has_room:
            self._wait()

    def put_call(self, call: ToolCall, on_sent: Callable[[], None]) -> None:
        """Send a function call, behind all text. Blocks the caller while its client is behind.

        Args:
            call: what the client is to call.
            on_sent: called when the kernel has it.
        """
        if self._is_discarded:
            return
        self._flush()
        payload = self._encoder.encode_call(call, time.time_ns() // 1_000_000)
        self._outbox.put_data(
            _Frame(payload, outlet=self, call=call, on_written=lambda _at: on_sent())
        )
        if not self._outbox.has_room:
            self._wait()

    def finish(self, end: RequestEnd, on_sent: Callable[[], None]) -> None:
        """Put the terminal frame, behind all data.

        Args:
            end: how the request ended.
            on_sent: called when the kernel has the frame; never once the outlet was discarded.
        """
        if not self._is_discarded:
            self._is_finishing = True
            self._flush()
            payload = self._encoder.encode_end(end, time.time_ns() // 1_000_000)
            self._outbox.put_data(
                _Frame(payload, outlet=self, is_terminal=True, on_written=lambda _at: on_sent())
            )

    def discard(self) -> bool:
        """From here on nothing is written, and what was queued is dropped.

        Only a frame that was begun is finished; it counts as delivered already.

        Returns:
            False, and nothing is done, when the terminal frame cannot be held back any more.
        """
        if self.is_done:
            return False
        self._is_discarded = True
        self._pieces.clear()
        self._outbox.purge(self)
        begun = self._outbox.begun_frame(self)
        if begun is not None:
            self._count(begun)
            begun.text, begun.call = "", None
            if begun.on_written is not None:
                on_written, begun.on_written = begun.on_written, None
                on_written(time.monotonic())
        return True

    def progress_at(self) -> float:
        """`time.monotonic()` of the client's last progress while all waits for it, else 0."""
        return self._outbox.accepted_at if self._is_blocked or self._is_finishing else 0.0

    def frame_written(self, frame: _Frame) -> None:
        """A frame of ours was handed to the kernel."""
        self._count(frame)
        if frame.is_terminal:
            self._is_terminal_written = True

    def _count(self, frame: _Frame) -> None:
        if frame.text:
            self._texts.append(frame.text)
        if frame.call is not None:
            self._calls.append(frame.call)

    def _wait(self) -> None:
        self._is_blocked = True
        try:
            self._outbox.wait_for_room()
        finally:
            self._is_blocked = False

    def _flush(self) -> None:
        self._is_flush_due = False
        if not self._pieces:
            return
        text = "".join(self._pieces)
        self._pieces.clear()
        now_ms = time.time_ns() // 1_000_000
        for start in range(0, len(text), MAX_FRAME_CHARS):
            piece = text[start : start + MAX_FRAME_CHARS]
            payload = self._encoder.encode_text(piece, now_ms)
            self._outbox.put_data(_Frame(payload, outlet=self, text=piece))
