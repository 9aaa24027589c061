"""The class-chunk algorithm: a panel of classes at a time, its exponentials kept in L2 between two products.

Forward: ``E = exp(X·Wᵀ)`` of the panel, ``U += E·W``. Backward: ``G`` from the same scores, ``H = Gᵀ·X``, projected
    into dW. 8NDC flops in all, of which half run in the library; memory for one panel. Any D; fp16, bf16, fp32 and
    fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import multiply
from .configs import CHUNKS, ELEMENTS, ElementConfig, ProductConfig, device_limits, panel_classes, product_config
from .exponentials import launch_class_gradient, launch_class_stats
from .rows import RowTerms, UnitRows, fill_unit_rows
from .targets import project


@dataclass(frozen=True)
class _Loop:
    """Sizes and buffers of the loop over panels and, within one, over blocks of rows."""

    config: ProductConfig | ElementConfig
    panel: UnitRows
    scores: Tensor
    """(rows of a block, P): exponentials, or their gradient."""

    @staticmethod
    def create(x: UnitRows, weight: Tensor, stored: bool) -> _Loop:
        num_rows, width = x.values.shape
        product = x.values.dtype in (torch.float16, torch.bfloat16)
        config = product_config(device_limits(weight.device)[0]) if product else ELEMENTS
        # Without a library product and with nothing to store for one, the scores never exist.
        stored = stored or not product
        row_bytes, size = width * x.values.element_size(), x.second.element_size()
        classes = panel_classes(CHUNKS, num_rows, weight.shape[0], row_bytes, size if stored else 0, config.BLOCK_C)
        panel = UnitRows.empty(classes, width, x.values.dtype, x.inverse.dtype, weight.device)
        rows = min(num_rows, CHUNKS.max_rows) if stored else 0
        scores = torch.empty(rows, classes, dtype=x.second.dtype, device=weight.device)
        return _Loop(config, panel, scores)

    @property
    def tiles(self) -> int:
        return self.panel.values.shape[0] // self.config.BLOCK_C

    def starts(self, weight: Tensor) -> range:
        return range(0, weight.shape[0], self.panel.values.shape[0])

    def fill(self, weight: Tensor, start: int) -> int:
        """Makes the panel of the classes from ``start`` on; how many there are."""
        rows = weight[start : start + self.panel.values.shape[0]]
        fill_unit_rows(rows, self.panel)
        return rows.shape[0]

    def scores_of(self, x: UnitRows) -> Tensor:
        """(rows, P) to be filled by a kernel, holding the scores already where the kernel does not multiply itself."""
        scores = self.scores[: x.values.shape[0]]
        if not isinstance(self.config, ProductConfig):
            multiply(scores, x.values, self.panel.values.T, accumulate=False)
        return scores


def _row_blocks(num_rows: int) -> list[slice]:
    return [slice(start, start + CHUNKS.max_rows) for start in range(0, num_rows, CHUNKS.max_rows)]


def class_stats(
    x: UnitRows, weight: Tensor, target: Tensor, terms: RowTerms | None, with_centre_sum: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Partial sums (tiles, N), partial maxima (tiles, N) without the embeddings' inverse, and Σ e·ŵ (N, width) or None.

    Without ``terms`` the maxima alone.
    """
    num_rows, width = x.values.shape
    loop = _Loop.create(x, weight, with_centre_sum)
    compute = x.inverse.dtype
    total = torch.zeros(loop.tiles, num_rows, dtype=compute, device=weight.device)
    maximum = torch.full_like(total, -torch.inf)
    centre_sum = torch.empty(num_rows, width, dtype=compute, device=weight.device) if with_centre_sum else None
    for start in loop.starts(weight):
        num_classes = loop.fill(weight, start)
        for rows in _row_blocks(num_rows):
            block = x.row_slice(rows.start, rows.stop)
            scores = loop.scores_of(block)
            launch_class_stats(
                block,
                loop.panel,
                target[rows],
                None if terms is None else terms.row_slice(rows.start, rows.stop),
                scores,
                total[:, rows],
                maximum[:, rows],
                num_classes,
                start,
                with_centre_sum,
                loop.config,
            )
            if centre_sum is not None:
                multiply(centre_sum[rows], scores, loop.panel.second, accumulate=start > 0)
    return total, maximum, centre_sum


def weight_grad(x: UnitRows, weight: Tensor, target: Tensor, terms: RowTerms, out: Tensor) -> None:
    """The gradient by weight (C, D) into ``out``, given the rows' terms with their coefficients."""
    num_rows, width = x.values.shape
    loop = _Loop.create(x, weight, True)
    d_unit = torch.empty(loop.panel.values.shape[0], width, dtype=x.inverse.dtype, device=weight.device)
    for start in loop.starts(weight):
        num_classes = loop.fill(weight, start)
        for rows in _row_blocks(num_rows):
            block = x.row_slice(rows.start, rows.stop)
            gradient = loop.scores_of(block)
            launch_class_gradient(
                block,
                loop.panel,
                target[rows],
                terms.row_slice(rows.start, rows.stop),
                gradient,
                num_classes,
                start,
                loop.config,
            )
            multiply(d_unit, gradient.T, block.second, accumulate=rows.start > 0)
        stop = start + num_classes
        project(d_unit[:num_classes], weight[start:stop], out[start:stop])
