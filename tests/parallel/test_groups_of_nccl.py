"""Ranks in a group as NCCL's: it has no backend for the CPU, and nothing but torch watches over its collectives.

gloo stands in for NCCL. torch checks before each collective that all ranks make the same one, of the same size
(TORCH_DISTRIBUTED_DEBUG=DETAIL), and raises an error that names it where NCCL would hang or mix up numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import distributed_helpers

import fused_arcface as fa
from fused_arcface.engine.loss_factor import RefusedFactors
from fused_arcface.parallel import ranks as parallel_ranks
from fused_arcface.parallel.agreement import Header
from fused_arcface.parallel.watch import GroupState

pytestmark = pytest.mark.distributed

D, CLASSES = 8, 20
REFUSED = "RuntimeError: rank(s) 1 refused the arguments of this step: see the error there"


def outcomes_of_steps(options: dict[str, Any]) -> dict[str, Any]:
    """Run one case after the other on one head, where rank 1 differs; return each one's result or error."""
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()
    group = dist.new_group(timeout=timedelta(seconds=60))
    assert type(group._get_backend(torch.device("cpu"))).__name__ == "_ProcessGroupWrapper"
    rank = dist.get_rank()
    differs, head = rank == 1, fa.PartialFC(D, CLASSES, group=group, backend="torch", **options)

    def step(rows: int = 4, with_gradient: bool = True, **arguments: Any) -> float:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(rows, D, generator=generator).requires_grad_(with_gradient)
        result = head(x, torch.randint(CLASSES, (rows,), generator=generator), **arguments)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
        assert (x.grad is not None) == with_gradient
        return float(loss)

    def evaluated() -> float:
        head.train(not differs)
        try:
            return step()
        finally:
            head.train()

    cases: dict[str, Callable[[], Any]] = {
        "alike": step,
        "more rows": lambda: step(9 if differs else 4),
        "return_stats": lambda: step(return_stats=not differs),
        "no gradient": lambda: step(with_gradient=not differs),
        "no rows": lambda: step(0 if differs else 4),
        "refused": lambda: head(torch.zeros(4, D + 1 if differs else D), torch.zeros(4, dtype=torch.int64)),
        "eval": evaluated,
        "k": lambda: head.topk(torch.zeros(2, D), 3 if differs else 2),
        "logits refused": lambda: head.logits(torch.zeros(D) if differs else torch.zeros(2, D)),
        "alike again": step,
    }
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_ranks.Ranks, "_has_cpu_backend", False)
        patch.setattr(GroupState, "watches", lambda *_: False)
        for name, case in cases.items():
            try:
                found[name] = case()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"sample_rate": 0.5, "center_optimizer": fa.CenterSGD(0.1)}, {"scale": 1000.0, "margin": fa.CurricularFace()}],
    ids=str,
)
def test_what_differs_between_ranks(options: dict[str, Any]) -> None:
    first, second = distributed_helpers.run_ranks(2, outcomes_of_steps, options)
    for name in ("alike", "more rows", "return_stats", "no gradient", "no rows", "alike again"):
        assert isinstance(first[name], float) and first[name] == second[name], (name, first[name], second[name])
    assert second["refused"] == "ValueError: embeddings must be (N, D=8); got (4, 9)"
    assert second["logits refused"] == "ValueError: embeddings must be (N, D=8); got (8,)"
    assert first["refused"] == first["logits refused"] == REFUSED
    got = {"eval": "training must be the same on every rank; got rank 0: True, rank 1: False"}
    got["k"] = "k must be the same on every rank; got rank 0: 2, rank 1: 3"
    for name, rule in got.items():
        assert first[name] == second[name] == f"ValueError: PartialFC: {rule}"


def devices_of_collectives(options: dict[str, Any]) -> list[tuple[str, str]]:
    """Each collective of a step on the meta device, which stands in for a GPU, and the device of its tensors."""
    head = fa.PartialFC(D, CLASSES, backend="torch", device="meta", **options)
    calls: list[tuple[str, str]] = []

    def record(name: str) -> Callable[..., Any]:
        def collective(*tensors: torch.Tensor, **_: Any) -> mock.Mock:
            calls.extend((name, tensor.device.type) for tensor in tensors)
            return mock.Mock()  # a work that has ended

        return collective

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_ranks.Ranks, "_has_cpu_backend", False)
        patch.setattr(parallel_ranks, "_headers", lambda numbers: [Header(4, 1, 1)] * 2)
        for name in ("_all_gather", "_reduce_scatter"):
            patch.setattr(parallel_ranks, name, record(name))
        for name in ("all_reduce", "all_gather_object", "broadcast"):
            patch.setattr(dist, name, record(name))
        patch.setattr(RefusedFactors, "see", lambda self, factor: None)  # read when the GPU has got there
        x = torch.empty(4, D, device="meta", requires_grad=True)
        loss, _ = head(x, torch.empty(4, dtype=torch.int64, device="meta"), return_stats=True)
        loss.backward()
    return calls


@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.5, "center_optimizer": fa.CenterSGD(0.1)}], ids=str)
def test_every_collective_of_a_step_is_on_the_device(options: dict[str, Any]) -> None:
    for calls in distributed_helpers.run_ranks(2, devices_of_collectives, options):
        assert {name for name, _ in calls} == {"_all_gather", "all_reduce", "_reduce_scatter"}
        assert {device for _, device in calls} == {"meta"}
