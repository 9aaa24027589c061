"""The oracle itself: against scalar arithmetic, against cross_entropy, and by finite differences."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from support import scalar
from support.cases import MARGINS, TARGET_COSINES, named, rows_at

import fused_arcface as fa

reference = fa.reference.margin_softmax_loss
every_margin = pytest.mark.parametrize("margin", MARGINS, ids=named)


@every_margin
@pytest.mark.parametrize("scale", [1.0, 16.0, 64.0])
def test_loss_by_hand(margin: object, scale: float) -> None:
    x, w, target = rows_at(TARGET_COSINES)
    got = reference(x, w, target, margin=margin, scale=scale, reduction="none")
    right = [scalar.row(a, w.tolist(), y, margin, scale).loss for a, y in zip(x.tolist(), target.tolist(), strict=True)]
    # At cos θ = ±1 an angle is known to 2e-8, the root of fp64's precision.
    torch.testing.assert_close(got, torch.tensor(right, dtype=torch.float64), rtol=1e-12 + scale * 1e-7, atol=0)
    inner = slice(1, -1)
    torch.testing.assert_close(got[inner], torch.tensor(right[inner], dtype=torch.float64), rtol=1e-11, atol=0)


@every_margin
@pytest.mark.parametrize("mode", ["exact", "straight_through"])
def test_gradient_by_hand(margin: object, mode: str) -> None:
    """Both modes, to 1e-12 of the largest element, at angles at which the exact derivative is not floored."""
    slope = 1.0 if mode == "straight_through" else None
    if hasattr(margin, "gradient"):
        margin = dataclasses.replace(margin, gradient=mode)
    x, w, target = rows_at(TARGET_COSINES[1:-1])
    x.requires_grad_()
    w.requires_grad_()
    got = torch.autograd.grad(reference(x, w, target, margin=margin, scale=16.0, reduction="sum"), (x, w))
    right = scalar.gradients(x.tolist(), w.tolist(), target.tolist(), margin, 16.0, slope)
    for mine, theirs in zip(got, right, strict=True):
        theirs = torch.tensor(theirs, dtype=torch.float64)
        assert (mine - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", ["all count", "some ignored", "ignored inside [0, C)", "all ignored", "no rows"])
@pytest.mark.parametrize("function", [reference, fa.margin_softmax_loss], ids=["reference", "fused"])
def test_norm_softmax_is_cross_entropy(function: object, labels: str, reduction: str) -> None:
    """Values and gradients, NaN for the mean over nothing included."""
    x, w, target = rows_at(TARGET_COSINES)
    ignore_index = -100
    if labels == "some ignored":
        target[::3] = ignore_index
    elif labels == "ignored inside [0, C)":
        ignore_index = 2
        assert (target == 2).any()
    elif labels == "all ignored":
        target.fill_(ignore_index)
    elif labels == "no rows":
        x, target = x[:0], target[:0]
    x.requires_grad_()
    w.requires_grad_()
    loss = function(x, w, target, margin=fa.NormSoftmax(), scale=20.0, reduction=reduction, ignore_index=ignore_index)
    logits = 20 * F.linear(F.normalize(x), F.normalize(w))
    right = F.cross_entropy(logits, target, reduction=reduction, ignore_index=ignore_index)
    assert loss.shape == right.shape and loss.dtype == right.dtype
    torch.testing.assert_close(loss, right, rtol=1e-11, atol=1e-13, equal_nan=True)
    upstream = torch.rand_like(right)
    for got, theirs in zip(
        torch.autograd.grad(loss, (x, w), upstream), torch.autograd.grad(right, (x, w), upstream), strict=True
    ):
        if labels == "all ignored":
            assert torch.equal(got, torch.zeros_like(got)), "rows that take no part have a gradient of zero"
        else:
            torch.testing.assert_close(got, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gap", [13.8, 30.0, 60.0, 600.0])
def test_tiny_loss_does_not_cancel(gap: float) -> None:
    x, w = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    loss = reference(x, w, torch.tensor([0]), margin=fa.NormSoftmax(), scale=gap, reduction="none")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-13)


@every_margin
def test_gradient_by_finite_differences(margin: object) -> None:
    x, w, target = rows_at((0.93, 0.31, -0.07, -0.93))
    torch.autograd.gradcheck(
        lambda x, w: reference(x, w, target, margin=margin, scale=8.0, reduction="none"),
        (x.requires_grad_(), w.requires_grad_()),
    )


@every_margin
def test_twice_differentiable(margin: object) -> None:
    x, w, target = rows_at((0.7, -0.3))
    torch.autograd.gradgradcheck(
        lambda x, w: reference(x, w, target, margin=margin, scale=4.0, reduction="sum"),
        (x.requires_grad_(), w.requires_grad_()),
    )


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "loss_dtype"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes(x_dtype: torch.dtype, w_dtype: torch.dtype, loss_dtype: torch.dtype) -> None:
    x, w, target = rows_at(TARGET_COSINES)
    x, w = x.to(x_dtype).requires_grad_(), w.to(w_dtype).requires_grad_()
    loss = reference(x, w, target)
    loss.backward()
    assert (loss.dtype, x.grad.dtype, w.grad.dtype) == (loss_dtype, x_dtype, w_dtype)
    exact = reference(x.detach().double(), w.detach().double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)


def test_keeps_its_precision_under_autocast() -> None:
    """Autocast may round the embeddings, as for the fused head; cosines in bf16 would cost a quarter of a logit."""
    x, w, target = (tensor.float() if tensor.is_floating_point() else tensor for tensor in rows_at(TARGET_COSINES))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reference(x, w, target, reduction="none")
    assert loss.dtype == torch.float32
    rounded = reference(x.bfloat16(), w, target, reduction="none")
    exact = reference(x, w, target, reduction="none")
    error = torch.minimum((loss - rounded).abs(), (loss - exact).abs())
    assert error.max() < 1e-3
