"""The step of SGD on the class centers, made where a panel's gradient by the unit centers has just been summed.

It projects the gradient, adds decay and momentum, and writes center and momentum back. No gradient larger than a panel
exists.

csrc/cpu/center_sgd.h in Triton; fused_arcface.base.keyed_random defines the random bits, and a test compares the two.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl
from torch import Tensor

from fused_arcface.engine.terms import MOMENTUM_BLOCK, CenterStep

from .common import Repeated, divide, reciprocal, row_blocks, to
from .keyed_random import fold, rounding_bits
from .targets import by_row, projection


@triton.jit
def _stored(x, bits, dtype: tl.constexpr):
    """Return x in dtype, rounded stochastically by 16 bits if that is bf16."""
    if dtype == tl.bfloat16:
        word = x.to(tl.float32).to(tl.uint32, bitcast=True)
        finite = (word & 0x7F800000) != 0x7F800000
        word = tl.where(finite, word + bits, word)
        return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return to(x, dtype)


@triton.jit
def _spread(units, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MOMENTUM_BLOCK: tl.constexpr):
    """Return (BLOCK_N, BLOCK_D): each of the units (BLOCK_N, BLOCK_D / MOMENTUM_BLOCK) over its columns."""
    shape: tl.constexpr = (BLOCK_N, BLOCK_D // MOMENTUM_BLOCK, MOMENTUM_BLOCK)
    return tl.reshape(tl.broadcast_to(units[:, :, None], shape), (BLOCK_N, BLOCK_D))


@triton.jit
def _float64(bits):
    """Return the number with these bits: a Python float reaches a kernel as fp32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["lr", "momentum", "weight_decay", "rounding_key", "class_start", "first", "num_rows"])
def update_centers_kernel(
    d_unit_ptr,  # (R, >= D), rows d_unit_stride apart
    d_unit_stride,
    classes_ptr,  # (>= first + R,) int64 rows of weight, num_classes for none; or None: all, in order
    weight_ptr,  # (C, D), any strides
    stride_c,
    stride_d,
    momentum_ptr,  # (C, D), or None
    units_ptr,  # (C, ceil(D / 64)) units of an int8 momentum, or None
    active_ptr,  # () bool: whether to change anything
    lr,  # these three as bits of fp64
    momentum,
    weight_decay,
    rounding_key,
    class_start,  # global id of weight's first row
    ids_ptr,  # (C,) int64 global ids of weight's rows, or None: those from class_start on
    num_classes,
    D,
    num_units,
    first,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOMENTUM_BLOCK: tl.constexpr,
):
    """Make one step of SGD on a block of the class centers from ``first`` on."""
    COMPUTE: tl.constexpr = d_unit_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # No scalar bool spread over the block: Triton's interpreter makes integers of it, and since 3.9 refuses such masks.
    mask_n = offs_n < tl.where(tl.load(active_ptr), num_rows, 0)
    rows = first + offs_n
    if classes_ptr is not None:
        rows = tl.load(classes_ptr + rows, mask_n, 0)
        mask_n = mask_n & (rows < num_classes)
    weight_ptr += rows[:, None] * stride_c
    d_unit_ptr += offs_n[:, None] * d_unit_stride
    power, factor, along, _ = projection(weight_ptr, stride_d, d_unit_ptr, mask_n, D, COMPUTE, WIDTH, BLOCK_N, BLOCK_D)
    ids = rows + class_start
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + rows, mask_n, 0)
    row_keys = fold(rounding_key.to(tl.uint64), ids.to(tl.uint64))

    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        w_ptrs = weight_ptr + offs_d[None, :] * stride_d
        w = tl.load(w_ptrs, mask, 0.0).to(COMPUTE)
        d_unit = tl.load(d_unit_ptr + offs_d[None, :], mask, 0.0)
        gradient = by_row(d_unit, w, power, factor, along)
        velocity = gradient + _float64(weight_decay).to(COMPUTE) * w
        bits = rounding_bits(row_keys, offs_d)
        if momentum_ptr is not None:
            momentum_ptrs = momentum_ptr + rows[:, None] * D + offs_d[None, :]
            old = tl.load(momentum_ptrs, mask, 0).to(COMPUTE)
            if units_ptr is not None:
                offs_u = start // MOMENTUM_BLOCK + tl.arange(0, BLOCK_D // MOMENTUM_BLOCK)
                units_ptrs = units_ptr + rows[:, None] * num_units + offs_u[None, :]
                mask_u = mask_n[:, None] & (offs_u < num_units)[None, :]
                old *= _spread(tl.load(units_ptrs, mask_u, 0.0).to(COMPUTE), BLOCK_N, BLOCK_D, MOMENTUM_BLOCK)
            velocity += _float64(momentum).to(COMPUTE) * old
            if units_ptr is not None:
                by_unit = tl.reshape(tl.abs(velocity), (BLOCK_N, BLOCK_D // MOMENTUM_BLOCK, MOMENTUM_BLOCK))
                largest = tl.max(by_unit, 2)
                # Below 1e-35 the unit's inverse would overflow.
                full = tl.full(largest.shape, 127.0, tl.float32)
                units = tl.where(largest > 1e-35, divide(largest.to(tl.float32), full), 0.0)
                tl.store(units_ptrs, units, mask_u)
                inverse = tl.where(units > 0, reciprocal(units.to(COMPUTE)), 0.0)
                uniform = ((bits >> 16).to(tl.int32).to(COMPUTE) + 0.5) * (1 / 65536)
                number = tl.floor(velocity * _spread(inverse, BLOCK_N, BLOCK_D, MOMENTUM_BLOCK) + uniform)
                tl.store(momentum_ptrs, tl.minimum(tl.maximum(number, -127.0), 127.0).to(tl.int8), mask)
            else:
                tl.store(momentum_ptrs, _stored(velocity, bits >> 16, momentum_ptr.dtype.element_ty), mask)
        w -= _float64(lr).to(COMPUTE) * velocity
        tl.store(w_ptrs, _stored(w, bits & 0xFFFF, weight_ptr.dtype.element_ty), mask)


def _bits(number: float) -> int:
    (bits,) = struct.unpack("q", struct.pack("d", number))
    return bits


def updates(d_unit: Tensor, weight: Tensor, step: CenterStep) -> Repeated:
    """Return launches that make the step of centers from the gradient by their unit vectors (R, >= D).

    They take the index of the first center that d_unit is of, and their number.
    """
    num_classes, width = weight.shape
    buffer, units = step.momentum_buffer, step.momentum_scale
    grid, blocks = row_blocks(d_unit.shape[0], width, MOMENTUM_BLOCK)  # whole units of an int8 momentum
    return Repeated(
        update_centers_kernel,
        grid,
        d_unit,
        d_unit.stride(0),
        step.classes,
        weight,
        *weight.stride(),
        buffer,
        units,
        step.active,
        _bits(step.lr),
        _bits(step.momentum),
        _bits(step.weight_decay),
        step.rounding_key,
        step.class_start,
        step.row_ids,
        num_classes,
        width,
        0 if units is None else units.shape[1],
        **blocks,
        MOMENTUM_BLOCK=MOMENTUM_BLOCK,
        # A product and a sum are rounded as everywhere else, not as one: the kernel waits for memory, and the same
        # gradient makes the same bits.
        enable_fp_fusion=False,
    )
