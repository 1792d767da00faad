"""A session between an outbox that keeps everything and streams that a test plays by hand."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gevent
import gevent.event
import gevent.queue
import msgspec
import pykka
import pytest
from prometheus_client import CollectorRegistry

from actors.actor import tell
from actors.loop.lanes import Lanes, lanes
from actors.messages import (
    EndSession,
    GenerationEnded,
    ReapRequest,
    RegisterAgain,
    RequestAccepted,
    RequestClosed,
    SessionEnded,
    StagesEnded,
    Start,
    SupervisorMessage,
)
from actors.outlet import Delivered, RequestEnd
from actors.quota import Quota
from actors.request import RequestActor
from actors.session import port
from actors.session.messages import ConnectionLost, StopOverdue
from actors.session.port import CONNECTION_LOST, Goodbye
from actors.session.request_ids import MAX_REMEMBERED_IDS
from actors.session.session import Sessions, SessionSettings
from actors.words import ErrorCode, OnNewRequest
from gateway.wire.attachment import Authenticator
from gateway.wire.decode import FrameError
from gateway.wire.door import WireDoor
from gateway.wire.encode import AnswerEncoder
from gateway.wire.frames import (
    AccountAuth,
    ApiKeyAuth,
    ClientPayload,
    FunctionResult,
    HealthCheck,
    HealthStatus,
    HeartbeatReply,
    Interrupt,
    Register,
    Request,
    RequestContent,
    SessionQuery,
    Shutdown,
)
from gateway.wire.port import CLOSE_CODES
from llm.chat.completions import Delta, ToolCall, Usage
from llm.chat.generation import GenerationResult
from llm.errors import BadStatusError, LimitPassedError
from llm.stage import Ending
from metrics.instruments import Metrics
from tests.fakes import LIMIT, PROMPT, FakeSource, FakeStream

NONSENSE: Any = "no message of the protocol"

FAR = 1000.0  # seconds; nothing waits for them


# Fakes -------------------------------------------------------------------------------------------


class FakeOutbox:
    """Takes frames, and keeps them in the order in which they would be written.

    A client that does not read is played by `hold`: then data is queued and not written.
    """

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.outlets: list[FakeOutlet] = []
        self.closed: tuple[int, str] | None = None
        self.hold = False
        self.finishing = gevent.event.Event()
        """Set when a terminal frame was put behind the data, written or not."""
        self.on_done: Callable[[], None] = lambda: None
        """Called when a terminal frame was written, before its session is told."""
        self.fail: BaseException | None = None
        """What the next control frame raises."""
        self._written: gevent.queue.SimpleQueue[dict[str, Any]] = gevent.queue.SimpleQueue()

    def outlet(self, encoder: AnswerEncoder) -> FakeOutlet:
        self.outlets.append(FakeOutlet(self, encoder))
        return self.outlets[-1]

    def send_control(
        self, payload: bytes, on_written: Callable[[float], None] | None = None
    ) -> None:
        if self.fail is not None:
            fail, self.fail = self.fail, None
            raise fail
        self.write(payload)
        if on_written is not None:
            on_written(time.monotonic())

    def close(self, code: int, reason: str) -> None:
        if self.closed is None:
            self.closed = (code, reason)

    def write(self, payload: bytes) -> None:
        frame = json.loads(payload)
        self.frames.append(frame)
        self._written.put(frame)

    # What a test looks at.

    def next(self) -> dict[str, Any]:
        """The next frame that was not taken yet."""
        return self._written.get(timeout=LIMIT)

    def wait_for(self, msg_type: str) -> dict[str, Any]:
        """Take frames up to the next one of a type; returns its payload."""
        while (frame := self.next())["msg_type"] != msg_type:
            pass
        payload: dict[str, Any] = frame["payload"]
        return payload

    def wait_ack(self) -> dict[str, Any]:
        return self.wait_for("INTERRUPT_ACK")

    def wait_terminal(self, request_id: str) -> dict[str, Any]:
        while not (name := name_of(frame := self.next())).startswith("end") or (
            not name.endswith(request_id)
        ):
            pass
        payload: dict[str, Any] = frame["payload"]
        return payload

    def history(self) -> list[str]:
        """Everything that was written, in short words."""
        return [name_of(frame) for frame in self.frames]


def name_of(frame: dict[str, Any]) -> str:
    payload = frame["payload"]
    match frame["msg_type"]:
        case "RESPONSE" if payload["text_stream_seq"] == -1:
            return f"end {payload['outcome']} {payload['request_id']}"
        case "RESPONSE":
            return f"text {payload['request_id']}"
        case "ERROR" if "request_id" in payload:
            assert {"outcome", "finish_reason", "usage"} <= payload.keys()
            busy = payload["error_code"] == "SERVER_BUSY"
            outcome = "SERVER_BUSY" if busy else payload["outcome"]
            return f"end {outcome} {payload['request_id']}"
        case "INTERRUPT_ACK":
            return f"ack {payload['status']} {payload.get('interrupt_request_id', 'all')}"
        case msg_type:
            return str(msg_type)


class FakeOutlet:
    """One request's way to the fake outbox."""

    def __init__(self, outbox: FakeOutbox, encoder: AnswerEncoder) -> None:
        self.delivered = Delivered()
        self.is_done = False
        self._outbox = outbox
        self._encoder = encoder
        self._is_discarded = False
        self._queued: list[Callable[[], None]] = []
        self.begun: Callable[[], None] | None = None
        """Half written: whatever becomes of the outlet, the client gets it."""

    def put(self, text: str) -> None:
        def write() -> None:
            self._outbox.write(self._encoder.encode_text(text, 0))
            got = self.delivered
            self.delivered = Delivered(got.text + text, got.calls)

        self._do(write)

    def put_call(self, call: ToolCall, on_sent: Callable[[], None]) -> None:
        def write() -> None:
            self._outbox.write(self._encoder.encode_call(call, 0))
            got = self.delivered
            self.delivered = Delivered(got.text, (*got.calls, call))
            on_sent()

        self._do(write)

    def finish(self, end: RequestEnd, on_sent: Callable[[], None]) -> None:
        def write() -> None:
            self._outbox.write(self._encoder.encode_end(end, 0))
            self.is_done = True
            self._outbox.on_done()
            on_sent()

        self._do(write)
        self._outbox.finishing.set()

    def discard(self) -> bool:
        if self.is_done:
            return False
        self._is_discarded = True
        self._queued.clear()
        if self.begun is not None:
            begun, self.begun = self.begun, None
            begun()
        return True

    def progress_at(self) -> float:
        return 0.0

    def begin(self) -> None:
        """The kernel takes half of what is queued first."""
        self.begun = self._queued.pop(0)

    def _do(self, write: Callable[[], None]) -> None:
        if self._is_discarded:
            return
        if self._outbox.hold:
            self._queued.append(write)
        else:
            write()


class FrameReceived(NamedTuple):
    """The client sent a frame: what its connection tells the attachment."""

    payload: ClientPayload
    session_id: str | None
    read_at: float


class BadFrameReceived(NamedTuple):
    """The client sent what `decode` refuses so."""

    error: FrameError


class VoiceReceived(NamedTuple):
    """The client sent a binary frame."""

    data: bytes


