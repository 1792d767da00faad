"""Every setting, declared once as a field of `Config`; read from flags, environment and file.

A field gives the flag (`--llm-url`), the environment variable (`BARGEIN_LLM_URL`) and the key in
the file (`llm_url`), in this order of rank, and its default. Faults name what was wrong where.
"""

from __future__ import annotations

import argparse
import difflib
import enum
import ipaddress
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
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
    get_type_hints,
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
from llm.scenarios import ALIASES, SCENARIOS
from llm.stream import GenerationSettings

_T = TypeVar("_T")

_ENVIRONMENT = "BARGEIN_"
_NOT_SETTINGS = frozenset({"BARGEIN_REAL_SERVERS"})
"""Variables of ours that are for the tests."""

_UNIONS = (Union, UnionType)

_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, by room."""

    provider: Provider | None = None
    """None starts the embedded demo provider."""
    demo_model: str = "demo"
    """What that one is asked for."""
    fallback: Provider | None = None
    """Asked when the first fails before its first token."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    supervisor: SupervisorSettings = field(default_factory=SupervisorSettings)
    session: SessionSettings = field(default_factory=SessionSettings)


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


Seconds: TypeAlias = Annotated[float, _meta("a number of seconds, 0 or more", "SECONDS", ge=0)]
Port: TypeAlias = Annotated[int, _meta("a port, 0 to 65535", "PORT", ge=0, le=65535)]
Bytes: TypeAlias = Annotated[int, _meta("a number of bytes, 1 or more", "BYTES", ge=1)]
Count: TypeAlias = Annotated[int, _meta("a whole number, 0 or more", "N", ge=0)]
Url: TypeAlias = Annotated[str, _meta("a URL", "URL")]
Name: TypeAlias = Annotated[str, _meta("a name", "NAME", min_length=1)]
Path_: TypeAlias = Annotated[str, _meta("the path of a file", "FILE", min_length=1)]
Headers: TypeAlias = Annotated[
    tuple[str, ...], _meta("a list of headers, each as 'Name: value'", "HEADER")
]
Origins: TypeAlias = Annotated[tuple[str, ...], _meta("a list of web origins", "ORIGIN")]
Fields: TypeAlias = Annotated[dict[str, Any], _meta("a JSON object", "JSON")]


@dataclass(frozen=True)
class About:
    """What a setting is for, in a line."""

    text: str


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
        About("web origin whose pages may connect, as https://chat.example.com; repeatable"),
    ] = ()
    insecure_no_auth: Annotated[
        bool, About("listen beyond loopback although anybody may connect")
    ] = False
    outbox_bytes: Annotated[Bytes, About("that may wait for one client")] = _server.outbox.max_bytes
    write_timeout: Annotated[Seconds, About("that a client may read nothing; 0 is off")] = (
        _server.outbox.write_timeout
    )

    llm_url: Annotated[
        Url | None,
        Section("provider"),
        About(
            "OpenAI-style base, as http://host:port/v1, or the whole URL of its chat completions; "
            "else OPENAI_BASE_URL; without either, an embedded demo provider"
        ),
    ] = None
    llm_model: Annotated[Name | None, About("model to ask for")] = None
    llm_api_key_env: Annotated[Name, About("environment variable that holds the key")] = (
        "OPENAI_API_KEY"
    )
    llm_key_header: Annotated[
        Name | None,
        About("header that takes the key as it is (Azure: api-key); else it is a bearer token"),
    ] = None
    llm_header: Annotated[
        Headers, About("one more header, as 'Name: value'; ${VARIABLE} is put in; repeatable")
    ] = ()
    llm_extra_body: Annotated[Fields | None, About("more fields for the body of a request")] = None
    llm_include_usage: Annotated[bool, About("ask for the usage at the end of a stream")] = (
        _provider.include_usage
    )
    llm_stops_on_close: Annotated[
        StopsOnClose,
        About("whether the provider stops to generate, and to bill, when its connection closes"),
    ] = _provider.stops_on_close
    llm_proxy: Annotated[
        Url | None,
        About("HTTP proxy on the way, as http://host:port; ${VARIABLE} is put in"),
    ] = None
    llm_ca_file: Annotated[
        Path_ | None, About("certificate authorities to trust for the provider")
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
        Seconds, About("most that its Retry-After makes us wait; 0 is off")
    ] = _provider.retry_after_cap

    llm_fallback_url: Annotated[
        Url | None,
        Section("fallback provider, asked when the first fails before its first token"),
        About("as --llm-url"),
    ] = None
    llm_fallback_model: Annotated[Name | None, About("as --llm-model")] = None
    llm_fallback_api_key_env: Annotated[
        Name | None, About("as --llm-api-key-env; without it, no key is sent")
    ] = None
    llm_fallback_key_header: Annotated[Name | None, About("as --llm-key-header")] = None
    llm_fallback_header: Annotated[Headers, About("as --llm-header")] = ()
    llm_fallback_extra_body: Annotated[Fields | None, About("as --llm-extra-body")] = None
    llm_fallback_include_usage: Annotated[bool, About("as --llm-include-usage")] = (
        _provider.include_usage
    )
    llm_fallback_stops_on_close: Annotated[StopsOnClose, About("as --llm-stops-on-close")] = (
        _provider.stops_on_close
    )
    llm_fallback_proxy: Annotated[Url | None, About("as --llm-proxy")] = None
    llm_fallback_ca_file: Annotated[Path_ | None, About("as --llm-ca-file")] = None
    llm_breaker_failures: Annotated[
        Count, About("failures in a row after which only the fallback is asked; 0 is off")
    ] = _generation.breaker_failures
    llm_breaker_timeout: Annotated[
        Seconds, About("for how long, before the first is tried again")
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
    reap_interval: Annotated[Seconds, About("between two looks for them; 0 is off")] = (
        _supervisor.reap_interval
    )
    request_max_age: Annotated[Seconds, About("until any request is reaped; 0 is off")] = (
        _supervisor.request_max_age
    )

    log_format: Annotated[
        Literal["text", "json"] | None, Section("log"), About("text on a terminal, else json")
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], About("least level that is logged")
    ] = "info"


