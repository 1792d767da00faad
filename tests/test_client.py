"""The client library: what it reads is what the gateway sends, and it needs nothing but itself."""

from __future__ import annotations

import ast
import contextlib
import json
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.server
import msgspec
import pytest
import trustme
from websockets.exceptions import InvalidURI
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from gateway import client as library
from gateway.client import (
    SERVER_PAYLOADS,
    AckStatus,
    Connection,
    ConnectionEnded,
    Error,
    FrameRefused,
    HandshakeFailed,
    HandshakeRefused,
    Heartbeat,
    InvalidFrame,
    Response,
    Session,
    SessionInfo,
    Shutdown,
    WaitTimeout,
    connection,
    decode_frame,
    encode_frame,
    open_socket,
    receive_bytes,
)
from gateway.wire import frames as wire
from gateway.wire.decode import decode
from gateway.wire.encode import encode
from tests.harness.client import Client

FOLDER = Path(library.__file__).parent
LIMIT = 10.0  # seconds; bounds a failure, and no success waits for it


# It is of the same protocol ---------------------------------------------------------------------


def shapes(payloads: tuple[type[Any], ...]) -> Any:
    """The fields of payloads with their types, without words and without limits on values."""

    def bare(schema: Any) -> Any:
        if isinstance(schema, dict):
            words = {"description", "title"}
            limits = {"pattern", "minLength", "maxLength", "minimum", "maximum"}
            dropped = (words | limits) if "properties" not in schema else words
            return {
                key: bare(value)
                for key, value in schema.items()
                if key not in dropped or isinstance(value, dict)
            }
        return [bare(one) for one in schema] if isinstance(schema, list) else schema

    _, components = msgspec.json.schema_components(payloads)
    return bare(components)


def test_every_payload_has_the_fields_and_types_of_the_gateway_s_own() -> None:
    assert [one.msg_type for one in SERVER_PAYLOADS] == [
        one.msg_type for one in wire.SERVER_PAYLOADS
    ]
    ours, theirs = shapes(SERVER_PAYLOADS), shapes(wire.SERVER_PAYLOADS)
    assert ours.keys() == theirs.keys()
    for name, shape in theirs.items():
        assert ours[name] == shape, name


def test_that_comparison_finds_a_field_that_is_missing_or_of_another_type() -> None:
    class Heartbeat(msgspec.Struct):
        msg_type = "HEARTBEAT"
        remaining_seconds: str

    class Shutdown(msgspec.Struct):
        msg_type = "SHUTDOWN"

    theirs = shapes(wire.SERVER_PAYLOADS)
    assert shapes((Heartbeat,))["Heartbeat"] != theirs["Heartbeat"]
    assert shapes((Shutdown,))["Shutdown"] != theirs["Shutdown"]


def test_the_version_the_path_and_the_credentials_are_the_gateway_s_own() -> None:
    assert (library.VERSION, library.PATH) == (wire.VERSION, wire.PATH)
    auths = (library.ApiKeyAuth("k"), library.AccountAuth("a", "p"))
    for auth in auths:
        assert msgspec.to_builtins(auth) == msgspec.to_builtins(
            msgspec.convert(msgspec.to_builtins(auth), wire.ApiKeyAuth | wire.AccountAuth)
        )
        assert "…" in repr(auth)


def test_what_it_sends_the_gateway_reads() -> None:
    data = encode_frame("INTERRUPT", {"interrupt_request_id": "r", "reason": "USER_STOP"}, "s")
    frame = decode(data)
    assert frame.session_id == "s"
    assert frame.payload == wire.Interrupt("r", "USER_STOP")


def test_half_a_surrogate_pair_can_be_sent_as_browsers_do() -> None:
    data = encode_frame("REQUEST", {"content": {"text": "\ud83d"}}, None)
    assert rb'"\ud83d"' in data


def test_what_the_gateway_sends_it_reads() -> None:
    sent = wire.Response("r", 3, wire.ResponseContent(text="Hello"))
    frame = decode_frame(encode(sent, "s", 0), at=1.5, order=7)
    assert frame is not None
    assert frame.payload == Response("r", 3, library.ResponseContent(text="Hello"))
    assert (frame.msg_type, frame.text, frame.is_terminal) == ("RESPONSE", "Hello", False)
    assert (frame.session_id, frame.at, frame.order) == ("s", 1.5, 7)


