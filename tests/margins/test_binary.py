"""SphereFace2 and UniFace: the formulas of their codes over all logits in fp64, their bias, blocks, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.distributed_helpers import run_ranks
from torch import Tensor

import fused_arcface as fa
from fused_arcface import backends
from fused_arcface.backends import torch as plain_torch


def cosines(x: Tensor, w: Tensor) -> Tensor:
    return (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T


def sphereface2(margin: fa.SphereFace2, x: Tensor, w: Tensor, y: Tensor, scale: float) -> Tensor:
    """WeSpeaker's SphereFace2 in this test's words: (N,)."""
    c, m, b = cosines(x, w), margin.margin, margin.bias.double()

    def g(z: Tensor) -> Tensor:
        return 2 * ((z + 1) / 2) ** margin.exponent - 1

    if margin.kind == "arc":
        theta = c.acos()
        positive = scale * g(torch.where(theta + m <= math.pi, (theta + m).cos(), c - (1 - math.cos(m)))) + b
        negative = scale * g((theta - m).cos()) + b
    else:
        positive, negative = scale * (g(c) - m) + b, scale * (g(c) + m) + b
    own = F.one_hot(y, len(w)).bool()
    losses = torch.where(
        own, margin.share * (1 + (-positive).exp()).log(), (1 - margin.share) * (1 + negative.exp()).log()
    )
    return losses.sum(1)


def uniface(margin: fa.UniFace, x: Tensor, w: Tensor, y: Tensor, scale: float) -> Tensor:
    """The authors' loss without their cut of the logits: (N,)."""
    c, b = cosines(x, w), margin.bias.double()
    positive, negative = scale * (c - margin.margin) - b, scale * c - b
    own = F.one_hot(y, len(w)).bool()
    return torch.where(own, (1 + (-positive).exp()).log(), margin.weight * (1 + negative.exp()).log()).sum(1)


FORMULAS: list[tuple[Callable[[], torch.nn.Module], Callable[..., Tensor], float]] = [
    (lambda: fa.SphereFace2(), sphereface2, 32.0),
    (lambda: fa.SphereFace2(0.4, bias=-6.0), sphereface2, 16.0),
    (lambda: fa.SphereFace2(0.3, 2.0, 0.55, kind="arc", bias=1.0), sphereface2, 32.0),
    (lambda: fa.UniFace(bias=fa.UniFace.bias_for(23)), uniface, 64.0),
    (lambda: fa.UniFace(0.1, 0.3, bias=2.0), uniface, 8.0),
]
every_formula = pytest.mark.parametrize(("make", "formula", "scale"), FORMULAS)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 9, dtype=torch.float64, generator=generator)
    w = torch.randn(23, 9, dtype=torch.float64, generator=generator)
    x[3] = 0.1 * x[3] + w[5]  # late in training
    return x, w, torch.tensor([0, 22, 7, 5, 3, 3, 11])


@pytest.mark.parametrize("block", [1 << 22, 7 * 5])
@every_formula
def test_the_formula(
    make: Callable[[], torch.nn.Module],
    formula: Callable[..., Tensor],
    scale: float,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values, and gradients by embeddings, centers and bias; also with five classes at a time."""
    monkeypatch.setattr(plain_torch, "_CPU_BLOCK", block)
    x, w, y = problem()
    upstream = torch.arange(1, 8, dtype=torch.float64)
    results = []
    for loss in (
        lambda m, a, b: formula(m, a, b, y, scale),
        lambda m, a, b: fa.margin_softmax_loss(a, b, y, margin=m, scale=scale, reduction="none", backend="torch"),
        lambda m, a, b: fa.margin_softmax_loss(a, b, y, margin=m, scale=scale, reduction="none", backend="cpu"),
        lambda m, a, b: fa.reference.margin_softmax_loss(a, b, y, margin=m, scale=scale, reduction="none"),
    ):
        margin, a, b = make().double(), x.clone().requires_grad_(), w.clone().requires_grad_()
        row_losses = loss(margin, a, b)
        (row_losses * upstream).sum().backward()
        results.append((row_losses.detach(), a.grad, b.grad, margin.bias.grad))
    for got in results[1:]:
        for mine, right in zip(got, results[0], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_by_hand() -> None:
    """Cosines 0.6 of the target and 0 of the other: UniFace at s = 10, m = 0.4, b = 1, λ = 0.5."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    margin = fa.UniFace(0.4, 0.5, bias=1.0)
    right = math.log1p(math.exp(-(10 * 0.2 - 1))) + 0.5 * math.log1p(math.exp(-1))
    got, stats = fa.margin_softmax_loss(x, w, torch.tensor([0]), margin=margin, scale=10.0, return_stats=True)
    assert got.item() == pytest.approx(right, rel=1e-12)
    assert stats.lse.item() == pytest.approx(math.log(math.log1p(math.exp(-1))), rel=1e-12)
    assert stats.correct.all() and stats.target_cosine.item() == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["cos", "arc"])
