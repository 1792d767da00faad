"""The name that the command line calls itself by, in help, errors and advice."""

from __future__ import annotations

import sys
from pathlib import Path

_FILE = "run.py"


def program() -> str:
    """The word to type for this program: `run.py` where Python was given that file, as in a
    checkout, and `bargein` elsewhere.

    `python -m bargein.run` has the same file name in `sys.argv`, but an installed `bargein` has no
    run.py in the user's folder: there `__main__` has a `__spec__`, and a file that is run has none.
    """
    # Debuggers run a file in a `__main__` of their own making, without a `__spec__`.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_file = Path(sys.argv[0]).name == _FILE and spec is None
    return _FILE if is_file else "bargein"