class Given:
    """An attachment and its session, between fakes."""

    def __init__(
        self,
        source: FakeSource | None = None,
        *,
        tell_supervisor: Callable[[SupervisorMessage], None] | None = None,
        is_draining: bool = False,
        sessions: Quota | None = None,
        requests: Quota | None = None,
        authenticator: Authenticator | None = None,
        **settings: Any,
    ) -> None:
        self.source = source or FakeSource()
        self.sessions = Quota() if sessions is None else sessions
        self.requests = Quota() if requests is None else requests
        self.outbox = FakeOutbox()
        self.metrics = Metrics(CollectorRegistry())
        self.supervisor_mail: list[SupervisorMessage] = []
        self.door = WireDoor(
            sessions=Sessions(
                quota=self.sessions,
                requests=self.requests,
                make_stages=lambda *row: [self.source.generation(*row)],
                tell_supervisor=tell_supervisor or self.supervisor_mail.append,
                settings=SessionSettings(**settings),
                metrics=self.metrics,
            ),
            authenticator=authenticator,
            health=lambda: HealthStatus("UP", 1, 0.0),
            metrics=self.metrics,
        )
        if is_draining:
            self.door.drain(FAR)
        self.attachment = self.door.attach(self.outbox, "127.0.0.1:9")
        self.session_id: str | None = None

    @property
    def ref(self) -> pykka.ActorRef[Any]:
        """The session's actor, once the client has registered."""
        session = self.attachment._session
        assert session is not None
        return session._ref

    def tell(self, *messages: object) -> None:
        for message in messages:
            match message:
                case FrameReceived(payload, session_id, read_at):
                    frame = {
                        "version": "1.0",
                        "msg_type": payload.msg_type,
                        "session_id": session_id,
                        "payload": payload,
                        "timestamp": 0,
                    }
                    self.attachment.text(msgspec.json.encode(frame), read_at)
                case BadFrameReceived(error):
                    self.attachment._fault(error)
                case VoiceReceived(data):
                    self.attachment.binary(data)
                case ConnectionLost(reason):
                    self.attachment.connection_lost(reason)
                case _:
                    assert tell(self.ref, message)

    def frame(self, payload: ClientPayload) -> FrameReceived:
        return FrameReceived(payload, self.session_id, time.monotonic())

    def register(self, **fields: Any) -> None:
        self.tell(self.frame(Register(ApiKeyAuth("key"), **fields)))
        self.session_id = self.outbox.wait_for("REGISTER_ACK")["session_id"]

    def request(self, request_id: str, text: str = "Hi") -> None:
        self.tell(self.frame(Request(request_id, "TEXT", RequestContent(text))))

    def interrupt(self, request_id: str | None, reason: str = "USER_STOP") -> None:
        self.tell(self.frame(Interrupt(request_id, reason)))

    def settle(self) -> None:
        """Wait until it has handled what it was told (this one changes nothing)."""
        self.ref.ask(StopOverdue("nobody"), timeout=LIMIT)
        lanes().wait_deferred()  # what it put off is done as well

    def settle_requests(self) -> None:
        """Wait until its started requests have handled what they were told, and then it too."""
        for ref in pykka.ActorRegistry.get_by_class(RequestActor):
            with contextlib.suppress(pykka.ActorDeadError):
                ref.ask(Start(PROMPT), timeout=LIMIT)  # changes nothing for one that was started
        self.settle()

    def actor(self, request_id: str) -> pykka.ActorRef[Any]:
        """The actor of a request, as it registered with the supervisor."""
        return next(
            one.request
            for one in self.supervisor_mail
            if isinstance(one, RequestAccepted) and one.request_id == request_id
        )

    def sample(self, name: str, **labels: str) -> float:
        lanes().wait_deferred()  # books are kept last
        lanes().wait_for_control()
        return self.metrics.registry.get_sample_value(f"bargein_{name}", labels) or 0.0

    def assert_nothing_counted_as_live(self) -> None:
        assert self.sample("sessions_active") == self.sessions.taken == self.requests.taken == 0
        for state in ("connecting", "waiting", "streaming"):
            assert self.sample("requests_active", state=state) == 0


pytestmark = pytest.mark.usefixtures("no_actor_left")


@pytest.fixture
def given() -> Given:
    """A registered session with streams that close when they are told to."""
    given = Given()
    given.register()
    return given


def stuck(ack_timeout: float = 60.0, **settings: Any) -> Given:
    """A registered session with streams that do not close until the test says so."""
    given = Given(FakeSource(stuck=True), ack_timeout=ack_timeout, **settings)
    given.register()
    return given


# Registration ------------------------------------------------------------------------------------


def test_registration_gives_a_session_id_of_sixteen_hex_digits(given: Given) -> None:
    assert given.session_id is not None
    assert given.session_id.startswith("sess_")
    assert len(given.session_id) == len("sess_") + 16
    int(given.session_id.removeprefix("sess_"), 16)
    assert given.sample("sessions_active") == 1


def test_two_sessions_have_two_ids() -> None:
    first, second = Given(), Given()
    first.register()
    second.register()
    assert first.session_id != second.session_id


@pytest.mark.parametrize(
    "payload",
    [Request("req_1", "TEXT", RequestContent("Hi")), Interrupt("req_1"), Shutdown()],
)
def test_what_comes_before_the_registration_is_refused(payload: ClientPayload) -> None:
    given = Given()
    given.tell(given.frame(payload))
    assert given.outbox.wait_for("ERROR")["error_code"] == "SESSION_INVALID"
    given.register()  # and the connection lives on
    assert given.source.streams == []


def test_a_health_check_needs_no_registration() -> None:
    given = Given()
    given.tell(given.frame(HealthCheck()))
    assert given.outbox.wait_for("HEALTH_CHECK_ACK")["health_status"]["status"] == "UP"


def test_a_second_registration_is_refused_and_the_session_goes_on(given: Given) -> None:
    given.tell(given.frame(Register(AccountAuth("me", "secret"))))
    assert given.outbox.wait_for("ERROR")["error_code"] == "MALFORMED_PAYLOAD"
    given.request("req_1")
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"
    assert given.sample("sessions_active") == 1


def test_a_foreign_session_id_is_refused(given: Given) -> None:
    request = Request("req_1", "TEXT", RequestContent("Hi"))
    given.tell(FrameReceived(request, "sess_0123456789abcdef", 0.0))
    assert given.outbox.wait_for("ERROR")["error_code"] == "SESSION_INVALID"
    assert given.source.streams == []


def test_a_heartbeat_reply_is_never_answered(given: Given) -> None:
    given.tell(given.frame(HeartbeatReply()))
    given.settle()
    assert given.outbox.history() == ["REGISTER_ACK"]


# Answers -----------------------------------------------------------------------------------------


