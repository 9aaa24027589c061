"""Types of the calls that return the loss, or with ``return_stats=True`` the loss and the rows' statistics.

Type checkers read these; nothing here is needed at run time.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypedDict, overload

from torch import Tensor

from .base.statistics import MarginSoftmaxStats
from .margins import Margin

LossAndStats = tuple[Tensor, MarginSoftmaxStats]
Reduction = Literal["mean", "sum", "none"]
# Editors offer these; a name out of ``backends.available()`` is a str.
Backend = Literal["auto", "torch", "reference", "cpu", "triton", "cuda"] | str


class LossOptions(TypedDict, total=False):
    """The options of :func:`fused_arcface.margin_softmax_loss` but ``return_stats``."""

    margin: Margin
    scale: float
    reduction: Reduction
    ignore_index: int
    backend: Backend
    sub_centers: int
    label_smoothing: float


class HeadCall(Protocol):
    """The call of a :class:`fused_arcface.MarginHead`."""

    @overload
    def __call__(
        self, embeddings: Tensor, target: Tensor, *, ignore_index: int = ..., return_stats: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def __call__(
        self, embeddings: Tensor, target: Tensor, *, ignore_index: int = ..., return_stats: Literal[True]
    ) -> LossAndStats: ...
    @overload
    def __call__(
        self, embeddings: Tensor, target: Tensor, *, ignore_index: int = ..., return_stats: bool
    ) -> Tensor | LossAndStats: ...


class PartialFCCall(Protocol):
    """The call of a :class:`fused_arcface.PartialFC`."""

    @overload
    def __call__(
        self,
        embeddings: Tensor,
        target: Tensor,
        *,
        ignore_index: int = ...,
        return_stats: Literal[False] = ...,
        loss_weight: float = ...,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        embeddings: Tensor,
        target: Tensor,
        *,
        ignore_index: int = ...,
        return_stats: Literal[True],
        loss_weight: float = ...,
    ) -> LossAndStats: ...
    @overload
    def __call__(
        self,
        embeddings: Tensor,
        target: Tensor,
        *,
        ignore_index: int = ...,
        return_stats: bool,
        loss_weight: float = ...,
    ) -> Tensor | LossAndStats: ...
