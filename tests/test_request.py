"""One generation as an actor, over a stream that a test plays by hand."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import gevent
import gevent.queue
import pykka
import pytest
from prometheus_client import CollectorRegistry

from actors.actor import tell
from actors.loop.lanes import lanes
from actors.messages import (
    AskProgress,
    FirstToken,
    GenerationEnded,
    ProgressTold,
    RegisterAgain,
    RequestAccepted,
    RequestClosed,
    RequestReported,
    StagesEnded,
    Start,
    Stop,
    StreamOpened,
    SupervisorMessage,
    TerminalSent,
)
from actors.outlet import Delivered, RequestEnd
from actors.request import RequestActor
from actors.row import Report, make_report
from llm.chat.completions import Delta, ToolCall, Usage
from llm.chat.generation import GenerationResult, LlmClient
from llm.errors import BadStatusError, IncompleteAnswerError, StreamError
from llm.provider import Provider
from llm.stage import Ending
from metrics.instruments import Metrics
from tests.fakes import LIMIT, PROMPT, Collector, FakeSource, FakeStream

# Fakes: what a request stands between ------------------------------------------------------------


class FakeOutlet:
    """Takes an answer, all of which is delivered at once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.delivered = Delivered()
        self.is_done = False
        self.waited_at = 0.0

    def put(self, text: str) -> None:
        self.texts.append(text)
        self.delivered = Delivered(self.delivered.text + text, self.delivered.calls)

    def put_call(self, call: ToolCall, on_sent: Callable[[], None]) -> None:
        self.delivered = Delivered(self.delivered.text, (*self.delivered.calls, call))
        on_sent()

    def finish(self, end: RequestEnd, on_sent: Callable[[], None]) -> None:
        raise AssertionError("the session does that")

    def discard(self) -> bool:
        raise AssertionError("the session does that")

    def progress_at(self) -> float:
        return self.waited_at


class Given:
    """A request-actor between fakes."""

    def __init__(
        self,
        source: Any = None,
        *,
        tell_supervisor: Callable[[SupervisorMessage], None] | None = None,
    ) -> None:
        self.source = FakeSource() if source is None else source
        self.outlet = FakeOutlet()
        self.metrics = Metrics(CollectorRegistry())
        self.session_mail: gevent.queue.SimpleQueue[Any] = gevent.queue.SimpleQueue()
        self.session = Collector.start(self.session_mail)
        self.supervisor_mail: list[SupervisorMessage] = []
        self.ref = RequestActor.start(
            session_id="sess_1",
            request_id="req_1",
            session=self.session,
            tell_supervisor=tell_supervisor or self.supervisor_mail.append,
            make_stages=lambda *row: [self.source.generation(*row)],
            outlet=self.outlet,
            metrics=self.metrics,
        )

    @property
    def stream(self) -> FakeStream:
        stream: FakeStream = self.source.streams[0]
        return stream

    def tell(self, *messages: object) -> None:
        for message in messages:
            assert tell(self.ref, message)

    def start(self) -> FakeStream:
        """Start it, and wait until its stream runs."""
        self.tell(Start(PROMPT))
        stream: FakeStream = self.source.next()
        return stream

    def report(self) -> Report:
        """Wait for the one report, and until the supervisor was told of it, too."""
        message = self.session_mail.get(timeout=LIMIT)
        lanes().wait_deferred()
        assert isinstance(message, RequestReported)
        assert message.request_id == "req_1"
        return message.report

    def release(self) -> None:
        """Play the session that has nothing more to owe; up to here the actor lives."""
        self.ref.ask(StreamOpened(), timeout=LIMIT)  # changes nothing behind the report
        assert RequestClosed(self.ref.actor_urn) not in self.supervisor_mail
        self.tell(TerminalSent())
        assert self.ref.actor_stopped.wait(LIMIT)
        assert self.supervisor_mail.count(RequestClosed(self.ref.actor_urn)) == 1

    def wait_ended(self) -> None:
        """Wait until the actor has ended, and all that it said has been heard."""
        assert self.ref.actor_stopped.wait(LIMIT)
        self.session.ask("are you through?", timeout=LIMIT)
        lanes().wait_deferred()

    def assert_over(self) -> None:
        """Nothing was reported but what a test took, and nothing is counted as going on."""
        self.wait_ended()
        assert self.session_mail.get() == "are you through?"
        assert self.session_mail.empty()
        assert self.states() == {}
        ends = [one for one in self.supervisor_mail if isinstance(one, GenerationEnded)]
        assert ends == [GenerationEnded(self.ref.actor_urn)]

    def states(self) -> dict[str, float]:
        """The gauge of states, but for its zeros."""
        return {key: count for key, count in self.samples("requests_active").items() if count}

    def outcomes(self) -> dict[str, float]:
        """Of the histogram of durations, what was counted."""
        found = self.samples("generation_seconds", suffix="_count")
        return {key: count for key, count in found.items() if count}

    def samples(self, name: str, suffix: str = "") -> dict[str, float]:
        return {
            next(iter(sample.labels.values()), ""): sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"bargein_{name}{suffix}"
        }

    def settle(self) -> None:
        """Wait until the actor has handled what it was told, which does not end it."""
        self.ref.ask(RegisterAgain(), timeout=LIMIT)


