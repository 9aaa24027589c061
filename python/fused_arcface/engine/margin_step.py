"""One forward pass of a margin with a state: it gets all ranks' rows, and a recomputed step is the same step.

The heads call :func:`in_step` before they use a margin. ``torch.utils.checkpoint`` runs a forward pass again within the
backward pass; the margin then has the state and the other ranks' rows of the first time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base.dtypes import compute_dtype
from ..margins.protocol import Modulation, RowMargin
from ..margins.state import Place, has_state, state_of
from ..parallel.ranks import JointBatch, Ranks

# An operator, since only a compiled graph that runs can tell whether a backward pass runs it. It claims to change the
# state, so that no compiler drops it.
torch.library.define("fused_arcface::check_first_run", "(Tensor(a!) state) -> ()")


@torch.library.impl("fused_arcface::check_first_run", "default")
def _check_first_run(state: Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a margin or scale with a state cannot be recomputed under torch.compile, which would change its state "
            "again: keep the head outside of torch.utils.checkpoint; it stores no logits that would be worth it"
        )


@torch.library.register_fake("fused_arcface::check_first_run")
def _check_first_run_without_data(state: Tensor) -> None:
    pass


# Number of forward passes of one margin that can await their recomputation.
_MOST_STEPS = 8


class _Step:
    """The start of one forward pass of a margin, and what the ranks exchanged in it."""

    def __init__(self, digest: Tensor, state: dict[Place, Tensor]) -> None:
        self.digest = digest
        """(n,) sums of the embeddings, by which a recomputation is recognized."""
        self.state = {place: buffer.clone() for place, buffer in state.items()}
        """Copies of the margin's buffers."""
        self.rows: list[Tensor] = []
        """(N,) all ranks' rows, in the order of the collectives."""
        self.batch: JointBatch | None = None
        """Number of rows of each rank; None for one process."""
        self.recomputed = False


class _History:
    """The last steps of one margin, and the ranks that take them together."""

    def __init__(self) -> None:
        self.steps: deque[_Step] = deque(maxlen=_MOST_STEPS)
        self._ranks: Ranks | None = None

    def ranks(self) -> Ranks | None:
        """Return the ranks of the default group; None for a single process."""
        if not _has_ranks():
            return None
        if self._ranks is None or self._ranks.group is not dist.group.WORLD:
            self._ranks = Ranks()
        return self._ranks

    def find(self, digest: Tensor) -> _Step:
        """Return the step with these embeddings, up to the rounding of a backbone's kernels.

        Raises:
            RuntimeError: if there is none.
        """
        alike = [step for step in self.steps if step.digest.shape == digest.shape]
        allowed = 1e-3 * digest.abs().sum()
        distances = [(float((step.digest - digest).abs().sum() - allowed), step) for step in reversed(alike)]
        near = [(distance, step) for distance, step in distances if distance <= 0]
        if not near:
            raise RuntimeError(
                "a margin with a state cannot be recomputed in a backward pass, as its step is not among the last "
                f"{_MOST_STEPS}: keep the head outside of torch.utils.checkpoint; it stores no logits that would be "
                "worth it"
            )
        step = min(near, key=lambda each: (each[0], each[1].recomputed))[1]
        step.recomputed = True
        return step


_histories: WeakKeyDictionary[nn.Module, _History] = WeakKeyDictionary()


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_step(margin: Any, embeddings: Tensor, alone: bool) -> Any:
    """Return the margin to use in one forward pass; a margin without a state is returned as it is.

    Args:
        margin: a head's margin, or its scale if that is a module.
        embeddings: (n, D) of this rank.
        alone: True if the embeddings are all rows there are. If false and torch.distributed has several ranks, the
            margin gets the rows of all of them, and every rank of the default group has to make this call.

    Raises:
        RuntimeError: if a backward pass recomputes a step that is too long ago, or under ``torch.compile`` with several
            ranks. A compiled graph raises it if a backward pass recomputes it.
    """
    if not has_state(margin):
        return margin
    assert isinstance(margin, nn.Module)
    has_ranks = not alone and _has_ranks()
    if torch.compiler.is_compiling():
        if has_ranks:
            raise RuntimeError("a margin with a state cannot be compiled where several ranks share it")
        for buffer in state_of(margin).values():
            torch.ops.fused_arcface.check_first_run.default(buffer)
        return margin
    state = state_of(margin)
    if not state:
        return margin
    history = _histories.setdefault(margin, _History())
    digest = embeddings.detach().sum(1, dtype=compute_dtype(embeddings, embeddings)).nan_to_num(0, 0, 0)
    if torch._C._current_graph_task_id() != -1:
        return _Recomputed(margin, history.find(digest))
    step = _Step(digest, state)
    history.steps.append(step)
    ranks = history.ranks() if has_ranks else None
    return margin if ranks is None else _OverRanks(margin, step, ranks)


