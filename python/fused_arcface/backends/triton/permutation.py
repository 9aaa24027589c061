"""The keyed permutation of a sampled step's classes: one launch, where tables in plain PyTorch take some 150."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_arcface.base.keyed_random import signed
from fused_arcface.base.permutation import ROUNDS, grid_of

from .common import launch
from .keyed_random import fold

_BLOCK = 256


@triton.jit
def _number(key, step, position, size):
    """Return a round's numbers in [0, size), int64, at the positions (BLOCK,)."""
    words = fold(fold(key, tl.full([], step, tl.uint64)), position.to(tl.uint64))
    return ((words >> 32) & 0x7FFFFFFF).to(tl.int64) % size


@triton.jit
def _image(cells, key, a, b, ROUNDS: tl.constexpr, INVERSE: tl.constexpr):
    """Return the images of cells (BLOCK,) of the ``a × b`` grid; with ``INVERSE`` the cells that have these images."""
    left, right = cells // b, cells % b
    for turn in tl.static_range(ROUNDS):
        step = ROUNDS - 1 - turn if INVERSE else turn
        if step % 2 == 0:
            number = _number(key, step, right, a)
            left = (left + (a - number if INVERSE else number)) % a
        else:
            number = _number(key, step, left, b)
            right = (right + (b - number if INVERSE else number)) % b
    return left * b + right


@triton.jit(do_not_specialize=["key", "size", "a", "b", "count"])
def permute_kernel(
    ids_ptr,  # (count,) int64 in [0, size)
    images_ptr,  # (count,) int64
    key,
    size,
    a,
    b,
    count,
    ROUNDS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the images of a block of ids. A cell past ``size`` is mapped again until the result is an id."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    key = key.to(tl.int64).to(tl.uint64, bitcast=True)
    cells = _image(tl.load(ids_ptr + offs, mask, 0), key, a, b, ROUNDS, INVERSE)
    while tl.max((cells >= size).to(tl.int32), 0) > 0:
        cells = tl.where(cells >= size, _image(cells, key, a, b, ROUNDS, INVERSE), cells)
    tl.store(images_ptr + offs, cells, mask)


class Permutation:
    """:class:`fused_arcface.base.permutation.Permutation`, for ids on a GPU."""

    def __init__(self, size: int, key: int, device: torch.device) -> None:
        self.size, self.key = size, key

    def inverse(self, images: Tensor) -> Tensor:
        """Return the ids with these images (K,) int64 in [0, size)."""
        return self(images, inverse=True)

    def __call__(self, ids: Tensor, inverse: bool = False) -> Tensor:
        """Return the images of ids (K,) int64 in [0, size)."""
        ids = ids.contiguous()
        images = torch.empty_like(ids)
        a, b = grid_of(self.size)
        launch(
            permute_kernel,
            (triton.cdiv(len(ids), _BLOCK),),
            ids,
            images,
            signed(self.key),
            self.size,
            a,
            b,
            len(ids),
            ROUNDS=ROUNDS,
            INVERSE=inverse,
            BLOCK=_BLOCK,
        )
        return images
