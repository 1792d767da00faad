"""A Python program as a process of its own: start it, read its output, keep its log, end it.

Standard library in blocking style only, so it works in a plain process and in one patched by
gevent.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TAIL_LINES = 40
"""Shown of a log, in a failure: enough for a traceback, and for what led to it."""


def _root() -> Path:
    """The folder of run.py: `bargein` beside this package where it is installed; in a checkout, the
    folder above `tests`."""
    here = Path(__file__).absolute().parent
    for folder in (here.parent / "bargein", here.parent.parent):
        if (folder / "run.py").is_file():
            return folder
    raise RuntimeError(f"{here} is not installed with bargein, and not in a checkout: no run.py")


ROOT = _root()


def last_lines(log: str) -> str:
    """The end of a log."""
    return "\n".join(log.splitlines()[-TAIL_LINES:])


class ProcessFailed(Exception):
    """A program ended, or printed nothing in time; the message shows the end of its log."""


class Process:
    """A running Python program.

    Args:
        arguments: of the interpreter.
        env: all of its environment.
        cwd: its working directory; None is ours.
        tied: give it a standard input that closes when this process ends, in whatever way.
        timeout: seconds that any wait may take: it only bounds failure.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
        tied: bool = False,
        timeout: float = 15.0,
    ) -> None:
        self.timeout = timeout
        self._said: list[str] = []
        self._was_asked_to_end = False
        # The log goes to a file: a pipe that is not read would stop the program.
        self._folder = tempfile.TemporaryDirectory(prefix="bargein-")
        self._log_file = Path(self._folder.name) / "log"
        self._last_log: bytes | None = None
        try:
            with self._log_file.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=cwd,
                    env=env,
                    stdin=subprocess.PIPE if tied else None,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                )
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    # While it runs.

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def read_line(self) -> str:
        """The next line that it prints on standard output.

        Raises:
            ProcessFailed: it ended, or the time is up; then it is killed.
        """
        return self._read_line(self.timeout)

    def _read_line(self, left: float) -> str:
        assert self._process.stdout is not None
        overdue = threading.Event()

        def give_up() -> None:
            overdue.set()
            self._process.kill()

        line = ""
        if left <= 0:  # checked first, so that a program that never pauses meets it too
            give_up()
        else:
            bound = threading.Timer(left, give_up)
            bound.start()
            try:
                line = self._process.stdout.readline()
            finally:
                bound.cancel()
                bound.join()
        if not line:
            code = self._process.wait()
            how = f"ended with {code}"
            if overdue.is_set():
                how = f"did not print what was awaited within {self.timeout} s"
            raise ProcessFailed(f"the process {how}: {self.output}{self.log_tail()}")
        self._said.append(line)
        return line

    def wait_for_line(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Read lines until one matches as a whole, with its newline.

        Raises:
            ProcessFailed: it ended, or the time for all of them is up; then it is killed.
        """
        until = time.monotonic() + self.timeout
        while (found := pattern.fullmatch(self._read_line(until - time.monotonic()))) is None:
            pass
        return found

    @property
    def output(self) -> str:
        """What was read of its standard output."""
        return "".join(self._said)

    @property
    def log(self) -> str:
        """What it wrote on standard error up to now, or to its end."""
        return self.log_since(0)

    @property
    def log_size(self) -> int:
        """How long its log is now, in bytes."""
        return self._log_file.stat().st_size if self._last_log is None else len(self._last_log)

    def log_since(self, size: int) -> str:
        """What it wrote to its log after the first `size` bytes."""
        if self._last_log is not None:
            data = self._last_log[size:]
        else:
            with self._log_file.open("rb") as log:
                log.seek(size)
                data = log.read()
        return data.decode(errors="replace").replace("\r\n", "\n")

    def log_tail(self) -> str:
        """The end of its log."""
        return last_lines(self.log)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def stop_listening_to_it(self) -> None:
        """Close our end of its standard output."""
        assert self._process.stdout is not None
        self._process.stdout.close()

    # Ending.

    def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        code = self._process.wait(self.timeout)
        assert self._process.stdout is not None
        if not self._process.stdout.closed:
            self._said += self._process.stdout.readlines()
        return code

    def terminate(self) -> None:
        """Ask it to end (SIGTERM; on Windows, which has none, this kills it). Does not wait.

        A second call does nothing: at a second SIGTERM the gateway ends at once.
        """
        if not self._was_asked_to_end:
            self._was_asked_to_end = True
            self._process.terminate()

    def stop(self) -> int:
        """Ask it to end, and kill it if it does not in time; returns its exit code."""
        try:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait()
        finally:
            self.kill()
        return self._process.wait()

    def kill(self) -> None:
        """End it at once, unless it has ended, and free everything but its log."""
        with self._process:  # waits, and closes its pipes
            self._process.kill()
        if self._last_log is None:
            self._last_log = self._log_file.read_bytes()
            self._folder.cleanup()

    @property
    def exit_code(self) -> int | None:
        """Its exit code (minus the number of a signal that killed it); None while it runs."""
        return self._process.poll()


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment, without the variables that would change the gateway's provider."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    # Several gateways run at once, and the default port for metrics is one.
    return ours | {"BARGEIN_OPS_PORT": "0"} | dict(more or {})
