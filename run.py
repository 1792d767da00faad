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
import dataclasses
import gc
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NoReturn

import gevent.event
from prometheus_client import CollectorRegistry

from actors.greenlet import queued_messages
from actors.messages import Drain, ShutDown
from actors.picture import keep_in_picture, log_picture
from actors.places import Places
from actors.session import SessionActor, SessionHandle
from actors.supervisor import Supervision
from gateway import doctor, hash_secret
from gateway.authenticator import Authenticator
from gateway.config import Config, add_flags, default_config
from gateway.credentials import Credentials
from gateway.given import Given
from gateway.outbox import Outbox
from gateway.protocol import HealthStatus, InterruptReason
from gateway.server import Server
from gateway.settings import Settings as Settings
from gateway.settings import SettingsError
from llm import demo
from llm.lanes import lanes
from llm.provider import Provider
from llm.stream import LlmClient
from metrics.instruments import Metrics
from metrics.logs import configure, get_logger
from metrics.loop_lag import LoopLag
from metrics.ops import OpsServer

_CALLBACK_SECONDS = 0.001
"""How long the loop may run what is ready before it looks for more. Long, so that an interrupt's
few steps from mailbox to mailbox follow each other at once, whatever else came in; a greenlet that
always has work yields to the whole loop (`llm/lines.py`)."""

_GC_THRESHOLDS = (10_000, 20, 50)

_GOODBYES_PER_SECOND = 100
"""How many clients are told to go, on the average: all of them will be back at once, somewhere."""

_SPREAD_SHARE = 0.5
"""Of a part of the shutdown: whoever goes last is gone well before its end."""

_END_SHARE, _MOST_END_SECONDS = 0.5, 5.0
"""What is kept of the drain's limit, at its end, for those who are left: they are interrupted, told
to go one after another, and waited for."""

_STOP_SECONDS = 2.0
"""The same, where nothing is drained."""

_TEARDOWN_SHARE, _MOST_TEARDOWN_SECONDS = 0.3, 0.5
"""And of that, what is kept for whatever comes after the clients, up to the process's end."""

_NOTIFY_SECONDS = 1.0

_MORE_FILES = 256
"""Open files beyond one for each client and each live request: the operator's port, logs, the
interpreter's own, and connections to providers that are kept for the next request."""

_log = get_logger("SYS")


