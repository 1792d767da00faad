"""The processes of a benchmark: starting, pinning and ending them, and what they use.

Needs only what bargein itself needs, so that the tests can run `--noise` and `--idle`.
"""

import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
STOP_SECONDS = 10.0


_LISTENING = re.compile(r"listening on ws://127\.0\.0\.1:(\d+)/")


class Failed(Exception):
    """A process of the benchmark ended too early, or did not start."""


def _environment() -> dict[str, str]:
    """Our environment, without variables that would change the gateway's provider or settings."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OPENAI_", "BARGEIN_")) and not key.lower().endswith("_proxy")
    }
    return environment | {"BARGEIN_OPS_PORT": "0", "PYTHONUNBUFFERED": "1"}


@contextmanager
def process(
    command: Sequence[str], core: int | None, stderr: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A child process, pinned to a core, with piped standard output. Ended when the block ends."""
    child = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    try:
        pin(child.pid, core)
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


def pin(pid: int, core: int | None) -> None:
    """Let a process run on this core only; None changes nothing."""
    if core is not None and sys.platform == "linux":
        os.sched_setaffinity(pid, [core])


def choose_cores() -> tuple[int | None, int | None]:
    """The core of the server and that of the load; None with fewer than two cores, or where a
    process cannot be pinned."""
    if sys.platform != "linux":
        return None, None
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


def rss_bytes(pid: int) -> int | None:
    """The resident set of a process; None where `/proc` does not tell."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_bytes().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def raise_file_limit() -> int | None:
    """Raise the soft limit of open files: 400 streams need 800 sockets in the server, and the usual
    limit is 1,024.

    Returns:
        The limit now; None where there is none.
    """
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return None if soft == resource.RLIM_INFINITY else soft


def wait_healthy(child: subprocess.Popen[str], port: int) -> None:
    """Wait until GET /health on the port answers with 200.

    Raises:
        Failed: the child ended, or the time limit expired.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at:
        if child.poll() is not None:
            raise Failed(f"{child.args!r} ended with {child.returncode}")
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise Failed(f"{child.args!r} not healthy after {START_SECONDS:g} s")


def read_ready(child: subprocess.Popen[str]) -> int:
    """Read the port from the provider's line `ready <port>`."""
    line = child.stdout.readline() if child.stdout is not None else ""
    if not line.startswith("ready "):
        raise Failed(f"{child.args!r} did not start: {line!r}")
    return int(line.split()[1])


def read_listening(child: subprocess.Popen[str]) -> int:
    """Read the port from what a gateway prints at its start.

    Raises:
        Failed: it ended instead.
    """
    lines = iter(child.stdout.readline, "") if child.stdout is not None else ()
    for line in lines:
        if found := _LISTENING.search(line):
            return int(found[1])
    raise Failed(f"{child.args!r} did not start")


def gateway_command(port: int, llm_url: str, *flags: str) -> list[str]:
    """The daemon with this provider, and no history: only the last user text is POSTed."""
    base = ["--port", str(port), "--llm-url", llm_url, "--llm-model", "bench"]
    return [sys.executable, "run.py", "serve", *base, "--history-messages", "0", *flags]


def provider_command(rate: float) -> list[str]:
    return [sys.executable, "-m", "tests.bench.provider", f"--rate={rate}"]


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile by nearest rank; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
