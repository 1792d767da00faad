"""One user's interrupts beside noise from others: `python -m tests.bench --noise`.

For each kind of noise there is a new gateway (core 0). The user is this process (core 1): first
without noise, then with it. The noise is a process of its own with a low priority (core 1, like the
provider). README.md explains the figures.
"""

import argparse
import contextlib
import gc
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from gateway.access.credentials import PasswordHash, hash_api_key, new_api_key
from tests.bench.crowd import Counts
from tests.bench.noise_load import ACCOUNT, KINDS
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

INTERVAL_SECONDS = 0.5
"""Between two interrupts of the user."""

CALM_SHARE = 0.4
"""Of the measured seconds, for the run without noise: so that all kinds take under five minutes."""

WARMUP_SECONDS = 0.3

MAX_RATIO = 3.0
ALWAYS_MS = 10.0
"""A time is within the limit up to this ratio to the calm run, or up to so many milliseconds."""

NOISE_SECONDS = 10.0
"""For the noise to begin, and to end."""


class Run(msgspec.Struct):
    """What was measured beside one kind of noise."""

    calm: Measured
    noisy: Measured
    rss_growth_bytes: int | None
    """Of the gateway, from before the noise to the highest figure during it."""
    noise: Counts


def ratio(noisy: float, calm: float) -> float:
    return noisy / calm if calm else math.nan


def is_within(noisy_ms: float, calm_ms: float) -> bool:
    """Whether a time beside noise keeps to the limit."""
    return noisy_ms <= max(MAX_RATIO * calm_ms, ALWAYS_MS)


def beyond(run: Run) -> list[str]:
    """The figures of a run that are beyond the limit, in words; none is good."""
    found = [] if run.noisy.fault is None else [run.noisy.fault]
    p99, calm_p99 = (percentile(one.ack_ms, 0.99) for one in (run.noisy, run.calm))
    if not is_within(p99, calm_p99):
        found.append(f"interrupt p99 {p99:.1f} ms")
    if not is_within(run.noisy.gap_ms, run.calm.gap_ms):
        found.append(f"gap {run.noisy.gap_ms:.0f} ms")
    return found


class Bench:
    """The running provider, and where everything runs. `measure` measures one kind."""

    def __init__(
        self, provider_port: int, cores: tuple[int | None, int | None], folder: Path
    ) -> None:
        self.llm_url = f"http://127.0.0.1:{provider_port}/v1"
        self.cores = cores
        self.folder = folder
        self.api_key = new_api_key()
        self.auth_file = folder / "auth.toml"
        password = PasswordHash.of(secrets.token_urlsafe())
        self.auth_file.write_text(
            f'[api_keys]\nbench = "{hash_api_key(self.api_key)}"\n'
            f'[accounts]\n{ACCOUNT} = "{password}"\n'
        )

    def measure(self, name: str, seconds: float) -> Run:
        """Measure a kind of noise: for so long with it, and `CALM_SHARE` of that without.

        Raises:
            Failed: a process ended, or did not start.
        """
        flags = ["--auth-file", str(self.auth_file)] if KINDS[name].needs_auth else []
        command = gateway_command(0, self.llm_url, *flags)
        with self._log(name) as log, process(command, self.cores[0], log) as server:
            port = read_listening(server)
            with User(port, self.api_key) as user:
                user.measure(WARMUP_SECONDS, WARMUP_SECONDS / 3)
                calm = user.measure(CALM_SHARE * seconds, INTERVAL_SECONDS)
                if calm.fault is not None:
                    raise Failed(f"without noise: {calm.fault}")
                return self._beside(name, port, server, user, calm, seconds)

    def _beside(
        self,
        name: str,
        port: int,
        server: subprocess.Popen[str],
        user: User,
        calm: Measured,
        seconds: float,
    ) -> Run:
        before = rss_bytes(server.pid)
        highest = before or 0

        def look() -> None:
            nonlocal highest
            highest = max(highest, rss_bytes(server.pid) or 0)

        flags = [f"--kind={name}", f"--port={port}"]
        with process(
            [sys.executable, "-m", "tests.bench.noise_load", *flags], self.cores[1]
        ) as load:
            if load.stdout is None or load.stdout.readline() != "ready\n":
                raise Failed(f"the noise {name} did not start")
            noisy = user.measure(seconds, INTERVAL_SECONDS, look)
            look()
            load.terminate()
            output, _ = load.communicate(timeout=NOISE_SECONDS)
        if server.poll() is not None:
            raise Failed(f"the gateway ended with {server.returncode}")
        growth = None if before is None else highest - before
        return Run(calm, noisy, growth, msgspec.json.decode(output, type=Counts))

    @contextlib.contextmanager
    def _log(self, name: str) -> Iterator[IO[bytes]]:
        """The gateway's log goes to a file, as in operation; it is kept only while it is needed."""
        path = self.folder / f"{name}.log"
        try:
            with path.open("wb") as log:
                yield log
        finally:
            path.unlink()


