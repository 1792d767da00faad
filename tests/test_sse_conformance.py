"""The event-stream format of WHATWG HTML, §9.2.5 and §9.2.6, as bytes and the events they make.

Three accounts of each body have to agree: the table, written by hand; the standard's algorithm,
written down here once more; and `llm.http.events.Events`, whichever way the network cuts the
body. Where we differ from the standard on purpose, the table has both answers and the reason, and
both are asserted, so that a difference can neither grow nor go unnoticed.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from urllib3 import HTTPHeaderDict, HTTPResponse

from llm.chat.completions import parse_chunk
from llm.http.answer import Answer
from llm.http.events import Events
from llm.http.lines import BodyEnded
from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.provider_process import ProviderProcess
from tests.harness.scripts import chunk, send, text_event

URL = "http://provider.test/v1/chat/completions"
HEADERS = {"Content-Type": "text/event-stream"}
BOM = b"\xef\xbb\xbf"

PURE = settings(deadline=None, database=None)

# What is read -----------------------------------------------------------------------------------


class FakeAnswer:
    """The parts of an answer that are read, with a body of these pieces, one a read."""

    status = 200

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.headers = HTTPHeaderDict(HEADERS)
        self._pieces = iter(pieces)
        self._rest = b""

    def read1(self, most_bytes: int) -> bytes:
        data = self._rest or next(self._pieces, b"")
        self._rest = data[most_bytes:]
        return data[:most_bytes]

    def close(self) -> None:
        pass


class Pieces(io.RawIOBase):
    """A connection from which one piece comes a read: what urllib3 reads its body from."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read1(self, amt: int) -> bytes:
        data = self._rest or next(self._pieces, b"")
        self._rest = data[amt:]
        return data[:amt]


def plain(pieces: Iterable[bytes]) -> Answer:
    return cast(Answer, FakeAnswer(pieces))


def zipped(pieces: Iterable[bytes]) -> Answer:
    """urllib3's own answer, which unzips: the pieces are of the gzip stream."""
    headers = HEADERS | {"Content-Encoding": "gzip"}
    return Answer(HTTPResponse(Pieces(pieces), headers, status=200, preload_content=False), None)


def read_until(error: type[Exception], answer: Answer) -> list[str]:
    """The data of all events, up to this error."""
    read: list[str] = []
    with pytest.raises(error) as ended:
        for data in Events(URL, answer, lambda: None, lambda: None):
            read.append(data)
    if isinstance(ended.value, BodyEnded):
        assert ended.value.cause is None
    return read


def read(pieces: Iterable[bytes]) -> list[str]:
    """The data of all events, up to the orderly end of the body."""
    return read_until(BodyEnded, plain(pieces))


def cuts(wire: bytes) -> Iterator[list[bytes]]:
    """Whole, in two pieces at each position, and byte by byte."""
    yield [wire]
    for position in range(1, len(wire)):
        yield [wire[:position], wire[position:]]
    yield [wire[position : position + 1] for position in range(len(wire))]


