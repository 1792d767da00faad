"""The life of a session, as one table.

A session is OPEN while a client is attached to it, and DETACHED once the connection is lost. It is
LEAVING once it accepts no more requests. In a drain, its live requests may then still finish; in
every other case they are being stopped. It is OVER after the goodbye; later messages are ignored.

    state      may become
    OPEN       DETACHED, LEAVING
    DETACHED   LEAVING
    LEAVING    OVER
    OVER       -

The table does not say everything: a LEAVING session may have to wait before its goodbye, for two
things. One is the pause of a drain (`may_leave`). The other is its live requests, which the owner
knows. It leaves when both are over.
"""

from __future__ import annotations

import enum

from actors.session.port import Goodbye


class Phase(enum.Enum):
    """The phase of a session's life."""

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
    """The phase of one session, and how the session will end."""

    def __init__(self) -> None:
        self.phase = Phase.OPEN
        self.goodbye: Goodbye | None = None
        """The goodbye to say once no request is live. Set when every request was told to stop."""
        self.may_leave = False
        """Whether the session ends as soon as no request is live: the pause of a drain is over."""
        self.ended_by = ""
        """Why the session ends, for the log."""

    @property
    def takes_requests(self) -> bool:
        """Whether the session accepts new requests."""
        return self.phase in (Phase.OPEN, Phase.DETACHED)

    @property
    def is_ending(self) -> bool:
        """Whether every request was told to stop."""
        return self.goodbye is not None

    @property
    def is_over(self) -> bool:
        """Whether the goodbye was said. Later messages are ignored."""
        return self.phase is Phase.OVER

    def detach(self, why: str) -> None:
        """The connection was lost, for the reason `why`."""
        self._advance(Phase.DETACHED)
        self.ended_by = why

    def leave(self) -> None:
        """Accept no more requests; live ones may finish."""
        self._advance(Phase.LEAVING)

    def end_pause(self) -> None:
        """The pause of a drain is over: it may say goodbye as soon as nothing is live."""
        self.may_leave = True

    def end(self, goodbye: Goodbye) -> None:
        """Set the goodbye to say once no request is live. If there are several, the last is said,
        and the first is the reason in the log."""
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
