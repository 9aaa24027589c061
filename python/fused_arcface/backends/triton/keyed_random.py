"""The keyed generator of :mod:`fused_arcface.base.keyed_random` in Triton; a test compares the two."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(key, n):
    """SplitMix64's number n under a key, uint64."""
    x = key + (n + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def rounding_bits(row_keys, columns):
    """(BLOCK_N, BLOCK_D) uint32 of the rows' keys (BLOCK_N,) uint64 and the columns (BLOCK_D,): keyed.rounding_bits."""
    x = row_keys.to(tl.uint32)[:, None] + columns.to(tl.uint32)[None, :] * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) ^ (row_keys >> 32).to(tl.uint32)[:, None]
