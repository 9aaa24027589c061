"""The leaf stages as ``torch.library`` operators, implemented by backend name.

:mod:`fused_arcface.engine.operators` lists them. :mod:`fused_arcface.backends.torch` gives their shapes and meanings.
:mod:`fused_arcface.engine.autograd` calls them through :mod:`fused_arcface.engine.direct`. The operators have no
derivative of their own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..base.checks import check_row_factors, check_target_range
from ..base.ranges import POSITIVE, check_number
from .operators import OPERATORS
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
        given.item() if argument in OPERATORS[name].numbers and reads_for_free(given) else given
        for argument, given in zip(names, arguments, strict=False)
    ]
    if isinstance(read[names.index("scale")], Tensor):
        return FUNCTIONS[name](*read, **options)
    return operator(*read, **options)


def are_all_classes(target: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Return true if labels (N,) are all classes and none of them is ignored. On a GPU this is a wait."""
    if target.numel() == 0 or 0 <= ignore_index < num_classes:
        return False
    low, high = torch.aminmax(target.long())
    return int(low) >= 0 and int(high) < num_classes


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
        results = OPERATORS[name].results(embeddings, weight, *arguments, classes=classes)
        each_result = [results] if isinstance(results, Tensor) else results
        for result, value in zip(each_result, OPERATORS[name].over_no_class, strict=True):
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


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the name of each operator, and of each overload, with the function behind it."""
    own: dict[str, Callable[..., Any]] = {
        "local_target": _local_target,
        "row_factors": _row_factors,
        "update_centers": _update_centers,
    }
    for name, operator in OPERATORS.items():
        run = _run_over_classes if operator.over_no_class else _run
        run = _run_with_gradients if name in ("weight_grad", "both_gradients") else run
        yield name, own.get(name, functools.partial(run, name))
        if operator.numbers:
            yield f"{name}.tensor_numbers", functools.partial(_run_with_numbers, name)


FUNCTIONS = dict(_functions())
"""The functions behind the operators, by their names and those of their overloads."""
for _name, _function in FUNCTIONS.items():
    torch.library.impl(f"fused_arcface::{_name}", "default", _function)
