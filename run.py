"""The command line."""

from __future__ import annotations

# First of all, and nowhere else: from here on sockets, locks and sleeps give way to other
# greenlets. `ares` resolves names without threads: gevent's usual resolver has ten, and a look-up
# that was interrupted keeps its own until the name server's last time-out.
import gevent

gevent.config.resolver = "ares"
# Who spawned whom, with a stack for each greenlet, is for debugging and costs more than the rest.
gevent.config.track_greenlet_tree = False

import gevent.monkey

gevent.monkey.patch_all()

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from gateway.access import hash_secret
from gateway.app import bargein_version
from gateway.daemon import leave_standard_output, reload, say, serve, serve_demo
from gateway.doctor import command as doctor
from gateway.settings.options import add_flags, default_config
from gateway.settings.settings import Settings, SettingsError
from gateway.settings.sources import ConfigSources
from llm.demo import server as demo
from metrics.logs import configure


class _Parser(argparse.ArgumentParser):
    """A fault is one line, and a flag is what its whole name says: a new one takes no other's."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        message = re.sub(
            r"ignored explicit argument .*", "takes no value", message, flags=re.DOTALL
        )
        self.exit(2, f"error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="run.py",
        description="A gateway between chat clients and LLMs where an interruption really stops.",
    )
    parser.add_argument("--version", action="version", version=f"bargein {bargein_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser(
        "serve",
        help="run the daemon (the default)",
    )
    add_flags(serve_parser)
    check_parser = commands.add_parser(
        "check-config",
        help="say what is wrong with the settings of a `serve`, or which are set and where",
    )
    add_flags(check_parser)
    commands.add_parser(
        "default-config",
        help="print a file of settings for --config, with every setting explained",
    )
    doctor_parser = commands.add_parser(
        "doctor",
        help="examine a running daemon step by step: does it answer, do interruptions stop?",
    )
    doctor.add_arguments(doctor_parser)
    hash_secret.add_arguments(
        commands.add_parser(
            "hash-secret",
            help="print the hash of a password or of an API key, for the file of --auth-file",
        )
    )
    demo_parser = commands.add_parser(
        "demo-llm",
        help="run the demo provider on its own, for any client of OpenAI's API",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=demo.describe_scenarios(),
    )
    add = demo_parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=_port, default=0, help="port to listen on (default: a free one)")
    add(
        "--tokens-per-second",
        type=_pace,
        default=demo.TOKENS_PER_SECOND,
        metavar="N",
        help="pace of an answer, above 0 (default: %(default)g)",
    )
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise ValueError
    return value


_port.__name__ = "port"


def _pace(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not value > 0:  # so written, it refuses NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in _TOP_LEVEL):
        arguments.insert(0, "serve")
    parser = make_parser()
    args, strays = parser.parse_known_args(arguments)
    if strays and args.command in ("demo-llm", "default-config", "doctor"):
        parser.error(f"{args.command} does not know {strays[0].partition('=')[0]}")
    if strays and args.command == "hash-secret":  # which one, is not said: it may be the secret
        parser.error("hash-secret takes no more: it asks for the secret, or reads standard input")
    if args.command == "demo-llm":
        configure("info", _log_format())
        return serve_demo(args.host, args.port, args.tokens_per_second)
    if args.command == "doctor":
        return doctor.main(args)
    if args.command == "hash-secret":
        try:
            return hash_secret.main(args)
        except OSError as error:
            leave_standard_output()
            parser.error(f"cannot be read or written: {error.strerror or error}")
    if args.command == "default-config":
        say(default_config().rstrip())
        return 0

    def read() -> ConfigSources:
        return ConfigSources(vars(args), os.environ, strays)

    given = read()
    for warning in given.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        settings = Settings.of(given)
    except SettingsError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    if args.command == "check-config":
        say("\n".join(["ok", *given.report()]))
        return 0
    config = given.config
    configure(config.log_level, config.log_format or _log_format())
    return serve(settings, lambda gateway: reload(gateway, config, read()))


def _log_format() -> Literal["text", "json"]:
    return "text" if sys.stderr.isatty() else "json"


_TOP_LEVEL = ("-h", "--help", "--version")

if __name__ == "__main__":
    sys.exit(main())
