"""Function calls of the model, put together from the pieces in which they are streamed. Pure.

The rule (OpenAI API reference, "The chat completion chunk object", read leniently): pieces belong
together by `index`; the first of a call brings its id and its name, all together make up its
arguments.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from llm.chat.completions import CallPiece, ToolCall
from llm.errors import MalformedCallError

MAX_CALLS = 128
"""Of one answer: as many as there may be functions (OpenAI API reference, `tools`)."""

MAX_CALL_BYTES = 1024 * 1024
"""Arguments of one answer in UTF-8, ids and names counted in: far over any call, and little enough
to be kept until the answer ends."""

MAX_ID_CHARS = 256
"""The longest id that a client can answer with."""

_NAME_CHARS = 64
"""So much of a name is quoted in an error; a function's has no more."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Of a function (OpenAI API reference, `tools`)."""

_decoder = msgspec.json.Decoder()


@dataclass(slots=True)
class _Call:
    """What has come of one call."""

    index: int | None
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class CallAssembler:
    """Puts the calls of one answer together."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._last: _Call | None = None
        self._bytes = 0
        self._is_finished = False

    def add(self, pieces: Iterable[CallPiece]) -> None:
        """Take the pieces of one delta.

        Raises:
            MalformedCallError: too much, or more of a call after `finish()`.
        """
        for piece in pieces:
            # One with nothing in it begins no call: some servers put one into each delta of a text.
            if piece.chars:
                self._add(piece)

    def finish(self, *, is_cut: bool = False) -> list[ToolCall]:
        """The calls, in the order in which they began. No piece may follow.

        Args:
            is_cut: the answer ended before the model was done, so that arguments of which nothing
                came are missing. Otherwise they are those of a function that takes none.

        Raises:
            MalformedCallError: a call without a name, or whose arguments are no JSON object.
        """
        self._is_finished = True
        finished: list[ToolCall] = []
        ids: set[str] = set()
        for call in self._calls:
            if not call.name:
                raise MalformedCallError("malformed function call: it has no name")
            if not _NAME.fullmatch(call.name):  # nor would a provider take it back
                raise _error(call.name, "that is no name of a function")
            # One that could not be answered, or not be told from another's, is none.
            call_id = call.id if len(call.id) <= MAX_ID_CHARS and call.id not in ids else ""
            call_id = call_id or f"call_{uuid.uuid4().hex[:24]}"
            ids.add(call_id)
            finished.append(ToolCall(call_id, call.name, _arguments(call, is_cut)))
        return finished

    def _add(self, piece: CallPiece) -> None:
        call = self._call_of(piece)
        if self._is_finished and (call is None or piece.arguments):
            raise _error(call.name if call else piece.name, "a part of it came after its end")
        if call is None:
            if len(self._calls) == MAX_CALLS:
                raise _error(piece.name, f"it is one of over {MAX_CALLS}")
            call = _Call(piece.index)
            self._calls.append(call)
            if piece.index is not None:
                self._by_index[piece.index] = call
        self._last = call
        call.id = call.id or self._keep(call, piece.id)
        call.name = call.name or self._keep(call, piece.name)
        if piece.arguments:
            call.arguments.append(self._keep(call, piece.arguments))

    def _call_of(self, piece: CallPiece) -> _Call | None:
        """The call that a piece adds to; None where it begins one."""
        if piece.index is not None:
            call = self._by_index.get(piece.index)
            return None if call is not None and _begins_another(piece, call) else call
        if not piece.id or (self._last is not None and self._last.id == piece.id):
            return self._last
        return next((call for call in self._calls if call.id == piece.id), None)

    def _keep(self, call: _Call, text: str) -> str:
        self._bytes += len(text.encode())
        if self._bytes > MAX_CALL_BYTES:
            raise _error(call.name, f"the answer's calls are over {MAX_CALL_BYTES >> 20} MiB")
        return text


def _begins_another(piece: CallPiece, call: _Call) -> bool:
    """Whether a piece is a call of its own although its index is that of another: some servers give
    calls as wholes, which all say 0."""
    if not (piece.name and piece.arguments and call.name and len(call.arguments) == 1):
        return False
    return _is_object(call.arguments[0])


def _is_object(text: str) -> bool:
    try:
        return isinstance(_decoder.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _arguments(call: _Call, is_cut: bool) -> str:
    text = "".join(call.arguments)
    if not text.strip():
        if is_cut:
            raise _error(call.name, "the answer was cut off before its arguments")
        return "{}"
    try:
        is_object = isinstance(_decoder.decode(text), dict)
    except RecursionError:
        raise _error(call.name, "its arguments are nested too deeply") from None
    except msgspec.DecodeError as error:
        raise _error(call.name, f"its arguments are no JSON: {error}") from None
    if not is_object:
        raise _error(call.name, "its arguments are no JSON object")
    return text


def _error(name: str, why: str) -> MalformedCallError:
    quoted = f" of {name[:_NAME_CHARS]!r}" if name else ""
    return MalformedCallError(f"malformed function call{quoted}: {why}")
