"""Pytest fixtures: `pytest_plugins = ["bargein_harness.fixtures"]` in a conftest.py or test module.

One gateway for the whole run, since starting one takes a second; a client for each test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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
    """A registered client of it, for one test."""
    with bargein_gateway.connect() as client:
        yield client