pytestmark = pytest.mark.usefixtures("no_actor_left")


COMPLETED = GenerationResult(Ending.COMPLETED, finish_reason="stop", closed_at=1.0)
FAILED = GenerationResult(Ending.FAILED, BadStatusError(500, "no"), closed_at=1.0)
CLOSED = GenerationResult(Ending.CLOSED, closed_at=1.0)


# The states --------------------------------------------------------------------------------------

TO_STATE: dict[str, list[object]] = {
    "connecting": [],
    "waiting": [StreamOpened()],
    "streaming": [StreamOpened(), FirstToken()],
}
STEPS: list[tuple[str, object, str]] = [
    ("connecting", StreamOpened(), "waiting"),
    ("connecting", FirstToken(), "connecting"),  # a reader says that the stream is open first
    ("connecting", Start(PROMPT), "connecting"),
    ("waiting", StreamOpened(), "waiting"),
    ("waiting", FirstToken(), "streaming"),
    ("waiting", Start(PROMPT), "waiting"),
    ("streaming", StreamOpened(), "streaming"),
    ("streaming", FirstToken(), "streaming"),
    ("streaming", Start(PROMPT), "streaming"),
]


@pytest.mark.parametrize(("before", "message", "after"), STEPS)
def test_a_live_state_goes_only_where_its_table_says(
    before: str, message: object, after: str
) -> None:
    given = Given()
    given.start()
    given.tell(*TO_STATE[before])
    given.settle()
    assert given.states() == {before: 1}
    given.tell(message)
    given.settle()
    assert given.states() == {after: 1}


ENDS: list[tuple[str, list[object]]] = [
    ("completed", [StagesEnded((COMPLETED,))]),
    ("failed", [StagesEnded((FAILED,))]),
    ("interrupted", [Stop(), StagesEnded((CLOSED,))]),
    ("reaped", [Stop(is_reaped=True), StagesEnded((CLOSED,))]),
]


@pytest.mark.parametrize("before", TO_STATE)
@pytest.mark.parametrize(("outcome", "messages"), ENDS)
def test_every_live_state_leads_to_every_end(
    before: str, outcome: str, messages: list[object]
) -> None:
    given = Given(FakeSource(stuck=True))  # so that the ends come by mail alone
    given.start()
    given.tell(*TO_STATE[before], *messages)
    given.report()
    given.release()
    given.assert_over()
    assert given.outcomes() == {outcome: 1}


EVERY_MESSAGE = [
    Start(PROMPT),
    StreamOpened(),
    FirstToken(),
    Stop(),
    Stop(is_reaped=True),
    StagesEnded((COMPLETED,)),
    StagesEnded((FAILED,)),
    StagesEnded((CLOSED,)),
    RegisterAgain(),
]


@pytest.mark.parametrize(("outcome", "messages"), ENDS)
def test_no_message_leads_out_of_an_end(outcome: str, messages: list[object]) -> None:
    given = Given(FakeSource(stuck=True))
    given.start()
    # In one go: the actor handles all of them before it takes up its own end.
    given.tell(
        StreamOpened(), *messages, *EVERY_MESSAGE, TerminalSent(), *EVERY_MESSAGE, TerminalSent()
    )
    given.report()
    given.wait_ended()
    assert given.session_mail.get() == "are you through?"
    assert given.session_mail.empty()
    assert given.states() == {}
    assert given.outcomes() == {outcome: 1}


# One report, whatever happens --------------------------------------------------------------------


def test_an_answer_goes_to_the_outlet_and_its_end_is_reported() -> None:
    given = Given()
    stream = given.start()
    stream.say("Hello", ", ", "world")
    stream.complete()
    result = given.report()
    assert result.generation is not None
    assert (result.ending, result.generation.finish_reason) == (Ending.COMPLETED, "stop")
    assert given.outlet.texts == ["Hello", ", ", "world"]
    assert result.delivered.text == "Hello, world"
    given.release()
    given.assert_over()
    assert given.outcomes() == {"completed": 1}
    assert given.samples("time_to_first_chunk_seconds", "_count") == {"": 1}


