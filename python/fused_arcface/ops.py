"""The leaf stages as ``torch.library`` operators: schemas and fakes once, implementations by backend name.

``torch.ops.fused_arcface.*`` is what :mod:`fused_arcface.autograd` calls; the operators have no derivative of their
own. Shapes and meanings are those of :mod:`fused_arcface.backends.reference`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import backends
from .checks import check_target_range

IGNORED, INVALID = -1, -2
"""Targets of rows that take no part, and of rows whose label is no class."""

_ROWS = "Tensor embeddings, Tensor weight, Tensor target"
_COEFFICIENTS = "Tensor lse, Tensor negative_coefficient, Tensor target_coefficient"
_SCHEMAS = {
    "local_target": "(Tensor target, int num_classes, int ignore_index) -> Tensor",
    "class_max": f"({_ROWS}, str backend) -> Tensor",
    "class_stats": f"({_ROWS}, float scale, Tensor? shift, bool with_centre_sum, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    "weight_grad": f"({_ROWS}, float scale, {_COEFFICIENTS}, str backend) -> Tensor",
    "target_cosine": f"({_ROWS}, str backend) -> Tensor",
    "unit_embedding_grad": "(Tensor weight, Tensor target, Tensor mean_centre, Tensor negative_coefficient,"
    " Tensor target_coefficient, str backend) -> Tensor",
    "embedding_grad": "(Tensor d_unit, Tensor embeddings, str backend) -> Tensor",
    "margin_loss": "(Tensor negative_lse, Tensor target_cosine, float scale, float m1, float m2, float m3,"
    " str boundary, str gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fused_arcface::{_name}", _schema)


def compute_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: fp64 if either input is, else fp32."""
    return torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)


@torch.library.impl("fused_arcface::local_target", "default")
def _local_target(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (N,) of any integer dtype as int64, -1 for ignored rows, -2 for those out of range.

    An operator, since its check reads the values. On a GPU that would wait for the device: there an invalid label's
    loss is NaN (the backends' target_cosine), unless FUSED_ARCFACE_DEBUG=1 asks for the check.
    """
    target = target.long()
    if target.device.type == "cpu" or os.environ.get("FUSED_ARCFACE_DEBUG") == "1":
        check_target_range(target, num_classes, ignore_index)
    valid = torch.where((target >= 0) & (target < num_classes), target, INVALID)
    return torch.where(target == ignore_index, IGNORED, valid)


@torch.library.register_fake("fused_arcface::local_target")
def _local_target_fake(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64)


@torch.library.impl("fused_arcface::class_max", "default")
def _class_max(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
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


@torch.library.impl("fused_arcface::target_cosine", "default")
def _target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
    result: Tensor = backends.load(backend).target_cosine(embeddings, weight, target)
    return result


@torch.library.register_fake("fused_arcface::target_cosine")
def _target_cosine_fake(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


@torch.library.impl("fused_arcface::unit_embedding_grad", "default")
def _unit_embedding_grad(
    weight: Tensor,
    target: Tensor,
    mean_centre: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    backend: str,
) -> Tensor:
    result: Tensor = backends.load(backend).unit_embedding_grad(
        weight, target, mean_centre, negative_coefficient, target_coefficient
    )
    return result


@torch.library.register_fake("fused_arcface::unit_embedding_grad")
def _unit_embedding_grad_fake(
    weight: Tensor,
    target: Tensor,
    mean_centre: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    backend: str,
) -> Tensor:
    return torch.empty_like(mean_centre)


@torch.library.impl("fused_arcface::embedding_grad", "default")
def _embedding_grad(d_unit: Tensor, embeddings: Tensor, backend: str) -> Tensor:
    result: Tensor = backends.load(backend).embedding_grad(d_unit, embeddings)
    return result


@torch.library.register_fake("fused_arcface::embedding_grad")
def _embedding_grad_fake(d_unit: Tensor, embeddings: Tensor, backend: str) -> Tensor:
    return torch.empty_like(embeddings)


@torch.library.impl("fused_arcface::margin_loss", "default")
def _margin_loss(
    negative_lse: Tensor,
    target_cosine: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    boundary: str,
    gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor, Tensor] = backends.load(backend).margin_loss(
        negative_lse, target_cosine, scale, m1, m2, m3, boundary, gradient
    )
    return result


@torch.library.register_fake("fused_arcface::margin_loss")
def _margin_loss_fake(
    negative_lse: Tensor,
    target_cosine: Tensor,
    scale: float,
    m1: float,
    m2: float,
    m3: float,
    boundary: str,
    gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = [torch.empty_like(negative_lse) for _ in range(4)]
    return rows[0], rows[1], rows[2], rows[3]
