"""Where a session is in its life, as one table.

A session is OPEN while a client is attached to it, and DETACHED when the connection was lost. It is
LEAVING from the moment on that it takes no more requests: what is live then may still finish (a
drain), or is being stopped (everything else that ends a session). It is OVER when the goodbye was
said; later messages are ignored.

    state      may become
    OPEN       DETACHED, LEAVING
    DETACHED   LEAVING
    LEAVING    OVER
    OVER       -

What is not so pretty: a LEAVING session also has to know whether it may go yet. There are two
reasons to wait, and the last one that ends decides: the pause of a drain (`may_leave`), and
requests that are still live (which its owner knows).
"""

from __future__ import annotations

import enum

from actors.session.port import Goodbye


class Phase(enum.Enum):
    """Where a session is."""

    OPEN = "open"
    DETACHED = "detached"
    LEAVING = "leaving"
    OVER = "over"


_TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.OPEN: frozenset({Phase.DETACHED, Phase.LEAVING}),
    Phase.DETACHED: frozenset({Phase.LEAVING}),
    Phase.LEAVING: frozenset({Phase.OVER}),
    Phase.OVER: frozenset(),
}


class Lifecycle:
    """The phase of one session, and how it will end."""

    def __init__(self) -> None:
        self.phase = Phase.OPEN
        self.goodbye: Goodbye | None = None
        """What to say when nothing is live any more; set when everything was told to stop."""
        self.may_leave = False
        """Whether it says goodbye as soon as nothing is live, without stopping anything."""
        self.ended_by = ""
        """Why it ends, for the log."""

    @property
    def takes_requests(self) -> bool:
        """Whether a new request is accepted."""
        return self.phase in (Phase.OPEN, Phase.DETACHED)

    @property
    def is_ending(self) -> bool:
        """Whether everything was told to stop."""
        return self.goodbye is not None

    @property
    def is_over(self) -> bool:
        """Whether the goodbye was said: later messages are ignored."""
        return self.phase is Phase.OVER

    def detach(self, why: str) -> None:
        """The connection was lost."""
        self._advance(Phase.DETACHED)
        self.ended_by = why

    def leave(self) -> None:
        """Take no more requests; what is live may finish."""
        self._advance(Phase.LEAVING)

    def end_pause(self) -> None:
        """The pause of a drain is over: it may say goodbye as soon as nothing is live."""
        self.may_leave = True

    def end(self, goodbye: Goodbye) -> None:
        """Say this when nothing is live. The first reason to end is the one that is logged; the
        last goodbye is the one that is said."""
        self._advance(Phase.LEAVING)
        self.goodbye = goodbye
        self.ended_by = self.ended_by or goodbye.text

    def finish(self) -> None:
        """The goodbye was said."""
        self._advance(Phase.OVER)

    def _advance(self, phase: Phase) -> None:
        # A later reason to leave, or to end, finds the session on its way already.
        if phase in _TRANSITIONS[self.phase]:
            self.phase = phase
