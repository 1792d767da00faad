"""What the model is told of earlier turns, however they ended, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.session.history import (
    BROKEN_MARK,
    INTERRUPTED_BEFORE_TEXT,
    INTERRUPTED_MARK,
    NO_RESULT,
    Call,
    Ending,
    History,
    Turn,
)
from llm.chat.completions import Message, ToolCall

PLENTY = 1_000_000


def history(max_messages: int = PLENTY, max_chars: int = PLENTY) -> History:
    return History(max_messages, max_chars)


def add(
    history: History,
    request_id: str,
    user_text: str | None = "question",
    text: str = "answer",
    ending: Ending = Ending.COMPLETED,
    calls: Sequence[ToolCall] = (),
) -> Turn:
    """A turn from its beginning to its end."""
    turn = history.begin(request_id, user_text)
    for call in calls:
        history.add_call(turn, call)
    history.end(turn, text, ending)
    return turn


def tool_call(call_id: str = "c1") -> ToolCall:
    """A call that counts 5 code points."""
    return ToolCall(call_id, "fun", "{}")


def told(history: History) -> list[Message]:
    """What a next turn would be sent of the earlier ones."""
    return history.messages(Turn("next", None))


def called(*call_ids: str, content: str | None = None) -> Message:
    return Message("assistant", content, tuple(map(tool_call, call_ids)))


def result(call_id: str, content: str = NO_RESULT) -> Message:
    return Message("tool", content, tool_call_id=call_id)


# What a turn gives.


def test_the_first_turn_is_sent_what_the_user_said() -> None:
    first = history()
    assert first.messages(first.begin("r1", "Hello")) == [Message("user", "Hello")]


def test_a_later_turn_is_sent_what_came_before() -> None:
    conversation = history()
    add(conversation, "r1", "Hello", "Hi")
    assert conversation.messages(conversation.begin("r2", "And?")) == [
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", "And?"),
    ]


@pytest.mark.parametrize(
    ("text", "ending", "content"),
    [
        ("Once", Ending.COMPLETED, "Once"),
        ("Once", Ending.INTERRUPTED, "Once [interrupted by the user]"),
        ("", Ending.INTERRUPTED, "[interrupted by the user before the answer began]"),
        ("Once", Ending.BROKEN, "Once [the answer broke off here]"),
    ],
)
def test_an_answer_is_told_with_how_it_ended(text: str, ending: Ending, content: str) -> None:
    conversation = history()
    add(conversation, "r1", "Tell me", text, ending)
    assert told(conversation) == [Message("user", "Tell me"), Message("assistant", content)]


def test_an_empty_answer_is_no_message() -> None:
    conversation = history()
    add(conversation, "r1", "Hello", "")
    assert told(conversation) == [Message("user", "Hello")]


def test_a_turn_that_broke_before_anything_came_is_forgotten() -> None:
    conversation = history()
    add(conversation, "r1", "Hello", "", Ending.BROKEN)
    assert told(conversation) == []
    assert not conversation.trim("r1", 0)


def test_a_turn_without_anything_to_tell_is_forgotten() -> None:
    conversation = history()
    add(conversation, "r1")
    add(conversation, "r2", None, "")
    assert not conversation.trim("r2", 0)


@pytest.mark.parametrize("ending", Ending)
def test_calls_without_text_have_no_content_and_no_mark(ending: Ending) -> None:
    conversation = history()
    add(conversation, "r1", "Go", "", ending, [tool_call("c1"), tool_call("c2")])
    assert told(conversation) == [
        Message("user", "Go"),
        called("c1", "c2"),
        result("c1"),
        result("c2"),
    ]


def test_calls_go_with_the_text_of_their_answer() -> None:
    conversation = history()
    add(conversation, "r1", "Go", "Wait", Ending.INTERRUPTED, [tool_call("c1")])
    assert told(conversation) == [
        Message("user", "Go"),
        called("c1", content="Wait" + INTERRUPTED_MARK),
        result("c1"),
    ]


def test_a_turn_that_goes_on_after_results_has_no_user_message() -> None:
    conversation = history()
    add(conversation, "r1", "Go", "", calls=[tool_call("c1")])
    going_on = conversation.begin("r2", None)
    so_far = [Message("user", "Go"), called("c1"), result("c1")]
    assert conversation.messages(going_on) == so_far
    conversation.end(going_on, "Done", Ending.COMPLETED)
    assert told(conversation) == [*so_far, Message("assistant", "Done")]


# Turns side by side.


def test_a_turn_that_runs_is_not_told_to_others() -> None:
    conversation = history()
    first = conversation.begin("r1", "one")
    second = conversation.begin("r2", "two")
    assert conversation.messages(first) == [Message("user", "one")]
    assert conversation.messages(second) == [Message("user", "two")]


def test_a_turn_is_not_told_of_later_ones() -> None:
    conversation = history()
    first = conversation.begin("r1", "one")
    add(conversation, "r2", "two", "2")
    assert conversation.messages(first) == [Message("user", "one")]


def test_turns_are_told_in_the_order_of_their_beginnings() -> None:
    conversation = history()
    first = conversation.begin("r1", "one")
    second = conversation.begin("r2", "two")
    conversation.end(second, "2", Ending.COMPLETED)
    conversation.end(first, "1", Ending.COMPLETED)
    contents = [message.content for message in told(conversation)]
    assert contents == ["one", "1", "two", "2"]


# Results.


def test_a_result_takes_the_place_of_its_stand_in() -> None:
    conversation = history()
    turn = add(conversation, "r1", "Go", "", calls=[tool_call("c1"), tool_call("c2")])
    conversation.set_result(turn.calls[1], '{"ok":1}')
    assert told(conversation)[2:] == [result("c1"), result("c2", '{"ok":1}')]


def test_an_empty_result_is_a_result() -> None:
    conversation = history()
    turn = add(conversation, "r1", "Go", "", calls=[tool_call("c1")])
    conversation.set_result(turn.calls[0], "")
    assert told(conversation)[2:] == [result("c1", "")]
    assert turn.is_resolved


def test_a_turn_is_resolved_when_every_call_has_its_result() -> None:
    conversation = history()
    turn = conversation.begin("r1", "Go")
    assert turn.is_resolved
    conversation.add_call(turn, tool_call("c1"))
    conversation.add_call(turn, tool_call("c2"))
    assert not turn.is_resolved
    conversation.set_result(turn.calls[0], "1")
    assert not turn.is_resolved
    conversation.set_result(turn.calls[1], "null")
    assert turn.is_resolved


def test_the_newest_call_with_an_id_is_found() -> None:
    conversation = history()
    add(conversation, "r1", calls=[tool_call("c1"), tool_call("c2")])
    newer = add(conversation, "r2", calls=[tool_call("c1"), tool_call("c1")])
    add(conversation, "r3")
    assert conversation.find_call("c3") is None
    found = conversation.find_call("c1")
    assert found is not None
    assert found[0] is newer
    assert found[1] is newer.calls[1]


def test_a_call_of_a_turn_that_runs_is_found() -> None:
    conversation = history()
    turn = conversation.begin("r1", "Go")
    conversation.add_call(turn, tool_call("c1"))
    assert conversation.find_call("c1") == (turn, Call(tool_call("c1")))


# Trimming.


def test_an_answer_is_cut_to_what_the_user_got() -> None:
    conversation = history()
    add(conversation, "r1", "Hello", "a😀b")
    add(conversation, "r2", "And?", "Later")
    assert conversation.trim("r1", 2)
    assert [message.content for message in told(conversation)] == [
        "Hello",
        "a😀" + INTERRUPTED_MARK,
        "And?",
        "Later",
    ]


def test_an_answer_of_which_the_user_got_nothing_is_told_as_that() -> None:
    conversation = history()
    add(conversation, "r1", "Hello", "Hi")
    assert conversation.trim("r1", 0)
    assert told(conversation)[1:] == [Message("assistant", INTERRUPTED_BEFORE_TEXT)]


@pytest.mark.parametrize("ending", Ending)
@pytest.mark.parametrize("chars", [5, 6])
def test_nothing_changes_where_the_user_got_all(ending: Ending, chars: int) -> None:
    conversation = history()
    turn = add(conversation, "r1", "Hello", "Hi 😀!", ending)
    assert conversation.trim("r1", chars)
    assert (turn.text, turn.ending) == ("Hi 😀!", ending)


def test_an_interrupted_answer_is_cut_further() -> None:
    conversation = history()
    add(conversation, "r1", "Hello", "Once upon", Ending.INTERRUPTED)
    assert conversation.trim("r1", 4)
    assert told(conversation)[1:] == [Message("assistant", "Once" + INTERRUPTED_MARK)]


def test_a_broken_answer_that_is_cut_was_interrupted() -> None:
    conversation = history()
    add(conversation, "r1", "Hello", "Once upon", Ending.BROKEN)
    assert told(conversation)[1:] == [Message("assistant", "Once upon" + BROKEN_MARK)]
    assert conversation.trim("r1", 4)
    assert told(conversation)[1:] == [Message("assistant", "Once" + INTERRUPTED_MARK)]


def test_only_an_ended_turn_that_is_there_is_cut() -> None:
    conversation = history()
    running = conversation.begin("r1", "Hello")
    running.text = "Hi"
    assert not conversation.trim("r1", 0)
    assert running.text == "Hi"
    assert not conversation.trim("r2", 0)


# Bounds.


def test_the_oldest_turns_go_when_there_are_too_many_messages() -> None:
    conversation = history(max_messages=4)
    for number in "123":
        add(conversation, number, "q" + number, "a" + number)
    assert [message.content for message in told(conversation)] == ["q2", "a2", "q3", "a3"]


def test_a_turn_goes_whole() -> None:
    conversation = history(max_messages=5)
    add(conversation, "r1", "q1", "", calls=[tool_call("c1"), tool_call("c2")])
    assert len(told(conversation)) == 4
    add(conversation, "r2", "q2", "a2")
    assert [message.content for message in told(conversation)] == ["q2", "a2"]
    assert conversation.find_call("c1") is None


def test_the_oldest_turns_go_when_there_are_too_many_chars() -> None:
    conversation = history(max_chars=8)
    for number in "123":
        add(conversation, number, "😀" + number, "é" + number)
    assert [message.content for message in told(conversation)] == ["😀2", "é2", "😀3", "é3"]


@pytest.mark.parametrize(
    ("calls", "text", "chars"),
    [([], "answer", 7), ([tool_call()], "", 6), ([tool_call("longer id")], "answer", 12)],
)
def test_user_texts_answers_names_and_arguments_count_but_marks_do_not(
    calls: list[ToolCall], text: str, chars: int
) -> None:
    for limit, kept in [(chars, True), (chars - 1, False)]:
        conversation = history(max_chars=limit)
        add(conversation, "r1", "q", text, Ending.INTERRUPTED, calls)
        assert bool(told(conversation)) is kept


def test_a_late_result_counts_too() -> None:
    conversation = history(max_chars=16)
    add(conversation, "r1", "q", "a")
    turn = add(conversation, "r2", "q", "", calls=[tool_call()])
    conversation.set_result(turn.calls[0], "12345678")
    assert len(told(conversation)) == 5
    conversation.set_result(turn.calls[0], "123456789")
    assert told(conversation) == [Message("user", "q"), called("c1"), result("c1", "123456789")]
    conversation.set_result(turn.calls[0], "12345678901")
    assert told(conversation) == []


def test_a_result_for_a_turn_that_was_forgotten_changes_nothing() -> None:
    conversation = history(max_messages=3)
    forgotten = add(conversation, "r1", "q", "", calls=[tool_call()])
    add(conversation, "r2")
    before = told(conversation)
    conversation.set_result(forgotten.calls[0], "1")
    assert told(conversation) == before


def test_nothing_is_forgotten_within_the_bounds() -> None:
    conversation = history(max_messages=200)
    for number in range(100):
        add(conversation, f"r{number}", str(number))
    asked = [message.content for message in told(conversation) if message.role == "user"]
    assert asked == [str(number) for number in range(100)]


def test_a_turn_that_runs_is_not_counted() -> None:
    conversation = history(max_messages=2, max_chars=8)
    older = conversation.begin("r1", "q1")
    conversation.begin("r2", "a very long question")
    conversation.end(older, "a1", Ending.COMPLETED)
    assert [message.content for message in told(conversation)] == ["q1", "a1"]


def test_a_turn_that_runs_is_not_forgotten() -> None:
    conversation = history(max_messages=2, max_chars=8)
    running = conversation.begin("r1", "a very long question")
    conversation.add_call(running, tool_call("c1"))
    add(conversation, "r2", "q2", "a2")
    add(conversation, "r3", "q3", "a3")
    assert [message.content for message in told(conversation)] == ["q3", "a3"]
    assert conversation.find_call("c1") is not None
    conversation.end(running, "", Ending.COMPLETED)
    assert conversation.find_call("c1") is None
    assert [message.content for message in told(conversation)] == ["q3", "a3"]


def test_an_older_turn_that_ends_late_is_the_first_to_go() -> None:
    conversation = history(max_messages=4)
    late = conversation.begin("r1", "q1")
    add(conversation, "r2", "q2", "a2")
    conversation.end(late, "", Ending.COMPLETED)
    assert len(told(conversation)) == 3
    add(conversation, "r3", "q3", "a3")
    assert [message.content for message in told(conversation)] == ["q2", "a2", "q3", "a3"]


def test_even_the_newest_turn_goes_when_it_alone_is_too_much() -> None:
    conversation = history(max_chars=10)
    add(conversation, "r1", "q1", "a1")
    add(conversation, "r2", "q2", "a long answer")
    assert told(conversation) == []


def test_what_goes_on_after_results_goes_with_its_question() -> None:
    conversation = history(max_messages=6)
    add(conversation, "r1", "q1", "", calls=[tool_call()])
    add(conversation, "r2", None, "a1")
    add(conversation, "r3", "q2", "a2")
    assert len(told(conversation)) == 6
    add(conversation, "r4", "q3", "")
    assert [message.content for message in told(conversation)] == ["q2", "a2", "q3"]


@pytest.mark.parametrize(("max_messages", "max_chars"), [(0, PLENTY), (PLENTY, 0)])
def test_without_room_no_history_is_kept(max_messages: int, max_chars: int) -> None:
    conversation = history(max_messages, max_chars)
    add(conversation, "r1", "", "", Ending.INTERRUPTED)
    turn = conversation.begin("r2", "q")
    assert conversation.messages(turn) == [Message("user", "q")]
    conversation.end(turn, "a", Ending.COMPLETED)
    assert told(conversation) == []
    assert not conversation.trim("r2", 0)


# Any sequence of operations.


def chars_of(messages: list[Message]) -> int:
    """Code points that count: everything but marks and stand-ins."""
    total = 0
    for message in messages:
        content = message.content or ""
        if content not in (NO_RESULT, INTERRUPTED_BEFORE_TEXT):
            total += len(content.removesuffix(INTERRUPTED_MARK).removesuffix(BROKEN_MARK))
        total += sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return total


def assert_provider_takes(messages: list[Message]) -> None:
    """Every call has its result at once and in order, and no result comes without its call."""
    awaited: list[str] = []
    for message in messages:
        if message.role == "tool":
            assert message.tool_call_id == awaited.pop(0)
            assert message.content is not None
            continue
        assert not awaited
        if message.role == "assistant":
            assert message.content or message.tool_calls
            awaited = [call.id for call in message.tool_calls]
        else:
            assert message.content is not None
            assert not message.tool_calls
    assert not awaited


class Play:
    """Plays operations on a history; those that nobody would ask for are left out."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.running: list[Turn] = []
        self.calls: list[Call] = []
        self._begun = 0
        self._called = 0

    def begin(self, question: bool) -> None:
        self._begun += 1
        found = self.calls and self.history.find_call(self.calls[-1].call.id)
        continues = found[0] if found and not question else None
        user_text = str(self._begun) if continues is None else None
        self.running.append(self.history.begin(f"r{self._begun}", user_text, continues))

    def call(self, which: int) -> None:
        if self.running:
            turn = self.running[which % len(self.running)]
            self._called += 1
            self.history.add_call(turn, tool_call(f"c{self._called}"))
            self.calls.append(turn.calls[-1])

    def end(self, which: int, chars: int, ending: Ending) -> None:
        if self.running:
            turn = self.running.pop(which % len(self.running))
            self.history.end(turn, "x" * chars, ending)

    def trim(self, which: int, chars: int) -> None:
        self.history.trim(f"r{which}", chars)

    def result(self, which: int, chars: int) -> None:
        if self.calls:
            self.history.set_result(self.calls[which % len(self.calls)], "y" * chars)


