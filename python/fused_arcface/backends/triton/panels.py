"""The class centers of one turn of the host's loop, ready for a product: copies of them, or the centers as stored.

16-bit centers can be read where they lie, as their norms are factors of the scores. The second product of the forward
pass needs copies: the exponentials that it multiplies with carry the centers' inverse norms and are 16-bit, and
exp(scale·cos)·1e12 has no room there. A sample of the centers is gathered by the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Repeated, floored, on_device, reciprocal, row_blocks, row_norms
from .configs import NORMS, copies_centers
from .rows import UnitRows, unit_rows


@dataclass(frozen=True)
class Centers:
    """The class centers that a pass takes, some of a weight's rows or all."""

    weight: Tensor
    """(C, D)."""
    classes: Tensor | None = None
    """(K,) int64 rows of weight, ``C`` for none; None: all of them."""

    @property
    def count(self) -> int:
        return self.weight.shape[0] if self.classes is None else self.classes.shape[0]

    def are_operands(self, x: UnitRows) -> bool:
        """Return true if a kernel can multiply the batch rows with the centers where they are stored."""
        weight = self.weight
        return (
            self.classes is None
            and not copies_centers()
            and weight.dtype == x.values.dtype
            and weight.shape[1] == x.values.shape[1]
            and weight.is_contiguous()
            and weight.data_ptr() % 16 == 0
        )


@triton.jit(do_not_specialize=["first", "num_rows"])
def inverse_norms_kernel(
    x_ptr,  # (>= first + num_rows, WIDTH)
    inverse_ptr,  # (>= num_rows,)
    first,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write 1 / max(norm, 1e-12) of a block of the rows from ``first`` on."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    x_ptr += (first + offs_n)[:, None] * WIDTH
    norm, power = row_norms(x_ptr, 1, mask_n, WIDTH, inverse_ptr.dtype.element_ty, WIDTH, BLOCK_N, BLOCK_D)
    tl.store(inverse_ptr + offs_n, reciprocal(floored(norm, power)) * power, mask_n)


@dataclass(frozen=True)
class Panel:
    """The memory for a turn's centers, and the way to make them ready."""

    centers: Centers
    classes: int
    """Centers of a turn, P."""
    rows: UnitRows
    """(P, width) copies; or the weight (C, width) itself with inverse norms (R,), R a multiple of P."""
    as_stored: bool

    @staticmethod
    def create(centers: Centers, classes: int, x: UnitRows, as_stored: bool) -> Panel:
        """Return memory for turns of ``classes`` centers, to be multiplied with ``x``.

        ``as_stored``: the kernels take the weight itself, see :meth:`Centers.are_operands`.
        """
        width, compute, weight = x.values.shape[1], x.inverse.dtype, centers.weight
        if not as_stored:
            rows = UnitRows.empty(classes, width, x.values.dtype, compute, weight.device)
            return Panel(centers, classes, rows, False)
        needed = -(-centers.count // classes)
        ready = min(needed, max(1, NORMS // classes)) * classes
        inverse = torch.empty(ready, dtype=compute, device=weight.device)
        return Panel(centers, classes, UnitRows(weight, inverse, inverse, weight), True)

    def turns(self) -> Iterator[tuple[int, int]]:
        """Yield each turn's first center and their number, and launch what makes them ready."""
        ready, fill = self.rows.inverse.shape[0], self._fill()
        for start in range(0, self.centers.count, self.classes):
            if start % ready == 0:
                fill(start, min(ready, self.centers.count - start))
            yield start, min(self.classes, self.centers.count - start)

    def run(self, *calls: Callable[[int, int], None]) -> None:
        """Make these calls in each turn, with the turn's first center and its number of centers."""
        with on_device(self.rows.values.device):
            for start, num_classes in self.turns():
                for call in calls:
                    call(start, num_classes)

    def _fill(self) -> Repeated:
        """Return launches that make rows ready. They take the first one and their number."""
        if not self.as_stored:
            return unit_rows(self.centers.weight, self.rows, self.centers.classes)
        grid, blocks = row_blocks(self.rows.inverse.shape[0], self.rows.values.shape[1])
        return Repeated(inverse_norms_kernel, grid, self.rows.values, self.rows.inverse, **blocks)
