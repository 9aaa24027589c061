"""The operators' results as tensors without values, for torch.compile and fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.dtypes import compute_dtype
from . import schemas as _schemas  # noqa: F401  (defines the operators)
from .terms import MOMENTS


@torch.library.register_fake("fused_arcface::local_target")
def _local_target(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64)


@torch.library.register_fake("fused_arcface::row_factors")
def _row_factors(values: Tensor, name: str, greatest: float) -> Tensor:
    return torch.empty_like(values)


@torch.library.register_fake("fused_arcface::target_cosine")
def _target_cosine(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


@torch.library.register_fake("fused_arcface::finish_negatives")
def _finish_negatives(
    negative_sum: Tensor, shift: Tensor | None, center_sum: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(negative_sum, dtype=torch.float64), torch.empty_like(center_sum)


@torch.library.register_fake("fused_arcface::margin_loss.tensor_numbers")
@torch.library.register_fake("fused_arcface::margin_loss")
def _margin_loss(
    negative_lse: Tensor, target_cosine: Tensor, *numbers: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, lse, d_lse, d_cosine = (torch.empty_like(negative_lse) for _ in range(4))
    return loss, lse, d_lse, d_cosine


@torch.library.register_fake("fused_arcface::unit_embedding_grad")
def _unit_embedding_grad(weight: Tensor, target: Tensor, mean_center: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(mean_center)


@torch.library.register_fake("fused_arcface::embedding_grad")
def _embedding_grad(d_unit: Tensor, embeddings: Tensor, backend: str) -> Tensor:
    return torch.empty_like(embeddings)


@torch.library.register_fake("fused_arcface::class_max")
def _class_max(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    *_: object,
    **__: object,
) -> Tensor:
    return _target_cosine(embeddings, weight, target, backend)


@torch.library.register_fake("fused_arcface::class_stats.tensor_numbers")
@torch.library.register_fake("fused_arcface::class_stats")
def _class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    backend: str,
    *_: object,
    **__: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(embeddings, weight)
    rows = embeddings.new_empty(embeddings.shape[0], dtype=dtype)
    center_sum = embeddings.new_empty(embeddings.shape if with_center_sum else (0,), dtype=dtype)
    return rows, torch.empty_like(rows), center_sum


@torch.library.register_fake("fused_arcface::weight_grad.tensor_numbers")
@torch.library.register_fake("fused_arcface::weight_grad")
def _weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    lse: Tensor,
    negative_coefficient: Tensor,
    target_coefficient: Tensor,
    backend: str,
    classes: Tensor | None = None,
    **_: object,
) -> Tensor:
    return torch.empty_like(weight) if classes is None else weight.new_empty(classes.shape[0], weight.shape[1])


@torch.library.register_fake("fused_arcface::class_moments")
def class_moments(
    embeddings: Tensor, weight: Tensor, target: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the moments (N, MOMENTS) in fp64 and the maximum (N,), unwritten."""
    maximum = _target_cosine(embeddings, weight, target, backend)
    return maximum.new_empty(maximum.shape[0], MOMENTS, dtype=torch.float64), maximum


@torch.library.register_fake("fused_arcface::both_gradients")
def both_gradients(embeddings: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Return the gradients by the centers (C, D) and by the unit embeddings (N, D), unwritten."""
    return torch.empty_like(weight), embeddings.new_empty(embeddings.shape, dtype=compute_dtype(embeddings, weight))


@torch.library.register_fake("fused_arcface::bias_grad")
def _bias_grad(embeddings: Tensor, weight: Tensor, target: Tensor, lse: Tensor, *_: object, **__: object) -> Tensor:
    return lse.new_empty(())


@torch.library.register_fake("fused_arcface::update_centers.tensor_numbers")
@torch.library.register_fake("fused_arcface::update_centers")
def _update_centers(*_: object, **__: object) -> None:
    return None
