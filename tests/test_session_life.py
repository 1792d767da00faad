"""A session's life: signs of life, heartbeats, the warning, the end; what it tells of itself; and
what it does with a request while another is live.

No test waits for time to pass: the session's clock is a fake one that a test sets, and its timers,
which are real, ask that clock.
"""

from __future__ import annotations

import gc
import os
import time
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import gevent.queue
import greenlet
import pytest

from actors.actor import Timer
from actors.session.lifetime import Due, Lifetime
from actors.session.messages import ConnectionLost, TimeIsDue
from actors.session.profile import Platform
from actors.session.session import SessionSettings
from actors.words import ErrorCode, OnNewRequest
from gateway.app import Gateway
from gateway.wire.decode import FrameError
from gateway.wire.frames import (
    FunctionResult,
    HealthCheck,
    HeartbeatReply,
    Interrupt,
    Request,
    RequestContent,
    SessionQuery,
    Shutdown,
)
from tests.fakes import LIMIT, Clock, FakeSource
from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.provider_process import ProviderProcess
from tests.test_session import BadFrameReceived, Given, VoiceReceived

MakeGateway: TypeAlias = Callable[..., Gateway]
QUICK = 2**-8
"""Seconds between two looks of a timer at the fake clock: far less than anybody waits for it, and
sums of it are exact."""


pytestmark = pytest.mark.usefixtures("no_actor_left")


def session(source: FakeSource | None = None, **settings: Any) -> Given:
    """A registered session whose timers a test plays by `look`."""
    given = Given(source, **settings)
    given.register()
    return given


def look(given: Given) -> list[str]:
    """Its timer fires: the types of the frames that it sends then."""
    before = len(given.outbox.frames)
    given.tell(TimeIsDue())
    given.settle()
    return [frame["msg_type"] for frame in given.outbox.frames[before:]]


def remaining(given: Given) -> int:
    given.tell(given.frame(SessionQuery(["remaining_seconds"])))
    seconds: int = given.outbox.wait_for("SESSION_INFO")["session_data"]["remaining_seconds"]
    return seconds


# Signs of life -----------------------------------------------------------------------------------


def test_a_session_lives_an_hour_and_is_asked_for_a_sign_of_life_every_thirty_seconds() -> None:
    assert SessionSettings().session_timeout == 3600
    assert SessionSettings().heartbeat_interval == 30


RENEWS: dict[str, Any] = {
    "request": Request("req_1", "TEXT", RequestContent("Hi")),
    "request_that_only_updates": Request("req_1", "TEXT", RequestContent("")),
    "voice": Request("req_1", "VOICE", RequestContent(voice_mode="BINARY")),
    "heartbeat_reply": HeartbeatReply("READY"),
}
RENEWS_NOT: dict[str, Any] = {
    "interrupt": Interrupt("req_1"),
    "interrupt_of_all": Interrupt(),
    "session_query": SessionQuery(),
    "health_check": HealthCheck(),
    "result_of_no_call": FunctionResult("call_1", 7),
}


@pytest.mark.parametrize("name", RENEWS)
def test_a_request_or_a_heartbeat_reply_renews_the_session(clock: Clock, name: str) -> None:
    given = session(session_timeout=100, heartbeat_interval=0)
    clock.now += 60
    given.tell(given.frame(RENEWS[name]))
    assert remaining(given) == 100
    clock.now += 99
    assert look(given) == ["SESSION_WARN"]
    assert remaining(given) == 1


@pytest.mark.parametrize("name", RENEWS_NOT)
def test_nothing_else_renews_the_session(clock: Clock, name: str) -> None:
    given = session(session_timeout=100)
    clock.now += 60
    given.tell(given.frame(RENEWS_NOT[name]))
    assert remaining(given) == 40


def test_neither_does_what_is_not_understood_nor_a_frame_with_a_foreign_session_id(
    clock: Clock,
) -> None:
    given = session(session_timeout=100)
    clock.now += 60
    given.tell(BadFrameReceived(FrameError(ErrorCode.MALFORMED_PAYLOAD, "what?", "req_1")))
    given.tell(VoiceReceived(b"voice"))
    session_id, given.session_id = given.session_id, "sess_0123456789abcdef"
    given.tell(given.frame(HeartbeatReply()))
    given.session_id = session_id
    assert remaining(given) == 40


