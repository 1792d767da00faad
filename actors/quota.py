"""A shared quota, and one holder's slot."""

from __future__ import annotations


class Quota:
    """A limit on how many of one kind may exist at once, over all clients.

    Args:
        limit: how many slots may be taken at once; 0: no limit.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.taken = 0

    @property
    def is_full(self) -> bool:
        """True when every slot is taken."""
        return 0 < self.limit <= self.taken

    def slot(self) -> Slot:
        """Return a new slot, which is not taken yet."""
        return Slot(self)


class Slot:
    """One holder's share of a quota. Releasing it more than once is harmless."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self.is_taken = False

    def take(self) -> bool:
        """Take the slot. Returns False if the quota is full."""
        if self._quota.is_full:
            return False
        self._quota.taken += 1
        self.is_taken = True
        return True

    def release(self) -> None:
        """Free the slot for another holder. Does nothing when it is not taken."""
        if self.is_taken:
            self.is_taken = False
            self._quota.taken -= 1
