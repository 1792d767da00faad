"""Limits on what all clients have together: who is refused over them, and when room comes back."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from actors.messages import ReapRequest, RequestReported
from actors.outlet import Delivered
from actors.quota import Quota
from actors.row import make_report
from actors.session.messages import ConnectionLost
from actors.words import OnNewRequest
from gateway.app import Gateway
from gateway.process import share_files
from gateway.server.server import ServerSettings
from gateway.settings.settings import Settings
from gateway.wire.frames import (
    ApiKeyAuth,
    FunctionResult,
    HealthCheck,
    Register,
    Request,
    RequestContent,
)
from llm.chat.generation import GenerationResult
from llm.errors import StreamError
from llm.stage import Ending
from tests.fakes import LIMIT, FakeSource
from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.test_prometheus import free_port
from tests.test_run import provider_arguments
from tests.test_session import NONSENSE, Given, call, stuck

pytestmark = pytest.mark.usefixtures("no_actor_left")

AUTH = {"auth": {"type": "API_KEY", "api_key": "x"}, "platform": "WEB"}


# Quota ------------------------------------------------------------------------------------------


def test_as_many_places_are_taken_as_there_are() -> None:
    quota = Quota(2)
    first, second, third = (quota.slot() for _ in range(3))
    assert not quota.is_full
    assert first.take()
    assert second.take()
    assert quota.is_full
    assert not third.take()
    assert not third.is_taken
    first.release()
    assert third.take()
    assert quota.taken == 2


def test_a_place_is_given_back_once() -> None:
    quota = Quota(2)
    first, second, never = (quota.slot() for _ in range(3))
    first.take()
    second.take()
    for slot in (first, first, never):
        slot.release()
    assert quota.taken == 1


def test_without_a_limit_there_is_always_one() -> None:
    quota = Quota(0)
    assert all(quota.slot().take() for _ in range(100))
    assert not quota.is_full
    assert quota.taken == 100


# Sessions ----------------------------------------------------------------------------------------


def busy(given: Given, request_id: str | None = None) -> dict[str, Any]:
    """The payload of the ERROR that comes next."""
    payload = given.outbox.wait_for("ERROR")
    assert payload["error_code"] == "SERVER_BUSY"
    assert payload["retryable"] is True
    assert payload.get("request_id") == request_id
    return payload


def test_a_session_too_many_is_told_so_and_to_try_again_later() -> None:
    sessions = Quota(1)
    first, second = Given(sessions=sessions), Given(sessions=sessions)
    first.register()
    second.tell(second.frame(HealthCheck()))
    second.outbox.wait_for("HEALTH_CHECK_ACK")
    second.tell(second.frame(Register(ApiKeyAuth("key"))))
    assert busy(second)["error_detail"] == "session limit reached"
    assert second.door.unregistered == 0
    assert second.outbox.closed is not None
    assert second.outbox.closed[0] == 1013
    assert second.outbox.history() == ["HEALTH_CHECK_ACK", "ERROR"]
    assert second.sample("refused_total", reason="max_sessions") == 1
    assert second.sample("sessions_active") == 0
    assert second.sample("sessions_total", outcome="ended") == 0
    assert sessions.taken == 1
    first.request("req_1")  # who is in, is not touched
    first.source.next().complete()
    assert first.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"


@pytest.mark.parametrize("how", [ConnectionLost("gone"), NONSENSE])
def test_a_session_that_ends_or_fails_makes_room_for_another(how: Any) -> None:
    sessions = Quota(1)
    first = Given(sessions=sessions)
    first.register()
    first.tell(how)
    assert first.ref.actor_stopped.wait(LIMIT)
    first.assert_nothing_counted_as_live()
    second = Given(sessions=sessions)
    second.register()
    assert sessions.taken == 1


def test_who_has_not_registered_has_no_place() -> None:
    sessions = Quota(1)
    Given(sessions=sessions)
    assert sessions.taken == 0


# Requests ----------------------------------------------------------------------------------------


def full(quota: Quota) -> Given:
    """A session whose stuck request has taken the last slot."""
    other = Given(FakeSource(stuck=True), requests=quota, ack_timeout=60.0)
    other.register()
    other.request("other")
    other.source.next()
    assert quota.is_full
    return other


def test_a_request_too_many_is_refused_and_may_come_again() -> None:
    quota = Quota(1)
    other = full(quota)
    given = Given(requests=quota)
    given.register()
    given.request("req_1")
    assert "live" in busy(given, "req_1")["error_detail"]
    assert given.source.streams == []
    assert given.sample("refused_total", reason="max_requests") == 1
    assert given.sample("requests_total", outcome="failed") == 1
    other.source.streams[0].complete()
    other.outbox.wait_terminal("other")
    other.settle()
    given.request("req_1")
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"
    given.settle()
    assert quota.taken == 0


@pytest.mark.parametrize("policy", [OnNewRequest.PARALLEL, OnNewRequest.REJECT])
def test_the_limit_holds_with_every_policy(policy: OnNewRequest) -> None:
    quota = Quota(1)
    full(quota)
    given = Given(requests=quota, on_new_request=policy)
    given.register()
    given.request("req_1")
    busy(given, "req_1")
    assert given.sample("refused_total", reason="max_requests") == 1


def test_a_request_in_parallel_takes_a_place_of_its_own() -> None:
    quota = Quota(2)
    given = stuck(requests=quota, on_new_request=OnNewRequest.PARALLEL)
    given.request("req_1")
    given.request("req_2")
    given.settle()
    assert quota.taken == 2
    given.request("req_3")
    busy(given, "req_3")


def test_an_update_without_text_needs_no_room() -> None:
    quota = Quota(1)
    full(quota)
    given = Given(requests=quota)
    given.register()
    given.request("req_1", text="")
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"


def test_a_request_that_was_interrupted_before_it_came_needs_no_room() -> None:
    quota = Quota(1)
    full(quota)
    given = Given(requests=quota)
    given.register()
    given.interrupt("req_1")
    given.request("req_1")
    assert given.outbox.wait_terminal("req_1")["interrupted"] is True


def test_a_request_takes_the_place_of_the_one_that_it_replaces() -> None:
    quota = Quota(1)
    given = stuck(requests=quota)
    given.request("req_1")
    first = given.source.next()
    given.request("req_2")
    given.request("req_3")
    given.settle()
    assert quota.taken == 1
    first.end_closed()
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == "USER_NEW_INPUT"
    assert given.outbox.wait_terminal("req_2")["interrupted"] is True
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_3")["outcome"] == "COMPLETED"
    given.settle()
    assert quota.taken == 0
    assert given.sample("refused_total", reason="max_requests") == 0


def test_so_it_does_when_the_end_of_the_other_is_on_its_way_to_the_client() -> None:
    quota = Quota(1)
    given = stuck(requests=quota)
    given.request("req_1")
    given.source.next()
    request = given.frame(Request("req_2", "TEXT", RequestContent("Hi")))
    # The session hears that the terminal frame is written only after the request.
    given.tell(
        RequestReported("req_1", make_report([GenerationResult(Ending.COMPLETED)], Delivered())),
        request,
    )
    given.source.next()
    assert given.sample("refused_total", reason="max_requests") == 0
    assert quota.taken == 1


def test_who_is_refused_has_interrupted_nothing() -> None:
    quota = Quota(1)
    given = stuck(requests=quota)
    given.request("req_1")
    stream = given.source.next()
    given.interrupt("req_1")
    given.settle()
    full(quota)  # somebody else was faster than its next request
    given.request("req_2")
    busy(given, "req_2")
    stream.end_closed()
    assert given.outbox.wait_ack()["status"] == "SUCCESS"
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == "USER_STOP"


def test_what_was_told_to_stop_takes_nobodys_place_though_its_stream_is_stuck() -> None:
    quota = Quota(1)
    given = stuck(requests=quota)
    given.request("req_1")
    given.source.next()
    given.interrupt("req_1")
    given.settle()
    assert quota.taken == 0


def _complete(given: Given) -> None:
    given.source.streams[0].complete()


def _fail(given: Given) -> None:
    given.source.streams[0].end(GenerationResult(Ending.FAILED, StreamError("no")))


def _reap(given: Given) -> None:
    given.tell(ReapRequest("req_1", "stuck"))
    given.settle()
    given.source.streams[0].end_closed()


@pytest.mark.parametrize("end", [_complete, _fail, _reap])
def test_however_a_request_ends_there_is_room_again(end: Callable[[Given], None]) -> None:
    quota = Quota(1)
    given = stuck(requests=quota)
    given.request("req_1")
    given.source.next()
    assert quota.taken == 1
    end(given)
    given.outbox.wait_terminal("req_1")
    given.settle()
    assert quota.taken == 0


@pytest.mark.parametrize("how", [ConnectionLost("gone"), NONSENSE])
def test_a_session_that_is_gone_has_left_its_requests_places(how: Any) -> None:
    quota = Quota(2)
    given = Given(requests=quota, on_new_request=OnNewRequest.PARALLEL)
    given.register()
    given.request("req_1")
    given.request("req_2")
    given.settle()
    assert quota.taken == 2
    given.tell(how)
    assert given.ref.actor_stopped.wait(LIMIT)
    assert quota.taken == 0


def test_an_answer_that_goes_on_is_refused_too_and_may_go_on_later() -> None:
    quota = Quota(1)
    given = Given(FakeSource(), requests=quota)
    given.register()
    call(given, "req_1", "a").complete()
    given.outbox.wait_terminal("req_1")
    given.settle()
    other = full(quota)
    given.tell(given.frame(FunctionResult("a", 1, "req_2")))
    busy(given, "req_2")
    other.tell(ConnectionLost("gone"))
    other.settle()
    given.tell(given.frame(FunctionResult("a", 1, "req_2")))
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"


def test_an_answer_that_goes_on_takes_the_place_of_the_one_it_goes_on_from() -> None:
    quota = Quota(1)
    given = Given(FakeSource(stuck=True), requests=quota)
    given.register()
    stream = call(given, "req_1", "a")
    given.settle()
    # The client is faster than the end of the answer.
    given.tell(given.frame(FunctionResult("a", 1, "req_2")))
    given.settle()
    assert quota.taken == 1
    stream.complete()
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    given.settle()
    assert quota.taken == 0
    assert given.sample("refused_total", reason="max_requests") == 0


# The gateway -------------------------------------------------------------------------------------


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


class Limited:
    """A gateway with limits, and its two ports."""

    def __init__(self, make_gateway: Callable[..., Gateway], **limits: int) -> None:
        sessions = limits.pop("max_sessions", 0)
        server = ServerSettings(max_sessions=sessions)
        self.gateway = make_gateway(server=server, ops_port=free_port(), **limits)
        self.port = self.gateway.server.port
        assert self.gateway.ops is not None
        self.ports = (self.port, self.gateway.ops.port)

    def ready(self) -> tuple[int, str]:
        """What both ports say."""
        first, second = (get(port, "/readyz") for port in self.ports)
        assert first == second
        for port in self.ports:
            assert get(port, "/livez") == (200, "ok\n")
            assert get(port, "/health")[0] == 200
        return first

    def value(self, name: str, **labels: str) -> float | None:
        return self.gateway.metrics.registry.get_sample_value(f"bargein_{name}", labels)


READY = (200, "ok\n")


def test_it_is_not_ready_while_it_has_as_many_sessions_as_may_be(
    make_gateway: Callable[..., Gateway],
) -> None:
    limited = Limited(make_gateway, max_sessions=2)
    with Client(limited.port), Client(limited.port) as second:
        assert limited.value("sessions_active") == 2
        assert limited.ready() == (
            503,
            "not ready: out of capacity: 2 sessions (--max-sessions)\n",
        )
        with Client(limited.port, register=False) as third:
            third.send("HEALTH_CHECK", {"check_fields": []})
            third.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
            third.send("REGISTER", AUTH)
            assert third.wait_closed() == 1013
            assert third.frames[-1].payload["error_code"] == "SERVER_BUSY"
        assert limited.value("refused_total", reason="max_sessions") == 1
        second.close()
        wait_until(lambda: limited.value("sessions_active") == 1, "one has left")
        assert limited.ready() == READY
        with Client(limited.port):
            assert limited.ready()[0] == 503


def test_it_is_not_ready_while_as_many_requests_are_live_as_may_be(
    make_gateway: Callable[..., Gateway], provider: ProviderProcess
) -> None:
    limited = Limited(make_gateway, max_requests=1)
    hanging = provider.fresh(scripts.idle_mid_stream(["Once"]))
    with Client(limited.port) as first, Client(limited.port) as second:
        request_id = first.request(hanging)
        first.wait_text(request_id)
        assert limited.ready() == (
            503,
            "not ready: out of capacity: 1 live requests (--max-requests)\n",
        )
        refused = second.request(hanging)
        assert second.wait_terminal(refused).payload["error_code"] == "SERVER_BUSY"
        next_one = first.request(hanging)  # one's own makes room
        first.wait_text(next_one)
        first.interrupt(next_one)
        first.wait_terminal(next_one)
        assert limited.ready() == READY
        request_id = second.request(provider.fresh(scripts.answer(["Hello"])))
        assert second.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    assert limited.value("refused_total", reason="max_requests") == 1


def test_before_it_has_started_it_says_so() -> None:
    assert Gateway(Settings()).unready() == "starting"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_when_it_is_full_it_takes_up_new_settings_all_the_same(provider: ProviderProcess) -> None:
    arguments = (*provider_arguments(provider), "--max-sessions", "1")
    with Daemon(*arguments) as daemon, Client(daemon.port):
        assert get(daemon.port, "/readyz")[0] == 503
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: '"Reloaded"' in daemon.log, "it has taken them up", LIMIT)


@pytest.fixture
def few_spare(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many connections may be beyond the sessions."""
    monkeypatch.setattr("gateway.server.server._SPARE_CONNECTIONS", 3)
    return 3


