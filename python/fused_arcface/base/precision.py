"""Read and set whether fp32 matrix products may round their operands to tf32.

torch has two interfaces for it. The older one, ``torch.get_float32_matmul_precision``, raises an error after the newer
one, ``fp32_precision``, was set. So the newer one is used if torch has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def allows_tf32() -> bool:
    """Return whether fp32 products on a GPU may be computed in tf32."""
    newer = [getattr(each, "fp32_precision", None) for each in (torch.backends.cuda.matmul, torch.backends)]
    if newer[0] is None:  # torch 2.8
        return torch.get_float32_matmul_precision() != "highest"
    return next((each for each in newer if each not in (None, "none")), "ieee") == "tf32"


@contextlib.contextmanager
def fp32_products(tf32: bool) -> Iterator[None]:
    """Allow or forbid tf32 within the block, on every device; the setting is put back afterwards.

    >>> with fp32_products(tf32=True):
    ...     allows_tf32()
    True
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    earlier = [each.fp32_precision for each in settings]
    for each in settings:
        each.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for each, precision in zip(settings, earlier, strict=True):
            each.fp32_precision = precision
