"""Pytest fixtures: `pytest_plugins = ["bargein_harness.fixtures"]` in a conftest.py or test module.

One gateway for the whole run, since starting one takes a second; a client for each test. The report
of a failed test shows what the gateway has logged since that test began; so it does for a gateway
from any other fixture.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import pytest

from .chat import ChatClient
from .running import RunningGateway, run_gateway


@pytest.fixture(scope="session")
def bargein_gateway_arguments() -> Sequence[str]:
    """More of the gateway's command line; override it."""
    return ()


@pytest.fixture(scope="session")
def bargein_gateway_options() -> dict[str, Any]:
    """Keyword arguments of `run_gateway`, as `{"model": "echo"}`; override it."""
    return {}


@pytest.fixture(scope="session")
def bargein_gateway(
    bargein_gateway_arguments: Sequence[str], bargein_gateway_options: dict[str, Any]
) -> Iterator[RunningGateway]:
    """A running gateway, for the whole run."""
    with run_gateway(*bargein_gateway_arguments, **bargein_gateway_options) as gateway:
        yield gateway


@pytest.fixture
def bargein_client(bargein_gateway: RunningGateway) -> Iterator[ChatClient]:
    """A registered client of the gateway, for one test."""
    with bargein_gateway.connect() as client:
        yield client


# The log of a failed test -----------------------------------------------------------------------

_from_fixtures = pytest.StashKey[WeakSet[RunningGateway]]()
"""Of the run: every gateway that a fixture has given."""

_log_sizes = pytest.StashKey[WeakKeyDictionary[RunningGateway, int]]()
"""Of a test: how long the log of each of them was when the test began, in bytes."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Note a gateway that a fixture gives."""
    value = yield
    if isinstance(value, RunningGateway):
        request.config.stash.setdefault(_from_fixtures, WeakSet()).add(value)
    return value


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note where the test begins in each log."""
    gateways = item.config.stash.get(_from_fixtures, WeakSet())
    item.stash[_log_sizes] = WeakKeyDictionary({one: one.log_size for one in gateways})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs of its gateways to the report of a test that failed."""
    report = yield
    if report.failed:
        began = item.stash.get(_log_sizes, WeakKeyDictionary())
        arguments: dict[str, Any] = getattr(item, "funcargs", None) or {}
        gateways = (one for one in arguments.values() if isinstance(one, RunningGateway))
        for gateway in dict.fromkeys(gateways):  # each of them once
            log = gateway.recent_log(began.get(gateway, 0))
            report.sections.append(("gateway's log", log or "nothing since the test began"))
    return report
