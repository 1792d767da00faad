"""Settings from flags, environment and file: each setting, from each source."""

from __future__ import annotations

import enum
import itertools
import json
import os
import re
import signal
import ssl
import tomllib
from pathlib import Path
from typing import Any

import certifi
import msgspec
import pytest

from gateway.doctor.target import ACCOUNT_VARIABLE, KEY_VARIABLE, PASSWORD_VARIABLE
from gateway.settings.options import SETTINGS, Config, default_config
from gateway.settings.settings import Settings, SettingsError
from gateway.settings.sources import ConfigSources
from llm.provider import StopsOnClose
from run import make_parser
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.daemon import Daemon, run_to_the_end
from tests.harness.provider_process import ProviderProcess

SECRET = "hunter2-must-not-be-seen"

PARSER = make_parser()

SOURCES = ("flag", "environment", "file")  # from the highest rank to the lowest

KEYS = list(SETTINGS)

# With these, each setting has an effect, and none is missing.
BASE = {
    "llm_url": "http://127.0.0.1:9/v1",
    "llm_model": "first",
    "llm_fallback_url": "http://127.0.0.1:9/fallback",
    "llm_fallback_model": "second",
    "insecure_no_auth": True,
}

NOT_IN_SETTINGS = {"insecure_no_auth", "log_format", "log_level"}
"""Used by run.py alone, or without an effect of its own."""


class Bench:
    """Gives settings by any source, and reads them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bargein.toml"
        self.flags: list[str] = []
        self.environ = {"KEY_1": "sk-one", "KEY_2": "sk-two"}
        self.file: dict[str, str] = {}

    def give(self, source: str, key: str, value: Any) -> str:
        """Give a setting; returns the name that messages use for it."""
        setting = SETTINGS[key]
        if source == "flag":
            self.flags += as_flags(setting.flag, value)
            return setting.flag
        if source == "environment":
            self.environ[setting.variable] = as_text(value)
            return setting.variable
        self.file[key] = as_toml(value)
        return f"{self.path}: {key}"

    def base(self, without: str) -> None:
        """Give the settings of BASE, in the file."""
        for key, value in BASE.items():
            if key != without and (key, without) != ("insecure_no_auth", "auth_file"):
                self.give("file", key, value)

    def read(self) -> ConfigSources:
        flags = list(self.flags)
        if self.file:
            lines = (f"{key} = {value}\n" for key, value in self.file.items())
            self.path.write_text("".join(lines), encoding="utf-8")
        if self.path.exists():
            flags += ["--config", str(self.path)]
        return given(*flags, environ=self.environ)

    def faults(self) -> list[str]:
        return faults(self.read())

    def key_file(self, key: str) -> str:
        """The path of a file that contains this key."""
        path = self.path.with_name("key")
        path.write_text(key, encoding="utf-8")
        return str(path)

    def auth_file(self) -> str:
        """The path of a file that accepts one API key."""
        path = self.path.with_name("auth.toml")
        path.write_text(f'[api_keys]\nkiosk = "sha256:{64 * "0"}"', encoding="utf-8")
        path.chmod(0o600)
        return str(path)

    def settings(self) -> Settings:
        return Settings.of(self.read())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def given(*arguments: str, environ: dict[str, str] | None = None) -> ConfigSources:
    """What a command line gives."""
    args, unknown_args = PARSER.parse_known_args(["check-config", *arguments])
    return ConfigSources(vars(args), environ or {}, unknown_args)


def faults(given: ConfigSources) -> list[str]:
    try:
        Settings.of(given)
    except SettingsError as error:
        return error.faults
    return []


def as_flags(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [word for one in value for word in (flag, one)]
    return [flag, as_text(value)]


def as_text(value: Any) -> str:
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return "\n".join(value) if isinstance(value, list) else str(value)


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


# By metavar: two valid values, neither of them the default.
SAMPLES: dict[str, tuple[Any, Any]] = {
    "URL": ("http://127.0.0.1:9/one", "http://127.0.0.1:9/two"),
    "NAME": ("KEY_1", "KEY_2"),
    "FILE": (certifi.where(), f"/{certifi.where()}"),
    "KEY_FILE": ("/run/secrets/one", "/run/secrets/two"),
    "AUTH_FILE": ("/etc/one.toml", "/etc/two.toml"),
    "HEADER": (["X-Team: blue", "X-Title: a: b"], ["X-Team: red"]),
    "ORIGIN": (["https://one.example", "http://two.example:81"], ["https://three.example"]),
    "JSON": ({"temperature": 0.5, "user": "me"}, {"seed": 5}),
}

# By metavar: an invalid value. A date is invalid for every setting of a file.
WRONG_TEXT = {
    "URL": "ftp://127.0.0.1",
    "FILE": "/nowhere/ca.pem",
    "KEY_FILE": "/nowhere/key",
    "AUTH_FILE": "/nowhere/auth.toml",
    "HEADER": "no header",
    "ORIGIN": "chat.example.com",
    "JSON": "{",
    "PORT": "70000",
    "BYTES": "-1",
    "SECONDS": "-1",
    "N": "1.5",
}
WRONG_TOML = ("1979-05-27", "[1]", "{ a = 1979-05-27 }")

WANTED = {
    "URL": "URL|http://",
    "FILE": "file",
    "KEY_FILE": "path of a file",
    "AUTH_FILE": "file",
    "HEADER": "header",
    "ORIGIN": "list of web origins",
    "JSON": "JSON object",
    "PORT": r"a port number \(0 to 65535\)",
    "BYTES": "number of bytes",
    "SECONDS": "number of seconds",
    "N": "whole number",
    "": "true or false",
}


def samples(key: str) -> tuple[Any, Any]:
    """Two values for a setting, as the file takes them; the first is never the default."""
    setting = SETTINGS[key]
    default = setting.default
    if isinstance(default, bool):
        return not default, default
    if setting.is_choice:
        plain = default.value if isinstance(default, enum.Enum) else default
        first, second = [one for one in setting.metavar.split("|") if one != plain][:2]
        return first, second
    if isinstance(default, int | float):
        step = 1 if isinstance(default, int) else 1.5
        return default + step, default + 2 * step
    return SAMPLES[setting.metavar]


def converted(key: str, value: Any) -> Any:
    """What the program gets for a value of the file."""
    default = SETTINGS[key].default
    if isinstance(default, enum.Enum):
        return type(default)(value)
    return tuple(value) if isinstance(value, list) else value


def wanted(key: str) -> str:
    setting = SETTINGS[key]
    return "one of " if setting.is_choice else WANTED[setting.metavar]


# Each setting, from each source -----------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("key", KEYS)
def test_every_setting_is_reachable(bench: Bench, key: str, source: str) -> None:
    value = samples(key)[0]
    bench.give(source, key, value)
    config = bench.read().config
    got = getattr(config, key)
    assert got == converted(key, value) != SETTINGS[key].default
    assert type(got) is type(converted(key, value))
    others = {other: getattr(config, other) for other in KEYS if other != key}
    assert others == {other: SETTINGS[other].default for other in others}


@pytest.mark.parametrize(("higher", "lower"), list(itertools.combinations(SOURCES, 2)))
@pytest.mark.parametrize("key", KEYS)
def test_the_sources_have_ranks(bench: Bench, key: str, higher: str, lower: str) -> None:
    for over, under in itertools.permutations(samples(key)):
        bench.flags.clear()
        bench.give(lower, key, under)
        where = bench.give(higher, key, over)
        given = bench.read()
        assert getattr(given.config, key) == converted(key, over)
        if converted(key, over) != SETTINGS[key].default:
            (line,) = given.report()
            assert line.startswith(f"{key} = ")
            assert line.endswith(f"  # {where}")


def has_wrong_text(key: str, source: str) -> bool:
    """Any text is a valid name, and the flag of a switch takes no value."""
    setting = SETTINGS[key]
    is_switch = isinstance(setting.default, bool)
    return source == "file" or not (setting.metavar == "NAME" or (is_switch and source == "flag"))


@pytest.mark.parametrize(
    ("key", "source"), [pair for pair in itertools.product(KEYS, SOURCES) if has_wrong_text(*pair)]
)
def test_a_wrong_value_is_one_line_that_names_it_and_says_what_is_expected(
    bench: Bench, key: str, source: str
) -> None:
    bench.base(without=key)
    setting = SETTINGS[key]
    wrong = WRONG_TEXT.get(setting.metavar, "perhaps")
    if source == "file":
        for toml in WRONG_TOML:
            bench.file[key] = toml
            (line,) = bench.faults()
            assert line.startswith(f"{bench.path}: {key} ")
            assert setting.expected in line
            assert line.count("is not") == 1
        return
    name = bench.give(source, key, [wrong] if setting.metavar in ("HEADER", "ORIGIN") else wrong)
    (line,) = bench.faults()
    assert re.match(rf"{name}\b", line)
    assert re.search(wanted(key), line)


def typo(key: str) -> str:
    return key[:1] + key[2:]


@pytest.mark.parametrize("key", KEYS)
def test_a_typo_in_a_flag_is_a_fault_that_guesses(bench: Bench, key: str) -> None:
    bench.base(without=key)
    wrong = SETTINGS[key].flag.replace(key.replace("_", "-"), typo(key).replace("_", "-"))
    bench.flags = [wrong, SECRET]
    assert bench.faults() == [f"unknown flag {wrong}; did you mean {SETTINGS[key].flag}?"]
    bench.flags = [f"{wrong}={SECRET}"]
    assert bench.faults() == [f"unknown flag {wrong}; did you mean {SETTINGS[key].flag}?"]


@pytest.mark.parametrize("key", KEYS)
def test_a_typo_in_the_environment_is_a_warning_that_guesses(bench: Bench, key: str) -> None:
    variable = "BARGEIN_" + typo(key).upper()
    bench.environ[variable] = SECRET
    given = bench.read()
    assert given.warnings == [
        f"unknown environment variable {variable}; did you mean {SETTINGS[key].variable}?"
    ]
    assert given.config == Config()
    assert faults(given) == []


@pytest.mark.parametrize("key", KEYS)
def test_a_typo_in_the_file_is_a_fault_that_guesses(bench: Bench, key: str) -> None:
    bench.base(without=key)
    bench.file[typo(key)] = json.dumps(SECRET)
    assert bench.faults() == [f"{bench.path}: unknown setting {typo(key)!r}; did you mean {key}?"]


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_reaches_the_program(bench: Bench, key: str) -> None:
    bench.base(without=key)
    if key in BASE:
        bench.give("file", key, BASE[key])
    before = bench.settings()
    match SETTINGS[key].metavar:
        case "KEY_FILE":
            value = bench.key_file("sk-one")
        case "AUTH_FILE":
            value = bench.auth_file()
        case _:
            value = samples(key)[0]
    bench.give("flag", key, value)
    after = bench.settings()
    assert (after == before) is (key in NOT_IN_SETTINGS)


def test_defaults_are_those_of_the_parts() -> None:
    settings = Settings.of(given())
    parts = Settings()
    assert settings.provider is settings.fallback is None
    assert settings.demo == parts.demo
    assert settings.server == parts.server
    assert settings.supervisor == parts.supervisor
    assert settings.session == parts.session
    assert settings.generation == parts.generation


# A number of 0 ----------------------------------------------------------------------------------

NUMBERS = [key for key in KEYS if SETTINGS[key].metavar in ("SECONDS", "BYTES", "N", "PORT")]

ZERO_IS = {
    "port": "any free port",
    "max_sessions": "no limit",
    "max_requests": "no limit",
    "outbox_bytes": "no limit",
    "write_timeout": "never",
    "ops_port": "off",
    "drain_timeout": "interrupt them at once",
    "llm_connect_timeout": "no limit",
    "llm_first_token_timeout": "no limit",
    "llm_idle_timeout": "no limit",
    "llm_total_timeout": "no limit",
    "llm_retries": "never",
    "llm_retry_after_cap": "no limit",
    "llm_breaker_failures": "never",
    "llm_breaker_timeout": "at once",
    "session_timeout": "never",
    "heartbeat_interval": "none",
    "history_messages": "none",
    "history_chars": "none",
    "max_functions_bytes": "no limit",
    "stale_after": "never",
    "reap_interval": "never",
    "request_max_age": "never",
}
"""What `--help` and the default file say that 0 means."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_may_be_zero(bench: Bench, key: str, source: str) -> None:
    bench.base(without=key)
    bench.give(source, key, 0)
    assert bench.faults() == []
    assert getattr(bench.read().config, key) == 0


