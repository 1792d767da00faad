"""The lines of a streaming response's body, each as soon as it is there.

Stands in for `requests.Response.iter_lines`, which reads 512 bytes at a time (so an answer that is
not chunked arrives in lumps), has no bound on a line, and cuts a CRLF that two reads split.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import gevent
from urllib3.exceptions import DecodeError, HTTPError

from llm.errors import MalformedStreamError
from llm.http.answer import Answer

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""The longest event, and so the longest line: far over any delta, far under what hurts."""

MAX_EVENT_LINES = 1024
"""The most lines of an event: far over a chunk printed with one value a line. requests-sse copies
what an event has so far at each of its lines: 4 MiB of tiny ones would take half a minute."""

_READ_BYTES = 16 * 1024
"""At most so much from one read, after decompression; also bounds what a read may allocate."""

_TURN_BYTES = 16 * 1024
_READ_COST_BYTES = 64
"""After so many bytes, a read counting as some more, other greenlets get their turn: what came in
one go may be hundreds of chunks, and megabytes once it is decompressed. At 250 bytes an event that
is two or three milliseconds of work."""

_MOMENT_SECONDS = 1e-6

_MAX_STRAY_BYTES = 4096
_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data", b"event", b"id", b"retry", b":")
_RETRY = b"retry"
"""When to connect again, which we never do; and requests-sse fails of a time that is too long."""


class BodyEnded(Exception):
    """The body is over.

    Deliberately no `StopIteration` and no `requests` exception: on either one requests-sse would
    sleep and then POST the whole completion again.

    Args:
        cause: the transport's error when the body broke off, None when it ended in order.
    """

    def __init__(self, cause: HTTPError | None) -> None:
        super().__init__(cause)
        self.cause = cause


class Lines:
    """The lines of one body, without their ends.

    Ends are CR, LF or CRLF, and one leading BOM is dropped (WHATWG HTML, "Parsing an event
    stream"). An unfinished last line counts as a line, since some servers leave out the last
    blank one.

    Args:
        answer: its body unread.
        before_read: called before each read, which may wait: what was gathered so far goes out
            now. May block.
        on_bytes: called after each read that gave bytes.
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
        """First lines that belong to no event: where a server puts an error it sends bare."""
        self.ended = False
        """True from the moment the end of the body was seen."""

    def __iter__(self) -> Iterator[bytes]:
        """Give out the lines; never returns.

        Raises:
            BodyEnded: after the last line, or when the transport broke.
            MalformedStreamError: an event of over `MAX_EVENT_BYTES` or `MAX_EVENT_LINES`, or bad
                compression.
        """
        tail = bytearray()  # the begun line: grows in place, so that long lines stay linear
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
                # Not `sleep(0)`, which lets only those run who are ready by now: a whole turn of
                # the loop, in which it also looks what has come for everybody else.
                gevent.sleep(_MOMENT_SECONDS)
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
        """Whatever is there, waiting for at least one byte; empty at the end of the body."""
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
        """Read to the end of the body, which gives the connection back to its pool.

        Reads no more than max_bytes (and what came along with the last of them), and raises nothing
        of what may be wrong with the rest.
        """
        with contextlib.suppress(BodyEnded, MalformedStreamError):
            while max_bytes > 0 and (data := self._read()):
                max_bytes -= len(data)


def _too_long(event_bytes: int) -> MalformedStreamError:
    many = event_bytes <= MAX_EVENT_BYTES
    how = f"{MAX_EVENT_LINES} lines" if many else f"{MAX_EVENT_BYTES >> 20} MiB"
    return MalformedStreamError(f"malformed stream: an event of over {how}")
