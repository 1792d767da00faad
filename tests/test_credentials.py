"""Who may register: the file of credentials, API keys, passwords and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from gateway.access.credentials import (
    MIN_KEY_CHARS,
    Credentials,
    CredentialsError,
    PasswordHash,
    check_api_key,
    check_password,
    hash_api_key,
    new_api_key,
    parse,
)
from gateway.settings.settings import Settings, SettingsError
from gateway.settings.sources import ConfigSources

KEY, OTHER_KEY = "bargein_key-of-the-kiosk", "bargein_key-of-the-others"
PASSWORD = "correct horse"
SALT = bytes(range(16))
HASH = PasswordHash.of(PASSWORD, SALT)  # takes long, so once

GOOD = f"""
[api_keys]
kiosk = "{hash_api_key(KEY)}"

[accounts]
alice = "{HASH}"
"""


@pytest.fixture
def scrypts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Each call of scrypt, with what it costs."""
    calls: list[dict[str, Any]] = []

    def counted(password: bytes, **cost: Any) -> bytes:
        calls.append(cost)
        return hashlib.sha256(password + cost["salt"]).digest()

    monkeypatch.setattr("gateway.access.credentials.hashlib.scrypt", counted)
    return calls


# API keys ----------------------------------------------------------------------------------------


def test_a_key_is_found_by_its_hash_and_no_other_one_is() -> None:
    known = parse(GOOD)
    assert known.name_of_key(KEY) == "kiosk"
    for wrong in ("", OTHER_KEY, KEY[:-1], KEY + " ", KEY.upper(), hash_api_key(KEY), "kiosk"):
        assert known.name_of_key(wrong) is None


def test_the_hash_of_a_key_is_its_sha_256() -> None:
    assert hash_api_key(KEY) == "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()
    upper = GOOD.replace(hash_api_key(KEY), hash_api_key(KEY).upper().replace("SHA", "sha"))
    assert parse(upper).name_of_key(KEY) == "kiosk"


def test_a_new_key_is_256_bits_by_chance_and_may_be_used() -> None:
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        check_api_key(key)
        assert len(key) - len("bargein_") == 43  # base64 of 32 bytes


def test_a_key_that_could_be_guessed_is_refused() -> None:
    check_api_key("k" * MIN_KEY_CHARS)
    with pytest.raises(ValueError, match=r"shorter than 20 characters.*--new-api-key"):
        check_api_key("k" * (MIN_KEY_CHARS - 1))


@pytest.mark.parametrize("char", [" ", "\t", "\x00", "\x7f", "é", "键"])
def test_a_key_is_of_characters_that_keys_have(char: str) -> None:
    with pytest.raises(
        ValueError, match="may contain only visible ASCII characters, and no spaces"
    ) as caught:
        check_api_key(KEY + char)
    assert KEY not in str(caught.value)


# Passwords ---------------------------------------------------------------------------------------


def test_a_password_is_right_for_its_account_only() -> None:
    known = parse(GOOD)
    assert known.is_password("alice", PASSWORD)
    assert not known.is_password("alice", PASSWORD + "!")
    assert not known.is_password("bob", PASSWORD)
    assert not known.is_password("Alice", PASSWORD)


def test_a_hash_is_read_as_it_was_written() -> None:
    assert PasswordHash.parse(str(HASH)) == HASH
    assert str(HASH).startswith(f"scrypt:16384:8:1:{SALT.hex()}:")


def test_the_hash_of_a_password_is_what_scrypt_gives() -> None:
    digest = hashlib.scrypt(PASSWORD.encode(), salt=SALT, n=16384, r=8, p=1, dklen=32)
    assert HASH.digest == digest


def test_the_same_password_has_another_hash_each_time(scrypts: list[dict[str, Any]]) -> None:
    first, second = PasswordHash.of(PASSWORD), PasswordHash.of(PASSWORD)
    assert first.salt != second.salt
    assert first.digest != second.digest
    assert [len(cost["salt"]) for cost in scrypts] == [16, 16]


def test_a_password_is_the_same_however_a_keyboard_composes_it(
    scrypts: list[dict[str, Any]],
) -> None:
    known = Credentials(accounts={"alice": PasswordHash.of("caf\u00e9 mocha")})
    assert known.is_password("alice", "cafe\u0301 mocha")
    assert not known.is_password("alice", "cafe mocha")
    assert not known.is_password("alice", "CAF\u00c9 MOCHA")


