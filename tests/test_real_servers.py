"""Real OpenAI-compatible servers and proxies, driven through the whole gateway as a process.

Optional: each server is skipped unless `BARGEIN_REAL_SERVERS` names the directory that
`python -m tests.real_servers.install` has made. Where it is set, a server that is not there, or
does not start, is a failure.

What a server does when the gateway closes its connection is asserted as it was seen, also where it
is not what one would wish: a change of it fails the test, and then the table in llm/README.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import scripts
from tests.harness.client import Client, Received, wait_until
from tests.harness.daemon import Daemon
from tests.harness.provider_process import ProviderProcess
from tests.real_servers.process import RealServer

pytestmark = pytest.mark.timeout(300)  # the first test of a server waits for its start, too

KEY = "sk-0123456789abcdef-never-shown"
ROOM = Path(__file__).with_name("real_servers")
LIMIT = 30.0
"""Seconds that a server may take over what it does; it only bounds failure."""

NUMBERS = "".join(f"{number}." for number in range(100, 300))
"""What `tiny_model.py` says, but to a question that ends in 0: that it answers without an end."""
NUMBERS_TOKENS = 200 + 1  # and the end
CALL = {"name": "open_map", "parameters": {"hall": 3}}
MAP = {
    "name": "open_map",
    "description": "Opens the map of a hall.",
    "parameters": {"type": "object", "properties": {"hall": {"type": "integer"}}},
}


def home_of(name: str) -> Path:
    """The environment of a server; skips the test where there are none."""
    folder = os.environ.get("BARGEIN_REAL_SERVERS")
    if not folder:
        pytest.skip(
            f"{name}: BARGEIN_REAL_SERVERS is not set (see python -m tests.real_servers.install)"
        )
    home = Path(folder).resolve() / name
    assert (home / "bin" / "python").exists(), f"{name}: {home} is not there"
    return home


@dataclass(frozen=True)
class Talk:
    """A gateway in front of a server, and its client."""

    daemon: Daemon
    client: Client

    def ask(self, question: str) -> Received:
        """A request, up to its terminal frame."""
        return self.client.wait_terminal(self.client.request(question))

    def ask_whole(self, question: str, text: str) -> Received:
        """A request whose answer is this one, in several frames."""
        terminal = self.ask(question)
        assert terminal.payload.get("outcome") == "COMPLETED", terminal
        assert terminal.payload["finish_reason"] == "stop"
        request_id = terminal.payload["request_id"]
        assert self.client.text_of(request_id) == text
        assert len(self.client.frames_of(request_id)) > 2
        return terminal

    def ask_call(
        self, question: str, result: str, text: str, finish_reason: str = "tool_calls"
    ) -> None:
        """A request whose answer is the call `CALL`, and with its result this text."""
        terminal = self.ask(question)
        assert terminal.payload.get("outcome") == "COMPLETED", terminal
        assert terminal.payload["finish_reason"] == finish_reason
        frames = self.client.frames_of(terminal.payload["request_id"])
        (call,) = [one.payload["function_call"] for one in frames if "function_call" in one.payload]
        call_id = call.pop("call_id")
        assert call == CALL
        request_id = f"{terminal.payload['request_id']}_goes_on"
        given = {"call_id": call_id, "result": result, "request_id": request_id}
        self.client.send("FUNCTION_RESULT", given)
        terminal = self.client.wait_terminal(request_id)
        assert terminal.payload.get("outcome") == "COMPLETED", terminal
        assert self.client.text_of(request_id) == text

    def begin(self, question: str, frames: int = 3) -> str:
        """A request, until some text has come."""
        request_id = self.client.request(question)
        for _ in range(frames):
            self.client.wait_text(request_id)
        return request_id

    def interrupt(self, request_id: str) -> Received:
        """Interrupt it; returns the acknowledgement, after which came nothing but the end."""
        self.client.interrupt(request_id)
        ack = self.client.wait_ack()
        assert ack.payload["status"] == "SUCCESS"
        (result,) = ack.payload["results"]
        assert result["outcome"] == "STOPPED"
        assert 0 <= result["stream_closed_ms"] < 1000
        terminal = self.client.wait_terminal(request_id)
        assert terminal.payload["outcome"] == "INTERRUPTED"
        return ack

    def check(self) -> None:
        """What holds of every conversation."""
        frames = self.client.frames
        for place, ack in enumerate(frames):
            if ack.msg_type == "INTERRUPT_ACK":
                for result in ack.payload["results"]:
                    mine = self.client.frames_of(result["request_id"])
                    late = [frame for frame in mine if frames.index(frame) > place]
                    assert [frame.is_terminal for frame in late] == [True]
                    said = self.client.text_of(result["request_id"])
                    assert result["delivered_text_chars"] == len(said)
        assert KEY not in repr(frames)
        assert KEY not in self.daemon.log
        assert KEY not in self.daemon.output
        assert "Traceback" not in self.daemon.log


@contextmanager
def gateway(server: RealServer, model: str, key: str = KEY) -> Iterator[Talk]:
    """A gateway in front of `server`, with one client."""
    arguments = ("--llm-url", server.base_url, "--llm-model", model, "--log-level", "debug")
    with (
        Daemon(*arguments, env={"OPENAI_API_KEY": key}) as daemon,
        Client(daemon.port, register=False, timeout=LIMIT) as client,
    ):
        client.register(function_calling=[MAP])
        talk = Talk(daemon, client)
        yield talk
        talk.check()


def generates_until_it_is_interrupted(server: RealServer, talk: Talk) -> None:
    """An answer without an end takes the processor; interrupted, it gives it back."""
    request_id = talk.begin("Count from 0")
    assert not server.is_idle()
    talk.interrupt(request_id)
    wait_until(server.is_idle, "the server has stopped generating", LIMIT)


# LiteLLM's proxy ---------------------------------------------------------------------------------

MOCKED = "What was configured. " * 50
"""Long, since LiteLLM gives it as fast as it can, and pieces that come together share a frame."""

LITELLM_CONFIG = """
model_list:
  - model_name: mocked
    litellm_params:
      model: openai/any
      api_key: none
      mock_response: "{mocked}"
  - model_name: through
    litellm_params:
      model: openai/any
      api_base: {upstream}
      api_key: another-key
      max_retries: 0
