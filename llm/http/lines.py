"""The lines of a streaming body, each as soon as it arrives.

Replaces `requests.Response.iter_lines`, which reads 512 bytes at a time (an answer that is not
chunked arrives in lumps), does not bound a line, and breaks a CRLF that is split over two reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import gevent
from urllib3.exceptions import DecodeError, HTTPError

from llm.errors import MalformedStreamError
from llm.http.answer import Answer

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""The longest event, and so the longest line: far above any delta, far below a memory problem."""

MAX_EVENT_LINES = 1024
"""The most lines of an event: far above a chunk that is printed with one value per line. At each
line, requests-sse copies the event so far: 4 MiB of tiny lines would take half a minute."""

_READ_BYTES = 16 * 1024
"""The most that one read returns, after decompression; so it also bounds what a read allocates."""

_TURN_BYTES = 16 * 1024
_READ_COST_BYTES = 64
"""After `_TURN_BYTES`, with `_READ_COST_BYTES` added for each read, other greenlets run. What one
read brings may be hundreds of chunks, and megabytes once decompressed. At 250 bytes an event,
16 KiB are two or three milliseconds of work."""

_SHORTEST_SLEEP_SECONDS = 1e-6

_MAX_STRAY_BYTES = 4096
_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data", b"event", b"id", b"retry", b":")
_RETRY = b"retry"
"""The field for the reconnection time. Dropped: we never reconnect, and requests-sse raises on a
number that is too large."""


class BodyEnded(Exception):
    """The body has ended.

    Deliberately neither `StopIteration` nor a `requests` exception: on either one requests-sse
    would sleep and then POST the whole completion again.

    Args:
        cause: the transport's error where the body broke off; None where it ended in order.
    """

    def __init__(self, cause: HTTPError | None) -> None:
        super().__init__(cause)
        self.cause = cause


class Lines:
    """The lines of one body, without their line ends.

    A line ends with CR, LF or CRLF, and one leading BOM is dropped (WHATWG HTML, "Parsing an event
    stream"). An unfinished last line counts as a line, since some servers omit the last blank one.

    Args:
        answer: the answer, its body unread.
        before_read: called before each read, which may wait: the time to flush what was gathered.
            May block.
        on_bytes: called after each read that returned bytes.
    """

    def __init__(
        self,
        answer: Answer,
        before_read: Callable[[], None],
        on_bytes: Callable[[], None],
    ) -> None:
        self._answer = answer
        self._before_read = before_read
        self._on_bytes = on_bytes
        self.stray = b""
        """The first lines that belong to no event: some servers send an error as bare JSON."""
        self.ended = False
        """True once the end of the body was seen."""

    def __iter__(self) -> Iterator[bytes]:
        """Yield the lines; never returns, always raises.

        Raises:
            BodyEnded: after the last line, or when the transport broke.
            MalformedStreamError: an event exceeds `MAX_EVENT_BYTES` or `MAX_EVENT_LINES`, or the
                compression is corrupt.
        """
        # The unfinished line. Grows in place, so that a long line takes linear time.
        tail = bytearray()
        event_bytes = event_lines = turn_bytes = 0
        skip_lf = False
        first = True
        while True:
            self._before_read()
            data = self._read()
            if not data:
                break
            turn_bytes += len(data) + _READ_COST_BYTES
            if skip_lf and data.startswith(b"\n"):
                data = data[1:]
            skip_lf = data.endswith(b"\r")
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            lines = data.split(b"\n")
            last = lines.pop()
            if lines:
                if tail:
                    lines[0] = bytes(tail + lines[0])
                    tail.clear()
                if first:
                    lines[0] = lines[0].removeprefix(_BOM)
                    first = False
                for line in lines:
                    if not line:
                        event_bytes = event_lines = 0
                    else:
                        event_bytes += len(line)
                        event_lines += 1
                        if event_bytes > MAX_EVENT_BYTES or event_lines > MAX_EVENT_LINES:
                            raise _too_long(event_bytes)
                        if line.startswith(_RETRY):
                            continue
                        if not line.startswith(_FIELDS):
                            self._keep_stray(line)
                    yield line
            if last:
                tail += last
                if event_bytes + len(tail) > MAX_EVENT_BYTES:
                    raise _too_long(event_bytes + len(tail))
            if turn_bytes >= _TURN_BYTES:
                turn_bytes = 0
                # Not `sleep(0)`: that runs only the greenlets that are ready already. This goes
                # once round the loop, which also polls the sockets of all others.
                gevent.sleep(_SHORTEST_SLEEP_SECONDS)
        self.ended = True
        if tail:
            line = bytes(tail)
            if first:
                line = line.removeprefix(_BOM)
            if not line.startswith(_FIELDS):
                self._keep_stray(line)
            if not line.startswith(_RETRY):
                yield line
        yield b""
        raise BodyEnded(None)

    def _keep_stray(self, line: bytes) -> None:
        self.stray = (self.stray + line + b"\n")[:_MAX_STRAY_BYTES]

    def _read(self) -> bytes:
        """Wait for at least one byte; returns what has arrived, empty at the end of the body."""
        try:
            data = self._answer.read1(_READ_BYTES)
        except DecodeError as error:
            raise MalformedStreamError("malformed stream: bad compression") from error
        except HTTPError as error:
            self.ended = True
            raise BodyEnded(error) from error
        if data:
            self._on_bytes()
        return data

    def drain(self, max_bytes: int) -> None:
        """Read to the end of the body, which returns the connection to its pool.

        Stops after the read that reaches `max_bytes`. Errors in the rest of the body are ignored.
        """
        with contextlib.suppress(BodyEnded, MalformedStreamError):
            while max_bytes > 0 and (data := self._read()):
                max_bytes -= len(data)


def _too_long(event_bytes: int) -> MalformedStreamError:
    many = event_bytes <= MAX_EVENT_BYTES
    how = f"{MAX_EVENT_LINES} lines" if many else f"{MAX_EVENT_BYTES >> 20} MiB"
    return MalformedStreamError(f"malformed stream: an event of over {how}")
