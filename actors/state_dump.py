"""A picture of everything that is alive, for a person who wonders what the gateway is doing."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import gevent
import structlog
from greenlet import greenlet

from actors.actor import GreenletActor
from actors.loop.slices import in_slices

_WAITING_PLACES = ("gevent", "greenlet", "actors.loop.lanes", "actors.loop.readable")
"""Where greenlets wait on somebody's behalf: who that is says more."""

_ROOT = Path(__file__).parents[1]

_lasting: weakref.WeakSet[greenlet] = weakref.WeakSet()

# Asked for by a signal of its own, so it comes whatever the level of the log is otherwise.
_log = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET), component="SYS"
)


def log_state_dump() -> None:
    """Write the picture to the log. Others have a turn now and then, so not for the hub."""
    for event, fields in in_slices(state_dump()):
        _log.info(event, **fields)


def state_dump() -> Iterator[tuple[str, dict[str, Any]]]:
    """Events and their fields: each actor, then how many greenlets wait where. Others have a turn
    now and then, so not for the hub."""
    now = time.monotonic()
    actors = sorted(GreenletActor.alive, key=lambda actor: (_kind(actor), actor.actor_urn))
    for actor in actors:
        if actor in GreenletActor.alive:  # still
            inbox: Any = actor.actor_inbox
            yield f"{_kind(actor)} state", {**_described(actor, now), "mailbox": len(inbox)}
    places = Counter(_place(one) for one in in_slices(_greenlets()))
    for place, count in places.most_common():
        if place:
            yield "Greenlets", {"count": count, "waiting_in": place}


def keep_in_state_dump() -> None:
    """To be called before `gc.freeze()`: the collector does not know what is frozen any more."""
    _lasting.update(_greenlets())


def _kind(actor: GreenletActor) -> str:
    return type(actor).__name__.removesuffix("Actor")


def _described(actor: GreenletActor, now: float) -> dict[str, Any]:
    try:
        return actor.describe(now)
    except Exception as error:
        # One that is broken is what somebody may be looking for. What it says may be anything.
        return {"actor": actor.actor_urn, "failed_to_describe": type(error).__name__}


def _greenlets() -> set[greenlet]:
    # By type, since asking a weak proxy for its class may raise.
    found = {one for one in gc.get_objects() if issubclass(type(one), greenlet)}
    return found | set(_lasting)


def _place(one: greenlet) -> str:
    """What a greenlet runs, and where it stands; empty for one that has ended or not begun, and
    for the hub."""
    frames = []
    frame: FrameType | None = one.gr_frame
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    own_frames = [frame for frame in frames if not _is_waiting_place(frame)]
    if not own_frames or isinstance(one, gevent.hub.Hub):
        return ""
    code = own_frames[-1].f_code
    stands = own_frames[0]
    file = Path(stands.f_code.co_filename)
    is_ours = file.is_relative_to(_ROOT)
    short = file.relative_to(_ROOT) if is_ours else Path(file.parent.name, file.name)
    where = f"{short.as_posix()}:{stands.f_lineno}"
    return f"{code.co_qualname}, at {stands.f_code.co_qualname} ({where})"


def _is_waiting_place(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "") + "."
    return any(name.startswith(place + ".") for place in _WAITING_PLACES)
