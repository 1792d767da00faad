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
    """Give a parser the flags of the command."""
    parser.description = (
        "Test a running daemon as one of its clients: ask, interrupt, and check that the answer "
        "really stops. This makes the provider begin a few answers."
    )
    parser.epilog = (
        f"Credentials come from the environment: {KEY_VARIABLE}, or {ACCOUNT_VARIABLE} and "
        f"{PASSWORD_VARIABLE}. Exit code: 0 when all is well, 1 when not, 2 for wrong arguments."
    )
    add = parser.add_argument
    add("--url", default=DEFAULT_URL, help=f"its WebSocket, ws or wss (default: {DEFAULT_URL})")
    add(
        "--ops-url",
        metavar="URL",
        help=f"its metrics (default: {DEFAULT_OPS_URL}, where --url is on this machine too)",
    )
    add("--ca-file", metavar="FILE", help="certificate authorities to trust, for wss and https")
    add(
        "--timeout",
        type=_seconds,
        default=Limits().wait,
        metavar="SECONDS",
        help=f"limit of each wait; all together take eight at most (default: {Limits().wait:g})",
    )
    add("--json", action="store_true", help="print one JSON object, for machines")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


_seconds.__name__ = "number of seconds"


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
