"""Interrupts over a real WebSocket: in every phase of a generation, and every odd one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import gevent
import gevent.event
import pytest

from actors.loop.lanes import lanes
from actors.outlet import RequestEnd
from actors.words import OnNewRequest
from gateway.app import Gateway
from gateway.server.outbox import Outlet
from gateway.server.server import ServerSettings
from llm.http.connections import ConnectionReader
from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.provider_process import ProviderProcess

MakeGateway: TypeAlias = Callable[..., Gateway]


def results_of(ack: Received) -> dict[str, str]:
    """The outcome of each target of an INTERRUPT_ACK."""
    return {result["request_id"]: result["outcome"] for result in ack.payload["results"]}


def start(client: Client, provider: ProviderProcess, texts: list[str]) -> str:
    """Start a request that says these texts and then nothing more; wait for the last of them."""
    request_id = client.request(provider.fresh(scripts.idle_mid_stream(texts)))
    wait_for_text(client, request_id, "".join(texts))
    return request_id


def wait_for_text(client: Client, request_id: str, text: str) -> None:
    while client.text_of(request_id) != text:
        client.wait_text(request_id)


def assert_it_still_works(client: Client, provider: ProviderProcess) -> None:
    """A request gets its whole answer, and nothing else comes until then but frames of it."""
    request_id = client.request(provider.fresh(scripts.answer(["still ", "here"])))
    terminal = client.wait_terminal(request_id)
    assert terminal.payload["outcome"] == "COMPLETED"
    assert client.text_of(request_id) == "still here"


def assert_ended_by_interrupt(
    client: Client, request_id: str, acks: list[Received], reason: str
) -> None:
    """Of everything received: no data after the acks, then exactly one terminal frame."""
    frames = client.frames_of(request_id)
    terminals = [frame for frame in frames if frame.is_terminal]
    assert len(terminals) == 1
    terminal = terminals[0].payload
    assert terminal["text_stream_seq"] == -1
    assert terminal["interrupted"] is True
    assert terminal["interrupt_reason"] == reason
    assert terminal["outcome"] == "INTERRUPTED"
    assert terminal["content"] == {}
    assert "voice_stream_seq" not in terminal
    ack_at = [client.frames.index(ack) for ack in acks]
    assert frames[-1] is terminals[0]
    assert client.frames.index(terminals[0]) > max(ack_at)
    assert all(client.frames.index(frame) < min(ack_at) for frame in frames[:-1])
    assert not [frame for frame in client.frames if frame.msg_type == "ERROR"]


# In every phase


@dataclass(frozen=True)
class Phase:
    """Where a generation is when it is interrupted.

    Args:
        base_url: name of the provider's attribute.
        script: what the provider plays.
        text: of the answer, as far as it gets; "…" stands for any.
        label: a mark in the script to wait for.
        posts: how many POSTs the provider sees.
    """

    base_url: str = "base_url"
    script: scripts.Script = ()  # type: ignore[assignment]
    text: str = ""
    label: str | None = None
    posts: int = 1


MARKED = scripts.stalled_inside_chunk(["once ", "upon"])
MARKED.insert(-1, scripts.mark("stalled"))
PHASES = {
    "connecting": Phase("full_base_url", posts=0),
    "tls_handshake": Phase("mute_base_url", posts=0),
    "awaiting_headers": Phase(script=scripts.no_headers()),
    "headers_but_no_event": Phase(script=scripts.headers_only()),
    "idle_mid_stream": Phase(script=scripts.idle_mid_stream(["once ", "upon"]), text="once upon"),
    "stalled_inside_a_chunk": Phase(script=MARKED, text="once upon", label="stalled"),
    "flood": Phase(script=scripts.flood(), text="…"),
    "gzip": Phase(script=scripts.gzip_idle(["once ", "upon"]), text="once upon"),
    "http10": Phase(script=scripts.http10_idle(["once ", "upon"]), text="once upon"),
    "tls": Phase("tls_base_url", scripts.idle_mid_stream(["once ", "upon"]), "once upon"),
}


def reach(
    phase: Phase, gateway: Gateway, client: Client, provider: ProviderProcess, since: float
) -> tuple[str, str, int]:
    """Bring a request into the phase; returns its script, its id and its provider connection."""
    script = provider.fresh(phase.script or scripts.no_headers())
    request_id = client.request(script)
    if phase.base_url == "full_base_url":
        return script, request_id, provider.wait_connecting(since=since).conn
    if phase.base_url == "mute_base_url":
        return script, request_id, provider.wait_connected(port="mute", since=since).conn
    conn = provider.wait_post(script=script).conn
    if phase.text == "…":
        for _ in range(20):
            client.wait_text(request_id)
    elif phase.text:
        wait_for_text(client, request_id, phase.text)
    elif phase.script == scripts.headers_only():
        wait_until(lambda: active(gateway, "waiting") == 1, "the headers were read")
    if phase.label is not None:
        provider.wait_mark(phase.label, script=script)
    return script, request_id, conn


def active(gateway: Gateway, state: str) -> float | None:
    return gateway.metrics.registry.get_sample_value("bargein_requests_active", {"state": state})


# urllib3 leaves a socket that was killed in connect() to be closed by the end of its last
# reference: at once (the test sees it), but with a warning.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("name", PHASES)
def test_an_interrupt_stops_a_generation_in_every_phase(
    name: str, make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    phase = PHASES[name]
    gateway = make_gateway(
        base_url=getattr(provider, phase.base_url),
        ca_file=provider.ca_file,
        connect_timeout=0,
        first_token_timeout=0,
    )
    with Client(gateway.server.port) as client:
        script, request_id, conn = reach(phase, gateway, client, provider, time.monotonic())
        sent_at = time.monotonic()
        client.interrupt(request_id, "USER_VOICE_INPUT")
        ack = client.wait_ack()
        closed = provider.wait_closed(conn)
        client.wait_terminal(request_id)
        if phase.posts:
            assert_it_still_works(client, provider)
        else:
            assert_it_hangs_and_stops_again(phase, gateway, client, provider)

        assert ack.payload["status"] == "SUCCESS"
        assert ack.payload["interrupted_request_ids"] == [request_id]
        (result,) = ack.payload["results"]
        assert result["outcome"] == "STOPPED"
        assert isinstance(result["stream_closed_ms"], float)
        # The number is true: the provider saw the close then (and not at the end of some limit).
        assert closed.by in ("client_eof", "client_reset", "client_gave_up")
        assert abs(closed.time - sent_at - result["stream_closed_ms"] / 1000) < 0.5
        assert 0 <= result["stream_closed_ms"] < 500
        if phase.text != "…":
            assert client.text_of(request_id) == phase.text
        assert result["delivered_text_chars"] == len(client.text_of(request_id))
        assert_ended_by_interrupt(client, request_id, [ack], "USER_VOICE_INPUT")
        provider.counts()
        assert len(provider.posts(script)) == phase.posts
        assert provider.open_connections(script) == []


def assert_it_hangs_and_stops_again(
    phase: Phase, gateway: Gateway, client: Client, provider: ProviderProcess
) -> None:
    """Where nothing can be answered: the following request is accepted, and stops likewise."""
    _, request_id, conn = reach(phase, gateway, client, provider, time.monotonic())
    client.interrupt(request_id)
    assert client.wait_ack().payload["status"] == "SUCCESS"
    assert client.wait_terminal(request_id).payload["interrupted"] is True
    provider.wait_closed(conn)


def test_an_interrupt_that_meets_the_end_of_the_answer_has_one_clear_outcome(
    client: Client, provider: ProviderProcess
) -> None:
    names = set()
    for number in range(100):
        key = provider.unique("end")
        script = provider.fresh(scripts.finish_on_release(["all ", "of it"], key))
        names.add(script)
        request_id = client.request(script)
        wait_for_text(client, request_id, "all of it")
        # Who goes first changes from round to round, and how far ahead.
        if number % 2:
            client.interrupt(request_id)
            provider.release(key)
        else:
            release = gevent.spawn(provider.release, key)
            gevent.sleep(number % 20 * 0.0001)
            client.interrupt(request_id)
            release.join()
        ack = client.wait_ack()
        while not any(frame.is_terminal for frame in client.frames_of(request_id)):
            client.next()

        (terminal,) = [frame for frame in client.frames_of(request_id) if frame.is_terminal]
        (result,) = ack.payload["results"]
        assert client.text_of(request_id) == "all of it"
        assert result["delivered_text_chars"] == len("all of it")
        if result["outcome"] == "STOPPED":
            assert ack.payload["status"] == "SUCCESS"
            assert ack.payload["interrupted_request_ids"] == [request_id]
            assert_ended_by_interrupt(client, request_id, [ack], "USER_STOP")
        else:
            assert result["outcome"] == "ALREADY_DONE"
            assert ack.payload["status"] == "FAILED"
            assert ack.payload["interrupted_request_ids"] == []
            assert terminal.payload["outcome"] == "COMPLETED"
            assert "interrupted" not in terminal.payload
            assert client.frames.index(terminal) < client.frames.index(ack)
    assert_it_still_works(client, provider)
    terminals = [frame for frame in client.frames if frame.is_terminal]
    assert len(terminals) == 101
    provider.counts()
    assert [len(provider.posts(name)) for name in sorted(names)] == [1] * 100
    left = set(provider.open_connections())
    used = {post.conn for post in provider.posts() if post.script in names}
    assert len(left & used) <= 1  # idle in the pool


def test_an_interrupt_that_is_read_just_before_the_terminal_frame_is_written_comes_too_late(
    gateway: Gateway,
    client: Client,
    provider: ProviderProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its session takes it up between the writing of the frame and the news of it."""
    finish = Outlet.finish
    with Client(gateway.server.port) as other:
        request_id = "req_race"

        def interrupted_finish(
            outlet: Outlet, end: RequestEnd, on_sent: Callable[[], None]
        ) -> None:
            monkeypatch.undo()
            client.interrupt(request_id)
            for _ in range(3):  # the gateway reads it meanwhile
                other.send("HEALTH_CHECK", {})
                other.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
            finish(outlet, end, on_sent)

        monkeypatch.setattr(Outlet, "finish", interrupted_finish)
        client.request(provider.fresh(scripts.answer(["all ", "of it"])), request_id)
        ack = client.wait_ack()
        assert_it_still_works(client, provider)
        assert results_of(ack) == {request_id: "ALREADY_DONE"}
        (terminal,) = [frame for frame in client.frames_of(request_id) if frame.is_terminal]
        assert terminal.payload["outcome"] == "COMPLETED"
        assert client.text_of(request_id) == "all of it"
        assert client.frames.index(terminal) < client.frames.index(ack)


