"""Reading the body of a chat completion request, as strictly as OpenAI's API does.

Sources: OpenAI API reference, "Chat" > "Create chat completion"; guide "Error codes".
"""

import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from llm.demo.answers import error_object, json_answer
from llm.demo.steps import ChatRequest, Step, Tool
from llm.demo.stories import tokens


class RefusedError(Exception):
    """The request is refused, with an OpenAI error object (guide "Error codes")."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def answer(self) -> Iterator[Step]:
        """The error answer."""
        kind = "invalid_request_error"
        body = error_object(str(self), kind, param=self.param, code=self.code)
        return json_answer(self.status, body, self.headers)


def parse_chat(body: bytes) -> ChatRequest:
    """Read the body of `POST /v1/chat/completions`.

    Parameters that the demo does not use (temperature, tool_choice, …) are not checked.

    Raises:
        RefusedError: a 400: a parameter that the API reference requires is missing, or has another
            type; names it.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise RefusedError(
            HTTPStatus.BAD_REQUEST, "We could not parse the JSON body of your request."
        )
    model = _field(fields, "model", str, "a string")
    if not model:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "you must provide a model parameter")
    messages = _field(fields, "messages", list, "an array of objects")
    if messages is None:
        raise _bad(
            "messages", "Missing required parameter: 'messages'.", "missing_required_parameter"
        )
    if not messages:
        raise _bad("messages", "Invalid 'messages': empty array.", "empty_array")
    texts = [_text_of(message, index) for index, message in enumerate(messages)]
    last_role, last_text = texts[-1]
    stream_options = _field(fields, "stream_options", dict, "an object")
    max_tokens = _max_tokens(fields, "max_completion_tokens")
    if max_tokens is None:  # "deprecated in favor of max_completion_tokens", and still sent by most
        max_tokens = _max_tokens(fields, "max_tokens")
    return ChatRequest(
        model=_printable(model),
        user_text=next((text for role, text in reversed(texts) if role == "user"), ""),
        prompt_tokens=sum(len(tokens(text)) for _, text in texts),
        stream=bool(_field(fields, "stream", bool, "a boolean")),
        include_usage=bool(_field(stream_options or {}, "include_usage", bool, "a boolean")),
        max_tokens=max_tokens,
        has_stream_options=stream_options is not None,
        tools=tuple(_tools(fields)),
        tool_result=last_text if last_role in ("tool", "function") else None,
    )


def _text_of(message: object, index: int) -> tuple[str, str]:
    """Role and text of one message; `content` is a string, an array of typed parts, or null."""
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _bad(where, f"Invalid '{where}': expected an object with a 'role'.", "invalid_type")
    match message.get("content"):
        case None:
            text = ""
        case str(text):
            pass
        case list(parts):
            found = (part.get("text") for part in parts if isinstance(part, dict))
            text = " ".join(part for part in found if isinstance(part, str))
        case _:
            where = f"{where}.content"
            raise _bad(where, f"Invalid type for '{where}': expected a string.", "invalid_type")
    return message["role"], _printable(text)


def _tools(fields: Mapping[str, Any]) -> Iterator[Tool]:
    """The functions of `tools`, then those of the legacy `functions`."""
    for index, tool in enumerate(_field(fields, "tools", list, "an array of objects") or ()):
        where = f"tools[{index}]"
        if not isinstance(tool, dict):
            raise _bad(where, f"Invalid type for '{where}': expected an object.", "invalid_type")
        if tool.get("type") == "function":
            yield _tool(tool.get("function"), f"{where}.function")
    functions = _field(fields, "functions", list, "an array of objects") or ()
    for index, function in enumerate(functions):
        yield _tool(function, f"functions[{index}]")


def _tool(function: object, where: str) -> Tool:
    match function:
        case {"name": str(name), **rest}:
            parameters = rest.get("parameters")
            return Tool(name, parameters if isinstance(parameters, dict) else {})
    raise _bad(where, f"Invalid '{where}': expected an object with a 'name'.", "invalid_type")


def _printable(text: str) -> str:
    r"""`text` without lone surrogates: JSON can contain them ("\ud800"), UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _field(fields: Mapping[str, Any], name: str, kind: type, wanted: str) -> Any:
    """The value of `name`, None where it is null or missing; refused where it has another type."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        raise _bad(name, f"Invalid type for '{name}': expected {wanted}.", "invalid_type")
    return value


def _max_tokens(fields: Mapping[str, Any], name: str) -> int | None:
    value = _field(fields, name, int, "an integer")
    if value is None:
        return None
    if isinstance(value, bool) or value < 1:
        raise _bad(name, f"Invalid '{name}': expected an integer >= 1.", "integer_below_min_value")
    return int(value)


def _bad(param: str, message: str, code: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)
