"""All instruments, declared once. Names and labels are a contract with dashboards and alerts.

No label contains an id. All label values are known in advance, and their series exist from the
start with 0: `rate()` and `increase()` miss the first event of a series that appears with 1.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

_M = TypeVar("_M", bound=MetricWrapperBase)

# Otherwise each counter and histogram has a second series with its creation time, which nothing
# uses: Prometheus detects a counter reset by itself.
disable_created_metrics()  # type: ignore[no-untyped-call]

_INTERRUPT_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_FIRST_CHUNK_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GENERATION_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

OUTCOMES = ("completed", "interrupted", "failed", "reaped")
STATES = ("connecting", "waiting", "streaming")
INTERRUPT_REASONS = (
    *("USER_NEW_INPUT", "USER_STOP", "USER_VOICE_INPUT", "CLIENT_ERROR"),
    "OTHER",  # any other reason that a client gives
)
INTERRUPT_OUTCOMES = ("stopped", "already_done", "unknown", "timed_out")
ERROR_KINDS = (
    *("ConnectFailed", "LimitPassed", "BadStatus", "NotAStream", "MalformedStream"),
    *("MalformedCall", "ProviderReported", "IncompleteAnswer"),
    "Stream",  # a bug of the gateway
)
RETRY_KINDS = (
    *ERROR_KINDS,
    "KeptConnectionEnded",  # sent again on a new connection; no error of a generation
)
REFUSALS = (
    "origin",  # a connection from a web page of another origin
    "request",  # another request is live, or the session limit on live requests is reached
    "shutdown",
    "max_sessions",
    "max_requests",
    "max_connections",  # a connection that had not registered, closed to make room
    "auth",  # credentials not accepted
    "auth_busy",  # too many passwords are waiting to be checked
)
"""Label values. A test checks that they match the names in the other rooms."""

_MAX_EXEMPLAR_ID = 64
"""prometheus_client raises on an exemplar whose labels exceed 128 characters."""


def exemplar(request_id: str | None) -> dict[str, str] | None:
    """The exemplar of an observation: its request id. Scrapers get it with OpenMetrics.

    None where there is no id, or one so long that `observe` would raise.
    """
    if request_id is None or len(request_id) > _MAX_EXEMPLAR_ID:
        return None
    return {"request_id": request_id}


class Family(Generic[_M]):
    """The children of one instrument by their label values: each is looked up only once.

    Args:
        parent: the instrument, with label names.
        known: label values whose series exist from the start.
    """

    def __init__(self, parent: _M, known: Iterable[tuple[str, ...]]) -> None:
        self._parent = parent
        self._children: dict[tuple[str, ...], _M] = {}
        for values in known:
            self.labels(*values)

    def labels(self, *values: str) -> _M:
        """The child with these label values."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._parent.labels(*values)
        return child

    def total(self) -> int:
        """The sum of all counters of the family."""
        return int(
            sum(
                sample.value
                for metric in self._parent.collect()
                for sample in metric.samples
                if sample.name.endswith("_total")
            )
        )


class CounterOf(Collector):
    """A counter whose value is read when it is scraped: for what another thread counts.

    Args:
        name: without `_total`.
        documentation: its help text.
        registry: registers it.
    """

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._documentation = documentation
        self._function: Callable[[], int] = lambda: 0
        registry.register(self)

    def set_function(self, function: Callable[[], int]) -> None:
        """Read the value from this function."""
        self._function = function

    def collect(self) -> Iterable[CounterMetricFamily]:
        """See `Collector`."""
        yield CounterMetricFamily(self._name, self._documentation, self._function())


def _one_by_one(values: Iterable[str]) -> Iterable[tuple[str, ...]]:
    return ((value,) for value in values)


