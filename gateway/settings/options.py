"""Every setting, declared once as a field of `Config`: what there is to set, and how it is shown.

A field gives the flag (`--llm-url`), the environment variable (`BARGEIN_LLM_URL`) and the key in
the file (`llm_url`), and its default; and its lines in `--help` and in `default-config`.
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
from llm.chat.generation import GenerationSettings
from llm.provider import Provider, StopsOnClose

ENVIRONMENT = "BARGEIN_"
"""What the variable of a setting begins with."""
CONFIG_VARIABLE = "BARGEIN_CONFIG"
"""It names the file, where `--config` does not."""

_UNIONS = (Union, UnionType)

_MOST = 1_000_000_000
"""Of anything that is counted, and of seconds, which are 31 years: whoever is told of it, a client
or C code, can count so far."""
_MOST_BYTES = 2**40


def _meta(kind: str, metavar: str, **bounds: Any) -> Meta:
    return Meta(**bounds, extra={"kind": kind, "metavar": metavar})


@dataclass(frozen=True)
class Private:
    """May hold a secret; `redact` leaves of a value what everybody may see."""

    redact: Callable[[Any], Any]


def redact_url(url: str) -> str:
    """Without credentials and without the query, where some providers have the key."""
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
    float, _meta(f"a number of seconds, 0 to {_MOST}", "SECONDS", ge=0, le=_MOST)
]
Port: TypeAlias = Annotated[int, _meta("a port, 0 to 65535", "PORT", ge=0, le=65535)]
Bytes: TypeAlias = Annotated[
    int, _meta(f"a number of bytes, 0 to {_MOST_BYTES}", "BYTES", ge=0, le=_MOST_BYTES)
]
Count: TypeAlias = Annotated[int, _meta(f"a whole number, 0 to {_MOST}", "N", ge=0, le=_MOST)]
Url: TypeAlias = Annotated[str, _meta("a URL", "URL"), Private(redact_url)]
Name: TypeAlias = Annotated[str, _meta("a name", "NAME", min_length=1)]
# Not shown: it may be the key itself, by mistake.
KeyFilePath: TypeAlias = Annotated[
    str, _meta("the path of a file", "KEY_FILE", min_length=1), Private(lambda _: "***")
]
FilePath: TypeAlias = Annotated[str, _meta("the path of a file", "FILE", min_length=1)]
AuthFilePath: TypeAlias = Annotated[str, _meta("the path of a file", "AUTH_FILE", min_length=1)]
Headers: TypeAlias = Annotated[
    tuple[str, ...],
    _meta("a list of headers, each as 'Name: value'", "HEADER"),
    Private(_redact_headers),
]
# RFC 6454, section 6.2: a scheme, a host, maybe a port, and no path.
Origins: TypeAlias = Annotated[
    tuple[Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+/?\Z")], ...],
    _meta("a list of web origins, each as https://chat.example.com", "ORIGIN"),
]
Fields: TypeAlias = Annotated[
    dict[str, Any], _meta("a JSON object", "JSON"), Private(_redact_fields)
]


@dataclass(frozen=True)
class About:
    """What a setting is for, in a line."""

    text: str
    example: Any = None
    """A value for the file, where the default is none."""


@dataclass(frozen=True)
class Section:
    """The first field of a group of settings carries its name."""

    name: str


_provider, _session, _server = Provider("", ""), SessionSettings(), ServerSettings()
_supervisor, _generation = SupervisorSettings(), GenerationSettings()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings, as they were given."""

    host: Annotated[Name, Section("listening"), About("address to listen on")] = _server.host
    port: Annotated[Port, About("port to listen on; 0 takes a free one")] = _server.port
    allow_origin: Annotated[
        Origins,
        About("web origin whose pages may connect", ("https://chat.example.com",)),
    ] = ()
    auth_file: Annotated[
        AuthFilePath | None,
        About(
            "file that says who may connect, by hashes that run.py hash-secret prints; without it, "
            "anybody; it is read again at a SIGHUP",
            "/etc/bargein/auth.toml",
        ),
    ] = None
    insecure_no_auth: Annotated[
        bool, About("listen beyond loopback although anybody may connect")
    ] = False
    max_sessions: Annotated[Count, About("that may be open at once, of all clients; 0 is off")] = (
        _server.max_sessions
    )
    max_requests: Annotated[Count, About("that may be live at once, of all clients; 0 is off")] = (
        _session.max_requests
    )
    outbox_bytes: Annotated[Bytes, About("that may wait for one client; 0 is off")] = (
        _server.outbox.max_bytes
    )
    write_timeout: Annotated[Seconds, About("that a client may read nothing; 0 is off")] = (
        _server.outbox.write_timeout
    )

    ops_host: Annotated[Name, Section("operation"), About("address for metrics to listen on")] = (
        "127.0.0.1"
    )
    ops_port: Annotated[Port, About("port for metrics; 0 is off")] = 9464
    drain_timeout: Annotated[
        Seconds,
        About(
            "that a shutdown may take; live requests may end by themselves until 5 seconds before, "
            "or half of it; 0 ends them at once"
        ),
    ] = 30.0

    llm_url: Annotated[
        Url | None,
        Section("provider"),
        About(
            "OpenAI-style base, as http://host:port/v1, or the whole URL of its chat completions; "
            "else OPENAI_BASE_URL; without either, an embedded demo provider",
            "https://api.example.com/v1",
        ),
    ] = None
    llm_model: Annotated[
        Name | None, About("model to ask for; of the demo provider, what it plays", "some-model")
    ] = None
    llm_api_key_env: Annotated[Name, About("environment variable that holds the key")] = (
        "OPENAI_API_KEY"
    )
    llm_api_key_file: Annotated[
        KeyFilePath | None,
        About(
            "file that holds the key, in place of the variable; it is read again at a SIGHUP",
            "/run/secrets/llm_api_key",
        ),
    ] = None
    llm_key_header: Annotated[
        Name | None,
        About(
            "header that takes the key as it is (Azure: api-key); else it is a bearer token",
            "api-key",
        ),
    ] = None
    llm_header: Annotated[
        Headers,
        About(
            "one more header, as 'Name: value'; ${VARIABLE} is put in from the environment",
            ("X-Team: ${TEAM}",),
        ),
    ] = ()
    llm_extra_body: Annotated[
        Fields | None, About("more fields for the body of a request", {"temperature": 0.7})
    ] = None
    llm_include_usage: Annotated[bool, About("ask for the usage at the end of a stream")] = (
        _provider.include_usage
    )
    llm_stops_on_close: Annotated[
        StopsOnClose,
        About("whether the provider stops to generate, and to bill, when its connection closes"),
    ] = _provider.stops_on_close
    llm_proxy: Annotated[
        Url | None,
        About(
            "HTTP proxy on the way; ${VARIABLE} is put in from the environment",
            "http://user:${PROXY_PASSWORD}@proxy.example.com:3128",
        ),
    ] = None
    llm_ca_file: Annotated[
        FilePath | None,
        About("PEM file of the certificate authorities to trust for the provider", "ca.pem"),
    ] = None

    llm_connect_timeout: Annotated[
        Seconds,
        Section("limits of a generation"),
        About("until the connection stands; 0 is off"),
    ] = _provider.connect_timeout
    llm_first_token_timeout: Annotated[Seconds, About("until the first token; 0 is off")] = (
        _provider.first_token_timeout
    )
    llm_idle_timeout: Annotated[Seconds, About("from one event to the next; 0 is off")] = (
        _provider.idle_timeout
    )
    llm_total_timeout: Annotated[Seconds, About("until the end of the answer; 0 is off")] = (
        _generation.total_timeout
    )
    llm_retries: Annotated[
        Count, About("how often a provider is asked again, before the first token only; 0 is never")
    ] = _provider.retries
    llm_retry_after_cap: Annotated[
        Seconds, About("that its Retry-After makes us wait at most; 0 is no limit")
    ] = _provider.retry_after_cap

    llm_fallback_url: Annotated[
        Url | None,
        Section("fallback provider, asked when the first fails before its first token"),
        About("as --llm-url", "https://other.example.com/v1"),
    ] = None
    llm_fallback_model: Annotated[Name | None, About("as --llm-model", "other-model")] = None
    llm_fallback_api_key_env: Annotated[
        Name | None, About("as --llm-api-key-env; without it, no key is sent", "OTHER_API_KEY")
    ] = None
    llm_fallback_api_key_file: Annotated[
        KeyFilePath | None, About("as --llm-api-key-file", "/run/secrets/other_api_key")
    ] = None
    llm_fallback_key_header: Annotated[Name | None, About("as --llm-key-header", "api-key")] = None
    llm_fallback_header: Annotated[Headers, About("as --llm-header", ("X-Team: ${TEAM}",))] = ()
    llm_fallback_extra_body: Annotated[
        Fields | None, About("as --llm-extra-body", {"temperature": 0.7})
    ] = None
    llm_fallback_include_usage: Annotated[bool, About("as --llm-include-usage")] = (
        _provider.include_usage
    )
    llm_fallback_stops_on_close: Annotated[StopsOnClose, About("as --llm-stops-on-close")] = (
        _provider.stops_on_close
    )
    llm_fallback_proxy: Annotated[
        Url | None, About("as --llm-proxy", "http://proxy.example.com:3128")
    ] = None
    llm_fallback_ca_file: Annotated[FilePath | None, About("as --llm-ca-file", "ca.pem")] = None
    llm_breaker_failures: Annotated[
        Count, About("failures in a row after which only the fallback is asked; 0 is off")
    ] = _generation.breaker_failures
    llm_breaker_timeout: Annotated[
        Seconds, About("until the first is tried again then; 0 is at once")
    ] = _generation.breaker_seconds

    on_new_request: Annotated[
        OnNewRequest, Section("sessions"), About("what a request does while another is live")
    ] = _session.on_new_request
    session_timeout: Annotated[
        Seconds, About("of a client's silence until its session is ended; 0 is off")
    ] = _session.session_timeout
    heartbeat_interval: Annotated[Seconds, About("between two HEARTBEATs; 0 is off")] = (
        _session.heartbeat_interval
    )
    history_messages: Annotated[
        Count, About("messages of the conversation that the model is reminded of; 0 is none")
    ] = _session.history_messages
    history_chars: Annotated[
        Count, About("characters of the conversation that the model is reminded of; 0 is none")
    ] = _session.history_chars

    stale_after: Annotated[
        Seconds,
        Section("the reaper"),
        About("without progress until a request is reaped; 0 is off"),
    ] = _supervisor.stale_after
    reap_interval: Annotated[Seconds, About("between two looks for such requests; 0 is off")] = (
        _supervisor.reap_interval
    )
    request_max_age: Annotated[Seconds, About("until any request is reaped; 0 is off")] = (
        _supervisor.request_max_age
    )

    log_format: Annotated[
        Literal["text", "json"] | None,
        Section("log"),
        About("without it, text on a terminal and else json", "json"),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], About("least level that is logged")
    ] = "info"


