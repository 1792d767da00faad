"""Measures the gateway against a compact asyncio relay of the same frames: `python -m tests.bench`.

Starts one provider for all runs. Each run has a new server (core 0) and a new driver (core 1, like
the provider). README.md explains the figures.
"""

import argparse
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil

from tests.bench.driver import Report

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0
STOP_SECONDS = 10.0
LOAD_CORE_LIMIT = 0.85  # above this, the load itself slows the figures down
TOKENS_SHARE = 0.9  # of what the provider could send; interrupts and new requests cost the rest
FOREIGN_LIMIT = 0.10  # of a core, used by other processes
ROUNDS = 8  # minimum, since the machine's speed changes from one minute to the next
INTERRUPTS = 2000  # per side and level, roughly: a p99 depends on the slowest hundredth of them
INTERRUPTS_PER_SECOND = 0.5  # per stream, on average: one in INTERRUPT_AFTER_SECONDS
DRAWS = 200  # how often the rounds are drawn again, for the range of a ratio

Reports = dict[str, list[Report]]  # side -> one report per run


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


def gateway_command(port: int, llm_url: str) -> list[str]:
    flags = ["--port", str(port), "--llm-url", llm_url, "--llm-model", "bench"]
    # No history, like the relay: both POST only the last user text.
    flags += ["--history-messages", "0"]
    return [sys.executable, "run.py", "serve", *flags, "--log-level", "warning"]


def relay_command(port: int, llm_url: str) -> list[str]:
    flags = ["--port", str(port), "--llm-url", llm_url]
    return [sys.executable, "-m", "tests.bench.relay", *flags]


SIDES: dict[str, Callable[[int, str], list[str]]] = {
    "gateway": gateway_command,
    "relay": relay_command,
}


@contextmanager
def process(command: Sequence[str], core: int | None) -> Iterator[subprocess.Popen[str]]:
    """A child process, pinned to a core, with piped standard output. Ended when the block ends."""
    child = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True
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
    if core is not None:
        psutil.Process(pid).cpu_affinity([core])


