"""From the provider's write to the client's frame: nothing waits for what comes next.

The provider sends a part of its answer and goes on only when the client has shown that it has the
text of it. Whatever waits for more, be it the next event, the rest of a chunk or a full buffer,
waits for ever, and the test fails by the client's time-out. No test looks at a clock for that.

At the other end of the scale: a line that never ends costs a bounded amount, and nobody else.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import gevent
import pytest

from gateway.app import Gateway
from llm.http.lines import MAX_EVENT_BYTES, MAX_EVENT_LINES
from tests.fakes import LIMIT
from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.daemon import Daemon
from tests.harness.provider_process import PostEvent, ProviderProcess
from tests.harness.scripts import Script, chunk, done, finish_event, send, text_event, wait

# How a body travels -----------------------------------------------------------------------------

Framing = Callable[[Sequence[bytes]], list[bytes]]
"""The writes that send these parts of a body, each a write, but that the first has the head too,
and that a last write ends the body."""


def in_chunks(parts: Sequence[bytes]) -> list[bytes]:
    return [scripts.sse_head() + chunk(parts[0]), *map(chunk, parts[1:]), scripts.last_chunk()]


def in_chunks_whose_ends_come_with_the_next(parts: Sequence[bytes]) -> list[bytes]:
    """Some servers write a chunk's CRLF only when they have another chunk."""
    first, *rest = [chunk(part)[:-2] for part in parts]
    later = [b"\r\n" + part for part in rest]
    return [scripts.sse_head() + first, *later, b"\r\n" + scripts.last_chunk()]


def in_one_chunk(parts: Sequence[bytes]) -> list[bytes]:
    """A chunk is as long as somebody on the way likes, and comes piece by piece."""
    length = sum(map(len, parts))
    first, *rest = parts
    head = scripts.sse_head() + b"%x\r\n" % length
    return [head + first, *rest, b"\r\n" + scripts.last_chunk()]


def in_tiny_chunks(parts: Sequence[bytes]) -> list[bytes]:
    """Of which no event takes a whole number; larger ones for a large event, for they cost time."""

    def cut(part: bytes) -> bytes:
        size = 7 if len(part) < 5000 else 997
        return b"".join(chunk(part[at : at + size]) for at in range(0, len(part), size))

    first, *rest = map(cut, parts)
    return [scripts.sse_head() + first, *rest, scripts.last_chunk()]


def gzipped_in_chunks(parts: Sequence[bytes]) -> list[bytes]:
    first, *rest = map(chunk, scripts.gzip_pieces(parts))
    return [scripts.sse_head(gzip=True) + first, *rest, scripts.last_chunk()]


def gzipped_without_length(parts: Sequence[bytes]) -> list[bytes]:
    first, *rest = scripts.gzip_pieces(parts)
    return [scripts.sse_head(gzip=True, http10=True) + first, *rest, b""]


def gzipped_with_length(parts: Sequence[bytes]) -> list[bytes]:
    first, *rest = pieces = scripts.gzip_pieces(parts)
    head = scripts.sse_head(gzip=True, content_length=sum(map(len, pieces)))
    return [head + first, *rest, b""]


def gzipped_one_by_one(parts: Sequence[bytes]) -> list[bytes]:
    """Several gzip members, which make one body too (RFC 1952, §2.2)."""
    first, *rest = (chunk(gzip.compress(part)) for part in parts)
    return [scripts.sse_head(gzip=True) + first, *rest, scripts.last_chunk()]


def without_length(parts: Sequence[bytes]) -> list[bytes]:
    return [scripts.sse_head(http10=True) + parts[0], *parts[1:], b""]


def with_length(parts: Sequence[bytes]) -> list[bytes]:
    head = scripts.sse_head(content_length=sum(map(len, parts)))
    return [head + parts[0], *parts[1:], b""]


FRAMINGS: Mapping[str, Framing] = {
    "chunked": in_chunks,
    "chunked, ends late": in_chunks_whose_ends_come_with_the_next,
    "one chunk": in_one_chunk,
    "tiny chunks": in_tiny_chunks,
    "gzip": gzipped_in_chunks,
    "gzip, HTTP/1.0": gzipped_without_length,
    "gzip, Content-Length": gzipped_with_length,
    "gzip, a member each": gzipped_one_by_one,
    "HTTP/1.0": without_length,
    "Content-Length": with_length,
}

