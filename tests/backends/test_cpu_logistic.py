"""The logistic losses in the compiled kernels, on each instruction set that this machine has."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_arcface as fa

pytestmark = pytest.mark.usefixtures("isa", "poison")

# Exponents: 1, small and whole, not whole, large. Biases at which all losses are far below or above 1.
MARGINS = {
    "UniFace": fa.UniFace(bias=5.0),
    "UniFace, far": fa.UniFace(bias=60.0),
    "SphereFace2": fa.SphereFace2(),
    "SphereFace2, arc": fa.SphereFace2(0.3, 2.7, kind="arc", bias=-2.0),
    "SphereFace2, 16": fa.SphereFace2(0.1, 16.0, bias=8.0),
}


def right_losses(margin: torch.nn.Module, x: Tensor, w: Tensor, y: Tensor, scale: float, sub_centers: int) -> Tensor:
    """The rows' losses from all cosines, in fp64, by the formulas of the docstrings."""
    cosine = F.normalize(x) @ F.normalize(w).T
    cosine = cosine.unflatten(1, (-1, sub_centers)).amax(2)
    own = F.one_hot(y, cosine.shape[1]).bool()
    bias = margin.bias.double()
    if isinstance(margin, fa.UniFace):
        positive, negative = scale * (cosine - margin.margin) - bias, scale * cosine - bias
        weights = 1.0, margin.weight
    else:
        first, second = cosine, cosine
        if margin.kind == "arc":
            theta, m = cosine.clamp(-1 + 1e-12, 1 - 1e-12).acos(), margin.margin
            first = torch.where(theta + m <= math.pi, (theta + m).cos(), cosine - (1 - math.cos(m)))
            second = (theta - m).cos()
        offset = margin.margin if margin.kind == "cos" else 0.0
        positive, negative = (
            scale * (2 * ((each + 1) / 2) ** margin.exponent - 1 + sign * offset) + bias
            for each, sign in ((first, -1), (second, 1))
        )
        weights = margin.share, 1 - margin.share
    return torch.where(own, weights[0] * F.softplus(-positive), weights[1] * F.softplus(negative)).sum(1)


def problem(sub_centers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """More rows and classes than fit into one block of the kernels, some rows near their centers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(133, 19, generator=generator, dtype=torch.float64)
    w = torch.randn(301 * sub_centers, 19, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 301, (133,), generator=generator)
    x[:40] = 0.5 * x[:40] + w[y[:40] * sub_centers]
    return x.to(dtype), w.to(dtype), y


@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.slow
def test_against_fp64(name: str, sub_centers: int, dtype: torch.dtype) -> None:
    """Values and all gradients: 1e-10 in fp64; below, twice the error of plain PyTorch and a little more."""
    scale = 24.0
    x, w, y = problem(sub_centers, dtype)
    upstream = torch.linspace(0.1, 1, len(x), dtype=torch.float64)

    def run(backend: str | None) -> tuple[Tensor, ...]:
        a, b = (each.double() if backend is None else each for each in (x, w))
        a, b = (each.clone().requires_grad_() for each in (a, b))
        margin = copy.deepcopy(MARGINS[name])
        if backend is None or dtype == torch.float64:
            margin = margin.double()
        if backend is None:
            losses = right_losses(margin, a, b, y, scale, sub_centers)
        else:
            options = {"margin": margin, "scale": scale, "sub_centers": sub_centers, "reduction": "none"}
            losses = fa.margin_softmax_loss(a, b, y, backend=backend, **options)
        (losses * upstream.to(losses.dtype)).sum().backward()
        return tuple(each.detach().double() for each in (losses, a.grad, b.grad, margin.bias.grad))

    for mine, plain, right in zip(run("cpu"), run("torch"), run(None), strict=True):
        size = right.abs().max()
        error, allowed = (mine - right).abs().max() / size, (plain - right).abs().max() / size
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 2e-3}[dtype]
        assert error <= 2 * allowed + tolerance, (error, allowed)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.slow
def test_gradcheck(name: str) -> None:
    x, w, y = problem(1, torch.float64)
    x, w, y = x[35:40].requires_grad_(), w[:7].requires_grad_(), y[35:40] % 7
    margin = copy.deepcopy(MARGINS[name]).double()

    def losses(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        margin.bias = bias
        return fa.margin_softmax_loss(x, w, y, margin=margin, scale=8.0, reduction="none", backend="cpu")

    assert torch.autograd.gradcheck(losses, (x, w, margin.bias), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["UniFace", "SphereFace2, arc"])
def test_center_sgd_is_sgd_on_the_gradient(name: str) -> None:
    x, w, y = problem(1, torch.float64)
    options = {"margin": copy.deepcopy(MARGINS[name]).double(), "scale": 24.0, "backend": "cpu", "dtype": torch.float64}
    updated = fa.PartialFC(19, 301, center_optimizer=fa.CenterSGD(0.3, momentum=0.9), **options)
    dense = fa.PartialFC(19, 301, **options)
    for head in (updated, dense):
        head.load_full_weight(w)
    optimizer = torch.optim.SGD([dense.weight], 0.3, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        losses = [head(x, y) for head in (updated, dense)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
        for loss in losses:
            loss.backward()
        optimizer.step()
    assert not torch.equal(dense.weight, w)
    torch.testing.assert_close(updated.weight, dense.weight, rtol=1e-10, atol=1e-12)


def test_losses_far_below_and_above_one() -> None:
    """One negative: softplus to the last bits from e^-79 on, and its derivative by the bias."""
    biases = [-79.0, -40.0, -17.5, -1.0, -1e-4, 0.0, 1e-4, 0.3, 3.0, 90.0, 1e4]
    for dtype, allowed in ((torch.float32, 2e-6), (torch.float64, 2e-14)):
        x, w = torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype)
        for bias in biases:
            logistic = torch.tensor([1.0, 1.0, 0.0, 0.0, bias], dtype=torch.float64)
            operators = torch.ops.fused_arcface
            total, _, _ = operators.class_stats(
                x, w, torch.tensor([0]), 1.0, None, False, "cpu", sub_centers=1, logistic=logistic
            )
            right = math.log1p(math.exp(bias)) if bias < 80 else bias
            assert total.item() == pytest.approx(right, rel=allowed, abs=1e-300)
            lse = torch.tensor([math.log(right)], dtype=torch.float64)
            slope = operators.bias_grad(x, w, torch.tensor([0]), lse, lse.exp(), "cpu", logistic=logistic)
            assert slope.item() == pytest.approx(1 / (1 + math.exp(-bias)), rel=4 * allowed, abs=1e-300)


def test_nan_stays_in_its_row() -> None:
    x, w, y = problem(1, torch.float32)
    x[3] = math.nan
    x.requires_grad_()
    losses = fa.margin_softmax_loss(x, w, y, margin=fa.SphereFace2(exponent=2.7), reduction="none", backend="cpu")
    losses.sum().backward()
    others = torch.arange(len(x)) != 3
    assert losses[3].isnan() and losses[others].isfinite().all()
    assert x.grad[3].isnan().any() and x.grad[others].isfinite().all()
