"""Connections to a provider that are kept from one answer to the next: how long, and what is done
when the provider ends one as a request is on its way."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.monkey
import gevent.server
import gevent.socket
import pytest
import trustme

from actors.loop.lanes import lanes
from llm.chat.breaker import BreakerState
from llm.chat.completions import Message, Prompt
from llm.chat.generation import GenerationSettings, LlmClient
from llm.errors import (
    BadStatusError,
    ConnectFailedError,
    IncompleteAnswerError,
    KeptConnectionEndedError,
    NotAStreamError,
    StreamError,
)
from llm.http import connections
from llm.provider import Provider
from tests.harness import scripts
from tests.harness.client import wait_until
from tests.harness.scripts import chunk, done, finish_event, text_event
from tests.test_generation import Run

PATIENCE_SECONDS = 5.0
"""Bounds a failure, and nothing else."""

ANSWER = b"".join(
    [
        scripts.sse_head(),
        *map(chunk, [text_event("well"), finish_event(), done()]),
        scripts.last_chunk(),
    ]
)

Socket = Any
End = Callable[[Socket], None]
"""Plays one POST on a connection; the connection is closed when it returns."""


class KeepingServer:
    """A provider that answers the first POST of a connection, and plays `then` for each later one.

    Args:
        tls: the context of a server that speaks TLS; None speaks plain HTTP.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.then: list[End] = []
        """What later POSTs of a connection get, one after the other; then answers."""
        self.first: list[End] = []
        """What first POSTs of a connection get; then answers."""
        self.connections = 0
        self.posts = 0
        """Those that were read whole."""
        self.ends: list[str] = []
        """How idle connections were ended by the gateway."""
        self.ended = gevent.event.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        options: dict[str, Any] = {} if tls is None else {"ssl_context": tls}
        self._server = gevent.server.StreamServer(self._listener, self._serve, **options)
        self._server.start()
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def stop(self) -> None:
        self._server.stop(timeout=0)

    def read_post(self, sock: Socket) -> bool:
        """False at the end of the connection."""
        data = b""
        while b"\r\n\r\n" not in data:
            got = sock.recv(65536)
            if not got:
                return False
            data += got
        head, body = data.split(b"\r\n\r\n", 1)
        [length] = [
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ]
        while len(body) < length:
            body += sock.recv(65536)
        self.posts += 1
        return True

    def answer(self, sock: Socket) -> None:
        assert self.read_post(sock)
        sock.sendall(ANSWER)

    def _serve(self, sock: Socket, _address: object) -> None:
        self.connections += 1
        try:
            if self.first:
                self.first.pop(0)(sock)
                return
            if not self._answer_one(sock):
                return
            while True:
                gevent.socket.wait_read(sock.fileno())  # the next POST, or the end
                if self.then:
                    self.then.pop(0)(sock)
                    return
                if not self._answer_one(sock):
                    return
        except ConnectionResetError:
            self.ends.append("reset")
        finally:
            sock.close()
            self.ended.set()

    def _answer_one(self, sock: Socket) -> bool:
        if not self.read_post(sock):
            self.ends.append("closed")
            return False
        sock.sendall(ANSWER)
        return True


@pytest.fixture
def server() -> Iterator[KeepingServer]:
    made = KeepingServer()
    yield made
    made.stop()


@pytest.fixture
def clients() -> Iterator[list[LlmClient]]:
    made: list[LlmClient] = []
    yield made
    for client in made:
        client.close()


MakeClient = Callable[..., LlmClient]


@pytest.fixture
def make_client(clients: list[LlmClient]) -> MakeClient:
    def make(server: KeepingServer, **fields: Any) -> LlmClient:
        settings: dict[str, Any] = {"base_url": server.url, "model": "test", "retries": 0}
        client = LlmClient(Provider(**settings | fields), loop=lanes())
        clients.append(client)
        return client

    return make


def completed(client: LlmClient) -> Run:
    run = Run(client, "x").start()
    run.wait_completed()
    assert run.sink.text == "well"
    return run


