"""The command `doctor`: its arguments, and its exit code."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping

from gateway.doctor.examination import examine
from gateway.doctor.report import TextRenderer, print_json
from gateway.doctor.target import (
    ACCOUNT_VARIABLE,
    DEFAULT_OPS_URL,
    DEFAULT_URL,
    KEY_VARIABLE,
    PASSWORD_VARIABLE,
    UsageError,
    target_of,
)
from gateway.doctor.visit import Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command to its parser."""
    parser.description = (
        "Test a running daemon as one of its clients: ask, interrupt, and check that the answer "
        "really stops. This makes the provider begin a few answers."
    )
    parser.epilog = (
        f"Credentials come from the environment: {KEY_VARIABLE}, or {ACCOUNT_VARIABLE} and "
        f"{PASSWORD_VARIABLE}. Exit code: 0 if all is well, 1 if not, 2 for wrong arguments."
    )
    add = parser.add_argument
    add(
        "--url",
        default=DEFAULT_URL,
        help=f"the daemon's WebSocket, ws or wss (default: {DEFAULT_URL})",
    )
    add(
        "--ops-url",
        metavar="URL",
        help=f"the daemon's metrics (default: {DEFAULT_OPS_URL}, if --url is on this machine)",
    )
    add("--ca-file", metavar="FILE", help="certificate authorities to trust, for wss and https")
    add(
        "--timeout",
        type=_seconds,
        default=Limits().wait,
        metavar="SECONDS",
        help="time limit of each wait; the whole test may take eight times as long "
        f"(default: {Limits().wait:g})",
    )
    add("--json", action="store_true", help="print one JSON object, for machines")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:  # written so that it refuses NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def main(
    args: argparse.Namespace, environ: Mapping[str, str] = os.environ, prog: str = "bargein"
) -> int:
    """Run the command; returns the exit code.

    Args:
        args: as the parser of `add_arguments` gives them.
        environ: the environment.
        prog: how people call this program, for advice.
    """
    try:
        target = target_of(args, environ, prog)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limits = Limits(wait=args.timeout)
    renderer = TextRenderer(sys.stdout, environ)
    try:
        if args.json:
            report = examine(target, limits)
            print_json(report, sys.stdout)
        else:
            renderer.begin(target)
            report = examine(target, limits, renderer.show)
            renderer.end(report)
    except KeyboardInterrupt:
        return 130
    return 0 if report.holds else 1