class _InStep:
    """A margin that is used in another's place for one step."""

    def __init__(self, margin: nn.Module, step: _Step) -> None:
        self._margin: Any = margin
        self._step = step
        # The heads ask which of these methods a margin has.
        for name in ("for_rows", "for_labels", "modulate", "rescale", "current"):
            if hasattr(margin, name):
                setattr(self, name, getattr(self, f"_{name}"))

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def _joint(self, own: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return all ranks' rows (N,) for this rank's (n,), and which of them are not ignored, (N,) bool."""
        raise NotImplementedError

    def _own(self, rows: Tensor) -> Tensor:
        return rows if self._step.batch is None else self._step.batch.own(rows)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        rows, _ = self._joint(target_cosine)
        return self._own(self._call(self._margin, rows))

    def _for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        return self._of_rows(self._call(self._margin.for_rows, *self._joint(norms, counted)))

    def _for_labels(self, labels: Tensor, counted: Tensor) -> RowMargin:
        joint, counted = self._joint(labels.double(), counted)
        return self._of_rows(self._call(self._margin.for_labels, joint.long(), counted))

    def _of_rows(self, joint: RowMargin) -> RowMargin:
        """Return the margin of this rank's rows."""
        modify, penalty = joint
        penalty = None if penalty is None else self._own(penalty)
        return RowMargin(lambda cosine: self._own(self._call(modify, self._joint(cosine)[0])), penalty)

    def _modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        change: Modulation = self._call(self._margin.modulate, *self._joint(target_cosine, counted))
        return Modulation(self._own(change.threshold), change.coefficients, change.greatest, change.steepest)

    def _current(self, num_classes: int) -> Tensor:
        scale: Tensor = self._call(self._margin.current, num_classes)
        return scale

    def _rescale(self, lse: Tensor, target_cosine: Tensor, counted: Tensor, scale: Tensor) -> Tensor:
        joint, counted = self._joint(lse, counted)
        cosines, _ = self._joint(target_cosine)
        result: Tensor = self._call(self._margin.rescale, joint, cosines, counted, scale)
        return result

    def _insert(self, own: Tensor, rows: Tensor) -> Tensor:
        """Return all ranks' rows (N,), with this rank's part replaced by ``own`` (n,), which has a gradient."""
        batch = self._step.batch
        assert batch is not None
        return torch.cat([rows[: batch.first], own, rows[batch.first + batch.count :]])


class _OverRanks(_InStep):
    """The margin over the rows of all ranks."""

    def __init__(self, margin: nn.Module, step: _Step, ranks: Ranks) -> None:
        super().__init__(margin, step)
        self._ranks = ranks

    def _joint(self, own: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        step = self._step
        if step.batch is None:
            here = torch.ones_like(own, dtype=torch.bool) if counted is None else counted
            owner, agreement = type(self._margin).__name__, {"margin": repr(self._margin)}
            step.batch = self._ranks.gather_batch(own.detach()[:, None], here.long(), owner, agreement)
            rows = step.batch.embeddings.squeeze(1)
        else:
            rows = torch.cat(self._ranks.gather_rows(own.detach(), step.batch.counts))
        step.rows.append(rows)
        return self._insert(own, rows), step.batch.labels.bool()


class _Recomputed(_InStep):
    """The margin in a step that is recomputed: the buffers and rows of the first time, without a collective."""

    def __init__(self, margin: nn.Module, step: _Step) -> None:
        super().__init__(margin, step)
        self._state = {place: buffer.clone() for place, buffer in step.state.items()}
        self._rows = iter(step.rows)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        self._exchange()
        try:
            return function(*args)
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Swap the margin's buffers with those of the step."""
        for place, buffer in self._state.items():
            module, name = place
            current = module._buffers[name]
            assert current is not None
            module._buffers[name], self._state[place] = buffer, current

    def _joint(self, own: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._step.batch is None:
            return own, torch.ones_like(own, dtype=torch.bool) if counted is None else counted
        return self._insert(own, next(self._rows)), self._step.batch.labels.bool()
