"""What one client sends slows nobody else, whatever it is: it is bounded, and read in slices."""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import gevent
import gevent.event
import pytest
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol

import gateway.server.connection
import gateway.server.server
from actors.loop import lanes as lanes_module
from actors.loop.lanes import lanes
from gateway.app import Gateway
from gateway.server.connection import MAX_FRAGMENTS
from gateway.server.frame_slices import MAX_FRAMES
from gateway.server.outbox import Outbox
from gateway.wire.frames import MAX_TEXT_BYTES, PATH
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.provider_process import ProviderProcess

MakeGateway: TypeAlias = Callable[..., Gateway]

LIMIT = 10.0


def handshake(port: int) -> bytes:
    return (
        f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def frame(opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin=fin).serialize(mask=True)


class Raw:
    """A connection on which bytes are sent as they are."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), LIMIT)
        self.port = port

    def answer(self, data: bytes) -> bytes:
        """Send it, and read until the server closes the connection."""
        self.sock.sendall(data)
        return self.rest()

    def rest(self) -> bytes:
        read = b""
        try:
            while data := self.sock.recv(65536):
                read += data
        except ConnectionResetError:
            pass  # closed with bytes of ours unread
        return read

    def open(self) -> None:
        self.sock.sendall(handshake(self.port))
        read = b""
        while not read.endswith(b"\r\n\r\n"):
            read += self.sock.recv(1)
        assert read.startswith(b"HTTP/1.1 101")

    def closed_with(self) -> int:
        """Read until the close frame; returns its code."""
        read = self.rest()
        at = read.rindex(b"\x88")
        (code,) = struct.unpack("!H", read[at + 2 : at + 4])
        return int(code)


@pytest.fixture
def raw(gateway: Gateway) -> Iterator[Raw]:
    raw = Raw(gateway.server.port)
    yield raw
    raw.sock.close()


# Bytes behind a request

GET = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
BEHIND = {
    "nothing": b"",
    "another_request": GET,
    "a_carriage_return": b"\r\n",
    "a_nul": b"\x00",
    "a_frame": frame(Opcode.PING, b"x"),
    "a_close": frame(Opcode.CLOSE, b"\x03\xe8"),
    "a_frame_that_breaks_the_protocol": b"\xff\xff\xff",
    "much": b"\x81\xfe" * 20_000,
}


@pytest.mark.parametrize("name", BEHIND)
def test_bytes_behind_a_request_do_not_change_its_answer(
    raw: Raw, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raw.answer(GET + BEHIND[name]).startswith(b"HTTP/1.1 200 OK\r\n")
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", BEHIND)
def test_bytes_behind_a_refused_request_do_not_change_its_refusal(
    raw: Raw, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = GET.replace(b"127.0.0.1", b"evil.example")
    assert raw.answer(refused + BEHIND[name]).startswith(b"HTTP/1.1 403 ")
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["a_nul", "a_frame_that_breaks_the_protocol", "much"])
def test_bytes_behind_a_handshake_are_frames(
    raw: Raw, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw.sock.sendall(handshake(raw.port) + BEHIND[name])
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.rest().startswith(b"HTTP/1.1 101 ")
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("cut", [1, 30, 150, -1])
def test_a_ping_behind_a_handshake_is_answered_behind_it(raw: Raw, cut: int) -> None:
    data = handshake(raw.port) + frame(Opcode.PING, b"early")
    raw.sock.sendall(data[:cut])
    raw.sock.sendall(data[cut:] + frame(Opcode.CLOSE, b"\x03\xe8"))
    read = raw.rest()
    assert read.startswith(b"HTTP/1.1 101 ")
    assert read.partition(b"\r\n\r\n")[2].startswith(b"\x8a\x05early")


# What one message may cost


def test_a_message_in_too_many_fragments_is_refused(raw: Raw) -> None:
    raw.open()
    more = frame(Opcode.CONT, b"xx", fin=False)
    raw.sock.sendall(frame(Opcode.TEXT, b"xx", fin=False) + more * MAX_FRAGMENTS)
    assert raw.closed_with() == 1009


def test_empty_fragments_count(raw: Raw) -> None:
    raw.open()
    more = frame(Opcode.CONT, fin=False)
    raw.sock.sendall(frame(Opcode.BINARY, fin=False) + more * MAX_FRAGMENTS)
    assert raw.closed_with() == 1009


def test_as_many_fragments_as_may_be_are_one_message(client: Client) -> None:
    message = json.dumps(
        {
            "version": "1.0",
            "msg_type": "HEALTH_CHECK",
            "session_id": None,
            "payload": {"check_fields": ["status"] * 200},
            "timestamp": 1,
        }
    ).encode()
    assert len(message) > MAX_FRAGMENTS
    first, *rest = [message[at : at + 1] for at in range(MAX_FRAGMENTS - 1)]
    last = message[MAX_FRAGMENTS - 1 :]
    client.send_raw(
        frame(Opcode.TEXT, first, fin=False)
        + b"".join(frame(Opcode.CONT, part, fin=False) for part in rest)
        + frame(Opcode.CONT, last)
    )
    client.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")


@pytest.mark.parametrize("pieces", [1, 5])
def test_before_registration_a_large_message_is_refused(raw: Raw, pieces: int) -> None:
    raw.open()
    part = b"x" * (MAX_TEXT_BYTES // pieces)
    for number in range(pieces):
        opcode = Opcode.CONT if number else Opcode.TEXT
        raw.sock.sendall(frame(opcode, part, fin=False))
    raw.sock.sendall(frame(Opcode.CONT, b"x" * pieces))
    assert raw.closed_with() == 1009


# How long a client may take


def tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at every connection as often as the shortest limit asks for."""
    monkeypatch.setattr(gateway.server.server, "CLOSE_SECONDS", 0.2)


def test_a_client_that_neither_registers_nor_asks_is_closed(
    monkeypatch: pytest.MonkeyPatch, make_gateway: MakeGateway
) -> None:
    tick(monkeypatch)
    monkeypatch.setattr(gateway.server.connection, "REGISTER_SECONDS", 0.3)
    port = make_gateway().server.port
    with Client(port) as registered:
        idle = Client(port, register=False)
        assert idle.wait_closed() == 1008
        registered.send("HEALTH_CHECK", {})
        registered.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")


def test_a_client_that_asks_for_health_may_stay(
    monkeypatch: pytest.MonkeyPatch, make_gateway: MakeGateway
) -> None:
    tick(monkeypatch)
    monkeypatch.setattr(gateway.server.connection, "REGISTER_SECONDS", 0.4)
    port = make_gateway().server.port
    with Client(port, register=False) as asking, Client(port, register=False) as idle:
        gone = gevent.spawn(idle.wait_closed)
        while not gone.ready():
            asking.send("HEALTH_CHECK", {})
            asking.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")
            gevent.sleep(0.05)
        assert asking.register().msg_type == "REGISTER_ACK"


def test_one_to_whom_no_close_frame_can_be_written_is_dropped_all_the_same(
    monkeypatch: pytest.MonkeyPatch, make_gateway: MakeGateway
) -> None:
    tick(monkeypatch)
    monkeypatch.setattr(gateway.server.connection, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(gateway.server.connection, "REGISTER_SECONDS", 0.3)
    asked: list[str] = []
    # It stays in the outbox of a client that reads nothing.
    monkeypatch.setattr(Outbox, "close", lambda _self, _code, reason: asked.append(reason))
    with Client(make_gateway().server.port, register=False) as client:
        assert client.wait_closed() is None
    assert asked == ["no REGISTER within 0.3 s"]


UNFINISHED = {
    "half_a_header": b"\x81",
    "half_a_payload": frame(Opcode.TEXT, b"x" * 100)[:-1],
    "a_fragment": frame(Opcode.TEXT, b"{", fin=False),
    "an_empty_fragment": frame(Opcode.BINARY, b"", fin=False),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_message_that_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch, make_gateway: MakeGateway, name: str
) -> None:
    tick(monkeypatch)
    monkeypatch.setattr(gateway.server.connection, "MESSAGE_SECONDS", 0.3)
    port = make_gateway().server.port
    with Client(port) as other, Client(port) as client:
        client.send_raw(UNFINISHED[name])
        assert client.wait_closed() == 1008
        other.send("HEALTH_CHECK", {})
        other.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")


# A flood is read in slices

FLOODS: dict[str, bytes] = {
    "pings": frame(Opcode.PING) * 500,
    "pongs": frame(Opcode.PONG) * 500,
    "empty_messages": frame(Opcode.TEXT) * 500,
    "bad_messages": frame(Opcode.TEXT, b"{") * 500,
    "fragments": frame(Opcode.TEXT, b"x", fin=False) + frame(Opcode.CONT, b"xx", fin=False) * 500,
}


@pytest.mark.parametrize("is_registered", [False, True])
@pytest.mark.parametrize("name", FLOODS)
def test_between_the_slices_of_a_flood_the_loop_polls(
    gateway: Gateway, name: str, is_registered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FLOODS[name]
    polls = 0
    fed: Counter[int] = Counter()  # bytes by poll
    receive = ServerProtocol.receive_data

    def receive_data(self: ServerProtocol, piece: bytes) -> None:
        fed[polls] += len(piece)
        receive(self, piece)

    def count() -> None:
        nonlocal polls
        polls += 1

    check: Any = gevent.get_hub().loop.check()
    with Client(gateway.server.port, register=is_registered) as client:
        monkeypatch.setattr(ServerProtocol, "receive_data", receive_data)
        check.start(count)
        try:
            client.send_raw(data)
            wait_until(lambda: fed.total() == len(data), "all of it was read", LIMIT)
        finally:
            check.stop()
            check.close()
    assert max(fed.values()) <= MAX_FRAMES * 8  # no frame here is longer


def test_who_floods_is_slowed_down_and_not_disconnected(
    monkeypatch: pytest.MonkeyPatch, make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    monkeypatch.setattr(gateway.server.connection, "FRAMES_PER_SECOND", 200)
    with Client(make_gateway().server.port) as client:
        began = gevent.get_hub().loop.now()
        client.send_raw(frame(Opcode.PONG) * 300)  # 100 more than may come at once
        request_id = client.request(provider.fresh(scripts.answer(["still ", "here"])))
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        assert gevent.get_hub().loop.now() - began > 0.4


# What was deferred


def test_while_too_much_is_deferred_the_unregistered_are_not_read(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = lanes()
    with (
        Client(gateway.server.port) as registered,
        Client(gateway.server.port, register=False) as stranger,
    ):
        is_behind = True
        monkeypatch.setattr(type(lane), "is_behind", property(lambda _self: is_behind))
        waiting = gevent.event.Event()
        goes_on = gevent.event.Event()
        wait_deferred = type(lane).wait_deferred

        def wait(self: Any) -> None:
            waiting.set()
            goes_on.wait()
            wait_deferred(self)

        monkeypatch.setattr(type(lane), "wait_deferred", wait)
        stranger.send("HEALTH_CHECK", {})
        stranger.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")  # was waiting for it
        stranger.send("HEALTH_CHECK", {})
        assert waiting.wait(LIMIT)
        registered.send("HEALTH_CHECK", {})
        registered.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")
        with pytest.raises(TimeoutError):
            stranger.read_within(0.05)
        is_behind = False
        goes_on.set()
        stranger.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")


def test_many_that_wait_do_not_keep_each_other_waiting(gateway: Gateway) -> None:
    """Each that waits for deferred tasks is one itself."""
    lane = lanes()
    clients = [Client(gateway.server.port, register=False) for _ in range(20)]
    limit, lanes_module.MAX_DEFERRED = lanes_module.MAX_DEFERRED, 5
    try:
        for _ in range(50):
            lane.run_deferred(lambda: None)
        for client in clients:
            client.send("HEALTH_CHECK", {})
        for client in clients:
            client.wait_for(lambda one: one.msg_type == "HEALTH_CHECK_ACK")
    finally:
        lanes_module.MAX_DEFERRED = limit
        for client in clients:
            client.drop()
