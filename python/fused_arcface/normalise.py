"""Rows divided by their norms, and the gradient back through that, in plain PyTorch."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

EPSILON = 1e-12
"""Least norm that a row is divided by."""


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which products keep their operands' dtype: cosines of bf16 would cost a quarter of a logit."""
    # Tensors without data have no autocast to turn off.
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def norms_of(rows: Tensor) -> Tensor:
    """(R, 1) norms of rows (R, D), squared and summed in fp64: fp32's would overflow from 2e19 on."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(rows.dtype)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (R, D) divided by ``max(norm, 1e-12)``."""
    return rows / norms_of(rows).clamp(min=EPSILON)


def unit_gradient(d_unit: Tensor, row: Tensor) -> Tensor:
    """Gradient by ``row`` (R, D) from that by ``row / max(|row|, 1e-12)``, same shape or (D,) for all."""
    norm = norms_of(row)
    unit = row / norm.clamp(min=EPSILON)
    along = (unit * d_unit).sum(1, keepdim=True).masked_fill(norm < EPSILON, 0)
    return (d_unit - unit * along) / norm.clamp(min=EPSILON)
