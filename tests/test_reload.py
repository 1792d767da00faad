"""SIGHUP: new keys, certificates and provider settings apply while requests run."""

from __future__ import annotations

import gc
import json
import os
import signal
import ssl
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from actors.loop.lanes import lanes
from gateway import daemon
from gateway.app import Gateway
from gateway.settings.sources import ConfigSources
from llm.chat.generation import GenerationSettings, LlmClient
from llm.http.connections import Connections
from llm.provider import Provider
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.test_generation import Run

OLD, NEW = "sk-old-0123456789", "sk-new-0123456789"

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")


class Stand:
    """A daemon whose settings and key are in files, and one client of it."""

    def __init__(self, folder: Path, provider: ProviderProcess) -> None:
        self.provider = provider
        self.folder = folder
        self.key_file, self.config = folder / "key", folder / "bargein.toml"
        self.key_file.write_text(OLD + "\n")
        self.settings = {
            "llm_url": provider.base_url,
            "llm_model": "first",
            "llm_api_key_file": str(self.key_file),
        }
        self.write()
        arguments = ("--config", str(self.config), "--log-format", "json")
        self.daemon = Daemon(*arguments, env={"OPENAI_API_KEY": "sk-of-the-environment"})
        self.client = Client(self.daemon.port)

    def write(self, **settings: Any) -> None:
        """Write the file of settings anew."""
        self.settings |= settings
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in self.settings.items())
        self.config.write_text("".join(lines))

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log up to now."""
        lines = self.daemon.log.split("\n")[:-1]  # the last one may not be there as a whole
        return [json.loads(line) for line in lines]

    def hang_up(self) -> list[dict[str, Any]]:
        """SIGHUP; what the log says of it when it is done."""
        before = len(self.log)

        def said() -> list[dict[str, Any]]:
            words = ("Reloaded", "Not reloaded", "Settings need a restart")
            return [line for line in self.log[before:] if line["event"] in words]

        self.daemon.signal(signal.SIGHUP)
        wait_until(lambda: bool(said()), "it was reloaded, or not")
        # A health check is answered when the handler, which never waits, is through.
        self.client.send("HEALTH_CHECK", {"check_fields": []})
        self.client.wait_for(lambda frame: frame.msg_type == "HEALTH_CHECK_ACK")
        return said()

    def key_of(self, script: str, n: int = 1) -> str:
        """The key that the n-th POST of a script was sent with."""
        return self.provider.wait_post(n, script).headers["authorization"].removeprefix("Bearer ")

    def complete(self) -> str:
        """A request that is answered; returns the key that it was asked with."""
        script = self.provider.fresh(scripts.answer(["Hello"]))
        request_id = self.client.request(script)
        assert self.client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        return self.key_of(script)

    def close(self) -> None:
        self.client.drop()
        self.daemon.kill()
        assert "Traceback" not in self.daemon.log
        for secret in (OLD, NEW):
            assert secret not in self.daemon.log + self.daemon.output


@pytest.fixture
def stand(tmp_path: Path, provider: ProviderProcess) -> Iterator[Stand]:
    stand = Stand(tmp_path, provider)
    yield stand
    stand.close()


# By a signal -------------------------------------------------------------------------------------


def test_the_next_request_has_the_new_key_and_the_one_that_runs_goes_on(stand: Stand) -> None:
    provider = stand.provider
    key = provider.unique("end")
    script = provider.fresh(scripts.finish_on_release(["Once", " upon"], key))
    assert stand.complete() == OLD
    running = stand.client.request(script)
    stand.client.wait_text(running)
    stand.key_file.write_text(NEW + "\n")
    with Client(stand.daemon.port) as other:
        [line] = stand.hang_up()
        assert (line["event"], line["level"], line["component"]) == ("Reloaded", "info", "SYS")
        assert line["provider"] == provider.base_url.split("/")[2]
        assert (line["model"], line["fallback"]) == ("first", None)
        next_one = provider.fresh(scripts.answer(["Hello"]))
        assert other.wait_terminal(other.request(next_one)).payload["outcome"] == "COMPLETED"
        assert stand.key_of(next_one) == NEW
    provider.release(key)
    assert stand.client.wait_terminal(running).payload["outcome"] == "COMPLETED"
    assert stand.client.text_of(running) == "Once upon"
    assert stand.key_of(script) == OLD
    assert len(provider.posts(script)) == 1
    assert stand.complete() == NEW


def test_one_that_runs_can_be_interrupted_afterwards(stand: Stand) -> None:
    script = stand.provider.fresh(scripts.idle_mid_stream(["Once"]))
    request_id = stand.client.request(script)
    stand.client.wait_text(request_id)
    stand.hang_up()
    stand.client.interrupt(request_id)
    assert stand.client.wait_ack().payload["status"] == "SUCCESS"
    stand.provider.wait_closed(stand.provider.wait_post(script=script).conn)


def test_the_model_and_a_fallback_come_along(stand: Stand) -> None:
    provider = stand.provider
    stand.write(
        llm_model="second",
        llm_retries=0,
        llm_header=["X-Team: blue"],
        llm_fallback_url=provider.base_url,
        llm_fallback_model="third",
    )
    [line] = stand.hang_up()
    assert (line["model"], line["fallback"]) == ("second", line["provider"])
    script = provider.fresh(scripts.http_error(503, "overloaded"))
    stand.client.wait_terminal(stand.client.request(script))
    first, fallback = provider.wait_post(1, script), provider.wait_post(2, script)
    assert (first.body["model"], fallback.body["model"]) == ("second", "third")
    assert first.headers["x-team"] == "blue"
    assert "x-team" not in fallback.headers


@pytest.mark.parametrize("broken", ["key", "key_gone", "toml", "setting", "certificates"])
def test_an_error_changes_nothing_and_is_named(stand: Stand, broken: str) -> None:
    match broken:
        case "key":
            stand.key_file.write_text(f"{NEW} {NEW}")
        case "key_gone":
            stand.key_file.unlink()
        case "toml":
            stand.config.write_text("llm_url = ")
        case "setting":
            stand.key_file.write_text(NEW)
            stand.write(llm_modle="second", llm_idle_timeout="long")
        case "certificates":
            stand.key_file.write_text(NEW)
            stand.write(llm_url="https://127.0.0.1:9/v1", llm_ca_file=str(stand.config))
    lines = stand.hang_up()
    assert {line["event"] for line in lines} == {"Not reloaded"}
    assert {line["level"] for line in lines} == {"error"}
    assert len(lines) == (2 if broken == "setting" else 1)
    words = {
        "key": "characters that no API key has",
        "key_gone": "is not the path of a file",
        "toml": "is not valid TOML",
        "setting": "did you mean llm_model?",
        "certificates": "holds no certificates",
    }
    assert words[broken] in lines[0]["fault"]
    assert stand.complete() == OLD
    # And when it is right again, it is taken up.
    stand.key_file.write_text(NEW)
    stand.settings = {key: stand.settings[key] for key in ("llm_model", "llm_api_key_file")} | {
        "llm_url": stand.provider.base_url
    }
    stand.write()
    [line] = stand.hang_up()
    assert line["event"] == "Reloaded"
    assert stand.complete() == NEW


def test_settings_that_need_a_restart_are_named_and_the_rest_applies(stand: Stand) -> None:
    stand.key_file.write_text(NEW)
    stand.write(session_timeout=60, llm_breaker_failures=7)
    for _ in range(2):  # it needs one as long as there was none
        restart, reloaded = stand.hang_up()
        assert restart["event"] == "Settings need a restart"
        assert restart["level"] == "warning"
        assert restart["settings"] == ["llm_breaker_failures", "session_timeout"]
        words = "a reload applies only provider settings and the contents of auth_file"
        assert restart["reason"] == words
        assert reloaded["event"] == "Reloaded"
    assert stand.complete() == NEW
    stand.write(session_timeout=3600, llm_breaker_failures=5)
    [reloaded] = stand.hang_up()
    assert reloaded["event"] == "Reloaded"


def test_certificates_are_replaced(tmp_path: Path, provider: ProviderProcess) -> None:
    ca_file = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(ca_file))  # another authority
    script = provider.fresh(scripts.answer(["Hello"]))
    arguments = ["--llm-url", provider.tls_base_url, "--llm-model", "m", "--llm-retries", "0"]
    with (
        Daemon(*arguments, "--llm-ca-file", str(ca_file)) as daemon,
        Client(daemon.port) as client,
    ):
        refused = client.wait_terminal(client.request(script))
        assert "certificate" in refused.payload["error_detail"].lower()
        ca_file.write_bytes(Path(provider.ca_file).read_bytes())
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: "Reloaded" in daemon.log, "it was reloaded")
        assert client.wait_terminal(client.request(script)).payload["outcome"] == "COMPLETED"


def test_certificates_are_read_once_until_they_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Counted(ssl.SSLContext):
        def load_verify_locations(self, cafile: Any = None, *more: Any, **named: Any) -> None:
            read.append(cafile)
            super().load_verify_locations(cafile, *more, **named)

    monkeypatch.setattr(
        "urllib3.util.create_urllib3_context", lambda: Counted(ssl.PROTOCOL_TLS_CLIENT)
    )
    ca_file = tmp_path / "ca.pem"
    for times in (1, 2):
        trustme.CA().cert_pem.write_to_path(str(ca_file))
        os.utime(ca_file, (times, times))
        for _ in range(2):
            Connections("https://host", None, str(ca_file), 1.0, 1, lanes()).close()
        assert read == [str(ca_file)] * times


def test_the_demo_provider_changes_its_scenario_but_cannot_be_replaced(
    tmp_path: Path, provider: ProviderProcess
) -> None:
    config = tmp_path / "bargein.toml"
    config.write_text("llm_model = 'empty'")
    with Daemon("--config", str(config), "--log-format", "json") as daemon:
        with Client(daemon.port) as client:
            answer = client.request("Hello")
            client.wait_terminal(answer)
            assert client.text_of(answer) == ""
            config.write_text("llm_model = 'echo'")
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: "Reloaded" in daemon.log, "it was reloaded")
            answer = client.request("Hello")
            client.wait_terminal(answer)
            assert "Hello" in client.text_of(answer)
            config.write_text(f"llm_url = '{provider.base_url}'\nllm_model = 'm'")
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: "need a restart" in daemon.log, "it says that it cannot")
            line = json.loads(daemon.log.splitlines()[-1])
            assert line["settings"] == ["llm_url", "llm_model"]
            assert line["reason"].startswith("llm_url was added: the demo provider")
            answer = client.request("Still here")
            client.wait_terminal(answer)
            assert "Still here" in client.text_of(answer)
        assert daemon.log.count("Reloaded") == 1


def test_the_demo_provider_cannot_replace_another(stand: Stand) -> None:
    stand.key_file.write_text(NEW)
    stand.settings = {}
    stand.write()
    [line] = stand.hang_up()
    assert line["event"] == "Settings need a restart"
    assert "llm_url" in line["settings"]
    assert line["reason"].startswith("llm_url was removed: the demo provider")
    assert stand.complete() == OLD


def test_while_it_drains_it_reloads_nothing(stand: Stand) -> None:
    request_id = stand.client.request(stand.provider.fresh(scripts.idle_mid_stream(["Once"])))
    stand.client.wait_text(request_id)
    stand.daemon.signal(signal.SIGTERM)
    wait_until(lambda: "Draining" in stand.daemon.log, "it drains")
    [line] = stand.hang_up()
    assert line["event"] == "Not reloaded"
    assert "stopping" in line["fault"]


def test_an_error_after_the_check_is_logged_and_changes_nothing(
    gateway: Gateway, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("a text that may hold a secret")

    before = gateway.provider
    given = ConfigSources({"llm_url": provider.base_url, "llm_model": "other"}, {})
    monkeypatch.setattr("gateway.app.LlmClient.reload", broken)
    with capture_logs() as logs:
        daemon.reload(gateway, given.config, lambda: given)
    [line] = logs
    assert (line["event"], line["log_level"]) == ("Not reloaded", "error")
    assert line["fault"] == "a provider cannot be used (OSError)"
    assert gateway.provider is before


# The client of the providers ---------------------------------------------------------------------


class Old:
    """A client that is to be reloaded, with a provider of the old key."""

    def __init__(self, provider: ProviderProcess, **fields: Any) -> None:
        self.provider = provider
        self.old = Provider(provider.base_url, "m", OLD, **fields)
        self.new = Provider(provider.base_url, "m", NEW)
        self.client = LlmClient(self.old, loop=lanes())

    def run(self, script: str) -> Run:
        return Run(self.client, script).start()

    def keys(self, script: str) -> list[str]:
        """Of all POSTs of a script."""
        self.provider.counts()
        posts = self.provider.posts(script)
        return [post.headers["authorization"].removeprefix("Bearer ") for post in posts]

    def conn(self, script: str) -> int:
        """The connection of a script's last POST."""
        return self.provider.posts(script)[-1].conn


