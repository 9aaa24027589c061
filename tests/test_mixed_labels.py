"""Rows with two labels: the sum of two separate losses, each by cross_entropy over the stored logits in fp64."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.cases import BACKENDS
from torch import Tensor

import fused_arcface as fa
from fused_arcface.engine import mixed
from fused_arcface.engine.mixed import Nearer, of_both

N, C, D, S = 14, 17, 6, 20.0
LOSSES: dict[str, Callable[..., Any]] = {
    **{name: partial(fa.margin_softmax_loss, backend=name) for name in BACKENDS},
    "oracle": fa.reference.margin_softmax_loss,
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows near their first, their second or no class, one with the same label twice, some with ignored ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    w = torch.randn(C, D, generator=generator, dtype=torch.float64)
    first = torch.randint(0, C, (N,), generator=generator)
    second = (first + 1 + torch.randint(0, C - 1, (N,), generator=generator)) % C
    x[0:3] = w[first[0:3]] + 0.2 * x[0:3]
    x[3:6] = w[second[3:6]] + 0.2 * x[3:6]
    x[6] = w[first[6]] + w[second[6]]
    second[7] = first[7]
    first[8] = second[9] = -100
    first[10] = second[10] = -100
    share = torch.rand(N, generator=generator, dtype=torch.float64)
    share[11], share[12] = 0, 1
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), first, second, share


def row_losses(x: Tensor, w: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """``s·cos(θ + 0.3)`` for the target, by cross_entropy; 0 where it is ignored."""
    cosine = F.normalize(x) @ F.normalize(w).T
    moved = (cosine.clamp(-1 + 1e-15, 1 - 1e-15).acos() + 0.3).cos()
    logits = S * torch.where(F.one_hot(y.clamp(min=0), C).bool(), moved, cosine)
    return F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)


def two_losses(x: Tensor, w: Tensor, first: Tensor, second: Tensor, share: Tensor, smoothing: float = 0.0) -> Tensor:
    return share * row_losses(x, w, first, smoothing) + (1 - share) * row_losses(x, w, second, smoothing)


def parts(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """What of each row counts."""
    return share * (first >= 0) + (1 - share) * (second >= 0)


def same_gradients(got: Tensor, right: Tensor, x: Tensor, w: Tensor, rtol: float = 1e-9) -> None:
    upstream = torch.rand_like(right)
    for mine, truth in zip(
        torch.autograd.grad(got, (x, w), upstream), torch.autograd.grad(right, (x, w), upstream), strict=True
    ):
        torch.testing.assert_close(mine, truth, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_two_separate_losses(name: str, reduction: str, smoothing: float) -> None:
    x, w, first, second, share = inputs()
    weights = torch.linspace(0.5, 2, N, dtype=torch.float64)
    options = {"margin": fa.ArcFace(0.3, "none"), "scale": S, "reduction": reduction, "label_smoothing": smoothing}
    got = LOSSES[name](x, w, (first, second, share), sample_weight=weights, **options)
    right = weights * two_losses(x, w, first, second, share, smoothing)
    if reduction != "none":
        right = right.sum() / ((weights * parts(first, second, share)).sum() if reduction == "mean" else 1)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    same_gradients(got, right, x, w)


@pytest.mark.parametrize("scale", [1.0, 64.0, 1000.0])
def test_any_scale_and_a_share_that_is_a_number(scale: float) -> None:
    x, w, first, second, _ = inputs()
    for share in (0.3, torch.tensor(0.3)):
        got = fa.margin_softmax_loss(x, w, [first, second, share], scale=scale)
        right = fa.reference.margin_softmax_loss(x, w, (first, second, share), scale=scale)
        torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
        same_gradients(got, right, x, w, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_digits_are_lost_where_one_target_outweighs_all_others(backend: str, dtype: torch.dtype) -> None:
    """Late in training, s = 64: the nearer target's exponential is e^60 times the sum of the negatives."""
    torch.manual_seed(0)
    w = torch.eye(8, 16) + 1e-3 * torch.randn(8, 16)
    first, second = torch.arange(8), (torch.arange(8) + 3) % 8
    x = (w[first] + 0.05 * w[second]).to(dtype)
    options: dict[str, Any] = {"margin": fa.ArcFace(0.3, "none"), "scale": 64.0, "reduction": "none"}
    for pair in ((first, second), (second, first)):
        got = fa.margin_softmax_loss(x, w, (*pair, 0.5), backend=backend, **options)
        right = fa.reference.margin_softmax_loss(x.double(), w.double(), (*pair, 0.5), **options)
        torch.testing.assert_close(got.double(), right, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.15)
        single = fa.margin_softmax_loss(x, w, (*pair, 1.0), backend=backend, **options)
        alone = fa.margin_softmax_loss(x, w, pair[0], backend=backend, **options)
        torch.testing.assert_close(single, alone, rtol=2e-5 if dtype == torch.float32 else 0.05, atol=1e-6)


