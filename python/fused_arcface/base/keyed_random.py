"""Random numbers that are functions of a key, not of a generator's state.

They are the same for any number of ranks, in any order.

The generator is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): number
``n`` under ``key`` is ``mix(key + (n + 1)·golden)``. csrc/random.h has the same functions; a test compares
them. 64-bit words are int64 tensors, whose arithmetic wraps, or Python ints in [0, 2^64).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .compiler import constant_result

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

# Numbers drawn at once. On the CPU 2^14: the temporaries stay in L2, and torch runs such small operations on the
# caller's thread alone (measured: a tenth of the time of 2^20 on a busy machine, half on an idle one).
_CPU_CHUNK, _GPU_CHUNK = 1 << 14, 1 << 24

CENTER_STD = 0.01
"""Standard deviation of initial class centers."""

# The first number that is folded into a seed: the purpose of the random numbers.
CENTERS, SAMPLE, ROUNDING, BATCH, NET, MARGINS = 1, 2, 3, 4, 5, 6


def signed(word: int) -> int:
    """Return a word in [0, 2^64) as the int64 with the same bits."""
    return word - (1 << 64) if word >> 63 > 0 else word


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def fold(key: int, *numbers: int) -> int:
    """Return a key for each sequence of numbers under ``key``; all are in [0, 2^64)."""
    for number in numbers:
        x = (key + (number + 1) * _GOLDEN) & _MASK
        x = ((x ^ (x >> 30)) * _MIX1) & _MASK
        x = ((x ^ (x >> 27)) * _MIX2) & _MASK
        key = x ^ (x >> 31)
    return key


def fold_each(key: int | Tensor, numbers: Tensor) -> Tensor:
    """:func:`fold` of one number per element, int64 tensors; ``key`` an int or a tensor that broadcasts."""
    x = (numbers + 1) * signed(_GOLDEN) + (key if isinstance(key, Tensor) else signed(key))
    x = (x ^ _shift_right(x, 30)) * signed(_MIX1)
    x = (x ^ _shift_right(x, 27)) * signed(_MIX2)
    return x ^ _shift_right(x, 31)


@functools.cache
def _made_quantiles(device: torch.device) -> Tensor:
    """Return (65536,) fp32, the standard normal distribution's quantiles at ``(i + 1/2) / 65536``, out to ±4.3.

    A table has the same bits on every device. Logarithms and cosines differ in the last place between libraries.
    """
    levels = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return (math.sqrt(2) * torch.erfinv(2 * levels - 1)).float().to(device)


# A compiled program takes the table as it is: it would make it anew in each step, with its compiler's rounding.
@constant_result
def _quantiles(device: torch.device) -> Tensor:
    return _made_quantiles(device)


def normal_rows(key: int | Tensor, ids: Tensor, dim: int) -> Tensor:
    """Return standard normal numbers (R, dim) fp32, a function of key and id: four of each 64-bit word."""
    words = fold_each(fold_each(key, ids)[:, None], torch.arange((dim + 3) // 4, device=ids.device))
    levels = words.view(torch.int16)[:, :dim].int() + 32768
    return _quantiles(ids.device).index_select(0, levels.flatten()).view(levels.shape)


def fill_normal(rows: Tensor, seed: int, first_id: int, std: float) -> None:
    """Fill rows (R, D) of any float dtype with N(0, std²).

    Row r is a function of ``(seed, first_id + r)`` and D alone.
    """
    fill_normal_rows(rows, seed, torch.arange(first_id, first_id + len(rows), device=rows.device), std)


@torch.no_grad()
def fill_normal_rows(rows: Tensor, seed: int, ids: Tensor, std: float) -> None:
    """Fill rows (R, D) as :func:`fill_normal` does, for any ids (R,) int64."""
    key = fold(seed, CENTERS)
    for start, part in chunks(rows):
        part.copy_(normal_rows(key, ids[start : start + len(part)], rows.shape[1]).mul_(std))


def chunks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows) pieces of few enough elements to be worked on at once."""
    elements = max(1, math.prod(tensor.shape[1:]))
    step = max(1, (_CPU_CHUNK if tensor.device.type == "cpu" else _GPU_CHUNK) // elements)
    for start in range(0, tensor.shape[0], step):
        yield start, tensor[start : start + step]


def rounding_key(seed: int, step: int) -> int:
    """Return the key of a step's stochastic rounding, as a signed 64-bit number."""
    return signed(fold(seed, ROUNDING, step))


def rounding_bits(key: int, ids: Tensor, dim: int) -> Tensor:
    """Return random bits (R, dim) int64 in [0, 2^32), a function of key, class id (R,) and column.

    32-bit arithmetic from a 64-bit key per row, so that a vector unit makes them: the finalizer is lowbias32 (C.
    Wellons).
    """
    keys = fold_each(key, ids)[:, None]
    x = ((keys & 0xFFFFFFFF) + torch.arange(dim, device=ids.device) * (_GOLDEN >> 32)) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) ^ _shift_right(keys, 32)
