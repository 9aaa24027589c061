"""The leaf stages as ``torch.library`` operators: schemas and fakes once, implementations by backend name.

:mod:`fused_arcface.engine.autograd` calls ``torch.ops.fused_arcface.*``. The operators have no derivative of their own.
:mod:`fused_arcface.backends.torch` gives their shapes and meanings.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..base.checks import check_row_factors, check_target_range
from ..base.dtypes import compute_dtype
from ..base.ranges import POSITIVE, check_number
from .terms import IGNORED, INVALID, MOMENTS, PLAIN, CenterStep, Negatives, RowGradients, check_update

_ROWS = "Tensor embeddings, Tensor weight, Tensor target"
_COEFFICIENTS = "Tensor lse, Tensor negative_coefficient, Tensor target_coefficient"
_NEGATIVES = "*, int sub_centers=1, Tensor? threshold=None, Tensor? coefficients=None, Tensor? logistic=None"
_SCHEMAS = {
    "local_target": "(Tensor target, int num_classes, int ignore_index) -> Tensor",
    "row_factors": "(Tensor values, str name, float greatest) -> Tensor",
    # O(N·C·D), over the classes
    # class_count: 0-dim int64, the rows of weight from there on are padding; a tensor, so that nobody waits for a GPU
    "class_max": f"({_ROWS}, str backend, Tensor? class_count=None, {_NEGATIVES}) -> Tensor",
    "class_stats": f"({_ROWS}, Scalar scale, Tensor? shift, bool with_center_sum, str backend, "
    f"Tensor? class_count=None, {_NEGATIVES}) -> (Tensor, Tensor, Tensor)",
    "weight_grad": f"({_ROWS}, Scalar scale, {_COEFFICIENTS}, str backend, {_NEGATIVES}) -> Tensor",
    # for a scale that is known after the pass over the classes, see adapting.py
    "class_moments": f"({_ROWS}, float scale, str backend) -> (Tensor, Tensor)",
    "both_gradients": f"({_ROWS}, float scale, {_COEFFICIENTS}, str backend) -> (Tensor, Tensor)",
    "update_centers": "(Tensor embeddings, Tensor(a!) weight, Tensor target, Scalar scale, "
    f"{_COEFFICIENTS}, Tensor? classes, Tensor(b!)? momentum_buffer, Tensor(c!)? momentum_scale, float lr, "
    "float momentum, float weight_decay, int rounding_key, int class_start, Tensor active, "
    f"Tensor? row_ids, str backend, {_NEGATIVES}) -> ()",
    "bias_grad": f"({_ROWS}, Tensor lse, Tensor d_lse, str backend, Tensor? class_count=None, {_NEGATIVES}) -> Tensor",
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

# The numbers of an operator that may change from step to step. Its overload takes them as tensors; see for_numbers.
_NUMBERS = {
    "class_stats": ("scale",),
    "weight_grad": ("scale",),
    "update_centers": ("scale",),
    "margin_loss": ("scale", "m1", "m2", "m3"),
}


def reads_for_free(number: Tensor) -> bool:
    """Return true if the host waits for nothing when it reads a tensor."""
    return number.device.type == "cpu"


def readable(scale: float | Tensor) -> float | Tensor:
    """Return a scale as a number, or as a 0-dim fp64 tensor if the host cannot read it without a wait."""
    if not isinstance(scale, Tensor):
        return scale
    scale = scale.detach()
    if torch.compiler.is_compiling() or not reads_for_free(scale):
        return scale.double()
    number = float(scale)
    check_number("scale", number, POSITIVE)
    return number


def for_numbers(operator: Any, *numbers: float | Tensor) -> tuple[Callable[..., Any], tuple[float | Tensor, ...]]:
    """Return the overload of an operator to call, and the operator's numbers as that overload takes them.

    A number that changes is a symbol under torch.compile. Inductor has no number that is unknown until the graph runs:
    one that reaches an operator as a number makes a graph for each value. A product with a tensor may be unknown.
    """
    if any(isinstance(each, Tensor) for each in numbers):
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return operator.tensor_numbers, tuple(each if isinstance(each, Tensor) else each * one for each in numbers)
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not all(has_static_value(each) for each in numbers if not isinstance(each, Tensor)):
            one = torch.ones((), dtype=torch.float64, device="cpu")
            return operator.tensor_numbers, tuple(each * one for each in numbers)
    return operator.default, numbers


def _run_with_numbers(name: str, *arguments: Any, **options: Any) -> Any:
    """Run an operator of that name with its tensors of one number read, where the host waits for nothing.

    Others are scales that only the device knows. The backend then has the feature ``device_scale``.
    """
    operator = getattr(torch.ops.fused_arcface, name).default
    names = [argument.name for argument in operator._schema.arguments]
    read = [
        given.item() if argument in _NUMBERS[name] and reads_for_free(given) else given
        for argument, given in zip(names, arguments, strict=False)
    ]
    if isinstance(read[names.index("scale")], Tensor):
        return _OF_DEVICE[name](*read, **options)
    return operator(*read, **options)


_OF_DEVICE: dict[str, Callable[..., Any]] = {}
"""The functions behind the operators that take a scale which only the device knows."""


def _implementation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator, also for a scale which only the device knows."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.impl(f"fused_arcface::{name}", "default", function)
        _OF_DEVICE[name] = function
        return function

    return register


for _name, _numbers in _NUMBERS.items():
    _schema = _SCHEMAS[_name]
    for _number in _numbers:
        _schema = re.sub(rf"\w+ {_number}\b", f"Tensor {_number}", _schema)
    _overload = f"fused_arcface::{_name}.tensor_numbers"
    torch.library.define(_overload, _schema)
    torch.library.impl(_overload, "default", functools.partial(_run_with_numbers, _name))


@torch.library.impl("fused_arcface::local_target", "default")
def _local_target(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (N,) of any integer dtype as int64, -1 for ignored rows, -2 for those out of range.

    An operator, since its check reads the values. On a GPU that would wait for the device: there an invalid label's
    loss is NaN (the backends' target_cosine), unless FUSED_ARCFACE_DEBUG=1 asks for the check.
    """
    target = target.long()
    on_cpu = target.device.type == "cpu"
    if on_cpu and target.numel() > 0:
        low, high = (int(each) for each in torch.aminmax(target))
        if low >= 0 and high < num_classes and not 0 <= ignore_index < num_classes:  # all rows count
            return target.clone()
    if on_cpu or os.environ.get("FUSED_ARCFACE_DEBUG") == "1":
        check_target_range(target, num_classes, ignore_index)
    valid = torch.where((target >= 0) & (target < num_classes), target, INVALID)
    return torch.where(target == ignore_index, IGNORED, valid)