def test_an_answer_is_text_and_then_one_terminal_frame(given: Given) -> None:
    given.request("req_1")
    stream = given.source.next()
    stream.say("Hello", ", world")
    stream.end(
        GenerationResult(
            Ending.COMPLETED, finish_reason="stop", usage=Usage(1, 2, 3), closed_at=1.0
        )
    )
    terminal = given.outbox.wait_terminal("req_1")
    assert terminal["outcome"] == "COMPLETED"
    assert terminal["finish_reason"] == "stop"
    assert terminal["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert terminal["content"] == {}
    assert "voice_stream_seq" not in terminal
    given.settle()
    assert given.outbox.history()[1:] == ["text req_1", "text req_1", "end COMPLETED req_1"]
    assert given.sample("requests_total", outcome="completed") == 1
    assert given.sample("text_chars_total") == 12


def test_a_client_that_wants_speech_hears_of_its_end() -> None:
    given = Given()
    given.register(require_tts=True)
    for request_id in ("req_1", "req_2"):
        given.request(request_id)
        stream = given.source.next()
        if request_id == "req_1":
            stream.complete()
        else:
            given.interrupt(request_id)
        assert given.outbox.wait_terminal(request_id)["voice_stream_seq"] == -1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadStatusError(500, "overloaded"), "INTERNAL_ERROR"),
        (LimitPassedError("idle", 60), "REQUEST_TIMEOUT"),
    ],
)
def test_a_failure_of_the_provider_is_the_requests_one_terminal_frame(
    given: Given, error: Any, code: str
) -> None:
    given.request("req_1")
    given.source.next().end(GenerationResult(Ending.FAILED, error, closed_at=1.0))
    terminal = given.outbox.wait_terminal("req_1")
    assert (terminal["error_code"], terminal["outcome"]) == (code, "FAILED")
    assert terminal["error_detail"] == str(error)
    given.settle()
    assert given.outbox.history()[1:] == ["end FAILED req_1"]
    assert given.sample("requests_total", outcome="failed") == 1


@pytest.mark.parametrize("usage", [Usage(-1, -1, -1), Usage(10**400, 1, 1)])
def test_a_mad_usage_does_not_cost_the_terminal_frame(given: Given, usage: Usage) -> None:
    given.request("req_1")
    given.source.next().end(GenerationResult(Ending.COMPLETED, usage=usage, closed_at=1.0))
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"
    given.request("req_2")
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"


def test_a_request_without_text_interrupts_nothing(given: Given) -> None:
    given.request("req_1")
    stream = given.source.next()
    given.request("req_2", text="")
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    stream.complete()
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"
    assert len(given.source.streams) == 1


def test_an_id_that_is_live_or_was_used_is_refused_without_ending_anything(given: Given) -> None:
    given.request("req_1")
    stream = given.source.next()
    given.request("req_1")
    while_live = given.outbox.wait_for("ERROR")
    stream.complete()
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"
    given.request("req_1")
    for error in (while_live, given.outbox.wait_for("ERROR")):
        assert error["error_code"] == "MALFORMED_PAYLOAD"
        assert "request_id" not in error
        assert "req_1" in error["error_detail"]
    given.settle()
    assert given.outbox.history()[1:] == ["ERROR", "end COMPLETED req_1", "ERROR"]
    assert len(given.source.streams) == 1


@pytest.mark.parametrize("request_id", [" ", "__class__", "None", "0", "{}", "~" * 64, '"\\'])
def test_strange_ids_are_ids_like_any_other(given: Given, request_id: str) -> None:
    given.request(request_id)
    given.source.next().say("Hi")
    given.interrupt(request_id)
    assert given.outbox.wait_ack()["interrupted_request_ids"] == [request_id]
    assert given.outbox.wait_terminal(request_id)["outcome"] == "INTERRUPTED"


def test_only_the_last_thousand_ids_are_remembered(given: Given) -> None:
    for number in range(MAX_REMEMBERED_IDS):
        given.request(f"req_{number}", text="")
    given.interrupt("req_0")
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "ALREADY_DONE"
    given.request("one more", text="")
    given.interrupt("req_1")
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "ALREADY_DONE"
    given.request("req_0", text="")  # forgotten, so it may be used again
    assert given.outbox.wait_terminal("req_0")["outcome"] == "COMPLETED"
    given.request("req_2", text="")
    assert "request_id" not in given.outbox.wait_for("ERROR")


# A new request while another is live -------------------------------------------------------------


def test_a_new_request_interrupts_the_older_one_and_starts_after_its_terminal_frame() -> None:
    given = stuck()
    given.request("req_1")
    first = given.source.next()
    first.say("once")
    given.request("req_2")
    assert first.close_asked.wait(LIMIT)
    given.settle()
    assert given.source.streams == [first]
    assert given.outbox.history()[1:] == ["text req_1"]
    first.end_closed()
    second = given.source.next()
    second.say("upon")
    second.complete()
    terminal = given.outbox.wait_terminal("req_1")
    assert terminal["interrupt_reason"] == "USER_NEW_INPUT"
    given.outbox.wait_terminal("req_2")
    assert given.outbox.history()[1:] == [
        "text req_1",
        "end INTERRUPTED req_1",
        "text req_2",
        "end COMPLETED req_2",
    ]


def test_a_burst_of_requests_leaves_only_the_last_one_and_each_gets_its_terminal_frame() -> None:
    given = stuck()
    names = [f"req_{number}" for number in range(5)]
    for name in names:
        given.request(name)
    first = given.source.next()
    assert first.close_asked.wait(LIMIT)
    given.settle()
    assert given.source.streams == [first]
    first.end_closed()
    last = given.source.next()
    last.complete()
    given.outbox.wait_terminal(names[-1])
    ends = given.outbox.history()[1:]
    assert sorted(ends[:-1]) == [f"end INTERRUPTED {name}" for name in names[:-1]]
    assert ends[-1] == f"end COMPLETED {names[-1]}"
    assert given.source.streams == [first, last]


def test_where_they_may_run_side_by_side_none_is_interrupted_up_to_the_bound() -> None:
    given = Given(on_new_request=OnNewRequest.PARALLEL, max_parallel=2)
    given.register()
    given.request("req_1")
    given.request("req_2")
    first, second = given.source.next(), given.source.next()
    given.request("req_3")
    assert given.outbox.wait_terminal("req_3")["error_code"] == "SERVER_BUSY"
    second.complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    first.complete()
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"
    assert given.sample("refused_total", reason="request") == 1


def test_where_only_one_may_run_another_is_refused_and_may_be_sent_again() -> None:
    given = Given(on_new_request=OnNewRequest.REJECT)
    given.register()
    given.request("req_1")
    first = given.source.next()
    given.request("req_2")
    refused = given.outbox.wait_terminal("req_2")
    assert (refused["error_code"], refused["retryable"]) == ("SERVER_BUSY", True)
    first.complete()
    given.outbox.wait_terminal("req_1")
    given.settle()
    given.request("req_2")
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"


def test_where_only_one_may_run_one_that_is_being_stopped_does_not_keep_out_the_next() -> None:
    given = stuck(on_new_request=OnNewRequest.REJECT)
    given.request("req_1")
    first = given.source.next()
    # In a row: the client does not wait for its ack.
    given.interrupt("req_1")
    given.request("req_2")
    given.request("req_3")
    assert given.outbox.wait_terminal("req_3")["error_code"] == "SERVER_BUSY"
    assert first.close_asked.is_set()
    assert given.source.streams == [first]  # one at a time, all the same
    first.end_closed()
    second = given.source.next()
    second.complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    given.settle()
    assert given.outbox.history()[1:] == [
        "end SERVER_BUSY req_3",
        "ack SUCCESS req_1",
        "end INTERRUPTED req_1",
        "end COMPLETED req_2",
    ]
    assert given.sample("refused_total", reason="request") == 1


