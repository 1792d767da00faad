"""The state dump, as SIGUSR1 writes it to the log."""

from __future__ import annotations

import gc
import itertools
import json
import signal
import time
import weakref
from typing import Any

import gevent
import pykka
import pytest
from structlog.testing import capture_logs

from actors.actor import tell
from actors.loop.lanes import lanes
from actors.request import RequestActor
from actors.state_dump import log_state_dump, state_dump, track_greenlets
from gateway.wire.frames import Request, RequestContent
from tests.fakes import LIMIT, FakeSource
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.test_run import KEY, TEXT_LINE, provider_arguments
from tests.test_session import Given
from tests.test_supervisor import Given as GivenSupervisor
from tests.test_supervisor import Mailbox

pytestmark = pytest.mark.usefixtures("no_actor_left")

NEEDS_SIGUSR1 = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no SIGUSR1 here")


def states(kind: str) -> list[dict[str, Any]]:
    """What the dump says of the actors of one kind."""
    return [fields for event, fields in state_dump() if event == f"{kind} state"]


def places() -> dict[str, int]:
    """How many greenlets wait where."""
    return {
        fields["waiting_in"]: fields["count"]
        for event, fields in state_dump()
        if event == "Greenlets"
    }


# By signal ---------------------------------------------------------------------------------------


@NEEDS_SIGUSR1
@pytest.mark.parametrize("level", ["info", "error"])
def test_a_signal_writes_it_in_lines_that_a_person_can_read(
    provider: ProviderProcess, level: str
) -> None:
    answer = "an answer that is private"
    script = provider.fresh(scripts.idle_mid_stream([answer]), "a-question-that-is-private")
    arguments = [*provider_arguments(provider), "--log-level", level, "--log-format", "text"]
    with (
        Daemon(*arguments, env={"OPENAI_API_KEY": KEY}) as daemon,
        Client(daemon.port) as first,
        Client(daemon.port) as second,
    ):
        ids = [client.request(script, f"ask_{client.session_id}") for client in (first, second)]
        first.wait_text(ids[0])
        second.wait_text(ids[1])
        before = len(daemon.log.splitlines())
        daemon.signal(signal.SIGUSR1)
        # Greenlets with a place of their own come last; these two exist from the start.
        wait_until(lambda: "_reap_for_ever" in daemon.log, "there is a dump")
        wait_until(lambda: "_check_for_ever" in daemon.log, "there is all of it")
        lines = daemon.log.splitlines()[before:]
        first.interrupt(ids[0])
        assert first.wait_ack().payload["status"] == "SUCCESS"
        log = daemon.log
    for secret in (KEY, script, answer):
        assert secret not in log
    dumped: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        match = TEXT_LINE.fullmatch(line)
        assert match, line
        event = line.split("] ", 2)[2].split(" | ")[0]
        dumped.setdefault(event, []).append(json.loads(match["fields"]))
        assert "[SYS] [INFO]" in line
    requests = {fields["request_id"]: fields for fields in dumped["Request state"]}
    assert requests.keys() == set(ids)
    for fields in requests.values():
        assert fields["state"] == "streaming"
        assert fields["told_to_stop"] is False
        assert 0 <= fields["seconds_without_progress"] <= fields["seconds"] < LIMIT
    sessions = {fields["session_id"]: fields for fields in dumped["Session state"]}
    assert sessions.keys() == {first.session_id, second.session_id}
    assert sessions[first.session_id]["live"] == [ids[0]]
    assert sessions[first.session_id]["takes_requests"] is True
    assert 3500 < sessions[first.session_id]["remaining_seconds"] <= 3600
    [supervisor] = dumped["Supervisor state"]
    assert (supervisor["sessions"], supervisor["requests"]) == (2, 2)
    waiting = {fields["waiting_in"]: fields["count"] for fields in dumped["Greenlets"]}
    for begin, end, count in [
        ("Generation._run, at ", ".py:", 2),
        ("Server._serve, at Connection._read (gateway/server/connection.py:", ")", 2),
        ("Supervision._reap_for_ever, at ", "(actors/supervisor.py:", 1),
    ]:
        found = [waiting[place] for place in waiting if place.startswith(begin) and end in place]
        assert found == [count], (begin, waiting)


# What is in it -----------------------------------------------------------------------------------


def test_a_session_shows_what_it_waits_for() -> None:
    given = Given()
    assert states("Session") == []  # not registered yet
    given.register()
    content = RequestContent(voice_mode="BINARY")
    given.tell(given.frame(Request("v", "VOICE", content, stream_flag=True, stream_seq=0)))
    given.request("req_1")
    given.source.next().say("Once")
    given.settle_requests()
    [state] = states("Session")
    assert (state["session_id"], state["peer"]) == (given.session_id, "127.0.0.1:9")
    assert (state["live"], state["voice"]) == (["req_1"], "v")
    [state] = states("Request")
    assert (state["request_id"], state["state"]) == ("req_1", "streaming")


def test_what_waits_in_a_mailbox_is_counted() -> None:
    mailbox = Mailbox()
    for number in range(3):
        tell(mailbox.ref, number)
    assert [state["mailbox"] for state in states("Collector")] == [3]


