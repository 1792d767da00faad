"""What was read from a client, cut behind frames."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from gateway.server.frame_slices import MAX_FRAMES, FrameSlices, HeadSplitter

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def frame(size: int, *, mask: bool = True) -> bytes:
    return Frame(Opcode.BINARY, b"x" * size).serialize(mask=mask)


sizes = st.integers(0, 300) | st.sampled_from([125, 126, 127, 65535, 65536])
frames = st.lists(st.tuples(sizes, st.booleans()))


@given(frames, st.lists(st.integers(1, 5000), min_size=1))
@settings(deadline=None)
def test_slices_end_behind_frames_however_the_bytes_come(
    shapes: list[tuple[int, bool]], reads: list[int]
) -> None:
    sent = [frame(size, mask=mask) for size, mask in shapes]
    ends = {sum(map(len, sent[:number])) for number in range(1, len(sent) + 1)}
    data = b"".join(sent)
    slices = FrameSlices()
    at = turn = 0
    while at < len(data):
        read = data[at : at + reads[turn % len(reads)]]
        turn += 1
        cut = list(slices.cut(read))
        assert b"".join(cut) == read
        for number, piece in enumerate(cut):
            inside = {end - at for end in ends if at < end <= at + len(piece)}
            assert len(inside) <= MAX_FRAMES
            at += len(piece)
            if number < len(cut) - 1:
                assert at in ends
                assert len(inside) == MAX_FRAMES
        assert slices.is_inside == (at not in ends)


def test_a_read_of_tiny_frames_is_many_slices() -> None:
    data = frame(0) * 2000
    assert [len(piece) for piece in FrameSlices().cut(data)] == [6 * MAX_FRAMES] * 250


def test_one_large_frame_is_one_slice() -> None:
    slices = FrameSlices()
    data = frame(1_000_000)
    assert list(slices.cut(data[:16384])) == [data[:16384]]
    assert slices.is_inside
    assert list(slices.cut(data[16384:])) == [data[16384:]]
    assert not slices.is_inside


@pytest.mark.parametrize("behind", [b"", b"\x00", REQUEST, b"\r\n\r\n", b"\r\n"])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_what_follows_a_request_is_split_off(behind: bytes, step: int) -> None:
    splitter = HeadSplitter()
    head = rest = b""
    data = REQUEST + behind
    for start in range(0, len(data), step):
        assert splitter.is_done == (start >= len(REQUEST))
        first, second = splitter.split(data[start : start + step])
        head += first
        rest += second
    assert head == REQUEST
    assert rest == behind
    assert splitter.is_done


def test_without_an_end_everything_belongs_to_the_request() -> None:
    splitter = HeadSplitter()
    for piece in (b"GET / HTTP/1.1\r\n", b"Host: a\r", b"\n", b"\r", b"\r\n", b"\n\r\n"):
        assert splitter.split(piece) == (piece, b"")
