"""What goes out on one connection, over a real pair of sockets."""

from __future__ import annotations

import gc
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import gevent.socket
import pytest
from prometheus_client import CollectorRegistry
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from actors.outlet import RequestEnd
from actors.words import Outcome
from gateway.server.outbox import (
    MAX_CONTROL_FRAMES,
    MAX_FRAME_CHARS,
    MAX_FRAMES_IN_A_WRITE,
    Outbox,
    OutboxSettings,
    Outlet,
)
from gateway.wire.encode import AnswerEncoder
from llm.chat.completions import ToolCall
from metrics.instruments import Metrics
from tests.harness.client import wait_until

LIMIT = 5.0  # seconds; bounds a failure, and no success waits for it


def turn() -> None:
    """Let the loop run what is ready: what was put in this turn is flushed."""
    gevent.sleep(0)


class Encoder(AnswerEncoder):
    """Whose last frame is what its end says, and nothing else."""

    def encode_end(self, end: RequestEnd, timestamp_ms: int) -> bytes:
        return json.dumps(end.detail).encode()


def the_end(text: str) -> RequestEnd:
    """An end whose frame is this text."""
    return RequestEnd("req_1", Outcome.COMPLETED, detail=text)


def look(arguments: dict[str, Any]) -> ToolCall:
    """A call of the model."""
    return ToolCall("call_1", "look", json.dumps(arguments))


def note(times: list[float]) -> Callable[[], None]:
    """Notes when it is called."""
    return lambda: times.append(time.monotonic())


