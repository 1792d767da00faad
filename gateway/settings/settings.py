"""Checks what the sources gave, and puts it together for the parts of the gateway.

Every error names the setting and its source. No value is shown that may contain a secret.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
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
from gateway.settings.program import program
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

_MAX_KEY_BYTES = 64 * 1024
_MAX_AUTH_FILE_BYTES = 1024 * 1024
"""Room for 8,000 accounts. Reading them takes 0.1 s, and a reload blocks the event loop so long."""


@dataclass(frozen=True)
class Settings:
    """All settings, grouped by the part of the gateway that takes them."""

    provider: Provider | None = None
    """None starts the embedded demo provider."""
    demo: Provider = field(default_factory=lambda: _demo("demo"))
    """The demo provider; its URL is known only once it runs."""
    fallback: Provider | None = None
    """Used when the first fails before its first token."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    supervisor: SupervisorSettings = field(default_factory=SupervisorSettings)
    session: SessionSettings = field(default_factory=SessionSettings)
    credentials: Credentials | None = None
    """Who may register; None accepts every client."""
    ops_host: str = "127.0.0.1"
    ops_port: int = 0
    """The operator's port; 0 is off."""
    drain_timeout: float = 0.0
    """Seconds that a shutdown may take; 0 interrupts live requests at once."""

    @classmethod
    def of(cls, sources: ConfigSources) -> Settings:
        """Check all values, and put them together.

        Raises:
            SettingsError: one line for each error, those of the sources included.
        """
        return _Checker(sources).settings()


def _demo(model: str, **limits: Any) -> Provider:
    return Provider(base_url="", model=model, stops_on_close=StopsOnClose.YES, **limits)


