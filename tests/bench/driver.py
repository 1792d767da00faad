"""The load: one WebSocket per stream. Each sends a request, reads, interrupts, and starts again.

The client end of the WebSocket is written by hand and has only what the benchmark needs (RFC 6455,
unfragmented frames), so that 12,000 frames a second leave the core half idle. The client library
makes only the few frames that are sent: reading with it blocks, and takes several times as long per
frame. Prints one `Report` as JSON at the end.
"""

import argparse
import asyncio
import gc
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import cast

import msgspec
import psutil
import uvloop

from gateway.client import PATH, encode_frame
from tests.bench.provider import TOKEN_CHARS, TOKENS, Closes, Life

INTERRUPT_AFTER_SECONDS = (1.0, 3.0)  # after the REQUEST, uniform: one in two seconds
SETTLE_SECONDS = 5.0  # for acks and closes after the window; later ones count as missing
DELAY_SAMPLE = 16  # the delay is measured in one of this many frames
ERRORS_KEPT = 5

_ROUND_CHARS = TOKEN_CHARS * len(TOKENS)
_TEXT = "".join(TOKENS) * 8  # the text of an answer from any token on, longer than any frame

_UPGRADE = (
    b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13\r\n\r\n" % PATH.encode()
)
_NORMAL_CLOSURE = (1000).to_bytes(2, "big")
_TEXT_FRAME, _CLOSE_FRAME, _PING_FRAME, _PONG_FRAME = 0x81, 0x88, 0x89, 0x8A


class Report(msgspec.Struct):
    """The result of one run of one side. CPU and times in seconds, `*_ms` in milliseconds."""

    streams: int
    window: float
    tokens: int
    frames: int
    late_frames: int
    interrupts: int
    acks_missing: int
    acks_not_stopped: int
    closes_missing: int
    ack_ms: list[float]
    close_ms: list[float]
    delay_ms: list[float]
    requests: int
    posts: int
    server_cpu: float
    driver_cpu: float
    provider_cpu: float
    cores_busy: list[float]
    rss_idle_bytes: int
    rss_bytes: int
    error_count: int
    errors: list[str]


class _Content(msgspec.Struct):
    text: str = ""


class _Payload(msgspec.Struct):
    request_id: str | None = None
    text_stream_seq: int | None = None
    content: _Content | None = None
    interrupted: bool = False
    interrupt_request_id: str | None = None
    interrupted_request_ids: list[str] = []
    status: str | None = None
    error_code: str | None = None
    error_detail: str | None = None


class _Frame(msgspec.Struct):
    msg_type: str
    payload: _Payload
    session_id: str | None = None


_decode = msgspec.json.Decoder(_Frame).decode


class Load:
    """What all streams share: the settings of the run and its counts."""

    def __init__(self, streams: int, seed: int, rate: float) -> None:
        self.streams = streams
        self.seed = seed
        self.period = 1 / rate
        self.loop = asyncio.get_running_loop()
        self.registered = 0
        self.all_registered = asyncio.Event()
        self.measuring = False
        self.stopping = False
        self.requests = 0
        self.tokens = 0
        self.frames = 0
        self.late_frames = 0
        self.acks_not_stopped = 0
        self.sent: dict[str, float] = {}
        self.acked: dict[str, float] = {}
        self.samples: list[tuple[str, int, float]] = []
        self.error_count = 0
        self.errors: list[str] = []

    def error(self, what: str) -> None:
        self.error_count += 1
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(what)