class Pair:
    """An outbox, and the client at the other end, who reads only when told to."""

    def __init__(self, **settings: Any) -> None:
        self.sock, self.peer = socket.socketpair()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        self.sock.settimeout(0)
        self.peer.settimeout(0)
        self.metrics = Metrics(CollectorRegistry())
        self.deaths: list[str] = []
        self.died = gevent.event.Event()
        self.outbox = Outbox(
            self.sock,
            ServerProtocol(state=State.OPEN),
            OutboxSettings(**settings),
            self.metrics,
            self._on_dead,
        )
        self._client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
        self._skip = 0
        self.frames: list[Frame] = []

    def _on_dead(self, reason: str) -> None:
        self.deaths.append(reason)
        self.died.set()

    def outlet(self, request_id: str = "req_1") -> Outlet:
        return self.outbox.outlet(Encoder("sess_1", request_id))

    def fill_kernel(self) -> None:
        """From now on the kernel takes nothing; the client will skip what fills it."""
        try:
            while True:
                self._skip += self.sock.send(b"x" * 1024)
        except BlockingIOError:
            pass
        try:
            while True:
                self._skip += self.sock.send(b"x")
        except BlockingIOError:
            pass

    def begin_frame(self, outlet: Outlet, chars: int = MAX_FRAME_CHARS) -> None:
        """Put frames of an outlet until one is half written and none is queued."""
        while self.outbox.begun_frame(outlet) is None:
            outlet.put("b" * chars)
            turn()
        assert self.outbox._data_bytes == 0

    # The client.

    def read_some(self, n_bytes: int = 65536) -> int:
        """Read what is there now; returns how many bytes that were, 0 at the end.

        Raises:
            BlockingIOError: nothing is there.
        """
        data = self.peer.recv(n_bytes)
        wire = data[self._skip :] if self._skip < len(data) else b""
        self._skip = max(0, self._skip - len(data))
        if wire:
            self._client.receive_data(wire)
            assert self._client.parser_exc is None, "these are no WebSocket frames"
            self.frames += [one for one in self._client.events_received() if isinstance(one, Frame)]
        return len(data)

    def read_now(self) -> list[Any]:
        """Everything that the kernel has at this moment; returns all that came so far."""
        try:
            while self.read_some():
                pass
        except BlockingIOError:
            pass
        return self.texts

    def read_until(self, enough: Callable[[], bool]) -> list[Any]:
        """Read until it is enough; returns all that came so far."""
        deadline = time.monotonic() + LIMIT
        while not enough():
            left = deadline - time.monotonic()
            assert left > 0, f"not enough came: {[str(text)[:80] for text in self.texts]}"
            gevent.socket.wait_read(self.peer.fileno(), timeout=left)
            assert self.read_some(), "the connection ended before"
        return self.texts

    def read_texts(self, count: int) -> list[Any]:
        """Read until so many text frames came."""
        return self.read_until(lambda: len(self.texts) >= count)

    @property
    def texts(self) -> list[Any]:
        """The text frames that came, as JSON."""
        return [json.loads(bytes(one.data)) for one in self.frames if one.opcode is Opcode.TEXT]

    def text_of(self, request_id: str) -> str:
        return "".join(
            frame["payload"]["content"]["text"]
            for frame in self.texts
            if isinstance(frame, dict) and frame["payload"]["request_id"] == request_id
        )

    def seqs_of(self, request_id: str) -> list[int]:
        return [
            frame["payload"]["text_stream_seq"]
            for frame in self.texts
            if isinstance(frame, dict) and frame["payload"]["request_id"] == request_id
        ]

    def count(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(f"bargein_{name}_total") or 0.0

    def close(self) -> None:
        self.outbox.die("the test is over")
        self.sock.close()
        self.peer.close()


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def make(**settings: Any) -> Pair:
        pairs.append(Pair(**settings))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


def nothing_follows() -> None:
    pass


# The fast path -----------------------------------------------------------------------------------


def test_a_frame_is_with_the_kernel_when_the_call_returns_while_nothing_is_queued(
    pair: Pair,
) -> None:
    written: list[float] = []
    pair.outbox.send_control(b'"one"', written.append)
    # No switch of greenlets lies between.
    assert len(written) == 1
    assert written[0] == pair.outbox.accepted_at
    assert pair.read_now() == ["one"]


def test_text_is_written_at_the_end_of_the_turn_in_which_it_was_put(pair: Pair) -> None:
    outlet = pair.outlet()
    outlet.put("Hello")
    assert pair.read_now() == []
    turn()
    pair.read_now()
    assert pair.text_of("req_1") == "Hello"
    assert outlet.delivered.text_chars == 5


def test_a_terminal_frame_takes_the_text_of_its_turn_along_and_goes_behind_it(pair: Pair) -> None:
    outlet = pair.outlet()
    written: list[float] = []
    outlet.put("Hello")
    outlet.finish(the_end("end"), note(written))
    assert len(written) == 1
    text, end = pair.read_now()
    assert text["payload"]["content"]["text"] == "Hello"
    assert end == "end"
    assert outlet.is_done
    turn()
    assert len(pair.read_now()) == 2  # the flush that was due found nothing


# Pieces and frames -------------------------------------------------------------------------------


def test_the_pieces_of_one_turn_become_one_frame(pair: Pair) -> None:
    outlet = pair.outlet()
    for piece in ("Hel", "lo", ", ", "world"):
        outlet.put(piece)
    turn()
    outlet.put("!")
    turn()
    first, second = pair.read_now()
    assert first["payload"]["content"]["text"] == "Hello, world"
    assert second["payload"]["content"]["text"] == "!"


@pytest.mark.parametrize("letter", ["a", "é", "你", "😀", '"', "\x00"])
def test_frames_carry_at_most_16_ki_code_points_and_no_number_is_left_out(
    pair: Pair, letter: str
) -> None:
    outlet = pair.outlet()
    text = letter * (2 * MAX_FRAME_CHARS + 1)
    outlet.put(text)
    turn()
    outlet.put("end")
    turn()
    frames = pair.read_texts(4)
    lengths = [len(frame["payload"]["content"]["text"]) for frame in frames]
    assert lengths == [MAX_FRAME_CHARS, MAX_FRAME_CHARS, 1, 3]
    assert pair.seqs_of("req_1") == [0, 1, 2, 3]
    assert pair.text_of("req_1") == text + "end"


def test_what_was_delivered_is_counted_in_code_points(pair: Pair) -> None:
    outlet = pair.outlet()
    outlet.put("aé你😀")  # one each, though 1 to 4 bytes and 1 or 2 units of UTF-16
    turn()
    assert outlet.delivered.text_chars == 4


def test_no_text_is_no_frame(pair: Pair) -> None:
    outlet = pair.outlet()
    outlet.put("")
    turn()
    outlet.put("a")
    turn()
    pair.read_now()
    assert pair.text_of("req_1") == "a"
    assert pair.seqs_of("req_1")[-1] == len(pair.texts) - 1


# Order -------------------------------------------------------------------------------------------


def test_control_goes_before_all_queued_data_but_behind_a_frame_that_was_begun(pair: Pair) -> None:
    first, second = pair.outlet("req_1"), pair.outlet("req_2")
    pair.begin_frame(first)
    first.put("A")
    turn()
    second.put("B")
    turn()
    first.finish(the_end("end"), nothing_follows)
    pair.outbox.send_control(b'"control 1"')
    pair.outbox.send_control(b'"control 2"')
    pair.read_until(lambda: "end" in pair.texts)
    words = [
        frame if isinstance(frame, str) else frame["payload"]["content"]["text"][:1]
        for frame in pair.texts
    ]
    head, tail = words[:-5], words[-5:]
    assert set(head) == {"b"}
    assert tail == ["control 1", "control 2", "A", "B", "end"]


def test_control_that_waited_goes_out_in_one_write_and_in_order(pair: Pair) -> None:
    pair.fill_kernel()
    written: list[float] = []
    for frame in (b'"ack"', b'"end 1"', b'"end 2"'):
        pair.outbox.send_control(frame, written.append)
    assert written == []
    assert pair.read_texts(3) == ["ack", "end 1", "end 2"]
    wait_until(lambda: len(written) == 3, "all of them are with the kernel")
    assert len(set(written)) == 1  # at the end of the same write


def test_control_stays_ahead_of_data_in_its_order_when_the_kernel_takes_nothing(pair: Pair) -> None:
    pair.fill_kernel()
    pair.outlet().put("data")
    turn()
    for number in range(2 * MAX_FRAMES_IN_A_WRITE + 1):
        pair.outbox.send_control(b"%d" % number)
    pair.outbox.send_control(b'"last"')
    texts = pair.read_texts(2 * MAX_FRAMES_IN_A_WRITE + 3)
    assert texts[:-1] == [*range(2 * MAX_FRAMES_IN_A_WRITE + 1), "last"]


def test_data_keeps_its_order_over_all_outlets(pair: Pair) -> None:
    outlets = [pair.outlet(f"req_{number}") for number in range(3)]
    pair.begin_frame(outlets[0])
    for number in range(30):
        outlets[number % 3].put(f"{number} ")
        turn()
    pair.read_until(lambda: "29 " in pair.text_of("req_2"))
    texts = [frame["payload"]["content"]["text"] for frame in pair.texts]
    assert texts[-30:] == [f"{number} " for number in range(30)]
    assert pair.seqs_of("req_1") == list(range(10))


def test_a_frame_that_is_put_while_one_is_reported_as_written_follows_it(pair: Pair) -> None:
    def then(word: bytes, *more: bytes) -> Callable[[float], None]:
        return lambda _at: pair.outbox.send_control(word, then(*more) if more else None)

    pair.outbox.send_control(b'"1"', then(b'"2"', b'"3"', b'"4"'))
    assert pair.read_now() == ["1", "2", "3", "4"]


def test_a_frame_is_reported_as_written_when_the_kernel_has_all_of_it(pair: Pair) -> None:
    outlet = pair.outlet()
    written: list[float] = []
    pair.fill_kernel()
    outlet.finish(the_end("t" * 100_000), note(written))
    pair.read_some(8192)
    turn()
    assert written == []
    assert not pair.texts
    pair.read_texts(1)
    assert len(written) == 1


# Purging -----------------------------------------------------------------------------------------


def test_shutting_an_outlet_drops_what_was_queued_and_what_was_not_yet_a_frame(pair: Pair) -> None:
    outlet, other = pair.outlet("req_1"), pair.outlet("req_2")
    pair.fill_kernel()
    other.put("kept")  # unbegun, but somebody else's
    turn()
    kept_bytes = pair.outbox._data_bytes
    assert kept_bytes > 0
    for text in ("A", "B", "C"):
        outlet.put(text)
        turn()
    outlet.finish(the_end("end"), lambda: pytest.fail("a purged frame was written"))
    outlet.put("not yet a frame")
    outlet.discard()
    outlet.put("too late")
    outlet.finish(the_end("too late"), lambda: pytest.fail("a late frame was written"))
    turn()
    assert pair.outbox._data_bytes == kept_bytes
    pair.outbox.send_control(b'"ack"')
    pair.read_texts(2)
    assert pair.texts[0] == "ack"  # before what was not begun
    assert pair.text_of("req_2") == "kept"
    assert outlet.delivered.text_chars == 0
    assert not outlet.is_done
    assert pair.count("frames_purged") == 4


def test_shutting_an_outlet_drops_its_frame_at_the_head_that_was_not_begun(pair: Pair) -> None:
    outlet = pair.outlet()
    pair.fill_kernel()
    outlet.put("never written")
    turn()
    assert pair.outbox.begun_frame(outlet) is None
    outlet.discard()
    assert pair.count("frames_purged") == 1
    pair.outbox.send_control(b'"ack"')
    assert pair.read_texts(1) == ["ack"]
    assert outlet.delivered.text_chars == 0


def test_shutting_an_outlet_finishes_its_begun_frame_and_counts_it_as_delivered(pair: Pair) -> None:
    outlet = pair.outlet()
    pair.begin_frame(outlet)
    outlet.put("queued")
    turn()
    outlet.discard()
    counted = outlet.delivered.text_chars
    pair.outbox.send_control(b'"ack"')
    pair.read_until(lambda: "ack" in pair.texts)
    assert len(pair.text_of("req_1")) == counted
    assert outlet.delivered.text_chars == counted  # and not once more when it was written
    assert "queued" not in pair.text_of("req_1")
    assert pair.count("frames_purged") == 1


def test_a_call_goes_behind_the_text_before_it_and_takes_the_next_number(pair: Pair) -> None:
    outlet = pair.outlet()
    written: list[float] = []
    outlet.put("text")
    outlet.put_call(look({"at": ["x"]}), note(written))
    assert len(written) == 1
    outlet.put("more")
    turn()
    text, call, more = pair.read_texts(3)
    assert (text["payload"]["content"], call["payload"]["content"]) == ({"text": "text"}, {})
    assert call["payload"]["function_call"] == {
        "name": "look",
        "parameters": {"at": ["x"]},
        "call_id": "call_1",
    }
    assert "function_call" not in more["payload"]
    assert pair.seqs_of("req_1") == [0, 1, 2]


def test_a_call_that_was_begun_when_its_outlet_is_shut_counts_at_once_and_once(pair: Pair) -> None:
    outlet = pair.outlet()
    written: list[float] = []
    outlet.put_call(look({"at": "x" * 300_000}), note(written))
    assert pair.outbox.begun_frame(outlet) is not None
    assert written == []
    outlet.discard()
    assert len(written) == 1
    assert len(pair.read_texts(1)) == 1
    assert len(written) == 1


def test_a_call_is_not_given_to_a_shut_outlet(pair: Pair) -> None:
    outlet = pair.outlet()
    outlet.discard()
    outlet.put_call(look({}), nothing_follows)
    turn()
    assert pair.read_now() == []


def test_a_reader_with_a_call_waits_beyond_the_bound(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(max_bytes=1000)
    outlet = pair.outlet()
    pair.begin_frame(outlet)
    call = look({"at": "x" * 2000})
    reader = gevent.spawn(outlet.put_call, call, nothing_follows)
    turn()
    assert outlet._is_blocked
    pair.read_until(lambda: any("function_call" in one["payload"] for one in pair.texts))
    reader.join(LIMIT)
    assert reader.successful()


def test_an_outlet_may_be_shut_twice(pair: Pair) -> None:
    outlet = pair.outlet()
    pair.begin_frame(outlet)
    outlet.discard()
    counted = outlet.delivered.text_chars
    outlet.discard()
    assert outlet.delivered.text_chars == counted


def test_a_terminal_frame_that_was_begun_cannot_be_held_back(pair: Pair) -> None:
    outlet = pair.outlet()
    written: list[float] = []
    outlet.finish(the_end("t" * 100_000), note(written))
    assert outlet.is_done
    assert written == []
    assert not outlet.discard()
    pair.read_texts(1)
    assert len(written) == 1
    assert outlet.is_done
    assert not outlet.discard()


def test_a_terminal_frame_that_waits_is_not_done(pair: Pair) -> None:
    outlet = pair.outlet()
    pair.fill_kernel()
    outlet.finish(the_end("end"), nothing_follows)
    assert not outlet.is_done


# Bounds ------------------------------------------------------------------------------------------


def test_without_a_bound_no_reader_waits(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(max_bytes=0)
    outlet = pair.outlet()
    pair.fill_kernel()
    for _ in range(200):
        outlet.put("x" * MAX_FRAME_CHARS)  # would block for ever
        turn()
    assert pair.outbox._data_bytes > 200 * MAX_FRAME_CHARS
    outlet.discard()
    assert pair.outbox._data_bytes == 0


def test_a_reader_waits_beyond_the_bound_and_goes_on_when_half_of_it_is_free(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(max_bytes=100_000)
    outlet = pair.outlet()
    pair.fill_kernel()
    outlet.put("x" * 200_000)
    turn()
    assert pair.outbox._data_bytes > 100_000
    assert not outlet._is_blocked
    reader = gevent.spawn(outlet.put, "last")
    turn()
    assert outlet._is_blocked
    levels = []
    while not reader.ready():
        levels.append(pair.outbox._data_bytes)
        gevent.socket.wait_read(pair.peer.fileno(), timeout=LIMIT)
        pair.read_some(4096)
        turn()
        turn()  # one for the writer, one for the reader whom it wakes
    assert min(levels) > 50_000 - 20_000  # the last look was at most a frame before it
    assert any(50_000 < level <= 100_000 for level in levels), "it woke as soon as there was room"
    assert not outlet._is_blocked
    pair.read_until(lambda: pair.text_of("req_1").endswith("last"))
    assert len(pair.text_of("req_1")) == 200_004
    assert pair.seqs_of("req_1") == list(range(len(pair.texts)))


def test_a_purge_makes_room_for_the_readers_of_others(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(max_bytes=50_000)
    first, second = pair.outlet("req_1"), pair.outlet("req_2")
    pair.fill_kernel()
    first.put("x" * 100_000)
    turn()
    reader = gevent.spawn(second.put, "Hello")
    turn()
    assert second._is_blocked
    first.discard()
    reader.get(timeout=LIMIT)
    pair.read_texts(1)
    assert pair.text_of("req_2") == "Hello"
    assert pair.text_of("req_1") == ""


def test_progress_of_the_client_is_the_requests_only_while_its_reader_waits(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(max_bytes=1)
    outlet = pair.outlet()
    assert outlet.progress_at() == 0.0
    pair.fill_kernel()
    outlet.put("x" * 100_000)
    turn()
    reader = gevent.spawn(outlet.put, "last")
    turn()
    before = outlet.progress_at()
    assert before == pair.outbox.accepted_at
    pair.read_some(16 * 1024)
    gevent.socket.wait_read(pair.peer.fileno(), timeout=LIMIT)
    pair.read_some(16 * 1024)
    turn()
    assert outlet.progress_at() > before
    pair.read_until(lambda: pair.text_of("req_1").endswith("last"))
    reader.get(timeout=LIMIT)
    assert outlet.progress_at() == 0.0


def test_a_client_that_does_not_read_its_control_frames_is_not_read_from(pair: Pair) -> None:
    pair.fill_kernel()
    pair.outbox.wait_for_room_for_control()  # does not wait
    for number in range(MAX_CONTROL_FRAMES + 10):
        pair.outbox.send_control(b"%d" % number)
    waiter = gevent.spawn(pair.outbox.wait_for_room_for_control)
    turn()
    assert not waiter.ready()
    pair.read_until(waiter.ready)
    assert pair.read_texts(MAX_CONTROL_FRAMES + 10) == list(range(MAX_CONTROL_FRAMES + 10))


# The deadline, and the end -----------------------------------------------------------------------


def test_a_client_that_takes_nothing_for_the_whole_time_is_dropped(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(write_timeout=0.05)
    pair.fill_kernel()
    began = time.monotonic()
    pair.outbox.send_control(b'"never read"')
    assert pair.died.wait(LIMIT)
    assert time.monotonic() - began >= 0.04
    assert pair.deaths == ["client too slow: took nothing for 0.05 s"]
    assert pair.count("slow_clients") == 1


def test_a_client_that_reads_slowly_but_steadily_is_not_dropped(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(write_timeout=0.25)
    outlet = pair.outlet()
    outlet.put("x" * 400_000)
    began = time.monotonic()
    while len(pair.text_of("req_1")) < 400_000:
        gevent.sleep(0.02)  # this is how slow it is
        assert pair.read_some(16 * 1024), pair.deaths
    assert time.monotonic() - began > 0.3  # more than the deadline, all in all
    assert pair.deaths == []


def test_without_a_deadline_a_client_may_take_its_time(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(write_timeout=0)
    pair.fill_kernel()
    pair.outbox.send_control(b'"late"')
    assert pair.read_texts(1) == ["late"]


def test_its_death_is_told_once_and_wakes_everybody(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(max_bytes=1)
    outlet = pair.outlet()
    pair.fill_kernel()
    outlet.put("x" * 2 * MAX_FRAME_CHARS)
    turn()
    readers = [gevent.spawn(pair.outlet(f"req_{number}").put, "x") for number in range(3)]
    for number in range(MAX_CONTROL_FRAMES + 1):
        pair.outbox.send_control(b"%d" % number)
    waiting: list[gevent.Greenlet[..., Any]] = [
        *readers,
        gevent.spawn(pair.outbox.wait_for_room_for_control),
    ]
    turn()
    assert not any(one.ready() for one in waiting)
    pair.outbox.die("the reason")
    pair.outbox.die("another reason")
    for one in waiting:
        one.get(timeout=LIMIT)
    assert pair.deaths == ["the reason"]
    assert pair.outbox._data_bytes == 0


def test_after_its_death_nothing_is_written_and_nothing_raises(pair: Pair) -> None:
    outlet = pair.outlet()
    outlet.put("in the turn of the death")
    pair.outbox.die("the reason")
    outlet.finish(the_end("end"), lambda: pytest.fail("written"))
    pair.outbox.send_control(b'"control"', lambda _at: pytest.fail("written"))
    pair.outbox.ping()
    pair.outbox.close(1000, "bye")
    outlet.discard()
    turn()
    assert pair.read_some() == 0  # the client sees the end, and nothing before it
    assert pair.deaths == ["the reason"]


def test_a_client_that_is_gone_is_noticed_by_the_next_write(pair: Pair) -> None:
    pair.peer.close()
    pair.outbox.send_control(b'"anybody?"')
    assert len(pair.deaths) == 1
    assert pair.deaths[0].startswith("connection lost: ")


def test_a_client_that_goes_while_it_is_waited_for_is_noticed_at_once(pair: Pair) -> None:
    pair.fill_kernel()
    pair.outbox.send_control(b'"anybody?"')
    turn()
    pair.peer.close()
    assert pair.died.wait(LIMIT)
    assert pair.count("slow_clients") == 0


def test_no_writer_outlives_its_connection(pair: Pair) -> None:
    pair.fill_kernel()
    pair.outbox.send_control(b'"never read"')
    turn()
    (writer,) = writers()
    # As the connection's own greenlet does it, in one go.
    pair.outbox.die("closed by the client")
    pair.sock.close()
    wait_until(lambda: writer.dead, "the writer has ended")
    assert pair.deaths == ["closed by the client"]
    assert pair.count("slow_clients") == 0, "it waited for a socket that was closed"


def writers() -> list[gevent.Greenlet[..., Any]]:
    return [
        one
        for one in gc.get_objects()
        if isinstance(one, gevent.Greenlet)
        and not one.dead
        and getattr(getattr(one, "_run", None), "__name__", "") == "_write_rest"
    ]


# Closing -----------------------------------------------------------------------------------------


def close_codes(pair: Pair) -> list[int]:
    return [
        int.from_bytes(bytes(frame.data)[:2], "big")
        for frame in pair.frames
        if frame.opcode is Opcode.CLOSE
    ]


def test_closing_sends_control_then_the_close_frame_and_no_data(pair: Pair) -> None:
    outlet = pair.outlet()
    pair.begin_frame(outlet)
    for text in ("A", "B"):
        outlet.put(text)
        turn()
    pair.outbox.send_control(b'"ack"')
    pair.outbox.send_control(b'"SHUTDOWN"')
    pair.outbox.close(1012, "going away")
    outlet.put("too late")
    outlet.finish(the_end("too late"), lambda: pytest.fail("written"))
    turn()
    pair.read_until(lambda: bool(close_codes(pair)))
    assert close_codes(pair) == [1012]
    assert pair.texts[-2:] == ["ack", "SHUTDOWN"]
    assert set(pair.text_of("req_1")) == {"b"}
    assert pair.frames[-1].opcode is Opcode.CLOSE


def test_closing_drops_a_data_frame_at_the_head_that_was_not_begun(pair: Pair) -> None:
    outlet = pair.outlet()
    pair.fill_kernel()
    outlet.finish(the_end("end"), lambda: pytest.fail("a dropped frame was written"))
    assert pair.outbox._data_bytes == len(b'"end"')
    assert pair.outbox.begun_frame(outlet) is None
    pair.outbox.send_control(b'"SHUTDOWN"')
    pair.outbox.close(1012, "going away")
    pair.read_until(lambda: bool(close_codes(pair)))
    assert pair.texts == ["SHUTDOWN"]
    assert close_codes(pair) == [1012]
    assert not outlet.is_done


def test_closing_keeps_a_control_frame_at_the_head_that_was_not_begun(pair: Pair) -> None:
    outlet = pair.outlet()
    written: list[float] = []
    pair.fill_kernel()
    pair.outbox.send_control(b'"ack"', written.append)
    outlet.put("queued")
    turn()
    pair.outbox.close(1012, "going away")
    pair.read_until(lambda: bool(close_codes(pair)))
    assert pair.texts == ["ack"]
    assert len(written) == 1
    assert close_codes(pair) == [1012]


def test_closing_writes_the_close_frame_at_once_while_nothing_is_queued(pair: Pair) -> None:
    pair.outbox.close(1000, "bye")
    pair.read_now()
    assert close_codes(pair) == [1000]


def test_closing_twice_sends_one_close_frame(pair: Pair) -> None:
    pair.fill_kernel()
    pair.outbox.send_control(b'"ack"')
    pair.outbox.close(1012, "first")
    pair.outbox.close(1000, "second")
    pair.read_until(lambda: bool(close_codes(pair)))
    pair.read_now()
    assert close_codes(pair) == [1012]


@pytest.mark.parametrize("full", [False, True])
def test_nothing_follows_the_close_frame(pair: Pair, full: bool) -> None:
    if full:
        pair.fill_kernel()
        pair.outbox.send_control(b'"ack"')
    pair.outbox.close(1000, "bye")
    pair.outbox.send_control(b'"too late"')
    pair.outbox.ping()
    pair.outbox.send_control(b'"too late"')
    pair.read_until(lambda: bool(close_codes(pair)))
    turn()
    pair.read_now()
    assert pair.frames[-1].opcode is Opcode.CLOSE


def test_closing_wakes_the_readers_that_wait(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(max_bytes=1000)
    outlet = pair.outlet()
    pair.fill_kernel()
    outlet.put("x" * 2 * MAX_FRAME_CHARS)
    turn()
    reader = gevent.spawn(outlet.put, "y")
    turn()
    assert outlet._is_blocked
    pair.outbox.close(1012, "going away")
    reader.get(timeout=LIMIT)
    pair.read_until(lambda: bool(close_codes(pair)))
    assert close_codes(pair) == [1012]


def test_a_ping_goes_between_frames_and_never_into_one(pair: Pair) -> None:
    outlet = pair.outlet()
    pair.begin_frame(outlet)
    outlet.put("A")
    turn()
    pair.outbox.ping()
    pair.read_until(lambda: pair.text_of("req_1").endswith("A"))
    kinds = [frame.opcode for frame in pair.frames]
    assert kinds.count(Opcode.PING) == 1
    assert kinds.index(Opcode.PING) == len(kinds) - 2  # behind the begun frame, before the data


# Readers that are killed -------------------------------------------------------------------------


def test_a_reader_that_is_killed_while_its_outlet_waits_leaves_no_half_frame(
    make_pair: Callable[..., Pair],
) -> None:
    pair = make_pair(max_bytes=10_000)
    outlet = pair.outlet()

    def read() -> None:
        while True:
            outlet.put("0123456789" * 500)
            gevent.sleep(0)

    pair.begin_frame(outlet)
    reader = gevent.spawn(read)
    while not outlet._is_blocked:
        turn()
    assert pair.outbox.begun_frame(outlet) is not None
    outlet.discard()
    reader.kill(timeout=LIMIT)
    assert not outlet._is_blocked
    pair.outbox.send_control(b'"ack"')
    pair.read_until(lambda: "ack" in pair.texts)  # which checks that all of it are frames
    assert len(pair.text_of("req_1")) == outlet.delivered.text_chars
    assert pair.seqs_of("req_1") == list(range(len(pair.texts) - 1))
    # The connection serves the next request.
    following = pair.outlet("req_2")
    following.put("Hello")
    following.finish(the_end("end"), nothing_follows)
    pair.read_until(lambda: "end" in pair.texts)
    assert pair.text_of("req_2") == "Hello"


def test_a_killed_reader_does_not_hold_back_the_others(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(max_bytes=10_000)
    first, second = pair.outlet("req_1"), pair.outlet("req_2")
    pair.fill_kernel()
    first.put("x" * 60_000)
    turn()
    readers = [gevent.spawn(first.put, "y"), gevent.spawn(second.put, "z")]
    turn()
    assert first._is_blocked
    assert second._is_blocked
    readers[0].kill(timeout=LIMIT)
    assert not first._is_blocked
    assert second._is_blocked
    pair.read_until(lambda: pair.text_of("req_2") == "z")
    readers[1].get(timeout=LIMIT)