def test_who_does_not_register_makes_way_for_those_who_come_later(
    make_gateway: Callable[..., Gateway], few_spare: int
) -> None:
    limited = Limited(make_gateway, max_sessions=2)
    server = limited.gateway.server
    with contextlib.ExitStack() as stack:
        registered = [stack.enter_context(Client(limited.port)) for _ in range(2)]
        silent = stack.enter_context(socket.create_connection(("127.0.0.1", limited.port)))
        silent.settimeout(LIMIT)
        wait_until(lambda: server.connections == 3, "all are connected")
        idle = [stack.enter_context(Client(limited.port, register=False)) for _ in range(3)]
        assert silent.recv(1) == b""  # the oldest had to go
        more = [stack.enter_context(Client(limited.port, register=False)) for _ in range(2)]
        for one in idle[:2]:
            assert one.wait_closed() == 1013
        for _ in range(10):
            assert get(limited.port, "/health")[0] == 200
            assert get(limited.port, "/readyz")[0] == 503
        assert server.connections <= 2 + few_spare
        for client in registered:
            client.send("SESSION_QUERY", {"query_fields": []})
            client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
        more[-1].send("REGISTER", AUTH)
        assert more[-1].wait_closed() == 1013
        assert more[-1].frames[-1].payload["error_code"] == "SERVER_BUSY"
    refused = limited.value("refused_total", reason="max_connections")
    assert refused is not None
    assert refused >= 3


