"""The right results: each formula in fp64, over chunks of classes, so that a problem of any size can be checked.

The margin formulas are those of :mod:`fused_arcface.reference`, which holds the logits; a test compares the two.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_arcface.base.normalize import unit_gradient
from fused_arcface.margins.angular import ArcFace, NormSoftmax
from fused_arcface.margins.protocol import Margin

from .cases import Inputs

Formula = Literal["margin", "straight_through", "linear", "products"]
"""The formula that a provider computes. ``margin``: ArcFace, exact gradient. ``straight_through``: ArcFace without a
boundary, with ψ' = 1. ``linear``: cross-entropy of x·wᵀ, neither normalized nor with a margin. ``products``: S = x·wᵀ,
S·w and Sᵀ·x."""

MARGIN = ArcFace(0.5)
SCALE = 64.0
_STRAIGHT_THROUGH = ArcFace(0.5, boundary="none", gradient="straight_through")

# Largest relative error that passes, by the worse of the two dtypes. A wrong formula is off by 0.1 and more.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "tf32": 5e-2, "bfloat16": 6e-2, "float16": 6e-2}

# Elements of a chunk: 64 MB in fp64.
_CHUNK_ELEMENTS = 2**23


class PassResult(NamedTuple):
    """The results of one pass. A gradient is None in a pass without gradients."""

    loss: Tensor
    """() mean loss; for the products the first columns of S."""
    d_embeddings: Tensor | None = None
    """(N, D)"""
    d_weight: Tensor | None = None
    """(C, D)"""


@torch.no_grad()
def truth(inputs: Inputs, formula: Formula) -> PassResult:
    """Return loss and both gradients in fp64; the large gradient, by the class centers, is kept in fp32."""
    return _products(inputs) if formula == "products" else _cross_entropy(inputs, formula)


def _chunks(inputs: Inputs) -> range:
    """Return the starts of the chunks; logits (N, chunk) and centers (chunk, D) have a bounded size."""
    longest = max(inputs.target.numel(), inputs.weight.shape[1])
    return range(0, inputs.weight.shape[0], max(1, _CHUNK_ELEMENTS // longest))


def _large(inputs: Inputs) -> Tensor:
    dtype = torch.float64 if inputs.weight.dtype == torch.float64 else torch.float32
    return torch.empty(inputs.weight.shape, dtype=dtype, device=inputs.weight.device)


def _products(inputs: Inputs) -> PassResult:
    x, chunks = inputs.embeddings.double(), _chunks(inputs)
    d_x, d_weight = torch.zeros_like(x), _large(inputs)
    for start in chunks:
        w = inputs.weight[start : start + chunks.step].double()
        scores = x @ w.T
        d_x += scores @ w
        d_weight[start : start + chunks.step] = scores.T @ x
    return PassResult(x @ inputs.weight[:64].double().T, d_x, d_weight)


def _cross_entropy(inputs: Inputs, formula: Formula) -> PassResult:
    margin: Margin = {"margin": MARGIN, "straight_through": _STRAIGHT_THROUGH}.get(formula, NormSoftmax())
    normalized, scale = (formula != "linear"), (1.0 if formula == "linear" else SCALE)
    target, chunks = inputs.target, _chunks(inputs)

    def unit(row: Tensor) -> Tensor:
        return F.normalize(row.double()) if normalized else row.double()

    x = unit(inputs.embeddings)

    def negatives(start: int) -> tuple[Tensor, Tensor]:
        w = unit(inputs.weight[start : start + chunks.step])
        columns = torch.arange(start, start + w.shape[0], device=target.device)
        return w, (scale * (x @ w.T)).masked_fill(target[:, None] == columns, -torch.inf)

    lse = torch.full_like(x[:, 0], -torch.inf)
    for start in chunks:
        lse = torch.logaddexp(lse, negatives(start)[1].logsumexp(1))
    centers = unit(inputs.weight[target])
    with torch.enable_grad():
        lse.requires_grad_()
        target_cosine = (x * centers).sum(1).requires_grad_()
        loss = F.softplus(lse - scale * margin(target_cosine), threshold=40).mean()
        d_lse, d_target = torch.autograd.grad(loss, (lse, target_cosine))
    lse = lse.detach()

    d_x, d_weight = d_target[:, None] * centers, _large(inputs)
    for start in chunks:
        w, logits = negatives(start)
        d_cosine = scale * d_lse[:, None] * (logits - lse[:, None]).exp()
        d_x += d_cosine @ w
        here = (target >= start) & (target < start + w.shape[0])
        d_w = (d_cosine.T @ x).index_add_(0, target[here] - start, d_target[here, None] * x[here])
        rows = inputs.weight[start : start + chunks.step].double()
        d_weight[start : start + chunks.step] = unit_gradient(d_w, rows) if normalized else d_w
    if normalized:
        d_x = unit_gradient(d_x, inputs.embeddings.double())
    return PassResult(loss.detach(), d_x, d_weight)


def error_of(outcome: PassResult, right: PassResult) -> float:
    """Return the largest of max |a - b| / max |b| over the loss and the gradients; NaN if there is a NaN."""
    errors = []
    for name, mine, theirs in zip(PassResult._fields, outcome, right, strict=True):
        if mine is None or theirs is None:
            continue
        if mine.shape != theirs.shape:
            raise ValueError(f"{name} must be {tuple(theirs.shape)}; got {tuple(mine.shape)}")
        pieces = zip(*(each.detach().reshape(-1).split(_CHUNK_ELEMENTS) for each in (mine, theirs)), strict=True)
        difference = torch.stack([(a.double() - b.double()).abs().max() for a, b in pieces]).max()
        scale = theirs.abs().max()
        errors.append(difference / scale if scale > 0 else difference)
    return float(torch.stack(errors).max())  # torch's maximum is NaN if one of them is; Python's need not be
