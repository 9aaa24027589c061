"""The leaf operators alone, by backend: where a change of a kernel shows first."""

from __future__ import annotations

import pytest
import torch

from fused_arcface import backends
from fused_arcface.app.benchmark.cases import Inputs

SCALE = 64.0
ops = torch.ops.fused_arcface


@pytest.fixture(params=backends.NAMES)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    try:
        return backends.select(request.param, device)
    except (RuntimeError, ValueError) as error:
        pytest.skip(str(error))


def run(function, device):
    """What to time: the call, and on a GPU its end."""

    def timed():
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return timed


def assert_close(mine: torch.Tensor, right: torch.Tensor) -> None:
    worst = float((mine.double() - right.double()).abs().max() / right.double().abs().max())
    assert worst < (1e-4 if mine.dtype == torch.float32 else 3e-2), worst


def test_class_max(benchmark, inputs: Inputs, backend: str, device: torch.device) -> None:
    arguments = (*inputs, backend)
    assert_close(ops.class_max(*arguments), ops.class_max(*inputs, "torch"))
    benchmark(run(lambda: ops.class_max(*arguments), device))


@pytest.mark.parametrize("with_center_sum", [False, True], ids=["sums", "center_sum"])
def test_class_stats(benchmark, inputs: Inputs, backend: str, with_center_sum: bool, device: torch.device) -> None:
    arguments = (*inputs, SCALE, None, with_center_sum)
    mine, right = ops.class_stats(*arguments, backend), ops.class_stats(*arguments, "torch")
    for one, other in zip(mine[: 2 + with_center_sum], right, strict=False):
        assert_close(one, other)
    benchmark(run(lambda: ops.class_stats(*arguments, backend), device))


def test_weight_grad(benchmark, inputs: Inputs, backend: str, device: torch.device) -> None:
    total, _, _ = ops.class_stats(*inputs, SCALE, None, False, "torch")
    coefficient = torch.full_like(total, SCALE / total.numel())
    arguments = (*inputs, SCALE, total.double().log(), coefficient, -coefficient)
    assert_close(ops.weight_grad(*arguments, backend), ops.weight_grad(*arguments, "torch"))
    benchmark(run(lambda: ops.weight_grad(*arguments, backend), device))