# What is said -----------------------------------------------------------------------------------

Talk = Sequence[tuple[bytes, str]]
"""What the provider writes, and the text that the client has of it before the next is written."""


def said(*texts: str, end: bytes = b"\n") -> Talk:
    """One event each, with these line ends."""
    return [(text_event(text).replace(b"\n", end), text) for text in texts]


def cut_in_the_third(position: int) -> Talk:
    """Two events and the beginning of another in one write, then the rest of it and one more."""
    third = text_event("c😀")
    first = text_event("a") + text_event("b") + third[:position]
    return [(first, "ab"), (third[position:], "c😀"), *said("d")]


EVENT = text_event("c😀")
IN_THE_EMOJI = EVENT.index("😀".encode()) + 2

READ_BYTES = 8192
SIZES = [
    READ_BYTES * reads + more - len(text_event("")) for reads in (1, 2, 4) for more in (-1, 0, 1)
]
"""Texts of events that fill whole reads, of the connection or of what was unzipped, or just not."""

TALKS: Mapping[str, Talk] = {
    "short": said("Hello", ", ", "world", "! 你好"),
    "of one letter": said(*"abcdef"),
    "CRLF": said("a", "b", "c", end=b"\r\n"),
    # The last CR may be the first half of a CRLF: nobody knows yet, and nobody needs to.
    "CR": said("a", "b", "c", end=b"\r"),
    "CRLF, its LF late": [
        (text_event("a").replace(b"\n", b"\r\n")[:-1], "a"),
        (b"\n" + text_event("b").replace(b"\n", b"\r\n")[:-1], "b"),
        (b"\n" + text_event("c"), "c"),
    ],
    "CR, then LF as CRLF": [
        (b"\r" + text_event("a")[:-2] + b"\r\r", "a"),
        (b"\n" + text_event("b")[:-2] + b"\r\n\r", "b"),
    ],
    "cut after two, in a name": cut_in_the_third(2),
    "cut after two, in a value": cut_in_the_third(20),
    "cut after two, in a character": cut_in_the_third(IN_THE_EMOJI),
    "cut after two, before the blank line": cut_in_the_third(len(EVENT) - 1),
    "several at once": [
        (b"".join(map(text_event, "abc")), "abc"),
        (b"".join(map(text_event, "def")), "def"),
    ],
    "many at once": [(text_event("x") * 500, "x" * 500), *said("y")],
    "with comments and names around": [
        (b": hi\n\nevent: e\nid: 1\n" + text_event("a") + b": bye\n", "a"),
        (b"\n\n:\n" + text_event("b") + b"\n\nretry: 1\n", "b"),
    ],
    "around the size of a read": said(*("x" * size for size in SIZES), "s"),
    "long, then short": said("l" * 300_000, "s", "m" * 100_000, "t"),
    "long, that do not zip": said(os.urandom(60_000).hex(), "s", os.urandom(9_000).hex()),
}


def read_text(client: Client, request_id: str, text: str) -> None:
    """Read until the answer is this text."""
    while (got := client.text_of(request_id)) != text:
        assert text.startswith(got)
        client.next()


def deliver(
    client: Client, provider: ProviderProcess, framing: Framing, name: str, talk: Talk
) -> None:
    """Ask for an answer that goes on only as its text is received."""
    key = provider.unique(name)
    *writes, last = framing([*(part for part, _ in talk), finish_event() + done()])
    script: Script = []
    for number, write in enumerate(writes):
        script += [send(write), wait(f"{key}-{number}")]
    script += [send(last), scripts.close()]
    request_id = client.request(provider.fresh(script, name))
    text = ""
    for number, (_, more) in enumerate(talk):
        text += more
        read_text(client, request_id, text)
        provider.release(f"{key}-{number}")
    provider.release(f"{key}-{len(talk)}")
    terminal = client.wait_terminal(request_id)
    assert terminal.payload["outcome"] == "COMPLETED", terminal
    assert client.text_of(request_id) == text