def test_fields_and_frames_of_a_later_version_are_ignored() -> None:
    new = {"msg_type": "HEARTBEAT", "payload": {"remaining_seconds": 9, "new": 1}, "new": 2}
    frame = decode_frame(json.dumps(new).encode(), 0, 0)
    assert frame is not None
    assert frame.payload == Heartbeat(9)
    unknown = {"msg_type": "SOMETHING_NEW", "payload": 1}
    assert decode_frame(json.dumps(unknown).encode(), 0, 0) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff", b'{"msg_type": "HEARTBEAT", "payload": {}}', b"[" * 100_000],
    ids=["empty", "list", "cut", "no UTF-8", "field missing", "deep"],
)
def test_what_is_not_a_frame_of_the_protocol_is_an_invalid_frame(data: bytes) -> None:
    with pytest.raises(InvalidFrame) as error:
        decode_frame(data, 0, 0)
    assert error.value.data == data


# It needs nothing but itself --------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_it_imports_only_itself_the_standard_library_websockets_and_msgspec(file: Path) -> None:
    allowed = sys.stdlib_module_names | {"websockets", "msgspec"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 or (node.module or "").partition(".")[0] in allowed


# The connection ---------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(
    serve: Callable[[socket.socket], object], tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """A port whose connections are served like this, each in a greenlet."""

    def handle(sock: socket.socket, _address: object) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            serve(sock)

    more: dict[str, Any] = {} if tls is None else {"ssl_context": tls}
    server = gevent.server.StreamServer(("127.0.0.1", 0), handle, **more)
    server.start()
    assert server.server_port is not None
    try:
        yield server.server_port
    finally:
        server.stop(timeout=0.1)


def websocket(on_frame: Callable[[ServerProtocol, WebSocketFrame], None]) -> Any:
    """A server that shakes hands, and does this at each frame."""

    def serve(sock: socket.socket) -> None:
        protocol = ServerProtocol()
        while data := sock.recv(65536):
            protocol.receive_data(data)
            for event in protocol.events_received():
                if isinstance(event, Request):
                    protocol.send_response(protocol.accept(event))
                elif isinstance(event, WebSocketFrame):
                    on_frame(protocol, event)
            for data in protocol.data_to_send():
                if data:
                    sock.sendall(data)
                else:
                    return

    return serve


FLOOD_BYTES = 16 * 1024 * 1024  # more than the kernel keeps for a server that does not read


def shake_hands(sock: socket.socket, *, then_send: bool = True) -> ServerProtocol:
    """Accept the WebSocket; `then_send` says whether the response is sent at once."""
    protocol = ServerProtocol()
    protocol.receive_data(sock.recv(65536))
    (request,) = protocol.events_received()
    assert isinstance(request, Request)
    protocol.send_response(protocol.accept(request))
    if then_send:
        sock.sendall(b"".join(protocol.data_to_send()))
    return protocol


def shakes_hands_only(sock: socket.socket) -> None:
    """A server that reads no message."""
    shake_hands(sock)
    gevent.sleep(LIMIT)  # until the server is stopped


def opened(port: int, host: str = "127.0.0.1", **options: Any) -> Connection:
    sock = open_socket(host, port, timeout=LIMIT)
    return Connection(f"ws://{host}:{port}/", sock, **{"timeout": LIMIT} | options)


def answers(data: bytes, *, stays: bool = True) -> Callable[[socket.socket], object]:
    def serve(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(data)
        while stays and sock.recv(65536):
            pass

    return serve


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
        b"HTTP/1.1 403 Forbidden\r\n\r\nno",  # and it does not close
        b"HTTP/1.0 403 Forbidden\r\n\r\nno",
    ],
    ids=["length", "chunked", "until closed", "HTTP/1.0"],
)
def test_a_refused_handshake_has_the_status_and_the_text(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "REFUSAL_BODY_SECONDS", 0.1)
    with listening(answers(data)) as port, pytest.raises(HandshakeRefused) as refused:
        opened(port)
    assert (refused.value.status, refused.value.body) == (403, "no")
    assert refused.value.received == data


