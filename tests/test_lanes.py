"""The lanes of the event loop: what runs before what, and that nothing is forgotten."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import gevent.hub
import gevent.socket
import pytest

from actors.loop.lanes import SLICE_SECONDS, Lanes, PlainLanes, lanes
from actors.loop.readable import Readable
from tests.harness.client import wait_until

LIMIT = 5.0


@pytest.fixture
def pairs() -> Iterator[list[tuple[gevent.socket.socket, gevent.socket.socket]]]:
    made = [gevent.socket.socketpair() for _ in range(20)]
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


def in_the_poll_phase(function: Callable[..., object], *args: object) -> None:
    """Call it in the hub, while events are handled, as the callback of an io watcher is."""
    timer = gevent.get_hub().loop.timer(0)
    timer.start(lambda: function(*args))
    done = gevent.event.Event()
    last = gevent.get_hub().loop.timer(0.001)
    last.start(done.set)
    assert done.wait(LIMIT)
    timer.close()
    last.close()


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_control_runs_before_the_data_that_was_reported_with_it(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    order: list[str] = []

    def read(sock: gevent.socket.socket) -> None:
        readable = lanes().readable(sock.fileno())
        readable.wait()
        readable.close()
        if not order:
            # Long enough that the others are still queued when control is asked for.
            spin(0.002)
        order.append("data")
        if len(order) == 1:
            lanes().run_next(order.append, "control")

    readers = [gevent.spawn(read, one) for one, _ in pairs]
    gevent.sleep(0)
    for _, other in pairs:
        other.send(b"x")
    gevent.joinall(readers, LIMIT, raise_error=True)
    assert order == ["data", "control", *["data"] * (len(pairs) - 1)]


def test_a_client_is_read_between_two_slices_of_data(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    order: list[str] = []

    def read(sock: gevent.socket.socket) -> None:
        readable = lanes().readable(sock.fileno())
        readable.wait()
        readable.close()
        order.append("data")
        spin(0.002)  # more than a slice

    def read_client(sock: gevent.socket.socket) -> None:
        readable = lanes().readable_control(sock.fileno())
        readable.wait()
        readable.close()
        order.append("client")

    (mine, client), *others = pairs
    listener = gevent.spawn(read_client, mine)
    readers = [gevent.spawn(read, one) for one, _ in others]
    gevent.sleep(0)
    for _, other in others:
        other.send(b"x")
    # The client sends while the first slice of data runs.
    in_the_poll_phase(client.send, b"INTERRUPT")
    gevent.joinall([listener, *readers], LIMIT, raise_error=True)
    assert order.index("client") <= 2
    assert order.count("data") == len(others)


def test_every_greenlet_that_waits_for_a_turn_gets_one() -> None:
    turns: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            lanes().wait_turn()
            spin(0.001)  # more than a slice
            turns.append(number)

    workers = [gevent.spawn(work, number) for number in range(5)]
    gevent.joinall(workers, LIMIT, raise_error=True)
    assert sorted(turns) == sorted([*range(5)] * 3)


def test_a_greenlet_that_is_killed_while_it_waits_for_its_turn_holds_up_no_other() -> None:
    killed = gevent.spawn(lanes().wait_turn)
    other = gevent.spawn(lanes().wait_turn)
    gevent.sleep(0)
    killed.kill(block=False)
    other.join(LIMIT)
    assert other.successful()
    assert killed.dead


@pytest.mark.parametrize("phase", ["poll", "callbacks"])
def test_control_that_raises_does_not_keep_the_next_from_running(
    phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = gevent.event.Event()

    def broken() -> None:
        raise RuntimeError("broken")

    def both() -> None:
        lanes().run_next(broken)
        lanes().run_next(done.set)

    if phase == "poll":
        in_the_poll_phase(both)
    else:
        both()
    assert done.wait(LIMIT)
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_what_control_asks_of_gevents_loop_runs_without_another_event() -> None:
    """Asked for just before a poll, it would wait until the poll returns."""
    done = gevent.event.Event()
    loop = gevent.get_hub().loop
    loop.run_callback(lambda: lanes().run_next(loop.run_callback, done.set))
    started = time.monotonic()
    assert done.wait(LIMIT)
    assert time.monotonic() - started < LIMIT / 2


def test_a_report_that_another_report_asks_for_runs_after_the_next_poll() -> None:
    """Without another event, too: polls must not block meanwhile."""
    order: list[str] = []
    done = gevent.event.Event()

    def report() -> None:
        order.append("report")
        lanes().run_after_poll(next_report)
        lanes().run_next(order.append, "control")

    def next_report() -> None:
        order.append("next report")
        lanes().run_after_poll(done.set)

    started = time.monotonic()
    lanes().run_after_poll(report)
    assert done.wait(LIMIT)
    assert time.monotonic() - started < LIMIT / 2
    assert order == ["report", "control", "next report"]


def test_data_gives_way_to_a_client_that_sends_right_after_control(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    order: list[str] = []

    def read(sock: gevent.socket.socket, name: str, readable: Readable) -> None:
        readable.wait()
        readable.close()
        order.append(name)
        if name == "first client":
            lanes().run_next(order.append, "control")
            pairs[1][1].send(b"INTERRUPT")

    waits = [lanes().readable_control, lanes().readable_control, lanes().readable]
    names = ["first client", "second client", "data"]
    readers = [
        gevent.spawn(read, mine, name, wait(mine.fileno()))
        for (mine, _), name, wait in zip(pairs[:3], names, waits, strict=True)
    ]
    gevent.sleep(0)
    pairs[2][1].send(b"x")
    pairs[0][1].send(b"INTERRUPT")
    gevent.joinall(readers, LIMIT, raise_error=True)
    assert order == ["first client", "control", "second client", "data"]


def test_a_greenlet_that_waits_for_its_turn_gets_a_slice_of_its_own(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    """A client is read between a reader of data and such a greenlet, and between two of them."""
    order: list[str] = []
    done = gevent.event.Event()

    def client(sock: gevent.socket.socket, readable: Readable) -> None:
        for _ in range(2):
            readable.wait()
            sock.recv(1)
            order.append("client")

    def read(readable: Readable) -> None:
        readable.wait()
        order.append("data")
        gevent.spawn(wait_turn)
        gevent.spawn(wait_turn)
        pairs[0][1].send(b"x")

    def wait_turn() -> None:
        lanes().wait_turn()
        order.append("turn")
        if order.count("turn") == 1:
            pairs[0][1].send(b"x")
        else:
            done.set()

    readables = [lanes().readable_control(pairs[0][0].fileno())]
    readables.append(lanes().readable(pairs[1][0].fileno()))
    listener = gevent.spawn(client, pairs[0][0], readables[0])
    reader = gevent.spawn(read, readables[1])
    gevent.sleep(0)
    pairs[1][1].send(b"x")
    for one in (listener, reader):
        one.join(LIMIT)
        assert one.successful()
    assert done.wait(LIMIT)
    assert order == ["data", "client", "turn", "client", "turn"]
    for readable in readables:
        readable.close()


@pytest.mark.parametrize("readers_first", [True, False])
def test_readers_come_before_deferred_tasks_and_starve_none(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]], readers_first: bool
) -> None:
    mine, other = pairs[0]
    readable = lanes().readable(mine.fileno())
    order: list[str] = []
    done = gevent.event.Event()
    rounds = 10

    def read() -> None:
        for _ in range(rounds):
            readable.wait()
            mine.recv(1)
            order.append("data")
            other.send(b"x")  # there is always more to read
            spin(SLICE_SECONDS)

    def task() -> None:
        order.append("task")
        spin(SLICE_SECONDS)

    def defer() -> None:
        for _ in range(5 * rounds):
            lanes().run_deferred(task)
        lanes().run_deferred(done.set)

    if not readers_first:
        defer()
    reader = gevent.spawn(read)
    other.send(b"x")
    if readers_first:
        defer()
    assert done.wait(2 * LIMIT)
    assert reader.successful()
    # While there is something to read, one task runs for each read, however many wait.
    first, last = order.index("data"), len(order) - order[::-1].index("data")
    assert abs(order[first:last].count("task") - rounds) <= 2
    readable.close()


def test_reports_run_after_all_control_and_before_data() -> None:
    order: list[str] = []
    done = gevent.event.Event()

    def on_turn() -> None:
        lanes().run_deferred(order.append, "books")
        lanes().run_after_poll(order.append, "report")
        lanes().run_next(order.append, "control")
        lanes().run_next(lambda: lanes().run_next(order.append, "control's control"))
        lanes().run_deferred(done.set)

    in_the_poll_phase(on_turn)
    assert done.wait(LIMIT)
    assert order == ["control", "control's control", "report", "books"]


def test_control_that_has_arrived_by_then_runs_before_reports() -> None:
    """Two clients interrupt at once: both streams are closed before either gets its ack."""
    order: list[str] = []
    done = gevent.event.Event()

    def interrupt(sock: gevent.socket.socket, name: str) -> None:
        readable = lanes().readable_control(sock.fileno())
        readable.wait()
        readable.close()
        order.append(f"close {name}")
        lanes().run_after_poll(order.append, f"ack {name}")
        if name == "first":
            other[1].send(b"x")
        else:
            lanes().run_deferred(done.set)

    first, other = gevent.socket.socketpair(), gevent.socket.socketpair()
    both = [gevent.spawn(interrupt, *one) for one in ((first[0], "first"), (other[0], "second"))]
    gevent.sleep(0)
    first[1].send(b"x")
    gevent.joinall(both, LIMIT, raise_error=True)
    assert done.wait(LIMIT)
    assert order == ["close first", "close second", "ack first", "ack second"]
    for sock in (*first, *other):
        sock.close()


@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_runs_after_acks_runs_right_after_them_and_before_data(before: int) -> None:
    """Whether or not data has just given way, which it does once."""
    order: list[str] = []
    done = gevent.event.Event()

    def interrupt() -> None:
        lanes().run_after_acks(order.append, "free")
        lanes().run_after_poll(report)

    def report() -> None:
        order.append("report")
        lanes().run_next(lambda: lanes().run_next(order.append, "ack"))

    def on_turn(polls: int) -> None:
        if polls:
            lanes().run_after_poll(on_turn, polls - 1)
            lanes().run_next(lambda: None)
        else:
            lanes().run_next(interrupt)

    def data() -> None:
        order.append("data")
        spin(SLICE_SECONDS)  # a slice of its own

    for _ in range(20):
        lanes().run_deferred(data)
    lanes().run_deferred(done.set)
    in_the_poll_phase(on_turn, before)
    assert done.wait(LIMIT)
    at = order.index("report")
    assert "data" in order[at:]
    assert order[at : at + 3] == ["report", "ack", "free"]


def test_what_runs_after_acks_runs_before_data_of_the_same_poll(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    mine, other = pairs[0]
    order: list[str] = []
    readable = lanes().readable(mine.fileno())

    def read() -> None:
        readable.wait()
        order.append("data")

    def close_and_send() -> None:
        lanes().run_after_acks(order.append, "free")
        other.send(b"x")

    reader = gevent.spawn(read)
    gevent.sleep(0)
    in_the_poll_phase(close_and_send)
    reader.join(LIMIT)
    readable.close()
    assert order == ["free", "data"]


def test_control_without_end_does_not_hold_up_data() -> None:
    """A client that sends in each iteration of the loop must not stop the answers of all others."""
    loop: Any = gevent.get_hub().loop
    noise = loop.check(priority=loop.MAXPRI)
    noise.start(lambda: lanes().run_next(lambda: None))
    try:
        with gevent.Timeout(LIMIT):
            for _ in range(20):
                lanes().wait_turn()
    finally:
        noise.stop()
        noise.close()


def test_the_loop_sleeps_when_all_is_done() -> None:
    """Polls block again when nothing is queued: otherwise the loop would spin."""
    done = gevent.event.Event()
    lanes().run_next(done.set)
    lanes().run_after_poll(done.set)
    lanes().run_deferred(done.set)
    assert lanes()._awake.active
    wait_until(lambda: not lanes()._awake.active, "the loop may sleep")


def test_data_that_no_reader_waits_for_does_not_keep_the_loop_awake(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    mine, other = pairs[0]
    readable = lanes().readable(mine.fileno())
    other.send(b"x")
    readable.wait()  # and then it is not read, as when its client is slow
    wait_until(lambda: not readable._watcher.active, "the loop may sleep")
    with gevent.Timeout(LIMIT):
        readable.wait()  # the data is still there
    readable.close()


def test_an_error_can_be_thrown_into_a_waiting_reader_which_may_wait_again(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    mine, other = pairs[0]
    readable = lanes().readable(mine.fileno())
    caught: list[BaseException] = []

    def read() -> None:
        try:
            readable.wait()
        except LookupError as error:
            caught.append(error)
        readable.wait()

    reader = gevent.spawn(read)
    gevent.sleep(0)
    error = LookupError("stop")
    in_the_poll_phase(lanes().throw, reader, error)
    assert caught == [error]
    assert not reader.dead
    other.send(b"x")
    reader.join(LIMIT)
    assert reader.successful()
    readable.close()
    assert not lanes()._waiting


def test_an_error_can_be_thrown_into_a_greenlet_that_waits_elsewhere_or_has_not_started() -> None:
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            gevent.event.Event().wait()
        except LookupError as error:
            caught.append(error)

    waiter, beginner = gevent.spawn(wait), gevent.Greenlet(wait)
    gevent.sleep(0)
    error = LookupError("stop")
    in_the_poll_phase(lanes().throw, waiter, error)
    assert waiter.successful()
    assert caught == [error]
    in_the_poll_phase(lanes().throw, beginner, gevent.GreenletExit())
    assert beginner.dead


def test_a_reader_is_resumed_once_for_what_has_arrived_however_long_it_is_queued(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    order: list[int] = []

    def read(number: int, sock: gevent.socket.socket) -> None:
        sock.setblocking(False)
        readable = lanes().readable(sock.fileno())
        try:
            while True:
                readable.wait()
                assert sock.recv(100) == b"x"
                order.append(number)
                spin(0.002)  # the others stay queued over several iterations of the loop
        finally:
            readable.close()

    readers = [gevent.spawn(read, number, mine) for number, (mine, _) in enumerate(pairs)]
    gevent.sleep(0)
    in_the_poll_phase(lambda: [other.send(b"x") for _, other in pairs])
    wait_until(lambda: len(order) == len(pairs), "all have read")
    lanes().wait_turn()  # a reader that is resumed once more finds nothing, and raises
    assert not any(reader.dead for reader in readers)
    gevent.killall(readers)
    assert sorted(order) == [*range(len(pairs))]


def test_without_priorities_what_follows_a_close_runs_in_order_of_arrival() -> None:
    """As on Windows, where gevent's loop has none."""
    plain = PlainLanes()
    order: list[str] = []
    done = gevent.event.Event()

    def interrupt() -> None:
        plain.run_after_acks(order.append, "free")
        plain.run_after_poll(report)
        order.append("close")

    def report() -> None:
        order.append("report")
        plain.run_next(lambda: plain.run_next(order.append, "control"))
        plain.run_deferred(order.append, "data")
        plain.run_deferred(done.set)

    plain.run_next(interrupt)
    plain.wait_for_control()
    assert order == ["close"]
    plain.wait_turn()
    assert done.wait(LIMIT)
    assert order == ["close", "report", "free", "control", "data"]


def test_without_priorities_a_reader_waits_and_an_error_can_be_thrown_into_it(
    pairs: list[tuple[gevent.socket.socket, gevent.socket.socket]],
) -> None:
    plain = PlainLanes()
    mine, other = pairs[0]
    readables = [plain.readable(mine.fileno()), plain.readable_control(mine.fileno())]
    caught: list[BaseException] = []

    def read() -> None:
        try:
            readables[0].wait()
        except LookupError as error:
            caught.append(error)
        for readable in readables:
            readable.wait()

    reader = gevent.spawn(read)
    gevent.sleep(0)
    error = LookupError("stop")
    in_the_poll_phase(plain.throw, reader, error)
    assert caught == [error]
    assert not reader.dead
    other.send(b"x")
    reader.join(LIMIT)
    assert reader.successful()
    for readable in readables:
        readable.close()


def test_each_loop_has_lanes_of_its_own() -> None:
    seen: list[Lanes] = []

    def look() -> None:
        seen.append(lanes())

    for _ in range(3):
        gevent.get_hub().threadpool.apply(look)
    assert len(seen) == 3
    assert lanes() not in seen
    assert lanes() is lanes()
