"""The leaf stages as ``torch.library`` operators, implemented by backend name.

:mod:`fused_arcface.engine.autograd` calls them through :mod:`fused_arcface.engine.direct`. The operators have no
derivative of their own.
:mod:`fused_arcface.engine.schemas` lists them, :mod:`fused_arcface.backends.torch` gives their shapes and meanings.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..base.checks import check_row_factors, check_target_range
from ..base.ranges import POSITIVE, check_number
from .fakes import FAKES
from .schemas import NUMBERS
from .terms import IGNORED, INVALID, CenterStep, Negatives, RowGradients, check_update


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
    as_tensors = any(isinstance(each, Tensor) for each in numbers)
    if not as_tensors and torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        as_tensors = not all(has_static_value(each) for each in numbers if not isinstance(each, Tensor))
    if not as_tensors:
        return operator.default, numbers
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return operator.tensor_numbers, tuple(each if isinstance(each, Tensor) else each * one for each in numbers)


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


def _run(name: str, *arguments: Any, **options: Any) -> Any:
    """Run the stage of that name by the backend that the last argument names."""
    *inputs, backend = arguments
    return getattr(backends.load(backend), name)(*inputs, **options)


for _name in ("target_cosine", "finish_negatives", "margin_loss", "unit_embedding_grad", "embedding_grad"):
    _implementation(_name)(functools.partial(_run, _name))


_OVER_NO_CLASS = {
    "class_max": (-math.inf,),
    "class_stats": (0, -math.inf, 0),
    "weight_grad": (0,),
    "class_moments": (0, -math.inf),
    "both_gradients": (0, 0),
    "bias_grad": (0,),
}
"""The values in a stage's results where a step uses no class of the shard. Backends never see that case."""


def _run_over_classes(
    name: str,
    embeddings: Tensor,
    weight: Tensor,
    *arguments: Any,
    class_count: Tensor | None = None,
    classes: Tensor | None = None,
    **negatives: Any,
) -> Any:
    """Run a stage over the classes.

    A backend without the features padding, gathering, sub-centers and modulated negatives need not have the parameters
    for them.
    """
    if (weight if classes is None else classes).shape[0] == 0:
        results = FAKES[name](embeddings, weight, *arguments, classes=classes)
        each_result = [results] if isinstance(results, Tensor) else results
        for result, value in zip(each_result, _OVER_NO_CLASS[name], strict=True):
            result.fill_(value)
        return results
    options: dict[str, Any] = {} if class_count is None else {"class_count": class_count}
    if classes is not None:
        options["classes"] = classes.contiguous()
    rule = Negatives(**negatives)
    if not rule.plain:
        options["negatives"] = rule
    return _run(name, embeddings, weight, *arguments, **options)


def _run_with_gradients(
    name: str, embeddings: Tensor, weight: Tensor, target: Tensor, *arguments: Any, **options: Any
) -> Any:
    """Run a stage over the classes that takes the rows' gradients."""
    *gradients, backend = arguments
    return _run_over_classes(name, embeddings, weight, target, RowGradients(*gradients), backend, **options)


for _name in ("class_max", "class_stats", "class_moments", "bias_grad"):
    _implementation(_name)(functools.partial(_run_over_classes, _name))
for _name in ("weight_grad", "both_gradients"):
    _implementation(_name)(functools.partial(_run_with_gradients, _name))


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
    check_update(weight, step.state)
    if step.classes is not None:
        step = step._replace(classes=step.classes.contiguous())
    if (weight if step.classes is None else step.classes).shape[0] > 0:
        _run_over_classes("update_centers", embeddings, weight, target, gradients, step, backend, **negatives)