@pytest.fixture(params=["http", "tls"])
def either_client(
    request: pytest.FixtureRequest,
    provider: ProviderProcess,
    make_gateway: Callable[..., Gateway],
) -> Iterator[Client]:
    """A client of a gateway whose provider is asked in the clear, or over TLS."""
    urls = {"http": provider.base_url, "tls": provider.tls_base_url}
    gateway = make_gateway(base_url=urls[request.param], ca_file=provider.ca_file)
    with Client(gateway.server.port) as client:
        yield client


@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS)
def test_what_the_provider_has_sent_reaches_the_client_before_it_sends_more(
    either_client: Client, provider: ProviderProcess, framing: Framing
) -> None:
    for name, talk in TALKS.items():
        deliver(either_client, provider, framing, name, talk)


# A line that does not end ------------------------------------------------------------------------

MIB = 1 << 20
PIECE_BYTES = 256
MAX_GROWTH_BYTES = 32 * MIB
"""Of the daemon: the longest line, twice or three times while it is put together, and room."""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def daemon(provider: ProviderProcess) -> Iterator[Daemon]:
    """A gateway in its own process, which has answered before."""
    with Daemon("--llm-url", provider.base_url, "--llm-model", "test") as daemon:
        with Client(daemon.port) as client:
            request_id = client.request(provider.fresh(scripts.answer(["warm"])))
            client.wait_terminal(request_id)
        yield daemon


def memory_bytes(daemon: Daemon, field: str) -> int:
    """Resident memory, VmRSS now or VmHWM at its peak (proc(5), /proc/pid/status)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())
    if found is None:
        pytest.skip(f"this kernel does not tell {field}")
    return int(found[1]) * 1024


def cpu_seconds(daemon: Daemon) -> float:
    """Processor time that it has used so far (proc(5), /proc/pid/stat: utime and stime)."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def forget_peak(daemon: Daemon) -> None:
    """Let VmHWM start again from what is resident now (proc(5), /proc/pid/clear_refs)."""
    with contextlib.suppress(OSError):  # then it is the peak since its start, which is no less
        Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")


def kernel_bytes() -> int:
    """The most that the kernel's two buffers of a connection hold (tcp(7), tcp_rmem, tcp_wmem)."""
    limits = Path("/proc/sys/net/ipv4")
    return sum(int((limits / name).read_text().split()[2]) for name in ("tcp_rmem", "tcp_wmem"))


def fail_by_its_line(
    client: Client, provider: ProviderProcess, script: Script, bound: str = "4 MiB"
) -> PostEvent:
    """Ask for this answer, which has an event over the bound; returns when that is told."""
    name = provider.fresh(script)
    request_id = client.request(name)
    error = client.wait_terminal(request_id).payload
    assert error["error_code"] == "INTERNAL_ERROR"
    assert f"malformed stream: an event of over {bound}" in error["error_detail"]
    return provider.wait_post(script=name)


def endless(head: bytes, begin: bytes, more: bytes) -> Script:
    return [send(head, begin), scripts.repeat([send(more)])]


A_LOT = b"a" * 65536


LINES: Mapping[str, Callable[[], Script]] = {
    "10 MiB": lambda: scripts.one_long_line(10 * MIB),
    "endless": lambda: endless(scripts.sse_head(), chunk(b"data: "), chunk(A_LOT)),
    "endless, HTTP/1.0": lambda: endless(scripts.sse_head(http10=True), b"data: ", A_LOT),
    "an endless comment": lambda: endless(scripts.sse_head(), chunk(b":"), chunk(A_LOT)),
    "an endless unknown field": lambda: endless(scripts.sse_head(), chunk(b"a"), chunk(A_LOT)),
    "many lines of one event": lambda: endless(
        scripts.sse_head(), chunk(b"data: {\n"), chunk(b"data: " + A_LOT + b"\n")
    ),
    "tiny lines of one event": lambda: endless(
        scripts.sse_head(), chunk(b"data: {\n"), chunk(b"data:a\n" * 1000)
    ),
}