general_settings:
  master_key: {key}
router_settings:
  num_retries: 0
"""


HELLO = scripts.answer(["Hello", " 你好", " there"], rate=20)


@pytest.fixture(scope="module")
def litellm(
    provider: ProviderProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    home = home_of("litellm")
    folder = tmp_path_factory.mktemp("litellm")
    config = folder / "config.yaml"
    config.write_text(LITELLM_CONFIG.format(mocked=MOCKED, upstream=provider.base_url, key=KEY))
    command: list[str | Path] = [home / "bin/litellm", "--config", config, "--telemetry", "False"]
    with RealServer(
        [*command, "--host", "127.0.0.1", "--port", "{port}"], folder, health="/health/liveliness"
    ) as server:
        yield server


def test_litellm_streams_a_mocked_answer(litellm: RealServer) -> None:
    with gateway(litellm, "mocked") as talk:
        talk.ask_whole("Hello", MOCKED)


def test_litellm_streams_what_its_upstream_streams(
    litellm: RealServer, provider: ProviderProcess
) -> None:
    script = provider.fresh(HELLO)
    with gateway(litellm, "through") as talk:
        terminal = talk.ask_whole(script, "Hello 你好 there")
        assert terminal.payload["usage"].items() >= scripts.USAGE.items()
    assert provider.wait_post(script=script).body["stream"] is True


def test_litellm_hands_on_function_calls(litellm: RealServer, provider: ProviderProcess) -> None:
    events = scripts.call_events("open_map", '{"hall": 3}', call_id="call_1")
    script = provider.fresh(scripts.call_answer(events))
    with gateway(litellm, "through") as talk:
        talk.ask_call(script, provider.fresh(HELLO), "Hello 你好 there")
    (tool,) = provider.wait_post(script=script).body["tools"]
    assert tool["function"] == MAP


def story_after(*steps: scripts.Step) -> scripts.Script:
    """These steps, and then an answer without an end."""
    word = scripts.send(scripts.chunk(scripts.text_event("word ")))
    return [*steps, *scripts.opening(), scripts.repeat([scripts.sleep(1 / 30), word])]


@pytest.mark.parametrize(
    ("script", "frames"),
    [
        (story_after(), 3),
        (scripts.idle_mid_stream(["once", " upon"]), 1),
        (scripts.headers_only(), 0),
        (scripts.flood(), 3),
    ],
    ids=["streaming", "silent in the middle", "silent after its headers", "flooding"],
)
def test_litellm_closes_its_upstream_at_once_when_it_is_interrupted(
    litellm: RealServer, provider: ProviderProcess, script: scripts.Script, frames: int
) -> None:
    name = provider.fresh(script)
    with gateway(litellm, "through") as talk:
        request_id = talk.begin(name, frames)
        post = provider.wait_post(script=name)
        ack = talk.interrupt(request_id)
        closed = provider.wait_closed(post.conn)
        assert closed.mid_script
        assert closed.by in ("client_eof", "client_reset")
        assert closed.time - ack.at < 2
        talk.ask_whole(provider.fresh(HELLO), "Hello 你好 there")


def test_litellm_closes_an_upstream_that_did_not_answer_yet_only_when_it_does(
    litellm: RealServer, provider: ProviderProcess
) -> None:
    """So what waits behind the proxy for its first token goes on, and costs."""
    key = provider.unique("go")
    name = provider.fresh(story_after(scripts.wait(key)))
    with gateway(litellm, "through") as talk:
        request_id = talk.begin(name, frames=0)
        post = provider.wait_post(script=name)
        talk.interrupt(request_id)
        talk.ask_whole(provider.fresh(HELLO), "Hello 你好 there")
        assert provider.open_connections(name) == [post.conn]
        provider.release(key)
        closed = provider.wait_closed(post.conn)
        assert closed.mid_script
        assert closed.by in ("client_eof", "client_reset")


def test_litellm_says_in_the_stream_that_its_upstream_failed(
    litellm: RealServer, provider: ProviderProcess
) -> None:
    script = provider.fresh(scripts.error_in_stream("out of money", ["Hello", " there"]))
    with gateway(litellm, "through") as talk:
        terminal = talk.ask(script)
        assert terminal.payload["outcome"] == "FAILED"
        assert "out of money" in terminal.payload["error_detail"]
        assert talk.client.text_of(terminal.payload["request_id"]) == "Hello there"


def test_litellm_refuses_another_key_and_nobody_sees_it(litellm: RealServer) -> None:
    other = "sk-another-key-that-is-wrong"
    with gateway(litellm, "mocked", key=other) as talk:
        terminal = talk.ask("Hello")
        assert terminal.payload["outcome"] == "FAILED"
        assert "the provider answered 400" in terminal.payload["error_detail"]
        assert other not in repr(talk.client.frames)
        assert other not in talk.daemon.log


# llama-cpp-python --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    home = home_of("llama-cpp")
    command: list[str | Path] = [
        home / "bin/python",
        "-m",
        "llama_cpp.server",
        "--model",
        home / "model.gguf",
    ]
    command += ["--model_alias", "tiny", "--n_ctx", "32768", "--n_threads", "1", "--api_key", KEY]
    with RealServer(
        [*command, "--host", "127.0.0.1", "--port", "{port}"],
        tmp_path_factory.mktemp("llama-cpp"),
        health="/v1/models",
        key=KEY,
    ) as server:
        yield server


def test_llama_cpp_streams(llama_cpp: RealServer) -> None:
    with gateway(llama_cpp, "tiny") as talk:
        talk.ask_whole("Say the numbers.", NUMBERS)


def test_llama_cpp_stops_generating_when_it_is_interrupted(llama_cpp: RealServer) -> None:
    gone = llama_cpp.log.count("Disconnected from client")
    with gateway(llama_cpp, "tiny") as talk:
        generates_until_it_is_interrupted(llama_cpp, talk)
        assert llama_cpp.log.count("Disconnected from client") == gone + 1
        talk.ask_whole("Say the numbers.", NUMBERS)


def test_llama_cpp_cuts_an_answer_short_when_another_client_asks(llama_cpp: RealServer) -> None:
    """It generates one answer at a time, the latest (`interrupt_requests`, which is on); of the one
    before it sends `[DONE]`, without a finish reason."""
    with gateway(llama_cpp, "tiny") as talk, gateway(llama_cpp, "tiny") as other:
        request_id = talk.begin("Count from 0")
        other.ask_whole("Say the numbers.", NUMBERS)
        terminal = talk.client.wait_terminal(request_id)
        assert terminal.payload["finish_reason"] is None


def test_llama_cpp_does_not_look_at_functions_unless_it_is_told_to(llama_cpp: RealServer) -> None:
    """It wants a `tool_choice`, or takes what the model writes for text."""
    with gateway(llama_cpp, "tiny") as talk:
        terminal = talk.ask("Where is it?")
        assert terminal.payload["outcome"] == "COMPLETED"
        text = talk.client.text_of(terminal.payload["request_id"])
        assert re.fullmatch(r'<tool_call>\s*\{"name": "open_map", .*\}\s*</tool_call>', text)


# transformers serve ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    home = home_of("transformers")
    command: list[str | Path] = [
        home / "bin/transformers",
        "serve",
        home / "model",
        "--device",
        "cpu",
    ]
    with RealServer(
        [*command, "--host", "127.0.0.1", "--port", "{port}"],
        tmp_path_factory.mktemp("transformers"),
        health="/health",
    ) as server:
        yield server


def model_of(name: str) -> str:
    """The name under which a server of a local folder knows its model."""
    return str(home_of(name) / "model")


def test_transformers_streams(transformers: RealServer) -> None:
    with gateway(transformers, model_of("transformers")) as talk:
        terminal = talk.ask_whole("Say the numbers.", NUMBERS)
        assert terminal.payload["usage"]["completion_tokens"] == NUMBERS_TOKENS


def test_transformers_stops_generating_when_it_is_interrupted(transformers: RealServer) -> None:
    with gateway(transformers, model_of("transformers")) as talk:
        generates_until_it_is_interrupted(transformers, talk)
        talk.ask_whole("Say the numbers.", NUMBERS)


def test_transformers_hands_on_function_calls(transformers: RealServer) -> None:
    with gateway(transformers, model_of("transformers")) as talk:
        talk.ask_call("Where is it?", "It is open.", NUMBERS)


# vLLM --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    home = home_of("vllm")
    command: list[str | Path] = [home / "bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", home / "model", "--served-model-name", "tiny", "--enforce-eager"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--api-key", KEY]
    with RealServer(
        [*command, "--host", "127.0.0.1", "--port", "{port}"],
        tmp_path_factory.mktemp("vllm"),
        health="/health",
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},  # GiB
        timeout=240,
    ) as server:
        yield server


def vllm_metric(server: RealServer, name: str) -> float:
    """One of its own Prometheus samples."""
    _, page = server.get("/metrics")
    found = re.search(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])


def test_vllm_streams(vllm: RealServer) -> None:
    with gateway(vllm, "tiny") as talk:
        talk.ask_whole("Say the numbers.", NUMBERS)


def test_vllm_stops_generating_when_it_is_interrupted(vllm: RealServer) -> None:
    def running() -> float:
        return vllm_metric(vllm, "vllm:num_requests_running")

    def generated() -> float:
        return vllm_metric(vllm, "vllm:generation_tokens_total")

    with gateway(vllm, "tiny") as talk:
        request_id = talk.begin("Count from 0")
        wait_until(lambda: running() == 1, "vLLM counts it")
        talk.interrupt(request_id)
        wait_until(lambda: running() == 0, "vLLM does not count it any more")
        before = generated()
        talk.ask_whole("Say the numbers.", NUMBERS)
        wait_until(lambda: generated() > before, "vLLM has counted the tokens")
        assert generated() == before + NUMBERS_TOKENS


def test_vllm_hands_on_function_calls(vllm: RealServer) -> None:
    with gateway(vllm, "tiny") as talk:
        talk.ask_call("Where is it?", "It is open.", NUMBERS)


# LitServe ----------------------------------------------------------------------------------------

WORDS = 60
"""Of the story that the application tells, 20 a second."""


@pytest.fixture(scope="module")
def litserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    home = home_of("litserve")
    folder = tmp_path_factory.mktemp("litserve")
    command: list[str | Path] = [
        home / "bin/python",
        ROOM / "litserve_app.py",
        "{port}",
        folder / "record",
    ]
    with RealServer([*command, str(WORDS)], folder, health="/health") as server:
        yield server


def recorded(server: RealServer) -> list[str]:
    """What the application's generator noted of the last answer."""
    return (server.folder / "record").read_text().rpartition("begin ")[2].splitlines()


