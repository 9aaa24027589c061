"""Options of each row on the Triton backend, in Triton's interpreter: the oracle's loss and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed here")

from support.cases import Case, make_inputs
from support.triton_cases import INTERPRETED

import fused_arcface as fa
from fused_arcface.base.options import HeadOptions
from fused_arcface.engine import mixed
from fused_arcface.engine.step import loss_over_classes
from fused_arcface.engine.targets import Rows, Target
from fused_arcface.engine.terms import PLAIN, CenterStep, RowGradients, SecondTarget

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


def test_mixed_labels() -> None:
    x, w, first, _ = make_inputs(Case(6, 9, 16))
    second, share = (first + 2) % 9, torch.linspace(0, 1, 6)
    second[1] = first[1]
    rows = Rows(Target(first, first), None, Target(second, second), share)
    compare(rows, x, w, target=(first, second, share))


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.int8])
def test_an_update_with_mixed_labels(momentum_dtype: torch.dtype) -> None:
    """The padded list of second targets, on the backend that is used on a GPU: plain PyTorch's step."""
    torch.manual_seed(0)
    x, w, first, _ = make_inputs(Case(6, 9, 70))
    second = torch.tensor([2, -1, 7, 2, 0, -1])
    of_rows = RowGradients(8.0, torch.full((6,), 3.0, dtype=torch.float64), torch.rand(6), -torch.rand(6))
    results = []
    for backend, padded in (("torch", False), ("torch", True), ("triton", True)):
        weight, buffer = w.clone(), torch.zeros(9, 70, dtype=momentum_dtype)
        units = torch.zeros(9, 2) if momentum_dtype == torch.int8 else None
        step = CenterStep(None, buffer, units, 0.1, 0.9, 0.01, 3, 0, torch.tensor(True))
        with pytest.MonkeyPatch.context() as patch:
            if padded:
                patch.setattr(mixed, "reads_for_free", lambda numbers: False)
            target = SecondTarget(second, torch.linspace(-1, 1, 6))
            mixed.update_both(x, weight, first, of_rows, step, backend, PLAIN, target)
        results.append((weight, buffer.float() * (1 if units is None else units.repeat_interleave(64, 1)[:, :70])))
    for result in results[1:]:
        torch.testing.assert_close(result[0], results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            result[1], results[0][1], rtol=1e-5, atol=0.03 if momentum_dtype == torch.int8 else 1e-5
        )
    assert (results[0][0] - w).abs().max() > 1e-3
