"""The class-chunk algorithm's kernels: from scores of one panel of classes to exponentials, row sums and maxima.

The scores are ``S = X·Wᵀ``.

``PRODUCT``: the kernel multiplies 16-bit operands itself and S never leaves the registers, because writing and
reading an fp32 S would cost 8 bytes a logit of L2 traffic beside the 4 of the exponentials (1.5 ps a logit and pass,
against 1.3 for the product itself). Otherwise a library product in fp32 (tf32, if PyTorch is told so) or fp64 has put S
into the output, or into memory of its own if a class has several centers, because a column then needs its
neighbors' scores.

The target is masked in the tile; exponentials are not shifted unless a shift is given, and so need bf16's range, not
fp16's. Each block adds to its own row of partial sums, so that no atomics are needed and a result never depends on
the order of blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import to
from .negatives import change_numbers, changed_cosine, is_beaten
from .tiles import is_negative, is_other, needs_masks, target_column, tile_place, tile_scores, with_target


@triton.jit(do_not_specialize=["num_rows", "num_tiles_n", "partial_stride", "first_class", "num_classes"])
def class_stats_kernel(
    x_ptr,  # (N, WIDTH)
    w_ptr,  # (P, WIDTH) of the panel; AS_STORED: (C, WIDTH), all centers
    inverse_ptr,  # (P,); AS_STORED: (num_inverses,), a multiple of P
    row_inverse_ptr,  # (N,)
    target_ptr,  # (N,) int64
    scale_ptr,  # (N,)
    shift_ptr,  # (N,)
    threshold_ptr,  # (N,); None: no cosine is changed
    change_ptr,  # (3,) fp64 coefficients of the change
    scores_ptr,  # (N, P), rows scores_stride apart; not read if the kernel multiplies
    exponentials_ptr,  # (N, P), rows as far apart
    total_ptr,  # (tiles of P, N): added to
    maximum_ptr,  # (tiles of P, N): raised
    class_count_ptr,  # () int64: classes over all panels, known to the device alone; or None
    num_rows,
    scores_stride,
    num_tiles_n,
    partial_stride,
    num_inverses,
    first_class,  # of the panel
    num_classes,  # of the panel, without its padding
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
    AS_STORED: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    MAX_ONLY: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum a tile's exponentials and take its maxima, and store the exponentials if asked."""
    tile_c, first_n, first_c = tile_place(num_tiles_n, BLOCK_N, BLOCK_C)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_n = tl.arange(0, BLOCK_N) < (num_rows - first_n).to(tl.int32)
    # A score hidden as -inf gives an exponential of 0 if only a positive scale multiplies it. A learned scale may have
    # any sign, and comes with a shift. A changed cosine is a product with an inverse norm, which may be 0.
    MASKED_EVERYWHERE: tl.constexpr = HAS_SHIFT or threshold_ptr is not None or SUB_CENTERS > 1
    last_w = num_classes - 1 - first_c
    if AS_STORED:
        w_ptr += first_class.to(tl.int64) * WIDTH
        inverse_ptr += first_class % num_inverses
    if class_count_ptr is not None:
        num_classes = tl.minimum(num_classes, (tl.load(class_count_ptr) - first_class).to(tl.int32))
    target = target_column(target_ptr, offs_n, mask_n, first_class)
    is_masked = needs_masks(target, first_c, num_classes, BLOCK_C)
    # One 64-bit address for the tile, 32-bit offsets within it: half the registers.
    row_offs = tl.arange(0, BLOCK_N)[:, None] * scores_stride
    tile_offs = row_offs + tl.arange(0, BLOCK_C)[None, :]
    scores_ptr += first_n * scores_stride
    scores = tile_scores(
        x_ptr + first_n * WIDTH,
        w_ptr + first_c.to(tl.int64) * WIDTH,
        last_w,
        scores_ptr + first_c + tile_offs,
        mask_n,
        WIDTH,
        PRODUCT,
        AS_STORED,
        BLOCK_N,
        BLOCK_C,
        BLOCK_D,
    )
    inverse = tl.load(inverse_ptr + offs_c)
    scores = scores * inverse[None, :]  # now the cosines, but for the embedding's factor
    if MASKED_EVERYWHERE:
        target = target_column(target_ptr, offs_n, mask_n, first_class)
        negative = is_negative(offs_c, target, num_classes, SUB_CENTERS)
        if SUB_CENTERS > 1:
            negative = negative & ~is_beaten(scores, scores_ptr + row_offs, inverse_ptr, offs_c, mask_n, SUB_CENTERS)
    elif is_masked:
        scores = tl.where(is_negative(offs_c, target, num_classes, SUB_CENTERS), scores, float("-inf"))
    value = scores
    if threshold_ptr is not None:
        cosine = scores * tl.load(row_inverse_ptr + offs_n, mask_n, 0.0)[:, None]
        threshold = tl.load(threshold_ptr + offs_n, mask_n, 0.0)
        a, b, d = change_numbers(change_ptr, cosine.dtype)
        value, slope = changed_cosine(cosine, threshold[:, None], a, b, d)

    partial = tile_c.to(tl.int64) * partial_stride + offs_n
    # The statistics want the greatest cosine, the shift the greatest value.
    greatest = value if MAX_ONLY else scores
    if MASKED_EVERYWHERE:
        greatest = tl.where(negative, greatest, float("-inf"))
    maximum = tl.max(greatest, 1)
    maximum = tl.maximum(maximum, tl.load(maximum_ptr + partial, mask_n, 0.0))
    tl.store(maximum_ptr + partial, maximum, mask_n)
    if not MAX_ONLY:
        exponents = value * tl.load(scale_ptr + offs_n, mask_n, 0.0)[:, None]
        if HAS_SHIFT:
            exponents -= tl.load(shift_ptr + offs_n, mask_n, 0.0)[:, None]
        exponentials = tl.exp2(exponents)
        if MASKED_EVERYWHERE:
            exponentials = tl.where(negative, exponentials, 0.0)
        total = tl.load(total_ptr + partial, mask_n, 0.0) + tl.sum(exponentials, 1)
        tl.store(total_ptr + partial, total, mask_n)
        if STORE:
            # The second product takes the centers as they are stored: their inverse norms go here.
            exponentials = exponentials * inverse[None, :]
            if threshold_ptr is not None:
                exponentials = exponentials * slope
            tile_ptr = exponentials_ptr + first_n * scores_stride + first_c
            exponentials = to(exponentials, exponentials_ptr.dtype.element_ty)
            tl.store(tile_ptr + tile_offs, exponentials, mask_n[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_tiles_n", "first_class", "num_classes"])
def class_gradient_kernel(
    x_ptr,  # (N, WIDTH)
    w_ptr,  # (P, WIDTH) of the panel; AS_STORED: (C, WIDTH), all centers
    inverse_ptr,  # (P,); AS_STORED: (num_inverses,), a multiple of P
    row_inverse_ptr,  # (N,)
    target_ptr,  # (N,) int64
    scale_ptr,  # (N,)
    shift_ptr,  # (N,)
    factor_ptr,  # (N,)
    coefficient_ptr,  # (N,)
    threshold_ptr,  # (N,); None: no cosine is changed
    change_ptr,  # (3,) fp64 coefficients of the change
    scores_ptr,  # (N, P), rows scores_stride apart; not read if the kernel multiplies
    gradient_ptr,  # (N, P), rows as far apart
    num_rows,
    scores_stride,
    num_tiles_n,
    num_inverses,
    first_class,
    num_classes,
    WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr,
    AS_STORED: tl.constexpr,
    SUB_CENTERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store a tile's derivatives by the cosines."""
    _, first_n, first_c = tile_place(num_tiles_n, BLOCK_N, BLOCK_C)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_n = tl.arange(0, BLOCK_N) < (num_rows - first_n).to(tl.int32)
    # The rule of the kernel above, but for the shift: this kernel hides no scores.
    MASKED_EVERYWHERE: tl.constexpr = threshold_ptr is not None or SUB_CENTERS > 1
    is_masked = needs_masks(target_column(target_ptr, offs_n, mask_n, first_class), first_c, num_classes, BLOCK_C)
    last_w = num_classes - 1 - first_c
    if AS_STORED:
        w_ptr += first_class.to(tl.int64) * WIDTH
        inverse_ptr += first_class % num_inverses
    row_offs = tl.arange(0, BLOCK_N)[:, None] * scores_stride
    tile_offs = row_offs + tl.arange(0, BLOCK_C)[None, :]
    scores_ptr += first_n * scores_stride
    scores = tile_scores(
        x_ptr + first_n * WIDTH,
        w_ptr + first_c.to(tl.int64) * WIDTH,
        last_w,
        scores_ptr + first_c + tile_offs,
        mask_n,
        WIDTH,
        PRODUCT,
        AS_STORED,
        BLOCK_N,
        BLOCK_C,
        BLOCK_D,
    )
    scores = scores * tl.load(inverse_ptr + offs_c)[None, :]
    scale = tl.load(scale_ptr + offs_n, mask_n, 0.0)
    shift = tl.load(shift_ptr + offs_n, mask_n, 0.0)
    factor = tl.load(factor_ptr + offs_n, mask_n, 0.0)
    if MASKED_EVERYWHERE:
        coefficient = tl.load(coefficient_ptr + offs_n, mask_n, 0.0)
        target = target_column(target_ptr, offs_n, mask_n, first_class)
    value = scores
    if threshold_ptr is not None:
        cosine = scores * tl.load(row_inverse_ptr + offs_n, mask_n, 0.0)[:, None]
        threshold = tl.load(threshold_ptr + offs_n, mask_n, 0.0)
        a, b, d = change_numbers(change_ptr, cosine.dtype)
        value, slope = changed_cosine(cosine, threshold[:, None], a, b, d)
    gradient = factor[:, None] * tl.exp2(value * scale[:, None] - shift[:, None])
    if threshold_ptr is not None:
        gradient = gradient * slope
    if SUB_CENTERS > 1:
        beaten = is_beaten(scores, scores_ptr + row_offs, inverse_ptr, offs_c, mask_n, SUB_CENTERS)
        gradient = tl.where(is_other(offs_c, target, SUB_CENTERS) & ~beaten, gradient, 0.0)
    if MASKED_EVERYWHERE:
        gradient = with_target(gradient, offs_c, target, coefficient, num_classes)
    elif is_masked:
        coefficient = tl.load(coefficient_ptr + offs_n, mask_n, 0.0)
        target = target_column(target_ptr, offs_n, mask_n, first_class)
        gradient = with_target(gradient, offs_c, target, coefficient, num_classes)
    tile_ptr = gradient_ptr + first_n * scores_stride + first_c
    tl.store(tile_ptr + tile_offs, to(gradient, gradient_ptr.dtype.element_ty), mask_n[:, None])