def test_a_crowd_that_registers_is_let_in_up_to_the_last_one(
    make_gateway: Callable[..., Gateway], few_spare: int
) -> None:
    limited = Limited(make_gateway, max_sessions=20)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(Client(limited.port, register=False)) for _ in range(20)]
        for client in crowd:
            client.register()
        assert limited.value("sessions_active") == 20
    assert limited.value("refused_total", reason="max_connections") == 0


def test_without_a_limit_nobody_makes_way(
    make_gateway: Callable[..., Gateway], few_spare: int
) -> None:
    limited = Limited(make_gateway, max_sessions=0)
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(Client(limited.port, register=False))
        assert limited.gateway.server.connections == 10
        assert limited.ready() == READY


# File descriptors --------------------------------------------------------------------------------

needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")

WITH_FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, LIMITS)
import run
sys.exit(run.main(sys.argv[1:]))
"""


def files(few: int, most: int) -> str:
    """A launcher with limits of its own."""
    return WITH_FEW_FILES.replace("LIMITS", str((few, most)))


@pytest.fixture
def crowd() -> Iterator[Callable[[int, int], list[socket.socket]]]:
    """Opens connections that say nothing, and closes them after the test."""
    opened: list[socket.socket] = []

    def open_some(port: int, number: int) -> list[socket.socket]:
        opened.extend(socket.create_connection(("127.0.0.1", port), LIMIT) for _ in range(number))
        return opened

    yield open_some
    for sock in opened:
        sock.close()


@needs_limits
def test_without_file_descriptors_new_clients_wait_and_the_others_go_on(
    provider: ProviderProcess, crowd: Callable[[int, int], list[socket.socket]]
) -> None:
    ops_port = free_port()
    arguments = (*provider_arguments(provider), "--ops-port", str(ops_port))
    answer = provider.fresh(scripts.answer(["Hello"]))
    with Daemon(*arguments, launcher=files(48, 48)) as daemon, Client(daemon.port) as client:
        request_id = client.request(answer)
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        waiting = crowd(daemon.port, 60)
        wait_until(lambda: "Cannot accept connections" in daemon.log, "it is in the log")
        client.send("SESSION_QUERY", {"query_fields": []})  # those who are in are not touched
        client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
        client.interrupt(None)
        assert client.wait_ack().payload["status"] == "FAILED"
        for sock in waiting:
            sock.close()
        with Client(daemon.port) as late:  # there is room again
            request_id = late.request(answer)
            assert late.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        assert get(daemon.port, "/readyz") == READY
        assert get(ops_port, "/readyz") == READY
        daemon.signal(signal.SIGTERM)
        assert client.wait_closed() == 1012
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    told = [line for line in lines if line["event"] == "Cannot accept connections"]
    assert 1 <= len(told) <= 2, "it is said at most every 10 s"
    assert told[0]["port"] == daemon.port
    assert told[0]["error"] == "the open files that are left are reserved for live requests"
    assert any(line["event"] == "Open file limit too low for all clients" for line in lines)


@needs_limits
@pytest.mark.parametrize("max_sessions", ["10000", "0"])
def test_without_file_descriptors_who_does_not_register_makes_way(max_sessions: str) -> None:
    """However many may be connected: else whoever answers pings could keep all others out."""
    arguments = ("--max-sessions", max_sessions, "--ops-port", "0")
    with (
        Daemon(*arguments, launcher=files(48, 48)) as daemon,
        Client(daemon.port) as client,
        contextlib.ExitStack() as stack,
    ):
        strangers = []
        while "Cannot accept connections" not in daemon.log:
            strangers.append(stack.enter_context(Client(daemon.port, register=False)))
        with Client(daemon.port) as late:
            assert late.session_id
        assert strangers[0].wait_closed() == 1013
        client.send("SESSION_QUERY", {"query_fields": []})  # those who are in are not touched
        client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
        assert "no open files left, and it had not registered" in daemon.log


@pytest.mark.skipif(sys.platform != "linux", reason="only there it can be seen from outside")
def test_it_allows_itself_as_many_files_as_clients_may_come() -> None:
    limits = ("--max-sessions", "100", "--max-requests", "50")
    with Daemon(*limits, launcher=files(64, 5000)) as daemon:
        assert open_files(daemon) == (100 + 128 + 2 * 50 + 256, 5000)
        assert "Open file limit" not in daemon.log
    with Daemon("--max-sessions", "0", launcher=files(64, 5000)) as daemon:
        assert open_files(daemon) == (5000, 5000)
        assert "Open file limit" not in daemon.log
    with Daemon(*limits, launcher=files(4000, 5000)) as daemon:
        assert open_files(daemon) == (4000, 5000)  # never fewer than there were
    with Daemon(*limits, launcher=files(64, 300)) as daemon:
        assert open_files(daemon) == (300, 300)
        assert "Open file limit too low for all clients" in daemon.log


def open_files(daemon: Daemon) -> tuple[int, int]:
    """A process's limits, soft and hard."""
    import resource

    return resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)


