"""The stages over the classes. Names, shapes and results are those of backends/torch.py.

Every step is launches on the current stream: no value is read back and no shape depends on one, so a CUDA graph can
capture it.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fused_arcface.base.dtypes import compute_dtype
from fused_arcface.engine.terms import PLAIN, CenterStep, Negatives, RowGradients

from . import chunks, flash
from .center_sgd import updates
from .configs import device_limits, pick
from .panels import Centers
from .rows import BATCH_LENGTH, RowTerms, UnitRows, row_terms, unit_rows


def _operand_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the products' operands: the embeddings', as autocast would choose.

    fp32 embeddings keep full precision beside 16-bit centers.
    """
    return torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else embeddings.dtype


def _algorithm(embeddings: Tensor, centers: Centers, negatives: Negatives, with_sums: bool) -> ModuleType:
    """Return the module of the passes over the classes, ``flash`` or ``chunks``."""
    # The nearest of several centers is found among scores in memory, and the flash passes store none.
    if negatives.sub_centers > 1:
        return chunks
    arch, _ = device_limits(embeddings.device)
    dtype = _operand_dtype(embeddings, centers.weight)
    name = pick(embeddings.shape[0], centers.count, embeddings.shape[1], arch, dtype, with_sums)
    return flash if name == "flash" else chunks


def _unit_rows(embeddings: Tensor, weight: Tensor, algorithm: ModuleType) -> UnitRows:
    """Return the embeddings ready for the passes. Rows of zeros follow where the algorithm wants whole tiles."""
    padded, width = algorithm.padded_shape(*embeddings.shape, embeddings.device)
    dtype = _operand_dtype(embeddings, weight)
    x = UnitRows.empty(padded, width, dtype, compute_dtype(embeddings, weight), embeddings.device)
    length = BATCH_LENGTH if dtype == torch.bfloat16 else 1.0
    unit_rows(embeddings, x, length=length).once(0, embeddings.shape[0])
    return x


def class_max(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    class_count: Tensor | None = None,
    negatives: Negatives = PLAIN,
    classes: Tensor | None = None,
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.class_max`, over the rows ``classes`` (K,) of weight if given."""
    x = _unit_rows(embeddings, weight, chunks)
    if embeddings.shape[0] == 0:
        return torch.empty_like(x.inverse)
    negatives = negatives.contiguous(x.inverse.dtype)
    terms = RowTerms(target.contiguous(), negatives.threshold)
    _, maximum, _ = chunks.class_stats(x, Centers(weight, classes), terms, negatives, False, class_count)
    greatest = maximum.amax(0)
    return greatest * x.inverse if negatives.threshold is None else greatest


def class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    class_count: Tensor | None = None,
    negatives: Negatives = PLAIN,
    classes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :func:`fused_arcface.backends.torch.class_stats`, over the rows ``classes`` (K,) of weight if given."""
    num_rows, D = embeddings.shape
    centers = Centers(weight, classes)
    algorithm = _algorithm(embeddings, centers, negatives, with_center_sum)
    x = _unit_rows(embeddings, weight, algorithm)
    center_sum = x.inverse.new_empty(embeddings.shape if with_center_sum else 0)
    if num_rows == 0:
        return torch.empty_like(x.inverse), torch.empty_like(x.inverse), center_sum
    inverse = x.inverse[:num_rows]
    negatives = negatives.contiguous(inverse.dtype)
    terms = row_terms(inverse, target.contiguous(), negatives, scale, shift)
    totals, maxima, sums = algorithm.class_stats(x, centers, terms, negatives, with_center_sum, class_count)
    total, maximum = totals.sum(0)[:num_rows], maxima.amax(0)[:num_rows] * inverse
    if terms.factor is not None:
        total = total * terms.factor
    if sums is not None:
        sums = sums[:num_rows, :D]
        # Its own memory in any case: an operator's outputs must not be views.
        center_sum = sums.contiguous() if terms.factor is None else sums * terms.factor[:, None]
    return total.contiguous(), maximum, center_sum


def weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    gradients: RowGradients,
    negatives: Negatives = PLAIN,
    classes: Tensor | None = None,
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.weight_grad`, (K, D) of the rows ``classes`` (K,) if given."""
    centers = Centers(weight, classes)
    d_weight = torch.empty_like(weight) if classes is None else weight.new_empty(centers.count, weight.shape[1])
    if embeddings.shape[0] == 0:
        return d_weight.zero_()
    algorithm, *arguments = _backward(embeddings, centers, target, gradients, negatives)
    algorithm.weight_grad(*arguments, d_weight)
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
    centers = Centers(weight, step.classes)
    if embeddings.shape[0] == 0:
        # Decay and momentum are there without a gradient; a panel's worth of it would be all zeros, however large.
        d_unit = weight.new_zeros(1, weight.shape[1], dtype=compute_dtype(embeddings, weight))
        updates(d_unit.expand(centers.count, -1), weight, step).once(0, centers.count)
        return
    algorithm, *arguments = _backward(embeddings, centers, target, gradients, negatives)
    algorithm.unit_gradients(*arguments, lambda d_unit: updates(d_unit, weight, step))


def _backward(
    embeddings: Tensor, centers: Centers, target: Tensor, gradients: RowGradients, negatives: Negatives
) -> tuple[ModuleType, UnitRows, Centers, RowTerms, Negatives]:
    """Return the algorithm of a backward pass, and the arguments of its functions."""
    algorithm = _algorithm(embeddings, centers, negatives, True)
    x = _unit_rows(embeddings, centers.weight, algorithm)
    negatives = negatives.contiguous(x.inverse.dtype)
    inverse = x.inverse[: embeddings.shape[0]]
    terms = row_terms(inverse, target.contiguous(), negatives, gradients.scale, gradients.lse, gradients[2:])
    return algorithm, x, centers, terms, negatives
