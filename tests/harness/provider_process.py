"""The test provider as a test sees it: start it, hand it scripts, wait for what it saw.

    with ProviderProcess() as provider:
        name = provider.fresh(scripts.idle_mid_stream(["Hello"]))
        ...                                   # make the code under test ask for it
        post = provider.wait_post(script=name)
        ...                                   # interrupt
        closed = provider.wait_closed(post.conn)
        assert closed.time - interrupted_at < 0.05

Standard library in blocking style only, so it works in a plain process and in one patched by
gevent. One process can serve a whole test run: ``fresh()`` and ``unique()`` give names that no
other test uses, and each method that reads the journal can be limited to a script, or to what came
after a moment (``since``).
"""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from .process import ROOT
from .scripts import Step

SHOWN_EVENTS = 40  # of the journal, in a failure


@dataclass(frozen=True, slots=True)
class Event:
    """What the provider saw, and when."""

    time: float  # time.monotonic() of the provider: on one machine, comparable with ours
    conn: int  # the connection, numbered from 1 over all ports


@dataclass(frozen=True, slots=True)
class ConnectedEvent(Event):
    """A connection was accepted; on the TLS port: and its handshake is done."""

    port: Literal["http", "tls", "mute"]


@dataclass(frozen=True, slots=True)
class ConnectingEvent(Event):
    """A client hangs in connect() to the full port (seen only during ``wait_connecting``)."""


@dataclass(frozen=True, slots=True)
class PostEvent(Event):
    """A POST was read whole; its script begins."""

    number: int  # counted from 1 over the life of the process
    script: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: Any  # decoded JSON, None where it was not JSON


@dataclass(frozen=True, slots=True)
class MarkEvent(Event):
    """A script reached its ``mark`` step."""

    script: str
    label: str


@dataclass(frozen=True, slots=True)
class BlockedEvent(Event):
    """A send has been waiting for 50 ms for the client to read."""

    script: str


@dataclass(frozen=True, slots=True)
class ScriptDoneEvent(Event):
    """A script ended; the number is that of its POST."""

    number: int
    script: str


