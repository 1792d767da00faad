"""What the integration tests stand on: a provider in its own process, and gateways in this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pykka
import pytest

from actors.actor import GreenletActor
from actors.loop.lanes import lanes
from actors.loop.pauses import Pauses
from actors.session.session import SessionSettings
from gateway.app import Gateway
from gateway.server.server import ServerSettings
from gateway.settings.settings import Settings
from llm.provider import Provider
from tests.fakes import LIMIT, Clock
from tests.harness.client import Client
from tests.harness.provider_process import ProviderProcess

_OF_SETTINGS = {"server", "supervisor", "fallback", "generation", "credentials", "ops_port"}


@pytest.fixture(scope="session")
def provider() -> Iterator[ProviderProcess]:
    """The scripted provider: one process for the whole run, told apart by script names."""
    with ProviderProcess() as process:
        yield process


@pytest.fixture
def make_gateway(provider: ProviderProcess) -> Iterator[Callable[..., Gateway]]:
    """Starts gateways on free ports, and stops them after the test.

    Keyword arguments of what is made: fields of `Provider` (its `base_url` is the scripted
    provider's unless given) and of `SessionSettings`; `server`, `supervisor`, `fallback`,
    `generation`, `credentials`, `ops_port` of `Settings`.
    """
    gateways: list[Gateway] = []

    def make(**fields: Any) -> Gateway:
        settings = {name: fields.pop(name) for name in _OF_SETTINGS & fields.keys()}
        of_session = {field.name for field in dataclasses.fields(SessionSettings)} & fields.keys()
        session = SessionSettings(**{name: fields.pop(name) for name in of_session})
        server = dataclasses.replace(settings.pop("server", ServerSettings()), port=0)
        llm = {"base_url": provider.base_url, "model": "test", **fields}
        gateway = Gateway(
            Settings(provider=Provider(**llm), server=server, session=session, **settings)
        )
        gateway.start()
        gateways.append(gateway)
        return gateway

    yield make
    for gateway in gateways:
        gateway.stop()


@pytest.fixture
def gateway(make_gateway: Callable[..., Gateway]) -> Gateway:
    """A gateway with default settings, in front of the scripted provider."""
    return make_gateway()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    """A registered client of `gateway`."""
    with Client(gateway.server.port) as client:
        yield client


@pytest.fixture
def no_actor_left() -> Iterator[None]:
    """Whatever a test leaves running is stopped, so that it cannot help the next one."""
    yield
    for ref in pykka.ActorRegistry.get_by_class(GreenletActor):
        ref.stop(timeout=LIMIT)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of every session in this process."""
    clock = Clock()
    monkeypatch.setattr("actors.session.session.time", clock)
    monkeypatch.setattr(lanes(), "pauses", Pauses(lambda: 0.0))  # stalls of the tests are none
    return clock