def test_where_they_may_run_side_by_side_one_that_is_being_stopped_leaves_its_place() -> None:
    given = stuck(on_new_request=OnNewRequest.PARALLEL, max_parallel=2)
    given.request("req_1")
    given.request("req_2")
    first, second = given.source.next(), given.source.next()
    given.interrupt("req_1")
    given.request("req_3")
    given.request("req_4")
    third = given.source.next()  # at once: the first one is not closed yet
    assert given.outbox.wait_terminal("req_4")["error_code"] == "SERVER_BUSY"
    assert not second.close_asked.is_set()
    first.end_closed()
    assert given.outbox.wait_ack()["status"] == "SUCCESS"
    for stream, name in ((second, "req_2"), (third, "req_3")):
        stream.complete()
        assert given.outbox.wait_terminal(name)["outcome"] == "COMPLETED"
    assert given.sample("refused_total", reason="request") == 1


# Interrupts --------------------------------------------------------------------------------------


def test_an_interrupt_is_acknowledged_when_the_stream_is_closed_and_not_before() -> None:
    given = stuck()
    given.request("req_1")
    stream = given.source.next()
    stream.say("Hello, 你好")
    given.interrupt("req_1")
    assert stream.close_asked.wait(LIMIT)
    stream.say("too late")
    given.settle()
    assert given.outbox.history()[1:] == ["text req_1"]
    read_at = time.monotonic()
    stream.end_closed()
    ack = given.outbox.wait_ack()
    assert (ack["status"], ack["interrupt_request_id"]) == ("SUCCESS", "req_1")
    (result,) = ack["results"]
    assert (result["request_id"], result["outcome"]) == ("req_1", "STOPPED")
    assert result["delivered_text_chars"] == 9
    assert result["stream_closed_ms"] >= 0
    assert result["stream_closed_ms"] / 1000 <= time.monotonic() - read_at + LIMIT
    terminal = given.outbox.wait_terminal("req_1")
    assert terminal["interrupted"] is True
    assert terminal["interrupt_reason"] == "USER_STOP"
    given.settle()
    assert given.outbox.history()[2:] == ["ack SUCCESS req_1", "end INTERRUPTED req_1"]


def test_a_second_interrupt_joins_the_first_one() -> None:
    given = stuck()
    given.request("req_1")
    stream = given.source.next()
    given.interrupt("req_1")
    assert stream.close_asked.wait(LIMIT)
    given.interrupt("req_1", reason="USER_NEW_INPUT")
    given.interrupt(None, reason="CLIENT_ERROR")
    given.settle()
    assert given.outbox.history()[1:] == []
    stream.end_closed()
    acks = [given.outbox.wait_ack() for _ in range(3)]
    for ack in acks:
        assert ack["status"] == "SUCCESS"
        assert [result["outcome"] for result in ack["results"]] == ["STOPPED"]
    # Each was read later than the one before, so each measures less.
    measured = [ack["results"][0]["stream_closed_ms"] for ack in acks]
    assert measured == sorted(measured, reverse=True)
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == "USER_STOP"
    given.settle()
    assert given.outbox.history()[1:] == [
        "ack SUCCESS req_1",
        "ack SUCCESS req_1",
        "ack SUCCESS None",
        "end INTERRUPTED req_1",
    ]


def test_an_interrupt_for_all_gets_one_ack_and_then_all_the_terminal_frames() -> None:
    given = stuck(on_new_request=OnNewRequest.PARALLEL)
    names = ["req_1", "req_2", "req_3"]
    for name in names:
        given.request(name)
    streams = [given.source.next() for _ in names]
    given.interrupt(None)
    for stream in streams:
        assert stream.close_asked.wait(LIMIT)
        given.settle()
        assert given.outbox.history() == ["REGISTER_ACK"]
        stream.end_closed()
    ack = given.outbox.wait_ack()
    assert ack["interrupted_request_ids"] == names
    assert ack["status"] == "SUCCESS"
    given.settle()
    assert given.outbox.history()[1:] == [
        "ack SUCCESS None",
        *(f"end INTERRUPTED {name}" for name in names),
    ]


def test_an_interrupt_for_all_when_nothing_runs_is_acknowledged_as_failed(given: Given) -> None:
    given.interrupt(None)
    ack = given.outbox.wait_ack()
    assert (ack["status"], ack["interrupted_request_ids"], ack["results"]) == ("FAILED", [], [])


@pytest.mark.parametrize("sent", [None, "", "req_x"])
def test_an_ack_echoes_the_id_exactly_as_it_was_sent(given: Given, sent: str | None) -> None:
    given.interrupt(sent)
    ack = given.outbox.wait_ack()
    assert "interrupt_request_id" in ack
    assert ack["interrupt_request_id"] == sent


def test_an_ack_of_an_interrupt_without_an_id_has_none(given: Given) -> None:
    given.tell(given.frame(Interrupt()))
    assert "interrupt_request_id" not in given.outbox.wait_ack()


def test_an_interrupt_of_a_finished_request_says_so_and_leaves_the_live_one_alone(
    given: Given,
) -> None:
    given.request("req_1")
    stream = given.source.next()
    stream.say("Hello")
    stream.complete()
    given.outbox.wait_terminal("req_1")
    given.request("req_2")
    second = given.source.next()
    given.interrupt("req_1")
    ack = given.outbox.wait_ack()
    assert ack["status"] == "FAILED"
    (result,) = ack["results"]
    assert (result["outcome"], result["delivered_text_chars"]) == ("ALREADY_DONE", 5)
    assert result["stream_closed_ms"] is None
    second.complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    assert given.sample("interrupts_total", reason="USER_STOP", outcome="already_done") == 1


def test_an_interrupt_takes_what_was_complete_but_not_yet_written(given: Given) -> None:
    given.outbox.hold = True
    given.request("req_1")
    stream = given.source.next()
    stream.say("Hello")
    stream.complete()
    assert given.outbox.finishing.wait(LIMIT)
    given.interrupt("req_1")
    ack = given.outbox.wait_ack()
    assert ack["status"] == "SUCCESS"
    assert ack["results"][0]["delivered_text_chars"] == 0
    assert given.outbox.wait_terminal("req_1")["interrupted"] is True
    given.settle()
    assert given.outbox.history()[1:] == ["ack SUCCESS req_1", "end INTERRUPTED req_1"]


def test_a_request_that_was_interrupted_before_its_stream_began_is_stopped_without_a_time() -> None:
    given = stuck()
    given.request("req_1")
    first = given.source.next()
    given.request("req_2")
    given.interrupt("req_2")
    ack = given.outbox.wait_ack()
    assert ack["status"] == "SUCCESS"
    assert ack["results"][0]["stream_closed_ms"] is None
    first.end_closed()
    given.outbox.wait_terminal("req_1")
    assert sorted(given.outbox.history()[1:]) == [
        "ack SUCCESS req_2",
        "end INTERRUPTED req_1",
        "end INTERRUPTED req_2",
    ]
    assert given.source.streams == [first]


def test_ack_and_terminal_agree_when_an_interrupt_crosses_the_end(given: Given) -> None:
    given.request("req_1")
    stream = given.source.next()
    stream.complete()
    given.interrupt("req_1")  # taken up before the end is known
    ack = given.outbox.wait_ack()
    terminal = given.outbox.wait_terminal("req_1")
    assert (ack["status"], terminal["outcome"]) == ("SUCCESS", "INTERRUPTED")


def interrupt_at_the_end(given: Given, is_first: str) -> None:
    """INTERRUPT and the end of the stages of req_1, in this order. The client reads then."""
    given.outbox.hold = False
    actor = given.actor("req_1")
    ended = StagesEnded((GenerationResult(Ending.COMPLETED, closed_at=time.monotonic()),))
    if is_first == "report":
        tell(actor, ended)
        given.interrupt("req_1")
    else:
        given.interrupt("req_1")
        tell(actor, ended)


@pytest.mark.parametrize("is_first", ["report", "interrupt"])
def test_what_was_begun_when_an_interrupt_meets_the_end_of_the_stages_was_delivered(
    given: Given, is_first: str
) -> None:
    """The interrupt is taken up before the report, which was made before or after that."""
    given.request("req_1", text="one")
    stream = given.source.next()
    stream.say("Hello")
    given.outbox.hold = True
    stream.sink.put(Delta(", world"))
    stream.sink.call(ToolCall("call_1", "look", "{}"))
    (outlet,) = given.outbox.outlets
    outlet.begin()
    interrupt_at_the_end(given, is_first)
    (result,) = given.outbox.wait_ack()["results"]
    assert result["delivered_text_chars"] == len("Hello, world")
    given.outbox.wait_terminal("req_1")
    given.request("req_2", text="two")
    messages = asked(given.source.next())
    assert messages[1]["content"] == "Hello, world [interrupted by the user]"


@pytest.mark.parametrize("is_first", ["report", "interrupt"])
def test_a_call_that_was_begun_then_is_remembered(given: Given, is_first: str) -> None:
    given.request("req_1", text="one")
    stream = given.source.next()
    stream.sink.opened()
    given.outbox.hold = True
    stream.sink.call(ToolCall("call_1", "look", "{}"))
    (outlet,) = given.outbox.outlets
    outlet.begin()
    interrupt_at_the_end(given, is_first)
    given.outbox.wait_terminal("req_1")
    given.tell(given.frame(FunctionResult("call_1", "found", "req_2")))
    assert asked(given.source.next())[-1]["content"] == "found"


# Streams that do not close -----------------------------------------------------------------------


def test_a_stream_that_stays_open_is_acknowledged_as_timed_out_and_counted() -> None:
    given = stuck(ack_timeout=0.02)
    given.request("req_1")
    stream = given.source.next()
    stream.say("Hello")
    began = time.monotonic()
    given.interrupt("req_1")
    ack = given.outbox.wait_ack()
    assert time.monotonic() - began >= 0.015
    assert (ack["status"], ack["interrupted_request_ids"]) == ("FAILED", [])
    (result,) = ack["results"]
    assert (result["outcome"], result["delivered_text_chars"]) == ("TIMED_OUT", 5)
    assert result["stream_closed_ms"] is None
    assert given.outbox.wait_terminal("req_1")["interrupted"] is True
    assert given.sample("streams_open_after_ack_total") == 1
    assert given.sample("interrupts_total", reason="USER_STOP", outcome="timed_out") == 1
    # It is left to the supervisor: the client's part is over, the stream's is not.
    given.settle_requests()
    assert any(isinstance(one, RequestClosed) for one in given.supervisor_mail)
    assert not any(isinstance(one, GenerationEnded) for one in given.supervisor_mail)
    (request,) = pykka.ActorRegistry.get_by_class(RequestActor)
    stream.end_closed()
    assert request.actor_stopped.wait(LIMIT)
    given.settle()
    assert given.outbox.history()[1:] == [
        "text req_1",
        "ack FAILED req_1",
        "end INTERRUPTED req_1",
    ]
    given.interrupt("req_1")
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "ALREADY_DONE"


def test_a_stuck_stream_is_not_waited_for_any_longer_when_data_is_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = stuck(ack_timeout=0.02)
    given.request("req_1")
    stream = given.source.next()
    put_off: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "run_deferred", lambda _, *call: put_off.append(call))
        given.interrupt("req_1")
        (result,) = given.outbox.wait_ack()["results"]
    assert result["outcome"] == "TIMED_OUT"
    for call in put_off:
        lanes().run_deferred(*call)
    stream.end_closed()
    given.settle_requests()


def test_a_session_with_a_stuck_request_answers_its_next_interrupt_at_once() -> None:
    given = stuck(on_new_request=OnNewRequest.PARALLEL)
    given.request("req_1")
    first = given.source.next()
    given.interrupt("req_1")
    assert first.close_asked.wait(LIMIT)
    given.interrupt("req_9")  # nothing of it waits for the first one
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "UNKNOWN"
    given.request("req_2")
    second = given.source.next()
    given.interrupt("req_2")
    assert second.close_asked.wait(LIMIT)
    second.end_closed()
    ack = given.outbox.wait_ack()
    assert (ack["interrupt_request_id"], ack["status"]) == ("req_2", "SUCCESS")
    assert given.outbox.wait_terminal("req_2")["outcome"] == "INTERRUPTED"
    assert not first.ended
    assert "end INTERRUPTED req_1" not in given.outbox.history()


def test_after_a_stuck_request_the_next_one_goes_on() -> None:
    given = stuck(ack_timeout=0.02)
    given.request("req_1")
    given.source.next()
    given.request("req_2")
    second = given.source.next()  # started as soon as the first one was given up
    assert given.outbox.history()[1:] == ["end INTERRUPTED req_1"]
    second.say("Hello")
    second.complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    given.source.streams[0].say("from the grave")
    given.settle()
    assert given.outbox.history()[1:] == [
        "end INTERRUPTED req_1",
        "text req_2",
        "end COMPLETED req_2",
    ]


def test_an_interrupt_for_all_with_one_stuck_is_partial() -> None:
    given = stuck(ack_timeout=0.05, on_new_request=OnNewRequest.PARALLEL)
    given.request("req_1")
    given.request("req_2")
    _stuck, closing = given.source.next(), given.source.next()
    given.interrupt(None)
    assert closing.close_asked.wait(LIMIT)
    closing.end_closed()
    ack = given.outbox.wait_ack()
    assert (ack["status"], ack["interrupted_request_ids"]) == ("PARTIAL", ["req_2"])
    assert [result["outcome"] for result in ack["results"]] == ["TIMED_OUT", "STOPPED"]
    given.settle()
    assert given.outbox.history()[1:] == [
        "ack PARTIAL None",
        "end INTERRUPTED req_1",
        "end INTERRUPTED req_2",
    ]


