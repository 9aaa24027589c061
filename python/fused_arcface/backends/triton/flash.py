"""The flash passes: one kernel takes both products, so that nothing of size N×C is stored at all.

Softmax is attention with K = V = W. Forward: a block owns ``OUTER`` embeddings and their sum of centers, and streams
the classes of its range past them. Backward: a block owns ``OUTER`` classes and their gradient, streams the batch
past them, and projects and writes dW itself. Exponents need no running maximum (autograd.py), so an accumulator is
never rescaled. bf16 only, and only widths that configs.flash_config has tiles for.

Width is a power of two here, and the panels and the batch are padded to whole tiles with rows of zeros: no load needs
a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_arcface.engine.terms import Negatives

from .common import Repeated, dot, to, to_gradient
from .configs import (
    FLASH_PANEL,
    FLASH_STORED_PANEL,
    FlashConfig,
    device_limits,
    flash_config,
    flash_width,
    panel_classes,
    row_splits,
)
from .negatives import change_numbers, changed_cosine
from .panels import Centers, Panel
from .rows import RowTerms, UnitRows


@triton.jit
def _operand(x, num_rows, SPLIT_SCORES: tl.constexpr):
    """Return x in bf16, the second product's operand.

    Triton gives all warps to the rows of a product whose result reaches another product. Beside 64 rows two warpgroups
    would then compute the same scores. It does not look for the other product past a branch, and this one, which is
    always taken, makes the warps share the columns.
    """
    if SPLIT_SCORES:
        return to(x, tl.bfloat16) if num_rows > 0 else tl.zeros(x.shape, tl.bfloat16)
    return to(x, tl.bfloat16)


@triton.jit(
    do_not_specialize=["num_rows", "num_padded", "tiles_per_split", "num_tiles_c", "first_class", "num_classes"]
)
def flash_stats_kernel(
    x_ptr,  # (N padded, WIDTH)
    w_ptr,  # (P, WIDTH)
    inverse_ptr,  # (P,)
    row_inverse_ptr,  # (N,)
    target_ptr,  # (N,) int64
    scale_ptr,  # (N,)
    shift_ptr,  # (N,)
    threshold_ptr,  # (N,); None: no cosine is changed
    change_ptr,  # (3,) fp64 coefficients of the change
    center_sum_ptr,  # (splits, N padded, WIDTH): added to
    total_ptr,  # (splits, N padded): added to
    maximum_ptr,  # (splits, N padded): raised
    class_count_ptr,  # () int64: classes over all panels, known to the device alone; or None
    num_rows,
    num_padded,
    tiles_per_split,
    num_tiles_c,
    first_class,  # of the panel
    num_classes,  # of the panel, without its padding
    WIDTH: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    WITH_SUM: tl.constexpr,
    SPLIT_SCORES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum exponentials and the centers weighted by them over a range of classes."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    split = tl.program_id(1)
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    if class_count_ptr is not None:
        num_classes = tl.minimum(num_classes, (tl.load(class_count_ptr) - first_class).to(tl.int32))
    # Within a tile, and within a panel, offsets fit 32 bits.
    x_offs = tl.arange(0, BLOCK_N)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    w_offs = tl.arange(0, BLOCK_C)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + first_row * WIDTH + x_offs)
    target = (tl.load(target_ptr + offs_n, mask_n, -1) - first_class).to(tl.int32)
    scale = tl.load(scale_ptr + offs_n, mask_n, 0.0)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr + offs_n, mask_n, 0.0)
    if threshold_ptr is not None:
        row_inverse = tl.load(row_inverse_ptr + offs_n, mask_n, 0.0)
        threshold = tl.load(threshold_ptr + offs_n, mask_n, 0.0)
        a, b, d = change_numbers(change_ptr, tl.float32)

    total = tl.zeros([BLOCK_N], tl.float32)
    maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if WITH_SUM:
        center_sum = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles_c)
    for tile in range(first_tile, last_tile):
        offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        w = tl.load(w_ptr + tile * (BLOCK_C * WIDTH) + w_offs)
        inverse = tl.load(inverse_ptr + offs_c)
        scores = dot(x, tl.trans(w), tl.zeros([BLOCK_N, BLOCK_C], tl.float32)) * inverse[None, :]
        negative = (offs_c < num_classes)[None, :] & (offs_c[None, :] != target[:, None])
        maximum = tl.maximum(maximum, tl.max(tl.where(negative, scores, float("-inf")), 1))
        value = scores
        if threshold_ptr is not None:
            value, slope = changed_cosine(scores * row_inverse[:, None], threshold[:, None], a, b, d)
        exponents = value * scale[:, None]
        if HAS_SHIFT:
            exponents -= shift[:, None]
        exponentials = tl.where(negative, tl.exp2(exponents), 0.0)
        total += tl.sum(exponentials, 1)
        if WITH_SUM:
            weights = exponentials * inverse[None, :]
            if threshold_ptr is not None:
                weights = weights * slope
            center_sum = dot(_operand(weights, num_rows, SPLIT_SCORES), w, center_sum)

    first_partial = split.to(tl.int64) * num_padded + first_row
    partial = first_partial + tl.arange(0, BLOCK_N)
    tl.store(total_ptr + partial, total + tl.load(total_ptr + partial))
    tl.store(maximum_ptr + partial, tl.maximum(maximum, tl.load(maximum_ptr + partial)))
    if WITH_SUM:
        center_sum_ptrs = center_sum_ptr + first_partial * WIDTH + x_offs
        tl.store(center_sum_ptrs, center_sum + tl.load(center_sum_ptrs))


@triton.jit(do_not_specialize=["num_rows", "num_tiles_n", "first_class", "num_classes"])
def flash_gradient_kernel(
    x_ptr,  # (N padded, WIDTH)
    w_ptr,  # (P, WIDTH) of the panel; AS_STORED: (C, WIDTH), all centers
    inverse_ptr,  # (P,); AS_STORED: (num_inverses,), a multiple of P
    reciprocal_ptr,  # (P,); AS_STORED: not read, the inverse is the reciprocal
    row_inverse_ptr,  # (N,)
    target_ptr,  # (N,) int64
    scale_ptr,  # (N,)
    shift_ptr,  # (N,)
    factor_ptr,  # (N,)
    coefficient_ptr,  # (N,)
    threshold_ptr,  # (N,); None: no cosine is changed
    change_ptr,  # (3,) fp64 coefficients of the change
    out_ptr,  # any strides: (C, D) the gradient by the centers, or (P, D) that by the panel's unit centers
    stride_c,
    stride_d,
    num_rows,
    num_tiles_n,
    D,
    num_inverses,
    first_class,
    num_classes,
    WIDTH: tl.constexpr,
    AS_STORED: tl.constexpr,
    PROJECT: tl.constexpr,
    SPLIT_SCORES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the gradient by a block of unit centers over the batch."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tl.arange(0, WIDTH)
    # Within a tile, and within a panel, offsets fit 32 bits.
    x_offs = tl.arange(0, BLOCK_N)[:, None] * WIDTH + offs_d[None, :]
    rows_w = offs_c
    if AS_STORED:
        w_ptr += first_class.to(tl.int64) * WIDTH
        inverse_ptr += first_class % num_inverses
        rows_w = tl.minimum(rows_w, num_classes - 1)  # the last one stands in for those that would follow
    w_ptrs = w_ptr + rows_w[:, None] * WIDTH + offs_d[None, :]
    w = tl.load(w_ptrs)
    inverse = tl.load(inverse_ptr + offs_c)

    d_unit = tl.zeros([BLOCK_C, WIDTH], tl.float32)
    is_short = tl.zeros([BLOCK_C], tl.int1)
    if threshold_ptr is not None:
        a, b, d = change_numbers(change_ptr, tl.float32)
    for tile in range(0, num_tiles_n):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n <= num_rows - 1  # with "< num_rows" Triton 3.6 reloads one more register in this loop
        x = tl.load(x_ptr + x_offs)
        x_ptr += BLOCK_N * WIDTH
        scores = dot(w, tl.trans(x), tl.zeros([BLOCK_C, BLOCK_N], tl.float32)) * inverse[:, None]
        target = (tl.load(target_ptr + offs_n, mask_n, -1) - first_class).to(tl.int32)
        scale = tl.load(scale_ptr + offs_n, mask_n, 0.0)
        shift = tl.load(shift_ptr + offs_n, mask_n, 0.0)
        factor = tl.load(factor_ptr + offs_n, mask_n, 0.0)
        coefficient = tl.load(coefficient_ptr + offs_n, mask_n, 0.0)
        value = scores
        if threshold_ptr is not None:
            row_inverse = tl.load(row_inverse_ptr + offs_n, mask_n, 0.0)
            threshold = tl.load(threshold_ptr + offs_n, mask_n, 0.0)
            value, slope = changed_cosine(scores * row_inverse[None, :], threshold[None, :], a, b, d)
        gradient = factor[None, :] * tl.exp2(value * scale[None, :] - shift[None, :])
        if threshold_ptr is not None:
            gradient = gradient * slope
        # Padded rows need no mask: their factor is 0, and their target is in no panel.
        gradient = tl.where(offs_c[:, None] == target[None, :], coefficient[None, :], gradient)
        d_unit = dot(_operand(gradient, num_rows, SPLIT_SCORES), x, d_unit)

    if PROJECT:
        reciprocal = inverse
        if not AS_STORED:
            reciprocal = tl.load(reciprocal_ptr + offs_c)
        # A center shorter than 1e-12 is divided by that constant: its norm has no derivative.
        is_short = reciprocal >= 1e12
        w = tl.load(w_ptrs).to(tl.float32) * inverse[:, None]
        along = tl.where(is_short, 0.0, tl.sum(d_unit * w, 1))
        d_unit = (d_unit - w * along[:, None]) * reciprocal[:, None]
    mask = (offs_c < num_classes)[:, None] & (offs_d < D)[None, :]
    rows = offs_c.to(tl.int64)
    if PROJECT:
        rows += first_class
    out_ptrs = out_ptr + rows[:, None] * stride_c + offs_d.to(tl.int64)[None, :] * stride_d
    tl.store(out_ptrs, to_gradient(d_unit, is_short[:, None], out_ptr.dtype.element_ty), mask)


def _config(width: int, device: torch.device) -> FlashConfig:
    config = flash_config(width, device_limits(device)[0])
    assert config is not None, "configs.pick chose the flash passes for tiles that do not fit"
    return config


def padded_shape(N: int, D: int, device: torch.device) -> tuple[int, int]:
    """Return the rows and columns of the embeddings' copy: whole tiles."""
    outer = _config(flash_width(D), device).OUTER
    return -(-N // outer) * outer, flash_width(D)


def _panel(x: UnitRows, centers: Centers, tile: int, as_stored: bool = False, has_buffer: bool = True) -> Panel:
    """Return a panel of whole tiles; ``has_buffer``: something as large as its centers is kept for a turn."""
    num_rows, width = x.values.shape
    budget, row_bytes = (FLASH_PANEL, 2 * width) if has_buffer else (FLASH_STORED_PANEL, 4)
    classes = panel_classes(budget, num_rows, centers.count, row_bytes, 0, tile)
    return Panel.create(centers, classes, x, as_stored)


def class_stats(
    x: UnitRows,
    centers: Centers,
    terms: RowTerms,
    negatives: Negatives,
    with_center_sum: bool,
    class_count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the results of chunks.class_stats. x and the results have padded rows, the terms N."""
    num_padded, width = x.values.shape
    device = x.values.device
    config = _config(width, device)
    panel = _panel(x, centers, config.OUTER)
    num_tiles_c = panel.classes // config.INNER
    split_bytes = 4 * num_padded * width if with_center_sum else 0
    splits = row_splits(num_padded // config.OUTER, num_tiles_c, split_bytes, device_limits(device)[1])
    total = torch.zeros(splits, num_padded, dtype=torch.float32, device=device)
    maximum = torch.full_like(total, -torch.inf)
    shape = (splits, num_padded, width) if with_center_sum else (0,)
    center_sum = torch.zeros(shape, dtype=torch.float32, device=device)
    stats = Repeated(
        flash_stats_kernel,
        (num_padded // config.OUTER, splits),
        x.values,
        panel.rows.values,
        panel.rows.inverse,
        x.inverse,
        terms.target,
        terms.scale,
        terms.scale if terms.shift is None else terms.shift,
        terms.threshold,
        negatives.coefficients,
        center_sum,
        total,
        maximum,
        class_count,
        terms.target.shape[0],
        num_padded,
        triton.cdiv(num_tiles_c, splits),
        num_tiles_c,
        WIDTH=width,
        HAS_SHIFT=terms.shift is not None,
        WITH_SUM=with_center_sum,
        SPLIT_SCORES=config.split_scores,
        BLOCK_N=config.OUTER,
        BLOCK_C=config.INNER,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    panel.run(stats)
    return total, maximum, center_sum.sum(0) if with_center_sum else None


def weight_grad(x: UnitRows, centers: Centers, terms: RowTerms, negatives: Negatives, out: Tensor) -> None:
    """Do what chunks.weight_grad does. x has padded rows, the terms N."""
    as_stored = centers.are_operands(x)
    panel = _panel(x, centers, _config(x.values.shape[1], x.values.device).OUTER, as_stored, has_buffer=not as_stored)
    panel.run(_gradient(x, panel, terms, negatives, out, project=True))


def unit_gradients(
    x: UnitRows, centers: Centers, terms: RowTerms, negatives: Negatives, finish: Callable[[Tensor], Repeated]
) -> None:
    """Do what chunks.unit_gradients does. x has padded rows, the terms N."""
    width = x.values.shape[1]
    panel = _panel(x, centers, _config(width, x.values.device).OUTER, centers.are_operands(x))
    d_unit = x.inverse.new_empty(panel.classes, width)
    panel.run(_gradient(x, panel, terms, negatives, d_unit, project=False), finish(d_unit))


def _gradient(x: UnitRows, panel: Panel, terms: RowTerms, negatives: Negatives, out: Tensor, project: bool) -> Repeated:
    """Return launches that take the first class of a panel and their number."""
    num_padded, width = x.values.shape
    config = _config(width, x.values.device)
    return Repeated(
        flash_gradient_kernel,
        (panel.classes // config.OUTER,),
        x.values,
        panel.rows.values,
        panel.rows.inverse,
        panel.rows.reciprocal,
        x.inverse,
        terms.target,
        terms.scale,
        terms.shift,
        terms.factor,
        terms.coefficient,
        terms.threshold,
        negatives.coefficients,
        out,
        *out.stride(),
        terms.target.shape[0],
        num_padded // config.INNER,
        out.shape[1],
        panel.rows.inverse.shape[0],
        WIDTH=width,
        AS_STORED=panel.as_stored,
        PROJECT=project,
        SPLIT_SCORES=config.split_scores,
        BLOCK_C=config.OUTER,
        BLOCK_N=config.INNER,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
