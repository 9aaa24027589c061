"""A tile of the class-chunk algorithm: its place, its scores, and the masks of targets and padding.

The kernels in exponentials.py call these functions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot


@triton.jit
def tile_scores(
    x_ptr,
    w_ptr,
    last_w,
    scores_ptrs,
    mask_n,
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
    AS_STORED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the scores (BLOCK_N, BLOCK_C) of one tile; x_ptr and w_ptr are at its first rows.

    Copied centers are padded, so only batch rows need a mask. Stored centers are not: the last one, ``last_w`` rows
    after the tile's first, takes the place of those that would follow.
    """
    if PRODUCT:
        offs_d = tl.arange(0, BLOCK_D)
        offs_w = tl.arange(0, BLOCK_C)
        if AS_STORED:
            offs_w = tl.minimum(offs_w, last_w)
        x_ptrs = x_ptr + (tl.arange(0, BLOCK_N)[:, None] * WIDTH + offs_d[None, :])
        w_ptrs = w_ptr + (offs_w[None, :] * WIDTH + offs_d[:, None])
        scores = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            if WIDTH % BLOCK_D == 0:
                x = tl.load(x_ptrs, mask_n[:, None], 0.0)
                w = tl.load(w_ptrs)
            else:
                mask_d = start + offs_d < WIDTH
                x = tl.load(x_ptrs, mask_n[:, None] & mask_d[None, :], 0.0)
                w = tl.load(w_ptrs, mask_d[:, None], 0.0)
            scores = dot(x, w, scores)
            x_ptrs += BLOCK_D
            w_ptrs += BLOCK_D
    else:
        scores = tl.load(scores_ptrs, mask_n[:, None], 0.0)
    return scores


@triton.jit
def tile_place(num_tiles_n, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the index of the tile of classes, and the tile's first row (64-bit) and class.

    Blocks that run together share their classes' tile.
    """
    pid = tl.program_id(0)
    tile_c = pid // num_tiles_n
    return tile_c, (pid % num_tiles_n).to(tl.int64) * BLOCK_N, tile_c * BLOCK_C


@triton.jit
def target_column(target_ptr, offs_n, mask_n, first_class):
    """Return each row's target (BLOCK_N,) as a column of the panel. It may be outside of the panel."""
    return (tl.load(target_ptr + offs_n, mask_n, -1) - first_class).to(tl.int32)


@triton.jit
def is_other(offs_c, target, SUB_CENTERS: tl.constexpr):
    """Return true (BLOCK_N, BLOCK_C) for a center that does not belong to the row's own class.

    ``target`` (BLOCK_N,) is the row's column in the panel, see :func:`target_column`.
    """
    if SUB_CENTERS == 1:
        return offs_c[None, :] != target[:, None]
    own = tl.where(target >= 0, target // SUB_CENTERS, -1)
    return (offs_c // SUB_CENTERS)[None, :] != own[:, None]


@triton.jit
def is_negative(offs_c, target, num_classes, SUB_CENTERS: tl.constexpr):
    """Return true (BLOCK_N, BLOCK_C) for a center of another class, false for the panel's padding."""
    return (offs_c < num_classes)[None, :] & is_other(offs_c, target, SUB_CENTERS)


@triton.jit
def with_target(gradient, offs_c, target, coefficient, num_classes):
    """Return the gradient with the rows' coefficients at their targets, and zeros in the padding.

    A row without negatives has a shift of -inf, so its exponentials are infinite. A mask removes them; a factor of 0
    would not.
    """
    gradient = tl.where(offs_c[None, :] == target[:, None], coefficient[:, None], gradient)
    return tl.where((offs_c < num_classes)[None, :], gradient, 0.0)


@triton.jit
def needs_masks(target, first_c, num_classes, BLOCK_C: tl.constexpr):
    """Return true if the tile holds the target of one of its rows, or padding.

    Few tiles do. The masks would be half of a thread's instructions after the product, so the other tiles branch around
    them. A kernel asks before its product, when no scores take registers yet.
    """
    has_target = (target >= first_c) & (target < first_c + BLOCK_C)
    return (tl.max(has_target.to(tl.int32), 0) > 0) | (first_c + BLOCK_C > num_classes)