def test_litserve_streams(litserve: RealServer) -> None:
    with gateway(litserve, "any") as talk:
        terminal = talk.ask_whole("hello", "Hello there!")
        assert terminal.payload["usage"]["completion_tokens"] == 3


def test_litserve_generates_on_when_it_is_interrupted(litserve: RealServer) -> None:
    """Nobody tells the generator; the next answer comes after it."""
    with gateway(litserve, "any") as talk:
        talk.interrupt(talk.begin("story"))
        said = len(recorded(litserve)) - 1
        assert said < WORDS // 2
        wait_until(lambda: len(recorded(litserve)) - 1 > said + 10, "it generates on", LIMIT)
        talk.ask_whole("hello", "Hello there!")
        record = (litserve.folder / "record").read_text().splitlines()
        assert record[-4:] == [f"word {WORDS - 1}", "end", "begin hello", "end"]


def test_litserve_hands_on_function_calls(litserve: RealServer) -> None:
    with gateway(litserve, "any") as talk:
        talk.ask_call("where?", "hello", "Hello there!", finish_reason="stop")


def test_litserve_says_in_the_stream_that_the_model_broke(litserve: RealServer) -> None:
    with gateway(litserve, "any") as talk:
        terminal = talk.ask("break")
        assert terminal.payload["outcome"] == "FAILED"
        assert "Internal Server Error" in terminal.payload["error_detail"]
        assert talk.client.text_of(terminal.payload["request_id"]) == "Hello"
