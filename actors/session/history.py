"""The conversation as the user got it, and as the model is sent it. Pure: no I/O, no clock.

Turns are in the order in which their requests were accepted, with one exception: a turn that
continues after function results follows the turn that made the calls. A turn runs until
`History.end`. Only ended turns are sent to the model, and only they count against the bounds.
However a turn ended, its messages are valid for every provider: each function call is directly
followed by its result, or by a stand-in if there is none.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from llm.chat.completions import Message, ToolCall

INTERRUPTED_MARK = " [interrupted by the user]"
"""Appended to the part of an answer that the user got, so that the model knows that the rest was
not said."""

INTERRUPTED_BEFORE_TEXT = "[interrupted by the user before the answer began]"
"""Replaces an answer of which the user got nothing. If function calls were delivered before the
interrupt, they are the answer: there is no mark, and the content is None."""

BROKEN_MARK = " [the answer broke off here]"
"""Appended to the part of an answer that arrived before it failed or was reaped."""

NO_RESULT = '{"error":"interrupted: the function returned no result"}'
"""Replaces a result that has not arrived: providers refuse a call without a result."""


class Ending(enum.Enum):
    """How a turn ended for the user."""

    COMPLETED = enum.auto()
    INTERRUPTED = enum.auto()
    BROKEN = enum.auto()
    """It failed or was reaped."""


@dataclass
class Call:
    """A function call of the model, and its result."""

    call: ToolCall
    result: str | None = None
    """The text that the model gets; None until it arrives. Set by `History.set_result`."""


@dataclass(eq=False)
class Turn:
    """What the user said and what was answered."""

    request_id: str
    user_text: str | None
    """None for a turn that continues after function results."""
    text: str = ""
    """What the user got of the answer; empty while the turn runs."""
    calls: list[Call] = field(default_factory=list)
    """The function calls that were delivered to the client, in order."""
    ending: Ending | None = None
    """None while the turn runs."""
    continues: Turn | None = None
    """The turn that this one continues, after its function results."""
    holds: int = 0
    """How many times it is held: see `History.hold`."""

    @property
    def is_resolved(self) -> bool:
        """True when every call has its result."""
        return all(call.result is not None for call in self.calls)


class History:
    """The turns of one session.

    Over a bound, the oldest ended turns are dropped. They are dropped whole, so that no call loses
    its result; the newest is dropped too if it alone is over the bound. A turn that continues after
    function results (`user_text` None) is dropped together with the turn of its question, since no
    conversation may begin with an answer. Running turns and held turns are never dropped.

    Args:
        max_messages: how many messages the ended turns may have; 0: keep no history.
        max_chars: how many Unicode code points the ended turns may have: user texts, answers, names
            and arguments of calls, results, but not the marks and stand-ins; 0: keep no history.
    """

    def __init__(self, max_messages: int, max_chars: int) -> None:
        self._max_messages = max_messages
        self._max_chars = max_chars
        self._turns: list[Turn] = []
        self._last_ended: Turn | None = None

    def begin(self, request_id: str, user_text: str | None, continues: Turn | None = None) -> Turn:
        """Begin the turn of an accepted request.

        Args:
            request_id: the id that the client gave the request.
            user_text: what the user said; None for a turn that continues after function results.
            continues: the turn that made the function calls. It is held until the new turn ends.
                The new turn is placed behind it, and behind earlier turns that continue it.
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
        """Keep this turn, and the turns that it continues, even over the bounds. Each `hold` needs
        one `release`."""
        _add_holds(turn, 1)

    def release(self, turn: Turn) -> None:
        """Undo one `hold`, and apply the bounds."""
        _add_holds(turn, -1)
        self._apply_bounds()

    def add_call(self, turn: Turn, call: ToolCall) -> None:
        """A function call of a running turn was delivered to the client."""
        turn.calls.append(Call(call))

    def end(self, turn: Turn, text: str, ending: Ending) -> None:
        """End a turn.

        A turn that broke before any answer is dropped, and so is one without any message. A
        completed turn without an answer keeps only the user's text, since some providers refuse an
        empty answer.

        Args:
            turn: a running turn.
            text: what the user got of the answer, without any mark.
            ending: how it ended.
        """
        turn.text = text
        turn.ending = ending
        broke_at_once = ending is Ending.BROKEN and not text and not turn.calls
        if broke_at_once or not _messages_of(turn):
            self._turns.remove(turn)
        if turn.continues is not None:
            _add_holds(turn.continues, -1)
        self._last_ended = turn
        self._apply_bounds()

    def trim(self, request_id: str | None, chars: int) -> bool:
        """Shorten an ended answer to what the user really got, and mark it as interrupted.

        Args:
            request_id: the request of the answer; None for the one that ended last.
            chars: how many Unicode code points the user got, 0 or more. If that is the whole
                answer, nothing changes.

        Returns:
            False if there is no such turn, or it still runs.
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
        """Find the newest call with this id, and its turn: providers reuse ids. None if there is
        none."""
        for turn in reversed(self._turns):
            for call in reversed(turn.calls):
                if call.call.id == call_id:
                    return turn, call
        return None

    def set_result(self, call: Call, result: str) -> None:
        """Set the result of a call, at any time: later prompts have it instead of the stand-in.

        If the history is over its bounds with the result, the turn of the call may be dropped.

        Args:
            call: the call, as returned by `find_call`.
            result: the text that the model gets.
        """
        call.result = result
        self._apply_bounds()

    def messages(self, turn: Turn) -> list[Message]:
        """Build what the model is sent for a turn: the ended turns before it, then its user text.

        Turns that run side by side do not see each other. If the turn continues after function
        results, these come last, since a model continues only from the end of its prompt.
        """
        messages: list[Message] = []
        for earlier in self._turns:
            if earlier is turn:
                break
            if earlier.ending is not None and not _continues_running_turn(earlier):
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
    """The messages of an ended turn, as the model is sent them."""
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
    """The text of the answer with its mark; None if there is neither."""
    if not turn.text:
        unheard = turn.ending is Ending.INTERRUPTED and not turn.calls
        return INTERRUPTED_BEFORE_TEXT if unheard else None
    if turn.ending is Ending.INTERRUPTED:
        return turn.text + INTERRUPTED_MARK
    if turn.ending is Ending.BROKEN:
        return turn.text + BROKEN_MARK
    return turn.text


def _continues_running_turn(turn: Turn) -> bool:
    before = turn.continues
    while before is not None and before.ending is not None:
        before = before.continues
    return before is not None


def _add_holds(turn: Turn, count: int) -> None:
    held: Turn | None = turn
    while held is not None:
        held.holds += count
        held = held.continues


def _chars(turn: Turn) -> int:
    """What a turn counts against `max_chars`."""
    calls = sum(
        len(call.call.name) + len(call.call.arguments) + len(call.result or "")
        for call in turn.calls
    )
    return len(turn.user_text or "") + len(turn.text) + calls
