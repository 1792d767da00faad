"""The promises of the wire protocol, each over a real WebSocket."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TypeAlias

import gevent
import gevent.event
import pytest

from actors.words import OnNewRequest
from gateway.app import Gateway
from llm.http.connections import ConnectionReader
from tests.harness import scripts
from tests.harness.client import Client, Received
from tests.harness.provider_process import ProviderProcess

MakeGateway: TypeAlias = Callable[..., Gateway]


def terminals_of(client: Client, request_id: str) -> list[Received]:
    return [frame for frame in client.frames_of(request_id) if frame.is_terminal]


def ask_for_all(client: Client, provider: ProviderProcess, texts: Sequence[str]) -> str:
    """A request whose whole answer, of these texts, is received on return."""
    request_id = client.request(provider.fresh(scripts.answer(texts)))
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    return request_id


# 1

ENDINGS: dict[str, tuple[scripts.Script, str]] = {
    "completed": (scripts.answer(["a", "b"]), "COMPLETED"),
    "no_text": (scripts.answer([]), "COMPLETED"),
    "done_but_open": (scripts.done_but_open(["a"]), "COMPLETED"),
    "content_length": (scripts.plain_content_length(["a"]), "COMPLETED"),
    "truncated": (scripts.truncated(["a"]), "FAILED"),
    "reset": (scripts.reset_mid_stream(["a"]), "FAILED"),
    "reset_before_headers": ([scripts.reset()], "FAILED"),
    "closed_before_headers": ([scripts.close()], "FAILED"),
    "error_in_stream": (scripts.error_in_stream("overloaded", ["a"]), "FAILED"),
    "malformed": (scripts.raw([b"data: {oops\n\n"]), "FAILED"),
    "not_a_stream": (scripts.not_sse(), "FAILED"),
    "unauthorized": (scripts.http_error(401, {"error": {"message": "no such key"}}), "FAILED"),
    "bad_request": (scripts.http_error(400, "too long"), "FAILED"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_promise_1_every_accepted_request_gets_exactly_one_terminal_frame(
    client: Client, provider: ProviderProcess, name: str
) -> None:
    script, outcome = ENDINGS[name]
    request_id = client.request(provider.fresh(script))
    terminal = client.wait_terminal(request_id)
    ask_for_all(client, provider, ["something else"])  # time enough for a second one
    assert terminal.payload["outcome"] == outcome
    assert terminal.msg_type == ("RESPONSE" if outcome == "COMPLETED" else "ERROR")
    assert {"finish_reason", "usage"} <= terminal.payload.keys()
    assert terminals_of(client, request_id) == [terminal]
    assert client.frames_of(request_id)[-1] is terminal


def test_promise_1_holds_for_a_provider_that_cannot_be_reached(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(base_url="http://127.0.0.1:1/v1")
    with Client(gateway.server.port) as client:
        for _ in range(3):
            request_id = client.request("hello")
            terminal = client.wait_terminal(request_id)
            assert terminal.payload["outcome"] == "FAILED"
            assert terminal.payload["error_code"] == "INTERNAL_ERROR"
            assert terminals_of(client, request_id) == [terminal]


@pytest.mark.parametrize(
    ("setting", "script"),
    [
        ("first_token_timeout", scripts.no_headers()),
        ("first_token_timeout", scripts.headers_only()),
        ("idle_timeout", scripts.idle_mid_stream(["once"])),
    ],
)
def test_promise_1_holds_for_a_provider_that_is_too_slow(
    make_gateway: MakeGateway, provider: ProviderProcess, setting: str, script: scripts.Script
) -> None:
    gateway = make_gateway(**{setting: 0.1})
    with Client(gateway.server.port) as client:
        name = provider.fresh(script)
        request_id = client.request(name)
        terminal = client.wait_terminal(request_id)
        provider.wait_closed(provider.wait_post(script=name).conn)
        ask_for_all(client, provider, ["something else"])
        assert terminal.payload["error_code"] == "REQUEST_TIMEOUT"
        assert terminals_of(client, request_id) == [terminal]


def test_promise_1_holds_for_a_burst_of_requests_that_push_each_other_out(
    client: Client, provider: ProviderProcess
) -> None:
    names = [provider.fresh(scripts.answer([f"answer {number}"])) for number in range(30)]
    with client.one_packet():
        request_ids = [client.request(name) for name in names]
    last = client.wait_terminal(request_ids[-1])
    ask_for_all(client, provider, ["something else"])
    assert last.payload["outcome"] == "COMPLETED"
    assert client.text_of(request_ids[-1]) == "answer 29"
    for request_id in request_ids[:-1]:
        (terminal,) = terminals_of(client, request_id)
        assert terminal.payload["outcome"] == "INTERRUPTED"
        assert terminal.payload["interrupt_reason"] == "USER_NEW_INPUT"


def test_an_empty_request_only_updates_the_session_and_interrupts_nothing(
    client: Client, provider: ProviderProcess
) -> None:
    key = provider.unique("end")
    live = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(live)
    before = provider.counts().posts
    empty = client.request("")
    assert client.wait_terminal(empty).payload["outcome"] == "COMPLETED"
    provider.release(key)
    assert client.wait_terminal(live).payload["outcome"] == "COMPLETED"
    assert client.text_of(live) == "on and on"
    assert provider.counts().posts == before


# 2 and 3


def test_promise_2_no_data_frame_follows_the_ack_of_its_interrupt(
    client: Client, provider: ProviderProcess
) -> None:
    for number in range(20):
        request_id = client.request(provider.fresh(scripts.flood(f"flood {number} ")))
        for _ in range(number):
            client.wait_text(request_id)
        client.interrupt(request_id)
        ack = client.wait_ack()
        ask_for_all(client, provider, ["something else"])
        assert ack.payload["status"] == "SUCCESS"
        *data, terminal = client.frames_of(request_id)
        assert terminal.payload["interrupted"] is True
        assert all(client.frames.index(frame) < client.frames.index(ack) for frame in data)
        (result,) = ack.payload["results"]
        assert result["delivered_text_chars"] == len(client.text_of(request_id))


def test_promise_3_the_ack_comes_when_the_stream_is_closed_and_before_the_terminal_frame(
    client: Client, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, may_close = gevent.event.Event(), gevent.event.Event()
    close = ConnectionReader.hang_up

    def slow_close(connection: ConnectionReader) -> None:
        closing.set()
        may_close.wait()
        close(connection)

    monkeypatch.setattr(ConnectionReader, "hang_up", slow_close)
    script = provider.fresh(scripts.idle_mid_stream(["once", " upon"]))
    request_id = client.request(script)
    conn = provider.wait_post(script=script).conn
    client.wait_text(request_id)
    client.interrupt(request_id)
    assert closing.wait(5)
    client.send("HEALTH_CHECK", {})
    client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
    assert not [frame for frame in client.frames if frame.msg_type == "INTERRUPT_ACK"]
    assert terminals_of(client, request_id) == []
    may_close.set()
    ack = client.wait_ack()
    assert ack.payload["status"] == "SUCCESS"
    assert client.wait_terminal(request_id).payload["interrupted"] is True
    provider.wait_closed(conn)


# 4

AWKWARD_TEXTS = {
    "words": [f"word{number} " for number in range(500)],
    "scripts": ["你好", "😀👩‍👩‍👧‍👦", "é", "e\u0301"],
    "escapes": ['"\\/\b\f\n\r\t', "\u0000\u001f\u007f", "\u2028\u2029", "\ufeff"],
    "spaces_and_line_ends": [" ", "  leading", "trailing  ", "\n\n", "\r\n", "\t"],
    "what_looks_like_the_wire": ["data: [DONE]\n\n", "[DONE]", '{"error":{}}', "\n\ndata: x\n\n"],
    "one_huge_piece": ["汉" * 40_000 + "end"],
    "many_empty_pieces": ["a", "", "", "b", ""],
}


@pytest.mark.parametrize("name", AWKWARD_TEXTS)
def test_promise_4_the_frames_in_order_are_exactly_the_answer(
    client: Client, provider: ProviderProcess, name: str
) -> None:
    texts = AWKWARD_TEXTS[name]
    request_id = ask_for_all(client, provider, texts)
    assert client.text_of(request_id) == "".join(texts)
    *data, last = client.frames_of(request_id)
    assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))
    assert all(frame.text for frame in data)
    assert last.payload["text_stream_seq"] == -1
    assert last.payload["content"] == {}
    assert last.payload["finish_reason"] == "stop"
    assert last.payload["usage"] == scripts.USAGE


def test_promise_4_holds_however_the_bytes_are_cut(
    client: Client, provider: ProviderProcess
) -> None:
    texts = ["Zwölf ", "😀", "漢字"]
    body = b"".join([*map(scripts.text_event, texts), scripts.finish_event(), scripts.done()])
    bytewise = scripts.raw([body[at : at + 1] for at in range(len(body))])
    request_id = client.request(provider.fresh(bytewise))
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    assert client.text_of(request_id) == "".join(texts)
    *data, _ = client.frames_of(request_id)
    assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))


def test_promise_4_what_was_delivered_before_a_failure_has_no_gap_either(
    client: Client, provider: ProviderProcess
) -> None:
    request_id = client.request(provider.fresh(scripts.truncated(["half ", "an ", "answer"])))
    client.wait_terminal(request_id)
    assert client.text_of(request_id) == "half an answer"
    *data, _ = client.frames_of(request_id)
    assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))


# 5


@pytest.mark.parametrize("name", ENDINGS)
def test_promise_5_a_generation_costs_one_post(
    client: Client, provider: ProviderProcess, name: str
) -> None:
    script = provider.fresh(ENDINGS[name][0])
    client.wait_terminal(client.request(script))
    ask_for_all(client, provider, ["something else"])
    provider.counts()
    assert len(provider.posts(script)) == 1


def test_promise_5_holds_for_interrupts_and_for_requests_that_never_began(
    client: Client, provider: ProviderProcess
) -> None:
    names = [provider.fresh(scripts.idle_mid_stream(["once"])) for _ in range(20)]
    for name in names:
        client.interrupt(client.request(name))
    with client.one_packet():
        for name in names[10:]:  # pushed out by the next one
            client.request(name)
    ask_for_all(client, provider, ["something else"])
    provider.counts()
    assert all(len(provider.posts(name)) <= 1 for name in names[:10])
    assert all(len(provider.posts(name)) <= 2 for name in names[10:])


# 6


def test_promise_6_a_new_request_interrupts_the_older_one_first(
    client: Client, provider: ProviderProcess
) -> None:
    script = provider.fresh(scripts.flood())
    older = client.request(script)
    conn = provider.wait_post(script=script).conn
    client.wait_text(older)
    newer = ask_for_all(client, provider, ["the new ", "answer"])
    provider.wait_closed(conn)
    assert client.text_of(newer) == "the new answer"
    (terminal,) = terminals_of(client, older)
    assert terminal.payload["interrupted"] is True
    assert terminal.payload["interrupt_reason"] == "USER_NEW_INPUT"
    assert terminal.payload["outcome"] == "INTERRUPTED"
    assert client.frames_of(older)[-1] is terminal
    first_of_newer = client.frames_of(newer)[0]
    assert client.frames.index(terminal) < client.frames.index(first_of_newer)
    assert not [frame for frame in client.frames if frame.msg_type == "INTERRUPT_ACK"]


def test_promise_6_the_new_request_is_not_asked_for_before_the_older_stream_is_closed(
    client: Client, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, may_close = gevent.event.Event(), gevent.event.Event()
    close = ConnectionReader.hang_up

    def slow_close(connection: ConnectionReader) -> None:
        closing.set()
        may_close.wait()
        close(connection)

    older = client.request(provider.fresh(scripts.idle_mid_stream(["once"])))
    client.wait_text(older)
    monkeypatch.setattr(ConnectionReader, "hang_up", slow_close)
    script = provider.fresh(scripts.answer(["new"]))
    newer = client.request(script)
    assert closing.wait(5)
    client.send("HEALTH_CHECK", {})
    client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
    provider.counts()
    assert provider.posts(script) == []
    may_close.set()
    assert client.wait_terminal(newer).payload["outcome"] == "COMPLETED"
    (terminal,) = terminals_of(client, older)
    assert client.frames.index(terminal) < client.frames.index(client.frames_of(newer)[0])


def test_promise_6_with_parallel_requests_run_side_by_side(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.PARALLEL)
    with Client(gateway.server.port) as client:
        key = provider.unique("end")
        script = scripts.finish_on_release(["side ", "by side"], key)
        names = [provider.fresh(script) for _ in range(8)]
        request_ids = [client.request(name) for name in names]
        for name in names:
            provider.wait_post(script=name)
        # As many as may be: one more is refused, and the others do not notice.
        refused = client.request("one too many")
        terminal = client.wait_terminal(refused)
        assert terminal.payload["error_code"] == "SERVER_BUSY"
        assert terminal.payload["retryable"] is True
        provider.release(key)
        while len([frame for frame in client.frames if frame.is_terminal]) < 9:
            client.next()
        for request_id in request_ids:
            (terminal,) = terminals_of(client, request_id)
            assert terminal.payload["outcome"] == "COMPLETED"
            assert client.text_of(request_id) == "side by side"
            *data, _ = client.frames_of(request_id)
            assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))
        ask_for_all(client, provider, ["there is room again"])


def test_promise_6_with_reject_a_new_request_is_refused_and_the_older_one_goes_on(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.REJECT)
    with Client(gateway.server.port) as client:
        key = provider.unique("end")
        older = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
        client.wait_text(older)
        script = provider.fresh(scripts.answer(["refused"]))
        newer = client.request(script)
        terminal = client.wait_terminal(newer)
        assert terminal.msg_type == "ERROR"
        assert terminal.payload["error_code"] == "SERVER_BUSY"
        assert terminal.payload["retryable"] is True
        provider.release(key)
        assert client.wait_terminal(older).payload["outcome"] == "COMPLETED"
        assert client.text_of(older) == "on and on"
        # What may be tried again may be tried with the same id.
        client.request(script, newer)
        assert client.wait_terminal(newer).payload["outcome"] == "COMPLETED"
        provider.counts()
        assert len(provider.posts(script)) == 1


# 7


def close_in_order(client: Client) -> None:
    client.close()


def say_close_and_stay(client: Client) -> None:
    client.send_close()


def break_the_protocol(client: Client) -> None:
    client.send_text(b" " * (1536 * 1024 + 1))


LOSSES: dict[str, Callable[[Client], None]] = {
    "closed_in_order": close_in_order,
    "closed_without_a_word": Client.drop,
    "reset": Client.reset,
    "close_frame_only": say_close_and_stay,
    "too_big_a_frame": break_the_protocol,
}


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("script", ["idle", "flood", "no_headers"])
def test_promise_7_when_the_connection_is_gone_its_streams_are_closed(
    make_gateway: MakeGateway, provider: ProviderProcess, how: str, script: str
) -> None:
    gateway = make_gateway(on_new_request=OnNewRequest.PARALLEL)
    steps = {
        "idle": scripts.idle_mid_stream(["once"]),
        "flood": scripts.flood(),
        "no_headers": scripts.no_headers(),
    }[script]
    with Client(gateway.server.port) as other, Client(gateway.server.port) as client:
        key = provider.unique("end")
        others = other.request(provider.fresh(scripts.finish_on_release(["not ", "me"], key)))
        other.wait_text(others)
        names = [provider.fresh(steps) for _ in range(3)]
        for name in names:
            client.request(name)
        conns = [provider.wait_post(script=name).conn for name in names]
        LOSSES[how](client)
        for conn in conns:
            closed = provider.wait_closed(conn, timeout=3)
            assert closed.by in ("client_eof", "client_reset")
        provider.release(key)
        assert other.wait_terminal(others).payload["outcome"] == "COMPLETED"
        assert all(len(provider.posts(name)) == 1 for name in names)


def test_promise_7_holds_for_one_that_waits_for_its_predecessor(
    client: Client, provider: ProviderProcess
) -> None:
    first = provider.fresh(scripts.idle_mid_stream(["once"]))
    client.wait_text(client.request(first))
    second = provider.fresh(scripts.idle_mid_stream(["never"]))
    frame = {
        "version": "1.0",
        "msg_type": "REQUEST",
        "session_id": client.session_id,
        "payload": {"request_id": "2", "data_type": "TEXT", "content": {"text": second}},
        "timestamp": 0,
    }
    with client.one_packet():
        client.send_text(json.dumps(frame).encode())
        client.send_close()
    provider.wait_closed(provider.wait_post(script=first).conn)
    client.wait_closed()
    provider.counts()
    assert provider.open_connections(second) == []
