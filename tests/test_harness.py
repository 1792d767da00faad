"""The harness that other projects use: written as they would, and what it promises them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm.demo.scenarios import SCENARIOS, Scenario
from llm.demo.steps import ChatRequest, Completion, Pause, Stall
from tests.harness import (
    AckStatus,
    AnswerEnded,
    ChatClient,
    ConnectionEnded,
    Error,
    ErrorCode,
    FrameRefused,
    InterruptOutcome,
    Outcome,
    RunningGateway,
    RunningProvider,
    SessionInfo,
    Shutdown,
    StartFailed,
    WaitTimeout,
    log_mark,
    run_gateway,
    running,
    scripts,
)
from tests.harness.client import wait_until
from tests.harness.process import TAIL_LINES, Process, ProcessFailed, environment
from tests.harness.protocol import Heartbeat
from tests.harness.provider_process import ProviderProcess

DEFAULTS = {name: one.default for name, one in inspect.signature(run_gateway).parameters.items()}
PAGE = Path(__file__).parent / "harness" / "README.md"


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    """In front of the demo provider."""
    arguments = ("--on-new-request", "parallel", "--heartbeat-interval", "0.1")
    with run_gateway(*arguments, tokens_per_second=30) as gateway:  # no test need hurry
        yield gateway


@pytest.fixture(scope="module")
def scripted(provider: ProviderProcess) -> Iterator[RunningGateway]:
    """In front of the scripted provider."""
    with run_gateway(llm_url=provider.base_url, model="test") as gateway:
        yield gateway


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """Every process that `run_gateway` starts in this test."""
    processes: list[Process] = []

    class Noted(Process):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(running, "Process", Noted)
    return processes


# As an outside user -----------------------------------------------------------------------------


def test_an_interrupt_from_the_question_to_the_closed_stream(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        answer = client.ask("Tell me a story")
        heard = answer.wait_text(20)
        ack = client.interrupt(answer, delivered_text_chars=10)
        assert ack.status == AckStatus.SUCCESS
        assert ack.interrupted_request_ids == [answer.request_id]
        (result,) = ack.results
        assert result.outcome == InterruptOutcome.STOPPED
        assert result.stream_closed_ms is not None
        assert 0 < result.stream_closed_ms < 1000
        ended = answer.collect()
        assert ended.outcome == Outcome.INTERRUPTED
        assert ended.interrupt_reason == "USER_STOP"
        assert ended.text.startswith(heard)
        assert len(ended.text) == result.delivered_text_chars
        assert (ended.error, ended.function_calls) == (None, [])
        types = [frame.msg_type for frame in client.frames if frame.msg_type != "HEARTBEAT"]
        assert types[0] == "REGISTER_ACK"
        assert types[-2:] == ["INTERRUPT_ACK", "RESPONSE"]
        assert set(types[1:-2]) == {"RESPONSE"}
        assert client.interrupt(answer).results[0].outcome == InterruptOutcome.ALREADY_DONE
        # The supervisor hears of the end a moment after the client does.
        wait_until(lambda: gateway.health()["requests"] == 0, "no request is live")
    seen = gateway.provider.wait_ended()
    assert (seen.model, seen.ended, seen.has_key) == ("story", "client_closed", False)


def test_an_answer_sees_its_own_frames_only(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        story = client.ask("Tell me about the sea")
        story.wait_text()
        other = client.ask("Tell me about the moon", request_id="mine")
        other.wait_text(30)
        story.wait_text(60)
        assert client.interrupt().status == AckStatus.SUCCESS  # both
        first, second = story.collect(), other.collect()
    assert "the sea" in first.text
    assert "the moon" not in first.text
    assert second.request_id == "mine"
    assert "the moon" in second.text
    assert "the sea" not in second.text
    for answer in (story, other):
        payloads: list[Any] = [frame.payload for frame in answer.frames]
        assert {payload.request_id for payload in payloads} == {answer.request_id}
        assert payloads[-1].text_stream_seq == -1


def test_iterating_gives_every_piece_up_to_the_end(scripted: RunningGateway) -> None:
    with scripted.connect() as client:
        answer = client.ask("unused")  # the provider's default story: no end
        pieces = []
        for piece in answer:
            pieces.append(piece)
            if len(pieces) == 3:
                client.interrupt(answer)
        assert len(pieces) >= 3
        assert "".join(pieces) == answer.collect().text == answer.text
        assert list(answer) == pieces


def test_a_complete_answer_is_collected_with_what_the_provider_said_of_it(
    scripted: RunningGateway, provider: ProviderProcess
) -> None:
    with scripted.connect(system_prompt={"role_description": "a guide"}) as client:
        name = provider.fresh(scripts.answer(["Hello", " 你好"]))
        ended = client.ask(name).collect()
    assert (ended.text, ended.outcome) == ("Hello 你好", Outcome.COMPLETED)
    assert ended.finish_reason == "stop"
    assert ended.usage is not None
    assert ended.usage.total_tokens == scripts.USAGE["total_tokens"]
    assert ended.interrupt_reason is None
    (post,) = provider.posts(name)
    assert "a guide" in post.body["messages"][0]["content"]


def test_a_failed_answer_says_why(scripted: RunningGateway, provider: ProviderProcess) -> None:
    refusal = {"error": {"message": "no such key"}}
    with scripted.connect() as client:
        ended = client.ask(provider.fresh(scripts.http_error(401, refusal))).collect()
    assert ended.outcome == Outcome.FAILED
    assert ended.error is not None
    assert ended.error.error_code == ErrorCode.INTERNAL_ERROR
    assert "no such key" in ended.error.error_detail


def test_several_functions_are_called_and_the_model_goes_on(
    scripted: RunningGateway, provider: ProviderProcess
) -> None:
    calls = scripts.interleaved(
        scripts.call_events("open_map", '{"hall": 3}', call_id="a"),
        scripts.call_events("ring", "{}", index=1, call_id="b"),
    )
    name = provider.fresh(scripts.call_answer(calls))
    functions = [{"name": "open_map"}, {"name": "ring"}]
    with scripted.connect(function_calling=functions) as client:
        ended = client.ask(name).collect()
        first, second = ended.function_calls
        assert (first.name, first.parameters, second.name) == ("open_map", {"hall": 3}, "ring")
        continues = client.send_function_result(first, {"ok": True})
        # The provider finds its script in the last message, which is the last result.
        script = provider.fresh(scripts.answer(["There", " it is"]))
        assert client.send_function_result(second.call_id, script, answer=continues) is continues
        assert continues.collect().text == "There it is"
    (post,) = provider.posts(script)
    results = [each["content"] for each in post.body["messages"] if each["role"] == "tool"]
    assert results == ['{"ok":true}', script]


def test_any_frame_can_be_sent_and_waited_for(gateway: RunningGateway) -> None:
    with gateway.connect(platform="TV") as client:
        client.send("SESSION_QUERY", query_fields=["platform"])
        assert client.wait_for(SessionInfo).session_data.platform == "TV"
        with pytest.raises(WaitTimeout):
            client.wait_for(SessionInfo, timeout=0.01)  # that one was taken
        client.wire.send_text(b"no JSON")
        assert client.wait_for(Error).error_code == ErrorCode.MALFORMED_PAYLOAD


def test_heartbeats_are_answered_as_clients_must(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        client.wait_for(Heartbeat)
        heard = f'"msg_type":"HEARTBEAT_REPLY","session_id":"{client.session_id}"'
        wait_until(lambda: heard in gateway.log, "the reply is in the log")


# The demo provider ------------------------------------------------------------------------------


def test_a_scenario_is_played_and_the_provider_says_what_it_saw() -> None:
    before = time.time() * 1000
    with run_gateway(model="echo") as gateway, gateway.connect() as client:
        assert client.ask("Good evening").collect().text == "Good evening"
        first = gateway.provider.wait_ended()
        assert (first.number, first.model, first.ended) == (1, "echo", "finished")
        assert first.ended_at is not None
        assert before - 1 <= first.received_at <= first.ended_at <= time.time() * 1000
        assert first.sent_bytes > len("Good evening")
        client.ask("Good night").collect()
        assert gateway.provider.wait_ended(2).number == 2
        assert gateway.provider.wait_ended(1) == first
        assert [request.number for request in gateway.provider.requests()] == [1, 2]
        gateway.provider.forget_requests()
        assert gateway.provider.requests() == []


def test_a_scenario_that_ends_by_itself_can_be_collected_without_further_ado() -> None:
    """One of each kind: a whole story after a refusal, failing in the middle, without text."""
    outcomes = {
        "http-429:1": Outcome.COMPLETED,
        "error-in-stream": Outcome.FAILED,
        "tool-call": Outcome.COMPLETED,
    }
    with contextlib.ExitStack() as stack:
        answers = {}
        url = None
        for model in outcomes:
            gateway = stack.enter_context(run_gateway(model=model, llm_url=url))
            url = url or gateway.provider.base_url
            answers[model] = stack.enter_context(gateway.connect()).ask("Tell me a story")
        ended = {model: answer.collect().outcome for model, answer in answers.items()}
    assert ended == outcomes


def seconds_of(scenario: Scenario) -> float:
    """How long the answer to a story's request takes, at the harness's own pace."""
    completion = Completion(
        ChatRequest("m", "Tell me a story", prompt_tokens=4),
        "chatcmpl-1",
        created=1,
        seconds_per_token=1 / DEFAULTS["tokens_per_second"],
        parameter=scenario.default,
    )
    steps = scenario.play(completion)
    return sum(step.seconds or 0 for step in steps if isinstance(step, Pause | Stall))


def test_of_those_that_end_by_themselves_only_two_outlast_a_client() -> None:
    """Which the page names; what the gateway's retries add fits in the other half."""
    ending = [
        one for one in SCENARIOS.values() if one.default_text != "until the client disconnects"
    ]
    limit = DEFAULTS["client_timeout"] / 2
    assert {one.name for one in ending if seconds_of(one) > limit} == {"long-story", "slow"}


