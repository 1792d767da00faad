"""A second door drives a session through the whole gateway's middle: no room knows of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import gevent.socket
import pytest
from prometheus_client import CollectorRegistry

from actors.messages import EndSession
from actors.quota import Quota
from actors.session.session import Sessions, SessionSettings
from llm.chat.completions import ToolCall
from metrics.instruments import Metrics
from tests.fakes import LIMIT, FakeSource
from tests.line_door import LineDoor


class LineClient:
    """The client at the other end of the socket, and the stages that a test plays by hand."""

    def __init__(self) -> None:
        ours, self._sock = gevent.socket.socketpair()
        self._sock.settimeout(LIMIT)
        self._lines = self._sock.makefile("r", encoding="utf-8", newline="\n")
        self.source = FakeSource()
        self.metrics = Metrics(CollectorRegistry())
        self.quota = Quota()
        self.door = LineDoor(
            ours,
            Sessions(
                quota=self.quota,
                requests=Quota(),
                make_stages=lambda *row: [self.source.generation(*row)],
                tell_supervisor=lambda _message: None,
                settings=SessionSettings(),
                metrics=self.metrics,
            ),
        )
        assert self.read() == f"welcome {self.door.session.session_id}"

    def say(self, line: str) -> None:
        self._sock.sendall(line.encode() + b"\n")

    def read(self) -> str:
        return self._lines.readline().rstrip("\n")

    def hang_up(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.door.close()
        self._lines.close()
        self._sock.close()


pytestmark = pytest.mark.usefixtures("no_actor_left")


@pytest.fixture
def client() -> Iterator[LineClient]:
    client = LineClient()
    yield client
    client.close()


def test_it_asks_and_is_answered(client: LineClient) -> None:
    client.say("ask one Tell me more")
    stream = client.source.next()
    assert json.loads(stream.body)["messages"][-1]["content"] == "Tell me more"
    stream.say("Once", "upon")
    assert [client.read(), client.read()] == ["text one Once", "text one upon"]
    stream.complete()
    assert client.read() == "end one COMPLETED -"
    client.say("ask one again")
    assert client.read() == "refused MALFORMED_PAYLOAD"


def test_it_interrupts_and_the_history_has_what_was_delivered(client: LineClient) -> None:
    client.say("ask one Tell me more")
    stream = client.source.next()
    stream.say("Once")
    assert client.read() == "text one Once"
    client.say("stop one")
    assert stream.close_asked.wait(LIMIT)
    stream.say("too late")
    assert client.read() == "stopped SUCCESS one STOPPED 4"
    assert client.read() == "end one INTERRUPTED USER_STOP"
    client.say("stop")
    assert client.read() == "stopped FAILED"
    client.say("ask two And now")
    messages = json.loads(client.source.next().body)["messages"]
    assert messages[1]["content"] == "Once [interrupted by the user]"


def test_a_new_question_interrupts_the_one_before(client: LineClient) -> None:
    client.say("ask one Tell me more")
    client.source.next()
    client.say("ask two Something else")
    assert client.read() == "end one INTERRUPTED USER_NEW_INPUT"
    client.source.next().complete()
    assert client.read() == "end two COMPLETED -"


def test_it_returns_what_its_functions_give(client: LineClient) -> None:
    client.say("ask one Look for me")
    stream = client.source.next()
    assert [tool["function"]["name"] for tool in json.loads(stream.body)["tools"]] == ["look"]
    stream.sink.opened()
    stream.sink.call(ToolCall("call_1", "look", '{"hall":3}'))
    assert client.read() == 'call one call_1 look {"hall":3}'
    stream.complete()
    assert client.read() == "end one COMPLETED -"
    client.say("result call_1 found two")
    following = client.source.next()
    last = json.loads(following.body)["messages"][-1]
    assert (last["role"], last["content"]) == ("tool", "found")
    following.complete()
    assert client.read() == "end two COMPLETED -"
    client.say("result nowhere found")
    assert client.read() == "refused MALFORMED_PAYLOAD"


def test_it_says_goodbye_and_so_does_the_session(client: LineClient) -> None:
    client.say("ask one Tell me more")
    client.source.next()
    client.say("bye")
    assert client.read() == "end one INTERRUPTED CLIENT_SHUTDOWN"
    assert client.read() == "goodbye CLIENT_SHUTDOWN stay"
    assert client.quota.taken == 0


def test_a_session_that_ends_says_whether_to_return(client: LineClient) -> None:
    client.door.session.tell(EndSession())
    assert client.read() == "goodbye SERVER_SHUTDOWN return"


def test_a_lost_connection_stops_everything(client: LineClient) -> None:
    client.say("ask one Tell me more")
    stream = client.source.next()
    client.hang_up()
    assert stream.close_asked.wait(LIMIT)
