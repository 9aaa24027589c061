"""InterTopK: the toolkit's formula, the search for the hardest negatives, the backends that have it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.cases import everywhere
from torch import Tensor

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.engine import nearest


def inter_topk(
    x: Tensor, w: Tensor, y: Tensor, m: float, mp: float, k_top: int, scale: float, sub_centers: int = 1
) -> Tensor:
    """WeSpeaker's loss in this test's words: (N,), over all logits of the row."""
    cosine = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    cosine = cosine.unflatten(1, (-1, sub_centers)).amax(2)
    own = torch.nn.functional.one_hot(y, cosine.shape[1]).bool()
    angle = cosine.acos()
    with_margin = torch.where(angle + m <= math.pi, (angle + m).cos(), cosine - (1 - math.cos(m)))
    hardest = cosine.masked_fill(own, -2).topk(k_top).indices
    nearer = torch.zeros_like(own).scatter(1, hardest, True) & ~own
    logits = torch.where(own, with_margin, torch.where(nearer, (angle - mp).cos(), cosine))
    return torch.nn.functional.cross_entropy(scale * logits, y, reduction="none")


@everywhere
@pytest.mark.parametrize(("k", "sub_centers"), [(1, 1), (5, 1), (3, 2), (12, 1), (40, 1)])
def test_inter_topk_is_the_toolkits_formula(
    loss: Callable[..., Tensor], options: dict[str, str], k: int, sub_centers: int
) -> None:
    """13 classes, so that k = 12 is all negatives and 40 more than there are. Values and gradients in fp64."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    w = torch.randn(13 * sub_centers, 8, dtype=torch.float64, generator=generator)
    x[4] = 0.3 * x[4] - w[4 * sub_centers]  # past θ + m = π
    y = torch.tensor([0, 3, 12, 7, 4, 3])
    results = []
    margin = fa.InterTopK(fa.ArcFace(0.2, "continuous"), penalty=0.06, k=k)
    for run_it in (
        lambda a, b: loss(a, b, y, margin=margin, scale=32.0, reduction="none", sub_centers=sub_centers, **options),
        lambda a, b: inter_topk(a, b, y, 0.2, 0.06, min(k, 13), 32.0, sub_centers),
    ):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        row_losses = run_it(a, b)
        (row_losses * torch.arange(1, 7)).sum().backward()
        results.append((row_losses.detach(), a.grad, b.grad))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [7, 16384])
def test_inter_topk_searches_in_blocks(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the two greatest of the negatives 0.1·j, j = 0 … 9, without the target's own 0.9."""
    monkeypatch.setattr(nearest, "_CLASSES", size)
    cosines = torch.arange(10, dtype=torch.float64) / 10
    w = torch.stack([cosines, (1 - cosines**2).sqrt()], 1)
    x, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([9])
    found = torch.ops.fused_arcface.hardest_negatives(x, w, y, 2, 1)
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.7]], dtype=torch.float64), rtol=0, atol=1e-15)
    padded = torch.ops.fused_arcface.hardest_negatives(x, w, y, 2, 1, torch.tensor(4))
    torch.testing.assert_close(padded, torch.tensor([[0.3, 0.2]], dtype=torch.float64), rtol=0, atol=1e-15)


def test_a_backend_without_it_says_so() -> None:
    expected = "^backend 'triton' does not have the turned negatives of InterTopK: 'torch' and 'cpu'.* and 'cuda'.* do$"
    options = {"margin": fa.InterTopK(), "backend": "triton"}
    x, w, y = torch.randn(2, 4), torch.randn(6, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=expected):
        fa.margin_softmax_loss(x, w, y, **options)
    for make in (fa.MarginHead, fa.PartialFC):
        with pytest.raises(ValueError, match=expected):
            make(4, 2, **options)(x, y)


def test_auto_takes_a_backend_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.registry, "_unavailable", dict.fromkeys(backends.NAMES).get)
    for needs, expected in (({"sub_centers": ""}, "triton"), ({"turned_negatives": ""}, "cuda")):
        assert backends.select("auto", torch.device("cuda"), needs=needs) == expected
        assert backends.select("auto", torch.device("cpu"), needs=needs) == "cpu"