def test_an_actor_that_has_ended_is_not_in_it() -> None:
    given, other = Given(), Given()
    given.register()
    other.register()
    other.ref.stop(timeout=LIMIT)
    assert [state["session_id"] for state in states("Session")] == [given.session_id]


def test_an_actor_that_ends_meanwhile_is_not_in_it() -> None:
    both = [Given(), Given()]
    for given in both:
        given.register()
    dump = state_dump()
    _, first = next(dump)
    for given in both:
        if given.session_id != first["session_id"]:
            given.ref.stop(timeout=LIMIT)
    assert [event for event, _ in dump if event == "Session state"] == []


def test_an_actor_that_fails_to_describe_itself_is_in_it_and_so_are_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise RuntimeError("a private text")

    given = Given()
    given.register()
    given.request("req_1")
    given.source.next()
    monkeypatch.setattr(RequestActor, "describe", broken)
    with capture_logs() as logs:
        log_state_dump()
    [request] = [log for log in logs if log["event"] == "Request state"]
    assert request["failed_to_describe"] == "RuntimeError"
    [ref] = pykka.ActorRegistry.get_by_class(RequestActor)
    assert request["actor"] == ref.actor_urn
    assert "private text" not in repr(logs)
    events = [log["event"] for log in logs]
    assert events.index("Request state") < events.index("Session state") < events.index("Greenlets")


def test_a_weak_proxy_whose_object_is_gone_is_skipped() -> None:
    class Gone:
        pass

    gone = Gone()
    proxy = weakref.proxy(gone)
    del gone
    with pytest.raises(ReferenceError):
        isinstance(proxy, Gone)  # so it is not asked
    assert places()


def a_greenlet_of_this_test() -> None:
    gevent.sleep(LIMIT)


def test_greenlets_are_counted_by_where_they_wait_and_those_that_have_ended_are_not() -> None:
    greenlets = [gevent.spawn(a_greenlet_of_this_test) for _ in range(3)]
    gevent.sleep(0)
    [(place, count)] = [one for one in places().items() if "a_greenlet_of_this_test" in one[0]]
    assert count == 3
    line = a_greenlet_of_this_test.__code__.co_firstlineno + 1
    name = a_greenlet_of_this_test.__name__
    assert place == f"{name}, at {name} (tests/test_state_dump.py:{line})"
    gevent.killall(greenlets)
    assert not any("a_greenlet_of_this_test" in place for place in places())


def test_a_greenlet_that_the_collector_froze_is_in_it_while_it_lives() -> None:
    greenlet = gevent.spawn(a_greenlet_of_this_test)
    gevent.sleep(0)
    track_greenlets()
    gc.freeze()
    try:
        assert any("a_greenlet_of_this_test" in place for place in places())
    finally:
        gc.unfreeze()
    greenlet.kill()
    assert not any("a_greenlet_of_this_test" in place for place in places())


class Others:
    """A greenlet that notes every turn it gets."""

    def __init__(self) -> None:
        self.turns: list[float] = []
        self._greenlet = gevent.spawn(self._run)
        gevent.sleep(0)

    def _run(self) -> None:
        while True:
            self.turns.append(time.monotonic())
            gevent.sleep(0)

    def __enter__(self) -> Others:
        return self

    def __exit__(self, *_: object) -> None:
        self._greenlet.kill()

    @property
    def held_up(self) -> float:
        """The longest time between two turns, and up to now, in seconds."""
        times = [*self.turns, time.monotonic()]
        return max(after - before for before, after in itertools.pairwise(times))


def test_a_dump_of_two_hundred_sessions_does_not_block_the_loop() -> None:
    supervisor = GivenSupervisor()
    source = FakeSource()
    given = [Given(source, tell_supervisor=supervisor.supervision.tell) for _ in range(200)]
    for one in given:
        one.register()
        one.request("req_1")
        source.next().say("Once")
    with Others() as others, capture_logs() as logs:
        began = time.monotonic()
        log_state_dump()
        took, held_up = time.monotonic() - began, others.held_up
    events = [log["event"] for log in logs]
    assert events.count("Session state") == events.count("Request state") == 200
    print(f"200 sessions: {took * 1000:.0f} ms; others held up for {held_up * 1000:.1f} ms")
    assert held_up < 0.25


def test_other_greenlets_run_while_greenlets_are_counted() -> None:
    greenlets = [gevent.spawn(a_greenlet_of_this_test) for _ in range(2000)]
    gevent.sleep(0)
    with Others() as others:
        before = len(others.turns)
        assert places()
        assert len(others.turns) > before
    gevent.killall(greenlets)


def test_other_greenlets_run_while_lines_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [("Session state", {"number": number}) for number in range(2000)]
    monkeypatch.setattr("actors.state_dump.state_dump", lambda: iter(lines))
    lanes().wait_deferred()  # lines of the tests before are written later
    with Others() as others, capture_logs() as logs:
        before = len(others.turns)
        log_state_dump()
        assert len(others.turns) > before
    assert len(logs) == len(lines)
