"""The stages on the CPU: the compiled kernels of csrc/cpu, given raw addresses. Shapes as in backends/torch.py."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..base.dtypes import compute_dtype
from ..engine.terms import MOMENTS, PLAIN, CenterStep, Negatives, RowGradients
from . import native


def unavailable(device: torch.device | None = None) -> str | None:
    """Return why this backend cannot run here, or None."""
    if native.unavailable() is not None:
        return native.unavailable()
    try:
        isa()
    except ValueError:  # not by os.environ in each step: it takes half a microsecond
        asked = os.environ.get("FUSED_ARCFACE_ISA")
        return f"FUSED_ARCFACE_ISA={asked} names none of this machine's instruction sets: {', '.join(_isas())}"
    return None


@functools.cache
def _isas() -> list[str]:
    """Return this machine's instruction sets, the best first."""
    return native.module.isas()


def isa() -> str:
    """Return the instruction set in use: the one that FUSED_ARCFACE_ISA names, or the best of this machine."""
    return native.module.isa()


def describe() -> str:
    """Return the instruction set in use, and the others that this machine has kernels for."""
    return f"{isa()} (on this machine: {', '.join(_isas())}; FUSED_ARCFACE_ISA chooses)"


def multiply_adds(rounds: int, dtype: torch.dtype = torch.float32) -> int:
    """Make ``rounds`` vector multiply-adds in registers on all of torch's threads, and return their flops.

    Their time gives the peak of products in ``dtype``.
    """
    return native.module.multiply_adds(native.dtype_code(dtype), rounds, torch.get_num_threads())


allow_bf16_products = True
"""If true, bf16 embeddings are multiplied in bf16 where the instruction set has such products. If false, 16-bit rows
are converted and multiplied in fp32."""


def multiplies_bf16() -> bool:
    """Return true if the instruction set in use multiplies bf16 and :data:`allow_bf16_products` allows it."""
    return allow_bf16_products and native.module.has_products(native.module.BFLOAT16)


def _product_code(embeddings: Tensor, compute: torch.dtype) -> int:
    """Return the code of the dtype of these embeddings' products. Their sums are in ``compute``."""
    in_bf16 = embeddings.dtype == torch.bfloat16 and compute == torch.float32 and multiplies_bf16()
    return native.dtype_code(torch.bfloat16 if in_bf16 else compute)


_NativeNegatives = tuple[
    int, int, tuple[float, float, float, float], tuple[float, float, float, float, float, bool] | None
]
_PLAIN: _NativeNegatives = (1, 0, (0.0, 1.0, 0.0, 0.0), None)


def _native_negatives(negatives: Negatives, by_bias: bool = False) -> _NativeNegatives:
    """Return negatives in the form that the kernels take.

    The kernels read the memory of the thresholds, so the caller keeps ``negatives`` until they return.

    With ``by_bias`` the kernels sum the derivatives of the logistic losses by their bias in place of the losses.
    """
    if negatives.plain:
        return _PLAIN
    a, b, d, e = (0.0, 1.0, 0.0, 0.0) if negatives.coefficients is None else negatives.coefficients.tolist()
    logistic = None
    if negatives.logistic is not None:
        scale, exponent, angle, offset, bias = negatives.logistic.tolist()
        logistic = scale, exponent, angle, offset, bias, by_bias
    return negatives.sub_centers, native.address(negatives.threshold), (a, b, d, e), logistic


def _run_class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    dtype: torch.dtype,
    scale: float,
    shift: Tensor | None = None,
    negatives: Negatives = PLAIN,
    total: Tensor | None = None,
    center_sum: Tensor | None = None,
    moments: Tensor | None = None,
    by_bias: bool = False,
) -> Tensor:
    """Return the maxima (N,). Fill ``total`` (N,), ``center_sum`` (N, D) and ``moments`` (N, MOMENTS) if given.

    ``dtype`` is the compute dtype of the inputs.
    """
    maximum = torch.empty(embeddings.shape[0], dtype=dtype)
    if embeddings.shape[0] == 0:
        return maximum
    # Bound to names: a temporary's memory would be gone before the kernel reads it.
    target, negatives = target.contiguous(), negatives.contiguous(dtype)
    shift = None if shift is None else shift.contiguous()
    native.module.class_stats(
        _product_code(embeddings, dtype),
        native.matrix(embeddings),
        native.matrix(weight),
        target.data_ptr(),
        scale,
        native.address(shift),
        maximum.data_ptr(),
        native.address(total),
        native.address(center_sum),
        torch.get_num_threads(),
        _native_negatives(negatives, by_bias),
        native.address(moments),
    )
    return maximum


