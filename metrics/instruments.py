"""Every instrument, declared once. The names are a contract with whoever scrapes them.

No label ever holds an id. The values of labels are known beforehand, and their series are there
from the start with 0, since no query can see a counter grow that began with 1.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
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
from prometheus_client.metrics import MetricWrapperBase

_M = TypeVar("_M", bound=MetricWrapperBase)

# Without this each counter and histogram has a second series that says when it began, and nobody
# asks; Prometheus sees a counter that began anew by itself.
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
    "OTHER",  # whatever else a client says
)
INTERRUPT_OUTCOMES = ("stopped", "already_done", "unknown", "timed_out")
ERROR_KINDS = (
    *("ConnectFailed", "LimitPassed", "BadStatus", "NotAStream", "MalformedStream"),
    *("MalformedCall", "ProviderReported", "IncompleteAnswer"),
    "Stream",  # the gateway itself failed
)
REFUSALS = (
    "origin",  # a connection of a web page from elsewhere
    "request",  # another one is live, or as many as may be
    "shutdown",
    "max_sessions",
    "max_requests",
    "max_connections",  # of clients that have not registered
    "auth",  # credentials that are not accepted
    "auth_busy",  # too many passwords wait to be checked
)
"""Values of labels. What the other rooms call these things is held to them by a test."""

_MAX_EXEMPLAR_ID = 64


def exemplar(request_id: str | None) -> dict[str, str] | None:
    """What an observation is remembered by, where the scraper asks for OpenMetrics.

    None where there is no id, and for one that is too long: `observe` would raise.
    """
    if request_id is None or len(request_id) > _MAX_EXEMPLAR_ID:
        return None
    return {"request_id": request_id}


class Family(Generic[_M]):
    """Counters (or what it be) of one name, by their labels: looked up once, then at hand.

    Args:
        parent: the instrument, with label names.
        known: values that are there from the start.
    """

    def __init__(self, parent: _M, known: Iterable[tuple[str, ...]]) -> None:
        self._parent = parent
        self._children: dict[tuple[str, ...], _M] = {}
        for values in known:
            self.labels(*values)

    def labels(self, *values: str) -> _M:
        """The one with these values of its labels."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._parent.labels(*values)
        return child

    def total(self) -> int:
        """What all counters of the family have counted together."""
        return int(
            sum(
                sample.value
                for metric in self._parent.collect()
                for sample in metric.samples
                if sample.name.endswith("_total")
            )
        )


def _one_by_one(values: Iterable[str]) -> Iterable[tuple[str, ...]]:
    return ((value,) for value in values)


class Metrics:
    """The instruments of one gateway.

    Args:
        registry: where they are registered; a fresh one in tests.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        interrupt_seconds = Histogram(
            "bargein_interrupt_seconds",
            "From reading an INTERRUPT frame to the end of the stage.",
            ["stage"],
            buckets=_INTERRUPT_BUCKETS,
            registry=registry,
        )
        self.stream_closed_seconds = interrupt_seconds.labels("stream_closed")
        self.acknowledged_seconds = interrupt_seconds.labels("acknowledged")
        self.interrupts = Family(
            Counter(
                "bargein_interrupts_total",
                "Interrupted or missed targets, by what the client gave as reason.",
                ["reason", "outcome"],
                registry=registry,
            ),
            product(INTERRUPT_REASONS, INTERRUPT_OUTCOMES),
        )
        self.frames_purged = Counter(
            "bargein_frames_purged_total",
            "Queued data frames that interrupts dropped.",
            registry=registry,
        )
        self.requests = Family(
            Counter(
                "bargein_requests_total", "Requests that ended.", ["outcome"], registry=registry
            ),
            _one_by_one(OUTCOMES),
        )
        self.requests_active = Family(
            Gauge(
                "bargein_requests_active", "Generations, by state.", ["state"], registry=registry
            ),
            _one_by_one(STATES),
        )
        self.sessions_active = Gauge(
            "bargein_sessions_active", "Registered sessions.", registry=registry
        )
        self.sessions = Family(
            Counter(
                "bargein_sessions_total", "Sessions that ended.", ["outcome"], registry=registry
            ),
            _one_by_one(("ended", "failed")),
        )
        self.time_to_first_chunk_seconds = Histogram(
            "bargein_time_to_first_chunk_seconds",
            "From the start of a generation to its first token of any kind.",
            buckets=_FIRST_CHUNK_BUCKETS,
            registry=registry,
        )
        self.generation_seconds = Family(
            Histogram(
                "bargein_generation_seconds",
                "From the start of a generation to its closed stream.",
                ["outcome"],
                buckets=_GENERATION_BUCKETS,
                registry=registry,
            ),
            _one_by_one(OUTCOMES),
        )
        self.text_chars = Counter(
            "bargein_text_chars_total",
            "Code points of answers that were handed to the kernel.",
            registry=registry,
        )
        self.llm_tokens = Family(
            Counter(
                "bargein_llm_tokens_total",
                "Tokens, as providers counted them.",
                ["kind"],
                registry=registry,
            ),
            _one_by_one(("prompt", "completion")),
        )
        self.llm_posts = Counter(
            "bargein_llm_posts_total", "Requests that were sent to a provider.", registry=registry
        )
        self.llm_retries = Family(
            Counter(
                "bargein_llm_retries_total",
                "Times that a provider was asked again, by what had failed.",
                ["kind"],
                registry=registry,
            ),
            _one_by_one(ERROR_KINDS),
        )
        self.llm_fallbacks = Counter(
            "bargein_llm_fallbacks_total",
            "Generations that the fallback provider was asked for.",
            registry=registry,
        )
        self.llm_errors = Family(
            Counter(
                "bargein_llm_errors_total", "Generations that failed.", ["kind"], registry=registry
            ),
            _one_by_one(ERROR_KINDS),
        )
        self.requests_reaped = Counter(
            "bargein_requests_reaped_total", "Requests ended by the reaper.", registry=registry
        )
        self.streams_open_after_ack = Counter(
            "bargein_streams_open_after_ack_total",
            "Streams that were still open when their INTERRUPT was answered.",
            registry=registry,
        )
        self.slow_clients = Counter(
            "bargein_slow_clients_total",
            "Connections dropped since their client did not read.",
            registry=registry,
        )
        self.refused = Family(
            Counter(
                "bargein_refused_total",
                "Connections and requests refused.",
                ["reason"],
                registry=registry,
            ),
            _one_by_one(REFUSALS),
        )
        self.drain_timeouts = Counter(
            "bargein_drain_timeouts_total",
            "Shutdowns whose drain limit passed while requests were live.",
            registry=registry,
        )
        self.outbox_bytes = Gauge(
            "bargein_outbox_bytes", "Bytes that wait for slow clients.", registry=registry
        )
        self.mailbox_messages = Gauge(
            "bargein_mailbox_messages", "Messages that actors have not handled.", registry=registry
        )
        self.loop_lag_seconds = Histogram(
            "bargein_loop_lag_seconds",
            "How late greenlets get their turn, looked at ten times a second.",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        Info("bargein_build", "What is running.", registry=registry).info(
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