def test_idle_connections_are_closed_and_new_ones_are_kept_again(
    provider: ProviderProcess,
) -> None:
    old = Old(provider)
    names = [provider.fresh(scripts.answer(["Hello"])) for _ in range(4)]
    for name in names[:2]:
        old.run(name).wait_completed()
    assert old.conn(names[0]) == old.conn(names[1])
    old.client.reload(old.new, None)
    provider.wait_closed(old.conn(names[0]))
    for name in names[2:]:
        old.run(name).wait_completed()
        assert old.keys(name) == [NEW]
    assert old.conn(names[2]) == old.conn(names[3])
    old.client.close()
    provider.wait_closed(old.conn(names[2]))


def test_idle_connections_are_closed_though_one_of_the_old_ones_runs_on(
    provider: ProviderProcess,
) -> None:
    old = Old(provider)
    key = provider.unique("end")
    script = provider.fresh(scripts.finish_on_release(["Once"], key))
    running = old.run(script)
    conn = provider.wait_post(script=script).conn
    done = provider.fresh(scripts.answer(["Hello"]))
    old.run(done).wait_completed()
    old.client.reload(old.new, None)
    provider.wait_closed(old.conn(done))
    assert conn in provider.open_connections(script)
    provider.release(key)
    running.wait_completed()
    old.client.close()


