"""The stages on NVIDIA GPUs, in Triton. Shapes as in backends/reference.py; what runs where is in stages.py.

``import triton`` in this package is absolute and means the compiler of that name, never this package. Without that
compiler the package still imports, so that :func:`unavailable` can say what is missing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import torch

_LEAST_TRITON = (3, 4)
"""Oldest Triton that the kernels are compiled with in the tests' reach."""
_LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bf16 tensor cores, which the second product needs (tiles.py)."""


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
    from .stages import (
        class_max,
        class_stats,
        embedding_grad,
        margin_loss,
        target_cosine,
        unit_embedding_grad,
        update_centres,
        weight_grad,
    )


def unavailable() -> str | None:
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs; this torch is built for AMD's"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        needed, found = (".".join(map(str, pair)) for pair in (_LEAST_CAPABILITY, capability))
        return f"a GPU of compute capability >= {needed} is needed; {torch.cuda.get_device_name()} has {found}"
    return _compiler_reason


__all__ = [
    "class_max",
    "class_stats",
    "embedding_grad",
    "margin_loss",
    "target_cosine",
    "unavailable",
    "unit_embedding_grad",
    "update_centres",
    "weight_grad",
]
