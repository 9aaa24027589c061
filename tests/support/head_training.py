"""A short training of ``PartialFC`` alone, the same on any number of ranks."""

from __future__ import annotations

import torch

import fused_arcface as fa

D = 7
STEPS = 10


def batches(
    num_classes: int, rows: int, dtype: torch.dtype, steps: int = STEPS
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, num_classes, (rows,), generator=generator),
        )
        for _ in range(steps)
    ]


def own_rows(world_size: int, rank: int, rows: int, step: int) -> slice:
    """Return a rank's rows of a step: the shares change every step, and every other step one rank has none."""
    weights = [(rank + step) % world_size + (1 if step % 2 else 0) for rank in range(world_size)]
    if sum(weights) == 0:
        weights = [1] * world_size
    ends = [rows * sum(weights[: rank + 1]) // sum(weights) for rank in range(world_size)]
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def train_head(
    num_classes: int, rows: int, dtype: torch.dtype, options: dict, backend: str, steps: int = STEPS
) -> dict:
    """Take a few SGD steps of the head alone.

    Return losses, gradients by all ranks' embeddings, centers before and after, and samples.
    """
    head = fa.PartialFC(D, num_classes, dtype=dtype, backend=backend, seed=5, **options)
    world_size, rank = head.ranks.world_size, head.ranks.rank
    result = {"initial": head.full_weight(), "losses": [], "gradients": [], "sampled": []}
    for step, (x, y) in enumerate(batches(num_classes, rows, dtype, steps)):
        part = own_rows(world_size, rank, rows, step)
        x = x[part].requires_grad_()
        loss = head(x, y[part])
        loss.backward()
        with torch.no_grad():
            head.weight -= 0.1 * head.weight.grad.to_dense()
        head.weight.grad = None
        result["losses"].append(loss.item())
        result["gradients"].append(x.grad / world_size)
        result["sampled"].append(head.sampled)
    result["final"] = head.full_weight()
    return result
