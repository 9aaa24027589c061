"""The state that the heads of one process group share, and the watch over their collectives on the CPU.

Ranks that make different calls wait for each other forever, for example if one of them leaves out a backward pass.
After some seconds of waiting each rank writes into the group's store where it waits, and reads where the others do. If
two wait in different calls, every rank that waits raises an error. If another rank is in no call for a minute, those
that wait for it warn once: it may be slow, or have run out of batches. A collective that ends in time costs nothing
more.
:mod:`fused_arcface.parallel.ranks` makes the collectives.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

_PATIENCE = timedelta(seconds=3)
_PAUSE = timedelta(seconds=0.5)
_LONG = timedelta(seconds=60)


class GroupState:
    """The facts that all heads of one process group have in common, the same on every rank."""

    def __init__(self) -> None:
        self.buffer_bytes = 0
        """Size of each rank's part of the gathered buffer. It only grows, so that two heads' buffers fit each other."""
        self.heads = 0
        """The number of heads that have been built."""
        self._collectives = 0
        self._is_watched: bool | None = None

    def watches(self, group: Any, device: torch.device) -> bool:
        """Return true if collectives of this device are watched: those of gloo on the CPU.

        On a GPU the host does not wait for them.
        """
        if self._is_watched is None:
            try:
                name = group._get_backend(torch.device("cpu")).name()
            except RuntimeError:  # the group has none for the CPU
                name = ""
            self._is_watched = name == "gloo"
        return self._is_watched and device.type == "cpu"

    def start(
        self, group: Any, place: str, collective: Callable[..., Any], *args: Any, **options: Any
    ) -> Callable[[], None]:
        """Start a collective of torch.distributed that is watched, and return the function that waits for it.

        ``place`` names the call that needs the collective, the same on every rank.
        """
        self._collectives += 1
        number = self._collectives
        work = collective(*args, group=group, async_op=True, **options)
        return lambda: _wait(work, group, number, place)


def _wait(work: Any, group: Any, number: int, place: str) -> None:
    """Wait for a collective. Raise its error, or another one if some rank waits in another call."""
    if _is_done(work, _PATIENCE):
        return
    store, rank = dist.distributed_c10d._get_process_group_store(group), dist.get_rank(group)
    own = f"{number} {place}"
    store.set(_key(rank), own)
    warning_at = time.monotonic() + _LONG.total_seconds()
    while not _is_done(work, _PAUSE):
        found = {rank: own}
        for other in range(dist.get_world_size(group)):
            if other != rank and store.check([_key(other)]):
                found[other] = store.get(_key(other)).decode()
        # Where a slow network is the reason, a rank that is further on waits in a later collective.
        waiting = {each: text.partition(" ")[2] for each, text in found.items() if text.startswith(f"{number} ")}
        if len(set(waiting.values())) > 1:
            listed = ", ".join(f"rank {each}: {text}" for each, text in sorted(waiting.items()))
            raise RuntimeError(
                f"the ranks wait for each other in different calls; got {listed}. Every rank must make the same calls "
                "of the same heads in the same order, and a backward pass after a forward pass if another rank makes "
                "one. Their collectives no longer fit each other: end the processes"
            )
        if time.monotonic() > warning_at:
            warning_at = math.inf
            absent = [each for each in range(dist.get_world_size(group)) if each not in found or not found[each]]
            warnings.warn(
                f"rank {rank} has waited for {_LONG.total_seconds():g} s in {place} for ranks {absent}, which are in "
                "no call of a head. If they are slow, nothing is wrong. If they have run out of batches, they must "
                "call the head with 0 rows until all ranks have",
                RuntimeWarning,
                stacklevel=2,
            )
    store.set(_key(rank), "")


def _key(rank: int) -> str:
    return f"fused_arcface waits {rank}"


def _is_done(work: Any, limit: timedelta) -> bool:
    """Wait for a work, and return whether it has ended; raise its error if it has one."""
    try:
        work.wait(limit)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it failed, or has ended just now
    return True


_states: WeakKeyDictionary[Any, GroupState] = WeakKeyDictionary()


def state_of_group(group: Any) -> GroupState:
    """Return the state of a process group."""
    state = _states.get(group)
    if state is None:
        state = _states[group] = GroupState()
    return state