def cut(wire: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Pieces of these lengths, over and over."""
    pieces: list[bytes] = []
    for length in cycle(lengths):
        if not wire:
            return pieces
        pieces.append(wire[:length])
        wire = wire[length:]
    raise AssertionError("no length")


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=8)


# What it means ----------------------------------------------------------------------------------


def interpret(wire: bytes) -> tuple[list[list[str]], list[str]]:
    """The standard's algorithm, but that the values of an event's data lines are not joined yet.

    Returns:
        The values of each event that has some, and those that the end of the body left without
        the blank line that would make them one, an unfinished last line included.
    """
    text = wire.decode("utf-8", "replace").removeprefix("\ufeff")
    *lines, unfinished = re.split("\r\n|\r|\n", text)
    events: list[list[str]] = []
    values: list[str] = []

    def take(line: str) -> None:
        name, _, value = line.partition(":")
        if name == "data":
            values.append(value.removeprefix(" "))

    for line in lines:
        take(line)
        if not line and values:
            events.append(values)
            values = []
    take(unfinished)
    return events, values


def by_the_standard(wire: bytes) -> list[str]:
    """The data of each event that a browser would dispatch."""
    events, _ = interpret(wire)
    return ["\n".join(values) for values in events]


def by_us(wire: bytes) -> list[str]:
    """The same with our differences, of which the table says why they are harmless."""
    events, begun = interpret(wire)
    return _as_we_do([*events, begun])


def by_us_so_far(wire: bytes) -> list[str]:
    """Of these, the ones that need not wait for what comes next."""
    return _as_we_do(interpret(wire)[0])


def _as_we_do(events: list[list[str]]) -> list[str]:
    all_data = ["\n".join(value.lstrip(" ") for value in values) for values in events]
    return [kept for data in all_data if (kept := data.rstrip("\n"))]


# The table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One body, and the data of its events.

    Args:
        name: what it shows.
        wire: the body.
        standard: what the standard makes of it.
        ours: what we make of it, where that differs.
        why: why it may differ.
    """

    name: str
    wire: bytes
    standard: list[str]
    ours: list[str] | None = None
    why: str = ""

    @property
    def expected(self) -> list[str]:
        return self.standard if self.ours is None else self.ours


SPACES = "JSON does not mind spaces around its values"
NEWLINES = "JSON does not mind newlines at its end"
NOTHING = "without data there is no chunk to parse"
LAST = "some servers leave out the last blank line; half an event is no JSON, and told as a cut"

LINE_ENDS = [
    Row("LF", b"data: a\n\ndata: b\n\n", ["a", "b"]),
    Row("CR", b"data: a\r\rdata: b\r\r", ["a", "b"]),
    Row("CRLF", b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
    Row("LF then CR are two ends", b"data: a\n\rdata: b\n\r", ["a", "b"]),
    Row("CR, CRLF", b"data: a\r\r\ndata: b\r\r\n", ["a", "b"]),
    Row("CRLF, CR", b"data: a\r\n\rdata: b\r\n\r", ["a", "b"]),
    Row("CRLF, LF", b"data: a\r\n\ndata: b\r\n\n", ["a", "b"]),
    Row("LF, CRLF", b"data: a\n\r\ndata: b\n\r\n", ["a", "b"]),
    Row("all kinds in one event", b"data: a\r\ndata: b\rdata: c\ndata: d\r\r", ["a\nb\nc\nd"]),
    Row("CRLF inside an event is one end", b"data: a\r\ndata: b\r\n\r\n", ["a\nb"]),
    Row("CR, comment, CR", b"data: a\r:\rdata: b\r\r", ["a\nb"]),
    Row("many blank lines", b"\n\r\n\r\r\n\n\ndata: a\n\n\r\n\r\r\n\ndata: b\n\n\n\n", ["a", "b"]),
    Row("nothing but blank lines", b"\r\n\n\r\r\r\n", []),
    Row("an empty body", b"", []),
    Row("VT and FF are text", b"data: a\x0bb\x0cc\n\n", ["a\x0bb\x0cc"]),
    Row("FS, GS, RS and US are text", b"data: a\x1cb\x1dc\x1ed\x1f\n\n", ["a\x1cb\x1dc\x1ed\x1f"]),
    Row("NEL, LS, PS are text", "data: a\x85b\u2028c\u2029\n\n".encode(), ["a\x85b\u2028c\u2029"]),
    Row(r"a backslash and an n are text", rb"data: a\nb\r" + b"\n\n", [r"a\nb\r"]),
]

BOMS = [
    Row("a BOM is dropped", BOM + b"data: a\n\ndata: b\n\n", ["a", "b"]),
    Row("a BOM before a comment", BOM + b": hi\ndata: a\n\n", ["a"]),
    Row("a BOM before a blank line", BOM + b"\r\ndata: a\r\n\r\n", ["a"]),
    Row("a BOM before CR", BOM + b"\rdata: a\r\r", ["a"]),
    Row("nothing but a BOM", BOM, []),
    Row("only one BOM is dropped", BOM + BOM + b"data: a\n\ndata: b\n\n", ["b"]),
    Row("a BOM at the second line is text", b"\n" + BOM + b"data: a\n\ndata: b\n\n", ["b"]),
    Row("a BOM at a later event is text", b"data: a\n\n" + BOM + b"data: b\n\n", ["a"]),
    Row("a BOM inside a value is text", b"data: " + BOM + b"a\n\n", ["\ufeffa"]),
    Row("what begins like a BOM", b"\xef\xbb\xbedata: a\n\ndata: b\n\n", ["b"]),
]

FIELDS = [
    Row("no space after the colon", b'data:a\n\ndata:{"a":1}\n\n', ["a", '{"a":1}']),
    Row("a tab after the colon is text", b"data:\ta\n\n", ["\ta"]),
    Row("a no-break space is text", "data:\xa0a\n\n".encode(), ["\xa0a"]),
    Row("a space at the end is text", b"data: a \n\n", ["a "]),
    Row("a colon in the value", b"data: a: b\n\ndata::c\n\ndata: :\n\n", ["a: b", ":c", ":"]),
    Row("a comment's colon in the value", b"data: : a\n\n", [": a"]),
    Row("a space before the name", b" data: a\ndata: b\n\n", ["b"]),
    Row("a space before the colon", b"data : a\ndata: b\n\n", ["b"]),
    Row("names are case-sensitive", b"Data: a\nDATA: b\ndata: c\n\n", ["c"]),
    Row("longer and shorter names", b"dat: a\ndatas: b\ndatadata: c\ndata: d\n\n", ["d"]),
    Row("unknown fields", b"foo: a\nbar\n{}\ndata: b\nfoo:\n\n", ["b"]),
    Row("unknown fields alone make no event", b"foo: a\n\nbar\n\ndata: b\n\n", ["b"]),
    Row("comments", b": hi\n:\n:a\ndata: b\n: data: c\n::\n\n", ["b"]),
    Row("comments alone make no event", b": hi\n\n:\n\n", []),
    Row("a comment does not end an event", b"data: a\n:\ndata: b\n\n", ["a\nb"]),
    Row("an event type, before and after", b"event: x\ndata: a\n\ndata: b\nevent\n\n", ["a", "b"]),
    Row("an event type without data", b"event: x\n\ndata: a\n\n", ["a"]),
    Row("ids", b"id: 7\ndata: a\n\nid\ndata: b\nid: \xc3\xa9\n\nid: 8\n\n", ["a", "b"]),
    Row("an id with NUL", b"id: a\0b\ndata: a\n\nid: \0\ndata: b\n\n", ["a", "b"]),
    Row("a retry of digits", b"retry: 10\ndata: a\n\nretry:0\n\ndata: b\nretry: 1\n\n", ["a", "b"]),
    Row("other retries", b"retry: soon\nretry\nretry: -1\nretry: 1.5\ndata: a\n\n", ["a"]),
    Row("a retry too long for an int", b"retry: " + b"9" * 4400 + b"\ndata: a\n\n", ["a"]),
    Row("a retry longer than any clock", b"retry: 99999999999999999999\ndata: a\n\n", ["a"]),
    Row("NUL is text", b"data: a\0\n\n\0\ndata: b\n\n", ["a\0", "b"]),
    Row("two spaces after the colon", b"data:  a\n\n", [" a"], ["a"], SPACES),
    Row("spaces at the lines of an event", b"data: {\ndata:   1\n\n", ["{\n  1"], ["{\n1"], SPACES),
    Row("nothing but one space", b"data: \n\ndata: a\n\n", ["", "a"], ["a"], NOTHING),
    Row("nothing but spaces", b"data:   \n\ndata: a\n\n", ["  ", "a"], ["a"], NOTHING),
]

EVENTS = [
    Row("several lines", b"data: a\ndata: b\ndata:c\n\n", ["a\nb\nc"]),
    Row("an empty line first", b"data\ndata: a\n\n", ["\na"]),
    Row("an empty line between", b"data: a\ndata:\ndata: b\n\n", ["a\n\nb"]),
    Row("lines with other fields between", b"data: a\nid: 1\nfoo\ndata: b\n\n", ["a\nb"]),
    Row("nothing is carried over", b"data: a\n\nfoo\n\ndata: b\n\n", ["a", "b"]),
    Row("an empty line last", b"data: a\ndata\n\n", ["a\n"], ["a"], NEWLINES),
    Row("empty lines last", b"data: a\ndata:\ndata: \n\n", ["a\n\n"], ["a"], NEWLINES),
    Row("empty data", b"data\n\ndata:\n\ndata: a\n\n", ["", "", "a"], ["a"], NOTHING),
    Row("only empty lines", b"data\ndata:\n\ndata: a\n\n", ["\n", "a"], ["a"], NOTHING),
]

ENDS = [
    Row("no blank line at the end", b"data: a\n\ndata: b\n", ["a"], ["a", "b"], LAST),
    Row("no line end at the end", b"data: a\n\ndata: b", ["a"], ["a", "b"], LAST),
    Row("CR at the end", b"data: a\r\rdata: b\r", ["a"], ["a", "b"], LAST),
    Row("CRLF at the end", b"data: a\r\n\r\ndata: b\r\n", ["a"], ["a", "b"], LAST),
    Row("only an unfinished line", b"data: a", [], ["a"], LAST),
    Row("only an unfinished line with a BOM", BOM + b"data: a", [], ["a"], LAST),
    Row("an unfinished second line", b"data: {\ndata: }", [], ["{\n}"], LAST),
    Row("cut in a name", b"data: a\n\ndata: b\ndat", ["a"], ["a", "b"], LAST),
    Row("cut in a value", b'data: a\n\ndata: {"b', ["a"], ["a", '{"b'], LAST),
    Row("cut in a comment", b"data: a\n: b", [], ["a"], LAST),
    Row("the last blank line is a CR", b"data: a\r\n\r", ["a"]),
    Row("an end without data", b"data: a\n\nevent: x\nid: 1\n", ["a"]),
    Row("an end of empty data", b"data: a\n\ndata:", ["a"]),
]

TEXT = [
    Row("two bytes", "data: éß\n\nfoo: é\n\ndata: é\n\n".encode(), ["éß", "é"]),
    Row("three bytes", "data: €你好\r\rdata: 你\r\r".encode(), ["€你好", "你"]),
    Row("four bytes", "data: 😀𝄞\r\n\r\ndata:😀\r\n\r\n".encode(), ["😀𝄞", "😀"]),
    Row(
        "joined emoji",
        "data: 👩\u200d👩\u200d👧 e\u0301\n\n".encode(),
        ["👩\u200d👩\u200d👧 e\u0301"],
    ),
    Row(
        "the last code point",
        "data: \U0010ffff\ufffd\ufffe\n\n".encode(),
        ["\U0010ffff\ufffd\ufffe"],
    ),
    Row("no ASCII at all in a name", "数据: a\ndata: 数据\n\n".encode(), ["数据"]),
    Row("a comment of four bytes", ": 😀\ndata: a\n\n".encode(), ["a"]),
]

# §9.2.6, in its order.
FROM_THE_STANDARD = [
    Row("three lines", b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
    Row(
        "four blocks",
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event",
        ["first event", "second event"],
        ["first event", "second event", "third event"],
        LAST,
    ),
    Row("two events", b"data\n\ndata\ndata\n\ndata:", ["", "\n"], [], NOTHING),
    Row("identical events", b"data:test\n\ndata: test\n\n", ["test", "test"]),
]

ROWS = [*LINE_ENDS, *BOMS, *FIELDS, *EVENTS, *ENDS, *TEXT, *FROM_THE_STANDARD]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@each_row
def test_the_table_is_what_the_standards_algorithm_says(row: Row) -> None:
    assert by_the_standard(row.wire) == row.standard
    assert by_us(row.wire) == row.expected


@each_row
def test_a_difference_is_one_and_has_its_reason(row: Row) -> None:
    assert (row.ours is None) == (row.why == "")
    assert row.ours != row.standard


@each_row
def test_the_events_are_the_same_wherever_the_network_cuts(row: Row) -> None:
    for pieces in cuts(row.wire):
        assert read(pieces) == row.expected, pieces


@each_row
def test_no_event_waits_for_what_comes_after_it(row: Row) -> None:
    read: list[str] = []
    read_before: list[list[str]] = []
    body = plain(row.wire[at : at + 1] for at in range(len(row.wire)))
    events = Events(URL, body, lambda: read_before.append(read.copy()), lambda: None)
    with pytest.raises(BodyEnded):
        for data in events:
            read.append(data)
    so_far = [by_us_so_far(row.wire[:length]) for length in range(len(row.wire) + 1)]
    assert read_before == so_far


@each_row
def test_the_events_are_the_same_when_the_body_is_zipped(row: Row) -> None:
    packer = zlib.compressobj(wbits=31)
    whole = packer.compress(row.wire) + packer.flush()
    for pieces in cuts(whole):
        assert read_until(BodyEnded, zipped(pieces)) == row.expected, pieces
    flushed = scripts.gzip_pieces([row.wire[at : at + 1] for at in range(len(row.wire))])
    assert read_until(BodyEnded, zipped(flushed)) == row.expected


@settings(PURE, max_examples=40)
@given(lengths)
def test_the_events_are_the_same_in_pieces_of_any_lengths(lengths: list[int]) -> None:
    for row in ROWS:
        assert read(cut(row.wire, lengths)) == row.expected, row


# What nobody thought of -------------------------------------------------------------------------

SYLLABLES = ["data", "data:", "event", "id:", "retry", ":", " ", "\n", "\r", "\r\n", "a", "é😀"]
SYLLABLES += ["\n\n", "data: b\n\n", "data:  c\r", "\ufeff", "\0", "\t"]


@settings(PURE, max_examples=300)
@given(st.lists(st.sampled_from(SYLLABLES), max_size=40).map("".join), lengths)
def test_any_text_is_read_by_the_standards_algorithm(text: str, lengths: list[int]) -> None:
    wire = text.encode()
    assert read(cut(wire, lengths)) == read([wire]) == by_us(wire)


# A line of data, and then an event's data, that the standard and we understand in the same way.
line_texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])).filter(
    lambda text: not text.startswith(" ")
)
datas = (
    st.lists(line_texts, min_size=1, max_size=4)
    .map("\n".join)
    .filter(lambda data: data and not data.endswith("\n"))
)
NOISE = [
    "",
    ":",
    ": data: no",
    "event: x",
    "id: 7",
    "id",
    "retry: 10",
    "data : no",
    "Data: no",
    "é",
]


