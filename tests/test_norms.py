"""Rows of any norm that their dtype holds: fp32 squares overflow from 2e19 on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fused_arcface as fa

NORMS = [1e-25, 1e-13, 1.0, 1e19, 1e25, 1e37]


@pytest.mark.parametrize("norm", NORMS)
def test_cosines_of_rows_of_any_norm(norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(4, 16, generator=generator)) * norm
    w = torch.randn(5, 16, generator=generator)
    y = torch.tensor([0, 1, 2, 4])
    expected = F.normalize(x.double()) @ F.normalize(w.double()).T

    head = fa.MarginHead(16, 5)
    with torch.no_grad():
        head.weight.copy_(w)
    torch.testing.assert_close(head.logits(x).double() / head.scale, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(head.topk(x, 5)[0].double(), expected.sort(1, descending=True).values, rtol=0, atol=1e-6)
    loss, stats = fa.margin_softmax_loss(x, w, y, return_stats=True)
    of_targets = expected.gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(stats.target_cosine.double(), of_targets, rtol=0, atol=1e-6)
    right = fa.reference.margin_softmax_loss(x.double(), w.double(), y)
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
