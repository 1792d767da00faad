"""The benchmarks: `python -m tests.bench`; README.md explains them.

Without --noise or --idle: the gateway beside a plain relay.
"""

import argparse
import sys
from pathlib import Path

IDLE_SESSIONS = 5000


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--noise",
        nargs="?",
        const="all",
        metavar="KIND,KIND",
        help="one user's interrupts beside noise from others; without a value, each kind of noise",
    )
    what.add_argument(
        "--idle",
        nargs="?",
        const=IDLE_SESSIONS,
        type=int,
        metavar="N",
        help=f"one user's interrupts beside N idle sessions (default: {IDLE_SESSIONS:,})",
    )
    parser.add_argument("--streams", default="20,100,400", help="stream counts, comma-separated")
    parser.add_argument(
        "--seconds",
        type=float,
        help="measured seconds of a run (default: 8; with --noise 5, with --idle 120)",
    )
    parser.add_argument("--warmup", type=float, default=3, help="seconds before measuring starts")
    parser.add_argument(
        "--rounds",
        type=int,
        help="runs per side and level; 2 gives A B B A (default: 8, or as many as give 2,000 "
        "interrupts)",
    )
    parser.add_argument("--rate", type=float, default=30, help="tokens per second and stream")
    parser.add_argument("--only", choices=["gateway", "relay"], help="measure only this side")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="20 and 100 streams, 1 round of 3 s; with --noise or --idle, 2 s a run",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report of every run")
    options = parser.parse_args()
    is_alone = options.noise is not None or options.idle is not None
    if options.quick:
        options.streams, options.warmup, options.rounds = "20,100", 1, 1
        options.seconds = 2 if is_alone else 3
    if options.seconds is None:
        options.seconds = 5 if options.noise is not None else 120 if is_alone else 8
    options.levels = [int(level) for level in options.streams.split(",")]
    return options


def main() -> int:
    options = parse_options()
    # Each benchmark is imported when it is chosen: only the comparison needs the extra `bench`.
    if options.noise is not None:
        from tests.bench import noise

        return noise.run(options)
    if options.idle is not None:
        from tests.bench import idle

        return idle.run(options)
    from tests.bench import comparison

    return comparison.run(options)


if __name__ == "__main__":
    sys.exit(main())