def test_every_number_and_nothing_else_says_what_zero_means() -> None:
    zeros = {key: setting.about.zero for key, setting in SETTINGS.items()}
    assert {key: zero for key, zero in zeros.items() if zero is not None} == ZERO_IS
    assert list(ZERO_IS) == NUMBERS
    texts = dict(re.findall(r"((?:^# .*\n)+)^#(\w+) = ", default_config(), re.MULTILINE))
    said = {key: " ".join(re.split(r"\n?# ", text)).strip() for text, key in texts.items()}
    shown = help_by_flag()
    for key, zero in ZERO_IS.items():
        assert re.search(rf"[(;] ?0: {zero}[;)]", shown[SETTINGS[key].flag]), shown
        assert said[key].endswith(f"0: {zero})")


def help_by_flag() -> dict[str, str]:
    """What `serve --help` says of each flag."""
    text = run_to_the_end("serve", "--help").stdout
    entries = re.findall(
        r"^  (--[a-z-]+).*?\n?(.*?)(?=^  --|^\w|\Z)", text, re.MULTILINE | re.DOTALL
    )
    return {flag: re.sub(r"\s+", " ", entry).strip() for flag, entry in entries}


def test_with_every_limit_off_it_does_its_job(provider: ProviderProcess) -> None:
    """Nothing ends what takes long, or is large, and nothing is taken for too many."""
    off = [key for key in NUMBERS if key != "port" and not key.startswith("history")]
    flags = [word for key in off for word in (SETTINGS[key].flag, "0")]
    chunk = "x" * 16_000
    long_answer = provider.fresh(scripts.answer([chunk] * 1200))
    stalled = provider.fresh(scripts.idle_mid_stream(["Once"]))
    arguments = ["--llm-url", provider.base_url, "--llm-model", "test", *flags]
    with (
        Daemon(
            *arguments, "--llm-fallback-url", provider.base_url, "--llm-fallback-model", "b"
        ) as daemon,
        Client(daemon.port, receive_buffer=4096) as slow,
        Client(daemon.port) as other,
    ):
        whole = slow.request(long_answer)
        # It is more than kernels hold. A client that does not read does not hold up the provider,
        # which has sent all of it.
        provider.wait_script_done(script=long_answer)
        request_id = other.request(stalled)
        other.wait_text(request_id)
        other.interrupt(request_id)
        assert other.wait_ack().payload["status"] == "SUCCESS"
        assert slow.wait_terminal(whole).payload["outcome"] == "COMPLETED"
        assert slow.text_of(whole) == chunk * 1200
        assert not [frame for frame in slow.frames if frame.msg_type == "HEARTBEAT"]
        daemon.signal(signal.SIGTERM)
        assert other.wait_closed() == 1012
        assert slow.wait_closed() == 1012
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log