# Open files and live requests --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "connections", "requests", "per_request", "shares"),
    [
        (math.inf, 10_128, 1000, 1, (0, 1000)),  # macOS has no limit
        (math.inf, 0, 0, 2, (0, 0)),
        (11_384, 10_128, 1000, 1, (10_128, 1000)),  # exactly enough
        (11_383, 10_128, 1000, 1, (10_128, 999)),  # sessions first
        (1_048_576, 10_128, 1000, 1, (1_047_320, 1000)),
        (65_536, 10_128, 0, 1, (10_128, 55_152)),  # no limit becomes one
        (600, 228, 1000, 1, (228, 116)),
        (1024, 10_128, 1000, 1, (576, 192)),  # sessions do not fit: a quarter is for requests
        (4096, 10_128, 1000, 1, (3340, 500)),  # or half of what was asked for
        (4096, 10_128, 1000, 2, (2880, 480)),  # each holds two
        (4096, 10_128, 10, 1, (3835, 5)),
        (4096, 10_128, 0, 1, (2880, 960)),
        (1024, 0, 1000, 1, (384, 384)),  # sessions without a limit: half
        (5000, 0, 1000, 2, (2744, 1000)),
        (64, 10_128, 1000, 1, (24, 8)),
        (8, 10_128, 1000, 2, (2, 1)),  # always one
        (1024, 10_128, 1, 1, (767, 1)),
    ],
)
def test_files_are_shared_between_clients_and_live_requests(
    files: float, connections: int, requests: int, per_request: int, shares: tuple[int, int]
) -> None:
    assert share_files(files, connections, requests, per_request) == shares
    open_at_most, live_at_most = shares
    if math.isfinite(files):
        assert open_at_most + live_at_most * per_request <= files


