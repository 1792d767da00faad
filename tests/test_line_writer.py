"""The log's writer: lines that are written later, or lost, counted and told of."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gevent import monkey

from metrics import line_writer
from metrics.line_writer import LineWriter
from tests.fakes import LIMIT
from tests.harness.client import wait_until

close = monkey.get_original("os", "close")  # gevent's closes later


def note(lost: int) -> str:
    return f"lost {lost}\n"


class Pipe:
    """A pipe, and a writer to it whose buffer holds so many bytes."""

    def __init__(self, max_bytes: int = 1000) -> None:
        self.read_end, self.write_end = os.pipe()
        self.writer = LineWriter(self.write_end, note, max_bytes)

    def fill(self) -> int:
        """Fill the pipe itself; returns how many bytes it took."""
        os.set_blocking(self.write_end, False)
        size = 0
        try:
            while True:
                size += os.write(self.write_end, b"." * 4096)
        except BlockingIOError:
            os.set_blocking(self.write_end, True)
            return size

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += os.read(self.read_end, size - len(data))
        return data

    def read_until(self, end: bytes) -> str:
        data = b""
        while not data.endswith(end):
            data += os.read(self.read_end, 65536)
        return data.decode()

    def close(self) -> None:
        for end in (self.read_end, self.write_end):
            with contextlib.suppress(OSError):
                close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_lines_are_written_in_order(pipe: Pipe) -> None:
    for number in range(100):
        pipe.writer.write(f"{number}\n")
        assert number % 10 or pipe.writer.wait_written(LIMIT)
    assert pipe.read_until(b"99\n").split() == [str(number) for number in range(100)]
    assert pipe.writer.lost == 0


def test_what_no_encoding_has_is_escaped(pipe: Pipe) -> None:
    pipe.writer.write("half \ud83d\n")
    assert pipe.read_until(b"\n") == "half \\ud83d\n"


def test_while_nobody_reads_lines_are_lost_and_then_told_of_once(pipe: Pipe) -> None:
    filled = pipe.fill()
    lines = [f"line {number:03}\n" for number in range(500)]  # of 9 bytes
    for line in lines:
        pipe.writer.write(line)
    kept = 1000 // 9
    assert pipe.writer.lost == len(lines) - kept
    assert not pipe.writer.wait_written(0.01)
    pipe.read(filled)
    assert pipe.read_until(b"lost 389\n") == "".join(lines[:kept]) + "lost 389\n"
    pipe.writer.write("after\n")
    assert pipe.read_until(b"after\n") == "after\n"
    assert pipe.writer.lost == 389


def test_a_note_stands_where_lines_are_missing(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_writer, "_BATCH_BYTES", 100)
    filled = pipe.fill()
    for number in range(200):
        pipe.writer.write(f"line {number:03}\n")
    lost = pipe.writer.lost
    # Less than half is written: nothing is taken. (The pipe is read in whole pages.)
    assert lost == 200 - 1000 // 9
    pipe.read(filled)
    assert pipe.writer.wait_written(LIMIT)
    pipe.writer.write("after\n")
    text = pipe.read_until(b"after\n")
    assert text.endswith(f"line {199 - lost:03}\nlost {lost}\nafter\n")


def test_a_line_that_is_too_long_is_lost_alone(pipe: Pipe) -> None:
    pipe.writer.write("x" * 1000 + "\n")
    pipe.writer.write("after\n")
    assert pipe.read_until(b"after\n") == "lost 1\nafter\n"


def test_a_closed_pipe_loses_every_line_and_raises_nothing(pipe: Pipe) -> None:
    close(pipe.read_end)
    for number in range(50):
        pipe.writer.write(f"{number}\n")
        assert pipe.writer.wait_written(LIMIT)
    wait_until(lambda: pipe.writer.lost == 50, "every line was lost")


def test_a_closed_descriptor_loses_every_line_and_raises_nothing() -> None:
    pipe = Pipe()
    pipe.close()
    pipe.writer.write("1\n")
    wait_until(lambda: pipe.writer.lost == 1, "the line was lost")


def test_a_disk_that_was_full_gets_whole_lines_and_the_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    with path.open("wb") as file:
        writer = LineWriter(file.fileno(), note)
        real, room = os.write, 25

        def write(fileno: int, data: bytes) -> int:
            if fileno != file.fileno():
                return real(fileno, data)
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real(fileno, bytes(data)[:room])
            room -= written
            return written

        monkeypatch.setattr(os, "write", write)
        for number in range(6):
            writer.write(f"line {number:03}\n")
            assert writer.wait_written(LIMIT)
        wait_until(lambda: writer.lost == 4, "four lines do not fit")
        room = 1000
        writer.write("after\n")
        assert writer.wait_written(LIMIT)
    assert path.read_text() == "line 000\nline 001\nline 00\nlost 4\nafter\n"


def test_another_process_may_make_the_descriptor_non_blocking(pipe: Pipe) -> None:
    filled = pipe.fill()
    os.set_blocking(pipe.write_end, False)
    pipe.writer.write("late\n")
    assert not pipe.writer.wait_written(0.01)
    pipe.read(filled)
    assert pipe.read_until(b"late\n") == "late\n"
    assert pipe.writer.lost == 0
    assert not os.get_blocking(pipe.write_end)


def test_it_leaves_the_descriptor_blocking(pipe: Pipe) -> None:
    pipe.writer.write("x\n")
    assert pipe.writer.wait_written(LIMIT)
    assert os.get_blocking(pipe.write_end)


def test_the_exit_does_not_wait_for_a_reader() -> None:
    program = (
        "import sys; from metrics.line_writer import LineWriter; writer = LineWriter(1)\n"
        "for _ in range(1000): writer.write('x' * 999 + '\\n')\n"
        "print(writer.wait_written(0.05), file=sys.stderr)\n"
        "sys.exit(7)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stderr.read() == b"False\n"
        assert process.wait(LIMIT) == 7
