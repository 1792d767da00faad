"""Early pytest plugin (`-p tests.patched`): patches the process before `ssl` is imported."""

import run  # noqa: F401 - patching is the first thing it does
