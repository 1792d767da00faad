"""The composition root: builds and starts the parts of the gateway, and stops them in reverse."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import gevent
import gevent.event
from prometheus_client import CollectorRegistry

from actors.actor import queued_messages
from actors.loop.lanes import lanes
from actors.loop.loop_lag import LoopLag
from actors.messages import Census, Drain, ShutDown
from actors.quota import Quota
from actors.session.session import Sessions
from actors.supervisor import Supervision
from gateway.access.authenticator import Authenticator
from gateway.access.credentials import Credentials
from gateway.ops.server import OpsServer
from gateway.server.server import Server
from gateway.settings.settings import Settings
from gateway.wire.door import WireDoor
from gateway.wire.frames import HealthStatus
from llm.chat.generation import LlmClient
from llm.demo import server as demo
from llm.provider import Provider
from metrics.instruments import Metrics
from metrics.logs import get_logger

_CALLBACK_SECONDS = 0.001
"""How long the loop runs ready callbacks before it polls again. Long enough that the steps of an
interrupt, from mailbox to mailbox, all run before the next poll. A greenlet that always has work
yields to the whole loop (`llm/http/lines.py`)."""

_GOODBYES_PER_SECOND = 100
"""The average rate at which clients are told to leave: each will reconnect elsewhere at once."""

_SPREAD_SHARE = 0.5
"""The part of the available time in which clients are told to leave. The rest is for the last ones
to close."""

_END_SHARE, _MAX_END_SECONDS = 0.5, 5.0
"""The last part of the drain's time limit, at most this long. It is for the clients that are left:
their requests are interrupted, then they are told to leave, at random times."""

_STOP_SECONDS = 2.0
"""The time limit for the same steps without a drain."""

_TEARDOWN_SHARE, _MAX_TEARDOWN_SECONDS = 0.3, 0.5
"""The last part of either, at most this long, is for the teardown after the clients have left."""

_log = get_logger("SYS")


def bargein_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("bargein")
    except PackageNotFoundError:
        return "0 (not installed)"


class Gateway:
    """The daemon without its command line. `stop()` takes down what `start()` built, in reverse.

    Args:
        settings: all settings.
        on_give_up: called when the supervisor keeps failing and the gateway cannot go on.
    """

    def __init__(self, settings: Settings, on_give_up: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.metrics = Metrics(CollectorRegistry())
        self._on_give_up = on_give_up
        self._started_at = time.monotonic()
        self._teardown = contextlib.ExitStack()
        self._is_up = self._is_draining = False
        self._ends_at: float | None = None
        """`time.monotonic()` when the shutdown must be complete; None without a drain limit."""
        self.sessions = Quota(settings.server.max_sessions)
        self.requests = Quota(settings.session.max_requests)
        self.ops: OpsServer | None = None

    def start(self) -> None:
        """Start everything.

        Raises:
            OSError: the gateway cannot listen on the address.
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
        client = LlmClient(
            self.provider, self.settings.fallback, self.settings.generation, loop=lanes()
        )
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

        self.door = WireDoor(
            sessions=Sessions(
                quota=self.sessions,
                requests=self.requests,
                make_stages=lambda *row: [client.generation(*row)],
                tell_supervisor=supervision.tell,
                settings=self.settings.session,
                metrics=self.metrics,
            ),
            authenticator=authenticator,
            health=health_status,
            metrics=self.metrics,
        )
        self.server = Server(
            self.settings.server, self.door.attach, self._health, self.metrics, self.unready
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
        """Whether the gateway has started, and was not told to stop."""
        return self._is_up and not self._is_draining

    def unready(self) -> str | None:
        """The reason why new clients should go elsewhere, for people; None if they are welcome."""
        if self._is_draining:
            return "draining"
        if not self._is_up:
            return "starting"
        if self.sessions.is_full:
            return f"out of capacity: {self.sessions.taken} sessions (--max-sessions)"
        if self.requests.is_full:
            return f"out of capacity: {self.requests.taken} live requests (--max-requests)"
        if self.server.is_full:
            return f"out of capacity: {self.server.connections} connections (limit on open files)"
        return None

    def reload(self, settings: Settings) -> None:
        """Use the providers of these settings from the next generation on. Running generations
        continue with the old ones.

        Args:
            settings: the new settings. They must use the embedded demo provider if the gateway was
                started with it, and must not if it was not.

        Raises:
            OSError: certificates cannot be read. Nothing has changed then.
            ValueError: a URL is not valid. Nothing has changed then.
        """
        provider = self._provider_of(settings)
        self._client.reload(provider, settings.fallback)
        self.provider = provider

    def reload_credentials(self, credentials: Credentials) -> bool:
        """Accept only these credentials from the next REGISTER on. Open sessions continue.

        Returns:
            False if the gateway was started without authentication; then nothing has changed.
        """
        if self._authenticator is None:
            return False
        self._authenticator.credentials = credentials
        return True

    def drain(self) -> None:
        """Accept no more requests, and wait until every session has left.

        Returns before the drain's time limit is over, so that `stop()` has the rest of it.
        """
        limit = self.settings.drain_timeout
        self._is_draining = True
        self.door.refuse_sessions()
        if not limit:
            return
        self._ends_at = time.monotonic() + limit
        seconds = limit - min(limit * _END_SHARE, _MAX_END_SECONDS)
        census = self.supervision.census()
        # If the supervisor has just failed, its successor gets the Drain.
        sessions = self._clients(census)
        _log.info("Draining", sessions=sessions, requests=census.requests if census else None)
        all_gone = gevent.event.Event()
        spread_seconds = _spread(seconds, sessions)
        self.door.drain(spread_seconds)
        self.supervision.tell(Drain(spread_seconds, all_gone.set))
        if not all_gone.wait(seconds):
            self.metrics.drain_timeouts.inc()
            _log.warning("Drain timed out", seconds=seconds)

    def stop(self) -> None:
        """Interrupt live requests, tell the clients to leave, close everything. A second call does
        nothing.

        It returns within the rest of the drain's time limit, whatever clients do.
        """
        if not self._is_up:
            return
        self._is_up, self._is_draining = False, True
        try:
            self.server.stop_listening()
            self._end_sessions()
            lanes().wait_deferred()  # the counts and log lines of sessions
        finally:
            self._teardown.close()
        lanes().wait_deferred()  # and those of the teardown

    def lifetime(self) -> dict[str, object]:
        """Uptime and totals since the start, for the log."""
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
            seconds = min(max(0.0, self._ends_at - now), _MAX_END_SECONDS)
        seconds -= min(seconds * _TEARDOWN_SHARE, _MAX_TEARDOWN_SECONDS)
        until = now + seconds
        census = self.supervision.census()
        if census is None:
            self.door.drain(0)
            return  # without a supervisor, sessions cannot be ended in order
        clients = self._clients(census)
        spread_seconds = 0.0 if self._ends_at is None else _spread(seconds, clients)
        all_ended = gevent.event.Event()
        self.door.drain(spread_seconds)
        self.supervision.tell(ShutDown(spread_seconds, all_ended.set))
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

    def _clients(self, census: Census | None) -> int:
        """The number of clients, registered or not; the number of connections if census is None."""
        return (
            self.server.connections if census is None else census.sessions + self.door.unregistered
        )

    def _health(self) -> dict[str, object]:
        census = self.supervision.census()
        return {
            "status": "ok" if census else "degraded",
            "version": bargein_version(),
            "uptime_seconds": round(time.monotonic() - self._started_at, 3),
            "sessions": self._clients(census) if census else None,
            "requests": census.requests if census else None,
        }


def _spread(seconds: float, clients: int) -> float:
    """Over how many of the available seconds the goodbyes to so many clients are spread."""
    return min(seconds * _SPREAD_SHARE, clients / _GOODBYES_PER_SECOND)


class _CpuMeter:
    """The recent CPU use of this process."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._percent: float | None = None

    def percent(self) -> float:
        """Percent of one core since the last measurement. Measures at most once a second, however
        often it is called."""
        wall, cpu = time.monotonic(), time.process_time()
        if self._percent is None or wall - self._wall >= 1:
            self._percent = round(100 * (cpu - self._cpu) / max(wall - self._wall, 1e-6), 1)
            self._wall, self._cpu = wall, cpu
        return self._percent
