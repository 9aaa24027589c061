"""Kernels of O(rows·D), bound by memory, before and after the passes over the classes.

They make the target cosines, the embedding gradient, and the projection through the rows' normalization. Offsets of
rows are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_arcface.base.dtypes import compute_dtype

from .common import Repeated, divide, floored, launch, reciprocal, row_blocks, row_norms, to_gradient


@triton.jit(do_not_specialize=["num_rows"])
def target_cosine_kernel(
    x_ptr,  # (N, D), any strides
    x_stride_n,
    x_stride_d,
    w_ptr,  # (C, D), any strides
    w_stride_c,
    w_stride_d,
    target_ptr,  # (N,) int64
    cosine_ptr,  # (N,)
    num_rows,
    D,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the target cosines of a block of rows."""
    COMPUTE: tl.constexpr = cosine_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    target = tl.load(target_ptr + offs_n, mask_n, -1)
    present = target >= 0
    x_ptr += offs_n[:, None] * x_stride_n
    w_ptr += target[:, None] * w_stride_c
    x_norm, x_power = row_norms(x_ptr, x_stride_d, present, D, COMPUTE, WIDTH, BLOCK_N, BLOCK_D)
    w_norm, w_power = row_norms(w_ptr, w_stride_d, present, D, COMPUTE, WIDTH, BLOCK_N, BLOCK_D)
    x_factor, w_factor = reciprocal(floored(x_norm, x_power)), reciprocal(floored(w_norm, w_power))
    cosine = tl.zeros([BLOCK_N], COMPUTE)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = present[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_d[None, :] * x_stride_d, mask, 0.0).to(COMPUTE)
        w = tl.load(w_ptr + offs_d[None, :] * w_stride_d, mask, 0.0).to(COMPUTE)
        x = x * x_power[:, None] * x_factor[:, None]
        cosine += tl.sum(x * (w * w_power[:, None] * w_factor[:, None]), 1)
    # Comparisons, not minimum and maximum: those would turn a NaN into a bound.
    cosine = tl.where(cosine > 1, 1.0, tl.where(cosine < -1, -1.0, cosine))
    cosine = tl.where(target < -1, float("nan"), cosine)
    tl.store(cosine_ptr + offs_n, cosine.to(COMPUTE), mask_n)


def target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.target_cosine`."""
    num_rows, width = embeddings.shape
    cosine = torch.empty(num_rows, dtype=compute_dtype(embeddings, weight), device=embeddings.device)
    grid, blocks = row_blocks(num_rows, width)
    launch(
        target_cosine_kernel,
        grid,
        embeddings,
        *embeddings.stride(),
        weight,
        *weight.stride(),
        target.contiguous(),
        cosine,
        num_rows,
        width,
        **blocks,
    )
    return cosine


@triton.jit(do_not_specialize=["num_rows"])
def unit_embedding_grad_kernel(
    w_ptr,  # (C, D), any strides
    stride_c,
    stride_d,
    target_ptr,  # (N,) int64
    mean_ptr,  # (N, D)
    negative_ptr,  # (N,)
    coefficient_ptr,  # (N,)
    out_ptr,  # (N, D)
    num_rows,
    D,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient by a block of unit embeddings."""
    COMPUTE: tl.constexpr = out_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    target = tl.load(target_ptr + offs_n, mask_n, -1)
    present = target >= 0
    w_ptr += target[:, None] * stride_c
    norm, power = row_norms(w_ptr, stride_d, present, D, COMPUTE, WIDTH, BLOCK_N, BLOCK_D)
    negative = tl.load(negative_ptr + offs_n, mask_n, 0.0)
    of_target = divide(tl.load(coefficient_ptr + offs_n, mask_n, 0.0), floored(norm, power))
    of_target = tl.where(present, of_target, 0.0)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = (offs_d < D)[None, :]
        w = tl.load(w_ptr + offs_d[None, :] * stride_d, present[:, None] & mask_d, 0.0).to(COMPUTE)
        w = w * power[:, None]
        offs = offs_n[:, None] * D + offs_d[None, :]
        mean = tl.load(mean_ptr + offs, mask_n[:, None] & mask_d, 0.0)
        tl.store(out_ptr + offs, negative[:, None] * mean + of_target[:, None] * w, mask_n[:, None] & mask_d)


def unit_embedding_grad(
    weight: Tensor, target: Tensor, mean_center: Tensor, negative_coefficient: Tensor, target_coefficient: Tensor
) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.unit_embedding_grad`."""
    num_rows, width = mean_center.shape
    mean_center = mean_center.contiguous()
    out = torch.empty_like(mean_center)
    grid, blocks = row_blocks(num_rows, width)
    launch(
        unit_embedding_grad_kernel,
        grid,
        weight,
        *weight.stride(),
        target.contiguous(),
        mean_center,
        negative_coefficient.to(out.dtype).contiguous(),
        target_coefficient.to(out.dtype).contiguous(),
        out,
        num_rows,
        width,
        **blocks,
    )
    return out


@triton.jit
def projection(
    rows_ptr,  # (BLOCK_N, 1) addresses of rows
    stride_d,
    d_unit_ptr,  # (BLOCK_N, 1) addresses of the gradients by their unit vectors
    mask_n,
    D,
    COMPUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return p, f, a and s, (BLOCK_N,) each.

    With the unit row u = row·p·f, ``(d_unit - u·a)·f·p`` is the gradient by a row (normalize.unit_gradient). p is a
    power of two. s is true if the row is shorter than ε.
    """
    norm, power = row_norms(rows_ptr, stride_d, mask_n, D, COMPUTE, WIDTH, BLOCK_N, BLOCK_D)
    is_short = norm < floored(norm, power)
    factor = reciprocal(floored(norm, power))
    along = tl.zeros([BLOCK_N], COMPUTE)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        row = tl.load(rows_ptr + offs_d[None, :] * stride_d, mask, 0.0).to(COMPUTE)
        d_unit = tl.load(d_unit_ptr + offs_d[None, :], mask, 0.0)
        along += tl.sum((row * power[:, None] * factor[:, None]) * d_unit, 1)
    # A row shorter than ε is divided by that constant: its norm has no derivative.
    return power, factor, tl.where(is_short, 0.0, along), is_short


