"""A small head and net that are saved and compared, and what a save may meet."""

from __future__ import annotations

import errno
import os

import torch
from torch import nn

import fused_arcface as fa
from fused_arcface import checkpoint

D, CLASSES = 6, 37


def make(seed: int = 0, **options) -> tuple[fa.PartialFC, nn.Module]:
    torch.manual_seed(seed)
    return fa.PartialFC(D, CLASSES, center_optimizer=fa.CenterSGD(0.1), **options), nn.BatchNorm1d(D)


def step(head: fa.PartialFC, net: nn.Module) -> None:
    head(net(torch.randn(4, D)), torch.arange(4)).backward()


def state(head: fa.PartialFC, net: nn.Module) -> list[torch.Tensor]:
    momentum = head.center_optimizer.state[head.weight]["momentum_buffer"]
    return [torch.tensor(head.step), head.weight.detach().clone(), momentum.clone(), *net.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def copied(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def refusal(function, *arguments, **options) -> str:
    """Return the message of the named error, nothing if there was none."""
    try:
        function(*arguments, **options)
    except checkpoint.CheckpointError as error:
        return str(error)
    return ""


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
