"""A real server as a process: started on a free port, waited for, measured, killed.

Linux only: what the server does is read from /proc.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.client import wait_until
from tests.harness.process import environment

_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE_WINDOW_SECONDS = 0.5
_IDLE_SHARE = 0.1
"""Of one core. Waiting servers were seen to use up to 0.05, generating ones 0.4 and more."""

# No server asks a hub, reports home, or takes more than a core.
_ENV = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class RealServer:
    """A running server and all its children.

    Args:
        command: how to start it; `{port}` in an argument becomes a free port.
        folder: where it runs, and where its log goes.
        health: path that answers 200 once it serves.
        key: sent as a bearer token where its own API is asked.
        env: more environment variables.
        timeout: seconds that its start may take: it only bounds failure.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: Path,
        *,
        health: str,
        key: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120.0,
    ) -> None:
        self.folder = folder
        self._health = health
        self._key = key
        self._env = environment({**_ENV, **(env or {})})
        self._timeout = timeout
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._command = [str(part).replace("{port}", str(self.port)) for part in command]
        self._log = folder / "server.log"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until(self._serves, f"{self._command} serves", self._timeout)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def base_url(self) -> str:
        """What the gateway is told."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def log(self) -> str:
        """What it wrote up to now."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> tuple[int, str]:
        """GET a path of it; returns status and body."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        """Processor time that it and its children have used."""
        return sum(self._family().values())

    def cpu_share(self) -> float:
        """How much of one core it uses now, over a short while."""
        began, before = time.monotonic(), self.cpu_seconds()
        time.sleep(_IDLE_WINDOW_SECONDS)  # the length of what is measured
        return (self.cpu_seconds() - before) / (time.monotonic() - began)

    def is_idle(self) -> bool:
        """Whether it computes nothing, over a short while."""
        return self.cpu_share() < _IDLE_SHARE

    def _serves(self) -> bool:
        assert self._process.poll() is None, f"{self._command} ended:\n{self.log[-4000:]}"
        with suppress(OSError, HTTPException):
            return self.get(self._health)[0] == 200
        return False

    def _family(self) -> dict[int, float]:
        """It and its children, by process id, with the processor time of each in seconds."""
        family = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # that one has just ended
                # proc(5): after the name, which may hold anything, the fields from `state` on
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:  # its session
                    family[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
        return family

    def _end(self) -> None:
        # Before it is waited for: until then its id, and so its session's, is nobody else's.
        for pid in self._family():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
