"""The operators of the leaf stages: their names and arguments."""

from __future__ import annotations

import re
from typing import get_type_hints

import torch
from torch import Tensor

from .terms import CENTER_STATE, CenterStep

_ROWS = "Tensor embeddings, Tensor weight, Tensor target"
_COEFFICIENTS = "Tensor lse, Tensor negative_coefficient, Tensor target_coefficient"
_NEGATIVES = "int sub_centers=1, Tensor? threshold=None, Tensor? coefficients=None, Tensor? logistic=None"
# class_count: 0-dim int64, the centers from there on are padding; a tensor, so that nobody waits for a GPU
_COUNT = "Tensor? class_count=None"
# classes: (K,) int64 rows of weight, C for padding: the centers, to which target refers; without it all rows are
_CLASSES = "Tensor? classes=None"
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int"}


def _step_arguments() -> str:
    """Return the fields of a step as arguments. Each tensor that the step changes has a letter of its own: b, c, ..."""
    types = {name: _TYPES[kind] for name, kind in get_type_hints(CenterStep).items()}
    types |= {name: f"Tensor({letter}!)?" for name, letter in zip(CENTER_STATE, "bcdefgh", strict=False)}
    return ", ".join(f"{kind} {name}" for name, kind in types.items())


_SCHEMAS = {
    "local_target": "(Tensor target, int num_classes, int ignore_index) -> Tensor",
    "row_factors": "(Tensor values, str name, float greatest) -> Tensor",
    # O(N·C·D), over the classes
    "class_max": f"({_ROWS}, str backend, *, {_COUNT}, {_CLASSES}, {_NEGATIVES}) -> Tensor",
    "class_stats": f"({_ROWS}, Scalar scale, Tensor? shift, bool with_center_sum, str backend, "
    f"*, {_COUNT}, {_CLASSES}, {_NEGATIVES}) -> (Tensor, Tensor, Tensor)",
    "weight_grad": f"({_ROWS}, Scalar scale, {_COEFFICIENTS}, str backend, *, {_CLASSES}, {_NEGATIVES}) -> Tensor",
    # for a scale that is known after the pass over the classes, see adapting.py
    "class_moments": f"({_ROWS}, float scale, str backend) -> (Tensor, Tensor)",
    "both_gradients": f"({_ROWS}, float scale, {_COEFFICIENTS}, str backend) -> (Tensor, Tensor)",
    "update_centers": "(Tensor embeddings, Tensor(a!) weight, Tensor target, Scalar scale, "
    f"{_COEFFICIENTS}, {_step_arguments()}, str backend, *, {_NEGATIVES}) -> ()",
    "bias_grad": f"({_ROWS}, Tensor lse, Tensor d_lse, str backend, *, {_COUNT}, {_NEGATIVES}) -> Tensor",
    # O(N·D) and O(N), over the rows
    "target_cosine": f"({_ROWS}, str backend) -> Tensor",
    "finish_negatives": "(Tensor negative_sum, Tensor? shift, Tensor center_sum, str backend) -> (Tensor, Tensor)",
    "margin_loss": "(Tensor negative_lse, Tensor target_cosine, Scalar scale, float m1, float m2, float m3,"
    " str boundary, str gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "unit_embedding_grad": "(Tensor weight, Tensor target, Tensor mean_center, Tensor negative_coefficient,"
    " Tensor target_coefficient, str backend) -> Tensor",
    "embedding_grad": "(Tensor d_unit, Tensor embeddings, str backend) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fused_arcface::{_name}", _schema)

NUMBERS = {
    "class_stats": ("scale",),
    "weight_grad": ("scale",),
    "update_centers": ("scale",),
    "margin_loss": ("scale", "m1", "m2", "m3"),
}
"""The numbers of an operator that may change from step to step. Its overload takes them as tensors; see
:func:`fused_arcface.engine.ops.for_numbers`."""

for _name, _numbers in NUMBERS.items():
    _schema = _SCHEMAS[_name]
    for _number in _numbers:
        _schema = re.sub(rf"\w+ {_number}\b", f"Tensor {_number}", _schema)
    torch.library.define(f"fused_arcface::{_name}.tensor_numbers", _schema)
