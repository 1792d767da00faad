"""A provider for tests: it plays scripts over HTTP and tells at once what its clients do.

``python -m tests.harness.provider --ca-file PATH`` runs it as a process of its own, on plain
asyncio, so that the client's event loop does not delay what it sees of a client. When it is ready
it has written the CA certificate (PEM) for its TLS port to PATH, and prints one JSON line,
``{"http": port, "tls": port, "mute": port, "full": port | null, "control": port}``, all on
127.0.0.1. It exits when stdin or the control connection closes.

- http: every POST is read whole; the ``content`` of its last message names the script that answers
  it. An undefined name gets ``scripts.default_story()``. A script that ends without
  closing leaves the connection to the next request.
- tls: the same over TLS; a connection counts from the end of its handshake.
- mute: accepts, reads, and sends nothing. As https: a TLS handshake that stays pending.
- full: its backlog is full, so that connect() hangs (Linux only; null elsewhere).
- control: newline-delimited JSON, both ways.

**Steps** of a script (``scripts.py`` makes them): ``{"send": base64}``, these bytes exactly, done
when the kernel has them; ``{"wait": key}`` until that key is released, once and for all;
``{"sleep": seconds}``; ``{"repeat": steps, "times": n | null}``, null being until the client is
gone; ``{"hang": true}``; ``{"close": true}``; ``{"reset": true}``, an RST; ``{"mark": label}``, an
entry in the journal.

**Commands** ``{"id": n, "cmd": ...}``: ``script`` (name, steps), ``release`` (key), ``counts``,
``watch_full``. Each gets ``{"event": "reply", "id": n, "error": text | null, ...}``, after
everything that was journalled before.

**Journal** ``{"event": ..., "time": time.monotonic(), "conn": id, ...}``: ``connected``,
``connecting``, ``post``, ``mark``, ``blocked``, ``script_done``, ``closed``.
``provider_process.py`` has a dataclass for each, which documents the fields.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, assert_never

import trustme

from . import scripts

PortKind = Literal["http", "tls", "mute"]

BLOCKED_AFTER_SECONDS = (
    0.05  # far longer than a client that reads may pause, far shorter than a test's timeout
)


# Steps, parsed ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    data: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    key: str


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class Repeat:
    steps: tuple[Step, ...]
    times: int | None


@dataclass(frozen=True, slots=True)
class Hang: ...


@dataclass(frozen=True, slots=True)
class Close: ...


@dataclass(frozen=True, slots=True)
class Reset: ...


@dataclass(frozen=True, slots=True)
class Mark:
    label: str


Step: TypeAlias = Send | Wait | Sleep | Repeat | Hang | Close | Reset | Mark


def parse_step(step: object) -> Step:
    """Read one JSON step. Raises ValueError when it is not one."""
    match step:
        case {"send": str(data)}:
            return Send(b64decode(data, validate=True))
        case {"wait": str(key)}:
            return Wait(key)
        case {"sleep": int() | float() as seconds}:
            return Sleep(seconds)
        case {"repeat": [_, *_] as steps, "times": int() | None as times}:
            return Repeat(tuple(map(parse_step, steps)), times)
        case {"hang": True}:
            return Hang()
        case {"close": True}:
            return Close()
        case {"reset": True}:
            return Reset()
        case {"mark": str(label)}:
            return Mark(label)
    raise ValueError(f"not a step: {step!r}")


# Requests, parsed -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: Any  # decoded JSON, or None where it is not JSON

    @property
    def script(self) -> str:
        """The content of the last message; "" where that is not a string."""
        match self.body:
            case {"messages": [*_, {"content": str(name)}]}:
                return name
        return ""


def take_request(buffer: bytearray) -> Request | None:
    """Take one request out of the buffer; None while it is incomplete."""
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        return None
    first_line, *header_lines = buffer[:head_end].decode("latin-1").split("\r\n")
    method, path, _ = first_line.split(" ", 2)
    fields = (line.partition(":") for line in header_lines)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    body_start = head_end + 4
    body_end = body_start + int(headers.get("content-length", "0"))
    if len(buffer) < body_end:
        return None
    raw_body = bytes(buffer[body_start:body_end])
    del buffer[:body_end]
    try:
        body = json.loads(raw_body)
    except ValueError:
        body = None
    return Request(method, path, headers, body)


# The stage: what all connections share ----------------------------------------------------------


class Stage:
    def __init__(self, full_port: FullPort | None) -> None:
        self.scripts: dict[str, tuple[Step, ...]] = {}
        self.keys: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.connections: dict[int, Connection] = {}
        self.listeners: set[asyncio.Transport] = set()
        self.conn_ids = itertools.count(1)
        self.post_count = 0
        self.closed_sent_bytes = 0
        self.full_port = full_port
        self.full_watch: asyncio.Task[None] | None = None

    def journal(self, event: str, conn: int, **fields: Any) -> None:
        entry = {"event": event, "time": time.monotonic(), "conn": conn, **fields}
        line = json.dumps(entry).encode() + b"\n"
        for listener in self.listeners:
            listener.write(line)

    def obey(self, command: object) -> dict[str, Any]:
        """Do what a control command says; returns the fields of the reply. Raises ValueError."""
        match command:
            case {"cmd": "script", "name": str(name), "steps": [*steps]}:
                self.scripts[name] = tuple(map(parse_step, steps))
            case {"cmd": "release", "key": str(key)}:
                self.keys[key].set()
            case {"cmd": "counts"}:
                sent_bytes = sum(connection.sent_bytes for connection in self.connections.values())
                return {
                    "posts": self.post_count,
                    "open": len(self.connections),
                    "sent_bytes": self.closed_sent_bytes + sent_bytes,
                }
            case {"cmd": "watch_full"} if self.full_port is not None:
                self.full_port.connecting()  # raises now where the kernel does not support it
                if self.full_watch is None or self.full_watch.done():
                    watch = self.full_port.watch(self)
                    self.full_watch = asyncio.get_running_loop().create_task(watch)
            case _:
                raise ValueError(f"not a command: {command!r}")
        return {}


# One connection of a client ---------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """Reading is never paused, so an EOF or RST is seen during every step of a script."""

    def __init__(self, stage: Stage, port: PortKind) -> None:
        self.stage = stage
        self.port = port
        self.conn = next(stage.conn_ids)
        self.script: str | None = None  # the latest
        self._written_bytes = 0
        self._buffer = bytearray()
        self._playing: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._blocked: asyncio.TimerHandle | None = None
        self._closed_by_us = False

    @property
    def sent_bytes(self) -> int:
        """Bytes of scripts that the kernel has taken."""
        return self._written_bytes - self.transport.get_write_buffer_size()

    # Begin and end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        # "Sent" means: taken by the kernel. (Not high=0: asyncio's TLS would never resume.)
        transport.set_write_buffer_limits(high=1, low=0)
        self.transport = transport
        self.stage.connections[self.conn] = self
        self.stage.journal("connected", self.conn, port=self.port)

    def eof_received(self) -> None:
        self._over("client_eof")

    def connection_lost(self, error: Exception | None) -> None:
        self._over("client_eof" if error is None else "client_reset")

    def _over(self, by: Literal["client_eof", "client_reset", "provider"]) -> None:
        if self.stage.connections.pop(self.conn, None) is None:
            return
        if self._closed_by_us:
            by = "provider"  # an orderly close of TLS ends with an answer of the client's
        sent_bytes = self.sent_bytes
        self.stage.closed_sent_bytes += sent_bytes
        self.stage.journal(
            "closed",
            self.conn,
            by=by,
            script=self.script,
            mid_script=self._playing is not None,
            sent_bytes=sent_bytes,
        )
        if self._playing is not None:
            self._playing.cancel()
        if self._blocked is not None:
            self._blocked.cancel()
        self.transport.abort()

    # Requests in

    def data_received(self, data: bytes) -> None:
        if self.port != "mute":
            self._buffer += data
            self._next_request()

    def _next_request(self) -> None:
        if self._playing is not None or (request := take_request(self._buffer)) is None:
            return
        if request.method != "POST":
            self.transport.write(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
            return
        self.stage.post_count += 1
        number = self.stage.post_count
        self.script = request.script
        self.stage.journal(
            "post",
            self.conn,
            number=number,
            script=request.script,
            path=request.path,
            headers=request.headers,
            body=request.body,
        )
        play = self._play_script(number, request.script)
        self._playing = asyncio.get_running_loop().create_task(play)

    # Scripts out

    async def _play_script(self, number: int, name: str) -> None:
        steps = self.stage.scripts.get(name)
        await self._play(map(parse_step, scripts.default_story()) if steps is None else steps)
        self.stage.journal("script_done", self.conn, number=number, script=name)
        self._playing = None
        self._next_request()

    async def _play(self, steps: Iterable[Step]) -> None:
        for step in steps:
            match step:
                case Send(data):
                    self._written_bytes += len(data)
                    self.transport.write(data)
                    await self._writable.wait()
                case Wait(key):
                    await self.stage.keys[key].wait()
                case Sleep(seconds):
                    await asyncio.sleep(seconds)
                case Repeat(inner, times):
                    for _ in itertools.count() if times is None else range(times):
                        await self._play(inner)
                        await asyncio.sleep(0)  # a peer that keeps up must not starve the others
                case Hang():
                    await asyncio.get_running_loop().create_future()
                case Close():
                    self._closed_by_us = True
                    self.transport.close()
                case Reset():
                    self._closed_by_us = True
                    linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
                    raw_socket = self.transport.get_extra_info("socket")
                    raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.transport.abort()
                case Mark(label):
                    self.stage.journal("mark", self.conn, script=self.script, label=label)
                case _:
                    assert_never(step)

    def pause_writing(self) -> None:
        self._writable.clear()
        self._blocked = asyncio.get_running_loop().call_later(
            BLOCKED_AFTER_SECONDS, self._report_blocked
        )

    def resume_writing(self) -> None:
        self._writable.set()
        if self._blocked is not None:
            self._blocked.cancel()

    def _report_blocked(self) -> None:
        self.stage.journal("blocked", self.conn, script=self.script)


# The port that cannot be connected to -----------------------------------------------------------


class FullPort:
    """A listener that never accepts and whose backlog is full: Linux then drops every SYN."""

    POLL_SECONDS = 0.001  # no event announces a dropped SYN: poll, and only during `watch`

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._fillers: list[socket.socket] = []
        while True:
            filler = socket.socket()
            filler.settimeout(0.2)  # on loopback connect() succeeds within microseconds, or never
            try:
                filler.connect(("127.0.0.1", self.port))
            except TimeoutError:
                filler.close()
                return
            self._fillers.append(filler)

    def connecting(self) -> set[int]:
        """Local ports of the sockets of this machine that wait in SYN_SENT for this port.

        Asks as sock_diag(7) describes; /proc/net/tcp says the same, but takes 5 ms, not 0.2.
        """
        syn_sent, by_family, request_dump, error, done = 2, 20, 0x301, 2, 3
        query = struct.pack("=BBxxI48x", socket.AF_INET, socket.IPPROTO_TCP, 1 << syn_sent)
        found: set[int] = set()
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as kernel:
            header = struct.pack("=IHHII", 16 + len(query), by_family, request_dump, 0, 0)
            kernel.send(header + query)
            while True:
                answer = kernel.recv(65536)
                while answer:
                    size, kind = struct.unpack_from("=IH", answer)
                    if kind == error:
                        raise OSError("the kernel does not answer sock_diag")
                    if kind == done:
                        return found
                    local, remote = struct.unpack_from("!HH", answer, 16 + 4)
                    if remote == self.port:
                        found.add(local)
                    answer = answer[(size + 3) & ~3 :]

    async def watch(self, stage: Stage) -> None:
        """Journal each client that connects and that gives up, until none is left."""
        pending: dict[int, int] = {}  # conn ids by local port
        while True:
            seen = self.connecting()
            for port in seen - pending.keys():
                pending[port] = next(stage.conn_ids)
                stage.journal("connecting", pending[port])
            for port in pending.keys() - seen:
                stage.journal(
                    "closed",
                    pending.pop(port),
                    by="client_gave_up",
                    script=None,
                    mid_script=False,
                    sent_bytes=0,
                )
                if not pending:
                    return
            await asyncio.sleep(self.POLL_SECONDS)


# Control, and the process -----------------------------------------------------------------------


class Control(asyncio.Protocol):
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.stage.listeners.add(transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for command in map(json.loads, lines):
            reply: dict[str, Any] = {"event": "reply", "id": command["id"], "error": None}
            try:
                reply |= self.stage.obey(command)
            except (ValueError, OSError) as error:
                reply["error"] = str(error)
            self.transport.write(json.dumps(reply).encode() + b"\n")

    def connection_lost(self, error: Exception | None) -> None:
        os._exit(0)  # the kernel closes what is still open


def exit_with_stdin() -> None:
    """Block until stdin closes, which is when the parent ends; then exit."""
    while os.read(0, 1024):
        pass
    os._exit(0)


async def main(ca_file: str) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(ca_file)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1", "localhost").configure_cert(tls)

    full_port = FullPort() if sys.platform == "linux" else None
    stage = Stage(full_port)
    loop = asyncio.get_running_loop()
    local: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "backlog": 1024}
    servers = {
        "http": await loop.create_server(lambda: Connection(stage, "http"), **local),
        "tls": await loop.create_server(lambda: Connection(stage, "tls"), ssl=tls, **local),
        "mute": await loop.create_server(lambda: Connection(stage, "mute"), **local),
        "control": await loop.create_server(lambda: Control(stage), **local),
    }
    ports = {name: server.sockets[0].getsockname()[1] for name, server in servers.items()}
    print(json.dumps(ports | {"full": full_port and full_port.port}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The provider that tests talk to.")
    parser.add_argument("--ca-file", required=True, help="where to write the CA certificate (PEM)")
    arguments = parser.parse_args()
    threading.Thread(target=exit_with_stdin, daemon=True).start()
    asyncio.run(main(arguments.ca_file))
