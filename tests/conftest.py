"""Without a CUDA device, Triton kernels are tested in Triton's interpreter.

Triton decides that where a kernel is decorated, so it has to be said before anything imports Triton.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def load_script() -> Callable[[Path, str], ModuleType]:
    """Loads a file that is on no import path, such as the harness of the benchmarks, under a name of its own."""

    def load(path: Path, name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load
