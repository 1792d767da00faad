"""The idle sessions: they register all at once, and then answer pings and heartbeats only.

Started by `idle`. Prints `ready <seconds>` once all have registered, and on SIGTERM the crowd's
counts as JSON.
"""

import argparse
import gc
import os
import time

import msgspec

from tests.bench.crowd import TEXT, Crowd, WebSocketPeer, message, say

CONNECTING = 200
"""Connections that are not registered yet, at once. With more, the kernel's queue of the listening
socket overflows, and it answers those only after a second."""

REGISTER_SECONDS = 120.0
"""For all to register."""


class Idler(WebSocketPeer):
    """A registered client that asks nothing."""

    def took(self, opcode: int, payload: bytes) -> None:
        if opcode == TEXT and b'"HEARTBEAT"' in payload:
            self.send(message("HEARTBEAT_REPLY", {"client_status": "ONLINE"}, self.session_id))


def run(crowd: Crowd, sessions: int) -> None:
    """Register so many sessions, and keep them until SIGTERM."""
    began = time.monotonic()
    counts = crowd.counts
    peers: list[Idler] = []
    while counts.registered < sessions and not crowd.is_stopping:
        connecting = len(peers) - counts.registered
        new = min(CONNECTING - connecting, sessions - len(peers))
        peers += [Idler(crowd) for _ in range(new)]
        crowd.poll()
        seconds = time.monotonic() - began
        if counts.lost or seconds > REGISTER_SECONDS:
            say(
                f"failed: {counts.registered} of {sessions} sessions registered in "
                f"{seconds:.1f} s, {counts.lost} connections were lost"
            )
            return
    say(f"ready {time.monotonic() - began:.2f}")
    gc.freeze()
    while not crowd.is_stopping:
        crowd.poll()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, required=True)
    parser.add_argument("--port", type=int, required=True, help="port of the gateway")
    options = parser.parse_args()
    if hasattr(os, "nice"):
        os.nice(19)  # so that the user, whose core this is, does not wait for them
    crowd = Crowd(options.port)
    run(crowd, options.sessions)
    say(msgspec.json.encode(crowd.counts).decode())


if __name__ == "__main__":
    main()