def test_a_wait_for_the_provider_has_an_end_and_shows_what_it_saw() -> None:
    with run_gateway(model="stall-mid-stream") as gateway, gateway.connect() as client:
        with pytest.raises(WaitTimeout, match=r"0.05 s are over.*the latest.*\[\]"):
            gateway.provider.wait_ended(timeout=0.05)
        answer = client.ask("Tell me a story")
        answer.wait_text()
        with pytest.raises(WaitTimeout, match=r"completion 1 .*stall-mid-stream.*ended=None"):
            gateway.provider.wait_ended(1, timeout=0.3)
        assert client.interrupt().status == AckStatus.SUCCESS
        assert gateway.provider.wait_ended(1).ended == "client_closed"


def test_a_provider_that_hangs_does_not_make_that_wait_longer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = f"listening on http://127.0.0.1:{silent.getsockname()[1]}/v1\n"
        found = running._PROVIDER_LISTENING.fullmatch(line)
        assert found is not None
        with program() as process:
            began = time.monotonic()
            with pytest.raises(WaitTimeout, match=r"0.1 s are over.*the latest"):
                RunningProvider(process, found).wait_ended(timeout=0.1)
    assert time.monotonic() - began < running._HTTP_SECONDS / 2


def test_a_gateway_forgets_clients_that_have_ended(gateway: RunningGateway) -> None:
    with gateway.connect() as open_client:
        closed, dropped, lost = (weakref.ref(gateway.connect()) for _ in range(3))
        for client, end in (
            (closed(), ChatClient.close),
            (dropped(), ChatClient.drop),
            (lost(), end_by_the_gateway),
        ):
            assert client is not None  # it is kept while it is open
            end(client)
        lost_client = lost()
        assert lost_client is not None
        sock = lost_client.connection._sock
        assert sock.fileno() >= 0
        del client, lost_client
        gateway.connect().close()
        gc.collect()
        assert [one() for one in (closed, dropped, lost)] == [None, None, None]
        assert sock.fileno() == -1
        assert open_client.connection.is_open