def target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.target_cosine`."""
    dtype, target = compute_dtype(embeddings, weight), target.contiguous()
    cosine = torch.empty(embeddings.shape[0], dtype=dtype)
    native.module.target_cosine(
        native.dtype_code(dtype),
        native.matrix(embeddings),
        native.matrix(weight),
        target.data_ptr(),
        cosine.data_ptr(),
        torch.get_num_threads(),
    )
    return cosine


def finish_negatives(negative_sum: Tensor, shift: Tensor | None, center_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Implement :func:`fused_arcface.backends.torch.finish_negatives`."""
    shift = None if shift is None else shift.contiguous()
    negative_sum, center_sum = negative_sum.contiguous(), center_sum.contiguous()
    lse, mean = torch.empty(negative_sum.shape[0], dtype=torch.float64), torch.empty_like(center_sum)
    native.module.finish_negatives(
        native.dtype_code(negative_sum.dtype),
        negative_sum.shape[0],
        center_sum.shape[1] if center_sum.dim() == 2 else 0,
        negative_sum.data_ptr(),
        native.address(shift),
        center_sum.data_ptr(),
        lse.data_ptr(),
        mean.data_ptr(),
    )
    return lse, mean


def unit_embedding_grad(
    weight: Tensor, target: Tensor, mean_center: Tensor, negative_coefficient: Tensor, target_coefficient: Tensor
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.unit_embedding_grad`."""
    target, mean_center = target.contiguous(), mean_center.contiguous()
    negative_coefficient, target_coefficient = negative_coefficient.contiguous(), target_coefficient.contiguous()
    d_unit = torch.empty_like(mean_center)
    native.module.unit_embedding_grad(
        native.dtype_code(mean_center.dtype),
        native.matrix(weight),
        target.data_ptr(),
        mean_center.data_ptr(),
        negative_coefficient.data_ptr(),
        target_coefficient.data_ptr(),
        mean_center.shape[0],
        d_unit.data_ptr(),
        torch.get_num_threads(),
    )
    return d_unit


def embedding_grad(d_unit: Tensor, embeddings: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.embedding_grad`."""
    d_unit, d_embeddings = d_unit.contiguous(), torch.empty_like(embeddings)
    native.module.embedding_grad(
        native.dtype_code(d_unit.dtype),
        d_unit.data_ptr(),
        native.matrix(embeddings),
        native.matrix(d_embeddings),
        torch.get_num_threads(),
    )
    return d_embeddings


def margin_loss(
    negative_lse: Tensor,
    target_cosine: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    boundary: str,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implement :func:`fused_arcface.backends.torch.margin_loss`."""
    negative_lse, target_cosine = negative_lse.contiguous(), target_cosine.contiguous()
    loss, lse, d_lse, d_cosine = (torch.empty_like(negative_lse) for _ in range(4))
    native.module.margin_loss(
        native.dtype_code(negative_lse.dtype),
        negative_lse.data_ptr(),
        target_cosine.data_ptr(),
        negative_lse.shape[0],
        scale,
        (m1, m2, m3),
        boundary,
        gradient == "straight_through",
        (loss.data_ptr(), lse.data_ptr(), d_lse.data_ptr(), d_cosine.data_ptr()),
    )
    return loss, lse, d_lse, d_cosine


def class_max(embeddings: Tensor, weight: Tensor, target: Tensor, negatives: Negatives = PLAIN) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.class_max`."""
    return _run_class_stats(embeddings, weight, target, compute_dtype(embeddings, weight), 1.0, None, negatives)


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
    total = torch.empty(embeddings.shape[0], dtype=dtype)
    center_sum = torch.empty(embeddings.shape if with_center_sum else 0, dtype=dtype)
    wanted = center_sum if with_center_sum else None
    maximum = _run_class_stats(embeddings, weight, target, dtype, scale, shift, negatives, total, wanted)
    return total, maximum, center_sum


def class_moments(embeddings: Tensor, weight: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the sums of ``e^(scale·c)·c^k`` over the negatives' cosines c, (N, MOMENTS) fp64, and the maxima (N,)."""
    dtype = compute_dtype(embeddings, weight)
    total = torch.empty(embeddings.shape[0], dtype=dtype)
    moments = torch.empty(embeddings.shape[0], MOMENTS, dtype=torch.float64)
    return moments, _run_class_stats(embeddings, weight, target, dtype, scale, total=total, moments=moments)


def bias_grad(
    embeddings: Tensor, weight: Tensor, target: Tensor, lse: Tensor, d_lse: Tensor, negatives: Negatives = PLAIN
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.bias_grad`."""
    assert negatives.logistic is not None
    dtype, scale = compute_dtype(embeddings, weight), float(negatives.logistic[0])
    total = torch.empty(embeddings.shape[0], dtype=dtype)
    _run_class_stats(embeddings, weight, target, dtype, scale, None, negatives, total, by_bias=True)
    by_row = d_lse.double() * (-lse).exp() * total.double()
    return by_row.masked_fill(total == 0, 0).sum()  # a row without negatives has an lse of -inf


def weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    negatives: Negatives = PLAIN,
    negative_grad: Tensor | None = None,
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.weight_grad`.

    With ``negative_grad`` (N, D), of the compute dtype, also write there the gradient by the unit embeddings that they
    owe to their negatives.
    """
    if embeddings.shape[0] == 0:
        return torch.zeros_like(weight)
    target, gradients = target.contiguous(), gradients.contiguous()
    negatives = negatives.contiguous(gradients.negative_coefficient.dtype)
    d_weight = torch.empty_like(weight)
    native.module.weight_grad(
        _product_code(embeddings, gradients.negative_coefficient.dtype),
        native.matrix(embeddings),
        native.matrix(weight),
        target.data_ptr(),
        *native.row_gradients(gradients),
        native.matrix(d_weight),
        torch.get_num_threads(),
        _native_negatives(negatives),
        native.address(negative_grad),
    )
    return d_weight


def both_gradients(
    embeddings: Tensor, weight: Tensor, target: Tensor, gradients: RowGradients
) -> tuple[Tensor, Tensor]:
    """Return :func:`weight_grad`, and the part of the gradient by the unit embeddings (N, D) that negatives have."""
    negative_grad = torch.empty(embeddings.shape, dtype=compute_dtype(embeddings, weight))
    return weight_grad(embeddings, weight, target, gradients, negative_grad=negative_grad), negative_grad


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
    negatives = negatives.contiguous(gradients.negative_coefficient.dtype)
    native.module.update_centers(
        _product_code(embeddings, gradients.negative_coefficient.dtype),
        native.matrix(embeddings),
        native.matrix(weight),
        target.data_ptr(),
        *native.row_gradients(gradients),
        native.center_step(step, weight),
        torch.get_num_threads(),
        _native_negatives(negatives),
    )
