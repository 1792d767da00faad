"""The state dump: what every actor and greenlet is doing right now, for a person who debugs."""

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

_WAITING_PACKAGES = ("gevent", "greenlet", "actors.loop.lanes", "actors.loop.readable")
"""Functions in these packages wait on behalf of a caller; the dump shows the caller instead."""

_ROOT = Path(__file__).parents[1]

_tracked: weakref.WeakSet[greenlet] = weakref.WeakSet()

# A signal asks for the dump, so it is logged at any log level.
_log = structlog.wrap_logger(
    None, wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET), component="SYS"
)


def log_state_dump() -> None:
    """Write the state dump to the log. Sleeps between slices, so it must not run in the hub."""
    for event, fields in in_slices(state_dump()):
        _log.info(event, **fields)


def state_dump() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield log events with their fields: one for each actor, then one for each place where
    greenlets wait. Sleeps between slices, so it must not run in the hub."""
    now = time.monotonic()
    actors = sorted(GreenletActor.alive, key=lambda actor: (_kind(actor), actor.actor_urn))
    for actor in actors:
        if actor in GreenletActor.alive:  # it may have ended during a sleep
            inbox: Any = actor.actor_inbox
            yield f"{_kind(actor)} state", {**_describe(actor, now), "mailbox": len(inbox)}
    places = Counter(_waiting_place(one) for one in in_slices(_greenlets()))
    for place, count in places.most_common():
        if place is not None:
            yield "Greenlets", {"count": count, "waiting_in": place}


def track_greenlets() -> None:
    """Remember all greenlets that exist now, for later dumps. Call it before `gc.freeze()`: the
    garbage collector does not list frozen objects."""
    _tracked.update(_greenlets())


def _kind(actor: GreenletActor) -> str:
    return type(actor).__name__.removesuffix("Actor")


def _describe(actor: GreenletActor, now: float) -> dict[str, Any]:
    try:
        return actor.describe(now)
    except Exception as error:
        # A broken actor must be in the dump too. Only the type: the text may hold a user's data.
        return {"actor": actor.actor_urn, "failed_to_describe": type(error).__name__}


def _greenlets() -> set[greenlet]:
    # By type, since isinstance() raises for a weak proxy whose object is gone.
    listed = {one for one in gc.get_objects() if issubclass(type(one), greenlet)}
    return listed | set(_tracked)


def _waiting_place(one: greenlet) -> str | None:
    """What a greenlet runs and where it waits; None for the hub, and for a greenlet that has not
    started or has ended."""
    frames = []
    frame: FrameType | None = one.gr_frame
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    frames = [frame for frame in frames if not _is_in_waiting_package(frame)]
    if not frames or isinstance(one, gevent.hub.Hub):
        return None
    innermost, outermost = frames[0], frames[-1]
    file = Path(innermost.f_code.co_filename)
    is_ours = file.is_relative_to(_ROOT)
    short = file.relative_to(_ROOT) if is_ours else Path(file.parent.name, file.name)
    where = f"{short.as_posix()}:{innermost.f_lineno}"
    return f"{outermost.f_code.co_qualname}, at {innermost.f_code.co_qualname} ({where})"


def _is_in_waiting_package(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "") + "."
    return any(module.startswith(package + ".") for package in _WAITING_PACKAGES)
