"""The operators of the leaf stages: their arguments, and the tensors that they return.

:mod:`fused_arcface.engine.ops` has the functions behind them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..base.dtypes import compute_dtype
from .terms import CENTER_STATE, MOMENTS, CenterStep


class Operator(NamedTuple):
    """One operator."""

    schema: str
    results: Callable[..., Any]
    """A function of the same arguments. It returns tensors like the operator's, without values: for torch.compile."""
    over_no_class: tuple[float, ...] = ()
    """The values that fill the results if a step uses no class of the shard. Only stages over the classes have them.
    Backends never see that case."""
    numbers: tuple[str, ...] = ()
    """The numbers that may change from step to step. The operator's overload takes them as tensors; see
    :func:`fused_arcface.engine.ops.for_numbers`."""


_ROWS = "Tensor embeddings, Tensor weight, Tensor target"
_COEFFICIENTS = "Tensor lse, Tensor negative_coefficient, Tensor target_coefficient"
_NEGATIVES = "int sub_centers=1, Tensor? threshold=None, Tensor? coefficients=None, Tensor? logistic=None"
# class_count: 0-dim int64; the centers from this index on are padding. It is a tensor, so the host waits for no GPU.
_COUNT = "Tensor? class_count=None"
# classes: (K,) int64, the rows of weight that are the centers, C for padding; target is an index into them. Without it
# all rows are the centers.
_CLASSES = "Tensor? classes=None"
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int"}


def _step_arguments() -> str:
    """Return the fields of a step as arguments. Each tensor that the step changes has a letter of its own: b, c, ..."""
    types = {name: _TYPES[kind] for name, kind in get_type_hints(CenterStep).items()}
    types |= {name: f"Tensor({letter}!)?" for name, letter in zip(CENTER_STATE, "bcdefgh", strict=False)}
    return ", ".join(f"{kind} {name}" for name, kind in types.items())


def _per_row(embeddings: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    """(N,) in the dtype of the sums."""
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


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
    rows = _per_row(embeddings, weight)
    return rows, torch.empty_like(rows), rows.new_empty(embeddings.shape if with_center_sum else (0,))


def _weight_grad(embeddings: Tensor, weight: Tensor, *_: object, classes: Tensor | None = None, **__: object) -> Tensor:
    return torch.empty_like(weight) if classes is None else weight.new_empty(classes.shape[0], weight.shape[1])


def _class_moments(embeddings: Tensor, weight: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    maximum = _per_row(embeddings, weight)
    return maximum.new_empty(maximum.shape[0], MOMENTS, dtype=torch.float64), maximum


def _both_gradients(embeddings: Tensor, weight: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), embeddings.new_empty(embeddings.shape, dtype=compute_dtype(embeddings, weight))


OPERATORS = {
    "local_target": Operator(
        "(Tensor target, int num_classes, int ignore_index) -> Tensor",
        lambda target, *_: torch.empty_like(target, dtype=torch.int64),
    ),
    "row_factors": Operator(
        "(Tensor values, str name, float greatest) -> Tensor", lambda values, *_: torch.empty_like(values)
    ),
    # O(N·C·D), over the classes
    "class_max": Operator(
        f"({_ROWS}, str backend, *, {_COUNT}, {_CLASSES}, {_NEGATIVES}) -> Tensor", _per_row, (-math.inf,)
    ),
    "class_stats": Operator(
        f"({_ROWS}, Scalar scale, Tensor? shift, bool with_center_sum, str backend, "
        f"*, {_COUNT}, {_CLASSES}, {_NEGATIVES}) -> (Tensor, Tensor, Tensor)",
        _class_stats,
        (0, -math.inf, 0),
        ("scale",),
    ),
    "weight_grad": Operator(
        f"({_ROWS}, Scalar scale, {_COEFFICIENTS}, str backend, *, {_CLASSES}, {_NEGATIVES}) -> Tensor",
        _weight_grad,
        (0,),
        ("scale",),
    ),
    # for a scale that is known after the pass over the classes, see adapting.py
    "class_moments": Operator(
        f"({_ROWS}, float scale, str backend) -> (Tensor, Tensor)", _class_moments, (0, -math.inf)
    ),
    "both_gradients": Operator(
        f"({_ROWS}, float scale, {_COEFFICIENTS}, str backend) -> (Tensor, Tensor)", _both_gradients, (0, 0)
    ),
    "bias_grad": Operator(
        f"({_ROWS}, Tensor lse, Tensor d_lse, str backend, *, {_COUNT}, {_NEGATIVES}) -> Tensor",
        lambda embeddings, weight, target, lse, *_, **__: lse.new_empty(()),
        (0,),
    ),
    "update_centers": Operator(
        f"(Tensor embeddings, Tensor(a!) weight, Tensor target, Scalar scale, {_COEFFICIENTS}, {_step_arguments()}, "
        f"str backend, *, {_NEGATIVES}) -> ()",
        lambda *_, **__: None,
        numbers=("scale",),
    ),
    # O(N·D) and O(N), over the rows
    "target_cosine": Operator(f"({_ROWS}, str backend) -> Tensor", _per_row),
    "finish_negatives": Operator(
        "(Tensor negative_sum, Tensor? shift, Tensor center_sum, str backend) -> (Tensor, Tensor)",
        lambda total, shift, centers, _: (torch.empty_like(total, dtype=torch.float64), torch.empty_like(centers)),
    ),
    "margin_loss": Operator(
        "(Tensor negative_lse, Tensor target_cosine, Scalar scale, float m1, float m2, float m3,"
        " str boundary, str gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        lambda lse, *_: tuple(torch.empty_like(lse) for _ in range(4)),
        numbers=("scale", "m1", "m2", "m3"),
    ),
    "unit_embedding_grad": Operator(
        "(Tensor weight, Tensor target, Tensor mean_center, Tensor negative_coefficient, Tensor target_coefficient,"
        " str backend) -> Tensor",
        lambda weight, target, mean_center, *_: torch.empty_like(mean_center),
    ),
    "embedding_grad": Operator(
        "(Tensor d_unit, Tensor embeddings, str backend) -> Tensor",
        lambda d_unit, embeddings, _: torch.empty_like(embeddings),
    ),
}

for _name, _operator in OPERATORS.items():
    _schemas = {_name: _operator.schema}
    if _operator.numbers:
        _numbers = "|".join(_operator.numbers)
        _schemas[f"{_name}.tensor_numbers"] = re.sub(rf"\w+ ({_numbers})\b", r"Tensor \1", _operator.schema)
    for _overload, _schema in _schemas.items():
        torch.library.define(f"fused_arcface::{_overload}", _schema)
        torch.library.register_fake(f"fused_arcface::{_overload}", _operator.results)