@st.composite
def framings(draw: DrawFn, model: Sequence[str]) -> bytes:
    """A body of these data, as some server may write it."""
    ends = st.sampled_from(["\n", "\r", "\r\n"])
    wire: str = draw(st.sampled_from(["", "\ufeff"]))

    def put(line: str) -> None:
        nonlocal wire
        # An empty line that ends with LF would be the second half of a CRLF.
        starts_with_lf = "\r\n" if wire.endswith("\r") and not line else None
        wire += line + (starts_with_lf or draw(ends))

    def make_noise(kinds: Sequence[str]) -> None:
        for line in draw(st.lists(st.sampled_from(kinds), max_size=2)):
            put(line)

    for data in model:
        make_noise(NOISE)
        for line in data.split("\n"):
            put("data" + draw(st.sampled_from([":", ": "])) + line if line else "data")
            make_noise(NOISE[1:])
        put("")
    make_noise(NOISE)
    return wire.encode()


@settings(PURE, max_examples=80)
@given(st.data(), st.lists(datas, max_size=5), lengths)
def test_what_a_server_frames_reads_back(
    data: st.DataObject, model: list[str], lengths: list[int]
) -> None:
    wire = data.draw(framings(model))
    assert by_the_standard(wire) == model
    assert read(cut(wire, lengths)) == model


