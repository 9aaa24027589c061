"""The class-chunk algorithm: a panel of classes at a time, its exponentials kept in L2 between two products.

Forward: ``E = exp(X·Wᵀ)`` of the panel, ``U += E·W``. Backward: ``G`` from the same scores, ``H = Gᵀ·X``, which the
caller projects into dW or into the centers themselves. 8NDC flops in all, of which half run in the library; memory for
one panel. Any D; fp16, bf16, fp32 and fp64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fused_arcface.engine.terms import Negatives

from .common import Repeated, multiply
from .configs import CHUNKS, ELEMENTS, device_limits, panel_classes, product_config
from .exponentials import class_gradient_kernel, class_stats_kernel
from .panels import Centers, Panel
from .rows import RowTerms, UnitRows
from .targets import projections

_DEPTH_MULTIPLE = 16
"""Operands of library products have a multiple of this many columns. The library's fastest kernels need rows aligned
to 32 bytes, which are 16 numbers of 16 bits."""


def padded_shape(N: int, D: int, device: torch.device) -> tuple[int, int]:
    """Return the rows and columns of the embeddings' copy."""
    return N, -(-D // _DEPTH_MULTIPLE) * _DEPTH_MULTIPLE


@dataclass(frozen=True)
class _Block:
    """A block of rows, which a kernel takes at once."""

    rows: slice
    x: UnitRows
    terms: RowTerms
    scores: Tensor
    """(rows, P): the result of a library product. It is unused if the kernel multiplies."""
    results: Tensor
    """(rows, P): exponentials, or their gradient. The same memory as ``scores`` where a kernel needs no score but its
    own."""
    tiles: int


@dataclass(frozen=True)
class _Loop:
    """The loop over panels and, within one, over blocks of rows."""

    panel: Panel
    blocks: list[_Block]
    tiles: int
    """Tiles of classes in a panel."""
    product: bool
    """If true, the kernel multiplies; else the library does."""
    constants: dict[str, int]
    """Constants and options of the kernel."""

    @staticmethod
    def create(
        x: UnitRows, centers: Centers, terms: RowTerms, sub_centers: int, stored: bool, multiplied_again: bool
    ) -> _Loop:
        """Return what a loop needs: with results to store, and with centers that a second product takes."""
        num_rows, width = x.values.shape
        several = sub_centers > 1
        product = x.values.dtype in (torch.float16, torch.bfloat16) and not several
        config = product_config(device_limits(x.values.device)[0]) if product else ELEMENTS
        # Without a library product and with nothing to store for one, the scores never exist.
        stored = stored or not product
        row_bytes, size = width * x.values.element_size(), x.second.element_size()
        logit_bytes = (size if stored else 0) + (x.inverse.element_size() if several else 0)
        # All centers of a class are in one panel.
        multiple = math.lcm(config.BLOCK_C, sub_centers)
        classes = panel_classes(CHUNKS, num_rows, centers.count, row_bytes, logit_bytes, multiple)
        panel = Panel.create(centers, classes, x, product and not multiplied_again and centers.are_operands(x))
        results = x.second.new_empty(min(num_rows, CHUNKS.max_rows) if stored else 0, classes)
        scores = torch.empty_like(results, dtype=x.inverse.dtype) if several else results
        blocks = []
        for start in range(0, num_rows, CHUNKS.max_rows):
            rows = slice(start, min(start + CHUNKS.max_rows, num_rows))
            count = rows.stop - start
            tiles = triton.cdiv(count, config.BLOCK_N)
            blocks.append(_Block(rows, x.some(rows), terms.some(rows), scores[:count], results[:count], tiles))
        constants = dataclasses.asdict(config) | {
            "WIDTH": width,
            "PRODUCT": product,
            "AS_STORED": panel.as_stored,
            "SUB_CENTERS": sub_centers,
            "BLOCK_D": min(config.BLOCK_D, triton.next_power_of_2(width)),
        }
        return _Loop(panel, blocks, classes // config.BLOCK_C, product, constants)

    def run(self, launches: list[Repeated], then: Callable[[_Block, int], None], *finish: Repeated) -> None:
        """Make a launch for each block of rows in each turn, and call ``then`` with the block and the first class.

        The launches take the panel's first class and its number of classes, and so does ``finish`` at a turn's end.
        """

        def turn(start: int, num_classes: int) -> None:
            for block, launch in zip(self.blocks, launches, strict=True):
                if not self.product:
                    multiply(block.scores, block.x.values, self.panel.rows.values.T, accumulate=False)
                launch(start, num_classes)
                then(block, start)

        self.panel.run(turn, *finish)


def class_stats(
    x: UnitRows,
    centers: Centers,
    terms: RowTerms,
    negatives: Negatives,
    with_center_sum: bool,
    class_count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return partial sums (tiles, N), partial maxima (tiles, N), and Σ e·ŵ (N, width), or None if it is not wanted.

    The maxima are without the embeddings' inverse norms. Terms without a scale give the maxima alone.
    """
    num_rows, width = x.values.shape
    loop = _Loop.create(x, centers, terms, negatives.sub_centers, with_center_sum, with_center_sum)
    panel = loop.panel.rows
    total = x.inverse.new_zeros(loop.tiles, num_rows)
    maximum = torch.full_like(total, -torch.inf)
    center_sum = total.new_empty(num_rows, width) if with_center_sum else None
    launches = [
        Repeated(
            class_stats_kernel,
            (block.tiles * loop.tiles,),
            block.x.values,
            panel.values,
            panel.inverse,
            block.x.inverse,
            block.terms.target,
            block.x.inverse if block.terms.scale is None else block.terms.scale,
            block.x.inverse if block.terms.shift is None else block.terms.shift,
            block.terms.threshold,
            negatives.coefficients,
            block.scores,
            block.results,
            total[:, block.rows],
            maximum[:, block.rows],
            class_count,
            block.x.values.shape[0],
            block.scores.stride(0),
            block.tiles,
            total.stride(0),
            panel.inverse.shape[0],
            HAS_SHIFT=terms.shift is not None,
            MAX_ONLY=terms.scale is None,
            STORE=with_center_sum,
            **loop.constants,
        )
        for block in loop.blocks
    ]

    def add_centers(block: _Block, start: int) -> None:
        if center_sum is not None:
            multiply(center_sum[block.rows], block.results, panel.second, accumulate=start > 0)

    loop.run(launches, add_centers)
    return total, maximum, center_sum


def weight_grad(x: UnitRows, centers: Centers, terms: RowTerms, negatives: Negatives, out: Tensor) -> None:
    """Write the gradient by the centers (K, D) into ``out``."""
    unit_gradients(
        x, centers, terms, negatives, lambda d_unit: projections(d_unit, centers.weight, out, centers.classes)
    )


def unit_gradients(
    x: UnitRows, centers: Centers, terms: RowTerms, negatives: Negatives, finish: Callable[[Tensor], Repeated]
) -> None:
    """Sum the gradient by the unit centers, a panel at a time, and finish it.

    ``finish`` returns launches for the buffer (P, width) of the gradient, by the terms' coefficients. They take the
    panel's first class and its number of classes.
    """
    loop = _Loop.create(x, centers, terms, negatives.sub_centers, stored=True, multiplied_again=False)
    panel = loop.panel.rows
    d_unit = x.inverse.new_empty(loop.panel.classes, x.values.shape[1])
    launches = [
        Repeated(
            class_gradient_kernel,
            (block.tiles * loop.tiles,),
            block.x.values,
            panel.values,
            panel.inverse,
            block.x.inverse,
            block.terms.target,
            block.terms.scale,
            block.terms.shift,
            block.terms.factor,
            block.terms.coefficient,
            block.terms.threshold,
            negatives.coefficients,
            block.scores,
            block.results,
            block.x.values.shape[0],
            block.scores.stride(0),
            block.tiles,
            panel.inverse.shape[0],
            **loop.constants,
        )
        for block in loop.blocks
    ]

    def add_rows(block: _Block, start: int) -> None:
        multiply(d_unit, block.results.T, block.x.second, accumulate=block.rows.start > 0)

    loop.run(launches, add_rows, finish(d_unit))
