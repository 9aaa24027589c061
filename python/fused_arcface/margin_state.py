"""Margins with a state: modules with buffers, which change once in each training step.

A margin is such a module in ``train()``. Its step is the same when ``torch.utils.checkpoint`` recomputes it, it has all
ranks' rows, and its running statistics stay in fp32. :func:`in_step` is called by the heads for each forward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import JointBatch, Ranks
from .margins import Margin, Modulation, RowMargin

# Forward passes of one margin that may await their recomputation.
_MOST_STEPS = 8


class StatefulMargin(nn.Module):
    """Base of the margins with running statistics: floating-point buffers stay fp32 through any cast of the head and
    any file."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatefulMargin:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()  # with assign=True it is the file's


_Place = tuple[nn.Module, str]


def state_of(margin: Margin) -> dict[_Place, Tensor]:
    """The buffers of a margin that the next forward pass may change; none if it has no state, or in ``eval()``."""
    if not isinstance(margin, nn.Module) or not margin.training:
        return {}
    places = ((module, name, buffer) for module in margin.modules() for name, buffer in module._buffers.items())
    return {(module, name): buffer for module, name, buffer in places if buffer is not None}


def copy_of_state(margin: Margin) -> list[tuple[Tensor, Tensor]]:
    """Each buffer of :func:`state_of` and a copy of it, to undo a step by."""
    return [(buffer, buffer.clone()) for buffer in state_of(margin).values()]


class _Step:
    """What a forward pass of a margin started from."""

    def __init__(self, digest: Tensor, state: dict[_Place, Tensor]) -> None:
        self.digest = digest
        """(n,) of the embeddings, to know them again."""
        self.state = {place: buffer.clone() for place, buffer in state.items()}
        self.rows: list[Tensor] = []
        """(N,) all ranks' rows, in the order in which they were gathered."""
        self.batch: JointBatch | None = None
        self.recomputed = False


class _History:
    """The last steps of one margin, and the ranks that it shares them with."""

    def __init__(self) -> None:
        self.steps: deque[_Step] = deque(maxlen=_MOST_STEPS)
        self._ranks: Ranks | None = None

    def ranks(self) -> Ranks | None:
        """Those of the default group; None where this process is alone."""
        if not _has_ranks():
            return None
        if self._ranks is None or self._ranks.group is not dist.group.WORLD:
            self._ranks = Ranks()
        return self._ranks

    def find(self, digest: Tensor) -> _Step:
        """The step that is recomputed: that of the same embeddings, but for the rounding of a backbone's kernels."""
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


def in_step(margin: Margin, embeddings: Tensor, alone: bool) -> Margin:
    """The margin for one forward pass of embeddings (n, D); the margin itself if it has no state.

    Args:
        alone: embeddings are all rows there are. If false and torch.distributed has several ranks, the margin gets the
            rows of all of them; every rank of the default group then has to call this.

    Raises:
        RuntimeError: a backward pass recomputes a step too long ago.
    """
    if not isinstance(margin, nn.Module) or not margin.training:
        return margin
    has_ranks = not alone and _has_ranks()
    if torch.compiler.is_compiling():
        if has_ranks:
            raise RuntimeError("a margin with a state cannot be compiled where several ranks share it")
        return margin
    state = state_of(margin)
    if not state:
        return margin
    history = _histories.setdefault(margin, _History())
    digest = embeddings.detach().sum(1, dtype=torch.promote_types(embeddings.dtype, torch.float32)).nan_to_num(0, 0, 0)
    if torch._C._current_graph_task_id() != -1:
        return _Recomputed(margin, history.find(digest))
    step = _Step(digest, state)
    history.steps.append(step)
    ranks = history.ranks() if has_ranks else None
    return margin if ranks is None else _OverRanks(margin, step, ranks)


class _InStep:
    """A margin that is called in place of another."""

    for_rows: Callable[[Tensor, Tensor], RowMargin]
    modulate: Callable[[Tensor, Tensor], Modulation]

    def __init__(self, margin: nn.Module, step: _Step) -> None:
        self._margin: Any = margin
        self._step = step
        # Whether a margin has these methods says what it does.
        if hasattr(margin, "for_rows"):
            self.for_rows = self._for_rows
        if hasattr(margin, "modulate"):
            self.modulate = self._modulate

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def _joint(self, own: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All ranks' (N,) rows in place of this rank's (n,), and which of them take part."""
        raise NotImplementedError

    def _own(self, rows: Tensor) -> Tensor:
        return rows if self._step.batch is None else self._step.batch.own(rows)

    def __call__(self, target_cosine: Tensor) -> Tensor:
        rows, _ = self._joint(target_cosine)
        return self._own(self._call(self._margin, rows))

    def _for_rows(self, norms: Tensor, counted: Tensor) -> RowMargin:
        modify, penalty = self._call(self._margin.for_rows, *self._joint(norms, counted))
        penalty = None if penalty is None else self._own(penalty)
        return RowMargin(lambda cosine: self._own(self._call(modify, self._joint(cosine)[0])), penalty)

    def _modulate(self, target_cosine: Tensor, counted: Tensor) -> Modulation:
        change: Modulation = self._call(self._margin.modulate, *self._joint(target_cosine, counted))
        return change._replace(threshold=self._own(change.threshold))

    def _put(self, own: Tensor, rows: Tensor) -> Tensor:
        """``own`` (n,), with its gradient, in this rank's places of ``rows`` (N,)."""
        batch = self._step.batch
        assert batch is not None
        return torch.cat([rows[: batch.first], own, rows[batch.first + batch.count :]])


class _OverRanks(_InStep):
    """The margin of all ranks' rows."""

    def __init__(self, margin: nn.Module, step: _Step, ranks: Ranks) -> None:
        super().__init__(margin, step)
        self._ranks = ranks

    def _joint(self, own: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        step = self._step
        if step.batch is None:
            here = torch.ones_like(own, dtype=torch.bool) if counted is None else counted
            step.batch = self._ranks.gather_batch(own.detach()[:, None], here.long(), False)
            rows = step.batch.embeddings.squeeze(1)
        else:
            rows = torch.cat(self._ranks.gather_rows(own.detach(), step.batch.counts))
        step.rows.append(rows)
        return self._put(own, rows), step.batch.target.bool()


class _Recomputed(_InStep):
    """The margin as it was in the step that a backward pass recomputes, without another collective."""

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
        """Swap the margin's buffers and those of the step."""
        for place, buffer in self._state.items():
            module, name = place
            current = module._buffers[name]
            assert current is not None
            module._buffers[name], self._state[place] = buffer, current

    def _joint(self, own: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._step.batch is None:
            return own, torch.ones_like(own, dtype=torch.bool) if counted is None else counted
        return self._put(own, next(self._rows)), self._step.batch.target.bool()
