"""The record of the POSTs that the demo provider received."""

import dataclasses
import enum
import time
from collections import Counter, deque
from dataclasses import dataclass

from gevent.event import Event

MAX_KEPT_POSTS = 1_000  # more than any test reads, and only a few hundred KiB


class Ended(enum.StrEnum):
    """How the answer to a POST ended."""

    FINISHED = "finished"
    CLIENT_CLOSED = "client_closed"
    CUT = "cut"
    """By the scenario, by `DemoProvider.stop`, or by a bug."""


@dataclass(slots=True)
class ReceivedPost:
    """A POST for a chat completion, received with its whole body."""

    number: int
    """In the order of arrival, from 1."""
    received_at: int
    """Milliseconds since the epoch."""
    has_key: bool
    """Whether there was an `Authorization` header; its value is not kept."""
    model: str | None = None
    """As in the request; None where it was refused before its model was read."""
    ended: Ended | None = None
    """None while the answer is under way."""
    ended_at: int | None = None
    """Milliseconds since the epoch."""
    sent_bytes: int = 0
    """Bytes of the answer that the kernel has taken, head and chunk framing included."""


class PostLog:
    """The last `MAX_KEPT_POSTS` POSTs, the number of live answers, and the counts of attempts."""

    def __init__(self) -> None:
        self._posts: deque[ReceivedPost] = deque(maxlen=MAX_KEPT_POSTS)
        self._count = 0
        self._live = 0
        self._idle = Event()
        self._idle.set()
        self._attempts: Counter[str] = Counter()  # by model name

    def begin(self, *, has_key: bool) -> ReceivedPost:
        """Record a POST; its answer is live until `end`."""
        self._live += 1
        self._idle.clear()
        self._count += 1
        post = ReceivedPost(self._count, _now_ms(), has_key)
        self._posts.append(post)
        return post

    def end(self, post: ReceivedPost, ended: Ended) -> None:
        """Record the end of its answer."""
        post.ended, post.ended_at = ended, _now_ms()
        self._live -= 1
        if not self._live:
            self._idle.set()

    def count_attempt(self, model: str) -> int:
        """Count one POST for this model name; returns how many there were, this one included."""
        self._attempts[model] += 1
        return self._attempts[model]

    def wait_idle(self, timeout_seconds: float | None) -> bool:
        """Wait until no answer is live; False where that takes longer."""
        return bool(self._idle.wait(timeout_seconds))

    def copies(self) -> list[ReceivedPost]:
        """The recorded POSTs as of now, oldest first."""
        return [dataclasses.replace(post) for post in self._posts]

    def clear(self) -> None:
        """Forget all POSTs and start all counts again."""
        self._posts.clear()
        self._count = 0
        self._attempts.clear()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