def frames_of_each(client: Client, ids: list[str], *, ended: bool) -> list[list[Received]]:
    """The frames of each request, once each has one; or, with `ended`, once each has ended."""

    def is_there(frames: list[Received]) -> bool:
        return any(frame.is_terminal or not ended for frame in frames)

    while not all(is_there(client.frames_of(request_id)) for request_id in ids):
        client.next()
    return [client.frames_of(request_id) for request_id in ids]


@needs_limits
@pytest.mark.parametrize(
    ("limits", "arguments", "live", "connected"),
    [
        ((100, 100), (), 12, 38),
        ((40, 128), ("--max-sessions", "0"), 32, 32),
        ((128, 128), ("--llm-fallback-url", "{url}", "--llm-fallback-model", "b"), 8, 48),
    ],
)
def test_a_request_never_lacks_a_file_whatever_clients_take(
    provider: ProviderProcess,
    crowd: Callable[[int, int], list[socket.socket]],
    limits: tuple[int, int],
    arguments: tuple[str, ...],
    live: int,
    connected: int,
) -> None:
    ops_port = free_port()
    more = [one.replace("{url}", provider.base_url) for one in arguments]
    command = [*provider_arguments(provider), *more, "--ops-port", str(ops_port)]
    hanging = provider.fresh(scripts.idle_mid_stream(["Once"]))
    with (
        Daemon(*command, "--on-new-request", "parallel", launcher=files(*limits)) as daemon,
        contextlib.ExitStack() as stack,
    ):
        (warning,) = [
            line
            for line in map(json.loads, daemon.log.splitlines())
            if line["level"] == "warning" and line["component"] == "SYS"
        ]
        assert warning["event"] == "Open file limit too low for all clients"
        assert (warning["limit"], warning["max_requests"], warning["connections"]) == (
            limits[1],
            live,
            connected,
        )
        clients = [stack.enter_context(Client(daemon.port)) for _ in range(6)]
        crowd(daemon.port, 200)
        wait_until(lambda: "Cannot accept connections" in daemon.log, "clients have their share")
        assert get(ops_port, "/readyz") == (
            503,
            f"not ready: out of capacity: {connected} connections (limit on open files)\n",
        )
        for _ in range(2):  # again, when the first ones have been stopped
            asked = [(client, [client.request(hanging) for _ in range(8)]) for client in clients]
            begun = [
                one for client, ids in asked for one in frames_of_each(client, ids, ended=False)
            ]
            first = [frames[0] for frames in begun]
            texts = [frame.text for frame in first if frame.msg_type == "RESPONSE"]
            errors = [frame.payload for frame in first if frame.msg_type == "ERROR"]
            assert texts == ["Once"] * live
            assert [error["error_code"] for error in errors] == ["SERVER_BUSY"] * (48 - live)
            assert get(ops_port, "/readyz") == (
                503,
                f"not ready: out of capacity: {live} live requests (--max-requests)\n",
            )
            for client in clients:
                client.interrupt(None)
                client.wait_ack()
            ended = [
                one for client, ids in asked for one in frames_of_each(client, ids, ended=True)
            ]
            outcomes = [frames[-1].payload["outcome"] for frames in ended]
            assert outcomes.count("INTERRUPTED") == live
            assert outcomes.count("FAILED") == 48 - live
        assert "Traceback" not in daemon.log


def test_it_is_not_ready_while_clients_wait_for_files(
    make_gateway: Callable[..., Gateway],
) -> None:
    gateway = make_gateway(server=ServerSettings(max_open=2), ops_port=free_port())
    assert gateway.ops is not None
    with Client(gateway.server.port) as first, Client(gateway.server.port) as second:
        said = "not ready: out of capacity: 2 connections (limit on open files)\n"
        assert get(gateway.ops.port, "/readyz") == (503, said)
        waiting = socket.create_connection(("127.0.0.1", gateway.server.port), LIMIT)
        second.close()
        waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert waiting.recv(12) == b"HTTP/1.1 200"  # it is its turn now
        waiting.close()
        wait_until(lambda: gateway.server.connections == 1, "they have left")
        assert get(gateway.ops.port, "/readyz") == READY
        assert first.session_id