def test_every_setting_says_what_it_does() -> None:
    assert list(SETTINGS) == [field.name for field in msgspec.structs.fields(Config)]
    for setting in SETTINGS.values():
        assert setting.help
        assert setting.section
        assert setting.expected
        if setting.default in (None, ()):
            example = setting.about.example
            assert example is not None, f"{setting.key} has neither default nor example"
        else:
            assert setting.about.example is None


# Ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "winner"),
    [(["file"], "general"), (["file", "environment"], "environment"), (["flag"], "flag")],
)
def test_openai_base_url_ranks_below_our_variable_and_above_the_file(
    bench: Bench, sources: list[str], winner: str
) -> None:
    bench.environ["OPENAI_BASE_URL"] = "http://general/v1"
    for source in sources:
        bench.give(source, "llm_url", f"http://{source}/v1")
    given = bench.read()
    assert given.config.llm_url == f"http://{winner}/v1"
    if winner == "general":
        assert given.report() == ['llm_url = "http://general/v1"  # OPENAI_BASE_URL']


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_a_variable_that_is_set_to_nothing_is_not_set(empty: str) -> None:
    environ = dict.fromkeys((setting.variable for setting in SETTINGS.values()), empty)
    environ |= {"OPENAI_BASE_URL": empty, "OPENAI_API_KEY": empty, "BARGEIN_CONFIG": ""}
    read = given(environ=environ)
    assert read.config == Config()
    assert read.warnings == []
    Settings.of(read)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("true", True),
        ("True", True),
        (" YES\n", True),
        ("0", False),
        ("false", False),
        ("no", False),
    ],
)
def test_a_switch_in_the_environment_has_several_words(text: str, value: bool) -> None:
    for key in ("llm_include_usage", "insecure_no_auth"):
        assert getattr(given(environ={SETTINGS[key].variable: text}).config, key) is value


def test_a_list_in_the_environment_has_one_entry_per_line() -> None:
    text = "https://one.example\n\n  https://two.example  \r\n"
    config = given(environ={"BARGEIN_ALLOW_ORIGIN": text}).config
    assert config.allow_origin == ("https://one.example", "https://two.example")


def test_a_list_of_higher_rank_takes_the_place_of_the_other(bench: Bench) -> None:
    bench.give("file", "allow_origin", ["https://file.example"])
    bench.give("flag", "allow_origin", ["https://flag.example"])
    assert bench.read().config.allow_origin == ("https://flag.example",)


@pytest.mark.parametrize("variable", ["bargein_port", "BARGEIN_port", "BARGEIN_Port"])
def test_variables_are_in_capitals(variable: str) -> None:
    read = given(environ={variable: "1"})
    assert read.config.port == 8000
    ours = variable.startswith("BARGEIN_")
    assert read.warnings == (
        [f"unknown environment variable {variable}; did you mean BARGEIN_PORT?"] if ours else []
    )


def test_a_name_that_resembles_no_setting_gets_no_hint(bench: Bench) -> None:
    bench.flags = ["--nonsense"]
    bench.environ["BARGEIN_NONSENSE"] = "1"
    bench.file["nonsense"] = "1"
    assert bench.faults() == [
        f"{bench.path}: unknown setting 'nonsense'",
        "unknown flag --nonsense",
    ]
    assert bench.read().warnings == ["unknown environment variable BARGEIN_NONSENSE"]


@pytest.mark.parametrize(
    "variable", ["BARGEIN_REAL_SERVERS", KEY_VARIABLE, ACCOUNT_VARIABLE, PASSWORD_VARIABLE]
)
def test_variables_of_the_tests_and_of_the_doctor_are_no_typos(variable: str) -> None:
    assert given(environ={variable: "1"}).warnings == []


def test_a_part_of_a_flag_is_not_taken_for_it() -> None:
    (line,) = faults(given("--log-lev", "debug"))
    assert line == "unknown flag --log-lev; did you mean --log-level?"


def test_an_unexpected_argument_is_an_error_and_is_not_shown() -> None:
    lines = faults(given("--llm-header", "X-Key:", SECRET, "--porrt", "1", SECRET))
    unexpected = "unexpected argument (did you forget to quote a value with spaces?)"
    assert lines[:2] == [unexpected, "unknown flag --porrt; did you mean --port?"]
    assert SECRET not in "".join(lines)
    assert faults(given("--porrt", "1", "start"))[-1] == unexpected


# Files -------------------------------------------------------------------------------------------


