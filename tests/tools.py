"""Programs that some tests need and pip does not install."""

from __future__ import annotations

import os
import shutil

import pytest


def find_tool(name: str, package: str) -> str:
    """The path of a program. Without it a test is skipped; in CI, where it must be there, it fails.

    Args:
        name: of the program.
        package: what Debian calls the package that has it.
    """
    path = shutil.which(name)
    if path is None:
        words = f"{name} is not installed (Debian's package {package}): nothing was checked"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    return path
