"""Whole conversations over a real WebSocket: what the client gets, and what the provider is sent.

Each test says exactly which bodies the provider was POSTed, all of them and in order. What holds
of every conversation is looked at after each of them: see `Talk.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias
from unittest.mock import ANY

import pytest

from actors.session.history import BROKEN_MARK, INTERRUPTED_BEFORE_TEXT, INTERRUPTED_MARK, NO_RESULT
from actors.words import OnNewRequest
from gateway.app import Gateway
from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.provider_process import ProviderProcess

Wire: TypeAlias = dict[str, Any]

SMALL = 4096
"""Receive buffer of a client that is soon full, in bytes."""

# What is expected: messages and frames ----------------------------------------------------------


def user(text: str) -> Wire:
    return {"role": "user", "content": text}


def assistant(text: str) -> Wire:
    return {"role": "assistant", "content": text}


def calling(*calls: Wire, text: str | None = None) -> Wire:
    """An assistant's message with calls, as `call` makes them."""
    return {"role": "assistant", "content": text, "tool_calls": list(calls)}


def call(call_id: str, name: str, arguments: str) -> Wire:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(call_id: str, content: str) -> Wire:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def text_frame(request_id: str, seq: int, text: str) -> Wire:
    return {"request_id": request_id, "text_stream_seq": seq, "content": {"text": text}}


def call_frame(request_id: str, seq: int, call_id: str, name: str, parameters: Wire) -> Wire:
    function_call = {"name": name, "parameters": parameters, "call_id": call_id}
    frame = {"request_id": request_id, "text_stream_seq": seq, "content": {}}
    return frame | {"function_call": function_call}


def end_frame(request_id: str, finish_reason: str = "stop") -> Wire:
    return {
        "request_id": request_id,
        "text_stream_seq": -1,
        "content": {},
        "outcome": "COMPLETED",
        "finish_reason": finish_reason,
        "usage": scripts.USAGE,
    }


def interrupted_frame(request_id: str, reason: str = "USER_STOP") -> Wire:
    return {
        "request_id": request_id,
        "text_stream_seq": -1,
        "content": {},
        "interrupted": True,
        "interrupt_reason": reason,
        "outcome": "INTERRUPTED",
        "finish_reason": None,
        "usage": ANY,  # guessed, where the provider had the request
    }


def check_messages(messages: Sequence[Wire]) -> None:
    """Fail where an OpenAI-compatible provider would refuse these messages.

    OpenAI API reference, "Create chat completion", `messages`: an assistant message with
    `tool_calls` must be followed by tool messages responding to each `tool_call_id`; content is
    required unless there are `tool_calls`.
    """
    assert messages, "no messages"
    due: list[str] = []
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "tool":
            assert due, f"a tool message without a call: {message}"
            assert message["tool_call_id"] == due.pop(0), f"not the result that is due: {message}"
        else:
            assert not due, f"no results for {due} before {message}"
        assert role in ("system", "user", "assistant", "tool"), f"no such role: {message}"
        assert role != "system" or number == 0, f"a system message in the middle: {message}"
        calls = message.get("tool_calls")
        if calls is not None:
            assert role == "assistant"
            assert calls, f"an empty list of calls: {message}"
            due = [one["id"] for one in calls]
            assert len(set(due)) == len(due), f"an id twice: {message}"
        if message["content"] is None:
            assert calls, f"no content: {message}"
        else:
            assert isinstance(message["content"], str)
            assert message["content"] or role == "tool", f"an empty content: {message}"
        allowed = {"role", "content"} | {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}.get(
            role, set()
        )
        assert message.keys() <= allowed, f"strange fields: {message}"
    assert not due, f"no results for {due} at the end"
    # Not OpenAI's own rules, but those of many that speak its language.
    roles = [message["role"] for message in messages if message["role"] != "system"]
    assert roles[:1] == ["user"], "it does not begin with a user's message"
    assert roles[-1] in ("user", "tool"), "nothing to answer at the end"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "Be brief."}],
        [user("Go"), {"role": "function", "content": "x"}],
        [user("Go"), {"role": "assistant", "content": None}],
        [user("Go"), assistant("")],
        [user("Go"), {"role": "system", "content": "Be brief."}, user("Go")],
        [user("Go"), calling(call("a", "f", "{}"))],
        [user("Go"), calling(call("a", "f", "{}")), user("Go")],
        [user("Go"), calling(call("a", "f", "{}")), tool("b", "1")],
        [user("Go"), calling(call("a", "f", "{}")), tool("a", "1"), tool("a", "1")],
        [user("Go"), calling(call("a", "f", "{}"), call("b", "f", "{}")), tool("a", "1")],
        [user("Go"), calling(call("a", "f", "{}"), call("a", "f", "{}")), tool("a", "1")],
        [user("Go"), tool("a", "1")],
        [user("Go"), calling()],
        [user("Go") | {"tool_call_id": "a"}],
        [assistant("Hello."), user("Go")],
        [user("Go"), assistant("Hello.")],
    ],
)
def test_messages_that_a_provider_would_refuse_are_noticed(messages: list[Wire]) -> None:
    with pytest.raises(AssertionError):
        check_messages(messages)


# The conversation -------------------------------------------------------------------------------


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


class Talk:
    """One client in front of a gateway of its own, and what the provider was sent of it.

    The provider is told by the last message of a prompt how to answer, so texts of users and
    results of functions are names of scripts.
    """

    def __init__(self, gateway: Gateway, client: Client, provider: ProviderProcess, model: str):
        self.gateway = gateway
        self.client = client
        self.provider = provider
        self.model = model

    # What the client does.

    def script(self, steps: scripts.Script, prefix: str = "question") -> str:
        """A text that the provider answers with these steps."""
        return self.provider.fresh(steps, prefix)

    def ask(self, text: str, request_id: str | None = None, **fields: Any) -> str:
        """REQUEST, with fields that update the session; returns its id."""
        request_id = request_id or self.provider.unique("req")
        request = {"request_id": request_id, "data_type": "TEXT", "content": {"text": text}}
        self.client.send("REQUEST", request | fields)
        return request_id

    def ask_and_wait(self, text: str, **fields: Any) -> str:
        """A REQUEST whose terminal frame is there on return."""
        request_id = self.ask(text, **fields)
        self.client.wait_terminal(request_id)
        return request_id

    def turn(self, answer: str, **fields: Any) -> str:
        """A turn that is answered with this; returns what the user said."""
        text = self.script(scripts.answer([answer]))
        request_id = self.ask_and_wait(text, **fields)
        assert self.payloads(request_id) == [
            text_frame(request_id, 0, answer),
            end_frame(request_id),
        ]
        return text

    def begin(self, *texts: str, request_id: str | None = None) -> tuple[str, str]:
        """A turn whose answer stops after these texts, and does not end.

        Returns:
            The id of the request, and what the user said.
        """
        text = self.script(scripts.idle_mid_stream(texts))
        request_id = self.ask(text, request_id)
        self.wait_text(request_id, "".join(texts))
        return request_id, text

    def call_turn(self, events: Sequence[bytes], texts: Sequence[str] = ()) -> tuple[str, str]:
        """A turn whose answer ends in calls.

        Returns:
            The id of the request, and what the user said.
        """
        text = self.script(scripts.call_answer(events, texts))
        request_id = self.ask_and_wait(text)
        return request_id, text

    def result(self, call_id: str, result: Any, request_id: str | None = None) -> None:
        """FUNCTION_RESULT; does not wait."""
        payload = {"call_id": call_id, "result": result}
        if request_id is not None:
            payload["request_id"] = request_id
        self.client.send("FUNCTION_RESULT", payload)

    def stop(self, request_id: str | None, **fields: Any) -> Wire:
        """INTERRUPT; returns the payload of its ack."""
        self.client.send(
            "INTERRUPT", {"interrupt_request_id": request_id, "reason": "USER_STOP"} | fields
        )
        return self.client.wait_ack().payload

    # What the client gets.

    def payloads(self, request_id: str) -> list[Wire]:
        """Of all frames of a request that were received so far."""
        return [frame.payload for frame in self.client.frames_of(request_id)]

    def wait_text(self, request_id: str, text: str) -> None:
        while self.client.text_of(request_id) != text:
            self.client.wait_text(request_id)

    def wait_call(self) -> Wire:
        """The next `function_call`."""
        frame = self.client.wait_for(lambda frame: "function_call" in frame.payload)
        function_call: Wire = frame.payload["function_call"]
        return function_call

    def wait_error(self) -> Wire:
        return self.client.wait_for(lambda frame: frame.msg_type == "ERROR").payload

    def fence(self) -> None:
        """Wait until the session has dealt with all that was sent."""
        self.client.send("HEALTH_CHECK", {})
        self.client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")

    # What the provider got.

    def bodies(self) -> list[Wire]:
        """Of every POST so far."""
        self.provider.counts()
        return [post.body for post in self.provider.posts() if post.body["model"] == self.model]

    def body(self, *messages: Wire, **more: Any) -> Wire:
        return {"model": self.model, "messages": list(messages), **_STREAMED, **more}

    def assert_sent(self, *prompts: Sequence[Wire]) -> None:
        """These were the messages of all POSTs, and there were no tools."""
        assert self.bodies() == [self.body(*prompt) for prompt in prompts]

    def assert_last_sent(self, *prompt: Wire) -> None:
        """These were the messages of the last POST, and there were no tools."""
        assert self.bodies()[-1] == self.body(*prompt)

    # What holds of every conversation.

    def check(self) -> None:
        """Every body is one that a provider takes; every request has its frames in order."""
        self.fence()
        for body in self.bodies():
            check_messages(body["messages"])
        by_request: dict[str, list[Received]] = {}
        for frame in self.client.frames:
            if frame.msg_type in ("RESPONSE", "ERROR") and "request_id" in frame.payload:
                by_request.setdefault(frame.payload["request_id"], []).append(frame)
        for request_id, frames in by_request.items():
            ends = [frame for frame in frames if frame.is_terminal]
            assert ends in ([], frames[-1:]), f"the ends of {request_id}: {ends}"
            data = frames[: len(frames) - len(ends)]
            assert [frame.payload["text_stream_seq"] for frame in data] == list(range(len(data)))


MakeTalk: TypeAlias = Callable[..., Talk]


