"""Cuts what was read from a client into slices, so that a flood of tiny frames stops nobody.

One read of 16 KiB can hold 2,700 frames. To decode them takes 50 ms, and the protocol layer decodes
all that it is given in one go. So it is given a few frames at a time, with a poll in between.
Pure: no I/O, no clock. Source: RFC 6455, section 5.2.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_FRAMES = 8
"""How many frames a slice has at most. To handle one takes up to 0.1 ms."""

_HEAD_END = b"\r\n\r\n"


class HeadSplitter:
    """Finds the end of the HTTP request that a connection begins with.

    What follows it must not reach the protocol before the request is answered: a ping would be
    answered before the handshake, and a second request would be taken for frames.
    """

    def __init__(self) -> None:
        self._tail = b""
        self.is_done = False
        """Whether the request has ended."""

    def split(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what belongs to the request, and what follows it."""
        if self.is_done:
            return b"", data
        start = len(self._tail)
        found = (self._tail + data).find(_HEAD_END)
        if found < 0:
            self._tail = (self._tail + data)[-len(_HEAD_END) + 1 :]
            return data, b""
        self.is_done = True
        end = found + len(_HEAD_END) - start
        return data[:end], data[end:]


class FrameSlices:
    """Cuts the bytes of a WebSocket behind frames. It follows their lengths and decodes nothing."""

    def __init__(self) -> None:
        self._header = bytearray()
        """The part of a header that has come."""
        self._left = 0
        """How many bytes of the payload are still to come."""

    @property
    def is_inside(self) -> bool:
        """Whether the last byte was inside a frame."""
        return bool(self._header or self._left)

    def cut(self, data: bytes) -> Iterator[bytes]:
        """Yield the data in slices of at most `MAX_FRAMES` ends of frames."""
        start = position = frames = 0
        while position < len(data):
            if self._left:
                taken = min(self._left, len(data) - position)
                self._left -= taken
            else:
                taken = self._take_header(data, position)
            position += taken
            if not self.is_inside:
                frames += 1
                if frames == MAX_FRAMES:
                    yield data[start:position]
                    start, frames = position, 0
        if start < len(data):
            yield data[start:]

    def _take_header(self, data: bytes, position: int) -> int:
        """Take a header, or the part of it that is there; returns how many bytes were taken."""
        header = self._header
        taken = 0
        while (missing := _header_bytes(header) - len(header)) and position + taken < len(data):
            header += data[position + taken : position + taken + missing]
            taken += missing
        if not missing:
            self._left = _payload_bytes(header)
            header.clear()
        return min(taken, len(data) - position)


def _header_bytes(header: bytearray) -> int:
    """The length of a header with its mask; 2 where too little of it is there to know."""
    if len(header) < 2:
        return 2
    length_bytes = {126: 2, 127: 8}.get(header[1] & 0x7F, 0)
    mask_bytes = 4 if header[1] & 0x80 else 0
    return 2 + length_bytes + mask_bytes


def _payload_bytes(header: bytearray) -> int:
    short = header[1] & 0x7F
    if short < 126:
        return short
    return int.from_bytes(header[2:4] if short == 126 else header[2:10], "big")