def test_a_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path, other = tmp_path / "one.toml", tmp_path / "other.toml"
    path.write_text("port = 1\n")
    other.write_text("port = 2\n")
    environ = {"BARGEIN_CONFIG": str(path)}
    assert given(environ=environ).config.port == 1
    assert given(environ=environ).warnings == []
    assert given("--config", str(other), environ=environ).config.port == 2
    path.unlink()
    assert faults(given(environ=environ)) == [f"BARGEIN_CONFIG {path}: No such file or directory"]
    (line,) = faults(given("--config", "", environ=environ))
    assert line.startswith("--config ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"port = \n", "is not valid TOML: Invalid value (at line 1, column 8)"),
        (b"port = 1\nport = 2\n", "is not valid TOML: "),
        (b"port = " + b"1" * 5000, "is not valid TOML: "),
        (b"port = " + b"[" * 10_000, "is not valid TOML: "),
        (b"port = 1 # caf\xe9\n", "is not UTF-8 (byte 14)"),
        ("port = 1".encode("utf-16"), "is not UTF-8 (byte 0)"),
        (None, "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_fault(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "bargein.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    # What it may have set is not missed.
    lines = faults(given("--config", str(path), "--llm-model", "m", "--host", "0.0.0.0"))
    assert len(lines) == 1
    assert lines[0].startswith(f"--config {path}")
    assert words in lines[0]


def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.toml"
    assert faults(given("--config", str(path))) == [f"--config {path}: No such file or directory"]


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "bargein.toml"
    path.write_bytes("\ufeffport = 1\r\nlog_level = 'debug'\r\n".encode())
    config = given("--config", str(path)).config
    assert (config.port, config.log_level) == (1, "debug")


@pytest.mark.parametrize(
    ("text", "name", "hint"),
    [
        ("llm-url = 1", "llm-url", "; did you mean llm_url?"),
        ("[llm]\nurl = 1", "llm.url", "; did you mean llm_url?"),
        ("llm.fallback.url = 1", "llm.fallback.url", "; did you mean llm_fallback_url?"),
        ("[server.http]\ncolour = 1", "server.http.colour", ""),
        ("[llm]", "llm", ""),
    ],
)
def test_an_unknown_setting_is_named_as_it_stands_in_the_file(
    bench: Bench, text: str, name: str, hint: str
) -> None:
    bench.path.write_text(text)
    (line,) = bench.faults()
    assert line.startswith(f"{bench.path}: unknown setting {name!r}{hint}")
    assert ("tables are not supported" in line) is ("." in name)


@pytest.mark.parametrize(
    ("key", "toml", "shown"),
    [
        ("port", '"8000"', "'8000'"),
        ("port", "8000.0", "8000.0"),
        ("port", "true", "True"),
        ("llm_idle_timeout", "true", "True"),
        ("llm_idle_timeout", "nan", "nan"),
        ("llm_idle_timeout", "inf", "inf"),
        ("llm_include_usage", "1", "1"),
        ("llm_include_usage", '"true"', "'true'"),
        ("llm_stops_on_close", "true", "True"),
        ("log_level", '"INFO"', "'INFO'"),
        ("allow_origin", '"https://a.example"', "'https://a.example'"),
        ("allow_origin", '["https://a.example", "a.example"]', "'https://a.example', 'a.example'"),
        ("llm_model", "{ a = 1 }", "(a table)"),
        ("llm_model", "[]", "(a list)"),
        ("llm_model", '""', "''"),
    ],
)
def test_a_file_has_types(bench: Bench, key: str, toml: str, shown: str) -> None:
    bench.file[key] = toml
    assert bench.faults() == [f"{bench.path}: {key} {shown} is not {SETTINGS[key].expected}"]


def test_a_whole_number_of_seconds_is_one(bench: Bench) -> None:
    bench.file["llm_idle_timeout"] = "5"
    assert bench.read().config.llm_idle_timeout == 5.0
    assert type(bench.read().config.llm_idle_timeout) is float


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1e300", "1e999", "1000000001", "-0.1", "1s", "1,5"]
)
def test_seconds_are_finite_and_bounded(text: str) -> None:
    (line,) = faults(given("--session-timeout", text))
    assert line.startswith(f"--session-timeout {text!r} is not a number of seconds")


@pytest.mark.parametrize("text", ["1e10", "99999999999999999999", "-1"])
def test_counts_fit_where_they_are_used(text: str) -> None:
    (line,) = faults(given("--history-messages", text))
    assert line.startswith(f"--history-messages {text!r} is not a whole number")


@pytest.mark.parametrize("text", ["null", "NULL"])
@pytest.mark.parametrize("key", ["log_format", "llm_extra_body", "log_level"])
def test_nothing_is_null(key: str, text: str) -> None:
    (line,) = faults(given(SETTINGS[key].flag, text))
    assert line.startswith(SETTINGS[key].flag)


@pytest.mark.parametrize("toml", ["nan", "-inf", "1979-05-27", "07:32:00", "[nan]"])
def test_extra_fields_are_limited_to_json(bench: Bench, toml: str) -> None:
    bench.base(without="")
    bench.file["llm_extra_body"] = f"{{ a = {toml} }}"
    assert bench.faults() == [f"{bench.path}: llm_extra_body is not a JSON object"]


def test_what_is_not_utf_8_in_the_environment_is_a_fault() -> None:
    (line,) = faults(given(environ={"BARGEIN_LLM_MODEL": "caf\udce9"}))
    assert line == "BARGEIN_LLM_MODEL 'caf\\udce9' is not a name"


# Several faults ----------------------------------------------------------------------------------


def test_what_is_not_utf_8_in_a_repeated_flag_is_a_fault() -> None:
    (line,) = faults(given("--allow-origin", "https://chat\udcff.example.com"))
    expected = "is not a list of web origins, each like https://chat.example.com"
    assert line == f"--allow-origin 'https://chat\\udcff.example.com' {expected}"


def test_faults_of_all_kinds_are_all_named_and_each_once(bench: Bench) -> None:
    bench.file = {
        "prot": "1",
        "port": '"x"',
        "llm_header": '["A: ${NOWHERE}", "B: ${NOWHERE}"]',
        "llm_model": '"m"',
    }
    bench.environ |= {"BARGEIN_HEARTBEAT_INTERVAL": "often", "BARGEIN_SESION_TIMEOUT": "1"}
    bench.flags = [
        "--llm-url",
        "ftp://x",
        "--log-level",
        "loud",
        "--host",
        "0.0.0.0",
        "--reap",
        "1",
    ]
    given = bench.read()
    lines = faults(given)
    assert [line.split()[0] for line in lines] == [
        f"{bench.path}:",
        f"{bench.path}:",
        "BARGEIN_HEARTBEAT_INTERVAL",
        "--log-level",
        "unknown",
        "--llm-url",
        f"{bench.path}:",
        "--host",
    ]
    assert "NOWHERE" in lines[6]
    assert len(given.warnings) == 1
    assert faults(given) == lines  # however often it is asked


@pytest.mark.parametrize(
    "arguments",
    [
        ["--llm-url", "http://h/v1", "--llm-model", ""],
        ["--llm-url", "http://h/v1", "--llm-modle", "m"],
        ["--llm-urll", "http://h/v1", "--llm-model", "m", "--llm-proxy", "http://h:1"],
        ["--llm-fallback-urll", "http://h/v1", "--llm-fallback-model", "m"],
        ["--host", "0.0.0.0", "--insecure-no-aut"],
    ],
)
def test_a_setting_that_was_given_wrongly_is_not_also_reported_missing(
    arguments: list[str],
) -> None:
    assert len(faults(given(*arguments))) == 1


# Providers ---------------------------------------------------------------------------------------

PROVIDER = ("--llm-url", "http://127.0.0.1:9/v1", "--llm-model", "m")


def provider_faults(*arguments: str, environ: dict[str, str] | None = None) -> list[str]:
    return faults(given(*PROVIDER, *arguments, environ=environ))


def test_a_fallback_has_everything_of_its_own_but_the_limits(bench: Bench) -> None:
    bench.environ |= {"OPENAI_API_KEY": "sk-first", "OTHER_KEY": "sk-other"}
    bench.base(without="")
    bench.flags = ["--llm-idle-timeout", "3", "--llm-header", "X-A: 1", "--llm-key-header", "k"]
    bench.flags += ["--llm-fallback-api-key-env", "OTHER_KEY", "--llm-fallback-header", "X-B: 2"]
    bench.flags += ["--llm-stops-on-close", "yes", "--no-llm-fallback-include-usage"]
    settings = bench.settings()
    first, fallback = settings.provider, settings.fallback
    assert first is not None
    assert fallback is not None
    assert (first.model, fallback.model) == ("first", "second")
    assert (first.api_key, fallback.api_key) == ("sk-first", "sk-other")
    assert (first.headers, fallback.headers) == ({"X-A": "1"}, {"X-B": "2"})
    assert (first.key_header, fallback.key_header) == ("k", None)
    assert (first.include_usage, fallback.include_usage) == (True, False)
    assert (first.stops_on_close, fallback.stops_on_close) == (
        StopsOnClose.YES,
        StopsOnClose.UNKNOWN,
    )
    assert first.idle_timeout == fallback.idle_timeout == 3


def test_a_fallback_is_sent_no_key_that_was_not_meant_for_it(bench: Bench) -> None:
    bench.environ["OPENAI_API_KEY"] = "sk-first"
    bench.base(without="")
    fallback = bench.settings().fallback
    assert fallback is not None
    assert fallback.api_key is None


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--llm-url", "http://h/v1"], "--llm-url http://h/v1 needs --llm-model"),
        (["--llm-url", "http://h/v1?key=x"], "--llm-url http://h/v1?*** needs --llm-model"),
        (["--llm-url", "ftp://h/v1"], "--llm-url 'ftp://h/v1' is not a valid URL"),
        (["--llm-model", "gpt-4o"], "--llm-model needs --llm-url"),
        (["--llm-header", "A: b"], "--llm-header needs --llm-url"),
        (["--no-llm-include-usage"], "--llm-include-usage needs --llm-url"),
        (["--llm-proxy", "http://u:x@h:1"], "--llm-proxy http://***@h:1 needs --llm-url"),
        (["--llm-fallback-model", "m"], "--llm-fallback-model m needs --llm-fallback-url"),
        (["--llm-fallback-header", "A: b"], "--llm-fallback-header needs --llm-fallback-url"),
        (
            ["--llm-fallback-url", "http://h/v1", "--llm-fallback-model", "m"],
            "--llm-fallback-url http://h/v1 needs --llm-url",
        ),
        (
            [*PROVIDER, "--llm-fallback-url", "http://h/v1"],
            "--llm-fallback-url http://h/v1 needs --llm-fallback-model",
        ),
    ],
)
def test_a_setting_without_effect_alone_names_the_one_it_needs(
    arguments: list[str], start: str
) -> None:
    (line,) = faults(given(*arguments))
    assert line.startswith(start)


