"""A short training of ``PartialFC`` with class centers on the device, in host memory or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_arcface as fa

D, CLASSES, ROWS = 70, 500, 12  # more than one block of an int8 momentum

DTYPES = {"fp32": (torch.float32, None), "bf16+int8": (torch.bfloat16, torch.int8)}


def make(storage: str | Path, dtypes: str = "fp32", **options: Any) -> fa.PartialFC:
    dtype, momentum_dtype = DTYPES[dtypes]
    recipe = fa.CenterSGD(0.1, weight_decay=1e-3, momentum_dtype=momentum_dtype)
    given = {"sample_rate": 0.1, "seed": 5, "dtype": dtype, "center_optimizer": recipe, **options}
    return fa.PartialFC(D, CLASSES, center_storage=storage, **given)


def batch(step: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Every other batch has few identities, which come again and again."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, D, generator=generator)
    return x, torch.randint(0, CLASSES if step % 2 else 20, (rows,), generator=generator)


def train(head: fa.PartialFC, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return loss, gradient by this rank's embeddings and sampled classes of each step."""
    world_size, rank, results = head.ranks.world_size, head.ranks.rank, []
    for _ in range(steps):
        x, y = batch(head.step)
        part = slice(ROWS * rank // world_size, ROWS * (rank + 1) // world_size)
        x = x[part].requires_grad_()
        loss = head(x, y[part])
        loss.backward()
        results.append((loss.detach(), x.grad, head.sampled))
    return results


def state(head: fa.PartialFC) -> dict[str, Tensor]:
    """Return weight and momentum of this rank, wherever they are."""
    store = head.center_store
    if store is not None and not store.in_memory:
        return store.piece(0, head.num_local * head.sub_centers)
    return {"weight": head.weight.detach().clone(), **{k: v.clone() for k, v in head._held().items() if k != "weight"}}


def assert_equal(one: Any, other: Any) -> None:
    """Compare to the bit, NaN included."""
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other
