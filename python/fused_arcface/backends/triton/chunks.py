"""The class-chunk algorithm: a panel of classes at a time, its exponentials kept in L2 between two products.

Forward: ``E = exp(X·Wᵀ)`` of the panel, ``U += E·W``. Backward: ``G`` from the same scores, ``H = Gᵀ·X``, which the
caller projects into dW or into the centers themselves. 8NDC flops in all, of which half run in the library; memory for
one panel. Any D; fp16, bf16, fp32 and fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import exponentials
from .common import Repeated, multiply, on_device
from .configs import CHUNKS, ELEMENTS, ElementConfig, ProductConfig, device_limits, panel_classes, product_config
from .negatives import RowRule
from .panels import Centers, Panel
from .rows import RowTerms, UnitRows


@dataclass(frozen=True)
class _Loop:
    """Sizes and buffers of the loop over panels and, within one, over blocks of rows."""

    config: ProductConfig | ElementConfig
    panel: Panel
    scores: Tensor
    """(rows of a block, P): what a library product writes; nobody reads it where the kernel multiplies."""
    results: Tensor
    """(rows of a block, P): exponentials, or their gradient. The same memory as ``scores`` where a kernel needs no
    score but its own."""

    @staticmethod
    def create(x: UnitRows, centers: Centers, stored: bool, sub_centers: int, multiplied_again: bool) -> _Loop:
        """Return what a loop needs: with results to store, and with centers that a second product takes."""
        num_rows, width = x.values.shape
        device = x.values.device
        several = sub_centers > 1
        product = x.values.dtype in (torch.float16, torch.bfloat16) and not several
        config = product_config(device_limits(device)[0]) if product else ELEMENTS
        # Without a library product and with nothing to store for one, the scores never exist.
        stored = stored or not product
        row_bytes, size = width * x.values.element_size(), x.second.element_size()
        logit_bytes = (size if stored else 0) + (x.inverse.element_size() if several else 0)
        # All centers of a class are in one panel.
        multiple = math.lcm(config.BLOCK_C, sub_centers)
        classes = panel_classes(CHUNKS, num_rows, centers.count, row_bytes, logit_bytes, multiple)
        panel = Panel.create(centers, classes, x, product and not multiplied_again and centers.are_operands(x))
        rows = min(num_rows, CHUNKS.max_rows) if stored else 0
        results = torch.empty(rows, classes, dtype=x.second.dtype, device=device)
        scores = torch.empty_like(results, dtype=x.inverse.dtype) if several else results
        return _Loop(config, panel, scores, results)

    @property
    def tiles(self) -> int:
        return self.panel.classes // self.config.BLOCK_C

    def multiply(self, block: _RowBlock) -> None:
        """Put a block's scores into the memory for them, unless the kernel multiplies itself."""
        if not isinstance(self.config, ProductConfig):
            scores = self.scores[: block.results.shape[0]]
            multiply(scores, block.x.values, self.panel.rows.values.T, accumulate=False)


@dataclass(frozen=True)
class _RowBlock:
    """A block of rows, and what the loop over panels does with it."""

    rows: slice
    x: UnitRows
    results: Tensor
    """(rows, P)."""
    launch: Repeated


def _row_blocks(x: UnitRows) -> Iterator[tuple[slice, UnitRows]]:
    for start in range(0, x.values.shape[0], CHUNKS.max_rows):
        yield slice(start, start + CHUNKS.max_rows), x.row_slice(start, start + CHUNKS.max_rows)


def class_stats(
    x: UnitRows,
    centers: Centers,
    target: Tensor,
    terms: RowTerms | None,
    rule: RowRule,
    with_center_sum: bool,
    class_count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Partial sums (tiles, N), partial maxima (tiles, N) without the embeddings' inverse, and Σ e·ŵ (N, width) or None.

    Without ``terms`` the maxima alone.
    """
    num_rows, width = x.values.shape
    loop = _Loop.create(x, centers, with_center_sum, rule.sub_centers, with_center_sum)
    total = torch.zeros(loop.tiles, num_rows, dtype=x.inverse.dtype, device=target.device)
    maximum = torch.full_like(total, -torch.inf)
    center_sum = total.new_empty(num_rows, width) if with_center_sum else None
    blocks = []
    for rows, block in _row_blocks(x):
        results = loop.results[: block.values.shape[0]]
        launch = exponentials.class_stats(
            block,
            loop.panel,
            target[rows],
            None if terms is None else terms.row_slice(rows.start, rows.stop),
            rule.row_slice(rows.start, rows.stop),
            loop.scores[: block.values.shape[0]],
            results,
            total[:, rows],
            maximum[:, rows],
            class_count,
            with_center_sum,
            loop.config,
        )
        blocks.append(_RowBlock(rows, block, results, launch))
    with on_device(target.device):
        for start, num_classes in loop.panel.turns():
            for each in blocks:
                loop.multiply(each)
                each.launch(start, num_classes)
                if center_sum is not None:
                    multiply(center_sum[each.rows], each.results, loop.panel.rows.second, accumulate=start > 0)
    return total, maximum, center_sum


def unit_gradients(
    x: UnitRows,
    centers: Centers,
    target: Tensor,
    terms: RowTerms,
    rule: RowRule,
    finish: Callable[[Tensor], Repeated],
) -> None:
    """Sum the gradient by the unit centers, a panel at a time, and finish it.

    ``finish`` returns launches for the buffer (P, width) of the gradient, by the terms' coefficients. They take the
    panel's first class and its number of classes.
    """
    width = x.values.shape[1]
    loop = _Loop.create(x, centers, True, rule.sub_centers, False)
    d_unit = x.inverse.new_empty(loop.panel.classes, width)
    finishing = finish(d_unit)
    blocks = []
    for rows, block in _row_blocks(x):
        results = loop.results[: block.values.shape[0]]
        launch = exponentials.class_gradient(
            block,
            loop.panel,
            target[rows],
            terms.row_slice(rows.start, rows.stop),
            rule.row_slice(rows.start, rows.stop),
            loop.scores[: block.values.shape[0]],
            results,
            loop.config,
        )
        blocks.append(_RowBlock(rows, block, results, launch))
    with on_device(target.device):
        for start, num_classes in loop.panel.turns():
            for each in blocks:
                loop.multiply(each)
                each.launch(start, num_classes)
                multiply(d_unit, each.results.T, each.x.second, accumulate=each.rows.start > 0)
            finishing(start, num_classes)
