"""The command line, as processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import LIMIT
from tests.harness import scripts
from tests.harness.client import Client, wait_until
from tests.harness.daemon import Daemon, run_to_the_end
from tests.harness.process import ROOT, environment
from tests.harness.provider_process import ProviderProcess
from tests.test_prometheus import free_port

KEY = "sk-0123456789abcdef-never-shown"

# A line of the text form, as OPERATIONS.md has it.
TEXT_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \[(WS|ACTOR|LLM|SYS)\] "
    r"\[(DEBUG|INFO|WARNING|ERROR)\] [^|]+( \| (?P<fields>\{.*\}))?"
)

# What is there on Linux only; a platform without it is played by taking it away.
WITHOUT_LINUX = """
import signal, socket
for module, names in (
    (signal, ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGALRM", "SIGCHLD"]),
    (socket, ["TCP_NOTSENT_LOWAT", "SO_REUSEPORT", "TCP_USER_TIMEOUT", "TCP_QUICKACK"]),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
            if name in getattr(module, "__all__", ()):
                module.__all__.remove(name)  # which gevent goes through
import sys
import run
for module, names in ((signal, ["SIGHUP", "SIGUSR1"]), (socket, ["TCP_NOTSENT_LOWAT"])):
    assert not any(hasattr(module, name) for name in names)
sys.exit(run.main(sys.argv[1:]))
"""


def health(port: int) -> dict[str, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/health")
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def provider_arguments(provider: ProviderProcess) -> list[str]:
    return ["--llm-url", provider.base_url, "--llm-model", "test"]


# Starting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["serve"]])
def test_without_a_provider_it_starts_the_embedded_one_and_says_so(arguments: list[str]) -> None:
    with Daemon(*arguments) as daemon:
        assert daemon.host == "127.0.0.1"
        assert f"listening on ws://127.0.0.1:{daemon.port}/ws/agent/stream" in daemon.output
        assert "embedded demo provider" in daemon.output
        with Client(daemon.port) as client:
            request_id = client.request("Tell me a story")
            assert client.wait_text(request_id).text
            assert health(daemon.port)["requests"] == 1
            client.interrupt(request_id)
            assert client.wait_ack().payload["status"] == "SUCCESS"
            assert client.wait_terminal(request_id).payload["interrupted"] is True


def test_with_a_provider_it_says_which_and_uses_it(provider: ProviderProcess) -> None:
    script = provider.fresh(scripts.answer(["Hello", " 你好"]))
    with Daemon(*provider_arguments(provider)) as daemon, Client(daemon.port) as client:
        assert provider.base_url in daemon.output
        assert "model test" in daemon.output
        assert "demo" not in daemon.output
        request_id = client.request(script)
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        assert client.text_of(request_id) == "Hello 你好"
    post = provider.wait_post(script=script)
    assert post.body["model"] == "test"
    assert "authorization" not in post.headers


def test_the_provider_may_come_from_the_environment(provider: ProviderProcess) -> None:
    script = provider.fresh(scripts.answer(["Hello"]))
    env = {"OPENAI_BASE_URL": provider.base_url}
    with Daemon("--llm-model", "test", env=env) as daemon, Client(daemon.port) as client:
        assert provider.base_url in daemon.output
        request_id = client.request(script)
        client.wait_terminal(request_id)
        assert client.text_of(request_id) == "Hello"


def test_the_command_line_ranks_above_the_environment(provider: ProviderProcess) -> None:
    env = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    with Daemon(*provider_arguments(provider), env=env) as daemon:
        assert provider.base_url in daemon.output
        assert "127.0.0.1:9/" not in daemon.output


@pytest.mark.parametrize("around", ["{}", "{}\n", " {} "])
def test_the_key_reaches_the_provider_and_nobody_else(
    provider: ProviderProcess, around: str
) -> None:
    good = provider.fresh(scripts.answer(["Hello"]))
    # Providers quote the key when they refuse it.
    refusal = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    refused = provider.fresh(scripts.http_error(401, refusal))
    silly = provider.fresh(scripts.error_in_stream(f"key {KEY} is out of money"))
    arguments = [*provider_arguments(provider), "--log-level", "debug", "--log-format", "text"]
    with Daemon(*arguments, env={"OPENAI_API_KEY": around.format(KEY)}) as daemon:
        with Client(daemon.port) as client:
            for script in (good, refused, silly):
                client.wait_terminal(client.request(script))
            frames = repr(client.frames)
            client.close()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert KEY not in frames
        assert KEY not in daemon.output
        assert KEY not in daemon.log
        assert "401" in frames
        assert "out of money" in frames
    for script in (good, refused, silly):
        (post,) = provider.posts(script)
        assert post.headers["authorization"] == f"Bearer {KEY}"


def test_the_version_is_one_line() -> None:
    done = run_to_the_end("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"bargein \S.*\n", done.stdout)
    assert done.stderr == ""


def test_help_names_the_command_and_what_it_takes() -> None:
    assert "serve" in run_to_the_end("--help").stdout
    done = run_to_the_end("serve", "--help")
    assert done.returncode == 0
    for name in ("--host", "--port", "--llm-url", "--llm-model", "--log-level"):
        assert name in done.stdout


# Settings that cannot be used --------------------------------------------------------------------


def refusal(*arguments: str, env: dict[str, str] | None = None) -> list[str]:
    """The lines that a command line is refused with; the exit code is 2, nothing is started."""
    done = run_to_the_end(*arguments, env=env)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_it_does_not_listen_beyond_loopback_without_authentication(host: str) -> None:
    (line,) = refusal("--host", host)
    assert f"--host {host}" in line
    assert "--insecure-no-auth" in line


def test_it_listens_beyond_loopback_when_it_is_meant() -> None:
    with Daemon("--host", "0.0.0.0", "--insecure-no-auth") as daemon:
        assert daemon.host == "0.0.0.0"
        assert health(daemon.port)["status"] == "ok"


def test_it_listens_on_the_other_loopback_too() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with Daemon("--host", "::1") as daemon:
        assert daemon.host == "[::1]"


def test_a_provider_without_a_model_is_refused() -> None:
    (line,) = refusal("--llm-url", "http://127.0.0.1:9/v1")
    assert "--llm-model" in line
    assert "http://127.0.0.1:9/v1" in line


@pytest.mark.parametrize("url", ["http://", "https:///v1", "http://[::1", "http://host:99999/v1"])
def test_a_provider_that_is_not_the_url_of_a_server_is_refused(url: str) -> None:
    (line,) = refusal("--llm-url", url, "--llm-model", "m")
    assert line.startswith(f"error: --llm-url {url!r} is not the URL of a server")


def test_a_file_that_holds_no_certificates_is_refused() -> None:
    (line,) = refusal("--llm-url", "https://host/v1", "--llm-model", "m", "--llm-ca-file", __file__)
    assert line.startswith(f"error: --llm-ca-file {__file__!r} holds no certificates")


def test_a_provider_from_the_environment_without_a_model_is_refused() -> None:
    (line,) = refusal(env={"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"})
    assert "--llm-model" in line


def test_a_model_without_a_provider_is_refused() -> None:
    (line,) = refusal("--llm-model", "gpt-4o")
    assert "--llm-url" in line


def test_every_fault_has_a_line_of_its_own() -> None:
    lines = refusal("--llm-url", "ftp://x", "--host", "0.0.0.0", "--llm-ca-file", "/nowhere")
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "eighty"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--llm-idle-timeout", "nan"],
        ["--llm-idle-timeout", "-1"],
        ["--stale-after", "inf"],
        ["--outbox-bytes", "-1"],
        ["--log-level", "loud"],
        ["--on-new-request", "perhaps"],
        ["--no-such-flag"],
        ["no-such-command"],
    ],
)
def test_a_bad_value_is_refused_by_name(arguments: list[str]) -> None:
    last = refusal(*arguments)[-1]
    assert "error: " in last
    assert arguments[-1].lstrip("-") in last


@pytest.mark.parametrize("key", ["sk-one\nX-Injected: 1", "sk-中文", "sk-\x7f", "sk one"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    (line,) = refusal(
        "--llm-url", "http://127.0.0.1:9/v1", "--llm-model", "m", env={"OPENAI_API_KEY": key}
    )
    assert "OPENAI_API_KEY" in line
    assert "sk-" not in line.replace("OPENAI_API_KEY", "")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command line without any privileges."""
    launcher = """
import os, sys
import run  # before it may not be read any more
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
sys.exit(run.main(sys.argv[1:]))
"""
    return run_to_the_end(*arguments, launcher=launcher)


@pytest.mark.parametrize("which", ["gateway", "ops", "demo-llm"])
@pytest.mark.parametrize("fault", ["taken", "address", "name", "privileged"])
def test_where_it_cannot_listen_it_says_so_in_one_line(fault: str, which: str, taken: int) -> None:
    host, port, words = {
        "taken": ("127.0.0.1", taken, "Address already in use"),
        "address": ("192.0.2.7", 9, "Cannot assign requested address"),  # RFC 5737: nobody's
        "name": ("nohost.invalid", 9, r"[A-Z][a-z ]+"),  # RFC 6761: so, too; resolvers differ
        "privileged": ("127.0.0.1", 81, "Permission denied"),
    }[fault]
    match which:
        case "gateway":
            arguments = ["--insecure-no-auth", "--host", host, "--port", str(port)]
        case "ops":
            arguments = ["--port", "0", "--ops-host", host, "--ops-port", str(port)]
        case _:
            arguments = [which, "--host", host, "--port", str(port)]
    if fault == "privileged":
        first_free = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        if not first_free.exists() or int(first_free.read_text()) <= port:
            pytest.skip("no port is privileged here")
        done = as_nobody(*arguments)
    else:
        done = run_to_the_end(*arguments)
    assert done.returncode == 1
    for_metrics = " for metrics (--ops-port)" if which == "ops" else ""
    (line,) = done.stderr.splitlines()
    where = re.escape(f"{host}:{port}{for_metrics}")
    assert re.fullmatch(f"error: cannot listen on {where}: {words}", line)
    assert done.stdout == ""


# Stopping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_it_in_order(provider: ProviderProcess, number: signal.Signals) -> None:
    script = provider.fresh(scripts.idle_mid_stream(["once", " upon"]))
    arguments = (*provider_arguments(provider), "--drain-timeout", "0")
    with Daemon(*arguments) as daemon, Client(daemon.port) as client:
        request_id = client.request(script)
        client.wait_text(request_id)
        with Client(daemon.port) as idle:
            daemon.signal(number)
            terminal = client.wait_terminal(request_id)
            assert terminal.payload["interrupted"] is True
            assert terminal.payload["interrupt_reason"] == "SERVER_SHUTDOWN"
            goodbye = client.next()
            assert goodbye.msg_type == "SHUTDOWN"
            assert goodbye.payload["reason"] == "SERVER_SHUTDOWN"
            assert client.wait_closed() == 1012
            assert client.frames[-1] is goodbye
            assert idle.next().msg_type == "SHUTDOWN"
            assert idle.wait_closed() == 1012
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log
    provider.wait_closed(provider.wait_post(script=script).conn)


def test_a_signal_ends_it_with_nobody_there() -> None:
    with Daemon() as daemon:
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_signal_ends_it_in_order_when_nobody_reads_what_it_says(
    provider: ProviderProcess,
) -> None:
    with Daemon(*provider_arguments(provider)) as daemon, Client(daemon.port) as client:
        daemon.stop_listening_to_it()
        daemon.signal(signal.SIGTERM)
        assert client.wait_closed() == 1012
        assert daemon.wait() == 0


def test_a_second_signal_ends_it_at_once(provider: ProviderProcess) -> None:
    with Daemon(*provider_arguments(provider)) as daemon, Client(daemon.port) as client:
        # A client that does not answer the close frame: the orderly end waits for it for seconds.
        daemon.signal(signal.SIGTERM)
        client.wait_for(lambda frame: frame.msg_type == "SHUTDOWN")
        daemon.signal(signal.SIGINT)
        began = time.monotonic()
        assert daemon.wait() == 128 + signal.SIGINT
        assert time.monotonic() - began < 2.0


def test_while_it_stops_it_takes_no_new_connections(provider: ProviderProcess) -> None:
    arguments = (*provider_arguments(provider), "--drain-timeout", "0")
    with Daemon(*arguments) as daemon, Client(daemon.port) as client:
        daemon.signal(signal.SIGTERM)
        client.wait_for(lambda frame: frame.msg_type == "SHUTDOWN")
        with pytest.raises(OSError, match="refused"):
            Client(daemon.port)
        client.wait_closed()
        assert daemon.wait() == 0


# The log -----------------------------------------------------------------------------------------


def test_the_log_says_when_it_started_and_stopped_and_what_was_in_between(
    provider: ProviderProcess,
) -> None:
    script = provider.fresh(scripts.answer(["Hello"]))
    ops_port = free_port()
    arguments = [*provider_arguments(provider), "--ops-port", str(ops_port)]
    fallback = ["--llm-fallback-url", f"{provider.base_url}?key={KEY}", "--llm-fallback-model", "b"]
    env = {"OPENAI_API_KEY": KEY}
    with Daemon(*arguments, *fallback, env=env) as daemon:
        for _ in range(2):
            with Client(daemon.port) as client:
                for _ in range(3):
                    client.wait_terminal(client.request(script))
                client.close()
        wait_until(lambda: daemon.log.count("Session ended") == 2, "both are gone")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert KEY not in daemon.log
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    started, stopping, stopped = lines[0], lines[-3], lines[-1]
    for line in (started, stopping, stopped):
        assert (line.pop("component"), line.pop("level")) == ("SYS", "info")
        line.pop("timestamp")
    where = provider.base_url.split("/")[2]
    assert re.fullmatch(r"\S.*", started.pop("version"))
    assert started == {
        "event": "Started",
        "host": "127.0.0.1",
        "port": daemon.port,
        "provider": where,
        "model": "test",
        "is_demo": False,
        "fallback": where,
        "metrics": f"http://127.0.0.1:{ops_port}/metrics",
    }
    assert stopping == {"event": "Stopping", "signal": "SIGTERM"}
    assert 0 < stopped.pop("uptime_seconds") < 60
    assert stopped == {"event": "Stopped", "exit_code": 0, "sessions": 2, "requests": 6}


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
@pytest.mark.parametrize("is_log_elsewhere", [False, True])
def test_on_a_terminal_what_was_printed_is_not_said_again_by_the_log(
    tmp_path: Path, is_log_elsewhere: bool
) -> None:
    ours, terminal = os.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        log = stack.enter_context((tmp_path / "log").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "run.py", "--port", "0"],
            cwd=ROOT,
            env=environment(),
            stdout=terminal,
            stderr=log if is_log_elsewhere else terminal,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        os.close(terminal)
        shown = ""
        while "provider " not in shown:
            assert select.select([ours], [], [], LIMIT)[0], shown
            shown += os.read(ours, 4096).decode()
        process.terminate()
        while ("stopping" if is_log_elsewhere else "Stopped") not in shown:
            assert select.select([ours], [], [], LIMIT)[0], shown
            shown += os.read(ours, 4096).decode()
        assert process.wait(LIMIT) == 0
    lines = (tmp_path / "log").read_text() if is_log_elsewhere else shown
    assert "listening on ws://" in shown
    assert "stopping (SIGTERM" in shown
    assert ("Started" in lines) is ("Stopping" in lines) is is_log_elsewhere
    assert "Stopped" in lines  # nothing else says what there was in between


def test_the_log_says_why_a_session_ended_and_why_a_stream_was_cancelled(
    provider: ProviderProcess,
) -> None:
    script = provider.fresh(scripts.idle_mid_stream(["once"]))
    arguments = [*provider_arguments(provider), "--log-format", "json"]
    with Daemon(*arguments) as daemon, Client(daemon.port) as client:
        request_id = client.request(script)
        client.wait_text(request_id)
        client.send_text(b"no frame")
        client.wait_for(lambda frame: frame.msg_type == "ERROR")
        client.reset()
        wait_until(lambda: "Session ended" in daemon.log, "the log has its end")
        lines = {line["event"]: line for line in map(json.loads, daemon.log.splitlines())}
    assert lines["Refused message"]["session_id"] == client.session_id
    assert lines["Session ended"]["reason"].startswith("connection lost")
    assert lines["LLM stream cancelled by user"]["reason"] == "CONNECTION_LOST"


def test_every_line_of_the_log_has_the_text_form(provider: ProviderProcess) -> None:
    script = provider.fresh(scripts.idle_mid_stream(["once"]))
    arguments = [*provider_arguments(provider), "--log-level", "debug", "--log-format", "text"]
    with Daemon(*arguments) as daemon:
        with Client(daemon.port) as client:
            request_id = client.request(script)
            client.wait_text(request_id)
            client.interrupt(request_id)
            client.wait_terminal(request_id)
            client.send_text(b"no JSON")
            client.wait_for(lambda frame: frame.msg_type == "ERROR")
            session_id = client.session_id
            client.close()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        lines = daemon.log.splitlines()
    events: dict[str, dict[str, Any]] = {}
    for line in lines:
        match = TEXT_LINE.fullmatch(line)
        assert match, line
        event = line.split("] ", 2)[2].split(" | ")[0]
        events[event] = json.loads(match["fields"] or "{}")
    assert events["Interrupt request details"]["interrupt_request_id"] == request_id
    assert events["Interrupt request details"]["active_requests"] == [request_id]
    assert events["Interrupt request details"]["found"] is True
    assert events["Request interrupted"]["session_id"] == session_id
    assert events["LLM stream cancelled by user"]["request_id"] == request_id
    assert events["Received message"]["session_id"] == session_id


def test_what_was_received_is_logged_with_its_request_and_no_more_of_a_client_s_words() -> None:
    with Daemon("--llm-model", "fast") as daemon:
        with Client(daemon.port) as client:
            request_id = client.request("Tell me a story")
            client.wait_terminal(request_id)
            client.interrupt(request_id)
            client.wait_ack()
            envelope = {"version": "1.0", "session_id": "s" * 200_000, "timestamp": 0}
            query = {**envelope, "msg_type": "SESSION_QUERY", "payload": {}}
            client.send_text(json.dumps(query).encode())
            client.wait_for(lambda frame: frame.msg_type == "ERROR")
            client.close()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    received = {line["msg_type"]: line for line in lines if line["event"] == "Received message"}
    assert received["REQUEST"]["request_id"] == request_id
    assert received["INTERRUPT"]["request_id"] == request_id
    assert received["SESSION_QUERY"]["session_id"] == "s" * 64


def test_the_log_is_json_where_nobody_looks_at_it() -> None:
    with Daemon() as daemon:
        with Client(daemon.port) as client:
            client.close()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert lines
    for line in lines:
        assert {"timestamp", "level", "component", "event"} <= line.keys()


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(provider: ProviderProcess) -> None:
    script = provider.fresh(scripts.answer(["Hello"]))
    launcher = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(writer)
os.close(reader)  # from now on standard error is a broken pipe
import run
sys.exit(run.main(sys.argv[1:]))
"""
    with (
        Daemon(*provider_arguments(provider), launcher=launcher) as daemon,
        Client(daemon.port) as client,
    ):
        request_id = client.request(script)
        assert client.wait_terminal(request_id).payload["outcome"] == "COMPLETED"
        client.interrupt(None)
        assert client.wait_ack().payload["status"] == "FAILED"


# Other platforms ---------------------------------------------------------------------------------


def test_without_what_only_linux_has_it_starts_and_does_its_job(provider: ProviderProcess) -> None:
    script = provider.fresh(scripts.idle_mid_stream(["once", " upon"]))
    whole = provider.fresh(scripts.answer(["Hello"]))
    with (
        Daemon(*provider_arguments(provider), launcher=WITHOUT_LINUX) as daemon,
        Client(daemon.port) as client,
    ):
        request_id = client.request(script)
        client.wait_text(request_id)
        client.interrupt(request_id)
        assert client.wait_ack().payload["status"] == "SUCCESS"
        provider.wait_closed(provider.wait_post(script=script).conn)
        client.wait_terminal(request_id)
        request_id = client.request(whole)
        client.wait_terminal(request_id)
        assert client.text_of(request_id) == "Hello"
        daemon.signal(signal.SIGTERM)
        assert client.wait_closed() == 1012
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log


def test_on_the_event_loop_of_windows_it_does_its_job(provider: ProviderProcess) -> None:
    """libuv has no priorities: `actors/loop/lanes.py` does without."""
    arguments = ("--llm-url", provider.base_url, "--llm-model", "test")
    with (
        Daemon(*arguments, env={"GEVENT_LOOP": "libuv-cffi"}) as daemon,
        Client(daemon.port) as client,
    ):
        script = provider.fresh(scripts.idle_mid_stream(["once"]))
        request_id = client.request(script)
        client.wait_text(request_id)
        client.interrupt(request_id)
        assert client.wait_ack().payload["status"] == "SUCCESS"
        assert client.wait_terminal(request_id).payload["interrupted"] is True
        provider.wait_closed(provider.wait_post(script=script).conn)
        answer = client.request(provider.fresh(scripts.answer(["upon"])))
        assert client.wait_terminal(answer).payload["outcome"] == "COMPLETED"
        assert "Traceback" not in daemon.log


def test_importing_the_rooms_patches_nothing() -> None:
    """Only run.py patches: another program may use the rooms as they are."""
    program = (
        "import actors.session.session, actors.supervisor, gateway.app, llm.demo.server;"
        "import gevent.monkey;"
        "assert not gevent.monkey.is_module_patched('socket')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=15)
