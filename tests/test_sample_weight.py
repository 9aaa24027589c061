"""Weights of the rows: ``cross_entropy`` over the stored logits, in fp64, says what the loss and its gradients are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.cases import BACKENDS
from torch import Tensor

import fused_arcface as fa

N, C, D, S = 12, 17, 6, 20.0
LOSSES: dict[str, Callable[..., Tensor]] = {
    **{name: partial(fa.margin_softmax_loss, backend=name) for name in BACKENDS},
    "oracle": fa.reference.margin_softmax_loss,
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(C, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    y = torch.randint(0, C, (N,), generator=generator)
    y[3] = -100
    weights = torch.rand(N, generator=generator, dtype=torch.float64) * 3
    weights[5] = 0
    return x, w, y, weights


def row_losses(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """``s(cos θ - 0.2)`` for the target, by cross_entropy."""
    logits = S * F.normalize(x) @ F.normalize(w).T
    margin = S * 0.2 * F.one_hot(y.clamp(min=0), C)
    return F.cross_entropy(logits - margin, y, reduction="none")


@pytest.mark.parametrize("margin", [fa.CosFace(0.2), lambda cosine: cosine - 0.2], ids=["fused tail", "plain tail"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_weighted_loss_and_its_gradients(name: str, reduction: str, margin: Callable[[Tensor], Tensor]) -> None:
    x, w, y, weights = inputs()
    options = {"margin": margin, "scale": S, "reduction": reduction, "return_stats": True}
    got, stats = LOSSES[name](x, w, y, sample_weight=weights, **options)
    rows = row_losses(x, w, y)
    right = weights * rows
    if reduction != "none":
        right = right.sum() / (weights[y >= 0].sum() if reduction == "mean" else 1)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats.loss, rows.detach(), rtol=1e-10, atol=1e-12)
    upstream = torch.rand_like(right)
    for mine, truth in zip(
        torch.autograd.grad(got, (x, w), upstream), torch.autograd.grad(right, (x, w), upstream), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_by_indexing(reduction: str) -> None:
    """Those of ``cross_entropy(weight=...)``, ignored rows included."""
    x, w, y, _ = inputs()
    class_weight = torch.rand(C, dtype=torch.float64) + 0.1
    logits = S * F.normalize(x) @ F.normalize(w).T
    right = F.cross_entropy(logits, y, weight=class_weight, reduction=reduction)
    got = fa.margin_softmax_loss(
        x, w, y, margin=fa.NormSoftmax(), scale=S, reduction=reduction, sample_weight=class_weight[y.clamp(min=0)]
    )
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    x, w, y, weights = inputs()
    loss = lambda x, w: fa.margin_softmax_loss(x, w, y, scale=S, sample_weight=weights)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, w), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_dtype_leave_the_loss_in_fp32(dtype: torch.dtype) -> None:
    x, w, y, weights = inputs(torch.float32)
    got = fa.margin_softmax_loss(x, w, y, scale=S, sample_weight=weights.to(dtype))
    right = fa.reference.margin_softmax_loss(x.double(), w.double(), y, scale=S, sample_weight=weights.to(dtype))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), right, rtol=2e-6, atol=0)


def test_weights_that_are_all_zero_make_a_mean_nan_as_cross_entropy_does() -> None:
    x, w, y, weights = inputs()
    assert fa.margin_softmax_loss(x, w, y, sample_weight=0 * weights).isnan()
    assert fa.margin_softmax_loss(x, w, y, sample_weight=0 * weights, reduction="sum") == 0


@pytest.mark.parametrize("call", [fa.margin_softmax_loss, fa.reference.margin_softmax_loss])
def test_wrong_weights(call: Callable[..., Tensor]) -> None:
    x, w, y, weights = inputs()
    wrong = {
        "sample_weight must be finite and >= 0; got nan at row 2": weights.index_fill(0, torch.tensor(2), math.nan),
        "sample_weight must be finite and >= 0; got inf at row 2": weights.index_fill(0, torch.tensor(2), math.inf),
        "sample_weight must be finite and >= 0; got -1 at row 2": weights.index_fill(0, torch.tensor(2), -1),
        "sample_weight must be (N=12,); got (11,)": weights[:-1],
        "sample_weight must be (N=12,); got ()": torch.tensor(1.0),
        "sample_weight must be on embeddings' device cpu; got meta": weights.to("meta"),
        "sample_weight must not require a gradient": weights.clone().requires_grad_(),
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            call(x, w, y, sample_weight=given)
    for given in (weights.long(), [1.0] * N, 1.0):
        with pytest.raises(TypeError, match=r"^sample_weight must "):
            call(x, w, y, sample_weight=given)


def test_both_heads_take_weights_and_a_reduction() -> None:
    x, w, y, weights = inputs()
    for head in (fa.MarginHead(D, C, dtype=torch.float64), fa.PartialFC(D, C, dtype=torch.float64)):
        with torch.no_grad():
            head.weight.copy_(w)
        for reduction in ("mean", "sum", "none"):
            got = head(x, y, sample_weight=weights, reduction=reduction)
            right = fa.reference.margin_softmax_loss(x, w, y, sample_weight=weights, reduction=reduction)
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none'; got 'average'"):
            head(x, y, reduction="average")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_center_sgd_follows_the_weighted_loss(reduction: str) -> None:
    """As torch.optim.SGD over the gradient of the weighted loss; a loss for each row is refused, with the way out."""
    x, w, y, weights = inputs()
    head = fa.PartialFC(D, C, dtype=torch.float64, center_optimizer=fa.CenterSGD(0.1, momentum=0.9))
    with torch.no_grad():
        head.weight.copy_(w)
    truth = torch.nn.Parameter(w.detach().clone())
    optimizer = torch.optim.SGD([truth], 0.1, momentum=0.9)
    for _ in range(2):
        head(x, y, sample_weight=weights, reduction=reduction).backward()
        optimizer.zero_grad()
        fa.reference.margin_softmax_loss(x, truth, y, sample_weight=weights, reduction=reduction).backward()
        optimizer.step()
        torch.testing.assert_close(head.weight.detach(), truth.detach(), rtol=1e-10, atol=1e-12)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"reduction must be 'mean' or 'sum' with a center_optimizer.*sample_weight"):
        head(x, y, reduction="none")
    assert torch.equal(head.weight, before) and head.step == 2
    assert head.eval()(x, y, reduction="none").shape == (N,)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()
    x, w, y, weights = inputs()
    compiled = torch.compile(fa.margin_softmax_loss, fullgraph=True, backend="aot_eager")
    got, right = (loss(x, w, y, sample_weight=weights) for loss in (compiled, fa.reference.margin_softmax_loss))
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)
    for mine, truth in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="sample_weight must be finite and >= 0; got -1 at row 0"):
        compiled(x, w, y, sample_weight=weights - weights - 1)
    torch._dynamo.reset()


def test_opcheck() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        torch.library.opcheck(torch.ops.fused_arcface.row_factors.default, (torch.rand(4, dtype=dtype), "share", 1.0))