@pytest.mark.parametrize(
    ("data", "stays"),
    [
        (b"SSH-2.0-OpenSSH_9.6", True),  # no line, and it waits for ours
        (b"HTTP/1.1 what\r\n\r\n", True),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", True),
        (b"HTTP/1.1 101 Swi", False),
        (b"", False),
    ],
    ids=["another protocol", "no status", "wrong key", "cut", "nothing"],
)
def test_a_server_that_does_not_shake_hands_is_not_waited_for(data: bytes, stays: bool) -> None:
    began = time.monotonic()
    with listening(answers(data, stays=stays)) as port, pytest.raises(HandshakeFailed) as failed:
        opened(port)
    assert time.monotonic() - began < LIMIT / 2
    assert not isinstance(failed.value, HandshakeRefused)
    assert failed.value.received == data
    assert not failed.value.timed_out


def test_a_server_that_says_nothing_is_given_up() -> None:
    with listening(answers(b"")) as port, pytest.raises(HandshakeFailed) as failed:
        opened(port, timeout=0.1)
    assert failed.value.timed_out


def test_pings_are_answered_fragments_joined_and_the_close_is_told() -> None:
    pongs = []

    def on_frame(protocol: ServerProtocol, frame: WebSocketFrame) -> None:
        if frame.opcode is Opcode.PONG:
            pongs.append(bytes(frame.data))
            protocol.send_text(b"Good ", fin=False)
            protocol.send_continuation(b"evening", fin=True)
            protocol.send_binary(b"\x00")
            protocol.send_close(4000, "enough")
        elif frame.opcode is Opcode.TEXT:
            protocol.send_ping(b"there?")

    with listening(websocket(on_frame)) as port, opened(port) as client:
        client.send_text(b"hello")
        messages = []
        while not client.has_ended:
            messages += client.receive()
        assert [(one.data, one.is_text) for one in messages] == [
            (b"Good evening", True),
            (b"\x00", False),
        ]
        assert (client.pings, pongs) == (1, [b"there?"])
        assert (client.close_code, client.close_reason, client.is_open) == (4000, "enough", False)
        with pytest.raises(ConnectionEnded) as ended:
            client.send_text(b"more")
        assert ended.value.code == 4000
        assert client.receive() == []


def test_a_message_that_is_too_long_ends_the_connection() -> None:
    def on_frame(protocol: ServerProtocol, _frame: WebSocketFrame) -> None:
        protocol.send_text(b"x" * 1001)

    with listening(websocket(on_frame)) as port, opened(port, max_message_bytes=1000) as client:
        client.send_text(b"hello")
        while client.is_open:
            assert client.receive() == []
        assert "1000" in str(client.wire_error)


def test_no_read_waits_longer_than_it_was_told() -> None:
    with listening(websocket(lambda protocol, frame: None)) as port, opened(port) as client:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            client.receive(0.05)
        assert 0.04 < time.monotonic() - began < LIMIT / 2


def test_a_server_that_never_pauses_meets_the_limit_too() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"something")
        with pytest.raises(TimeoutError):
            receive_bytes(ours, 0)
        assert receive_bytes(ours, LIMIT) == b"something"


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "ws://"])
def test_a_url_that_is_not_valid_leaves_no_socket_open(url: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with pytest.raises(InvalidURI):
            Connection(url, ours)
        assert ours.fileno() == -1


def test_a_reset_that_fails_closes_the_socket() -> None:
    with listening(websocket(lambda protocol, frame: None)) as port, opened(port) as client:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="not available"):
            patch.setattr(socket, "SO_LINGER", -1)
            client.reset()
        assert client._sock.fileno() == -1


def test_after_a_write_that_failed_nothing_is_sent_into_the_middle_of_its_frame() -> None:
    with listening(shakes_hands_only) as port, opened(port) as client:
        client.timeout = 0.1
        with pytest.raises(TimeoutError):
            client.send_binary(b"x" * FLOOD_BYTES)
        for send in (client.send_ping, client.send_close, lambda: client.send_raw(b"x")):
            with pytest.raises(ConnectionEnded, match="a write has failed"):
                send()


