"""Who may register: what a file of credentials says, and what a client says. Pure: no I/O.

    [api_keys]            # name = hash of the key
    kiosk = "sha256:…"

    [accounts]            # account = hash of its password
    alice = "scrypt:…"

An API key is long and made by chance, so nobody can guess it from a hash however quick that is:
SHA-256, looked up at once. A password is what people can remember, so its hash has a salt and takes
long to compute (scrypt, RFC 7914), for us too: not in the event loop.
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
"""Of an API key. Shorter ones could be found by trying all: their hash is quick and has no salt."""

MIN_PASSWORD_CHARS = 8
"""NIST SP 800-63B, section 5.1.1.2."""

MAX_PASSWORD_CHARS = 1024
"""No client need say more, and what is longer is not looked at."""

_KEY_PREFIX = "bargein_"
"""So that people, and tools that look for secrets in code, see what it is."""

_KEY_BYTES = 32

_N, _R, _P = 2**14, 8, 1
"""What new hashes cost, and the least that one may: 16 MiB, and some 50 ms of one core."""

_MOST_MEMORY_BYTES = 128 * 1024 * 1024
_MOST_WORK = 16 * _N * _R * _P
"""What a hash may cost: whoever is to be checked waits for it, and for all before them."""

_SALT_BYTES = 16
_MOST_SALT_BYTES = 64
_DIGEST_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MAX_NAME_CHARS = {"api_keys": 32, "accounts": 128}
"""Names are shown. What is longer may be a key that was put in the wrong place."""

_KEY_HASH = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_PASSWORD_HASH = re.compile(
    r"scrypt:([0-9]{1,19}):([0-9]{1,19}):([0-9]{1,19}):([0-9a-f]+):([0-9a-f]+)", re.IGNORECASE
)


class CredentialsError(Exception):
    """A file of credentials that cannot be used.

    Args:
        faults: one line for each, without any hash.
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
        salt: made by chance.
        digest: what scrypt gives for the password.
    """

    n: int
    r: int
    p: int
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> PasswordHash:
        """A hash, as a file has it.

        Raises:
            ValueError: it is none, or computing it would cost too much, or too little.
        """
        found = _PASSWORD_HASH.fullmatch(text)
        if found is None:
            raise ValueError("is not a hash as run.py hash-secret prints it (scrypt:…)")
        n, r, p = (int(number) for number in found.groups()[:3])
        if n & (n - 1) or n < _N or r < _R or p < _P:
            raise ValueError(f"has a cost that is too low (at least scrypt:{_N}:{_R}:{_P}:…)")
        if 128 * n * r > _MOST_MEMORY_BYTES or n * r * p > _MOST_WORK:
            raise ValueError("has a cost that is too high: all others would have to wait for it")
        try:
            salt, digest = (bytes.fromhex(part) for part in found.groups()[3:])
        except ValueError:  # half a byte
            salt = digest = b""
        if not _SALT_BYTES <= len(salt) <= _MOST_SALT_BYTES or len(digest) != _DIGEST_BYTES:
            raise ValueError("is a hash that was cut, or has something added")
        return cls(n, r, p, salt, digest)

    @classmethod
    def of(cls, password: str, salt: bytes | None = None) -> PasswordHash:
        """The hash of a new password. Takes long.

        Args:
            password: its text.
            salt: 16 to 64 bytes; by chance where there is none.
        """
        salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
        empty = cls(_N, _R, _P, salt, b"")
        return cls(_N, _R, _P, salt, empty._scrypt(password))

    def matches(self, password: str) -> bool:
        """Whether it is of this password. Takes long, and as long for a wrong one."""
        return hmac.compare_digest(self._scrypt(password), self.digest)

    def __str__(self) -> str:
        return f"scrypt:{self.n}:{self.r}:{self.p}:{self.salt.hex()}:{self.digest.hex()}"

    def _scrypt(self, password: str) -> bytes:
        # RFC 8265, section 4.2.2: the same letters may come from a keyboard in several forms.
        normal = unicodedata.normalize("NFC", password)
        return hashlib.scrypt(
            normal.encode(),
            salt=self.salt,
            n=self.n,
            r=self.r,
            p=self.p,
            maxmem=128 * self.r * (self.n + self.p + 2),  # what it needs; else 32 MiB is the limit
            dklen=_DIGEST_BYTES,
        )


@dataclass(frozen=True)
class Credentials:
    """Who may register.

    Args:
        api_keys: names, by the SHA-256 of their key.
        accounts: hashes of passwords, by account.
    """

    api_keys: Mapping[bytes, str] = field(default_factory=dict, repr=False)
    accounts: Mapping[str, PasswordHash] = field(default_factory=dict, repr=False)

    def name_of_key(self, api_key: str) -> str | None:
        """Whose key this is; None for nobody's. Takes no longer for one than for another: only
        digests are compared, and nobody can choose theirs."""
        return self.api_keys.get(_key_digest(api_key))

    def is_password(self, account: str, password: str) -> bool:
        """Whether an account has this password. Takes long where there are accounts, and as long
        for one that is not there, lest the time tell which ones are."""
        if not self.accounts or len(password) > MAX_PASSWORD_CHARS:
            return False
        known = self.accounts.get(account)
        if known is not None:
            return known.matches(password)
        # Like somebody's, since costs may differ; always the same one's for the same account.
        hashes = list(self.accounts.values())
        hashes[hash(account) % len(hashes)].matches(password)
        return False


# The file ----------------------------------------------------------------------------------------


def parse(text: str) -> Credentials:
    """What a file says, in TOML.

    Raises:
        CredentialsError: with a line for each fault that names its table and key.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise CredentialsError([f"this is not TOML: {error}"]) from None
    faults = [
        f"there is no {_shown(key)} in such a file, only [api_keys] and [accounts]"
        for key in tables
        if key not in _MAX_NAME_CHARS
    ]
    api_keys: dict[bytes, str] = {}
    accounts: dict[str, PasswordHash] = {}
    for name, value in _entries(tables, "api_keys", faults):
        found = _KEY_HASH.fullmatch(value)
        if found is None:
            hint = (
                "is the hash of a password, which belongs to [accounts]"
                if value.startswith("scrypt:")
                else "is not a hash as run.py hash-secret --api-key prints it (sha256:…)"
            )
            faults.append(f"api_keys.{_shown(name)} {hint}")
            continue
        other = api_keys.setdefault(bytes.fromhex(found[1]), name)
        if other != name:
            faults.append(f"api_keys.{_shown(name)} is the same key as {_shown(other)}")
    for name, value in _entries(tables, "accounts", faults):
        if _KEY_HASH.fullmatch(value):
            faults.append(f"accounts.{_shown(name)} is the hash of an API key: see [api_keys]")
            continue
        try:
            accounts[name] = PasswordHash.parse(value)
        except ValueError as error:
            faults.append(f"accounts.{_shown(name)} {error}")
    if not (faults or api_keys or accounts):
        faults.append("nobody could register: there is neither a key nor an account in it")
    if faults:
        raise CredentialsError(faults)
    return Credentials(api_keys, accounts)


