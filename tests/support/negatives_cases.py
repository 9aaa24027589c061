"""Sub-centers and margins that change the negatives: what a GPU backend must agree with, the same for each of them."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fused_arcface as fa
from fused_arcface.backends import torch as plain_torch
from fused_arcface.engine.terms import Negatives, RowGradients
from fused_arcface.margins import Margin, registry
from support.cases import Case, Inputs, Outcome, make_inputs, run, tolerance

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16

MODULATED = [margin for margin in registry.examples("negatives") if not hasattr(margin, "turns_negatives")]
USUAL = [(registry.trained(fa.CurricularFace(), t=0.4), 1), (fa.ArcFace(0.5), 3)]
VARIANTS = [
    *((margin, 1) for margin in MODULATED),
    (fa.ArcFace(0.5), 3),
    (fa.CosFace(), 5),
    (registry.trained(fa.CurricularFace(), t=0.4), 2),
]
"""Margins, and centers for each class."""

HEADS: list[dict[str, Any]] = [
    {"margin": fa.ArcFace(0.3), "sub_centers": 3},
    {"margin": fa.MVSoftmax(fa.ArcFace(0.3)), "sample_rate": 0.3},
    {"margin": fa.ArcFace(0.3), "sub_centers": 2, "sample_rate": 0.3},
]


def _close(got: Tensor, right: Tensor, tolerance: float, name: str) -> None:
    """Compare with an error relative to the tensor's largest finite number."""
    finite = right[right.isfinite()].abs()
    size = finite.max().item() if finite.numel() else 1.0
    text = f"{name}: error above {tolerance:g} of {size:g}"
    torch.testing.assert_close(got.double(), right, rtol=0, atol=tolerance * size, msg=text)


def _two_apart(numbers: Tensor) -> Tensor:
    """Return the numbers (N,) in memory that is not contiguous: a NaN follows each."""
    return torch.stack([numbers, torch.full_like(numbers, torch.nan)], 1)[:, 0]


def check_stages(
    backend: ModuleType,
    dtype: torch.dtype,
    tolerance: float,
    sub_centers: int,
    changed: bool,
    classes: int,
    device: str,
    sine: float = 0.0,
) -> None:
    """Compare the stages over the classes, with targets here and elsewhere, padding, and equal sub-centers.

    ``sine``: of the change, the factor of the angle's sine.
    """
    rows = 9
    x = torch.randn(rows, 24).to(device, dtype)
    weight = torch.randn(classes * sub_centers, 24).to(device, dtype)
    weight[sub_centers : 2 * sub_centers] = weight[sub_centers].clone()
    target = torch.randint(len(weight), (rows,), device=device)
    target[::4] = -1
    target[1] = len(weight) - 1
    compute = FP64 if dtype == FP64 else FP32
    count, negatives = None, Negatives(sub_centers)
    if changed:
        count = torch.tensor(len(weight) - sub_centers, device=device)
        threshold = torch.linspace(-0.2, 0.25, rows, dtype=compute, device=device)
        coefficients = torch.tensor([1.0, 0.3, 0.01, sine], dtype=FP64, device=device)
        negatives = Negatives(sub_centers, _two_apart(threshold), _two_apart(coefficients))
    exact = x.double(), weight.double(), target

    greatest = backend.class_max(x, weight, target, count, negatives)
    _close(greatest, plain_torch.class_max(*exact, count, negatives), min(tolerance, 1e-5), "class_max")
    for shift in (None, 20.0 * greatest.double()):
        got = backend.class_stats(x, weight, target, 20.0, shift, True, count, negatives)
        right = plain_torch.class_stats(*exact, 20.0, shift, True, count, negatives)
        limits = min(tolerance, 1e-4), min(tolerance, 1e-5), tolerance
        for name, mine, theirs, allowed in zip(("sum", "maximum", "center sum"), got, right, limits, strict=True):
            _close(mine, theirs, allowed, name)

    lse = plain_torch.class_stats(*exact, 20.0, None, False, None, negatives)[0].log()
    coefficients = torch.randn(2, rows, dtype=compute, device=device)
    gradient = backend.weight_grad(x, weight, target, RowGradients(20.0, lse, *coefficients), negatives)
    right = plain_torch.weight_grad(*exact, RowGradients(20.0, lse, *coefficients.double()), negatives)
    _close(gradient, right, tolerance, "weight_grad")