def test_a_second_interrupt_does_not_lengthen_the_wait_of_the_first() -> None:
    given = stuck(ack_timeout=0.05)
    given.request("req_1")
    stream = given.source.next()
    given.interrupt("req_1")
    assert stream.close_asked.wait(LIMIT)
    given.interrupt("req_1")
    outcomes = [given.outbox.wait_ack()["results"][0]["outcome"] for _ in range(2)]
    assert outcomes == ["TIMED_OUT", "TIMED_OUT"]
    assert given.sample("streams_open_after_ack_total") == 1


# The reaper --------------------------------------------------------------------------------------


def test_a_reaped_request_ends_with_a_timeout_that_says_so() -> None:
    given = stuck()
    given.request("req_1")
    stream = given.source.next()
    stream.say("Hello")
    given.tell(ReapRequest("req_1", "no progress for 300 s"))
    assert stream.close_asked.wait(LIMIT)
    stream.say("too late")
    stream.end_closed()
    terminal = given.outbox.wait_terminal("req_1")
    assert terminal["error_code"] == "REQUEST_TIMEOUT"
    assert terminal["outcome"] == "REAPED"
    assert terminal["error_detail"] == "no progress for 300 s"
    assert terminal["retryable"] is True
    given.settle()
    assert given.outbox.history()[1:] == ["text req_1", "end REAPED req_1"]
    assert given.sample("requests_reaped_total") == 1
    assert given.sample("requests_total", outcome="reaped") == 1
    assert given.sample("generation_seconds_count", outcome="reaped") == 1


def test_a_request_that_is_interrupted_while_it_is_reaped_is_an_interrupted_one() -> None:
    given = stuck()
    given.request("req_1")
    stream = given.source.next()
    given.tell(ReapRequest("req_1", "no progress for 300 s"))
    assert stream.close_asked.wait(LIMIT)
    given.interrupt("req_1")
    given.settle()
    assert given.outbox.history()[1:] == []
    stream.end_closed()
    assert given.outbox.wait_ack()["status"] == "SUCCESS"
    given.outbox.wait_terminal("req_1")
    given.settle()
    # No ERROR may come for a request that was interrupted.
    assert given.outbox.history()[1:] == ["ack SUCCESS req_1", "end INTERRUPTED req_1"]
    assert given.sample("requests_total", outcome="interrupted") == 1


def test_a_request_that_is_being_stopped_is_not_reaped_as_well() -> None:
    given = stuck()
    given.request("req_1")
    stream = given.source.next()
    given.interrupt("req_1")
    given.tell(ReapRequest("req_1", "no progress"))
    given.settle()
    stream.end_closed()
    given.outbox.wait_terminal("req_1")
    given.settle()
    assert given.outbox.history()[1:] == ["ack SUCCESS req_1", "end INTERRUPTED req_1"]
    assert given.sample("requests_reaped_total") == 0


def test_reaping_what_is_no_longer_there_does_nothing(given: Given) -> None:
    given.tell(ReapRequest("req_1", "no progress"))
    given.settle()
    assert given.outbox.history() == ["REGISTER_ACK"]


def test_a_complete_answer_that_waits_for_its_client_is_reaped_once(given: Given) -> None:
    given.outbox.hold = True
    given.request("req_1")
    given.source.next().complete()
    assert given.outbox.finishing.wait(LIMIT)
    given.tell(ReapRequest("req_1", "no progress"), ReapRequest("req_1", "no progress"))
    assert given.outbox.wait_terminal("req_1")["outcome"] == "REAPED"
    given.settle()
    assert given.outbox.history()[1:] == ["end REAPED req_1"]


def test_an_answer_that_was_just_written_is_not_reaped(given: Given) -> None:
    given.outbox.on_done = lambda: given.tell(ReapRequest("req_1", "no progress"))
    given.request("req_1")
    given.source.next().complete()
    given.settle()
    assert given.outbox.history()[1:] == ["end COMPLETED req_1"]
    assert given.sample("requests_reaped_total") == 0
    assert given.sample("requests_total", outcome="completed") == 1


def test_an_answer_that_was_just_written_is_not_interrupted(given: Given) -> None:
    given.outbox.on_done = lambda: given.interrupt("req_1")
    given.request("req_1")
    given.source.next().complete()
    given.settle()
    assert given.outbox.history()[1:] == ["end COMPLETED req_1", "ack FAILED req_1"]
    assert given.sample("requests_total", outcome="completed") == 1


def test_a_request_behind_a_reaped_one_starts() -> None:
    given = stuck(ack_timeout=0.02)
    given.request("req_1")
    given.source.next()
    given.tell(ReapRequest("req_1", "no progress"))  # and its stream does not close
    given.request("req_2")
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    ends = [name for name in given.outbox.history() if name.startswith("end")]
    assert len(ends) == 2


# The end -----------------------------------------------------------------------------------------


def test_a_lost_connection_stops_everything_that_is_live() -> None:
    given = stuck(on_new_request=OnNewRequest.PARALLEL)
    given.request("req_1")
    given.request("req_2")
    streams = [given.source.next(), given.source.next()]
    given.tell(ConnectionLost("gone"), ConnectionLost("told twice"))
    for stream in streams:
        assert stream.close_asked.wait(LIMIT)
        assert given.ref.is_alive()
        stream.end_closed()
    assert given.ref.actor_stopped.wait(LIMIT)
    ended = [one for one in given.supervisor_mail if isinstance(one, SessionEnded)]
    assert ended == [SessionEnded(given.ref.actor_urn)]
    given.assert_nothing_counted_as_live()
    assert given.sample("sessions_total", outcome="ended") == 1


def test_a_lost_connection_with_a_stuck_stream_ends_the_session_all_the_same() -> None:
    given = stuck(ack_timeout=0.02)
    given.request("req_1")
    given.source.next()
    actor = given.actor("req_1")
    given.tell(ConnectionLost("gone"))
    assert given.ref.actor_stopped.wait(LIMIT)
    lanes().wait_deferred()  # its release was put off
    actor.ask(Start(PROMPT), timeout=LIMIT)  # changes nothing, but it has heard of its release
    assert isinstance(given.supervisor_mail[-2], SessionEnded)
    assert given.supervisor_mail[-1] == RequestClosed(actor.actor_urn)
    assert not any(isinstance(one, GenerationEnded) for one in given.supervisor_mail)


def test_a_client_that_says_shutdown_is_told_so_and_closed_with_1000(given: Given) -> None:
    given.request("req_1")
    given.source.next()
    given.tell(given.frame(Shutdown("bye")))
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == "CLIENT_SHUTDOWN"
    assert given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.history()[1:] == ["end INTERRUPTED req_1", "SHUTDOWN"]
    assert given.outbox.closed is not None
    assert given.outbox.closed[0] == 1000


def test_a_gateway_that_shuts_down_tells_its_clients_and_closes_with_1012(given: Given) -> None:
    given.request("req_1")
    given.source.next()
    given.tell(EndSession())
    assert given.outbox.wait_terminal("req_1")["interrupt_reason"] == "SERVER_SHUTDOWN"
    assert given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.history()[1:] == ["end INTERRUPTED req_1", "SHUTDOWN"]
    assert given.outbox.closed is not None
    assert given.outbox.closed[0] == 1012