def choose_cores() -> tuple[int | None, int | None]:
    """The core of the server and that of the load; None with fewer than two cores, or where a
    process cannot be pinned."""
    if not hasattr(psutil.Process, "cpu_affinity"):
        return None, None
    cores = psutil.Process().cpu_affinity() or []
    return (cores[0], cores[1]) if len(cores) > 1 else (None, None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def raise_file_limit() -> None:
    """Raise the soft limit of open files: 400 streams need 800 sockets in the server, and the usual
    limit is 1,024."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


class Bench:
    """The options and the running provider. `run` measures one side once."""

    def __init__(
        self,
        options: argparse.Namespace,
        provider: subprocess.Popen[str],
        provider_port: int,
        cores: tuple[int | None, int | None],
    ) -> None:
        self.options = options
        self.provider = provider
        self.provider_port = provider_port
        self.cores = cores

    def run(self, side: str, streams: int, seed: int) -> Report:
        port = free_port()
        command = SIDES[side](port, f"http://127.0.0.1:{self.provider_port}/v1")
        with process(command, self.cores[0]) as server:
            wait_healthy(server, port)
            values: dict[str, object] = {
                "port": port,
                "server-pid": server.pid,
                "provider-port": self.provider_port,
                "provider-pid": self.provider.pid,
                "streams": streams,
                "seconds": self.options.seconds,
                "warmup": self.options.warmup,
                "rate": self.options.rate,
                "seed": seed,
            }
            flags = [f"--{name}={value}" for name, value in values.items()]
            driver = [sys.executable, "-m", "tests.bench.driver", *flags]
            with process(driver, self.cores[1]) as child:
                limit_seconds = self.options.warmup + self.options.seconds + 90
                try:
                    output, _ = child.communicate(timeout=limit_seconds)
                except subprocess.TimeoutExpired:
                    raise Failed(f"the driver was not done after {limit_seconds:g} s") from None
            if child.returncode != 0:
                raise Failed(f"the driver ended with {child.returncode}")
            if server.poll() is not None:
                raise Failed(f"the {side} ended with {server.returncode}")
            if self.provider.poll() is not None:
                raise Failed(f"the provider ended with {self.provider.returncode}")
        return msgspec.json.decode(output, type=Report)

    def rounds(self, streams: int) -> int:
        """The number of runs of each side at a level."""
        if self.options.rounds is not None:
            return int(self.options.rounds)
        interrupts_per_run: float = streams * INTERRUPTS_PER_SECOND * self.options.seconds
        return max(ROUNDS, math.ceil(INTERRUPTS / interrupts_per_run))

    def level(self, streams: int, sides: Sequence[str]) -> Reports:
        """Run every side once per round, in reversed order in every other round: A B B A."""
        reports: Reports = {side: [] for side in sides}
        for number in range(self.rounds(streams)):
            for side in sides if number % 2 == 0 else reversed(sides):
                print(f"  {streams} streams, {side} ...", file=sys.stderr, flush=True)
                reports[side].append(self.run(side, streams, seed=number))
        return reports


def percentile(values: Sequence[float], share: float) -> float:
    """The percentile by nearest rank; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _pooled(field: str, share: float) -> Callable[[list[Report]], float]:
    return lambda runs: percentile([v for run in runs for v in getattr(run, field)], share)


def _mean(value: Callable[[Report], float]) -> Callable[[list[Report]], float]:
    return lambda runs: statistics.mean(value(run) for run in runs)


FIGURES: dict[str, Callable[[list[Report]], float]] = {
    "CPU per token, us": lambda runs: (
        sum(run.server_cpu for run in runs) / max(1, sum(run.tokens for run in runs)) * 1e6
    ),
    "interrupt -> ack, ms, p50": _pooled("ack_ms", 0.50),
    "interrupt -> ack, ms, p99": _pooled("ack_ms", 0.99),
    "interrupt -> provider sees close, ms, p50": _pooled("close_ms", 0.50),
    "interrupt -> provider sees close, ms, p99": _pooled("close_ms", 0.99),
    "memory, MiB": _mean(lambda run: run.rss_bytes / 2**20),
    "memory per stream, KiB": _mean(
        lambda run: (run.rss_bytes - run.rss_idle_bytes) / 2**10 / run.streams
    ),
    "token's delay, provider -> client, ms, p50": _pooled("delay_ms", 0.50),
    "token's delay, provider -> client, ms, p99": _pooled("delay_ms", 0.99),
    "tokens per frame": lambda runs: (
        sum(run.tokens for run in runs) / max(1, sum(run.frames for run in runs))
    ),
}
# Counts that say whether the run was sound. They have no ratio.
CHECKS: dict[str, Callable[[list[Report]], float]] = {
    "late frames (must be 0)": lambda runs: sum(run.late_frames for run in runs),
    "interrupts": lambda runs: sum(run.interrupts for run in runs),
    "acks missing": lambda runs: sum(run.acks_missing for run in runs),
    "acks that do not say SUCCESS": lambda runs: sum(run.acks_not_stopped for run in runs),
    "closes missing": lambda runs: sum(run.closes_missing for run in runs),
    "upstream POSTs beyond one per request": lambda runs: sum(
        run.posts - run.requests for run in runs
    ),
    "protocol errors": lambda runs: sum(run.error_count for run in runs),
    "tokens per second": _mean(lambda run: run.tokens / run.window),
    "server's CPU, % of a core": _mean(lambda run: run.server_cpu / run.window * 100),
    "driver's CPU, % of a core": _mean(lambda run: run.driver_cpu / run.window * 100),
    "provider's CPU, % of a core": _mean(lambda run: run.provider_cpu / run.window * 100),
}

MUST_BE_0 = {
    "late frames (must be 0)",
    "acks missing",
    "acks that do not say SUCCESS",
    "closes missing",
    "upstream POSTs beyond one per request",
    "protocol errors",
}


def _ratio(row: Mapping[str, float]) -> float:
    return row["gateway"] / row["relay"] if row["relay"] else math.nan


def ratio_range(figure: Callable[[list[Report]], float], reports: Reports) -> tuple[float, float]:
    """The range of 95 % of a figure's ratios when the rounds are drawn again, with replacement and
    in pairs (the percentile bootstrap). NaN with a single round."""
    rounds = range(len(next(iter(reports.values()))))
    if len(rounds) < 2:
        return math.nan, math.nan
    draw = random.Random(0)
    ratios = []
    for _ in range(DRAWS):
        drawn = draw.choices(rounds, k=len(rounds))
        ratios.append(
            _ratio({side: figure([runs[n] for n in drawn]) for side, runs in reports.items()})
        )
    return percentile(ratios, 0.025), percentile(ratios, 0.975)


def summarise(bench: Bench, reports: Reports) -> dict[str, dict[str, float]]:
    """Figures and checks by name and side, with the ratio if both sides were measured."""
    summary: dict[str, dict[str, float]] = {}
    for name, figure in (FIGURES | CHECKS).items():
        row = {side: figure(runs) for side, runs in reports.items()}
        if name in FIGURES and len(row) == 2:
            row["ratio"] = _ratio(row)
            row["from"], row["to"] = ratio_range(figure, reports)
        summary[name] = row
    for label, core in zip(("server's", "load's"), bench.cores, strict=True):
        if core is not None:
            busy = {
                side: statistics.mean(run.cores_busy[core] / run.window * 100 for run in runs)
                for side, runs in reports.items()
            }
            summary[f"{label} core busy, %"] = busy
    return summary


def warnings(bench: Bench, streams: int, reports: Reports) -> Iterator[str]:
    """The reasons why the figures of a run may be wrong."""
    for side, runs in reports.items():
        for number, run in enumerate(runs, 1):
            for what in _doubts(bench, streams, run):
                yield f"{side}, run {number}: {what}"


def _doubts(bench: Bench, streams: int, run: Report) -> Iterator[str]:
    load_cpu = run.driver_cpu + run.provider_cpu
    parts = (("server's", run.server_cpu), ("load's", load_cpu))
    for core, (label, cpu) in zip(bench.cores, parts, strict=True):
        busy = (cpu if core is None else max(cpu, run.cores_busy[core])) / run.window
        foreign = busy - cpu / run.window
        if label == "load's" and busy > LOAD_CORE_LIMIT:
            yield f"the load's core was {busy:.0%} busy: latencies include the load's own"
        if foreign > FOREIGN_LIMIT:
            yield f"{foreign:.0%} of the {label} core went to other processes"
    expected = streams * bench.options.rate
    if run.tokens / run.window < TOKENS_SHARE * expected:
        yield f"{run.tokens / run.window:.0f} tokens/s of about {expected:.0f}"
    for name, check in CHECKS.items():
        if name in MUST_BE_0 and (count := check([run])):
            yield f"{name}: {count:.0f}"
    yield from dict.fromkeys(run.errors)


def print_level(title: str, sides: Sequence[str], summary: dict[str, dict[str, float]]) -> None:
    columns = [*sides, "ratio", "from", "to"] if len(sides) == 2 else list(sides)
    print(f"\n{title}\n{'':44}" + "".join(f"{column:>12}" for column in columns))
    for name, row in summary.items():
        print(f"{name:44}" + "".join(_cell(row.get(column), name) for column in columns))


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return f"{'':>12}"
    return f"{value:>12.0f}" if name in CHECKS and value >= 100 else f"{value:>12.2f}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--streams", default="20,100,400", help="stream counts, comma-separated")
    parser.add_argument("--seconds", type=float, default=8, help="measured seconds of a run")
    parser.add_argument("--warmup", type=float, default=3, help="seconds before measuring starts")
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"runs per side and level; 2 gives A B B A (default: {ROUNDS}, or as many as give "
        f"{INTERRUPTS:,} interrupts)",
    )
    parser.add_argument("--rate", type=float, default=30, help="tokens per second and stream")
    parser.add_argument("--only", choices=sorted(SIDES), help="measure only this side")
    parser.add_argument("--quick", action="store_true", help="20 and 100 streams, 1 round of 3 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report of every run")
    options = parser.parse_args()
    if options.quick:
        options.streams, options.seconds, options.warmup, options.rounds = "20,100", 3, 1, 1
    options.levels = [int(level) for level in options.streams.split(",")]
    return options


def main() -> int:
    options = parse_options()
    sides = [options.only] if options.only else list(SIDES)
    raise_file_limit()
    cores = choose_cores()
    results: dict[str, object] = {}
    provider_command = [sys.executable, "-m", "tests.bench.provider", f"--rate={options.rate}"]
    try:
        with process(provider_command, cores[1]) as provider:
            bench = Bench(options, provider, read_ready(provider), cores)
            for streams in options.levels:
                reports = bench.level(streams, sides)
                summary = summarise(bench, reports)
                title = (
                    f"{streams} streams of {options.rate:g} tokens/s, "
                    f"{bench.rounds(streams)} x {options.seconds:g} s a side"
                )
                print_level(title, sides, summary)
                for warning in warnings(bench, streams, reports):
                    print(f"WARNING {warning}", flush=True)
                results[str(streams)] = {"summary": summary, "runs": reports}
    except Failed as failure:
        print(f"failed: {failure}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
