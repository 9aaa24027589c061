"""The autograd line of the fused head: finite differences, what is computed, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import scalar
from support.cases import BACKENDS, MARGINS, TARGET_COSINES, Case, make_inputs, named, rows_at
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_arcface as fa
from fused_arcface.backends import cpu
from fused_arcface.engine.autograd import needs_shift

every_margin = pytest.mark.parametrize("margin", MARGINS, ids=named)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def own_margin(cosine: Tensor) -> Tensor:
    """A user's: any differentiable function will do."""
    return cosine - 0.3 * (1 - cosine) ** 2


@every_backend
@pytest.mark.parametrize("margin", [*MARGINS, own_margin], ids=named)
def test_gradient_by_finite_differences(margin: object, backend: str) -> None:
    """Exact gradients, up to |cos_y| = 1 - 1e-4."""
    # Each margin is tried where it is smooth: the differences reach 1e-6 to either side.
    cosines = [1 - 1.05e-4, 0.93, 0.31, -0.07, -0.93, -1 + 1.05e-4]
    if margin is not own_margin:
        cosines = [c for c in cosines if all(abs(c - kink) > 1e-4 for kink in scalar.kinks(margin))]
    assert len(cosines) >= 4
    x, w, target = rows_at(tuple(cosines))
    torch.autograd.gradcheck(
        lambda x, w: fa.margin_softmax_loss(x, w, target, margin=margin, scale=8.0, reduction="none", backend=backend),
        (x.requires_grad_(), w.requires_grad_()),
    )