class SettingsError(Exception):
    """The settings cannot be used.

    Args:
        faults: one line for each error.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__(*faults)
        self.faults = faults


class _Checker:
    """Checks the sources once, and collects all errors instead of stopping at the first."""

    def __init__(self, sources: ConfigSources) -> None:
        self._sources = sources
        self._config = sources.config
        self._faults = dict(sources.faults)  # in order, without duplicates

    def settings(self) -> Settings:
        config = self._config
        provider = fallback = None
        if config.llm_url is not None:
            provider = self._provider("llm_")
        else:
            self._check_demo()
        if config.llm_fallback_url is not None:
            self._needs("llm_fallback_url", "llm_url", "a fallback needs a first provider")
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
                max_functions_bytes=config.max_functions_bytes,
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
        """Report a setting that is given while another one, which it needs, is not."""
        value, setting = getattr(self._config, key), SETTINGS[key]
        is_missing = getattr(self._config, other) == SETTINGS[other].default
        if value == setting.default or not is_missing or other in self._sources.attempted:
            return
        shown = f" {setting.redacted(value)}" if isinstance(value, str) else ""
        self._fault(
            f"{self._sources.name(key)}{shown} needs {SETTINGS[other].flag}"
            + (f": {why}" if why else "")
        )

    # Who may connect.

    def _credentials(self) -> Credentials | None:
        config, sources = self._config, self._sources
        if config.auth_file is not None and config.insecure_no_auth:
            # Otherwise removing the file later would silently let every client in.
            self._fault(
                f"{sources.name('insecure_no_auth')} accepts every client, "
                f"{sources.name('auth_file')} only those in the file: remove one of them"
            )
        if config.auth_file is not None:
            return self._read_credentials(config.auth_file)
        is_decided = config.insecure_no_auth or sources.attempted & {
            "auth_file",
            "insecure_no_auth",
        }
        if not (is_decided or _is_loopback(config.host)):
            self._fault(
                f"{sources.name('host')} {config.host} needs --auth-file or --insecure-no-auth: it "
                "is not a loopback address, and anyone who can reach it could use your API key"
            )
        return None

    def _read_credentials(self, path: str) -> Credentials | None:
        name = f"{self._sources.name('auth_file')} {path!r}"
        if not Path(path).is_file():  # excludes pipes, which could block the event loop
            self._fault(f"{name} is not a file")
            return None
        try:
            with Path(path).open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read(_MAX_AUTH_FILE_BYTES + 1)
            if len(content) > _MAX_AUTH_FILE_BYTES:
                self._fault(f"{name} is larger than {_MAX_AUTH_FILE_BYTES} bytes")
                return None
            # Editors on Windows begin a file with a byte order mark.
            credentials = parse_credentials(content.decode("utf-8-sig"))
            self._check_mode(name, mode)
            return credentials
        except OSError as error:
            self._fault(f"{name} cannot be read: {error.strerror or error}")
        except UnicodeDecodeError as error:
            self._fault(f"{name} is not UTF-8 (byte {error.start})")
        except CredentialsError as error:
            for fault in error.faults:
                self._fault(f"{path}: {fault}")
        return None

    def _check_mode(self, name: str, mode: int) -> None:
        """Warn if a file of hashes is open to more users than those who need it.

        Its group may read it: the usual owner is root, and the gateway runs in that group. Whoever
        can write it can let himself in.
        """
        if os.name != "posix":
            return  # elsewhere the mode says nothing about other users
        open_to = []
        if mode & stat.S_IROTH:
            open_to.append("every user can read it")
        if mode & stat.S_IWOTH:
            open_to.append("every user can change it")
        elif mode & stat.S_IWGRP:
            open_to.append("its group can change it")
        if open_to:
            self._sources.warnings.append(
                f"{name} has mode {mode:04o}: {' and '.join(open_to)} (chmod 640 or 600)"
            )

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
                self._needs(key, "llm_url", "the demo provider ignores it")
        model = self._config.llm_model
        if model is None or "llm_url" in self._sources.attempted:
            return
        try:
            choose(model)
        except NoScenarioError as error:
            self._fault(f"{self._sources.name('llm_model')} {model!r}: {error}")
            return
        name = model.partition(":")[0]
        if name not in SCENARIOS and name not in ALIASES:
            self._fault(
                f"{self._sources.name('llm_model')} needs --llm-url: the demo provider has no "
                f"model {model!r} (`{program()} demo-llm --help` lists its models)"
            )

    def _provider(self, prefix: str) -> Provider | None:
        config = self._config

        def name(key: str) -> str:
            return self._sources.name(prefix + key)

        def value(key: str) -> Any:
            return getattr(config, prefix + key)

        faults_before = len(self._faults)
        url = value("url")
        if self._is_url(name("url"), url):
            self._needs(prefix + "url", prefix + "model", "name the model to use")
        extra_body = value("extra_body") or {}
        self._check(name("extra_body"), check_extra_body, extra_body)
        headers = self._headers(prefix + "header")
        key_header = value("key_header")
        if key_header is not None:
            self._check(name("key_header"), check_headers, {key_header: ""})
        proxy = self._proxy(prefix + "proxy")
        ca_file = value("ca_file")
        if ca_file is not None and not Path(ca_file).is_file():
            self._fault(f"{name('ca_file')} {ca_file!r} is not a file")
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
            # It can only be the proxy: the other URL is checked. The error may quote its password.
            self._fault(
                f"{name('proxy')} is not the URL of an HTTP proxy, such as http://host:port"
            )
        return provider

    def _is_url(self, name: str, url: str) -> bool:
        if _CREDENTIALS_IN_URL.match(url):
            self._fault(f"{name} contains credentials: give the API key in a variable or a file")
            return False
        try:
            completions_url(url)
        except ValueError as error:
            # The error may quote credentials, which stand before an @.
            reason = "is not the URL of a server" if "@" in url else error
            self._fault(f"{name} {redact_url(url)!r} {reason}")
            return False
        return True

    def _check(self, name: str, check: Callable[[_T], None], value: _T) -> None:
        try:
            check(value)
        except ValueError as error:
            self._fault(f"{name}: {error}")

    def _headers(self, key: str) -> dict[str, str]:
        name = self._sources.name(key)
        headers: dict[str, str] = {}
        for number, line in enumerate(getattr(self._config, key), 1):
            title, colon, value = (part.strip() for part in line.partition(":"))
            if not colon:
                self._fault(f"{name} number {number} is not a header: write it as 'Name: value'")
                continue
            if title.lower() in (other.lower() for other in headers):
                self._fault(f"{name}: {title} is given twice")
            if _SECRET_HEADER.fullmatch(title) and not self._may_hold_secrets(key, value):
                self._fault(f"{name}: {title} contains a secret: use ${{VARIABLE}} instead")
            headers[title] = self._expanded(name, value)
        self._check(name, check_headers, headers)
        return headers

    def _proxy(self, key: str) -> str | None:
        proxy: str | None = getattr(self._config, key)
        if proxy is None:
            return None
        name = self._sources.name(key)
        password = _password_of(proxy)
        if password and not self._may_hold_secrets(key, password):
            self._fault(f"{name} contains a password: use ${{VARIABLE}} instead")
        faults_before = len(self._faults)
        is_variable = _VARIABLE.fullmatch(proxy) is not None
        proxy = self._expanded(name, proxy, is_in_url=not is_variable)
        if len(self._faults) == faults_before:
            try:
                check_proxy(proxy)
            except ValueError as error:
                self._fault(f"{name} {error}")
        return proxy

    def _may_hold_secrets(self, key: str, value: str) -> bool:
        """Whether a value comes from the environment: other users can read command lines, and
        files are copied and committed."""
        return self._sources.is_from_environment(key) or _VARIABLE.search(value) is not None

    def _expanded(self, name: str, text: str, *, is_in_url: bool = False) -> str:
        """Replace each ${VARIABLE} with its value."""

        def value_of(found: re.Match[str]) -> str:
            value = self._sources.environ.get(found[1], "").strip()
            if not value:
                # Anything but a valid name may be the secret itself, given by mistake.
                shown = found[1] if _VARIABLE_NAME.fullmatch(found[1]) else "named in ${}"
                self._fault(f"{name}: environment variable {shown} is not set, or is empty")
            return quote(value, safe=":") if is_in_url else value

        return _VARIABLE.sub(value_of, text)

    def _key(self, key: str) -> str | None:
        variable: str | None = getattr(self._config, key)
        if variable is None:
            return None
        # A key that was read from a file often ends in a newline.
        api_key = self._sources.environ.get(variable, "").strip()
        if not api_key and variable != SETTINGS[key].default:
            # The name is not shown: it may be the key itself, given by mistake.
            self._fault(f"{self._sources.name(key)} names a variable that is not set, or is empty")
        self._check_key(variable, api_key)
        return api_key or None

    def _key_of_file(self, prefix: str) -> str:
        key = prefix + "api_key_file"
        name, path = self._sources.name(key), Path(getattr(self._config, key))
        if not path.is_file():  # excludes pipes, which could block the event loop
            self._fault(f"{name} is not the path of a file")
            return ""
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_KEY_BYTES + 1)
        except OSError as error:
            self._fault(f"{name} names a file that cannot be read: {error.strerror}")
            return ""
        api_key = content.decode("ascii", "replace").strip()
        if not api_key:
            self._fault(f"{name} names an empty file")
        elif len(content) > _MAX_KEY_BYTES:
            self._fault(f"{name} names a file that is too large for a key")
        else:
            self._check_key(f"the file of {name}", api_key)
        return api_key

    def _check_key(self, origin: str, api_key: str) -> None:
        # RFC 6750, section 2.1: a bearer token consists of visible ASCII characters.
        if not all("!" <= char <= "~" for char in api_key):
            self._fault(
                f"{origin} contains characters that no API key has (the value is not shown)"
            )


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
