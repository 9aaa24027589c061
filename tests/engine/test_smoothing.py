"""Label smoothing and sub-centers: what cross_entropy and the formulas say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import ARCFACES, Case, make_inputs, run
from torch import Tensor

import fused_arcface as fa

REFUSED = {"sample_rate": {"sample_rate": 0.5}, "a center_optimizer": {"center_optimizer": fa.CenterSGD(lr=0.1)}}


@pytest.mark.parametrize("amount", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_smoothing_is_that_of_cross_entropy(amount: float, reduction: str) -> None:
    inputs = make_inputs(Case(9, 23, 6, "float64", "float64", geometry="ignored"))
    logits = 8 * F.normalize(inputs.embeddings) @ F.normalize(inputs.weight).T
    right = F.cross_entropy(logits, inputs.target, reduction=reduction, label_smoothing=amount)
    options = {"margin": fa.NormSoftmax(), "scale": 8.0, "reduction": reduction, "label_smoothing": amount}
    for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss):
        torch.testing.assert_close(loss(*inputs[:3], **options), right)


def test_smoothing_with_a_margin() -> None:
    """Uniform over the logits as they are: the target's has its margin."""
    x, w, y, _ = make_inputs(Case(5, 7, 4, "float64", "float64"))
    cosine = F.normalize(x) @ F.normalize(w).T
    logits = 16 * torch.where(F.one_hot(y, 7).bool(), (cosine.acos() + 0.3).cos(), cosine)
    right = F.cross_entropy(logits, y, label_smoothing=0.2)
    got = fa.margin_softmax_loss(x, w, y, margin=fa.ArcFace(0.3), scale=16.0, label_smoothing=0.2)
    torch.testing.assert_close(got, right)


def test_smoothing_sums_many_centers_exactly() -> None:
    """More classes than are normalized at once, all alike but for noise: their sum is 20 000 times one.

    Softmax and uniform weights take most of each other's gradient away there; what is left has the rounding of what was
    added up, which is that of plain PyTorch without smoothing.
    """
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 19999])
    w = torch.randn(8) + 0.01 * torch.randn(20000, 8)
    inputs = make_inputs(Case(4, 5, 8))._replace(embeddings=x, weight=w, target=y)
    exact = inputs._replace(embeddings=x.double(), weight=w.double())
    options = {"margin": fa.NormSoftmax(), "scale": 16.0}
    eager = run(fa.reference.margin_softmax_loss, inputs, **options)
    of_eager = run(fa.reference.margin_softmax_loss, exact, **options)
    got = run(fa.margin_softmax_loss, inputs, backend="cpu", label_smoothing=0.3, **options)
    right = run(fa.reference.margin_softmax_loss, exact, label_smoothing=0.3, **options)
    for name in ("loss", "d_embeddings", "d_weight"):
        error = (getattr(got, name) - getattr(right, name)).abs().max()
        assert error <= 2 * (getattr(eager, name) - getattr(of_eager, name)).abs().max() + 1e-7


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, "label_smoothing must be in [0, 1]; got -0.1"),
        (1.1, ValueError, "label_smoothing must be in [0, 1]; got 1.1"),
        ("0.1", TypeError, "label_smoothing must be a number; got str"),
        (True, TypeError, "label_smoothing must be a number; got bool"),
    ],
)
def test_smoothing_refused(value: Any, error: type[Exception], message: str) -> None:
    for make in (
        lambda: fa.margin_softmax_loss(*make_inputs(Case())[:3], label_smoothing=value),
        lambda: fa.reference.margin_softmax_loss(*make_inputs(Case())[:3], label_smoothing=value),
        lambda: fa.MarginHead(4, 5, label_smoothing=value),
        lambda: fa.PartialFC(4, 5, label_smoothing=value),
    ):
        with pytest.raises(error) as raised:
            make()
        assert str(raised.value) == message


def test_smoothing_refused_where_it_is_not_linear() -> None:
    for options, what in (({"sub_centers": 2}, "sub_centers=2"), ({"margin": fa.MVSoftmax()}, "MVSoftmax")):
        with pytest.raises(ValueError, match=f"label_smoothing must be 0 with {what}, because the logits"):
            fa.MarginHead(4, 5, label_smoothing=0.1, **options)


@pytest.mark.parametrize("what", REFUSED)
def test_smoothing_refused_in_a_sparse_step(what: str) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing must be 0 with {what}.*every class center"):
        fa.PartialFC(4, 5, label_smoothing=0.1, **REFUSED[what])


