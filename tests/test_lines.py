"""Lines of an event stream, wherever the network cuts it.

The rules are those of WHATWG HTML, §9.2.6 "Interpreting an event stream".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import gevent
import pytest
import requests
from requests_sse import EventSource
from urllib3.exceptions import DecodeError, ProtocolError

from llm.errors import MalformedStreamError
from llm.http.answer import Answer
from llm.http.lines import MAX_EVENT_BYTES, MAX_EVENT_LINES, BodyEnded, Lines

BOM = b"\xef\xbb\xbf"


class FakeAnswer:
    """The body of a response, as the pieces that single reads return."""

    def __init__(self, pieces: Iterable[bytes], end: Exception | None = None) -> None:
        self._pieces = iter(pieces)
        self._end = end
        self._rest = b""
        self.reads = 0

    def read1(self, most_bytes: int) -> bytes:
        self.reads += 1
        data = self._rest or next(self._pieces, b"")
        if not data and self._end:
            raise self._end
        self._rest = data[most_bytes:]
        return data[:most_bytes]


def lines_of(
    answer: FakeAnswer,
    before_read: Callable[[], None] = lambda: None,
    on_bytes: Callable[[], None] = lambda: None,
) -> Lines:
    return Lines(cast(Answer, answer), before_read, on_bytes)


def read_all(pieces: Iterable[bytes]) -> list[bytes]:
    """All lines up to the orderly end of the body."""
    read: list[bytes] = []
    with pytest.raises(BodyEnded) as ended:
        for line in lines_of(FakeAnswer(pieces)):
            read.append(line)
    assert ended.value.cause is None
    return read


def events_of(pieces: Iterable[bytes]) -> list[str | None]:
    """The data of all events, as requests-sse makes them of our lines."""
    response = requests.Response()
    response.status_code = 200
    response.headers["Content-Type"] = "text/event-stream"
    response.url = "http://provider.test/"
    response.raw = FakeAnswer([])
    lines = lines_of(FakeAnswer(pieces))
    response.iter_lines = lambda *_, **__: iter(lines)  # type: ignore[method-assign]

    class Session:
        def request(self, **_: object) -> requests.Response:
            return response

    session: Any = Session()
    source = EventSource(response.url, session=session)
    source.connect()
    read = []
    with pytest.raises(BodyEnded):
        for event in source:
            read.append(event.data)
    return read


def cuts(wire: bytes) -> Iterator[list[bytes]]:
    """Whole, in two pieces at each position, and byte by byte."""
    yield [wire]
    for position in range(1, len(wire)):
        yield [wire[:position], wire[position:]]
    yield [wire[position : position + 1] for position in range(len(wire))]


# Lines and events of a wire ---------------------------------------------------------------------

WIRES = [
    pytest.param(b"data: a\n\ndata: b\n\n", ["a", "b"], id="lf"),
    pytest.param(b"data: a\r\rdata: b\r\r", ["a", "b"], id="cr"),
    pytest.param(b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"], id="crlf"),
    pytest.param(b"data: a\r\n\ndata: b\n\r\ndata: c\r\n\r", ["a", "b", "c"], id="mixed-ends"),
    pytest.param(b"data: a\r\ndata: b\rdata: c\n\r", ["a\nb\nc"], id="mixed-in-one-event"),
    pytest.param(b"\n\r\n\r\r\n\n\ndata: a\n\n\n\n", ["a"], id="blank-lines"),
    pytest.param(BOM + b"data: a\n\ndata: b\n\n", ["a", "b"], id="bom"),
    pytest.param(BOM + b"\r\ndata: a\r\n\r\n", ["a"], id="bom-and-blank-line"),
    pytest.param(BOM + BOM + b"data: a\n\ndata: b\n\n", ["b"], id="only-one-bom-is-dropped"),
    pytest.param(b"data: a\n\n" + BOM + b"data: b\n\n", ["a"], id="a-bom-elsewhere-is-text"),
    pytest.param(b": hi\n\n:\ndata: a\n: b\n\n", ["a"], id="comments"),
    pytest.param(b"data:a\n\ndata:{}\n\n", ["a", "{}"], id="no-space"),
    pytest.param(b"data: a\ndata: b\ndata:c\n\n", ["a\nb\nc"], id="multi-line"),
    pytest.param(b"data\ndata: a\n\n", ["\na"], id="field-without-colon"),
    pytest.param(b"event: x\nid: 7\nretry: 1\ndata: a: b\nfoo: c\n\n", ["a: b"], id="fields"),
    pytest.param("data: é€😀\n\ndata: 你好\r\n\r\n".encode(), ["é€😀", "你好"], id="utf-8"),
    pytest.param(
        "data: a\u2028b\x85c\x0bd\x0c\n\n".encode(), ["a\u2028b\x85c\x0bd\x0c"], id="only-cr-lf"
    ),
    pytest.param(b"data: a\n\ndata: b\n", ["a", "b"], id="no-blank-line-at-the-end"),
    pytest.param(b"data: a\n\ndata: b", ["a", "b"], id="no-line-end-at-the-end"),
    pytest.param(b"data: a\r\n\r\ndata: b\r", ["a", "b"], id="cr-at-the-end"),
    pytest.param(BOM + b"data: a", ["a"], id="nothing-but-a-begun-line"),
    pytest.param(BOM, [], id="nothing-but-a-bom"),
    pytest.param(b"\r\n", [], id="nothing-but-a-line-end"),
]


@pytest.mark.parametrize(("wire", "events"), WIRES)
def test_the_lines_are_the_same_wherever_the_network_cuts(wire: bytes, events: list[str]) -> None:
    body = wire.removeprefix(BOM)
    *lines, rest = re.split(b"\r\n|\r|\n", body)
    lines = [line for line in lines if not line.startswith(b"retry")]
    expected = [*lines, rest, b""] if rest else [*lines, b""]
    if wire == BOM:
        expected = [b"", b""]  # a begun line, empty without its BOM
    for pieces in cuts(wire):
        assert read_all(pieces) == expected, pieces


@pytest.mark.parametrize(("wire", "events"), WIRES)
def test_the_events_are_those_of_the_standard_wherever_the_network_cuts(
    wire: bytes, events: list[str]
) -> None:
    for pieces in cuts(wire):
        assert events_of(pieces) == events, pieces


def test_a_body_without_a_byte_has_no_event() -> None:
    assert events_of([]) == []


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_a_line_is_given_out_before_the_next_read(end: bytes) -> None:
    raw = FakeAnswer([b"data: a" + end + end, b"never needed"])
    lines = iter(lines_of(raw))
    assert [next(lines), next(lines)] == [b"data: a", b""]
    assert raw.reads == 1


def test_what_was_gathered_goes_out_before_each_read_that_may_wait() -> None:
    log: list[object] = []
    pieces = [b"a\nb\n", b"c\n"]
    lines = lines_of(
        FakeAnswer(pieces), lambda: log.append("before read"), lambda: log.append("bytes")
    )
    with pytest.raises(BodyEnded):
        for line in lines:
            log.append(line)
    first = ["before read", "bytes", b"a", b"b"]
    assert log == [*first, "before read", "bytes", b"c", "before read", b""]


# Bounds -----------------------------------------------------------------------------------------


def endless(piece: bytes) -> Iterator[bytes]:
    while True:
        yield piece


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param(b"a" * 16384, id="one line"),
        pytest.param(b"data: " + b"a" * 8000 + b"\n", id="many lines"),
        pytest.param(b"data: " + b"a" * 8000 + b"\r\n", id="many lines, CRLF"),
        pytest.param(b": " + b"a" * 8000 + b"\n", id="comments"),
    ],
)
def test_an_endless_event_is_an_error_at_its_bound(piece: bytes) -> None:
    read = 0

    def pieces() -> Iterator[bytes]:
        nonlocal read
        for one in endless(piece):
            read += len(one)
            yield one

    with pytest.raises(MalformedStreamError, match="an event of over 4 MiB"):
        for _ in lines_of(FakeAnswer(pieces())):
            pass
    assert MAX_EVENT_BYTES * 0.99 < read < MAX_EVENT_BYTES + 2 * 16384


def test_an_endless_event_of_tiny_lines_is_an_error_long_before_it_is_slow() -> None:
    given = 0
    with pytest.raises(MalformedStreamError, match=f"an event of over {MAX_EVENT_LINES} lines"):
        for _ in lines_of(FakeAnswer(endless(b"data:a\n"))):
            given += 1
    assert given == MAX_EVENT_LINES


@pytest.mark.parametrize("piece_bytes", [16384, 1000])
def test_an_event_just_within_the_bound_passes(piece_bytes: int) -> None:
    line = b"a" * MAX_EVENT_BYTES
    wire = line + b"\n\n" + line + b"\n\n"
    pieces = (wire[at : at + piece_bytes] for at in range(0, len(wire), piece_bytes))
    assert read_all(pieces) == [line, b"", line, b"", b""]


def test_an_event_of_two_long_lines_over_several_reads_passes() -> None:
    line = b"data: " + b"a" * (MAX_EVENT_BYTES // 2 - 6)
    wire = (line + b"\n") * 2 + b"\n"
    pieces = [wire[at : at + 16384] for at in range(0, len(wire), 16384)]
    assert read_all(pieces) == [line, line, b"", b""]


def test_an_event_may_have_many_lines_and_a_stream_many_events() -> None:
    event = b"data: a\n" * MAX_EVENT_LINES + b"\n"
    assert read_all([event] * 3) == [*event.split(b"\n")[:-1] * 3, b""]


def test_a_long_line_in_tiny_pieces_takes_linear_time() -> None:
    # Quadratic, it would copy 500 GB and run into the test's time-out.
    count = 250_000
    lines = read_all([b"data: ", *[b"0123456789abcdef"] * count, b"\n\n"])
    assert lines == [b"data: " + b"0123456789abcdef" * count, b"", b""]


@pytest.mark.parametrize("piece", [b": \n\n", b"data: a\n\n" * 50, b"\n" * 16384])
def test_a_body_that_always_has_data_lets_other_greenlets_run(piece: bytes) -> None:
    turns = 0
    lines = iter(lines_of(FakeAnswer(endless(piece))))

    def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            gevent.sleep(1e-6)  # a whole turn of the loop

    other = gevent.spawn(take_turns)
    given_bytes = 0
    while given_bytes < 240 * 1024:
        given_bytes += len(next(lines)) + 1
    other.kill()
    assert turns >= 240 // 24  # due after 8 KiB, and one read gives up to 16 KiB more


# Endings ----------------------------------------------------------------------------------------


def test_a_broken_transport_ends_the_body_and_drops_the_begun_line() -> None:
    broken = ProtocolError("Connection broken")
    lines = lines_of(FakeAnswer([b"data: a\n\ndata: b"], broken))
    read = []
    with pytest.raises(BodyEnded) as ended:
        for line in lines:
            read.append(line)
    assert read == [b"data: a", b""]
    assert ended.value.cause is broken
    assert lines.ended


def test_the_end_is_known_when_the_last_line_is_given_out() -> None:
    lines = lines_of(FakeAnswer([b"data: a\n", b"data: b"]))
    given = iter(lines)
    assert next(given) == b"data: a"
    assert not lines.ended
    assert next(given) == b"data: b"
    assert lines.ended


def test_bad_compression_is_a_malformed_stream() -> None:
    with pytest.raises(MalformedStreamError, match="bad compression"):
        next(iter(lines_of(FakeAnswer([], DecodeError("bad gzip")))))


@pytest.mark.parametrize("ended", [BodyEnded(None), BodyEnded(ProtocolError("broken"))])
def test_the_end_is_nothing_on_which_requests_sse_posts_again(ended: BodyEnded) -> None:
    assert not isinstance(ended, StopIteration | requests.RequestException)


def test_first_lines_that_belong_to_no_event_are_kept_within_a_bound() -> None:
    bare = b'{"error": {\n  "message": "no"\n}}'
    lines = lines_of(FakeAnswer([b": hi\n\nevent: e\ndata: a\n\n" + bare]))
    with pytest.raises(BodyEnded):
        list(lines)
    assert lines.stray == bare + b"\n"

    lines = lines_of(FakeAnswer([b"x" * 3000 + b"\n\n" + b"y" * 3000 + b"\n\n" + b"z" * 3000]))
    with pytest.raises(BodyEnded):
        list(lines)
    assert lines.stray.startswith(b"x" * 3000 + b"\ny")
    assert len(lines.stray) == 4096


# The drain --------------------------------------------------------------------------------------


def test_a_drain_reads_to_the_end_within_its_bound() -> None:
    raw = FakeAnswer([b"a" * 100] * 3)
    lines_of(raw).drain(1000)
    assert raw.reads == 4  # the last one saw the end


def test_a_drain_stops_at_its_bound() -> None:
    raw = FakeAnswer(endless(b"a" * 100))
    lines_of(raw).drain(1000)
    assert raw.reads == 10


@pytest.mark.parametrize("end", [ProtocolError("broken"), DecodeError("bad gzip")])
def test_a_drain_ignores_errors_and_stops(end: Exception) -> None:
    raw = FakeAnswer([b"a"], end)
    lines_of(raw).drain(1000)
    assert raw.reads == 2
