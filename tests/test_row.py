"""A request as a row of three stages, played by hand: closed in one step, reported once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import gevent
import gevent.event
import gevent.queue
import pykka
import pytest
from prometheus_client import CollectorRegistry

from actors.actor import tell
from actors.loop.lanes import lanes
from actors.messages import GenerationEnded, RequestReported, Start, Stop, SupervisorMessage
from actors.outlet import Delivered
from actors.request import RequestActor
from actors.row import Report, Row, make_report
from llm.chat.completions import Prompt
from llm.chat.generation import GenerationResult, Sink
from llm.errors import IncompleteAnswerError
from llm.provider import StopsOnClose
from llm.stage import Ending, Stage, StageResult
from metrics.instruments import Metrics
from tests.fakes import LIMIT, PROMPT, Collector
from tests.test_request import FakeOutlet

NAMES = ("recognize", "generate", "speak")

pytestmark = pytest.mark.usefixtures("no_actor_left")


class FakeStage:
    """A stage whose work is the test. It ends when the test says so, also when it was closed."""

    def __init__(self, name: str, on_end: Callable[[StageResult], None]) -> None:
        self.name = name
        self.progress_at = 0.0
        self.is_started = False
        self.closes = self.kills = 0
        self._on_end = on_end

    def start(self) -> None:
        self.is_started = True

    def close(self) -> None:
        self.closes += 1

    def kill_again(self) -> None:
        self.kills += 1

    def end(self, ending: Ending = Ending.CLOSED, closed_at: float | None = None) -> None:
        """In the hub, as a real one does."""
        error = IncompleteAnswerError(self.name) if ending is Ending.FAILED else None
        result = StageResult(ending, error, closed_at, name=self.name)
        gevent.get_hub().loop.run_callback(self._on_end, result)


class Given:
    """A request-actor with three stages."""

    def __init__(self) -> None:
        self.stages: list[FakeStage] = []
        self.mail: gevent.queue.SimpleQueue[object] = gevent.queue.SimpleQueue()
        self.session = Collector.start(self.mail)
        self.supervisor_mail: list[SupervisorMessage] = []
        self.outlet = FakeOutlet()
        self.ref: pykka.ActorRef[RequestActor] = RequestActor.start(
            session_id="sess_1",
            request_id="req_1",
            session=self.session,
            tell_supervisor=self.supervisor_mail.append,
            make_stages=self._make_stages,
            outlet=self.outlet,
            metrics=Metrics(CollectorRegistry()),
        )
        tell(self.ref, Start(PROMPT))
        self.settle()

    def _make_stages(
        self, prompt: Prompt, sink: Sink, on_end: Callable[[StageResult], None]
    ) -> Sequence[Stage]:
        self.stages = [FakeStage(name, on_end) for name in NAMES]
        return self.stages

    def settle(self) -> None:
        """Wait until the hub and the actor have done what was asked of them."""
        lanes().wait_deferred()
        self.ref.ask(Start(PROMPT), timeout=LIMIT)  # changes nothing for one that was started

    def report(self) -> Report:
        message = self.mail.get(timeout=LIMIT)
        assert isinstance(message, RequestReported)
        return message.report

    def assert_no_report(self) -> None:
        self.settle()
        self.session.ask("anything yet?", timeout=LIMIT)
        assert self.mail.get() == "anything yet?"
        assert self.mail.empty()


def test_the_stages_start_together() -> None:
    given = Given()
    assert [stage.is_started for stage in given.stages] == [True, True, True]
    assert [stage.closes for stage in given.stages] == [0, 0, 0]


@pytest.mark.parametrize("ended", [0, 1, 2])
def test_one_stop_closes_all_of_them_in_one_step_in_every_phase(ended: int) -> None:
    """Phase by phase: while it listens, while it thinks, while it speaks."""
    given = Given()
    for number, stage in enumerate(given.stages[:ended]):
        stage.end(Ending.COMPLETED, closed_at=float(number))
    given.settle()
    given.ref.ask(Stop(), timeout=LIMIT)  # one message: no other step comes in between
    assert [stage.closes for stage in given.stages] == [1, 1, 1]
    given.assert_no_report()
    for number, stage in enumerate(given.stages[ended:], ended):
        assert given.mail.empty()
        stage.end(closed_at=10.0 + number)
        given.settle()
    report = given.report()
    assert [stage.name for stage in report.stages] == list(NAMES)
    assert report.ending is Ending.CLOSED
    assert report.closed_at == 12.0  # the last one's
    given.assert_no_report()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_its_one_report_comes_when_the_last_has_ended_in_whatever_order(
    order: tuple[int, ...],
) -> None:
    given = Given()
    for place, number in enumerate(order):
        given.assert_no_report()
        given.stages[number].end(Ending.COMPLETED, closed_at=float(place))
    report = given.report()
    assert report.ending is Ending.COMPLETED
    assert report.closed_at == 2.0
    given.assert_no_report()
    lanes().wait_deferred()
    ends = [one for one in given.supervisor_mail if isinstance(one, GenerationEnded)]
    assert len(ends) == 1


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_stage_that_fails_takes_the_others_along(failing: int) -> None:
    given = Given()
    given.stages[failing].end(Ending.FAILED, closed_at=1.0)
    given.settle()
    others = [stage for stage in given.stages if stage is not given.stages[failing]]
    assert [stage.closes for stage in others] == [1, 1]
    given.assert_no_report()
    for stage in others:
        stage.end(closed_at=3.0)
    report = given.report()
    assert report.ending is Ending.FAILED
    assert str(report.error) == NAMES[failing]
    assert report.closed_at == 3.0


def test_a_stage_that_fails_behind_a_stop_closes_nothing_once_more() -> None:
    given = Given()
    given.ref.ask(Stop(), timeout=LIMIT)
    given.stages[0].end(Ending.FAILED)
    given.settle()
    assert [stage.closes for stage in given.stages] == [1, 1, 1]


def test_the_last_resort_reaches_every_stage_until_the_last_has_ended() -> None:
    given = Given()
    given.ref.ask(Stop(), timeout=LIMIT)
    given.stages[1].end()
    given.settle()
    given.ref.ask(Stop(is_reaped=True), timeout=LIMIT)
    assert [stage.kills for stage in given.stages] == [1, 1, 1]
    for number in (0, 2):
        given.stages[number].end()
    given.report()
    given.ref.ask(Stop(is_reaped=True), timeout=LIMIT)
    assert [stage.kills for stage in given.stages] == [1, 1, 1]


def test_what_was_delivered_is_in_the_report() -> None:
    given = Given()
    given.outlet.put("Once ")
    given.outlet.put("upon")
    given.ref.ask(Stop(), timeout=LIMIT)
    for stage in given.stages:
        stage.end()
    assert given.report().delivered == Delivered("Once upon")


def test_its_progress_is_that_of_the_stage_that_moved_last() -> None:
    stages: list[FakeStage] = []

    def make(prompt: Prompt, sink: Sink, on_end: Callable[[StageResult], None]) -> Sequence[Stage]:
        stages.extend(FakeStage(name, on_end) for name in NAMES)
        return stages

    sink: object = None
    row = Row(make, PROMPT, sink, lambda _results: None)  # type: ignore[arg-type]
    stages[1].progress_at = 7.0
    stages[2].progress_at = 5.0
    assert row.progress_at == 7.0


@pytest.mark.parametrize(
    ("known", "worst"),
    [
        ((None, None), None),
        ((StopsOnClose.YES, None), StopsOnClose.YES),
        ((StopsOnClose.YES, StopsOnClose.UNKNOWN), StopsOnClose.UNKNOWN),
        ((StopsOnClose.UNKNOWN, StopsOnClose.NO), StopsOnClose.NO),
        ((StopsOnClose.YES, StopsOnClose.NO), StopsOnClose.NO),
    ],
)
def test_a_row_stops_on_close_as_its_worst_provider_does(
    known: tuple[StopsOnClose | None, ...], worst: StopsOnClose | None
) -> None:
    stages = tuple(StageResult(Ending.CLOSED, stops_on_close=one) for one in known)
    assert make_report(stages, Delivered()).stops_on_close is worst


def test_a_row_without_a_stage_is_a_mistake() -> None:
    sink: object = None
    with pytest.raises(AssertionError, match="at least one stage"):
        Row(lambda *_: [], PROMPT, sink, lambda _results: None)  # type: ignore[arg-type]


def test_the_generation_is_found_among_the_stages() -> None:
    generation = GenerationResult(Ending.COMPLETED, finish_reason="stop")
    stages = (StageResult(Ending.COMPLETED, name="recognize"), generation)
    assert make_report(stages, Delivered()).generation is generation
    assert make_report(stages[:1], Delivered()).generation is None
