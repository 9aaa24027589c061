"""Rows divided by their norms, and the gradient back through that, in plain PyTorch."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

EPSILON = 1e-12
"""Least norm that a row is divided by."""


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which products keep their operands' dtype.

    Cosines in bf16 would cost a quarter of a logit.
    """
    # Tensors without data have no autocast to turn off.
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _shortened(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (R, D) times a power of two each, and that power (R, 1).

    It is 1 except for rows with squares, or a norm, that may pass the dtype's range. Those stay longer than 1e-12.
    """
    exponent = 1024 if rows.dtype == torch.float64 else 128
    largest = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=1, keepdim=True)
    short, long = torch.ones_like(largest), torch.full_like(largest, 2.0 ** -(exponent // 2 + 28))
    power = torch.where(largest > 2.0 ** (exponent // 2), long, short)
    return rows * power, power


def _norms(rows: Tensor) -> Tensor:
    """Return norms (R, 1) fp64 of rows that are :func:`_shortened`."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)


def norms_of(rows: Tensor) -> Tensor:
    """Return norms (R, 1) of rows (R, D), in their dtype: infinite where that cannot hold it."""
    rows, power = _shortened(rows)
    return (_norms(rows) / power.double()).to(rows.dtype)


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows (R, D) of any norm divided by ``max(norm, 1e-12)``."""
    rows, _ = _shortened(rows)
    return rows / _norms(rows).to(rows.dtype).clamp(min=EPSILON)


def unit_gradient(d_unit: Tensor, row: Tensor) -> Tensor:
    """Return the gradient by ``row`` (R, D), given the gradient by ``row / max(|row|, 1e-12)``, (R, D) or (D,)."""
    row, power = _shortened(row)
    norm = _norms(row).to(row.dtype)
    unit = row / norm.clamp(min=EPSILON)
    along = (unit * d_unit).sum(1, keepdim=True).masked_fill(norm < EPSILON, 0)
    return (d_unit - unit * along) / norm.clamp(min=EPSILON) * power


def stored_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient by rows (R, D) in their dtype, laid out as they are.

    A number that overflows in fp16 becomes infinite, so that a ``GradScaler`` sees it. A row shorter than 1e-12 is
    divided by that constant, and no loss scale makes up for it: its finite numbers saturate.
    """
    if rows.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        saturates = (norms_of(rows.float()) < EPSILON) & gradient.isfinite()
        gradient = torch.where(saturates, gradient.clamp(-limit, limit), gradient)
    return torch.empty_like(rows).copy_(gradient)