class Stream(asyncio.Protocol):
    """One client. `request_id` is the live request; `interrupted` and `acked` are its state."""

    transport: asyncio.Transport

    def __init__(self, load: Load, index: int) -> None:
        self.load = load
        self.index = index
        self.random = random.Random(load.seed * 100_003 + index)
        self.rest = b""
        self.upgraded = False
        self.closing = False
        self.lost = False
        self.session_id: str | None = None
        self.number = 0
        self.request_id = ""
        self.seq = 0
        self.chars = 0
        self.interrupted = False
        self.acked = False

    # Bytes in, frames out.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own does not inherit it
        self.transport.write(_UPGRADE)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.closing:
            self.load.error(f"connection lost: {exc!r}")

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        buffer = self.rest + data if self.rest else data
        size = len(buffer)
        start = 0
        if not self.upgraded:
            start = buffer.find(b"\r\n\r\n") + 4
            if start == 3:
                self.rest = buffer
                return
            if not buffer.startswith(b"HTTP/1.1 101 "):
                self.load.error(f"not upgraded: {buffer[:80]!r}")
                self.transport.close()
                return
            self.upgraded = True
            self.register()
        while size - start >= 2:
            head = start + 2
            length = buffer[start + 1]
            if length == 126:
                head += 2
                length = int.from_bytes(buffer[start + 2 : head], "big")
            elif length == 127:
                head += 8
                length = int.from_bytes(buffer[start + 2 : head], "big")
            end = head + length
            if end > size:
                break
            opcode = buffer[start]
            if opcode == _TEXT_FRAME:
                self.receive(_decode(buffer[head:end]))
            elif opcode == _PING_FRAME:
                self.write_frame(_PONG_FRAME, buffer[head:end])
            elif opcode == _CLOSE_FRAME:
                self.load.error(f"closed by the server: {buffer[head:end]!r}")
                self.close()
                return
            else:
                self.load.error(f"unexpected frame, first byte {opcode:#x}")
            start = end
        self.rest = buffer[start:]

    def write_frame(self, opcode: int, payload: bytes) -> None:
        """Write a masked frame. The mask is zero, so masking does not change the payload."""
        length = len(payload)
        if length < 126:
            head = bytes((opcode, 0x80 | length))
        else:
            head = bytes((opcode, 0xFE)) + length.to_bytes(2, "big")
        self.transport.write(head + b"\0\0\0\0" + payload)

    def send(self, msg_type: str, payload: dict[str, object]) -> None:
        self.write_frame(_TEXT_FRAME, encode_frame(msg_type, payload, self.session_id))

    def close(self) -> None:
        """Send a close frame. The server then closes the socket (RFC 6455, 7.1.1)."""
        self.closing = True
        if not self.lost:
            self.write_frame(_CLOSE_FRAME, _NORMAL_CLOSURE)

    # The conversation.

    def register(self) -> None:
        self.send(
            "REGISTER",
            {
                "auth": {"type": "API_KEY", "api_key": "bench"},
                "platform": "WEB",
                "require_tts": False,
                "enable_srs": False,
                "function_calling": [],
            },
        )

    def request(self) -> None:
        self.number += 1
        self.request_id = f"req_{self.load.seed}_{self.index}_{self.number}"
        self.seq = self.chars = 0
        self.interrupted = self.acked = False
        self.load.requests += 1
        self.send(
            "REQUEST",
            {
                "request_id": self.request_id,
                "data_type": "TEXT",
                "stream_flag": False,
                "stream_seq": 0,
                "content": {"text": self.request_id},
            },
        )
        wait_seconds = self.random.uniform(*INTERRUPT_AFTER_SECONDS)
        self.load.loop.call_later(wait_seconds, self.interrupt)

    def interrupt(self) -> None:
        if self.load.stopping or self.closing:
            return
        self.interrupted = True
        if self.load.measuring:
            self.load.sent[self.request_id] = time.monotonic()
        self.send("INTERRUPT", {"interrupt_request_id": self.request_id, "reason": "USER_STOP"})

    def receive(self, frame: _Frame) -> None:
        payload = frame.payload
        if frame.msg_type == "RESPONSE":
            if payload.text_stream_seq == -1:
                self.receive_terminal(payload)
            else:
                self.receive_data(payload)
        elif frame.msg_type == "INTERRUPT_ACK":
            self.receive_ack(payload)
        elif frame.msg_type == "REGISTER_ACK":
            self.session_id = frame.session_id
            self.load.registered += 1
            if self.load.registered == self.load.streams:
                self.load.all_registered.set()
            self.request()
        elif frame.msg_type == "HEARTBEAT":
            self.send("HEARTBEAT_REPLY", {"client_status": "ONLINE"})
        else:
            self.load.error(f"{frame.msg_type} {payload.error_code} {payload.error_detail}")

    def receive_data(self, payload: _Payload) -> None:
        load = self.load
        text = payload.content.text if payload.content is not None else ""
        if payload.request_id != self.request_id or self.acked:
            load.late_frames += 1
            return
        if payload.text_stream_seq != self.seq:
            load.error(f"text_stream_seq {payload.text_stream_seq}, expected {self.seq}")
        if not _TEXT.startswith(text, self.chars % _ROUND_CHARS):
            load.error(f"wrong text after {self.chars} characters: {text[:40]!r}")
        if load.measuring:
            load.frames += 1
            load.tokens += len(text) // TOKEN_CHARS
            if self.seq % DELAY_SAMPLE == 0:
                sample = (self.request_id, self.chars // TOKEN_CHARS, time.monotonic())
                load.samples.append(sample)
        self.seq += 1
        self.chars += len(text)

    def receive_ack(self, payload: _Payload) -> None:
        now = time.monotonic()
        request_id = self.request_id
        if self.acked or not self.interrupted or payload.interrupt_request_id != request_id:
            self.load.error(f"unexpected INTERRUPT_ACK for {payload.interrupt_request_id}")
            return
        if payload.status != "SUCCESS" or payload.interrupted_request_ids != [request_id]:
            self.load.acks_not_stopped += 1
        self.acked = True
        if request_id in self.load.sent:
            self.load.acked[request_id] = now

    def receive_terminal(self, payload: _Payload) -> None:
        if payload.request_id != self.request_id or not (self.acked and payload.interrupted):
            self.load.error(f"unexpected terminal frame of {payload.request_id}")
        if not self.load.stopping:
            self.request()


class Usage(msgspec.Struct):
    """CPU seconds so far, of each process of the benchmark, and of each core for all processes."""

    at: float
    server: float
    driver: float
    provider: float
    cores: list[float]


class Meter:
    """Reads the CPU and memory of the processes. The server's include its children."""

    def __init__(self, server_pid: int, provider_pid: int) -> None:
        self.server = psutil.Process(server_pid)
        self.provider = psutil.Process(provider_pid)
        self.driver = psutil.Process()

    def usage(self) -> Usage:
        family = [self.server, *self.server.children(recursive=True)]
        return Usage(
            at=time.monotonic(),
            server=sum(_cpu_seconds(process) for process in family),
            driver=_cpu_seconds(self.driver),
            provider=_cpu_seconds(self.provider),
            cores=[_busy_seconds(core) for core in psutil.cpu_times(percpu=True)],
        )

    def rss_bytes(self) -> int:
        family = [self.server, *self.server.children(recursive=True)]
        return sum(process.memory_info().rss for process in family)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _busy_seconds(core: object) -> float:
    """Busy seconds of a core. Includes hardware interrupts, which Linux also counts for the process
    that they interrupt."""
    fields = ("user", "nice", "system", "irq", "softirq")
    return sum(float(getattr(core, field, 0.0)) for field in fields)


async def _fetch_closes(port: int) -> Closes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /closes HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return msgspec.json.decode(answer.partition(b"\r\n\r\n")[2], type=Closes)


async def _settle(done: Callable[[], bool]) -> None:
    """Wait until `done` returns True, for at most `SETTLE_SECONDS`."""
    give_up_at = time.monotonic() + SETTLE_SECONDS
    while not done() and time.monotonic() < give_up_at:
        await asyncio.sleep(0.02)


def _itself(stream: Stream) -> Stream:
    return stream


async def drive(options: argparse.Namespace) -> Report:
    """Connect, warm up, measure for `options.seconds`, and collect the report."""
    load = Load(options.streams, options.seed, options.rate)
    meter = Meter(options.server_pid, options.provider_pid)
    await _fetch_closes(options.provider_port)  # discard what earlier runs have left
    rss_idle_bytes = meter.rss_bytes()

    streams = [Stream(load, index) for index in range(options.streams)]
    for stream in streams:
        await load.loop.create_connection(partial(_itself, stream), "127.0.0.1", options.port)
    async with asyncio.timeout(30):
        await load.all_registered.wait()
    await asyncio.sleep(options.warmup)

    gc.collect()
    gc.disable()  # a collection would delay the load; it ends soon and makes few cycles
    before = meter.usage()
    load.measuring = True
    await asyncio.sleep(options.seconds)
    load.measuring = False
    after = meter.usage()
    rss_bytes = meter.rss_bytes()

    load.stopping = True
    await _settle(lambda: len(load.acked) == len(load.sent))
    posts = 0
    lives: dict[str, Life] = {}
    give_up_at = time.monotonic() + SETTLE_SECONDS
    while True:
        closes = await _fetch_closes(options.provider_port)
        posts += closes.posts
        lives |= closes.closes
        if load.sent.keys() <= lives.keys() and posts >= load.requests:
            break
        if time.monotonic() > give_up_at:
            break
        await asyncio.sleep(0.05)
    for stream in streams:
        stream.close()
    await _settle(lambda: all(stream.lost for stream in streams))

    return Report(
        streams=options.streams,
        window=after.at - before.at,
        tokens=load.tokens,
        frames=load.frames,
        late_frames=load.late_frames,
        interrupts=len(load.sent),
        acks_not_stopped=load.acks_not_stopped,
        acks_missing=len(load.sent.keys() - load.acked.keys()),
        closes_missing=len(load.sent.keys() - lives.keys()),
        ack_ms=[(at - load.sent[key]) * 1000 for key, at in load.acked.items()],
        close_ms=[
            (lives[key].closed_at - at) * 1000 for key, at in load.sent.items() if key in lives
        ],
        delay_ms=[
            (at - lives[key].first_due - token * load.period) * 1000
            for key, token, at in load.samples
            if key in lives
        ],
        requests=load.requests,
        posts=posts,
        server_cpu=after.server - before.server,
        driver_cpu=after.driver - before.driver,
        provider_cpu=after.provider - before.provider,
        cores_busy=[b - a for a, b in zip(before.cores, after.cores, strict=True)],
        rss_idle_bytes=rss_idle_bytes,
        rss_bytes=rss_bytes,
        error_count=load.error_count,
        errors=load.errors,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="port of the server under test")
    parser.add_argument("--server-pid", type=int, required=True)
    parser.add_argument("--provider-port", type=int, required=True)
    parser.add_argument("--provider-pid", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup", type=float, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True, help="seed of the interrupt times")
    report = msgspec.json.encode(uvloop.run(drive(parser.parse_args())))
    # Buffered even with PYTHONUNBUFFERED: if libuv uses io_uring, a write to a full pipe may write
    # only a part, and an unbuffered file does not write the rest.
    with open(sys.stdout.fileno(), "wb", closefd=False) as output:
        output.write(report)


if __name__ == "__main__":
    main()
