"""The settings, each declared once as a field of `Config`, and how they are shown.

A field gives a setting its flag (`--llm-url`), its environment variable (`BARGEIN_LLM_URL`), its
key in the file (`llm_url`), its type, its default, and its text in `--help` and `default-config`.
"""

from __future__ import annotations

import argparse
import enum
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from actors.session.session import SessionSettings
from actors.supervisor import SupervisorSettings
from actors.words import OnNewRequest
from gateway.server.server import ServerSettings
from gateway.settings.program import program
from llm.chat.generation import GenerationSettings
from llm.provider import Provider, StopsOnClose

ENVIRONMENT_PREFIX = "BARGEIN_"
CONFIG_VARIABLE = "BARGEIN_CONFIG"
"""Names the file of settings, where `--config` does not."""

_UNIONS = (Union, UnionType)

_MAX_NUMBER = 1_000_000_000
"""For counts, and for seconds (31 years): fits into C's int, and into a client's."""
_MAX_BYTES = 2**40


def _meta(expected: str, metavar: str, **bounds: Any) -> Meta:
    return Meta(**bounds, extra={"expected": expected, "metavar": metavar})


@dataclass(frozen=True)
class Sensitive:
    """Marks a setting whose value may contain a secret."""

    redact: Callable[[Any], Any]
    """Returns what of a value may be shown."""


def redact_url(url: str) -> str:
    """Hide the credentials and the query: some providers take the key there."""
    before, at, after = url.rpartition("@")
    scheme, slashes, _ = before.partition("://")
    url = f"{scheme + slashes if slashes else ''}***@{after}" if at else url
    found = re.search(r"[?#]", url)
    return url[: found.end()] + "***" if found else url


