"""Replacements for ``partial_fc_v2.py``, ``partial_fc.py`` and ``losses.py`` of insightface's ``arcface_torch``.

A training script changes only its import::

    from fused_arcface.compat.insightface import PartialFC_V2, CombinedMarginLoss

insightface's conventions are kept:

- ArcFace's gradient is straight-through, and there is no boundary at ``θ + m = π``.
- The embeddings' gradient is W times the derivative, which data parallelism divides by W.
- The centers' gradient is dense and unscaled.
- ``state_dict`` is ``{"weight": (num_local, D)}``, as in its ``checkpoint_gpu_{rank}.pt``.

insightface's limits are gone: batches may differ between ranks, a process group and CUDA are not needed, a row's loss
is not cut at 69.08, and samples and initial centers do not depend on the number of ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property as _cached_property
from functools import partial as _partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.compiler import not_compiled as _not_compiled
from ..engine.logits import all_rows as _all_rows
from ..engine.nearest import cosines_of as _cosines_of
from ..parallel.ranks import Ranks as _Ranks
from ..partial_fc import PartialFC as _PartialFC
from ._fused_margins import Fused as _Fused
from ._fused_margins import combined as _combined
from ._fused_margins import filtered as _filtered
from ._fused_margins import find_fused as _find_fused
from ._fused_margins import state_key as _state_key
from ._fused_margins import with_margin as _with_margin
from ._sampled_optimizer import KeptRows as _KeptRows

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC", "PartialFCAdamW", "PartialFC_V2"]


class CombinedMarginLoss(nn.Module):
    """insightface's ``CombinedMarginLoss``: ArcFace if ``m1 == 1`` and ``m3 == 0``, CosFace if ``m3 > 0``.

    CosFace ignores m1 and m2, as insightface does.

    Args:
        s: scale of the logits.
        m1: 1, unless ``m3 > 0``.
        m2: angle to add, in radians.
        m3: number to subtract from the cosine.
        interclass_filtering_threshold: negatives with a greater cosine count as cosine 0; 0 for no filter. See
            :class:`fused_arcface.InterclassFilter` for the backends that have it.

    Raises:
        ValueError: if ``m1 != 1`` and ``m3 <= 0``.

    >>> margin_loss = CombinedMarginLoss(64, 1.0, 0.5, 0.0)
    >>> margin_loss(torch.tensor([[0.5, 0.1]]), torch.tensor([[0]]))  # 64·cos(60° + 0.5), 64·0.1
    tensor([[1.5102, 6.4000]])
    """

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0) -> None:
        super().__init__()
        _check_m1(m1, m3)
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return scaled logits (N, C) with the margin.

        Args:
            logits: (N, C) cosines.
            labels: (N, 1) columns of the targets, -1 if the class is in another shard.
        """
        _check_m1(self.m1, self.m3)
        logits = _filtered(logits, labels, self.interclass_filtering_threshold)
        return _with_margin(logits, labels, _combined(self.m2, self.m3)) * self.s


