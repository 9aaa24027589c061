"""Types of the calls that return the loss, or with ``return_stats=True`` the loss and the rows' statistics.

Type checkers read these; nothing here is needed at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, overload

from torch import Tensor

from .base.statistics import MarginSoftmaxStats
from .engine.targets import Labels
from .margins import Margin
from .margins.scale import Scale

if TYPE_CHECKING:
    from typing_extensions import Unpack

LossAndStats = tuple[Tensor, MarginSoftmaxStats]
Reduction = Literal["mean", "sum", "none"]
# Editors offer these names. To a type checker a name of ``backends.available()`` is any str.
Backend = Literal["auto", "torch", "reference", "cpu", "triton", "cuda"] | str


class LossOptions(TypedDict, total=False):
    """The options of :func:`fused_arcface.margin_softmax_loss`, except ``return_stats``."""

    margin: Margin
    scale: Scale
    reduction: Reduction
    ignore_index: int
    backend: Backend
    sub_centers: int
    label_smoothing: float
    sample_weight: Tensor | None


class HeadOptionsOfCall(TypedDict, total=False):
    """The options of a :class:`fused_arcface.MarginHead`'s call, except ``return_stats``."""

    ignore_index: int
    sample_weight: Tensor | None
    reduction: Reduction


class PartialFCOptionsOfCall(HeadOptionsOfCall, total=False):
    """The options of a :class:`fused_arcface.PartialFC`'s call, except ``return_stats``."""

    loss_weight: float


class HeadCall(Protocol):
    """The call of a :class:`fused_arcface.MarginHead`."""

    @overload
    def __call__(
        self,
        embeddings: Tensor,
        target: Labels,
        *,
        return_stats: Literal[False] = ...,
        **options: Unpack[HeadOptionsOfCall],
    ) -> Tensor: ...
    @overload
    def __call__(
        self, embeddings: Tensor, target: Labels, *, return_stats: Literal[True], **options: Unpack[HeadOptionsOfCall]
    ) -> LossAndStats: ...
    @overload
    def __call__(
        self, embeddings: Tensor, target: Labels, *, return_stats: bool, **options: Unpack[HeadOptionsOfCall]
    ) -> Tensor | LossAndStats: ...


class PartialFCCall(Protocol):
    """The call of a :class:`fused_arcface.PartialFC`."""

    @overload
    def __call__(
        self,
        embeddings: Tensor,
        target: Labels,
        *,
        return_stats: Literal[False] = ...,
        **options: Unpack[PartialFCOptionsOfCall],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        embeddings: Tensor,
        target: Labels,
        *,
        return_stats: Literal[True],
        **options: Unpack[PartialFCOptionsOfCall],
    ) -> LossAndStats: ...
    @overload
    def __call__(
        self, embeddings: Tensor, target: Labels, *, return_stats: bool, **options: Unpack[PartialFCOptionsOfCall]
    ) -> Tensor | LossAndStats: ...