def test_the_other_targets_sum_by_hand() -> None:
    """Exponentials 2 (nearer target), 1 (other target) and 5 (the rest): ln(5 + 1) becomes ln(5 + 2)."""
    order = Nearer(*(torch.zeros(2, dtype=torch.int64),) * 2, torch.tensor([False, True]), torch.tensor([True, True]))
    lse, nearer, other = torch.tensor([[6.0] * 2, [2.0] * 2, [1.0] * 2], dtype=torch.float64).log()
    (first, _), (second, cosine) = of_both(order, lse, nearer, other, 1.0)
    torch.testing.assert_close(first.exp(), torch.tensor([6.0, 7.0], dtype=torch.float64))
    torch.testing.assert_close(second.exp(), torch.tensor([7.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(cosine.exp(), torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_gradcheck() -> None:
    x, w, first, second, share = inputs()
    loss = lambda x, w: fa.margin_softmax_loss(x, w, (first, second, share), scale=S)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, w), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("margin", "options"),
    [
        (fa.ClassMargin(torch.linspace(0, 0.5, C)), {}),
        (fa.MagFace(lower_norm=0.5, upper_norm=6.0), {}),
        (fa.SphereFace(), {"sub_centers": 1}),
    ],
    ids=["of the class", "of the norm, with a penalty", "angular"],
)
def test_other_margins(margin: Any, options: dict[str, Any]) -> None:
    x, w, first, second, share = inputs()
    got, right = (
        loss(x, w, (first, second, share), margin=margin, scale=S, **options)
        for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss)
    )
    torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
    same_gradients(got, right, x, w)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sub_centers(backend: str) -> None:
    x, w, first, second, share = inputs()
    w = torch.cat([w.detach(), torch.randn(C, D, dtype=torch.float64)], 1).reshape(2 * C, D).requires_grad_()
    got = fa.margin_softmax_loss(x, w, (first, second, share), scale=S, sub_centers=2, backend=backend)
    right = fa.reference.margin_softmax_loss(x, w, (first, second, share), scale=S, sub_centers=2)
    torch.testing.assert_close(got, right, rtol=1e-10, atol=0)
    same_gradients(got, right, x, w)


def test_the_statistics_are_those_of_the_first_label() -> None:
    x, w, first, second, share = inputs()
    _, got = fa.margin_softmax_loss(x, w, (first, second, share), scale=S, return_stats=True)
    _, alone = fa.margin_softmax_loss(x, w, first, scale=S, return_stats=True)
    assert torch.equal(got.correct, alone.correct) and got.correct.any() and not got.correct.all()
    counted = first >= 0
    for name in ("lse", "target_cosine"):
        torch.testing.assert_close(getattr(got, name)[counted], getattr(alone, name)[counted], rtol=1e-10, atol=1e-12)
    each = fa.reference.margin_softmax_loss(x, w, (first, second, share), scale=S, reduction="none")
    torch.testing.assert_close(got.loss, each.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sub_centers", [1, 2])
@pytest.mark.parametrize("backend", [*BACKENDS, "torch, padded"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.95])
def test_center_sgd(sample_rate: float, backend: str, sub_centers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step for step torch.optim.SGD over the loss's gradient, for all classes and for a sample.

    With padding: as on a GPU, where nobody waits to count the second targets."""
    if backend == "torch, padded":
        backend = "torch"
        monkeypatch.setattr(mixed, "reads_for_free", lambda numbers: False)
    head = fa.PartialFC(
        D,
        C,
        scale=S,
        sample_rate=sample_rate,
        dtype=torch.float64,
        center_optimizer=fa.CenterSGD(0.1, momentum=0.9, weight_decay=0.01),
        backend=backend,
        sub_centers=sub_centers,
    )
    truth = fa.PartialFC(
        D, C, scale=S, sample_rate=sample_rate, dtype=torch.float64, dense_grad=True, sub_centers=sub_centers
    )
    momentum = torch.zeros_like(truth.weight)
    x, _, first, second, share = inputs()
    for step in range(3):
        with torch.no_grad():
            x[:6] = torch.randn(6, D, dtype=torch.float64)
        head(x, (first, second, share)).backward()
        before = truth.weight.detach().clone()
        truth(x, (first, second, share)).backward()
        rows = (truth.sampled[:, None] * sub_centers + torch.arange(sub_centers)).flatten()
        with torch.no_grad():
            momentum[rows] = 0.9 * momentum[rows] + truth.weight.grad[rows] + 0.01 * before[rows]
            truth.weight[rows] -= 0.1 * momentum[rows]
        truth.weight.grad = None
        assert step == 0 or (head.weight - before).abs().max() > 1e-4
        torch.testing.assert_close(head.weight.detach(), truth.weight.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(head.center_optimizer.momentum_buffer, momentum, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()
    x, w, first, second, share = inputs()
    compiled = torch.compile(fa.margin_softmax_loss, fullgraph=True, backend="aot_eager")
    got, right = (loss(x, w, (first, second, share), scale=S) for loss in (compiled, fa.margin_softmax_loss))
    torch.testing.assert_close(got, right, rtol=1e-12, atol=0)
    same_gradients(got, right, x, w)
    torch._dynamo.reset()


def test_errors_name_what_to_use() -> None:
    x, w, first, second, share = inputs()
    instead = "for two labels a row pass target=(first, second, share); for soft or multi-hot labels take"
    for given in (torch.rand(N, C), F.one_hot(second.clamp(min=0), C)):
        with pytest.raises((TypeError, ValueError), match=r"^target must .*" + re.escape(instead)):
            fa.margin_softmax_loss(x, w, given)
    out_of_range = second.index_fill(0, torch.tensor(3), C)
    head = fa.PartialFC(D, C, dtype=torch.float64)
    wrong: dict[str, Any] = {
        "target must be labels (N,), or (first, second, share) for mixed labels; got 2 items": (first, second),
        "target[1] must be (N=14,); got (13,)": (first, second[1:], share),
        "target[2] must be in [0, 1]; got 1.5": (first, second, 1.5),
        "target[2] must be in [0, 1]; got 1.5 at row 3": (first, second, share.index_fill(0, torch.tensor(3), 1.5)),
        "target[2] must be (N=14,); got (13,)": (first, second, share[1:]),
        "target[2] must not require a gradient": (first, second, share.clone().requires_grad_()),
        "target must be in [0, C=17) or ignore_index=-100; got 17 at row 3": (first, out_of_range, share),
    }
    for message, target in wrong.items():
        for loss in (fa.margin_softmax_loss, fa.reference.margin_softmax_loss):
            with pytest.raises(ValueError, match="^" + re.escape(message)):
                loss(x, w, target)
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            head(x, target)
    with pytest.raises(TypeError, match=re.escape("target[2] must be a number; got str")):
        fa.margin_softmax_loss(x, w, (first, second, "half"))
    with pytest.raises(ValueError, match=re.escape("target must be labels (N,) with UniFace, whose losses")):
        fa.margin_softmax_loss(x, w, (first, second, share), margin=fa.UniFace())
    with pytest.raises(ValueError, match=re.escape("target must be labels (N,) with CurricularFace")):
        fa.margin_softmax_loss(x, w, (first, second, share), margin=fa.CurricularFace())