def test_sub_centers_by_hand() -> None:
    """Three centers a class: the nearest counts, and it alone has a gradient."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angles = torch.tensor(
        [0.9, -0.4, 2.0, 1.2, 1.1, -2.5], dtype=torch.float64
    )  # classes (0.9, -0.4, 2), (1.2, 1.1, -2.5)
    w = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    options = {"margin": fa.ArcFace(0.3), "scale": 4.0, "sub_centers": 3}
    z, negative = 4 * (torch.tensor(0.4) + 0.3).double().cos(), 4 * torch.tensor(1.1).double().cos()
    right = F.softplus(negative - z)
    for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss):
        got = loss(x, w, torch.tensor([0]), **options)
        torch.testing.assert_close(got, right, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(got, w)
        assert (gradient.abs().sum(1) > 0).tolist() == [False, True, False, False, True, False]


def test_equal_sub_centers_share_no_gradient() -> None:
    """One of them wins, so that the classes' gradients add up to the one that a single center has."""
    inputs = make_inputs(Case(7, 13, 5, "float64", "float64"))
    repeated = inputs._replace(weight=inputs.weight.repeat_interleave(3, 0))
    for backend in ("cpu", "torch"):
        one = run(fa.margin_softmax_loss, inputs, margin=ARCFACES[1], backend=backend)
        three = run(fa.margin_softmax_loss, repeated, margin=ARCFACES[1], backend=backend, sub_centers=3)
        torch.testing.assert_close(three.loss, one.loss)
        torch.testing.assert_close(three.d_embeddings, one.d_embeddings)
        torch.testing.assert_close(three.d_weight.unflatten(0, (13, 3)).sum(1), one.d_weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda w: fa.margin_softmax_loss(torch.randn(2, 4), w, torch.tensor([0, 1]), sub_centers=3),
            ValueError,
            "weight must have a multiple of sub_centers=3 rows; got (10, 4)",
        ),
        (
            lambda w: fa.margin_softmax_loss(torch.randn(2, 4), w, torch.tensor([0, 5]), sub_centers=2),
            ValueError,
            "target must be in [0, C=5) or ignore_index=-100; got 5 at row 1",
        ),
        (lambda w: fa.MarginHead(4, 5, sub_centers=0), ValueError, "sub_centers must be >= 1; got 0"),
        (lambda w: fa.PartialFC(4, 5, sub_centers=17), ValueError, "sub_centers must be in [1, 16]; got 17"),
        (lambda w: fa.PartialFC(4, 5, sub_centers=1.5), TypeError, "sub_centers must be an int; got float"),
    ],
)
def test_sub_centers_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call(torch.randn(10, 4))
    assert str(raised.value) == message


def test_heads_with_sub_centers() -> None:
    """Shapes; logits and topk by class."""
    x = torch.randn(3, 4)
    for head in (fa.MarginHead(4, 5, sub_centers=3), fa.PartialFC(4, 5, sub_centers=3)):
        assert head.weight.shape == (15, 4) and "sub_centers=3" in repr(head)
        by_class = (F.normalize(x) @ F.normalize(head.weight).T).unflatten(1, (5, 3)).amax(2)
        torch.testing.assert_close(head.logits(x), 64 * by_class)
        cosines, ids = head.topk(x, 2)
        right, best = by_class.topk(2)
        torch.testing.assert_close(cosines, right)
        assert torch.equal(ids, best)


def test_sub_centers_are_checkpointed(tmp_path: Any) -> None:
    def head(sub_centers: int, optimizer: fa.CenterSGD | None = None) -> fa.PartialFC:
        return fa.PartialFC(4, 5, sub_centers=sub_centers, center_optimizer=optimizer)

    saved = head(3, fa.CenterSGD(lr=0.1))
    saved(torch.randn(6, 4), torch.arange(6) % 5).backward()
    fa.checkpoint.save(tmp_path, saved)
    loaded = head(3, fa.CenterSGD(lr=0.1))
    assert not torch.equal(loaded.weight, saved.weight)
    fa.checkpoint.load(tmp_path, loaded)
    assert torch.equal(loaded.weight, saved.weight)
    for other in (1, 2):
        with pytest.raises(fa.checkpoint.CheckpointError, match="sub_centers was 3 when saved"):
            fa.checkpoint.load(tmp_path, head(other, fa.CenterSGD(lr=0.1)))


def _ids(tensor: Tensor) -> list[int]:
    return sorted(tensor.tolist())


def test_sampled_is_by_class() -> None:
    head = fa.PartialFC(4, 50, sub_centers=2, sample_rate=0.2, dense_grad=True)
    head(torch.randn(3, 4), torch.tensor([0, 7, 49])).backward()
    used = head.weight.grad.abs().sum(1).unflatten(0, (50, 2)).sum(1).nonzero().squeeze(1)
    assert len(head.sampled) == 10 and set(_ids(used)) <= set(_ids(head.sampled)) and {0, 7, 49} <= set(_ids(used))
