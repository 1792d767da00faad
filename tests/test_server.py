"""The server over real sockets: bad frames, plain HTTP, who may connect, and dead connections."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import gevent
import pytest

import gateway.server.server
from actors.loop.lanes import lanes
from gateway.app import Gateway, bargein_version
from gateway.server.outbox import OutboxSettings
from gateway.server.server import ServerSettings
from gateway.settings.settings import Settings
from gateway.wire.frames import PATH
from llm.provider import Provider
from tests.harness import scripts
from tests.harness.client import Client, HandshakeRefused, Received, wait_until
from tests.harness.provider_process import ProviderProcess

MakeGateway: TypeAlias = Callable[..., Gateway]


def assert_it_lives_on(client: Client, provider: ProviderProcess) -> None:
    """The connection still gives a whole answer, and nothing else."""
    number = len(client.frames)
    request_id = client.request(provider.fresh(scripts.answer(["alive ", "and well"])))
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    assert client.text_of(request_id) == "alive and well"
    assert client.frames[number:] == client.frames_of(request_id)


def wait_error(client: Client) -> dict[str, Any]:
    return client.wait_for(lambda frame: frame.msg_type == "ERROR").payload


def envelope(**fields: Any) -> dict[str, Any]:
    frame: dict[str, Any] = {
        "version": "1.0",
        "msg_type": "HEALTH_CHECK",
        "session_id": None,
        "payload": {},
        "timestamp": 1740000000000,
    }
    return {**frame, **fields}


def without(name: str) -> dict[str, Any]:
    frame = envelope()
    del frame[name]
    return frame


# Bad frames

WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    "version": (1.0, None),
    "msg_type": (7, None, ["REQUEST"]),
    "session_id": (7, {}),
    "payload": ("text", [], None, 7),
    "timestamp": ("now", None, {}),
}
NOT_UNDERSTOOD: dict[str, bytes] = {
    "nothing": b"",
    "not_json": b"hello",
    "half_json": b'{"version":"1.0"',
    "more_after_the_end": json.dumps(envelope()).encode() + b"{}",
    "array": b"[]",
    "string": b'"HEALTH_CHECK"',
    "null": b"null",
    "nested_too_deeply": b"[" * 200_000,
    "nested_too_deeply_inside": b'{"payload":' * 20_000,
    "nested_too_deeply_and_well_formed": json.dumps(envelope()).encode()[:-1]
    + b',"more":'
    + b"[" * 50_000
    + b"]" * 50_000
    + b"}",
    "not_utf8": b"\xff\xfe",
    "not_utf8_in_a_field": json.dumps(envelope(x="?")).encode().replace(b'"?"', b'"\xff"'),
    "half_a_surrogate_pair": json.dumps(envelope(x="\ud83d")).encode(),
    "nul": b"\0",
    **{f"no_{name}": json.dumps(without(name)).encode() for name in envelope()},
    **{
        f"{name}_is_{type(value).__name__}": json.dumps(envelope(**{name: value})).encode()
        for name, values in WRONG_TYPES.items()
        for value in values
    },
    "version_is_another": json.dumps(envelope(version="2.0")).encode(),
    "version_is_longer": json.dumps(envelope(version="1.00")).encode(),
    "msg_type_is_unknown": json.dumps(envelope(msg_type="DANCE")).encode(),
    "msg_type_is_a_servers": json.dumps(envelope(msg_type="REGISTER_ACK")).encode(),
    "msg_type_in_lower_case": json.dumps(envelope(msg_type="health_check")).encode(),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_a_frame_that_is_not_understood_gets_an_error_and_the_connection_lives_on(
    client: Client, provider: ProviderProcess, name: str
) -> None:
    client.send_text(NOT_UNDERSTOOD[name])
    error = wait_error(client)
    assert error["error_code"] == "MALFORMED_PAYLOAD"
    assert error["retryable"] is False
    assert error["error_msg"]
    assert error["error_detail"]
    assert "request_id" not in error
    assert_it_lives_on(client, provider)


def test_a_frame_that_is_not_understood_does_not_disturb_the_answer(
    client: Client, provider: ProviderProcess
) -> None:
    key = provider.unique("end")
    request_id = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(request_id)
    for data in NOT_UNDERSTOOD.values():
        client.send_text(data)
        assert "request_id" not in wait_error(client)
    client.send_binary(b"\0" * 1000)
    assert "request_id" not in wait_error(client)
    provider.release(key)
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    assert client.text_of(request_id) == "on and on"


TEXT = {"data_type": "TEXT", "content": {"text": "hello"}}


@pytest.mark.parametrize(
    ("msg_type", "payload"),
    [
        ("REQUEST", {}),
        ("REQUEST", {**TEXT}),
        ("REQUEST", {**TEXT, "request_id": None}),
        ("REQUEST", {**TEXT, "request_id": 7}),
        ("REQUEST", {**TEXT, "request_id": ""}),
        ("REQUEST", {**TEXT, "request_id": "x" * 65}),
        ("REQUEST", {**TEXT, "request_id": "é"}),
        ("REQUEST", {**TEXT, "request_id": "a\n"}),
        ("REQUEST", {**TEXT, "request_id": "a\u007f"}),
        ("INTERRUPT", {"interrupt_request_id": True}),
        ("INTERRUPT", {"interrupt_request_id": ["a"]}),
        ("INTERRUPT", {"interrupt_request_id": {"id": "a"}}),
        ("SHUTDOWN", {"reason": 7}),
    ],
)
def test_a_payload_of_the_wrong_shape_gets_an_error_and_the_connection_lives_on(
    client: Client, provider: ProviderProcess, msg_type: str, payload: dict[str, Any]
) -> None:
    client.send(msg_type, payload)
    error = wait_error(client)
    assert error["error_code"] == "MALFORMED_PAYLOAD"
    assert "request_id" not in error
    assert_it_lives_on(client, provider)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"data_type": "TEXT"},
        {"data_type": "TEXT", "content": None},
        {"data_type": "TEXT", "content": {}},
        {"data_type": "TEXT", "content": {"text": None}},
        {"data_type": "TEXT", "content": {"text": 7}},
        {"data_type": "SMELL", "content": {"text": "hello"}},
        {"data_type": "VOICE", "content": {"voice_mode": "SEMAPHORE"}},
    ],
)
def test_a_request_that_is_not_understood_gets_its_error_under_its_id(
    client: Client, provider: ProviderProcess, fields: dict[str, Any]
) -> None:
    client.send("REQUEST", {"request_id": "req_bad", **fields})
    error = wait_error(client)
    assert error["error_code"] == "MALFORMED_PAYLOAD"
    assert error["request_id"] == "req_bad"
    assert_it_lives_on(client, provider)


def test_a_request_that_is_not_understood_never_ends_a_live_one_of_its_id(
    client: Client, provider: ProviderProcess
) -> None:
    key = provider.unique("end")
    request_id = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(request_id)
    client.send("REQUEST", {"request_id": request_id})
    assert "request_id" not in wait_error(client)
    provider.release(key)
    assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"


def test_an_id_is_used_once(client: Client, provider: ProviderProcess) -> None:
    key = provider.unique("end")
    script = provider.fresh(scripts.finish_on_release(["on ", "and on"], key))
    request_id = client.request(script)
    client.wait_text(request_id)
    for stage in ("live", "finished"):
        client.request("again", request_id)
        error = wait_error(client)
        assert error["error_code"] == "MALFORMED_PAYLOAD"
        assert request_id in error["error_detail"]
        assert "request_id" not in error
        if stage == "live":
            provider.release(key)
            assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
    assert client.text_of(request_id) == "on and on"
    assert_it_lives_on(client, provider)


@pytest.mark.parametrize("kilobytes", [257, 300, 1024])
def test_a_text_frame_over_256_kib_is_too_large_and_the_connection_lives_on(
    client: Client, provider: ProviderProcess, kilobytes: int
) -> None:
    client.request("x" * (kilobytes * 1024 - 300), "req_large")
    error = wait_error(client)
    assert error["error_code"] == "PAYLOAD_TOO_LARGE"
    assert error["request_id"] == "req_large"
    assert error["retryable"] is False
    client.send_text(b" " * (kilobytes * 1024))
    assert wait_error(client)["error_code"] in ("MALFORMED_PAYLOAD", "PAYLOAD_TOO_LARGE")
    assert_it_lives_on(client, provider)


def test_a_text_frame_over_1_mib_is_too_large_even_with_voice(
    client: Client, provider: ProviderProcess
) -> None:
    content = {"voice_mode": "BASE64", "audio_format": "pcm"}
    for size, code in ((1_000_000, "INTERNAL_ERROR"), (1_100_000, "PAYLOAD_TOO_LARGE")):
        client.send(
            "REQUEST",
            {
                "request_id": f"req_{size}",
                "data_type": "VOICE",
                "content": {**content, "voice": "A" * size},
            },
        )
        assert wait_error(client)["error_code"] == code  # small enough: there is no ear yet
    assert_it_lives_on(client, provider)


@pytest.mark.parametrize("kind", ["text", "binary", "fragments"])
def test_a_frame_over_1_5_mib_closes_the_connection_with_1009(
    gateway: Gateway, client: Client, kind: str
) -> None:
    data = b" " * (2 * 1024 * 1024)
    match kind:
        case "text":
            client.send_text(data)
        case "binary":
            client.send_binary(data)
        case _:
            client.send_fragments([data[at : at + 65536] for at in range(0, len(data), 65536)])
    assert client.wait_closed() == 1009
    client.drop()
    wait_until(lambda: gateway.server.connections == 0, "the connection is gone")


def test_a_binary_frame_that_nobody_asked_for_gets_an_error_and_the_connection_lives_on(
    client: Client, provider: ProviderProcess
) -> None:
    for data in (b"", b"\0" * 3200, json.dumps(envelope()).encode()):
        client.send_binary(data)
        error = wait_error(client)
        assert error["error_code"] == "MALFORMED_PAYLOAD"
        assert "request_id" not in error
    assert_it_lives_on(client, provider)


def test_a_message_in_fragments_is_one_message(client: Client, provider: ProviderProcess) -> None:
    data = json.dumps(envelope()).encode()
    for size in (1, 7, len(data)):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        client.send_fragments([b"", *pieces, b""])
        assert client.next().msg_type == "HEALTH_CHECK_ACK"
    broken = "é".encode()
    client.send_fragments([b'{"a":"' + broken[:1], broken[1:] + b'"}'])
    assert "UTF-8" not in wait_error(client)["error_detail"]  # cut in a character: well-formed
    assert_it_lives_on(client, provider)


def test_many_frames_in_one_packet_are_answered_in_order(
    client: Client, provider: ProviderProcess
) -> None:
    with client.one_packet():
        for number in range(200):
            client.interrupt(f"req_nobody_{number}")
    acks = [client.wait_ack().payload["interrupt_request_id"] for _ in range(200)]
    assert acks == [f"req_nobody_{number}" for number in range(200)]
    assert_it_lives_on(client, provider)


def test_a_frame_that_breaks_websocket_closes_the_connection_with_1002(client: Client) -> None:
    client.send_raw(b"\x83\x80\0\0\0\0")  # opcode 3 is reserved
    assert client.wait_closed() == 1002


def test_a_client_must_mask_its_frames(client: Client) -> None:
    client.send_raw(b"\x81\x02{}")
    assert client.wait_closed() == 1002


# Registration


@pytest.mark.parametrize(
    ("msg_type", "payload"),
    [
        ("REQUEST", {**TEXT, "request_id": "req_early"}),
        ("INTERRUPT", {"interrupt_request_id": None, "reason": "USER_STOP"}),
        ("HEARTBEAT_REPLY", {"client_status": "ok"}),
        ("SHUTDOWN", {"reason": "bye"}),
    ],
)
def test_before_registration_there_is_no_session(
    gateway: Gateway, provider: ProviderProcess, msg_type: str, payload: dict[str, Any]
) -> None:
    with Client(gateway.server.port, register=False) as client:
        posts = provider.counts().posts
        client.send(msg_type, payload)
        error = wait_error(client)
        assert error["error_code"] == "SESSION_INVALID"
        assert error["retryable"] is False
        client.register()
        assert_it_lives_on(client, provider)
        assert provider.counts().posts == posts + 1


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"auth": None},
        {"auth": {}},
        {"auth": {"type": "API_KEY"}},
        {"auth": {"type": "API_KEY", "api_key": 7}},
        {"auth": {"type": "ACCOUNT", "account": "me"}},
        {"auth": {"type": "SECRET_HANDSHAKE"}},
        {"auth": {"type": "API_KEY", "api_key": "k"}, "require_tts": "yes"},
    ],
)
def test_a_registration_that_is_not_understood_can_be_tried_again(
    gateway: Gateway, provider: ProviderProcess, payload: dict[str, Any]
) -> None:
    with Client(gateway.server.port, register=False) as client:
        client.send("REGISTER", payload)
        assert wait_error(client)["error_code"] == "MALFORMED_PAYLOAD"
        client.register()
        assert_it_lives_on(client, provider)


def test_a_registration_is_acknowledged_with_a_session(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with (
        Client(gateway.server.port, register=False) as client,
        Client(gateway.server.port, register=False) as old,
    ):
        ack = client.register()
        assert ack.payload["status"] == "SUCCESS"
        assert ack.payload["message"]
        assert ack.payload["session_timeout_seconds"] > 0
        session_id = ack.payload["session_id"]
        assert session_id.startswith("sess_")
        assert len(bytes.fromhex(session_id.removeprefix("sess_"))) == 8
        assert ack.session_id == session_id
        old.register(
            auth={"type": "ACCOUNT", "account": "me", "password": "secret"},
            client_type="TV",
            of_another_version={"a": [1]},
        )
        assert old.session_id != session_id
        assert_it_lives_on(client, provider)
        assert_it_lives_on(old, provider)


def test_a_second_registration_is_refused_and_the_session_goes_on(
    client: Client, provider: ProviderProcess
) -> None:
    session_id = client.session_id
    client.send("REGISTER", {"auth": {"type": "API_KEY", "api_key": "test"}})
    assert wait_error(client)["error_code"] == "MALFORMED_PAYLOAD"
    assert client.session_id == session_id
    assert_it_lives_on(client, provider)


@pytest.mark.parametrize("session_id", ["sess_0123456789abcdef", "", None])
def test_a_wrong_session_id_is_refused_and_does_nothing(
    client: Client, provider: ProviderProcess, session_id: str | None
) -> None:
    key = provider.unique("end")
    live = client.request(provider.fresh(scripts.finish_on_release(["on ", "and on"], key)))
    client.wait_text(live)
    for msg_type, payload in (
        ("FUNCTION_RESULT", {"call_id": "call_1", "result": 1}),
        ("REQUEST", {**TEXT, "request_id": "req_wrong"}),
        ("SHUTDOWN", {}),
    ):
        client.send(msg_type, payload, session_id=session_id)
        error = wait_error(client)
        assert error["error_code"] == "SESSION_INVALID"
        assert error["retryable"] is False
    provider.release(key)
    assert client.wait_terminal(live).payload["outcome"] == "COMPLETED"
    assert_it_lives_on(client, provider)


@pytest.mark.parametrize("session_id", ["sess_0123456789abcdef", "", None, 7])
def test_an_interrupt_with_a_wrong_session_id_stops_its_target(
    client: Client, provider: ProviderProcess, session_id: object
) -> None:
    live = client.request(provider.fresh(scripts.idle_mid_stream(["on ", "and on"])))
    client.wait_text(live)
    client.send("INTERRUPT", {"interrupt_request_id": live}, session_id=session_id)
    assert client.wait_ack().payload["status"] == "SUCCESS"
    assert_it_lives_on_after(client, provider, live)


def test_the_session_id_of_another_session_is_refused(gateway: Gateway) -> None:
    with Client(gateway.server.port) as client, Client(gateway.server.port) as other:
        client.send("SHUTDOWN", {}, session_id=other.session_id)
        assert wait_error(client)["error_code"] == "SESSION_INVALID"
        other.send("HEALTH_CHECK", {})
        assert other.next().msg_type == "HEALTH_CHECK_ACK"


# Health checks, replies to heartbeats, and goodbyes


def test_a_health_check_is_answered_before_and_after_registration(gateway: Gateway) -> None:
    with Client(gateway.server.port, register=False) as client:
        for session_id in (None, None):
            client.send("HEALTH_CHECK", {}, session_id=session_id)
            health = client.next()
            assert health.msg_type == "HEALTH_CHECK_ACK"
            status = health.payload["health_status"]
            assert status["conn_count"] == 1
            assert isinstance(status["status"], str)
            assert status["cpu_usage"] >= 0
            if client.session_id is None:
                assert health.session_id is None
                client.register()
        client.send("HEALTH_CHECK", {})
        assert client.next().session_id == client.session_id


def test_a_heartbeat_reply_is_never_answered(client: Client, provider: ProviderProcess) -> None:
    for _ in range(3):
        client.send("HEARTBEAT_REPLY", {"client_status": "ok"})
    assert_it_lives_on(client, provider)


def test_a_shutdown_is_answered_and_the_connection_closed_with_1000(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port) as client:
        script = provider.fresh(scripts.idle_mid_stream(["once"]))
        request_id = client.request(script)
        client.wait_text(request_id)
        client.send("SHUTDOWN", {"reason": "USER_LEFT"})
        assert client.wait_closed() == 1000
        assert client.wire_error is None
        terminal, last = client.frames[-2:]
        assert terminal.is_terminal
        assert terminal.payload["request_id"] == request_id
        assert terminal.payload["interrupt_reason"] == "CLIENT_SHUTDOWN"
        assert last.msg_type == "SHUTDOWN"
        provider.wait_closed(provider.wait_post(script=script).conn)
    wait_until(lambda: gateway.server.connections == 0, "the connection is gone")


def test_frames_after_a_shutdown_do_nothing(client: Client, provider: ProviderProcess) -> None:
    posts = provider.counts().posts
    with client.one_packet():
        client.send("SHUTDOWN", {})
        client.request("too late")
        client.interrupt(None)
        client.send("SHUTDOWN", {})
    assert client.wait_closed() == 1000
    assert [frame.msg_type for frame in client.frames] == ["REGISTER_ACK", "SHUTDOWN"]
    assert provider.counts().posts == posts


def test_when_the_gateway_stops_its_clients_are_told(provider: ProviderProcess) -> None:
    llm = Provider(base_url=provider.base_url, model="test")
    gateway = Gateway(Settings(provider=llm, server=ServerSettings(port=0)))
    gateway.start()
    with Client(gateway.server.port) as client:
        script = provider.fresh(scripts.idle_mid_stream(["once"]))
        request_id = client.request(script)
        client.wait_text(request_id)
        stopping = gevent.spawn(gateway.stop)
        assert client.wait_closed() == 1012
        (terminal,) = [frame for frame in client.frames_of(request_id) if frame.is_terminal]
        assert terminal.payload["interrupt_reason"] == "SERVER_SHUTDOWN"
        assert client.frames[-1].msg_type == "SHUTDOWN"
        provider.wait_closed(provider.wait_post(script=script).conn)
        client.drop()
        stopping.join()


# Plain HTTP


def ask(port: int, request: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One HTTP request; returns status, headers (names in lower case) and body."""
    headers = {"Host": f"127.0.0.1:{port}", **headers}
    lines = [f"{request} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ask_raw(port, "\r\n".join([*lines, "", ""]).encode())


def ask_raw(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(data)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    if not answer:
        return 0, {}, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    fields = (line.split(": ", 1) for line in lines)
    return int(status_line.split(" ")[1]), {name.lower(): value for name, value in fields}, body


def test_health_is_json_with_status_version_and_what_is_live(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    port = gateway.server.port

    def health() -> dict[str, Any]:
        status, headers, body = ask(port, "GET /health")
        assert status == 200
        assert headers["content-type"] == "application/json"
        assert int(headers["content-length"]) == len(body)
        found: dict[str, Any] = json.loads(body)
        return found

    first = health()
    assert first["status"] == "ok"
    assert first["version"] == bargein_version()
    assert (first["sessions"], first["requests"]) == (0, 0)
    with Client(port) as client, Client(port):
        request_id = client.request(provider.fresh(scripts.idle_mid_stream(["once"])))
        client.wait_text(request_id)
        live = health()
        assert (live["sessions"], live["requests"]) == (2, 1)
        client.interrupt(request_id)
        client.wait_terminal(request_id)
        wait_until(lambda: health()["requests"] == 0, "the request is over")
        assert ask(port, "GET /health?verbose=1")[0] == 200
    wait_until(lambda: health()["sessions"] == 0, "the sessions are over")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /healthy", 404),
        ("GET /health/", 404),
        ("GET /ws/agent", 404),
        ("GET /../health", 404),
        ("POST /health", 405),
        ("DELETE /", 405),
        ("HEAD /health", 405),
        (f"GET {PATH}", 426),
    ],
)
def test_other_paths_and_methods_are_refused(
    gateway: Gateway, request_line: str, status: int
) -> None:
    port = gateway.server.port
    got, headers, body = ask(port, request_line)
    assert got == status
    assert body
    if status == 405:
        assert headers["allow"] == "GET"
    assert ask(port, "GET /health")[0] == 200


def test_a_post_to_the_websocket_opens_nothing(gateway: Gateway) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    port = gateway.server.port
    assert ask(port, f"POST {PATH}", **upgrade)[0] in (400, 405)
    assert json.loads(ask(port, "GET /health")[2])["sessions"] == 0


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS to a plain port
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
    ],
)
def test_what_is_no_http_is_hung_up_on_and_harms_nobody(gateway: Gateway, data: bytes) -> None:
    port = gateway.server.port
    try:
        status = ask_raw(port, data)[0]
    except ConnectionError:
        status = 0
    assert status == 0 or 400 <= status < 500
    assert ask(port, "GET /health")[0] == 200
    wait_until(lambda: gateway.server.connections == 0, "the connection is gone")