@torch.library.register_fake("fused_arcface::local_target")
def _local_target_fake(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.int64)


@torch.library.impl("fused_arcface::row_factors", "default")
def _row_factors(values: Tensor, name: str, greatest: float) -> Tensor:
    """Factors (N,) as they are; an error if one is not finite, below 0 or above ``greatest``.

    An operator for the same reason as local_target. On a GPU the values are not read either, unless
    FUSED_ARCFACE_DEBUG=1 asks for it.
    """
    if values.device.type == "cpu" or os.environ.get("FUSED_ARCFACE_DEBUG") == "1":
        check_row_factors(name, values, greatest)
    return values.clone()


@torch.library.register_fake("fused_arcface::row_factors")
def _row_factors_fake(values: Tensor, name: str, greatest: float) -> Tensor:
    return torch.empty_like(values)


def _run(name: str, *arguments: Any, class_count: Tensor | None = None, negatives: Negatives = PLAIN) -> Any:
    """Run the stage of that name by the backend that the last argument names.

    A backend without the features padding, sub-centers and modulated negatives need not have those parameters.
    """
    *inputs, backend = arguments
    rarer: dict[str, Any] = {} if class_count is None else {"class_count": class_count}
    if not negatives.plain:
        rarer["negatives"] = negatives
    return getattr(backends.load(backend), name)(*inputs, **rarer)