def test_bias_for_balances_the_gradients(kind: str) -> None:
    """Where all cosines are 0, the loss does not change with the bias: target and C - 1 negatives weigh the same."""
    margin = fa.SphereFace2(0.3, kind=kind)  # type: ignore[arg-type]
    with torch.no_grad():
        margin.bias.fill_(margin.bias_for(50, 30.0))
    x, w = torch.eye(51, dtype=torch.float64)[:1], torch.eye(51, dtype=torch.float64)[1:]
    fa.margin_softmax_loss(x, w, torch.tensor([4]), margin=margin, scale=30.0).backward()
    assert abs(margin.bias.grad.item()) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 64.0, 1000.0])
@pytest.mark.parametrize("bias", [-200.0, 0.0, 200.0])
def test_finite_at_any_scale(scale: float, bias: float) -> None:
    x, w, y = (each.float() if each.is_floating_point() else each for each in problem())
    x, w = x.requires_grad_(), w.requires_grad_()
    margin = fa.SphereFace2(bias=bias)
    loss = fa.margin_softmax_loss(x, w, y, margin=margin, scale=scale)
    right = fa.reference.margin_softmax_loss(x.double(), w.double(), y, margin=margin, scale=scale)
    loss.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-4, abs=1e-30)
    for gradient in (x.grad, w.grad, margin.bias.grad):
        assert gradient.isfinite().all()


def _bias_gradient(sample_rate: float) -> Tensor:
    x, w, y = problem()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    head = fa.PartialFC(9, 23, margin=fa.UniFace(bias=2.0), scale=16.0, sample_rate=sample_rate, dtype=torch.float64)
    head.load_full_weight(w)
    head(x[rank::world], y[rank::world]).backward()
    return head.margin.bias.grad


@pytest.mark.distributed
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_the_bias_has_the_same_gradient_on_two_ranks(sample_rate: float) -> None:
    alone = _bias_gradient(sample_rate)
    assert alone.abs() > 1e-6
    for part in run_ranks(2, _bias_gradient, sample_rate):
        torch.testing.assert_close(part, alone, rtol=1e-6, atol=0)