class ArcFace(nn.Module):
    """``s·cos(θ + margin)`` with insightface's gradient, straight-through and without a boundary.

    >>> ArcFace(margin=0.5)(torch.tensor([[0.5, 0.1]]), torch.tensor([[0]]))
    tensor([[1.5102, 6.4000]])
    """

    def __init__(self, s: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.s, self.margin = s, margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return scaled logits (N, C), as :meth:`CombinedMarginLoss.forward`."""
        return _with_margin(logits, labels, _combined(self.margin, 0.0)) * self.s


class CosFace(nn.Module):
    """``s·(cos θ - m)``.

    >>> CosFace(m=0.4)(torch.tensor([[0.5, 0.1]]), torch.tensor([[0]]))
    tensor([[6.4000, 6.4000]])
    """

    def __init__(self, s: float = 64.0, m: float = 0.40) -> None:
        super().__init__()
        self.s, self.m = s, m

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return scaled logits (N, C), as :meth:`CombinedMarginLoss.forward`."""
        return _with_margin(logits, labels, _combined(0.0, self.m)) * self.s


_OWN_FORWARDS: dict[type[nn.Module], Any] = {each: each.forward for each in (CombinedMarginLoss, ArcFace, CosFace)}
_fused = _partial(_find_fused, known=_OWN_FORWARDS)


def _check_m1(m1: float, m3: float) -> None:
    if m3 <= 0 and m1 != 1.0:
        raise ValueError(f"m1 must be 1.0 unless m3 > 0, as in insightface; got m1={m1}, m3={m3}")


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors. Each rank's tensor gets the gradient of the sum, which all ranks have alike."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: _Ranks) -> Tensor:
        return ranks.sum(own.clone())

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return d_sum, None


def _split_cross_entropy(logits: Tensor, target: Tensor, ranks: _Ranks) -> Tensor:
    """Return the rows' cross-entropies (N,) over the logits of all shards.

    This rank has the logits (N, C) of its shard and the target's column (N,), -1 if it is in another shard.
    """
    rows = (target >= 0).nonzero().squeeze(1)
    lse = logits.logsumexp(1)
    greatest = ranks.max(lse.detach().clone())
    target_logit = torch.zeros_like(lse).index_put((rows,), logits[rows, target[rows]])
    total, target_logit = _SumOverRanks.apply(torch.stack([(lse - greatest).exp(), target_logit]), ranks)
    return total.log() + greatest - target_logit


class PartialFC_V2(_PartialFC):
    """insightface's ``PartialFC_V2`` over the fused head, for any number of ranks, or without a process group.

    Two kinds of margins are accepted:

    - A margin of this file or of insightface is fused. Its attributes, such as m2 and s, are read in each forward, so
      they may change between steps. A class with the name ``CombinedMarginLoss``, ``ArcFace`` or ``CosFace`` is fused
      if it has the values and derivatives of the class here. The exact-gradient version of early 2022 has not.
    - Any other callable from cosines (N, C) and labels (N, 1), -1 if the class is in another shard, to logits (N, C).
      Then the logits are stored, and a warning says so.

    Args:
        margin_loss: the margin.
        embedding_size: D, the length of an embedding.
        num_classes: C_total, over all ranks.
        sample_rate: fraction of the classes used in a step.
        fp16: accepted without effect; products follow the embeddings' dtype and autocast, and are summed in fp32.

    Attributes:
        weight, num_local, class_start: as in :class:`fused_arcface.PartialFC`.
        weight_index: (K,) rows of weight that the last step used; only with ``sample_rate < 1``, as in insightface.
        margin_softmax: the margin.
        num_sample, rank, world_size, embedding_size, sample_rate, fp16: as in insightface.

    >>> head = PartialFC_V2(CombinedMarginLoss(64, 1.0, 0.5, 0.0), embedding_size=8, num_classes=100)
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]))
    >>> loss.backward(); head.weight.grad.shape
    torch.Size([100, 8])
    """

    def __init__(
        self,
        margin_loss: Callable[..., Tensor],
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> None:
        with _Ranks().together("PartialFC_V2"):
            if isinstance(margin_loss, type):
                raise TypeError(f"margin_loss must be an instance; got the class {margin_loss.__name__}")
            if not callable(margin_loss):
                raise TypeError(f"margin_loss must be callable; got {type(margin_loss).__name__}")
            fused = _fused(margin_loss)
        options = {} if fused is None else fused._asdict()
        super().__init__(embedding_size, num_classes, sample_rate=sample_rate, dense_grad=True, **options)
        self.margin_softmax = margin_loss
        self._resolved: tuple[Any, _Fused | None] = _state_key(margin_loss), fused
        self.embedding_size, self.fp16 = embedding_size, fp16
        self.rank, self.world_size = self.ranks.rank, self.ranks.world_size
        self.num_sample = int(self.sample_rate * self.num_local)
        self._warned = False

    @property
    def weight_index(self) -> Tensor:
        if self._sampled is None:
            raise AttributeError("weight_index is there after a step with sample_rate < 1")
        return self._sampled

    def _run_state(self) -> dict[str, Tensor]:
        return {}  # the state_dict is insightface's

    def _resolve(self) -> bool:
        """Read the current margin and scale of ``margin_softmax``, and return whether it is fused in this step."""
        key = _state_key(self.margin_softmax)
        if key is None or key != self._resolved[0]:
            self._resolved = key, _fused(self.margin_softmax)
        fused = self._resolved[1]
        if fused is not None:
            self.margin, self.scale = fused
        return fused is not None

    @_not_compiled
    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:  # type: ignore[override]
        """Return the mean loss over all ranks' rows.

        Args:
            local_embeddings: (b, D) of this rank.
            local_labels: (b,) or (b, 1) global labels of this rank.
        """
        labels = local_labels.reshape(-1)
        if self._resolve():
            loss = super().forward(local_embeddings, labels)
            assert isinstance(loss, Tensor)
            return loss
        if not self._warned:
            self._warned = True
            name = type(self.margin_softmax).__name__
            warnings.warn(
                f"PartialFC_V2: {name} is no margin that the fused kernels know: its (N, C) logits are stored. For a "
                "function of the target's cosine alone, fused_arcface.PartialFC(margin=...) needs no logits",
                stacklevel=3,
            )
        with self._refusing():
            agreement = self._step_agreement(f"forward() with {type(self.margin_softmax).__name__}", -100)
        embeddings, batch, _ = self._gather(local_embeddings, labels, agreement)
        # The backbone's gradient is W times the sum over the ranks, as data-parallel wrappers divide by W.
        more = (self.ranks.world_size - 1) * (embeddings - embeddings.detach())
        rows = _all_rows(embeddings + more, batch, self.ranks)
        target = torch.ops.fused_arcface.local_target(batch.labels, self.num_classes, -100)
        classes, local = self._choose_classes(target)
        weight = self.weight if classes is None else self.weight.index_select(0, classes)
        logits = self.margin_softmax(_cosines_of(rows, weight).clamp(-1, 1), local[:, None])
        loss = _split_cross_entropy(logits, local, self.ranks)
        counted = target >= 0
        return loss.masked_fill(~counted, 0).sum() / counted.sum()


class PartialFC(PartialFC_V2):
    """insightface's ``PartialFC`` of 2022, which takes the optimizer in each call: ``loss = head(x, y, optimizer)``.

    As in insightface, a step with ``sample_rate < 1`` changes only the sampled class centers: the others keep their
    values and momentum, without weight decay. ``parameters()`` has all centers as ``weight``, not a new
    ``weight_activated`` in each step, so the head's parameters may be in any group of the optimizer. A step copies the
    rows that it keeps; :class:`fused_arcface.PartialFC` with :class:`fused_arcface.CenterSGD` does the same update
    without a copy.

    Args, attributes and errors are those of :class:`PartialFC_V2`.

    >>> head = PartialFC(ArcFace(), embedding_size=8, num_classes=100, sample_rate=0.1)
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    >>> head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]), optimizer).backward(); optimizer.step()
    """

    _optimizers: tuple[type[torch.optim.Optimizer], ...] = (torch.optim.SGD,)

    @_cached_property
    def _kept_rows(self) -> _KeptRows:
        return _KeptRows(self.weight, self._others)

    def _others(self) -> Tensor | None:
        """Return the rows of weight that the last step did not sample; None if it used all."""
        if self._sampled is None:
            return None
        kept = torch.ones(len(self.weight), dtype=torch.bool, device=self.weight.device)
        kept[self._sampled] = False
        return kept.nonzero().squeeze(1)

    @_not_compiled
    def forward(  # type: ignore[override]
        self, local_embeddings: Tensor, local_labels: Tensor, optimizer: torch.optim.Optimizer
    ) -> Tensor:
        """Return the mean loss over all ranks' rows.

        Args:
            local_embeddings: (b, D) of this rank.
            local_labels: (b,) or (b, 1) global labels of this rank.
            optimizer: the one that updates the class centers; the same in each call.

        Raises:
            TypeError: if the optimizer is of another kind, on every rank.
        """
        with self._refusing():
            if not isinstance(optimizer, self._optimizers):
                kinds = " or ".join(each.__name__ for each in self._optimizers)
                raise TypeError(f"optimizer must be torch.optim.{kinds}; got {type(optimizer).__name__}")
            if self.sample_rate < 1:
                self._kept_rows.watch(optimizer)
        return super().forward(local_embeddings, local_labels)


class PartialFCAdamW(PartialFC):
    """insightface's ``PartialFCAdamW`` of 2022: :class:`PartialFC` for ``torch.optim.Adam`` and ``AdamW``.

    >>> head = PartialFCAdamW(CosFace(), embedding_size=8, num_classes=100, sample_rate=0.1)
    >>> optimizer = torch.optim.AdamW(head.parameters())
    >>> head(torch.randn(4, 8), torch.tensor([0, 1, 2, 99]), optimizer).backward(); optimizer.step()
    """

    _optimizers = (torch.optim.Adam, torch.optim.AdamW)
