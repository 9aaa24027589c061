"""The head over many ranks: class centers split between them, all of them or a sample used each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends
from .base.checks import check_center_dtype, check_reduction, check_seed, check_size
from .base.compiler import NotScriptable, check_not_transformed, not_compiled
from .base.options import HeadOptions
from .base.permutation import KeyedPermutation, Permutation
from .base.ranges import ABOVE_0_TO_1, NOT_NEGATIVE, check_number
from .base.statistics import MarginSoftmaxStats
from .center_optimizer import CenterOptimizer, CenterRecipe, CentersUpdatedInBackward
from .engine.shard import Shard, own_losses
from .engine.step import loss_over_classes
from .engine.targets import Labels, Rows, Target
from .engine.terms import INVALID
from .head import place_margin
from .margins.angular import ArcFace
from .margins.protocol import Margin
from .margins.scale import Scale
from .parallel.sampling import Sampler
from .parallel.sharding import Sharding
from .store import CenterStorage, StepRows, check_storage, make_store, weight_device
from .store import waits as _is_waited_for
from .stored_centers import StoredCenters

if TYPE_CHECKING:
    from .calls import Backend, PartialFCCall


class PartialFC(NotScriptable, StoredCenters):
    """Margin-softmax head whose class centers are split over the ranks of a group: ``loss = head(embeddings, target)``.

    Every rank passes its own batch, of any size, and gets the mean loss over all ranks' rows. Without torch.distributed
    it is one shard, the same as :class:`~fused_arcface.MarginHead` with sampling and a fused optimizer.

    **Gradients.** The embeddings' gradient is W times the loss's derivative, W the number of ranks:
    ``DistributedDataParallel`` and FSDP average over the ranks, so the backbone then trains as a single process would
    on all ranks' rows. The class centers' gradient is the derivative, unscaled. Every rank must run the backward pass,
    from the same multiple of the loss.

    **Wrappers.** Each rank holds its own shard, which nothing may broadcast, average or shard again. Build the head
    after the process group and keep it outside of ``DistributedDataParallel``, FSDP and Accelerate's ``prepare()``. A
    head inside a wrapped model needs one line before the model is wrapped; without it the first step raises. With DDP,
    and at the end of a ``LightningModule``'s ``configure_model()``::

        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["head.weight"])

    With FSDP2 it is ``fully_shard(model, ignored_params={model.head.weight})``. FSDP2 then does not move the head to
    the device either.

    **Agreement.** Options and modes are compared between the ranks in each step (scale, margin, learning rate,
    ``train()``, gradient mode, ``ignore_index`` and so on). A difference raises the same ValueError on every rank. An
    error on one rank raises on the others as well. Statistics, and the gradient by the embeddings, may differ: some
    ranks alone may ask for them.

    **State.** ``state_dict()`` continues a run: it has ``weight``, ``step`` and, with a center_optimizer,
    its ``momentum_buffer``, ``momentum_scale`` and ``settings`` (lr, momentum, weight_decay), as
    ``center_optimizer.momentum_buffer`` and so on. A dict with ``weight`` alone passes ``strict=True`` too. It
    begins a run, at step 0 with zero momentum. Each rank has its own shard's rows.

    **Sampling.** With ``sample_rate`` below 1 a step uses all classes of the joint batch and others drawn anew each
    step, ``round(sample_rate·C_total)`` over all shards (An et al., Partial FC, arXiv:2203.15565). The draw is a
    function of seed, step and global class id, not of the number of ranks. The rows of other classes are neither read
    nor written. In ``eval()`` all classes are used, and a fused optimizer leaves them as they are.

    Args:
        embedding_dim: D, the length of an embedding.
        num_classes: C_total, over all ranks.
        margin: see :func:`fused_arcface.margin_softmax_loss`; likewise scale and backend.
        scale: ``s`` of the logits; the gradient of a 0-dim parameter is the same on every rank, the derivative.
        sample_rate: fraction of the classes used in a training step, in (0, 1].
        group: a process group, a one-dimensional ``DeviceMesh``, or None: the default group if torch.distributed is
            initialized.
        seed: seed of the initial centers, the samples and the rounding, in [0, 2^63).
        center_optimizer: a :class:`fused_arcface.CenterSGD` recipe, or None for an ordinary optimizer over
            ``weight.grad``: dense at ``sample_rate=1``, else sparse COO (``torch.optim.SGD``, ``SparseAdam``,
            ``Adagrad`` take it).
        backend: ``"auto"`` or a backend's name.
        device: device of the class centers.
        dtype: dtype of the class centers; the default dtype if None.
        dense_grad: give the sampled mode's gradient densely, (num_local, D), for optimizers that take no other.
        sub_centers: K rows of weight for each class, see :func:`fused_arcface.margin_softmax_loss`; those of a class
            are on one rank. A shape of C_total or num_local rows then has K times as many.
        label_smoothing: in [0, 1]; only with all classes in each step and an ordinary optimizer: its gradient reaches
            every class center.
        center_storage: ``"device"``; ``"host"`` for host memory, from which each step's sample is copied to
            ``device``; or the path of a folder for a file, in which a row takes space once it is used. The last two
            need ``sample_rate < 1`` and a CenterSGD. The trained centers are the same.

    Attributes:
        weight: (num_local, D) parameter, this rank's class centers, initially N(0, 0.01²) keyed by seed and global
            class id.
        class_start: global id of the first of them.
        num_local: their number: ``C_total // W``, one more on the first ``C_total % W`` ranks.
        center_optimizer: the :class:`~fused_arcface.center_optimizer.CenterOptimizer` made of the recipe, for
            schedulers; or None.
        center_store: the :class:`~fused_arcface.store.CenterStore` of another ``center_storage`` than ``"device"``.
        sampled: (K,) int64, ascending global ids of the classes that this shard used in the last step.
        step: training steps so far, as the samples and the rounding count them.

    Raises:
        TypeError, ValueError: if an argument has a wrong type or is out of its range, or differs between ranks.
        RuntimeError: if another rank refused its arguments.

    >>> import torch
    >>> head = PartialFC(embedding_dim=8, num_classes=1000, sample_rate=0.1)
    >>> loss = head(torch.randn(4, 8), torch.tensor([0, 1, 2, 999]))
    >>> loss.backward(); head.weight.grad.coalesce().indices().shape
    torch.Size([1, 100])
    """

    weight: nn.Parameter
    # None without a recipe. With Any, as in typeshed, a checker does not ask for a test before each use.
    center_optimizer: CenterOptimizer | Any
    if TYPE_CHECKING:
        __call__: PartialFCCall

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        margin: Margin = ArcFace(),
        scale: Scale = 64.0,
        sample_rate: float = 1.0,
        group: Any = None,
        seed: int = 0,
        center_optimizer: CenterRecipe | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dense_grad: bool = False,
        sub_centers: int = 1,
        label_smoothing: float = 0.0,
        center_storage: CenterStorage = "device",
    ) -> None:
        super().__init__(group)
        with self.ranks.together(type(self).__name__):
            embedding_dim = check_size("embedding_dim", embedding_dim)
            num_classes = check_size("num_classes", num_classes)
            options = HeadOptions(margin, scale, sub_centers, label_smoothing)
            options.check_classes(num_classes)
            check_number("sample_rate", sample_rate, ABOVE_0_TO_1)
            seed = check_seed(seed)
            if not isinstance(dense_grad, bool):
                raise TypeError(f"dense_grad must be a bool; got {type(dense_grad).__name__}")
            if center_optimizer is not None and not isinstance(center_optimizer, CenterRecipe):
                raise TypeError(
                    "center_optimizer must be a recipe such as CenterSGD, or None; got "
                    f"{type(center_optimizer).__name__}"
                )
            if label_smoothing > 0 and (sample_rate < 1 or center_optimizer is not None):
                option = f"sample_rate={sample_rate}" if sample_rate < 1 else "a center_optimizer"
                raise ValueError(
                    f"label_smoothing must be 0 with {option}: its gradient reaches every class center in each step; "
                    f"use sample_rate=1 and an ordinary optimizer over weight.grad; got {label_smoothing}"
                )
            check_center_dtype(dtype)
            storage = check_storage(center_storage, sample_rate, center_optimizer is not None)
            self.backend = backends.check_name(backend)
        self.options = options
        self.sample_rate, self.seed, self.dense_grad, self.step = float(sample_rate), seed, dense_grad, 0
        self.embedding_dim = embedding_dim
        self.sharding = Sharding(num_classes, self.ranks.world_size, self.ranks.rank)
        own = {
            "center_optimizer": repr(center_optimizer),
            "dtype": str(dtype or torch.get_default_dtype()),
            "center_storage": storage,
        }
        self.ranks.check_agreement(type(self).__name__, {**self._options(), **own})
        self.ranks.number_head()
        self._sampled: Tensor | None = None
        with self.ranks.together(type(self).__name__):  # a rank may lack the device, or memory
            parameter = nn.Parameter if center_optimizer is None else CentersUpdatedInBackward
            place, shape = weight_device(storage, device), (self.num_local * sub_centers, embedding_dim)
            self.weight = parameter(torch.empty(shape, device=place, dtype=dtype))
            self.center_optimizer = center_optimizer and center_optimizer.make(self.weight, seed, self.row_start)
        self.center_store = make_store(storage, self._held(), device, self.num_rows, self.row_start, seed, self.ranks)
        with self.ranks.together(type(self).__name__):
            place_margin(margin, self.device)
            place_margin(scale, self.device)
            self.reset_parameters()

    @property
    def sampled(self) -> Tensor:
        if self._sampled is None:
            return torch.arange(self.class_start, self.class_start + self.num_local, device=self.device)
        return self._sampled[self._sampled < self.num_local] + self.class_start

    # torch.compile calls it between its graphs: a step has a number and sizes that only the data tell.
    @not_compiled
    def forward(
        self,
        embeddings: Tensor,
        target: Labels,
        *,
        ignore_index: int = -100,
        return_stats: bool = False,
        loss_weight: float = 1.0,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
        """Return the loss over all ranks' rows, equal on every rank.

        A collective: every rank calls it, with n = 0 if it has no rows.

        Args:
            embeddings: (n, D), this rank's rows.
            target: (n,) global labels of any integer dtype, or mixed labels ``(first, second, share)``.
            ignore_index: The label of rows that are ignored.
            return_stats: If true, also return the :class:`~fused_arcface.MarginSoftmaxStats` of this rank's rows.
            loss_weight: factor of the returned loss, finite and >= 0, the same on every rank: the weight of this head
                among several losses. :class:`~fused_arcface.CenterSGD` follows the weighted loss. A factor that
                multiplies the loss afterwards does not reach the centers.
            sample_weight: (n,) factors of this rank's row losses, finite and >= 0, without a gradient; on every rank or
                on none. The mean divides by their sum over all ranks' rows that count.
            reduction: ``"mean"`` or ``"sum"`` over all ranks' rows, or ``"none"``: the losses (n,) of this rank's rows.
                The gradients are then those of the sum over the ranks of the numbers that each computes from its rows.

        Raises:
            TypeError, ValueError: as :func:`fused_arcface.margin_softmax_loss`; a wrong label raises on every rank. An
                option, mode, dtype or call that differs between ranks raises on every rank.
            RuntimeError: if another rank refused its arguments; if a wrapper of all ranks' parameters holds the class
                centers; if the head is older than the process group; if a backward pass recomputes the step; or if a
                CUDA graph captures a sampled step, or one with CenterSGD.
        """
        if self.training and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "PartialFC cannot be recomputed in a backward pass: it would be another step, with another sample. "
                "Keep the head outside of torch.utils.checkpoint; it stores no logits that would be worth it"
            )
        store = self.center_store if self.training else None
        with self._refusing():
            check_not_transformed(type(self).__name__)
            self._check_not_captured()
            check_number("loss_weight", loss_weight, NOT_NEGATIVE)
            self._check_reachable()
            self._check_reduction(reduction)
            self.options.check_step(target, self.num_classes, self.device)
            agreement = self._step_agreement("forward()", ignore_index, loss_weight, reduction, sample_weight, target)
        embeddings, batch, backend = self._gather(
            embeddings, target, agreement, ignore_index, return_stats, sample_weight
        )
        numbers = iter(batch.numbers)
        factors = None if sample_weight is None else next(numbers)
        second, share = next(numbers, None), next(numbers, None)
        labels = [batch.labels] if second is None else [batch.labels, second]
        target_class = torch.cat(
            [torch.ops.fused_arcface.local_target(each, self.num_classes, ignore_index) for each in labels]
        )
        # A gradient needs the sample's size, for which the host waits. CenterSGD needs no gradient.
        chosen_on = target_class if store is None else store.place(target_class)
        waits = self.center_optimizer is not None and _is_waited_for(chosen_on.device)
        padded = waits and backends.has(backend, "padding")
        is_fused = chosen_on is target_class and backends.has(backend, "permutation")
        permutation = backends.load(backend).Permutation if is_fused else Permutation
        classes, chosen_class = self._choose_classes(chosen_on, padded, permutation)
        rows = None if classes is None else self._rows_of(classes)
        count = self._count_rows(classes) if padded and classes is not None else None
        weight: Tensor = self.weight
        update = sampled = None
        updates = self.training and weight.requires_grad and torch.is_grad_enabled()
        if store is not None and rows is not None:
            targets = self._rows_of(self.sharding.localize(chosen_on))
            upcoming, draw = self._upcoming(chosen_on.device, padded), (self.sample_rate, self.seed)
            # A disk may be full on one rank: then no rank goes on to the next collective.
            with contextlib.nullcontext() if store.in_memory else self.ranks.together("center_storage"):
                sampled = store.take(self._held(), StepRows(self.step, draw, rows, targets, updates, upcoming))
            weight, rows = sampled.tensors["weight"].detach().requires_grad_(updates), None
            chosen_class = chosen_class.to(target_class.device, non_blocking=True)
        if self.center_optimizer is not None:
            if updates:
                update = self.center_optimizer.prepare(self.step, self.weight, self.margin, self.scale, sampled)
            else:  # neither an update nor a gradient
                weight = weight.detach()
        shard = Shard(
            ranks=self.ranks,
            batch=batch,
            num_classes=self.num_classes,
            classes=rows,
            class_count=count,
            dense_grad=self.dense_grad,
            with_max=batch.return_stats,
            update=None if update is None else update.apply,
        )
        first, *of_second = map(Target, target_class.split(len(batch.labels)), chosen_class.split(len(batch.labels)))
        of_rows = Rows(first, factors, of_second[0] if of_second else None, share)
        loss, stats = loss_over_classes(
            embeddings, weight, of_rows, self.options, reduction, backend, shard, return_stats
        )
        loss = loss * loss_weight
        if reduction == "none":
            loss = own_losses(loss, batch, self.ranks)
        if update is not None:
            loss = update.watch(loss)
        return loss if stats is None else (loss, MarginSoftmaxStats(*map(batch.own, stats)))

    def _check_not_captured(self) -> None:
        """Check that no CUDA graph records a step that must differ in each replay."""
        if not (self.training and _is_captured(self.device)):
            return
        own = self.center_optimizer and self.center_optimizer.recipe.__name__
        for name, is_used in (("sample_rate < 1", self.sample_rate < 1), (own, own)):
            if is_used:
                raise RuntimeError(
                    f"PartialFC with {name} cannot be captured in a CUDA graph: its step has a number, and every "
                    "replay would draw the same random numbers. Capture the backbone alone"
                )

    def _check_reduction(self, reduction: str) -> None:
        """Check the reduction of a step: an update of the centers in the backward pass follows a single loss."""
        check_reduction(reduction)
        updates = self.center_optimizer is not None and self.training and self.weight.requires_grad
        if reduction == "none" and updates:
            raise ValueError(
                "reduction must be 'mean' or 'sum' with a center_optimizer, which follows the loss that the head "
                "returns: weight the rows by the argument sample_weight, or use an ordinary optimizer; got 'none'"
            )

    def _choose_classes(
        self, target_class: Tensor, padded: bool = False, permutation: type[KeyedPermutation] = Permutation
    ) -> tuple[Tensor | None, Tensor]:
        """Count a training step and draw its classes of this shard.

        Args:
            target_class: (N,) int64 global classes, or negative.
            padded: If true, pad the classes, see :class:`Sampler`.
            permutation: The implementation of the draw.

        Returns:
            The classes (K,) of this shard, None for all, and each row's target as an index into them (N,), negative if
            it is in another shard.
        """
        local_class = self.sharding.localize(target_class)
        self._sampled = None
        if not self.training:
            return None, local_class
        self.step += 1
        if self.sample_rate == 1:
            return None, local_class
        sampler = Sampler(self.sharding, self.sample_rate, self.seed, permutation)
        self._sampled = sampler(self.step, target_class, padded)
        chosen_class = torch.where(local_class < 0, local_class, torch.searchsorted(self._sampled, local_class))
        if padded:
            chosen_class.masked_fill_(chosen_class >= len(self._sampled), INVALID)
        return self._sampled, chosen_class

    def _upcoming(self, device: torch.device, padded: bool) -> Callable[[], Tensor]:
        """Return a function that gives the rows of weight which the next step draws, whatever its labels."""
        sampler, step = Sampler(self.sharding, self.sample_rate, self.seed), self.step + 1
        return lambda: self._rows_of(sampler.candidates(step, device, padded))

    def extra_repr(self) -> str:
        own = f"center_optimizer={self.center_optimizer.describe()}, " if self.center_optimizer is not None else ""
        return (
            f"{self.weight.shape[1]}, {self.num_classes}, "
            f"{self.options}, "
            f"sample_rate={self.sample_rate}, {own}rank {self.ranks.rank} of {self.ranks.world_size}"
        )


def _is_captured(device: torch.device) -> bool:
    """Return true if a CUDA graph records the work on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
