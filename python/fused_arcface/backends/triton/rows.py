"""The inputs of the products: rows made ready for tensor cores, and each batch row's terms of its exponentials.

A row is taken more than once, ``BLOCK_D`` columns at a time, for its norm and for its result; all readings but the
first are from L1. Offsets of rows are 64-bit: C·D passes 2³¹ at 4.2 million classes of 512.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_arcface.engine.terms import Negatives

from .common import Repeated, floored, launch, reciprocal, reciprocal_power_of_two, row_blocks, row_norms, to


class UnitRows(NamedTuple):
    """Rows ready for a product: ``unit row = values·inverse``."""

    values: Tensor
    """(R, width), contiguous, zeros in the columns and rows of the padding."""
    inverse: Tensor
    """(R,) in the compute dtype."""
    reciprocal: Tensor
    """(R,) 1 / max(norm, 1e-12)."""
    second: Tensor
    """(R, width) the same rows for the second product: bf16 where values are fp16, else values themselves."""

    def some(self, rows: slice) -> UnitRows:
        return UnitRows._make(each[rows] for each in self)

    @staticmethod
    def empty(rows: int, width: int, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> UnitRows:
        values = torch.empty(rows, width, dtype=dtype, device=device)
        inverse, reciprocal = _vectors(2, rows, compute, device)
        second = torch.empty_like(values, dtype=torch.bfloat16) if dtype == torch.float16 else values
        return UnitRows(values, inverse, reciprocal, second)


def _vectors(count: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return vectors (size,) of one allocation, each of which begins at a multiple of 16 bytes.

    Otherwise a batch of another size would be another alignment, for which Triton compiles the kernels anew.
    """
    return torch.empty(count, triton.cdiv(size, 16) * 16, dtype=dtype, device=device)[:, :size].unbind()


