"""Agreement of a backend with the reference in fp64: problems, errors, allowed errors and finite differences.

The commands ``gradcheck`` and ``doctor`` use it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_arcface import backends, margin_softmax_loss, reference
from fused_arcface.margins import Margin
from fused_arcface.margins.angular import ArcFace
from fused_arcface.margins.registry import examples

QUANTITIES = ("loss", "d_embeddings", "d_weight")
# An error may exceed twice the reference's own in the same dtype by some roundings of the dtype that is computed in (an
# exponent's rounding is multiplied by s = 64), and a gradient's by one rounding of the dtype that it is stored in.
COMPUTED = {torch.float64: 5e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
STORED = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SCALE = 64.0
# Angles in radians to the target's center. They lie well before and past the boundaries of the margins that are
# checked, and away from their jumps: at θ = π/2 (easy), θ = π - 0.5 (hard), 1.7·θ = π and 1.2·θ + 0.4 = π.
ANGLES = (0.02, 0.3, 0.8, 1.2, 1.7, 2.1, 2.9, 3.1)


class Problem(NamedTuple):
    """Inputs and options of the loss. The inputs are in fp64, and are rounded to the dtype under test."""

    embeddings: Tensor
    """(N, D)"""
    weight: Tensor
    """(C·sub_centers, D)"""
    target: Tensor
    """(N,) class ids."""
    options: dict[str, Any]
    """Options of the loss, its margin and scale among them."""


class Agreement(NamedTuple):
    """The result of one combination of backend, margin, dtype and options."""

    errors: dict[str, float]
    """Relative error of each of :data:`QUANTITIES`."""
    allowed: dict[str, float]
    """Largest error that is allowed."""
    numerical: bool | None
    """True if finite differences agree; None if they were not computed."""

    @property
    def passed(self) -> bool:
        """True if all errors are allowed. NaN is not."""
        return all(self.errors[q] <= self.allowed[q] for q in QUANTITIES) and self.numerical is not False


def subjects() -> list[tuple[Margin, dict[str, Any]]]:
    """Return every margin with each of its modes, a user's own function, and the further options of the loss."""
    plain: list[tuple[Margin, dict[str, Any]]] = [(margin, {}) for margin in (*examples(), squared)]
    return [*plain, (ArcFace(), {"sub_centers": 3}), (ArcFace(), {"label_smoothing": 0.1})]


def squared(target_cosine: Tensor) -> Tensor:
    """Return modified cosines, as a user's own margin may do."""
    return target_cosine - 0.1 * (1 + target_cosine) ** 2


def device_of(backend: str) -> str:
    """Return the kind of device on which a backend is checked."""
    return backends.device_type(backend) or "cpu"


def check(backend: str, margin: Margin, dtype: torch.dtype, options: dict[str, Any] | None = None) -> Agreement:
    """Compare a backend with the reference in fp64; in fp64 compare its gradients with finite differences too.

    ``options`` of the loss are ``sub_centers`` or ``label_smoothing``.
    """
    problem = sample_problem(margin, options, device=device_of(backend))
    errors = errors_against_fp64(backend, dtype, problem)
    eager = errors_against_fp64(None, dtype, problem)
    allowed = {
        quantity: 2 * eager[quantity] + COMPUTED[dtype] + (quantity != "loss") * STORED[dtype]
        for quantity in QUANTITIES
    }
    return Agreement(errors, allowed, finite_differences(backend, margin, options) if dtype == torch.float64 else None)


