"""Real sizes: a million identities, and class centers of more than 2³¹ elements. All of it in the full run only."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_arcface as fa
from fused_arcface.backends.torch import unit_gradient


def free_gib() -> float:
    """Memory that the system has left, where it tells (Linux does)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    return next(int(line.split()[1]) for line in meminfo.open() if line.startswith("MemAvailable")) / 2**20


pytestmark = [
    pytest.mark.full,
    pytest.mark.serial,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(free_gib() < 12, reason="needs 12 GiB of free memory"),
]

# Rows are repeated with a period that no power of two is a multiple of: an offset that wraps around finds another row.
PERIOD = 65_537
SCALE, MARGIN = 64.0, fa.ArcFace(0.5)


def make_weight(num_classes: int, dim: int, dtype: torch.dtype) -> Tensor:
    block = torch.randn(PERIOD, dim).to(dtype)
    weight = torch.empty(num_classes, dim, dtype=dtype)
    for part in weight.split(PERIOD):
        part.copy_(block[: len(part)])
    return weight


class Truth:
    """The head in fp64, over chunks of the classes: row losses, embedding gradients, and any class's gradient."""

    def __init__(self, x: Tensor, weight: Tensor, target: Tensor) -> None:
        self.unit_x, self.weight, self.target = F.normalize(x.double()), weight, target
        total, center_sum = torch.zeros(len(x), dtype=torch.float64), torch.zeros_like(self.unit_x)
        # Logits are at most the scale: exp(logit - scale) needs no maximum.
        for start in range(0, len(weight), 2**16):
            unit_w = F.normalize(weight[start : start + 2**16].double())
            columns = torch.arange(start, start + len(unit_w))
            terms = (SCALE * (self.unit_x @ unit_w.T - 1)).exp().masked_fill(target[:, None] == columns, 0)
            total += terms.sum(1)
            center_sum += terms @ unit_w
        self.lse = total.log() + SCALE
        centers = F.normalize(weight[target].double())
        cosine = (self.unit_x * centers).sum(1).requires_grad_()
        gap = self.lse - SCALE * MARGIN(cosine)
        self.loss = F.softplus(gap, threshold=40).detach()
        self.sigmoid = gap.sigmoid().detach()
        (self.d_target,) = torch.autograd.grad(F.softplus(gap, threshold=40).sum(), cosine)
        d_unit = SCALE * self.sigmoid[:, None] * center_sum / total[:, None] + self.d_target[:, None] * centers
        self.d_embeddings = unit_gradient(d_unit, x.double())

    def d_weight(self, classes: Tensor) -> Tensor:
        rows = self.weight[classes].double()
        terms = (SCALE * self.unit_x @ F.normalize(rows).T - self.lse[:, None]).exp() * SCALE * self.sigmoid[:, None]
        terms = torch.where(self.target[:, None] == classes, self.d_target[:, None], terms)
        return unit_gradient(terms.T @ self.unit_x, rows)


def compute(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch.set_num_threads(2)
    x.requires_grad_()
    weight.requires_grad_()
    loss = fa.margin_softmax_loss(x, weight, target, margin=MARGIN, scale=SCALE, reduction="none", backend="cpu")
    gradients = torch.autograd.grad(loss.sum(), (x, weight))
    weight.requires_grad_(False)
    return loss.detach(), *gradients


def assert_rows_close(got: Tensor, right: Tensor, allowed: float) -> None:
    error = (got.double() - right).abs().amax(1) / right.abs().amax(1)
    assert error.max() <= allowed


def test_one_million_identities() -> None:
    weight = make_weight(1_000_000, 512, torch.float32)
    target = torch.randint(1_000_000, (128,))
    x = 0.7 * F.normalize(weight[target]) + 0.7 * F.normalize(torch.randn(128, 512))
    loss, d_x, d_weight = compute(x, weight, target)
    sample = torch.tensor([0, 1, 63, 64, 126, 127])
    # The class gradients need every row's log-sum-exp: the truth is computed for all rows.
    truth = Truth(x.detach(), weight, target)
    torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-5, atol=0)
    assert_rows_close(d_x[sample], truth.d_embeddings[sample], 1e-4)
    classes = torch.cat([target[:32], torch.randint(1_000_000, (200,)), torch.tensor([0, 95, 96, 999_999])]).unique()
    assert_rows_close(d_weight[classes], truth.d_weight(classes), 1e-4)


def test_more_than_two_to_the_31_elements() -> None:
    num_classes, dim = 4_300_000, 512
    assert num_classes * dim > 2**31
    edge = 2**31 // dim
    weight = make_weight(num_classes, dim, torch.bfloat16)
    target = torch.tensor([num_classes - 1, edge])
    x = (0.5 * F.normalize(weight[target].float()) + F.normalize(torch.randn(2, dim))).bfloat16()
    loss, d_x, d_weight = compute(x, weight, target)
    truth = Truth(x.detach(), weight, target)
    torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-5, atol=0)
    assert_rows_close(d_x, truth.d_embeddings, 2**-8)
    classes = torch.tensor([0, 1, edge - 1, edge, edge + 1, num_classes - 2, num_classes - 1])
    assert_rows_close(d_weight[classes], truth.d_weight(classes), 2**-8)