def test_a_setting_at_its_default_needs_no_other() -> None:
    assert faults(given("--llm-include-usage", "--llm-stops-on-close", "unknown")) == []
    assert faults(given("--llm-api-key-env", "OPENAI_API_KEY")) == []


def test_a_header_takes_what_the_environment_has() -> None:
    read = given(
        *PROVIDER,
        *(
            "--llm-header",
            "X-Two: ${ONE} and ${TWO}",
            "--llm-header",
            "Authorization: Basic ${ONE}",
        ),
        environ={"ONE": "1\n", "TWO": "${ONE}"},
    )
    provider = Settings.of(read).provider
    assert provider is not None
    assert provider.headers == {"X-Two": "1 and ${ONE}", "Authorization": "Basic 1"}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("A: ${NOWHERE}", "--llm-header: environment variable NOWHERE is not set, or is empty"),
        ("A: ${EMPTY}", "--llm-header: environment variable EMPTY is not set, or is empty"),
        ("A: ${not-a-name}", "environment variable named in ${} is not set, or is empty"),
        ("A: ${}", "environment variable named in ${} is not set, or is empty"),
        ("A: ${TWO_LINES}", "the value of A contains characters that a header cannot carry"),
        ("no header", "--llm-header number 1 is not a header: write it as 'Name: value'"),
        (": b", "'' is not a valid header name"),
        ("Content-Type: text/plain", "Content-Type cannot be set"),
    ],
)
def test_a_header_that_cannot_be_sent_is_a_fault(header: str, words: str) -> None:
    environ = {"EMPTY": " ", "TWO_LINES": "a\nb"}
    (line,) = provider_faults("--llm-header", header, environ=environ)
    assert line.startswith("--llm-header")
    assert words in line


def test_a_header_that_is_given_twice_is_a_fault() -> None:
    (line,) = provider_faults("--llm-header", "X-A: 1", "--llm-header", "x-a: 2")
    assert line == "--llm-header: x-a is given twice"


@pytest.mark.parametrize(
    "name", ["Authorization", "proxy-authorization", "Cookie", "api-key", "X-Goog-Api-Key"]
)
def test_a_secret_header_comes_from_the_environment_only(bench: Bench, name: str) -> None:
    bench.base(without="")
    header = f"{name}: {SECRET}"
    for source in ("flag", "file"):
        where = bench.give(source, "llm_header", [header])
        assert bench.faults() == [f"{where}: {name} contains a secret: use ${{VARIABLE}} instead"]
        bench.flags.clear()
        bench.file.pop("llm_header", None)
    bench.give("environment", "llm_header", [header])
    assert bench.settings().provider.headers == {name: SECRET}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("proxy", "environ", "result"),
    [
        ("http://proxy:3128", {}, "http://proxy:3128"),
        ("http://me@proxy:3128", {}, "http://me@proxy:3128"),
        ("http://me:${PW}@proxy:3128", {"PW": "a/b@c:d\n"}, "http://me:a%2Fb%40c:d@proxy:3128"),
        ("${PROXY}", {"PROXY": "http://me:a%2Fb@proxy:3128\n"}, "http://me:a%2Fb@proxy:3128"),
    ],
)
def test_a_proxy_takes_its_password_from_the_environment(
    bench: Bench, proxy: str, environ: dict[str, str], result: str
) -> None:
    bench.base(without="")
    bench.environ |= environ
    for source in SOURCES:
        bench.give(source, "llm_proxy", proxy)
        assert bench.settings().provider.proxy == result  # type: ignore[union-attr]
        bench.flags.clear()
        bench.environ.pop("BARGEIN_LLM_PROXY", None)


def test_a_proxy_s_password_stands_in_no_flag_and_no_file(bench: Bench) -> None:
    bench.base(without="")
    proxy = f"http://me:{SECRET}@proxy:3128"
    for source in ("flag", "file"):
        where = bench.give(source, "llm_proxy", proxy)
        assert bench.faults() == [f"{where} contains a password: use ${{VARIABLE}} instead"]
        bench.flags.clear()
        bench.file.pop("llm_proxy", None)
    bench.give("environment", "llm_proxy", proxy)
    assert bench.settings().provider.proxy == proxy  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("proxy:3128", "is not the URL of an HTTP proxy"),
        ("socks5://proxy:3128", "is not the URL of an HTTP proxy"),
        ("http://pro xy:3128", "is not the URL of an HTTP proxy"),
        ("http://%zz:1", "is not the URL of an HTTP proxy"),
        ("${NOWHERE}", "environment variable NOWHERE is not set"),
        ("http://${NOWHERE}:3128", "environment variable NOWHERE is not set"),
    ],
)
def test_an_invalid_proxy_is_an_error(proxy: str, words: str) -> None:
    (line,) = provider_faults("--llm-proxy", proxy)
    assert line.startswith("--llm-proxy")
    assert words in line


def test_a_url_with_credentials_is_refused() -> None:
    (line,) = faults(given("--llm-url", f"http://me:{SECRET}@h/v1", "--llm-model", "m"))
    assert line == "--llm-url contains credentials: give the API key in a variable or a file"
    assert faults(given("--llm-url", "http://h/v1/models/m@1?a=b@c", "--llm-model", "m")) == []


