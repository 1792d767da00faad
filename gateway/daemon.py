"""Runs the gateway as a daemon: signals, reload, and the lines it prints."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable
from typing import TypeAlias

import gevent
import gevent.event
import gevent.lock

from actors.state_dump import log_state_dump, track_greenlets
from gateway.app import Gateway, bargein_version
from gateway.process import Console, fit_to_open_files, log_loop_errors, notify_systemd
from gateway.settings.options import Config
from gateway.settings.settings import Settings, SettingsError
from gateway.settings.sources import ConfigSources
from llm.demo import server as demo
from llm.provider import Provider
from metrics.logs import get_logger

_GC_THRESHOLDS = (10_000, 20, 50)

_StopSignal: TypeAlias = "gevent.event.AsyncResult[signal.Signals | None]"
"""Set once, to the signal that stops the daemon, or to None where the gateway gives up."""

_log = get_logger("SYS")


# Running -----------------------------------------------------------------------------------------


def serve(
    settings: Settings,
    console: Console,
    on_hangup: Callable[[Gateway], None],
    *,
    was_hung_up: Callable[[], bool] = lambda: False,
) -> int:
    """Run the daemon until a signal stops it.

    Args:
        settings: all settings.
        console: where its lines are printed.
        on_hangup: called on SIGHUP; where that comes during the start, when it is over.
        was_hung_up: returns whether one came before this was called.

    Returns:
        The exit code: 0 after a signal, 1 if it could not start or had to give up.
    """
    # Startup: signals first, so that none is lost.
    stop = _handle_stop_signals(console)
    settings = fit_to_open_files(settings)
    gateway = Gateway(settings, on_give_up=lambda: stop.set(None))
    gateway.metrics.log_lines_lost.set_function(lambda: console.lost)
    has_started = gevent.event.Event()

    reloading = gevent.lock.RLock()

    def reload_once_started() -> None:
        has_started.wait()
        with reloading:  # one after another, so that the newest settings are the last ones applied
            on_hangup(gateway)

    if hasattr(signal, "SIGUSR1"):
        gevent.signal_handler(signal.SIGUSR1, log_state_dump)
    if hasattr(signal, "SIGHUP"):
        gevent.signal_handler(signal.SIGHUP, reload_once_started)
    log_loop_errors()
    try:
        gateway.start()
    except OSError as error:
        where = error.filename or f"{settings.server.host}:{settings.server.port}"
        return _cannot_listen(console, where, error)
    # On a terminal that shows both, the log would only repeat the printed lines.
    log = _log.debug if os.isatty(1) and os.isatty(2) else _log.info
    log("Started", **_started_fields(gateway))
    _print_banner(gateway, console)
    _tune_garbage_collector()
    notify_systemd("READY=1")
    has_started.set()
    if was_hung_up():
        gevent.spawn(reload_once_started)

    # Serving: everything happens in other greenlets.
    stopped_by = stop.get()

    # Shutdown: sessions finish or are told to go, then everything is closed.
    log("Stopping", signal=stopped_by and stopped_by.name)
    notify_systemd("STOPPING=1")
    if stopped_by is not None:
        gateway.drain()
    gateway.stop()
    code = 1 if stopped_by is None else 0
    _log.info("Stopped", exit_code=code, **gateway.lifetime())
    return code


def serve_demo(console: Console, host: str, port: int, tokens_per_second: float) -> int:
    """Run the demo provider alone until a signal stops it.

    Args:
        console: where its lines are printed.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        tokens_per_second: pace of its answers.

    Returns:
        The exit code: 0 after a signal, 1 if it could not start.
    """
    stop = _handle_stop_signals(console)
    log_loop_errors()
    try:
        with demo.DemoProvider(host, port, tokens_per_second) as provider:
            console.say(f"listening on {provider.base_url}")
            stop.get()
            return 0
    except OSError as error:
        return _cannot_listen(console, f"{host}:{port}", error)


def _handle_stop_signals(console: Console) -> _StopSignal:
    """Handle SIGINT and SIGTERM: the first one sets the result, a second one ends the process."""
    stop: _StopSignal = gevent.event.AsyncResult()
    loop = gevent.get_hub().loop
    is_second = False

    def on_signal(number: int, _frame: object) -> None:
        # Called by Python itself, at any point of the program: so a second signal ends the process
        # even where the event loop is stuck.
        nonlocal is_second
        if is_second:
            os._exit(128 + number)
        is_second = True
        loop.run_callback_threadsafe(begin_to_stop, signal.Signals(number))

    def begin_to_stop(received: signal.Signals) -> None:
        stop.set(received)
        console.say(f"stopping ({received.name}; a second signal stops at once)")

    for name in ("SIGINT", "SIGTERM"):
        if hasattr(signal, name):  # not on every platform
            signal.signal(getattr(signal, name), on_signal)
    return stop


def _tune_garbage_collector() -> None:
    """Spare the event loop collections: each one pauses everything.

    All objects of the startup live as long as the process, so the collector need not visit them
    again. Requests leave no reference cycles behind, so it need not run often.
    """
    gc.collect()
    track_greenlets()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


# Reloading ---------------------------------------------------------------------------------------


def reload(gateway: Gateway, running: Config, read_sources: Callable[[], ConfigSources]) -> None:
    """Apply new settings to a running gateway, as far as possible. The log has the result.

    Args:
        gateway: the gateway; nothing changes while it starts or stops.
        running: the settings that it was started with.
        read_sources: reads the settings as they are now, in another thread, since a file may take
            long; if they have errors, nothing changes.
    """
    if not gateway.is_serving:
        _log.error("Not reloaded", fault="the gateway is starting or stopping")
        return
    restart_keys: list[str] = []
    warnings: list[str] = []

    def read() -> Settings | SettingsError:
        sources = read_sources()
        restart_keys.extend(sources.restart_keys(running))
        try:
            return Settings.of(sources)
        except SettingsError as error:
            return error  # gevent reports what a thread raises as an error that nobody caught
        finally:
            warnings.extend(sources.warnings)

    settings = gevent.get_hub().threadpool.apply(read)
    if not gateway.is_serving:
        _log.error("Not reloaded", fault="the gateway is stopping")
        return
    for warning in warnings:
        _log.warning("Questionable setting", warning=warning)
    if isinstance(settings, SettingsError):
        for fault in settings.faults:
            _log.error("Not reloaded", fault=fault)
        return
    can_reload_providers = "llm_url" not in restart_keys
    try:
        if can_reload_providers:
            gateway.reload(settings)
    except (OSError, ValueError) as error:  # a file changed after the check
        # The error's own text may contain a secret.
        _log.error("Not reloaded", fault=f"a provider cannot be used ({type(error).__name__})")
        return
    credentials = settings.credentials
    if credentials is not None and gateway.reload_credentials(credentials):
        keys, accounts = len(credentials.api_keys), len(credentials.accounts)
        _log.info("Credentials reloaded", api_keys=keys, accounts=accounts)
    if restart_keys:
        reason = "a reload applies only provider settings and the contents of auth_file"
        if not can_reload_providers and settings.provider is None:
            reason = "llm_url was removed: the demo provider starts only with the process"
        elif not can_reload_providers:
            reason = "llm_url was added: the demo provider, now in use, stops only with the process"
        _log.warning("Settings need a restart", settings=restart_keys, reason=reason)
    if can_reload_providers:
        _log.info("Reloaded", **_provider_fields(gateway.provider, settings.fallback))


# Log fields and printed lines --------------------------------------------------------------------


def _started_fields(gateway: Gateway) -> dict[str, object]:
    settings = gateway.settings
    return {
        "version": bargein_version(),
        "host": settings.server.host,
        "port": gateway.server.port,
        "is_demo": settings.provider is None,
        "metrics": gateway.ops.url if gateway.ops else None,
        **_provider_fields(gateway.provider, settings.fallback),
    }


def _provider_fields(provider: Provider, fallback: Provider | None) -> dict[str, object]:
    return {
        "provider": provider.name,
        "model": provider.model,
        "fallback": fallback.name if fallback else None,
    }


def _print_banner(gateway: Gateway, console: Console) -> None:
    say = console.say
    settings, provider = gateway.settings, gateway.provider
    host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    demo_note = " (embedded demo provider)" if settings.provider is None else ""
    say(f"bargein {bargein_version()}")
    say(f"listening on ws://{host}:{gateway.server.port}/ws/agent/stream")
    say(f"provider {_shown_url(provider)}{demo_note}, model {provider.model}")
    if gateway.ops is not None:
        say(f"metrics on {gateway.ops.url}")
    if settings.fallback is not None:
        say(f"fallback {_shown_url(settings.fallback)}, model {settings.fallback.model}")
    if settings.credentials is not None:
        keys, accounts = len(settings.credentials.api_keys), len(settings.credentials.accounts)
        say(f"clients need one of the API keys ({keys}) or accounts ({accounts}) that are known")


def _shown_url(provider: Provider) -> str:
    return provider.base_url.partition("?")[0]  # some providers take the key in the query


def _cannot_listen(console: Console, where: str, error: OSError) -> int:
    console.complain(f"error: cannot listen on {where}: {_reason(error)}")
    return 1


def _reason(error: OSError) -> str:
    """The system's words for an error, without the address that gevent and Python add to them."""
    # The codes of getaddrinfo are not errno's; on Linux they are negative.
    code = 0 if isinstance(error, socket.gaierror) else error.errno or 0
    if code > 0:
        return os.strerror(code)
    return (error.strerror or str(error)).partition(": (")[0].partition(" (while ")[0]