@triton.jit
def by_row(d_unit, row, power, factor, along):
    """Return the gradient (BLOCK_N, BLOCK_D) by columns of the rows, from :func:`projection`'s results."""
    unit = row * power[:, None] * factor[:, None]
    return (d_unit - unit * along[:, None]) * factor[:, None] * power[:, None]


@triton.jit(do_not_specialize=["first", "num_rows"])
def project_kernel(
    d_unit_ptr,  # (R, >= D), rows d_unit_stride apart
    d_unit_stride,
    row_ptr,  # (>= first + R, D), any strides
    stride_n,
    stride_d,
    index_ptr,  # (>= first + R,) int64: which of the rows; or None: in order
    out_ptr,  # (>= first + R, D), any strides
    out_stride_n,
    out_stride_d,
    D,
    first,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Project a block of gradients by unit rows to gradients by the rows."""
    COMPUTE: tl.constexpr = d_unit_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    rows = first + offs_n
    place = rows
    if index_ptr is not None:
        place = tl.load(index_ptr + rows, mask_n, 0)
    row_ptr += place[:, None] * stride_n
    d_unit_ptr += offs_n[:, None] * d_unit_stride
    power, factor, along, is_short = projection(
        row_ptr, stride_d, d_unit_ptr, mask_n, D, COMPUTE, WIDTH, BLOCK_N, BLOCK_D
    )
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        row = tl.load(row_ptr + offs_d[None, :] * stride_d, mask, 0.0).to(COMPUTE)
        d_unit = tl.load(d_unit_ptr + offs_d[None, :], mask, 0.0)
        result = by_row(d_unit, row, power, factor, along)
        out_offs = rows[:, None] * out_stride_n + offs_d[None, :] * out_stride_d
        tl.store(out_ptr + out_offs, to_gradient(result, is_short[:, None], out_ptr.dtype.element_ty), mask)


def projections(d_unit: Tensor, rows: Tensor, out: Tensor, index: Tensor | None = None) -> Repeated:
    """Return launches that write the gradient by rows (C, D) into ``out``, from d_unit (R, >= D), by unit vectors.

    They take the first row that d_unit is of, and their number. With ``index`` (K,) int64 these are the rows of that
    index, and ``out`` is (K, D). The result is
    :func:`fused_arcface.base.normalize.unit_gradient`'s.
    """
    width = rows.shape[1]
    grid, blocks = row_blocks(d_unit.shape[0], width)
    return Repeated(
        project_kernel,
        grid,
        d_unit,
        d_unit.stride(0),
        rows,
        *rows.stride(),
        index,
        out,
        *out.stride(),
        width,
        **blocks,
    )


def embedding_grad(d_unit: Tensor, embeddings: Tensor) -> Tensor:
    """Implement :func:`fused_arcface.backends.torch.embedding_grad`."""
    d_embeddings = torch.empty_like(embeddings)
    projections(d_unit.contiguous(), embeddings, d_embeddings).once(0, embeddings.shape[0])
    return d_embeddings
