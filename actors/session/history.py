"""The conversation as the user got it, and what the model is sent of it. Pure: no I/O, no clock.

The order of turns is the order in which requests were accepted, but that one which goes on after
the results of functions follows the turn that asked for them. A turn runs until `History.end`;
only ended turns are told to the model, and only they count against the bounds. Whatever happened
to a turn, what is sent of it is what providers accept: each call of a function is followed by
its result, a stand-in where there is none, before anything else.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from llm.chat.completions import Message, ToolCall

INTERRUPTED_MARK = " [interrupted by the user]"
"""Follows the part of an answer that the user got, so that the model does not take the rest for
said."""

INTERRUPTED_BEFORE_TEXT = "[interrupted by the user before the answer began]"
"""Stands for an answer of which the user got nothing. Where calls were made before the interrupt,
they are the answer, and there is no mark: the content is None."""

BROKEN_MARK = " [the answer broke off here]"
"""Follows the part of an answer that came before it failed or was reaped."""

NO_RESULT = '{"error":"interrupted: the function returned no result"}'
"""Stands for a result that has not come: providers refuse a call without one."""


class Ending(enum.Enum):
    """How a turn ended, to the user."""

    COMPLETED = enum.auto()
    INTERRUPTED = enum.auto()
    BROKEN = enum.auto()
    """It failed or was reaped."""


@dataclass
class Call:
    """A function of the client that the model asked for, and what it returned."""

    call: ToolCall
    result: str | None = None
    """As the model is to read it; None until it comes. Set by `History.set_result`."""


@dataclass(eq=False)
class Turn:
    """What the user said and what came of it."""

    request_id: str
    user_text: str | None
    """None for a turn that goes on after the results of functions."""
    text: str = ""
    """What the user got of the answer; empty while the turn runs."""
    calls: list[Call] = field(default_factory=list)
    """The calls that the client was given, in order."""
    ending: Ending | None = None
    """None while the turn runs."""
    continues: Turn | None = None
    """The turn after whose results it goes on."""
    holds: int = 0
    """How often it is held: see `History.hold`."""

    @property
    def resolved(self) -> bool:
        """True when every call has its result."""
        return all(call.result is not None for call in self.calls)


class History:
    """The turns of one session.

    Over a bound the oldest ended turns are forgotten, whole, so that no call loses its result;
    the newest too, where it alone is over the bound. A turn that goes on after results
    (`user_text` None) goes with the question that it belongs to, since no conversation begins with
    an answer. Running turns, and those that are held, are never forgotten.

    Args:
        max_messages: how many messages `messages` may give for all ended turns; 0 keeps no history.
        max_chars: how many Unicode code points these may have: user texts, answers, names and
            arguments of calls, results, but not the marks and stand-ins; 0 keeps no history.
    """

    def __init__(self, max_messages: int, max_chars: int) -> None:
        self._max_messages = max_messages
        self._max_chars = max_chars
        self._turns: list[Turn] = []
        self._last_ended: Turn | None = None

    def begin(self, request_id: str, user_text: str | None, continues: Turn | None = None) -> Turn:
        """A request was accepted: its turn runs from here on.

        Args:
            request_id: the client's.
            user_text: what the user said; None for a turn that goes on after results.
            continues: the turn of those results, which is held until this one ends. This one
                follows it, and what went on from it before.
        """
        turn = Turn(request_id, user_text, continues=continues)
        place = len(self._turns)
        if continues is not None:
            self.hold(continues)
            place = self._turns.index(continues) + 1
            while place < len(self._turns) and self._turns[place].continues is not None:
                place += 1
        self._turns.insert(place, turn)
        return turn

    def hold(self, turn: Turn) -> None:
        """Do not forget this turn, and those that it goes on from, whatever the bounds say, until
        it is released as often."""
        _count_holds(turn, 1)

    def release(self, turn: Turn) -> None:
        """The contrary of `hold`."""
        _count_holds(turn, -1)
        self._apply_bounds()

    def add_call(self, turn: Turn, call: ToolCall) -> None:
        """The client was given this call by a turn that runs."""
        turn.calls.append(Call(call))

    def end(self, turn: Turn, text: str, ending: Ending) -> None:
        """A turn is over.

        A turn that broke before anything came of it is forgotten, and so is one that has nothing
        to tell. A completed one without an answer leaves only the user's words, since some
        providers refuse an empty answer.

        Args:
            turn: a turn that runs.
            text: what the user got of the answer, without any mark.
            ending: how it ended.
        """
        turn.text = text
        turn.ending = ending
        broke_at_once = ending is Ending.BROKEN and not text and not turn.calls
        if broke_at_once or not _messages_of(turn):
            self._turns.remove(turn)
        if turn.continues is not None:
            _count_holds(turn.continues, -1)
        self._last_ended = turn
        self._apply_bounds()

    def trim(self, request_id: str | None, chars: int) -> bool:
        """The user got less of an ended answer than was sent: cut it, and mark it as interrupted.

        Args:
            request_id: whose answer; None for the one that ended last.
            chars: how many Unicode code points the user got, at least 0. Where that is all of the
                answer, nothing changes, its ending neither.

        Returns:
            False when there is no such turn, or it still runs.
        """
        for turn in reversed(self._turns):
            is_meant = (
                turn is self._last_ended if request_id is None else (turn.request_id == request_id)
            )
            if is_meant and turn.ending is not None:
                if chars < len(turn.text):
                    turn.text = turn.text[:chars]
                    turn.ending = Ending.INTERRUPTED
                return True
        return False

    def find_call(self, call_id: str) -> tuple[Turn, Call] | None:
        """The newest call with this id (providers use ids again), and its turn."""
        for turn in reversed(self._turns):
            for call in reversed(turn.calls):
                if call.call.id == call_id:
                    return turn, call
        return None

    def set_result(self, call: Call, result: str) -> None:
        """A function returned, however late: later prompts have this instead of the stand-in.

        Where the result exceeds the bounds, the turn of the call may be dropped.

        Args:
            call: as found by `find_call`.
            result: as the model is to read it.
        """
        call.result = result
        self._apply_bounds()

    def messages(self, turn: Turn) -> list[Message]:
        """What the model is sent for a turn: the ended turns before it, then its own user text.

        Turns that run side by side do not see one another. For one that goes on after results these
        come last: no model could go on from what lies further back.
        """
        messages: list[Message] = []
        for earlier in self._turns:
            if earlier is turn:
                break
            if earlier.ending is not None and not _goes_on_from_running(earlier):
                messages += _messages_of(earlier)
            if earlier is turn.continues:
                break
        if turn.user_text is not None:
            messages.append(Message("user", turn.user_text))
        return messages

    def _apply_bounds(self) -> None:
        messages = chars = 0
        first_kept = len(self._turns)
        for index in reversed(range(len(self._turns))):
            turn = self._turns[index]
            if turn.ending is not None and not turn.holds:
                messages += len(_messages_of(turn))
                chars += _chars(turn)
                if messages > self._max_messages or chars > self._max_chars or not self._max_chars:
                    break
            if turn.user_text is not None:
                first_kept = index
        self._turns = [
            turn
            for index, turn in enumerate(self._turns)
            if index >= first_kept or turn.ending is None or turn.holds
        ]


def _messages_of(turn: Turn) -> list[Message]:
    """An ended turn, as it is told to the model."""
    messages = []
    if turn.user_text is not None:
        messages.append(Message("user", turn.user_text))
    content = _content(turn)
    if content is not None or turn.calls:
        messages.append(Message("assistant", content, tuple(call.call for call in turn.calls)))
    for call in turn.calls:
        result = NO_RESULT if call.result is None else call.result
        messages.append(Message("tool", result, tool_call_id=call.call.id))
    return messages


def _content(turn: Turn) -> str | None:
    """The text of the answer with its mark; None where there is nothing to say."""
    if not turn.text:
        unheard = turn.ending is Ending.INTERRUPTED and not turn.calls
        return INTERRUPTED_BEFORE_TEXT if unheard else None
    if turn.ending is Ending.INTERRUPTED:
        return turn.text + INTERRUPTED_MARK
    if turn.ending is Ending.BROKEN:
        return turn.text + BROKEN_MARK
    return turn.text


def _goes_on_from_running(turn: Turn) -> bool:
    before = turn.continues
    while before is not None and before.ending is not None:
        before = before.continues
    return before is not None


def _count_holds(turn: Turn, one: int) -> None:
    held: Turn | None = turn
    while held is not None:
        held.holds += one
        held = held.continues


def _chars(turn: Turn) -> int:
    """What a turn counts against `max_chars`."""
    calls = sum(
        len(call.call.name) + len(call.call.arguments) + len(call.result or "")
        for call in turn.calls
    )
    return len(turn.user_text or "") + len(turn.text) + calls
