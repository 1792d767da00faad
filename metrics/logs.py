"""The log: one event per line, as text for people or as JSON for machines.

Text form: ``2026-01-31T12:00:00.123Z [WS] [INFO] Received message | {"msg_type": "INTERRUPT"}``.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import MutableMapping
from typing import Any, Literal, Protocol

import msgspec
import structlog

Component = Literal["WS", "ACTOR", "LLM", "SYS"]
Level = Literal["debug", "info", "warning", "error"]

_encoder = msgspec.json.Encoder(enc_hook=str)

_NUMBERS = logging.getLevelNamesMapping()
_lowest = 0
"""Number of the lowest level that is logged."""


class Stream(Protocol):
    """Where lines go: a text file, or a `LineWriter`."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> None: ...


def get_logger(component: Component) -> Any:
    """The logger of one component. Its methods take the event, and its fields as keywords."""
    return structlog.get_logger(component=component)


def configure(level: Level, log_format: Literal["text", "json"], stream: Stream) -> None:
    """Set up logging for the process; call it once, before the first event.

    Args:
        level: the lowest to log; events below it cost next to nothing.
        log_format: text for people, json for machines.
        stream: where the lines go.
    """
    global _lowest
    _lowest = _NUMBERS[level.upper()]
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _text_line if log_format == "text" else _json_line,
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_lowest),
        logger_factory=lambda *_: _Lines(stream),
        cache_logger_on_first_use=True,
    )
    # Libraries log with the standard module; their records become lines of the same form.
    root = logging.getLogger()
    root.handlers[:] = [_ToStructlog()]
    root.setLevel(max(_lowest, logging.WARNING))


def is_logged(level: Level) -> bool:
    """Whether events of this level are logged: where they are not, nothing need be queued."""
    return _NUMBERS[level.upper()] >= _lowest


def lost_lines_note(lost: int) -> str:
    """The line, in the form of all others, that stands where so many lines were lost."""
    event: Any = {"event": "Log lines lost", "component": "SYS", "lost": lost}
    for process in structlog.get_config()["processors"]:
        event = process(None, "warning", event)
    return f"{event}\n"


class _Lines:
    """Writes lines to a stream. A line that cannot be written (full disk, closed pipe) is lost: the
    code that logs must not fail because of it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = info = warning = error = critical = msg


class _ToStructlog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # structlog accepts only the standard levels.
        level = max(record.levelno // 10 * 10, logging.DEBUG)
        get_logger("SYS").log(
            min(level, logging.CRITICAL),
            record.getMessage(),
            logger=record.name,
            exc_info=record.exc_info,
        )


def _text_line(_logger: object, _name: str, event: MutableMapping[str, Any]) -> str:
    head = "{}Z [{}] [{}] {}".format(
        event.pop("timestamp").rstrip("Z")[:23],
        event.pop("component", "SYS"),
        event.pop("level").upper(),
        " ".join(event.pop("event").splitlines()),  # an event of a library may have several lines
    )
    return _printable(f"{head} | {_encoder.encode(event).decode()}" if event else head)


def _json_line(_logger: object, _name: str, event: MutableMapping[str, Any]) -> str:
    return _printable(_encoder.encode(event).decode())


def _printable(line: str) -> str:
    """Escape, as JSON does, what a terminal could obey or a reader take for the end of a line: C1
    controls, line and paragraph separators, controls of the writing direction."""
    return line if line.isprintable() else _UNPRINTABLE.sub(_escape, line)


_UNPRINTABLE = re.compile(r"[^ -~]")


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if char.isprintable():
        return char
    units = char.encode("utf-16-be", errors="surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))