def test_a_session_that_is_ending_takes_no_more_requests_but_answers_interrupts() -> None:
    given = stuck()
    given.request("req_1")
    stream = given.source.next()
    given.tell(EndSession())
    given.request("req_2")
    assert given.outbox.wait_terminal("req_2")["error_code"] == "SERVER_BUSY"
    given.interrupt("req_1")
    given.settle()
    stream.end_closed()
    assert given.outbox.wait_ack()["status"] == "SUCCESS"
    assert given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.history()[1:] == [
        "end SERVER_BUSY req_2",
        "ack SUCCESS req_1",
        "end INTERRUPTED req_1",
        "SHUTDOWN",
    ]


def test_a_client_that_never_registered_leaves_without_being_counted() -> None:
    given = Given()
    assert given.door.unregistered == 1
    given.tell(ConnectionLost("gone"), ConnectionLost("told twice"))
    assert given.door.unregistered == 0
    given.assert_nothing_counted_as_live()
    assert given.sample("sessions_total", outcome="ended") == 0
    assert given.supervisor_mail == []


def test_what_comes_after_a_lost_connection_is_ignored(given: Given) -> None:
    frame = given.frame(HealthCheck())
    given.tell(ConnectionLost("gone"))
    assert given.ref.actor_stopped.wait(LIMIT)
    given.tell(
        ConnectionLost("gone"),
        BadFrameReceived(FrameError(ErrorCode.MALFORMED_PAYLOAD, "?")),
        frame,
        VoiceReceived(b"voice"),
    )
    assert given.outbox.history() == ["REGISTER_ACK"]


def test_telling_a_session_that_has_ended_is_no_error(given: Given) -> None:
    given.tell(given.frame(Shutdown()))
    assert given.ref.actor_stopped.wait(LIMIT)
    given.request("req_1")
    given.tell(ConnectionLost("gone"))
    assert given.outbox.history() == ["REGISTER_ACK", "SHUTDOWN"]


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), gevent.Timeout(60), SystemExit(1), gevent.GreenletExit()]
)
def test_a_session_that_fails_closes_its_connection_and_takes_only_its_own_requests_along(
    error: BaseException,
) -> None:
    failing, other = stuck(), stuck()
    for given in (failing, other):
        given.request("req_1")
    lost, kept = failing.source.next(), other.source.next()
    actor = failing.actor("req_1")
    lost.say("once")
    failing.outbox.fail = error
    failing.tell(failing.frame(SessionQuery()))
    assert lost.close_asked.wait(LIMIT)
    lost.say("too late")
    assert failing.ref.actor_stopped.wait(LIMIT)
    assert failing.outbox.closed == (1011, "internal error")
    assert failing.outbox.history()[1:] == ["text req_1"]
    lost.end_closed()
    assert actor.actor_stopped.wait(LIMIT)
    failing.assert_nothing_counted_as_live()
    assert failing.sample("sessions_total", outcome="failed") == 1
    assert sum(isinstance(one, GenerationEnded) for one in failing.supervisor_mail) == 1
    ended = [one for one in failing.supervisor_mail if isinstance(one, SessionEnded)]
    assert ended == [SessionEnded(failing.ref.actor_urn)]

    assert other.outbox.closed is None
    assert not kept.close_asked.is_set()
    kept.complete()
    assert other.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"


def test_a_client_on_which_the_gateway_fails_is_closed_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quota = Quota()
    failing, other = Given(sessions=quota), Given(sessions=quota)
    with monkeypatch.context() as patch:
        patch.setattr("gateway.wire.attachment.profile_of", lambda *_: 1 / 0)
        failing.tell(failing.frame(Register(ApiKeyAuth("key"))))
    assert failing.outbox.closed == (1011, "internal error")
    assert failing.door.unregistered == 0
    failing.tell(failing.frame(HealthCheck()), VoiceReceived(b"voice"))
    assert failing.outbox.frames == []
    other.register()
    with monkeypatch.context() as patch:
        patch.setattr("gateway.wire.attachment.Attachment._words", lambda *_: 1 / 0)
        other.request("req_1")
    assert other.outbox.closed == (1011, "internal error")
    assert other.ref.actor_stopped.wait(LIMIT)
    assert quota.taken == 0


def test_a_session_that_cannot_be_made_takes_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given()
    monkeypatch.setattr("actors.session.session.History", lambda *_: 1 / 0)
    given.tell(given.frame(Register(ApiKeyAuth("key"))))
    assert given.outbox.closed == (1011, "internal error")
    assert given.sessions.taken == 0


def test_a_client_that_cannot_be_told_to_go_keeps_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = Given()
    second = FakeOutbox()
    given.door.attach(second, "127.0.0.1:10")
    for outbox in (given.outbox, second):
        outbox.fail = RuntimeError("no")
    given.door.drain(0)
    assert given.door.unregistered == 0
    assert given.outbox.closed == second.closed == (1011, "internal error")


def test_a_client_is_registered_as_long_as_its_session_lives(given: Given) -> None:
    assert given.attachment.is_registered
    given.tell(given.frame(Shutdown()))
    assert given.ref.actor_stopped.wait(LIMIT)
    assert not given.attachment.is_registered


def test_every_goodbye_has_its_way_to_close() -> None:
    known = {one for one in vars(port).values() if isinstance(one, Goodbye)}
    assert known == CLOSE_CODES.keys()
    assert [one for one, code in CLOSE_CODES.items() if code is None] == [CONNECTION_LOST]


def test_a_message_that_is_none_fails_the_session(given: Given) -> None:
    given.tell(NONSENSE)
    assert given.ref.actor_stopped.wait(LIMIT)
    assert given.outbox.closed is not None
    assert given.outbox.closed[0] == 1011


def test_a_request_actor_that_fails_ends_its_own_request_and_no_other() -> None:
    given = Given(on_new_request=OnNewRequest.PARALLEL)
    given.register()
    given.request("req_1")
    given.request("req_2")
    _first, second = given.source.next(), given.source.next()
    given.settle()
    tell(given.actor("req_1"), NONSENSE)
    terminal = given.outbox.wait_terminal("req_1")
    assert (terminal["error_code"], terminal["outcome"]) == ("INTERNAL_ERROR", "FAILED")
    second.complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"
    assert given.outbox.closed is None
    given.settle()
    assert given.outbox.history()[1:] == ["end FAILED req_1", "end COMPLETED req_2"]


def test_a_bad_frame_is_refused_and_the_session_goes_on(given: Given) -> None:
    given.tell(BadFrameReceived(FrameError(ErrorCode.PAYLOAD_TOO_LARGE, "too much")))
    assert given.outbox.wait_for("ERROR")["error_code"] == "PAYLOAD_TOO_LARGE"
    given.request("req_1")
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_1")["outcome"] == "COMPLETED"


def test_a_bad_frame_names_its_request_only_where_that_ends_nothing(given: Given) -> None:
    given.request("req_1")
    given.source.next()
    for request_id, named in (("req_1", False), ("req_2", True)):
        given.tell(BadFrameReceived(FrameError(ErrorCode.MALFORMED_PAYLOAD, "?", request_id)))
        assert ("request_id" in given.outbox.wait_for("ERROR")) is named


def test_its_live_requests_register_again_when_asked(given: Given) -> None:
    given.request("req_1")
    given.source.next()
    given.settle()
    actor = given.actor("req_1")
    given.supervisor_mail.clear()
    tell(actor, RegisterAgain())
    given.settle_requests()
    assert [type(one) for one in given.supervisor_mail] == [RequestAccepted]