def test_the_first_token_may_be_one_that_is_not_text() -> None:
    given = Given()
    stream = given.start()
    stream.sink.opened()
    stream.sink.put(Delta(reasoning_chars=7))
    given.settle()
    assert given.states() == {"streaming": 1}
    assert given.outlet.texts == []
    stream.complete()
    given.report()
    given.release()
    given.assert_over()
    assert given.samples("time_to_first_chunk_seconds", "_count") == {"": 1}


def test_a_failure_is_reported_with_its_error() -> None:
    given = Given()
    stream = given.start()
    error = IncompleteAnswerError("incomplete answer")
    stream.say("Hel")
    stream.end(GenerationResult(Ending.FAILED, error, closed_at=time.monotonic()))
    result = given.report()
    assert (result.ending, result.error) == (Ending.FAILED, error)
    given.release()
    given.assert_over()
    counted = given.samples("llm_errors_total")
    assert {kind: count for kind, count in counted.items() if count} == {"IncompleteAnswer": 1}


def test_the_usage_of_a_provider_is_counted() -> None:
    given = Given()
    given.start().end(GenerationResult(Ending.COMPLETED, usage=Usage(9, 12, 21), closed_at=1.0))
    given.report()
    given.release()
    given.assert_over()
    assert given.samples("llm_tokens_total") == {"prompt": 9, "completion": 12}


@pytest.mark.parametrize("usage", [Usage(-1, 5, 4), Usage(3, -5, 0), Usage(10**400, 1, 1)])
def test_a_usage_that_cannot_be_counted_does_not_cost_the_report(usage: Usage) -> None:
    given = Given()
    given.start().end(GenerationResult(Ending.COMPLETED, usage=usage, closed_at=time.monotonic()))
    assert given.report().ending is Ending.COMPLETED
    given.release()
    given.assert_over()
    assert given.outcomes() == {"completed": 1}


def test_stopped_before_its_start_it_reports_at_once_and_never_starts() -> None:
    given = Given()
    given.tell(Stop(), Start(PROMPT))
    assert given.report() == make_report((), Delivered(), is_final=True)
    given.release()
    given.assert_over()
    assert given.source.streams == []
    assert given.outcomes() == {}  # there was no generation to measure
    assert given.samples("llm_posts_total") == {"": 0}


def test_stopped_it_reports_when_its_reader_is_dead_and_not_before() -> None:
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    stream.say("Hello")
    given.tell(Stop())
    assert stream.close_asked.wait(LIMIT)
    given.settle()
    assert given.session_mail.empty()
    stream.end(CLOSED)
    assert given.report().stages == (CLOSED,)
    given.release()
    given.assert_over()
    assert given.outcomes() == {"interrupted": 1}


def test_stopped_before_its_reader_ran_it_still_ends_in_one_report() -> None:
    client = LlmClient(Provider("http://127.0.0.1:9/v1", "never asked"), loop=lanes())
    given = Given(client)
    # From a timer, between two turns of all greenlets: the reader is spawned and killed unrun.
    timer = gevent.get_hub().loop.timer(0)
    timer.start(lambda: given.tell(Start(PROMPT), Stop()))
    result = given.report()
    assert (result.ending, result.closed_at) == (Ending.CLOSED, None)
    given.release()
    given.assert_over()
    assert given.outcomes() == {"interrupted": 1}
    client.close()


def test_a_second_stop_is_the_first_one() -> None:
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    given.tell(Stop(is_reaped=True), Stop())
    assert stream.close_asked.wait(LIMIT)
    stream.end(CLOSED)
    given.report()
    given.release()
    given.assert_over()
    assert given.outcomes() == {"reaped": 1}


@pytest.mark.parametrize("ending", [COMPLETED, FAILED])
def test_a_stop_that_crosses_the_end_does_not_change_it(ending: GenerationResult) -> None:
    given = Given()
    stream = given.start()
    stream.end(ending)
    given.tell(Stop())  # handled first: the end is still on its way from the hub
    assert given.report().stages == (ending,)
    given.release()
    given.assert_over()
    assert given.outcomes() == {ending.ending.value: 1}