def test_what_was_closed_here_says_so_when_something_is_sent() -> None:
    with listening(websocket(lambda protocol, frame: None)) as port:
        client = opened(port)
        client.drop()
        with pytest.raises(ConnectionEnded, match="has ended"):
            client.send_text(b"hello")
        with pytest.raises(ConnectionEnded), client.one_packet():
            pass


@pytest.mark.parametrize("asks_with", ["PING", "HEARTBEAT"])
def test_a_server_that_wants_answers_and_does_not_read_cannot_lengthen_a_wait(
    asks_with: str,
) -> None:
    heartbeat = {"msg_type": "HEARTBEAT", "payload": {"remaining_seconds": 9}}

    def serve(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # full soon
        protocol = shake_hands(sock)
        while True:
            if asks_with == "PING":
                protocol.send_ping(b"x" * 125)
            else:
                protocol.send_text(json.dumps(heartbeat).encode())
            sock.sendall(b"".join(protocol.data_to_send()))

    with listening(serve) as port:
        session = Session(opened(port), timeout=LIMIT)
        session.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        began = time.monotonic()
        with pytest.raises(WaitTimeout):
            session.wait(lambda: None, "nothing", 0.5)
        assert time.monotonic() - began < LIMIT / 2
        with pytest.raises(WaitTimeout, match=r"0.5 s are over"):
            session.close(timeout=0.5)
        assert time.monotonic() - began < LIMIT / 2


def test_it_speaks_tls_and_checks_the_name() -> None:
    authority = trustme.CA()
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(theirs)
    authority.configure_trust(ours)

    def on_frame(protocol: ServerProtocol, frame: WebSocketFrame) -> None:
        protocol.send_text(bytes(frame.data)[::-1])

    with listening(websocket(on_frame), theirs) as port:
        sock = open_socket("localhost", port, tls=ours, timeout=LIMIT)
        with Connection(f"wss://localhost:{port}/", sock, timeout=LIMIT) as client:
            client.send_text(b"abc")
            (message,) = client.receive()
            assert message.data == b"cba"
        with pytest.raises(ssl.SSLCertVerificationError):
            open_socket("127.0.0.1", port, tls=ours, timeout=LIMIT)


# The session ------------------------------------------------------------------------------------


class Script:
    """A gateway that answers each frame as a test says."""

    def __init__(self, **replies: Callable[[dict[str, Any]], list[tuple[str, Any]]]) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._replies = replies

    def __call__(self, protocol: ServerProtocol, frame: WebSocketFrame) -> None:
        if frame.opcode is not Opcode.TEXT:
            return
        said = json.loads(bytes(frame.data))
        self.heard.append((said["msg_type"], said["payload"]))
        make_replies = self._replies.get(said["msg_type"])
        for msg_type, payload in make_replies(said["payload"]) if make_replies else ():
            reply = {"msg_type": msg_type, "session_id": "s", "payload": payload}
            protocol.send_text(json.dumps(reply).encode())


def ack_of(payload: dict[str, Any]) -> tuple[str, Any]:
    target = payload["interrupt_request_id"]
    fields = {"interrupted_request_ids": [], "status": "FAILED", "message": "", "results": []}
    return "INTERRUPT_ACK", fields | {"interrupt_request_id": target}


def refused(detail: str) -> tuple[str, Any]:
    fields = {"error_code": "MALFORMED_PAYLOAD", "error_msg": "", "retryable": False}
    return "ERROR", fields | {"error_detail": detail}


REGISTERED = ("REGISTER_ACK", {"session_id": "s", "session_timeout_seconds": 0})


@contextlib.contextmanager
def talking(script: Script) -> Iterator[Session]:
    with listening(websocket(script)) as port:
        session = Session(opened(port), timeout=LIMIT)
        try:
            yield session
        finally:
            session.drop()


def test_a_session_has_no_id_before_it_is_registered() -> None:
    with talking(Script(REGISTER=lambda _: [REGISTERED])) as session:
        assert session.session_id is None
        with pytest.raises(RuntimeError):
            _ = session.registered
        assert session.register(auth=library.ApiKeyAuth("k")).session_id == "s"
        assert session.session_id == "s"


def test_an_answer_has_its_frames_its_first_end_and_what_came_behind() -> None:
    def answer(payload: dict[str, Any]) -> list[tuple[str, Any]]:
        request_id = payload["request_id"]
        call = {"name": "f", "parameters": {}, "call_id": "c"}
        frames: list[dict[str, Any]] = [
            {"text_stream_seq": 0, "content": {"text": "Good "}},
            {"text_stream_seq": 1, "content": {"text": "evening"}},
            {"text_stream_seq": 2, "function_call": call},
            {"text_stream_seq": -1, "outcome": "COMPLETED"},
            {"text_stream_seq": -1, "outcome": "FAILED"},
        ]
        return [("RESPONSE", {"request_id": request_id} | frame) for frame in frames]

    with talking(Script(REQUEST=answer)) as session:
        asked = session.ask("Hello")
        collected = asked.collect()
        assert (collected.text, collected.outcome) == ("Good evening", "COMPLETED")
        assert [call.name for call in collected.function_calls] == ["f"]
        session.wait(lambda: len(asked.ends) == 2 or None, "both ends")
        assert [len(asked.pieces), len(asked.texts), len(asked.frames)] == [3, 2, 5]
        assert asked.collect().outcome == "COMPLETED"
        assert [frame.order for frame in asked.frames] == list(range(5))


def test_frames_that_answer_nothing_are_kept_apart() -> None:
    frames = [
        ("RESPONSE", {"request_id": "x", "text_stream_seq": 0}),
        ack_of({"interrupt_request_id": "y"}),
        ("SESSION_INFO", {"session_data": {}}),
    ]
    with talking(Script(SESSION_QUERY=lambda _: frames)) as session:
        session.send("SESSION_QUERY")
        session.wait_for(SessionInfo)
        assert [frame.msg_type for frame in session.unexpected] == ["RESPONSE", "INTERRUPT_ACK"]


def test_acks_belong_to_the_interrupts_of_the_same_target_in_order() -> None:
    with talking(Script(INTERRUPT=lambda payload: [ack_of(payload)])) as session:
        sent = [session.send_interrupt(target) for target in ("a", None, "a", "b")]
        assert session.interrupt("b").status is AckStatus.FAILED
        assert all(one.ack is not None for one in sent)
        orders = [one.ack_frame.order for one in sent if one.ack_frame is not None]
        assert orders == [0, 1, 2, 3]
        assert [one.request_id for one in sent] == ["a", None, "a", "b"]


def test_a_refused_interrupt_is_sent_once_more_with_its_target_only() -> None:
    replies = iter([[refused("no")], [ack_of({"interrupt_request_id": "a"})]])
    script = Script(INTERRUPT=lambda _: next(replies))
    with talking(script) as session:
        ack = session.interrupt("a", reason="USER_NEW_INPUT", delivered_text_chars=3)
        assert ack.status is AckStatus.FAILED
        assert [payload for _, payload in script.heard] == [
            {"interrupt_request_id": "a", "reason": "USER_NEW_INPUT", "delivered_text_chars": 3},
            {"interrupt_request_id": "a"},
        ]
        assert [error.error_detail for error in session.refusals] == ["no"]
        assert session.unexpected == []


@pytest.mark.parametrize("target", ["a", None])
def test_an_interrupt_that_was_only_sent_is_sent_once_more_too(target: str | None) -> None:
    replies = iter([[refused("no")], [refused("no")], [ack_of({"interrupt_request_id": "b"})]])
    script = Script(INTERRUPT=lambda _: next(replies))
    with talking(script) as session:
        sent = session.send_interrupt(target)
        session.wait(lambda: len(session.refusals) == 2 or None, "both refusals")
        assert session.interrupt("b").status is AckStatus.FAILED
        assert sent.ack is None
        targets = [payload["interrupt_request_id"] for _, payload in script.heard]
        assert targets == [target, target, "b"]


def test_an_interrupt_that_is_refused_twice_does_not_take_the_ack_of_the_next() -> None:
    replies = iter([[refused("no")], [refused("never")], [ack_of({"interrupt_request_id": "a"})]])
    with talking(Script(INTERRUPT=lambda _: next(replies))) as session:
        with pytest.raises(FrameRefused, match="never"):
            session.interrupt("a")
        assert session.interrupt("a").status is AckStatus.FAILED
        assert [error.error_detail for error in session.refusals] == ["no", "never"]


@pytest.mark.parametrize("target", ["a", None])
@pytest.mark.parametrize("acks", [1, 2])
def test_the_ack_of_an_interrupt_that_was_sent_twice_without_need_is_ignored(
    target: str | None, acks: int
) -> None:
    script = Script(
        BAD=lambda _: [refused("the bad frame")],
        INTERRUPT=lambda payload: [ack_of(payload)] * (1 if "reason" in payload else acks),
        SESSION_QUERY=lambda _: [("SESSION_INFO", {"session_data": {}})],
    )
    with talking(script) as session:
        session.send("BAD")
        first = session.interrupt(target)
        session.send("SESSION_QUERY")
        session.wait_for(SessionInfo)  # comes after the second ack
        assert [name for name, _ in script.heard].count("INTERRUPT") == 2
        assert len(session.unexpected) == acks - 1
        assert session.interrupt(target) is not first
        assert len(session.interruptions) == 2


def test_an_interrupt_of_all_is_not_repeated_where_that_would_stop_a_later_request() -> None:
    replies = iter([[], [refused("no")]])
    script = Script(
        REQUEST=lambda _: next(replies),
        SESSION_QUERY=lambda _: [("SESSION_INFO", {"session_data": {}})],
    )
    with talking(script) as session:
        session.ask("one")
        session.send_interrupt(None)
        session.ask("two")
        session.wait_for(Error)
        session.send("SESSION_QUERY")
        session.wait_for(SessionInfo)
        assert [name for name, _ in script.heard].count("INTERRUPT") == 1


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (12.5, 12),
        (0.999, 0),
        (-1, 0),
        (-0.25, 0),
        (7, 7),
        (10**30, 2**53 - 1),
        (1e300, 2**53 - 1),
        (float("nan"), None),
        (float("inf"), None),
        (float("-inf"), None),
        ("12", None),
        (None, None),
    ],
)
def test_an_interrupt_sends_a_whole_figure_or_none(given: Any, sent: int | None) -> None:
    script = Script(INTERRUPT=lambda payload: [ack_of(payload)])
    with talking(script) as session:
        session.interrupt("a", delivered_text_chars=given)
        ((_, payload),) = script.heard
        assert payload == {"interrupt_request_id": "a", "reason": "USER_STOP"} | (
            {} if sent is None else {"delivered_text_chars": sent}
        )


