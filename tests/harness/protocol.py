"""`gateway.wire.protocol`, under a name that nobody else has.

Whoever tests a client may well have a package `gateway` of their own, which Python finds first. So
the file is loaded by its place then; the module that is imported from here is that of the gateway
itself wherever it can be, and there is only one.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .process import ROOT

if TYPE_CHECKING:
    from gateway.wire.protocol import *  # noqa: F403


def _load() -> ModuleType:
    folder = ROOT / "gateway"
    package = importlib.util.find_spec("gateway")  # runs nothing of a foreign one
    origin = package.origin if package else None
    if origin and Path(origin).exists() and (folder / "__init__.py").samefile(origin):
        return importlib.import_module("gateway.wire.protocol")
    spec = importlib.util.spec_from_file_location(__name__, folder / "wire" / "protocol.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = module  # msgspec looks there for what annotations name
    spec.loader.exec_module(module)
    return module


sys.modules[__name__] = _load()
