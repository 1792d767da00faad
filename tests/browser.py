"""Drives the gateway's page in a real Chromium, for tests and measurements."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PROBE = Path(__file__).with_name("browser_probe.js").read_text(encoding="utf-8")

SCRIPT_SECONDS = 40.0
"""Longer than any wait in the page, so that the wait fails first and names its condition."""

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # does not start as root
    "--disable-gpu",
    "--disable-dev-shm-usage",  # /dev/shm is small in a container
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--window-size=1100,800",
    "--lang=en-US",
)


class PageWaitTimeout(AssertionError):
    """A condition in the page did not become true in time."""


@contextlib.contextmanager
def run_browser(chromium: str, chromedriver: str, profile: Path) -> Iterator[webdriver.Chrome]:
    """Start a browser with an empty profile, and end it on leaving.

    Args:
        chromium, chromedriver: paths of the programs. None is searched for or downloaded.
        profile: empty directory for the browser's data.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        driver.set_script_timeout(SCRIPT_SECONDS)
        yield driver
    finally:
        driver.quit()


class Page:
    """A new tab, without stored data, for the gateway's page.

    Args:
        driver: its browser. Other tabs are closed.
        timeout: default limit on waits, in seconds.
    """

    def __init__(self, driver: webdriver.Chrome, *, timeout: float = 10.0) -> None:
        self.driver = driver
        self.timeout = timeout
        before = driver.window_handles
        driver.switch_to.new_window("tab")
        here = driver.current_window_handle
        for handle in before:
            driver.switch_to.window(handle)
            driver.close()
        driver.switch_to.window(here)
        self.cdp("Page.addScriptToEvaluateOnNewDocument", source=PROBE)
        self._console: list[dict[str, Any]] = []
        self.console().clear()  # drop the entries of the previous tab

    def cdp(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command of the Chrome DevTools Protocol; returns its result."""
        answer: dict[str, Any] = self.driver.execute_cdp_cmd(command, arguments)
        return answer

    # Settings of the browser: before `open`

    def speak(self, *languages: str) -> None:
        """Set the user's preferred languages."""
        agent = self.js("return navigator.userAgent")
        self.cdp(
            "Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=",".join(languages)
        )

    def darken(self) -> None:
        """Prefer dark pages."""
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        self.cdp("Emulation.setEmulatedMedia", features=features)

    def be_phone(self, width: int = 360, height: int = 740) -> None:
        """Emulate a small touch screen."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2,
            mobile=True,
        )
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=True)

    # The page

    def open(self, port: int, *, ready: bool = True) -> None:
        """Load the page of a gateway; if `ready`, wait until its session is registered."""
        origin = f"http://127.0.0.1:{port}"
        self.cdp("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        self.driver.get(f"{origin}/")
        if ready:
            self.wait_connection("ready")

    def wait_connection(self, state: str) -> None:
        """Wait until the page shows this state of its connection."""
        self.wait(f"probe.connection() === {json.dumps(state)}", f"the connection is {state}")

    def js(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page; returns its result."""
        return self.driver.execute_script(script, *arguments)

    def js_async(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function in the page; returns its result.

        Raises:
            AssertionError: it threw; with the error and its stack.
        """
        ok, value = self.driver.execute_async_script(
            f"""
            const done = arguments[arguments.length - 1];
            (async (...args) => {{ {script} }})(...[...arguments].slice(0, -1)).then(
                (value) => done([true, value ?? null]),
                (error) => done([false, String(error?.stack ?? error)]),
            );
            """,
            *arguments,
        )
        if not ok:
            raise AssertionError(value)
        return value

    def wait(self, expression: str, what: str, timeout: float | None = None) -> Any:
        """Wait until an expression is true in the page; returns its value.

        Raises:
            PageWaitTimeout: it was not true in time; the message shows the answers.
        """
        seconds = self.timeout if timeout is None else timeout
        value = self.js_async(
            f"return await probe.until(() => ({expression}), {seconds * 1000}) || null"
        )
        if value is None:
            raise PageWaitTimeout(
                f"not within {seconds} s: {what}\n"
                f"Notice: {self.js('return probe.notice()')}\n"
                f"Answers: {json.dumps(self.answers(), ensure_ascii=False, indent=1)}"
            )
        return value

    # What the user does

    def type(self, *keys: str) -> None:
        """Press keys, one after the other, in the focused element."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def ask(self, text: str) -> None:
        """Type a text into the input, and press Enter."""
        self.driver.find_element(By.ID, "input").send_keys(text, Keys.ENTER)

    def click(self, selector: str) -> None:
        """Click on a visible element."""
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def write(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing."""
        field = self.driver.find_element(By.CSS_SELECTOR, selector)
        field.clear()
        field.send_keys(text)

    # What the user sees

    def answers(self) -> list[dict[str, Any]]:
        """The answers: their data attributes, `text`, `status`, and more."""
        answers: list[dict[str, Any]] = self.js("return probe.answers()")
        return answers

    def answer(self, number: int = -1) -> dict[str, Any]:
        """One of the answers; by default the latest."""
        return self.answers()[number]

    def wait_answer(
        self,
        condition: str,
        number: int = -1,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Wait until a condition on an answer `it` is true; returns the answer."""
        found: dict[str, Any] = self.wait(
            f"probe.answers().slice({number})[0] && probe.answers().slice({number})"
            f".filter((it, index) => index === 0 && ({condition}))[0]",
            f"answer {number}: {condition}",
            timeout,
        )
        return found

    def wait_text(self, chars: int = 20, number: int = -1) -> dict[str, Any]:
        """Wait until an answer streams and has at least this many characters."""
        return self.wait_answer(f"it.state === 'streaming' && it.text.length >= {chars}", number)

    def wait_state(self, state: str, number: int = -1) -> dict[str, Any]:
        """Wait until an answer has this state."""
        return self.wait_answer(f"it.state === {json.dumps(state)}", number)

    def shows(self, selector: str) -> bool:
        """Whether an element exists and is visible."""
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return bool(found) and found[0].is_displayed()

    def notice(self) -> str:
        """The text of the notice; empty if none is shown."""
        words: str = self.js("return probe.notice()")
        return words

    def screenshot(self, path: Path) -> Path:
        """Save the window's content as a PNG; returns its path."""
        assert self.driver.save_screenshot(str(path))
        return path

    def picture_of(self, selector: str) -> bytes:
        """A picture of an element, as a PNG."""
        picture: bytes = self.driver.find_element(By.CSS_SELECTOR, selector).screenshot_as_png
        return picture

    def boxes_among(self, text: str) -> str:
        """The characters of a text that no installed font has.

        A browser draws the same box for each of them, so they are found by their equal pictures.
        """
        boxes: str = self.js(
            """
            const { fontFamily } = getComputedStyle(document.body);
            const canvas = new OffscreenCanvas(48, 48);
            const pen = canvas.getContext("2d", { willReadFrequently: true });
            pen.font = `32px ${fontFamily}`;
            pen.textBaseline = "middle";
            const picture = (char) => {
                pen.clearRect(0, 0, 48, 48);
                pen.fillText(char, 8, 24);
                return pen.getImageData(0, 0, 48, 48).data.join();
            };
            const pictures = [...arguments[0]].map((char) => [char, picture(char)]);
            return pictures
                .filter(([char, one]) =>
                    pictures.some(([other, same]) => other !== char && same === one))
                .map(([char]) => char)
                .join("");
            """,
            text,
        )
        return boxes

    # Frames

    def sent(self, msg_type: str | None = None) -> list[dict[str, Any]]:
        """Frames that the page has sent since it was loaded."""
        frames: list[dict[str, Any]] = self.js("return probe.sent")
        return [frame for frame in frames if msg_type in (None, frame["msg_type"])]

    def received(self, msg_type: str | None = None) -> list[dict[str, Any]]:
        """Frames that the page has received since it was loaded."""
        frames: list[dict[str, Any]] = self.js("return probe.received")
        return [frame for frame in frames if msg_type in (None, frame["msg_type"])]

    # Console

    def console(self) -> list[dict[str, Any]]:
        """Entries of the browser's log since the tab was opened: `level`, `message`."""
        self._console += self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return self._console

    def faults(self) -> list[str]:
        """Errors in the page: logged errors, exceptions, alerts."""
        logged = [entry["message"] for entry in self.console() if entry["level"] == "SEVERE"]
        thrown: list[str] = self.js("return globalThis.probe ? [...probe.errors] : []")
        return logged + thrown