@pytest.mark.parametrize("earlier", ["wire", "send", "fragments"])
def test_the_error_for_an_earlier_frame_does_not_refuse_the_interrupt(earlier: str) -> None:
    script = Script(
        BAD=lambda _: [refused("the bad frame")], INTERRUPT=lambda payload: [ack_of(payload)]
    )
    bad = encode_frame("BAD", {}, None)
    with talking(script) as session:
        match earlier:
            case "wire":
                session.connection.send_text(bad)
            case "send":
                session.send("BAD")
            case _:
                session.connection.send_fragments([bad])
        assert session.interrupt("a").status is AckStatus.FAILED
        assert [error.error_detail for error in session.refusals] == ["the bad frame"]


def test_the_error_for_an_earlier_frame_does_not_refuse_the_registration() -> None:
    script = Script(BAD=lambda _: [refused("the bad frame")], REGISTER=lambda _: [REGISTERED])
    with talking(script) as session:
        session.send("BAD")
        assert session.register().session_id == "s"


def test_an_error_with_a_code_for_other_frames_does_not_refuse_the_interrupt() -> None:
    def reply(payload: dict[str, Any]) -> list[tuple[str, Any]]:
        name, fields = refused("voice")
        return [(name, fields | {"error_code": "STREAM_SEQ_ERROR"}), ack_of(payload)]

    with talking(Script(INTERRUPT=reply)) as session:
        assert session.interrupt("a").status is AckStatus.FAILED