def test_a_generation_that_runs_is_no_sign_of_life(clock: Clock) -> None:
    given = session(session_timeout=100)
    given.request("req_1")
    stream = given.source.next()
    clock.now += 60
    stream.say("still", "talking")
    assert remaining(given) == 40


# Heartbeats, the warning, the end ----------------------------------------------------------------


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats come exactly at their interval."""
    monkeypatch.setattr("actors.session.session._HEARTBEAT_JITTER", 0.0)


def test_sessions_that_are_opened_together_do_not_send_their_heartbeats_together(
    clock: Clock,
) -> None:
    sessions = [session() for _ in range(20)]
    clock.now += 26.9  # the interval is 30 s
    assert [look(given) for given in sessions] == [[]] * 20
    beats = []
    for _ in range(31):
        clock.now += 0.1
        beats.append(sum(look(given) == ["HEARTBEAT"] for given in sessions))
    assert sum(beats) == 20
    assert max(beats) < 10


def test_heartbeats_say_what_remains(clock: Clock, steady: None) -> None:
    given = session()
    for _ in range(3):
        clock.now += 29.5
        assert look(given) == []
        clock.now += 0.5
        assert look(given) == ["HEARTBEAT"]
        assert look(given) == []
    beats = [frame for frame in given.outbox.frames if frame["msg_type"] == "HEARTBEAT"]
    assert [beat["payload"]["remaining_seconds"] for beat in beats] == [3570, 3540, 3510]


def test_a_silent_client_is_warned_once_and_then_told_goodbye_and_closed(clock: Clock) -> None:
    given = session(heartbeat_interval=0)
    clock.now += 3299
    assert look(given) == []
    clock.now += 1
    assert look(given) == ["SESSION_WARN"]
    clock.now += 299
    assert look(given) == []
    assert given.outbox.closed is None
    clock.now += 1
    given.tell(TimeIsDue())
    assert given.outbox.wait_for("SHUTDOWN") == {"reason": "session timeout"}
    given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.closed == (1008, "session timeout")
    assert given.outbox.history() == ["REGISTER_ACK", "SESSION_WARN", "SHUTDOWN"]
    warning = given.outbox.frames[1]["payload"]
    assert (warning["warn_type"], warning["remaining_seconds"]) == ("EXPIRE_SOON", 300)
    assert "300 s" in warning["message"]
    given.assert_nothing_counted_as_live()


def test_a_client_that_was_warned_and_gives_a_sign_of_life_goes_on_and_may_be_warned_again(
    clock: Clock,
) -> None:
    given = session(session_timeout=100, heartbeat_interval=0)
    clock.now += 50
    assert look(given) == ["SESSION_WARN"]
    clock.now += 49
    given.tell(given.frame(HeartbeatReply()))
    given.settle()
    clock.now += 49
    assert look(given) == []
    clock.now += 1
    assert look(given) == ["SESSION_WARN"]
    clock.now += 50
    given.tell(TimeIsDue())
    assert given.outbox.wait_for("SHUTDOWN") == {"reason": "session timeout"}


def test_at_the_end_what_is_live_is_interrupted_first(clock: Clock) -> None:
    given = session(FakeSource(stuck=True), session_timeout=100, ack_timeout=60)
    given.request("req_1")
    stream = given.source.next()
    stream.say("Once")
    clock.now += 100
    assert look(given) == []  # its stream is to be closed first
    assert stream.close_asked.is_set()
    assert look(given) == []
    given.request("req_2")
    assert given.outbox.wait_terminal("req_2")["error_code"] == "SERVER_BUSY"
    stream.end_closed()
    terminal = given.outbox.wait_terminal("req_1")
    assert (terminal["interrupted"], terminal["interrupt_reason"]) == (True, "SESSION_TIMEOUT")
    assert given.outbox.wait_for("SHUTDOWN") == {"reason": "session timeout"}
    given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.closed == (1008, "session timeout")
    assert given.outbox.history()[-3:] == [
        "end SERVER_BUSY req_2",
        "end INTERRUPTED req_1",
        "SHUTDOWN",
    ]
    assert len(given.source.streams) == 1


def test_a_session_that_ends_for_another_reason_neither_beats_nor_times_out_meanwhile(
    clock: Clock,
) -> None:
    given = session(FakeSource(stuck=True), session_timeout=100, ack_timeout=60)
    given.request("req_1")
    stream = given.source.next()
    given.tell(given.frame(Shutdown()))
    given.settle()
    for _ in range(5):
        clock.now += 30
        assert look(given) == []
    stream.end_closed()
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == "CLIENT_SHUTDOWN"
    assert given.outbox.wait_for("SHUTDOWN") == {"reason": "CLIENT_SHUTDOWN"}
    given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.closed == (1000, "CLIENT_SHUTDOWN")


def test_a_session_without_timeout_and_heartbeat_has_no_timer(clock: Clock) -> None:
    given = Given(session_timeout=0, heartbeat_interval=0)
    before = timers()
    given.register()
    assert given.outbox.frames[0]["payload"]["session_timeout_seconds"] == 0
    assert new_since(before, timers()) == []
    clock.now += 1e9
    assert look(given) == []
    assert remaining(given) == 0


@pytest.mark.parametrize(("timeout", "told"), [(3600, 3600), (0.5, 1), (90.2, 91)])
def test_the_ack_says_the_time_in_whole_seconds(timeout: float, told: int) -> None:
    given = Given(session_timeout=timeout)
    given.register()
    assert given.outbox.frames[0]["payload"]["session_timeout_seconds"] == told


def test_before_registration_there_is_neither_heartbeat_nor_end(clock: Clock) -> None:
    given = Given(session_timeout=100, heartbeat_interval=30)
    clock.now += 1000
    given.register()
    assert remaining(given) == 100
    assert look(given) == []


# The timers themselves ---------------------------------------------------------------------------


def objects(kind: type[Any]) -> list[Any]:
    """Those of a type that the collector knows."""
    gc.collect()
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


def timers() -> list[Any]:
    return objects(Timer)


def greenlets() -> list[Any]:
    return [one for one in objects(greenlet.greenlet) if not one.dead]


def new_since(before: list[Any], now: list[Any]) -> list[Any]:
    # Told apart one by one: what another test left behind may end in between.
    known = {id(one) for one in before}
    return [one for one in now if id(one) not in known]


def test_sessions_cost_one_greenlet_each_which_is_the_actor_and_none_for_their_timers(
    clock: Clock,
) -> None:
    """Ten thousand timers must not cost ten thousand greenlets.

    Of all greenlets that the collector knows, those that came with 200 sessions are counted:
    one for each, which runs the actor, so that none is left for its timer. The timers are there all
    the same: when the clock is set, each session sends what is due. They are one for each, before
    they fire and after.
    """
    given = Given(session_timeout=100, heartbeat_interval=QUICK)
    given.register()  # what the first one brings along (the hub, the lanes) is not counted
    old_greenlets, old_timers = greenlets(), timers()
    many = [Given(session_timeout=100, heartbeat_interval=QUICK) for _ in range(200)]
    for one in many:
        one.register()
    assert len(new_since(old_greenlets, greenlets())) == 200
    given.tell(ConnectionLost("gone"))  # its timer is set anew with each look, and would be counted
    given.ref.actor_stopped.wait(LIMIT)
    for _ in range(2):
        clock.now += QUICK
        for one in many:
            one.outbox.wait_for("HEARTBEAT")
    clock.now += 60
    for one in many:
        one.outbox.wait_for("SESSION_WARN")
        one.settle()
    assert len(new_since(old_greenlets, greenlets())) == 200
    assert len(new_since(old_timers, timers())) == 200


def test_an_ended_session_leaves_no_timer_behind() -> None:
    before = timers()
    given = Given()
    given.register()
    assert len(new_since(before, timers())) == 1
    given.tell(ConnectionLost("gone"))
    given.ref.actor_stopped.wait(LIMIT)
    (timer,) = new_since(before, timers()) or [None]
    assert timer is None or not timer._timer.active


def test_a_timer_that_fires_early_is_set_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: gevent.queue.SimpleQueue[float] = gevent.queue.SimpleQueue()
    due = Lifetime.due

    def spied(life: Lifetime, now: float) -> list[Due]:
        looks.put(now)
        return due(life, now)

    monkeypatch.setattr(Lifetime, "due", spied)
    given = session(heartbeat_interval=QUICK, session_timeout=0)
    for _ in range(3):
        assert looks.get(timeout=LIMIT) == clock.now  # nothing is due by the clock
    assert given.outbox.history() == ["REGISTER_ACK"]
    clock.now += QUICK
    given.outbox.wait_for("HEARTBEAT")


# Over a real connection --------------------------------------------------------------------------


def fence(client: Client) -> list[str]:
    """The types of the frames that came before the answer to what is asked last."""
    before = len(client.frames)
    client.send("HEALTH_CHECK", {"check_fields": ["status"]})
    client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
    return [frame.msg_type for frame in client.frames[before:-1]]


def test_the_wire_has_heartbeats_a_warning_and_at_the_end_a_goodbye_and_1008(
    make_gateway: MakeGateway, clock: Clock
) -> None:
    gateway = make_gateway(session_timeout=QUICK * 128, heartbeat_interval=QUICK)
    with Client(gateway.server.port, register=False) as client:
        assert client.register().payload["session_timeout_seconds"] == 1
        clock.now += QUICK
        beat = client.wait_for(lambda frame: frame.msg_type == "HEARTBEAT")
        assert beat.session_id == client.session_id
        assert beat.payload == {"remaining_seconds": 1}
        client.send("HEARTBEAT_REPLY", {"client_status": "READY"})
        assert fence(client) == []  # it has been read
        clock.now += QUICK * 63
        client.wait_for(lambda frame: frame.msg_type == "HEARTBEAT")
        assert fence(client) == []  # and no warning yet
        clock.now += QUICK
        warning = client.wait_for(lambda frame: frame.msg_type == "SESSION_WARN")
        assert warning.payload["warn_type"] == "EXPIRE_SOON"
        clock.now += QUICK * 64
        goodbye = client.wait_for(lambda frame: frame.msg_type == "SHUTDOWN")
        assert goodbye.payload == {"reason": "session timeout"}
        assert client.wait_closed() == 1008
        assert client.frames[-1] is goodbye
        assert [frame.msg_type for frame in client.frames].count("SESSION_WARN") == 1


def test_at_the_end_of_a_session_its_streams_are_closed(
    make_gateway: MakeGateway, provider: ProviderProcess, clock: Clock
) -> None:
    gateway = make_gateway(session_timeout=QUICK * 100, heartbeat_interval=0)
    with Client(gateway.server.port) as client:
        script = provider.fresh(scripts.idle_mid_stream(["once"]))
        request_id = client.request(script)
        client.wait_text(request_id)
        clock.now += QUICK * 100
        terminal = client.wait_terminal(request_id)
        assert terminal.payload["interrupt_reason"] == "SESSION_TIMEOUT"
        assert client.next().payload == {"reason": "session timeout"}
        assert client.wait_closed() == 1008
        provider.wait_closed(provider.wait_post(script=script).conn)


def test_by_default_a_session_has_an_hour(client: Client) -> None:
    assert client.frames[0].payload["session_timeout_seconds"] == 3600


# What a session tells of itself ------------------------------------------------------------------

FUNCTION = {"name": "look_up", "description": "finds it", "parameters": {"type": "object"}}
FIELDS = {
    "platform",
    "require_tts",
    "enable_srs",
    "function_calling",
    "create_time",
    "remaining_seconds",
}


def query(client: Client, **payload: Any) -> dict[str, Any]:
    client.send("SESSION_QUERY", payload)
    info = client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
    assert info.session_id == client.session_id
    assert info.payload["status"] == "SUCCESS"
    assert "message" in info.payload
    data: dict[str, Any] = info.payload["session_data"]
    return data


@pytest.mark.parametrize("payload", [{}, {"query_fields": None}, {"query_fields": []}])
def test_a_query_without_fields_gets_all_of_them(gateway: Gateway, payload: Any) -> None:
    with Client(gateway.server.port, register=False) as client:
        before = time.time_ns() // 1_000_000
        client.register(platform="TV", require_tts=True, function_calling=[FUNCTION])
        after = time.time_ns() // 1_000_000
        data = query(client, **payload)
        assert data.keys() == FIELDS
        assert before <= data.pop("create_time") <= after
        assert 3500 < data.pop("remaining_seconds") <= 3600
        assert data == {
            "platform": "TV",
            "require_tts": True,
            "enable_srs": True,
            "function_calling": [FUNCTION],
        }


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_query_gets_the_fields_that_it_names(client: Client, field: str) -> None:
    everything = query(client)
    asked = query(client, query_fields=[field])
    assert asked.keys() == {field}
    if field != "remaining_seconds":
        assert asked[field] == everything[field]
    other = "enable_srs" if field != "enable_srs" else "platform"
    assert query(client, query_fields=[other, field, field]).keys() == {field, other}


def test_a_query_for_what_is_not_there_gets_the_rest(client: Client) -> None:
    assert query(client, query_fields=["auth", "platform"]) == {"platform": "WEB"}
    assert query(client, query_fields=["auth", "msg_type"]) == {}


def test_a_query_tells_false_as_false_and_none_as_none(gateway: Gateway) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.register(platform=None, enable_srs=False, function_calling=None)
        data = query(client)
        assert (data["platform"], data["require_tts"], data["enable_srs"]) == (None, False, False)
        assert data["function_calling"] == []


def test_a_query_before_the_registration_is_refused(gateway: Gateway) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.send("SESSION_QUERY", {})
        assert client.next().payload["error_code"] == "SESSION_INVALID"


@pytest.mark.parametrize("platform", Platform)
def test_client_type_is_accepted_for_platform(gateway: Gateway, platform: Platform) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.send(
            "REGISTER",
            {"auth": {"type": "API_KEY", "api_key": "test"}, "client_type": platform.value},
        )
        ack = client.wait_for(lambda frame: frame.msg_type == "REGISTER_ACK")
        client.session_id = ack.session_id
        assert query(client, query_fields=["platform"]) == {"platform": platform.value}


@pytest.mark.parametrize("field", ["platform", "client_type"])
def test_a_platform_that_is_none_is_refused_and_may_be_corrected(
    gateway: Gateway, field: str
) -> None:
    with Client(gateway.server.port, register=False) as client:
        auth = {"type": "API_KEY", "api_key": "test"}
        client.send("REGISTER", {"auth": auth, field: "FRIDGE"})
        fault = client.next()
        assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
        assert field in fault.payload["error_detail"]
        client.register()


# Health ------------------------------------------------------------------------------------------


def health(client: Client, **payload: Any) -> dict[str, Any]:
    client.send("HEALTH_CHECK", payload)
    ack = client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
    status: dict[str, Any] = ack.payload["health_status"]
    return status


def burn(seconds: float) -> None:
    """Use the processor for so long."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@pytest.mark.parametrize("payload", [{}, {"check_fields": None}, {"check_fields": []}])