def resends(run: Run) -> list[tuple[type[StreamError], float]]:
    return [(type(error), pause) for _, error, pause in run.sink.retries]


ONCE = [(KeptConnectionEndedError, 0.0)]


# A kept connection that ends as a request is on its way -------------------------------------------


def linger(sock: Socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_unread(sock: Socket) -> None:
    linger(sock)


def close_with_unread_data(sock: Socket) -> None:
    pass  # the kernel makes a reset of it


def close_with_half_unread(sock: Socket) -> None:
    sock.recv(10)


def end_after_reading(sock: Socket) -> None:
    sock.recv(65536)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(65536) is not None


def end_after_a_while(sock: Socket) -> None:
    assert sock.recv(65536)
    gevent.sleep(0.05)
    sock.shutdown(socket.SHUT_WR)


def reset_after_reading(sock: Socket) -> None:
    assert sock.recv(65536)
    linger(sock)


def reset_after_a_while(sock: Socket) -> None:
    assert sock.recv(65536)
    gevent.sleep(0.05)
    linger(sock)


def half_close_at_once(sock: Socket) -> None:
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(65536):
        pass


ENDS: Mapping[str, End] = {
    one.__name__: one
    for one in (
        reset_unread,
        close_with_unread_data,
        close_with_half_unread,
        end_after_reading,
        end_after_a_while,
        reset_after_reading,
        reset_after_a_while,
        half_close_at_once,
    )
}


@pytest.mark.parametrize("end", ENDS)
def test_a_request_in_a_kept_connection_that_ends_is_sent_once_more_on_a_new_one(
    server: KeepingServer, make_client: MakeClient, end: str
) -> None:
    client = make_client(server)
    assert resends(completed(client)) == []
    server.then = [ENDS[end]]
    run = completed(client)
    assert resends(run) == ONCE
    assert run.sink.posts == 2  # each is counted when the kernel has taken it
    assert run.sink.times_opened == 1
    assert server.connections == 2
    assert resends(completed(client)) == []  # and the new one is kept
    assert server.connections == 2


@pytest.mark.parametrize("end", ["reset_unread", "end_after_reading", "end_after_a_while"])
def test_a_large_request_is_sent_again_too(
    server: KeepingServer, make_client: MakeClient, end: str
) -> None:
    """It does not fit into the kernel's buffers: the connection ends while it is being sent."""
    client = make_client(server)
    completed(client)
    server.then = [ENDS[end]]
    run = Run(client, "x", Prompt((Message("user", "x" * 8_000_000),))).start()
    run.wait_completed()
    assert resends(run) == ONCE
    assert server.connections == 2


def says(data: bytes) -> End:
    def play(sock: Socket) -> None:
        assert sock.recv(65536)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    return play


BUSY = says(scripts.head(503, {"Content-Length": "5"}))  # so that it is not kept


def closes_in_order(sock: Socket) -> None:
    assert sock.recv(65536)
    sock.unwrap()  # close_notify


def ends_without_close_notify(sock: Socket) -> None:
    assert sock.recv(65536)
    sock.shutdown(socket.SHUT_RDWR)


def resets(sock: Socket) -> None:
    assert sock.recv(65536)
    linger(sock)


@pytest.mark.parametrize("end", [closes_in_order, ends_without_close_notify, resets])
def test_over_tls_too(make_client: MakeClient, tmp_path: Path, end: End) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    server = KeepingServer(context)
    try:
        client = make_client(server, ca_file=str(ca_file))
        completed(client)
        server.then = [end]
        assert resends(completed(client)) == ONCE
        assert server.connections == 2
    finally:
        server.stop()


def test_the_new_connection_is_new_even_where_others_are_kept(
    server: KeepingServer, make_client: MakeClient
) -> None:
    client = make_client(server)
    together = [Run(client, "x").start() for _ in range(4)]
    for run in together:
        run.wait_completed()
    kept = server.connections
    assert kept == 4
    server.then = [end_after_reading] * 4
    assert resends(completed(client)) == ONCE
    assert server.connections == kept + 1


def test_the_new_connection_is_new_even_where_another_is_given_back_meanwhile(
    server: KeepingServer, make_client: MakeClient
) -> None:
    client = make_client(server)
    together = [Run(client, "x").start() for _ in range(2)]
    for run in together:
        run.wait_completed()
    server.then = [end_after_reading]
    run = Run(client, "x")
    note = run.sink.retrying

    def use_the_other(provider: str, error: StreamError, pause_seconds: float) -> None:
        note(provider, error, pause_seconds)
        completed(client)
        server.then = [end_after_reading]

    run.sink.retrying = use_the_other  # type: ignore[method-assign]
    run.start().wait_completed()
    assert resends(run) == ONCE


def test_one_kept_connection_that_ended_is_enough_for_an_answer(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retries after it use new connections, too."""
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 0.01)
    client = make_client(server, retries=1)
    together = [Run(client, "x").start() for _ in range(2)]
    for run in together:
        run.wait_completed()
    server.then, server.first = [end_after_reading] * 2, [BUSY]
    run = completed(client)
    assert [error for error, _ in resends(run)] == [KeptConnectionEndedError, BadStatusError]


def test_sixty_requests_at_the_moment_when_the_provider_ends_idle_connections(
    server: KeepingServer, make_client: MakeClient
) -> None:
    client = make_client(server)
    ends = list(ENDS.values())
    for number in range(60):
        if server.connections and number % 2:
            server.then = [ends[number % len(ends)]]
        completed(client)


# Never otherwise ---------------------------------------------------------------------------------


BYTES: Mapping[str, tuple[bytes, type[StreamError]]] = {
    "one byte": (b"H", NotAStreamError),
    "an empty line": (b"\r\n", NotAStreamError),
    "an interim answer": (b"HTTP/1.1 100 Continue\r\n\r\n", IncompleteAnswerError),
    "half a head": (scripts.sse_head()[:40], NotAStreamError),
    "a head": (scripts.sse_head(), IncompleteAnswerError),
    "a time-out": (scripts.head(408, {"Content-Length": "0"}), BadStatusError),
}


@pytest.mark.parametrize("said", BYTES)
def test_where_a_byte_of_an_answer_came_nothing_is_sent_again(
    server: KeepingServer, make_client: MakeClient, said: str
) -> None:
    data, error = BYTES[said]
    client = make_client(server)
    completed(client)
    server.then = [says(data)]
    run = Run(client, "x").start()
    run.wait_failed(error, "")
    assert resends(run) == []
    assert run.sink.posts == 1
    assert server.connections == 1


@pytest.mark.parametrize("end", ["end_after_a_while", "reset_after_a_while"])
def test_one_that_ends_late_had_the_request_and_nothing_is_sent_again(
    server: KeepingServer, make_client: MakeClient, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.http.connections._KEPT_END_SECONDS", 0.02)  # the server takes 0.05
    client = make_client(server, retries=2)
    completed(client)
    server.then = [ENDS[end]]
    run = Run(client, "x").start()
    run.wait_failed(IncompleteAnswerError, "^the provider closed the connection without an answer")
    assert resends(run) == []
    assert server.connections == 1


@pytest.mark.parametrize("end", ENDS)
def test_a_new_connection_that_ends_is_not_tried_again(
    server: KeepingServer, make_client: MakeClient, end: str
) -> None:
    server.first = [ENDS[end]]
    client = make_client(server, retries=2)
    run = Run(client, "x").start()
    run.wait_failed(IncompleteAnswerError, "^the provider closed the connection without an answer")
    assert resends(run) == []
    assert server.connections == 1


@pytest.mark.parametrize("end", ["reset_unread", "end_after_reading", "reset_after_a_while"])
def test_the_new_connection_has_no_third_try(
    server: KeepingServer, make_client: MakeClient, end: str
) -> None:
    client = make_client(server, retries=2)
    completed(client)
    server.then, server.first = [ENDS[end]], [ENDS[end]]
    run = Run(client, "x").start()
    run.wait_failed(IncompleteAnswerError, "^the provider closed the connection without an answer")
    assert resends(run) == ONCE
    assert server.connections == 2


def test_a_provider_that_is_gone_is_asked_as_often_as_is_set_and_once_more(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 0.01)
    client = make_client(server, retries=2)
    completed(client)

    def close_and_stop_listening(sock: Socket) -> None:
        server._server.stop_accepting()
        server._listener.close()
        end_after_reading(sock)

    server.then = [close_and_stop_listening]
    run = Run(client, "x").start()
    run.wait_failed(ConnectFailedError, "refused")
    assert [error for error, _ in resends(run)] == [
        KeptConnectionEndedError,
        *[ConnectFailedError] * 2,
    ]


@pytest.mark.parametrize("retries", [0, 1])
def test_it_is_none_of_the_retries(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, retries: int
) -> None:
    monkeypatch.setattr("llm.chat.retries._FIRST_SECONDS", 0.01)
    client = make_client(server, retries=retries)
    completed(client)
    server.then, server.first = [end_after_reading], [BUSY] * (retries + 1)
    run = Run(client, "x").start()
    run.wait_failed(BadStatusError, "503")
    assert [error for error, _ in resends(run)] == [
        KeptConnectionEndedError,
        *[BadStatusError] * retries,
    ]


def test_the_breaker_does_not_count_it_and_no_fallback_is_asked(
    server: KeepingServer, clients: list[LlmClient]
) -> None:
    provider = Provider(base_url=server.url, model="test", retries=0)
    settings = GenerationSettings(breaker_failures=1)
    fallback = Provider(base_url="http://127.0.0.1:9/v1", model="test", retries=0)
    client = LlmClient(provider, fallback, settings, loop=lanes())
    clients.append(client)
    completed(client)
    for _ in range(3):
        server.then = [end_after_reading]
        run = completed(client)
        assert resends(run) == ONCE
        assert run.sink.fallbacks == []
        assert client.breaker.state is BreakerState.CLOSED


def test_an_end_says_nothing_about_the_usage(
    server: KeepingServer, make_client: MakeClient
) -> None:
    """Whether a provider accepts `stream_options` is not learned from it."""
    client = make_client(server)
    completed(client)
    server.then = [end_after_reading]
    completed(client)
    assert client.first.asks_for_usage


# Idle connections --------------------------------------------------------------------------------


def test_idle_connections_are_closed_in_order_before_the_provider_does_it(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connections.IDLE_SECONDS == 3.0
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.1)
    client = make_client(server)
    together = [Run(client, "x").start() for _ in range(3)]
    for run in together:
        run.wait_completed()
    wait_until(lambda: len(server.ends) == 3, "all are closed")
    assert server.ends == ["closed"] * 3  # by FIN: a reset is a line in some servers' logs
    run = completed(client)
    assert resends(run) == []
    assert server.connections == 4


def test_a_connection_that_is_used_again_in_time_stays(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.2)
    client = make_client(server)
    for _ in range(6):  # in all, longer than that
        completed(client)
        gevent.sleep(0.05)
    assert server.connections == 1
    wait_until(lambda: server.ends == ["closed"], "it is closed")


def test_one_that_is_too_old_is_not_used_even_if_the_timer_is_late(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(server)
    completed(client)  # the timer is set for 3 s
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.0)
    run = completed(client)
    assert resends(run) == []
    assert server.connections == 2


def test_after_a_pause_of_the_process_no_old_connection_is_used(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.1)
    client = make_client(server)
    completed(client)
    gevent.monkey.get_original("time", "sleep")(0.15)
    run = completed(client)
    assert resends(run) == []
    assert server.connections == 2


def test_a_closed_client_leaves_no_idle_connection(
    server: KeepingServer, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.05)
    client = make_client(server)
    completed(client)
    client.close()
    wait_until(lambda: len(server.ends) == 1, "it is closed")
    gevent.sleep(0.1)  # the timer fires, and finds nothing