@dataclass(frozen=True)
class Setting:
    """One field of `Config`, looked at."""

    key: str
    type: Any
    default: Any
    about: str
    example: Any
    section: str
    kind: str
    """What a value has to be, in words."""
    metavar: str
    is_choice: bool
    private: Private | None

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT + self.key.upper()

    def is_a(self, kind: type) -> bool:
        return any(get_origin(one) is kind or one is kind for one in _alternatives(self.type))

    def parse(self, text: str) -> Any:
        """A value, of what a flag or a variable says. Raises ValueError when it is none."""
        text.encode()  # of what was not UTF-8, Python has made a text that nobody can write
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
        """A value, of what a file says. Raises ValueError when it is none."""
        converted = msgspec.convert(value, self.type, strict=strict)
        if converted is None:  # what "null" is converted to
            raise ValueError(value)
        # TOML has dates, and numbers that are none, and JSON has not.
        if self.is_a(dict) and msgspec.json.decode(msgspec.json.encode(converted)) != converted:
            raise ValueError(value)
        return converted

    def redacted(self, value: Any) -> Any:
        """What everybody may see of a value."""
        return self.private.redact(value) if self.private else value


_SWITCHES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types that a union is of, without their bounds."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in _UNIONS:
        for one in get_args(kind):
            yield from _alternatives(one)
    else:
        yield kind


