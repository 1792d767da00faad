"""The noise: clients that flood, come and go, or send garbage.

Started by `noise`, a process a kind. Prints `ready` once the noise has begun, and on SIGTERM the
crowd's counts as JSON.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from tests.bench.crowd import (
    CONT,
    PING,
    PONG,
    REGISTRATION,
    TEXT,
    UPGRADE,
    Crowd,
    Peer,
    WebSocketPeer,
    frame,
    message,
    say,
)

FLOODERS = 4
"""Connections that flood, each as fast as the gateway reads."""

VISITORS_PER_SECOND = 400
"""Connections that come and go. They do not wait for each other, up to `MAX_VISITORS`."""

MAX_VISITORS = 200
VISIT_SECONDS = 1.0
"""A visitor that gets no answer leaves after this."""

PASSWORD_LOOPS = 130
"""Clients that try one wrong password after the other."""

RETRY_SECONDS = 0.05
"""Until the connection of a flooder that was lost is made again."""

BLOB_BYTES = 48 * 1024
"""A flood is written in pieces of about this size."""

BEGIN_SECONDS = 0.5
"""The noise counts as begun after this: by then its clients have registered."""

VISIT_FRAMES = 60
"""Bad frames in a short connection."""

ACCOUNT, WRONG_PASSWORD = "somebody", "a wrong password"


@dataclass(frozen=True)
class Kind:
    """One kind of noise.

    Args:
        words: what it is, for people.
        make_peer: one of its connections.
        count: how many connections there are at once; None: `VISITORS_PER_SECOND` new ones.
        needs_auth: whether the gateway must check credentials.
    """

    words: str
    make_peer: Callable[[Crowd], Peer]
    count: int | None = FLOODERS
    needs_auth: bool = False


# Floods: connections that stay.


class Flooder(WebSocketPeer):
    """Sends the same bytes again and again, and reads all that comes.

    Args:
        crowd: to which it belongs.
        make_blob: what it sends, by its session's id.
        first: what it sends before, once.
        is_registering: whether it registers before.
    """

    def __init__(
        self,
        crowd: Crowd,
        make_blob: Callable[[str | None], bytes],
        first: bytes,
        is_registering: bool,
    ) -> None:
        super().__init__(crowd)
        self.is_registering = is_registering
        self._make_blob = make_blob
        self._first = first
        self._blob = b""

    def begin(self) -> None:
        self._blob = self._make_blob(self.session_id)
        self.send(self._first + self._blob)

    def received(self, data: bytes) -> None:
        if not self._blob:
            super().received(data)

    def more(self) -> bytes:
        return self._blob


def repeated(frames: Sequence[bytes]) -> bytes:
    """These frames, as often as they fit into a blob."""
    blob = b"".join(frames)
    return blob * max(1, BLOB_BYTES // len(blob))


def _flood(
    words: str, make_frames: Callable[[str | None], Sequence[bytes]], *, first: bytes = b""
) -> dict[str, Kind]:
    """The same flood from clients without and with a session. `words` begin with its name."""

    def make_peer(is_registering: bool) -> Callable[[Crowd], Peer]:
        return lambda crowd: Flooder(
            crowd, lambda session_id: repeated(make_frames(session_id)), first, is_registering
        )

    name, words = words.split(": ")
    return {
        name: Kind(f"{words}, not registered", make_peer(False)),
        f"{name}-registered": Kind(f"{words}, registered", make_peer(True)),
    }


def _messages(msg_type: str, payloads: Sequence[object]) -> Callable[[str | None], Sequence[bytes]]:
    return lambda session_id: [message(msg_type, payload, session_id) for payload in payloads]


FLOODS: dict[str, Kind] = {
    **_flood("tiny-frames: messages of 2 bytes", lambda _: [frame(TEXT, b"{}")]),
    **_flood("empty-frames: messages of 0 bytes", lambda _: [frame(TEXT, b"")]),
    **_flood("pings: empty pings", lambda _: [frame(PING, b"")]),
    **_flood("pongs: empty pongs", lambda _: [frame(PONG, b"")]),
    **_flood(
        "fragments: one message in fragments of 2 bytes",
        lambda _: [frame(CONT, b"xx", fin=False)],
        first=frame(TEXT, b"xx", fin=False),
    ),
    **_flood(
        "empty-fragments: one message in empty fragments",
        lambda _: [frame(CONT, b"", fin=False)],
        first=frame(TEXT, b"xx", fin=False),
    ),
    # Refused before and after a registration: the credentials are missing.
    **_flood("register: REGISTER", _messages("REGISTER", [{"auth": None}])),
    # Valid up to its update, which deletes a function that is not there.
    **_flood(
        "request: REQUEST that is refused",
        _messages(
            "REQUEST",
            [
                {
                    "request_id": "refused",
                    "data_type": "TEXT",
                    "content": {"text": "hello"},
                    "function_calling_op": "DELETE",
                    "function_calling": ["nothing"],
                }
            ],
        ),
    ),
    **_flood(
        "interrupt: INTERRUPT of unknown ids",
        _messages("INTERRUPT", [{"interrupt_request_id": f"unknown_{n}"} for n in range(200)]),
    ),
    **_flood("health-check: HEALTH_CHECK", _messages("HEALTH_CHECK", [{}])),
    **_flood("session-query: SESSION_QUERY", _messages("SESSION_QUERY", [{}])),
    **_flood("heartbeat-reply: HEARTBEAT_REPLY", _messages("HEARTBEAT_REPLY", [{}])),
    **_flood("bad-json: malformed JSON", lambda _: [frame(TEXT, b'{"msg_type": "REQUEST", "pay')]),
}


# Visits: connections that come and go.


class Visitor(Peer):
    """Sends something, and leaves at the first answer or after `VISIT_SECONDS`."""

    def __init__(self, crowd: Crowd, data: bytes) -> None:
        super().__init__(crowd)
        self._data = data

    def opened(self) -> None:
        self.send(self._data)

    def received(self, data: bytes) -> None:
        self.end()


class ShortClient(WebSocketPeer):
    """Shakes hands, sends a few bad frames, and leaves at the first answer."""

    is_registering = False

    def begin(self) -> None:
        self.send(frame(TEXT, b"{") * VISIT_FRAMES)

    def took(self, opcode: int, payload: bytes) -> None:
        self.end()


class WrongPassword(WebSocketPeer):
    """Registers with a wrong password, until the gateway closes the connection."""

    is_registering = False

    def begin(self) -> None:
        auth = {"type": "ACCOUNT", "account": ACCOUNT, "password": WRONG_PASSWORD}
        self.send(message("REGISTER", REGISTRATION | {"auth": auth}))


_random = random.Random(7)

GETS = [
    b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path
    for path in (b"/health", b"/", b"/nothing", b"/client/index.js")
]

GARBAGE = [
    *(_random.randbytes(size) for size in (1, 16, 200, 4000, 60_000)),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _random.randbytes(500),  # begins as TLS does
    b"\r\n" * 2000,
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 2000,
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\nhello",
    UPGRADE.replace(b"Host: 127.0.0.1", b"Host: evil.example"),
    UPGRADE.replace(b"13", b"99"),
    UPGRADE.replace(b"websocket", b"\xff\xfe"),
    UPGRADE[:-2],  # goes on, and never ends
]


def _visits(parts: Sequence[bytes]) -> Callable[[Crowd], Peer]:
    """Visitors that take turns to send these."""
    return lambda crowd: Visitor(crowd, parts[crowd.counts.connections % len(parts)])


VISITS: dict[str, Kind] = {
    "short-connections": Kind(
        f"connections with {VISIT_FRAMES} bad frames, {VISITORS_PER_SECOND} a second",
        ShortClient,
        count=None,
    ),
    "gets": Kind(f"plain GETs, {VISITORS_PER_SECOND} a second", _visits(GETS), count=None),
    "garbage": Kind(
        f"garbage before the handshake, {VISITORS_PER_SECOND} a second",
        _visits(GARBAGE),
        count=None,
    ),
    "wrong-passwords": Kind(
        f"{PASSWORD_LOOPS} clients with wrong passwords",
        WrongPassword,
        count=PASSWORD_LOOPS,
        needs_auth=True,
    ),
}

KINDS = FLOODS | VISITS


def run(kind: Kind, crowd: Crowd) -> None:
    """Make this noise until SIGTERM."""
    peers: list[tuple[float, Peer]] = []  # with the time when each was made
    began = retry_at = time.monotonic()
    visits_due = 0
    is_ready = False
    while not crowd.is_stopping:
        now = time.monotonic()
        peers = [(made_at, peer) for made_at, peer in peers if not peer.is_over]
        new = 0
        if kind.count is None:
            for made_at, peer in peers:
                if now - made_at > VISIT_SECONDS:
                    peer.end()
            # Those that find no place now do not come later, all together.
            new = min(
                int((now - began) * VISITORS_PER_SECOND) - visits_due, MAX_VISITORS - len(peers)
            )
            visits_due = int((now - began) * VISITORS_PER_SECOND)
        elif now >= retry_at:
            new = kind.count - len(peers)
            retry_at = now + RETRY_SECONDS
        peers += [(now, kind.make_peer(crowd)) for _ in range(new)]
        crowd.poll(1 / VISITORS_PER_SECOND if kind.count is None else RETRY_SECONDS)
        if not is_ready and now - began > BEGIN_SECONDS:
            is_ready = True
            say("ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--port", type=int, required=True, help="port of the gateway")
    options = parser.parse_args()
    if hasattr(os, "nice"):
        os.nice(19)  # so that the user, whose core this is, does not wait for the noise itself
    crowd = Crowd(options.port)
    run(KINDS[options.kind], crowd)
    say(msgspec.json.encode(crowd.counts).decode())


if __name__ == "__main__":
    main()
