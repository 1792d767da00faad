"""The command line: patching first, then arguments and what they ask for."""

from __future__ import annotations

# Step 1: before anything opens a file. Where standard input, output or error is closed, the next
# file that is opened gets its number, and what is printed or logged would go into that file (a
# client's socket, say). So open it on nothing.
import os

for _number in (0, 1, 2):
    try:
        os.fstat(_number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one

import signal

_early_hangups: list[int] = []
"""SIGHUPs that came before the daemon could handle them."""

if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
    # It asks the daemon to reload: it must not end it before it can listen.
    signal.signal(signal.SIGHUP, lambda number, _frame: _early_hangups.append(number))

# Step 2: patch, before any other import and in no other file. From here on sockets, locks and
# sleeps switch to other greenlets. `ares` resolves names without threads: gevent's default resolver
# has ten, and an interrupted look-up keeps its thread until the name server's last timeout.
import gevent

gevent.config.resolver = "ares"
# The spawn tree with a stack for each greenlet is for debugging, and costs more than all the rest.
gevent.config.track_greenlet_tree = False

import gevent.monkey

gevent.monkey.patch_all()

import sys
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).absolute().parent
_ROOMS = ("actors", "gateway", "llm", "metrics")


def _is_ours(package: ModuleType, room: str) -> bool:
    """Whether it is the folder beside this file, even if its path is spelled differently."""
    ours = (_HERE / room).resolve()
    return any(Path(one).resolve() == ours for one in getattr(package, "__path__", ()))


def _put_our_rooms_first() -> None:
    """Make `import gateway` and the like find the packages beside this file, in this process only.

    The sources import each other by these names, while the wheel installs everything below
    `bargein`. Others use the same names: PyPI has an `llm`, and a project may have a `gateway` of
    its own. Where one of those was imported already (by a .pth file, say), forget it.
    """
    if sys.path[:1] != [str(_HERE)]:
        sys.path.insert(0, str(_HERE))
    for room in _ROOMS:
        found = sys.modules.get(room)
        if found is not None and not _is_ours(found, room):
            for name in [one for one in sys.modules if one.partition(".")[0] == room]:
                del sys.modules[name]


# Step 3: before the first import of a room.
_put_our_rooms_first()

import argparse
import re
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from gateway.access import hash_secret
from gateway.app import bargein_version
from gateway.daemon import reload, serve, serve_demo
from gateway.doctor import command as doctor
from gateway.process import Console
from gateway.settings.options import add_flags, default_config
from gateway.settings.program import program
from gateway.settings.settings import Settings, SettingsError
from gateway.settings.sources import ConfigSources
from llm.demo import server as demo
from metrics.logs import configure


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line. Takes no abbreviated flags: a later flag could change what an
    abbreviation means."""

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
        prog=program(),
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
        help="check the settings: print each error, or each value that is set and its source",
    )
    add_flags(check_parser)
    commands.add_parser(
        "default-config",
        help="print a settings file for --config that explains every setting",
    )
    doctor_parser = commands.add_parser(
        "doctor",
        help="test a running daemon step by step: does it answer, does an interrupt stop it?",
    )
    doctor.add_arguments(doctor_parser)
    hash_secret.add_arguments(
        commands.add_parser(
            "hash-secret",
            help="print the hash of a password or an API key, for the --auth-file",
        )
    )
    demo_parser = commands.add_parser(
        "demo-llm",
        help="run only the demo provider, for any client of the OpenAI API",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=demo.describe_scenarios(),
    )
    add = demo_parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=_port, default=0, help="port to listen on (default: a free port)")
    add(
        "--tokens-per-second",
        type=_pace,
        default=demo.TOKENS_PER_SECOND,
        metavar="N",
        help="speed of an answer, above 0 (default: %(default)g)",
    )
    return parser


def _port(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return value


def _pace(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not value > 0:  # written so that it refuses NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: its arguments, without the program's name; None takes those of this process.

    Returns:
        The exit code.

    Raises:
        SystemExit: help or the version was printed (0), or the arguments are wrong (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in _TOP_LEVEL):
        arguments.insert(0, "serve")
    parser = make_parser()
    args, strays = parser.parse_known_args(arguments)
    if strays and args.command in ("demo-llm", "default-config", "doctor"):
        parser.error(f"unexpected argument for {args.command}: {strays[0].partition('=')[0]}")
    if strays and args.command == "hash-secret":  # do not print it: it may be the secret
        parser.error(
            "unexpected argument for hash-secret: "
            "it prompts for the secret, or reads it from standard input"
        )
    if args.command == "demo-llm":
        console = Console()
        configure("info", _log_format(), console.log)
        _hang_up_as_usual()
        try:
            return serve_demo(console, args.host, args.port, args.tokens_per_second)
        finally:
            console.end()
    if args.command != "serve":
        _hang_up_as_usual()
    if args.command == "doctor":
        return doctor.main(args, prog=program())
    if args.command == "hash-secret":
        try:
            return hash_secret.main(args)
        except OSError as error:
            _leave_standard_output()
            parser.error(f"cannot read or write: {error.strerror or error}")
    if args.command == "default-config":
        _print(default_config().rstrip())
        return 0

    def read_settings() -> ConfigSources:
        return ConfigSources(vars(args), os.environ, strays)

    console = Console()
    try:
        given = read_settings()
        faults: list[str] = []
        try:
            settings = Settings.of(given)
        except SettingsError as error:
            faults = error.faults
        for warning in given.warnings:
            console.complain(f"warning: {warning}")
        for fault in faults:
            console.complain(f"error: {fault}")
        if faults:
            return 2
        if args.command == "check-config":
            _print("\n".join(["ok", *given.report()]))
            return 0
        config = given.config
        configure(config.log_level, config.log_format or _log_format(), console.log)
        code = serve(
            settings,
            console,
            lambda gateway: reload(gateway, config, read_settings),
            was_hung_up=lambda: bool(_early_hangups),
        )
        console.end()
        # Python's own way to end frees every object one by one. After a flood of clients that takes
        # seconds, while the time limit of the shutdown is over.
        os._exit(code)
    finally:
        console.end()


def _hang_up_as_usual() -> None:
    """Let SIGHUP end this process, which has nothing to reload; not if it is ignored (nohup)."""
    if hasattr(signal, "SIGHUP") and callable(signal.getsignal(signal.SIGHUP)):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if _early_hangups:
            signal.raise_signal(signal.SIGHUP)


def _log_format() -> Literal["text", "json"]:
    return "text" if os.isatty(2) else "json"


def _print(text: str) -> None:
    """Print; give up standard output if its reader is gone."""
    try:
        print(text, flush=True)
    except OSError:
        _leave_standard_output()


def _leave_standard_output() -> None:
    """Redirect standard output to nowhere, after a write to it failed.

    Otherwise Python writes its buffer again when it ends, fails again, and exits with code 120.
    """
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


_TOP_LEVEL = ("-h", "--help", "--version")

if __name__ == "__main__":
    sys.exit(main())
