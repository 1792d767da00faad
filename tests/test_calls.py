"""Function calls, put together from pieces as providers really send them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pytest

from llm.chat.calls import MAX_CALL_BYTES, MAX_CALLS, MAX_ID_CHARS, CallAssembler
from llm.chat.completions import CallPiece, ToolCall
from llm.errors import MalformedCallError, StreamError

OWN_ID = re.compile(r"call_[0-9a-f]{24}\Z")


def piece(
    index: int | None = None, call_id: str = "", name: str = "", arguments: str = ""
) -> CallPiece:
    return CallPiece(index, call_id, name, arguments)


def assembled(*pieces: CallPiece) -> list[ToolCall]:
    assembler = CallAssembler()
    for one in pieces:
        assembler.add([one])
    return assembler.finish()


def ids_of(calls: Sequence[ToolCall]) -> list[str]:
    return [call.id for call in calls]


F = ToolCall("a", "f", '{"x":1}')
G = ToolCall("b", "g", '{"y":2}')


def test_without_pieces_there_are_no_calls() -> None:
    assert assembled() == []


def test_all_pieces_may_come_in_one_delta() -> None:
    assembler = CallAssembler()
    assembler.add((piece(0, "a", "f", '{"x"'), piece(0, arguments=":1}"), piece(1, "b", "g")))
    assert assembler.finish() == [F, ToolCall("b", "g", "{}")]


def test_arguments_may_come_one_character_at_a_time() -> None:
    text = '{"city": "København 你好 😀", "n": [1, 2.50, null]}'
    pieces = [piece(0, "a", "f"), *(piece(0, arguments=character) for character in text)]
    assert assembled(*pieces) == [ToolCall("a", "f", text)]


def test_the_text_of_the_arguments_is_not_touched() -> None:
    text = ' { "x" : 1.0e2 , "x" : 12345678901234567890123 } \n'
    assert assembled(piece(0, "a", "f", text)) == [ToolCall("a", "f", text)]


# Which piece belongs to which call --------------------------------------------------------------


def test_the_first_name_and_id_stand() -> None:
    later = [
        piece(0, "", "", '{"x"'),
        piece(0, "other", "another", ":"),
        piece(0, "", "third", "1"),
        piece(0, "fourth", "", "}"),
    ]
    assert assembled(piece(0, "a", "f"), *later) == [F]


def test_a_name_and_an_id_that_come_late_still_count() -> None:
    pieces = [piece(0, arguments="{"), piece(0, name="f"), piece(0, "a"), piece(0, "b", "g", "}")]
    assert assembled(*pieces) == [ToolCall("a", "f", "{}")]


def test_calls_that_come_at_the_same_time_are_told_apart_by_index() -> None:
    pieces = [
        piece(0, "a", "f"),
        piece(1, "b", "g"),
        piece(1, arguments='{"y"'),
        piece(0, arguments='{"x"'),
        piece(1, arguments=":2}"),
        piece(0, arguments=":1}"),
    ]
    assert assembled(*pieces) == [F, G]


@pytest.mark.parametrize("indexes", list(itertools.permutations([0, 1, 7])))
def test_calls_come_in_the_order_in_which_their_indexes_appeared(indexes: Sequence[int]) -> None:
    pieces = [piece(index, f"id{index}", "f") for index in indexes]
    pieces += [piece(index, arguments="{}") for index in (0, 1, 7)]
    assert ids_of(assembled(*pieces)) == [f"id{index}" for index in indexes]


def test_without_an_index_a_new_id_begins_a_call_and_the_rest_belongs_to_the_last_one() -> None:
    pieces = [
        piece(None, "a", "f", '{"x"'),
        piece(None, "a", "f", ":"),
        piece(None, "", "", "1}"),
        piece(None, "b", "g", '{"y"'),
        piece(None, "", "", ":2"),
        piece(None, "b", "", "}"),
    ]
    assert assembled(*pieces) == [F, G]


def test_without_an_index_and_without_an_id_all_is_one_call() -> None:
    [call] = assembled(piece(name="f", arguments='{"x"'), piece(name="f", arguments=":1}"))
    assert (call.name, call.arguments) == ("f", '{"x":1}')


def test_without_an_index_the_first_id_after_a_call_that_has_none_begins_a_call() -> None:
    first, second = assembled(piece(name="f", arguments='{"x":1}'), piece(None, "b", "g"))
    assert (first.name, second) == ("f", ToolCall("b", "g", "{}"))


def test_without_an_index_an_id_that_is_known_names_its_call() -> None:
    pieces = [
        piece(None, "a", "f", '{"x"'),
        piece(None, "b", "g", '{"y"'),
        piece(None, "a", "", ":1"),
        piece(None, "", "", "}"),
        piece(None, "b", "", ":2}"),
    ]
    assert assembled(*pieces) == [F, G]


def test_a_piece_without_an_index_belongs_to_the_last_call_with_one() -> None:
    pieces = [
        piece(0, "a", "f", '{"x"'),
        piece(1, "b", "g", '{"y":2}'),
        piece(0, arguments=":"),
        piece(arguments="1}"),
    ]
    assert assembled(*pieces) == [F, G]


def test_a_piece_without_an_index_belongs_to_the_last_of_those_with_its_id() -> None:
    pieces = [piece(0, "a", "f"), piece(1, "a", "g"), piece(None, "a", "", '{"x":1}')]
    assert [call.arguments for call in assembled(*pieces)] == ["{}", '{"x":1}']


def test_whole_calls_that_all_have_the_same_index_are_told_apart_by_their_ids() -> None:
    calls = assembled(
        piece(0, "a", "show_hall", '{"hall": 3}'), piece(0, "b", "show_hall", '{"hall": 4}')
    )
    assert [(call.id, call.arguments) for call in calls] == [
        ("a", '{"hall": 3}'),
        ("b", '{"hall": 4}'),
    ]


def test_whole_calls_that_all_have_the_same_index_and_no_id_are_told_apart_by_their_end() -> None:
    calls = assembled(piece(0, "", "lamp", '{"on": true}'), piece(0, "", "lamp", '{"on": false}'))
    assert [call.arguments for call in calls] == ['{"on": true}', '{"on": false}']


def test_a_name_that_is_repeated_with_each_piece_begins_no_call() -> None:
    (call,) = assembled(piece(0, "a", "lamp", '{"on"'), piece(0, "a", "lamp", ": true}"))
    assert (call.name, call.arguments) == ("lamp", '{"on": true}')


def test_an_id_that_is_new_with_each_piece_begins_no_call() -> None:
    (call,) = assembled(piece(0, "a", "lamp", '{"on"'), piece(0, "b", "", ": true}"))
    assert (call.id, call.arguments) == ("a", '{"on": true}')


def test_a_name_that_comes_again_after_the_arguments_begins_no_call() -> None:
    (call,) = assembled(piece(0, "a", "lamp", "{}"), piece(0, "a", "lamp", ""))
    assert (call.id, call.name, call.arguments) == ("a", "lamp", "{}")


def test_an_empty_piece_neither_starts_a_call_nor_changes_which_is_the_last() -> None:
    pieces = [
        piece(3),
        piece(),
        piece(0, "a", "f", '{"x"'),
        piece(1, "b", "g", '{"y":2}'),
        piece(0, arguments=":1"),
        piece(1),
        piece(arguments="}"),
    ]
    assert assembled(*pieces) == [F, G]
    assert assembled(piece(), piece(0)) == []


# Ids --------------------------------------------------------------------------------------------


def test_a_call_without_an_id_gets_one_of_its_own() -> None:
    calls = assembled(*(piece(index, "", "f", "{}") for index in range(20)))
    assert all(OWN_ID.match(call.id) for call in calls)
    assert len(set(ids_of(calls))) == 20


def test_an_id_that_another_call_has_is_replaced() -> None:
    calls = assembled(*(piece(index, "same", "f") for index in range(3)))
    assert calls[0].id == "same"
    assert all(OWN_ID.match(call.id) for call in calls[1:])
    assert len(set(ids_of(calls))) == 3


def test_an_id_too_long_to_answer_with_is_replaced() -> None:
    longest = "x" * MAX_ID_CHARS
    first, second = assembled(piece(0, longest, "f"), piece(1, longest + "x", "f"))
    assert first.id == longest
    assert OWN_ID.match(second.id)


# Calls that cannot be used ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_empty_arguments_are_those_of_a_function_that_takes_none(text: str) -> None:
    assert assembled(piece(0, "a", "f", text)) == [ToolCall("a", "f", "{}")]


@pytest.mark.parametrize("text", ["", " "])
def test_in_an_answer_that_was_cut_empty_arguments_are_missing(text: str) -> None:
    assembler = CallAssembler()
    assembler.add([piece(0, "a", "f", "{}"), piece(1, "b", "g", text)])
    with pytest.raises(MalformedCallError, match="of 'g': the answer was cut off before its arg"):
        assembler.finish(is_cut=True)


def test_in_an_answer_that_was_cut_whole_arguments_are_whole() -> None:
    assembler = CallAssembler()
    assembler.add([piece(0, "a", "f", '{"x":1}')])
    assert assembler.finish(is_cut=True) == [F]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"x":', "its arguments are not valid JSON: Input data was truncated"),
        ("{x:1}", r"its arguments are not valid JSON: .* \(byte 1\)"),
        ("{}{}", "its arguments are not valid JSON: JSON is malformed: trailing characters"),
        ("Copenhagen", "its arguments are not valid JSON: "),
        ('{"x":NaN}', "its arguments are not valid JSON: "),
        ('{"x":"\\ud83d"}', "its arguments are not valid JSON: "),
        ("[]", "its arguments are not a JSON object$"),
        ("null", "its arguments are not a JSON object$"),
        ("7", "its arguments are not a JSON object$"),
        ('"{}"', "its arguments are not a JSON object$"),
        pytest.param('{"x":' + "[" * 100_000, "its arguments are nested too deeply$", id="deep"),
    ],
)
def test_arguments_that_are_no_json_object_are_an_error(text: str, why: str) -> None:
    with pytest.raises(MalformedCallError, match=f"^malformed function call of 'f': {why}"):
        assembled(piece(0, "a", "f", text))


def test_one_bad_call_spoils_them_all() -> None:
    with pytest.raises(MalformedCallError, match="of 'g'"):
        assembled(piece(0, "a", "f", "{}"), piece(1, "b", "g", "{"))
    with pytest.raises(MalformedCallError, match="of 'g'"):
        assembled(piece(0, "b", "g", "{"), piece(1, "a", "f", "{}"))


def test_a_call_without_a_name_is_an_error() -> None:
    with pytest.raises(MalformedCallError, match=r"^malformed function call: it has no name$"):
        assembled(piece(0, "a", "f", "{}"), piece(1, "b", "", "{}"))


def test_the_words_of_an_error_are_bounded_and_in_one_line() -> None:
    with pytest.raises(StreamError) as caught:
        assembled(piece(0, "a" * 9999, "f\n" + "g" * 9999, "{" * 500))
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert "of 'f\\n" + "g" * 62 + "'" in str(caught.value)


# Bounds -----------------------------------------------------------------------------------------


def test_there_may_be_so_many_calls_and_no_more() -> None:
    assembler = CallAssembler()
    assembler.add(piece(index, f"id{index}", "f") for index in range(MAX_CALLS))
    assembler.add([piece(0, arguments="{}"), piece(MAX_CALLS - 1, arguments="{}")])
    with pytest.raises(MalformedCallError, match=r"of 'g': the answer has more than 128 calls$"):
        assembler.add([piece(MAX_CALLS, "more", "g")])
    assert len(assembler.finish()) == MAX_CALLS == 128


def test_there_may_be_so_much_of_all_calls_and_no_more() -> None:
    assert MAX_CALL_BYTES == 1 << 20
    assembler = CallAssembler()
    assembler.add([piece(0, "a", "f"), piece(1, "b", "g")])
    half = (MAX_CALL_BYTES - 4) // 2
    assembler.add([piece(0, arguments="x" * half), piece(1, arguments="é" * (half // 2))])
    assembler.add([piece(1, "not kept", "nor this")])
    with pytest.raises(MalformedCallError, match=r"of 'f': the calls of the answer exceed 1 MiB$"):
        assembler.add([piece(0, arguments="x")])


@pytest.mark.parametrize("begun", [piece(0, "x" * MAX_CALL_BYTES), piece(0, "", "x" * (1 << 20))])
def test_ids_and_names_count_too(begun: CallPiece) -> None:
    assembler = CallAssembler()
    assembler.add([begun])
    with pytest.raises(MalformedCallError, match=r"exceed 1 MiB$"):
        assembler.add([piece(0, arguments="x")])


# After the end ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "late",
    [
        piece(0, arguments=" "),
        piece(arguments="}"),
        piece(1),
        piece(1, "b"),
        piece(1, name="g"),
        piece(1, arguments="{}"),
        piece(None, "b"),
    ],
)
def test_what_comes_after_the_end_is_an_error_unless_it_is_nothing(late: CallPiece) -> None:
    assembler = CallAssembler()
    assembler.add([piece(0, "a", "f", '{"x":1}')])
    assert assembler.finish() == [F]
    assembler.add([piece(0), piece(), piece(0, "a", "f"), piece(None, "a")])
    if late.chars:
        with pytest.raises(MalformedCallError, match=r"more of it came after the finish reason$"):
            assembler.add([late])
    else:
        assembler.add([late])


def test_no_call_begins_after_an_end_without_calls() -> None:
    assembler = CallAssembler()
    assert assembler.finish() == []
    assembler.add([piece(0), piece()])
    with pytest.raises(
        MalformedCallError, match=r"of 'f': more of it came after the finish reason$"
    ):
        assembler.add([piece(0, "a", "f")])


@pytest.mark.parametrize("name", ["get weather!", "multi_tool_use.parallel", "x" * 65, "später"])
def test_a_name_that_no_function_can_have_is_an_error(name: str) -> None:
    """It would go into the history, and no provider takes it back from there."""
    with pytest.raises(MalformedCallError, match=r"this is not a valid function name$") as caught:
        assembled(piece(0, "a", name, "{}"))
    assert len(str(caught.value)) < 200