@dataclass(frozen=True)
class _Setting:
    """One field of `Config`, looked at."""

    key: str
    type: Any
    """With its bounds, without what is for people."""
    default: Any
    about: str
    section: str
    kind: str
    metavar: str

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
        if self.is_a(dict):
            return self.check(msgspec.json.decode(text))
        if self.is_a(tuple):
            return self.check(tuple(line for line in text.splitlines() if line.strip()))
        return self.check(text.strip(), strict=False)

    def check(self, value: Any, *, strict: bool = True) -> Any:
        """A value, of what a file says. Raises ValueError when it is none."""
        converted = msgspec.convert(value, self.type, strict=strict)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError(value)
        return converted


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
    hints = get_type_hints(Config, include_extras=True)
    for one in msgspec.structs.fields(Config):
        hint = hints[one.name]
        said = list(_annotations(hint))
        section = next((item.name for item in said if isinstance(item, Section)), section)
        about = next(item.text for item in said if isinstance(item, About))
        extra = next((item.extra for item in said if isinstance(item, Meta)), None) or {}
        choices = [choice for choice in _choices(hint) if choice is not None]
        kind = extra.get("kind", "")
        if choices:
            kind = "one of " + ", ".join(choices)
        elif any(item is bool for item in _alternatives(hint)):
            kind = "true or false"
        metavar = extra.get("metavar", "|".join(choices))
        yield _Setting(one.name, one.type, one.default, about, section, kind, metavar)


def _choices(kind: Any) -> Iterator[str]:
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            yield from get_args(one)
        elif isinstance(one, type) and issubclass(one, enum.Enum):
            yield from (member.value for member in one)


SETTINGS: dict[str, _Setting] = {setting.key: setting for setting in _settings()}
"""By key, in the order in which people are shown them."""


# Reading them ------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser one flag for each setting, and `--config`."""
    parser.add_argument(
        "--config", metavar="TOML", help="a file of settings, under the names that the flags have"
    )
    groups: dict[str, Any] = {}
    for setting in SETTINGS.values():
        if setting.section not in groups:
            groups[setting.section] = parser.add_argument_group(setting.section)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": setting.key}
        if setting.is_a(bool) and setting.default:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.is_a(bool):
            options["action"] = "store_true"
        else:
            options["metavar"] = setting.metavar
            options["action"] = "append" if setting.is_a(tuple) else "store"
        shown = _shown(setting.default)
        help_text = setting.about + (f" (default: {shown})" if shown else "")
        groups[setting.section].add_argument(
            setting.flag, help=help_text.replace("%", "%%"), **options
        )


