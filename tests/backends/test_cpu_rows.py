"""The CPU backend's stages over the rows, on each instruction set, against fp64 in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from support.cases import LAYOUTS

import fused_arcface as fa
from fused_arcface.backends import cpu
from fused_arcface.backends import torch as plain_torch
from fused_arcface.base.dtypes import compute_dtype

pytestmark = pytest.mark.usefixtures("isa", "poison")

DTYPES = [(torch.float32, 2e-6), (torch.float64, 4e-15)]


@pytest.mark.parametrize(("dtype", "allowed"), DTYPES, ids=["fp32", "fp64"])
@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("boundary", ["none", "hard", "fold", "clip", "easy", "continuous", "linear"])
def test_margin_agrees_point_by_point(boundary: str, gradient: str, dtype: torch.dtype, allowed: float) -> None:
    """csrc/margin.h against fused_arcface.margins in fp64 over a dense grid with both ends."""
    cosine = torch.cat([torch.linspace(-1, 1, 1021), torch.tensor([-1.0, -0.0, 0.0, 1.0])]).to(dtype)
    order = torch.randperm(cosine.numel(), generator=torch.Generator().manual_seed(0))
    lse = torch.linspace(-80, 80, cosine.numel(), dtype=dtype)[order]
    for m1, m2, m3 in [(1.0, 0.5, 0.0), (4.0, 0.0, 0.1), (1.35, 0.4, 0.2)]:
        numbers = (64.0, m1, m2, m3, boundary, gradient)
        phi = m1 * cosine.double().acos() + m2
        # A jump lies at a multiple of π, and fp32 may see it one rounding away.
        away = ((phi / math.pi - (phi / math.pi).round()).abs() > 1e-6) | (phi < 1)
        results = cpu.margin_loss(lse, cosine, *numbers)
        expected = plain_torch.margin_loss(lse.double(), cosine.double(), *numbers)
        for name, result, truth in zip(("loss", "lse", "d_lse", "d_cosine"), results, expected, strict=True):
            scale = 64 * m1 / fa.margins.SIN_FLOOR if name == "d_cosine" else 64
            error = ((result - truth).abs() / truth.abs().clamp(min=scale))[away].max()
            assert error < allowed, (name, m1, m2, m3, error)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_stages_agree_with_the_reference(x_dtype: torch.dtype, w_dtype: torch.dtype, layout: str) -> None:
    for N, C, D in ((1, 1, 1), (3, 2, 7), (70, 9, 33), (2, 5, 513)):
        x, w = LAYOUTS[layout](torch.randn(N, D).to(x_dtype)), LAYOUTS[layout](torch.randn(C, D).to(w_dtype))
        w[0] = 0
        x[-1] = 0
        target = torch.randint(C, (N,))
        target[::5] = -1
        target[3::7] = -2
        dtype = compute_dtype(x, w)
        mean, negative, positive = (
            torch.randn(N, D, dtype=dtype),
            torch.randn(N, dtype=dtype),
            torch.randn(N, dtype=dtype),
        )
        allowed = 1e-14 if dtype == torch.float64 else 2e-6

        cosine = cpu.target_cosine(x, w, target)
        right = plain_torch.target_cosine(x.double(), w.double(), target)
        assert cosine.dtype == dtype
        torch.testing.assert_close(cosine.double(), right, rtol=0, atol=allowed, equal_nan=True)

        d_unit = cpu.unit_embedding_grad(w, target, mean, negative, positive)
        doubled = (each.double() for each in (mean, negative, positive))
        right = plain_torch.unit_embedding_grad(w.double(), target, *doubled)
        torch.testing.assert_close(d_unit.double(), right, rtol=allowed, atol=allowed * 4)

        d_x = cpu.embedding_grad(d_unit * 1e-9, x)
        right = plain_torch.embedding_grad(d_unit.double() * 1e-9, x.double())
        assert d_x.dtype == x_dtype
        rounding = max(allowed, torch.finfo(x_dtype).eps)
        for got, expected in zip(d_x.double(), right, strict=True):
            size = expected.abs().max().item() + torch.finfo(x_dtype).tiny
            torch.testing.assert_close(got, expected, rtol=rounding, atol=4 * rounding * size)


def test_many_rows_on_several_threads() -> None:
    torch.set_num_threads(3)
    x, w, target = torch.randn(1100, 3000), torch.randn(5, 3000), torch.randint(5, (1100,))
    torch.testing.assert_close(
        cpu.target_cosine(x, w, target), plain_torch.target_cosine(x, w, target), rtol=0, atol=1e-6
    )
    d_unit = torch.randn(1100, 3000)
    torch.testing.assert_close(
        cpu.embedding_grad(d_unit, x), plain_torch.embedding_grad(d_unit, x), rtol=1e-5, atol=1e-6
    )
