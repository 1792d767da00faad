"""Whatever says stop, stops: an INTERRUPT acts if its kind and its target can be read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.words import ErrorCode, InterruptReason
from gateway.app import Gateway
from gateway.wire.decode import FrameError, decode
from gateway.wire.frames import MAX_TEXT_BYTES, MAX_VOICE_TEXT_BYTES, Interrupt
from gateway.wire.loose_interrupt import find_interrupt
from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.provider_process import ProviderProcess

DEEP = "[" * 100_000 + "]" * 100_000
DEEP_PAIRS = '{"a":[' * 2_000 + "]}" * 2_000


def whole(**envelope: Any) -> str:
    """An INTERRUPT of req_1, with these fields of its envelope replaced."""
    payload = {"interrupt_request_id": "req_1", "reason": "USER_STOP"}
    frame = {
        "version": "1.0",
        "msg_type": "INTERRUPT",
        "session_id": "sess_0123456789abcdef",
        "payload": payload,
        "timestamp": 1,
    }
    return json.dumps(frame | envelope)


def of(more: str) -> str:
    """An INTERRUPT of req_1 with more fields in its payload, written as JSON."""
    return f'{{"msg_type": "INTERRUPT", "payload": {{"interrupt_request_id": "req_1", {more}}}}}'


ODD = {
    # The envelope.
    "version_2": whole(version="2.0"),
    "version_number": whole(version=1.0),
    "version_null": whole(version=None),
    "session_of_another": whole(session_id="sess_ffffffffffffffff"),
    "session_number": whole(session_id=7),
    "session_list": whole(session_id=["x"]),
    "session_huge": whole(session_id="s" * MAX_TEXT_BYTES),
    "timestamp_text": whole(timestamp="now"),
    "timestamp_null": whole(timestamp=None),
    "timestamp_nan": whole(timestamp=float("nan")),
    "timestamp_infinite": whole(timestamp=float("-inf")),
    "timestamp_object": whole(timestamp={"ms": 1}),
    "only_kind_and_target": '{"msg_type":"INTERRUPT","payload":{"interrupt_request_id":"req_1"}}',
    "kind_lower_case": whole(msg_type="interrupt"),
    "kind_with_spaces": whole(msg_type=" Interrupt\t"),
    "kind_doubled": whole(version=None).replace('"msg_type"', '"msg_type": "REQUEST", "msg_type"'),
    "payload_doubled": whole(version=None).replace('"payload"', '"payload": null, "payload"'),
    "payload_first": '{"payload":{"interrupt_request_id":"req_1"},"msg_type":"INTERRUPT"}',
    "envelope_deep": whole(extra=0).replace('"extra": 0', f'"extra": {DEEP}'),
    "envelope_deep_pairs": whole(extra=0).replace('"extra": 0', f'"extra": {DEEP_PAIRS}'),
    "white_space": " \r\n\t" + whole(version=None).replace(":", " : \n") + "\n",
    "more_than_voice_may_have": whole(extra="x" * MAX_VOICE_TEXT_BYTES),
    # The figures.
    "chars_fraction": of('"delivered_text_chars": 12.5'),
    "chars_negative": of('"delivered_text_chars": -1'),
    "chars_text": of('"delivered_text_chars": "12"'),
    "chars_word": of('"delivered_text_chars": "many"'),
    "chars_true": of('"delivered_text_chars": true'),
    "chars_list": of('"delivered_text_chars": [12]'),
    "chars_object": of('"delivered_text_chars": {"delivered_text_chars": 1}'),
    "chars_exponent": of('"delivered_text_chars": 1e300'),
    "chars_over_any_float": of('"delivered_text_chars": 1e999'),
    "chars_5000_digits": of(f'"delivered_text_chars": {"9" * 5000}'),
    "chars_nan": of('"delivered_text_chars": NaN'),
    "chars_infinite": of('"delivered_text_chars": -Infinity'),
    "chars_undefined": of('"delivered_text_chars": undefined'),
    "chars_doubled": of('"delivered_text_chars": 1, "delivered_text_chars": "x"'),
    # The reason.
    "reason_number": of('"reason": 7'),
    "reason_list": of('"reason": ["USER_STOP"]'),
    "reason_object": of('"reason": {"interrupt_request_id": "req_2", "msg_type": "REQUEST"}'),
    "reason_false": of('"reason": false'),
    "reason_huge": of(f'"reason": "{"x" * MAX_TEXT_BYTES}"'),
    "reason_half_an_emoji": of('"reason": "\\ud83d"'),
    "reason_deep": of(f'"reason": {DEEP}'),
    "reason_with_a_line_end": of('"reason": "a\nb"'),
    "reason_bad_escape": of('"reason": "\\x41"'),
    # The target.
    "target_twice": of('"interrupt_request_id": "req_0", "interrupt_request_id": "req_1"'),
    "key_escaped": '{"msg_type":"INTERRUPT","payload":{"interrupt_request\\u005fid":"req_1"}}',
    "target_behind_nan": '{"msg_type": "INTERRUPT", "payload": {"reason": NaN, '
    '"interrupt_request_id": "req_1"}}',
    # Not JSON.
    "target_then_an_object": of('"interrupt_request_id": {}'),
    "kind_then_a_number": of('"reason": null').replace("payload", 'msg_type": 5, "payload'),
    "payload_then_a_number": of('"reason": null')[:-1] + ', "payload": 5}',
    "kind_escaped_and_version_wrong": whole(version="9").replace("INTERRUPT", r"\u0049NTERRUPT"),
    "breaks_off": '{"msg_type":"INTERRUPT","payload":{"interrupt_request_id":"req_1","reas',
    "breaks_off_in_the_reason": whole(version=None).partition('USER_STOP"')[0],
    "comma_too_many": of('"reason": "USER_STOP",'),
    "one_more_bracket": whole() + "}",
    "two_frames": whole() + whole(),
    "comment": of('"reason": null /* the user */'),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_interrupt_is_read(name: str) -> None:
    payload = decode(ODD[name].encode()).payload
    assert isinstance(payload, Interrupt)
    assert payload.target == "req_1"
    chars = payload.delivered_text_chars
    assert chars is None or chars >= 0


def test_each_odd_interrupt_stops_its_answer_and_is_acknowledged(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    story = provider.fresh(scripts.idle_mid_stream(["once", " upon"]))
    assert len(ODD) >= 50
    with Client(gateway.server.port) as client:
        for number, (name, frame) in enumerate(ODD.items()):
            request_id = f"req_1_{number}"
            client.wait_text(client.request(story, request_id))
            client.send_text(frame.replace("req_1", request_id).encode())
            ack = client.wait_ack()
            assert ack.payload["status"] == "SUCCESS", name
            assert ack.payload["interrupt_request_id"] == request_id, name
            assert client.wait_terminal(request_id).payload["interrupted"] is True
    assert not [frame for frame in client.frames if frame.msg_type == "ERROR"]


def test_an_interrupt_may_come_as_a_binary_frame(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    story = provider.fresh(scripts.idle_mid_stream(["once", " upon"]))
    with Client(gateway.server.port) as client:
        client.wait_text(client.request(story, "req_1"))
        client.send_binary(whole().encode())
        assert client.wait_ack().payload["status"] == "SUCCESS"
        assert client.wait_terminal("req_1").payload["interrupted"] is True


def test_bytes_that_are_not_utf_8_do_not_hold_it_up() -> None:
    data = of('"reason": "?"').encode().replace(b"?", b"\xff\xfe")
    assert decode(data).payload == Interrupt("req_1", "��")


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("12", "12"),
        ("-7", "-7"),
        ("1740000000000", "1740000000000"),
        ("12.50", "12.50"),
        ("1e3", "1e3"),
        ("null", None),
        ('""', None),
        (r'"\u0072eq_1"', "req_1"),
    ],
)
def test_a_number_as_target_is_read_as_its_digits(written: str, target: str | None) -> None:
    data = f'{{"msg_type": "INTERRUPT", "payload": {{"interrupt_request_id": {written}}}}}'
    payload = decode(data.encode()).payload
    assert isinstance(payload, Interrupt)
    assert payload.target == target


@pytest.mark.parametrize(
    "data", ['{"msg_type": "INTERRUPT"}', whole(payload=None), whole(payload={}, version=7)]
)
def test_without_a_target_it_stops_every_request(data: str) -> None:
    payload = decode(data.encode()).payload
    assert isinstance(payload, Interrupt)
    assert payload.target is None


NO_TARGETS = [
    "true",
    "[]",
    '["req_1"]',
    '{"id": "req_1"}',
    f'"{"x" * 65}"',
    "1" * 65,
    '"é"',
    r'"\ud83d"',
    r'"a\u0000"',
    "NaN",
    "req_1",
    "01x",
]


@pytest.mark.parametrize("target", NO_TARGETS)
def test_any_other_target_is_malformed(target: str) -> None:
    data = f'{{"msg_type": "INTERRUPT", "payload": {{"interrupt_request_id": {target}}}}}'
    with pytest.raises(FrameError) as caught:
        decode(data.encode())
    assert caught.value.code is ErrorCode.MALFORMED_PAYLOAD
    assert "interrupt_request_id" in caught.value.detail


@pytest.mark.parametrize("payload", ['"req_1"', "[]", "7", "true"])
def test_a_payload_that_is_no_object_names_no_target(payload: str) -> None:
    with pytest.raises(FrameError, match="payload"):
        decode(f'{{"msg_type": "INTERRUPT", "payload": {payload}}}'.encode())


@pytest.mark.parametrize("end", ['{"msg_type":"INTERRUPT"', '{"msg_type":"INTERRUPT","payload":{'])
def test_where_the_target_may_have_been_cut_off_nothing_is_stopped(end: str) -> None:
    with pytest.raises(FrameError, match="breaks off"):
        decode(end.encode())


@pytest.mark.parametrize(
    "data",
    [
        "",
        "interrupt",
        '"INTERRUPT"',
        "[" + whole() + "]",
        whole(msg_type="INTERRUPTED"),
        whole(msg_type=["INTERRUPT"]),
        whole(msg_type="REQUEST", version=7),
        '{"payload": {"msg_type": "INTERRUPT", "interrupt_request_id": "req_1"}, oops',
        '{"msg_type": {"msg_type": "INTERRUPT"}, oops',
        '{"msg_type": "REQUEST", "payload": {"content": {"text": "\\"msg_type\\":\\"INTERRUPT\\"',
    ],
)
def test_a_frame_of_another_kind_stops_nothing(data: str) -> None:
    assert find_interrupt(data.encode()) is None


def test_the_figures_are_rounded_down_and_bounded() -> None:
    def chars(written: str) -> int | None:
        payload = decode(of(f'"delivered_text_chars": {written}').encode()).payload
        assert isinstance(payload, Interrupt)
        return payload.delivered_text_chars

    assert [chars(one) for one in ("12.99", "-0.5", "-7", "1e999", '"3.7"', "0", "null", "{}")] == [
        12,
        0,
        0,
        2**53,
        3,
        0,
        None,
        None,
    ]


def test_the_reason_is_kept_where_another_field_is_odd() -> None:
    payload = decode(
        of('"reason": "USER_VOICE_INPUT", "delivered_text_chars": -3').encode()
    ).payload
    assert isinstance(payload, Interrupt)
    assert payload.known_reason is InterruptReason.USER_VOICE_INPUT
    payload = decode(of('"reason": ["USER_VOICE_INPUT"]').encode()).payload
    assert isinstance(payload, Interrupt)
    assert payload.known_reason is InterruptReason.OTHER


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["version", "session_id", "timestamp", "trace"]), values),
    st.dictionaries(st.sampled_from(["reason", "delivered_text_chars", "more"]), values),
    st.from_regex(r"[ -~]{1,64}", fullmatch=True),
    st.integers(min_value=0),
)
def test_no_value_of_another_field_matters(
    envelope: dict[str, Any], payload: dict[str, Any], target: str, cut: int
) -> None:
    payload = {"interrupt_request_id": target} | payload
    data = json.dumps({"msg_type": "INTERRUPT", "payload": payload} | envelope)
    read = decode(data.encode()).payload
    assert isinstance(read, Interrupt)
    assert read.target == target
    # Cut anywhere, it stops this request or is refused, and never stops another one.
    try:
        read = decode(data[: cut % (len(data) + 1)].encode()).payload
    except FrameError:
        return
    assert isinstance(read, Interrupt)
    assert read.target == target


@given(st.binary())
def test_garbage_is_refused_and_raises_nothing_else(noise: bytes) -> None:
    for data in (noise, b'{"msg_type":"INTERRUPT",' + noise, b"interrupt" + noise):
        try:
            decode(data)
        except FrameError as fault:
            assert fault.code is ErrorCode.MALFORMED_PAYLOAD