# The ack does not come before the close


class HeldClose:
    """Makes the closing of provider streams wait until `release()`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, how_many: int) -> None:
        self._left = how_many
        self._released = gevent.event.Event()
        self.reached = gevent.event.Event()
        close = ConnectionReader.hang_up

        def held(connection: ConnectionReader) -> None:
            self._left -= 1
            if self._left >= 0:
                self.reached.set()
                self._released.wait()
            close(connection)

        monkeypatch.setattr(ConnectionReader, "hang_up", held)

    def release(self) -> None:
        self._released.set()


def test_the_ack_waits_for_the_close(
    client: Client, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldClose(monkeypatch, 1)
    request_id = start(client, provider, ["once"])
    client.interrupt(request_id)
    assert held.reached.wait(5)
    client.send("HEALTH_CHECK", {})
    client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
    assert not [frame for frame in client.frames if frame.msg_type == "INTERRUPT_ACK"]
    assert not [frame for frame in client.frames if frame.is_terminal]
    held.release()
    assert results_of(client.wait_ack()) == {request_id: "STOPPED"}
    assert client.wait_terminal(request_id).payload["interrupted"] is True


def test_an_ack_waits_for_a_stuck_stream_one_second_and_then_says_so(
    make_gateway: MakeGateway, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.PARALLEL)
    with Client(gateway.server.port) as client:
        held = HeldClose(monkeypatch, 1)
        stuck = start(client, provider, ["stuck"])
        good = start(client, provider, ["good"])
        client.interrupt(stuck)
        assert held.reached.wait(5)
        sent_at = time.monotonic()
        client.interrupt(None)
        first, second = client.wait_ack(), client.wait_ack()
        assert 0.5 < first.at - sent_at < 3
        assert first.payload["status"] == "FAILED"
        assert results_of(first) == {stuck: "TIMED_OUT"}
        assert first.payload["results"][0]["stream_closed_ms"] is None
        assert second.payload["status"] == "PARTIAL"
        assert results_of(second) == {stuck: "TIMED_OUT", good: "STOPPED"}
        assert second.payload["interrupted_request_ids"] == [good]
        for request_id in (stuck, good):
            client.wait_terminal(request_id)
            assert_ended_by_interrupt(client, request_id, [first, second], "USER_STOP")
        value = gateway.metrics.registry.get_sample_value
        assert value("bargein_streams_open_after_ack_total") == 1
        held.release()
        assert_it_still_works(client, provider)
        assert len([frame for frame in client.frames_of(stuck) if frame.is_terminal]) == 1


# Interrupts that hit nothing, or too much


def test_an_interrupt_of_an_unknown_request_fails_politely(client: Client) -> None:
    client.interrupt("req_never_seen")
    ack = client.wait_ack().payload
    assert ack["status"] == "FAILED"
    assert ack["interrupted_request_ids"] == []
    assert ack["interrupt_request_id"] == "req_never_seen"
    assert ack["results"] == [
        {
            "request_id": "req_never_seen",
            "outcome": "UNKNOWN",
            "delivered_text_chars": 0,
            "stream_closed_ms": None,
        }
    ]
    assert [frame.msg_type for frame in client.frames] == ["REGISTER_ACK", "INTERRUPT_ACK"]


def test_an_interrupt_of_an_unknown_request_leaves_the_live_one_alone(
    client: Client, provider: ProviderProcess
) -> None:
    key = provider.unique("end")
    live = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(live)
    client.interrupt("req_never_seen")
    assert results_of(client.wait_ack()) == {"req_never_seen": "UNKNOWN"}
    provider.release(key)
    assert client.wait_terminal(live).payload["outcome"] == "COMPLETED"
    assert client.text_of(live) == "on and on"


def test_an_interrupt_of_a_finished_request_says_already_done(
    client: Client, provider: ProviderProcess
) -> None:
    request_id = client.request(provider.fresh(scripts.answer(["it is ", "done 你"])))
    client.wait_terminal(request_id)
    for _ in range(2):
        client.interrupt(request_id)
        ack = client.wait_ack().payload
        assert ack["status"] == "FAILED"
        assert ack["interrupted_request_ids"] == []
        (result,) = ack["results"]
        assert result["outcome"] == "ALREADY_DONE"
        assert result["delivered_text_chars"] == len("it is done 你")
        assert result["stream_closed_ms"] is None
    assert_it_still_works(client, provider)
    assert len([frame for frame in client.frames_of(request_id) if frame.is_terminal]) == 1


def test_an_interrupt_of_an_interrupted_request_says_already_done(
    client: Client, provider: ProviderProcess
) -> None:
    request_id = start(client, provider, ["once"])
    client.interrupt(request_id)
    client.wait_terminal(request_id)
    client.interrupt(request_id)
    ack = client.wait_ack()
    assert ack.payload["status"] == "FAILED"
    assert results_of(ack) == {request_id: "ALREADY_DONE"}
    assert ack.payload["results"][0]["delivered_text_chars"] == len("once")


def test_an_interrupt_of_a_failed_request_says_already_done(
    client: Client, provider: ProviderProcess
) -> None:
    request_id = client.request(provider.fresh(scripts.truncated(["half"])))
    assert client.wait_terminal(request_id).payload["outcome"] == "FAILED"
    client.interrupt(request_id)
    assert results_of(client.wait_ack()) == {request_id: "ALREADY_DONE"}


@pytest.mark.parametrize("texts", [["once"], []], ids=["streaming", "before_the_first_token"])
def test_two_interrupts_of_one_request_are_both_answered_after_the_close(
    client: Client, provider: ProviderProcess, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldClose(monkeypatch, 1)
    script = provider.fresh(scripts.idle_mid_stream(texts))
    request_id = client.request(script)
    conn = provider.wait_post(script=script).conn
    wait_for_text(client, request_id, "".join(texts))
    if not texts:
        held.release()  # whether there is a response to close yet is a matter of luck
    with client.one_packet():
        client.interrupt(request_id, "USER_STOP")
        client.interrupt(request_id, "USER_NEW_INPUT")
    if texts:
        assert held.reached.wait(5)
        client.send("HEALTH_CHECK", {})
        client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
        assert not [frame for frame in client.frames if frame.msg_type == "INTERRUPT_ACK"]
        held.release()
    acks = [client.wait_ack(), client.wait_ack()]
    client.wait_terminal(request_id)
    provider.wait_closed(conn)
    assert_it_still_works(client, provider)
    for ack in acks:
        assert ack.payload["status"] == "SUCCESS"
        assert results_of(ack) == {request_id: "STOPPED"}
        assert isinstance(ack.payload["results"][0]["stream_closed_ms"], float)
    # The first reason stands.
    assert_ended_by_interrupt(client, request_id, acks, "USER_STOP")


def test_an_interrupt_by_id_and_one_for_all_are_both_answered(
    client: Client, provider: ProviderProcess
) -> None:
    request_id = start(client, provider, ["once"])
    with client.one_packet():
        client.interrupt(request_id)
        client.interrupt(None)
    acks = [client.wait_ack(), client.wait_ack()]
    client.wait_terminal(request_id)
    assert_it_still_works(client, provider)
    assert [results_of(ack) for ack in acks] == [{request_id: "STOPPED"}] * 2
    assert [ack.payload["interrupt_request_id"] for ack in acks] == [request_id, None]
    assert_ended_by_interrupt(client, request_id, acks, "USER_STOP")


def test_an_interrupt_for_all_when_nothing_runs_fails_politely(
    client: Client, provider: ProviderProcess
) -> None:
    client.interrupt(None)
    assert_nothing_ran(client.wait_ack())
    request_id = client.request(provider.fresh(scripts.answer(["done"])))
    client.wait_terminal(request_id)
    client.interrupt(None)
    assert_nothing_ran(client.wait_ack())


def assert_nothing_ran(ack: Received) -> None:
    assert ack.payload["status"] == "FAILED"
    assert ack.payload["interrupted_request_ids"] == []
    assert ack.payload["results"] == []
    assert ack.payload["message"]


def test_an_interrupt_for_all_gets_one_ack_and_then_all_terminals(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.PARALLEL)
    with Client(gateway.server.port) as client:
        done = client.request(provider.fresh(scripts.answer(["finished before"])))
        client.wait_terminal(done)
        live = [start(client, provider, [f"answer {number}"]) for number in range(3)]
        client.interrupt(None)
        ack = client.wait_ack()
        for request_id in live:
            while not any(frame.is_terminal for frame in client.frames_of(request_id)):
                client.next()
        assert_it_still_works(client, provider)
        assert ack.payload["status"] == "SUCCESS"
        assert sorted(ack.payload["interrupted_request_ids"]) == sorted(live)
        assert results_of(ack) == dict.fromkeys(live, "STOPPED")
        for request_id in live:
            assert_ended_by_interrupt(client, request_id, [ack], "USER_STOP")
        acks = [frame for frame in client.frames if frame.msg_type == "INTERRUPT_ACK"]
        assert acks == [ack]


def test_an_interrupt_by_id_leaves_the_others_alone(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.PARALLEL)
    with Client(gateway.server.port) as client:
        key = provider.unique("end")
        other = client.request(provider.fresh(scripts.finish_on_release(["the ", "other"], key)))
        client.wait_text(other)
        target = start(client, provider, ["target"])
        client.interrupt(target)
        assert results_of(client.wait_ack()) == {target: "STOPPED"}
        client.wait_terminal(target)
        provider.release(key)
        assert client.wait_terminal(other).payload["outcome"] == "COMPLETED"
        assert client.text_of(other) == "the other"


def test_an_interrupt_hits_no_other_session(gateway: Gateway, provider: ProviderProcess) -> None:
    with Client(gateway.server.port) as mine, Client(gateway.server.port) as theirs:
        key = provider.unique("end")
        script = provider.fresh(scripts.finish_on_release(["not ", "yours"], key))
        request_id = theirs.request(script, "same_id")
        theirs.wait_text(request_id)
        mine.interrupt("same_id")
        assert results_of(mine.wait_ack()) == {"same_id": "UNKNOWN"}
        mine.interrupt(None)
        assert_nothing_ran(mine.wait_ack())
        provider.release(key)
        assert theirs.wait_terminal(request_id).payload["outcome"] == "COMPLETED"


# What an INTERRUPT may look like


@pytest.mark.parametrize("live", [True, False], ids=["with_a_live_request", "with_none"])
@pytest.mark.parametrize(
    "target", [{}, {"interrupt_request_id": None}, {"interrupt_request_id": ""}]
)
def test_no_id_means_all_and_is_echoed_exactly_as_it_was_sent(
    client: Client, provider: ProviderProcess, target: dict[str, Any], live: bool
) -> None:
    request_id = start(client, provider, ["once"]) if live else None
    client.send("INTERRUPT", {**target, "reason": "USER_STOP"})
    ack = client.wait_ack().payload
    echoed = {key: ack[key] for key in ("interrupt_request_id",) if key in ack}
    assert echoed == target
    assert ack["status"] == ("SUCCESS" if live else "FAILED")
    assert ack["interrupted_request_ids"] == ([request_id] if live else [])


def test_an_id_is_echoed_exactly_as_it_was_sent(client: Client, provider: ProviderProcess) -> None:
    for request_id in ('req "quoted" \\ /', "~" * 64, " "):
        script = provider.fresh(scripts.idle_mid_stream(["once"]))
        client.request(script, request_id)
        client.wait_text(request_id)
        client.interrupt(request_id)
        ack = client.wait_ack()
        assert ack.payload["interrupt_request_id"] == request_id
        assert results_of(ack) == {request_id: "STOPPED"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"reason": "USER_STOP"}, "USER_STOP"),
        ({"reason": "USER_NEW_INPUT"}, "USER_NEW_INPUT"),
        ({"reason": "USER_VOICE_INPUT"}, "USER_VOICE_INPUT"),
        ({"reason": "CLIENT_ERROR"}, "CLIENT_ERROR"),
        ({"reason": "THE_CAT_SAT_ON_THE_KEYBOARD"}, "OTHER"),
        ({"reason": "user_stop"}, "OTHER"),
        ({"reason": "SERVER_SHUTDOWN"}, "OTHER"),  # ours to give
        ({"reason": "a whole story " * 100}, "OTHER"),
        ({"reason": ""}, "OTHER"),
        ({"reason": None}, "OTHER"),
        ({}, "OTHER"),
        ({"reason": "USER_STOP", "of_another_version": [1, {}]}, "USER_STOP"),
    ],
)
def test_any_reason_is_accepted_and_unknown_ones_are_other(
    gateway: Gateway,
    client: Client,
    provider: ProviderProcess,
    fields: dict[str, Any],
    reason: str,
) -> None:
    request_id = start(client, provider, ["once"])
    client.send("INTERRUPT", {"interrupt_request_id": request_id, **fields})
    assert client.wait_ack().payload["status"] == "SUCCESS"
    assert client.wait_terminal(request_id).payload["interrupt_reason"] == reason
    labels = {"reason": reason, "outcome": "stopped"}
    lanes().wait_deferred()  # books are kept last
    counted = gateway.metrics.registry.get_sample_value("bargein_interrupts_total", labels)
    assert counted == 1


def test_with_speech_the_interrupted_terminal_ends_the_voice_too(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.register(require_tts=True)
        request_id = start(client, provider, ["once"])
        client.interrupt(request_id)
        terminal = client.wait_terminal(request_id).payload
        assert (terminal["text_stream_seq"], terminal["voice_stream_seq"]) == (-1, -1)


# A request behind another


def test_a_request_that_waits_for_its_predecessor_can_be_interrupted(
    client: Client, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldClose(monkeypatch, 1)  # so that the second one does wait
    first = start(client, provider, ["first"])
    script = provider.fresh(scripts.answer(["never asked"]))
    second = client.request(script)
    client.interrupt(second)
    ack = client.wait_ack()
    assert ack.payload["status"] == "SUCCESS"
    assert results_of(ack) == {second: "STOPPED"}
    assert ack.payload["results"][0]["stream_closed_ms"] is None  # there was no stream
    held.release()
    assert client.wait_terminal(first).payload["interrupt_reason"] == "USER_NEW_INPUT"
    client.wait_terminal(second)  # in the order in which they came
    assert_it_still_works(client, provider)
    assert_ended_by_interrupt(client, second, [ack], "USER_STOP")
    provider.counts()
    assert provider.posts(script) == []


def test_an_interrupt_for_all_hits_the_one_that_waits_too(
    client: Client, provider: ProviderProcess
) -> None:
    first = start(client, provider, ["first"])
    script = provider.fresh(scripts.idle_mid_stream(["second"]))
    second = client.request(script)
    client.interrupt(None)
    ack = client.wait_ack()
    client.wait_terminal(second)
    assert_it_still_works(client, provider)
    # The first one may have ended already, by the second; the second one has not.
    assert results_of(ack)[second] == "STOPPED"
    assert_ended_by_interrupt(client, second, [ack], "USER_STOP")
    (terminal,) = [frame for frame in client.frames_of(first) if frame.is_terminal]
    assert terminal.payload["interrupt_reason"] == "USER_NEW_INPUT"
    provider.counts()
    assert len(provider.posts(script)) <= 1
    assert provider.open_connections(script) == []


def test_what_a_client_does_before_each_new_request_never_touches_the_new_one(
    client: Client, provider: ProviderProcess
) -> None:
    """Existing clients interrupt the previous id, finished or not, some of them twice."""
    previous = "req_before_all"
    for number in range(10):
        client.interrupt(previous)
        client.interrupt(previous)
        script = scripts.answer(["done"]) if number % 2 else scripts.idle_mid_stream(["cut"])
        previous = client.request(provider.fresh(script))
        client.wait_text(previous)
    client.interrupt(None)
    while len([frame for frame in client.frames if frame.msg_type == "INTERRUPT_ACK"]) < 21:
        client.next()
    assert_it_still_works(client, provider)
    terminals = [frame for frame in client.frames if frame.is_terminal]
    assert len(terminals) == 11
    assert not [frame for frame in client.frames if frame.msg_type == "ERROR"]


def test_an_interrupt_in_the_same_packet_as_its_request_stops_it(
    client: Client, provider: ProviderProcess
) -> None:
    names = [provider.fresh(scripts.idle_mid_stream(["once"])) for _ in range(20)]
    for script in names:
        with client.one_packet():
            request_id = client.request(script)
            client.interrupt(request_id)
        ack = client.wait_ack()
        client.wait_terminal(request_id)
        assert results_of(ack) == {request_id: "STOPPED"}
        assert_ended_by_interrupt(client, request_id, [ack], "USER_STOP")
    assert_it_still_works(client, provider)
    for script in names:
        for post in provider.posts(script):
            provider.wait_closed(post.conn)


def test_an_interrupt_is_answered_while_other_sessions_are_flooded(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(server=ServerSettings())
    with Client(gateway.server.port) as flooded, Client(gateway.server.port) as client:
        other = flooded.request(provider.fresh(scripts.flood()))
        flooded.wait_text(other)
        reading = gevent.spawn(read_for_ever, flooded)
        try:
            request_id = start(client, provider, ["once"])
            sent_at = time.monotonic()
            client.interrupt(request_id)
            assert client.wait_ack().at - sent_at < 0.5
        finally:
            reading.kill()


def read_for_ever(client: Client) -> None:
    while True:
        client.next()
