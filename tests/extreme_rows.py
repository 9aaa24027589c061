"""Rows of extreme norms, and gradients past fp16's range: what every backend has to make of them. Used by test_norms.py
(the oracle and the backends of a CPU), triton_interpreted.py and test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_arcface as fa

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Embeddings, weight and target to row losses (N,) with scale 16 and without a margin."""

SCALE, D = 16.0, 16
EPSILON = 1e-12
_DIRECTIONS = 7
# From below ε to the longest rows whose elements the dtype holds: the norm itself is past it. Squares are from 2e19 on,
# the inverse is no normal number from 8.5e37 on.
NORMS = {
    torch.float32: (1e-37, 1e-13, 1e-11, 1.0, 1e19, 1e25, 1e37, 9e37, 3e38, 1.2e39),
    torch.bfloat16: (1e-37, 1e-13, 1e-11, 1.0, 1e19, 1e25, 1e37, 9e37, 3e38, 1.2e39),
    torch.float64: (1e-300, 1e-13, 1e-11, 1.0, 1e100, 1e160, 1e307),
}


def _rows(norms: Tensor, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (R, D) of these norms (R,), about, and the same rows over them in fp64."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (len(norms), D), generator=generator).double() * 2 - 1
    rows = signs * (0.8 + 0.2 * torch.rand(len(norms), D, generator=generator).double()) / D**0.5
    stored = (rows * norms[:, None]).to(dtype)
    return stored, stored.double() / norms[:, None]


def _unit(rows: Tensor, norms: Tensor) -> Tensor:
    """What rows times norms are after their division by max(norm, ε), in fp64."""
    lengths = rows.norm(dim=1)
    return torch.where(
        (lengths * norms < EPSILON)[:, None], rows * (norms.clamp(max=EPSILON) / EPSILON)[:, None], F.normalize(rows)
    )


def check_norms(loss: Loss, dtype: torch.dtype, tolerance: float, smoothing: float = 0.0) -> None:
    """Losses and both gradients against cross-entropy in fp64. Each norm comes among embeddings and among centers."""
    norms = torch.tensor(NORMS[dtype], dtype=torch.float64).repeat_interleave(_DIRECTIONS)
    target = torch.arange(len(norms)).roll(3)
    x, x_rows = _rows(norms, dtype, 0)
    w, w_rows = _rows(norms, dtype, 1)
    assert x.isfinite().all() and w.isfinite().all()
    x_rows, w_rows = x_rows.requires_grad_(), w_rows.requires_grad_()
    logits = SCALE * _unit(x_rows, norms) @ _unit(w_rows, norms).T
    truth = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    by_rows = torch.autograd.grad(truth.sum(), (x_rows, w_rows))

    x, w = x.requires_grad_(), w.requires_grad_()
    losses = loss(x, w, target)
    losses.sum().backward()
    torch.testing.assert_close(losses.double(), truth, rtol=tolerance, atol=tolerance)
    for name, got, right in (("embeddings", x.grad, by_rows[0]), ("weight", w.grad, by_rows[1])):
        assert got is not None
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * norms  # between the least numbers
        error = ((got.double() * norms[:, None] - right).abs().amax(1) - step) / right.abs().amax(1)
        for norm, worst in zip(NORMS[dtype], error.unflatten(0, (-1, _DIRECTIONS)).amax(1).tolist(), strict=True):
            assert worst <= tolerance, f"{name} of norm {norm:g} in {dtype}: {worst:.1e} of the gradient"


def check_overflow(loss: Loss) -> None:
    """In fp16 a gradient past 65504 is infinite, in all rows but those of zeros; the others' are as they were."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, D, generator=generator) * torch.logspace(-3, 1, 8)[:, None]
    w = torch.randn(12, D, generator=generator) * torch.logspace(-3, 1, 12)[:, None]
    x[3], w[5], w[7] = 0, 0, 0
    x, w, target = x.half().requires_grad_(), w.half().requires_grad_(), torch.arange(8)
    (1024 * loss(x, w, target).sum()).backward()
    exact_x, exact_w = (each.detach().double().requires_grad_() for each in (x, w))
    (1024 * loss(exact_x, exact_w, target).sum()).backward()
    for got, right, zeros in ((x.grad, exact_x.grad, [3]), (w.grad, exact_w.grad, [5, 7])):
        assert got is not None and right is not None and got.dtype == torch.float16
        assert got[zeros].isfinite().all() and got[zeros].abs().max() == 65504
        others = torch.ones(len(got), dtype=torch.bool).index_fill_(0, torch.tensor(zeros), False)
        got, right = got[others].double(), right[others]
        allowed = 2**-6 * right.abs().amax(1, keepdim=True)  # second products of 16-bit operands
        over, under = right.abs() > 67000 + allowed, right.abs() < 50000 - allowed
        assert over.sum() > 5 and under.sum() > 5
        assert torch.equal(got[over], torch.inf * right[over].sign())
        assert ((got - right).abs() <= allowed)[under].all()


def plain(function: Callable[..., Tensor], **options: object) -> Loss:
    """:data:`Loss` of ``fa.margin_softmax_loss`` or of the oracle."""
    options = {"margin": fa.NormSoftmax(), "scale": SCALE, "reduction": "none", **options}
    return lambda x, w, target: function(x, w, target, **options)
