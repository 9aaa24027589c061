"""Options of each row on the Triton backend, in Triton's interpreter: the oracle's loss and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from support.cases import Case, make_inputs
from support.triton_cases import INTERPRETED

import fused_arcface as fa
from fused_arcface.base.options import HeadOptions
from fused_arcface.engine.step import loss_over_classes
from fused_arcface.engine.targets import Rows, Target

pytestmark = INTERPRETED


def compare(rows: Rows, x: torch.Tensor, w: torch.Tensor, **options: object) -> None:
    """Against the oracle, whose arguments beside the margin are ``options``."""
    x, w = x.requires_grad_(), w.requires_grad_()
    got, _ = loss_over_classes(x, w, rows, HeadOptions(fa.ArcFace()), "mean", "triton")
    right = fa.reference.margin_softmax_loss(x.double(), w.double(), **options)
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=0)
    for mine, truth in zip(torch.autograd.grad(got, (x, w)), torch.autograd.grad(right, (x, w)), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def test_weighted_rows() -> None:
    x, w, target, _ = make_inputs(Case(6, 9, 16))
    weights = torch.linspace(0, 2, 6)
    compare(Rows(Target(target, target), weights), x, w, target=target, sample_weight=weights)
