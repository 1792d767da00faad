"""The wire protocol, pure: bytes to structs and back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from actors.session.profile import Platform, SessionUpdate
from actors.words import AckStatus, ErrorCode, InterruptOutcome, InterruptReason, Outcome
from gateway.wire.decode import FrameError, decode
from gateway.wire.encode import AnswerEncoder, encode, error
from gateway.wire.frames import (
    MAX_TEXT_BYTES,
    MAX_VOICE_TEXT_BYTES,
    VERSION,
    AccountAuth,
    ApiKeyAuth,
    ClientFrame,
    ClientPayload,
    Error,
    HealthCheck,
    HealthCheckAck,
    HealthStatus,
    HeartbeatReply,
    Interrupt,
    InterruptAck,
    InterruptResult,
    Register,
    RegisterAck,
    Request,
    RequestContent,
    Response,
    ResponseContent,
    ServerPayload,
    Shutdown,
    Usage,
)

SESSION = "sess_0123456789abcdef"


def frame(msg_type: str, payload: Any, **envelope: Any) -> bytes:
    fields = {
        "version": "1.0",
        "msg_type": msg_type,
        "session_id": SESSION,
        "payload": payload,
        "timestamp": 1740000000000,
        **envelope,
    }
    return json.dumps(fields, ensure_ascii=False).encode()


def text_request(text: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"request_id": "req_1", "data_type": "TEXT", "content": {"text": text}, **fields}


def refused(data: bytes) -> FrameError:
    with pytest.raises(FrameError) as caught:
        decode(data)
    return caught.value


# Client to server

READ: list[tuple[str, dict[str, Any], ClientPayload]] = [
    (
        "REGISTER",
        {"auth": {"type": "API_KEY", "api_key": "k"}, "platform": "WEB", "require_tts": True},
        Register(ApiKeyAuth("k"), platform=Platform.WEB, require_tts=True),
    ),
    (
        "REGISTER",
        {"auth": {"type": "ACCOUNT", "account": "me", "password": "p"}, "client_type": "TV"},
        Register(AccountAuth("me", "p"), client_type=Platform.TV),
    ),
    ("REQUEST", text_request("你好 😀"), Request("req_1", "TEXT", RequestContent("你好 😀"))),
    (
        "REQUEST",
        text_request("", stream_flag=False, stream_seq=0, update_session={"a": 1}),
        Request("req_1", "TEXT", RequestContent(""), update_session=SessionUpdate()),
    ),
    (
        "REQUEST",
        {
            "request_id": "req_1",
            "data_type": "VOICE",
            "content": {"voice_mode": "BASE64", "voice": "AAAA", "audio_format": "pcm"},
        },
        Request("req_1", "VOICE", RequestContent(None, "BASE64", b"\0\0\0", "pcm")),
    ),
    (
        "INTERRUPT",
        {"interrupt_request_id": "req_1", "reason": "USER_STOP"},
        Interrupt("req_1", "USER_STOP"),
    ),
    ("INTERRUPT", {"interrupt_request_id": None}, Interrupt(None)),
    ("INTERRUPT", {"interrupt_request_id": ""}, Interrupt("")),
    ("INTERRUPT", {}, Interrupt(UNSET)),
    ("HEALTH_CHECK", {"check_fields": ["status"]}, HealthCheck(["status"])),
    ("HEARTBEAT_REPLY", {"client_status": "ok"}, HeartbeatReply("ok")),
    ("SHUTDOWN", {"reason": "bye"}, Shutdown("bye")),
    ("SHUTDOWN", {}, Shutdown()),
]


@pytest.mark.parametrize(("msg_type", "payload", "read"), READ)
def test_each_message_is_read_as_its_struct(
    msg_type: str, payload: dict[str, Any], read: ClientPayload
) -> None:
    assert decode(frame(msg_type, payload)) == ClientFrame(SESSION, read)


@pytest.mark.parametrize(("msg_type", "payload", "read"), READ)
def test_unknown_fields_are_ignored(
    msg_type: str, payload: dict[str, Any], read: ClientPayload
) -> None:
    more: dict[str, Any] = {"of_another_version": [{"a": None}], "": 1, "msg_type": "REGISTER"}
    data = frame(msg_type, {**payload, **more}, trace={"id": 7})
    assert decode(data) == ClientFrame(SESSION, read)


@pytest.mark.parametrize("timestamp", [0, -1, 1.5, 1740000000000, 10**20])
def test_any_number_is_a_timestamp(timestamp: float) -> None:
    assert decode(frame("HEALTH_CHECK", {}, timestamp=timestamp)).payload == HealthCheck()


@pytest.mark.parametrize("session_id", [None, "", "sess_of_another"])
def test_the_session_id_is_handed_on_as_it_is(session_id: str | None) -> None:
    assert decode(frame("HEALTH_CHECK", {}, session_id=session_id)).session_id == session_id


def test_no_id_of_an_interrupt_means_all() -> None:
    assert [Interrupt(target).target for target in (UNSET, None, "", "a")] == [
        None,
        None,
        None,
        "a",
    ]


def test_only_the_reasons_of_clients_are_known() -> None:
    for given in ("USER_NEW_INPUT", "USER_STOP", "USER_VOICE_INPUT", "CLIENT_ERROR"):
        assert Interrupt(reason=given).known_reason is InterruptReason(given)
    for odd in ("", None, "user_stop", "CONNECTION_LOST", "SERVER_SHUTDOWN", "OTHER", "x" * 9999):
        assert Interrupt(reason=odd).known_reason is InterruptReason.OTHER


def test_credentials_do_not_show_in_a_repr() -> None:
    shown = repr(Register(ApiKeyAuth("hidden"))) + repr(Register(AccountAuth("hidden", "hidden")))
    assert "hidden" not in shown


# What is refused

IDS = ["a", "req_1740000000000_ab12cd34e", " ", "~" * 64, 'a"\\/b']
NO_IDS = ["", "x" * 65, "é", "a\n", "\n", "a\u007f", "\0", "😀", 7, None, ["a"], {"a": 1}, True]


@pytest.mark.parametrize("request_id", IDS)
def test_an_id_is_1_to_64_printable_ascii_characters(request_id: str) -> None:
    read = decode(frame("REQUEST", text_request(request_id=request_id))).payload
    assert isinstance(read, Request)
    assert read.request_id == request_id
    read = decode(frame("INTERRUPT", {"interrupt_request_id": request_id})).payload
    assert isinstance(read, Interrupt)
    assert read.target == request_id


@pytest.mark.parametrize("request_id", NO_IDS)
def test_any_other_id_is_refused_and_not_repeated(request_id: Any) -> None:
    fault = refused(frame("REQUEST", text_request(request_id=request_id)))
    assert fault.code is ErrorCode.MALFORMED_PAYLOAD
    assert fault.request_id is None
    if request_id not in ("", None, 7):  # of an INTERRUPT, a number is read as its digits
        fault = refused(frame("INTERRUPT", {"interrupt_request_id": request_id}))
        assert fault.code is ErrorCode.MALFORMED_PAYLOAD
        assert fault.request_id is None


@pytest.mark.parametrize(
    "payload",
    [
        {"request_id": "req_1"},
        {"request_id": "req_1", "data_type": "TEXT"},
        text_request(7),
        text_request(None),
        text_request(data_type="text"),
        text_request(content=[]),
    ],
)
def test_a_refused_request_is_refused_under_its_id(payload: dict[str, Any]) -> None:
    fault = refused(frame("REQUEST", payload))
    assert fault.code is ErrorCode.MALFORMED_PAYLOAD
    assert fault.request_id == "req_1"
    assert fault.detail


@pytest.mark.parametrize(
    "data",
    [
        frame("INTERRUPT", {"request_id": "req_1", "interrupt_request_id": True}),
        frame("REGISTER", {"request_id": "req_1"}),
        frame("DANCE", {"request_id": "req_1"}),
        frame("REQUEST", text_request(), version="2.0"),
        frame("REQUEST", text_request(), session_id=7),
        frame("REQUEST", [{"request_id": "req_1"}]),
        frame("REQUEST", {"content": {"request_id": "req_1"}}),
        frame("REQUEST", text_request())[:-1],
        frame("REQUEST", text_request("?")).replace(b'"?"', b'"\xff"'),
        b'{"request_id":"req_1"}',
        b"",
        b"\xff",
        b"[" * 250_000,
        b'{"payload":' * 20_000,
    ],
)
def test_an_id_is_given_for_nothing_but_a_request(data: bytes) -> None:
    fault = refused(data)
    assert fault.code is ErrorCode.MALFORMED_PAYLOAD
    assert fault.request_id is None
    assert fault.detail
    assert len(fault.detail) < 500


@pytest.mark.parametrize("name", ["version", "msg_type", "session_id", "payload", "timestamp"])
def test_a_missing_field_of_the_envelope_is_named(name: str) -> None:
    fields = json.loads(frame("HEALTH_CHECK", {}))
    del fields[name]
    fault = refused(json.dumps(fields).encode())
    assert fault.code is ErrorCode.MALFORMED_PAYLOAD
    assert name in fault.detail


def test_what_a_client_sent_is_not_repeated_at_length() -> None:
    for data in (
        frame("X" * 100_000, {}),
        frame("REQUEST", {}, version="9" * 100_000),
        frame("REQUEST", text_request(data_type="y" * 100_000)),
    ):
        assert len(refused(data).detail) < 500


# Limits


def of_size(size: int, payload: dict[str, Any], padded: dict[str, Any]) -> bytes:
    """A REQUEST of exactly so many bytes, by padding the last string of `padded`."""
    (key,) = [key for key, value in padded.items() if value == "PAD"]
    padded[key] = "A" * (size - len(frame("REQUEST", payload)) + len("PAD"))
    data = frame("REQUEST", payload)
    assert len(data) == size
    return data


def text_of_size(size: int) -> bytes:
    payload = text_request("PAD")
    return of_size(size, payload, payload["content"])


def voice_of_size(size: int, mode: str = "BASE64", data_type: str = "VOICE") -> bytes:
    content = {"voice_mode": mode, "voice": "AAAA"}
    payload = {
        "request_id": "req_1",
        "data_type": data_type,
        "content": content,
        "padding": "PAD",
    }
    return of_size(size, payload, payload)


def test_text_may_have_exactly_256_kib() -> None:
    assert MAX_TEXT_BYTES == 262_144
    assert isinstance(decode(text_of_size(MAX_TEXT_BYTES)).payload, Request)
    fault = refused(text_of_size(MAX_TEXT_BYTES + 1))
    assert fault.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert fault.request_id == "req_1"


def test_voice_in_base64_may_have_exactly_1_mib() -> None:
    assert MAX_VOICE_TEXT_BYTES == 1_048_576
    for size in (MAX_TEXT_BYTES + 1, MAX_VOICE_TEXT_BYTES):
        read = decode(voice_of_size(size)).payload
        assert isinstance(read, Request)
        assert read.data_type == "VOICE"
    fault = refused(voice_of_size(MAX_VOICE_TEXT_BYTES + 1))
    assert fault.code is ErrorCode.PAYLOAD_TOO_LARGE


@pytest.mark.parametrize(
    "data",
    [
        voice_of_size(MAX_TEXT_BYTES + 1, mode="BINARY"),
        voice_of_size(MAX_TEXT_BYTES + 1, data_type="TEXT"),
        frame("REQUEST", text_request(padding="x" * MAX_TEXT_BYTES)),
        frame("REGISTER", {"auth": {"type": "API_KEY", "api_key": "k" * MAX_TEXT_BYTES}}),
        frame("HEALTH_CHECK", {}, padding="x" * MAX_TEXT_BYTES),
    ],
)
def test_only_voice_in_base64_has_the_larger_limit(data: bytes) -> None:
    assert refused(data).code is ErrorCode.PAYLOAD_TOO_LARGE


def test_too_large_is_told_under_the_id_of_a_request_alone() -> None:
    too_large = "x" * MAX_TEXT_BYTES
    assert refused(frame("REQUEST", text_request(too_large))).request_id == "req_1"
    assert refused(frame("REQUEST", text_request(too_large, request_id="é"))).request_id is None
    assert refused(frame("HEALTH_CHECK", {"request_id": "a", "x": too_large})).request_id is None


def test_beyond_the_largest_limit_nothing_is_looked_at() -> None:
    fault = refused(b"\xff" * (MAX_VOICE_TEXT_BYTES + 1))
    assert fault.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert fault.request_id is None


# Server to client

USAGE = Usage(9, 12, 21)
WRITTEN: list[tuple[ServerPayload, str, dict[str, Any]]] = [
    (
        RegisterAck(SESSION, 3600),
        "REGISTER_ACK",
        {
            "session_id": SESSION,
            "session_timeout_seconds": 3600,
            "status": "SUCCESS",
            "message": "registered",
        },
    ),
    (
        Response("a", 0, ResponseContent("hello")),
        "RESPONSE",
        {"request_id": "a", "text_stream_seq": 0, "content": {"text": "hello"}},
    ),
    (
        Response("a", -1, outcome=Outcome.COMPLETED, finish_reason="stop", usage=USAGE),
        "RESPONSE",
        {
            "request_id": "a",
            "text_stream_seq": -1,
            "content": {},
            "outcome": "COMPLETED",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21},
        },
    ),
    (
        Response(
            "a",
            -1,
            voice_stream_seq=-1,
            interrupted=True,
            interrupt_reason="USER_STOP",
            outcome=Outcome.INTERRUPTED,
            finish_reason=None,
            usage=None,
        ),
        "RESPONSE",
        {
            "request_id": "a",
            "text_stream_seq": -1,
            "content": {},
            "voice_stream_seq": -1,
            "interrupted": True,
            "interrupt_reason": "USER_STOP",
            "outcome": "INTERRUPTED",
            "finish_reason": None,
            "usage": None,
        },
    ),
    (
        InterruptAck(
            ["a"],
            AckStatus.SUCCESS,
            "a: stopped",
            [InterruptResult("a", InterruptOutcome.STOPPED, 5, 0.5)],
            None,
        ),
        "INTERRUPT_ACK",
        {
            "interrupted_request_ids": ["a"],
            "status": "SUCCESS",
            "message": "a: stopped",
            "results": [
                {
                    "request_id": "a",
                    "outcome": "STOPPED",
                    "delivered_text_chars": 5,
                    "stream_closed_ms": 0.5,
                }
            ],
            "interrupt_request_id": None,
        },
    ),
    (
        InterruptAck([], AckStatus.FAILED, "nothing", []),
        "INTERRUPT_ACK",
        {"interrupted_request_ids": [], "status": "FAILED", "message": "nothing", "results": []},
    ),
    (
        HealthCheckAck(HealthStatus("UP", 3, 1.5)),
        "HEALTH_CHECK_ACK",
        {"health_status": {"status": "UP", "conn_count": 3, "cpu_usage": 1.5}},
    ),
    (Shutdown("SERVER_SHUTDOWN"), "SHUTDOWN", {"reason": "SERVER_SHUTDOWN"}),
    (
        error(ErrorCode.SERVER_BUSY, "full", request_id="a", outcome=Outcome.FAILED, usage=None),
        "ERROR",
        {
            "error_code": "SERVER_BUSY",
            "error_msg": "server busy",
            "error_detail": "full",
            "retryable": True,
            "request_id": "a",
            "outcome": "FAILED",
            "usage": None,
        },
    ),
]


@pytest.mark.parametrize(("payload", "msg_type", "written"), WRITTEN)
def test_each_payload_is_written_in_its_envelope(
    payload: ServerPayload, msg_type: str, written: dict[str, Any]
) -> None:
    assert json.loads(encode(payload, SESSION, 1740000000000)) == {
        "version": VERSION,
        "msg_type": msg_type,
        "session_id": SESSION,
        "payload": written,
        "timestamp": 1740000000000,
    }
    assert json.loads(encode(payload, None, 0))["session_id"] is None


def test_what_both_sides_say_reads_back_as_it_was_written() -> None:
    said = Shutdown("until tomorrow")
    assert decode(encode(said, SESSION, 1)) == ClientFrame(SESSION, said)


RETRYABLE = {
    ErrorCode.AUTH_FAILED: True,
    ErrorCode.SESSION_INVALID: False,
    ErrorCode.STREAM_SEQ_ERROR: True,
    ErrorCode.PAYLOAD_TOO_LARGE: False,
    ErrorCode.SERVER_BUSY: True,
    ErrorCode.MALFORMED_PAYLOAD: False,
    ErrorCode.INTERNAL_ERROR: True,
    ErrorCode.REQUEST_TIMEOUT: True,
}


@pytest.mark.parametrize("code", ErrorCode)
def test_an_error_says_whether_trying_again_may_help(code: ErrorCode) -> None:
    made = error(code, "why")
    assert isinstance(made, Error)
    assert made.retryable is RETRYABLE[code]
    assert made.error_detail == "why"
    assert made.error_msg
    written = json.loads(encode(made, None, 0))["payload"]
    assert written.keys() == {"error_code", "error_msg", "error_detail", "retryable"}


AWKWARD = [
    "",
    "hello",
    '"quoted" \\ / \\" \\u0041',
    "\b\f\n\r\t",
    "".join(map(chr, range(0x20))) + "\x7f",
    "你好，世界",
    "😀👩‍👩‍👧‍👦 é e\u0301",
    "\u2028\u2029\ufeff\ufffe\uffff\U0010ffff",
    '},"timestamp":0}',
    "%s %d %% {0} {}",
    "x" * 100_000,
]


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("request_id", ["req_1", 'a"\\%b %d{}', "~" * 64])
def test_the_fast_encoder_writes_what_the_other_one_does(text: str, request_id: str) -> None:
    encoder = AnswerEncoder(SESSION, request_id)
    for seq, timestamp in enumerate((0, 1740000000000, -1)):
        data = encoder.encode_text(text, timestamp)
        response = Response(request_id, seq, ResponseContent(text))
        assert data == encode(response, SESSION, timestamp)
        read = json.loads(data)
        assert read["payload"]["content"]["text"] == text
        assert read["payload"]["request_id"] == request_id
        assert msgspec.json.decode(data) == read


def test_a_text_cut_inside_of_an_emoji_is_refused_under_its_own_id() -> None:
    whole = frame("REQUEST", text_request(text="half an emoji: ?"))
    fault = refused(whole.replace(b"?", rb"\ud83d"))
    assert fault.code is ErrorCode.MALFORMED_PAYLOAD
    assert fault.request_id == "req_1"


@pytest.mark.parametrize(
    "payload",
    [
        {"call_id": "", "result": 1, "request_id": "req_1"},
        {"call_id": "c", "request_id": "req_1"},
        {"call_id": "c", "result": "x" * MAX_TEXT_BYTES, "request_id": "req_1"},
    ],
)
def test_a_refused_function_result_keeps_the_id_of_the_request_it_would_have_begun(
    payload: dict[str, Any],
) -> None:
    fault = refused(frame("FUNCTION_RESULT", payload))
    assert fault.request_id == "req_1"
    assert not fault.is_voice