def _redact_headers(headers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(header.partition(":")[0] + ": ***" for header in headers)


def _redact_fields(fields: Mapping[str, Any]) -> dict[str, str]:
    return dict.fromkeys(fields, "***")


Seconds: TypeAlias = Annotated[
    float,
    _meta(f"a number of seconds (0 to {_MAX_NUMBER})", "SECONDS", ge=0, le=_MAX_NUMBER),
]
Port: TypeAlias = Annotated[int, _meta("a port number (0 to 65535)", "PORT", ge=0, le=65535)]
Bytes: TypeAlias = Annotated[
    int, _meta(f"a number of bytes (0 to {_MAX_BYTES})", "BYTES", ge=0, le=_MAX_BYTES)
]
Count: TypeAlias = Annotated[
    int, _meta(f"a whole number (0 to {_MAX_NUMBER})", "N", ge=0, le=_MAX_NUMBER)
]
Url: TypeAlias = Annotated[str, _meta("a URL", "URL"), Sensitive(redact_url)]
Name: TypeAlias = Annotated[str, _meta("a name", "NAME", min_length=1)]
# Not shown: people give the key itself by mistake.
KeyFilePath: TypeAlias = Annotated[
    str, _meta("the path of a file", "KEY_FILE", min_length=1), Sensitive(lambda _: "***")
]
FilePath: TypeAlias = Annotated[str, _meta("the path of a file", "FILE", min_length=1)]
AuthFilePath: TypeAlias = Annotated[str, _meta("the path of a file", "AUTH_FILE", min_length=1)]
Headers: TypeAlias = Annotated[
    tuple[str, ...],
    _meta("a list of headers, each as 'Name: value'", "HEADER"),
    Sensitive(_redact_headers),
]
# RFC 6454, section 6.2: a scheme, a host, an optional port, no path.
Origins: TypeAlias = Annotated[
    tuple[Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+/?\Z")], ...],
    _meta("a list of web origins, each like https://chat.example.com", "ORIGIN"),
]
Fields: TypeAlias = Annotated[
    dict[str, Any], _meta("a JSON object", "JSON"), Sensitive(_redact_fields)
]


@dataclass(frozen=True)
class Help:
    """What a setting does, in one line; `{program}` stands for the command's name."""

    text: str
    example: Any = None
    """A value for `default-config`, where the default is none."""
    zero: str | None = None
    """What 0 means; every number has one."""


@dataclass(frozen=True)
class Section:
    """Starts a group of settings: on the first field of the group."""

    name: str


_provider, _session, _server = Provider("", ""), SessionSettings(), ServerSettings()
_supervisor, _generation = SupervisorSettings(), GenerationSettings()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings, as they were given."""

    host: Annotated[Name, Section("listening"), Help("address to listen on")] = _server.host
    port: Annotated[Port, Help("port to listen on", zero="any free port")] = _server.port
    allow_origin: Annotated[
        Origins,
        Help("also accept web pages of this origin", ("https://chat.example.com",)),
    ] = ()
    auth_file: Annotated[
        AuthFilePath | None,
        Help(
            "accept only clients with an API key or account from this file (hashes made by "
            "`{program} hash-secret`); reloaded on SIGHUP; without it, accept every client",
            "/etc/bargein/auth.toml",
        ),
    ] = None
    insecure_no_auth: Annotated[
        bool, Help("allow listening beyond loopback without authentication")
    ] = False
    max_sessions: Annotated[
        Count, Help("maximum number of open sessions, over all clients", zero="no limit")
    ] = _server.max_sessions
    max_requests: Annotated[
        Count, Help("maximum number of live requests, over all clients", zero="no limit")
    ] = _session.max_requests
    outbox_bytes: Annotated[
        Bytes,
        Help(
            "pause a client's provider streams while this much is queued for the client",
            zero="no limit",
        ),
    ] = _server.outbox.max_bytes
    write_timeout: Annotated[
        Seconds, Help("drop a client that reads nothing for this long", zero="never")
    ] = _server.outbox.write_timeout

    ops_host: Annotated[
        Name, Section("operation"), Help("address for metrics and health checks to listen on")
    ] = "127.0.0.1"
    ops_port: Annotated[Port, Help("port for metrics and health checks", zero="off")] = 9464
    drain_timeout: Annotated[
        Seconds,
        Help(
            "time limit of a shutdown; live requests may finish, but not in its last 5 seconds or "
            "last half, whichever is shorter",
            zero="interrupt them at once",
        ),
    ] = 30.0

    llm_url: Annotated[
        Url | None,
        Section("provider"),
        Help(
            "base URL of an OpenAI-compatible API (like http://host:port/v1), or the full URL of "
            "its chat completions; without it, OPENAI_BASE_URL, else an embedded demo provider",
            "https://api.example.com/v1",
        ),
    ] = None
    llm_model: Annotated[
        Name | None,
        Help("model to use; for the demo provider, the scenario to play", "some-model"),
    ] = None
    llm_api_key_env: Annotated[Name, Help("environment variable that holds the API key")] = (
        "OPENAI_API_KEY"
    )
    llm_api_key_file: Annotated[
        KeyFilePath | None,
        Help(
            "file that holds the API key; used instead of the variable, reloaded on SIGHUP",
            "/run/secrets/llm_api_key",
        ),
    ] = None
    llm_key_header: Annotated[
        Name | None,
        Help(
            "header that carries the bare key (Azure: api-key); without it, the key is sent as a "
            "bearer token",
            "api-key",
        ),
    ] = None
    llm_header: Annotated[
        Headers,
        Help(
            "extra request header, as 'Name: value'; ${VARIABLE} is replaced from the environment",
            ("X-Team: ${TEAM}",),
        ),
    ] = ()
    llm_extra_body: Annotated[
        Fields | None, Help("extra fields for the request body", {"temperature": 0.7})
    ] = None
    llm_include_usage: Annotated[
        bool, Help("ask the provider to report token usage at the end of a stream")
    ] = _provider.include_usage
    llm_stops_on_close: Annotated[
        StopsOnClose,
        Help(
            "whether the provider stops generating (and billing) when its connection closes; "
            "reported to clients"
        ),
    ] = _provider.stops_on_close
    llm_proxy: Annotated[
        Url | None,
        Help(
            "HTTP proxy to the provider; ${VARIABLE} is replaced from the environment",
            "http://user:${PROXY_PASSWORD}@proxy.example.com:3128",
        ),
    ] = None
    llm_ca_file: Annotated[
        FilePath | None,
        Help("PEM file of the certificate authorities to trust for the provider", "ca.pem"),
    ] = None

    llm_connect_timeout: Annotated[
        Seconds,
        Section("limits of a generation"),
        Help("time limit for connecting to the provider", zero="no limit"),
    ] = _provider.connect_timeout
    llm_first_token_timeout: Annotated[
        Seconds, Help("time limit from a request to its first token", zero="no limit")
    ] = _provider.first_token_timeout
    llm_idle_timeout: Annotated[
        Seconds, Help("time limit between two events of a stream", zero="no limit")
    ] = _provider.idle_timeout
    llm_total_timeout: Annotated[
        Seconds, Help("time limit for a whole answer", zero="no limit")
    ] = _generation.total_timeout
    llm_retries: Annotated[
        Count,
        Help("how often to retry a provider that fails before its first token", zero="never"),
    ] = _provider.retries
    llm_retry_after_cap: Annotated[
        Seconds,
        Help("longest time to wait when a provider sends Retry-After", zero="no limit"),
    ] = _provider.retry_after_cap

    llm_fallback_url: Annotated[
        Url | None,
        Section("fallback provider, used when the first fails before its first token"),
        Help("like --llm-url", "https://other.example.com/v1"),
    ] = None
    llm_fallback_model: Annotated[Name | None, Help("like --llm-model", "other-model")] = None
    llm_fallback_api_key_env: Annotated[
        Name | None, Help("like --llm-api-key-env; without it, no key is sent", "OTHER_API_KEY")
    ] = None
    llm_fallback_api_key_file: Annotated[
        KeyFilePath | None, Help("like --llm-api-key-file", "/run/secrets/other_api_key")
    ] = None
    llm_fallback_key_header: Annotated[Name | None, Help("like --llm-key-header", "api-key")] = None
    llm_fallback_header: Annotated[Headers, Help("like --llm-header", ("X-Team: ${TEAM}",))] = ()
    llm_fallback_extra_body: Annotated[
        Fields | None, Help("like --llm-extra-body", {"temperature": 0.7})
    ] = None
    llm_fallback_include_usage: Annotated[bool, Help("like --llm-include-usage")] = (
        _provider.include_usage
    )
    llm_fallback_stops_on_close: Annotated[StopsOnClose, Help("like --llm-stops-on-close")] = (
        _provider.stops_on_close
    )
    llm_fallback_proxy: Annotated[
        Url | None, Help("like --llm-proxy", "http://proxy.example.com:3128")
    ] = None
    llm_fallback_ca_file: Annotated[FilePath | None, Help("like --llm-ca-file", "ca.pem")] = None
    llm_breaker_failures: Annotated[
        Count,
        Help("failures in a row after which only the fallback is used", zero="never"),
    ] = _generation.breaker_failures
    llm_breaker_timeout: Annotated[
        Seconds, Help("time until the first provider is tried again after that", zero="at once")
    ] = _generation.breaker_seconds

    on_new_request: Annotated[
        OnNewRequest,
        Section("sessions"),
        Help(
            "what to do with a new request while another is live: interrupt the live one, run both "
            "in parallel, or reject the new one"
        ),
    ] = _session.on_new_request
    session_timeout: Annotated[
        Seconds, Help("end a session whose client sends nothing for this long", zero="never")
    ] = _session.session_timeout
    heartbeat_interval: Annotated[Seconds, Help("time between two HEARTBEATs", zero="none")] = (
        _session.heartbeat_interval
    )
    history_messages: Annotated[
        Count, Help("maximum number of earlier messages to send to the model", zero="none")
    ] = _session.history_messages
    history_chars: Annotated[
        Count, Help("maximum number of characters of earlier messages to send", zero="none")
    ] = _session.history_chars
    max_functions_bytes: Annotated[
        Bytes,
        Help("maximum size of all functions of a session, as JSON without spaces", zero="no limit"),
    ] = _session.max_functions_bytes

    stale_after: Annotated[
        Seconds,
        Section("the reaper"),
        Help("end a request that makes no progress for this long", zero="never"),
    ] = _supervisor.stale_after
    reap_interval: Annotated[
        Seconds, Help("how often to check for such requests", zero="never")
    ] = _supervisor.reap_interval
    request_max_age: Annotated[
        Seconds, Help("end any request that is older than this", zero="never")
    ] = _supervisor.request_max_age

    log_format: Annotated[
        Literal["text", "json"] | None,
        Section("log"),
        Help("format of the log; without it, text on a terminal, else json", "json"),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Help("lowest level to log")
    ] = "info"


@dataclass(frozen=True)
class Setting:
    """One field of `Config`, with what its annotations say."""

    key: str
    type: Any
    default: Any
    about: Help
    section: str
    expected: str
    """What a value must be, as an error says it: "a URL"."""
    metavar: str
    is_choice: bool
    sensitive: Sensitive | None

    @property
    def help(self) -> str:
        """What it does, in one line."""
        return self.about.text.replace("{program}", program())

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.key.upper()

    def is_a(self, kind: type) -> bool:
        """Whether its values are of this type."""
        return any(get_origin(one) is kind or one is kind for one in _alternatives(self.type))

    def parse(self, text: str) -> Any:
        """Read the text of a flag or a variable.

        Raises:
            ValueError: the value is not what is expected.
        """
        text.encode()  # fails for bytes that were not UTF-8: Python made lone surrogates of them
        text = text.strip()
        if self.is_a(dict):
            value = msgspec.json.decode(text)
        elif self.is_a(tuple):
            value = [stripped for line in text.splitlines() if (stripped := line.strip())]
        elif self.is_a(bool):
            value = _SWITCHES.get(text.lower(), text)
        else:
            return self.check(text, strict=False)
        return self.check(value)

    def check(self, value: Any, *, strict: bool = True) -> Any:
        """Check and convert a value of the file.

        Args:
            value: as TOML has it.
            strict: False converts a text to a number.

        Raises:
            ValueError: the value is not what is expected.
        """
        converted = msgspec.convert(value, self.type, strict=strict)
        if converted is None:  # not strict, "null" is None
            raise ValueError(value)
        if self.is_a(tuple):
            "".join(converted).encode()  # as in `parse`: repeated flags come here as a list
        # TOML has values that JSON has not: dates, NaN, infinity.
        if self.is_a(dict) and msgspec.json.decode(msgspec.json.encode(converted)) != converted:
            raise ValueError(value)
        return converted

    def redacted(self, value: Any) -> Any:
        """Return what of a value may be shown."""
        return self.sensitive.redact(value) if self.sensitive else value


_SWITCHES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _alternatives(kind: Any) -> Iterator[Any]:
    """The members of a union, without their annotations; or the type itself."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in _UNIONS:
        for one in get_args(kind):
            yield from _alternatives(one)
    else:
        yield kind


def _annotations(kind: Any) -> Iterator[Any]:
    """All annotations of a type, and of the members of a union."""
    if get_origin(kind) is Annotated:
        inner, *annotations = get_args(kind)
        yield from annotations
        yield from _annotations(inner)
    elif get_origin(kind) in _UNIONS:
        for one in get_args(kind):
            yield from _annotations(one)


def _settings() -> Iterator[Setting]:
    section = ""
    for one in msgspec.structs.fields(Config):
        annotations = list(_annotations(one.type))
        section = next((item.name for item in annotations if isinstance(item, Section)), section)
        extra = next((item.extra for item in annotations if isinstance(item, Meta)), None) or {}
        choices = list(_choices(one.type))
        yield Setting(
            key=one.name,
            type=one.type,
            default=one.default,
            about=next(item for item in annotations if isinstance(item, Help)),
            section=section,
            expected=extra.get(
                "expected", "one of " + ", ".join(choices) if choices else "true or false"
            ),
            metavar=extra.get("metavar", "|".join(choices)),
            is_choice=bool(choices),
            sensitive=next((item for item in annotations if isinstance(item, Sensitive)), None),
        )


def _choices(kind: Any) -> Iterator[str]:
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            yield from get_args(one)
        elif isinstance(one, type) and issubclass(one, enum.Enum):
            yield from (member.value for member in one)


SETTINGS: dict[str, Setting] = {setting.key: setting for setting in _settings()}
"""By key, in the order in which they are shown."""


# Help and the default file -----------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and a flag for each setting. Flags that are not given are not in the result.

    Args:
        parser: of a command that takes settings.
    """
    parser.add_argument(
        "--config",
        metavar="TOML",
        help=f"file of settings (default: {CONFIG_VARIABLE}); `{program()} default-config` prints "
        "one",
    )
    groups: dict[str, Any] = {}
    for setting in SETTINGS.values():
        if setting.section not in groups:
            groups[setting.section] = parser.add_argument_group(setting.section)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": setting.key}
        notes = [] if setting.about.zero is None else [f"0: {setting.about.zero}"]
        if setting.is_a(bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = setting.metavar
        if setting.is_a(tuple):
            options["action"] = "append"
            notes.append("repeatable")
        elif setting.default is not None:
            notes.append(f"default: {_plain(setting.default)}")
        text = setting.help + (f" ({'; '.join(notes)})" if notes else "")
        groups[setting.section].add_argument(setting.flag, help=text.replace("%", "%%"), **options)


def _plain(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, enum.Enum):
        return str(value.value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def as_toml(value: Any) -> str:
    """A value as the file takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _plain(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(key)} = {as_toml(one)}" for key, one in value.items())
        return "{ " + ", ".join(pairs) + " }"
    # A JSON string is a TOML string, except that TOML wants DEL escaped.
    return json.dumps(_plain(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else as_toml(key)


_DEFAULT_CONFIG_HEAD = """\
Settings of bargein, for `{program} --config FILE` (or {variable}=FILE).

This file changes nothing as it stands: every setting is commented out. It shows each default, or
an example where there is no default. `{program} check-config --config FILE` checks your copy.

Flags override environment variables, and these override this file: --llm-url, then
BARGEIN_LLM_URL, then OPENAI_BASE_URL, then llm_url here. Do not use tables: write all settings at
the top level.

Do not write secrets here. llm_api_key_env names the environment variable that holds the API key,
llm_api_key_file the file; ${{VARIABLE}} in a header or in a proxy's URL is replaced from the
environment.

SIGHUP rereads this file, the key files and auth_file. New provider settings apply from the next
request on, new credentials from the next client on. All other settings need a restart.
"""


def default_config() -> str:
    """The text of a file that lists every setting, all commented out."""
    head = _DEFAULT_CONFIG_HEAD.format(program=program(), variable=CONFIG_VARIABLE)
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    section = ""
    for setting in SETTINGS.values():
        if setting.section != section:
            section = setting.section
            lines += ["", f"## {section[0].upper()}{section[1:]}"]
        notes = []
        if setting.is_choice:
            notes.append(setting.expected)
        elif setting.metavar in ("SECONDS", "BYTES"):
            notes.append(f"in {setting.metavar.lower()}")
        if setting.about.zero is not None:
            notes.append(f"0: {setting.about.zero}")
        text = re.sub(r"--[a-z-]+", _flag_to_key, setting.help)
        text += f" ({'; '.join(notes)})" if notes else ""
        value = setting.about.example if setting.default in (None, ()) else setting.default
        lines += [""]
        lines += [f"# {line}" for line in textwrap.wrap(text, 96, break_on_hyphens=False)]
        lines.append(f"#{setting.key} = {as_toml(value)}")
    return "\n".join(lines) + "\n"


def _flag_to_key(found: re.Match[str]) -> str:
    return found[0][2:].replace("-", "_")
