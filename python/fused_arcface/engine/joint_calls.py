"""The collective calls of a head that is split over ranks: what every rank compares, checks and gathers in each."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..base.assigned import ReplaceableOptions
from ..base.checks import check_embeddings, check_row_tensor, check_target
from ..base.dtypes import compute_dtype
from ..parallel.agreement import Agreement, digest_of_shard
from ..parallel.ranks import JointBatch, Ranks
from ..parallel.sharding import Sharding
from ..parallel.wrappers import check_built_in_time, check_unwrapped
from .step import as_autocast, checked_weights
from .targets import Labels, labels_and_share

_COMPARED_CALLS = 2
"""The first one finds shards that were broadcast when a model was wrapped, the second one those that an optimizer
(ZeroRedundancyOptimizer) broadcast in its step."""


class JointCalls(ReplaceableOptions, nn.Module):
    """A head whose ranks make each call together, with the same options.

    :class:`fused_arcface.PartialFC` sets the attributes.
    """

    weight: nn.Parameter
    ranks: Ranks
    sharding: Sharding
    embedding_dim: int
    sample_rate: float
    seed: int
    backend: str
    step: int
    center_optimizer: Any
    center_store: Any
    _calls: Counter[bool]
    """Calls until now, in training and in evaluation."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.ranks = Ranks(group)
        self._calls = Counter()

    @property
    def num_classes(self) -> int:
        return self.sharding.num_classes

    @property
    def class_start(self) -> int:
        return self.sharding.class_start

    @property
    def num_local(self) -> int:
        return self.sharding.num_local

    @property
    def row_start(self) -> int:
        """Global number of this shard's first row of weight, ``class_start·sub_centers``."""
        return self.class_start * self.sub_centers

    @property
    def num_rows(self) -> int:
        """Rows of weight over all ranks, ``num_classes·sub_centers``."""
        return self.num_classes * self.sub_centers

    def row_counts(self) -> list[int]:
        """Rows of weight on each rank."""
        return [count * self.sub_centers for count in self.sharding.counts()]

    def _rows_of(self, classes: Tensor) -> Tensor:
        """Return the rows of weight (K·sub_centers,) of this shard's classes (K,); negative for negative classes."""
        if self.sub_centers == 1:
            return classes
        return (classes[:, None] * self.sub_centers + torch.arange(self.sub_centers, device=classes.device)).flatten()

    def _count_rows(self, classes: Tensor) -> Tensor:
        """Return the number of rows of weight, 0-dim, of padded classes (K,)."""
        count = (classes < self.num_local).sum()
        return count if self.sub_centers == 1 else count * self.sub_centers

    @property
    def device(self) -> torch.device:
        """The computing device: that of weight, unless the class centers are stored elsewhere."""
        device: torch.device = self.weight.device if self.center_store is None else self.center_store.device
        return device

    def _options(self) -> Agreement:
        """Return the head's options as they are now, which must be the same on every rank."""
        names = ("embedding_dim", "num_classes", "sample_rate", "seed", "backend", "dense_grad")
        return {**self.options.describe(), **{name: str(getattr(self, name)) for name in names}}

    def _agreement(self, call: str, **more: Any) -> Agreement:
        """Check this rank's shard, and return the values that must be the same on every rank in this call.

        Raises:
            RuntimeError: if another wrapper holds the class centers.
        """
        shape = (self.sharding.num_local * self.sub_centers, self.embedding_dim)
        check_unwrapped(type(self).__name__, self, shape, self.ranks.group)
        if self.ranks.world_size == 1:
            return {}
        own = {"weight.dtype": self.weight.dtype, **more}
        for name, held in (("margin", self.margin), ("scale", self.scale)):
            if self._calls:  # from then on the same steps change them on every rank
                break
            if isinstance(held, nn.Module):
                own[f"{name}.state"] = {key: tensor.tolist() for key, tensor in held.state_dict().items()}
            elif isinstance(held, Tensor):
                own[f"{name}.value"] = held.item()
        passes = str(self.ranks.backward_passes)
        made = {"call": call, "head": f"number {self.ranks.number} of its group", "backward passes": passes}
        return {**made, **self._options(), **{name: str(value) for name, value in own.items()}}

    def _step_agreement(
        self,
        call: str,
        ignore_index: int,
        loss_weight: float = 1.0,
        reduction: str = "mean",
        sample_weight: Tensor | None = None,
        target: Labels | None = None,
    ) -> Agreement:
        """Return the values that must be the same on every rank in a forward pass and the backward pass after it."""
        check_built_in_time(type(self).__name__, self.ranks.group)
        more: dict[str, Any] = {
            "training": self.training,
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "weight.requires_grad": self.weight.requires_grad,
            "step": self.step,
            "ignore_index": ignore_index,
            "loss_weight": loss_weight,
            "reduction": reduction,
            "target": "mixed" if isinstance(target, (tuple, list)) else "labels",
            "sample_weight": "none" if sample_weight is None else "given",
        }
        for name, held in (("margin", self.margin), ("scale", self.scale)):
            if isinstance(held, nn.Module):
                more[f"{name}.training"] = held.training
            elif isinstance(held, Tensor):
                more[f"{name}.requires_grad"] = held.requires_grad
        if self.center_optimizer is not None:
            more |= {f"center_optimizer.{name}": value for name, value in self.center_optimizer.options.items()}
        return self._agreement(call, **more)

    def _gather(
        self,
        embeddings: Tensor,
        target: Labels | None,
        agreement: Agreement,
        ignore_index: int = -100,
        return_stats: bool = False,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, JointBatch, str]:
        """Check this rank's embeddings (n, D), labels and weights (n,), and gather those of all ranks.

        Returns:
            The embeddings as autocast wants them, the joint batch and the backend.

        Raises:
            TypeError, ValueError, RuntimeError: on every rank, if one of them refuses its arguments.
        """
        with self._refusing():
            check_embeddings(embeddings, self.weight, self.device)
            needs = self.options.needs()
            if target is None:
                target = embeddings.new_zeros(embeddings.shape[0], dtype=torch.int64)
            elif self.center_optimizer is not None and self.training:
                self.center_optimizer.check(self.weight)
                needs |= self.center_optimizer.needs()
            check_target(target, embeddings, ignore_index)
            if not isinstance(return_stats, bool):
                raise TypeError(f"return_stats must be a bool; got {type(return_stats).__name__}")
            if sample_weight is not None:
                check_row_tensor("sample_weight", sample_weight, embeddings)
            sample_weight = checked_weights(sample_weight)
            labels, second, share = labels_and_share(target)
            embeddings = as_autocast(embeddings)
            of_classes = backends.ClassPass(
                embeddings.dtype, embeddings.shape[1], sampled=self.training and self.sample_rate < 1
            )
            dtype = compute_dtype(embeddings, self.weight)
            backend = backends.select(self.backend, embeddings.device, dtype, needs, of_classes, self.weight.dtype)
            shard = self._digest_of_shard()
        batch = self.ranks.gather_batch(
            embeddings.detach(),
            labels,
            type(self).__name__,
            agreement,
            requires_grad=torch.is_grad_enabled() and embeddings.requires_grad,
            return_stats=return_stats,
            shard=shard,
            numbers=[each for each in (sample_weight, second, share) if each is not None],
        )
        self._calls[self.training] += 1
        if batch.requires_grad and torch.is_grad_enabled() and not embeddings.requires_grad:
            # Another rank's embeddings need a gradient. This rank's loss needs a backward pass as well, for the
            # collectives in it.
            embeddings = embeddings.detach().clone().requires_grad_()
        return embeddings, batch, backend

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Run this rank's own checks before a collective; if they raise, every rank raises."""
        try:
            yield
        except Exception:
            self.ranks.refuse_batch(self.device)
            raise

    def _meet(self, call: str) -> None:
        """Begin a collective without a batch: raise on every rank if they make different calls, or on none."""
        with self._refusing():
            agreement = self._agreement(call)
        self.ranks.meet(type(self).__name__, agreement, self.device)

    def _digest_of_shard(self) -> int:
        """Return the digest of the shard for :class:`~fused_arcface.parallel.agreement.Header`.

        It costs a copy of some rows, so it is taken in the first calls of each mode and is 0 later.
        """
        is_compared = self._calls[self.training] >= _COMPARED_CALLS
        if self.ranks.world_size == 1 or is_compared or self.weight.is_meta:
            return 0
        return digest_of_shard(self.weight)
