"""What was given of the settings: read from flags, environment and file, in this order of rank.

Faults name what was wrong where. No value is shown that may be secret.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.settings.options import (
    CONFIG_VARIABLE,
    ENVIRONMENT,
    SETTINGS,
    Config,
    Setting,
    as_toml,
)

_NOT_SETTINGS = frozenset(
    {
        CONFIG_VARIABLE,
        "BARGEIN_DOCTOR_ACCOUNT",
        "BARGEIN_DOCTOR_API_KEY",
        "BARGEIN_DOCTOR_PASSWORD",
        "BARGEIN_REAL_SERVERS",
    }
)
"""Variables of ours that are none of a setting; the last is for the tests."""

_RESTART = frozenset(
    {"llm_total_timeout", "llm_breaker_failures", "llm_breaker_timeout"}
    | {key for key in Config.__struct_fields__ if not key.startswith("llm_")}
)
"""What a running gateway does not take up: everything but its providers, and who may connect."""


class ConfigSources:
    """What was given, and where. Raises nothing: `faults` has them.

    Args:
        flags: by key, as the parser of `add_flags` gives them.
        environ: the environment.
        strays: what that parser did not know.
    """

    def __init__(
        self, flags: Mapping[str, Any], environ: Mapping[str, str], strays: Sequence[str] = ()
    ) -> None:
        self.environ = environ
        self.warnings: list[str] = []
        """What is odd, and no fault."""
        self.faults: dict[str, None] = {}
        """A line for each thing that could not be read, in order, each once."""
        self.in_doubt: set[str] = set()
        """Keys that somebody tried to give: that they are missing is no second fault."""
        self._where: dict[str, str] = {}
        """By key, what gave it its value."""
        self._values: dict[str, Any] = {}
        # From the least in rank to the highest.
        if (path := flags.get("config")) is not None:
            self._read_file("--config", path)
        elif path := environ.get(CONFIG_VARIABLE, "").strip():
            self._read_file(CONFIG_VARIABLE, path)
        if (url := environ.get("OPENAI_BASE_URL", "")).strip():
            self._take("llm_url", "OPENAI_BASE_URL", url, SETTINGS["llm_url"].parse)
        self._read_environment()
        self._read_flags(flags, strays)
        self.config = Config(**self._values)

    def need_restart(self, running: Config) -> list[str]:
        """Keys that differ from a running gateway's, and that it does not take up."""
        config = self.config
        taken_up = set(SETTINGS) - _RESTART
        if (config.llm_url is None) != (running.llm_url is None):
            taken_up.clear()  # the demo provider runs in its place, or does not
        if None not in (config.auth_file, running.auth_file):
            # To switch authentication on needs a restart too: those who are in were never asked.
            taken_up.add("auth_file")
        changed = [key for key in SETTINGS if getattr(config, key) != getattr(running, key)]
        return [key for key in changed if key not in taken_up]

    def report(self) -> list[str]:
        """A line for each setting that has not its default, with what gave it that value; to be
        shown only of what `Settings.of` has no fault with."""
        return [
            f"{key} = {as_toml(setting.redacted(value))}  # {self._where[key]}"
            for key, setting in SETTINGS.items()
            if (value := getattr(self.config, key)) != setting.default
        ]

    def name(self, key: str) -> str:
        """What people know a setting by, that they gave or should."""
        return self._where.get(key, SETTINGS[key].flag)

    def is_of_environment(self, key: str) -> bool:
        """Whether it was given by a variable of its own."""
        return self._where.get(key) == SETTINGS[key].variable

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
        self.in_doubt.update(SETTINGS)

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
        for variable, text in self.environ.items():
            key = variable.removeprefix(ENVIRONMENT).lower()
            if not variable.startswith(ENVIRONMENT) or variable in _NOT_SETTINGS:
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

    def _near(self, word: str) -> Setting | None:
        """The setting that somebody may have meant, who was wrong about its name."""
        word = word.lower().replace("-", "_")
        near = [word] if word in SETTINGS else difflib.get_close_matches(word, SETTINGS, 1, 0.75)
        if not near:
            return None
        self.in_doubt.add(near[0])
        return SETTINGS[near[0]]

    def _take(self, key: str, where: str, given: Any, read: Callable[[Any], Any]) -> None:
        try:
            self._values[key] = read(given)
            self._where[key] = where
        except ValueError:
            self.in_doubt.add(key)
            setting = SETTINGS[key]
            shown = "" if setting.private else f" {_in_words(given, setting)}"
            self._fault(f"{where}{shown} is not {setting.kind}")

    def _fault(self, line: str) -> None:
        self.faults[line] = None


def _in_words(given: Any, setting: Setting) -> str:
    """What was given, for a message."""
    if isinstance(given, list):
        return ", ".join(map(repr, given)) if setting.is_a(tuple) else "(a list)"
    return "(a table)" if isinstance(given, dict) else repr(given)
