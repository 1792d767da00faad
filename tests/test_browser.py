"""The page in a real Chromium, against a real gateway and the demo provider."""

from __future__ import annotations

import functools
import http.client
import http.server
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from structlog.testing import capture_logs

from gateway.access.credentials import Credentials, hash_api_key
from gateway.app import Gateway
from gateway.server.pages import CLIENT
from gateway.server.server import ServerSettings
from llm.demo.stories import answer, stop_answer
from tests.browser import Page, run_browser
from tests.harness import RunningGateway, run_gateway
from tests.tools import find_tool

pytestmark = pytest.mark.timeout(120)

VERSION = json.loads((CLIENT / "package.json").read_bytes())["version"]

LONG = "story:30"
"""A scenario that streams for half a minute, at the pace of a model."""

WINDOW_MS = 2_000
"""How long a stopped answer is watched for text that is still added."""

INTERRUPTED = "it.state === 'interrupted' && it.roundTripMs"
"""The answer is shown as interrupted, and its ack has arrived."""


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """One browser for the whole run."""
    chromium = find_tool("chromium", "chromium")
    chromedriver = find_tool("chromedriver", "chromium-driver")
    with run_browser(chromium, chromedriver, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


class CheckedPage(Page):
    """A tab whose errors fail the test, except those that the test expects."""

    expected_faults = "(?!)"
    """Regular expression of the errors that the test expects. The default matches none."""


@pytest.fixture
def page(browser: webdriver.Chrome) -> Iterator[CheckedPage]:
    """A new tab. At the end of the test its console must hold no unexpected error."""
    page = CheckedPage(browser)
    yield page
    faults = [fault for fault in page.faults() if not re.search(page.expected_faults, fault)]
    assert faults == []


@pytest.fixture(scope="session")
def long_story() -> Iterator[RunningGateway]:
    """A gateway and a demo provider as processes. Their stories outlast every test."""
    with run_gateway(model=LONG) as gateway:
        yield gateway


Playing = Callable[..., int]


@pytest.fixture
def playing(make_gateway: Callable[..., Gateway], long_story: RunningGateway) -> Playing:
    """Starts a gateway in front of a scenario of the demo provider; returns its port."""

    def play(scenario: str, **fields: Any) -> int:
        base_url = fields.pop("base_url", long_story.provider.base_url)
        return make_gateway(base_url=base_url, model=scenario, **fields).server.port

    return play


# Interrupting ---------------------------------------------------------------------------------


def changes_since_the_act(
    page: Page, number: int, key: str, act: Callable[[], None]
) -> list[float]:
    """Act while an answer streams, and watch its text for `WINDOW_MS`.

    Args:
        number: which answer, from 0.
        key: the key that `act` presses, or "" for a click.

    Returns:
        When the text changed after the act, in milliseconds from the act.
    """
    page.js(
        f"probe.changes = probe.watch(probe.elements()[{number}].querySelector('.text'));"
        "probe.acts.length = 0;"
    )
    page.wait("probe.changes.length > 2", "the text grows")
    act()
    late: list[float] = page.js_async(
        f"""
        const act = probe.acts.find((one) => one.key === {json.dumps(key)});
        await probe.until(() => performance.now() > act.at + {WINDOW_MS}, {WINDOW_MS} + 5000);
        return probe.changes.filter((at) => at > act.at).map((at) => at - act.at);
        """
    )
    return late


def test_a_new_message_stops_the_old_answer_at_once_and_is_answered(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    long_story.provider.forget_requests()
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    page.wait_text()

    late = changes_since_the_act(page, 0, "Enter", lambda: page.ask("停止"))

    assert late == []
    new = page.wait_state("complete")
    assert new["text"] == stop_answer("停止")
    old = page.answer(0)
    assert old["state"] == "interrupted"
    assert old["text"] and answer("Please tell me a very long story").startswith(old["text"])
    assert len(page.answers()) == 2
    assert long_story.provider.wait_ended(1).ended == "client_closed"
    assert [one.model for one in long_story.provider.requests()] == [LONG] * 2


def test_the_stop_button_stops_and_the_time_that_it_took_is_shown(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    assert not page.shows("#stop")
    page.ask("Please tell me a very long story")
    page.wait_text()
    assert page.shows("#stop")

    late = changes_since_the_act(page, 0, "", lambda: page.click("#stop"))

    assert late == []
    it = page.wait_answer(INTERRUPTED)
    ms = float(it["streamClosedMs"])
    assert f"stopped in {ms:.1f} ms" in it["status"]
    assert not page.shows("#stop")
    assert [one["payload"]["reason"] for one in page.sent("INTERRUPT")] == ["USER_STOP"]


def test_escape_stops_and_the_next_question_is_answered(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    page.wait_text()
    page.type(Keys.ESCAPE)
    assert "stopped in" in page.wait_answer(INTERRUPTED)["status"]
    page.ask("stop")
    assert page.wait_state("complete")["text"] == stop_answer("stop")


def test_what_is_said_to_have_been_delivered_is_what_the_screen_shows(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("𝔘𝔫𝔢 histoire 👩‍🚀, s'il vous plaît")  # outside of UTF-16's first plane
    page.wait_text(40)
    page.type(Keys.ESCAPE)
    it = page.wait_answer(INTERRUPTED)
    assert "👩‍🚀" in it["text"]
    [interrupt] = page.sent("INTERRUPT")
    assert interrupt["payload"]["delivered_text_chars"] == len(it["text"])


def test_a_key_that_is_held_down_acts_once(page: CheckedPage, long_story: RunningGateway) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    page.wait_text()
    page.js(
        """
        const press = (key, repeat) => document.getElementById("input").dispatchEvent(
            new KeyboardEvent("keydown", { key, repeat, bubbles: true, cancelable: true }),
        );
        document.getElementById("input").value = "stop";
        press("Enter", true);
        press("Escape", true);
        """
    )
    assert page.sent("INTERRUPT") == []
    page.type(Keys.ESCAPE)
    page.wait_answer(INTERRUPTED)
    assert len(page.sent("REQUEST")) == 1


def test_what_had_come_and_was_not_drawn_is_not_said_to_have_been_delivered(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    request_id = page.wait_text()["requestId"]
    # Both in one turn of the event loop: the browser draws nothing between them.
    page.js(
        """
        const [request_id] = arguments;
        const content = { text: "NEVER SEEN" };
        probe.inject("RESPONSE", { request_id, text_stream_seq: 900, content });
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
        """,
        request_id,
    )
    it = page.wait_answer(INTERRUPTED)
    assert it["text"]
    assert "NEVER SEEN" not in it["text"]
    [interrupt] = page.sent("INTERRUPT")
    assert interrupt["payload"]["delivered_text_chars"] == len(it["text"])


@pytest.mark.parametrize(
    ("language", "words"),
    [("en-GB", "no request in progress"), ("zh-CN", "没有正在进行的请求")],
)
def test_to_stop_with_nothing_running_says_so_and_sends_nothing(
    page: CheckedPage, long_story: RunningGateway, language: str, words: str
) -> None:
    page.speak(language)
    page.open(long_story.port)
    page.type(Keys.ESCAPE)
    page.wait(f"probe.notice() === {json.dumps(words)}", "it says so")

    page.ask("stop")
    page.wait_state("complete")
    page.type(Keys.ESCAPE)
    page.wait(f"probe.notice() === {json.dumps(words)}", "it says so after an answer, too")

    assert [frame["msg_type"] for frame in page.sent()] == ["REGISTER", "REQUEST"]
    assert page.answer()["state"] == "complete"


def test_a_stop_at_the_moment_of_completion_leaves_no_answer_failed_or_hanging(
    page: CheckedPage, playing: Playing
) -> None:
    whole = stop_answer("stop") or ""
    page.open(playing("story:500"))
    rounds = 30
    page.js_async(
        """
        const [rounds] = args;
        const { client } = bargein;
        const stop = () => document.dispatchEvent(
            new KeyboardEvent("keydown", { key: "Escape", bubbles: true, cancelable: true }),
        );
        for (let round = 0; round < rounds; round += 1) {
            // In turn: when the terminal frame arrives, just after it, and just before it.
            const [at, ms] = [["terminal", null], ["terminal", 0], ["text", 0], ["text", 1],
                ["text", 2], ["text", 4]][round % 6];
            let isArmed = true;
            let isStopped = false;
            let text = "";
            const off = client.on("frame", ({ direction, msgType, payload }) => {
                if (direction !== "in" || msgType !== "RESPONSE" || !isArmed) return;
                text += payload.content?.text ?? "";
                const isNear = at === "terminal"
                    ? payload.text_stream_seq === -1
                    : text.length > 60 + round / 3;
                if (!isNear) return;
                isArmed = false;
                const act = () => {
                    stop();
                    isStopped = true;
                };
                if (ms === null) act();
                else setTimeout(act, ms);
            });
            const before = probe.elements().length;
            document.getElementById("input").value = "stop";
            document.getElementById("composer").requestSubmit();
            const ended = await probe.until(() => {
                const it = probe.answers()[before];
                if (!isStopped || !it) return false;
                return it.state === "complete" || (it.state === "interrupted" && it.roundTripMs);
            }, 5000);
            off();
            if (!ended) {
                const it = JSON.stringify(probe.answers()[before]);
                throw new Error(`round ${round} (${at}, ${ms}) hangs: ${it}`);
            }
        }
        """,
        rounds,
    )
    answers = page.answers()
    assert len(answers) == rounds
    states = [it["state"] for it in answers]
    assert set(states) <= {"complete", "interrupted"}
    for it in answers:
        if it["state"] == "complete":
            assert it["text"] == whole
        else:
            assert whole.startswith(it["text"])
    assert states.count("complete") >= rounds / 6  # the rounds that stop after the terminal frame
    assert not page.shows("#stop")


def test_ten_interrupts_in_a_row_leave_one_answer_and_one_stream(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    long_story.provider.forget_requests()
    page.open(long_story.port)
    for number in range(11):
        page.type(f"Story {number}, please", Keys.ENTER)
    last = page.wait_text()
    for number in range(10):
        page.wait_answer(INTERRUPTED, number)
    answers = page.answers()
    assert [it["state"] for it in answers] == ["interrupted"] * 10 + ["streaming"]
    assert answer("Story 10, please").startswith(answers[-1]["text"])
    for number, it in enumerate(answers[:-1]):
        assert answer(f"Story {number}, please").startswith(it["text"])
    assert {frame["payload"]["interrupt_request_id"] for frame in page.sent("INTERRUPT")} == {
        it["requestId"] for it in answers[:-1]
    }
    assert len(page.sent("INTERRUPT")) == 10
    live = [one for one in long_story.provider.requests() if one.ended is None]
    assert len(live) == 1
    grown = page.wait_text(len(last["text"]) + 1)
    assert grown["messageId"] == last["messageId"]


def test_nothing_is_waited_for_not_even_the_ack(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    page.wait_text()
    # From now on no frame reaches the page.
    page.js("probe.holds = () => true")
    page.ask("stop")
    old, new = page.answers()
    assert (old["state"], new["state"]) == ("interrupted", "streaming")
    assert [frame["msg_type"] for frame in page.sent()[-2:]] == ["INTERRUPT", "REQUEST"]
    assert page.sent()[-2]["payload"]["reason"] == "USER_NEW_INPUT"
    assert page.js("return bargein.service.currentRequestId") == new["requestId"]
    page.wait(
        "probe.heldOf('INTERRUPT_ACK') && probe.heldOf('end') === 2", "all frames are held back"
    )

    page.js("probe.release()")

    assert page.wait_state("complete")["text"] == stop_answer("stop")
    after = page.wait_answer(INTERRUPTED, 0)
    assert after["text"] == old["text"]


def test_late_frames_of_an_interrupted_answer_are_not_shown(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    request_id = page.wait_text()["requestId"]
    page.js("probe.holds = () => true")
    page.type(Keys.ESCAPE)
    before = page.answer()["text"]
    late = {"request_id": request_id, "text_stream_seq": 900, "content": {"text": "TOO LATE"}}
    page.js("probe.inject('RESPONSE', arguments[0])", late)
    call = {"name": "open_map", "parameters": {}, "call_id": "call_1"}
    page.js(
        "probe.inject('RESPONSE', arguments[0])",
        {**late, "text_stream_seq": 901, "content": {}, "function_call": call},
    )
    assert page.answer()["text"] == before
    assert page.answer()["calls"] == []
    page.js("probe.release()")
    page.wait_answer(INTERRUPTED)
    page.js("probe.inject('RESPONSE', arguments[0])", late)
    page.js_async("await new Promise((painted) => requestAnimationFrame(painted))")
    assert page.answer()["text"] == before
    assert page.answer()["calls"] == []
    assert page.answer()["state"] == "interrupted"


def test_an_answer_that_was_complete_before_stop_came_ends_complete_with_all_its_text(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("story:200"))
    # A slow network: the gateway has sent the end before the page receives it.
    page.js("probe.holds = ({ payload }) => payload.text_stream_seq >= 1")
    page.ask("stop")
    page.wait_answer("it.text")
    page.wait("probe.heldOf('end') === 1", "the rest is held back")
    page.ask("stop please")
    old = page.answer(0)
    assert old["state"] == "interrupted"
    assert len(old["text"]) < len(stop_answer("stop") or "")

    page.wait(
        "probe.heldOf('INTERRUPT_ACK') && probe.heldOf('end') === 2", "all frames are held back"
    )
    page.js("probe.release()")

    first = page.wait_state("complete", 0)
    assert first["text"] == stop_answer("stop")
    assert "stopped" not in first["status"]
    second = page.wait_state("complete", 1)
    assert second["text"] == stop_answer("stop please")
    [ack] = page.received("INTERRUPT_ACK")
    assert ack["payload"]["results"][0]["outcome"] == "ALREADY_DONE"


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("TIMED_OUT", "Stopped. The provider's stream was still open after a second."),
        (None, "Stopped. The server has not confirmed it."),
    ],
)
def test_an_interrupt_that_did_not_go_well_says_so(
    page: CheckedPage, long_story: RunningGateway, outcome: str | None, words: str
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    request_id = page.wait_text()["requestId"]
    page.js("probe.holds = () => true")
    page.type(Keys.ESCAPE)
    if outcome is None:
        page.js("bargein.client.close()")
    else:
        result = {"request_id": request_id, "outcome": outcome, "stream_closed_ms": None}
        ack = {"interrupt_request_id": request_id, "status": "FAILED", "results": [result]}
        page.js("probe.inject('INTERRUPT_ACK', arguments[0])", ack)
    it = page.wait_answer(f"it.status.startsWith({json.dumps(words)})")
    assert it["state"] == "interrupted"
    assert "streamClosedMs" not in it


def test_ids_of_requests_and_of_messages_are_never_mixed_up(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    state = """
        const { isReceivingResponse, currentRequestId, currentMessageId } = bargein.service;
        return [isReceivingResponse, currentRequestId, currentMessageId];
    """
    assert page.js(state) == [False, None, None]
    for text in ("First story, please", "Second story, please"):
        page.ask(text)
        it = page.wait_text()
        assert page.js(state) == [True, it["requestId"], it["messageId"]]
    page.type(Keys.ESCAPE)
    page.wait_answer(INTERRUPTED)
    assert page.js(state) == [False, None, None]

    answers = page.answers()
    assert all(re.fullmatch(r"req_\d{13}_[0-9a-z]{9}", it["requestId"]) for it in answers)
    assert all(re.fullmatch(r"msg_\d{13}_[0-9a-z]{9}", it["messageId"]) for it in answers)
    assert len({it["requestId"] for it in answers} | {it["messageId"] for it in answers}) == 4
    on_the_wire = [frame["payload"]["request_id"] for frame in page.sent("REQUEST")]
    assert on_the_wire == [it["requestId"] for it in answers]
    stopped = [frame["payload"]["interrupt_request_id"] for frame in page.sent("INTERRUPT")]
    assert stopped == on_the_wire
    assert re.search(r"msg_\d", json.dumps(page.sent())) is None


def test_the_console_tells_of_an_interrupt_in_these_words(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    page.wait_text()
    page.ask("stop")
    page.wait_answer(INTERRUPTED, 0)
    old, new = page.answers()
    page.wait_state("complete")
    lines = [
        found.group(1)
        for entry in page.console()
        if (found := re.search(r'"(\[(?:MessageService|WebSocket)\] .*)"$', entry["message"]))
    ]
    told = [line for line in lines if "连接" not in line]
    assert told == [
        f"[MessageService] 开始接收响应 - 请求ID: {old['requestId']}",
        "[MessageService] 检测到新输入，打断当前响应",
        f"[MessageService] 发送打断信号 - 请求ID: {old['requestId']}",
        f"[WebSocket] 发送打断请求: {old['requestId']}",
        f"[MessageService] 开始接收响应 - 请求ID: {new['requestId']}",
        f"[WebSocket] 收到打断确认: {old['requestId']}",
    ]
    [ack] = [entry for entry in page.console() if "收到打断确认" in entry["message"]]
    assert ack["level"] == "DEBUG"


# Connections ----------------------------------------------------------------------------------


def test_a_reload_in_the_middle_of_an_answer_stops_it_and_begins_anew(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    long_story.provider.forget_requests()
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    page.wait_text()
    page.driver.refresh()
    page.wait_connection("ready")
    assert page.answers() == []
    assert long_story.provider.wait_ended(1).ended == "client_closed"
    page.ask("stop")
    assert page.wait_state("complete")["text"] == stop_answer("stop")


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "in order"])
def test_when_the_server_restarts_the_page_says_so_and_connects_again(
    page: CheckedPage, long_story: RunningGateway, is_killed: bool
) -> None:
    page.expected_faults = "WebSocket connection to .* failed"  # while there is no server
    url = long_story.provider.base_url
    with ExitStack() as stack:
        first = stack.enter_context(run_gateway("--drain-timeout", "0", model=LONG, llm_url=url))
        page.open(first.port)
        page.ask("Please tell me a very long story")
        page.wait_text()

        if is_killed:
            first.kill()
        else:
            first.terminate()

        it = page.wait_state("failed")
        assert it["code"] == ("CONNECTION_LOST" if is_killed else "SERVER_SHUTDOWN")
        assert it["status"].startswith("Broken off: ")
        assert it["text"]  # the text received so far stays
        page.wait_connection("waiting")
        words = "The connection is lost." if is_killed else "The server is restarting."
        assert page.notice() == f"{words} Connecting again."
        assert not page.shows("#stop")

        page.write("#input", "stop")
        page.type(Keys.ENTER)
        assert "Not connected yet" in page.notice()
        assert page.js("return document.getElementById('input').value") == "stop"

        first.kill()  # in case it has not ended by itself
        stack.enter_context(run_gateway(model=LONG, llm_url=url, port=first.port))
        page.wait_connection("ready")
        assert page.notice().startswith("Connected again.")
        page.type(Keys.ENTER)
        assert page.wait_state("complete")["text"] == stop_answer("stop")


@pytest.mark.parametrize("event", ["online", "visibilitychange"])
def test_when_the_network_or_the_user_is_back_the_page_does_not_wait(
    page: CheckedPage, long_story: RunningGateway, event: str
) -> None:
    page.open(long_story.port)
    states = page.js(
        """
        probe.sockets.at(-1).socket.onclose({ code: 1006 });
        const before = probe.connection();
        document.dispatchEvent(new Event(arguments[0], { bubbles: true }));
        return [before, probe.connection()];
        """,
        event,
    )
    assert states == ["waiting", "connecting"]
    page.wait_connection("ready")


def test_while_a_server_drains_the_page_goes_on_asking_for_a_session(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.expected_faults = "WebSocket connection to .* failed"  # while there is no server
    url = long_story.provider.base_url
    with ExitStack() as stack:
        first = stack.enter_context(run_gateway(model=LONG, llm_url=url))
        page.open(first.port)
        # Another client's answer, for which the server waits.
        page.js_async(
            """
            const { WebSocketClient } = await import(`${location.origin}/client/index.js`);
            const other = new WebSocketClient({
                url: bargein.client.url,
                registration: () => ({ auth: { type: "API_KEY", api_key: "other" } }),
            });
            await other.connect();
            await new Promise((onText) => {
                const { promise } = other.sendTextRequest("A very long story", { onText });
                promise.catch(() => undefined);
            });
            """
        )

        first.terminate()

        page.wait(
            "probe.received.some(({ payload }) => payload.error_code === 'SERVER_BUSY')",
            "it has asked the draining server",
        )
        page.wait_connection("waiting")
        assert page.notice() == "The server is restarting. Connecting again."
        first.kill()
        stack.enter_context(run_gateway(model=LONG, llm_url=url, port=first.port))
        page.wait_connection("ready")
        assert page.notice() == ""  # there was no conversation that could be lost
        page.ask("stop")
        assert page.wait_state("complete")["text"] == stop_answer("stop")


def test_a_session_that_expires_is_followed_by_a_new_one_and_its_calls_are_over(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("tool-call", session_timeout=2.0))
    set_example_functions(page)
    page.ask("Where is hall 3?")
    assert page.wait_state("complete")["calls"][0]["state"] == "waiting"
    page.wait_answer("it.calls[0].state === 'gone'")
    page.wait_connection("ready")
    words = "The session of this call has ended, so no result can be sent."
    assert page.js("return document.querySelector('.call .fault').textContent") == words
    assert not page.shows(".call form")
    told = page.js("return probe.announced")
    expired = told.index("The session has expired. Starting a new one.")
    assert told[expired + 1].startswith("Connected again. This is a new conversation")


def test_what_belongs_to_no_answer_is_told_as_a_notice(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.js("probe.inject('SESSION_WARN', { warn_type: 'EXPIRE_SOON', remaining_seconds: 300 })")
    assert page.notice() == "The session ends in 300\u00a0s unless you continue."
    page.js("probe.inject('ERROR', { error_code: 'MALFORMED_PAYLOAD', error_detail: 'why' })")
    assert page.notice() == "The server did not understand that. (why)"
    page.click("#close-notice")
    assert page.notice() == ""
    assert page.js("return document.activeElement.id") == "input"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[str]:
    """A web server for a folder in which npm has installed the library; its origin."""
    npm = find_tool("npm", "npm")
    cache = f"--cache={tmp_path / 'cache'}"
    install = [npm, "install", "--silent", "--offline", cache, str(CLIENT)]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    handler = functools.partial(QuietFiles, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, without a log line for each request."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def test_the_readmes_client_works_on_a_page_of_another_origin(
    page: CheckedPage, playing: Playing, elsewhere: str, tmp_path: Path
) -> None:
    page.expected_faults = "favicon.ico"
    port = playing("story:30", server=ServerSettings(allowed_origins=(elsewhere,)))
    readme = (CLIENT / "README.md").read_text(encoding="utf-8")
    [client] = re.findall(r"```html\n(.*?)```", readme, flags=re.S)
    assert client.count("127.0.0.1:8000") == 1
    client = client.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    (tmp_path / "index.html").write_text(f"<!doctype html><meta charset=utf-8>{client}", "utf-8")
    page.driver.get(f"{elsewhere}/")
    page.wait("document.getElementById('ask').onsubmit", "it is connected")
    shown = "[...document.querySelectorAll('#answers pre')].map((answer) => answer.textContent)"

    page.write("#ask input", f"Please tell me a very long story{Keys.ENTER}")
    page.wait(f"{shown}[0]?.length > 20", "an answer streams")
    page.write("#ask input", f"stop{Keys.ENTER}")
    page.wait(f"{shown}[1] === {json.dumps(stop_answer('stop'))}", "the next answer is complete")
    page.wait(f"/ stopped in [0-9.]+ ms$/.test({shown}[0])", "the old answer shows its time")
    page.write("#ask input", f"Another story, please{Keys.ENTER}")
    page.wait(f"{shown}[2]?.length > 20", "a third answer streams")
    page.click("#stop")
    page.wait(f"/ stopped in [0-9.]+ ms$/.test({shown}[2])", "the button stops it")
    reasons = [frame["payload"]["reason"] for frame in page.sent("INTERRUPT")]
    assert reasons == ["USER_NEW_INPUT", "USER_STOP"]


def test_the_page_loads_each_module_of_the_library_once(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    loaded: list[str] = page.js(
        """
        return performance.getEntriesByType("resource")
            .map(({ name }) => new URL(name).pathname)
            .filter((path) => CLIENT.some((name) => path.endsWith(`/${name}`)));
        """.replace("CLIENT", json.dumps([path.name for path in CLIENT.glob("*.js")]))
    )
    assert sorted(loaded) == sorted(f"/client/{path.name}" for path in CLIENT.glob("*.js"))


def test_a_page_can_import_a_release_of_the_library(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    text = page.js_async(
        """
        const { WebSocketClient } = await import(`${location.origin}/client/${args[0]}/index.js`);
        const client = new WebSocketClient({
            url: bargein.client.url,
            registration: () => ({ auth: { type: "API_KEY", api_key: "other" } }),
        });
        await client.connect();
        const { text } = await client.sendTextRequest("stop").promise;
        client.close();
        return text;
        """,
        VERSION,
    )
    assert text == stop_answer("stop")


# Faults ---------------------------------------------------------------------------------------

BROKEN = "Something went wrong with this answer. Please try again."
SLOW = "The answer took too long. Please try again."


@pytest.mark.parametrize(
    ("scenario", "words", "has_text"),
    [
        ("http-401", BROKEN, False),
        ("http-429", "", False),
        ("http-500", BROKEN, False),
        ("http-502", BROKEN, False),
        ("not-sse", BROKEN, False),
        ("no-answer", BROKEN, False),
        ("cut", BROKEN, True),
        ("reset", BROKEN, True),
        ("malformed-json", BROKEN, True),
        ("error-in-stream", BROKEN, True),
        ("stall-headers", SLOW, False),
        ("stall-first-event", SLOW, False),
        ("stall-mid-stream", SLOW, True),
        ("nobody there", BROKEN, False),
    ],
)
def test_a_fault_of_the_provider_is_a_readable_message(
    page: CheckedPage, playing: Playing, scenario: str, words: str, has_text: bool
) -> None:
    url = {"base_url": "http://127.0.0.1:1/v1"} if scenario == "nobody there" else {}
    limits = {"retries": 0, "first_token_timeout": 0.6, "idle_timeout": 0.6}
    page.open(playing(scenario, **url, **limits))
    page.ask("Tell me a story")
    it = page.wait_state("failed")
    assert it["status"].startswith(words)
    assert len(it["status"]) > 20
    assert re.search(r"[{}<>]|Traceback|Error\(|object at", it["status"]) is None
    assert (it["text"] != "") == has_text
    assert page.js("return probe.answers()[0].retry") == "Ask again"
    assert not page.shows("#stop")
    assert page.js("return document.activeElement.id") == "input"
    assert page.js("return probe.connection()") == "ready"


def test_ask_again_asks_the_same_question(page: CheckedPage, playing: Playing) -> None:
    page.open(playing("http-500:1", retries=0))
    page.ask("stop")
    page.wait_state("failed")
    page.click(".retry")
    assert page.wait_state("complete")["text"] == stop_answer("stop")
    asked = [frame["payload"]["content"]["text"] for frame in page.sent("REQUEST")]
    assert asked == ["stop", "stop"]
    assert page.answer(0)["retry"] == ""


def test_ask_again_while_another_answer_streams_interrupts_that_one_now(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("story:30"))
    page.ask("stop")
    request_id = page.wait_answer("it.requestId")["requestId"]
    error = {"request_id": request_id, "error_code": "SERVER_BUSY", "retryable": True}
    page.js("probe.inject('ERROR', arguments[0])", error)
    page.wait_state("failed")
    page.ask("Please tell me a very long story")
    page.wait_text(60)
    page.click(".retry")
    it = page.wait_answer("it.state === 'interrupted' && it.lastPaintMs", 1)
    # Measured from the click on "Ask again", not from the question about a second before.
    asked, clicked = page.js("return probe.acts.slice(-2).map(({ at }) => at)")
    assert float(it["lastPaintMs"]) < (clicked - asked) / 2
    assert page.wait_state("complete", 2)["text"] == stop_answer("stop")


def test_an_answer_without_any_text_is_said_to_be_empty(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("empty"))
    page.ask("Tell me a story")
    assert page.wait_state("complete")["status"] == "The answer was empty."


@pytest.mark.parametrize(
    ("finish_reason", "words"),
    [
        ("length", "The answer was cut off at the maximum length."),
        ("content_filter", "The provider's content filter cut the answer off."),
        ("stop", ""),
    ],
)
def test_an_answer_that_was_cut_short_says_why(
    page: CheckedPage, long_story: RunningGateway, finish_reason: str, words: str
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    request_id = page.wait_text()["requestId"]
    end = {"request_id": request_id, "text_stream_seq": -1, "content": {}}
    page.js("probe.inject('RESPONSE', arguments[0])", end | {"finish_reason": finish_reason})
    assert page.wait_state("complete")["status"] == words


# What a model says ----------------------------------------------------------------------------

NASTY = (
    "<img src=x onerror=\"alert('one')\"><script>alert('two')</script>"
    "<svg onload=alert(3)> <a href='javascript:alert(4)'>here</a> &lt;b&gt; </p></li> ${alert(5)}"
)


def test_script_in_question_and_answer_is_shown_as_text_and_never_runs(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("echo"))
    page.ask(NASTY)
    assert page.wait_state("complete")["text"] == NASTY
    asked = page.js("return document.querySelector('[data-role=user] .text').textContent")
    assert asked == NASTY
    found = page.js("return document.querySelectorAll('#messages :is(img, script, svg, a)').length")
    assert found == 0
    assert page.js("return document.getElementById('announcer').children.length") > 0
    assert page.js("return document.querySelectorAll('#announcer :not(p)').length") == 0


def test_script_in_a_function_call_and_in_an_error_is_text_as_well(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    request_id = page.wait_text()["requestId"]
    call = {"name": NASTY, "parameters": {NASTY: NASTY}, "call_id": "call_1"}
    page.js(
        "probe.inject('RESPONSE', arguments[0])",
        {"request_id": request_id, "text_stream_seq": 900, "function_call": call, "content": {}},
    )
    page.js(
        "probe.inject('ERROR', arguments[0])",
        {"request_id": request_id, "error_code": NASTY, "error_msg": NASTY, "error_detail": NASTY},
    )
    it = page.wait_state("failed")
    assert it["calls"][0]["name"] == NASTY
    assert json.loads(it["calls"][0]["parameters"]) == {NASTY: NASTY}
    assert NASTY in it["status"]
    found = page.js("return document.querySelectorAll('#messages :is(img, script, svg, a)').length")
    assert found == 0


def test_the_policy_forbids_inline_script_and_html_from_strings(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", long_story.port, timeout=5)
    connection.request("GET", "/")
    with connection.getresponse() as response:
        policy = response.headers["Content-Security-Policy"]
        html = response.read().decode()
    connection.close()
    assert "unsafe-" not in policy
    assert {"default-src 'none'", "script-src 'self'"} <= set(policy.split("; "))
    assert re.findall(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|javascript:", html) == []

    page.expected_faults = "Content Security Policy|Trusted(HTML|Script)|trusted-types"
    page.open(long_story.port)
    tried = page.js_async(
        """
        const tries = {
            html: () => { document.createElement("p").innerHTML = "<b>bold</b>"; },
            eval: () => (0, eval)("probe.errors.push('eval')"),
            handler: () => {
                const button = document.createElement("button");
                button.setAttribute("onclick", "probe.errors.push('handler')");
                button.click();
            },
            script: () => {
                const script = document.createElement("script");
                script.append("probe.errors.push('script')");
                document.head.append(script);
            },
            foreign: async () => {
                const script = document.createElement("script");
                script.setAttribute("src", "data:text/javascript,probe.errors.push('foreign')");
                document.head.append(script);
            },
        };
        const violated = [];
        document.addEventListener("securitypolicyviolation", (event) =>
            violated.push(event.effectiveDirective),
        );
        // Continue as a task of the page: code that DevTools calls may evaluate strings.
        await new Promise((resolve) => setTimeout(resolve));
        const thrown = [];
        for (const [name, attempt] of Object.entries(tries)) {
            try { await attempt(); } catch { thrown.push(name); }
        }
        await probe.until(() => violated.length >= 5, 2000);
        return [thrown, violated];
        """
    )
    thrown, violated = tried
    assert {"html", "eval"} <= set(thrown)
    assert len(violated) >= 5
    assert page.js("return probe.errors.filter((one) => !one.includes(' '))") == []


# Functions ------------------------------------------------------------------------------------


def set_example_functions(page: Page) -> None:
    """Fill in the example functions in the settings, as a user does."""
    page.click("#open-settings")
    page.click("#functions-example")
    page.click("#save-settings")
    page.wait("!document.getElementById('settings').open", "the settings are closed")


def test_a_function_call_is_a_card_and_its_result_goes_back(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("tool-call"))
    set_example_functions(page)
    page.ask("Where is hall 3?")
    it = page.wait_state("complete", 0)
    [card] = it["calls"]
    assert card["name"] == "open_map"
    assert isinstance(json.loads(card["parameters"])["hall"], int)
    assert card["state"] == "waiting"

    page.write(".call textarea", "no json at all")
    page.click(".call button")
    assert page.shows(".call .fault")
    assert page.js("return document.querySelector('.call textarea').ariaInvalid") == "true"
    assert page.sent("FUNCTION_RESULT") == []

    page.write(".call textarea", '{"shown": true}')
    page.click(".call button")
    page.wait("probe.answers().length === 2", "the model continues")
    after = page.wait_state("complete", 1)
    assert after["text"]
    [frame] = page.sent("FUNCTION_RESULT")
    assert frame["payload"] == {
        "call_id": card["callId"],
        "request_id": after["requestId"],
        "result": {"shown": True},
    }
    assert page.answer(0)["calls"][0]["state"] == "answered"
    assert page.js("return document.activeElement.id") == "input"


def test_of_two_calls_the_model_goes_on_with_the_second_result(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("tool-call-parallel:2"))
    set_example_functions(page)
    page.ask("Where are halls 3 and 4?")
    it = page.wait_state("complete", 0)
    assert len(it["calls"]) == 2
    page.click(".call:nth-of-type(1) button")
    page.wait(
        "probe.notice().includes('Waiting for the other results')", "the notice that it waits"
    )
    assert len(page.answers()) == 1
    page.click(".call:nth-of-type(2) button")
    assert page.wait_answer("it.state === 'complete'", 1)["text"]
    results = [frame["payload"] for frame in page.sent("FUNCTION_RESULT")]
    assert [payload["call_id"] for payload in results] == [one["callId"] for one in it["calls"]]
    assert ["request_id" in payload for payload in results] == [False, True]


def test_a_call_that_comes_after_the_result_of_the_first_interrupts_nothing(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("tool-call-parallel:2"))
    set_example_functions(page)
    page.js(
        """
        let calls = 0;
        probe.holds = ({ payload }) => payload.function_call && (calls += 1) === 2;
        """
    )
    page.ask("Where are halls 3 and 4?")
    page.wait("probe.held.length > 1", "the second call is on its way")
    page.click(".call:nth-of-type(1) button")
    page.wait("probe.answers().length === 2", "the request that continues")
    page.js("probe.release()")
    page.wait("document.querySelectorAll('.call form').length === 1", "the second call")
    page.click(".call:nth-of-type(2) button")
    assert page.wait_answer("it.state === 'complete'", 1)["text"]
    assert len(page.answers()) == 2
    assert page.sent("INTERRUPT") == []
    assert page.notice() == ""


# Settings -------------------------------------------------------------------------------------


def test_settings_are_in_effect_at_once_and_after_a_reload(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    before = page.wait_text()

    page.click("#open-settings")
    page.write("#setting-role", "A keeper of lamps")
    page.write("#setting-scene", "The lamp room")
    page.click("#functions-example")
    page.click("#setting-speech")
    page.click("#save-settings")
    page.wait("probe.notice() === 'Settings are in effect.'", "it says so")

    [update] = [
        frame["payload"]["update_session"]
        for frame in page.sent("REQUEST")
        if "update_session" in frame["payload"]
    ]
    assert update["system_prompt"] == {"role_description": "A keeper of lamps"}
    assert update["scene_context"] == {"scene_description": "The lamp room"}
    assert update["require_tts"] is True
    assert [one["name"] for one in update["function_calling"]] == ["open_map"]
    page.wait_text(len(before["text"]) + 1)  # a change of settings interrupts nothing
    assert page.sent("INTERRUPT") == []

    page.driver.refresh()
    page.wait_connection("ready")
    [register] = page.sent("REGISTER")
    assert {name: register["payload"][name] for name in update} == update
    page.ask("stop")  # with speech on, although this gateway has no speech
    assert page.wait_state("complete")["text"] == stop_answer("stop")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("#setting-functions", "[{", "This is not valid JSON"),
        ("#setting-functions", '{"name": "one"}', "must be a list"),
        ("#setting-functions", '[{"name": "no good name"}]', "did not understand"),
        ("#setting-server", "http://example.com", "must start with ws:// or wss://"),
    ],
)
def test_settings_that_cannot_be_are_told_and_not_kept(
    page: CheckedPage, long_story: RunningGateway, field: str, value: str, words: str
) -> None:
    page.open(long_story.port)
    page.click("#open-settings")
    page.js("document.querySelector('#settings details').open = true")
    page.write(field, value)
    page.click("#save-settings")
    page.wait(
        f"document.getElementById('settings-error').textContent.includes({json.dumps(words)})",
        "the fault is told",
    )
    assert page.shows("#settings-error")
    page.type(Keys.ESCAPE)
    page.wait("!document.getElementById('settings').open", "the settings are closed")
    page.ask("stop")
    page.wait_state("complete")
    page.driver.refresh()
    page.wait_connection("ready")
    page.click("#open-settings")
    kept = page.js("return document.querySelector(arguments[0]).value", field)
    assert kept != value


@pytest.mark.parametrize(
    ("language", "words"), [("en", "needs a valid access key"), ("zh", "有效的访问密钥")]
)
def test_who_has_no_key_is_told_so_once_and_is_let_in_with_one(
    page: CheckedPage, playing: Playing, language: str, words: str
) -> None:
    key = "key-of-the-page-0123456789"
    digest = bytes.fromhex(hash_api_key(key).partition(":")[2])
    page.speak(language)
    with capture_logs() as logs:
        page.open(playing("echo", credentials=Credentials({digest: "page"})), ready=False)
        page.wait_connection("refused")
        assert words in page.notice()
        # The server's own words are not shown: they are in English only.
        assert "credentials" not in page.notice()
        page.click("#open-settings")
        page.js("document.querySelector('#settings details').open = true")
        page.write("#setting-key", f" {key} ")  # with the spaces of a copied text
        page.click("#save-settings")
        page.wait_connection("ready")
        page.ask("Good evening")
        assert page.wait_state("complete")["text"] == "Good evening"
    events = [line["event"] for line in logs]
    assert events.count("Refused registration") == 1
    assert [line["client"] for line in logs if line["event"] == "Session registered"] == ["page"]


def test_settings_are_saved_though_the_server_that_refused_has_gone(
    page: CheckedPage, make_gateway: Callable[..., Gateway]
) -> None:
    page.expected_faults = "WebSocket connection to .* failed"  # while there is no server
    gateway = make_gateway(credentials=Credentials({b"": "nobody"}))
    page.open(gateway.server.port, ready=False)
    page.wait_connection("refused")
    gateway.stop()
    page.click("#open-settings")
    page.write("#setting-role", "a guide")
    page.click("#save-settings")
    page.wait("!document.getElementById('settings').open", "the settings are closed")
    assert page.js("return probe.connection()") == "waiting"
    page.click("#open-settings")
    assert page.js("return document.getElementById('setting-role').value") == "a guide"
    assert page.js("return document.getElementById('save-settings').disabled") is False


def test_escape_closes_the_settings_and_the_answer_goes_on(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    page.wait_text()
    page.click("#open-settings")
    page.type(Keys.ESCAPE)
    page.wait("!document.getElementById('settings').open", "the settings are closed")
    length = len(page.answer()["text"])
    page.wait_text(length + 1)
    assert page.sent("INTERRUPT") == []
    assert page.js("return document.activeElement.id") == "input"


def test_the_settings_open_at_their_beginning_with_the_focus_there(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.be_phone(412, 500)
    page.open(long_story.port)
    for _ in range(2):
        page.click("#open-settings")
        assert page.js("return document.activeElement.id") == "settings-title"
        assert page.js("return document.querySelector('#settings .fields').scrollTop") == 0
        page.js("document.querySelector('#settings .fields').scrollTop = 200")
        page.type(Keys.ESCAPE)
        page.wait("!document.getElementById('settings').open", "the settings are closed")


def test_settings_that_are_saved_while_the_page_registers_are_in_effect(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    # A registration with the old settings is sent and not yet confirmed.
    page.js("probe.holds = () => true; bargein.client.close()")
    page.js("bargein.client.connect().catch(() => undefined)")
    page.wait("probe.heldOf('REGISTER_ACK')", "the registration is on its way")
    page.click("#open-settings")
    page.write("#setting-role", "A keeper of lamps")
    page.js("probe.held.length = 0; probe.release();")
    page.click("#save-settings")
    page.wait_connection("ready")
    role = page.sent("REGISTER")[-1]["payload"]["system_prompt"]
    assert role == {"role_description": "A keeper of lamps"}


@pytest.mark.parametrize(
    ("preferred", "lang", "send", "connected"),
    [
        (["zh-CN", "en"], "zh-CN", "发送", "已连接"),
        (["en-US", "zh"], "en", "Send", "Connected"),
        (["fr", "zh", "en"], "zh-CN", "发送", "已连接"),
        (["sw"], "en", "Send", "Connected"),
    ],
)
def test_the_page_speaks_the_language_of_the_browser(
    page: CheckedPage,
    long_story: RunningGateway,
    preferred: list[str],
    lang: str,
    send: str,
    connected: str,
) -> None:
    page.speak(*preferred)
    page.open(long_story.port)
    assert page.js("return document.documentElement.lang") == lang
    assert page.js("return document.getElementById('send').ariaLabel") == send
    assert page.js("return document.getElementById('connection-text').textContent") == connected
    if lang == "zh-CN":
        # No English word is left.
        words = page.js("return document.querySelector('main').innerText")
        assert re.findall(r"[A-Za-z]{3,}", words) == []


# Keyboard, focus and screen readers -----------------------------------------------------------


def test_everything_is_done_with_the_keyboard_alone(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    focus = "return document.activeElement.id || document.activeElement.className"
    assert page.js(focus) == "input"
    order = []
    for _ in range(8):
        page.type(Keys.TAB)
        order.append(page.js(focus))
        if order[-1] != "input" and page.js("return document.activeElement !== document.body"):
            assert page.js(
                """
                const style = getComputedStyle(document.activeElement);
                return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
                """
            ), f"no visible focus on {order[-1]}"
    assert order[0] == "send"
    after = order[order.index("open-settings") :]
    assert after[:5] == ["open-settings", "scroller", "idea", "idea", "input"]

    page.js("document.getElementById('input').focus()")
    page.type("Please tell me a very long story", Keys.ENTER)
    page.wait_text()
    assert page.js(focus) == "input"
    page.type(Keys.TAB)
    assert page.js(focus) == "stop"
    page.type(Keys.ENTER)
    page.wait_answer(INTERRUPTED)
    assert page.js(focus) == "input"  # the button is hidden, so the focus moves to the input

    page.write("#input", f"one line{Keys.SHIFT}{Keys.ENTER}{Keys.NULL}stop, please")
    page.type(Keys.ENTER)
    page.wait_answer("it.state !== 'interrupted'")
    assert page.sent("REQUEST")[-1]["payload"]["content"]["text"] == "one line\nstop, please"
    page.type(Keys.ESCAPE)
    assert page.js(focus) == "input"


def test_what_an_input_method_composes_is_not_sent_by_its_own_enter(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.cdp("Input.imeSetComposition", text="ting", selectionStart=4, selectionEnd=4)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    page.cdp("Input.dispatchKeyEvent", type="rawKeyDown", **enter)
    page.cdp("Input.dispatchKeyEvent", type="keyUp", **enter)
    assert page.js("return probe.acts.map(({ key }) => key)") == ["Enter"]
    page.cdp("Input.insertText", text="停止")
    assert page.sent("REQUEST") == []
    page.type(Keys.ENTER)
    assert page.wait_state("complete")["text"] == stop_answer("停止")
    [request] = page.sent("REQUEST")
    assert request["payload"]["content"]["text"] == "停止"


def test_a_click_on_an_idea_asks_it_and_a_click_on_send_interrupts(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.click(".idea")
    page.wait_text()
    assert not page.shows("#welcome")
    assert page.js("return document.activeElement.id") == "input"
    page.write("#input", "stop")
    page.click("#send")
    assert page.wait_state("complete")["text"] == stop_answer("stop")
    assert page.wait_answer(INTERRUPTED, 0)["text"]
    assert page.js("return document.activeElement.id") == "input"


def test_a_screen_reader_hears_sentences_and_that_it_was_stopped(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    region = "return [...document.querySelectorAll('#announcer p')].map((p) => p.textContent)"
    page.ask("Please tell me a very long story")
    page.wait("document.querySelector('#announcer p')", "the first sentence")
    assert page.js(region)[0] == "“Please tell me a very long story”: that reminds me of a story."
    assert page.js("return document.getElementById('announcer').ariaLive") == "polite"
    assert page.answer()["isBusy"]
    page.type(Keys.ESCAPE)
    page.wait_answer(INTERRUPTED)
    assert page.js(region) == ["Stopped"]
    assert not page.answer()["isBusy"]
    page.type(Keys.ESCAPE)
    assert page.js(region) == ["Stopped", "no request in progress"]


def test_an_old_answer_that_ends_late_does_not_cut_the_sentence_that_is_read(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("story:200"))
    page.js("probe.holds = ({ payload }) => payload.text_stream_seq >= 1")
    page.ask("stop")
    page.wait_answer("it.text")
    page.wait("probe.heldOf('end') === 1", "the rest is held back")
    page.ask("Tell me a story")
    page.wait("probe.heldOf('INTERRUPT_ACK')", "the ack is on its way")
    request_id = page.answer()["requestId"]
    half = {"request_id": request_id, "text_stream_seq": 0, "content": {"text": "Half a "}}
    page.js("probe.inject('RESPONSE', arguments[0])", half)
    page.js("probe.releaseUpTo('INTERRUPT_ACK')")
    page.wait_state("complete", 0)
    assert page.js("return probe.announced") == []
    page.js("probe.release()")
    page.wait("probe.announced.some((one) => /^Half a .+[.]$/.test(one))", "the whole sentence")
    page.type(Keys.ESCAPE)


def test_the_scroll_follows_the_text_until_the_user_looks_back(
    page: CheckedPage, playing: Playing
) -> None:
    page.open(playing("story:200"))
    page.ask("Tell me a story")
    page.wait("document.getElementById('scroller').scrollTop > 60", "the text is long")
    at_end = """
        const { scrollHeight, scrollTop, clientHeight } = document.getElementById("scroller");
        return scrollHeight - scrollTop - clientHeight < 30;
    """
    assert page.js(at_end)
    page.js("document.getElementById('scroller').scrollTop = 0")
    page.wait("!document.getElementById('to-bottom').hidden", "the button to the newest message")
    page.wait_text(len(page.answer()["text"]) + 100)
    assert page.js("return document.getElementById('scroller').scrollTop") == 0
    page.click("#to-bottom")
    page.wait_text(len(page.answer()["text"]) + 100)
    assert page.js(at_end)
    page.type(Keys.ESCAPE)
    page.wait_answer(INTERRUPTED)
    page.js("document.getElementById('scroller').scrollTop = 0")
    page.wait("!document.getElementById('to-bottom').hidden", "it is shown without new text, too")
    page.be_phone(1100, 4000)
    page.wait("document.getElementById('to-bottom').hidden", "all of it is in sight")


# Sound ----------------------------------------------------------------------------------------

SOUND = """
    const { AudioService } = await import(`${location.origin}/client/index.js`);
    /** 440 Hz in pieces of 50 ms, 16 kHz 16-bit mono. */
    const pcm = (piece) => Int16Array.from({ length: 800 }, (_, index) =>
        16000 * Math.sin((2 * Math.PI * 440 * (800 * piece + index)) / 16000),
    );
    const play = (pieces) => {
        for (let piece = 0; piece < pieces; piece += 1) audio.play(pcm(piece));
    };
"""

LIVE = (
    SOUND
    + """
    const audio = new AudioService();
    await audio.unlock();
    const { context, output } = audio;
    const analyser = new AnalyserNode(context, { fftSize: 32768 });  // 2 s
    output.connect(analyser);
    const wave = new Float32Array(analyser.fftSize);
    const peak = () => {
        analyser.getFloatTimeDomainData(wave);
        return Math.max(...wave.slice(-64).map(Math.abs));  // 4 ms
    };
    const turn = () => new Promise((resolve) => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => { port1.close(); resolve(); };
        port2.postMessage(null);
    });
    const loud = async (ms) => {
        const end = performance.now() + ms;
        while (peak() < 0.3 && performance.now() < end) await turn();
        return peak() >= 0.3;
    };
    /** The samples of so many seconds from `time` on; null if they are gone already. */
    const heardSince = async (time, seconds) => {
        while (context.currentTime < time + seconds) await turn();
        analyser.getFloatTimeDomainData(wave);
        const count = Math.round((context.currentTime - time) * context.sampleRate);
        return count > wave.length ? null : wave.slice(wave.length - count);
    };
    const isSound = (sample) => sample !== 0;
"""
)


def test_to_stop_playback_silences_it_within_50_ms_and_forgets_what_was_queued(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    # The end of the sound is read from the wave in the analyser, on the clock of the sound. Polling
    # for silence would measure how often the page runs: on a busy machine it may be paused for
    # 100 ms while the sound is long over.
    page.open(long_story.port)
    rounds: list[dict[str, Any]] = page.js_async(
        LIVE
        + """
        const rounds = [];
        for (let tries = 0; rounds.length < 10 && tries < 30; tries += 1) {
            play(60);  // 3 s of it
            const wasLoud = await loud(2000);
            const stoppedAt = context.currentTime;
            audio.stopAllPlayback();
            const heard = await heardSince(stoppedAt, 0.25);
            if (heard === null) continue;
            const ms = ((heard.findLastIndex(isSound) + 1) * 1000) / context.sampleRate;
            rounds.push({ wasLoud, ms, isPlaying: audio.isPlaying });
        }
        return rounds;
        """
    )
    assert len(rounds) == 10
    assert all(one["wasLoud"] for one in rounds), rounds
    assert not any(one["isPlaying"] for one in rounds)
    assert max(one["ms"] for one in rounds) < 50, rounds


def test_to_stop_playback_is_silence_from_the_next_audio_frame_on(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    # Rendered offline, so that the result is exact to the sample and depends on no clock.
    page.open(long_story.port)
    before, after, again = page.js_async(
        """
        const context = new OfflineAudioContext(1, 16000, 16000);
        // An offline context says `suspended` where a real one, unlocked, says `running`.
        Object.defineProperty(context, "state", { value: "running" });
        """
        + SOUND
        + """
        const audio = new AudioService({ createContext: () => context });
        play(10);
        const frame = 128;
        void context.suspend((20 * frame) / 16000).then(() => {
            audio.stopAllPlayback();
            return context.resume();
        });
        void context.suspend((60 * frame) / 16000).then(() => {
            play(2);
            return context.resume();
        });
        const wave = (await context.startRendering()).getChannelData(0);
        const loudest = (from, to) => Math.max(...wave.subarray(from, to).map(Math.abs));
        const lead = 320;
        const said = [...pcm(0), ...pcm(1)].map((sample) => sample / 32768);
        const from = 60 * frame + lead;
        return [
            loudest(19 * frame, 20 * frame),
            loudest(20 * frame, from),
            said.every((sample, index) => Math.abs(wave[from + index] - sample) < 1e-6)
                && loudest(from + said.length, wave.length) === 0,
        ];
        """
    )
    assert before > 0.3
    assert after == 0
    assert again  # sound played later is heard whole, and none of the earlier sound with it


def test_what_is_played_after_a_stop_is_heard_at_once_and_whole(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    begins_after, lasts, is_playing = page.js_async(
        LIVE
        + """
        for (let tries = 0; tries < 10; tries += 1) {
            play(60);
            await loud(2000);
            const stoppedAt = context.currentTime;
            audio.stopAllPlayback();
            play(6);  // 300 ms
            const heard = await heardSince(stoppedAt, 0.6);
            if (heard === null) continue;
            // The earlier sound may last for one more frame of 128 samples; skip it.
            const begins = heard.findIndex((sample, index) => index > 256 && isSound(sample));
            return [begins, heard.findLastIndex(isSound) - begins, audio.isPlaying];
        }
        """
    )
    assert begins_after < 16 * 50  # samples
    assert 16 * 295 < lasts <= 16 * 300
    assert not is_playing


def test_an_interrupt_silences_the_voice_of_the_answer(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("Please tell me a very long story")
    request_id = page.wait_text()["requestId"]
    peak: dict[str, float] = page.js_async(
        """
        const [requestId] = args;
        const { audio } = bargein;
        await audio.unlock();
        const analyser = new AnalyserNode(audio.context, { fftSize: 64 });
        audio.output.connect(analyser);
        const samples = new Float32Array(64);
        probe.peak = () => {
            analyser.getFloatTimeDomainData(samples);
            return Math.max(...samples.map(Math.abs));
        };
        // Twenty seconds of speech, in the form in which a gateway sends it.
        const bytes = new Uint8Array(Int16Array.from({ length: 320000 }, (_, index) =>
            16000 * Math.sin((2 * Math.PI * 440 * index) / 16000)).buffer);
        let binary = "";
        for (const byte of bytes) binary += String.fromCharCode(byte);
        probe.voice = btoa(binary);
        probe.inject("RESPONSE", { request_id: requestId, text_stream_seq: 900, voice_stream_seq: 0,
            content: { voice: probe.voice } });
        const before = await probe.until(() => probe.peak() > 0.3 && probe.peak(), 3000);
        return { before };
        """,
        request_id,
    )
    assert peak["before"]
    page.js("probe.holds = () => true")  # also the ack
    page.type(Keys.ESCAPE)
    assert page.js("return bargein.audio.isPlaying") is False
    page.wait("probe.peak() === 0", "it is silent", 2)
    # Speech that arrives late is not played.
    page.js(
        """
        probe.inject("RESPONSE", { request_id: arguments[0], text_stream_seq: 901,
            voice_stream_seq: 1, content: { voice: probe.voice } });
        """,
        request_id,
    )
    assert page.js("return bargein.audio.isPlaying") is False
    page.js("probe.release()")
    page.wait_answer(INTERRUPTED)
    assert page.js("return bargein.audio.isPlaying") is False


def test_speech_that_outlasts_its_text_can_be_stopped(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    page.open(long_story.port)
    page.ask("stop")
    page.wait_state("complete")
    page.js("bargein.audio.play(new Int16Array(20 * 16000).fill(1000))")
    assert page.shows("#stop")
    page.click("#stop")
    assert page.js("return bargein.audio.isPlaying") is False
    assert not page.shows("#stop")
    assert page.notice() == ""  # there was something to stop
    page.type(Keys.ESCAPE)
    assert page.notice() == "no request in progress"
    assert page.sent("INTERRUPT") == []
    assert page.answer()["state"] == "complete"


# Looks ----------------------------------------------------------------------------------------


FLUENT = "story:150"
"""Fast enough for screenshots, and long enough to be stopped."""


def fill(page: Page) -> None:
    """Show one of everything: a stopped answer, a call, a failed and a short answer, a notice."""
    page.ask("Please tell me a very long story")
    page.wait_text(60)
    page.type(Keys.ESCAPE)
    page.wait_answer(INTERRUPTED)
    page.ask("Where is hall 3? " + "x" * 120)
    request_id = page.wait_text()["requestId"]
    call = {"name": "open_map", "parameters": {"hall": 3}, "call_id": "call_1"}
    frame = {"request_id": request_id, "text_stream_seq": 900, "content": {}}
    page.js("probe.inject('RESPONSE', arguments[0])", frame | {"function_call": call})
    error = {"error_code": "INTERNAL_ERROR", "error_detail": "the provider answered 500: sorry"}
    page.js("probe.inject('ERROR', arguments[0])", error | frame | {"retryable": True})
    page.wait_state("failed")
    page.ask("stop")
    page.wait_state("complete")
    page.type(Keys.ESCAPE)
    page.wait("probe.notice()", "a notice")


@pytest.mark.parametrize("width", [320, 360, 412])
def test_on_a_phone_nothing_is_cut_off_and_everything_can_be_touched(
    page: CheckedPage, playing: Playing, width: int
) -> None:
    page.be_phone(width, 640)
    page.open(playing(FLUENT))
    too_wide = """
        const wide = [...document.querySelectorAll("body *")].filter((element) => {
            const { left, right, width } = element.getBoundingClientRect();
            return width > 1 && (right > innerWidth + 0.5 || left < -0.5)
                && !element.closest(".unseen");
        });
        for (const one of document.querySelectorAll("html, #scroller, .bubble, .fields, #notice")) {
            if (one.scrollWidth > one.clientWidth) wide.push(one);
        }
        return wide.map((one) => one.id || one.className || one.tagName);
    """
    too_small = """
        return [...document.querySelectorAll("button, select, input, textarea, summary")]
            .filter((element) => element.checkVisibility())
            .map((element) => {
                // A checkbox is also switched by its label.
                const box = element.type === "checkbox" ? element.parentElement : element;
                const { width, height } = box.getBoundingClientRect();
                return [element.id || element.className || element.tagName, width, height];
            })
            .filter(([, width, height]) => width < 44 || height < 44);
    """
    assert page.js(too_wide) == []
    page.ask("Please tell me a very long story")
    page.wait_text()
    for selector in ("#input", "#send", "#stop", "#open-settings", "#connection"):
        assert page.shows(selector)
        inside = page.js(
            """
            const { top, bottom } = document.querySelector(arguments[0]).getBoundingClientRect();
            return top >= 0 && bottom <= innerHeight;
            """,
            selector,
        )
        assert inside, selector
    assert page.js(too_small) == []
    page.click("#stop")
    page.wait_answer(INTERRUPTED)
    fill(page)
    assert page.js(too_wide) == []
    assert page.js(too_small) == []
    page.click("#open-settings")
    page.js("document.querySelector('#settings details').open = true")
    assert page.js(too_wide) == []
    assert page.js(too_small) == []


def test_with_colours_of_the_users_own_a_switch_that_is_on_looks_on(
    page: CheckedPage, long_story: RunningGateway
) -> None:
    features = [{"name": "forced-colors", "value": "active"}]
    page.cdp("Emulation.setEmulatedMedia", features=features)
    page.open(long_story.port)
    page.click("#open-settings")
    pictures = []
    for _ in ("on", "off"):
        page.click("#setting-speech")
        page.js("document.activeElement.blur()")
        pictures.append(page.picture_of("#setting-speech"))
    assert pictures[0] != pictures[1]


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, or of the file that the variable AXE names."""
    path = os.environ.get("AXE")
    found = Path(path) if path else files("axe_core_python") / "axe.min.js"
    return found.read_text(encoding="utf-8")


def violations(page: Page, axe: str) -> list[str]:
    """What axe finds: impact, rule and elements of each violation."""
    page.js(f"if (!globalThis.axe) {{ {axe} }}")
    found: list[str] = page.js_async(
        """
        const { violations } = await axe.run(document, { resultTypes: ["violations"] });
        return violations.map(({ id, impact, nodes }) =>
            `${impact}: ${id}: ${nodes.map(({ target }) => target.join(" ")).join(", ")}`);
        """
    )
    return found


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("is_phone", [False, True], ids=["desktop", "phone"])
def test_axe_finds_no_fault_of_accessibility(
    page: CheckedPage, playing: Playing, axe: str, is_dark: bool, is_phone: bool
) -> None:
    if is_dark:
        page.darken()
    if is_phone:
        page.be_phone()
    page.open(playing(FLUENT))
    found = {"empty": violations(page, axe)}
    page.ask("Please tell me a very long story")
    page.wait_text()
    found["streaming"] = violations(page, axe)
    page.type(Keys.ESCAPE)
    page.wait_answer(INTERRUPTED)
    fill(page)
    found["filled"] = violations(page, axe)
    page.click("#open-settings")
    page.js("document.querySelector('#settings details').open = true")
    page.write("#setting-functions", "[{")
    page.click("#save-settings")
    page.wait("!document.getElementById('settings-error').hidden", "an error in the settings")
    found["settings"] = violations(page, axe)
    assert {where: what for where, what in found.items() if what} == {}


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """The folder for screenshots; the variable SCREENSHOTS names one that is kept."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def need_chinese_font(page: Page) -> None:
    """Skip the test if no Chinese font is installed; in CI, fail it."""
    if page.boxes_among("停止"):
        words = "no Chinese font is installed (Debian's fonts-wqy-microhei): nothing was checked"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)


@pytest.mark.parametrize("name", ["desktop", "dark", "phone", "desktop-zh", "phone-dark-zh"])
def test_screenshots_are_made(
    page: CheckedPage, playing: Playing, screenshots: Path, name: str
) -> None:
    size = (1100, 800)
    if "dark" in name:
        page.darken()
    if "phone" in name:
        size = (390, 844)
        page.be_phone(*size)
    else:
        page.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=False,
        )
    chinese = name.endswith("-zh")
    if chinese:
        page.speak("zh-CN")
    page.open(playing(FLUENT))
    if chinese:
        need_chinese_font(page)
    scenes = ["empty", "chat", "streaming", "everything", "settings"]
    pictures = [page.screenshot(screenshots / f"{name}-{scenes[0]}.png")]
    page.ask("给我讲一个很长的故事" if chinese else "Please tell me a very long story")
    page.wait_text(120 if chinese else 260)
    page.ask("停止" if chinese else "Stop, please")
    page.wait_answer("it.lastPaintMs", 0)
    page.wait_state("complete")
    pictures.append(page.screenshot(screenshots / f"{name}-{scenes[1]}.png"))
    page.ask("后来呢？" if chinese else "And then?")
    page.wait_text(60)
    pictures.append(page.screenshot(screenshots / f"{name}-{scenes[2]}.png"))
    fill(page)
    pictures.append(page.screenshot(screenshots / f"{name}-{scenes[3]}.png"))
    page.click("#open-settings")
    pictures.append(page.screenshot(screenshots / f"{name}-{scenes[4]}.png"))
    if chinese:
        shown = set(re.findall("[\u4e00-\u9fff]", page.js("return document.body.innerText")))
        assert len(shown) > 100
        assert page.boxes_among("".join(sorted(shown))) == ""
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len({picture.read_bytes() for picture in pictures}) == len(scenes)
