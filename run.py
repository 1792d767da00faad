"""The command line, and the one place where everything is put together and taken down again."""

from __future__ import annotations

# First of all, and nowhere else: from here on sockets, locks and sleeps give way to other
# greenlets. `ares` resolves names without threads: gevent's usual resolver has ten, and a look-up
# that was interrupted keeps its own until the name server's last time-out.
import gevent

gevent.config.resolver = "ares"
# Who spawned whom, with a stack for each greenlet, is for debugging and costs more than the rest.
gevent.config.track_greenlet_tree = False

import gevent.monkey

gevent.monkey.patch_all()

import argparse
import contextlib
import gc
import ipaddress
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gevent.event
from prometheus_client import CollectorRegistry

from actors.messages import ShutDown
from actors.session import (
    SessionActor,
    SessionHandle,
    SessionSettings,
)
from actors.supervisor import Supervision, SupervisorSettings
from gateway.outbox import Outbox, OutboxSettings
from gateway.protocol import HealthStatus, InterruptReason, OnNewRequest
from gateway.server import Server, ServerSettings
from llm import demo
from llm.lanes import lanes
from llm.provider import Provider, StopsOnClose
from llm.stream import GenerationSettings, LlmClient
from metrics.instruments import Metrics
from metrics.logs import LEVELS, configure, get_logger

_CALLBACK_SECONDS = 0.001
"""How long the loop may run what is ready before it looks for more. Long, so that an interrupt's
few steps from mailbox to mailbox follow each other at once, whatever else came in; a greenlet that
always has work yields to the whole loop (`llm/lines.py`)."""

_GC_THRESHOLDS = (10_000, 20, 50)

_SHUTDOWN_SECONDS = 5.0
"""How long the sessions may take to end in order, and then their clients to say goodbye."""

_log = get_logger("SYS")


def bargein_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("bargein")
    except PackageNotFoundError:
        return "0 (not installed)"


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, by room."""

    provider: Provider | None = None
    """None starts the embedded demo provider."""
    fallback: Provider | None = None
    """Asked when that one fails before its first token."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    supervisor: SupervisorSettings = field(default_factory=SupervisorSettings)
    session: SessionSettings = field(default_factory=SessionSettings)


