"""The finalizing kernel: one launch from each row's log-sum-exp and target cosine to loss and both derivatives.

It is fused_arcface.margins in Triton, with the same names in the same order; a test compares the two point by point.
The same O(N) tail in PyTorch is some forty launches of a few microseconds each. That is as long as the passes of a
batch of 128 over 100 000 classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_arcface.margins.angular import SIN_FLOOR as _SIN_FLOOR
from fused_arcface.margins.angular import drop_past_boundary

from .common import launch, square_root

SIN_FLOOR = tl.constexpr(_SIN_FLOOR)
_PI = tl.constexpr(3.141592653589793)


@triton.jit
def _arctan2(y, x):
    """atan2 in fp32 for y >= 0, to 2 ulp: Cephes' polynomial on [0, tan(π/8)], reached by two reductions."""
    low = tl.minimum(y, tl.abs(x))
    high = tl.maximum(y, tl.abs(x))
    fraction = low / tl.where(high == 0, 1.0, high)
    reduced = tl.where(fraction > 0.41421356, (fraction - 1) / (fraction + 1), fraction)
    square = reduced * reduced
    polynomial = (
        (8.05374449538e-2 * square - 1.38776856032e-1) * square + 1.99777106478e-1
    ) * square - 3.33329491539e-1
    arctan = polynomial * square * reduced + reduced + tl.where(fraction > 0.41421356, 0.7853981633974483, 0.0)
    arctan = tl.where(y > tl.abs(x), 1.5707963267948966 - arctan, arctan)
    return tl.where(x < 0, _PI - arctan, arctan)


@triton.jit
def angle(cosine):
    """Return θ, and the sine for its derivative -1/sin θ."""
    cosine = tl.where(cosine > 1, 1.0, tl.where(cosine < -1, -1.0, cosine))
    sine = square_root((1 - cosine) * (1 + cosine))
    return _arctan2(sine, cosine), tl.maximum(sine, SIN_FLOOR)


@triton.jit
def past_boundary(phi, cosine, drop, BOUNDARY: tl.constexpr):
    """Return ψ of φ, its derivative by φ, and its derivative by the cosine with φ held fixed."""
    value = tl.cos(phi)
    by_phi = -tl.sin(phi)
    by_cosine = tl.zeros_like(phi)
    if BOUNDARY == "hard" or BOUNDARY == "continuous":
        within = phi <= _PI
        value = tl.where(within, value, cosine - drop)
        by_phi = tl.where(within, by_phi, 0.0)
        by_cosine = tl.where(within, 0.0, 1.0)
    elif BOUNDARY == "fold":
        k = tl.floor(phi / _PI)
        sign = 1 - 2 * (k - 2 * tl.floor(k / 2))
        value = sign * value - 2 * k
        by_phi = sign * by_phi
    elif BOUNDARY == "clip":
        within = phi <= _PI
        value = tl.where(phi > _PI, -1.0, value)  # not `within`: a NaN is neither
        by_phi = tl.where(within, by_phi, 0.0)
    elif BOUNDARY == "easy":
        acute = cosine > 0
        value = tl.where(acute, value, cosine)
        by_phi = tl.where(acute, by_phi, 0.0)
        by_cosine = tl.where(acute, 0.0, 1.0)
    return value, by_phi, by_cosine


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], without the cancellation (Goldberg, 1991, theorem 4)."""
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))


@triton.jit(do_not_specialize=["num_rows"])
def margin_loss_kernel(
    lse_ptr,  # (N,) of the negatives
    cosine_ptr,  # (N,) of the target
    loss_ptr,  # (N,)
    full_lse_ptr,  # (N,)
    d_lse_ptr,  # (N,)
    d_cosine_ptr,  # (N,)
    scale,
    m1,
    m2,
    m3,
    drop,
    num_rows,
    BOUNDARY: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the losses and their derivatives of a block of rows."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    lse = tl.load(lse_ptr + offs_n, mask_n, 0.0)
    cosine = tl.load(cosine_ptr + offs_n, mask_n, 0.0)
    if BOUNDARY == "linear":
        modified = cosine - m3
        slope = tl.full([BLOCK_N], 1.0, tl.float32)
    else:
        theta, sine = angle(cosine)
        value, by_phi, by_cosine = past_boundary(m1 * theta + m2, cosine, drop, BOUNDARY)
        modified = value - m3
        slope = tl.full([BLOCK_N], 1.0, tl.float32) if STRAIGHT_THROUGH else by_cosine - by_phi * m1 / sine
    target_logit = scale * modified
    difference = lse - target_logit
    # softplus and sigmoid from exp(-|d|), which cannot overflow.
    small = tl.exp(-tl.abs(difference))
    softplus = _log1p(small)
    loss = tl.where(difference > 0, difference, 0.0) + softplus
    sigmoid = tl.where(difference > 0, 1.0, small) / (1 + small)
    full_lse = tl.where(difference > 0, lse, target_logit) + softplus
    tl.store(loss_ptr + offs_n, loss, mask_n)
    tl.store(full_lse_ptr + offs_n, full_lse, mask_n)
    tl.store(d_lse_ptr + offs_n, sigmoid, mask_n)
    tl.store(d_cosine_ptr + offs_n, -scale * sigmoid * slope, mask_n)


def margin_loss(
    negative_lse: Tensor,
    target_cosine: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    boundary: str,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implement :func:`fused_arcface.backends.torch.margin_loss`, for fp32."""
    loss, full_lse, d_lse, d_cosine = (torch.empty_like(negative_lse) for _ in range(4))
    num_rows = negative_lse.shape[0]
    launch(
        margin_loss_kernel,
        (triton.cdiv(num_rows, 128),),
        negative_lse.contiguous(),
        target_cosine.contiguous(),
        loss,
        full_lse,
        d_lse,
        d_cosine,
        float(scale),
        float(m1),
        float(m2),
        float(m3),
        drop_past_boundary(m1, m2, boundary),
        num_rows,
        BOUNDARY=boundary,
        STRAIGHT_THROUGH=gradient == "straight_through",
        BLOCK_N=128,
    )
    return loss, full_lse, d_lse, d_cosine