def test_an_account_that_is_not_there_costs_what_one_that_is_does(
    scrypts: list[dict[str, Any]],
) -> None:
    dear = PasswordHash(2**15, 8, 2, b"d" * 16, b"x" * 32)
    known = Credentials(accounts={"alice": dear})
    assert not known.is_password("alice", "wrong")
    assert not known.is_password("nobody", "wrong")
    for_known, for_unknown = scrypts
    assert for_known == for_unknown


def test_an_unknown_account_costs_the_same_each_time(scrypts: list[dict[str, Any]]) -> None:
    # Where hashes differ in cost, one that changes from time to time would tell.
    hashes = {f"a{n}": PasswordHash(2**14, 8, n, b"s" * 16, b"x" * 32) for n in range(1, 9)}
    known = Credentials(accounts=hashes)
    for _ in range(5):
        known.is_password("nobody", "wrong")
    assert len(scrypts) == 5
    assert len({cost["p"] for cost in scrypts}) == 1


def test_an_unknown_account_never_matches_the_hash_it_is_compared_with() -> None:
    # It is alice's, and this is her password.
    assert not Credentials(accounts={"alice": HASH}).is_password("mallory", PASSWORD)


def test_what_cannot_be_a_password_costs_nothing(scrypts: list[dict[str, Any]]) -> None:
    known = Credentials(accounts={"alice": HASH})
    assert not known.is_password("alice", "x" * 1025)
    assert not Credentials({b"": "kiosk"}).is_password("alice", PASSWORD)
    assert scrypts == []


def test_digests_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("gateway.access.credentials.hmac.compare_digest", compare)
    assert HASH.matches(PASSWORD)
    assert compared == [(HASH.digest, HASH.digest)]


