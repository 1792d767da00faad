"""The command `hash-secret`: makes the hashes for the `--auth-file`.

A secret is never an argument: other users of the machine can read command lines.
"""

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

_MAX_LINE_BYTES = 64 * 1024


class _NoSecretError(Exception):
    """No secret was given, or it cannot be read; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command to its parser."""
    parser.description = (
        "Print the hash of a password, for [accounts] in the file of --auth-file. At a terminal "
        "you type the password twice; otherwise it is the first line of standard input."
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--api-key",
        action="store_true",
        help="hash an existing API key instead, for [api_keys]",
    )
    kind.add_argument(
        "--new-api-key",
        action="store_true",
        help="make a random API key; print the key, which is stored nowhere, and then its hash",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command. Keys and hashes go to standard output, all other text to standard error.

    Returns:
        The exit code: 0, 2 for a secret that cannot be used, 130 for Ctrl-C.

    Raises:
        OSError: reading the secret or printing failed.
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
        return _fail("interrupted", 130)
    except (_NoSecretError, ValueError) as error:
        return _fail(str(error), 2)
    return 0


def _read(what: str) -> str:
    """Read the secret: typed twice at a terminal, or else one line of standard input.

    Raises:
        _NoSecretError: there is none, or it cannot be used.
        OSError: reading failed.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline(_MAX_LINE_BYTES)
        try:
            secret = line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise _NoSecretError("standard input is not UTF-8") from None
    else:
        secret = _ask(f"{what}: ")
        if secret and _ask(f"{what}, once more: ") != secret:
            raise _NoSecretError("the two entries do not match")
    if not secret:
        raise _NoSecretError("no secret was given: type it, or pass it on standard input")
    return secret


def _ask(prompt: str) -> str:
    with warnings.catch_warnings():
        # getpass falls back to showing what is typed, with a warning: make that an error.
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            secret = getpass.getpass(prompt)
            secret.encode()
        except KeyboardInterrupt:
            print(file=sys.stderr)  # ends the line of the prompt
            raise
        except EOFError:
            print(file=sys.stderr)
            raise _NoSecretError("no secret was given") from None
        except UnicodeEncodeError:  # surrogates stand for bytes that are not UTF-8
            raise _NoSecretError("the typed text is not UTF-8") from None
        except getpass.GetPassWarning:
            raise _NoSecretError("this terminal cannot hide what is typed") from None
    return secret


def _advise(words: str, table: str) -> None:
    if sys.stdout.isatty():
        print(f'{words} the file of --auth-file: name = "…" below [{table}]', file=sys.stderr)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