def test_a_key_variable_that_is_named_must_be_set() -> None:
    (line,) = provider_faults("--llm-api-key-env", "MY_KEY")
    assert line == "--llm-api-key-env names a variable that is not set, or is empty"
    provider = given(*PROVIDER, "--llm-api-key-env", "MY_KEY", environ={"MY_KEY": " sk-1\n"})
    assert Settings.of(provider).provider.api_key == "sk-1"  # type: ignore[union-attr]
    assert Settings.of(given(*PROVIDER)).provider.api_key is None  # type: ignore[union-attr]


@pytest.mark.parametrize("key", [f"{SECRET}\nagain", f"{SECRET} again", f"中{SECRET}"])
def test_a_key_that_no_header_can_carry_is_a_fault(key: str) -> None:
    (line,) = provider_faults(environ={"OPENAI_API_KEY": key})
    assert line.startswith("OPENAI_API_KEY contains characters that no API key has")
    assert SECRET not in line


@pytest.mark.parametrize("prefix", ["llm_", "llm_fallback_"])
@pytest.mark.parametrize("around", ["{}", "{}\n", "\r\n {}\r\n"])
def test_a_key_in_a_file_takes_the_place_of_the_variable(
    bench: Bench, prefix: str, around: str
) -> None:
    bench.base(without="")
    bench.environ |= {"OPENAI_API_KEY": "sk-variable", "OTHER": "sk-variable"}
    bench.give("flag", "llm_fallback_api_key_env", "OTHER")
    bench.give("file", prefix + "api_key_file", bench.key_file(around.format("sk-file")))
    settings = bench.settings()
    provider = settings.provider if prefix == "llm_" else settings.fallback
    other = settings.fallback if prefix == "llm_" else settings.provider
    assert provider is not None
    assert other is not None
    assert provider.api_key == "sk-file"
    assert other.api_key == "sk-variable"


def test_a_key_in_a_file_needs_no_variable_even_if_one_is_named(bench: Bench) -> None:
    bench.flags = [*PROVIDER, "--llm-api-key-env", "NOWHERE"]
    bench.give("flag", "llm_api_key_file", bench.key_file("sk-file"))
    provider = bench.settings().provider
    assert provider is not None
    assert provider.api_key == "sk-file"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "names an empty file"),
        (b" \n\r\n", "names an empty file"),
        (SECRET.encode() + b"\n" + SECRET.encode(), "contains characters that no API key has"),
        (SECRET.encode() + b"\xff", "contains characters that no API key has"),
        (SECRET.encode() * 10_000, "names a file that is too large for a key"),
    ],
)
def test_a_file_that_holds_no_key_is_a_fault(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    (line,) = provider_faults("--llm-api-key-file", str(path))
    assert "--llm-api-key-file " in line
    assert words in line
    assert SECRET not in line


def test_an_invalid_key_path_is_not_shown_since_it_may_be_the_key(tmp_path: Path) -> None:
    for path in (SECRET, f"{SECRET}\x00", str(tmp_path)):
        (line,) = provider_faults("--llm-api-key-file", path)
        assert line == "--llm-api-key-file is not the path of a file"
    (line,) = faults(given("--llm-api-key-file", SECRET))
    assert line.startswith("--llm-api-key-file *** needs --llm-url")


@pytest.mark.skipif(os.name != "posix", reason="no named pipes here")
def test_a_named_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (line,) = provider_faults("--llm-api-key-file", str(tmp_path / "pipe"))
    assert line == "--llm-api-key-file is not the path of a file"


def test_settings_that_need_a_restart_are_named_and_the_providers_need_none(bench: Bench) -> None:
    bench.base(without="")
    running = bench.read().config
    needy = {
        key
        for key in KEYS
        if not key.startswith("llm_") or key.startswith(("llm_breaker_", "llm_total_"))
    }
    for key in KEYS:
        other = Bench(bench.path.parent)
        other.base(without=key)
        if key in ("insecure_no_auth", "auth_file"):
            continue  # it is not at its default; the two of them see below
        other.give("file", key, samples(key)[0])
        assert other.read().restart_keys(running) == ([key] if key in needy else [])
    assert bench.read().restart_keys(running) == []
    demo = given().config
    assert set(bench.read().restart_keys(demo)) == set(BASE)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("/etc/one.toml", "/etc/two.toml", []),
        (None, "/etc/one.toml", ["auth_file"]),
        ("/etc/one.toml", None, ["auth_file"]),
    ],
)
@pytest.mark.parametrize("with_provider", [False, True])
def test_another_auth_file_is_reloaded_but_adding_or_removing_it_needs_a_restart(
    before: str | None, after: str | None, expected: list[str], with_provider: bool
) -> None:
    def config_of(path: str | None) -> ConfigSources:
        return given(*(["--auth-file", path] if path else []))

    running = config_of(before).config
    assert config_of(after).restart_keys(running) == expected
    if with_provider:  # which needs a restart, since the demo one runs
        arguments = ["--llm-url", "http://h/v1", *(["--auth-file", after] if after else [])]
        assert given(*arguments).restart_keys(running) == [*expected, "llm_url"]


def test_a_fault_of_the_extra_fields_names_the_field() -> None:
    (line,) = provider_faults("--llm-extra-body", '{"stream": false}')
    assert line.startswith("--llm-extra-body: 'stream' cannot be set")


def test_certificates_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("none")
    for url in ("https://h/v1", "https://h/v2"):
        (line,) = faults(given("--llm-url", url, "--llm-model", "m", "--llm-ca-file", str(path)))
        assert line.startswith(f"--llm-ca-file {str(path)!r} holds no certificates")
    assert ssl.create_default_context(cafile=certifi.where())


# The demo provider -------------------------------------------------------------------------------


def test_a_model_without_a_provider_is_a_scenario_of_the_demo_one() -> None:
    read = given("--llm-model", "stall-headers:8", "--llm-idle-timeout", "3", "--llm-retries", "0")
    settings = Settings.of(read)
    assert settings.provider is None
    assert settings.demo.model == "stall-headers:8"
    assert (settings.demo.idle_timeout, settings.demo.retries) == (3, 0)
    assert settings.demo.stops_on_close is StopsOnClose.YES
    assert Settings.of(given()).demo.model == "demo"
    assert Settings.of(given("--llm-model", "demo-story")).demo.model == "demo-story"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gpt-4o", "needs --llm-url: the demo provider has no model 'gpt-4o'"),
        ("stall-header:8", "Did you mean 'stall-headers"),
        ("stall-headers:never", "Invalid parameter"),
        ("empty:8", "takes no parameter"),
    ],
)
def test_an_unknown_demo_scenario_is_an_error(model: str, words: str) -> None:
    (line,) = faults(given("--llm-model", model))
    assert line.startswith("--llm-model ")
    assert words in line