def end_by_the_gateway(client: ChatClient) -> None:
    """Read the gateway's end of the connection; do not close ours."""
    client.send("SHUTDOWN")
    while not client.connection.has_ended:
        client.connection.receive()


def test_the_callers_key_stays_at_home_unless_it_is_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with run_gateway(model="echo") as gateway:
        url = gateway.provider.base_url
        with gateway.connect() as client:
            client.ask("Hello").collect()
        with (
            run_gateway(model="echo", llm_url=url, env={"OPENAI_API_KEY": "sk-theirs"}) as second,
            second.connect() as client,
        ):
            client.ask("Hello").collect()
        assert [request.has_key for request in gateway.provider.requests()] == [False, True]


# What went wrong is said ------------------------------------------------------------------------


def test_a_wait_that_is_too_long_shows_the_last_frames(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        answer = client.ask("Tell me a story")
        answer.wait_text()
        began = time.monotonic()
        # Tokens come all the time: a bound on each read alone would never end this.
        with pytest.raises(WaitTimeout, match="waiting for the end of req_") as error:
            answer.collect(timeout=0.3)
        assert time.monotonic() - began < 3
        assert "0.3 s are over" in str(error.value)
        assert "RegisterAck" in str(error.value) or "Response(" in str(error.value)
        assert isinstance(error.value, TimeoutError)


def test_an_answer_that_ends_too_early_is_no_time_out(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        answer = client.ask("stop")  # one friendly sentence
        with pytest.raises(AnswerEnded, match="COMPLETED"):
            answer.wait_text(10_000)


@pytest.mark.parametrize("fields", [{"platform": "ABACUS"}, {"auth": None}])
def test_a_registration_that_is_refused_says_so(
    gateway: RunningGateway, fields: dict[str, Any]
) -> None:
    with pytest.raises(FrameRefused, match="MALFORMED_PAYLOAD") as refused:
        gateway.connect(**fields)
    assert refused.value.error.error_code == ErrorCode.MALFORMED_PAYLOAD


def test_clients_have_the_credentials_of_their_gateway(tmp_path: Path) -> None:
    key = "key-of-these-tests-0123456789"
    auth_file = tmp_path / "auth.toml"
    auth_file.write_text(
        f'[api_keys]\ntests = "sha256:{hashlib.sha256(key.encode()).hexdigest()}"\n'
    )
    auth = {"type": "API_KEY", "api_key": key}
    with run_gateway("--auth-file", str(auth_file), model="echo", auth=auth) as gateway:
        with gateway.connect() as client:
            assert client.ask("Good evening").collect().text == "Good evening"
        with pytest.raises(FrameRefused, match="AUTH_FAILED"):
            gateway.connect(auth={"type": "API_KEY", "api_key": "another"})
        assert '"client":"tests"' in gateway.log
        assert key not in gateway.log


def test_an_interrupt_that_is_refused_says_so(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        with pytest.raises(FrameRefused, match="interrupt_request_id"):
            client.interrupt("x" * 65)
        assert client.interrupt().status == AckStatus.FAILED  # the next one is not


def test_an_ack_that_came_too_late_is_not_taken_for_the_next_one(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        answer = client.ask("Tell me a story")
        answer.wait_text()
        with pytest.raises(WaitTimeout):
            client.interrupt(answer, timeout=0)
        assert answer.collect().outcome == Outcome.INTERRUPTED  # which follows that ack
        again = client.interrupt(answer)
        assert again.results[0].outcome == InterruptOutcome.ALREADY_DONE


def test_a_question_under_a_live_id_does_not_cut_off_the_first_answer(
    gateway: RunningGateway,
) -> None:
    with gateway.connect() as client:
        answer = client.ask("Tell me a story", request_id="twice")
        answer.wait_text()
        assert client.ask("Tell me another", request_id="twice") is answer
        assert client.wait_for(Error).error_code == ErrorCode.MALFORMED_PAYLOAD
        client.interrupt(answer)
        assert answer.collect().outcome == Outcome.INTERRUPTED


def test_a_gateway_that_ends_tells_its_clients() -> None:
    with run_gateway("--drain-timeout", "0") as gateway, gateway.connect() as client:
        answer = client.ask("Tell me a story")
        answer.wait_text()
        gateway.terminate()
        assert client.wait_for(Shutdown).reason == "SERVER_SHUTDOWN"
        assert answer.collect().interrupt_reason == "SERVER_SHUTDOWN"
        with pytest.raises(ConnectionEnded, match="waiting for a SessionInfo") as ended:
            client.wait_for(SessionInfo)
        assert ended.value.code == 1012
    assert gateway.exit_code == 0
    assert "Session registered" in gateway.log  # it can be read afterwards


def test_a_gateway_that_is_killed_takes_its_connections_along() -> None:
    with run_gateway() as gateway, gateway.connect() as client:
        answer = client.ask("Tell me a story")
        answer.wait_text()
        gateway.kill()
        with pytest.raises(ConnectionEnded, match="close code None"):
            answer.collect()
        with pytest.raises(OSError, match="refused"):
            gateway.connect()
    assert gateway.exit_code == -signal.SIGKILL


def test_where_there_is_another_provider_there_is_no_demo_one(scripted: RunningGateway) -> None:
    with pytest.raises(RuntimeError, match="llm_url"):
        _ = scripted.provider


# Processes --------------------------------------------------------------------------------------


def test_both_processes_end_in_order_although_a_client_does_not_say_goodbye(
    started: list[Process],
) -> None:
    with run_gateway() as gateway:
        client = gateway.connect()
        client.ask("Tell me a story").wait_text()
        assert [process.exit_code for process in started] == [None, None]
        began = time.monotonic()
    assert time.monotonic() - began < 4  # the gateway waits 5 s for a client's goodbye
    assert [process.exit_code for process in started] == [0, 0]
    assert gateway.exit_code == 0


def test_a_body_that_raises_leaves_nothing_behind_and_shows_the_log(
    started: list[Process],
) -> None:
    with pytest.raises(ZeroDivisionError) as error, run_gateway() as gateway:
        gateway.connect()
        _ = 1 / 0
    assert [process.exit_code for process in started] == [0, 0]
    (note,) = error.value.__notes__
    assert "Session registered" in note


def test_what_pytest_fail_raises_shows_the_log_too() -> None:
    with pytest.raises(pytest.fail.Exception) as error, run_gateway() as gateway:
        session_id = gateway.connect().session_id
        pytest.fail("by hand")
    (note,) = error.value.__notes__
    assert note.startswith("The end of the gateway's log:\n")
    assert session_id in note


def test_the_shown_log_ends_where_the_body_raised() -> None:
    """What stopping the gateway makes it log, would push out what came before."""
    clients = 2 * TAIL_LINES
    with pytest.raises(ZeroDivisionError) as error, run_gateway() as gateway:
        for _ in range(clients):
            last = gateway.connect()
        _ = 1 / 0
    assert gateway.log.count("Session ended") >= clients  # those lines came after it
    (note,) = error.value.__notes__
    lines = note.splitlines()
    assert len(lines) == 1 + TAIL_LINES
    assert last.session_id in note
    assert "Session ended" not in note


def test_a_gateway_that_has_ended_before_the_body_raised_shows_its_last_lines() -> None:
    with pytest.raises(ZeroDivisionError) as error, run_gateway() as gateway:
        gateway.terminate()
        wait_until(lambda: gateway.exit_code is not None, "it has ended")
        _ = 1 / 0
    (note,) = error.value.__notes__
    assert "Stopped" in note.splitlines()[-1]


def test_a_gateway_that_hangs_is_not_waited_for_to_show_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_mark, "MARK_SECONDS", 0.1)
    with pytest.raises(ZeroDivisionError) as error, run_gateway() as gateway:
        session_id = gateway.connect().session_id
        wait_until(lambda: session_id in gateway.log, "the registration is in the log")
        gateway._process.timeout = 0.1
        gateway._process.signal(signal.SIGSTOP)
        _ = 1 / 0
    assert session_id in error.value.__notes__[0]
    assert gateway.exit_code == -signal.SIGKILL


def test_the_recent_log_is_complete_and_leaves_out_what_came_before(
    gateway: RunningGateway,
) -> None:
    with gateway.connect() as first:
        assert first.session_id in gateway.recent_log()
        size = gateway.log_size
        for _ in range(10):  # so that a line that is late would be missed
            with gateway.connect() as client:
                log = gateway.recent_log(size)
                assert client.session_id in log
                assert first.session_id not in log


def test_the_recent_log_of_a_gateway_that_logs_little_is_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_mark, "MARK_SECONDS", 0.2)
    with run_gateway(log_level="error") as gateway, gateway.connect():
        assert gateway.recent_log() == ""
    assert gateway.recent_log() == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--host", "0.0.0.0"], "--insecure-no-auth"),
    ],
)
def test_a_start_that_fails_shows_the_log_and_leaves_nothing_behind(
    started: list[Process], arguments: list[str], said: str
) -> None:
    with pytest.raises(StartFailed, match=f"ended with 2(.|\n)*{said}"), run_gateway(*arguments):
        pytest.fail("the body ran")
    assert [process.exit_code for process in started] == [0, 2]