# The stages over the rows are the backend's own functions; those over the classes below know of a shard without any.
for _name in ("target_cosine", "finish_negatives", "margin_loss", "unit_embedding_grad", "embedding_grad"):
    torch.library.impl(f"fused_arcface::{_name}", "default", functools.partial(_run, _name))


@torch.library.register_fake("fused_arcface::target_cosine")
def _target_cosine_fake(embeddings: Tensor, weight: Tensor, target: Tensor, backend: str) -> Tensor:
    return embeddings.new_empty(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))


@torch.library.register_fake("fused_arcface::finish_negatives")
def _finish_negatives_fake(
    negative_sum: Tensor, shift: Tensor | None, center_sum: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(negative_sum, dtype=torch.float64), torch.empty_like(center_sum)


@torch.library.register_fake("fused_arcface::margin_loss.tensor_numbers")
@torch.library.register_fake("fused_arcface::margin_loss")
def _margin_loss_fake(
    negative_lse: Tensor, target_cosine: Tensor, *numbers: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, lse, d_lse, d_cosine = (torch.empty_like(negative_lse) for _ in range(4))
    return loss, lse, d_lse, d_cosine


@torch.library.register_fake("fused_arcface::unit_embedding_grad")
def _unit_embedding_grad_fake(weight: Tensor, target: Tensor, mean_center: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(mean_center)


@torch.library.register_fake("fused_arcface::embedding_grad")
def _embedding_grad_fake(d_unit: Tensor, embeddings: Tensor, backend: str) -> Tensor:
    return torch.empty_like(embeddings)


@torch.library.impl("fused_arcface::class_max", "default")
def _class_max(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    class_count: Tensor | None = None,
    **negatives: Any,
) -> Tensor:
    if weight.shape[0] == 0:
        return embeddings.new_full(embeddings.shape[:1], -torch.inf, dtype=compute_dtype(embeddings, weight))
    arguments = embeddings, weight, target, backend
    result: Tensor = _run("class_max", *arguments, class_count=class_count, negatives=Negatives(**negatives))
    return result


@torch.library.register_fake("fused_arcface::class_max")
def _class_max_fake(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    class_count: Tensor | None = None,
    **_: object,
) -> Tensor:
    return _target_cosine_fake(embeddings, weight, target, backend)


@_implementation("class_stats")
def _class_stats(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    backend: str,
    class_count: Tensor | None = None,
    **negatives: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.shape[0] == 0:  # a shard whose step samples none of its classes; no backend need know of it
        rows = embeddings.new_zeros(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))
        center_sum = rows.new_zeros(embeddings.shape if with_center_sum else (0,))
        return rows, torch.full_like(rows, -torch.inf), center_sum
    arguments = embeddings, weight, target, scale, shift, with_center_sum, backend
    result: tuple[Tensor, Tensor, Tensor] = _run(
        "class_stats", *arguments, class_count=class_count, negatives=Negatives(**negatives)
    )
    return result


@torch.library.register_fake("fused_arcface::class_stats.tensor_numbers")
@torch.library.register_fake("fused_arcface::class_stats")
def _class_stats_fake(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    shift: Tensor | None,
    with_center_sum: bool,
    backend: str,
    class_count: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(embeddings, weight)
    rows = embeddings.new_empty(embeddings.shape[0], dtype=dtype)
    center_sum = embeddings.new_empty(embeddings.shape if with_center_sum else (0,), dtype=dtype)
    return rows, torch.empty_like(rows), center_sum


@_implementation("weight_grad")
def _weight_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    *gradients_and_backend: Any,
    **negatives: Any,
) -> Tensor:
    *gradients, backend = gradients_and_backend
    if weight.shape[0] == 0:
        return torch.empty_like(weight)
    arguments = embeddings, weight, target, RowGradients(*gradients), backend
    result: Tensor = _run("weight_grad", *arguments, negatives=Negatives(**negatives))
    return result


@torch.library.register_fake("fused_arcface::weight_grad.tensor_numbers")
@torch.library.register_fake("fused_arcface::weight_grad")
def _weight_grad_fake(embeddings: Tensor, weight: Tensor, *rest: object, **_: object) -> Tensor:
    return torch.empty_like(weight)


@torch.library.impl("fused_arcface::class_moments", "default")
def _class_moments(
    embeddings: Tensor, weight: Tensor, target: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if weight.shape[0] == 0:
        moments, maximum = _class_moments_fake(embeddings, weight, target, scale, backend)
        return moments.zero_(), maximum.fill_(-torch.inf)
    result: tuple[Tensor, Tensor] = _run("class_moments", embeddings, weight, target, scale, backend)
    return result


@torch.library.register_fake("fused_arcface::class_moments")
def _class_moments_fake(
    embeddings: Tensor, weight: Tensor, target: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    maximum = _target_cosine_fake(embeddings, weight, target, backend)
    return maximum.new_empty(maximum.shape[0], MOMENTS, dtype=torch.float64), maximum


@torch.library.impl("fused_arcface::both_gradients", "default")
def _both_gradients(
    embeddings: Tensor, weight: Tensor, target: Tensor, *gradients_and_backend: Any
) -> tuple[Tensor, Tensor]:
    *gradients, backend = gradients_and_backend
    if weight.shape[0] == 0:
        d_centers, d_unit = _both_gradients_fake(embeddings, weight)
        return d_centers, d_unit.zero_()
    arguments = embeddings, weight, target, RowGradients(*gradients), backend
    result: tuple[Tensor, Tensor] = _run("both_gradients", *arguments)
    return result


@torch.library.register_fake("fused_arcface::both_gradients")
def _both_gradients_fake(embeddings: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), embeddings.new_empty(embeddings.shape, dtype=compute_dtype(embeddings, weight))


@torch.library.impl("fused_arcface::bias_grad", "default")
def _bias_grad(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    d_lse: Tensor,
    backend: str,
    class_count: Tensor | None = None,
    **negatives: Any,
) -> Tensor:
    if weight.shape[0] == 0:
        return lse.new_zeros(())
    arguments = embeddings, weight, target, lse, d_lse, backend
    result: Tensor = _run("bias_grad", *arguments, class_count=class_count, negatives=Negatives(**negatives))
    return result


@torch.library.register_fake("fused_arcface::bias_grad")
def _bias_grad_fake(
    embeddings: Tensor, weight: Tensor, target: Tensor, lse: Tensor, *_: object, **__: object
) -> Tensor:
    return lse.new_empty(())


@_implementation("update_centers")
def _update_centers(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    *terms_and_backend: Any,
    **negatives: Any,
) -> None:
    *terms, backend = terms_and_backend
    width = len(RowGradients._fields)
    gradients, step = RowGradients(*terms[:width]), CenterStep(*terms[width:])
    check_update(weight, step.momentum_buffer, step.momentum_scale)
    if step.classes is not None:
        step = step._replace(classes=step.classes.contiguous())
    if (weight if step.classes is None else step.classes).shape[0] > 0:
        _run("update_centers", embeddings, weight, target, gradients, step, backend, negatives=Negatives(**negatives))


@torch.library.register_fake("fused_arcface::update_centers.tensor_numbers")
@torch.library.register_fake("fused_arcface::update_centers")
def _update_centers_fake(*_: object, **__: object) -> None:
    return None