def test_the_connection_of_one_that_runs_is_closed_when_it_has_ended(
    provider: ProviderProcess,
) -> None:
    old = Old(provider)
    key = provider.unique("end")
    script = provider.fresh(scripts.finish_on_release(["Once"], key))
    running = old.run(script)
    conn = provider.wait_post(script=script).conn
    old.client.reload(old.new, None)
    provider.counts()
    assert conn in provider.open_connections(script)
    provider.release(key)
    running.wait_completed()
    assert running.sink.text == "Once"
    provider.wait_closed(conn)
    old.client.close()


def test_one_that_runs_is_asked_again_with_what_it_began_with(provider: ProviderProcess) -> None:
    old = Old(provider)
    key, script = provider.unique("turn"), provider.unique("script")
    busy = scripts.http_error(503, "overloaded", {"Retry-After": "0"})
    provider.script(script, [scripts.wait(key), *busy])
    running = old.run(script)
    provider.wait_post(script=script)
    old.client.reload(old.new, None)
    provider.script(script, scripts.answer(["Hello"]))
    provider.release(key)
    running.wait_completed()
    assert old.keys(script) == [OLD, OLD]
    provider.wait_closed(old.conn(script))
    old.client.close()


def test_one_that_runs_falls_back_to_the_fallback_that_it_began_with(
    provider: ProviderProcess,
) -> None:
    old = Old(provider, retries=0)
    fallback = Provider(provider.base_url, "m", "sk-fallback")
    old.client.reload(old.old, fallback)
    key, script = provider.unique("turn"), provider.unique("script")
    provider.script(script, [scripts.wait(key), *scripts.http_error(503, "overloaded")])
    running = old.run(script)
    provider.wait_post(script=script)
    old.client.reload(old.new, None)
    provider.script(script, scripts.answer(["Hello"]))
    provider.release(key)
    running.wait_completed()
    assert old.keys(script) == [OLD, "sk-fallback"]
    provider.wait_closed(old.conn(script))
    old.client.close()


