"""What several test modules share: cases over which the head is tested, their inputs, and the rule for passing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_arcface as fa
from fused_arcface.backends import cpu
from fused_arcface.margins import Boundary, Margin, parameters, registry

BACKENDS = [each.name for each in fa.backends.BACKENDS if each.device_type in (None, "cpu")]
"""The backends that run on a CPU."""

everywhere = pytest.mark.parametrize(
    ("loss", "options"),
    [
        pytest.param(fa.reference.margin_softmax_loss, {}, id="oracle"),
        pytest.param(fa.margin_softmax_loss, {"backend": "torch"}, id="torch"),
        pytest.param(fa.margin_softmax_loss, {"backend": "cpu"}, id="cpu"),
    ],
)
"""For a test of ``loss`` and ``options``: the oracle, and the loss on two backends."""

BOUNDARIES = get_args(Boundary)
ARCFACES = tuple(fa.ArcFace(0.5, boundary) for boundary in BOUNDARIES)
MARGINS: tuple[Margin, ...] = (
    *(margin for margin in registry.examples("angular") if (parameters(margin) or ("",))[-1] == "exact"),
    fa.CombinedMargin(4.0, 3.0, 1.9, "fold"),
    fa.SphereFace(4.0),
)
"""The margins that ``scalar.py`` knows: every ``cos(m1·θ + m2) − m3`` with its exact gradient, and its limits.

Angular margins of another form are tested by test_wider.py, and by values of their own in test_angular.py.
"""

PUBLIC = {name: getattr(fa, name) for name in fa.__all__}
"""The public names, to evaluate a repr with: ``vars(fa)`` has only those that were used before."""


def named(value: object) -> str | None:
    """A margin's or a case's name in the list of tests."""
    if isinstance(value, FunctionType):  # its repr has an address, which differs between processes
        return value.__name__
    return str(value).replace(" ", "") if callable(value) or isinstance(value, Case) else None


# Cosines of the rows with their targets: both sides of every boundary of MARGINS, and both ends.
TARGET_COSINES = (1.0, 0.9, 0.31, 0.05, -0.07, -0.5, -0.83, -0.93, -0.995, -1.0)


def rows_at(target_cosines: tuple[float, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (N, 4) at these cosines to their centers, weight (5, 4), target (N,), of norms other than 1."""
    w = torch.randn(5, 4, dtype=torch.float64)
    target = torch.arange(len(target_cosines)) % 5
    toward = F.normalize(w)[target]
    away = torch.randn(len(target), 4, dtype=torch.float64)
    away = F.normalize(away - (away * toward).sum(1, keepdim=True) * toward)
    cosine = torch.tensor(target_cosines, dtype=torch.float64)[:, None]
    x = cosine * toward + (1 - cosine**2).sqrt() * away
    return (x * torch.linspace(0.5, 3, len(x), dtype=torch.float64)[:, None]).to(dtype), w.to(dtype), target


@dataclass(frozen=True)
class Case:
    """Sizes, dtypes by name, options of the loss, and how the inputs lie in space and in memory."""

    N: int = 9
    C: int = 97
    D: int = 33
    x_dtype: str = "float32"
    w_dtype: str = "float32"
    scale: float = 64.0
    margin: Margin = ARCFACES[1]
    geometry: str = "random"
    layout: str = "contiguous"

    def __str__(self) -> str:
        name = f"{self.N}x{self.C}x{self.D}-{self.x_dtype}-{self.w_dtype}-s{self.scale:g}-{self.geometry}"
        return name + "".join(
            f"-{getattr(self, field.name)}"
            for field in (Case.__dataclass_fields__["margin"], Case.__dataclass_fields__["layout"])
            if getattr(self, field.name) != field.default
        )

    @property
    def fp64(self) -> bool:
        return "float64" in (self.x_dtype, self.w_dtype)


class Inputs(NamedTuple):
    embeddings: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    target: Tensor  # (N,)
    upstream: Tensor  # (N,) gradient by each row's loss


def _random(x: Tensor, w: Tensor, y: Tensor) -> None:
    """Angles near 90°, any norms."""


def _late(x: Tensor, w: Tensor, y: Tensor) -> None:
    """Late in training: embeddings 10° to 40° from their centers, norms 5 to 25."""
    noise = torch.linspace(0.2, 0.8, len(x), dtype=x.dtype)[:, None] * F.normalize(x)
    x.copy_((F.normalize(w)[y] + noise) * torch.linspace(5, 25, len(x), dtype=x.dtype)[:, None])


def _aligned(x: Tensor, w: Tensor, y: Tensor) -> None:
    """cos_y = 1."""
    x.copy_(2 * w[y])


def _opposed(x: Tensor, w: Tensor, y: Tensor) -> None:
    """cos_y = -1."""
    x.copy_(-w[y])


def _orthogonal(x: Tensor, w: Tensor, y: Tensor) -> None:
    """cos_y = 0, exactly: one half of the dimensions for the embeddings, the other for the centers."""
    x[:, ::2] = 0
    w[:, 1::2] = 0