@on_linux
@pytest.mark.parametrize("kind", LINES)
def test_a_line_over_the_bound_costs_bounded_memory_and_ends_in_its_error(
    daemon: Daemon, provider: ProviderProcess, kind: str
) -> None:
    bound = f"{MAX_EVENT_LINES} lines" if kind.startswith("tiny") else "4 MiB"
    forget_peak(daemon)
    before = memory_bytes(daemon, "VmRSS")
    with Client(daemon.port) as client:
        post = fail_by_its_line(client, provider, LINES[kind](), bound)
        closed = provider.wait_closed(post.conn)
    assert closed.by in ("client_eof", "client_reset")
    assert closed.sent_bytes < MAX_EVENT_BYTES + MIB + kernel_bytes()
    assert memory_bytes(daemon, "VmHWM") - before < MAX_GROWTH_BYTES


@on_linux
def test_a_line_is_not_unzipped_beyond_its_bound(daemon: Daemon, provider: ProviderProcess) -> None:
    packer = zlib.compressobj(wbits=31)
    event = packer.compress(text_event("a") + b"data: ") + packer.flush(zlib.Z_FULL_FLUSH)
    mebibyte = packer.compress(b"a" * MIB) + packer.flush(zlib.Z_FULL_FLUSH)
    bomb = mebibyte * 512
    assert len(bomb) < MIB
    key = provider.unique("key")
    head = scripts.sse_head(gzip=True, http10=True)
    name = provider.fresh([send(head, event), wait(key), send(bomb), scripts.hang()])
    forget_peak(daemon)
    before = memory_bytes(daemon, "VmRSS")
    with Client(daemon.port) as client:
        request_id = client.request(name)
        read_text(client, request_id, "a")  # now the gateway waits with an empty buffer
        provider.release(key)
        error = client.wait_terminal(request_id).payload
    assert "malformed stream: an event of over 4 MiB" in error["error_detail"]
    assert memory_bytes(daemon, "VmHWM") - before < MAX_GROWTH_BYTES


def in_small_pieces(piece: bytes, n_bytes: int, end: Script) -> Script:
    """A comment that is this piece over and over, faster than anybody reads it; then the end."""
    at_once = 65536 // len(piece)
    pieces = scripts.repeat([send(chunk(piece) * at_once)], n_bytes // len(piece) // at_once)
    return [send(scripts.sse_head(), chunk(b":")), pieces, *end]


@on_linux
def test_a_long_line_in_small_pieces_costs_about_as_much_as_many_short_lines(
    daemon: Daemon, provider: ProviderProcess
) -> None:
    # As many reads of as many bytes. If each copied the line so far, that were 32 GiB.
    end = [send(chunk(b"\n\n")), *scripts.tokens(["a"]), *scripts.ending()]
    costs = []
    with Client(daemon.port) as client:
        for piece in (b": " + b"a" * (PIECE_BYTES - 4) + b"\n\n", b"a" * PIECE_BYTES):
            before = cpu_seconds(daemon)
            script = in_small_pieces(piece, MAX_EVENT_BYTES - PIECE_BYTES, end)
            request_id = client.request(provider.fresh(script))
            assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
            costs.append(cpu_seconds(daemon) - before)
    short_lines, long_line = costs
    assert long_line < 5 * short_lines


def test_another_clients_stream_goes_on_while_a_long_line_comes(
    daemon: Daemon, provider: ProviderProcess
) -> None:
    ticks = [scripts.sleep(0.001), *scripts.tokens(["tick "])]
    script = in_small_pieces(b"a" * PIECE_BYTES, 10 * MIB, [scripts.hang()])
    with Client(daemon.port) as listener, Client(daemon.port) as client:
        ticking = listener.request(provider.fresh([*scripts.opening(), scripts.repeat(ticks)]))
        listener.wait_text(ticking)
        listening = gevent.spawn(listener.wait_terminal, ticking)
        post = fail_by_its_line(client, provider, script)
        failed_at = client.frames[-1].at
        listener.interrupt(ticking)
        assert listening.get(timeout=LIMIT).payload["interrupted"] is True
    heard = [one for one in listener.frames_of(ticking) if post.time < one.at < failed_at]
    assert len(heard) >= 10