def answered(session: Session, how: str) -> None:
    """Send a frame that could have been refused, and read its answer."""
    match how:
        case "registration":
            session.register()
        case "request":
            session.ask("Hello").collect()
        case "query":
            session.send("SESSION_QUERY")
            session.wait_for(SessionInfo)
        case "interrupt":
            session.interrupt("b")
        case "error":
            session.send("BAD")
            session.wait_for(Error)
        case "heartbeat":
            session.send("SESSION_QUERY")
            session.wait_for(Heartbeat)


@pytest.mark.parametrize(
    "how", ["registration", "request", "query", "interrupt", "error", "heartbeat"]
)
def test_a_refused_interrupt_is_told_at_once_where_all_earlier_frames_were_answered(
    how: str,
) -> None:
    end = {"text_stream_seq": -1, "outcome": "COMPLETED"}
    info: tuple[str, Any] = ("SESSION_INFO", {"session_data": {}})
    heartbeat = ("HEARTBEAT", {"remaining_seconds": 9})
    script = Script(
        REGISTER=lambda _: [REGISTERED],
        REQUEST=lambda payload: [("RESPONSE", {"request_id": payload["request_id"]} | end)],
        SESSION_QUERY=lambda _: [info, heartbeat],
        BAD=lambda _: [refused("the bad frame")],
        INTERRUPT=lambda payload: [
            refused("no") if payload["interrupt_request_id"] == "a" else ack_of(payload)
        ],
    )
    with talking(script) as session:
        answered(session, how)
        began = time.monotonic()
        with pytest.raises(FrameRefused, match="no"):
            session.interrupt("a")
        assert time.monotonic() - began < LIMIT / 2


