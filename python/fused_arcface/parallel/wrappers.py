"""Detection of wrappers that treat a rank's shard as if all ranks had the same parameter.

``DistributedDataParallel`` broadcasts rank 0's class centers and averages their gradients. FSDP cuts each rank's shard
and joins pieces of different shards. Lightning and Accelerate do one or the other. Without an error, training would go
on with wrong centers.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn

_CURE = """\
Each rank holds its own shard of the class centers, which nothing may broadcast, average or shard. Keep the head
outside of the wrapper, of Accelerate's prepare() and of an optimizer that shards its state, or name its weight before
the model is wrapped:
  DDP, Lightning:  DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [{name!r}])
  FSDP2:           fully_shard(model, ignored_params={{model.{name}}})
  FSDP1:           FullyShardedDataParallel(model, ignored_states=[model.{name}])"""


def _message(owner: str, fault: str, name: str = "head.weight") -> str:
    return f"{owner}: {fault}. " + _CURE.format(name=name)


def copied_shards(owner: str, ranks: list[int]) -> str:
    """Return the error message for ranks with equal shards, bit for bit."""
    listed = ", ".join(map(str, ranks))
    return _message(
        owner,
        f"ranks {listed} hold the same class centers, bit for bit: a wrapper (DistributedDataParallel, Lightning, "
        "Accelerate) or an optimizer (ZeroRedundancyOptimizer) has broadcast them, or they were drawn anew from the "
        "same seed",
    )


def check_plain(owner: str, weight: object) -> None:
    """Check that a new ``weight`` of a head is an ordinary tensor.

    Raises:
        RuntimeError: if it is a DTensor, which fully_shard and parallelize_module make of parameters.
    """
    tensors: Any = sys.modules.get("torch.distributed.tensor")  # if it is not imported, there is no DTensor
    if tensors is not None and isinstance(weight, tensors.DTensor):
        raise RuntimeError(_message(owner, "fully_shard or another wrapper has made weight a DTensor"))


def check_unwrapped(owner: str, head: nn.Module, shape: tuple[int, int], group: Any) -> None:
    """Check that this rank's shard is its own, as far as one rank can see.

    Args:
        owner: name of the head, for errors.
        head: module with the shard as its ``weight``.
        shape: shape of the shard.
        group: process group that shares the classes; None for this process alone.

    Raises:
        RuntimeError: if a wrapper has changed or registered the shard.
    """
    weight: Any = head.weight
    check_plain(owner, weight)
    if not isinstance(weight, nn.Parameter) and getattr(head, "_is_fsdp_managed_module", False):
        raise RuntimeError(_message(owner, "FullyShardedDataParallel has flattened weight with other parameters"))
    if tuple(weight.shape) != shape:
        raise RuntimeError(_message(owner, f"weight must be this rank's {shape}; got {tuple(weight.shape)}"))
    wrapper: Any = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or group is None or not any(weight is held for held in wrapper._module_parameters):
        return
    theirs, ours = (set(dist.get_process_group_ranks(each)) for each in (wrapper.process_group, group))
    if len(theirs & ours) > 1:  # a wrapper over replicas of one shard has only this rank in common
        name = next(name for name, parameter in wrapper.module.named_parameters() if parameter is weight)
        if name.isdigit():  # replicate() wraps a list of the model's parameters
            name = "head.weight"
        raise RuntimeError(_message(owner, f"DistributedDataParallel holds {name}", name))


def check_built_in_time(owner: str, group: Any) -> None:
    """Check that a head without a group belongs to a single process.

    Raises:
        RuntimeError: if torch.distributed has been initialized since the head was built.
    """
    if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"{owner} was built before torch.distributed was initialized: it holds all class centers, and no other "
            "rank would learn of their updates. Build it afterwards (with Lightning in configure_model()), or pass a "
            "group of one rank"
        )
