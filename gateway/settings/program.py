"""The command that help and error texts name."""

from __future__ import annotations

import sys
from pathlib import PurePath


def program() -> str:
    """Return "run.py" in a checkout that runs this file, and "bargein" otherwise."""
    return "run.py" if sys.argv and PurePath(sys.argv[0]).name == "run.py" else "bargein"
