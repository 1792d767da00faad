"""Request bodies, and chat completion chunks as providers really send them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm.chat.completions import (
    CallPiece,
    Delta,
    ErrorChunkError,
    MalformedChunkError,
    Message,
    Prompt,
    Usage,
    encode_body,
    error_message,
    parse_chunk,
)

HEAD = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1740000000,
    "model": "gpt-4o-mini",
    "system_fingerprint": "fp_1",
}
FILTERED = {"hate": {"filtered": False, "severity": "safe"}}
TOOL_CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f"}}


def chunk(delta: object, finish_reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return json.dumps({**HEAD, "choices": [choice], **more})


@pytest.mark.parametrize(
    ("data", "delta"),
    [
        pytest.param(chunk({"content": "Hi"}), Delta("Hi"), id="text"),
        pytest.param(chunk({"content": " 你好 😀\n"}), Delta(" 你好 😀\n"), id="unicode"),
        pytest.param(
            '{"choices":[{"delta":{"content":"\\ud83d\\ude00"}}]}', Delta("😀"), id="pair"
        ),
        pytest.param(chunk({"role": "assistant", "content": ""}), Delta(), id="role-and-empty"),
        pytest.param(chunk({"role": "assistant"}), Delta(), id="role-only"),
        pytest.param(chunk({"content": None}), Delta(), id="null-content"),
        pytest.param(chunk({"content": None, "refusal": None}), Delta(), id="refusal-null"),
        pytest.param(chunk({"content": "Hi"}, usage=None), Delta("Hi"), id="null-usage"),
        pytest.param(chunk({"content": "Hi"}, error=None), Delta("Hi"), id="null-error"),
        pytest.param(chunk({}, "stop"), Delta(finish_reason="stop"), id="finish"),
        pytest.param(chunk(None, "length"), Delta(finish_reason="length"), id="null-delta"),
        pytest.param(
            json.dumps({"choices": [{"index": 0, "finish_reason": "stop"}]}),
            Delta(finish_reason="stop"),
            id="no-delta",
        ),
        pytest.param(
            chunk({"content": "."}, "stop"), Delta(".", finish_reason="stop"), id="last-text"
        ),
        pytest.param(
            json.dumps({"choices": [], "prompt_filter_results": [FILTERED], "id": "", "model": ""}),
            Delta(),
            id="azure-prompt-filter",
        ),
        pytest.param(
            json.dumps(
                {
                    "choices": [
                        {
                            "content_filter_offsets": {"check_offset": 1},
                            "content_filter_results": FILTERED,
                            "finish_reason": None,
                            "index": 0,
                        }
                    ],
                    "object": "",
                }
            ),
            Delta(),
            id="azure-async-filter",
        ),
        pytest.param(
            json.dumps(
                {
                    **HEAD,
                    "choices": [],
                    "usage": {
                        "prompt_tokens": 9,
                        "completion_tokens": 12,
                        "total_tokens": 21,
                        "completion_tokens_details": {"reasoning_tokens": 0},
                    },
                }
            ),
            Delta(usage=Usage(9, 12, 21)),
            id="usage-only",
        ),
        pytest.param(
            json.dumps({"choices": None, "usage": {"prompt_tokens": 1}}),
            Delta(usage=Usage(1)),
            id="usage-without-choices",
        ),
        pytest.param(
            chunk({}, "stop", usage={"prompt_tokens": 9, "completion_tokens": 12}),
            Delta(finish_reason="stop", usage=Usage(9, 12)),
            id="finish-with-usage",
        ),
        pytest.param(
            chunk(None, "stop", usage={"total_tokens": 3}),
            Delta(finish_reason="stop", usage=Usage(total_tokens=3)),
            id="no-delta-but-usage",
        ),
        pytest.param(
            chunk({"content": None, "reasoning_content": "hm, 你"}),
            Delta(reasoning_chars=5),
            id="deepseek-reasoning",
        ),
        pytest.param(
            chunk({"content": "", "reasoning": "hm", "reasoning_details": [{"text": "hm"}]}),
            Delta(reasoning_chars=2),
            id="openrouter-reasoning",
        ),
        pytest.param(
            chunk({"content": "So", "reasoning_content": ""}), Delta("So"), id="empty-reasoning"
        ),
        pytest.param(
            chunk({"content": "So", "tool_calls": [TOOL_CALL]}, "tool_calls"),
            Delta("So", 0, "tool_calls", calls=(CallPiece(0, "call_1", "f", ""),)),
            id="text-and-tool-call-and-finish",
        ),
        pytest.param(
            chunk({"content": None, "tool_calls": None, "function_call": None}),
            Delta(),
            id="null-tool-calls",
        ),
        pytest.param(chunk({"content": "a", "tool_calls": []}), Delta("a"), id="no-tool-calls"),
        pytest.param(chunk({"content": "a"}) + "\n ", Delta("a"), id="whitespace-around-it"),
    ],
)
def test_a_chunk_is_read_leniently(data: str, delta: Delta) -> None:
    assert parse_chunk(data) == delta


@pytest.mark.parametrize(
    ("delta", "pieces"),
    [
        pytest.param(
            {"content": None, "tool_calls": [TOOL_CALL]},
            [CallPiece(0, "call_1", "f", "")],
            id="first-piece",
        ),
        pytest.param(
            {"tool_calls": [{"index": 1, "function": {"arguments": '{"x": "你'}}]},
            [CallPiece(1, "", "", '{"x": "你')],
            id="later-piece",
        ),
        pytest.param(
            {"tool_calls": [TOOL_CALL, {**TOOL_CALL, "index": 1, "id": "call_2"}]},
            [CallPiece(0, "call_1", "f", ""), CallPiece(1, "call_2", "f", "")],
            id="two-in-one-delta",
        ),
        pytest.param(
            {
                "tool_calls": [
                    {
                        "index": None,
                        "id": None,
                        "type": None,
                        "function": {"name": None, "arguments": None},
                    }
                ]
            },
            [CallPiece(None, "", "", "")],
            id="all-null",
        ),
        pytest.param(
            {"tool_calls": [{"id": "", "function": {"name": "", "arguments": ""}}]},
            [CallPiece(None, "", "", "")],
            id="all-empty",
        ),
        pytest.param(
            {"tool_calls": [{}, {"index": 2, "function": None}, None, {"function": {}}]},
            [
                CallPiece(None, "", "", ""),
                CallPiece(2, "", "", ""),
                CallPiece(None, "", "", ""),
            ],
            id="all-missing",
        ),
        pytest.param(
            {"tool_calls": [{"index": 0, "function": {"arguments": {"x": [1.5, "é"], "y": {}}}}]},
            [CallPiece(0, "", "", '{"x":[1.5,"é"],"y":{}}')],
            id="arguments-as-an-object",
        ),
        pytest.param(
            {"tool_calls": [{"index": 0, "function": {"arguments": {}}}]},
            [CallPiece(0, "", "", "{}")],
            id="arguments-as-an-empty-object",
        ),
        pytest.param(
            {"function_call": {"name": "f", "arguments": ""}},
            [CallPiece(0, "", "f", "")],
            id="legacy-first-piece",
        ),
        pytest.param(
            {"content": None, "function_call": {"arguments": "{}"}},
            [CallPiece(0, "", "", "{}")],
            id="legacy-later-piece",
        ),
        pytest.param(
            {"function_call": {"name": None, "arguments": {"x": 1}}},
            [CallPiece(0, "", "", '{"x":1}')],
            id="legacy-object",
        ),
        pytest.param({"function_call": {}}, [CallPiece(0, "", "", "")], id="legacy-empty"),
        pytest.param(
            {"function_call": {"name": "g"}, "tool_calls": [TOOL_CALL]},
            [CallPiece(0, "call_1", "f", "")],
            id="both-forms",
        ),
    ],
)
def test_pieces_of_function_calls_are_read_leniently(
    delta: dict[str, Any], pieces: list[CallPiece]
) -> None:
    assert parse_chunk(chunk(delta)) == Delta(delta.get("content") or "", calls=tuple(pieces))


def test_only_the_first_choice_counts() -> None:
    choices = [{"delta": {"content": "first"}}, {"delta": {"content": "second"}}]
    assert parse_chunk(json.dumps({"choices": choices})).text == "first"


@pytest.mark.parametrize(
    ("delta", "is_token"),
    [
        (Delta(), False),
        (Delta("a"), True),
        (Delta(reasoning_chars=1), True),
        (Delta(finish_reason="stop"), False),
        (Delta(usage=Usage(1)), False),
        (Delta(call_chars=1), True),
        (Delta(calls=(CallPiece(0, "", "", ""), CallPiece(None, "", "", ""))), False),
        (Delta(calls=(CallPiece(0, "a", "", ""),)), True),
        (Delta(calls=(CallPiece(0, "", "f", ""),)), True),
        (Delta(calls=(CallPiece(0, "", "", ""), CallPiece(0, "", "", " "))), True),
    ],
)
def test_a_token_is_text_or_reasoning_or_a_piece_of_a_call(delta: Delta, is_token: bool) -> None:
    assert delta.is_token is is_token


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"error": {"message": "overloaded", "type": "server_error"}}', "overloaded"),
        ('{"error": "overloaded"}', "overloaded"),
        ('{"error": {"detail": "overloaded"}}', "overloaded"),
        ('{"error": {"code": 500}}', "no message"),
        ('{"error": ["a", 1]}', '["a",1]'),
        ('{"message": "overloaded"}', "overloaded"),
        ('{"detail": "overloaded"}', "overloaded"),
        ('{"object": "error", "message": "overloaded", "code": 503}', "overloaded"),
        ('{"error": null, "message": "overloaded"}', "overloaded"),
        ('{"choices": "wrong", "error": {"message": "overloaded"}}', "overloaded"),
        (chunk({"content": ""}, "error", error={"message": "overloaded"}), "overloaded"),
    ],
)
def test_an_error_object_is_distinguished_from_a_chunk(data: str, message: str) -> None:
    with pytest.raises(ErrorChunkError) as caught:
        parse_chunk(data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "data",
    [
        "",
        "{",
        "hello",
        "null",
        "7",
        "[]",
        '"text"',
        "{}",
        '{"id": "1"}',
        '{"choices": {}}',
        '{"choices": [null]}',
        '{"choices": ["text"]}',
        '{"choices": [{"delta": "text"}]}',
        '{"choices": [{"delta": {"content": 7}}]}',
        '{"choices": [{"delta": {}, "finish_reason": 7}]}',
        '{"choices": [{"delta": {"tool_calls": {}}}]}',
        '{"choices": [{"delta": {"tool_calls": [{"index": "first"}]}}]}',
        '{"choices": [{"delta": {"tool_calls": [{"function": {"arguments": []}}]}}]}',
        '{"choices": [{"delta": {"function_call": "f"}}]}',
        '{"choices": []} {"choices": []}',
        '{"choices": [{"delta": {"content": "half a pair: \\ud83d"}}]}',
        pytest.param('{"choices": [], "more": ' + "[" * 100_000, id="deep"),
        pytest.param('{"error": ' + "[" * 100_000, id="deep-error"),
    ],
)
def test_malformed_chunks_are_a_typed_error(data: str) -> None:
    with pytest.raises(MalformedChunkError):
        parse_chunk(data)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no such model"}}', "no such model"),
        (b'{"error": "no such model"}', "no such model"),
        (b'{"message": "no such model"}', "no such model"),
        (b'{"detail": "no such model"}', "no such model"),
        (b'{"detail": [{"loc": ["body"], "msg": "bad"}]}', '[{"loc":["body"],"msg":"bad"}]'),
        (b'{"error": {}}', None),
        (b"{}", None),
        (b"[]", None),
        (b"", None),
        (b"<html>", None),
        (b"\xff\xfe", None),
        (b'{"error": "\xff"}', None),
        pytest.param(b'{"error":' + b"[" * 100_000, None, id="deep"),
    ],
)
def test_the_message_of_an_error_body(body: bytes, message: str | None) -> None:
    assert error_message(body) == message


def test_a_body_asks_for_a_stream_of_the_conversation() -> None:
    messages = (
        Message("system", "Be brief."),
        Message("user", 'Hi "there"\n你好'),
        Message("assistant", ""),
    )
    assert json.loads(encode_body("gpt-4o-mini", Prompt(messages))) == {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": 'Hi "there"\n你好'},
            {"role": "assistant", "content": ""},
        ],
        "stream": True,
    }


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 3.0, "completion_tokens": None}, Usage(3)),
        ({"prompt_tokens": "many"}, None),
        ({}, Usage()),
        ("free of charge", None),
        ([1], None),
    ],
)
def test_an_answer_does_not_fail_because_of_its_usage(usage: object, read: Usage | None) -> None:
    text = json.dumps({"choices": [{"delta": {"content": "Hi"}}], "usage": usage})
    assert parse_chunk(text) == Delta("Hi", usage=read)
