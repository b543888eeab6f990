"""Modules that stand in for an engine's: made by name, with the packages around them."""

from __future__ import annotations

import sys
from types import ModuleType


def module_of(path: str) -> ModuleType:
    """The module of this name, and the packages around it."""
    if path not in sys.modules:
        sys.modules[path] = ModuleType(path)
        sys.modules[path].__path__ = []
        parent, _, name = path.rpartition(".")
        if parent:
            setattr(module_of(parent), name, sys.modules[path])
    return sys.modules[path]