def _collapsed(x: Tensor, w: Tensor, y: Tensor) -> None:
    """All classes, the target's too, nearly opposite to all embeddings: no logit is above about -scale."""
    direction = F.normalize(x[:1] if len(x) else w[:1])
    w.copy_(0.01 * F.normalize(w) - direction)
    x.copy_(3 * direction.expand_as(x))


def _zero_rows(x: Tensor, w: Tensor, y: Tensor) -> None:
    x[::3] = 0
    w[::4] = 0
    w[y[1:2]] = 0


def _tiny(x: Tensor, w: Tensor, y: Tensor) -> None:
    """Norms below the ε of the normalization, most of them far below; without the projection there."""
    for rows in (x, w):
        rows[::3] *= 1e-25
        rows[1::3] *= 0.6e-12 / rows[1::3].norm(dim=1, keepdim=True)


def _huge(x: Tensor, w: Tensor, y: Tensor) -> None:
    x.mul_(1e25)
    w[1::2] *= 1e25


def _ignored(x: Tensor, w: Tensor, y: Tensor) -> None:
    """Every third row takes no part."""
    y[::3] = -100


def _duplicates(x: Tensor, w: Tensor, y: Tensor) -> None:
    """One label for all rows: every other class is absent. Copies of a center, and of an embedding."""
    y.fill_(len(w) - 1)
    w[: len(w) // 2] = w[0].clone()
    x[: len(x) // 2] = x[:1].clone()


GEOMETRIES: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    each.__name__[1:]: each
    for each in (
        _random,
        _late,
        _aligned,
        _opposed,
        _orthogonal,
        _collapsed,
        _zero_rows,
        _tiny,
        _huge,
        _ignored,
        _duplicates,
    )
}


def _sliced(tensor: Tensor) -> Tensor:
    larger = tensor.new_full((tensor.shape[0] + 2, tensor.shape[1] + 5), torch.nan)
    larger[1:-1, 2:-3] = tensor
    return larger[1:-1, 2:-3]


def _transposed(tensor: Tensor) -> Tensor:
    return _sliced(tensor.T).T


def _strided(tensor: Tensor) -> Tensor:
    larger = tensor.new_full((3 * tensor.shape[0], 2 * tensor.shape[1]), torch.nan)
    larger[1::3, ::2] = tensor
    return larger[1::3, ::2]


# Values are the same, strides are not. What lies between the rows is NaN: to read it would show.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "sliced": _sliced,
    "transposed": _transposed,
    "strided": _strided,
}


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.N, case.D, dtype=torch.float64, generator=generator)
    w = torch.randn(case.C, case.D, dtype=torch.float64, generator=generator)
    target = torch.randint(case.C, (case.N,), generator=generator)
    GEOMETRIES[case.geometry](x, w, target)
    lay_out = LAYOUTS[case.layout]
    upstream = torch.randn(case.N, dtype=torch.float64, generator=generator)
    return Inputs(
        lay_out(x.to(getattr(torch, case.x_dtype))), lay_out(w.to(getattr(torch, case.w_dtype))), target, upstream
    )


def inputs_on(case: Case, device: str, seed: int = 0) -> Inputs:
    """A case's inputs on a device, in the case's layout there."""
    x, w, target, upstream = make_inputs(case, seed)
    if device == "cpu":
        return Inputs(x, w, target, upstream)
    x, w = (LAYOUTS[case.layout](rows.contiguous().to(device)) for rows in (x, w))
    return Inputs(x, w, target.to(device), upstream.to(device))


class Outcome(NamedTuple):
    """One forward and backward pass, in fp64."""

    loss: Tensor  # (N,)
    d_embeddings: Tensor  # (N, D)
    d_weight: Tensor  # (C, D)
    stats: fa.MarginSoftmaxStats


def run(function: Callable, inputs: Inputs, **options: object) -> Outcome:
    """``function``'s row losses and the gradients by both inputs under the upstream gradient."""
    x, w = inputs.embeddings.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    loss, stats = function(x, w, inputs.target, reduction="none", return_stats=True, **options)
    upstream = inputs.upstream.to(loss.dtype)
    d_x, d_w = torch.autograd.grad(loss, (x, w), upstream)
    assert d_x.dtype == x.dtype and d_w.dtype == w.dtype
    return Outcome(loss.detach().double(), d_x.double(), d_w.double(), stats)


def tolerance(case: Case, truth: Outcome) -> float:
    """Relative error that is allowed beyond twice the eager one: what rounding the cosines does to a logit.

    With δ two units in the last place of the compute dtype (eight in fp64, where the truth is no more exact than the
    rest), a cosine is known to δ and an angle to min(δ/sin θ, √(2δ)); a logit is ``scale`` times that, and its absolute
    error is the relative one of a small loss and of a gradient.
    """
    delta = 8 * 2.0**-52 if case.fp64 else 2 * 2.0**-23
    angle_error = 0.0
    if len(truth.loss) and not isinstance(case.margin, fa.CosFace | fa.NormSoftmax):
        sine = (1 - truth.stats.target_cosine.double() ** 2).clamp(min=0).sqrt().min().item()
        angle_error = min(delta / max(sine, 1e-300), math.sqrt(2 * delta))
    return 4 * delta + case.scale * (delta + angle_error)


