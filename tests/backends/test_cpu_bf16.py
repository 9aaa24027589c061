"""Products of bf16 embeddings on the CPU: in bf16 where the processor multiplies it, as fp32 elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.cases import Case, Inputs, make_inputs, run
from torch import Tensor

import fused_arcface as fa
from fused_arcface import _native
from fused_arcface.app.benchmark import peers
from fused_arcface.backends import cpu

_ops = torch.ops.fused_arcface
BF16_ISA = "avx512_bf16"
needs_bf16 = pytest.mark.skipif(BF16_ISA not in _native.isas(), reason="this processor does not multiply bf16")
OTHER_ISAS = [isa for isa in _native.isas() if isa != BF16_ISA]
EXACT = Case(N=33, C=150, D=70, x_dtype="bfloat16", w_dtype="bfloat16", geometry="late")
MIXED = Case(N=33, C=150, D=70, x_dtype="bfloat16", geometry="late")


def stages(inputs: Inputs) -> tuple[Tensor, ...]:
    """The results of both passes over the classes."""
    x, w, target, _ = inputs
    target = target.clamp(min=-1)
    total, maximum, center_sum = _ops.class_stats(x, w, target, 16.0, None, True, "cpu")
    coefficients = torch.linspace(-1, 1, len(x))
    d_weight = _ops.weight_grad(x, w, target, 16.0, total.double().log(), coefficients, -coefficients, "cpu")
    return total, maximum, center_sum, d_weight


@pytest.mark.parametrize("isa", OTHER_ISAS)
@pytest.mark.parametrize("case", [EXACT, MIXED], ids=str)
def test_without_the_instruction_rows_are_converted(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen at run time, and to the bit what fp32 rows of the same values give."""
    monkeypatch.setenv("FUSED_ARCFACE_ISA", isa)
    assert not cpu.multiplies_bf16()
    inputs = make_inputs(case)
    for got, right in zip(stages(inputs), stages(inputs._replace(embeddings=inputs.embeddings.float())), strict=True):
        assert torch.equal(got, right)


def test_full_precision_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "allow_bf16_products", False)
    assert not cpu.multiplies_bf16()
    inputs = make_inputs(MIXED)
    for got, right in zip(stages(inputs), stages(inputs._replace(embeddings=inputs.embeddings.float())), strict=True):
        assert torch.equal(got, right)


