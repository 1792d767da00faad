"""`run.py hash-secret`: makes the hashes for a file of credentials, without any secret in a command
line, where everybody could read it."""

from __future__ import annotations

import argparse
import getpass
import sys
import warnings

from gateway.access.credentials import (
    PasswordHash,
    check_api_key,
    check_password,
    hash_api_key,
    new_api_key,
)

_MOST_LINE_BYTES = 64 * 1024


class _NotGivenError(Exception):
    """There is no secret; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the flags of this command."""
    parser.description = (
        "Prints the hash of a password, for [accounts] in the file of --auth-file. It is asked for "
        "twice at a terminal, and else is the first line of standard input."
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--api-key",
        action="store_true",
        help="hash an API key that there is already, for [api_keys]",
    )
    kind.add_argument(
        "--new-api-key",
        action="store_true",
        help="make an API key that nobody can guess, and print it, this once, and then its hash",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 0, 2 for a secret that cannot be used, 130 for
    Ctrl-C. A hash is on standard output, everything else on standard error.

    Raises:
        OSError: the secret cannot be read, or what is to be printed written.
    """
    try:
        if args.new_api_key:
            api_key = new_api_key()
            print(api_key)
            print(hash_api_key(api_key), flush=True)
            _advise("The key is for the client, and is kept nowhere. Its hash is for", "api_keys")
        elif args.api_key:
            api_key = _read("API key")
            check_api_key(api_key)
            print(hash_api_key(api_key), flush=True)
            _advise("This hash is for", "api_keys")
        else:
            password = _read("Password")
            check_password(password)
            print(PasswordHash.of(password), flush=True)
            _advise("This hash is for", "accounts")
    except KeyboardInterrupt:
        return _refuse("interrupted", 130)
    except (_NotGivenError, ValueError) as error:
        return _refuse(str(error), 2)
    return 0


def _read(what: str) -> str:
    """The secret that is given, in whichever way.

    Raises:
        _NotGivenError: none is.
        OSError: it cannot be read.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline(_MOST_LINE_BYTES)
        try:
            secret = line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise _NotGivenError("standard input is not UTF-8") from None
    else:
        secret = _ask(f"{what}: ")
        if secret and _ask(f"{what}, once more: ") != secret:
            raise _NotGivenError("that was not the same twice")
    if not secret:
        raise _NotGivenError("nothing was given: it is asked for, or read from standard input")
    return secret


def _ask(prompt: str) -> str:
    with warnings.catch_warnings():
        # It would rather show what is typed than not ask.
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            secret = getpass.getpass(prompt)
            secret.encode()
        except KeyboardInterrupt:
            print(file=sys.stderr)  # the line of the prompt ends here
            raise
        except EOFError:
            print(file=sys.stderr)
            raise _NotGivenError("nothing was given") from None
        except UnicodeEncodeError:  # its bytes were no text
            raise _NotGivenError("what was typed is not UTF-8") from None
        except getpass.GetPassWarning:
            raise _NotGivenError("this terminal would show what is typed") from None
    return secret


def _advise(words: str, table: str) -> None:
    if sys.stdout.isatty():
        print(f'{words} the file of --auth-file: name = "…" below [{table}]', file=sys.stderr)


def _refuse(words: str, code: int) -> int:
    print(f"error: {words}", file=sys.stderr)
    return code