def test_a_health_check_without_fields_gets_all_of_them(client: Client, payload: Any) -> None:
    status = health(client, **payload)
    assert status.keys() == {"status", "conn_count", "cpu_usage"}
    assert (status["status"], status["conn_count"]) == ("UP", 1)


def test_a_health_check_gets_the_fields_that_it_names(gateway: Gateway) -> None:
    with Client(gateway.server.port, register=False) as client, Client(gateway.server.port):
        assert health(client, check_fields=["status"]) == {"status": "UP"}
        assert health(client, check_fields=["conn_count"]) == {"conn_count": 2}
        assert health(client, check_fields=["cpu_usage"]).keys() == {"cpu_usage"}
        assert health(client, check_fields=["status", "mood"]) == {"status": "UP"}
        assert health(client, check_fields=["mood"]) == {}


def test_the_processor_figure_is_above_none_and_no_more_than_there_is(client: Client) -> None:
    burn(0.05)
    usage = health(client)["cpu_usage"]
    assert 0 < usage <= 100 * (os.cpu_count() or 1)


def test_the_processor_figure_is_this_process_s_share_since_the_last_one(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall, cpu = [50.0], [7.0]
    meter = types.SimpleNamespace(monotonic=lambda: wall[0], process_time=lambda: cpu[0])
    monkeypatch.setattr("gateway.app.time", meter)
    with Client(make_gateway().server.port, register=False) as client:
        for wall_passed, cpu_passed, percent in ((4, 1, 25), (10, 0, 0), (2, 3, 150), (1, 0.5, 50)):
            wall[0] += wall_passed
            cpu[0] += cpu_passed
            assert health(client)["cpu_usage"] == percent
        # However many ask, nobody makes it a figure of the last instant.
        wall[0] += 0.9
        cpu[0] += 0.9
        assert health(client)["cpu_usage"] == 50
        assert health(client)["cpu_usage"] == 50
        wall[0] += 0.1
        assert health(client)["cpu_usage"] == 90


def test_work_shows_in_the_processor_figure(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = [0.0]
    meter = types.SimpleNamespace(monotonic=lambda: wall[0], process_time=time.process_time)
    monkeypatch.setattr("gateway.app.time", meter)
    with Client(make_gateway().server.port, register=False) as client:
        wall[0] += 1000
        assert health(client)["cpu_usage"] < 10  # 100 s of work would be 10
        wall[0] += 1
        burn(0.2)
        assert health(client)["cpu_usage"] >= 20


# A request while another is live -----------------------------------------------------------------

POLICIES = list(OnNewRequest)


def ask_twice(given: Given) -> str:
    """Two requests, the first one running: the policy that shows."""
    given.request("one")
    first = given.source.next()
    given.request("two")
    given.settle()
    if given.outbox.history()[-1] == "end SERVER_BUSY two":
        assert not first.close_asked.is_set()
        return "reject"
    given.source.next()
    return "interrupt" if first.close_asked.is_set() else "parallel"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_daemon_s_setting_stands_where_the_registration_says_nothing(
    policy: OnNewRequest,
) -> None:
    given = Given(on_new_request=policy)
    given.register()
    assert ask_twice(given) == policy.value


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("setting", POLICIES)
def test_a_registration_overrides_the_daemon_s_setting(
    policy: OnNewRequest, setting: OnNewRequest
) -> None:
    given = Given(on_new_request=setting)
    given.register(on_new_request=policy)
    assert ask_twice(given) == policy.value


def test_interrupt_is_the_default() -> None:
    assert SessionSettings().on_new_request is OnNewRequest.INTERRUPT


def test_one_session_s_wish_is_no_other_s(make_gateway: MakeGateway) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.INTERRUPT)
    with Client(gateway.server.port, register=False) as first, Client(gateway.server.port) as other:
        first.register(on_new_request="reject")
        for client in (first, other):
            client.wait_text(client.request("default story", "one"))
            client.request("default story", "two")
        refused = first.wait_terminal("two")
        assert refused.payload["error_code"] == "SERVER_BUSY"
        assert refused.payload["retryable"] is True
        assert other.wait_terminal("one").payload["interrupt_reason"] == "USER_NEW_INPUT"
        other.wait_text("two")
        first.wait_text("one")


def test_a_policy_that_is_none_is_refused(gateway: Gateway) -> None:
    with Client(gateway.server.port, register=False) as client:
        auth = {"type": "API_KEY", "api_key": "test"}
        client.send("REGISTER", {"auth": auth, "on_new_request": "queue"})
        fault = client.next()
        assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
        assert "on_new_request" in fault.payload["error_detail"]
        client.register(on_new_request=None)


def test_side_by_side_there_is_a_bound_and_an_ended_request_makes_room() -> None:
    given = Given(max_parallel=3)
    given.register(on_new_request=OnNewRequest.PARALLEL)
    streams = []
    for name in ("one", "two", "three"):
        given.request(name)
        streams.append(given.source.next())
    for _ in range(2):
        given.request("four")
        refused = given.outbox.wait_terminal("four")
        assert (refused["error_code"], refused["retryable"]) == ("SERVER_BUSY", True)
    assert not any(stream.close_asked.is_set() for stream in streams)
    streams[1].complete()
    given.outbox.wait_terminal("two")
    given.settle()
    given.request("four")
    given.source.next()
    given.request("five")
    assert given.outbox.wait_terminal("five")["error_code"] == "SERVER_BUSY"
    assert given.sample("refused_total", reason="request") == 3
