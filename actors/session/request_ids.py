"""The ids of requests that are not live: those that ended, were refused, or were interrupted before
they arrived. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from collections import OrderedDict

from actors.words import InterruptReason

MAX_REMEMBERED_IDS = 1000
"""How many ids of ended requests a session remembers, so that no id is used twice."""

MAX_EARLY_INTERRUPTS = 100
"""How many interrupts of one session may wait for their request."""

EARLY_INTERRUPT_SECONDS = 30.0
"""How long an interrupt waits for its request."""


class RequestIds:
    """The newest ids of each kind; evicted ids are treated as never seen."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, int] = OrderedDict()
        """By id: how many code points of the answer were delivered."""
        self._refused: OrderedDict[str, None] = OrderedDict()
        """Ids that the client may use again."""
        self._early: OrderedDict[str, tuple[float, InterruptReason]] = OrderedDict()
        """By id: when and why a request was interrupted that has not arrived."""

    def end(self, request_id: str, delivered: int) -> None:
        """A request has ended. `delivered` counts the code points that were delivered."""
        self._ended[request_id] = delivered
        if len(self._ended) > MAX_REMEMBERED_IDS:
            self._ended.popitem(last=False)

    def use_up(self, request_id: str) -> None:
        """Use up an id, so that it is refused from now on. If it has ended, that record stays."""
        self._ended.setdefault(request_id, 0)
        if len(self._ended) > MAX_REMEMBERED_IDS:
            self._ended.popitem(last=False)

    def has_ended(self, request_id: str) -> bool:
        """Whether the id is used up."""
        return request_id in self._ended

    def refuse(self, request_id: str) -> None:
        """A request was refused."""
        self._refused[request_id] = None
        if len(self._refused) > MAX_REMEMBERED_IDS:
            self._refused.popitem(last=False)

    def delivered(self, request_id: str) -> int | None:
        """How many code points of a request were delivered; None if it has not arrived."""
        delivered = self._ended.get(request_id)
        return 0 if delivered is None and request_id in self._refused else delivered

    def interrupt_early(self, request_id: str, reason: InterruptReason, read_at: float) -> None:
        """A request was interrupted before it arrived.

        Args:
            request_id: the id that the client gave the interrupt.
            reason: why.
            read_at: `time.monotonic()` when the interrupt was read.
        """
        self._early[request_id] = (read_at, reason)
        self._early.move_to_end(request_id)
        if len(self._early) > MAX_EARLY_INTERRUPTS:
            self._early.popitem(last=False)

    def _early_reason(self, request_id: str, now: float) -> InterruptReason | None:
        """Why a request that arrives now was interrupted before; None if it was not."""
        read_at, reason = self._early.get(request_id, (-math.inf, None))
        return reason if now - read_at <= EARLY_INTERRUPT_SECONDS else None

    def take_early(self, request_id: str, now: float) -> InterruptReason | None:
        """Why a request that arrives now was interrupted before; None if it was not. Forgets the
        interrupt, which applies to one request only."""
        reason = self._early_reason(request_id, now)
        self._early.pop(request_id, None)
        return reason
