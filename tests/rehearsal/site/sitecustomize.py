"""Rehearses in every Python process: ranks, children, tests.

With this folder in PYTHONPATH the first `import torch` finds a CUDA made of the host's memory.
REHEARSAL=0 leaves torch as it is.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _Torch(importlib.abc.MetaPathFinder):
    """Finds torch once, and puts the device in around its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            importlib.import_module("tests.rehearsal.cuda.core")  # before torch asks for CUDA
            run(module)
            importlib.import_module("tests.rehearsal").install()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("REHEARSAL", "1") != "0":
    root = os.path.abspath(__file__)
    for _ in range(4):
        root = os.path.dirname(root)
    if root not in sys.path:
        sys.path.insert(0, root)
    sys.meta_path.insert(0, _Torch())