def bargein_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("bargein")
    except PackageNotFoundError:
        return "0 (not installed)"


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
        self._is_up = self._is_draining = False
        self._ends_at: float | None = None
        """When all of a shutdown must be over, as `time.monotonic()`."""
        self.sessions = Places(settings.server.max_sessions)
        self.requests = Places(settings.session.max_requests)
        self.ops: OpsServer | None = None

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
        self._demo_url = "" if self.settings.provider else self._start_demo()
        self.provider = self._provider_of(self.settings)
        client = LlmClient(self.provider, self.settings.fallback, self.settings.generation)
        self._client = client
        self._teardown.callback(client.close)
        supervision = self.supervision = Supervision(self.settings.supervisor, self._on_give_up)
        self._teardown.callback(supervision.stop)
        supervision.start()
        cpu = _CpuMeter()
        credentials = self.settings.credentials
        authenticator = None if credentials is None else Authenticator(credentials)
        self._authenticator = authenticator
        if authenticator is not None:
            self._teardown.callback(authenticator.stop)

        def health_status() -> HealthStatus:
            return HealthStatus("UP", self.server.connections, cpu.percent())

        def open_session(outbox: Outbox, peer: str) -> SessionHandle:
            place = self.sessions.place()
            ref = SessionActor.start(
                outbox=outbox,
                peer=peer,
                source=client,
                tell_supervisor=supervision.tell,
                health=health_status,
                settings=self.settings.session,
                metrics=self.metrics,
                place=place,
                requests=self.requests,
                takes_requests=not self._is_draining,
                authenticator=authenticator,
            )
            return SessionHandle(ref, place)

        self.server = Server(
            self.settings.server, open_session, self._health, self.metrics, self.unready
        )
        self._teardown.callback(self.server.stop)
        self.server.start()
        self.metrics.outbox_bytes.set_function(self.server.waiting_bytes)
        self.metrics.mailbox_messages.set_function(queued_messages)
        self._start_ops()

    def _start_ops(self) -> None:
        settings = self.settings
        if not settings.ops_port:
            return
        lag = LoopLag(self.metrics.loop_lag_seconds)
        self._teardown.callback(lag.stop)
        lag.start()
        self.ops = OpsServer(
            settings.ops_host,
            settings.ops_port,
            self.metrics.registry,
            self._health,
            self.unready,
        )
        self._teardown.callback(self.ops.stop)
        try:
            self.ops.start()
        except OSError as error:
            where = f"{settings.ops_host}:{settings.ops_port}"
            error.filename = f"{where} for metrics (--ops-port)"
            raise

    @property
    def is_serving(self) -> bool:
        """Whether it has started, and is not told to stop."""
        return self._is_up and not self._is_draining

    def unready(self) -> str | None:
        """Why new clients are not welcome, in words; None when they are."""
        if self._is_draining:
            return "draining"
        if not self._is_up:
            return "starting"
        if self.sessions.are_full:
            return f"out of capacity: {self.sessions.taken} sessions (--max-sessions)"
        if self.requests.are_full:
            return f"out of capacity: {self.requests.taken} live requests (--max-requests)"
        return None

    def reload(self, settings: Settings) -> None:
        """From the next generation on, ask the providers of these settings; those that run go on.

        Args:
            settings: the embedded demo provider is in them if it was at the start, and only then.

        Raises:
            OSError: certificates cannot be read. Nothing has changed then.
            ValueError: a URL is none. Nothing has changed then.
        """
        provider = self._provider_of(settings)
        self._client.reload(provider, settings.fallback)
        self.provider = provider

    def reload_credentials(self, credentials: Credentials) -> bool:
        """From the next REGISTER on, let these in and nobody else; sessions that stand go on.

        Returns:
            False when nothing has changed: it was started without authentication.
        """
        if self._authenticator is None:
            return False
        self._authenticator.credentials = credentials
        return True

    def drain(self) -> None:
        """Take no more requests, and wait until every session has left, but not for ever.

        What is left of the limit then is for `stop()`.
        """
        limit = self.settings.drain_timeout
        self._is_draining = True
        if not limit:
            return
        self._ends_at = time.monotonic() + limit
        seconds = limit - min(limit * _END_SHARE, _MOST_END_SECONDS)
        census = self.supervision.census()
        # Where the supervisor has just failed, the next one lets them go.
        sessions = census.sessions if census else self.server.connections
        _log.info("Draining", sessions=sessions, requests=census.requests if census else None)
        all_gone = gevent.event.Event()
        self.supervision.tell(Drain(_spread(seconds, sessions), all_gone.set))
        if not all_gone.wait(seconds):
            self.metrics.drain_timeouts.inc()
            _log.warning("Drain timed out", seconds=seconds)

    def stop(self) -> None:
        """Interrupt what is live, tell the clients, close everything; a second time, nothing.

        It takes no longer than is left of the drain's limit, whatever clients do.
        """
        if not self._is_up:
            return
        self._is_up, self._is_draining = False, True
        self.server.stop_listening()
        self._end_sessions()
        lanes().wait_turn()  # the last books are kept
        self._teardown.close()
        lanes().wait_turn()  # and what came of that

    def lifetime(self) -> dict[str, object]:
        """What there was from the start to now, for the log."""
        return {
            "uptime_seconds": round(time.monotonic() - self._started_at, 3),
            "sessions": self.metrics.sessions.total(),
            "requests": self.metrics.requests.total(),
        }

    def _end_sessions(self) -> None:
        now = time.monotonic()
        if self._ends_at is None:
            seconds = _STOP_SECONDS
        else:
            seconds = min(max(0.0, self._ends_at - now), _MOST_END_SECONDS)
        seconds -= min(seconds * _TEARDOWN_SHARE, _MOST_TEARDOWN_SECONDS)
        until = now + seconds
        census = self.supervision.census()
        if census is None:
            return  # there is nobody who could do it in order
        spread_seconds = 0.0 if self._ends_at is None else _spread(seconds, census.sessions)
        all_ended = gevent.event.Event()
        reason = InterruptReason.SERVER_SHUTDOWN
        self.supervision.tell(ShutDown(reason, spread_seconds, all_ended.set))
        if not all_ended.wait(max(0.0, until - time.monotonic())):
            _log.error("Sessions did not end in time", seconds=round(seconds, 3))
        self.server.wait_until_empty(max(0.0, until - time.monotonic()))

    def _start_demo(self) -> str:
        provider = demo.DemoProvider()
        provider.start()
        self._teardown.callback(provider.stop)
        return provider.base_url

    def _provider_of(self, settings: Settings) -> Provider:
        return settings.provider or dataclasses.replace(settings.demo, base_url=self._demo_url)

    def _health(self) -> dict[str, object]:
        census = self.supervision.census()
        return {
            "status": "ok" if census else "degraded",
            "version": bargein_version(),
            "uptime_seconds": round(time.monotonic() - self._started_at, 3),
            "sessions": census.sessions if census else None,
            "requests": census.requests if census else None,
        }