@pytest.mark.parametrize("ending", [COMPLETED, FAILED])
def test_a_stop_behind_the_end_is_no_error(ending: GenerationResult) -> None:
    given = Given()
    given.start()
    given.tell(StagesEnded((ending,)), Stop())
    assert given.report().stages == (ending,)
    given.release()
    given.assert_over()


# Failures of the actor itself --------------------------------------------------------------------

NONSENSE = "no message of the protocol"


def kinds(given: Given) -> list[type]:
    """What the supervisor was told, in short."""
    return [type(message) for message in given.supervisor_mail]


def is_our_failure(result: Report) -> bool:
    return result.ending is Ending.FAILED and isinstance(result.error, StreamError)


def test_failing_in_a_handler_before_its_start_it_reports_a_failure() -> None:
    given = Given()
    given.tell(NONSENSE, Start(PROMPT))
    assert is_our_failure(given.report())
    given.assert_over()
    assert given.source.streams == []


def test_failing_while_it_opens_it_reports_a_failure() -> None:
    ends: list[SupervisorMessage] = []

    def tell_supervisor(message: SupervisorMessage) -> None:
        if isinstance(message, RequestAccepted):
            raise RuntimeError("no supervisor")
        ends.append(message)

    given = Given(tell_supervisor=tell_supervisor)
    assert is_our_failure(given.report())
    given.wait_ended()
    assert given.states() == {}
    urn = given.ref.actor_urn
    assert ends == [RequestClosed(urn), GenerationEnded(urn)]


@pytest.mark.parametrize("error", [OSError("no"), gevent.Timeout(60), SystemExit(1)])
def test_failing_to_start_its_stream_it_reports_a_failure(error: BaseException) -> None:
    given = Given(FakeSource(fail_start=error))
    given.tell(Start(PROMPT))
    assert is_our_failure(given.report())
    given.assert_over()
    assert given.stream.close_asked.is_set()


def test_failing_while_its_reader_lives_it_closes_the_stream_and_reports_when_that_is_dead() -> (
    None
):
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    stream.say("Hel")
    given.tell(NONSENSE)
    assert stream.close_asked.wait(LIMIT)
    given.session.ask("anything yet?", timeout=LIMIT)
    assert given.session_mail.get() == "anything yet?"
    assert given.session_mail.empty()
    stream.end(CLOSED)
    result = given.report()
    assert is_our_failure(result)
    assert result.closed_at == CLOSED.closed_at  # the stream was closed, and when
    given.assert_over()
    assert given.outcomes() == {"failed": 1}


def test_failing_after_the_hub_put_the_end_in_its_mailbox_still_ends_in_one_report() -> None:
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    # The order in which the loop runs: the hub tells the end, then the actor takes up its mail.
    loop = gevent.get_hub().loop
    loop.run_callback(tell, given.ref, NONSENSE)
    stream.end(COMPLETED)
    assert is_our_failure(given.report())
    given.assert_over()


def test_stopped_as_an_actor_it_takes_its_stream_along_and_reports() -> None:
    given = Given()
    stream = given.start()
    given.ref.stop(timeout=LIMIT)
    assert stream.close_asked.is_set()
    assert is_our_failure(given.report())
    given.assert_over()


def test_a_failed_session_does_not_keep_a_request_from_ending() -> None:
    given = Given()
    stream = given.start()
    given.session.stop(timeout=LIMIT)
    given.tell(Stop(), TerminalSent())  # as a session says it when it fails
    assert given.ref.actor_stopped.wait(LIMIT)
    assert stream.close_asked.is_set()
    assert given.states() == {}
    lanes().wait_deferred()
    assert GenerationEnded(given.ref.actor_urn) in given.supervisor_mail


# Reported and released ---------------------------------------------------------------------------


def test_reported_before_it_is_released_it_lives_on_as_one_that_is_not_over() -> None:
    given = Given()
    given.start().complete()
    given.report()
    given.settle()  # registered again, and with all that was told before
    assert kinds(given) == [RequestAccepted, GenerationEnded, RequestAccepted, GenerationEnded]
    assert given.states() == {"connecting": 1}  # counted as live until its client has all of it
    given.tell(TerminalSent())
    given.wait_ended()
    assert given.states() == {}
    assert kinds(given)[4:] == [RequestClosed]
    assert given.supervisor_mail[-1] == RequestClosed(given.ref.actor_urn)


