"""Requests in voice, while nobody recognizes speech: each is read to its end and gets exactly one
terminal frame, and nothing else notices."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from actors.messages import EndSession
from actors.session.lifetime import Due
from actors.session.messages import TimeIsDue
from actors.words import OnNewRequest
from gateway.app import Gateway
from gateway.wire.frames import Request, RequestContent
from tests.fakes import FakeSource
from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.provider_process import ProviderProcess
from tests.test_session import Given, VoiceReceived

MakeGateway: TypeAlias = Callable[..., Gateway]
NO_RECOGNITION = "speech recognition is not configured"
VOICE = base64.b64encode(b"\0\1" * 160).decode()


pytestmark = pytest.mark.usefixtures("no_actor_left")


def base64_frame(
    client: Client,
    request_id: str,
    seq: int = 0,
    *,
    flag: bool = True,
    voice: str | None = VOICE,
    **fields: Any,
) -> None:
    content = {"voice_mode": "BASE64", "voice": voice, "audio_format": "pcm"}
    client.send(
        "REQUEST",
        {
            "request_id": request_id,
            "data_type": "VOICE",
            "stream_flag": flag,
            "stream_seq": seq,
            "content": content,
            **fields,
        },
    )


def binary_frame(client: Client, request_id: str, seq: int, **fields: Any) -> None:
    client.send(
        "REQUEST",
        {
            "request_id": request_id,
            "data_type": "VOICE",
            "stream_flag": True,
            "stream_seq": seq,
            "content": {"voice_mode": "BINARY"},
            **fields,
        },
    )


def fence(client: Client) -> list[Received]:
    """The frames that came before the answer to what is asked last, since the last fence."""
    before = max(
        (at + 1 for at, one in enumerate(client.frames) if one.msg_type == "HEALTH_CHECK_ACK"),
        default=1,  # after the REGISTER_ACK
    )
    client.send("HEALTH_CHECK", {"check_fields": ["status"]})
    client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
    return client.frames[before:-1]


def refusal(client: Client, request_id: str) -> dict[str, Any]:
    """The only frame since the last fence, which is the terminal ERROR of this request."""
    (frame,) = fence(client)
    assert frame.msg_type == "ERROR"
    assert frame.session_id == client.session_id
    assert frame.payload["request_id"] == request_id
    assert frame.payload["outcome"] == "FAILED"
    assert {"finish_reason", "usage"} <= frame.payload.keys()
    return frame.payload


def assert_not_recognized(client: Client, request_id: str) -> None:
    payload = refusal(client, request_id)
    assert payload["error_code"] == "INTERNAL_ERROR"
    assert payload["error_detail"] == NO_RECOGNITION
    assert payload["retryable"] is True


# What is in order --------------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [0, -1, 5])
def test_voice_in_one_base64_frame_is_refused_when_it_has_come(client: Client, seq: int) -> None:
    base64_frame(client, "v", seq, flag=False)
    assert_not_recognized(client, "v")


@pytest.mark.parametrize("last", [VOICE, "", None])
def test_voice_in_a_base64_stream_is_refused_at_its_end_and_not_before(
    client: Client, last: str | None
) -> None:
    for seq in (0, 1, 2):
        base64_frame(client, "v", seq)
        assert fence(client) == []
    base64_frame(client, "v", -1, voice=last)
    assert_not_recognized(client, "v")


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_voice_in_binary_frames_is_refused_at_its_end_and_not_before(
    client: Client, frames: int
) -> None:
    binary_frame(client, "v", 0)
    assert fence(client) == []
    for _ in range(frames):
        client.send_binary(b"\0\1" * 160)
        assert fence(client) == []
    binary_frame(client, "v", -1)
    assert_not_recognized(client, "v")


def test_one_voice_after_another_is_each_refused_once(client: Client) -> None:
    for number in range(3):
        base64_frame(client, f"stream_{number}", 0)
        base64_frame(client, f"stream_{number}", -1)
        assert_not_recognized(client, f"stream_{number}")
        binary_frame(client, f"binary_{number}", 0)
        client.send_binary(b"\0\1")
        binary_frame(client, f"binary_{number}", -1)
        assert_not_recognized(client, f"binary_{number}")
        base64_frame(client, f"whole_{number}", flag=False)
        assert_not_recognized(client, f"whole_{number}")


@pytest.mark.parametrize("policy", OnNewRequest)
def test_voice_disturbs_nothing_that_runs_and_asks_the_model_nothing(
    make_gateway: MakeGateway, provider: ProviderProcess, policy: OnNewRequest
) -> None:
    with Client(make_gateway(on_new_request=policy).server.port) as client:
        key = provider.unique("end")
        live = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
        while client.text_of(live) != "on and on":
            client.wait_text(live)
        before = provider.counts().posts
        fence(client)
        base64_frame(client, "whole", flag=False)
        assert_not_recognized(client, "whole")
        binary_frame(client, "binary", 0)
        client.send_binary(b"\0\1")
        binary_frame(client, "binary", -1)
        assert_not_recognized(client, "binary")
        base64_frame(client, "torn", 0)
        base64_frame(client, "torn", 2)
        assert refusal(client, "torn")["error_code"] == "STREAM_SEQ_ERROR"
        provider.release(key)
        assert client.wait_terminal(live).payload["outcome"] == "COMPLETED"
        assert provider.counts().posts == before


def test_a_text_request_amid_the_voice_leaves_it_alone(
    client: Client, provider: ProviderProcess
) -> None:
    binary_frame(client, "v", 0)
    client.send_binary(b"\0\1")
    text = client.request(provider.fresh(scripts.answer(["yes"])))
    assert client.wait_terminal(text).payload["outcome"] == "COMPLETED"
    fence(client)
    client.send_binary(b"\0\1")
    binary_frame(client, "v", -1)
    assert_not_recognized(client, "v")


def test_the_voice_is_no_turn_of_the_conversation(
    client: Client, provider: ProviderProcess
) -> None:
    base64_frame(client, "v", flag=False)
    script = provider.fresh(scripts.answer(["yes"]))
    client.wait_terminal(client.request(script))
    assert len(provider.wait_post(script=script).body["messages"]) == 1


# What is out of order ----------------------------------------------------------------------------

OUT_OF_ORDER: dict[str, list[tuple[int, bool]]] = {
    "begins_with_1": [(1, True)],
    "begins_with_the_end": [(-1, True)],
    "a_gap": [(0, True), (2, True)],
    "the_same_again": [(0, True), (1, True), (1, True)],
    "from_the_start_again": [(0, True), (1, True), (0, True)],
    "no_stream_any_more": [(0, True), (1, False)],
    "no_stream_at_its_end": [(0, True), (-1, False)],
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_frames_out_of_order_are_refused_once_and_the_rest_is_ignored(
    client: Client, name: str
) -> None:
    *before, (seq, flag) = OUT_OF_ORDER[name]
    for good_seq, good_flag in before:
        base64_frame(client, "v", good_seq, flag=good_flag)
    assert fence(client) == []
    base64_frame(client, "v", seq, flag=flag)
    payload = refusal(client, "v")
    assert payload["error_code"] == "STREAM_SEQ_ERROR"
    assert payload["retryable"] is True
    assert f"got stream_seq {seq}" in payload["error_detail"]
    if seq != -1 and flag:  # else the client says itself that this was all
        for rest in (1, 2, 7):
            base64_frame(client, "v", rest)
            client.send_binary(b"\0\1")
        base64_frame(client, "v", -1)
    assert fence(client) == []
    # Whoever comes next is served.
    base64_frame(client, "next", 0)
    base64_frame(client, "next", -1)
    assert_not_recognized(client, "next")


def test_after_its_end_a_refused_voice_is_an_id_that_was_used(client: Client) -> None:
    for request_id, seqs in (("ends_badly", (0, -1)), ("begins_badly", (-1,))):
        for seq in seqs:
            base64_frame(client, request_id, seq, flag=seq == 0 or len(seqs) == 1)
        assert refusal(client, request_id)["error_code"] == "STREAM_SEQ_ERROR"
        base64_frame(client, request_id, 0)
        (fault,) = fence(client)
        assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
        assert request_id in fault.payload["error_detail"]
        assert "request_id" not in fault.payload


def test_a_recognized_end_closes_the_voice_for_binary_frames(client: Client) -> None:
    binary_frame(client, "v", 0)
    binary_frame(client, "v", -1)
    assert_not_recognized(client, "v")
    client.send_binary(b"\0\1")
    (fault,) = fence(client)
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "request_id" not in fault.payload


def test_a_binary_frame_outside_of_a_request_ends_none(
    client: Client, provider: ProviderProcess
) -> None:
    live = client.request("default story")
    client.wait_text(live)
    client.send_binary(b"\0\1")
    fault = client.wait_for(lambda frame: frame.msg_type == "ERROR")
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "request_id" not in fault.payload
    client.wait_text(live)


def test_a_binary_frame_before_the_registration_is_refused(gateway: Gateway) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.send_binary(b"\0\1")
        assert client.next().payload["error_code"] == "SESSION_INVALID"
        client.register()


@pytest.mark.parametrize("seq", [0, 1, 7])
def test_in_binary_mode_only_the_end_may_follow(client: Client, seq: int) -> None:
    binary_frame(client, "v", 0)
    client.send_binary(b"\0\1")
    binary_frame(client, "v", seq)
    assert refusal(client, "v")["error_code"] == "STREAM_SEQ_ERROR"
    client.send_binary(b"\0\1")
    binary_frame(client, "v", -1)
    assert fence(client) == []


def test_binary_frames_do_not_fit_voice_in_base64(client: Client) -> None:
    base64_frame(client, "v", 0)
    client.send_binary(b"\0\1")
    assert refusal(client, "v")["error_code"] == "STREAM_SEQ_ERROR"
    base64_frame(client, "v", 1)
    base64_frame(client, "v", -1)
    assert fence(client) == []


def test_a_voice_does_not_change_its_mode(client: Client) -> None:
    base64_frame(client, "one", 0)
    binary_frame(client, "one", -1)
    assert refusal(client, "one")["error_code"] == "STREAM_SEQ_ERROR"
    binary_frame(client, "two", 0)
    base64_frame(client, "two", 1)
    assert refusal(client, "two")["error_code"] == "STREAM_SEQ_ERROR"
    binary_frame(client, "two", -1)
    assert fence(client) == []


def test_a_new_voice_before_the_end_of_another_ends_that_one_and_is_served(
    client: Client,
) -> None:
    base64_frame(client, "old", 0)
    base64_frame(client, "new", 0)
    payload = refusal(client, "old")
    assert payload["error_code"] == "STREAM_SEQ_ERROR"
    assert "'new'" in payload["error_detail"]
    base64_frame(client, "new", 1)
    assert fence(client) == []
    base64_frame(client, "new", -1)
    assert_not_recognized(client, "new")


# What is malformed or too large ------------------------------------------------------------------

MALFORMED: dict[str, dict[str, Any]] = {
    "not_base64": {"voice_mode": "BASE64", "voice": "!!"},
    "no_voice": {"voice_mode": "BASE64"},
    "no_mode": {"voice": VOICE},
    "unknown_mode": {"voice_mode": "OPUS", "voice": VOICE},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_frame_amid_the_voice_is_refused_once_and_the_rest_is_ignored(
    client: Client, name: str
) -> None:
    base64_frame(client, "v", 0)
    base64_frame(client, "v", 1, content=MALFORMED[name])
    assert refusal(client, "v")["error_code"] == "MALFORMED_PAYLOAD"
    base64_frame(client, "v", 2)
    base64_frame(client, "v", 3, content=MALFORMED[name])
    base64_frame(client, "v", -1)
    assert fence(client) == []
    base64_frame(client, "next", flag=False)
    assert_not_recognized(client, "next")


@pytest.mark.parametrize("name", MALFORMED)
def test_a_whole_voice_that_is_malformed_is_refused_once(client: Client, name: str) -> None:
    base64_frame(client, "v", flag=False, content=MALFORMED[name])
    assert refusal(client, "v")["error_code"] == "MALFORMED_PAYLOAD"


def test_a_malformed_frame_of_another_request_leaves_the_voice_alone(client: Client) -> None:
    base64_frame(client, "v", 0)
    client.send("REQUEST", {"request_id": "other", "data_type": "TEXT", "content": {}})
    assert refusal(client, "other")["error_code"] == "MALFORMED_PAYLOAD"
    client.send_text(b"what?")
    (fault,) = fence(client)
    assert "request_id" not in fault.payload
    base64_frame(client, "v", 1)
    base64_frame(client, "v", -1)
    assert_not_recognized(client, "v")


@pytest.mark.parametrize("mode", ["BASE64", "BINARY"])
def test_voice_has_a_bound_and_may_have_exactly_so_much(
    make_gateway: MakeGateway, mode: str
) -> None:
    with Client(make_gateway(max_voice_bytes=1000).server.port) as client:

        def say(request_id: str, sizes: list[int]) -> None:
            if mode == "BINARY":
                binary_frame(client, request_id, 0)
            for seq, size in enumerate(sizes):
                if mode == "BINARY":
                    client.send_binary(bytes(size))
                else:
                    voice = base64.b64encode(bytes(size)).decode()
                    base64_frame(client, request_id, seq, voice=voice)

        def end(request_id: str) -> None:
            if mode == "BINARY":
                binary_frame(client, request_id, -1)
            else:
                base64_frame(client, request_id, -1, voice=None)

        say("as_much", [600, 400])
        assert fence(client) == []
        end("as_much")
        assert_not_recognized(client, "as_much")
        say("more", [600, 401])
        payload = refusal(client, "more")
        assert payload["error_code"] == "PAYLOAD_TOO_LARGE"
        assert payload["retryable"] is False
        assert "1000" in payload["error_detail"]
        if mode == "BINARY":
            client.send_binary(bytes(2000))
        end("more")
        assert fence(client) == []
        say("as_much_again", [1000])
        end("as_much_again")
        assert_not_recognized(client, "as_much_again")


def test_a_frame_of_voice_may_have_more_than_text_and_ten_mebibytes_come_through(
    client: Client,
) -> None:
    binary_frame(client, "v", 0)
    for _ in range(10):
        client.send_binary(bytes(1024 * 1024))
    assert fence(client) == []
    client.send_binary(b"\0")
    assert refusal(client, "v")["error_code"] == "PAYLOAD_TOO_LARGE"
    voice = base64.b64encode(bytes(700 * 1024)).decode()
    base64_frame(client, "large", flag=False, voice=voice)
    assert_not_recognized(client, "large")


# Interrupts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["BASE64", "BINARY"])
@pytest.mark.parametrize("target", ["v", None, ""])
@pytest.mark.parametrize("tts", [False, True])
def test_an_interrupt_stops_a_voice_whose_frames_are_still_coming(
    gateway: Gateway, mode: str, target: str | None, tts: bool
) -> None:
    frame = base64_frame if mode == "BASE64" else binary_frame
    with Client(gateway.server.port, register=False) as client:
        client.register(require_tts=tts)
        frame(client, "v", 0)
        client.interrupt(target, "USER_VOICE_INPUT")
        ack, terminal = fence(client)
        assert ack.msg_type == "INTERRUPT_ACK"
        assert ack.payload["status"] == "SUCCESS"
        assert ack.payload["interrupt_request_id"] == target
        assert ack.payload["interrupted_request_ids"] == ["v"]
        assert ack.payload["results"] == [
            {
                "request_id": "v",
                "outcome": "STOPPED",
                "delivered_text_chars": 0,
                "stream_closed_ms": None,
            }
        ]
        voice_end = {"voice_stream_seq": -1} if tts else {}
        assert terminal.payload == {
            "request_id": "v",
            "text_stream_seq": -1,
            "content": {},
            "interrupted": True,
            "interrupt_reason": "USER_VOICE_INPUT",
            "outcome": "INTERRUPTED",
            "finish_reason": None,
            "usage": None,
            **voice_end,
        }
        frame(client, "v", 1)
        client.send_binary(b"\0\1")
        frame(client, "v", -1)
        assert fence(client) == []
        client.interrupt("v")
        (again,) = fence(client)
        assert again.payload["results"][0]["outcome"] == "ALREADY_DONE"
        frame(client, "next", 0)
        frame(client, "next", -1)
        assert_not_recognized(client, "next")


def test_an_interrupt_of_another_request_leaves_the_voice_alone(client: Client) -> None:
    base64_frame(client, "v", 0)
    client.interrupt("other")
    (ack,) = fence(client)
    assert ack.payload["results"][0]["outcome"] == "UNKNOWN"
    base64_frame(client, "v", -1)
    assert_not_recognized(client, "v")


def test_an_interrupt_for_all_takes_the_voice_along_with_what_runs() -> None:
    given = Given(FakeSource(stuck=True), ack_timeout=60)
    given.register()
    given.request("text")
    stream = given.source.next()
    given.tell(given.frame(Request("v", "VOICE", RequestContent(voice_mode="BINARY"))))
    given.interrupt(None)
    given.tell(VoiceReceived(b"\0\1"))
    given.settle()
    assert given.outbox.history() == ["REGISTER_ACK"]
    stream.end_closed()
    ack = given.outbox.wait_ack()
    assert sorted(ack["interrupted_request_ids"]) == ["text", "v"]
    assert ack["status"] == "SUCCESS"
    given.settle()
    assert given.outbox.history()[1] == "ack SUCCESS None"
    assert sorted(given.outbox.history()[2:]) == ["end INTERRUPTED text", "end INTERRUPTED v"]


def test_an_interrupt_for_a_finished_voice_stops_nothing(client: Client) -> None:
    base64_frame(client, "v", flag=False)
    assert_not_recognized(client, "v")
    client.interrupt("v")
    (ack,) = fence(client)
    assert ack.payload["status"] == "FAILED"
    assert ack.payload["results"][0]["outcome"] == "ALREADY_DONE"


# The session's end -------------------------------------------------------------------------------


def test_a_voice_whose_frames_are_still_coming_is_interrupted_with_its_session() -> None:
    given = Given(FakeSource())
    given.register()
    given.tell(given.frame(Request("v", "VOICE", RequestContent(voice_mode="BINARY"))))
    given.tell(EndSession())
    terminal = given.outbox.wait_terminal("v")
    assert terminal["interrupt_reason"] == "SERVER_SHUTDOWN"
    assert given.outbox.wait_for("SHUTDOWN") == {"reason": "SERVER_SHUTDOWN"}
    assert given.outbox.history()[1:] == ["end INTERRUPTED v", "SHUTDOWN"]


def test_a_voice_is_interrupted_at_the_session_s_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(FakeSource())
    given.register()
    given.tell(given.frame(Request("v", "VOICE", RequestContent(voice_mode="BINARY"))))
    given.settle()
    monkeypatch.setattr("actors.session.lifetime.Lifetime.due", lambda life, now: [Due.END])
    given.tell(TimeIsDue())
    assert given.outbox.wait_terminal("v")["interrupt_reason"] == "SESSION_TIMEOUT"
    assert given.outbox.wait_for("SHUTDOWN") == {"reason": "session timeout"}


def sessions(gateway: Gateway) -> int:
    census = gateway.supervision.census()
    assert census is not None
    return census.sessions


def test_a_client_that_goes_amid_its_voice_leaves_nothing_behind(
    make_gateway: MakeGateway,
) -> None:
    gateway = make_gateway()
    with Client(gateway.server.port) as client:
        binary_frame(client, "v", 0)
        client.send_binary(b"\0\1")
        fence(client)
        client.close()
    with Client(gateway.server.port) as other:
        wait_until(lambda: sessions(gateway) == 1, "the other session is the only one")
        binary_frame(other, "v", 0)
        binary_frame(other, "v", -1)
        assert_not_recognized(other, "v")


# Speech in answers -------------------------------------------------------------------------------


def test_a_text_request_with_require_tts_gets_the_end_of_voice_on_its_last_frame_alone(
    client: Client, provider: ProviderProcess
) -> None:
    script = provider.fresh(scripts.answer(["yes ", "indeed"]))
    client.send(
        "REQUEST",
        {
            "request_id": "t",
            "data_type": "TEXT",
            "content": {"text": script},
            "require_tts": True,
        },
    )
    assert client.wait_terminal("t").payload["voice_stream_seq"] == -1
    *data, terminal = client.frames_of("t")
    assert terminal.payload["text_stream_seq"] == -1
    assert all("voice_stream_seq" not in frame.payload for frame in data)
    assert client.text_of("t") == "yes indeed"


def test_it_gets_it_when_it_is_interrupted_too(client: Client) -> None:
    client.send(
        "REQUEST",
        {
            "request_id": "t",
            "data_type": "TEXT",
            "content": {"text": "default story"},
            "update_session": {"require_tts": True},
        },
    )
    client.wait_text("t")
    client.interrupt("t")
    assert client.wait_terminal("t").payload["voice_stream_seq"] == -1


# Ids and updates ---------------------------------------------------------------------------------


def terminal_of(frames: list[Received], request_id: str) -> Received:
    """The one terminal frame of a request."""
    (terminal,) = (
        one for one in frames if one.is_terminal and one.payload["request_id"] == request_id
    )
    return terminal


@pytest.mark.parametrize("text", ["", "hello"])
def test_a_text_may_not_take_the_id_of_a_voice_whose_frames_are_still_coming(
    client: Client, text: str
) -> None:
    binary_frame(client, "v", 0)
    client.request(text, "v")
    (fault,) = fence(client)
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "'v'" in fault.payload["error_detail"]
    assert "request_id" not in fault.payload
    client.send_binary(b"\0\1")
    binary_frame(client, "v", -1)
    assert_not_recognized(client, "v")


def test_a_voice_under_an_id_that_was_used_is_refused_once_and_its_rest_is_ignored(
    client: Client,
) -> None:
    client.request("", "used")
    client.wait_terminal("used")
    fence(client)
    binary_frame(client, "used", 0)
    (fault,) = fence(client)
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "request_id" not in fault.payload
    client.send_binary(b"\0\1")
    client.send_binary(b"\0\1")
    binary_frame(client, "used", -1)
    assert fence(client) == []
    client.send_binary(b"\0\1")  # after its end
    (fault,) = fence(client)
    assert fault.payload["error_code"] == "MALFORMED_PAYLOAD"


@pytest.mark.parametrize(
    "content", [{"voice_mode": "BASE64", "voice": VOICE}, MALFORMED["no_voice"]]
)
def test_after_one_whole_frame_nothing_more_is_ignored(
    client: Client, content: dict[str, Any]
) -> None:
    base64_frame(client, "v", flag=False, content=content)
    refusal(client, "v")
    client.send_binary(b"\0\1")
    (outside,) = fence(client)
    assert "outside" in outside.payload["error_detail"]
    base64_frame(client, "v", flag=False, content=content)
    (again,) = fence(client)
    assert "'v'" in again.payload["error_detail"]
    assert "request_id" not in again.payload


def test_a_text_under_an_id_that_was_used_lets_nothing_be_ignored(client: Client) -> None:
    for _ in range(2):
        client.request("", "used")
    client.send_binary(b"\0\1")
    *_, outside = fence(client)
    assert outside.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "outside" in outside.payload["error_detail"]


def switches(client: Client) -> tuple[bool, bool]:
    client.send("SESSION_QUERY", {"query_fields": ["require_tts", "enable_srs"]})
    info = client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
    data = info.payload["session_data"]
    return data["require_tts"], data["enable_srs"]


@pytest.mark.parametrize("whole", [False, True])
def test_the_updates_of_a_voice_are_made(client: Client, whole: bool) -> None:
    base64_frame(
        client, "v", flag=not whole, require_tts=True, update_session={"enable_srs": False}
    )
    assert switches(client) == (True, False)


@pytest.mark.parametrize("whole", [False, True])
def test_half_valid_updates_of_a_voice_change_nothing_and_end_it(
    client: Client, whole: bool
) -> None:
    bad: dict[str, Any] = {"function_calling_op": "DELETE", "function_calling": ["lamp"]}
    base64_frame(client, "v", flag=not whole, require_tts=True, update_session=bad)
    payload = refusal(client, "v")
    assert payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "'lamp'" in payload["error_detail"]
    if not whole:
        base64_frame(client, "v", 1)
        base64_frame(client, "v", -1)
    assert fence(client) == []
    assert switches(client) == (False, True)


def test_a_voice_with_bad_updates_that_was_interrupted_before_it_came_ends_once(
    client: Client,
) -> None:
    bad: dict[str, Any] = {"function_calling_op": "DELETE", "function_calling": ["lamp"]}
    client.interrupt("v")
    base64_frame(client, "v", 0, update_session=bad)
    base64_frame(client, "v", -1)
    assert terminal_of(fence(client), "v").session_id == client.session_id


def test_a_voice_that_was_interrupted_before_it_came_ends_so_whatever_else_is_wrong_with_it(
    client: Client,
) -> None:
    for request_id, seqs in (("good", (0, 1, -1)), ("gap", (0, 5, -1)), ("begins_badly", (5, -1))):
        client.interrupt(request_id)
        for seq in seqs:
            base64_frame(client, request_id, seq)
        terminal = terminal_of(fence(client), request_id)
        assert terminal.msg_type == "RESPONSE"
        assert terminal.payload["outcome"] == "INTERRUPTED"


# What is over for the gateway, but not for the client --------------------------------------------


def test_the_rest_of_base64_voice_whose_first_frame_was_malformed_is_ignored(
    client: Client,
) -> None:
    base64_frame(client, "req_1", 0, content={"voice_mode": "BASE64", "voice": "!!"})
    assert refusal(client, "req_1")["error_code"] == "MALFORMED_PAYLOAD"
    base64_frame(client, "req_1", 1)
    base64_frame(client, "req_1", -1)
    assert fence(client) == []


def test_the_rest_of_binary_voice_whose_first_frame_was_malformed_is_ignored(
    client: Client,
) -> None:
    binary_frame(client, "req_1", 0, content={})
    assert refusal(client, "req_1")["error_code"] == "MALFORMED_PAYLOAD"
    client.send_binary(b"voice")
    binary_frame(client, "req_1", -1)
    assert fence(client) == []


def test_the_rest_of_voice_that_another_one_cut_short_is_ignored(client: Client) -> None:
    base64_frame(client, "old", 0)
    base64_frame(client, "new", 0)
    assert refusal(client, "old")["error_code"] == "STREAM_SEQ_ERROR"
    base64_frame(client, "old", 1)
    base64_frame(client, "old", -1)
    assert fence(client) == []
    base64_frame(client, "new", 1)
    base64_frame(client, "new", -1)
    assert_not_recognized(client, "new")


def test_voice_that_begins_while_the_session_is_ending_is_refused_once() -> None:
    given = Given(FakeSource(stuck=True), ack_timeout=60)
    given.register()
    given.request("req_1")
    given.source.next()
    given.tell(EndSession())
    for seq in (0, 1, -1):
        content = RequestContent(voice_mode="BINARY")
        given.tell(given.frame(Request("req_2", "VOICE", content, stream_seq=seq)))
        if seq == 0:
            given.tell(VoiceReceived(b"voice"))
    given.settle()
    assert given.outbox.history()[1:] == ["end SERVER_BUSY req_2"]


def test_each_whole_voice_under_a_used_id_is_told_so(client: Client) -> None:
    base64_frame(client, "req_1", flag=False)
    assert_not_recognized(client, "req_1")
    for _ in range(3):
        base64_frame(client, "req_1", flag=False)
        (told,) = fence(client)
        assert told.payload["error_code"] == "MALFORMED_PAYLOAD"
        assert "request_id" not in told.payload


def test_early_interrupted_voice_with_an_update_that_cannot_be_made_ends_as_interrupted(
    client: Client,
) -> None:
    client.interrupt("req_1")
    client.wait_ack()
    base64_frame(client, "req_1", 0, function_calling_op="DELETE", function_calling=["nobodys"])
    assert client.wait_terminal("req_1").payload["outcome"] == "INTERRUPTED"
    fence(client)
    base64_frame(client, "req_1", -1)
    assert fence(client) == []
