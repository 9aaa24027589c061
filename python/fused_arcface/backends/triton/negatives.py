"""Negatives that do not enter by their cosines alone: changed cosines, and one center of several for each class.

:class:`fused_arcface.engine.terms.Negatives` defines them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def change_numbers(coefficients_ptr, dtype: tl.constexpr):
    """Return the first three coefficients in the dtype of the cosines."""
    a, b, d = tl.load(coefficients_ptr), tl.load(coefficients_ptr + 1), tl.load(coefficients_ptr + 2)
    return a.to(dtype), b.to(dtype), d.to(dtype)


@triton.jit
def changed_cosine(cosine, threshold, a, b, d):
    """Return the value of each cosine among the negatives, and its derivative by the cosine.

    See :class:`fused_arcface.engine.terms.Negatives`.
    """
    above = cosine > threshold
    return tl.where(above, (a * cosine + b) * cosine + d, cosine), tl.where(above, 2 * a * cosine + b, 1.0)


@triton.jit
def is_beaten(
    scores,  # (BLOCK_N, BLOCK_C) of the tile, times the centers' inverse norms
    scores_ptrs,  # (BLOCK_N, 1) addresses of the panel's scores of these rows, without the inverse norms
    inverse_ptr,  # (P,)
    offs_c,  # (BLOCK_C,) columns of the tile in the panel
    mask_n,
    SUB_CENTERS: tl.constexpr,
):
    """Return true for a sub-center that is not the nearest of its class; of equal ones the first is the nearest.

    Numbers that are NaN beat nothing and are not beaten: they reach the sums.
    """
    first = offs_c // SUB_CENTERS * SUB_CENTERS
    beaten = tl.zeros(scores.shape, tl.int1)
    for k in tl.static_range(SUB_CENTERS):
        other = tl.load(scores_ptrs + (first + k)[None, :], mask_n[:, None], 0.0)
        other = other * tl.load(inverse_ptr + first + k)[None, :]
        is_earlier = (first + k < offs_c)[None, :]
        beaten = beaten | (other > scores) | ((other == scores) & is_earlier)
    return beaten