@every_backend
@every_margin
def test_straight_through_equals_its_surrogate(margin: object, backend: str) -> None:
    """insightface's gradient since December 2022: by the modified cosine, carried on as if by the cosine."""
    if hasattr(margin, "gradient"):
        margin = dataclasses.replace(margin, gradient="straight_through")
    x, w, target = rows_at(TARGET_COSINES[1:-1])
    right = scalar.gradients(x.tolist(), w.tolist(), target.tolist(), margin, 16.0, slope=1.0)
    x.requires_grad_()
    w.requires_grad_()
    loss = fa.margin_softmax_loss(x, w, target, margin=margin, scale=16.0, reduction="sum", backend=backend)
    for got, theirs in zip(torch.autograd.grad(loss, (x, w)), right, strict=True):
        theirs = torch.tensor(theirs, dtype=torch.float64)
        assert (got - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@every_backend
@pytest.mark.parametrize("cosine", [1.0, -1.0])
@every_margin
def test_at_the_ends(margin: object, cosine: float, backend: str) -> None:
    """cos_y = ±1: the value is right, the gradient finite and bounded. All of it would be NaN from a plain acos."""
    x, w, target = rows_at((cosine,) * 5, torch.float32)
    x = cosine * w[target]
    x.requires_grad_()
    w.requires_grad_()
    loss = fa.margin_softmax_loss(x, w, target, margin=margin, scale=16.0, reduction="none", backend=backend)
    right = [scalar.row(a, w.tolist(), y, margin, 16.0).loss for a, y in zip(x.tolist(), target.tolist(), strict=True)]
    # An angle near 0 is known to √ε = 5e-4 in fp32.
    torch.testing.assert_close(loss, torch.tensor(right), rtol=16 * 4 * 5e-4, atol=0)
    for gradient, tensor in zip(torch.autograd.grad(loss.sum(), (x, w)), (x, w), strict=True):
        bound = 16 * 5 * (1 + scalar.parameters(margin).m1 * 100) / tensor.detach().norm(dim=1)
        assert gradient.isfinite().all() and (gradient.norm(dim=1) <= bound).all()


class Recorder:
    """Stands before a backend's functions and notes what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.center_sum: list[bool] = []
        self.weight_grads = 0
        class_stats, weight_grad = cpu.class_stats, cpu.weight_grad

        def note_class_stats(*arguments: object) -> object:
            self.center_sum.append(arguments[-1])
            return class_stats(*arguments)

        def note_weight_grad(*arguments: object) -> object:
            self.weight_grads += 1
            return weight_grad(*arguments)

        monkeypatch.setattr(cpu, "class_stats", note_class_stats)
        monkeypatch.setattr(cpu, "weight_grad", note_weight_grad)


@pytest.mark.parametrize(("x_grad", "w_grad"), [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_only_the_gradients_asked_for(x_grad: bool, w_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    x, w, target, _ = make_inputs(Case())
    loss = fa.margin_softmax_loss(x.requires_grad_(x_grad), w.requires_grad_(w_grad), target, backend="cpu")
    assert loss.requires_grad == (x_grad or w_grad)
    if loss.requires_grad:
        loss.backward()
    assert recorder.center_sum == [x_grad] and recorder.weight_grads == int(w_grad)
    assert (x.grad is not None) == x_grad and (w.grad is not None) == w_grad


def test_no_gradient_work_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    x, w, target, _ = make_inputs(Case())
    with torch.no_grad():
        loss = fa.margin_softmax_loss(x.requires_grad_(), w.requires_grad_(), target, backend="cpu")
    assert not loss.requires_grad and recorder.center_sum == [False]


@every_backend
def test_second_backward(backend: str) -> None:
    x, w, target, _ = make_inputs(Case())
    loss = fa.margin_softmax_loss(x.requires_grad_(), w, target, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


@every_backend
def test_retained_graph_gives_the_same_gradient_again(backend: str) -> None:
    x, w, target, _ = make_inputs(Case())
    loss = fa.margin_softmax_loss(x.requires_grad_(), w.requires_grad_(), target, backend=backend)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("by", ["embeddings", "weight"])
def test_double_derivative(by: str, smoothing: float, backend: str) -> None:
    """Whichever way the gradient is differentiated, ``None`` or zeros would be a wrong answer without a word."""
    x, w, target, _ = make_inputs(Case())
    tensor = (x if by == "embeddings" else w).requires_grad_()

    def loss(changed: torch.Tensor) -> torch.Tensor:
        inputs = (changed, w) if by == "embeddings" else (x, changed)
        return fa.margin_softmax_loss(*inputs, target, label_smoothing=smoothing, backend=backend)

    (gradient,) = torch.autograd.grad(loss(tensor), tensor, create_graph=True)
    for differentiate in (
        lambda: gradient.square().sum().backward(retain_graph=True),
        lambda: torch.autograd.grad(gradient.sum(), tensor, retain_graph=True),
        lambda: torch.autograd.functional.hessian(loss, tensor.detach()),
        lambda: torch.autograd.functional.hvp(loss, tensor.detach(), torch.ones_like(tensor)),
    ):
        with pytest.raises(RuntimeError, match=r"differentiate twice .* fused_arcface\.reference\.margin_softmax_loss"):
            differentiate()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_with_a_graph_of_the_gradient(use_reentrant: bool, smoothing: float) -> None:
    """Non-reentrant checkpoints hand out what was saved once."""
    x, w, target, _ = make_inputs(Case())

    def loss(x: torch.Tensor) -> torch.Tensor:
        return fa.margin_softmax_loss(x, w, target, label_smoothing=smoothing)

    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    checkpoint(loss, x, use_reentrant=use_reentrant).backward(create_graph=not use_reentrant)
    torch.testing.assert_close(x.grad.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacrev(f)(x),
    ],
    ids=["grad", "vmap", "jvp", "jacrev"],
)
def test_function_transforms(transform: object) -> None:
    x, w, target, _ = make_inputs(Case())
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func"):
        transform(lambda x: fa.margin_softmax_loss(x, w, target), x)


def test_inputs_changed_before_backward() -> None:
    x, w, target, _ = make_inputs(Case())
    loss = fa.margin_softmax_loss(x.requires_grad_(), w, target)
    w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_flows_on_to_the_backbone() -> None:
    x, w, target, _ = make_inputs(Case())
    backbone = torch.randn(33, 33, requires_grad=True)
    fused = torch.autograd.grad(fa.margin_softmax_loss(x @ backbone, w, target, backend="cpu"), backbone)[0]
    eager = torch.autograd.grad(fa.reference.margin_softmax_loss(x @ backbone, w, target), backbone)[0]
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item())


@pytest.mark.parametrize(
    ("scale", "num_classes", "dtype", "shift"),
    [
        (64.0, 10**7, torch.float32, False),
        (64.0, 10**12, torch.float32, True),
        (128.0, 2, torch.float32, True),
        (128.0, 10**9, torch.float64, False),
        (1000.0, 2, torch.float64, True),
    ],
)
def test_needs_shift(scale: float, num_classes: int, dtype: torch.dtype, shift: bool) -> None:
    assert needs_shift(scale, num_classes, dtype) is shift
