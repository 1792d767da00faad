"""The yardstick: a compact asyncio relay that speaks the same frames as the gateway.

An expert could write it in an afternoon. It uses the fastest parts for Python (uvloop, orjson,
aiohttp's C parser, websockets without compression), and has none of the gateway's guarantees: no
history, session timeouts, limits, retries, metrics or reaper, and one request at a time. Like the
gateway, it sends INTERRUPT_ACK only when the provider's stream is closed.
"""

import argparse
import asyncio
import contextlib
import secrets
import time
from http import HTTPStatus
from typing import Any

import aiohttp
import orjson
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

_DATA = b"data: "
_DONE = b"data: [DONE]"
_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream"}
# The same timeouts as the gateway: to connect, and between two pieces of an answer.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=60)


class Generation:
    """One answer on its way from the provider to the client."""

    def __init__(self, session: "Session", request_id: str, text: str) -> None:
        self.session = session
        self.request_id = request_id
        self.seq = 0
        self.chars = 0
        self.task = asyncio.create_task(self.run(text))

    async def run(self, text: str) -> None:
        """Relay until the answer ends, or until cancelled. On return, the stream is closed."""
        try:
            body = orjson.dumps(
                {
                    "model": "bench",
                    "messages": [{"role": "user", "content": text}],
                    "stream": True,
                }
            )
            response = await self.session.http.post(self.session.url, data=body, headers=_HEADERS)
            try:
                response.raise_for_status()
                await self.relay(response)
            finally:
                await _close(response)
            await self.finish("COMPLETED")
        except (asyncio.CancelledError, ConnectionClosed):
            # Interrupted, or the client is gone, and the provider's stream is closed. Not raised
            # again: a task that keeps its CancelledError leaves a cycle of 40 objects to collect.
            pass
        except (aiohttp.ClientError, TimeoutError, ValueError) as exc:
            await self.session.send(
                "ERROR",
                {
                    "error_code": "INTERNAL_ERROR",
                    "error_msg": str(exc),
                    "retryable": True,
                    "request_id": self.request_id,
                    "outcome": "FAILED",
                },
            )
        finally:
            self.session.generations.pop(self.request_id, None)

    async def relay(self, response: aiohttp.ClientResponse) -> None:
        """Relay the stream. The text of one read becomes one frame."""
        send = self.session.send
        request_id = self.request_id
        rest = b""
        async for data in response.content.iter_any():
            *lines, rest = (rest + data).split(b"\n") if rest else data.split(b"\n")
            text = ""
            done = False
            for line in lines:
                if line.startswith(_DATA):
                    if line.startswith(_DONE):
                        done = True
                        break
                    for choice in orjson.loads(line[6:])["choices"]:
                        text += choice["delta"].get("content") or ""
            if text:
                seq = self.seq
                self.seq = seq + 1
                self.chars += len(text)
                await send(
                    "RESPONSE",
                    {
                        "request_id": request_id,
                        "text_stream_seq": seq,
                        "content": {"text": text},
                    },
                )
            if done:
                return

    async def finish(self, outcome: str, **extra: Any) -> None:
        await self.session.send(
            "RESPONSE",
            {
                "request_id": self.request_id,
                "text_stream_seq": -1,
                "content": {},
                "outcome": outcome,
                **extra,
            },
        )

    async def interrupt(self) -> None:
        """Stop the generation. On return, the provider's stream is closed."""
        self.task.cancel()
        await asyncio.wait((self.task,))


async def _close(response: aiohttp.ClientResponse) -> None:
    """Close the connection of a response and wait until its socket is closed."""
    connection = response.connection
    protocol = connection.protocol if connection is not None else None
    closed = protocol.closed if protocol is not None else None
    response.close()
    if closed is not None:
        await asyncio.wait((closed,))


class Session:
    """One client: reads its frames and sends frames to it."""

    def __init__(self, ws: ServerConnection, http: aiohttp.ClientSession, url: str) -> None:
        self.ws = ws
        self.http = http
        self.url = url
        self.session_id: str | None = None
        self.generations: dict[str, Generation] = {}

    async def send(self, msg_type: str, payload: dict[str, Any]) -> None:
        frame = orjson.dumps(
            {
                "version": "1.0",
                "msg_type": msg_type,
                "session_id": self.session_id,
                "payload": payload,
                "timestamp": int(time.time() * 1000),
            }
        )
        await self.ws.send(frame, text=True)

    async def run(self) -> None:
        try:
            while True:
                frame = orjson.loads(await self.ws.recv(decode=False))
                await self.receive(frame["msg_type"], frame["payload"])
        except ConnectionClosed:
            pass
        finally:
            for generation in list(self.generations.values()):
                generation.task.cancel()

    async def receive(self, msg_type: str, payload: dict[str, Any]) -> None:
        if msg_type == "REGISTER":
            self.session_id = f"sess_{secrets.token_hex(8)}"
            await self.send(
                "REGISTER_ACK",
                {
                    "status": "SUCCESS",
                    "message": "",
                    "session_id": self.session_id,
                    "session_timeout_seconds": 3600,
                },
            )
        elif msg_type == "REQUEST":
            request_id = payload["request_id"]
            generation = Generation(self, request_id, payload["content"]["text"])
            self.generations[request_id] = generation
        elif msg_type == "INTERRUPT":
            await self.interrupt(payload["interrupt_request_id"], payload.get("reason"))

    async def interrupt(self, request_id: str, reason: str | None) -> None:
        read_at = time.monotonic()
        generation = self.generations.pop(request_id, None)
        if generation is not None:
            await generation.interrupt()
        result = {
            "request_id": request_id,
            "outcome": "STOPPED" if generation else "UNKNOWN",
            "delivered_text_chars": generation.chars if generation else 0,
            "stream_closed_ms": (time.monotonic() - read_at) * 1000 if generation else None,
        }
        await self.send(
            "INTERRUPT_ACK",
            {
                "interrupt_request_id": request_id,
                "interrupted_request_ids": [request_id] if generation else [],
                "status": "SUCCESS" if generation else "FAILED",
                "message": "",
                "results": [result],
            },
        )
        if generation is not None:
            await generation.finish("INTERRUPTED", interrupted=True, interrupt_reason=reason)


def _health(connection: ServerConnection, request: Request) -> Response | None:
    if request.path == "/health":
        return connection.respond(HTTPStatus.OK, "{}\n")
    return None


async def relay(port: int, llm_url: str) -> None:
    """Serve on loopback until the process ends."""
    url = f"{llm_url}/chat/completions"
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as http:

        async def handle(ws: ServerConnection) -> None:
            await Session(ws, http, url).run()

        # uvloop sets TCP_NODELAY on every connection, in and out.
        async with serve(
            handle, "127.0.0.1", port, compression=None, process_request=_health, backlog=1024
        ) as server:
            print(f"ready {port}", flush=True)
            await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--llm-url", required=True, help="up to and including /v1")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(relay(options.port, options.llm_url))


if __name__ == "__main__":
    main()
