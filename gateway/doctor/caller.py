"""A client that examines: of all that it meets, it keeps a record, and says what is wrong in words.

In the order in which one stands on the other:

    Target    where the daemon is, and what is said to it for a registration
    dial …    bytes: connections and HTTP, of which every wait has an end
    Talk      frames: a WebSocket, with a record of what came and in which order

What a server says is shown as it is, but short, and without what a terminal would take for a
command. `gateway/doctor/doctor.py` does the asking.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import SplitResult, urlsplit

import gevent
import msgspec
from msgspec import UNSET, UnsetType
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from actors.session.profile import Platform
from actors.words import InterruptReason, OnNewRequest, Outcome
from gateway.wire.frames import (
    PATH,
    SERVER_PAYLOADS,
    VERSION,
    AccountAuth,
    ApiKeyAuth,
    ClientPayload,
    Error,
    Heartbeat,
    HeartbeatReply,
    Interrupt,
    InterruptAck,
    Register,
    RegisterAck,
    Request,
    RequestContent,
    Response,
    Shutdown,
)

KEY_VARIABLE = "BARGEIN_DOCTOR_API_KEY"
ACCOUNT_VARIABLE = "BARGEIN_DOCTOR_ACCOUNT"
PASSWORD_VARIABLE = "BARGEIN_DOCTOR_PASSWORD"

_MAX_PAGE_BYTES = 8 * 1024 * 1024
_MAX_FRAME_BYTES = 4 * 1024 * 1024
_BODY_SECONDS = 2.0
_READ_BYTES = 64 * 1024
_MAX_QUOTED_CHARS = 160

_P = TypeVar("_P")


# Where it is, and how long to wait --------------------------------------------------------------


class UsageError(Exception):
    """What was given on the command line or in the environment cannot be used."""


@dataclass(frozen=True)
class Address:
    """One port of a server."""

    host: str
    port: int
    is_tls: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Target:
    """What is examined.

    Args:
        url: the WebSocket, in full.
        ops_url: its metrics; None where nobody knows.
        is_ops_given: whether somebody said so, or it is the usual place.
        auth: what REGISTER says; its texts are shown nowhere.
        tls: of both, where they are encrypted.
    """

    url: SplitResult
    ops_url: SplitResult | None
    is_ops_given: bool
    auth: ApiKeyAuth | AccountAuth
    tls: ssl.SSLContext

    @property
    def shown(self) -> str:
        """The URL for people: without a query, which may hold a secret."""
        return f"{self.url.scheme}://{self.url.netloc}{self.url.path}"

    @property
    def usual(self) -> str:
        """The URL that it most likely has."""
        return f"{self.url.scheme}://{self.url.netloc}{PATH}"

    @property
    def address(self) -> Address:
        """Where it listens."""
        return address_of(self.url)

    @property
    def health_path(self) -> str:
        """Beside the WebSocket, where that has its usual name behind a prefix."""
        return f"{self.url.path.removesuffix(PATH)}/health" if self.is_usual else "/health"

    @property
    def is_usual(self) -> bool:
        """Whether the path ends as the WebSocket's does."""
        return self.url.path.endswith(PATH)

    @property
    def secrets(self) -> list[str]:
        """What must not be shown."""
        match self.auth:
            case ApiKeyAuth(api_key=key):
                told = [key]
            case AccountAuth(account=account, password=password):
                told = [password, account]
        return [secret for secret in told if secret]


_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


def websocket_url(text: str) -> SplitResult:
    """The URL of the WebSocket, of what people give: http(s) too, and without scheme or path.

    Raises:
        UsageError: it is none.
    """
    url = _split_url("--url", text, "ws", _SCHEMES)
    path = PATH if url.path in ("", "/") else url.path
    return url._replace(scheme=_SCHEMES[url.scheme], path=path, fragment="")


def ops_url(text: str) -> SplitResult:
    """The URL of the metrics, of what people give.

    Raises:
        UsageError: it is none.
    """
    url = _split_url("--ops-url", text, "http", ("http", "https"))
    return url._replace(path="/metrics" if url.path in ("", "/") else url.path, fragment="")


def _split_url(flag: str, text: str, scheme: str, schemes: Iterable[str]) -> SplitResult:
    text = text.strip()
    try:
        url = urlsplit(text if "://" in text else f"{scheme}://{text}")
        has_credentials = "@" in url.netloc
        is_url = url.scheme in schemes and bool(url.hostname) and url.port != 0
        is_url = is_url and all("!" <= char <= "~" for char in url.geturl())
    except ValueError:
        is_url = has_credentials = False
    if has_credentials:
        raise UsageError(f"{flag} holds credentials: they come from the environment only")
    if not is_url:
        raise UsageError(f"{flag} {text!r} is not a URL as {scheme}://host:port/path")
    return url


