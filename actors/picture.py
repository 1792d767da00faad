"""A picture of everything that is alive, for a person who wonders what the gateway is doing."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import gevent
from greenlet import greenlet

from actors.greenlet import GreenletActor

_LIBRARIES = ("gevent", "greenlet")
"""Where greenlets wait on somebody's behalf: who that is says more."""


def picture() -> Iterator[tuple[str, dict[str, Any]]]:
    """Events and their fields: each actor, then how many greenlets wait where.

    Takes some milliseconds, in which nothing else runs.
    """
    now = time.monotonic()
    actors = sorted(GreenletActor.alive, key=lambda actor: (type(actor).__name__, actor.actor_urn))
    for actor in actors:
        kind = type(actor).__name__.removesuffix("Actor")
        inbox: Any = actor.actor_inbox
        yield f"{kind} state", {**actor.describe(now), "mailbox": len(inbox)}
    places = Counter(_place(one) for one in gc.get_objects() if isinstance(one, greenlet))
    for place, count in places.most_common():
        if place:
            yield "Greenlets", {"count": count, "waiting_in": place}


def _place(one: greenlet) -> str:
    """What a greenlet runs, and where it stands; empty for one that has ended, or the hub."""
    frames = []
    frame: FrameType | None = one.gr_frame
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    ours = [frame for frame in frames if not _is_of_library(frame)]
    if one.dead or not ours or isinstance(one, gevent.hub.Hub):
        return ""
    code = ours[-1].f_code
    stands = ours[0]
    file = Path(stands.f_code.co_filename)
    where = f"{file.parent.name}/{file.name}:{stands.f_lineno}"
    return f"{code.co_qualname}, at {stands.f_code.co_qualname} ({where})"


def _is_of_library(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES
