"""Every setting, declared once as a field of `Config`; read from flags, environment and file.

A field gives the flag (`--llm-url`), the environment variable (`BARGEIN_LLM_URL`) and the key in
the file (`llm_url`), in this order of rank, and its default; and its lines in `--help` and in
`default-config`. Faults name what was wrong where. No value is shown that may be secret.
"""

from __future__ import annotations

import argparse
import difflib
import enum
import ipaddress
import json
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
)
from urllib.parse import quote

import msgspec
from msgspec import Meta

from actors.session import SessionSettings
from actors.supervisor import SupervisorSettings
from gateway.outbox import OutboxSettings
from gateway.protocol import OnNewRequest
from gateway.server import ServerSettings
from llm.client import ProviderClient
from llm.provider import (
    Provider,
    StopsOnClose,
    check_extra_body,
    check_headers,
    check_proxy,
    completions_url,
)
from llm.scenarios import ALIASES, SCENARIOS, NoScenarioError, choose
from llm.stream import GenerationSettings

_T = TypeVar("_T")

_ENVIRONMENT = "BARGEIN_"
_CONFIG_VARIABLE = "BARGEIN_CONFIG"
_NOT_SETTINGS = frozenset({_CONFIG_VARIABLE, "BARGEIN_REAL_SERVERS"})
"""Variables of ours that are none of a setting; the second is for the tests."""

_UNIONS = (Union, UnionType)

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_HEADER = re.compile(r"(proxy-)?authorization|cookie|(.*-)?api-key", re.IGNORECASE)
_CREDENTIALS_IN_URL = re.compile(r"[^/?#]*//[^/?#]*@")

_MOST = 1_000_000_000
"""Of anything that is counted, and of seconds, which are 31 years: whoever is told of it, a client
or C code, can count so far."""
_MOST_BYTES = 2**40
_MOST_KEY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, by room."""

    provider: Provider | None = None
    """None starts the embedded demo provider."""
    demo: Provider = field(default_factory=lambda: _demo("demo"))
    """How that one is asked. Where it is, turns out when it runs."""
    fallback: Provider | None = None
    """Asked when the first fails before its first token."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    supervisor: SupervisorSettings = field(default_factory=SupervisorSettings)
    session: SessionSettings = field(default_factory=SessionSettings)
    ops_host: str = "127.0.0.1"
    ops_port: int = 0
    """Where metrics are served; 0 serves none."""
    drain_timeout: float = 0.0
    """Seconds that live requests may take to end when the gateway is told to."""


def _demo(model: str, **limits: Any) -> Provider:
    return Provider(base_url="", model=model, stops_on_close=StopsOnClose.YES, **limits)


