"""The promises at random: a machine drives a real gateway, and must find the bugs planted in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test

from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.machine import GatewayMachine, Promise, Stage, Violation

EXAMPLES = 300

SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=15,
    deadline=None,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

TO_THE_FIRST = settings(SETTINGS, derandomize=True, phases=[Phase.generate], print_blob=False)
"""The same examples each time, up to the first that fails, which is not made smaller."""


@pytest.fixture(scope="module")
def provider() -> Iterator[ProviderProcess]:
    """One of our own, since each look at its journal goes through all of it."""
    with ProviderProcess() as process:
        yield process


def run_machine(stage: Stage, how: settings) -> None:
    """Run examples up to the first violation."""

    class Machine(GatewayMachine):
        pass

    Machine.stage = stage
    try:
        run_state_machine_as_test(Machine, settings=how)
    except Flaky as error:
        # Races do not come out the same way when they are played again.
        raise stage.violations[0] if stage.violations else error from error


@pytest.mark.timeout(300)
def test_the_gateway_keeps_its_promises_whatever_clients_do(provider: ProviderProcess) -> None:
    with Daemon("--llm-url", provider.base_url, "--llm-model", "test") as daemon:
        stage = Stage(provider, daemon.port)
        run_machine(stage, SETTINGS)
        stage.check_posts()
        assert "Traceback" not in daemon.log
        assert "Actor failed" not in daemon.log
    assert stage.examples >= EXAMPLES


# The test of the test ----------------------------------------------------------------------------

LAUNCHER = """
import sys
import run  # first of all: it patches
import time
import gevent
from actors.session.live import LiveRequest
from actors.session.request_ids import RequestIds
from actors.request import RequestActor
from actors.outlet import Delivered
from actors.session.answers import Answers
from actors.session.interrupts import Interrupts
from actors.session.live import LiveRequests
from actors.session.port import CONNECTION_LOST
from actors.session.session import SessionActor
from actors.words import InterruptReason
from gateway.server.outbox import Outbox, Outlet
from llm.chat.client import ProviderClient
from llm.http.connections import ConnectionReader
from gateway.wire.port import WirePort
from llm.stage import Ending, StageResult
{bug}
sys.exit(run.main())
"""

BUGS: dict[str, tuple[set[Promise], str]] = {
    "skip the purge": (
        # What is sent behind its back, the history may miss.
        {Promise.NOTHING_AFTER, Promise.HISTORY},
        """
Outbox.purge = lambda outbox, outlet: None
""",
    ),
    "ack before close": (
        {Promise.ACK_AFTER_CLOSE},
        # The close takes long, and is reported before it is done.
        """
hang_up, stop_stages = ConnectionReader.hang_up, RequestActor._stop_stages
def hang_up_slowly(connection):
    gevent.sleep(0.5)
    hang_up(connection)
def report_and_stop(request, stop):
    request._send_report((StageResult(Ending.CLOSED, closed_at=time.monotonic()),))
    stop_stages(request, stop)
ConnectionReader.hang_up, RequestActor._stop_stages = hang_up_slowly, report_and_stop
""",
    ),
    "terminal frame twice": (
        {Promise.ONE_END},
        """
forget = Answers.forget
def forget_and_repeat(answers, live):
    forget(answers, live)
    answers._client.port.request_ended(live.end())
Answers.forget = forget_and_repeat
""",
    ),
    "interrupt clears the wrong request": (
        {Promise.RIGHT_TARGET},
        # One for a request that has ended stops the one that runs.
        """
ask = Interrupts.ask
def interrupt_what_runs(interrupts, asked):
    if interrupts._request_ids.has_ended(asked.target):
        for live in interrupts._requests:
            interrupts._requests.interrupt(live, asked.reason)
    return ask(interrupts, asked)
Interrupts.ask = interrupt_what_runs
""",
    ),
    "history takes undelivered text": (
        # What was delivered is one value, so the count in the ack is as wrong as the history.
        {Promise.HISTORY, Promise.NOTHING_AFTER},
        """
put, texts = Outlet.put, {}
def put_and_keep(outlet, text):
    texts.setdefault(outlet, []).append(text)
    put(outlet, text)
Outlet.put = put_and_keep
Outlet.delivered = property(lambda outlet: Delivered("".join(texts.get(outlet, []))))
""",
    ),
    "history takes unheard text": (
        {Promise.HISTORY},
        """
LiveRequest.hear = lambda live, chars: None
""",
    ),
    "interrupt ahead of its request is forgotten": (
        {Promise.RIGHT_TARGET},
        """
RequestIds.take_early = lambda ids, request_id, now: None
""",
    ),
    "long text is cut": (
        {Promise.EXACT_TEXT},
        """
put = Outlet.put
Outlet.put = lambda outlet, text: put(outlet, text[:10_000])
""",
    ),
    "second POST": (
        {Promise.ONE_POST},
        """
post = ProviderClient.post
def post_twice(client, prompt, on_sent):
    post(client, prompt, on_sent).close()
    return post(client, prompt, on_sent)
ProviderClient.post = post_twice
""",
    ),
    "older request ends late": (
        # Where it is interrupted once more, the ack says that it was over.
        {Promise.OLD_ENDS_FIRST, Promise.ACK_AFTER_CLOSE},
        """
request_ended = WirePort.request_ended
def end_late(port, end):
    is_late = end.reason is InterruptReason.USER_NEW_INPUT
    (gevent.spawn_later(0.05, request_ended, port, end) if is_late else request_ended(port, end))
WirePort.request_ended = end_late
""",
    ),
    "streams outlive their client": (
        {Promise.GONE_IS_STOPPED},
        """
end = SessionActor._end
def end_without_requests(session, goodbye):
    if goodbye is CONNECTION_LOST:
        session._requests._by_id.clear()
    end(session, goodbye)
SessionActor._end = end_without_requests
""",
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BUGS)
def test_the_machine_finds_a_planted_bug(provider: ProviderProcess, name: str) -> None:
    promises, bug = BUGS[name]
    arguments = ("--llm-url", provider.base_url, "--llm-model", "test")
    with Daemon(*arguments, launcher=LAUNCHER.format(bug=bug)) as daemon:
        stage = Stage(provider, daemon.port, wait_seconds=2.0)
        with pytest.raises(Violation):
            run_machine(stage, TO_THE_FIRST)
    print(f"after {stage.examples} examples: {str(stage.violations[0])[:300]}")
    assert stage.violations[0].promise in promises
