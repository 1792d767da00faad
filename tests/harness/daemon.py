"""The daemon as a process of its own, as an operator starts it.

with Daemon("--llm-url", provider.base_url, "--llm-model", "test") as daemon:
    client = Client(daemon.port)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping

from .process import ROOT, Process, environment

LISTENING = re.compile(r"listening on (?P<url>ws://(?P<host>\S+):(?P<port>\d+)/ws/agent/stream)\n")
"""What the daemon prints when clients can connect."""


class Daemon(Process):
    """A running daemon on a free port, killed on leaving.

    Args:
        arguments: of its command line; `--port 0` is added.
        env: more environment variables; those of ours that would change its provider are left out.
        launcher: Python source to run in place of run.py, with the same arguments.
        timeout: seconds that any wait may take: it only bounds failure.
    """

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        launcher: str | None = None,
        timeout: float = 15.0,
    ) -> None:
        super().__init__(
            [*_program(launcher), *arguments, "--port", "0"],
            env=environment(env),
            cwd=ROOT,
            timeout=timeout,
        )
        try:
            found = self.wait_for_line(LISTENING)
            self.read_line()  # which provider it uses
        except BaseException:
            self.kill()
            raise
        self.host, self.port = found["host"], int(found["port"])


def _program(launcher: str | None) -> list[str]:
    return ["-c", launcher] if launcher else ["run.py"]


def run_to_the_end(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    launcher: str | None = None,
    timeout: float = 15.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        [sys.executable, *_program(launcher), *arguments],
        cwd=ROOT,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