def _spread(seconds: float, clients: int) -> float:
    """Over how many of these seconds so many clients are told to go, each at random."""
    return min(seconds * _SPREAD_SHARE, clients / _GOODBYES_PER_SECOND)


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


def serve(settings: Settings, on_hangup: Callable[[Gateway], None]) -> int:
    """Run the daemon until it is told to stop.

    Args:
        settings: everything that can be set.
        on_hangup: called at a SIGHUP.

    Returns:
        The exit code: 0 after a signal, 1 when it could not start or go on.
    """
    stop = _stopped_by_signals()
    # Where a person reads both, the printed lines say it already.
    tell = _log.debug if os.isatty(1) and os.isatty(2) else _log.info
    if hasattr(signal, "SIGUSR1"):
        gevent.signal_handler(signal.SIGUSR1, log_picture)
    _allow_files(settings)
    gateway = Gateway(settings, on_give_up=lambda: stop.set(None))
    if hasattr(signal, "SIGHUP"):
        gevent.signal_handler(signal.SIGHUP, on_hangup, gateway)
    where = f"{settings.server.host}:{settings.server.port}"
    try:
        gateway.start()
    except OSError as error:
        print(f"error: cannot listen on {error.filename or where}: {_why(error)}", file=sys.stderr)
        return 1
    provider, fallback = gateway.provider, settings.fallback
    tell(
        "Started",
        version=bargein_version(),
        host=settings.server.host,
        port=gateway.server.port,
        provider=provider.name,
        model=provider.model,
        is_demo=settings.provider is None,
        fallback=fallback.name if fallback else None,
        metrics=gateway.ops.url if gateway.ops else None,
    )
    host = settings.server.host
    host = f"[{host}]" if ":" in host else host
    demo = " (embedded demo provider)" if settings.provider is None else ""
    _say(f"bargein {bargein_version()}")
    _say(f"listening on ws://{host}:{gateway.server.port}/ws/agent/stream")
    _say(f"provider {_shown(provider)}{demo}, model {provider.model}")
    if gateway.ops is not None:
        _say(f"metrics on {gateway.ops.url}")
    if fallback is not None:
        _say(f"fallback {_shown(fallback)}, model {fallback.model}")
    if settings.credentials is not None:
        keys, accounts = len(settings.credentials.api_keys), len(settings.credentials.accounts)
        _say(f"clients need one of the API keys ({keys}) or accounts ({accounts}) that are known")
    # What stands now lives as long as the process: the collector need not look at it again and
    # again while it holds everybody up. Requests leave no cycles behind, so it may come rarely.
    gc.collect()
    keep_in_picture()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    notify("READY=1")
    by = stop.get()
    tell("Stopping", signal=by and by.name)
    notify("STOPPING=1")
    if by is not None:
        gateway.drain()
    gateway.stop()
    code = 1 if by is None else 0
    _log.info("Stopped", exit_code=code, **gateway.lifetime())
    return code


