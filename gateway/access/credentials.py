"""Who may register: parses the `--auth-file`, checks and makes credentials. Pure: no I/O.

    [api_keys]            # name = hash of the key
    kiosk = "sha256:…"

    [accounts]            # account = hash of its password
    alice = "scrypt:…"

API keys are long and random: a fast hash without a salt (SHA-256) protects them, and a key is
found by one lookup. Passwords are short enough to remember: their hash has a salt and is slow on
purpose (scrypt, RFC 7914; some 50 ms), so it must not be computed in the event loop.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MIN_KEY_CHARS = 20
"""An API key that is shorter could be found by trying all: its hash is fast and has no salt."""

MIN_PASSWORD_CHARS = 8
"""NIST SP 800-63B, section 5.1.1.2."""

MAX_PASSWORD_CHARS = 1024
"""A longer one is refused unchecked: hashing time must not depend on what a client sends."""

_KEY_PREFIX = "bargein_"
"""Lets people and secret scanners recognize a key."""

_KEY_BYTES = 32

_N, _R, _P = 2**14, 8, 1
"""The cost of new hashes, and the minimum for others: 16 MiB and some 50 ms of one core."""

_MAX_MEMORY_BYTES = 128 * 1024 * 1024
_MAX_WORK = 16 * _N * _R * _P
"""The maximum cost of a hash: passwords are checked one after another, so each delays the rest."""

_SALT_BYTES = 16
_MAX_SALT_BYTES = 64
_DIGEST_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MAX_NAME_CHARS = {"api_keys": 32, "accounts": 128}
"""Names are shown in messages. A longer one may be a key in the wrong place."""

_KEY_HASH = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_PASSWORD_HASH = re.compile(
    r"scrypt:([0-9]{1,19}):([0-9]{1,19}):([0-9]{1,19}):([0-9a-f]+):([0-9a-f]+)", re.IGNORECASE
)


class CredentialsError(Exception):
    """The file of credentials cannot be used.

    Args:
        faults: one line for each error; none shows a hash.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__(*faults)
        self.faults = faults


@dataclass(frozen=True)
class PasswordHash:
    """The scrypt hash of a password: `scrypt:N:r:p:salt:hash`, the last two in hexadecimal.

    Args:
        n: cost, a power of two.
        r: block size.
        p: parallelization.
        salt: random bytes.
        digest: scrypt's result for the password.
    """

    n: int
    r: int
    p: int
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> PasswordHash:
        """Parse the text form of a hash.

        Raises:
            ValueError: it is not a hash, or its cost is too high or too low.
        """
        found = _PASSWORD_HASH.fullmatch(text)
        if found is None:
            raise ValueError("is not a hash made by hash-secret (scrypt:…)")
        n, r, p = (int(number) for number in found.groups()[:3])
        if n & (n - 1) or n < _N or r < _R or p < _P:
            raise ValueError(f"has a cost that is too low (minimum: scrypt:{_N}:{_R}:{_P}:…)")
        if 128 * n * r > _MAX_MEMORY_BYTES or n * r * p > _MAX_WORK:
            raise ValueError(
                "has a cost that is too high: checking it would delay all other logins"
            )
        try:
            salt, digest = (bytes.fromhex(part) for part in found.groups()[3:])
        except ValueError:  # half a byte
            salt = digest = b""
        if not _SALT_BYTES <= len(salt) <= _MAX_SALT_BYTES or len(digest) != _DIGEST_BYTES:
            raise ValueError("is an incomplete hash, or has extra characters")
        return cls(n, r, p, salt, digest)

    @classmethod
    def of(cls, password: str, salt: bytes | None = None) -> PasswordHash:
        """Hash a password. Slow.

        Args:
            password: in plain text.
            salt: 16 to 64 bytes; random if None.
        """
        salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
        empty = cls(_N, _R, _P, salt, b"")
        return cls(_N, _R, _P, salt, empty._scrypt(password))

    def matches(self, password: str) -> bool:
        """Whether this is the hash of a password. Slow, and equally slow for a wrong one."""
        return hmac.compare_digest(self._scrypt(password), self.digest)

    def __str__(self) -> str:
        return f"scrypt:{self.n}:{self.r}:{self.p}:{self.salt.hex()}:{self.digest.hex()}"

    def _scrypt(self, password: str) -> bytes:
        # RFC 8265, section 4.2.2: keyboards compose the same letters in different ways.
        normal = unicodedata.normalize("NFC", password)
        return hashlib.scrypt(
            normal.encode(),
            salt=self.salt,
            n=self.n,
            r=self.r,
            p=self.p,
            maxmem=128 * self.r * (self.n + self.p + 2),  # OpenSSL's default limit is 32 MiB
            dklen=_DIGEST_BYTES,
        )