# Secrets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--llm-url", f"http://me:{SECRET}@h/v1", "--llm-model", "m"],
        ["--llm-url", f"me:{SECRET}@h/v1", "--llm-model", "m"],
        ["--llm-url", f"http://me:{SECRET}/x@h/v1", "--llm-model", "m"],
        ["--llm-url", f"http://me:x?{SECRET}@h/v1"],
        ["--llm-url", f"ftp://h/v1?key={SECRET}", "--llm-model", "m"],
        ["--llm-url", f"http://h/v1?key={SECRET}"],
        ["--llm-url", f"http://h/v1?key={SECRET}", "--llm-model", "m"],
        [*PROVIDER, "--llm-proxy", f"http://me:{SECRET}@h:1"],
        [*PROVIDER, "--llm-proxy", f"http://me:{SECRET}/x@h:1"],
        [*PROVIDER, "--llm-proxy", f"me:{SECRET}@h:1"],
        [*PROVIDER, "--llm-proxy", f"http://me:{SECRET}@h h:1"],
        ["--llm-proxy", f"http://me:{SECRET}@h:1"],
        [*PROVIDER, "--llm-header", f"X-Key: {SECRET}"],
        [*PROVIDER, "--llm-header", f"X-Key {SECRET}"],
        [*PROVIDER, "--llm-header", f"X-Key: {SECRET}\x7f"],
        [*PROVIDER, "--llm-header", f"X-Key: ${{{SECRET}}}"],
        [*PROVIDER, "--llm-header", f"Authorization: {SECRET}"],
        [*PROVIDER, "--llm-extra-body", f'{{"api_key": "{SECRET}"}}'],
        [*PROVIDER, "--llm-extra-body", f'{{"api_key": "{SECRET}"'],
        [*PROVIDER, "--llm-api-key-env", SECRET],
        [*PROVIDER, "--llm-api-key", SECRET],
        [*PROVIDER, f"--llm-api-key={SECRET}"],
        [*PROVIDER, "--llm-api-key-env", "BAD_KEY"],
        [*PROVIDER, "--llm-header", "A: ${BAD_KEY}", "--llm-key-header", "api-key"],
        [*PROVIDER, "--llm-proxy", "http://me:${BAD_KEY}@h h"],
        [*PROVIDER, "--llm-proxy", "${BAD_KEY}"],
    ],
)
def test_no_secret_is_shown_in_a_fault_or_a_report(arguments: list[str]) -> None:
    environ = {"BAD_KEY": f"{SECRET}\nagain", "BARGEIN_LLM_API_KEY": SECRET}
    read = given(*arguments, environ=environ)
    lines = [*read.warnings, *(faults(read) or read.report())]
    assert len(lines) > 1
    assert SECRET not in "\n".join(lines)


TABLE, LISTS = f"{{ a = '{SECRET}' }}", f"[['{SECRET}']]"


@pytest.mark.parametrize(
    ("key", "toml"),
    [
        ("llm_url", f"['http://me:{SECRET}@h']"),
        ("llm_url", TABLE),
        ("llm_proxy", f"['http://me:{SECRET}@h']"),
        ("llm_proxy", TABLE),
        ("llm_header", f"'X-Key: {SECRET}'"),
        ("llm_header", TABLE),
        ("llm_header", LISTS),
        ("llm_extra_body", f"'{SECRET}'"),
        ("llm_extra_body", LISTS),
        ("llm_api_key_env", f"['{SECRET}']"),
        ("llm_api_key_env", TABLE),
    ],
)
def test_no_secret_of_a_wrong_type_is_shown(bench: Bench, key: str, toml: str) -> None:
    bench.base(without=key)
    bench.file[key] = toml
    given = bench.read()
    (line,) = faults(given)
    assert SECRET not in line


def test_a_report_says_what_is_not_the_default_as_a_file_has_it(bench: Bench) -> None:
    bench.environ |= {"TEAM": "blue", "PW": SECRET, "OPENAI_API_KEY": SECRET}
    bench.base(without="")
    bench.give("file", "port", 8000)  # the default
    bench.give("environment", "llm_header", ["X-Team: ${TEAM}", f"X-Key: {SECRET}"])
    bench.flags = ["--llm-proxy", "http://me:${PW}@h:1", "--llm-extra-body", '{"a": 1}']
    bench.flags += ["--session-timeout", "0.5", "--llm-stops-on-close", "no", "--on-new-request"]
    bench.flags += ["parallel", "--no-llm-include-usage", "--allow-origin", "https://中.example"]
    given = bench.read()
    Settings.of(given)
    assert given.report() == [
        'allow_origin = ["https://中.example"]  # --allow-origin',
        f"insecure_no_auth = true  # {bench.path}: insecure_no_auth",
        f'llm_url = "http://127.0.0.1:9/v1"  # {bench.path}: llm_url',
        f'llm_model = "first"  # {bench.path}: llm_model',
        'llm_header = ["X-Team: ***", "X-Key: ***"]  # BARGEIN_LLM_HEADER',
        'llm_extra_body = { a = "***" }  # --llm-extra-body',
        "llm_include_usage = false  # --llm-include-usage",
        'llm_stops_on_close = "no"  # --llm-stops-on-close',
        'llm_proxy = "http://***@h:1"  # --llm-proxy',
        f'llm_fallback_url = "http://127.0.0.1:9/fallback"  # {bench.path}: llm_fallback_url',
        f'llm_fallback_model = "second"  # {bench.path}: llm_fallback_model',
        'on_new_request = "parallel"  # --on-new-request',
        "session_timeout = 0.5  # --session-timeout",
    ]
    tomllib.loads("\n".join(given.report()))


# The default file --------------------------------------------------------------------------------


def test_the_default_file_changes_nothing_and_has_every_setting_once() -> None:
    text = default_config()
    assert tomllib.loads(text) == {}
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    assert re.findall(r"^#(\w+) = ", text, re.MULTILINE) == KEYS
    assert "--" not in text.partition("\n## ")[2]  # its settings are keys, not flags
    assert text.count("## ") == len({setting.section for setting in SETTINGS.values()})


def lines_of_default_config() -> list[str]:
    return re.findall(r"^#(\w+ = .*)$", default_config(), re.MULTILINE)


@pytest.mark.parametrize("line", lines_of_default_config())
def test_each_line_of_the_default_file_is_a_setting_with_its_default(
    bench: Bench, line: str
) -> None:
    bench.path.write_text(line)
    key = line.split()[0]
    given = bench.read()
    default = SETTINGS[key].default
    assert (getattr(given.config, key) == default) is (default not in (None, ()))
    wrong_type = f" is not {SETTINGS[key].expected}"
    assert not any(
        line.startswith(f"{bench.path}: ") and wrong_type in line for line in faults(given)
    )


def test_the_default_file_works_with_all_its_examples_too(bench: Bench, tmp_path: Path) -> None:
    text = "\n".join(lines_of_default_config()).replace("ca.pem", certifi.where())
    text = re.sub(r"^llm_proxy.*$", "", text, flags=re.MULTILINE)
    key_file = tmp_path / "key"
    key_file.write_text("sk-0")
    text = re.sub(r"/run/secrets/\w+", str(key_file), text)
    text = text.replace("/etc/bargein/auth.toml", bench.auth_file())
    path = tmp_path / "bargein.toml"
    path.write_text(text)
    environ = {"TEAM": "blue", "OTHER_API_KEY": "sk-1", "OPENAI_API_KEY": "sk-2"}
    assert faults(given("--config", str(path), environ=environ)) == []