@needs_bf16
@pytest.mark.parametrize("case", [EXACT, MIXED], ids=str)
def test_bf16_is_chosen_for_bf16_embeddings_alone(case: Case) -> None:
    """The second products round their operands, which shows; cosines of bf16 rows are as exact as fp32's."""
    assert cpu.multiplies_bf16()
    inputs = make_inputs(case)
    full = inputs._replace(embeddings=inputs.embeddings.float())
    got, right = stages(inputs), stages(full)
    assert not torch.equal(got[2], right[2]) and not torch.equal(got[3], right[3])
    if case is EXACT:
        torch.testing.assert_close(got[0], right[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(got[1], right[1], rtol=0, atol=2e-7)
    fp64 = inputs._replace(embeddings=inputs.embeddings.double())
    assert all(torch.equal(a, b) for a, b in zip(stages(fp64), stages(fp64), strict=True))


@needs_bf16
def test_rows_of_another_dtype_are_rounded_once() -> None:
    """fp32 centers beside bf16 embeddings count as their bf16 values, up to their own norms' last bits."""
    inputs = make_inputs(MIXED)
    rounded = inputs._replace(weight=inputs.weight.bfloat16())
    for got, right in zip(stages(inputs)[:3], stages(rounded)[:3], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6 * right.abs().max().item())


@needs_bf16
@pytest.mark.parametrize("geometry", ["random", "late", "aligned", "duplicates"])
def test_under_autocast_no_worse_than_eager_under_autocast(geometry: str) -> None:
    """Errors against fp64 on the fp32 inputs, at most twice those of the plain head under autocast."""
    margin = fa.ArcFace(boundary="none")
    x, w, target, _ = make_inputs(Case(N=64, C=400, D=128, geometry=geometry))

    def ours(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        loss = fa.margin_softmax_loss(x, w, target, margin=margin, backend="cpu")
        assert isinstance(loss, Tensor)
        return loss

    def exact(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        loss = fa.reference.margin_softmax_loss(x, w, target, margin=margin)
        assert isinstance(loss, Tensor)
        return loss

    def results(loss: peers.Loss, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = x.to(dtype, copy=True).requires_grad_(), w.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            value = loss(*leaves, target)
        return value.detach().double(), *(each.double() for each in torch.autograd.grad(value, leaves))

    right = results(exact, torch.float64)
    for got, eager, true in zip(results(ours, torch.float32), results(peers.plain, torch.float32), right, strict=True):
        error, allowed = (got - true).abs().max(), (eager - true).abs().max()
        assert error <= 2 * allowed + 1e-6 * true.abs().max()


@needs_bf16
@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("margin", [fa.ArcFace(), fa.CurricularFace(), fa.MVSoftmax()], ids=lambda m: type(m).__name__)
def test_sub_centers_and_modulated_negatives(sub_centers: int, margin: object) -> None:
    inputs = make_inputs(Case(N=17, C=99, D=65, x_dtype="bfloat16", w_dtype="bfloat16", scale=16.0))
    inputs = inputs._replace(target=torch.arange(17))
    exact = inputs._replace(embeddings=inputs.embeddings.double(), weight=inputs.weight.double())
    options = {"scale": 16.0, "sub_centers": sub_centers}
    got = run(fa.margin_softmax_loss, inputs, backend="cpu", margin=copy.deepcopy(margin), **options)
    right = run(fa.reference.margin_softmax_loss, exact, margin=copy.deepcopy(margin), **options)
    torch.testing.assert_close(got.loss, right.loss, rtol=1e-5, atol=1e-5)
    for name in ("d_embeddings", "d_weight"):
        mine, theirs = getattr(got, name), getattr(right, name)
        assert (mine - theirs).abs().max() <= 2.0**-7 * theirs.abs().max(), name


@needs_bf16
def test_center_sgd() -> None:
    """A step in place of a gradient: centers move by lr times the gradient that fp64 has."""
    torch.manual_seed(0)
    head = fa.PartialFC(40, 300, scale=16.0, center_optimizer=fa.CenterSGD(lr=0.5, momentum=0.0), backend="cpu")
    before = head.weight.detach().clone()
    x, target = torch.randn(33, 40).bfloat16(), torch.randint(300, (33,))
    weight = before.double().requires_grad_()
    loss = fa.reference.margin_softmax_loss(x.double(), weight, target, scale=16.0)
    assert isinstance(loss, Tensor)
    (gradient,) = torch.autograd.grad(loss, weight)
    head(x, target).backward()
    moved = (before - head.weight.detach()).double() / 0.5
    assert (moved - gradient).abs().max() <= 2.0**-6 * gradient.abs().max()


@needs_bf16
def test_a_row_alone_and_columns_that_are_odd() -> None:
    for D in (1, 2, 3, 31, 32, 33, 65):
        x, w = torch.randn(1, D).bfloat16(), torch.randn(3, D).bfloat16()
        total, maximum, center_sum = _ops.class_stats(x, w, torch.tensor([1]), 4.0, None, True, "cpu")
        unit = F.normalize(w.double())[[0, 2]]
        cosine = (F.normalize(x.double()) @ unit.T).squeeze(0)
        torch.testing.assert_close(total.double(), (4 * cosine).exp().sum()[None], rtol=1e-6, atol=0)
        torch.testing.assert_close(maximum.double(), cosine.max()[None], rtol=0, atol=2e-7)
        right = ((4 * cosine).exp()[:, None] * unit).sum(0)
        assert (center_sum[0].double() - right).abs().max() <= 2.0**-8 * (4 * cosine).exp().sum()