@pytest.mark.parametrize(
    ("password", "words"),
    [
        ("", "8 to 1024 characters"),
        ("1234567", "8 to 1024 characters"),
        ("x" * 1025, "8 to 1024 characters"),
        ("with\x00nothing", "control characters"),
        ("two\nlines of it", "control characters"),
    ],
)
def test_a_password_that_is_too_easy_or_cannot_be_typed_is_refused(
    password: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check_password(password)


@pytest.mark.parametrize("password", ["12345678", "x" * 1024, "密码也可以是中文的", " in spaces "])
def test_other_passwords_may_be_used(password: str) -> None:
    check_password(password)


# Costs -------------------------------------------------------------------------------------------

END = str(HASH).split(":", 4)[4]


def costing(n: int, r: int, p: int) -> str:
    return f"scrypt:{n}:{r}:{p}:{END}"


@pytest.mark.parametrize(
    "cost", [(2**14, 8, 1), (2**15, 8, 3), (2**17, 8, 1), (2**17, 8, 2), (2**14, 8, 16)]
)
def test_a_hash_may_cost_more_than_ours(cost: tuple[int, int, int]) -> None:
    parsed = PasswordHash.parse(costing(*cost))
    assert (parsed.n, parsed.r, parsed.p) == cost


def test_scrypt_gets_the_memory_that_the_dearest_hash_needs() -> None:
    assert not PasswordHash.parse(costing(2**17, 8, 2)).matches("wrong")


@pytest.mark.parametrize(
    "cost",
    [(2**18, 8, 1), (2**17, 16, 1), (2**14, 8, 17), (2**14, 2**10, 1), (2**40, 8, 1)],
)
def test_a_hash_cannot_ask_for_gigabytes_or_minutes(cost: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a cost that is too high"):
        PasswordHash.parse(costing(*cost))


@pytest.mark.parametrize(
    "cost", [(2**13, 8, 1), (2**14, 7, 1), (2**14, 8, 0), (0, 8, 1), (2**14 + 1, 8, 1)]
)
def test_a_hash_cannot_be_one_that_is_guessed_quickly(cost: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="a cost that is too low"):
        PasswordHash.parse(costing(*cost))


@pytest.mark.parametrize(
    "end",
    [
        END[:-1],
        END[:-2],
        END + "00",
        END[2:],
        f"{'0' * 130}:{HASH.digest.hex()}",
        f"{'0' * 33}:{HASH.digest.hex()}",
    ],
)
def test_an_incomplete_hash_is_refused(end: str) -> None:
    with pytest.raises(ValueError, match="is an incomplete hash, or has extra characters"):
        PasswordHash.parse(f"scrypt:16384:8:1:{end}")


# The file ----------------------------------------------------------------------------------------


def faults_of(text: str) -> list[str]:
    with pytest.raises(CredentialsError) as caught:
        parse(text)
    shown = "\n".join(caught.value.faults)
    assert all("\n" not in fault for fault in caught.value.faults)
    for secret in (KEY, PASSWORD, hash_api_key(KEY)[7:], END, HASH.digest.hex()):
        assert secret not in shown
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no client could register: the file has no API key and no account"),
        (
            "[api_keys]\n[accounts]",
            "no client could register: the file has no API key and no account",
        ),
        ("[api_keys", "not valid TOML: "),
        ("[api_keys]\nkiosk = sha256:00", "not valid TOML: "),
        (
            f"{GOOD}[acounts]",
            "unknown entry acounts: only the tables [api_keys] and [accounts] are",
        ),
        (f"{'k' * 200} = 1\n{GOOD}", "unknown entry (too long to show): only the tables"),
        (f'kiosk = "{hash_api_key(KEY)}"', "unknown entry kiosk: only the tables"),
        ("api_keys = 'sha256:00'", "api_keys is not a table: start it with the line [api_keys]"),
        (
            f"[api_keys]\nkiosk = '{KEY}'",
            "api_keys.kiosk is not a hash made by hash-secret --api-key (sha256:…)",
        ),
        (f"[api_keys]\nkiosk = '{hash_api_key(KEY)}0'", "api_keys.kiosk is not a hash"),
        (f"[api_keys]\nkiosk = ' {hash_api_key(KEY)}'", "api_keys.kiosk is not a hash"),
        (
            f"[api_keys]\nkiosk = '{HASH}'",
            "api_keys.kiosk is the hash of a password: move it to [accounts]",
        ),
        ("[api_keys]\nkiosk = 5", "api_keys.kiosk is not a hash: write it as a string in quotes"),
        (
            "[api_keys]\nkiosk.one = ''",
            "api_keys.kiosk is a table: put a name with a dot in quotes",
        ),
        ("[api_keys]\n'' = ''", "api_keys: the name of entry 1 must have 1 to 32 characters"),
        (f"[api_keys]\n{KEY + KEY} = 'kiosk'", "api_keys: the name of entry 1 must have 1 to 32"),
        (
            '[api_keys]\n"a\\nb" = "x"',
            "api_keys: 'a\\nb' must be printable, without spaces at its ends",
        ),
        (
            '[api_keys]\n"a " = "x"',
            "api_keys: 'a ' must be printable, without spaces at its ends",
        ),
        (
            f"{GOOD}[api_keys.more]",
            "api_keys.more is a table",
        ),
        (
            f"[accounts]\nalice = '{PASSWORD}'",
            "accounts.alice is not a hash made by hash-secret (scrypt:…)",
        ),
        (
            f"[accounts]\nalice = '{hash_api_key(KEY)}'",
            "accounts.alice is the hash of an API key: move it to [api_keys]",
        ),
        (f"[accounts]\n'a b' = '{HASH}0'", "accounts.'a b' is an incomplete hash"),
        (f"[accounts]\n{'a' * 129} = '{HASH}'", "accounts: the name of entry 1 must have 1 to 128"),
        (f"[accounts]\na = '{costing(2**30, 8, 1)}'", "accounts.a has a cost that is too high"),
        (
            GOOD.replace("[accounts]", f'second = "{hash_api_key(KEY)}"\n[accounts]'),
            "api_keys.second is the same key as kiosk",
        ),
    ],
)
def test_a_fault_of_the_file_is_one_line_that_names_its_place(text: str, fault: str) -> None:
    (line,) = faults_of(text)
    assert line.startswith(fault)