def test_training_moves_the_bias() -> None:
    x, _, y = problem()
    head = fa.MarginHead(9, 23, margin=fa.SphereFace2(bias=-3.0), scale=16.0, dtype=torch.float64)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    assert "margin.bias" in head.state_dict()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = head(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and head.margin.bias.item() != -3.0


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_without_them_say_so(name: str) -> None:
    expected = f"^backend {name!r} does not have the binary losses of UniFace: 'torch' and 'cpu'.* do$"
    with pytest.raises(ValueError, match=expected):
        fa.margin_softmax_loss(
            torch.randn(2, 4), torch.randn(6, 4), torch.tensor([0, 1]), margin=fa.UniFace(), backend=name
        )


def test_auto_takes_the_kernels_on_a_cpu_and_plain_torch_on_a_gpu() -> None:
    needs = {"binary_losses": "the binary losses of UniFace"}
    assert backends.select("auto", torch.device("cpu"), needs=needs) == "cpu"
    with pytest.warns(UserWarning, match="does not have the binary losses of UniFace") as raised:
        assert backends.select("auto", torch.device("cuda"), needs=needs) == "torch"
    for name, each in zip(("triton", "cuda"), raised, strict=True):
        assert f"blocks of classes, as {name!r} does not have the binary losses of UniFace" in str(each.message)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.SphereFace2(2.0), ValueError, "SphereFace2: margin must be in [0, 2); got 2.0"),
        (lambda: fa.SphereFace2(4.0, kind="arc"), ValueError, "SphereFace2: margin must be in [0, π) radians; got 4.0"),
        (lambda: fa.SphereFace2(kind="A"), ValueError, "SphereFace2: kind must be one of 'cos', 'arc'; got 'A'"),
        (lambda: fa.SphereFace2(exponent=0.5), ValueError, "SphereFace2: exponent must be in [1, 16]; got 0.5"),
        (lambda: fa.SphereFace2(share=1.1), ValueError, "SphereFace2: share must be in [0, 1]; got 1.1"),
        (lambda: fa.UniFace(weight=0), ValueError, "UniFace: weight must be in (0, inf); got 0"),
        (lambda: fa.UniFace(bias=math.nan), ValueError, "UniFace: bias must be in (-inf, inf); got nan"),
        (
            lambda: fa.MarginHead(4, 5, margin=fa.UniFace(), label_smoothing=0.1),
            ValueError,
            "label_smoothing must be 0 with UniFace, because the logits must be linear in the class centers; got 0.1",
        ),
        (lambda: fa.UniFace.bias_for(9, r=0), ValueError, "UniFace: r must be finite and > 0; got 0"),
        (lambda: fa.SphereFace2().bias_for(9, -1.0), ValueError, "SphereFace2: scale must be in (0, inf); got -1.0"),
        (
            lambda: fa.SphereFace2(share=1.0).bias_for(9, 32.0),
            ValueError,
            "SphereFace2: share must be in (0, 1) for bias_for; got 1.0",
        ),
    ],
)
def test_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_weights_of_the_rows() -> None:
    """A weighted mean by hand, and the gradient by the bias."""
    x, w, y = problem()
    weights = torch.arange(7, dtype=torch.float64)
    results = []
    for weighted in (False, True):
        margin = fa.UniFace(0.2, bias=1.0).double()
        if weighted:
            loss = fa.margin_softmax_loss(x, w, y, margin=margin, scale=16.0, sample_weight=weights)
        else:
            loss = (weights * uniface(margin, x, w, y, 16.0)).sum() / 21
        loss.backward()
        results.append((loss.detach(), margin.bias.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=0)


def test_a_scale_that_changes_is_refused() -> None:
    x, w, y = problem()
    learned = torch.nn.Parameter(torch.tensor(16.0))
    for scale, text in ((learned, "a learned scale"), (fa.AdaCos(), r"scale=AdaCos\(\)")):
        with pytest.raises(ValueError, match=f"^scale must be a number with the binary losses of UniFace; got {text}$"):
            fa.margin_softmax_loss(x, w, y, margin=fa.UniFace(), scale=scale)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_the_bias_has_a_gradient_without_negatives(backend: str, sub_centers: int) -> None:
    """With one class the loss is the target's alone: its derivative by UniFace's bias is ``sigmoid(-logit)``."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 8, generator=generator), torch.randn(sub_centers, 8, generator=generator)
    margin = fa.UniFace(0.4, bias=3.0)
    loss = fa.margin_softmax_loss(
        x, w, torch.zeros(4, dtype=torch.int64), margin=margin, sub_centers=sub_centers, scale=8.0, backend=backend
    )
    loss.backward()
    assert margin.bias.grad is not None
    expected = (-(8.0 * (cosines(x, w).amax(1) - 0.4) - 3.0)).sigmoid().mean()
    torch.testing.assert_close(margin.bias.grad, expected)