def test_an_interrupt_that_may_be_refused_waits_for_its_ack_and_then_says_so() -> None:
    with talking(Script(INTERRUPT=lambda _: [refused("no")])) as session:
        session.send("FUNCTION_RESULT", call_id="c", result=1)  # gets no answer
        with pytest.raises(FrameRefused, match="no"):
            session.interrupt("a", timeout=0.1)
        assert session.interruptions == []


def test_a_second_registration_waits_for_its_own_answer() -> None:
    replies = iter([[REGISTERED], [refused("already")]])
    with talking(Script(REGISTER=lambda _: next(replies))) as session:
        session.register()
        with pytest.raises(FrameRefused, match="already"):
            session.register()
        assert session.session_id == "s"


def test_heartbeats_are_answered_while_something_else_is_awaited() -> None:
    script = Script(
        REGISTER=lambda _: [("HEARTBEAT", {"remaining_seconds": 9}), REGISTERED],
        HEARTBEAT_REPLY=lambda _: [("SESSION_INFO", {"session_data": {}})],
    )
    with talking(script) as session:
        session.register()
        session.wait_for(SessionInfo)
        assert ("HEARTBEAT_REPLY", {}) in script.heard


def test_frames_that_come_with_an_invalid_one_are_taken_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with talking(Script(REGISTER=lambda _: [REGISTERED])) as session:
        session.register(auth=library.ApiKeyAuth("k"))
        heartbeat = {
            "msg_type": "HEARTBEAT",
            "session_id": "s",
            "payload": {"remaining_seconds": 7},
        }
        batch = [
            library.Message(data, is_text=True, at=0.0)
            for data in (b"{", json.dumps(heartbeat).encode(), b"[")
        ]
        monkeypatch.setattr(session.connection, "receive", lambda _timeout: batch)
        with pytest.raises(InvalidFrame) as error:
            session._read(LIMIT)
        assert error.value.data == b"{"
        assert session.frames[-1].payload == Heartbeat(7)


def test_the_end_of_the_connection_shows_the_last_frames() -> None:
    def on_frame(protocol: ServerProtocol, frame: WebSocketFrame) -> None:
        if frame.opcode is Opcode.TEXT:
            reply = {"msg_type": "SHUTDOWN", "payload": {"reason": "SERVER_SHUTDOWN"}}
            protocol.send_text(json.dumps(reply).encode())
            protocol.send_close(1012)

    with listening(websocket(on_frame)) as port:
        session = Session(opened(port), timeout=LIMIT)
        with pytest.raises(ConnectionEnded, match=r"REGISTER_ACK.*last of 1 frames(.|\n)*Shutdown"):
            session.register()
        assert session.goodbye is not None
        assert session.goodbye.reason == "SERVER_SHUTDOWN"
        session.close()  # it need not be said twice
        with pytest.raises(ConnectionEnded):
            session.ask("Hello")