WHICH = st.integers(0, 20)
CHARS = st.integers(0, 8)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just(Play.begin), st.sampled_from([True, True, False])),
        st.tuples(st.just(Play.call), WHICH),
        st.tuples(st.just(Play.end), WHICH, CHARS, st.sampled_from(Ending)),
        st.tuples(st.just(Play.trim), WHICH, CHARS),
        st.tuples(st.just(Play.result), WHICH, CHARS),
    ),
    max_size=40,
)


@given(OPERATIONS, st.integers(0, 12), st.integers(0, 60))
@settings(max_examples=200, deadline=None, database=None)
def test_whatever_happens_the_provider_takes_it(
    operations: list[tuple[Any, ...]], max_messages: int, max_chars: int
) -> None:
    play = Play(history(max_messages, max_chars))
    for operation, *arguments in operations:
        operation(play, *arguments)
        messages = told(play.history)
        assert_provider_takes(messages)
        if not any(turn.continues for turn in play.running):  # else something is held
            assert len(messages) <= max_messages
            assert chars_of(messages) <= max_chars
        assert not messages or messages[0].role == "user"
        asked = [int(message.content or 0) for message in messages if message.role == "user"]
        assert asked == sorted(set(asked))
        for turn in play.running:
            own = [] if turn.user_text is None else [Message("user", turn.user_text)]
            prompt = play.history.messages(turn)
            assert_provider_takes(prompt)
            earlier = prompt[: len(prompt) - len(own)]
            assert earlier == messages[: len(earlier)]
            assert prompt[len(earlier) :] == own
            assert turn.user_text is None or int(turn.user_text) not in asked


