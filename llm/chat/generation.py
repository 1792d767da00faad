"""One generation: a reader greenlet that asks a provider, and writes what arrives to a sink.

Only the reader uses the socket. To stop a generation, its greenlet is killed, which raises inside
whatever it is blocked in, in every phase: resolving, connecting, in the TLS handshake, waiting for
headers or an event, in the middle of a chunk, under a flood, waiting for a slow client, or for the
next retry. The connection is ended first, before the exception has left the reader. So `close()`
never blocks, any greenlet may call it at any time, and it cannot close a connection that is used by
another request by then.

Before the first token, the same provider may be asked again, and then the fallback provider. After
the first token no provider is asked again: the user has seen a part of this answer, and would get
the start of another answer after it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import gevent

from llm.chat.attempt import Attempt
from llm.chat.attempt import Sink as AttemptSink
from llm.chat.breaker import Breaker, BreakerState, Trial
from llm.chat.client import ProviderClient
from llm.chat.completions import Prompt, Usage, UsageEstimate
from llm.chat.retries import is_about_usage, is_requests_fault, may_retry, pause_seconds
from llm.errors import KeptConnectionEndedError, LimitPassedError, StreamError
from llm.http.connections import Stopped
from llm.limits import limited
from llm.loop import Loop
from llm.provider import Provider
from llm.stage import Ending, Stage, StageResult
from metrics.logs import get_logger

_log = get_logger("LLM")


@dataclass(frozen=True)
class GenerationSettings:
    """What applies to every generation, whichever provider answers.

    Args:
        total_timeout: seconds from the start to the end of the answer; 0 is no limit.
        breaker_failures: after so many failures in a row only the fallback is asked; 0 is never.
        breaker_seconds: how long, until the first provider is tried again.
    """

    total_timeout: float = 0.0
    breaker_failures: int = 5
    breaker_seconds: float = 30.0


class Sink(AttemptSink, Protocol):
    """What a reader writes to. All methods are called in the reader's greenlet."""

    def retrying(self, provider: str, error: StreamError, pause_seconds: float) -> None:
        """The provider of this name failed, and will be asked again after a pause."""

    def falling_back(self, provider: str, error: StreamError | None) -> None:
        """The fallback is asked instead of the provider of this name.

        Args:
            error: why it failed; None where it was not asked, because it has failed too often.
        """


class GenerationResult(StageResult, frozen=True):
    """The one report of a generation.

    Args:
        finish_reason: the provider's, such as ``stop`` or ``length``.
        usage: tokens, as the provider counted them; None where it did not say.
        usage_estimate: what to estimate them from; None when the provider cannot have generated
            any.
        provider: name of the provider that was asked last; empty where none was.
    """

    name: str = "generate"
    finish_reason: str | None = None
    usage: Usage | None = None
    usage_estimate: UsageEstimate | None = None
    provider: str = ""


class LlmClient:
    """The providers; `generation()` makes one generation that asks them.

    Args:
        provider: asked first.
        fallback: asked when the first fails before its first token; None where there is no other.
        settings: what applies whichever of them answers.
        loop: schedules the readers. Its thread is the only one that may use this client.

    Raises:
        ValueError: the URL of one is not valid.
        OSError: the certificates of one cannot be read.
    """

    def __init__(
        self,
        provider: Provider,
        fallback: Provider | None = None,
        settings: GenerationSettings | None = None,
        *,
        loop: Loop,
    ) -> None:
        self.settings = settings or GenerationSettings()
        self.loop = loop
        self.first = ProviderClient(provider, loop)
        self.fallback = None if fallback is None else ProviderClient(fallback, loop)
        self.breaker = self._new_breaker()

    def _new_breaker(self) -> Breaker:
        settings = self.settings
        return Breaker(
            settings.breaker_failures, settings.breaker_seconds, on_change=self._breaker_changed
        )

    def _breaker_changed(self, state: BreakerState) -> None:
        provider = self.first.name
        if state is BreakerState.OPEN:
            seconds = self.settings.breaker_seconds
            self._log_later(_log.warning, "Provider left alone", provider=provider, seconds=seconds)
        elif state is BreakerState.CLOSED:
            self._log_later(_log.info, "Provider answers again", provider=provider)

    def _log_later(self, log: Callable[..., object], event: str, **fields: object) -> None:
        # In the order of events: behind the lines of what has caused it.
        self.loop.run_deferred(functools.partial(log, event, **fields))

    def generation(
        self, prompt: Prompt, sink: Sink, on_end: Callable[[GenerationResult], None]
    ) -> Generation:
        """Make a generation, which does not start by itself.

        Args:
            prompt: what to ask.
            sink: gets what arrives.
            on_end: called once, in the hub, when the generation is over and its connection is
                closed or given back; must not block.
        """
        return Generation(self, prompt, sink, on_end)

    def reload(self, provider: Provider, fallback: Provider | None) -> None:
        """Ask these providers from the next generation on. Running ones keep the old providers.

        Raises:
            ValueError: the URL of one is not valid. Nothing has changed then.
            OSError: the certificates of one cannot be read. Nothing has changed then.
        """
        first = ProviderClient(provider, self.loop)
        second = None if fallback is None else ProviderClient(fallback, self.loop)
        self.first.retire()
        if self.fallback is not None:
            self.fallback.retire()
        self.first, self.fallback = first, second
        self.breaker = self._new_breaker()

    def close(self) -> None:
        """Close the idle connections."""
        self.first.close()
        if self.fallback is not None:
            self.fallback.close()