def test_a_gateway_that_does_not_close_its_side_is_given_up() -> None:
    def serve(sock: socket.socket) -> None:
        shake_hands(sock)
        while sock.recv(65536):
            pass

    with listening(serve) as port:
        session = Session(opened(port), timeout=0.1)
        with pytest.raises(WaitTimeout, match=r"0.1 s are over, waiting for the end of the conn"):
            session.close()
        assert session.connection.has_ended


def test_closing_has_a_timeout_of_its_own_which_a_full_socket_does_not_lengthen() -> None:
    with listening(shakes_hands_only) as port:
        session = Session(opened(port), timeout=LIMIT)
        sock = session.connection._sock
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(b"x" * 65536)
        began = time.monotonic()
        with pytest.raises(WaitTimeout, match=r"0.1 s are over"):
            session.close(timeout=0.1)
        assert time.monotonic() - began < LIMIT / 2
        assert sock.fileno() == -1


def test_frames_that_came_with_the_handshake_are_read_although_the_server_has_closed() -> None:
    def serve(sock: socket.socket) -> None:
        protocol = shake_hands(sock, then_send=False)
        reply = {"msg_type": "SHUTDOWN", "payload": {"reason": "SERVER_SHUTDOWN"}}
        protocol.send_text(json.dumps(reply).encode())
        protocol.send_close(1013)
        sock.sendall(b"".join(protocol.data_to_send()))

    with listening(serve) as port, Session(opened(port), timeout=LIMIT) as session:
        assert session.wait_for(Shutdown).reason == "SERVER_SHUTDOWN"
        with pytest.raises(ConnectionEnded) as ended:
            session.wait_for(Shutdown)
        assert ended.value.code == 1013


def test_an_error_of_a_request_ends_that_answer_only() -> None:
    def fail(payload: dict[str, Any]) -> list[tuple[str, Any]]:
        name, fields = refused("no provider")
        return [(name, fields | {"request_id": payload["request_id"]})]

    with talking(Script(REQUEST=fail)) as session:
        collected = session.ask("Hello").collect()
        assert isinstance(collected.error, Error)
        assert collected.outcome == "FAILED"
        assert session.refusals == []


# The client for tests of the wire ---------------------------------------------------------------


WAITS: list[Callable[[Client], object]] = [
    lambda client: client.wait_for(lambda frame: frame.msg_type == "SESSION_INFO"),
    Client.wait_ack,
    lambda client: client.wait_terminal("another"),
    lambda client: client.wait_text("another"),
    Client.wait_closed,
    Client.register,
    Client.close,
]


@pytest.mark.parametrize(
    "wait", WAITS, ids=["for", "ack", "terminal", "text", "closed", "register", "close"]
)
def test_a_wait_has_one_limit_however_many_frames_come(wait: Callable[[Client], object]) -> None:
    frame = {
        "msg_type": "RESPONSE",
        "session_id": "s",
        "payload": {"request_id": "r", "text_stream_seq": 0, "content": {"text": "more"}},
    }

    def serve(sock: socket.socket) -> None:
        protocol = shake_hands(sock)
        while True:
            protocol.send_text(json.dumps(frame).encode())
            sock.sendall(b"".join(protocol.data_to_send()))
            gevent.sleep(0.01)  # far less than the limit

    with listening(serve) as port, Client(port, register=False, timeout=LIMIT) as client:
        client.timeout = 0.1
        began = time.monotonic()
        with pytest.raises(AssertionError, match=r"0.1 s are over; got \d+ frames"):
            wait(client)
        assert time.monotonic() - began < LIMIT / 2


def test_closing_such_a_client_frees_its_socket_even_where_it_fails() -> None:
    with listening(shakes_hands_only) as port:
        client = Client(port, register=False, timeout=LIMIT)
        client.timeout = 0.1
        with pytest.raises(AssertionError):
            client.close()
        assert client._sock.fileno() == -1
