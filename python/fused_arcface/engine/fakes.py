"""The operators' results as tensors without values, for torch.compile and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.dtypes import compute_dtype
from .schemas import NUMBERS
from .terms import MOMENTS

FAKES: dict[str, Callable[..., Any]] = {}
"""The functions that make the results, by the operators' names."""


def _fake(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``_NAME`` for the operator ``NAME``, and for its overload if it has one."""
    name = function.__name__.removeprefix("_")
    torch.library.register_fake(f"fused_arcface::{name}", function)
    if name in NUMBERS:
        torch.library.register_fake(f"fused_arcface::{name}.tensor_numbers", function)
    FAKES[name] = function
    return function


@_fake
def _local_target(target: Tensor, *_: object) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64)


@_fake
def _row_factors(values: Tensor, *_: object) -> Tensor:
    return torch.empty_like(values)


@_fake
def _target_cosine(embeddings: Tensor, weight: Tensor, *_: object) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


@_fake
def _finish_negatives(negative_sum: Tensor, _: Tensor | None, center_sum: Tensor, *__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(negative_sum, dtype=torch.float64), torch.empty_like(center_sum)


@_fake
def _margin_loss(negative_lse: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, lse, d_lse, d_cosine = (torch.empty_like(negative_lse) for _ in range(4))
    return loss, lse, d_lse, d_cosine


@_fake
def _unit_embedding_grad(weight: Tensor, target: Tensor, mean_center: Tensor, *_: object) -> Tensor:
    return torch.empty_like(mean_center)


@_fake
def _embedding_grad(d_unit: Tensor, embeddings: Tensor, *_: object) -> Tensor:
    return torch.empty_like(embeddings)


@_fake
def _class_max(embeddings: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


@_fake
def _class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    *_: object,
    **__: object,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))
    return rows, torch.empty_like(rows), rows.new_empty(embeddings.shape if with_center_sum else (0,))


@_fake
def _weight_grad(embeddings: Tensor, weight: Tensor, *_: object, classes: Tensor | None = None, **__: object) -> Tensor:
    return torch.empty_like(weight) if classes is None else weight.new_empty(classes.shape[0], weight.shape[1])


@_fake
def _class_moments(embeddings: Tensor, weight: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    maximum = embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))
    return maximum.new_empty(maximum.shape[0], MOMENTS, dtype=torch.float64), maximum


@_fake
def _both_gradients(embeddings: Tensor, weight: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), embeddings.new_empty(embeddings.shape, dtype=compute_dtype(embeddings, weight))


@_fake
def _bias_grad(embeddings: Tensor, weight: Tensor, target: Tensor, lse: Tensor, *_: object, **__: object) -> Tensor:
    return lse.new_empty(())


@_fake
def _update_centers(*_: object, **__: object) -> None:
    return None
