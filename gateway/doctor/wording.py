"""Numbers, times, and a server's text, for people."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

_MAX_QUOTED_CHARS = 160

_hidden: ContextVar[Sequence[str]] = ContextVar("hidden", default=())


@contextlib.contextmanager
def hiding(secrets: Iterable[str]) -> Iterator[None]:
    """Within this block, `quoted` replaces these texts."""
    longest_first = sorted(secrets, key=len, reverse=True)
    before = _hidden.set(longest_first)
    try:
        yield
    finally:
        _hidden.reset(before)


def quoted(text: str | bytes) -> str:
    """A server's text, cut to one short line, without our secrets and control characters."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    for secret in _hidden.get():  # before it is cut: half a secret would not be found
        text = text.replace(secret, "…")
    text = " ".join(text.split())
    shown = "".join(char if char.isprintable() else "�" for char in text[:_MAX_QUOTED_CHARS])
    return shown + "…" if len(text) > _MAX_QUOTED_CHARS else shown


def span(seconds: float) -> str:
    """A time, for people."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def count(number: int, what: str) -> str:
    """A number of things: `1 piece`, `2 pieces`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