def address_of(url: SplitResult) -> Address:
    is_tls = url.scheme in ("wss", "https")
    return Address(url.hostname or "", url.port or (443 if is_tls else 80), is_tls)


def auth_of(environ: Mapping[str, str]) -> ApiKeyAuth | AccountAuth:
    """What REGISTER says, from the environment; an empty key where that has nothing.

    Raises:
        UsageError: an account without a password, or the other way round.
    """
    names = (KEY_VARIABLE, ACCOUNT_VARIABLE, PASSWORD_VARIABLE)
    key, account, password = (environ.get(name, "").strip() for name in names)
    if key or not (account or password):
        return ApiKeyAuth(key)
    if not (account and password):
        missing = PASSWORD_VARIABLE if account else ACCOUNT_VARIABLE
        raise UsageError(f"{missing} is missing: an account needs its password")
    return AccountAuth(account, password)


# What is wrong ------------------------------------------------------------------------------------


class StepFailed(Exception):
    """Something is not as it should be.

    Args:
        seen: what was seen, in plain words.
        advice: what to do about it.
    """

    def __init__(self, seen: str, advice: str) -> None:
        super().__init__(seen, advice)
        self.seen = seen
        self.advice = advice


OTHER_PROGRAM = (
    "Another program has this port: does --url say where bargein listens? (The daemon prints that "
    "when it starts.)"
)
SEE_LOG = "Look at the daemon's log for this session."


_hidden: ContextVar[Sequence[str]] = ContextVar("hidden", default=())


@contextlib.contextmanager
def hiding(secrets_told: Iterable[str]) -> Iterator[None]:
    """Within it, nothing that is `quoted` holds one of these."""
    longest_first = sorted(secrets_told, key=len, reverse=True)
    before = _hidden.set(longest_first)
    try:
        yield
    finally:
        _hidden.reset(before)


def quoted(text: str | bytes) -> str:
    """A server's own words, short, in one line, without our secrets and what a terminal obeys."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    for secret in _hidden.get():  # before it is cut, since half a secret would not be known as one
        text = text.replace(secret, "…")
    text = " ".join(text.split())
    shown = "".join(char if char.isprintable() else "�" for char in text[:_MAX_QUOTED_CHARS])
    return shown + "…" if len(text) > _MAX_QUOTED_CHARS else shown


def span(seconds: float) -> str:
    """A time, for people."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# Bytes ------------------------------------------------------------------------------------------


