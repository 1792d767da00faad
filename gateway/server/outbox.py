"""The outgoing frames of one connection. No other module writes to its socket.

Each request has one `Outlet`. There are two queues. Control frames (acks, terminal frames of
interrupted requests, errors that end no live request, pongs) are sent before all queued data. Data
frames keep their order. A frame of which the kernel has a part is always completed, so neither a
kill nor a purge can leave half a frame.

Writes never block. A frame that is put while nothing is queued is written at once. If the kernel
does not take all of it, a writer greenlet sends the rest, and ends when nothing is left. Readers of
providers wait on their outlet, never inside a write.
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

from actors.loop.lanes import lanes
from actors.outlet import Delivered, RequestEnd
from llm.chat.completions import ToolCall
from metrics.instruments import Metrics

MAX_FRAME_CHARS = 16 * 1024
"""The most text of one frame, in code points. A frame that was begun is completed even if its
request is interrupted, so this also bounds the text that may follow an interrupt."""

MAX_FRAMES_IN_A_WRITE = 16
"""How many queued control frames are written with one system call."""

MAX_CONTROL_FRAMES = 256
"""How many control frames may be queued. Beyond this, the client is not read: it asks for answers
and does not read them."""


@dataclass(frozen=True)
class OutboxSettings:
    """Bounds of one outbox.

    Args:
        max_bytes: how many bytes of data may be queued before outlets block; 0: no limit.
        write_timeout: drop the connection when the kernel takes no byte for this many seconds; 0:
            never.
    """

    max_bytes: int = 1024 * 1024
    write_timeout: float = 10.0


class FrameEncoder(Protocol):
    """Makes the frames of one answer, in order: each call makes the next frame."""

    def encode_text(self, text: str, timestamp_ms: int) -> bytes: ...
    def encode_call(self, call: ToolCall, timestamp_ms: int) -> bytes: ...
    def encode_end(self, end: RequestEnd, timestamp_ms: int) -> bytes: ...


class _Frame(Struct, eq=False):
    payload: bytes
    """The JSON of a text frame; if `is_raw`, bytes for the socket."""
    is_raw: bool = False
    outlet: Outlet | None = None
    text: str = ""
    """The part of the answer in this frame."""
    call: ToolCall | None = None
    """The function call in this frame."""
    is_terminal: bool = False
    on_written: Callable[[float], None] | None = None


class _PendingWrite(Struct, eq=False):
    """The write in progress: one data frame, or some control frames, and the bytes left to send."""

    frames: list[_Frame]
    rest: bytes | memoryview
    is_begun: bool = False
    """True when the kernel has a part of it, so that the rest must follow."""

    @property
    def outlet(self) -> Outlet | None:
        return self.frames[0].outlet


class Outbox:
    """Everything that goes to one client.

    Args:
        sock: the socket, in non-blocking mode (`settimeout(0)`).
        protocol: the WebSocket state of the connection. The connection feeds it with received data,
            and passes its output to `send_wire`.
        settings: the bounds.
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
        self._is_writing = False
        self._is_closing = False
        self._is_dead = False
        self._room = gevent.event.Event()
        self._room.set()
        self._control_room = gevent.event.Event()
        self._control_room.set()
        self.accepted_at = time.monotonic()
        """`time.monotonic()` when the kernel last took bytes."""

    def outlet(self, encoder: FrameEncoder) -> Outlet:
        """Make the outlet of a request."""
        return Outlet(self, encoder)

    @property
    def waiting_bytes(self) -> int:
        """How many bytes wait to be sent: data, control, and the rest of the write in progress."""
        control = sum(len(frame.payload) for frame in self._control)
        return self._data_bytes + control + (len(self._pending.rest) if self._pending else 0)

    def send_control(
        self, payload: bytes, on_written: Callable[[float], None] | None = None
    ) -> None:
        """Put a text frame ahead of all queued data.

        Args:
            payload: the JSON of the frame.
            on_written: called with `time.monotonic()` once the kernel has the whole frame.
        """
        self._put_control(_Frame(payload, on_written=on_written))

    def send_wire(self, writes: list[bytes]) -> None:
        """Put the protocol's output (pongs, a close frame, the end) ahead of all queued data."""
        for data in writes:
            self._put_control(_Frame(data, is_raw=True))

    def ping(self) -> None:
        """Send a WebSocket ping."""
        if not self._is_closing and not self._is_dead:
            self._protocol.send_ping(b"")
            self.send_wire(self._protocol.data_to_send())

    def close(self, code: int, reason: str) -> None:
        """Drop queued data, send queued control frames, then a close frame."""
        if self._is_closing or self._is_dead:
            return
        self._is_closing = True
        self._drop(lambda frame: frame.outlet is not None)
        if self._pending is None and not self._control:
            self._send_close(code, reason)
        else:
            # A mark in the queue: the close frame is made when everything before it is written,
            # since the protocol allows no frame after it is made.
            self._put_control(_Frame(b"", on_written=lambda _at: self._send_close(code, reason)))

    @property
    def has_room_for_control(self) -> bool:
        """False while the client does not read the answers it asked for."""
        return self._control_room.is_set()

    def wait_for_room_for_control(self) -> None:
        """Block while the client does not read the answers it asked for."""
        self._control_room.wait()

    def die(self, reason: str) -> None:
        """Drop everything, wake all waiting greenlets, and call `on_dead`. Has an effect once."""
        if self._is_dead:
            return
        self._is_dead = True
        self._control.clear()
        self._data.clear()
        self._data_bytes = 0
        self._pending = None
        self._room.set()
        self._control_room.set()
        # Wakes greenlets that wait for the socket; the connection closes it.
        with contextlib.suppress(OSError):  # the peer has closed it already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._on_dead(reason)

    # For outlets.

    def put_data(self, frame: _Frame) -> None:
        if self._is_closing or self._is_dead:
            return
        self._data.append(frame)
        self._data_bytes += len(frame.payload)
        if 0 < self._settings.max_bytes < self._data_bytes:
            self._room.clear()
        self._start_writing()

    def purge(self, outlet: Outlet) -> None:
        """Drop the queued frames of an outlet. A frame that was begun is not queued, and stays."""
        if self._data and (purged := self._drop(lambda frame: frame.outlet is outlet)):
            self._metrics.frames_purged.inc(purged)

    def begun_frame(self, outlet: Outlet) -> _Frame | None:
        """The partly written frame of this outlet; None if there is none."""
        write = self._pending
        return write.frames[0] if write is not None and write.outlet is outlet else None

    def wait_for_room(self) -> None:
        self._room.wait()

    @property
    def has_room(self) -> bool:
        return self._room.is_set()

    # Writing.

    def _put_control(self, frame: _Frame) -> None:
        if self._is_dead:
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
        # While `_write` runs, its own loop picks up what its callbacks put.
        if self._writer is not None or self._is_writing:
            return
        if not self._write():
            self._writer = gevent.spawn(self._write_rest)

    def _write(self) -> bool:
        """Write as much as the kernel takes now. Returns True if nothing is left."""
        self._is_writing = True
        try:
            while self._pending is not None or self._control or self._data:
                write = self._pending or self._take_next()
                if write is None:
                    continue
                try:
                    sent = self._sock.send(write.rest)
                except BlockingIOError:
                    if not write.is_begun:
                        self._put_back(write)
                    return False
                except OSError as error:
                    self.die(f"connection lost: {error.strerror or error}")
                    break
                self.accepted_at = time.monotonic()
                write.is_begun = True
                if sent < len(write.rest):
                    write.rest = memoryview(write.rest)[sent:]
                else:
                    self._pending = None
                    for frame in write.frames:
                        self._written(frame)
            return True
        finally:
            self._is_writing = False

    def _put_back(self, write: _PendingWrite) -> None:
        # The kernel took none of it: control may still go before it, and it may still be purged.
        self._pending = None
        if write.outlet is None:
            self._control.extendleft(reversed(write.frames))
        else:
            self._data.appendleft(write.frames[0])
            self._data_bytes += len(write.frames[0].payload)

    def _take_next(self) -> _PendingWrite | None:
        """Begin the next write. Returns None if what came next needs no write."""
        if self._control:
            self._take_control()
        else:
            frame = self._data.popleft()
            self._data_bytes -= len(frame.payload)
            if not self._room.is_set():
                self._make_room()
            if self._protocol.state is State.OPEN:  # after a close frame, no frame may follow
                self._pending = _PendingWrite([frame], self._text_frame(frame))
        return self._pending

    def _take_control(self) -> None:
        frames: list[_Frame] = []
        parts: list[bytes] = []
        while self._control and len(frames) < MAX_FRAMES_IN_A_WRITE:
            frame = self._control[0]
            is_mark = not frame.payload  # `close()`, or, if raw, the end of the stream
            if is_mark and frames:
                break  # the frames before the mark are written first
            self._control.popleft()
            if frame.is_raw and is_mark:
                self._shut_write()
            elif is_mark:
                self._written(frame)
            elif frame.is_raw:
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
        """The writer greenlet: runs until nothing is left to write."""
        limit = lanes().limit(self._settings.write_timeout, self._too_slow)
        limit.start()
        try:
            while not self._write():
                limit.since = time.monotonic()
                gevent.socket.wait_write(self._sock.fileno())
        except OSError as error:  # the connection has closed the socket
            self.die(f"connection lost: {error.strerror or error}")
        finally:
            limit.stop()
            self._writer = None

    def _too_slow(self) -> None:
        self._metrics.slow_clients.inc()
        self.die(f"client too slow: took nothing for {self._settings.write_timeout:g} s")

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
    """The outlet of one request (`actors.outlet.Outlet`).

    All text that arrives in one iteration of the event loop becomes one frame. So frames grow under
    load, and text is never delayed to wait for more.
    """

    def __init__(self, outbox: Outbox, encoder: FrameEncoder) -> None:
        self._outbox = outbox
        self._encoder = encoder
        self._loop = gevent.get_hub().loop
        self._pieces: list[str] = []
        self._is_flush_due = False
        self._is_discarded = False
        self._is_blocked = False
        """True while a stage waits for room in the outbox."""
        self._texts: list[str] = []
        """The texts of frames that were handed to the kernel completely."""
        self._calls: list[ToolCall] = []
        """The function calls of such frames."""
        self._is_finishing = self._is_terminal_written = False

    @property
    def delivered(self) -> Delivered:
        """What was handed to the kernel in whole frames."""
        if len(self._texts) > 1:
            self._texts[:] = ["".join(self._texts)]  # asked again, it takes no time
        return Delivered("".join(self._texts), tuple(self._calls))

    @property
    def is_done(self) -> bool:
        """True once the kernel has the terminal frame, or a part of it."""
        begun = self._outbox.begun_frame(self)
        return self._is_terminal_written or (begun is not None and begun.is_terminal)

    def put(self, text: str) -> None:
        """Send a piece of text. Blocks the caller while the client is behind."""
        if self._is_discarded:
            return
        self._pieces.append(text)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.run_callback(self._flush)
        if not self._outbox.has_room:
            self._wait()

    def put_call(self, call: ToolCall, on_sent: Callable[[], None]) -> None:
        """Send a function call, after all text. Blocks the caller while the client is behind.

        Args:
            call: the function call.
            on_sent: called once the kernel has the whole frame.
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
        """Send the terminal frame, after all data.

        Args:
            end: how the request ended.
            on_sent: called once the kernel has the whole frame; never after `discard()`.
        """
        if not self._is_discarded:
            self._is_finishing = True
            self._flush()
            payload = self._encoder.encode_end(end, time.time_ns() // 1_000_000)
            self._outbox.put_data(
                _Frame(payload, outlet=self, is_terminal=True, on_written=lambda _at: on_sent())
            )

    def discard(self) -> bool:
        """Drop what is queued, and send nothing more.

        A frame of which the kernel has a part is still completed, and counts as delivered at once.

        Returns:
            False if `is_done`; then nothing has changed.
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
        """`time.monotonic()` when the client last took data, while the outlet waits for it; else
        0."""
        return self._outbox.accepted_at if self._is_blocked or self._is_finishing else 0.0

    def frame_written(self, frame: _Frame) -> None:
        """The kernel has a whole frame of this outlet."""
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
