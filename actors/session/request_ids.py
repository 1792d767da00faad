"""What a session remembers of the ids of requests that are not live: which have ended, which were
refused, and which were interrupted before they came. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from collections import OrderedDict

from actors.words import InterruptReason

MAX_REMEMBERED_IDS = 1000
"""Ids of ended requests that a session remembers, so that none is used twice."""

MAX_EARLY_INTERRUPTS = 100
"""INTERRUPTs of one session that may wait for their request."""

EARLY_INTERRUPT_SECONDS = 30.0
"""How long they wait."""


class RequestIds:
    """The newest ids of each kind; evicted ids are treated as never seen."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, int] = OrderedDict()
        """With what was delivered of each, in code points."""
        self._refused: OrderedDict[str, None] = OrderedDict()
        """They may come again."""
        self._early: OrderedDict[str, tuple[float, InterruptReason]] = OrderedDict()
        """When each was interrupted, and why."""

    def end(self, request_id: str, delivered: int) -> None:
        """A request has ended, and this much of it was delivered, in code points."""
        self._ended[request_id] = delivered
        if len(self._ended) > MAX_REMEMBERED_IDS:
            self._ended.popitem(last=False)

    def use_up(self, request_id: str) -> None:
        """An id is not to come again. Where it ended before, what is known of that stays."""
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
        """How much was delivered of a request, in code points; None when it has not come."""
        delivered = self._ended.get(request_id)
        return 0 if delivered is None and request_id in self._refused else delivered

    def interrupt_early(self, request_id: str, reason: InterruptReason, read_at: float) -> None:
        """A request that has not come was interrupted, at this `time.monotonic()`."""
        self._early[request_id] = (read_at, reason)
        self._early.move_to_end(request_id)
        if len(self._early) > MAX_EARLY_INTERRUPTS:
            self._early.popitem(last=False)

    def _early_reason(self, request_id: str, now: float) -> InterruptReason | None:
        """Why a request that comes now was interrupted before it came; None when it was not."""
        read_at, reason = self._early.get(request_id, (-math.inf, None))
        return reason if now - read_at <= EARLY_INTERRUPT_SECONDS else None

    def take_early(self, request_id: str, now: float) -> InterruptReason | None:
        """Why a request that comes now was interrupted before it came; None when it was not. An
        interrupt holds for one request."""
        reason = self._early_reason(request_id, now)
        self._early.pop(request_id, None)
        return reason