@dataclass(frozen=True)
class Credentials:
    """Who may register.

    Args:
        api_keys: names by the SHA-256 of their key.
        accounts: password hashes by account name.
    """

    api_keys: Mapping[bytes, str] = field(default_factory=dict, repr=False)
    accounts: Mapping[str, PasswordHash] = field(default_factory=dict, repr=False)

    def name_of_key(self, api_key: str) -> str | None:
        """The name of an API key; None if it is unknown. The time tells nothing about known keys:
        only digests are compared, and a client cannot choose the digest of its guess."""
        return self.api_keys.get(_key_digest(api_key))

    def is_password(self, account: str, password: str) -> bool:
        """Whether an account has this password. Slow where there are accounts, and equally slow for
        an unknown account: the time must not tell which accounts exist."""
        if not self.accounts or len(password) > MAX_PASSWORD_CHARS:
            return False
        known = self.accounts.get(account)
        if known is not None:
            return known.matches(password)
        # Hashes may differ in cost: for one unknown account, always compute the same hash.
        hashes = list(self.accounts.values())
        hashes[hash(account) % len(hashes)].matches(password)
        return False


# The file ----------------------------------------------------------------------------------------


def parse(text: str) -> Credentials:
    """Parse a file of credentials.

    Args:
        text: TOML.

    Raises:
        CredentialsError: one line for each error; it names the table and the key.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise CredentialsError([f"not valid TOML: {error}"]) from None
    faults = [
        f"unknown entry {_shown(key)}: only the tables [api_keys] and [accounts] are allowed"
        for key in tables
        if key not in _MAX_NAME_CHARS
    ]
    api_keys: dict[bytes, str] = {}
    accounts: dict[str, PasswordHash] = {}
    for name, value in _entries(tables, "api_keys", faults):
        found = _KEY_HASH.fullmatch(value)
        if found is None:
            hint = (
                "is the hash of a password: move it to [accounts]"
                if value.startswith("scrypt:")
                else "is not a hash made by hash-secret --api-key (sha256:…)"
            )
            faults.append(f"api_keys.{_shown(name)} {hint}")
            continue
        other = api_keys.setdefault(bytes.fromhex(found[1]), name)
        if other != name:
            faults.append(f"api_keys.{_shown(name)} is the same key as {_shown(other)}")
    for name, value in _entries(tables, "accounts", faults):
        if _KEY_HASH.fullmatch(value):
            faults.append(
                f"accounts.{_shown(name)} is the hash of an API key: move it to [api_keys]"
            )
            continue
        try:
            accounts[name] = PasswordHash.parse(value)
        except ValueError as error:
            faults.append(f"accounts.{_shown(name)} {error}")
    if not (faults or api_keys or accounts):
        faults.append("no client could register: the file has no API key and no account")
    if faults:
        raise CredentialsError(faults)
    return Credentials(api_keys, accounts)


def _entries(tables: Mapping[str, Any], table: str, faults: list[str]) -> Iterator[tuple[str, str]]:
    """The names of a table and their hashes; adds an error for each entry that is malformed."""
    entries = tables.get(table, {})
    if not isinstance(entries, dict):
        faults.append(f"{table} is not a table: start it with the line [{table}]")
        return
    for number, (name, value) in enumerate(entries.items(), 1):
        if not 0 < len(name) <= _MAX_NAME_CHARS[table]:
            limit = _MAX_NAME_CHARS[table]
            faults.append(f"{table}: the name of entry {number} must have 1 to {limit} characters")
        elif not name.isprintable() or name != name.strip():
            faults.append(f"{table}: {name!r} must be printable, without spaces at its ends")
        elif isinstance(value, dict):
            faults.append(f"{table}.{_shown(name)} is a table: put a name with a dot in quotes")
        elif not isinstance(value, str):
            faults.append(f"{table}.{_shown(name)} is not a hash: write it as a string in quotes")
        else:
            yield name, value


def _shown(name: str) -> str:
    """A name as the file has it; a key that is too long for a name is not shown."""
    if len(name) > max(_MAX_NAME_CHARS.values()):
        return "(too long to show)"
    return name if _NAME.fullmatch(name) else repr(name)


# Secrets -----------------------------------------------------------------------------------------


def new_api_key() -> str:
    """A new random API key."""
    return _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def check_api_key(api_key: str) -> None:
    """Check that an API key is fit to be used.

    Raises:
        ValueError: it is too short, or has characters that no key has. The key is not shown.
    """
    # RFC 6750, section 2.1: a bearer token consists of visible ASCII characters.
    if not all("!" <= char <= "~" for char in api_key):
        raise ValueError("the API key may contain only visible ASCII characters, and no spaces")
    if len(api_key) < MIN_KEY_CHARS:
        raise ValueError(
            f"the API key is shorter than {MIN_KEY_CHARS} characters and could be guessed from its "
            "hash: make a new one with --new-api-key"
        )


def hash_api_key(api_key: str) -> str:
    """The hash of an API key, as the file takes it."""
    return f"sha256:{_key_digest(api_key).hex()}"


def check_password(password: str) -> None:
    """Check that a password is fit to be used.

    Raises:
        ValueError: it is too short or too long, or has control characters. It is not shown.
    """
    if not MIN_PASSWORD_CHARS <= len(password) <= MAX_PASSWORD_CHARS:
        raise ValueError(
            f"the password must have {MIN_PASSWORD_CHARS} to {MAX_PASSWORD_CHARS} characters"
        )
    if any(unicodedata.category(char) == "Cc" for char in password):
        raise ValueError("the password contains control characters")


def _key_digest(api_key: str) -> bytes:
    return hashlib.sha256(api_key.encode()).digest()
