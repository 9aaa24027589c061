"""The stages on the CPU: the compiled kernels of csrc/cpu, given raw addresses. Shapes as in backends/reference.py."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..ops import PLAIN, CentreStep, Negatives, compute_dtype

# O(N·D) and less: PyTorch does these as well as a kernel would.
from .reference import embedding_grad, margin_loss, target_cosine, unit_embedding_grad  # noqa: F401

_import_error = None
try:
    from .. import _native
except ImportError as error:  # unavailable() reports it: the package is of use without its compiled part
    _import_error = str(error)


def unavailable() -> str | None:
    if _import_error is not None:
        return f"the compiled module fused_arcface._native cannot be imported: {_import_error}"
    asked = os.environ.get("FUSED_ARCFACE_ISA", "")
    if asked and asked not in _native.isas():
        return f"FUSED_ARCFACE_ISA={asked} names none of this machine's instruction sets: {', '.join(_native.isas())}"
    return None


def isa() -> str:
    """The instruction set in use: the best of this machine, or the one named in the environment's FUSED_ARCFACE_ISA."""
    return os.environ.get("FUSED_ARCFACE_ISA") or _native.isas()[0]


def multiply_adds(rounds: int) -> int:
    """Flops of ``rounds`` vector multiply-adds on all of torch's threads, in registers alone: timed, the FMA peak."""
    return _native.multiply_adds(isa(), rounds, torch.get_num_threads())


def _matrix(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    code = {
        torch.float32: _native.FLOAT32,
        torch.float64: _native.FLOAT64,
        torch.bfloat16: _native.BFLOAT16,
        torch.float16: _native.FLOAT16,
    }[tensor.dtype]
    return (tensor.data_ptr(), code, *tensor.shape, *tensor.stride())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native_negatives(negatives: Negatives, threshold: Tensor | None) -> tuple[int, int, float, float, float]:
    """``threshold``: the row's thresholds in the compute dtype, which the caller keeps alive."""
    a, b, d = (0.0, 1.0, 0.0) if negatives.coefficients is None else negatives.coefficients.tolist()
    return negatives.sub_centers, _address(threshold), a, b, d


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
    centre_sum: Tensor | None,
    negatives: Negatives,
) -> None:
    # Bound to names: a temporary's memory would be gone before the kernel reads it.
    target = target.contiguous()
    shift = None if shift is None else shift.contiguous()
    threshold = _thresholds(negatives, maximum.dtype)
    _native.class_stats(
        isa(),
        maximum.dtype == torch.float64,
        _matrix(embeddings),
        _matrix(weight),
        target.data_ptr(),
        scale,
        _address(shift),
        maximum.data_ptr(),
        _address(total),
        _address(centre_sum),
        torch.get_num_threads(),
        _native_negatives(negatives, threshold),
    )


def class_max(embeddings: Tensor, weight: Tensor, target: Tensor, negatives: Negatives = PLAIN) -> Tensor:
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
    with_centre_sum: bool,
    negatives: Negatives = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(embeddings, weight)
    total, maximum = torch.empty(embeddings.shape[0], dtype=dtype), torch.empty(embeddings.shape[0], dtype=dtype)
    centre_sum = torch.empty(embeddings.shape if with_centre_sum else 0, dtype=dtype)
    if embeddings.shape[0] > 0:
        wanted = centre_sum if with_centre_sum else None
        _run_class_stats(embeddings, weight, target, scale, shift, maximum, total, wanted, negatives)
    return total, maximum, centre_sum


def weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    negatives: Negatives = PLAIN,
) -> Tensor:
    if embeddings.shape[0] == 0:
        return torch.zeros_like(weight)
    target, lse = target.contiguous(), lse.contiguous()
    negative_coefficient, target_coefficient = negative_coefficient.contiguous(), target_coefficient.contiguous()
    threshold = _thresholds(negatives, negative_coefficient.dtype)
    d_weight = torch.empty_like(weight)
    _native.weight_grad(
        isa(),
        negative_coefficient.dtype == torch.float64,
        _matrix(embeddings),
        _matrix(weight),
        target.data_ptr(),
        scale,
        lse.data_ptr(),
        negative_coefficient.data_ptr(),
        target_coefficient.data_ptr(),
        _matrix(d_weight),
        torch.get_num_threads(),
        _native_negatives(negatives, threshold),
    )
    return d_weight


def update_centres(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    step: CentreStep,
    negatives: Negatives = PLAIN,
) -> None:
    if not step.active:
        return
    target, lse = target.contiguous(), lse.contiguous()
    negative_coefficient, target_coefficient = negative_coefficient.contiguous(), target_coefficient.contiguous()
    threshold = _thresholds(negatives, negative_coefficient.dtype)
    types = {
        torch.float64: _native.MOMENTUM_FLOAT64,
        torch.float32: _native.MOMENTUM_FLOAT32,
        torch.bfloat16: _native.MOMENTUM_BFLOAT16,
        torch.int8: _native.MOMENTUM_INT8,
    }
    buffer, classes = step.momentum_buffer, step.classes
    native_step = (
        _address(classes),
        weight.shape[0] if classes is None else classes.shape[0],
        _native.NO_MOMENTUM if buffer is None else types[buffer.dtype],
        _address(buffer),
        _address(step.momentum_scale),
        step.lr,
        step.momentum,
        step.weight_decay,
        step.rounding_key % 2**64,
        step.class_start,
    )
    _native.update_centres(
        isa(),
        negative_coefficient.dtype == torch.float64,
        _matrix(embeddings),
        _matrix(weight),
        target.data_ptr(),
        scale,
        lse.data_ptr(),
        negative_coefficient.data_ptr(),
        target_coefficient.data_ptr(),
        native_step,
        torch.get_num_threads(),
        _native_negatives(negatives, threshold),
    )
