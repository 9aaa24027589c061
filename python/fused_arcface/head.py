"""The head as a module: class centers and the loss over them, on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends
from .base.checks import check_center_dtype, check_embeddings, check_size
from .base.compiler import NotScriptable
from .base.dtypes import compute_dtype
from .base.normalize import unit_rows, without_autocast
from .base.options import HeadOptions
from .base.statistics import MarginSoftmaxStats
from .engine.step import as_autocast, loss_on_one_device
from .engine.targets import Labels
from .margins.angular import ArcFace, Margin
from .margins.scale import Scale

if TYPE_CHECKING:
    from .calls import Backend, HeadCall

# Classes whose cosines topk holds at once: (N, 16384) floats, 16 MiB at N = 256.
_TOPK_CLASSES = 16384


class MarginHead(NotScriptable, nn.Module):
    """Classification head with a margin: ``loss = head(embeddings, target)`` for any backbone.

    A margin with a state, such as :class:`~fused_arcface.AdaFace`, gets the rows of all ranks in ``train()`` where
    torch.distributed has several: every rank of the default group then has to call the head. In a
    ``torch.utils.checkpoint`` its step is recomputed from the state that it had.

    Args:
        embedding_dim: D, the length of an embedding.
        num_classes: C, the number of classes.
        margin: see :func:`fused_arcface.margin_softmax_loss`; likewise scale and backend.
        scale: ``s`` of the logits, see :func:`fused_arcface.margin_softmax_loss`.
        backend: ``"auto"`` or a backend's name.
        device: of the class centers.
        dtype: of the class centers; the default dtype if None.
        sub_centers: see :func:`fused_arcface.margin_softmax_loss`; likewise label_smoothing.
        label_smoothing: in [0, 1].

    Attributes:
        weight: (C·sub_centers, D) parameter, the class centers, drawn from N(0, 0.01²).

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of its range.

    >>> import torch
    >>> head = MarginHead(embedding_dim=8, num_classes=5)
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 4]))
    >>> loss.backward(); head.weight.grad.shape
    torch.Size([5, 8])
    """

    weight: nn.Parameter
    if TYPE_CHECKING:
        __call__: HeadCall

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        margin: Margin = ArcFace(),
        scale: Scale = 64.0,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sub_centers: int = 1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        embedding_dim = check_size("embedding_dim", embedding_dim)
        num_classes = check_size("num_classes", num_classes)
        options = HeadOptions(margin, scale, sub_centers, label_smoothing)
        options.check_classes(num_classes)
        check_center_dtype(dtype)
        self.backend = backends.check_name(backend)
        self.margin, self.scale = options.margin, options.scale
        self.sub_centers, self.label_smoothing = options.sub_centers, options.label_smoothing
        self.weight = nn.Parameter(torch.empty(num_classes * sub_centers, embedding_dim, device=device, dtype=dtype))
        place_margin(margin, self.weight.device)
        place_margin(scale, self.weight.device)
        self.reset_parameters()

    @property
    def options(self) -> HeadOptions:
        """The options of the loss, as they are now."""
        return HeadOptions(self.margin, self.scale, self.sub_centers, self.label_smoothing)

    def reset_parameters(self) -> None:
        """Draw the class centers anew from N(0, 0.01²)."""
        nn.init.normal_(self.weight, std=0.01)

    def forward(
        self,
        embeddings: Tensor,
        target: Labels,
        *,
        ignore_index: int = -100,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
        """Return the loss of embeddings (N, D) with labels (N,), and the rows' statistics if asked for.

        target, sample_weight and reduction are those of :func:`fused_arcface.margin_softmax_loss`, as are the errors.
        """
        options = self.options
        return loss_on_one_device(
            embeddings, self.weight, target, options, self.backend, reduction, ignore_index, return_stats, sample_weight
        )

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return ``s·cos θ`` (N, C) of embeddings (N, D) with every class, without a margin; differentiable.

        The result has the loss's dtype.
        """
        check_embeddings(embeddings, self.weight)
        scale = self.options.current_scale(self.weight.shape[0] // self.sub_centers)
        cosines = cosines_of(as_autocast(embeddings), self.weight, self.sub_centers)
        return (scale.to(cosines.dtype) if isinstance(scale, Tensor) else scale) * cosines

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the cosines (N, k), descending, and ids (N, k) int64 of the k nearest classes to embeddings (N, D).

        Raises:
            ValueError: k outside [1, C], or embeddings of a wrong shape or device.
        """
        check_embeddings(embeddings, self.weight)
        k = check_size("k", k)
        num_classes = self.weight.shape[0] // self.sub_centers
        if k > num_classes:
            raise ValueError(f"k must be <= C={num_classes}; got {k}")
        return nearest_classes(embeddings, self.weight, k, self.sub_centers)

    def extra_repr(self) -> str:
        rows, embedding_dim = self.weight.shape
        return f"{embedding_dim}, {rows // self.sub_centers}, {self.options}, backend={self.backend!r}"


def place_margin(margin: Margin | Scale, device: torch.device) -> None:
    """Move a margin, or a scale, with a state to the device of the class centers."""
    if isinstance(margin, nn.Module):
        margin.to(device)


def cosines_of(rows: Tensor, weight: Tensor, sub_centers: int = 1) -> Tensor:
    """Return the cosines (R, C) of rows (R, D) with the classes of weight (C·sub_centers, D).

    A class's cosine is the greatest of its centers'. The dtype is that of the loss's sums, autocast or not: in bf16
    cosines would be 0.004 off, more than neighboring classes differ by.
    """
    dtype = compute_dtype(rows, weight)
    with without_autocast(rows.device):
        cosines = F.linear(unit_rows(rows.to(dtype)), unit_rows(weight.to(dtype)))
    return cosines if sub_centers == 1 else cosines.unflatten(1, (-1, sub_centers)).amax(2)


def nearest_classes(embeddings: Tensor, weight: Tensor, k: int, sub_centers: int = 1) -> tuple[Tensor, Tensor]:
    """Return the cosines (N, min(k, C)), descending, and ids of the nearest classes, int64.

    Embeddings are (N, D), weight is (C·sub_centers, D).
    """
    embeddings = as_autocast(embeddings)
    cosines = embeddings.new_empty(embeddings.shape[0], 0, dtype=compute_dtype(embeddings, weight))
    classes = torch.empty(embeddings.shape[0], 0, dtype=torch.int64, device=embeddings.device)
    step, num_classes = max(_TOPK_CLASSES, k), weight.shape[0] // sub_centers
    for start in range(0, num_classes, step):
        chunk = cosines_of(embeddings, weight[start * sub_centers : (start + step) * sub_centers], sub_centers)
        ids = torch.arange(start, start + chunk.shape[1], device=chunk.device).expand_as(chunk)
        cosines, classes = torch.cat([cosines, chunk], 1), torch.cat([classes, ids], 1)
        cosines, best = cosines.topk(min(k, cosines.shape[1]))
        classes = classes.gather(1, best)
    return cosines, classes