@dataclass(frozen=True, slots=True)
class ClosedEvent(Event):
    """A connection is over, or (``client_gave_up``) the attempt at one to the full port."""

    by: Literal["client_eof", "client_reset", "client_gave_up", "provider"]
    script: str | None  # the latest on this connection
    mid_script: bool  # it was still being played
    sent_bytes: int  # bytes of scripts that the provider's kernel has taken


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals over the life of the process, and what is open now."""

    posts: int
    open: int
    sent_bytes: int


EVENTS: dict[str, type[Event]] = {
    "connected": ConnectedEvent,
    "connecting": ConnectingEvent,
    "post": PostEvent,
    "mark": MarkEvent,
    "blocked": BlockedEvent,
    "script_done": ScriptDoneEvent,
    "closed": ClosedEvent,
}
E = TypeVar("E", bound=Event)
T = TypeVar("T")


class ProviderProcess:
    """A running test provider. A wait that times out raises AssertionError with the journal."""

    base_url: str
    tls_base_url: str
    mute_base_url: str
    ca_file: str  # path of the PEM file that vouches for the TLS port
    ports: dict[str, int | None]  # http, tls, mute, full, control

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._journal: list[Event] = []
        self._by_type: defaultdict[type[Event], list[Any]] = defaultdict(list)
        self._replies: dict[int, dict[str, Any]] = {}
        self._gone = False
        self._sending = threading.Lock()  # a long command takes several writes
        self._command_ids = itertools.count(1)
        self._names = itertools.count(1)

    # Start and end

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="provider-"))
            self.ca_file = str(Path(folder) / "ca.pem")
            command = [sys.executable, "-m", f"{__package__}.provider", "--ca-file", self.ca_file]
            # Leaving the Popen closes the provider's stdin, which ends it, and waits for it.
            process = stack.enter_context(
                subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready, "the provider did not start: see stderr"
            self.ports = json.loads(ready)
            self.base_url = f"http://127.0.0.1:{self.ports['http']}/v1"
            self.tls_base_url = f"https://127.0.0.1:{self.ports['tls']}/v1"
            self.mute_base_url = f"https://127.0.0.1:{self.ports['mute']}/v1"

            address = ("127.0.0.1", self.ports["control"])
            self._control = stack.enter_context(socket.create_connection(address))
            reader = threading.Thread(target=self._read_control, name="provider-journal")
            reader.start()
            stack.callback(reader.join)
            stack.callback(self._hang_up)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _hang_up(self) -> None:
        with suppress(OSError):  # the provider may be dead already
            self._control.shutdown(socket.SHUT_RDWR)

    @property
    def full_base_url(self) -> str:
        """Connecting to it hangs. RuntimeError where that is not possible: on all but Linux."""
        if self.ports["full"] is None:
            raise RuntimeError("the full port needs Linux")
        return f"http://127.0.0.1:{self.ports['full']}/v1"

    # Telling the provider

    def script(self, name: str, steps: Sequence[Step]) -> None:
        """Define what answers a POST whose last message is ``name``. ValueError on a bad step."""
        self._command("script", name=name, steps=list(steps))

    def fresh(self, steps: Sequence[Step], prefix: str = "script") -> str:
        """Define a script under a name that is used nowhere else; returns the name."""
        name = self.unique(prefix)
        self.script(name, steps)
        return name

    def unique(self, prefix: str) -> str:
        """A new name, for a script or a key."""
        return f"{prefix}-{next(self._names)}"

    def release(self, key: str) -> None:
        """Let every ``wait`` for this key pass, now and later."""
        self._command("release", key=key)

    def counts(self) -> Counts:
        """Ask the provider; what it has seen up to its answer is then in the journal too."""
        return Counts(**self._command("counts"))

    # Reading the journal. It comes over a socket of its own, so it can lag behind an answer that
    # was already read: wait for an event first, or ask for counts().

    def posts(self, script: str | None = None) -> list[PostEvent]:
        return self._select(PostEvent, lambda post: script in (None, post.script))

    def closes(self, script: str | None = None) -> list[ClosedEvent]:
        return self._select(ClosedEvent, lambda closed: script in (None, closed.script))

    def open_connections(self, script: str | None = None) -> list[int]:
        """Those not closed, of all ports, or those whose latest POST asked for this script."""
        with self._news:
            latest = {post.conn: post.script for post in self._by_type[PostEvent]}
            closed = {closed.conn for closed in self._by_type[ClosedEvent]}
            conns = [one.conn for one in self._by_type[ConnectedEvent] if one.conn not in closed]
            return [conn for conn in conns if script in (None, latest.get(conn))]

    # Waiting for the provider; each returns the n-th event (from 1) that fits

    def wait_connected(
        self,
        n: int = 1,
        port: Literal["http", "tls", "mute"] | None = None,
        since: float = 0.0,
        timeout: float = 5,
    ) -> ConnectedEvent:
        return self._nth(
            ConnectedEvent,
            n,
            lambda event: port in (None, event.port) and event.time >= since,
            f"{n} connections (port {port})",
            timeout,
        )

    def wait_connecting(
        self, n: int = 1, since: float = 0.0, timeout: float = 5
    ) -> ConnectingEvent:
        """A client hangs in connect() to the full port; ``wait_closed`` waits for its end."""
        self._command("watch_full")
        return self._nth(
            ConnectingEvent,
            n,
            lambda event: event.time >= since,
            f"{n} that hang in connect()",
            timeout,
        )

    def wait_post(self, n: int = 1, script: str | None = None, timeout: float = 5) -> PostEvent:
        return self._nth(
            PostEvent,
            n,
            lambda post: script in (None, post.script),
            f"{n} POSTs (script {script})",
            timeout,
        )

    def wait_mark(
        self, label: str, n: int = 1, script: str | None = None, timeout: float = 5
    ) -> MarkEvent:
        return self._nth(
            MarkEvent,
            n,
            lambda mark: mark.label == label and script in (None, mark.script),
            f"{n} marks {label!r} (script {script})",
            timeout,
        )

    def wait_blocked(
        self, n: int = 1, script: str | None = None, timeout: float = 5
    ) -> BlockedEvent:
        return self._nth(
            BlockedEvent,
            n,
            lambda blocked: script in (None, blocked.script),
            f"{n} blocked sends (script {script})",
            timeout,
        )

    def wait_script_done(
        self, n: int = 1, script: str | None = None, timeout: float = 5
    ) -> ScriptDoneEvent:
        return self._nth(
            ScriptDoneEvent,
            n,
            lambda done: script in (None, done.script),
            f"{n} ends of scripts (script {script})",
            timeout,
        )

    def wait_closed(self, conn: int, timeout: float = 5) -> ClosedEvent:
        return self._nth(
            ClosedEvent,
            1,
            lambda closed: closed.conn == conn,
            f"the close of connection {conn}",
            timeout,
        )

    # Inside

    def _command(self, cmd: str, **fields: Any) -> dict[str, Any]:
        """Send one command and wait for its reply; returns the reply's own fields."""
        number = next(self._command_ids)
        line = json.dumps({"id": number, "cmd": cmd, **fields}).encode() + b"\n"
        with self._sending:
            self._control.sendall(line)
        reply = self._wait(lambda: self._replies.pop(number, None), f"the reply to {cmd}", 5)
        if error := reply.pop("error"):
            raise ValueError(error)
        return reply

    def _read_control(self) -> None:
        """Run in a thread (or greenlet) of its own until the control connection ends."""
        with suppress(OSError), self._control.makefile("rb") as lines:
            for line in lines:
                fields = json.loads(line)
                name = fields.pop("event")
                with self._news:
                    if name == "reply":
                        self._replies[fields.pop("id")] = fields
                    else:
                        event = EVENTS[name](**fields)
                        self._journal.append(event)
                        self._by_type[type(event)].append(event)
                    self._news.notify_all()
        with self._news:
            self._gone = True
            self._news.notify_all()

    def _select(self, kind: type[E], fits: Callable[[E], bool]) -> list[E]:
        with self._news:
            return [event for event in self._by_type[kind] if fits(event)]

    def _nth(
        self, kind: type[E], n: int, fits: Callable[[E], bool], what: str, timeout: float
    ) -> E:
        def look() -> E | None:
            events: list[E] = self._by_type[kind]
            return next(itertools.islice(filter(fits, events), n - 1, None), None)

        return self._wait(look, what, timeout)

    def _wait(self, look: Callable[[], T | None], what: str, timeout: float) -> T:
        deadline = time.monotonic() + timeout
        with self._news:
            while (found := look()) is None:
                left = deadline - time.monotonic()
                if self._gone or left <= 0:
                    why = "the provider is gone" if self._gone else f"{timeout} s are over"
                    raise AssertionError(f"{why}, waiting for {what}. {self._journal_text()}")
                self._news.wait(left)
            return found

    def _journal_text(self) -> str:
        shown = "".join(f"\n  {str(event)[:400]}" for event in self._journal[-SHOWN_EVENTS:])
        return f"The last of {len(self._journal)} entries:{shown or ' none'}"