def check_nan(backend: ModuleType, device: str) -> None:
    """Neither a row nor a center of NaN is lost in the choice of the nearest sub-center."""
    x, weight, target = torch.randn(3, 8), torch.randn(12, 8), torch.tensor([0, 0, 0], device=device)
    x[1, 2] = torch.nan
    moved = x.to(device), weight.to(device), target
    total, _, _ = backend.class_stats(*moved, 8.0, None, True, None, Negatives(3))
    assert total.isnan().tolist() == [False, True, False]
    weight[7, 1] = torch.nan
    moved = x.to(device), weight.to(device), target
    total, _, _ = backend.class_stats(*moved, 8.0, None, True, None, Negatives(3))
    assert total.isnan().all()


def check_equal_sub_centers(backend: ModuleType, device: str) -> None:
    """Of equal sub-centers the first has the gradient."""
    x, weight = torch.eye(4, device=device)[:2], torch.eye(4, device=device)[[2, 0, 0, 0]]
    lse, rows = torch.zeros(2, dtype=FP64, device=device), torch.ones(2, device=device)
    target = torch.tensor([0, 0], device=device)
    gradient = backend.weight_grad(x, weight, target, RowGradients(1.0, lse, rows, 0 * rows), Negatives(2))
    assert (gradient[2] != 0).any() and (gradient[3] == 0).all()


def _outcome(inputs: Inputs, margin: Margin, backend: str | None, **options: Any) -> Outcome:
    function = fa.reference.margin_softmax_loss if backend is None else fa.margin_softmax_loss
    named = {} if backend is None else {"backend": backend}
    return run(function, inputs, margin=copy.deepcopy(margin), **named, **options)


def check_loss(
    backend: str, margin: Margin, sub_centers: int, dtype: torch.dtype, geometry: str, scale: float, device: str = "cpu"
) -> None:
    """Compare with the fp64 reference over 31 classes.

    The error is at most twice that of plain PyTorch in the same dtypes, plus what the rounding of a cosine does.
    """
    name = str(dtype).removeprefix("torch.")
    case = Case(9, 31 * sub_centers, 24, name, name, scale, margin, geometry)
    inputs = Inputs(*(each.to(device) for each in make_inputs(case)))
    labels = torch.where(inputs.target < 0, inputs.target, inputs.target // sub_centers)
    inputs = inputs._replace(target=labels)
    exact = inputs._replace(embeddings=inputs.embeddings.double(), weight=inputs.weight.double())
    options = {"scale": scale, "sub_centers": sub_centers}
    got = _outcome(inputs, margin, backend, **options)
    truth = _outcome(exact, margin, None, **options)
    eager = _outcome(inputs, margin, None, **options)
    terms, allowed = 2.0**-7 if dtype == BF16 else 0.0, tolerance(case, truth)
    for field, rounding in (("loss", 0.0), ("d_embeddings", terms), ("d_weight", terms)):
        mine, right, theirs = (getattr(outcome, field) for outcome in (got, truth, eager))
        size = right.abs().max().clamp(min=1e-9)
        error, of_eager = (((each - right).abs().max() / size).item() for each in (mine, theirs))
        assert error <= 2 * of_eager + allowed + rounding, f"{field}: {error:.1e}, of eager {of_eager:.1e}"
    if geometry != "collapsed":  # all cosines are equal there, up to their rounding
        assert torch.equal(got.stats.correct, truth.stats.correct)


def check_partial_fc(backend: str, options: dict[str, Any], updated: bool, device: str = "cpu") -> None:
    """Compare two steps with those of plain PyTorch, with a gradient by weight or with CenterSGD."""
    recipe = fa.CenterSGD(lr=0.1) if updated else None
    heads = [
        fa.PartialFC(
            *(20, 40),
            scale=16.0,
            backend=name,
            center_optimizer=recipe,
            dense_grad=not updated,
            device=device,
            **options,
        )
        for name in (backend, "torch")
    ]
    x, y = torch.randn(7, 20).to(device), torch.randint(40, (7,)).to(device)
    for _ in range(2):
        results = []
        for head in heads:
            leaf = x.clone().requires_grad_()
            loss = head(leaf, y)
            loss.backward()
            weight = head.weight if head.weight.grad is None else head.weight.grad
            results.append((loss.detach(), leaf.grad, weight.detach().clone()))
            head.weight.grad = None
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
