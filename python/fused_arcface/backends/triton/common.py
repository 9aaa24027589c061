"""The parts that all kernel files share: launching, rounding, products, and the library products between kernels."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""True if kernels run in Triton's interpreter, as in the tests. It needs help with bf16, in :func:`to` and
:func:`dot`."""


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which Triton launches on ``device``: it does so on the current one."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run ``kernel`` on its tensors' device, on PyTorch's current stream there; a grid without blocks is no launch."""
    if 0 in grid:
        return
    with on_device(next(arg.device for arg in args if isinstance(arg, Tensor))):
        _run(kernel, grid, args, meta)


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
    """Apart from :func:`launch`, so that tests can compile what would be launched."""
    return kernel[grid](*args, **meta)


class Repeated:
    """Launches of one kernel that differ in their last arguments alone, numbers that it is not specialized for.

    Triton looks at all arguments of the first launch, which is most of its time, and the compiled kernel is kept for
    the others. The caller stays on the tensors' device (:func:`on_device`).
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """Take the arguments that stay the same, and the kernel's constants and options."""
        self._kernel, self._grid, self._args, self._meta = kernel, grid, args, meta
        self._constants = tuple(meta[name] for name in kernel.arg_names if name in meta)
        self._again: Any = None

    def __call__(self, *varying: int) -> None:
        """Launch with the arguments that follow the fixed ones."""
        if self._again is not None:
            self._again(*self._args, *varying, *self._constants)
            return
        compiled = _run(self._kernel, self._grid, (*self._args, *varying), self._meta)
        if compiled is not None:  # neither interpreted nor recorded
            self._again = compiled[(*self._grid, 1, 1)[:3]]

    def once(self, *varying: int) -> None:
        """Launch a single time, as :func:`launch` does."""
        launch(self._kernel, self._grid, *self._args, *varying, **self._meta)


def row_blocks(num_rows: int, width: int, least_columns: int = 1) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the constants of a kernel over rows of ``width`` columns.

    A block takes all columns at once, up to 512 (16 bytes of fp32 in each of 128 threads), and as many rows as make
    2048 elements, 16 a thread of its 4 warps.
    """
    columns = max(least_columns, min(512, triton.next_power_of_2(width)))
    rows = 2048 // columns
    return (triton.cdiv(num_rows, rows),), {"WIDTH": width, "BLOCK_N": rows, "BLOCK_D": columns}


def multiply(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """``out (+)= a @ b`` by the library: out (R, K) of the compute dtype, a (R, M) and b (M, K) of one dtype."""
    if a.device.type != "cuda":  # the interpreter's tests: the CPU has no product of 16-bit operands into fp32
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=1 if accumulate else 0, out=out)
    elif not accumulate:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    elif _library_adds_to_fp32(out.device):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out += torch.ops.aten.mm.dtype(a, b, out.dtype)


@functools.lru_cache
def _library_adds_to_fp32(device: torch.device) -> bool:
    """Return true if addmm adds a product of 16-bit operands to fp32 sums.

    Some versions of torch from 2.8 on want the sums in the operands' dtype (pytorch/pytorch#154086). To try costs one
    product of 16×16, once.
    """
    sums = torch.zeros(16, 16, device=device)
    operand = sums.to(torch.bfloat16)
    try:
        torch.ops.aten.addmm.dtype_out(sums, operand, operand, torch.float32, out=sums)
    except RuntimeError:
        return False
    return True


@triton.jit
def divide(a, b):
    """Return a / b rounded to nearest. Triton's own fp32 division may be two units off, in a cosine three times."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def reciprocal(x):
    """1 / x, rounded to nearest."""
    return divide(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def square_root(x):
    """√x, rounded to nearest; Triton's own fp32 root is an approximation."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def floored(norm, power):
    """Return max(norm, 1e-12·power); NaN stays NaN.

    With :func:`row_norms`'s results it is power times the number that a row is divided by, as in
    ``torch.nn.functional.normalize``.
    """
    # Spelled out in norm's dtype: a bare constant is fp32 to Triton, and fp64 would have nine of its digits.
    epsilon = tl.full(norm.shape, 1e-12, norm.dtype) * power
    return tl.where(norm < epsilon, epsilon, norm)


@triton.jit
def reciprocal_power_of_two(x):
    """2^-k for x in [2^k, 2^(k+1)), fp32 or fp64, kept within the normal numbers."""
    if x.dtype == tl.float64:
        exponent = (x.to(tl.int64, bitcast=True) >> 52) & 2047
        exponent = tl.minimum(tl.maximum(exponent, 1), 2045)
        power = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def row_norms(
    rows_ptr,  # (BLOCK_N, 1) addresses of rows
    stride_d,
    mask,  # (BLOCK_N,)
    D,
    compute: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK_N,) norms of the rows times a power of two each, and those powers (BLOCK_N,), in the compute dtype.

    The power brings a row's largest magnitude into [1, 2). Squares, norm and its inverse may leave the dtype's range
    without it.
    """
    largest = tl.zeros([BLOCK_N], compute)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        row = tl.load(rows_ptr + offs_d[None, :] * stride_d, mask[:, None] & (offs_d < D)[None, :], 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(row.to(compute)), 1))
    power = reciprocal_power_of_two(largest)
    squares = tl.zeros([BLOCK_N], compute)
    for start in range(0, WIDTH, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        row = tl.load(rows_ptr + offs_d[None, :] * stride_d, mask[:, None] & (offs_d < D)[None, :], 0.0)
        row = row.to(compute) * power[:, None]
        squares += tl.sum(row * row, 1)
    return square_root(squares), power


@triton.jit
def to(x, dtype: tl.constexpr):
    """Return x rounded to dtype, to nearest even."""
    # The interpreter truncates to bf16, which would bias every sum of such numbers; it is right at everything else.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def to_gradient(x, is_short, dtype: tl.constexpr):
    """Return x rounded to a gradient's dtype.

    In fp16 an overflow is infinite. In rows shorter than ε, marked by ``is_short``, finite numbers saturate.
    """
    if dtype == tl.float16:
        saturated = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        x = tl.where(is_short & (tl.abs(x) < float("inf")), saturated, x)
    return to(x, dtype)


@triton.jit
def dot(a, b, accumulator):
    """Return accumulator (M, K) fp32 + a (M, D) @ b (D, K), a and b of one 16-bit dtype."""
    # The interpreter holds bf16 numbers as their bits in uint16 and would multiply those.
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator)
