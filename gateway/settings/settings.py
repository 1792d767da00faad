"""What the parts of the gateway are to do: what was given, checked and put together.

Faults name what was wrong where. No value is shown that may be secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from actors.loop.lanes import lanes
from actors.session.session import SessionSettings
from actors.supervisor import SupervisorSettings
from gateway.access.credentials import Credentials, CredentialsError
from gateway.access.credentials import parse as parse_credentials
from gateway.server.outbox import OutboxSettings
from gateway.server.server import ServerSettings
from gateway.settings.options import SETTINGS, redact_url
from gateway.settings.sources import ConfigSources
from llm.chat.client import ProviderClient
from llm.chat.generation import GenerationSettings
from llm.demo.scenarios import ALIASES, SCENARIOS, NoScenarioError, choose
from llm.provider import (
    Provider,
    StopsOnClose,
    check_extra_body,
    check_headers,
    check_proxy,
    completions_url,
)

_T = TypeVar("_T")

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_HEADER = re.compile(r"(proxy-)?authorization|cookie|(.*-)?api-key", re.IGNORECASE)
_CREDENTIALS_IN_URL = re.compile(r"[^/?#]*//[^/?#]*@")

_MOST_KEY_BYTES = 64 * 1024
_MOST_AUTH_FILE_BYTES = 1024 * 1024
"""8,000 accounts, which take 0.1 s to read; while a running gateway does, everybody waits."""


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
    credentials: Credentials | None = None
    """Who may register; None is anybody."""
    ops_host: str = "127.0.0.1"
    ops_port: int = 0
    """Where metrics are served; 0 serves none."""
    drain_timeout: float = 0.0
    """Seconds that a shutdown may take; 0 gives live requests no time to end by themselves."""

    @classmethod
    def of(cls, given: ConfigSources) -> Settings:
        """What was given, as the parts take it.

        Raises:
            SettingsError: with one line per fault, of reading and of what was read.
        """
        return _Check(given).settings()


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


class _Check:
    """One look at what was given, which collects the faults."""

    def __init__(self, given: ConfigSources) -> None:
        self._given = given
        self._config = given.config
        self._faults = dict(given.faults)  # in order, each once

    def settings(self) -> Settings:
        config = self._config
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
        credentials = self._credentials()
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
                max_sessions=config.max_sessions,
                outbox=OutboxSettings(config.outbox_bytes, config.write_timeout),
            ),
            supervisor=SupervisorSettings(
                config.stale_after, config.reap_interval, config.request_max_age
            ),
            session=SessionSettings(
                on_new_request=config.on_new_request,
                max_requests=config.max_requests,
                session_timeout=config.session_timeout,
                heartbeat_interval=config.heartbeat_interval,
                history_messages=config.history_messages,
                history_chars=config.history_chars,
            ),
            credentials=credentials,
            ops_host=config.ops_host,
            ops_port=config.ops_port,
            drain_timeout=config.drain_timeout,
        )

    def _fault(self, line: str) -> None:
        self._faults[line] = None

    def _needs(self, key: str, other: str, why: str = "") -> None:
        """A setting that is not left at its default is of no use while another one is."""
        value, setting = getattr(self._config, key), SETTINGS[key]
        is_missing = getattr(self._config, other) == SETTINGS[other].default
        if value == setting.default or not is_missing or other in self._given.in_doubt:
            return
        shown = f" {setting.redacted(value)}" if isinstance(value, str) else ""
        self._fault(
            f"{self._given.name(key)}{shown} needs {SETTINGS[other].flag}"
            + (f": {why}" if why else "")
        )

    # Who may connect.

    def _credentials(self) -> Credentials | None:
        config, given = self._config, self._given
        if config.auth_file is not None and config.insecure_no_auth:
            # Else it would lie in wait until somebody takes the file away.
            self._fault(
                f"{given.name('insecure_no_auth')} lets anybody in, and {given.name('auth_file')} "
                "only those that it names: take one of them away"
            )
        if config.auth_file is not None:
            return self._read_credentials(config.auth_file)
        is_meant = config.insecure_no_auth or given.in_doubt & {"auth_file", "insecure_no_auth"}
        if not (is_meant or _is_loopback(config.host)):
            self._fault(
                f"{given.name('host')} {config.host} needs --auth-file, or --insecure-no-auth: it "
                "is not loopback, and anybody who can reach it could spend your key"
            )
        return None

    def _read_credentials(self, path: str) -> Credentials | None:
        name = f"{self._given.name('auth_file')} {path!r}"
        if not Path(path).is_file():  # nor is a pipe one, which could keep everybody waiting
            self._fault(f"{name} is no file")
            return None
        try:
            with Path(path).open("rb") as file:
                content = file.read(_MOST_AUTH_FILE_BYTES + 1)
            if len(content) > _MOST_AUTH_FILE_BYTES:
                self._fault(f"{name} is over {_MOST_AUTH_FILE_BYTES} bytes long")
                return None
            # Editors on Windows begin a file with a byte order mark.
            return parse_credentials(content.decode("utf-8-sig"))
        except OSError as error:
            self._fault(f"{name} cannot be read: {error.strerror or error}")
        except UnicodeDecodeError as error:
            self._fault(f"{name} is not UTF-8 (byte {error.start})")
        except CredentialsError as error:
            for fault in error.faults:
                self._fault(f"{path}: {fault}")
        return None

    # Providers.

    def _limits(self) -> dict[str, Any]:
        config = self._config
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
        model = self._config.llm_model
        if model is None or "llm_url" in self._given.in_doubt:
            return
        try:
            choose(model)
        except NoScenarioError as error:
            self._fault(f"{self._given.name('llm_model')} {model!r}: {error}")
            return
        name = model.partition(":")[0]
        if name not in SCENARIOS and name not in ALIASES:
            self._fault(
                f"{self._given.name('llm_model')} needs --llm-url: the demo provider has no model "
                f"{model!r} (run.py demo-llm --help lists what it has)"
            )

    def _provider(self, prefix: str) -> Provider | None:
        config = self._config

        def name(key: str) -> str:
            return self._given.name(prefix + key)

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
            ProviderClient(provider, lanes()).close()
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
            self._fault(f"{name} {redact_url(url)!r} {why}")
            return False
        return True

    def _checked(self, name: str, check: Callable[[_T], None], value: _T) -> None:
        try:
            check(value)
        except ValueError as error:
            self._fault(f"{name}: {error}")

    def _headers(self, key: str) -> dict[str, str]:
        name = self._given.name(key)
        headers: dict[str, str] = {}
        for number, line in enumerate(getattr(self._config, key), 1):
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
        proxy: str | None = getattr(self._config, key)
        if proxy is None:
            return None
        name = self._given.name(key)
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
        return self._given.is_of_environment(key) or _VARIABLE.search(value) is not None

    def _expanded(self, name: str, text: str, *, is_in_url: bool = False) -> str:
        def of_environment(found: re.Match[str]) -> str:
            value = self._given.environ.get(found[1], "").strip()
            if not value:
                # Else it may be the secret itself, by mistake.
                shown = found[1] if _VARIABLE_NAME.fullmatch(found[1]) else "of that name in ${}"
                self._fault(f"{name}: there is no environment variable {shown}, or it is empty")
            return quote(value, safe=":") if is_in_url else value

        return _VARIABLE.sub(of_environment, text)

    def _key(self, key: str) -> str | None:
        variable: str | None = getattr(self._config, key)
        if variable is None:
            return None
        # Keys that come from files end in a newline.
        api_key = self._given.environ.get(variable, "").strip()
        if not api_key and variable != SETTINGS[key].default:
            # What is not shown may be the key itself, by mistake.
            self._fault(
                f"{self._given.name(key)} is not the name of an environment variable that is set"
            )
        self._check_key(variable, api_key)
        return api_key or None

    def _key_of_file(self, prefix: str) -> str:
        key = prefix + "api_key_file"
        name, path = self._given.name(key), Path(getattr(self._config, key))
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