# Letting go of requests --------------------------------------------------------------------------


def overs(given: Given) -> list[RequestClosed]:
    return [one for one in given.supervisor_mail if isinstance(one, RequestClosed)]


def test_a_request_actor_is_gone_when_the_client_has_the_terminal_frame(given: Given) -> None:
    given.request("req_1")
    given.source.next().complete()
    given.outbox.wait_terminal("req_1")
    actor = given.actor("req_1")
    assert actor.actor_stopped.wait(LIMIT)
    assert overs(given) == [RequestClosed(actor.actor_urn)]


def test_a_request_actor_lives_while_the_client_has_not_got_the_terminal_frame(
    given: Given,
) -> None:
    given.outbox.hold = True
    given.request("req_1")
    given.source.next().complete()
    assert given.outbox.finishing.wait(LIMIT)
    given.settle_requests()
    actor = given.actor("req_1")
    assert actor.is_alive()
    assert isinstance(given.supervisor_mail[-1], GenerationEnded)
    given.tell(ConnectionLost("gone"))
    assert actor.actor_stopped.wait(LIMIT)
    assert overs(given) == [RequestClosed(actor.actor_urn)]


def test_a_request_actor_that_has_failed_says_once_that_it_is_over(given: Given) -> None:
    given.request("req_1")
    given.source.next()
    actor = given.actor("req_1")
    tell(actor, NONSENSE)
    given.outbox.wait_terminal("req_1")
    assert not actor.is_alive()
    given.settle()
    assert overs(given) == [RequestClosed(actor.actor_urn)]


# Ids, where they are easily mistaken -------------------------------------------------------------


def voice(request_id: str, seq: int) -> Request:
    content = RequestContent(voice_mode="BINARY")
    return Request(request_id, "VOICE", content, stream_flag=True, stream_seq=seq)


def test_the_id_of_voice_that_still_comes_is_taken(given: Given) -> None:
    given.tell(given.frame(voice("req_1", 0)))
    given.request("req_1")
    refused = given.outbox.wait_for("ERROR")
    assert "'req_1' was already used" in refused["error_detail"]
    assert "request_id" not in refused
    given.tell(given.frame(voice("req_1", -1)))
    assert given.outbox.wait_terminal("req_1")["error_code"] == "INTERNAL_ERROR"
    given.settle()
    assert given.source.streams == []


def test_a_request_that_was_refused_may_come_again_although_it_was_interrupted_meanwhile() -> None:
    given = Given(on_new_request=OnNewRequest.REJECT)
    given.register()
    given.request("req_1")
    first = given.source.next()
    given.request("req_2")
    assert given.outbox.wait_terminal("req_2")["error_code"] == "SERVER_BUSY"
    given.interrupt("req_2")  # as clients do before each new request, whatever became of the last
    assert given.outbox.wait_ack()["results"][0]["outcome"] == "ALREADY_DONE"
    first.complete()
    given.outbox.wait_terminal("req_1")
    given.request("req_2")
    given.source.next().complete()
    assert given.outbox.wait_terminal("req_2")["outcome"] == "COMPLETED"


# Going on after function calls -------------------------------------------------------------------


def asked(stream: FakeStream) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(stream.body)["messages"]
    return messages


def call(given: Given, request_id: str, *call_ids: str) -> FakeStream:
    """A request whose answer is calls of functions, all but its end."""
    given.request(request_id, text=request_id)
    stream = given.source.next()
    stream.sink.opened()
    for call_id in call_ids:
        stream.sink.call(ToolCall(call_id, "look", "{}"))
    given.settle()
    return stream


def test_a_result_over_the_bound_is_told_to_the_model_that_waits_for_it() -> None:
    given = Given(history_chars=100)
    given.register()
    call(given, "req_1", "a", "b").complete()
    given.outbox.wait_terminal("req_1")
    given.tell(given.frame(FunctionResult("a", 1, "req_2")))
    given.tell(given.frame(FunctionResult("b", "x" * 1000)))
    going_on = given.source.next()
    assert [message["role"] for message in asked(going_on)] == ["user", "assistant", "tool", "tool"]
    assert asked(going_on)[-1]["content"] == "x" * 1000
    going_on.complete()
    given.outbox.wait_terminal("req_2")
    given.request("req_3", text="next")
    assert asked(given.source.next()) == [{"role": "user", "content": "next"}]


def test_without_any_history_a_result_still_reaches_the_model_while_its_answer_runs() -> None:
    given = Given(history_messages=0)
    given.register()
    stream = call(given, "req_1", "a")
    given.tell(given.frame(FunctionResult("a", 1, "req_2")))
    given.settle()
    stream.complete()
    assert len(asked(given.source.next())) == 3


def test_a_late_result_goes_on_from_its_own_question_and_stays_there(given: Given) -> None:
    call(given, "req_1", "a").complete()
    given.outbox.wait_terminal("req_1")
    given.request("req_2", text="another thing")
    second = given.source.next()
    second.say("fine")
    second.complete()
    given.outbox.wait_terminal("req_2")
    given.tell(given.frame(FunctionResult("a", 1, "req_3")))
    third = given.source.next()
    assert [message["role"] for message in asked(third)] == ["user", "assistant", "tool"]
    third.say("found")
    third.complete()
    given.outbox.wait_terminal("req_3")
    given.request("req_4", text="last")
    assert [message["content"] for message in asked(given.source.next())] == [
        "req_1",
        None,
        "1",
        "found",
        "another thing",
        "fine",
        "last",
    ]


def test_a_refused_function_result_ends_the_request_that_it_would_have_begun(given: Given) -> None:
    given.tell(given.frame(FunctionResult("nobody's", 1, "req_1")))
    assert given.outbox.wait_terminal("req_1")["error_code"] == "MALFORMED_PAYLOAD"


def test_an_interrupt_for_all_with_nothing_live_still_trims_what_was_not_heard(
    given: Given,
) -> None:
    given.request("req_1", text="one")
    first = given.source.next()
    first.say("once upon")
    first.complete()
    given.outbox.wait_terminal("req_1")
    given.tell(given.frame(Interrupt(None, "USER_VOICE_INPUT", 4)))
    assert given.outbox.wait_ack()["status"] == "FAILED"
    given.request("req_2", text="two")
    assert asked(given.source.next())[1]["content"] == "once [interrupted by the user]"


def test_what_was_heard_is_counted_in_code_points_also_when_the_answer_fails(given: Given) -> None:
    given.request("req_1", text="one")
    first = given.source.next()
    first.say("éé你好")
    given.outbox.hold = True  # its terminal frame waits
    first.end(
        GenerationResult(Ending.FAILED, LimitPassedError("idle", 1), closed_at=time.monotonic())
    )
    assert given.outbox.finishing.wait(LIMIT)
    given.tell(given.frame(Interrupt("req_1", "USER_STOP", 3)))
    given.outbox.wait_terminal("req_1")
    given.outbox.hold = False
    given.request("req_2", text="two")
    assert asked(given.source.next())[1]["content"] == "éé你 [interrupted by the user]"
