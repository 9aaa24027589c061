"""A scale that adapts in one pass: its operators on each instruction set, and steps like those of two passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_arcface as fa
from fused_arcface.engine import adapting
from fused_arcface.engine.terms import MOMENTS

pytestmark = pytest.mark.usefixtures("isa", "poison")

ops = torch.ops.fused_arcface
DTYPES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 3e-2}


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """More rows and classes than fit into a block of the kernels; a row without a target, and one that is ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(133, 40, generator=generator, dtype=torch.float64)
    w = torch.randn(501, 40, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 501, (133,), generator=generator)
    x[:90] += w[y[:90]]
    y[100] = -1
    return x.to(dtype), w.to(dtype), y


def cosines(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (N, C) in fp64, and a mask of the negatives."""
    cosine = F.normalize(x.double()) @ F.normalize(w.double()).T
    return cosine, y[:, None] != torch.arange(len(w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(dtype: torch.dtype) -> None:
    x, w, y = problem(dtype)
    cosine, negative = cosines(x, w, y)
    sums, maximum = ops.class_moments(x, w, y, 11.0, "cpu")
    assert sums.shape == (133, MOMENTS)
    for k in range(MOMENTS):
        size = ((11 * cosine).exp() * cosine.abs() ** k * negative).sum(1)
        right = ((11 * cosine).exp() * cosine**k * negative).sum(1)
        assert ((sums[:, k] - right).abs() / size).max() < (1 + k) * DTYPES[dtype]
    torch.testing.assert_close(
        maximum.double(), cosine.masked_fill(~negative, -2).amax(1), rtol=DTYPES[dtype], atol=DTYPES[dtype]
    )


def test_the_sum_at_another_scale() -> None:
    x, w, y = problem()
    cosine, negative = cosines(x, w, y)
    moments = adapting.Moments(11.0, *ops.class_moments(x, w, y, 11.0, "cpu"))
    for scale in (10.0, 10.9, 11.0, 11.3, 12.0):
        total = moments.total(scale)
        assert total is not None
        torch.testing.assert_close(total, ((scale * cosine).exp() * negative).sum(1), rtol=2e-12, atol=0)
    for far in (9.9, 12.1, float("nan"), float("inf")):
        assert moments.total(far) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_gradients(dtype: torch.dtype) -> None:
    """The gradient by the centers bit for bit as alone, that by the unit rows by its formula."""
    x, w, y = problem(dtype)
    cosine, negative = cosines(x, w, y)
    compute = torch.promote_types(dtype, torch.float32)
    lse = ((11 * cosine).exp() * negative).sum(1).log()
    of_negatives, of_target = torch.linspace(0.1, 2, 133, dtype=compute), torch.linspace(-3, 1, 133, dtype=compute)
    gradients = 11.0, lse, of_negatives, of_target
    d_weight, d_unit = ops.both_gradients(x, w, y, *gradients, "cpu")
    assert torch.equal(d_weight, ops.weight_grad(x, w, y, *gradients, "cpu"))
    shares = of_negatives.double()[:, None] * (11 * cosine - lse[:, None]).exp() * negative
    right = shares @ F.normalize(w.double())
    assert d_unit.dtype == compute
    torch.testing.assert_close(d_unit.double(), right, rtol=0, atol=DTYPES[dtype] * right.abs().max().item())


def steps(
    loss: Callable[..., Tensor], scale: fa.AdaCos, target: Any, x: Tensor, w: Tensor, **options: Any
) -> list[Tensor]:
    results = []
    for step in range(3):
        a, b = (each.roll(step, 1).clone().requires_grad_() for each in (x, w))
        value = loss(a, b, target, scale=scale, **options)
        value.backward()
        results += [value.detach(), scale.scale.clone(), a.grad, b.grad]
    return results


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed labels"])
@pytest.mark.parametrize("start", [10.7, 20.0], ids=["one pass", "two passes at first"])
def test_steps(start: float, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, scales and gradients of the oracle, and the number of passes that sum exponentials."""
    x, w, y = problem()
    target: Any = (y.clamp(min=0), y.clamp(min=0).roll(1), 0.8) if mixed else y
    calls = []
    total = adapting.Moments.total

    def watched(self: adapting.Moments, scale: float) -> Tensor | None:
        result = total(self, scale)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(adapting.Moments, "total", watched)
    results = []
    for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss):
        scale = fa.AdaCos()
        scale.scale.fill_(start)
        results.append(steps(loss, scale, target, x, w, ignore_index=-1))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
    assert len(calls) == 3 and calls[0] == (start == 10.7)
    assert start == 20.0 or all(calls)


def test_without_gradients_and_with_one_of_them() -> None:
    x, w, y = problem()
    settled = fa.AdaCos()
    settled.scale.fill_(10.7)

    def gradients(loss: Callable[..., Tensor], of_rows: bool, of_centers: bool) -> list[Tensor]:
        a, b = x.clone().requires_grad_(of_rows), w.clone().requires_grad_(of_centers)
        value = loss(a, b, y, ignore_index=-1, scale=copy.deepcopy(settled))
        if of_rows or of_centers:
            value.backward()
        return [value.detach(), *(each.grad for each in (a, b) if each.grad is not None)]

    for wanted in ((True, False), (False, True), (False, False)):
        both = [gradients(loss, *wanted) for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss)]
        assert len(both[0]) == 1 + sum(wanted)
        torch.testing.assert_close(both[0], both[1], rtol=1e-10, atol=1e-12)