@triton.jit(do_not_specialize=["num_source", "num_padded", "first", "num_rows"])
def unit_rows_kernel(
    x_ptr,  # (num_source, D), any strides
    stride_n,
    stride_d,
    index_ptr,  # (>= first + num_rows,) int64: which rows, those past num_source are none; or None: in order
    values_ptr,  # (num_padded, WIDTH)
    second_ptr,  # (num_padded, WIDTH)
    inverse_ptr,  # (num_padded,)
    reciprocal_ptr,  # (num_padded,)
    num_source,
    num_padded,
    D,
    first,
    num_rows,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,  # a power of two: 16-bit rows are from it to twice as long
    HAS_SECOND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a block of the rows from ``first`` on, and the inverses of their norms."""
    COMPUTE: tl.constexpr = inverse_ptr.dtype.element_ty
    VALUES: tl.constexpr = values_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    row = first + offs_n
    if index_ptr is not None:
        row = tl.load(index_ptr + row, mask_n, 0)
        mask_n = mask_n & (row < num_source)
    x_ptr += row[:, None] * stride_n

    norm, power = row_norms(x_ptr, stride_d, mask_n, D, COMPUTE, WIDTH, BLOCK_N, BLOCK_D)
    norm = floored(norm, power)

    if VALUES == COMPUTE:
        factor = reciprocal(norm)
        inverse = tl.full([BLOCK_N], 1.0, COMPUTE)
    else:
        # A power of two brings the norm into [LENGTH, 2·LENGTH): a 16-bit row stays exact, where its unit row would be
        # rounded once more.
        factor = reciprocal_power_of_two(norm) * LENGTH
        inverse = reciprocal(norm * factor)

    mask_padded = offs_n < num_padded
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_d[None, :] * stride_d, mask, 0.0).to(COMPUTE) * power[:, None] * factor[:, None]
        to_offs = offs_n[:, None] * WIDTH + offs_d[None, :]
        mask = mask_padded[:, None] & (offs_d < WIDTH)[None, :]
        tl.store(values_ptr + to_offs, to(x, VALUES), mask)
        if HAS_SECOND:
            tl.store(second_ptr + to_offs, to(x, second_ptr.dtype.element_ty), mask)
    tl.store(inverse_ptr + offs_n, inverse, mask_padded)
    tl.store(reciprocal_ptr + offs_n, reciprocal(norm) * power, mask_padded)


def unit_rows(x: Tensor, out: UnitRows, index: Tensor | None = None, length: float = 1.0) -> Repeated:
    """Return launches that fill ``out`` from ``count`` rows of x (R, D), or of its rows ``index``, ``first`` on.

    They take ``first`` and ``count``. Rows past ``count``, or past x, are padding: zeros. 16-bit rows are ``length`` to
    twice as long, a power of two.
    """
    num_padded, width = out.values.shape
    grid, blocks = row_blocks(num_padded, width)
    return Repeated(
        unit_rows_kernel,
        grid,
        x,
        *x.stride(),
        index,
        out.values,
        out.second,
        out.inverse,
        out.reciprocal,
        x.shape[0],
        num_padded,
        x.shape[1],
        LENGTH=length,
        HAS_SECOND=out.second.dtype != out.values.dtype,
        **blocks,
    )


BATCH_LENGTH = 2.0**-16
"""Batch rows in bf16 are so short that their products with stored centers stay within fp32: those of 512 columns can be
7.7e39 long. Centers shorter than 1e-12 have cosines near 0, so nothing is lost at the other end."""


@triton.jit(do_not_specialize=["num_rows"])
def row_terms_kernel(
    inverse_ptr,  # (N,)
    shift_ptr,  # (N,) fp64: what is taken from scale·cos before the exponential
    negative_ptr,  # (N,)
    target_ptr,  # (N,)
    scale_ptr_out,  # (N,) factor of (values·w), or of the cosine, for a base-2 exponent
    shift_ptr_out,  # (N,) base-2, rounded
    negative_ptr_out,  # (N,) factor of the exponentials
    target_ptr_out,  # (N,)
    scale_high,
    scale_low,
    num_rows,
    OF_COSINE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the numbers of a block of rows that the passes over the classes take."""
    COMPUTE: tl.constexpr = inverse_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    inverse = tl.load(inverse_ptr + offs_n, mask_n, 0.0)
    # A Python float reaches a kernel as fp32; two of them carry scale·log2(e) to 48 bits.
    scale = tl.zeros([BLOCK_N], tl.float64) + scale_high + scale_low
    if not OF_COSINE:
        scale = inverse.to(tl.float64) * scale
    tl.store(scale_ptr_out + offs_n, scale.to(COMPUTE), mask_n)
    if HAS_SHIFT:
        exact = tl.load(shift_ptr + offs_n, mask_n, 0.0) * 1.4426950408889634
        rounded = exact.to(COMPUTE)
        # At scale 1000 the rounding to fp32 is 3e-5 of a probability: it goes into the rows' factor instead.
        remainder = exact - rounded.to(tl.float64)
        remainder = tl.where(tl.abs(rounded) < float("inf"), remainder, 0.0).to(COMPUTE)
        factor = tl.exp2(-remainder)
        tl.store(shift_ptr_out + offs_n, rounded, mask_n)
        if HAS_COEFFICIENTS:
            # The second factor of the product is the scaled row: its inverse norm belongs to the coefficients.
            negative = tl.load(negative_ptr + offs_n, mask_n, 0.0).to(COMPUTE)
            target = tl.load(target_ptr + offs_n, mask_n, 0.0).to(COMPUTE)
            tl.store(target_ptr_out + offs_n, target * inverse, mask_n)
            factor = factor * negative * inverse
        tl.store(negative_ptr_out + offs_n, factor, mask_n)


class RowTerms(NamedTuple):
    """The numbers of each batch row that the kernels over the classes take, (N,) each.

    A negative's exponential is ``factor·2^(scale·(x·ŵ) - shift)``. If the margin changes the negatives' cosines, the
    scale is that of the changed cosine.
    """

    target: Tensor
    """int64."""
    threshold: Tensor | None
    """The cosines above it are changed; None: all stay as they are."""
    scale: Tensor | None = None
    """None: only the maxima are wanted."""
    shift: Tensor | None = None
    factor: Tensor | None = None
    coefficient: Tensor | None = None
    """The target's coefficient, which takes the place of its exponential."""

    def some(self, rows: slice) -> RowTerms:
        return RowTerms._make(None if each is None else each[rows] for each in self)


def row_terms(
    inverse: Tensor,
    target: Tensor,
    negatives: Negatives,
    scale: float | Tensor,
    shift: Tensor | None,
    coefficients: tuple[Tensor, Tensor] | None = None,
) -> RowTerms:
    """Return the rows' terms, from shift (N,) fp64 and the coefficients (N,) of the negatives and of the target.

    The scale of a changed cosine is without the embedding's inverse norm, which that cosine has already. A scale that
    only the device knows, 0-dim, is multiplied in afterwards.
    """
    num_rows = inverse.shape[0]
    exact = (1.0 if isinstance(scale, Tensor) else scale) * 1.4426950408889634
    high = ctypes.c_float(exact).value
    scales, shifts, factors, of_target = _vectors(4, num_rows, inverse.dtype, inverse.device)
    negative, target_coefficient = coefficients if coefficients is not None else (inverse, inverse)
    launch(
        row_terms_kernel,
        (triton.cdiv(num_rows, 1024),),
        inverse,
        inverse if shift is None else shift.contiguous(),
        negative.contiguous(),
        target_coefficient.contiguous(),
        scales,
        shifts,
        factors,
        of_target,
        high,
        exact - high,
        num_rows,
        OF_COSINE=negatives.threshold is not None,
        HAS_SHIFT=shift is not None,
        HAS_COEFFICIENTS=coefficients is not None,
        BLOCK_N=1024,
    )
    if isinstance(scale, Tensor):
        scales.mul_(scale)
    terms = RowTerms(target, negatives.threshold, scales)
    if shift is not None:
        terms = terms._replace(shift=shifts, factor=factors)
    return terms if coefficients is None else terms._replace(coefficient=of_target)
