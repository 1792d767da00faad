"""Measures the gateway against a compact asyncio relay of the same frames: `python -m tests.bench`.

Starts one provider for all runs. Each run has a new server (core 0) and a new driver (core 1, like
the provider). README.md explains the figures.
"""

import argparse
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from tests.bench.driver import Report
from tests.bench.processes import (
    Failed,
    choose_cores,
    free_port,
    gateway_command,
    percentile,
    process,
    provider_command,
    raise_file_limit,
    read_ready,
    wait_healthy,
)

LOAD_CORE_LIMIT = 0.85  # above this, the load itself slows the figures down
TOKENS_SHARE = 0.9  # of what the provider could send; interrupts and new requests cost the rest
FOREIGN_LIMIT = 0.10  # of a core, used by other processes
ROUNDS = 8  # minimum, since the machine's speed changes from one minute to the next
INTERRUPTS = 2000  # per side and level, roughly: a p99 depends on the slowest hundredth of them
INTERRUPTS_PER_SECOND = 0.5  # per stream, on average: one in INTERRUPT_AFTER_SECONDS
DRAWS = 200  # how often the rounds are drawn again, for the range of a ratio

Reports = dict[str, list[Report]]  # side -> one report per run


def relay_command(port: int, llm_url: str) -> list[str]:
    flags = ["--port", str(port), "--llm-url", llm_url]
    return [sys.executable, "-m", "tests.bench.relay", *flags]


SIDES: dict[str, Callable[[int, str], list[str]]] = {
    "gateway": lambda port, llm_url: gateway_command(port, llm_url, "--log-level", "warning"),
    "relay": relay_command,
}


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


def run(options: argparse.Namespace) -> int:
    """Run the benchmark, and print it. Returns the exit code."""
    sides = [options.only] if options.only else list(SIDES)
    raise_file_limit()
    cores = choose_cores()
    results: dict[str, object] = {}
    try:
        with process(provider_command(options.rate), cores[1]) as provider:
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
