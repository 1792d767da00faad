"""The web page: what the daemon serves of it, its types, and its library in Node."""

from __future__ import annotations

import functools
import http.client
import os
import re
import subprocess
from pathlib import Path

import pytest

from gateway.app import Gateway
from gateway.server.pages import WEB
from tests.tools import find_tool

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "web"

TYPESCRIPT = "typescript@5.9"

NODE_SECONDS = 50
TYPESCRIPT_SECONDS = 170

SERVED = {
    "/": "text/html; charset=utf-8",
    "/index.html": "text/html; charset=utf-8",
    "/style.css": "text/css; charset=utf-8",
    "/icon.svg": "image/svg+xml",
    **{f"/{path.name}": "text/javascript; charset=utf-8" for path in WEB.glob("*.js")},
}


def get(
    gateway: Gateway, path: str, headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.server.port, timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@functools.cache
def policy(text: str) -> dict[str, list[str]]:
    """A Content-Security-Policy, as sources by directive."""
    directives = (part.split() for part in text.split(";"))
    return {name: sources for name, *sources in directives}


# What is served


@pytest.mark.parametrize("path", SERVED)
def test_each_file_is_served_with_its_type_and_as_it_is(gateway: Gateway, path: str) -> None:
    response, body = get(gateway, path)
    assert response.status == 200
    assert response.headers["Content-Type"] == SERVED[path]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert "microphone=()" in response.headers["Permissions-Policy"]
    assert body == (WEB / (path.lstrip("/") or "index.html")).read_bytes()


@pytest.mark.parametrize("path", SERVED)
def test_the_policy_lets_in_nothing_but_the_pages_own_files(gateway: Gateway, path: str) -> None:
    response, _ = get(gateway, path)
    rules = policy(response.headers["Content-Security-Policy"])
    assert rules["default-src"] == ["'none'"]
    assert rules["script-src"] == rules["style-src"] == ["'self'"]
    assert rules["connect-src"] == ["'self'", "ws:", "wss:"]
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert rules["require-trusted-types-for"] == ["'script'"]
    assert not any("unsafe" in source for sources in rules.values() for source in sources)


def test_a_file_that_is_known_is_not_sent_again(gateway: Gateway) -> None:
    first, _ = get(gateway, "/page.js")
    assert first.headers["Cache-Control"] == "no-cache"
    etag = first.headers["ETag"]
    again, body = get(gateway, "/page.js", {"If-None-Match": f'W/"x", {etag}'})
    assert (again.status, body, again.headers["ETag"]) == (304, b"", etag)
    other, body = get(gateway, "/style.css", {"If-None-Match": etag})
    assert other.status == 200
    assert body


def test_a_query_does_not_matter(gateway: Gateway) -> None:
    assert get(gateway, "/?lang=zh")[0].status == 200


@pytest.mark.parametrize(
    "path",
    (
        "/README.md",
        "/tsconfig.json",
        "/package.json",
        "/../pages.py",
        "/..%2fpages.py",
        "/%2e%2e/pages.py",
        "/web/../../setup.cfg",
        "/./page.js",
        "//page.js",
        "/page.js/",
        "/page.js%00.css",
        "/PAGE.JS",
        "/.",
        "//etc/passwd",
        "/..\\pages.py",
    ),
)
def test_nothing_else_is_served(gateway: Gateway, path: str) -> None:
    response, body = get(gateway, path)
    assert response.status == 404
    assert b"import" not in body


def test_a_page_from_elsewhere_is_not_told(gateway: Gateway) -> None:
    assert get(gateway, "/", {"Origin": "https://evil.example"})[0].status == 403
    assert get(gateway, "/", {"Host": "evil.example"})[0].status == 403


# What is in the files


def test_the_page_has_no_script_or_style_of_its_own_and_loads_nothing_from_elsewhere() -> None:
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>", page) == ['<script type="module" src="page.js">']
    assert "<style" not in page
    assert not re.findall(r"\s(?:style|on\w+)=", page)
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {f"/{link}" for link in links} <= SERVED.keys()


def test_modules_import_only_what_is_served_and_never_make_html() -> None:
    for path in WEB.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        for name in re.findall(r'(?:from|import)\s*\(?"([^"]+)"', source):
            assert name.removeprefix(".") in SERVED, f"{path.name} imports {name}"
        assert not re.search(r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write", source)
        assert not re.search(r"https?://", source), f"{path.name} names an address"


def test_the_library_needs_no_page() -> None:
    names = ("websocket-client", "message-service", "events", "ids", "log")
    for name in names:
        source = (WEB / f"{name}.js").read_text(encoding="utf-8")
        code = re.sub(r"/\*.*?\*/|//[^\n]*", "", source, flags=re.S)
        assert not re.search(r"\b(?:document|window|navigator|localStorage)\b", code), name


def test_the_console_lines_are_there_word_for_word() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in WEB.glob("*.js"))
    for line in (
        "[MessageService] 开始接收响应 - 请求ID: ${",
        "[MessageService] 检测到新输入，打断当前响应",
        "[MessageService] 发送打断信号 - 请求ID: ${",
        "[WebSocket] 发送打断请求: ${",
        "[WebSocket] 收到打断确认: ${",
    ):
        assert line in sources


# In Node


def run(command: list[str], seconds: float) -> None:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def test_the_library_passes_its_own_tests() -> None:
    node = find_tool("node", "nodejs")
    run([node, "--test", *sorted(map(str, TESTS.glob("*.test.js")))], NODE_SECONDS)


@pytest.mark.timeout(2 * TYPESCRIPT_SECONDS + 10)
def test_the_types_are_right(tmp_path: Path) -> None:
    npm = find_tool("npm", "npm")
    node = find_tool("node", "nodejs")
    quiet = ("--silent", "--no-audit", "--no-fund")
    places = ("--prefix", str(tmp_path), "--cache", str(tmp_path / "cache"))
    try:
        run([npm, "install", *quiet, *places, TYPESCRIPT], TYPESCRIPT_SECONDS)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{TYPESCRIPT} cannot be had from npm, no types were checked: {error}")
    compiler = tmp_path / "node_modules" / "typescript" / "bin" / "tsc"
    run([node, str(compiler), "-p", str(WEB)], TYPESCRIPT_SECONDS)