def dial(address: Address, tls: ssl.SSLContext, until: float) -> socket.socket:
    """A connection.

    Args:
        address: where to.
        tls: used where the address is encrypted.
        until: `time.monotonic()` when to give up.

    Raises:
        StepFailed: there is none; says why.
    """
    seconds = max(until - time.monotonic(), 0.001)
    try:
        # A socket's own limit is none on looking up its name.
        with gevent.Timeout(seconds, TimeoutError):
            sock = socket.create_connection((address.host, address.port), seconds)
            try:
                return _secured(sock, address, tls)
            except BaseException:
                sock.close()
                raise
    except TimeoutError:
        raise StepFailed(
            f"no connection to {address} within {span(seconds)}",
            "Is the address right, and is there a firewall in between?",
        ) from None
    except ssl.SSLCertVerificationError as error:
        raise StepFailed(
            f"the certificate of {address} is not trusted: {quoted(error.verify_message)}",
            "Give the authority that signed it as --ca-file, or the name that it is for in --url.",
        ) from None
    except ssl.SSLError as error:
        raise StepFailed(
            f"{address} does not speak TLS: {quoted(error.reason or str(error))}",
            "Without TLS the URL begins with ws://.",
        ) from None
    except socket.gaierror as error:
        raise StepFailed(
            f"the name {address.host} has no address: {quoted(error.strerror or str(error))}",
            "Is the host in --url spelt right, and does the name server answer?",
        ) from None
    except ConnectionRefusedError:
        raise StepFailed(
            f"nothing listens on {address}",
            "Is the daemon running (run.py serve), and with the --host and --port that --url has?",
        ) from None
    except (OSError, UnicodeError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise StepFailed(
            f"no connection to {address}: {quoted(words)}", "Is the host in --url right?"
        ) from None


def _secured(sock: socket.socket, address: Address, tls: ssl.SSLContext) -> socket.socket:
    if address.is_tls:
        sock = tls.wrap_socket(sock, server_hostname=address.host)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _receive(sock: socket.socket, until: float) -> bytes:
    """What comes next; b"" at the end of the connection, however that came.

    Raises:
        TimeoutError: nothing came in time.
    """
    remaining = until - time.monotonic()
    if remaining <= 0:  # also where a server never pauses
        raise TimeoutError
    sock.settimeout(remaining)
    try:
        return sock.recv(_READ_BYTES)
    except TimeoutError:
        raise
    except OSError:
        return b""


@dataclass(frozen=True)
class Page:
    """An HTTP answer, and the bytes that it was read from."""

    status: int
    body: bytes
    raw: bytes

    @property
    def said(self) -> str:
        """Its status and the beginning of its body."""
        words = quoted(self.body)
        return f"HTTP {self.status}" + (f": {words}" if words else "")


def _read_page(sock: socket.socket, until: float) -> Page:
    """An HTTP answer.

    Raises:
        StepFailed: what came is none.
    """
    began, raw = time.monotonic(), bytearray()
    try:
        while not _is_whole(raw) and (data := _receive(sock, until)):
            raw += data
            if b"\r\n\r\n" in raw:  # what has no length ends with a silence, at the latest
                until = min(until, time.monotonic() + _BODY_SECONDS)
    except TimeoutError:
        if b"\r\n\r\n" not in raw:
            waited = span(time.monotonic() - began)
            what = f"only {quoted(bytes(raw))!r}" if raw else "nothing"
            raise StepFailed(
                f"it took the connection, and said {what} for {waited}",
                "Either the daemon hangs (SIGUSR1 makes it log what it does), or another program "
                "that is no web server has this port.",
            ) from None
    if not raw:
        raise StepFailed(
            "it took the connection, and closed it without a word",
            "Another program has this port, or a proxy in front has lost its daemon.",
        )
    page = http.client.HTTPResponse(_Bytes(raw))  # type: ignore[arg-type]
    try:
        page.begin()
        body = b"" if page.status == 101 else page.read()
    except (http.client.HTTPException, ValueError):
        raise StepFailed(f"it does not speak HTTP: {quoted(bytes(raw))!r}", OTHER_PROGRAM) from None
    return Page(page.status, body, bytes(raw))


class _Bytes:
    """As much of a socket as `HTTPResponse` needs."""

    def __init__(self, data: bytearray) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _is_whole(raw: bytearray) -> bool:
    is_http = raw.startswith(b"HTTP/"[: len(raw)])
    if b"\n" in raw:
        is_http = re.match(rb"HTTP/1\.[01] \d{3}\b", raw) is not None
    if not is_http or len(raw) > _MAX_PAGE_BYTES:
        return True  # there is no more to learn
    head, gap, body = raw.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length:[ \t]*(\d{1,9})[ \t]*\r?$", head)
    is_upgrade = re.match(rb"HTTP/1\.1 101 ", head) is not None
    return bool(gap) and (is_upgrade or (length is not None and len(body) >= int(length[1])))


def get(url: SplitResult, path: str, tls: ssl.SSLContext, until: float) -> Page:
    """One GET on a connection of its own; raises as `dial` and `_read_page`."""
    head = f"GET {path} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n"
    with dial(address_of(url), tls, until) as sock:
        with contextlib.suppress(OSError):  # what it says is of more interest
            sock.sendall(head.encode())
        return _read_page(sock, until)


# Frames -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen(Generic[_P]):
    """A frame that came: when, by `time.monotonic()`, and in which order among all."""

    payload: _P
    at: float
    order: int


@dataclass(eq=False)
class Answer:
    """What came back for one request."""

    request_id: str
    asked_at: float
    pieces: list[Seen[Response]] = field(default_factory=list)
    """Its data frames."""
    ends: list[Seen[Response | Error]] = field(default_factory=list)
    """Its last frame: more than one is a fault."""

    @property
    def text(self) -> str:
        return "".join(piece.payload.content.text or "" for piece in self.texts)

    @property
    def texts(self) -> list[Seen[Response]]:
        """The frames with text in them."""
        return [piece for piece in self.pieces if piece.payload.content.text]

    @property
    def end(self) -> Response | Error | None:
        """Its last frame; None while it is live."""
        return self.ends[0].payload if self.ends else None

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself, and well."""
        return isinstance(self.end, Response) and self.end.outcome is Outcome.COMPLETED

    def disorder(self) -> str | None:
        """What is wrong with the order of its frames, in words; None where nothing is."""
        for due, piece in enumerate(self.pieces):
            if (seq := piece.payload.text_stream_seq) != due:
                return f"text_stream_seq {seq} came where {due} was due"
        if len(self.ends) > 1:
            return f"it had {len(self.ends)} last frames"
        if self.ends and self.pieces and self.pieces[-1].order > self.ends[0].order:
            return "text came after its last frame"
        return None


@dataclass(eq=False)
class Stop:
    """An INTERRUPT, and its answer."""

    target: Answer | None
    """None is everything."""
    sent_at: float
    ack: Seen[InterruptAck] | None = None

    @property
    def echo(self) -> str | UnsetType:
        """What its INTERRUPT_ACK has to repeat."""
        return self.target.request_id if self.target else UNSET


class _Envelope(msgspec.Struct):
    msg_type: str
    payload: msgspec.Raw
    session_id: str | None = None


_envelope_decoder = msgspec.json.Decoder(_Envelope)
_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    payload.msg_type: msgspec.json.Decoder(payload) for payload in SERVER_PAYLOADS
}


class Talk:
    """A WebSocket to the daemon, and the record of what came.

    Args:
        target: where to.
        until: `time.monotonic()` when any wait ends at the latest.
        wait: seconds for the handshake.

    Raises:
        StepFailed: there is no WebSocket.
    """

    def __init__(self, target: Target, until: float, wait: float) -> None:
        self.acks: list[Seen[InterruptAck]] = []
        self.answers: dict[str, Answer] = {}
        """By `request_id`, in the order in which they were asked for."""
        self.strangers: list[str] = []
        """What came and nobody had asked for, in words."""
        self.registered: RegisterAck | None = None
        self.loss: str | None = None
        """Why nothing can be said any more."""
        self._until = until
        self._stops: list[Stop] = []
        self._refusal: Error | None = None
        self._orders = itertools.count()
        self._ids = (f"doctor_{secrets.token_hex(4)}_{number}" for number in itertools.count(1))
        self._message: list[bytes] = []
        self._is_corked = False
        uri = parse_uri(target.url.geturl())
        self._protocol = ClientProtocol(uri, max_size=_MAX_FRAME_BYTES)
        until = min(time.monotonic() + wait, until)
        self._sock = dial(target.address, target.tls, until)
        try:
            self._shake_hands(target, until)
        except BaseException:
            self._sock.close()
            raise

    def _shake_hands(self, target: Target, until: float) -> None:
        self._protocol.send_request(self._protocol.connect())
        self._flush()
        page = _read_page(self._sock, until)
        if page.status != 101:
            raise StepFailed(
                f"no WebSocket there, but {page.said}", _advice_on_status(page, target)
            )
        self._protocol.receive_data(page.raw)
        if self._protocol.state is not State.OPEN:
            why = quoted(str(self._protocol.handshake_exc))
            raise StepFailed(f"no WebSocket there: {why}", OTHER_PROGRAM)
        self._take_events()

    # Saying.

    def register(self, auth: ApiKeyAuth | AccountAuth) -> None:
        """REGISTER. Whatever the daemon's policy is, a new request is to interrupt the old one."""
        interrupts = OnNewRequest.INTERRUPT
        self._send(Register(auth, platform=Platform.WEB, on_new_request=interrupts))

    def ask(self, text: str) -> Answer:
        """REQUEST."""
        answer = Answer(next(self._ids), time.monotonic())
        self.answers[answer.request_id] = answer
        self._send(Request(answer.request_id, "TEXT", RequestContent(text)))
        return answer

    def interrupt(
        self, target: Answer | None, reason: InterruptReason = InterruptReason.USER_STOP
    ) -> Stop:
        """INTERRUPT of an answer, or of everything."""
        stop = Stop(target, time.monotonic())
        self._stops.append(stop)
        self._send(Interrupt(stop.echo, reason.value))
        return stop

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is said inside goes out in one write."""
        self._is_corked = True
        try:
            yield
        finally:
            self._is_corked = False
        self._flush()

    def _send(self, payload: ClientPayload) -> None:
        said = msgspec.to_builtins(payload)
        frame = {
            "version": VERSION,
            "msg_type": payload.msg_type,
            "session_id": self.registered and self.registered.session_id,
            "payload": {name: value for name, value in said.items() if value is not None},
            "timestamp": time.time_ns() // 1_000_000,
        }
        if self._protocol.state is State.OPEN:
            self._protocol.send_text(msgspec.json.encode(frame))
            if not self._is_corked:
                self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # the end is found by whoever reads
            for data in self._protocol.data_to_send():
                if data:
                    self._sock.sendall(data)

    # Hearing.

    def wait(self, done: Callable[[], object], seconds: float) -> bool:
        """Hear until something is so; False when that takes too long.

        Raises:
            StepFailed: the connection ended, or the server refused a frame.
        """
        until = min(time.monotonic() + seconds, self._until)
        while not done():
            self._check()
            try:
                data = _receive(self._sock, until)
            except TimeoutError:
                return False
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            self._take_events()
            if not data or self._protocol.state is not State.OPEN:
                self._lose()
        return True

    def listen(self, seconds: float) -> None:
        """Hear whatever comes in this time."""
        self.wait(lambda: False, seconds)

    def _check(self) -> None:
        if (error := self._refusal) is not None:  # it goes first: it is why the connection ends
            self._refusal = None
            raise StepFailed(
                f"the server refused a frame: {error.error_code}: {quoted(error.error_detail)}",
                "Is it the bargein that this doctor is of? Both have run.py --version.",
            )
        if self.loss is not None:
            raise StepFailed(self.loss, SEE_LOG)

    def _lose(self) -> None:
        if self.loss is None:
            close = self._protocol.close_rcvd
            how = f"code {int(close.code)} {quoted(close.reason)}".strip() if close else "no word"
            fault = self._protocol.parser_exc
            if close is None and fault is not None and not isinstance(fault, EOFError):
                how = f"what came was no WebSocket frame: {quoted(str(fault))}"
            self.loss = f"the connection ended: {how}"

    def _take_events(self) -> None:
        self._flush()  # pongs
        at = time.monotonic()
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.CONT):
                self._message.append(bytes(event.data))
                if event.fin:
                    message, self._message = b"".join(self._message), []
                    self._take(message, at)

    def _take(self, message: bytes, at: float) -> None:
        try:
            envelope = _envelope_decoder.decode(message)
            decoder = _decoders.get(envelope.msg_type)
            if decoder is None:
                return
            payload = decoder.decode(envelope.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise StepFailed(
                f"a frame that is not of the protocol ({quoted(str(error))}): {quoted(message)}",
                "Is it a bargein, and of this version? gateway/PROTOCOL.md has every frame.",
            ) from None
        seen = Seen(payload, at, next(self._orders))
        match payload:
            case RegisterAck():
                self.registered = payload
            case Response():
                if (answer := self._answer(payload.request_id)) is not None:
                    (answer.ends if payload.text_stream_seq == -1 else answer.pieces).append(seen)
            case Error(request_id=str(request_id)):
                if (answer := self._answer(request_id)) is not None:
                    answer.ends.append(seen)
            case Error():
                self._refusal = payload
            case InterruptAck():
                self._take_ack(seen)
            case Heartbeat():
                self._send(HeartbeatReply())
            case Shutdown():
                self.loss = f"the daemon ended the session: {quoted(str(payload.reason))}"

    def _answer(self, request_id: str) -> Answer | None:
        if request_id not in self.answers:
            self.strangers.append(f"a frame of the request {quoted(request_id)}")
        return self.answers.get(request_id)

    def _take_ack(self, seen: Seen[InterruptAck]) -> None:
        self.acks.append(seen)
        for stop in self._stops:
            if stop.ack is None and stop.echo == seen.payload.interrupt_request_id:
                stop.ack = seen
                return
        echo = seen.payload.interrupt_request_id
        named = "no interrupt_request_id" if echo is UNSET else f"{quoted(str(echo))!r}"
        self.strangers.append(f"an INTERRUPT_ACK with {named}")

    def close(self) -> None:
        """Say goodbye, and go."""
        if self.registered is not None and self.loss is None:
            self._send(Shutdown("doctor"))
        if self._protocol.state is State.OPEN:
            self._protocol.send_close(1000)
        self._flush()
        self._sock.close()


def _advice_on_status(page: Page, target: Target) -> str:
    match page.status:
        case 404 if b"/metrics" in page.body:
            return "That is the port of bargein's metrics (--ops-port): --url needs that of --port."
        case 404 if not target.is_usual:
            return f"The WebSocket of bargein is at {PATH}: --url {target.usual}"
        case 401 | 407:
            return "A proxy in front wants a login of its own, which this doctor cannot give."
        case 403:
            return "It refuses this host name, or a proxy in front does: see --allow-origin."
        case 301 | 302 | 303 | 307 | 308:
            return "It sends clients elsewhere: give --url as it is there (wss:// for https)."
        case 502 | 503 | 504:
            return "A proxy in front does not reach the daemon: is that running?"
        case _:
            return (
                "Another program has this port, or a proxy in front does not pass WebSockets on "
                "(Upgrade and Connection)."
            )