def test_the_breaker_starts_closed(provider: ProviderProcess) -> None:
    down = Provider("http://127.0.0.1:9/v1", "m", retries=0)
    client = LlmClient(down, down, GenerationSettings(breaker_failures=1), loop=lanes())
    Run(client, "anything").start().wait_end()
    assert client.breaker.state.name == "OPEN"
    up = Provider(provider.base_url, "m", NEW)
    client.reload(up, down)
    script = provider.fresh(scripts.answer(["Hello"]))
    Run(client, script).start().wait_completed()
    assert client.breaker.state.name == "CLOSED"
    assert len(provider.posts(script)) == 1
    client.close()


def test_nothing_is_left_of_the_old_ones(provider: ProviderProcess) -> None:
    old = Old(provider)
    script = provider.fresh(scripts.answer(["Hello"]))
    old.run(script).wait_completed()
    before = weakref.ref(old.client.first)
    old.client.reload(old.new, None)
    gc.collect()
    assert before() is None
    old.client.close()


@pytest.mark.parametrize("which", ["first", "fallback"])
def test_a_provider_that_cannot_be_used_changes_nothing(
    provider: ProviderProcess, which: str, tmp_path: Path
) -> None:
    old = Old(provider)
    names = [provider.fresh(scripts.answer(["Hello"])) for _ in range(2)]
    old.run(names[0]).wait_completed()
    broken = Provider("https://127.0.0.1:9/v1", "m", ca_file=str(tmp_path / "nowhere"))
    first, fallback = (broken, None) if which == "first" else (old.new, broken)
    with pytest.raises(OSError, match="No such file"):
        old.client.reload(first, fallback)
    old.run(names[1]).wait_completed()
    assert old.keys(names[1]) == [OLD]
    assert old.conn(names[0]) == old.conn(names[1])  # not even its idle connections
    old.client.close()
