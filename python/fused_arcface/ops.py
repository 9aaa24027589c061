"""The leaf stages as ``torch.library`` operators: schemas and fakes once, implementations by backend name.

``torch.ops.fused_arcface.*`` is what :mod:`fused_arcface.autograd` calls; the operators have no derivative of their
own. Shapes and meanings are those of :mod:`fused_arcface.backends.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .checks import check_target_range

_ROWS = "Tensor embeddings, Tensor weight, Tensor target"
_COEFFICIENTS = "Tensor lse, Tensor negative_coefficient, Tensor target_coefficient"
_SCHEMAS = {
    "local_target": "(Tensor target, int num_classes, int ignore_index) -> Tensor",
    "class_max": f"({_ROWS}, str backend) -> Tensor",
    "class_stats": f"({_ROWS}, float scale, Tensor? shift, bool with_centre_sum, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "weight_grad": f"({_ROWS}, float scale, {_COEFFICIENTS}, str backend) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fused_arcface::{_name}", _schema)


def compute_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: fp64 if either input is, else fp32."""
    return torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)


@torch.library.impl("fused_arcface::local_target", "default")
def _local_target(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (N,) of any integer dtype as int64, -1 for ignored rows. An operator, since its check reads the values."""
    target = target.long()
    if target.device.type == "cpu":
        check_target_range(target, num_classes, ignore_index)
    return torch.where(target == ignore_index, -1, target)


@torch.library.register_fake("fused_arcface::local_target")
def _local_target_fake(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64)


@torch.library.impl("fused_arcface::class_max", "default")
def _class_max(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
    if weight.shape[0] == 0:
        return embeddings.new_full(embeddings.shape[:1], -torch.inf, dtype=compute_dtype(embeddings, weight))
    result: Tensor = backends.load(backend).class_max(embeddings, weight, target)
    return result


@torch.library.register_fake("fused_arcface::class_max")
def _class_max_fake(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


@torch.library.impl("fused_arcface::class_stats", "default")
def _class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_centre_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.shape[0] == 0:  # a shard whose step samples none of its classes; no backend need know of it
        rows = embeddings.new_zeros(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))
        centre_sum = rows.new_zeros(embeddings.shape if with_centre_sum else (0,))
        return rows, torch.full_like(rows, -torch.inf), centre_sum
    result: tuple[Tensor, Tensor, Tensor] = backends.load(backend).class_stats(
        embeddings, weight, target, scale, shift, with_centre_sum
    )
    return result


@torch.library.register_fake("fused_arcface::class_stats")
def _class_stats_fake(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_centre_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(embeddings, weight)
    rows = embeddings.new_empty(embeddings.shape[0], dtype=dtype)
    centre_sum = embeddings.new_empty(embeddings.shape if with_centre_sum else (0,), dtype=dtype)
    return rows, torch.empty_like(rows), centre_sum


@torch.library.impl("fused_arcface::weight_grad", "default")
def _weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    backend: str,
) -> Tensor:
    if weight.shape[0] == 0:
        return torch.empty_like(weight)
    result: Tensor = backends.load(backend).weight_grad(
        embeddings, weight, target, scale, lse, negative_coefficient, target_coefficient
    )
    return result


@torch.library.register_fake("fused_arcface::weight_grad")
def _weight_grad_fake(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    backend: str,
) -> Tensor:
    return torch.empty_like(weight)
