"""A listener that cannot accept for a while."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from typing import Any

import gevent.server
import pytest
from structlog.testing import capture_logs

from actors.loop.lanes import lanes
from gateway.server import listening
from gateway.server.listening import Listening
from tests.fakes import LIMIT


class Refusing:
    """A listener whose first attempts to accept fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
        self.failures_left = times
        accept = gevent.server.StreamServer.do_read

        def do_read(server: gevent.server.StreamServer) -> Any:
            if self.failures_left:
                self.failures_left -= 1
                raise OSError(code, "no room")
            return accept(server)

        monkeypatch.setattr(gevent.server.StreamServer, "do_read", do_read)
        monkeypatch.setattr(listening, "_RETRY_SECONDS", 0.001)
        self.server = Listening(("127.0.0.1", 0), self._serve)
        self.server.start()

    def _serve(self, sock: socket.socket, _address: object) -> None:
        sock.sendall(b"!")
        sock.close()

    def answer(self) -> bytes:
        """What a client gets that waits."""
        assert self.server.server_port is not None
        with socket.create_connection(("127.0.0.1", self.server.server_port), LIMIT) as sock:
            return sock.recv(1)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], Refusing]]:
    made: list[Refusing] = []

    def make(code: int, times: int) -> Refusing:
        made.append(Refusing(monkeypatch, code, times))
        return made[-1]

    yield make
    for one in made:
        one.server.stop()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_client_waits_until_there_is_room_and_the_log_says_so_once(
    refusing: Callable[[int, int], Refusing], code: int
) -> None:
    lanes().wait_deferred()  # lines of the tests before are written later
    with capture_logs() as logs:
        one = refusing(code, 5)
        assert one.answer() == b"!"
    assert one.failures_left == 0
    assert [(log["event"], log["log_level"]) for log in logs] == [
        ("Cannot accept connections", "error")
    ]
    assert (logs[0]["port"], logs[0]["error"]) == (one.server.server_port, "no room")


def test_after_a_while_it_says_so_again(
    refusing: Callable[[int, int], Refusing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_LOG_SECONDS", -1.0)
    lanes().wait_deferred()
    with capture_logs() as logs:
        one = refusing(errno.EMFILE, 3)
        assert one.answer() == b"!"
    assert len(logs) == 3


def test_before_each_pause_somebody_may_make_room(
    refusing: Callable[[int, int], Refusing],
) -> None:
    one = refusing(errno.EMFILE, 3)
    asked: list[None] = []
    one.server.make_room = lambda: asked.append(None)
    assert one.answer() == b"!"
    assert len(asked) == 3


def test_one_that_was_stopped_meanwhile_stays_so(
    refusing: Callable[[int, int], Refusing], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = refusing(errno.EMFILE, 1)
    one.server.stop()
    one.server._resume()
    assert one.server.closed


def test_other_faults_are_left_to_gevent(refusing: Callable[[int, int], Refusing]) -> None:
    one = refusing(errno.ECONNABORTED, 0)
    one.failures_left = 1
    with pytest.raises(OSError, match="no room"):
        one.server.do_read()


def test_beyond_the_most_that_may_be_open_clients_wait_until_others_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "_RETRY_SECONDS", 0.001)

    def serve(sock: socket.socket, _address: object) -> None:
        sock.sendall(b"!")
        sock.recv(1)  # until the client leaves

    server = Listening(("127.0.0.1", 0), serve)
    server.max_open = 2
    rooms: list[None] = []
    server.make_room = lambda: rooms.append(None)
    server.start()
    assert server.server_port is not None
    address = ("127.0.0.1", server.server_port)
    lanes().wait_turn()
    with capture_logs() as logs:
        clients = [socket.create_connection(address, LIMIT) for _ in range(5)]
        for client in clients:
            assert client.recv(1) == b"!"
            assert server.open_now <= 2
            client.close()
    assert rooms
    assert [(log["event"], log["error"]) for log in logs] == [
        ("Cannot accept connections", "the open files that are left are reserved for live requests")
    ]
    server.stop()