class Generation(Stage):
    """The stage *generate*: one answer, from its request to its end. `LlmClient.generation` makes
    it."""

    name = "generate"

    def __init__(
        self,
        llm: LlmClient,
        prompt: Prompt,
        sink: Sink,
        on_end: Callable[[GenerationResult], None],
    ) -> None:
        self._llm = llm
        self._prompt = prompt
        self._sink = sink
        self._on_end: Callable[[GenerationResult], None] | None = on_end
        self._is_closing = False
        self._attempt: Attempt | None = None
        self._without_usage: set[ProviderClient] = set()
        """The providers that rejected `stream_options` in this generation."""
        self._avoids_kept = False
        """Whether attempts must not use a kept connection: one has ended without an answer."""
        self._started_at = time.monotonic()
        self._too_long: LimitPassedError | None = None
        self._result: GenerationResult | None = None
        self._closed_at: float | None = None
        self._loop = llm.loop
        self._reader = gevent.Greenlet(self._run)
        self._reader.rawlink(self._report)

    @property
    def progress_at(self) -> float:
        """`time.monotonic()` of the last byte from a provider; before any, of its request."""
        return self._started_at if self._attempt is None else self._attempt.progress_at

    def start(self) -> None:
        """Start the reader, unless `close()` was called before."""
        if not self._is_closing:
            self._started_at = time.monotonic()
            self._reader.start()

    def close(self) -> None:
        """Stop the reader and close its connection, in whatever phase it is.

        Never blocks; `on_end` follows. Any greenlet may call it, any number of times: only the
        first call kills, because a second kill would interrupt the cleaning up after the first.
        """
        if not self._is_closing:
            self._is_closing = True
            if self._attempt is not None:
                self._attempt.is_stopping = True
            self._loop.run_next(self._kill)

    def _kill(self) -> None:
        # In the hub. `Greenlet.kill` would do this in the next iteration of the loop, and the
        # reader's link would report in the one after.
        stopped = Stopped()
        self._loop.throw(self._reader, stopped)
        self._closed_at = self._closed_at or stopped.closed_at
        if self._is_closed:
            # Another client's INTERRUPT may have arrived by now: its stream is closed first.
            self._loop.run_after_poll(self._report, self._reader)

    @property
    def _is_closed(self) -> bool:
        """True when the connection is closed or given back. The reader has ended, or is about
        to."""
        return self._reader.dead or self._closed_at is not None

    def kill_again(self) -> None:
        """The last resort for a reader that has not ended long after `close()`."""
        self._reader.kill(block=False)

    def _report(self, _reader: object) -> None:
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None  # once; and leave no cycle
            on_end(self._result or self._make_result(Ending.CLOSED, None))

    def _make_result(self, ending: Ending, error: StreamError | None) -> GenerationResult:
        attempt = self._attempt
        if attempt is None:
            return GenerationResult(ending, error, closed_at=self._closed_at)
        provider = attempt.client.provider
        return GenerationResult(
            ending,
            error,
            self._closed_at,
            provider.stops_on_close if attempt.may_cost else None,
            finish_reason=attempt.finish_reason,
            usage=attempt.usage,
            usage_estimate=attempt.usage_estimate,
            provider=attempt.client.name,
        )

    # In the reader's greenlet from here on.

    def _run(self) -> None:
        ending, error = Ending.CLOSED, None
        try:
            self._loop.wait_turn()  # first: to make a request takes half a millisecond of work
            with self._total_limit():
                self._ask_providers()
            ending = Ending.COMPLETED
            if self._attempt is not None:
                self._attempt.finish()
        except gevent.GreenletExit:
            # An uncaught one would keep its traceback, and so the socket.
            pass
        except StreamError as failure:
            _forget_how(failure)
            ending, error = Ending.FAILED, failure
        except Exception:
            _log.exception("Reader failed")
            ending, error = Ending.FAILED, StreamError("the gateway failed to read the answer")
        finally:
            self._closed_at = self._closed_at or time.monotonic()
        self._result = self._make_result(ending, error)

    @contextlib.contextmanager
    def _total_limit(self) -> Iterator[None]:
        seconds = self._llm.settings.total_timeout
        if not seconds:
            yield
            return
        self._too_long = LimitPassedError("total", seconds)
        with limited(self._loop, seconds, self._too_long):
            yield

    def _ask_providers(self) -> None:
        """Return at the end of the answer. Its attempt is not finished yet.

        Raises:
            StreamError: why it failed, in words for the client.
        """
        first, fallback = self._llm.first, self._llm.fallback
        if fallback is None:
            self._ask(first, None)
            return
        trial = self._llm.breaker.trial()
        if trial is not None:
            failure = self._try(first, trial)
            if failure is None:
                return
            self._sink.falling_back(first.name, failure)
        else:
            self._sink.falling_back(first.name, None)
        self._ask(fallback, None)

    def _try(self, client: ProviderClient, trial: Trial) -> StreamError | None:
        """Ask a provider that has a fallback.

        Returns:
            None at the end of the answer; else why the fallback should be asked.
        """
        try:
            self._ask(client, trial)
            trial.succeeded()
        except StreamError as error:
            # It has also failed if it has used up the total limit.
            if is_requests_fault(error):
                trial.succeeded()
            else:
                trial.failed()
            if self._is_final(error):
                raise
            return _forget_how(error)
        finally:
            trial.abandoned()
        return None

    def _ask(self, client: ProviderClient, trial: Trial | None) -> None:
        """Ask one provider, and again where a retry may help."""
        retries = itertools.count()
        while (pause := self._attempt_once(client, trial, retries)) is not None:
            gevent.sleep(pause)

    def _attempt_once(
        self, client: ProviderClient, trial: Trial | None, retries: Iterator[int]
    ) -> float | None:
        """Return None at the end of the answer, else the seconds until the next attempt."""
        on_first_token = _nothing if trial is None else trial.succeeded
        asks_for_usage = client.asks_for_usage and client not in self._without_usage
        attempt = self._attempt = Attempt(
            client,
            self._prompt,
            self._sink,
            on_first_token,
            include_usage=asks_for_usage,
            on_new_connection=self._avoids_kept,
        )
        try:
            attempt.run()
        except StreamError as error:
            if self._is_final(error):
                raise
            if isinstance(error, KeptConnectionEndedError):
                self._avoids_kept = True  # so this happens once
                self._sink.retrying(client.name, _forget_how(error), 0.0)
                return 0.0
            if asks_for_usage and is_about_usage(error):
                self._without_usage.add(client)
                return 0.0
            number = next(retries)
            if number >= client.provider.retries or not may_retry(error):
                raise
            pause = pause_seconds(number, error, client.provider.retry_after_cap)
            self._sink.retrying(client.name, _forget_how(error), pause)
            return pause
        finally:
            if attempt.may_cost and client in self._without_usage:
                client.asks_for_usage = False  # without it the provider accepts: never ask again
        return None

    def _is_final(self, error: StreamError) -> bool:
        """True if no provider may be asked again, whatever the error: the answer has begun, or the
        total limit has passed."""
        has_token = self._attempt is not None and self._attempt.has_token
        return has_token or error is self._too_long


def _forget_how(error: StreamError) -> StreamError:
    """Return the error without the frames that it came through: they would keep the socket."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def _nothing() -> None:
    pass
