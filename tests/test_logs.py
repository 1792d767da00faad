"""The log's lines, for people and for machines."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import structlog

from metrics.logs import Level, configure, get_logger

LEVELS: tuple[Level, ...] = get_args(Level)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is set up once per process; here it is taken back after each test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def text_lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def json_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_text_form_is_that_of_the_contract() -> None:
    stream = io.StringIO()
    configure("info", "text", stream)
    get_logger("WS").info("Received message", msg_type="INTERRUPT", session_id=None)
    (line,) = text_lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z .*", line)
    assert line[24:] == (
        ' [WS] [INFO] Received message | {"msg_type":"INTERRUPT","session_id":null}'
    )


def test_an_event_without_fields_has_none() -> None:
    stream = io.StringIO()
    configure("info", "text", stream)
    get_logger("SYS").warning("Supervisor restarted")
    assert text_lines(stream)[0].endswith("Z [SYS] [WARNING] Supervisor restarted")


def test_the_json_form_is_one_object_a_line() -> None:
    stream = io.StringIO()
    configure("info", "json", stream)
    get_logger("LLM").error("Generation failed", request_id="req_1", error="no\nway, 你好")
    (line,) = json_lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "component": "LLM",
        "level": "error",
        "event": "Generation failed",
        "request_id": "req_1",
        "error": "no\nway, 你好",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_value_cannot_break_out_of_its_line(log_format: Any) -> None:
    stream = io.StringIO()
    configure("info", log_format, stream)
    get_logger("WS").info("Refused message", detail='"}\n2026 [SYS] [ERROR] forged \r\x1b[2J')
    assert len(stream.getvalue().strip("\n").splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_below_the_level_is_not_logged(level: Level) -> None:
    stream = io.StringIO()
    configure(level, "json", stream)
    logger = get_logger("SYS")
    for name in LEVELS:
        getattr(logger, name)("event")
    assert [line["level"] for line in json_lines(stream)] == list(LEVELS[LEVELS.index(level) :])


class Odd:
    def __str__(self) -> str:
        return "an odd one"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_any_value_can_be_logged(log_format: Any) -> None:
    stream = io.StringIO()
    configure("info", log_format, stream)
    values = [Odd(), b"bytes", {1, 2}, 10**400, float("nan"), ValueError("no"), {"a": (1, None)}]
    for value in values:
        get_logger("SYS").info("event", value=value)
    assert len(text_lines(stream)) == len(values)
    assert "an odd one" in stream.getvalue()


def test_an_event_of_several_lines_is_logged_on_one() -> None:
    stream = io.StringIO()
    configure("info", "text", stream)
    logging.getLogger("some.library").warning("bad header: %r\n2026 [SYS] [ERROR] forged", "x")
    (line,) = text_lines(stream)
    assert " [SYS] [WARNING] bad header: 'x' 2026 [SYS] [ERROR] forged | " in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_logged_with_its_traceback_on_the_one_line_of_its_event(
    log_format: Any,
) -> None:
    stream = io.StringIO()
    configure("info", log_format, stream)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        get_logger("LLM").exception("Reader failed", request_id="req_1")
        logging.getLogger("some.library").exception("failed")
    ours, librarys = text_lines(stream)
    assert "Reader failed" in ours
    for line in (ours, librarys):
        fields = json.loads(line if log_format == "json" else line.split(" | ", 1)[1])
        assert fields["exception"].startswith("Traceback")
        assert fields["exception"].endswith("RuntimeError: broken")


def test_libraries_lines_have_the_same_form_from_warning_on() -> None:
    stream = io.StringIO()
    configure("debug", "json", stream)
    library = logging.getLogger("some.library")
    library.info("chatter with a header: %s", "Bearer sk-key")
    library.warning("100%% of %s", "it")
    library.log(35, "a level of its own")
    library.log(logging.CRITICAL + 5, "the worst")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        library.exception("failed")
    lines = json_lines(stream)
    assert [(line["level"], line["event"]) for line in lines] == [
        ("warning", "100% of it"),
        ("warning", "a level of its own"),
        ("critical", "the worst"),
        ("error", "failed"),
    ]
    assert all(line["component"] == "SYS" for line in lines)
    assert all(line["logger"] == "some.library" for line in lines)
    assert "RuntimeError: broken" in lines[-1]["exception"]


class Broken(io.StringIO):
    """A stream on a disk that is full."""

    def __init__(self) -> None:
        super().__init__()
        self.tries = 0

    def write(self, _text: str) -> int:
        self.tries += 1
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_is_lost_without_an_error() -> None:
    stream = Broken()
    configure("info", "json", stream)
    get_logger("ACTOR").error("Actor failed")
    logging.getLogger("some.library").error("failed")
    assert stream.tries == 2


def test_a_log_that_was_closed_is_no_error() -> None:
    stream = io.StringIO()
    configure("info", "text", stream)
    stream.close()
    get_logger("ACTOR").error("Actor failed")
