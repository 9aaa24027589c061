"""torch.library.opcheck of every operator that the package defines: one that is new fails here until it has a case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import BACKENDS, Case, make_inputs
from torch import Tensor

import fused_arcface as fa
from fused_arcface import backends, distillation
from fused_arcface.engine.terms import CenterStep

assert distillation.distillation_loss is fa.distillation_loss  # its operators are defined when it is imported

N, C, D, K = 5, 12, 7, 6
GENERATOR = torch.Generator().manual_seed(0)
X, W, *_ = make_inputs(Case(N=N, C=C, D=D))
TARGET = torch.tensor([0, 5, -1, 2, 11])
ROWS = torch.linspace(0.1, 1, N)
LSE = torch.full((N,), 3.0, dtype=torch.float64)
GRADIENTS = (LSE, ROWS, -ROWS)
MEANS = torch.randn(N, D, generator=GENERATOR)
LOGISTIC = torch.tensor([8.0, 3.0, 0.2, 0.1, -1.0], dtype=torch.float64)
NUMBERS = (0.1, 0.9, 5e-4, 3, 4)
"""lr, momentum, weight decay, rounding key, first global class."""


def step(momentum: torch.dtype | None, sampled: bool) -> CenterStep:
    buffer = None if momentum is None else torch.zeros(C, D, dtype=momentum)
    units = torch.full((C, 1), 0.01) if momentum == torch.int8 else None
    classes = torch.tensor([0, 2, 3, 7, 8, 10]) if sampled else None
    ids = torch.arange(20, 20 + C) if sampled else None
    return CenterStep(classes, buffer, units, *NUMBERS, torch.tensor(True), ids)


def update(scale: Any, momentum: torch.dtype | None, sampled: bool) -> tuple[Any, ...]:
    return X, W, TARGET % K if sampled else TARGET, scale, *GRADIENTS, *step(momentum, sampled)


def stages(scale: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The operators with a scale, which is a number or a 0-dim tensor."""
    margin = [1.0, 0.5, 0.1]
    if isinstance(scale, Tensor):
        margin = [torch.tensor(each, dtype=torch.float64) for each in margin]
    updates = [(torch.float32, True), (torch.int8, False), (None, True), (torch.bfloat16, False), (torch.float64, True)]
    return {
        "class_stats": [(X, W, TARGET, scale, LSE, True), (X, W, TARGET, scale, None, False)],
        "weight_grad": [(X, W, TARGET, scale, *GRADIENTS)],
        "update_centers": [update(scale, *each) for each in updates],
        "margin_loss": [(6 * ROWS, ROWS, scale, *margin, "hard", "exact")],
    }


OPERATORS: dict[str, list[tuple[Any, ...]]] = {
    "class_max": [(X, W, TARGET)],
    "class_moments": [(X, W, TARGET, 8.0), (X.bfloat16(), W[:0], TARGET.clamp(max=-1), 8.0)],
    "both_gradients": [(X, W, TARGET, 8.0, *GRADIENTS), (X, W[:0], TARGET.clamp(max=-1), 8.0, *GRADIENTS)],
    "bias_grad": [(X, W, TARGET, LSE, LSE)],
    "target_cosine": [(X, W, TARGET), (X.bfloat16(), W.double(), TARGET)],
    "finish_negatives": [(ROWS, LSE, MEANS), (ROWS, None, ROWS.new_empty(0))],
    "unit_embedding_grad": [(W, TARGET, MEANS, ROWS, -ROWS)],
    "embedding_grad": [(MEANS, X), (MEANS, X.half())],
    **stages(8.0),
    **{f"{name}.tensor_numbers": given for name, given in stages(torch.tensor(8.0, dtype=torch.float64)).items()},
}
"""The operators of a backend, whose name follows the arguments."""

OF_NO_BACKEND: dict[str, list[tuple[Any, ...]]] = {
    "local_target": [(TARGET.clamp(min=0), C, 2), (TARGET.clamp(min=0).to(torch.uint8), C, -100)],
    "row_factors": [(ROWS, "share", 1.0)],
    "check_first_run": [(ROWS.clone(),)],
    "hardest_negatives": [(X, W, TARGET, 3, 1), (X, W, TARGET, 3, 2, torch.tensor(8))],
}
SCALES = torch.tensor([8.0, 5.0], dtype=torch.float64)
OF_TEACHER = (X, W, MEANS, W.double(), SCALES)
OF_NO_BACKEND["divergence"] = [OF_TEACHER]
OF_NO_BACKEND["divergence_grad"] = [(*OF_TEACHER, LSE, LSE, LSE, LSE, [True, False, True, True])]


def overload(name: str) -> Any:
    packet, _, kind = name.partition(".")
    return getattr(getattr(torch.ops.fused_arcface, packet), kind or "default")


def test_every_operator_is_here() -> None:
    defined = {
        each.removeprefix("fused_arcface::")
        for each in torch._C._dispatch_get_all_op_names()
        if each.startswith("fused_arcface::")
    }
    assert defined == {*OPERATORS, *OF_NO_BACKEND}


# The heads call these operators only of backends with a feature.
FEATURES = {"margin_loss": "fused_margin", "class_moments": "late_scale", "both_gradients": "late_scale"}
CASES = [
    (name, backend)
    for name in OPERATORS
    for backend in BACKENDS
    if backends.has(backend, FEATURES.get(name.split(".")[0], "sub_centers"))
]


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.slow
def test_opcheck(name: str, backend: str) -> None:
    more = {"logistic": LOGISTIC} if name == "bias_grad" else {}
    for given in OPERATORS[name]:
        torch.library.opcheck(overload(name), (*given, backend), more)


@pytest.mark.parametrize("name", OF_NO_BACKEND)
def test_opcheck_of_no_backend(name: str) -> None:
    for given in OF_NO_BACKEND[name]:
        torch.library.opcheck(overload(name), given)
