"""Where kernels run: on a GPU, or without one in Triton's interpreter.

Import this before anything that imports Triton, which asks for the variable as it is loaded.
"""

import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# Marks for a test of kernels, wherever it runs.
KERNELS = [pytest.mark.gpu] if torch.cuda.is_available() else []

if torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    DEVICE = torch.device("cpu")
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError(
            "Triton is loaded already and will not interpret kernels; import this module first"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@contextmanager
def _without_type_checks() -> Iterator[None]:
    """Import kernels as they are: Triton finds no globals of theirs behind jaxtyping's wrappers."""
    finders = list(sys.meta_path)
    sys.meta_path[:] = [
        finder for finder in finders if type(finder).__module__ != "jaxtyping._import_hook"
    ]
    try:
        yield
    finally:
        sys.meta_path[:] = finders


def _load_kernels() -> None:
    package = importlib.import_module("flatlora.ops")
    importlib.import_module("flatlora.ops.quantised")  # with type checks, unlike its kernels
    for module in pkgutil.iter_modules(package.__path__, "flatlora.ops."):
        if module.name.endswith("kernels"):
            with _without_type_checks():
                importlib.import_module(module.name)


if importlib.util.find_spec("triton") is not None:
    _load_kernels()
