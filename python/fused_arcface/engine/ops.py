"""The leaf stages as ``torch.library`` operators, implemented by backend name.

:mod:`fused_arcface.engine.autograd` calls them through :mod:`fused_arcface.engine.direct`. The operators have no
derivative of their own.
:mod:`fused_arcface.engine.schemas` lists them, :mod:`fused_arcface.backends.torch` gives their shapes and meanings.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..base.checks import check_row_factors, check_target_range
from ..base.dtypes import compute_dtype
from ..base.ranges import POSITIVE, check_number
from . import fakes
from .schemas import NUMBERS
from .terms import IGNORED, INVALID, PLAIN, CenterStep, Negatives, RowGradients, check_update


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

    Others are scales that only the device knows, which every backend takes.
    """
    operator = getattr(torch.ops.fused_arcface, name).default
    names = [argument.name for argument in operator._schema.arguments]
    read = [
        given.item() if argument in NUMBERS[name] and reads_for_free(given) else given
        for argument, given in zip(names, arguments, strict=False)
    ]
    if isinstance(read[names.index("scale")], Tensor):
        return FUNCTIONS[name](*read, **options)
    return operator(*read, **options)


FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The functions behind the operators, by their names and those of their overloads."""


def _implementation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.impl(f"fused_arcface::{name}", "default", function)
        FUNCTIONS[name] = function
        return function

    return register


for _name in NUMBERS:
    _implementation(f"{_name}.tensor_numbers")(functools.partial(_run_with_numbers, _name))


def are_all_classes(target: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Return true if labels (N,) are all classes and none of them is ignored. On a GPU this is a wait."""
    if target.numel() == 0 or 0 <= ignore_index < num_classes:
        return False
    low, high = torch.aminmax(target.long())
    return int(low) >= 0 and int(high) < num_classes


@_implementation("local_target")
def _local_target(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels (N,) of any integer dtype as int64, -1 for ignored rows, -2 for those out of range.

    An operator, since its check reads the values. On a GPU that would wait for the device: there an invalid label's
    loss is NaN (the backends' target_cosine), unless FUSED_ARCFACE_DEBUG=1 asks for the check.
    """
    on_cpu = target.device.type == "cpu"
    if on_cpu and are_all_classes(target, num_classes, ignore_index):
        return target.long().clone()
    target = target.long()
    if on_cpu or os.environ.get("FUSED_ARCFACE_DEBUG") == "1":
        check_target_range(target, num_classes, ignore_index)
    valid = torch.where((target >= 0) & (target < num_classes), target, INVALID)
    return torch.where(target == ignore_index, IGNORED, valid)


@_implementation("row_factors")
def _row_factors(values: Tensor, name: str, greatest: float) -> Tensor:
    """Factors (N,) as they are; an error if one is not finite, below 0 or above ``greatest``.

    An operator for the same reason as local_target. On a GPU the values are not read either, unless
    FUSED_ARCFACE_DEBUG=1 asks for it.
    """
    if values.device.type == "cpu" or os.environ.get("FUSED_ARCFACE_DEBUG") == "1":
        check_row_factors(name, values, greatest)
    return values.clone()


def _run(
    name: str,
    *arguments: Any,
    class_count: Tensor | None = None,
    classes: Tensor | None = None,
    negatives: Negatives = PLAIN,
) -> Any:
    """Run the stage of that name by the backend that the last argument names.

    A backend without the features padding, gathering, sub-centers and modulated negatives need not have those
    parameters.
    """
    *inputs, backend = arguments
    rarer: dict[str, Any] = {} if class_count is None else {"class_count": class_count}
    if classes is not None:
        rarer["classes"] = classes.contiguous()
    if not negatives.plain:
        rarer["negatives"] = negatives
    return getattr(backends.load(backend), name)(*inputs, **rarer)


# The stages over the rows are the backend's own functions; those over the classes below know of a shard without any.
for _name in ("target_cosine", "finish_negatives", "margin_loss", "unit_embedding_grad", "embedding_grad"):
    _implementation(_name)(functools.partial(_run, _name))


def _centers(weight: Tensor, classes: Tensor | None) -> Tensor:
    """Return a tensor with as many rows as a stage has centers."""
    return weight if classes is None else classes


@_implementation("class_max")
def _class_max(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    backend: str,
    class_count: Tensor | None = None,
    classes: Tensor | None = None,
    **negatives: Any,
) -> Tensor:
    if _centers(weight, classes).shape[0] == 0:
        return embeddings.new_full(embeddings.shape[:1], -torch.inf, dtype=compute_dtype(embeddings, weight))
    arguments = embeddings, weight, target, backend
    options: dict[str, Any] = {"class_count": class_count, "classes": classes, "negatives": Negatives(**negatives)}
    result: Tensor = _run("class_max", *arguments, **options)
    return result


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
    classes: Tensor | None = None,
    **negatives: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    # This step samples no class of the shard. Backends never see that case.
    if _centers(weight, classes).shape[0] == 0:
        rows = embeddings.new_zeros(embeddings.shape[0], dtype=compute_dtype(embeddings, weight))
        center_sum = rows.new_zeros(embeddings.shape if with_center_sum else (0,))
        return rows, torch.full_like(rows, -torch.inf), center_sum
    arguments = embeddings, weight, target, scale, shift, with_center_sum, backend
    options: dict[str, Any] = {"class_count": class_count, "classes": classes, "negatives": Negatives(**negatives)}
    result: tuple[Tensor, Tensor, Tensor] = _run("class_stats", *arguments, **options)
    return result


@_implementation("weight_grad")
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
    **negatives: Any,
) -> Tensor:
    if _centers(weight, classes).shape[0] == 0:
        return weight.new_empty(0, weight.shape[1])
    gradients = RowGradients(scale, lse, negative_coefficient, target_coefficient)
    options: dict[str, Any] = {"classes": classes, "negatives": Negatives(**negatives)}
    result: Tensor = _run("weight_grad", embeddings, weight, target, gradients, backend, **options)
    return result


@_implementation("class_moments")
def _class_moments(
    embeddings: Tensor, weight: Tensor, target: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if weight.shape[0] == 0:
        moments, maximum = fakes.class_moments(embeddings, weight, target, scale, backend)
        return moments.zero_(), maximum.fill_(-torch.inf)
    result: tuple[Tensor, Tensor] = _run("class_moments", embeddings, weight, target, scale, backend)
    return result


@_implementation("both_gradients")
def _both_gradients(
    embeddings: Tensor, weight: Tensor, target: Tensor, *gradients_and_backend: Any
) -> tuple[Tensor, Tensor]:
    *gradients, backend = gradients_and_backend
    if weight.shape[0] == 0:
        d_centers, d_unit = fakes.both_gradients(embeddings, weight)
        return d_centers, d_unit.zero_()
    arguments = embeddings, weight, target, RowGradients(*gradients), backend
    result: tuple[Tensor, Tensor] = _run("both_gradients", *arguments)
    return result


@_implementation("bias_grad")
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
    if _centers(weight, step.classes).shape[0] > 0:
        _run("update_centers", embeddings, weight, target, gradients, step, backend, negatives=Negatives(**negatives))
