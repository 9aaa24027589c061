"""Time the leaf operators alone, by backend: a change of a kernel shows here first."""

from __future__ import annotations

import pytest
import torch

from fused_arcface import backends
from fused_arcface.app.benchmark.cases import Inputs

SCALE = 64.0
ORACLE = next(iter(backends.available()))  # plain PyTorch comes first
ops = torch.ops.fused_arcface


@pytest.fixture(params=backends.available())
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Return each backend that runs here."""
    try:
        return backends.select(request.param, device)
    except (RuntimeError, ValueError) as error:
        pytest.skip(str(error))


def assert_close(mine: torch.Tensor, right: torch.Tensor) -> None:
    """Check a result against that of plain PyTorch."""
    worst = float((mine.double() - right.double()).abs().max() / right.double().abs().max())
    assert worst < (1e-4 if mine.dtype == torch.float32 else 3e-2), worst


def test_class_max(time, inputs: Inputs, backend: str) -> None:
    """Time the greatest cosine of each row."""
    arguments = (*inputs, backend)
    assert_close(ops.class_max(*arguments), ops.class_max(*inputs, ORACLE))
    time(lambda: ops.class_max(*arguments))


@pytest.mark.parametrize("with_center_sum", [False, True], ids=["sums", "center_sum"])
def test_class_stats(time, inputs: Inputs, backend: str, with_center_sum: bool) -> None:
    """Time the sums of each row."""
    arguments = (*inputs, SCALE, None, with_center_sum)
    mine, right = ops.class_stats(*arguments, backend), ops.class_stats(*arguments, ORACLE)
    for one, other in zip(mine[: 2 + with_center_sum], right, strict=False):
        assert_close(one, other)
    time(lambda: ops.class_stats(*arguments, backend))


def test_weight_grad(time, inputs: Inputs, backend: str) -> None:
    """Time the gradient by the class centers."""
    total, _, _ = ops.class_stats(*inputs, SCALE, None, False, ORACLE)
    coefficient = torch.full_like(total, SCALE / total.numel())
    arguments = (*inputs, SCALE, total.double().log(), coefficient, -coefficient)
    assert_close(ops.weight_grad(*arguments, backend), ops.weight_grad(*arguments, ORACLE))
    time(lambda: ops.weight_grad(*arguments, backend))
