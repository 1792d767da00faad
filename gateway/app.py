"""The composition root: everything is put together here, and taken down again in reverse."""

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
"""How long the loop may run what is ready before it looks for more. Long, so that an interrupt's
few steps from mailbox to mailbox follow each other at once, whatever else came in; a greenlet that
always has work yields to the whole loop (`llm/http/lines.py`)."""

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
        self.sessions = Quota(settings.server.max_sessions)
        self.requests = Quota(settings.session.max_requests)
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
        """Whether it has started, and is not told to stop."""
        return self._is_up and not self._is_draining

    def unready(self) -> str | None:
        """Why new clients are not welcome, in words; None when they are."""
        if self._is_draining:
            return "draining"
        if not self._is_up:
            return "starting"
        if self.sessions.is_full:
            return f"out of capacity: {self.sessions.taken} sessions (--max-sessions)"
        if self.requests.is_full:
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
        self.door.refuse_sessions()
        if not limit:
            return
        self._ends_at = time.monotonic() + limit
        seconds = limit - min(limit * _END_SHARE, _MOST_END_SECONDS)
        census = self.supervision.census()
        # Where the supervisor has just failed, the next one lets them go.
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
        """How many clients there are, registered or not; without a census, connections."""
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
