"""How many of a kind there may be at once, and who is one of them."""

from __future__ import annotations


class Places:
    """The places for one kind, of all clients together.

    Args:
        limit: how many may be taken at once; 0 is no limit.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.taken = 0

    @property
    def are_full(self) -> bool:
        """True when nobody more can take one."""
        return 0 < self.limit <= self.taken

    def place(self) -> Place:
        """One for somebody, not taken yet."""
        return Place(self)


class Place:
    """Somebody's place. Whoever ends gives it back, and may do so more than once."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.is_taken = False

    def take(self) -> bool:
        """Take it; False when all are taken."""
        if self._places.are_full:
            return False
        self._places.taken += 1
        self.is_taken = True
        return True

    def give_back(self) -> None:
        """Somebody else may have it. Nothing when it was not taken, or was given back."""
        if self.is_taken:
            self.is_taken = False
            self._places.taken -= 1
