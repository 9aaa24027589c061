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


def _shortened(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R, D) times a power of two each, and that power (R, 1): 1 but for rows whose squares, or whose norm, may
    pass the dtype's range. What is left of those is still longer than 1e-12."""
    exponent = 1024 if rows.dtype == torch.float64 else 128
    largest = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=1, keepdim=True)
    short, long = torch.ones_like(largest), torch.full_like(largest, 2.0 ** -(exponent // 2 + 28))
    power = torch.where(largest > 2.0 ** (exponent // 2), long, short)
    return rows * power, power


def _norms(rows: Tensor) -> Tensor:
    """(R, 1) fp64 norms of rows that are :func:`_shortened`."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)


def norms_of(rows: Tensor) -> Tensor:
    """(R, 1) norms of rows (R, D), in their dtype: infinite where that cannot hold it."""
    rows, power = _shortened(rows)
    return (_norms(rows) / power.double()).to(rows.dtype)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (R, D) of any norm divided by ``max(norm, 1e-12)``."""
    rows, _ = _shortened(rows)
    return rows / _norms(rows).to(rows.dtype).clamp(min=EPSILON)


def unit_gradient(d_unit: Tensor, row: Tensor) -> Tensor:
    """Gradient by ``row`` (R, D) from that by ``row / max(|row|, 1e-12)``, same shape or (D,) for all."""
    row, power = _shortened(row)
    norm = _norms(row).to(row.dtype)
    unit = row / norm.clamp(min=EPSILON)
    along = (unit * d_unit).sum(1, keepdim=True).masked_fill(norm < EPSILON, 0)
    return (d_unit - unit * along) / norm.clamp(min=EPSILON) * power


def stored_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """The gradient by rows (R, D) in their dtype, laid out as they are.

    What overflows in fp16 becomes infinite, so that a ``GradScaler`` sees it. A row shorter than 1e-12 is divided by
    that constant, which no loss scale makes up for: there finite numbers saturate.
    """
    if rows.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        saturates = (norms_of(rows.float()) < EPSILON) & gradient.isfinite()
        gradient = torch.where(saturates, gradient.clamp(-limit, limit), gradient)
    return torch.empty_like(rows).copy_(gradient)
