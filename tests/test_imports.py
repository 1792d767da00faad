"""No circle of files, those of a package and of its own `__init__.py` included.

`.ci/importlinter.ini` has the rules for rooms and folders; of circles it sees those between
siblings only.
"""

from __future__ import annotations

import graphlib

import grimp


def test_no_circle_of_files() -> None:
    graph = grimp.build_graph("gateway", "actors", "llm", "metrics", "tests", cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert "gateway.settings.settings" in imported["gateway.app"]
    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError, which names the files