# Who may connect


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:1"},  # another service of this machine
        {"Origin": "http://localhost"},
        {"Origin": "null"},  # a sandboxed frame, or a file
        {"Origin": "file://"},
        {"Origin": ""},
        {"Host": "evil.example"},  # its name was pointed at our address
        {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"},
        {"Host": "localhost.evil.example"},
        {"Host": ""},
        {"Host": "[", "Origin": "http://["},
        {"Host": "localhost#.evil.example"},
        {"Host": "evil@127.0.0.1"},
        {"Host": "127.0.\t0.1"},
        {"Host": "localhost:80:80"},
        {"Host": "localhost:99999"},
        {"Host": "[::1]evil"},
        {"Host": "localhost", "Origin": "http://localhost#.evil.example"},
        {"Host": "localhost", "Origin": "http://evil@localhost"},
    ],
)
def test_a_web_page_of_another_origin_cannot_connect(
    gateway: Gateway, provider: ProviderProcess, headers: dict[str, str]
) -> None:
    port = gateway.server.port
    with pytest.raises(HandshakeRefused) as refused:
        Client(port, headers=headers)
    assert refused.value.status == 403
    assert refused.value.body
    assert ask(port, "GET /health", **headers)[0] == 403
    labels = {"reason": "origin"}
    assert gateway.metrics.registry.get_sample_value("bargein_refused_total", labels) == 2
    with Client(port) as client:
        assert_it_lives_on(client, provider)