@pytest.fixture
def make_talk(
    make_gateway: Callable[..., Gateway], provider: ProviderProcess
) -> Iterator[MakeTalk]:
    """Starts conversations; keyword arguments: `receive_buffer` of the client, `register` (fields
    of its REGISTER), and those of `make_gateway`."""
    talks: list[Talk] = []

    def make(
        *, receive_buffer: int | None = None, register: Wire | None = None, **fields: Any
    ) -> Talk:
        model = provider.unique("model")
        gateway = make_gateway(model=model, **fields)
        client = Client(gateway.server.port, register=False, receive_buffer=receive_buffer)
        talk = Talk(gateway, client, provider, model)
        talks.append(talk)
        client.register(**(register or {}))
        return talk

    yield make
    try:
        for talk in talks:
            talk.check()
    finally:
        for talk in talks:
            talk.client.drop()


@pytest.fixture
def talk(make_talk: MakeTalk) -> Talk:
    """A conversation with default settings."""
    return make_talk()


# Turns ------------------------------------------------------------------------------------------


def test_each_prompt_is_the_conversation_so_far_and_what_the_user_says_now(talk: Talk) -> None:
    first = talk.turn("Hello.")
    second = talk.turn('你好 😀\n\n"quoted"')
    third = talk.turn("Bye.")
    before_second = [user(first), assistant("Hello.")]
    before_third = [*before_second, user(second), assistant('你好 😀\n\n"quoted"')]
    talk.assert_sent([user(first)], [*before_second, user(second)], [*before_third, user(third)])


def test_an_answer_in_many_pieces_is_one_message(talk: Talk) -> None:
    pieces = ["Once ", "upon", "", " a", " time", " 😀", "."]
    first = talk.script(scripts.answer(pieces))
    talk.ask_and_wait(first)
    second = talk.turn("Yes.")
    talk.assert_last_sent(user(first), assistant("Once upon a time 😀."), user(second))


def test_what_the_user_says_is_passed_on_to_the_letter(talk: Talk) -> None:
    text = '  "\\ \n\t\u0000 </s> {"a":1} 你好 👩‍👩‍👧‍👦 e\u0301 \u2028 '
    talk.provider.script(text, scripts.answer(["Yes."]))
    talk.ask_and_wait(text)
    second = talk.turn("Yes.")
    talk.assert_last_sent(user(text), assistant("Yes."), user(second))


def test_a_complete_answer_without_text_leaves_only_what_the_user_said(talk: Talk) -> None:
    first = talk.script(scripts.answer([]))
    request_id = talk.ask_and_wait(first)
    second = talk.turn("Yes.")
    assert talk.payloads(request_id) == [end_frame(request_id)]
    talk.assert_last_sent(user(first), user(second))


def test_each_session_has_a_conversation_of_its_own(talk: Talk, provider: ProviderProcess) -> None:
    first = talk.turn("Hello.")
    with Client(talk.gateway.server.port) as other:
        others = provider.fresh(scripts.answer(["Who are you?"]))
        other.wait_terminal(other.request(others))
    second = talk.turn("Yes.")
    with Client(talk.gateway.server.port) as again:
        later = provider.fresh(scripts.answer(["And you?"]))
        again.wait_terminal(again.request(later))
    talk.assert_sent(
        [user(first)],
        [user(others)],
        [user(first), assistant("Hello."), user(second)],
        [user(later)],
    )


# What the model is told of the session ----------------------------------------------------------

