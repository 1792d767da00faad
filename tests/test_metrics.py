"""The gauges of a whole gateway, and the reasons of refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest

from actors.actor import GreenletActor, queued_messages
from gateway.app import Gateway
from metrics.instruments import REFUSALS
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.process import ROOT
from tests.harness.provider_process import ProviderProcess


def gauge(gateway: Gateway, name: str) -> float:
    value = gateway.metrics.registry.get_sample_value(f"bargein_{name}")
    assert value is not None
    return value


def test_what_a_client_does_not_read_is_in_the_gauge_until_it_is_gone(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port, receive_buffer=4096) as client:
        assert gauge(gateway, "outbox_bytes") == 0
        request_id = client.request(provider.fresh(scripts.flood("x" * 1000)))
        limit = gateway.settings.server.outbox.max_bytes
        wait_until(lambda: gauge(gateway, "outbox_bytes") > limit, "its outbox is full")
        client.interrupt(request_id)
        client.wait_ack()
        client.wait_terminal(request_id)
        wait_until(lambda: gauge(gateway, "outbox_bytes") == 0, "nothing waits")


class _Sleeper(GreenletActor):
    def handle(self, message: Any) -> None:
        pass


@pytest.mark.usefixtures("no_actor_left")
def test_messages_that_were_not_handled_are_in_the_gauge(gateway: Gateway) -> None:
    assert gauge(gateway, "mailbox_messages") == 0
    ref = _Sleeper.start()
    for _ in range(3):
        ref.tell("!")  # we do not wait, so it has no turn
    assert queued_messages() == 3
    ref.ask("?")
    assert gauge(gateway, "mailbox_messages") == 0


def test_every_reason_of_a_refusal_is_a_known_label() -> None:
    sources = [*ROOT.glob("actors/**/*.py"), *ROOT.glob("gateway/**/*.py"), ROOT / "run.py"]
    text = "".join(source.read_text() for source in sources)
    reasons = re.findall(r'(?:refused\.labels|_refuse_busy|_books\.busy)\(\s*"(\w+)"', text)
    assert set(reasons) == set(REFUSALS)
