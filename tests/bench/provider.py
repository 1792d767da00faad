"""An OpenAI-compatible provider with endless answers, that uses as little CPU as possible.

`POST /v1/chat/completions` streams one token per chunk at a fixed rate until the peer disconnects.
`GET /closes` returns what happened since the last such request. Times are `time.monotonic()`
seconds, which all processes of a machine read from the same clock.
"""

import argparse
import asyncio
import socket
import time
from typing import cast

import msgspec

TOKEN_CHARS = 6  # every token is "tokNN ", so characters / 6 = tokens
TOKENS = tuple(f"tok{number:02d} " for number in range(100))
SLOTS = 32  # of the timer wheel: a stream's slot is its phase, and one timer serves all slots
MAX_REQUEST_BYTES = 1 << 20  # many times the history of a session


class Life(msgspec.Struct, array_like=True):
    """One stream: when its first token was due, and when the provider saw its connection close."""

    first_due: float
    closed_at: float


class Closes(msgspec.Struct):
    """The answer to `GET /closes`."""

    posts: int
    closes: dict[str, Life]


class _Message(msgspec.Struct):
    role: str
    content: str | None = None


class _Completion(msgspec.Struct):
    messages: list[_Message]


_decode_completion = msgspec.json.Decoder(_Completion).decode
_encode = msgspec.json.encode


def _chunk(delta: dict[str, str]) -> bytes:
    body = b"data: %b\n\n" % _encode(
        {
            "id": "chatcmpl-bench0123456789abcdef",
            "object": "chat.completion.chunk",
            "created": 1740000000,
            "model": "bench",
            "system_fingerprint": None,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
        }
    )
    return b"%x\r\n%b\r\n" % (len(body), body)


CHUNKS = tuple(_chunk({"content": token}) for token in TOKENS)
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
) + _chunk({"role": "assistant", "content": ""})


class Provider:
    """A timer wheel that turns `rate` times a second, and the record of closed connections."""

    def __init__(self, rate: float) -> None:
        self.step = 1 / rate / SLOTS
        self.slots: list[set[Stream]] = [set() for _ in range(SLOTS)]
        self.epoch = time.monotonic()
        self.turn = 0
        self.arrivals = 0
        self.report = Closes(posts=0, closes={})
        self.loop = asyncio.get_running_loop()
        self.tick()

    def tick(self) -> None:
        """Write every token that is due, including those of slots that a late timer has missed."""
        now = time.monotonic()
        while (due := self.epoch + self.turn * self.step) <= now:
            for stream in self.slots[self.turn % SLOTS]:
                stream.write_token(due)
            self.turn += 1
        self.loop.call_later(due - now, self.tick)

    def place(self) -> "set[Stream]":
        """The slot of the next stream. Round robin, so that phases are spread evenly."""
        self.arrivals += 1
        return self.slots[self.arrivals * 13 % SLOTS]  # 13: consecutive streams get distant phases

    def take_report(self) -> Closes:
        report, self.report = self.report, Closes(posts=0, closes={})
        return report


class Stream(asyncio.Protocol):
    """A connection from the server under test, or from the driver for `GET /closes`."""

    transport: asyncio.Transport

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.received = b""
        self.request_id = ""
        self.slot: set[Stream] | None = None
        self.position = 0
        self.first_due = 0.0
        self.paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's own does not inherit it

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, blank_line, body = self.received.partition(b"\r\n\r\n")
        if not blank_line:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if length > MAX_REQUEST_BYTES:
            self.transport.abort()
        elif len(body) >= length:
            self.received = body[length:]
            self.answer(head, body[:length])

    def answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET /closes "):
            report = _encode(self.provider.take_report())
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(report), report)
            )
            self.transport.close()
        elif head.startswith(b"POST /v1/chat/completions "):
            users = [m for m in _decode_completion(body).messages if m.role == "user"]
            self.request_id = (users[-1].content or "").strip()
            self.provider.report.posts += 1
            self.transport.write(HEAD)
            self.slot = self.provider.place()
            self.slot.add(self)
        else:
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    def write_token(self, due: float) -> None:
        if self.paused:  # a slow peer gets fewer tokens, so that no queue grows
            return
        if not self.first_due:
            self.first_due = due
        self.transport.write(CHUNKS[self.position % 100])
        self.position += 1

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    def eof_received(self) -> None:
        self.end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        """Record the close, once: at the end of the stream or the loss of the connection."""
        if self.slot is not None:
            self.slot.discard(self)
            self.slot = None
            self.provider.report.closes[self.request_id] = Life(self.first_due, time.monotonic())


async def serve(port: int, rate: float) -> None:
    """Print the port when ready, and serve on loopback until the process ends."""
    provider = Provider(rate)
    listener = socket.create_server(("127.0.0.1", port), backlog=1024)
    server = await asyncio.get_running_loop().create_server(
        lambda: Stream(provider), sock=listener, backlog=1024
    )
    print(f"ready {listener.getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=30.0, help="tokens per second and stream")
    options = parser.parse_args()
    try:
        import uvloop
    except ImportError:  # in the tests: it is in the extra `bench`
        asyncio.run(serve(options.port, options.rate))
    else:
        uvloop.run(serve(options.port, options.rate))


if __name__ == "__main__":
    main()
