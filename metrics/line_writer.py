"""Writes lines to a file descriptor on a thread of its own, so that the caller never blocks.

Whoever reads the log may stop reading: a paused terminal, a stuck log driver, a full disk. A write
then blocks or fails, and on the event loop's thread it would stop the whole daemon. The descriptor
was inherited, so it cannot be made non-blocking: that would change it for all processes that share
it. So a native thread writes, behind a bounded buffer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from gevent import monkey

MAX_BYTES = 1024 * 1024
"""How much may wait to be written: some 5,000 lines. Enough for a reader that pauses for seconds
under load, and too little to matter to the memory."""

_BATCH_BYTES = 64 * 1024
"""How much one write takes: as much as a pipe holds."""

_POLL_SECONDS = 0.002

# gevent's versions of these switch to other greenlets, and its threads are greenlets.
_start_thread: Any = monkey.get_original("_thread", "start_new_thread")
_make_lock: Any = monkey.get_original("_thread", "allocate_lock")
_select: Any = monkey.get_original("select", "select")
_sleep: Any = monkey.get_original("time", "sleep")


class _Line(NamedTuple):
    """A line with its end. If it is a note, `lost` is how many lost lines it tells of; else 0."""

    data: bytes
    lost: int


class LineWriter:
    """Writes lines in order. No method blocks, but for `wait_written`.

    When the buffer is full, new lines are lost until half of it has been written. A line that
    cannot be written (closed pipe, full disk) is lost as well. Where lines are missing stands a
    note that tells how many; it is written as soon as anything can be written again.

    Args:
        fileno: the file descriptor. It is not closed.
        note: makes the note, with its line end, from the number of lost lines; None: no notes. It
            may be called in the writing thread.
        max_bytes: how much may wait to be written.
    """

    def __init__(
        self, fileno: int, note: Callable[[int], str] | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        self.lost = 0
        """How many lines were lost since the start."""
        self._fileno = fileno
        self._note = note
        self._max_bytes = max_bytes
        self._lock = _make_lock()  # never held while writing
        self._wake = _make_lock()  # locked while the thread has nothing to do
        self._wake.acquire()
        self._is_started = False
        self._lines: deque[_Line] = deque()
        self._bytes = 0
        """The size of all lines that are not written yet, with those that are being written."""
        self._is_full = self._has_failed = self._is_mid_line = False
        self._unnoted = 0
        """How many of the lost lines no note tells of yet."""

    def write(self, text: str) -> None:
        """Queue one line, with its line end."""
        data = text.encode(errors="backslashreplace")
        with self._lock:
            if self._is_full or self._bytes + len(data) > self._max_bytes:
                # (One line may be too long for an empty buffer.)
                self._is_full = self._bytes > self._max_bytes // 2
                self._lose(_Line(data, 0))
                return
            self._queue_note()
            self._queue(_Line(data, 0))
            with contextlib.suppress(RuntimeError):  # no more threads; the next line tries again
                if not self._is_started:
                    _start_thread(self._run, ())
                    self._is_started = True
        with contextlib.suppress(RuntimeError):  # it has been woken already
            self._wake.release()

    def flush(self) -> None:
        """Does nothing: each line is written as soon as possible."""

    def wait_written(self, seconds: float) -> bool:
        """Wait until every line is written or lost, at most this long. Blocks the whole process.

        Returns:
            Whether nothing is left to write.
        """
        until = time.monotonic() + seconds
        while self._bytes and time.monotonic() < until:
            _sleep(_POLL_SECONDS)
        return not self._bytes

    # With the lock held.

    def _queue(self, line: _Line) -> None:
        self._lines.append(line)
        self._bytes += len(line.data)

    def _queue_note(self) -> None:
        if self._unnoted and self._note is not None:
            lost, self._unnoted = self._unnoted, 0
            self._queue(_Line(self._note(lost).encode(errors="backslashreplace"), lost))

    def _lose(self, line: _Line) -> None:
        if not line.lost:
            self.lost += 1
        self._unnoted += line.lost or 1

    # In the writing thread.

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            while batch := self._next_batch():
                data = b"".join(line.data for line in batch)
                self._count(batch, self._write(data))

    def _next_batch(self) -> list[_Line]:
        batch: list[_Line] = []
        size = 0
        with self._lock:
            # After a failure, the next line is the next attempt: a note would be tried for ever.
            if not self._lines and not self._has_failed:
                self._queue_note()
            while self._lines and (not batch or size + len(self._lines[0].data) <= _BATCH_BYTES):
                batch.append(self._lines.popleft())
                size += len(batch[-1].data)
        return batch

    def _write(self, data: bytes) -> int:
        """Write it; return how many of its bytes were written before it failed, if it did."""
        left = memoryview(b"\n" + data if self._is_mid_line else data)
        while left:
            try:
                left = left[os.write(self._fileno, left) :]
            except BlockingIOError:  # another process that shares the descriptor made it so
                _select([], [self._fileno], [], 1.0)
            except OSError:
                break
        return max(0, len(data) - len(left))

    def _count(self, batch: list[_Line], written: int) -> None:
        with self._lock:
            size = sum(len(line.data) for line in batch)
            self._has_failed = written < size
            if written:
                self._is_mid_line = False
            for line in batch:
                if 0 < written < len(line.data):
                    self._is_mid_line = True
                if written < len(line.data):
                    self._lose(line)
                written = max(0, written - len(line.data))
            self._bytes -= size
            if self._bytes <= self._max_bytes // 2:
                self._is_full = False