def term_sizes(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """Sum of the absolute terms that each row of the two gradients is made of, (N,) and (C,), from fp64 inputs.

    The projection takes most of them away where a cosine is near ±1, and all of them in one dimension: an error is
    measured by what was added up, not by what was left.
    """
    x, w, target, upstream = inputs
    cosine = F.normalize(x) @ F.normalize(w).T
    ignored = target == -100
    is_target = F.one_hot(target.masked_fill(ignored, 0), len(w)).bool()
    target_cosine = cosine[is_target].requires_grad_()
    negative_lse = (case.scale * cosine).masked_fill(is_target, -torch.inf).logsumexp(1)
    modified = case.margin(target_cosine)
    (derivative,) = torch.autograd.grad(modified.sum(), target_cosine)
    sigmoid = (negative_lse - case.scale * modified.detach()).sigmoid()
    probability = (case.scale * cosine - negative_lse[:, None]).exp()
    # At a cosine of ±1 exactly a margin may give 0 (its clamp) or its limit. The projection takes either away.
    terms = torch.where(is_target, derivative.abs().clamp(min=1)[:, None], probability)
    terms = case.scale * (upstream.abs() * sigmoid).masked_fill(ignored, 0)[:, None] * terms
    norms = (tensor.norm(dim=1).clamp(min=1e-12) for tensor in (x, w))
    return tuple(terms.sum(dim) / norm for dim, norm in zip((1, 0), norms, strict=True))


def errors(got: Tensor, right: Tensor, size: Tensor, subnormal: float) -> tuple[float, float]:
    """Largest error relative to the greatest row's size, and the largest error of a row relative to its own size.

    A kernel may write 0 for a number below ``subnormal``, the smallest normal number of the tensor's dtype.
    """
    if got.numel() == 0:
        return 0.0, 0.0
    difference = ((got - right).abs() - subnormal).clamp(min=0).reshape(len(got), -1).amax(1)
    # 1e-30: far below what fp32 can tell from zero once it has been through an exponential.
    return (difference.max() / size.max().clamp(min=1e-30)).item(), (difference / size.clamp(min=1e-30)).max().item()


def check(case: Case, backend: str, seed: int = 0) -> None:
    """``backend``'s error is at most twice that of plain PyTorch in the same dtypes, plus :func:`tolerance` and, where
    products are taken in bf16, :func:`bf16_rounding`."""
    inputs = make_inputs(case, seed)
    got = run(fa.margin_softmax_loss, inputs, backend=backend, margin=case.margin, scale=case.scale)
    in_bf16 = backend == "cpu" and case.x_dtype == "bfloat16" and not case.fp64 and cpu.multiplies_bf16()
    compare(case, inputs, got, bf16_rounding(case) if in_bf16 else (0.0, 0.0, 0.0))


def bf16_rounding(case: Case) -> tuple[float, float, float]:
    """What bf16 products may cost a loss and the two gradients beside what plain PyTorch does, which promotes.

    bf16 rows enter as they are: cosines are fp32's. Exponentials and their factors are rounded for the second
    products, 2⁻⁹ each. Rows of another dtype are rounded as well: at most 2⁻⁹ of a cosine, of a logit that times the
    scale, and as much of each probability.
    """
    logit = 0.0 if case.w_dtype == "bfloat16" else case.scale * 2.0**-9
    return logit, 2.0**-7 + 2 * logit, 2.0**-7 + 2 * logit


def compare(case: Case, inputs: Inputs, got: Outcome, rounding: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
    """See :func:`check`; ``rounding`` is allowed besides, of losses and of the two gradients."""
    options = {"margin": case.margin, "scale": case.scale}
    exact = inputs._replace(embeddings=inputs.embeddings.double(), weight=inputs.weight.double())
    truth = run(fa.reference.margin_softmax_loss, exact, **options)
    eager = run(fa.reference.margin_softmax_loss, inputs, **options)
    allowed = tolerance(case, truth)
    sizes = (truth.loss, *term_sizes(exact, case))
    dtypes = ("float32", case.x_dtype, case.w_dtype)
    for name, dtype, size, more in zip(Outcome._fields, dtypes, sizes, rounding, strict=False):
        numbers = torch.finfo(getattr(torch, dtype))
        limit = numbers.max  # past it a gradient is infinite, or saturates
        mine, theirs, right = (getattr(outcome, name).clamp(-limit, limit) for outcome in (got, eager, truth))
        assert mine.shape == right.shape
        measured = zip(
            ("of the tensor", "of a row"),
            errors(mine, right, size, numbers.smallest_normal),
            errors(theirs, right, size, numbers.smallest_normal),
            strict=True,
        )
        for kind, error, eager_error in measured:
            assert error <= 2 * eager_error + allowed + more, (
                f"{name}: error {kind} {error:.2e}, of eager {eager_error:.2e}, allowed {allowed + more:.2e}; {case}"
            )
