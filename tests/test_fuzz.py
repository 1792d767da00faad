"""Mutated handshakes and frames: whatever comes, the daemon serves on and leaves no traceback."""

from __future__ import annotations

import json
import random
import re
import signal
import socket

import gevent.pool
import pytest
from websockets.frames import Frame, Opcode

from gateway.wire.frames import PATH
from tests.fakes import LIMIT
from tests.harness import scripts
from tests.harness.client import Client
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess

SEED = 20261130
CONNECTIONS = 20_000
AT_ONCE = 16

AUTH = {"type": "API_KEY", "api_key": "k"}
REGISTER: tuple[str, object] = ("REGISTER", {"auth": AUTH, "platform": "WEB"})
PAYLOADS: list[tuple[str, object]] = [
    REGISTER,
    ("REGISTER", {"auth": {"type": "ACCOUNT", "account": "a", "password": "b"}}),
    ("REQUEST", {"request_id": "req_1", "data_type": "TEXT", "content": {"text": "héllo"}}),
    ("REQUEST", {"request_id": "req_2", "data_type": "VOICE", "content": {"voice_mode": "BINARY"}}),
    ("INTERRUPT", {"interrupt_request_id": "req_1", "delivered_text_chars": 3}),
    ("FUNCTION_RESULT", {"call_id": "call_1", "result": {"deep": [[[]]]}, "request_id": "req_3"}),
    ("SESSION_QUERY", {"query_fields": ["platform"]}),
    ("HEALTH_CHECK", {"check_fields": ["status"]}),
    ("HEARTBEAT_REPLY", {"client_status": "OK"}),
    ("SHUTDOWN", {"reason": "bye"}),
]
UPGRADE = (
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
)
ODD_BYTES = (b"\0", b"\r\n", b"\r\n\r\n", b"{", b'"', b"\xff", b"[" * 2000)


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def handshake(rng: random.Random) -> bytes:
    lines = [
        f"GET {rng.choice([PATH, PATH, PATH, '/', '/health', '/nowhere?x'])} HTTP/1.1",
        f"Host: {rng.choice(['127.0.0.1', 'localhost:8000', '[::1]', 'evil.example'])}",
        *UPGRADE,
        "Origin: http://localhost",
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    ]
    if rng.random() < 0.1:
        lines = lines[: rng.randint(1, len(lines))]
    return head(*lines)


def message(msg_type: str, payload: object, session_id: str | None) -> bytes:
    envelope = {
        "version": "1.0",
        "msg_type": msg_type,
        "session_id": session_id,
        "payload": payload,
        "timestamp": 1,
    }
    return json.dumps(envelope).encode()


def frames(rng: random.Random, session_id: str | None) -> bytes:
    made = []
    first = [] if session_id else [REGISTER]
    for msg_type, payload in [*first, *rng.sample(PAYLOADS, 4)]:
        data = message(msg_type, payload, session_id)
        if rng.random() < 0.4:
            data = mutated(rng, data)
        opcode = rng.choice([Opcode.TEXT] * 8 + [Opcode.BINARY])
        if rng.random() < 0.2:
            half = rng.randrange(len(data) + 1)
            made.append(Frame(opcode, data[:half], fin=False).serialize(mask=True))
            opcode, data = Opcode.CONT, data[half:]
        made.append(Frame(opcode, data).serialize(mask=rng.random() < 0.95))
        if rng.random() < 0.3:
            control = rng.choice([Opcode.PING, Opcode.PONG, Opcode.CLOSE])
            made.append(Frame(control, b"\x03\xe8").serialize(mask=True))
    data = b"".join(made)
    return mutated(rng, data) if rng.random() < 0.5 else data


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Change one to four places, and sometimes cut off the end."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([1, 1, 2, 7, 50]))
        data = data[:start] + changed(rng, data[start:end]) + data[end:]
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data


def changed(rng: random.Random, piece: bytes) -> bytes:
    match rng.randrange(5):
        case 0:
            return b""
        case 1:
            return rng.randbytes(len(piece))
        case 2:
            return piece * rng.randint(2, 9)
        case 3:
            return piece.swapcase()
        case _:
            return rng.choice(ODD_BYTES)


def send(port: int, seed: int) -> None:
    """One connection: everything may be mutated, or the frames of a session."""
    rng = random.Random(seed)
    with socket.create_connection(("127.0.0.1", port), LIMIT) as sock:
        try:
            if rng.random() < 0.5:
                start = handshake(rng)
                sock.sendall(mutated(rng, start) if rng.random() < 0.5 else start)
                sock.sendall(frames(rng, None))
            else:
                sock.sendall(frames(rng, register(sock)))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except ConnectionError:
            pass  # it closed with bytes of ours unread


def register(sock: socket.socket) -> str:
    """Open a session as it should be; returns its id."""
    sock.sendall(head(f"GET {PATH} HTTP/1.1", "Host: 127.0.0.1", *UPGRADE))
    sock.sendall(Frame(Opcode.TEXT, message(*REGISTER, None)).serialize(mask=True))
    read = b""
    while (found := re.search(rb"sess_[0-9a-f]{16}", read)) is None:
        more = sock.recv(65536)
        assert more, read
        read += more
    return found[0].decode()


@pytest.mark.timeout(300)
def test_twenty_thousand_mutated_connections_leave_no_traceback(
    provider: ProviderProcess,
) -> None:
    arguments = ["--llm-url", provider.base_url, "--llm-model", "test", "--log-format", "json"]
    with Daemon(*arguments) as daemon:
        pool = gevent.pool.Pool(AT_ONCE)
        for seed in range(SEED, SEED + CONNECTIONS):
            pool.spawn(send, daemon.port, seed)
        pool.join(raise_error=True)
        with Client(daemon.port) as client:
            request_id = client.request(provider.fresh(scripts.answer(["still ", "here"])))
            assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
            client.close()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert not [line for line in lines if "Traceback" in str(line) or "exception" in line]
    assert not [line for line in lines if line["level"] == "error"]
    events = {line["event"] for line in lines}
    assert {"Received message", "Refused message", "Refused connection"} <= events
    assert {"Interrupt acknowledged", "Session ended", "Request interrupted"} <= events
