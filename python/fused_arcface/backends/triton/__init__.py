"""The stages on NVIDIA GPUs, in Triton. Shapes as in backends/torch.py; the passes over the classes are in stages.py.

``import triton`` in this package is absolute and means the compiler of that name, never this package. Without that
compiler the package still imports, so that :func:`unavailable` can say what is missing.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import nvidia
from ..torch import finish_negatives  # noqa: F401

_LEAST_TRITON = (3, 4)
"""Oldest Triton that the kernels are compiled with in the tests' reach."""


def _missing_compiler() -> str | None:
    needed = ".".join(map(str, _LEAST_TRITON))
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"the package triton (>= {needed}) cannot be imported: {error}"
    try:
        found = version("triton")
    except PackageNotFoundError:  # a build that left no metadata: let it try
        return None
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST_TRITON:
        return f"triton >= {needed} is needed; found {found}"
    return None


_compiler_reason = _missing_compiler()

if _compiler_reason is None:
    from .margin import margin_loss  # noqa: F401
    from .permutation import Permutation  # noqa: F401
    from .stages import class_max, class_stats, update_centers, weight_grad  # noqa: F401
    from .targets import embedding_grad, target_cosine, unit_embedding_grad  # noqa: F401


@functools.cache
def _driver_reason() -> str | None:
    """Return why Triton cannot start on this machine, or None: it builds a small C library for its first launch."""
    try:
        _ = importlib.import_module("triton").runtime.driver.active.utils
    except Exception as error:  # the compiler's and the driver's own errors have many types
        return (
            f"Triton cannot start here: {type(error).__name__}: {error}. It needs a C compiler (gcc or clang, on the "
            "PATH or named by CC), Python's headers, and NVIDIA's driver"
        )
    return None


def unavailable(device: torch.device | None = None) -> str | None:
    """Return why this backend cannot run on a GPU, by default the current one; or None."""
    return nvidia.unavailable(device) or _compiler_reason or _driver_reason()