# Why the differences are harmless ---------------------------------------------------------------


@pytest.mark.parametrize("around", [" ", "   ", "\n", "\n\n"])
def test_spaces_and_newlines_around_a_chunk_do_not_change_it(around: str) -> None:
    [data] = read([text_event("a b\n ")])
    assert parse_chunk(around + data + around) == parse_chunk(data)
    assert parse_chunk(data).text == "a b\n "


def test_a_chunk_over_several_lines_may_be_indented() -> None:
    lines = [b'{"choices": [', b'    {"delta": {', b'        "content": "a  b"', b"    }}", b"]}"]
    [data] = read([b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"])
    assert parse_chunk(data).text == "a  b"


def test_a_chunk_that_the_end_cuts_is_told_as_an_incomplete_answer(
    client: Client, provider: ProviderProcess
) -> None:
    script = scripts.raw([text_event("a"), text_event("b")[:-20]])
    request_id = client.request(provider.fresh(script))
    error = client.wait_terminal(request_id).payload
    assert error["error_code"] == "INTERNAL_ERROR"
    assert "incomplete answer" in error["error_detail"]
    assert client.text_of(request_id) == "a"


# What is no UTF-8 -------------------------------------------------------------------------------

# The standard reads every bad sequence as U+FFFD. We refuse the stream: an answer with holes in it
# is worse than an error that says so.
NOT_UTF8 = {
    "a byte that never occurs": b"data: \xff\n\n",
    "a continuation of nothing": b"data: a\x80\n\n",
    "a character cut by the end of its line": b"data: \xe2\x82\n\n",
    "a character over two lines": b"data: \xe2\ndata: \x82\xac\n\n",
    "three bytes of four": b'data: "\xf0\x9f\x98"\n\n',
    "overlong": b"data: \xc0\xaf\n\n",
    "a surrogate": b"data: \xed\xa0\x80\n\n",
    "over the last code point": b"data: \xf4\x90\x80\x80\n\n",
    "Latin-1": "data: Köln\n\n".encode("latin-1"),
    "Latin-1 in a comment": ": Köln\n".encode("latin-1"),
    "Latin-1 in a name": "Köln: a\n".encode("latin-1"),
    "CR in the middle of a character": b"data: \xe2\r\r",
}
each_bad = pytest.mark.parametrize("bad", NOT_UTF8.values(), ids=NOT_UTF8)


@each_bad
def test_what_is_no_utf_8_is_an_error_wherever_the_network_cuts(bad: bytes) -> None:
    assert "\ufffd" in bad.decode("utf-8", "replace")
    wire = b"data: a\n\n" + bad + b"data: b\n\n"
    assert "b" in by_the_standard(wire)[-1]
    for pieces in cuts(wire):
        assert read_until(UnicodeDecodeError, plain(pieces)) == ["a"], pieces
    assert read_until(UnicodeDecodeError, zipped(scripts.gzip_pieces([wire]))) == ["a"]


@pytest.mark.parametrize("bom", [b"\xff\xfe", b"\xfe\xff", b"\xef\xbb", b"\xef\xbb\n"])
def test_another_byte_order_mark_is_no_utf_8(bom: bytes) -> None:
    for pieces in cuts(bom + b"data: a\n\n"):
        assert read_until(UnicodeDecodeError, plain(pieces)) == []


@each_bad
def test_a_client_is_told_of_what_is_no_utf_8(
    client: Client, provider: ProviderProcess, bad: bytes
) -> None:
    script = [send(scripts.sse_head()), send(chunk(text_event("a"))), send(chunk(bad))]
    name = provider.fresh([*script, scripts.hang()])
    request_id = client.request(name)
    error = client.wait_terminal(request_id).payload
    assert error["error_code"] == "INTERNAL_ERROR"
    assert "malformed stream: " in error["error_detail"]
    assert client.text_of(request_id) == "a"
    provider.wait_closed(provider.wait_post(script=name).conn)
