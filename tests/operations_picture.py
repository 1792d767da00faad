"""Draw what Prometheus sees of traffic: `python -m tests.operations_picture [OUT.png]`.

Daemons with the demo provider, a Prometheus server that scrapes them, and clients that ask, listen,
interrupt and ask anew. What is drawn comes from Prometheus' range API alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from tests.harness.client import Client
from tests.harness.daemon import Daemon
from tests.harness.process import ROOT
from tests.test_prometheus import Prometheus, free_port

SECONDS = 90
WINDOW_SECONDS = 15
"""Every point is about so much time before it."""

TALKERS = {"story:100": 27, "cut:100": 3}
"""Clients by the model of their daemon: a story of some nine seconds, and one that breaks off."""

HEARS_OUT, ASKS_ANEW = 0.2, 0.25
"""Shares of requests that are not interrupted, and that a new REQUEST interrupts."""

MAX_PATIENCE_SECONDS = 3.0
REQUESTS_OF_SESSION = 5

LATENCY = f"""histogram_quantile(%s,
    sum by (stage, le) (rate(bargein_interrupt_seconds_bucket[{WINDOW_SECONDS}s])))"""
OUTCOMES = f"sum by (outcome) (rate(bargein_requests_total[{WINDOW_SECONDS}s]))"

QUANTILES = {"0.5": "-", "0.95": "--", "0.99": ":"}
STAGES = {"stream_closed": "#0072b2", "acknowledged": "#d55e00"}
OUTCOME_COLOURS = {
    "completed": "#009e73",
    "interrupted": "#56b4e9",
    "failed": "#cc3311",
    "reaped": "#999999",
}


def talk(port: int, seed: int, until: float) -> None:
    """One user after another, each in a session of its own."""
    chance = random.Random(seed)
    while time.monotonic() < until:
        with Client(port) as client:
            for _ in range(REQUESTS_OF_SESSION):
                request_id = client.request("Tell me a story")
                if chance.random() < HEARS_OUT:
                    client.wait_terminal(request_id)
                elif not ends_within(
                    client, request_id, chance.uniform(0.05, MAX_PATIENCE_SECONDS)
                ):
                    if chance.random() < ASKS_ANEW:
                        continue
                    client.interrupt(request_id)
                    client.wait_ack()
                    client.wait_terminal(request_id)
                if time.monotonic() > until:
                    break
            client.close()


def ends_within(client: Client, request_id: str, seconds: float) -> bool:
    """Listen for so long; True when the request has ended by then."""
    deadline = time.monotonic() + seconds
    looked_at = len(client.frames)
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(TimeoutError):
            client.read_within(left)
        for frame in client.frames[looked_at:]:
            if frame.is_terminal and frame.payload["request_id"] == request_id:
                return True
        looked_at = len(client.frames)
    return False


class Drive:
    """Traffic, and the server that has watched it from `began` to `ended`.

    Args:
        stack: what is started ends with it.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ops_ports = [free_port() for _ in TALKERS]
        daemons = [
            stack.enter_context(Daemon("--ops-port", str(ops_port), "--llm-model", model))
            for ops_port, model in zip(ops_ports, TALKERS, strict=True)
        ]
        targets = [f"127.0.0.1:{ops_port}" for ops_port in ops_ports]
        self._prometheus = Prometheus(Path(folder), targets)
        stack.callback(self._prometheus.stop)
        self._prometheus.wait_value('sum(up{job="bargein"})', len(targets))
        self._began = time.time()
        ports = [
            daemon.port
            for daemon, talkers in zip(daemons, TALKERS.values(), strict=True)
            for _ in range(talkers)
        ]
        until = time.monotonic() + SECONDS
        with ThreadPoolExecutor(len(ports)) as pool:
            talks = [pool.submit(talk, port, seed, until) for seed, port in enumerate(ports)]
            time.sleep(SECONDS)
            self._ended = time.time()
            self.load = os.getloadavg()[0]
            """Processes that ran or wanted to in the last minute, ours and all others."""
        for one in talks:
            one.result()

    def series(self, expression: str, label: str) -> dict[str, tuple[list[float], list[float]]]:
        """Seconds since the traffic began, and values, by the value of a label."""
        data = self._prometheus.get(
            "query_range",
            query=expression,
            start=str(self._began + WINDOW_SECONDS),
            end=str(self._ended),
            step="1",
        )
        return {
            one["metric"][label]: (
                [float(at) - self._began for at, _ in one["values"]],
                [float(value) for _, value in one["values"]],
            )
            for one in data["result"]
        }


def draw(drive: Drive, out: Path) -> None:
    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(
        f"bargein, {sum(TALKERS.values())} clients, as Prometheus sees it"
        f" (each point: the {WINDOW_SECONDS} s before it);"
        f" all on {os.cpu_count()} cores, load average {drive.load:.1f}"
    )
    latency, outcomes = figure.subplots(2, 1, sharex=True)
    draw_latency(drive, latency)
    draw_outcomes(drive, outcomes)
    for axes in (latency, outcomes):
        axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    outcomes.set_xlim(WINDOW_SECONDS, SECONDS)
    outcomes.set_xlabel("seconds since the traffic began")
    drawn = io.BytesIO()
    figure.savefig(drawn)
    # With a palette it takes a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(64).save(out, format="PNG", optimize=True)


def draw_latency(drive: Drive, axes: Axes) -> None:
    found = {quantile: drive.series(LATENCY % quantile, "stage") for quantile in QUANTILES}
    for stage, colour in STAGES.items():
        for quantile, style in QUANTILES.items():
            at, seconds = found[quantile][stage]
            axes.plot(
                at,
                [one * 1000 for one in seconds],
                style,
                color=colour,
                linewidth=1.8,
                label=f"{stage}, p{float(quantile) * 100:.0f}",
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("ms (log scale)")
    axes.set_title("Interrupt latency: from reading INTERRUPT to the end of the stage", loc="left")


def draw_outcomes(drive: Drive, axes: Axes) -> None:
    found = drive.series(OUTCOMES, "outcome")
    shown = [name for name in OUTCOME_COLOURS if any(found[name][1])]
    axes.stackplot(
        found[shown[0]][0],
        *(found[name][1] for name in shown),
        labels=shown,
        colors=[OUTCOME_COLOURS[name] for name in shown],
    )
    axes.set_ylabel("requests per second")
    axes.set_ylim(bottom=0)
    axes.set_title("Requests ended, by outcome (stacked)", loc="left")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "metrics" / "operations.png")
    args = parser.parse_args(argv)
    if which("prometheus") is None:
        parser.error("prometheus is not installed (Debian's package prometheus)")
    with contextlib.ExitStack() as stack:
        draw(Drive(stack), args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
