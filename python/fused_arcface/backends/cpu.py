"""The stages on the CPU: the compiled kernels of csrc/cpu, given raw addresses. Shapes as in backends/torch.py."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..base.dtypes import compute_dtype
from ..engine.terms import PLAIN, CenterStep, Negatives, RowGradients
from . import native

# O(N·D) and less: PyTorch does these as well as a kernel would.
from .torch import embedding_grad, margin_loss, target_cosine, unit_embedding_grad  # noqa: F401


def unavailable() -> str | None:
    """Return why this backend cannot run here, or None."""
    if native.unavailable() is not None:
        return native.unavailable()
    asked, isas = os.environ.get("FUSED_ARCFACE_ISA", ""), native.module.isas()
    if asked and asked not in isas:
        return f"FUSED_ARCFACE_ISA={asked} names none of this machine's instruction sets: {', '.join(isas)}"
    return None


def isa() -> str:
    """Return the instruction set in use: the one that FUSED_ARCFACE_ISA names, or the best of this machine."""
    return os.environ.get("FUSED_ARCFACE_ISA") or native.module.isas()[0]


def describe() -> str:
    """Return the instruction set in use, and the others that this machine has kernels for."""
    return f"{isa()} (on this machine: {', '.join(native.module.isas())}; FUSED_ARCFACE_ISA chooses)"


def multiply_adds(rounds: int) -> int:
    """Flops of ``rounds`` vector multiply-adds on all of torch's threads, in registers alone: timed, the FMA peak."""
    return native.module.multiply_adds(isa(), rounds, torch.get_num_threads())


def _native_negatives(negatives: Negatives, threshold: Tensor | None) -> tuple[int, int, float, float, float]:
    """``threshold``: the row's thresholds in the compute dtype, which the caller keeps alive."""
    a, b, d = (0.0, 1.0, 0.0) if negatives.coefficients is None else negatives.coefficients.tolist()
    return negatives.sub_centers, native.address(threshold), a, b, d


def _thresholds(negatives: Negatives, dtype: torch.dtype) -> Tensor | None:
    return None if negatives.threshold is None else negatives.threshold.to(dtype).contiguous()


def _run_class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    maximum: Tensor,
    total: Tensor | None,
    center_sum: Tensor | None,
    negatives: Negatives,
) -> None:
    # Bound to names: a temporary's memory would be gone before the kernel reads it.
    target = target.contiguous()
    shift = None if shift is None else shift.contiguous()
    threshold = _thresholds(negatives, maximum.dtype)
    native.module.class_stats(
        isa(),
        maximum.dtype == torch.float64,
        native.matrix(embeddings),
        native.matrix(weight),
        target.data_ptr(),
        scale,
        native.address(shift),
        maximum.data_ptr(),
        native.address(total),
        native.address(center_sum),
        torch.get_num_threads(),
        _native_negatives(negatives, threshold),
    )


def class_max(embeddings: Tensor, weight: Tensor, target: Tensor, negatives: Negatives = PLAIN) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.class_max`."""
    maximum = torch.empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))
    if embeddings.shape[0] > 0:
        _run_class_stats(embeddings, weight, target, 1.0, None, maximum, None, None, negatives)
    return maximum


def class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    negatives: Negatives = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :func:`fused_arcface.backends.torch.class_stats`."""
    dtype = compute_dtype(embeddings, weight)
    total, maximum = torch.empty(embeddings.shape[0], dtype=dtype), torch.empty(embeddings.shape[0], dtype=dtype)
    center_sum = torch.empty(embeddings.shape if with_center_sum else 0, dtype=dtype)
    if embeddings.shape[0] > 0:
        wanted = center_sum if with_center_sum else None
        _run_class_stats(embeddings, weight, target, scale, shift, maximum, total, wanted, negatives)
    return total, maximum, center_sum


def weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    negatives: Negatives = PLAIN,
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.weight_grad`."""
    if embeddings.shape[0] == 0:
        return torch.zeros_like(weight)
    target, gradients = target.contiguous(), gradients.contiguous()
    threshold = _thresholds(negatives, gradients.negative_coefficient.dtype)
    d_weight = torch.empty_like(weight)
    native.module.weight_grad(
        isa(),
        gradients.negative_coefficient.dtype == torch.float64,
        native.matrix(embeddings),
        native.matrix(weight),
        target.data_ptr(),
        *native.row_gradients(gradients),
        native.matrix(d_weight),
        torch.get_num_threads(),
        _native_negatives(negatives, threshold),
    )
    return d_weight


def update_centers(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    step: CenterStep,
    negatives: Negatives = PLAIN,
) -> None:
    """Implement :func:`fused_arcface.backends.torch.update_centers`."""
    if not step.active:
        return
    target, gradients = target.contiguous(), gradients.contiguous()
    threshold = _thresholds(negatives, gradients.negative_coefficient.dtype)
    native.module.update_centers(
        isa(),
        gradients.negative_coefficient.dtype == torch.float64,
        native.matrix(embeddings),
        native.matrix(weight),
        target.data_ptr(),
        *native.row_gradients(gradients),
        native.center_step(step, weight),
        torch.get_num_threads(),
        _native_negatives(negatives, threshold),
    )
