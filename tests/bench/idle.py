"""One user's interrupts beside many idle sessions: `python -m tests.bench --idle`.

The user is this process (core 1), first alone, then beside the idle sessions, with the same gateway
(core 0). The idle sessions are a process of their own with a low priority (core 1, like the
provider). README.md explains the figures.
"""

import argparse
import gc
import math
import os
import subprocess
import sys

import msgspec

from tests.bench.crowd import Counts
from tests.bench.noise import ratio
from tests.bench.processes import (
    Failed,
    choose_cores,
    gateway_command,
    percentile,
    pin,
    process,
    provider_command,
    raise_file_limit,
    read_listening,
    read_ready,
    rss_bytes,
)
from tests.bench.user import Measured, User

INTERVAL_SECONDS = 0.025
"""Between two interrupts of the user: in two minutes there are 4,800 of them, so that the p99.9 is
that of the fifth slowest."""

WARMUP_SECONDS = 2.0
SPARE_FILES = 200
"""Open files besides the sockets of the idle sessions."""

MAX_P999_MS = 10.0
MAX_RATIO = 3.0
"""The limit of the p99.9 beside the idle sessions, and of the maximum's ratio to the calm run."""

LOAD_SECONDS = 30.0
"""For the idle sessions' process to end."""


class Run(msgspec.Struct):
    """What was measured."""

    sessions: int
    register_seconds: float
    calm: Measured
    beside: Measured
    rss_bytes_per_session: float | None
    load: Counts


def beyond(run: Run) -> list[str]:
    """The figures that are beyond the limit, in words."""
    found = [] if run.beside.fault is None else [run.beside.fault]
    p999 = percentile(run.beside.ack_ms, 0.999)
    if p999 > MAX_P999_MS:
        found.append(f"p99.9 {p999:.1f} ms (limit {MAX_P999_MS:g})")
    times = ratio(max(run.beside.ack_ms), max(run.calm.ack_ms))
    if times > MAX_RATIO:
        found.append(f"maximum {times:.1f} x the calm run (limit {MAX_RATIO:g})")
    if run.load.lost:
        found.append(f"{run.load.lost} idle sessions were lost")
    return found


def _measure(
    options: argparse.Namespace, provider_port: int, cores: tuple[int | None, int | None]
) -> Run:
    flags = ["--log-level", "warning", "--max-sessions", str(options.idle + 10)]
    command = gateway_command(0, f"http://127.0.0.1:{provider_port}/v1", *flags)
    with process(command, cores[0]) as server:
        port = read_listening(server)
        with User(port, "bench") as user:
            user.measure(WARMUP_SECONDS, INTERVAL_SECONDS)
            calm = user.measure(options.seconds, INTERVAL_SECONDS)
            if calm.fault is not None:
                raise Failed(f"without idle sessions: {calm.fault}")
            return _beside(options, port, server, user, calm, cores[1])


def _beside(
    options: argparse.Namespace,
    port: int,
    server: subprocess.Popen[str],
    user: User,
    calm: Measured,
    core: int | None,
) -> Run:
    before = rss_bytes(server.pid)
    flags = [f"--sessions={options.idle}", f"--port={port}"]
    with process([sys.executable, "-m", "tests.bench.idle_load", *flags], core) as load:
        word, _, words = (load.stdout.readline() if load.stdout else "").strip().partition(" ")
        if word != "ready":
            raise Failed(f"the idle sessions did not register: {words}")
        after = rss_bytes(server.pid)
        beside = user.measure(options.seconds, INTERVAL_SECONDS)
        load.terminate()
        output, _ = load.communicate(timeout=LOAD_SECONDS)
    if server.poll() is not None:
        raise Failed(f"the gateway ended with {server.returncode}")
    per_session = None if before is None or after is None else (after - before) / options.idle
    counts = msgspec.json.decode(output, type=Counts)
    return Run(options.idle, float(words), calm, beside, per_session, counts)


def _print(run: Run) -> None:
    print(f"{'interrupt -> ack, ms':24}{'alone':>10}{'beside':>10}{'ratio':>8}")
    for name, share in (("p50", 0.5), ("p99.9", 0.999), ("maximum", 1.0)):
        calm, beside = (percentile(one.ack_ms, share) for one in (run.calm, run.beside))
        print(f"{name:24}{calm:>10.2f}{beside:>10.2f}{ratio(beside, calm):>8.1f}")
    print(f"{'interrupts':24}{len(run.calm.ack_ms):>10}{len(run.beside.ack_ms):>10}")
    print(f"{'largest gap, ms':24}{run.calm.gap_ms:>10.0f}{run.beside.gap_ms:>10.0f}")
    size = math.nan if run.rss_bytes_per_session is None else run.rss_bytes_per_session / 1024
    print(f"memory per idle session, KiB: {size:.1f}")
    words = "; ".join(beyond(run)) or "none"
    print(f"{run.sessions} sessions registered in {run.register_seconds:.1f} s; beyond: {words}")


def run(options: argparse.Namespace) -> int:
    """Run the benchmark, and print it. Returns the exit code: 0 if the measurement succeeded."""
    files = raise_file_limit()
    cores = choose_cores()
    pin(os.getpid(), cores[1])
    gc.disable()  # a collection would delay the user; it ends soon
    try:
        if options.idle < 1:
            raise Failed("--idle needs at least 1 session")
        if files is not None and options.idle + SPARE_FILES > files:
            raise Failed(f"{options.idle} sessions need more than {files} open files (ulimit -n)")
        with process(provider_command(options.rate), cores[1]) as provider:
            measured = _measure(options, read_ready(provider), cores)
    except Failed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    if cores[0] is None:
        print("WARNING no core for the load alone: the idle sessions themselves delay the user")
    _print(measured)
    if (alone := percentile(measured.calm.ack_ms, 0.999)) > MAX_P999_MS:
        print(f"WARNING not a quiet machine: p99.9 {alone:.1f} ms without idle sessions")
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(measured), indent=1))
    return 0
