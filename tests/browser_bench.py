"""Measures an interrupt in Chromium: `python -m tests.browser_bench`.

It measures the time from a click on Stop to the last painted character, and prints the gateway's
time from reading INTERRUPT to closing the provider's stream beside it. It observes the page from
outside of the page's scripts: each change of the old answer's text, and the first moment after the
frame that painted it. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Any

from selenium.webdriver.common.keys import Keys

from tests.browser import Page, run_browser
from tests.harness import run_gateway

QUESTION = "Please tell me a very long story"

WINDOW_MS = 250
"""How long an answer is watched after each click."""

_WATCH = f"""
    const element = probe.elements().at(-1).querySelector(".text");
    const paints = [];
    new MutationObserver(() => {{
        // The frame is painted after its callbacks, and a message is handled after that.
        const {{ port1, port2 }} = new MessageChannel();
        port1.onmessage = () => {{ port1.close(); paints.push(performance.now()); }};
        port2.postMessage(null);
    }}).observe(element, {{ childList: true, characterData: true, subtree: true }});
    probe.paints = paints;
    probe.stopped = new Promise((resolve) => {{
        const act = (event) => {{
            if (event.type === "keydown" && event.key !== "Escape" && event.key !== "Enter") return;
            for (const type of ["click", "keydown"]) removeEventListener(type, act, true);
            const [at, heard] = [event.timeStamp, performance.now()];
            const count = [...element.textContent].length;
            setTimeout(() => resolve({{
                grown: [...element.textContent].length - count,
                before: at - (paints.findLast((paint) => paint <= at) ?? at),
                late: Math.max(0, (paints.at(-1) ?? 0) - at),
                heard: heard - at,
            }}), {WINDOW_MS});
        }};
        for (const type of ["click", "keydown"]) addEventListener(type, act, true);
    }});
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.browser_bench", description=__doc__)
    parser.add_argument("--interrupts", type=int, default=50, metavar="N")
    parser.add_argument("--rate", type=float, default=100, help="tokens per second of the story")
    options = parser.parse_args(arguments)
    chromium, chromedriver = which("chromium"), which("chromedriver")
    if chromium is None or chromedriver is None:
        parser.error("chromium and chromedriver are required (Debian: chromium, chromium-driver)")
    print(f"load of the machine before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    print(f"{options.interrupts} interrupts each, a story at {options.rate:g} tokens/s; ms")
    print(f"{'':34}{'median':>8}{'p95':>8}{'max':>8}")
    with (
        tempfile.TemporaryDirectory() as profile,
        run_gateway(model=f"story:{options.rate:g}", log_level="warning") as gateway,
        run_browser(chromium, chromedriver, Path(profile)) as driver,
    ):
        for act in ("Stop button", "Escape", "new message"):
            page = Page(driver)
            page.open(gateway.port)
            rounds = [_interrupt(page, act) for _ in range(options.interrupts)]
            _print(act, "click to last painted character", [one["late"] for one in rounds])
            _print("", "  painted last before the click", [one["before"] for one in rounds])
            _print("", "click to the page's handler", [one["heard"] for one in rounds])
            _print("", "gateway: stream_closed_ms", [one["closed"] for one in rounds])
            _print("", "page: INTERRUPT to its ack", [one["round_trip"] for one in rounds])
            late = sum(one["late"] > 0 for one in rounds)
            grown = sum(one["grown"] for one in rounds)
            print(f"  painted after the click: {late} of {len(rounds)}; characters added: {grown}")
    print(f"load of the machine after: {os.getloadavg()[0]:.2f}")
    return 0


def _interrupt(page: Page, act: str) -> dict[str, float]:
    """Interrupt one streaming answer; returns the times, in milliseconds."""
    if not page.answers() or page.answer()["state"] != "streaming":
        page.ask(QUESTION)
    page.wait_text(40)
    number = len(page.answers()) - 1
    page.js(_WATCH)
    page.wait("probe.paints.length > 2", "the answer is painted")
    if act == "new message":
        page.ask(QUESTION)
    elif act == "Escape":
        page.type(Keys.ESCAPE)
    else:
        page.click("#stop")
    seen: dict[str, Any] = page.js_async("return await probe.stopped")
    it = page.wait_answer("it.state === 'interrupted' && it.roundTripMs", number)
    return seen | {"closed": float(it["streamClosedMs"]), "round_trip": float(it["roundTripMs"])}


def _print(act: str, what: str, values: Sequence[float]) -> None:
    if act:
        print(act)
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
    print(f"  {what:32}{statistics.median(values):8.1f}{p95:8.1f}{max(values):8.1f}")


if __name__ == "__main__":
    raise SystemExit(main())