def test_all_faults_of_a_file_are_named() -> None:
    lines = faults_of(f"x = 1\n[api_keys]\na = 1\nb = 'b'\n[accounts]\nc = '{PASSWORD}'")
    beginnings = ["unknown entry x: only", "api_keys.a is", "api_keys.b is", "accounts.c is"]
    assert len(lines) == len(beginnings)
    assert all(line.startswith(begin) for line, begin in zip(lines, beginnings, strict=True))


def test_two_accounts_may_have_the_same_password() -> None:
    assert set(parse(f"[accounts]\na = '{HASH}'\nb = '{HASH}'").accounts) == {"a", "b"}


def test_names_may_be_in_any_language() -> None:
    known = parse(f"[api_keys]\n'展厅' = '{hash_api_key(KEY)}'\n[accounts]\n'a@b.c' = '{HASH}'")
    assert known.name_of_key(KEY) == "展厅"
    assert set(known.accounts) == {"a@b.c"}


def test_a_repr_shows_no_hash() -> None:
    shown = repr(parse(GOOD)) + repr(HASH)
    assert hash_api_key(KEY)[7:] not in shown
    assert HASH.digest.hex() not in shown
    assert repr(HASH.digest) not in shown
    assert "alice" not in shown


# As a setting ------------------------------------------------------------------------------------


def of(**flags: Any) -> Settings:
    return Settings.of(ConfigSources(flags, {}))


def setting_faults(**flags: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        of(**flags)
    return caught.value.faults


@pytest.fixture
def auth_file(tmp_path: Path) -> Path:
    path = tmp_path / "auth.toml"
    path.write_text(GOOD)
    return path


def test_the_file_says_who_may_register(auth_file: Path) -> None:
    assert of(auth_file=str(auth_file)).credentials == parse(GOOD)
    assert of().credentials is None


def test_with_such_a_file_it_may_listen_beyond_loopback(auth_file: Path) -> None:
    assert of(auth_file=str(auth_file), host="0.0.0.0").server.host == "0.0.0.0"


def test_without_one_it_needs_either_to_listen_beyond_loopback() -> None:
    assert setting_faults(host="0.0.0.0") == [
        "--host 0.0.0.0 needs --auth-file or --insecure-no-auth: it is not a loopback address, and "
        "anyone who can reach it could use your API key"
    ]
    assert of(host="0.0.0.0", insecure_no_auth=True).credentials is None


def test_it_is_not_both_open_and_closed(auth_file: Path) -> None:
    (line,) = setting_faults(auth_file=str(auth_file), insecure_no_auth=True)
    assert line == (
        "--insecure-no-auth accepts every client, --auth-file only those in the file: remove one "
        "of them"
    )


def test_each_fault_of_the_file_is_a_fault_of_the_settings_and_names_the_file(
    auth_file: Path,
) -> None:
    auth_file.write_text("[api_keys]\na = 1\nb = 2\n")
    lines = setting_faults(auth_file=str(auth_file), host="0.0.0.0", llm_total_timeout="-1")
    assert len(lines) == 3  # the host is no error: an auth file was given
    assert [line.partition(" is ")[0] for line in lines[1:]] == [
        f"{auth_file}: api_keys.a",
        f"{auth_file}: api_keys.b",
    ]


def test_a_file_may_begin_with_a_byte_order_mark(auth_file: Path) -> None:
    auth_file.write_text(GOOD, encoding="utf-8-sig")
    assert of(auth_file=str(auth_file)).credentials == parse(GOOD)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file"),
        (b"\xff", "is not UTF-8 (byte 0)"),
        (b"#" * (1024 * 1024 + 1), "is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_fault(
    auth_file: Path, content: bytes | None, words: str
) -> None:
    if content is None:
        auth_file.unlink()
    else:
        auth_file.write_bytes(content)
    assert setting_faults(auth_file=str(auth_file)) == [f"--auth-file '{auth_file}' {words}"]


@pytest.mark.skipif(os.name != "posix", reason="no named pipes here")
def test_a_named_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (line,) = setting_faults(auth_file=str(tmp_path / "pipe"))
    assert line.endswith("is not a file")


def test_one_that_may_not_be_read_is_a_fault(
    auth_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    (line,) = setting_faults(auth_file=str(auth_file))
    assert line == f"--auth-file '{auth_file}' cannot be read: Permission denied"
