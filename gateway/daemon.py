"""The daemon around the gateway: signals, reloads, systemd, open files, and what is printed."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import gevent
import gevent.event

from actors.state_dump import keep_in_state_dump, log_state_dump
from gateway.app import Gateway, bargein_version
from gateway.settings.options import Config
from gateway.settings.settings import Settings, SettingsError
from gateway.settings.sources import ConfigSources
from llm.demo import server as demo
from llm.provider import Provider
from metrics.logs import get_logger

_GC_THRESHOLDS = (10_000, 20, 50)

_NOTIFY_SECONDS = 1.0

_MORE_FILES = 256
"""Open files beyond one for each client and each live request: the operator's port, logs, the
interpreter's own, and connections to providers that are kept for the next request."""

_log = get_logger("SYS")


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
        gevent.signal_handler(signal.SIGUSR1, log_state_dump)
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
    say(f"bargein {bargein_version()}")
    say(f"listening on ws://{host}:{gateway.server.port}/ws/agent/stream")
    say(f"provider {_shown(provider)}{demo}, model {provider.model}")
    if gateway.ops is not None:
        say(f"metrics on {gateway.ops.url}")
    if fallback is not None:
        say(f"fallback {_shown(fallback)}, model {fallback.model}")
    if settings.credentials is not None:
        keys, accounts = len(settings.credentials.api_keys), len(settings.credentials.accounts)
        say(f"clients need one of the API keys ({keys}) or accounts ({accounts}) that are known")
    # What stands now lives as long as the process: the collector need not look at it again and
    # again while it holds everybody up. Requests leave no cycles behind, so it may come rarely.
    gc.collect()
    keep_in_state_dump()
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


def reload(gateway: Gateway, running: Config, given: ConfigSources) -> None:
    """Let a gateway take up what was given now, as far as it can; the log says how that went.

    Args:
        gateway: one that runs, or nothing changes.
        running: what was given when it started.
        given: what is given now. Where that has faults, nothing changes.
    """
    if not gateway.is_serving:
        _log.error("Not reloaded", fault="the gateway is starting or stopping")
        return
    need_restart = given.restart_keys(running)
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
            say(f"listening on {provider.base_url}")
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
        say(f"stopping ({by.name}; once more stops at once)")

    for name in ("SIGINT", "SIGTERM"):
        if hasattr(signal, name):  # not every platform has every signal
            number = getattr(signal, name)
            gevent.signal_handler(number, on_signal, number)
    return stop


def say(line: str) -> None:
    """Print a line, if anybody still reads standard output."""
    try:
        print(line, flush=True)
    except OSError:
        leave_standard_output()


def leave_standard_output() -> None:
    # What is left in its buffer would fail once more when the interpreter ends, with code 120.
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
