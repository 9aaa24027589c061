"""distillation_loss against kl_div over all logits in fp64, with gradients, by blocks and at any scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_arcface as fa
from fused_arcface import distillation


def problem() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (11, 6), (5, 4), (11, 4))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def right(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor, scale: float, teacher_scale: float) -> Tensor:
    student = (scale * F.normalize(x) @ F.normalize(w).T).log_softmax(1)
    teacher = (teacher_scale * F.normalize(tx) @ F.normalize(tw).T).log_softmax(1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


@pytest.mark.parametrize("block", [1 << 22, 5 * 4])
@pytest.mark.parametrize(("scale", "teacher_scale"), [(16.0, 16.0), (64.0, 30.0), (1000.0, 500.0), (1.0, 4.0)])
def test_values_and_gradients(scale: float, teacher_scale: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_CPU_BLOCK", block)
    upstream = torch.arange(1, 6, dtype=torch.float64)
    results = []
    for function in (
        lambda *tensors: right(*tensors, scale, teacher_scale),
        lambda *tensors: fa.distillation_loss(*tensors, scale=scale, teacher_scale=teacher_scale, reduction="none"),
    ):
        leaves = [each.clone().requires_grad_() for each in problem()]
        loss = function(*leaves)
        (loss * upstream).sum().backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    leaves = [each.requires_grad_() for each in problem()]
    assert torch.autograd.gradcheck(lambda *t: fa.distillation_loss(*t, scale=6.0, reduction="none"), leaves)


def test_equal_softmaxes_have_no_divergence_and_no_gradient() -> None:
    x, w, *_ = (each.float() for each in problem())
    leaf, centers = x.requires_grad_(), w.requires_grad_()
    loss = fa.distillation_loss(leaf, centers, 2 * x.detach(), 3 * w.detach())
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert leaf.grad.abs().max() < 1e-4 and centers.grad.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_a_frozen_teacher(dtype: torch.dtype) -> None:
    x, w, tx, tw = problem()
    leaf = x.to(dtype).requires_grad_()
    loss = fa.distillation_loss(leaf, w.float().requires_grad_(), tx.float(), tw.float(), scale=16.0)
    loss.backward()
    assert loss.dtype == torch.float32 and leaf.grad.dtype == dtype
    expected = right(leaf.detach().double(), w, tx, tw, 16.0, 16.0).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    again = fa.distillation_loss(leaf, w.float(), tx.float(), tw.float(), scale=16.0)
    again.backward()
    with pytest.raises(RuntimeError, match="second time"):
        again.backward()
    empty = fa.distillation_loss(x[:0], w, tx[:0], tw, reduction="none")
    assert empty.shape == (0,)


@pytest.mark.slow
def test_opcheck() -> None:
    scales = torch.tensor([8.0, 5.0], dtype=torch.float64)
    operators = torch.ops.fused_arcface
    for dtypes in ((torch.float64,) * 4, (torch.bfloat16, torch.float32, torch.float32, torch.float16)):
        inputs = [each.to(dtype) for each, dtype in zip(problem(), dtypes, strict=True)]
        torch.library.opcheck(operators.divergence.default, (*inputs, scales))
        loss, *of_rows = operators.divergence(*inputs, scales)
        for wanted in ([True] * 4, [True, False, False, True]):
            arguments = (*inputs, scales, *of_rows, torch.ones_like(loss), wanted)
            torch.library.opcheck(operators.divergence_grad.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values and gradients in one graph, by blocks; scales that change make one more graph and no others."""
    monkeypatch.setattr(distillation, "_CPU_BLOCK", 5 * 4)
    torch._dynamo.reset()
    count = CompileCounterWithBackend(compiler)
    compiled = torch.compile(fa.distillation_loss, fullgraph=True, backend=count)
    for scale in (8.0, 6.0, 5.0, 4.5):
        results = []
        for loss in (compiled, fa.distillation_loss):
            leaves = [each.requires_grad_() for each in problem()]
            value = loss(*leaves, scale=scale, teacher_scale=3.0)
            value.backward()
            results.append([value.detach(), *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    assert count.frame_count == 2
    torch._dynamo.reset()


def test_transforms_are_refused() -> None:
    x, *others = problem()
    with pytest.raises(RuntimeError, match="distillation_loss"):
        torch.func.grad(lambda x: fa.distillation_loss(x, *others))(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_weight": torch.randn(10, 4)}, "teacher_weight must have the classes of weight, C=11; got 10"),
        ({"teacher_embeddings": torch.randn(4, 4)}, "teacher_embeddings must have N=5 rows; got 4"),
        ({"teacher_embeddings": torch.randn(5, 7)}, "teacher_embeddings must be (N, D=4); got (5, 7)"),
        (
            {"teacher_embeddings": torch.randn(5, 4, 1)},
            "teacher_embeddings must be (N, D=4); got (5, 4, 1): pass teacher_embeddings.flatten(1)",
        ),
        ({"embeddings": torch.randn(5, 7)}, "embeddings must be (N, D=6); got (5, 7)"),
        ({"weight": torch.randn(6)}, "weight must be (C, D) with C >= 1 and D >= 1; got (6,)"),
        ({"scale": 0.0}, "scale must be finite and > 0; got 0.0"),
        ({"teacher_scale": -1.0}, "teacher_scale must be finite and > 0; got -1.0"),
        ({"reduction": "all"}, "reduction must be one of 'mean', 'sum', 'none'; got 'all'"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    names = ("embeddings", "weight", "teacher_embeddings", "teacher_weight")
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        fa.distillation_loss(**{**dict(zip(names, problem(), strict=True)), **change})  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_autocast_changes_nothing_in_either_pass() -> None:
    results = []
    for enabled in (False, True):
        leaves = [each.float().requires_grad_() for each in problem()]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fa.distillation_loss(*leaves)
            loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(*each) for each in zip(*results, strict=True))