def _why(error: OSError) -> str:
    """What the system says, without the address, which gevent and Python put behind it."""
    # The codes of getaddrinfo are none of the system's; on Linux they are negative.
    code = 0 if isinstance(error, socket.gaierror) else error.errno or 0
    if code > 0:
        return os.strerror(code)
    return (error.strerror or str(error)).partition(": (")[0].partition(" (while ")[0]


def reload(gateway: Gateway, running: Config, given: Given) -> None:
    """Let a gateway take up what was given now, as far as it can; the log says how that went.

    Args:
        gateway: one that runs, or nothing changes.
        running: what was given when it started.
        given: what is given now. Where that has faults, nothing changes.
    """
    if not gateway.is_serving:
        _log.error("Not reloaded", fault="the gateway is starting or stopping")
        return
    need_restart = given.need_restart(running)
    try:
        settings = Settings.of(given)
        if "llm_url" not in need_restart:
            gateway.reload(settings)
    except SettingsError as error:
        for fault in error.faults:
            _log.error("Not reloaded", fault=fault)
        return
    except (OSError, ValueError) as error:  # a file that was right a moment ago
        _log.error("Not reloaded", fault=f"a provider cannot be used ({type(error).__name__})")
        return
    credentials = settings.credentials
    if credentials is not None and gateway.reload_credentials(credentials):
        keys, accounts = len(credentials.api_keys), len(credentials.accounts)
        _log.info("Credentials reloaded", api_keys=keys, accounts=accounts)
    if need_restart:
        reason = "a running gateway takes up only its providers, and what its auth_file says"
        if "llm_url" in need_restart and settings.provider is None:
            reason = "llm_url is gone, and the demo provider starts only with the process"
        elif "llm_url" in need_restart:
            reason = "llm_url is new, and the demo provider, now in use, ends only with the process"
        _log.warning("Settings need a restart", settings=need_restart, reason=reason)
    if "llm_url" not in need_restart:
        provider, fallback = gateway.provider, settings.fallback
        _log.info(
            "Reloaded",
            provider=provider.name,
            model=provider.model,
            fallback=fallback.name if fallback else None,
        )