def test_two_hosts_or_two_origins_are_refused(gateway: Gateway) -> None:
    port = gateway.server.port
    host = f"Host: 127.0.0.1:{port}\r\n".encode()
    for headers in (b"", host * 2, host + b"Origin: http://a\r\n" * 2):
        assert ask_raw(port, b"GET /health HTTP/1.1\r\n" + headers + b"\r\n")[0] == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "192.0.2.7"])
def test_our_own_page_and_programs_can_connect(
    gateway: Gateway, provider: ProviderProcess, host: str
) -> None:
    port = gateway.server.port
    authority = f"{host}:{port}"
    with Client(port, headers={"Host": authority, "Origin": f"http://{authority}"}) as page:
        assert_it_lives_on(page, provider)
    with Client(port, headers={"Host": authority}) as program:
        assert_it_lives_on(program, provider)


def test_an_origin_that_is_allowed_can_connect_and_no_other_can(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    origin = "https://chat.example.com"
    gateway = make_gateway(server=ServerSettings(allowed_origins=(origin + "/",)))
    port = gateway.server.port
    for headers in (
        {"Origin": origin},
        {"Origin": origin, "Host": "chat.example.com"},
        {"Origin": origin.upper()},
    ):
        with Client(port, headers=headers) as client:
            assert_it_lives_on(client, provider)
    for headers in (
        {"Origin": "http://chat.example.com"},
        {"Origin": "https://chat.example.com.evil.example"},
        {"Origin": "https://evil.example", "Host": "chat.example.com"},
        {"Origin": "null"},
    ):
        with pytest.raises(HandshakeRefused):
            Client(port, headers=headers)


# Dead and half-open connections


def test_a_client_that_answers_no_ping_is_dropped_and_its_stream_closed(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(server=ServerSettings(ping_interval=0.1, ping_timeout=0.1))
    with Client(gateway.server.port) as client:
        script = provider.fresh(scripts.idle_mid_stream(["once"]))
        client.wait_text(client.request(script))
        # From here on it does not read, so its WebSocket layer answers nothing.
        provider.wait_closed(provider.wait_post(script=script).conn, timeout=3)
        wait_until(lambda: gateway.server.connections == 0, "the connection is gone")


def test_a_client_that_answers_pings_stays(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(server=ServerSettings(ping_interval=0.05, ping_timeout=0.2))
    with Client(gateway.server.port) as client:
        key = provider.unique("end")
        request_id = client.request(provider.fresh(scripts.finish_on_release(["once"], key)))
        while client.pings < 10:  # far longer than the limit
            client.read_some()
        provider.release(key)
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"


@pytest.mark.parametrize("ping_interval", [20.0, 0.0])
def test_a_connection_that_never_shakes_hands_is_dropped(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch, ping_interval: float
) -> None:
    monkeypatch.setattr("gateway.server.connection._HANDSHAKE_SECONDS", 0.1)
    monkeypatch.setattr("gateway.server.connection.CLOSE_SECONDS", 0.1)
    monkeypatch.setattr("gateway.server.server.CLOSE_SECONDS", 0.1)  # how often it looks
    running = make_gateway(server=ServerSettings(ping_interval=ping_interval, ping_timeout=0))
    with socket.create_connection(("127.0.0.1", running.server.port), timeout=5) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        assert sock.recv(1) == b""
    wait_until(lambda: running.server.connections == 0, "the connection is gone")


def test_a_client_that_does_not_answer_a_close_frame_is_dropped(
    make_gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.server.connection.CLOSE_SECONDS", 0.1)
    monkeypatch.setattr("gateway.server.server.CLOSE_SECONDS", 0.1)  # how often it looks
    running = make_gateway()
    with Client(running.server.port) as client:
        client.send("SHUTDOWN", {})
        wait_until(lambda: running.server.connections == 0, "the connection is gone")


def test_a_client_that_vanishes_in_the_middle_of_its_answer_costs_nothing_more(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    scripts_played = [provider.fresh(scripts.flood()) for _ in range(10)]
    for script in scripts_played:
        with Client(gateway.server.port) as client:
            client.wait_text(client.request(script))
            client.reset()
        provider.wait_closed(provider.wait_post(script=script).conn)
    wait_until(lambda: gateway.server.connections == 0, "the connections are gone")
    health = json.loads(ask(gateway.server.port, "GET /health")[2])
    assert (health["sessions"], health["requests"]) == (0, 0)


def test_a_client_that_vanishes_in_the_middle_of_a_frame_costs_nothing(
    gateway: Gateway, provider: ProviderProcess
) -> None:
    with Client(gateway.server.port) as client:
        client.send_raw(b"\x81\xfe\x10\x00\0\0\0\0{")
        client.drop()
    with Client(gateway.server.port) as client:
        assert_it_lives_on(client, provider)
        wait_until(lambda: gateway.server.connections == 1, "the other is gone")


def test_many_pings_are_all_answered_in_the_middle_of_a_flood(
    make_gateway: MakeGateway, provider: ProviderProcess
) -> None:
    gateway = make_gateway(server=ServerSettings(outbox=OutboxSettings(max_bytes=65536)))
    with Client(gateway.server.port, receive_buffer=4096) as client:
        script = provider.fresh(scripts.flood())
        request_id = client.request(script)
        provider.wait_blocked(script=script)
        with client.one_packet():
            for _ in range(100):
                client.send_ping()
                client.send("HEALTH_CHECK", {})
            client.interrupt(request_id)
        client.wait_ack()
        assert client.pongs == 100
        sent_at = time.monotonic()
        assert_it_lives_on_after(client, provider, request_id)
        assert time.monotonic() - sent_at < 5


def assert_it_lives_on_after(client: Client, provider: ProviderProcess, request_id: str) -> None:
    terminal: Received = client.wait_terminal(request_id)
    assert terminal.payload["interrupted"] is True
    assert_it_lives_on(client, provider)


def test_what_has_no_session_is_dropped_as_soon_as_it_stops_listening(gateway: Gateway) -> None:
    port = gateway.server.port
    with socket.create_connection(("127.0.0.1", port), 10) as silent, Client(port) as client:
        wait_until(lambda: gateway.server.connections == 2, "both are accepted")
        gateway.server.stop_listening()
        assert silent.recv(1) == b""
        client.send("HEALTH_CHECK", {})
        client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")


# Those who send faster than the log is written


@pytest.mark.parametrize("in_a_packet", [1, 500])
def test_who_sends_faster_than_the_log_is_written_is_not_read_meanwhile(
    client: Client, monkeypatch: pytest.MonkeyPatch, in_a_packet: int
) -> None:
    """What waits for its line fills the memory."""
    lane = lanes()
    waiting: list[int] = []
    run_deferred = lane.run_deferred

    def counted(function: Callable[..., object], *args: Any) -> None:
        waiting.append(len(lane._deferred))
        run_deferred(function, *args)

    monkeypatch.setattr(lane, "run_deferred", counted)
    messages = 2000
    for _ in range(messages // in_a_packet):
        with client.one_packet():
            for _ in range(in_a_packet):
                client.send("HEARTBEAT_REPLY", {"client_status": "OK"})
    client.send("SESSION_QUERY", {"query_fields": ["platform"]})
    client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO")
    assert len(waiting) > messages  # each has its line
    assert max(waiting) < 4 * gateway.server.connection.MESSAGES_IN_A_BATCH
