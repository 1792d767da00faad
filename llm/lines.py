"""The lines of a streaming response's body, each as soon as it is there.

Stands in for `requests.Response.iter_lines`, which reads 512 bytes at a time (so an answer that is
not chunked arrives in lumps), has no bound on a line, and cuts a CRLF that two reads split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gevent
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import DecodeError, HTTPError

from llm.errors import MalformedStreamError

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""The longest event, and so the longest line: far over any delta, far under what hurts."""

_READ_BYTES = 16 * 1024
"""At most so much from one read, after decompression; also bounds what a read may allocate."""

_TURN_BYTES = 8 * 1024
"""After so many bytes other greenlets get their turn: a socket that always has data never yields
by itself. At 250 bytes an event that is about a millisecond of work."""

_MAX_STRAY_BYTES = 4096
_BOM = b"\xef\xbb\xbf"
_FIELDS = (b"data", b"event", b"id", b"retry", b":")


class BodyEnded(Exception):  # noqa: N818 - an end is no error in itself
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
        raw: the response, its body unread.
        before_read: called before each read, which may wait: what was gathered so far goes out
            now. May block.
        on_bytes: called after each read that gave bytes.
    """

    def __init__(
        self,
        raw: BaseHTTPResponse,
        before_read: Callable[[], None],
        on_bytes: Callable[[], None],
    ) -> None:
        self._raw = raw
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
            MalformedStreamError: an event of over `MAX_EVENT_BYTES`, or bad compression.
        """
        for line in self._split():
            if line and not line.startswith(_FIELDS):
                self.stray = (self.stray + line + b"\n")[:_MAX_STRAY_BYTES]
            yield line

    def _split(self) -> Iterator[bytes]:
        tail: list[bytes] = []  # the begun line in pieces: joined once, so long lines stay linear
        event_bytes = turn_bytes = 0
        skip_lf = False
        first = True
        while True:
            self._before_read()
            data = self._read()
            if not data:
                break
            turn_bytes += len(data)
            if skip_lf and data.startswith(b"\n"):
                data = data[1:]
            skip_lf = data.endswith(b"\r")
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            lines = data.split(b"\n")
            if len(lines) == 1:
                tail.append(data)
                event_bytes += len(data)
            else:
                if tail:
                    tail.append(lines[0])
                    lines[0] = b"".join(tail)
                    tail = []
                last = lines.pop()
                if last:
                    tail.append(last)
                if first:
                    lines[0] = lines[0].removeprefix(_BOM)
                    first = False
                for line in lines:
                    if line:
                        event_bytes += len(line)
                        self._check(event_bytes)
                    else:
                        event_bytes = 0
                    yield line
                event_bytes += len(last)
            self._check(event_bytes)
            if turn_bytes >= _TURN_BYTES:
                turn_bytes = 0
                gevent.sleep(0)
        self.ended = True
        if tail:
            line = b"".join(tail)
            yield line.removeprefix(_BOM) if first else line
        yield b""
        raise BodyEnded(None)

    def _check(self, event_bytes: int) -> None:
        if event_bytes > MAX_EVENT_BYTES:
            raise MalformedStreamError(
                f"malformed stream: an event of over {MAX_EVENT_BYTES >> 20} MiB"
            )

    def _read(self) -> bytes:
        """Whatever is there, waiting for at least one byte; empty at the end of the body."""
        try:
            data = self._raw.read1(_READ_BYTES)
        except DecodeError as error:
            raise MalformedStreamError("malformed stream: bad compression") from error
        except HTTPError as error:
            self.ended = True
            raise BodyEnded(error) from error
        if data:
            self._on_bytes()
        return data

    def drain(self, max_bytes: int) -> bool:
        """Read to the end of the body, which gives the connection back to its pool.

        Returns:
            True when the end came within max_bytes.
        """
        while max_bytes > 0:
            try:
                data = self._read()
            except (BodyEnded, MalformedStreamError):
                return False
            if not data:
                return True
            max_bytes -= len(data)
        return False

    def close(self) -> None:
        """Close the connection, unless the body was read to its end and it went to the pool."""
        self._raw.close()