def _entries(tables: Mapping[str, Any], table: str, faults: list[str]) -> Iterator[tuple[str, str]]:
    """The names of a table with their texts; what is neither is added to the faults."""
    entries = tables.get(table, {})
    if not isinstance(entries, dict):
        faults.append(f"{table} is not a table: it begins with a line [{table}]")
        return
    for number, (name, value) in enumerate(entries.items(), 1):
        if not 0 < len(name) <= _MAX_NAME_CHARS[table]:
            most = _MAX_NAME_CHARS[table]
            faults.append(f"{table}: the name of number {number} has not 1 to {most} characters")
        elif not name.isprintable() or name != name.strip():
            faults.append(f"{table}: {name!r} has characters that no name has")
        elif isinstance(value, dict):
            faults.append(f"{table}.{_shown(name)} is a table: has a name a dot, and no quotes?")
        elif not isinstance(value, str):
            faults.append(f"{table}.{_shown(name)} is not a hash, which is a text in quotes")
        else:
            yield name, value


def _shown(name: str) -> str:
    """A name as a file has it, which may be too long for one only outside of the tables."""
    if len(name) > max(_MAX_NAME_CHARS.values()):
        return "such long name"
    return name if _NAME.fullmatch(name) else repr(name)


# Secrets -----------------------------------------------------------------------------------------


def new_api_key() -> str:
    """A key that nobody can guess."""
    return _KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def check_api_key(api_key: str) -> None:
    """Whether a key may be hashed as one.

    Raises:
        ValueError: it is too short, or has characters that no key has; it is not shown.
    """
    # RFC 6750, section 2.1: a bearer token is of visible ASCII characters.
    if not all("!" <= char <= "~" for char in api_key):
        raise ValueError("it holds characters that no key has: they are visible ASCII, no spaces")
    if len(api_key) < MIN_KEY_CHARS:
        raise ValueError(
            f"it is shorter than {MIN_KEY_CHARS} characters, so that it could be guessed from its "
            "hash: make a new one with --new-api-key"
        )


def hash_api_key(api_key: str) -> str:
    """The hash of a key, as a file has it."""
    return f"sha256:{_key_digest(api_key).hex()}"


def check_password(password: str) -> None:
    """Whether a password may be hashed as one.

    Raises:
        ValueError: it is too short or too long, or has control characters; it is not shown.
    """
    if not MIN_PASSWORD_CHARS <= len(password) <= MAX_PASSWORD_CHARS:
        raise ValueError(f"it has not {MIN_PASSWORD_CHARS} to {MAX_PASSWORD_CHARS} characters")
    if any(unicodedata.category(char) == "Cc" for char in password):
        raise ValueError("it holds control characters")


def _key_digest(api_key: str) -> bytes:
    return hashlib.sha256(api_key.encode()).digest()