def _annotations(kind: Any) -> Iterator[Any]:
    """Everything that is said of a type, and of those that it is a union of."""
    if get_origin(kind) is Annotated:
        inner, *said = get_args(kind)
        yield from said
        yield from _annotations(inner)
    elif get_origin(kind) in _UNIONS:
        for one in get_args(kind):
            yield from _annotations(one)


def _settings() -> Iterator[Setting]:
    section = ""
    for one in msgspec.structs.fields(Config):
        said = list(_annotations(one.type))
        section = next((item.name for item in said if isinstance(item, Section)), section)
        about = next(item for item in said if isinstance(item, About))
        extra = next((item.extra for item in said if isinstance(item, Meta)), None) or {}
        choices = list(_choices(one.type))
        kind = extra.get("kind", "one of " + ", ".join(choices) if choices else "true or false")
        yield Setting(
            key=one.name,
            type=one.type,
            default=one.default,
            about=about.text,
            example=about.example,
            section=section,
            kind=kind,
            metavar=extra.get("metavar", "|".join(choices)),
            is_choice=bool(choices),
            private=next((item for item in said if isinstance(item, Private)), None),
        )


def _choices(kind: Any) -> Iterator[str]:
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            yield from get_args(one)
        elif isinstance(one, type) and issubclass(one, enum.Enum):
            yield from (member.value for member in one)


