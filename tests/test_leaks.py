"""What is left when everybody is gone: nothing, counted."""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
import pykka
import pytest

from actors.actor import GreenletActor
from actors.messages import Census
from gateway.app import Gateway
from gateway.server.server import ServerSettings
from gateway.settings.settings import Settings
from llm.provider import Provider
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.provider_process import ProviderProcess

SESSIONS = 200


def living_greenlets() -> list[str]:
    """Every greenlet that is not dead; as text, so that this list holds on to none."""
    gc.collect()
    return sorted(
        repr(getattr(one, "_run", one)).split(" at 0x")[0]
        for one in gc.get_objects()
        if isinstance(one, gevent.Greenlet) and one.started and not one.dead
    )


def open_files() -> frozenset[str]:
    """This process's file descriptors, each with what it is open on: `7 socket:[4711]`."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the others
            found.add(f"{path.name} {path.readlink()}")
    return frozenset(found)


def assert_closed_since(before: frozenset[str]) -> None:
    """Nothing is open that was not open `before`; what an earlier test left may have gone."""
    deadline = time.monotonic() + 5.0
    while opened := open_files() - before:
        assert time.monotonic() < deadline, f"still open: {sorted(opened)}"
        time.sleep(0.001)


def our_actors() -> list[pykka.ActorRef[Any]]:
    return list(pykka.ActorRegistry.get_by_class(GreenletActor))


def live_gauges(gateway: Gateway) -> dict[str, float]:
    """What the gauges count as going on, but for zeros."""
    return {
        f"{sample.name} {sample.labels}": sample.value
        for family in gateway.metrics.registry.collect()
        for sample in family.samples
        if family.type == "gauge" and sample.value
    }


def talk(port: int, story: str, answer: str, leave: Callable[[Client], None]) -> None:
    """Start, get tokens, interrupt, start again, get the answer, leave."""
    with Client(port) as client:
        first = client.request(story)
        client.wait_text(first)
        client.interrupt(first)
        assert client.wait_ack().payload["status"] == "SUCCESS"
        assert client.wait_terminal(first).payload["interrupted"] is True
        second = client.request(answer)
        assert client.wait_terminal(second).payload["outcome"] == "COMPLETED"
        assert client.text_of(second) == "Hello, world"
        leave(client)


def say_goodbye(client: Client) -> None:
    client.close()


def hang_up(client: Client) -> None:
    client.drop()


def leave_in_the_middle(story: str) -> Callable[[Client], None]:
    def leave(client: Client) -> None:
        client.wait_text(client.request(story))
        client.drop()

    return leave


@pytest.mark.skipif(sys.platform != "linux", reason="counts sockets in /proc")
def test_two_hundred_sessions_leave_nothing_behind(provider: ProviderProcess) -> None:
    story = provider.fresh(scripts.idle_mid_stream(["once", " upon"]))
    answer = provider.fresh(scripts.answer(["Hello", ", ", "world"]))
    provider.counts()
    greenlets_before, files_before = living_greenlets(), open_files()
    gateway = Gateway(
        Settings(provider=Provider(provider.base_url, "test"), server=ServerSettings(port=0))
    )
    gateway.start()
    try:
        standing = living_greenlets(), open_files()
        pool = gevent.pool.Pool(50)
        ways = [say_goodbye, hang_up, leave_in_the_middle(story)]
        talks = [
            pool.spawn(talk, gateway.server.port, story, answer, ways[number % len(ways)])
            for number in range(SESSIONS)
        ]
        gevent.joinall(talks, timeout=30, raise_error=True)
        assert all(talk.successful() for talk in talks)
        talks.clear()
        del pool

        gateway.server.wait_until_empty(5)
        assert gateway.server.connections == 0
        wait_until(
            lambda: gateway.supervision.census() == Census(0, 0, 0), "the supervisor counts nobody"
        )
        # Requests are released when nobody waits for anything else.
        wait_until(
            lambda: [ref.actor_class.__name__ for ref in our_actors()] == ["SupervisorActor"],
            "no other actor is left",
        )
        assert live_gauges(gateway) == {}

        # Of the provider's connections only idle ones are kept: those of complete answers, whose
        # requests followed each other on fewer connections than there were requests.
        interrupted = SESSIONS + len(range(2, SESSIONS, len(ways)))
        assert len(provider.posts(story)) == interrupted
        assert len(provider.posts(answer)) == SESSIONS
        for post in provider.posts(story):
            provider.wait_closed(post.conn)
        assert provider.open_connections(story) == []

        # What stands is what stood before, and the idle connections. (The provider, on a busy
        # machine, takes a moment to see that one was closed.)
        wait_until(lambda: living_greenlets() == standing[0], "every greenlet has ended")
        wait_until(
            lambda: len(open_files() - standing[1]) == len(provider.open_connections(answer)),
            "what is open are idle connections",
        )
        idle = provider.open_connections(answer)
        assert 1 <= len(idle) <= 50
    finally:
        gateway.stop()
    wait_until(lambda: living_greenlets() == greenlets_before, "no greenlet is left")
    assert_closed_since(files_before)
    assert our_actors() == []
    for conn in idle:
        provider.wait_closed(conn)


@pytest.mark.skipif(sys.platform != "linux", reason="counts sockets in /proc")
# gevent leaves the socket that it could not bind to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("port_is_free", [True, False])
def test_the_demo_provider_ends_with_its_gateway(port_is_free: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        greenlets_before, files_before = living_greenlets(), open_files()
        port = 0 if port_is_free else taken.getsockname()[1]
        gateway = Gateway(Settings(server=ServerSettings(port=port)))
        if port_is_free:
            gateway.start()
            with Client(gateway.server.port) as client:
                client.wait_text(client.request("Tell me a story"))
                client.close()
            gateway.stop()
        else:
            with pytest.raises(OSError, match="in use"):
                gateway.start()
        wait_until(lambda: living_greenlets() == greenlets_before, "no greenlet is left")
        assert_closed_since(files_before)
        assert our_actors() == []


@pytest.mark.skipif(sys.platform != "linux", reason="counts sockets in /proc")
def test_a_gateway_that_is_stopped_under_its_clients_leaves_nothing_behind(
    provider: ProviderProcess,
) -> None:
    story = provider.fresh(scripts.flood())
    provider.counts()
    greenlets_before, files_before = living_greenlets(), open_files()
    gateway = Gateway(
        Settings(provider=Provider(provider.base_url, "test"), server=ServerSettings(port=0))
    )
    gateway.start()
    clients = [Client(gateway.server.port) for _ in range(20)]
    for client in clients:
        client.wait_text(client.request(story))
    reading = [gevent.spawn(client.wait_closed) for client in clients]
    gateway.stop()
    gevent.joinall(reading, timeout=10, raise_error=True)
    assert [reader.value for reader in reading] == [1012] * len(clients)
    for client in clients:
        client.drop()
    reading.clear()
    wait_until(lambda: living_greenlets() == greenlets_before, "no greenlet is left")
    assert_closed_since(files_before)
    assert our_actors() == []
    for post in provider.posts(story):
        provider.wait_closed(post.conn)