def test_help_and_the_default_file_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_to_the_end("check-config", "--help")
    monkeypatch.setattr("gateway.settings.options.program", lambda: "run.py")
    shown = re.sub(r"\s+", " ", done.stdout)
    for setting in SETTINGS.values():
        assert setting.flag in shown
        assert setting.help in shown


# No port for metrics, as the harness has it: else two tests would want the same one.
NOTHING_SET = {"BARGEIN_OPS_PORT": ""}


# Who may read the auth file ----------------------------------------------------------------------

has_modes = pytest.mark.skipif(os.name != "posix", reason="files have no modes here")


@has_modes
@pytest.mark.parametrize(
    ("mode", "what"),
    [
        (0o644, "every user can read it"),
        (0o604, "every user can read it"),
        (0o755, "every user can read it"),
        (0o664, "every user can read it and its group can change it"),
        (0o660, "its group can change it"),
        (0o620, "its group can change it"),
        (0o602, "every user can change it"),
        (0o666, "every user can read it and every user can change it"),
    ],
)
@pytest.mark.parametrize("source", SOURCES)
def test_an_auth_file_that_is_open_to_others_is_a_warning(
    bench: Bench, source: str, mode: int, what: str
) -> None:
    path = Path(bench.auth_file())
    path.chmod(mode)
    name = bench.give(source, "auth_file", str(path))
    given = bench.read()
    assert faults(given) == []
    assert given.warnings == [
        f"{name} {str(path)!r} has mode {mode:04o}: {what} (chmod 640 or 600)"
    ]


@has_modes
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440, 0o700, 0o750])
def test_an_auth_file_that_only_the_gateway_and_its_group_can_read_is_none(
    bench: Bench, mode: int
) -> None:
    path = Path(bench.auth_file())
    path.chmod(mode)
    bench.give("flag", "auth_file", str(path))
    given = bench.read()
    assert faults(given) == []
    assert given.warnings == []


@has_modes
def test_the_warning_stands_before_the_faults_of_other_settings(bench: Bench) -> None:
    path = Path(bench.auth_file())
    path.chmod(0o644)
    done = run_to_the_end("check-config", "--auth-file", str(path), "--port", "no", env=NOTHING_SET)
    assert done.returncode == 2
    warning, error = done.stderr.splitlines()
    assert warning.startswith(f"warning: --auth-file {str(path)!r} has mode 0644: ")
    assert error.startswith("error: --port 'no' is not a port number")


@has_modes
@pytest.mark.parametrize("mode", [0o644, 0o662, 0o660])
def test_check_config_and_the_start_print_it(bench: Bench, mode: int) -> None:
    path = Path(bench.auth_file())
    path.chmod(mode)
    line = f"warning: --auth-file {str(path)!r} has mode {mode:04o}: "
    done = run_to_the_end("check-config", "--auth-file", str(path), env=NOTHING_SET)
    assert done.returncode == 0
    assert done.stdout.startswith("ok\n")
    assert done.stderr.startswith(line)
    with Daemon("--auth-file", str(path)) as daemon:
        wait_until(lambda: line in daemon.log, "it is printed")
        assert daemon.log.count("has mode") == 1


# As commands -------------------------------------------------------------------------------------


def test_the_default_file_is_printed_and_is_right_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run_to_the_end("default-config")
    assert (printed.returncode, printed.stderr) == (0, "")
    monkeypatch.setattr("gateway.settings.options.program", lambda: "run.py")
    assert printed.stdout == default_config()
    path = tmp_path / "bargein.toml"
    path.write_text(printed.stdout)
    checked = run_to_the_end("check-config", "--config", str(path), env=NOTHING_SET)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "ok\n", "")


def test_settings_that_are_right_are_listed_with_where_they_are_from(tmp_path: Path) -> None:
    path = tmp_path / "bargein.toml"
    path.write_text("port = 1\n")
    environ = NOTHING_SET | {"BARGEIN_LOG_LEVEL": "debug", "BARGEIN_LLM_API_KEY": SECRET}
    done = run_to_the_end("check-config", "--config", str(path), "--stale-after", "1", env=environ)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "ok",
        f"port = 1  # {path}: port",
        "stale_after = 1  # --stale-after",
        'log_level = "debug"  # BARGEIN_LOG_LEVEL',
    ]
    assert done.stderr == (
        "warning: unknown environment variable BARGEIN_LLM_API_KEY; "
        "did you mean BARGEIN_LLM_API_KEY_ENV?\n"
    )


@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_settings_that_are_wrong_are_named_a_line_each(command: str) -> None:
    environ = {"BARGEIN_LLM_MODLE": "m", "BARGEIN_PORT": "no"}
    done = run_to_the_end(command, "--log-levle", "debug", env=environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "warning: unknown environment variable BARGEIN_LLM_MODLE; did you mean BARGEIN_LLM_MODEL?",
        "error: BARGEIN_PORT 'no' is not a port number (0 to 65535)",
        "error: unknown flag --log-levle; did you mean --log-level?",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo-llm", "--prot", "1"],
        *(["demo-llm", "--tokens-per-second", pace] for pace in ("0", "-1", "nan", "fast")),
        ["default-config", "--port=1"],
        ["serve", "--port"],
    ],
)
def test_other_faults_of_a_command_line_are_one_line_too(arguments: list[str]) -> None:
    done = run_to_the_end(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert arguments[1].partition("=")[0] in line


def test_a_scenario_is_played_with_the_limits_that_were_given() -> None:
    arguments = ("--llm-model", "stall-headers:8", "--llm-retries", "0")
    with (
        Daemon(*arguments, "--llm-first-token-timeout", "0.2") as daemon,
        Client(daemon.port) as client,
    ):
        assert "(embedded demo provider), model stall-headers:8" in daemon.output
        terminal = client.wait_terminal(client.request("Hello"))
        assert terminal.payload["outcome"] == "FAILED"


# The README --------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "gateway" / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_example_of_the_page_works(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    path = tmp_path / "bargein.toml"
    path.write_text(text)
    environ = dict.fromkeys(re.findall(r"\b[A-Z][A-Z_]+\b", text), "sk-1")
    assert faults(given("--config", str(path), environ=environ)) == []
    assert "TEAM is not set, or is empty" in " ".join(faults(given("--config", str(path))))


def test_what_the_page_names_is_there() -> None:
    section = PAGE.read_text().partition("## Settings")[2].partition("\n## ")[0]
    assert section
    names = re.findall(r"`(--[a-z-]+|BARGEIN_[A-Z_]+|[a-z]+_[a-z_]+)[` =]", section)
    known = {"--config", "BARGEIN_CONFIG"}
    for setting in SETTINGS.values():
        known |= {setting.key, setting.flag, setting.variable}
    assert len(names) > 5
    assert set(names) <= known


@pytest.mark.parametrize("name", ["run.py", "bargein"])
def test_texts_name_the_command_that_was_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"run.py": "bargein", "bargein": "run.py"}[name]
    monkeypatch.setattr("gateway.settings.options.program", lambda: name)
    monkeypatch.setattr("gateway.settings.settings.program", lambda: name)
    (fault,) = faults(given("--llm-model", "gpt-4o"))
    for text in (default_config(), SETTINGS["auth_file"].help, fault):
        assert f"`{name} " in text
        assert f"`{other} " not in text
