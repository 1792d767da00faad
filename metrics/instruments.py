"""Every instrument, declared once. The names are a contract with whoever scrapes them.

No label ever holds an id. Children that are used on the way of an interrupt are made beforehand,
so that counting there is a plain addition.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_INTERRUPT_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_FIRST_CHUNK_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GENERATION_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


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
        self.interrupts = Counter(
            "bargein_interrupts_total",
            "Interrupted or missed targets, by what the client gave as reason.",
            ["reason", "outcome"],
            registry=registry,
        )
        self.frames_purged = Counter(
            "bargein_frames_purged_total",
            "Queued data frames that interrupts dropped.",
            registry=registry,
        )
        self.requests = Counter(
            "bargein_requests_total", "Requests that ended.", ["outcome"], registry=registry
        )
        self.requests_active = Gauge(
            "bargein_requests_active", "Generations, by state.", ["state"], registry=registry
        )
        self.sessions_active = Gauge(
            "bargein_sessions_active", "Registered sessions.", registry=registry
        )
        self.sessions = Counter(
            "bargein_sessions_total", "Sessions that ended.", ["outcome"], registry=registry
        )
        self.time_to_first_chunk_seconds = Histogram(
            "bargein_time_to_first_chunk_seconds",
            "From the start of a generation to its first token of any kind.",
            buckets=_FIRST_CHUNK_BUCKETS,
            registry=registry,
        )
        self.generation_seconds = Histogram(
            "bargein_generation_seconds",
            "From the start of a generation to its closed stream.",
            ["outcome"],
            buckets=_GENERATION_BUCKETS,
            registry=registry,
        )
        self.text_chars = Counter(
            "bargein_text_chars_total",
            "Code points of answers that were handed to the kernel.",
            registry=registry,
        )
        self.llm_tokens = Counter(
            "bargein_llm_tokens_total",
            "Tokens, as providers counted them.",
            ["kind"],
            registry=registry,
        )
        self.llm_posts = Counter(
            "bargein_llm_posts_total", "Requests that were sent to a provider.", registry=registry
        )
        self.llm_retries = Counter(
            "bargein_llm_retries_total",
            "Times that a provider was asked again, by what had failed.",
            ["kind"],
            registry=registry,
        )
        self.llm_fallbacks = Counter(
            "bargein_llm_fallbacks_total",
            "Generations that the fallback provider was asked for.",
            registry=registry,
        )
        self.llm_errors = Counter(
            "bargein_llm_errors_total", "Generations that failed.", ["kind"], registry=registry
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
        self.refused = Counter(
            "bargein_refused_total",
            "Connections and requests refused.",
            ["reason"],
            registry=registry,
        )
        for outcome in ("completed", "interrupted", "failed", "reaped"):
            self.requests.labels(outcome)
            self.generation_seconds.labels(outcome)
        for state in ("connecting", "waiting", "streaming"):
            self.requests_active.labels(state)
        for kind in ("prompt", "completion"):
            self.llm_tokens.labels(kind)