def test_a_provider_that_does_not_start_is_said_and_the_gateway_is_not_tried(
    started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_LAUNCHER", "raise SystemExit('no such thing')")
    with pytest.raises(StartFailed, match=r"demo-llm.*ended with 1: no such thing"), run_gateway():
        pytest.fail("the body ran")
    assert [process.exit_code for process in started] == [1]


def program(*lines: str, timeout: float = 10.0) -> Process:
    """A process that plays one of ours."""
    wait = "threading.Event().wait()"
    source = "\n".join(["import signal, sys, threading", *lines, wait])
    return Process(["-c", source], env=environment(), timeout=timeout)


def test_a_process_that_says_nothing_is_not_waited_for_for_ever() -> None:
    with program("print('working on it', flush=True)") as process:
        process.read_line()
        process.timeout = 0.1
        with pytest.raises(ProcessFailed, match=r"awaited within 0.1 s: working on it"):
            process.wait_for_line(re.compile("ready\n"))
    assert process.exit_code == -signal.SIGKILL


def test_a_process_that_says_something_else_all_the_time_is_given_up_too() -> None:
    with program("while True: print('working on it', flush=True)") as process:
        process.timeout = 0.3
        with pytest.raises(ProcessFailed, match=r"awaited within 0.3 s"):
            process.wait_for_line(re.compile("ready\n"))
    assert process.exit_code == -signal.SIGKILL


def test_a_process_that_does_not_stop_in_time_is_killed() -> None:
    process = program(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "print('ready', flush=True)",
        "print('still here', file=sys.stderr, flush=True)",
    )
    process.read_line()
    process.timeout = 0.1
    assert process.stop() == -signal.SIGKILL
    assert process.stop() == -signal.SIGKILL  # once more changes nothing
    assert process.log in ("still here\n", "")


def test_two_gateways_do_not_meddle_with_each_other(gateway: RunningGateway) -> None:
    with gateway.connect() as client:
        answer = client.ask("Tell me a story")
        answer.wait_text()
        with run_gateway() as second, second.connect() as other:
            assert second.port != gateway.port
            assert second.provider.base_url != gateway.provider.base_url
            theirs = other.ask("Tell me a story")
            theirs.wait_text()
            assert other.interrupt().status == AckStatus.SUCCESS
            assert not answer.ended
            second.kill()
        already = len(answer.text)
        answer.wait_text(already + 40)  # the first goes on
        assert client.interrupt(answer).status == AckStatus.SUCCESS


def test_a_gateway_can_come_back_where_it_was() -> None:
    with run_gateway() as before:
        port = before.port
    with run_gateway(port=port) as after, after.connect() as client:
        assert after.port == port
        assert f":{port}/" in after.url
        assert client.ask("stop").collect().outcome == Outcome.COMPLETED


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks /proc who is alive")
def test_when_the_caller_is_killed_its_processes_end(tmp_path: Path) -> None:
    source = (
        "from bargein_harness import run_gateway\n"
        "with run_gateway() as gateway:\n"
        "    print(gateway._process.pid, gateway.provider._process.pid, flush=True)\n"
        "    input()\n"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", source],
        env=environment({"TMPDIR": str(tmp_path)}),  # for the logs that nobody takes away then
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with caller:
        assert caller.stdout is not None
        pids = caller.stdout.readline().split()
        assert len(pids) == 2
        caller.kill()
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid), f"process {pid} has ended")  # type: ignore[misc]


