"""The stage functions of this backend. Names, shapes and results are those of backends/torch.py.

Every step is launches on the current stream: no value is read back and no shape depends on one, so a CUDA graph can
capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_arcface.base.dtypes import compute_dtype
from fused_arcface.engine.terms import PLAIN, CenterStep, Negatives, RowGradients

from . import chunks, flash
from .center_sgd import updates
from .common import on_device
from .configs import device_limits, pick
from .margin import margin_losses
from .negatives import RowRule
from .panels import Centers
from .rows import RowTerms, UnitRows, fill_batch_rows, row_terms
from .targets import project, projections, target_cosines, unit_embedding_grads

_DEPTH_MULTIPLE = 16
"""Columns of operands for library products: 32 bytes of 16-bit numbers, which its fastest kernels need rows aligned
to."""


def _operand_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the products' operands: the embeddings', as autocast would choose.

    fp32 embeddings keep full precision beside 16-bit centers.
    """
    return torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else embeddings.dtype


def _algorithm(embeddings: Tensor, centers: Centers, negatives: Negatives, with_sums: bool) -> str:
    # The nearest of several centers is found among scores in memory, and the flash passes store none.
    if negatives.sub_centers > 1:
        return "chunks"
    arch, _ = device_limits(embeddings.device)
    dtype = _operand_dtype(embeddings, centers.weight)
    return pick(embeddings.shape[0], centers.count, embeddings.shape[1], arch, dtype, with_sums)


def _unit_rows(embeddings: Tensor, weight: Tensor, algorithm: str) -> UnitRows:
    padded, width = embeddings.shape
    if algorithm == "flash":
        padded, width = flash.padded_shape(padded, width, embeddings.device)
    else:
        width = -(-width // _DEPTH_MULTIPLE) * _DEPTH_MULTIPLE
    compute = compute_dtype(embeddings, weight)
    x = UnitRows.empty(padded, width, _operand_dtype(embeddings, weight), compute, embeddings.device)
    fill_batch_rows(embeddings, x)
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
    x = _unit_rows(embeddings, weight, "chunks")
    if embeddings.shape[0] == 0:
        return torch.empty_like(x.inverse)
    rule = RowRule.create(negatives, x.inverse.dtype)
    _, maximum, _ = chunks.class_stats(x, Centers(weight, classes), target.contiguous(), None, rule, False, class_count)
    greatest = maximum.amax(0)
    return greatest if rule.changes_cosines else greatest * x.inverse


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
    rule = RowRule.create(negatives, inverse.dtype)
    terms = row_terms(inverse, scale, shift, of_cosine=rule.changes_cosines)
    module = flash if algorithm == "flash" else chunks
    totals, maxima, sums = module.class_stats(
        x, centers, target.contiguous(), terms, rule, with_center_sum, class_count
    )
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
    algorithm, x, terms, rule = _backward(embeddings, centers, gradients, negatives)
    if algorithm == "flash":
        flash.weight_grad(x, centers, target.contiguous(), terms, rule, d_weight)
    else:
        chunks.unit_gradients(
            x, centers, target.contiguous(), terms, rule, lambda d_unit: projections(d_unit, weight, d_weight, classes)
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
    centers = Centers(weight, step.classes)
    if embeddings.shape[0] == 0:
        # Decay and momentum are there without a gradient; a panel's worth of it would be all zeros, however large.
        d_unit = weight.new_zeros(1, weight.shape[1], dtype=compute_dtype(embeddings, weight))
        if centers.count > 0:
            with on_device(weight.device):
                updates(d_unit.expand(centers.count, -1), weight, step)(0, centers.count)
        return
    algorithm, x, terms, rule = _backward(embeddings, centers, gradients, negatives)
    module = flash if algorithm == "flash" else chunks
    module.unit_gradients(x, centers, target.contiguous(), terms, rule, lambda d_unit: updates(d_unit, weight, step))


def _backward(
    embeddings: Tensor, centers: Centers, gradients: RowGradients, negatives: Negatives
) -> tuple[str, UnitRows, RowTerms, RowRule]:
    """Return the algorithm of a backward pass, the embeddings ready for it, the rows' terms, and their rule."""
    algorithm = _algorithm(embeddings, centers, negatives, True)
    x = _unit_rows(embeddings, centers.weight, algorithm)
    scale, lse, coefficients = gradients.scale, gradients.lse, gradients[2:]
    rule = RowRule.create(negatives, x.inverse.dtype)
    terms = row_terms(x.inverse[: embeddings.shape[0]], scale, lse, coefficients, rule.changes_cosines)
    return algorithm, x, terms, rule


def target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.target_cosine`."""
    return target_cosines(embeddings, weight, target, compute_dtype(embeddings, weight))


def unit_embedding_grad(
    weight: Tensor, target: Tensor, mean_center: Tensor, negative_coefficient: Tensor, target_coefficient: Tensor
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.unit_embedding_grad`."""
    return unit_embedding_grads(weight, target, mean_center, negative_coefficient, target_coefficient)


def embedding_grad(d_unit: Tensor, embeddings: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.embedding_grad`."""
    d_embeddings = torch.empty_like(embeddings)
    project(d_unit.contiguous(), embeddings, d_embeddings)
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
    return margin_losses(negative_lse, target_cosine, scale, (m1, m2, m3), boundary, gradient)