HEAD = (
    f"{'noise':27}{'p50, ms':>9}{'ratio':>7}{'p99, ms':>9}{'ratio':>7}{'gap, ms':>9}{'ratio':>7}"
    f"{'RSS, MiB':>10}  within"
)


def _line(name: str, run: Run) -> str:
    cells = ""
    for share in (0.5, 0.99):
        calm, noisy = (percentile(one.ack_ms, share) for one in (run.calm, run.noisy))
        cells += f"{noisy:>9.2f}{ratio(noisy, calm):>7.1f}"
    cells += f"{run.noisy.gap_ms:>9.0f}{ratio(run.noisy.gap_ms, run.calm.gap_ms):>7.1f}"
    growth = run.rss_growth_bytes
    cells += f"{'-' if growth is None else f'{growth / 2**20:+.1f}':>10}"
    return f"{name:27}{cells}  {'; '.join(beyond(run)) or 'yes'}"


def choose_kinds(wanted: str) -> list[str]:
    """The kinds that `--noise` names, in its order; all of them for `all`.

    Raises:
        Failed: it names one that is not there.
    """
    names = list(KINDS) if wanted == "all" else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in KINDS:
            raise Failed(f"no such kind of noise: {name!r}; there are: {', '.join(KINDS)}")
    return names


def run(options: argparse.Namespace) -> int:
    """Run the benchmark, and print it. Returns the exit code: 0 if the measurement succeeded."""
    raise_file_limit()
    cores = choose_cores()
    pin(os.getpid(), cores[1])
    gc.disable()  # a collection would delay the user; it ends soon
    runs: dict[str, Run] = {}
    try:
        names = choose_kinds(options.noise)
        with (
            tempfile.TemporaryDirectory() as folder,
            process(provider_command(options.rate), cores[1]) as provider,
        ):
            bench = Bench(read_ready(provider), cores, Path(folder))
            if cores[0] is None:
                print("WARNING no core for the load alone: the noise itself delays the user")
            print(HEAD)
            for name in names:
                runs[name] = bench.measure(name, options.seconds)
                print(_line(name, runs[name]), flush=True)
                if (alone := percentile(runs[name].calm.ack_ms, 0.99)) > ALWAYS_MS:
                    print(f"WARNING not a quiet machine: {alone:.1f} ms without noise", flush=True)
                if not runs[name].noise.sent_bytes:
                    print(f"WARNING {name}: no noise came through", flush=True)
    except Failed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    kinds = [name for name, one in runs.items() if beyond(one)]
    limit = f"{MAX_RATIO:g} x the calm run or {ALWAYS_MS:g} ms"
    print(f"beyond {limit}: {len(kinds)} of {len(runs)} kinds: {', '.join(kinds) or 'none'}")
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(runs), indent=1))
    return 0