def is_gone(pid: str) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit code yet."""
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


# As it is installed -----------------------------------------------------------------------------


def run_python(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of somebody who has installed bargein."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_importing_it_patches_nothing_and_loads_little(tmp_path: Path) -> None:
    source = (
        "import sys, bargein_harness\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'gevent', 'run', 'pykka', 'requests', 'pytest', 'trustme'}))\n"
        "import bargein_harness.fixtures\n"
        "assert 'gevent' not in sys.modules and 'trustme' not in sys.modules\n"
    )
    done = run_python("-c", source, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


GENERIC = ("actors", "gateway", "llm", "metrics", "run")
"""The names of our rooms, which a project that uses the harness may have too."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The folder of somebody who has all of these names, each as they please."""
    theirs = "raise SystemExit('imported: ' + __name__)\n"
    for name in ("run", "llm", "actors"):
        (tmp_path / f"{name}.py").write_text(theirs)
    for name in ("gateway", "metrics"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(theirs)
    return tmp_path


@pytest.mark.parametrize("by", ["cwd", "PYTHONPATH"])
def test_modules_of_the_caller_do_not_take_the_place_of_ours(
    project: Path, tmp_path_factory: pytest.TempPathFactory, by: str
) -> None:
    source = (
        "import sys\n"
        "from bargein_harness import run_gateway\n"
        "import bargein_harness.fixtures\n"
        "with run_gateway(model='echo') as gateway, gateway.connect() as client:\n"
        "    answer = client.ask('Good evening')\n"
        "    print(answer.collect().text, client.interrupt(answer).status)\n"
        f"print([name for name in sys.modules if name.partition('.')[0] in {GENERIC}])\n"
    )
    if by == "cwd":  # first on the path, as `python -c` has it
        done = run_python("-c", source, cwd=project)
    else:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        done = run_python("-c", source, cwd=elsewhere, PYTHONPATH=str(project))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Good evening FAILED\n[]\n"


FAILING = """
import pytest

pytest_plugins = ["bargein_harness.fixtures"]


@pytest.fixture(scope="session")
def bargein_gateway_options():
    return {"model": "http-401"}


@pytest.fixture
def refused(bargein_gateway):
    bargein_gateway.connect(platform="ABACUS")


def test_one(bargein_client):
    print("first:", bargein_client.session_id)
    assert bargein_client.ask("Good evening").collect().text == "Good evening"


def test_two(bargein_client):
    print("second:", bargein_client.session_id)
    pytest.fail("by hand")


def test_three(refused):
    pass


def test_four(bargein_client):
    answer = bargein_client.ask("Good evening")
    assert answer.collect().outcome == "FAILED"


def test_five():
    assert False
"""


def test_a_test_that_fails_with_the_fixtures_shows_what_the_gateway_logged_meanwhile(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_failing.py").write_text(FAILING)
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert "3 failed, 1 passed, 1 error" in done.stdout, done.stdout + done.stderr
    reports = re.split(r"^_{3,} (?=\w)", done.stdout, flags=re.M)[1:]
    shown = {report.split(" _")[0].split()[-1]: report for report in reports}
    logs = {name: report.partition("- gateway's log -")[2] for name, report in shown.items()}
    session = {
        name: found[1]
        for name, report in shown.items()
        if (found := re.search(r"(?:first|second): (sess_\w+)", report))
    }
    assert "Generation failed" in logs["test_one"]
    assert session["test_one"] in logs["test_one"]
    # The same gateway goes on, and only what it logged in this test is shown.
    assert session["test_two"] in logs["test_two"]
    assert f'"Session registered | {{"session_id": "{session["test_one"]}' not in logs["test_two"]
    assert "Generation failed" not in logs["test_two"]
    assert "Refused message" in logs["test_three"]
    assert logs["test_five"] == ""  # it has no gateway


def examples() -> list[str]:
    """The page's Python that holds tests."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [block for block in blocks if "def test_" in block]


def test_the_pages_examples_pass_as_they_stand_in_an_empty_folder(tmp_path: Path) -> None:
    first, *others = examples()
    assert len(first.splitlines()) == 15
    assert others
    for number, block in enumerate(examples()):
        (tmp_path / f"test_{number}.py").write_text(block, encoding="utf-8")
    unpatched = "import sys\ndef pytest_unconfigure(): print('gevent' in sys.modules)\n"
    (tmp_path / "conftest.py").write_text(unpatched)
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = sum(block.count("def test_") for block in examples())
    assert f"{tests} passed" in done.stdout
    assert done.stdout.endswith("False\n")
