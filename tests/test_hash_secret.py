"""The command `hash-secret` as a process: with a pipe, and at a terminal."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.access.credentials import PasswordHash, hash_api_key, parse
from tests.harness.daemon import run_to_the_end
from tests.harness.process import ROOT, environment

PASSWORD = "correct horse 电池"
KEY = "key-of-the-kiosk-0123456789"

LIMIT = 15.0  # seconds; bounds a failure


def piped(given: str | bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command with this as its standard input."""
    return subprocess.run(
        [sys.executable, "run.py", "hash-secret", *arguments],
        input=given.encode() if isinstance(given, str) else given,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        timeout=LIMIT,
    )


def refusal(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that a secret is refused with, which does not show it."""
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert KEY not in line
    assert PASSWORD not in line
    return line


# Through a pipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "", "\nanother line\n"])
def test_a_password_becomes_a_line_for_the_file(end: str) -> None:
    done = piped(PASSWORD + end)
    assert (done.returncode, done.stderr) == (0, b"")
    (line,) = done.stdout.decode().splitlines()
    known = parse(f'[accounts]\nalice = "{line}"')
    assert known.is_password("alice", PASSWORD)
    assert not known.is_password("alice", PASSWORD + "\r")


def test_spaces_are_a_part_of_a_password() -> None:
    line = piped(f" {PASSWORD} \n").stdout.decode().strip()
    assert PasswordHash.parse(line).matches(f" {PASSWORD} ")


def test_an_existing_key_becomes_a_line_for_the_file() -> None:
    done = piped(KEY + "\n", "--api-key")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (
        0,
        hash_api_key(KEY) + "\n",
        b"",
    )
    assert parse(f'[api_keys]\nkiosk = "{hash_api_key(KEY)}"').name_of_key(KEY) == "kiosk"


def test_a_new_key_is_printed_once_and_then_its_hash() -> None:
    keys = set()
    for _ in range(2):
        done = piped("", "--new-api-key")
        assert (done.returncode, done.stderr) == (0, b"")
        key, line = done.stdout.decode().splitlines()
        assert re.fullmatch(r"bargein_[\w-]{43}", key)
        assert parse(f'[api_keys]\nkiosk = "{line}"').name_of_key(key) == "kiosk"
        keys.add(key)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("given", "arguments", "words"),
    [
        ("", [], "no secret was given"),
        ("\n", [], "no secret was given"),
        ("", ["--api-key"], "no secret was given"),
        ("short\n", [], "8 to 1024 characters"),
        ("with a\ttab in it\n", [], "control characters"),
        (b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8\n", [], "standard input is not UTF-8"),
        (KEY[:19] + "\n", ["--api-key"], "shorter than 20 characters"),
        (KEY + " \n", ["--api-key"], "only visible ASCII characters"),
        ("x" * 100_000, [], "8 to 1024 characters"),
    ],
)
def test_an_unusable_secret_is_refused_in_one_line(
    given: str | bytes, arguments: list[str], words: str
) -> None:
    assert words in refusal(piped(given, *arguments))


@pytest.mark.parametrize(
    "arguments", [[KEY], ["--api-key", KEY], [f"--api-key={KEY}"], [f"--password={KEY}"]]
)
def test_a_secret_in_the_command_line_is_refused_and_not_shown(arguments: list[str]) -> None:
    refusal(piped(KEY, *arguments))


def test_one_thing_is_hashed_at_a_time() -> None:
    assert "not allowed with" in refusal(piped("", "--api-key", "--new-api-key"))


def test_it_is_explained() -> None:
    shown = run_to_the_end("hash-secret", "--help").stdout
    assert "--auth-file" in shown
    assert "--new-api-key" in shown


def test_a_reader_that_is_gone_is_a_fault_and_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "run.py", "hash-secret", "--new-api-key"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(LIMIT) == 2
    assert said == "error: cannot read or write: Broken pipe\n"


def test_the_example_of_the_page_is_right() -> None:
    page = (ROOT / "gateway" / "README.md").read_text()
    section = page.partition("## Who may connect")[2].partition("\n## ")[0]
    [key] = re.findall(r"^bargein_.*", section, re.MULTILINE)[:1]
    known = parse(section.partition("$ cat auth.toml")[2].partition("\n$")[0])
    assert known.name_of_key(key) == "kiosk"
    assert known.is_password("alice", "correct horse")
    for line in (hash_api_key(key), str(known.accounts["alice"])):
        assert f"\n{line}\n" in section  # as it was printed


# At a terminal -----------------------------------------------------------------------------------

WITH_TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, ".")
import run
sys.exit(run.main(["hash-secret", *sys.argv[1:]]))
"""
"""The command, with its standard input as its terminal: so Ctrl-C is a signal, also where the tests
run in the background of a shell, which has it ignored."""


class Terminal:
    """The command at a terminal, and the keyboard."""

    def __init__(self, *arguments: str, prints_here: bool = False) -> None:
        self._typist, terminal = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_TERMINAL, *arguments],
            cwd=ROOT,
            env=environment(),
            stdin=terminal,
            stdout=terminal if prints_here else subprocess.PIPE,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.shown = ""

    def wait_for(self, words: str) -> None:
        """Wait until the terminal shows this."""
        while words not in self.shown:
            assert self._read(LIMIT), f"nothing more came, after {self.shown!r}"

    def type(self, keys: str) -> None:
        os.write(self._typist, keys.encode())

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, and what it printed; `shown` is all that was seen then."""
        code = self.process.wait(LIMIT)
        while self._read(0):
            pass
        printed = self.process.stdout.read() if self.process.stdout else b""
        return code, printed.decode().splitlines()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)
        if self.process.stdout is not None:
            self.process.stdout.close()
        os.close(self._typist)

    def _read(self, seconds: float) -> bool:
        """Read once; False if nothing came in this time, or the terminal is closed."""
        if not select.select([self._typist], [], [], seconds)[0]:
            return False
        try:
            self.shown += os.read(self._typist, 1024).decode()
        except OSError:  # how Linux says so
            return False
        return True


@pytest.fixture
def at_terminal() -> Iterator[Any]:
    if not hasattr(os, "openpty"):
        pytest.skip("no terminals here")
    terminals: list[Terminal] = []

    def start(*arguments: str, **options: bool) -> Terminal:
        terminals.append(Terminal(*arguments, **options))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_a_password_is_asked_for_twice_and_not_shown(at_terminal: Any) -> None:
    terminal = at_terminal()
    terminal.wait_for("Password: ")
    terminal.type(PASSWORD + "\n")
    terminal.wait_for("Password, once more: ")
    terminal.type(PASSWORD + "\n")
    code, (line,) = terminal.end()
    assert code == 0
    assert PasswordHash.parse(line).matches(PASSWORD)
    assert PASSWORD not in terminal.shown


def test_a_key_is_asked_for_likewise(at_terminal: Any) -> None:
    terminal = at_terminal("--api-key")
    terminal.wait_for("API key: ")
    terminal.type(KEY + "\n")
    terminal.wait_for("API key, once more: ")
    terminal.type(KEY + "\n")
    assert terminal.end() == (0, [hash_api_key(KEY)])
    assert KEY not in terminal.shown


def test_two_different_entries_are_refused(at_terminal: Any) -> None:
    terminal = at_terminal()
    terminal.wait_for("Password: ")
    terminal.type(PASSWORD + "\n")
    terminal.wait_for("once more: ")
    terminal.type(PASSWORD + "!\n")
    assert terminal.end() == (2, [])
    assert terminal.shown.splitlines()[-1] == "error: the two entries do not match"


def test_people_are_told_where_a_hash_belongs(at_terminal: Any) -> None:
    terminal = at_terminal("--new-api-key", prints_here=True)
    assert terminal.end() == (0, [])
    key, line, advice = terminal.shown.splitlines()
    assert hash_api_key(key) == line
    assert "[api_keys]" in advice
    assert "kept nowhere" in advice


@pytest.mark.parametrize(
    ("keys", "code", "words"),
    [
        ("\n", 2, "error: no secret was given: type it, or pass it on standard input"),
        ("\x04", 2, "error: no secret was given"),
        ("\x03", 130, "error: interrupted"),
    ],
    ids=["nothing", "end", "interrupt"],
)
def test_entering_nothing_or_leaving_is_one_line(
    at_terminal: Any, keys: str, code: int, words: str
) -> None:
    terminal = at_terminal()
    terminal.wait_for("Password: ")
    terminal.type(keys)
    assert terminal.end() == (code, [])
    assert terminal.shown.splitlines()[-1] == words
    assert "Traceback" not in terminal.shown
