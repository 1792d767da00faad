"""The web page and its client library: what the daemon serves, and the modules in Node."""

from __future__ import annotations

import functools
import http.client
import json
import re
import subprocess
from pathlib import Path
from urllib.parse import urljoin

import pytest

from gateway.app import Gateway
from gateway.server.pages import CLIENT, WEB
from tests.tools import find_tool

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "web"

NODE_SECONDS = 50

VERSION = json.loads((CLIENT / "package.json").read_bytes())["version"]

SCRIPT = "text/javascript; charset=utf-8"

PAGE = {
    "/": "text/html; charset=utf-8",
    "/index.html": "text/html; charset=utf-8",
    "/style.css": "text/css; charset=utf-8",
    "/icon.svg": "image/svg+xml",
    **{f"/{path.name}": SCRIPT for path in WEB.glob("*.js")},
    **{f"/client/{path.name}": SCRIPT for path in CLIENT.glob("*.js")},
}
"""Content types of the page and its modules, by path."""

RELEASE = {f"/client/{VERSION}/{path.name}": SCRIPT for path in CLIENT.glob("*.js")}
"""Content types of the library under the path with its version."""

SERVED = PAGE | RELEASE


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
    name = path.replace(f"/{VERSION}/", "/").lstrip("/") or "index.html"
    assert body == (WEB / name).read_bytes()


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


@pytest.mark.parametrize("path", PAGE)
def test_a_browser_checks_the_pages_files_each_time(gateway: Gateway, path: str) -> None:
    response, _ = get(gateway, path)
    assert response.headers.get_all("Cache-Control") == ["no-cache"]


@pytest.mark.parametrize("path", RELEASE)
def test_a_browser_may_keep_a_release_of_the_library(gateway: Gateway, path: str) -> None:
    response, _ = get(gateway, path)
    assert response.headers.get_all("Cache-Control") == ["public, max-age=31536000, immutable"]


@pytest.mark.parametrize("path", ("/page.js", f"/client/{VERSION}/index.js"))
def test_a_file_that_is_known_is_not_sent_again(gateway: Gateway, path: str) -> None:
    first, _ = get(gateway, path)
    etag = first.headers["ETag"]
    again, body = get(gateway, path, {"If-None-Match": f'W/"x", {etag}'})
    assert (again.status, body, again.headers["ETag"]) == (304, b"", etag)
    assert again.headers["Cache-Control"] == first.headers["Cache-Control"]
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
        "/client",
        "/client/",
        "/client/package.json",
        "/client/index.d.ts",
        "/client/LICENSE",
        "/client/0.0.1/index.js",
        f"/client/{VERSION}",
        f"/client/{VERSION}/",
        f"/client/{VERSION}/package.json",
        f"/client/{VERSION}/page.js",
        f"/client/{VERSION}/../index.js",
        f"/{VERSION}/index.js",
        "/client/../page.js",
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


def test_a_page_of_another_origin_gets_403(gateway: Gateway) -> None:
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


def code_of(path: Path) -> str:
    """The source of a module without its comments."""
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.S)


def imports_of(path: Path) -> list[str]:
    """What a module imports, as written."""
    return re.findall(r'(?:from|import)\s*\(?"([^"]+)"', code_of(path))


def test_the_page_and_a_release_each_import_every_module_from_one_address() -> None:
    def graph(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            url = queue.pop()
            if url in seen:
                continue
            seen.add(url)
            file = WEB / url.replace(f"/{VERSION}/", "/").lstrip("/")
            queue += [urljoin(url, name) for name in imports_of(file)]
        return seen

    scripts = {path for path, kind in PAGE.items() if kind == SCRIPT}
    assert graph("/page.js") == scripts
    assert graph(f"/client/{VERSION}/index.js") == RELEASE.keys()


def test_modules_never_make_html_and_name_no_address() -> None:
    for path in (*WEB.glob("*.js"), *CLIENT.glob("*.js")):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write", source)
        assert not re.search(r"https?://", source), f"{path.name} names an address"


def test_the_library_needs_no_page() -> None:
    for path in CLIENT.glob("*.js"):
        found = re.search(r"\b(?:document|window|navigator|localStorage)\b", code_of(path))
        assert not found, path.name
        assert all(re.fullmatch(r"\./[a-z-]+\.js", name) for name in imports_of(path)), path.name


def test_the_console_lines_of_the_readme_are_there_word_for_word() -> None:
    readme = (WEB / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(\[\w+\] .*?)(?:req_…)?(?: {3,}.*)?$", readme, flags=re.M)
    assert len(lines) == 6
    sources = "".join(path.read_text(encoding="utf-8") for path in CLIENT.glob("*.js"))
    for line in lines:
        assert re.search(f'["`]{re.escape(line)}["`$]', sources), line


# In Node


def test_the_library_passes_its_own_tests() -> None:
    node = find_tool("node", "nodejs")
    done = subprocess.run(
        [node, "--test", *sorted(map(str, TESTS.glob("*.test.js")))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=NODE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
