"""The daemon as a process of its own, as an operator starts it.

    with Daemon("--llm-url", provider.base_url, "--llm-model", "test") as daemon:
        client = Client(daemon.port)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0

Standard library in blocking style only, so it works in a plain process and in one patched by
gevent.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
_LISTENING = re.compile(r"listening on ws://(?P<host>\S+):(?P<port>\d+)/ws/agent/stream\n")


class Daemon:
    """A running daemon on a free port.

    Args:
        arguments: of its command line; `--port 0` is added.
        env: more environment variables; those that would change its provider are taken away.
        launcher: Python source that is run in place of run.py (with its arguments).
        timeout: seconds that any wait may take: it only bounds failure.
    """

    host: str
    port: int

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        launcher: str | None = None,
        timeout: float = 15.0,
    ) -> None:
        self.timeout = timeout
        self._command = [*command(launcher), *arguments, "--port", "0"]
        self._env = environment(env)
        self._said: list[str] = []

    def __enter__(self) -> Self:
        # Its log goes to a file, so that nobody need read it for it to go on.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            while (found := _LISTENING.fullmatch(self._read_line())) is None:
                pass
            self._read_line()  # which provider it uses
        except BaseException:
            self._end()
            raise
        self.host, self.port = found["host"], int(found["port"])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def stop_listening_to_it(self) -> None:
        """Close our end of its standard output."""
        assert self._process.stdout is not None
        self._process.stdout.close()

    def wait(self) -> int:
        """Wait until it has ended; returns its exit code."""
        code = self._process.wait(self.timeout)
        assert self._process.stdout is not None
        if not self._process.stdout.closed:
            self._said += self._process.stdout.readlines()
        return code

    def wait_for_output(self, words: str) -> None:
        """Wait until it prints a line with these words on standard output."""
        while words not in self._read_line():
            pass

    @property
    def output(self) -> str:
        """What it printed on standard output, as far as it was waited for."""
        return "".join(self._said)

    @property
    def log(self) -> str:
        """What it wrote on standard error up to now."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode()

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        self._said.append(line)
        assert line, f"the daemon ended: {self.output}{self.log}"
        return line

    def _end(self) -> None:
        with self._log, self._process:
            self._process.kill()


def command(launcher: str | None = None) -> list[str]:
    """How to start run.py, or a launcher in its place."""
    return [sys.executable, "-c", launcher] if launcher else [sys.executable, "run.py"]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without what would change the daemon's provider."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return ours | dict(more or {})


def run_to_the_end(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    launcher: str | None = None,
    timeout: float = 15.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command line that ends by itself."""
    return subprocess.run(
        [*command(launcher), *arguments],
        cwd=ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
