"""Margins that know the label of each row, such as a margin for each class.

Each has a method ``for_labels``, see :class:`fused_arcface.margins.RowMargin`. The labels are global class ids, of all
ranks' rows, so the same margin works on one device, over ranks and with a sample of the classes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..base.ranges import FROM_0_TO_1, NOT_NEGATIVE, check_number
from .angular import Boundary, with_angle
from .checks import check_choice
from .protocol import RowMargin

Kind = Literal["cos", "arc"]


class LabelMargin:
    """A margin made of a function of cosines and labels: ``LabelMargin(function)``.

    Args:
        function: maps target cosines (N,) and labels (N,) int64 to modified cosines (N,), differentiably. Labels are
            global class ids; ignored rows have 0.

    Raises:
        TypeError: if the function cannot be called.

    >>> import torch
    >>> from fused_arcface import margin_softmax_loss
    >>> margin = LabelMargin(lambda cosine, target: cosine - 0.1 * target)
    >>> x, w = torch.eye(2), torch.eye(2)
    >>> margin_softmax_loss(x, w, torch.tensor([0, 1]), margin=margin, scale=1.0, reduction="none")
    tensor([0.3133, 0.3412])
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not callable(function):
            raise TypeError(f"LabelMargin: function must be callable; got {type(function).__name__}")
        self.function = function
        self.__qualname__ = f"LabelMargin({getattr(function, '__qualname__', type(function).__qualname__)})"

    def __call__(self, target_cosine: Tensor) -> Tensor:
        """Raise TypeError: without labels there is no margin."""
        raise TypeError(f"{self!r} needs the labels of the rows: call its for_labels(labels, counted).modify(cosines)")

    def for_labels(self, labels: Tensor, counted: Tensor) -> RowMargin:
        """Return the batch's :class:`fused_arcface.margins.RowMargin`."""
        return RowMargin(lambda target_cosine: self.function(target_cosine, labels))

    def __repr__(self) -> str:
        return self.__qualname__


class ClassMargin(nn.Module):
    """``s·(cos θ - m_y)`` or ``s·cos(θ + m_y)`` with a margin ``m_y`` for each class (LDAM, eq. 13, arXiv:1906.07413).

    Args:
        margins: (C_total,) the margins, a tensor or a sequence of numbers: in [0, 2) for ``kind="cos"``, angles in
            [0, π) radians for ``kind="arc"``. :meth:`from_counts` makes them from the number of images of each class.
        kind: ``"cos"`` for ``cos θ - m_y``, ``"arc"`` for ``cos(θ + m_y)``.
        boundary: continuation past ``θ + m_y = π`` with ``kind="arc"``, see :mod:`fused_arcface.margins.angular`.

    Attributes:
        margins: (C_total,) fp64, on the head's device. They are an option and no state: no buffer, not in
            ``state_dict()``.

    Raises:
        TypeError, ValueError: if an argument has a wrong type, shape or range. The head raises ValueError if it has
            another number of classes.

    >>> import torch, fused_arcface as fa
    >>> head = fa.MarginHead(8, 3, margin=ClassMargin([0.1, 0.3, 0.5]))
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 2]))
    """

    margins: Tensor
    changes = False

    def __init__(self, margins: Tensor | Sequence[float], kind: Kind = "cos", boundary: Boundary = "hard") -> None:
        super().__init__()
        check_choice(self, "kind", kind, Kind)
        check_choice(self, "boundary", boundary, Boundary)
        values = _numbers("margins", margins)
        most, rule = (2.0, "[0, 2)") if kind == "cos" else (math.pi, "[0, π) radians")
        wrong = ~((values >= 0) & (values < most))
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(f"ClassMargin: margins must be in {rule}; got {values[index].item():g} for class {index}")
        self.kind, self.boundary = kind, boundary
        self._least, self._greatest = values.min().item(), values.max().item()
        self._digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:8]
        # Not a buffer: from_pretrained of transformers replaces those that its file lacks by memory without values.
        self._values = values
        self.margins = values.to(torch.get_default_device())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "margins" in self._buffers:  # pickled by an earlier version
            margins = self.margins
            del self.margins
            self.margins, self._values = margins, margins.cpu()

    @classmethod
    def from_counts(
        cls,
        counts: Tensor | Sequence[float],
        largest: float = 0.5,
        power: float = 0.25,
        kind: Kind = "cos",
        boundary: Boundary = "hard",
    ) -> ClassMargin:
        """Return margins ``largest·(n_min / n_j)^power``: rare classes have larger ones (LDAM).

        Args:
            counts: (C_total,) number ``n_j`` of images of each class, >= 0; 0 counts as 1.
            largest: margin of the rarest class.
            power: exponent, in [0, 1]; LDAM has 1/4.
            kind: as for :class:`ClassMargin`.
            boundary: likewise.

        Raises:
            TypeError, ValueError: if an argument has a wrong type, shape or range.

        >>> ClassMargin.from_counts([1, 16, 81]).margins
        tensor([0.5000, 0.2500, 0.1667], dtype=torch.float64)
        """
        values = _numbers("counts", counts)
        check_number("ClassMargin: power", power, FROM_0_TO_1)
        check_number("ClassMargin: largest", largest, NOT_NEGATIVE)
        if not bool((values >= 0).all()):
            raise ValueError(f"ClassMargin: counts must be >= 0; got {values.min().item():g}")
        values = values.clamp(min=1)
        return cls(largest * (values.min() / values) ** power, kind, boundary)

    @property
    def num_classes(self) -> int:
        """C_total."""
        return self.margins.shape[0]

    def forward(self, target_cosine: Tensor) -> Tensor:
        """Return modified cosines (N,) of target cosines (N,) with the mean margin."""
        mean = self._on(target_cosine.device).mean().to(target_cosine.dtype)
        return self._modify(target_cosine, mean.expand_as(target_cosine))

    def for_labels(self, labels: Tensor, counted: Tensor) -> RowMargin:
        """Return the batch's :class:`fused_arcface.margins.RowMargin`."""
        margins = self._on(labels.device).index_select(0, labels)
        return RowMargin(lambda cosine: self._modify(cosine, margins.to(cosine.dtype)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassMargin:
        super()._apply(fn, recurse)
        self._on(fn(torch.empty(0, device=self.margins.device)).device)
        return self

    def _on(self, device: torch.device) -> Tensor:
        """Return the margins (C_total,) on this device, and keep them there. The host has a copy."""
        if self.margins.device != device:
            self.margins = self._values.to(device)
        return self.margins

    def _modify(self, target_cosine: Tensor, margins: Tensor) -> Tensor:
        if self.kind == "cos":
            return target_cosine - margins
        return with_angle(target_cosine, margins, self.boundary)

    def extra_repr(self) -> str:
        least, most = self._least, self._greatest
        margins = f"{self.num_classes} margins from {least:g} to {most:g}, digest {self._digest}"
        return f"{margins}, kind={self.kind!r}, boundary={self.boundary!r}"


def _numbers(name: str, values: Any) -> Tensor:
    """Return numbers (C,) as fp64 on the CPU, without a gradient."""
    label = f"ClassMargin: {name}"
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{label} must be a tensor or a sequence of numbers; got {type(values).__name__}") from None
    if numbers.dim() != 1 or numbers.shape[0] == 0:
        raise ValueError(f"{label} must be (C,), one for each class; got {tuple(numbers.shape)}")
    return numbers
