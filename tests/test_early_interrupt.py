"""An INTERRUPT that overtakes its request: it is remembered for a while, and the request that comes
then is answered as interrupted and never asked of the model."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from actors.session.profile import FunctionDefinition, SystemPrompt
from actors.session.request_ids import EARLY_INTERRUPT_SECONDS, MAX_EARLY_INTERRUPTS
from actors.words import OnNewRequest
from gateway.app import Gateway
from gateway.wire.frames import (
    FunctionResult,
    Interrupt,
    Request,
    RequestContent,
    SessionQuery,
)
from llm.chat.completions import ToolCall
from tests.fakes import Clock, FakeSource, FakeStream
from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.provider_process import ProviderProcess
from tests.test_session import FrameReceived, Given

pytestmark = pytest.mark.usefixtures("no_actor_left")


def session(source: FakeSource | None = None, **settings: Any) -> Given:
    """A registered session whose time stands still."""
    given = Given(source, session_timeout=0, heartbeat_interval=0, **settings)
    given.register()
    return given


def interrupt_early(given: Given, clock: Clock, request_id: str, reason: str = "USER_STOP") -> None:
    """INTERRUPT, read now, of what has not come."""
    interrupt = Interrupt(request_id, reason)
    given.tell(FrameReceived(interrupt, given.session_id, clock.now))
    ack = given.outbox.wait_ack()
    assert ack["status"] == "FAILED"
    assert ack["interrupt_request_id"] == request_id
    assert ack["interrupted_request_ids"] == []
    (result,) = ack["results"]
    assert (result["request_id"], result["outcome"]) == (request_id, "UNKNOWN")


def is_generated(given: Given, request_id: str) -> bool:
    """Send the request; whether the model is asked. It is ended in any case."""
    streams = len(given.source.streams)
    given.request(request_id)
    given.settle_requests()
    if len(given.source.streams) == streams:
        assert given.outbox.wait_terminal(request_id)["outcome"] == "INTERRUPTED"
        return False
    given.source.streams[-1].complete()
    assert given.outbox.wait_terminal(request_id)["outcome"] == "COMPLETED"
    return True


# The wire ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tts", [False, True])
def test_a_request_that_was_interrupted_before_it_came_is_answered_so_and_costs_no_post(
    gateway: Gateway, provider: ProviderProcess, tts: bool
) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.register(require_tts=tts)
        script = provider.fresh(scripts.answer(["never"]))
        client.interrupt("req_early", "USER_NEW_INPUT")
        ack = client.wait_ack()
        assert ack.payload["status"] == "FAILED"
        assert ack.payload["results"][0]["outcome"] == "UNKNOWN"
        client.request(script, "req_early")
        voice_end = {"voice_stream_seq": -1} if tts else {}
        terminal = client.wait_terminal("req_early")
        assert terminal.payload == {
            "request_id": "req_early",
            "text_stream_seq": -1,
            "content": {},
            "interrupted": True,
            "interrupt_reason": "USER_NEW_INPUT",
            "outcome": "INTERRUPTED",
            "finish_reason": None,
            "usage": None,
            **voice_end,
        }
        after = provider.fresh(scripts.answer(["yes"]))
        next_id = client.request(after)
        assert client.wait_terminal(next_id).payload["outcome"] == "COMPLETED"
        assert client.frames_of("req_early") == [terminal]
        assert provider.posts(script) == []
        # The user did say it, and heard nothing in answer.
        messages = provider.wait_post(script=after).body["messages"]
        assert messages[0] == {"role": "user", "content": script}
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert "interrupted" in messages[1]["content"]


def test_interrupt_and_request_may_come_in_one_packet(
    client: Client, provider: ProviderProcess
) -> None:
    script = provider.fresh(scripts.answer(["never"]))
    with client.one_packet():
        client.interrupt("req_early")
        client.request(script, "req_early")
        client.interrupt("req_early")
    assert client.wait_terminal("req_early").payload["interrupt_reason"] == "USER_STOP"
    second = client.wait_ack()
    assert second.payload["results"][0]["outcome"] == "ALREADY_DONE"
    provider.counts()
    assert provider.posts(script) == []


def test_what_else_is_live_is_not_interrupted_by_a_request_that_never_runs(
    client: Client, provider: ProviderProcess
) -> None:
    key = provider.unique("end")
    live = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(live)
    client.interrupt("req_early")
    client.request(provider.fresh(scripts.answer(["never"])), "req_early")
    assert client.wait_terminal("req_early").payload["outcome"] == "INTERRUPTED"
    provider.release(key)
    assert client.wait_terminal(live).payload["outcome"] == "COMPLETED"
    assert client.text_of(live) == "on and on"


# What is remembered ------------------------------------------------------------------------------


def test_it_is_remembered_for_thirty_seconds(clock: Clock) -> None:
    assert EARLY_INTERRUPT_SECONDS == 30
    given = session()
    interrupt_early(given, clock, "in_time")
    interrupt_early(given, clock, "late")
    clock.now += 30
    assert not is_generated(given, "in_time")
    clock.now += 0.25
    assert is_generated(given, "late")


def test_the_time_runs_from_when_the_interrupt_was_read(clock: Clock) -> None:
    given = session()
    clock.now += 1000
    read_at = clock.now - 31  # it lay in the mailbox for so long
    given.tell(FrameReceived(Interrupt("req_1"), given.session_id, read_at))
    given.outbox.wait_ack()
    assert is_generated(given, "req_1")


def test_a_second_one_is_remembered_anew_with_its_own_reason(clock: Clock) -> None:
    given = session()
    interrupt_early(given, clock, "req_1", "USER_STOP")
    clock.now += 20
    interrupt_early(given, clock, "req_1", "USER_VOICE_INPUT")
    clock.now += 20
    given.request("req_1")
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == "USER_VOICE_INPUT"


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("USER_NEW_INPUT", "USER_NEW_INPUT"),
        ("USER_STOP", "USER_STOP"),
        ("CLIENT_ERROR", "CLIENT_ERROR"),
        ("because", "OTHER"),
        (None, "OTHER"),
    ],
)
def test_the_terminal_frame_has_the_reason_of_the_interrupt(
    clock: Clock, sent: Any, told: str
) -> None:
    given = session()
    interrupt_early(given, clock, "req_1", sent)
    given.request("req_1")
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == told


def test_it_serves_once_and_the_id_is_used_then(clock: Clock) -> None:
    given = session()
    interrupt_early(given, clock, "req_1")
    assert not is_generated(given, "req_1")
    given.request("req_1")
    fault = given.outbox.wait_for("ERROR")
    assert fault["error_code"] == "MALFORMED_PAYLOAD"
    assert "request_id" not in fault
    given.interrupt("req_1")
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "ALREADY_DONE"
    assert given.source.streams == []
    assert given.sample("requests_total", outcome="interrupted") == 1


def test_an_interrupt_for_all_remembers_nothing(clock: Clock) -> None:
    given = session()
    for target in (None, ""):
        given.interrupt(target)
        assert given.outbox.wait_ack()["results"] == []
    assert is_generated(given, "req_1")


def test_an_interrupt_of_one_request_is_no_other_s_and_no_other_session_s(clock: Clock) -> None:
    given, other = session(), session()
    interrupt_early(given, clock, "req_1")
    assert is_generated(given, "req_2")
    assert is_generated(other, "req_1")
    assert not is_generated(given, "req_1")


def test_an_interrupt_with_a_foreign_session_id_is_remembered() -> None:
    given = session()
    foreign = "sess_0123456789abcdef"
    given.tell(FrameReceived(Interrupt("req_1"), foreign, time.monotonic()))
    assert given.outbox.wait_for("INTERRUPT_ACK")["results"][0]["outcome"] == "UNKNOWN"
    given.request("req_1")
    assert given.outbox.wait_terminal("req_1")["interrupted"] is True


def test_an_interrupt_of_what_was_live_is_not_kept_for_a_later_one(clock: Clock) -> None:
    given = session(on_new_request=OnNewRequest.REJECT)
    given.request("live")
    stream = given.source.next()
    given.request("req_1")
    assert given.outbox.wait_terminal("req_1")["error_code"] == "SERVER_BUSY"
    given.interrupt("live")
    given.outbox.wait_terminal("live")
    assert stream.close_asked.is_set()
    assert is_generated(given, "req_1")


def test_one_whose_request_has_come_takes_no_place_any_more(clock: Clock) -> None:
    given = session()
    interrupt_early(given, clock, "first")
    interrupt_early(given, clock, "second")
    assert not is_generated(given, "second")
    for number in range(99):
        interrupt_early(given, clock, f"req_{number}")
    assert not is_generated(given, "first")


def test_an_interrupt_of_a_request_that_was_refused_is_late_and_not_early(clock: Clock) -> None:
    given = session(on_new_request=OnNewRequest.REJECT)
    given.request("live")
    stream = given.source.next()
    given.request("req_1")
    assert given.outbox.wait_terminal("req_1")["error_code"] == "SERVER_BUSY"
    given.interrupt("req_1")
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "ALREADY_DONE"
    stream.complete()
    given.outbox.wait_terminal("live")
    given.settle()
    assert is_generated(given, "req_1")


def test_a_hundred_are_remembered_and_the_oldest_is_forgotten_first(clock: Clock) -> None:
    assert MAX_EARLY_INTERRUPTS == 100
    given = session()
    for number in range(100):
        interrupt_early(given, clock, f"req_{number}")
    interrupt_early(given, clock, "req_0")  # anew: now it is the youngest, and still one of 100
    interrupt_early(given, clock, "one_more")
    assert is_generated(given, "req_1")
    assert not is_generated(given, "req_2")
    assert not is_generated(given, "req_0")
    assert not is_generated(given, "req_99")
    assert not is_generated(given, "one_more")


# What the request brings along -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Hi", ""])
def test_its_updates_are_made_all_the_same(clock: Clock, text: str) -> None:
    given = session()
    interrupt_early(given, clock, "req_1")
    request = Request(
        "req_1",
        "TEXT",
        RequestContent(text),
        require_tts=True,
        system_prompt=SystemPrompt("a cook"),
        function_calling=[FunctionDefinition("lamp")],
    )
    given.tell(given.frame(request))
    terminal = given.outbox.wait_terminal("req_1")
    assert terminal["outcome"] == "INTERRUPTED"
    assert terminal["voice_stream_seq"] == -1
    given.tell(given.frame(SessionQuery()))
    data = given.outbox.wait_for("SESSION_INFO")["session_data"]
    assert data["require_tts"] is True
    assert data["function_calling"] == [{"name": "lamp"}]
    given.request("req_2")
    body = json.loads(given.source.next().body)
    assert body["messages"][0] == {"role": "system", "content": "a cook"}
    turns = body["messages"][1:]
    assert [turn["role"] for turn in turns] == (["user", "assistant", "user"] if text else ["user"])


@pytest.mark.parametrize("policy", OnNewRequest)
def test_no_policy_is_asked_for_a_request_that_never_runs(
    clock: Clock, policy: OnNewRequest
) -> None:
    given = session(on_new_request=policy, max_parallel=1)
    given.request("live")
    stream = given.source.next()
    interrupt_early(given, clock, "req_1")
    assert not is_generated(given, "req_1")
    assert not stream.close_asked.is_set()
    stream.say("still here")
    stream.complete()
    assert given.outbox.wait_terminal("live")["outcome"] == "COMPLETED"
    assert given.sample("refused_total", reason="request") == 0


def test_a_voice_that_was_interrupted_before_it_came_is_answered_so(client: Client) -> None:
    client.interrupt("whole")
    client.wait_ack()
    content = {"voice_mode": "BASE64", "voice": "AAEA"}
    voice = {"request_id": "whole", "data_type": "VOICE", "content": content}
    client.send("REQUEST", voice)
    terminal = client.wait_terminal("whole")
    assert terminal.msg_type == "RESPONSE"
    assert terminal.payload["outcome"] == "INTERRUPTED"
    client.send("REQUEST", voice | {"request_id": "next"})
    client.wait_terminal("next")
    assert client.frames_of("whole") == [terminal]


def test_a_voice_that_begins_in_time_is_answered_so_however_long_it_is(clock: Clock) -> None:
    given = session()
    interrupt_early(given, clock, "v")
    clock.now += 30
    voice = RequestContent(voice_mode="BINARY")
    given.tell(given.frame(Request("v", "VOICE", voice, True, 0)))
    given.settle()
    clock.now += 60
    given.tell(given.frame(Request("v", "VOICE", voice, True, -1)))
    assert given.outbox.wait_terminal("v")["outcome"] == "INTERRUPTED"
    given.settle()
    assert given.outbox.history().count("end INTERRUPTED v") == 1
    assert given.outbox.history()[-1] == "end INTERRUPTED v"


# A request that goes on after the results of functions -------------------------------------------


def called(given: Given, *call_ids: str) -> None:
    """A request whose answer is these calls."""
    given.request("question")
    stream = given.source.next()
    call(stream, *call_ids)
    stream.complete()
    given.outbox.wait_terminal("question")


def call(stream: FakeStream, *call_ids: str) -> None:
    stream.sink.opened()
    for call_id in call_ids:
        stream.sink.call(ToolCall(call_id, "lamp", "{}"))


def test_an_answer_that_was_to_go_on_does_not_when_it_was_interrupted_before(clock: Clock) -> None:
    given = session()
    called(given, "call_1")
    interrupt_early(given, clock, "going_on")
    given.tell(given.frame(FunctionResult("call_1", {"lit": True}, "going_on")))
    terminal = given.outbox.wait_terminal("going_on")
    assert (terminal["outcome"], terminal["interrupt_reason"]) == ("INTERRUPTED", "USER_STOP")
    assert len(given.source.streams) == 1
    # The result is not lost: the function did run.
    given.request("another")
    messages = json.loads(given.source.next().body)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
    assert json.loads(messages[2]["content"]) == {"lit": True}


def test_it_interrupts_nothing_else_either(clock: Clock) -> None:
    given = session()
    called(given, "call_1")
    given.request("live")
    stream = given.source.next()
    interrupt_early(given, clock, "going_on")
    given.tell(given.frame(FunctionResult("call_1", 7, "going_on")))
    assert given.outbox.wait_terminal("going_on")["outcome"] == "INTERRUPTED"
    assert not stream.close_asked.is_set()
    stream.complete()
    assert given.outbox.wait_terminal("live")["outcome"] == "COMPLETED"


def test_an_early_interrupt_that_is_too_old_lets_the_answer_go_on(clock: Clock) -> None:
    given = session()
    called(given, "call_1")
    interrupt_early(given, clock, "going_on")
    clock.now += 30.25
    given.tell(given.frame(FunctionResult("call_1", 7, "going_on")))
    given.source.next().complete()
    assert given.outbox.wait_terminal("going_on")["outcome"] == "COMPLETED"


def test_a_request_with_an_update_that_cannot_be_made_ends_as_interrupted_all_the_same(
    client: Client,
) -> None:
    """No ERROR may come for a request that was interrupted."""
    client.interrupt("req_1")
    client.wait_ack()
    fields = {"function_calling_op": "DELETE", "function_calling": ["nobodys"]}
    content = {"request_id": "req_1", "data_type": "TEXT", "content": {"text": "hello"}}
    client.send("REQUEST", {**content, **fields, "require_tts": True})
    ended = client.wait_terminal("req_1").payload
    assert ended["outcome"] == "INTERRUPTED"
    assert "voice_stream_seq" not in ended  # nor was any other part of the update made


def test_a_request_that_is_not_understood_ends_as_interrupted_too(client: Client) -> None:
    client.interrupt("req_1")
    client.wait_ack()
    client.send("REQUEST", {"request_id": "req_1", "data_type": "TEXT", "content": {"text": 7}})
    assert client.wait_terminal("req_1").payload["outcome"] == "INTERRUPTED"


def test_an_interrupt_of_open_voice_takes_no_place_among_the_early_ones(client: Client) -> None:
    content = {"voice_mode": "BINARY"}
    client.send("REQUEST", {"request_id": "voice", "data_type": "VOICE", "content": content})
    for number in range(MAX_EARLY_INTERRUPTS):
        client.interrupt(f"req_{number}")
        client.wait_ack()
    client.interrupt("voice")
    assert client.wait_ack().payload["results"][0]["outcome"] == "STOPPED"
    client.request("", "req_0")  # it would be completed at once
    assert client.wait_terminal("req_0").payload["outcome"] == "INTERRUPTED"