# Turns that go on from others --------------------------------------------------------------------


def test_a_turn_that_is_held_is_not_forgotten_before_it_is_released() -> None:
    history = History(2, 1000)
    first = history.begin("1", "one")
    history.end(first, "first", Ending.COMPLETED)
    history.hold(first)
    second = history.begin("2", "two")
    history.end(second, "second", Ending.COMPLETED)
    third = history.begin("3", "three")
    told = [message.content for message in history.messages(third)]
    assert told == ["one", "first", "two", "second", "three"]
    history.release(first)
    assert [message.content for message in history.messages(third)] == ["two", "second", "three"]


def test_what_went_on_from_a_turn_that_is_held_stays_with_it() -> None:
    history = History(100, 1000)
    first = history.begin("1", "one")
    history.add_call(first, ToolCall("a", "look", "{}"))
    history.end(first, "", Ending.COMPLETED)
    going_on = history.begin("2", None, first)
    history.end(going_on, "found", Ending.COMPLETED)
    found = history.find_call("a")
    assert found is not None
    history.hold(first)
    history.set_result(found[1], "late")
    history.release(first)
    last = history.begin("3", "three")
    assert [message.content for message in history.messages(last)] == [
        "one",
        None,
        "late",
        "found",
        "three",
    ]


def test_a_turn_is_held_by_what_goes_on_from_it_and_told_right_before_it() -> None:
    history = History(0, 0)
    first = history.begin("1", "one")
    history.add_call(first, ToolCall("a", "look", "{}"))
    going_on = history.begin("2", None, first)
    other = history.begin("3", "other")
    history.end(other, "answer", Ending.COMPLETED)
    history.end(first, "", Ending.COMPLETED)
    assert [message.role for message in history.messages(going_on)] == ["user", "assistant", "tool"]
    history.end(going_on, "found", Ending.COMPLETED)
    assert history.messages(history.begin("4", "four")) == [Message("user", "four")]
    assert history.find_call("a") is None
