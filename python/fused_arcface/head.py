"""The head as a module: class centers and the loss over them, on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import backends
from .base.assigned import ReplaceableOptions
from .base.checks import check_center_dtype, check_embeddings, check_labels, check_size
from .base.compiler import NotScriptable
from .base.options import HeadOptions
from .base.statistics import MarginSoftmaxStats
from .engine.logits import check_size_of_logits, logits_of
from .engine.nearest import cosines_of, nearest_classes
from .engine.step import as_autocast, loss_on_one_device
from .engine.targets import Labels
from .margins.angular import ArcFace
from .margins.protocol import Margin
from .margins.scale import Scale

if TYPE_CHECKING:
    from .calls import Backend, HeadCall


class MarginHead(NotScriptable, ReplaceableOptions, nn.Module):
    """Classification head with a margin: ``loss = head(embeddings, target)`` for any backbone.

    If torch.distributed has several ranks, a margin with a state, such as :class:`~fused_arcface.AdaFace`, gets the
    rows of all of them in ``train()``. Every rank of the default group must then call the head. In a
    ``torch.utils.checkpoint`` the step of such a margin is recomputed from the state that it had.

    Args:
        embedding_dim: D, the length of an embedding.
        num_classes: C, the number of classes.
        margin: see :func:`fused_arcface.margin_softmax_loss`; likewise scale and backend.
        scale: ``s`` of the logits, see :func:`fused_arcface.margin_softmax_loss`.
        backend: ``"auto"`` or a backend's name.
        device: device of the class centers.
        dtype: dtype of the class centers; the default dtype if None.
        sub_centers: see :func:`fused_arcface.margin_softmax_loss`; likewise label_smoothing.
        label_smoothing: in [0, 1].

    Attributes:
        weight: (C·sub_centers, D) parameter, the class centers, drawn from N(0, 0.01²).

    Raises:
        TypeError, ValueError: if an argument has a wrong type or is out of its range.

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
        self.options = options
        self.weight = nn.Parameter(torch.empty(num_classes * sub_centers, embedding_dim, device=device, dtype=dtype))
        place_margin(margin, self.weight.device)
        place_margin(scale, self.weight.device)
        self.reset_parameters()

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

        The other arguments and the errors are those of :func:`fused_arcface.margin_softmax_loss`.
        """
        options = self.options
        return loss_on_one_device(
            embeddings, self.weight, target, options, self.backend, reduction, ignore_index, return_stats, sample_weight
        )

    def logits(self, embeddings: Tensor, target: Tensor | None = None, *, ignore_index: int = -100) -> Tensor:
        """Return ``s·cos θ`` (N, C) of embeddings (N, D) with every class; differentiable, in the loss's dtype.

        Args:
            embeddings: (N, D).
            target: (N,) labels: the logits then have the margin, and their ``cross_entropy`` is the loss. A margin with
                a state is used as in ``eval()``. None: no margin.
            ignore_index: the label of rows without a margin.

        Raises:
            ValueError: if there are more than 2^30 numbers (4 GiB in fp32), or a target beside a margin with binary
                losses.
        """
        check_embeddings(embeddings, self.weight)
        num_classes = self.weight.shape[0] // self.sub_centers
        check_size_of_logits(embeddings.shape[0], num_classes)
        if target is not None:
            check_labels(target, embeddings, ignore_index)
        rows, options = as_autocast(embeddings), self.options
        cosines = cosines_of(rows, self.weight, self.sub_centers)
        return logits_of(cosines, rows, target, ignore_index, options, options.current_scale(num_classes))

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the cosines (N, k), descending, and ids (N, k) int64 of the k nearest classes to embeddings (N, D).

        Raises:
            ValueError: if k is outside [1, C], or the embeddings have a wrong shape or device.
        """
        check_embeddings(embeddings, self.weight)
        k = check_size("k", k)
        num_classes = self.weight.shape[0] // self.sub_centers
        if k > num_classes:
            raise ValueError(f"k must be <= C={num_classes}; got {k}")
        return nearest_classes(as_autocast(embeddings), self.weight, k, self.sub_centers)

    def extra_repr(self) -> str:
        rows, embedding_dim = self.weight.shape
        return f"{embedding_dim}, {rows // self.sub_centers}, {self.options}, backend={self.backend!r}"


def place_margin(margin: Margin | Scale, device: torch.device) -> None:
    """Move a margin, or a scale, with a state to the device of the class centers."""
    if isinstance(margin, nn.Module):
        margin.to(device)