def test_released_before_it_has_reported_it_lives_on_as_one_whose_stream_is_open() -> None:
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    given.tell(Stop(), TerminalSent())
    given.settle()
    assert kinds(given) == [RequestAccepted, RequestClosed, RequestAccepted, RequestClosed]
    assert given.session_mail.empty()
    assert given.states() == {"connecting": 1}
    stream.end(CLOSED)
    assert given.report().stages == (CLOSED,)
    given.assert_over()
    assert kinds(given)[4:] == [GenerationEnded]
    assert given.outcomes() == {"interrupted": 1}


def test_released_and_then_failing_it_still_ends_in_one_report() -> None:
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    given.tell(Stop(), TerminalSent(), NONSENSE)
    assert given.ref.actor_stopped.wait(LIMIT)
    stream.end(CLOSED)
    assert is_our_failure(given.report())
    given.assert_over()
    assert kinds(given) == [RequestAccepted, RequestClosed, GenerationEnded]


@pytest.mark.parametrize(
    "order", [*itertools.permutations([TerminalSent(), StagesEnded((COMPLETED,))])]
)
def test_it_is_gone_when_it_is_both_and_not_before(order: tuple[object, object]) -> None:
    given = Given(FakeSource(stuck=True))
    given.start()
    first, second = order
    given.tell(first)
    given.ref.ask(StreamOpened(), timeout=LIMIT)
    assert given.ref in pykka.ActorRegistry.get_by_class(RequestActor)
    given.tell(second)
    given.report()
    given.assert_over()
    assert given.ref not in pykka.ActorRegistry.get_by_class(RequestActor)
    assert not tell(given.ref, RegisterAgain())


# The supervisor's view ---------------------------------------------------------------------------


def test_it_registers_with_its_supervisor_and_again_when_asked() -> None:
    given = Given()
    given.settle()
    first, second = given.supervisor_mail
    assert isinstance(first, RequestAccepted)
    assert isinstance(second, RequestAccepted)
    for accepted in (first, second):
        assert accepted.request == given.ref
        assert accepted.session == given.session
        assert (accepted.session_id, accepted.request_id) == ("sess_1", "req_1")
    assert first.accepted_at == second.accepted_at


def test_registering_again_behind_its_end_does_not_make_it_live_again() -> None:
    given = Given()
    given.start()
    given.tell(StagesEnded((COMPLETED,)), RegisterAgain())
    given.report()
    given.ref.ask(StreamOpened(), timeout=LIMIT)
    assert isinstance(given.supervisor_mail[-1], GenerationEnded)
    given.supervisor_mail.clear()
    given.tell(
        TerminalSent(), RegisterAgain()
    )  # in one go: it registers before it takes up its end
    given.wait_ended()
    assert kinds(given) == [RequestClosed, RequestAccepted, GenerationEnded, RequestClosed]


def progress_told(given: Given, now: float = 5.0) -> float:
    """What it answers the reaper."""
    given.tell(AskProgress(now))
    given.settle()
    (told,) = [one for one in given.supervisor_mail if isinstance(one, ProgressTold)]
    assert (told.request_urn, told.now) == (given.ref.actor_urn, now)
    given.supervisor_mail.remove(told)
    return told.progress_at


def test_its_progress_is_the_later_one_of_provider_and_client() -> None:
    given = Given()
    given.settle()
    accepted = given.supervisor_mail[0]
    assert isinstance(accepted, RequestAccepted)
    assert progress_told(given) == accepted.accepted_at  # nothing is begun
    given.outlet.waited_at = accepted.accepted_at + 1
    assert progress_told(given) == accepted.accepted_at + 1
    given.start()
    for provider, client in itertools.permutations([10.0, 20.0]):
        given.stream.progress_at, given.outlet.waited_at = provider, client
        assert progress_told(given) == 20.0


@pytest.mark.parametrize("first", [Stop(), Stop(is_reaped=True)])
def test_only_the_reaper_kills_again_and_only_what_was_told_to_stop_before(first: Stop) -> None:
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    given.tell(first, Stop(reason="USER_STOP"))
    given.settle()
    assert stream.close_asked.is_set()
    assert not stream.killed_again.is_set()
    given.tell(Stop(is_reaped=True))
    given.settle()
    assert stream.killed_again.is_set()


def test_a_stream_that_outlives_its_actor_is_killed_again_until_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.request._KILL_AGAIN_SECONDS", 0.001)
    given = Given(FakeSource(stuck=True))
    stream = given.start()
    given.tell(NONSENSE)
    for _ in range(3):
        stream.killed_again.clear()
        assert stream.killed_again.wait(LIMIT)
    stream.end(CLOSED)
    given.report()
    stream.killed_again.clear()
    gevent.get_hub().loop.update_now()
    assert not stream.killed_again.wait(0.01)
