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

from .common import multiply
from .configs import CHUNKS, ELEMENTS, ElementConfig, ProductConfig, device_limits, panel_classes, product_config
from .exponentials import launch_class_gradient, launch_class_stats
from .negatives import RowRule
from .rows import Centers, RowTerms, UnitRows


@dataclass(frozen=True)
class _Loop:
    """Sizes and buffers of the loop over panels and, within one, over blocks of rows."""

    centers: Centers
    config: ProductConfig | ElementConfig
    panel: UnitRows
    scores: Tensor
    """(rows of a block, P): what a library product writes; nobody reads it where the kernel multiplies."""
    results: Tensor
    """(rows of a block, P): exponentials, or their gradient. The same memory as ``scores`` where a kernel needs no
    score but its own."""

    @staticmethod
    def create(x: UnitRows, centers: Centers, stored: bool, sub_centers: int) -> _Loop:
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
        panel = UnitRows.empty(classes, width, x.values.dtype, x.inverse.dtype, device)
        rows = min(num_rows, CHUNKS.max_rows) if stored else 0
        results = torch.empty(rows, classes, dtype=x.second.dtype, device=device)
        scores = torch.empty_like(results, dtype=x.inverse.dtype) if several else results
        return _Loop(centers, config, panel, scores, results)

    @property
    def tiles(self) -> int:
        return self.panel.values.shape[0] // self.config.BLOCK_C

    def turns(self) -> Iterator[tuple[int, int]]:
        """Yield the first class of each turn and their number; the panel is made of them."""
        for start in range(0, self.centers.count, self.panel.values.shape[0]):
            yield start, self.centers.fill(start, self.panel)

    def scores_of(self, x: UnitRows) -> Tensor:
        """Return memory (rows, P) for the scores. It holds them already where the kernel does not multiply itself."""
        scores = self.scores[: x.values.shape[0]]
        if not isinstance(self.config, ProductConfig):
            multiply(scores, x.values, self.panel.values.T, accumulate=False)
        return scores


def _row_blocks(num_rows: int) -> list[slice]:
    return [slice(start, start + CHUNKS.max_rows) for start in range(0, num_rows, CHUNKS.max_rows)]


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
    loop = _Loop.create(x, centers, with_center_sum, rule.sub_centers)
    total = torch.zeros(loop.tiles, num_rows, dtype=x.inverse.dtype, device=target.device)
    maximum = torch.full_like(total, -torch.inf)
    center_sum = total.new_empty(num_rows, width) if with_center_sum else None
    for start, num_classes in loop.turns():
        for rows in _row_blocks(num_rows):
            block = x.row_slice(rows.start, rows.stop)
            scores, exponentials = loop.scores_of(block), loop.results[: block.values.shape[0]]
            launch_class_stats(
                block,
                loop.panel,
                target[rows],
                None if terms is None else terms.row_slice(rows.start, rows.stop),
                rule.row_slice(rows.start, rows.stop),
                scores,
                exponentials,
                total[:, rows],
                maximum[:, rows],
                class_count,
                num_classes,
                start,
                with_center_sum,
                loop.config,
            )
            if center_sum is not None:
                multiply(center_sum[rows], exponentials, loop.panel.second, accumulate=start > 0)
    return total, maximum, center_sum


def unit_gradients(
    x: UnitRows,
    centers: Centers,
    target: Tensor,
    terms: RowTerms,
    rule: RowRule,
    finish: Callable[[Tensor, int], None],
) -> None:
    """Call ``finish(gradient, start)`` once a turn.

    The gradient (R, width) is that by the unit centers from index ``start`` on, by the terms' coefficients.
    """
    num_rows, width = x.values.shape
    loop = _Loop.create(x, centers, True, rule.sub_centers)
    d_unit = x.inverse.new_empty(loop.panel.values.shape[0], width)
    for start, num_classes in loop.turns():
        for rows in _row_blocks(num_rows):
            block = x.row_slice(rows.start, rows.stop)
            scores, gradient = loop.scores_of(block), loop.results[: block.values.shape[0]]
            launch_class_gradient(
                block,
                loop.panel,
                target[rows],
                terms.row_slice(rows.start, rows.stop),
                rule.row_slice(rows.start, rows.stop),
                scores,
                gradient,
                num_classes,
                start,
                loop.config,
            )
            multiply(d_unit, gradient.T, block.second, accumulate=rows.start > 0)
        finish(d_unit[:num_classes], start)