class Gateway:
    """The daemon without its command line: `start()`, and `stop()` in the reverse order.

    Args:
        settings: everything that can be set.
        on_give_up: called when it cannot go on.
    """

    def __init__(self, settings: Settings, on_give_up: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.metrics = Metrics(CollectorRegistry())
        self._on_give_up = on_give_up
        self._started_at = time.monotonic()
        self._teardown = contextlib.ExitStack()
        self._is_up = False

    def start(self) -> None:
        """Start everything.

        Raises:
            OSError: the address cannot be listened on.
        """
        try:
            self._start()
        except BaseException:
            self._teardown.close()
            raise
        self._is_up = True

    def _start(self) -> None:
        gevent.setswitchinterval(_CALLBACK_SECONDS)
        provider = self.settings.provider or self._start_demo()
        self.provider = provider
        client = LlmClient(provider, self.settings.fallback, self.settings.generation)
        self._teardown.callback(client.close)
        supervision = self.supervision = Supervision(self.settings.supervisor, self._on_give_up)
        self._teardown.callback(supervision.stop)
        supervision.start()
        cpu = _CpuMeter()

        def health_status() -> HealthStatus:
            return HealthStatus("UP", self.server.connections, cpu.percent())

        def open_session(outbox: Outbox, peer: str) -> SessionHandle:
            ref = SessionActor.start(
                outbox=outbox,
                peer=peer,
                source=client,
                tell_supervisor=supervision.tell,
                health=health_status,
                settings=self.settings.session,
                metrics=self.metrics,
            )
            return SessionHandle(ref)

        self.server = Server(self.settings.server, open_session, self._health, self.metrics)
        self._teardown.callback(self.server.stop)
        self.server.start()

    def stop(self) -> None:
        """Interrupt what is live, tell the clients, close everything; a second time, nothing."""
        if not self._is_up:
            return
        self._is_up = False
        self.server.stop_listening()
        if self.supervision.census() is not None:  # else there is nobody who could do it in order
            all_ended = gevent.event.Event()
            self.supervision.tell(ShutDown(InterruptReason.SERVER_SHUTDOWN, all_ended.set))
            if not all_ended.wait(_SHUTDOWN_SECONDS):
                _log.error("Sessions did not end in time", seconds=_SHUTDOWN_SECONDS)
            self.server.wait_until_empty(_SHUTDOWN_SECONDS)
        lanes().wait_turn()  # the last books are kept
        self._teardown.close()

    def _start_demo(self) -> Provider:
        provider = demo.DemoProvider()
        provider.start()
        self._teardown.callback(provider.stop)
        return Provider(base_url=provider.base_url, model="demo", stops_on_close=StopsOnClose.YES)

    def _health(self) -> dict[str, object]:
        census = self.supervision.census()
        return {
            "status": "ok" if census else "degraded",
            "version": bargein_version(),
            "uptime_seconds": round(time.monotonic() - self._started_at, 3),
            "sessions": census.sessions if census else None,
            "requests": census.requests if census else None,
        }


class _CpuMeter:
    """This process's use of the processor, lately."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._percent: float | None = None

    def percent(self) -> float:
        """Percent of one core, over the time since this was last found out: a second at least,
        however many ask."""
        wall, cpu = time.monotonic(), time.process_time()
        if self._percent is None or wall - self._wall >= 1:
            self._percent = round(100 * (cpu - self._cpu) / max(wall - self._wall, 1e-6), 1)
            self._wall, self._cpu = wall, cpu
        return self._percent


def serve(settings: Settings) -> int:
    """Run the daemon until it is told to stop.

    Returns:
        The exit code: 0 after a signal, 1 when it could not start or go on.
    """
    stop = _stopped_by_signals()
    gateway = Gateway(settings, on_give_up=lambda: stop.set(1))
    where = f"{settings.server.host}:{settings.server.port}"
    try:
        gateway.start()
    except OSError as error:
        print(f"error: cannot listen on {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    host = settings.server.host
    host = f"[{host}]" if ":" in host else host
    demo = " (embedded demo provider)" if settings.provider is None else ""
    _say(f"bargein {bargein_version()}")
    _say(f"listening on ws://{host}:{gateway.server.port}/ws/agent/stream")
    _say(f"provider {gateway.provider.base_url}{demo}, model {gateway.provider.model}")
    # What stands now lives as long as the process: the collector need not look at it again and
    # again while it holds everybody up. Requests leave no cycles behind, so it may come rarely.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    code = stop.get() or 0
    gateway.stop()
    return code


def serve_demo(host: str, port: int) -> int:
    """Run the demo provider until it is told to stop; returns the exit code, as `serve` does."""
    stop = _stopped_by_signals()
    try:
        with demo.DemoProvider(host, port) as provider:
            _say(f"listening on {provider.base_url}")
            return stop.get() or 0
    except OSError as error:
        print(f"error: cannot listen on {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return 1


def _stopped_by_signals() -> gevent.event.AsyncResult[int]:
    """What a first SIGINT or SIGTERM sets to the exit code 0; a second one ends the process."""
    stop: gevent.event.AsyncResult[int] = gevent.event.AsyncResult()

    def on_signal(number: int) -> None:
        if stop.ready():  # at once, whatever is going on
            os._exit(128 + number)
        stop.set(0)
        _say(f"stopping ({signal.Signals(number).name}; once more stops at once)")

    for name in ("SIGINT", "SIGTERM"):
        if hasattr(signal, name):  # not every platform has every signal
            number = getattr(signal, name)
            gevent.signal_handler(number, on_signal, number)
    return stop


def _say(line: str) -> None:
    """Print a line, if anybody still reads standard output."""
    try:
        print(line, flush=True)
    except OSError:
        # What is left in its buffer would fail once more when the interpreter ends, with code 120.
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError
    return value


def _bound(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


_seconds.__name__, _port.__name__ = "number of seconds", "port"
_count.__name__ = _bound.__name__ = "number"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="A gateway between chat clients and LLMs where an interruption really stops.",
    )
    parser.add_argument("--version", action="version", version=f"bargein {bargein_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="run the daemon (the default)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = serve_parser.add_argument
    server, supervisor, session = ServerSettings(), SupervisorSettings(), SessionSettings()
    provider = Provider(base_url="", model="")
    add("--host", default=server.host, help="address to listen on")
    add("--port", type=_port, default=server.port, help="port to listen on; 0 takes a free one")
    add(
        "--llm-url",
        help="OpenAI-style base, as http://host:port/v1; else OPENAI_BASE_URL; "
        "without either, an embedded demo provider. The key comes from OPENAI_API_KEY",
    )
    add("--llm-model", help="model to ask for")
    for name, value, text in (
        ("--llm-connect-timeout", provider.connect_timeout, "until the connection stands"),
        ("--llm-first-token-timeout", provider.first_token_timeout, "until the first token"),
        ("--llm-idle-timeout", provider.idle_timeout, "from one event to the next"),
        ("--session-timeout", session.session_timeout, "of a client's silence until it is ended"),
        ("--heartbeat-interval", session.heartbeat_interval, "between two HEARTBEATs"),
        ("--write-timeout", server.outbox.write_timeout, "that a client may read nothing"),
        ("--stale-after", supervisor.stale_after, "without progress until a request is reaped"),
        ("--request-max-age", supervisor.request_max_age, "until any request is reaped"),
    ):
        add(name, type=_seconds, default=value, metavar="SECONDS", help=f"{text}; 0 is off")
    add(
        "--reap-interval",
        type=_seconds,
        default=supervisor.reap_interval,
        metavar="SECONDS",
        help="between two looks for stale requests; 0 is off",
    )
    add("--llm-ca-file", metavar="PEM", help="certificate authorities to trust for the provider")
    add(
        "--outbox-bytes",
        type=_count,
        default=server.outbox.max_bytes,
        metavar="BYTES",
        help="that may wait for one client",
    )
    for name, default, text in (
        ("--history-messages", session.history_messages, "messages"),
        ("--history-chars", session.history_chars, "characters"),
    ):
        add(
            name,
            type=_bound,
            default=default,
            metavar="N",
            help=f"{text} of the conversation that the model is reminded of; 0 is none",
        )
    add(
        "--on-new-request",
        choices=[policy.value for policy in OnNewRequest],
        default=session.on_new_request.value,
        help="what a request does while another is live",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web origin whose pages may connect, as https://chat.example.com; repeatable",
    )
    add(
        "--insecure-no-auth",
        action="store_true",
        help="listen beyond loopback although anybody may connect",
    )
    add("--log-format", choices=("text", "json"), help="text on a terminal, else json")
    add("--log-level", choices=LEVELS, default="info", help="least level that is logged")
    demo_parser = commands.add_parser(
        "demo-llm",
        help="run the demo provider on its own, for any client of OpenAI's API",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=demo.describe_scenarios(),
    )
    add = demo_parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=_port, default=0, help="port to listen on (default: a free one)")
    return parser


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings that a command line gives.

    Raises:
        SettingsError: with one line per fault.
    """
    faults = []
    url = args.llm_url or os.environ.get("OPENAI_BASE_URL") or None
    url_from = "--llm-url" if args.llm_url else "OPENAI_BASE_URL"
    provider = None
    if url is None:
        if args.llm_model:
            faults.append("--llm-model needs --llm-url: the demo provider has no models")
    elif not url.startswith(("http://", "https://")):
        faults.append(f"{url_from} {url!r} is no URL: it must begin with http:// or https://")
    elif "@" in url.partition("://")[2].partition("/")[0]:
        faults.append(f"{url_from} holds credentials: the key comes from OPENAI_API_KEY only")
    elif not args.llm_model:
        faults.append(f"{url_from} {url} needs --llm-model: which of its models shall be asked?")
    else:
        provider = Provider(
            base_url=url,
            model=args.llm_model,
            api_key=_key_from_environment(faults),
            connect_timeout=args.llm_connect_timeout,
            first_token_timeout=args.llm_first_token_timeout,
            idle_timeout=args.llm_idle_timeout,
            ca_file=args.llm_ca_file,
        )
    if args.llm_ca_file is not None and not Path(args.llm_ca_file).is_file():
        faults.append(f"--llm-ca-file {args.llm_ca_file!r} is no file")
    elif provider is not None:
        try:
            LlmClient(provider).close()
        except ValueError:
            faults.append(f"{url_from} {url!r} is not the URL of a server")
        except OSError as error:
            faults.append(f"--llm-ca-file {args.llm_ca_file!r} holds no certificates: {error}")
    if not args.insecure_no_auth and not _is_loopback(args.host):
        faults.append(
            f"--host {args.host} is not loopback, and anybody who can reach it could spend your "
            "key: there is no authentication yet. Add --insecure-no-auth if you mean it"
        )
    if faults:
        raise SettingsError(faults)
    return Settings(
        provider=provider,
        server=ServerSettings(
            host=args.host,
            port=args.port,
            allowed_origins=tuple(args.allow_origin),
            outbox=OutboxSettings(args.outbox_bytes, args.write_timeout),
        ),
        supervisor=SupervisorSettings(args.stale_after, args.reap_interval, args.request_max_age),
        session=SessionSettings(
            on_new_request=OnNewRequest(args.on_new_request),
            session_timeout=args.session_timeout,
            heartbeat_interval=args.heartbeat_interval,
            history_messages=args.history_messages,
            history_chars=args.history_chars,
        ),
    )


def _key_from_environment(faults: list[str]) -> str | None:
    # Keys that come from files end in a newline.
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    # RFC 6750, section 2.1: a bearer token is of visible ASCII characters.
    if not all("!" <= char <= "~" for char in key):
        faults.append("OPENAI_API_KEY holds characters that no key has (its value is not shown)")
    return key or None


class SettingsError(Exception):
    """Settings that cannot be used.

    Args:
        faults: one line for each.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__(*faults)
        self.faults = faults


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in _TOP_LEVEL):
        arguments.insert(0, "serve")
    args = make_parser().parse_args(arguments)
    if args.command == "demo-llm":
        configure("info", "text" if sys.stderr.isatty() else "json")
        return serve_demo(args.host, args.port)
    try:
        settings = settings_from(args)
    except SettingsError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    configure(args.log_level, args.log_format or ("text" if sys.stderr.isatty() else "json"))
    return serve(settings)


_TOP_LEVEL = ("-h", "--help", "--version")

if __name__ == "__main__":
    sys.exit(main())
