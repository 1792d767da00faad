"""Assembles the function calls of an answer from the pieces in which they are streamed. No I/O.

The rule (OpenAI API reference, "The chat completion chunk object", read leniently): pieces with the
same `index` belong to one call. Its first piece carries the id and the name; the arguments of all
its pieces are concatenated.
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
"""Calls in one answer: the most functions that a request can offer (OpenAI API reference,
`tools`)."""

MAX_CALL_BYTES = 1024 * 1024
"""Size of all calls of one answer in UTF-8: arguments, ids and names. Far above any real call, and
small enough to keep in memory until the answer ends."""

MAX_ID_CHARS = 256
"""The longest id that a client can send back (gateway/PROTOCOL.md); a longer one is replaced."""

_NAME_CHARS = 64
"""Longest part of a name that an error quotes: as long as a valid name can be."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A valid function name (OpenAI API reference, `tools`)."""

_decoder = msgspec.json.Decoder()


@dataclass(slots=True)
class _Call:
    """A call whose pieces are still arriving."""

    index: int | None
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class CallAssembler:
    """Assembles the calls of one answer."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._last: _Call | None = None
        self._bytes = 0
        self._is_finished = False

    def add(self, pieces: Iterable[CallPiece]) -> None:
        """Add the pieces of one delta.

        Raises:
            MalformedCallError: over `MAX_CALLS` or `MAX_CALL_BYTES`, or more of a call after
                `finish()`.
        """
        for piece in pieces:
            # Some servers put an empty piece into every delta of a text: it must not start a call.
            if piece.chars:
                self._add(piece)

    def finish(self, *, is_cut: bool = False) -> list[ToolCall]:
        """The whole calls, in the order of their first pieces. No piece may follow.

        Args:
            is_cut: the answer ended before the model was done. A call without arguments is an
                error then; otherwise it calls a function that takes none.

        Raises:
            MalformedCallError: a call has no valid name, or its arguments are not a JSON object.
        """
        self._is_finished = True
        finished: list[ToolCall] = []
        ids: set[str] = set()
        for call in self._calls:
            if not call.name:
                raise MalformedCallError("malformed function call: it has no name")
            if not _NAME.fullmatch(call.name):  # in the history, a provider would reject it
                raise _error(call.name, "this is not a valid function name")
            # An id that is too long to send back, or is taken by another call, is replaced.
            call_id = call.id if len(call.id) <= MAX_ID_CHARS and call.id not in ids else ""
            call_id = call_id or f"call_{uuid.uuid4().hex[:24]}"
            ids.add(call_id)
            finished.append(ToolCall(call_id, call.name, _arguments(call, is_cut)))
        return finished

    def _add(self, piece: CallPiece) -> None:
        call = self._call_of(piece)
        if self._is_finished and (call is None or piece.arguments):
            raise _error(
                call.name if call else piece.name, "more of it came after the finish reason"
            )
        if call is None:
            if len(self._calls) == MAX_CALLS:
                raise _error(piece.name, f"the answer has more than {MAX_CALLS} calls")
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
        """The call that a piece belongs to; None where it starts a new one."""
        if piece.index is not None:
            call = self._by_index.get(piece.index)
            return None if call is not None and _starts_another(piece, call) else call
        if not piece.id or (self._last is not None and self._last.id == piece.id):
            return self._last
        return next((call for call in self._calls if call.id == piece.id), None)

    def _keep(self, call: _Call, text: str) -> str:
        self._bytes += len(text.encode())
        if self._bytes > MAX_CALL_BYTES:
            raise _error(call.name, f"the calls of the answer exceed {MAX_CALL_BYTES >> 20} MiB")
        return text


def _starts_another(piece: CallPiece, call: _Call) -> bool:
    """Whether a piece starts a new call although its index is taken: some servers send whole calls,
    all with index 0."""
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
        raise _error(call.name, f"its arguments are not valid JSON: {error}") from None
    if not is_object:
        raise _error(call.name, "its arguments are not a JSON object")
    return text


def _error(name: str, why: str) -> MalformedCallError:
    quoted = f" of {name[:_NAME_CHARS]!r}" if name else ""
    return MalformedCallError(f"malformed function call{quoted}: {why}")