SETTINGS: dict[str, Setting] = {setting.key: setting for setting in _settings()}
"""By key, in the order in which people are shown them."""


# Showing them ------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser one flag for each setting, and `--config`."""
    parser.add_argument(
        "--config",
        metavar="TOML",
        help=f"a file of settings (default: {CONFIG_VARIABLE}); run.py default-config prints one",
    )
    groups: dict[str, Any] = {}
    for setting in SETTINGS.values():
        if setting.section not in groups:
            groups[setting.section] = parser.add_argument_group(setting.section)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": setting.key}
        notes = setting.about
        if setting.is_a(bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = setting.metavar
        if setting.is_a(tuple):
            options["action"] = "append"
            notes += "; may be given several times"
        elif setting.default is not None:
            notes += f" (default: {_plain(setting.default)})"
        groups[setting.section].add_argument(setting.flag, help=notes.replace("%", "%%"), **options)


def _plain(value: Any) -> str:
    """A value, as a flag takes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, enum.Enum):
        return str(value.value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _plain(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(key)} = {as_toml(one)}" for key, one in value.items())
        return "{ " + ", ".join(pairs) + " }"
    # A string of JSON is one of TOML, but for one character that TOML wants written as its number.
    return json.dumps(_plain(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else as_toml(key)


_DEFAULT_CONFIG_HEAD = f"""\
Settings of bargein, for `run.py --config FILE` (or {CONFIG_VARIABLE}=FILE).

As it stands, this file changes nothing: every setting is commented out, with its default, or with
an example where it has none. `run.py check-config --config FILE` says what is wrong with yours.

What the command line or the environment say ranks higher: --llm-url, then BARGEIN_LLM_URL, then
OPENAI_BASE_URL, then llm_url here. There are no tables: all settings stand side by side.

Secrets are not written here. llm_api_key_env names the environment variable that holds the key,
llm_api_key_file the file; ${{VARIABLE}} in a header or a proxy's URL is put in from the
environment.

At a SIGHUP this file is read anew, and the file of auth_file: from then on providers are asked,
and clients let in, as they say. The rest needs a restart.
"""


def default_config() -> str:
    """A file of settings that changes none, with what each is for."""
    lines = [f"# {line}".rstrip() for line in _DEFAULT_CONFIG_HEAD.splitlines()]
    section = ""
    for setting in SETTINGS.values():
        if setting.section != section:
            section = setting.section
            lines += ["", f"## {section[0].upper()}{section[1:]}"]
        about = re.sub(r"--[a-z-]+", _flag_to_key, setting.about)
        if setting.is_choice:
            about += f" ({setting.kind})"
        elif setting.metavar in ("SECONDS", "BYTES"):
            about = f"{setting.metavar.lower()} {about}"
        value = setting.example if setting.default in (None, ()) else setting.default
        lines += ["", *textwrap.wrap(about, 98, initial_indent="# ", subsequent_indent="# ")]
        lines.append(f"#{setting.key} = {as_toml(value)}")
    return "\n".join(lines) + "\n"


def _flag_to_key(found: re.Match[str]) -> str:
    return found[0][2:].replace("-", "_")