FUNCTIONS: list[Wire] = [
    {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Oslo", "Köln"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    {
        "name": "remind",
        "description": "Reminds of something",
        "parameters": [
            {"name": "what", "type": "string", "description": "Of what"},
            {"name": "minutes", "type": "integer", "required": False},
        ],
    },
    {"name": "ring"},
    {"name": "dial", "parameters": {"properties": {"number": {}, "n": True}}},
]
TOOLS: list[Wire] = [
    {"type": "function", "function": FUNCTIONS[0]},
    {
        "type": "function",
        "function": {
            "name": "remind",
            "description": "Reminds of something",
            "parameters": {
                "type": "object",
                "properties": {
                    "what": {"type": "string", "description": "Of what"},
                    "minutes": {"type": "integer"},
                },
                "required": ["what"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "ring",
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "dial",
            "description": "",
            "parameters": {"type": "object", "properties": {"number": {}, "n": True}},
        },
    },
]
PERSONA = {"role_description": "You are a nurse.", "response_requirements": "Be brief."}
SCENE = {"scene_description": "A ward at night.", "keywords": ["bed", "灯"]}


def test_role_scene_and_functions_are_in_every_prompt(make_talk: MakeTalk) -> None:
    talk = make_talk(
        register={"system_prompt": PERSONA, "scene_context": SCENE, "function_calling": FUNCTIONS}
    )
    first = talk.turn("Hello.")
    second = talk.turn("Yes.")
    system = {
        "role": "system",
        "content": "You are a nurse.\n\nBe brief.\n\nA ward at night.\n\nKeywords: bed, 灯",
    }
    assert talk.bodies() == [
        talk.body(system, user(first), tools=TOOLS),
        talk.body(system, user(first), assistant("Hello."), user(second), tools=TOOLS),
    ]


def test_without_role_and_scene_there_is_no_system_message(make_talk: MakeTalk) -> None:
    talk = make_talk(
        register={"system_prompt": {"role_description": ""}, "scene_context": {"keywords": []}}
    )
    first = talk.turn("Hello.")
    talk.assert_sent([user(first)])


@pytest.mark.parametrize("inside", [False, True], ids=["top_level", "update_session"])
@pytest.mark.parametrize("with_text", [True, False], ids=["with_text", "alone"])
def test_an_update_changes_the_next_prompt_and_keeps_the_conversation(
    make_talk: MakeTalk, inside: bool, with_text: bool
) -> None:
    talk = make_talk(register={"system_prompt": PERSONA, "function_calling": FUNCTIONS[:1]})
    first = talk.turn("Hello.")
    update: Wire = {
        "system_prompt": {"role_description": "You are a pirate."},
        "scene_context": {"scene_description": "A ship."},
        "function_calling_op": "ADD",
        "function_calling": FUNCTIONS[2:3],
    }
    fields = {"update_session": update} if inside else update
    if with_text:
        second = talk.turn("Aye.", **fields)
    else:
        talk.ask_and_wait("", **fields)
        second = talk.turn("Aye.")
    third = talk.turn("Aye, aye.", function_calling_op="DELETE", function_calling=["weather"])
    fourth = talk.turn("Bye.", function_calling_op="REPLACE", function_calling=[])
    nurse = {"role": "system", "content": "You are a nurse.\n\nBe brief."}
    pirate = {"role": "system", "content": "You are a pirate.\n\nA ship."}
    before = [user(first), assistant("Hello."), user(second)]
    later = [*before, assistant("Aye."), user(third)]
    assert talk.bodies() == [
        talk.body(nurse, user(first), tools=TOOLS[:1]),
        talk.body(pirate, *before, tools=[TOOLS[0], TOOLS[2]]),
        talk.body(pirate, *later, tools=TOOLS[2:3]),
        talk.body(pirate, *later, assistant("Aye, aye."), user(fourth)),
    ]


def test_an_update_that_is_refused_changes_nothing_and_its_text_is_not_in_the_conversation(
    talk: Talk,
) -> None:
    first = talk.turn("Hello.")
    refused = talk.ask("never heard", function_calling_op="UPDATE", function_calling=[FUNCTIONS[0]])
    terminal = talk.client.wait_terminal(refused)
    assert terminal.payload["error_code"] == "MALFORMED_PAYLOAD"
    second = talk.turn("Yes.")
    talk.assert_sent([user(first)], [user(first), assistant("Hello."), user(second)])


def test_an_update_while_a_function_runs_is_told_when_the_model_goes_on(
    make_talk: MakeTalk,
) -> None:
    talk = make_talk(register={"function_calling": FUNCTIONS[2:3]})
    _, asked = talk.call_turn(scripts.call_events("ring", "{}", call_id="a"))
    talk.ask_and_wait("", system_prompt=PERSONA, function_calling=FUNCTIONS[:1])
    rang = talk.script(scripts.answer(["It rang."]), "rang")
    talk.result("a", rang, "on")
    talk.client.wait_terminal("on")
    nurse = {"role": "system", "content": "You are a nurse.\n\nBe brief."}
    assert talk.bodies() == [
        talk.body(user(asked), tools=TOOLS[2:3]),
        talk.body(
            nurse,
            user(asked),
            calling(call("a", "ring", "{}")),
            tool("a", rang),
            tools=TOOLS[:1],
        ),
    ]


# Interrupted answers ----------------------------------------------------------------------------


def test_an_interrupted_answer_is_told_as_far_as_it_came_with_a_mark(talk: Talk) -> None:
    request_id, first = talk.begin("Once upon", " a time")
    ack = talk.stop(request_id)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    third = talk.turn("No.")
    assert ack["results"][0]["delivered_text_chars"] == len("Once upon a time")
    assert talk.payloads(request_id)[-1] == interrupted_frame(request_id)
    before = [user(first), assistant("Once upon a time [interrupted by the user]"), user(second)]
    talk.assert_sent([user(first)], before, [*before, assistant("Yes."), user(third)])


def test_an_answer_that_was_interrupted_before_its_first_token_is_told_as_that(
    talk: Talk,
) -> None:
    first = talk.script(scripts.no_headers())
    request_id = talk.ask(first)
    talk.provider.wait_post(script=first)
    talk.stop(request_id)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    assert talk.payloads(request_id) == [interrupted_frame(request_id)]
    unheard = assistant("[interrupted by the user before the answer began]")
    talk.assert_sent([user(first)], [user(first), unheard, user(second)])


def test_a_new_request_interrupts_and_what_the_user_says_comes_after_the_cut_answer(
    talk: Talk,
) -> None:
    older, first = talk.begin("Once upon")
    second = talk.turn("Yes.")
    assert talk.payloads(older) == [
        text_frame(older, 0, "Once upon"),
        interrupted_frame(older, "USER_NEW_INPUT"),
    ]
    third = talk.turn("No.")
    before = [user(first), assistant("Once upon" + INTERRUPTED_MARK), user(second)]
    talk.assert_sent([user(first)], before, [*before, assistant("Yes."), user(third)])


def test_what_was_said_in_a_burst_is_all_told_in_its_order(talk: Talk) -> None:
    texts = [talk.script(scripts.answer([f"answer {number}"])) for number in range(4)]
    with talk.client.one_packet():
        request_ids = [talk.ask(text) for text in texts]
    talk.client.wait_terminal(request_ids[-1])
    for request_id in request_ids[:-1]:
        assert talk.payloads(request_id) == [interrupted_frame(request_id, "USER_NEW_INPUT")]
    unheard = assistant(INTERRUPTED_BEFORE_TEXT)
    told = [message for text in texts[:-1] for message in (user(text), unheard)]
    talk.assert_last_sent(*told, user(texts[-1]))


def test_a_request_that_was_interrupted_before_it_came_is_told_and_never_posted(
    talk: Talk,
) -> None:
    assert talk.stop("early")["status"] == "FAILED"
    text = talk.script(scripts.answer(["never"]))
    talk.ask(text, "early", system_prompt=PERSONA)
    talk.client.wait_terminal("early")
    second = talk.turn("Yes.")
    assert talk.payloads("early") == [interrupted_frame("early")]
    system = {"role": "system", "content": "You are a nurse.\n\nBe brief."}
    talk.assert_sent([system, user(text), assistant(INTERRUPTED_BEFORE_TEXT), user(second)])


def test_an_interrupt_that_comes_after_the_end_marks_nothing(talk: Talk) -> None:
    request_id = talk.ask_and_wait(first := talk.script(scripts.answer(["Hello."])))
    assert talk.stop(request_id)["results"][0]["outcome"] == "ALREADY_DONE"
    second = talk.turn("Yes.")
    talk.assert_last_sent(user(first), assistant("Hello."), user(second))


EMOJI = "a👩‍👩‍👧‍👦e\u0301你"  # 1 + 7 + 2 + 1 code points
HEARD = {
    "smaller": ("Once upon a time", 4, "Once"),
    "larger": ("Once upon a time", 1000, "Once upon a time"),
    "exactly_all": ("Once upon a time", 16, "Once upon a time"),
    "one": ("Once", 1, "O"),
    "null": ("Once", None, "Once"),
    "inside_an_emoji_family": (EMOJI, 2, "a👩"),
    "after_an_emoji_family": (EMOJI, 8, "a👩‍👩‍👧‍👦"),
    "before_a_combining_accent": (EMOJI, 9, "a👩‍👩‍👧‍👦e"),
    "after_a_combining_accent": (EMOJI, 10, "a👩‍👩‍👧‍👦e\u0301"),
}


@pytest.mark.parametrize("name", HEARD)
def test_an_interrupt_says_how_many_code_points_of_the_answer_the_user_got(
    talk: Talk, name: str
) -> None:
    text, chars, heard = HEARD[name]
    request_id, first = talk.begin(text)
    talk.stop(request_id, delivered_text_chars=chars)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    talk.assert_last_sent(user(first), assistant(heard + INTERRUPTED_MARK), user(second))


@pytest.mark.parametrize("name", HEARD)
def test_an_answer_that_was_sent_whole_is_cut_to_what_the_user_heard_of_it(
    talk: Talk, name: str
) -> None:
    text, chars, heard = HEARD[name]
    request_id = talk.ask_and_wait(first := talk.script(scripts.answer([text])))
    ack = talk.stop(request_id, delivered_text_chars=chars)
    assert ack["results"] == [
        {
            "request_id": request_id,
            "outcome": "ALREADY_DONE",
            "delivered_text_chars": len(text),
            "stream_closed_ms": None,
        }
    ]
    second = talk.turn("Yes.")
    told = heard if heard == text else heard + INTERRUPTED_MARK
    talk.assert_last_sent(user(first), assistant(told), user(second))
    assert talk.payloads(request_id)[-1] == end_frame(request_id)


@pytest.mark.parametrize("is_late", [False, True], ids=["live", "complete"])
def test_where_the_user_got_nothing_the_answer_is_told_as_one_that_never_began(
    talk: Talk, is_late: bool
) -> None:
    if is_late:
        request_id = talk.ask_and_wait(first := talk.script(scripts.answer(["Once"])))
    else:
        request_id, first = talk.begin("Once")
    talk.stop(request_id, delivered_text_chars=0)
    second = talk.turn("Yes.")
    talk.assert_last_sent(user(first), assistant(INTERRUPTED_BEFORE_TEXT), user(second))


@pytest.mark.parametrize(("one", "other"), [(4, 9), (9, 4)])
@pytest.mark.parametrize("when", ["together", "one_after_the_other", "complete"])
def test_of_two_that_say_what_the_user_got_the_smaller_counts(
    talk: Talk, when: str, one: int, other: int
) -> None:
    text = "Once upon a time"
    if when == "complete":
        request_id = talk.ask_and_wait(first := talk.script(scripts.answer([text])))
    else:
        request_id, first = talk.begin(text)
    if when == "together":
        interrupt = {"interrupt_request_id": request_id, "reason": "USER_STOP"}
        with talk.client.one_packet():
            for chars in (one, other):
                talk.client.send("INTERRUPT", interrupt | {"delivered_text_chars": chars})
        for _ in range(2):
            talk.client.wait_ack()
    else:
        for chars in (one, other):
            talk.stop(request_id, delivered_text_chars=chars)
    second = talk.turn("Yes.")
    talk.assert_last_sent(user(first), assistant("Once" + INTERRUPTED_MARK), user(second))


def test_an_interrupt_for_all_says_what_the_user_got_too(talk: Talk) -> None:
    _, first = talk.begin("Once upon a time")
    talk.stop(None, delivered_text_chars=4)
    second = talk.turn("Yes.")
    talk.assert_last_sent(user(first), assistant("Once" + INTERRUPTED_MARK), user(second))


@pytest.mark.parametrize("no_id", [None, ""])
def test_when_nothing_runs_an_interrupt_for_all_cuts_the_last_answer(
    talk: Talk, no_id: str | None
) -> None:
    first = talk.turn("Once upon a time")
    second = talk.turn("There was a king")
    talk.stop(no_id)
    assert talk.stop(no_id, delivered_text_chars=5)["results"] == []
    third = talk.turn("Yes.")
    told = [user(first), assistant("Once upon a time"), user(second)]
    talk.assert_last_sent(*told, assistant("There" + INTERRUPTED_MARK), user(third))


def test_what_the_user_got_may_be_said_when_the_conversation_has_gone_on(talk: Talk) -> None:
    request_id = talk.ask_and_wait(first := talk.script(scripts.answer(["Once upon a time"])))
    second = talk.turn("Yes.")
    talk.stop(request_id, delivered_text_chars=4)
    third = talk.turn("No.")
    cut = [user(first), assistant("Once" + INTERRUPTED_MARK), user(second), assistant("Yes.")]
    talk.assert_sent(
        [user(first)],
        [user(first), assistant("Once upon a time"), user(second)],
        [*cut, user(third)],
    )


def test_after_an_interrupt_by_a_new_request_it_can_still_be_said_what_the_user_got(
    talk: Talk,
) -> None:
    older, first = talk.begin("Once upon a time")
    second = talk.turn("Yes.")
    talk.stop(older, delivered_text_chars=4)
    third = talk.turn("No.")
    talk.assert_last_sent(
        user(first),
        assistant("Once" + INTERRUPTED_MARK),
        user(second),
        assistant("Yes."),
        user(third),
    )


# Slow clients -----------------------------------------------------------------------------------


def wait_for_streams_to_end(talk: Talk) -> None:
    """Until the gateway has taken all that the provider sent."""

    def none_is_left() -> bool:
        census = talk.gateway.supervision.census()
        return census is not None and census.streams == 0

    wait_until(none_is_left, "no stream is open")


@pytest.mark.parametrize("how", ["flood", "complete"])
def test_text_that_was_purged_from_the_queue_is_not_told(make_talk: MakeTalk, how: str) -> None:
    talk = make_talk(receive_buffer=SMALL, history_chars=10_000_000)
    words = [f"word{number} " * 100 for number in range(800)]
    sends = scripts.tokens(words)
    whole = scripts.answer(words)
    text = talk.script(whole if how == "complete" else [*scripts.opening(), *sends * 20])
    request_id = talk.ask(text)
    if how == "complete":
        talk.provider.wait_script_done(script=text)
        wait_for_streams_to_end(talk)
    else:
        talk.provider.wait_blocked(script=text)
    ack = talk.stop(request_id)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    got = talk.client.text_of(request_id)
    assert 0 < len(got) < len("".join(words))
    assert ack["results"][0]["delivered_text_chars"] == len(got)
    talk.assert_last_sent(user(text), assistant(got + INTERRUPTED_MARK), user(second))


def test_a_client_that_did_not_read_may_say_that_the_user_got_even_less(
    make_talk: MakeTalk,
) -> None:
    talk = make_talk(receive_buffer=SMALL, history_chars=10_000_000)
    text = talk.script(scripts.flood("x" * 200))
    request_id = talk.ask(text)
    talk.provider.wait_blocked(script=text)
    talk.stop(request_id, delivered_text_chars=3)
    second = talk.turn("Yes.")
    assert len(talk.client.text_of(request_id)) > 3
    talk.assert_last_sent(user(text), assistant("xxx" + INTERRUPTED_MARK), user(second))


@pytest.mark.parametrize("by", ["interrupt", "new_request"])
def test_a_call_that_was_purged_from_the_queue_was_never_made(make_talk: MakeTalk, by: str) -> None:
    talk = make_talk(receive_buffer=SMALL, history_chars=10_000_000)
    events = scripts.call_events("ring", "{}", call_id="a")
    text = talk.script(scripts.call_answer(events, ["y" * 1000] * 800))
    request_id = talk.ask(text)
    talk.provider.wait_script_done(script=text)
    wait_for_streams_to_end(talk)
    if by == "interrupt":
        talk.stop(request_id)
    second = talk.turn("Yes.")
    got = talk.client.text_of(request_id)
    assert 0 < len(got) < 800_000
    assert not [frame for frame in talk.client.frames if "function_call" in frame.payload]
    talk.assert_last_sent(user(text), assistant(got + INTERRUPTED_MARK), user(second))
    talk.result("a", "late")
    assert "'a'" in talk.wait_error()["error_detail"]


@pytest.mark.parametrize("by", ["interrupt", "new_request"])
def test_a_call_whose_frame_was_begun_when_it_was_cut_reaches_the_client_and_is_told(
    make_talk: MakeTalk, by: str
) -> None:
    talk = make_talk(receive_buffer=SMALL, history_chars=10_000_000)
    arguments = '{"text": "%s"}' % ("x" * 900_000)  # far more than the kernel holds
    events = scripts.call_events("print", arguments, call_id="a", piece_chars=10_000)
    first = talk.script(scripts.call_answer(events))
    request_id = talk.ask(first)
    talk.provider.wait_script_done(script=first)
    wait_for_streams_to_end(talk)
    if by == "interrupt":
        assert talk.stop(request_id)["results"][0]["outcome"] == "STOPPED"
        talk.client.wait_terminal(request_id)
    second = talk.script(scripts.answer(["Yes."]))
    newer = talk.ask(second)
    talk.provider.wait_post(script=second)  # in one case, while the client has read nothing yet
    talk.client.wait_terminal(newer)
    reason = "USER_STOP" if by == "interrupt" else "USER_NEW_INPUT"
    assert talk.payloads(request_id) == [
        call_frame(request_id, 0, "a", "print", {"text": "x" * 900_000}),
        interrupted_frame(request_id, reason)
        | {"finish_reason": "tool_calls", "usage": scripts.USAGE},
    ]
    talk.result("a", "printed")
    third = talk.turn("No.")
    asked = [user(first), calling(call("a", "print", arguments))]
    later = [user(second), assistant("Yes."), user(third)]
    talk.assert_sent(
        [user(first)],
        [*asked, tool("a", NO_RESULT), user(second)],
        [*asked, tool("a", "printed"), *later],
    )


# Answers that failed ----------------------------------------------------------------------------

BROKEN: dict[str, Callable[[Sequence[str]], scripts.Script]] = {
    "truncated": scripts.truncated,
    "reset": scripts.reset_mid_stream,
    "error": lambda texts: scripts.error_in_stream("overloaded", texts),
    "silent": scripts.idle_mid_stream,
    "malformed_call": lambda texts: scripts.call_answer(
        scripts.call_events("ring", "{oops", call_id="a"), texts
    ),
    "cut_in_a_call": lambda texts: scripts.cut_in_call(
        scripts.call_events("ring", '{"times": 3}', call_id="a"), texts
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_broke_off_is_told_as_far_as_it_came_with_a_mark(
    make_talk: MakeTalk, name: str
) -> None:
    limits = {"idle_timeout": 1.0, "first_token_timeout": 1.0} if name == "silent" else {}
    talk = make_talk(**limits)
    first = talk.script(BROKEN[name](["Once upon"]))
    request_id = talk.ask_and_wait(first)
    second = talk.turn("Yes.")
    text, terminal = talk.payloads(request_id)
    assert text == text_frame(request_id, 0, "Once upon")
    assert terminal["outcome"] == "FAILED"
    broken = assistant("Once upon [the answer broke off here]")
    talk.assert_sent([user(first)], [user(first), broken, user(second)])


@pytest.mark.parametrize("name", [*BROKEN, "bad_request"])
def test_a_turn_that_failed_before_anything_came_is_forgotten(
    make_talk: MakeTalk, name: str
) -> None:
    limits = {"idle_timeout": 1.0, "first_token_timeout": 1.0} if name == "silent" else {}
    talk = make_talk(**limits)
    first = talk.turn("Hello.")
    script = scripts.http_error(400, "no") if name == "bad_request" else BROKEN[name]([])
    failed = talk.script(script)
    request_id = talk.ask_and_wait(failed)
    third = talk.turn("Yes.")
    (terminal,) = talk.payloads(request_id)
    assert terminal["outcome"] == "FAILED"
    before = [user(first), assistant("Hello.")]
    talk.assert_sent([user(first)], [*before, user(failed)], [*before, user(third)])


def test_a_broken_answer_of_which_the_user_got_less_was_interrupted(talk: Talk) -> None:
    request_id = talk.ask_and_wait(first := talk.script(scripts.truncated(["Once upon"])))
    talk.stop(request_id, delivered_text_chars=100)
    second = talk.turn("Yes.")
    talk.stop(request_id, delivered_text_chars=4)
    third = talk.turn("No.")
    rest = [user(second), assistant("Yes."), user(third)]
    talk.assert_sent(
        [user(first)],
        [user(first), assistant("Once upon" + BROKEN_MARK), user(second)],
        [user(first), assistant("Once" + INTERRUPTED_MARK), *rest],
    )


# Function calls: what the client gets -----------------------------------------------------------

OSLO = '{"city": "Oslo",  "days": 2}'  # not as we would write it: it is told to the letter


def weather_events(**how: Any) -> list[bytes]:
    return scripts.call_events("weather", OSLO, **{"call_id": "a", **how})


@pytest.mark.parametrize(
    "events",
    [
        weather_events(),
        weather_events(piece_chars=1),
        weather_events(piece_chars=1000),
        weather_events(later="empty"),
        weather_events(later="null"),
        weather_events(index=None),
        weather_events(index=3),
    ],
    ids=["usual", "letters", "whole", "empty_names", "null_names", "no_index", "index_3"],
)
def test_a_call_is_given_whole_and_told_as_the_model_made_it(
    talk: Talk, events: list[bytes]
) -> None:
    request_id, first = talk.call_turn(events)
    second = talk.turn("Yes.")
    assert talk.payloads(request_id) == [
        call_frame(request_id, 0, "a", "weather", {"city": "Oslo", "days": 2}),
        end_frame(request_id, "tool_calls"),
    ]
    told = [calling(call("a", "weather", OSLO)), tool("a", NO_RESULT)]
    talk.assert_sent([user(first)], [user(first), *told, user(second)])


@pytest.mark.parametrize("form", ["legacy", "without_an_id"])
def test_a_call_without_an_id_gets_one_and_is_told_in_the_modern_form(
    talk: Talk, form: str
) -> None:
    if form == "legacy":
        script = scripts.call_answer(
            scripts.legacy_call_events("weather", OSLO), reason="function_call"
        )
    else:
        script = scripts.call_answer(weather_events(call_id=None))
    request_id = talk.ask_and_wait(first := talk.script(script))
    call_id = talk.payloads(request_id)[0]["function_call"]["call_id"]
    assert call_id
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result(call_id, fine, "on")
    talk.client.wait_terminal("on")
    assert talk.payloads(request_id) == [
        call_frame(request_id, 0, call_id, "weather", {"city": "Oslo", "days": 2}),
        end_frame(request_id, "function_call" if form == "legacy" else "tool_calls"),
    ]
    told = [calling(call(call_id, "weather", OSLO)), tool(call_id, fine)]
    talk.assert_sent([user(first)], [user(first), *told])


def test_a_call_without_arguments_has_an_empty_object(talk: Talk) -> None:
    request_id, first = talk.call_turn(scripts.call_events("ring", "", call_id="a"))
    second = talk.turn("Yes.")
    assert talk.payloads(request_id)[0] == call_frame(request_id, 0, "a", "ring", {})
    told = [calling(call("a", "ring", "{}")), tool("a", NO_RESULT)]
    talk.assert_last_sent(user(first), *told, user(second))


RING = scripts.call_events("ring", '{"times": 3}', index=1, call_id="b")


def test_text_and_calls_of_one_answer_are_numbered_through_and_told_as_one_message(
    talk: Talk,
) -> None:
    request_id, first = talk.call_turn([*weather_events(), *RING], ["Let me see."])
    second = talk.turn("Yes.")
    assert talk.payloads(request_id) == [
        text_frame(request_id, 0, "Let me see."),
        call_frame(request_id, 1, "a", "weather", {"city": "Oslo", "days": 2}),
        call_frame(request_id, 2, "b", "ring", {"times": 3}),
        end_frame(request_id, "tool_calls"),
    ]
    both = calling(
        call("a", "weather", OSLO), call("b", "ring", '{"times": 3}'), text="Let me see."
    )
    talk.assert_last_sent(
        user(first), both, tool("a", NO_RESULT), tool("b", NO_RESULT), user(second)
    )


def test_calls_that_are_streamed_at_the_same_time_are_told_apart(talk: Talk) -> None:
    request_id, first = talk.call_turn(scripts.interleaved(weather_events(), RING))
    second = talk.turn("Yes.")
    assert talk.payloads(request_id) == [
        call_frame(request_id, 0, "a", "weather", {"city": "Oslo", "days": 2}),
        call_frame(request_id, 1, "b", "ring", {"times": 3}),
        end_frame(request_id, "tool_calls"),
    ]
    both = calling(call("a", "weather", OSLO), call("b", "ring", '{"times": 3}'))
    talk.assert_last_sent(
        user(first), both, tool("a", NO_RESULT), tool("b", NO_RESULT), user(second)
    )


@pytest.mark.parametrize(
    "events",
    [
        scripts.call_events("", "{}", call_id="a"),
        scripts.call_events("ring", "[1]", call_id="a"),
        scripts.call_events("ring", '"{}"', call_id="a"),
        [*weather_events(), *scripts.call_events("ring", "{", index=1, call_id="b")],
    ],
    ids=["no_name", "a_list", "a_string", "only_the_second"],
)
def test_a_malformed_call_is_an_error_and_none_is_given(talk: Talk, events: list[bytes]) -> None:
    request_id, _ = talk.call_turn(events)
    second = talk.turn("Yes.")
    (terminal,) = talk.payloads(request_id)
    assert terminal["error_code"] == "INTERNAL_ERROR"
    assert "malformed function call" in terminal["error_detail"]
    talk.assert_last_sent(user(second))


def test_with_speech_an_answer_of_calls_ends_the_voice_and_so_does_what_follows(
    make_talk: MakeTalk,
) -> None:
    talk = make_talk(register={"require_tts": True})
    request_id, _ = talk.call_turn(weather_events())
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    assert talk.payloads(request_id) == [
        call_frame(request_id, 0, "a", "weather", {"city": "Oslo", "days": 2}),
        end_frame(request_id, "tool_calls") | {"voice_stream_seq": -1},
    ]
    assert talk.payloads("on") == [
        text_frame("on", 0, "It is fine."),
        end_frame("on") | {"voice_stream_seq": -1},
    ]


# Interrupts around calls ------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [[], ["Let me see."]], ids=["no_text", "text"])
def test_an_interrupt_in_the_middle_of_a_calls_arguments_leaves_no_call(
    talk: Talk, texts: list[str]
) -> None:
    half = weather_events()[:-1]
    script = [*scripts.opening(), *scripts.tokens(texts), *scripts.chunks(half)]
    first = talk.script([*script, scripts.mark("half"), scripts.hang()])
    request_id = talk.ask(first)
    talk.wait_text(request_id, "".join(texts))
    talk.provider.wait_mark("half", script=first)
    talk.stop(request_id)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    assert talk.payloads(request_id) == [
        *(text_frame(request_id, seq, text) for seq, text in enumerate(texts)),
        interrupted_frame(request_id),
    ]
    cut = "Let me see." + INTERRUPTED_MARK if texts else INTERRUPTED_BEFORE_TEXT
    talk.assert_last_sent(user(first), assistant(cut), user(second))


def hold_calls(talk: Talk, texts: Sequence[str] = ()) -> tuple[str, str, str]:
    """An answer whose call the client has, and whose end is held back.

    Returns:
        The id of the request, what the user said, and the key that lets it end.
    """
    key = talk.provider.unique("done")
    text = talk.script(scripts.calls_before_release(weather_events(), key, texts))
    request_id = talk.ask(text)
    assert talk.wait_call()["call_id"] == "a"
    return request_id, text, key


@pytest.mark.parametrize("texts", [[], ["Let me see."]], ids=["no_text", "text"])
@pytest.mark.parametrize("has_result", [False, True], ids=["no_result", "result"])
def test_a_call_that_was_given_before_the_interrupt_stays(
    talk: Talk, texts: list[str], has_result: bool
) -> None:
    request_id, first, _ = hold_calls(talk, texts)
    if has_result:
        talk.result("a", {"sky": "blue"})
    talk.stop(request_id)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    assert talk.payloads(request_id)[-1]["outcome"] == "INTERRUPTED"
    told = calling(
        call("a", "weather", OSLO), text="Let me see. [interrupted by the user]" if texts else None
    )
    result = '{"sky":"blue"}' if has_result else NO_RESULT
    talk.assert_last_sent(user(first), told, tool("a", result), user(second))


def test_a_call_of_an_answer_that_then_failed_stays_and_can_be_gone_on_from(talk: Talk) -> None:
    finish = scripts.finish_event("tool_calls")
    script = scripts.raw([*weather_events(), finish, scripts.error_event("overloaded")])
    request_id = talk.ask_and_wait(first := talk.script(script))
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    given, terminal = talk.payloads(request_id)
    assert given["function_call"]["call_id"] == "a"
    assert terminal["outcome"] == "FAILED"
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", fine)]
    talk.assert_sent([user(first)], told)


# Results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ({"sky": "blue", "t": [1, 2.5, None]}, '{"sky":"blue","t":[1,2.5,null]}'),
        ("sunny 你好 😀", "sunny 你好 😀"),
        ('{"already": "JSON"}', '{"already": "JSON"}'),
        ("", ""),
        (42, "42"),
        (-1.5, "-1.5"),
        (None, "null"),
        (True, "true"),
        ([], "[]"),
        ([{"ä": "😀"}, "x"], '[{"ä":"😀"},"x"]'),
    ],
    ids=repr,
)
@pytest.mark.parametrize("continues", [False, True], ids=["next_turn", "continues"])
def test_any_json_is_a_result_and_text_stays_as_it_is(
    talk: Talk, result: Any, content: str, continues: bool
) -> None:
    _, first = talk.call_turn(weather_events())
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", content)]
    if continues:
        talk.provider.script(content, scripts.answer(["It is fine."]))
        talk.result("a", result, "on")
        talk.client.wait_terminal("on")
        assert talk.payloads("on") == [text_frame("on", 0, "It is fine."), end_frame("on")]
        talk.assert_sent([user(first)], told)
    else:
        talk.result("a", result)
        second = talk.turn("Yes.")
        talk.assert_sent([user(first)], [*told, user(second)])


def test_a_whole_conversation_with_a_function(make_talk: MakeTalk) -> None:
    talk = make_talk(register={"system_prompt": PERSONA, "function_calling": FUNCTIONS})
    request_id, first = talk.call_turn(weather_events(), ["Let me see."])
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    second = talk.turn("You are welcome.")
    assert talk.payloads(request_id)[-1] == end_frame(request_id, "tool_calls")
    assert talk.payloads("on") == [text_frame("on", 0, "It is fine."), end_frame("on")]
    system = {"role": "system", "content": "You are a nurse.\n\nBe brief."}
    told = [
        user(first),
        calling(call("a", "weather", OSLO), text="Let me see."),
        tool("a", fine),
    ]
    assert talk.bodies() == [
        talk.body(system, user(first), tools=TOOLS),
        talk.body(system, *told, tools=TOOLS),
        talk.body(system, *told, assistant("It is fine."), user(second), tools=TOOLS),
    ]


def test_the_model_may_call_again_and_again_before_it_answers(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    more = talk.script(
        scripts.call_answer(scripts.call_events("ring", "{}", call_id="b"), ["Hm."]), "more"
    )
    talk.result("a", more, "on-1")
    talk.client.wait_terminal("on-1")
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("b", fine, "on-2")
    talk.client.wait_terminal("on-2")
    second = talk.turn("Yes.")
    assert talk.payloads("on-1") == [
        text_frame("on-1", 0, "Hm."),
        call_frame("on-1", 1, "b", "ring", {}),
        end_frame("on-1", "tool_calls"),
    ]
    one = [user(first), calling(call("a", "weather", OSLO)), tool("a", more)]
    two = [*one, calling(call("b", "ring", "{}"), text="Hm."), tool("b", fine)]
    three = [*two, assistant("It is fine."), user(second)]
    talk.assert_sent([user(first)], one, two, three)


def test_an_id_that_the_provider_uses_again_means_the_newest_call(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    talk.result("a", "one")
    _, second = talk.call_turn(scripts.call_events("ring", "{}", call_id="a"))
    talk.result("a", "two")
    third = talk.turn("Yes.")
    talk.assert_last_sent(
        user(first),
        calling(call("a", "weather", OSLO)),
        tool("a", "one"),
        user(second),
        calling(call("a", "ring", "{}")),
        tool("a", "two"),
        user(third),
    )


def test_without_a_result_the_next_prompt_has_one_that_says_so_until_the_result_comes(
    talk: Talk,
) -> None:
    _, first = talk.call_turn(weather_events())
    second = talk.turn("Yes.")
    talk.result("a", {"sky": "blue"})
    third = talk.turn("No.")
    talk.result("a", "grey by now")
    fourth = talk.turn("Bye.")
    asked = [user(first), calling(call("a", "weather", OSLO))]
    stand_in = '{"error":"interrupted: the function returned no result"}'
    later = [user(second), assistant("Yes."), user(third)]
    talk.assert_sent(
        [user(first)],
        [*asked, tool("a", stand_in), user(second)],
        [*asked, tool("a", '{"sky":"blue"}'), *later],
        [*asked, tool("a", "grey by now"), *later, assistant("No."), user(fourth)],
    )


def test_the_model_goes_on_from_its_results_also_when_the_conversation_has_gone_on(
    talk: Talk,
) -> None:
    _, first = talk.call_turn(weather_events())
    second = talk.turn("Yes.")
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    third = talk.turn("No.")
    asked = [user(first), calling(call("a", "weather", OSLO))]
    told = [*asked, tool("a", fine)]
    talk.assert_sent(
        [user(first)],
        [*asked, tool("a", NO_RESULT), user(second)],
        told,  # as if nothing had come between: it could not answer what was answered already
        [*told, assistant("It is fine."), user(second), assistant("Yes."), user(third)],
    )


# Two calls of one answer ------------------------------------------------------------------------

BOTH = calling(call("a", "weather", OSLO), call("b", "ring", '{"times": 3}'))


def ask_for_both(talk: Talk) -> str:
    """A turn whose answer is two calls; returns what the user said."""
    _, text = talk.call_turn([*weather_events(), *RING])
    return text


def rang(talk: Talk) -> str:
    """A result that the model answers with "It rang."."""
    return talk.script(scripts.answer(["It rang."]), "rang")


def assert_went_on(talk: Talk, request_id: str, first: str, *results: Wire) -> None:
    """The model went on as this request, once, told these results."""
    talk.client.wait_terminal(request_id)
    assert talk.payloads(request_id) == [
        text_frame(request_id, 0, "It rang."),
        end_frame(request_id),
    ]
    talk.assert_sent([user(first)], [user(first), BOTH, *results])


def test_with_an_id_only_on_the_second_result_the_model_goes_on_at_once(talk: Talk) -> None:
    first, second = ask_for_both(talk), rang(talk)
    talk.result("a", "fine")
    talk.result("b", second, "on")
    assert_went_on(talk, "on", first, tool("a", "fine"), tool("b", second))


def test_results_in_another_order_are_told_in_the_order_of_the_calls(talk: Talk) -> None:
    first, second = ask_for_both(talk), rang(talk)
    talk.result("b", second)
    talk.result("a", "fine", "on")
    assert_went_on(talk, "on", first, tool("a", "fine"), tool("b", second))


@pytest.mark.parametrize("again", [None, "on"], ids=["no_id", "the_same_id"])
def test_with_an_id_on_the_first_result_the_model_waits_for_the_second(
    talk: Talk, again: str | None
) -> None:
    first, second = ask_for_both(talk), rang(talk)
    talk.result("a", "fine", "on")
    talk.fence()
    talk.assert_sent([user(first)])
    assert talk.payloads("on") == []
    talk.result("b", second, again)
    assert_went_on(talk, "on", first, tool("a", "fine"), tool("b", second))


def test_both_results_in_one_packet_with_the_same_id_go_on_once(talk: Talk) -> None:
    first, second = ask_for_both(talk), rang(talk)
    with talk.client.one_packet():
        talk.result("a", "fine", "on")
        talk.result("b", second, "on")
    assert_went_on(talk, "on", first, tool("a", "fine"), tool("b", second))


def test_a_result_that_is_given_twice_does_not_stand_for_the_other(talk: Talk) -> None:
    first, second = ask_for_both(talk), rang(talk)
    talk.result("a", "one", "on")
    talk.result("a", "two", "on")
    talk.fence()
    talk.assert_sent([user(first)])
    talk.result("b", second)
    assert_went_on(talk, "on", first, tool("a", "two"), tool("b", second))


def test_a_second_id_for_the_same_answer_is_refused_and_the_first_goes_on(talk: Talk) -> None:
    first, second = ask_for_both(talk), rang(talk)
    talk.result("a", "fine", "on")
    talk.result("b", second, "other")  # the result counts all the same
    refusal = talk.client.wait_terminal("other")
    assert refusal.payload["error_code"] == "MALFORMED_PAYLOAD"
    assert "'on'" in refusal.payload["error_detail"]
    assert talk.payloads("on") == []
    assert_went_on(talk, "on", first, tool("a", "fine"), tool("b", second))
    assert talk.payloads("other") == [refusal.payload]


def test_the_used_id_of_another_request_is_refused_while_the_model_waits(talk: Talk) -> None:
    request_id, first = talk.call_turn([*weather_events(), *RING])
    second = rang(talk)
    talk.result("a", "fine", "on")
    talk.result("b", second, request_id)  # the result counts all the same
    refusal = talk.wait_error()
    assert refusal["error_code"] == "MALFORMED_PAYLOAD"
    assert "request_id" not in refusal
    assert_went_on(talk, "on", first, tool("a", "fine"), tool("b", second))


def test_the_same_id_is_refused_when_the_model_has_gone_on(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    fine = talk.script(scripts.idle_mid_stream(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.wait_text("on", "It is fine.")
    talk.result("a", "other", "on")  # the result counts all the same
    assert "request_id" not in talk.wait_error()
    second = talk.turn("Yes.")
    assert talk.payloads("on")[0] == text_frame("on", 0, "It is fine.")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", "other")]
    talk.assert_last_sent(*told, assistant("It is fine." + INTERRUPTED_MARK), user(second))


# Ids that cannot be had -------------------------------------------------------------------------


@pytest.mark.parametrize("used_by", ["request", "live_request", "update", "refused"])
def test_an_id_that_was_used_is_refused_without_ending_anything(talk: Talk, used_by: str) -> None:
    _, first = talk.call_turn(weather_events())
    asked = [user(first), calling(call("a", "weather", OSLO))]
    without = [*asked, tool("a", NO_RESULT)]
    match used_by:
        case "request":
            text = talk.script(scripts.answer(["Yes."]))
            talk.client.wait_terminal(talk.ask(text, "used"))
            sent = [[user(first)], [*without, user(text)]]
        case "live_request":
            _, text = talk.begin("Once", request_id="used")
            sent = [[user(first)], [*without, user(text)]]
        case "update":
            talk.client.wait_terminal(talk.ask("", "used"))
            sent = [[user(first)]]
        case _:
            talk.result("unknown", "x", "used")
            talk.client.wait_terminal("used")
            sent = [[user(first)]]
    frames = len(talk.payloads("used"))
    talk.result("a", "fine", "used")
    refusal = talk.wait_error()
    talk.fence()
    assert refusal["error_code"] == "MALFORMED_PAYLOAD"
    assert "'used'" in refusal["error_detail"]
    assert "request_id" not in refusal
    assert len(talk.payloads("used")) == frames
    talk.assert_sent(*sent)


def test_a_result_with_an_id_that_was_used_can_be_given_again_with_another(talk: Talk) -> None:
    request_id, first = talk.call_turn(weather_events())
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, request_id)
    assert "request_id" not in talk.wait_error()
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    assert talk.payloads("on") == [text_frame("on", 0, "It is fine."), end_frame("on")]
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", fine)]
    talk.assert_sent([user(first)], told)


def test_the_id_of_a_request_that_goes_on_is_used_too(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    talk.ask("never heard", "on")
    assert "request_id" not in talk.wait_error()
    talk.result("a", "once more", "on")
    assert "request_id" not in talk.wait_error()
    second = talk.turn("Yes.")
    assert talk.payloads("on") == [text_frame("on", 0, "It is fine."), end_frame("on")]
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", "once more")]
    talk.assert_last_sent(*told, assistant("It is fine."), user(second))


@pytest.mark.parametrize("call_id", ["unknown", "A", "a "])
def test_a_result_of_an_unknown_call_is_refused(talk: Talk, call_id: str) -> None:
    _, first = talk.call_turn(weather_events())
    talk.result(call_id, "x")
    without_id = talk.wait_error()
    talk.result(call_id, "x", "on")
    with_id = talk.client.wait_terminal("on").payload
    second = talk.turn("Yes.")
    assert "request_id" not in without_id
    assert without_id["error_code"] == with_id["error_code"] == "MALFORMED_PAYLOAD"
    assert repr(call_id) in without_id["error_detail"]
    assert with_id["outcome"] == "FAILED"
    assert talk.payloads("on") == [with_id]
    told = [calling(call("a", "weather", OSLO)), tool("a", NO_RESULT)]
    talk.assert_sent([user(first)], [user(first), *told, user(second)])


def test_a_result_of_another_sessions_call_is_one_of_an_unknown_call(talk: Talk) -> None:
    talk.call_turn(weather_events())
    with Client(talk.gateway.server.port) as other:
        result = {"call_id": "a", "result": "x", "request_id": "on"}
        other.send("FUNCTION_RESULT", result)
        assert other.wait_terminal("on").payload["error_code"] == "MALFORMED_PAYLOAD"
    second = talk.turn("Yes.")
    assert NO_RESULT in [message["content"] for message in talk.bodies()[-1]["messages"]]
    assert second


# Results before the end of the answer -----------------------------------------------------------


@pytest.mark.parametrize("policy", OnNewRequest)
def test_a_result_may_come_before_the_end_of_the_answer_that_made_the_call(
    make_talk: MakeTalk, policy: OnNewRequest
) -> None:
    talk = make_talk(on_new_request=policy)
    request_id, first, key = hold_calls(talk, ["Let me see."])
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.fence()
    talk.assert_sent([user(first)])
    talk.provider.release(key)
    talk.client.wait_terminal("on")
    assert talk.payloads(request_id) == [
        text_frame(request_id, 0, "Let me see."),
        call_frame(request_id, 1, "a", "weather", {"city": "Oslo", "days": 2}),
        end_frame(request_id, "tool_calls"),
    ]
    assert talk.payloads("on") == [text_frame("on", 0, "It is fine."), end_frame("on")]
    frames = [frame.payload for frame in talk.client.frames]
    assert frames.index(end_frame(request_id, "tool_calls")) < frames.index(talk.payloads("on")[0])
    told = calling(call("a", "weather", OSLO), text="Let me see.")
    talk.assert_sent([user(first)], [user(first), told, tool("a", fine)])


def test_a_result_without_an_id_may_come_before_the_end_too_and_nothing_goes_on(
    talk: Talk,
) -> None:
    request_id, first, key = hold_calls(talk)
    talk.result("a", "fine")
    talk.fence()
    talk.provider.release(key)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", "fine")]
    talk.assert_sent([user(first)], [*told, user(second)])


def test_an_interrupt_for_all_stops_the_answer_and_what_waits_to_go_on_from_it(
    talk: Talk,
) -> None:
    request_id, first, _ = hold_calls(talk)
    talk.result("a", "fine", "on")
    ack = talk.stop(None)
    talk.client.wait_terminal("on")
    second = talk.turn("Yes.")
    assert ack["status"] == "SUCCESS"
    assert sorted(ack["interrupted_request_ids"]) == sorted([request_id, "on"])
    assert talk.payloads("on") == [interrupted_frame("on")]
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", "fine")]
    unheard = assistant(INTERRUPTED_BEFORE_TEXT)
    talk.assert_sent([user(first)], [*told, unheard, user(second)])


# Interrupts of what goes on ---------------------------------------------------------------------


def test_a_request_that_waits_for_results_can_be_interrupted(talk: Talk) -> None:
    first = ask_for_both(talk)
    talk.result("a", "fine", "on")
    ack = talk.stop("on")
    talk.client.wait_terminal("on")
    second = talk.turn("Yes.")
    assert ack["results"] == [
        {
            "request_id": "on",
            "outcome": "STOPPED",
            "delivered_text_chars": 0,
            "stream_closed_ms": None,
        }
    ]
    assert talk.payloads("on") == [interrupted_frame("on")]
    told = [BOTH, tool("a", "fine"), tool("b", NO_RESULT), assistant(INTERRUPTED_BEFORE_TEXT)]
    talk.assert_sent([user(first)], [user(first), *told, user(second)])


def test_when_what_waits_is_being_interrupted_the_model_can_go_on_as_another(talk: Talk) -> None:
    first, second = ask_for_both(talk), rang(talk)
    talk.result("a", "fine", "on")
    talk.fence()
    with talk.client.one_packet():
        talk.client.interrupt("on")
        talk.result("b", second, "other")
    assert_went_on(talk, "other", first, tool("a", "fine"), tool("b", second))
    assert talk.payloads("on") == [interrupted_frame("on")]


def test_a_new_request_interrupts_one_that_waits_for_results(talk: Talk) -> None:
    first = ask_for_both(talk)
    talk.result("a", "fine", "on")
    second = talk.turn("Yes.")
    assert talk.payloads("on") == [interrupted_frame("on", "USER_NEW_INPUT")]
    told = [BOTH, tool("a", "fine"), tool("b", NO_RESULT), assistant(INTERRUPTED_BEFORE_TEXT)]
    talk.assert_sent([user(first)], [user(first), *told, user(second)])


def test_a_request_that_went_on_is_interrupted_like_any_other(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    fine = talk.script(scripts.idle_mid_stream(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.wait_text("on", "It is fine.")
    talk.stop("on", delivered_text_chars=5)
    second = talk.turn("Yes.")
    assert talk.payloads("on") == [text_frame("on", 0, "It is fine."), interrupted_frame("on")]
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", fine)]
    cut = assistant("It is" + INTERRUPTED_MARK)
    talk.assert_sent([user(first)], told, [*told, cut, user(second)])


def test_a_request_that_went_on_and_failed_is_told_as_far_as_it_came(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    one = talk.script(scripts.http_error(500, "no"), "one")
    two = talk.script(scripts.truncated(["It is"]), "two")
    for request_id, result in (("on-1", one), ("on-2", two)):
        talk.result("a", result, request_id)
        assert talk.client.wait_terminal(request_id).payload["outcome"] == "FAILED"
    second = talk.turn("Yes.")
    asked = [user(first), calling(call("a", "weather", OSLO))]
    talk.assert_last_sent(*asked, tool("a", two), assistant("It is" + BROKEN_MARK), user(second))


def test_a_request_that_was_interrupted_before_its_result_came_is_never_posted(
    talk: Talk,
) -> None:
    _, first = talk.call_turn(weather_events())
    talk.stop("on")
    talk.result("a", "fine", "on")
    talk.client.wait_terminal("on")
    second = talk.turn("Yes.")
    assert talk.payloads("on") == [interrupted_frame("on")]
    told = [calling(call("a", "weather", OSLO)), tool("a", "fine")]
    talk.assert_sent([user(first)], [user(first), *told, user(second)])


# Side by side, and one at a time ----------------------------------------------------------------


def test_turns_that_run_side_by_side_are_not_in_each_others_prompts(
    make_talk: MakeTalk,
) -> None:
    talk = make_talk(on_new_request=OnNewRequest.PARALLEL)
    before = talk.turn("Hello.")
    keys = [talk.provider.unique("end") for _ in range(2)]
    texts = [talk.script(scripts.finish_on_release([f"answer {key}"], key)) for key in keys]
    request_ids = [talk.ask(text) for text in texts]
    for text in texts:
        talk.provider.wait_post(script=text)
    third = talk.turn("Third.")
    talk.provider.release(keys[1])
    talk.client.wait_terminal(request_ids[1])
    fourth = talk.turn("Fourth.")
    talk.provider.release(keys[0])
    talk.client.wait_terminal(request_ids[0])
    fifth = talk.turn("Fifth.")

    start = [user(before), assistant("Hello.")]
    one, two = (
        [user(text), assistant(f"answer {key}")] for text, key in zip(texts, keys, strict=True)
    )
    three, four = [user(third), assistant("Third.")], [user(fourth), assistant("Fourth.")]
    first, *side_by_side, after_two, after_all = talk.bodies()
    assert first == talk.body(user(before))
    expected = [talk.body(*start, user(text)) for text in (*texts, third)]
    assert sorted(side_by_side, key=repr) == sorted(expected, key=repr)
    # In the order in which they were asked, not in which they were answered.
    assert after_two == talk.body(*start, *two, *three, user(fourth))
    assert after_all == talk.body(*start, *one, *two, *three, *four, user(fifth))


def test_side_by_side_a_request_waits_for_results_and_others_go_by(make_talk: MakeTalk) -> None:
    talk = make_talk(register={"on_new_request": "parallel"})
    first, second = ask_for_both(talk), rang(talk)
    talk.result("a", "fine", "on")
    third = talk.turn("Yes.")
    assert talk.payloads("on") == []
    talk.result("b", second)
    talk.client.wait_terminal("on")
    fourth = talk.turn("No.")
    assert talk.payloads("on") == [text_frame("on", 0, "It rang."), end_frame("on")]
    told = [user(first), BOTH, tool("a", "fine"), tool("b", second)]
    talk.assert_sent(
        [user(first)],
        [user(first), BOTH, tool("a", "fine"), tool("b", NO_RESULT), user(third)],
        told,  # what came later is not an answer to it
        [*told, assistant("It rang."), user(third), assistant("Yes."), user(fourth)],
    )


def test_side_by_side_two_answers_wait_for_their_own_results(make_talk: MakeTalk) -> None:
    talk = make_talk(on_new_request=OnNewRequest.PARALLEL)
    first, one = ask_for_both(talk), rang(talk)
    talk.result("a", "fine", "on-1")
    _, text = talk.call_turn(
        [
            *scripts.call_events("f", "{}", index=0, call_id="c"),
            *scripts.call_events("g", "{}", index=1, call_id="d"),
        ]
    )
    two = rang(talk)
    talk.result("c", "1", "on-2")
    talk.fence()
    assert talk.payloads("on-2") == []
    talk.result("d", two)
    talk.client.wait_terminal("on-2")
    assert talk.payloads("on-1") == []
    talk.result("b", one)
    talk.client.wait_terminal("on-1")
    asked = [user(first), BOTH, tool("a", "fine")]
    calls = calling(call("c", "f", "{}"), call("d", "g", "{}"))
    talk.assert_sent(
        [user(first)],
        [*asked, tool("b", NO_RESULT), user(text)],
        [*asked, tool("b", NO_RESULT), user(text), calls, tool("c", "1"), tool("d", two)],
        [*asked, tool("b", one)],
    )


def test_side_by_side_an_interrupt_cuts_its_own_answer_and_no_other(make_talk: MakeTalk) -> None:
    talk = make_talk(on_new_request=OnNewRequest.PARALLEL)
    one, first = talk.begin("One.")
    two, second = talk.begin("Two.")
    talk.stop(one)
    third = talk.turn("Yes.")
    talk.stop(two, delivered_text_chars=3)
    fourth = talk.turn("No.")
    cut = [user(first), assistant("One." + INTERRUPTED_MARK)]
    also_cut = [user(second), assistant("Two" + INTERRUPTED_MARK)]
    talk.assert_sent(
        [user(first)],
        [user(second)],
        [*cut, user(third)],
        [*cut, *also_cut, user(third), assistant("Yes."), user(fourth)],
    )


def test_one_at_a_time_a_refused_request_is_not_in_the_conversation(make_talk: MakeTalk) -> None:
    talk = make_talk(on_new_request=OnNewRequest.REJECT)
    key = talk.provider.unique("end")
    first = talk.script(scripts.finish_on_release(["Hello."], key))
    request_id = talk.ask(first)
    talk.wait_text(request_id, "Hello.")
    refused = talk.ask_and_wait("never heard")
    talk.provider.release(key)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    assert talk.payloads(refused)[0]["error_code"] == "SERVER_BUSY"
    talk.assert_sent([user(first)], [user(first), assistant("Hello."), user(second)])


def test_one_at_a_time_a_request_that_waits_for_results_keeps_others_out(
    make_talk: MakeTalk,
) -> None:
    talk = make_talk(on_new_request=OnNewRequest.REJECT)
    first, second = ask_for_both(talk), rang(talk)
    talk.result("a", "fine", "on")
    refused = talk.ask_and_wait("never heard")
    assert talk.payloads(refused)[0]["error_code"] == "SERVER_BUSY"
    talk.result("b", second)
    assert_went_on(talk, "on", first, tool("a", "fine"), tool("b", second))
    third = talk.turn("Yes.")
    told = [user(first), BOTH, tool("a", "fine"), tool("b", second), assistant("It rang.")]
    talk.assert_last_sent(*told, user(third))


def test_one_at_a_time_a_request_that_waits_for_results_makes_way_when_it_is_interrupted(
    make_talk: MakeTalk,
) -> None:
    talk = make_talk(on_new_request=OnNewRequest.REJECT)
    first = ask_for_both(talk)
    talk.result("a", "fine", "on")
    talk.fence()
    text = talk.script(scripts.answer(["Yes."]))
    with talk.client.one_packet():
        talk.client.interrupt("on")
        request_id = talk.ask(text)
    talk.client.wait_terminal(request_id)
    assert talk.payloads("on") == [interrupted_frame("on")]
    assert talk.payloads(request_id) == [text_frame(request_id, 0, "Yes."), end_frame(request_id)]
    told = [BOTH, tool("a", "fine"), tool("b", NO_RESULT), assistant(INTERRUPTED_BEFORE_TEXT)]
    talk.assert_sent([user(first)], [user(first), *told, user(text)])


def test_one_at_a_time_a_result_is_kept_but_may_not_go_on_beside_another_request(
    make_talk: MakeTalk,
) -> None:
    talk = make_talk(on_new_request=OnNewRequest.REJECT)
    _, first = talk.call_turn(weather_events())
    live, text = talk.begin("Once upon")
    talk.result("a", "fine", "on")
    refusal = talk.client.wait_terminal("on").payload
    assert (refusal["error_code"], refusal["retryable"]) == ("SERVER_BUSY", True)
    talk.stop(live)
    second = talk.turn("Yes.")
    asked = [user(first), calling(call("a", "weather", OSLO))]
    later = [user(text), assistant("Once upon" + INTERRUPTED_MARK), user(second)]
    talk.assert_sent(
        [user(first)],
        [*asked, tool("a", NO_RESULT), user(text)],
        [*asked, tool("a", "fine"), *later],
    )


# Bounds -----------------------------------------------------------------------------------------


def test_over_the_bound_on_messages_the_oldest_turns_go_first(make_talk: MakeTalk) -> None:
    talk = make_talk(history_messages=4)
    texts = [talk.turn(f"answer {number}") for number in range(5)]
    turns = [[user(text), assistant(f"answer {number}")] for number, text in enumerate(texts)]
    talk.assert_sent(
        [user(texts[0])],
        [*turns[0], user(texts[1])],
        [*turns[0], *turns[1], user(texts[2])],
        [*turns[1], *turns[2], user(texts[3])],
        [*turns[2], *turns[3], user(texts[4])],
    )


def test_a_bound_that_is_odd_does_not_cut_a_turn_in_half(make_talk: MakeTalk) -> None:
    talk = make_talk(history_messages=3)
    first, second, third = talk.turn("1"), talk.turn("2"), talk.turn("3")
    talk.assert_sent(
        [user(first)],
        [user(first), assistant("1"), user(second)],
        [user(second), assistant("2"), user(third)],
    )


def test_over_the_bound_on_characters_the_oldest_turns_go_first(make_talk: MakeTalk) -> None:
    talk = make_talk(history_chars=3_000)
    first = talk.turn("x" * 1_400)
    second = talk.turn("😀" * 1_400)  # 5,600 bytes
    third = talk.turn("y" * 200)
    fourth = talk.turn("z" * 2_900)
    fifth = talk.turn("none")
    turns = [
        [user(first), assistant("x" * 1_400)],
        [user(second), assistant("😀" * 1_400)],
        [user(third), assistant("y" * 200)],
        [user(fourth), assistant("z" * 2_900)],
    ]
    assert all(len(text) < 50 for text in (first, second, third, fourth, fifth))
    talk.assert_sent(
        [user(first)],
        [*turns[0], user(second)],
        [*turns[0], *turns[1], user(third)],
        [*turns[1], *turns[2], user(fourth)],
        [*turns[3], user(fifth)],
    )


@pytest.mark.parametrize("room", [0, -1], ids=["just_enough", "one_too_few"])
def test_user_texts_answers_calls_and_results_count_by_the_character(
    make_talk: MakeTalk, provider: ProviderProcess, room: int
) -> None:
    first = provider.fresh(scripts.call_answer(weather_events(), ["Hm 😀"]))
    kept = len(first) + len("Hm 😀") + len("weather") + len(OSLO) + len("grey 灰")
    talk = make_talk(history_chars=kept + room)
    talk.ask_and_wait(first)
    talk.result("a", "grey 灰")
    second = talk.turn("Yes.")
    told = [
        user(first),
        calling(call("a", "weather", OSLO), text="Hm 😀"),
        tool("a", "grey 灰"),
    ]
    talk.assert_last_sent(*(told if room == 0 else []), user(second))


@pytest.mark.parametrize("room", [0, -1], ids=["just_enough", "one_too_few"])
def test_every_message_of_a_turn_counts(make_talk: MakeTalk, room: int) -> None:
    talk = make_talk(history_messages=7 + room)
    first = ask_for_both(talk)  # four messages: it, both calls, two stand-ins
    empty = talk.script(scripts.answer([]))
    talk.ask_and_wait(empty)  # one
    unheard = talk.script(scripts.no_headers())
    request_id = talk.ask(unheard)
    talk.provider.wait_post(script=unheard)
    talk.stop(request_id)  # two
    last = talk.turn("Yes.")
    oldest = [user(first), BOTH, tool("a", NO_RESULT), tool("b", NO_RESULT)]
    rest = [user(empty), user(unheard), assistant(INTERRUPTED_BEFORE_TEXT), user(last)]
    talk.assert_last_sent(*(oldest if room == 0 else []), *rest)


@pytest.mark.parametrize("bound", ["history_messages", "history_chars"])
def test_with_a_bound_of_nothing_each_turn_stands_alone(make_talk: MakeTalk, bound: str) -> None:
    talk = make_talk(**{bound: 0}, register={"system_prompt": PERSONA})
    first, second = talk.turn("1"), talk.turn("2")
    system = {"role": "system", "content": "You are a nurse.\n\nBe brief."}
    talk.assert_sent([system, user(first)], [system, user(second)])


def test_a_call_and_its_result_are_forgotten_together(make_talk: MakeTalk) -> None:
    talk = make_talk(history_messages=5)
    _, first = talk.call_turn(weather_events())  # three messages
    talk.result("a", "fine")
    second = talk.turn("2")
    third = talk.turn("3")
    fourth = talk.turn("4")
    talk.result("a", "too late")
    assert "'a'" in talk.wait_error()["error_detail"]
    talk.assert_sent(
        [user(first)],
        [user(first), calling(call("a", "weather", OSLO)), tool("a", "fine"), user(second)],
        [
            user(first),
            calling(call("a", "weather", OSLO)),
            tool("a", "fine"),
            user(second),
            assistant("2"),
            user(third),
        ],
        [user(second), assistant("2"), user(third), assistant("3"), user(fourth)],
    )


def test_what_went_on_from_a_call_is_forgotten_with_it(make_talk: MakeTalk) -> None:
    talk = make_talk(history_messages=5)
    _, first = talk.call_turn(weather_events())
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")  # four messages
    second = talk.turn("2")
    third = talk.turn("3")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", fine)]
    talk.assert_sent(
        [user(first)],
        told,
        [*told, assistant("It is fine."), user(second)],
        [user(second), assistant("2"), user(third)],
    )


def test_a_late_result_counts_and_may_push_its_turn_out(make_talk: MakeTalk) -> None:
    talk = make_talk(history_chars=1_000)
    _, first = talk.call_turn(weather_events())
    second = talk.turn("2")
    talk.result("a", "x" * 1_000)
    third = talk.turn("3")
    told = [calling(call("a", "weather", OSLO)), tool("a", NO_RESULT)]
    talk.assert_sent(
        [user(first)],
        [user(first), *told, user(second)],
        [user(second), assistant("2"), user(third)],
    )


def test_the_model_is_told_once_of_a_result_over_the_bound(make_talk: MakeTalk) -> None:
    talk = make_talk(history_chars=1_000)
    _, first = talk.call_turn(weather_events())
    long = talk.script(scripts.answer(["It is fine."]), "x" * 1_000)
    talk.result("a", long, "on")
    talk.client.wait_terminal("on")
    second = talk.turn("2")
    assert talk.payloads("on") == [text_frame("on", 0, "It is fine."), end_frame("on")]
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", long)]
    talk.assert_sent([user(first)], told, [user(second)])


@pytest.mark.parametrize("over", ["result", "end", "others"])
def test_what_waits_for_results_keeps_its_question_whatever_the_bounds(
    make_talk: MakeTalk, over: str
) -> None:
    bounds = {"history_chars": 200} if over == "result" else {"history_messages": 4}
    talk = make_talk(on_new_request=OnNewRequest.PARALLEL, **bounds)
    between: list[Wire] = []
    if over == "end":  # the answer is too much only when it ends
        key = talk.provider.unique("done")
        events = [*weather_events(), *RING]
        first = talk.script(scripts.calls_before_release(events, key, ["Hm."]))
        request_id = talk.ask(first)
        assert [talk.wait_call()["call_id"] for _ in "ab"] == ["a", "b"]
        told = calling(*BOTH["tool_calls"], text="Hm.")
    else:
        first, told = ask_for_both(talk), BOTH
    talk.result("a", "fine", "on")
    if over == "end":
        talk.fence()
        talk.provider.release(key)
        talk.client.wait_terminal(request_id)
    elif over == "others":
        between = [user(talk.turn("Yes.")), assistant("Yes.")]
        talk.turn("No.")
    prefix = "x" * 200 if over == "result" else "rang"
    last = talk.script(scripts.answer(["It rang."]), prefix)
    talk.result("b", last)
    talk.client.wait_terminal("on")
    assert talk.payloads("on") == [text_frame("on", 0, "It rang."), end_frame("on")]
    talk.assert_last_sent(user(first), told, tool("a", "fine"), tool("b", last))
    assert talk.bodies()[0] == talk.body(user(first))
    assert bool(between) == (over == "others")


def test_an_answer_that_alone_is_over_the_bound_is_not_told(make_talk: MakeTalk) -> None:
    talk = make_talk(history_chars=100)
    first = talk.turn("1")
    second = talk.turn("x" * 101)
    third = talk.turn("3")
    talk.assert_sent([user(first)], [user(first), assistant("1"), user(second)], [user(third)])


# Going on, at odd moments -------------------------------------------------------------------------


def test_a_result_that_is_given_again_leaves_the_answer_that_followed_it(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    talk.result("a", "grey by now")
    second = talk.turn("Yes.")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", "grey by now")]
    talk.assert_last_sent(*told, assistant("It is fine."), user(second))


def test_a_request_that_waits_for_results_can_be_interrupted_and_they_come_late(talk: Talk) -> None:
    first = ask_for_both(talk)
    talk.result("a", "fine", "on")
    talk.stop("on")
    talk.client.wait_terminal("on")
    talk.result("b", "late")
    second = talk.turn("Yes.")
    told = [BOTH, tool("a", "fine"), tool("b", "late"), assistant(INTERRUPTED_BEFORE_TEXT)]
    talk.assert_last_sent(user(first), *told, user(second))


def test_what_waits_for_an_answer_that_runs_can_be_stopped(talk: Talk) -> None:
    request_id, first, key = hold_calls(talk)
    talk.result("a", "fine", "on")
    talk.stop("on")
    talk.client.wait_terminal("on")
    talk.provider.release(key)
    talk.client.wait_terminal(request_id)
    second = talk.turn("Yes.")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", "fine")]
    talk.assert_last_sent(*told, assistant(INTERRUPTED_BEFORE_TEXT), user(second))


def test_a_chain_keeps_its_question(make_talk: MakeTalk) -> None:
    talk = make_talk(on_new_request=OnNewRequest.PARALLEL, history_messages=7)
    _, first = talk.call_turn(weather_events())
    more = talk.script(
        scripts.call_answer(
            [
                *scripts.call_events("f", "{}", index=0, call_id="c"),
                *scripts.call_events("g", "{}", index=1, call_id="d"),
            ]
        ),
        "more",
    )
    talk.result("a", more, "on-1")
    talk.client.wait_terminal("on-1")
    talk.result("c", "1", "on-2")
    for _ in range(3):
        talk.turn("Yes.")
    last = rang(talk)
    talk.result("d", last)
    talk.client.wait_terminal("on-2")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", more)]
    calls = calling(call("c", "f", "{}"), call("d", "g", "{}"))
    talk.assert_last_sent(*told, calls, tool("c", "1"), tool("d", last))


def test_a_chain_over_the_bound_keeps_its_question(make_talk: MakeTalk) -> None:
    talk = make_talk(history_messages=4)
    _, first = talk.call_turn(weather_events())
    key = talk.provider.unique("done")
    events = scripts.call_events("f", "{}", index=0, call_id="c")
    more = talk.script(scripts.calls_before_release(events, key), "more")
    talk.result("a", more, "on-1")
    assert talk.wait_call()["call_id"] == "c"
    last = rang(talk)
    talk.result("c", last, "on-2")
    talk.fence()
    talk.provider.release(key)
    talk.client.wait_terminal("on-2")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", more)]
    calls = calling(call("c", "f", "{}"))
    talk.assert_last_sent(*told, calls, tool("c", last))


def test_a_late_second_result_after_an_interrupt_with_the_same_id_is_not_lost(talk: Talk) -> None:
    ask_for_both(talk)
    talk.result("a", "fine", "on")
    talk.stop("on")
    talk.client.wait_terminal("on")
    talk.result("b", "late", "on")
    assert "request_id" not in talk.wait_error()
    talk.turn("Yes.")
    assert talk.bodies()[-1]["messages"][3] == tool("b", "late")


def test_an_interrupt_for_all_cuts_what_was_answered_last(talk: Talk) -> None:
    _, first = talk.call_turn(weather_events())
    second = talk.turn("Yes.")
    fine = talk.script(scripts.answer(["It is fine."]), "fine")
    talk.result("a", fine, "on")
    talk.client.wait_terminal("on")
    talk.stop(None, delivered_text_chars=2)
    third = talk.turn("No.")
    told = [user(first), calling(call("a", "weather", OSLO)), tool("a", fine)]
    cut = assistant("It" + INTERRUPTED_MARK)
    talk.assert_last_sent(*told, cut, user(second), assistant("Yes."), user(third))


def test_two_that_go_on_from_one_answer_are_told_in_their_order(talk: Talk) -> None:
    talk.call_turn(weather_events())
    for number, answer in ((1, "It is fine."), (2, "It rains.")):
        text = talk.script(scripts.answer([answer]))
        talk.result("a", text, f"on-{number}")
        talk.client.wait_terminal(f"on-{number}")
    talk.turn("Yes.")
    said = [one["content"] for one in talk.bodies()[-1]["messages"] if one["role"] == "assistant"]
    assert said == [None, "It is fine.", "It rains."]
