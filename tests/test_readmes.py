"""The Markdown pages: links lead to files and headings, and a room's page lists its modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PAGES = [
    "README.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for folder in (".github", "actors", "gateway", "llm", "metrics", "tests")
        for path in (ROOT / folder).rglob("*.md")
        if "node_modules" not in path.parts
    ),
]

ROOMS = {
    "actors/README.md": ("actors", "actors/session"),
    "actors/loop/README.md": ("actors/loop",),
    "gateway/README.md": (
        "gateway",
        "gateway/access",
        "gateway/server",
        "gateway/settings",
        "gateway/wire",
    ),
    "gateway/web/README.md": ("gateway/web",),
    "gateway/web/client/README.md": ("gateway/web/client",),
    "llm/README.md": ("llm", "llm/chat", "llm/demo", "llm/http"),
    "metrics/README.md": ("metrics",),
}
"""The folders whose modules a page lists."""

INTERNAL = {
    "gateway/web/client/events.js",
    "gateway/web/client/ids.js",
    "gateway/web/client/log.js",
}
"""Modules that their package does not export."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", read(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def broken_links(page: str, text: str) -> list[str]:
    """The relative links in the text of a page that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists():
            broken.append(link)
        elif anchor:
            target = path.resolve().relative_to(ROOT).as_posix()
            if anchor not in anchors(target):
                broken.append(link)
    return broken


def unlisted(page: str, text: str) -> list[str]:
    """The modules of a page's rooms that its text does not name."""
    named = {name.rpartition("/")[2] for name in re.findall(r"`([\w./-]+\.(?:py|js))`", text)}
    return [
        path.relative_to(ROOT).as_posix()
        for room in ROOMS[page]
        for pattern in ("*.py", "*.js")
        for path in sorted((ROOT / room).glob(pattern))
        if path.name not in named
        and path.name != "__init__.py"
        and path.relative_to(ROOT).as_posix() not in INTERNAL
    ]


def test_all_pages_are_found() -> None:
    assert {*ROOMS, "README.md", "gateway/PROTOCOL.md", ".github/CONTRIBUTING.md"} <= {*PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_each_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    assert broken_links(page, read(page)) == []


@pytest.mark.parametrize("page", ROOMS)
def test_a_rooms_page_lists_each_module(page: str) -> None:
    assert unlisted(page, read(page)) == []


def test_a_broken_link_and_a_missing_module_are_noticed() -> None:
    text = "[a](loop/README.md) [b](loop/READMEE.md) [c](loop/README.md#windows) [d](#nowhere)"
    assert broken_links("actors/README.md", text) == ["loop/READMEE.md", "#nowhere"]
    text = read("actors/README.md").replace("`row.py`", "")
    assert unlisted("actors/README.md", text) == ["actors/row.py"]