class Metrics:
    """The instruments of one gateway.

    Args:
        registry: registers them; a fresh one in tests.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        interrupt_seconds = Histogram(
            "bargein_interrupt_seconds",
            "Time from reading an INTERRUPT frame to the end of the stage.",
            ["stage"],
            buckets=_INTERRUPT_BUCKETS,
            registry=registry,
        )
        self.stream_closed_seconds = interrupt_seconds.labels("stream_closed")
        self.acknowledged_seconds = interrupt_seconds.labels("acknowledged")
        self.interrupts = Family(
            Counter(
                "bargein_interrupts_total",
                "Targets of INTERRUPT frames, by the client's reason and the outcome.",
                ["reason", "outcome"],
                registry=registry,
            ),
            product(INTERRUPT_REASONS, INTERRUPT_OUTCOMES),
        )
        self.frames_purged = Counter(
            "bargein_frames_purged_total",
            "Queued data frames dropped by interrupts.",
            registry=registry,
        )
        self.requests = Family(
            Counter(
                "bargein_requests_total",
                "Requests that ended, by outcome.",
                ["outcome"],
                registry=registry,
            ),
            _one_by_one(OUTCOMES),
        )
        self.requests_active = Family(
            Gauge(
                "bargein_requests_active",
                "Live generations, by state.",
                ["state"],
                registry=registry,
            ),
            _one_by_one(STATES),
        )
        self.sessions_active = Gauge(
            "bargein_sessions_active", "Registered sessions.", registry=registry
        )
        self.sessions = Family(
            Counter(
                "bargein_sessions_total",
                "Sessions that ended, by outcome.",
                ["outcome"],
                registry=registry,
            ),
            _one_by_one(("ended", "failed")),
        )
        self.time_to_first_chunk_seconds = Histogram(
            "bargein_time_to_first_chunk_seconds",
            "Time from the start of a generation to its first token of any kind.",
            buckets=_FIRST_CHUNK_BUCKETS,
            registry=registry,
        )
        self.generation_seconds = Family(
            Histogram(
                "bargein_generation_seconds",
                "Time from the start of a generation to its closed stream.",
                ["outcome"],
                buckets=_GENERATION_BUCKETS,
                registry=registry,
            ),
            _one_by_one(OUTCOMES),
        )
        self.text_chars = Counter(
            "bargein_text_chars_total",
            "Code points of answers passed to the kernel.",
            registry=registry,
        )
        self.llm_tokens = Family(
            Counter(
                "bargein_llm_tokens_total",
                "Tokens as counted by providers.",
                ["kind"],
                registry=registry,
            ),
            _one_by_one(("prompt", "completion")),
        )
        self.llm_posts = Counter(
            "bargein_llm_posts_total", "POSTs sent to providers.", registry=registry
        )
        self.llm_retries = Family(
            Counter(
                "bargein_llm_retries_total",
                "Retries, by the kind of error before.",
                ["kind"],
                registry=registry,
            ),
            _one_by_one(RETRY_KINDS),
        )
        self.llm_fallbacks = Counter(
            "bargein_llm_fallbacks_total",
            "Generations for which the fallback provider was asked.",
            registry=registry,
        )
        self.llm_errors = Family(
            Counter(
                "bargein_llm_errors_total",
                "Generations that failed, by kind of error.",
                ["kind"],
                registry=registry,
            ),
            _one_by_one(ERROR_KINDS),
        )
        self.requests_reaped = Counter(
            "bargein_requests_reaped_total", "Requests ended by the reaper.", registry=registry
        )
        self.streams_open_after_ack = Counter(
            "bargein_streams_open_after_ack_total",
            "Streams still open when their INTERRUPT was acknowledged.",
            registry=registry,
        )
        self.slow_clients = Counter(
            "bargein_slow_clients_total",
            "Connections dropped because the client did not read.",
            registry=registry,
        )
        self.refused = Family(
            Counter(
                "bargein_refused_total",
                "Connections and requests refused, by reason.",
                ["reason"],
                registry=registry,
            ),
            _one_by_one(REFUSALS),
        )
        self.drain_timeouts = Counter(
            "bargein_drain_timeouts_total",
            "Shutdowns that interrupted live requests.",
            registry=registry,
        )
        self.outbox_bytes = Gauge(
            "bargein_outbox_bytes", "Bytes waiting for slow clients.", registry=registry
        )
        self.mailbox_messages = Gauge(
            "bargein_mailbox_messages", "Messages not yet handled by actors.", registry=registry
        )
        self.log_lines_lost = CounterOf(
            "bargein_log_lines_lost",
            "Lines of the log, and printed ones, that could not be written.",
            registry=registry,
        )
        self.loop_lag_seconds = Histogram(
            "bargein_loop_lag_seconds",
            "Delay until a ready greenlet runs, sampled ten times a second.",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        Info("bargein_build", "Versions of what is running.", registry=registry).info(
            {
                "version": _version("bargein"),
                "python": platform.python_version(),
                "gevent": _version("gevent"),
            }
        )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
