"""The terms that the engine and the backends speak in: sentinels of targets, and the named tuples that stages take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base.checks import check_written_in_place

IGNORED = -1
"""In place of a class: the row is ignored."""
INVALID = -2
"""In place of a class or of a row of weight: the label is no class. The row's loss is NaN."""
ABSENT = -1
"""In place of a row of weight: none of the rows at hand is the target. Equal to ``IGNORED``, which stays as it is when
classes become rows."""

MOMENTUM_BLOCK = 64
"""Columns of a row that share one unit of an int8 momentum: 1/16 byte an element for it."""

MOMENTS = 16
"""Number of moments that a backend with the feature ``late_scale`` sums, see adapting.py."""


class Negatives(NamedTuple):
    """The rule by which a row's negatives enter its sum, if not by their cosines alone.

    Keyword arguments of the stages over the classes. Only backends with the features ``sub_centers``,
    ``modulated_negatives`` and ``binary_losses`` take them.
    """

    sub_centers: int = 1
    """K rows of weight for each class, adjacent. A class's cosine is the greatest of theirs, and its gradient goes to
    that row alone. A target is its class's row with the greatest cosine."""
    threshold: Tensor | None = None
    """(N,) or None: a cosine c above its row's threshold becomes ``a·c² + b·c + d + e·√(1 - c²)``."""
    coefficients: Tensor | None = None
    """(4,) fp64: a, b, d, e."""
    logistic: Tensor | None = None
    """(5,) fp64 or None: the scale and the numbers of :class:`fused_arcface.margins.BinaryLosses`. A negative enters
    the sum by its own logistic loss: ``exp(scale·value)`` is that loss."""

    @property
    def plain(self) -> bool:
        return self.sub_centers == 1 and self.threshold is None and self.logistic is None

    def contiguous(self, dtype: torch.dtype) -> Negatives:
        """Return the same rule with thresholds of ``dtype``, in contiguous memory, for kernels that read addresses."""
        if self.threshold is None or self.coefficients is None:
            return self
        threshold, coefficients = self.threshold.to(dtype).contiguous(), self.coefficients.contiguous()
        return self._replace(threshold=threshold, coefficients=coefficients)


PLAIN = Negatives()


class RowGradients(NamedTuple):
    """The numbers that the gradient by the class centers is made of, for each row of the embeddings.

    The derivative of the loss by ``cos_ij`` is ``negative_coefficient_i·exp(scale·cos_ij - lse_i)`` for a negative and
    ``target_coefficient_i`` for the target.
    """

    scale: float | Tensor
    """A number, or 0-dim fp64 if only the device knows it."""
    lse: Tensor
    """(N,) fp64 log-sum-exp of the row's negative logits."""
    negative_coefficient: Tensor
    """(N,)."""
    target_coefficient: Tensor
    """(N,)."""

    def contiguous(self) -> RowGradients:
        """Return the same numbers in contiguous memory, for kernels that read raw addresses."""
        return RowGradients(self.scale, *(each.contiguous() for each in self[1:]))


class SecondTarget(NamedTuple):
    """A second target of each row, which a pass over the classes takes for a negative. See :mod:`.mixed`."""

    row: Tensor
    """(N,) row of the centers that the step uses, or ``ABSENT``."""
    coefficient: Tensor
    """(N,) the derivative of the loss by the cosine with that row, beside its derivative as a negative."""


CENTER_SETTINGS = ("lr", "momentum", "weight_decay")
"""The fields of :class:`CenterStep` with an optimizer's settings; 0 in a step of an optimizer without them."""
CENTER_STATE = ("momentum_buffer", "momentum_scale")
"""The fields of :class:`CenterStep` that the step changes: tensors with a row for each row of weight, or None."""


class CenterStep(NamedTuple):
    """The numbers of one step of SGD on the class centers, beside those that their gradient is made of.

    Row r of weight, with gradient g_r, becomes ``w_r - lr·m_r`` with the new momentum
    ``m_r = momentum·m_r + (g_r + weight_decay·w_r)``.
    """

    classes: Tensor | None
    """(K,) int64 ascending rows of weight that the step uses; None: all. The target indexes into them. Other rows are
    not touched. The number ``C``, for backends that know padding, is no row."""
    momentum_buffer: Tensor | None
    """Like weight, in one of ``MOMENTUM_DTYPES``; None without momentum."""
    momentum_scale: Tensor | None
    """(C, ceil(D / 64)) fp32: the units of an int8 momentum, one for 64 columns of a row."""
    lr: float
    momentum: float
    weight_decay: float
    rounding_key: int
    """Made of seed and step, int64. :func:`fused_arcface.base.keyed_random.rounding_bits` takes it to round storage
    below fp32."""
    class_start: int
    """Global id of weight's first row."""
    active: Tensor
    """0-dim bool: if false, nothing is changed. It is a tensor, so that nobody waits for a GPU to read it."""
    row_ids: Tensor | None = None
    """(C,) int64 contiguous global ids of weight's rows, where they are copies of some of them; None: those from
    class_start on."""

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors beside weight that the step changes, by name."""
        return {name: tensor for name in CENTER_STATE if (tensor := getattr(self, name)) is not None}

    def ids(self, rows: Tensor) -> Tensor:
        """Return the global ids of rows of weight (R,), by which their rounding is keyed."""
        return rows + self.class_start if self.row_ids is None else self.row_ids[rows]


def check_update(weight: Tensor, state: dict[str, Tensor]) -> None:
    """Check the memory that an update of the centers writes to: kernels get its raw addresses.

    ``state`` has the tensors of :attr:`CenterStep.state`.

    Raises:
        ValueError: if elements of weight share memory, or a tensor of the state has another shape than weight or is not
            contiguous.
    """
    check_written_in_place("weight", weight)
    num_rows, dim = weight.shape
    for name, tensor in state.items():
        shape = (num_rows, -(-dim // MOMENTUM_BLOCK) if name == "momentum_scale" else dim)
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and {shape} beside weight {(num_rows, dim)}; got {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )
