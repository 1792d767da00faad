"""Where settings are given: flags, environment variables and a file, in this order of rank.

Every error names the source of the bad value. No value is shown that may contain a secret.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.settings.options import (
    CONFIG_VARIABLE,
    ENVIRONMENT_PREFIX,
    SETTINGS,
    Config,
    Setting,
    as_toml,
)

_OTHER_VARIABLES = frozenset(
    {
        CONFIG_VARIABLE,
        "BARGEIN_DOCTOR_ACCOUNT",
        "BARGEIN_DOCTOR_API_KEY",
        "BARGEIN_DOCTOR_PASSWORD",
        "BARGEIN_REAL_SERVERS",
    }
)
"""Variables with our prefix that are not settings; the last is for the tests."""

_RESTART_KEYS = frozenset(
    {"llm_total_timeout", "llm_breaker_failures", "llm_breaker_timeout"}
    | {key for key in Config.__struct_fields__ if not key.startswith("llm_")}
)
"""Settings that a reload does not apply: all but the providers'."""


class ConfigSources:
    """Reads all sources and merges them; raises nothing, collects `faults`.

    Args:
        flags: values by key, from the parser of `add_flags`.
        environ: the environment.
        unknown_args: arguments that this parser did not recognize.
    """

    def __init__(
        self, flags: Mapping[str, Any], environ: Mapping[str, str], unknown_args: Sequence[str] = ()
    ) -> None:
        self.environ = environ
        self.warnings: list[str] = []
        """One line each: suspicious, but the settings can be used."""
        self.faults: dict[str, None] = {}
        """One line for each error, in order, without duplicates."""
        self.attempted: set[str] = set()
        """Keys that were given in a way that failed: do not report them as missing, too."""
        self._origins: dict[str, str] = {}
        """By key, the source of its value, as messages name it."""
        self._values: dict[str, Any] = {}
        # From the lowest rank to the highest; later ones overwrite.
        if (path := flags.get("config")) is not None:
            self._read_file("--config", path)
        elif path := environ.get(CONFIG_VARIABLE, "").strip():
            self._read_file(CONFIG_VARIABLE, path)
        if (url := environ.get("OPENAI_BASE_URL", "")).strip():
            self._set("llm_url", "OPENAI_BASE_URL", url, SETTINGS["llm_url"].parse)
        self._read_environment()
        self._read_flags(flags, unknown_args)
        self.config = Config(**self._values)

    def restart_keys(self, running: Config) -> list[str]:
        """The keys that differ from a running gateway's settings and need a restart.

        Args:
            running: what the gateway was started with.
        """
        config = self.config
        reloadable = set(SETTINGS) - _RESTART_KEYS
        if (config.llm_url is None) != (running.llm_url is None):
            reloadable.clear()  # the demo provider would have to start or stop
        if None not in (config.auth_file, running.auth_file):
            # Turning authentication on needs a restart: connected clients were never checked.
            reloadable.add("auth_file")
        changed = [key for key in SETTINGS if getattr(config, key) != getattr(running, key)]
        return [key for key in changed if key not in reloadable]

    def report(self) -> list[str]:
        """A line of TOML for each setting that differs from its default, with its source as a
        comment. Only for sources that `Settings.of` accepts: faulty values may hold secrets."""
        return [
            f"{key} = {as_toml(setting.redacted(value))}  # {self._origins[key]}"
            for key, setting in SETTINGS.items()
            if (value := getattr(self.config, key)) != setting.default
        ]

    def name(self, key: str) -> str:
        """What messages call a setting: where it was given, or else its flag."""
        return self._origins.get(key, SETTINGS[key].flag)

    def is_from_environment(self, key: str) -> bool:
        """Whether its own environment variable gave its value."""
        return self._origins.get(key) == SETTINGS[key].variable

    # Reading the sources.

    def _read_file(self, name: str, path: str) -> None:
        try:
            # Editors on Windows begin a file with a byte order mark.
            table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            self._fault(f"{name} {path}: {error.strerror or error}")
        except UnicodeDecodeError as error:
            self._fault(f"{name} {path} is not UTF-8 (byte {error.start})")
        except (ValueError, RecursionError) as error:
            self._fault(f"{name} {path} is not valid TOML: {error}")
        else:
            for key, value in table.items():
                if (setting := SETTINGS.get(key)) is not None:
                    self._set(key, f"{path}: {key}", value, setting.check)
                else:
                    self._report_unknown_key(path, [key], value)
            return
        self.attempted.update(SETTINGS)  # any of them may be in the file

    def _report_unknown_key(self, path: str, keys: list[str], value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, one in value.items():
                self._report_unknown_key(path, [*keys, key], one)
            return
        closest = self._closest("_".join(keys))
        hint = f"; did you mean {closest.key}?" if closest else ""
        if len(keys) > 1:
            hint += " (tables are not supported: write all settings at the top level)"
        self._fault(f"{path}: unknown setting {'.'.join(keys)!r}{hint}")

    def _read_environment(self) -> None:
        for variable, text in self.environ.items():
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _OTHER_VARIABLES:
                continue
            setting = SETTINGS.get(key)
            if setting is None or setting.variable != variable:
                closest = self._closest(key)
                hint = f"; did you mean {closest.variable}?" if closest else ""
                self.warnings.append(f"unknown environment variable {variable}{hint}")
            elif text.strip():  # some tools can only set a variable to "", not remove it
                self._set(key, variable, text, setting.parse)

    def _read_flags(self, flags: Mapping[str, Any], unknown_args: Sequence[str]) -> None:
        for key, value in flags.items():
            if (setting := SETTINGS.get(key)) is not None:
                read = setting.parse if isinstance(value, str) else setting.check
                self._set(key, setting.flag, value, read)
        may_be_value = False  # of the unknown flag before it
        for argument in unknown_args:
            if argument.startswith("-"):
                flag, equals, _ = argument.partition("=")
                closest = self._closest(flag.strip("-"))
                hint = f"; did you mean {closest.flag}?" if closest else ""
                self._fault(f"unknown flag {flag}{hint}")
                may_be_value = not equals
            elif may_be_value:
                may_be_value = False
            else:
                # Not shown: it may be the second half of a secret that contains a space.
                self._fault("unexpected argument (did you forget to quote a value with spaces?)")

    def _closest(self, word: str) -> Setting | None:
        """The setting with a similar name, for a hint; it counts as attempted."""
        word = word.lower().replace("-", "_")
        close = [word] if word in SETTINGS else difflib.get_close_matches(word, SETTINGS, 1, 0.75)
        if not close:
            return None
        self.attempted.add(close[0])
        return SETTINGS[close[0]]

    def _set(self, key: str, origin: str, given: Any, read: Callable[[Any], Any]) -> None:
        try:
            self._values[key] = read(given)
            self._origins[key] = origin
        except ValueError:
            self.attempted.add(key)
            setting = SETTINGS[key]
            shown = "" if setting.sensitive else f" {_shown(given, setting)}"
            self._fault(f"{origin}{shown} is not {setting.expected}")

    def _fault(self, line: str) -> None:
        self.faults[line] = None


def _shown(given: Any, setting: Setting) -> str:
    """A bad value, for a message."""
    if isinstance(given, list):
        return ", ".join(map(repr, given)) if setting.is_a(tuple) else "(a list)"
    return "(a table)" if isinstance(given, dict) else repr(given)