def sample_problem(
    margin: Margin | None = None,
    options: dict[str, Any] | None = None,
    *,
    rows: int = 16,
    classes: int = 50,
    dim: int = 32,
    scale: float = SCALE,
    device: str = "cpu",
    angles: tuple[float, ...] = ANGLES,
) -> Problem:
    """Return embeddings ``(rows, dim)`` at given angles to their class centers, with norms from 0.5 to 2.

    The numbers depend on the arguments alone. The angles, in radians, are repeated over the rows with a shift, so that
    no two rows have the same cosine: ElasticFace+ orders its draws by them. The margin is ArcFace if None.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sub_centers = (options or {}).get("sub_centers", 1)
    weight, target = normal(classes * sub_centers, dim), torch.randint(classes, (rows,), generator=generator)
    center = F.normalize(weight[target * sub_centers])
    aside = normal(rows, dim)
    aside = F.normalize(aside - (aside * center).sum(1, keepdim=True) * center)
    theta = torch.tensor(angles, dtype=torch.float64).repeat(rows // len(angles) + 1)[:rows, None]
    theta += 0.005 * (torch.arange(rows) // len(angles))[:, None]
    norm = 0.5 + 1.5 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    embeddings = norm * (theta.cos() * center + theta.sin() * aside)
    tensors = embeddings.to(device), weight.to(device), target.to(device)
    return Problem(*tensors, {"margin": margin or ArcFace(), "scale": scale, **(options or {})})


def errors_against_fp64(backend: str | None, dtype: torch.dtype, problem: Problem) -> dict[str, float]:
    """Return the errors of loss and gradients against the reference in fp64, on the same rounded inputs.

    An error is the largest difference, relative to the largest value. Without a backend they are those of the reference
    itself, computed in ``dtype``.
    """
    embeddings, weight = problem.embeddings.to(dtype), problem.weight.to(dtype)

    def results(dtype: torch.dtype, loss: Callable[..., Any]) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (embeddings, weight)]
        options = copy.deepcopy(problem.options)  # a margin with a state starts from the same one
        rows = loss(*leaves, problem.target, reduction="none", **options)
        return [rows.detach(), *torch.autograd.grad(rows.mean(), leaves)]

    oracle = reference.margin_softmax_loss
    expected = results(torch.float64, oracle)
    found = results(dtype, oracle if backend is None else partial(margin_softmax_loss, backend=backend))
    return {
        quantity: float((a.double() - b).abs().max() / b.abs().max())
        for quantity, a, b in zip(QUANTITIES, found, expected, strict=True)
    }


def norms_are_held(margin: Margin) -> bool:
    """Return true if no gradient of the loss with this margin goes through the embeddings' norms.

    Finite differences must then leave the norms as they are: the margin may depend on them all the same.

    >>> from fused_arcface.margins.per_row import AdaFace, MagFace
    >>> norms_are_held(AdaFace()), norms_are_held(MagFace())
    (True, False)
    """
    if not hasattr(margin, "for_rows"):
        return True
    norms = torch.ones(1, dtype=torch.float64, requires_grad=True)
    modify, penalty = copy.deepcopy(margin).for_rows(norms, torch.tensor([True]))
    total = modify(torch.zeros_like(norms)) if penalty is None else modify(torch.zeros_like(norms)) + penalty
    return not total.requires_grad or torch.autograd.grad(total, norms, allow_unused=True)[0] is None


def finite_differences(backend: str, margin: Margin, options: dict[str, Any] | None = None) -> bool | None:
    """Return whether finite differences agree with the gradients of a small problem in fp64.

    The result is None for a straight-through gradient, which is not a derivative. Numbers that a margin uses without a
    gradient are held fixed: any state, and norms by :func:`norms_are_held`.
    """
    if getattr(margin, "gradient", "exact") != "exact":
        return None
    # Moderate angles and scale: finite differences lose digits where the loss has a large curvature.
    angles = (0.3, 0.8, 1.2, 1.7, 2.1, 2.9)
    sizes = {"rows": 6, "classes": 7, "dim": 5}
    problem = sample_problem(margin, options, **sizes, scale=8.0, device=device_of(backend), angles=angles)
    norms = problem.embeddings.norm(dim=1, keepdim=True)
    held_norms = norms_are_held(margin)

    def loss(embeddings: Tensor, weight: Tensor) -> Any:
        if held_norms:
            embeddings = norms * F.normalize(embeddings)
        held = copy.deepcopy(problem.options)
        if isinstance(held["margin"], torch.nn.Module):
            held["margin"].eval()
        return margin_softmax_loss(embeddings, weight, problem.target, reduction="none", backend=backend, **held)

    leaves = (problem.embeddings.requires_grad_(), problem.weight.requires_grad_())
    return bool(torch.autograd.gradcheck(loss, leaves, raise_exception=False, fast_mode=False))