def _allow_files(settings: Settings) -> None:
    """Each connection is an open file, and what a shell allows (1024, often) is soon used up."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return

    def count(limit: int) -> float:
        return math.inf if limit == resource.RLIM_INFINITY else limit

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections, requests = settings.server.max_connections, settings.session.max_requests
    has_limits = connections > 0 and requests > 0
    # One for a request's connection; the demo provider has the other end of it.
    per_request = 2 if settings.provider is None else 1
    wanted = connections + requests * per_request + _MORE_FILES if has_limits else count(hard)
    allowed = min(wanted, count(hard))
    if allowed < wanted:
        _log.warning("Open files are fewer than clients may be", limit=hard, wanted=wanted)
    if allowed > count(soft):
        try:
            new = hard if allowed == count(hard) else int(allowed)
            resource.setrlimit(resource.RLIMIT_NOFILE, (new, hard))
        except (OSError, ValueError) as error:  # macOS has one more limit, which it does not tell
            _log.warning("Open files stay few", limit=soft, wanted=wanted, error=str(error))


def _shown(provider: Provider) -> str:
    return provider.base_url.partition("?")[0]  # some have the key in the query


def notify(state: str) -> None:
    """Tell systemd, where it is there (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path or not hasattr(socket, "AF_UNIX"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_NOTIFY_SECONDS)  # its queue may be full, and it may read no more
        sock.connect("\0" + path[1:] if path.startswith("@") else path)
        sock.send(state.encode())


def serve_demo(host: str, port: int, tokens_per_second: float) -> int:
    """Run the demo provider until it is told to stop; returns the exit code, as `serve` does."""
    stop = _stopped_by_signals()
    try:
        with demo.DemoProvider(host, port, tokens_per_second) as provider:
            _say(f"listening on {provider.base_url}")
            stop.get()
            return 0
    except OSError as error:
        print(f"error: cannot listen on {host}:{port}: {_why(error)}", file=sys.stderr)
        return 1


def _stopped_by_signals() -> gevent.event.AsyncResult[signal.Signals | None]:
    """What a first SIGINT or SIGTERM is set in; a second one ends the process."""
    stop: gevent.event.AsyncResult[signal.Signals | None] = gevent.event.AsyncResult()

    def on_signal(number: int) -> None:
        if stop.ready():  # at once, whatever is going on
            os._exit(128 + number)
        by = signal.Signals(number)
        stop.set(by)
        _say(f"stopping ({by.name}; once more stops at once)")

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
        _leave_standard_output()


def _leave_standard_output() -> None:
    # What is left in its buffer would fail once more when the interpreter ends, with code 120.
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """A fault is one line, and a flag is what its whole name says: a new one takes no other's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        message = re.sub(
            r"ignored explicit argument .*", "takes no value", message, flags=re.DOTALL
        )
        self.exit(2, f"error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="run.py",
        description="A gateway between chat clients and LLMs where an interruption really stops.",
    )
    parser.add_argument("--version", action="version", version=f"bargein {bargein_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="run the daemon (the default)",
    )
    add_flags(serve_parser)
    check_parser = commands.add_parser(
        "check-config",
        help="say what is wrong with the settings of a `serve`, or which are set and where",
    )
    add_flags(check_parser)
    commands.add_parser(
        "default-config",
        help="print a file of settings for --config, with every setting explained",
    )
    doctor_parser = commands.add_parser(
        "doctor",
        help="examine a running daemon step by step: does it answer, do interruptions stop?",
    )
    doctor.add_arguments(doctor_parser)
    hash_secret.add_arguments(
        commands.add_parser(
            "hash-secret",
            help="print the hash of a password or of an API key, for the file of --auth-file",
        )
    )
    demo_parser = commands.add_parser(
        "demo-llm",
        help="run the demo provider on its own, for any client of OpenAI's API",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=demo.describe_scenarios(),
    )
    add = demo_parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=_port, default=0, help="port to listen on (default: a free one)")
    add(
        "--tokens-per-second",
        type=_pace,
        default=demo.TOKENS_PER_SECOND,
        metavar="N",
        help="pace of an answer, above 0 (default: %(default)g)",
    )
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError
    return value


_port.__name__ = "port"


def _pace(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not value > 0:  # so written, it refuses NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in _TOP_LEVEL):
        arguments.insert(0, "serve")
    parser = make_parser()
    args, strays = parser.parse_known_args(arguments)
    if strays and args.command in ("demo-llm", "default-config", "doctor"):
        parser.error(f"{args.command} does not know {strays[0].partition('=')[0]}")
    if strays and args.command == "hash-secret":  # which one, is not said: it may be the secret
        parser.error("hash-secret takes no more: it asks for the secret, or reads standard input")
    if args.command == "demo-llm":
        configure("info", _log_format())
        return serve_demo(args.host, args.port, args.tokens_per_second)
    if args.command == "doctor":
        return doctor.main(args)
    if args.command == "hash-secret":
        try:
            return hash_secret.main(args)
        except OSError as error:
            _leave_standard_output()
            parser.error(f"cannot be read or written: {error.strerror or error}")
    if args.command == "default-config":
        _say(default_config().rstrip())
        return 0

    def read() -> Given:
        return Given(vars(args), os.environ, strays)

    given = read()
    for warning in given.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        settings = Settings.of(given)
    except SettingsError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    if args.command == "check-config":
        _say("\n".join(["ok", *given.report()]))
        return 0
    config = given.config
    configure(config.log_level, config.log_format or _log_format())
    return serve(settings, lambda gateway: reload(gateway, config, read()))


def _log_format() -> Literal["text", "json"]:
    return "text" if sys.stderr.isatty() else "json"


_TOP_LEVEL = ("-h", "--help", "--version")

if __name__ == "__main__":
    sys.exit(main())