def _shown(default: Any) -> str:
    if default is None or default is False or default == ():
        return ""
    if isinstance(default, enum.Enum):
        default = default.value
    if default is True:
        return "yes"
    return f"{default:g}" if isinstance(default, float) else str(default)


class Given:
    """What was given, and where.

    Args:
        flags: by key, as the parser of `add_flags` gives them.
        environ: the environment.

    Raises:
        SettingsError: with one line per fault.
    """

    def __init__(self, flags: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self.warnings: list[str] = []
        """What is odd, and no fault."""
        self._environ = environ
        self._faults: list[str] = []
        self._where: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        # From the least in rank to the highest.
        if (path := flags.get("config")) is not None:
            self._read_file(path)
        if url := environ.get("OPENAI_BASE_URL"):
            self._take("llm_url", "OPENAI_BASE_URL", url, SETTINGS["llm_url"].parse)
        self._read_environment()
        self._read_flags(flags)
        self.config = Config(**self._values)

    def settings(self) -> Settings:
        """What the parts of the gateway are to do.

        Raises:
            SettingsError: with one line per fault.
        """
        config = self.config
        provider = fallback = None
        if config.llm_url is not None:
            provider = self._provider("llm_")
        elif config.llm_model is not None and not _is_scenario(config.llm_model):
            self._fault(
                f"{self._name('llm_model')} needs --llm-url: the demo provider has no model "
                f"{config.llm_model!r} (run.py demo-llm --help lists what it has)"
            )
        if config.llm_fallback_url is not None and config.llm_url is None:
            self._fault(f"{self._name('llm_fallback_url')} needs --llm-url: whose fallback is it?")
        elif config.llm_fallback_url is not None:
            fallback = self._provider("llm_fallback_")
        elif config.llm_fallback_model is not None:
            self._fault(f"{self._name('llm_fallback_model')} needs --llm-fallback-url")
        if not config.insecure_no_auth and not _is_loopback(config.host):
            self._fault(
                f"{self._name('host')} {config.host} is not loopback, and anybody who can reach it "
                "could spend your key: there is no authentication yet. Add --insecure-no-auth if "
                "you mean it"
            )
        if self._faults:
            raise SettingsError(self._faults)
        return Settings(
            provider=provider,
            demo_model=config.llm_model or "demo",
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
        )

    # Where it comes from.

    def _read_file(self, path: str) -> None:
        try:
            given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            self._fault(f"--config {path}: {error.strerror or error}")
            return
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self._fault(f"--config {path} is not TOML: {error}")
            return
        for key, value in given.items():
            if key in SETTINGS:
                self._take(key, f"{key} in {path}", value, SETTINGS[key].check)
            else:
                self._fault(f"{path}: there is no setting {key!r}{_guess(key, SETTINGS)}")

    def _read_environment(self) -> None:
        by_variable = {setting.variable: setting for setting in SETTINGS.values()}
        for variable, text in self._environ.items():
            if not variable.startswith(_ENVIRONMENT) or variable in _NOT_SETTINGS:
                continue
            setting = by_variable.get(variable)
            if setting is None:
                guess = _guess(variable, by_variable)
                self.warnings.append(f"there is no setting {variable}{guess}")
            elif text:
                self._take(setting.key, variable, text, setting.parse)

    def _read_flags(self, flags: Mapping[str, Any]) -> None:
        for key, value in flags.items():
            if (setting := SETTINGS.get(key)) is not None:
                is_text = isinstance(value, str)
                self._take(key, setting.flag, value, setting.parse if is_text else setting.check)

    def _take(self, key: str, where: str, given: Any, read: Callable[[Any], Any]) -> None:
        try:
            self._values[key] = read(given)
            self._where[key] = where
        except (ValueError, msgspec.DecodeError):
            # Of a header, the value may be secret.
            shown = "" if SETTINGS[key].is_a(tuple) else f" {given!r}"
            self._fault(f"{where}{shown} is not {SETTINGS[key].kind}")

    def _fault(self, line: str) -> None:
        self._faults.append(line)

    def _name(self, key: str) -> str:
        """What people know a setting by, that they gave or should."""
        return self._where.get(key, SETTINGS[key].flag)

    # Providers.

    def _provider(self, prefix: str) -> Provider | None:
        config = self.config

        def name(key: str) -> str:
            return self._name(prefix + key)

        def value(key: str) -> Any:
            return getattr(config, prefix + key)

        faults_before = len(self._faults)
        url = value("url")
        if "@" in url.partition("://")[2].partition("/")[0]:
            self._fault(f"{name('url')} holds credentials: the key comes from the environment only")
        else:
            try:
                completions_url(url)
            except ValueError as error:
                self._fault(f"{name('url')} {url!r} {error}")
            else:
                if value("model") is None:
                    flag = SETTINGS[prefix + "model"].flag
                    self._fault(f"{name('url')} {url} needs {flag}: which of its models?")
        extra_body = value("extra_body") or {}
        self._checked(name("extra_body"), check_extra_body, extra_body)
        headers = self._headers(name("header"), value("header"))
        key_header = value("key_header")
        if key_header is not None:
            self._checked(name("key_header"), check_headers, {key_header: ""})
        proxy = value("proxy")
        if proxy is not None:
            password = _password_of(proxy)
            is_secret = name("proxy") == SETTINGS[prefix + "proxy"].variable
            if password and not (is_secret or _VARIABLE.search(password)):
                self._fault(f"{name('proxy')} holds a password: put ${{VARIABLE}} in its place")
            is_variable = _VARIABLE.fullmatch(proxy) is not None
            proxy = self._expanded(name("proxy"), proxy, is_in_url=not is_variable)
            self._checked(name("proxy"), check_proxy, proxy)
        ca_file = value("ca_file")
        if ca_file is not None and not Path(ca_file).is_file():
            self._fault(f"{name('ca_file')} {ca_file!r} is no file")
        api_key = self._key(value("api_key_env"))
        if len(self._faults) > faults_before:
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
            connect_timeout=config.llm_connect_timeout,
            first_token_timeout=config.llm_first_token_timeout,
            idle_timeout=config.llm_idle_timeout,
            retries=config.llm_retries,
            retry_after_cap=config.llm_retry_after_cap,
            proxy=proxy,
            ca_file=ca_file,
        )
        try:
            ProviderClient(provider).close()
        except OSError as error:
            self._fault(f"{name('ca_file')} {ca_file!r} holds no certificates: {error}")
        return provider

    def _checked(self, name: str, check: Callable[[_T], None], value: _T) -> None:
        try:
            check(value)
        except ValueError as error:
            self._fault(f"{name}: {error}")

    def _headers(self, name: str, given: tuple[str, ...]) -> dict[str, str]:
        headers = {}
        for number, line in enumerate(given, 1):
            title, colon, value = line.partition(":")
            if not colon:
                self._fault(f"{name} number {number} is no header: it must be 'Name: value'")
                continue
            headers[title.strip()] = self._expanded(name, value.strip())
        self._checked(name, check_headers, headers)
        return headers

    def _expanded(self, name: str, text: str, *, is_in_url: bool = False) -> str:
        def of_environment(found: re.Match[str]) -> str:
            value = self._environ.get(found[1])
            if value is None:
                self._fault(f"{name}: there is no environment variable {found[1]}")
            value = (value or "").strip()
            return quote(value, safe=":") if is_in_url else value

        return _VARIABLE.sub(of_environment, text)

    def _key(self, variable: str | None) -> str | None:
        # Keys that come from files end in a newline.
        key = self._environ.get(variable, "").strip() if variable else ""
        # RFC 6750, section 2.1: a bearer token is of visible ASCII characters.
        if not all("!" <= char <= "~" for char in key):
            self._fault(f"{variable} holds characters that no key has (its value is not shown)")
        return key or None


def _password_of(url: str) -> str:
    user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    return user.partition(":")[2] if at else ""


def _is_scenario(model: str) -> bool:
    name = model.partition(":")[0]
    return name in SCENARIOS or name in ALIASES


def _guess(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; is it {close[0]}?" if close else ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