class SettingsError(Exception):
    """Settings that cannot be used.

    Args:
        faults: one line for each.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__(*faults)
        self.faults = faults


# What there is to set ----------------------------------------------------------------------------


def _meta(kind: str, metavar: str, **bounds: Any) -> Meta:
    return Meta(**bounds, extra={"kind": kind, "metavar": metavar})


@dataclass(frozen=True)
class Private:
    """May hold a secret; `blot` leaves of a value what everybody may see."""

    blot: Callable[[Any], Any]


def _blot_url(url: str) -> str:
    """Without credentials and without the query, where some providers have the key."""
    before, at, after = url.rpartition("@")
    scheme, slashes, _ = before.partition("://")
    url = f"{scheme + slashes if slashes else ''}***@{after}" if at else url
    found = re.search(r"[?#]", url)
    return url[: found.end()] + "***" if found else url


def _blot_headers(headers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(header.partition(":")[0] + ": ***" for header in headers)


def _blot_fields(fields: Mapping[str, Any]) -> dict[str, str]:
    return dict.fromkeys(fields, "***")


Seconds: TypeAlias = Annotated[
    float, _meta(f"a number of seconds, 0 to {_MOST}", "SECONDS", ge=0, le=_MOST)
]
Port: TypeAlias = Annotated[int, _meta("a port, 0 to 65535", "PORT", ge=0, le=65535)]
Bytes: TypeAlias = Annotated[
    int, _meta(f"a number of bytes, 1 to {_MOST_BYTES}", "BYTES", ge=1, le=_MOST_BYTES)
]
Count: TypeAlias = Annotated[int, _meta(f"a whole number, 0 to {_MOST}", "N", ge=0, le=_MOST)]
Url: TypeAlias = Annotated[str, _meta("a URL", "URL"), Private(_blot_url)]
Name: TypeAlias = Annotated[str, _meta("a name", "NAME", min_length=1)]
# Not shown: it may be the key itself, by mistake.
KeyFilePath: TypeAlias = Annotated[
    str, _meta("the path of a file", "KEY_FILE", min_length=1), Private(lambda _: "***")
]
FilePath: TypeAlias = Annotated[str, _meta("the path of a file", "FILE", min_length=1)]
Headers: TypeAlias = Annotated[
    tuple[str, ...],
    _meta("a list of headers, each as 'Name: value'", "HEADER"),
    Private(_blot_headers),
]
# RFC 6454, section 6.2: a scheme, a host, maybe a port, and no path.
Origins: TypeAlias = Annotated[
    tuple[Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^/?#@\s]+/?\Z")], ...],
    _meta("a list of web origins, each as https://chat.example.com", "ORIGIN"),
]
Fields: TypeAlias = Annotated[dict[str, Any], _meta("a JSON object", "JSON"), Private(_blot_fields)]


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
    insecure_no_auth: Annotated[
        bool, About("listen beyond loopback although anybody may connect")
    ] = False
    outbox_bytes: Annotated[Bytes, About("that may wait for one client")] = _server.outbox.max_bytes
    write_timeout: Annotated[Seconds, About("that a client may read nothing; 0 is off")] = (
        _server.outbox.write_timeout
    )

    ops_host: Annotated[Name, Section("operation"), About("address for metrics to listen on")] = (
        "127.0.0.1"
    )
    ops_port: Annotated[Port, About("port for metrics; 0 is off")] = 9464
    drain_timeout: Annotated[
        Seconds, About("that live requests may take to end at a shutdown; 0 ends them at once")
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
        Count, About("how often a provider is asked again, before the first token only")
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
    llm_breaker_timeout: Annotated[Seconds, About("until the first is tried again then")] = (
        _generation.breaker_seconds
    )

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
class _Setting:
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
        return _ENVIRONMENT + self.key.upper()

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

    def blotted(self, value: Any) -> Any:
        """What everybody may see of a value."""
        return self.private.blot(value) if self.private else value


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


def _settings() -> Iterator[_Setting]:
    section = ""
    for one in msgspec.structs.fields(Config):
        said = list(_annotations(one.type))
        section = next((item.name for item in said if isinstance(item, Section)), section)
        about = next(item for item in said if isinstance(item, About))
        extra = next((item.extra for item in said if isinstance(item, Meta)), None) or {}
        choices = list(_choices(one.type))
        kind = extra.get("kind", "one of " + ", ".join(choices) if choices else "true or false")
        yield _Setting(
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


_RESTART = frozenset(
    {"llm_total_timeout", "llm_breaker_failures", "llm_breaker_timeout"}
    | {key for key in Config.__struct_fields__ if not key.startswith("llm_")}
)
"""What a running gateway does not take up: everything but its providers."""

SETTINGS: dict[str, _Setting] = {setting.key: setting for setting in _settings()}
"""By key, in the order in which people are shown them."""


# Showing them ------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser one flag for each setting, and `--config`."""
    parser.add_argument(
        "--config",
        metavar="TOML",
        help=f"a file of settings (default: {_CONFIG_VARIABLE}); run.py default-config prints one",
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


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _plain(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Mapping):
        pairs = (f"{_toml_key(key)} = {_toml(one)}" for key, one in value.items())
        return "{ " + ", ".join(pairs) + " }"
    # A string of JSON is one of TOML, but for one character that TOML wants written as its number.
    return json.dumps(_plain(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


_DEFAULT_CONFIG_HEAD = f"""\
Settings of bargein, for `run.py --config FILE` (or {_CONFIG_VARIABLE}=FILE).

As it stands, this file changes nothing: every setting is commented out, with its default, or with
an example where it has none. `run.py check-config --config FILE` says what is wrong with yours.

What the command line or the environment say ranks higher: --llm-url, then BARGEIN_LLM_URL, then
OPENAI_BASE_URL, then llm_url here. There are no tables: all settings stand side by side.

Secrets are not written here. llm_api_key_env names the environment variable that holds the key,
llm_api_key_file the file; ${{VARIABLE}} in a header or a proxy's URL is put in from the
environment.

At a SIGHUP this file is read anew: providers are asked as it says then, the rest needs a restart.
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
        lines.append(f"#{setting.key} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _flag_to_key(found: re.Match[str]) -> str:
    return found[0][2:].replace("-", "_")


# Reading them ------------------------------------------------------------------------------------


class Given:
    """What was given, and where. Raises nothing: `settings()` has the faults.

    Args:
        flags: by key, as the parser of `add_flags` gives them.
        environ: the environment.
        strays: what that parser did not know.
    """

    def __init__(
        self, flags: Mapping[str, Any], environ: Mapping[str, str], strays: Sequence[str] = ()
    ) -> None:
        self.warnings: list[str] = []
        """What is odd, and no fault."""
        self._environ = environ
        self._faults: dict[str, None] = {}  # in order, each once
        self._in_doubt: set[str] = set()
        """Keys that somebody tried to give: that they are missing is no second fault."""
        self._where: dict[str, str] = {}
        """By key, what gave it its value."""
        self._values: dict[str, Any] = {}
        # From the least in rank to the highest.
        if (path := flags.get("config")) is not None:
            self._read_file("--config", path)
        elif path := environ.get(_CONFIG_VARIABLE, "").strip():
            self._read_file(_CONFIG_VARIABLE, path)
        if (url := environ.get("OPENAI_BASE_URL", "")).strip():
            self._take("llm_url", "OPENAI_BASE_URL", url, SETTINGS["llm_url"].parse)
        self._read_environment()
        self._read_flags(flags, strays)
        self.config = Config(**self._values)
        self._faults_of_reading = tuple(self._faults)

    def settings(self) -> Settings:
        """What the parts of the gateway are to do.

        Raises:
            SettingsError: with one line per fault.
        """
        self._faults = dict.fromkeys(self._faults_of_reading)
        config = self.config
        provider = fallback = None
        if config.llm_url is not None:
            provider = self._provider("llm_")
        else:
            self._check_demo()
        if config.llm_fallback_url is not None:
            self._needs("llm_fallback_url", "llm_url", "whose fallback is it?")
            fallback = self._provider("llm_fallback_")
        else:
            for key in SETTINGS:
                if key.startswith("llm_fallback_"):
                    self._needs(key, "llm_fallback_url")
        if not (config.insecure_no_auth or _is_loopback(config.host)):
            self._needs(
                "host",
                "insecure_no_auth",
                "it is not loopback, there is no authentication yet, and anybody who can reach it "
                "could spend your key",
            )
        if self._faults:
            raise SettingsError(list(self._faults))
        return Settings(
            provider=provider,
            demo=_demo(config.llm_model or "demo", **self._limits()),
            fallback=fallback,
            generation=GenerationSettings(
                total_timeout=config.llm_total_timeout,
                breaker_failures=config.llm_breaker_failures,
                breaker_seconds=config.llm_breaker_timeout,
            ),
            server=ServerSettings(
                host=config.host,
                port=config.port,
                allowed_origins=config.allow_origin,
                outbox=OutboxSettings(config.outbox_bytes, config.write_timeout),
            ),
            supervisor=SupervisorSettings(
                config.stale_after, config.reap_interval, config.request_max_age
            ),
            session=SessionSettings(
                on_new_request=config.on_new_request,
                session_timeout=config.session_timeout,
                heartbeat_interval=config.heartbeat_interval,
                history_messages=config.history_messages,
                history_chars=config.history_chars,
            ),
            ops_host=config.ops_host,
            ops_port=config.ops_port,
            drain_timeout=config.drain_timeout,
        )

    def need_restart(self, running: Config) -> list[str]:
        """Keys that differ from a running gateway's, and that it does not take up."""
        config = self.config
        changed = [key for key in SETTINGS if getattr(config, key) != getattr(running, key)]
        if (config.llm_url is None) != (running.llm_url is None):
            return changed  # the demo provider runs in its place, or does not
        return [key for key in changed if key in _RESTART]

    def report(self) -> list[str]:
        """A line for each setting that has not its default, with what gave it that value; to be
        shown only of what `settings()` has no fault with."""
        return [
            f"{key} = {_toml(setting.blotted(value))}  # {self._where[key]}"
            for key, setting in SETTINGS.items()
            if (value := getattr(self.config, key)) != setting.default
        ]

    # Where it comes from.

    def _read_file(self, name: str, path: str) -> None:
        try:
            # Editors on Windows begin a file with a byte order mark.
            given = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            self._fault(f"{name} {path}: {error.strerror or error}")
        except UnicodeDecodeError as error:
            self._fault(f"{name} {path} is not UTF-8 (byte {error.start})")
        except (ValueError, RecursionError) as error:
            self._fault(f"{name} {path} is not TOML: {error}")
        else:
            for key, value in given.items():
                if (setting := SETTINGS.get(key)) is not None:
                    self._take(key, f"{path}: {key}", value, setting.check)
                else:
                    self._unknown_in_file(path, [key], value)
            return
        self._in_doubt.update(SETTINGS)

    def _unknown_in_file(self, path: str, keys: list[str], value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, one in value.items():
                self._unknown_in_file(path, [*keys, key], one)
            return
        near = self._near("_".join(keys))
        hint = f"; is it {near.key}?" if near else ""
        if len(keys) > 1:
            hint += " (there are no tables: all settings stand side by side)"
        self._fault(f"{path}: there is no setting {'.'.join(keys)!r}{hint}")

    def _read_environment(self) -> None:
        for variable, text in self._environ.items():
            key = variable.removeprefix(_ENVIRONMENT).lower()
            if not variable.startswith(_ENVIRONMENT) or variable in _NOT_SETTINGS:
                continue
            setting = SETTINGS.get(key)
            if setting is None or setting.variable != variable:
                near = self._near(key)
                hint = f"; is it {near.variable}?" if near else ""
                self.warnings.append(f"there is no setting {variable}{hint}")
            elif text.strip():  # set to nothing is how some tools say that it is not set
                self._take(key, variable, text, setting.parse)

    def _read_flags(self, flags: Mapping[str, Any], strays: Sequence[str]) -> None:
        for key, value in flags.items():
            if (setting := SETTINGS.get(key)) is not None:
                read = setting.parse if isinstance(value, str) else setting.check
                self._take(key, setting.flag, value, read)
        may_be_value = False
        for word in strays:
            if word.startswith("-"):
                flag, equals, _ = word.partition("=")
                near = self._near(flag.strip("-"))
                hint = f"; is it {near.flag}?" if near else ""
                self._fault(f"there is no flag {flag}{hint}")
                may_be_value = not equals
            elif may_be_value:
                may_be_value = False
            else:
                # Which one, is not said: it may be half of a secret with a space in it.
                self._fault("a word too many on the command line: is one with a space not quoted?")

    def _near(self, word: str) -> _Setting | None:
        """The setting that somebody may have meant, who was wrong about its name."""
        word = word.lower().replace("-", "_")
        near = [word] if word in SETTINGS else difflib.get_close_matches(word, SETTINGS, 1, 0.75)
        if not near:
            return None
        self._in_doubt.add(near[0])
        return SETTINGS[near[0]]

    def _take(self, key: str, where: str, given: Any, read: Callable[[Any], Any]) -> None:
        try:
            self._values[key] = read(given)
            self._where[key] = where
        except ValueError:
            self._in_doubt.add(key)
            setting = SETTINGS[key]
            shown = "" if setting.private else f" {_in_words(given, setting)}"
            self._fault(f"{where}{shown} is not {setting.kind}")

    def _fault(self, line: str) -> None:
        self._faults[line] = None

    def _needs(self, key: str, other: str, why: str = "") -> None:
        """A setting that is not left at its default is of no use while another one is."""
        value, setting = getattr(self.config, key), SETTINGS[key]
        is_missing = getattr(self.config, other) == SETTINGS[other].default
        if value == setting.default or not is_missing or other in self._in_doubt:
            return
        shown = f" {setting.blotted(value)}" if isinstance(value, str) else ""
        self._fault(
            f"{self._name(key)}{shown} needs {SETTINGS[other].flag}" + (f": {why}" if why else "")
        )

    def _name(self, key: str) -> str:
        """What people know a setting by, that they gave or should."""
        return self._where.get(key, SETTINGS[key].flag)

    # Providers.

    def _limits(self) -> dict[str, Any]:
        config = self.config
        return {
            "connect_timeout": config.llm_connect_timeout,
            "first_token_timeout": config.llm_first_token_timeout,
            "idle_timeout": config.llm_idle_timeout,
            "retries": config.llm_retries,
            "retry_after_cap": config.llm_retry_after_cap,
        }

    def _check_demo(self) -> None:
        for key, setting in SETTINGS.items():
            if setting.section == "provider" and key != "llm_model":
                self._needs(key, "llm_url", "the demo provider has no use for it")
        model = self.config.llm_model
        if model is None or "llm_url" in self._in_doubt:
            return
        try:
            choose(model)
        except NoScenarioError as error:
            self._fault(f"{self._name('llm_model')} {model!r}: {error}")
            return
        name = model.partition(":")[0]
        if name not in SCENARIOS and name not in ALIASES:
            self._fault(
                f"{self._name('llm_model')} needs --llm-url: the demo provider has no model "
                f"{model!r} (run.py demo-llm --help lists what it has)"
            )

    def _provider(self, prefix: str) -> Provider | None:
        config = self.config

        def name(key: str) -> str:
            return self._name(prefix + key)

        def value(key: str) -> Any:
            return getattr(config, prefix + key)

        faults_before = len(self._faults)
        url = value("url")
        if self._is_url(name("url"), url):
            self._needs(prefix + "url", prefix + "model", "which of its models?")
        extra_body = value("extra_body") or {}
        self._checked(name("extra_body"), check_extra_body, extra_body)
        headers = self._headers(prefix + "header")
        key_header = value("key_header")
        if key_header is not None:
            self._checked(name("key_header"), check_headers, {key_header: ""})
        proxy = self._proxy(prefix + "proxy")
        ca_file = value("ca_file")
        if ca_file is not None and not Path(ca_file).is_file():
            self._fault(f"{name('ca_file')} {ca_file!r} is no file")
        is_in_file = value("api_key_file") is not None
        api_key = self._key_of_file(prefix) if is_in_file else self._key(prefix + "api_key_env")
        if len(self._faults) > faults_before or value("model") is None:
            return None
        provider = Provider(
            base_url=url,
            model=value("model"),
            api_key=api_key,
            key_header=key_header,
            headers=headers,
            extra_body=extra_body,
            include_usage=value("include_usage"),
            stops_on_close=value("stops_on_close"),
            proxy=proxy,
            ca_file=ca_file,
            **self._limits(),
        )
        try:
            ProviderClient(provider).close()
        except OSError as error:
            self._fault(f"{name('ca_file')} {ca_file!r} holds no certificates: {error}")
        except ValueError:
            # Of the proxy: the other URL was looked at. urllib3's words may hold its password.
            self._fault(f"{name('proxy')} is not the URL of an HTTP proxy, as http://host:port")
        return provider

    def _is_url(self, name: str, url: str) -> bool:
        if _CREDENTIALS_IN_URL.match(url):
            self._fault(f"{name} holds credentials: the key comes from a variable or a file")
            return False
        try:
            completions_url(url)
        except ValueError as error:
            # The reason may quote a part of what stands before the @.
            why = "is not the URL of a server" if "@" in url else error
            self._fault(f"{name} {_blot_url(url)!r} {why}")
            return False
        return True

    def _checked(self, name: str, check: Callable[[_T], None], value: _T) -> None:
        try:
            check(value)
        except ValueError as error:
            self._fault(f"{name}: {error}")

    def _headers(self, key: str) -> dict[str, str]:
        name = self._name(key)
        headers: dict[str, str] = {}
        for number, line in enumerate(getattr(self.config, key), 1):
            title, colon, value = (part.strip() for part in line.partition(":"))
            if not colon:
                self._fault(f"{name} number {number} is no header: it must be 'Name: value'")
                continue
            if title.lower() in (other.lower() for other in headers):
                self._fault(f"{name}: {title} is given twice")
            if _SECRET_HEADER.fullmatch(title) and not self._may_hold_secrets(key, value):
                self._fault(f"{name}: {title} holds a secret: put ${{VARIABLE}} in its place")
            headers[title] = self._expanded(name, value)
        self._checked(name, check_headers, headers)
        return headers

    def _proxy(self, key: str) -> str | None:
        proxy: str | None = getattr(self.config, key)
        if proxy is None:
            return None
        name = self._name(key)
        password = _password_of(proxy)
        if password and not self._may_hold_secrets(key, password):
            self._fault(f"{name} holds a password: put ${{VARIABLE}} in its place")
        faults_before = len(self._faults)
        is_variable = _VARIABLE.fullmatch(proxy) is not None
        proxy = self._expanded(name, proxy, is_in_url=not is_variable)
        if len(self._faults) == faults_before:
            self._checked(name, check_proxy, proxy)
        return proxy

    def _may_hold_secrets(self, key: str, value: str) -> bool:
        """Whether this value is the environment's: command lines are everybody's to read, and
        files are passed around."""
        is_environment = self._where.get(key) == SETTINGS[key].variable
        return is_environment or _VARIABLE.search(value) is not None

    def _expanded(self, name: str, text: str, *, is_in_url: bool = False) -> str:
        def of_environment(found: re.Match[str]) -> str:
            value = self._environ.get(found[1], "").strip()
            if not value:
                # Else it may be the secret itself, by mistake.
                shown = found[1] if _VARIABLE_NAME.fullmatch(found[1]) else "of that name in ${}"
                self._fault(f"{name}: there is no environment variable {shown}, or it is empty")
            return quote(value, safe=":") if is_in_url else value

        return _VARIABLE.sub(of_environment, text)

    def _key(self, key: str) -> str | None:
        variable: str | None = getattr(self.config, key)
        if variable is None:
            return None
        # Keys that come from files end in a newline.
        api_key = self._environ.get(variable, "").strip()
        if not api_key and variable != SETTINGS[key].default:
            # What is not shown may be the key itself, by mistake.
            self._fault(f"{self._name(key)} is not the name of an environment variable that is set")
        self._check_key(variable, api_key)
        return api_key or None

    def _key_of_file(self, prefix: str) -> str:
        key = prefix + "api_key_file"
        name, path = self._name(key), Path(getattr(self.config, key))
        if not path.is_file():  # nor is a pipe one, which could keep everybody waiting
            self._fault(f"{name} is not the path of a file")
            return ""
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_KEY_BYTES + 1)
        except OSError as error:
            self._fault(f"{name} names a file that cannot be read: {error.strerror}")
            return ""
        api_key = content.decode("ascii", "replace").strip()
        if not api_key:
            self._fault(f"{name} names a file that is empty")
        elif len(content) > _MOST_KEY_BYTES:
            self._fault(f"{name} names a file that is too large for a key")
        else:
            self._check_key(f"the file of {name}", api_key)
        return api_key

    def _check_key(self, where: str, api_key: str) -> None:
        # RFC 6750, section 2.1: a bearer token is of visible ASCII characters.
        if not all("!" <= char <= "~" for char in api_key):
            self._fault(f"{where} holds characters that no key has (its value is not shown)")


def _in_words(given: Any, setting: _Setting) -> str:
    """What was given, for a message."""
    if isinstance(given, list):
        return ", ".join(map(repr, given)) if setting.is_a(tuple) else "(a list)"
    return "(a table)" if isinstance(given, dict) else repr(given)


def _password_of(url: str) -> str:
    user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    return user.partition(":")[2] if at else ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
